//! The registry of services: register an instance and keep it registered, find instances, and follow them in a local cache.
//!
//! Promises. A registration of this process is kept: its heartbeats are sent at a third of the TTL, and one that was deregistered meanwhile is made
//! again, unless somebody else took its place ([`Registered::replaced`]). A cache that lost its stream keeps what it knows and catches up.
//! Not promised. That an instance which is passing answers: callers want timeouts, and another one to go to.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tenure_wire::tenure::v1;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use v1::services_client::ServicesClient;

use crate::client::{Client, RETRY_MAX, RequestId, all_pages, tells_nothing_of_earlier_tries};
use crate::clock::millis;
use crate::error::{Code, Error, Outcome, of_read};
use crate::kv::carried_out;
use crate::pipeline::RECEIVE_BYTES;
use crate::requests;
use crate::session::Session;

const REGISTER: &str = "/tenure.v1.Services/Register";
const REGISTER_PLAN: &str = "register instance";
/// Of a registration that says nothing of its health.
const TTL_DEFAULT: Duration = Duration::from_secs(15);
/// How often a registration that is probed looks whether it is still there.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Longest pause between two tries to reach a member.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// How an instance is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Health {
    /// It takes callers.
    Passing,
    /// It works, and asks for attention or for less work.
    Warning,
    /// It does not work, or does not say that it does.
    Critical,
    /// It works, and wants no new callers.
    Draining,
    /// A newer service says something that this version does not know.
    Unknown,
}

impl Health {
    pub(crate) fn of(wire: i32) -> Self {
        match v1::Health::try_from(wire) {
            Ok(v1::Health::Passing) => Self::Passing,
            Ok(v1::Health::Warning) => Self::Warning,
            Ok(v1::Health::Critical) => Self::Critical,
            Ok(v1::Health::Draining) => Self::Draining,
            Ok(v1::Health::Unspecified) | Err(_) => Self::Unknown,
        }
    }

    pub(crate) fn wire(self) -> i32 {
        let wire = match self {
            Self::Passing => v1::Health::Passing,
            Self::Warning => v1::Health::Warning,
            Self::Critical => v1::Health::Critical,
            Self::Draining => v1::Health::Draining,
            Self::Unknown => v1::Health::Unspecified,
        };
        wire.into()
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Passing => "passing",
            Self::Warning => "warning",
            Self::Critical => "critical",
            Self::Draining => "draining",
            Self::Unknown => "unknown",
        })
    }
}

/// How the service finds out the health of an instance. The members of the cluster connect to the address that is registered.
///
/// ```
/// use std::time::Duration;
/// use tenure_client::ServiceCheck;
///
/// let check = ServiceCheck::http("/healthz").interval(Duration::from_secs(5)).failures_before_critical(2);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceCheck(v1::ServiceCheck);

impl ServiceCheck {
    fn of(kind: v1::service_check::Kind) -> Self {
        Self(v1::ServiceCheck { kind: Some(kind), ..Default::default() })
    }

    /// The instance tells at least this often that it lives.
    #[must_use]
    pub fn ttl(ttl: Duration) -> Self {
        Self::of(v1::service_check::Kind::TtlMs(millis(ttl)))
    }

    /// A GET of this path is answered with 2xx.
    #[must_use]
    pub fn http(path: impl Into<String>) -> Self {
        Self::of(v1::service_check::Kind::Http(v1::HttpProbe { path: path.into() }))
    }

    /// A connection opens.
    #[must_use]
    pub fn tcp() -> Self {
        Self::of(v1::service_check::Kind::Tcp(v1::TcpProbe {}))
    }

    /// `grpc.health.v1` says that this service is serving; an empty name is the server as a whole.
    #[must_use]
    pub fn grpc(service: impl Into<String>) -> Self {
        Self::of(v1::service_check::Kind::Grpc(v1::GrpcProbe { service: service.into() }))
    }

    /// Another port than that of the instance.
    #[must_use]
    pub fn port(mut self, port: u16) -> Self {
        self.0.port = port.into();
        self
    }

