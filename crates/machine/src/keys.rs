//! The keys with their history: etcd's multi-version store, in memory.
//!
//! Promises. K1: a read at a revision that is not compacted sees exactly the keys of that moment, whatever happened
//! since. K2: compaction is complete for every reader at once; the memory comes back in slices (`maintain`), and no
//! answer depends on how far those are. K3: `rollback` leaves no trace of a revision. K4: a snapshot is of its pinned
//! revision and of the compaction then, though changes go on between its slices. K5: the accounted bytes equal a
//! recount.
//! Not promised. Anything about who may write: sessions, compares, the rule that a transaction puts a key once, and
//! whether a revision may be compacted are `apply.rs`'s.
//! Relies on. Revisions rise; `index` rises within one; only the newest revision is rolled back, before any
//! maintenance.
//!
//! How it is kept. `current` has the live version of each key, in key order; `past` has superseded versions and
//! tombstones, in (key, revision) order; `log` has every change since the compacted revision, in (revision, index)
//! order. All three share one block of bytes per version, so a change costs its slots and no second copy. The log
//! finds what compaction can drop in constant time per change, feeds watches that start in the past, and is rebuilt
//! when a snapshot is loaded.

use crate::command::{Order, Range, SortBy};
use crate::log::Log;
use crate::memory::{self, KeysMemory};
use crate::ordered::{Ordered, Place};
use crate::record::{Meta, Record, put_varint};
use crate::reply::{Change, RangeReply, Rejection};
use crate::types::*;
use std::cmp::Ordering;

/// Changes that one slice of a catch-up looks at, so that a narrow watch over a long log stalls nobody.
const CHANGES_SCANNED_MAX: usize = if cfg!(test) { 16 } else { 16_384 };

/// Versions that one slice of a snapshot looks at, for the same reason: those that compaction covers are passed over.
const VERSIONS_SEEN_MAX: usize = if cfg!(test) { 16 } else { 65_536 };

/// A buffer larger than this is given back after the record that needed it.
const SCRATCH_KEPT_MAX: usize = 64 << 10;

/// Changes for a watch that starts in the past.
#[derive(Clone, Debug, PartialEq)]
pub struct ChangeSlice {
    /// Whole revisions, in order.
    pub changes: Vec<Change>,
    /// The first revision that is not delivered; above the current one when the watch has caught up. A slice may be
    /// empty and still move on.
    pub next: Revision,
}

/// How far a snapshot has come: everything up to and with this version is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotMark {
    key: Key,
    order: (Revision, u32),
}

pub(crate) struct Keys {
    current: Ordered<Record>,
    past: Ordered<Record>,
    log: Log,
    /// How many changes at the front of the log, all of the compacted revision itself, have had what they superseded
    /// dropped.
    swept: usize,
    compacted: Revision,
    pinned: Option<Pin>,
    /// Bytes of live versions with their slots.
    live_bytes: u64,
    /// Bytes of past versions with their slots.
    past_bytes: u64,
    scratch: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Pin {
    at: Revision,
    /// Later compactions do not change what the snapshot holds.
    compacted: Revision,
}

/// Writing.
impl Keys {
    pub(crate) fn new() -> Self {
        Self {
            current: Ordered::new(),
            past: Ordered::new(),
            log: Log::new(),
            swept: 0,
            compacted: Revision(0),
            pinned: None,
            live_bytes: 0,
            past_bytes: 0,
            scratch: Vec::new(),
        }
    }

    /// Stores a version. Version number and create revision follow from what is there.
    ///
    /// A second put of a key in one revision is stored as a second change of it; etcd's rule that refuses it is the
    /// caller's.
    pub(crate) fn put(
        &mut self,
        key: &[u8],
        value: &[u8],
        tail: &[u8],
        owner: SessionId,
        at: Revision,
        index: u32,
    ) -> Change {
        let place = self.place(key);
        let before = self.live_at(place, key).cloned();
        let old = before.as_ref().map(Record::meta);
        let meta = Meta {
            tombstone: false,
            mod_revision: at,
            index,
            create_revision: old.map_or(at, |m| m.create_revision),
            version: old.map_or(0, |m| m.version) + 1,
            owner,
        };
        let record = self.build(key, meta, tail, value);
        self.live_bytes += held_bytes(&record);
        match &before {
            None => self.current.insert(place, record.clone()),
            Some(old) => {
                self.current.replace(place, record.clone());
                self.live_bytes -= held_bytes(old);
                self.add_past(old.clone());
            }
        }
        self.log.push(record.clone());
        Change { record, before }
    }

    /// Deletes a key; `None` if it is not there.
    pub(crate) fn delete(&mut self, key: &[u8], at: Revision, index: u32) -> Option<Change> {
        let place = self.place(key);
        self.live_at(place, key)?;
        let (before, _) = self.current.remove(place);
        self.live_bytes -= held_bytes(&before);
        self.add_past(before.clone());
        let meta = Meta { tombstone: true, mod_revision: at, index, ..Meta::default() };
        let record = self.build(key, meta, b"", b"");
        self.add_past(record.clone());
        self.log.push(record.clone());
        Some(Change { record, before: Some(before) })
    }

    /// Undoes every change of `at`, which must be the newest revision that changed a key (or have changed none).
    pub(crate) fn rollback(&mut self, at: Revision) {
        debug_assert!(at > self.compacted, "a compacted revision is not rolled back");
        while self.log.last().is_some_and(|r| r.mod_revision() == at) {
            if let Some(record) = self.log.pop_last() {
                self.undo(&record);
            }
        }
    }

    fn undo(&mut self, record: &Record) {
        let key = record.key();
        if record.is_tombstone() {
            let tombstone = self.take_last_past(key);
            debug_assert!(tombstone.as_ref() == Some(record));
            if let Some(old) = self.take_last_past(key) {
                self.live_bytes += held_bytes(&old);
                self.current.insert(self.place(key), old);
            }
            return;
        }
        let place = self.place(key);
        self.live_bytes -= held_bytes(record);
        let end = self.past.seek(|r| r.key() <= key);
        let old = self.past.before(end).filter(|r| r.key() == key && !r.is_tombstone()).cloned();
        match old {
            None => drop(self.current.remove(place)),
            Some(old) => {
                self.take_last_past(key);
                self.live_bytes += held_bytes(&old);
                self.current.replace(place, old);
            }
        }
    }

