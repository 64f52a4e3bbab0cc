//! What happened to a lock: the newest events, so that after an incident somebody can tell who held it.
//!
//! Promises. V1: the newest 128 events of a lock are kept for seven days of log time, beyond its being held. V2: an event is written by the commit that
//! it tells of, and goes with it if that is refused.
//! Not promised. That every lock of the last seven days is told: all events together have [`BYTES_MAX`], and beyond it the locks without a newer
//! event lose theirs first. So a program that uses a new name for each lock cannot fill the memory.
//! Relies on. Only what is rare changes the table's indexes: an event is added in place, and its lock's time to be forgotten is looked at
//! again only when it has come.

use crate::apply::{Commit, Undo};
use crate::codec;
use crate::coded::{coded_enum, coded_struct};
use crate::locks::LockKey;
use crate::native::PRIMITIVES;
use crate::objects::{Indexes, Lived, ObjectKey, Stored};
use crate::reply::Holder;
use crate::types::*;
use std::collections::{BTreeSet, VecDeque};

/// Events of one lock.
const EVENTS_MAX: usize = 128;
/// How long after it an event is told.
const KEPT_MS: u64 = 7 * 24 * 3_600_000;
/// Accounted bytes of all events together.
const BYTES_MAX: u64 = 64 << 20;
/// How many locks with newer events are passed over before one of them loses its events.
const PASSED_OVER_MAX: usize = 4;
/// An event beside its texts.
const EVENT_BYTES: usize = 96;

coded_enum! {
    /// What happened.
    #[derive(Copy, Eq)]
    pub enum LockEventKind as "a kind of lock event" {
        Granted = 1,
        Released = 2,
        /// Its session ended.
        Lost = 3,
        /// An operator took it away.
        ForceReleased = 4,
        /// Somebody waited in vain.
        TimedOut = 5,
        /// Somebody stopped waiting.
        Cancelled = 6,
        /// Somebody was told that waiting would never end.
        Deadlock = 7,
        /// What kept it from being granted again is over.
        DelayOver = 8,
        /// It has another number of permits.
        Resized = 9,
    }
}

coded_struct! {
    /// One event.
    pub struct LockEvent as "a lock event" {
        pub kind: LockEventKind,
        pub at: LogTime,
        /// The token of the grant, or the newest revision where there is none.
        pub token: Revision,
        pub session: SessionId,
        /// Empty: the session.
        pub owner: Box<[u8]>,
        /// How long it was held or waited for.
        pub after_ms: u64,
        /// Who did it and why, for what an operator does.
        pub detail: Box<str>,
    }
}

coded_struct! {
    /// The newest events of one lock.
    pub struct LockEvents as "lock events" {
        /// When to see whether they are still worth keeping.
        pub(crate) look_at: LogTime,
        /// Oldest first.
        pub(crate) events: VecDeque<LockEvent>,
    }
}

impl LockEvent {
    pub(crate) fn of(kind: LockEventKind, holder: &Holder, at: LogTime, after_ms: u64) -> Self {
        let owner = holder.owner.clone();
        Self { kind, at, token: holder.token, session: holder.session, owner, after_ms, detail: "".into() }
    }

    fn bytes(&self) -> u64 {
        (EVENT_BYTES + self.owner.len() + self.detail.len()) as u64
    }
}

impl LockEvents {
    /// Those that are told at this time, oldest first.
    pub fn told(&self, now: LogTime) -> impl DoubleEndedIterator<Item = &LockEvent> {
        self.events.iter().filter(move |event| event.at.plus(KEPT_MS) > now)
    }

    fn keep_until(&self) -> LogTime {
        self.events.back().map_or(LogTime(0), |event| event.at.plus(KEPT_MS))
    }
}

impl Lived for LockEvents {
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        self.events.iter().map(LockEvent::bytes).sum()
    }

    fn deadline(&self) -> Option<LogTime> {
        Some(self.look_at)
    }

    fn digest(&self) -> u64 {
        codec::mix(self.look_at.0, self.events.len() as u64)
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        let Some(events) = commit.object::<Self>(key) else { return };
        let keep_until = events.keep_until();
        if keep_until <= commit.m.stamp {
            return commit.set_object_silently(key, None);
        }
        let later = Self { look_at: keep_until, events: events.events.clone() };
        commit.set_object_silently(key, Some(later.into_object()));
    }

    fn note(indexes: &mut Indexes, key: &ObjectKey, old: Option<&Self>, new: Option<&Self>) {
        let index = &mut indexes.lock_events;
        if let Some(old) = old {
            index.bytes -= old.bytes();
            index.by_age.remove(&(old.look_at, key.clone()));
        }
        if let Some(new) = new {
            index.bytes += new.bytes();
            index.by_age.insert((new.look_at, key.clone()));
        }
    }
}

/// All of them, in about the order of their newest events.
#[derive(Default)]
pub(crate) struct Index {
    by_age: BTreeSet<(LogTime, ObjectKey)>,
    pub(crate) bytes: u64,
}

/// Adds an event in place; what made room for it comes back.
pub(crate) fn push(events: &mut LockEvents, event: LockEvent) -> (Option<LockEvent>, u64, u64) {
    let gone = if events.events.len() < EVENTS_MAX { None } else { events.events.pop_front() };
    let bytes = (event.bytes(), gone.as_ref().map_or(0, LockEvent::bytes));
    events.events.push_back(event);
    (gone, bytes.0, bytes.1)
}

/// Takes the newest event back and puts the one that made room for it where it was.
pub(crate) fn pop(events: &mut LockEvents, gone: Option<LockEvent>) -> (u64, u64) {
    let bytes = (gone.as_ref().map_or(0, LockEvent::bytes), events.events.back().map_or(0, LockEvent::bytes));
    events.events.pop_back();
    if let Some(gone) = gone {
        events.events.push_front(gone);
    }
    bytes
}

impl Commit<'_> {
    /// Notes what happened to a lock.
    pub(crate) fn lock_event(&mut self, lock: &LockKey, event: LockEvent) {
        if self.m.behaviour < PRIMITIVES {
            return;
        }
        let key = ObjectKey::of::<LockEvents>(lock.namespace(), lock.name());
        match self.m.objects.push_lock_event(&key, event) {
            Ok(gone) => self.undo.push(Undo::LockEvent(key.clone(), gone.map(Box::new))),
            Err(event) => {
                let look_at = event.at.plus(KEPT_MS);
                let first = LockEvents { look_at, events: VecDeque::from([event]) };
                self.set_object_silently(&key, Some(first.into_object()));
            }
        }
        self.forget_old_lock_events(&key);
    }

    fn forget_old_lock_events(&mut self, newest: &ObjectKey) {
        let mut passed_over = 0;
        while self.m.objects.indexes.lock_events.bytes > BYTES_MAX {
            let oldest = self.m.objects.indexes.lock_events.by_age.first();
            let Some((_, key)) = oldest.cloned().filter(|(_, key)| key != newest) else { return };
            let Some(events) = self.object::<LockEvents>(&key) else { return };
            let keep_until = events.keep_until();
            if keep_until > events.look_at && passed_over < PASSED_OVER_MAX {
                passed_over += 1;
                let later = LockEvents { look_at: keep_until, events: events.events.clone() };
                self.set_object_silently(&key, Some(later.into_object()));
                continue;
            }
            self.set_object_silently(&key, None);
        }
    }
}
