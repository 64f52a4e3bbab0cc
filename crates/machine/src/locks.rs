//! Locks: one owner per name, held under a session and numbered by a fencing token.
//!
//! Promises. L1: a name has at most one owner at any log position. L2: waiters are served in the order of their entries, and
//! only while their session lives and their deadline has not passed. L3: a later grant of a name has a larger token, across
//! restarts and snapshots: it is the revision of the commit that granted it, and one commit grants a name once. L4: a lock
//! that is freed while someone waits is granted in that same commit; nobody sees it free.
//! Not promised. An owner may still believe it owns after its session ended; only the token check at the resource closes that gap.
//! Relies on. A session ends only by a log entry. Log time never goes back.
//!
//! A lock exists here only while it is held: a free one without waiters needs no record, because the next token is a revision
//! and so is larger than any before, remembered or not. The price is that a refusal over a free lock cannot name its newest token.
//!
//! Left out at behaviour version 1: shared holders and permits, priorities, reentry, lock delay, deadlock cycles over several locks.

use crate::codec::{self, DecodeError, Reader, Write};
use crate::command::{RequestId, Ticket};
use crate::record::{Meta, Record};
use crate::reply::Holder;
use crate::snapmap::SnapMap;
use crate::types::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

/// Bytes of a lock's name and of an owner.
pub(crate) const NAME_BYTES_MAX: usize = 4 << 10;

/// What a door can tell about a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockInfo {
    pub name: Box<[u8]>,
    pub holder: Option<Holder>,
    /// The newest token of the name: the holder's.
    pub newest: Revision,
    /// In the order in which they will be served.
    pub waiters: Vec<WaiterInfo>,
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
        let mut name = Vec::with_capacity(1 + self.name().len());
        name.push(b'l');
        name.extend_from_slice(self.name());
        Key::new(Space::Native, self.namespace(), &name)
    }
}

/// A held lock.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Lock {
    pub(crate) holder: Holder,
    /// The place of the grant among the changes of its revision.
    pub(crate) index: u32,
}

impl Lock {
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
        let mut value = vec![LOCK_FORMAT];
        codec::write_holder(&mut value, &self.holder);
        Record::new(key.native_key().as_bytes(), meta, b"", &value)
    }
}

/// The order of arrival at all locks together; never used twice.
pub(crate) type WaiterNumber = u64;

/// An acquire that was not refused and not granted yet.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Waiter {
    pub(crate) lock: LockKey,
    pub(crate) session: SessionId,
    pub(crate) owner: Box<[u8]>,
    pub(crate) since: LogTime,
    pub(crate) deadline: Option<LogTime>,
    /// Who hears of it: the newest caller that asked with this request id.
    pub(crate) ticket: Ticket,
    pub(crate) principal: Box<str>,
    pub(crate) request: Option<RequestId>,
    /// Which list of the transaction the acquire stood in.
    pub(crate) succeeded: bool,
}

impl Waiter {
    fn owner_key(&self) -> OwnerKey {
        OwnerKey::new(&self.owner, self.session)
    }

    fn bytes(&self) -> u64 {
        (WAITER_BYTES + self.lock.as_bytes().len() + 2 * self.owner.len() + self.principal.len()) as u64
    }
}

/// Who waits, for the detection of self-deadlock: a named owner, or else the session.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum OwnerKey {
    Named(Box<[u8]>),
    Session(SessionId),
}

impl OwnerKey {
    pub(crate) fn new(owner: &[u8], session: SessionId) -> Self {
        if owner.is_empty() { Self::Session(session) } else { Self::Named(owner.into()) }
    }
}

/// A held lock with its slots in the table and the index by holder, beside names.
const LOCK_BYTES: usize = 224;
/// A waiter with its slots in the table and the four indexes, beside names.
const WAITER_BYTES: usize = 480;
/// The format versions of a stored lock and waiter.
const LOCK_FORMAT: u8 = 1;
const WAITER_FORMAT: u8 = 1;

#[derive(Default)]
struct Queue {
    order: BTreeSet<WaiterNumber>,
    owners: BTreeSet<OwnerKey>,
}

#[derive(Clone, Copy, Default)]
struct Load {
    locks: u64,
    waits: u64,
}

