//! Locks: one owner per name, under a session, with a fencing token.
//!
//! Promises. A guard exists only for a grant that the service told. Whoever stops waiting (by dropping the future or by running out of
//! time) is taken out of the queue, and a grant that came first is given back, so no grant stays unnoticed under a living session.
//! Not promised. Holding a [`LockGuard`] does not mean that the lock is still held at this moment: ask [`LockGuard::check`], and let the
//! resource check the token.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::lock_acquire_request::Wait;
use tenure_wire::tenure::v1::reply::Result as Reply;
use tenure_wire::tenure::v1::request::Call;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::client::{Client, Plan, mismatched, one_shot};
use crate::clock::BootTime;
use crate::error::{Code, Error, Outcome, Problem};
use crate::kv::Answering;
use crate::lease::{LeaseState, LostReason};
use crate::requests;
use crate::session::{Core, NamedRequest, Session};

/// "For ever", in a form that can be added to a clock.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);

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
        Acquire { session: self, name: name.into(), wait: None, owner: None }
    }
}

/// A lock to be acquired; see [`Session::lock`].
#[derive(Clone, Debug)]
pub struct Acquire<'a> {
    session: &'a Session,
    name: String,
    wait: Option<Option<Duration>>,
    owner: Option<String>,
}

impl<'a> Acquire<'a> {
    /// Waits in the queue, at most this long.
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(Some(wait));
        self
    }

    /// Waits in the queue as long as the session lives.
    #[must_use]
    pub fn wait_for_ever(mut self) -> Self {
        self.wait = Some(None);
        self
    }

    /// Who asks, for people and for the search for deadlocks. Unless told otherwise, each guard is an owner of its own, so that two tasks
    /// under one session exclude each other.
    #[must_use]
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.owner = Some(owner.into());
        self
    }

    async fn run(self) -> Result<LockGuard, Error> {
        let session = self.session.clone();
        session.check()?;
        let named = session.next_request().ok_or_else(too_many_open)?;
        let owner = self
            .owner
            .unwrap_or_else(|| format!("{:x}-{:02x}{:02x}", session.id(), named.meta_seq(), requests::jitter()));
        let wait = self.wait.map(|wait| match wait {
            Some(wait) => Wait::WaitMs(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
            None => Wait::Forever(true),
        });
        let request = v1::LockAcquireRequest {
            name: self.name.clone(),
            session: session.id(),
            owner_id: owner,
            wait,
            namespace: session.client().namespace(),
            request: Some(named.meta()),
            ..Default::default()
        };
        let (answer, outcome) = oneshot::channel();
        // A task of its own, so that dropping this future does not drop the duty to give a late grant back.
        tokio::spawn(acquire(Arc::clone(session.core()), request, named, self.wait, answer));
        let grant =
            outcome.await.unwrap_or_else(|_| Err(Error::Protocol("the task of the acquire ended early".to_owned())))?;
        let guard = LockGuard {
            session,
            name: self.name,
            token: grant.token,
            waited: Duration::from_millis(grant.waited_ms),
            released: false,
        };
        // The grant may have been told to a process that slept through its lease.
        guard.check()?;
        Ok(guard)
    }
}

