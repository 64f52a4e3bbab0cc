//! One member: what comes in, one round of work, what goes out.
//!
//! Promises. E1: a transaction is answered `Done` only when its entry is committed, synced here and applied; changes of an entry are in
//! `Effects` with or before its answers. E2: a read is `ReadReady` only when all that was answered before it came is applied,
//! confirmed by a round of heartbeats that began after it. E3: nothing is answered before an entry of the leader's own term is
//! applied. E4: a failed write or sync of the log is the end of this member. E5: a lone member that leads does all of a write in one poll,
//! with one write and one sync for everything that waited.
//! E6: any member of a group takes requests: `forward.rs`. Who the others are: `group.rs`. Snapshots: `snapshots.rs`.
//! Not promised. That a caller learns the outcome of what was under way when a majority was lost: it is told `Unknown`.
//!
//! One function, `handle_ready`, does what the consensus library asks. A leader's messages leave before its own sync, so that all disks
//! work at once; everything else leaves after it, and so do those of a leader whose term or vote is not on disk yet: a sole voter leads
//! before that, and a crash could give one term two logs. So a member never says what a crash could make untrue.

use crate::clock::{Clock, Millis};
use crate::config::Config;
use crate::config::Sabotage;
use crate::disk::Disk;
use crate::effects::{Alarm, Answer, Effects, Heard, Refusal, Renewal, Role, Status};
use crate::fault::{Fault, OpenError};
use crate::identity::{self, Identity};
use crate::job::{Job, JobDone};
use crate::log::{self, Log, Recovered, Sizes};
use crate::peer::{Lane, NotTaken, PeerMessage, Touched};
use crate::room::Room;
use crate::sessions::{Deadlines, Due, Renewing, Told};
use crate::snapshot::{self, LoadError};
use crate::store::{Offer, Store};
use protobuf::Message as _;
use raft::eraftpb::{
    ConfChange, ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType, Message, MessageType,
};
use raft::{RawNode, StateRole};
use raft_proto::ConfChangeI;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use tenure_machine::{
    Applied, Batch, Index, LogTime, Machine, MemberId, Op, Origin, Position, Rejection, SessionEvent, SessionId,
    SessionToken, Term, Ticket, Txn, Wait,
};

mod forward;
mod group;
mod snapshots;

pub use group::join_digest;

use forward::{Queued, Remembered, Sent, Touching, Wants};
use group::{Complaints, Link};
use snapshots::{Incoming, Outgoing};

/// Numbers of reads and renewals, so that those of transactions stay without gaps in a batch.
const READ_NUMBERS: u64 = 1 << 63;
/// Expiries and checkpoints of one poll: they share the log with foreground work, and what comes meanwhile waits for all of them.
const DUE_MAX: usize = 64;
/// The log is quiet after this long, and gets its synced mark.
const QUIET_MS: u64 = 200;
/// How long an acquire that will only join a queue of waiters may wait for company; see `rides_along`.
const RIDE_MS: u64 = 2;
/// Log time is stamped this often while a deadline is near, and otherwise.
const STAMP_NEAR_MS: u64 = 5_000;
const STAMP_FAR_MS: u64 = 300_000;
const NEAR_MS: u64 = 3_600_000;
/// Comparisons of the members' states do not follow each other faster.
const CHECK_EVERY_MS: u64 = 5_000;
const COMPACT_EVERY_MS: u64 = 10_000;
/// Free space is asked for this often, and at once when what was written since then leaves too little.
const DISK_EVERY_MS: u64 = 1_000;
/// Failed jobs are tried again after this long.
const RETRY_MS: u64 = 5_000;
/// Changes given back by one slice of physical compaction.
const MAINTAIN_BUDGET: usize = 1_000;
/// Applied entries kept in memory for the other members of a group.
const CACHE_BYTES: usize = 8 << 20;
const MESSAGE_BYTES: u64 = 1 << 20;
/// Messages that wait for a poll; more are dropped, which they allow for.
const INBOX_MAX: usize = 4_096;
/// Pieces of a snapshot that are under way, and that one poll adds.
const SNAPSHOT_JOBS_MAX: usize = 4;
const SNAPSHOT_BLOCKS_PER_POLL: usize = 2;
const SNAPSHOT_SYNC_BYTES: u64 = 4 << 20;
const SNAPSHOTS_KEPT: usize = 2;
const SNAPSHOT_JOB: &str = "writing a snapshot";
const TAKING_JOB: &str = "taking a snapshot";
/// A log of more files than this is due for a snapshot, however short it is.
const SEGMENTS_MAX: usize = 24;

pub struct Member<D: Disk> {
    disk: D,
    config: Config,
    identity: Identity,
    log: Log,
    raft: RawNode<Store>,
    machine: Machine,
    clock: Clock,
    lead: Option<Lead>,
    leader_changes: u64,

    /// Transactions for the next poll.
    queue: VecDeque<Queued>,
    /// Since when the queue holds nothing but acquires that will wait.
    riding_since: Option<u64>,
    queue_bytes: usize,
    next_number: u64,
    /// Callers of transactions that have no answer yet.
    waiting: BTreeSet<u64>,
    proposed: VecDeque<Proposed>,
    inbox: VecDeque<(MemberId, Message)>,
    outbox: Vec<(MemberId, Lane, Vec<u8>)>,

    // Others: `forward.rs`, `group.rs`, `snapshots.rs`.
    links: BTreeMap<MemberId, Link>,
    leader_heard_at: u64,
    /// When this member was in contact with the group last, as the driver's clock showed, and in counted time; see `contact_at`.
    contact: Option<(Millis, u64)>,
    /// When the leader said last that it cannot answer.
    turned_down_at: Option<u64>,
    /// Since when nobody leads, as far as this member knows.
    leaderless_since: Option<u64>,
    /// The leader and the term that questions were put to.
    followed: (u64, u64),
    sent: BTreeMap<u64, Sent>,
    sent_bytes: usize,
    remembered: BTreeMap<u64, Remembered>,
    touching: BTreeMap<u64, Touching>,
    touched: BTreeMap<(MemberId, u64), Vec<(u64, Touched)>>,
    /// The highest number that was taken from each life of each other member.
    taken_numbers: BTreeMap<MemberId, (u64, u64)>,
    /// Answers that came between polls.
    told: Vec<(Ticket, Answer)>,
    /// A question was turned away: not to be put again in this poll.
    pause_asking: bool,
    campaign_at: Option<u64>,
    /// By how much this member lets others go first, and how often it may still try.
    campaign_step: u64,
    campaign_tries: u32,
    /// Why this folder can be no member any more.
    expelled: Option<String>,
    /// The number of an earlier start that was turned away; this one passes for no newer.
    turned_away: Option<u64>,
    /// Members that are not in the table yet and were let in: name and address.
    strangers: BTreeMap<MemberId, (String, String)>,
    strangers_version: u64,
    complaints: Complaints,
    /// Counts changes of the configuration.
    conf_version: u64,
    /// Registrations in the log of a leader that it has not applied. They count: a member whose word is needed for the entry that
    /// registers it could not come otherwise.
    unapplied_storage: BTreeMap<MemberId, [u8; 16]>,
    /// The last entry that the newest leader was heard to have on disk.
    leader_end: (MemberId, u64),
    registering: Option<u64>,
    register_at: u64,
    reconcile_at: u64,
    list_at: u64,
    raise_at: u64,
    facts_at: u64,
    trouble_at: u64,
    check_at: u64,
    incoming: Option<Incoming>,
    next_fetch: u64,
    /// A snapshot that the log goes on from, whose file has not got its name.
    taken: Option<(snapshot::Meta, u64)>,
    outgoing: Outgoing,
    /// Since when a peer has not asked for a piece of what it was offered.
    offers: BTreeMap<MemberId, u64>,
    jobs: Vec<Job>,

    next_read: u64,
    asked: Round,
    rounds: BTreeMap<u64, Round>,
    /// Rounds that are confirmed up to an index, and wait for it to be applied.
    confirmed: Vec<(u64, Round)>,
    /// Refusals of calls that only give a ticket.
    refused: Vec<(Ticket, Refusal)>,
    deadlines: Deadlines,

    applied: Applied,
    snapshots: Snapshots,
    wrote_at: u64,
    compact_at: u64,
    disk_at: u64,
    retry_at: u64,
    room: Room,
    alarms: Vec<Alarm>,
    stopping: bool,
    faulty: bool,
}

/// What a leader knows about its own term.
struct Lead {
    term: u64,
    /// Log time at promotion, and the member's time then.
    base: LogTime,
    since: u64,
    /// The newest stamp that it put into the log.
    stamped: LogTime,
    /// An entry of this term is applied.
    serving: bool,
    genesis: bool,
}

impl Lead {
    fn stamp(&self, elapsed: u64) -> LogTime {
        self.base.plus(elapsed - self.since)
    }

    /// When the member's clock will be at a log time.
    fn moment(&self, stamp: LogTime) -> u64 {
        self.since.saturating_add(stamp.0.saturating_sub(self.base.0))
    }
}

/// An entry of our own that is not applied yet. The batch is kept so that it need not be decoded again.
struct Proposed {
    index: u64,
    term: u64,
    first: u64,
    count: u64,
    arrived: u64,
    /// Its callers wait here.
    is_own: bool,
    given_up: bool,
    batch: Batch,
}

