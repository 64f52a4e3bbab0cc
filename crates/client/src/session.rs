//! Sessions: proof of life, kept by a task of this library and judged by the clock of this machine.
//!
//! Promises. The deadline follows the rule of [`crate::lease`]. [`Session::check`] reads the clock at each call, so a process that was
//! frozen past its deadline is told at its first look, before any timer has run. [`Session::lost`] completes once the session is
//! lost, also when no server can be reached. A lost session is never renewed back.
//! Not promised. Ending a session on drop is a courtesy to those who wait: if the message does not get through, the ttl ends it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::reply::Result as Reply;
use tenure_wire::tenure::v1::request::Call;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::client::{Client, all_pages, mismatched};
use crate::clock::{BootTime, millis};
use crate::error::{Code, Error, Problem};
use crate::kv::carried_out;
use crate::lease::{Lease, LeaseState, LeaseTiming, LostReason};
use crate::pipeline::{Answer, Undelivered};
use crate::requests::{self, Sequence};

/// No sleep is longer: timers do not run while the machine is suspended, and this is how late they may then be noticed.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(1);

/// What becomes of the keys that a session owns when it ends. Its locks are freed in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExpire {
    /// They are deleted.
    #[default]
    Delete,
    /// They stay and belong to no session.
    Release,
}

/// A session to be made; see [`Client::session`].
#[derive(Clone, Debug)]
pub struct CreateSession<'a> {
    client: &'a Client,
    request: v1::SessionCreateRequest,
    margin: Option<Duration>,
}

