//! The queue of events, and what each does.
//!
//! Promises. An event touches one member or one client; what follows from it is another event at a later moment. A member's
//! effects are carried out as the server does it: what it sends leaves even if the same poll then fails, changes are told before answers,
//! jobs run in order, a fault ends the process.

use super::judge::Judge;
use super::native::{self, Focus, NativeBug};
use super::nemesis::Mend;
use super::net::{Net, Quality};
use super::node::{Caller, Fate, Node, Sent};
use super::people::{self, Around, Call, Kind, Person};
use crate::client::{self, Client, What};
use crate::disk::{Counts, Lie};
use crate::oracle::ledger::{Intent, Ledger, writer};
use crate::oracle::linear::{self, Touch};
use crate::oracle::locks::Locks;
use crate::oracle::primitives::Primitives;
use crate::oracle::requests::Requests;
use crate::oracle::state;
use crate::random::Random;
use crate::trace::Trace;
use std::collections::{BTreeMap, BTreeSet};
use tenure_machine::*;
use tenure_replica::{
    Answer, Config, Effects, Fault, Hello, Member, OpenError, PeerRefusal, Renewal, Role, Sabotage, run_job,
};

pub(super) const SECOND: u64 = 1_000_000;
/// A healthy cluster serves everywhere within this, a member that catches up by a snapshot among them.
const RECOVERY_US: u64 = 30 * SECOND;
const TOKEN: &str = "simulated";
const TRIES_MAX: u32 = 6;
/// One-shot requests are answered the same for so long.
const ANSWERS_KEPT_US: u64 = 600 * SECOND;
/// A leader that is there and does not answer is given up after so many election timeouts.
const PATIENCE: u64 = 5;
/// How often a deposed leader is asked in the election timeout that comes.
const DOUBTS: u64 = 10;

/// A bug that the run plays on purpose, to see that an oracle notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The disks break their word.
    Disk(Lie),
    /// One of those that live inside the member.
    Inside(Sabotage),
    /// A door answers linearizable reads from what its member has.
    SkipReadIndex,
    /// Who believes to lead answers renewals at once.
    RenewAtOnce,
    /// A door that asks again for its caller, without a request id.
    RepeatForward,
    /// A wait that ended with its session is answered as granted.
    GrantToDead,
    /// One member's clock runs twice as fast as the world's.
    FastClock,
    /// A grant is told to a second client too.
    SecondHolder,
    /// A retry gets the answer of another request.
    WrongReplay,
    /// A door gives each try of a numbered request a number of its own.
    NumberTries,
    /// A door takes a request that it sees once more for a new one.
    ForgetAnswers,
    /// A door takes all numbers below one that it sees for answered.
    AcknowledgeBelow,
    /// The newest bytes of every log are cut off while the members are down.
    CutLogs,
    /// One of a door to the native primitives.
    Native(NativeBug),
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    pub shown: bool,
    pub bug: Option<Bug>,
    /// A cluster of one grows to three, and the power of its sole voter goes at this call to the disk.
    pub grow_at: Option<u64>,
}

/// What a run went through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub hash: u64,
    pub events: u64,
    pub simulated_s: u64,
    pub calls: u64,
    pub acknowledged: u64,
    pub refused: u64,
    pub unknown: u64,
    pub replayed: u64,
    pub terms: u64,
    pub messages: u64,
    pub lost: u64,
    pub handshakes: u64,
    pub refused_hellos: u64,
    pub kills: u64,
    pub power_losses: u64,
    pub faults: u64,
    pub pauses: u64,
    pub partitions: u64,
    pub hand_overs: u64,
    pub stops: u64,
    pub flips_refused: u64,
    pub flips_harmless: u64,
    pub flips_torn: u64,
    pub added: u64,
    pub promoted: u64,
    pub removed: u64,
    pub impostors: u64,
    pub impostors_refused: u64,
    pub snapshots: u64,
    pub restored: u64,
    pub expired: u64,
    pub handed_on: u64,
    pub compared: u64,
    /// Answers of native primitives that were judged.
    pub native: u64,
    /// The longest that a caller waited who was owed an answer, in election timeouts of its member, in hundredths.
    pub slowest: u64,
    pub recovery_ms: u64,
    pub disk: Counts,
}

impl Report {
    pub fn add(&mut self, o: &Report) {
        let pairs = [
            (&mut self.events, o.events),
            (&mut self.simulated_s, o.simulated_s),
            (&mut self.calls, o.calls),
            (&mut self.acknowledged, o.acknowledged),
            (&mut self.refused, o.refused),
            (&mut self.unknown, o.unknown),
            (&mut self.replayed, o.replayed),
            (&mut self.terms, o.terms),
            (&mut self.messages, o.messages),
            (&mut self.lost, o.lost),
            (&mut self.handshakes, o.handshakes),
            (&mut self.refused_hellos, o.refused_hellos),
            (&mut self.kills, o.kills),
            (&mut self.power_losses, o.power_losses),
            (&mut self.faults, o.faults),
            (&mut self.pauses, o.pauses),
            (&mut self.partitions, o.partitions),
            (&mut self.hand_overs, o.hand_overs),
            (&mut self.stops, o.stops),
            (&mut self.flips_refused, o.flips_refused),
            (&mut self.flips_harmless, o.flips_harmless),
            (&mut self.flips_torn, o.flips_torn),
            (&mut self.added, o.added),
            (&mut self.promoted, o.promoted),
            (&mut self.removed, o.removed),
            (&mut self.impostors, o.impostors),
            (&mut self.impostors_refused, o.impostors_refused),
            (&mut self.snapshots, o.snapshots),
            (&mut self.restored, o.restored),
            (&mut self.expired, o.expired),
            (&mut self.handed_on, o.handed_on),
            (&mut self.compared, o.compared),
            (&mut self.native, o.native),
        ];
        pairs.into_iter().for_each(|(sum, more)| *sum += more);
        self.slowest = self.slowest.max(o.slowest);
        self.recovery_ms = self.recovery_ms.max(o.recovery_ms);
        self.disk.add(&o.disk);
    }
}

/// What is the same for the whole run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) members: usize,
    pub(super) tick_ms: u64,
    pub(super) election_ticks: usize,
    pub(super) snapshot_log_bytes: u64,
    pub(super) length_us: u64,
    /// Between two things that go wrong, at most.
    pub(super) mischief_us: u64,
    /// Which kinds of them this run has, as bits.
    pub(super) kinds: u64,
    /// What clients ask of the native primitives.
    native: Focus,
    /// For so long nothing but time passes, half-way.
    rest_us: u64,
}

impl Shape {
    fn draw(seed: u64, random: &mut Random, options: Options) -> Self {
        let members = if options.grow_at.is_some() { 1 } else { *random.pick(&[1, 3, 3, 3, 3, 3, 5, 5]) };
        // An hour, where it is played quickly. Both are of a kind of seeds that has something to keep.
        let (members, rest_s) = match seed % 36 {
            3 => (members, *random.fork().pick(&[62, 660])),
            20 => (1, 3_700),
            _ => (members, 0),
        };
        Self {
            rest_us: if options.grow_at.is_some() { 0 } else { rest_s * SECOND },
            members,
            tick_ms: *random.pick(&[50, 100]),
            election_ticks: 10,
            snapshot_log_bytes: *random.pick(&[6 << 10, 30 << 10, 1 << 20]),
            length_us: if options.grow_at.is_some() { 6 } else { random.between(6, 25) } * SECOND,
            mischief_us: *random.pick(&[400_000, 1_500_000, 4_000_000]),
            kinds: if random.chance(1, 3) { u64::MAX } else { random.u64() | random.u64() },
            native: Focus::of(seed),
        }
    }

    pub(super) fn election_ms(&self) -> u64 {
        self.tick_ms * self.election_ticks as u64
    }
}

/// What a caller is told.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    Done(Reply),
    Unknown,
    /// Nothing of this try was done.
    Refused,
    /// Nobody listens there.
    NotSent,
    Read {
        records: Vec<Record>,
        revision: u64,
    },
    Renewed(Result<Renewal, Rejection>),
}

