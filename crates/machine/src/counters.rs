//! Counters and sequences: numbers that many add to without reading them first, and numbers that are given out once.
//!
//! Promises. C1: an addition happens whole or not at all; a result outside of the asked bounds or of 64 bits is refused with the value as it is,
//! and changes nothing. C2: a counter tells the revision of its last change, which never comes again, so that setting and deleting by
//! compare cannot take a later counter of the same name for the earlier one. C3: what a sequence gives out it never gives again: a sequence only
//! moves forward, and is not deleted.
//! Not promised. A sequence without gaps: numbers that were given to someone who died are lost. Whoever needs every number adds to a counter in
//! the transaction that uses the number. Watchers are told of changes, from a ring apart from that of what changes
//! less often.
//! Relies on. Remembered requests: an addition that is sent again under its request id is answered, not repeated.

use crate::apply::{Commit, Machine, invalid};
use crate::coded::{coded_enum, coded_struct};
use crate::native::{Refusal, RefusalCode};
use crate::objects::{self, Lived, ObjectKey};
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::Waiter;

/// The largest number that a sequence gives out, so that it is a positive one for whoever has signed numbers only.
pub const SEQUENCE_MAX: u64 = i64::MAX as u64;
/// Numbers that one call may take from a sequence.
pub const BLOCK_MAX: u64 = 1_000_000_000;

/// What an operation may add beside the name.
const GROWTH: u64 = 256;

coded_struct! {
    /// A counter. One that is not there counts as zero, and is made by the first change of it.
    #[derive(Copy, Eq)]
    pub struct Counter as "a counter" {
        pub value: i64,
        /// The commit of its last change.
        pub changed: Revision,
    }
}

coded_struct! {
    /// A sequence. One that is not there begins at 1.
    #[derive(Copy, Eq)]
    pub struct Sequence as "a sequence" {
        /// The first number that nobody was given.
        pub next: u64,
        /// The commit that moved it last.
        pub changed: Revision,
    }
}

impl Lived for Counter {
    const BUSY: bool = true;

    fn bytes(&self) -> u64 {
        0
    }
}

impl Lived for Sequence {
    const BUSY: bool = true;

    fn bytes(&self) -> u64 {
        0
    }
}

coded_enum! {
    /// What is asked of a counter or of a sequence.
    #[derive(Eq)]
    pub enum CounterOp as "a counter operation" {
        Add(CounterAdd) = 1,
        Set(CounterSet) = 2,
        Delete(CounterDelete) = 3,
        Next(SequenceNext) = 4,
    }
}

coded_struct! {
    /// Adds, if the sum is within the bounds.
    #[derive(Eq)]
    pub struct CounterAdd as "an addition" {
        pub name: Box<[u8]>,
        pub delta: i64,
        pub min: Option<i64>,
        pub max: Option<i64>,
    }
}

coded_struct! {
    /// Sets, if the counter is as expected.
    #[derive(Eq)]
    pub struct CounterSet as "a setting" {
        pub name: Box<[u8]>,
        pub value: i64,
        pub expect: Option<CounterExpect>,
    }
}

coded_struct! {
    #[derive(Eq)]
    pub struct CounterDelete as "a deletion" {
        pub name: Box<[u8]>,
        pub expect: Option<CounterExpect>,
    }
}

coded_enum! {
    /// What a counter must be like for a change to happen.
    #[derive(Copy, Eq)]
    pub enum CounterExpect as "an expectation" {
        Absent = 1,
        /// One that is not there has none, not even zero.
        Value(i64) = 2,
        /// Of its last change.
        Changed(Revision) = 3,
    }
}

coded_struct! {
    /// Takes the next numbers of a sequence.
    #[derive(Eq)]
    pub struct SequenceNext as "a step" {
        pub name: Box<[u8]>,
        /// How many.
        pub block: u64,
        /// What is below is left out; zero: nothing is.
        pub at_least: u64,
    }
}

coded_enum! {
    /// What came of it.
    #[derive(Copy, Eq)]
    pub enum CounterReply as "a counter answer" {
        /// The counter as it is now.
        Counted(Counter) = 1,
        /// Whether there was one.
        Deleted(bool) = 2,
        /// These belong to the caller alone.
        Numbers(Numbers) = 3,
    }
}

coded_struct! {
    /// Numbers of a sequence, the end not included.
    #[derive(Copy, Eq)]
    pub struct Numbers as "numbers" {
        pub from: u64,
        pub to: u64,
    }
}

impl CounterOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        match self {
            Self::Add(CounterAdd { name, .. })
            | Self::Set(CounterSet { name, .. })
            | Self::Next(SequenceNext { name, .. }) => GROWTH + name.len() as u64,
            Self::Delete(_) => 0,
        }
    }

    /// Nobody waits for a counter.
    pub(crate) fn wait_over(&self, _: &Machine, _: &Waiter) -> Option<Result<OpReply, Rejection>> {
        None
    }
}