impl Client {
    /// Makes a session and keeps it alive until its last clone (and the last guard under it) is dropped.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// let session = client.session().ttl(std::time::Duration::from_secs(10)).name("worker 7").await?;
    /// client.put("workers/7", "10.0.0.7:80").session(session.id()).await?; // gone when the session is
    /// # Ok(()) }
    /// ```
    #[must_use = "no session is made before .await"]
    pub fn session(&self) -> CreateSession<'_> {
        let request = v1::SessionCreateRequest { namespace: self.namespace(), ..Default::default() };
        CreateSession { client: self, request, margin: None }
    }

    /// Takes over the renewing of a session that was made elsewhere, after a first renewal. Token 0 means whichever incarnation lives.
    ///
    /// # Errors
    /// [`Code::SessionExpired`] if there is none.
    pub async fn adopt_session(&self, id: u64, token: u64) -> Result<Session, Error> {
        let renew =
            v1::SessionRenewRequest { sessions: vec![v1::SessionRef { id, token }], namespace: self.namespace() };
        let first_sent = BootTime::now();
        let Reply::SessionRenew(reply) =
            self.call(self.plan("renew session", false), Call::SessionRenew(renew)).await?
        else {
            return Err(mismatched("renew session"));
        };
        let renewal = reply.renewals.into_iter().next().ok_or_else(|| mismatched("renew session"))?;
        if let Some(error) = renewal.error {
            return Err(Error::Refused(Box::new(error.into())));
        }
        let timing = LeaseTiming::of(Duration::from_millis(renewal.ttl_ms));
        Session::start(self.clone(), renewal.id, renewal.token, Lease::granted(timing, first_sent))
    }

    /// Ends a session by its id. Token 0 means whichever incarnation lives.
    ///
    /// # Errors
    /// [`Code::SessionExpired`] if there is none.
    pub async fn end_session(&self, id: u64, token: u64) -> Result<(), Error> {
        let own = self.request_id()?;
        let request = v1::SessionEndRequest { id, token, namespace: self.namespace(), request: Some(own.meta()) };
        match self.call(self.plan("end session", true), Call::SessionEnd(request)).await? {
            Reply::SessionEnd(_) => Ok(()),
            _ => Err(mismatched("end session")),
        }
    }

    /// Tells of one session, with what it owns; `None` if there is none of this id.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn session_info(&self, id: u64) -> Result<Option<SessionInfo>, Error> {
        let request = v1::SessionGetRequest { id, owned: true, namespace: self.namespace(), ..Default::default() };
        let reply = self
            .read(|channel| {
                let (mut sessions, request) = (self.sessions(channel), request.clone());
                async move { sessions.get(request).await }
            })
            .await;
        match reply {
            Ok(reply) => Ok(reply.session.map(SessionInfo::from)),
            Err(error) if matches!(error.code(), Some(Code::NotFound | Code::SessionExpired)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lists all live sessions by rising id.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn list_sessions(&self) -> Result<Vec<SessionInfo>, Error> {
        let page = |after| async move {
            let namespace = self.namespace();
            let request = v1::SessionListRequest { limit: 1_000, after, namespace, ..Default::default() };
            let ask = |channel| {
                let (mut sessions, request) = (self.sessions(channel), request.clone());
                async move { sessions.list(request).await }
            };
            let reply = self.read(ask).await?;
            Ok((reply.sessions.into_iter().map(SessionInfo::from).collect(), reply.next))
        };
        all_pages(page).await
    }
}

impl CreateSession<'_> {
    /// How long the service waits without a renewal before it ends the session: 15 s unless told otherwise; the granted value may
    /// be larger.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.request.ttl_ms = millis(ttl);
        self
    }

    /// How long before the ttl runs out the session counts as lost: a tenth of it, at least 200 ms, unless told otherwise; at most half.
    #[must_use]
    pub fn margin(mut self, margin: Duration) -> Self {
        self.margin = Some(margin);
        self
    }

    /// A name for people: host or process.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.request.name = name.into();
        self
    }

    /// Shown to whoever asks who holds a lock, such as host, pid or trace id.
    #[must_use]
    pub fn metadata(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.metadata.insert(key.into(), value.into());
        self
    }

    /// What becomes of its keys when it ends.
    #[must_use]
    pub fn on_expire(mut self, what: OnExpire) -> Self {
        let wire = match what {
            OnExpire::Delete => v1::OnExpire::Delete,
            OnExpire::Release => v1::OnExpire::Release,
        };
        self.request.set_on_expire(wire);
        self
    }

    /// An id of one's own, below 2^63; refused while a session of this id lives.
    #[must_use]
    pub fn id(mut self, id: u64) -> Self {
        self.request.id = id;
        self
    }

    async fn run(self) -> Result<Session, Error> {
        let Self { client, mut request, margin } = self;
        let id = client.request_id()?;
        request.request = Some(id.meta());
        // Taken before the first try: a later try may be answered from memory, and the ttl has run since the first.
        let first_sent = BootTime::now();
        let Reply::SessionCreate(reply) =
            client.call(client.plan("create session", true), Call::SessionCreate(request)).await?
        else {
            return Err(mismatched("create session"));
        };
        let timing = LeaseTiming::of(Duration::from_millis(reply.ttl_ms));
        let timing = margin.map_or(timing, |margin| timing.with_margin(margin));
        Session::start(client.clone(), reply.id, reply.token, Lease::granted(timing, first_sent))
    }
}

carried_out!(CreateSession<'a> => Session, run);

/// A live session of this process. Clones are the same session; when the last one and the last guard under it are dropped, the renewing
/// stops and the session is ended in the background, so that waiters need not wait for the ttl.
#[derive(Clone)]
pub struct Session {
    owner: Arc<Owner>,
}

/// Held by the clones only, so that its drop means that nobody uses the session any more.
struct Owner {
    core: Arc<Core>,
    keeper: JoinHandle<()>,
    end_on_drop: AtomicBool,
}

/// What the clones and the keeper share.
pub(crate) struct Core {
    pub(crate) client: Client,
    pub(crate) id: u64,
    token: u64,
    lease: Mutex<Lease>,
    sequence: Mutex<Sequence>,
    state: watch::Sender<LeaseState>,
    /// The lease was renewed or ended: look at it again.
    changed: Notify,
    /// Elections that it leads and should give up, as the last renewal told.
    yields: watch::Sender<Vec<String>>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id())
            .field("token", &self.token())
            .field("state", &self.state())
            .finish()
    }
}

