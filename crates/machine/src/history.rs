//! What is kept beside the keys so that the past can be told: the ring of changes of spaces without history, the marks by
//! which compaction is timed, and the running checksums.
//!
//! Promises. H1: the ring has every change from its floor on. H2: a mark (stamp, revision) says which revision was the newest
//! at that stamp, at least once a minute of log time or a thousand revisions while there are changes. H3: all three follow
//! from the log alone; their sizes are bounded, the ring's by changes and by bytes.

use crate::codec::{self, Write};
use crate::keys::ChangeSlice;
use crate::reply::{Change, Rejection};
use crate::types::*;
use std::collections::VecDeque;

/// The newest changes of the native space.
pub(crate) struct Ring {
    changes: VecDeque<Change>,
    /// Watches can start here or later.
    floor: Revision,
    bytes: u64,
    bytes_max: u64,
}

/// A change in the ring, beside its records.
const CHANGE_BYTES: usize = 96;
/// However few changes that are: a ring of large objects must not take the memory of what lives.
const RING_BYTES_MAX: u64 = 64 << 20;
/// Of the ring of busy kinds, whose records are small. It is so little that it is not accounted.
const BUSY_BYTES_MAX: u64 = 8 << 20;

impl Ring {
    pub(crate) fn new() -> Self {
        Self::load(Vec::new(), Revision(0))
    }

    /// For the changes of busy kinds, from a revision on. In no snapshot, so that a member may have a shorter one than another.
    pub(crate) fn busy(floor: Revision) -> Self {
        Self { bytes_max: BUSY_BYTES_MAX, ..Self::load(Vec::new(), floor) }
    }

    pub(crate) fn push(&mut self, change: Change, max: u64) {
        self.bytes += change_bytes(&change);
        self.changes.push_back(change);
        self.shrink(max);
    }

    /// Drops the oldest changes above a limit of changes, and above that of bytes. A revision of which something is gone cannot be watched any more.
    pub(crate) fn shrink(&mut self, max: u64) {
        while self.changes.len() as u64 > max || self.bytes > self.bytes_max {
            let Some(gone) = self.changes.pop_front() else { return };
            self.bytes -= change_bytes(&gone);
            self.floor = gone.record.meta().mod_revision.next();
        }
    }

    pub(crate) fn floor(&self) -> Revision {
        self.floor
    }

    pub(crate) fn all(&self) -> &VecDeque<Change> {
        &self.changes
    }

    pub(crate) fn load(changes: Vec<Change>, floor: Revision) -> Self {
        let bytes = changes.iter().map(change_bytes).sum();
        Self { changes: changes.into(), floor, bytes, bytes_max: RING_BYTES_MAX }
    }

    pub(crate) fn memory(&self) -> u64 {
        self.bytes
    }

    /// The changes of a span from a revision on, in whole revisions, until about `max_bytes` are gathered.
    pub(crate) fn changes(
        &self,
        span: &Span,
        from: Revision,
        max_bytes: usize,
        now: Revision,
    ) -> Result<ChangeSlice, Rejection> {
        if from < self.floor {
            return Err(Rejection::Compacted { lowest: self.floor });
        }
        let first = self.changes.partition_point(|c| c.record.meta().mod_revision < from);
        let (mut changes, mut bytes) = (Vec::<Change>::new(), 0);
        for change in self.changes.range(first..).filter(|c| span.contains(c.record.key())) {
            let revision = change.record.meta().mod_revision;
            let begins = changes.last().is_some_and(|c| c.record.meta().mod_revision != revision);
            if begins && bytes >= max_bytes {
                return Ok(ChangeSlice { changes, next: revision });
            }
            bytes += change_bytes(change) as usize;
            changes.push(change.clone());
        }
        Ok(ChangeSlice { changes, next: now.next().max(from) })
    }
}

fn change_bytes(change: &Change) -> u64 {
    let before = change.before.as_ref().map_or(0, |r| r.as_bytes().len());
    (CHANGE_BYTES + change.record.as_bytes().len() + before) as u64
}

/// Which revision was the newest when.
pub(crate) struct Marks {
    marks: VecDeque<(LogTime, Revision)>,
}

const MARK_EVERY_MS: u64 = 60_000;
const MARK_EVERY_REVISIONS: u64 = 1_000;
/// Above this every second mark goes: compaction takes larger steps then.
const MARKS_MAX: usize = 8_192;

impl Marks {
    pub(crate) fn new() -> Self {
        Self { marks: VecDeque::new() }
    }

    /// Called after every entry.
    pub(crate) fn note(&mut self, stamp: LogTime, revision: Revision) {
        if let Some(&(at, newest)) = self.marks.back() {
            let later = stamp.0.saturating_sub(at.0) >= MARK_EVERY_MS;
            let further = revision.0.saturating_sub(newest.0) >= MARK_EVERY_REVISIONS;
            if revision == newest || !(later || further) {
                return;
            }
        }
        if self.marks.len() == MARKS_MAX {
            let mut odd = false;
            self.marks.retain(|_| {
                odd = !odd;
                odd
            });
        }
        self.marks.push_back((stamp, revision));
    }

    /// Forgets what is of no use once everything below `compacted` is gone.
    pub(crate) fn compact(&mut self, compacted: Revision) {
        let gone = self.marks.partition_point(|(_, revision)| *revision <= compacted);
        self.marks.drain(..gone);
    }

