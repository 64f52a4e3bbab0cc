//! The driver: the one loop that owns the member, and the way to it. Its rounds run on a thread of its own, or on that of a lone caller (`turns.rs`).
//!
//! Promises. D1: changes reach the watch hub before the answers of the requests that made them leave. D2: everything that waits when a
//! round begins goes into one entry, one write and one sync; answers leave as one list per round, so that their callers come back together.
//! D3: a full queue is an answer (`Failure::Overloaded`), never a longer queue. D4: long reads and watchers that fell behind are served
//! in slices between rounds, so that writers do not wait for them. D5: a fault ends the process's service at once and answers nobody as if
//! their request had been applied.
//! Not promised. Fairness among callers beyond the order of the queue.
//! Relies on. Time comes from a monotonic clock that stands still while the machine is suspended, so no session is expired early by a sleep.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tenure_machine::{
    Counts, JobCounts, Key, LockCounts, LockReply, Machine, MemberId, Memory, NamespaceId, NativeReply, OpReply, Range,
    RangeReply, Record, Rejection, Reply, Revision, SessionId, SessionToken, Span, Tallies, Ticket, Txn, TxnReply,
};
use tenure_replica::{Alarm, Answer, Effects, Job, JobDone, Lane, Member, Millis, Refusal, Renewal, Status, run_job};
use tokio::sync::oneshot;

use crate::disk_fs::FsDisk;
use crate::etcd::encode::Identity;
use crate::follow::{Followers, Visit};
use crate::metrics::DurationHistogram;
use crate::native::stream::{PipeItem, PipeOut, PipeRequest, Pipes};
use crate::native::{NativeRead, Outcome, ReadOut};
use crate::peers::{PeerEvent, Peers};
use crate::schedules::ScheduleFacts;
use crate::turns::{self, Core, Events, Next, Queue, SendError, Turn};
use crate::watch_hub::{Hub, StreamId, StreamOut, WatchCreate, WatchFacts};

/// Requests that may wait for the driver. Beyond it callers are told to come back.
const QUEUE_MAX: usize = 16_384;
/// Records of a long read that are gathered in one slice.
const SLICE_RECORDS: usize = 1_000;
/// A leader that stops waits at most so long for another one.
const HAND_OVER_MS: u64 = 1_500;
/// The thread comes round at least this often, for progress reports and streams that are gone.
const IDLE_MS: u64 = 500;

/// Why a request got no answer from the state machine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Failure {
    /// The queue to the driver is full; nothing was run.
    Overloaded,
    /// The member refused it; nothing was run.
    Refused(Refusal),
    /// It was proposed and its fate is not known here.
    Unknown,
    /// The server is stopping; nothing was run.
    Stopping,
}

/// The answer to a write, and what is left of the session that it made or that it gave a lock to.
pub(crate) struct Written {
    pub(crate) reply: Reply,
    pub(crate) remaining_ms: u64,
}

pub(crate) type WriteReply = Result<Written, Failure>;

/// The answer to a read: what it found, and the newest revision it saw.
pub(crate) type ReadReply<T> = Result<(Result<T, Rejection>, Revision), Failure>;

pub(crate) type RenewReply = Result<Renewed, Rejection>;

/// A renewal with what its session should know.
#[derive(Clone)]
pub(crate) struct Renewed {
    pub(crate) renewal: Renewal,
    /// Elections that it leads and should resign from.
    pub(crate) yields: Vec<Box<[u8]>>,
}

/// The answers to renewals in their order, and the newest revision when they were given.
pub(crate) type RenewReplies = Result<(Vec<RenewReply>, Revision), Failure>;

/// A session and the incarnation that is meant; 0 is whichever lives.
pub(crate) type SessionRef = (SessionId, SessionToken);

/// What a view of the member's state offers to a query. Queries run on the driver's thread: they must be short.
pub(crate) struct View<'a> {
    pub(crate) machine: &'a Machine,
    pub(crate) member: &'a Member<FsDisk>,
    pub(crate) identity: &'a Identity,
    pub(crate) now: Millis,
}

pub(crate) type Query = Box<dyn FnOnce(Result<&View<'_>, Failure>) + Send>;

pub(crate) enum Event {
    Write {
        txn: Txn,
        reply: oneshot::Sender<WriteReply>,
    },
    Read {
        read: Read,
        serializable: bool,
    },
    Renew {
        sessions: Vec<SessionRef>,
        reply: oneshot::Sender<RenewReplies>,
    },
    PipeOpen {
        out: Arc<PipeOut>,
        reply: oneshot::Sender<u64>,
    },
    Pipe {
        pipe: u64,
        requests: Vec<PipeRequest>,
    },
    PipeClose {
        pipe: u64,
    },
    WatchOpen {
        out: Arc<StreamOut>,
        reply: oneshot::Sender<StreamId>,
    },
    Watch {
        stream: StreamId,
        request: WatchRequest,
    },
    Follow(Visit),
    JobDone(JobDone),
    Peer(PeerEvent),
    HandOver {
        to: Option<MemberId>,
        reply: oneshot::Sender<Result<MemberId, Failure>>,
    },
    WantSnapshot {
        reply: oneshot::Sender<u64>,
    },
    /// Something outside may have made room for a long read.
    Nudge,
    EndStreams,
    Stop,
}

impl Event {
    /// How many callers wait for it.
    fn requests(&self) -> usize {
        match self {
            Self::Write { .. } | Self::Read { .. } | Self::Renew { .. } => 1,
            Self::Pipe { requests, .. } => requests.len(),
            _ => 0,
        }
    }
}

pub(crate) enum WatchRequest {
    Create(WatchCreate),
    Cancel(i64),
    Progress,
    /// The stream's task has sent enough for more to come.
    Drained,
    Close,
}

pub(crate) enum Read {
    Range(Range, oneshot::Sender<ReadReply<RangeReply>>),
    Txn(Txn, oneshot::Sender<ReadReply<TxnReply>>),
    Native(NativeRead, oneshot::Sender<ReadReply<ReadOut>>),
    Pipe { read: NativeRead, pipe: u64, item: PipeItem },
    Query(Query),
    Slices(SliceRequest),
}

/// A long read at one revision, delivered in pieces.
pub(crate) struct SliceRequest {
    pub(crate) span: Span,
    /// 0: the newest.
    pub(crate) revision: i64,
    pub(crate) pieces: tokio::sync::mpsc::Sender<Result<Slice, Rejection>>,
}

/// One piece of a long read.
pub(crate) struct Slice {
    pub(crate) records: Vec<Record>,
    /// The revision read at.
    pub(crate) revision: Revision,
    /// The newest revision when the read began.
    pub(crate) current: Revision,
    pub(crate) is_last: bool,
}

/// The pieces of a long read, as they come.
pub(crate) struct Slices {
    receiver: tokio::sync::mpsc::Receiver<Result<Slice, Rejection>>,
    events: Events<Loop>,
}

impl Slices {
    /// The next piece. An end before the last piece means that the server is stopping.
    pub(crate) async fn next(&mut self) -> Option<Result<Slice, Rejection>> {
        let piece = self.receiver.recv().await;
        // The driver may sleep because there was no room for more. A full queue wakes it as well.
        let _ = self.events.try_send(Event::Nudge);
        piece
    }
}

/// An answer on its way to a caller; sent by the postman, so that the driver wakes one task per round.
enum Delivery {
    Write(oneshot::Sender<WriteReply>, WriteReply),
    Range(oneshot::Sender<ReadReply<RangeReply>>, ReadReply<RangeReply>),
    Txn(oneshot::Sender<ReadReply<TxnReply>>, ReadReply<TxnReply>),
    Native(oneshot::Sender<ReadReply<ReadOut>>, ReadReply<ReadOut>),
    Renew(oneshot::Sender<RenewReplies>, RenewReplies),
}

impl Delivery {
    fn send(self) {
        // A caller that is gone takes no answer.
        match self {
            Self::Write(to, answer) => drop(to.send(answer)),
            Self::Range(to, answer) => drop(to.send(answer)),
            Self::Txn(to, answer) => drop(to.send(answer)),
            Self::Native(to, answer) => drop(to.send(answer)),
            Self::Renew(to, answer) => drop(to.send(answer)),
        }
    }
}

#[derive(Default)]
struct Mail {
    deliveries: Vec<Delivery>,
    wakes: Vec<Arc<tokio::sync::Notify>>,
}

impl Mail {
    fn hand_out(self) {
        self.deliveries.into_iter().for_each(Delivery::send);
        self.wakes.iter().for_each(|stream| stream.notify_one());
    }
}

/// Figures of the driver for metrics.
#[derive(Debug, Default)]
pub(crate) struct DriverFacts {
    pub(crate) requests: AtomicU64,
    pub(crate) overloaded: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) schedules: ScheduleFacts,
}

