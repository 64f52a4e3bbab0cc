//! Native locks: acquire with waiting, release, cancel, look, list.
//!
//! Promises. A wait is bound to who waits: a session that a call made for itself ends when the caller is gone or refused, and takes wait and
//! hold with it. A wait without a request id ends with the deadline of its call.
//! Not promised. That a caller with a session of its own is cleaned up after: its waits live with its session, and it cancels them itself.

use std::time::Instant;

use tenure_machine::{
    LockAcquire, LockGrant, LockInfo, LockMode, OnExpire, Op, OpReply, RequestId, Revision, SessionCreate, SessionFace,
    SessionId, Txn, Wait,
};
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::reply::Result as Answer;

use super::sessions::{self, described, granted_ttl, id_for, metadata, native_unary, page_limit, query};
use super::{
    Caller, Finish, Outcome, Plan, Refused, full_header, namespace, planned, refusal, refuse, request_id, session_id,
};
use crate::Context;
use crate::driver::View;
use crate::rpc::{Router, Status};
use crate::status::{self as words, Kind};

const NAME_BYTES_MAX: usize = 1_024;
const OWNER_BYTES_MAX: usize = 1_024;
const WAIT_MAX_MS: u64 = 86_400_000;
const WAITERS_DEFAULT: usize = 100;
const WAITERS_MAX: u32 = 1_000;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    acquire_mount(router, context);
    planned(router, context, "/tenure.v1.Locks/Release", |_, caller, request| release(caller, &request));
    planned(router, context, "/tenure.v1.Locks/Cancel", |_, caller, request| cancel(caller, &request));
    native_unary(router, context, "/tenure.v1.Locks/Get", get);
    native_unary(router, context, "/tenure.v1.Locks/List", list);
}

/// What the answer to an acquire needs.
pub(crate) struct Acquired {
    arrived: Instant,
    /// The session that this call makes, to be ended if nothing comes of it.
    made: Option<SessionId>,
}

impl Acquired {
    pub(crate) fn answer(
        &self,
        header: Option<v1::Header>,
        grant: &LockGrant,
        remaining_ms: u64,
    ) -> v1::LockAcquireReply {
        let waited_ms = self.arrived.elapsed().as_millis() as u64;
        // A session of this call runs since its arrival, at the latest.
        let remaining_ms =
            if self.made.is_some() { remaining_ms.min(grant.ttl_ms.saturating_sub(waited_ms)) } else { remaining_ms };
        v1::LockAcquireReply {
            header,
            token: grant.token.0,
            session: grant.session.0,
            session_token: grant.session_token,
            ttl_ms: grant.ttl_ms,
            remaining_ms,
            waited_ms,
        }
    }

    /// Ends the session of a call that was refused. Where it was never made, the end is refused and that is well.
    pub(crate) fn clean_up(&self, context: &Context) {
        if let Some(session) = self.made {
            context.write_detached(Txn::of(Op::SessionEnd { session, token: None }));
        }
    }
}

/// Ends the session that a call made for itself, unless the call was answered.
struct Unanswered {
    context: Context,
    session: Option<SessionId>,
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(session) = self.session {
            self.context.write_detached(Txn::of(Op::SessionEnd { session, token: None }));
        }
    }
}

fn acquire_mount(router: &mut Router, context: &Context) {
    let context = context.clone();
    router.unary("/tenure.v1.Locks/Acquire", move |call, message| {
        let context = context.clone();
        async move {
            super::check_size(&context, message.len())?;
            let request: v1::LockAcquireRequest =
                prost::Message::decode(message).map_err(|error| Status::undecodable(&error))?;
            let has_request_id = request.request.is_some() || call.metadata.contains_key("idempotency-key");
            let plan = acquire(&context, &Caller::of(&call), request).map_err(refusal)?;
            // With a request id the caller may come back for its grant, so nothing is ended under it.
            let made = match &plan {
                Plan::Write(_, Finish::Acquire(acquired)) if !has_request_id => acquired.made,
                _ => None,
            };
            let mut unanswered = Unanswered { context: context.clone(), session: made };
            let answer = super::run(&context, plan).await;
            unanswered.session = None;
            answer
        }
    });
}