/// Calls that share one read-index round.
#[derive(Default)]
struct Round {
    reads: Vec<Ticket>,
    renewals: Vec<(SessionId, SessionToken, Ticket)>,
    /// Rounds of followers: who, in which life, and their number of it.
    remote: Vec<(MemberId, u64, u64)>,
    /// When the first of them came, and when the leader was asked last.
    since: u64,
    asked_at: u64,
}

impl Round {
    fn is_empty(&self) -> bool {
        self.reads.is_empty() && self.renewals.is_empty() && self.remote.is_empty()
    }

    /// Before something is added that came then.
    fn begin(&mut self, since: u64) {
        self.since = if self.is_empty() { since } else { self.since.min(since) };
    }

    fn absorb(&mut self, mut other: Self) {
        self.begin(other.since);
        self.reads.append(&mut other.reads);
        self.renewals.append(&mut other.renewals);
        self.remote.append(&mut other.remote);
    }
}

#[derive(Default)]
struct Snapshots {
    /// Oldest first: index and bytes.
    files: Vec<(u64, u64)>,
    /// Files that were not fit to be loaded.
    damaged: Vec<String>,
    writing: Option<Writing>,
    /// A member waits for one that is newer than what is there.
    wanted: bool,
    number: u64,
    /// Bytes of log since the newest began.
    log_bytes: u64,
}

struct Writing {
    /// Tells its jobs from those of an attempt that was given up.
    number: u64,
    writer: snapshot::Writer,
    jobs: usize,
    synced_to: u64,
    /// The machine has given all its blocks.
    complete: bool,
    log_bytes: u64,
}

impl<D: Disk> Member<D> {
    /// Opens the folder, or makes it, and brings the state to where the log says that it is committed.
    pub fn open(mut disk: D, config: Config, now: Millis) -> Result<Self, OpenError> {
        config.check().map_err(|why| OpenError::Config { why })?;
        let sizes = Sizes { first_segment: config.first_segment_bytes, segment: config.segment_bytes };
        let names = disk.list().map_err(|error| OpenError::Io { doing: "list", file: ".".to_owned(), error })?;
        let mut alarms = Vec::new();
        let opened = if names.iter().any(|n| n == identity::FILE) {
            open_folder(&mut disk, &config, sizes, &names, &mut alarms)?
        } else {
            make_folder(&mut disk, &config, sizes, &names)?
        };
        let turned_away = identity::was_turned_away(&mut disk, &names)?;
        let mut member = Self::start(disk, config, opened, alarms, now)?;
        member.turned_away = turned_away;
        Ok(member)
    }

    fn start(disk: D, config: Config, opened: Opened, alarms: Vec<Alarm>, now: Millis) -> Result<Self, OpenError> {
        let Opened { identity, log, mut recovered, mut machine, snapshots, newest } = opened;
        let covered = machine.position().index.0;
        recovered.hard_state.commit = recovered.hard_state.commit.max(covered).max(recovered.conf.0);
        let applied = replay(&mut machine, &recovered)?;
        machine.set_memory_limits(config.memory);
        let since = recovered.entries.iter().filter(|e| e.index > covered);
        let log_bytes = since.map(|e| e.data.len() as u64 + 64).sum();
        let members_changed = recovered.conf.0 > 0;
        let mut store = Store::new(recovered.hard_state, recovered.conf.1, recovered.before, recovered.entries);
        store.members_changed = members_changed;
        store.newest = newest;
        // Recovered entries share the large pieces in which the log was read.
        let is_alone = store.conf_state.voters == [config.member.0] && store.conf_state.learners.is_empty();
        store.trim(applied, if is_alone { 0 } else { CACHE_BYTES });
        let raft = consensus(&config, store, applied)?;
        let clock = Clock::new(now, config.tick_ms, config.election_ms());
        Ok(Self {
            disk,
            identity,
            log,
            raft,
            machine,
            clock,
            lead: None,
            leader_changes: 0,
            queue: VecDeque::new(),
            riding_since: None,
            queue_bytes: 0,
            next_number: 1,
            waiting: BTreeSet::new(),
            proposed: VecDeque::new(),
            inbox: VecDeque::new(),
            outbox: Vec::new(),
            links: BTreeMap::new(),
            leader_heard_at: 0,
            contact: None,
            turned_down_at: None,
            leaderless_since: Some(0),
            followed: (0, 0),
            sent: BTreeMap::new(),
            sent_bytes: 0,
            remembered: BTreeMap::new(),
            touching: BTreeMap::new(),
            touched: BTreeMap::new(),
            taken_numbers: BTreeMap::new(),
            told: Vec::new(),
            pause_asking: false,
            campaign_at: None,
            campaign_step: 0,
            campaign_tries: 0,
            expelled: None,
            turned_away: None,
            strangers: BTreeMap::new(),
            strangers_version: 0,
            complaints: Complaints::default(),
            conf_version: 0,
            unapplied_storage: BTreeMap::new(),
            leader_end: (MemberId(0), 0),
            registering: None,
            register_at: 0,
            reconcile_at: 0,
            list_at: 0,
            raise_at: 0,
            facts_at: 0,
            trouble_at: 0,
            check_at: 0,
            incoming: None,
            next_fetch: 0,
            taken: None,
            outgoing: Outgoing::default(),
            offers: BTreeMap::new(),
            jobs: Vec::new(),
            next_read: READ_NUMBERS,
            asked: Round::default(),
            rounds: BTreeMap::new(),
            confirmed: Vec::new(),
            refused: Vec::new(),
            deadlines: Deadlines::default(),
            applied: Applied::default(),
            snapshots: Snapshots { log_bytes, ..snapshots },
            wrote_at: 0,
            compact_at: COMPACT_EVERY_MS,
            disk_at: 0,
            retry_at: 0,
            room: Room::unknown(),
            alarms,
            stopping: false,
            faulty: false,
            config,
        })
    }

    // What comes in.

    /// Takes a transaction for the next poll. Its answer comes with the ticket, for a wait possibly much later.
    pub fn submit(&mut self, txn: Txn) -> Result<Ticket, Refusal> {
        let bytes = weight(&txn);
        match self.may_take(&txn, bytes) {
            Err(full @ (Refusal::Memory(_) | Refusal::DiskFull)) => return self.answer_known(&txn).ok_or(full),
            taken => taken?,
        }
        self.remember(self.next_number, &txn);
        let number = self.enqueue(txn, bytes, Wants::Caller);
        self.waiting.insert(number);
        Ok(self.ticket(number))
    }

    /// What was done is answered as it was, however full it is by now.
    fn answer_known(&mut self, txn: &Txn) -> Option<Ticket> {
        let reply = self.machine.remembered(&txn.principal, txn.request.as_ref()?, txn.digest())?;
        let ticket = self.ticket(self.next_number);
        self.next_number += 1;
        self.told.push((ticket, Answer::Done(reply)));
        Some(ticket)
    }

    fn may_take(&self, txn: &Txn, bytes: usize) -> Result<(), Refusal> {
        self.may_ask()?;
        if bytes > self.config.max_request_bytes {
            return Err(Refusal::TooLarge { bytes, max: self.config.max_request_bytes });
        }
        let behaviour = txn.behaviour_needed();
        if behaviour > self.machine.behaviour() {
            return Err(Refusal::NotYet { behaviour });
        }
        let waits = self.queue.len() + self.sent.len();
        let waiting_bytes = self.queue_bytes + self.sent_bytes;
        if waits >= self.config.max_queued || waiting_bytes + bytes > self.config.max_queued_bytes {
            return Err(Refusal::Overloaded);
        }
        self.machine.admit(txn).map_err(Refusal::Memory)?;
        if self.disk_full()
            && !(only_frees(txn)
                && self.room.free().saturating_add(self.log.room()) > 2 * self.queue_bytes as u64 + (4 << 20))
        {
            return Err(Refusal::DiskFull);
        }
        Ok(())
    }

    fn may_ask(&self) -> Result<(), Refusal> {
        if self.stopping || self.faulty {
            return Err(Refusal::Stopping);
        }
        if self.alone() {
            return if self.lead.is_some() { Ok(()) } else { Err(Refusal::NoQuorum) };
        }
        let (now, timeout) = (self.clock.elapsed(), self.config.election_ms());
        // A moment without a leader is waited out; a longer one is told at once.
        if self.leaderless_since.is_some_and(|since| now >= since + timeout) {
            return Err(Refusal::NoQuorum);
        }
        match self.lead {
            Some(_) if self.majority_heard_at().is_some_and(|at| now >= at + timeout) => Err(Refusal::NoQuorum),
            _ => Ok(()),
        }
    }

    /// A linearizable read: `ReadReady` comes when `machine` may be asked.
    pub fn read(&mut self) -> Result<Ticket, Refusal> {
        self.may_ask()?;
        if self.asked.reads.len() >= self.config.max_queued {
            return Err(Refusal::Overloaded);
        }
        let ticket = self.read_ticket();
        self.asked.begin(self.clock.elapsed());
        self.asked.reads.push(ticket);
        Ok(ticket)
    }

