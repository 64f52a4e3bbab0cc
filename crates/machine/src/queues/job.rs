//! One job: what was asked, and where it is in its life.
//!
//! Promises. J1: moving a job from state to state copies neither its payload nor its terms. J2: what a job was not given costs it a few bytes.
//! J3: the deadline of a job is the moment at which the log must move it: its delay, its visibility, its time to live, its retention.
//! Not promised. That watchers see jobs: there are too many changes; a receiver waits instead.

use crate::apply::Commit;
use crate::codec;
use crate::coded::{coded_enum, coded_struct};
use crate::objects::{Indexes, Lived, ObjectKey};
use crate::types::*;
use std::fmt;
use std::sync::Arc;

coded_struct! {
    /// The name of a job: the commit that enqueued it, and its place there. Written `REVISION-INDEX`.
    #[derive(Copy, Eq, PartialOrd, Ord)]
    pub struct JobId as "a job id" {
        pub revision: u64,
        pub index: u32,
    }
}

impl JobId {
    pub(crate) fn key(self, namespace: NamespaceId) -> ObjectKey {
        let mut name = [0; 12];
        name[..8].copy_from_slice(&self.revision.to_be_bytes());
        name[8..].copy_from_slice(&self.index.to_be_bytes());
        ObjectKey::of::<Job>(namespace, &name)
    }

    pub(crate) fn of_key(key: &ObjectKey) -> Self {
        let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
        let name = key.name();
        let (revision, index) = name.split_at(name.len().min(8));
        Self { revision: number(revision), index: number(index) as u32 }
    }

    /// Reads what `Display` writes.
    pub fn parse(text: &str) -> Option<Self> {
        let (revision, index) = text.split_once('-')?;
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        if !plain(revision) || !plain(index) {
            return None;
        }
        Some(Self { revision: revision.parse().ok()?, index: index.parse().ok()? })
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.revision, self.index)
    }
}

coded_enum! {
    /// How long the key of a job keeps others with the same key out.
    #[derive(Copy, Eq)]
    pub enum DedupScope as "a scope of deduplication" {
        /// Until it is done, dead or cancelled. No clock is in it.
        UntilDone = 1,
        /// For this many milliseconds from its enqueue, whatever becomes of it.
        Window(u64) = 2,
        /// Until it is delivered for the first time.
        UntilStarted = 3,
    }
}

coded_struct! {
    /// A job with an equal key, compared byte by byte, is a duplicate within the scope.
    pub struct Dedup as "a deduplication" {
        pub key: Arc<[u8]>,
        pub scope: DedupScope,
    }
}

coded_struct! {
    /// What a job may be given beside its payload. Zero and empty: as the queue has it.
    #[derive(Default)]
    pub struct JobTerms as "terms of a job" {
        /// On whose behalf: tenants take turns.
        pub tenant: Option<Arc<[u8]>>,
        /// Jobs of a group run in the order of their enqueue.
        pub group: Option<Arc<[u8]>>,
        pub dedup: Option<Dedup>,
        pub max_attempts: u32,
        pub visibility_ms: u64,
        /// How long the record of the finished job is kept.
        pub retention_ms: Option<u64>,
        /// A job that is not delivered within this time goes to the dead letters.
        pub ttl_ms: u64,
        pub headers: Vec<(Box<str>, Box<str>)>,
        /// W3C trace context.
        pub traceparent: Box<str>,
        pub tracestate: Box<str>,
    }
}

coded_struct! {
    /// A delivery that is under way.
    pub struct JobLease as "a delivery" {
        pub worker: Box<str>,
        pub since: LogTime,
        /// The end of its visibility.
        pub until: LogTime,
        /// No heartbeat goes beyond.
        pub run_until: LogTime,
        /// What a heartbeat gives when it names no time.
        pub visibility_ms: u64,
        /// The worker is asked to stop.
        pub cancel: bool,
        /// As the last heartbeat told.
        pub progress: Box<[u8]>,
    }
}

coded_struct! {
    /// The end of a job.
    pub struct JobEnd as "a finished job" {
        pub at: LogTime,
        /// Its record goes then.
        pub gone: LogTime,
        /// Of a dead or cancelled one.
        pub why: Box<str>,
        /// Of one that is done.
        pub result: Box<[u8]>,
    }
}

