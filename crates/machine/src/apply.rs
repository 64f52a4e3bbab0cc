//! The machine: one entry of the log in, changes and replies out.
//!
//! Promises. A1: one commit takes one revision, however many operations it has, and one that changes nothing (refused, read-only, deleting
//! nothing) takes none. A2: operation n sees what those before it did; all compares, nested ones too, are decided before the
//! first. A3: a refusal by any operation undoes the whole transaction. A4: changes are given before replies, in (revision, index)
//! order. A5: due waits are answered before the transactions of the entry whose stamp made them due.
//! A6: a member whose running checksum at an index differs from the leader's stops at the next `Op::Checksum` (see `history.rs`).
//! Not promised. That the memory stays in its limits: that is judged before proposing (`admit`), never here.
//! Relies on. Each entry is applied once, in order; a `Fault` is the end of the member.

use crate::check;
use crate::codec::{DecodeError, fold, name};
use crate::command::*;
use crate::conditions::{self, Failed};
use crate::history::{Marks, Ring, Sums};
use crate::keys::Keys;
use crate::lock_events::{LockEvent, LockEventKind};
use crate::lock_ops::{self, Want};
use crate::locks::{HoldKey, Lock, LockHold, LockKey, Locks, Plain, Shape};
use crate::members::{self, Members};
use crate::native::{PRIMITIVES, Refusal, RefusalCode};
use crate::objects::{self, Lived, Object, ObjectKey, Objects};
use crate::record::{Meta, Record};
use crate::reply::*;
use crate::requests::{Requests, Seen};
use crate::sessions::{self, Session, SessionFacts, Sessions};
use crate::snapshot::Running;
use crate::tallies::Tallies;
use crate::types::*;
use crate::waits::{Ask, Waiter, WaiterNumber, Waits};
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

/// The newest behaviour version that this release knows.
pub const BEHAVIOUR: u16 = 3;
/// The first version that has `Op::Checksum`.
pub(crate) const CHECKSUMS: u16 = 2;

/// Where in the log the machine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    pub index: Index,
    pub term: Term,
}

/// What stops a member: going on would make its state another than that of the others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The entry follows rules that this release does not know.
    UnknownBehaviour {
        index: Index,
        behaviour: u16,
        known: u16,
    },
    /// The entry has something that this release does not know.
    UnknownEntry {
        index: Index,
        what: &'static str,
        number: u64,
    },
    /// The bytes of the entry mean nothing.
    Malformed {
        index: Index,
        why: DecodeError,
    },
    /// The state of this member is not that of the leader.
    ChecksumDiffers {
        index: Index,
        leader: u64,
        here: u64,
    },
    StampWentBack {
        index: Index,
        stamp: LogTime,
        before: LogTime,
    },
}

impl Fault {
    /// The fault of an entry that could not be read.
    pub fn unreadable(index: Index, error: DecodeError) -> Self {
        match error {
            DecodeError::UnknownFormat { what, format } => {
                Self::UnknownEntry { index, what, number: u64::from(format) }
            }
            DecodeError::UnknownNumber { what, number } => Self::UnknownEntry { index, what, number },
            why => Self::Malformed { index, why },
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownBehaviour { index, behaviour, known } => {
                write!(
                    f,
                    "entry {index} has behaviour version {behaviour}, this release knows up to {known}: run a newer release"
                )
            }
            Self::UnknownEntry { index, what, number } => {
                write!(f, "entry {index} has {what} {number}, which this release does not know: run a newer release")
            }
            Self::Malformed { index, why } => write!(f, "entry {index} cannot be read: {why}"),
            Self::ChecksumDiffers { index, leader, here } => {
                write!(
                    f,
                    "the state after entry {index} differs from the leader's: checksum {here:016x} here, {leader:016x} there"
                )
            }
            Self::StampWentBack { index, stamp, before } => {
                write!(f, "entry {index} has log time {stamp}, which is before the {before} of an earlier one")
            }
        }
    }
}

impl std::error::Error for Fault {}

/// What happened to locks since this member started: for metrics, not of the state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockCounts {
    /// Waits that would never have ended.
    pub deadlocks: u64,
    /// Searches for deadlocks that found too much to look at.
    pub searches_given_up: u64,
}

/// The replicated state machine.
pub struct Machine {
    pub(crate) position: Position,
    pub(crate) revision: Revision,
    pub(crate) stamp: LogTime,
    pub(crate) behaviour: u16,
    pub(crate) cluster: u64,
    pub(crate) issuer: [u8; 16],
    /// By the number of the limit, less one.
    pub(crate) limits: [u64; Limit::ALL.len()],
    /// etcd's compacted revision, which is -1 before the first compaction and can become 0.
    pub(crate) compact_floor: i64,
    pub(crate) keys: Keys,
    pub(crate) sessions: Sessions,
    pub(crate) locks: Locks,
    pub(crate) waits: Waits,
    pub(crate) objects: Objects,
    pub(crate) requests: Requests,
    pub(crate) ring: Ring,
    /// The changes of busy kinds. Not in snapshots: whoever watches them across a restart of the member begins anew.
    pub(crate) busy_ring: Ring,
    pub(crate) members: Members,
    pub(crate) marks: Marks,
    pub(crate) sums: Sums,
    // Of this member, not of the state: nothing below is read by apply.
    pub(crate) memory_limits: crate::query::MemoryLimits,
    pub(crate) snapshot: Option<Running>,
    pub(crate) lock_counts: LockCounts,
    pub(crate) tallies: Tallies,
    /// The newest behaviour version that this member takes part in.
    known: u16,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// The state before the first entry.
    pub fn new() -> Self {
        Self {
            position: Position::default(),
            revision: Revision(1),
            stamp: LogTime(0),
            behaviour: 1,
            cluster: 0,
            issuer: [0; 16],
            limits: Limit::ALL.map(Limit::default_value),
            compact_floor: -1,
            keys: Keys::new(),
            sessions: Sessions::new(),
            locks: Locks::new(),
            waits: Waits::new(),
            objects: Objects::new(),
            requests: Requests::new(),
            ring: Ring::new(),
            busy_ring: Ring::busy(Revision(0)),
            members: Members::new(),
            marks: Marks::new(),
            sums: Sums::new(Index(0), 0),
            memory_limits: crate::query::MemoryLimits::default(),
            snapshot: None,
            lock_counts: LockCounts::default(),
            tallies: Tallies::default(),
            known: BEHAVIOUR,
        }
    }

    /// The value of a limit that is state.
    pub fn limit(&self, limit: Limit) -> u64 {
        self.limits[limit as usize - 1]
    }

    /// Takes part as an older release would: entries above this behaviour version stop the machine. For the simulation of upgrades.
    pub fn know_only(&mut self, behaviour: u16) {
        self.known = behaviour.min(BEHAVIOUR);
    }

    /// Moves on over an entry without content.
    pub fn skip(&mut self, at: Position) {
        self.position = at;
    }