    /// 10 s unless told otherwise, at least 1 s.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.0.interval_ms = millis(interval);
        self
    }

    /// 5 s unless told otherwise.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.0.timeout_ms = millis(timeout);
        self
    }

    /// 3 unless told otherwise.
    #[must_use]
    pub fn failures_before_critical(mut self, failures: u32) -> Self {
        self.0.failures_before_critical = failures;
        self
    }

    /// 1 unless told otherwise.
    #[must_use]
    pub fn success_before_passing(mut self, successes: u32) -> Self {
        self.0.success_before_passing = successes;
        self
    }
}

/// One instance of a service.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceInstance {
    /// Its id.
    pub instance: String,
    /// Names the registration.
    pub token: u64,
    /// Where callers reach it.
    pub address: String,
    /// Zero where the address says it all.
    pub port: u32,
    /// What it said of itself, to be filtered by.
    pub tags: Vec<String>,
    /// What it said of itself.
    pub meta: BTreeMap<String, String>,
    /// Its share of the callers beside that of the others.
    pub weight: u32,
    /// How it is.
    pub health: Health,
    /// Why it is so.
    pub why: String,
    /// It is critical, and the guard of the service keeps it among those to call.
    pub kept: bool,
    /// The session with which it goes, or zero.
    pub session: u64,
    /// The revision of its last change.
    pub revision: u64,
}

impl From<v1::ServiceInstance> for ServiceInstance {
    fn from(wire: v1::ServiceInstance) -> Self {
        Self {
            health: Health::of(wire.health),
            instance: wire.instance,
            token: wire.token,
            address: wire.address,
            port: wire.port,
            tags: wire.tags,
            meta: wire.meta.into_iter().collect(),
            weight: wire.weight,
            why: wire.why,
            kept: wire.kept,
            session: wire.session,
            revision: wire.revision,
        }
    }
}

impl ServiceInstance {
    /// `address:port`, with brackets around an IPv6 address.
    #[must_use]
    pub fn authority(&self) -> String {
        match (self.port, self.address.contains(':')) {
            (0, _) => self.address.clone(),
            (port, true) => format!("[{}]:{port}", self.address),
            (port, false) => format!("{}:{port}", self.address),
        }
    }
}

/// The instances of a service at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceInstances {
    /// The revision of the last change; it never goes back.
    pub index: u64,
    /// So many turned critical together that the guard keeps them among the instances.
    pub guarded: bool,
    /// By id.
    pub instances: Vec<ServiceInstance>,
}

impl ServiceInstances {
    /// One of them, at random by their weights; `None` where there is none.
    #[must_use]
    pub fn pick(&self) -> Option<&ServiceInstance> {
        self.pick_where(|_| true)
    }

    /// One of those that are wanted, at random by their weights: such as any but the one that has just failed.
    #[must_use]
    pub fn pick_where(&self, wanted: impl Fn(&ServiceInstance) -> bool) -> Option<&ServiceInstance> {
        let all: u64 = self.instances.iter().filter(|one| wanted(one)).map(|one| u64::from(one.weight)).sum();
        let random = requests::uuid().map_or(0, |bytes| u64::from_le_bytes(std::array::from_fn(|n| bytes[n])));
        self.at(random.checked_rem(all)?, wanted)
    }

    fn at(&self, mut place: u64, wanted: impl Fn(&ServiceInstance) -> bool) -> Option<&ServiceInstance> {
        self.instances.iter().filter(|one| wanted(one)).find(|one| {
            let is_here = place < u64::from(one.weight);
            place = place.saturating_sub(one.weight.into());
            is_here
        })
    }
}

/// A service with how many instances of each health it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceSummary {
    /// Its name.
    pub service: String,
    /// The revision of the last change among its instances.
    pub index: u64,
    /// Instances that take callers.
    pub passing: u64,
    /// Instances that ask for attention.
    pub warning: u64,
    /// Instances that do not work.
    pub critical: u64,
    /// Instances that want no new callers.
    pub draining: u64,
    /// The guard; zero is none.
    pub guard_percent: u32,
    /// The guard keeps instances that turned critical together.
    pub guarded: bool,
}

impl From<v1::ServiceSummary> for ServiceSummary {
    fn from(wire: v1::ServiceSummary) -> Self {
        Self {
            service: wire.service,
            index: wire.index,
            passing: wire.passing,
            warning: wire.warning,
            critical: wire.critical,
            draining: wire.draining,
            guard_percent: wire.guard_percent,
            guarded: wire.guarded,
        }
    }
}

/// The registry, by way of a client; see [`Client::registry`].
#[derive(Clone, Debug)]
pub struct Registry {
    client: Client,
}

