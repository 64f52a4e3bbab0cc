//! The native face: keys with expectations, sessions, locks, the pipeline.

use std::collections::BTreeMap;
use std::time::Duration;

use prost::Message as _;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::elections_client::ElectionsClient;
use tenure_wire::tenure::v1::idempotency_client::IdempotencyClient;
use tenure_wire::tenure::v1::kv_client::KvClient;
use tenure_wire::tenure::v1::locks_client::LocksClient;
use tenure_wire::tenure::v1::pipeline_client::PipelineClient;
use tenure_wire::tenure::v1::queues_client::QueuesClient;
use tenure_wire::tenure::v1::sessions_client::SessionsClient;
use tenure_wire::tenure::v1::status_client::StatusClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::Fixture;

/// The native error inside of a status.
pub(crate) fn error(status: &tonic::Status) -> v1::Error {
    // google.rpc.Status: details are field 3, each an Any whose value is field 2.
    #[derive(Clone, PartialEq, prost::Message)]
    struct Any {
        #[prost(string, tag = "1")]
        url: String,
        #[prost(bytes = "vec", tag = "2")]
        value: Vec<u8>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Details {
        #[prost(message, repeated, tag = "3")]
        details: Vec<Any>,
    }
    let details = Details::decode(status.details()).unwrap();
    assert!(details.details[0].url.ends_with("/tenure.v1.Error"));
    v1::Error::decode(&details.details[0].value[..]).unwrap()
}

fn put(key: &str, value: &str) -> v1::PutRequest {
    v1::PutRequest { key: key.to_owned(), value: value.to_owned(), ..Default::default() }
}

fn uuid(n: u8) -> Option<v1::RequestMeta> {
    Some(v1::RequestMeta { id: Some(v1::request_meta::Id::Uuid(format!("{n:032x}"))) })
}

fn acquire(name: &str, session: u64) -> v1::LockAcquireRequest {
    v1::LockAcquireRequest { name: name.to_owned(), session, ..Default::default() }
}

async fn session(sessions: &mut SessionsClient<tonic::transport::Channel>) -> u64 {
    sessions.create(v1::SessionCreateRequest { ttl_ms: 30_000, ..Default::default() }).await.unwrap().into_inner().id
}

#[tokio::test]
async fn keys() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    let first = kv.put(put("a", "1")).await.unwrap().into_inner().header.unwrap();
    assert!(first.revision == 2 && first.cluster_id != 0 && first.member_id != 0);
    let expect = |fact| Some(v1::Expect { fact: Some(fact) });
    let status =
        kv.put(v1::PutRequest { expect: expect(v1::expect::Fact::Absent(true)), ..put("a", "2") }).await.unwrap_err();
    let conflict = error(&status);
    assert_eq!((status.code(), conflict.code.as_str()), (Code::FailedPrecondition, "CONFLICT"));
    assert_eq!(conflict.outcome(), v1::Outcome::NotApplied);
    let current = conflict.current.unwrap();
    assert_eq!((current.value.as_str(), current.version), ("1", 1));
    kv.put(v1::PutRequest { expect: expect(v1::expect::Fact::Version(1)), ..put("a", "2") }).await.unwrap();
    let got = kv
        .get(v1::GetRequest { key: "a".to_owned(), ..Default::default() })
        .await
        .unwrap()
        .into_inner()
        .record
        .unwrap();
    assert_eq!((got.value.as_str(), got.version, got.mod_revision), ("2", 2, 3));
    let old = v1::GetRequest { key: "a".to_owned(), revision: 2, ..Default::default() };
    assert_eq!(kv.get(old).await.unwrap().into_inner().record.unwrap().value, "1");
    let status = kv.get(v1::GetRequest { key: "none".to_owned(), ..Default::default() }).await.unwrap_err();
    assert_eq!((status.code(), error(&status).facts["revision"].as_str()), (Code::NotFound, "3"));

    // The same request id is the same answer; with another request it is refused.
    let once = v1::PutRequest { request: uuid(1), ..put("b", "x") };
    let first = kv.put(once.clone()).await.unwrap().into_inner().header.unwrap();
    let again = kv.put(once).await.unwrap().into_inner().header.unwrap();
    assert!(!first.replayed && again.replayed && first.revision == again.revision);
    let status = kv.put(v1::PutRequest { request: uuid(1), ..put("b", "y") }).await.unwrap_err();
    assert_eq!(error(&status).code, "MISMATCH");
    let status = kv.put(v1::PutRequest { namespace: "elsewhere".to_owned(), ..put("b", "y") }).await.unwrap_err();
    assert_eq!(error(&status).code, "NOT_FOUND");
    fixture.server.stop().await;
}

