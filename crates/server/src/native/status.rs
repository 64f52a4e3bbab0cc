//! How this member is, answered without a quorum.

use tenure_wire::tenure::v1;

use super::sessions::{native_unary, query};
use super::{Refused, members};
use crate::Context;
use crate::driver::View;
use crate::rpc::Router;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    native_unary(router, context, "/tenure.v1.Status/Get", get);
}

async fn get(context: Context, _: v1::StatusGetRequest) -> Result<v1::StatusGetReply, Refused> {
    let watchers = context.watch_facts.watchers.load(std::sync::atomic::Ordering::Relaxed);
    let uptime_ms = context.settings.started.elapsed().as_millis() as u64;
    let look = move |view: &View<'_>| {
        let status = view.member.status();
        let machine = view.machine;
        let (memory, counts) = (machine.memory(), machine.counts());
        v1::StatusGetReply {
            member_id: status.member.0,
            cluster_id: machine.cluster(),
            issuer_id: machine.issuer().iter().map(|byte| format!("{byte:02x}")).collect(),
            leader: status.leader.map_or(0, |leader| leader.0),
            raft_term: status.term,
            committed_index: status.committed,
            applied_index: status.applied,
            revision: machine.revision().0,
            compact_revision: machine.compacted().0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            behaviour_version: u32::from(machine.behaviour()),
            memory_used_bytes: memory.used,
            memory_soft_limit_bytes: memory.soft,
            memory_hard_limit_bytes: memory.hard,
            db_bytes: status.log_file_bytes + status.snapshot_bytes,
            log_bytes: status.log_file_bytes,
            snapshot_bytes: status.snapshot_bytes,
            keys: counts.keys,
            sessions: counts.sessions,
            locks: counts.locks_held,
            waiters: counts.waiters,
            watchers,
            alarms: status.alarms.iter().map(|alarm| alarm_name(alarm).to_owned()).collect(),
            uptime_ms,
            role: members::role_of(&status, status.member).into(),
            has_majority: members::has_majority(&status),
            handing_over: status.handing_over,
            disk_free_bytes: status.disk_free,
            fetched_bytes: status.fetching.map_or(0, |(here, _)| here),
            fetch_bytes: status.fetching.map_or(0, |(_, all)| all),
            alarm_texts: status.alarms.iter().map(ToString::to_string).collect(),
            members: members::shown(&status, memory.used),
            name: status.name,
        }
    };
    query(&context, true, look).await
}

/// Stable names of what can be wrong.
pub(crate) fn alarm_name(alarm: &tenure_replica::Alarm) -> &'static str {
    use tenure_replica::Alarm;
    match alarm {
        Alarm::DiskFull { .. } => "NOSPACE",
        Alarm::JobFailed { .. } => "JOB_FAILED",
        Alarm::SnapshotDamaged { .. } => "SNAPSHOT_DAMAGED",
        Alarm::TornTail { .. } => "TORN_TAIL",
        Alarm::ClockSkew { .. } => "CLOCK_SKEW",
        Alarm::Peer { .. } => "PEER",
    }
}