impl Client {
    /// The registry of services.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// let registry = client.registry();
    /// let registered = registry.register("billing", "billing-1", "10.0.0.7", 8080).tag("blue").await?;
    /// // Elsewhere: a cache that follows, and one of the instances by weight.
    /// let billing = registry.follow("billing").await?;
    /// if let Some(instance) = billing.now().pick() {
    ///     println!("call {}", instance.authority());
    /// }
    /// registered.drain().await?; // no new callers
    /// registered.deregister().await
    /// # }
    /// ```
    #[must_use]
    pub fn registry(&self) -> Registry {
        Registry { client: self.clone() }
    }
}

impl Registry {
    /// Registers an instance of a service at an address. Unless it is given a session or a check it has a TTL of 15 s. Its heartbeats are sent until
    /// the [`Registered`] is dropped, which deregisters it.
    #[must_use = "nothing is registered before .await"]
    pub fn register(
        &self,
        service: impl Into<String>,
        instance: impl Into<String>,
        address: impl Into<String>,
        port: u16,
    ) -> Registering<'_> {
        let request = v1::ServiceRegisterRequest {
            service: service.into(),
            instance: instance.into(),
            address: address.into(),
            port: port.into(),
            namespace: self.client.namespace(),
            ..Default::default()
        };
        Registering { client: &self.client, request }
    }

    /// Takes an instance out; false if it was not there. Token 0 means whichever registration there is.
    ///
    /// # Errors
    /// [`Code::Fenced`] if another registration is current.
    pub async fn deregister(
        &self,
        service: impl Into<String>,
        instance: impl Into<String>,
        token: u64,
    ) -> Result<bool, Error> {
        deregister(&self.client, service.into(), instance.into(), token).await
    }

    /// Tells that an instance with a TTL lives, and how it is; gives the health that callers see. Token 0 means whichever registration there is.
    ///
    /// # Errors
    /// [`Code::NotFound`] if it is not registered (any more), [`Code::Fenced`] if another registration is current.
    pub async fn heartbeat(
        &self,
        service: impl Into<String>,
        instance: impl Into<String>,
        token: u64,
        health: Health,
        why: impl Into<String>,
    ) -> Result<Health, Error> {
        let request = v1::ServiceHeartbeatRequest {
            service: service.into(),
            instance: instance.into(),
            token,
            health: health.wire(),
            why: why.into(),
            namespace: self.client.namespace(),
            request: None,
        };
        heartbeat(&self.client, &request).await
    }

    /// Has an instance told as draining: it wants no new callers. Token 0 means whichever registration there is.
    ///
    /// # Errors
    /// [`Code::NotFound`], [`Code::Fenced`].
    pub async fn drain(
        &self,
        service: impl Into<String>,
        instance: impl Into<String>,
        token: u64,
    ) -> Result<Health, Error> {
        drain(&self.client, service.into(), instance.into(), token, false).await
    }

    /// Ends draining. Token 0 means whichever registration there is.
    ///
    /// # Errors
    /// [`Code::NotFound`], [`Code::Fenced`].
    pub async fn undrain(
        &self,
        service: impl Into<String>,
        instance: impl Into<String>,
        token: u64,
    ) -> Result<Health, Error> {
        drain(&self.client, service.into(), instance.into(), token, true).await
    }

    /// Sets the guard of a service: when more than this share of its instances turn critical together, they are kept in answers. Zero: none.
    ///
    /// # Errors
    /// When the outcome is unknown, or the share is above 100.
    pub async fn guard(&self, service: impl Into<String>, percent: u32) -> Result<(), Error> {
        let request = v1::ServiceGuardRequest {
            service: service.into(),
            percent,
            namespace: self.client.namespace(),
            request: None,
        };
        let plan = self.client.plan("guard service", true);
        let _: v1::ServiceGuardReply = self.client.change(plan, "/tenure.v1.Services/Guard", &request).await?;
        Ok(())
    }

    /// All services by name.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn services(&self) -> Result<Vec<ServiceSummary>, Error> {
        let page = |after| async move {
            let namespace = self.client.namespace();
            let request = v1::ServiceListRequest { limit: 1_000, after, namespace, ..Default::default() };
            let ask = |channel| {
                let (mut services, request) = (services(channel), request.clone());
                async move { services.list(request).await }
            };
            let reply = self.client.read(ask).await?;
            Ok((reply.services.into_iter().map(ServiceSummary::from).collect(), reply.next))
        };
        all_pages(page).await
    }

    /// The instances of a service: those to call, unless told otherwise.
    ///
    /// ```no_run
    /// # async fn example(registry: tenure_client::Registry) -> Result<(), tenure_client::Error> {
    /// let blue = registry.find("billing").tag("blue").await?;
    /// println!("{} instances at index {}", blue.instances.len(), blue.index);
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing is asked before .await"]
    pub fn find(&self, service: impl Into<String>) -> Finding<'_> {
        Finding { client: &self.client, filter: Filter { service: service.into(), ..Filter::default() } }
    }

    /// The instances of a service in a cache that follows every change. Waits until it is filled.
    #[must_use = "nothing is followed before .await"]
    pub fn follow(&self, service: impl Into<String>) -> Following<'_> {
        Following { client: &self.client, filter: Filter { service: service.into(), ..Filter::default() } }
    }
}