    fn take_last_past(&mut self, key: &[u8]) -> Option<Record> {
        let first = self.past.seek(|r| r.key() < key);
        let end = self.past.seek(|r| r.key() <= key);
        let newest = self.past.before(end).filter(|_| first < end)?.order();
        Some(self.remove_past(self.past_place(key, newest)).0)
    }

    fn build(&mut self, key: &[u8], meta: Meta, tail: &[u8], value: &[u8]) -> Record {
        let record = Record::build(&mut self.scratch, key, meta, tail, value);
        if self.scratch.capacity() > SCRATCH_KEPT_MAX {
            self.scratch = Vec::new();
        }
        record
    }

    fn add_past(&mut self, record: Record) {
        self.past_bytes += held_bytes(&record);
        let place = self.past_place(record.key(), record.order());
        self.past.insert(place, record);
    }

    fn remove_past(&mut self, place: Place) -> (Record, Place) {
        let (record, next) = self.past.remove(place);
        self.past_bytes -= held_bytes(&record);
        (record, next)
    }
}

/// Reading.
impl Keys {
    /// The live version of a key.
    pub(crate) fn get(&self, key: &[u8]) -> Option<&Record> {
        self.live_at(self.place(key), key)
    }

    /// The live versions of a span, in key order.
    pub(crate) fn live(&self, span: &Span) -> impl Iterator<Item = &Record> {
        let (from, to) = self.bounds(&self.current, span);
        self.current.iter(from, to)
    }

    /// etcd's Range.
    ///
    /// Where etcd's order among equal sort keys is left to its unstable sort, ours is by key. One of its oddities is
    /// kept because clients can see it: with no order given, a sort target other than the key sorts what the limit
    /// has already cut.
    pub(crate) fn range(&self, range: &Range, now: Revision) -> Result<RangeReply, Rejection> {
        let at = self.readable(range.revision, now)?;
        if range.count_only {
            let count = self.count(&range.span, at);
            return Ok(RangeReply { count, keys_only: range.keys_only, ..RangeReply::default() });
        }
        let (mut records, count) = self.read(&range.span, at, fetch_max(range));
        filter(&mut records, range);
        sort(&mut records, range);
        let limit = usize::try_from(range.limit).ok().filter(|&l| l > 0).unwrap_or(usize::MAX);
        let more = records.len() > limit;
        records.truncate(limit);
        Ok(RangeReply { records, count, more, keys_only: range.keys_only })
    }

    /// A page of the keys at a revision, after the key `after`; the second part is where the next page starts, if
    /// there may be one. The caller keeps the revision from being compacted, or checks it first.
    pub(crate) fn range_slice(
        &self,
        span: &Span,
        at: Revision,
        after: Option<&Key>,
        max: usize,
    ) -> (Vec<Record>, Option<Key>) {
        let after = after.map(Key::as_bytes);
        let records: Vec<Record> = self.versions_at(span, at, after).take(max).cloned().collect();
        let resume = records.last().filter(|_| records.len() == max).map(|r| Key::from_bytes(r.key()));
        (records, resume)
    }

    /// The revision that a request means, if it can be read. The compacted revision itself can.
    fn readable(&self, revision: i64, now: Revision) -> Result<Revision, Rejection> {
        match u64::try_from(revision).unwrap_or(0) {
            0 => Ok(now),
            r if r > now.0 => Err(Rejection::FutureRevision { current: now }),
            r if r < self.compacted.0 => Err(Rejection::Compacted { lowest: self.compacted }),
            r => Ok(Revision(r)),
        }
    }

    /// Up to `max` records of a span at a revision, and how many there are without that bound.
    fn read(&self, span: &Span, at: Revision, max: usize) -> (Vec<Record>, u64) {
        if self.is_newest(at) {
            let (from, to) = self.bounds(&self.current, span);
            let count = self.current.between(from, to);
            let mut records = Vec::with_capacity(count.min(max));
            for slice in self.current.slices(from, to) {
                let rest = max - records.len();
                records.extend_from_slice(&slice[..slice.len().min(rest)]);
            }
            return (records, count as u64);
        }
        let mut versions = self.versions_at(span, at, None);
        let records: Vec<Record> = versions.by_ref().take(max).cloned().collect();
        let count = if records.len() < max { records.len() as u64 } else { self.count(span, at) };
        (records, count)
    }

    /// How many keys a span has at a revision. Without a walk over the keys where fewer changes have come since: each
    /// creation since then is one too many now, each deletion one too few.
    fn count(&self, span: &Span, at: Revision) -> u64 {
        let (from, to) = self.bounds(&self.current, span);
        let live = self.current.between(from, to);
        let newer = self.log.seek(|r| r.mod_revision() <= at);
        if self.log.len() - newer > live + self.past.len() {
            return self.versions_at(span, at, None).count() as u64;
        }
        let (mut created, mut deleted) = (0, 0);
        for record in self.log.iter(newer).filter(|r| span.contains(r.key())) {
            if record.is_tombstone() {
                deleted += 1;
            } else if record.meta().version == 1 {
                created += 1;
            }
        }
        live as u64 + deleted - created
    }

    /// Whether nothing changed after `at`, so that the live keys are the answer.
    fn is_newest(&self, at: Revision) -> bool {
        self.log.last().is_none_or(|r| r.mod_revision() <= at)
    }

    fn place(&self, key: &[u8]) -> Place {
        self.current.seek(|r| r.key() < key)
    }

    fn live_at(&self, place: Place, key: &[u8]) -> Option<&Record> {
        self.current.at(place).filter(|r| r.key() == key)
    }

