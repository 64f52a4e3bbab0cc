//! Transports that talk to each other over loopback, and what strangers and broken peers do to them.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

/// What a node's owner was told.
#[derive(Debug, PartialEq)]
enum Note {
    Greeted { member: u64, boot: u64, lane: Lane },
    Closed { member: u64, boot: u64, left: usize },
    Refused { by: u64, why: String },
}

/// An owner that takes every hello, unless told otherwise, and notes everything.
#[derive(Default)]
struct Owner {
    hello: Mutex<Hello>,
    refuses: Mutex<Option<PeerRefusal>>,
    notes: Mutex<VecDeque<(Note, Instant)>>,
    received: Mutex<Vec<(u64, Lane, Bytes)>>,
    /// Credits that a slow owner has not given back.
    held: Mutex<Vec<Credit>>,
    holds_bulk: AtomicBool,
    holds_messages: AtomicBool,
}

impl Owner {
    fn tell(&self, event: PeerEvent) {
        let note = match event {
            PeerEvent::OwnHello { reply } => return drop(reply.send(lock(&self.hello).clone())),
            PeerEvent::Greeting { hello, lane, reply } => {
                let judged = match &*lock(&self.refuses) {
                    Some(refusal) => Err(refusal.clone()),
                    None => Ok(lock(&self.hello).clone()),
                };
                let _ = reply.send(judged);
                Note::Greeted { member: hello.member.0, boot: hello.boot, lane }
            }
            PeerEvent::Closed { member, boot, left } => Note::Closed { member: member.0, boot, left },
            PeerEvent::Refused { by, refusal } => Note::Refused { by: by.0, why: refusal.why },
            PeerEvent::Frames { from, boot: _, lane, frames, credit } => {
                lock(&self.received).extend(frames.into_iter().map(|frame| (from.0, lane, frame)));
                let holds = match lane {
                    Lane::Messages => &self.holds_messages,
                    Lane::Bulk => &self.holds_bulk,
                };
                if holds.load(Ordering::Relaxed) {
                    lock(&self.held).push(credit);
                }
                return;
            }
        };
        lock(&self.notes).push_back((note, Instant::now()));
    }

    fn received(&self, from: u64, lane: Lane) -> Vec<Bytes> {
        let received = lock(&self.received);
        received.iter().filter(|(f, l, _)| (*f, *l) == (from, lane)).map(|(_, _, frame)| frame.clone()).collect()
    }

    fn count(&self, lane: Lane) -> usize {
        lock(&self.received).iter().filter(|(_, l, _)| *l == lane).count()
    }

    fn has(&self, wanted: impl Fn(&Note) -> bool) -> bool {
        lock(&self.notes).iter().any(|(note, _)| wanted(note))
    }
}

struct Node {
    id: u64,
    address: SocketAddr,
    owner: Arc<Owner>,
    peers: Peers,
}

impl Node {
    async fn start(id: u64) -> Self {
        Self::start_with(id, "127.0.0.1:0", None, Limits::default()).await
    }