pub(crate) fn acquire(context: &Context, caller: &Caller, request: v1::LockAcquireRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    let id = request_id(request.request.as_ref(), caller)?;
    check_name(&request.name)?;
    if request.mode != i32::from(v1::LockMode::Exclusive) {
        return Err(refuse("mode", "this version grants exclusive locks only"));
    }
    if request.owner_id.len() > OWNER_BYTES_MAX {
        return Err(refuse("owner_id", format!("an owner id has at most {OWNER_BYTES_MAX} bytes")));
    }
    let wait = wait(&request, id.as_ref(), caller)?;
    let create = match (request.session, request.ttl_ms) {
        (0, 0) => return Err(refuse("session", "name a session, or a `ttl_ms` to make one")),
        (0, ttl_ms) => Some(SessionCreate {
            id: id_for(id.as_ref())?,
            face: SessionFace::Native,
            ttl_ms: granted_ttl(context, ttl_ms)?,
            on_expire: OnExpire::Delete,
            metadata: described(&request.session_name, request.session_metadata)?,
            name: request.session_name.into(),
            alias: None,
            secret: None,
        }),
        (_, 0) => None,
        (..) => return Err(refuse("ttl_ms", "the session is given, so none is made")),
    };
    let made = create.as_ref().map(|create| create.id);
    let op = Op::LockAcquire(LockAcquire {
        name: request.name.as_bytes().into(),
        session: session_id("session", request.session)?,
        create,
        owner: request.owner_id.as_bytes().into(),
        mode: LockMode::Exclusive,
        wait,
    });
    let txn = Txn { namespace, request: id, ..Txn::of(op) };
    Ok(Plan::Write(txn, Finish::Acquire(Box::new(Acquired { arrived: Instant::now(), made }))))
}

/// How long to wait. A call's own deadline shortens a wait without a request id; with one, a retry must ask for the same.
fn wait(request: &v1::LockAcquireRequest, id: Option<&RequestId>, caller: &Caller) -> Result<Wait, Refused> {
    use v1::lock_acquire_request::Wait as Wire;
    let left = || {
        caller
            .deadline
            .map(|deadline| deadline.saturating_duration_since(tokio::time::Instant::now()).as_millis() as u64)
    };
    let bound = if id.is_none() { left() } else { None };
    match request.wait {
        None | Some(Wire::WaitMs(0) | Wire::Forever(false)) => Ok(Wait::None),
        Some(Wire::WaitMs(ms)) if ms > WAIT_MAX_MS => {
            Err(refuse("wait_ms", format!("a wait has at most {WAIT_MAX_MS} ms")))
        }
        Some(Wire::WaitMs(ms)) => Ok(Wait::Ms(bound.map_or(ms, |left| ms.min(left)).max(1))),
        Some(Wire::Forever(true)) => Ok(bound.map_or(Wait::Forever, |left| Wait::Ms(left.max(1)))),
    }
}

fn check_name(name: &str) -> Result<(), Refused> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(refuse("name", format!("the name of a lock has 1 to {NAME_BYTES_MAX} bytes")));
    }
    Ok(())
}

pub(crate) fn release(caller: &Caller, request: &v1::LockReleaseRequest) -> Result<Plan, Refused> {
    check_name(&request.name)?;
    let op = Op::LockRelease {
        name: request.name.as_bytes().into(),
        session: session_id("session", request.session)?,
        token: Revision(request.token),
    };
    let txn = Txn {
        namespace: namespace(&request.namespace)?,
        request: request_id(request.request.as_ref(), caller)?,
        ..Txn::of(op)
    };
    Ok(Plan::Write(txn, Finish::Release))
}

/// What the answer to a cancellation needs.
pub(crate) struct Cancel {
    name: String,
    session: SessionId,
}

pub(crate) fn cancel(caller: &Caller, request: &v1::LockCancelRequest) -> Result<Plan, Refused> {
    check_name(&request.name)?;
    let nobody = Caller::default();
    let acquire = request_id(request.acquire.as_ref(), &nobody)?;
    // A session that the acquire made for itself is found by the same rule.
    let session = match (request.session, &acquire) {
        (0, Some(_)) => id_for(acquire.as_ref())?,
        (id, _) => session_id("session", id)?,
    };
    let op = Op::LockCancel { name: request.name.as_bytes().into(), session, request: acquire };
    let txn = Txn {
        namespace: namespace(&request.namespace)?,
        request: request_id(request.request.as_ref(), caller)?,
        ..Txn::of(op)
    };
    Ok(Plan::Write(txn, Finish::Cancel(Box::new(Cancel { name: request.name.clone(), session }))))
}

