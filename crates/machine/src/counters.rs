//! Counters and sequences.

use crate::apply::{Commit, Machine};
use crate::coded::{coded_enum, coded_struct};
use crate::objects::Lived;
use crate::reply::{OpReply, Rejection};
use crate::waits::Waiter;

coded_struct! {
    /// Under construction.
    pub struct Counter as "counter" {
        pub value: u64,
    }
}

impl Lived for Counter {
    fn bytes(&self) -> u64 {
        0
    }
}

coded_enum! {
    /// Under construction.
    pub enum CounterOp as "an operation" {
        Nothing = 0,
    }
}

coded_enum! {
    /// Under construction.
    pub enum CounterReply as "an answer" {
        Nothing = 0,
    }
}

impl CounterOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        0
    }

    /// What a waiter is told whose time is over; `None`: that it waited in vain.
    pub(crate) fn wait_over(&self, _: &Machine, _: &Waiter) -> Option<Result<OpReply, Rejection>> {
        None
    }
}

impl Commit<'_> {
    pub(crate) fn counter_op(&mut self, _: &CounterOp) -> Result<OpReply, Rejection> {
        Ok(CounterReply::Nothing.into())
    }
}
