//! Native services: register, deregister, heartbeat, drain, guard, look, wait, follow.
//!
//! Promises. A look and a stream show the same instances under the same filter. A stream begins with the whole and every answer of it is the state at one
//! revision; what comes between two answers may be left out, the newest is not.
//! Relies on. The state machine for every rule; `follow.rs` for what changes; `checks.rs` for the probes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tenure_machine::{
    ActiveCheck, Check, Drain, Health, Heartbeat, Instance, InstanceRef, InstanceSpec, Machine, NamespaceId, OpReply,
    Probe, Register, RegisteredInstance, RegistryChange, RegistryChanged, RegistryOp, RegistryReply, Revision, Service,
    ServiceGuard, ServiceInfo, Stored, Txn,
};
use tenure_wire::tenure::v1;
use tokio::time::Instant;

use super::sessions::{native_unary, page_limit, query};
use super::{
    Caller, Refused, change, decoded, look, mixed_up, namespace, refusal, refuse, reply_of, seen, session_id, txn_of,
};
use crate::Context;
use crate::driver::{Failure, View};
use crate::follow::{Followed, Follower, things};
use crate::rpc::{Call, Code, Incoming, Outgoing, Router, Status};
use crate::status::{self as words, Kind};

const NAME_BYTES_MAX: usize = 255;
const INTERVAL_MS: u64 = 10_000;
const TIMEOUT_MS: u64 = 5_000;
const FAILURES: u32 = 3;
const DEREGISTER_MS: u64 = 600_000;
const WAIT_MAX_MS: u64 = 20_000;
/// A long poll and a stream have nothing to say of other services' revisions.
const QUIET: Duration = Duration::from_secs(60);

pub(crate) fn mount(router: &mut Router, context: &Context) {
    change(router, context, "/tenure.v1.Services/Register", plan_register, |_, _, changed| {
        let RegistryReply::Registered(registration) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::ServiceRegisterReply {
            header: Some(changed.header),
            token: registration.token.0,
            health: shown_health(registration.health).into(),
            unchanged: registration.same,
        })
    });
    change(router, context, "/tenure.v1.Services/Deregister", plan_deregister, |_, _, changed| {
        let RegistryReply::Deregistered(deregistered) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::ServiceDeregisterReply { header: Some(changed.header), deregistered })
    });
    change(router, context, "/tenure.v1.Services/Heartbeat", plan_heartbeat, |_, _, changed| {
        let health = noted(changed.reply)?;
        Ok(v1::ServiceHeartbeatReply { header: Some(changed.header), health })
    });
    change(router, context, "/tenure.v1.Services/Drain", plan_drain, |_, _, changed| {
        let health = noted(changed.reply)?;
        Ok(v1::ServiceDrainReply { header: Some(changed.header), health })
    });
    change(router, context, "/tenure.v1.Services/Guard", plan_guard, |_, _, changed| {
        Ok(v1::ServiceGuardReply { header: Some(changed.header) })
    });
    look(router, context, "/tenure.v1.Services/List", |request| request.stale, list);
    native_unary(router, context, "/tenure.v1.Services/Get", get);
    let context = context.clone();
    router.stream("/tenure.v1.Services/Watch", move |call, incoming, outgoing| {
        watch(context.clone(), call, incoming, outgoing)
    });
}

fn noted(reply: OpReply) -> Result<i32, Refused> {
    match reply_of(reply)? {
        RegistryReply::Noted(health) => Ok(shown_health(health).into()),
        _ => Err(mixed_up()),
    }
}

// ---- Changes ----

