//! The registry of services: which instances there are, where, and how they are.
//!
//! Promises. G1: an instance is of one registration at a time, told apart by its token; whatever names an older token is FENCED and changes nothing.
//! G2: an instance goes with its session, or after it was critical for its `deregister_after_ms`, in a commit; none stays critical for ever. One
//! whose session ended under a guard is critical until then, unless it is registered anew. G3: a TTL
//! that is over makes the instance critical in a commit of its own; a heartbeat moves only the TTL, and no watcher hears of it. G4: the result of a
//! probe counts only if the leader that ran it still led when the entry was appended (its term is the entry's) and the registration is the one that
//! was probed: one member runs the checks, and its leadership is the lease. G5: each change of an instance moves the index of its service, which
//! never goes back. G6: in a service with a guard, instances that turn critical together, more than the given share of those that were up, are kept
//! in answers, with a flag, until enough are up again or they are deregistered.
//! Not promised. That an instance which is passing answers: a check tells how it was.
//! Relies on. The server runs the probes and proposes only transitions.

use crate::apply::{Commit, Machine, invalid};
use crate::coded::{coded_enum, coded_struct};
use crate::native::{Refusal, RefusalCode};
use crate::objects::{Indexes, Lived, Object, ObjectKey, Stored};
use crate::record::Record;
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::Waiter;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

/// Bytes of a service's name, an instance's id and an address.
const SERVICE_NAME_MAX: usize = 255;
const TAGS_MAX: usize = 64;
const META_MAX: usize = 64;
/// Bytes of all tags, and of all metadata.
const DESCRIPTION_BYTES_MAX: usize = 8 << 10;
/// Bytes of the sentence beside a health.
const WHY_BYTES_MAX: usize = 512;
const WEIGHT_MAX: u32 = 65_535;
const INSTANCES_MAX: u64 = 10_000;
const DEREGISTER_MIN_MS: u64 = 60_000;
const DEREGISTER_MAX_MS: u64 = 30 * 86_400_000;
/// Instances that turn critical within it turn critical together.
const GUARD_WINDOW_MS: u64 = 60_000;
/// The index of a service without instances is kept for so long, so that whoever follows it learns that it is empty.
const EMPTY_KEPT_MS: u64 = 3_600_000;
/// Why an instance is critical that was not probed yet. The first failure says more.
pub const NOT_CHECKED: &str = "not checked yet";
/// Between the service's name and the instance's id in keys.
const SEPARATOR: u8 = 0;

coded_enum! {
    /// How an instance is.
    #[derive(Copy, Eq, PartialOrd, Ord)]
    pub enum Health as "a health" {
        Passing = 1,
        /// It works, and asks for attention or for less work.
        Warning = 2,
        Critical = 3,
        /// It works and wants no new callers.
        Draining = 4,
    }
}

coded_enum! {
    /// What is asked of an instance that is probed.
    pub enum Probe as "a probe" {
        /// A connection opens.
        Tcp = 1,
        /// GET of this path answers with 2xx; 429 is a warning.
        Http(Box<str>) = 2,
        /// `grpc.health.v1.Health/Check` of this service answers SERVING.
        Grpc(Box<str>) = 3,
    }
}

coded_struct! {
    /// A check that a member of the cluster runs.
    pub struct ActiveCheck as "an active check" {
        pub probe: Probe,
        /// Zero: the port of the instance.
        pub port: u32,
        pub interval_ms: u64,
        pub timeout_ms: u64,
        pub failures_before_critical: u32,
        pub success_before_passing: u32,
    }
}

coded_enum! {
    /// How the registry learns of an instance's health.
    pub enum Check as "a check" {
        /// From its session alone.
        None = 0,
        /// It must tell at least this often, in milliseconds.
        Ttl(u64) = 1,
        Active(ActiveCheck) = 2,
    }
}

coded_struct! {
    /// What an instance says of itself.
    pub struct InstanceSpec as "an instance's description" {
        pub address: Box<str>,
        pub port: u32,
        pub tags: Vec<Box<str>>,
        pub meta: Vec<(Box<str>, Box<str>)>,
        /// Its share of the callers, beside that of the others.
        pub weight: u32,
        /// It goes with this session; zero: with none.
        pub session: SessionId,
        pub check: Check,
        /// Critical for so long: deregistered.
        pub deregister_after_ms: u64,
    }
}

coded_struct! {
    /// One registered instance.
    pub struct Instance as "an instance" {
        pub spec: Box<InstanceSpec>,
        /// The revision of the registration: names it.
        pub token: Revision,
        /// Of the last change.
        pub revision: Revision,
        pub registered: LogTime,
        /// By its check, without draining.
        pub checked: Health,
        /// Why it is so.
        pub why: Box<str>,
        /// Since when it is so.
        pub since: LogTime,
        /// It was up before it turned critical. One that was never up is no loss.
        pub fell: bool,
        pub draining: bool,
        /// When it will be deregistered.
        pub leaves: Option<LogTime>,
    }
}