    /// Whether `machine` may be asked right now with the promise of `read`: a sole voter that leads decides alone, and what it
    /// answered is applied.
    pub fn reads_now(&self) -> bool {
        !self.faulty && self.alone() && self.lead.as_ref().is_some_and(|l| l.serving)
    }

    /// A keep-alive of a session, of one incarnation of it or of whichever lives (0). Its answer comes when the session is known to be alive
    /// after this call.
    pub fn renew(&mut self, session: SessionId, token: SessionToken) -> Ticket {
        let ticket = self.read_ticket();
        match self.may_ask() {
            Ok(()) if self.asked.renewals.len() >= 8 * self.config.max_queued => {
                self.refused.push((ticket, Refusal::Overloaded))
            }
            Ok(()) => {
                self.asked.begin(self.clock.elapsed());
                self.asked.renewals.push((session, token, ticket));
            }
            Err(refusal) => self.refused.push((ticket, refusal)),
        }
        ticket
    }

    /// The caller went away: its answer is not given any more. What it asked for may still be done.
    pub fn cancel_ticket(&mut self, ticket: Ticket) {
        if ticket.number < READ_NUMBERS {
            self.waiting.remove(&ticket.number);
        }
    }

    /// A message of another member, of either lane. What is none, or comes from somebody that is not connected, is dropped.
    pub fn receive(&mut self, from: MemberId, message: &[u8]) {
        let Some(boot) = self.links.get(&from).map(|link| link.boot).filter(|_| !self.faulty) else { return };
        let Some(message) = PeerMessage::decode(message) else { return };
        self.heard(from);
        let own = self.config.boot;
        match message {
            PeerMessage::Raft(bytes) => {
                let mut decoded = Message::default();
                let sound = decoded.merge_from_bytes(bytes).is_ok()
                    && decoded.from == from.0
                    && decoded.to == self.config.member.0;
                if sound && self.inbox.len() < INBOX_MAX {
                    self.inbox.push_back((from, decoded));
                }
            }
            PeerMessage::Forward { to_boot, batch } => self.forwarded(from, to_boot, batch),
            PeerMessage::NotTaken { to_boot, number, why } if to_boot == own => self.not_taken(from, number, why),
            PeerMessage::Read { to_boot, number } if to_boot == own => self.asked_for_index(from, boot, number),
            PeerMessage::ReadAt { to_boot, number, index } if to_boot == own => self.index_told(number, index),
            PeerMessage::Touch { to_boot, touches } if to_boot == own => self.touches(from, boot, touches),
            PeerMessage::Touched { to_boot, touched } if to_boot == own => self.touches_told(touched),
            PeerMessage::Pull { index, offset, len } => self.pulled(from, index, offset, len),
            PeerMessage::Piece { index, offset, bytes } => self.piece(index, offset, bytes),
            PeerMessage::NoPiece { index } => self.no_piece(index),
            PeerMessage::CannotPull { .. } => self.fetch_failed(from),
            PeerMessage::Facts(facts) => self.facts_told(from, facts),
            // Meant for an earlier life of this member.
            PeerMessage::NotTaken { .. }
            | PeerMessage::Read { .. }
            | PeerMessage::ReadAt { .. }
            | PeerMessage::Touch { .. }
            | PeerMessage::Touched { .. } => {}
        }
    }

    fn post(&mut self, to: MemberId, lane: Lane, message: &PeerMessage<'_>) {
        self.outbox.push((to, lane, message.encode()));
    }

    pub fn job_done(&mut self, done: JobDone) {
        self.room.job_ends();
        let (what, result) = match done {
            JobDone::SegmentPrepared { id, bytes, result } => {
                self.log.prepared(id, bytes, result.is_ok());
                ("preparing the next segment of the log", result)
            }
            JobDone::Retired { spare, result } => {
                if result.is_ok() {
                    self.log.retired(spare);
                }
                ("putting away an old segment of the log", result)
            }
            JobDone::SnapshotWritten { number, result } => {
                self.snapshot_written(number, result.is_ok());
                (SNAPSHOT_JOB, result)
            }
            JobDone::SnapshotFinished { number, name, bytes, result } => {
                self.snapshot_finished(number, &name, bytes, result.is_ok());
                (SNAPSHOT_JOB, result)
            }
            JobDone::SnapshotRead { to, index, offset, result } => {
                let told = result.as_ref().map(|_| ()).map_err(Clone::clone);
                self.piece_read(to, index, offset, result);
                ("reading a snapshot for another member", told)
            }
            JobDone::TakenWritten { number, result } => {
                self.piece_written(number, result.is_ok());
                (TAKING_JOB, result)
            }
            JobDone::SnapshotLoaded { number, result } => match result {
                Ok(loaded) => {
                    self.snapshot_loaded(number, Some(loaded.0));
                    (TAKING_JOB, Ok(()))
                }
                Err(why) => {
                    self.snapshot_loaded(number, None);
                    (TAKING_JOB, Err(why))
                }
            },
            JobDone::Removed { result, .. } => ("removing an old file", result),
        };
        self.alarms.retain(|a| !matches!(a, Alarm::JobFailed { what: w, .. } if *w == what));
        if let Err(why) = result {
            self.job_failed(what, why);
        }
    }

    fn job_failed(&mut self, what: &'static str, why: String) {
        self.retry_at = self.clock.elapsed() + RETRY_MS;
        self.alarms.retain(|a| !matches!(a, Alarm::JobFailed { what: w, .. } if *w == what));
        self.alarms.push(Alarm::JobFailed { what, why });
    }

    // One round.

    /// Does all that can be done now: `hear`, then `work`.
    pub fn poll(
        &mut self,
        now: Millis,
        out: &mut Effects,
        send: &mut dyn FnMut(MemberId, Lane, Vec<u8>),
    ) -> Result<(), Fault> {
        let heard = self.hear(now, out, send)?;
        self.work(heard, out, send)
    }

    /// The first half of a round: what came is taken in, and what needs no new entry is answered: reads and renewals do not wait
    /// until the changes that came with them are on disk. Messages leave by `send` as soon as they may. After an error the
    /// member is over and the process should stop.
    pub fn hear(
        &mut self,
        now: Millis,
        out: &mut Effects,
        send: &mut dyn FnMut(MemberId, Lane, Vec<u8>),
    ) -> Result<Heard, Fault> {
        if self.faulty {
            return Err(Fault::Stopped);
        }
        let result = self.hear_round(now, out, send);
        self.faulty = result.is_err();
        result
    }

    /// The second half: what came is proposed, written, and applied.
    pub fn work(
        &mut self,
        heard: Heard,
        out: &mut Effects,
        send: &mut dyn FnMut(MemberId, Lane, Vec<u8>),
    ) -> Result<(), Fault> {
        let result = self.work_round(heard, out, send);
        self.faulty = result.is_err();
        result
    }

    fn hear_round(
        &mut self,
        now: Millis,
        out: &mut Effects,
        send: &mut dyn FnMut(MemberId, Lane, Vec<u8>),
    ) -> Result<Heard, Fault> {
        if let Some(why) = self.expelled.clone() {
            self.note_turned_away();
            return Err(Fault::Expelled { why });
        }
        let ticks = self.clock.advance(now);
        for _ in 0..ticks {
            self.raft.tick();
            self.set_jitter();
        }
        self.deliver_messages();
        self.hand_snapshot();
        self.stand_alone()?;
        self.campaign_early()?;
        self.settle(out, send)?;
        self.begin_round();
        self.settle(out, send)?;
        self.note_contact();
        self.answer_confirmed(out);
        self.mail(send);
        Ok(Heard { at: now, ticks })
    }

    fn work_round(
        &mut self,
        heard: Heard,
        out: &mut Effects,
        send: &mut dyn FnMut(MemberId, Lane, Vec<u8>),
    ) -> Result<(), Fault> {
        self.look_at_disk();
        if !self.stopping {
            self.due_sessions();
            self.due_compaction();
            self.due_checksum();
        }
        self.reconcile()?;
        self.register();
        self.propose()?;
        self.settle(out, send)?;
        self.answer_confirmed(out);
        if heard.ticks > 0 {
            self.give_up_late();
            self.ask_late_reads();
            self.leave_full_disk();
            self.watch_fetches();
            self.tell_facts();
        }
        let more = self.housekeeping(out)?;
        out.answers.append(&mut self.told);
        out.answers.extend(self.refused.drain(..).map(|(ticket, refusal)| (ticket, Answer::Refused(refusal))));
        self.post_touched();
        self.mail(send);
        // Now that much may be written: the next callers are judged by it.
        self.look_at_disk();
        self.pause_asking = false;
        out.wake_at = Some(if more { heard.at } else { self.wake_at() });
        Ok(())
    }

    fn mail(&mut self, send: &mut dyn FnMut(MemberId, Lane, Vec<u8>)) {
        for (to, lane, bytes) in self.outbox.drain(..) {
            send(to, lane, bytes);
        }
    }

