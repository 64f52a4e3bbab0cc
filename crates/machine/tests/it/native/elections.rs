//! Elections in scripts: `campaign NAME session=7 value=x priority=3 wait=5s` (or `forever`), `proclaim NAME token=3 value=y`,
//! `resign NAME token=3 to=8`, `withdraw NAME session=7 of=u1`.

use super::Said;
use tenure_machine::*;

pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let name = || -> Box<[u8]> { said.plain(0).unwrap().trim_matches('\'').as_bytes().into() };
    let session = SessionId(said.number("session"));
    let value = || match said.option("value").unwrap_or_default() {
        "long" => vec![b'v'; ELECTION_VALUE_MAX + 1].into(),
        value => value.as_bytes().into(),
    };
    let token = Revision(said.number("token"));
    let op = match said.verb {
        "campaign" => {
            let wait = match said.option("wait") {
                Some(ms) => CampaignWait::Ms(crate::script::millis(ms)),
                None if said.has("forever") => CampaignWait::Forever,
                None => CampaignWait::None,
            };
            let priority = said.option("priority").map_or(0, |n| n.parse().unwrap());
            ElectionOp::Campaign(Campaign { name: name(), session, value: value(), priority, wait })
        }
        "proclaim" => ElectionOp::Proclaim(Proclaim { name: name(), token, value: value() }),
        "resign" => ElectionOp::Resign(Resign { name: name(), token, to: SessionId(said.number("to")) }),
        "withdraw" => {
            let campaign = said.option("of").map(crate::script::request);
            ElectionOp::Withdraw(Withdraw { name: name(), session, campaign })
        }
        _ => return None,
    };
    Some(op.into())
}

pub(super) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    let ("election", [name]) = (what, rest) else { return None };
    let info = machine.election(namespace, name.as_bytes(), 100);
    let leader = info.leader.map_or("vacant".to_owned(), |l| {
        let yields = if info.should_yield { ", should yield" } else { "" };
        let value = String::from_utf8_lossy(&l.value).into_owned();
        format!("session {} token={} since={} `{value}`{yields}", l.session, l.token, l.since)
    });
    let one = |c: &Candidate| format!("{}/{}", c.session, c.priority);
    let candidates: Vec<_> = info.candidates.iter().map(one).collect();
    Some(format!("election {name}: {leader}; candidates [{}]", candidates.join(" ")))
}
