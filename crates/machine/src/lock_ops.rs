//! What can be asked of locks: the rules for readers and permits, priorities, reentry, delays, several locks at once, and operators.
//!
//! Promises. K1: whoever waits is served by rank, then in the order of arrival, each in the commit that makes room; the first of a queue is never passed by, be it
//! that it wants more permits than are left. K2: readers that come after a waiting writer wait behind it. K3: several locks are granted together in
//! one commit or not at all, to whoever is first in each of their queues. K4: one commit gives no token twice: nothing is granted beside or
//! after an exclusive grant of it, and no slot twice. K5: what is lost with a session or taken by an operator is kept from others as long as
//! its grant asked for, except from the same owner; the end of that is a log entry, which grants.
//! K6: no wait stands that would never end (see `deadlocks.rs`).
//! Not promised. That a lock of permits stays for ever: when nobody has held one for [`FORGET_MS`] it is forgotten, with its number.
//! Relies on. `locks.rs` for the table, `apply.rs` for what a plain exclusive acquire does where it needs nothing of this.

use crate::apply::{Commit, Machine, Place, Undo, invalid, tombstone};
use crate::codec::name;
use crate::coded::{coded_enum, coded_struct};
use crate::command::{LockAcquire, SessionCreate, Wait};
use crate::deadlocks::{self, Search, Step};
use crate::lock_events::{LockEvent, LockEventKind};
use crate::locks::{Found, HoldKey, HoldMode, Kept, Lock, LockHold, LockKey, PERMITS_MAX, Permits, Plain, Shape, Wide};
use crate::native::{NativeOp, PRIMITIVES, Refusal, RefusalCode};
use crate::objects::ObjectKey;
use crate::reply::{Change, Holder, LockGrant, OpReply, Rejection};
use crate::types::*;
use crate::waits::{Ask, OwnerKey, Waiter, WaiterNumber};
use std::collections::BTreeSet;

/// Locks of one acquire.
pub const LOCKS_OF_ONE_MAX: usize = 64;
/// How often an owner may take a lock that it holds.
pub(crate) const DEPTH_MAX: u32 = 64;
/// The longest lock delay.
pub const DELAY_MAX_MS: u64 = 60_000;
/// The longest time for which a hold may keep others away after its release.
pub const MIN_HOLD_MAX_MS: u64 = 24 * 3_600_000;
/// Bytes of the reason of an operator.
pub const REASON_BYTES_MAX: usize = 1_024;
/// After so long without a holder a lock forgets how many permits it has.
pub(crate) const FORGET_MS: u64 = 7 * 24 * 3_600_000;
/// How many others' waits one acquire may end.
const VICTIMS_MAX: usize = 8;

coded_enum! {
    /// An operation of locks.
    pub enum LockOp as "an operation of locks" {
        /// Takes one lock or several, in any mode.
        Acquire(Box<LockAsk>) = 1,
        /// Gives one grant back.
        Release(LockRelease) = 2,
        /// An operator takes a lock away.
        ForceRelease(LockForceRelease) = 3,
        /// Changes the number of permits.
        Resize(LockResize) = 4,
    }
}

coded_struct! {
    /// What an acquire asks for.
    pub struct LockAsk as "an acquire" {
        /// One to 64, each name once.
        pub locks: Vec<LockItem>,
        /// As in `LockAcquire`.
        pub session: SessionId,
        pub create: Option<SessionCreate>,
        pub owner: Box<[u8]>,
        pub wait: Wait,
        /// Higher ones are served first; zero: in the order of arrival.
        pub priority: i32,
        /// The owner may take what it holds again, and has then to release it as often.
        pub reentrant: bool,
        pub delay_ms: u64,
        pub min_hold_ms: u64,
        pub on_deadlock: OnDeadlock,
    }
}

coded_struct! {
    /// One lock of an acquire.
    pub struct LockItem as "a lock of an acquire" {
        pub name: Box<[u8]>,
        pub mode: HoldMode,
    }
}

coded_enum! {
    /// Whose wait ends where a wait would close a cycle.
    #[derive(Copy, Eq)]
    pub enum OnDeadlock as "a policy of deadlocks" {
        /// That of whoever asks.
        Newcomer = 1,
        /// Of those in the cycle the one with the lowest priority, and of equal ones the one that came last.
        LowestPriority = 2,
        /// Of those in the cycle the one that holds, or waits, for the shortest time.
        Youngest = 3,
    }
}

coded_struct! {
    /// Which grant is given back.
    pub struct LockRelease as "a release" {
        pub name: Box<[u8]>,
        pub session: SessionId,
        pub token: Revision,
        /// Tells apart what one commit granted to one session; empty: any of them.
        pub owner: Box<[u8]>,
    }
}

coded_struct! {
    /// Which grant is taken away.
    pub struct LockForceRelease as "a forced release" {
        pub name: Box<[u8]>,
        pub token: Revision,
        /// Zero: every grant of that token.
        pub session: SessionId,
        pub reason: Box<str>,
    }
}

coded_struct! {
    /// Another number of permits.
    pub struct LockResize as "a resize" {
        pub name: Box<[u8]>,
        pub permits: u32,
    }
}

coded_enum! {
    /// What it answers.
    pub enum LockReply as "an answer about locks" {
        Granted(LockGranted) = 1,
        /// How often it must still be released; zero: it is free.
        Released(u32) = 2,
        /// How many grants were taken away.
        ForceReleased(u32) = 3,
        /// How many permits there were before.
        Resized(u32) = 4,
    }
}