// ---- Registering ----

/// A registration to be made; see [`Registry::register`].
#[derive(Clone, Debug)]
pub struct Registering<'a> {
    client: &'a Client,
    request: v1::ServiceRegisterRequest,
}

impl Registering<'_> {
    /// A word to filter by.
    #[must_use]
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.request.tags.push(tag.into());
        self
    }

    /// Anything else that callers want to know.
    #[must_use]
    pub fn meta(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.meta.insert(key.into(), value.into());
        self
    }

    /// Its share of the callers beside that of the others: 1 unless told otherwise.
    #[must_use]
    pub fn weight(mut self, weight: u32) -> Self {
        self.request.weight = weight;
        self
    }

    /// It goes with this session.
    #[must_use]
    pub fn session(mut self, session: &Session) -> Self {
        self.request.session = session.id();
        self
    }

    /// It goes with the session of this id.
    #[must_use]
    pub fn session_id(mut self, session: u64) -> Self {
        self.request.session = session;
        self
    }

    /// How its health is found out.
    #[must_use]
    pub fn check(mut self, check: ServiceCheck) -> Self {
        self.request.check = Some(check.0);
        self
    }

    /// After it was critical for so long it is deregistered: 10 minutes unless told otherwise, at least one.
    #[must_use]
    pub fn deregister_critical_after(mut self, after: Duration) -> Self {
        self.request.deregister_critical_after_ms = millis(after);
        self
    }

    /// Takes the place of this registration, whoever it is of.
    #[must_use]
    pub fn replace(mut self, token: u64) -> Self {
        self.request.replace_token = token;
        self
    }

    pub(crate) fn into_wire(self) -> v1::ServiceRegisterRequest {
        let mut request = self.request;
        if request.session == 0 && request.check.is_none() {
            request.check = Some(ServiceCheck::ttl(TTL_DEFAULT).0);
        }
        request
    }

    async fn run(self) -> Result<Registered, Error> {
        let client = self.client;
        let mut request = self.into_wire();
        let reply = register(client, &request).await?;
        // A later registration is made anew, whatever took the first one's place at the start.
        request.replace_token = 0;
        let ttl = request.check.as_ref().and_then(|check| match check.kind {
            Some(v1::service_check::Kind::TtlMs(ms)) => Some(Duration::from_millis(ms)),
            _ => None,
        });
        let core = Arc::new(Core {
            client: client.clone(),
            request,
            token: watch::Sender::new(reply.token),
            health: watch::Sender::new((Health::Passing, String::new())),
            replaced: watch::Sender::new(false),
            unanswered: Mutex::new(None),
        });
        // One under a session alone is there as long as that is.
        let keeper = match ttl {
            Some(ttl) => Some(tokio::spawn(keep(core.clone(), ttl / 3, true))),
            None if core.request.check.is_some() => Some(tokio::spawn(keep(core.clone(), LOOK_EVERY, false))),
            None => None,
        };
        Ok(Registered { core, keeper, leave_on_drop: AtomicBool::new(false) })
    }
}

