//! What the consensus library asks of the log, from memory.
//!
//! Promises. The newest entries are here: all that are not applied, and what slow peers are likely to need. Terms are kept for every
//! entry, as runs. Relies on. The driver writes entries and hard state to `log.rs` in the same step in which it puts them here, and
//! reads older entries back from there when the library was told to wait for them.

use crate::snapshot::Meta;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot, SnapshotMetadata};
use raft::util::limit_size;
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

pub(crate) struct Store {
    pub(crate) hard_state: HardState,
    pub(crate) conf_state: ConfState,
    /// The entry before the first, and its term.
    before: (u64, u64),
    /// Runs of one term: the first index of each.
    terms: VecDeque<(u64, u64)>,
    last: u64,
    /// The newest entries, up to `last`.
    cached: VecDeque<Entry>,
    cached_bytes: usize,
    /// Older entries that were read back.
    fetched: Vec<Entry>,
    /// What the library waits for.
    wanted: RefCell<Vec<Wanted>>,
    /// The members are not those of the first start any more.
    pub(crate) members_changed: bool,
    /// The newest snapshot: what a member that lags too far is given.
    pub(crate) newest: Option<Offer>,
    /// The library would send a snapshot that is not there yet: of an entry at or behind this one, with this member in it.
    wants_snapshot: Cell<bool>,
}

/// All that a configuration names, in their roles of before and after a change.
pub(crate) fn everybody(conf: &ConfState) -> impl Iterator<Item = u64> {
    conf.voters.iter().chain(&conf.learners).chain(&conf.voters_outgoing).copied()
}

/// A snapshot file that others may have.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) meta: Meta,
    pub(crate) bytes: u64,
}

pub(crate) struct Wanted {
    pub(crate) low: u64,
    pub(crate) high: u64,
    pub(crate) context: GetEntriesContext,
}

impl Store {
    pub(crate) fn new(hard_state: HardState, conf_state: ConfState, before: (u64, u64), entries: Vec<Entry>) -> Self {
        let mut store = Self {
            hard_state,
            conf_state,
            before,
            terms: VecDeque::new(),
            last: before.0,
            cached: VecDeque::new(),
            cached_bytes: 0,
            fetched: Vec::new(),
            wanted: RefCell::default(),
            members_changed: false,
            newest: None,
            wants_snapshot: Cell::new(false),
        };
        store.append(entries);
        store
    }

    pub(crate) fn append(&mut self, entries: Vec<Entry>) {
        if let Some(first) = entries.first()
            && first.index <= self.last
        {
            self.truncate(first.index);
        }
        for e in entries {
            assert_eq!(e.index, self.last + 1, "entries follow one another");
            if self.terms.back().is_none_or(|&(_, term)| term != e.term) {
                self.terms.push_back((e.index, e.term));
            }
            self.last = e.index;
            self.cached_bytes += e.data.len();
            self.cached.push_back(e);
        }
    }

    fn truncate(&mut self, from: u64) {
        while self.cached.back().is_some_and(|e| e.index >= from) {
            self.cached_bytes -= self.cached.pop_back().map_or(0, |e| e.data.len());
        }
        while self.terms.back().is_some_and(|&(first, _)| first >= from) {
            self.terms.pop_back();
        }
        self.fetched.clear();
        self.last = from - 1;
    }

    /// Lets go of applied entries beyond `keep_bytes`.
    pub(crate) fn trim(&mut self, applied: u64, keep_bytes: usize) {
        while self.cached_bytes > keep_bytes || keep_bytes == 0 {
            if self.cached.front().is_none_or(|e| e.index > applied) {
                break;
            }
            self.cached_bytes -= self.cached.pop_front().map_or(0, |e| e.data.len());
        }
        self.fetched.clear();
    }

    /// Entries up to `index` are in a snapshot and will not be asked for.
    pub(crate) fn compact(&mut self, index: u64) {
        let Some(term) = self.term_of(index) else { return };
        while self.cached.front().is_some_and(|e| e.index <= index) {
            self.cached_bytes -= self.cached.pop_front().map_or(0, |e| e.data.len());
        }
        while self.terms.get(1).is_some_and(|&(first, _)| first <= index + 1) {
            self.terms.pop_front();
        }
        self.before = (index, term);
    }

    /// A snapshot stands for everything up to its entry, and nothing follows it.
    pub(crate) fn reset(&mut self, index: u64, term: u64, conf: ConfState) {
        self.before = (index, term);
        self.last = index;
        self.terms.clear();
        self.cached.clear();
        self.cached_bytes = 0;
        self.fetched.clear();
        self.wanted.borrow_mut().clear();
        self.conf_state = conf;
    }

    /// Whether a snapshot has been asked for since the last time.
    pub(crate) fn take_wants_snapshot(&self) -> bool {
        self.wants_snapshot.take()
    }

    pub(crate) fn last_index(&self) -> u64 {
        self.last
    }

    pub(crate) fn last(&self) -> (u64, u64) {
        (self.last, self.term_of(self.last).unwrap_or_default())
    }

    pub(crate) fn first_index(&self) -> u64 {
        self.before.0 + 1
    }

