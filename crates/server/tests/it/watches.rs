//! Native watches: keys and things, resume inside a revision, snapshots, bookmarks, slow readers, server-sent events and long polls.

use std::collections::BTreeMap;
use std::time::Duration;

use tenure_wire::etcd::etcdserverpb::kv_client::KvClient as EtcdKv;
use tenure_wire::etcd::etcdserverpb::watch_client::WatchClient;
use tenure_wire::etcd::etcdserverpb::{self as pb, CompactionRequest};
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::counters_client::CountersClient;
use tenure_wire::tenure::v1::elections_client::ElectionsClient;
use tenure_wire::tenure::v1::kv_client::KvClient;
use tenure_wire::tenure::v1::locks_client::LocksClient;
use tenure_wire::tenure::v1::pools_client::PoolsClient;
use tenure_wire::tenure::v1::sessions_client::SessionsClient;
use tenure_wire::tenure::v1::watches_client::WatchesClient;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tonic::transport::Channel;
use v1::watch_reply::Type;

use crate::Fixture;

const LIMIT: Duration = Duration::from_secs(20);

type Kv = KvClient<Channel>;

struct Stream(tonic::Streaming<v1::WatchReply>);

impl Stream {
    async fn open(fixture: &Fixture, request: v1::WatchRequest) -> Self {
        Self::try_open(fixture, request).await.unwrap()
    }

    async fn try_open(fixture: &Fixture, request: v1::WatchRequest) -> Result<Self, tonic::Status> {
        let mut watches = WatchesClient::new(fixture.channel().await).max_decoding_message_size(64 << 20);
        Ok(Self(watches.watch(request).await?.into_inner()))
    }

    /// A refusal may come in place of the headers or behind them.
    async fn refused(fixture: &Fixture, request: v1::WatchRequest) -> tonic::Status {
        match Self::try_open(fixture, request).await {
            Ok(mut stream) => stream.try_next().await.unwrap_err(),
            Err(status) => status,
        }
    }

    async fn try_next(&mut self) -> Result<Option<v1::WatchReply>, tonic::Status> {
        tokio::time::timeout(LIMIT, self.0.message()).await.expect("an answer in time")
    }

    async fn next(&mut self) -> v1::WatchReply {
        self.try_next().await.unwrap().expect("an open stream")
    }

    /// The next that is no bookmark.
    async fn change(&mut self) -> v1::WatchReply {
        loop {
            let reply = self.next().await;
            if reply.r#type() != Type::Bookmark {
                return reply;
            }
        }
    }

    async fn shown(&mut self, count: usize) -> Vec<String> {
        let mut all = Vec::new();
        while all.len() < count {
            all.push(shown(&self.change().await));
        }
        all
    }
}

fn shown(reply: &v1::WatchReply) -> String {
    let what = match reply.r#type() {
        Type::Put => "",
        Type::Delete => " gone",
        Type::Snapshot => " there",
        other => return format!("{other:?} {}", reply.revision),
    };
    match &reply.record {
        Some(record) => {
            let prev = reply.prev.as_ref().map_or_else(String::new, |prev| format!(" was {}", prev.value));
            format!("{}={}{what} @{}.{}{prev}", record.key, record.value, reply.revision, reply.index)
        }
        None => format!("{} {}{what} @{} {:?}", reply.kind, reply.name, reply.revision, reply.facts),
    }
}

fn keys(prefix: &str) -> v1::WatchRequest {
    v1::WatchRequest { key: prefix.to_owned(), prefix: true, ..Default::default() }
}

fn of_kind(kind: &str) -> v1::WatchRequest {
    v1::WatchRequest { kind: kind.to_owned(), prefix: true, ..Default::default() }
}

async fn put(kv: &mut Kv, key: &str, value: &str) -> u64 {
    let request = v1::PutRequest { key: key.to_owned(), value: value.to_owned(), ..Default::default() };
    kv.put(request).await.unwrap().into_inner().header.unwrap().revision
}