carried_out!(Registering<'a> => Registered, run);

/// A registered instance of this process. When it is dropped it is deregistered in the background.
pub struct Registered {
    core: Arc<Core>,
    keeper: Option<JoinHandle<()>>,
    leave_on_drop: AtomicBool,
}

struct Core {
    client: Client,
    request: v1::ServiceRegisterRequest,
    token: watch::Sender<u64>,
    /// What heartbeats tell.
    health: watch::Sender<(Health, String)>,
    replaced: watch::Sender<bool>,
    /// The id of a registration that was made anew without an answer, and since when. Under the same id it is answered, and not made once more: nothing
    /// else tells it from one that somebody else made.
    unanswered: Mutex<Option<(Arc<RequestId>, Instant)>>,
}

impl fmt::Debug for Registered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registered")
            .field("service", &self.core.request.service)
            .field("instance", &self.core.request.instance)
            .field("token", &self.token())
            .finish()
    }
}

impl Registered {
    /// The service.
    #[must_use]
    pub fn service(&self) -> &str {
        &self.core.request.service
    }

    /// Its id.
    #[must_use]
    pub fn instance(&self) -> &str {
        &self.core.request.instance
    }

    /// Names the registration; a later one of the same instance has a larger token.
    #[must_use]
    pub fn token(&self) -> u64 {
        *self.core.token.borrow()
    }

    /// What the heartbeats tell from now on, the first of them at once. For a registration with a TTL.
    ///
    /// # Errors
    /// When the heartbeat is refused or its outcome is unknown; later ones tell the same.
    pub async fn set_health(&self, health: Health, why: impl Into<String>) -> Result<Health, Error> {
        let why = why.into();
        self.core.health.send_replace((health, why.clone()));
        heartbeat(&self.core.client, &self.core.beat(health, why)).await
    }

    /// Has it told as draining: no new callers.
    ///
    /// # Errors
    /// When it is refused or its outcome is unknown.
    pub async fn drain(&self) -> Result<Health, Error> {
        let request = &self.core.request;
        drain(&self.core.client, request.service.clone(), request.instance.clone(), self.token(), false).await
    }

    /// Ends draining.
    ///
    /// # Errors
    /// When it is refused or its outcome is unknown.
    pub async fn undrain(&self) -> Result<Health, Error> {
        let request = &self.core.request;
        drain(&self.core.client, request.service.clone(), request.instance.clone(), self.token(), true).await
    }

    /// Waits until somebody else has taken its place, which ends the keeping. One under a session alone does not look.
    pub async fn replaced(&self) {
        let mut replaced = self.core.replaced.subscribe();
        if replaced.wait_for(|replaced| *replaced).await.is_err() {
            // The sender lives as long as this does.
            std::future::pending().await
        }
    }

    /// Leaves it registered when this is dropped; its check or its session ends it then.
    pub fn leave_on_drop(&self) {
        self.leave_on_drop.store(true, Ordering::Relaxed);
    }

    /// Takes it out. One whose place somebody else took is left alone, which is no error.
    ///
    /// # Errors
    /// When the outcome is unknown.
    pub async fn deregister(self) -> Result<(), Error> {
        self.leave_on_drop();
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
        match self.core.leave().await {
            Err(error) if error.code() == Some(Code::Fenced) => Ok(()),
            result => result,
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
        if self.leave_on_drop.load(Ordering::Relaxed) {
            return;
        }
        let core = self.core.clone();
        // Outside of a runtime nothing can be sent: its check or its session ends it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { core.leave().await });
        }
    }
}

impl Core {
    fn beat(&self, health: Health, why: String) -> v1::ServiceHeartbeatRequest {
        v1::ServiceHeartbeatRequest {
            service: self.request.service.clone(),
            instance: self.request.instance.clone(),
            token: *self.token.borrow(),
            health: health.wire(),
            why,
            namespace: self.client.namespace(),
            request: None,
        }
    }

    /// One heartbeat; registers anew what was deregistered. False when somebody else is registered in its place.
    async fn tell(&self) -> Result<bool, Error> {
        if !self.is_settled().await? {
            return Ok(false);
        }
        let (health, why) = self.health.borrow().clone();
        match heartbeat(&self.client, &self.beat(health, why.clone())).await {
            Ok(_) => return Ok(true),
            Err(error) if error.code() == Some(Code::NotFound) => {}
            Err(error) if error.code() == Some(Code::Fenced) => return Ok(false),
            Err(error) => return Err(error),
        }
        let is_ours = self.again().await?;
        if is_ours && health != Health::Passing {
            heartbeat(&self.client, &self.beat(health, why)).await?;
        }
        Ok(is_ours)
    }

