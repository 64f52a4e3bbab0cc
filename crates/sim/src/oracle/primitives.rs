//! What the native primitives owe, judged from the answers that clients got.
//!
//! Promises. Every commit has a revision of its own, so the answers have one order, whoever heard them. In it: a counter that is only added to
//! rises by what was added, acknowledged additions all, unknown ones at most once; no number of a sequence is given out twice.
//! Not promised. Anything about operations that nobody was told of, but that they happen at most once.
//! Relies on. Clients that add one at a time, and tell here whenever an outcome stays unknown.

use std::collections::BTreeMap;
use tenure_machine::*;

/// A counter that everybody adds one to.
#[derive(Default)]
struct Count {
    /// What it was after an acknowledged addition, by the revision of that.
    seen: BTreeMap<u64, i64>,
    unknown: i64,
}

#[derive(Default)]
pub struct Primitives {
    counters: BTreeMap<Box<[u8]>, Count>,
    /// The numbers that a commit gave: from, to.
    numbers: BTreeMap<Box<[u8]>, BTreeMap<u64, (u64, u64)>>,
    /// How many answers were judged.
    pub judged: u64,
}

impl Primitives {
    /// An operation was answered; `at` is the revision of its commit.
    pub fn done(&mut self, op: &NativeOp, reply: &NativeReply, at: u64) -> Result<(), String> {
        self.judged += 1;
        match (op, reply) {
            (NativeOp::Counter(CounterOp::Add(add)), NativeReply::Counter(CounterReply::Counted(counter))) => {
                self.counted(&add.name, counter.value, at)
            }
            (NativeOp::Counter(CounterOp::Next(next)), NativeReply::Counter(CounterReply::Numbers(numbers))) => {
                self.numbered(&next.name, numbers.from, numbers.to, at)
            }
            _ => Ok(()),
        }
    }

    /// It may have been done, or may still be.
    pub fn unknown(&mut self, op: &NativeOp) {
        if let NativeOp::Counter(CounterOp::Add(add)) = op {
            self.counters.entry(add.name.clone()).or_default().unknown += 1;
        }
    }

    /// What a member holds that has applied everything.
    pub fn finish(&self, machine: &Machine) -> Result<(), String> {
        for (name, count) in &self.counters {
            let value = machine.object::<Counter>(NamespaceId::DEFAULT, name).map_or(0, |counter| counter.value);
            let acknowledged = count.seen.len() as i64;
            if value < acknowledged || value > acknowledged + count.unknown {
                return Err(format!(
                    "counter {} is {value} after {acknowledged} acknowledged additions and {} unknown ones",
                    name.escape_ascii(),
                    count.unknown
                ));
            }
        }
        Ok(())
    }

    fn counted(&mut self, name: &[u8], value: i64, at: u64) -> Result<(), String> {
        let seen = &mut self.counters.entry(name.into()).or_default().seen;
        let before = seen.range(..at).next_back().is_none_or(|(_, v)| *v < value);
        let after = seen.range(at + 1..).next().is_none_or(|(_, v)| *v > value);
        let same = seen.insert(at, value).is_none_or(|v| v == value);
        if before && after && same {
            return Ok(());
        }
        Err(format!("counter {} is {value} at {at}, among {seen:?}", name.escape_ascii()))
    }

    fn numbered(&mut self, name: &[u8], from: u64, to: u64, at: u64) -> Result<(), String> {
        let given = self.numbers.entry(name.into()).or_default();
        let before = given.range(..at).next_back().is_none_or(|(_, (_, end))| *end <= from);
        let after = given.range(at + 1..).next().is_none_or(|(_, (begin, _))| *begin >= to);
        let same = given.insert(at, (from, to)).is_none_or(|given| given == (from, to));
        if before && after && same && from < to {
            return Ok(());
        }
        Err(format!("sequence {} gives {from} to {to} at {at}, among {given:?}", name.escape_ascii()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_given_twice_and_lost_additions_are_noticed() {
        let mut all = Primitives::default();
        assert!(all.numbered(b"s", 1, 4, 10).is_ok());
        assert!(all.numbered(b"s", 4, 5, 12).is_ok());
        assert!(all.numbered(b"s", 3, 6, 13).is_err());
        assert!(all.counted(b"c", 1, 10).is_ok());
        assert!(all.counted(b"c", 1, 11).is_err());
    }
}
