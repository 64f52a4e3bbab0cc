//! The plain pages beside the calls: what is here, version, health, metrics.
//!
//! Promises. P1: `/livez` never fails for a lost quorum, `/readyz` does. P2: `/health` and `/version` answer as etcd 3.7 does, since
//! clients choose by them. P3: no page waits longer than its limit for a check.
//! Relies on. The member tells its facts through [`Health`].

use std::future::Future;
use std::pin::Pin;

use crate::metrics::Exposition;

pub type CheckFuture<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// One named check of `/livez` and `/readyz`.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    pub name: &'static str,
    /// Part of `/livez`: only what a restart would heal.
    pub live: bool,
    /// Part of `/readyz`.
    pub ready: bool,
}

/// The member's facts, as the pages need them.
pub trait Health: Send + Sync + 'static {
    /// The checks, in the order in which they are listed. etcd's names: `data_corruption`, `serializable_read`,
    /// `linearizable_read`, `non_learner`.
    fn checks(&self) -> &'static [Check];

    /// Runs one of [`Health::checks`]; the error says what is wrong, in one line.
    fn run(&self, name: &'static str) -> CheckFuture<'_>;

    /// `/health`: an error is etcd's reason, such as `RAFT NO LEADER`. `serializable` asks for no quorum.
    fn health(&self, serializable: bool) -> CheckFuture<'_>;

    /// Adds the member's own metrics to the page. Those of the front and of the process are there already.
    fn metrics(&self, out: &mut Exposition);
}
