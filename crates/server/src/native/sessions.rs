//! Native sessions: create, renew (also as a stream), look, list, end.
//!
//! Promises. A renewal is answered only after a read-index round that began after it; one of an ended or other incarnation is told as
//! SESSION_EXPIRED and renews nothing.

use std::collections::BTreeMap;

use tenure_machine::{Machine, OnExpire, Op, RequestId, SessionCreate, SessionFace, SessionId, SessionInfo, Txn};
use tenure_wire::Spaced;
use tenure_wire::tenure::v1;

use super::{
    Caller, Finish, Plan, Refused, decoded, namespace, planned, refusal, refuse, request_id, seen, session_id,
};
use crate::Context;
use crate::driver::{RenewReplies, Renewed, View};
use crate::rpc::{Call, Incoming, Outgoing, Router, Status};
use crate::status::{self as words, Kind};

const TTL_DEFAULT_MS: u64 = 15_000;
const TTL_MAX_MS: u64 = 86_400_000;
const NAME_BYTES_MAX: usize = 255;
const METADATA_MAX: usize = 16;
const METADATA_BYTES_MAX: usize = 4 << 10;
const RENEWALS_MAX: usize = 1_000;
const PAGE_DEFAULT: u32 = 100;
const PAGE_MAX: u32 = 1_000;
const OWNED_MAX: usize = 1_000;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    planned(router, context, "/tenure.v1.Sessions/Create", create);
    planned(router, context, "/tenure.v1.Sessions/Renew", |_, _, request| renew(&request));
    planned(router, context, "/tenure.v1.Sessions/End", |_, caller, request| end(caller, &request));
    native_unary(router, context, "/tenure.v1.Sessions/Get", get);
    native_unary(router, context, "/tenure.v1.Sessions/List", list);
    let context = context.clone();
    router.stream("/tenure.v1.Sessions/KeepAlive", move |call, incoming, outgoing| {
        keep_alive(context.clone(), call, incoming, outgoing)
    });
}

/// Mounts a call whose answer is a message of its own.
pub(crate) fn native_unary<Q, A, F, R>(router: &mut Router, context: &Context, path: &'static str, method: F)
where
    Q: prost::Message + Default + Spaced + 'static,
    A: prost::Message + 'static,
    F: Fn(Context, Q) -> R + Copy + Send + Sync + 'static,
    R: Future<Output = Result<A, Refused>> + Send + 'static,
{
    let context = context.clone();
    router.unary(path, move |_, message| {
        let context = context.clone();
        async move {
            let request = decoded(message).map_err(refusal)?;
            let answer = method(context, request).await.map_err(refusal)?;
            Ok(answer.encode_to_vec().into())
        }
    });
}

/// An id that nobody can guess or has used: 63 random bits.
pub(crate) fn draw_id() -> Result<SessionId, Status> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes)
        .map_err(|error| Status::internal(format!("the system gives no random numbers: {error}")))?;
    Ok(SessionId((u64::from_le_bytes(bytes) >> 1).max(1)))
}

