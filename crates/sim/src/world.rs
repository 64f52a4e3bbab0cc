//! One member on a bad disk, its clients, and everything that can happen to them under one seed.
//!
//! Promises. Each step of a run is drawn from its seed and nothing else. Faults come first; then the disk heals, and the member must
//! serve again within bounded simulated time, driven by nothing but the moments that it asks for itself (`Effects::wake_at`).
//! What is judged, and by whom: `oracle/`. What the shell does (changes before answers, jobs in order, a fault ends the
//! process) is done here as the server does it.

use crate::client::{self, Call, Client, What};
use crate::disk::{Counts, Faults, Lie, SimDisk};
use crate::oracle::leases::Leases;
use crate::oracle::ledger::{Ledger, writer};
use crate::oracle::linear::{self, Touch};
use crate::oracle::locks::Locks;
use crate::oracle::requests::Requests;
use crate::oracle::state;
use crate::random::Random;
use crate::trace::Trace;
use std::collections::{BTreeMap, VecDeque};
use tenure_machine::*;
use tenure_replica::{Alarm, Answer, Config, Effects, Job, JobDone, Member, Millis, OpenError, Renewal, run_job};

const MEMBER: MemberId = MemberId(1);
const TICK_MS: u64 = 100;
const ELECTION_TICKS: usize = 10;
const ELECTION_MS: u64 = TICK_MS * ELECTION_TICKS as u64;
/// A healthy member must serve within this.
const RECOVERY_MS: u64 = 10_000;
const OPENS_MAX: u32 = 40;

/// A bug that the run plays on purpose, to see that an oracle notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The disk breaks its word.
    Disk(Lie),
    /// Clients are told that a write is done before the member has said so.
    EarlyAnswers,
    /// The log's newest bytes are cut off while the member is down.
    CutLog,
    /// An older copy of the folder is put back while the member is down.
    OldFolder,
    /// A grant is told to a second client too.
    SecondHolder,
    /// The member's clock runs twice as fast as the world's.
    FastClock,
    /// A retry gets the answer of another request.
    WrongReplay,
    /// One key of a transaction of several is not told to the watcher.
    HalfCommit,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    pub shown: bool,
    pub bug: Option<Bug>,
    /// A short run whose power goes at this call to the disk, instead of random faults.
    pub die_at: Option<u64>,
}

/// What a run went through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub hash: u64,
    pub calls: u64,
    pub acknowledged: u64,
    pub unknown: u64,
    pub recovered_unknown: u64,
    pub power_losses: u64,
    pub kills: u64,
    pub faults: u64,
    pub flips_detected: u64,
    pub flips_harmless: u64,
    pub flips_torn: u64,
    pub snapshots: u64,
    pub expired: u64,
    pub handed_over: u64,
    pub replayed: u64,
    pub disk_calls: u64,
    pub disk: Counts,
}

impl Report {
    pub fn add(&mut self, other: &Report) {
        self.calls += other.calls;
        self.acknowledged += other.acknowledged;
        self.unknown += other.unknown;
        self.recovered_unknown += other.recovered_unknown;
        self.power_losses += other.power_losses;
        self.kills += other.kills;
        self.faults += other.faults;
        self.flips_detected += other.flips_detected;
        self.flips_harmless += other.flips_harmless;
        self.flips_torn += other.flips_torn;
        self.snapshots += other.snapshots;
        self.expired += other.expired;
        self.handed_over += other.handed_over;
        self.replayed += other.replayed;
        self.disk_calls += other.disk_calls;
        self.disk.add(&other.disk);
    }
}

struct World {
    random: Random,
    trace: Trace,
    options: Options,
    disk: SimDisk,
    member: Option<Member<SimDisk>>,
    boot: u64,
    now_ms: u64,
    last_poll_ms: u64,
    wake_at_ms: u64,
    /// The state holds everything that the log held when it was opened.
    recovered_at: Option<u64>,
    serving: bool,
    jobs: VecDeque<Job>,
    done: VecDeque<JobDone>,
    faults: Faults,
    clients: Vec<Client>,
    calls: BTreeMap<u64, Call>,
    tickets: BTreeMap<Ticket, u64>,
    /// Answered requests that were asked once more, as a network that repeats messages does.
    echoes: BTreeMap<Ticket, RequestId>,
    retries: Vec<u64>,
    next_call: u64,
    step: u64,
    ledger: Ledger,
    leases: Leases,
    locks: Locks,
    requests: Requests,
    touches: BTreeMap<Vec<u8>, Vec<Touch>>,
    /// Where the state was last looked at whole, and what it was.
    seen: Option<(Position, String)>,
    old_folder: Option<SimDisk>,
    report: Report,
}