    /// The place of a version, or where it belongs.
    fn past_place(&self, key: &[u8], order: (Revision, u32)) -> Place {
        self.past.seek(|r| r.key().cmp(key).then_with(|| r.order().cmp(&order)).is_lt())
    }

    fn bounds(&self, list: &Ordered<Record>, span: &Span) -> (Place, Place) {
        let start = span.start.as_bytes();
        let from = list.seek(|r| r.key() < start);
        let to = match &span.end {
            None => list.seek(|r| r.key() <= start),
            Some(end) => list.seek(|r| r.key() < end.as_bytes()),
        };
        // An end below the start is an empty span.
        (from, to.max(from))
    }

    fn versions_at(&self, span: &Span, at: Revision, after: Option<&[u8]>) -> VersionsAt<'_> {
        let start = |list: &Ordered<Record>, from: Place| match after {
            Some(key) => list.seek(|r| r.key() <= key).max(from),
            None => from,
        };
        let (past, past_end) = self.bounds(&self.past, span);
        let (current, current_end) = self.bounds(&self.current, span);
        VersionsAt {
            keys: self,
            at,
            past: start(&self.past, past),
            past_end,
            current: start(&self.current, current),
            current_end,
        }
    }
}

/// The version of each key that was live at a revision, in key order.
struct VersionsAt<'a> {
    keys: &'a Keys,
    at: Revision,
    past: Place,
    past_end: Place,
    current: Place,
    current_end: Place,
}

impl<'a> Iterator for VersionsAt<'a> {
    type Item = &'a Record;

    fn next(&mut self) -> Option<&'a Record> {
        loop {
            let past = self.keys.past.at(self.past).filter(|_| self.past < self.past_end);
            let current = self.keys.current.at(self.current).filter(|_| self.current < self.current_end);
            let order = match (past, current) {
                (None, None) => return None,
                (None, Some(_)) => Ordering::Greater,
                (Some(_), None) => Ordering::Less,
                (Some(p), Some(c)) => p.key().cmp(c.key()),
            };
            let old = past.filter(|_| order.is_le()).and_then(|p| self.newest_of_run(p));
            let new = current.filter(|_| order.is_ge());
            if new.is_some() {
                self.current = self.keys.current.next(self.current);
            }
            if let Some(found) = new.filter(|c| c.mod_revision() <= self.at).or(old) {
                return Some(found);
            }
        }
    }
}

impl<'a> VersionsAt<'a> {
    /// The version among the past ones of a key that was live at the revision; moves on behind them all.
    fn newest_of_run(&mut self, first: &'a Record) -> Option<&'a Record> {
        // Most keys have few past versions, which a walk passes faster than a search; a busy key may have very many.
        const WALK: usize = 8;
        let past = &self.keys.past;
        let key = first.key();
        let mut newest = None;
        for _ in 0..WALK {
            match past.at(self.past).filter(|r| r.key() == key) {
                Some(r) if r.mod_revision() <= self.at => newest = Some(r),
                Some(_) => {}
                None => return newest.filter(|r| !r.is_tombstone()),
            }
            self.past = past.next(self.past);
        }
        let later = self.keys.past_place(key, (self.at.next(), 0));
        newest = past.before(later).filter(|r| r.key() == key);
        self.past = past.seek(|r| r.key() <= key);
        newest.filter(|r| !r.is_tombstone())
    }
}

/// How many records must be read before filters, order and limit. One above the limit shows that there are more.
fn fetch_max(range: &Range) -> usize {
    let in_key_order = range.order == Order::None || (range.order == Order::Ascending && range.sort_by == SortBy::Key);
    match usize::try_from(range.limit) {
        Ok(limit) if limit > 0 && in_key_order && !has_filters(range) => limit.saturating_add(1),
        _ => usize::MAX,
    }
}

fn has_filters(range: &Range) -> bool {
    [range.min_mod_revision, range.max_mod_revision, range.min_create_revision, range.max_create_revision] != [0; 4]
}

fn filter(records: &mut Vec<Record>, range: &Range) {
    // The bounds are signed on the wire, and a negative one is a bound.
    let within = |n: Revision, min: i64, max: i64| {
        let n = i64::try_from(n.0).unwrap_or(i64::MAX);
        (min == 0 || n >= min) && (max == 0 || n <= max)
    };
    if has_filters(range) {
        records.retain(|r| {
            let meta = r.meta();
            within(meta.mod_revision, range.min_mod_revision, range.max_mod_revision)
                && within(meta.create_revision, range.min_create_revision, range.max_create_revision)
        });
    }
}

/// Sorts records that are in key order. Stable, so that equal ones stay in key order in either direction.
fn sort(records: &mut [Record], range: &Range) {
    let number = |r: &Record| {
        let meta = r.meta();
        match range.sort_by {
            SortBy::CreateRevision => meta.create_revision.0,
            SortBy::ModRevision => meta.mod_revision.0,
            _ => meta.version,
        }
    };
    let descending = range.order == Order::Descending;
    match range.sort_by {
        SortBy::Key if descending => records.reverse(),
        SortBy::Key => {}
        SortBy::Value if descending => records.sort_by(|a, b| b.value().cmp(a.value())),
        SortBy::Value => records.sort_by(|a, b| a.value().cmp(b.value())),
        _ if descending => records.sort_by_cached_key(|r| std::cmp::Reverse(number(r))),
        _ => records.sort_by_cached_key(number),
    }
}

/// Compaction.
impl Keys {
    /// Makes revisions below `to` unreadable, at once. Never goes back.
    pub(crate) fn compact(&mut self, to: Revision) {
        self.compacted = self.compacted.max(to);
    }

    pub(crate) fn compacted(&self) -> Revision {
        self.compacted
    }

    /// Gives back the memory of up to `budget` compacted changes; true while there is more to do now. Does nothing
    /// while a snapshot runs.
    pub(crate) fn maintain(&mut self, budget: usize) -> bool {
        for _ in 0..budget {
            if !self.drop_one() {
                return false;
            }
        }
        self.pinned.is_none() && self.log.get(self.swept).is_some_and(|r| r.mod_revision() <= self.compacted)
    }