#[tokio::test]
async fn pages() {
    let fixture = Fixture::start().await;
    let mut kv = KvClient::new(fixture.channel().await);
    for n in 0..25 {
        kv.put(put(&format!("p/{n:02}"), "v")).await.unwrap();
    }
    for descending in [false, true] {
        let mut request =
            v1::RangeRequest { key: "p/".to_owned(), prefix: true, limit: 10, descending, ..Default::default() };
        let mut keys = Vec::new();
        loop {
            let page = kv.range(request.clone()).await.unwrap().into_inner();
            assert_eq!(page.count, 25);
            keys.extend(page.records.into_iter().map(|record| record.key));
            if page.next.is_empty() {
                break;
            }
            request.resume = page.next;
            request.revision = page.header.unwrap().revision;
        }
        let mut expected: Vec<String> = (0..25).map(|n| format!("p/{n:02}")).collect();
        if descending {
            expected.reverse();
        }
        assert_eq!(keys, expected);
    }
    fixture.server.stop().await;
}

#[tokio::test]
async fn locks_are_fair_and_fenced() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let (mut locks, mut sessions, mut kv) =
        (LocksClient::new(channel.clone()), SessionsClient::new(channel.clone()), KvClient::new(channel));
    let (one, two) = (session(&mut sessions).await, session(&mut sessions).await);
    let held = locks.acquire(acquire("jobs", one)).await.unwrap().into_inner();
    assert!(held.token > 0 && held.session == one && held.remaining_ms > 0 && held.remaining_ms <= 30_000);

    let status = locks.acquire(acquire("jobs", two)).await.unwrap_err();
    let refused = error(&status);
    assert_eq!((status.code(), refused.code.as_str(), refused.retryable), (Code::Aborted, "HELD", true));
    assert_eq!(refused.facts["token"], held.token.to_string());
    assert_eq!(refused.facts["holder_session"], one.to_string());

    let waiting = tokio::spawn({
        let mut locks = locks.clone();
        let wait = Some(v1::lock_acquire_request::Wait::WaitMs(20_000));
        async move { locks.acquire(v1::LockAcquireRequest { wait, ..acquire("jobs", two) }).await.unwrap().into_inner() }
    });
    let get = || v1::LockGetRequest { name: "jobs".to_owned(), ..Default::default() };
    loop {
        let lock = locks.get(get()).await.unwrap().into_inner().lock.unwrap();
        if lock.waiter_count == 1 {
            assert_eq!((lock.waiters[0].session, lock.holders[0].token), (two, held.token));
            break;
        }
        tokio::task::yield_now().await;
    }
    let guarded = |token| v1::PutRequest {
        require_locks: vec![v1::RequireLock { name: "jobs".to_owned(), token }],
        ..put("report", "fresh")
    };
    kv.put(guarded(held.token)).await.unwrap();
    let release =
        |session, token| v1::LockReleaseRequest { name: "jobs".to_owned(), session, token, ..Default::default() };
    locks.release(release(one, held.token)).await.unwrap();
    let next = waiting.await.unwrap();
    assert!(next.token > held.token && next.session == two);
    let status = kv.put(guarded(held.token)).await.unwrap_err();
    assert_eq!((status.code(), error(&status).code.as_str()), (Code::FailedPrecondition, "FENCED"));
    let status = locks.release(release(one, next.token)).await.unwrap_err();
    assert_eq!(error(&status).code, "FENCED");
    // The end of a session frees what it held.
    sessions.end(v1::SessionEndRequest { id: two, ..Default::default() }).await.unwrap();
    assert!(locks.get(get()).await.unwrap().into_inner().lock.unwrap().holders.is_empty());
    fixture.server.stop().await;
}

