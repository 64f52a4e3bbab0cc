//! Objects: what the native primitives beside sessions and locks keep, in one table, each under its kind and name.
//!
//! Promises. O1: one key, one object; what was there comes back when it is replaced, so that a refused transaction leaves nothing. O2: an object with
//! a deadline is told when an entry's stamp reaches it, in a commit of its own, in the order of deadlines and then of keys. O3: an object that
//! names sessions is told when one of them ends, in the commit that ends it. O4: indexes follow from the table alone.
//! Not promised. What any of them means: each kind has its own module, which implements [`Stored`] and [`Lived`].

use crate::apply::{Commit, invalid};
use crate::codec::{self, DecodeError, Reader, Write};
use crate::coded::{Coded, encoded};
use crate::record::{Meta, Record};
use crate::reply::Rejection;
use crate::snapmap::SnapMap;
use crate::types::*;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use crate::configs::{Config, ConfigVersion};
use crate::counters::{Counter, Sequence};
use crate::elections::Election;
use crate::idempotency::IdempotencyRecord;
use crate::lock_events::{self, LockEvent, LockEvents};
use crate::markers::Marker;
use crate::queues::{Job, Queue};
use crate::registry::{Instance, Pulse, Service};
use crate::reservations::{Hold, Pool};
use crate::schedules::Schedule;

/// Kind, namespace and name; the same bytes are the key under which watchers of the native space see it. Clones share.
///
/// Layout: space 5 (1 byte), namespace (4 bytes, big endian), kind (1 byte), name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ObjectKey(Arc<[u8]>);

impl ObjectKey {
    const PREFIX: usize = Key::PREFIX + 1;

    pub(crate) fn new(kind: u8, namespace: NamespaceId, name: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(Self::PREFIX + name.len());
        bytes.push(Space::Native as u8);
        bytes.extend_from_slice(&namespace.0.to_be_bytes());
        bytes.push(kind);
        bytes.extend_from_slice(name);
        Self(bytes.into())
    }

    /// From the key under which watchers see it.
    pub(crate) fn from_native(key: &[u8]) -> Self {
        Self(key.into())
    }

    pub(crate) fn of<T: Stored>(namespace: NamespaceId, name: &[u8]) -> Self {
        Self::new(T::KIND, namespace, name)
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn kind(&self) -> u8 {
        self.0[Key::PREFIX]
    }

    pub(crate) fn name(&self) -> &[u8] {
        &self.0[Self::PREFIX..]
    }

    pub(crate) fn namespace(&self) -> NamespaceId {
        NamespaceId(u32::from_be_bytes([self.0[1], self.0[2], self.0[3], self.0[4]]))
    }

    /// The key under which watchers see it.
    pub(crate) fn native_key(&self) -> Key {
        Key::from_bytes(&self.0)
    }
}

impl std::fmt::Debug for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl Coded for ObjectKey {
    fn write(&self, b: &mut Vec<u8>) {
        b.bytes(&self.0);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        let bytes = r.bytes(what)?;
        if bytes.len() < Self::PREFIX || bytes[0] != Space::Native as u8 {
            return Err(DecodeError::Malformed { what });
        }
        Ok(Self(bytes.into()))
    }
}

/// A kind of object, for those who look.
pub trait Stored: Sized {
    /// The letter of its kind in keys; never changes.
    const KIND: u8;

    /// The object, if it is of this kind.
    fn of(object: &Object) -> Option<&Self>;

    fn into_object(self) -> Object;
}

/// What an object does in its life.
pub(crate) trait Lived: Stored + Coded {
    /// Whether watchers of the native space see its changes. What is large or comes in great numbers is not watched.
    const WATCHED: bool = true;

    /// Watched, but changed so often that its changes would drive those of all other kinds out of the ring: they have one of their own.
    const BUSY: bool = false;

    /// Accounted bytes beside the key and a fixed part.
    fn bytes(&self) -> u64;

    /// When it wants to be told that the time has come.
    fn deadline(&self) -> Option<LogTime> {
        None
    }

    /// Whose end it wants to be told of.
    fn sessions(&self) -> Vec<SessionId> {
        Vec::new()
    }

    /// What stands for its state in the running checksum.
    fn digest(&self) -> u64 {
        codec::fold(0, &encoded(self))
    }

