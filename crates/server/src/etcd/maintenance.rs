//! etcd's Maintenance service: status, alarms, hashes; what has no meaning here succeeds or says what to use instead.

use tenure_machine::{Key, MemberId, NamespaceId, Revision, Space, Span};
use tenure_replica::{Alarm, Refusal, Role};
use tenure_wire::etcd::etcdserverpb as pb;

use super::{failed, unary};
use crate::Context;
use crate::driver::{Failure, View};
use crate::native::members::{WAIT, is_voter, until};
use crate::rpc::{Code, Router, Status};
use crate::status::{self, EtcdError, etcd_rejection};
use crate::{ETCD_CLUSTER_VERSION, ETCD_VERSION};

const UNHEALTHY: EtcdError = EtcdError(Code::Unavailable, "etcdserver: unhealthy cluster");
/// etcd's server has no gRPC error of its own for this, so its clients see the code Unknown.
const TIMEOUT_LEADER_TRANSFER: EtcdError =
    EtcdError(Code::Unknown, "etcdserver: request timed out, leader transfer took too long");

pub(crate) fn mount(router: &mut Router, context: &Context) {
    unary(router, context, "/etcdserverpb.Maintenance/Status", member_status);
    unary(router, context, "/etcdserverpb.Maintenance/Alarm", alarm);
    unary(router, context, "/etcdserverpb.Maintenance/Defragment", defragment);
    unary(router, context, "/etcdserverpb.Maintenance/Hash", hash);
    unary(router, context, "/etcdserverpb.Maintenance/HashKV", hash_kv);
    unary(router, context, "/etcdserverpb.Maintenance/MoveLeader", move_leader);
    unary(router, context, "/etcdserverpb.Maintenance/Downgrade", downgrade);
    router.stream("/etcdserverpb.Maintenance/Snapshot", |_, _, _| async {
        Err(Status::unimplemented("tenure: snapshots are files of this server in its data folder and have a format of their own; streaming one is not served yet"))
    });
}

async fn member_status(context: Context, _: pb::StatusRequest) -> Result<pb::StatusResponse, Status> {
    let look = |view: &View<'_>| (view.member.status(), view.machine.revision(), view.machine.memory());
    let (status, revision, memory) = context.query(true, look).await.map_err(failed)?;
    let on_disk = status.log_file_bytes + status.snapshot_bytes;
    let leader = status.leader.map_or(0, |leader| leader.0);
    let mut errors: Vec<String> = Vec::new();
    if leader == 0 {
        errors.push("etcdserver: no leader".to_owned());
    }
    if status.alarms.iter().any(is_no_space) {
        errors.push(format!("memberID:{} alarm:NOSPACE ", context.identity.member()));
    }
    Ok(pb::StatusResponse {
        header: Some(context.identity.header(revision)),
        version: ETCD_VERSION.to_owned(),
        // State is in memory and the folder holds log and snapshots: what is larger bounds the member.
        db_size: on_disk.max(memory.used) as i64,
        leader,
        raft_index: status.committed,
        raft_term: status.term,
        raft_applied_index: status.applied,
        errors,
        db_size_in_use: memory.used as i64,
        is_learner: !is_voter(&status, status.member),
        storage_version: ETCD_CLUSTER_VERSION.to_owned(),
        db_size_quota: context.settings.memory_hard_limit as i64,
        downgrade_info: Some(pb::DowngradeInfo { enabled: false, target_version: String::new() }),
    })
}

fn is_no_space(alarm: &Alarm) -> bool {
    matches!(alarm, Alarm::DiskFull { .. })
}

/// Alarms are raised and cleared by the member itself, so setting one is accepted and has no effect.
async fn alarm(context: Context, request: pb::AlarmRequest) -> Result<pb::AlarmResponse, Status> {
    let look = |view: &View<'_>| (view.member.status().alarms.iter().any(is_no_space), view.machine.revision());
    let (is_full, revision) = context.query(true, look).await.map_err(failed)?;
    let is_get = request.action == pb::alarm_request::AlarmAction::Get as i32;
    let is_asked = request.alarm == pb::AlarmType::None as i32 || request.alarm == pb::AlarmType::Nospace as i32;
    let mut alarms = Vec::new();
    if is_full && is_get && is_asked {
        alarms.push(pb::AlarmMember { member_id: context.identity.member(), alarm: pb::AlarmType::Nospace.into() });
    }
    Ok(pb::AlarmResponse { header: Some(context.identity.header(revision)), alarms })
}

