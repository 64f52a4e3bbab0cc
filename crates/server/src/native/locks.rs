//! Native locks: acquire one or several with waiting, release, cancel, look, list, and what operators do.
//!
//! Promises. A wait is bound to who waits: a session that a call made for itself ends when the caller is gone or refused, and takes wait and
//! hold with it. A wait without a request id ends with the deadline of its call.
//! Not promised. That a caller with a session of its own is cleaned up after: its waits live with its session, and it cancels them itself.

use std::time::Instant;

use tenure_machine::{
    DELAY_MAX_MS, HoldInfo, HoldMode, LOCKS_OF_ONE_MAX, LockAcquire, LockAsk, LockEvent, LockEventKind,
    LockForceRelease, LockGrant, LockGranted, LockInfo, LockItem, LockMode, LockOp, LockRelease, LockReply, LockResize,
    MIN_HOLD_MAX_MS, NamespaceId, NativeReply, OnDeadlock, OnExpire, Op, OpReply, PERMITS_MAX, Permits,
    REASON_BYTES_MAX, RefusalCode, Rejection, RequestId, Revision, SessionCreate, SessionFace, SessionId, Txn, Wait,
};
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::reply::Result as Answer;

use super::sessions::{self, described, granted_ttl, id_for, metadata, native_unary, page_limit, query};
use super::{
    Caller, Changed, Finish, Outcome, Plan, PlanFn, Refused, change, decoded, namespace, planned, refusal, refuse,
    request_id, seen, session_id, text,
};
use crate::Context;
use crate::driver::View;
use crate::rpc::Router;
use crate::status::{self as words, Kind};

const NAME_BYTES_MAX: usize = 1_024;
const OWNER_BYTES_MAX: usize = 1_024;
const WAIT_MAX_MS: u64 = 86_400_000;
const WAITERS_DEFAULT: usize = 100;
const WAITERS_MAX: u32 = 1_000;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    acquire_mount(router, context);
    change(router, context, "/tenure.v1.Locks/ForceRelease", force_release, force_released);
    change(router, context, "/tenure.v1.Locks/Resize", resize, resized);
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
    /// Several locks, which are answered otherwise.
    many: bool,
}

