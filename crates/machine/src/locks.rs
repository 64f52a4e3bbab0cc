//! Locks: who holds which name, held under a session and numbered by a fencing token.
//!
//! Promises. L1: at any log position a name has at most one exclusive holder and then no other, or readers, or holders of permits with no slot
//! twice. L2: waiters are served by rank, then in the order of their entries, and only while their session lives and their deadline has not passed. L3: a later grant of a name has a larger token, across
//! restarts and snapshots: it is the revision of the commit that granted it, and one commit grants a name once. L4: a lock
//! that is freed while someone waits is granted in that same commit; nobody sees it free.
//! Not promised. An owner may still believe it owns after its session ended; only the token check at the resource closes that gap.
//! Relies on. A session ends only by a log entry. Log time never goes back.
//!
//! A lock exists here only while it is held, kept back by a delay, or has permits: a free one without waiters needs no record, because the next
//! token is a revision and so is larger than any before, remembered or not. The price is that a refusal over a free lock cannot name its newest token.
//!
//! Most locks are held by one owner who asked for nothing else; they stay the small [`Lock::Plain`] of behaviour version 1. All others are
//! [`Lock::Wide`], which is changed hold by hold, so that a lock with thousands of readers costs no more per reader than one with two. What is
//! asked of them is in `lock_ops.rs`.

use crate::codec::{self, DecodeError, Reader, Write};
use crate::coded::{Coded, coded_enum, coded_struct};
use crate::objects::ObjectKey;
use crate::record::{Meta, Record};
use crate::reply::Holder;
use crate::snapmap::SnapMap;
use crate::types::*;
use crate::waits::{OwnerKey, Waits};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

/// Bytes of a lock's name and of an owner.
pub(crate) const NAME_BYTES_MAX: usize = 4 << 10;

/// Permits of one lock.
pub const PERMITS_MAX: u32 = 10_000;
/// Holders of one lock that a door is told of.
const HOLDS_TOLD_MAX: usize = 1_000;

coded_struct! {
    /// Some of a number of permits.
    #[derive(Copy, Eq)]
    pub struct Permits as "permits" {
        pub count: u32,
        /// How many the lock has; fixed by the first who asks.
        pub of: u32,
    }
}

coded_enum! {
    /// How a lock is held or asked for.
    #[derive(Copy, Eq)]
    pub enum HoldMode as "a lock mode" {
        /// Alone.
        Exclusive = 1,
        /// Beside other readers.
        Shared = 2,
        /// Beside others, as long as there are permits.
        Permits(Permits) = 3,
    }
}

/// What a door can tell about a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockInfo {
    pub name: Box<[u8]>,
    /// The first holder.
    pub holder: Option<Holder>,
    /// The newest token of the name: that of its newest holder.
    pub newest: Revision,
    /// All holders up to a thousand, oldest first; what a delay keeps back is among them.
    pub holds: Vec<HoldInfo>,
    pub hold_count: u64,
    /// Zero: a lock without permits.
    pub permits: u32,
    pub permits_free: u32,
    /// In the order in which they will be served.
    pub waiters: Vec<WaiterInfo>,
}

/// One holder of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldInfo {
    pub holder: Holder,
    pub mode: HoldMode,
    /// The places of its permits.
    pub slots: Vec<u32>,
    /// How often it must be released.
    pub depth: u32,
    pub delay_ms: u64,
    pub min_hold_ms: u64,
    /// It is over, but nobody else has it before this.
    pub kept_until: Option<LogTime>,
}

/// One place in the queue of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaiterInfo {
    pub session: SessionId,
    /// Empty: the session itself.
    pub owner: Box<[u8]>,
    pub since: LogTime,
    /// `None`: for ever.
    pub deadline: Option<LogTime>,
    pub mode: HoldMode,
    pub priority: i64,
}

/// Namespace (4 bytes, big endian) and name, shared by everything that names the lock.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LockKey(Arc<[u8]>);

impl LockKey {
    const PREFIX: usize = 4;

