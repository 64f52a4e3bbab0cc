//! Configuration: keys with numbered versions.

use crate::apply::{Commit, Machine};
use crate::coded::{coded_enum, coded_struct};
use crate::objects::Lived;
use crate::reply::{OpReply, Rejection};
use crate::waits::Waiter;

coded_struct! {
    /// Under construction.
    pub struct Config as "config" {
        pub value: u64,
    }
}

impl Lived for Config {
    fn bytes(&self) -> u64 {
        0
    }
}

coded_enum! {
    /// Under construction.
    pub enum ConfigOp as "an operation" {
        Nothing = 0,
    }
}

coded_enum! {
    /// Under construction.
    pub enum ConfigReply as "an answer" {
        Nothing = 0,
    }
}

impl ConfigOp {
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
    pub(crate) fn config_op(&mut self, _: &ConfigOp) -> Result<OpReply, Rejection> {
        Ok(ConfigReply::Nothing.into())
    }
}