impl Session {
    fn start(client: Client, id: u64, token: u64, lease: Lease) -> Result<Self, Error> {
        let (state, _) = watch::channel(LeaseState::Safe);
        let (lease, sequence) = (Mutex::new(lease), Mutex::new(Sequence::new(requests::OPEN_MAX)));
        let (yields, _) = watch::channel(Vec::new());
        let core = Arc::new(Core { client, id, token, lease, sequence, state, changed: Notify::new(), yields });
        let keeper = tokio::spawn(keep(Arc::clone(&core)));
        let session = Self { owner: Arc::new(Owner { core, keeper, end_on_drop: AtomicBool::new(true) }) };
        // An answer that took longer than the ttl brings a session that is over already.
        session.check().map(|()| session.clone())
    }

    /// The id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.core().id
    }

    /// Which incarnation of the id this is.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.core().token
    }

    /// The client that it was made with.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.core().client
    }

    /// The ttl, as granted.
    #[must_use]
    pub fn ttl(&self) -> Duration {
        self.core().lease().timing().ttl()
    }

    /// The moment from which this process must not act under the session; each renewal moves it.
    #[must_use]
    pub fn deadline(&self) -> BootTime {
        self.core().lease().deadline()
    }

    /// May this process act? Reads the clock.
    ///
    /// # Errors
    /// [`Error::Lost`] once the session is lost, for ever after.
    pub fn check(&self) -> Result<(), Error> {
        match self.state() {
            LeaseState::Lost => Err(Error::Lost(self.core().reason())),
            LeaseState::Safe | LeaseState::AtRisk => Ok(()),
        }
    }

    /// Safe, at risk (start no new outside effect) or lost. Reads the clock.
    #[must_use]
    pub fn state(&self) -> LeaseState {
        self.core().look(BootTime::now())
    }

    /// The states as they change. The last one is [`LeaseState::Lost`].
    #[must_use]
    pub fn states(&self) -> watch::Receiver<LeaseState> {
        self.core().state.subscribe()
    }

    /// Waits until the session is lost and tells why. Use it beside the work in `tokio::select!`, which drops the work.
    pub async fn lost(&self) -> LostReason {
        self.core().lost().await
    }

    /// Ends the session: what it holds is freed, and granted to those who wait, at once. Ending a session that is over already succeeds.
    ///
    /// # Errors
    /// When the outcome is unknown; the ttl will end it.
    pub async fn end(self) -> Result<(), Error> {
        let core = Arc::clone(self.core());
        self.owner.end_on_drop.store(false, Ordering::Relaxed);
        core.end(LostReason::Closed);
        match core.client.end_session(core.id, core.token).await {
            Err(error) if error.code() == Some(Code::SessionExpired) => Ok(()),
            result => result,
        }
    }

    /// Stops renewing when the last clone is dropped, but lets the session live until its ttl runs out.
    pub fn leave_on_drop(&self) {
        self.owner.end_on_drop.store(false, Ordering::Relaxed);
    }

    /// The next request id of this session; `None` while too many are open.
    pub(crate) fn next_request(&self) -> Option<NamedRequest> {
        let core = self.core();
        let mut sequence = core.sequence();
        let seq = sequence.begin()?;
        Some(NamedRequest { core: Arc::clone(core), seq, acked_below: sequence.acked_below() })
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.owner.core
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.keeper.abort();
        let core = Arc::clone(&self.core);
        core.end(LostReason::Closed);
        if !self.end_on_drop.load(Ordering::Relaxed) {
            return;
        }
        // Without a runtime (at the end of the process) the ttl has to do it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = core.client.end_session(core.id, core.token).await {
                    tracing::debug!(session = core.id, %error, "a dropped session was left to its ttl");
                }
            });
        }
    }
}

