//! Queues of jobs.

use crate::apply::{Commit, Machine};
use crate::coded::{coded_enum, coded_struct};
use crate::objects::Lived;
use crate::reply::{OpReply, Rejection};
use crate::waits::Waiter;

coded_struct! {
    /// Under construction.
    pub struct Queue as "queue" {
        pub value: u64,
    }
}

impl Lived for Queue {
    fn bytes(&self) -> u64 {
        0
    }
}

coded_struct! {
    /// Under construction.
    pub struct Job as "job" {
        pub value: u64,
    }
}

impl Lived for Job {
    fn bytes(&self) -> u64 {
        0
    }
}

/// What follows from the table.
#[derive(Default)]
pub(crate) struct Index {}

coded_enum! {
    /// Under construction.
    pub enum QueueOp as "an operation" {
        Nothing = 0,
    }
}

coded_enum! {
    /// Under construction.
    pub enum QueueReply as "an answer" {
        Nothing = 0,
    }
}

impl QueueOp {
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
    pub(crate) fn queue_op(&mut self, _: &QueueOp) -> Result<OpReply, Rejection> {
        Ok(QueueReply::Nothing.into())
    }
}
