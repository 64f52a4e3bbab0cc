//! Which watchers a changed key concerns: an index of single keys and of ranges.
//!
//! Promises. S1: a lookup costs O(depth + matches), whatever the number of watchers: one hash of the key, and a walk of a balanced
//! tree that enters only subtrees reaching beyond the key. S2: watchers of one span share one group, so ten thousand watchers of one
//! key are one entry. S3: insertion and removal cost O(depth).
//! Not promised. Any order among the watchers that are found.

use std::collections::HashMap;

use tenure_machine::Span;

/// The number of a watcher, given by the owner of the index.
pub(crate) type WatcherId = u32;

const NONE: u32 = u32::MAX;

#[derive(Default)]
pub(crate) struct SpanIndex {
    exact: HashMap<Box<[u8]>, Vec<WatcherId>>,
    ranges: RangeTree,
    len: usize,
}

impl SpanIndex {
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a watcher and tells its place in its group, which removal asks for.
    pub(crate) fn insert(&mut self, span: &Span, id: WatcherId) -> usize {
        self.len += 1;
        let group = match &span.end {
            None => self.exact.entry(span.start.as_bytes().into()).or_default(),
            Some(end) => self.ranges.group(span.start.as_bytes(), end.as_bytes()),
        };
        group.push(id);
        group.len() - 1
    }

    /// Removes the watcher at `place` of its group. The watcher that takes its place, if any, is returned: its place is now that one.
    pub(crate) fn remove(&mut self, span: &Span, place: usize) -> Option<WatcherId> {
        self.len -= 1;
        match &span.end {
            None => {
                let group =
                    self.exact.get_mut(span.start.as_bytes()).expect("a watcher is removed from where it was inserted");
                group.swap_remove(place);
                let moved = group.get(place).copied();
                if group.is_empty() {
                    self.exact.remove(span.start.as_bytes());
                }
                moved
            }
            Some(end) => {
                let (start, end) = (span.start.as_bytes(), end.as_bytes());
                let group = self.ranges.group(start, end);
                group.swap_remove(place);
                let moved = group.get(place).copied();
                if group.is_empty() {
                    self.ranges.remove(start, end);
                }
                moved
            }
        }
    }

    /// Appends the watchers whose span contains `key`.
    pub(crate) fn find(&self, key: &[u8], out: &mut Vec<WatcherId>) {
        if let Some(group) = self.exact.get(key) {
            out.extend_from_slice(group);
        }
        self.ranges.find(self.ranges.root, key, out);
    }
}

/// A treap of ranges ordered by (start, end), where each node knows the furthest end below it.
struct RangeTree {
    nodes: Vec<Node>,
    free: Vec<u32>,
    root: u32,
    /// Drives the balance; not secret and not random across runs.
    seed: u32,
}

struct Node {
    start: Box<[u8]>,
    end: Box<[u8]>,
    group: Vec<WatcherId>,
    priority: u32,
    left: u32,
    right: u32,
    /// The node of this subtree with the greatest end.
    furthest: u32,
}

impl Default for RangeTree {
    fn default() -> Self {
        Self { nodes: Vec::new(), free: Vec::new(), root: NONE, seed: 0x9e37_79b9 }
    }
}

impl RangeTree {
    fn node(&self, at: u32) -> &Node {
        &self.nodes[at as usize]
    }

    fn node_mut(&mut self, at: u32) -> &mut Node {
        &mut self.nodes[at as usize]
    }

    /// The group of exactly this range, made if it is not there.
    fn group(&mut self, start: &[u8], end: &[u8]) -> &mut Vec<WatcherId> {
        let at = match self.seek(start, end) {
            Some(at) => at,
            None => self.add(start, end),
        };
        &mut self.node_mut(at).group
    }

    fn seek(&self, start: &[u8], end: &[u8]) -> Option<u32> {
        let mut at = self.root;
        while at != NONE {
            let node = self.node(at);
            at = match (start, end).cmp(&(&*node.start, &*node.end)) {
                std::cmp::Ordering::Less => node.left,
                std::cmp::Ordering::Equal => return Some(at),
                std::cmp::Ordering::Greater => node.right,
            };
        }
        None
    }

    fn add(&mut self, start: &[u8], end: &[u8]) -> u32 {
        // xorshift: a priority only has to be unrelated to the order of the keys.
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 17;
        self.seed ^= self.seed << 5;
        let node = Node {
            start: start.into(),
            end: end.into(),
            group: Vec::new(),
            priority: self.seed,
            left: NONE,
            right: NONE,
            furthest: NONE,
        };
        let at = match self.free.pop() {
            Some(at) => {
                *self.node_mut(at) = node;
                at
            }
            None => {
                self.nodes.push(node);
                (self.nodes.len() - 1) as u32
            }
        };
        self.node_mut(at).furthest = at;
        let (below, above) = self.split(self.root, start, end);
        let left = self.merge(below, at);
        self.root = self.merge(left, above);
        at
    }