#[tokio::test]
async fn waits_end_with_their_callers() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let (mut locks, mut sessions) = (LocksClient::new(channel.clone()), SessionsClient::new(channel));
    let one = session(&mut sessions).await;
    locks.acquire(acquire("w", one)).await.unwrap();
    let status = locks
        .acquire(v1::LockAcquireRequest {
            wait: Some(v1::lock_acquire_request::Wait::WaitMs(50)),
            ttl_ms: 5_000,
            ..acquire("w", 0)
        })
        .await
        .unwrap_err();
    assert_eq!(error(&status).code, "TIMEOUT_WAITING");
    let forever = v1::LockAcquireRequest {
        wait: Some(v1::lock_acquire_request::Wait::Forever(true)),
        ttl_ms: 60_000,
        ..acquire("w", 0)
    };
    let gone = locks.clone().acquire(forever).await_for(Duration::from_millis(300)).await;
    assert!(gone.is_none(), "nobody frees it");
    // Both sessions that were made for those calls end, and their waits with them.
    let settled = async {
        loop {
            let lock = locks
                .get(v1::LockGetRequest { name: "w".to_owned(), ..Default::default() })
                .await
                .unwrap()
                .into_inner()
                .lock
                .unwrap();
            let live = sessions.list(v1::SessionListRequest::default()).await.unwrap().into_inner().sessions.len();
            if lock.waiter_count == 0 && live == 1 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), settled).await.expect("waits end with their callers");
    fixture.server.stop().await;
}

/// Drops a future that takes too long, as a client does that goes away.
trait AwaitFor: Future + Sized {
    async fn await_for(self, limit: Duration) -> Option<Self::Output> {
        tokio::time::timeout(limit, self).await.ok()
    }
}

impl<F: Future> AwaitFor for F {}

#[tokio::test]
async fn sessions_renew_and_tell() {
    let fixture = Fixture::start().await;
    let mut sessions = SessionsClient::new(fixture.channel().await);
    let metadata = BTreeMap::from([("host".to_owned(), "h1".to_owned())]);
    let request =
        v1::SessionCreateRequest { ttl_ms: 10, name: "w".to_owned(), metadata, request: uuid(9), ..Default::default() };
    let created = sessions.create(request.clone()).await.unwrap().into_inner();
    assert_eq!(created.ttl_ms, 1500, "one and a half election timeouts at least");
    let again = sessions.create(request).await.unwrap().into_inner();
    assert!(again.header.unwrap().replayed && again.id == created.id, "a retry finds the same session");
    let refs = vec![
        v1::SessionRef { id: created.id, token: created.token },
        v1::SessionRef { id: created.id, token: created.token + 1 },
        v1::SessionRef { id: 12345, token: 0 },
    ];
    let renewed =
        sessions.renew(v1::SessionRenewRequest { sessions: refs, ..Default::default() }).await.unwrap().into_inner();
    let codes: Vec<_> =
        renewed.renewals.iter().map(|one| one.error.as_ref().map_or("", |error| error.code.as_str())).collect();
    assert_eq!(codes, ["", "SESSION_EXPIRED", "SESSION_EXPIRED"]);
    let told = sessions
        .get(v1::SessionGetRequest { id: created.id, ..Default::default() })
        .await
        .unwrap()
        .into_inner()
        .session
        .unwrap();
    assert_eq!((told.name.as_str(), told.metadata["host"].as_str(), told.lease), ("w", "h1", false));
    assert!(told.remaining_ms > 0);
    fixture.server.stop().await;
}

#[tokio::test]
async fn a_renewal_tells_a_leader_that_it_should_yield() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let (mut sessions, mut elections) = (SessionsClient::new(channel.clone()), ElectionsClient::new(channel));
    let (leads, waits) = (session(&mut sessions).await, session(&mut sessions).await);
    let campaign = |session, priority, wait| v1::CampaignRequest {
        name: "e".to_owned(),
        session,
        priority,
        wait,
        ..Default::default()
    };
    elections.campaign(campaign(leads, 0, None)).await.unwrap();
    let mut yields = async || {
        let refs = [leads, waits].map(|id| v1::SessionRef { id, token: 0 });
        let request = v1::SessionRenewRequest { sessions: refs.to_vec(), ..Default::default() };
        let renewed = sessions.renew(request).await.unwrap().into_inner().renewals;
        renewed.into_iter().map(|renewal| renewal.should_yield).collect::<Vec<_>>()
    };
    assert_eq!(yields().await, [vec![], Vec::<String>::new()]);
    let forever = Some(v1::campaign_request::Wait::Forever(true));
    let elected = tokio::spawn({
        let mut elections = elections.clone();
        async move { elections.campaign(campaign(waits, 5, forever)).await.unwrap().into_inner().token }
    });
    while yields().await != [vec!["e".to_owned()], vec![]] {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    sessions.end(v1::SessionEndRequest { id: leads, ..Default::default() }).await.unwrap();
    assert!(elected.await.unwrap() > 0);
    fixture.server.stop().await;
}