    pub(crate) fn new(namespace: NamespaceId, name: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(Self::PREFIX + name.len());
        bytes.extend_from_slice(&namespace.0.to_be_bytes());
        bytes.extend_from_slice(name);
        Self(bytes.into())
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() <= Self::PREFIX {
            return Err(DecodeError::Malformed { what: "a lock name" });
        }
        Ok(Self(bytes.into()))
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn name(&self) -> &[u8] {
        &self.0[Self::PREFIX..]
    }

    pub(crate) fn namespace(&self) -> NamespaceId {
        NamespaceId(u32::from_be_bytes([self.0[0], self.0[1], self.0[2], self.0[3]]))
    }

    /// The key under which watchers of the native space see it: `l` and the name.
    pub(crate) fn native_key(&self) -> Key {
        self.object().native_key()
    }

    /// The queue of those who wait for it.
    pub(crate) fn object(&self) -> ObjectKey {
        ObjectKey::new(b'l', self.namespace(), self.name())
    }

    /// The lock of such a queue.
    pub(crate) fn of_object(key: &ObjectKey) -> Option<Self> {
        (key.kind() == b'l').then(|| Self::new(key.namespace(), key.name()))
    }
}

/// A lock that is not simply free.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Lock {
    /// Held exclusively, once, without a delay.
    Plain(Plain),
    Wide(Box<Wide>),
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Plain {
    pub(crate) holder: Holder,
    /// The place of the grant among the changes of its revision.
    pub(crate) index: u32,
}

/// Holders beside one another, permits, delays.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Wide {
    pub(crate) shape: Shape,
    pub(crate) holds: BTreeMap<HoldKey, LockHold>,
    /// Permits that nobody has; follows from the others.
    free: BTreeSet<u32>,
    /// How many somebody has, follows too.
    taken: u64,
}

coded_struct! {
    #[derive(Copy, Default)]
    pub(crate) struct Shape as "a lock" {
        /// How many there are; zero: this is a lock without permits.
        pub(crate) permits: u32,
        /// Nobody holds a permit, and at this time the lock is forgotten.
        pub(crate) forget_at: Option<LogTime>,
    }
}

/// Token, session, and a number that tells apart what one commit granted to one session.
pub(crate) type HoldKey = (Revision, SessionId, u32);

coded_struct! {
    /// One holder of a lock, or what is left of one.
    pub(crate) struct LockHold as "a hold" {
        pub(crate) holder: Holder,
        pub(crate) mode: HoldMode,
        /// The places of its permits, rising.
        pub(crate) slots: Vec<u32>,
        pub(crate) depth: u32,
        /// Nobody else gets it for so long after it was lost.
        pub(crate) delay_ms: u64,
        /// Nobody else gets it for so long after it was granted.
        pub(crate) min_hold_ms: u64,
        /// It is over: it only keeps others away.
        pub(crate) kept: Option<Kept>,
    }
}

coded_struct! {
    #[derive(Copy)]
    pub(crate) struct Kept as "a delay" {
        pub(crate) until: LogTime,
        /// Its owner may have it again at once.
        pub(crate) may_return: bool,
    }
}

impl LockHold {
    pub(crate) fn is_live(&self) -> bool {
        self.kept.is_none()
    }

    pub(crate) fn owner_key(&self) -> OwnerKey {
        OwnerKey::new(&self.holder.owner, self.holder.session)
    }

    /// Until when nobody else gets it, whoever asks.
    pub(crate) fn least_until(&self) -> LogTime {
        self.holder.since.plus(self.min_hold_ms)
    }

    /// When something of it ends by itself, once it is over: first what keeps its owner away, then what keeps all others.
    fn due_at(&self) -> Option<LogTime> {
        let kept = self.kept?;
        Some(if kept.may_return { kept.until } else { kept.until.min(self.least_until()) })
    }

    /// Whether it is over and does not keep this owner away.
    pub(crate) fn yields_to(&self, owner: &OwnerKey) -> bool {
        self.kept.is_some_and(|kept| kept.may_return) && self.owner_key() == *owner
    }

    fn info(&self) -> HoldInfo {
        HoldInfo {
            holder: self.holder.clone(),
            mode: self.mode,
            slots: self.slots.clone(),
            depth: self.depth,
            delay_ms: self.delay_ms,
            min_hold_ms: self.min_hold_ms,
            kept_until: self.kept.map(|kept| kept.until),
        }
    }

    fn bytes(&self) -> u64 {
        (HOLD_BYTES + self.holder.owner.len() + 16 * self.slots.len()) as u64
    }
}

