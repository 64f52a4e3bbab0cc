//! Locks: exclusive, shared or by permits, one or several at once, under a session, with a fencing token.
//!
//! Promises. A guard exists only for a grant that the service told. Whoever stops waiting (by dropping the future or by running out of
//! time) is taken out of the queue, and a grant that came first is given back, so no grant stays unnoticed under a living session.
//! Not promised. Holding a [`LockGuard`] does not mean that the lock is still held at this moment: ask [`LockGuard::check`], and let the
//! resource check the token.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::lock_acquire_request::Wait;
use tenure_wire::tenure::v1::reply::Result as Reply;
use tenure_wire::tenure::v1::request::Call;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::client::{Client, Plan, RequestId, drawn_name, mismatched};
use crate::clock::{BootTime, millis};
use crate::error::{Code, Error, Outcome};
use crate::kv::carried_out;
use crate::lease::{LeaseState, LostReason};
use crate::session::{Core, Session};

/// "For ever", in a form that can be added to a clock.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);
/// Between two tries to cancel or to give back.
const AGAIN: Duration = Duration::from_millis(300);

impl Session {
    /// Asks for a lock. Without [`Acquire::wait`] a held lock is refused at once, with its holder.
    ///
    /// ```no_run
    /// # async fn example(session: tenure_client::Session) -> Result<(), tenure_client::Error> {
    /// use std::time::Duration;
    /// let guard = session.lock("orders/sync").wait(Duration::from_secs(30)).await?;
    /// for batch in 0..10 {
    ///     guard.check()?; // reads the clock: stops here if this process was frozen past its deadline
    ///     println!("batch {batch} under token {}", guard.token());
    /// }
    /// guard.release().await
    /// # }
    /// ```
    #[must_use = "nothing is asked for before .await"]
    pub fn lock(&self, name: impl Into<String>) -> Acquire<'_> {
        Acquire { session: self, names: vec![name.into()], many: false, ask: Ask::default() }
    }

    /// Asks for several locks, which are granted together or not at all; waiting for them holds none, so that no order of names can deadlock.
    ///
    /// ```no_run
    /// # async fn example(session: tenure_client::Session) -> Result<(), tenure_client::Error> {
    /// use std::time::Duration;
    /// let both = session.acquire_many(["accounts/1", "accounts/2"]).wait(Duration::from_secs(10)).await?;
    /// println!("both are held under token {}", both.token());
    /// both.release().await
    /// # }
    /// ```
    #[must_use = "nothing is asked for before .await"]
    pub fn acquire_many<N: Into<String>>(&self, names: impl IntoIterator<Item = N>) -> Acquire<'_> {
        let names = names.into_iter().map(Into::into).collect();
        Acquire { session: self, names, many: true, ask: Ask::default() }
    }
}

/// How a lock is held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockMode {
    /// Alone.
    #[default]
    Exclusive,
    /// Beside other readers.
    Shared,
    /// Some of a number of permits.
    Permits,
}

impl LockMode {
    fn of_wire(mode: i32) -> Self {
        match v1::LockMode::try_from(mode) {
            Ok(v1::LockMode::Shared) => Self::Shared,
            Ok(v1::LockMode::Permits) => Self::Permits,
            _ => Self::Exclusive,
        }
    }
}

/// Whose wait ends where a wait would close a cycle of owners that wait for one another; see [`Acquire::on_deadlock`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDeadlock {
    /// That of whoever asks: least work is lost.
    #[default]
    Newcomer,
    /// Of those in the cycle the one with the lowest priority.
    LowestPriority,
    /// Of those in the cycle the one that has held, or waited, for the shortest time.
    Youngest,
}

/// What is asked beside the names.
#[derive(Clone, Debug, Default)]
struct Ask {
    wait: Option<Option<Duration>>,
    owner: Option<String>,
    mode: LockMode,
    permits: u32,
    of: u32,
    priority: i32,
    reentrant: bool,
    lock_delay: Duration,
    min_hold: Duration,
    on_deadlock: OnDeadlock,
}