coded_struct! {
    /// What is kept of a service beside its instances.
    pub struct Service as "a service" {
        /// The revision of the last change among its instances.
        pub index: Revision,
        /// More than this share falls together: they are kept in answers. Zero: never.
        pub guard_percent: u32,
        /// Those that fell since the first time are kept, from the second on.
        pub guarded: Option<(LogTime, LogTime)>,
        /// It has no instances, and is forgotten then.
        pub forgotten: Option<LogTime>,
    }
}

coded_struct! {
    /// Until when the heartbeats of an instance reach. A thing of its own, because watchers of instances need not hear of them.
    pub struct Pulse as "a pulse" {
        pub until: LogTime,
    }
}

impl Instance {
    pub fn health(&self) -> Health {
        if self.draining && self.checked != Health::Critical { Health::Draining } else { self.checked }
    }

    /// Its session ended and a guard keeps it: nothing would tell that it is back.
    fn is_left(&self) -> bool {
        self.spec.session == SessionId(0) && self.spec.check == Check::None
    }

    /// When it turned critical, if it was up before.
    fn fallen(&self) -> Option<LogTime> {
        (self.checked == Health::Critical && self.fell).then_some(self.since)
    }
}

impl Service {
    /// Whether a critical instance is shown among those that are up.
    pub fn keeps(&self, instance: &Instance) -> bool {
        self.guarded.is_some_and(|(from, _)| instance.fallen().is_some_and(|at| at >= from))
    }
}

impl Lived for Instance {
    fn bytes(&self) -> u64 {
        let spec = &self.spec;
        let tags: usize = spec.tags.iter().map(|tag| tag.len() + 16).sum();
        let meta: usize = spec.meta.iter().map(|(key, value)| key.len() + value.len() + 32).sum();
        (size_of::<InstanceSpec>() + spec.address.len() + tags + meta + self.why.len()) as u64 + 256
    }

    fn deadline(&self) -> Option<LogTime> {
        self.leaves
    }

    fn sessions(&self) -> Vec<SessionId> {
        Vec::from_iter((self.spec.session != SessionId(0)).then_some(self.spec.session))
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        commit.remove_instance(key);
    }

    fn session_ended(commit: &mut Commit<'_>, key: &ObjectKey, _: SessionId) {
        let Some(instance) = commit.object::<Self>(key) else { return };
        let is_guarded = commit.service_of(key).is_some_and(|service| service.guard_percent > 0);
        if !is_guarded || instance.draining {
            return commit.remove_instance(key);
        }
        // Many sessions may end together for a reason that is not theirs: the guard decides what is told of them.
        let mut instance = instance.clone();
        instance.spec.session = SessionId(0);
        // Nothing but a new registration brings it back: what answers at its place by now may be another, and would keep it for ever.
        instance.spec.check = Check::None;
        commit.remove_object(&sibling::<Pulse>(key));
        commit.set_health(key, instance, Health::Critical, "its session ended");
    }

    fn note(indexes: &mut Indexes, key: &ObjectKey, old: Option<&Self>, new: Option<&Self>) {
        indexes.registry.note(key, old, new);
    }
}

impl Lived for Service {
    fn bytes(&self) -> u64 {
        0
    }

    fn deadline(&self) -> Option<LogTime> {
        self.forgotten
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        commit.remove_object(key);
    }
}

impl Lived for Pulse {
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        0
    }

    fn deadline(&self) -> Option<LogTime> {
        Some(self.until)
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        commit.remove_object(key);
        let key = sibling::<Instance>(key);
        if let Some(instance) = commit.object::<Instance>(&key).cloned() {
            commit.set_health(&key, instance, Health::Critical, "no heartbeat came in time");
        }
    }
}

/// How many instances of a service there are of each health.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HealthCounts {
    pub passing: u64,
    pub warning: u64,
    pub critical: u64,
    pub draining: u64,
}

impl HealthCounts {
    pub fn all(&self) -> u64 {
        self.up() + self.critical
    }

    fn up(&self) -> u64 {
        self.passing + self.warning + self.draining
    }

    fn of(&mut self, health: Health) -> &mut u64 {
        match health {
            Health::Passing => &mut self.passing,
            Health::Warning => &mut self.warning,
            Health::Critical => &mut self.critical,
            Health::Draining => &mut self.draining,
        }
    }
}

/// What follows from the table.
#[derive(Default)]
pub(crate) struct Index {
    /// By the key of the service.
    services: BTreeMap<ObjectKey, Counted>,
    /// Instances that a member probes.
    probed: BTreeSet<ObjectKey>,
    /// Moves when one of them changes, for whoever runs the probes here. Not part of the state.
    probes_version: u64,
}