pub(super) enum Event {
    Start(usize),
    Poll(usize),
    Dial {
        node: usize,
        boot: u64,
    },
    Hello {
        from: usize,
        to: usize,
        serial: u64,
        hello: Vec<u8>,
    },
    Welcome {
        from: usize,
        to: usize,
        serial: u64,
        hello: Vec<u8>,
    },
    TurnedAway {
        at: usize,
        boot: u64,
        by: MemberId,
        refusal: PeerRefusal,
    },
    HungUp {
        at: usize,
        boot: u64,
        far: usize,
        far_boot: u64,
        serial: u64,
    },
    Message {
        from: usize,
        to: usize,
        to_boot: u64,
        serial: u64,
        bytes: Vec<u8>,
    },
    Work {
        node: usize,
        boot: u64,
    },
    Request {
        call: u64,
        attempt: u32,
        to: usize,
    },
    Answer {
        call: u64,
        attempt: u32,
        outcome: Outcome,
    },
    GiveUp {
        call: u64,
        attempt: u32,
    },
    Retry(u64),
    Act(usize),
    Mischief,
    Mend(Mend),
    Probe,
    /// The members do what whoever leads does of itself.
    Duties,
    /// Somebody writes a register at the newest leader and reads at this one, who may have led for too long.
    Doubt(usize),
}

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Killed,
    Power,
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) trace: Trace,
    pub(super) options: Options,
    pub(super) shape: Shape,
    pub(super) now: u64,
    order: u64,
    pub(super) step: u64,
    events: BTreeMap<(u64, u64), Event>,
    pub(super) nodes: Vec<Node>,
    pub(super) net: Net,
    pub(super) people: Vec<Person>,
    pub(super) calls: BTreeMap<u64, Call>,
    next_call: u64,
    ledger: Ledger,
    pub(super) judge: Judge,
    locks: Locks,
    primitives: Primitives,
    requests: Requests,
    touches: BTreeMap<Vec<u8>, Vec<Touch>>,
    pub(super) healing: bool,
    pub(super) group: Group,
    /// Nobody does what is to be done without being asked.
    pub(super) idle: bool,
    /// Nobody asks for anything before.
    rest_until: u64,
    again: BTreeMap<RequestId, Again>,
    probes: BTreeMap<usize, Probe>,
    pub(super) report: Report,
}

/// Who votes, as the newest entry says that anybody has applied.
#[derive(Default)]
pub(super) struct Group {
    index: u64,
    pub(super) voters: Vec<MemberId>,
    pub(super) to_be: Vec<MemberId>,
}

/// Something that is asked for more than once under one id.
struct Again {
    txn: Txn,
    since_us: u64,
    /// When it was answered, at which revision.
    answered: Option<(u64, Revision)>,
}

/// What a healthy member is still asked for.
#[derive(Default)]
struct Probe {
    write: Option<u64>,
    read: Option<u64>,
    wrote: bool,
    did_read: bool,
}

/// Runs one seed.
pub fn run(seed: u64, options: Options) -> Result<Report, String> {
    let mut random = Random::new(seed ^ 0xc105_7e12);
    let shape = Shape::draw(seed, &mut random, options);
    let quality = if options.grow_at.is_some() { Quality::GOOD } else { Quality::draw(&mut random) };
    let nodes: Vec<Node> =
        (0..shape.members).map(|n| Node::new(MemberId(101 + n as u64), &format!("n{n}"), &mut random)).collect();
    let people = if options.grow_at.is_some() { 2 } else { random.between(2, 5) as usize };
    let mut world = World {
        trace: Trace::new(options.shown),
        options,
        shape,
        now: 0,
        order: 0,
        step: 0,
        events: BTreeMap::new(),
        net: Net::new(quality),
        people: (0..people)
            .map(|_| Person {
                state: Client { renews: true, ..Client::default() },
                native: native::Given::default(),
                node: random.index(nodes.len()),
                read: BTreeMap::new(),
            })
            .collect(),
        nodes,
        calls: BTreeMap::new(),
        next_call: 1,
        ledger: Ledger::default(),
        judge: Judge::default(),
        locks: Locks::default(),
        primitives: Primitives::default(),
        requests: Requests::default(),
        touches: BTreeMap::new(),
        healing: false,
        group: Group::default(),
        idle: !shape.native.has_duties(),
        rest_until: 0,
        again: BTreeMap::new(),
        probes: BTreeMap::new(),
        report: Report::default(),
        random,
    };
    world.play().map_err(|why| format!("step {} at {} us: {why}", world.step, world.now))?;
    Ok(world.finish())
}

impl World {
    fn play(&mut self) -> Result<(), String> {
        self.trace.say(|| format!("{:?} {:?}", self.shape, self.net.quality));
        match self.options.bug {
            Some(Bug::Disk(lie)) => self.nodes.iter().for_each(|n| n.disk.set_lie(Some(lie))),
            Some(Bug::FastClock) => self.nodes[0].clock.rate = 20_000,
            _ => {}
        }
        if let Some(at) = self.options.grow_at {
            self.nodes[0].disk.die_after(Some(at));
        }
        for node in 0..self.nodes.len() {
            let at = self.random.below(SECOND);
            self.later(at, Event::Start(node));
        }
        for person in 0..self.people.len() {
            self.later(200_000, Event::Act(person));
        }
        self.later(SECOND, Event::Mischief);
        self.later(0, Event::Duties);
        let half = self.shape.length_us / 2;
        self.run_to(half, |_| false)?;
        self.rest_until = self.now + self.shape.rest_us;
        self.run_to(self.rest_until + half, |_| false)?;
        self.heal()
    }

    // The queue.

    pub(super) fn later(&mut self, delay_us: u64, event: Event) {
        self.order += 1;
        self.events.insert((self.now + delay_us, self.order), event);
    }

    /// Plays on until a moment, or until something is so.
    fn run_to(&mut self, until: u64, done: impl Fn(&Self) -> bool) -> Result<bool, String> {
        while !done(self) {
            let Some(entry) = self.events.first_entry().filter(|e| e.key().0 <= until) else {
                self.now = until;
                return Ok(done(self));
            };
            let ((at, order), event) = entry.remove_entry();
            self.now = at;
            self.step += 1;
            self.primitives.step = self.step;
            self.trace.numbers(&[at, order]);
            self.handle(event)?;
        }
        Ok(true)
    }

