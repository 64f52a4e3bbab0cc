//! What the native primitives owe, judged from the answers that clients got.
//!
//! Promises. Every commit has a revision of its own, so the answers have one order, whoever heard them. In it: a counter that is only added to
//! rises by what was added, acknowledged additions all, unknown ones at most once; no number of a sequence is given out twice; a job is in one
//! pair of hands, under tokens and attempts that only rise, is not given out after an ack that was accepted, and jobs of one group follow one
//! another; an effect is marked once; an idempotency key is granted to one attempt at a time, its result is the one that was
//! completed first, and whoever asks again gets those bytes; one that forbids takeover is followed by nobody before somebody ends it, and its own
//! late result is taken; what of a pool is confirmed was confirmed once each. What is held under a token is for `rights.rs`, versions of
//! configuration are for `versions.rs`, and what members hold at any time is for `standing.rs`.
//! Not promised. Anything about operations that nobody was told of, but that they happen at most once.
//! Relies on. Clients that add one at a time, whose jobs of one group are enqueued with numbers, and that tell here whenever an
//! outcome stays unknown. What comes back under a name after its retention (`retention.rs`) is judged as something else.

use super::duties::Duties;
use super::retention::{Retention, Thing as Kept};
use super::rights::{Grant, Rights, Thing};
use super::rollouts::{self, Rollouts};
use super::standing::{ELECTION, SERVICE, Standing};
use super::versions::Versions;
use std::collections::{BTreeMap, BTreeSet};
use tenure_machine::*;

/// A counter that everybody adds one to.
#[derive(Default)]
struct Count {
    /// What it was after an acknowledged addition, by the revision of that.
    seen: BTreeMap<u64, i64>,
    unknown: i64,
}

/// The numbers of a sequence that a commit gave, from and to, by its revision.
type Given = BTreeMap<u64, (u64, u64)>;

/// What is known of one job.
#[derive(Debug, Default)]
struct Seen {
    group: Option<Vec<u8>>,
    /// By token: the attempt, and the call that heard of it.
    deliveries: BTreeMap<u64, (u32, u64)>,
    /// The token under which it was acknowledged.
    acknowledged: Option<u64>,
}

/// What is known of one idempotency key.
#[derive(Debug, Default)]
struct Once {
    /// By token of the attempt: its number, and the call that heard of it.
    granted: BTreeMap<u64, (u32, u64)>,
    /// The result, the attempt that gave it, and the revision at which it was known.
    result: Option<(PackedResult, u64, u64)>,
    /// No attempt may be followed by another before somebody ends it.
    stays: bool,
    /// Attempts that somebody has asked to end without a result.
    freed: BTreeSet<u64>,
    /// Attempts whose completion was refused as fenced, with the result that each had.
    refused: Vec<(u64, PackedResult)>,
}

/// What became of a part of a pool.
#[derive(Debug)]
struct Part {
    token: u64,
    call: u64,
    quantity: u64,
    became: Option<HoldState>,
}

/// What is known of one pool.
#[derive(Debug, Default)]
struct Parts {
    /// By number.
    granted: BTreeMap<u64, Part>,
    returned: u64,
    unknown_confirmed: u64,
    unknown_returned: u64,
}

#[derive(Default)]
pub struct Primitives {
    /// The step that is played.
    pub step: u64,
    rights: Rights,
    standing: Standing,
    versions: Versions,
    rollouts: Rollouts,
    duties: Duties,
    retention: Retention,
    /// Who was to lead, under which revision, by the resignation of which token.
    named: Vec<(u64, u64, SessionId)>,
    /// How often it was asked for: one that is said again names nobody.
    resigned: BTreeMap<u64, u32>,
    pools: BTreeMap<Box<str>, Parts>,
    /// Who put a marker, as those who came later were told, and the token.
    told: BTreeMap<(Box<str>, usize), (Box<str>, u64)>,
    counters: BTreeMap<Box<[u8]>, Count>,
    numbers: BTreeMap<Box<[u8]>, Given>,
    jobs: BTreeMap<JobId, Seen>,
    /// The call that put a marker, and the revision.
    marked: BTreeMap<(Box<str>, usize), (u64, u64)>,
    /// Each life of a key by itself.
    once: BTreeMap<(Box<str>, usize), Once>,
    /// Keys whose begins forbid takeover.
    stays: BTreeSet<Box<str>>,
    /// Keys of which something stayed unknown.
    unclear: BTreeSet<Box<str>>,
    /// How many answers were judged, by primitive.
    pub judged: BTreeMap<&'static str, u64>,
}