#[derive(Default)]
struct Counted {
    health: HealthCounts,
    /// How many fell when, of those that are critical.
    fallen: BTreeMap<LogTime, u64>,
}

impl Index {
    fn note(&mut self, key: &ObjectKey, old: Option<&Instance>, new: Option<&Instance>) {
        let service = service_key(key);
        let counted = self.services.entry(service.clone()).or_default();
        if let Some(old) = old {
            *counted.health.of(old.health()) -= 1;
            if let Some(at) = old.fallen()
                && let Some(count) = counted.fallen.get_mut(&at)
            {
                *count -= 1;
                if *count == 0 {
                    counted.fallen.remove(&at);
                }
            }
        }
        if let Some(new) = new {
            *counted.health.of(new.health()) += 1;
            if let Some(at) = new.fallen() {
                *counted.fallen.entry(at).or_default() += 1;
            }
        }
        if counted.health.all() == 0 {
            self.services.remove(&service);
        }
        let is_probed =
            |instance: Option<&Instance>| instance.is_some_and(|i| matches!(i.spec.check, Check::Active(_)));
        self.probes_version += u64::from(is_probed(old) || is_probed(new));
        match (is_probed(old), is_probed(new)) {
            (false, true) => drop(self.probed.insert(key.clone())),
            (true, false) => drop(self.probed.remove(key)),
            _ => {}
        }
    }

    fn counts(&self, service: &ObjectKey) -> HealthCounts {
        self.services.get(service).map_or_else(HealthCounts::default, |counted| counted.health)
    }

    fn fallen_since(&self, service: &ObjectKey, from: LogTime) -> u64 {
        self.services.get(service).map_or(0, |counted| counted.fallen.range(from..).map(|(_, count)| count).sum())
    }
}

coded_struct! {
    pub struct Register as "a registration" {
        pub service: Box<str>,
        pub instance: Box<str>,
        pub spec: Box<InstanceSpec>,
        /// Take the place of this registration, whoever it is of; zero: of none.
        pub replaces: Revision,
    }
}

coded_struct! {
    /// A registration.
    pub struct InstanceRef as "a registration's name" {
        pub service: Box<str>,
        pub instance: Box<str>,
        /// Zero: whichever there is.
        pub token: Revision,
    }
}

coded_struct! {
    pub struct Heartbeat as "a heartbeat" {
        pub of: InstanceRef,
        pub health: Health,
        pub why: Box<str>,
    }
}

coded_struct! {
    pub struct Drain as "a change of draining" {
        pub of: InstanceRef,
        pub draining: bool,
    }
}

coded_struct! {
    /// What a probe found, where that is another health than before.
    pub struct Probed as "a probe's result" {
        pub of: InstanceRef,
        /// Of the leader that probed.
        pub term: u64,
        pub health: Health,
        pub why: Box<str>,
    }
}

coded_struct! {
    pub struct ServiceGuard as "a service's guard" {
        pub service: Box<str>,
        pub percent: u32,
    }
}

coded_enum! {
    pub enum RegistryOp as "an operation of the registry" {
        Register(Box<Register>) = 1,
        Deregister(InstanceRef) = 2,
        Heartbeat(Heartbeat) = 3,
        Drain(Drain) = 4,
        Probed(Probed) = 5,
        Guard(ServiceGuard) = 6,
    }
}

coded_struct! {
    pub struct Registration as "a registration" {
        pub token: Revision,
        pub health: Health,
        /// It was registered equally before, and nothing but its TTL changed.
        pub same: bool,
    }
}

coded_enum! {
    pub enum RegistryReply as "an answer of the registry" {
        Registered(Registration) = 1,
        /// Whether it was there.
        Deregistered(bool) = 2,
        /// The health as it is told now.
        Noted(Health) = 3,
        Done = 4,
    }
}

impl RegistryOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        match self {
            Self::Register(register) => {
                let spec = &register.spec;
                let tags: usize = spec.tags.iter().map(|tag| tag.len() + 16).sum();
                let meta: usize = spec.meta.iter().map(|(key, value)| key.len() + value.len() + 32).sum();
                let names = 3 * (register.service.len() + register.instance.len());
                (2_048 + names + spec.address.len() + tags + meta) as u64
            }
            _ => 0,
        }
    }

    /// What a waiter is told whose time is over; `None`: that it waited in vain.
    pub(crate) fn wait_over(&self, _: &Machine, _: &Waiter) -> Option<Result<OpReply, Rejection>> {
        None
    }
}

