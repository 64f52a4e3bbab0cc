//! Queues of jobs: delivered to one worker at a time, each delivery numbered, until somebody says that the job is done.
//!
//! Promises. U1: a job is delivered to one receiver at a time, and only the receipt of its newest delivery (job and token) can end or prolong that; any
//! other is told what took its place. U2: whoever waits for a job gets it in the very commit that makes it ready. U3: jobs of one group are delivered in
//! the order of their enqueue, at most `group_in_flight` at a time, whatever their delay or priority. U4: within the scope of its key a job has no
//! duplicate; keys are compared byte by byte. U5: tenants with jobs that are ready take turns by their weights, and none has more deliveries under way
//! than the queue allows. U6: an attempt is counted when it is delivered, so a job that kills its workers reaches the dead letters. U7: a visibility ends
//! at the first entry whose stamp reaches it: before that entry the receipt is good, from then on it is not.
//! Not promised. That a job runs once: a worker that was slow or cut off may have done its work. Let the effect check the token or a marker.
//! Relies on. `objects.rs` for deadlines, `waits.rs` for the order of receivers. Log time never goes back.
//!
//! `job.rs` has the life of one job, `index.rs` what follows from all, `rules.rs` delivery and its ends, `upkeep.rs` what operators do, `look.rs` reads.

mod index;
mod job;
mod look;
mod rules;
mod upkeep;

pub(crate) use index::Index;
pub use job::{
    Dedup, DedupScope, HowEnded, JOB_STATES, Job, JobEnd, JobId, JobLease, JobState, JobTerms, PastDelivery,
};
pub use look::{JobCounts, JobInfo, QueueInfo};
pub(crate) use rules::{check_job, check_queue_name};

use crate::apply::{Commit, Machine};
use crate::codec;
use crate::coded::{coded_enum, coded_struct, encoded};
use crate::command::{Op, Txn};
use crate::native::{NativeOp, Refusal};
use crate::objects::{Indexes, Lived, ObjectKey};
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::Waiter;
use std::sync::Arc;

/// Bytes of a queue's name.
pub const QUEUE_NAME_MAX: usize = 255;
/// Bytes of a key of deduplication, of a group and of a tenant.
pub const JOB_KEY_MAX: usize = 512;
/// The largest payload that the state machine takes; a door may take less.
pub const JOB_PAYLOAD_MAX: usize = 1 << 20;
/// Headers of a job, names and values together.
pub const JOB_HEADERS_MAX: usize = 8 << 10;
/// Bytes of a result and of a progress.
pub const JOB_RESULT_MAX: usize = 16 << 10;
/// Jobs in one call.
pub const JOBS_PER_CALL: usize = 100;
/// Queues of one receive, and groups of one.
pub const RECEIVE_PLACES_MAX: usize = 64;

coded_enum! {
    /// What the dead head of a group means for those behind it.
    #[derive(Copy, Eq)]
    pub enum OnDead as "what a dead job does to its group" {
        Pass = 1,
        Block = 2,
    }
}

coded_struct! {
    /// Pauses delivery while too much fails.
    #[derive(Copy, Eq)]
    pub struct Breaker as "a breaker" {
        /// More than this share of the deliveries that ended.
        pub percent: u32,
        pub window_ms: u64,
        /// Fewer ends within a window say nothing.
        pub min: u64,
        pub pause_ms: u64,
    }
}

coded_struct! {
    /// How a queue treats its jobs.
    pub struct QueueSettings as "settings of a queue" {
        pub visibility_ms: u64,
        pub max_attempts: u32,
        /// Before the second attempt; doubled each time.
        pub backoff_first_ms: u64,
        pub backoff_max_ms: u64,
        /// Any time up to the backoff, and not the backoff itself.
        pub jitter: bool,
        pub retention_ms: u64,
        /// Records of done jobs that are kept at most.
        pub done_max: u64,
        pub dead_retention_ms: u64,
        pub group_in_flight: u64,
        pub on_dead: OnDead,
        /// Deliveries of one tenant under way at most; zero: any number.
        pub tenant_in_flight: u64,
        /// Turns of a tenant in each round where that is not one.
        pub weights: Vec<(Arc<[u8]>, u32)>,
        /// Jobs that are not finished at most; zero: any number.
        pub jobs_max: u64,
        pub breaker: Option<Breaker>,
        /// Nothing is delivered.
        pub paused: bool,
    }
}

