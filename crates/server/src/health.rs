//! The member's health and figures, as the pages ask for them.
//!
//! Promises. A check never waits longer than its limit. Figures are at most about a second old; no page makes the driver work.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::Context;
use crate::driver::Figures;
use crate::metrics::Exposition;
use crate::pages::{Check, CheckFuture, Health};

const CHECKS: &[Check] = &[
    Check { name: "data_corruption", live: false, ready: true },
    Check { name: "serializable_read", live: true, ready: true },
    Check { name: "linearizable_read", live: false, ready: true },
    Check { name: "non_learner", live: false, ready: true },
];

const CHECK_LIMIT: Duration = Duration::from_secs(2);

pub(crate) struct MemberHealth {
    context: Context,
}

impl MemberHealth {
    pub(crate) fn new(context: Context) -> Self {
        Self { context }
    }

    async fn read(&self, serializable: bool) -> Result<(), String> {
        let read = self.context.query(serializable, |_| ());
        match tokio::time::timeout(CHECK_LIMIT, read).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(failure)) => Err(crate::status::etcd_failure(&failure).message),
            Err(_) => Err("the member did not answer in time".to_owned()),
        }
    }
}

impl Health for MemberHealth {
    fn checks(&self) -> &'static [Check] {
        CHECKS
    }

    fn run(&self, name: &'static str) -> CheckFuture<'_> {
        Box::pin(async move {
            match name {
                "serializable_read" => self.read(true).await,
                "linearizable_read" => self.read(false).await,
                // A damaged member does not run, and there are no learners.
                _ => Ok(()),
            }
        })
    }

    fn health(&self, serializable: bool, excluded: &[String]) -> CheckFuture<'_> {
        let counts_space = !excluded.iter().any(|alarm| alarm == "NOSPACE");
        Box::pin(async move {
            if self.context.is_stopping() {
                return Err("RAFT NO LEADER".to_owned());
            }
            let is_full = |alarm: &tenure_replica::Alarm| matches!(alarm, tenure_replica::Alarm::DiskFull { .. });
            let alarms = self.context.figures().status.map(|status| status.alarms).unwrap_or_default();
            if counts_space && alarms.iter().any(is_full) {
                return Err("ALARM NOSPACE".to_owned());
            }
            self.read(serializable).await.map_err(|why| format!("RANGE ERROR:{why}"))
        })
    }

    fn metrics(&self, out: &mut Exposition) {
        let figures = self.context.figures();
        consensus(out, &figures);
        storage(out, &figures);
        let handle = &self.context.handle;
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed) as f64;
        let watch = &handle.watch_facts;
        out.gauge(
            "etcd_debugging_mvcc_watch_stream_total",
            "Total number of watch streams.",
            &[],
            load(&watch.streams),
        );
        out.gauge("etcd_debugging_mvcc_watcher_total", "Total number of watchers.", &[], load(&watch.watchers));
        out.gauge(
            "etcd_debugging_mvcc_slow_watcher_total",
            "Total number of unsynced slow watchers.",
            &[],
            load(&watch.slow_watchers),
        );
        out.counter(
            "etcd_debugging_mvcc_events_total",
            "Total number of events sent by this member.",
            &[],
            load(&watch.events),
        );
        let facts = &handle.facts;
        out.counter("tenure_requests_total", "Requests handed to the driver.", &[], load(&facts.requests));
        out.counter(
            "tenure_requests_overloaded_total",
            "Requests refused because the queue was full.",
            &[],
            load(&facts.overloaded),
        );
        out.histogram(
            "etcd_disk_wal_fsync_duration_seconds",
            "The latency distributions of fsync called by WAL.",
            &[],
            &self.context.syncs.figures(),
        );
        out.gauge(
            "etcd_server_version",
            "Which version is running. 1 for 'server_version' label with current version.",
            &[("server_version", crate::ETCD_VERSION)],
            1.0,
        );
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        out.gauge("tenure_build_info", "The version of the program; always 1.", &version, 1.0);
    }
}

fn consensus(out: &mut Exposition, figures: &Figures) {
    let Some(status) = &figures.status else { return };
    let flag = |set: bool| if set { 1.0 } else { 0.0 };
    let is_leader = status.leader == Some(status.member);
    let help = "Whether or not a leader exists. 1 is existence, 0 is not.";
    out.gauge("etcd_server_has_leader", help, &[], flag(status.leader.is_some()));
    out.gauge(
        "etcd_server_is_leader",
        "Whether or not this member is a leader. 1 if is, 0 otherwise.",
        &[],
        flag(is_leader),
    );
    out.gauge("etcd_server_is_learner", "Whether or not this member is a learner. 1 if is, 0 otherwise.", &[], 0.0);
    let help = "The number of leader changes seen.";
    out.counter("etcd_server_leader_changes_seen_total", help, &[], status.leader_changes as f64);
    let help = "The total number of consensus proposals committed.";
    out.gauge("etcd_server_proposals_committed_total", help, &[], status.committed as f64);
    let help = "The total number of consensus proposals applied.";
    out.gauge("etcd_server_proposals_applied_total", help, &[], status.applied as f64);
    let help = "The current number of pending proposals to commit.";
    out.gauge("etcd_server_proposals_pending", help, &[], (status.queued + status.proposed) as f64);
    out.counter(
        "etcd_server_proposals_failed_total",
        "The total number of failed proposals seen.",
        &[],
        figures.failed as f64,
    );
    out.gauge("tenure_alarms", "Things that an operator should look at.", &[], status.alarms.len() as f64);
}

fn storage(out: &mut Exposition, figures: &Figures) {
    let Some(status) = &figures.status else { return };
    let (memory, counts) = (&figures.memory, &figures.counts);
    let on_disk = (status.log_file_bytes + status.snapshot_bytes) as f64;
    let help = "Total size of the underlying database physically allocated in bytes.";
    out.gauge("etcd_mvcc_db_total_size_in_bytes", help, &[], on_disk);
    let help = "Total size of the underlying database logically in use in bytes.";
    out.gauge("etcd_mvcc_db_total_size_in_use_in_bytes", help, &[], memory.used as f64);
    out.gauge(
        "etcd_server_quota_backend_bytes",
        "Current backend storage quota size in bytes.",
        &[],
        memory.hard as f64,
    );
    out.gauge("etcd_debugging_mvcc_keys_total", "Total number of keys.", &[], counts.keys as f64);
    let help = "The current revision of store.";
    out.gauge("etcd_debugging_mvcc_current_revision", help, &[], figures.revision as f64);
    let help = "The revision of the last compaction in store.";
    out.gauge("etcd_debugging_mvcc_compact_revision", help, &[], figures.compacted as f64);
    out.gauge("tenure_memory_used_bytes", "Bytes of state as accounted.", &[], memory.used as f64);
    out.gauge("tenure_memory_history_bytes", "Bytes that compaction could give back.", &[], memory.history as f64);
    out.gauge("tenure_sessions", "Live sessions and leases.", &[], counts.sessions as f64);
    out.gauge("tenure_locks_held", "Held locks.", &[], counts.locks_held as f64);
    out.gauge("tenure_lock_waiters", "Waiters of all locks.", &[], counts.waiters as f64);
    out.gauge("tenure_remembered_requests", "Requests whose answers are remembered.", &[], counts.requests as f64);
    out.gauge("tenure_log_segments", "Files of the log.", &[], status.log_segments as f64);
    out.gauge("tenure_snapshot_index", "Log index of the newest snapshot.", &[], status.snapshot_index as f64);
}