coded_enum! {
    /// Where a job is. The order of its life; the numbers never change.
    pub enum JobState as "a state of a job" {
        /// Enqueued for later.
        Scheduled(LogTime) = 1,
        /// It failed and will be tried again.
        Backoff(LogTime) = 2,
        /// Others of its group come first.
        Held = 3,
        /// Its turn among the tenants.
        Ready(u64) = 4,
        Leased(Arc<JobLease>) = 5,
        Done(Arc<JobEnd>) = 6,
        Dead(Arc<JobEnd>) = 7,
        Cancelled(Arc<JobEnd>) = 8,
    }
}

/// The names of the states, in the order of their numbers.
pub const JOB_STATES: [&str; 8] = ["scheduled", "backoff", "held", "ready", "leased", "done", "dead", "cancelled"];

impl JobState {
    /// Its number less one: the place of its name in `JOB_STATES`.
    pub fn place(&self) -> usize {
        match self {
            Self::Scheduled(_) => 0,
            Self::Backoff(_) => 1,
            Self::Held => 2,
            Self::Ready(_) => 3,
            Self::Leased(_) => 4,
            Self::Done(_) => 5,
            Self::Dead(_) => 6,
            Self::Cancelled(_) => 7,
        }
    }

    pub fn name(&self) -> &'static str {
        JOB_STATES[self.place()]
    }

    /// It has not been delivered yet, or is to be delivered again.
    pub fn is_pending(&self) -> bool {
        self.place() < 4
    }

    pub fn finished(&self) -> Option<&JobEnd> {
        match self {
            Self::Done(end) | Self::Dead(end) | Self::Cancelled(end) => Some(end),
            _ => None,
        }
    }
}

coded_enum! {
    /// How a delivery ended that was not the last one.
    #[derive(Copy, Eq)]
    pub enum HowEnded as "an end of a delivery" {
        /// Its visibility was over.
        Expired = 1,
        /// The worker said that it failed.
        Failed = 2,
        /// The worker gave it back; no attempt was spent.
        Released = 3,
    }
}

impl HowEnded {
    pub fn name(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Failed => "failed",
            Self::Released => "released",
        }
    }
}

coded_struct! {
    /// A delivery that is over.
    pub struct PastDelivery as "a past delivery" {
        pub attempt: u32,
        pub token: Revision,
        pub worker: Box<str>,
        pub since: LogTime,
        pub ended: LogTime,
        pub how: HowEnded,
        pub error: Box<str>,
    }
}

coded_struct! {
    /// A job as the table keeps it, under its id.
    pub struct Job as "a job" {
        /// The number of its queue.
        pub queue: u64,
        /// Empty once the job is done or cancelled.
        pub payload: Arc<[u8]>,
        /// 7 less its priority: lower ones are delivered first.
        pub rank: u8,
        /// Deliveries that count.
        pub attempt: u32,
        /// Of the newest delivery; zero: it was never delivered.
        pub token: Revision,
        pub enqueued: LogTime,
        pub state: JobState,
        pub terms: Option<Arc<JobTerms>>,
        /// Past deliveries, the newest last; bounded.
        pub past: Option<Arc<Vec<PastDelivery>>>,
        /// Its place in the order of its group, where that is not its id: it was redriven.
        pub order: Option<Box<JobId>>,
    }
}

impl Job {
    pub fn priority(&self) -> i32 {
        7 - i32::from(self.rank)
    }

    pub(crate) fn tenant(&self) -> Option<&Arc<[u8]>> {
        self.terms.as_ref()?.tenant.as_ref()
    }

    pub(crate) fn group(&self) -> Option<&Arc<[u8]>> {
        self.terms.as_ref()?.group.as_ref()
    }

    pub(crate) fn dedup(&self) -> Option<&Dedup> {
        self.terms.as_ref()?.dedup.as_ref()
    }

    /// When its key stops to keep others out, if a clock decides that.
    pub(crate) fn window_end(&self) -> Option<LogTime> {
        match self.dedup()?.scope {
            DedupScope::Window(ms) => Some(self.enqueued.plus(ms)),
            _ => None,
        }
    }

