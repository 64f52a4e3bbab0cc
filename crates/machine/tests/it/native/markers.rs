//! Markers in scripts: `once marker=FIELDS by=JOB`, `claim marker=FIELDS session=7 retry`, `confirm marker=FIELDS token=3`.

use super::Said;
use tenure_machine::*;

const DAY_MS: u64 = 24 * 3_600_000;

pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let name = || said.option("marker").unwrap().into();
    let text = |name: &str| said.option(name).unwrap_or_default().into();
    let token = || Revision(said.number("token"));
    let retention_ms = match said.option("keep") {
        Some(time) => crate::script::millis(time),
        None if said.has("forever") => 0,
        None => 30 * DAY_MS,
    };
    let mark = || MarkOnce { name: name(), by: text("by"), retention_ms, result: said.bytes("result") };
    let op = match said.verb {
        "once" => MarkerOp::Once(mark()),
        "mark" => MarkerOp::Put(mark()),
        "tell-marker" => MarkerOp::Tell(mark()),
        "claim" => MarkerOp::Claim(MarkerClaim {
            name: name(),
            by: text("by"),
            retention_ms,
            session: SessionId(said.number("session")),
            lease_ms: said.ms("lease"),
            on_death: match () {
                () if said.has("retry") => OnDeath::Retry,
                () if said.has("skip") => OnDeath::Skip,
                () => OnDeath::Ask,
            },
        }),
        "confirm" => MarkerOp::Confirm(MarkerConfirm { name: name(), token: token(), result: said.bytes("result") }),
        "unclaim" => MarkerOp::Release(MarkerRelease { name: name(), token: token() }),
        "delete-marker" => MarkerOp::Delete(MarkerDelete { name: name(), token: token(), reason: text("reason") }),
        _ => return None,
    };
    Some(op.into())
}

pub(super) fn show(machine: &Machine, ns: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    match (what, rest) {
        ("marker", [name]) => Some(match machine.object::<Marker>(ns, name.as_bytes()) {
            None => format!("no marker {name}"),
            Some(m) => {
                let events: Vec<_> = m
                    .events
                    .iter()
                    .map(|e| {
                        format!("{:?} at {} token={} by={} {}{}", e.kind, e.at, e.token, e.by, e.principal, e.reason)
                    })
                    .collect();
                format!(
                    "marker {name} {:?} token={} by={} at={} attempt={} first={} until={:?} session={} events [{}]",
                    m.state,
                    m.token,
                    m.by,
                    m.at,
                    m.attempt,
                    m.first,
                    m.until.map(|until| until.0),
                    m.session,
                    events.join(", ")
                )
            }
        }),
        ("markers", rest) => {
            let prefix = rest.first().copied().unwrap_or_default().as_bytes();
            let found = machine.objects::<Marker>(ns, prefix, None, 100);
            let names: Vec<_> = found.iter().map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect();
            Some(format!("markers [{}]", names.join(" ")))
        }
        _ => None,
    }
}
