//! Conditions of a transaction on anything but keys, and what is told of one that does not hold.
//!
//! Promises. W1: as a compare, a condition is decided with all others before the first operation; as a requirement it refuses the whole
//! transaction with the code and the facts of the primitive that it is about. W2: whoever asks is told which compare failed first and what
//! is there instead, seen at the moment of the decision.
//! Relies on. The modules of the primitives say what is held, alive or valid; nothing here keeps a rule of its own.

use crate::apply::{Commit, Machine, invalid};
use crate::coded::{coded_enum, coded_struct};
use crate::command::{Compare, CompareTarget, Op, RequireLock};
use crate::configs::ConfigAt;
use crate::counters::Counter;
use crate::idempotency::RecordName;
use crate::markers::{Marker, MarkerOp, state_word};
use crate::native::{NativeOp, Refusal, RefusalCode};
use crate::queues::Receipt;
use crate::record::Record;
use crate::registry::{Health, InstanceRef};
use crate::reply::{OpReply, Rejection};
use crate::schedules::ScheduleAt;
use crate::types::*;
use crate::waits::Waiter;

coded_struct! {
    /// A lock under a token.
    pub struct HeldLock as "a held lock" {
        pub name: Box<[u8]>,
        pub token: Revision,
    }
}

coded_struct! {
    /// An idempotency record under an attempt.
    pub struct HeldAttempt as "a held attempt" {
        pub name: RecordName,
        pub attempt: Revision,
    }
}

coded_enum! {
    /// What must be so for the first list of a transaction to run.
    pub enum Condition as "a condition" {
        /// The session lives.
        SessionAlive(SessionId) = 1,
        /// The lock is held under exactly this token.
        LockHeld(HeldLock) = 2,
        /// Nobody has done the effect of this marker (a canonical name), does it or may have done it.
        MarkerAbsent(Box<str>) = 3,
        /// It is the newest delivery of its job, and under way.
        ReceiptValid(Receipt) = 5,
        /// It is the newest attempt of an idempotency record, and nothing has ended it.
        AttemptValid(HeldAttempt) = 6,
        /// The counter is within bounds; one that is not there counts as zero.
        CounterWithin(CounterWithin) = 7,
        /// The election is led under exactly this token.
        Leads(HeldLock) = 8,
        /// This is the current version of a configuration; zero: there is none.
        ConfigAt(ConfigAt) = 9,
        /// The instance is registered, under this token if one is given, and its health is one of these.
        Registered(RegisteredInstance) = 10,
        /// This was the last change of the schedule; zero: there is none.
        ScheduleAt(ScheduleAt) = 11,
    }
}

coded_struct! {
    /// Bounds of a counter, both included.
    pub struct CounterWithin as "bounds of a counter" {
        pub name: Box<[u8]>,
        pub min: i64,
        pub max: i64,
    }
}

coded_struct! {
    /// An instance of a service and how it must be.
    pub struct RegisteredInstance as "a registered instance" {
        pub of: InstanceRef,
        /// Empty: in whatever health.
        pub health: Vec<Health>,
    }
}

coded_struct! {
    /// A compare that did not hold.
    pub struct Failed as "a failed compare" {
        /// Its place in the list of compares.
        pub index: u32,
        /// One sentence for people.
        pub why: Box<str>,
        pub facts: Vec<(Box<str>, Box<str>)>,
        /// Of a compare of keys: the first that it did not hold for, as it was. None: there is no such key, or it was about something else.
        pub record: Option<Record>,
    }
}

coded_enum! {
    pub enum ConditionOp as "an operation on conditions" {
        /// As the first operation of a second list: tells which compare failed.
        Explain = 1,
        /// Refuses the transaction if it is not so.
        Require(Condition) = 2,
    }
}

coded_enum! {
    pub enum ConditionReply as "an answer about conditions" {
        Failed(Failed) = 1,
        /// It is so.
        Holds = 2,
    }
}

