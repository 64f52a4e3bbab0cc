//! What the clients of a cluster ask of the native primitives: few names, so that they meet, and old tokens, as whoever slept would use them.

use super::node::FIRST_WALL_MS;
use crate::oracle::duties::{SCHEDULE, keeps_apart};
use crate::oracle::retention::{SCOPE, Thing};
use crate::oracle::rollouts;
use crate::oracle::standing::{ELECTION, PERMITS, PERMITS_LOCK, SERVICE};
use crate::random::Random;
use std::collections::BTreeMap;
use tenure_machine::*;

/// What a client was given, and tries again long after it has lost it.
#[derive(Clone, Debug, Default)]
pub(super) struct Given {
    receipts: Vec<Receipt>,
    attempts: Vec<(RecordName, Revision)>,
    holds: Vec<HoldRef>,
    locks: Vec<LockRelease>,
    leads: Vec<Revision>,
    instances: Vec<InstanceRef>,
    /// The newest version of a key that it heard of.
    versions: BTreeMap<Box<str>, u64>,
    /// Keys with candidates and schemas, as they were last told to be.
    rolled: BTreeMap<Box<str>, ConfigAfter>,
    /// With the last change of each.
    pub(super) schedules: BTreeMap<Box<[u8]>, Revision>,
}

/// Who asks, and what it knows of the others.
pub(super) struct Asker<'a> {
    pub(super) number: u64,
    /// Which of the clients.
    pub(super) index: usize,
    pub(super) session: Option<SessionId>,
    pub(super) given: &'a Given,
    /// The sessions of all.
    pub(super) sessions: &'a [SessionId],
    /// The schedules of all.
    pub(super) schedules: &'a [(Box<[u8]>, Revision)],
}

/// How long a client waits that would wait for ever.
const FOREVER_MS: u64 = 6_000;
/// More than these are forgotten, oldest first.
const GIVEN_MAX: usize = 5;

impl Given {
    /// Keeps what an answer gave.
    pub(super) fn learn(&mut self, op: &NativeOp, reply: &NativeReply) {
        match (op, reply) {
            (_, NativeReply::Queue(QueueReply::Received(received))) => {
                for job in &received.jobs {
                    keep(&mut self.receipts, Receipt { id: job.id, token: job.token });
                }
            }
            (
                NativeOp::Idempotency(IdempotencyOp::Begin(begin)),
                NativeReply::Idempotency(IdempotencyReply::Granted(granted)),
            ) => keep(&mut self.attempts, (begin.name.clone(), granted.attempt)),
            (
                NativeOp::Reservation(ReservationOp::Reserve(reserve)),
                NativeReply::Reservation(ReservationReply::Held(held)),
            ) => keep(&mut self.holds, HoldRef { pool: reserve.pool.clone(), id: held.id, token: held.token }),
            (NativeOp::Lock(LockOp::Acquire(ask)), NativeReply::Lock(LockReply::Granted(granted))) => {
                for part in &granted.locks {
                    let (name, owner) = (part.name.clone(), ask.owner.clone());
                    let (session, token) = (granted.session, granted.token);
                    keep(&mut self.locks, LockRelease { name, session, token, owner });
                }
            }
            (_, NativeReply::Election(ElectionReply::Elected(elected))) => keep(&mut self.leads, elected.token),
            (
                NativeOp::Registry(RegistryOp::Register(register)),
                NativeReply::Registry(RegistryReply::Registered(registered)),
            ) => {
                let (service, instance) = (register.service.clone(), register.instance.clone());
                keep(&mut self.instances, InstanceRef { service, instance, token: registered.token });
            }
            (NativeOp::Config(op), NativeReply::Config(ConfigReply::Changed(after)))
                if rollouts::KEYS.contains(&rollouts::key(op)) =>
            {
                self.rolled.insert(rollouts::key(op).into(), *after);
            }
            (
                NativeOp::Config(ConfigOp::Publish(ConfigPublish { note, .. }) | ConfigOp::Rollback((note, _))),
                NativeReply::Config(ConfigReply::Changed(after)),
            ) => drop(self.versions.insert(note.key.clone(), after.version)),
            (NativeOp::Schedule(op), NativeReply::Schedule(reply)) => self.learn_schedule(op, reply),
            _ => {}
        }
    }
}

