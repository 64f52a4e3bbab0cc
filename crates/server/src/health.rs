//! The member's health and figures, as the pages ask for them.
//!
//! Promises. A check never waits longer than its limit. Figures are at most about a second old; no page makes the driver work.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tenure_machine::{BEGIN_OUTCOMES, FENCED_KINDS, JOB_STATES, WAIT_BOUNDS_MS};

use crate::Context;
use crate::driver::Figures;
use crate::metrics::{Exposition, HistogramFigures};
use crate::pages::{Check, CheckFuture, Health};
use crate::peers::{LinkFacts, PeersFacts};

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

impl MemberHealth {
    /// A fresh cluster settles on the newest behaviour version that its members know within a moment; until then it refuses what needs it. It is part of
    /// another check, because etcd's list of checks is not longer.
    async fn behaviour(&self) -> Result<(), String> {
        let waits = self
            .context
            .query(true, |view| view.machine.awaits_behaviour(tenure_machine::MemberId(view.identity.member())));
        match waits.await {
            Ok(false) => Ok(()),
            Ok(true) => Err("the cluster has not settled on its behaviour version yet".to_owned()),
            Err(failure) => Err(crate::status::etcd_failure(&failure).message),
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
                "linearizable_read" => {
                    self.read(false).await?;
                    self.behaviour().await
                }
                "non_learner" => {
                    let is_learner = self.context.figures().status.is_some_and(|s| s.learners.contains(&s.member));
                    if is_learner { Err("this member is a learner: it has no vote yet".to_owned()) } else { Ok(()) }
                }
                // A damaged member does not run.
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
        primitives(out, &figures);
        if let Some(peers) = self.context.peers.get() {
            connections(out, &peers.facts());
        }
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
        let help = "Open streams and long polls that watch or observe, those of etcd's clients too.";
        out.gauge("tenure_watch_streams", help, &[], self.context.watch_streams() as f64);
        let facts = &handle.facts;
        out.counter("tenure_requests_total", "Requests handed to the driver.", &[], load(&facts.requests));
        out.counter(
            "tenure_requests_overloaded_total",
            "Requests refused because the queue was full.",
            &[],
            load(&facts.overloaded),
        );
        let ticks = &facts.schedules;
        for (result, count) in [("done", &ticks.done), ("left_out", &ticks.left_out), ("refused", &ticks.refused)] {
            let help = "Ticks of schedules that this member proposed as a leader, by what came of them.";
            out.counter("tenure_schedule_ticks_total", help, &[("result", result)], load(count));
        }
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
    let is_learner = status.learners.contains(&status.member);
    let help = "Whether or not this member is a learner. 1 if is, 0 otherwise.";
    out.gauge("etcd_server_is_learner", help, &[], flag(is_learner));
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

/// One figure of a connection for each peer: the name, what it is, its label, and the figure.
type PeerFigure = (&'static str, &'static str, &'static str, fn(&LinkFacts) -> f64);

fn connections(out: &mut Exposition, facts: &PeersFacts) {
    const FIGURES: [PeerFigure; 7] = [
        ("etcd_network_peer_sent_bytes_total", "The total number of bytes sent to peers.", "To", |l| {
            (l.messages.sent_bytes + l.bulk.sent_bytes) as f64
        }),
        ("etcd_network_peer_received_bytes_total", "The total number of bytes received from peers.", "From", |l| {
            (l.messages.received_bytes + l.bulk.received_bytes) as f64
        }),
        ("tenure_peer_messages_sent_total", "Messages sent to a member.", "to", |l| {
            (l.messages.sent_frames + l.bulk.sent_frames) as f64
        }),
        ("tenure_peer_messages_received_total", "Messages received from a member.", "from", |l| {
            (l.messages.received_frames + l.bulk.received_frames) as f64
        }),
        ("tenure_peer_messages_dropped_total", "Messages dropped for want of a connection or of room.", "to", |l| {
            (l.messages.dropped_full + l.messages.dropped_down + l.bulk.dropped_full + l.bulk.dropped_down) as f64
        }),
        ("tenure_peer_connects_total", "Connections made to a member.", "to", |l| {
            (l.messages.connects + l.bulk.connects) as f64
        }),
        ("tenure_peer_queued_bytes", "Bytes that wait to be sent to a member.", "to", |l| {
            (l.messages.queued_bytes + l.bulk.queued_bytes) as f64
        }),
    ];
    for (name, help, label, figure) in FIGURES {
        for link in &facts.links {
            let id = format!("{:x}", link.member.0);
            // etcd names the peer by its id alone.
            let labels = [(label, id.as_str()), ("name", link.name.as_str())];
            let labels = if name.starts_with("etcd_") { &labels[..1] } else { &labels[..] };
            let value = figure(link);
            if name.ends_with("_total") {
                out.counter(name, help, labels, value)
            } else {
                out.gauge(name, help, labels, value)
            }
        }
    }
    for link in &facts.links {
        let labels = [("name", link.name.as_str()), ("address", link.address.as_str())];
        let help = "Whether there is a connection for messages to a member.";
        out.gauge("tenure_peer_connected", help, &labels, if link.is_connected { 1.0 } else { 0.0 });
    }
    let help = "Connections from other members.";
    out.gauge("tenure_peer_connections_inbound", help, &[], facts.inbound as f64);
    let help = "Connections refused because there were too many, and messages for members that are not known.";
    let refused = [("what", "inbound"), ("what", "unknown")];
    out.counter("tenure_peer_refused_total", help, &refused[..1], facts.inbound_excess as f64);
    out.counter("tenure_peer_refused_total", help, &refused[1..], facts.dropped_unknown as f64);
}

/// What the native primitives do. Counters are of what this member has applied since it started, which is the same work on each member.
fn primitives(out: &mut Exposition, figures: &Figures) {
    let (jobs, tallies) = (&figures.jobs, &figures.tallies);
    for (state, count) in JOB_STATES.iter().zip(jobs.states) {
        out.gauge("tenure_jobs", "Jobs of all queues by state.", &[("state", state)], count as f64);
    }
    let help = "Age of the first job that is ready, in whichever queue.";
    out.gauge("tenure_job_oldest_ready_seconds", help, &[], seconds(jobs.oldest_ready_ms));
    let help = "Jobs given to workers.";
    out.counter("tenure_job_deliveries_total", help, &[], tallies.deliveries as f64);
    let help = "Jobs given to workers that had been given before.";
    out.counter("tenure_job_redeliveries_total", help, &[], tallies.redeliveries as f64);
    for (outcome, count) in BEGIN_OUTCOMES.iter().zip(tallies.begins) {
        let help = "Attempts to begin under an idempotency key, by what became of them.";
        out.counter("tenure_idempotency_begins_total", help, &[("outcome", outcome)], count as f64);
    }
    for kind in FENCED_KINDS {
        let count = tallies.fenced.get(kind).copied().unwrap_or(0);
        let help = "Requests refused for a stale token, by what the token was of.";
        out.counter("tenure_fenced_total", help, &[("kind", kind)], count as f64);
    }
    let waits = HistogramFigures {
        bounds: WAIT_BOUNDS_MS.map(seconds).into(),
        counts: tallies.lock_waits.counts.into(),
        sum: seconds(tallies.lock_waits.sum_ms),
    };
    out.histogram("tenure_lock_wait_seconds", "How long those waited for locks who were granted them.", &[], &waits);
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
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
    let locks = &figures.lock_counts;
    let help = "Waits for locks that would never have ended.";
    out.counter("tenure_lock_deadlocks_total", help, &[], locks.deadlocks as f64);
    let help = "Searches for deadlocks that found too much to look at.";
    out.counter("tenure_lock_deadlock_searches_given_up_total", help, &[], locks.searches_given_up as f64);
    out.gauge("tenure_remembered_requests", "Requests whose answers are remembered.", &[], counts.requests as f64);
    out.gauge("tenure_log_segments", "Files of the log.", &[], status.log_segments as f64);
    out.gauge("tenure_snapshot_index", "Log index of the newest snapshot.", &[], status.snapshot_index as f64);
}
