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
use crate::objects::ObjectKey;
use crate::record::{Meta, Record};
use crate::reply::Holder;
use crate::snapmap::SnapMap;
use crate::types::*;
use crate::waits::Waits;
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

/// A held lock with its slots in the table and the index by holder, beside names.
const LOCK_BYTES: usize = 224;
/// The format version of a stored lock.
const LOCK_FORMAT: u8 = 1;

pub(crate) struct Locks {
    pub(crate) held: SnapMap<LockKey, Lock>,
    // What follows from it.
    by_holder: BTreeSet<(SessionId, LockKey)>,
    counts: BTreeMap<SessionId, u64>,
    bytes: u64,
}

impl Locks {
    pub(crate) fn new() -> Self {
        Self { held: SnapMap::new(), by_holder: BTreeSet::new(), counts: BTreeMap::new(), bytes: 0 }
    }

    pub(crate) fn get(&self, key: &LockKey) -> Option<&Lock> {
        self.held.get(key)
    }

    /// Puts, replaces or removes the hold of a lock; what was there comes back, and putting it back undoes.
    pub(crate) fn set_lock(&mut self, key: &LockKey, lock: Option<Lock>) -> Option<Lock> {
        if let Some(lock) = &lock {
            self.bytes += lock_bytes(key, lock);
            self.by_holder.insert((lock.holder.session, key.clone()));
            *self.counts.entry(lock.holder.session).or_default() += 1;
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
            if let Some(count) = self.counts.get_mut(&old.holder.session) {
                *count -= 1;
                if *count == 0 {
                    self.counts.remove(&old.holder.session);
                }
            }
        }
        old
    }

    pub(crate) fn locks_of(&self, session: SessionId) -> Vec<LockKey> {
        // An empty key is before every other.
        let from = (session, LockKey(Arc::from(&b""[..])));
        self.by_holder.range(from..).take_while(|(holder, _)| *holder == session).map(|(_, key)| key.clone()).collect()
    }

    pub(crate) fn lock_count(&self, session: SessionId) -> u64 {
        self.counts.get(&session).copied().unwrap_or(0)
    }

    pub(crate) fn info(&self, key: &LockKey, waits: &Waits) -> Option<LockInfo> {
        let lock = self.get(key)?;
        let queue = key.object();
        let waiters = waits.queue(&queue).map(|(_, w)| WaiterInfo {
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