/// There is nothing to defragment. etcd's answer is empty too.
async fn defragment(_: Context, _: pb::DefragmentRequest) -> Result<pb::DefragmentResponse, Status> {
    Ok(pb::DefragmentResponse { header: None })
}

async fn hash(context: Context, _: pb::HashRequest) -> Result<pb::HashResponse, Status> {
    let look = |view: &View<'_>| (view.machine.checksum(), view.machine.revision());
    let (sum, revision) = context.query(true, look).await.map_err(failed)?;
    Ok(pb::HashResponse { header: Some(context.identity.header(revision)), hash: fold(sum) })
}

fn fold(sum: u64) -> u32 {
    (sum ^ (sum >> 32)) as u32
}

/// The keys at one revision, as a number: equal on members with equal keys, and of no meaning beyond this program.
async fn hash_kv(context: Context, request: pb::HashKvRequest) -> Result<pb::HashKvResponse, Status> {
    let span = Span {
        start: Key::new(Space::Keys, NamespaceId::DEFAULT, b""),
        end: Some(Key::end_of(Space::Keys, NamespaceId::DEFAULT)),
    };
    let compacted = context.query(true, |view| view.machine.compacted()).await.map_err(failed)?;
    let mut slices = context.slices(span, request.revision, true).map_err(failed)?;
    let mut sum = Fnv::default();
    while let Some(slice) = slices.next().await {
        let slice = slice.map_err(|rejection| etcd_rejection(&rejection))?;
        for record in &slice.records {
            sum.add(record.as_bytes());
        }
        if slice.is_last {
            return Ok(pb::HashKvResponse {
                header: Some(context.identity.header(slice.current)),
                hash: fold(sum.0),
                compact_revision: told(compacted),
                hash_revision: slice.revision.0 as i64,
            });
        }
    }
    Err(status::STOPPED.into())
}

/// etcd has -1 before the first compaction.
fn told(compacted: Revision) -> i64 {
    if compacted.0 == 0 { -1 } else { compacted.0 as i64 }
}

/// FNV-1a, with the length of each part so that parts do not run into each other.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for &byte in (bytes.len() as u32).to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

async fn move_leader(context: Context, request: pb::MoveLeaderRequest) -> Result<pb::MoveLeaderResponse, Status> {
    let status = context.query(true, |view| view.member.status()).await.map_err(failed)?;
    if status.role != Role::Leader {
        return Err(status::NOT_LEADER.into());
    }
    let to = MemberId(request.target_id);
    // Moving it to where it is succeeds, as in etcd.
    if to == status.member {
        return Ok(pb::MoveLeaderResponse { header: None });
    }
    if !is_voter(&status, to) {
        return Err(status::BAD_LEADER_TRANSFEREE.into());
    }
    match context.hand_over(Some(to)).await {
        Ok(_) => {}
        // It votes, but is not connected.
        Err(Failure::Refused(Refusal::NoQuorum)) => return Err(UNHEALTHY.into()),
        Err(failure) => return Err(failed(failure)),
    }
    let moved = move |status: &tenure_replica::Status| status.leader == Some(to);
    match until(&context, WAIT, moved).await.map_err(failed)? {
        true => Ok(pb::MoveLeaderResponse { header: None }),
        false => Err(TIMEOUT_LEADER_TRANSFER.into()),
    }
}

async fn downgrade(context: Context, request: pb::DowngradeRequest) -> Result<pb::DowngradeResponse, Status> {
    use pb::downgrade_request::DowngradeAction;
    match DowngradeAction::try_from(request.action) {
        Ok(DowngradeAction::Validate | DowngradeAction::Enable) => {
            let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
            let parts = request.version.split('.').count();
            if !(2..=3).contains(&parts) || !request.version.split('.').all(is_number) {
                return Err(status::WRONG_DOWNGRADE_VERSION_FORMAT.into());
            }
            Err(Status::unimplemented("tenure: an etcd version is told to clients only; there is none to go back to"))
        }
        Ok(DowngradeAction::Cancel) => {
            let revision = context.query(true, |view| view.machine.revision()).await.map_err(failed)?;
            let version = ETCD_CLUSTER_VERSION.rsplit_once('.').map_or("", |(short, _)| short).to_owned();
            Ok(pb::DowngradeResponse { header: Some(context.identity.header(revision)), version })
        }
        Err(_) => Err(status::UNKNOWN_METHOD.into()),
    }
}