    /// Handles the oldest change that compaction covers. A change below the compacted revision leaves the log, and
    /// with it goes what it superseded. A change of that revision itself can still be watched: it stays, only what it
    /// superseded goes.
    fn drop_one(&mut self) -> bool {
        if self.pinned.is_some() {
            return false;
        }
        if let Some(record) = self.log.first().filter(|r| r.mod_revision() < self.compacted).cloned() {
            let (revision, index) = record.order();
            let own = u32::from(record.is_tombstone());
            self.drop_past(record.key(), (revision, index + own));
            self.log.pop_first();
            self.swept = self.swept.saturating_sub(1);
            return true;
        }
        let Some(record) = self.log.get(self.swept).filter(|r| r.mod_revision() == self.compacted).cloned() else {
            return false;
        };
        self.drop_past(record.key(), (record.mod_revision(), 0));
        self.swept += 1;
        true
    }

    /// Drops the versions of a key before `order`. Nearly always one: earlier ones went with the changes that
    /// superseded them.
    fn drop_past(&mut self, key: &[u8], order: (Revision, u32)) {
        let mut place = self.past.seek(|r| r.key() < key);
        while self.past.at(place).is_some_and(|r| r.key() == key && r.order() < order) {
            place = self.remove_past(place).1;
        }
    }
}

/// Changes for watches.
impl Keys {
    /// The changes of a span from a revision on, in whole revisions, until about `max_bytes` are gathered (at least
    /// one revision).
    ///
    /// A change has the version before it unless compaction made that unreadable, as in etcd; so the answer does not
    /// depend on maintenance.
    pub(crate) fn changes(
        &self,
        span: &Span,
        from: Revision,
        max_bytes: usize,
        now: Revision,
    ) -> Result<ChangeSlice, Rejection> {
        if from < self.compacted {
            return Err(Rejection::Compacted { lowest: self.compacted });
        }
        let mut slice = Gathered { changes: Vec::new(), bytes: 0, max_bytes };
        let stopped = match span.end {
            None => self.changes_of_key(span.start.as_bytes(), from, &mut slice),
            Some(_) => self.changes_of_log(span, from, &mut slice),
        };
        Ok(ChangeSlice { changes: slice.changes, next: stopped.unwrap_or(now.next().max(from)) })
    }

    /// One key's versions are found without the log. Returns the revision before which it stopped early.
    fn changes_of_key(&self, key: &[u8], from: Revision, slice: &mut Gathered) -> Option<Revision> {
        let first = self.past_place(key, (from, 0));
        let end = self.past.seek(|r| r.key() <= key);
        let live = self.get(key).filter(|r| r.mod_revision() >= from);
        for record in self.past.iter(first, end.max(first)).chain(live) {
            if slice.is_full_before(record) {
                return Some(record.mod_revision());
            }
            slice.add(self.change(record));
        }
        None
    }

    fn changes_of_log(&self, span: &Span, from: Revision, slice: &mut Gathered) -> Option<Revision> {
        let first = self.log.seek(|r| r.mod_revision() < from);
        let mut revision = from;
        for (scanned, record) in self.log.iter(first).enumerate() {
            let next = record.mod_revision();
            if next != revision && (scanned >= CHANGES_SCANNED_MAX || slice.is_full_before(record)) {
                return Some(next);
            }
            revision = next;
            if span.contains(record.key()) {
                slice.add(self.change(record));
            }
        }
        None
    }

    fn change(&self, record: &Record) -> Change {
        let order = record.order();
        let before = || {
            let place = self.past_place(record.key(), order);
            self.past.before(place).filter(|r| r.key() == record.key() && !r.is_tombstone()).cloned()
        };
        Change { record: record.clone(), before: if order.0 > self.compacted { before() } else { None } }
    }
}

/// A slice of changes as it fills.
struct Gathered {
    changes: Vec<Change>,
    bytes: usize,
    max_bytes: usize,
}

impl Gathered {
    fn add(&mut self, change: Change) {
        self.bytes += change.record.as_bytes().len() + change.before.as_ref().map_or(0, |r| r.as_bytes().len());
        self.changes.push(change);
    }

    /// Whether the slice ends before this record. A revision is never split.
    fn is_full_before(&self, record: &Record) -> bool {
        self.bytes >= self.max_bytes
            && self.changes.last().is_some_and(|c| c.record.mod_revision() != record.mod_revision())
    }
}

/// Snapshots.
impl Keys {
    /// Holds the versions that a snapshot of the revision `at` (the newest) needs, until `unpin`.
    pub(crate) fn pin(&mut self, at: Revision) {
        assert!(self.pinned.is_none(), "one snapshot at a time");
        self.pinned = Some(Pin { at, compacted: self.compacted });
    }

    pub(crate) fn unpin(&mut self) {
        self.pinned = None;
    }

    /// Writes the next records of the pinned snapshot, in (key, revision) order, until `out` has grown by about
    /// `max_bytes`: each as its length and its bytes. True while there is more. What maintenance has not dropped yet
    /// is left out like what it has, so members with equal state write equal bytes.
    pub(crate) fn snapshot_slice(
        &self,
        cursor: &mut Option<SnapshotMark>,
        at: Revision,
        max_bytes: usize,
        out: &mut Vec<u8>,
    ) -> bool {
        let Some(pin) = self.pinned else { return false };
        assert_eq!(pin.at, at, "the pinned revision is the one that is written");
        let full = out.len().saturating_add(max_bytes);
        let mut seen = 0;
        let mut versions = self.versions_after(cursor.as_ref()).peekable();
        while let Some(record) = versions.next() {
            seen += 1;
            let superseded = versions.peek().filter(|next| next.key() == record.key()).map(|next| next.mod_revision());
            if pin.holds(record, superseded) {
                put_varint(out, record.as_bytes().len() as u64);
                out.extend_from_slice(record.as_bytes());
            }
            if (out.len() >= full || seen >= VERSIONS_SEEN_MAX) && versions.peek().is_some() {
                *cursor = Some(SnapshotMark::of(record));
                return true;
            }
        }
        false
    }

