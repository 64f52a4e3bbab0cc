//! Native reservations: pools, holds on a part of one, and those who wait for one.
//!
//! Promises. A wait without a request id ends with the deadline of its call, and one without end needs a session, so no wait outlives everybody
//! who cares for it.
//! Not promised. That a grant reaches its caller: one that nobody noticed ends with its time.

use tenure_machine::{
    CAPACITY_MAX, HOLD_MS_MAX, HOLD_MS_MIN, HOLD_OWNER_BYTES_MAX, Hold, HoldRef, HoldState, NamespaceId,
    POOL_NAME_BYTES_MAX, Pool, PoolAmount, PoolCreate, PoolWaiter, RequestId, ReservationOp, ReservationReply, Reserve,
    Revision, Txn,
};
use tenure_wire::tenure::v1;

use super::sessions::page_limit;
use super::{
    Caller, Changed, Refused, change, look, mixed_up, namespace, refuse, reply_of, request_id, seen, session_id, txn_of,
};
use crate::Context;
use crate::driver::View;
use crate::rpc::Router;
use crate::status as words;

const HOLD_MS_DEFAULT: u64 = 60_000;
const WAIT_MAX_MS: u64 = 86_400_000;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    change(router, context, "/tenure.v1.Pools/Create", plan_create, |_, r: &v1::PoolCreateRequest, c| pool(&r.name, c));
    change(router, context, "/tenure.v1.Pools/Resize", plan_resize, |_, r: &v1::PoolResizeRequest, c| pool(&r.name, c));
    change(router, context, "/tenure.v1.Pools/Restock", plan_restock, |_, r: &v1::PoolRestockRequest, c| {
        pool(&r.name, c)
    });
    change(router, context, "/tenure.v1.Pools/Return", plan_return, |_, r: &v1::PoolReturnRequest, c| pool(&r.name, c));
    change(router, context, "/tenure.v1.Pools/Delete", plan_delete, |_, r: &v1::PoolDeleteRequest, c| pool(&r.name, c));
    change(router, context, "/tenure.v1.Reservations/Reserve", plan_reserve, |_, request, changed| {
        reserved(request, changed)
    });
    change(router, context, "/tenure.v1.Reservations/Confirm", plan_confirm, |_, _, changed| settled(changed));
    change(router, context, "/tenure.v1.Reservations/Cancel", plan_cancel, |_, _, changed| settled(changed));
    change(router, context, "/tenure.v1.Reservations/Extend", plan_extend, |_, _, changed| settled(changed));
    change(router, context, "/tenure.v1.Reservations/GiveUp", plan_give_up, |_, _, changed| {
        let ReservationReply::GaveUp(waiters) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::ReservationGiveUpReply { header: Some(changed.header), waiters })
    });
    look(router, context, "/tenure.v1.Pools/Get", |request| request.stale, get);
    look(router, context, "/tenure.v1.Pools/List", |request| request.stale, list);
}

// ---- What is asked ----