impl Given {
    fn learn_schedule(&mut self, op: &ScheduleOp, reply: &ScheduleReply) {
        let changed = match reply {
            ScheduleReply::Stored(stored) => stored.changed,
            ScheduleReply::Done(changed) => *changed,
            _ => Revision(0),
        };
        match op {
            ScheduleOp::Put(SchedulePut { name, .. }) => drop(self.schedules.insert(name.clone(), changed)),
            ScheduleOp::Pause(of) | ScheduleOp::Resume(of) => drop(self.schedules.insert(of.name.clone(), changed)),
            ScheduleOp::Delete(of) => drop(self.schedules.remove(&of.name)),
            ScheduleOp::Run(_) | ScheduleOp::Tick(_) => {}
        }
    }
}

fn keep<T>(kept: &mut Vec<T>, one: T) {
    if kept.len() == GIVEN_MAX {
        kept.remove(0);
    }
    kept.push(one);
}

fn name(what: &str, random: &mut Random) -> String {
    format!("{what}{}", random.below(2))
}

fn bytes(text: String) -> Box<[u8]> {
    text.into_bytes().into()
}

/// What a run asks of the primitives. They take turns by the seed, so that all are in any few: each thins out the others, and it is rare
/// meetings that most oracles live on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Focus {
    /// Keys, sessions and plain locks alone.
    Nothing,
    /// A little of everything, beside those.
    Everything,
    /// What is held under a token.
    Rights,
    /// What is done once.
    Work,
    /// What is counted and numbered.
    Numbers,
}

impl Focus {
    pub(super) fn of(seed: u64) -> Self {
        const TURNS: [Focus; 6] =
            [Focus::Nothing, Focus::Rights, Focus::Everything, Focus::Work, Focus::Nothing, Focus::Numbers];
        TURNS[(seed % TURNS.len() as u64) as usize]
    }

