//! Transactions over the primitives in scripts: conditions and requirements.

use super::Said;
use tenure_machine::{
    Condition, ConditionOp, ConfigAt, CounterWithin, Health, HeldAttempt, HeldLock, InstanceRef, JobId, Op, Receipt,
    RecordName, RegisteredInstance, Relation, Revision, ScheduleAt, SessionId,
};

/// `explain` stands first in a second list; `require CONDITION` refuses.
pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    match said.verb {
        "explain" => Some(ConditionOp::Explain.into()),
        "require" => condition(said.words[0]).map(|(_, condition)| ConditionOp::Require(condition).into()),
        _ => None,
    }
}

/// `alive:7`, `held:jobs/12`, `absent:type=welcome,user=42`, `attempt:key/3`, `receipt:2-1/3`, `within:stock/1..9`, `leads:e/3`, `config:app@2`, `schedule:s@2`,
/// `registered:web/a` or `registered:web/a/5` (under this token), `passing:web/a` (or warning); with `not-` in front it must not be so.
pub(crate) fn condition(word: &str) -> Option<(Relation, Condition)> {
    let (relation, word) = match word.strip_prefix("not-") {
        Some(word) => (Relation::NotEqual, word),
        None => (Relation::Equal, word),
    };
    let (kind, rest) = word.split_once(':')?;
    let condition = match kind {
        "alive" => Condition::SessionAlive(SessionId(rest.parse().unwrap())),
        "held" => {
            let (name, token) = rest.split_once('/').unwrap();
            let token = Revision(token.parse().unwrap());
            Condition::LockHeld(HeldLock { name: name.as_bytes().into(), token })
        }
        "absent" => Condition::MarkerAbsent(rest.into()),
        "attempt" => {
            let (key, attempt) = rest.split_once('/').unwrap();
            let name = RecordName::new("", key);
            Condition::AttemptValid(HeldAttempt { name, attempt: Revision(attempt.parse().unwrap()) })
        }
        "receipt" => {
            let (id, token) = rest.split_once('/').unwrap();
            let token = Revision(token.parse().unwrap());
            Condition::ReceiptValid(Receipt { id: JobId::parse(id).unwrap(), token })
        }
        "within" => {
            let (name, bounds) = rest.split_once('/').unwrap();
            let (min, max) = bounds.split_once("..").unwrap();
            let (min, max) = (min.parse().unwrap(), max.parse().unwrap());
            Condition::CounterWithin(CounterWithin { name: name.as_bytes().into(), min, max })
        }
        "leads" => {
            let (name, token) = rest.split_once('/').unwrap();
            let token = Revision(token.parse().unwrap());
            Condition::Leads(HeldLock { name: name.as_bytes().into(), token })
        }
        "config" => {
            let (key, version) = rest.split_once('@').unwrap();
            Condition::ConfigAt(ConfigAt { key: key.into(), version: version.parse().unwrap() })
        }
        "schedule" => {
            let (name, changed) = rest.split_once('@').unwrap();
            let changed = Revision(changed.parse().unwrap());
            Condition::ScheduleAt(ScheduleAt { name: name.as_bytes().into(), changed })
        }
        "registered" => {
            let mut parts = rest.split('/');
            let (service, instance) = (parts.next().unwrap().into(), parts.next().unwrap().into());
            let token = Revision(parts.next().map_or(0, |token| token.parse().unwrap()));
            let of = InstanceRef { service, instance, token };
            Condition::Registered(RegisteredInstance { of, health: Vec::new() })
        }
        "passing" => {
            let (service, instance) = rest.split_once('/').unwrap();
            let of = InstanceRef { service: service.into(), instance: instance.into(), token: Revision(0) };
            Condition::Registered(RegisteredInstance { of, health: vec![Health::Passing, Health::Warning] })
        }
        _ => return None,
    };
    Some((relation, condition))
}