    /// Every version behind a mark, in (key, revision) order.
    fn versions_after<'a>(&'a self, mark: Option<&SnapshotMark>) -> impl Iterator<Item = &'a Record> + use<'a> {
        let start = |list: &Ordered<Record>| match mark {
            None => list.first(),
            Some(m) => list.seek(|r| r.key().cmp(m.key.as_bytes()).then_with(|| r.order().cmp(&m.order)).is_le()),
        };
        let mut past = self.past.iter(start(&self.past), self.past.end()).peekable();
        let mut current = self.current.iter(start(&self.current), self.current.end()).peekable();
        std::iter::from_fn(move || match (past.peek(), current.peek()) {
            // Of one key the past versions come first.
            (Some(p), Some(c)) if p.key() > c.key() => current.next(),
            (Some(_), _) => past.next(),
            (None, _) => current.next(),
        })
    }

    /// Builds the keys from the records of a snapshot. `None` if those are not in (key, revision) order, each once.
    pub(crate) fn load(records: impl Iterator<Item = Record>, compacted: Revision) -> Option<Self> {
        let mut keys = Self { compacted, ..Self::new() };
        let mut log = Vec::new();
        let mut records = records.peekable();
        while let Some(record) = records.next() {
            let order = record.order();
            if let Some(next) = records.peek()
                && (record.key(), order) >= (next.key(), next.order())
            {
                return None;
            }
            if order.0 >= compacted {
                log.push((order, record.clone()));
            }
            let newest = records.peek().is_none_or(|next| next.key() != record.key());
            if newest && !record.is_tombstone() {
                keys.live_bytes += held_bytes(&record);
                keys.current.insert(keys.current.end(), record);
            } else {
                keys.past_bytes += held_bytes(&record);
                keys.past.insert(keys.past.end(), record);
            }
        }
        log.sort_unstable_by_key(|&(order, _)| order);
        log.into_iter().for_each(|(_, record)| keys.log.push(record));
        Some(keys)
    }
}

impl SnapshotMark {
    fn of(record: &Record) -> Self {
        Self { key: Key::from_bytes(record.key()), order: record.order() }
    }
}

impl Pin {
    /// Whether a version is part of the snapshot, given the revision of the next version of its key.
    fn holds(&self, record: &Record, superseded: Option<Revision>) -> bool {
        let revision = record.mod_revision();
        let readable = !record.is_tombstone() && superseded.is_none_or(|next| next > self.compacted);
        revision <= self.at && (readable || revision >= self.compacted)
    }
}

/// Accounting.
impl Keys {
    pub(crate) fn memory(&self) -> KeysMemory {
        let history = self.past_bytes + self.log.len() as u64 * memory::LOG_SLOT;
        KeysMemory {
            live: self.current.len() as u64,
            versions: (self.current.len() + self.past.len()) as u64,
            changes: self.log.len() as u64,
            bytes: self.live_bytes + history,
            history,
            compacted: self.compacted,
        }
    }
}

