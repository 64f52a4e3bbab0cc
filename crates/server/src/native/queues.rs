//! Native queues of jobs.

use crate::Context;
use crate::rpc::Router;

pub(crate) fn mount(_: &mut Router, _: &Context) {}