#[tokio::test]
async fn waits_take_no_place_of_a_pipeline() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let mut sessions = SessionsClient::new(channel.clone());
    let (holder, waiter) = (session(&mut sessions).await, session(&mut sessions).await);
    LocksClient::new(channel.clone()).acquire(acquire("held", holder)).await.unwrap();
    let (requests, receiver) = mpsc::channel(64);
    let mut answers = PipelineClient::new(channel).stream(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    // More than may be open at once of what is answered at once.
    let wait = |id: u64| {
        let many = v1::LockAcquireManyRequest {
            locks: vec![v1::LockItem { name: "held".to_owned(), ..Default::default() }],
            session: waiter,
            owner_id: id.to_string(),
            wait: Some(v1::lock_acquire_many_request::Wait::Forever(true)),
            ..Default::default()
        };
        let call = v1::UnaryCall { method: "/tenure.v1.Locks/AcquireMany".into(), body: many.encode_to_vec().into() };
        v1::Request { id, call: Some(v1::request::Call::Unary(call)) }
    };
    for first in (0..5_000).step_by(500) {
        let some = (first..first + 500).map(wait).collect();
        requests.send(v1::Requests { requests: some }).await.unwrap();
    }
    let put = v1::Request { id: 9_999, call: Some(v1::request::Call::Put(put("k", "v"))) };
    requests.send(v1::Requests { requests: vec![put] }).await.unwrap();
    let answered = tokio::time::timeout(Duration::from_secs(20), answers.message()).await.expect("the put goes by");
    let reply = answered.unwrap().unwrap().replies.remove(0);
    assert!(reply.id == 9_999 && matches!(reply.result, Some(v1::reply::Result::Put(_))), "{reply:?}");
    fixture.server.stop().await;
}

