//! What can be asked of the machine without an entry: reads, what doors show, and what is judged before proposing.
//!
//! Promises. R1: a read changes nothing and sees whole commits only. R2: deleting, releasing, ending and compacting are admitted
//! however full the memory is.
//! Not promised. That the state is the newest: whoever wants a linearizable read has done its read index before.

use crate::apply::{CHECKSUMS, Decision, LockCounts, Machine, Position};
use crate::check;
use crate::codec::MAX_DEPTH;
use crate::command::*;
use crate::keys::ChangeSlice;
use crate::lock_events::{LockEvent, LockEvents};
use crate::locks::{LockInfo, LockKey};
use crate::objects::{ObjectKey, Stored, is_busy};
use crate::record::Record;
use crate::reply::*;
use crate::requests::Seen;
use crate::seen::kind_of;
use crate::sessions::{Session, SessionInfo};
use crate::tallies::Tallies;
use crate::types::*;
use std::fmt;

/// Bounds of the accounted memory: flags of one member, never read by apply. Zero: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryLimits {
    /// Above it history is compacted sooner.
    pub soft: u64,
    /// Above it whatever grows is refused.
    pub hard: u64,
}

/// Accounted bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Everything.
    pub used: u64,
    /// What compaction could give back.
    pub history: u64,
    /// Live keys with their values.
    pub records: u64,
    pub soft: u64,
    pub hard: u64,
}

/// How many there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Live keys.
    pub keys: u64,
    /// Versions of keys that are kept, live ones included.
    pub revisions_kept: u64,
    pub sessions: u64,
    pub locks_held: u64,
    pub waiters: u64,
    /// Remembered requests.
    pub requests: u64,
}

/// A transaction must not be proposed: it would grow what is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overload {
    pub what: &'static str,
    pub used: u64,
    pub limit: u64,
}

impl fmt::Display for Overload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} used, {} allowed", self.what, self.used, self.limit)
    }
}

impl std::error::Error for Overload {}

impl Txn {
    /// Only ranges, nested ones included: such a transaction need not go through the log. One with a request id must, for its answer is remembered.
    pub fn is_read_only(&self) -> bool {
        self.request.is_none() && ops_read_only(&self.then) && ops_read_only(&self.otherwise)
    }
}

fn ops_read_only(ops: &[Op]) -> bool {
    ops.iter().all(|op| match op {
        Op::Range(_) => true,
        Op::Txn(sub) => ops_read_only(&sub.then) && ops_read_only(&sub.otherwise),
        _ => false,
    })
}

/// Where the machine is.
impl Machine {
    /// The last entry that was applied or skipped.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The newest revision.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Revisions below it cannot be read; zero before the first compaction.
    pub fn compacted(&self) -> Revision {
        self.keys.compacted()
    }

    /// Log time of the last entry.
    pub fn stamp(&self) -> LogTime {
        self.stamp
    }

    /// The behaviour version that apply follows.
    pub fn behaviour(&self) -> u16 {
        self.behaviour
    }

    /// Whether the leader is about to raise the behaviour version, or this member to say what it can: a fresh cluster refuses until then what
    /// every member of it knows.
    pub fn awaits_behaviour(&self, member: MemberId) -> bool {
        let has_come = self.member(member).is_some_and(MemberRecord::has_come);
        let counted = self.members().filter(|m| m.is_live() && (m.has_come() || m.role == MemberRole::Voter));
        !has_come || counted.map(|m| m.behaviour).min().is_some_and(|able| able > self.behaviour)
    }

    /// The identity of the cluster; zero before its first entry.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// Whose tokens these are: 128 random bits that the first leader logged.
    pub fn issuer(&self) -> [u8; 16] {
        self.issuer
    }

    /// Over everything that changed; equal on members that have applied the same entries.
    pub fn checksum(&self) -> u64 {
        self.sums.now()
    }
}

/// Reads.
impl Machine {
    /// etcd's Range.
    pub fn range(&self, range: &Range) -> Result<RangeReply, Rejection> {
        check::check_key(&range.span.start)?;
        self.keys.range(range, self.revision)
    }

    /// The live version of a key.
    pub fn get(&self, key: &Key) -> Option<&Record> {
        self.keys.get(key.as_bytes())
    }