/// A lock to be acquired; see [`Session::lock`].
#[derive(Clone, Debug)]
pub struct Acquire<'a> {
    session: &'a Session,
    names: Vec<String>,
    many: bool,
    ask: Ask,
}

impl<'a> Acquire<'a> {
    /// Waits in the queue, at most this long.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.ask.wait = Some(Some(wait));
        self
    }

    /// Waits in the queue as long as the session lives.
    #[must_use]
    pub fn wait_for_ever(mut self) -> Self {
        self.ask.wait = Some(None);
        self
    }

    /// Who asks, for people and for the search for deadlocks. Unless told otherwise, each guard is an owner of its own, so that two tasks
    /// under one session exclude each other.
    #[must_use]
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.ask.owner = Some(owner.into());
        self
    }

    /// Holds it beside other readers. Readers that come after a waiting writer wait behind it.
    ///
    /// A guard at a resource must compare the tokens of readers and not raise its mark by them.
    #[must_use]
    pub fn shared(mut self) -> Self {
        self.ask.mode = LockMode::Shared;
        self
    }

    /// Takes `count` of the `of` permits of the lock. The first who asks fixes how many there are; another number is refused as
    /// [`Code::Mismatch`]. The guard tells its [`slots`](LockGuard::slots).
    ///
    /// ```no_run
    /// # async fn example(session: tenure_client::Session) -> Result<(), tenure_client::Error> {
    /// let permit = session.lock("gpu").permits(1, 4).wait_for_ever().await?;
    /// println!("card {} is ours under token {}", permit.slots()[0], permit.token());
    /// permit.release().await
    /// # }
    /// ```
    #[must_use]
    pub fn permits(mut self, count: u32, of: u32) -> Self {
        (self.ask.mode, self.ask.permits, self.ask.of) = (LockMode::Permits, count, of);
        self
    }

    /// Is served before all who wait with a lower priority; 0 unless told otherwise.
    #[must_use]
    pub fn priority(mut self, priority: i32) -> Self {
        self.ask.priority = priority;
        self
    }

    /// If this [`owner`](Acquire::owner) holds it already, holds it once more under the same token. Each guard is released for itself.
    #[must_use]
    pub fn reentrant(mut self) -> Self {
        self.ask.reentrant = true;
        self
    }

    /// If it is lost (and not released), keeps it from everybody but the same owner for so long, at most a minute. For resources that do not
    /// check tokens.
    #[must_use]
    pub fn lock_delay(mut self, delay: Duration) -> Self {
        self.ask.lock_delay = delay;
        self
    }

    /// Keeps it from everybody for so long after the grant, though it is released sooner.
    #[must_use]
    pub fn min_hold(mut self, least: Duration) -> Self {
        self.ask.min_hold = least;
        self
    }

    /// Whose wait ends if this one would never end.
    #[must_use]
    pub fn on_deadlock(mut self, policy: OnDeadlock) -> Self {
        self.ask.on_deadlock = policy;
        self
    }

    async fn run(self) -> Result<LockGuard, Error> {
        let session = self.session.clone();
        session.check()?;
        let ask = self.ask;
        let client = session.client();
        let id = if ask.wait.is_some() { client.wait_id()? } else { client.request_id()? };
        let owner = ask.owner.map_or_else(|| fresh_owner(&session), Ok)?;
        let on_deadlock = match ask.on_deadlock {
            OnDeadlock::Newcomer => v1::OnDeadlock::Newcomer,
            OnDeadlock::LowestPriority => v1::OnDeadlock::LowestPriority,
            OnDeadlock::Youngest => v1::OnDeadlock::Youngest,
        };
        let mode: i32 = match ask.mode {
            LockMode::Exclusive => v1::LockMode::Exclusive,
            LockMode::Shared => v1::LockMode::Shared,
            LockMode::Permits => v1::LockMode::Permits,
        }
        .into();
        let first = self.names.first().cloned().unwrap_or_default();
        let request = if self.many {
            use v1::lock_acquire_many_request::Wait;
            let item = |name: &String| v1::LockItem { name: name.clone(), mode, permits: ask.permits, of: ask.of };
            Wanted::Many(v1::LockAcquireManyRequest {
                locks: self.names.iter().map(item).collect(),
                session: session.id(),
                owner_id: owner.clone(),
                wait: ask.wait.map(|wait| wait.map_or(Wait::Forever(true), |wait| Wait::WaitMs(millis(wait)))),
                priority: ask.priority,
                lock_delay_ms: millis(ask.lock_delay),
                min_hold_ms: millis(ask.min_hold),
                on_deadlock: on_deadlock.into(),
                namespace: session.client().namespace(),
                request: Some(id.meta()),
                ..Default::default()
            })
        } else {
            Wanted::One(v1::LockAcquireRequest {
                name: first.clone(),
                session: session.id(),
                owner_id: owner.clone(),
                wait: ask.wait.map(|wait| wait.map_or(Wait::Forever(true), |wait| Wait::WaitMs(millis(wait)))),
                mode,
                permits: ask.permits,
                of: ask.of,
                priority: ask.priority,
                reentrant: ask.reentrant,
                lock_delay_ms: millis(ask.lock_delay),
                min_hold_ms: millis(ask.min_hold),
                on_deadlock: on_deadlock.into(),
                namespace: session.client().namespace(),
                request: Some(id.meta()),
                ..Default::default()
            })
        };
        // An exclusive grant is named by its token alone.
        let release_as = if ask.mode == LockMode::Exclusive { String::new() } else { owner.clone() };
        let place = Place { names: self.names, owner, release_as, acquire: id.meta() };
        let (answer, outcome) = oneshot::channel();
        // A task of its own, so that dropping this future does not drop the duty to give a late grant back.
        tokio::spawn(acquire(Arc::clone(session.core()), request, place.clone(), id, ask.wait, answer));
        let grant =
            outcome.await.unwrap_or_else(|_| Err(Error::Protocol("the task of the acquire ended early".to_owned())))?;
        let Granted { reply: grant, .. } = grant.claim();
        let guard = LockGuard {
            session,
            name: first,
            release: Release::of(&place, grant.token),
            names: place.names,
            slots: grant.slots,
            depth: grant.depth,
            token: grant.token,
            waited: Duration::from_millis(grant.waited_ms),
        };
        // The grant may have been told to a process that slept through its lease.
        guard.check()?;
        Ok(guard)
    }
}

