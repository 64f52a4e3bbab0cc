//! Reservations: pools of something countable, and holds on a part of one that end by themselves.
//!
//! Promises. V1: what is held and what is confirmed together never exceed the capacity. V2: holds are granted in the order in which they were asked
//! for: nobody overtakes the head of the waiting list, small though the wish may be. V3: a hold that ends (cancelled, expired, or with its session)
//! is given back in one commit, and that commit serves those who wait. V4: what is done to a hold needs its number and its token; a stale pair
//! changes nothing. V5: a grant goes to a living session, or to none, and to nobody whose wait is over.
//! Not promised. That a hold still stands when its owner acts on it: only the confirmation tells. That the end of a hold is known for long: after
//! `KEPT_MS` a late call is refused without being told what became of it.
//! Relies on. Waits end before the transactions of the entry whose stamp reaches their deadline (`apply.rs`).

use crate::apply::{Commit, Machine, Place, invalid, is_same};
use crate::coded::{coded_enum, coded_struct};
use crate::command::{Limit, RequestId};
use crate::native::{NativeOp, Refusal, RefusalCode};
use crate::objects::{Lived, ObjectKey, Stored};
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::{Ask, Waiter};
use std::ops::Bound;

/// The name of a pool has 1 to this many bytes, none of them zero.
pub const POOL_NAME_BYTES_MAX: usize = 1_024;
/// The owner's name has at most this many bytes.
pub const HOLD_OWNER_BYTES_MAX: usize = 1_024;
/// A capacity, so that sums never overflow and JSON numbers hold them.
pub const CAPACITY_MAX: u64 = 1_000_000_000_000_000;
/// The shortest and the longest hold.
pub const HOLD_MS_MIN: u64 = 1_000;
pub const HOLD_MS_MAX: u64 = 7 * 86_400_000;
/// For how long it is remembered what became of a hold.
const KEPT_MS: u64 = 60_000;
/// Between the name of a pool and the number of a hold.
const SEPARATOR: u8 = 0;

coded_struct! {
    /// A number of equal things.
    #[derive(Copy, Eq)]
    pub struct Pool as "a pool" {
        pub capacity: u64,
        /// Units under holds that are not confirmed.
        pub held: u64,
        /// Units that are gone until they are returned.
        pub confirmed: u64,
        /// Holds ever granted: the number of the newest one.
        pub granted: u64,
        /// The revision that made it.
        pub created: Revision,
    }
}

impl Pool {
    /// What can be had now, if nobody waits.
    pub fn available(&self) -> u64 {
        self.capacity - self.held - self.confirmed
    }

    fn check(&self) {
        debug_assert!(self.held + self.confirmed <= self.capacity, "{self:?} gives more than it has");
    }
}

impl Lived for Pool {
    // As busy as what it counts.
    const BUSY: bool = true;

    fn bytes(&self) -> u64 {
        size_of::<Self>() as u64
    }

    fn waiter_gone(commit: &mut Commit<'_>, key: &ObjectKey) {
        if let Some(pool) = commit.object::<Self>(key).copied() {
            commit.serve_pool(key, pool);
        }
    }
}

coded_enum! {
    /// Where a hold is in its life.
    #[derive(Copy, Eq)]
    pub enum HoldState as "the state of a hold" {
        Held = 1,
        Confirmed = 2,
        Cancelled = 3,
        Expired = 4,
    }
}

impl HoldState {
    /// As refusals name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Confirmed => "confirmed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }
}

coded_struct! {
    /// A part of a pool for an owner, until a deadline or for good; afterwards what became of it, for a while.
    pub struct Hold as "a hold" {
        pub token: Revision,
        pub quantity: u64,
        /// Zero: it depends on no session.
        pub session: SessionId,
        pub owner: Box<str>,
        pub since: LogTime,
        pub state: HoldState,
        /// When the state ends: a hold that is held expires, any other is forgotten.
        pub until: LogTime,
    }
}