impl Default for QueueSettings {
    fn default() -> Self {
        Self {
            visibility_ms: 30_000,
            max_attempts: 20,
            backoff_first_ms: 5_000,
            backoff_max_ms: 3_600_000,
            jitter: true,
            retention_ms: 86_400_000,
            done_max: 10_000,
            dead_retention_ms: 14 * 86_400_000,
            group_in_flight: 1,
            on_dead: OnDead::Pass,
            tenant_in_flight: 0,
            weights: Vec::new(),
            jobs_max: 0,
            breaker: None,
            paused: false,
        }
    }
}

coded_struct! {
    /// What a breaker has seen of its window.
    #[derive(Default)]
    pub struct Tally as "a tally" {
        pub since: LogTime,
        pub ended: u64,
        pub failed: u64,
    }
}

coded_struct! {
    /// A queue, under its name. Its jobs stand for themselves.
    pub struct Queue as "a queue" {
        /// By which its jobs name it; never used twice while they exist.
        pub number: u64,
        pub settings: QueueSettings,
        pub tally: Tally,
        /// Until then its breaker delivers nothing.
        pub tripped: Option<LogTime>,
    }
}

impl Queue {
    /// Whether jobs are delivered at all.
    pub fn is_open(&self) -> bool {
        !self.settings.paused && self.tripped.is_none()
    }
}

impl Lived for Queue {
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        let weights: usize = self.settings.weights.iter().map(|(tenant, _)| tenant.len() + 40).sum();
        512 + weights as u64
    }

    fn deadline(&self) -> Option<LogTime> {
        self.tripped
    }

    fn digest(&self) -> u64 {
        codec::fold(0, &encoded(self))
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        commit.breaker_closes(key);
    }

    fn note(indexes: &mut Indexes, key: &ObjectKey, old: Option<&Self>, new: Option<&Self>) {
        match (old, new) {
            (_, Some(new)) => indexes.queues.note_queue(new.number, Some(key), new.settings.tenant_in_flight),
            (Some(old), None) => indexes.queues.note_queue(old.number, None, 0),
            (None, None) => {}
        }
    }
}

coded_enum! {
    /// What to do about a job whose key is taken.
    #[derive(Copy, Eq)]
    pub enum OnDuplicate as "what a duplicate does" {
        ReturnExisting = 1,
        ReplacePayload = 2,
        Error = 3,
    }
}

coded_struct! {
    /// A job to be enqueued.
    pub struct NewJob as "a new job" {
        pub payload: Arc<[u8]>,
        pub delay_ms: u64,
        /// The moment of the wall clock that the delay was made from by the proposer; it names the request and decides nothing.
        pub run_at_ms: Option<u64>,
        /// -8 to 7, higher first.
        pub priority: i32,
        pub terms: Option<Arc<JobTerms>>,
        pub on_duplicate: OnDuplicate,
    }
}

coded_struct! {
    pub struct Enqueue as "an enqueue" {
        pub queue: Box<[u8]>,
        /// All are taken, or none.
        pub jobs: Vec<NewJob>,
    }
}

coded_struct! {
    /// Asks for jobs, and waits for one if told to.
    pub struct Receive as "a receive" {
        /// Looked through in this order.
        pub queues: Vec<Box<[u8]>>,
        /// Jobs of these groups only; with one queue.
        pub groups: Vec<Arc<[u8]>>,
        pub max: u32,
        pub wait_ms: u64,
        /// Zero: as the job or its queue has it.
        pub visibility_ms: u64,
        pub worker: Box<str>,
        /// Whose loop of receiving this is: a new receive ends the waits of the earlier ones of the same receiver. May be empty.
        pub receiver: Box<[u8]>,
        /// What became of the receipts that came with it.
        pub settled: Vec<Settled>,
    }
}

coded_struct! {
    /// One delivery of one job.
    pub struct Receipt as "a receipt" {
        pub id: JobId,
        pub token: Revision,
    }
}

coded_struct! {
    /// The job of this receipt is done.
    pub struct Ack as "an ack" {
        pub receipt: Receipt,
        pub result: Box<[u8]>,
    }
}

coded_struct! {
    pub struct AckJobs as "acks" {
        pub acks: Vec<Ack>,
        /// Each is judged for itself; otherwise one that is refused refuses all.
        pub each: bool,
        /// Receives in the same commit.
        pub receive: Option<Box<Receive>>,
    }
}

coded_struct! {
    /// The delivery has failed.
    pub struct Nack as "a nack" {
        pub receipt: Receipt,
        /// `None`: by the backoff of the queue.
        pub delay_ms: Option<u64>,
        pub reason: Box<str>,
        /// No further attempt.
        pub dead: bool,
    }
}

coded_struct! {
    pub struct JobHeartbeat as "a heartbeat" {
        pub receipt: Receipt,
        /// From now on; zero: its visibility again.
        pub extend_ms: u64,
        pub progress: Option<Box<[u8]>>,
    }
}