impl Plain {
    /// What watchers of the native space see while it is held so.
    pub(crate) fn record(&self, key: &LockKey) -> Record {
        let meta = Meta {
            tombstone: false,
            mod_revision: self.holder.token,
            index: self.index,
            create_revision: self.holder.token,
            version: 1,
            owner: self.holder.session,
        };
        let mut value = vec![PLAIN_FORMAT];
        codec::write_holder(&mut value, &self.holder);
        Record::new(key.native_key().as_bytes(), meta, b"", &value)
    }
}

impl Wide {
    /// What watchers of the native space see of it from this change on: its one holder as if it were plain, or else permits, how many hold it
    /// (or are kept for a while), and the newest holder.
    pub(crate) fn record(&self, key: &LockKey, at: Revision, index: u32) -> Record {
        let mut meta = Meta { mod_revision: at, index, create_revision: at, version: 1, ..Meta::default() };
        let mut value = Vec::new();
        if let Some(alone) = self.alone() {
            meta.owner = alone.session;
            value.push(PLAIN_FORMAT);
            codec::write_holder(&mut value, alone);
        } else {
            value.push(WIDE_FORMAT);
            value.varint(u64::from(self.shape.permits));
            value.varint(self.holds.len() as u64);
            value.option(self.live().next_back(), |b, hold| codec::write_holder(b, &hold.holder));
        }
        Record::new(key.native_key().as_bytes(), meta, b"", &value)
    }

    /// Its exclusive holder.
    fn alone(&self) -> Option<&Holder> {
        let hold = self.live().next().filter(|hold| hold.mode == HoldMode::Exclusive);
        hold.map(|hold| &hold.holder)
    }

    pub(crate) fn live(&self) -> impl DoubleEndedIterator<Item = &LockHold> {
        self.holds.values().filter(|hold| hold.is_live())
    }

    /// Places that nobody has. While there are fewer permits than are held, some are free here and none can be granted.
    pub(crate) fn free(&self) -> &BTreeSet<u32> {
        &self.free
    }

    /// How many permits can be granted.
    pub(crate) fn left(&self) -> u64 {
        u64::from(self.shape.permits).saturating_sub(self.taken)
    }

    fn find_free(&mut self) {
        let taken: BTreeSet<u32> = self.holds.values().flat_map(|hold| hold.slots.iter().copied()).collect();
        self.taken = taken.len() as u64;
        self.free = (0..self.shape.permits).filter(|slot| !taken.contains(slot)).collect();
    }
}

impl Lock {
    /// The first of those who hold it.
    pub(crate) fn holder(&self) -> Option<&Holder> {
        match self {
            Self::Plain(plain) => Some(&plain.holder),
            Self::Wide(wide) => wide.live().next().map(|hold| &hold.holder),
        }
    }

    pub(crate) fn newest(&self) -> Revision {
        match self {
            Self::Plain(plain) => plain.holder.token,
            Self::Wide(wide) => wide.holds.last_key_value().map_or(Revision(0), |((token, ..), _)| *token),
        }
    }

    /// Whether somebody holds it under this token.
    pub(crate) fn is_held_under(&self, token: Revision) -> bool {
        match self {
            Self::Plain(plain) => plain.holder.token == token,
            Self::Wide(wide) => {
                let from = (token, SessionId(0), 0);
                wide.holds.range(from..).take_while(|((t, ..), _)| *t == token).any(|(_, hold)| hold.is_live())
            }
        }
    }

    /// The grant of this token to this session; with an owner only that one's.
    pub(crate) fn find(&self, token: Revision, session: SessionId, owner: Option<&[u8]>) -> Option<Found> {
        let is_owner = |holder: &Holder| owner.is_none_or(|owner| *holder.owner == *owner);
        match self {
            Self::Plain(plain) => {
                let holder = &plain.holder;
                let same = holder.token == token && holder.session == session && is_owner(holder);
                same.then_some(Found::Plain)
            }
            Self::Wide(wide) => {
                let all = wide.holds.range((token, session, 0)..=(token, session, u32::MAX));
                let mut live = all.filter(|(_, hold)| hold.is_live() && is_owner(&hold.holder));
                live.next().map(|(at, _)| Found::Wide(*at))
            }
        }
    }