/// What the member tells about itself, from time to time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) status: Option<Status>,
    pub(crate) counts: Counts,
    pub(crate) lock_counts: LockCounts,
    pub(crate) jobs: JobCounts,
    pub(crate) tallies: Tallies,
    pub(crate) memory: Memory,
    pub(crate) revision: u64,
    pub(crate) compacted: u64,
    pub(crate) failed: u64,
}

/// The way to the driver. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Handle {
    events: Events<Loop>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) facts: Arc<DriverFacts>,
    pub(crate) watch_facts: Arc<WatchFacts>,
    /// Followers were given everything up to this revision.
    pub(crate) published: Arc<AtomicU64>,
    pub(crate) syncs: Arc<DurationHistogram>,
    figures: Arc<Mutex<Figures>>,
    stopping: Arc<AtomicBool>,
}

#[cfg(test)]
impl Handle {
    /// One whose driver is a test: it takes what has come from the queue.
    pub(crate) fn unserved(queue_max: usize) -> (Self, Queue<Loop>) {
        let (events, queue) = turns::turns(queue_max);
        let handle = Self {
            events,
            identity: Arc::default(),
            facts: Arc::default(),
            watch_facts: Arc::default(),
            published: Arc::default(),
            syncs: Arc::new(DurationHistogram::new(&[1.0])),
            figures: Arc::default(),
            stopping: Arc::default(),
        };
        (handle, queue)
    }
}

impl Handle {
    fn send(&self, event: Event) -> Result<(), Failure> {
        self.facts.requests.fetch_add(1, Ordering::Relaxed);
        match self.events.request(event) {
            Ok(()) => Ok(()),
            Err(SendError::Full(_)) => {
                self.facts.overloaded.fetch_add(1, Ordering::Relaxed);
                Err(Failure::Overloaded)
            }
            Err(SendError::Disconnected) => Err(Failure::Stopping),
        }
    }

    /// For streams and clean-up, which cannot be told to come back: waits for room.
    async fn send_patiently(&self, mut event: Event) -> Result<(), Failure> {
        loop {
            match self.events.request(event) {
                Ok(()) => return Ok(()),
                Err(SendError::Disconnected) => return Err(Failure::Stopping),
                Err(SendError::Full(back)) => event = *back,
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub(crate) async fn write(&self, txn: Txn) -> Result<Reply, Failure> {
        Ok(self.write_held(txn).await?.reply)
    }

    /// A write that may make a session or hold a lock.
    pub(crate) async fn write_held(&self, txn: Txn) -> WriteReply {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Write { txn, reply })?;
        // The driver answers everybody before it ends, unless it died.
        answer.await.unwrap_or(Err(Failure::Unknown))
    }

    /// A write whose caller is gone already: it waits for room, and nobody reads its answer.
    pub(crate) fn write_detached(&self, txn: Txn) {
        let handle = self.clone();
        tokio::spawn(async move {
            let (reply, _) = oneshot::channel();
            handle.send_patiently(Event::Write { txn, reply }).await
        });
    }

    pub(crate) async fn range(&self, range: Range, serializable: bool) -> ReadReply<RangeReply> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Read { read: Read::Range(range, reply), serializable })?;
        answer.await.unwrap_or(Err(Failure::Stopping))
    }