impl Lived for Hold {
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        (size_of::<Self>() + self.owner.len()) as u64
    }

    fn deadline(&self) -> Option<LogTime> {
        Some(self.until)
    }

    fn sessions(&self) -> Vec<SessionId> {
        let named = self.state == HoldState::Held && self.session != SessionId(0);
        if named { vec![self.session] } else { Vec::new() }
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        match commit.object::<Self>(key).map(|hold| hold.state) {
            Some(HoldState::Held) => commit.give_back(key, HoldState::Expired),
            _ => commit.remove_object(key),
        }
    }

    fn session_ended(commit: &mut Commit<'_>, key: &ObjectKey, _: SessionId) {
        commit.give_back(key, HoldState::Cancelled);
    }
}

coded_struct! {
    /// Makes a pool.
    pub struct PoolCreate as "the making of a pool" {
        pub pool: Box<str>,
        pub capacity: u64,
    }
}

coded_struct! {
    /// A pool and a number of its units.
    pub struct PoolAmount as "an amount of a pool" {
        pub pool: Box<str>,
        pub quantity: u64,
    }
}

coded_struct! {
    /// Asks for a part of a pool.
    pub struct Reserve as "a reservation" {
        pub pool: Box<str>,
        pub quantity: u64,
        pub hold_ms: u64,
        /// Zero: the hold depends on no session.
        pub session: SessionId,
        pub owner: Box<str>,
        /// Zero: no wait; `None`: for ever.
        pub wait_ms: Option<u64>,
    }
}

coded_struct! {
    /// One grant of one pool.
    pub struct HoldRef as "a hold" {
        pub pool: Box<str>,
        pub id: u64,
        pub token: Revision,
    }
}

coded_enum! {
    /// What can be done to pools and holds.
    pub enum ReservationOp as "an operation on a pool" {
        Create(PoolCreate) = 1,
        /// Sets the capacity, which does not become smaller than what is taken.
        Resize(PoolCreate) = 2,
        /// Adds units.
        Restock(PoolAmount) = 3,
        /// Gives units back that were confirmed.
        Return(PoolAmount) = 4,
        /// Removes a pool of which nothing is held and for which nobody waits.
        Delete(Box<str>) = 5,
        Reserve(Reserve) = 6,
        Confirm(HoldRef) = 7,
        Cancel(HoldRef) = 8,
        /// Makes it last at least so long from now on.
        Extend((HoldRef, u64)) = 9,
        /// Takes the waiters of a request off the list of a pool.
        GiveUp((Box<str>, RequestId)) = 10,
    }
}

coded_struct! {
    /// A hold that was granted.
    #[derive(Copy, Eq)]
    pub struct Held as "a granted hold" {
        pub id: u64,
        pub token: Revision,
        pub quantity: u64,
        pub hold_ms: u64,
        pub waited_ms: u64,
        pub pool: Pool,
    }
}

coded_struct! {
    /// A hold after a change of it.
    #[derive(Copy, Eq)]
    pub struct HoldAfter as "a changed hold" {
        pub id: u64,
        pub state: HoldState,
        pub quantity: u64,
        /// Until it expires, while it is held.
        pub left_ms: u64,
        pub pool: Pool,
    }
}

coded_enum! {
    /// What operations on pools and holds answer.
    #[derive(Copy, Eq)]
    pub enum ReservationReply as "an answer about a pool" {
        Pool(Pool) = 1,
        Held(Held) = 2,
        Hold(HoldAfter) = 3,
        /// So many waiters left.
        GaveUp(u64) = 4,
    }
}

/// Beside names.
const THING_BYTES: u64 = 512;