/// Several keys in one commit.
async fn put_all(kv: &mut Kv, keys: &[&str], value: &str) -> u64 {
    let put = |key: &&str| v1::Op {
        op: Some(v1::op::Op::Put(v1::PutRequest {
            key: (*key).to_owned(),
            value: value.to_owned(),
            ..Default::default()
        })),
    };
    let request = v1::TxnRequest { then: keys.iter().map(put).collect(), ..Default::default() };
    kv.txn(request).await.unwrap().into_inner().header.unwrap().revision
}

async fn compact(fixture: &Fixture, revision: u64) {
    let mut etcd = EtcdKv::new(fixture.channel().await);
    let request = CompactionRequest { revision: i64::try_from(revision).unwrap(), physical: true };
    etcd.compact(request).await.unwrap();
}

#[tokio::test]
async fn keys_change_by_change() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    let mut stream = Stream::open(&fixture, v1::WatchRequest { prev: true, ..keys("a/") }).await;
    let first = stream.next().await;
    assert_eq!((first.r#type(), first.revision, first.resume.as_str()), (Type::Bookmark, 1, "1"));
    put(&mut kv, "a/1", "x").await;
    put(&mut kv, "b", "not watched").await;
    put_all(&mut kv, &["a/2", "b", "a/1"], "y").await;
    kv.delete(v1::DeleteRequest { key: "a/1".into(), ..Default::default() }).await.unwrap();
    let expected = ["a/1=x @2.0", "a/2=y @4.0", "a/1=y @4.2 was x", "a/1= gone @5.0 was y"];
    assert_eq!(stream.shown(4).await, expected);
    fixture.server.stop().await;
}

#[tokio::test]
async fn every_place_resumes_right_behind_it() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    for round in 0..4 {
        put_all(&mut kv, &["a/1", "other", "a/2", "a/3"], &round.to_string()).await;
        put(&mut kv, "a/1", "alone").await;
    }
    let from_two = v1::WatchRequest { revision: 2, ..keys("a/") };
    let mut stream = Stream::open(&fixture, from_two.clone()).await;
    let mut all = Vec::new();
    while all.len() < 16 {
        all.push(stream.change().await);
    }
    for cut in 0..16 {
        let resume = all[cut].resume.clone();
        let mut stream = Stream::open(&fixture, v1::WatchRequest { resume: resume.clone(), ..keys("a/") }).await;
        for expected in &all[cut + 1..] {
            assert_eq!(&stream.change().await, expected, "behind {resume}");
        }
        // And nothing but the next change comes then.
        let marker = put(&mut kv, "a/9", "marker").await;
        all.push(stream.change().await);
        assert_eq!(all[all.len() - 1].revision, marker, "behind {resume}");
    }
    // The future is waited for.
    let revision = put(&mut kv, "a/1", "now").await;
    let mut stream = Stream::open(&fixture, v1::WatchRequest { revision: revision + 2, ..keys("a/") }).await;
    stream.next().await;
    put(&mut kv, "a/1", "too early").await;
    put(&mut kv, "a/1", "in time").await;
    assert_eq!(stream.shown(1).await, [format!("a/1=in time @{}.0", revision + 2)]);
    fixture.server.stop().await;
}

#[tokio::test]
async fn a_snapshot_and_what_follows_leave_nothing_out() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    // More than one page.
    for n in 0..22 {
        let names: Vec<String> = (0..100).map(|m| format!("a/{n:02}/{m:02}")).collect();
        put_all(&mut kv, &names.iter().map(String::as_str).collect::<Vec<_>>(), "old").await;
    }
    let writer = {
        let mut kv = kv.clone();
        tokio::spawn(async move {
            for n in 0..300 {
                put(&mut kv, &format!("a/{:02}/05", n % 22), &n.to_string()).await;
            }
            put(&mut kv, "a/end", "").await
        })
    };
    let mut stream = Stream::open(&fixture, v1::WatchRequest { snapshot: true, ..keys("a/") }).await;
    let mut state = BTreeMap::new();
    let mut synced = 0;
    loop {
        let reply = stream.next().await;
        match reply.r#type() {
            Type::Synced => synced = reply.revision,
            Type::Bookmark => {}
            kind => {
                // A place to go on from is told only behind the snapshot.
                assert_eq!((kind == Type::Snapshot, reply.resume.is_empty()), (synced == 0, synced == 0));
                assert!(synced == 0 || reply.revision > synced);
                let record = reply.record.unwrap();
                if record.key == "a/end" {
                    break;
                }
                state.insert(record.key, record.value);
            }
        }
    }
    writer.await.unwrap();
    assert_eq!(state.len(), 2200);
    for n in 0..22 {
        let last = (0..300).rev().find(|m| m % 22 == n).unwrap();
        assert_eq!(state[&format!("a/{n:02}/05")], last.to_string());
    }
    fixture.server.stop().await;
}