    /// A transaction that only reads, without an entry. Its `requires` hold at this moment, like its compares.
    pub fn read_txn(&self, txn: &Txn) -> Result<TxnReply, Rejection> {
        if !txn.is_read_only() {
            return Err(Rejection::Invalid { why: "this transaction does more than read".into() });
        }
        self.check_txn(txn)?;
        let mut decisions = Vec::new();
        let Decision { succeeded, .. } =
            self.decide(txn.namespace, &txn.compares, &txn.then, &txn.otherwise, &mut decisions);
        let ops = if succeeded { &txn.then } else { &txn.otherwise };
        let results = self.read_ops(ops, &mut decisions.into_iter())?;
        Ok(TxnReply { succeeded, results })
    }

    fn read_ops(&self, ops: &[Op], decisions: &mut impl Iterator<Item = Decision>) -> Result<Vec<OpReply>, Rejection> {
        let mut results = Vec::with_capacity(ops.len());
        for op in ops {
            match op {
                Op::Range(range) => {
                    results.push(OpReply::Range(self.range_within(range, self.revision, self.revision)?))
                }
                Op::Txn(sub) => {
                    let Decision { succeeded, .. } = decisions.next().unwrap_or_default();
                    let ops = if succeeded { &sub.then } else { &sub.otherwise };
                    let results_within = self.read_ops(ops, decisions)?;
                    results.push(OpReply::Txn(TxnReply { succeeded, results: results_within }));
                }
                _ => return Err(Rejection::Invalid { why: "this transaction does more than read".into() }),
            }
        }
        Ok(results)
    }

    /// A page of the keys of a span at a revision that is not compacted, after the key `after`; the second part is where the next page starts, if there may be one.
    pub fn range_slice(
        &self,
        span: &Span,
        at: Revision,
        after: Option<&Key>,
        max_records: usize,
    ) -> (Vec<Record>, Option<Key>) {
        self.keys.range_slice(span, at, after, max_records)
    }

    /// The changes of a span from a revision on: whole revisions, in order, until about `max_bytes` are gathered. The span's start says which space is meant.
    pub fn changes(&self, span: &Span, from: Revision, max_bytes: usize) -> Result<ChangeSlice, Rejection> {
        match span.start.as_bytes().first() {
            Some(&space) if space == Space::Keys as u8 => self.keys.changes(span, from, max_bytes, self.revision),
            _ if kind_of(span.start.as_bytes()).is_some_and(is_busy) => {
                self.busy_ring.changes(span, from, max_bytes, self.revision)
            }
            _ => self.ring.changes(span, from, max_bytes, self.revision),
        }
    }
}

/// For doors.
impl Machine {
    /// A live session.
    pub fn session(&self, id: SessionId) -> Option<SessionInfo> {
        self.sessions.get(id).map(|session| self.session_info(session))
    }

    /// Its attached keys, in key order.
    pub fn session_keys(&self, id: SessionId) -> Vec<Key> {
        self.sessions.keys(id).cloned().collect()
    }

    /// Up to `max` live sessions with larger ids, in the order of ids.
    pub fn sessions(&self, after: SessionId, max: usize) -> Vec<SessionInfo> {
        self.sessions.after(after).take(max).map(|(_, session)| self.session_info(session)).collect()
    }

    fn session_info(&self, session: &Session) -> SessionInfo {
        let facts = &session.facts;
        let create = &facts.create;
        SessionInfo {
            id: create.id,
            token: facts.token,
            face: create.face,
            ttl_ms: create.ttl_ms,
            on_expire: create.on_expire,
            name: create.name.clone(),
            metadata: create.metadata.clone(),
            created: facts.created,
            remaining_ms: session.remaining_ms,
            keys: self.sessions.key_count(create.id),
            locks: self.locks.lock_count(create.id),
        }
    }

    /// A held lock with its waiters; `None` where nobody holds it.
    pub fn lock(&self, ns: NamespaceId, name: &[u8]) -> Option<LockInfo> {
        self.locks.info(&LockKey::new(ns, name), &self.waits)
    }

    /// Where the callers of waits are, whatever lock they wait for.
    pub fn waiting_tickets(&self) -> impl Iterator<Item = Ticket> {
        self.waits.table.iter().map(|(_, waiter)| waiter.ticket)
    }