pub(crate) struct Locks {
    pub(crate) held: SnapMap<LockKey, Lock>,
    pub(crate) waiters: SnapMap<WaiterNumber, Waiter>,
    pub(crate) next_waiter: WaiterNumber,
    // What follows from those two.
    by_holder: BTreeSet<(SessionId, LockKey)>,
    by_waiter: BTreeSet<(SessionId, WaiterNumber)>,
    queues: BTreeMap<LockKey, Queue>,
    deadlines: BTreeSet<(LogTime, WaiterNumber)>,
    loads: BTreeMap<SessionId, Load>,
    bytes: u64,
}

impl Locks {
    pub(crate) fn new() -> Self {
        Self {
            held: SnapMap::new(),
            waiters: SnapMap::new(),
            next_waiter: 1,
            by_holder: BTreeSet::new(),
            by_waiter: BTreeSet::new(),
            queues: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            loads: BTreeMap::new(),
            bytes: 0,
        }
    }

    pub(crate) fn get(&self, key: &LockKey) -> Option<&Lock> {
        self.held.get(key)
    }

    pub(crate) fn waiter(&self, number: WaiterNumber) -> Option<&Waiter> {
        self.waiters.get(&number)
    }

    /// Puts, replaces or removes the hold of a lock; what was there comes back, and putting it back undoes.
    pub(crate) fn set_lock(&mut self, key: &LockKey, lock: Option<Lock>) -> Option<Lock> {
        if let Some(lock) = &lock {
            self.bytes += lock_bytes(key, lock);
            self.by_holder.insert((lock.holder.session, key.clone()));
            self.loads.entry(lock.holder.session).or_default().locks += 1;
        }
        let new_holder = lock.as_ref().map(|l| l.holder.session);
        let old = match lock {
            Some(lock) => self.held.insert(key.clone(), lock),
            None => self.held.remove(key),
        };
        if let Some(old) = &old {
            self.bytes -= lock_bytes(key, old);
            if new_holder != Some(old.holder.session) {
                self.by_holder.remove(&(old.holder.session, key.clone()));
            }
            self.lower(old.holder.session, |load| load.locks -= 1);
        }
        old
    }

    /// Puts, replaces or removes a waiter; what was there comes back, and putting it back undoes.
    pub(crate) fn set_waiter(&mut self, number: WaiterNumber, waiter: Option<Waiter>) -> Option<Waiter> {
        let old = self.waiters.remove(&number);
        if let Some(old) = &old {
            self.bytes -= old.bytes();
            self.by_waiter.remove(&(old.session, number));
            if let Some(deadline) = old.deadline {
                self.deadlines.remove(&(deadline, number));
            }
            if let Some(queue) = self.queues.get_mut(&old.lock) {
                queue.order.remove(&number);
                queue.owners.remove(&old.owner_key());
                if queue.order.is_empty() {
                    self.queues.remove(&old.lock);
                }
            }
            self.lower(old.session, |load| load.waits -= 1);
        }
        if let Some(new) = waiter {
            self.bytes += new.bytes();
            self.by_waiter.insert((new.session, number));
            if let Some(deadline) = new.deadline {
                self.deadlines.insert((deadline, number));
            }
            let queue = self.queues.entry(new.lock.clone()).or_default();
            queue.order.insert(number);
            queue.owners.insert(new.owner_key());
            self.loads.entry(new.session).or_default().waits += 1;
            self.waiters.insert(number, new);
        }
        old
    }

    fn lower(&mut self, session: SessionId, by: impl FnOnce(&mut Load)) {
        if let Some(load) = self.loads.get_mut(&session) {
            by(load);
            if load.locks == 0 && load.waits == 0 {
                self.loads.remove(&session);
            }
        }
    }

    /// How many wait for a lock.
    pub(crate) fn queue_len(&self, key: &LockKey) -> u64 {
        self.queues.get(key).map_or(0, |q| q.order.len() as u64)
    }

    /// Who is next.
    pub(crate) fn head(&self, key: &LockKey) -> Option<WaiterNumber> {
        self.queues.get(key)?.order.first().copied()
    }

    pub(crate) fn queue(&self, key: &LockKey) -> impl Iterator<Item = (WaiterNumber, &Waiter)> {
        let order = self.queues.get(key).into_iter().flat_map(|q| q.order.iter());
        order.filter_map(|number| Some((*number, self.waiters.get(number)?)))
    }

    /// Whether this owner has a place in the queue.
    pub(crate) fn is_waiting(&self, key: &LockKey, owner: &OwnerKey) -> bool {
        self.queues.get(key).is_some_and(|q| q.owners.contains(owner))
    }

    pub(crate) fn waits_of(&self, session: SessionId) -> Vec<WaiterNumber> {
        self.by_waiter.range((session, 0)..=(session, WaiterNumber::MAX)).map(|(_, number)| *number).collect()
    }