    /// Registers anew if it is not registered any more. False when somebody else is registered in its place.
    async fn look(&self) -> Result<bool, Error> {
        if !self.is_settled().await? {
            return Ok(false);
        }
        let found = self.client.registry().find(&self.request.service).all().await?;
        match found.instances.iter().find(|one| one.instance == self.request.instance) {
            Some(one) => Ok(one.token == *self.token.borrow()),
            None => self.again().await,
        }
    }

    async fn again(&self) -> Result<bool, Error> {
        let earlier = self.unanswered();
        let is_first = earlier.is_none();
        let id = match earlier {
            Some(id) => id,
            None => Arc::new(self.client.request_id()?),
        };
        if is_first {
            // Before it is sent: who waits for the answer may be dropped.
            self.note_unanswered(Some((id.clone(), Instant::now())));
        }
        let plan = self.client.plan(REGISTER_PLAN, true);
        let result: Result<v1::ServiceRegisterReply, _> =
            self.client.change_as(&id, plan, REGISTER, &self.request).await;
        let is_judged = match &result {
            Ok(_) => true,
            Err(error) if is_first => error.outcome() == Outcome::NotApplied,
            Err(error) => error.code().is_some_and(|code| !tells_nothing_of_earlier_tries(code)),
        };
        if is_judged {
            self.note_unanswered(None);
        }
        match result {
            Ok(reply) => {
                self.token.send_replace(reply.token);
                Ok(true)
            }
            Err(error) if error.code() == Some(Code::Held) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Has a registration answered that was not. False when somebody else is registered in its place.
    async fn is_settled(&self) -> Result<bool, Error> {
        if self.unanswered().is_some() { self.again().await } else { Ok(true) }
    }

    fn unanswered(&self) -> Option<Arc<RequestId>> {
        let mut unanswered = self.unanswered.lock().unwrap_or_else(PoisonError::into_inner);
        // Later it may be forgotten, and would be made once more.
        unanswered.take_if(|(_, since)| since.elapsed() >= RETRY_MAX);
        unanswered.as_ref().map(|(id, _)| id.clone())
    }

    fn note_unanswered(&self, id: Option<(Arc<RequestId>, Instant)>) {
        *self.unanswered.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    async fn leave(&self) -> Result<(), Error> {
        match self.is_settled().await {
            Ok(false) => return Ok(()),
            Err(error) if error.code().is_none() => return Err(error),
            _ => {}
        }
        let (service, instance, token) = (&self.request.service, &self.request.instance, *self.token.borrow());
        deregister(&self.client, service.clone(), instance.clone(), token).await.map(drop)
    }
}

/// Keeps a registration until it is dropped or somebody else's.
async fn keep(core: Arc<Core>, every: Duration, beats: bool) {
    loop {
        sleep(every).await;
        let telling = async { if beats { core.tell().await } else { core.look().await } };
        match timeout(every, telling).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => {
                core.replaced.send_replace(true);
                return;
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, instance = core.request.instance, "a registration could not be kept")
            }
            Err(_) => tracing::warn!(instance = core.request.instance, "no answer in time to a registration"),
        }
    }
}

async fn register(client: &Client, request: &v1::ServiceRegisterRequest) -> Result<v1::ServiceRegisterReply, Error> {
    client.change(client.plan(REGISTER_PLAN, true), REGISTER, request).await
}

async fn deregister(client: &Client, service: String, instance: String, token: u64) -> Result<bool, Error> {
    let (namespace, request) = (client.namespace(), None);
    let request = v1::ServiceDeregisterRequest { service, instance, token, namespace, request };
    let plan = client.plan("deregister instance", true);
    let reply: v1::ServiceDeregisterReply = client.change(plan, "/tenure.v1.Services/Deregister", &request).await?;
    Ok(reply.deregistered)
}

async fn heartbeat(client: &Client, request: &v1::ServiceHeartbeatRequest) -> Result<Health, Error> {
    let plan = client.plan("heartbeat", true);
    let reply: v1::ServiceHeartbeatReply = client.change(plan, "/tenure.v1.Services/Heartbeat", request).await?;
    Ok(Health::of(reply.health))
}

async fn drain(client: &Client, service: String, instance: String, token: u64, undo: bool) -> Result<Health, Error> {
    let (namespace, request) = (client.namespace(), None);
    let request = v1::ServiceDrainRequest { service, instance, token, undo, namespace, request };
    let plan = client.plan("drain instance", true);
    let reply: v1::ServiceDrainReply = client.change(plan, "/tenure.v1.Services/Drain", &request).await?;
    Ok(Health::of(reply.health))
}

// ---- Finding ----

#[derive(Clone, Debug, Default)]
struct Filter {
    service: String,
    health: Vec<i32>,
    tags: Vec<String>,
    all: bool,
}

macro_rules! filters {
    ($name:ident) => {
        impl $name<'_> {
            /// Only those with this tag, and every other one that is named so.
            #[must_use]
            pub fn tag(mut self, tag: impl Into<String>) -> Self {
                self.filter.tags.push(tag.into());
                self
            }

            /// Only those of this health, and of every other one that is named so, instead of those to call.
            #[must_use]
            pub fn health(mut self, health: Health) -> Self {
                self.filter.health.push(health.wire());
                self
            }

            /// Whatever their health.
            #[must_use]
            pub fn all(mut self) -> Self {
                self.filter.all = true;
                self
            }
        }
    };
}