    /// The newest grant under which this session and owner hold the lock now.
    pub fn granted(&self, ns: NamespaceId, name: &[u8], session: SessionId, owner: &[u8]) -> Option<LockGrant> {
        let lock = self.locks.get(&LockKey::new(ns, name))?;
        let own = lock.holders().filter(|holder| holder.session == session && *holder.owner == *owner);
        let token = own.map(|holder| holder.token).max()?;
        let facts = &self.sessions.get(session)?.facts;
        Some(LockGrant { token, session, session_token: facts.token, ttl_ms: facts.create.ttl_ms })
    }

    /// The newest events of a lock, oldest first.
    pub fn lock_events(&self, ns: NamespaceId, name: &[u8]) -> Vec<LockEvent> {
        let events = self.object::<LockEvents>(ns, name);
        events.map(|events| events.told(self.stamp).cloned().collect()).unwrap_or_default()
    }

    /// What this member has seen happen since it started.
    pub fn tallies(&self) -> &Tallies {
        &self.tallies
    }

    /// What happened to locks since this member started.
    pub fn lock_counts(&self) -> LockCounts {
        self.lock_counts
    }

    /// Whether somebody holds the lock, so that an acquire would have to wait as things stand.
    pub fn is_held(&self, ns: NamespaceId, name: &[u8]) -> bool {
        self.locks.get(&LockKey::new(ns, name)).is_some_and(|lock| lock.holder().is_some())
    }

    /// Up to `max` held locks whose names begin with `prefix` and come after `after`, in the order of names.
    pub fn locks(&self, ns: NamespaceId, prefix: &[u8], after: Option<&[u8]>, max: usize) -> Vec<LockInfo> {
        self.locks.list(ns, prefix, after).take(max).filter_map(|key| self.locks.info(key, &self.waits)).collect()
    }

    /// An object of a kind, by name.
    pub fn object<T: Stored>(&self, ns: NamespaceId, name: &[u8]) -> Option<&T> {
        self.objects.get(&ObjectKey::of::<T>(ns, name))
    }

    /// Up to `max` objects of a kind whose names begin with `prefix` and come after `after`, in the order of names.
    pub fn objects<'a, T: Stored + 'a>(
        &'a self,
        ns: NamespaceId,
        prefix: &'a [u8],
        after: Option<&[u8]>,
        max: usize,
    ) -> Vec<(Box<[u8]>, &'a T)> {
        self.objects.list(ns, prefix, after).take(max).map(|(key, object)| (key.name().into(), object)).collect()
    }

    /// How many there are of everything.
    pub fn counts(&self) -> Counts {
        let keys = self.keys.memory();
        Counts {
            keys: keys.live,
            revisions_kept: keys.versions,
            sessions: self.sessions.table.len() as u64,
            locks_held: self.locks.held.len() as u64,
            waiters: self.waits.table.len() as u64,
            requests: self.requests.len(),
        }
    }
}

/// For callers whose entries this member has never applied, because a snapshot took their place.
impl Machine {
    /// The answer that is remembered for a request, marked as a repeated one; `digest` is that of its transaction, and another one under
    /// this id is answered as a mismatch. `None`: nothing is remembered, or the request still waits (see `waiting_tickets`).
    pub fn remembered(&self, principal: &str, request: &RequestId, digest: [u8; 16]) -> Option<Reply> {
        match self.requests.find(principal, request, digest, self.stamp)? {
            Seen::Answered(reply) => Some(reply),
            Seen::Refused(rejection) => {
                Some(Reply { revision: self.revision, replayed: false, result: Err(rejection) })
            }
            Seen::New | Seen::Waiting(_) => None,
        }
    }
}

/// Judged before proposing, and chores of a leader.
impl Machine {
    /// Sets this member's memory limits.
    pub fn set_memory_limits(&mut self, limits: MemoryLimits) {
        self.memory_limits = limits;
    }

    /// Accounted bytes. Not exactly those of the process: `memory.rs` says what is counted.
    pub fn memory(&self) -> Memory {
        let keys = self.keys.memory();
        let rest = self.sessions.memory()
            + self.locks.memory()
            + self.waits.memory()
            + self.objects.memory()
            + self.requests.memory()
            + self.ring.memory()
            + self.members.memory();
        Memory {
            used: keys.bytes + rest,
            history: keys.history,
            records: keys.bytes - keys.history,
            soft: self.memory_limits.soft,
            hard: self.memory_limits.hard,
        }
    }