impl<'a> IntoFuture for Acquire<'a> {
    type Output = Result<LockGuard, Error>;
    type IntoFuture = Answering<'a, LockGuard>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

fn too_many_open() -> Error {
    Error::Refused(Box::new(Problem {
        code: Code::RateLimited,
        message: format!("{} requests of this session are open already", requests::OPEN_MAX),
        retryable: true,
        outcome: Outcome::NotApplied,
        ..Problem::default()
    }))
}

type Answer = oneshot::Sender<Result<v1::LockAcquireReply, Error>>;

/// Carries an acquire through, whether or not its caller stays.
async fn acquire(
    core: Arc<Core>,
    request: v1::LockAcquireRequest,
    named: NamedRequest,
    wait: Option<Option<Duration>>,
    mut answer: Answer,
) {
    let wait_place = Place { name: request.name.clone(), acquire: named.meta() };
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
    if let Err(Ok(unheard)) = answer.send(result) {
        // The caller left in the very moment of the grant.
        return give_back(&core, &wait_place.name, unheard.token).await;
    }
    if unknown {
        give_up(&core, &wait_place, None::<std::future::Pending<_>>).await;
    }
}

async fn grant(client: &Client, plan: Plan, request: v1::LockAcquireRequest) -> Result<v1::LockAcquireReply, Error> {
    match client.call(plan, Call::LockAcquire(request)).await? {
        Reply::LockAcquire(reply) => Ok(reply),
        _ => Err(mismatched("acquire lock")),
    }
}

/// A place in the queue of a lock.
struct Place {
    name: String,
    acquire: v1::RequestMeta,
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
                Ok(grant) => return give_back(core, &place.name, grant.token).await,
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
            Ok(Some(token)) => return give_back(core, &place.name, token).await,
            Err(error) if error.code() == Some(Code::SessionExpired) => return,
            Err(error) if error.code() == Some(Code::NotFound) && not_found > 0 => return,
            Err(error) if error.code() == Some(Code::NotFound) => not_found += 1,
            Err(error) => tracing::debug!(lock = place.name, %error, "the wait is not cancelled yet"),
        }
        sleep(Duration::from_millis(300)).await;
    }
}

/// One cancel; gives the token if the grant came first.
async fn cancel(core: &Core, place: &Place) -> Result<Option<u64>, Error> {
    let request = v1::LockCancelRequest {
        name: place.name.clone(),
        session: core.id,
        acquire: Some(place.acquire.clone()),
        namespace: core.client.namespace(),
        request: Some(one_shot()?),
    };
    match core.client.call(core.client.plan("cancel wait", true), Call::LockCancel(request)).await? {
        Reply::LockCancel(reply) => Ok(match reply.result {
            Some(v1::lock_cancel_reply::Result::Granted(grant)) => Some(grant.token),
            _ => None,
        }),
        _ => Err(mismatched("cancel wait")),
    }
}

async fn give_back(core: &Core, name: &str, token: u64) {
    if let Err(error) = release(core, name, token).await {
        tracing::debug!(lock = name, token, %error, "an unwanted grant was left to the ttl of its session");
    }
}

async fn release(core: &Core, name: &str, token: u64) -> Result<(), Error> {
    let request = v1::LockReleaseRequest {
        name: name.to_owned(),
        session: core.id,
        token,
        namespace: core.client.namespace(),
        request: Some(one_shot()?),
    };
    match core.client.call(core.client.plan("release lock", true), Call::LockRelease(request)).await? {
        Reply::LockRelease(_) => Ok(()),
        _ => Err(mismatched("release lock")),
    }
}

/// A granted lock.
///
/// Dropping a guard releases the lock in the background if a tokio runtime is there; until that message arrives, or if it never does, the
/// lock stays held until the session ends. Use [`LockGuard::release`] where it matters to know.
pub struct LockGuard {
    session: Session,
    name: String,
    token: u64,
    waited: Duration,
    released: bool,
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

    /// Frees the lock; the next waiter has it in the same commit.
    ///
    /// # Errors
    /// [`Error::Lost`] if the session is lost, [`Code::Fenced`] if the service has given the lock to another since: in both cases there may
    /// have been another owner before this call.
    pub async fn release(mut self) -> Result<(), Error> {
        self.released = true;
        self.check()?;
        release(self.session.core(), &self.name, self.token).await
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        if self.released || self.session.state() == LeaseState::Lost {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            // The clone keeps the session from being ended before the release is through.
            let (session, name, token) = (self.session.clone(), std::mem::take(&mut self.name), self.token);
            runtime.spawn(async move { give_back(session.core(), &name, token).await });
        }
    }
}

/// A lock as the service tells of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LockInfo {
    /// The name.
    pub name: String,
    /// Who holds it; `None` when it is free.
    pub holder: Option<LockHolder>,
    /// The first of those who wait, in order.
    pub waiters: Vec<LockWaiter>,
    /// How many wait in all.
    pub waiter_count: u64,
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
}

impl From<v1::Lock> for LockInfo {
    fn from(lock: v1::Lock) -> Self {
        Self {
            name: lock.name,
            holder: lock.holders.into_iter().next().map(LockHolder::from),
            waiters: lock.waiters.into_iter().map(LockWaiter::from).collect(),
            waiter_count: lock.waiter_count,
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
        }
    }
}