/// Runs one seed.
pub fn run(seed: u64, options: Options) -> Result<Report, String> {
    let mut random = Random::new(seed);
    let disk = SimDisk::new(random.fork());
    if let Some(Bug::Disk(lie)) = options.bug {
        disk.set_lie(Some(lie));
    }
    let clients = if options.die_at.is_some() { 2 } else { random.between(1, 4) as usize };
    let mut world = World {
        trace: Trace::new(options.shown),
        options,
        disk,
        member: None,
        boot: 0,
        now_ms: random.below(1_000_000),
        last_poll_ms: 0,
        wake_at_ms: 0,
        recovered_at: None,
        serving: false,
        jobs: VecDeque::new(),
        done: VecDeque::new(),
        faults: Faults::default(),
        clients: vec![Client { renews: true, ..Client::default() }; clients],
        calls: BTreeMap::new(),
        tickets: BTreeMap::new(),
        echoes: BTreeMap::new(),
        retries: Vec::new(),
        next_call: 1,
        step: 0,
        ledger: Ledger::default(),
        leases: Leases::default(),
        locks: Locks::default(),
        requests: Requests::default(),
        touches: BTreeMap::new(),
        seen: None,
        old_folder: None,
        report: Report::default(),
        random,
    };
    world.play().map_err(|why| format!("step {} at {} ms: {why}", world.step, world.now_ms))?;
    Ok(world.finish())
}

impl World {
    fn play(&mut self) -> Result<(), String> {
        let steps = if self.options.die_at.is_some() { 160 } else { self.random.between(200, 900) };
        if let Some(at) = self.options.die_at {
            self.disk.die_after(Some(at));
        } else {
            self.draw_faults();
        }
        for _ in 0..steps {
            self.one_step()?;
        }
        self.heal()
    }

    fn draw_faults(&mut self) {
        self.faults = match self.random.below(6) {
            0 => Faults { write: 30, ..Faults::default() },
            1 => Faults { sync: 30, ..Faults::default() },
            2 => Faults { names: 300, ..Faults::default() },
            3 => Faults { write: 20, sync: 20, names: 100, read: 20 },
            _ => Faults::default(),
        };
        self.disk.set_faults(self.faults);
    }

    fn one_step(&mut self) -> Result<(), String> {
        self.step += 1;
        if self.member.is_none() {
            return self.reopen();
        }
        self.pass_time();
        if self.serving {
            for index in 0..self.clients.len() {
                self.client_acts(index)?;
            }
        }
        if self.random.chance(3, 5) {
            self.run_a_job();
        }
        self.poll()?;
        if self.options.die_at.is_none() {
            self.mischief()?;
        }
        Ok(())
    }

    fn pass_time(&mut self) {
        self.now_ms += match self.random.below(200) {
            0 => self.random.between(1_500, 60_000),
            1..=4 => self.random.between(200, 900),
            5..=60 => self.random.between(10, 60),
            _ => self.random.below(8),
        };
    }