    /// Whether its key may keep others out; a window may be over.
    pub(crate) fn is_unique(&self) -> bool {
        match self.dedup().map(|dedup| dedup.scope) {
            None => false,
            Some(DedupScope::Window(_)) => true,
            Some(DedupScope::UntilDone) => self.state.finished().is_none(),
            Some(DedupScope::UntilStarted) => self.state.is_pending() && self.token.0 == 0,
        }
    }

    /// When it stops waiting to be delivered for the first time.
    pub(crate) fn expires(&self) -> Option<LogTime> {
        let ttl_ms = self.terms.as_ref().map_or(0, |terms| terms.ttl_ms);
        (ttl_ms > 0 && self.token.0 == 0).then(|| self.enqueued.plus(ttl_ms))
    }

    /// What the last delivery that failed said.
    pub fn last_error(&self) -> &str {
        self.past.as_ref().and_then(|past| past.last()).map_or("", |past| &past.error)
    }

    /// Since when it is in its state, as far as that is known.
    pub fn since(&self) -> LogTime {
        match &self.state {
            JobState::Leased(lease) => lease.since,
            JobState::Done(end) | JobState::Dead(end) | JobState::Cancelled(end) => end.at,
            _ => self.past.as_ref().and_then(|past| past.last()).map_or(self.enqueued, |past| past.ended),
        }
    }
}

/// What terms take beside their bytes.
const TERMS_BYTES: usize = 224;
const PAST_BYTES: usize = 96;
/// A place in the order of the queue.
const PLACE_BYTES: usize = 40;
/// The allocation of a payload.
const PAYLOAD_BYTES: usize = 32;

impl JobTerms {
    pub(crate) fn bytes(&self) -> usize {
        let one = |bytes: &Option<Arc<[u8]>>| bytes.as_ref().map_or(0, |bytes| bytes.len() + PLACE_BYTES);
        let dedup = self.dedup.as_ref().map_or(0, |dedup| 2 * (dedup.key.len() + PLACE_BYTES));
        let headers: usize = self.headers.iter().map(|(k, v)| k.len() + v.len() + PLACE_BYTES).sum();
        let trace = self.traceparent.len() + self.tracestate.len();
        TERMS_BYTES + one(&self.tenant) + one(&self.group) + dedup + headers + trace
    }
}

impl Lived for Job {
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        let terms = self.terms.as_ref().map_or(0, |terms| terms.bytes());
        let past: usize = self.past.iter().flat_map(|past| past.iter()).map(past_bytes).sum();
        let state = match &self.state {
            JobState::Leased(lease) => 96 + lease.worker.len() + lease.progress.len(),
            state => state.finished().map_or(0, |end| 64 + end.why.len() + end.result.len()),
        };
        (PLACE_BYTES + PAYLOAD_BYTES + self.payload.len() + terms + past + state) as u64
    }

    fn deadline(&self) -> Option<LogTime> {
        let at = match &self.state {
            JobState::Scheduled(at) | JobState::Backoff(at) => Some(*at),
            JobState::Held | JobState::Ready(_) => None,
            JobState::Leased(lease) => return Some(lease.until),
            JobState::Done(end) | JobState::Dead(end) | JobState::Cancelled(end) => return Some(end.gone),
        };
        at.into_iter().chain(self.expires()).min()
    }

    /// Over the numbers that decide about it: what was enqueued came with the entry.
    fn digest(&self) -> u64 {
        let state = match &self.state {
            JobState::Scheduled(at) | JobState::Backoff(at) => at.0,
            JobState::Held => 0,
            JobState::Ready(turn) => *turn,
            JobState::Leased(lease) => lease.until.0 << 1 | u64::from(lease.cancel),
            JobState::Done(end) | JobState::Dead(end) | JobState::Cancelled(end) => end.gone.0,
        };
        let number = self.state.place() as u64 + 1;
        let words = [self.queue, u64::from(self.attempt), self.token.0, self.payload.len() as u64, state];
        words.into_iter().fold(number << 8 | u64::from(self.rank), codec::mix)
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        commit.job_due(key);
    }

    fn note(indexes: &mut Indexes, key: &ObjectKey, old: Option<&Self>, new: Option<&Self>) {
        indexes.queues.note_job(JobId::of_key(key), old, new);
    }
}

pub(crate) fn past_bytes(past: &PastDelivery) -> usize {
    PAST_BYTES + past.worker.len() + past.error.len()
}
