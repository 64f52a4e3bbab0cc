//! The connections between members: frames over TCP, with mutual TLS if certificates are given.
//!
//! Each member dials every other, and what it dialled carries only its own frames; so a pair has two connections for messages. Pieces of
//! snapshots go over a third and a fourth, which are dialled when there is something to send and closed when they have been idle.
//!
//! Promises. T1: no frame is handed over before the owner has judged the hello of its sender, and none is sent before the owner has judged
//! the hello that came back. T2: frames of one connection are handed over in their order, whole, and each at most once. T3: `send` never
//! waits; a queue that is full drops the newest. T4: `Closed` is told for each message connection that ends, with how many are
//! left with that life of the peer; an end of the peer's process is told as soon as the system says it. `Closed` with none left is told
//! after the last judging of that life, never between a judging and its connection. T5: bulk waits behind bulk only, and for its owner:
//! each connection has an allowance of bytes that its owner has not yet dropped, and is not read beyond it.
//! Not promised. That a frame arrives, or that frames keep their order across a new connection. That a silent cut is noticed soon: the
//! member's heartbeats do that; here the system gives up after some seconds, so that a new connection is made once the network is back.
//! Without TLS nobody is authenticated: a hello is believed.

mod accept;
mod dial;
mod frame;
mod queue;
#[cfg(test)]
mod tests;
mod tls;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tenure_machine::MemberId;
use tenure_replica::{Hello, Lane, PeerRefusal};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinHandle;

use dial::Link;
use frame::FrameError;
pub(crate) use tls::PeerTls;
pub use tls::TlsFiles;

/// What the owner of the member is told and asked. An answer that is dropped ends the connection that waits for it.
pub(crate) enum PeerEvent {
    /// A connection is about to be dialled: what does this member say of itself?
    OwnHello { reply: oneshot::Sender<Hello> },
    /// A hello came, whoever dialled. The answer is this member's own, or why it does not talk to that one.
    Greeting { hello: Hello, lane: Lane, reply: oneshot::Sender<Result<Hello, PeerRefusal>> },
    /// A message connection has ended; `left` more are open with that life of the peer, in either direction.
    Closed { member: MemberId, boot: u64, left: usize },
    /// A peer did not take this member's hello, or the one that this member answered with.
    Refused { by: MemberId, refusal: PeerRefusal },
    /// What one read brought. The next read may wait until the credit is dropped.
    Frames { from: MemberId, boot: u64, lane: Lane, frames: Vec<Bytes>, credit: Credit },
}

/// A part of a connection's allowance. Dropped when its frames have been dealt with.
pub(crate) struct Credit {
    _permit: OwnedSemaphorePermit,
}

/// The connections to all peers. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Peers {
    shared: Arc<Shared>,
}

/// What can be said of the connections to one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LinkFacts {
    pub(crate) member: MemberId,
    pub(crate) name: String,
    pub(crate) address: String,
    /// This member's messages can leave.
    pub(crate) is_connected: bool,
    /// Why they cannot, in words; empty while they can.
    pub(crate) trouble: String,
    pub(crate) messages: LaneFacts,
    pub(crate) bulk: LaneFacts,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LaneFacts {
    /// Connections that were made, of those that this member dialled.
    pub(crate) connects: u64,
    pub(crate) sent_frames: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) received_frames: u64,
    pub(crate) received_bytes: u64,
    /// Because the queue was full.
    pub(crate) dropped_full: u64,
    /// Because there was no connection.
    pub(crate) dropped_down: u64,
    pub(crate) queued_bytes: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PeersFacts {
    pub(crate) links: Vec<LinkFacts>,
    /// Connections that others dialled and that are open.
    pub(crate) inbound: usize,
    /// Connections that were closed at once because there were too many.
    pub(crate) inbound_excess: u64,
    /// Frames to a member that is not known here.
    pub(crate) dropped_unknown: u64,
}