/// The figures of the primitives, after each of them has been used.
#[tokio::test]
async fn metrics_tell_of_the_primitives() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let (mut sessions, mut locks) = (SessionsClient::new(channel.clone()), LocksClient::new(channel.clone()));
    let (mut queues, mut keys) = (QueuesClient::new(channel.clone()), IdempotencyClient::new(channel));
    let (one, two) = (session(&mut sessions).await, session(&mut sessions).await);

    let held = locks.acquire(acquire("l", one)).await.unwrap().into_inner().token;
    let wait = Some(v1::lock_acquire_request::Wait::WaitMs(20_000));
    let waiting = v1::LockAcquireRequest { wait, ..acquire("l", two) };
    let waited = tokio::spawn({
        let mut locks = locks.clone();
        async move { locks.acquire(waiting).await.unwrap() }
    });
    let get = || v1::LockGetRequest { name: "l".to_owned(), ..Default::default() };
    while locks.get(get()).await.unwrap().into_inner().lock.unwrap().waiter_count == 0 {
        tokio::task::yield_now().await;
    }
    let release = |token| v1::LockReleaseRequest { name: "l".to_owned(), session: one, token, ..Default::default() };
    locks.release(release(held)).await.unwrap();
    waited.await.unwrap();
    locks.release(release(1)).await.unwrap_err();

    let begin = |key: &str| v1::IdempotencyBeginRequest { key: key.to_owned(), ..Default::default() };
    keys.begin(begin("k")).await.unwrap();
    keys.begin(begin("k")).await.unwrap();
    let stale = v1::IdempotencyHeartbeatRequest { key: "k".to_owned(), attempt: 1, ..Default::default() };
    keys.heartbeat(stale).await.unwrap_err();

    let jobs = ["a", "b"].map(|payload| v1::NewJob { payload: payload.to_owned(), ..Default::default() });
    let enqueue = v1::EnqueueRequest { queue: "q".to_owned(), jobs: jobs.to_vec(), ..Default::default() };
    queues.enqueue(enqueue).await.unwrap();
    let receive = || v1::ReceiveRequest { queues: vec!["q".to_owned()], max: 1, ..Default::default() };
    let job = queues.receive(receive()).await.unwrap().into_inner().jobs.remove(0);
    let nack = v1::NackRequest { id: job.id, token: job.token, delay_ms: Some(0), ..Default::default() };
    queues.nack(nack.clone()).await.unwrap();
    queues.nack(nack).await.unwrap_err();
    // The other, and the one that was given back.
    for _ in 0..2 {
        queues.receive(receive()).await.unwrap();
    }

    let expected = [
        "tenure_fenced_total{kind=\"lock\"} 1",
        "tenure_fenced_total{kind=\"attempt\"} 1",
        "tenure_fenced_total{kind=\"job\"} 1",
        "tenure_fenced_total{kind=\"election\"} 0",
        "tenure_idempotency_begins_total{outcome=\"granted\"} 1",
        "tenure_idempotency_begins_total{outcome=\"in_flight\"} 1",
        "tenure_jobs{state=\"leased\"} 2",
        "tenure_jobs{state=\"ready\"} 0",
        "tenure_job_deliveries_total 3",
        "tenure_job_redeliveries_total 1",
        "tenure_job_oldest_ready_seconds 0",
        "tenure_lock_wait_seconds_count 1",
        "tenure_lock_deadlocks_total 0",
    ];
    let mut page = String::new();
    for _ in 0..500 {
        page = fixture.page("/metrics").await;
        if expected.iter().all(|line| page.lines().any(|told| told == *line)) {
            return fixture.server.stop().await;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let missing: Vec<_> = expected.iter().filter(|line| !page.lines().any(|told| told == **line)).collect();
    panic!("{missing:#?}\n{page}");
}

#[tokio::test]
async fn the_pipeline_answers_by_id() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let mut sessions = SessionsClient::new(channel.clone());
    let holder = session(&mut sessions).await;
    let (requests, receiver) = mpsc::channel(64);
    let mut answers = PipelineClient::new(channel).stream(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    let call = |id, call| v1::Request { id, call: Some(call) };
    for message in 0..10u64 {
        let puts = (0..50).map(|n| {
            let id = message * 50 + n;
            call(id, v1::request::Call::Put(put(&format!("k{id}"), &id.to_string())))
        });
        requests.send(v1::Requests { requests: puts.collect() }).await.unwrap();
    }
    let mut open: std::collections::BTreeSet<u64> = (0..500).collect();
    let mut messages = 0;
    while !open.is_empty() {
        let replies = answers.message().await.unwrap().unwrap();
        assert!(replies.header.unwrap().member_id != 0);
        messages += 1;
        for reply in replies.replies {
            assert!(open.remove(&reply.id));
            let Some(v1::reply::Result::Put(put)) = reply.result else { panic!("{reply:?}") };
            assert!(put.header.unwrap().revision > 0);
        }
    }
    assert!(messages < 500, "answers leave in batches: {messages} messages");

    let get = |key: &str| v1::GetRequest { key: key.to_owned(), ..Default::default() };
    let publish = |key: &str, content: &str| {
        let (key, content) = (key.to_owned(), content.to_owned());
        let request = v1::ConfigPublishRequest { key, content, ..Default::default() };
        let (method, body) = ("/tenure.v1.Configs/Publish".to_owned(), request.encode_to_vec().into());
        v1::request::Call::Unary(v1::UnaryCall { method, body })
    };
    let mixed = vec![
        call(1, v1::request::Call::Get(get("k7"))),
        call(2, v1::request::Call::Get(get("missing"))),
        call(3, v1::request::Call::LockAcquire(acquire("l", holder))),
        call(4, v1::request::Call::Put(put("", "empty key"))),
        call(
            5,
            v1::request::Call::Range(v1::RangeRequest {
                key: "k4".to_owned(),
                prefix: true,
                count_only: true,
                ..Default::default()
            }),
        ),
        v1::Request { id: 6, call: None },
        // What looks at the state before it is planned does so beside the others.
        call(7, publish("flags", "1")),
        call(8, publish("", "no key")),
    ];
    requests.send(v1::Requests { requests: mixed }).await.unwrap();
    let mut seen = BTreeMap::new();
    while seen.len() < 8 {
        for reply in answers.message().await.unwrap().unwrap().replies {
            let shown = match reply.result.unwrap() {
                v1::reply::Result::Get(got) => got.record.unwrap().value,
                v1::reply::Result::Error(error) => error.code,
                v1::reply::Result::LockAcquire(grant) => format!("held by {}", grant.session == holder),
                v1::reply::Result::Range(range) => range.count.to_string(),
                v1::reply::Result::Unary(bytes) => v1::ConfigChangeReply::decode(bytes).unwrap().version.to_string(),
                other => panic!("{other:?}"),
            };
            seen.insert(reply.id, shown);
        }
    }
    let shown: Vec<_> = seen.values().map(String::as_str).collect();
    assert_eq!(shown, ["7", "NOT_FOUND", "held by true", "INVALID", "111", "INVALID", "1", "INVALID"]);
    drop(requests);
    assert!(answers.message().await.unwrap().is_none(), "an end from the client ends the stream");
    fixture.server.stop().await;
}

#[tokio::test]
async fn a_pipeline_that_is_closed_answers_what_is_open() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    KvClient::new(channel.clone()).put(put("large", &"v".repeat(100_000))).await.unwrap();
    let get = |id| {
        let get = v1::GetRequest { key: "large".to_owned(), ..Default::default() };
        v1::Request { id, call: Some(v1::request::Call::Get(get)) }
    };
    let requests = tokio_stream::once(v1::Requests { requests: (0..60).map(get).collect() });
    let mut answers = PipelineClient::new(channel).stream(requests).await.unwrap().into_inner();
    // More than waits on the way to a caller that does not read yet.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut answered = 0;
    while let Some(replies) = answers.message().await.unwrap() {
        answered += replies.replies.len();
    }
    assert_eq!(answered, 60);
    fixture.server.stop().await;
}