carried_out!(Acquire<'a> => LockGuard, run);

/// An owner that nobody else of the session is.
fn fresh_owner(session: &Session) -> Result<String, Error> {
    Ok(format!("{:x}-{}", session.id(), drawn_name()?))
}

type Answer = oneshot::Sender<Result<Unclaimed<Granted>, Error>>;

/// Something that was granted, on its way to whoever asked for it: given back if it is dropped unclaimed. That a channel took it does not mean that it
/// will be received.
pub(crate) struct Unclaimed<T> {
    granted: Option<T>,
    give_back: fn(T) -> Pin<Box<dyn Future<Output = ()> + Send>>,
    runtime: Handle,
}

impl<T> Unclaimed<T> {
    /// Called inside the runtime in which it is then given back.
    pub(crate) fn new(granted: T, give_back: fn(T) -> Pin<Box<dyn Future<Output = ()> + Send>>) -> Self {
        Self { granted: Some(granted), give_back, runtime: Handle::current() }
    }

    pub(crate) fn claim(mut self) -> T {
        self.granted.take().expect("only this takes it")
    }
}

impl<T> Drop for Unclaimed<T> {
    fn drop(&mut self) {
        if let Some(granted) = self.granted.take() {
            self.runtime.spawn((self.give_back)(granted));
        }
    }
}

/// A grant with what it takes to give it back.
struct Granted {
    core: Arc<Core>,
    place: Place,
    reply: v1::LockAcquireReply,
}

/// Carries an acquire through, whether or not its caller stays. `_id` stays open until it is heard of or given up.
async fn acquire(
    core: Arc<Core>,
    request: Wanted,
    wait_place: Place,
    _id: RequestId,
    wait: Option<Option<Duration>>,
    mut answer: Answer,
) {
    let mut plan = core.client.plan("acquire lock", true);
    if let Some(wait) = wait {
        // The service counts the wait; the client adds its usual patience for the answer.
        plan = Plan {
            until: Instant::now() + wait.unwrap_or(FOR_EVER).min(FOR_EVER) + core.client.timeout(),
            try_timeout: None,
            ..plan
        };
    }
    let mut call = pin!(grant(&core.client, plan, request));
    let result = tokio::select! {
        result = &mut call => result,
        reason = core.lost() => return drop(answer.send(Err(Error::Lost(reason)))),
        () = answer.closed() => return give_up(&core, &wait_place, Some(call)).await,
    };
    let unknown = matches!(&result, Err(error) if error.outcome() == Outcome::Unknown);
    // The caller may leave in the very moment of the grant.
    let unclaimed = |reply| {
        let granted = Granted { core: Arc::clone(&core), place: wait_place.clone(), reply };
        Unclaimed::new(granted, |it| Box::pin(async move { give_back(&it.core, &it.place, it.reply.token).await }))
    };
    drop(answer.send(result.map(unclaimed)));
    if unknown {
        give_up(&core, &wait_place, None::<std::future::Pending<_>>).await;
    }
}

async fn grant(client: &Client, plan: Plan, request: Wanted) -> Result<v1::LockAcquireReply, Error> {
    let request = match request {
        Wanted::Many(request) => return grant_many(client, plan, &request).await,
        Wanted::One(request) => request,
    };
    match client.call(plan, Call::LockAcquire(request)).await? {
        Reply::LockAcquire(reply) => Ok(reply),
        _ => Err(mismatched("acquire lock")),
    }
}

async fn grant_many(
    client: &Client,
    plan: Plan,
    request: &v1::LockAcquireManyRequest,
) -> Result<v1::LockAcquireReply, Error> {
    let reply: v1::LockAcquireManyReply = client.unary(plan, "/tenure.v1.Locks/AcquireMany", request).await?;
    Ok(v1::LockAcquireReply {
        token: reply.token,
        session: reply.session,
        waited_ms: reply.waited_ms,
        slots: reply.locks.into_iter().flat_map(|lock| lock.slots).collect(),
        depth: 1,
        ..Default::default()
    })
}

/// An acquire of one lock or of several.
enum Wanted {
    One(v1::LockAcquireRequest),
    Many(v1::LockAcquireManyRequest),
}

/// A place in the queues of some locks.
#[derive(Clone)]
struct Place {
    names: Vec<String>,
    owner: String,
    /// Tells apart what one commit granted to one session.
    release_as: String,
    acquire: v1::RequestMeta,
}

impl Place {
    /// Every name finds it.
    fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }
}