impl ConditionOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        0
    }

    /// What a waiter is told whose time is over; `None`: that it waited in vain.
    pub(crate) fn wait_over(&self, _: &Machine, _: &Waiter) -> Option<Result<OpReply, Rejection>> {
        None
    }
}

/// Whether the operation asks for the compare that failed.
pub(crate) fn is_explain(op: &Op) -> bool {
    matches!(op, Op::Native(op) if matches!(**op, NativeOp::Condition(ConditionOp::Explain)))
}

/// Whether the operation refuses the transaction where something is not so.
pub(crate) fn is_required(op: &Op) -> bool {
    matches!(op, Op::Native(op) if matches!(**op, NativeOp::Condition(ConditionOp::Require(_))))
}

/// Whether a caller wrote this operation, and not whoever read its request.
pub(crate) fn is_said(op: &Op) -> bool {
    let Op::Native(op) = op else { return true };
    !matches!(**op, NativeOp::Condition(_) | NativeOp::Marker(MarkerOp::Put(_) | MarkerOp::Tell(_)))
}

/// Adds to a refusal which operation of the list was refused; one of a nested list has its own place already.
pub(crate) fn placed(rejection: Rejection, ops: &[Op], at: usize) -> Rejection {
    let Rejection::Refused(mut refusal) = rejection else { return rejection };
    if is_said(&ops[at]) {
        let place = ops[..at].iter().filter(|op| is_said(op)).count();
        match refusal.facts.iter_mut().find(|(name, _)| **name == *PLACE) {
            Some((_, within)) => *within = format!("{place}.{within}").into(),
            None => refusal.facts.push((PLACE.into(), place.to_string().into())),
        }
    }
    Rejection::Refused(refusal)
}

/// The fact that names an operation by its place.
const PLACE: &str = "op";

impl Commit<'_> {
    pub(crate) fn condition_op(&mut self, op: &ConditionOp) -> Result<OpReply, Rejection> {
        match op {
            ConditionOp::Explain => {
                let failed = self.failed.take();
                let failed = failed.ok_or_else(|| invalid("what explains a failed compare stands first"))?;
                Ok(ConditionReply::Failed(*failed).into())
            }
            ConditionOp::Require(condition) => {
                self.m.judge(self.txn.namespace, condition)?;
                Ok(ConditionReply::Holds.into())
            }
        }
    }
}

impl Machine {
    /// Whether it is so, in the namespace of the transaction.
    pub(crate) fn holds(&self, namespace: NamespaceId, condition: &Condition) -> bool {
        self.judge(namespace, condition).is_ok()
    }

    /// Refuses with what is there instead.
    fn judge(&self, namespace: NamespaceId, condition: &Condition) -> Result<(), Rejection> {
        match condition {
            Condition::SessionAlive(id) => match self.sessions.get(*id) {
                Some(_) => Ok(()),
                None => Err(Rejection::SessionExpired { session: *id }),
            },
            Condition::LockHeld(lock) => {
                let required = RequireLock { name: lock.name.clone(), token: lock.token };
                self.check_requirement(namespace, &required)
            }
            Condition::MarkerAbsent(name) => match self.marker(namespace, name.as_bytes()) {
                Some(marker) if marker.is_taken() => Err(taken(name, marker, self.stamp)),
                _ => Ok(()),
            },
            Condition::AttemptValid(held) => self.judge_attempt(namespace, &held.name, held.attempt),
            Condition::ReceiptValid(receipt) => self.judge_receipt(namespace, receipt),
            Condition::CounterWithin(bounds) => {
                let counter = self.object::<Counter>(namespace, &bounds.name);
                let value = counter.map_or(0, |counter| counter.value);
                if (bounds.min..=bounds.max).contains(&value) { Ok(()) } else { Err(beyond(bounds, value)) }
            }
            Condition::Leads(led) => {
                let leader = self.election(namespace, &led.name, 0).leader;
                if leader.as_ref().is_some_and(|leader| leader.token == led.token) {
                    return Ok(());
                }
                Err(not_led(led, leader.map(|leader| (leader.token, leader.session))))
            }
            Condition::ConfigAt(at) => self.judge_config(namespace, at),
            Condition::ScheduleAt(at) => self.judge_schedule(namespace, at),
            Condition::Registered(registered) => self.judge_instance(namespace, &registered.of, &registered.health),
        }
    }