    pub(crate) fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.before.0 {
            return Some(self.before.1);
        }
        if index < self.before.0 || index > self.last {
            return None;
        }
        let run = self.terms.partition_point(|&(first, _)| first <= index);
        self.terms.get(run.checked_sub(1)?).map(|&(_, term)| term)
    }

    /// Entries that are here and not applied yet.
    pub(crate) fn after(&self, applied: u64) -> impl Iterator<Item = &Entry> {
        self.cached.iter().filter(move |e| e.index > applied)
    }

    pub(crate) fn take_wanted(&mut self) -> Vec<Wanted> {
        self.wanted.take()
    }

    pub(crate) fn put_fetched(&mut self, entries: Vec<Entry>) {
        self.fetched = entries;
    }

    fn held(&self, low: u64, high: u64) -> Option<Vec<Entry>> {
        let first = self.cached.front().map_or(self.last + 1, |e| e.index);
        if low >= first {
            let (from, to) = ((low - first) as usize, (high - first) as usize);
            return Some(self.cached.range(from..to).cloned().collect());
        }
        let older = self.fetched.first()?.index;
        let from = usize::try_from(low.checked_sub(older)?).ok()?;
        let piece = self.fetched.get(from..self.fetched.len().min((high - older) as usize))?;
        (!piece.is_empty()).then(|| piece.to_vec())
    }
}

impl Storage for Store {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max: impl Into<Option<u64>>,
        context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        // An empty log belongs to a member that joined: the configuration before the first entry is not the one that it has, so it
        // must begin with a snapshot. Of a static start everybody has it.
        let joined_later = low == 1 && context.can_async() && self.members_changed;
        if low < self.first_index() || joined_later {
            return Err(StorageError::Compacted.into());
        }
        assert!(high <= self.last + 1, "entries beyond the end of the log are asked for");
        if let Some(mut entries) = self.held(low, high) {
            limit_size(&mut entries, max.into());
            return Ok(entries);
        }
        if context.can_async() {
            self.wanted.borrow_mut().push(Wanted { low, high, context });
            return Err(StorageError::LogTemporarilyUnavailable.into());
        }
        Err(StorageError::Unavailable.into())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.before.0 {
            return Err(StorageError::Compacted.into());
        }
        self.term_of(index).ok_or_else(|| StorageError::Unavailable.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.before.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last)
    }

    /// Only what the receiver needs to fetch the file: its length. A snapshot from before `to` was a member would not be taken.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let fits = |offer: &&Offer| {
            let conf = &offer.meta.conf.1;
            let knows = everybody(conf).any(|id| id == to);
            knows && offer.meta.index >= request_index && offer.meta.index >= self.before.0
        };
        let Some(offer) = self.newest.as_ref().filter(fits) else {
            self.wants_snapshot.set(true);
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        };
        let metadata =
            SnapshotMetadata { conf_state: offer.meta.conf.1.clone(), index: offer.meta.index, term: offer.meta.term };
        Ok(Snapshot { data: offer.bytes.to_le_bytes().to_vec().into(), metadata })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(terms: &[(u64, u64)]) -> Vec<Entry> {
        terms.iter().map(|&(index, term)| Entry { index, term, data: vec![0; 10].into(), ..Entry::default() }).collect()
    }

    fn store() -> Store {
        let log = entries(&[(1, 1), (2, 1), (3, 2), (4, 2), (5, 4)]);
        Store::new(HardState::default(), ConfState::default(), (0, 0), log)
    }

    #[test]
    fn terms_survive_what_is_trimmed_compacted_and_replaced() {
        let mut s = store();
        let terms = |s: &Store| (0..7).map(|i| s.term_of(i)).collect::<Vec<_>>();
        assert_eq!(terms(&s), [Some(0), Some(1), Some(1), Some(2), Some(2), Some(4), None]);
        s.trim(4, 0);
        assert_eq!(s.after(0).map(|e| e.index).collect::<Vec<_>>(), [5]);
        assert_eq!(terms(&s), [Some(0), Some(1), Some(1), Some(2), Some(2), Some(4), None]);
        s.compact(3);
        assert_eq!(terms(&s), [None, None, None, Some(2), Some(2), Some(4), None]);
        s.append(entries(&[(5, 5), (6, 5)]));
        assert_eq!(terms(&s), [None, None, None, Some(2), Some(2), Some(5), Some(5)]);
        s.compact(6);
        assert_eq!(terms(&s), [None, None, None, None, None, None, Some(5)]);
    }

    #[test]
    fn entries_that_left_memory_are_asked_for() {
        let mut s = store();
        s.trim(4, 0);
        assert!(s.entries(5, 6, None, GetEntriesContext::empty(false)).is_ok());
        assert!(s.entries(2, 6, None, GetEntriesContext::empty(false)).is_err());
        assert!(s.entries(2, 6, None, GetEntriesContext::empty(true)).is_err());
        let wanted = s.take_wanted();
        assert_eq!((wanted[0].low, wanted[0].high), (2, 6));
        s.put_fetched(entries(&[(2, 1), (3, 2)]));
        let got = s.entries(2, 6, None, GetEntriesContext::empty(false)).unwrap();
        assert_eq!(got.iter().map(|e| e.index).collect::<Vec<_>>(), [2, 3]);
    }
}