/// The answer to a cancellation: the wait is gone, or the grant came first, or there was neither.
pub(crate) async fn cancelled(context: &Context, cancel: Cancel, outcome: Outcome) -> Result<Answer, Refused> {
    let Outcome::Write(reply) = outcome else { return Err(super::mixed_up()) };
    let reply = reply.map_err(|failure| words::native_failure(&failure, Kind::Change))?.reply;
    let header = Some(super::header(reply.revision, reply.replayed));
    let result = reply
        .result
        .map_err(|rejection| words::native_rejection(&rejection, Kind::Change, context.identity.stamp()))?;
    let Some(OpReply::LockCancelled { waiters }) = result.results.first() else { return Err(super::mixed_up()) };
    if *waiters > 0 {
        let result = Some(v1::lock_cancel_reply::Result::Cancelled(true));
        return Ok(Answer::LockCancel(v1::LockCancelReply { header, result }));
    }
    let (name, session) = (cancel.name.clone(), cancel.session);
    let look = move |view: &View<'_>| {
        let lock = view.machine.lock(tenure_machine::NamespaceId::DEFAULT, name.as_bytes())?;
        let holder = lock.holder.filter(|holder| holder.session == session)?;
        let info = view.machine.session(session)?;
        let remaining_ms = view.member.remaining_ms(session, view.now).unwrap_or(0);
        Some((holder, info.token, info.ttl_ms, remaining_ms))
    };
    match query(context, false, look).await? {
        Some((holder, session_token, ttl_ms, remaining_ms)) => {
            let granted = v1::LockAcquireReply {
                header: None,
                token: holder.token.0,
                session: holder.session.0,
                session_token,
                ttl_ms,
                remaining_ms,
                waited_ms: 0,
            };
            let result = Some(v1::lock_cancel_reply::Result::Granted(granted));
            Ok(Answer::LockCancel(v1::LockCancelReply { header, result }))
        }
        None => Err(Box::new(words::nothing_to_cancel(&cancel.name))),
    }
}

async fn get(context: Context, request: v1::LockGetRequest) -> Result<v1::LockGetReply, Refused> {
    check_name(&request.name)?;
    let namespace = namespace(&request.namespace)?;
    let max = match request.waiters_limit {
        0 => WAITERS_DEFAULT,
        more if more > WAITERS_MAX => {
            return Err(refuse("waiters_limit", format!("at most {WAITERS_MAX} waiters are told")));
        }
        limit => limit as usize,
    };
    let name = request.name.clone();
    let look = move |view: &View<'_>| {
        let lock = view.machine.lock(namespace, name.as_bytes()).map(|info| shown(view, &info, max));
        (lock, view.machine.revision())
    };
    let (lock, revision) = query(&context, request.stale, look).await?;
    let free = || v1::Lock { name: request.name.clone(), ..Default::default() };
    Ok(v1::LockGetReply {
        header: full_header(&context, revision, request.stale),
        lock: Some(lock.unwrap_or_else(free)),
    })
}

async fn list(context: Context, request: v1::LockListRequest) -> Result<v1::LockListReply, Refused> {
    let namespace = namespace(&request.namespace)?;
    let max = page_limit(request.limit)?;
    let look = move |view: &View<'_>| {
        let after = Some(request.after.as_bytes()).filter(|after| !after.is_empty());
        let page = view.machine.locks(namespace, request.prefix.as_bytes(), after, max);
        let locks: Vec<v1::Lock> = page.iter().map(|info| shown(view, info, 0)).collect();
        (locks, view.machine.revision())
    };
    let (locks, revision) = query(&context, request.stale, look).await?;
    let next = locks.last().filter(|_| locks.len() == max).map_or_else(String::new, |last| last.name.clone());
    Ok(v1::LockListReply { header: full_header(&context, revision, request.stale), locks, next })
}

fn shown(view: &View<'_>, info: &LockInfo, waiters_max: usize) -> v1::Lock {
    let stamp = view.machine.stamp();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let holders = info.holder.iter().map(|holder| {
        let session = view.machine.session(holder.session);
        v1::LockHolder {
            token: holder.token.0,
            session: holder.session.0,
            session_token: session.as_ref().map_or(0, |session| session.token),
            owner_id: text(&holder.owner),
            held_ms: stamp.0.saturating_sub(holder.since.0),
            remaining_ms: view.member.remaining_ms(holder.session, view.now).unwrap_or(0),
            session_name: session.as_ref().map_or_else(String::new, |session| session.name.to_string()),
            metadata: session.as_ref().map(metadata).unwrap_or_default(),
        }
    });
    let waiters = info.waiters.iter().take(waiters_max).enumerate().map(|(place, waiter)| {
        let session = view.machine.session(waiter.session);
        v1::LockWaiter {
            position: place as u64 + 1,
            session: waiter.session.0,
            owner_id: text(&waiter.owner),
            waited_ms: stamp.0.saturating_sub(waiter.since.0),
            wait_left_ms: waiter.deadline.map_or(0, |deadline| deadline.0.saturating_sub(stamp.0)),
            session_name: session.as_ref().map_or_else(String::new, |session| session.name.to_string()),
            metadata: session.as_ref().map(sessions::metadata).unwrap_or_default(),
        }
    });
    v1::Lock {
        name: text(&info.name),
        mode: v1::LockMode::Exclusive.into(),
        holders: holders.collect(),
        waiters: waiters.collect(),
        waiter_count: info.waiters.len() as u64,
    }
}