impl Commit<'_> {
    pub(crate) fn registry_op(&mut self, op: &RegistryOp) -> Result<OpReply, Rejection> {
        let reply = match op {
            RegistryOp::Register(register) => RegistryReply::Registered(self.register(register)?),
            RegistryOp::Deregister(of) => RegistryReply::Deregistered(self.deregister(of)?),
            RegistryOp::Heartbeat(beat) => RegistryReply::Noted(self.heartbeat(beat)?),
            RegistryOp::Drain(drain) => RegistryReply::Noted(self.drain(drain)?),
            RegistryOp::Probed(probed) => {
                self.probed(probed);
                RegistryReply::Done
            }
            RegistryOp::Guard(guard) => {
                self.guard(guard)?;
                RegistryReply::Done
            }
        };
        Ok(reply.into())
    }

    fn register(&mut self, register: &Register) -> Result<Registration, Rejection> {
        let name = instance_name(&register.service, &register.instance)?;
        check_spec(&register.spec)?;
        let key = self.object_key::<Instance>(&name);
        let old = self.object::<Instance>(&key).cloned();
        self.check_owner(register, &key, old.as_ref())?;
        if let Some(old) = old.as_ref().filter(|old| old.spec == register.spec) {
            return Ok(self.register_again(&key, old.clone()));
        }
        let token = self.number_once(&key)?;
        let instance = self.registered(register, token, old);
        let health = instance.health();
        self.put_object(&key, instance);
        self.set_pulse(&key, &register.spec.check);
        self.touch_service(&key);
        Ok(Registration { token, health, same: false })
    }

    /// Whether this caller may register, here and under its session.
    fn check_owner(&self, register: &Register, key: &ObjectKey, old: Option<&Instance>) -> Result<(), Rejection> {
        let session = register.spec.session;
        let held = old.map_or(SessionId(0), |old| old.spec.session);
        if session != SessionId(0) {
            let is_native = self.live_session(session)?.is_native();
            if is_native && session != held {
                self.check_things(session)?;
            }
        }
        let current = old.map_or(Revision(0), |old| old.token);
        if register.replaces != Revision(0) && register.replaces != current {
            return Err(fenced(&register.service, &register.instance, register.replaces, current));
        }
        match old {
            None if self.m.objects.indexes.registry.counts(&service_key(key)).all() >= INSTANCES_MAX => {
                let why =
                    format!("service `{}` has {INSTANCES_MAX} instances, and no more are allowed", register.service);
                Err(Refusal::new(RefusalCode::Quota, why).fact("limit", INSTANCES_MAX).into())
            }
            Some(old) if held != SessionId(0) && held != session && register.replaces == Revision(0) => {
                Err(held_by_other(register, old))
            }
            _ => Ok(()),
        }
    }

    /// The same registration again: a heartbeat, where it has a TTL.
    fn register_again(&mut self, key: &ObjectKey, instance: Instance) -> Registration {
        let token = instance.token;
        let check = instance.spec.check.clone();
        if let Check::Ttl(_) = check {
            self.set_pulse(key, &check);
            self.set_health(key, instance, Health::Passing, "");
        }
        let health = self.object::<Instance>(key).map_or(Health::Critical, Instance::health);
        Registration { token, health, same: true }
    }

    /// What is known of the health stays while the instance is asked at the same place in the same way.
    fn registered(&self, register: &Register, token: Revision, old: Option<Instance>) -> Instance {
        let spec = &register.spec;
        let stamp = self.m.stamp;
        let asked_equally = |old: &Instance| {
            let is_there = old.spec.address == spec.address && old.spec.port == spec.port;
            is_there && (old.spec.check == spec.check || old.is_left()) && matches!(spec.check, Check::Active(_))
        };
        let draining = old.as_ref().is_some_and(|old| old.draining);
        if let Some(old) = old.filter(asked_equally) {
            let leaves = old.leaves.map(|_| old.since.plus(spec.deregister_after_ms));
            return Instance { spec: spec.clone(), token, revision: self.at, leaves, ..old };
        }
        let unknown = matches!(spec.check, Check::Active(_));
        Instance {
            spec: spec.clone(),
            token,
            revision: self.at,
            registered: stamp,
            checked: if unknown { Health::Critical } else { Health::Passing },
            why: if unknown { NOT_CHECKED.into() } else { "".into() },
            since: stamp,
            fell: false,
            draining,
            leaves: unknown.then(|| stamp.plus(spec.deregister_after_ms)),
        }
    }

    /// A TTL begins anew; whatever else is checked has none.
    fn set_pulse(&mut self, key: &ObjectKey, check: &Check) {
        let pulse = sibling::<Pulse>(key);
        match check {
            Check::Ttl(ms) => self.put_object(&pulse, Pulse { until: self.m.stamp.plus(*ms) }),
            _ => self.remove_object(&pulse),
        }
    }

    /// The registration that is meant, if it is the one that there is.
    fn find_instance(&self, of: &InstanceRef) -> Result<(ObjectKey, Option<Instance>), Rejection> {
        let key = self.object_key::<Instance>(&instance_name(&of.service, &of.instance)?);
        let found = self.object::<Instance>(&key).cloned();
        match &found {
            Some(instance) if of.token != Revision(0) && of.token != instance.token => {
                Err(fenced(&of.service, &of.instance, of.token, instance.token))
            }
            _ => Ok((key, found)),
        }
    }

    fn existing(&self, of: &InstanceRef) -> Result<(ObjectKey, Instance), Rejection> {
        let (key, found) = self.find_instance(of)?;
        Ok((key, found.ok_or_else(|| missing(of))?))
    }

    fn deregister(&mut self, of: &InstanceRef) -> Result<bool, Rejection> {
        let (key, found) = self.find_instance(of)?;
        self.remove_instance(&key);
        Ok(found.is_some())
    }

    fn remove_instance(&mut self, key: &ObjectKey) {
        if self.object::<Instance>(key).is_some() {
            self.remove_object(&sibling::<Pulse>(key));
            self.remove_object(key);
            self.touch_service(key);
        }
    }

    fn heartbeat(&mut self, beat: &Heartbeat) -> Result<Health, Rejection> {
        let (key, instance) = self.existing(&beat.of)?;
        check_why(&beat.why)?;
        if instance.is_left() {
            return Err(left(&beat.of, instance.token));
        }
        let Check::Ttl(_) = instance.spec.check else {
            return Err(invalid(format!("instance `{}` has no check with a TTL", beat.of.instance)));
        };
        if beat.health == Health::Draining {
            return Err(invalid("a heartbeat tells passing, warning or critical; draining is a call of its own"));
        }
        self.set_pulse(&key, &instance.spec.check.clone());
        self.set_health(&key, instance, beat.health, &beat.why);
        Ok(self.object::<Instance>(&key).map_or(beat.health, Instance::health))
    }

    fn drain(&mut self, drain: &Drain) -> Result<Health, Rejection> {
        let (key, mut instance) = self.existing(&drain.of)?;
        if instance.draining != drain.draining {
            instance.draining = drain.draining;
            instance.revision = self.at;
            self.put_object(&key, instance);
            self.touch_service(&key);
        }
        Ok(self.object::<Instance>(&key).map_or(Health::Draining, Instance::health))
    }

    /// A result that comes too late is dropped: the registration or the leader is another one.
    fn probed(&mut self, probed: &Probed) {
        if probed.term != self.m.position().term.0 || probed.of.token == Revision(0) {
            return;
        }
        if let Ok((key, Some(instance))) = self.find_instance(&probed.of)
            && matches!(instance.spec.check, Check::Active(_))
            && probed.health != Health::Draining
        {
            self.set_health(&key, instance, probed.health, cut(&probed.why, WHY_BYTES_MAX));
        }
    }

    /// Writes a health that differs.
    fn set_health(&mut self, key: &ObjectKey, instance: Instance, health: Health, why: &str) {
        let is_same = |now: &Instance| now.checked == health && now.spec == instance.spec && &*now.why != NOT_CHECKED;
        if self.object::<Instance>(key).is_some_and(is_same) {
            return;
        }
        let stamp = self.m.stamp;
        let is_critical = health == Health::Critical;
        let fell = is_critical && (instance.checked != Health::Critical || instance.fell);
        let since = if instance.checked == health { instance.since } else { stamp };
        let leaves = is_critical.then(|| since.plus(instance.spec.deregister_after_ms));
        let (why, revision) = (why.into(), self.at);
        self.put_object(key, Instance { checked: health, why, since, fell, leaves, revision, ..instance });
        self.touch_service(key);
    }

    fn service_of(&self, instance: &ObjectKey) -> Option<&Service> {
        self.object(&service_key(instance))
    }

    /// After a change of an instance: the index of the service moves, and its guard is judged.
    fn touch_service(&mut self, instance: &ObjectKey) {
        let key = service_key(instance);
        let fresh = Service { index: self.at, guard_percent: 0, guarded: None, forgotten: None };
        let service = self.object(&key).cloned().unwrap_or(fresh);
        self.judge_service(&key, service);
    }

    fn judge_service(&mut self, key: &ObjectKey, service: Service) {
        let index = &self.m.objects.indexes.registry;
        let counts = index.counts(key);
        let from = service.guarded.map_or(LogTime(self.m.stamp.0.saturating_sub(GUARD_WINDOW_MS)), |(from, _)| from);
        let fallen = index.fallen_since(key, from);
        let since = service.guarded.map_or(self.m.stamp, |(_, since)| since);
        let too_many = fallen * 100 > u64::from(service.guard_percent) * (fallen + counts.up());
        let guarded = (service.guard_percent > 0 && too_many).then_some((from, since));
        let is_empty = counts.all() == 0 && service.guard_percent == 0;
        let forgotten = is_empty.then(|| self.m.stamp.plus(EMPTY_KEPT_MS));
        let new = Service { index: self.at, guarded, forgotten, ..service };
        if self.object(key) != Some(&new) {
            self.put_object(key, new);
        }
    }

    fn guard(&mut self, guard: &ServiceGuard) -> Result<(), Rejection> {
        check_label("service", &guard.service)?;
        if guard.percent > 100 {
            return Err(invalid("the guard of a service is a share of 0 to 100 percent"));
        }
        let key = self.object_key::<Service>(guard.service.as_bytes());
        let old = self.object::<Service>(&key).cloned();
        if guard.percent == old.as_ref().map_or(0, |old| old.guard_percent) {
            return Ok(());
        }
        let service = old.unwrap_or(Service { index: self.at, guard_percent: 0, guarded: None, forgotten: None });
        let service = Service { guard_percent: guard.percent, ..service };
        self.judge_service(&key, service);
        Ok(())
    }
}

