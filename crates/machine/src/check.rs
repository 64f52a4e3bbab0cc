//! What is wrong with a transaction before any state is looked at: etcd's checks, in etcd's order, with etcd's gaps.
//!
//! Promises. C1: a transaction that real etcd refuses for an empty key, too many operations or a key written twice is refused
//! here for the same, and one that it lets through is let through. Clients see the difference, so its odd corners are kept:
//! a delete "from this key on" is never found to overlap, and of two nested transactions the first's puts are not
//! held against the second's deletes.
//! Relies on. Only the limit of operations, which is state.

use crate::command::*;
use crate::conditions;
use crate::reply::Rejection;
use crate::types::*;
use std::collections::{BTreeMap, BTreeSet};

/// All checks of a whole transaction.
pub(crate) fn check(txn: &Txn, ops_max: u64) -> Result<(), Rejection> {
    // Requirements stand in both lists, whichever will run.
    let required = txn.requires.len() + required(&txn.then).max(required(&txn.otherwise));
    let ops = required.max(lists_max(&txn.compares, &txn.then, &txn.otherwise));
    check_lists(&txn.compares, &txn.then, &txn.otherwise, ops as u64, ops_max)?;
    // Overlaps come after, so that the cost of looking for them is bounded.
    for ops in [&txn.then, &txn.otherwise] {
        if may_overlap(ops) {
            check_overlaps(ops)?;
        }
    }
    Ok(())
}

fn lists_max(compares: &[Compare], then: &[Op], otherwise: &[Op]) -> usize {
    // What was added to a list by whoever read the request counts as nothing.
    let len = |ops: &[Op]| ops.iter().filter(|op| conditions::is_said(op)).count();
    compares.len().max(len(then)).max(len(otherwise))
}

fn required(ops: &[Op]) -> usize {
    ops.iter().filter(|op| conditions::is_required(op)).count()
}

fn check_lists(compares: &[Compare], then: &[Op], otherwise: &[Op], ops: u64, max: u64) -> Result<(), Rejection> {
    if ops > max {
        return Err(Rejection::TooManyOps { ops, max });
    }
    let mut of_keys = compares.iter().filter(|c| !matches!(c.target, CompareTarget::Condition(_)));
    of_keys.try_for_each(|c| check_key(&c.span.start))?;
    then.iter().chain(otherwise).try_for_each(|op| check_op(op, max - ops))
}

fn check_op(op: &Op, max: u64) -> Result<(), Rejection> {
    match op {
        Op::Put(p) => check_key(&p.key),
        Op::Delete(d) => check_key(&d.span.start),
        Op::Range(r) => check_key(&r.span.start),
        Op::Txn(sub) => {
            let ops = lists_max(&sub.compares, &sub.then, &sub.otherwise) as u64;
            check_lists(&sub.compares, &sub.then, &sub.otherwise, ops, max)
        }
        _ => Ok(()),
    }
}

/// A key that can be asked for: it has a name, and it is of the space whose keys this version serves.
pub(crate) fn check_key(key: &Key) -> Result<(), Rejection> {
    if key.name().is_empty() {
        return Err(Rejection::EmptyKey);
    }
    if key.as_bytes()[0] != Space::Keys as u8 {
        return Err(Rejection::Invalid { why: "only the key space can be read and written by key".into() });
    }
    Ok(())
}

/// One operation cannot overlap with itself; most transactions are that.
fn may_overlap(ops: &[Op]) -> bool {
    match ops {
        [] => false,
        [op] => matches!(op, Op::Txn(_)),
        _ => ops.iter().any(|op| matches!(op, Op::Put(_) | Op::Txn(_))),
    }
}

fn check_overlaps(ops: &[Op]) -> Result<(), Rejection> {
    written(ops).map(drop)
}

/// What a list of operations may write: the keys that it puts, and what it deletes.
#[derive(Default)]
struct Written<'a> {
    puts: BTreeSet<&'a [u8]>,
    deletes: Deletes<'a>,
}

fn written<'a>(ops: &'a [Op]) -> Result<Written<'a>, Rejection> {
    let mut all = Written::default();
    for op in ops {
        if let Op::Delete(d) = op {
            all.deletes.add(&d.span);
        }
    }
    for op in ops {
        if let Op::Txn(sub) = op {
            all.add_nested(written(&sub.then)?, written(&sub.otherwise)?)?;
        }
    }
    for op in ops {
        if let Op::Put(p) = op {
            all.put(p.key.as_bytes())?;
        }
    }
    Ok(all)
}

impl<'a> Written<'a> {
    fn put(&mut self, key: &'a [u8]) -> Result<(), Rejection> {
        if self.deletes.contains(key) || !self.puts.insert(key) {
            return Err(Rejection::DuplicateKey);
        }
        Ok(())
    }

    /// Only one of the two lists will run, so a key may be put in both.
    fn add_nested(&mut self, then: Written<'a>, otherwise: Written<'a>) -> Result<(), Rejection> {
        for key in &then.puts {
            self.put(key)?;
        }
        for key in &otherwise.puts {
            if self.deletes.contains(key) || (!self.puts.insert(key) && !then.puts.contains(key)) {
                return Err(Rejection::DuplicateKey);
            }
        }
        self.deletes.merge(then.deletes);
        self.deletes.merge(otherwise.deletes);
        Ok(())
    }
}

/// A union of deleted spans.
#[derive(Default)]
struct Deletes<'a> {
    points: BTreeSet<&'a [u8]>,
    /// Start to end, apart from one another.
    ranges: BTreeMap<&'a [u8], &'a [u8]>,
}

impl<'a> Deletes<'a> {
    fn add(&mut self, span: &'a Span) {
        let start = span.start.as_bytes();
        match span.end.as_ref().map(Key::as_bytes) {
            None => drop(self.points.insert(start)),
            // "From this key on" is an end before every key in etcd's check.
            Some(end) if end.len() <= Key::PREFIX || end <= start => {}
            Some(end) => self.add_range(start, end),
        }
    }

    fn add_range(&mut self, mut start: &'a [u8], mut end: &'a [u8]) {
        while let Some((&s, &e)) = self.ranges.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            start = start.min(s);
            end = end.max(e);
            self.ranges.remove(s);
        }
        self.ranges.insert(start, end);
    }

    fn contains(&self, key: &[u8]) -> bool {
        self.points.contains(key) || self.ranges.range(..=key).next_back().is_some_and(|(_, end)| key < *end)
    }

    fn merge(&mut self, other: Self) {
        self.points.extend(other.points);
        for (start, end) in other.ranges {
            self.add_range(start, end);
        }
    }
}
