//! The operations of the native primitives beside sessions and exclusive locks, their answers, their conditions and their refusals: one line a
//! primitive. Each module declares its own; the numbers here are stored and never change.

use crate::apply::{Commit, Machine};
use crate::coded::{coded_enum, coded_struct};
use crate::command::{Op, Txn, Wait};
use crate::configs::ConfigOp;
use crate::counters::CounterOp;
use crate::elections::{CampaignWait, ElectionOp, ElectionReply};
use crate::idempotency::IdempotencyOp;
use crate::lock_ops::{LockOp, LockReply};
use crate::markers::MarkerOp;
use crate::queues::QueueOp;
use crate::registry::RegistryOp;
use crate::reply::{OpReply, Rejection};
use crate::reservations::ReservationOp;
use crate::schedules::ScheduleOp;
use crate::types::SessionId;
use crate::waits::Waiter;
use crate::{
    conditions, configs, counters, elections, idempotency, lock_ops, markers, queues, registry, reservations, schedules,
};

/// The behaviour version from which they exist.
pub(crate) const PRIMITIVES: u16 = 3;

macro_rules! primitives {
    ($($primitive:ident = $number:literal, $module:ident::($op:ident, $reply:ident), $run:ident;)*) => {
        coded_enum! {
            /// One operation of a native primitive.
            pub enum NativeOp as "a native operation" { $($primitive($module::$op) = $number,)* }
        }

        coded_enum! {
            /// What it answers.
            pub enum NativeReply as "a native answer" { $($primitive($module::$reply) = $number,)* }
        }

        impl NativeOp {
            /// An upper bound of the bytes that it adds to the state; zero for what takes away.
            pub(crate) fn growth(&self) -> u64 {
                match self { $(Self::$primitive(op) => op.growth(),)* }
            }
        }

        impl NativeOp {
            /// What a waiter is told whose time is over; `None`: that it waited in vain.
            pub(crate) fn wait_over(&self, machine: &Machine, waiter: &Waiter) -> Option<Result<OpReply, Rejection>> {
                match self { $(Self::$primitive(op) => op.wait_over(machine, waiter),)* }
            }
        }

        impl Commit<'_> {
            pub(crate) fn native(&mut self, op: &NativeOp) -> Result<OpReply, Rejection> {
                let result = match op { $(NativeOp::$primitive(op) => self.$run(op),)* };
                result.inspect_err(|rejection| self.m.tallies.refused(op, rejection))
            }
        }

        $(impl From<$module::$op> for crate::command::Op {
            fn from(op: $module::$op) -> Self {
                Self::Native(Box::new(NativeOp::$primitive(op)))
            }
        }

        impl From<$module::$reply> for OpReply {
            fn from(reply: $module::$reply) -> Self {
                Self::Native(Box::new(NativeReply::$primitive(reply)))
            }
        }

        impl TryFrom<OpReply> for $module::$reply {
            /// The reply of another primitive, or of none.
            type Error = ();

            fn try_from(reply: OpReply) -> Result<Self, ()> {
                match reply {
                    OpReply::Native(reply) => match *reply {
                        NativeReply::$primitive(reply) => Ok(reply),
                        _ => Err(()),
                    },
                    _ => Err(()),
                }
            }
        })*
    };
}

primitives! {
    Counter = 1, counters::(CounterOp, CounterReply), counter_op;
    Reservation = 2, reservations::(ReservationOp, ReservationReply), reservation_op;
    Config = 3, configs::(ConfigOp, ConfigReply), config_op;
    Registry = 4, registry::(RegistryOp, RegistryReply), registry_op;
    Idempotency = 5, idempotency::(IdempotencyOp, IdempotencyReply), idempotency_op;
    Queue = 6, queues::(QueueOp, QueueReply), queue_op;
    Schedule = 7, schedules::(ScheduleOp, ScheduleReply), schedule_op;
    Marker = 8, markers::(MarkerOp, MarkerReply), marker_op;
    Election = 9, elections::(ElectionOp, ElectionReply), election_op;
    Lock = 10, lock_ops::(LockOp, LockReply), lock_op;
    Condition = 11, conditions::(ConditionOp, ConditionReply), condition_op;
}

impl NativeReply {
    /// The session under which the caller now holds something.
    pub fn session(&self) -> Option<SessionId> {
        match self {
            Self::Lock(LockReply::Granted(grant)) => Some(grant.session),
            Self::Election(ElectionReply::Elected(elected)) => Some(elected.session),
            Self::Election(ElectionReply::Withdrawn(withdrawn)) => Some(withdrawn.elected?.session),
            _ => None,
        }
    }
}