    pub(crate) async fn native_read(&self, read: NativeRead, stale: bool) -> ReadReply<ReadOut> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Read { read: Read::Native(read, reply), serializable: stale })?;
        answer.await.unwrap_or(Err(Failure::Stopping))
    }

    pub(crate) async fn read_txn(&self, txn: Txn, serializable: bool) -> ReadReply<TxnReply> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Read { read: Read::Txn(txn, reply), serializable })?;
        answer.await.unwrap_or(Err(Failure::Stopping))
    }

    /// Runs `query` on the driver's thread, after a read barrier unless `serializable`.
    pub(crate) async fn query<T: Send + 'static>(
        &self,
        serializable: bool,
        query: impl FnOnce(&View<'_>) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let query: Query = Box::new(move |view| {
            let _ = reply.send(view.map(query));
        });
        self.send(Event::Read { read: Read::Query(query), serializable })?;
        answer.await.unwrap_or(Err(Failure::Stopping))
    }

    /// Begins a long read; its pieces come through the channel.
    pub(crate) fn slices(&self, span: Span, revision: i64, serializable: bool) -> Result<Slices, Failure> {
        let (pieces, receiver) = tokio::sync::mpsc::channel(4);
        let read = Read::Slices(SliceRequest { span, revision, pieces });
        self.send(Event::Read { read, serializable })?;
        Ok(Slices { receiver, events: self.events.clone() })
    }

    pub(crate) async fn renew(&self, sessions: Vec<SessionRef>) -> RenewReplies {
        let (reply, answer) = oneshot::channel();
        self.send(Event::Renew { sessions, reply })?;
        answer.await.unwrap_or(Err(Failure::Stopping))
    }

    /// Asks the member to hand leadership to another. The answer is to whom; when it is done its status tells.
    pub(crate) async fn hand_over(&self, to: Option<MemberId>) -> Result<MemberId, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::HandOver { to, reply })?;
        answer.await.unwrap_or(Err(Failure::Stopping))
    }

    /// Has a snapshot written. The answer is the index that the newest one will have at least, as the status tells.
    pub(crate) async fn want_snapshot(&self) -> Result<u64, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send(Event::WantSnapshot { reply })?;
        answer.await.map_err(|_| Failure::Stopping)
    }

    /// Where the connections with other members put what comes.
    pub(crate) fn tell_peer_event(&self) -> impl Fn(PeerEvent) + Send + Sync + 'static {
        let events = self.events.clone();
        move |event| {
            // After the driver's end nobody is there to be told.
            let _ = events.send(Event::Peer(event));
        }
    }

    pub(crate) async fn open_pipe(&self, out: Arc<PipeOut>) -> Result<u64, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send_patiently(Event::PipeOpen { out, reply }).await?;
        answer.await.map_err(|_| Failure::Stopping)
    }

    pub(crate) async fn pipe(&self, pipe: u64, requests: Vec<PipeRequest>) -> Result<(), Failure> {
        self.facts.requests.fetch_add(requests.len() as u64, Ordering::Relaxed);
        self.send_patiently(Event::Pipe { pipe, requests }).await
    }

    pub(crate) fn close_pipe(&self, pipe: u64) {
        let _ = self.events.try_send(Event::PipeClose { pipe });
    }

    pub(crate) async fn open_watch(&self, out: Arc<StreamOut>) -> Result<StreamId, Failure> {
        let (reply, answer) = oneshot::channel();
        self.send_patiently(Event::WatchOpen { out, reply }).await?;
        answer.await.map_err(|_| Failure::Stopping)
    }

    pub(crate) async fn watch(&self, stream: StreamId, request: WatchRequest) -> Result<(), Failure> {
        self.send_patiently(Event::Watch { stream, request }).await
    }

    /// Tells that the task of a stream is gone. Where the queue is full, the hub finds out by itself.
    pub(crate) fn close_watch(&self, stream: StreamId) {
        let _ = self.events.try_send(Event::Watch { stream, request: WatchRequest::Close });
    }

    /// For followers: see `follow.rs`.
    pub(crate) async fn follow(&self, visit: Visit) -> Result<(), Failure> {
        self.send_patiently(Event::Follow(visit)).await
    }

    /// At most about a second old.
    pub(crate) fn figures(&self) -> Figures {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends watches and pipelines, so that a front that drains does not wait for them.
    pub(crate) async fn end_streams(&self) {
        let _ = self.send_patiently(Event::EndStreams).await;
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// Where the answer of a ticket goes.
enum Waiter {
    Write(oneshot::Sender<WriteReply>),
    Pipe {
        pipe: u64,
        item: PipeItem,
    },
    Renew {
        batch: u64,
        place: usize,
    },
    Barrier(Vec<Read>),
    /// Tells that this member answers reads.
    Ready(oneshot::Sender<()>),
}

/// Renewals of one request are answered together.
struct RenewBatch {
    answers: Vec<Option<RenewReply>>,
    left: usize,
    failed: Option<Failure>,
    reply: RenewTo,
}

enum RenewTo {
    Caller(oneshot::Sender<RenewReplies>),
    Pipe { pipe: u64, item: PipeItem },
}

/// Ticket numbers are a counter: multiplying spreads them well enough.
#[derive(Default)]
struct TicketHasher(u64);

impl Hasher for TicketHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte) ^ self.0);
        }
    }

    fn write_u64(&mut self, n: u64) {
        self.0 = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }
}

type Numbered<T> = HashMap<u64, T, BuildHasherDefault<TicketHasher>>;

/// A long read under way.
struct LongRead {
    request: SliceRequest,
    at: Revision,
    current: Revision,
    after: Option<Key>,
    /// A finished piece that the reader has no room for yet.
    waiting: Option<Slice>,
}

/// A range without a limit, gathered in slices and answered whole.
struct LongRange {
    range: Range,
    reply: oneshot::Sender<ReadReply<RangeReply>>,
    at: Revision,
    current: Revision,
    after: Option<Key>,
    records: Vec<Record>,
}

/// How the driver ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// It was asked to.
    Stopped,
    /// It must not go on. The text names what and where.
    Fault(String),
}

/// The running driver.
pub(crate) struct Driver {
    pub(crate) handle: Handle,
    /// The driver's and the worker's: both hold the folder open.
    threads: Mutex<Vec<JoinHandle<()>>>,
    ending: tokio::sync::watch::Receiver<Option<Ending>>,
}

/// The way to other members: whom there is to talk to, and the connections once there are some.
pub(crate) struct PeerDoor {
    pub(crate) peers: Arc<OnceLock<Peers>>,
    pub(crate) wanted: tokio::sync::watch::Sender<Vec<(MemberId, String, String)>>,
}

impl PeerDoor {
    /// What cannot be sent is lost, as messages may be.
    fn send(&self, to: MemberId, lane: Lane, message: Vec<u8>) {
        if let Some(peers) = self.peers.get() {
            peers.send(to, lane, message);
        }
    }
}

pub(crate) struct DriverConfig {
    /// Watch answers of at least this size are cut where the watcher allows it.
    pub(crate) fragment_bytes: usize,
    pub(crate) watch_progress_ms: u64,
}

impl Driver {
    /// Starts the threads. `ready` is told once the member answers linearizable reads.
    pub(crate) fn start(
        member: Member<FsDisk>,
        disk: FsDisk,
        config: DriverConfig,
        door: PeerDoor,
        ready: oneshot::Sender<()>,
    ) -> std::io::Result<Self> {
        let (events, queue) = turns::turns(QUEUE_MAX);
        let handle = Handle {
            events: events.clone(),
            identity: Arc::new(Identity::new(member.status().member.0)),
            facts: Arc::default(),
            watch_facts: Arc::default(),
            published: Arc::default(),
            syncs: disk.syncs(),
            figures: Arc::default(),
            stopping: Arc::default(),
        };
        let (jobs, job_queue) = std::sync::mpsc::channel::<Job>();
        let worker_events = events;
        let worker = std::thread::Builder::new()
            .name("worker".to_owned())
            .spawn(move || work(disk, &job_queue, &worker_events))?;
        let (mailbox, mail) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(deliver_mail(mail));
        let (ending_to, ending) = tokio::sync::watch::channel(None);
        let own = handle.clone();
        let thread = std::thread::Builder::new().name("driver".to_owned()).spawn(move || {
            let ending = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let (ended, queue) = queue.run(Loop::new(member, &config, &own, jobs, mailbox, door, ready));
                ended.end(&queue)
            }))
            .unwrap_or_else(|_| {
                Ending::Fault("the driver broke one of its own rules; see the message above".to_owned())
            });
            own.stopping.store(true, Ordering::Release);
            let _ = ending_to.send(Some(ending));
        })?;
        Ok(Self { handle, threads: Mutex::new(vec![thread, worker]), ending })
    }

    /// Ends when the driver has.
    pub(crate) async fn ended(&self) -> Ending {
        let mut ending = self.ending.clone();
        match ending.wait_for(Option::is_some).await {
            Ok(ending) => ending.clone().unwrap_or(Ending::Stopped),
            Err(_) => Ending::Fault("the driver is gone".to_owned()),
        }
    }

    /// A leader hands over and waits until another leads; everybody is served meanwhile.
    pub(crate) async fn begin_stop(&self) {
        let limit = tokio::time::Instant::now() + Duration::from_millis(HAND_OVER_MS);
        let leads = |view: &View<'_>| view.member.is_leader();
        if self.handle.query(true, leads).await != Ok(true) || self.handle.hand_over(None).await.is_err() {
            return;
        }
        while tokio::time::Instant::now() < limit && self.handle.query(true, leads).await == Ok(true) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Asks the driver to end, and waits for it and for the job under way, so that the folder is free.
    pub(crate) async fn stop(&self) -> Ending {
        self.handle.stopping.store(true, Ordering::Release);
        let _ = self.handle.send_patiently(Event::Stop).await;
        let ending = self.ended().await;
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            let _ = thread.join();
        }
        ending
    }
}