coded_struct! {
    /// Everything that was asked for is held.
    pub struct LockGranted as "a grant" {
        /// The revision of the commit that granted it.
        pub token: Revision,
        pub session: SessionId,
        pub session_token: u64,
        pub ttl_ms: u64,
        /// How often it must be released.
        pub depth: u32,
        /// In the order of names.
        pub locks: Vec<LockPart>,
    }
}

coded_struct! {
    /// One lock of a grant.
    pub struct LockPart as "a lock of a grant" {
        pub name: Box<[u8]>,
        pub mode: HoldMode,
        /// The places of its permits.
        pub slots: Vec<u32>,
    }
}

impl LockOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        match self {
            Self::Acquire(ask) => {
                let locks = ask.locks.iter().map(|item| match item.mode {
                    HoldMode::Permits(p) => 1_024 + item.name.len() as u64 * 3 + 12 * u64::from(p.count.max(p.of)),
                    HoldMode::Exclusive | HoldMode::Shared => 1_024 + item.name.len() as u64 * 3,
                });
                let session = ask.create.as_ref().map_or(0, SessionCreate::growth);
                locks.sum::<u64>() + 3 * ask.owner.len() as u64 + session
            }
            Self::Resize(resize) => 12 * u64::from(resize.permits),
            Self::Release(_) | Self::ForceRelease(_) => 0,
        }
    }

    /// What a waiter is told whose time is over; `None`: that it waited in vain.
    pub(crate) fn wait_over(&self, _: &Machine, _: &Waiter) -> Option<Result<OpReply, Rejection>> {
        None
    }
}

/// An acquire, whichever operation it came with.
pub(crate) struct Want {
    /// In the order of names.
    pub(crate) items: Vec<(LockKey, HoldMode)>,
    pub(crate) session: SessionId,
    pub(crate) owner: Box<[u8]>,
    pub(crate) rank: i64,
    reentrant: bool,
    delay_ms: u64,
    min_hold_ms: u64,
    on_deadlock: OnDeadlock,
    /// It came as the operation of behaviour version 1, and is answered as such.
    plain: bool,
}

impl Want {
    fn of_ask(namespace: NamespaceId, ask: &LockAsk, session: SessionId) -> Self {
        let mut items: Vec<_> = ask.locks.iter().map(|item| (LockKey::new(namespace, &item.name), item.mode)).collect();
        items.sort_by(|(a, _), (b, _)| a.cmp(b));
        Self {
            items,
            session,
            owner: ask.owner.clone(),
            rank: -i64::from(ask.priority),
            reentrant: ask.reentrant,
            delay_ms: ask.delay_ms,
            min_hold_ms: ask.min_hold_ms,
            on_deadlock: ask.on_deadlock,
            plain: false,
        }
    }

    pub(crate) fn of_acquire(key: LockKey, acquire: &LockAcquire, session: SessionId) -> Self {
        Self::plain(key, session, acquire.owner.clone())
    }

    fn plain(key: LockKey, session: SessionId, owner: Box<[u8]>) -> Self {
        Self {
            items: vec![(key, HoldMode::Exclusive)],
            session,
            owner,
            rank: 0,
            reentrant: false,
            delay_ms: 0,
            min_hold_ms: 0,
            on_deadlock: OnDeadlock::Newcomer,
            plain: true,
        }
    }

    fn of_waiter(waiter: &Waiter) -> Option<Self> {
        match &waiter.ask {
            Ask::Exclusive => {
                let key = LockKey::of_object(waiter.on.first()?)?;
                Some(Self::plain(key, waiter.session, waiter.owner.clone()))
            }
            Ask::Native(op) => match &**op {
                NativeOp::Lock(LockOp::Acquire(ask)) => {
                    Some(Self::of_ask(waiter.on.first()?.namespace(), ask, waiter.session))
                }
                _ => None,
            },
        }
    }

    pub(crate) fn owner_key(&self) -> OwnerKey {
        OwnerKey::new(&self.owner, self.session)
    }

    fn is_for_nothing_special(&self) -> bool {
        self.delay_ms == 0 && self.min_hold_ms == 0
    }
}

/// The locks that a waiter waits for, and how it wants them; empty for a wait for something else.
pub(crate) fn items_of(waiter: &Waiter) -> Vec<(LockKey, HoldMode)> {
    Want::of_waiter(waiter).map(|want| want.items).unwrap_or_default()
}

/// How a waiter wants the lock of one queue.
pub(crate) fn asked_of(waiter: &Waiter, queue: &ObjectKey) -> Option<HoldMode> {
    items_of(waiter).into_iter().find(|(key, _)| key.object() == *queue).map(|(_, mode)| mode)
}

/// Two that cannot be of one lock: with permits, and how many, or without.
fn kind_of(mode: HoldMode) -> u32 {
    match mode {
        HoldMode::Exclusive | HoldMode::Shared => 0,
        HoldMode::Permits(permits) => permits.of,
    }
}

fn refuse(code: RefusalCode, key: &LockKey, why: impl Into<Box<str>>) -> Refusal {
    Refusal::new(code, why).fact("name", key.name().escape_ascii())
}