    /// Its deadline has come. It must change or remove its deadline.
    fn due(_: &mut Commit<'_>, _: &ObjectKey) {}

    /// A session that it names has ended.
    fn session_ended(_: &mut Commit<'_>, _: &ObjectKey, _: SessionId) {}

    /// Somebody who waited for it has gone unserved, by time or with a session: whoever is next may be served now.
    fn waiter_gone(_: &mut Commit<'_>, _: &ObjectKey) {}

    /// Keeps what follows from the table.
    fn note(_: &mut Indexes, _: &ObjectKey, _old: Option<&Self>, _new: Option<&Self>) {}
}

/// What follows from the table, for kinds that need more than their key, deadlines and sessions.
#[derive(Default)]
pub(crate) struct Indexes {
    pub(crate) lock_events: crate::lock_events::Index,
    pub(crate) queues: crate::queues::Index,
    pub(crate) registry: crate::registry::Index,
    pub(crate) schedules: crate::schedules::Index,
}

macro_rules! kinds {
    ($($kind:ident = $letter:literal, $number:literal;)*) => {
        /// One object, in memory of exactly its kind's size. Cloning shares. The numbers of the kinds are stored and never change.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Object { $($kind(Arc<$kind>),)* }

        $(impl Stored for $kind {
            const KIND: u8 = $letter;

            fn of(object: &Object) -> Option<&Self> {
                match object {
                    Object::$kind(it) => Some(it),
                    _ => None,
                }
            }

            fn into_object(self) -> Object {
                Object::$kind(Arc::new(self))
            }
        })*

        impl Coded for Object {
            fn write(&self, b: &mut Vec<u8>) {
                match self { $(Self::$kind(it) => { b.push($number); it.write(b); })* }
            }

            fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
                match r.byte(what)? {
                    $($number => $kind::read(r, what).map(Stored::into_object),)*
                    number => Err(DecodeError::UnknownNumber { what, number: u64::from(number) }),
                }
            }
        }

        impl Object {
            fn kind(&self) -> u8 {
                match self { $(Self::$kind(_) => $letter,)* }
            }

            fn is_watched(&self) -> bool {
                match self { $(Self::$kind(_) => $kind::WATCHED,)* }
            }

            fn bytes(&self) -> u64 {
                match self { $(Self::$kind(it) => it.bytes(),)* }
            }

            fn deadline(&self) -> Option<LogTime> {
                match self { $(Self::$kind(it) => it.deadline(),)* }
            }

            fn sessions(&self) -> Vec<SessionId> {
                match self { $(Self::$kind(it) => it.sessions(),)* }
            }

            fn digest(&self) -> u64 {
                match self { $(Self::$kind(it) => it.digest(),)* }
            }
        }

        /// Whether the changes of a kind are kept apart from those of the others; see `Lived::BUSY`.
        pub fn is_busy(kind: u8) -> bool {
            match kind {
                $($letter => $kind::BUSY,)*
                _ => false,
            }
        }

        fn note(indexes: &mut Indexes, key: &ObjectKey, old: Option<&Object>, new: Option<&Object>) {
            match key.kind() {
                $($letter => $kind::note(indexes, key, old.and_then($kind::of), new.and_then($kind::of)),)*
                _ => {}
            }
        }

        /// Tells an object that its deadline has come.
        pub(crate) fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
            match key.kind() {
                $($letter => $kind::due(commit, key),)*
                _ => {}
            }
        }

        /// Tells an object that somebody who waited for it has gone unserved.
        pub(crate) fn waiter_gone(commit: &mut Commit<'_>, key: &ObjectKey) {
            match key.kind() {
                $($letter => $kind::waiter_gone(commit, key),)*
                _ => {}
            }
        }

        /// Tells an object that a session which it names has ended.
        pub(crate) fn session_ended(commit: &mut Commit<'_>, key: &ObjectKey, session: SessionId) {
            match key.kind() {
                $($letter => $kind::session_ended(commit, key, session),)*
                _ => {}
            }
        }
    };
}

// The letters `s` (sessions) and `l` (locks) are taken.
kinds! {
    Counter = b'c', 1;
    Pool = b'p', 2;
    Hold = b'h', 3;
    Config = b'f', 4;
    Instance = b'r', 5;
    IdempotencyRecord = b'i', 6;
    Queue = b'q', 7;
    Job = b'j', 8;
    Schedule = b't', 9;
    Marker = b'm', 10;
    Election = b'e', 11;
    LockEvents = b'v', 12;
    Sequence = b'n', 13;
    Service = b'g', 14;
    Pulse = b'b', 15;
    ConfigVersion = b'x', 20;
}

/// Bytes of a name.
const NAME_BYTES_MAX: usize = 4 << 10;
/// The format version of a stored object.
const OBJECT_FORMAT: u8 = 1;
/// An object with its slot in the table, beside key and contents.
const OBJECT_BYTES: u64 = 112;
/// A place in one of the two indexes.
const INDEXED_BYTES: u64 = 48;

impl Object {
    /// What a watcher of the native space sees as the value of the record.
    pub fn from_record(value: &[u8]) -> Option<Self> {
        let mut r = Reader::new(value);
        let format = r.byte("an object").ok()?;
        let object = Self::read(&mut r, "an object").ok()?;
        (format == OBJECT_FORMAT && r.is_empty()).then_some(object)
    }
}

/// The record of an object for watchers.
pub(crate) fn record(key: &ObjectKey, object: Option<&Object>, at: Revision, index: u32) -> Record {
    let meta = Meta { tombstone: object.is_none(), mod_revision: at, index, ..Meta::default() };
    let mut value = Vec::new();
    if let Some(object) = object {
        value.push(OBJECT_FORMAT);
        object.write(&mut value);
    }
    Record::new(key.as_bytes(), meta, b"", &value)
}

/// The table with its indexes.
pub(crate) struct Objects {
    pub(crate) table: SnapMap<ObjectKey, Object>,
    deadlines: BTreeSet<(LogTime, ObjectKey)>,
    by_session: BTreeSet<(SessionId, ObjectKey)>,
    session_counts: BTreeMap<SessionId, u64>,
    pub(crate) indexes: Indexes,
    bytes: u64,
}

impl Objects {
    pub(crate) fn new() -> Self {
        Self {
            table: SnapMap::new(),
            deadlines: BTreeSet::new(),
            by_session: BTreeSet::new(),
            session_counts: BTreeMap::new(),
            indexes: Indexes::default(),
            bytes: 0,
        }
    }