impl NativeOp {
    /// Whether the server adds something anew at each try, which is no part of what the caller asked.
    pub(crate) fn has_additions(&self) -> bool {
        match self {
            Self::Config(op) => op.has_additions(),
            Self::Queue(op) => op.has_additions(),
            _ => false,
        }
    }

    pub(crate) fn forget_additions(&mut self) {
        match self {
            Self::Config(op) => op.forget_additions(),
            Self::Queue(op) => op.forget_additions(),
            _ => {}
        }
    }
}

impl Txn {
    /// Whether its caller may be answered later than by the commit itself.
    pub fn may_wait(&self) -> bool {
        // What waits stands alone.
        match &self.then[..] {
            [Op::LockAcquire(acquire)] => acquire.wait != Wait::None,
            [Op::Native(op)] => op.may_wait(),
            _ => false,
        }
    }
}

impl NativeOp {
    /// Whether it ends or keeps what is there already, which must go on when there is hardly room for anything new.
    pub fn only_settles(&self) -> bool {
        match self {
            Self::Lock(op) => matches!(op, LockOp::Release(_) | LockOp::ForceRelease(_)),
            Self::Election(op) => matches!(op, ElectionOp::Resign(_) | ElectionOp::Withdraw(_)),
            Self::Queue(op) => {
                !matches!(op, QueueOp::Enqueue(_) | QueueOp::Receive(_) | QueueOp::Redrive(_) | QueueOp::Configure(_))
            }
            Self::Idempotency(op) => !matches!(op, IdempotencyOp::Begin(_) | IdempotencyOp::Checkpoint(_)),
            Self::Marker(op) => matches!(op, MarkerOp::Confirm(_) | MarkerOp::Release(_) | MarkerOp::Delete(_)),
            Self::Reservation(op) => !matches!(op, ReservationOp::Create(_) | ReservationOp::Reserve(_)),
            Self::Registry(op) => !matches!(op, RegistryOp::Register(_) | RegistryOp::Guard(_)),
            Self::Counter(op) => matches!(op, CounterOp::Delete(_)),
            Self::Config(op) => matches!(op, ConfigOp::Abort(_) | ConfigOp::Delete(_) | ConfigOp::Purge(_)),
            Self::Condition(_) => true,
            Self::Schedule(op) => matches!(op, ScheduleOp::Delete(_) | ScheduleOp::Pause(_)),
        }
    }

    fn may_wait(&self) -> bool {
        match self {
            Self::Lock(LockOp::Acquire(ask)) => ask.wait != Wait::None,
            Self::Election(ElectionOp::Campaign(campaign)) => campaign.wait != CampaignWait::None,
            Self::Idempotency(IdempotencyOp::Begin(begin)) => begin.wait_ms > 0,
            Self::Queue(QueueOp::Receive(receive)) => receive.wait_ms > 0,
            Self::Queue(QueueOp::Ack(acks)) => acks.receive.as_ref().is_some_and(|receive| receive.wait_ms > 0),
            Self::Reservation(ReservationOp::Reserve(reserve)) => reserve.wait_ms != Some(0),
            _ => false,
        }
    }
}

coded_enum! {
    /// The stable code of a refusal.
    #[derive(Copy, Eq)]
    pub enum RefusalCode as "a refusal code" {
        Conflict = 1,
        Held = 2,
        TimeoutWaiting = 3,
        Cancelled = 4,
        Deadlock = 5,
        Fenced = 6,
        SessionExpired = 7,
        InFlight = 8,
        Mismatch = 9,
        NeedsReconcile = 10,
        Compacted = 11,
        TooLarge = 12,
        Quota = 13,
        RateLimited = 14,
        NotFound = 15,
        Invalid = 16,
        Duplicate = 17,
        ResultNotRetained = 18,
    }
}

coded_struct! {
    /// Why an operation of a native primitive was refused, with the facts of the decision.
    pub struct Refusal as "a refusal" {
        pub code: RefusalCode,
        /// One sentence for people.
        pub why: Box<str>,
        /// In the order in which they were added; numbers are decimal.
        pub facts: Vec<(Box<str>, Box<str>)>,
        /// Zero: no advice.
        pub retry_after_ms: u64,
    }
}

impl Refusal {
    pub fn new(code: RefusalCode, why: impl Into<Box<str>>) -> Self {
        Self { code, why: why.into(), facts: Vec::new(), retry_after_ms: 0 }
    }

    /// Adds a fact. Names are those of `errors.proto` where it has one.
    #[must_use]
    pub fn fact(mut self, name: &str, value: impl ToString) -> Self {
        self.facts.push((name.into(), value.to_string().into()));
        self
    }

    #[must_use]
    pub fn retry_after(mut self, ms: u64) -> Self {
        self.retry_after_ms = ms;
        self
    }
}

impl From<Refusal> for Rejection {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}
