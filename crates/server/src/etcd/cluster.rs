//! etcd's Cluster service: the table of members in etcd's words.
//!
//! Promises. Codes and texts are etcd's. A learner is one until it votes, whatever it should be.
//! Not promised. That a member which was added as a voter votes at once, as in etcd: it is a learner until it has caught up, so that one
//! that never comes cannot cost the majority. `--initial-cluster` has no meaning here: `tenure member token` gives what it starts with.
//! Relies on. `native/members.rs` for every change.

use tenure_machine::{MemberId, MemberRecord, MemberRole, Op, Rejection};
use tenure_replica::{PeerStatus, Status as MemberStatus};
use tenure_wire::etcd::etcdserverpb as pb;

use super::{failed, unary};
use crate::Context;
use crate::driver::Failure;
use crate::native::members::{WAIT, change, host_port, is_gone, is_voter, until};
use crate::native::sessions::draw_id;
use crate::rpc::{Code, Router, Status};
use crate::status::{self, EtcdError, etcd_rejection};

const PEER_URL_EXISTS: EtcdError = EtcdError(Code::FailedPrecondition, "etcdserver: Peer URLs already exists");
const LEARNER_NOT_READY: EtcdError =
    EtcdError(Code::FailedPrecondition, "etcdserver: can only promote a learner member which is in sync with leader");
/// Unknown, since etcd's server answers with an error that is meant for its clients and so has no gRPC code.
const NOT_ENOUGH_STARTED: EtcdError =
    EtcdError(Code::Unknown, "etcdserver: re-configuration failed due to not enough started members");

pub(crate) fn mount(router: &mut Router, context: &Context) {
    unary(router, context, "/etcdserverpb.Cluster/MemberList", member_list);
    unary(router, context, "/etcdserverpb.Cluster/MemberAdd", member_add);
    unary(router, context, "/etcdserverpb.Cluster/MemberRemove", member_remove);
    unary(router, context, "/etcdserverpb.Cluster/MemberUpdate", member_update);
    unary(router, context, "/etcdserverpb.Cluster/MemberPromote", member_promote);
}

/// The header of this service has no revision.
fn header(context: &Context) -> Option<pb::ResponseHeader> {
    Some(context.identity.header(tenure_machine::Revision(0)))
}

/// One that never came has no name yet, as in etcd, whose clients tell by that.
fn shown(context: &Context, status: &MemberStatus, peer: &PeerStatus) -> pb::Member {
    let record = &peer.record;
    let is_this = record.id == status.member;
    let has_come = record.has_come() || is_this;
    let client_ur_ls = match record.clients.iter().map(ToString::to_string).collect::<Vec<_>>() {
        told if told.is_empty() && is_this => context.settings.client_urls.clone(),
        told => told,
    };
    pb::Member {
        id: record.id.0,
        name: if has_come { record.name.to_string() } else { String::new() },
        peer_ur_ls: vec![peer_url(context, record)],
        client_ur_ls,
        is_learner: !is_voter(status, record.id),
    }
}

fn peer_url(context: &Context, record: &MemberRecord) -> String {
    let is_secure = context.settings.peer_urls.iter().any(|url| url.starts_with("https://"));
    format!("{}://{}", if is_secure { "https" } else { "http" }, record.peer)
}

fn all(context: &Context, status: &MemberStatus) -> Vec<pb::Member> {
    let live = status.members.iter().filter(|peer| peer.record.is_live());
    let members: Vec<pb::Member> = live.map(|peer| shown(context, status, peer)).collect();
    if !members.is_empty() {
        return members;
    }
    // In the first moments of a cluster the table is empty.
    vec![pb::Member {
        id: context.identity.member(),
        name: context.settings.name.clone(),
        peer_ur_ls: context.settings.peer_urls.clone(),
        client_ur_ls: context.settings.client_urls.clone(),
        is_learner: false,
    }]
}

async fn status_now(context: &Context, serializable: bool) -> Result<MemberStatus, Status> {
    context.query(serializable, |view| view.member.status()).await.map_err(failed)
}

async fn members(context: &Context) -> Result<Vec<pb::Member>, Status> {
    Ok(all(context, &status_now(context, true).await?))
}

async fn member_list(context: Context, request: pb::MemberListRequest) -> Result<pb::MemberListResponse, Status> {
    let status = status_now(&context, !request.linearizable).await?;
    Ok(pb::MemberListResponse { header: header(&context), members: all(&context, &status) })
}