/// Runs the jobs that would make the driver wait for the disk.
fn work(mut disk: FsDisk, jobs: &Receiver<Job>, events: &Events<Loop>) {
    for job in jobs {
        let done = run_job(&mut disk, job);
        if events.send(Event::JobDone(done)).is_err() {
            return;
        }
    }
}

async fn deliver_mail(mut mail: tokio::sync::mpsc::UnboundedReceiver<Mail>) {
    while let Some(mail) = mail.recv().await {
        mail.hand_out();
    }
}

/// Whether two alarms are one that goes on: how much is free changes all the time.
fn is_same(one: &Alarm, other: &Alarm) -> bool {
    match (one, other) {
        (Alarm::DiskFull { .. }, Alarm::DiskFull { .. }) => true,
        (Alarm::ClockSkew { member: one, .. }, Alarm::ClockSkew { member: other, .. }) => one == other,
        _ => one == other,
    }
}

/// Milliseconds of a clock that never goes back and stands still while the machine is suspended.
pub(crate) fn now() -> Millis {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Millis(time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000)
}

/// Unix time, for people and warnings.
fn wall_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

pub(crate) struct Loop {
    member: Member<FsDisk>,
    door: PeerDoor,
    /// The version of the list of peers that the door has.
    peers_version: Option<u64>,
    /// Everything up to here was handed to watchers.
    published: Revision,
    /// Who leads, and the term, as it was logged last.
    followed: (Option<MemberId>, u64),
    hub: Hub,
    followers: Followers,
    pipes: Pipes,
    waiters: Numbered<Waiter>,
    renewals: Numbered<RenewBatch>,
    next_renewal: u64,
    /// Reads of this round, to be run behind one barrier.
    reads: Vec<Read>,
    long_reads: VecDeque<LongRead>,
    long_ranges: VecDeque<LongRange>,
    identity: Arc<Identity>,
    facts: Arc<DriverFacts>,
    jobs: std::sync::mpsc::Sender<Job>,
    mailbox: tokio::sync::mpsc::UnboundedSender<Mail>,
    mail: Mail,
    effects: Effects,
    /// To be told once this member answers reads; empty while one is asked for.
    ready: Option<oneshot::Sender<()>>,
    figures: Arc<Mutex<Figures>>,
    figures_at: u64,
    /// The alarms that the log of the process has already.
    logged: Vec<Alarm>,
    stopping: bool,
    fault: Option<String>,
}

impl Core for Loop {
    type Event = Event;

    fn turn(&mut self, events: impl Iterator<Item = Event>) -> Turn {
        let mut requests = 0;
        for event in events {
            requests += event.requests();
            self.take(event);
        }
        let next = match self.round() {
            Ok(_) if self.stopping => Next::End,
            Ok(wait) => Next::Within(wait),
            Err(fault) => {
                self.fault = Some(fault);
                Next::End
            }
        };
        // Messages to other members leave by the threads that callers come from: they must be free while this member syncs.
        Turn { requests, lends: self.member.reads_now(), next }
    }
}

impl Loop {
    fn new(
        member: Member<FsDisk>,
        config: &DriverConfig,
        handle: &Handle,
        jobs: std::sync::mpsc::Sender<Job>,
        mailbox: tokio::sync::mpsc::UnboundedSender<Mail>,
        door: PeerDoor,
        ready: oneshot::Sender<()>,
    ) -> Self {
        let hub = Hub::new(
            handle.identity.clone(),
            handle.watch_facts.clone(),
            config.fragment_bytes,
            config.watch_progress_ms,
        );
        let revision = member.machine().revision();
        Self {
            published: revision,
            member,
            door,
            peers_version: None,
            followed: (None, 0),
            hub,
            followers: Followers::new(handle.published.clone(), revision),
            pipes: Pipes::default(),
            waiters: Numbered::default(),
            renewals: Numbered::default(),
            next_renewal: 0,
            reads: Vec::new(),
            long_reads: VecDeque::new(),
            long_ranges: VecDeque::new(),
            identity: handle.identity.clone(),
            facts: handle.facts.clone(),
            jobs,
            mailbox,
            mail: Mail::default(),
            effects: Effects::default(),
            ready: Some(ready),
            figures: handle.figures.clone(),
            figures_at: 0,
            logged: Vec::new(),
            stopping: false,
            fault: None,
        }
    }

    /// After the last turn.
    fn end(mut self, queue: &Queue<Self>) -> Ending {
        if let Some(fault) = self.fault.take() {
            tracing::error!(%fault, "the member stops");
            self.give_up();
            return Ending::Fault(fault);
        }
        self.refuse_queue(queue);
        self.stop()
    }

    /// One round: propose, persist, apply, tell. Returns how long there is nothing to do.
    fn round(&mut self) -> Result<Duration, String> {
        self.ask_ready();
        self.barrier();
        let time = now();
        let mut effects = std::mem::take(&mut self.effects);
        // Messages leave while the member works: those of a leader before its own sync.
        let Self { member, door, .. } = self;
        let heard = member.hear(time, &mut effects, &mut |to, lane, bytes| door.send(to, lane, bytes));
        let heard = heard.map_err(|fault| fault.to_string())?;
        self.tell(&mut effects);
        let Self { member, door, .. } = self;
        let done = member.work(heard, &mut effects, &mut |to, lane, bytes| door.send(to, lane, bytes));
        done.map_err(|fault| fault.to_string())?;
        self.tell(&mut effects);
        self.tell_door();
        self.log_leader();
        for job in effects.jobs.drain(..) {
            // The worker ends only after this thread.
            let _ = self.jobs.send(job);
        }
        let wake_at = effects.wake_at;
        self.effects = effects;
        let busy = self.slices(time);
        self.hand_over();
        // A member that has just begun to serve is asked for its first read at once, not when the next timer comes.
        let may_be_ready = self.ready.is_some() && self.member.is_leader();
        if busy || may_be_ready {
            return Ok(Duration::ZERO);
        }
        let until = wake_at.map_or(IDLE_MS, |at| at.0.saturating_sub(now().0)).min(IDLE_MS);
        Ok(Duration::from_millis(until))
    }