impl Commit<'_> {
    pub(crate) fn lock_op(&mut self, op: &LockOp) -> Result<OpReply, Rejection> {
        match op {
            LockOp::Acquire(ask) => self.lock_ask(ask),
            LockOp::Release(release) => {
                let owner = Some(&*release.owner).filter(|owner| !owner.is_empty());
                self.release(&release.name, release.session, release.token, owner)
            }
            LockOp::ForceRelease(force) => self.force_release(force),
            LockOp::Resize(resize) => self.resize(resize),
        }
    }

    // ---- Acquire ----

    fn lock_ask(&mut self, ask: &LockAsk) -> Result<OpReply, Rejection> {
        check_ask(ask)?;
        let session = self.check_acquirer(ask.session, ask.create.as_ref(), ask.locks.len() as u64)?;
        let want = Want::of_ask(self.txn.namespace, ask, session);
        if let Some(twice) = want.items.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(invalid(format!("lock `{}` is asked for twice", twice[0].0.name().escape_ascii())));
        }
        let waiting = || {
            let ask = LockAsk { session, create: None, ..ask.clone() };
            Ask::Native(Box::new(NativeOp::Lock(LockOp::Acquire(Box::new(ask)))))
        };
        self.acquire(&want, ask.wait, ask.create.as_ref(), waiting)
    }

    /// Takes what is wanted, or waits for it, or refuses.
    pub(crate) fn acquire(
        &mut self,
        want: &Want,
        wait: Wait,
        create: Option<&SessionCreate>,
        waiting: impl Fn() -> Ask,
    ) -> Result<OpReply, Rejection> {
        for (key, mode) in &want.items {
            self.check_kind(key, *mode)?;
        }
        if let Some(again) = self.ask_again(want)? {
            return Ok(again);
        }
        for _ in 0..=VICTIMS_MAX {
            if self.may_take(want) {
                self.create_session_of(create);
                let mut returned = Vec::new();
                let reply = self.take(want, &mut returned)?;
                // Less may be wanted than was kept: the rest is for those who wait.
                self.serve(returned)?;
                return Ok(reply);
            }
            let deadline = self.check_wait(want, wait)?;
            let Some(cycle) = self.find_deadlock(want) else {
                self.create_session_of(create);
                self.wait(Place {
                    on: want.items.iter().map(|(key, _)| key.object()).collect(),
                    rank: want.rank,
                    session: want.session,
                    owner: want.owner.clone(),
                    deadline,
                    ask: waiting(),
                });
                return Ok(OpReply::Done);
            };
            self.end_victim(want, &cycle)?;
        }
        let key = &want.items[0].0;
        Err(refuse(RefusalCode::Deadlock, key, "waiting would never end, in too many ways").into())
    }

    /// A lock has permits or has none, and has so many of them.
    fn check_kind(&self, key: &LockKey, mode: HoldMode) -> Result<(), Rejection> {
        let is = match self.m.locks.get(key) {
            Some(Lock::Plain(_)) => 0,
            Some(Lock::Wide(wide)) => wide.shape.permits,
            None => {
                let queue = key.object();
                let first = self.m.waits.head(&queue).and_then(|number| self.m.waits.get(number));
                match first.and_then(|waiter| asked_of(waiter, &queue)) {
                    Some(mode) => kind_of(mode),
                    None => return Ok(()),
                }
            }
        };
        if is == kind_of(mode) {
            return Ok(());
        }
        let name = key.name().escape_ascii();
        let why = match (is, kind_of(mode)) {
            (0, _) => format!("lock `{name}` has no permits"),
            (is, 0) => format!("lock `{name}` has {is} permits: take some of them"),
            (is, asked) => format!("lock `{name}` has {is} permits, not {asked}: `resize` changes that"),
        };
        Err(refuse(RefusalCode::Mismatch, key, why).fact("permits", is).into())
    }

    /// An owner that asks for what it holds or waits for: the grant that it has, or a refusal.
    fn ask_again(&mut self, want: &Want) -> Result<Option<OpReply>, Rejection> {
        let owner = want.owner_key();
        for (key, mode) in &want.items {
            if let Some((found, hold)) = self.held_by(key, want) {
                if want.reentrant {
                    return self.reenter(key, *mode, found, hold, want).map(Some);
                }
                // Whoever wants more permits takes them where they are to be had.
                if kind_of(*mode) == 0 {
                    return Err(Rejection::Deadlock { name: key.name().into(), holder: hold.holder });
                }
            }
            if kind_of(*mode) == 0 && self.m.waits.is_waiting(&key.object(), &owner) {
                return Err(match self.m.locks.get(key).and_then(Lock::holder) {
                    Some(holder) => Rejection::Deadlock { name: key.name().into(), holder: holder.clone() },
                    None => refuse(RefusalCode::Deadlock, key, "the same owner waits for this lock already").into(),
                });
            }
        }
        Ok(None)
    }

    /// What the owner holds of a lock.
    fn held_by(&self, key: &LockKey, want: &Want) -> Option<(Found, LockHold)> {
        if !self.m.locks.may_hold(key, &want.owner, want.session) {
            return None;
        }
        let owner = want.owner_key();
        match self.m.locks.get(key)? {
            Lock::Plain(plain) => {
                let hold = hold_of(plain);
                (hold.owner_key() == owner).then_some((Found::Plain, hold))
            }
            Lock::Wide(wide) => {
                let mut own = wide.holds.iter().filter(|(_, hold)| hold.is_live() && hold.owner_key() == owner);
                own.next().map(|(at, hold)| (Found::Wide(*at), hold.clone()))
            }
        }
    }

    fn reenter(
        &mut self,
        key: &LockKey,
        mode: HoldMode,
        found: Found,
        hold: LockHold,
        want: &Want,
    ) -> Result<OpReply, Rejection> {
        let enough = match (hold.mode, mode) {
            // How many there are may have changed since.
            (HoldMode::Permits(held), HoldMode::Permits(asked)) => held.count == asked.count,
            (held, asked) => held == asked || (held == HoldMode::Exclusive && asked == HoldMode::Shared),
        };
        if !enough || hold.holder.session != want.session {
            return Err(Rejection::Deadlock { name: key.name().into(), holder: hold.holder });
        }
        if hold.depth >= DEPTH_MAX {
            let why = format!("lock `{}` was taken {DEPTH_MAX} times by its owner", key.name().escape_ascii());
            return Err(refuse(RefusalCode::Quota, key, why).fact("limit", DEPTH_MAX).into());
        }
        let deeper = LockHold { depth: hold.depth + 1, ..hold };
        let (mode, slots) = (deeper.mode, deeper.slots.clone());
        let (token, depth) = (deeper.holder.token, deeper.depth);
        let at = match found {
            Found::Wide(at) => at,
            Found::Plain => {
                self.set_lock(key, None);
                self.set_lock_shape(key, Some(Shape::default()));
                (token, want.session, 0)
            }
        };
        self.set_lock_hold(key, at, Some(deeper));
        let part = LockPart { name: key.name().into(), mode, slots };
        self.granted(want, token, depth, vec![part])
    }

    /// Whether everything can be had at once.
    fn may_take(&self, want: &Want) -> bool {
        want.items.iter().all(|(key, mode)| {
            let (fits, returns) = self.fits(key, *mode, want);
            // What a delay keeps for its owner was not to be had by those who wait.
            fits && (returns || !self.m.waits.is_someone_ahead(&key.object(), want.rank))
        })
    }

    /// Whether a lock could be held beside those who hold it now, and whether its owner returns to what is kept for it.
    fn fits(&self, key: &LockKey, mode: HoldMode, want: &Want) -> (bool, bool) {
        let wide = match self.m.locks.get(key) {
            None => return (true, false),
            Some(Lock::Plain(_)) => return (false, false),
            Some(Lock::Wide(wide)) => wide,
        };
        let owner = want.owner_key();
        let yields = |hold: &LockHold| hold.yields_to(&owner);
        match mode {
            HoldMode::Exclusive => (wide.holds.values().all(yields), !wide.holds.is_empty()),
            HoldMode::Shared => {
                // An exclusive one is alone, or kept for somebody: then it is older than what came beside it, which is nothing.
                let first = wide.holds.values().next().filter(|hold| hold.mode == HoldMode::Exclusive);
                if wide.holds.len() as u64 >= self.m.limit(crate::Limit::LockWaiters) {
                    return (false, false);
                }
                (first.is_none_or(yields), first.is_some_and(yields))
            }
            HoldMode::Permits(permits) => {
                let wanted = u64::from(permits.count);
                if wide.left() >= wanted {
                    return (true, false);
                }
                let kept: u64 = wide.holds.values().filter(|hold| yields(hold)).map(|h| h.slots.len() as u64).sum();
                (wide.left() + kept >= wanted, kept > 0)
            }
        }
    }

    /// Until when it may wait; or that it may not.
    fn check_wait(&self, want: &Want, wait: Wait) -> Result<Option<LogTime>, Rejection> {
        let deadline = match wait {
            Wait::None | Wait::Ms(0) => return Err(self.held(want)),
            Wait::Ms(ms) => Some(self.m.stamp.plus(ms)),
            Wait::Forever => None,
        };
        if self.check_alone().is_err() {
            return Err(invalid("an acquire that may wait must be the only operation of its transaction"));
        }
        let limit = self.m.limit(crate::Limit::LockWaiters);
        if want.items.iter().any(|(key, _)| self.m.waits.len(&key.object()) >= limit) {
            return Err(Rejection::Quota { what: name::WAITERS, limit });
        }
        Ok(deadline)
    }

    /// The refusal of whoever does not wait, with the first lock that is not to be had.
    fn held(&self, want: &Want) -> Rejection {
        let blocked = want.items.iter().find(|(key, mode)| {
            !self.fits(key, *mode, want).0 || self.m.waits.is_someone_ahead(&key.object(), want.rank)
        });
        let key = &blocked.unwrap_or(&want.items[0]).0;
        let waiters = self.m.waits.len(&key.object());
        if let Some(holder) = self.m.locks.get(key).and_then(Lock::holder) {
            return Rejection::Held { name: key.name().into(), holder: holder.clone(), waiters };
        }
        let name = key.name().escape_ascii();
        let kept =
            self.m.locks.wide(key).and_then(|wide| wide.holds.values().filter_map(|h| h.kept).max_by_key(|k| k.until));
        let Some(kept) = kept else {
            let why = format!("{waiters} wait for lock `{name}`");
            return refuse(RefusalCode::Held, key, why).fact("waiters", waiters).into();
        };
        let left = kept.until.0.saturating_sub(self.m.stamp.0);
        let why =
            format!("nobody gets lock `{name}` for another {left} ms: it is kept from others after its last holder");
        let refusal = refuse(RefusalCode::Held, key, why).fact("waiters", waiters);
        refusal.fact("delay_left_ms", left).retry_after(left).into()
    }

    fn find_deadlock(&mut self, want: &Want) -> Option<Vec<Step>> {
        if self.m.behaviour < PRIMITIVES {
            return None;
        }
        match self.m.find_deadlock(want) {
            Search::Nothing => None,
            Search::Cycle(cycle) => {
                self.m.lock_counts.deadlocks += 1;
                Some(cycle)
            }
            Search::GaveUp => {
                self.m.lock_counts.searches_given_up += 1;
                None
            }
        }
    }

    /// Breaks a cycle by ending a wait of it; an error if that is the one of whoever asks.
    fn end_victim(&mut self, want: &Want, cycle: &[Step]) -> Result<(), Rejection> {
        let newcomer = WaiterNumber::MAX;
        let number = |step: &Step| step.waiter.unwrap_or(newcomer);
        let victim = match want.on_deadlock {
            OnDeadlock::Newcomer => None,
            OnDeadlock::LowestPriority => cycle.iter().max_by_key(|step| (step.rank, number(step))),
            OnDeadlock::Youngest => {
                // An owner holds since the step before it says so.
                let since = |n: usize| cycle[(n + cycle.len() - 1) % cycle.len()].since;
                (0..cycle.len()).max_by_key(|n| (since(*n), number(&cycle[*n]))).map(|n| &cycle[n])
            }
        };
        let (key, waiter) = match victim {
            Some(Step { lock, waiter: Some(waiter), .. }) => (lock.clone(), *waiter),
            _ => return Err(deadlocks::refusal(&cycle[0].lock, cycle)),
        };
        let keys = self.m.waits.get(waiter).map(|w| keys_of(&w.on)).unwrap_or_default();
        if let Some(event) = self.waiter_event(LockEventKind::Deadlock, waiter) {
            self.lock_event(&key, event);
        }
        self.end_wait(waiter, Err(deadlocks::refusal(&key, cycle)));
        self.serve(keys)
    }

    // ---- Grants ----

    /// Holds everything that is wanted, from this commit on. Notes the locks of which something was kept for this owner.
    fn take(&mut self, want: &Want, returned: &mut Vec<LockKey>) -> Result<OpReply, Rejection> {
        let mut parts = Vec::with_capacity(want.items.len());
        let mut plain = None;
        for (key, mode) in &want.items {
            if self.take_back_kept(key, want) {
                returned.push(key.clone());
            }
            let is_plain = *mode == HoldMode::Exclusive && want.is_for_nothing_special();
            let slots = if is_plain && self.m.locks.get(key).is_none() {
                plain = Some(self.grant(key, want.session, want.owner.clone())?);
                Vec::new()
            } else {
                self.hold(key, *mode, want)?
            };
            parts.push(LockPart { name: key.name().into(), mode: *mode, slots });
        }
        match plain {
            Some(grant) if want.plain => Ok(OpReply::LockGranted(grant)),
            _ => self.granted(want, self.at, 1, parts),
        }
    }

    fn granted(&self, want: &Want, token: Revision, depth: u32, locks: Vec<LockPart>) -> Result<OpReply, Rejection> {
        let session = want.session;
        let facts = &self.live_session(session)?.facts;
        let (session_token, ttl_ms) = (facts.token, facts.create.ttl_ms);
        if want.plain {
            return Ok(OpReply::LockGranted(LockGrant { token, session, session_token, ttl_ms }));
        }
        Ok(LockReply::Granted(LockGranted { token, session, session_token, ttl_ms, depth, locks }).into())
    }

    /// An owner that returns has again what was kept for it, if something was.
    fn take_back_kept(&mut self, key: &LockKey, want: &Want) -> bool {
        let owner = want.owner_key();
        let Some(wide) = self.m.locks.wide(key) else { return false };
        let kept: Vec<HoldKey> =
            wide.holds.iter().filter(|(_, hold)| hold.yields_to(&owner)).map(|(at, _)| *at).collect();
        let is_kept = !kept.is_empty();
        for at in kept {
            self.set_lock_hold(key, at, None);
        }
        self.tidy(key);
        is_kept
    }

    /// One more hold of a wide lock. Its slots come back.
    fn hold(&mut self, key: &LockKey, mode: HoldMode, want: &Want) -> Result<Vec<u32>, Rejection> {
        let permits = kind_of(mode);
        self.note_grant(key, mode == HoldMode::Exclusive)?;
        match self.m.locks.wide(key).map(|wide| wide.shape) {
            None => self.set_lock_shape(key, Some(Shape { permits, forget_at: None })),
            Some(shape @ Shape { forget_at: Some(_), .. }) => {
                self.set_lock_shape(key, Some(Shape { forget_at: None, ..shape }));
            }
            Some(_) => {}
        }
        let slots = match mode {
            HoldMode::Permits(permits) => self.free_slots(key, permits)?,
            HoldMode::Exclusive | HoldMode::Shared => Vec::new(),
        };
        let (at, session) = (self.at, want.session);
        let Some(wide) = self.m.locks.wide(key) else { return Err(invalid("a lock of another kind")) };
        let same = wide.holds.range((at, session, 0)..=(at, session, u32::MAX)).next_back();
        let nth = same.map_or(0, |((.., nth), _)| nth + 1);
        let hold = LockHold {
            holder: Holder { token: at, session, owner: want.owner.clone(), since: self.m.stamp },
            mode,
            slots: slots.clone(),
            depth: 1,
            delay_ms: want.delay_ms,
            min_hold_ms: want.min_hold_ms,
            kept: None,
        };
        self.lock_event(key, LockEvent::of(LockEventKind::Granted, &hold.holder, self.m.stamp, 0));
        self.set_lock_hold(key, (at, session, nth), Some(hold));
        self.touched.insert(key.clone());
        Ok(slots)
    }

    fn free_slots(&mut self, key: &LockKey, permits: Permits) -> Result<Vec<u32>, Rejection> {
        let Some(wide) = self.m.locks.wide(key) else { return Ok(Vec::new()) };
        let given = |slot: &u32| self.slots_given.iter().any(|(k, s)| s == slot && k == key);
        let slots: Vec<u32> =
            wide.free().iter().copied().filter(|slot| !given(slot)).take(permits.count as usize).collect();
        if slots.len() < permits.count as usize {
            return Err(invalid(format!("one transaction grants a slot of `{}` once", key.name().escape_ascii())));
        }
        self.slots_given.extend(slots.iter().map(|slot| (key.clone(), *slot)));
        Ok(slots)
    }

    /// Gives locks to those who wait, as far as there is room.
    pub(crate) fn serve(&mut self, keys: impl IntoIterator<Item = LockKey>) -> Result<(), Rejection> {
        let mut left: BTreeSet<LockKey> = keys.into_iter().collect();
        while let Some(key) = left.pop_first() {
            let queue = key.object();
            while let Some(number) = self.m.waits.head(&queue) {
                let Some(waiter) = self.m.waits.get(number) else { break };
                let Some(want) = Want::of_waiter(waiter) else { break };
                debug_assert!(waiter.deadline.is_none_or(|deadline| deadline > self.m.stamp));
                if !self.is_next(number, &want) {
                    break;
                }
                // What it leaves of what was kept for it is given on below.
                let reply = self.take(&want, &mut Vec::new())?;
                self.end_wait(number, Ok(reply));
                left.extend(want.items.into_iter().map(|(other, _)| other).filter(|other| *other != key));
            }
            self.tidy(&key);
        }
        Ok(())
    }

    /// Whether a waiter is the first of all its queues and has room everywhere.
    fn is_next(&self, number: WaiterNumber, want: &Want) -> bool {
        want.items
            .iter()
            .all(|(key, mode)| self.m.waits.head(&key.object()) == Some(number) && self.fits(key, *mode, want).0)
    }

    /// Forgets a lock that nobody holds, at once or, with permits, in a while.
    fn tidy(&mut self, key: &LockKey) {
        let Some(Wide { shape, holds, .. }) = self.m.locks.wide(key) else { return };
        if !holds.is_empty() {
            return;
        }
        match *shape {
            Shape { permits: 0, .. } => self.set_lock_shape(key, None),
            Shape { forget_at: None, permits } => {
                let forget_at = Some(self.m.stamp.plus(FORGET_MS));
                self.set_lock_shape(key, Some(Shape { permits, forget_at }));
            }
            Shape { .. } => {}
        }
    }

    /// Tells watchers what a lock is now.
    pub(crate) fn tell(&mut self, key: &LockKey) {
        // A plain one was told by its grant.
        if matches!(self.m.locks.get(key), Some(Lock::Plain(_))) {
            return;
        }
        let index = self.next_index();
        let record = match self.m.locks.wide(key) {
            Some(wide) => wide.record(key, self.at, index),
            None => tombstone(&key.native_key(), self.at, index),
        };
        self.push_change(Change { record, before: None });
    }

    // ---- The end of a hold ----

    /// Gives a grant back: that of this token and session, and of this owner if one is named.
    pub(crate) fn release(
        &mut self,
        name: &[u8],
        session: SessionId,
        token: Revision,
        owner: Option<&[u8]>,
    ) -> Result<OpReply, Rejection> {
        let key = LockKey::new(self.txn.namespace, name);
        let lock = self.m.locks.get(&key);
        match lock.and_then(|lock| lock.find(token, session, owner)) {
            None => {
                let again = self.m.sessions.get(session).is_some_and(|s| s.has_released(&key, token));
                return if again { Ok(OpReply::LockReleased) } else { Err(crate::apply::fenced(name, token, lock)) };
            }
            Some(Found::Plain) => self.free(&key, LockEventKind::Released, "")?,
            Some(Found::Wide(at)) => {
                let Some(hold) = self.m.locks.wide(&key).and_then(|wide| wide.holds.get(&at)).cloned() else {
                    return Err(crate::apply::fenced(name, token, None));
                };
                if hold.depth > 1 {
                    let depth = hold.depth - 1;
                    self.set_lock_hold(&key, at, Some(LockHold { depth, ..hold }));
                    return Ok(LockReply::Released(depth).into());
                }
                self.drop_hold(&key, at, LockEventKind::Released, "");
                self.serve([key.clone()])?;
            }
        }
        if let Some(mut holder) = self.m.sessions.get(session).cloned() {
            holder.remember_release(key, token);
            self.set_session(session, Some(holder));
        }
        Ok(OpReply::LockReleased)
    }

    /// Ends a hold; what its grant asked for stays as a delay. Nobody is served yet.
    fn drop_hold(&mut self, key: &LockKey, at: HoldKey, why: LockEventKind, detail: &str) {
        let Some(hold) = self.m.locks.wide(key).and_then(|wide| wide.holds.get(&at)).cloned() else { return };
        let now = self.m.stamp;
        let least = hold.least_until();
        let delayed = if why == LockEventKind::Released { now } else { now.plus(hold.delay_ms) };
        let until = least.max(delayed);
        let held_ms = now.0.saturating_sub(hold.holder.since.0);
        self.lock_event(key, LockEvent { detail: detail.into(), ..LockEvent::of(why, &hold.holder, now, held_ms) });
        // Until its least time is over it is kept from everybody; after that from all but its owner.
        let kept = (until > now).then_some(Kept { until, may_return: least <= now });
        self.touched.insert(key.clone());
        self.set_lock_hold(key, at, kept.map(|kept| LockHold { kept: Some(kept), depth: 0, ..hold }));
    }

    /// Gives free what was only kept from others. Nobody is served yet.
    fn drop_kept(&mut self, key: &LockKey, at: HoldKey, why: LockEventKind, detail: &str) {
        let Some(hold) = self.m.locks.wide(key).and_then(|wide| wide.holds.get(&at)) else { return };
        let after_ms = self.m.stamp.0.saturating_sub(hold.holder.since.0);
        let event = LockEvent::of(why, &hold.holder, self.m.stamp, after_ms);
        self.lock_event(key, LockEvent { detail: detail.into(), ..event });
        self.set_lock_hold(key, at, None);
        self.touched.insert(key.clone());
    }

    /// Ends every hold of a session: those of plain locks at once, with who is next; of the others the names come back, to be served when
    /// all are gone.
    pub(crate) fn drop_holds_of(&mut self, session: SessionId) -> Result<Vec<LockKey>, Rejection> {
        let mut wide = Vec::new();
        for key in self.m.locks.locks_of(session) {
            let Some(lock) = self.m.locks.wide(&key) else {
                self.free(&key, LockEventKind::Lost, "")?;
                continue;
            };
            let own = lock.holds.iter().filter(|(_, hold)| hold.is_live() && hold.holder.session == session);
            let own: Vec<HoldKey> = own.map(|(at, _)| *at).collect();
            for at in own {
                self.drop_hold(&key, at, LockEventKind::Lost, "");
            }
            wide.push(key);
        }
        Ok(wide)
    }

    /// Something of a lock ends by itself: a delay, or the memory of how many permits it had.
    pub(crate) fn lock_due(&mut self, key: &LockKey) -> Result<(), Rejection> {
        let Some(wide) = self.m.locks.wide(key) else { return Ok(()) };
        let now = self.m.stamp;
        let over = wide.holds.iter().filter(|(_, hold)| hold.kept.is_some_and(|kept| kept.until <= now));
        let over: Vec<HoldKey> = over.map(|(at, _)| *at).collect();
        if wide.shape.forget_at.is_some_and(|at| at <= now) {
            // Somebody who waits for other locks as well may wait for it.
            let forget_at = Some(now.plus(FORGET_MS));
            let shape = Shape { forget_at, ..wide.shape };
            let is_wanted = self.m.waits.len(&key.object()) > 0;
            self.set_lock_shape(key, is_wanted.then_some(shape));
            self.touched.insert(key.clone());
        }
        for at in over {
            self.drop_kept(key, at, LockEventKind::DelayOver, "");
        }
        self.let_owners_return(key);
        self.serve([key.clone()])
    }

    /// What is kept for longer than the least time of its hold is kept from its owner, too, only until that is over.
    fn let_owners_return(&mut self, key: &LockKey) {
        let Some(wide) = self.m.locks.wide(key) else { return };
        let now = self.m.stamp;
        let may = wide.holds.iter().filter(|(_, hold)| hold.kept.is_some_and(|kept| !kept.may_return));
        let may = may.filter(|(_, hold)| hold.least_until() <= now);
        let may: Vec<(HoldKey, LockHold)> = may.map(|(at, hold)| (*at, hold.clone())).collect();
        for (at, hold) in may {
            let kept = hold.kept.map(|kept| Kept { may_return: true, ..kept });
            self.set_lock_hold(key, at, Some(LockHold { kept, ..hold }));
        }
    }

    // ---- Operators ----

    fn force_release(&mut self, force: &LockForceRelease) -> Result<OpReply, Rejection> {
        crate::apply::check_name(&force.name)?;
        if force.reason.is_empty() || force.reason.len() > REASON_BYTES_MAX {
            return Err(invalid(format!("a reason has 1 to {REASON_BYTES_MAX} bytes")));
        }
        let key = LockKey::new(self.txn.namespace, &force.name);
        let lock = self.m.locks.get(&key);
        let (all, one) = (force.session == SessionId(0), force.session);
        let mut found: Vec<(HoldKey, Holder)> = match lock {
            None => Vec::new(),
            Some(Lock::Plain(Plain { holder, .. })) => vec![((holder.token, holder.session, 0), holder.clone())],
            Some(Lock::Wide(wide)) => wide.holds.iter().map(|(at, hold)| (*at, hold.holder.clone())).collect(),
        };
        found.retain(|(_, holder)| holder.token == force.token && (all || holder.session == one));
        if found.is_empty() {
            return Err(crate::apply::fenced(&force.name, force.token, lock));
        }
        let is_plain = matches!(lock, Some(Lock::Plain(_)));
        let detail: Box<str> = match &*self.txn.principal {
            "" => force.reason.clone(),
            who => format!("{who}: {}", force.reason).into(),
        };
        let count = found.len() as u32;
        for (at, _) in found {
            match self.m.locks.wide(&key).and_then(|wide| wide.holds.get(&at)).map(LockHold::is_live) {
                Some(true) => self.drop_hold(&key, at, LockEventKind::ForceReleased, &detail),
                Some(false) => self.drop_kept(&key, at, LockEventKind::ForceReleased, &detail),
                None => {}
            }
        }
        if is_plain {
            self.free(&key, LockEventKind::ForceReleased, &detail)?;
        } else {
            self.serve([key])?;
        }
        Ok(LockReply::ForceReleased(count).into())
    }

    fn resize(&mut self, resize: &LockResize) -> Result<OpReply, Rejection> {
        crate::apply::check_name(&resize.name)?;
        if !(1..=PERMITS_MAX).contains(&resize.permits) {
            return Err(invalid(format!("a lock has 1 to {PERMITS_MAX} permits")));
        }
        let key = LockKey::new(self.txn.namespace, &resize.name);
        let shape = match self.m.locks.get(&key) {
            Some(Lock::Wide(wide)) if wide.shape.permits > 0 => wide.shape,
            Some(_) => return Err(refuse(RefusalCode::Mismatch, &key, "this lock has no permits").into()),
            None => return Err(Rejection::NotFound { what: name::LOCK, name: resize.name.clone() }),
        };
        if shape.permits == resize.permits {
            return Ok(LockReply::Resized(shape.permits).into());
        }
        self.set_lock_shape(&key, Some(Shape { permits: resize.permits, ..shape }));
        let event = LockEvent {
            kind: LockEventKind::Resized,
            at: self.m.stamp,
            token: self.at,
            session: SessionId(0),
            owner: Box::default(),
            after_ms: 0,
            detail: format!("{} to {} permits", shape.permits, resize.permits).into(),
        };
        self.lock_event(&key, event);
        self.touched.insert(key.clone());
        let mut left = self.refuse_too_large(&key, resize.permits);
        left.push(key);
        self.serve(left)?;
        Ok(LockReply::Resized(shape.permits).into())
    }

    /// Nobody waits for more permits than there are. Gives the locks that such waits were for.
    fn refuse_too_large(&mut self, key: &LockKey, permits: u32) -> Vec<LockKey> {
        let queue = key.object();
        let mut left = Vec::new();
        let asks_more =
            |waiter: &Waiter| matches!(asked_of(waiter, &queue), Some(HoldMode::Permits(p)) if p.count > permits);
        let all = self.m.waits.queue(&queue).filter(|(_, waiter)| asks_more(waiter)).map(|(number, _)| number);
        for number in all.collect::<Vec<_>>() {
            let why = format!("lock `{}` has only {permits} permits now", key.name().escape_ascii());
            let refusal = refuse(RefusalCode::Mismatch, key, why).fact("permits", permits);
            left.extend(self.m.waits.get(number).map(|w| keys_of(&w.on)).unwrap_or_default());
            self.end_wait(number, Err(refusal.into()));
        }
        left
    }

    /// The event of a wait that ended without a grant.
    pub(crate) fn waiter_event(&self, kind: LockEventKind, number: WaiterNumber) -> Option<LockEvent> {
        let waiter = self.m.waits.get(number)?;
        Some(LockEvent {
            kind,
            at: self.m.stamp,
            token: self.m.revision,
            session: waiter.session,
            owner: waiter.owner.clone(),
            after_ms: self.m.stamp.0.saturating_sub(waiter.since.0),
            detail: "".into(),
        })
    }

    // ---- Steps that can be undone ----

    fn set_lock_shape(&mut self, key: &LockKey, shape: Option<Shape>) {
        let old = self.m.locks.set_shape(key, shape);
        self.undo.push(Undo::LockShape(key.clone(), old));
    }

    fn set_lock_hold(&mut self, key: &LockKey, at: HoldKey, hold: Option<LockHold>) {
        let old = self.m.locks.set_hold(key, at, hold);
        self.undo.push(Undo::LockHold(key.clone(), at, old.map(Box::new)));
    }
}

