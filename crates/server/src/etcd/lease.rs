//! etcd's Lease service over sessions: a lease is a session whose end deletes its keys.
//!
//! Promises. L1: granted times are those etcd would grant: whole seconds, at least one and a half election timeouts, at most 9,000,000,000.
//! L2: a keep-alive is answered only after a read-index round that began after it; what one read of the stream delivers shares a round.
//! Relies on. The member holds deadlines; the machine knows only that a lease exists.

use bytes::{BufMut as _, Bytes, BytesMut};
use tenure_machine::{OnExpire, Op, Rejection, SessionCreate, SessionFace, SessionId, Txn};
use tenure_wire::etcd::etcdserverpb as pb;

use super::{decode, encode, failed, require_leader, unary};
use crate::Context;
use crate::driver::View;
use crate::rpc::{Call, FRAME_HEAD, Incoming, Outgoing, Router, Status};
use crate::status::{self, etcd_rejection};

/// etcd's largest TTL, in seconds.
const TTL_MAX: i64 = 9_000_000_000;
/// Keep-alives of one stream that share a round.
const KEEP_ALIVES_MAX: usize = 1024;
/// Sessions looked at in one query of a list.
const LIST_STEP: usize = 10_000;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    unary(router, context, "/etcdserverpb.Lease/LeaseGrant", grant);
    unary(router, context, "/etcdserverpb.Lease/LeaseRevoke", revoke);
    unary(router, context, "/etcdserverpb.Lease/LeaseTimeToLive", time_to_live);
    unary(router, context, "/etcdserverpb.Lease/LeaseLeases", leases);
    let context = context.clone();
    router.stream("/etcdserverpb.Lease/LeaseKeepAlive", move |call, incoming, outgoing| {
        keep_alive(context.clone(), call, incoming, outgoing)
    });
}

async fn grant(context: Context, request: pb::LeaseGrantRequest) -> Result<pb::LeaseGrantResponse, Status> {
    if request.ttl > TTL_MAX {
        return Err(status::LEASE_TTL_TOO_LARGE.into());
    }
    let ttl = request.ttl.max(context.settings.min_lease_ttl);
    let id = if request.id == 0 { crate::native::sessions::draw_id()? } else { SessionId(request.id as u64) };
    let create = SessionCreate {
        id,
        face: SessionFace::Etcd,
        ttl_ms: ttl as u64 * 1000,
        on_expire: OnExpire::Delete,
        name: Box::default(),
        metadata: Vec::new(),
        alias: None,
        secret: None,
    };
    let reply = context.write(Txn::of(Op::SessionCreate(create))).await.map_err(failed)?;
    reply.result.map_err(|rejection| etcd_rejection(&rejection))?;
    Ok(pb::LeaseGrantResponse {
        header: Some(context.identity.header(reply.revision)),
        id: id.0 as i64,
        ttl,
        error: String::new(),
    })
}

async fn revoke(context: Context, request: pb::LeaseRevokeRequest) -> Result<pb::LeaseRevokeResponse, Status> {
    let op = Op::SessionEnd { session: SessionId(request.id as u64), token: None };
    let reply = context.write(Txn::of(op)).await.map_err(failed)?;
    reply.result.map_err(|rejection| etcd_rejection(&rejection))?;
    Ok(pb::LeaseRevokeResponse { header: Some(context.identity.header(reply.revision)) })
}

async fn time_to_live(
    context: Context,
    request: pb::LeaseTimeToLiveRequest,
) -> Result<pb::LeaseTimeToLiveResponse, Status> {
    let id = SessionId(request.id as u64);
    let with_keys = request.keys;
    let look = move |view: &View<'_>| {
        let found = view.machine.session(id).map(|info| {
            let left_ms = view.member.remaining_ms(id, view.now).unwrap_or(info.ttl_ms);
            let keys = if with_keys { view.machine.session_keys(id) } else { Vec::new() };
            (info.ttl_ms, left_ms, keys)
        });
        (found, view.machine.revision())
    };
    let (found, revision) = context.query(false, look).await.map_err(failed)?;
    let header = Some(context.identity.header(revision));
    let Some((ttl_ms, left_ms, keys)) = found else {
        return Ok(pb::LeaseTimeToLiveResponse { header, id: request.id, ttl: -1, ..Default::default() });
    };
    Ok(pb::LeaseTimeToLiveResponse {
        header,
        id: request.id,
        ttl: (left_ms / 1000) as i64,
        granted_ttl: (ttl_ms / 1000) as i64,
        keys: keys.iter().map(|key| Bytes::copy_from_slice(key.name())).collect(),
    })
}

async fn leases(context: Context, _: pb::LeaseLeasesRequest) -> Result<pb::LeaseLeasesResponse, Status> {
    let mut found: Vec<(u64, i64)> = Vec::new();
    let mut after = SessionId(0);
    loop {
        let look = move |view: &View<'_>| {
            let page = view.machine.sessions(after, LIST_STEP);
            let last = page.last().map(|info| info.id).filter(|_| page.len() == LIST_STEP);
            let is_lease = |info: &&tenure_machine::SessionInfo| info.face == SessionFace::Etcd;
            let left =
                |info: &tenure_machine::SessionInfo| view.member.remaining_ms(info.id, view.now).unwrap_or(info.ttl_ms);
            let leases: Vec<(u64, i64)> =
                page.iter().filter(is_lease).map(|info| (left(info), info.id.0 as i64)).collect();
            (leases, last, view.machine.revision())
        };
        let (mut leases, last, revision) = context.query(true, look).await.map_err(failed)?;
        found.append(&mut leases);
        match last {
            Some(id) => after = id,
            None => {
                // Those that end first come first, as in etcd.
                found.sort_unstable();
                let leases = found.into_iter().map(|(_, id)| pb::LeaseStatus { id }).collect();
                return Ok(pb::LeaseLeasesResponse { header: Some(context.identity.header(revision)), leases });
            }
        }
    }
}

async fn keep_alive(context: Context, call: Call, mut incoming: Incoming, outgoing: Outgoing) -> Result<(), Status> {
    require_leader(&context, &call)?;
    while let Some(message) = incoming.next().await {
        let mut ids = vec![keep_alive_id(message?)?];
        while ids.len() < KEEP_ALIVES_MAX
            && let Some(message) = incoming.try_next_ready()
        {
            ids.push(keep_alive_id(message?)?);
        }
        let sessions: Vec<_> = ids.iter().map(|&id| (SessionId(id as u64), 0)).collect();
        let (renewals, revision) = context.renew(sessions).await.map_err(failed)?;
        let mut frames = BytesMut::with_capacity(ids.len() * 48);
        for (&id, renewal) in ids.iter().zip(&renewals) {
            let ttl = match renewal {
                Ok(renewed) => (renewed.renewal.ttl_ms / 1000) as i64,
                Err(Rejection::SessionNotFound { .. } | Rejection::SessionExpired { .. }) => 0,
                Err(rejection) => return Err(etcd_rejection(rejection)),
            };
            let answer = encode::keep_alive(&context.identity, revision, id, ttl);
            frames.reserve(FRAME_HEAD + answer.len());
            frames.put_u8(0);
            frames.put_u32(answer.len() as u32);
            frames.put_slice(&answer);
        }
        outgoing.send_framed(frames.freeze()).await.map_err(|_| super::kv::cancelled())?;
    }
    Ok(())
}

fn keep_alive_id(message: Bytes) -> Result<i64, Status> {
    Ok(decode::<pb::LeaseKeepAliveRequest>(message)?.id)
}