    /// Those who hold it.
    pub(crate) fn holders(&self) -> Box<dyn Iterator<Item = &Holder> + '_> {
        match self {
            Self::Plain(plain) => Box::new(std::iter::once(&plain.holder)),
            Self::Wide(wide) => Box::new(wide.live().map(|hold| &hold.holder)),
        }
    }

    fn bytes(&self, key: &LockKey) -> u64 {
        let fixed = (LOCK_BYTES + key.as_bytes().len()) as u64;
        match self {
            Self::Plain(plain) => fixed + plain.holder.owner.len() as u64,
            Self::Wide(wide) => {
                fixed
                    + SLOT_BYTES * u64::from(wide.shape.permits)
                    + wide.holds.values().map(LockHold::bytes).sum::<u64>()
            }
        }
    }
}

/// Where a grant is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Plain,
    Wide(HoldKey),
}

/// A held lock with its slots in the table and the indexes, beside names.
const LOCK_BYTES: usize = 288;
/// A holder among several, with its places in the indexes.
const HOLD_BYTES: usize = 320;
/// One permit in the set of free ones, or in a hold.
const SLOT_BYTES: u64 = 12;
/// The format versions of a stored lock.
const PLAIN_FORMAT: u8 = 1;
const WIDE_FORMAT: u8 = 2;

pub(crate) struct Locks {
    pub(crate) held: SnapMap<LockKey, Lock>,
    index: Index,
}

/// What follows from the table.
#[derive(Default)]
struct Index {
    /// How many holds a session has of a lock.
    by_holder: BTreeMap<(SessionId, LockKey), u32>,
    counts: BTreeMap<SessionId, u64>,
    /// How many holds an owner has, by a digest of it: only to know who cannot be part of a deadlock.
    owners: BTreeMap<u64, u32>,
    /// When something ends by itself.
    deadlines: BTreeSet<(LogTime, LockKey, HoldKey)>,
    bytes: u64,
}

/// The end of a whole lock, among those of its holds.
const WHOLE: HoldKey = (Revision(0), SessionId(0), 0);

fn owner_digest(key: &LockKey, owner: &[u8], session: SessionId) -> u64 {
    if owner.is_empty() { codec::mix(1, session.0) } else { codec::fold(u64::from(key.namespace().0), owner) }
}

fn take_one<K: Ord, N: Copy + PartialEq + From<u8> + std::ops::SubAssign>(counts: &mut BTreeMap<K, N>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= N::from(1);
        if *count == N::from(0) {
            counts.remove(key);
        }
    }
}

impl Index {
    fn note(&mut self, key: &LockKey, holder: &Holder) {
        *self.by_holder.entry((holder.session, key.clone())).or_default() += 1;
        *self.counts.entry(holder.session).or_default() += 1;
        *self.owners.entry(owner_digest(key, &holder.owner, holder.session)).or_default() += 1;
    }

    fn forget(&mut self, key: &LockKey, holder: &Holder) {
        take_one(&mut self.by_holder, &(holder.session, key.clone()));
        take_one(&mut self.counts, &holder.session);
        take_one(&mut self.owners, &owner_digest(key, &holder.owner, holder.session));
    }

    fn note_hold(&mut self, key: &LockKey, at: HoldKey, hold: &LockHold) {
        match hold.due_at() {
            None => self.note(key, &hold.holder),
            Some(time) => drop(self.deadlines.insert((time, key.clone(), at))),
        }
    }

    fn forget_hold(&mut self, key: &LockKey, at: HoldKey, hold: &LockHold) {
        match hold.due_at() {
            None => self.forget(key, &hold.holder),
            Some(time) => drop(self.deadlines.remove(&(time, key.clone(), at))),
        }
    }

    fn note_lock(&mut self, key: &LockKey, lock: &Lock) {
        self.bytes += lock.bytes(key);
        match lock {
            Lock::Plain(plain) => self.note(key, &plain.holder),
            Lock::Wide(wide) => {
                wide.holds.iter().for_each(|(at, hold)| self.note_hold(key, *at, hold));
                if let Some(time) = wide.shape.forget_at {
                    self.deadlines.insert((time, key.clone(), WHOLE));
                }
            }
        }
    }

    fn forget_lock(&mut self, key: &LockKey, lock: &Lock) {
        self.bytes -= lock.bytes(key);
        match lock {
            Lock::Plain(plain) => self.forget(key, &plain.holder),
            Lock::Wide(wide) => {
                wide.holds.iter().for_each(|(at, hold)| self.forget_hold(key, *at, hold));
                if let Some(time) = wide.shape.forget_at {
                    self.deadlines.remove(&(time, key.clone(), WHOLE));
                }
            }
        }
    }
}

impl Locks {
    pub(crate) fn new() -> Self {
        Self { held: SnapMap::new(), index: Index::default() }
    }

