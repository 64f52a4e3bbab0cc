//! Watches: order, history, filters, ids, progress, compaction, slow readers.

use std::time::Duration;

use bytes::Bytes;
use tenure_wire::etcd::etcdserverpb as pb;
use tenure_wire::etcd::etcdserverpb::kv_client::KvClient;
use tenure_wire::etcd::etcdserverpb::watch_client::WatchClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::Fixture;
use crate::etcd::{put, put_request};

struct Stream {
    requests: mpsc::Sender<pb::WatchRequest>,
    answers: tonic::Streaming<pb::WatchResponse>,
}

impl Stream {
    async fn open(fixture: &Fixture) -> Self {
        let (requests, receiver) = mpsc::channel(1024);
        let mut client = WatchClient::new(fixture.channel().await).max_decoding_message_size(64 << 20);
        // The answer's headers come with the first answer, so the first request is under way already.
        let answers = client.watch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        Self { requests, answers }
    }

    async fn send(&self, request: pb::watch_request::RequestUnion) {
        self.requests.send(pb::WatchRequest { request_union: Some(request) }).await.unwrap();
    }

    async fn create(&self, key: &str, change: impl FnOnce(&mut pb::WatchCreateRequest)) {
        let mut create = pb::WatchCreateRequest { key: Bytes::copy_from_slice(key.as_bytes()), ..Default::default() };
        change(&mut create);
        self.send(pb::watch_request::RequestUnion::CreateRequest(create)).await;
    }

    async fn next(&mut self) -> pb::WatchResponse {
        let next = tokio::time::timeout(Duration::from_secs(20), self.answers.message());
        next.await.expect("an answer in time").unwrap().expect("an open stream")
    }
}

fn shown(answer: &pb::WatchResponse) -> Vec<String> {
    let one = |event: &tenure_wire::etcd::mvccpb::Event| {
        let kv = event.kv.as_ref().unwrap();
        let key = String::from_utf8_lossy(&kv.key).into_owned();
        let prev = event
            .prev_kv
            .as_ref()
            .map_or_else(String::new, |prev| format!(" was {}", String::from_utf8_lossy(&prev.value)));
        match event.r#type {
            0 => format!("{key}={}@{}{prev}", String::from_utf8_lossy(&kv.value), kv.mod_revision),
            _ => format!("{key} gone@{}{prev}", kv.mod_revision),
        }
    };
    answer.events.iter().map(one).collect()
}

#[tokio::test]
async fn events_in_order() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    let mut stream = Stream::open(&fixture).await;
    stream.create("k", |create| create.prev_kv = true).await;
    let created = stream.next().await;
    assert!(created.created && created.watch_id == 0);
    assert_eq!(created.header.unwrap().revision, 1);
    put(&mut kv, "k", "1").await;
    put(&mut kv, "other", "x").await;
    put(&mut kv, "k", "2").await;
    kv.delete_range(pb::DeleteRangeRequest { key: Bytes::from_static(b"k"), ..Default::default() }).await.unwrap();
    assert_eq!(shown(&stream.next().await), ["k=1@2"]);
    let second = stream.next().await;
    assert_eq!((shown(&second), second.header.unwrap().revision), (vec!["k=2@4 was 1".to_owned()], 4));
    assert_eq!(shown(&stream.next().await), ["k gone@5 was 2"]);
    fixture.server.stop().await;
}

#[tokio::test]
async fn history_then_news() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    for n in 0..5 {
        put(&mut kv, &format!("p/{n}"), "v").await;
    }
    let mut stream = Stream::open(&fixture).await;
    stream
        .create("p/", |create| {
            create.range_end = Bytes::from_static(b"p0");
            create.start_revision = 4;
        })
        .await;
    // A future start waits for its revision.
    stream.create("p/9", |create| create.start_revision = 9).await;
    assert!(stream.next().await.created);
    let mut seen = Vec::new();
    let mut other = false;
    while seen.len() < 3 || !other {
        let answer = stream.next().await;
        other |= answer.created;
        seen.extend(shown(&answer));
    }
    assert_eq!(seen, ["p/2=v@4", "p/3=v@5", "p/4=v@6"]);
    for value in ["a", "b", "c"] {
        put(&mut kv, "p/9", value).await;
    }
    let (mut near, mut far) = (Vec::new(), Vec::new());
    while near.len() < 3 || far.is_empty() {
        let answer = stream.next().await;
        if answer.watch_id == 0 { near.extend(shown(&answer)) } else { far.extend(shown(&answer)) }
    }
    assert_eq!(near, ["p/9=a@7", "p/9=b@8", "p/9=c@9"]);
    assert_eq!(far, ["p/9=c@9"]);
    fixture.server.stop().await;
}