impl Primitives {
    /// An operation of call `call` was answered; `at` is the revision of its commit.
    pub fn done(&mut self, call: u64, op: &NativeOp, reply: &NativeReply, at: u64) -> Result<(), String> {
        let (primitive, judged) = match (op, reply) {
            (NativeOp::Counter(op), NativeReply::Counter(reply)) => ("counters", self.counter(op, reply, at)),
            (NativeOp::Queue(op), NativeReply::Queue(reply)) => ("queues", self.queue(call, op, reply)),
            (NativeOp::Marker(op), NativeReply::Marker(reply)) => ("markers", self.marker(call, op, reply, at)),
            (NativeOp::Idempotency(op), NativeReply::Idempotency(reply)) => {
                ("idempotency", self.idempotency(call, op, reply, at))
            }
            (NativeOp::Lock(op), NativeReply::Lock(reply)) => ("locks", self.lock(call, op, reply, at)),
            (NativeOp::Election(op), NativeReply::Election(reply)) => ("elections", self.election(call, op, reply, at)),
            (NativeOp::Registry(op), NativeReply::Registry(reply)) => ("registry", self.registry(call, op, reply, at)),
            (NativeOp::Config(op), NativeReply::Config(_)) if is_rolled_out(op) => {
                self.rollouts.done(op, at);
                ("rollouts", Ok(()))
            }
            (NativeOp::Config(op), NativeReply::Config(ConfigReply::Changed(after))) => {
                ("configuration", self.versions.changed(call, op, after, at))
            }
            (NativeOp::Reservation(op), NativeReply::Reservation(reply)) => ("pools", self.pool(call, op, reply)),
            (NativeOp::Schedule(op), NativeReply::Schedule(reply)) => ("schedules", self.duties.done(op, reply, at)),
            _ => ("others", Ok(())),
        };
        *self.judged.entry(primitive).or_default() += 1;
        judged
    }