    pub(crate) fn get<T: Stored>(&self, key: &ObjectKey) -> Option<&T> {
        T::of(self.table.get(key)?)
    }

    pub(crate) fn any(&self, key: &ObjectKey) -> Option<&Object> {
        self.table.get(key)
    }

    /// Puts, replaces or removes an object; what was there comes back, and putting it back undoes.
    pub(crate) fn set(&mut self, key: &ObjectKey, object: Option<Object>) -> Option<Object> {
        if let Some(new) = &object {
            self.bytes += bytes(key, new);
            if let Some(deadline) = new.deadline() {
                // The key of the table, so that its bytes are there once.
                self.deadlines.insert((deadline, self.table.key(key).unwrap_or(key).clone()));
            }
        }
        let new = object.clone();
        let old = match object {
            Some(object) => self.table.insert(key.clone(), object),
            None => self.table.remove(key),
        };
        if let Some(old) = &old {
            self.bytes -= bytes(key, old);
            if let Some(deadline) = old.deadline()
                && new.as_ref().and_then(|new| new.deadline()) != Some(deadline)
            {
                self.deadlines.remove(&(deadline, key.clone()));
            }
        }
        self.index_sessions(key, old.as_ref(), new.as_ref());
        note(&mut self.indexes, key, old.as_ref(), new.as_ref());
        old
    }

    /// Adds an event to those of a lock, in place: neither deadline nor sessions change. Where there are none yet, it comes back.
    pub(crate) fn push_lock_event(
        &mut self,
        key: &ObjectKey,
        event: LockEvent,
    ) -> Result<Option<LockEvent>, LockEvent> {
        let Some(events) = self.table.get_mut(key).and_then(lock_events_mut) else { return Err(event) };
        let (gone, more, less) = lock_events::push(events, event);
        self.account_lock_events(more, less);
        Ok(gone)
    }

    /// Undoes `push_lock_event`.
    pub(crate) fn pop_lock_event(&mut self, key: &ObjectKey, gone: Option<LockEvent>) {
        let Some(events) = self.table.get_mut(key).and_then(lock_events_mut) else { return };
        let (more, less) = lock_events::pop(events, gone);
        self.account_lock_events(more, less);
    }

    fn account_lock_events(&mut self, more: u64, less: u64) {
        self.bytes = self.bytes + more - less;
        self.indexes.lock_events.bytes = self.indexes.lock_events.bytes + more - less;
    }

    fn index_sessions(&mut self, key: &ObjectKey, old: Option<&Object>, new: Option<&Object>) {
        let of = |object: Option<&Object>| object.map(Object::sessions).unwrap_or_default();
        let (old, new) = (of(old), of(new));
        if old == new {
            return;
        }
        for session in old {
            if self.by_session.remove(&(session, key.clone()))
                && let Some(count) = self.session_counts.get_mut(&session)
            {
                *count -= 1;
                if *count == 0 {
                    self.session_counts.remove(&session);
                }
            }
        }
        for session in new {
            if self.by_session.insert((session, key.clone())) {
                *self.session_counts.entry(session).or_default() += 1;
            }
        }
    }