impl ReservationOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        match self {
            Self::Create(create) => THING_BYTES + create.pool.len() as u64,
            Self::Reserve(reserve) => 2 * (THING_BYTES + (reserve.pool.len() + reserve.owner.len()) as u64),
            _ => 0,
        }
    }

    /// What a waiter is told whose time is over; `None`: that it waited in vain.
    pub(crate) fn wait_over(&self, machine: &Machine, waiter: &Waiter) -> Option<Result<OpReply, Rejection>> {
        let Self::Reserve(reserve) = self else { return None };
        let pool = machine.objects.get::<Pool>(waiter.on.first()?)?;
        let waited_ms = machine.stamp.0 - waiter.since.0;
        let why = format!("waited {waited_ms} ms for {} of `{}` in vain", reserve.quantity, reserve.pool);
        let refusal = Refusal::new(RefusalCode::TimeoutWaiting, why).fact("waited_ms", waited_ms);
        Some(Err(with_pool(refusal, &reserve.pool, pool).into()))
    }
}

/// Someone on the waiting list of a pool.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolWaiter {
    pub quantity: u64,
    pub session: SessionId,
    pub owner: Box<str>,
    pub since: LogTime,
    pub deadline: Option<LogTime>,
}

impl Machine {
    /// How many wait for a part of a pool.
    pub fn pool_waiter_count(&self, ns: NamespaceId, pool: &str) -> u64 {
        self.waits.len(&ObjectKey::of::<Pool>(ns, pool.as_bytes()))
    }

    /// The first of them, in the order in which they will be served.
    pub fn pool_waiters(&self, ns: NamespaceId, pool: &str, max: usize) -> Vec<PoolWaiter> {
        let key = ObjectKey::of::<Pool>(ns, pool.as_bytes());
        let waiter = |(_, waiter): (_, &Waiter)| {
            let reserve = wish(waiter)?;
            let (session, owner, since) = (waiter.session, reserve.owner.clone(), waiter.since);
            Some(PoolWaiter { quantity: reserve.quantity, session, owner, since, deadline: waiter.deadline })
        };
        self.waits.queue(&key).filter_map(waiter).take(max).collect()
    }

    /// Holds of a pool by rising number, after the number `after`: those that stand, and those whose end is still remembered.
    pub fn pool_holds(&self, ns: NamespaceId, pool: &str, after: u64, max: usize) -> Vec<(u64, &Hold)> {
        let prefix = ObjectKey::of::<Hold>(ns, &holds_prefix(pool));
        let from = ObjectKey::of::<Hold>(ns, &hold_name(pool, after));
        let later = self.objects.table.range((Bound::Excluded(from), Bound::Unbounded));
        let ours = later.take_while(|(key, _)| key.as_bytes().starts_with(prefix.as_bytes())).take(max);
        ours.filter_map(|(key, object)| Some((hold_number(key), Hold::of(object)?))).collect()
    }
}

/// What a waiter on a pool asks for.
fn wish(waiter: &Waiter) -> Option<&Reserve> {
    let Ask::Native(op) = &waiter.ask else { return None };
    match &**op {
        NativeOp::Reservation(ReservationOp::Reserve(reserve)) => Some(reserve),
        _ => None,
    }
}

fn holds_prefix(pool: &str) -> Vec<u8> {
    [pool.as_bytes(), &[SEPARATOR]].concat()
}

fn hold_name(pool: &str, id: u64) -> Vec<u8> {
    [pool.as_bytes(), &[SEPARATOR], &id.to_be_bytes()].concat()
}

fn hold_number(key: &ObjectKey) -> u64 {
    key.name().last_chunk().map_or(0, |id| u64::from_be_bytes(*id))
}

/// The pool of a hold.
fn pool_of(hold: &ObjectKey) -> ObjectKey {
    let name = hold.name();
    ObjectKey::of::<Pool>(hold.namespace(), &name[..name.len().saturating_sub(1 + size_of::<u64>())])
}

fn with_pool(refusal: Refusal, name: &str, pool: &Pool) -> Refusal {
    let refusal = refusal.fact("name", name).fact("capacity", pool.capacity).fact("available", pool.available());
    refusal.fact("held", pool.held).fact("confirmed", pool.confirmed)
}