    /// What may go wrong between two rounds.
    fn mischief(&mut self) -> Result<(), String> {
        match self.random.below(400) {
            0..=1 => self.crash("the process is killed", false),
            2..=4 => self.crash("the power goes", true),
            5..=8 => {
                let calls = self.random.below(40);
                self.disk.die_after(Some(calls));
                Ok(())
            }
            9 => {
                let room = self.random.below(300_000);
                self.trace.say(|| format!("the disk has room for {room}"));
                self.disk.set_room(Some(room));
                Ok(())
            }
            10..=14 => {
                self.disk.set_room(None);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    // ---- The member's life ----

    fn config(&mut self) -> Config {
        self.boot += 1;
        let mut config = Config::alone(MEMBER, "simulated", self.boot, self.random.bytes());
        (config.tick_ms, config.election_ticks) = (TICK_MS, ELECTION_TICKS);
        config.first_segment_bytes = 64 << 10;
        config.segment_bytes = 64 << 10;
        config.snapshot_log_bytes = 30 << 10;
        config.disk_reserve_bytes = 100 << 10;
        config.max_batch_bytes = if self.boot.is_multiple_of(3) { 2_000 } else { 1 << 20 };
        config.autocompact = None;
        config
    }

    fn reopen(&mut self) -> Result<(), String> {
        let config = self.config();
        if self.options.die_at.is_none() && self.random.chance(1, 6) {
            let calls = self.random.below(60);
            self.disk.die_after(Some(calls));
        }
        match Member::open(self.disk.clone(), config, Millis(self.member_ms())) {
            Ok(member) => {
                self.opened(member);
                Ok(())
            }
            Err(why) => {
                self.trace.say(|| format!("not opened: {why}"));
                let forgivable = matches!(why, OpenError::Io { .. });
                if !forgivable {
                    return Err(format!("a folder that only crashed is refused: {why}"));
                }
                self.report.faults += 1;
                self.disk.set_room(None);
                self.end_of_process(self.disk.is_dead())
            }
        }
    }

    fn opened(&mut self, member: Member<SimDisk>) {
        let status = member.status();
        self.trace.say(|| format!("boot {} opened: {status:?}", self.boot));
        self.recovered_at = Some(status.last_index);
        self.serving = false;
        self.last_poll_ms = self.now_ms;
        self.wake_at_ms = self.now_ms;
        self.member = Some(member);
        if self.old_folder.is_none() && self.random.chance(1, 3) {
            self.old_folder = Some(self.disk.copy());
        }
    }

    fn member_ms(&self) -> u64 {
        match self.options.bug {
            Some(Bug::FastClock) => self.now_ms * 2,
            _ => self.now_ms,
        }
    }

    fn crash(&mut self, how: &str, power: bool) -> Result<(), String> {
        self.trace.say(|| how.to_owned());
        self.end_of_process(power)
    }

    /// The process is over; with the power, so is everything that was not synced.
    fn end_of_process(&mut self, power: bool) -> Result<(), String> {
        self.member = None;
        self.jobs.clear();
        self.done.clear();
        self.echoes.clear();
        let open: Vec<u64> = std::mem::take(&mut self.tickets).into_values().collect();
        for number in open {
            self.unanswered(number);
        }
        if power {
            self.disk.power_lost();
            self.report.power_losses += 1;
            if self.options.die_at.is_none() && self.random.chance(1, 2) {
                self.flip()?;
            }
            self.sabotage();
        } else {
            self.disk.process_killed();
            self.report.kills += 1;
        }
        self.now_ms += self.random.below(20_000);
        Ok(())
    }

    /// What a bug of the run does to the folder while the member is down.
    fn sabotage(&mut self) {
        match self.options.bug {
            Some(Bug::CutLog) => {
                if let Some(last) = self.disk.last_log_write()
                    && let Some(mut content) = self.disk.content(&last.name)
                    && self.ledger.acknowledged() > 10
                {
                    content[last.start as usize..].fill(0);
                    self.disk.plant(&last.name, content);
                }
            }
            Some(Bug::OldFolder) => {
                if let Some(old) = &self.old_folder {
                    self.disk.revert_to(old);
                }
            }
            _ => {}
        }
    }

    /// Flips a bit and opens a copy: damage must be named, or not matter; in the last batch before its mark it may look torn.
    fn flip(&mut self) -> Result<(), String> {
        let Some(flip) = self.disk.flip(&mut self.random) else { return Ok(()) };
        let flipped = self.disk.copy();
        self.disk.apply_flip(&flip);
        let sound = self.disk.copy();
        let boot = self.boot;
        let (clean, damaged) = (self.look_into(sound), self.look_into(flipped));
        self.boot = boot;
        let (clean_state, clean_index, _) = clean.map_err(|why| format!("a sound folder is refused: {why}"))?;
        let outcome = match damaged {
            Err(OpenError::Io { .. }) => return Err(format!("{flip:?} shows as an error of the disk")),
            Err(why) => {
                self.trace.say(|| format!("{flip:?} is refused: {why}"));
                &mut self.report.flips_detected
            }
            Ok((same, _, _)) if same == clean_state => &mut self.report.flips_harmless,
            Ok((_, index, told)) if self.disk.is_in_last_batch(&flip) && told && index <= clean_index => {
                &mut self.report.flips_torn
            }
            Ok((other, index, told)) => {
                let last = self.disk.last_log_write();
                let facts = format!("last entry {index} instead of {clean_index}, told: {told}, last write {last:?}");
                return Err(format!("{flip:?} was served ({facts}):\n{other}\ninstead of\n{clean_state}"));
            }
        };
        *outcome += 1;
        Ok(())
    }

    /// The state that a folder comes to by itself, the log's last entry, and whether a torn tail was told.
    fn look_into(&mut self, disk: SimDisk) -> Result<(String, u64, bool), OpenError> {
        let config = Config { boot: 1, random: [7; 32], seed: 1, ..self.config() };
        let mut member = Member::open(disk, config, Millis(0))?;
        let last = member.status().last_index;
        let told = member.status().alarms.iter().any(|a| matches!(a, Alarm::TornTail { .. }));
        let mut out = Effects::default();
        for _ in 0..20 {
            if member.poll(Millis(0), &mut out, &mut |_, _, _| {}).is_err() || member.status().applied > last {
                break;
            }
        }
        Ok((state::dump(member.machine()), last, told))
    }

    // ---- One round ----

    fn run_a_job(&mut self) {
        if self.random.coin()
            && let (Some(done), Some(member)) = (self.done.pop_front(), &mut self.member)
        {
            member.job_done(done);
        }
        let Some(job) = self.jobs.pop_front() else { return };
        self.report.snapshots += u64::from(matches!(job, Job::FinishSnapshot { .. }));
        let done = run_job(&mut self.disk.clone(), job);
        let calls = self.disk.calls();
        self.trace.say(|| format!("a job is done after {calls} calls to the disk"));
        self.done.push_back(done);
    }

    fn poll(&mut self) -> Result<(), String> {
        let at = Millis(self.member_ms());
        let Some(member) = &mut self.member else { return Ok(()) };
        if self.disk.is_dead() {
            return self.crash("the power went during a job", true);
        }
        self.leases.tick(self.now_ms.saturating_sub(self.last_poll_ms), ELECTION_MS);
        self.last_poll_ms = self.now_ms;
        let mut out = Effects::default();
        if let Err(fault) = member.poll(at, &mut out, &mut |_, _, _| {}) {
            self.trace.say(|| format!("the member stops: {fault}"));
            let from_disk = matches!(fault, tenure_replica::Fault::Disk { .. });
            if !from_disk {
                return Err(format!("the member stopped: {fault}"));
            }
            self.report.faults += 1;
            let power = self.disk.is_dead() || self.random.chance(1, 3);
            return self.end_of_process(power);
        }
        self.wake_at_ms = out.wake_at.map_or(self.now_ms + TICK_MS, |at| at.0);
        self.jobs.extend(out.jobs);
        self.check_recovery()?;
        if self.serving {
            self.give_out(out.changes, out.answers)?;
            self.look()?;
        }
        Ok(())
    }

    /// The first moment at which everything that the log held is in the state.
    fn check_recovery(&mut self) -> Result<(), String> {
        let Some(member) = &self.member else { return Ok(()) };
        let Some(wanted) = self.recovered_at.filter(|_| !self.serving) else { return Ok(()) };
        if !member.is_leader() || member.status().applied < wanted {
            return Ok(());
        }
        let machine = member.machine();
        let (compacted, revision) = (machine.compacted(), machine.revision());
        let slice = machine
            .changes(&state::all_keys(), compacted.next(), usize::MAX)
            .map_err(|why| format!("no history after a recovery: {why}"))?;
        let records = slice.changes.into_iter().map(|c| c.record).collect();
        self.trace.say(|| format!("recovered revision {revision} compacted {compacted}"));
        self.ledger.recovered(records, compacted.0, revision.0)?;
        self.compare_with_seen()?;
        self.serving = true;
        self.look()?;
        self.leases.restarted();
        self.settle_open_calls()
    }

    /// A state that was seen before the crash must come back exactly, if nothing was added to the log since.
    fn compare_with_seen(&mut self) -> Result<(), String> {
        let (Some((position, text)), Some(member)) = (self.seen.take(), &self.member) else { return Ok(()) };
        if self.recovered_at == Some(position.index.0) {
            let now = state::dump(member.machine());
            if now != text {
                return Err(format!("the state at entry {} was\n{text}\nand came back as\n{now}", position.index));
            }
        }
        Ok(())
    }

    /// After a recovery the fate of every open call is sealed, unless it is asked again.
    fn settle_open_calls(&mut self) -> Result<(), String> {
        let open: Vec<u64> = self.calls.values().filter(|c| c.unknown).map(|c| c.number).collect();
        for number in open {
            if self.calls[&number].txn.request.is_some() && self.random.chance(3, 4) {
                self.retries.push(number);
                continue;
            }
            let Some(call) = self.calls.remove(&number) else { continue };
            self.report.unknown += 1;
            self.clients[call.client].open -= 1;
            let sealed = self.ledger.seal(number);
            if sealed != Some(false) {
                self.touch_unknown(&call);
            }
        }
        Ok(())
    }

    fn unanswered(&mut self, number: u64) {
        if let Some(call) = self.calls.get_mut(&number) {
            call.unknown = true;
            // A renewal or a read has no outcome that could matter later.
            if matches!(call.what, What::Read | What::Renew { .. }) {
                let client = call.client;
                self.calls.remove(&number);
                self.clients[client].open -= 1;
            }
        }
    }

    fn give_out(&mut self, mut changes: Vec<Change>, answers: Vec<(Ticket, Answer)>) -> Result<(), String> {
        changes.retain(|c| c.record.key()[0] == Space::Keys as u8);
        if self.options.bug == Some(Bug::HalfCommit)
            && changes.len() > 1
            && changes[0].record.mod_revision() == changes[1].record.mod_revision()
        {
            changes.remove(1);
        }
        for change in &changes {
            self.trace.say(|| format!("change {:?}", change.record));
        }
        // What is new to the watcher; a recovery has shown the rest already.
        let newest = self.ledger.newest();
        changes.retain(|c| c.record.mod_revision().0 > newest);
        self.ledger.note(&changes)?;
        for (ticket, answer) in answers {
            self.answered(ticket, answer)?;
        }
        Ok(())
    }

    fn look(&mut self) -> Result<(), String> {
        let Some(member) = &self.member else { return Ok(()) };
        let before = self.leases.live();
        self.leases.look(|id| member.machine().session(id).map(|s| s.token))?;
        let after = self.leases.live();
        for (id, _) in before.iter().filter(|b| !after.contains(b)) {
            self.locks.session_may_end(*id, self.step);
        }
        for client in &mut self.clients {
            if let Some((id, token, _)) = client.session
                && !after.contains(&(id, token))
            {
                client.session = None;
                client.stale.append(&mut client.held);
                client.open_seqs.clear();
            }
        }
        let machine = member.machine();
        if machine.revision().0 < self.ledger.newest().max(self.ledger.acknowledged()) {
            return Err(format!("the revision went back to {}", machine.revision()));
        }
        if self.random.chance(1, 12) {
            let live = self.ledger.state();
            let (records, _) = machine.range_slice(&state::all_keys(), machine.revision(), None, usize::MAX);
            if !records.iter().eq(live.values()) {
                return Err(format!("the keys are {records:?} and were made {:?}", live.values().collect::<Vec<_>>()));
            }
        }
        self.seen = self.random.chance(1, 3).then(|| (machine.position(), state::dump(machine)));
        Ok(())
    }

    // ---- Clients ----

    fn client_acts(&mut self, index: usize) -> Result<(), String> {
        if let Some(place) = self.retries.iter().position(|n| self.calls.get(n).is_some_and(|c| c.client == index))
            && self.random.chance(1, 3)
        {
            let number = self.retries.remove(place);
            return self.try_call(number);
        }
        self.renew(index)?;
        if self.clients[index].open >= 3 || !self.random.chance(1, 4) {
            return Ok(());
        }
        let number = self.new_number();
        let newest = self.ledger.newest();
        let (what, mut txn, intent) = client::draw(number, index, &self.clients[index], newest, &mut self.random);
        txn.request = client::number_request(&mut self.clients[index], &mut self.random, &what);
        self.ledger.intend(number, intent);
        self.begin(number, index, what, txn)
    }

    fn new_number(&mut self) -> u64 {
        self.next_call += 1;
        self.report.calls += 1;
        self.next_call
    }

    fn begin(&mut self, number: u64, client: usize, what: What, txn: Txn) -> Result<(), String> {
        self.step += 1;
        let token_before = match &what {
            What::Acquire { name, .. } => self.locks.newest(name),
            _ => None,
        };
        let call = Call {
            number,
            client,
            what,
            txn,
            began: self.step,
            sent_ms: self.leases.uptime_ms(),
            revision_before: self.ledger.acknowledged(),
            token_before,
            tries: 0,
            unknown: false,
        };
        self.trace.say(|| format!("client {client} asks {number}: {:?}", call.what));
        self.calls.insert(number, call);
        self.clients[client].open += 1;
        self.try_call(number)
    }

    fn renew(&mut self, index: usize) -> Result<(), String> {
        let client = &mut self.clients[index];
        let Some((session, _, ttl_ms)) = client.session else { return Ok(()) };
        if !client.renews || self.now_ms < client.renew_at_ms {
            return Ok(());
        }
        client.renew_at_ms = self.now_ms + ttl_ms / 3;
        client.renews = self.random.chance(9, 10);
        let number = self.new_number();
        self.begin(number, index, What::Renew { session }, Txn::default())
    }

    fn try_call(&mut self, number: u64) -> Result<(), String> {
        let Some(member) = &mut self.member else { return Ok(()) };
        let Some(call) = self.calls.get_mut(&number) else { return Ok(()) };
        call.tries += 1;
        call.unknown = false;
        let taken = match &call.what {
            What::Read => member.read(),
            What::Renew { session } => Ok(member.renew(*session, 0)),
            _ => member.submit(call.txn.clone()),
        };
        match &call.what {
            What::SessionEnd { session } => {
                self.leases.end_asked(*session);
                self.locks.session_may_end(*session, self.step);
            }
            What::Release { name, token, .. } => self.locks.release_asked(name, *token, self.step),
            _ => {}
        }
        match taken {
            Ok(ticket) => {
                if self.tickets.insert(ticket, number).is_some() {
                    return Err(format!("ticket {ticket:?} was given twice"));
                }
                if self.options.bug == Some(Bug::EarlyAnswers) && self.random.chance(1, 4) {
                    return self.answer_early(number);
                }
                Ok(())
            }
            Err(refusal) => {
                self.trace.say(|| format!("call {number} is not taken: {refusal}"));
                self.not_done(number)
            }
        }
    }

    /// The bug of a server that answers before it is told to.
    fn answer_early(&mut self, number: u64) -> Result<(), String> {
        let Some(machine) = self.member.as_ref().map(Member::machine) else { return Ok(()) };
        let Some(What::Write) = self.calls.get(&number).map(|c| c.what.clone()) else { return Ok(()) };
        let reply = Reply {
            revision: machine.revision().next(),
            replayed: false,
            result: Ok(TxnReply { succeeded: true, results: Vec::new() }),
        };
        self.ledger.promise(number, reply.revision.0);
        Ok(())
    }

    /// A refusal before anything was proposed: this try did nothing; an earlier one may have.
    fn not_done(&mut self, number: u64) -> Result<(), String> {
        let Some(call) = self.calls.get_mut(&number) else { return Ok(()) };
        if call.tries > 1 {
            call.unknown = true;
            self.retries.push(number);
            return Ok(());
        }
        let Some(call) = self.calls.remove(&number) else { return Ok(()) };
        self.close(&call);
        self.ledger.refuse(number)
    }

    fn close(&mut self, call: &Call) {
        let client = &mut self.clients[call.client];
        client.open -= 1;
        client.close_request(call.txn.request);
    }

    fn answered(&mut self, ticket: Ticket, answer: Answer) -> Result<(), String> {
        self.step += 1;
        if ticket.boot != self.boot {
            return Err(format!("{ticket:?} of an earlier life is answered {answer:?}"));
        }
        if let Some(id) = self.echoes.remove(&ticket) {
            return self.echoed(id, answer);
        }
        let Some(number) = self.tickets.remove(&ticket) else {
            return Err(format!("{ticket:?} is answered {answer:?}, and nobody waits or it was answered before"));
        };
        self.trace.say(|| format!("call {number}: {answer:?}"));
        let Some(call) = self.calls.get(&number).cloned() else { return Ok(()) };
        match answer {
            Answer::Done(reply) => {
                self.calls.remove(&number);
                self.close(&call);
                self.report.acknowledged += 1;
                self.done(&call, reply)
            }
            Answer::Unknown => {
                self.unanswered(number);
                if self.calls.contains_key(&number) {
                    self.retries.push(number);
                }
                Ok(())
            }
            Answer::Refused(_) => self.not_done(number),
            Answer::ReadReady => {
                self.calls.remove(&number);
                self.close(&call);
                self.read(&call)
            }
            Answer::Renewed(result) => {
                self.calls.remove(&number);
                self.close(&call);
                self.renewed(&call, result)
            }
        }
    }

    fn renewed(&mut self, call: &Call, result: Result<Renewal, Rejection>) -> Result<(), String> {
        let What::Renew { session } = call.what else { return Err(format!("{call:?} was answered as a renewal")) };
        match result {
            Ok(renewal) => self.leases.renewed(session, renewal.token, call.sent_ms),
            Err(_) => {
                let there = self.member.as_ref().and_then(|m| m.machine().session(session));
                if let Some(there) = there {
                    return Err(format!("renewal of session {session} says that it is over: {there:?}"));
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, call: &Call) -> Result<(), String> {
        let Some(machine) = self.member.as_ref().map(Member::machine) else { return Ok(()) };
        let reply =
            machine.range(&Range::of(client::read_spans())).map_err(|why| format!("a read is refused: {why}"))?;
        if machine.revision().0 < call.revision_before {
            return Err(format!(
                "a read at {} began after {} was acknowledged",
                machine.revision(),
                call.revision_before
            ));
        }
        let saw: BTreeMap<&[u8], Option<u64>> = reply.records.iter().map(|r| (r.key(), writer(r))).collect();
        for n in 0..client::REGISTERS {
            let key = client::register(n);
            let value = saw.get(key.as_bytes()).copied().flatten();
            self.touch(call, key.as_bytes(), Some(value), None);
        }
        Ok(())
    }

    fn touch(&mut self, call: &Call, key: &[u8], saw: Option<linear::Value>, left: Option<linear::Value>) {
        let touch = Touch { call: call.number, began: call.began, ended: Some(self.step), saw, left };
        self.touches.entry(key.to_vec()).or_default().push(touch);
    }

    fn touch_unknown(&mut self, call: &Call) {
        for (key, left) in client::writes(&call.txn) {
            let touch = Touch { call: call.number, began: call.began, ended: None, saw: None, left: Some(left) };
            self.touches.entry(key).or_default().push(touch);
        }
    }

    fn done(&mut self, call: &Call, reply: Reply) -> Result<(), String> {
        if let Some(id) = call.txn.request {
            self.requests.answered(id, &reply)?;
            self.echo(call, id);
        }
        if !reply.replayed && reply.revision.0 < call.revision_before {
            return Err(format!(
                "call {} got revision {} after {} had been told",
                call.number, reply.revision, call.revision_before
            ));
        }
        let refused = reply.result.is_err();
        // An old request under a session that is gone: its outcome cannot be told any more.
        if matches!(&reply.result, Err(why) if why.leaves_open()) && call.tries > 1 {
            self.touch_unknown(call);
            return Ok(());
        }
        let did = matches!(&reply.result, Ok(r) if r.succeeded && !r.results.iter().all(|o| matches!(o, OpReply::Delete { deleted: 0, .. })));
        self.ledger.acknowledge(call.number, reply.revision.0, did)?;
        if refused {
            return Ok(());
        }
        self.touch_done(call, &reply);
        self.learn(call, &reply)
    }

    /// Asks once more what was just answered.
    fn echo(&mut self, call: &Call, id: RequestId) {
        if self.random.chance(1, 6)
            && let Some(Ok(ticket)) = self.member.as_mut().map(|m| m.submit(call.txn.clone()))
        {
            self.trace.say(|| format!("call {} is repeated", call.number));
            self.echoes.insert(ticket, id);
        }
    }

    fn echoed(&mut self, id: RequestId, answer: Answer) -> Result<(), String> {
        self.trace.say(|| format!("repeated {id:?}: {answer:?}"));
        let Answer::Done(mut reply) = answer else { return Ok(()) };
        if self.options.bug == Some(Bug::WrongReplay) {
            reply.revision = reply.revision.next();
        }
        // A later request of the session has said that the answer arrived, so it is forgotten; it must not run either.
        if matches!(&reply.result, Err(why) if why.leaves_open()) {
            return Ok(());
        }
        self.requests.answered(id, &reply)
    }

    fn touch_done(&mut self, call: &Call, reply: &Reply) {
        let Ok(result) = &reply.result else { return };
        if !result.succeeded {
            return;
        }
        for (op, answer) in call.txn.then.iter().zip(&result.results) {
            match (op, answer) {
                (Op::Put(put), OpReply::Put { prev }) if client::is_register(put.key.as_bytes()) => {
                    let saw = put.prev.then(|| prev.as_ref().and_then(writer));
                    self.touch(call, put.key.as_bytes(), saw, Some(Some(call.number)));
                }
                (Op::Delete(delete), OpReply::Delete { prev, .. }) => {
                    let prev: BTreeMap<&[u8], Option<u64>> = prev.iter().map(|r| (r.key(), writer(r))).collect();
                    for key in client::registers_in(&delete.span) {
                        let saw = prev.get(key.as_bytes()).copied().flatten();
                        self.touch(call, key.as_bytes(), Some(saw), Some(None));
                    }
                }
                _ => {}
            }
        }
    }

    /// What the client keeps of a success.
    fn learn(&mut self, call: &Call, reply: &Reply) -> Result<(), String> {
        let Ok(result) = &reply.result else { return Ok(()) };
        match (&call.what, result.results.first()) {
            (What::SessionCreate { .. }, Some(OpReply::SessionCreated { id, token, ttl_ms })) => {
                let there = self.member.as_ref().is_some_and(|m| m.machine().session(*id).is_some());
                // The remembered answer of a session that has ended since brings nothing back.
                if !reply.replayed || there {
                    self.leases.created(*id, *token, *ttl_ms, call.sent_ms);
                    let client = &mut self.clients[call.client];
                    client.session = Some((*id, *token, *ttl_ms));
                    client.renews = true;
                    client.renew_at_ms = self.now_ms + ttl_ms / 3;
                    client.next_seq = 0;
                    client.open_seqs.clear();
                }
            }
            (What::Acquire { name, session }, Some(OpReply::LockGranted(grant))) => {
                self.locks.granted(name, grant.token, *session, call.number, call.token_before)?;
                if self.options.bug == Some(Bug::SecondHolder) {
                    self.locks.granted(name, grant.token.next(), SessionId(session.0 + 1), call.number + 1, None)?;
                }
                let client = &mut self.clients[call.client];
                if client.session.is_some_and(|(id, ..)| id == *session) {
                    client.held.push((name.clone(), grant.token));
                }
            }
            (What::Release { name, token, .. }, _) => {
                self.locks.released(name, *token, reply.revision.0, reply.replayed);
                let client = &mut self.clients[call.client];
                client.held.retain(|h| h != &(name.clone(), *token));
                client.stale.push((name.clone(), *token));
            }
            (What::Guarded { name, token }, _) => self.locks.guarded(name, *token, reply.revision.0),
            _ => {}
        }
        Ok(())
    }

    // ---- The end ----

    /// No more faults: the member must come back, serve a write and a read, and end what nobody keeps alive.
    fn heal(&mut self) -> Result<(), String> {
        self.trace.say(|| "healed".to_owned());
        self.disk.set_faults(Faults::default());
        self.disk.set_room(None);
        if self.options.bug.is_none() {
            self.disk.set_lie(None);
        }
        self.disk.die_after(None);
        if self.disk.is_dead() || self.random.coin() {
            self.crash("one last time the power goes", true)?;
        }
        self.disk.die_after(None);
        let mut opens = 0;
        while self.member.is_none() {
            opens += 1;
            if opens > OPENS_MAX {
                return Err("a healthy folder does not open".to_owned());
            }
            self.options.die_at.get_or_insert(0);
            self.reopen()?;
        }
        self.clients.iter_mut().for_each(|c| c.renews = false);
        let began = self.now_ms;
        let mut write = None;
        loop {
            self.advance_to_wake();
            self.poll()?;
            while !self.jobs.is_empty() || !self.done.is_empty() {
                self.run_a_job();
            }
            if write.is_none() && self.serving {
                write = self.last_write()?;
            } else if write.is_some_and(|number| !self.calls.contains_key(&number)) {
                break;
            }
            if self.now_ms > began + RECOVERY_MS {
                let status = self.member.as_ref().map(Member::status);
                return Err(format!("a healthy member serves nothing within {RECOVERY_MS} ms: {status:?}"));
            }
        }
        self.let_sessions_end()?;
        self.locks.check()?;
        for call in std::mem::take(&mut self.calls).into_values() {
            self.touch_unknown(&call);
        }
        for (key, touches) in &self.touches {
            linear::check(touches).map_err(|why| format!("key {}: {why}", key.escape_ascii()))?;
        }
        Ok(())
    }

    fn advance_to_wake(&mut self) {
        // Half of the way now and then: an early poll does no harm. The clock of the member decides, so a fast one runs ahead.
        let wake = if self.options.bug == Some(Bug::FastClock) { self.now_ms + 10 } else { self.wake_at_ms };
        self.now_ms = wake.max(self.now_ms + 1);
    }

    /// A write that a healthy member may refuse only until it has noticed that there is room again.
    fn last_write(&mut self) -> Result<Option<u64>, String> {
        let number = self.new_number();
        let put = Put {
            key: client::register(0),
            value: crate::oracle::ledger::value(number, 10),
            session: SessionId(0),
            prev: true,
            keep_value: false,
            keep_session: false,
        };
        let intent = crate::oracle::ledger::Intent { puts: vec![put.key.clone()], ..Default::default() };
        self.ledger.intend(number, intent);
        self.begin(number, 0, What::Write, Txn::of(Op::Put(put)))?;
        Ok(self.calls.contains_key(&number).then_some(number))
    }

    fn let_sessions_end(&mut self) -> Result<(), String> {
        let until = self.leases.uptime_ms() + 15_000;
        while self.leases.uptime_ms() < until && !self.leases.live().is_empty() {
            self.advance_to_wake();
            self.poll()?;
        }
        match self.leases.overdue(2_000).first() {
            Some(session) => Err(format!("session {session} outlives its time to live by 2 s and nobody renews it")),
            None => Ok(()),
        }
    }

    fn finish(mut self) -> Report {
        for name in self.disk.names() {
            let content = self.disk.content(&name).unwrap_or_default();
            self.trace.bytes(name.as_bytes());
            self.trace.bytes(&content);
        }
        self.report.hash = self.trace.hash();
        self.report.disk = self.disk.counts();
        self.report.disk_calls = self.disk.calls();
        self.report.recovered_unknown = self.ledger.recovered_unknown;
        self.report.expired = self.leases.expired;
        self.report.handed_over = self.locks.handed_over;
        self.report.replayed = self.requests.replayed;
        self.report
    }
}