coded_struct! {
    pub struct CancelJob as "a cancellation" {
        pub id: JobId,
        pub reason: Box<str>,
        /// Also one that is being worked on, whose receipt is no longer good then.
        pub force: bool,
    }
}

coded_struct! {
    /// Which dead letters, in the order of their ids.
    #[derive(Default)]
    pub struct DeadFilter as "a filter of dead letters" {
        /// Exactly these; empty: all that fit.
        pub ids: Vec<JobId>,
        /// The text that the reason or the last error contains.
        pub contains: Box<str>,
        pub group: Option<Arc<[u8]>>,
    }
}

coded_struct! {
    /// Gives dead letters another life.
    pub struct Redrive as "a redrive" {
        pub queue: Box<[u8]>,
        pub filter: DeadFilter,
        /// Into another queue; empty: where they are.
        pub to: Box<[u8]>,
        /// Jobs a second; zero: at once.
        pub rate: u64,
        pub max: u32,
        pub after: Option<JobId>,
        /// Already in the rate's line before this call.
        pub before: u64,
    }
}

coded_struct! {
    /// Throws jobs away.
    pub struct Purge as "a purge" {
        pub queue: Box<[u8]>,
        /// The places of states in `JOB_STATES`; empty: everything that waits to be delivered.
        pub states: Vec<u8>,
        /// The name of the queue again.
        pub confirm: Box<[u8]>,
        /// Removes the queue too, once nothing is left in it.
        pub remove: bool,
    }
}

coded_struct! {
    /// Changes settings; what is `None` stays.
    #[derive(Default)]
    pub struct ConfigureQueue as "a configuration of a queue" {
        pub queue: Box<[u8]>,
        pub visibility_ms: Option<u64>,
        pub max_attempts: Option<u32>,
        pub backoff_first_ms: Option<u64>,
        pub backoff_max_ms: Option<u64>,
        pub jitter: Option<bool>,
        pub retention_ms: Option<u64>,
        pub done_max: Option<u64>,
        pub dead_retention_ms: Option<u64>,
        pub group_in_flight: Option<u64>,
        pub on_dead: Option<OnDead>,
        pub tenant_in_flight: Option<u64>,
        /// Weight one takes a tenant out of the list.
        pub weights: Vec<(Arc<[u8]>, u32)>,
        pub jobs_max: Option<u64>,
        /// One of zero percent takes it away.
        pub breaker: Option<Breaker>,
        pub paused: Option<bool>,
    }
}

coded_enum! {
    pub enum QueueOp as "an operation of queues" {
        Enqueue(Enqueue) = 1,
        Receive(Receive) = 2,
        Ack(AckJobs) = 3,
        Nack(Nack) = 4,
        /// Gives a job back without spending its attempt.
        Release(Receipt) = 5,
        Heartbeat(JobHeartbeat) = 6,
        /// Ends the waits of a receiver that is gone.
        Leave(Box<[u8]>) = 7,
        Cancel(CancelJob) = 8,
        Redrive(Redrive) = 9,
        Purge(Purge) = 10,
        Configure(ConfigureQueue) = 11,
    }
}

coded_struct! {
    pub struct Enqueued as "an enqueued job" {
        pub id: JobId,
        /// It was there before.
        pub duplicate: bool,
    }
}

coded_struct! {
    /// A job in the hands of a worker.
    pub struct Delivered as "a delivered job" {
        pub id: JobId,
        pub token: Revision,
        pub queue: Box<[u8]>,
        pub payload: Arc<[u8]>,
        pub attempt: u32,
        pub max_attempts: u32,
        /// Its visibility, from the delivery on.
        pub visibility_ms: u64,
        /// From its enqueue to this delivery.
        pub age_ms: u64,
        pub priority: i32,
        pub terms: Option<Arc<JobTerms>>,
        pub last_error: Box<str>,
    }
}

coded_struct! {
    /// What became of one receipt.
    pub struct Settled as "a settled receipt" {
        pub id: JobId,
        /// It had been settled so before.
        pub again: bool,
        pub refusal: Option<Box<Refusal>>,
    }
}

coded_struct! {
    pub struct Received as "received jobs" {
        pub jobs: Vec<Delivered>,
        pub settled: Vec<Settled>,
        /// From the entry of the receive to that of the delivery; what came before is not counted, so that a worker's deadline is never late.
        pub waited_ms: u64,
    }
}