    /// Somebody is about to ask for it.
    pub fn asked(&mut self, op: &NativeOp) {
        match op {
            NativeOp::Config(op) if !is_rolled_out(op) => self.versions.asked(op),
            NativeOp::Lock(LockOp::Release(release)) => self.may_end(lock(&release.name), release.token.0),
            NativeOp::Lock(LockOp::ForceRelease(force)) => self.may_end(lock(&force.name), force.token.0),
            NativeOp::Election(ElectionOp::Resign(resign)) => {
                self.may_end(election(), resign.token.0);
                *self.resigned.entry(resign.token.0).or_default() += 1;
                self.standing.named(resign.to);
            }
            NativeOp::Registry(RegistryOp::Register(register)) => {
                self.may_end(instance(&register.instance), register.replaces.0);
                self.rights.asked(instance(&register.instance), register.spec.session);
            }
            NativeOp::Registry(RegistryOp::Deregister(of)) => self.may_end(instance(&of.instance), of.token.0),
            NativeOp::Idempotency(op) => match op {
                IdempotencyOp::Begin(begin) if !begin.takeover => drop(self.stays.insert(begin.name.key.clone())),
                IdempotencyOp::Fail(AttemptFail { name, attempt, .. })
                | IdempotencyOp::Reconcile(AttemptReconcile { name, attempt, .. }) => {
                    self.once(&name.key, attempt.0).freed.insert(attempt.0);
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn may_end(&mut self, thing: Thing, token: u64) {
        if thing.0 == LOCK {
            self.standing.may_end(&thing.1, token);
        }
        self.rights.may_end(thing, token, self.step);
    }

    /// It may have been done, or may still be.
    pub fn unknown(&mut self, op: &NativeOp) {
        match op {
            NativeOp::Counter(CounterOp::Add(add)) => {
                self.counters.entry(add.name.clone()).or_default().unknown += 1;
            }
            NativeOp::Config(op) if !is_rolled_out(op) => self.versions.unknown(op),
            NativeOp::Schedule(op) => self.duties.unknown(op),
            NativeOp::Idempotency(op) => drop(self.unclear.insert(op.name().key.clone())),
            NativeOp::Reservation(ReservationOp::Confirm(hold)) => {
                let parts = self.pools.entry(hold.pool.clone()).or_default();
                parts.unknown_confirmed += parts.granted.get(&hold.id).map_or(0, |part| part.quantity);
            }
            NativeOp::Reservation(ReservationOp::Return(amount)) => {
                self.pools.entry(amount.pool.clone()).or_default().unknown_returned += amount.quantity;
            }
            _ => {}
        }
    }

    /// It was refused, and nothing was done.
    pub fn refused(&mut self, op: &NativeOp, why: &Rejection) {
        if let NativeOp::Idempotency(IdempotencyOp::Complete(complete)) = op
            && let Rejection::Refused(refusal) = why
            && refusal.code == RefusalCode::Fenced
        {
            let once = self.once(&complete.name.key, complete.attempt.0);
            once.refused.push((complete.attempt.0, complete.result.clone()));
        }
    }

    /// A write that this lock guards was done.
    pub fn guarded(&mut self, name: &[u8], token: Revision, at: u64) {
        self.rights.acted(lock(name), token.0, at, "a guarded write");
    }

    /// A member was seen at this revision without the session.
    pub fn session_over(&mut self, session: SessionId, at: u64) {
        self.rights.session_over(session, at, self.step);
    }

    /// What any member holds at any time.
    pub fn look(&mut self, machine: &Machine) -> Result<(), String> {
        self.standing.look(machine)?;
        self.duties.look(machine, SERVICE)?;
        self.retention.look(machine)?;
        self.rollouts.look(machine)?;
        self.versions.look(machine)
    }

    /// What a member holds that has applied everything.
    pub fn finish(&self, machine: &Machine) -> Result<(), String> {
        for (name, count) in &self.counters {
            let value = machine.object::<Counter>(NamespaceId::DEFAULT, name).map_or(0, |counter| counter.value);
            let acknowledged = count.seen.len() as i64;
            if value < acknowledged || value > acknowledged + count.unknown {
                return Err(format!(
                    "counter {} is {value} after {acknowledged} acknowledged additions and {} unknown ones",
                    name.escape_ascii(),
                    count.unknown
                ));
            }
        }
        self.groups_in_order()?;
        self.rights.check()?;
        self.versions.finish(machine)?;
        self.duties.finish()?;
        self.rollouts.finish()?;
        self.standing.finish()?;
        for ((key, _), once) in self.once.iter().filter(|((key, _), _)| !self.unclear.contains(key)) {
            let of_key = Kept::Key(key.clone());
            check_refused(key, once, |attempt| self.retention.is_over(&of_key, attempt))?;
        }
        for (token, at, session) in self.named.iter().filter(|(token, ..)| self.resigned.get(token) == Some(&1)) {
            if self.standing.leaders.get(at).is_some_and(|leader| leader != session) {
                let leaders = &self.standing.leaders;
                return Err(format!("session {session} was to lead under {at} after {token}: {leaders:?}"));
            }
        }
        for (name, parts) in &self.pools {
            let pool = machine.object::<Pool>(NamespaceId::DEFAULT, name.as_bytes());
            parts.check(name, pool.map_or(0, |pool| pool.confirmed))?;
        }
        Ok(())
    }

    // ---- Locks, elections, instances ----

    fn lock(&mut self, call: u64, op: &LockOp, reply: &LockReply, at: u64) -> Result<(), String> {
        match (op, reply) {
            (LockOp::Acquire(ask), LockReply::Granted(granted)) => granted.locks.iter().try_for_each(|part| {
                let owner = ask.owner.to_vec();
                let (session, mode, slots, heard) = (granted.session, part.mode, part.slots.clone(), self.step);
                let grant = Grant { call, session, owner, mode, slots, heard };
                self.rights.granted(lock(&part.name), granted.token.0, grant)
            }),
            (LockOp::Release(release), LockReply::Released(depth)) => {
                self.given_back(&release.name, release.token, *depth == 0, at);
                Ok(())
            }
            (LockOp::ForceRelease(force), LockReply::ForceReleased(1..)) => {
                self.rights.taken(lock(&force.name), force.token.0, at);
                Ok(())
            }
            (LockOp::Resize(resize), LockReply::Resized(before)) => {
                self.standing.resized(at, *before, resize.permits);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A release was accepted.
    pub fn given_back(&mut self, name: &[u8], token: Revision, whole: bool, at: u64) {
        if whole {
            self.rights.ended(lock(name), token.0, at);
        } else {
            self.rights.acted(lock(name), token.0, at, "a release");
        }
    }

    /// What only one has at a time.
    fn alone(&self, call: u64, session: SessionId) -> Grant {
        let (owner, slots) = Default::default();
        Grant { call, session, owner, mode: HoldMode::Exclusive, slots, heard: self.step }
    }

    fn election(&mut self, call: u64, op: &ElectionOp, reply: &ElectionReply, at: u64) -> Result<(), String> {
        match (op, reply) {
            (ElectionOp::Campaign(_), ElectionReply::Elected(elected)) => {
                self.rights.granted(election(), elected.token.0, self.alone(call, elected.session))
            }
            (ElectionOp::Proclaim(proclaim), ElectionReply::Proclaimed(_)) => {
                self.rights.acted(election(), proclaim.token.0, at, "a proclamation");
                Ok(())
            }
            (ElectionOp::Resign(resign), ElectionReply::Resigned) => {
                self.rights.ended(election(), resign.token.0, at);
                if resign.to != SessionId(0) {
                    self.named.push((resign.token.0, at, resign.to));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn registry(&mut self, call: u64, op: &RegistryOp, reply: &RegistryReply, at: u64) -> Result<(), String> {
        match (op, reply) {
            (RegistryOp::Register(register), RegistryReply::Registered(registration)) => {
                let grant = self.alone(call, register.spec.session);
                self.rights.granted(instance(&register.instance), registration.token.0, grant)
            }
            (RegistryOp::Heartbeat(Heartbeat { of, .. }) | RegistryOp::Drain(Drain { of, .. }), _) => {
                self.rights.acted(instance(&of.instance), of.token.0, at, "a word about an instance");
                Ok(())
            }
            (RegistryOp::Deregister(of), RegistryReply::Deregistered(true)) => {
                self.rights.ended(instance(&of.instance), of.token.0, at);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    // ---- Pools ----

    fn pool(&mut self, call: u64, op: &ReservationOp, reply: &ReservationReply) -> Result<(), String> {
        match (op, reply) {
            (ReservationOp::Reserve(reserve), ReservationReply::Held(held)) => {
                let parts = self.pools.entry(reserve.pool.clone()).or_default();
                parts.grant(&reserve.pool, held, call)
            }
            (ReservationOp::Confirm(hold) | ReservationOp::Cancel(hold), ReservationReply::Hold(after)) => {
                let parts = self.pools.entry(hold.pool.clone()).or_default();
                let Some(part) = parts.granted.get_mut(&hold.id) else { return Ok(()) };
                let known = part.became.replace(after.state);
                if known.is_some_and(|known| known != after.state) || part.token != hold.token.0 {
                    return Err(format!("of pool {} {hold:?} became {known:?} and {part:?}", hold.pool));
                }
                Ok(())
            }
            (ReservationOp::Return(amount), _) => {
                self.pools.entry(amount.pool.clone()).or_default().returned += amount.quantity;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    // ---- Counters ----

    fn counter(&mut self, op: &CounterOp, reply: &CounterReply, at: u64) -> Result<(), String> {
        match (op, reply) {
            (CounterOp::Add(add), CounterReply::Counted(counter)) => self.counted(&add.name, counter.value, at),
            (CounterOp::Next(next), CounterReply::Numbers(n)) => self.numbered(&next.name, n.from, n.to, at),
            _ => Ok(()),
        }
    }

    fn counted(&mut self, name: &[u8], value: i64, at: u64) -> Result<(), String> {
        let seen = &mut self.counters.entry(name.into()).or_default().seen;
        let before = seen.range(..at).next_back().is_none_or(|(_, v)| *v < value);
        let after = seen.range(at + 1..).next().is_none_or(|(_, v)| *v > value);
        let same = seen.insert(at, value).is_none_or(|v| v == value);
        if before && after && same {
            return Ok(());
        }
        Err(format!("counter {} is {value} at {at}, among {seen:?}", name.escape_ascii()))
    }

    fn numbered(&mut self, name: &[u8], from: u64, to: u64, at: u64) -> Result<(), String> {
        let given = self.numbers.entry(name.into()).or_default();
        let before = given.range(..at).next_back().is_none_or(|(_, (_, end))| *end <= from);
        let after = given.range(at + 1..).next().is_none_or(|(_, (begin, _))| *begin >= to);
        let same = given.insert(at, (from, to)).is_none_or(|given| given == (from, to));
        if before && after && same && from < to {
            return Ok(());
        }
        Err(format!("sequence {} gives {from} to {to} at {at}, among {given:?}", name.escape_ascii()))
    }

    // ---- Queues ----

    fn queue(&mut self, call: u64, op: &QueueOp, reply: &QueueReply) -> Result<(), String> {
        match (op, reply) {
            (QueueOp::Receive(_), QueueReply::Received(received)) => self.received(call, received),
            (QueueOp::Ack(acks), QueueReply::Received(received)) => {
                for (ack, settled) in acks.acks.iter().zip(&received.settled) {
                    if settled.refusal.is_none() {
                        self.acknowledged(ack.receipt.id, ack.receipt.token.0)?;
                    }
                }
                self.received(call, received)
            }
            // A receipt that was accepted was the current one.
            (QueueOp::Heartbeat(beat), _) => self.check_job(beat.receipt.id),
            _ => Ok(()),
        }
    }

    fn received(&mut self, call: u64, received: &Received) -> Result<(), String> {
        for job in &received.jobs {
            self.duties.given(job)?;
            let seen = self.jobs.entry(job.id).or_default();
            seen.group = job.terms.as_ref().and_then(|terms| terms.group.as_ref().map(|group| group.to_vec()));
            let before = seen.deliveries.insert(job.token.0, (job.attempt, call));
            if let Some(before) = before.filter(|before| *before != (job.attempt, call)) {
                return Err(format!(
                    "delivery {} of job {:?} was heard of by {before:?} and by ({}, {call})",
                    job.token, job.id, job.attempt
                ));
            }
            self.check_job(job.id)?;
        }
        Ok(())
    }

    fn acknowledged(&mut self, id: JobId, token: u64) -> Result<(), String> {
        let seen = self.jobs.entry(id).or_default();
        if seen.acknowledged.is_some_and(|known| known != token) {
            return Err(format!("job {id:?} was acknowledged under {token} too: {seen:?}"));
        }
        seen.acknowledged = Some(token);
        self.check_job(id)
    }

    /// Attempts rise with the tokens, and nothing comes after the ack.
    fn check_job(&self, id: JobId) -> Result<(), String> {
        let Some(seen) = self.jobs.get(&id) else { return Ok(()) };
        let attempts: Vec<u32> = seen.deliveries.values().map(|(attempt, _)| *attempt).collect();
        let last = seen.deliveries.last_key_value().map_or(0, |(token, _)| *token);
        if attempts.is_sorted_by(|a, b| a < b) && seen.acknowledged.is_none_or(|token| last <= token) {
            return Ok(());
        }
        Err(format!("job {id:?} was given out wrongly: {seen:?}"))
    }

    /// Of one group, all deliveries of a job are before those of the next.
    fn groups_in_order(&self) -> Result<(), String> {
        let mut last: BTreeMap<&[u8], (JobId, u64)> = BTreeMap::new();
        for (id, seen) in &self.jobs {
            let (Some(group), Some((first, _))) = (&seen.group, seen.deliveries.first_key_value()) else { continue };
            let newest = seen.deliveries.last_key_value().map_or(0, |(token, _)| *token);
            if let Some((before, token)) = last.insert(group, (*id, newest))
                && token > *first
            {
                let group = group.escape_ascii();
                return Err(format!("of group {group} job {id:?} was given out at {first}, job {before:?} at {token}"));
            }
        }
        Ok(())
    }

    // ---- Markers ----

    fn marker(&mut self, call: u64, op: &MarkerOp, reply: &MarkerReply, at: u64) -> Result<(), String> {
        let MarkerOp::Once(once) = op else { return Ok(()) };
        let (by, token) = match reply {
            MarkerReply::Marked(marked) => (&once.by, marked.token.0),
            MarkerReply::AlreadyDone(done) => (&done.by, done.token.0),
            _ => return Ok(()),
        };
        let of_marker = Kept::Marker(once.name.clone());
        let named = |token| (once.name.clone(), self.retention.life(&of_marker, token));
        let known = self.told.entry(named(token)).or_insert((by.clone(), token));
        if (&known.0, known.1) != (by, token) {
            return Err(format!("marker {} was put by {known:?} and by {by} under {token}", once.name));
        }
        if let MarkerReply::AlreadyDone(_) = reply {
            return Ok(());
        }
        match self.marked.insert(named(token), (call, at)) {
            Some(before) if before != (call, at) => {
                Err(format!("marker {} was put by {before:?} and by {:?}", once.name, (call, at)))
            }
            _ => Ok(()),
        }
    }

    // ---- Idempotency ----

    /// The life of a key that an attempt is of.
    fn once(&mut self, key: &str, attempt: u64) -> &mut Once {
        let (key, stays) = (Box::<str>::from(key), self.stays.contains(key));
        let life = self.retention.life(&Kept::Key(key.clone()), attempt);
        self.once.entry((key, life)).or_insert(Once { stays, ..Once::default() })
    }

    fn idempotency(&mut self, call: u64, op: &IdempotencyOp, reply: &IdempotencyReply, at: u64) -> Result<(), String> {
        match (op, reply) {
            (IdempotencyOp::Begin(begin), IdempotencyReply::Granted(granted)) => {
                let once = self.once(&begin.name.key, granted.attempt.0);
                let before = once.granted.insert(granted.attempt.0, (granted.number, call));
                if before.is_some_and(|before| before != (granted.number, call)) {
                    return Err(format!("attempt {} of {:?} was granted twice", granted.attempt, begin.name));
                }
                check_once(&begin.name.key, once)
            }
            (IdempotencyOp::Begin(begin), IdempotencyReply::Replay(replay)) => {
                let kept_ms = Kept::Key(begin.name.key.clone()).kept_ms();
                if replay.finished_ms >= kept_ms {
                    return Err(format!("{:?} is replayed after {} ms", begin.name, replay.finished_ms));
                }
                let known_at = at.max(replay.attempt.0);
                self.result(&begin.name.key, replay.result.clone(), replay.attempt.0, known_at)
            }
            (IdempotencyOp::Complete(complete), IdempotencyReply::Finished(_)) => {
                self.result(&complete.name.key, complete.result.clone(), complete.attempt.0, at)
            }
            _ => Ok(()),
        }
    }

    fn result(&mut self, key: &str, result: PackedResult, attempt: u64, at: u64) -> Result<(), String> {
        let once = self.once(key, attempt);
        let first = once.result.get_or_insert((result.clone(), attempt, at));
        if (&first.0, first.1) != (&result, attempt) {
            return Err(format!("key {key} has result {result:?} of attempt {attempt}, and had {first:?}"));
        }
        first.2 = first.2.min(at);
        check_once(key, once)
    }
}

const LOCK: &str = "lock";

fn is_rolled_out(op: &ConfigOp) -> bool {
    rollouts::KEYS.contains(&rollouts::key(op))
}

fn lock(name: &[u8]) -> Thing {
    (LOCK, name.to_vec())
}

fn election() -> Thing {
    ("election", ELECTION.to_vec())
}

fn instance(id: &str) -> Thing {
    ("instance", format!("{SERVICE}/{id}").into_bytes())
}

impl Parts {
    fn grant(&mut self, pool: &str, held: &Held, call: u64) -> Result<(), String> {
        let (token, quantity) = (held.token.0, held.quantity);
        let before = self.granted.range(..held.id).next_back().is_none_or(|(_, part)| part.token <= token);
        let after = self.granted.range(held.id + 1..).next().is_none_or(|(_, part)| part.token >= token);
        let part = self.granted.entry(held.id).or_insert(Part { token, call, quantity, became: None });
        if before && after && (part.token, part.call, part.quantity) == (token, call, quantity) {
            return Ok(());
        }
        Err(format!("hold {} of pool {pool} was granted to call {call}: {held:?}, among {self:?}", held.id))
    }

    fn check(&self, name: &str, confirmed: u64) -> Result<(), String> {
        let became = self.granted.values().filter(|part| part.became == Some(HoldState::Confirmed));
        let acknowledged: u64 = became.map(|part| part.quantity).sum();
        let least = acknowledged.saturating_sub(self.returned + self.unknown_returned);
        let most = (acknowledged + self.unknown_confirmed).saturating_sub(self.returned);
        if (least..=most).contains(&confirmed) {
            return Ok(());
        }
        Err(format!("of pool {name} {confirmed} are confirmed after {self:?}"))
    }
}

/// A completion is refused only where something else came of its attempt.
fn check_refused(key: &str, once: &Once, is_over: impl Fn(u64) -> bool) -> Result<(), String> {
    for (attempt, result) in &once.refused {
        let later = once.granted.range(attempt + 1..).next().is_some();
        let other = once.result.as_ref().is_some_and(|known| (&known.0, known.1) != (result, *attempt));
        if !later && !other && !is_over(*attempt) && !once.freed.contains(attempt) {
            return Err(format!(
                "the result of attempt {attempt} of {key} was refused, and nothing had replaced it: {once:?}"
            ));
        }
    }
    Ok(())
}

/// Attempts are numbered in their order, and none is granted once there is a result.
fn check_once(key: &str, once: &Once) -> Result<(), String> {
    let followed = once.granted.keys().rev().skip(1);
    if let Some(attempt) = followed.clone().find(|attempt| once.stays && !once.freed.contains(attempt)) {
        return Err(format!("attempt {attempt} of {key} forbade it, and was followed by another one: {once:?}"));
    }
    let numbers: Vec<u32> = once.granted.values().map(|(number, _)| *number).collect();
    let newest = once.granted.last_key_value().map_or(0, |(token, _)| *token);
    let late = once.result.as_ref().is_some_and(|(_, attempt, _)| newest > *attempt);
    if numbers.is_sorted_by(|a, b| a < b) && !late {
        return Ok(());
    }
    Err(format!("key {key} was granted wrongly: {once:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_that_is_refused_and_an_attempt_that_is_followed_are_noticed() {
        let body = ResultBody::Kept(b"one"[..].into());
        let result = PackedResult::new(&StoredResult { status: 200, headers: Vec::new(), body });
        let mut once = Once { stays: true, refused: vec![(7, result.clone())], ..Once::default() };
        once.granted.insert(7, (1, 1));
        assert!(check_once("k", &once).is_ok());
        assert!(check_refused("k", &once, |_| false).is_err());
        assert!(check_refused("k", &once, |_| true).is_ok(), "its time was over");
        once.result = Some((result, 7, 9));
        assert!(check_refused("k", &once, |_| false).is_err(), "it was taken");
        once.granted.insert(11, (2, 2));
        assert!(check_refused("k", &once, |_| false).is_ok(), "another has followed");
        once.result = None;
        assert!(check_once("k", &once).is_err(), "which it forbids");
        once.freed.insert(7);
        assert!(check_once("k", &once).is_ok());
    }

    #[test]
    fn a_part_that_is_confirmed_and_cancelled_is_noticed() {
        let pool = Pool { capacity: 5, held: 0, confirmed: 0, granted: 1, created: Revision(1) };
        let (id, token, quantity) = (1, Revision(3), 2);
        let held = Held { id, token, quantity, hold_ms: 1_000, waited_ms: 0, pool };
        let hold = || HoldRef { pool: "p".into(), id, token };
        let after = |state| ReservationReply::Hold(HoldAfter { id, state, quantity, left_ms: 0, pool });
        let mut parts = Parts::default();
        parts.grant("p", &held, 1).unwrap();
        assert!(parts.grant("p", &held, 2).is_err(), "one part, two hands");
        let mut all = Primitives { pools: [("p".into(), parts)].into(), ..Primitives::default() };
        all.pool(1, &ReservationOp::Confirm(hold()), &after(HoldState::Confirmed)).unwrap();
        assert!(all.pools["p"].check("p", 2).is_ok());
        assert!(all.pools["p"].check("p", 0).is_err(), "it was lost");
        assert!(all.pools["p"].check("p", 4).is_err(), "it was confirmed twice");
        assert!(all.pool(1, &ReservationOp::Cancel(hold()), &after(HoldState::Cancelled)).is_err());
    }

    #[test]
    fn numbers_given_twice_and_lost_additions_are_noticed() {
        let mut all = Primitives::default();
        assert!(all.numbered(b"s", 1, 4, 10).is_ok());
        assert!(all.numbered(b"s", 4, 5, 12).is_ok());
        assert!(all.numbered(b"s", 3, 6, 13).is_err());
        assert!(all.counted(b"c", 1, 10).is_ok());
        assert!(all.counted(b"c", 1, 11).is_err());
    }

    fn job(revision: u64, token: u64, attempt: u32) -> Received {
        let terms = JobTerms { group: Some(b"g"[..].into()), ..JobTerms::default() };
        let delivered = Delivered {
            id: JobId { revision, index: 0 },
            token: Revision(token),
            queue: b"q"[..].into(),
            payload: b""[..].into(),
            attempt,
            max_attempts: 20,
            visibility_ms: 1_000,
            age_ms: 0,
            priority: 0,
            terms: Some(terms.into()),
            last_error: "".into(),
        };
        Received { jobs: vec![delivered], settled: Vec::new(), waited_ms: 0 }
    }

    #[test]
    fn a_job_in_two_hands_or_after_its_ack_is_noticed() {
        let mut all = Primitives::default();
        assert!(all.received(1, &job(5, 7, 1)).is_ok());
        assert!(all.received(2, &job(5, 7, 1)).is_err(), "one delivery, two hearers");
        let mut all = Primitives::default();
        all.received(1, &job(5, 7, 1)).unwrap();
        all.acknowledged(JobId { revision: 5, index: 0 }, 7).unwrap();
        assert!(all.received(2, &job(5, 9, 2)).is_err(), "it was done");
        let mut all = Primitives::default();
        all.received(1, &job(5, 8, 1)).unwrap();
        all.received(2, &job(6, 7, 1)).unwrap();
        assert!(all.groups_in_order().is_err(), "the second of a group went before the first");
    }

    #[test]
    fn a_second_result_and_a_late_grant_are_noticed() {
        let result = |text: &[u8]| {
            let body = ResultBody::Kept(text.into());
            PackedResult::new(&StoredResult { status: 200, headers: Vec::new(), body })
        };
        let mut all = Primitives::default();
        all.result("k", result(b"one"), 7, 9).unwrap();
        assert!(all.result("k", result(b"two"), 7, 10).is_err());
        let mut once = Once { result: Some((result(b"one"), 7, 9)), ..Once::default() };
        once.granted.insert(11, (2, 1));
        assert!(check_once("k", &once).is_err());
    }
}