impl Commit<'_> {
    pub(crate) fn reservation_op(&mut self, op: &ReservationOp) -> Result<OpReply, Rejection> {
        match op {
            ReservationOp::Create(create) => self.pool_create(create),
            ReservationOp::Resize(to) => self.pool_resize(&to.pool, |_| Some(to.capacity)),
            ReservationOp::Restock(more) => {
                self.pool_resize(&more.pool, |pool| pool.capacity.checked_add(more.quantity))
            }
            ReservationOp::Return(amount) => self.pool_return(amount),
            ReservationOp::Delete(pool) => self.pool_delete(pool),
            ReservationOp::Reserve(reserve) => self.reserve(reserve),
            ReservationOp::Confirm(hold) => self.hold_confirm(hold),
            ReservationOp::Cancel(hold) => self.hold_cancel(hold),
            ReservationOp::Extend((hold, hold_ms)) => self.hold_extend(hold, *hold_ms),
            ReservationOp::GiveUp((pool, request)) => Ok(self.give_up(pool, request)),
        }
    }

    // ---- Pools ----

    fn pool(&self, name: &str) -> Result<(ObjectKey, Pool), Rejection> {
        let key = self.object_key::<Pool>(name.as_bytes());
        match self.object::<Pool>(&key) {
            Some(pool) => Ok((key, *pool)),
            None => {
                let refusal = Refusal::new(RefusalCode::NotFound, format!("there is no pool `{name}`"));
                Err(refusal.fact("name", name).into())
            }
        }
    }

    fn pool_create(&mut self, create: &PoolCreate) -> Result<OpReply, Rejection> {
        if create.pool.is_empty()
            || create.pool.len() > POOL_NAME_BYTES_MAX
            || create.pool.as_bytes().contains(&SEPARATOR)
        {
            return Err(invalid(format!("the name of a pool has 1 to {POOL_NAME_BYTES_MAX} bytes, none of them zero")));
        }
        check_capacity(create.capacity)?;
        let key = self.object_key::<Pool>(create.pool.as_bytes());
        if let Some(pool) = self.object::<Pool>(&key) {
            let refusal = Refusal::new(RefusalCode::Conflict, format!("there is a pool `{}` already", create.pool));
            return Err(with_pool(refusal, &create.pool, pool).into());
        }
        let pool =
            Pool { capacity: create.capacity, held: 0, confirmed: 0, granted: 0, created: self.number_once(&key)? };
        self.put_object(&key, pool);
        Ok(ReservationReply::Pool(pool).into())
    }

    fn pool_resize(&mut self, name: &str, to: impl FnOnce(&Pool) -> Option<u64>) -> Result<OpReply, Rejection> {
        let (key, pool) = self.pool(name)?;
        let capacity = to(&pool).unwrap_or(u64::MAX);
        check_capacity(capacity)?;
        let taken = pool.held + pool.confirmed;
        if capacity < taken {
            let why = format!("{taken} of `{name}` are taken, so its capacity cannot become {capacity}");
            return Err(with_pool(Refusal::new(RefusalCode::Conflict, why).fact("taken", taken), name, &pool).into());
        }
        let pool = Pool { capacity, ..pool };
        self.refuse_hopeless(&key, &pool);
        Ok(ReservationReply::Pool(self.serve_pool(&key, pool)).into())
    }

    /// Ends the waits for more than there is of it at all: they would block all others for nothing.
    fn refuse_hopeless(&mut self, key: &ObjectKey, pool: &Pool) {
        let is_hopeless = |waiter: &Waiter| wish(waiter).is_some_and(|reserve| reserve.quantity > pool.capacity);
        let hopeless: Vec<_> =
            self.m.waits.queue(key).filter(|(_, waiter)| is_hopeless(waiter)).map(|(number, _)| number).collect();
        for number in hopeless {
            let name = String::from_utf8_lossy(key.name()).into_owned();
            self.end_wait(number, Err(too_many(&name, pool)));
        }
    }

    fn pool_return(&mut self, amount: &PoolAmount) -> Result<OpReply, Rejection> {
        let (key, pool) = self.pool(&amount.pool)?;
        check_quantity(amount.quantity)?;
        let Some(confirmed) = pool.confirmed.checked_sub(amount.quantity) else {
            let why = format!("only {} of `{}` are confirmed", pool.confirmed, amount.pool);
            return Err(with_pool(Refusal::new(RefusalCode::Conflict, why), &amount.pool, &pool).into());
        };
        Ok(ReservationReply::Pool(self.serve_pool(&key, Pool { confirmed, ..pool })).into())
    }

    fn pool_delete(&mut self, name: &str) -> Result<OpReply, Rejection> {
        let (key, pool) = self.pool(name)?;
        let waiters = self.m.waits.len(&key);
        if pool.held > 0 || waiters > 0 {
            let why = format!("{} of `{name}` are held and {waiters} wait: it is in use", pool.held);
            return Err(with_pool(Refusal::new(RefusalCode::Held, why).fact("waiters", waiters), name, &pool).into());
        }
        self.remove_object(&key);
        Ok(ReservationReply::Pool(pool).into())
    }

    /// Puts the pool as it has become, after serving those who wait, in their order, as far as there is enough.
    fn serve_pool(&mut self, key: &ObjectKey, mut pool: Pool) -> Pool {
        while let Some(number) = self.m.waits.head(key)
            && let Some(waiter) = self.m.waits.get(number)
            && let Some(reserve) = wish(waiter).filter(|reserve| reserve.quantity <= pool.available()).cloned()
        {
            let waited_ms = self.m.stamp.0 - waiter.since.0;
            let held = self.grant_hold(key, &mut pool, &reserve, waited_ms);
            self.end_wait(number, Ok(ReservationReply::Held(held).into()));
        }
        pool.check();
        if self.object::<Pool>(key) != Some(&pool) {
            self.put_object(key, pool);
        }
        pool
    }

    // ---- Holds ----

    fn reserve(&mut self, reserve: &Reserve) -> Result<OpReply, Rejection> {
        check_quantity(reserve.quantity)?;
        check_hold_ms(reserve.hold_ms)?;
        if reserve.owner.len() > HOLD_OWNER_BYTES_MAX {
            return Err(invalid(format!("the owner of a hold has at most {HOLD_OWNER_BYTES_MAX} bytes")));
        }
        let (key, mut pool) = self.pool(&reserve.pool)?;
        if reserve.session != SessionId(0) {
            let is_native = self.live_session(reserve.session)?.is_native();
            if is_native {
                self.check_things(reserve.session)?;
            }
        }
        if reserve.quantity > pool.capacity {
            return Err(too_many(&reserve.pool, &pool));
        }
        let waiters = self.m.waits.len(&key);
        if waiters == 0 && reserve.quantity <= pool.available() {
            let held = self.grant_hold(&key, &mut pool, reserve, 0);
            pool.check();
            self.put_object(&key, pool);
            return Ok(ReservationReply::Held(held).into());
        }
        if reserve.wait_ms == Some(0) {
            let (wanted, left) = (reserve.quantity, pool.available());
            let why = format!("{left} of `{}` are available and {waiters} wait, {wanted} are asked for", reserve.pool);
            let refusal = Refusal::new(RefusalCode::Held, why).fact("waiters", waiters);
            return Err(with_pool(refusal, &reserve.pool, &pool).into());
        }
        self.join_pool(key, reserve, waiters)
    }

    fn join_pool(&mut self, key: ObjectKey, reserve: &Reserve, waiters: u64) -> Result<OpReply, Rejection> {
        self.check_alone()?;
        let limit = self.m.limit(Limit::LockWaiters);
        if waiters >= limit {
            let refusal = Refusal::new(RefusalCode::Quota, format!("at most {limit} may wait for `{}`", reserve.pool));
            return Err(refusal.fact("name", &reserve.pool).fact("limit", limit).into());
        }
        self.wait(Place {
            on: vec![key],
            rank: 0,
            session: reserve.session,
            owner: reserve.owner.as_bytes().into(),
            deadline: reserve.wait_ms.map(|ms| self.m.stamp.plus(ms)),
            ask: Ask::Native(Box::new(NativeOp::Reservation(ReservationOp::Reserve(reserve.clone())))),
        });
        Ok(OpReply::Done)
    }

    /// Takes a part that is there. The pool is still to be put.
    fn grant_hold(&mut self, key: &ObjectKey, pool: &mut Pool, reserve: &Reserve, waited_ms: u64) -> Held {
        pool.granted += 1;
        pool.held += reserve.quantity;
        let (id, quantity, hold_ms, token) = (pool.granted, reserve.quantity, reserve.hold_ms, self.at);
        let hold = Hold {
            token,
            quantity,
            session: reserve.session,
            owner: reserve.owner.clone(),
            since: self.m.stamp,
            state: HoldState::Held,
            until: self.m.stamp.plus(hold_ms),
        };
        self.put_object(&ObjectKey::of::<Hold>(key.namespace(), &hold_name(&reserve.pool, id)), hold);
        Held { id, token, quantity, hold_ms, waited_ms, pool: *pool }
    }

    /// The hold that is meant, or FENCED: it is another one by now, or forgotten.
    fn the_hold(&self, at: &HoldRef) -> Result<(ObjectKey, Hold, Pool), Rejection> {
        let (_, pool) = self.pool(&at.pool)?;
        let key = self.object_key::<Hold>(&hold_name(&at.pool, at.id));
        let Some(hold) = self.object::<Hold>(&key) else {
            let why = format!("hold {} of `{}` is over or was never granted", at.id, at.pool);
            return Err(fenced(at, why).fact("newest", 0).into());
        };
        if hold.token != at.token {
            let why = format!("hold {} of `{}` has another token than {}", at.id, at.pool, at.token);
            return Err(fenced(at, why).fact("newest", hold.token).into());
        }
        let mut hold = hold.clone();
        // Its end may be due without having been carried out yet, where very many are due at once.
        if hold.state == HoldState::Held && hold.until <= self.m.stamp {
            hold.state = HoldState::Expired;
        }
        Ok((key, hold, pool))
    }

    fn hold_confirm(&mut self, at: &HoldRef) -> Result<OpReply, Rejection> {
        let (key, hold, pool) = self.the_hold(at)?;
        match hold.state {
            HoldState::Confirmed => return Ok(self.hold_after(at.id, &hold, pool)),
            HoldState::Cancelled | HoldState::Expired => return Err(over(at, &hold)),
            HoldState::Held => {}
        }
        let pool = Pool { held: pool.held - hold.quantity, confirmed: pool.confirmed + hold.quantity, ..pool };
        let hold = Hold { state: HoldState::Confirmed, until: self.m.stamp.plus(KEPT_MS), ..hold };
        self.put_object(&key, hold.clone());
        pool.check();
        self.put_object(&pool_of(&key), pool);
        Ok(self.hold_after(at.id, &hold, pool))
    }

    fn hold_cancel(&mut self, at: &HoldRef) -> Result<OpReply, Rejection> {
        let (key, hold, pool) = self.the_hold(at)?;
        match hold.state {
            // There is nothing left to give back, which is what was asked for.
            HoldState::Cancelled | HoldState::Expired => Ok(self.hold_after(at.id, &hold, pool)),
            HoldState::Confirmed => {
                let why = format!("hold {} of `{}` is confirmed: what it took can only be returned", at.id, at.pool);
                Err(fenced(at, why).fact("state", hold.state.name()).into())
            }
            HoldState::Held => {
                self.give_back(&key, HoldState::Cancelled);
                let (_, pool) = self.pool(&at.pool)?;
                Ok(self.hold_after(at.id, &Hold { state: HoldState::Cancelled, ..hold }, pool))
            }
        }
    }

    fn hold_extend(&mut self, at: &HoldRef, hold_ms: u64) -> Result<OpReply, Rejection> {
        check_hold_ms(hold_ms)?;
        let (key, mut hold, pool) = self.the_hold(at)?;
        if hold.state != HoldState::Held {
            return Err(over(at, &hold));
        }
        let until = self.m.stamp.plus(hold_ms).max(hold.until);
        if until != hold.until {
            hold.until = until;
            self.put_object(&key, hold.clone());
        }
        Ok(self.hold_after(at.id, &hold, pool))
    }

    /// Ends a hold without a confirmation; those who wait are served with what it held.
    fn give_back(&mut self, key: &ObjectKey, state: HoldState) {
        let Some(hold) = self.object::<Hold>(key).filter(|hold| hold.state == HoldState::Held).cloned() else { return };
        let quantity = hold.quantity;
        self.put_object(key, Hold { state, until: self.m.stamp.plus(KEPT_MS), ..hold });
        let pool_key = pool_of(key);
        if let Some(pool) = self.object::<Pool>(&pool_key).copied() {
            self.serve_pool(&pool_key, Pool { held: pool.held - quantity, ..pool });
        }
    }

    fn give_up(&mut self, pool: &str, request: &RequestId) -> OpReply {
        let key = self.object_key::<Pool>(pool.as_bytes());
        let principal = &self.txn.principal;
        let is_ours = |waiter: &Waiter| {
            waiter.principal == *principal && waiter.request.is_some_and(|own| is_same(&own, request))
        };
        let ours: Vec<_> = self.m.waits.queue(&key).filter(|(_, waiter)| is_ours(waiter)).map(|(n, _)| n).collect();
        for number in &ours {
            let refusal = Refusal::new(RefusalCode::Cancelled, format!("the wait for `{pool}` was given up"));
            self.end_wait(*number, Err(refusal.fact("name", pool).into()));
        }
        if !ours.is_empty() {
            Pool::waiter_gone(self, &key);
        }
        ReservationReply::GaveUp(ours.len() as u64).into()
    }

    fn hold_after(&self, id: u64, hold: &Hold, pool: Pool) -> OpReply {
        let left_ms = if hold.state == HoldState::Held { hold.until.0.saturating_sub(self.m.stamp.0) } else { 0 };
        let after = HoldAfter { id, state: hold.state, quantity: hold.quantity, left_ms, pool };
        ReservationReply::Hold(after).into()
    }
}