    /// The newest marked revision at or below `revision` that was marked at or before `stamp`.
    pub(crate) fn find(&self, stamp: LogTime, revision: Revision) -> Option<Revision> {
        let old = self.marks.partition_point(|(at, r)| *at <= stamp && *r <= revision);
        old.checked_sub(1).map(|i| self.marks[i].1)
    }

    pub(crate) fn all(&self) -> &VecDeque<(LogTime, Revision)> {
        &self.marks
    }

    pub(crate) fn load(marks: Vec<(LogTime, Revision)>) -> Self {
        Self { marks: marks.into() }
    }
}

/// The running checksum of everything that changed, and what it was at recent indexes.
///
/// A leader proposes (index, checksum) of what it has applied. Every member, the leader too, knows its own checksum after each of the
/// newest entries that changed it, so each compares at that very index, whenever the entry arrives: nothing has to be agreed on before.
/// A member that began from a snapshot above that index knows nothing of it and lets it pass; the snapshot
/// brought the checksum along, so the next comparison covers what came before too. What is compared is only whether members
/// differ, not who is wrong: a leader that is wrong stops the others, which is better than a split state that goes on.
pub(crate) struct Sums {
    now: u64,
    /// (index, checksum after it), for indexes that changed it.
    recent: VecDeque<(Index, u64)>,
    /// Where the last comparison was, when, and of which sum: only for `due`, so it is in no snapshot.
    compared: (Index, LogTime, u64),
}

const SUMS_KEPT: usize = 4_096;
/// A comparison is due after this many entries, or this much log time, if anything has changed. The first is well below
/// `SUMS_KEPT`, so that a proposed index is known until its entry arrives.
const COMPARE_EVERY_ENTRIES: u64 = 1_000;
const COMPARE_EVERY_MS: u64 = 60_000;

impl Sums {
    pub(crate) fn new(at: Index, now: u64) -> Self {
        Self { now, recent: VecDeque::from([(at, now)]), compared: (at, LogTime(0), now) }
    }

    pub(crate) fn now(&self) -> u64 {
        self.now
    }

    pub(crate) fn change(&mut self, change: &Change) {
        self.now = codec::fold(self.now, change.record.as_bytes());
    }

    /// Something that is not a change of a key: a session, a waiter.
    pub(crate) fn event(&mut self, parts: [u64; 3]) {
        let mut bytes = Vec::with_capacity(30);
        for part in parts {
            bytes.varint(part);
        }
        self.now = codec::fold(self.now, &bytes);
    }

    /// Called after every entry.
    pub(crate) fn note(&mut self, at: Index) {
        if self.recent.back().is_none_or(|(_, sum)| *sum != self.now) {
            if self.recent.len() == SUMS_KEPT {
                self.recent.pop_front();
            }
            self.recent.push_back((at, self.now));
        }
    }

    /// The checksum after the entry `at`, if that is recent enough to be known here.
    pub(crate) fn at(&self, at: Index) -> Option<u64> {
        let next = self.recent.partition_point(|(index, _)| *index <= at);
        next.checked_sub(1).map(|i| self.recent[i].1)
    }

    /// A comparison was applied at this entry.
    pub(crate) fn note_compared(&mut self, index: Index, stamp: LogTime) {
        self.compared = (index, stamp, self.now);
    }

    /// Whether a leader that is at this entry should propose a comparison.
    pub(crate) fn due(&self, index: Index, stamp: LogTime) -> bool {
        let (at, when, sum) = self.compared;
        let entries = index.0.saturating_sub(at.0);
        let ms = stamp.0.saturating_sub(when.0);
        sum != self.now && (entries >= COMPARE_EVERY_ENTRIES || ms >= COMPARE_EVERY_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Meta, Record};

    fn change(revision: u64, bytes: usize) -> Change {
        let key = Key::new(Space::Native, NamespaceId::DEFAULT, b"fbig");
        let meta = Meta { mod_revision: Revision(revision), ..Meta::default() };
        Change { record: Record::new(key.as_bytes(), meta, b"", &vec![7; bytes]), before: None }
    }

    #[test]
    fn h3_the_ring_is_bounded_by_changes_and_by_bytes() {
        let mut ring = Ring::new();
        for revision in 1..=200 {
            ring.push(change(revision, 1 << 20), 10_000);
        }
        assert!(ring.memory() <= RING_BYTES_MAX && ring.memory() > RING_BYTES_MAX - (2 << 20), "{}", ring.memory());
        // What is left is whole, from the floor on.
        let span = Span::one(Key::new(Space::Native, NamespaceId::DEFAULT, b"fbig"));
        let slice = ring.changes(&span, ring.floor(), usize::MAX, Revision(200)).unwrap();
        assert_eq!(slice.changes.first().unwrap().record.mod_revision(), ring.floor());
        assert_eq!((slice.changes.len() as u64, slice.next), (201 - ring.floor().0, Revision(201)));
        let gone = ring.changes(&span, Revision(ring.floor().0 - 1), usize::MAX, Revision(200));
        assert_eq!(gone.unwrap_err(), Rejection::Compacted { lowest: ring.floor() });
        for revision in 201..=230 {
            ring.push(change(revision, 10), 20);
        }
        assert_eq!((ring.floor(), ring.all().len()), (Revision(211), 20));
    }

    #[test]
    fn a_change_larger_than_the_ring_leaves_it_empty() {
        let mut ring = Ring::new();
        ring.push(change(5, 65 << 20), 10_000);
        assert_eq!((ring.floor(), ring.memory(), ring.all().len()), (Revision(6), 0, 0));
    }
}
