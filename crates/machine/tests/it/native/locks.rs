//! Locks in scripts.
//!
//! `take a,b session=7 shared|permits=2/5 owner=o wait=10s|forever priority=3 reentrant delay=5s min-hold=5s on-deadlock=lowest|youngest`,
//! `give l session=7 token=5 owner=o`, `force l token=5 reason=r [of=7]`, `resize l 3`; `show holds l`, `show events l`.

use super::Said;
use crate::script::millis;
use tenure_machine::*;

pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let name = |n| -> Box<[u8]> { said.plain(n).unwrap_or_default().as_bytes().into() };
    let op = match said.verb {
        "take" => LockOp::Acquire(Box::new(ask(said))),
        "give" => LockOp::Release(LockRelease {
            name: name(0),
            session: SessionId(said.number("session")),
            token: Revision(said.number("token")),
            owner: said.bytes("owner"),
        }),
        "force" => LockOp::ForceRelease(LockForceRelease {
            name: name(0),
            token: Revision(said.number("token")),
            session: SessionId(said.number("of")),
            reason: said.option("reason").unwrap_or_default().into(),
        }),
        "resize" => LockOp::Resize(LockResize { name: name(0), permits: said.plain(1)?.parse().unwrap() }),
        _ => return None,
    };
    Some(op.into())
}

fn ask(said: &Said<'_>) -> LockAsk {
    let mode = match said.option("permits") {
        Some(permits) => {
            let (count, of) = permits.split_once('/').unwrap();
            HoldMode::Permits(Permits { count: count.parse().unwrap(), of: of.parse().unwrap() })
        }
        None if said.has("shared") => HoldMode::Shared,
        None => HoldMode::Exclusive,
    };
    let names = said.plain(0).unwrap_or_default().split(',');
    LockAsk {
        locks: names.map(|name| LockItem { name: name.as_bytes().into(), mode }).collect(),
        session: SessionId(said.number("session")),
        create: None,
        owner: said.bytes("owner"),
        wait: match said.option("wait") {
            None => Wait::None,
            Some("forever") => Wait::Forever,
            Some(ms) => Wait::Ms(millis(ms)),
        },
        priority: said.option("priority").map_or(0, |p| p.parse().unwrap()),
        reentrant: said.has("reentrant"),
        delay_ms: said.ms("delay"),
        min_hold_ms: said.ms("min-hold"),
        on_deadlock: match said.option("on-deadlock") {
            Some("lowest") => OnDeadlock::LowestPriority,
            Some("youngest") => OnDeadlock::Youngest,
            _ => OnDeadlock::Newcomer,
        },
    }
}

pub(super) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    match (what, rest) {
        ("holds", [name]) => Some(match machine.lock(namespace, name.as_bytes()) {
            None => format!("lock {name} is not there"),
            Some(info) => show_holds(&info),
        }),
        ("events", [name]) => {
            let events = machine.lock_events(namespace, name.as_bytes());
            let events: Vec<_> = events.iter().map(show_event).collect();
            Some(format!("events [{}]", events.join(", ")))
        }
        ("lock-counts", []) => Some(format!("{:?}", machine.lock_counts())),
        _ => None,
    }
}

fn show_holds(info: &LockInfo) -> String {
    let holds: Vec<_> = info.holds.iter().map(show_hold).collect();
    let waiters: Vec<_> = info.waiters.iter().map(|w| format!("{} {}", w.session, show_mode(w.mode))).collect();
    let permits = match info.permits {
        0 => String::new(),
        permits => format!(" permits {}/{permits}", info.permits_free),
    };
    let name = info.name.escape_ascii();
    format!("lock {name}{permits} held [{}] waiting [{}]", holds.join(", "), waiters.join(", "))
}

fn show_hold(hold: &HoldInfo) -> String {
    let kept = hold.kept_until.map_or(String::new(), |at| format!(" kept until {at}"));
    let depth = if hold.depth > 1 { format!(" depth {}", hold.depth) } else { String::new() };
    format!("{} {} token={}{depth}{kept}", hold.holder.session, show_slots(hold.mode, &hold.slots), hold.holder.token)
}

fn show_mode(mode: HoldMode) -> String {
    match mode {
        HoldMode::Exclusive => "exclusive".into(),
        HoldMode::Shared => "shared".into(),
        HoldMode::Permits(permits) => format!("{} of {}", permits.count, permits.of),
    }
}

fn show_slots(mode: HoldMode, slots: &[u32]) -> String {
    if slots.is_empty() { show_mode(mode) } else { format!("{} slots {slots:?}", show_mode(mode)) }
}

fn show_event(event: &LockEvent) -> String {
    let detail = if event.detail.is_empty() { String::new() } else { format!(" `{}`", event.detail) };
    format!("{:?} at {} {} token={} after {}{detail}", event.kind, event.at, event.session, event.token, event.after_ms)
}

pub(super) fn said(reply: &NativeReply) -> Option<String> {
    let NativeReply::Lock(reply) = reply else { return None };
    Some(match reply {
        LockReply::Granted(grant) => {
            let locks =
                grant.locks.iter().map(|l| format!("{} {}", l.name.escape_ascii(), show_slots(l.mode, &l.slots)));
            let locks: Vec<_> = locks.collect();
            let (token, session, depth) = (grant.token, grant.session, grant.depth);
            format!("granted token={token} to session {session} depth {depth}: {}", locks.join(", "))
        }
        LockReply::Released(depth) => format!("released, {depth} more to go"),
        LockReply::ForceReleased(count) => format!("took {count} away"),
        LockReply::Resized(before) => format!("resized from {before}"),
    })
}