impl Peers {
    /// Listens, and dials nobody yet. `tell` is called from tasks of the runtime and under a lock: it must neither wait nor call back.
    pub(crate) fn start(
        listener: TcpListener,
        tls: Option<PeerTls>,
        tell: impl Fn(PeerEvent) + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(listener, tls, Limits::default(), tell)
    }

    fn start_with(
        listener: TcpListener,
        tls: Option<PeerTls>,
        limits: Limits,
        tell: impl Fn(PeerEvent) + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            tell: Box::new(tell),
            tls,
            inbound: Arc::new(Semaphore::new(limits.inbound_max)),
            limits,
            runtime: tokio::runtime::Handle::current(),
            links: Mutex::default(),
            lives: Mutex::default(),
            accepted: Mutex::default(),
            told: Mutex::default(),
            is_stopping: watch::Sender::new(false),
            accepting: Mutex::default(),
            inbound_excess: AtomicU64::new(0),
            dropped_unknown: AtomicU64::new(0),
        });
        let accepting = tokio::spawn(accept::run(shared.clone(), listener));
        *lock(&shared.accepting) = Some(accepting);
        Self { shared }
    }

    /// Whom to dial, from now on: id, name and `host:port`, without this member itself. Links that stay as they are are not touched;
    /// connections with members that are no longer named end.
    pub(crate) fn set_peers(&self, peers: Vec<(MemberId, String, String)>) {
        let shared = &self.shared;
        let mut links = lock(&shared.links);
        if *shared.is_stopping.borrow() {
            return;
        }
        let gone: Vec<MemberId> =
            links.keys().copied().filter(|member| !peers.iter().any(|(id, _, _)| id == member)).collect();
        for member in gone {
            links.remove(&member);
            lock(&shared.accepted).retain(|(id, _), _| *id != member);
        }
        for (member, name, address) in peers {
            if links.get(&member).is_some_and(|link| link.name == name && link.address == address) {
                continue;
            }
            // The old one ends with its tasks.
            links.insert(member, PeerLink::start(shared, member, name, address));
        }
    }

    /// Queues a message. False: it was dropped, because the queue is full, there is no connection, or nobody of that name is known.
    pub(crate) fn send(&self, to: MemberId, lane: Lane, message: Vec<u8>) -> bool {
        let links = lock(&self.shared.links);
        let Some(link) = links.get(&to).filter(|_| message.len() <= frame::BODY_MAX) else {
            self.shared.dropped_unknown.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        link.lane(lane).queue.push(message)
    }

    pub(crate) fn facts(&self) -> PeersFacts {
        let shared = &self.shared;
        PeersFacts {
            links: lock(&shared.links).iter().map(|(member, link)| link.facts(*member)).collect(),
            inbound: shared.limits.inbound_max - shared.inbound.available_permits(),
            inbound_excess: shared.inbound_excess.load(Ordering::Relaxed),
            dropped_unknown: shared.dropped_unknown.load(Ordering::Relaxed),
        }
    }

    /// Sends what waits, if that is quick, and closes everything.
    pub(crate) async fn stop(&self) {
        let shared = &self.shared;
        let deadline = Instant::now() + shared.limits.farewell;
        while lock(&shared.links).values().any(PeerLink::has_unsent) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // Under the lock, so that no link is made afterwards.
        let links = {
            let mut links = lock(&shared.links);
            shared.is_stopping.send_replace(true);
            std::mem::take(&mut *links)
        };
        for (_, mut link) in links {
            for task in &mut link.tasks {
                task.abort();
                // Only a cancelled or a panicked task says anything, and there is nothing left to do about either.
                let _ = task.await;
            }
        }
        let accepting = lock(&shared.accepting).take();
        if let Some(accepting) = accepting {
            let _ = accepting.await;
        }
    }
}

/// The two lanes to one peer, and the tasks that serve them.
struct PeerLink {
    name: String,
    address: String,
    messages: Arc<Link>,
    bulk: Arc<Link>,
    tasks: [JoinHandle<()>; 2],
}

