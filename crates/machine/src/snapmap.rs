//! A map that can be written to a snapshot in slices while it changes.
//!
//! Promises. The slices after `begin` hold exactly the entries of that moment, in key order, each once. A change
//! costs one clone of an entry more while a snapshot runs and has not passed it, nothing otherwise. Relies on. The
//! caller takes slices to the end or aborts: what was kept aside is held until then.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};

#[derive(Clone, Debug)]
pub(crate) struct SnapMap<K, V> {
    map: BTreeMap<K, V>,
    snapshot: Option<Snapshot<K, V>>,
}

#[derive(Clone, Debug)]
struct Snapshot<K, V> {
    /// The last key that is written.
    written: Option<K>,
    /// What changed entries behind it were at the beginning; `None`: not there.
    aside: BTreeMap<K, Option<V>>,
}

impl<K, V> Default for SnapMap<K, V> {
    fn default() -> Self {
        Self { map: BTreeMap::new(), snapshot: None }
    }
}

impl<K: Ord + Clone, V: Clone> SnapMap<K, V> {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.map.get(key)
    }

    /// The key as it is held here.
    pub(crate) fn key(&self, key: &K) -> Option<&K> {
        self.map.get_key_value(key).map(|(held, _)| held)
    }

    /// The value to be changed; counts as a change.
    pub(crate) fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        self.keep_aside(key);
        self.map.get_mut(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.keep_aside(&key);
        self.map.insert(key, value)
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        self.keep_aside(key);
        self.map.remove(key)
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.map.iter()
    }

    pub(crate) fn range<R: RangeBounds<K>>(&self, range: R) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.map.range(range)
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// Starts a snapshot of what is there now.
    pub(crate) fn begin(&mut self) {
        assert!(self.snapshot.is_none(), "one snapshot at a time");
        self.snapshot = Some(Snapshot { written: None, aside: BTreeMap::new() });
    }

    /// The next entries as they were at `begin`. Fewer than asked for (perhaps none): that was the end, and the
    /// snapshot is over.
    pub(crate) fn next_slice(&mut self, max_entries: usize) -> Vec<(K, V)> {
        let mut slice = Vec::new();
        let Some(snapshot) = &mut self.snapshot else { return slice };
        let max = max_entries.max(1);
        while slice.len() < max {
            let from = snapshot.written.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
            let now = self.map.range((from, Bound::Unbounded)).next();
            // Everything that is written has left `aside`.
            let old = snapshot.aside.first_key_value();
            let (key, value) = match (now, old) {
                (None, None) => {
                    self.snapshot = None;
                    break;
                }
                (Some((n, v)), old) if old.is_none_or(|(o, _)| n < o) => (n.clone(), Some(v.clone())),
                (_, Some((o, v))) => (o.clone(), v.clone()),
                (Some((n, v)), None) => (n.clone(), Some(v.clone())),
            };
            snapshot.aside.remove(&key);
            snapshot.written = Some(key.clone());
            slice.extend(value.map(|v| (key, v)));
        }
        slice
    }

    pub(crate) fn abort(&mut self) {
        self.snapshot = None;
    }

    fn keep_aside(&mut self, key: &K) {
        let Some(snapshot) = &mut self.snapshot else { return };
        let unwritten = snapshot.written.as_ref().is_none_or(|w| w < key);
        if unwritten && !snapshot.aside.contains_key(key) {
            snapshot.aside.insert(key.clone(), self.map.get(key).cloned());
        }
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for SnapMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Self { map: entries.into_iter().collect(), snapshot: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u8, u32),
        Remove(u8),
        Change(u8, u32),
        Begin,
        Slice(usize),
        Abort,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0u8..40, any::<u32>()).prop_map(|(k, v)| Step::Insert(k, v)),
            3 => (0u8..40).prop_map(Step::Remove),
            3 => (0u8..40, any::<u32>()).prop_map(|(k, v)| Step::Change(k, v)),
            2 => Just(Step::Begin),
            3 => (1usize..9).prop_map(Step::Slice),
            1 => Just(Step::Abort),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

        /// Whatever changes between the slices, together they are the map at `begin`.
        #[test]
        fn slices_hold_the_map_at_begin(steps in prop::collection::vec(step(), 1..200)) {
            let mut map = SnapMap::new();
            let mut model = BTreeMap::new();
            let mut running: Option<(BTreeMap<u8, u32>, BTreeMap<u8, u32>)> = None;
            for step in steps {
                match step {
                    Step::Insert(k, v) => assert_eq!(map.insert(k, v), model.insert(k, v)),
                    Step::Remove(k) => assert_eq!(map.remove(&k), model.remove(&k)),
                    Step::Change(k, v) => {
                        if let Some(slot) = map.get_mut(&k) {
                            *slot = v;
                        }
                        if let Some(slot) = model.get_mut(&k) {
                            *slot = v;
                        }
                    }
                    Step::Begin if running.is_none() => {
                        map.begin();
                        running = Some((model.clone(), BTreeMap::new()));
                    }
                    Step::Slice(max) => {
                        let slice = map.next_slice(max);
                        match &mut running {
                            None => assert!(slice.is_empty()),
                            Some((begun, got)) => {
                                let over = slice.len() < max;
                                for (k, v) in slice {
                                    assert!(got.last_key_value().is_none_or(|(last, _)| *last < k));
                                    got.insert(k, v);
                                }
                                if over {
                                    assert_eq!(begun, got);
                                    running = None;
                                }
                            }
                        }
                    }
                    Step::Abort => {
                        map.abort();
                        running = None;
                    }
                    Step::Begin => {}
                }
                assert!(map.iter().eq(model.iter()));
                assert_eq!(map.len(), model.len());
            }
        }
    }
}