    /// What is told of a compare that did not hold.
    pub(crate) fn explain(&self, namespace: NamespaceId, index: usize, compare: &Compare) -> Failed {
        let index = index as u32;
        let CompareTarget::Condition(condition) = &compare.target else {
            return self.explain_keys(namespace, index, compare);
        };
        match self.judge(namespace, condition) {
            Err(rejection) => {
                let why = rejection.to_string().into();
                Failed { index, why, facts: facts_of(rejection), record: None }
            }
            Ok(()) => Failed { index, why: "it is so".into(), facts: Vec::new(), record: None },
        }
    }

    fn explain_keys(&self, namespace: NamespaceId, index: u32, compare: &Compare) -> Failed {
        let one = |record: &&Record| {
            let span = Span::one(Key::from_bytes(record.key()));
            !self.compare(namespace, &Compare { span, ..compare.clone() })
        };
        let record = self.keys.live(&compare.span).find(one).cloned();
        let name = record.as_ref().map_or(compare.span.start.name(), Record::name).escape_ascii().to_string();
        let (why, facts) = match &record {
            None => (format!("key `{name}` is not there"), vec![("name", name)]),
            Some(record) => {
                let meta = record.meta();
                let why = format!("key `{name}` is at version {}, changed at {}", meta.version, meta.mod_revision);
                (why, vec![("name", name), ("version", meta.version.to_string())])
            }
        };
        let facts = facts.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Failed { index, why: why.into(), facts, record }
    }
}

fn taken(name: &str, marker: &Marker, now: LogTime) -> Rejection {
    let word = state_word(marker.state);
    let why = format!("marker `{name}` is {word} by `{}` under token {}", marker.by, marker.token);
    let refusal = Refusal::new(RefusalCode::Conflict, why)
        .fact("name", name)
        .fact("state", word)
        .fact("by", &marker.by)
        .fact("token", marker.token)
        .fact("since_ms", now.0.saturating_sub(marker.at.0));
    refusal.into()
}

fn beyond(bounds: &CounterWithin, value: i64) -> Rejection {
    let name = String::from_utf8_lossy(&bounds.name);
    let why = format!("counter `{name}` is {value}, not within {} and {}", bounds.min, bounds.max);
    Refusal::new(RefusalCode::Conflict, why).fact("name", name).fact("value", value).into()
}

fn not_led(led: &HeldLock, leader: Option<(Revision, SessionId)>) -> Rejection {
    let (name, presented) = (String::from_utf8_lossy(&led.name), led.token);
    let why = match leader {
        Some((token, session)) => {
            format!("election `{name}` is led by session {session} under token {token}, not under {presented}")
        }
        None => format!("election `{name}` is not led under token {presented}: nobody leads it"),
    };
    let refusal = Refusal::new(RefusalCode::Fenced, why).fact("name", name).fact("presented", presented);
    match leader {
        Some((token, session)) => refusal.fact("newest", token).fact("holder_session", session).into(),
        None => refusal.fact("newest", 0).into(),
    }
}

/// The facts of a refusal as a failed compare tells them.
fn facts_of(rejection: Rejection) -> Vec<(Box<str>, Box<str>)> {
    let fact = |name: &str, value: String| (name.into(), value.into());
    match rejection {
        Rejection::Refused(refusal) => refusal.facts,
        Rejection::SessionExpired { session } => vec![fact("session", session.to_string())],
        Rejection::Fenced { name, presented, newest, holder } => {
            let mut facts = vec![
                fact("name", name.escape_ascii().to_string()),
                fact("presented", presented.to_string()),
                fact("newest", newest.to_string()),
            ];
            if let Some(holder) = holder {
                facts.push(fact("holder_session", holder.session.to_string()));
                facts.push(fact("holder", holder.owner.escape_ascii().to_string()));
            }
            facts
        }
        _ => Vec::new(),
    }
}