    /// Applies one entry. `out` is emptied and filled: the replies of this entry's transactions, and of earlier waits that
    /// this entry ended. After a fault the machine must not be used.
    pub fn apply(&mut self, at: Position, batch: Batch, out: &mut Applied) -> Result<(), Fault> {
        out.changes.clear();
        out.replies.clear();
        out.sessions.clear();
        self.check_entry(at, &batch)?;
        self.position = at;
        self.stamp = batch.stamp;
        self.end_due_waits(out);
        self.tell_due_locks(out);
        self.tell_due_objects(out);
        self.requests.drop_old(self.stamp, batch.txns.len());
        for (number, txn) in (batch.origin.first..).zip(&batch.txns) {
            let ticket = Ticket { member: batch.origin.member, boot: batch.origin.boot, number };
            self.check_system(txn)?;
            if let Some(reply) = self.answer(txn, ticket, out) {
                out.replies.push((ticket, reply));
            }
        }
        self.marks.note(self.stamp, self.revision);
        self.sums.note(at.index);
        Ok(())
    }

    /// `apply` of an entry that is not read yet.
    pub fn apply_encoded(&mut self, at: Position, entry: &[u8], out: &mut Applied) -> Result<(), Fault> {
        let batch = Batch::decode(entry).map_err(|error| Fault::unreadable(at.index, error))?;
        self.apply(at, batch, out)
    }

    fn check_entry(&self, at: Position, batch: &Batch) -> Result<(), Fault> {
        assert!(at.index > self.position.index, "entry {} comes after entry {}", at.index, self.position.index);
        let index = at.index;
        let behaviour = batch.behaviour.max(self.behaviour);
        if behaviour > self.known {
            return Err(Fault::UnknownBehaviour { index, behaviour, known: self.known });
        }
        if batch.stamp < self.stamp {
            return Err(Fault::StampWentBack { index, stamp: batch.stamp, before: self.stamp });
        }
        Ok(())
    }