    fn tell(&mut self, effects: &mut Effects) {
        self.learn_identity();
        // D1: watchers first.
        self.publish(effects);
        for (ticket, answer) in effects.answers.drain(..) {
            self.answer(ticket, answer);
        }
    }

    fn publish(&mut self, effects: &mut Effects) {
        self.hub.publish(&effects.changes);
        let mut replaced = None;
        if std::mem::take(&mut effects.restored) {
            // Changes of this poll may be from before the snapshot.
            let last = effects.changes.last().map_or(self.published, |c| c.record.meta().mod_revision);
            let published = self.published.max(last);
            self.hub.restored(published);
            replaced = Some(published);
        }
        self.followers.publish(&effects.changes, replaced, self.member.machine());
        self.published = self.member.machine().revision();
        effects.changes.clear();
    }

    fn log_leader(&mut self) {
        let now = self.member.leader();
        if now == self.followed {
            return;
        }
        self.followed = now;
        match now {
            (Some(leader), term) => {
                let said = match self.member.peers().into_iter().find(|(id, ..)| *id == leader) {
                    Some((_, name, _)) => format!("member {name} leads"),
                    None => "this member leads".to_owned(),
                };
                tracing::info!(term, "{said}");
            }
            (None, term) => tracing::info!(term, "nobody leads"),
        }
    }

    /// Tells the door whom to connect to, when that has changed.
    fn tell_door(&mut self) {
        let version = self.member.peers_version();
        if self.peers_version != Some(version) {
            self.peers_version = Some(version);
            self.door.wanted.send_replace(self.member.peers());
        }
    }

    fn peer_event(&mut self, event: PeerEvent) {
        match event {
            PeerEvent::OwnHello { reply } => {
                let _ = reply.send(self.member.hello(wall_ms()));
            }
            PeerEvent::Greeting { hello, lane, reply } => {
                let wall = wall_ms();
                tracing::debug!(member = hello.name, ?lane, "a member says hello");
                let judged = self.member.greet(&hello, wall).map(|()| self.member.hello(wall));
                if let Err(refusal) = &judged {
                    // The alarm tells it once; it is tried again all the time.
                    tracing::debug!(member = hello.name, "a member was refused: {refusal}");
                }
                let _ = reply.send(judged);
            }
            PeerEvent::Closed { member, boot, left } => {
                tracing::debug!(%member, left, "a connection with a member has closed");
                if left == 0 {
                    self.member.hung_up(member, boot);
                }
            }
            PeerEvent::Refused { by, refusal } => {
                tracing::debug!(%by, "refused by a member: {refusal}");
                self.member.turned_away(by, &refusal);
            }
            PeerEvent::Frames { from, boot, lane, frames, credit } => {
                tracing::trace!(%from, boot, ?lane, count = frames.len(), "messages");
                for frame in &frames {
                    self.member.receive(from, frame);
                }
                drop(credit);
            }
        }
    }

    /// The server is ready once one linearizable read has come through: an entry of the member's own term is applied then.
    fn ask_ready(&mut self) {
        let Some(reply) = self.ready.take() else { return };
        match self.member.read() {
            Ok(ticket) => drop(self.waiters.insert(ticket.number, Waiter::Ready(reply))),
            Err(_) => self.ready = Some(reply),
        }
    }

    /// What headers say. The term of a member that serves is that of its newest entry.
    fn learn_identity(&mut self) {
        let machine = self.member.machine();
        self.identity.advance(
            machine.cluster(),
            machine.behaviour(),
            machine.position().term.0,
            machine.stamp(),
            self.member.contact_at(),
        );
    }

    /// Everything that is done in small pieces; true while there is more to do at once.
    fn slices(&mut self, time: Millis) -> bool {
        let mut busy = self.hub.catch_up(self.member.machine());
        self.hub.tick(time.0, self.member.machine());
        self.followers.tick(time.0);
        busy |= self.followers.serve(self.member.machine());
        busy |= self.long_range_slice();
        busy |= self.long_read_slice();
        if time.0 >= self.figures_at {
            self.figures_at = time.0 + 1000;
            self.pipes.sweep();
            self.tell_figures();
        }
        busy
    }

    /// What a start has found and what comes up later is logged once, and its end too.
    fn log_alarms(&mut self, alarms: &[Alarm]) {
        for alarm in alarms.iter().filter(|alarm| !self.logged.iter().any(|known| is_same(known, alarm))) {
            tracing::warn!("{alarm}");
        }
        for known in self.logged.iter().filter(|known| !alarms.iter().any(|alarm| is_same(known, alarm))) {
            tracing::info!("over: {known}");
        }
        self.logged = alarms.to_vec();
    }