impl Acquired {
    /// The answer to an acquire that was more than plain.
    pub(crate) fn granted(
        &self,
        context: &Context,
        header: Option<v1::Header>,
        reply: &NativeReply,
        remaining_ms: u64,
    ) -> Result<Answer, Refused> {
        let NativeReply::Lock(LockReply::Granted(grant)) = reply else { return Err(super::mixed_up()) };
        let LockGranted { token, session, session_token, ttl_ms, depth, ref locks } = *grant;
        let plain = LockGrant { token, session, session_token, ttl_ms };
        let one = self.answer(header, &plain, remaining_ms);
        if !self.many {
            let slots = locks.first().map(|lock| lock.slots.clone()).unwrap_or_default();
            return Ok(Answer::LockAcquire(v1::LockAcquireReply { slots, depth, ..one }));
        }
        let mut header = one.header.unwrap_or_default();
        super::identify(context, &mut header);
        let part = |part: &tenure_machine::LockPart| v1::LockPart { name: text(&part.name), slots: part.slots.clone() };
        let reply = v1::LockAcquireManyReply {
            header: Some(header),
            token: one.token,
            session: one.session,
            session_token: one.session_token,
            ttl_ms: one.ttl_ms,
            remaining_ms: one.remaining_ms,
            waited_ms: one.waited_ms,
            locks: locks.iter().map(part).collect(),
        };
        Ok(Answer::Unary(prost::Message::encode_to_vec(&reply).into()))
    }

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
            slots: Vec::new(),
            depth: 1,
        }
    }

    /// Ends the session of a call that has waited in vain. What is refused at once has made none, and may be a copy of a call
    /// whose session lives: another request under its id, or one that came late.
    pub(crate) fn clean_up(&self, context: &Context, rejection: &Rejection) {
        let has_waited = match rejection {
            Rejection::TimeoutWaiting { .. } | Rejection::Cancelled { .. } => true,
            Rejection::Refused(refusal) => refusal.code == RefusalCode::Deadlock,
            _ => false,
        };
        if let Some(session) = self.made.filter(|_| has_waited) {
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
    // With a request id the caller may come back for its grant, so nothing is ended under it.
    mount_acquire(router, context, "/tenure.v1.Locks/Acquire", |context, caller, message| {
        let request: v1::LockAcquireRequest = decoded(message)?;
        Ok((request.request.is_some(), acquire(context, caller, request)?))
    });
    mount_acquire(router, context, "/tenure.v1.Locks/AcquireMany", |context, caller, message| {
        let request: v1::LockAcquireManyRequest = decoded(message)?;
        Ok((request.request.is_some(), acquire_many(context, caller, request)?))
    });
    let many: PlanFn = std::sync::Arc::new(|context, caller, message| acquire_many(context, caller, decoded(message)?));
    router.plans.insert("/tenure.v1.Locks/AcquireMany", many);
}

/// Mounts an acquire, of which the function tells whether it has a request id.
fn mount_acquire<F>(router: &mut Router, context: &Context, path: &'static str, plan: F)
where
    F: Fn(&Context, &Caller, bytes::Bytes) -> Result<(bool, Plan), Refused> + Copy + Send + Sync + 'static,
{
    let context = context.clone();
    router.unary(path, move |call, message| {
        let context = context.clone();
        async move {
            super::check_size(&context, message.len())?;
            let has_header = call.metadata.contains_key("idempotency-key");
            let (has_request_id, plan) = plan(&context, &Caller::of(&call), message).map_err(refusal)?;
            let made = match &plan {
                Plan::Write(_, Finish::Acquire(acquired)) if !has_request_id && !has_header => acquired.made,
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
    use v1::lock_acquire_request::Wait as Wire;
    let namespace = namespace(&request.namespace)?;
    let mode = hold_mode("", request.mode, request.permits, request.of)?;
    check_name(&request.name)?;
    let wait = match request.wait {
        Some(Wire::WaitMs(ms)) => Asked::Ms(ms),
        Some(Wire::Forever(true)) => Asked::Forever,
        None | Some(Wire::Forever(false)) => Asked::Ms(0),
    };
    let asker = Asker {
        session: request.session,
        owner_id: request.owner_id,
        wait,
        ttl_ms: request.ttl_ms,
        session_name: request.session_name,
        session_metadata: request.session_metadata,
        namespace,
        request: request.request,
        priority: request.priority,
        reentrant: request.reentrant,
        lock_delay_ms: request.lock_delay_ms,
        min_hold_ms: request.min_hold_ms,
        on_deadlock: request.on_deadlock,
    };
    asker.plan(context, caller, vec![LockItem { name: request.name.as_bytes().into(), mode }], false)
}

fn acquire_many(context: &Context, caller: &Caller, request: v1::LockAcquireManyRequest) -> Result<Plan, Refused> {
    use v1::lock_acquire_many_request::Wait as Wire;
    let namespace = namespace(&request.namespace)?;
    if request.locks.is_empty() || request.locks.len() > LOCKS_OF_ONE_MAX {
        return Err(refuse("locks", format!("1 to {LOCKS_OF_ONE_MAX} locks are taken at once")));
    }
    let mut names = std::collections::BTreeSet::new();
    let mut items = Vec::with_capacity(request.locks.len());
    for (n, lock) in request.locks.iter().enumerate() {
        check_name(&lock.name).map_err(|_| refuse(&format!("locks[{n}].name"), NAME_RULE))?;
        if !names.insert(&lock.name) {
            return Err(refuse(&format!("locks[{n}].name"), format!("`{}` is named twice", lock.name)));
        }
        let mode = hold_mode(&format!("locks[{n}]."), lock.mode, lock.permits, lock.of)?;
        items.push(LockItem { name: lock.name.as_bytes().into(), mode });
    }
    let wait = match request.wait {
        Some(Wire::WaitMs(ms)) => Asked::Ms(ms),
        Some(Wire::Forever(true)) => Asked::Forever,
        None | Some(Wire::Forever(false)) => Asked::Ms(0),
    };
    let asker = Asker {
        session: request.session,
        owner_id: request.owner_id,
        wait,
        ttl_ms: request.ttl_ms,
        session_name: request.session_name,
        session_metadata: request.session_metadata,
        namespace,
        request: request.request,
        priority: request.priority,
        reentrant: false,
        lock_delay_ms: request.lock_delay_ms,
        min_hold_ms: request.min_hold_ms,
        on_deadlock: request.on_deadlock,
    };
    asker.plan(context, caller, items, true)
}

/// How long a caller wants to wait.
#[derive(Clone, Copy)]
enum Asked {
    Ms(u64),
    Forever,
}

/// What the acquires of one lock and of several have in common.
struct Asker {
    session: u64,
    owner_id: String,
    wait: Asked,
    ttl_ms: u64,
    session_name: String,
    session_metadata: std::collections::BTreeMap<String, String>,
    namespace: NamespaceId,
    request: Option<v1::RequestMeta>,
    priority: i32,
    reentrant: bool,
    lock_delay_ms: u64,
    min_hold_ms: u64,
    on_deadlock: i32,
}

impl Asker {
    fn plan(self, context: &Context, caller: &Caller, locks: Vec<LockItem>, many: bool) -> Result<Plan, Refused> {
        let namespace = self.namespace;
        let id = request_id(self.request.as_ref(), caller)?;
        if self.owner_id.len() > OWNER_BYTES_MAX {
            return Err(refuse("owner_id", format!("an owner id has at most {OWNER_BYTES_MAX} bytes")));
        }
        if self.lock_delay_ms > DELAY_MAX_MS {
            return Err(refuse("lock_delay_ms", format!("a lock delay has at most {DELAY_MAX_MS} ms")));
        }
        if self.min_hold_ms > MIN_HOLD_MAX_MS {
            return Err(refuse("min_hold_ms", format!("a least time has at most {MIN_HOLD_MAX_MS} ms")));
        }
        let on_deadlock = on_deadlock(self.on_deadlock)?;
        let wait = wait(self.wait, id.as_ref(), caller)?;
        let create = match (self.session, self.ttl_ms) {
            (0, 0) => return Err(refuse("session", "name a session, or a `ttl_ms` to make one")),
            (0, ttl_ms) => Some(SessionCreate {
                id: id_for(id.as_ref())?,
                face: SessionFace::Native,
                ttl_ms: granted_ttl(context, ttl_ms)?,
                on_expire: OnExpire::Delete,
                metadata: described(&self.session_name, self.session_metadata)?,
                name: self.session_name.into(),
                alias: None,
                secret: None,
            }),
            (_, 0) => None,
            (..) => return Err(refuse("ttl_ms", "the session is given, so none is made")),
        };
        let made = create.as_ref().map(|create| create.id);
        let session = session_id("session", self.session)?;
        let owner: Box<[u8]> = self.owner_id.as_bytes().into();
        let is_plain = !many
            && locks[0].mode == HoldMode::Exclusive
            && (self.priority, self.lock_delay_ms, self.min_hold_ms) == (0, 0, 0)
            && !self.reentrant
            && on_deadlock == OnDeadlock::Newcomer;
        let op = if is_plain {
            let name = locks[0].name.clone();
            Op::LockAcquire(LockAcquire { name, session, create, owner, mode: LockMode::Exclusive, wait })
        } else {
            LockOp::Acquire(Box::new(LockAsk {
                locks,
                session,
                create,
                owner,
                wait,
                priority: self.priority,
                reentrant: self.reentrant,
                delay_ms: self.lock_delay_ms,
                min_hold_ms: self.min_hold_ms,
                on_deadlock,
            }))
            .into()
        };
        let txn = Txn { namespace, request: id, ..Txn::of(op) };
        Ok(Plan::Write(txn, Finish::Acquire(Box::new(Acquired { arrived: Instant::now(), made, many }))))
    }
}

/// The mode of a lock, of fields that begin with `at`.
fn hold_mode(at: &str, mode: i32, permits: u32, of: u32) -> Result<HoldMode, Refused> {
    let field = |name: &str| format!("{at}{name}");
    let has_permits = permits > 0 || of > 0;
    match v1::LockMode::try_from(mode) {
        Err(_) => Err(refuse(&field("mode"), format!("there is no mode {mode}"))),
        Ok(v1::LockMode::Permits) if of == 0 || of > PERMITS_MAX => {
            Err(refuse(&field("of"), format!("a lock has 1 to {PERMITS_MAX} permits")))
        }
        Ok(v1::LockMode::Permits) if permits == 0 || permits > of => {
            Err(refuse(&field("permits"), format!("1 to {of} permits can be taken")))
        }
        Ok(v1::LockMode::Permits) => Ok(HoldMode::Permits(Permits { count: permits, of })),
        Ok(_) if has_permits => Err(refuse(&field("permits"), "permits are taken with the mode PERMITS")),
        Ok(v1::LockMode::Exclusive) => Ok(HoldMode::Exclusive),
        Ok(v1::LockMode::Shared) => Ok(HoldMode::Shared),
    }
}

fn on_deadlock(policy: i32) -> Result<OnDeadlock, Refused> {
    match v1::OnDeadlock::try_from(policy) {
        Ok(v1::OnDeadlock::Newcomer) => Ok(OnDeadlock::Newcomer),
        Ok(v1::OnDeadlock::LowestPriority) => Ok(OnDeadlock::LowestPriority),
        Ok(v1::OnDeadlock::Youngest) => Ok(OnDeadlock::Youngest),
        Err(_) => Err(refuse("on_deadlock", format!("there is no policy {policy}"))),
    }
}

/// How long to wait. A call's own deadline shortens a wait without a request id; with one, a retry must ask for the same.
fn wait(asked: Asked, id: Option<&RequestId>, caller: &Caller) -> Result<Wait, Refused> {
    let left = || {
        caller
            .deadline
            .map(|deadline| deadline.saturating_duration_since(tokio::time::Instant::now()).as_millis() as u64)
    };
    let bound = if id.is_none() { left() } else { None };
    match asked {
        Asked::Ms(0) => Ok(Wait::None),
        Asked::Ms(ms) if ms > WAIT_MAX_MS => Err(refuse("wait_ms", format!("a wait has at most {WAIT_MAX_MS} ms"))),
        Asked::Ms(ms) => Ok(Wait::Ms(bound.map_or(ms, |left| ms.min(left)).max(1))),
        Asked::Forever => Ok(bound.map_or(Wait::Forever, |left| Wait::Ms(left.max(1)))),
    }
}

const NAME_RULE: &str = "the name of a lock has 1 to 1,024 bytes";

fn check_name(name: &str) -> Result<(), Refused> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(refuse("name", NAME_RULE));
    }
    Ok(())
}

pub(crate) fn release(caller: &Caller, request: &v1::LockReleaseRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    check_name(&request.name)?;
    if request.owner_id.len() > OWNER_BYTES_MAX {
        return Err(refuse("owner_id", format!("an owner id has at most {OWNER_BYTES_MAX} bytes")));
    }
    let (name, token) = (request.name.as_bytes().into(), Revision(request.token));
    let session = session_id("session", request.session)?;
    let op = if request.owner_id.is_empty() {
        Op::LockRelease { name, session, token }
    } else {
        LockOp::Release(LockRelease { name, session, token, owner: request.owner_id.as_bytes().into() }).into()
    };
    let txn = Txn { namespace, request: request_id(request.request.as_ref(), caller)?, ..Txn::of(op) };
    Ok(Plan::Write(txn, Finish::Release))
}

/// How often a lock must still be released.
pub(crate) fn released(header: Option<v1::Header>, reply: &NativeReply) -> Result<Answer, Refused> {
    let NativeReply::Lock(LockReply::Released(depth)) = reply else { return Err(super::mixed_up()) };
    Ok(Answer::LockRelease(v1::LockReleaseReply { header, depth: *depth }))
}

fn force_release(_: &Context, caller: &Caller, request: &v1::LockForceReleaseRequest) -> Result<Txn, Refused> {
    check_name(&request.name)?;
    if request.expected_token == 0 {
        return Err(refuse("expected_token", "name the token of the grant to take away"));
    }
    if request.reason.is_empty() || request.reason.len() > REASON_BYTES_MAX {
        return Err(refuse("reason", format!("a reason has 1 to {REASON_BYTES_MAX} bytes")));
    }
    let op = LockOp::ForceRelease(LockForceRelease {
        name: request.name.as_bytes().into(),
        token: Revision(request.expected_token),
        session: session_id("session", request.session)?,
        reason: request.reason.as_str().into(),
    });
    let (namespace, id) = (namespace(&request.namespace)?, request_id(request.request.as_ref(), caller)?);
    Ok(Txn { namespace, request: id, ..Txn::of(op.into()) })
}

fn force_released(
    _: &Context,
    request: &v1::LockForceReleaseRequest,
    changed: Changed,
) -> Result<v1::LockForceReleaseReply, Refused> {
    let taken = match changed.reply {
        OpReply::Native(reply) => match *reply {
            NativeReply::Lock(LockReply::ForceReleased(taken)) => taken,
            _ => return Err(super::mixed_up()),
        },
        _ => return Err(super::mixed_up()),
    };
    tracing::warn!(
        lock = request.name,
        token = request.expected_token,
        reason = request.reason,
        taken,
        "a lock was taken away"
    );
    Ok(v1::LockForceReleaseReply { header: Some(changed.header), taken })
}

fn resize(_: &Context, caller: &Caller, request: &v1::LockResizeRequest) -> Result<Txn, Refused> {
    check_name(&request.name)?;
    if !(1..=PERMITS_MAX).contains(&request.of) {
        return Err(refuse("of", format!("a lock has 1 to {PERMITS_MAX} permits")));
    }
    let op = LockOp::Resize(LockResize { name: request.name.as_bytes().into(), permits: request.of });
    let (namespace, id) = (namespace(&request.namespace)?, request_id(request.request.as_ref(), caller)?);
    Ok(Txn { namespace, request: id, ..Txn::of(op.into()) })
}

fn resized(_: &Context, _: &v1::LockResizeRequest, changed: Changed) -> Result<v1::LockResizeReply, Refused> {
    match changed.reply {
        OpReply::Native(reply) => match *reply {
            NativeReply::Lock(LockReply::Resized(before)) => {
                Ok(v1::LockResizeReply { header: Some(changed.header), before })
            }
            _ => Err(super::mixed_up()),
        },
        _ => Err(super::mixed_up()),
    }
}

/// What the answer to a cancellation needs.
pub(crate) struct Cancel {
    name: String,
    owner: String,
    session: SessionId,
}

pub(crate) fn cancel(caller: &Caller, request: &v1::LockCancelRequest) -> Result<Plan, Refused> {
    let namespace = namespace(&request.namespace)?;
    check_name(&request.name)?;
    let nobody = Caller::default();
    let acquire = request_id(request.acquire.as_ref(), &nobody)?;
    // A session that the acquire made for itself is found by the same rule.
    let session = match (request.session, &acquire) {
        (0, Some(_)) => id_for(acquire.as_ref())?,
        (id, _) => session_id("session", id)?,
    };
    let op = Op::LockCancel { name: request.name.as_bytes().into(), session, request: acquire };
    let txn = Txn { namespace, request: request_id(request.request.as_ref(), caller)?, ..Txn::of(op) };
    Ok(Plan::Write(
        txn,
        Finish::Cancel(Box::new(Cancel { name: request.name.clone(), owner: request.owner_id.clone(), session })),
    ))
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
    let (name, owner, session) = (cancel.name.clone(), cancel.owner.clone(), cancel.session);
    let look = move |view: &View<'_>| {
        let lock = view.machine.lock(tenure_machine::NamespaceId::DEFAULT, name.as_bytes())?;
        let is_own = |hold: &&HoldInfo| {
            let holder = &hold.holder;
            let is_owner = owner.is_empty() || *holder.owner == *owner.as_bytes();
            holder.session == session && is_owner && hold.kept_until.is_none()
        };
        let hold = lock.holds.iter().rev().find(is_own)?.clone();
        let info = view.machine.session(session)?;
        let remaining_ms = view.member.remaining_ms(session, view.now).unwrap_or(0);
        Some((hold, info.token, info.ttl_ms, remaining_ms))
    };
    match query(context, false, look).await? {
        Some((hold, session_token, ttl_ms, remaining_ms)) => {
            let granted = v1::LockAcquireReply {
                header: None,
                token: hold.holder.token.0,
                session: hold.holder.session.0,
                slots: hold.slots,
                depth: hold.depth,
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
    let events_max = if request.events_limit == 0 { usize::MAX } else { request.events_limit as usize };
    let look = move |view: &View<'_>| {
        let events = view.machine.lock_events(namespace, name.as_bytes());
        let newest = events.len().saturating_sub(events_max);
        let events: Vec<_> = events[newest..].iter().map(|event| shown_event(view, event)).collect();
        let lock = view.machine.lock(namespace, name.as_bytes()).map(|info| shown(view, &info, max));
        let free = || v1::Lock { name, ..Default::default() };
        (v1::Lock { events, ..lock.unwrap_or_else(free) }, seen(view, request.stale))
    };
    let (lock, header) = query(&context, request.stale, look).await?;
    Ok(v1::LockGetReply { header, lock: Some(lock) })
}

async fn list(context: Context, request: v1::LockListRequest) -> Result<v1::LockListReply, Refused> {
    let namespace = namespace(&request.namespace)?;
    let max = page_limit(request.limit)?;
    let look = move |view: &View<'_>| {
        let after = Some(request.after.as_bytes()).filter(|after| !after.is_empty());
        let page = view.machine.locks(namespace, request.prefix.as_bytes(), after, max);
        let locks: Vec<v1::Lock> = page.iter().map(|info| shown(view, info, 0)).collect();
        (locks, seen(view, request.stale))
    };
    let (locks, header) = query(&context, request.stale, look).await?;
    let next = locks.last().filter(|_| locks.len() == max).map_or_else(String::new, |last| last.name.clone());
    Ok(v1::LockListReply { header, locks, next })
}

fn wire_mode(mode: HoldMode) -> i32 {
    match mode {
        HoldMode::Exclusive => v1::LockMode::Exclusive,
        HoldMode::Shared => v1::LockMode::Shared,
        HoldMode::Permits(_) => v1::LockMode::Permits,
    }
    .into()
}

fn shown_event(view: &View<'_>, event: &LockEvent) -> v1::LockEvent {
    let kind = match event.kind {
        LockEventKind::Granted => "granted",
        LockEventKind::Released => "released",
        LockEventKind::Lost => "lost",
        LockEventKind::ForceReleased => "force-released",
        LockEventKind::TimedOut => "timed-out",
        LockEventKind::Cancelled => "cancelled",
        LockEventKind::Deadlock => "deadlock",
        LockEventKind::DelayOver => "delay-over",
        LockEventKind::Resized => "resized",
    };
    v1::LockEvent {
        kind: kind.to_owned(),
        ago_ms: view.machine.stamp().0.saturating_sub(event.at.0),
        token: event.token.0,
        session: event.session.0,
        owner_id: text(&event.owner),
        after_ms: event.after_ms,
        detail: event.detail.to_string(),
    }
}

fn shown_holder(view: &View<'_>, hold: &HoldInfo) -> v1::LockHolder {
    let (stamp, holder) = (view.machine.stamp(), &hold.holder);
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
        mode: wire_mode(hold.mode),
        slots: hold.slots.clone(),
        depth: hold.depth,
        kept_ms: hold.kept_until.map_or(0, |until| until.0.saturating_sub(stamp.0)),
        lock_delay_ms: hold.delay_ms,
    }
}

fn shown(view: &View<'_>, info: &LockInfo, waiters_max: usize) -> v1::Lock {
    let stamp = view.machine.stamp();
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
            mode: wire_mode(waiter.mode),
            permits: if let HoldMode::Permits(permits) = waiter.mode { permits.count } else { 0 },
            priority: i32::try_from(waiter.priority).unwrap_or(0),
        }
    });
    let mode = match info.permits {
        0 => info.holds.first().map_or(v1::LockMode::Exclusive.into(), |hold| wire_mode(hold.mode)),
        _ => v1::LockMode::Permits.into(),
    };
    v1::Lock {
        name: text(&info.name),
        mode,
        holders: info.holds.iter().map(|hold| shown_holder(view, hold)).collect(),
        waiters: waiters.collect(),
        waiter_count: info.waiters.len() as u64,
        holder_count: info.hold_count,
        permits: info.permits,
        permits_free: info.permits_free,
        events: Vec::new(),
    }
}