    pub(crate) fn get(&self, key: &LockKey) -> Option<&Lock> {
        self.held.get(key)
    }

    pub(crate) fn wide(&self, key: &LockKey) -> Option<&Wide> {
        match self.held.get(key)? {
            Lock::Wide(wide) => Some(wide),
            Lock::Plain(_) => None,
        }
    }

    /// Puts, replaces or removes a lock; what was there comes back, and putting it back undoes.
    pub(crate) fn set_lock(&mut self, key: &LockKey, lock: Option<Lock>) -> Option<Lock> {
        if let Some(lock) = &lock {
            self.index.note_lock(key, lock);
        }
        let old = match lock {
            Some(lock) => self.held.insert(key.clone(), lock),
            None => self.held.remove(key),
        };
        if let Some(old) = &old {
            self.index.forget_lock(key, old);
        }
        old
    }

    /// Changes what a wide lock is; `None`: it is not there (and nobody holds it). What it was comes back.
    pub(crate) fn set_shape(&mut self, key: &LockKey, shape: Option<Shape>) -> Option<Shape> {
        let Some(shape) = shape else {
            return match self.set_lock(key, None)? {
                Lock::Wide(wide) => Some(wide.shape),
                Lock::Plain(_) => None,
            };
        };
        let Some(Lock::Wide(wide)) = self.held.get_mut(key) else {
            let mut wide = Wide { shape, ..Wide::default() };
            wide.find_free();
            self.set_lock(key, Some(Lock::Wide(Box::new(wide))));
            return None;
        };
        let old = std::mem::replace(&mut wide.shape, shape);
        if old.permits != shape.permits {
            wide.find_free();
        }
        let index = &mut self.index;
        index.bytes = index.bytes + SLOT_BYTES * u64::from(shape.permits) - SLOT_BYTES * u64::from(old.permits);
        if let Some(time) = old.forget_at {
            index.deadlines.remove(&(time, key.clone(), WHOLE));
        }
        if let Some(time) = shape.forget_at {
            index.deadlines.insert((time, key.clone(), WHOLE));
        }
        Some(old)
    }

    /// Puts, replaces or removes one hold of a wide lock; what was there comes back, and putting it back undoes.
    pub(crate) fn set_hold(&mut self, key: &LockKey, at: HoldKey, hold: Option<LockHold>) -> Option<LockHold> {
        let Some(Lock::Wide(wide)) = self.held.get_mut(key) else { return None };
        let index = &mut self.index;
        if let Some(new) = &hold {
            index.bytes += new.bytes();
            index.note_hold(key, at, new);
        }
        let taken = hold.as_ref().map(|new| new.slots.clone()).unwrap_or_default();
        let old = match hold {
            Some(new) => wide.holds.insert(at, new),
            None => wide.holds.remove(&at),
        };
        if let Some(old) = &old {
            index.bytes -= old.bytes();
            index.forget_hold(key, at, old);
            let permits = wide.shape.permits;
            wide.taken -= old.slots.len() as u64;
            wide.free.extend(old.slots.iter().copied().filter(|slot| *slot < permits));
        }
        wide.taken += taken.len() as u64;
        for slot in taken {
            wide.free.remove(&slot);
        }
        old
    }

    pub(crate) fn locks_of(&self, session: SessionId) -> Vec<LockKey> {
        // An empty key is before every other.
        let from = (session, LockKey(Arc::from(&b""[..])));
        let all = self.index.by_holder.range(from..).take_while(|((holder, _), _)| *holder == session);
        all.map(|((_, key), _)| key.clone()).collect()
    }

    pub(crate) fn lock_count(&self, session: SessionId) -> u64 {
        self.index.counts.get(&session).copied().unwrap_or(0)
    }

    /// Whether an owner may hold something: never wrong when it says no.
    pub(crate) fn may_hold(&self, key: &LockKey, owner: &[u8], session: SessionId) -> bool {
        self.index.owners.contains_key(&owner_digest(key, owner, session))
    }

    pub(crate) fn next_deadline(&self) -> Option<LogTime> {
        self.index.deadlines.first().map(|(time, ..)| *time)
    }

    /// The first lock of which something ends by itself.
    pub(crate) fn first_due(&self, now: LogTime) -> Option<LockKey> {
        self.index.deadlines.first().filter(|(time, ..)| *time <= now).map(|(_, key, _)| key.clone())
    }