impl PeerLink {
    fn start(shared: &Arc<Shared>, member: MemberId, name: String, address: String) -> Self {
        let link = |lane| Arc::new(Link::new(shared.clone(), lane, member, name.clone(), address.clone()));
        let (messages, bulk) = (link(Lane::Messages), link(Lane::Bulk));
        let tasks = [&messages, &bulk].map(|link| shared.runtime.spawn(dial::run(link.clone())));
        Self { name, address, messages, bulk, tasks }
    }

    fn lane(&self, lane: Lane) -> &Arc<Link> {
        match lane {
            Lane::Messages => &self.messages,
            Lane::Bulk => &self.bulk,
        }
    }

    /// There is a connection, and something that waits for it.
    fn has_unsent(&self) -> bool {
        self.messages.is_connected.load(Ordering::Relaxed) && self.messages.queue.bytes() > 0
    }

    fn facts(&self, member: MemberId) -> LinkFacts {
        LinkFacts {
            member,
            name: self.name.clone(),
            address: self.address.clone(),
            is_connected: self.messages.is_connected.load(Ordering::Relaxed),
            trouble: lock(&self.messages.trouble).clone(),
            messages: self.messages.facts(),
            bulk: self.bulk.facts(),
        }
    }
}

impl Drop for PeerLink {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Sizes and waits. Not settings: tests shorten them.
#[derive(Clone, Debug)]
struct Limits {
    inbound_max: usize,
    queue_bytes: usize,
    /// What the owner may hold of one connection.
    messages_window: usize,
    bulk_window: usize,
    connect: Duration,
    handshake: Duration,
    bulk_idle: Duration,
    backoff_min: Duration,
    backoff_max: Duration,
    farewell: Duration,
    /// The kernel gives a connection up when nothing was acknowledged for so long: with a longer one the retries after a cut are so
    /// far apart that the way back is slow.
    messages_unacknowledged: Duration,
    /// Bulk may wait for its reader.
    bulk_unacknowledged: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            inbound_max: 64,
            queue_bytes: 32 << 20,
            messages_window: 16 << 20,
            bulk_window: 4 << 20,
            connect: Duration::from_secs(1),
            handshake: Duration::from_secs(3),
            bulk_idle: Duration::from_secs(30),
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_secs(1),
            farewell: Duration::from_millis(200),
            messages_unacknowledged: Duration::from_secs(2),
            bulk_unacknowledged: Duration::from_secs(30),
        }
    }
}

struct Shared {
    tell: Box<dyn Fn(PeerEvent) + Send + Sync>,
    tls: Option<PeerTls>,
    limits: Limits,
    /// `set_peers` is called from a thread that is not the runtime's.
    runtime: tokio::runtime::Handle,
    links: Mutex<BTreeMap<MemberId, PeerLink>>,
    /// Message connections per life of a peer, with those that are being judged.
    lives: Mutex<BTreeMap<(MemberId, u64), Life>>,
    /// The accepted connection of each peer's lane. Who drops the sender ends it.
    accepted: Mutex<BTreeMap<(MemberId, Lane), Accepted>>,
    /// When which trouble of accepted connections was logged.
    told: Mutex<BTreeMap<(IpAddr, String), Instant>>,
    is_stopping: watch::Sender<bool>,
    accepting: Mutex<Option<JoinHandle<()>>>,
    inbound: Arc<Semaphore>,
    inbound_excess: AtomicU64,
    dropped_unknown: AtomicU64,
}

struct Accepted {
    serial: u64,
    _ends_with_this: oneshot::Sender<()>,
}

#[derive(Default)]
struct Life {
    /// Open message connections, and all that are being judged.
    connections: usize,
    /// The owner may believe that it is connected with this life.
    was_greeted: bool,
}

impl Shared {
    fn tell(&self, event: PeerEvent) {
        (self.tell)(event);
    }

    async fn ask<T>(&self, question: impl FnOnce(oneshot::Sender<T>) -> PeerEvent) -> Result<T, End> {
        let (reply, answer) = oneshot::channel();
        self.tell(question(reply));
        answer.await.map_err(|_| End::Stopping)
    }