#[tokio::test]
async fn refusals_and_ids() {
    let fixture = Fixture::start().await;
    let mut stream = Stream::open(&fixture).await;
    stream.create("a", |create| create.watch_id = 5).await;
    assert_eq!(stream.next().await.watch_id, 5);
    let check = |answer: pb::WatchResponse, reason: &str| {
        assert!(answer.created && answer.canceled && answer.watch_id == -1, "{answer:?}");
        assert_eq!(answer.cancel_reason, reason);
    };
    stream.create("a", |create| create.watch_id = 5).await;
    check(stream.next().await, "mvcc: duplicate watch ID provided on the WatchStream");
    stream.create("a", |create| create.start_revision = -1).await;
    check(stream.next().await, "etcdserver: mvcc: required revision has been compacted");
    stream.create("b", |create| create.range_end = Bytes::from_static(b"a")).await;
    check(stream.next().await, "mvcc: watcher range is empty");
    stream.send(pb::watch_request::RequestUnion::CancelRequest(pb::WatchCancelRequest { watch_id: 5 })).await;
    let cancelled = stream.next().await;
    assert!(cancelled.canceled && !cancelled.created && cancelled.watch_id == 5 && cancelled.cancel_reason.is_empty());
    fixture.server.stop().await;
}

#[tokio::test]
async fn compacted_starts_are_told_where_to_go_on() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    for n in 0..5 {
        put(&mut kv, "k", &n.to_string()).await;
    }
    kv.compact(pb::CompactionRequest { revision: 4, physical: true }).await.unwrap();
    let mut stream = Stream::open(&fixture).await;
    stream.create("k", |create| create.start_revision = 2).await;
    assert!(stream.next().await.created);
    let cancelled = stream.next().await;
    assert!(cancelled.canceled && cancelled.compact_revision == 4, "{cancelled:?}");
    // The compact revision itself is still there.
    stream.create("k", |create| create.start_revision = 4).await;
    assert!(stream.next().await.created);
    assert_eq!(shown(&stream.next().await), ["k=2@4", "k=3@5", "k=4@6"]);
    fixture.server.stop().await;
}

#[tokio::test]
async fn filters_and_progress() {
    let fixture = Fixture::start_with(|config| config.watch_progress_interval = Duration::from_millis(200)).await;
    let mut kv = KvClient::new(fixture.channel().await);
    let mut stream = Stream::open(&fixture).await;
    let progress = || pb::watch_request::RequestUnion::ProgressRequest(pb::WatchProgressRequest {});
    // Nobody watches yet, so there is no progress to tell.
    stream.send(progress()).await;
    stream.create("k", |create| create.filters = vec![pb::watch_create_request::FilterType::Noput.into()]).await;
    assert!(stream.next().await.created);
    put(&mut kv, "k", "1").await;
    stream.send(progress()).await;
    let told = stream.next().await;
    assert_eq!((told.watch_id, told.events.len(), told.header.unwrap().revision), (-1, 0, 2));
    kv.delete_range(pb::DeleteRangeRequest { key: Bytes::from_static(b"k"), ..Default::default() }).await.unwrap();
    assert_eq!(shown(&stream.next().await), ["k gone@3"]);
    stream.create("quiet", |create| create.progress_notify = true).await;
    assert!(stream.next().await.created);
    let told = stream.next().await;
    assert_eq!(
        (told.watch_id, told.events.len(), told.header.unwrap().revision),
        (1, 0, 3),
        "by itself, after a while"
    );
    fixture.server.stop().await;
}

/// One transaction is one answer for those who watch the range, and each watcher of a key gets its own.
#[tokio::test]
async fn one_revision_is_not_split() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    let mut stream = Stream::open(&fixture).await;
    stream.create("t/", |create| create.range_end = Bytes::from_static(b"t0")).await;
    assert!(stream.next().await.created);
    let puts = (0..50).map(|n| pb::RequestOp {
        request: Some(pb::request_op::Request::RequestPut(put_request(&format!("t/{n:02}"), "v"))),
    });
    kv.txn(pb::TxnRequest { success: puts.collect(), ..Default::default() }).await.unwrap();
    assert_eq!(stream.next().await.events.len(), 50);
    fixture.server.stop().await;
}

/// A client that does not read falls behind, costs others nothing, and then gets every event once, in order.
#[tokio::test]
async fn a_slow_watcher_is_caught_up() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    let mut slow = Stream::open(&fixture).await;
    slow.create("s", |_| {}).await;
    assert!(slow.next().await.created);
    let mut quick = Stream::open(&fixture).await;
    quick.create("s", |_| {}).await;
    assert!(quick.next().await.created);
    let value = "x".repeat(100 << 10);
    for n in 0..200i64 {
        assert_eq!(put(&mut kv, "s", &value).await, n + 2);
        assert_eq!(quick.next().await.events[0].kv.as_ref().unwrap().mod_revision, n + 2);
    }
    let mut expected = 2;
    while expected < 202 {
        for event in slow.next().await.events {
            assert_eq!(event.kv.unwrap().mod_revision, expected);
            expected += 1;
        }
    }
    put(&mut kv, "s", "last").await;
    assert_eq!(shown(&slow.next().await), ["s=last@202"]);
    fixture.server.stop().await;
}

#[tokio::test]
async fn many_watchers_of_one_key() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    let mut stream = Stream::open(&fixture).await;
    for _ in 0..2000 {
        stream.create("hot", |_| {}).await;
    }
    for id in 0..2000 {
        assert_eq!(stream.next().await.watch_id, id);
    }
    for round in 0..3 {
        put(&mut kv, "hot", &round.to_string()).await;
        let mut ids: Vec<i64> = Vec::new();
        for _ in 0..2000 {
            let answer = stream.next().await;
            assert_eq!(answer.events.len(), 1);
            ids.push(answer.watch_id);
        }
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..2000));
    }
    fixture.server.stop().await;
}