/// A service as readers see it.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceInfo {
    pub name: Box<str>,
    pub index: Revision,
    pub guard_percent: u32,
    /// Since when instances are kept although they are critical.
    pub guarded: Option<LogTime>,
    pub counts: HealthCounts,
}

/// An instance that a member probes.
#[derive(Clone, Debug, PartialEq)]
pub struct ProbedInstance {
    pub namespace: NamespaceId,
    pub service: Box<str>,
    pub id: Box<str>,
    pub instance: Instance,
}

/// Reads.
impl Machine {
    pub fn service(&self, namespace: NamespaceId, name: &str) -> Option<ServiceInfo> {
        let key = ObjectKey::of::<Service>(namespace, name.as_bytes());
        self.objects.get::<Service>(&key).map(|service| self.service_info(&key, service))
    }

    /// Services by name after `after`, those that nothing but an index is left of not among them.
    pub fn services(&self, namespace: NamespaceId, after: Option<&str>, max: usize) -> Vec<ServiceInfo> {
        let all = self.objects.list::<Service>(namespace, b"", after.map(str::as_bytes));
        let known = all.filter(|(_, service)| service.forgotten.is_none());
        known.take(max).map(|(key, service)| self.service_info(key, service)).collect()
    }

    fn service_info(&self, key: &ObjectKey, service: &Service) -> ServiceInfo {
        ServiceInfo {
            name: String::from_utf8_lossy(key.name()).into(),
            index: service.index,
            guard_percent: service.guard_percent,
            guarded: service.guarded.map(|(_, since)| since),
            counts: self.objects.indexes.registry.counts(key),
        }
    }

