//! Tallies: what this member has seen happen since it started, for metrics.
//!
//! Promises. Y1: nothing decides by them, and they are in no snapshot and no checksum. Y2: each costs a few instructions where it happens.
//! Not promised. That they are equal on all members: one that was given a snapshot has not seen what led to it.

use crate::idempotency::IdempotencyReply;
use crate::native::{NativeOp, NativeReply, RefusalCode};
use crate::queues::{QueueReply, Received};
use crate::reply::{OpReply, Rejection};
use std::collections::BTreeMap;

/// Upper bounds in milliseconds of the buckets of [`WaitTally`]; what is longer is in the last.
pub const WAIT_BOUNDS_MS: [u64; 11] = [1, 5, 10, 50, 100, 500, 1_000, 5_000, 10_000, 60_000, 600_000];

/// What became of attempts to begin.
pub const BEGIN_OUTCOMES: [&str; 5] = ["granted", "replay", "in_flight", "mismatch", "reconcile"];

/// What a stale token may have been of.
pub const FENCED_KINDS: [&str; 9] =
    ["lock", "requirement", "election", "job", "attempt", "marker", "reservation", "instance", "other"];

/// How long those waited who were served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WaitTally {
    pub counts: [u64; WAIT_BOUNDS_MS.len() + 1],
    pub sum_ms: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tallies {
    /// Stale tokens, by what they were of.
    pub fenced: BTreeMap<&'static str, u64>,
    /// By the place of the outcome in `BEGIN_OUTCOMES`.
    pub begins: [u64; BEGIN_OUTCOMES.len()],
    /// Jobs given to workers, and those of them that had been given before.
    pub deliveries: u64,
    pub redeliveries: u64,
    /// For locks, by log time.
    pub lock_waits: WaitTally,
}

impl Tallies {
    /// An operation was refused.
    pub(crate) fn refused(&mut self, op: &NativeOp, rejection: &Rejection) {
        let Rejection::Refused(refusal) = rejection else { return };
        match (refusal.code, op) {
            (RefusalCode::Fenced, op) => self.fenced(kind(op)),
            (RefusalCode::Mismatch, NativeOp::Idempotency(_)) => self.begins[3] += 1,
            (RefusalCode::NeedsReconcile, NativeOp::Idempotency(_)) => self.begins[4] += 1,
            _ => {}
        }
    }

    pub(crate) fn fenced(&mut self, kind: &'static str) {
        *self.fenced.entry(kind).or_default() += 1;
    }

    /// A caller is answered, at once or after a wait.
    pub(crate) fn answered(&mut self, reply: &OpReply) {
        let OpReply::Native(reply) = reply else { return };
        match &**reply {
            NativeReply::Idempotency(IdempotencyReply::Granted(_)) => self.begins[0] += 1,
            NativeReply::Idempotency(IdempotencyReply::Replay(_)) => self.begins[1] += 1,
            NativeReply::Idempotency(IdempotencyReply::InFlight(_)) => self.begins[2] += 1,
            NativeReply::Queue(QueueReply::Received(received)) => self.received(received),
            _ => {}
        }
    }

    fn received(&mut self, received: &Received) {
        self.deliveries += received.jobs.len() as u64;
        self.redeliveries += received.jobs.iter().filter(|job| job.attempt > 1).count() as u64;
        let refusals = received.settled.iter().filter_map(|settled| settled.refusal.as_ref());
        for _ in refusals.filter(|refusal| refusal.code == RefusalCode::Fenced) {
            self.fenced("job");
        }
    }

    pub(crate) fn waited_for_lock(&mut self, waited_ms: u64) {
        let bucket = WAIT_BOUNDS_MS.partition_point(|bound| *bound < waited_ms);
        self.lock_waits.counts[bucket] += 1;
        self.lock_waits.sum_ms += waited_ms;
    }
}

/// What a token is of.
fn kind(op: &NativeOp) -> &'static str {
    match op {
        NativeOp::Lock(_) => "lock",
        NativeOp::Election(_) => "election",
        NativeOp::Queue(_) => "job",
        NativeOp::Idempotency(_) => "attempt",
        NativeOp::Marker(_) => "marker",
        NativeOp::Reservation(_) => "reservation",
        NativeOp::Registry(_) => "instance",
        NativeOp::Condition(_) => "requirement",
        NativeOp::Counter(_) | NativeOp::Config(_) | NativeOp::Schedule(_) => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_fall_into_buckets() {
        let mut tallies = Tallies::default();
        for waited in [0, 1, 2, 600_000, 600_001] {
            tallies.waited_for_lock(waited);
        }
        let counts = tallies.lock_waits.counts;
        assert_eq!((counts[0], counts[1], counts[10], counts[11]), (2, 1, 1, 1));
        assert_eq!(tallies.lock_waits.sum_ms, 1_200_004);
    }
}