/// Cancels until told that the place is gone, or that the grant came first, which is then given back; or until the session is over.
async fn give_up<F>(core: &Core, place: &Place, mut call: Option<F>) -> ()
where
    F: Future<Output = Result<v1::LockAcquireReply, Error>> + Unpin,
{
    // The acquire may still be on its way behind the first cancel, so "there is no such place" counts only when said again later.
    let mut not_found = 0;
    loop {
        let result = tokio::select! {
            result = cancel(core, place) => result,
            // The acquire itself was answered first.
            Some(result) = async { Some(call.as_mut()?.await) } => match result {
                Ok(grant) => return give_back(core, place, grant.token).await,
                Err(error) if error.outcome() == Outcome::NotApplied => return,
                Err(_) => {
                    call = None;
                    continue;
                }
            },
            _ = core.lost() => return,
        };
        match result {
            Ok(None) => return,
            Ok(Some(token)) => return give_back(core, place, token).await,
            Err(error) if error.code() == Some(Code::SessionExpired) => return,
            Err(error) if error.code() == Some(Code::NotFound) && not_found > 0 => return,
            Err(error) if error.code() == Some(Code::NotFound) => not_found += 1,
            Err(error) => tracing::debug!(lock = place.name(), %error, "the wait is not cancelled yet"),
        }
        sleep(AGAIN).await;
    }
}