    /// The instances of a service by id after `after`, each with whether the guard keeps it among those that are up.
    pub fn instances(
        &self,
        namespace: NamespaceId,
        service: &str,
        after: Option<&str>,
        max: usize,
    ) -> Vec<(Box<str>, &Instance, bool)> {
        let guard = self.objects.get::<Service>(&ObjectKey::of::<Service>(namespace, service.as_bytes()));
        let prefix = joined(service, "");
        let after = after.map(|after| joined(service, after));
        let mut shown = Vec::new();
        for (key, instance) in self.objects.list::<Instance>(namespace, &prefix, after.as_deref()).take(max) {
            if let Some((_, id)) = parts(key.name()) {
                shown.push((id, instance, guard.is_some_and(|guard| guard.keeps(instance))));
            }
        }
        shown
    }

    pub fn instance(&self, namespace: NamespaceId, service: &str, id: &str) -> Option<&Instance> {
        self.objects.get(&ObjectKey::of::<Instance>(namespace, &joined(service, id)))
    }

    /// Refuses with what is there, unless it is registered under this token, if one is given, and its health is one of these, if there are any.
    pub(crate) fn judge_instance(
        &self,
        namespace: NamespaceId,
        of: &InstanceRef,
        wanted: &[Health],
    ) -> Result<(), Rejection> {
        let instance = self.instance(namespace, &of.service, &of.instance).ok_or_else(|| missing(of))?;
        if of.token != Revision(0) && of.token != instance.token {
            return Err(fenced(&of.service, &of.instance, of.token, instance.token));
        }
        let health = instance.health();
        if wanted.is_empty() || wanted.contains(&health) {
            return Ok(());
        }
        let word = health_word(health);
        let why = format!("instance `{}` of service `{}` is {word}", of.instance, of.service);
        let refusal = Refusal::new(RefusalCode::Conflict, why).fact("service", &of.service);
        let refusal = refusal.fact("instance", &of.instance).fact("token", instance.token).fact("health", word);
        Err(refusal.fact("why", &instance.why).into())
    }