#[tokio::test]
async fn a_request_on_the_pipeline_is_as_large_as_alone() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let (large, half) = ("v".repeat(1_800_000), "v".repeat(900_000));
    let alone = KvClient::new(channel.clone()).put(put("k", &large)).await.unwrap_err();
    let call = |id, value: &str| v1::Request { id, call: Some(v1::request::Call::Put(put("k", value))) };
    let one = v1::UnaryCall { method: "/tenure.v1.Kv/Put".into(), body: put("k", &large).encode_to_vec().into() };
    let messages = [
        v1::Requests { requests: vec![call(1, &large)] },
        v1::Requests { requests: vec![call(2, &half), call(3, &half)] },
        v1::Requests { requests: vec![v1::Request { id: 4, call: Some(v1::request::Call::Unary(one)) }] },
    ];
    let mut answers = PipelineClient::new(channel).stream(tokio_stream::iter(messages)).await.unwrap().into_inner();
    let mut refused = BTreeMap::new();
    while let Some(replies) = answers.message().await.unwrap() {
        for reply in replies.replies {
            let Some(v1::reply::Result::Error(error)) = reply.result else { continue };
            refused.insert(reply.id, error);
        }
    }
    let expected = error(&alone);
    assert_eq!(expected.code, "TOO_LARGE");
    assert_eq!(refused, [(1, expected.clone()), (4, expected)].into());
    fixture.server.stop().await;
}

#[tokio::test]
async fn status() {
    let fixture = Fixture::start().await;
    let mut status = StatusClient::new(fixture.channel().await);
    let told = status.get(v1::StatusGetRequest {}).await.unwrap().into_inner();
    assert_eq!((told.name.as_str(), told.revision, told.leader), ("n0", 1, told.member_id));
    assert!(told.issuer_id.len() == 32 && told.alarms.is_empty() && told.db_bytes > 0);
    fixture.server.stop().await;
}

/// At the hard memory limit growth is refused, and deleting makes room.
#[tokio::test]
async fn growth_is_refused_when_memory_is_full() {
    let fixture = Fixture::start_with(|config| {
        config.memory_soft_limit = 1 << 20;
        config.memory_hard_limit = 1 << 20;
    })
    .await;
    let mut kv = KvClient::new(fixture.channel().await);
    let value = "x".repeat(100 << 10);
    let mut refused = None;
    for n in 0..30 {
        if let Err(status) = kv.put(put(&format!("k{n}"), &value)).await {
            refused = Some(status);
            break;
        }
    }
    let status = refused.expect("the limit is reached");
    let quota = error(&status);
    assert_eq!((status.code(), quota.code.as_str()), (Code::ResourceExhausted, "QUOTA"));
    assert_eq!(quota.outcome(), v1::Outcome::NotApplied);
    kv.delete(v1::DeleteRequest { key: "k".to_owned(), prefix: true, ..Default::default() }).await.unwrap();
    fixture.server.stop().await;
}