fn plan_register(_: &Context, caller: &Caller, request: &v1::ServiceRegisterRequest) -> Result<Txn, Refused> {
    let op = RegistryOp::Register(Box::new(Register {
        service: name("service", &request.service)?,
        instance: name("instance", &request.instance)?,
        spec: Box::new(spec(request)?),
        replaces: Revision(request.replace_token),
    }));
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_deregister(_: &Context, caller: &Caller, request: &v1::ServiceDeregisterRequest) -> Result<Txn, Refused> {
    let op = RegistryOp::Deregister(named(&request.service, &request.instance, request.token)?);
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_heartbeat(_: &Context, caller: &Caller, request: &v1::ServiceHeartbeatRequest) -> Result<Txn, Refused> {
    let health = match read_health("health", request.health)? {
        None => Health::Passing,
        Some(Health::Draining) => return Err(refuse("health", "draining is a call of its own")),
        Some(health) => health,
    };
    let of = named(&request.service, &request.instance, request.token)?;
    if request.why.len() > 512 {
        return Err(refuse("why", "the reason of a health has at most 512 bytes"));
    }
    let op = RegistryOp::Heartbeat(Heartbeat { of, health, why: request.why.as_str().into() });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_drain(_: &Context, caller: &Caller, request: &v1::ServiceDrainRequest) -> Result<Txn, Refused> {
    let of = named(&request.service, &request.instance, request.token)?;
    let op = RegistryOp::Drain(Drain { of, draining: !request.undo });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_guard(_: &Context, caller: &Caller, request: &v1::ServiceGuardRequest) -> Result<Txn, Refused> {
    if request.percent > 100 {
        return Err(refuse("percent", "the guard is a share of 0 to 100 percent"));
    }
    let op = RegistryOp::Guard(ServiceGuard { service: name("service", &request.service)?, percent: request.percent });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn named(service: &str, instance: &str, token: u64) -> Result<InstanceRef, Refused> {
    let (service, instance) = (name("service", service)?, name("instance", instance)?);
    Ok(InstanceRef { service, instance, token: Revision(token) })
}

/// An instance as a compare of a transaction asks for it.
pub(super) fn registered(asked: &v1::RegisteredInstance) -> Result<RegisteredInstance, Refused> {
    let wanted = |health: &i32| {
        let known = read_health("compares.registered.health", *health)?;
        known.ok_or_else(|| refuse("compares.registered.health", "there is no such health"))
    };
    let service = name("compares.registered.service", &asked.service)?;
    let instance = name("compares.registered.instance", &asked.instance)?;
    let of = InstanceRef { service, instance, token: Revision(asked.token) };
    Ok(RegisteredInstance { of, health: asked.health.iter().map(wanted).collect::<Result<_, _>>()? })
}

fn name(field: &str, name: &str) -> Result<Box<str>, Refused> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(char::is_control) {
        return Err(refuse(field, format!("a name has 1 to {NAME_BYTES_MAX} bytes and no control characters")));
    }
    Ok(name.into())
}

fn spec(request: &v1::ServiceRegisterRequest) -> Result<InstanceSpec, Refused> {
    let address = &request.address;
    if address.is_empty() || address.len() > NAME_BYTES_MAX || address.contains(|c: char| c.is_control() || c == ' ') {
        return Err(refuse("address", "the name or address where callers reach the instance, of 1 to 255 bytes"));
    }
    port("port", request.port)?;
    let tags: usize = request.tags.iter().map(String::len).sum();
    if request.tags.len() > 64 || tags > 8 << 10 {
        return Err(refuse("tags", "an instance has at most 64 tags, of 8 KiB together"));
    }
    let meta: usize = request.meta.iter().map(|(key, value)| key.len() + value.len()).sum();
    if request.meta.len() > 64 || meta > 8 << 10 {
        return Err(refuse("meta", "an instance has at most 64 entries of metadata, of 8 KiB together"));
    }
    let check = check(request.check.as_ref(), request.port)?;
    if request.session == 0 && check == Check::None {
        return Err(refuse("check", "name a session or a check: nothing else would tell that the instance is gone"));
    }
    let after = request.deregister_critical_after_ms;
    Ok(InstanceSpec {
        address: address.as_str().into(),
        port: request.port,
        tags: request.tags.iter().map(|tag| tag.as_str().into()).collect(),
        meta: request.meta.iter().map(|(key, value)| (key.as_str().into(), value.as_str().into())).collect(),
        weight: bounded("weight", request.weight.into(), 1, 1..=65_535)? as u32,
        session: session_id("session", request.session)?,
        check,
        deregister_after_ms: bounded("deregister_critical_after_ms", after, DEREGISTER_MS, 60_000..=2_592_000_000)?,
    })
}

fn check(check: Option<&v1::ServiceCheck>, instance_port: u32) -> Result<Check, Refused> {
    use v1::service_check::Kind;
    let Some(check) = check else { return Ok(Check::None) };
    let probe = match &check.kind {
        None => return Err(refuse("check", "say how: `ttl_ms`, `http`, `tcp` or `grpc`")),
        Some(Kind::TtlMs(ms)) => {
            let is_probe = check.port != 0 || check.interval_ms != 0 || check.timeout_ms != 0;
            if is_probe || check.failures_before_critical != 0 || check.success_before_passing != 0 {
                return Err(refuse("check", "a check with `ttl_ms` probes nothing"));
            }
            return Ok(Check::Ttl(bounded("check.ttl_ms", *ms, 0, 1_000..=86_400_000)?));
        }
        Some(Kind::Http(http)) => Probe::Http(path(&http.path)?),
        Some(Kind::Tcp(_)) => Probe::Tcp,
        Some(Kind::Grpc(grpc)) if grpc.service.len() > NAME_BYTES_MAX => {
            return Err(refuse("check.grpc.service", "the name of the service has at most 255 bytes"));
        }
        Some(Kind::Grpc(grpc)) => Probe::Grpc(grpc.service.as_str().into()),
    };
    port("check.port", check.port)?;
    if check.port == 0 && instance_port == 0 {
        return Err(refuse("check.port", "neither the check nor the instance says which port to probe"));
    }
    let results = |field, said: u32, default| Ok::<_, Refused>(bounded(field, said.into(), default, 1..=100)? as u32);
    Ok(Check::Active(ActiveCheck {
        probe,
        port: check.port,
        interval_ms: bounded("check.interval_ms", check.interval_ms, INTERVAL_MS, 1_000..=86_400_000)?,
        timeout_ms: bounded("check.timeout_ms", check.timeout_ms, TIMEOUT_MS, 10..=60_000)?,
        failures_before_critical: results(
            "check.failures_before_critical",
            check.failures_before_critical,
            FAILURES.into(),
        )?,
        success_before_passing: results("check.success_before_passing", check.success_before_passing, 1)?,
    }))
}

fn path(path: &str) -> Result<Box<str>, Refused> {
    let path = if path.is_empty() { "/" } else { path };
    let is_good = path.starts_with('/') && path.len() <= 1024 && path.bytes().all(|byte| byte.is_ascii_graphic());
    if is_good { Ok(path.into()) } else { Err(refuse("check.http.path", "a path begins with `/` and has no spaces")) }
}

fn port(field: &str, port: u32) -> Result<(), Refused> {
    if port <= 65_535 { Ok(()) } else { Err(refuse(field, "a port is at most 65535")) }
}

/// A number in its range, or the default for zero.
fn bounded(field: &str, said: u64, default: u64, range: std::ops::RangeInclusive<u64>) -> Result<u64, Refused> {
    let number = if said == 0 { default } else { said };
    let refused = || refuse(field, format!("it is between {} and {}", range.start(), range.end()));
    if range.contains(&number) { Ok(number) } else { Err(refused()) }
}

fn read_health(field: &str, health: i32) -> Result<Option<Health>, Refused> {
    match v1::Health::try_from(health) {
        Ok(v1::Health::Unspecified) => Ok(None),
        Ok(v1::Health::Passing) => Ok(Some(Health::Passing)),
        Ok(v1::Health::Warning) => Ok(Some(Health::Warning)),
        Ok(v1::Health::Critical) => Ok(Some(Health::Critical)),
        Ok(v1::Health::Draining) => Ok(Some(Health::Draining)),
        Err(_) => Err(refuse(field, "there is no such health")),
    }
}

// ---- Looks ----

fn list(view: &View<'_>, request: &v1::ServiceListRequest) -> Result<v1::ServiceListReply, Refused> {
    let (namespace, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let after = Some(request.after.as_str()).filter(|after| !after.is_empty());
    let services: Vec<_> = view.machine.services(namespace, after, max).iter().map(summary).collect();
    let next = services.last().filter(|_| services.len() == max).map_or_else(String::new, |last| last.service.clone());
    Ok(v1::ServiceListReply { header: seen(view, request.stale), services, next })
}

fn summary(info: &ServiceInfo) -> v1::ServiceSummary {
    v1::ServiceSummary {
        service: info.name.to_string(),
        index: info.index.0,
        passing: info.counts.passing,
        warning: info.counts.warning,
        critical: info.counts.critical,
        draining: info.counts.draining,
        guard_percent: info.guard_percent,
        guarded: info.guarded.is_some(),
    }
}

/// Whose instances are asked for, and which.
#[derive(Clone)]
struct Filter {
    namespace: NamespaceId,
    service: Box<str>,
    /// Empty: those to call.
    health: Vec<Health>,
    tags: Vec<Box<str>>,
    all: bool,
}

impl Filter {
    fn new((space, service): (&str, &str), healths: &[i32], tags: &[String], all: bool) -> Result<Self, Refused> {
        let mut health = Vec::new();
        for said in healths {
            health.push(read_health("health", *said)?.ok_or_else(|| refuse("health", "there is no such health"))?);
        }
        if all && !health.is_empty() {
            return Err(refuse("all", "either all of them or those of a health"));
        }
        if tags.len() > 64 {
            return Err(refuse("tags", "an instance has at most 64 tags"));
        }
        let (namespace, service) = (namespace(space)?, name("service", service)?);
        Ok(Self { namespace, service, health, tags: tags.iter().map(|tag| tag.as_str().into()).collect(), all })
    }

    fn admits(&self, instance: &Instance, kept: bool) -> bool {
        let health = instance.health();
        let is_wanted = match self.health.as_slice() {
            [] => self.all || kept || matches!(health, Health::Passing | Health::Warning),
            wanted => wanted.contains(&health),
        };
        is_wanted && self.tags.iter().all(|tag| instance.spec.tags.contains(tag))
    }
}

/// A service as one query sees it.
struct Seen {
    index: Revision,
    info: Option<ServiceInfo>,
    instances: Vec<v1::ServiceInstance>,
}

impl Seen {
    fn of(machine: &Machine, filter: &Filter) -> Self {
        let info = machine.service(filter.namespace, &filter.service);
        let all = machine.instances(filter.namespace, &filter.service, None, usize::MAX);
        let wanted = all.into_iter().filter(|(_, instance, kept)| filter.admits(instance, *kept));
        Self {
            // Nothing is known of it, so nothing of it is newer than this.
            index: info.as_ref().map_or(machine.revision(), |info| info.index),
            info,
            instances: wanted.map(|(id, instance, kept)| shown(&id, instance, kept)).collect(),
        }
    }
}

async fn get(context: Context, request: v1::ServiceGetRequest) -> Result<v1::ServiceGetReply, Refused> {
    let of = (request.namespace.as_str(), request.service.as_str());
    let filter = Filter::new(of, &request.health, &request.tags, request.all)?;
    if request.wait_ms > WAIT_MAX_MS {
        return Err(refuse("wait_ms", format!("a wait has at most {WAIT_MAX_MS} ms")));
    }
    if request.wait_ms > 0 && request.stale {
        return Err(refuse("stale", "a wait is for what is new"));
    }
    let deadline = Instant::now() + Duration::from_millis(request.wait_ms);
    if request.wait_ms > 0 {
        let _place = context.stream_place()?;
        wait(&context, &filter, Revision(request.after), deadline).await?;
    }
    let look = move |view: &View<'_>| (Seen::of(view.machine, &filter), seen(view, request.stale));
    let (found, header) = query(&context, request.stale, look).await?;
    Ok(v1::ServiceGetReply {
        header,
        index: found.index.0,
        guarded: found.info.as_ref().is_some_and(|info| info.guarded.is_some()),
        guard_percent: found.info.map_or(0, |info| info.guard_percent),
        instances: found.instances,
    })
}

/// Waits until the service has changed after a revision, or until then.
async fn wait(context: &Context, filter: &Filter, after: Revision, deadline: Instant) -> Result<(), Refused> {
    let own = filter.clone();
    let (index, at) = query(context, false, move |view| {
        let known = view.machine.service(own.namespace, &own.service);
        (known.map_or(Revision(0), |info| info.index), view.machine.revision())
    })
    .await?;
    if index > after {
        return Ok(());
    }
    // Of the service itself, which changes with each of its instances.
    let mut follower = Follower::new(&context.handle, service_span(filter), at.next(), QUIET);
    let changed = async {
        while let Followed::Through(_) = follower.next().await? {}
        Ok::<_, Failure>(())
    };
    match tokio::time::timeout_at(deadline, changed).await {
        Err(_) | Ok(Ok(())) => Ok(()),
        Ok(Err(failure)) => Err(Box::new(words::native_failure(&failure, Kind::Read))),
    }
}

fn service_span(filter: &Filter) -> tenure_machine::Span {
    things(filter.namespace, Service::KIND, filter.service.as_bytes(), false)
}

fn instances_span(filter: &Filter) -> tenure_machine::Span {
    let mut prefix = filter.service.as_bytes().to_vec();
    prefix.push(0);
    things(filter.namespace, Instance::KIND, &prefix, true)
}

// ---- The stream ----

async fn watch(context: Context, _: Call, mut incoming: Incoming, outgoing: Outgoing) -> Result<(), Status> {
    let Some(message) = incoming.next().await else { return Err(Status::invalid_argument("no request came")) };
    let request: v1::ServiceWatchRequest = decoded(message?).map_err(refusal)?;
    let of = (request.namespace.as_str(), request.service.as_str());
    let filter = Filter::new(of, &request.health, &request.tags, request.all).map_err(refusal)?;
    let _place = context.stream_place().map_err(refusal)?;
    let gone = || Status::new(Code::Cancelled, "the caller no longer listens");
    let told = async {
        loop {
            let (mut followed, first) = Watched::begin(&context, &filter).await.map_err(refusal)?;
            outgoing.send(encoded(&first)).await.map_err(|_| gone())?;
            while let Some(answer) = followed.next().await.map_err(|failure| failed(&failure))? {
                outgoing.send(encoded(&answer)).await.map_err(|_| gone())?;
            }
            // What comes next is no longer kept: all of it again.
        }
    };
    tokio::select! {
        ended = told => ended,
        () = outgoing.closed() => Err(gone()),
    }
}

fn encoded(answer: &v1::ServiceWatchReply) -> bytes::Bytes {
    prost::Message::encode_to_vec(answer).into()
}

fn failed(failure: &Failure) -> Status {
    refusal(Box::new(words::native_failure(failure, Kind::Read)))
}

/// One stream: what is there, and what was told of it.
struct Watched {
    filter: Filter,
    instances: BTreeMap<Box<str>, Box<Instance>>,
    service: Option<Service>,
    /// Ids that the caller knows of, and whether as kept ones.
    told: BTreeMap<Box<str>, bool>,
    guarded: bool,
    /// Of the service, which changes with each of its instances; woken by this one alone.
    services: Follower,
    changes: Follower,
}

impl Watched {
    async fn begin(context: &Context, filter: &Filter) -> Result<(Self, v1::ServiceWatchReply), Refused> {
        let own = filter.clone();
        let (at, index, service, instances) = query(context, false, move |view| {
            let machine = view.machine;
            let service = machine.object::<Service>(own.namespace, own.service.as_bytes()).cloned();
            let all = machine.instances(own.namespace, &own.service, None, usize::MAX);
            let all: BTreeMap<_, _> = all.into_iter().map(|(id, one, _)| (id, Box::new(one.clone()))).collect();
            let index = service.as_ref().map_or(machine.revision(), |service| service.index);
            (machine.revision(), index, service, all)
        })
        .await?;
        let follow = |span| Follower::new(&context.handle, span, at.next(), QUIET);
        let mut watched = Self {
            filter: filter.clone(),
            instances,
            service,
            told: BTreeMap::new(),
            guarded: false,
            services: follow(service_span(filter)),
            changes: follow(instances_span(filter)),
        };
        let changed = watched.instances.keys().cloned().collect();
        let answer = watched.tell(changed);
        Ok((watched, v1::ServiceWatchReply { index: index.0, whole: true, ..answer }))
    }

    /// What has changed of what the caller sees; `None` when something was missed.
    async fn next(&mut self) -> Result<Option<v1::ServiceWatchReply>, Failure> {
        loop {
            let mut at = match self.services.next().await? {
                Followed::Through(_) => continue,
                Followed::Gone(_) => return Ok(None),
                Followed::Changes(changes) => self.note_service(&changes),
            };
            let mut changed = BTreeSet::new();
            loop {
                match self.changes.try_next().await? {
                    None => break,
                    Some(Followed::Through(_)) => {}
                    Some(Followed::Gone(_)) => return Ok(None),
                    Some(Followed::Changes(changes)) => self.note_instances(&changes, &mut changed),
                }
            }
            // The instances may be ahead of the service by now; so that no guard is missed, it catches up.
            while let Some(followed) = self.services.try_next().await? {
                match followed {
                    Followed::Through(_) => {}
                    Followed::Gone(_) => return Ok(None),
                    Followed::Changes(changes) => at = self.note_service(&changes),
                }
            }
            let was_guarded = self.guarded;
            let answer = self.tell(changed);
            if !answer.instances.is_empty() || !answer.removed.is_empty() || was_guarded != answer.guarded {
                return Ok(Some(v1::ServiceWatchReply { index: at.0, ..answer }));
            }
        }
    }

    fn note_service(&mut self, changes: &[tenure_machine::Change]) -> Revision {
        let mut at = Revision(0);
        for change in changes.iter().filter_map(|change| RegistryChange::of(&change.record)) {
            at = change.revision;
            if let RegistryChanged::Service(service) = change.what {
                self.service = service;
            }
        }
        at
    }

    fn note_instances(&mut self, changes: &[tenure_machine::Change], changed: &mut BTreeSet<Box<str>>) {
        for change in changes.iter().filter_map(|change| RegistryChange::of(&change.record)) {
            if let RegistryChanged::Instance(id, instance) = change.what {
                changed.insert(id.clone());
                match instance {
                    Some(instance) => drop(self.instances.insert(id, instance)),
                    None => drop(self.instances.remove(&id)),
                }
            }
        }
    }

    /// What is to be told of these, and of those that the guard keeps or does not keep any more.
    fn tell(&mut self, mut changed: BTreeSet<Box<str>>) -> v1::ServiceWatchReply {
        self.guarded = self.service.as_ref().is_some_and(|service| service.guarded.is_some());
        for (id, instance) in &self.instances {
            if self.is_kept(instance) != self.told.get(id).copied().unwrap_or(false) {
                changed.insert(id.clone());
            }
        }
        let mut answer = v1::ServiceWatchReply { guarded: self.guarded, ..Default::default() };
        for id in changed {
            match self.instances.get(&id).map(|instance| (instance, self.is_kept(instance))) {
                Some((instance, kept)) if self.filter.admits(instance, kept) => {
                    answer.instances.push(shown(&id, instance, kept));
                    self.told.insert(id, kept);
                }
                _ if self.told.remove(&id).is_some() => answer.removed.push(id.into()),
                _ => {}
            }
        }
        answer
    }

    fn is_kept(&self, instance: &Instance) -> bool {
        self.service.as_ref().is_some_and(|service| service.keeps(instance))
    }
}

// ---- Words ----

fn shown_health(health: Health) -> v1::Health {
    match health {
        Health::Passing => v1::Health::Passing,
        Health::Warning => v1::Health::Warning,
        Health::Critical => v1::Health::Critical,
        Health::Draining => v1::Health::Draining,
    }
}

fn shown(id: &str, instance: &Instance, kept: bool) -> v1::ServiceInstance {
    let spec = &instance.spec;
    v1::ServiceInstance {
        instance: id.to_owned(),
        token: instance.token.0,
        address: spec.address.to_string(),
        port: spec.port,
        tags: spec.tags.iter().map(ToString::to_string).collect(),
        meta: spec.meta.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
        weight: spec.weight,
        health: shown_health(instance.health()).into(),
        why: instance.why.to_string(),
        kept,
        session: spec.session.0,
        check: shown_check(&spec.check),
        deregister_critical_after_ms: spec.deregister_after_ms,
        revision: instance.revision.0,
    }
}

fn shown_check(check: &Check) -> Option<v1::ServiceCheck> {
    use v1::service_check::Kind;
    match check {
        Check::None => None,
        Check::Ttl(ms) => Some(v1::ServiceCheck { kind: Some(Kind::TtlMs(*ms)), ..Default::default() }),
        Check::Active(active) => {
            let kind = match &active.probe {
                Probe::Tcp => Kind::Tcp(v1::TcpProbe {}),
                Probe::Http(path) => Kind::Http(v1::HttpProbe { path: path.to_string() }),
                Probe::Grpc(service) => Kind::Grpc(v1::GrpcProbe { service: service.to_string() }),
            };
            Some(v1::ServiceCheck {
                kind: Some(kind),
                port: active.port,
                interval_ms: active.interval_ms,
                timeout_ms: active.timeout_ms,
                failures_before_critical: active.failures_before_critical,
                success_before_passing: active.success_before_passing,
            })
        }
    }
}