    /// How often of sixteen times.
    fn share(self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Everything => 6,
            Self::Rights | Self::Work | Self::Numbers => 13,
        }
    }

    /// Of counters, sequences, pools, configuration; queues, idempotency, markers; locks, elections, instances; schedules.
    fn weights(self) -> [u64; 11] {
        match self {
            Self::Nothing | Self::Everything => [2, 1, 4, 2, 6, 4, 2, 5, 3, 2, 1],
            Self::Rights => [0, 0, 0, 0, 0, 0, 0, 8, 6, 3, 0],
            Self::Work => [0, 0, 0, 0, 6, 5, 3, 0, 0, 0, 2],
            Self::Numbers => [2, 1, 5, 4, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    /// Whether there is something that whoever leads does of itself.
    pub(super) fn has_duties(self) -> bool {
        let [.., instances, schedules] = self.weights();
        self.share() > 0 && instances + schedules > 0
    }
}

/// One or two operations of primitives in one transaction, if it is their turn.
pub(super) fn draw(focus: Focus, asker: &Asker<'_>, random: &mut Random) -> Option<Txn> {
    if focus == Focus::Nothing || !random.chance(focus.share(), 16) {
        return None;
    }
    let (number, given, coin) = (asker.number, asker.given, random.coin());
    Some(match (random.weighted(&focus.weights()), asker.session) {
        (0, _) => Txn::of(add(random)),
        (1, _) => Txn::of(
            CounterOp::Next(SequenceNext { name: bytes(name("s", random)), block: random.between(1, 5), at_least: 0 })
                .into(),
        ),
        (2, _) if !given.holds.is_empty() && coin => {
            let hold = random.pick(&given.holds).clone();
            Txn::of(if random.coin() { ReservationOp::Cancel(hold) } else { ReservationOp::Confirm(hold) }.into())
        }
        (2, _) => Txn::of(reserve(asker, random).into()),
        (3, _) if coin => Txn::of(roll_out(asker, random).into()),
        (3, _) => Txn::of(configure(asker, random).into()),
        (4, _) if !given.receipts.is_empty() && coin => settle(number, random.pick(&given.receipts).clone(), random),
        (4, _) if random.coin() => Txn::of(enqueue(number, random).into()),
        (4, _) => Txn::of(QueueOp::Receive(receive(random)).into()),
        (5, _) if !given.attempts.is_empty() && coin => {
            let (name, attempt) = random.pick(&given.attempts).clone();
            finish(number, name, attempt, random)
        }
        (5, _) => Txn::of(IdempotencyOp::Begin(begin(random)).into()),
        (6, _) => Txn::of(mark(number, random).into()),
        (7, _) if !given.locks.is_empty() && coin => hold(random.pick(&given.locks).clone(), random),
        (7, _) if random.chance(1, 10) => {
            let permits = *random.pick(&[2, PERMITS, PERMITS, 4]);
            Txn::of(LockOp::Resize(LockResize { name: PERMITS_LOCK.into(), permits }).into())
        }
        (7, Some(session)) => Txn::of(acquire(asker, session, random).into()),
        (8, Some(session)) => Txn::of(elect(asker, session, random).into()),
        (9, Some(session)) => Txn::of(instance(asker, session, random).into()),
        (10, _) => Txn::of(schedule(asker, random).into()),
        // Who has no session yet makes one, or does without.
        _ => return None,
    })
}

fn add(random: &mut Random) -> Op {
    CounterOp::Add(CounterAdd { name: bytes(name("c", random)), delta: 1, min: None, max: None }).into()
}

/// Readers and writers of one lock, permits of another, or some of both at once.
fn acquire(asker: &Asker<'_>, session: SessionId, random: &mut Random) -> LockOp {
    let mode = if random.chance(1, 3) { HoldMode::Exclusive } else { HoldMode::Shared };
    let rw = LockItem { name: b"rw"[..].into(), mode };
    let of = *random.pick(&[2, PERMITS, PERMITS, PERMITS, 4]);
    let permits = Permits { count: random.between(1, 2) as u32, of };
    let permits = LockItem { name: PERMITS_LOCK.into(), mode: HoldMode::Permits(permits) };
    let (number, mut priority) = (asker.number, random.weighted(&[4, 1, 1]) as i32 - 1);
    let (locks, owner) = match random.below(8) {
        0 => (vec![rw, permits], format!("many{number}p{priority}")),
        // It comes back under this name to what is kept for it, and takes again what it has.
        1 | 2 => {
            priority = 0;
            (vec![rw], format!("same{}", asker.index))
        }
        3..=5 => (vec![rw], format!("c{number}p{priority}")),
        _ => (vec![permits], format!("c{number}p{priority}")),
    };
    LockOp::Acquire(Box::new(LockAsk {
        reentrant: owner.starts_with("same"),
        locks,
        session,
        create: None,
        owner: owner.into_bytes().into(),
        wait: *random.pick(&[Wait::None, Wait::None, Wait::Ms(500), Wait::Ms(2_000), Wait::Forever]),
        priority,
        delay_ms: *random.pick(&[0, 0, 1_500]),
        min_hold_ms: *random.pick(&[0, 0, 0, 700]),
        on_deadlock: *random.pick(&[OnDeadlock::Newcomer, OnDeadlock::LowestPriority, OnDeadlock::Youngest]),
    }))
}

/// What is done under the token of a lock, be it an old one: a guarded write, its release, or that an operator takes it away.
fn hold(release: LockRelease, random: &mut Random) -> Txn {
    match random.below(8) {
        0 => {
            let LockRelease { name, token, .. } = release;
            let force = LockForceRelease { name, token, session: SessionId(0), reason: "simulated".into() };
            Txn::of(LockOp::ForceRelease(force).into())
        }
        1..=3 => Txn::of(LockOp::Release(release).into()),
        _ => {
            let requires = vec![RequireLock { name: release.name, token: release.token }];
            Txn { requires, ..Txn::of(add(random)) }
        }
    }
}

fn elect(asker: &Asker<'_>, session: SessionId, random: &mut Random) -> ElectionOp {
    let name: Box<[u8]> = ELECTION.into();
    let value = asker.number.to_be_bytes()[..].into();
    let leads = &asker.given.leads;
    match random.below(7) {
        0 | 1 if !leads.is_empty() => ElectionOp::Proclaim(Proclaim { name, token: *random.pick(leads), value }),
        2 | 3 if !leads.is_empty() => {
            let others: Vec<SessionId> = asker.sessions.iter().copied().filter(|other| *other != session).collect();
            let to = if others.is_empty() || random.coin() { SessionId(0) } else { *random.pick(&others) };
            ElectionOp::Resign(Resign { name, token: *random.pick(leads), to })
        }
        _ => {
            let priority = random.weighted(&[1, 3, 1]) as i32 - 1;
            let wait = *random.pick(&[CampaignWait::None, CampaignWait::Ms(2_000), CampaignWait::Forever]);
            ElectionOp::Campaign(Campaign { name, session, value, priority, wait })
        }
    }
}

fn instance(asker: &Asker<'_>, session: SessionId, random: &mut Random) -> RegistryOp {
    let known = &asker.given.instances;
    if !known.is_empty() && random.chance(2, 3) {
        let of = random.pick(known).clone();
        return match random.below(6) {
            0 => RegistryOp::Deregister(of),
            1 | 2 => RegistryOp::Drain(Drain { of, draining: random.coin() }),
            _ => RegistryOp::Heartbeat(Heartbeat { of, health: Health::Passing, why: "".into() }),
        };
    }
    // Some are there without a session, and probed.
    let probed = random.coin();
    let instance: Box<str> = name(if probed { "a" } else { "i" }, random).into();
    let own = known.iter().rev().find(|of| of.instance == instance).map(|of| of.token);
    let replaces = own.filter(|_| random.coin()).unwrap_or_default();
    let active = ActiveCheck {
        probe: Probe::Tcp,
        port: 0,
        interval_ms: 1_000,
        timeout_ms: 1_000,
        failures_before_critical: 1,
        success_before_passing: 1,
    };
    let spec = InstanceSpec {
        address: "10.0.0.1".into(),
        port: random.between(1, 2) as u32,
        tags: Vec::new(),
        meta: Vec::new(),
        weight: 1,
        session: if probed { SessionId(0) } else { session },
        check: if probed { Check::Active(active) } else { Check::Ttl(2_000) },
        deregister_after_ms: if probed { 24 * 3_600_000 } else { 60_000 },
    };
    RegistryOp::Register(Box::new(Register { service: SERVICE.into(), instance, spec: Box::new(spec), replaces }))
}

/// Published on what was heard of last, which may be old, or on whatever there is; or an earlier version once more.
fn configure(asker: &Asker<'_>, random: &mut Random) -> ConfigOp {
    let key: Box<str> = name("conf", random).into();
    let newest = asker.given.versions.get(&key).copied().unwrap_or(0);
    let expect = random.chance(3, 4).then_some(newest);
    let (author, comment) = Default::default();
    let note = ConfigNote { key, expect, author, comment, time_ms: 0, checked_by: 0 };
    if newest > 0 && random.chance(1, 4) {
        return ConfigOp::Rollback((note, random.between(1, newest)));
    }
    let content = asker.number.to_be_bytes()[..].into();
    ConfigOp::Publish(ConfigPublish { note, media: "".into(), digest: [0; 32], content, rollout: None })
}

/// Everything that can be done to a key, on what was heard of last.
fn roll_out(asker: &Asker<'_>, random: &mut Random) -> ConfigOp {
    let key: Box<str> = (*random.pick(&rollouts::KEYS)).into();
    let known = asker.given.rolled.get(&key).copied();
    let known = known.unwrap_or(ConfigAfter { version: 0, current: 0, candidate: 0, schema: 0 });
    let zone = (*random.pick(&rollouts::ZONES)).into();
    let labels = if random.chance(1, 3) { vec![("zone".into(), zone)] } else { Vec::new() };
    let rollout = Rollout { share: *random.pick(&[0, 1_000, 3_000, 6_000, ROLLOUT_ALL]), labels };
    if known.candidate > 0 && random.chance(3, 4) {
        let at = ConfigAt { key: key.clone(), version: known.candidate };
        return match random.below(6) {
            0 => ConfigOp::Promote(at),
            1 => ConfigOp::Abort(at),
            _ => ConfigOp::Stage(ConfigStage { key, version: known.candidate, rollout }),
        };
    }
    let (author, comment) = Default::default();
    let expect = random.chance(1, 2).then_some(known.current);
    let note = ConfigNote { key: key.clone(), expect, author, comment, time_ms: 0, checked_by: 0 };
    match random.below(16) {
        0 => ConfigOp::Delete(note),
        1 => ConfigOp::Purge(ConfigAt { key, version: known.version.max(known.current) }),
        2..=4 => {
            let text = random.pick(&[None, Some(rollouts::EVEN), Some(rollouts::ODD)]).map(Into::into);
            ConfigOp::SetSchema(ConfigSchemaSet { key, expect: None, checked: 0, text })
        }
        5 | 6 if known.version > 0 => ConfigOp::Rollback((note, random.between(1, known.version))),
        drawn => {
            let content = asker.number.to_be_bytes()[..].into();
            let rollout = (drawn > 9 && known.current > 0).then_some(rollout);
            ConfigOp::Publish(ConfigPublish { note, media: "".into(), digest: [0; 32], content, rollout })
        }
    }
}

/// What a door does before it proposes: it checks contents by the schema that its member has, and says by which. Whether it proposes.
pub(super) fn check_at_the_door(machine: &Machine, txn: &mut Txn, bug: Option<NativeBug>) -> bool {
    let Some(Op::Native(op)) = txn.then.first_mut() else { return true };
    let NativeOp::Config(op) = &mut **op else { return true };
    let Some(config) = machine.object::<Config>(NS, rollouts::key(op).as_bytes()) else { return true };
    let (schema, number) = (config.schema.as_ref(), config.schema.as_ref().map_or(0, |schema| schema.number));
    let fits = match op {
        ConfigOp::Publish(publish) => {
            publish.note.checked_by = number;
            rollouts::fits(&publish.content, schema)
        }
        ConfigOp::Rollback((note, to)) => {
            note.checked_by = number;
            let old = machine.config_version(NS, &note.key, *to);
            old.is_none_or(|old| rollouts::fits(&old.content, schema))
        }
        ConfigOp::SetSchema(set) => {
            let text = set.text.clone();
            let schema = text.map(|text| ConfigSchema { number: 0, revision: Revision(0), text });
            set.checked = config.current.as_ref().map_or(0, |current| current.number);
            config.current.as_ref().is_none_or(|current| rollouts::fits(&current.content, schema.as_ref()))
        }
        _ => true,
    };
    fits || bug == Some(NativeBug::SkipSchema)
}

/// A new one, or another plan, a pause or the end of one that somebody has made.
fn schedule(asker: &Asker<'_>, random: &mut Random) -> ScheduleOp {
    let put = |name: Box<[u8]>, expect, random: &mut Random| {
        let number = name.strip_prefix(SCHEDULE.as_bytes()).and_then(|n| std::str::from_utf8(n).ok()?.parse().ok());
        let plan = SchedulePlan {
            calendar: format!("@every {}s", random.between(1, 2)).into(),
            zone: "".into(),
            queue: b"q"[..].into(),
            job: new_job(asker.number),
            missed: *random.pick(&[Missed::Skip, Missed::RunOnce]),
            grace_ms: *random.pick(&[300, 60_000]),
            no_overlap: number.is_some_and(keeps_apart),
        };
        ScheduleOp::Put(SchedulePut { name, plan, expect: Some(expect) })
    };
    let known = asker.schedules;
    if known.is_empty() || (known.len() < 4 && random.chance(1, 4)) {
        return put(bytes(format!("{SCHEDULE}{}", asker.number)), Revision(0), random);
    }
    let (name, changed) = random.pick(known).clone();
    let of = ScheduleName { name: name.clone() };
    match random.below(14) {
        0 => ScheduleOp::Delete(of),
        1 => ScheduleOp::Run(of),
        2..=5 => ScheduleOp::Pause(of),
        6..=10 => ScheduleOp::Resume(of),
        // What is deleted is not made anew under its name.
        _ => put(name, changed.max(Revision(1)), random),
    }
}

fn new_job(number: u64) -> NewJob {
    NewJob {
        payload: number.to_be_bytes()[..].into(),
        delay_ms: 0,
        run_at_ms: None,
        priority: 0,
        terms: None,
        on_duplicate: OnDuplicate::ReturnExisting,
    }
}

/// An effect that several want to have had.
fn mark(number: u64, random: &mut Random) -> MarkerOp {
    let (name, by): (Box<str>, _) = (format!("effect={}", random.below(4)).into(), number.to_string().into());
    let retention_ms = Thing::Marker(name.clone()).kept_ms();
    MarkerOp::Once(MarkOnce { name, by, retention_ms, result: Box::default() })
}

fn enqueue(number: u64, random: &mut Random) -> QueueOp {
    let group = random.coin().then(|| b"g"[..].into());
    let job = NewJob {
        delay_ms: if random.chance(1, 4) { random.below(2_000) } else { 0 },
        priority: random.below(3) as i32 - 1,
        terms: group.is_some().then(|| JobTerms { group, max_attempts: 1_000, ..JobTerms::default() }.into()),
        ..new_job(number)
    };
    QueueOp::Enqueue(Enqueue { queue: b"q"[..].into(), jobs: vec![job] })
}

fn receive(random: &mut Random) -> Receive {
    Receive {
        queues: vec![b"q"[..].into()],
        groups: Vec::new(),
        max: random.between(1, 3) as u32,
        wait_ms: *random.pick(&[0, 0, 500, 3_000]),
        visibility_ms: random.between(1_000, 4_000),
        worker: "simulated".into(),
        receiver: Box::default(),
        settled: Vec::new(),
    }
}

/// The receipt is used once more: done with its effect marked, given back, or kept for longer.
fn settle(number: u64, receipt: Receipt, random: &mut Random) -> Txn {
    match random.below(6) {
        0 => {
            let nack = Nack { receipt, delay_ms: Some(random.below(500)), reason: "simulated".into(), dead: false };
            Txn::of(QueueOp::Nack(nack).into())
        }
        1 => Txn::of(QueueOp::Heartbeat(JobHeartbeat { receipt, extend_ms: 2_000, progress: None }).into()),
        2 => {
            let ack = Ack { receipt, result: Box::default() };
            let receive = Some(Box::new(receive(random)));
            Txn::of(QueueOp::Ack(AckJobs { acks: vec![ack], each: false, receive }).into())
        }
        _ => {
            let name = format!("job={}-{}", receipt.id.revision, receipt.id.index).into();
            let by = number.to_string().into();
            let once = MarkerOp::Once(MarkOnce { name, by, retention_ms: 0, result: Box::default() });
            let ack = Ack { receipt, result: Box::default() };
            let ack = QueueOp::Ack(AckJobs { acks: vec![ack], each: false, receive: None });
            Txn { then: vec![ack.into(), once.into()], ..Txn::default() }
        }
    }
}

/// The keys of some may be taken over from a dead attempt, those of others wait for a decision.
fn begin(random: &mut Random) -> AttemptBegin {
    let takeover = random.chance(2, 3);
    let key = name(if takeover { "i" } else { "n" }, random);
    AttemptBegin {
        name: RecordName::new(SCOPE, &key),
        fingerprints: Vec::new(),
        lease_ms: random.between(1_000, 4_000),
        retention_ms: Thing::Key(key.into()).kept_ms(),
        wait_ms: *random.pick(&[0, 0, 1_000]),
        takeover,
    }
}

fn finish(number: u64, name: RecordName, attempt: Revision, random: &mut Random) -> Txn {
    Txn::of(
        match random.below(8) {
            0 => IdempotencyOp::Fail(AttemptFail { name, attempt, last: None }),
            1 => IdempotencyOp::Reconcile(AttemptReconcile { name, attempt, decision: AttemptDecision::Release }),
            2 | 3 => {
                let lease_ms = random.between(1_000, 3_000);
                IdempotencyOp::Heartbeat(AttemptHeartbeat { name, attempt, lease_ms, takeover: None })
            }
            _ => {
                let body = ResultBody::Kept(number.to_be_bytes()[..].into());
                let result = PackedResult::new(&StoredResult { status: 200, headers: Vec::new(), body });
                IdempotencyOp::Complete(AttemptComplete { name, attempt, result })
            }
        }
        .into(),
    )
}

/// What a client asks for twice, to see that it is done once.
pub(super) fn once_more(random: &mut Random) -> Txn {
    let next = SequenceNext { name: b"again"[..].into(), block: random.between(1, 5), at_least: 0 };
    Txn { request: Some(RequestId::Uuid(random.bytes())), ..Txn::of(CounterOp::Next(next).into()) }
}

fn reserve(asker: &Asker<'_>, random: &mut Random) -> ReservationOp {
    let pool: Box<str> = name("p", random).into();
    match random.below(8) {
        0 | 1 => return ReservationOp::Create(PoolCreate { pool, capacity: 5 }),
        2 => return ReservationOp::Return(PoolAmount { pool, quantity: random.between(1, 2) }),
        _ => {}
    }
    ReservationOp::Reserve(Reserve {
        pool,
        quantity: random.between(1, 3),
        hold_ms: random.between(1_000, 4_000),
        session: asker.session.filter(|_| random.coin()).unwrap_or_default(),
        owner: format!("call {}", asker.number).into(),
        wait_ms: Some(*random.pick(&[0, 1_500])),
    })
}

/// The operations of primitives in a transaction, with what each was answered.
pub(super) fn answered<'a>(
    txn: &'a Txn,
    results: &'a [OpReply],
) -> impl Iterator<Item = (&'a NativeOp, &'a NativeReply)> {
    txn.then.iter().zip(results).filter_map(|(op, reply)| match (op, reply) {
        (Op::Native(op), OpReply::Native(reply)) => Some((&**op, &**reply)),
        _ => None,
    })
}

/// The locks that were given back whole.
pub(super) fn released<'a>(txn: &'a Txn, results: &'a [OpReply]) -> impl Iterator<Item = &'a LockRelease> {
    txn.then.iter().zip(results).filter_map(|(op, reply)| match (op, reply) {
        (Op::Native(op), OpReply::LockReleased) => match &**op {
            NativeOp::Lock(LockOp::Release(release)) => Some(release),
            _ => None,
        },
        _ => None,
    })
}

pub(super) fn asked(txn: &Txn) -> impl Iterator<Item = &NativeOp> {
    txn.then.iter().filter_map(|op| match op {
        Op::Native(op) => Some(&**op),
        _ => None,
    })
}

/// How long it may rightly wait for its answer.
pub(super) fn wait_ms(txn: &Txn) -> u64 {
    let waits = asked(txn).map(|op| match op {
        NativeOp::Queue(QueueOp::Receive(receive)) => receive.wait_ms,
        NativeOp::Queue(QueueOp::Ack(acks)) => acks.receive.as_ref().map_or(0, |receive| receive.wait_ms),
        NativeOp::Idempotency(IdempotencyOp::Begin(begin)) => begin.wait_ms,
        NativeOp::Reservation(ReservationOp::Reserve(reserve)) => reserve.wait_ms.unwrap_or(0),
        NativeOp::Lock(LockOp::Acquire(ask)) => match ask.wait {
            Wait::None => 0,
            Wait::Ms(ms) => ms,
            Wait::Forever => FOREVER_MS,
        },
        NativeOp::Election(ElectionOp::Campaign(campaign)) => match campaign.wait {
            CampaignWait::None => 0,
            CampaignWait::Ms(ms) => ms,
            CampaignWait::Forever => FOREVER_MS,
        },
        _ => 0,
    });
    waits.max().unwrap_or(0)
}

/// What a door does wrong on purpose, to see that an oracle notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NativeBug {
    /// It puts the newest token in the place of the one that it was given.
    NewestToken,
    /// As above, for proclamations alone.
    NewestLeader,
    /// As above, for instances alone.
    NewestInstance,
    /// Permits are told by their count, not by their places.
    SlotsByCount,
    /// A reader that does not get a lock is told that it has it.
    ReaderBeside,
    /// It publishes whatever the version is.
    PublishAnyway,
    /// Whoever resigns for somebody resigns for anybody.
    ResignToAnybody,
    /// With a clock of the wall that jumped it takes markers for old ones and clears them away.
    SweepByWall,
    /// A result that came is told to have been too late.
    RefuseResults,
    /// Who cancels a part of a pool after its confirmation is told that it did.
    CancelConfirmed,
    /// It publishes what breaks the schema.
    SkipSchema,
    /// It gives a candidate to everybody.
    StageAll,
    /// It changes the number of permits to one more.
    OneMore,
    /// What is to be kept is kept for the shortest time that there is.
    ShortRetention,
    /// The moment of a look at the clock is taken for the tick of a schedule.
    TickByClock,
    /// A tick of a schedule that is paused resumes it.
    ResumeByTick,
    /// Jobs of a schedule are not kept apart.
    Overlap,
    /// One member alone does what whoever leads does of itself.
    OneRunner,
    /// A report on an instance is given out for one of the newest term.
    NewestTerm,
}