impl Commit<'_> {
    pub(crate) fn counter_op(&mut self, op: &CounterOp) -> Result<OpReply, Rejection> {
        let reply = match op {
            CounterOp::Add(add) => self.counter_add(add),
            CounterOp::Set(set) => self.counter_set(set),
            CounterOp::Delete(delete) => self.counter_delete(delete),
            CounterOp::Next(next) => self.sequence_next(next),
        };
        reply.map(Into::into)
    }

    fn counter_add(&mut self, add: &CounterAdd) -> Result<CounterReply, Rejection> {
        let CounterAdd { name, delta, min, max } = add;
        let (key, found) = self.counter(name)?;
        let (min, max) = (min.unwrap_or(i64::MIN), max.unwrap_or(i64::MAX));
        if min > max {
            return Err(invalid("the lower bound is above the upper one"));
        }
        let value = found.map_or(0, |counter| counter.value);
        let Some(sum) = value.checked_add(*delta).filter(|sum| (min..=max).contains(sum)) else {
            return Err(out_of_bounds(name, value, *delta, (min, max)));
        };
        Ok(self.count(&key, found, sum))
    }

    fn counter_set(&mut self, set: &CounterSet) -> Result<CounterReply, Rejection> {
        let (key, found) = self.counter(&set.name)?;
        check_expected(&set.name, found, set.expect)?;
        Ok(self.count(&key, found, set.value))
    }

    /// What stays as it is takes no revision, so that nobody's compare fails over it.
    fn count(&mut self, key: &ObjectKey, found: Option<Counter>, value: i64) -> CounterReply {
        let counter = match found {
            Some(counter) if counter.value == value => counter,
            _ => {
                let counter = Counter { value, changed: self.at };
                self.put_object(key, counter);
                counter
            }
        };
        CounterReply::Counted(counter)
    }

    fn counter_delete(&mut self, delete: &CounterDelete) -> Result<CounterReply, Rejection> {
        let (key, found) = self.counter(&delete.name)?;
        check_expected(&delete.name, found, delete.expect)?;
        self.remove_object(&key);
        Ok(CounterReply::Deleted(found.is_some()))
    }

    fn counter(&self, name: &[u8]) -> Result<(ObjectKey, Option<Counter>), Rejection> {
        objects::check_name("a counter", name)?;
        let key = self.object_key::<Counter>(name);
        let found = self.object::<Counter>(&key).copied();
        Ok((key, found))
    }

    fn sequence_next(&mut self, asked: &SequenceNext) -> Result<CounterReply, Rejection> {
        let SequenceNext { name, block, at_least } = asked;
        objects::check_name("a sequence", name)?;
        if !(1..=BLOCK_MAX).contains(block) {
            return Err(invalid(format!("a call takes 1 to {BLOCK_MAX} numbers")));
        }
        let key = self.object_key::<Sequence>(name);
        let next = self.object::<Sequence>(&key).map_or(1, |sequence| sequence.next);
        let from = next.max(*at_least);
        // The end is not given out, so it may be one above the largest number.
        let Some(to) = from.checked_add(*block).filter(|to| *to <= SEQUENCE_MAX + 1) else {
            return Err(used_up(name, next));
        };
        self.put_object(&key, Sequence { next: to, changed: self.at });
        Ok(CounterReply::Numbers(Numbers { from, to }))
    }
}

fn out_of_bounds(name: &[u8], value: i64, delta: i64, (min, max): (i64, i64)) -> Rejection {
    let is_above = i128::from(value) + i128::from(delta) > i128::from(max);
    let (side, bound) = if is_above { ("max", max) } else { ("min", min) };
    let name = name.escape_ascii();
    let why = format!("counter `{name}` is at {value}, {delta} more would be beyond the bound ({side} {bound})");
    Refusal::new(RefusalCode::Conflict, why).fact("name", name).fact("value", value).fact(side, bound).into()
}

fn check_expected(name: &[u8], found: Option<Counter>, expect: Option<CounterExpect>) -> Result<(), Rejection> {
    let holds = match (expect, found) {
        (None, _) | (Some(CounterExpect::Absent), None) => true,
        (Some(CounterExpect::Value(value)), Some(counter)) => counter.value == value,
        (Some(CounterExpect::Changed(at)), Some(counter)) => counter.changed == at,
        _ => false,
    };
    if holds { Ok(()) } else { Err(not_as_expected(name, found)) }
}

fn not_as_expected(name: &[u8], found: Option<Counter>) -> Rejection {
    let name = name.escape_ascii();
    let Some(Counter { value, changed }) = found else {
        let why = format!("counter `{name}` is not as expected: it is not there");
        return Refusal::new(RefusalCode::Conflict, why).fact("name", name).into();
    };
    let why = format!("counter `{name}` is not as expected: it is at {value} since revision {changed}");
    let refusal = Refusal::new(RefusalCode::Conflict, why).fact("name", name);
    refusal.fact("value", value).fact("revision", changed).into()
}

fn used_up(name: &[u8], next: u64) -> Rejection {
    let name = name.escape_ascii();
    let why = format!("sequence `{name}` has too few numbers left: the next is {next}, the last {SEQUENCE_MAX}");
    Refusal::new(RefusalCode::Conflict, why).fact("name", name).fact("next", next).fact("max", SEQUENCE_MAX).into()
}