fn plan_create(_: &Context, caller: &Caller, request: &v1::PoolCreateRequest) -> Result<Txn, Refused> {
    let (pool, capacity) = (name("name", &request.name)?, capacity(request.capacity)?);
    let op = ReservationOp::Create(PoolCreate { pool, capacity });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_resize(_: &Context, caller: &Caller, request: &v1::PoolResizeRequest) -> Result<Txn, Refused> {
    let to = request.capacity.ok_or_else(|| refuse("capacity", "say how much there is to be"))?;
    let (pool, capacity) = (name("name", &request.name)?, capacity(to)?);
    let op = ReservationOp::Resize(PoolCreate { pool, capacity });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_restock(_: &Context, caller: &Caller, request: &v1::PoolRestockRequest) -> Result<Txn, Refused> {
    let op = ReservationOp::Restock(amount(&request.name, request.quantity)?);
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_return(_: &Context, caller: &Caller, request: &v1::PoolReturnRequest) -> Result<Txn, Refused> {
    let op = ReservationOp::Return(amount(&request.name, request.quantity)?);
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_delete(_: &Context, caller: &Caller, request: &v1::PoolDeleteRequest) -> Result<Txn, Refused> {
    let op = ReservationOp::Delete(name("name", &request.name)?);
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

pub(crate) fn plan_reserve(_: &Context, caller: &Caller, request: &v1::ReserveRequest) -> Result<Txn, Refused> {
    let id = request_id(request.request.as_ref(), caller)?;
    if request.owner_id.len() > HOLD_OWNER_BYTES_MAX {
        return Err(refuse("owner_id", format!("an owner id has at most {HOLD_OWNER_BYTES_MAX} bytes")));
    }
    let op = ReservationOp::Reserve(Reserve {
        pool: name("pool", &request.pool)?,
        quantity: quantity(request.quantity)?,
        hold_ms: hold_ms(request.hold_ms)?,
        session: session_id("session", request.session)?,
        owner: request.owner_id.as_str().into(),
        wait_ms: wait_ms(request, id.as_ref(), caller)?,
    });
    Ok(Txn { namespace: namespace(&request.namespace)?, request: id, ..Txn::of(op.into()) })
}

/// `None`: for ever. A call's own deadline shortens a wait without a request id; with one, a retry must ask for the same.
fn wait_ms(request: &v1::ReserveRequest, id: Option<&RequestId>, caller: &Caller) -> Result<Option<u64>, Refused> {
    use v1::reserve_request::Wait;
    let left = |deadline: tokio::time::Instant| {
        deadline.saturating_duration_since(tokio::time::Instant::now()).as_millis() as u64
    };
    let bound = if id.is_none() { caller.deadline.map(left) } else { None };
    match request.wait {
        None | Some(Wait::WaitMs(0) | Wait::Forever(false)) => Ok(Some(0)),
        Some(Wait::WaitMs(ms)) if ms > WAIT_MAX_MS => {
            Err(refuse("wait_ms", format!("a wait has at most {WAIT_MAX_MS} ms")))
        }
        Some(Wait::WaitMs(ms)) => Ok(Some(bound.map_or(ms, |left| ms.min(left)).max(1))),
        Some(Wait::Forever(true)) if request.session == 0 => {
            Err(refuse("forever", "a wait without end needs a session that can end it"))
        }
        Some(Wait::Forever(true)) => Ok(bound.map(|left| left.max(1))),
    }
}

fn plan_confirm(_: &Context, caller: &Caller, request: &v1::ReservationConfirmRequest) -> Result<Txn, Refused> {
    let op = ReservationOp::Confirm(hold(&request.pool, request.id, request.token)?);
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_cancel(_: &Context, caller: &Caller, request: &v1::ReservationCancelRequest) -> Result<Txn, Refused> {
    let op = ReservationOp::Cancel(hold(&request.pool, request.id, request.token)?);
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_extend(_: &Context, caller: &Caller, request: &v1::ReservationExtendRequest) -> Result<Txn, Refused> {
    let hold = hold(&request.pool, request.id, request.token)?;
    let op = ReservationOp::Extend((hold, hold_ms(request.hold_ms)?));
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_give_up(_: &Context, caller: &Caller, request: &v1::ReservationGiveUpRequest) -> Result<Txn, Refused> {
    let nobody = Caller::default();
    let reserve = request_id(request.reserve.as_ref(), &nobody)?;
    let reserve = reserve.ok_or_else(|| refuse("reserve", "name the request id of the Reserve to give up"))?;
    let op = ReservationOp::GiveUp((name("pool", &request.pool)?, reserve));
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn name(field: &str, name: &str) -> Result<Box<str>, Refused> {
    if name.is_empty() || name.len() > POOL_NAME_BYTES_MAX || name.contains('\0') {
        let why = format!("the name of a pool has 1 to {POOL_NAME_BYTES_MAX} bytes, none of them zero");
        return Err(refuse(field, why));
    }
    Ok(name.into())
}

fn capacity(capacity: u64) -> Result<u64, Refused> {
    let fits = capacity <= CAPACITY_MAX;
    if fits { Ok(capacity) } else { Err(refuse("capacity", format!("a capacity is at most {CAPACITY_MAX}"))) }
}

fn quantity(quantity: u64) -> Result<u64, Refused> {
    let fits = (1..=CAPACITY_MAX).contains(&quantity);
    if fits { Ok(quantity) } else { Err(refuse("quantity", format!("a quantity is 1 to {CAPACITY_MAX}"))) }
}

fn amount(pool: &str, units: u64) -> Result<PoolAmount, Refused> {
    Ok(PoolAmount { pool: name("name", pool)?, quantity: quantity(units)? })
}

fn hold_ms(ms: u64) -> Result<u64, Refused> {
    match ms {
        0 => Ok(HOLD_MS_DEFAULT),
        HOLD_MS_MIN..=HOLD_MS_MAX => Ok(ms),
        _ => Err(refuse("hold_ms", format!("a hold lasts {HOLD_MS_MIN} to {HOLD_MS_MAX} ms"))),
    }
}

fn hold(pool: &str, id: u64, token: u64) -> Result<HoldRef, Refused> {
    if id == 0 {
        return Err(refuse("id", "name the hold by its id and token"));
    }
    if token == 0 {
        return Err(refuse("token", "name the hold by its id and token"));
    }
    Ok(HoldRef { pool: name("pool", pool)?, id, token: Revision(token) })
}

// ---- What is answered ----

fn pool(name: &str, changed: Changed) -> Result<v1::PoolReply, Refused> {
    let ReservationReply::Pool(pool) = reply_of(changed.reply)? else { return Err(mixed_up()) };
    Ok(v1::PoolReply { header: Some(changed.header), pool: Some(shown(name, &pool, 0)) })
}

fn reserved(request: &v1::ReserveRequest, changed: Changed) -> Result<v1::ReserveReply, Refused> {
    let ReservationReply::Held(held) = reply_of(changed.reply)? else { return Err(mixed_up()) };
    Ok(v1::ReserveReply {
        header: Some(changed.header),
        pool: request.pool.clone(),
        id: held.id,
        token: held.token.0,
        quantity: held.quantity,
        hold_ms: held.hold_ms,
        waited_ms: held.waited_ms,
        available: held.pool.available(),
    })
}

fn settled(changed: Changed) -> Result<v1::ReservationReply, Refused> {
    let ReservationReply::Hold(hold) = reply_of(changed.reply)? else { return Err(mixed_up()) };
    Ok(v1::ReservationReply {
        header: Some(changed.header),
        id: hold.id,
        state: state(hold.state).into(),
        quantity: hold.quantity,
        left_ms: hold.left_ms,
        available: hold.pool.available(),
    })
}

fn shown(name: &str, pool: &Pool, waiter_count: u64) -> v1::Pool {
    v1::Pool {
        name: name.to_owned(),
        capacity: pool.capacity,
        held: pool.held,
        confirmed: pool.confirmed,
        available: pool.available(),
        waiter_count,
        created_revision: pool.created.0,
    }
}

fn state(state: HoldState) -> v1::hold::State {
    match state {
        HoldState::Held => v1::hold::State::Held,
        HoldState::Confirmed => v1::hold::State::Confirmed,
        HoldState::Cancelled => v1::hold::State::Cancelled,
        HoldState::Expired => v1::hold::State::Expired,
    }
}

fn get(view: &View<'_>, request: &v1::PoolGetRequest) -> Result<v1::PoolGetReply, Refused> {
    let (ns, name, max) = (namespace(&request.namespace)?, name("name", &request.name)?, page_limit(request.limit)?);
    let pool = view.machine.object::<Pool>(ns, name.as_bytes()).ok_or_else(|| {
        Box::new(words::not_found(&format!("there is no pool `{name}`"), &[("name", name.to_string())]))
    })?;
    let stamp = view.machine.stamp().0;
    let hold = |(id, hold): (u64, &Hold)| v1::Hold {
        id,
        token: hold.token.0,
        quantity: hold.quantity,
        state: state(hold.state).into(),
        session: hold.session.0,
        owner_id: hold.owner.to_string(),
        age_ms: stamp.saturating_sub(hold.since.0),
        left_ms: hold.until.0.saturating_sub(stamp),
    };
    let waiter = |(place, waiter): (usize, PoolWaiter)| v1::PoolWaiter {
        position: place as u64 + 1,
        quantity: waiter.quantity,
        session: waiter.session.0,
        owner_id: waiter.owner.into(),
        waited_ms: stamp.saturating_sub(waiter.since.0),
        wait_left_ms: waiter.deadline.map_or(0, |deadline| deadline.0.saturating_sub(stamp)),
    };
    let holds: Vec<v1::Hold> = view.machine.pool_holds(ns, &name, request.after, max).into_iter().map(hold).collect();
    let next = holds.last().filter(|_| holds.len() == max).map_or(0, |last| last.id);
    let waiters = view.machine.pool_waiters(ns, &name, max).into_iter().enumerate().map(waiter).collect();
    let pool = Some(shown(&name, pool, view.machine.pool_waiter_count(ns, &name)));
    Ok(v1::PoolGetReply { header: seen(view, request.stale), pool, holds, waiters, next })
}

fn list(view: &View<'_>, request: &v1::PoolListRequest) -> Result<v1::PoolListReply, Refused> {
    let (ns, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let after = Some(request.after.as_bytes()).filter(|after| !after.is_empty());
    let page = view.machine.objects::<Pool>(ns, request.prefix.as_bytes(), after, max);
    let pools: Vec<v1::Pool> = page.iter().map(|(name, pool)| listed(view, ns, name, pool)).collect();
    let next = pools.last().filter(|_| pools.len() == max).map_or_else(String::new, |last| last.name.clone());
    Ok(v1::PoolListReply { header: seen(view, request.stale), pools, next })
}

fn listed(view: &View<'_>, ns: NamespaceId, name: &[u8], pool: &Pool) -> v1::Pool {
    let name = String::from_utf8_lossy(name);
    shown(&name, pool, view.machine.pool_waiter_count(ns, &name))
}