const NS: NamespaceId = NamespaceId::DEFAULT;

/// What a door with a bug makes of a request, and what it asks for before.
pub(super) fn spoil_request(bug: NativeBug, machine: &Machine, wall_ms: u64, txn: &mut Txn) -> Vec<Txn> {
    let jumped = wall_ms > FIRST_WALL_MS + 60_000;
    if bug == NativeBug::NewestToken && asked(txn).next().is_some() {
        for require in &mut txn.requires {
            let newest = machine.lock(NS, &require.name).map(|lock| lock.newest);
            require.token = newest.unwrap_or(require.token);
        }
    }
    let mut first = Vec::new();
    let ops = txn.then.iter_mut().filter_map(|op| match op {
        Op::Native(op) => Some(&mut **op),
        _ => None,
    });
    for op in ops {
        match (bug, op) {
            (NativeBug::NewestLeader, NativeOp::Election(ElectionOp::Proclaim(proclaim))) => {
                let leader = machine.election(NS, &proclaim.name, 0).leader;
                proclaim.token = leader.map_or(proclaim.token, |leader| leader.token);
            }
            (
                NativeBug::NewestInstance,
                NativeOp::Registry(RegistryOp::Heartbeat(Heartbeat { of, .. }) | RegistryOp::Drain(Drain { of, .. })),
            ) => {
                let instance = machine.instance(NS, &of.service, &of.instance);
                of.token = instance.map_or(of.token, |instance| instance.token);
            }
            (NativeBug::PublishAnyway, NativeOp::Config(ConfigOp::Publish(publish))) => publish.note.expect = None,
            (NativeBug::ResignToAnybody, NativeOp::Election(ElectionOp::Resign(resign))) => resign.to = SessionId(0),
            (NativeBug::SweepByWall, NativeOp::Marker(MarkerOp::Once(once))) if jumped => {
                let (name, reason) = (once.name.clone(), "old".into());
                first.push(Txn::of(MarkerOp::Delete(MarkerDelete { name, token: Revision(0), reason }).into()));
            }
            (NativeBug::StageAll, NativeOp::Config(ConfigOp::Stage(stage))) => stage.rollout.share = ROLLOUT_ALL,
            (NativeBug::OneMore, NativeOp::Lock(LockOp::Resize(resize))) => resize.permits += 1,
            (NativeBug::ShortRetention, NativeOp::Idempotency(IdempotencyOp::Begin(begin))) => {
                begin.retention_ms = 60_000;
            }
            (NativeBug::ShortRetention, NativeOp::Marker(MarkerOp::Once(once))) => {
                once.retention_ms = MARKER_RETENTION_MIN_MS;
            }
            (NativeBug::TickByClock, NativeOp::Schedule(ScheduleOp::Tick(tick))) => {
                tick.at = wall_ms.clamp(tick.at, tick.next - 1);
            }
            (NativeBug::ResumeByTick, NativeOp::Schedule(ScheduleOp::Tick(tick)))
                if machine.object::<Schedule>(NS, &tick.name).is_some_and(|schedule| schedule.paused) =>
            {
                let of = ScheduleName { name: tick.name.clone() };
                first.push(Txn::of(ScheduleOp::Resume(of).into()));
            }
            (NativeBug::Overlap, NativeOp::Schedule(ScheduleOp::Put(put))) => put.plan.no_overlap = false,
            (NativeBug::NewestTerm, NativeOp::Registry(RegistryOp::Probed(probed))) => {
                probed.term = machine.position().term.0;
            }
            _ => {}
        }
    }
    first
}