    /// Until when the heartbeats of an instance reach.
    pub fn pulse(&self, namespace: NamespaceId, service: &str, id: &str) -> Option<LogTime> {
        let key = ObjectKey::of::<Pulse>(namespace, &joined(service, id));
        self.objects.get::<Pulse>(&key).map(|pulse| pulse.until)
    }

    /// Whether `probed_instances` may have changed, told by another number.
    pub fn probes_version(&self) -> u64 {
        self.objects.indexes.registry.probes_version
    }

    /// Instances whose checks a member runs, of every namespace, in pages: give the last one's place to read on.
    pub fn probed_instances(&self, after: Option<&ProbedInstance>, max: usize) -> Vec<ProbedInstance> {
        let place = |at: &ProbedInstance| ObjectKey::of::<Instance>(at.namespace, &joined(&at.service, &at.id));
        let from = after.map_or(Bound::Unbounded, |at| Bound::Excluded(place(at)));
        let keys = self.objects.indexes.registry.probed.range((from, Bound::Unbounded));
        let probed = keys.filter_map(|key| {
            let (service, id) = parts(key.name())?;
            let instance = self.objects.get::<Instance>(key)?.clone();
            Some(ProbedInstance { namespace: key.namespace(), service, id, instance })
        });
        probed.take(max).collect()
    }
}

/// What a change of the native space says of the registry.
#[derive(Clone, Debug, PartialEq)]
pub struct RegistryChange {
    pub namespace: NamespaceId,
    pub service: Box<str>,
    pub revision: Revision,
    pub what: RegistryChanged,
}

#[derive(Clone, Debug, PartialEq)]
pub enum RegistryChanged {
    /// An instance as it is now; `None`: it is gone.
    Instance(Box<str>, Option<Box<Instance>>),
    Service(Option<Service>),
}

impl RegistryChange {
    /// Whether a key is of the registry, for whoever passes changes on.
    pub fn concerns(key: &[u8]) -> bool {
        let kind = key.get(Key::PREFIX);
        key.first() == Some(&(Space::Native as u8)) && (kind == Some(&Instance::KIND) || kind == Some(&Service::KIND))
    }

    pub fn of(record: &Record) -> Option<Self> {
        let key = record.key();
        if !Self::concerns(key) {
            return None;
        }
        let namespace = NamespaceId(u32::from_be_bytes(key.get(1..Key::PREFIX)?.try_into().ok()?));
        let name = key.get(Key::PREFIX + 1..)?;
        let (meta, _, value) = record.parts();
        let object = if meta.tombstone { None } else { Some(Object::from_record(value)?) };
        let revision = meta.mod_revision;
        if key.get(Key::PREFIX) == Some(&Service::KIND) {
            let service = String::from_utf8_lossy(name).into();
            let what = RegistryChanged::Service(object.as_ref().and_then(Service::of).cloned());
            return Some(Self { namespace, service, revision, what });
        }
        let (service, id) = parts(name)?;
        let instance = object.as_ref().and_then(Instance::of).cloned().map(Box::new);
        Some(Self { namespace, service, revision, what: RegistryChanged::Instance(id, instance) })
    }
}

/// The key of another kind under the same name.
fn sibling<T: Stored>(key: &ObjectKey) -> ObjectKey {
    ObjectKey::of::<T>(key.namespace(), key.name())
}

/// The key of an instance's service.
fn service_key(instance: &ObjectKey) -> ObjectKey {
    let name = instance.name().split(|byte| *byte == SEPARATOR).next().unwrap_or_default();
    ObjectKey::of::<Service>(instance.namespace(), name)
}

fn joined(service: &str, id: &str) -> Vec<u8> {
    let mut name = Vec::with_capacity(service.len() + 1 + id.len());
    name.extend_from_slice(service.as_bytes());
    name.push(SEPARATOR);
    name.extend_from_slice(id.as_bytes());
    name
}

fn parts(name: &[u8]) -> Option<(Box<str>, Box<str>)> {
    let at = name.iter().position(|byte| *byte == SEPARATOR)?;
    let text = |bytes: &[u8]| Some(std::str::from_utf8(bytes).ok()?.into());
    Some((text(&name[..at])?, text(&name[at + 1..])?))
}

fn instance_name(service: &str, instance: &str) -> Result<Vec<u8>, Rejection> {
    check_label("service", service)?;
    check_label("instance", instance)?;
    Ok(joined(service, instance))
}

fn check_label(what: &str, label: &str) -> Result<(), Rejection> {
    let is_good = (1..=SERVICE_NAME_MAX).contains(&label.len()) && !label.bytes().any(|byte| byte == SEPARATOR);
    if is_good {
        return Ok(());
    }
    Err(invalid(format!("the name of the {what} has 1 to {SERVICE_NAME_MAX} bytes, none of them zero")))
}

fn check_why(why: &str) -> Result<(), Rejection> {
    let refused = || invalid(format!("the reason of a health has at most {WHY_BYTES_MAX} bytes"));
    if why.len() <= WHY_BYTES_MAX { Ok(()) } else { Err(refused()) }
}