    /// Puts a hello before the owner. The connection counts from before the question until `Counted` is dropped.
    async fn greet(self: &Arc<Self>, hello: Hello, lane: Lane) -> Result<(Counted, Hello), End> {
        let mut counted = Counted::new(self.clone(), hello.member, hello.boot);
        counted.state = CountedState::Greeted;
        match self.ask(|reply| PeerEvent::Greeting { hello, lane, reply }).await? {
            Ok(own) => {
                if lane == Lane::Messages {
                    counted.state = CountedState::Open;
                }
                Ok((counted, own))
            }
            Err(refusal) => {
                counted.state = CountedState::Refused;
                Err(End::Refused(refusal))
            }
        }
    }
}

/// A connection in the count of its peer's life.
struct Counted {
    shared: Arc<Shared>,
    life: (MemberId, u64),
    state: CountedState,
}

#[derive(Clone, Copy, PartialEq)]
enum CountedState {
    Refused,
    /// The owner was asked, and may have taken the hello.
    Greeted,
    /// A message connection that the owner has taken.
    Open,
}

impl Counted {
    fn new(shared: Arc<Shared>, member: MemberId, boot: u64) -> Self {
        let life = (member, boot);
        lock(&shared.lives).entry(life).or_default().connections += 1;
        Self { shared, life, state: CountedState::Refused }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut lives = lock(&self.shared.lives);
        let Some(life) = lives.get_mut(&self.life) else { return };
        life.connections -= 1;
        life.was_greeted |= self.state != CountedState::Refused;
        let (left, was_greeted) = (life.connections, life.was_greeted);
        if left == 0 {
            lives.remove(&self.life);
        }
        if self.state == CountedState::Open || (left == 0 && was_greeted) {
            let (member, boot) = self.life;
            // Under the lock: a connection that is counted next is judged after this was told.
            self.shared.tell(PeerEvent::Closed { member, boot, left });
        }
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the connection was closed")]
    Closed,
    #[error("there was nothing to send for a while")]
    Idle,
    #[error("a newer connection has taken its place, or the member was removed")]
    Replaced,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("no connection within {0:?}")]
    Connect(Duration),
    #[error("no greeting within {0:?}")]
    Handshake(Duration),
    #[error(
        "no TLS with it: {0}; members must all have certificates of one CA that name their hosts, or all have none"
    )]
    Tls(io::Error),
    #[error("{0}")]
    Protocol(String),
    /// This member does not talk to that one.
    #[error("refused here: {0}")]
    Refused(PeerRefusal),
    /// That one does not talk to this member.
    #[error("refused by it: {0}")]
    RefusedByPeer(PeerRefusal),
    #[error("this member is stopping")]
    Stopping,
}

/// A connection, with or without TLS.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}
type BoxStream = Box<dyn Stream>;

fn prepare(stream: &TcpStream, lane: Option<Lane>, limits: &Limits) {
    // A connection without traffic of its own, whose other end is gone without a word, is closed within about ten seconds.
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(5))
        .with_interval(Duration::from_secs(2))
        .with_retries(3);
    let socket = socket2::SockRef::from(stream);
    // They fail only for a socket that is gone already.
    let _ = stream.set_nodelay(true);
    let _ = socket.set_tcp_keepalive(&keepalive);
    #[cfg(target_os = "linux")]
    if let Some(lane) = lane {
        let wait = match lane {
            Lane::Messages => limits.messages_unacknowledged,
            Lane::Bulk => limits.bulk_unacknowledged,
        };
        let _ = socket.set_tcp_user_timeout(Some(wait));
    }
}

/// What goes through a lane, in both directions.
#[derive(Default)]
struct Traffic {
    connects: AtomicU64,
    sent_frames: AtomicU64,
    sent_bytes: AtomicU64,
    received_frames: AtomicU64,
    received_bytes: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