/// The locks among what a waiter waits for.
pub(crate) fn keys_of(on: &[ObjectKey]) -> Vec<LockKey> {
    on.iter().filter_map(LockKey::of_object).collect()
}

fn hold_of(plain: &Plain) -> LockHold {
    LockHold {
        holder: plain.holder.clone(),
        mode: HoldMode::Exclusive,
        slots: Vec::new(),
        depth: 1,
        delay_ms: 0,
        min_hold_ms: 0,
        kept: None,
    }
}

fn check_ask(ask: &LockAsk) -> Result<(), Rejection> {
    if ask.locks.is_empty() || ask.locks.len() > LOCKS_OF_ONE_MAX {
        return Err(invalid(format!("an acquire names 1 to {LOCKS_OF_ONE_MAX} locks")));
    }
    for item in &ask.locks {
        crate::apply::check_name(&item.name)?;
        if let HoldMode::Permits(Permits { count, of }) = item.mode
            && (count == 0 || count > of || of > PERMITS_MAX)
        {
            return Err(invalid(format!("1 or more permits are asked for, of at most {PERMITS_MAX}")));
        }
    }
    if ask.owner.len() > crate::locks::NAME_BYTES_MAX {
        return Err(invalid("the owner's name is too long"));
    }
    if ask.delay_ms > DELAY_MAX_MS || ask.min_hold_ms > MIN_HOLD_MAX_MS {
        return Err(invalid("a lock delay has at most 60 s, a least time of holding at most 24 h"));
    }
    if ask.reentrant && ask.locks.len() > 1 {
        return Err(invalid("several locks at once are not taken again"));
    }
    Ok(())
}