/// The one peer address of a member.
fn peer_of(urls: &[String]) -> Result<Box<str>, Status> {
    let is_url = |url: &str| url.starts_with("http://") || url.starts_with("https://");
    let plain: Option<Vec<&str>> = urls.iter().map(|url| if is_url(url) { host_port(url) } else { None }).collect();
    match plain.as_deref() {
        Some([one]) => Ok((*one).into()),
        Some([_, _, ..]) => {
            Err(Status::new(Code::InvalidArgument, "tenure: a member has one peer URL here: choose one of those given"))
        }
        _ => Err(status::MEMBER_BAD_URLS.into()),
    }
}

/// The record of a live member.
async fn known(context: &Context, id: u64) -> Result<MemberRecord, Status> {
    let found = context.query(true, move |view| view.machine.member(MemberId(id)).cloned()).await.map_err(failed)?;
    found.filter(MemberRecord::is_live).ok_or_else(|| status::MEMBER_NOT_FOUND.into())
}

fn rejected(rejection: &Rejection) -> Status {
    match rejection {
        Rejection::MemberExists { .. } => PEER_URL_EXISTS.into(),
        other => etcd_rejection(other),
    }
}

async fn changed(context: &Context, op: Op) -> Result<MemberRecord, Status> {
    change(context, op).await.map_err(failed)?.map_err(|rejection| rejected(&rejection))
}

async fn member_add(context: Context, request: pb::MemberAddRequest) -> Result<pb::MemberAddResponse, Status> {
    let peer = peer_of(&request.peer_ur_ls)?;
    let id = MemberId(draw_id()?.0);
    let role = if request.is_learner { MemberRole::Learner } else { MemberRole::Voter };
    // etcd learns the name when the member starts; here it must have one before.
    let name = format!("m{:016x}", id.0).into();
    let record = changed(&context, Op::MemberAdd { id, name, peer, role, replaces: None, join: [0; 32] }).await?;
    let member = pb::Member {
        id: id.0,
        name: String::new(),
        peer_ur_ls: vec![peer_url(&context, &record)],
        client_ur_ls: Vec::new(),
        is_learner: request.is_learner,
    };
    Ok(pb::MemberAddResponse { header: header(&context), member: Some(member), members: members(&context).await? })
}

async fn member_remove(context: Context, request: pb::MemberRemoveRequest) -> Result<pb::MemberRemoveResponse, Status> {
    let id = known(&context, request.id).await?.id;
    let removed = change(&context, Op::MemberRemove { id }).await.map_err(failed)?;
    match removed {
        Ok(_) => {}
        Err(Rejection::Invalid { .. }) => return Err(NOT_ENOUGH_STARTED.into()),
        Err(rejection) => return Err(rejected(&rejection)),
    }
    // It is decided; a member that goes because of it cannot tell more.
    let _ = until(&context, WAIT, move |status| is_gone(status, id)).await;
    let members = members(&context).await.unwrap_or_default();
    Ok(pb::MemberRemoveResponse { header: header(&context), members })
}

async fn member_update(context: Context, request: pb::MemberUpdateRequest) -> Result<pb::MemberUpdateResponse, Status> {
    let peer = peer_of(&request.peer_ur_ls)?;
    let id = known(&context, request.id).await?.id;
    changed(&context, Op::MemberUpdate { id, peer }).await?;
    Ok(pb::MemberUpdateResponse { header: header(&context), members: members(&context).await? })
}

async fn member_promote(
    context: Context,
    request: pb::MemberPromoteRequest,
) -> Result<pb::MemberPromoteResponse, Status> {
    let record = known(&context, request.id).await?;
    let id = record.id;
    let votes = move |status: &MemberStatus| is_voter(status, id);
    if context.query(true, move |view| votes(&view.member.status())).await.map_err(failed)? {
        return Err(status::MEMBER_NOT_LEARNER.into());
    }
    // As in etcd, one that never came is refused without effect.
    if !record.has_come() {
        return Err(LEARNER_NOT_READY.into());
    }
    if record.role == MemberRole::Learner {
        changed(&context, Op::MemberPromote { id }).await?;
    }
    match until(&context, WAIT, votes).await {
        Ok(true) => Ok(pb::MemberPromoteResponse { header: header(&context), members: members(&context).await? }),
        // It goes on, and asking again tells how it went.
        Ok(false) => Err(LEARNER_NOT_READY.into()),
        Err(Failure::Stopping) => Err(status::STOPPED.into()),
        Err(failure) => Err(failed(failure)),
    }
}