    /// Whether a transaction may be proposed now.
    pub fn admit(&self, txn: &Txn) -> Result<(), Overload> {
        let depth = txn.depth();
        if depth > MAX_DEPTH {
            return Err(Overload {
                what: "levels of nested transactions",
                used: depth as u64,
                limit: MAX_DEPTH as u64,
            });
        }
        let limit = self.memory_limits.hard;
        let growth = self.ops_growth(txn.namespace, &txn.then).max(self.ops_growth(txn.namespace, &txn.otherwise));
        if limit == 0 || growth == 0 {
            return Ok(());
        }
        let used = self.memory().used;
        if used + growth > limit {
            return Err(Overload { what: "bytes of memory", used, limit });
        }
        Ok(())
    }

    /// The earliest moment of log time at which a wait ends without a lock, so that someone must propose an entry then.
    pub fn next_deadline(&self) -> Option<LogTime> {
        let (waits, objects) = (self.waits.next_deadline(), self.objects.next_deadline());
        waits.into_iter().chain(objects).chain(self.locks.next_deadline()).min()
    }

    /// What a leader should propose to compact to now: everything older than `keep_ms` and below the newest `keep_revisions`; and, where
    /// history takes more than its share of the memory limit, the oldest part of it regardless.
    pub fn autocompact(&self, keep_ms: u64, keep_revisions: u64, history_share_percent: u64) -> Option<Revision> {
        let old = self.compactable_by_age(keep_ms, keep_revisions);
        let much = self.compactable_by_share(history_share_percent);
        old.max(much).filter(|to| *to > self.compacted())
    }

    fn compactable_by_age(&self, keep_ms: u64, keep_revisions: u64) -> Option<Revision> {
        let stamp = LogTime(self.stamp.0.checked_sub(keep_ms)?);
        let revision = Revision(self.revision.0.checked_sub(keep_revisions)?);
        self.marks.find(stamp, revision)
    }

    /// As if history were spread evenly over the revisions; the leader asks again.
    fn compactable_by_share(&self, percent: u64) -> Option<Revision> {
        let Memory { history, soft, hard, .. } = self.memory();
        let limit = if soft == 0 { hard } else { soft };
        let allowed = u128::from(limit) * u128::from(percent) / 100;
        let excess = u128::from(history).checked_sub(allowed).filter(|_| limit > 0)?;
        let kept = u128::from(self.revision.0 - self.compacted().0);
        let step = kept * excess / u128::from(history.max(1));
        if step == 0 { None } else { Some(Revision(self.compacted().0 + step as u64)) }
    }

    /// What a leader should propose so that all members compare their states: its own checksum here. Some only from time to time, while
    /// there are changes, and from the behaviour version on that has it. It stays due until it has been applied.
    pub fn checksum_due(&self) -> Option<Op> {
        let due = self.behaviour >= CHECKSUMS && self.sums.due(self.position.index, self.stamp);
        due.then(|| Op::Checksum { at: self.position.index, sum: self.sums.now() })
    }

    /// One slice of giving back what compaction made unreadable, of about `budget` changes; true while there is more.
    pub fn maintain(&mut self, budget: usize) -> bool {
        self.keys.maintain(budget)
    }

    /// An upper bound of the bytes that operations add; what takes away counts as nothing, even though it leaves tombstones.
    fn ops_growth(&self, namespace: NamespaceId, ops: &[Op]) -> u64 {
        /// Beside keys, values and names.
        const THING: u64 = 512;
        let growth = ops.iter().map(|op| match op {
            Op::Put(p) => THING + (2 * p.key.as_bytes().len() + p.value.len()) as u64,
            Op::SessionCreate(create) => create.growth(),
            Op::LockAcquire(a) => {
                let session = a.create.as_ref().map_or(0, SessionCreate::growth);
                2 * THING + 2 * (a.name.len() + a.owner.len()) as u64 + session
            }
            Op::Native(op) => op.growth() + self.scheduled_growth(namespace, op),
            Op::Txn(sub) => self.ops_growth(namespace, &sub.then).max(self.ops_growth(namespace, &sub.otherwise)),
            _ => 0,
        });
        growth.sum()
    }
}