fn check_spec(spec: &InstanceSpec) -> Result<(), Rejection> {
    let tags: usize = spec.tags.iter().map(|tag| tag.len()).sum();
    let meta: usize = spec.meta.iter().map(|(key, value)| key.len() + value.len()).sum();
    let refused = if spec.address.is_empty() || spec.address.len() > SERVICE_NAME_MAX {
        "the address of an instance has 1 to 255 bytes"
    } else if spec.port > u32::from(u16::MAX) {
        "a port is at most 65535"
    } else if spec.tags.len() > TAGS_MAX || tags > DESCRIPTION_BYTES_MAX {
        "an instance has at most 64 tags, of 8 KiB together"
    } else if spec.meta.len() > META_MAX || meta > DESCRIPTION_BYTES_MAX {
        "an instance has at most 64 entries of metadata, of 8 KiB together"
    } else if !(1..=WEIGHT_MAX).contains(&spec.weight) {
        "the weight of an instance is 1 to 65535"
    } else if !(DEREGISTER_MIN_MS..=DEREGISTER_MAX_MS).contains(&spec.deregister_after_ms) {
        "an instance is deregistered after it was critical for one minute to 30 days"
    } else if spec.session == SessionId(0) && spec.check == Check::None {
        "an instance has a session or a check: nothing would ever tell that it is gone"
    } else {
        return check_check(spec);
    };
    Err(invalid(refused))
}

fn check_check(spec: &InstanceSpec) -> Result<(), Rejection> {
    let refused = match &spec.check {
        Check::None => return Ok(()),
        Check::Ttl(ms) if (1_000..=86_400_000).contains(ms) => return Ok(()),
        Check::Ttl(_) => "the TTL of a check is one second to 24 hours",
        Check::Active(active) if active.port == 0 && spec.port == 0 => "a check needs a port to connect to",
        Check::Active(active) if active.port > u32::from(u16::MAX) => "a port is at most 65535",
        Check::Active(active) if !(1_000..=86_400_000).contains(&active.interval_ms) => {
            "the interval of a check is one second to 24 hours"
        }
        Check::Active(active) if !(10..=60_000).contains(&active.timeout_ms) => {
            "the timeout of a check is 10 milliseconds to one minute"
        }
        Check::Active(active)
            if !(1..=100).contains(&active.failures_before_critical)
                || !(1..=100).contains(&active.success_before_passing) =>
        {
            "a check changes the health after 1 to 100 results"
        }
        Check::Active(active) => match &active.probe {
            Probe::Http(path) if !path.starts_with('/') || path.len() > 1024 => {
                "the path of an HTTP check begins with `/` and has at most 1024 bytes"
            }
            Probe::Grpc(service) if service.len() > SERVICE_NAME_MAX => {
                "the service of a gRPC check has at most 255 bytes"
            }
            _ => return Ok(()),
        },
    };
    Err(invalid(refused))
}

fn fenced(service: &str, instance: &str, presented: Revision, current: Revision) -> Rejection {
    let why = match current {
        Revision(0) => format!("registration {presented} of instance `{instance}` of service `{service}` is over"),
        current => format!(
            "token {presented} of instance `{instance}` of service `{service}` is stale: it is registered under token {current}"
        ),
    };
    Refusal::new(RefusalCode::Fenced, why).fact("presented", presented).fact("token", current).into()
}

fn missing(of: &InstanceRef) -> Rejection {
    let why = format!("service `{}` has no instance `{}`", of.service, of.instance);
    let refusal = Refusal::new(RefusalCode::NotFound, why).fact("service", &of.service);
    refusal.fact("instance", &of.instance).into()
}

fn left(of: &InstanceRef, token: Revision) -> Rejection {
    let why =
        format!("the session of instance `{}` of service `{}` has ended: register it anew", of.instance, of.service);
    // As without a guard, where it would be gone.
    let refusal = Refusal::new(RefusalCode::NotFound, why).fact("service", &of.service);
    refusal.fact("instance", &of.instance).fact("token", token).into()
}

/// As it is told in facts.
fn health_word(health: Health) -> &'static str {
    match health {
        Health::Passing => "passing",
        Health::Warning => "warning",
        Health::Critical => "critical",
        Health::Draining => "draining",
    }
}

fn held_by_other(register: &Register, old: &Instance) -> Rejection {
    let why = format!(
        "instance `{}` of service `{}` is registered by session {} under token {}",
        register.instance, register.service, old.spec.session, old.token
    );
    let refusal = Refusal::new(RefusalCode::Held, why).fact("token", old.token).fact("session", old.spec.session);
    refusal.fact("address", &old.spec.address).into()
}

/// The text, cut at a character's end.
fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
