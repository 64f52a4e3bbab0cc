//! An ordered list in chunks: the index of the keys.
//!
//! Promises. Items stay in the order in which they are placed; finding costs a binary search, adding and taking out a
//! short move within one chunk, counting what lies between two places one addition per chunk, and iterating walks
//! plain slices.
//! Not promised. The order itself: the caller finds the place with `seek` and must place an item where it belongs.
//!
//! Why not `BTreeSet`: filled in order, its nodes stay half empty (38 bytes for a slot of 16, here 16; in random order 25
//! and 22), it cannot count without walking, and finding one of a million keys takes it a fifth longer.

/// Items in a chunk. A move within a chunk of 16-byte slots is then at most 2 KiB, and a million keys have about ten
/// thousand chunks.
const CHUNK: usize = 128;

pub(crate) struct Ordered<T> {
    // No chunk is ever empty.
    chunks: Vec<Vec<T>>,
    len: usize,
}

/// Where an item is; the end has the slot 0 of the chunk after the last. Any change makes a place stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    chunk: usize,
    slot: usize,
}

impl<T> Ordered<T> {
    pub(crate) fn new() -> Self {
        Self { chunks: Vec::new(), len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn first(&self) -> Place {
        Place { chunk: 0, slot: 0 }
    }

    pub(crate) fn end(&self) -> Place {
        Place { chunk: self.chunks.len(), slot: 0 }
    }

    /// The first item for which `before` is false; it must be true for a leading part of the list only.
    pub(crate) fn seek(&self, before: impl Fn(&T) -> bool) -> Place {
        let chunk = search(&self.chunks, |c| c.last().is_some_and(&before));
        match self.chunks.get(chunk) {
            Some(c) => Place { chunk, slot: search(c, before) },
            None => self.end(),
        }
    }

    pub(crate) fn at(&self, place: Place) -> Option<&T> {
        self.chunks.get(place.chunk)?.get(place.slot)
    }

    /// The item before a place.
    pub(crate) fn before(&self, place: Place) -> Option<&T> {
        match place.slot {
            0 => self.chunks.get(place.chunk.checked_sub(1)?)?.last(),
            slot => self.chunks.get(place.chunk)?.get(slot - 1),
        }
    }

    pub(crate) fn next(&self, place: Place) -> Place {
        match self.chunks.get(place.chunk) {
            Some(c) if place.slot + 1 < c.len() => Place { slot: place.slot + 1, ..place },
            _ => Place { chunk: place.chunk + 1, slot: 0 },
        }
    }

    /// How many items lie from `from` up to and without `to`.
    pub(crate) fn between(&self, from: Place, to: Place) -> usize {
        self.slices(from, to).map(<[T]>::len).sum()
    }

    pub(crate) fn iter(&self, from: Place, to: Place) -> impl Iterator<Item = &T> {
        self.slices(from, to).flatten()
    }

    /// The items from `from` up to and without `to`, as the slices in which they are kept.
    pub(crate) fn slices(&self, from: Place, to: Place) -> impl Iterator<Item = &[T]> {
        // One chunk more than `to` names where it is the end, whose slot 0 adds nothing.
        (from.chunk..=to.chunk.max(from.chunk)).filter_map(move |i| {
            let chunk = self.chunks.get(i)?;
            let start = if i == from.chunk { from.slot } else { 0 };
            let end = if i < to.chunk { chunk.len() } else { to.slot };
            (i <= to.chunk).then(|| chunk.get(start..end)).flatten()
        })
    }

    pub(crate) fn replace(&mut self, place: Place, item: T) -> T {
        std::mem::replace(&mut self.chunks[place.chunk][place.slot], item)
    }

    /// Puts an item before the one at `place`.
    pub(crate) fn insert(&mut self, place: Place, item: T) {
        self.len += 1;
        // The end of the chunk before is the same position: filling it first keeps the chunks of rising keys full.
        if place.slot == 0
            && let Some(previous) = place.chunk.checked_sub(1)
            && self.chunks[previous].len() < CHUNK
        {
            self.chunks[previous].push(item);
        } else if place.chunk == self.chunks.len() {
            let mut chunk = Vec::with_capacity(CHUNK);
            chunk.push(item);
            self.chunks.push(chunk);
        } else if self.chunks[place.chunk].len() < CHUNK {
            self.chunks[place.chunk].insert(place.slot, item);
        } else {
            self.split(place.chunk);
            let half = CHUNK / 2;
            if place.slot <= half {
                self.chunks[place.chunk].insert(place.slot, item);
            } else {
                self.chunks[place.chunk + 1].insert(place.slot - half, item);
            }
        }
    }

    fn split(&mut self, chunk: usize) {
        let mut upper = Vec::with_capacity(CHUNK);
        upper.extend(self.chunks[chunk].drain(CHUNK / 2..));
        self.chunks.insert(chunk + 1, upper);
    }

    /// Takes an item out; also gives the place of the item that followed it.
    pub(crate) fn remove(&mut self, place: Place) -> (T, Place) {
        self.len -= 1;
        let item = self.chunks[place.chunk].remove(place.slot);
        let Place { chunk, slot } = self.tidy(place);
        let at_end = self.chunks.get(chunk).is_some_and(|c| slot == c.len());
        (item, if at_end { Place { chunk: chunk + 1, slot: 0 } } else { Place { chunk, slot } })
    }

    /// Drops an empty chunk and joins a sparse one with a neighbour, so that deletions give memory back. Says where
    /// the position `place` is then.
    fn tidy(&mut self, place: Place) -> Place {
        let len = |list: &Self, chunk: usize| list.chunks.get(chunk).map_or(CHUNK, Vec::len);
        let here = len(self, place.chunk);
        let room = CHUNK * 3 / 4;
        if here == 0 {
            self.chunks.remove(place.chunk);
        } else if here <= CHUNK / 4 && here + len(self, place.chunk + 1) <= room {
            self.join(place.chunk);
        } else if here <= CHUNK / 4
            && let Some(chunk) = place.chunk.checked_sub(1)
            && here + len(self, chunk) <= room
        {
            let slot = len(self, chunk) + place.slot;
            self.join(chunk);
            return Place { chunk, slot };
        }
        place
    }

    fn join(&mut self, chunk: usize) {
        let mut next = self.chunks.remove(chunk + 1);
        self.chunks[chunk].append(&mut next);
    }
}

/// The first position of a sorted slice whose item is not `before`.
///
/// The last few items are walked: comparing each costs a cache miss, and the processor fetches ahead along a walk but not
/// along a bisection. In a million keys that saves a third of the time.
fn search<T>(items: &[T], before: impl Fn(&T) -> bool) -> usize {
    const WALK: usize = 4;
    let (mut low, mut high) = (0, items.len());
    while high - low > WALK {
        let middle = low + (high - low) / 2;
        if before(&items[middle]) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    while low < high && before(&items[low]) {
        low += 1;
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// Any mix of additions and removals, in rising, falling and random order, is a sorted set.
        #[test]
        fn is_a_sorted_set(steps in prop::collection::vec((any::<bool>(), 0u16..2000, 1u16..400), 1..60)) {
            let (mut list, mut model) = (Ordered::new(), BTreeSet::new());
            for (add, start, many) in steps {
                for i in 0..many {
                    let n = start.wrapping_add(i.wrapping_mul(if many % 2 == 0 { 1 } else { 37 })) % 3000;
                    let place = list.seek(|&x| x < n);
                    let there = list.at(place) == Some(&n);
                    assert_eq!(there, model.contains(&n));
                    if add && !there {
                        list.insert(place, n);
                        model.insert(n);
                    } else if !add && there {
                        let (removed, next) = list.remove(place);
                        assert_eq!((removed, next), (n, list.seek(|&x| x < n)));
                        model.remove(&n);
                    }
                }
                assert_eq!(list.len(), model.len());
                assert!(list.chunks.iter().all(|c| !c.is_empty() && c.len() <= CHUNK));
                assert!(list.iter(list.first(), list.end()).eq(model.iter()));
                let (from, to) = (list.seek(|&x| x < start), list.seek(|&x| x < start + many));
                assert!(list.iter(from, to).eq(model.range(start..start + many)));
                assert_eq!(list.between(from, to), model.range(start..start + many).count());
                assert_eq!(list.before(from), model.range(..start).next_back());
                assert!(from == to || list.between(to, from) == 0);
                let mut place = from;
                for n in model.range(start..) {
                    assert_eq!(list.at(place), Some(n));
                    place = list.next(place);
                }
                assert_eq!(place, list.end());
            }
        }
    }
}