fn check_quantity(quantity: u64) -> Result<(), Rejection> {
    let fits = (1..=CAPACITY_MAX).contains(&quantity);
    if fits { Ok(()) } else { Err(invalid(format!("a quantity is 1 to {CAPACITY_MAX}"))) }
}

fn check_capacity(capacity: u64) -> Result<(), Rejection> {
    let fits = capacity <= CAPACITY_MAX;
    if fits { Ok(()) } else { Err(invalid(format!("a capacity is at most {CAPACITY_MAX}"))) }
}

fn check_hold_ms(hold_ms: u64) -> Result<(), Rejection> {
    let fits = (HOLD_MS_MIN..=HOLD_MS_MAX).contains(&hold_ms);
    if fits { Ok(()) } else { Err(invalid(format!("a hold lasts {HOLD_MS_MIN} to {HOLD_MS_MAX} ms"))) }
}

fn too_many(name: &str, pool: &Pool) -> Rejection {
    let why = format!("`{name}` has a capacity of {}, so this can never be granted", pool.capacity);
    with_pool(Refusal::new(RefusalCode::Conflict, why), name, pool).into()
}

fn fenced(at: &HoldRef, why: String) -> Refusal {
    let refusal = Refusal::new(RefusalCode::Fenced, why).fact("name", &at.pool).fact("hold", at.id);
    refusal.fact("presented", at.token)
}

fn over(at: &HoldRef, hold: &Hold) -> Rejection {
    let state = hold.state.name();
    let why = format!("hold {} of `{}` is {state}", at.id, at.pool);
    fenced(at, why).fact("newest", hold.token).fact("state", state).into()
}
