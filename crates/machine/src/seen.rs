//! The native space as those who watch it see it: each thing as the record that its last change put into the ring.
//!
//! Promises. V1: a page of things is of one moment, and pages follow one another in one order. V2: a thing in a page has the value that its
//! last change told watchers. V3: kinds that are not watched are in no page, nor are etcd's leases, which are not told either, and
//! busy ones in none of all kinds together: who watches those names them.
//! Not promised. When an object changed last: objects do not know it, so their records in pages have revision 0.

use crate::apply::Machine;
use crate::codec::{self, Reader};
use crate::command::SessionCreate;
use crate::history::Ring;
use crate::locks::{Lock, LockKey};
use crate::objects::{self, Object};
use crate::record::Record;
use crate::reply::Holder;
use crate::sessions;
use crate::types::*;
use std::ops::Bound;

/// The letters of what is no object.
pub const SESSIONS: u8 = b's';
pub const LOCKS: u8 = b'l';

/// What a record of the native space says.
#[derive(Clone, Debug, PartialEq)]
pub enum Seen {
    Session(Box<SessionCreate>),
    /// Held by one, alone.
    Lock(Holder),
    /// Held by readers or in permits, or kept from others for a while.
    SharedLock(SharedLock),
    Object(Object),
}

/// A lock with several holders, or with a number of permits.
#[derive(Clone, Debug, PartialEq)]
pub struct SharedLock {
    /// Zero: it has none.
    pub permits: u32,
    /// How many hold it, or are kept.
    pub holds: u64,
    pub newest: Option<Holder>,
}

impl Seen {
    /// `None` for the end of a thing, and for bytes that are no such record.
    pub fn of(record: &Record) -> Option<Self> {
        let value = record.value();
        let (&format, rest) = value.split_first()?;
        match kind_of(record.key()) {
            Some(LOCKS) if format == 2 && !record.is_tombstone() => shared_lock(rest).map(Self::SharedLock),
            _ if record.is_tombstone() || format != 1 => None,
            Some(SESSIONS) => codec::read_session_create(&mut Reader::new(rest)).ok().map(Box::new).map(Self::Session),
            Some(LOCKS) => codec::read_holder(&mut Reader::new(rest)).ok().map(Self::Lock),
            _ => Object::from_record(value).map(Self::Object),
        }
    }
}

fn shared_lock(value: &[u8]) -> Option<SharedLock> {
    let mut r = Reader::new(value);
    let (permits, holds) = (r.u32("a lock").ok()?, r.varint("a lock").ok()?);
    let newest = r.option("a lock", codec::read_holder).ok()?;
    Some(SharedLock { permits, holds, newest })
}

/// The kind letter of a key of the native space.
pub fn kind_of(key: &[u8]) -> Option<u8> {
    key.get(Key::PREFIX).copied()
}

impl Machine {
    /// Where the changes of a native key are kept.
    pub(crate) fn ring_of(&mut self, key: &[u8]) -> &mut Ring {
        if kind_of(key).is_some_and(objects::is_busy) { &mut self.busy_ring } else { &mut self.ring }
    }

    /// The lowest revision from which the native space can be watched, apart from what is busy.
    pub fn native_floor(&self) -> Revision {
        self.ring.floor()
    }

    /// A page of the things of a span, behind the key `after`; the second part is where the next page begins, if there may be one.
    /// Objects come first, then locks, then sessions.
    pub fn native_slice(&self, span: &Span, after: Option<&Key>, max: usize) -> (Vec<Record>, Option<Key>) {
        let phase = after.and_then(|key| kind_of(key.as_bytes()));
        let is_object = !matches!(phase, Some(SESSIONS | LOCKS));
        let mut page: Vec<Record> = Vec::new();
        if is_object {
            page.extend(self.seen_objects(span, after).take(max));
        }
        if phase != Some(SESSIONS) && page.len() < max {
            let after = after.filter(|_| phase == Some(LOCKS));
            page.extend(self.seen_locks(span, after, max - page.len()));
        }
        if page.len() < max {
            let after = after.filter(|_| phase == Some(SESSIONS));
            page.extend(self.seen_sessions(span, after).take(max - page.len()));
        }
        let next = page.last().filter(|_| page.len() == max).map(|last| Key::from_bytes(last.key()));
        (page, next)
    }

