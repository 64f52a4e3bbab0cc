//! Sessions: the general form of an etcd lease. What one owns goes, or loses its owner, when it ends.
//!
//! Promises. S1: (id, token) names one incarnation; an id is refused while it is live. S2: a session ends only by a log entry,
//! and everything attached to it goes in that one commit, however much it is. S3: an expiry has no effect unless that
//! incarnation is live and the leader that proposed it still led when the entry was appended (its term is the entry's).
//! Not promised. When a session ends: deadlines are the leader's, moved by renewals that are never logged.
//! Relies on. `apply.rs` tells every change of a key's owner (`attach`, `detach`) and undoes in reverse order what a refused
//! transaction did.

use crate::codec::{self, DecodeError, Reader, Write};
use crate::command::{OnExpire, SessionCreate, SessionFace};
use crate::locks::LockKey;
use crate::record::{Meta, Record};
use crate::snapmap::SnapMap;
use crate::types::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

/// Bytes of the name, and of the metadata in all: sessions are held in memory and told to everyone who asks.
pub(crate) const NAME_BYTES_MAX: usize = 1 << 10;
pub(crate) const METADATA_BYTES_MAX: usize = 16 << 10;
/// Releases that a session may repeat and be told again that they were done.
const RELEASED_KEPT: usize = 8;

/// What a door can tell about a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionInfo {
    pub id: SessionId,
    pub token: SessionToken,
    pub face: SessionFace,
    pub ttl_ms: u64,
    pub on_expire: OnExpire,
    pub name: Box<str>,
    pub metadata: Vec<(Box<str>, Box<str>)>,
    pub created: LogTime,
    /// What was left of its time at the last checkpoint; `None`: a new leader gives it the whole.
    pub remaining_ms: Option<u64>,
    /// Attached keys.
    pub keys: u64,
    /// Held locks.
    pub locks: u64,
}

/// One live session. Cloning is cheap: what never changes is shared.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Session {
    pub(crate) facts: Arc<SessionFacts>,
    pub(crate) remaining_ms: Option<u64>,
    /// The newest releases, oldest first, so that a repeated one is answered as the first was.
    pub(crate) released: Vec<(LockKey, Revision)>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct SessionFacts {
    pub(crate) create: SessionCreate,
    pub(crate) token: SessionToken,
    /// The place of its creation among the changes of that revision.
    pub(crate) index: u32,
    pub(crate) created: LogTime,
}

impl Session {
    pub(crate) fn is_native(&self) -> bool {
        self.facts.create.face == SessionFace::Native
    }

    pub(crate) fn has_released(&self, lock: &LockKey, token: Revision) -> bool {
        self.released.iter().any(|(l, t)| l == lock && *t == token)
    }

    pub(crate) fn remember_release(&mut self, lock: LockKey, token: Revision) {
        if self.released.len() == RELEASED_KEPT {
            self.released.remove(0);
        }
        self.released.push((lock, token));
    }

    /// What watchers of the native space see while it lives.
    pub(crate) fn record(&self) -> Record {
        let create = &self.facts.create;
        let revision = Revision(self.facts.token);
        let meta = Meta {
            tombstone: false,
            mod_revision: revision,
            index: self.facts.index,
            create_revision: revision,
            version: 1,
            owner: create.id,
        };
        let mut value = vec![SESSION_FORMAT];
        codec::write_session_create(&mut value, &without_secret(create));
        Record::new(native_key(create.id).as_bytes(), meta, b"", &value)
    }

    fn bytes(&self) -> u64 {
        let create = &self.facts.create;
        let metadata: usize = create.metadata.iter().map(|(k, v)| k.len() + v.len() + 64).sum();
        let released: usize = self.released.iter().map(|(lock, _)| lock.as_bytes().len() + 48).sum();
        (SESSION_BYTES + create.name.len() + metadata + released) as u64
    }
}

impl SessionCreate {
    /// An upper bound of the bytes that it adds, what its watchers see included.
    pub(crate) fn growth(&self) -> u64 {
        let metadata: usize = self.metadata.iter().map(|(k, v)| 2 * (k.len() + v.len()) + 96).sum();
        (2 * SESSION_BYTES + 384 + 2 * self.name.len() + metadata) as u64
    }
}

/// A session with its slot in the table and its shared facts, without what grows.
const SESSION_BYTES: usize = 320;
/// An attached key in the index, beside its bytes.
const ATTACHED_BYTES: usize = 64;
/// The format version of a stored session.
const SESSION_FORMAT: u8 = 1;

