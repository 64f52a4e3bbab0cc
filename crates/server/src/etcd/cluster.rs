//! etcd's Cluster service for a cluster of one: it can be listed; changing it says that it cannot be changed yet.

use tenure_wire::etcd::etcdserverpb as pb;

use super::{failed, unary};
use crate::Context;
use crate::rpc::{Router, Status};
use crate::status;

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

fn this_member(context: &Context) -> pb::Member {
    pb::Member {
        id: context.identity.member(),
        name: context.settings.name.clone(),
        peer_ur_ls: context.settings.peer_urls.clone(),
        client_ur_ls: context.settings.client_urls.clone(),
        is_learner: false,
    }
}

async fn member_list(context: Context, request: pb::MemberListRequest) -> Result<pb::MemberListResponse, Status> {
    if request.linearizable {
        context.query(false, |_| ()).await.map_err(failed)?;
    }
    Ok(pb::MemberListResponse { header: header(&context), members: vec![this_member(&context)] })
}

fn unchangeable() -> Status {
    Status::unimplemented(
        "tenure: a cluster of one member cannot be changed yet; start a new cluster and copy the keys",
    )
}

async fn member_add(_: Context, request: pb::MemberAddRequest) -> Result<pb::MemberAddResponse, Status> {
    let is_url = |url: &String| {
        url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")).is_some_and(|rest| rest.contains(':'))
    };
    if request.peer_ur_ls.is_empty() || !request.peer_ur_ls.iter().all(is_url) {
        return Err(status::MEMBER_BAD_URLS.into());
    }
    Err(unchangeable())
}

fn known(context: &Context, id: u64) -> Result<(), Status> {
    if id == context.identity.member() { Ok(()) } else { Err(status::MEMBER_NOT_FOUND.into()) }
}

async fn member_remove(context: Context, request: pb::MemberRemoveRequest) -> Result<pb::MemberRemoveResponse, Status> {
    known(&context, request.id)?;
    Err(unchangeable())
}

async fn member_update(context: Context, request: pb::MemberUpdateRequest) -> Result<pb::MemberUpdateResponse, Status> {
    known(&context, request.id)?;
    Err(unchangeable())
}

async fn member_promote(
    context: Context,
    request: pb::MemberPromoteRequest,
) -> Result<pb::MemberPromoteResponse, Status> {
    known(&context, request.id)?;
    Err(status::MEMBER_NOT_LEARNER.into())
}