/// A look at the instances of a service; see [`Registry::find`].
#[derive(Clone, Debug)]
pub struct Finding<'a> {
    client: &'a Client,
    filter: Filter,
}

filters!(Finding);

impl Finding<'_> {
    async fn run(self) -> Result<ServiceInstances, Error> {
        let Filter { service, health, tags, all } = self.filter;
        let namespace = self.client.namespace();
        let request = v1::ServiceGetRequest { service, health, tags, all, namespace, ..Default::default() };
        let ask = |channel| {
            let (mut services, request) = (services(channel), request.clone());
            async move { services.get(request).await }
        };
        let reply = self.client.read(ask).await?;
        let instances = reply.instances.into_iter().map(ServiceInstance::from).collect();
        Ok(ServiceInstances { index: reply.index, guarded: reply.guarded, instances })
    }
}

carried_out!(Finding<'a> => ServiceInstances, run);

/// A cache to be filled; see [`Registry::follow`].
#[derive(Clone, Debug)]
pub struct Following<'a> {
    client: &'a Client,
    filter: Filter,
}

filters!(Following);

impl Following<'_> {
    async fn run(self) -> Result<ServiceCache, Error> {
        let time = self.client.timeout();
        let opening = open_anywhere(self.client, &self.filter);
        let late = |_| Err(Error::Unavailable { why: "no answer in time".to_owned() });
        let (state, stream) = timeout(time, opening).await.unwrap_or_else(late)?;
        let now = watch::Sender::new(Arc::new(state.shown()));
        let receiver = now.subscribe();
        let task = tokio::spawn(follow(self.client.clone(), self.filter, state, stream, now));
        Ok(ServiceCache { now: receiver, task })
    }
}