/// What a version costs in `current` or `past`.
fn held_bytes(record: &Record) -> u64 {
    memory::record_bytes(record) + memory::SLOT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::take_varint;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// What a version is, without how it is kept.
    type Seen = (Vec<u8>, Meta, Vec<u8>, Vec<u8>);

    fn seen(r: &Record) -> Seen {
        let (meta, tail, value) = r.parts();
        (r.key().to_vec(), meta, tail.to_vec(), value.to_vec())
    }

    fn all_seen(records: &[Record]) -> Vec<Seen> {
        records.iter().map(seen).collect()
    }

    /// The naive store: every version of every key, for ever; compaction only forbids.
    #[derive(Clone, Default)]
    struct Model {
        keys: BTreeMap<Vec<u8>, Vec<Seen>>,
        now: u64,
        compacted: u64,
    }

    impl Model {
        fn live(&self, key: &[u8]) -> Option<&Seen> {
            self.keys.get(key)?.last().filter(|s| !s.1.tombstone)
        }

        fn put(&mut self, key: &[u8], value: &[u8], tail: &[u8], owner: u64, at: u64, index: u32) {
            let old = self.live(key).map(|s| s.1);
            let meta = Meta {
                tombstone: false,
                mod_revision: Revision(at),
                index,
                create_revision: old.map_or(Revision(at), |m| m.create_revision),
                version: old.map_or(1, |m| m.version + 1),
                owner: SessionId(owner),
            };
            let version = (key.to_vec(), meta, tail.to_vec(), value.to_vec());
            self.keys.entry(key.to_vec()).or_default().push(version);
        }

        fn delete(&mut self, key: &[u8], at: u64, index: u32) -> bool {
            if self.live(key).is_none() {
                return false;
            }
            let meta = Meta { tombstone: true, mod_revision: Revision(at), index, ..Meta::default() };
            self.keys.get_mut(key).unwrap().push((key.to_vec(), meta, vec![], vec![]));
            true
        }

        fn at(&self, span: &Span, at: u64) -> Vec<Seen> {
            self.keys
                .iter()
                .filter(|(key, _)| span.contains(key))
                .filter_map(|(_, versions)| versions.iter().rfind(|s| s.1.mod_revision.0 <= at))
                .filter(|s| !s.1.tombstone)
                .cloned()
                .collect()
        }

        fn range(&self, r: &Range) -> Result<(Vec<Seen>, u64, bool), Rejection> {
            let at = match r.revision {
                n if n > self.now as i64 => return Err(Rejection::FutureRevision { current: Revision(self.now) }),
                n if n <= 0 => self.now,
                n if n < self.compacted as i64 => {
                    return Err(Rejection::Compacted { lowest: Revision(self.compacted) });
                }
                n => n as u64,
            };
            let mut all = self.at(&r.span, at);
            let count = all.len() as u64;
            if r.count_only {
                return Ok((vec![], count, false));
            }
            let bounds = [r.min_mod_revision, r.max_mod_revision, r.min_create_revision, r.max_create_revision];
            let plain = r.order == Order::None || (r.sort_by == SortBy::Key && r.order == Order::Ascending);
            if plain && bounds == [0; 4] && r.limit > 0 {
                all.truncate(r.limit as usize + 1);
            }
            all.retain(|s| {
                let (m, c) = (s.1.mod_revision.0 as i64, s.1.create_revision.0 as i64);
                let [min_mod, max_mod, min_create, max_create] = bounds;
                !(min_mod != 0 && m < min_mod
                    || max_mod != 0 && m > max_mod
                    || min_create != 0 && c < min_create
                    || max_create != 0 && c > max_create)
            });
            let compare = |a: &Seen, b: &Seen| match r.sort_by {
                SortBy::Key => a.0.cmp(&b.0),
                SortBy::Version => a.1.version.cmp(&b.1.version),
                SortBy::CreateRevision => a.1.create_revision.cmp(&b.1.create_revision),
                SortBy::ModRevision => a.1.mod_revision.cmp(&b.1.mod_revision),
                SortBy::Value => a.3.cmp(&b.3),
            };
            match r.order {
                Order::Descending => all.sort_by(|a, b| compare(b, a)),
                _ => all.sort_by(compare),
            }
            let more = r.limit > 0 && all.len() > r.limit as usize;
            if more {
                all.truncate(r.limit as usize);
            }
            Ok((all, count, more))
        }

        fn changes(&self, span: &Span, from: u64) -> Vec<(Seen, Option<Seen>)> {
            let mut all = Vec::new();
            for (_, versions) in self.keys.iter().filter(|(key, _)| span.contains(key)) {
                for (i, version) in versions.iter().enumerate().filter(|(_, v)| v.1.mod_revision.0 >= from) {
                    let before = i.checked_sub(1).map(|i| versions[i].clone()).filter(|s| !s.1.tombstone);
                    all.push((version.clone(), before.filter(|_| version.1.mod_revision.0 > self.compacted)));
                }
            }
            all.sort_by_key(|(v, _)| (v.1.mod_revision, v.1.index));
            all
        }

        fn undo(&mut self, at: u64) {
            self.keys.values_mut().for_each(|versions| versions.retain(|s| s.1.mod_revision.0 != at));
        }
    }

    fn key(n: u8) -> Key {
        Key::new(Space::Keys, NamespaceId(u32::from(n) % 2), format!("k{:02}", n / 2).as_bytes())
    }

    #[derive(Clone, Debug)]
    enum Write {
        Put { key: u8, value: u8, tail: bool, owner: u64 },
        Delete { key: u8 },
    }

    #[derive(Clone, Debug)]
    enum Step {
        Commit(Vec<Write>),
        Undo(Vec<Write>),
        Compact(u8),
        Maintain(usize),
        Begin,
        Slice(usize),
        Abort,
        Range(Range, u8),
        Page(Span, u8, usize),
        Changes(Span, u8, usize),
    }

    fn write() -> impl Strategy<Value = Write> {
        // Some keys are written again and again.
        let key = || prop_oneof![0u8..3, 0u8..48];
        prop_oneof![
            3 => (key(), any::<u8>(), any::<bool>(), 0u64..4)
                .prop_map(|(key, value, tail, owner)| Write::Put { key, value, tail, owner }),
            2 => key().prop_map(|key| Write::Delete { key }),
        ]
    }

    fn span() -> impl Strategy<Value = Span> {
        prop_oneof![
            (0u8..48).prop_map(|n| Span::one(key(n))),
            (0u8..48, 0u8..48).prop_map(|(a, b)| Span { start: key(a), end: Some(key(b)) }),
            (0u8..48).prop_map(|n| Span { start: key(n), end: Some(Key::end_of(Space::Keys, NamespaceId(1))) }),
            Just(everything()),
        ]
    }

    fn everything() -> Span {
        Span { start: Key::new(Space::Keys, NamespaceId(0), b""), end: Some(Key::end_of(Space::Keys, NamespaceId(1))) }
    }

    fn range() -> impl Strategy<Value = Range> {
        let order = prop_oneof![Just(Order::None), Just(Order::Ascending), Just(Order::Descending)];
        let sort_by = prop_oneof![
            3 => Just(SortBy::Key),
            1 => Just(SortBy::Version),
            1 => Just(SortBy::CreateRevision),
            1 => Just(SortBy::ModRevision),
            1 => Just(SortBy::Value),
        ];
        let bound = || prop_oneof![4 => Just(0i64), 1 => -1i64..60];
        let limit = prop_oneof![2 => Just(0i64), 1 => Just(-3), 1 => Just(i64::MAX), 4 => 1i64..20];
        (span(), limit, order, sort_by, prop::array::uniform4(bound()), any::<(bool, bool)>()).prop_map(
            |(span, limit, order, sort_by, bounds, (keys_only, few))| Range {
                limit,
                order,
                sort_by,
                keys_only,
                count_only: keys_only && few,
                min_mod_revision: bounds[0],
                max_mod_revision: bounds[1],
                min_create_revision: bounds[2],
                max_create_revision: bounds[3],
                ..Range::of(span)
            },
        )
    }

    fn step() -> impl Strategy<Value = Step> {
        let writes = || prop::collection::vec(write(), 1..5);
        prop_oneof![
            24 => writes().prop_map(Step::Commit),
            4 => writes().prop_map(Step::Undo),
            2 => any::<u8>().prop_map(Step::Compact),
            4 => (1usize..6).prop_map(Step::Maintain),
            2 => Just(Step::Begin),
            6 => (0usize..300).prop_map(Step::Slice),
            1 => Just(Step::Abort),
            10 => (range(), any::<u8>()).prop_map(|(r, at)| Step::Range(r, at)),
            4 => (span(), any::<u8>(), 1usize..9).prop_map(|(s, at, max)| Step::Page(s, at, max)),
            4 => (span(), any::<u8>(), 1usize..400).prop_map(|(s, from, max)| Step::Changes(s, from, max)),
        ]
    }

    /// The store beside the model, and a snapshot that may be running.
    struct Pair {
        keys: Keys,
        model: Model,
        snapshot: Option<Running>,
    }

    struct Running {
        model: Model,
        cursor: Option<SnapshotMark>,
        out: Vec<u8>,
    }

    impl Pair {
        fn new() -> Self {
            Self { keys: Keys::new(), model: Model { now: 1, ..Model::default() }, snapshot: None }
        }

        /// A revision between the compacted one and now.
        fn pick(&self, of: u8) -> u64 {
            let low = self.model.compacted.max(1);
            low + (self.model.now - low) * u64::from(of) / 255
        }

        fn write(&mut self, writes: &[Write]) -> usize {
            let at = self.model.now + 1;
            let mut index = 0;
            for write in writes {
                let change = match write {
                    Write::Put { key: k, value, tail, owner } => {
                        let (key, value) = (key(*k), vec![*value; usize::from(*value % 40)]);
                        let tail: &[u8] = if *tail { b"tail" } else { b"" };
                        let before = self.model.live(key.as_bytes()).cloned();
                        self.model.put(key.as_bytes(), &value, tail, *owner, at, index);
                        let change =
                            self.keys.put(key.as_bytes(), &value, tail, SessionId(*owner), Revision(at), index);
                        assert_eq!(change.before.as_ref().map(seen), before);
                        Some(change)
                    }
                    Write::Delete { key: k } => {
                        let key = key(*k);
                        let before = self.model.live(key.as_bytes()).cloned();
                        let change = self.keys.delete(key.as_bytes(), Revision(at), index);
                        assert_eq!(change.is_some(), self.model.delete(key.as_bytes(), at, index));
                        assert_eq!(change.as_ref().and_then(|c| c.before.as_ref()).map(seen), before);
                        change
                    }
                };
                if let Some(change) = change {
                    assert_eq!(Some(&seen(&change.record)), self.model.keys[change.record.key()].last());
                    index += 1;
                }
            }
            index as usize
        }

        fn run(&mut self, step: &Step) {
            match step {
                Step::Commit(writes) => {
                    if self.write(writes) > 0 {
                        self.model.now += 1;
                    }
                }
                Step::Undo(writes) => {
                    let memory = self.keys.memory();
                    self.write(writes);
                    self.keys.rollback(Revision(self.model.now + 1));
                    self.model.undo(self.model.now + 1);
                    assert_eq!(self.keys.memory(), memory);
                }
                Step::Compact(of) => {
                    self.model.compacted = self.pick(*of);
                    self.keys.compact(Revision(self.model.compacted));
                }
                Step::Maintain(budget) => {
                    let before = self.keys.memory();
                    self.keys.maintain(*budget);
                    assert!(self.snapshot.is_none() || self.keys.memory() == before);
                }
                Step::Begin if self.snapshot.is_none() => {
                    self.keys.pin(Revision(self.model.now));
                    self.snapshot = Some(Running { model: self.model.clone(), cursor: None, out: Vec::new() });
                }
                Step::Begin => {}
                Step::Slice(max) => self.slice(*max),
                Step::Abort => {
                    self.snapshot = None;
                    self.keys.unpin();
                }
                Step::Range(range, of) => {
                    // Now and then a revision that is compacted, or still to come.
                    let revision = match of % 8 {
                        0 | 1 => 0,
                        2 => self.model.compacted as i64 - 1,
                        3 => self.model.now as i64 + i64::from(of % 3) - 1,
                        _ => self.pick(*of) as i64,
                    };
                    check_range(&self.keys, &self.model, &Range { revision, ..range.clone() });
                }
                Step::Page(span, of, max) => {
                    let at = self.pick(*of);
                    let (mut all, mut after) = (Vec::new(), None);
                    loop {
                        let (page, next) = self.keys.range_slice(span, Revision(at), after.as_ref(), *max);
                        assert!(page.len() <= *max);
                        all.extend(all_seen(&page));
                        after = next;
                        if after.is_none() {
                            break;
                        }
                    }
                    assert_eq!(all, self.model.at(span, at));
                }
                Step::Changes(span, of, max) => check_changes(&self.keys, &self.model, span, self.pick(*of), *max),
            }
            check_memory(&self.keys);
        }

        fn slice(&mut self, max: usize) {
            let Some(running) = &mut self.snapshot else { return };
            let at = Revision(running.model.now);
            let start = running.out.len();
            let more = self.keys.snapshot_slice(&mut running.cursor, at, max, &mut running.out);
            assert!(running.out.len() <= start + max + 200);
            if !more {
                check_snapshot(&running.out, &running.model);
                self.snapshot = None;
                self.keys.unpin();
            }
        }
    }

    fn check_range(keys: &Keys, model: &Model, range: &Range) {
        let got = keys.range(range, Revision(model.now));
        let got = got.map(|r| {
            assert_eq!(r.keys_only, range.keys_only);
            (all_seen(&r.records), r.count, r.more)
        });
        assert_eq!(got, model.range(range), "{range:?}");
    }

    /// Slices of any size, put together, are all changes, and no slice ends within a revision.
    fn check_changes(keys: &Keys, model: &Model, span: &Span, from: u64, max: usize) {
        let (mut all, mut next) = (Vec::new(), Revision(from));
        while next.0 <= model.now {
            let slice = keys.changes(span, next, max, Revision(model.now)).unwrap();
            assert!(slice.next > next);
            for change in &slice.changes {
                assert!(change.record.mod_revision() >= next && change.record.mod_revision() < slice.next);
                all.push((seen(&change.record), change.before.as_ref().map(seen)));
            }
            next = slice.next;
        }
        assert_eq!(all, model.changes(span, from));
        if model.compacted > 0 {
            let lowest = Revision(model.compacted);
            let below = Revision(model.compacted - 1);
            assert_eq!(keys.changes(span, below, max, Revision(model.now)), Err(Rejection::Compacted { lowest }));
        }
    }

    fn check_memory(keys: &Keys) {
        let held = |list: &Ordered<Record>| list.iter(list.first(), list.end()).map(held_bytes).sum::<u64>();
        let slots = keys.log.iter(0).count() as u64 * memory::LOG_SLOT;
        let got = keys.memory();
        assert_eq!(got.history, held(&keys.past) + slots);
        assert_eq!(got.bytes, held(&keys.current) + got.history);
        assert_eq!(got.live, keys.current.iter(keys.current.first(), keys.current.end()).count() as u64);
    }

    fn decode(mut block: &[u8]) -> Vec<Record> {
        let mut records = Vec::new();
        while !block.is_empty() {
            let len = take_varint(&mut block).unwrap() as usize;
            let (record, rest) = block.split_at(len);
            records.push(Record::from_bytes(record).unwrap());
            block = rest;
        }
        records
    }

    fn whole_snapshot(keys: &mut Keys, now: u64) -> Vec<u8> {
        let (mut cursor, mut out) = (None, Vec::new());
        keys.pin(Revision(now));
        while keys.snapshot_slice(&mut cursor, Revision(now), 1 << 20, &mut out) {}
        keys.unpin();
        out
    }

    /// The bytes load into a store that answers everything as the model at the beginning of the snapshot would, and
    /// that writes the same bytes.
    fn check_snapshot(bytes: &[u8], model: &Model) {
        let mut keys = Keys::load(decode(bytes).into_iter(), Revision(model.compacted)).unwrap();
        check_memory(&keys);
        for at in model.compacted.max(1)..=model.now {
            check_range(&keys, model, &Range { revision: at as i64, ..Range::of(everything()) });
            check_range(&keys, model, &Range { revision: at as i64, limit: 2, ..Range::of(everything()) });
        }
        check_changes(&keys, model, &everything(), model.compacted.max(1), 100);
        assert_eq!(whole_snapshot(&mut keys, model.now), bytes);
        while keys.maintain(3) {}
        assert_eq!(whole_snapshot(&mut keys, model.now), bytes);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        /// K1 to K5 under any order of commits, rollbacks, compactions, maintenance and snapshot slices.
        #[test]
        fn agrees_with_the_naive_store(steps in prop::collection::vec(step(), 1..160)) {
            let mut pair = Pair::new();
            for step in &steps {
                pair.run(step);
            }
            let Pair { mut keys, mut model, .. } = pair;
            keys.unpin();
            while keys.maintain(2) {}
            // What is left after all maintenance is what a member that loads the snapshot would have.
            let records = decode(&whole_snapshot(&mut keys, model.now));
            let loaded = Keys::load(records.into_iter(), Revision(model.compacted)).unwrap();
            assert_eq!(loaded.memory(), keys.memory());
            // Everything deleted and compacted: nothing is left.
            model.now += 1;
            let names: Vec<Vec<u8>> = keys.live(&everything()).map(|r| r.key().to_vec()).collect();
            for (index, name) in names.iter().enumerate() {
                keys.delete(name, Revision(model.now), index as u32).unwrap();
            }
            keys.compact(Revision(model.now + 1));
            while keys.maintain(5) {}
            let empty = KeysMemory { compacted: Revision(model.now + 1), ..KeysMemory::default() };
            assert_eq!(keys.memory(), empty);
        }
    }

    #[test]
    fn a_snapshot_out_of_order_is_refused() {
        let mut keys = Keys::new();
        for n in 0..3 {
            keys.put(key(n).as_bytes(), b"v", b"", SessionId(0), Revision(2), u32::from(n));
        }
        let mut records = decode(&whole_snapshot(&mut keys, 2));
        assert!(Keys::load(records.clone().into_iter(), Revision(0)).is_some());
        records.push(records[2].clone());
        assert!(Keys::load(records.clone().into_iter(), Revision(0)).is_none());
        records.truncate(3);
        records.swap(0, 1);
        assert!(Keys::load(records.into_iter(), Revision(0)).is_none());
    }

    #[test]
    fn unsound_record_bytes_are_refused() {
        let meta = Meta { mod_revision: Revision(300), version: 1, ..Meta::default() };
        let record = Record::new(key(1).as_bytes(), meta, b"tail", b"");
        let bytes = record.as_bytes();
        assert_eq!(Record::from_bytes(bytes).as_ref(), Some(&record));
        // Without a value every shorter piece lacks something.
        (0..bytes.len()).for_each(|n| assert_eq!(Record::from_bytes(&bytes[..n]), None, "{n} bytes"));
        let flag = 4 + record.key().len();
        let mut bad = bytes.to_vec();
        bad[flag] = 2;
        assert_eq!(Record::from_bytes(&bad), None);
        let mut bad = bytes.to_vec();
        bad[0] = 0xff;
        assert_eq!(Record::from_bytes(&bad), None);
    }

    /// The quirk that `Keys::range` names, as clients of etcd see it.
    #[test]
    fn without_an_order_the_limit_cuts_before_the_sort() {
        let mut keys = Keys::new();
        for (revision, n) in [(2, 4), (3, 2), (4, 0)] {
            keys.put(key(n).as_bytes(), b"v", b"", SessionId(0), Revision(revision), 0);
        }
        let names = |order| {
            let range = Range { limit: 1, order, sort_by: SortBy::ModRevision, ..Range::of(everything()) };
            let reply = keys.range(&range, Revision(4)).unwrap();
            assert!(reply.more && reply.count == 3);
            reply.records.iter().map(|r| r.name().to_vec()).collect::<Vec<_>>()
        };
        assert_eq!(names(Order::Ascending), [b"k02"]);
        assert_eq!(names(Order::None), [b"k01"]);
        assert_eq!(names(Order::Descending), [b"k00"]);
    }
}