fn without_secret(create: &SessionCreate) -> SessionCreate {
    SessionCreate { secret: None, ..create.clone() }
}

/// The key under which watchers of the native space see a session: `s` and its id.
pub(crate) fn native_key(id: SessionId) -> Key {
    let mut name = *b"s\0\0\0\0\0\0\0\0";
    name[1..].copy_from_slice(&id.0.to_be_bytes());
    Key::new(Space::Native, NamespaceId::DEFAULT, &name)
}

pub(crate) struct Sessions {
    pub(crate) table: SnapMap<SessionId, Session>,
    /// Which keys each session owns; follows from the keys.
    attached: BTreeSet<(SessionId, Key)>,
    attached_counts: BTreeMap<SessionId, u64>,
    bytes: u64,
}

impl Sessions {
    pub(crate) fn new() -> Self {
        Self { table: SnapMap::new(), attached: BTreeSet::new(), attached_counts: BTreeMap::new(), bytes: 0 }
    }

    pub(crate) fn get(&self, id: SessionId) -> Option<&Session> {
        self.table.get(&id)
    }

    /// Puts, replaces or removes a session; what was there comes back, and putting it back undoes.
    pub(crate) fn set(&mut self, id: SessionId, session: Option<Session>) -> Option<Session> {
        self.bytes += session.as_ref().map_or(0, Session::bytes);
        let old = match session {
            Some(session) => self.table.insert(id, session),
            None => self.table.remove(&id),
        };
        self.bytes -= old.as_ref().map_or(0, Session::bytes);
        old
    }

    /// True if the key was not attached to it before.
    pub(crate) fn attach(&mut self, id: SessionId, key: &[u8]) -> bool {
        let new = self.attached.insert((id, Key::from_bytes(key)));
        if new {
            *self.attached_counts.entry(id).or_default() += 1;
            self.bytes += (ATTACHED_BYTES + key.len()) as u64;
        }
        new
    }

    /// True if the key was attached to it.
    pub(crate) fn detach(&mut self, id: SessionId, key: &[u8]) -> bool {
        let there = self.attached.remove(&(id, Key::from_bytes(key)));
        if there {
            self.bytes -= (ATTACHED_BYTES + key.len()) as u64;
            if let Some(count) = self.attached_counts.get_mut(&id) {
                *count -= 1;
                if *count == 0 {
                    self.attached_counts.remove(&id);
                }
            }
        }
        there
    }

    pub(crate) fn key_count(&self, id: SessionId) -> u64 {
        self.attached_counts.get(&id).copied().unwrap_or(0)
    }

    /// Attached keys, in key order.
    pub(crate) fn keys(&self, id: SessionId) -> impl Iterator<Item = &Key> {
        let from = (id, Key::from_bytes(b""));
        self.attached.range(from..).take_while(move |(owner, _)| *owner == id).map(|(_, key)| key)
    }

    /// Live sessions with larger ids, in the order of ids.
    pub(crate) fn after(&self, id: SessionId) -> impl Iterator<Item = (&SessionId, &Session)> {
        self.table.range((Bound::Excluded(id), Bound::Unbounded))
    }

    pub(crate) fn memory(&self) -> u64 {
        self.bytes
    }
}

/// Appends one session as snapshots store it.
pub(crate) fn write(b: &mut Vec<u8>, session: &Session) {
    b.push(SESSION_FORMAT);
    codec::write_session_create(b, &session.facts.create);
    b.varint(session.facts.token);
    b.varint(u64::from(session.facts.index));
    b.varint(session.facts.created.0);
    b.option(session.remaining_ms, Write::varint);
    b.list(&session.released, |b, (lock, token)| {
        b.bytes(lock.as_bytes());
        b.varint(token.0);
    });
}

pub(crate) fn read(r: &mut Reader<'_>) -> Result<Session, DecodeError> {
    const WHAT: &str = "a session";
    let format = r.byte(WHAT)?;
    if format != SESSION_FORMAT {
        return Err(DecodeError::UnknownFormat { what: WHAT, format });
    }
    let create = codec::read_session_create(r)?;
    let facts = SessionFacts { create, token: r.varint(WHAT)?, index: r.u32(WHAT)?, created: LogTime(r.varint(WHAT)?) };
    Ok(Session {
        facts: Arc::new(facts),
        remaining_ms: r.option(WHAT, |r| r.varint(WHAT))?,
        released: r.list(WHAT, |r| Ok((LockKey::from_bytes(r.bytes(WHAT)?)?, Revision(r.varint(WHAT)?))))?,
    })
}