/// One cancel; gives the token if the grant came first.
async fn cancel(core: &Core, place: &Place) -> Result<Option<u64>, Error> {
    let id = core.client.request_id()?;
    let request = v1::LockCancelRequest {
        name: place.name().to_owned(),
        session: core.id,
        acquire: Some(place.acquire.clone()),
        owner_id: place.owner.clone(),
        namespace: core.client.namespace(),
        request: Some(id.meta()),
    };
    match core.client.call(core.client.plan("cancel wait", true), Call::LockCancel(request)).await? {
        Reply::LockCancel(reply) => Ok(match reply.result {
            Some(v1::lock_cancel_reply::Result::Granted(grant)) => Some(grant.token),
            _ => None,
        }),
        _ => Err(mismatched("cancel wait")),
    }
}

async fn give_back(core: &Core, place: &Place, token: u64) {
    Release::of(place, token).finish(core).await;
}

/// The giving back of a grant, as far as it is still to be done.
struct Release {
    owner: String,
    token: u64,
    /// The names that are not given back yet. Each has one id for all its tries: an owner may hold it more than once under the token, and a release that
    /// was carried out unheard must not count twice.
    left: Vec<(String, Option<RequestId>)>,
}

impl Release {
    fn of(place: &Place, token: u64) -> Self {
        let left = place.names.iter().map(|name| (name.clone(), None)).collect();
        Self { owner: place.release_as.clone(), token, left }
    }

    /// Tries every name once; the first failure is told when all have been tried.
    async fn once(&mut self, core: &Core) -> Result<(), Error> {
        let mut result = Ok(());
        let mut at = 0;
        while let Some((name, id)) = self.left.get_mut(at) {
            let tried = release_one(core, name, id, &self.owner, self.token).await;
            match &tried {
                Err(error) if error.retryable() => {
                    // A refusal says that no try has counted, and would be told again under its id.
                    if matches!(error, Error::Refused(problem) if problem.outcome == Outcome::NotApplied) {
                        *id = None;
                    }
                    at += 1;
                }
                // It is done, or it will never be: it is not held any more.
                _ => drop(self.left.remove(at)),
            }
            result = result.and(tried);
        }
        result
    }

    /// Tries until every name is given back, or the session is over.
    async fn finish(mut self, core: &Core) {
        loop {
            if let Err(error) = self.once(core).await {
                let name = self.left.first().map_or("", |(name, _)| name);
                tracing::debug!(lock = name, token = self.token, %error, "a grant is not given back yet");
            }
            if self.left.is_empty() {
                return;
            }
            tokio::select! {
                () = sleep(AGAIN) => {}
                _ = core.lost() => return,
            }
        }
    }
}

async fn release_one(
    core: &Core,
    name: &str,
    id: &mut Option<RequestId>,
    owner: &str,
    token: u64,
) -> Result<(), Error> {
    let id = match id {
        Some(id) => id,
        None => id.insert(core.client.request_id()?),
    };
    let request = v1::LockReleaseRequest {
        name: name.to_owned(),
        session: core.id,
        token,
        owner_id: owner.to_owned(),
        namespace: core.client.namespace(),
        request: Some(id.meta()),
    };
    match core.client.call(core.client.plan("release lock", true), Call::LockRelease(request)).await? {
        Reply::LockRelease(_) => Ok(()),
        _ => Err(mismatched("release lock")),
    }
}

/// A granted lock.
///
/// Dropping a guard releases the lock in the background if a tokio runtime is there, and tries until it is done; until that message arrives, or if it
/// never does, the lock stays held until the session ends. Use [`LockGuard::release`] where it matters to know.
pub struct LockGuard {
    session: Session,
    name: String,
    names: Vec<String>,
    release: Release,
    slots: Vec<u32>,
    depth: u32,
    token: u64,
    waited: Duration,
}

impl fmt::Debug for LockGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockGuard")
            .field("name", &self.name)
            .field("token", &self.token)
            .field("session", &self.session)
            .finish()
    }
}