    fn seen_objects<'a>(&'a self, span: &'a Span, after: Option<&Key>) -> impl Iterator<Item = Record> + 'a {
        let from = match after {
            Some(after) => Bound::Excluded(objects::ObjectKey::from_native(after.as_bytes())),
            None => Bound::Included(objects::ObjectKey::from_native(span.start.as_bytes())),
        };
        let names_kind = kind_of(span.start.as_bytes()).is_some();
        let within = self.objects.table.range((from, Bound::Unbounded));
        within
            .take_while(|(key, _)| is_below_end(span, key.as_bytes()))
            .filter(move |(key, object)| {
                objects::is_watched(Some(object)) && (names_kind || !objects::is_busy(key.kind()))
            })
            .map(|(key, object)| objects::record(key, Some(object), Revision(0), 0))
    }

    fn seen_locks(&self, span: &Span, after: Option<&Key>, max: usize) -> Vec<Record> {
        let Some(prefix) = names_of(span, LOCKS) else { return Vec::new() };
        let after = after.map(|after| &after.as_bytes()[Key::PREFIX + 1..]);
        let locks = self.locks.list(namespace_of(&span.start), prefix, after).take(max);
        // Of a span of one name, the first is the one.
        let within = locks.filter(|key| span.contains(key.native_key().as_bytes()));
        let record = |key: &LockKey| match self.locks.get(key)? {
            Lock::Plain(plain) => Some(plain.record(key)),
            Lock::Wide(wide) => Some(wide.record(key, Revision(0), 0)),
        };
        within.filter_map(record).collect()
    }

    fn seen_sessions<'a>(&'a self, span: &'a Span, after: Option<&Key>) -> impl Iterator<Item = Record> + 'a {
        let first = match (after, names_of(span, SESSIONS)) {
            (_, None) => SessionId(u64::MAX),
            (Some(after), _) => session_of(after.as_bytes()),
            // One session is found without a walk.
            (None, Some(id)) => SessionId(number_of(id).saturating_sub(1)),
        };
        let is_one = span.end.is_none();
        let sessions = self.sessions.after(first).take(if is_one { 1 } else { usize::MAX });
        // The leases of etcd's face begin and end untold.
        sessions
            .filter(|(id, session)| session.is_native() && span.contains(sessions::native_key(**id).as_bytes()))
            .map(|(_, session)| session.record())
    }
}

fn namespace_of(key: &Key) -> NamespaceId {
    let bytes = key.as_bytes();
    NamespaceId(bytes.get(1..5).and_then(|ns| ns.try_into().ok()).map_or(0, u32::from_be_bytes))
}

fn session_of(key: &[u8]) -> SessionId {
    SessionId(number_of(key.get(Key::PREFIX + 1..).unwrap_or_default()))
}

fn number_of(id: &[u8]) -> u64 {
    id.try_into().map_or(0, u64::from_be_bytes)
}

fn is_below_end(span: &Span, key: &[u8]) -> bool {
    match &span.end {
        None => key == span.start.as_bytes(),
        Some(end) => key < end.as_bytes(),
    }
}

/// What the names of a kind begin with in a span; `None` where the span has nothing of that kind.
fn names_of(span: &Span, kind: u8) -> Option<&[u8]> {
    match span.start.as_bytes().get(Key::PREFIX..) {
        Some([first, name @ ..]) if *first == kind => Some(name),
        // The whole space of a namespace.
        Some([]) => Some(b""),
        _ => None,
    }
}