    fn tell_figures(&mut self) {
        let status = self.member.status();
        self.log_alarms(&status.alarms);
        let machine = self.member.machine();
        let figures = Figures {
            status: Some(status),
            counts: machine.counts(),
            lock_counts: machine.lock_counts(),
            jobs: machine.job_counts(),
            tallies: machine.tallies().clone(),
            memory: machine.memory(),
            revision: machine.revision().0,
            compacted: machine.compacted().0,
            failed: self.facts.failed.load(Ordering::Relaxed),
        };
        *self.figures.lock().unwrap_or_else(PoisonError::into_inner) = figures;
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Write { txn, reply } => match self.submit(txn) {
                Ok(ticket) => {
                    self.waiters.insert(ticket.number, Waiter::Write(reply));
                }
                Err(failure) => self.mail.deliveries.push(Delivery::Write(reply, Err(failure))),
            },
            Event::Read { read, serializable: true } => self.run_read(read),
            Event::Read { read, serializable: false } => self.reads.push(read),
            Event::Renew { sessions, reply } => self.renew(&sessions, RenewTo::Caller(reply)),
            Event::PipeOpen { out, reply } => {
                let _ = reply.send(self.pipes.open(out));
            }
            Event::Pipe { pipe, requests } => requests.into_iter().for_each(|request| self.pipe_request(pipe, request)),
            Event::PipeClose { pipe } => self.pipes.close(pipe),
            Event::WatchOpen { out, reply } => {
                let _ = reply.send(self.hub.open(out, now().0));
            }
            Event::Watch { stream, request } => match request {
                WatchRequest::Create(create) => self.hub.create(stream, &create, self.member.machine()),
                WatchRequest::Cancel(id) => self.hub.cancel(stream, id, self.member.machine()),
                WatchRequest::Progress => self.hub.progress(stream, self.member.machine()),
                WatchRequest::Drained => self.hub.drained(stream),
                WatchRequest::Close => self.hub.close(stream),
            },
            Event::Follow(visit) => self.followers.visit(visit),
            Event::JobDone(done) => self.member.job_done(done),
            Event::Peer(event) => self.peer_event(event),
            Event::HandOver { to, reply } => {
                let _ = reply.send(self.member.hand_over(to).map_err(Failure::Refused));
            }
            Event::WantSnapshot { reply } => {
                let _ = reply.send(self.member.want_snapshot());
            }
            Event::Nudge => {}
            Event::EndStreams => {
                self.hub.end_all();
                self.followers.end_all();
                self.pipes.end_all();
            }
            Event::Stop => self.stopping = true,
        }
    }

    fn submit(&mut self, txn: Txn) -> Result<Ticket, Failure> {
        if let [tenure_machine::Op::Compact { .. }] = txn.then[..] {
            self.followers.remind();
        }
        self.member.submit(txn).map_err(|refusal| {
            self.facts.failed.fetch_add(1, Ordering::Relaxed);
            Failure::Refused(refusal)
        })
    }

    fn renew(&mut self, sessions: &[SessionRef], to: RenewTo) {
        self.next_renewal += 1;
        let number = self.next_renewal;
        let batch = RenewBatch { answers: vec![None; sessions.len()], left: sessions.len(), failed: None, reply: to };
        if batch.left == 0 {
            return self.finish_renewals(batch);
        }
        self.renewals.insert(number, batch);
        for (place, &(session, token)) in sessions.iter().enumerate() {
            let ticket = self.member.renew(session, token);
            self.waiters.insert(ticket.number, Waiter::Renew { batch: number, place });
        }
    }

    fn finish_renewals(&mut self, batch: RenewBatch) {
        let answer = match batch.failed {
            Some(failure) => Err(failure),
            None => Ok((batch.answers.into_iter().flatten().collect(), self.member.machine().revision())),
        };
        match batch.reply {
            RenewTo::Caller(reply) => self.mail.deliveries.push(Delivery::Renew(reply, answer)),
            RenewTo::Pipe { pipe, item } => self.pipes.done(pipe, item, Outcome::Renew(answer)),
        }
    }

    fn pipe_request(&mut self, pipe: u64, request: PipeRequest) {
        match request {
            PipeRequest::Write { txn, item } => match self.submit(txn) {
                Ok(ticket) => {
                    self.waiters.insert(ticket.number, Waiter::Pipe { pipe, item });
                }
                Err(failure) => self.pipes.done(pipe, item, Outcome::Write(Err(failure))),
            },
            PipeRequest::Read { read, stale: true, item } => self.run_read(Read::Pipe { read, pipe, item }),
            PipeRequest::Read { read, stale: false, item } => self.reads.push(Read::Pipe { read, pipe, item }),
            PipeRequest::Renew { sessions, item } => self.renew(&sessions, RenewTo::Pipe { pipe, item }),
        }
    }

    /// Puts the reads of this round behind one read-index round.
    fn barrier(&mut self) {
        if self.reads.is_empty() {
            return;
        }
        let reads = std::mem::take(&mut self.reads);
        if self.member.reads_now() {
            // A leader alone decides alone: its reads need not wait for the writes beside them.
            return reads.into_iter().for_each(|read| self.run_read(read));
        }
        match self.member.read() {
            Ok(ticket) => {
                self.waiters.insert(ticket.number, Waiter::Barrier(reads));
            }
            Err(refusal) => reads.into_iter().for_each(|read| self.fail_read(read, &Failure::Refused(refusal.clone()))),
        }
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) {
        let Some(waiter) = self.waiters.remove(&ticket.number) else { return };
        match waiter {
            Waiter::Write(reply) => {
                let answer = self.written(answer);
                self.mail.deliveries.push(Delivery::Write(reply, answer));
            }
            Waiter::Pipe { pipe, item } => {
                let answer = self.written(answer);
                self.pipes.done(pipe, item, Outcome::Write(answer));
            }
            Waiter::Renew { batch, place } => self.renewed(batch, place, answer),
            Waiter::Barrier(reads) => match answer {
                Answer::ReadReady => reads.into_iter().for_each(|read| self.run_read(read)),
                Answer::Refused(refusal) => {
                    reads.into_iter().for_each(|read| self.fail_read(read, &Failure::Refused(refusal.clone())));
                }
                _ => reads.into_iter().for_each(|read| self.fail_read(read, &Failure::Unknown)),
            },
            Waiter::Ready(reply) => match answer {
                Answer::ReadReady => drop(reply.send(())),
                // Nobody leads yet: it is asked again.
                _ => self.ready = Some(reply),
            },
        }
    }

    fn written(&self, answer: Answer) -> WriteReply {
        match answer {
            Answer::Done(reply) => {
                let held = reply.result.as_ref().ok().and_then(|result| match result.results.first() {
                    Some(OpReply::LockGranted(grant)) => Some(grant.session),
                    Some(OpReply::Native(reply)) => match &**reply {
                        NativeReply::Lock(LockReply::Granted(grant)) => Some(grant.session),
                        other => other.session(),
                    },
                    Some(OpReply::SessionCreated { id, .. }) => Some(*id),
                    _ => None,
                });
                let remaining_ms = held.and_then(|session| self.member.remaining_ms(session, now())).unwrap_or(0);
                Ok(Written { reply, remaining_ms })
            }
            Answer::Refused(refusal) => Err(Failure::Refused(refusal)),
            // The others answer no write.
            _ => Err(Failure::Unknown),
        }
    }

    fn renewed(&mut self, number: u64, place: usize, answer: Answer) {
        let Some(batch) = self.renewals.get_mut(&number) else { return };
        match answer {
            Answer::Renewed(renewal) => {
                let machine = self.member.machine();
                let yields = |session| machine.elections_to_yield(NamespaceId::DEFAULT, session);
                let renewed = renewal.map(|renewal| Renewed { yields: yields(renewal.session), renewal });
                batch.answers[place] = Some(renewed);
            }
            Answer::Refused(refusal) => batch.failed = Some(Failure::Refused(refusal)),
            _ => batch.failed = Some(Failure::Unknown),
        }
        batch.left -= 1;
        if batch.left == 0
            && let Some(batch) = self.renewals.remove(&number)
        {
            self.finish_renewals(batch);
        }
    }

    /// Runs a read at the current state: what is applied now is at least what was committed when its barrier began.
    fn run_read(&mut self, read: Read) {
        let machine = self.member.machine();
        let revision = machine.revision();
        match read {
            Read::Range(range, reply) => {
                if is_long(&range) {
                    return self.begin_long_range(range, reply);
                }
                let answer = Ok((machine.range(&range), revision));
                self.mail.deliveries.push(Delivery::Range(reply, answer));
            }
            Read::Txn(txn, reply) => {
                let answer = Ok((machine.read_txn(&txn), revision));
                self.mail.deliveries.push(Delivery::Txn(reply, answer));
            }
            Read::Native(read, reply) => {
                let answer = Ok((read.run(machine), revision));
                self.mail.deliveries.push(Delivery::Native(reply, answer));
            }
            Read::Pipe { read, pipe, item } => {
                let answer = Ok((read.run(machine), revision));
                self.pipes.done(pipe, item, Outcome::Read(answer));
            }
            Read::Query(query) => {
                query(Ok(&View { machine, member: &self.member, identity: &self.identity, now: now() }))
            }
            Read::Slices(request) => self.begin_long_read(request),
        }
    }

    fn fail_read(&mut self, read: Read, failure: &Failure) {
        let failure = failure.clone();
        match read {
            Read::Range(_, reply) => self.mail.deliveries.push(Delivery::Range(reply, Err(failure))),
            Read::Txn(_, reply) => self.mail.deliveries.push(Delivery::Txn(reply, Err(failure))),
            Read::Native(_, reply) => self.mail.deliveries.push(Delivery::Native(reply, Err(failure))),
            Read::Pipe { pipe, item, .. } => self.pipes.done(pipe, item, Outcome::Read(Err(failure))),
            Read::Query(query) => query(Err(failure)),
            // Its channel closes without a last piece, which the reader takes for this.
            Read::Slices(_) => {}
        }
    }

    /// A range that may return very much is gathered in slices at one revision.
    fn begin_long_range(&mut self, range: Range, reply: oneshot::Sender<ReadReply<RangeReply>>) {
        let machine = self.member.machine();
        let current = machine.revision();
        match pin(machine, range.revision) {
            Ok(at) => {
                let long = LongRange { range, reply, at, current, after: None, records: Vec::new() };
                self.long_ranges.push_front(long);
                // Most are short: the first slice is taken at once.
                self.long_range_slice();
            }
            Err(rejection) => self.mail.deliveries.push(Delivery::Range(reply, Ok((Err(rejection), current)))),
        }
    }

    /// One slice of one long range; true while another is waiting.
    fn long_range_slice(&mut self) -> bool {
        let Some(mut long) = self.long_ranges.pop_front() else { return false };
        let machine = self.member.machine();
        if long.reply.is_closed() {
            return !self.long_ranges.is_empty();
        }
        if long.at < machine.compacted() {
            // What it reads is being compacted: a fixed revision is gone, the newest is read again in one go.
            let answer = Ok((machine.range(&long.range), machine.revision()));
            self.mail.deliveries.push(Delivery::Range(long.reply, answer));
            return !self.long_ranges.is_empty();
        }
        let (mut records, resume) = machine.range_slice(&long.range.span, long.at, long.after.as_ref(), SLICE_RECORDS);
        if long.records.is_empty() {
            long.records = records;
        } else {
            long.records.append(&mut records);
        }
        if resume.is_some() {
            long.after = resume;
            self.long_ranges.push_back(long);
            return true;
        }
        let count = long.records.len() as u64;
        let limit = if long.range.limit > 0 { long.range.limit as usize } else { usize::MAX };
        let more = long.records.len() > limit;
        long.records.truncate(limit);
        let reply = RangeReply { records: long.records, count, more, keys_only: long.range.keys_only };
        self.mail.deliveries.push(Delivery::Range(long.reply, Ok((Ok(reply), long.current))));
        !self.long_ranges.is_empty()
    }

    fn begin_long_read(&mut self, request: SliceRequest) {
        let machine = self.member.machine();
        let current = machine.revision();
        match pin(machine, request.revision) {
            Ok(at) => self.long_reads.push_back(LongRead { request, at, current, after: None, waiting: None }),
            Err(rejection) => {
                // A new channel has room.
                let _ = request.pieces.try_send(Err(rejection));
            }
        }
    }

    /// One piece of one long read; true while one can go on at once.
    fn long_read_slice(&mut self) -> bool {
        let Some(mut long) = self.long_reads.pop_front() else { return false };
        let machine = self.member.machine();
        let piece = match long.waiting.take() {
            Some(piece) => Ok(piece),
            None if long.at < machine.compacted() => Err(Rejection::Compacted { lowest: machine.compacted() }),
            None => {
                let (records, resume) =
                    machine.range_slice(&long.request.span, long.at, long.after.as_ref(), SLICE_RECORDS);
                let is_last = resume.is_none();
                long.after = resume;
                Ok(Slice { records, revision: long.at, current: long.current, is_last })
            }
        };
        let is_over = piece.as_ref().map_or(true, |piece| piece.is_last);
        match long.request.pieces.try_send(piece) {
            Ok(()) if is_over => {}
            Ok(()) => self.long_reads.push_back(long),
            Err(tokio::sync::mpsc::error::TrySendError::Full(Ok(piece))) => {
                // Its reader is slow; it is looked at again in the next round, which need not be now.
                long.waiting = Some(piece);
                self.long_reads.push_back(long);
                return self.long_reads.len() > 1;
            }
            Err(_) => {}
        }
        !self.long_reads.is_empty()
    }

    /// Hands over what the round has made: streams are filled first, then everybody is woken by one task.
    fn hand_over(&mut self) {
        self.hub.flush(&mut self.mail.wakes);
        self.followers.flush(&mut self.mail.wakes);
        self.pipes.flush(&mut self.mail.wakes);
        if self.mail.deliveries.is_empty() && self.mail.wakes.is_empty() {
            return;
        }
        let mail = std::mem::take(&mut self.mail);
        if mail.wakes.len() + mail.deliveries.len() == 1 {
            // A lone caller is spared the detour.
            mail.hand_out();
        } else {
            let _ = self.mailbox.send(mail);
        }
    }

    /// Ends well: what was proposed and not answered is unknown to its callers.
    fn stop(mut self) -> Ending {
        let mut effects = std::mem::take(&mut self.effects);
        let door = &self.door;
        let stopped = self.member.stop(now(), &mut effects, &mut |to, lane, bytes| door.send(to, lane, bytes));
        self.publish(&mut effects);
        for (ticket, answer) in effects.answers {
            self.answer(ticket, answer);
        }
        self.give_up();
        match stopped {
            Ok(()) => Ending::Stopped,
            Err(fault) => Ending::Fault(fault.to_string()),
        }
    }

    /// Tells everybody who waits that there will be no answer.
    fn give_up(&mut self) {
        let waiters = std::mem::take(&mut self.waiters);
        for waiter in waiters.into_values() {
            match waiter {
                Waiter::Write(reply) => self.mail.deliveries.push(Delivery::Write(reply, Err(Failure::Unknown))),
                Waiter::Pipe { pipe, item } => self.pipes.done(pipe, item, Outcome::Write(Err(Failure::Unknown))),
                Waiter::Renew { batch, place } => self.renewed(batch, place, Answer::Unknown),
                Waiter::Barrier(reads) => reads.into_iter().for_each(|read| self.fail_read(read, &Failure::Stopping)),
                // Whoever waits for it hears that it is gone.
                Waiter::Ready(_) => {}
            }
        }
        let reads = std::mem::take(&mut self.reads);
        reads.into_iter().for_each(|read| self.fail_read(read, &Failure::Stopping));
        for long in std::mem::take(&mut self.long_ranges) {
            self.mail.deliveries.push(Delivery::Range(long.reply, Err(Failure::Stopping)));
        }
        self.pipes.end_all();
        self.hub.end_all();
        self.hand_over();
    }

    /// Refuses what arrived too late.
    fn refuse_queue(&mut self, queue: &Queue<Self>) {
        for event in queue.ready() {
            match event {
                Event::Write { reply, .. } => self.mail.deliveries.push(Delivery::Write(reply, Err(Failure::Stopping))),
                Event::Read { read, .. } => self.fail_read(read, &Failure::Stopping),
                Event::Renew { reply, .. } => self.mail.deliveries.push(Delivery::Renew(reply, Err(Failure::Stopping))),
                Event::Pipe { pipe, requests } => {
                    requests.into_iter().for_each(|request| self.refuse_pipe(pipe, request))
                }
                _ => {}
            }
        }
    }

    fn refuse_pipe(&mut self, pipe: u64, request: PipeRequest) {
        match request {
            PipeRequest::Write { item, .. } => self.pipes.done(pipe, item, Outcome::Write(Err(Failure::Stopping))),
            PipeRequest::Read { item, .. } => self.pipes.done(pipe, item, Outcome::Read(Err(Failure::Stopping))),
            PipeRequest::Renew { item, .. } => self.pipes.done(pipe, item, Outcome::Renew(Err(Failure::Stopping))),
        }
    }
}