    async fn start_with(id: u64, listen: &str, tls: Option<PeerTls>, limits: Limits) -> Self {
        let listener = TcpListener::bind(listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let owner = Arc::new(Owner::default());
        *lock(&owner.hello) = hello(id, 100 + id);
        let told = owner.clone();
        let peers = Peers::start_with(listener, tls, limits, move |event| told.tell(event));
        Self { id, address, owner, peers }
    }

    fn knows(&self, others: &[&Node]) {
        let others = others.iter().map(|node| (MemberId(node.id), format!("n{}", node.id), node.address.to_string()));
        self.peers.set_peers(others.collect());
    }

    fn send(&self, to: &Node, lane: Lane, message: &[u8]) -> bool {
        self.peers.send(MemberId(to.id), lane, message.to_vec())
    }

    fn link(&self, to: u64) -> LinkFacts {
        self.peers.facts().links.into_iter().find(|link| link.member.0 == to).unwrap()
    }

    async fn connected(&self, to: u64) {
        until(|| self.link(to).is_connected, "a connection").await;
    }
}

fn hello(id: u64, boot: u64) -> Hello {
    Hello { member: MemberId(id), name: format!("n{id}"), boot, ..Hello::default() }
}

async fn pair() -> (Node, Node) {
    let (a, b) = (Node::start(1).await, Node::start(2).await);
    a.knows(&[&b]);
    b.knows(&[&a]);
    a.connected(2).await;
    b.connected(1).await;
    (a, b)
}

async fn until(mut holds: impl FnMut() -> bool, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A stranger's connection, or a peer played by the test.
struct Stranger(TcpStream);

impl Stranger {
    async fn connect(to: &Node) -> Self {
        Self(TcpStream::connect(to.address).await.unwrap())
    }

    async fn greeting_as(to: &Node, id: u64, boot: u64) -> Self {
        let mut stranger = Self::connect(to).await;
        let mut bytes = frame::preamble(Lane::Messages).to_vec();
        frame::put(&mut bytes, frame::kind::HELLO, &hello(id, boot).encode());
        stranger.0.write_all(&bytes).await.unwrap();
        assert_eq!(stranger.read_kind().await, frame::kind::WELCOME);
        stranger
    }

    async fn read_kind(&mut self) -> u8 {
        let mut header = [0; frame::HEADER_LEN];
        self.0.read_exact(&mut header).await.unwrap();
        let mut body = vec![0; u32::from_le_bytes(*header.first_chunk().unwrap()) as usize];
        self.0.read_exact(&mut body).await.unwrap();
        header[8]
    }

    async fn write(&mut self, bytes: &[u8]) {
        // The other side may have hung up already.
        let _ = self.0.write_all(bytes).await;
    }

    /// The other side hangs up; what it said before that is returned.
    async fn until_closed(mut self) -> Vec<u8> {
        let mut said = Vec::new();
        // A reset is an end like any other.
        let _ = tokio::time::timeout(PATIENCE, self.0.read_to_end(&mut said)).await.expect("it was not closed");
        said
    }
}

#[tokio::test]
async fn three_members_exchange_frames_in_order_on_both_lanes() {
    let nodes = [Node::start(1).await, Node::start(2).await, Node::start(3).await];
    let [a, b, c] = &nodes;
    a.knows(&[b, c]);
    b.knows(&[a, c]);
    c.knows(&[a, b]);
    for from in &nodes {
        for to in nodes.iter().filter(|to| to.id != from.id) {
            from.connected(to.id).await;
            for n in 0..1000u32 {
                // Some are empty, some short, some go past the gathering.
                let mut message = n.to_le_bytes().to_vec();
                message.resize(4 + [0, 100, 20_000][n as usize % 3], n as u8);
                assert!(from.send(to, Lane::Messages, &message));
                assert!(from.send(to, Lane::Bulk, &message));
            }
        }
    }
    for to in &nodes {
        until(|| to.owner.count(Lane::Messages) == 2000 && to.owner.count(Lane::Bulk) == 2000, "all frames").await;
        for from in nodes.iter().filter(|from| from.id != to.id) {
            for lane in [Lane::Messages, Lane::Bulk] {
                for (n, frame) in to.owner.received(from.id, lane).iter().enumerate() {
                    assert_eq!(frame[..4], (n as u32).to_le_bytes());
                    assert_eq!(frame.len(), 4 + [0, 100, 20_000][n % 3]);
                    assert!(frame[4..].iter().all(|byte| *byte == n as u8));
                }
            }
        }
        // Sent and received are counted when the write has returned.
        until(|| to.peers.facts().links.iter().all(|link| link.messages.sent_frames == 1000), "the counts").await;
        for link in to.peers.facts().links {
            assert_eq!((link.messages.received_frames, link.bulk.received_frames), (1000, 1000));
            assert_eq!((link.messages.dropped_full, link.messages.dropped_down), (0, 0));
        }
    }
    assert!(!a.peers.send(MemberId(9), Lane::Messages, vec![1]), "nobody has that id");
    assert_eq!(a.peers.facts().dropped_unknown, 1);
    for node in &nodes {
        node.peers.stop().await;
    }
}

#[tokio::test]
async fn what_strangers_say_reaches_nobody() {
    let limits = Limits { handshake: Duration::from_millis(300), ..Limits::default() };
    let node = Node::start_with(1, "127.0.0.1:0", None, limits).await;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"TNRX\x01\0\0\0\0\0", b"TNRP\x01\0\x07\0", &[0; 100], b"T"] {
        let mut stranger = Stranger::connect(&node).await;
        stranger.write(garbage).await;
        assert_eq!(stranger.until_closed().await, b"", "{garbage:?}");
    }
    // Connected and silent.
    assert_eq!(Stranger::connect(&node).await.until_closed().await, b"");
    // A hello that is too long, one that is damaged, one that is none.
    let mut long = frame::preamble(Lane::Messages).to_vec();
    long.extend_from_slice(&frame::header(frame::kind::HELLO, &[0; frame::HELLO_MAX + 1]));
    let mut damaged = frame::preamble(Lane::Messages).to_vec();
    frame::put(&mut damaged, frame::kind::HELLO, &hello(2, 5).encode());
    *damaged.last_mut().unwrap() ^= 1;
    for bytes in [&long, &damaged] {
        let mut stranger = Stranger::connect(&node).await;
        stranger.write(bytes).await;
        assert_eq!(stranger.until_closed().await, b"");
    }
    let mut none = frame::preamble(Lane::Messages).to_vec();
    frame::put(&mut none, frame::kind::HELLO, b"\0");
    for (bytes, why) in [(&none[..], "cannot be read"), (b"TNRP\x02\0\0\0 a later version's hello", "version 1")] {
        let mut stranger = Stranger::connect(&node).await;
        stranger.write(bytes).await;
        let said = frame::take(&mut stranger.until_closed().await[..].into(), frame::HELLO_MAX).unwrap().unwrap();
        let refusal = PeerRefusal::decode(&said.1).unwrap();
        assert!(said.0 == frame::kind::REFUSED && !refusal.fatal && refusal.why.contains(why), "{refusal:?}");
    }
    assert!(lock(&node.owner.notes).is_empty());
    until(|| node.peers.facts().inbound == 0, "all to be closed").await;
    node.peers.stop().await;
}

#[tokio::test]
async fn a_peer_that_breaks_the_rules_is_hung_up_on() {
    let node = Node::start(1).await;
    let mut wrong_sum = Vec::new();
    frame::put(&mut wrong_sum, frame::kind::MESSAGE, b"abc");
    wrong_sum[10] ^= 1;
    let mut oversize = (frame::BODY_MAX as u32 + 1).to_le_bytes().to_vec();
    oversize.extend_from_slice(&[0; 5]);
    let mut unknown = Vec::new();
    frame::put(&mut unknown, 77, b"abc");
    for (boot, bytes) in [(1, wrong_sum), (2, oversize), (3, unknown)] {
        let mut peer = Stranger::greeting_as(&node, 2, boot).await;
        let mut good = Vec::new();
        frame::put(&mut good, frame::kind::MESSAGE, b"good");
        peer.write(&good).await;
        until(|| node.owner.count(Lane::Messages) == boot as usize, "the good frame").await;
        peer.write(&bytes).await;
        assert_eq!(peer.until_closed().await, b"");
        let closed = Note::Closed { member: 2, boot, left: 0 };
        until(|| node.owner.has(|note| *note == closed), "the end to be told").await;
    }
    assert_eq!(node.owner.count(Lane::Messages), 3);
    node.peers.stop().await;
}

#[tokio::test]
async fn too_many_connections_are_closed_at_once() {
    let limits = Limits { inbound_max: 2, ..Limits::default() };
    let node = Node::start_with(1, "127.0.0.1:0", None, limits).await;
    let first = Stranger::connect(&node).await;
    let _second = Stranger::greeting_as(&node, 2, 5).await;
    until(|| node.peers.facts().inbound == 2, "two").await;
    assert_eq!(Stranger::connect(&node).await.until_closed().await, b"");
    assert_eq!(node.peers.facts().inbound_excess, 1);
    drop(first);
    until(|| node.peers.facts().inbound == 1, "room").await;
    let _third = Stranger::greeting_as(&node, 3, 5).await;
    node.peers.stop().await;
}

#[tokio::test]
async fn a_newer_connection_takes_the_place_of_one_that_hangs() {
    let node = Node::start(1).await;
    let hanging = Stranger::greeting_as(&node, 2, 5).await;
    let _newer = Stranger::greeting_as(&node, 2, 6).await;
    assert_eq!(hanging.until_closed().await, b"");
    until(|| node.owner.has(|note| *note == Note::Closed { member: 2, boot: 5, left: 0 }), "the end of the older")
        .await;
    assert!(!node.owner.has(|note| matches!(note, Note::Closed { boot: 6, .. })));
    node.peers.stop().await;
}

#[tokio::test]
async fn a_refusal_is_told_with_its_reason_by_acceptor_and_dialler() {
    let (a, b) = (Node::start(1).await, Node::start(2).await);
    let refusal = PeerRefusal { fatal: true, why: "it has another cluster".to_owned() };
    *lock(&b.owner.refuses) = Some(refusal.clone());
    a.knows(&[&b]);
    let told = Note::Refused { by: 2, why: refusal.why.clone() };
    until(|| a.owner.has(|note| *note == told), "the acceptor's refusal").await;
    until(|| a.link(2).trouble.contains("refused by it: it has another cluster"), "the trouble").await;
    assert!(!b.owner.has(|note| matches!(note, Note::Closed { .. })), "nothing was open");
    // Now the dialler is the one that refuses.
    a.knows(&[]);
    lock(&a.owner.notes).clear();
    b.knows(&[&a]);
    until(|| a.owner.has(|note| *note == told), "the dialler's refusal").await;
    until(|| a.owner.has(|note| matches!(note, Note::Closed { member: 2, left: 0, .. })), "the end").await;
    assert!(!b.link(1).is_connected);
    // It is taken back: nobody has to be restarted.
    *lock(&b.owner.refuses) = None;
    b.connected(1).await;
    a.peers.stop().await;
    b.peers.stop().await;
}

#[tokio::test]
async fn one_who_answers_under_anothers_address_is_not_talked_to() {
    let (a, b) = (Node::start(1).await, Node::start(2).await);
    a.peers.set_peers(vec![(MemberId(3), "n3".to_owned(), b.address.to_string())]);
    until(|| a.link(3).trouble.contains("`n2` answers there instead of `n3`"), "the trouble").await;
    assert!(!a.send(&b, Lane::Messages, b"x"));
    // Its address is corrected.
    let c = Node::start(3).await;
    a.knows(&[&c]);
    a.connected(3).await;
    for node in [a, b, c] {
        node.peers.stop().await;
    }
}

#[tokio::test]
async fn a_slow_owner_fills_a_bounded_queue_and_nobody_waits() {
    let limits = Limits { queue_bytes: 4 << 20, bulk_window: 1 << 20, messages_window: 1 << 20, ..Limits::default() };
    let a = Node::start_with(1, "127.0.0.1:0", None, limits.clone()).await;
    let b = Node::start_with(2, "127.0.0.1:0", None, limits).await;
    a.knows(&[&b]);
    a.connected(2).await;
    for (lane, holds) in [(Lane::Messages, &b.owner.holds_messages), (Lane::Bulk, &b.owner.holds_bulk)] {
        holds.store(true, Ordering::Relaxed);
        let (mut sent, mut longest) = (Vec::new(), Duration::ZERO);
        let figures = || {
            let link = a.link(2);
            if lane == Lane::Messages { link.messages } else { link.bulk }
        };
        // Until the kernel's buffers are full as well and the queue overflows.
        let mut n = 0u32;
        until(
            || {
                let mut message = n.to_le_bytes().to_vec();
                message.resize(256 << 10, 0);
                let begun = Instant::now();
                if a.send(&b, lane, &message) {
                    sent.push(n);
                }
                longest = longest.max(begun.elapsed());
                n += 1;
                assert!(figures().queued_bytes <= 4 << 20);
                figures().dropped_full >= 10
            },
            "the queue to overflow",
        )
        .await;
        assert!(longest < Duration::from_millis(500), "a send took {longest:?}");
        assert!(a.send(&b, lane, &n.to_le_bytes()), "there is room for a heartbeat");
        sent.push(n);
        assert!(b.owner.count(lane) < sent.len());
        // The owner comes round again.
        holds.store(false, Ordering::Relaxed);
        lock(&b.owner.held).clear();
        until(|| b.owner.count(lane) == sent.len(), "the rest").await;
        let numbers =
            b.owner.received(1, lane).into_iter().map(|frame| u32::from_le_bytes(*frame.first_chunk().unwrap()));
        assert_eq!(numbers.collect::<Vec<_>>(), sent);
    }
    a.peers.stop().await;
    b.peers.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_does_not_delay_messages() {
    let (a, b) = pair().await;
    // Bulk that nobody takes: messages pass all the same.
    b.owner.holds_bulk.store(true, Ordering::Relaxed);
    until(|| !a.send(&b, Lane::Bulk, &[7; 1 << 20]), "a full bulk queue").await;
    let mut slowest = Duration::ZERO;
    let mut delays = Vec::new();
    for round in 1..=100 {
        if round == 50 {
            // Bulk that flows.
            b.owner.holds_bulk.store(false, Ordering::Relaxed);
            lock(&b.owner.held).clear();
        }
        while round >= 50 && a.send(&b, Lane::Bulk, &[7; 1 << 20]) {}
        let begun = Instant::now();
        assert!(a.send(&b, Lane::Messages, b"heartbeat"));
        until(|| b.owner.count(Lane::Messages) == round, "the heartbeat").await;
        slowest = slowest.max(begun.elapsed());
        delays.push(begun.elapsed());
        lock(&b.owner.received).retain(|(_, lane, _)| *lane == Lane::Messages);
    }
    delays.sort();
    println!("a message beside bulk: median {:?}, slowest {slowest:?}", delays[delays.len() / 2]);
    // 32 MiB wait in front of it on the other lane.
    assert!(delays[delays.len() / 2] < Duration::from_millis(50) && slowest < Duration::from_secs(1), "{delays:?}");
    a.peers.stop().await;
    b.peers.stop().await;
}

/// A node in a runtime of its own, which can be dropped with all its sockets, as the end of a process does it.
struct Process {
    runtime: tokio::runtime::Runtime,
    node: Node,
}

impl Process {
    async fn start(id: u64, boot: u64, listen: String) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let starting = async move {
            let node = Node::start_with(id, &listen, None, Limits::default()).await;
            lock(&node.owner.hello).boot = boot;
            node
        };
        let node = runtime.spawn(starting).await.unwrap();
        Self { runtime, node }
    }

    fn kill(self) {
        self.runtime.shutdown_background();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_process_is_told_at_once_and_its_return_is_noticed() {
    let a = Node::start(1).await;
    let mut listen = "127.0.0.1:0".to_owned();
    let mut delays = Vec::new();
    for boot in 1..=5 {
        let b = Process::start(2, boot, listen).await;
        listen = b.node.address.to_string();
        a.knows(&[&b.node]);
        b.node.knows(&[&a]);
        let begun = Instant::now();
        a.connected(2).await;
        b.node.connected(1).await;
        if boot > 1 {
            // The address is dialled again although nobody was told of the return.
            println!("back after {:?}", begun.elapsed());
        }
        until(|| a.send(&b.node, Lane::Messages, b"hello") && b.node.owner.count(Lane::Messages) > 0, "a message")
            .await;
        lock(&a.owner.notes).clear();
        let begun = Instant::now();
        b.kill();
        let last = Note::Closed { member: 2, boot, left: 0 };
        until(|| a.owner.has(|note| *note == last), "the end").await;
        let notes = lock(&a.owner.notes);
        let ends: Vec<_> = notes.iter().filter(|(note, _)| matches!(note, Note::Closed { .. })).collect();
        assert_eq!(ends[0].0, Note::Closed { member: 2, boot, left: 1 });
        assert_eq!(ends[1].0, last);
        delays.push(ends[1].1 - begun);
    }
    delays.sort();
    println!("the end of a process is told after {delays:?}");
    assert!(delays[2] < Duration::from_millis(50), "{delays:?}");
    assert!(a.link(2).messages.connects >= 5);
    a.peers.stop().await;
}

#[tokio::test]
async fn an_idle_bulk_connection_is_closed_and_made_again() {
    let limits = Limits { bulk_idle: Duration::from_millis(50), ..Limits::default() };
    let a = Node::start_with(1, "127.0.0.1:0", None, limits).await;
    let b = Node::start(2).await;
    a.knows(&[&b]);
    a.connected(2).await;
    assert_eq!(b.peers.facts().inbound, 1, "nothing to send, no connection for bulk");
    for round in 1..=3 {
        assert!(a.send(&b, Lane::Bulk, b"piece"));
        until(|| b.owner.count(Lane::Bulk) == round, "the piece").await;
        until(|| b.peers.facts().inbound == 1, "the idle connection to be closed").await;
        assert_eq!(a.link(2).bulk.connects, round as u64);
    }
    assert!(!b.owner.has(|note| matches!(note, Note::Closed { .. })), "the peer is still there");
    a.peers.stop().await;
    b.peers.stop().await;
}

#[tokio::test]
async fn members_that_are_named_no_more_are_cut_off() {
    let (a, b) = pair().await;
    a.knows(&[]);
    for (node, other) in [(&a, 2), (&b, 1)] {
        let last = Note::Closed { member: other, boot: 100 + other, left: 0 };
        until(|| node.owner.has(|note| *note == last), "the end").await;
    }
    assert!(!a.send(&b, Lane::Messages, b"x"));
    a.peers.stop().await;
    b.peers.stop().await;
}

#[tokio::test]
async fn what_was_queued_before_a_stop_still_leaves() {
    let (a, b) = pair().await;
    for n in 0..1000u32 {
        a.send(&b, Lane::Messages, &n.to_le_bytes());
    }
    a.peers.stop().await;
    until(|| b.owner.count(Lane::Messages) == 1000, "all frames").await;
    b.peers.stop().await;
    assert!(TcpStream::connect(b.address).await.is_err(), "nobody listens any more");
}

mod tls {
    use std::path::Path;

    use super::*;

    struct Authority {
        issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
        pem: String,
    }

    impl Authority {
        fn new() -> Self {
            let key = rcgen::KeyPair::generate().unwrap();
            let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
            params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            let pem = params.self_signed(&key).unwrap().pem();
            Self { issuer: rcgen::Issuer::new(params, key), pem }
        }

        /// Files of a member whose certificate names `host`.
        fn files(&self, folder: &Path, host: &str) -> TlsFiles {
            let key = rcgen::KeyPair::generate().unwrap();
            let params = rcgen::CertificateParams::new(vec![host.to_owned()]).unwrap();
            let cert = params.signed_by(&key, &self.issuer).unwrap();
            let files = TlsFiles { cert: folder.join("cert"), key: folder.join("key"), ca: folder.join("ca") };
            std::fs::write(&files.cert, cert.pem()).unwrap();
            std::fs::write(&files.key, key.serialize_pem()).unwrap();
            std::fs::write(&files.ca, &self.pem).unwrap();
            files
        }

        async fn node(&self, id: u64, host: &str) -> Node {
            let folder = tempfile::tempdir().unwrap();
            let tls = PeerTls::load(self.files(folder.path(), host)).unwrap();
            Node::start_with(id, "127.0.0.1:0", Some(tls), Limits::default()).await
        }
    }

    #[tokio::test]
    async fn members_of_one_authority_talk() {
        let authority = Authority::new();
        let (a, b) = (authority.node(1, "127.0.0.1").await, authority.node(2, "127.0.0.1").await);
        a.knows(&[&b]);
        b.knows(&[&a]);
        a.connected(2).await;
        b.connected(1).await;
        for n in 0..100u32 {
            a.send(&b, Lane::Messages, &n.to_le_bytes());
            a.send(&b, Lane::Bulk, &vec![n as u8; 200_000]);
        }
        until(|| b.owner.count(Lane::Messages) == 100 && b.owner.count(Lane::Bulk) == 100, "all frames").await;
        assert!(b.owner.received(1, Lane::Bulk).iter().enumerate().all(|(n, frame)| frame[199_999] == n as u8));
        // The farewell of TLS is an end like any other.
        b.peers.stop().await;
        let last = Note::Closed { member: 2, boot: 102, left: 0 };
        until(|| a.owner.has(|note| *note == last), "the end").await;
        a.peers.stop().await;
    }

    /// `a` dials `b` and gets nowhere.
    async fn is_in_trouble(a: Node, b: Node, words: &str) {
        a.knows(&[&b]);
        until(|| !a.link(2).trouble.is_empty(), "the trouble").await;
        assert!(a.link(2).trouble.contains(words), "{}", a.link(2).trouble);
        assert!(lock(&b.owner.notes).is_empty(), "{:?}", lock(&b.owner.notes));
        assert!(!a.owner.has(|note| matches!(note, Note::Greeted { .. } | Note::Closed { .. })));
        a.peers.stop().await;
        b.peers.stop().await;
    }

    #[tokio::test]
    async fn strangers_to_the_authority_are_kept_out() {
        let (ours, theirs) = (Authority::new(), Authority::new());
        is_in_trouble(theirs.node(1, "127.0.0.1").await, ours.node(2, "127.0.0.1").await, "no TLS with it").await;
        let elsewhere = ours.node(2, "elsewhere.example").await;
        is_in_trouble(ours.node(1, "127.0.0.1").await, elsewhere, "not valid for name").await;
        is_in_trouble(Node::start(1).await, ours.node(2, "127.0.0.1").await, "members speak TLS here").await;
        is_in_trouble(ours.node(1, "127.0.0.1").await, Node::start(2).await, "no TLS with it").await;
    }

    #[tokio::test]
    async fn a_client_of_another_authority_that_trusts_ours_is_kept_out() {
        let (ours, theirs) = (Authority::new(), Authority::new());
        let folder = tempfile::tempdir().unwrap();
        let mut files = theirs.files(folder.path(), "127.0.0.1");
        files.ca = folder.path().join("ours");
        std::fs::write(&files.ca, &ours.pem).unwrap();
        let tls = PeerTls::load(files).unwrap();
        let a = Node::start_with(1, "127.0.0.1:0", Some(tls), Limits::default()).await;
        is_in_trouble(a, ours.node(2, "127.0.0.1").await, "no TLS with it").await;
    }

    #[test]
    fn certificates_follow_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let tls = PeerTls::load(authority.files(folder.path(), "127.0.0.1")).unwrap();
        let first = tls.configs();
        assert!(Arc::ptr_eq(&first.dial, &tls.configs().dial), "nothing has changed");
        let touch = |seconds| {
            let file = std::fs::File::options().write(true).open(folder.path().join("cert")).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        };
        authority.files(folder.path(), "127.0.0.1");
        touch(1);
        let second = tls.configs();
        assert!(!Arc::ptr_eq(&first.dial, &second.dial));
        std::fs::write(folder.path().join("cert"), "nothing").unwrap();
        touch(2);
        assert!(Arc::ptr_eq(&second.dial, &tls.configs().dial), "what cannot be used is not");
        let missing = TlsFiles { cert: "/nonexistent".into(), ..authority.files(folder.path(), "h") };
        assert!(PeerTls::load(missing).err().unwrap().contains("/nonexistent holds no certificate"));
    }
}