#[tokio::test]
async fn things_of_other_primitives() {
    let fixture = Fixture::start().await;
    let mut sessions = SessionsClient::new(fixture.channel().await);
    let mut locks = LocksClient::new(fixture.channel().await);
    let create = |id| v1::SessionCreateRequest { id, ttl_ms: 30_000, name: "worker".into(), ..Default::default() };
    sessions.create(create(7)).await.unwrap();
    let acquire = |name: &str, session| v1::LockAcquireRequest { name: name.into(), session, ..Default::default() };
    locks.acquire(acquire("jobs/a", 7)).await.unwrap();
    let snapshot = |kind: &str| v1::WatchRequest { snapshot: true, ..of_kind(kind) };
    let mut any = Stream::open(&fixture, snapshot("any")).await;
    assert_eq!((any.next().await.name, any.next().await.name), ("jobs/a".to_owned(), "7".to_owned()));
    assert_eq!(any.next().await.r#type(), Type::Synced);
    let mut jobs =
        Stream::open(&fixture, v1::WatchRequest { name: "jobs/".into(), prev: true, ..of_kind("lock") }).await;
    let one = v1::WatchRequest { kind: "session".into(), name: "7".into(), snapshot: true, ..Default::default() };
    let mut session = Stream::open(&fixture, one).await;
    let there = session.next().await;
    assert_eq!((there.r#type(), there.facts["name"].as_str()), (Type::Snapshot, "worker"));
    jobs.next().await;
    sessions.create(create(8)).await.unwrap();
    locks.acquire(acquire("jobs/b", 8)).await.unwrap();
    locks.acquire(acquire("elsewhere", 8)).await.unwrap();
    sessions.end(v1::SessionEndRequest { id: 7, ..Default::default() }).await.unwrap();
    let got = jobs.change().await;
    assert_eq!((got.name.as_str(), got.facts["holder_session"].as_str()), ("jobs/b", "8"));
    let gone = jobs.change().await;
    assert_eq!((gone.r#type(), gone.name.as_str(), gone.facts.len()), (Type::Delete, "jobs/a", 0));
    assert_eq!(gone.prev_facts["holder_session"], "7");
    assert_eq!(session.next().await.r#type(), Type::Synced);
    assert_eq!(shown(&session.change().await), format!("session 7 gone @{} {{}}", gone.revision));
    // The end of the session and what it freed are one commit, in order, with a place between.
    let mut rest = Stream::open(&fixture, v1::WatchRequest { resume: gone.resume, ..of_kind("any") }).await;
    let next = rest.next().await;
    assert_eq!(next.r#type(), Type::Bookmark);
    fixture.server.stop().await;
}

/// Counters, sequences and pools change often: they are watched by their kind, and disturb nobody who watches other things.
#[tokio::test]
async fn busy_kinds_are_watched_apart() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let mut counters = CountersClient::new(channel.clone());
    let mut locks = LocksClient::new(channel.clone());
    let mut pools = PoolsClient::new(channel);
    let mut add = async || {
        let add = v1::CounterAddRequest { name: "c".into(), delta: Some(1), ..Default::default() };
        counters.add(add).await.unwrap().into_inner().header.unwrap().revision
    };
    let first = add().await;
    let watch = |kind: &str| v1::WatchRequest { snapshot: true, ..of_kind(kind) };
    let mut counter = Stream::open(&fixture, watch("counter")).await;
    let mut pool = Stream::open(&fixture, watch("pool")).await;
    let mut any = Stream::open(&fixture, watch("any")).await;
    let there = counter.next().await;
    assert_eq!((there.r#type(), there.name.as_str(), there.facts["value"].as_str()), (Type::Snapshot, "c", "1"));
    assert_eq!(counter.next().await.r#type(), Type::Synced);
    assert_eq!(any.next().await.r#type(), Type::Synced, "no counter among the things of any kind");
    assert_eq!(pool.next().await.r#type(), Type::Synced);
    let ttl = v1::LockAcquireRequest { name: "l".into(), ttl_ms: 60_000, ..Default::default() };
    locks.acquire(ttl).await.unwrap();
    let locked = any.change().await;
    for _ in 0..3 {
        add().await;
    }
    let told = counter.change().await;
    assert_eq!((told.facts["value"].as_str(), told.revision > first), ("2", true));
    let mut resumed = Stream::open(&fixture, v1::WatchRequest { resume: told.resume, ..of_kind("counter") }).await;
    assert_eq!(resumed.change().await.facts["value"], "3");
    let create = v1::PoolCreateRequest { name: "p".into(), capacity: 5, ..Default::default() };
    pools.create(create).await.unwrap();
    assert_eq!(pool.change().await.facts["available"], "5");
    let mut rest = Stream::open(&fixture, v1::WatchRequest { revision: locked.revision, ..of_kind("any") }).await;
    let again = rest.change().await;
    assert_eq!((again.kind, again.name), (locked.kind, locked.name));
    for kind in ["job", "marker", "idempotency", "queue", "reservation"] {
        let refused = crate::native::error(&Stream::refused(&fixture, of_kind(kind)).await);
        assert!(refused.code == "INVALID" && refused.message.contains("not watched: "), "{refused:?}");
    }
    fixture.server.stop().await;
}

#[tokio::test]
async fn bookmarks_tell_where_it_is() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    let mut quick = Stream::open(&fixture, v1::WatchRequest { bookmark_ms: 100, ..keys("a/") }).await;
    let mut slow = Stream::open(&fixture, v1::WatchRequest { bookmark_ms: 600_000, ..keys("a/") }).await;
    assert_eq!((quick.next().await.revision, slow.next().await.revision), (1, 1));
    let revision = put(&mut kv, "b", "elsewhere").await;
    while quick.next().await.revision < revision {}
    // Before the answer to a compaction comes the word, to those who waited for nothing too.
    compact(&fixture, revision).await;
    let told = slow.next().await;
    assert_eq!((told.r#type(), told.revision), (Type::Bookmark, revision));
    for n in 0..1_100 {
        put(&mut kv, "b", &n.to_string()).await;
    }
    let told = slow.next().await;
    assert!(told.r#type() == Type::Bookmark && told.revision >= revision + 1_000, "{told:?}");
    fixture.server.stop().await;
}

#[tokio::test]
async fn what_is_compacted_is_told() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    for n in 0..5 {
        put(&mut kv, "a/1", &n.to_string()).await;
    }
    compact(&fixture, 5).await;
    let status = Stream::refused(&fixture, v1::WatchRequest { revision: 3, ..keys("a/") }).await;
    assert_eq!((status.code(), crate::native::error(&status).code.as_str()), (tonic::Code::OutOfRange, "COMPACTED"));
    assert_eq!(crate::native::error(&status).facts["compact_revision"], "5");
    // Who asked for a snapshot is given another one.
    let request = v1::WatchRequest { resume: "3.0".into(), snapshot: true, ..keys("a/") };
    let mut stream = Stream::open(&fixture, request).await;
    let resync = stream.next().await;
    assert_eq!((resync.r#type(), resync.from, resync.resume.as_str()), (Type::ResyncRequired, 5, ""));
    assert_eq!(stream.shown(2).await, ["a/1=4 there @6.0", "Synced 6"]);
    // A browser that is cut in the midst of it gives the last id back that it has, and is told all of it again.
    let path = "/v1/watch?key=a/&prefix=true&snapshot=true";
    for _ in 0..2 {
        let (_, mut events) = Lines::get(&fixture, path, &format!("{EVENTS}last-event-id: 3.0\r\n")).await;
        for (id, kind) in [("", "RESYNC_REQUIRED"), ("", "SNAPSHOT"), ("6", "SYNCED")] {
            let (told, event) = events.event().await;
            assert_eq!((told.as_str(), event["type"].as_str()), (id, Some(kind)));
        }
    }
    fixture.server.stop().await;
}

#[tokio::test]
async fn the_ring_says_when_it_is_too_short() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    let mut sessions = SessionsClient::new(fixture.channel().await);
    let create = |id| v1::SessionCreateRequest { id, ttl_ms: 30_000, ..Default::default() };
    let first = sessions.create(create(1)).await.unwrap().into_inner().token;
    // More changes than the ring keeps, in few commits.
    let mut tasks = Vec::new();
    for task in 0..50_u64 {
        let mut sessions = sessions.clone();
        tasks.push(tokio::spawn(async move {
            for n in 0..204 {
                sessions.create(create(1_000 + task * 1_000 + n)).await.unwrap();
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let mut stream = Stream::open(&fixture, v1::WatchRequest { revision: first, ..of_kind("session") }).await;
    let resync = stream.next().await;
    assert_eq!(resync.r#type(), Type::ResyncRequired);
    assert!(resync.from > first && resync.from < first + 1_000, "{resync:?}");
    assert!(stream.try_next().await.unwrap().is_none(), "the last answer");
    // From there on everything is there.
    let mut stream = Stream::open(&fixture, v1::WatchRequest { resume: resync.resume, ..of_kind("session") }).await;
    stream.next().await;
    let mut last = resync.from - 1;
    for _ in 0..9_000 {
        let reply = stream.change().await;
        assert_eq!(reply.revision, last + 1);
        last = reply.revision;
    }
    put(&mut kv, "unrelated", "").await;
    fixture.server.stop().await;
}

#[tokio::test]
async fn a_slow_reader_is_caught_up() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    let mut stream = Stream::open(&fixture, keys("a/")).await;
    stream.next().await;
    let value = "v".repeat(512 << 10);
    for _ in 0..40 {
        put(&mut kv, "a/big", &value).await;
    }
    for revision in 2..42 {
        assert_eq!(stream.change().await.revision, revision);
    }
    fixture.server.stop().await;
}

#[tokio::test]
async fn streams_are_bounded() {
    let fixture = Fixture::start_with(|config| config.max_watch_streams = 2).await;
    let first = Stream::open(&fixture, keys("a")).await;
    let mut elections = ElectionsClient::new(fixture.channel().await);
    let request = v1::ObserveRequest { name: "e".into(), ..Default::default() };
    let mut observer = elections.observe(request).await.unwrap().into_inner();
    observer.message().await.unwrap();
    let status = Stream::refused(&fixture, keys("a")).await;
    let refused = crate::native::error(&status);
    assert_eq!((status.code(), refused.code.as_str()), (tonic::Code::ResourceExhausted, "RATE_LIMITED"));
    assert!(refused.retryable && refused.facts["flag"] == "--max-watch-streams", "{refused:?}");
    let (http, _) = Lines::get(&fixture, "/v1/watch?key=a", EVENTS).await;
    assert_eq!(http, 429);
    let (http, _) = Lines::get(&fixture, "/v1/watch:poll?key=a&resume=1", "").await;
    assert_eq!(http, 429);
    let etcd = EtcdWatch::open(&fixture).await;
    let status = etcd.unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::ResourceExhausted, "etcdserver: too many requests"));
    // What ends makes room.
    drop(first);
    loop {
        if let Ok(mut stream) = Stream::try_open(&fixture, keys("a")).await
            && stream.try_next().await.is_ok()
        {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // A stream of etcd's takes a place, too: with the observer they have both.
    let _etcd = loop {
        if let Ok(etcd) = EtcdWatch::open(&fixture).await {
            break etcd;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let status = Stream::refused(&fixture, keys("a")).await;
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    fixture.server.stop().await;
}

/// A watch as etcd's clients open it.
#[derive(Debug)]
struct EtcdWatch {
    _requests: tokio::sync::mpsc::Sender<pb::WatchRequest>,
    _answers: tonic::Streaming<pb::WatchResponse>,
}

impl EtcdWatch {
    async fn open(fixture: &Fixture) -> Result<Self, tonic::Status> {
        let create = pb::WatchCreateRequest { key: "a".into(), ..Default::default() };
        let request_union = Some(pb::watch_request::RequestUnion::CreateRequest(create));
        let (requests, receiver) = tokio::sync::mpsc::channel(1);
        requests.send(pb::WatchRequest { request_union }).await.unwrap();
        let mut client = WatchClient::new(fixture.channel().await);
        let mut answers = client.watch(tokio_stream::wrappers::ReceiverStream::new(receiver)).await?.into_inner();
        answers.message().await?;
        Ok(Self { _requests: requests, _answers: answers })
    }
}

#[tokio::test]
async fn wrong_requests_are_named() {
    let fixture = Fixture::start().await;
    let check = async |request: v1::WatchRequest, field: &str| {
        let status = Stream::refused(&fixture, request.clone()).await;
        let error = crate::native::error(&status);
        assert_eq!((error.code.as_str(), error.facts["field"].as_str()), ("INVALID", field), "{request:?}");
    };
    let key = |key: &str| v1::WatchRequest { key: key.into(), ..Default::default() };
    check(key(""), "key").await;
    check(v1::WatchRequest { end: "b".into(), ..keys("a") }, "end").await;
    check(v1::WatchRequest { end: "a".into(), ..key("b") }, "end").await;
    check(v1::WatchRequest { resume: "x".into(), ..key("a") }, "resume").await;
    check(v1::WatchRequest { snapshot: true, revision: 4, ..key("a") }, "snapshot").await;
    check(v1::WatchRequest { bookmark_ms: 99, ..key("a") }, "bookmark_ms").await;
    check(v1::WatchRequest { name: "a".into(), ..key("a") }, "name").await;
    check(of_kind("nonsense"), "kind").await;
    check(v1::WatchRequest { kind: "lock".into(), ..Default::default() }, "name").await;
    check(v1::WatchRequest { kind: "lock".into(), ..key("a") }, "key").await;
    check(v1::WatchRequest { kind: "session".into(), name: "x".into(), ..Default::default() }, "name").await;
    fixture.server.stop().await;
}

// ---- over HTTP ----

/// A stream of a GET by HTTP/1.0, whose body ends with the connection.
struct Lines(BufReader<TcpStream>);

impl Lines {
    async fn get(fixture: &Fixture, path: &str, headers: &str) -> (u16, Self) {
        let mut socket = TcpStream::connect(fixture.server.address()).await.unwrap();
        socket.write_all(format!("GET {path} HTTP/1.0\r\nhost: x\r\n{headers}\r\n").as_bytes()).await.unwrap();
        let mut lines = Self(BufReader::new(socket));
        let status = lines.next().await.split(' ').nth(1).unwrap().parse().unwrap();
        while !lines.next().await.is_empty() {}
        (status, lines)
    }

    async fn next(&mut self) -> String {
        let mut line = String::new();
        tokio::time::timeout(LIMIT, self.0.read_line(&mut line)).await.expect("a line in time").unwrap();
        line.trim_end().to_owned()
    }

    async fn json(mut self) -> serde_json::Value {
        let mut text = String::new();
        tokio::time::timeout(LIMIT, self.0.read_to_string(&mut text)).await.expect("an end in time").unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// The next event with data: its id and what it says.
    async fn event(&mut self) -> (String, serde_json::Value) {
        let mut id = String::new();
        loop {
            let line = self.next().await;
            if let Some(it) = line.strip_prefix("id: ") {
                id = it.to_owned();
            } else if let Some(data) = line.strip_prefix("data: ") {
                return (id, serde_json::from_str(data).unwrap());
            }
        }
    }

    /// The next event that is a change: its id, and key and value.
    async fn change(&mut self) -> (String, String) {
        loop {
            let (id, event) = self.event().await;
            if event["type"] != "BOOKMARK" {
                let record = &event["record"];
                return (id, format!("{}={}", record["key"].as_str().unwrap(), record["value"].as_str().unwrap_or("")));
            }
        }
    }
}

const EVENTS: &str = "accept: text/event-stream\r\n";

#[tokio::test]
async fn a_lost_event_stream_resumes_inside_a_revision() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    let path = "/v1/watch?key=a/&prefix=true&revision=2";
    let (status, mut events) = Lines::get(&fixture, path, EVENTS).await;
    assert_eq!(status, 200);
    assert_eq!(events.event().await.0, "1");
    for round in 0..3 {
        put_all(&mut kv, &["a/1", "a/2", "b", "a/3"], &round.to_string()).await;
    }
    let mut seen = Vec::new();
    let mut last = "1".to_owned();
    // Each connection is lost after one event, and an `EventSource` asks for the same address again.
    while seen.len() < 9 {
        let header = format!("{EVENTS}last-event-id: {last}\r\n");
        let (status, mut events) = Lines::get(&fixture, path, &header).await;
        assert_eq!(status, 200);
        let (id, change) = events.change().await;
        last = id;
        seen.push(change);
    }
    let expected: Vec<String> = (0..3).flat_map(|round| (1..4).map(move |key| format!("a/{key}={round}"))).collect();
    assert_eq!(seen, expected);
    assert_eq!(last, "4.3");
    compact(&fixture, 4).await;
    // A refusal has its status, so that a browser does not come back.
    let (status, refused) = Lines::get(&fixture, "/v1/watch?key=a&revision=2", EVENTS).await;
    assert_eq!(status, 410);
    assert_eq!(refused.json().await["code"], "COMPACTED");
    let (status, refused) = Lines::get(&fixture, "/v1/watch?key=a&nonsense=2", EVENTS).await;
    assert_eq!((status, refused.json().await["code"].as_str()), (400, Some("INVALID")));
    fixture.server.stop().await;
}

#[tokio::test]
async fn without_events_it_is_lines() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    put(&mut kv, "a/1", "x").await;
    let (status, mut lines) = Lines::get(&fixture, "/v1/watch?key=a/&prefix=true&snapshot=true", "").await;
    assert_eq!(status, 200);
    let mut line: serde_json::Value = serde_json::from_str(&lines.next().await).unwrap();
    assert_eq!((&line["result"]["type"], &line["result"]["record"]["value"]), (&"SNAPSHOT".into(), &"x".into()));
    line = serde_json::from_str(&lines.next().await).unwrap();
    assert_eq!((&line["result"]["type"], &line["result"]["resume"]), (&"SYNCED".into(), &"2".into()));
    fixture.server.stop().await;
}

#[tokio::test]
async fn a_long_poll_never_goes_back() {
    let fixture = Fixture::start().await;
    let mut kv = Kv::new(fixture.channel().await);
    let mut watches = WatchesClient::new(fixture.channel().await);
    put_all(&mut kv, &["a/1", "a/2"], "x").await;
    let poll = |resume: &str, wait_ms| v1::WatchPollRequest {
        key: "a/".into(),
        prefix: true,
        resume: resume.into(),
        wait_ms,
        ..Default::default()
    };
    let first = watches.poll(v1::WatchPollRequest { snapshot: true, ..poll("", 0) }).await.unwrap().into_inner();
    assert_eq!((first.events.len(), first.resume.as_str()), (2, "2"));
    // Nothing happened: the index moves on with what did not concern it.
    put(&mut kv, "b", "").await;
    let idle = watches.poll(poll(&first.resume, 100)).await.unwrap().into_inner();
    assert_eq!((idle.events.len(), idle.resume.as_str()), (0, "3"));
    let waiting = {
        let mut watches = watches.clone();
        let request = poll(&idle.resume, 0);
        tokio::spawn(async move { watches.poll(request).await.unwrap().into_inner() })
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    put_all(&mut kv, &["a/1", "a/2"], "y").await;
    let woken = tokio::time::timeout(LIMIT, waiting).await.unwrap().unwrap();
    assert_eq!((woken.events.len(), woken.resume.as_str()), (2, "4.1"));
    // A place that this member has not reached is kept.
    let ahead = watches.poll(poll("900.7", 100)).await.unwrap().into_inner();
    assert_eq!((ahead.events.len(), ahead.resume.as_str()), (0, "900.7"));
    let (status, answer) = Lines::get(&fixture, "/v1/watch:poll?key=a/&prefix=true&resume=4.0", "").await;
    let answer = answer.json().await;
    assert_eq!((status, answer["events"][0]["record"]["key"].as_str()), (200, Some("a/2")));
    assert_eq!(answer["resume"], "4.1");
    let too_long = watches.poll(poll("1", 20_001)).await.unwrap_err();
    assert_eq!(crate::native::error(&too_long).facts["field"], "wait_ms");
    fixture.server.stop().await;
}