    pub(crate) fn of_session(&self, session: SessionId) -> Vec<ObjectKey> {
        let from = (session, ObjectKey(Arc::from(&b""[..])));
        self.by_session.range(from..).take_while(|(s, _)| *s == session).map(|(_, key)| key.clone()).collect()
    }

    /// What of one kind names a session. Costs nothing for a session that no object names.
    pub(crate) fn kind_of_session<'a, T: Stored + 'a>(
        &'a self,
        namespace: NamespaceId,
        session: SessionId,
    ) -> impl Iterator<Item = (&'a ObjectKey, &'a T)> {
        let known = self.session_counts.contains_key(&session);
        let from = known.then(|| (session, ObjectKey::of::<T>(namespace, b"")));
        let named = from.into_iter().flat_map(|from| self.by_session.range(from..));
        let ours =
            named.take_while(move |(of, key)| *of == session && key.kind() == T::KIND && key.namespace() == namespace);
        ours.filter_map(|(_, key)| Some((key, self.get::<T>(key)?)))
    }

    /// As a session's limit counts them.
    pub(crate) fn session_count(&self, session: SessionId) -> u64 {
        self.session_counts.get(&session).copied().unwrap_or(0)
    }

    pub(crate) fn next_deadline(&self) -> Option<LogTime> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// The first object whose time has come.
    pub(crate) fn first_due(&self, now: LogTime) -> Option<ObjectKey> {
        self.deadlines.first().filter(|(deadline, _)| *deadline <= now).map(|(_, key)| key.clone())
    }

    /// Objects of one kind whose names begin with `prefix`, after the name `after`, in the order of names.
    pub(crate) fn list<'a, 'p, T: Stored + 'a>(
        &'a self,
        namespace: NamespaceId,
        prefix: &'p [u8],
        after: Option<&[u8]>,
    ) -> impl Iterator<Item = (&'a ObjectKey, &'a T)> + use<'a, 'p, T> {
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(ObjectKey::of::<T>(namespace, after)),
            _ => Bound::Included(ObjectKey::of::<T>(namespace, prefix)),
        };
        let all = self.table.range((from, Bound::Unbounded));
        let ours = all.take_while(move |(key, _)| {
            key.kind() == T::KIND && key.namespace() == namespace && key.name().starts_with(prefix)
        });
        ours.filter_map(|(key, object)| Some((key, T::of(object)?)))
    }

    pub(crate) fn memory(&self) -> u64 {
        self.bytes
    }
}

fn lock_events_mut(object: &mut Object) -> Option<&mut LockEvents> {
    match object {
        Object::LockEvents(events) => Some(Arc::make_mut(events)),
        _ => None,
    }
}

fn bytes(key: &ObjectKey, object: &Object) -> u64 {
    let indexed = u64::from(object.deadline().is_some()) + object.sessions().len() as u64;
    OBJECT_BYTES + key.as_bytes().len() as u64 + object.bytes() + indexed * INDEXED_BYTES
}

/// Refuses a name that no object of a kind has.
pub(crate) fn check_name(kind: &str, name: &[u8]) -> Result<(), Rejection> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(invalid(format!("the name of {kind} has 1 to {NAME_BYTES_MAX} bytes")));
    }
    Ok(())
}

/// One change of an object on its way: what the checksum takes in.
pub(crate) fn sum_parts(key: &ObjectKey, object: Option<&Object>) -> [u64; 2] {
    [codec::fold(0, key.as_bytes()), object.map_or(0, |object| object.digest().max(1))]
}

pub(crate) fn is_watched(object: Option<&Object>) -> bool {
    object.is_some_and(Object::is_watched)
}

/// Appends one object as snapshots store it.
pub(crate) fn write(b: &mut Vec<u8>, key: &ObjectKey, object: &Object) {
    b.push(OBJECT_FORMAT);
    key.write(b);
    object.write(b);
}

pub(crate) fn read(r: &mut Reader<'_>) -> Result<(ObjectKey, Object), DecodeError> {
    const WHAT: &str = "an object";
    let format = r.byte(WHAT)?;
    if format != OBJECT_FORMAT {
        return Err(DecodeError::UnknownFormat { what: WHAT, format });
    }
    let key = ObjectKey::read(r, WHAT)?;
    let object = Object::read(r, WHAT)?;
    if key.kind() != object.kind() {
        return Err(DecodeError::Malformed { what: WHAT });
    }
    Ok((key, object))
}