/// Ranges in key order that may return more than a slice. The others are cut short by their limit, or need the whole range at once.
fn is_long(range: &Range) -> bool {
    let unfiltered = range.min_mod_revision == 0
        && range.max_mod_revision == 0
        && range.min_create_revision == 0
        && range.max_create_revision == 0;
    let in_key_order = match range.order {
        tenure_machine::Order::None => range.sort_by == tenure_machine::SortBy::Key,
        tenure_machine::Order::Ascending => range.sort_by == tenure_machine::SortBy::Key,
        tenure_machine::Order::Descending => false,
    };
    let unlimited = range.limit <= 0 || range.limit as u64 > SLICE_RECORDS as u64;
    range.span.end.is_some() && !range.count_only && unlimited && in_key_order && unfiltered
}

/// The revision to read at: the newest, or the one asked for where it can be read.
fn pin(machine: &Machine, revision: i64) -> Result<Revision, Rejection> {
    let current = machine.revision();
    if revision <= 0 {
        return Ok(current);
    }
    let at = Revision(revision as u64);
    if at > current {
        return Err(Rejection::FutureRevision { current });
    }
    if at < machine.compacted() {
        return Err(Rejection::Compacted { lowest: machine.compacted() });
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_is_an_answer() {
        let (handle, queue) = Handle::unserved(1);
        assert_eq!(handle.send(Event::Nudge), Ok(()));
        assert_eq!(handle.write(Txn::default()).await.err(), Some(Failure::Overloaded));
        assert_eq!(handle.query(true, |_| ()).await, Err(Failure::Overloaded));
        assert_eq!(handle.facts.overloaded.load(Ordering::Relaxed), 2);
        drop(queue);
        assert_eq!(handle.write(Txn::default()).await.err(), Some(Failure::Stopping));
    }

    /// A caller whose request was taken and dropped with the driver must not believe that nothing happened.
    #[tokio::test]
    async fn a_lost_answer_is_unknown() {
        let (handle, queue) = Handle::unserved(8);
        let caller = tokio::spawn(async move { handle.write(Txn::default()).await.err() });
        while queue.ready().next().is_none() {
            tokio::task::yield_now().await;
        }
        drop(queue);
        assert_eq!(caller.await.unwrap(), Some(Failure::Unknown));
    }

    /// While nobody leads, the read that shows that a member is ready is refused; it is asked for again.
    #[test]
    fn a_member_gets_ready_after_a_refusal() {
        let folder = tempfile::tempdir().unwrap();
        let config = crate::Config { data_dir: folder.path().to_owned(), ..crate::Config::default() };
        let mut disk = FsDisk::open(&config.data_dir, config.fsync).unwrap();
        let own = crate::member_config(&config, &mut disk, ([127, 0, 0, 1], 1).into()).unwrap();
        let member = Member::open(disk.clone(), own, now()).unwrap();
        let (handle, _queue) = Handle::unserved(8);
        let (jobs, job_queue) = std::sync::mpsc::channel();
        let (mailbox, _mail) = tokio::sync::mpsc::unbounded_channel();
        let (ready, mut is_ready) = oneshot::channel();
        let door = PeerDoor { peers: Arc::default(), wanted: tokio::sync::watch::Sender::new(Vec::new()) };
        let driver = DriverConfig { fragment_bytes: 1 << 20, watch_progress_ms: 1_000 };
        let mut driver = Loop::new(member, &driver, &handle, jobs, mailbox, door, ready);
        let until = now().0 + 10_000;
        let mut round = |driver: &mut Loop| {
            assert!(now().0 < until, "it does not get ready");
            driver.round().unwrap();
            while let Ok(job) = job_queue.try_recv() {
                driver.take(Event::JobDone(run_job(&mut disk, job)));
            }
        };
        driver.ask_ready();
        while driver.waiters.is_empty() {
            round(&mut driver);
            driver.ask_ready();
        }
        let number = *driver.waiters.keys().next().unwrap();
        let ticket = Ticket { number, member: driver.member.status().member, boot: 0 };
        driver.answer(ticket, Answer::Refused(Refusal::NoQuorum));
        while let Err(error) = is_ready.try_recv() {
            assert_eq!(error, oneshot::error::TryRecvError::Empty, "nobody would tell any more");
            round(&mut driver);
        }
    }

    #[test]
    fn only_unbounded_ranges_in_key_order_are_sliced() {
        let key = |name: &[u8]| Key::new(tenure_machine::Space::Keys, tenure_machine::NamespaceId::DEFAULT, name);
        let all = Range::of(Span { start: key(b""), end: Some(key(b"z")) });
        assert!(is_long(&all));
        assert!(is_long(&Range { limit: 5_000, ..all.clone() }));
        assert!(!is_long(&Range { limit: 10, ..all.clone() }));
        assert!(!is_long(&Range { count_only: true, ..all.clone() }));
        assert!(!is_long(&Range { order: tenure_machine::Order::Descending, ..all.clone() }));
        assert!(!is_long(&Range { min_mod_revision: 3, ..all }));
        assert!(!is_long(&Range::of(Span::one(key(b"k")))));
    }
}