impl LockGuard {
    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All names that it holds, where several were asked for at once.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The places of its permits, from 0. Each is a resource of its own for a guard: `name/slot`.
    #[must_use]
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// How often the owner held it when this guard was made, this one included.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// The fencing token: larger than that of every earlier grant of this name. Give it to the resource with each write.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.token
    }

    /// The session under which it is held.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// How long the grant took, by the service's count.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The moment from which this process must not act; each renewal of the session moves it.
    #[must_use]
    pub fn deadline(&self) -> BootTime {
        self.session.deadline()
    }

    /// May this process act as the owner? Reads the clock: call it before each step that matters.
    ///
    /// # Errors
    /// [`Error::Lost`] once the session is lost.
    pub fn check(&self) -> Result<(), Error> {
        self.session.check()
    }

    /// Safe, at risk or lost. Reads the clock.
    #[must_use]
    pub fn state(&self) -> LeaseState {
        self.session.state()
    }

    /// Waits until the session is lost and tells why.
    pub async fn lost(&self) -> LostReason {
        self.session.lost().await
    }

    /// Frees the lock; the next waiter has it in the same commit. If that is not heard of, or not waited for, it goes on in the background.
    ///
    /// # Errors
    /// [`Error::Lost`] if the session is lost, [`Code::Fenced`] if the service has given the lock to another since: in both cases there may
    /// have been another owner before this call.
    pub async fn release(mut self) -> Result<(), Error> {
        self.check()?;
        let core = Arc::clone(self.session.core());
        self.release.once(&core).await
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        let left = std::mem::take(&mut self.release.left);
        if left.is_empty() || self.session.state() == LeaseState::Lost {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            let release = Release { owner: std::mem::take(&mut self.release.owner), token: self.token, left };
            // The clone keeps the session from being ended before the release is through.
            let session = self.session.clone();
            runtime.spawn(async move { release.finish(session.core()).await });
        }
    }
}

/// A lock as the service tells of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockInfo {
    /// The name.
    pub name: String,
    /// The first who holds it; `None` when it is free.
    pub holder: Option<LockHolder>,
    /// All who hold it, at most a thousand, and what a delay keeps from others.
    pub holders: Vec<LockHolder>,
    /// How many hold it in all.
    pub holder_count: u64,
    /// How many permits there are; 0 for a lock without.
    pub permits: u32,
    /// How many of them are free.
    pub permits_free: u32,
    /// The first of those who wait, in order.
    pub waiters: Vec<LockWaiter>,
    /// How many wait in all.
    pub waiter_count: u64,
    /// What happened to it lately, oldest first.
    pub events: Vec<LockEvent>,
}

/// Something that happened to a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockEvent {
    /// `granted`, `released`, `lost`, `force-released`, `timed-out`, `cancelled`, `deadlock`, `delay-over` or `resized`; others may come.
    pub kind: String,
    /// How long ago.
    pub ago: Duration,
    /// The token of the grant.
    pub token: u64,
    /// The session.
    pub session: u64,
    /// The owner as it named itself.
    pub owner: String,
    /// How long it was held or waited for.
    pub after: Duration,
    /// Who did it and why, for what an operator did.
    pub detail: String,
}

/// Who holds a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockHolder {
    /// The fencing token.
    pub token: u64,
    /// The session.
    pub session: u64,
    /// The owner as it named itself.
    pub owner: String,
    /// How long it has been held.
    pub held: Duration,
    /// Until the session may be ended, by the leader's count; zero if the answering member does not know.
    pub remaining: Duration,
    /// The name of the session.
    pub session_name: String,
    /// What the session's maker said about itself.
    pub metadata: BTreeMap<String, String>,
    /// How it is held.
    pub mode: LockMode,
    /// The places of its permits.
    pub slots: Vec<u32>,
    /// How often it must be released; 0: it is over and only kept from others.
    pub depth: u32,
    /// How much longer it is kept from others.
    pub kept: Duration,
}

/// Who waits for a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockWaiter {
    /// From 1: the next one to be served.
    pub position: u64,
    /// The session.
    pub session: u64,
    /// The owner as it named itself.
    pub owner: String,
    /// How long it has waited.
    pub waited: Duration,
    /// How it wants it.
    pub mode: LockMode,
    /// Its priority.
    pub priority: i32,
}