carried_out!(Following<'a> => ServiceCache, run);

/// The instances of a service, kept current by a task. Dropping it ends that.
///
/// ```no_run
/// # async fn example(registry: tenure_client::Registry) -> Result<(), tenure_client::Error> {
/// let mut billing = registry.follow("billing").await?;
/// loop {
///     println!("{} to call", billing.now().instances.len());
///     billing.changed().await;
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct ServiceCache {
    now: watch::Receiver<Arc<ServiceInstances>>,
    task: JoinHandle<()>,
}

impl ServiceCache {
    /// What is known now; while no member can be reached, what was known last.
    #[must_use]
    pub fn now(&self) -> Arc<ServiceInstances> {
        self.now.borrow().clone()
    }

    /// Waits until something has changed since the last call of this.
    pub async fn changed(&mut self) {
        if self.now.changed().await.is_err() {
            // The task ends with this cache only.
            std::future::pending().await
        }
    }
}

impl Drop for ServiceCache {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Answers = tonic::Streaming<v1::ServiceWatchReply>;

#[derive(Default)]
struct State {
    index: u64,
    guarded: bool,
    instances: BTreeMap<String, ServiceInstance>,
}

impl State {
    fn take(&mut self, answer: v1::ServiceWatchReply) {
        if answer.whole {
            self.instances.clear();
        }
        for id in answer.removed {
            self.instances.remove(&id);
        }
        for one in answer.instances {
            self.instances.insert(one.instance.clone(), one.into());
        }
        (self.index, self.guarded) = (answer.index, answer.guarded);
    }

    fn shown(&self) -> ServiceInstances {
        let instances = self.instances.values().cloned().collect();
        ServiceInstances { index: self.index, guarded: self.guarded, instances }
    }
}

/// Follows over reconnects.
async fn follow(
    client: Client,
    filter: Filter,
    mut state: State,
    mut stream: Answers,
    now: watch::Sender<Arc<ServiceInstances>>,
) {
    loop {
        while let Ok(Some(answer)) = stream.message().await {
            state.take(answer);
            now.send_replace(Arc::new(state.shown()));
        }
        (state, stream) = loop {
            match open_anywhere(&client, &filter).await {
                Ok(opened) => break opened,
                // It was accepted once, so what refuses it now will pass.
                Err(error) => tracing::warn!(%error, service = filter.service, "instances cannot be followed"),
            }
            sleep(PAUSE_MAX).await;
        };
        now.send_replace(Arc::new(state.shown()));
    }
}

/// Asks each endpoint in turn until one answers, for as long as it takes.
async fn open_anywhere(client: &Client, filter: &Filter) -> Result<(State, Answers), Error> {
    let mut pause = Duration::from_millis(20);
    loop {
        for (number, channel) in client.channels_in_turn() {
            match open(client, channel, filter).await {
                Ok(opened) => {
                    client.served_by(number);
                    return Ok(opened);
                }
                Err(Error::Unavailable { .. }) => {}
                Err(error) if error.code() == Some(Code::NoQuorum) => {}
                Err(error) => return Err(error),
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// The stream, with its first answer.
async fn open(client: &Client, channel: Channel, filter: &Filter) -> Result<(State, Answers), Error> {
    let Filter { service, health, tags, all } = filter.clone();
    let request = v1::ServiceWatchRequest { service, health, tags, all, namespace: client.namespace() };
    let silent = || Error::Unavailable { why: "no answer in time".to_owned() };
    let opening = async {
        let mut stream = services(channel).watch(request).await.map_err(|status| of_read(&status))?.into_inner();
        let first = stream.message().await.map_err(|status| of_read(&status))?.ok_or_else(silent)?;
        let mut state = State::default();
        state.take(first);
        Ok((state, stream))
    };
    timeout(client.share(), opening).await.unwrap_or_else(|_| Err(silent()))
}

fn services(channel: Channel) -> ServicesClient<Channel> {
    ServicesClient::new(channel).max_decoding_message_size(RECEIVE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(id: &str, weight: u32) -> v1::ServiceInstance {
        v1::ServiceInstance { instance: id.to_owned(), weight, ..Default::default() }
    }

    #[test]
    fn weights_are_shares() {
        let mut state = State::default();
        let instances = vec![instance("a", 1), instance("b", 3)];
        state.take(v1::ServiceWatchReply { whole: true, instances, ..Default::default() });
        let shown = state.shown();
        let at = |place| shown.at(place, |_| true).map(|one| one.instance.as_str());
        assert_eq!([at(0), at(1), at(3), at(4)], [Some("a"), Some("b"), Some("b"), None]);
        assert_eq!(shown.pick_where(|one| one.instance != "b").unwrap().instance, "a");
        assert_eq!(shown.pick_where(|_| false), None);
        assert_eq!(ServiceInstances::default().pick(), None);
    }

    #[test]
    fn a_whole_answer_replaces_what_was_known() {
        let mut state = State::default();
        let ids = |state: &State| state.instances.keys().cloned().collect::<Vec<_>>().join(" ");
        let instances = vec![instance("a", 1), instance("b", 1)];
        state.take(v1::ServiceWatchReply { whole: true, index: 5, instances, ..Default::default() });
        let removed = vec!["a".to_owned()];
        state.take(v1::ServiceWatchReply {
            index: 6,
            removed,
            instances: vec![instance("c", 1)],
            ..Default::default()
        });
        assert_eq!(ids(&state), "b c");
        state.take(v1::ServiceWatchReply {
            whole: true,
            index: 9,
            instances: vec![instance("d", 1)],
            ..Default::default()
        });
        assert_eq!((ids(&state).as_str(), state.index), ("d", 9));
    }
}