    /// System operations that a member may be unable to follow.
    fn check_system(&self, txn: &Txn) -> Result<(), Fault> {
        let index = self.position.index;
        for op in txn.then.iter().chain(&txn.otherwise) {
            match op {
                // One that is refused because of this very member does not stop it.
                Op::RaiseBehaviour { to } if *to > self.known && self.members.check_behaviour(*to).is_ok() => {
                    return Err(Fault::UnknownBehaviour { index, behaviour: *to, known: self.known });
                }
                Op::Checksum { at, sum } if self.behaviour >= CHECKSUMS => {
                    match self.sums.at(*at).filter(|_| *at < index) {
                        Some(here) if here != *sum => {
                            return Err(Fault::ChecksumDiffers { index: *at, leader: *sum, here });
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn end_due_waits(&mut self, out: &mut Applied) {
        let mut left = BTreeSet::new();
        while let Some(number) = self.waits.due(self.stamp) {
            self.note_vain_wait(number, out);
            let Some(waiter) = self.waits.set(number, None) else { break };
            left.extend(waiter.on.iter().cloned());
            let result = self.wait_over(&waiter);
            self.answer_waiter(number, waiter, result, out);
        }
        for key in left {
            match LockKey::of_object(&key) {
                Some(lock) => self.serve_waiters(&lock, out),
                None => self.system_commit(out, |commit| {
                    objects::waiter_gone(commit, &key);
                    Ok(())
                }),
            }
        }
    }

    /// Tells the locks of a wait that it was in vain.
    fn note_vain_wait(&mut self, number: WaiterNumber, out: &mut Applied) {
        if self.behaviour < PRIMITIVES {
            return;
        }
        let system = Txn::default();
        let mut commit = Commit::new(self, &system, Ticket::default(), out, true);
        if let Some(event) = commit.waiter_event(LockEventKind::TimedOut, number) {
            let keys = commit.m.waits.get(number).map(|w| lock_ops::keys_of(&w.on)).unwrap_or_default();
            for key in keys {
                commit.lock_event(&key, event.clone());
            }
        }
        commit.finish();
    }

    /// A waiter has gone from the queue of a lock: whoever was behind it may have room. A plain lock has none while it is held.
    fn serve_waiters(&mut self, key: &LockKey, out: &mut Applied) {
        if matches!(self.locks.get(key), Some(Lock::Plain(_))) {
            return;
        }
        self.system_commit(out, |commit| commit.serve([key.clone()]));
    }

    /// Each lock of which something ends by itself, in a commit of its own.
    fn tell_due_locks(&mut self, out: &mut Applied) {
        for _ in 0..DUE_PER_ENTRY {
            let Some(key) = self.locks.first_due(self.stamp) else { return };
            self.system_commit(out, |commit| commit.lock_due(&key));
        }
    }

    /// A commit that no transaction asked for.
    fn system_commit(&mut self, out: &mut Applied, run: impl FnOnce(&mut Commit<'_>) -> Result<(), Rejection>) {
        let system = Txn::default();
        let mut commit = Commit::new(self, &system, Ticket::default(), out, true);
        match run(&mut commit) {
            Ok(()) => drop(commit.finish()),
            Err(_) => commit.undo(),
        }
    }

    /// What is told to a waiter whose time is over.
    fn wait_over(&self, waiter: &Waiter) -> Result<OpReply, Rejection> {
        let waited_ms = self.stamp.0 - waiter.since.0;
        if let Ask::Native(op) = &waiter.ask
            && let Some(answer) = op.wait_over(self, waiter)
        {
            return answer;
        }
        let on = waiter.on.first();
        let name = on.map_or(&b""[..], ObjectKey::name);
        if let Some(lock) = on.and_then(LockKey::of_object) {
            let holder = self.locks.get(&lock).and_then(Lock::holder).cloned();
            return Err(Rejection::TimeoutWaiting { name: name.into(), waited_ms, holder });
        }
        let why = format!("waited {waited_ms} ms for `{}` in vain", name.escape_ascii());
        let refusal = Refusal::new(RefusalCode::TimeoutWaiting, why).fact("name", name.escape_ascii());
        Err(refusal.fact("waited_ms", waited_ms).into())
    }

    /// Each object whose time has come, in a commit of its own, so that it can be given a token of its own. A bounded number per entry: the rest
    /// stays due, and `next_deadline` says so.
    fn tell_due_objects(&mut self, out: &mut Applied) {
        let system = Txn::default();
        for _ in 0..DUE_PER_ENTRY {
            let Some(key) = self.objects.first_due(self.stamp) else { return };
            let mut commit = Commit::new(self, &system, Ticket::default(), out, true);
            objects::due(&mut commit, &key);
            commit.finish();
        }
    }

    fn answer_waiter(
        &mut self,
        number: WaiterNumber,
        waiter: Waiter,
        result: Result<OpReply, Rejection>,
        out: &mut Applied,
    ) {
        if let Ok(reply) = &result {
            self.tallies.answered(reply);
            if waiter.on.first().is_some_and(|on| LockKey::of_object(on).is_some()) {
                self.tallies.waited_for_lock(self.stamp.0 - waiter.since.0);
            }
        }
        let result = result.map(|reply| TxnReply { succeeded: waiter.succeeded, results: vec![reply] });
        self.sums.event([sum_event::WAIT_ENDED, number, u64::from(result.is_ok())]);
        let reply = Reply { revision: self.revision, replayed: false, result };
        if let Some(request) = &waiter.request {
            self.requests.answer_waiter(&waiter.principal, request, number, &reply, self.stamp);
        }
        out.replies.push((waiter.ticket, reply));
    }

    /// Remembered requests first, then the transaction, then its answer is remembered. `None`: the answer comes later.
    fn answer(&mut self, txn: &Txn, ticket: Ticket, out: &mut Applied) -> Option<Reply> {
        let Some(request) = &txn.request else {
            return match self.run(txn, ticket, out) {
                Ran::Answered(result) => Some(self.reply(result)),
                Ran::Waits(_) => None,
            };
        };
        let digest = txn.digest();
        let session = match request {
            RequestId::Session { session, .. } => Some(*session),
            RequestId::Uuid(_) | RequestId::Series { .. } => None,
        };
        let incarnation = session.and_then(|id| self.token_of(id));
        match self.see(txn, request, digest) {
            Seen::New => {}
            Seen::Answered(reply) => return Some(reply),
            Seen::Refused(rejection) => return Some(self.reply(Err(rejection))),
            Seen::Waiting(number) => {
                if let Some(waiter) = self.waits.table.get_mut(&number) {
                    waiter.ticket = ticket;
                }
                return None;
            }
        }
        let ran = self.run(txn, ticket, out);
        // A transaction that ends the very session of its request leaves no place to remember it in.
        let rememberable = session.is_none_or(|id| self.token_of(id) == incarnation);
        match ran {
            Ran::Waits(number) => {
                if rememberable {
                    self.requests.wait(&txn.principal, request, digest, number);
                }
                None
            }
            Ran::Answered(result) => {
                let reply = self.reply(result);
                if rememberable {
                    self.requests.answer(&txn.principal, request, digest, &reply, self.stamp);
                }
                Some(reply)
            }
        }
    }

    fn see(&mut self, txn: &Txn, request: &RequestId, digest: [u8; 16]) -> Seen {
        match request {
            RequestId::Uuid(uuid) => {
                let max = self.limit(Limit::OneShotRequests);
                self.requests.see_one_shot(&txn.principal, *uuid, digest, self.stamp, max)
            }
            RequestId::Session { session, seq, acked_below } => {
                if self.sessions.get(*session).is_none() {
                    return Seen::Refused(crate::requests::forgotten_with(*session));
                }
                let max = self.limit(Limit::SessionRequests);
                self.requests.see_numbered(*session, *seq, *acked_below, digest, max)
            }
            RequestId::Series { series, seq, acked_below } => {
                let open = self.limit(Limit::SessionRequests);
                let all = self.limit(Limit::OneShotRequests);
                self.requests.see_in_series(
                    &txn.principal,
                    *series,
                    (*seq, *acked_below),
                    digest,
                    self.stamp,
                    [open, all],
                )
            }
        }
    }

    fn token_of(&self, session: SessionId) -> Option<SessionToken> {
        self.sessions.get(session).map(|s| s.facts.token)
    }

    fn reply(&self, result: Result<TxnReply, Rejection>) -> Reply {
        Reply { revision: self.revision, replayed: false, result }
    }

    fn run(&mut self, txn: &Txn, ticket: Ticket, out: &mut Applied) -> Ran {
        if let Err(rejection) = self.check_txn(txn) {
            return Ran::Answered(Err(rejection));
        }
        let mut decisions = Vec::new();
        let decided = self.decide(txn.namespace, &txn.compares, &txn.then, &txn.otherwise, &mut decisions);
        let succeeded = decided.succeeded;
        let ops = if succeeded { &txn.then } else { &txn.otherwise };
        let mut commit = Commit::new(self, txn, ticket, out, succeeded);
        match commit.run(ops, decided, &mut decisions.into_iter(), true) {
            Ok(results) => match commit.finish() {
                Some(waiter) => Ran::Waits(waiter),
                None => {
                    results.iter().for_each(|reply| self.tallies.answered(reply));
                    Ran::Answered(Ok(TxnReply { succeeded, results }))
                }
            },
            Err(rejection) => {
                commit.undo();
                if let Rejection::Fenced { .. } = rejection {
                    let is_release = matches!(txn.then[..], [Op::LockRelease { .. }]);
                    self.tallies.fenced(if is_release { "lock" } else { "requirement" });
                }
                Ran::Answered(Err(rejection))
            }
        }
    }

    /// Everything that is judged before the compares.
    pub(crate) fn check_txn(&self, txn: &Txn) -> Result<(), Rejection> {
        check::check(txn, self.limit(Limit::TxnOps))?;
        txn.requires.iter().try_for_each(|r| self.check_requirement(txn.namespace, r))
    }

    pub(crate) fn check_requirement(&self, namespace: NamespaceId, required: &RequireLock) -> Result<(), Rejection> {
        let lock = self.locks.get(&LockKey::new(namespace, &required.name));
        if lock.is_some_and(|lock| lock.is_held_under(required.token)) {
            return Ok(());
        }
        Err(fenced(&required.name, required.token, lock))
    }

    /// Decides the compares of a transaction and, in the order in which they will run, of the nested ones on its way; those go to
    /// `decisions`. Nested ones thus see the state before the first operation, as in etcd.
    pub(crate) fn decide(
        &self,
        namespace: NamespaceId,
        compares: &[Compare],
        then: &[Op],
        otherwise: &[Op],
        decisions: &mut Vec<Decision>,
    ) -> Decision {
        let failed = compares.iter().position(|c| !self.compare(namespace, c));
        let ops = if failed.is_none() { then } else { otherwise };
        for op in ops {
            if let Op::Txn(sub) = op {
                let place = decisions.len();
                decisions.push(Decision::default());
                decisions[place] = self.decide(namespace, &sub.compares, &sub.then, &sub.otherwise, decisions);
            }
        }
        let told = failed.filter(|_| ops.first().is_some_and(conditions::is_explain));
        let failed_with = told.map(|index| Box::new(self.explain(namespace, index, &compares[index])));
        Decision { succeeded: failed.is_none(), failed: failed_with }
    }

    /// A span without keys compares like a key of zeros, except by value: there it fails whatever the relation.
    pub(crate) fn compare(&self, namespace: NamespaceId, compare: &Compare) -> bool {
        if let CompareTarget::Condition(condition) = &compare.target {
            return self.holds(namespace, condition) == (compare.relation == Relation::Equal);
        }
        let mut live = self.keys.live(&compare.span).peekable();
        if live.peek().is_none() {
            return relates(compare, &Meta::default(), None);
        }
        live.all(|record| {
            let (meta, _, value) = record.parts();
            relates(compare, &meta, Some(value))
        })
    }

    /// A range inside a transaction that began at `base`, when what it has done so far counts as `now`.
    pub(crate) fn range_within(&self, range: &Range, base: Revision, now: Revision) -> Result<RangeReply, Rejection> {
        // etcd compares the number as it came, so that one below zero is too old here and "now" outside of transactions.
        if range.revision < 0 && range.revision < self.compact_floor {
            return Err(Rejection::Compacted { lowest: self.keys.compacted() });
        }
        if u64::try_from(range.revision).is_ok_and(|r| r > base.0) {
            return Err(Rejection::FutureRevision { current: base });
        }
        self.keys.range(range, now)
    }
}

fn relates(compare: &Compare, meta: &Meta, value: Option<&[u8]>) -> bool {
    let ordering = match &compare.target {
        CompareTarget::Version(n) => (meta.version as i64).cmp(n),
        CompareTarget::CreateRevision(n) => (meta.create_revision.0 as i64).cmp(n),
        CompareTarget::ModRevision(n) => (meta.mod_revision.0 as i64).cmp(n),
        CompareTarget::Lease(n) => (meta.owner.0 as i64).cmp(n),
        CompareTarget::Value(expected) => match value {
            Some(value) => value.cmp(expected),
            None => return false,
        },
        // Decided before, whatever keys there are.
        CompareTarget::Condition(_) => return false,
    };
    match compare.relation {
        Relation::Equal => ordering == Ordering::Equal,
        Relation::NotEqual => ordering != Ordering::Equal,
        Relation::Greater => ordering == Ordering::Greater,
        Relation::Less => ordering == Ordering::Less,
    }
}

pub(crate) fn fenced(name: &[u8], presented: Revision, lock: Option<&Lock>) -> Rejection {
    Rejection::Fenced {
        name: name.into(),
        presented,
        newest: lock.map_or(Revision(0), Lock::newest),
        holder: lock.and_then(Lock::holder).cloned(),
    }
}

pub(crate) fn invalid(why: impl Into<Box<str>>) -> Rejection {
    Rejection::Invalid { why: why.into() }
}

/// Which list of a transaction runs.
#[derive(Default)]
pub(crate) struct Decision {
    pub(crate) succeeded: bool,
    /// The compare that did not hold, where the list asks for it.
    pub(crate) failed: Option<Box<Failed>>,
}

/// Objects told per entry that their time has come.
const DUE_PER_ENTRY: usize = 1_000;

/// Where an operation waits, and for what.
pub(crate) struct Place {
    pub(crate) on: Vec<ObjectKey>,
    /// Lower ones are served first.
    pub(crate) rank: i64,
    /// Zero: the wait depends on no session.
    pub(crate) session: SessionId,
    pub(crate) owner: Box<[u8]>,
    pub(crate) deadline: Option<LogTime>,
    pub(crate) ask: Ask,
}

enum Ran {
    Answered(Result<TxnReply, Rejection>),
    Waits(WaiterNumber),
}

/// What the checksum takes in beside changes. Numbers never change.
pub(crate) mod sum_event {
    pub(crate) const WAIT_ENDED: u64 = 1;
    pub(crate) const WAIT_BEGAN: u64 = 2;
    pub(crate) const SESSION_CREATED: u64 = 3;
    pub(crate) const SESSION_ENDED: u64 = 4;
    pub(crate) const MEMBER: u64 = 5;
    pub(crate) const RESTORED: u64 = 6;
    pub(crate) const OBJECT: u64 = 7;
    pub(crate) const LOCK_HOLD: u64 = 8;
}

/// How to take back one step.
pub(crate) enum Undo {
    Session(SessionId, Option<Session>),
    Attach(SessionId, Key),
    Detach(SessionId, Key),
    Lock(LockKey, Option<Lock>),
    LockShape(LockKey, Option<Shape>),
    LockHold(LockKey, HoldKey, Option<Box<LockHold>>),
    LockEvent(ObjectKey, Option<Box<LockEvent>>),
    Waiter(WaiterNumber, Option<Waiter>),
    Object(ObjectKey, Option<Object>),
}

/// One transaction on its way: what it has changed so far, and how to undo that.
pub(crate) struct Commit<'a> {
    pub(crate) m: &'a mut Machine,
    out: &'a mut Applied,
    pub(crate) txn: &'a Txn,
    ticket: Ticket,
    succeeded: bool,
    /// The revision before.
    base: Revision,
    /// The revision that it takes if it changes something.
    pub(crate) at: Revision,
    /// How many changes it has made.
    index: u32,
    keys_changed: bool,
    changes_before: usize,
    events_before: usize,
    pub(crate) undo: Vec<Undo>,
    /// Waits that it ends, with their answers.
    answers: Vec<(WaiterNumber, Waiter, Result<OpReply, Rejection>)>,
    ended: Vec<SessionId>,
    /// Tokens given by this commit: an object gets one token of a revision once.
    created: Vec<SessionId>,
    granted: Vec<LockKey>,
    /// Of those the exclusive ones.
    granted_alone: Vec<LockKey>,
    /// Wide locks that it has changed: their watchers are told once, of what they are in the end.
    pub(crate) touched: BTreeSet<LockKey>,
    /// Permits that it has granted, by their places.
    pub(crate) slots_given: Vec<(LockKey, u32)>,
    /// The wait that it became.
    joined: Option<WaiterNumber>,
    /// The operation at hand is the only one, so it may become a wait.
    alone: bool,
    /// Objects that it has given a token of its revision.
    numbered: Vec<ObjectKey>,
    /// Why the list at hand is the second one, until that was told.
    pub(crate) failed: Option<Box<Failed>>,
}

impl<'a> Commit<'a> {
    fn new(m: &'a mut Machine, txn: &'a Txn, ticket: Ticket, out: &'a mut Applied, succeeded: bool) -> Self {
        Self {
            base: m.revision,
            at: m.revision.next(),
            index: 0,
            keys_changed: false,
            changes_before: out.changes.len(),
            events_before: out.sessions.len(),
            undo: Vec::new(),
            answers: Vec::new(),
            ended: Vec::new(),
            created: Vec::new(),
            granted: Vec::new(),
            granted_alone: Vec::new(),
            touched: BTreeSet::new(),
            slots_given: Vec::new(),
            joined: None,
            alone: false,
            numbered: Vec::new(),
            failed: None,
            m,
            out,
            txn,
            ticket,
            succeeded,
        }
    }

    /// Makes it final. `Some`: the transaction has become a wait.
    fn finish(mut self) -> Option<WaiterNumber> {
        while let Some(lock) = self.touched.pop_first() {
            self.tell(&lock);
        }
        let Self { m, out, .. } = self;
        if self.index > 0 {
            m.revision = self.at;
        }
        let ring_max = m.limit(Limit::RingChanges);
        for change in &out.changes[self.changes_before..] {
            m.sums.change(change);
            if change.record.key()[0] == Space::Native as u8 {
                m.ring_of(change.record.key()).push(change.clone(), ring_max);
            }
        }
        for event in &out.sessions[self.events_before..] {
            match event {
                SessionEvent::Created { id, token, .. } => m.sums.event([sum_event::SESSION_CREATED, id.0, *token]),
                SessionEvent::Ended { id, token } => m.sums.event([sum_event::SESSION_ENDED, id.0, *token]),
                SessionEvent::ExpiryDropped { .. } | SessionEvent::Checkpoint { .. } => {}
            }
        }
        for step in &self.undo {
            match step {
                Undo::Object(key, _) => {
                    let [name, digest] = objects::sum_parts(key, m.objects.any(key));
                    m.sums.event([sum_event::OBJECT, name, digest]);
                }
                Undo::LockHold(key, at, _) => {
                    let depth = m.locks.wide(key).and_then(|wide| wide.holds.get(at)).map_or(0, |hold| hold.depth);
                    m.sums.event([sum_event::LOCK_HOLD, at.0.0, u64::from(depth)]);
                }
                _ => {}
            }
        }
        for session in self.ended {
            m.requests.forget_session(session);
        }
        for (number, waiter, result) in self.answers {
            m.answer_waiter(number, waiter, result, out);
        }
        if let Some(number) = self.joined {
            m.sums.event([sum_event::WAIT_BEGAN, number, 0]);
        }
        self.joined
    }

    /// Takes everything back.
    fn undo(self) {
        let m = self.m;
        if self.keys_changed {
            m.keys.rollback(self.at);
        }
        for step in self.undo.into_iter().rev() {
            match step {
                Undo::Session(id, old) => drop(m.sessions.set(id, old)),
                Undo::Attach(id, key) => drop(m.sessions.detach(id, key.as_bytes())),
                Undo::Detach(id, key) => drop(m.sessions.attach(id, key.as_bytes())),
                Undo::Lock(key, old) => drop(m.locks.set_lock(&key, old)),
                Undo::LockShape(key, old) => drop(m.locks.set_shape(&key, old)),
                Undo::LockHold(key, at, old) => drop(m.locks.set_hold(&key, at, old.map(|hold| *hold))),
                Undo::LockEvent(key, gone) => m.objects.pop_lock_event(&key, gone.map(|event| *event)),
                Undo::Waiter(number, old) => drop(m.waits.set(number, old)),
                Undo::Object(key, old) => drop(m.objects.set(&key, old)),
            }
        }
        self.out.changes.truncate(self.changes_before);
        self.out.sessions.truncate(self.events_before);
    }

    fn run(
        &mut self,
        ops: &[Op],
        decided: Decision,
        decisions: &mut impl Iterator<Item = Decision>,
        top: bool,
    ) -> Result<Vec<OpReply>, Rejection> {
        let alone = top && ops.len() == 1;
        let mut results = Vec::with_capacity(ops.len());
        self.failed = decided.failed;
        for (at, op) in ops.iter().enumerate() {
            let result = match op {
                Op::Txn(sub) => {
                    let decided = decisions.next().unwrap_or_default();
                    let succeeded = decided.succeeded;
                    let ops = if succeeded { &sub.then } else { &sub.otherwise };
                    let results = self.run(ops, decided, decisions, false);
                    results.map(|results| OpReply::Txn(TxnReply { succeeded, results }))
                }
                op => self.op(op, alone),
            };
            match result {
                Ok(result) => results.push(result),
                Err(rejection) if alone => return Err(rejection),
                Err(rejection) => return Err(conditions::placed(rejection, ops, at)),
            }
        }
        Ok(results)
    }

    fn op(&mut self, op: &Op, alone: bool) -> Result<OpReply, Rejection> {
        self.alone = alone;
        match op {
            Op::Put(put) => self.put(put),
            Op::Delete(delete) => Ok(self.delete(delete)),
            Op::Range(range) => Ok(OpReply::Range(self.m.range_within(range, self.base, self.now())?)),
            Op::SessionCreate(create) => self.session_create(create),
            Op::SessionEnd { session, token } => self.session_end(*session, *token),
            Op::SessionExpire { session, token, term } => self.session_expire(*session, *token, *term),
            Op::SessionCheckpoint { session, token, remaining_ms } => {
                Ok(self.session_checkpoint(*session, *token, *remaining_ms))
            }
            Op::LockAcquire(acquire) => self.lock_acquire(acquire),
            Op::LockRelease { name, session, token } => {
                check_name(name)?;
                self.release(name, *session, *token, None)
            }
            Op::LockCancel { name, session, request } => self.lock_cancel(name, *session, request.as_ref()),
            Op::Native(_) if self.m.behaviour < PRIMITIVES => Err(Rejection::NotYet { behaviour: PRIMITIVES }),
            Op::Native(op) => self.native(op),
            // What cannot be undone stands alone.
            _ if !alone => Err(invalid("a system operation must be the only one of its transaction")),
            Op::Compact { revision } => self.compact(*revision),
            Op::Genesis { cluster, issuer } => self.genesis(*cluster, *issuer),
            Op::RaiseBehaviour { to } => {
                self.m.members.check_behaviour(*to)?;
                self.m.behaviour = self.m.behaviour.max(*to);
                Ok(OpReply::Done)
            }
            Op::SetLimit { limit, value } => self.set_limit(*limit, *value),
            Op::Checksum { .. } if self.m.behaviour < CHECKSUMS => Err(Rejection::NotYet { behaviour: CHECKSUMS }),
            // It was compared before the transaction ran.
            Op::Checksum { .. } => {
                self.m.sums.note_compared(self.m.position.index, self.m.stamp);
                Ok(OpReply::Done)
            }
            Op::MemberAdd { .. }
            | Op::MemberPromote { .. }
            | Op::MemberRemove { .. }
            | Op::MemberUpdate { .. }
            | Op::MemberRegister { .. }
            | Op::MemberSeen { .. } => self.member(op),
            Op::Txn(_) => Err(invalid("a nested transaction stands in a list of operations")),
        }
    }

    /// The newest revision as this transaction sees it.
    fn now(&self) -> Revision {
        if self.index > 0 { self.at } else { self.base }
    }

    pub(crate) fn next_index(&mut self) -> u32 {
        self.index += 1;
        self.index - 1
    }

    // ---- Keys ----

    fn put(&mut self, put: &Put) -> Result<OpReply, Rejection> {
        let key = put.key.as_bytes();
        if put.session != SessionId(0) && self.m.sessions.get(put.session).is_none() {
            return Err(Rejection::SessionNotFound { session: put.session });
        }
        let kept = if put.keep_value || put.keep_session {
            Some(self.m.keys.get(key).cloned().ok_or(Rejection::KeyNotFound)?)
        } else {
            None
        };
        let owner = match &kept {
            Some(old) if put.keep_session => old.meta().owner,
            _ => put.session,
        };
        let value = match &kept {
            Some(old) if put.keep_value => old.value(),
            _ => &put.value,
        };
        self.check_attach(owner, key)?;
        let index = self.next_index();
        let change = self.m.keys.put(key, value, b"", owner, self.at, index);
        self.keys_changed = true;
        let prev = if put.prev { change.before.clone() } else { None };
        self.push_key_change(change);
        Ok(OpReply::Put { prev })
    }

    /// A native session owns a bounded number of things. An etcd lease is not bounded, as etcd's are not.
    fn check_attach(&self, owner: SessionId, key: &[u8]) -> Result<(), Rejection> {
        if owner == SessionId(0) || !self.m.sessions.get(owner).is_some_and(Session::is_native) {
            return Ok(());
        }
        if self.m.keys.get(key).is_some_and(|r| r.meta().owner == owner) {
            return Ok(());
        }
        self.check_things(owner)
    }

    /// Whether a session may own one thing more.
    pub(crate) fn check_things(&self, owner: SessionId) -> Result<(), Rejection> {
        self.check_room(owner, 1)
    }

    /// Whether a session may own so many things more.
    fn check_room(&self, owner: SessionId, more: u64) -> Result<(), Rejection> {
        let limit = self.m.limit(Limit::SessionThings);
        let m = &self.m;
        let keys_and_locks = m.sessions.key_count(owner) + m.locks.lock_count(owner);
        if keys_and_locks + m.waits.count(owner) + m.objects.session_count(owner) + more > limit {
            return Err(Rejection::Quota { what: name::SESSION_THINGS, limit });
        }
        Ok(())
    }

    /// Moves the key between owners as the change says, and hands the change out.
    fn push_key_change(&mut self, change: Change) {
        let old = change.before.as_ref().map_or(SessionId(0), |r| r.meta().owner);
        let new = change.record.meta().owner;
        if old != new {
            let key = change.record.key();
            if old != SessionId(0) && self.m.sessions.detach(old, key) {
                self.undo.push(Undo::Detach(old, Key::from_bytes(key)));
            }
            if new != SessionId(0) && self.m.sessions.attach(new, key) {
                self.undo.push(Undo::Attach(new, Key::from_bytes(key)));
            }
        }
        self.out.changes.push(change);
    }

    fn delete(&mut self, delete: &Delete) -> OpReply {
        let mut deleted = 0;
        let mut prev = Vec::new();
        if delete.span.end.is_none() {
            let before = self.delete_key(delete.span.start.as_bytes());
            deleted = u64::from(before.is_some());
            prev.extend(before.filter(|_| delete.prev));
        } else {
            let live: Vec<Record> = self.m.keys.live(&delete.span).cloned().collect();
            for record in live {
                let before = self.delete_key(record.key());
                deleted += u64::from(before.is_some());
                prev.extend(before.filter(|_| delete.prev));
            }
        }
        OpReply::Delete { deleted, prev }
    }

    fn delete_key(&mut self, key: &[u8]) -> Option<Record> {
        let change = self.m.keys.delete(key, self.at, self.index)?;
        self.index += 1;
        self.keys_changed = true;
        let before = change.before.clone();
        self.push_key_change(change);
        before
    }

    fn compact(&mut self, revision: i64) -> Result<OpReply, Rejection> {
        if revision <= self.m.compact_floor {
            return Err(Rejection::Compacted { lowest: self.m.keys.compacted() });
        }
        let to = Revision(u64::try_from(revision).unwrap_or(0));
        if to > self.base {
            return Err(Rejection::FutureRevision { current: self.base });
        }
        self.m.compact_floor = revision;
        self.m.keys.compact(to);
        self.m.marks.compact(to);
        Ok(OpReply::Compacted)
    }

    // ---- Sessions ----

    pub(crate) fn set_session(&mut self, id: SessionId, session: Option<Session>) {
        let old = self.m.sessions.set(id, session);
        self.undo.push(Undo::Session(id, old));
    }

    fn session_create(&mut self, create: &SessionCreate) -> Result<OpReply, Rejection> {
        self.check_create(create)?;
        let token = self.create(create);
        Ok(OpReply::SessionCreated { id: create.id, token, ttl_ms: create.ttl_ms })
    }

    fn check_create(&self, create: &SessionCreate) -> Result<(), Rejection> {
        let metadata: usize = create.metadata.iter().map(|(k, v)| k.len() + v.len()).sum();
        // etcd numbers its leases with signed integers and takes negative ones from clients that choose them.
        if create.id.0 == 0 || (create.face == SessionFace::Native && create.id.0 >> 63 != 0) {
            return Err(invalid("a session id is above zero and its top bit is clear"));
        }
        if create.ttl_ms == 0 {
            return Err(invalid("a session lives for some time"));
        }
        if create.name.len() > sessions::NAME_BYTES_MAX || metadata > sessions::METADATA_BYTES_MAX {
            return Err(invalid("the name or the metadata of the session is too large"));
        }
        if self.m.sessions.get(create.id).is_some() {
            return Err(Rejection::SessionExists { session: create.id });
        }
        if self.created.contains(&create.id) {
            return Err(invalid("one transaction makes a session once"));
        }
        Ok(())
    }

    fn create(&mut self, create: &SessionCreate) -> SessionToken {
        let native = create.face == SessionFace::Native;
        let (token, index) = if native { (self.at.0, self.next_index()) } else { (self.m.position.index.0, 0) };
        let session = Session {
            facts: Arc::new(SessionFacts { create: create.clone(), token, index, created: self.m.stamp }),
            remaining_ms: None,
            released: Vec::new(),
        };
        if native {
            self.out.changes.push(Change { record: session.record(), before: None });
        }
        self.set_session(create.id, Some(session));
        self.created.push(create.id);
        self.out.sessions.push(SessionEvent::Created { id: create.id, token, ttl_ms: create.ttl_ms });
        token
    }

    fn session_end(&mut self, id: SessionId, token: Option<SessionToken>) -> Result<OpReply, Rejection> {
        match (self.m.token_of(id), token) {
            (None, None) => Err(Rejection::SessionNotFound { session: id }),
            (live, Some(token)) if live != Some(token) => Err(Rejection::SessionExpired { session: id }),
            _ => {
                self.end(id)?;
                Ok(OpReply::SessionEnded)
            }
        }
    }

    fn session_expire(&mut self, id: SessionId, token: SessionToken, term: Term) -> Result<OpReply, Rejection> {
        if self.m.token_of(id) != Some(token) || self.m.position.term != term {
            self.out.sessions.push(SessionEvent::ExpiryDropped { id, token });
            return Ok(OpReply::Done);
        }
        self.end(id)?;
        Ok(OpReply::SessionEnded)
    }

    fn session_checkpoint(&mut self, id: SessionId, token: SessionToken, remaining_ms: Option<u64>) -> OpReply {
        if let Some(session) = self.m.sessions.get(id).filter(|s| s.facts.token == token).cloned() {
            self.set_session(id, Some(Session { remaining_ms, ..session }));
            self.out.sessions.push(SessionEvent::Checkpoint { id, token, remaining_ms });
        }
        OpReply::Done
    }

    /// Ends a live session: its waits, its keys, its locks, itself.
    fn end(&mut self, id: SessionId) -> Result<(), Rejection> {
        let Some(session) = self.m.sessions.get(id).cloned() else { return Ok(()) };
        // Its waits go first, so that none of its own locks is granted to it.
        let mut left = BTreeSet::new();
        for number in self.m.waits.of_session(id) {
            left.extend(self.m.waits.get(number).into_iter().flat_map(|waiter| waiter.on.iter().cloned()));
            self.end_wait(number, Err(Rejection::SessionExpired { session: id }));
        }
        let keys: Vec<Key> = self.m.sessions.keys(id).cloned().collect();
        for key in keys {
            match session.facts.create.on_expire {
                OnExpire::Delete => drop(self.delete_key(key.as_bytes())),
                OnExpire::Release => self.disown(key.as_bytes()),
            }
        }
        let dropped = self.drop_holds_of(id)?;
        // Whoever waited behind one of its waits is served, too; a plain lock has no room for them.
        let waited = left.iter().filter_map(LockKey::of_object);
        let waited: Vec<LockKey> =
            waited.filter(|key| !matches!(self.m.locks.get(key), Some(Lock::Plain(_)))).collect();
        self.serve(dropped.into_iter().chain(waited))?;
        for object in self.m.objects.of_session(id) {
            objects::session_ended(self, &object, id);
        }
        for key in left {
            objects::waiter_gone(self, &key);
        }
        if session.is_native() {
            let index = self.next_index();
            let record = tombstone(&sessions::native_key(id), self.at, index);
            self.out.changes.push(Change { record, before: Some(session.record()) });
        }
        self.set_session(id, None);
        self.ended.push(id);
        self.out.sessions.push(SessionEvent::Ended { id, token: session.facts.token });
        Ok(())
    }

    /// Writes a key as it is, without its owner.
    fn disown(&mut self, key: &[u8]) {
        let Some(record) = self.m.keys.get(key).cloned() else { return };
        let (_, tail, value) = record.parts();
        let index = self.next_index();
        let change = self.m.keys.put(key, value, tail, SessionId(0), self.at, index);
        self.keys_changed = true;
        self.push_key_change(change);
    }

    // ---- Locks ----

    fn lock_acquire(&mut self, acquire: &LockAcquire) -> Result<OpReply, Rejection> {
        check_name(&acquire.name)?;
        if acquire.owner.len() > crate::locks::NAME_BYTES_MAX {
            return Err(invalid("the owner's name is too long"));
        }
        let session = self.check_acquirer(acquire.session, acquire.create.as_ref(), 1)?;
        let key = LockKey::new(self.txn.namespace, &acquire.name);
        if self.m.locks.get(&key).is_none() && !self.m.waits.any_of_several() {
            self.create_session_of(acquire.create.as_ref());
            return Ok(OpReply::LockGranted(self.grant(&key, session, acquire.owner.clone())?));
        }
        let want = Want::of_acquire(key, acquire, session);
        self.acquire(&want, acquire.wait, acquire.create.as_ref(), || Ask::Exclusive)
    }

    /// The session that will hold so many locks: a live one, or one that may be made.
    pub(crate) fn check_acquirer(
        &self,
        id: SessionId,
        create: Option<&SessionCreate>,
        locks: u64,
    ) -> Result<SessionId, Rejection> {
        let Some(create) = create else {
            let session = self.live_session(id)?;
            if session.is_native() {
                self.check_room(id, locks)?;
            }
            return Ok(id);
        };
        if id != SessionId(0) && id != create.id {
            return Err(invalid("an acquire that makes a session holds the lock under it"));
        }
        self.check_create(create)?;
        Ok(create.id)
    }

    pub(crate) fn create_session_of(&mut self, create: Option<&SessionCreate>) {
        if let Some(create) = create {
            self.create(create);
        }
    }

    /// Makes the operation at hand, which must be `alone`, a wait: its caller is answered when that ends.
    pub(crate) fn wait(&mut self, place: Place) {
        debug_assert!(self.alone, "the caller checks that");
        let waiter = Waiter {
            on: place.on,
            rank: place.rank,
            session: place.session,
            owner: place.owner,
            since: self.m.stamp,
            deadline: place.deadline,
            ticket: self.ticket,
            principal: self.txn.principal.clone(),
            request: self.txn.request,
            succeeded: self.succeeded,
            ask: place.ask,
        };
        let number = self.m.waits.next;
        self.m.waits.next += 1;
        let old = self.m.waits.set(number, Some(waiter));
        self.undo.push(Undo::Waiter(number, old));
        self.joined = Some(number);
    }

    /// Refuses a wait that would not be the only operation of its transaction.
    pub(crate) fn check_alone(&self) -> Result<(), Rejection> {
        let refused = || invalid("an operation that may wait must be the only one of its transaction");
        if self.alone { Ok(()) } else { Err(refused()) }
    }

    pub(crate) fn set_lock(&mut self, key: &LockKey, lock: Option<Lock>) {
        let old = self.m.locks.set_lock(key, lock);
        self.undo.push(Undo::Lock(key.clone(), old));
    }

    /// Notes that this commit's revision becomes a token of the lock: once, unless it is one of several who hold it beside one another.
    pub(crate) fn note_grant(&mut self, key: &LockKey, alone: bool) -> Result<(), Rejection> {
        if self.granted_alone.contains(key) || (alone && self.granted.contains(key)) {
            return Err(invalid(format!("one transaction grants lock `{}` once", key.name().escape_ascii())));
        }
        let list = if alone { &mut self.granted_alone } else { &mut self.granted };
        list.push(key.clone());
        Ok(())
    }

    pub(crate) fn push_change(&mut self, change: Change) {
        self.out.changes.push(change);
    }

    /// Gives the lock, alone and without conditions, to a live session. Its token is this commit's revision, so a commit can grant a lock only once.
    pub(crate) fn grant(
        &mut self,
        key: &LockKey,
        session: SessionId,
        owner: Box<[u8]>,
    ) -> Result<LockGrant, Rejection> {
        self.note_grant(key, true)?;
        let facts =
            self.m.sessions.get(session).map(|s| s.facts.clone()).ok_or(Rejection::SessionExpired { session })?;
        let before = match self.m.locks.get(key) {
            Some(Lock::Plain(plain)) => Some(plain.record(key)),
            _ => None,
        };
        let holder = Holder { token: self.at, session, owner, since: self.m.stamp };
        self.lock_event(key, LockEvent::of(LockEventKind::Granted, &holder, self.m.stamp, 0));
        let plain = Plain { holder, index: self.next_index() };
        self.out.changes.push(Change { record: plain.record(key), before });
        self.set_lock(key, Some(Lock::Plain(plain)));
        Ok(LockGrant { token: self.at, session, session_token: facts.token, ttl_ms: facts.create.ttl_ms })
    }

    /// Takes a plain lock from its holder and gives it to the first waiter, if there is one.
    ///
    /// Every waiter here is of a live session and in time: the waits of a session end with it, and due waits ended before
    /// the first transaction of the entry.
    pub(crate) fn free(&mut self, key: &LockKey, why: LockEventKind, detail: &str) -> Result<(), Rejection> {
        let Some(Lock::Plain(plain)) = self.m.locks.get(key) else { return Ok(()) };
        let held_ms = self.m.stamp.0.saturating_sub(plain.holder.since.0);
        let event = LockEvent::of(why, &plain.holder, self.m.stamp, held_ms);
        self.lock_event(key, LockEvent { detail: detail.into(), ..event });
        let queue = key.object();
        let next = self.m.waits.head(&queue);
        if let Some(number) = next
            && let Some(waiter) = self.m.waits.get(number)
            && waiter.ask == Ask::Exclusive
        {
            debug_assert!(waiter.deadline.is_none_or(|deadline| deadline > self.m.stamp));
            let (session, owner) = (waiter.session, waiter.owner.clone());
            let grant = self.grant(key, session, owner)?;
            self.end_wait(number, Ok(OpReply::LockGranted(grant)));
            return Ok(());
        }
        let before = self.m.locks.get(key).and_then(|lock| match lock {
            Lock::Plain(plain) => Some(plain.record(key)),
            Lock::Wide(_) => None,
        });
        self.set_lock(key, None);
        if next.is_some() {
            self.serve([key.clone()])?;
        }
        if self.m.locks.get(key).is_none() {
            let record = tombstone(&key.native_key(), self.at, self.next_index());
            self.out.changes.push(Change { record, before });
            self.touched.remove(key);
        }
        Ok(())
    }

    /// Ends a wait with its answer.
    pub(crate) fn end_wait(&mut self, number: WaiterNumber, result: Result<OpReply, Rejection>) {
        if let Some(waiter) = self.m.waits.set(number, None) {
            self.undo.push(Undo::Waiter(number, Some(waiter.clone())));
            self.answers.push((number, waiter, result));
        }
    }

    fn lock_cancel(
        &mut self,
        name: &[u8],
        session: SessionId,
        request: Option<&RequestId>,
    ) -> Result<OpReply, Rejection> {
        let key = LockKey::new(self.txn.namespace, name);
        let queue = key.object();
        let mut waits = self.m.waits.of_session(session);
        waits.retain(|number| {
            let waiter = self.m.waits.get(*number).filter(|w| w.on.contains(&queue));
            waiter.is_some_and(|w| request.is_none_or(|r| w.request.is_some_and(|own| is_same(&own, r))))
        });
        let mut freed = Vec::new();
        for number in &waits {
            if let Some(event) = self.waiter_event(LockEventKind::Cancelled, *number) {
                self.lock_event(&key, event);
            }
            freed.extend(self.m.waits.get(*number).map(|w| lock_ops::keys_of(&w.on)).unwrap_or_default());
            self.end_wait(*number, Err(Rejection::Cancelled { name: name.into() }));
        }
        // A plain lock has no room for those behind.
        freed.retain(|key| !matches!(self.m.locks.get(key), Some(Lock::Plain(_))));
        self.serve(freed)?;
        Ok(OpReply::LockCancelled { waiters: waits.len() as u64 })
    }

    // ---- Objects ----

    /// The place of the next change among those of this commit: with the revision, a name that is never used twice.
    pub(crate) fn place(&self) -> u32 {
        self.index
    }

    /// An object of the transaction's namespace, by kind and name.
    pub(crate) fn object_key<T: Lived>(&self, name: &[u8]) -> ObjectKey {
        ObjectKey::of::<T>(self.txn.namespace, name)
    }

    pub(crate) fn object<T: Lived>(&self, key: &ObjectKey) -> Option<&T> {
        self.m.objects.get(key)
    }

    /// Puts or replaces an object.
    pub(crate) fn put_object<T: Lived>(&mut self, key: &ObjectKey, object: T) {
        self.set_object(key, Some(object.into_object()));
    }

    pub(crate) fn remove_object(&mut self, key: &ObjectKey) {
        if self.m.objects.any(key).is_some() {
            self.set_object(key, None);
        }
    }

    fn set_object(&mut self, key: &ObjectKey, new: Option<Object>) {
        let index = self.next_index();
        let old = self.m.objects.set(key, new.clone());
        if objects::is_watched(new.as_ref().or(old.as_ref())) {
            let record = objects::record(key, new.as_ref(), self.at, index);
            // What it was is not told to watchers: an object says all that it is.
            self.out.changes.push(Change { record, before: None });
        }
        self.undo.push(Undo::Object(key.clone(), old));
    }

    /// Puts, replaces or removes an object that nobody watches, without taking a revision.
    pub(crate) fn set_object_silently(&mut self, key: &ObjectKey, new: Option<Object>) {
        let old = self.m.objects.set(key, new);
        self.undo.push(Undo::Object(key.clone(), old));
    }

    /// Notes that this commit's revision becomes a token of the object, which can happen once.
    pub(crate) fn number_once(&mut self, key: &ObjectKey) -> Result<Revision, Rejection> {
        if self.numbered.contains(key) {
            let name = key.name().escape_ascii();
            return Err(invalid(format!("one transaction gives `{name}` one token")));
        }
        self.numbered.push(key.clone());
        Ok(self.at)
    }

    /// The live session, as whoever owns something under it must name it.
    pub(crate) fn live_session(&self, id: SessionId) -> Result<&Session, Rejection> {
        self.m.sessions.get(id).ok_or(Rejection::SessionExpired { session: id })
    }

    // ---- System ----

    fn member(&mut self, op: &Op) -> Result<OpReply, Rejection> {
        let record = self.m.members.change(op, self.m.behaviour)?;
        let mut bytes = Vec::new();
        members::write(&mut bytes, &record);
        self.m.sums.event([sum_event::MEMBER, record.id.0, fold(0, &bytes)]);
        Ok(OpReply::Member(Box::new(record)))
    }

    fn genesis(&mut self, cluster: u64, issuer: [u8; 16]) -> Result<OpReply, Rejection> {
        if self.m.cluster != 0 || cluster == 0 {
            return Err(invalid("a cluster gets its identity once"));
        }
        self.m.cluster = cluster;
        self.m.issuer = issuer;
        Ok(OpReply::Done)
    }

    fn set_limit(&mut self, limit: Limit, value: u64) -> Result<OpReply, Rejection> {
        if value == 0 {
            return Err(invalid("a limit of zero would refuse everything, this operation's successor too"));
        }
        self.m.limits[limit as usize - 1] = value;
        if limit == Limit::RingChanges {
            self.m.ring.shrink(value);
            self.m.busy_ring.shrink(value);
        }
        Ok(OpReply::Done)
    }
}

pub(crate) fn check_name(name: &[u8]) -> Result<(), Rejection> {
    if name.is_empty() {
        return Err(invalid("a lock has a name"));
    }
    if name.len() > crate::locks::NAME_BYTES_MAX {
        return Err(invalid("the name of the lock is too long"));
    }
    Ok(())
}

/// What was acknowledged meanwhile is not part of a request's identity.
pub(crate) fn is_same(a: &RequestId, b: &RequestId) -> bool {
    match (a, b) {
        (RequestId::Session { session: a, seq: m, .. }, RequestId::Session { session: b, seq: n, .. }) => {
            a == b && m == n
        }
        (RequestId::Series { series: a, seq: m, .. }, RequestId::Series { series: b, seq: n, .. }) => a == b && m == n,
        (a, b) => a == b,
    }
}

pub(crate) fn tombstone(key: &Key, at: Revision, index: u32) -> Record {
    let meta = Meta { tombstone: true, mod_revision: at, index, ..Meta::default() };
    Record::new(key.as_bytes(), meta, b"", b"")
}