coded_struct! {
    pub struct Beat as "an answer to a heartbeat" {
        pub remaining_ms: u64,
        pub cancel_requested: bool,
        /// The queue was paused, or something more urgent is ready.
        pub should_yield: bool,
    }
}

coded_struct! {
    /// Where a job is after a call that moved it.
    pub struct Moved as "a moved job" {
        /// The place of its state in `JOB_STATES`.
        pub state: u8,
        /// Until its next attempt.
        pub delay_ms: u64,
        pub attempt: u32,
    }
}

coded_struct! {
    pub struct Swept as "swept jobs" {
        pub count: u64,
        /// Left where they are, because a job with their key is there.
        pub skipped: u64,
        /// Go on after this one; `None`: there is no more.
        pub next: Option<JobId>,
    }
}

coded_enum! {
    pub enum QueueReply as "an answer of queues" {
        Enqueued(Vec<Enqueued>) = 1,
        Received(Received) = 2,
        Moved(Moved) = 3,
        Beat(Beat) = 4,
        /// How many waits ended.
        Left(u64) = 5,
        Swept(Swept) = 6,
        Configured(Box<QueueSettings>) = 7,
    }
}

/// Whose wait a transaction may become: that of a receiver of jobs.
pub fn waiting_receiver(txn: &Txn) -> Option<&[u8]> {
    let [Op::Native(op)] = &txn.then[..] else { return None };
    let NativeOp::Queue(op) = &**op else { return None };
    let receive = match op {
        QueueOp::Receive(receive) => receive,
        QueueOp::Ack(acks) => acks.receive.as_deref()?,
        _ => return None,
    };
    (receive.wait_ms > 0 && !receive.receiver.is_empty()).then_some(&receive.receiver)
}

impl NewJob {
    pub(crate) fn growth(&self) -> u64 {
        (512 + self.payload.len() + self.terms.as_ref().map_or(0, |terms| terms.bytes())) as u64
    }
}

impl QueueOp {
    /// An upper bound of the bytes that it adds; zero for what takes away, and for what lets a full queue drain.
    pub(crate) fn growth(&self) -> u64 {
        match self {
            Self::Enqueue(enqueue) => 1024 + enqueue.jobs.iter().map(NewJob::growth).sum::<u64>(),
            Self::Configure(_) => 1024,
            _ => 0,
        }
    }

    /// Whether a delay in it was made from a moment: another try has another delay.
    pub(crate) fn has_additions(&self) -> bool {
        matches!(self, Self::Enqueue(enqueue) if enqueue.jobs.iter().any(|job| job.run_at_ms.is_some()))
    }

    pub(crate) fn forget_additions(&mut self) {
        if let Self::Enqueue(enqueue) = self {
            enqueue.jobs.iter_mut().filter(|job| job.run_at_ms.is_some()).for_each(|job| job.delay_ms = 0);
        }
    }

    /// What a waiter is told whose time is over: no job came, which is no error.
    pub(crate) fn wait_over(&self, machine: &Machine, waiter: &Waiter) -> Option<Result<OpReply, Rejection>> {
        let Self::Receive(receive) = self else { return None };
        let waited_ms = machine.stamp.0 - waiter.since.0;
        Some(
            Ok(QueueReply::Received(Received { jobs: Vec::new(), settled: receive.settled.clone(), waited_ms }).into()),
        )
    }
}

impl Commit<'_> {
    pub(crate) fn queue_op(&mut self, op: &QueueOp) -> Result<OpReply, Rejection> {
        Ok(match op {
            QueueOp::Enqueue(enqueue) => QueueReply::Enqueued(self.enqueue_jobs(enqueue)?).into(),
            QueueOp::Receive(receive) => return self.receive_jobs(receive, Vec::new()),
            QueueOp::Ack(acks) => return self.ack_jobs(acks),
            QueueOp::Nack(nack) => QueueReply::Moved(self.nack_job(nack)?).into(),
            QueueOp::Release(receipt) => QueueReply::Moved(self.release_job(receipt)?).into(),
            QueueOp::Heartbeat(heartbeat) => QueueReply::Beat(self.job_heartbeat(heartbeat)?).into(),
            QueueOp::Leave(receiver) => QueueReply::Left(self.leave_queues(receiver)).into(),
            QueueOp::Cancel(cancel) => QueueReply::Moved(self.cancel_job(cancel)?).into(),
            QueueOp::Redrive(redrive) => QueueReply::Swept(self.redrive_jobs(redrive)?).into(),
            QueueOp::Purge(purge) => QueueReply::Swept(self.purge_queue(purge)?).into(),
            QueueOp::Configure(configure) => QueueReply::Configured(Box::new(self.configure_queue(configure)?)).into(),
        })
    }
}