    fn handle(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Start(node) => self.start(node),
            Event::Poll(node) => match self.nodes[node].poll_at == Some(self.now) {
                true => self.poll(node),
                false => Ok(()),
            },
            Event::Dial { node, boot } => {
                self.dial(node, boot);
                Ok(())
            }
            Event::Hello { from, to, serial, hello } => {
                self.hello(from, to, serial, hello);
                Ok(())
            }
            Event::Welcome { from, to, serial, hello } => {
                self.welcome(from, to, serial, hello);
                Ok(())
            }
            Event::TurnedAway { at, boot, by, refusal } => {
                self.turned_away(at, boot, by, &refusal);
                Ok(())
            }
            Event::HungUp { at, boot, far, far_boot, serial } => {
                self.hung_up(at, boot, far, far_boot, serial);
                Ok(())
            }
            Event::Message { from, to, to_boot, serial, bytes } => {
                self.message(from, to, to_boot, serial, bytes);
                Ok(())
            }
            Event::Work { node, boot } => self.work(node, boot),
            Event::Request { call, attempt, to } => self.request(call, attempt, to),
            Event::Answer { call, attempt, outcome } => self.answer(call, attempt, outcome),
            Event::GiveUp { call, attempt } => self.give_up(call, attempt),
            Event::Retry(call) => self.send(call),
            Event::Act(_) | Event::Mischief | Event::Duties if self.now < self.rest_until => {
                self.later(self.rest_until - self.now, event);
                Ok(())
            }
            Event::Act(person) => self.act(person),
            Event::Mischief if !self.healing => self.mischief(),
            Event::Mischief => Ok(()),
            Event::Mend(mend) => self.mend(mend),
            Event::Probe => self.probe(),
            Event::Doubt(deposed) => self.doubt(deposed),
            Event::Duties => self.look_at_duties(),
        }
    }

    // A member's life.

    pub(super) fn config(&mut self, node: usize) -> Config {
        let boot = self.random.u64() | 1;
        let random = self.random.bytes();
        let founders = self.shape.members;
        let peers = self.nodes[..founders].iter().map(|n| (n.id, n.name.clone(), n.peer.clone())).collect();
        let n = &mut self.nodes[node];
        n.boot = boot;
        let mut config = Config::alone(n.id, &n.name, boot, random);
        config.cluster_token = TOKEN.to_owned();
        match &n.join {
            None => config.peers = peers,
            join => {
                config.join = join.clone();
                config.peers = vec![(n.id, n.name.clone(), n.peer.clone())];
            }
        }
        (config.tick_ms, config.election_ticks) = (self.shape.tick_ms, self.shape.election_ticks);
        config.first_segment_bytes = 64 << 10;
        config.segment_bytes = 64 << 10;
        config.snapshot_log_bytes = self.shape.snapshot_log_bytes;
        config.disk_reserve_bytes = 100 << 10;
        config.max_batch_bytes = n.batch_bytes;
        config.autocompact = None;
        config.behaviour = n.behaviour;
        if let Some(Bug::Inside(sabotage)) = self.options.bug {
            // A flag that all have alike does no harm.
            config.sabotage = (sabotage != Sabotage::LocalFlagInApply || node == 0).then_some(sabotage);
        }
        config
    }

    fn start(&mut self, node: usize) -> Result<(), String> {
        if self.nodes[node].runs() || self.nodes[node].fate == Fate::Damaged {
            return Ok(());
        }
        // An old release is replaced by the new one, member by member.
        if self.nodes[node].behaviour < BEHAVIOUR && self.random.chance(1, 3) {
            self.nodes[node].behaviour = BEHAVIOUR;
        }
        let config = self.config(node);
        let n = &mut self.nodes[node];
        let opened = Member::open(n.disk.clone(), config, n.clock.at(self.now));
        match opened {
            Ok(member) => {
                n.boots = member.hello(0).boots;
                n.member = Some(member);
                n.starts += 1;
                (n.led, n.judged_at) = (false, 0);
                n.led_term = None;
                let boot = n.boot;
                let status = n.member.as_ref().map(Member::status);
                self.trace.say(|| format!("{} us: n{node} starts as {boot:x}: {status:?}", self.now));
                self.catch_up(node, true)?;
                self.look(node)?;
                self.wake(node, 0);
                self.later(1_000, Event::Dial { node, boot });
                Ok(())
            }
            Err(OpenError::Io { .. }) => {
                self.report.faults += 1;
                n.disk.set_room(None);
                let how = if n.disk.is_dead() { End::Power } else { End::Killed };
                self.end(node, how)
            }
            Err(why) => self.not_opened(node, &why),
        }
    }

    /// Makes sure that it is polled within so many microseconds.
    pub(super) fn wake(&mut self, node: usize, within_us: u64) {
        let at = self.now + within_us;
        if self.nodes[node].poll_at.is_none_or(|known| known > at) {
            self.nodes[node].poll_at = Some(at);
            self.later(within_us, Event::Poll(node));
        }
    }

    fn touch(&mut self, node: usize) {
        // What arrives together is taken together.
        let gather = self.random.below(200);
        self.wake(node, gather);
    }

    fn poll(&mut self, node: usize) -> Result<(), String> {
        let n = &mut self.nodes[node];
        n.poll_at = None;
        if n.paused {
            return Ok(());
        }
        let at = n.clock.at(self.now);
        let Some(member) = &mut n.member else { return Ok(()) };
        let (mut out, mut sent) = (Effects::default(), Vec::<Sent>::new());
        let heard = member.hear(at, &mut out, &mut |to, lane, bytes| sent.push((to, lane, bytes)));
        let (heard, result) = heard.map_or_else(|fault| (None, Err(fault)), |heard| (Some(heard), Ok(())));
        // What is known by now is told before the member works, as the shell does.
        self.carry_out(node, out, sent, result)?;
        let (Some(heard), Some(member)) = (heard, &mut self.nodes[node].member) else { return Ok(()) };
        let (mut out, mut sent) = (Effects::default(), Vec::<Sent>::new());
        let result = member.work(heard, &mut out, &mut |to, lane, bytes| sent.push((to, lane, bytes)));
        self.carry_out(node, out, sent, result)
    }

    /// What a poll or a stop gave.
    pub(super) fn carry_out(
        &mut self,
        node: usize,
        out: Effects,
        sent: Vec<Sent>,
        result: Result<(), Fault>,
    ) -> Result<(), String> {
        for (to, lane, bytes) in sent {
            self.transmit(node, to, lane, bytes);
        }
        // What was applied before a fault is committed all the same.
        self.observe(node, &out)?;
        if let Err(fault) = result {
            return self.faulted(node, &fault);
        }
        let boot = self.nodes[node].boot;
        self.nodes[node].jobs.extend(out.jobs);
        if !self.nodes[node].working && !self.nodes[node].jobs.is_empty() {
            self.nodes[node].working = true;
            let delay = if self.random.chance(1, 20) { 300_000 } else { 8_000 };
            let delay = self.random.between(100, delay);
            self.later(delay, Event::Work { node, boot });
        }
        self.look(node)?;
        self.give_answers(node, out.answers)?;
        let when = out.wake_at.map_or(self.now + 100_000, |at| self.nodes[node].clock.when(at));
        let late = if self.random.chance(1, 200) { self.random.below(30_000) } else { self.random.below(300) };
        self.wake(node, when.saturating_sub(self.now).max(20) + late);
        Ok(())
    }

    fn faulted(&mut self, node: usize, fault: &Fault) -> Result<(), String> {
        self.trace.say(|| format!("{} us: n{node} stops: {fault}", self.now));
        let n = &self.nodes[node];
        let dead = n.disk.is_dead();
        match fault {
            Fault::Disk { .. } => {
                self.report.faults += 1;
                let how = if dead || self.random.chance(1, 3) { End::Power } else { End::Killed };
                self.end(node, how)
            }
            Fault::Expelled { .. } if n.fate == Fate::Impostor => {
                self.report.impostors_refused += 1;
                self.end(node, End::Killed)
            }
            Fault::Expelled { .. } if n.fate == Fate::Removed => self.end(node, End::Killed),
            _ => Err(format!("n{node} ({:?}) stopped: {fault}", n.fate)),
        }
    }

    /// The process is over; with the power, so is what was not synced.
    pub(super) fn end(&mut self, node: usize, how: End) -> Result<(), String> {
        self.trace.say(|| format!("{} us: n{node} ends: {how:?}", self.now));
        let n = &mut self.nodes[node];
        // A folder from when it was the only voter decides alone when it is put back: nobody can tell it.
        let status = n.member.take().map(|m| m.status());
        let last_index = status.filter(|s| s.voters.len() > 1).map(|s| s.last_index);
        (n.poll_at, n.paused, n.working) = (None, false, false);
        n.backlog.clear();
        n.jobs.clear();
        let callers: Vec<Caller> = std::mem::take(&mut n.tickets).into_values().collect();
        match how {
            End::Killed => {
                n.disk.process_killed();
                self.report.kills += 1;
            }
            End::Power => {
                n.disk.power_lost();
                self.report.power_losses += 1;
            }
        }
        for caller in callers {
            // A closed connection is noticed at once, a dead machine is not.
            if how == End::Killed && self.random.chance(3, 4) {
                let delay = self.random.below(2_000);
                let Caller { call, attempt, .. } = caller;
                self.later(delay, Event::Answer { call, attempt, outcome: Outcome::Unknown });
            }
        }
        let notice = if how == End::Killed { (100, 3_000) } else { (500_000, 4 * SECOND) };
        let pairs: Vec<_> = self.net.connections.keys().copied().filter(|p| p.0 == node || p.1 == node).collect();
        pairs.into_iter().for_each(|pair| self.close(pair, |_| notice));
        self.after_the_end(node, last_index)
    }

    // What a member tells.

    /// Changes, in the order in which they left, compared with what others told.
    fn observe(&mut self, node: usize, out: &Effects) -> Result<(), String> {
        if out.restored {
            self.report.restored += 1;
            self.trace.say(|| format!("{} us: n{node} got a snapshot", self.now));
            return self.catch_up(node, true);
        }
        let ours = |c: &&tenure_machine::Change| c.record.key()[0] == Space::Keys as u8;
        let changes: Vec<_> = out.changes.iter().filter(ours).cloned().collect();
        let who = |why| format!("n{node}: {why}");
        if let Some(first) = changes.first() {
            // A member whose state was replaced or recovered has skipped what others told.
            self.trace.say(|| format!("{} us: n{node} changes from {}", self.now, first.record.mod_revision()));
        }
        self.ledger.observe(&changes).map_err(who)
    }

    /// What a member that recovered or took a snapshot holds must be what was told; some of it may be new.
    fn catch_up(&mut self, node: usize, whole: bool) -> Result<(), String> {
        let Some(member) = &self.nodes[node].member else { return Ok(()) };
        let machine = member.machine();
        let from = if whole { machine.compacted().next() } else { Revision(self.ledger.newest() + 1) };
        if machine.revision() < from {
            return Ok(());
        }
        let slice = machine
            .changes(&state::all_keys(), from, usize::MAX)
            .map_err(|why| format!("n{node} has no history from {from}: {why}"))?;
        let changes: Vec<_> = slice.changes.into_iter().map(|c| tenure_machine::Change { before: None, ..c }).collect();
        self.ledger.observe(&changes).map_err(|why| format!("n{node} recovered: {why}"))
    }

    /// Judges a member as it is now.
    fn look(&mut self, node: usize) -> Result<(), String> {
        let n = &mut self.nodes[node];
        let Some(member) = &n.member else { return Ok(()) };
        let machine = member.machine();
        let at = machine.position().index.0;
        if at != n.judged_at {
            n.judged_at = at;
            if at > self.group.index {
                let voters = member.status().voters;
                let table = machine.members().filter(|member| member.role == MemberRole::Voter);
                self.group = Group { index: at, voters, to_be: table.map(|member| member.id).collect() };
            }
            self.judge.position(&n.name, machine)?;
            self.primitives.look(machine).map_err(|why| format!("{}: {why}", n.name))?;
        }
        for over in self.judge.look(machine, self.step, self.now).map_err(|why| format!("n{node}: {why}"))? {
            self.locks.session_may_end(over, self.step);
            self.primitives.session_over(over, machine.revision().0);
            self.trace.say(|| format!("{} us: n{node} has ended session {over}", self.now));
        }
        if machine.revision().0 == self.ledger.newest() && self.random.chance(1, 40) {
            let (records, _) = machine.range_slice(&state::all_keys(), machine.revision(), None, usize::MAX);
            let live = self.ledger.state();
            if !records.iter().eq(live.values()) {
                return Err(format!("n{node} has {records:?}, made were {:?}", live.values().collect::<Vec<_>>()));
            }
        }
        let status = member.status();
        let mut is_new = false;
        if status.role == Role::Leader {
            if n.fate == Fate::Impostor {
                return Err(format!("n{node} leads term {} on a folder that is not its own", status.term));
            }
            is_new = self.judge.leads(status.term, n.id, n.boot)?;
            if is_new {
                self.trace.say(|| format!("{} us: n{node} leads term {}", self.now, status.term));
            }
        }
        n.led = status.role == Role::Leader;
        // One whose place another has taken is removed, before the table says so.
        let wanted = |id| machine.member_wanted(id, |voter| status.voters.contains(&voter));
        let removed: Vec<MemberId> =
            machine.members().map(|m| m.id).filter(|id| wanted(*id) == MemberRole::Removed).collect();
        for n in self.nodes.iter_mut().filter(|n| n.fate == Fate::Sound && removed.contains(&n.id)) {
            n.fate = Fate::Removed;
        }
        if is_new {
            self.doubt_all_but(node);
        }
        Ok(())
    }

    /// Where another leads from now on, whoever still believes to lead is asked: the time in which that could be seen is short.
    fn doubt_all_but(&mut self, leader: usize) {
        for node in (0..self.nodes.len()).filter(|&node| node != leader) {
            self.doubt_for_a_while(node);
        }
    }

    pub(super) fn doubt_for_a_while(&mut self, node: usize) {
        let n = &self.nodes[node];
        if n.led && n.listens() && !self.healing {
            for nth in 0..DOUBTS {
                let delay = nth * self.shape.election_ms() * 1_000 / DOUBTS + self.random.below(10_000);
                self.later(delay, Event::Doubt(node));
            }
        }
    }

    fn doubt(&mut self, deposed: usize) -> Result<(), String> {
        let leads = |n: &Node| n.led && n.listens();
        let leader = (0..self.nodes.len()).find(|&node| node != deposed && leads(&self.nodes[node]));
        let Some(leader) = leader.filter(|_| leads(&self.nodes[deposed]) && !self.healing) else { return Ok(()) };
        let number = self.new_number();
        let key = client::register(self.random.below(client::REGISTERS));
        self.ledger.intend(number, Intent { puts: vec![key.clone()], optional: true, ..Intent::default() });
        self.begin(number, None, leader, Kind::Client(What::Write), Txn::of(people::write(number, key, true)))?;
        let number = self.new_number();
        self.begin(number, None, deposed, Kind::Client(What::Read), Txn::default())
    }

    fn give_answers(&mut self, node: usize, answers: Vec<(Ticket, Answer)>) -> Result<(), String> {
        for (ticket, answer) in answers {
            let n = &mut self.nodes[node];
            if (ticket.member, ticket.boot) != (n.id, n.boot) {
                return Err(format!("n{node} answers {ticket:?} of another life: {answer:?}"));
            }
            let Some(caller) = n.tickets.remove(&ticket) else {
                return Err(format!("n{node} answers {ticket:?}, and nobody waits: {answer:?}"));
            };
            let outcome = self.outcome(node, answer);
            self.tell(node, caller, outcome)?;
        }
        self.check_patience(node)
    }

    fn outcome(&self, node: usize, answer: Answer) -> Outcome {
        match answer {
            Answer::Done(reply) => Outcome::Done(reply),
            Answer::Unknown => Outcome::Unknown,
            Answer::Refused(_) => Outcome::Refused,
            Answer::ReadReady => self.registers(node),
            Answer::Renewed(result) => Outcome::Renewed(result),
        }
    }

    fn registers(&self, node: usize) -> Outcome {
        let machine = self.nodes[node].member.as_ref().map(Member::machine);
        let reply = machine.and_then(|m| m.range(&Range::of(client::read_spans())).ok());
        let revision = machine.map_or(0, |m| m.revision().0);
        Outcome::Read { records: reply.map(|r| r.records).unwrap_or_default(), revision }
    }

    /// An answer on its way to the client, who may be gone.
    fn tell(&mut self, node: usize, caller: Caller, outcome: Outcome) -> Result<(), String> {
        self.trace.say(|| format!("{} us: n{node} answers {}.{}: {outcome:?}", self.now, caller.call, caller.attempt));
        if caller.due_ms.is_some() {
            self.report.slowest = self.report.slowest.max(self.waited(node, caller));
        }
        if !self.healing && self.random.chance(1, 100) {
            return Ok(());
        }
        let Caller { call, attempt, .. } = caller;
        let delay = self.random.between(30, 1_000);
        self.later(delay, Event::Answer { call, attempt, outcome });
        Ok(())
    }

    fn waited(&self, node: usize, caller: Caller) -> u64 {
        let ms = (self.now - caller.since_us) * self.nodes[node].clock.rate / 10_000_000;
        ms * 100 / self.shape.election_ms()
    }

    /// Whoever asks is told within a while, and where nobody else can be reached within an election timeout, be it that nobody knows.
    fn check_patience(&self, node: usize) -> Result<(), String> {
        let n = &self.nodes[node];
        let now = n.clock.at(self.now).0;
        let quick_us = (self.shape.election_ms() * 3 / 2 + 3 * self.shape.tick_ms) * 1_000;
        let quickly = |c: &Caller| n.alone_us.is_some_and(|since| self.now > since.max(c.since_us) + quick_us);
        match n.tickets.values().find(|c| c.due_ms.is_some_and(|due| due < now || quickly(c))) {
            None => Ok(()),
            Some(c) => Err(format!(
                "n{node} leaves call {} without an answer since {} us, alone since {:?}",
                c.call, c.since_us, n.alone_us
            )),
        }
    }

    /// After the cuts have changed.
    pub(super) fn look_at_cuts(&mut self) {
        let count = self.nodes.len();
        for node in 0..count {
            let reached = |other: usize| self.net.passes(node, other) || self.net.passes(other, node);
            let alone = count > 1 && (0..count).all(|other| other == node || !reached(other));
            let since = &mut self.nodes[node].alone_us;
            *since = alone.then(|| since.unwrap_or(self.now));
        }
    }

    // Jobs.

    fn work(&mut self, node: usize, boot: u64) -> Result<(), String> {
        let n = &mut self.nodes[node];
        if n.boot != boot || n.member.is_none() {
            return Ok(());
        }
        if n.paused {
            self.later(50_000, Event::Work { node, boot });
            return Ok(());
        }
        n.working = false;
        let Some(job) = n.jobs.pop_front() else { return Ok(()) };
        self.report.snapshots += u64::from(matches!(job, tenure_replica::Job::FinishSnapshot { .. }));
        let done = run_job(&mut n.disk.clone(), job);
        if let Some(member) = &mut n.member {
            member.job_done(done);
        }
        if n.disk.is_dead() {
            return self.end(node, End::Power);
        }
        if !self.nodes[node].jobs.is_empty() {
            self.nodes[node].working = true;
            let delay = self.random.between(100, 8_000);
            self.later(delay, Event::Work { node, boot });
        }
        self.touch(node);
        Ok(())
    }

    // The network.

    fn dial(&mut self, node: usize, boot: u64) {
        let n = &self.nodes[node];
        if n.boot != boot || !n.runs() {
            return;
        }
        let again = self.random.between(20_000, 200_000);
        self.later(again, Event::Dial { node, boot });
        if self.nodes[node].paused {
            return;
        }
        let wall = self.wall_ms(node);
        let Some(member) = &self.nodes[node].member else { return };
        let (peers, hello) = (member.peers(), member.hello(wall).encode());
        for (_, _, address) in peers {
            let Some(to) = self.nodes.iter().position(|n| n.peer == address && n.listens()) else { continue };
            let open = self.net.connections.contains_key(&(node, to));
            if to == node || open || !self.net.passes(node, to) || !self.net.passes(to, node) {
                continue;
            }
            let serial = self.net.connect(node, to, (boot, self.nodes[to].boot));
            let delay = self.random.between(100, 2_000);
            self.later(delay, Event::Hello { from: node, to, serial, hello: hello.clone() });
        }
    }

    /// Both ends are still the lives that this connection was begun between.
    fn stands(&self, from: usize, to: usize, serial: u64) -> bool {
        self.net.connections.get(&(from, to)).is_some_and(|c| {
            c.serial == serial
                && (self.nodes[from].boot, self.nodes[to].boot) == c.boots
                && self.nodes[from].runs()
                && self.nodes[to].runs()
        })
    }

    fn hello(&mut self, from: usize, to: usize, serial: u64, hello: Vec<u8>) {
        if !self.stands(from, to, serial) {
            return;
        }
        if self.nodes[to].paused {
            return self.later(50_000, Event::Hello { from, to, serial, hello });
        }
        let wall = self.wall_ms(to);
        let (from_boot, by) = (self.nodes[from].boot, self.nodes[to].id);
        let delay = self.random.between(100, 2_000);
        let (Some(hello), Some(member)) = (Hello::decode(&hello), &mut self.nodes[to].member) else { return };
        match member.greet(&hello, wall) {
            Ok(()) => {
                let hello = member.hello(wall).encode();
                self.later(delay, Event::Welcome { from, to, serial, hello });
            }
            Err(refusal) => {
                self.net.connections.remove(&(from, to));
                self.later(delay, Event::TurnedAway { at: from, boot: from_boot, by, refusal });
            }
        }
        self.touch(to);
    }

    fn welcome(&mut self, from: usize, to: usize, serial: u64, hello: Vec<u8>) {
        if !self.stands(from, to, serial) {
            return;
        }
        if self.nodes[from].paused {
            return self.later(50_000, Event::Welcome { from, to, serial, hello });
        }
        let wall = self.wall_ms(from);
        let by = self.nodes[from].id;
        let (Some(hello), Some(member)) = (Hello::decode(&hello), &mut self.nodes[from].member) else { return };
        match member.greet(&hello, wall) {
            Ok(()) => {
                self.report.handshakes += 1;
                if let Some(connection) = self.net.connections.get_mut(&(from, to)) {
                    connection.open = true;
                }
            }
            Err(refusal) => {
                let delay = self.random.between(100, 2_000);
                let boot = self.nodes[to].boot;
                self.close((from, to), |_| (100, 2_000));
                self.later(delay, Event::TurnedAway { at: to, boot, by, refusal });
            }
        }
        self.touch(from);
    }

    fn turned_away(&mut self, at: usize, boot: u64, by: MemberId, refusal: &PeerRefusal) {
        self.report.refused_hellos += 1;
        let n = &mut self.nodes[at];
        self.trace.say(|| format!("{} us: n{at} is turned away by {by}: {refusal:?}", self.now));
        if n.boot == boot
            && let Some(member) = &mut n.member
        {
            member.turned_away(by, refusal);
            self.touch(at);
        }
    }

    /// A connection is over; each end that lives notices within so many microseconds.
    pub(super) fn close(&mut self, pair: (usize, usize), notice_us: impl Fn(usize) -> (u64, u64)) {
        let Some(gone) = self.net.connections.remove(&pair) else { return };
        let ends = [(pair.0, gone.boots.0, pair.1, gone.boots.1), (pair.1, gone.boots.1, pair.0, gone.boots.0)];
        for (at, boot, far, far_boot) in ends {
            if self.nodes[at].runs() && self.nodes[at].boot == boot {
                let (least, most) = notice_us(at);
                let delay = self.random.between(least, most);
                self.later(delay, Event::HungUp { at, boot, far, far_boot, serial: gone.serial });
            }
        }
    }

    fn hung_up(&mut self, at: usize, boot: u64, far: usize, far_boot: u64, serial: u64) {
        let peer = self.nodes[far].id;
        let n = &mut self.nodes[at];
        if n.boot != boot || n.member.is_none() {
            return;
        }
        if n.paused {
            return self.later(50_000, Event::HungUp { at, boot, far, far_boot, serial });
        }
        self.net.read_out.insert(serial);
        if !self.net.connected(at, far, far_boot)
            && let Some(member) = &mut n.member
        {
            member.hung_up(peer, far_boot);
            self.touch(at);
        }
    }

    fn transmit(&mut self, from: usize, to: MemberId, lane: tenure_replica::Lane, bytes: Vec<u8>) {
        self.report.messages += 1;
        let target = self.nodes.iter().position(|n| n.id == to);
        let pair = target.map(|to| (from, to));
        let open = pair.and_then(|p| self.net.connections.get(&p)).filter(|c| c.open);
        let (Some((from, to)), Some(connection)) = (pair, open.copied()) else {
            self.report.lost += 1;
            return;
        };
        self.trace.numbers(&[from as u64, to as u64, bytes.len() as u64]);
        self.trace.bytes(&bytes[..bytes.len().min(64)]);
        if !self.net.passes(from, to) {
            self.report.lost += 1;
            return;
        }
        let bulk = lane == tenure_replica::Lane::Bulk;
        let arrivals = self.net.arrivals((from, to), bulk, self.now, &mut self.random);
        self.report.lost += u64::from(arrivals.is_empty());
        for at in arrivals {
            let event = Event::Message {
                from,
                to,
                to_boot: connection.boots.1,
                serial: connection.serial,
                bytes: bytes.clone(),
            };
            self.later(at - self.now, event);
        }
    }

    fn message(&mut self, from: usize, to: usize, to_boot: u64, serial: u64, bytes: Vec<u8>) {
        let sender = self.nodes[from].id;
        let arrives = self.nodes[to].boot == to_boot
            && self.nodes[to].runs()
            && !self.net.read_out.contains(&serial)
            && self.net.passes(from, to);
        if !arrives {
            self.report.lost += 1;
            return;
        }
        self.nodes[to].arrive(sender, bytes);
        if !self.nodes[to].paused {
            self.touch(to);
        }
    }

    pub(super) fn wall_ms(&self, node: usize) -> u64 {
        self.nodes[node].wall_ms + self.now / 1_000
    }

    // Clients.

    fn act(&mut self, index: usize) -> Result<(), String> {
        if self.healing {
            return Ok(());
        }
        let again = self.random.between(10_000, 250_000);
        self.later(again, Event::Act(index));
        self.count_down(index);
        self.renew(index)?;
        if self.people[index].state.open >= 3 || !self.random.chance(2, 3) {
            return Ok(());
        }
        if self.shape.rest_us > 0 && self.random.chance(1, 6) {
            return self.ask_again(index);
        }
        let number = self.new_number();
        let newest = self.ledger.newest();
        let sessions = self.people.iter().filter_map(|p| p.state.session).map(|(id, ..)| id).collect();
        let schedules = self.people.iter().flat_map(|p| p.native.schedules.clone()).collect();
        let around = Around { newest, native: self.shape.native, sessions, schedules };
        let (kind, mut txn, intent) = people::draw(number, index, &self.people[index], &around, &mut self.random);
        let what = match &kind {
            Kind::Client(what) => what.clone(),
            Kind::Swap { .. } | Kind::Native => What::Write,
            _ => What::Read,
        };
        txn.request = client::number_request(&mut self.people[index].state, &mut self.random, &what);
        self.ledger.intend(number, intent);
        let node = self.people[index].node;
        self.begin(number, Some(index), node, kind, txn)
    }

    /// A client asks for something that somebody may have asked for before, under the same id.
    fn ask_again(&mut self, index: usize) -> Result<(), String> {
        let known: Vec<Txn> = self.again.values().map(|again| again.txn.clone()).collect();
        let new = known.len() < 4 || self.random.chance(1, 4);
        let txn = if new { native::once_more(&mut self.random) } else { self.random.pick(&known).clone() };
        if let Some(id) = txn.request {
            let again = Again { txn: txn.clone(), since_us: self.now, answered: None };
            self.again.entry(id).or_insert(again);
        }
        let (number, node) = (self.new_number(), self.people[index].node);
        self.begin(number, Some(index), node, Kind::Native, txn)
    }

    /// An answer is kept for ten minutes, as the members count them, and is gone then.
    fn answered_again(&mut self, id: RequestId, call: &Call, reply: &Reply) -> Result<(), String> {
        let Some(again) = self.again.get_mut(&id) else { return Ok(()) };
        match again.answered {
            Some((at, revision)) if revision == reply.revision => {
                if call.sent_us > at + ANSWERS_KEPT_US + 40 * SECOND {
                    return Err(format!("request {id:?} was answered at {at} us and is answered so once more"));
                }
            }
            _ => {
                // What ran after all that time ran as something new. That it was too early is seen by whoever knows the first answer.
                if self.now - again.since_us > ANSWERS_KEPT_US * 98 / 100 {
                    self.requests.is_over(id);
                }
                (again.since_us, again.answered) = (call.sent_us, Some((self.now, reply.revision)));
            }
        }
        Ok(())
    }

    /// The client's own clock says when a session is lost.
    fn count_down(&mut self, index: usize) {
        let state = &mut self.people[index].state;
        let Some((session, ..)) = state.session else { return };
        if self.judge.safe_until_us(session).is_none_or(|until| until <= self.now) {
            state.session = None;
            let mut lost = std::mem::take(&mut state.held);
            state.stale.append(&mut lost);
            state.open_seqs.clear();
        }
    }

    fn renew(&mut self, index: usize) -> Result<(), String> {
        let person = &mut self.people[index];
        let Some((session, _, ttl_ms)) = person.state.session else { return Ok(()) };
        if !person.state.renews || self.now / 1_000 < person.state.renew_at_ms {
            return Ok(());
        }
        person.state.renew_at_ms = self.now / 1_000 + ttl_ms / 3;
        person.state.renews = self.random.chance(19, 20);
        let node = person.node;
        self.judge.touching(session, self.now);
        let number = self.new_number();
        self.begin(number, Some(index), node, Kind::Client(What::Renew { session }), Txn::default())
    }

    pub(super) fn new_number(&mut self) -> u64 {
        self.next_call += 1;
        self.report.calls += 1;
        self.next_call
    }

    pub(super) fn begin(
        &mut self,
        number: u64,
        person: Option<usize>,
        node: usize,
        kind: Kind,
        txn: Txn,
    ) -> Result<(), String> {
        let token_before = match &kind {
            Kind::Client(What::Acquire { name, .. }) => self.locks.newest(name),
            _ => None,
        };
        let call = Call {
            number,
            person,
            kind,
            txn,
            node,
            began: self.step,
            sent_us: self.now,
            revision_before: self.ledger.acknowledged(),
            token_before,
            attempts: 0,
            open: false,
            unknown: false,
        };
        native::asked(&call.txn).for_each(|op| self.primitives.asked(op));
        self.trace.say(|| format!("{} us: {person:?} asks {number} of n{node}: {:?}", self.now, call.kind));
        if let Some(person) = person {
            self.people[person].state.open += 1;
        }
        self.calls.insert(number, call);
        self.send(number)
    }

    /// One try of a call.
    fn send(&mut self, number: u64) -> Result<(), String> {
        let Some(call) = self.calls.get_mut(&number).filter(|c| !c.open) else { return Ok(()) };
        call.attempts += 1;
        call.open = true;
        if let Some(person) = call.person {
            call.node = self.people[person].node;
            self.people[person].state.acknowledge(&mut call.txn.request);
        }
        let (attempt, to) = (call.attempts, call.node);
        match &call.kind {
            Kind::Client(What::SessionEnd { session }) => {
                self.judge.end_asked(*session);
                self.locks.session_may_end(*session, self.step);
            }
            Kind::Client(What::Release { name, token, .. }) => {
                self.locks.release_asked(name, *token, self.step);
                self.judge.lets_go(name, *token);
            }
            _ => {}
        }
        let patience = call.patience_us(&mut self.random);
        self.later(patience, Event::GiveUp { call: number, attempt });
        if self.healing || !self.random.chance(1, 100) {
            let delay = self.random.between(30, 1_000);
            self.later(delay, Event::Request { call: number, attempt, to });
        }
        Ok(())
    }

    /// A try reaches the door of a member.
    fn request(&mut self, number: u64, attempt: u32, to: usize) -> Result<(), String> {
        if self.nodes[to].paused {
            self.later(100_000, Event::Request { call: number, attempt, to });
            return Ok(());
        }
        let Some(call) = self.calls.get(&number).cloned() else { return Ok(()) };
        if !self.nodes[to].runs() {
            self.later(500, Event::Answer { call: number, attempt, outcome: Outcome::NotSent });
            return Ok(());
        }
        if let Some(outcome) = self.answered_at_the_door(to, &call) {
            let caller = Caller { call: number, attempt, since_us: self.now, due_ms: None };
            return self.tell(to, caller, outcome);
        }
        let n = &mut self.nodes[to];
        let Some(member) = &mut n.member else { return Ok(()) };
        let mut txn = call.txn.clone();
        if let Some(RequestId::Series { seq, acked_below, .. }) = &mut txn.request {
            match self.options.bug {
                Some(Bug::NumberTries) => *seq += 1_000_000 * u64::from(attempt - 1),
                Some(Bug::AcknowledgeBelow) => *acked_below = *seq,
                _ => {}
            }
        }
        let native_bug = match self.options.bug {
            Some(Bug::Native(bug)) => Some(bug),
            _ => None,
        };
        if !native::check_at_the_door(member.machine(), &mut txn, native_bug) {
            let caller = Caller { call: number, attempt, since_us: self.now, due_ms: None };
            return self.tell(to, caller, Outcome::Refused);
        }
        if self.options.bug == Some(Bug::ForgetAnswers)
            && txn
                .request
                .and_then(|id| self.again.get(&id))
                .is_some_and(|again| self.now > again.since_us + 60 * SECOND)
        {
            txn.request = None;
        }
        if let Some(bug) = native_bug {
            let wall = n.wall_ms + self.now / 1_000;
            for first in native::spoil_request(bug, member.machine(), wall, &mut txn) {
                let caller = Caller { call: 0, attempt: 0, since_us: self.now, due_ms: None };
                n.tickets.extend(member.submit(first).map(|ticket| (ticket, caller)));
            }
        }
        let taken = match &call.kind {
            Kind::Client(What::Read) => member.read(),
            Kind::Client(What::Renew { session }) => Ok(member.renew(*session, 0)),
            _ => member.submit(txn),
        };
        match taken {
            Ok(ticket) => {
                let patience = (PATIENCE + 1) * self.shape.election_ms() + 2 * self.shape.tick_ms;
                let due_ms = (!call.waits()).then(|| n.clock.at(self.now).0 + patience);
                let caller = Caller { call: number, attempt, since_us: self.now, due_ms };
                if n.tickets.insert(ticket, caller).is_some() {
                    return Err(format!("n{to} gives {ticket:?} twice"));
                }
                self.touch(to);
                Ok(())
            }
            Err(refusal) => {
                self.trace.say(|| format!("{} us: n{to} does not take {number}.{attempt}: {refusal}", self.now));
                let caller = Caller { call: number, attempt, since_us: self.now, due_ms: None };
                self.tell(to, caller, Outcome::Refused)
            }
        }
    }

    /// Stale reads, and what doors with a bug answer by themselves.
    fn answered_at_the_door(&mut self, to: usize, call: &Call) -> Option<Outcome> {
        let member = self.nodes[to].member.as_ref()?;
        match (&call.kind, self.options.bug) {
            (Kind::Stale, _) | (Kind::Client(What::Read), Some(Bug::SkipReadIndex)) => Some(self.registers(to)),
            (Kind::Client(What::Renew { session }), Some(Bug::RenewAtOnce)) if member.status().role == Role::Leader => {
                let s = member.machine().session(*session)?;
                let renewal = Renewal { session: *session, token: s.token, ttl_ms: s.ttl_ms };
                Some(Outcome::Renewed(Ok(renewal)))
            }
            _ => None,
        }
    }

    fn give_up(&mut self, number: u64, attempt: u32) -> Result<(), String> {
        let Some(call) = self.calls.get(&number).filter(|c| c.open && c.attempts == attempt) else { return Ok(()) };
        let node = call.node;
        let waits = |c: &Caller| (c.call, c.attempt) == (number, attempt);
        let n = &mut self.nodes[node];
        if let Some(ticket) = n.tickets.iter().find(|(_, c)| waits(c)).map(|(t, _)| *t)
            && self.random.coin()
            && let Some(member) = &mut n.member
        {
            member.cancel_ticket(ticket);
            // An answer that was on its way is nobody's any more; one that is not given is not missed.
            if let Some(caller) = n.tickets.get_mut(&ticket) {
                caller.due_ms = None;
            }
        }
        self.trace.say(|| format!("{} us: {number}.{attempt} is given up", self.now));
        self.answer(number, attempt, Outcome::Unknown)
    }

    fn answer(&mut self, number: u64, attempt: u32, outcome: Outcome) -> Result<(), String> {
        let Some(call) = self.calls.get_mut(&number).filter(|c| c.open && c.attempts == attempt) else {
            return Ok(());
        };
        call.open = false;
        let call = call.clone();
        match outcome {
            Outcome::Unknown | Outcome::Refused | Outcome::NotSent if call.leaves_nothing() => {
                self.move_on(&call);
                self.close_call(number, false)
            }
            Outcome::Unknown => {
                self.calls.entry(number).and_modify(|c| c.unknown = true);
                self.move_on(&call);
                self.try_again(number)
            }
            Outcome::Refused | Outcome::NotSent => {
                self.report.refused += 1;
                self.move_on(&call);
                if call.unknown || matches!(call.kind, Kind::Admin(_)) {
                    return self.try_again(number);
                }
                self.ledger.refuse(number)?;
                self.close_call(number, false)
            }
            Outcome::Read { records, revision } => {
                self.report.acknowledged += 1;
                self.read(&call, &records, revision)?;
                self.close_call(number, true)
            }
            Outcome::Renewed(result) => {
                self.renewed(&call, result)?;
                self.close_call(number, true)
            }
            Outcome::Done(reply) => {
                self.report.acknowledged += 1;
                self.close_call(number, reply.result.is_ok())?;
                self.done(&call, reply)
            }
        }
    }

    fn move_on(&mut self, call: &Call) {
        let next = self.random.index(self.nodes.len());
        if let Some(person) = call.person {
            self.people[person].node = next;
            if let Kind::Client(What::Renew { .. }) = call.kind {
                self.people[person].state.renew_at_ms = 0;
            }
        } else if !self.probes.contains_key(&call.node)
            && let Some(call) = self.calls.get_mut(&call.number)
        {
            call.node = next;
        }
    }

    /// Under its request id a call may be asked again; without one its outcome stays unknown.
    fn try_again(&mut self, number: u64) -> Result<(), String> {
        let Some(call) = self.calls.get(&number) else { return Ok(()) };
        let repeats = self.options.bug == Some(Bug::RepeatForward) && matches!(call.kind, Kind::Client(What::Write));
        let named = call.txn.request.is_some() || repeats;
        let tries = if matches!(call.kind, Kind::Admin(_)) { 3 * TRIES_MAX } else { TRIES_MAX };
        if named && call.attempts < tries {
            let delay = self.random.between(1_000, 300_000);
            self.later(delay, Event::Retry(number));
            return Ok(());
        }
        let call = call.clone();
        self.report.unknown += 1;
        self.touch_unknown(&call);
        self.close_call(number, false)
    }

    fn close_call(&mut self, number: u64, good: bool) -> Result<(), String> {
        let Some(call) = self.calls.remove(&number) else { return Ok(()) };
        if let Some(person) = call.person {
            let state = &mut self.people[person].state;
            state.open -= 1;
            state.close_request(call.txn.request);
        }
        if let Some(probe) = self.probes.get_mut(&call.node) {
            if probe.write == Some(number) {
                (probe.write, probe.wrote) = (None, good);
            }
            if probe.read == Some(number) {
                (probe.read, probe.did_read) = (None, good);
            }
        }
        Ok(())
    }

    fn renewed(&mut self, call: &Call, result: Result<Renewal, Rejection>) -> Result<(), String> {
        let Kind::Client(What::Renew { session }) = call.kind else {
            return Err(format!("{call:?} was answered as a renewal"));
        };
        match result {
            Ok(renewal) => self.judge.renewed(session, renewal.token, call.began, call.sent_us, self.now),
            Err(_) => self.judge.told_over(session),
        }
    }

    fn read(&mut self, call: &Call, records: &[Record], revision: u64) -> Result<(), String> {
        for record in records {
            if !self.ledger.stood(record, revision) {
                return Err(format!("call {}: {record:?} was not what stood at {revision}", call.number));
            }
        }
        if call.kind == Kind::Stale {
            return Ok(());
        }
        if revision < call.revision_before {
            return Err(format!("a read at {revision} began after {} was acknowledged", call.revision_before));
        }
        self.saw_registers(call, records);
        Ok(())
    }

    fn saw_registers(&mut self, call: &Call, records: &[Record]) {
        let saw: BTreeMap<&[u8], &Record> = records.iter().map(|r| (r.key(), r)).collect();
        for n in 0..client::REGISTERS {
            let key = client::register(n);
            let there = saw.get(key.as_bytes());
            let value = there.and_then(|r| writer(r));
            self.touch_key(call, key.as_bytes(), Some(value), None);
            if let Some(person) = call.person {
                let version = there.map_or(Revision(0), |r| r.mod_revision());
                self.people[person].read.insert(key.as_bytes().to_vec(), (version, value));
            }
        }
    }

    fn touch_key(&mut self, call: &Call, key: &[u8], saw: Option<linear::Value>, left: Option<linear::Value>) {
        let touch = Touch { call: call.number, began: call.began, ended: Some(self.step), saw, left };
        self.touches.entry(key.to_vec()).or_default().push(touch);
    }

    fn touch_unknown(&mut self, call: &Call) {
        native::asked(&call.txn).for_each(|op| self.primitives.unknown(op));
        for (key, left) in client::writes(&call.txn) {
            let touch = Touch { call: call.number, began: call.began, ended: None, saw: None, left: Some(left) };
            self.touches.entry(key).or_default().push(touch);
        }
    }

    fn done(&mut self, call: &Call, reply: Reply) -> Result<(), String> {
        if let Kind::Admin(change) = &call.kind {
            return self.changed_members(call, change.clone(), &reply);
        }
        let mut reply = reply;
        if self.options.bug == Some(Bug::WrongReplay) && reply.replayed {
            reply.revision = reply.revision.next();
        }
        if self.options.bug == Some(Bug::GrantToDead) {
            self.grant_to_dead(call, &mut reply);
        }
        if let Some(Bug::Native(bug)) = self.options.bug {
            native::spoil_answer(bug, &call.txn, &mut reply);
        }
        if let Some(id) = call.txn.request {
            self.answered_again(id, call, &reply)?;
            self.requests.answered(id, &reply)?;
        }
        if !reply.replayed && reply.revision.0 < call.revision_before {
            return Err(format!(
                "call {} got revision {} after {} had been told",
                call.number, reply.revision, call.revision_before
            ));
        }
        if client::is_disowned(&call.txn.request, &reply.result) {
            return Err(format!("call {} is open, and its number is taken for answered: {reply:?}", call.number));
        }
        // An old request under a session that is gone, or one that its client has counted as answered meanwhile: its outcome cannot be
        // told any more.
        let cannot_be_told = match &reply.result {
            Err(Rejection::SessionExpired { .. } | Rejection::Invalid { .. }) => true,
            Err(why) => why.leaves_open(),
            Ok(_) => false,
        };
        if cannot_be_told && call.unknown {
            self.touch_unknown(call);
            return Ok(());
        }
        let did = matches!(&reply.result, Ok(r) if r.succeeded && !r.results.iter().all(|o| matches!(o, OpReply::Delete { deleted: 0, .. })));
        self.ledger.acknowledge(call.number, reply.revision.0, did)?;
        match &reply.result {
            Ok(result) => {
                self.touch_done(call, result);
                self.native_done(call, result, reply.revision.0)?;
                self.learn(call, &reply)
            }
            Err(why) => {
                native::asked(&call.txn).for_each(|op| self.primitives.refused(op, why));
                Ok(())
            }
        }
    }

    fn native_done(&mut self, call: &Call, result: &TxnReply, at: u64) -> Result<(), String> {
        if call.kind != Kind::Native {
            return Ok(());
        }
        for RequireLock { name, token } in &call.txn.requires {
            self.primitives.guarded(name, *token, at);
        }
        for (op, answer) in native::answered(&call.txn, &result.results) {
            self.primitives.done(call.number, op, answer, at)?;
            if let Some(index) = call.person {
                self.people[index].native.learn(op, answer);
            }
        }
        for release in native::released(&call.txn, &result.results) {
            self.primitives.given_back(&release.name, release.token, true, at);
        }
        Ok(())
    }

    /// The bug of a door that takes the end of a wait for a grant.
    fn grant_to_dead(&self, call: &Call, reply: &mut Reply) {
        let Kind::Client(What::Acquire { session, .. }) = call.kind else { return };
        if matches!(reply.result, Err(Rejection::SessionExpired { .. })) {
            let grant = LockGrant { token: reply.revision.next(), session, session_token: 0, ttl_ms: 1_000 };
            reply.result = Ok(TxnReply { succeeded: true, results: vec![OpReply::LockGranted(grant)] });
        }
    }

    fn touch_done(&mut self, call: &Call, result: &TxnReply) {
        if !result.succeeded {
            if let Some(OpReply::Range(range)) = result.results.first() {
                let records = range.records.clone();
                self.saw_registers(call, &records);
            }
            return;
        }
        for (op, answer) in call.txn.then.iter().zip(&result.results) {
            match (op, answer) {
                (Op::Put(put), OpReply::Put { prev }) if client::is_register(put.key.as_bytes()) => {
                    let saw = match &call.kind {
                        Kind::Swap { was, .. } => Some(*was),
                        _ => put.prev.then(|| prev.as_ref().and_then(writer)),
                    };
                    self.touch_key(call, put.key.as_bytes(), saw, Some(Some(call.number)));
                }
                (Op::Delete(delete), OpReply::Delete { prev, .. }) => {
                    let prev: BTreeMap<&[u8], Option<u64>> = prev.iter().map(|r| (r.key(), writer(r))).collect();
                    for key in client::registers_in(&delete.span) {
                        let saw = prev.get(key.as_bytes()).copied().flatten();
                        self.touch_key(call, key.as_bytes(), Some(saw), Some(None));
                    }
                }
                _ => {}
            }
        }
    }

    /// What the client keeps of a success.
    fn learn(&mut self, call: &Call, reply: &Reply) -> Result<(), String> {
        let (Ok(result), Kind::Client(what), Some(index)) = (&reply.result, &call.kind, call.person) else {
            return Ok(());
        };
        let now_ms = self.now / 1_000;
        match (what, result.results.first()) {
            (What::SessionCreate { .. }, Some(OpReply::SessionCreated { id, token, ttl_ms })) => {
                let Some(Op::SessionCreate(create)) = call.txn.then.first() else { return Ok(()) };
                self.judge.created(create, *token, call.sent_us);
                let state = &mut self.people[index].state;
                state.session = Some((*id, *token, *ttl_ms));
                state.renews = true;
                state.renew_at_ms = now_ms + ttl_ms / 3;
                state.next_seq = 0;
                state.open_seqs.clear();
                self.look_everywhere()
            }
            (What::Acquire { name, session }, Some(OpReply::LockGranted(grant))) => {
                self.locks.granted(name, grant.token, *session, call.number, call.token_before)?;
                self.judge.holds(name, *session, grant.token, self.now)?;
                if self.options.bug == Some(Bug::SecondHolder) {
                    self.locks.granted(name, grant.token, SessionId(session.0 + 1), call.number + 1, None)?;
                }
                let state = &mut self.people[index].state;
                if state.session.is_some_and(|(id, ..)| id == *session) {
                    state.held.push((name.clone(), grant.token));
                }
                Ok(())
            }
            (What::Release { name, token, .. }, _) => {
                self.locks.released(name, *token, reply.revision.0, reply.replayed);
                let state = &mut self.people[index].state;
                state.held.retain(|h| h != &(name.clone(), *token));
                state.stale.push((name.clone(), *token));
                Ok(())
            }
            (What::Guarded { name, token }, _) => {
                self.locks.guarded(name, *token, reply.revision.0);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A session that a client has just learned of may be over already.
    fn look_everywhere(&mut self) -> Result<(), String> {
        for node in 0..self.nodes.len() {
            let Some(member) = &self.nodes[node].member else { continue };
            let machine = member.machine();
            for over in self.judge.look(machine, self.step, self.now)? {
                self.locks.session_may_end(over, self.step);
                self.primitives.session_over(over, machine.revision().0);
            }
        }
        Ok(())
    }

    // The end.

    /// No more faults: every member must serve again, what nobody keeps alive must end, and all states must be equal.
    fn heal(&mut self) -> Result<(), String> {
        self.trace.say(|| format!("{} us: healed", self.now));
        self.healing = true;
        self.net.quality = Quality::GOOD;
        self.net.cuts.clear();
        self.look_at_cuts();
        self.people.iter_mut().for_each(|p| p.state.renews = false);
        for node in 0..self.nodes.len() {
            self.restore(node)?;
        }
        let began = self.now;
        self.later(0, Event::Probe);
        if !self.run_to(began + RECOVERY_US, Self::served)? {
            return Err(format!("a healthy cluster does not serve within {RECOVERY_US} us: {}", self.facts()));
        }
        self.report.recovery_ms = (self.now - began) / 1_000;
        let calm = self.now;
        let quiet = |w: &Self| w.judge.live() == 0 && w.calls.is_empty();
        if !self.run_to(calm + 12 * SECOND, quiet)? {
            self.judge.overdue(calm, self.now, 2 * SECOND)?;
        }
        if !self.idle && !self.run_to(self.now + 5 * SECOND, Self::duties_are_done)? {
            return Err(format!("what whoever leads does of itself is not done: {}", self.facts()));
        }
        self.idle = true;
        if !self.run_to(self.now + 5 * SECOND, |w| w.level())? {
            return Err(format!("members do not come to one state: {}", self.facts()));
        }
        self.compare_states()?;
        self.locks.check()?;
        for call in std::mem::take(&mut self.calls).into_values() {
            self.touch_unknown(&call);
        }
        let wanted = self.wanted();
        if let Some(member) = wanted.first().and_then(|i| self.nodes[*i].member.as_ref()) {
            self.primitives.finish(member.machine())?;
        }
        for (key, touches) in &self.touches {
            linear::check(touches).map_err(|why| format!("key {}: {why}", key.escape_ascii()))?;
        }
        Ok(())
    }

    /// The members that must serve: all that are healthy and belong to the cluster.
    fn wanted(&self) -> BTreeSet<usize> {
        let table: Vec<MemberId> = self.roles().into_iter().map(|(id, _)| id).collect();
        let belongs = |n: &Node| n.fate == Fate::Sound && table.contains(&n.id);
        (0..self.nodes.len()).filter(|&i| belongs(&self.nodes[i])).collect()
    }

    fn served(&self) -> bool {
        let wanted = self.wanted();
        !wanted.is_empty() && wanted.iter().all(|i| self.probes.get(i).is_some_and(|p| p.wrote && p.did_read))
    }

    fn level(&self) -> bool {
        let at = |i: usize| self.nodes[i].member.as_ref().map(|m| m.machine().position().index);
        let all: BTreeSet<_> = self.wanted().into_iter().map(at).collect();
        all.len() == 1
    }

    fn compare_states(&mut self) -> Result<(), String> {
        let wanted = self.wanted();
        let mut first: Option<String> = None;
        for node in wanted {
            let Some(member) = &self.nodes[node].member else { return Err(format!("n{node} does not run")) };
            let text = state::dump(member.machine());
            match &first {
                None => first = Some(text),
                Some(other) if *other != text => return Err(format!("n{node} ends with\n{text}\ninstead of\n{other}")),
                Some(_) => {}
            }
        }
        Ok(())
    }

    pub(super) fn facts(&self) -> String {
        let name = |id: &MemberId| match self.nodes.iter().position(|n| n.id == *id) {
            Some(node) => format!("n{node}"),
            None => id.to_string(),
        };
        let names = |ids: &[MemberId]| ids.iter().map(name).collect::<Vec<_>>().join(",");
        let told = self.nodes.iter().enumerate().map(|(i, n)| match &n.member {
            None => format!("n{i} {:?} does not run", n.fate),
            Some(m) => {
                let s = m.status();
                let (leader, voters) = (s.leader.as_ref().map_or_else(|| "nobody".to_owned(), name), names(&s.voters));
                let probe = self.probes.get(&i);
                let (wrote, read) = (probe.is_some_and(|p| p.wrote), probe.is_some_and(|p| p.did_read));
                format!(
                    "n{i} {:?} {:?} term {} under {leader}, applied {} committed {} last {}, voters {voters} learners {} wrote {wrote} read {read}",
                    n.fate, s.role, s.term, s.applied, s.committed, s.last_index, names(&s.learners)
                )
            }
        });
        told.collect::<Vec<_>>().join("; ")
    }

    /// A write and a read at every healthy member, asked for until they are done.
    fn probe(&mut self) -> Result<(), String> {
        for node in self.wanted() {
            let probe = self.probes.entry(node).or_default();
            let (write, read) = (!probe.wrote && probe.write.is_none(), !probe.did_read && probe.read.is_none());
            if write {
                let number = self.new_number();
                self.probes.entry(node).or_default().write = Some(number);
                let key = client::register(0);
                let intent = Intent { puts: vec![key.clone()], ..Intent::default() };
                self.ledger.intend(number, intent);
                self.begin(number, None, node, Kind::Client(What::Write), Txn::of(people::write(number, key, true)))?;
            }
            if read {
                let number = self.new_number();
                self.probes.entry(node).or_default().read = Some(number);
                self.begin(number, None, node, Kind::Client(What::Read), Txn::default())?;
            }
        }
        if !self.served() {
            self.later(200_000, Event::Probe);
        }
        Ok(())
    }

    fn finish(mut self) -> Report {
        for node in &self.nodes {
            for name in node.disk.names() {
                self.trace.bytes(name.as_bytes());
                self.trace.bytes(&node.disk.content(&name).unwrap_or_default());
            }
            self.report.disk.add(&node.disk.counts());
        }
        let report = &mut self.report;
        report.hash = self.trace.hash();
        report.events = self.step;
        report.simulated_s = self.now / SECOND;
        report.terms = self.judge.terms();
        report.expired = self.judge.expired;
        report.compared = self.judge.compared;
        report.native = self.primitives.judged.values().sum();
        report.handed_on = self.locks.handed_over;
        report.replayed = self.requests.replayed;
        self.report
    }
}