impl Client {
    /// Tells who holds a lock, since when, and who waits.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn lock_info(&self, name: impl Into<String>) -> Result<LockInfo, Error> {
        let request = v1::LockGetRequest { name: name.into(), namespace: self.namespace(), ..Default::default() };
        let reply = self
            .read(|channel| {
                let (mut locks, request) = (self.locks(channel), request.clone());
                async move { locks.get(request).await }
            })
            .await?;
        Ok(reply.lock.map(LockInfo::from).unwrap_or_default())
    }

    /// Takes a lock away from whoever holds it under this token, for a reason that is kept among its events. Gives how many grants that were.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// if let Some(holder) = client.lock_info("reports/nightly").await?.holder {
    ///     client.force_release("reports/nightly", holder.token, "its machine burns").await?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Code::Fenced`] if another token is current, or none.
    pub async fn force_release(
        &self,
        name: impl Into<String>,
        token: u64,
        reason: impl Into<String>,
    ) -> Result<u32, Error> {
        let request = v1::LockForceReleaseRequest {
            name: name.into(),
            expected_token: token,
            reason: reason.into(),
            session: 0,
            namespace: self.namespace(),
            request: None,
        };
        let plan = self.plan("force release", true);
        let reply: v1::LockForceReleaseReply = self.change(plan, "/tenure.v1.Locks/ForceRelease", &request).await?;
        Ok(reply.taken)
    }

    /// Changes how many permits a lock has, and gives how many it had.
    ///
    /// # Errors
    /// [`Code::NotFound`] if nobody has taken a permit of it lately, [`Code::Mismatch`] if it has none.
    pub async fn resize_lock(&self, name: impl Into<String>, permits: u32) -> Result<u32, Error> {
        let request =
            v1::LockResizeRequest { name: name.into(), of: permits, namespace: self.namespace(), request: None };
        let plan = self.plan("resize lock", true);
        let reply: v1::LockResizeReply = self.change(plan, "/tenure.v1.Locks/Resize", &request).await?;
        Ok(reply.before)
    }
}

impl From<v1::Lock> for LockInfo {
    fn from(lock: v1::Lock) -> Self {
        Self {
            name: lock.name,
            holder: lock.holders.iter().find(|holder| holder.kept_ms == 0).cloned().map(LockHolder::from),
            holders: lock.holders.into_iter().map(LockHolder::from).collect(),
            holder_count: lock.holder_count,
            permits: lock.permits,
            permits_free: lock.permits_free,
            waiters: lock.waiters.into_iter().map(LockWaiter::from).collect(),
            waiter_count: lock.waiter_count,
            events: lock.events.into_iter().map(LockEvent::from).collect(),
        }
    }
}

impl From<v1::LockEvent> for LockEvent {
    fn from(event: v1::LockEvent) -> Self {
        Self {
            kind: event.kind,
            ago: Duration::from_millis(event.ago_ms),
            token: event.token,
            session: event.session,
            owner: event.owner_id,
            after: Duration::from_millis(event.after_ms),
            detail: event.detail,
        }
    }
}

impl From<v1::LockHolder> for LockHolder {
    fn from(holder: v1::LockHolder) -> Self {
        Self {
            token: holder.token,
            session: holder.session,
            owner: holder.owner_id,
            held: Duration::from_millis(holder.held_ms),
            remaining: Duration::from_millis(holder.remaining_ms),
            session_name: holder.session_name,
            metadata: holder.metadata,
            mode: LockMode::of_wire(holder.mode),
            slots: holder.slots,
            depth: holder.depth,
            kept: Duration::from_millis(holder.kept_ms),
        }
    }
}

impl From<v1::LockWaiter> for LockWaiter {
    fn from(waiter: v1::LockWaiter) -> Self {
        Self {
            position: waiter.position,
            session: waiter.session,
            owner: waiter.owner_id,
            waited: Duration::from_millis(waiter.waited_ms),
            mode: LockMode::of_wire(waiter.mode),
            priority: waiter.priority,
        }
    }
}