    fn deliver_messages(&mut self) {
        while let Some((from, message)) = self.inbox.pop_front() {
            let kind = message.get_msg_type();
            if kind == MessageType::MsgAppendResponse && !message.reject && self.lead.is_some() && !self.may_count(from)
            {
                self.lead_on(from, message.index);
                continue;
            }
            if kind == MessageType::MsgAppend {
                // Not the entries that it carries: those may not be on the leader's own disk. What it says is committed came back to it
                // in a later poll than the one that synced it.
                let end = message.commit;
                self.leader_end = (from, if self.leader_end.0 == from { self.leader_end.1.max(end) } else { end });
            }
            let message = if kind == MessageType::MsgSnapshot { self.offered(from, message) } else { Some(message) };
            // Messages of an older term, or from a member that is none any more, are refused by the library; nothing follows.
            if let Some(message) = message {
                let _ = self.raft.step(message);
                self.set_jitter();
            }
        }
    }

    /// A member that is alone need not wait for an election.
    fn stand_alone(&mut self) -> Result<(), Fault> {
        let conf = &self.raft.store().conf_state;
        let decides_alone = conf.voters == [self.config.member.0] && conf.voters_outgoing.is_empty();
        if self.lead.is_some() || self.stopping || !decides_alone || self.raft.raft.state == StateRole::Leader {
            return Ok(());
        }
        self.raft.campaign().map_err(consensus_fault)?;
        self.set_jitter();
        Ok(())
    }