#[tokio::test]
async fn a_cancel_tells_only_the_grant_of_its_owner() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let (mut locks, mut sessions) = (LocksClient::new(channel.clone()), SessionsClient::new(channel));
    let session = session(&mut sessions).await;
    let held = v1::LockAcquireRequest { owner_id: "a".to_owned(), ..acquire("l", session) };
    let held = locks.acquire(held).await.unwrap().into_inner();
    let cancel = |owner: &str| v1::LockCancelRequest {
        name: "l".to_owned(),
        session,
        owner_id: owner.to_owned(),
        ..Default::default()
    };
    assert_eq!(error(&locks.cancel(cancel("b")).await.unwrap_err()).code, "NOT_FOUND");
    let told = locks.cancel(cancel("a")).await.unwrap().into_inner().result;
    let Some(v1::lock_cancel_reply::Result::Granted(grant)) = told else { panic!("{told:?}") };
    assert_eq!(grant.token, held.token);
}

#[tokio::test]
async fn what_is_wrong_with_an_acquire_is_named() {
    let fixture = Fixture::start().await;
    let channel = fixture.channel().await;
    let (mut locks, mut sessions) = (LocksClient::new(channel.clone()), SessionsClient::new(channel));
    let session = session(&mut sessions).await;
    let permits = i32::from(v1::LockMode::Permits);
    let wrong = [
        ("mode", v1::LockAcquireRequest { mode: 9, ..acquire("l", session) }),
        ("of", v1::LockAcquireRequest { mode: permits, permits: 1, ..acquire("l", session) }),
        ("of", v1::LockAcquireRequest { mode: permits, permits: 1, of: 10_001, ..acquire("l", session) }),
        ("permits", v1::LockAcquireRequest { mode: permits, of: 2, ..acquire("l", session) }),
        ("permits", v1::LockAcquireRequest { mode: permits, permits: 3, of: 2, ..acquire("l", session) }),
        ("permits", v1::LockAcquireRequest { permits: 3, of: 5, ..acquire("l", session) }),
        ("lock_delay_ms", v1::LockAcquireRequest { lock_delay_ms: 60_001, ..acquire("l", session) }),
        ("min_hold_ms", v1::LockAcquireRequest { min_hold_ms: 86_400_001, ..acquire("l", session) }),
        ("on_deadlock", v1::LockAcquireRequest { on_deadlock: 7, ..acquire("l", session) }),
        ("session", acquire("l", 0)),
    ];
    for (field, request) in wrong {
        let status = locks.acquire(request.clone()).await.unwrap_err();
        let refused = error(&status);
        assert_eq!((&refused.code[..], &refused.facts["field"][..]), ("INVALID", field), "{request:?}");
    }
    let many = |names: &[&str]| v1::LockAcquireManyRequest {
        locks: names.iter().map(|name| v1::LockItem { name: (*name).to_owned(), ..Default::default() }).collect(),
        session,
        ..Default::default()
    };
    for names in [&[][..], &["a", "a"], &["a", ""], &["x"; 65]] {
        assert_eq!(error(&locks.acquire_many(many(names)).await.unwrap_err()).code, "INVALID", "{names:?}");
    }
    let both = locks.acquire_many(many(&["b", "a"])).await.unwrap().into_inner();
    assert_eq!(both.locks.iter().map(|lock| &lock.name[..]).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(error(&locks.acquire_many(many(&["b", "c"])).await.unwrap_err()).code, "DEADLOCK");
    let force = |token: u64, reason: &str| v1::LockForceReleaseRequest {
        name: "a".to_owned(),
        expected_token: token,
        reason: reason.to_owned(),
        ..Default::default()
    };
    assert_eq!(error(&locks.force_release(force(0, "r")).await.unwrap_err()).code, "INVALID");
    assert_eq!(error(&locks.force_release(force(both.token, "")).await.unwrap_err()).code, "INVALID");
    assert_eq!(error(&locks.force_release(force(both.token + 1, "r")).await.unwrap_err()).code, "FENCED");
    assert_eq!(locks.force_release(force(both.token, "r")).await.unwrap().into_inner().taken, 1);
    let resize = |name: &str, of| v1::LockResizeRequest { name: name.to_owned(), of, ..Default::default() };
    assert_eq!(error(&locks.resize(resize("b", 0)).await.unwrap_err()).code, "INVALID");
    assert_eq!(error(&locks.resize(resize("b", 3)).await.unwrap_err()).code, "MISMATCH");
    assert_eq!(error(&locks.resize(resize("never", 3)).await.unwrap_err()).code, "NOT_FOUND");
}
