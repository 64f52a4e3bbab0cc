//! The changes since the compacted revision, in (revision, index) order.
//!
//! A queue in chunks: adding never moves what is there, so a long history causes no stall, and any position is found
//! directly.

use crate::record::Record;
use std::collections::VecDeque;

/// Changes in a chunk, 16 KiB.
const CHUNK: usize = 1024;

pub(crate) struct Log {
    // Full, but for the first, which has lost `taken` changes from its front, and the last. None is empty.
    chunks: VecDeque<VecDeque<Record>>,
    taken: usize,
    len: usize,
}

impl Log {
    pub(crate) fn new() -> Self {
        Self { chunks: VecDeque::new(), taken: 0, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn first(&self) -> Option<&Record> {
        self.chunks.front()?.front()
    }

    pub(crate) fn last(&self) -> Option<&Record> {
        self.chunks.back()?.back()
    }

    pub(crate) fn get(&self, at: usize) -> Option<&Record> {
        let slot = self.taken + at;
        let chunk = self.chunks.get(slot / CHUNK)?;
        chunk.get(if slot < CHUNK { at } else { slot % CHUNK })
    }

    /// The first position whose change is not `before`, which must be true for a leading part only.
    pub(crate) fn seek(&self, before: impl Fn(&Record) -> bool) -> usize {
        let (mut low, mut high) = (0, self.len);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.get(middle).is_some_and(&before) { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// The changes from a position on.
    pub(crate) fn iter(&self, from: usize) -> impl Iterator<Item = &Record> {
        let first = (self.taken + from) / CHUNK;
        let skipped = if first == 0 { from } else { (self.taken + from) % CHUNK };
        self.chunks.range(first.min(self.chunks.len())..).flatten().skip(skipped)
    }

    pub(crate) fn push(&mut self, record: Record) {
        debug_assert!(self.last().is_none_or(|last| last.order() < record.order()), "changes come in order");
        if (self.taken + self.len).is_multiple_of(CHUNK) {
            self.chunks.push_back(VecDeque::with_capacity(CHUNK));
        }
        if let Some(chunk) = self.chunks.back_mut() {
            chunk.push_back(record);
            self.len += 1;
        }
    }

    pub(crate) fn pop_first(&mut self) -> Option<Record> {
        let chunk = self.chunks.front_mut()?;
        let record = chunk.pop_front()?;
        self.taken += 1;
        self.len -= 1;
        if chunk.is_empty() {
            self.chunks.pop_front();
            self.taken = 0;
        }
        Some(record)
    }

    pub(crate) fn pop_last(&mut self) -> Option<Record> {
        let chunk = self.chunks.back_mut()?;
        let record = chunk.pop_back()?;
        self.len -= 1;
        if chunk.is_empty() {
            self.chunks.pop_back();
            if self.len == 0 {
                self.taken = 0;
            }
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Meta;
    use crate::types::Revision;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

        #[test]
        fn is_a_queue_with_positions(steps in prop::collection::vec((0u8..4, 1usize..1500), 1..40)) {
            let (mut log, mut model, mut next) = (Log::new(), VecDeque::new(), 1u64);
            for (what, many) in steps {
                for _ in 0..many {
                    match what {
                        0 | 1 => {
                            let meta = Meta { mod_revision: Revision(next), ..Meta::default() };
                            log.push(Record::new(b"\x01\0\0\0\0k", meta, b"", b""));
                            model.push_back(next);
                            next += 1;
                        }
                        2 => assert_eq!(log.pop_first().map(|r| r.mod_revision().0), model.pop_front()),
                        _ => assert_eq!(log.pop_last().map(|r| r.mod_revision().0), model.pop_back()),
                    }
                }
                assert_eq!(log.len(), model.len());
                assert_eq!(log.first().map(|r| r.mod_revision().0), model.front().copied());
                for from in [0, 1, model.len() / 2, model.len()] {
                    assert!(log.iter(from).map(|r| r.mod_revision().0).eq(model.iter().skip(from).copied()));
                    assert_eq!(log.get(from).map(|r| r.mod_revision().0), model.get(from).copied());
                    let bound = model.get(from).copied().unwrap_or(next);
                    assert_eq!(log.seek(|r| r.mod_revision().0 < bound), from.min(model.len()));
                }
            }
        }
    }
}