impl Core {
    // A panic elsewhere while holding these locks leaves no half-done change behind.
    fn lease(&self) -> MutexGuard<'_, Lease> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sequence(&self) -> MutexGuard<'_, Sequence> {
        self.sequence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state at `now`, told to those who wait for a change of it.
    fn look(&self, now: BootTime) -> LeaseState {
        let mut lease = self.lease();
        let state = lease.state(now);
        if let Some(reason) = lease.tell_lost(now) {
            tracing::debug!(session = self.id, %reason, "session lost");
        }
        // Still under the lock: two looks must not publish their states in the wrong order.
        self.state.send_if_modified(|known| std::mem::replace(known, state) != state);
        state
    }

    pub(crate) fn end(&self, why: LostReason) {
        self.lease().end(why);
        self.look(BootTime::now());
        self.changed.notify_waiters();
    }

    fn renewed(&self, first_sent: BootTime, renewed: Renewed) {
        let now = BootTime::now();
        self.lease().renewed(first_sent, renewed.ttl, now);
        self.yields.send_if_modified(|known| std::mem::replace(known, renewed.yields.clone()) != renewed.yields);
        self.look(now);
        self.changed.notify_waiters();
    }

    fn reason(&self) -> LostReason {
        self.lease().lost().cloned().unwrap_or(LostReason::Closed)
    }

    /// Waits until a renewal tells that the lead of an election should be given up.
    pub(crate) async fn should_yield(&self, election: &str) {
        let mut yields = self.yields.subscribe();
        // The sender is a field of self, so the channel cannot close here.
        let _ = yields.wait_for(|yields| yields.iter().any(|name| name == election)).await;
    }

    pub(crate) async fn lost(&self) -> LostReason {
        let mut states = self.state.subscribe();
        // The sender is a field of self, so the channel cannot close here.
        let _ = states.wait_for(|state| *state == LeaseState::Lost).await;
        self.reason()
    }
}

/// A request id of a session, open until dropped.
pub(crate) struct NamedRequest {
    core: Arc<Core>,
    seq: u64,
    acked_below: u64,
}

impl NamedRequest {
    pub(crate) fn meta(&self) -> v1::RequestMeta {
        let place = v1::SessionSeq { session: self.core.id, seq: self.seq, acked_below: self.acked_below };
        v1::RequestMeta { id: Some(v1::request_meta::Id::Session(place)) }
    }
}

impl Drop for NamedRequest {
    fn drop(&mut self) {
        self.core.sequence().done(self.seq);
    }
}

/// Keeps a session alive until it is lost.
async fn keep(core: Arc<Core>) {
    tokio::select! {
        () = watch_time(&core) => {}
        () = renew_for_ever(&core) => {}
    }
}

/// Publishes the states that come by time alone; ends when the session is lost.
async fn watch_time(core: &Core) {
    loop {
        let changed = core.changed.notified();
        let now = BootTime::now();
        if core.look(now) == LeaseState::Lost {
            return;
        }
        let next = core.lease().next_change(now).map_or(Duration::ZERO, |next| next.since(now));
        tokio::select! {
            () = sleep(next.min(LOOK_AT_LEAST_EVERY)) => {}
            () = changed => {}
        }
    }
}

async fn renew_for_ever(core: &Core) {
    let mut jitter = requests::jitter();
    loop {
        let (renewed_at, timing) = {
            let lease = core.lease();
            (lease.renewed_at(), lease.timing())
        };
        let due = renewed_at.plus(timing.renew_every(jitter)).since(BootTime::now());
        if !due.is_zero() {
            sleep(due.min(LOOK_AT_LEAST_EVERY)).await;
            continue;
        }
        let (sent, sent_at) = (BootTime::now(), Instant::now());
        match timeout(timing.try_timeout(), renew_once(core)).await {
            Ok(Ok(renewed)) => {
                core.renewed(sent, renewed);
                jitter = requests::jitter();
            }
            Ok(Err(Renewal::Ended)) => return core.end(LostReason::EndedByServer),
            Ok(Err(Renewal::Failed(why))) => {
                tracing::debug!(session = core.id, why, "renewal failed");
                sleep((timing.ttl() / 30).clamp(Duration::from_millis(20), Duration::from_millis(500))).await;
            }
            Err(_) => {
                tracing::debug!(session = core.id, "renewal unanswered");
                core.client.suspect(sent_at);
            }
        }
    }
}

/// What a renewal brings.
struct Renewed {
    ttl: Duration,
    yields: Vec<String>,
}

/// Why a try of a renewal did not succeed.
enum Renewal {
    /// The session is over.
    Ended,
    /// Nothing is known; try again.
    Failed(String),
}

async fn renew_once(core: &Core) -> Result<Renewed, Renewal> {
    let sessions = vec![v1::SessionRef { id: core.id, token: core.token }];
    let request = v1::SessionRenewRequest { sessions, namespace: core.client.namespace() };
    let renewal = match core.client.send_once(Call::SessionRenew(request)).await {
        Ok(Answer { result: Reply::SessionRenew(reply), .. }) => reply.renewals.into_iter().next(),
        Ok(Answer { result: Reply::Error(error), link }) => return Err(judge(core, error, link)),
        Ok(_) => None,
        Err(Undelivered::NotSent(why) | Undelivered::Broken(why)) => return Err(Renewal::Failed(why)),
    };
    match renewal {
        Some(v1::SessionRenewal { error: Some(error), .. }) => Err(judge(core, error, 0)),
        Some(renewal) if renewal.ttl_ms > 0 => {
            Ok(Renewed { ttl: Duration::from_millis(renewal.ttl_ms), yields: renewal.should_yield })
        }
        _ => Err(Renewal::Failed("the answer to the renewal is of another kind".to_owned())),
    }
}

fn judge(core: &Core, error: v1::Error, link: u64) -> Renewal {
    let problem = Problem::from(error);
    match problem.code {
        Code::SessionExpired | Code::NotFound => return Renewal::Ended,
        Code::NoQuorum => core.client.leave(link),
        _ => {}
    }
    Renewal::Failed(problem.to_string())
}

/// A session as the service tells of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionInfo {
    /// The id.
    pub id: u64,
    /// Which incarnation of the id.
    pub token: u64,
    /// Its name for people.
    pub name: String,
    /// What its maker said about itself.
    pub metadata: BTreeMap<String, String>,
    /// What becomes of its keys.
    pub on_expire: OnExpire,
    /// The ttl, as granted.
    pub ttl: Duration,
    /// Until it may be ended, by the leader's count; zero if the answering member does not know.
    pub remaining: Duration,
    /// How long it has lived.
    pub age: Duration,
    /// It was made as a lease of etcd.
    pub lease: bool,
    /// How many keys, locks and places in queues it owns.
    pub owned_count: u64,
    /// Kind (`key`, `lock`, `waiter`), name and token of what it owns; empty in lists.
    pub owned: Vec<(&'static str, String, u64)>,
}

impl From<v1::Session> for SessionInfo {
    fn from(session: v1::Session) -> Self {
        let on_expire = match session.on_expire() {
            v1::OnExpire::Delete => OnExpire::Delete,
            v1::OnExpire::Release => OnExpire::Release,
        };
        Self {
            id: session.id,
            token: session.token,
            name: session.name,
            metadata: session.metadata,
            on_expire,
            ttl: Duration::from_millis(session.ttl_ms),
            remaining: Duration::from_millis(session.remaining_ms),
            age: Duration::from_millis(session.age_ms),
            lease: session.lease,
            owned_count: session.owned_count,
            owned: session.owned.into_iter().map(owned).collect(),
        }
    }
}

fn owned(thing: v1::Owned) -> (&'static str, String, u64) {
    let kind = match thing.kind() {
        v1::owned::Kind::Key => "key",
        v1::owned::Kind::Lock => "lock",
        v1::owned::Kind::Waiter => "waiter",
    };
    let name = if thing.name.is_empty() { thing.name_bytes.escape_ascii().to_string() } else { thing.name };
    (kind, name, thing.token)
}
