//! What can be asked of locks beside taking and giving back one exclusively.

use crate::apply::{Commit, Machine};
use crate::coded::coded_enum;
use crate::reply::{OpReply, Rejection};
use crate::waits::Waiter;

coded_enum! {
    /// Under construction.
    pub enum LockOp as "an operation" {
        Nothing = 0,
    }
}

coded_enum! {
    /// Under construction.
    pub enum LockReply as "an answer" {
        Nothing = 0,
    }
}

impl LockOp {
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
    pub(crate) fn lock_op(&mut self, _: &LockOp) -> Result<OpReply, Rejection> {
        Ok(LockReply::Nothing.into())
    }
}