    pub(crate) fn info(&self, key: &LockKey, waits: &Waits) -> Option<LockInfo> {
        let lock = self.get(key);
        let queue = key.object();
        if lock.is_none() && waits.len(&queue) == 0 {
            return None;
        }
        let waiters = waits.queue(&queue).map(|(_, w)| WaiterInfo {
            session: w.session,
            owner: w.owner.clone(),
            since: w.since,
            deadline: w.deadline,
            mode: crate::lock_ops::asked_of(w, &queue).unwrap_or(HoldMode::Exclusive),
            priority: w.rank.saturating_neg(),
        });
        let mut info = LockInfo {
            name: key.name().into(),
            holder: lock.and_then(Lock::holder).cloned(),
            newest: lock.map_or(Revision(0), Lock::newest),
            holds: Vec::new(),
            hold_count: 0,
            permits: 0,
            permits_free: 0,
            waiters: waiters.collect(),
        };
        match lock {
            None => {}
            Some(Lock::Plain(plain)) => {
                info.hold_count = 1;
                info.holds.push(HoldInfo {
                    holder: plain.holder.clone(),
                    mode: HoldMode::Exclusive,
                    slots: Vec::new(),
                    depth: 1,
                    delay_ms: 0,
                    min_hold_ms: 0,
                    kept_until: None,
                });
            }
            Some(Lock::Wide(wide)) => {
                info.hold_count = wide.live().count() as u64;
                info.holds = wide.holds.values().take(HOLDS_TOLD_MAX).map(LockHold::info).collect();
                info.permits = wide.shape.permits;
                info.permits_free = u32::try_from(wide.left()).unwrap_or(u32::MAX);
            }
        }
        Some(info)
    }

    /// Held locks of a namespace whose names begin with `prefix`, after the name `after`, in the order of names.
    pub(crate) fn list<'a>(
        &'a self,
        ns: NamespaceId,
        prefix: &'a [u8],
        after: Option<&[u8]>,
    ) -> impl Iterator<Item = &'a LockKey> {
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(LockKey::new(ns, after)),
            _ => Bound::Included(LockKey::new(ns, prefix)),
        };
        let keys = self.held.range((from, Bound::Unbounded)).map(|(key, _)| key);
        keys.take_while(move |key| key.namespace() == ns && key.name().starts_with(prefix))
    }

    pub(crate) fn memory(&self) -> u64 {
        self.index.bytes
    }
}

/// Appends one lock as snapshots store it.
pub(crate) fn write_lock(b: &mut Vec<u8>, key: &LockKey, lock: &Lock) {
    match lock {
        Lock::Plain(plain) => {
            b.push(PLAIN_FORMAT);
            b.bytes(key.as_bytes());
            codec::write_holder(b, &plain.holder);
            b.varint(u64::from(plain.index));
        }
        Lock::Wide(wide) => {
            b.push(WIDE_FORMAT);
            b.bytes(key.as_bytes());
            wide.shape.write(b);
            b.varint(wide.holds.len() as u64);
            for ((_, _, nth), hold) in &wide.holds {
                b.varint(u64::from(*nth));
                hold.write(b);
            }
        }
    }
}

pub(crate) fn read_lock(r: &mut Reader<'_>) -> Result<(LockKey, Lock), DecodeError> {
    const WHAT: &str = "a lock";
    let format = r.byte(WHAT)?;
    if !matches!(format, PLAIN_FORMAT | WIDE_FORMAT) {
        return Err(DecodeError::UnknownFormat { what: WHAT, format });
    }
    let key = LockKey::from_bytes(r.bytes(WHAT)?)?;
    if format == PLAIN_FORMAT {
        let holder = codec::read_holder(r)?;
        return Ok((key, Lock::Plain(Plain { holder, index: r.u32(WHAT)? })));
    }
    let shape = Shape::read(r, WHAT)?;
    if shape.permits > PERMITS_MAX {
        return Err(DecodeError::Malformed { what: WHAT });
    }
    let mut wide = Wide { shape, ..Wide::default() };
    for _ in 0..r.varint(WHAT)? {
        let nth = r.u32(WHAT)?;
        let hold = LockHold::read(r, WHAT)?;
        wide.holds.insert((hold.holder.token, hold.holder.session, nth), hold);
    }
    wide.find_free();
    Ok((key, Lock::Wide(Box::new(wide))))
}