    pub(crate) fn locks_of(&self, session: SessionId) -> Vec<LockKey> {
        // An empty key is before every other.
        let from = (session, LockKey(Arc::from(&b""[..])));
        self.by_holder.range(from..).take_while(|(holder, _)| *holder == session).map(|(_, key)| key.clone()).collect()
    }

    pub(crate) fn lock_count(&self, session: SessionId) -> u64 {
        self.loads.get(&session).map_or(0, |load| load.locks)
    }

    /// Locks held and waits, as a session's limit counts them.
    pub(crate) fn things(&self, session: SessionId) -> u64 {
        self.loads.get(&session).map_or(0, |load| load.locks + load.waits)
    }

    pub(crate) fn next_deadline(&self) -> Option<LogTime> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// The first waiter whose time is over.
    pub(crate) fn due(&self, now: LogTime) -> Option<WaiterNumber> {
        self.deadlines.first().filter(|(deadline, _)| *deadline <= now).map(|(_, number)| *number)
    }

    pub(crate) fn info(&self, key: &LockKey) -> Option<LockInfo> {
        let lock = self.get(key)?;
        let waiters = self.queue(key).map(|(_, w)| WaiterInfo {
            session: w.session,
            owner: w.owner.clone(),
            since: w.since,
            deadline: w.deadline,
        });
        Some(LockInfo {
            name: key.name().into(),
            holder: Some(lock.holder.clone()),
            newest: lock.holder.token,
            waiters: waiters.collect(),
        })
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
        self.bytes
    }
}

fn lock_bytes(key: &LockKey, lock: &Lock) -> u64 {
    (LOCK_BYTES + key.as_bytes().len() + lock.holder.owner.len()) as u64
}

/// Appends one held lock as snapshots store it.
pub(crate) fn write_lock(b: &mut Vec<u8>, key: &LockKey, lock: &Lock) {
    b.push(LOCK_FORMAT);
    b.bytes(key.as_bytes());
    codec::write_holder(b, &lock.holder);
    b.varint(u64::from(lock.index));
}

pub(crate) fn read_lock(r: &mut Reader<'_>) -> Result<(LockKey, Lock), DecodeError> {
    const WHAT: &str = "a lock";
    let format = r.byte(WHAT)?;
    if format != LOCK_FORMAT {
        return Err(DecodeError::UnknownFormat { what: WHAT, format });
    }
    let key = LockKey::from_bytes(r.bytes(WHAT)?)?;
    let holder = codec::read_holder(r)?;
    Ok((key, Lock { holder, index: r.u32(WHAT)? }))
}

/// Appends one waiter as snapshots store it.
pub(crate) fn write_waiter(b: &mut Vec<u8>, number: WaiterNumber, waiter: &Waiter) {
    b.push(WAITER_FORMAT);
    b.varint(number);
    b.bytes(waiter.lock.as_bytes());
    b.varint(waiter.session.0);
    b.bytes(&waiter.owner);
    b.varint(waiter.since.0);
    b.option(waiter.deadline, |b, deadline| b.varint(deadline.0));
    b.varint(waiter.ticket.member.0);
    b.extend_from_slice(&waiter.ticket.boot.to_le_bytes());
    b.varint(waiter.ticket.number);
    b.bytes(waiter.principal.as_bytes());
    codec::write_request(b, waiter.request.as_ref());
    b.flag(waiter.succeeded);
}

pub(crate) fn read_waiter(r: &mut Reader<'_>) -> Result<(WaiterNumber, Waiter), DecodeError> {
    const WHAT: &str = "a waiter";
    let format = r.byte(WHAT)?;
    if format != WAITER_FORMAT {
        return Err(DecodeError::UnknownFormat { what: WHAT, format });
    }
    let number = r.varint(WHAT)?;
    let waiter = Waiter {
        lock: LockKey::from_bytes(r.bytes(WHAT)?)?,
        session: SessionId(r.varint(WHAT)?),
        owner: r.boxed(WHAT)?,
        since: LogTime(r.varint(WHAT)?),
        deadline: r.option(WHAT, |r| Ok(LogTime(r.varint(WHAT)?)))?,
        ticket: Ticket { member: MemberId(r.varint(WHAT)?), boot: r.u64_fixed(WHAT)?, number: r.varint(WHAT)? },
        principal: r.text(WHAT)?,
        request: codec::read_request(r)?,
        succeeded: r.flag(WHAT)?,
    };
    Ok((number, waiter))
}