    fn remove(&mut self, start: &[u8], end: &[u8]) {
        let Some(at) = self.seek(start, end) else { return };
        self.root = self.without(self.root, start, end);
        let node = self.node_mut(at);
        node.start = Box::default();
        node.end = Box::default();
        node.group = Vec::new();
        self.free.push(at);
    }

    fn without(&mut self, at: u32, start: &[u8], end: &[u8]) -> u32 {
        if at == NONE {
            return NONE;
        }
        let (left, right) = (self.node(at).left, self.node(at).right);
        match (start, end).cmp(&(&*self.node(at).start, &*self.node(at).end)) {
            std::cmp::Ordering::Less => {
                let left = self.without(left, start, end);
                self.node_mut(at).left = left;
            }
            std::cmp::Ordering::Greater => {
                let right = self.without(right, start, end);
                self.node_mut(at).right = right;
            }
            std::cmp::Ordering::Equal => return self.merge(left, right),
        }
        self.refresh(at);
        at
    }

    /// Nodes before (start, end), and the rest.
    fn split(&mut self, at: u32, start: &[u8], end: &[u8]) -> (u32, u32) {
        if at == NONE {
            return (NONE, NONE);
        }
        let node = self.node(at);
        if (&*node.start, &*node.end) < (start, end) {
            let (below, above) = self.split(node.right, start, end);
            self.node_mut(at).right = below;
            self.refresh(at);
            (at, above)
        } else {
            let (below, above) = self.split(node.left, start, end);
            self.node_mut(at).left = above;
            self.refresh(at);
            (below, at)
        }
    }

    /// Joins two trees; every node of `a` is before every node of `b`.
    fn merge(&mut self, a: u32, b: u32) -> u32 {
        if a == NONE || b == NONE {
            return if a == NONE { b } else { a };
        }
        if self.node(a).priority > self.node(b).priority {
            let right = self.merge(self.node(a).right, b);
            self.node_mut(a).right = right;
            self.refresh(a);
            a
        } else {
            let left = self.merge(a, self.node(b).left);
            self.node_mut(b).left = left;
            self.refresh(b);
            b
        }
    }

    fn refresh(&mut self, at: u32) {
        let node = self.node(at);
        let mut furthest = at;
        for child in [node.left, node.right] {
            if child != NONE {
                let candidate = self.node(child).furthest;
                if self.node(candidate).end > self.node(furthest).end {
                    furthest = candidate;
                }
            }
        }
        self.node_mut(at).furthest = furthest;
    }

    fn find(&self, at: u32, key: &[u8], out: &mut Vec<WatcherId>) {
        if at == NONE || &*self.node(self.node(at).furthest).end <= key {
            return;
        }
        let node = self.node(at);
        self.find(node.left, key, out);
        if &*node.start <= key {
            if key < &*node.end {
                out.extend_from_slice(&node.group);
            }
            self.find(node.right, key, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tenure_machine::{NamespaceId, Space};

    fn span(start: &str, end: &str) -> Span {
        Span::etcd(Space::Keys, NamespaceId::DEFAULT, start.as_bytes(), end.as_bytes())
    }

    /// Against a plain list, with insertions and removals in a fixed irregular order.
    #[test]
    fn agrees_with_a_list() {
        let mut index = SpanIndex::default();
        let mut places: Vec<Option<(Span, usize)>> = Vec::new();
        let mut seed = 7u64;
        let mut draw = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for step in 0..4000 {
            if draw(3) < 2 || places.iter().all(Option::is_none) {
                let start = format!("k{:02}", draw(40));
                let end = match draw(4) {
                    0 => String::new(),
                    1 => "\0".to_owned(),
                    _ => format!("k{:02}", draw(60)),
                };
                let span = span(&start, &end);
                let place = index.insert(&span, places.len() as u32);
                places.push(Some((span, place)));
            } else {
                let live: Vec<usize> = (0..places.len()).filter(|&at| places[at].is_some()).collect();
                let at = live[draw(live.len() as u64) as usize];
                let (span, place) = places[at].take().unwrap();
                if let Some(moved) = index.remove(&span, place) {
                    places[moved as usize].as_mut().unwrap().1 = place;
                }
            }
            if step % 7 == 0 {
                let key =
                    tenure_machine::Key::new(Space::Keys, NamespaceId::DEFAULT, format!("k{:02}", draw(60)).as_bytes());
                let mut found = Vec::new();
                index.find(key.as_bytes(), &mut found);
                found.sort_unstable();
                let expected: Vec<u32> = (0..places.len() as u32)
                    .filter(|&at| places[at as usize].as_ref().is_some_and(|(span, _)| span.contains(key.as_bytes())))
                    .collect();
                assert_eq!(found, expected, "{key:?}");
            }
        }
    }

    #[test]
    fn empties() {
        let mut index = SpanIndex::default();
        let one = span("a", "c");
        let place = index.insert(&one, 3);
        assert_eq!(index.remove(&one, place), None);
        assert!(index.is_empty());
        let mut found = Vec::new();
        index.find(one.start.as_bytes(), &mut found);
        assert!(found.is_empty());
    }
}