    /// The library draws the jitter of its elections from the operating system; ours comes from the seed, so it replaces each draw at
    /// once. It is read only by ticks.
    fn set_jitter(&mut self) {
        let ticks = self.config.election_ticks as u64;
        let mixed =
            mix(self.config.seed ^ mix(self.config.member.0) ^ self.raft.raft.term.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        // Not the very first ticks: a member that has just lost its leader's connection counts as having waited a whole timeout, and is to
        // ask in its own turn.
        let early = 2.min(ticks - 1);
        self.raft.raft.set_randomized_election_timeout((ticks + early + mixed % (ticks - early)) as usize);
    }

    fn settle(&mut self, out: &mut Effects, send: &mut dyn FnMut(MemberId, Lane, Vec<u8>)) -> Result<(), Fault> {
        loop {
            self.follow_role()?;
            self.fetch_wanted()?;
            if !self.raft.has_ready() {
                return Ok(());
            }
            self.handle_ready(out, send)?;
        }
    }

    /// Everything that the consensus library wants done, in the order that makes it safe: write, sync, tell, apply.
    fn handle_ready(&mut self, out: &mut Effects, send: &mut dyn FnMut(MemberId, Lane, Vec<u8>)) -> Result<(), Fault> {
        let mut ready = self.raft.ready();
        if !ready.snapshot().is_empty() {
            let metadata = ready.snapshot().get_metadata().clone();
            self.install(&metadata)?;
        }
        for state in ready.take_read_states() {
            self.confirm(state.index, &state.request_ctx);
        }
        let entries = ready.take_entries();
        // With the entries goes what was known to be committed when they came: a member that starts with two changes of the members
        // in its log, and does not know of the first, would count votes by a configuration that is over.
        if let Some(hard_state) = ready.hs() {
            self.log.commit(hard_state.commit);
        }
        self.log.entries(&entries);
        self.snapshots.log_bytes += entries.iter().map(|e| e.data.len() as u64 + 64).sum::<u64>();
        self.raft.mut_store().append(entries);
        let mut changed = false;
        if let Some(hard_state) = ready.hs() {
            let store = self.raft.mut_store();
            changed = (store.hard_state.term, store.hard_state.vote) != (hard_state.term, hard_state.vote);
            store.hard_state = hard_state.clone();
            if changed && self.config.sabotage != Some(Sabotage::ForgetVote) {
                self.log.hard_state(hard_state);
            } else {
                self.log.commit(hard_state.commit);
            }
        }
        // All that is older is synced: a leader may speak while its own disk works.
        let messages = ready.take_messages();
        let sabotaged = self.config.sabotage == Some(Sabotage::SendBeforeSync);
        if !changed || sabotaged {
            self.post_raft(messages)?;
            if self.config.sabotage == Some(Sabotage::AckBeforeSync) || sabotaged {
                self.post_raft(ready.take_persisted_messages())?;
            }
            self.mail(send);
            self.sync_ready(&ready)?;
        } else {
            self.sync_ready(&ready)?;
            self.post_raft(messages)?;
        }
        self.post_raft(ready.take_persisted_messages())?;
        self.installed(out)?;
        let committed = ready.take_committed_entries();
        self.apply(committed, out)?;
        let mut light = self.raft.advance_append(ready);
        if let Some(commit) = light.commit_index() {
            self.raft.mut_store().hard_state.commit = commit;
            self.log.commit(commit);
        }
        self.post_raft(light.take_messages())?;
        self.apply(light.take_committed_entries(), out)?;
        let applied = self.machine.position().index.0;
        self.raft.advance_apply_to(applied);
        let keep = if self.alone() { 0 } else { CACHE_BYTES };
        self.raft.mut_store().trim(applied, keep);
        self.mail(send);
        Ok(())
    }

    fn sync_ready(&mut self, ready: &raft::Ready) -> Result<(), Fault> {
        if ready.must_sync() { self.flush() } else { Ok(()) }
    }

    fn post_raft(&mut self, messages: Vec<Message>) -> Result<(), Fault> {
        for message in messages {
            let bytes = message.write_to_bytes().map_err(|e| Fault::Consensus { why: e.to_string() })?;
            self.post(MemberId(message.to), Lane::Messages, &PeerMessage::Raft(&bytes));
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Fault> {
        let before = self.log.bytes_written;
        let wrote = self.log.flush(&mut self.disk)?;
        self.room.wrote(self.log.bytes_written - before);
        if wrote {
            self.wrote_at = self.clock.elapsed();
        }
        Ok(())
    }

    /// Reads back what a slow peer needs and memory does not have any more.
    fn fetch_wanted(&mut self) -> Result<(), Fault> {
        for wanted in self.raft.mut_store().take_wanted() {
            let store = self.raft.store();
            let max = MESSAGE_BYTES as usize;
            let entries = self.log.read(&mut self.disk, wanted.low, wanted.high, max, |i| store.term_of(i))?;
            if entries.is_empty() {
                let why = format!("entry {} cannot be read back", wanted.low);
                return Err(Fault::Damaged { file: "the log".to_owned(), offset: 0, why });
            }
            self.raft.mut_store().put_fetched(entries);
            self.raft.on_entries_fetched(wanted.context);
        }
        Ok(())
    }

    // Leadership.

    fn follow_role(&mut self) -> Result<(), Fault> {
        let leads = self.raft.raft.state == StateRole::Leader;
        let term = self.raft.raft.term;
        match &self.lead {
            Some(lead) if leads && lead.term == term => {}
            None if !leads => {}
            Some(_) => self.step_down(),
            None => {}
        }
        if leads && self.lead.is_none() {
            self.step_up(term)?;
        }
        let leader = self.raft.raft.leader_id;
        if leader == raft::INVALID_ID {
            self.leaderless_since.get_or_insert(self.clock.elapsed());
        } else {
            self.leaderless_since = None;
        }
        if self.followed != (leader, term) {
            // As etcd counts: every member counts each leader that it has not followed just before.
            self.leader_changes += u64::from(leader != raft::INVALID_ID && leader != self.followed.0);
            self.followed = (leader, term);
            // A leader that is lost was not heard.
            if leader != raft::INVALID_ID {
                self.leader_heard_at = self.clock.elapsed();
            }
            self.turned_down_at = None;
            self.ask_again();
            self.register_at = self.register_at.min(self.clock.elapsed());
        }
        Ok(())
    }

    fn step_up(&mut self, term: u64) -> Result<(), Fault> {
        let applied = self.machine.position().index.0;
        // Stamps of entries that are in the log and not applied count too: time must not go back if they are.
        let unapplied =
            self.raft.store().after(applied).filter(|e| e.entry_type == EntryType::EntryNormal && !e.data.is_empty());
        let mut newest = LogTime(0);
        let mut batches = Vec::new();
        for e in unapplied {
            let unreadable = |error| Fault::Machine(tenure_machine::Fault::unreadable(Index(e.index), error));
            let batch = Batch::decode(&e.data).map_err(unreadable)?;
            newest = newest.max(batch.stamp);
            batches.push(batch);
        }
        self.unapplied_storage.clear();
        batches.iter().for_each(|batch| self.note_registrations(batch));
        let base = self.machine.stamp().max(newest);
        let empty = applied == 0 && self.raft.store().last_index() == 0;
        self.lead =
            Some(Lead { term, base, since: self.clock.elapsed(), stamped: base, serving: false, genesis: false });
        // The leader before had this much, and all of it will be committed: if its folder comes back with less, it is not the same.
        let (old, index) = self.leader_end;
        let known = self.machine.member(old).is_some_and(|r| r.is_live() && r.seen.0 < index);
        if known && index <= self.raft.store().last_index() {
            self.enqueue_lead(Op::MemberSeen { id: old, index: Index(index) });
        }
        if empty { self.genesis() } else { Ok(()) }
    }

    fn note_registrations(&mut self, batch: &Batch) {
        for op in batch.txns.iter().flat_map(|t| &t.then) {
            if let Op::MemberRegister { id, storage, .. } = op {
                self.unapplied_storage.entry(*id).or_insert(*storage);
            }
        }
    }

    /// The first entry with content: who this cluster is.
    fn genesis(&mut self) -> Result<(), Fault> {
        let mut issuer = [0; 16];
        issuer.copy_from_slice(&self.config.random[16..]);
        let cluster = mix(u64::from_le_bytes([
            issuer[0], issuer[1], issuer[2], issuer[3], issuer[4], issuer[5], issuer[6], issuer[7],
        ])) | 1;
        if let Some(lead) = &mut self.lead {
            lead.genesis = true;
        }
        // Nobody waits for it: callers have the numbers from 1 on.
        let origin = Origin { member: self.config.member, boot: self.config.boot, first: 0 };
        self.propose_batch(origin, vec![Txn::of(Op::Genesis { cluster, issuer })], self.clock.elapsed()).map(|_| ())
    }

    /// What callers asked goes on under the next leader, or is answered in time by `give_up_late`; what this one did as the leader is over.
    fn step_down(&mut self) {
        self.lead = None;
        self.riding_since = None;
        let (stays, goes): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.queue).into_iter().partition(|q| matches!(q.wants, Wants::Caller | Wants::Own));
        self.queue = stays.into();
        for q in goes {
            self.queue_bytes -= q.size;
            if let Wants::Member(member, boot) = q.wants {
                self.tell_not_taken(member, boot, q.number, NotTaken::Elsewhere);
            }
        }
        for ticket in self.deadlines.clear() {
            self.refuse_renewal(ticket);
        }
        self.unapplied_storage.clear();
    }

    /// An entry of the own term is applied: from now on the state says what is true, and sessions get their time.
    fn begin_to_serve(&mut self) {
        let now = self.clock.elapsed();
        let mut after = SessionId(0);
        loop {
            let page = self.machine.sessions(after, 1_000);
            let Some(last) = page.last() else { break };
            after = last.id;
            for s in page {
                self.deadlines.start(now, s.id, s.token, s.ttl_ms, s.remaining_ms);
            }
        }
    }

    // Proposing.

    fn enqueue(&mut self, txn: Txn, size: usize, wants: Wants) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.queue_bytes += size;
        let arrived = self.clock.elapsed();
        self.queue.push_back(Queued { number, txn, size, arrived, wants, tried: Vec::new() });
        number
    }

    fn enqueue_lead(&mut self, op: Op) {
        let txn = Txn::of(op);
        let bytes = weight(&txn);
        self.enqueue(txn, bytes, Wants::Lead);
    }

    /// One proposal of everything that waits, cut into entries where it is large and where other callers begin.
    fn propose(&mut self) -> Result<(), Fault> {
        let Some(lead) = &self.lead else {
            self.forward();
            return Ok(());
        };
        if self.raft.raft.lead_transferee.is_some() {
            return Ok(());
        }
        if lead.serving && !lead.genesis && self.machine.cluster() == 0 {
            self.genesis()?;
        }
        if self.queue.is_empty() && self.stamp_is_due() {
            let origin = Origin { member: self.config.member, boot: self.config.boot, first: self.next_number };
            self.propose_batch(origin, Vec::new(), self.clock.elapsed())?;
        }
        if self.rides_along() {
            return Ok(());
        }
        while !self.queue.is_empty() {
            let (origin, arrived, txns) = self.next_batch();
            let count = txns.len() as u64;
            if !self.propose_batch(origin, txns, arrived)? {
                self.not_proposed(origin, count);
            }
        }
        Ok(())
    }

    /// Whether everything queued can wait a moment for company: acquires of held locks answer nobody when they are committed, they only
    /// join a queue. On a contended lock the release by the next holder comes within that moment, and with a sync of their own they would
    /// stand in front of it; so each hand-over costs one sync and not two. Their order is kept.
    fn rides_along(&mut self) -> bool {
        let now = self.clock.elapsed();
        let joins_only = !self.queue.is_empty() && !self.stopping && self.queue.iter().all(|q| self.only_joins(&q.txn));
        if !joins_only {
            self.riding_since = None;
            return false;
        }
        let since = *self.riding_since.get_or_insert(now);
        if now < since + RIDE_MS {
            return true;
        }
        self.riding_since = None;
        false
    }

    fn only_joins(&self, txn: &Txn) -> bool {
        match txn.then.as_slice() {
            [Op::LockAcquire(acquire)] => {
                acquire.wait != Wait::None
                    && acquire.create.is_none()
                    && self.machine.is_held(txn.namespace, &acquire.name)
            }
            _ => false,
        }
    }

    /// The transactions at the head of the queue whose callers wait at one place, under numbers without a gap.
    fn next_batch(&mut self) -> (Origin, u64, Vec<Txn>) {
        let origin_of = |q: &Queued| match q.wants {
            Wants::Member(member, boot) => (member, boot),
            Wants::Caller | Wants::Lead | Wants::Own => (self.config.member, self.config.boot),
        };
        let (mut bytes, mut place, mut number, mut arrived) = (0, (MemberId(0), 0), 0, 0);
        let mut count = 0;
        for q in &self.queue {
            bytes += q.size;
            if count == 0 {
                (place, number, arrived) = (origin_of(q), q.number, q.arrived);
            } else if origin_of(q) != place || q.number != number + count || bytes > self.config.max_batch_bytes {
                break;
            }
            count += 1;
        }
        let txns = self.queue.drain(..count as usize).map(|q| {
            self.queue_bytes -= q.size;
            q.txn
        });
        (Origin { member: place.0, boot: place.1, first: number }, arrived, txns.collect())
    }

    /// Whether the library took the entry. It drops one that would leave too much undecided.
    fn propose_batch(&mut self, origin: Origin, txns: Vec<Txn>, arrived: u64) -> Result<bool, Fault> {
        let Some(lead) = &mut self.lead else { return Ok(false) };
        let stamp = lead.stamp(self.clock.elapsed());
        lead.stamped = stamp;
        let count = txns.len() as u64;
        let batch = Batch { behaviour: self.machine.behaviour(), stamp, origin, txns };
        match self.raft.propose(Vec::new(), batch.encode()) {
            Ok(()) => {}
            Err(raft::Error::ProposalDropped) => return Ok(false),
            Err(error) => return Err(consensus_fault(error)),
        }
        self.note_registrations(&batch);
        let (index, term) = (self.raft.raft.raft_log.last_index(), self.raft.raft.term);
        let is_own = origin.member == self.config.member;
        let (first, given_up) = (origin.first, false);
        // In the order of their places in the log: those of an earlier time as the leader may lie further on, and are not decided yet.
        let place = self.proposed.partition_point(|p| p.index <= index);
        self.proposed.insert(place, Proposed { index, term, first, count, arrived, is_own, given_up, batch });
        Ok(true)
    }

    fn not_proposed(&mut self, origin: Origin, count: u64) {
        for number in origin.first..origin.first + count {
            if origin.member == self.config.member {
                self.refuse_number(number, Refusal::Overloaded);
            } else {
                self.tell_not_taken(origin.member, origin.boot, number, NotTaken::Overloaded);
            }
        }
    }

    /// Time reaches the state only through entries: one is due when a wait ends, and now and then.
    fn stamp_is_due(&self) -> bool {
        let Some(lead) = self.lead.as_ref().filter(|l| l.serving && !self.stopping) else { return false };
        let stamp = lead.stamp(self.clock.elapsed());
        self.next_stamp(lead) <= stamp && lead.stamped < stamp
    }

    /// The log time at which the next entry must be stamped, whatever comes.
    fn next_stamp(&self, lead: &Lead) -> LogTime {
        let deadline = self.machine.next_deadline();
        let near = deadline.is_some_and(|d| d.0 <= lead.stamped.0.saturating_add(NEAR_MS));
        let regular = lead.stamped.plus(if near { STAMP_NEAR_MS } else { STAMP_FAR_MS });
        // A deadline that is stamped already, in an entry that is under way, needs no other.
        deadline.filter(|d| *d > lead.stamped).map_or(regular, |d| d.min(regular))
    }

    fn due_sessions(&mut self) {
        let Some(lead) = self.lead.as_ref().filter(|l| l.serving) else { return };
        let term = Term(lead.term);
        for due in self.deadlines.due(self.clock.elapsed(), DUE_MAX) {
            self.enqueue_lead(match due {
                Due::Expire { id, token } => Op::SessionExpire { session: id, token, term },
                Due::Checkpoint { id, token, remaining_ms } => {
                    Op::SessionCheckpoint { session: id, token, remaining_ms }
                }
            });
        }
    }

    fn due_compaction(&mut self) {
        let now = self.clock.elapsed();
        if now < self.compact_at || !self.lead.as_ref().is_some_and(|l| l.serving) {
            return;
        }
        self.compact_at = now + COMPACT_EVERY_MS;
        let Some(keep) = self.config.autocompact else { return };
        let to = self.machine.autocompact(keep.keep_ms, keep.keep_revisions, keep.history_share_percent);
        if let Some(revision) = to.and_then(|r| i64::try_from(r.0).ok()) {
            self.enqueue_lead(Op::Compact { revision });
        }
    }

    /// Members compare what they made of the log: one that differs stops.
    fn due_checksum(&mut self) {
        if self.lead.as_ref().is_some_and(|l| l.serving)
            && self.clock.elapsed() >= self.check_at
            && let Some(op) = self.machine.checksum_due()
        {
            // Due until one is applied: one under way is enough.
            self.check_at = self.clock.elapsed() + CHECK_EVERY_MS;
            self.enqueue_lead(op);
        }
    }

    // Reads and renewals.

    /// All reads and renewals that came since the last poll share one round.
    fn begin_round(&mut self) {
        if self.asked.is_empty() || self.pause_asking {
            return;
        }
        match &self.lead {
            None => self.ask_leader(),
            Some(lead) if lead.serving => {
                let number = self.next_read_number();
                if self.config.sabotage == Some(Sabotage::SkipReadIndex) {
                    let round = std::mem::take(&mut self.asked);
                    self.confirmed.push((self.raft.raft.raft_log.committed, round));
                    return;
                }
                let round = Round { asked_at: u64::MAX / 2, ..std::mem::take(&mut self.asked) };
                self.rounds.insert(number, round);
                self.raft.read_index(number.to_le_bytes().to_vec());
            }
            Some(_) => {}
        }
    }

    fn confirm(&mut self, index: u64, context: &[u8]) {
        let number = context.try_into().map(u64::from_le_bytes);
        if let Some(round) = number.ok().and_then(|n| self.rounds.remove(&n)) {
            self.confirmed.push((index, round));
        }
    }

    fn answer_confirmed(&mut self, out: &mut Effects) {
        let applied = self.machine.position().index.0;
        if self.confirmed.iter().all(|(index, _)| *index > applied) {
            return;
        }
        for (index, round) in std::mem::take(&mut self.confirmed) {
            if index > applied {
                self.confirmed.push((index, round));
                continue;
            }
            out.answers.extend(round.reads.into_iter().map(|ticket| (ticket, Answer::ReadReady)));
            for (session, token, ticket) in round.renewals {
                self.renewed(session, token, ticket, out);
            }
            for (member, to_boot, number) in round.remote {
                let index = Some(index);
                self.post(member, Lane::Messages, &PeerMessage::ReadAt { to_boot, number, index });
            }
        }
    }

    fn renewed(&mut self, session: SessionId, token: SessionToken, ticket: Ticket, out: &mut Effects) {
        // An owner of an ended incarnation must not keep its successor alive.
        let lives = self.machine.session(session).is_some_and(|live| token == 0 || live.token == token);
        if !lives {
            return self.answer_renewal(ticket, session, None, out);
        }
        match self.deadlines.renew(self.clock.elapsed(), session, ticket) {
            Renewing::Renewed { token, ttl_ms } => self.answer_renewal(ticket, session, Some((token, ttl_ms)), out),
            Renewing::Gone => self.answer_renewal(ticket, session, None, out),
            Renewing::Held => {}
            Renewing::HeldForClearing { token } => {
                self.enqueue_lead(Op::SessionCheckpoint { session, token, remaining_ms: None })
            }
        }
    }

    fn answer_renewal(
        &mut self,
        ticket: Ticket,
        session: SessionId,
        renewed: Option<(SessionToken, u64)>,
        out: &mut Effects,
    ) {
        if self.is_own(ticket) {
            let renewal = renewed.map(|(token, ttl_ms)| Renewal { session, token, ttl_ms });
            let answer = renewal.ok_or(Rejection::SessionExpired { session });
            return out.answers.push((ticket, Answer::Renewed(answer)));
        }
        let what = renewed.map_or(Touched::Gone, |(token, ttl_ms)| Touched::Renewed { token, ttl_ms });
        self.touched(ticket, what);
    }

    fn is_own(&self, ticket: Ticket) -> bool {
        ticket.member == self.config.member && ticket.boot == self.config.boot
    }

    // Applying.

    fn apply(&mut self, entries: Vec<Entry>, out: &mut Effects) -> Result<(), Fault> {
        for entry in entries {
            let at = Position { index: Index(entry.index), term: Term(entry.term) };
            match entry.entry_type {
                EntryType::EntryNormal if entry.data.is_empty() => self.machine.skip(at),
                EntryType::EntryNormal => self.apply_batch(at, &entry, out)?,
                kind => {
                    self.apply_conf_change(kind, &entry)?;
                    self.machine.skip(at);
                }
            }
            if let Some(lead) = self.lead.as_mut().filter(|l| !l.serving && l.term == entry.term) {
                lead.serving = true;
                self.begin_to_serve();
            }
        }
        Ok(())
    }

    fn apply_batch(&mut self, at: Position, entry: &Entry, out: &mut Effects) -> Result<(), Fault> {
        let mut applied = std::mem::take(&mut self.applied);
        let batch = match self.take_proposed(at) {
            Some(batch) => batch,
            None => Batch::decode(&entry.data)
                .map_err(|error| Fault::Machine(tenure_machine::Fault::unreadable(at.index, error)))?,
        };
        if batch.behaviour > self.config.behaviour {
            let (index, behaviour, known) = (at.index, batch.behaviour, self.config.behaviour);
            return Err(Fault::Machine(tenure_machine::Fault::UnknownBehaviour { index, behaviour, known }));
        }
        let (origin, count) = (batch.origin, batch.txns.len() as u64);
        let batch = self.sabotaged(batch);
        let members = self.machine.members_version();
        self.machine.apply(at, batch, &mut applied)?;
        if self.machine.members_version() != members {
            // What this makes possible is done at once: a new cluster is whole within a few commits.
            self.reconcile_at = 0;
        }
        self.arrived(origin, count);
        out.changes.append(&mut applied.changes);
        for event in applied.sessions.drain(..) {
            self.session_event(&event, out);
        }
        for (ticket, reply) in applied.replies.drain(..) {
            // Tickets of another member, or of an earlier life of this one, have no caller here.
            if !self.is_own(ticket) {
                continue;
            }
            self.registered(ticket.number, &reply.result);
            self.remembered.remove(&ticket.number);
            if self.waiting.remove(&ticket.number) {
                out.answers.push((ticket, Answer::Done(reply)));
            }
        }
        self.applied = applied;
        Ok(())
    }

    /// What a simulated member with a bug makes of an entry.
    fn sabotaged(&self, mut batch: Batch) -> Batch {
        match self.config.sabotage {
            Some(Sabotage::LocalFlagInApply) => drop(batch.txns.pop()),
            Some(Sabotage::ApplyTwice) => batch.txns.extend(batch.txns.first().cloned()),
            _ => {}
        }
        batch
    }

    /// The batch that this member proposed and this entry is, if it is one.
    fn take_proposed(&mut self, at: Position) -> Option<Batch> {
        let mut found = None;
        while let Some(p) = self.proposed.pop_front_if(|p| p.index <= at.index.0) {
            if (p.index, p.term) == (at.index.0, at.term.0) {
                found = Some(p.batch);
            } else if p.is_own {
                // Another leader's entry stands in its place for ever: it was not and will not be applied.
                (p.first..p.first + p.count).for_each(|number| self.refuse_number(number, Refusal::NoQuorum));
            }
        }
        found
    }

    fn session_event(&mut self, event: &SessionEvent, out: &mut Effects) {
        if !self.lead.as_ref().is_some_and(|l| l.serving) {
            return;
        }
        for Told { ticket, session, renewed } in self.deadlines.event(self.clock.elapsed(), event) {
            self.answer_renewal(ticket, session, renewed, out);
        }
    }

    fn apply_conf_change(&mut self, kind: EntryType, entry: &Entry) -> Result<(), Fault> {
        let unreadable = |_| Fault::Consensus { why: format!("entry {} is no change of the members", entry.index) };
        let change = if kind == EntryType::EntryConfChange {
            let mut change = ConfChange::default();
            change.merge_from_bytes(&entry.data).map_err(unreadable)?;
            change.into_v2()
        } else {
            let mut change = ConfChangeV2::default();
            change.merge_from_bytes(&entry.data).map_err(unreadable)?;
            change
        };
        let mut conf = self.raft.apply_conf_change(&change).map_err(consensus_fault)?;
        // The library's sets have an order of their own, which depends on how they came about.
        for ids in [&mut conf.voters, &mut conf.learners, &mut conf.voters_outgoing, &mut conf.learners_next] {
            ids.sort_unstable();
        }
        self.log.conf_state(entry.index, &conf);
        let store = self.raft.mut_store();
        store.conf_state = conf;
        store.members_changed = true;
        self.conf_version += 1;
        self.set_jitter();
        self.reconcile_at = 0;
        self.notice_removal();
        Ok(())
    }

    // Upkeep.

    /// Slices of slow work. Gives whether there is more to do at once.
    fn housekeeping(&mut self, out: &mut Effects) -> Result<bool, Fault> {
        let now = self.clock.elapsed();
        let compacting = self.machine.maintain(MAINTAIN_BUDGET);
        let jobs_before = out.jobs.len();
        if self.retry_at <= now {
            out.jobs.extend(self.log.prepare());
            self.start_snapshot();
        }
        self.write_snapshot(out);
        self.let_go(out);
        self.fetch(out);
        self.send_pieces(out);
        out.jobs.append(&mut self.jobs);
        out.jobs.iter().skip(jobs_before).for_each(|job| self.room.job_begins(job));
        if self.log.wants_mark() && now >= self.wrote_at + QUIET_MS {
            self.log.synced_mark();
            self.flush()?;
        }
        Ok(compacting || !self.queue.is_empty() || self.deadlines_are_due(now))
    }

    fn deadlines_are_due(&self, now: u64) -> bool {
        self.lead.as_ref().is_some_and(|l| l.serving) && self.deadlines.next().is_some_and(|at| at <= now)
    }

    fn wake_at(&self) -> Millis {
        let now = self.clock.elapsed();
        // Alone, nobody waits for heartbeats; but a gap between polls must stay well below what counts as one.
        let tick = if self.alone() { (self.config.election_ms() / 2).min(500) } else { self.config.tick_ms };
        let mut at = now + tick.max(1);
        if let Some(lead) = self.lead.as_ref().filter(|l| l.serving) {
            at = at.min(self.deadlines.next().unwrap_or(u64::MAX)).min(lead.moment(self.next_stamp(lead)));
            if self.reconcile_at == 0 {
                at = now;
            }
        }
        if self.log.wants_mark() {
            at = at.min(self.wrote_at + QUIET_MS);
        }
        if let Some(since) = self.riding_since {
            at = at.min(since + RIDE_MS);
        }
        if let Some(campaign) = self.campaign_at {
            at = at.min(campaign);
        }
        if self.pieces_wait() {
            at = at.min(now + 1);
        }
        self.clock.moment(at.max(now + 1))
    }

    fn look_at_disk(&mut self) {
        let now = self.clock.elapsed();
        if now < self.disk_at && !(self.disk_full() && self.room.is_guess()) {
            return;
        }
        self.disk_at = now + DISK_EVERY_MS;
        if let Ok(free) = self.disk.free_bytes() {
            self.room.look(free);
        }
    }

    /// What waits counts too, as far as the files of the log have to grow for it.
    fn disk_full(&self) -> bool {
        let growth = (self.queue_bytes as u64).saturating_sub(self.log.room());
        self.room.free().saturating_sub(growth) < self.config.disk_reserve_bytes
    }

    // What it tells.

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// What is left of a session's time, if this member leads.
    pub fn remaining_ms(&self, session: SessionId, now: Millis) -> Option<u64> {
        self.deadlines.remaining_ms(self.clock.elapsed_at(now), session)
    }

    pub fn is_leader(&self) -> bool {
        self.lead.as_ref().is_some_and(|l| l.serving)
    }

    /// Who leads, as far as this member knows, and the term.
    pub fn leader(&self) -> (Option<MemberId>, u64) {
        let leader = Some(self.raft.raft.leader_id).filter(|id| *id != raft::INVALID_ID);
        (leader.map(MemberId), self.raft.raft.term)
    }

    fn own_alarms(&self) -> Vec<Alarm> {
        let mut alarms = self.alarms.clone();
        if self.disk_full() {
            alarms.push(Alarm::DiskFull { free: self.room.free(), reserve: self.config.disk_reserve_bytes });
        }
        alarms
    }

    /// How old what a stale read finds may be: when a leader was heard of last, or a majority by one that leads. None if that
    /// never was since this member was opened. A sole voter is always in contact: the end of time.
    pub fn contact_at(&self) -> Option<Millis> {
        if self.alone() { Some(Millis(u64::MAX)) } else { self.contact.map(|(moment, _)| moment) }
    }

    /// Keeps the moment itself, not its distance in counted time: that leaves out how long the process stood still.
    fn note_contact(&mut self) {
        let is_led = self.raft.raft.leader_id != raft::INVALID_ID;
        let heard =
            if self.lead.is_some() { self.majority_heard_at() } else { Some(self.leader_heard_at).filter(|_| is_led) };
        let Some(at) = heard else { return };
        if self.contact.is_none_or(|(_, before)| at > before) {
            let ago = self.clock.elapsed().saturating_sub(at);
            self.contact = Some((Millis(self.clock.last().0.saturating_sub(ago)), at));
        }
    }

    pub fn status(&self) -> Status {
        let raft = &self.raft.raft;
        let mut alarms = self.own_alarms();
        alarms.extend(self.peer_alarms());
        Status {
            member: self.config.member,
            name: self.config.name.clone(),
            cluster: self.machine.cluster(),
            issuer: self.machine.issuer(),
            storage: self.identity.storage,
            role: match raft.state {
                StateRole::Leader => Role::Leader,
                StateRole::Follower => Role::Follower,
                StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
            },
            leader: Some(raft.leader_id).filter(|id| *id != raft::INVALID_ID).map(MemberId),
            term: raft.term,
            committed: raft.raft_log.committed,
            applied: self.machine.position().index.0,
            first_index: self.raft.store().first_index(),
            last_index: self.raft.store().last_index(),
            voters: self.raft.store().conf_state.voters.iter().map(|id| MemberId(*id)).collect(),
            learners: self.raft.store().conf_state.learners.iter().map(|id| MemberId(*id)).collect(),
            members: self.peer_statuses(),
            in_touch: self.alone() || self.in_touch(),
            handing_over: self.is_handing_over(),
            fetching: self.fetching(),
            disk_free: self.room.free(),
            log_file_bytes: self.log.file_bytes(),
            log_segments: self.log.segments(),
            log_bytes_written: self.log.bytes_written,
            log_syncs: self.log.syncs,
            snapshot_index: self.snapshots.files.last().map_or(0, |f| f.0),
            snapshot_bytes: self.snapshots.files.last().map_or(0, |f| f.1),
            snapshot_running: self.snapshots.writing.is_some(),
            queued: self.queue.len(),
            proposed: self.proposed.len(),
            waiting: self.waiting.len(),
            leader_changes: self.leader_changes,
            gaps: self.clock.gaps(),
            alarms,
        }
    }

    /// Takes nothing new any more, finishes what it can in a last poll, and marks the log as synced, so that the next start has
    /// nothing to doubt.
    pub fn stop(
        &mut self,
        now: Millis,
        out: &mut Effects,
        send: &mut dyn FnMut(MemberId, Lane, Vec<u8>),
    ) -> Result<(), Fault> {
        self.stopping = true;
        self.poll(now, out, send)?;
        if self.log.wants_mark() {
            self.log.synced_mark();
            self.flush()?;
        }
        Ok(())
    }

    fn alone(&self) -> bool {
        let conf = &self.raft.store().conf_state;
        conf.voters == [self.config.member.0] && conf.learners.is_empty() && conf.voters_outgoing.is_empty()
    }

    /// A snapshot that is being fetched: how much of it is here, and its length.
    fn fetching(&self) -> Option<(u64, u64)> {
        self.incoming.as_ref().map(Incoming::progress)
    }

    fn ticket(&self, number: u64) -> Ticket {
        Ticket { member: self.config.member, boot: self.config.boot, number }
    }

    fn read_ticket(&mut self) -> Ticket {
        let number = self.next_read_number();
        self.ticket(number)
    }

    fn next_read_number(&mut self) -> u64 {
        let number = self.next_read;
        self.next_read += 1;
        number
    }
}

/// A folder as it was read.
struct Opened {
    identity: Identity,
    log: Log,
    recovered: Recovered,
    machine: Machine,
    snapshots: Snapshots,
    newest: Option<Offer>,
}

fn open_folder<D: Disk>(
    disk: &mut D,
    config: &Config,
    sizes: Sizes,
    names: &[String],
    alarms: &mut Vec<Alarm>,
) -> Result<Opened, OpenError> {
    let bytes = disk.read(identity::FILE, 0, 1 << 16).map_err(|error| io("read", identity::FILE, error))?;
    let identity = Identity::check(&bytes, &config.cluster_token, config.member.0, &config.name)?;
    let mut indexes: Vec<u64> = names.iter().filter_map(|n| snapshot::index_of(n)).collect();
    indexes.sort_unstable();
    let (mut snapshots, mut machine, mut newest) = (Snapshots::default(), None, None);
    for &index in indexes.iter().rev() {
        let name = snapshot::file(index);
        let bytes = disk.len(&name).map_err(|error| io("measure", &name, error))?;
        if machine.is_none() {
            match snapshot::load(disk, &name) {
                Ok((meta, loaded)) => {
                    machine = Some(loaded);
                    newest = Some(Offer { meta, bytes });
                }
                Err(error) => {
                    alarms.push(damaged_snapshot(&name, error)?);
                    snapshots.damaged.push(name);
                    continue;
                }
            }
        }
        snapshots.files.insert(0, (index, bytes));
    }
    let mut taken = load_taken(disk, names)?;
    let no_snapshot = machine.is_none();
    let mut machine = machine.unwrap_or_default();
    let mut covered = machine.position().index.0;
    let may_cover = taken.as_ref().map_or(covered, |(offer, _)| offer.meta.index.max(covered));
    let opened = Log::open(disk, &identity, sizes, may_cover);
    let (log, recovered) = opened.map_err(|error| if no_snapshot { for_want_of(alarms, error) } else { error })?;
    // A crash came after the log went over to the snapshot that was taken: its file counts. Before that it does not.
    if let Some((offer, loaded)) = taken.take_if(|(offer, _)| recovered.before.0 == offer.meta.index) {
        covered = offer.meta.index;
        disk.rename(&snapshots::taken_file(covered), &snapshot::file(covered))
            .and_then(|()| disk.sync_folder())
            .map_err(|error| io("rename", &snapshots::taken_file(covered), error))?;
        snapshots.files.retain(|(index, _)| *index < covered);
        snapshots.files.push((covered, offer.bytes));
        machine = loaded;
        newest = Some(offer);
    }
    if recovered.before.0 > covered || recovered.last().0 < covered {
        let why = format!(
            "the log is of entries {} to {}, the snapshot of {covered}",
            recovered.before.0 + 1,
            recovered.last().0
        );
        return Err(OpenError::Damaged { file: snapshot::file(covered), offset: 0, why });
    }
    alarms.extend(recovered.torn.clone().map(|(file, offset)| Alarm::TornTail { file, offset }));
    remove_temporary(disk, names)?;
    Ok(Opened { identity, log, recovered, machine, snapshots, newest })
}

/// The snapshot of another member that was fetched whole, if a start finds one. A damaged one is fetched again.
fn load_taken<D: Disk>(disk: &mut D, names: &[String]) -> Result<Option<(Offer, Machine)>, OpenError> {
    let Some(name) = names.iter().find(|n| snapshots::taken_index(n).is_some()) else { return Ok(None) };
    let bytes = disk.len(name).map_err(|error| io("measure", name, error))?;
    match snapshot::load(disk, name) {
        Ok((meta, machine)) => Ok(Some((Offer { meta, bytes }, machine))),
        Err(LoadError::Io(error)) => Err(io("read", name, error)),
        Err(LoadError::Format(_) | LoadError::Damaged { .. }) => Ok(None),
    }
}

/// A log that does not reach back to the beginning is not what is wrong where a snapshot is damaged: the newest such is named.
fn for_want_of(alarms: &[Alarm], error: OpenError) -> OpenError {
    match (alarms.first(), error) {
        (Some(Alarm::SnapshotDamaged { file, offset, why }), OpenError::Damaged { file: log, why: log_why, .. }) => {
            let why = format!("{why}; no older snapshot is whole, and {log} cannot stand in ({log_why})");
            OpenError::Damaged { file: file.clone(), offset: *offset, why }
        }
        (_, error) => error,
    }
}

/// A bad snapshot is passed over for an older one; a file that cannot be read at all, or of another format, is not.
fn damaged_snapshot(name: &str, error: LoadError) -> Result<Alarm, OpenError> {
    let file = name.to_owned();
    match error {
        LoadError::Io(error) => Err(io("read", name, error)),
        LoadError::Format(format) => {
            Err(OpenError::OtherFormat { file, why: format!("format {format} of a snapshot is not known here") })
        }
        LoadError::Damaged { offset, why } => Ok(Alarm::SnapshotDamaged { file, offset, why }),
    }
}

/// Makes the folder of a new member. The identity comes last, so that a crash before leaves a folder that is made anew.
fn make_folder<D: Disk>(disk: &mut D, config: &Config, sizes: Sizes, names: &[String]) -> Result<Opened, OpenError> {
    for name in names {
        check_leftover(disk, name)?;
    }
    remove_temporary(disk, names)?;
    for name in names.iter().filter(|n| log::is_ours(n) && *n != crate::job::PREPARE_TEMPORARY) {
        disk.remove(name).map_err(|error| io("remove", name, error))?;
    }
    let mut storage = [0; 16];
    storage.copy_from_slice(&config.random[..16]);
    let (cluster, name) = (config.cluster_token.clone(), config.name.clone());
    let identity = Identity { cluster, member: config.member.0, name, storage };
    let conf = ConfState::from((config.voters(), Vec::new()));
    let log = Log::create(disk, &identity, sizes, conf.clone())?;
    identity.store(disk)?;
    let recovered = Recovered { conf: (0, conf), ..Recovered::default() };
    Ok(Opened { identity, log, recovered, machine: Machine::new(), snapshots: Snapshots::default(), newest: None })
}

/// Without an identity only what an interrupted first start left may be there, and nothing is ever deleted that held an entry.
fn check_leftover<D: Disk>(disk: &mut D, name: &str) -> Result<(), OpenError> {
    let foreign = |why: &str| Err(OpenError::OtherFormat { file: name.to_owned(), why: why.to_owned() });
    if is_temporary(name) || name == "lost+found" || name == "lock" || name.starts_with('.') {
        return Ok(());
    }
    if snapshot::index_of(name).is_some() {
        return foreign(
            "a snapshot alone is no folder of a member; `tenure restore` makes one of it, in another folder",
        );
    }
    if !log::is_ours(name) {
        return foreign("there is no identity file beside it; choose an empty folder");
    }
    match log::holds_records(disk, name)? {
        false => Ok(()),
        true => foreign("it holds entries, but the identity file is missing"),
    }
}

fn is_temporary(name: &str) -> bool {
    [identity::TEMPORARY, snapshot::TEMPORARY, snapshots::INCOMING, crate::job::PREPARE_TEMPORARY].contains(&name)
        || snapshots::taken_index(name).is_some()
}

fn remove_temporary<D: Disk>(disk: &mut D, names: &[String]) -> Result<(), OpenError> {
    for name in names.iter().filter(|n| is_temporary(n)) {
        // The log makes its files under one of these names, so it may be gone by now.
        crate::job::remove_if_there(disk, name).map_err(|error| io("remove", name, error))?;
    }
    Ok(())
}

fn io(doing: &'static str, file: &str, error: std::io::Error) -> OpenError {
    OpenError::Io { doing, file: file.to_owned(), error }
}

/// Applies what is known to be committed, up to a change of members that the configuration in the log does not contain yet: that
/// one the library must see. Gives the index of the last applied entry.
fn replay(machine: &mut Machine, recovered: &Recovered) -> Result<u64, OpenError> {
    let mut applied = Applied::default();
    for entry in recovered.entries.iter().take_while(|e| e.index <= recovered.hard_state.commit) {
        if entry.index <= machine.position().index.0 {
            continue;
        }
        let at = Position { index: Index(entry.index), term: Term(entry.term) };
        match entry.entry_type {
            EntryType::EntryNormal if entry.data.is_empty() => machine.skip(at),
            EntryType::EntryNormal => {
                machine.apply_encoded(at, &entry.data, &mut applied).map_err(OpenError::Machine)?
            }
            _ if entry.index > recovered.conf.0 => break,
            _ => machine.skip(at),
        }
    }
    Ok(machine.position().index.0)
}

fn consensus(config: &Config, store: Store, applied: u64) -> Result<RawNode<Store>, OpenError> {
    let options = raft::Config {
        id: config.member.0,
        election_tick: config.election_ticks,
        heartbeat_tick: config.heartbeat_ticks,
        applied,
        max_size_per_msg: MESSAGE_BYTES,
        check_quorum: true,
        pre_vote: true,
        // Above what may wait in the queue, so that a lone member never drops what it took.
        max_uncommitted_size: (2 * config.max_queued_bytes as u64).max(2 * MESSAGE_BYTES),
        max_committed_size_per_ready: 16 << 20,
        ..raft::Config::default()
    };
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    let mut node = RawNode::new(&options, store, &logger).map_err(|e| OpenError::Consensus { why: e.to_string() })?;
    // Drawn by the library while it was made; see `set_jitter`.
    node.raft.set_randomized_election_timeout(config.election_ticks);
    Ok(node)
}

fn consensus_fault(error: raft::Error) -> Fault {
    Fault::Consensus { why: error.to_string() }
}

/// About how many bytes of an entry a transaction takes.
fn weight(txn: &Txn) -> usize {
    let compares: usize = txn.compares.iter().map(|c| 64 + c.span.start.as_bytes().len()).sum();
    64 + txn.principal.len() + compares + ops_weight(&txn.then) + ops_weight(&txn.otherwise)
}

fn ops_weight(ops: &[Op]) -> usize {
    let weights = ops.iter().map(|op| {
        48 + match op {
            Op::Put(put) => put.key.as_bytes().len() + put.value.len(),
            Op::Delete(delete) => delete.span.start.as_bytes().len(),
            Op::Range(range) => range.span.start.as_bytes().len(),
            Op::Txn(sub) => 64 * sub.compares.len() + ops_weight(&sub.then) + ops_weight(&sub.otherwise),
            Op::SessionCreate(create) => create.metadata.iter().map(|(k, v)| k.len() + v.len()).sum(),
            Op::LockAcquire(acquire) => acquire.name.len() + acquire.owner.len(),
            _ => 0,
        }
    });
    weights.sum()
}

/// Whether nothing in it begins anything: such requests pass while the disk is nearly full.
fn only_frees(txn: &Txn) -> bool {
    txn.then.iter().chain(&txn.otherwise).all(|op| match op {
        Op::Delete(_)
        | Op::Range(_)
        | Op::Compact { .. }
        | Op::SessionEnd { .. }
        | Op::LockRelease { .. }
        | Op::LockCancel { .. } => true,
        Op::Native(op) => op.only_settles(),
        _ => false,
    })
}

/// Spreads the bits of a number.
fn mix(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

#[cfg(test)]
mod group_tests;
#[cfg(test)]
mod scripts;
#[cfg(test)]
mod tests;