/// What a door with a bug makes of an answer.
pub(super) fn spoil_answer(bug: NativeBug, txn: &Txn, reply: &mut Reply) {
    let Some(op) = asked(txn).next() else { return };
    let at = reply.revision;
    match (bug, op, &mut reply.result) {
        (NativeBug::SlotsByCount, NativeOp::Lock(LockOp::Acquire(_)), Ok(result)) => {
            if let Some(OpReply::Native(answer)) = result.results.first_mut()
                && let NativeReply::Lock(LockReply::Granted(granted)) = &mut **answer
            {
                granted.locks.iter_mut().for_each(|part| part.slots = (0..part.slots.len() as u32).collect());
            }
        }
        (
            NativeBug::ReaderBeside,
            NativeOp::Lock(LockOp::Acquire(ask)),
            Err(Rejection::Held { .. } | Rejection::TimeoutWaiting { .. }),
        ) if ask.locks[0].mode == HoldMode::Shared => {
            let locks = vec![LockPart { name: ask.locks[0].name.clone(), mode: HoldMode::Shared, slots: Vec::new() }];
            let granted =
                LockGranted { token: at, session: ask.session, session_token: 0, ttl_ms: 1_000, depth: 1, locks };
            let results = vec![LockReply::Granted(granted).into()];
            reply.result = Ok(TxnReply { succeeded: true, results });
        }
        (NativeBug::RefuseResults, NativeOp::Idempotency(IdempotencyOp::Complete(_)), result @ Ok(_)) => {
            *result = Err(Refusal::new(RefusalCode::Fenced, "it is too late").into());
        }
        (NativeBug::CancelConfirmed, NativeOp::Reservation(ReservationOp::Cancel(hold)), result @ Err(_)) => {
            let pool = Pool { capacity: 5, held: 0, confirmed: 0, granted: 1, created: Revision(1) };
            let after = HoldAfter { id: hold.id, state: HoldState::Cancelled, quantity: 1, left_ms: 0, pool };
            let results = vec![ReservationReply::Hold(after).into()];
            *result = Ok(TxnReply { succeeded: true, results });
        }
        _ => {}
    }
}