/// The id of a session that a call makes. With a request id it follows from that, so that a retry asks for the same session.
pub(crate) fn id_for(request: Option<&RequestId>) -> Result<SessionId, Refused> {
    let parts: [u64; 2] = match request {
        None => return draw_id().map_err(|status| refuse("id", status.message)),
        Some(RequestId::Uuid(uuid)) => {
            let (low, high) = uuid.split_at(8);
            let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
            [number(low), number(high)]
        }
        Some(RequestId::Session { session, seq, .. }) => [session.0, *seq],
        Some(RequestId::Series { series, seq, .. }) => [*series, *seq],
    };
    // splitmix64 over both, so that neighbouring numbers give unrelated ids.
    let mut id = 0u64;
    for part in parts {
        id = (id ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        id = (id ^ (id >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        id = (id ^ (id >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        id ^= id >> 31;
    }
    Ok(SessionId((id >> 1).max(1)))
}

pub(crate) fn granted_ttl(context: &Context, asked_ms: u64) -> Result<u64, Refused> {
    match asked_ms {
        0 => Ok(TTL_DEFAULT_MS.max(context.settings.min_session_ttl_ms)),
        more if more > TTL_MAX_MS => {
            Err(refuse("ttl_ms", format!("a session lives at most {TTL_MAX_MS} ms without renewal")))
        }
        asked => Ok(asked.max(context.settings.min_session_ttl_ms)),
    }
}

/// Metadata as a session keeps it.
type Metadata = Vec<(Box<str>, Box<str>)>;

pub(crate) fn described(name: &str, metadata: BTreeMap<String, String>) -> Result<Metadata, Refused> {
    if name.len() > NAME_BYTES_MAX {
        return Err(refuse("name", format!("a session's name has at most {NAME_BYTES_MAX} bytes")));
    }
    let bytes: usize = metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    if metadata.len() > METADATA_MAX || bytes > METADATA_BYTES_MAX {
        return Err(refuse(
            "metadata",
            format!("metadata has at most {METADATA_MAX} entries and {METADATA_BYTES_MAX} bytes"),
        ));
    }
    Ok(metadata.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
}

pub(crate) fn create(context: &Context, caller: &Caller, request: v1::SessionCreateRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    let id = request_id(request.request.as_ref(), caller)?;
    let on_expire = match v1::OnExpire::try_from(request.on_expire) {
        Ok(v1::OnExpire::Delete) => OnExpire::Delete,
        Ok(v1::OnExpire::Release) => OnExpire::Release,
        Err(_) => return Err(refuse("on_expire", "there is no such end of a session")),
    };
    let create = SessionCreate {
        id: if request.id == 0 { id_for(id.as_ref())? } else { session_id("id", request.id)? },
        face: SessionFace::Native,
        ttl_ms: granted_ttl(context, request.ttl_ms)?,
        on_expire,
        metadata: described(&request.name, request.metadata)?,
        name: request.name.into(),
        alias: None,
        secret: None,
    };
    let txn = Txn { namespace, request: id, ..Txn::of(Op::SessionCreate(create)) };
    Ok(Plan::Write(txn, Finish::SessionCreate))
}

pub(crate) fn end(caller: &Caller, request: &v1::SessionEndRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    let op = Op::SessionEnd {
        session: session_id("id", request.id)?,
        token: if request.token == 0 { None } else { Some(request.token) },
    };
    let txn = Txn { namespace, request: request_id(request.request.as_ref(), caller)?, ..Txn::of(op) };
    Ok(Plan::Write(txn, Finish::SessionEnd))
}

pub(crate) fn renew(request: &v1::SessionRenewRequest) -> Result<Plan, Refused> {
    namespace(&request.namespace)?;
    if request.sessions.len() > RENEWALS_MAX {
        return Err(refuse("sessions", format!("one call renews at most {RENEWALS_MAX} sessions")));
    }
    let ids = request.sessions.iter().map(|session| session.id).collect();
    let sessions = request.sessions.iter().map(|session| (SessionId(session.id), session.token)).collect();
    Ok(Plan::Renew(sessions, Finish::SessionRenew(ids)))
}

pub(crate) fn renewed(context: &Context, ids: &[u64], replies: RenewReplies) -> Result<v1::SessionRenewReply, Refused> {
    let (replies, revision) = replies.map_err(|failure| words::native_failure(&failure, Kind::Change))?;
    let one = |(&id, reply): (&u64, _)| match reply {
        Ok(Renewed { renewal: tenure_replica::Renewal { session, token, ttl_ms }, yields }) => {
            let should_yield = yields.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
            v1::SessionRenewal { id: session.0, token, ttl_ms, remaining_ms: ttl_ms, error: None, should_yield }
        }
        Err(rejection) => {
            let error = match words::native_rejection(&rejection, Kind::Change, context.identity.stamp()) {
                error if error.code == "SESSION_EXPIRED" => words::session_expired(id),
                error => error,
            };
            v1::SessionRenewal { id, error: Some(error), ..Default::default() }
        }
    };
    let renewals = ids.iter().zip(replies).map(one).collect();
    Ok(v1::SessionRenewReply { header: Some(super::header(revision, false)), renewals })
}

async fn keep_alive(context: Context, _: Call, mut incoming: Incoming, outgoing: Outgoing) -> Result<(), Status> {
    while let Some(message) = incoming.next().await {
        let request = decoded(message?).map_err(refusal)?;
        let plan = renew(&request).map_err(refusal)?;
        let answer = super::run(&context, plan).await?;
        outgoing.send(answer).await.map_err(|_| crate::etcd::kv::cancelled())?;
    }
    Ok(())
}

async fn get(context: Context, request: v1::SessionGetRequest) -> Result<v1::SessionGetReply, Refused> {
    let id = SessionId(request.id);
    let owned = request.owned;
    let look = move |view: &View<'_>| {
        let found = view.machine.session(id).map(|info| {
            let mut session = shown(view, &info);
            if owned {
                session.owned = owned_things(view.machine, id);
            }
            session
        });
        (found, seen(view, request.stale))
    };
    let (found, header) = query(&context, request.stale, look).await?;
    match found {
        Some(session) => Ok(v1::SessionGetReply { header, session: Some(session) }),
        None => Err(Box::new(words::not_found("there is no such session", &[("session", request.id.to_string())]))),
    }
}

async fn list(context: Context, request: v1::SessionListRequest) -> Result<v1::SessionListReply, Refused> {
    let max = page_limit(request.limit)?;
    let after = SessionId(request.after);
    let look = move |view: &View<'_>| {
        let page = view.machine.sessions(after, max);
        let sessions: Vec<v1::Session> = page.iter().map(|info| shown(view, info)).collect();
        (sessions, seen(view, request.stale))
    };
    let (sessions, header) = query(&context, request.stale, look).await?;
    let next = sessions.last().filter(|_| sessions.len() == max).map_or(0, |last| last.id);
    Ok(v1::SessionListReply { header, sessions, next })
}

pub(crate) fn page_limit(limit: u32) -> Result<usize, Refused> {
    match limit {
        0 => Ok(PAGE_DEFAULT as usize),
        limit if limit > PAGE_MAX => Err(refuse("limit", format!("a page has at most {PAGE_MAX} entries"))),
        limit => Ok(limit as usize),
    }
}

pub(crate) async fn query<T: Send + 'static>(
    context: &Context,
    stale: bool,
    look: impl FnOnce(&View<'_>) -> T + Send + 'static,
) -> Result<T, Refused> {
    context.query(stale, look).await.map_err(|failure| Box::new(words::native_failure(&failure, Kind::Read)))
}

fn shown(view: &View<'_>, info: &SessionInfo) -> v1::Session {
    let on_expire = match info.on_expire {
        OnExpire::Delete => v1::OnExpire::Delete,
        OnExpire::Release => v1::OnExpire::Release,
    };
    v1::Session {
        id: info.id.0,
        token: info.token,
        name: info.name.to_string(),
        metadata: metadata(info),
        on_expire: on_expire.into(),
        ttl_ms: info.ttl_ms,
        remaining_ms: view.member.remaining_ms(info.id, view.now).unwrap_or(0),
        age_ms: view.machine.stamp().0.saturating_sub(info.created.0),
        lease: info.face == SessionFace::Etcd,
        owned_count: info.keys + info.locks,
        owned: Vec::new(),
    }
}

pub(crate) fn metadata(info: &SessionInfo) -> BTreeMap<String, String> {
    info.metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

fn owned_things(machine: &Machine, id: SessionId) -> Vec<v1::Owned> {
    let key = |key: tenure_machine::Key| {
        let (name, name_bytes) = super::text_or_bytes(key.name());
        let token = machine.get(&key).map_or(0, |record| record.meta().mod_revision.0);
        v1::Owned { kind: v1::owned::Kind::Key.into(), name, name_bytes, token }
    };
    machine.session_keys(id).into_iter().take(OWNED_MAX).map(key).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retry_asks_for_the_same_session() {
        let uuid = RequestId::Uuid([7; 16]);
        assert_eq!(id_for(Some(&uuid)).unwrap(), id_for(Some(&uuid)).unwrap());
        let at = |seq, acked_below| RequestId::Session { session: SessionId(5), seq, acked_below };
        // What is acknowledged changes between tries.
        assert_eq!(id_for(Some(&at(3, 0))).unwrap(), id_for(Some(&at(3, 2))).unwrap());
        assert_ne!(id_for(Some(&at(3, 0))).unwrap(), id_for(Some(&at(4, 0))).unwrap());
        assert!(id_for(None).unwrap() != id_for(None).unwrap());
    }
}
