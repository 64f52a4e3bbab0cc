//! The client against a service that loses answers, breaks streams, falls silent and replays: what it tells its caller must be true.
//!
//! The service here is a script over a bare HTTP/2 connection, so that each fault happens exactly where the test wants it.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::future::IntoFuture as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use tenure_client::{BootTime, Client, ClientOptions, Code, Error, LeaseState, LostReason, Outcome, ServiceCheck};
use tenure_wire::etcd::etcdserverpb as pb;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::reply::Result as Reply;
use tenure_wire::tenure::v1::request::Call;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// What the scripted service does with a request.
enum Act {
    Answer(Reply),
    /// Answers after this time.
    Late(Duration, Reply),
    Silence,
    /// Closes the connection without an answer.
    Break,
}

type Script = Arc<Mutex<dyn FnMut(Call) -> Act + Send>>;

/// Serves until the test ends.
async fn serve(script: impl FnMut(Call) -> Act + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let script: Script = Arc::new(Mutex::new(script));
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(connection(socket, Arc::clone(&script)));
        }
    });
    address
}

async fn connection(socket: TcpStream, script: Script) {
    let mut connection = h2::server::handshake(socket).await.unwrap();
    let (break_off, mut broken) = mpsc::channel::<()>(1);
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    tokio::spawn(stream(request.into_body(), respond, Arc::clone(&script), break_off.clone()));
                }
                _ => return,
            },
            _ = broken.recv() => return,
        }
    }
}

async fn stream(
    mut body: h2::RecvStream,
    mut respond: h2::server::SendResponse<Bytes>,
    script: Script,
    break_off: mpsc::Sender<()>,
) {
    let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
    let send = Arc::new(Mutex::new(respond.send_response(head, false).unwrap()));
    let mut buffer = BytesMut::new();
    while let Some(Ok(chunk)) = body.data().await {
        body.flow_control().release_capacity(chunk.len()).unwrap();
        buffer.extend_from_slice(&chunk);
        while let Some(message) = next_message(&mut buffer) {
            for request in v1::Requests::decode(message).unwrap().requests {
                let act = script.lock().unwrap()(request.call.unwrap());
                match act {
                    Act::Answer(result) => answer(&send, request.id, result),
                    Act::Late(time, result) => {
                        let send = Arc::clone(&send);
                        tokio::spawn(async move {
                            tokio::time::sleep(time).await;
                            answer(&send, request.id, result);
                        });
                    }
                    Act::Silence => {}
                    Act::Break => break_off.send(()).await.unwrap(),
                }
            }
        }
    }
}

fn next_message(buffer: &mut BytesMut) -> Option<Bytes> {
    let len = usize::try_from(u32::from_be_bytes(buffer.get(1..5)?.try_into().unwrap())).unwrap();
    if buffer.len() < 5 + len {
        return None;
    }
    buffer.advance(5);
    Some(buffer.split_to(len).freeze())
}

fn answer(send: &Mutex<h2::SendStream<Bytes>>, id: u64, result: Reply) {
    let replies = v1::Replies { replies: vec![v1::Reply { id, result: Some(result) }], header: None };
    // The connection may be gone by then.
    let _ = send.lock().unwrap().send_data(frame(&replies), false);
}

fn frame(message: &impl Message) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).unwrap());
    message.encode(&mut frame).unwrap();
    frame.freeze()
}

/// A member that is stopped: the system takes connections for it, and nobody answers.
async fn frozen() -> (SocketAddr, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (listener.local_addr().unwrap(), listener)
}

/// Serves calls that do not go over the pipeline: the first answer by the path of the method. Streams stay open; where there is no answer the
/// connection breaks.
async fn serve_paths(script: fn(&str) -> Option<Bytes>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(socket).await.unwrap();
                let mut open = Vec::new();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let path = request.uri().path().to_owned();
                    let Some(answer) = script(&path) else { return };
                    let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
                    let mut send = respond.send_response(head, false).unwrap();
                    send.send_data(answer, false).unwrap();
                    if path.ends_with("/Watch") {
                        open.push((request, send));
                    } else {
                        send.send_trailers(http::HeaderMap::from_iter([(
                            http::HeaderName::from_static("grpc-status"),
                            http::HeaderValue::from_static("0"),
                        )]))
                        .unwrap();
                    }
                }
            });
        }
    });
    address
}

/// A member that serves them.
fn live(path: &str) -> Option<Bytes> {
    Some(match path {
        "/etcdserverpb.Watch/Watch" => frame(&pb::WatchResponse { created: true, ..Default::default() }),
        "/tenure.v1.Services/Watch" => frame(&v1::ServiceWatchReply { whole: true, index: 7, ..Default::default() }),
        "/tenure.v1.Queues/Get" => frame(&v1::QueueGetReply::default()),
        other => panic!("{other}"),
    })
}

fn put_reply(revision: u64, replayed: bool) -> Reply {
    Reply::Put(v1::PutReply { header: Some(v1::Header { revision, replayed, ..Default::default() }), prev: None })
}

fn refusal(code: &str, outcome: v1::Outcome) -> Reply {
    Reply::Error(v1::Error {
        code: code.to_owned(),
        message: code.to_owned(),
        outcome: outcome.into(),
        ..Default::default()
    })
}

fn created(ttl_ms: u64) -> Reply {
    Reply::SessionCreate(v1::SessionCreateReply { id: 5, token: 9, ttl_ms, remaining_ms: ttl_ms, header: None })
}

fn renewed(ttl_ms: u64) -> Reply {
    let renewal = v1::SessionRenewal { id: 5, token: 9, ttl_ms, remaining_ms: ttl_ms, ..Default::default() };
    Reply::SessionRenew(v1::SessionRenewReply { header: None, renewals: vec![renewal] })
}

fn client(addresses: &[SocketAddr], timeout_ms: u64) -> Client {
    let endpoints: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    Client::with_options(&endpoints, ClientOptions::default().timeout(Duration::from_millis(timeout_ms))).unwrap()
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_under_the_same_id() {
    let ids = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&ids);
    let address = serve(move |call| {
        let Call::Put(put) = call else { panic!("{call:?}") };
        let mut seen = seen.lock().unwrap();
        seen.push(put.request.unwrap());
        if seen.len() == 1 { Act::Break } else { Act::Answer(put_reply(7, true)) }
    })
    .await;
    let put = client(&[address], 5_000).put("k", "v").await.unwrap();
    assert_eq!((put.revision, put.replayed), (7, true));
    let ids = ids.lock().unwrap();
    assert_eq!((ids.len(), &ids[0]), (2, &ids[1]));
}

#[tokio::test]
async fn a_change_without_any_answer_is_unknown_and_a_read_is_unavailable() {
    let address = serve(|_| Act::Break).await;
    let client = client(&[address], 400);
    let change = client.put("k", "v").await.unwrap_err();
    assert!(matches!(change, Error::Unknown { .. }), "{change}");
    assert_eq!(change.outcome(), Outcome::Unknown);
    let read = client.get("k").await.unwrap_err();
    assert!(matches!(read, Error::Unavailable { .. }), "{read}");
}

#[tokio::test]
async fn a_service_that_cannot_be_reached_was_never_asked() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = client(&[nobody], 300).put("k", "v").await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains(&nobody.to_string()), "{error}");
    assert!(Client::connect([nobody.to_string()]).await.is_err());
}

#[tokio::test]
async fn no_quorum_moves_on_to_the_next_endpoint() {
    let minority = serve(|_| Act::Answer(refusal("NO_QUORUM", v1::Outcome::NotApplied))).await;
    let majority = serve(|_| Act::Answer(put_reply(3, false))).await;
    assert_eq!(client(&[minority, majority], 5_000).put("k", "v").await.unwrap().revision, 3);
    let error = client(&[minority], 300).put("k", "v").await.unwrap_err();
    assert!(matches!(error, Error::NotApplied { .. }), "{error}");
}

#[tokio::test]
async fn a_silent_member_is_given_up_for_the_next_one() {
    let silent = serve(|_| Act::Silence).await;
    let live = serve(|_| Act::Answer(put_reply(3, false))).await;
    assert_eq!(client(&[silent, live], 3_000).put("k", "v").await.unwrap().revision, 3);
}

#[tokio::test]
async fn a_refusal_carries_its_facts() {
    let address = serve(|_| {
        let facts =
            [("presented", "812"), ("newest", "900"), ("token", "900"), ("holder_session", "77"), ("holder", "b")];
        Act::Answer(Reply::Error(v1::Error {
            code: "FENCED".to_owned(),
            facts: facts.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            outcome: v1::Outcome::NotApplied.into(),
            ..Default::default()
        }))
    })
    .await;
    let error = client(&[address], 1_000).put("k", "v").require_lock(("l", 812)).await.unwrap_err();
    let problem = error.problem().unwrap();
    assert_eq!((problem.code, problem.presented, problem.newest), (Code::Fenced, Some(812), Some(900)));
    let holder = problem.holder.as_ref().unwrap();
    assert_eq!((holder.token, holder.session, holder.owner.as_str()), (900, 77, "b"));
    assert!(!error.retryable());
}

#[tokio::test]
async fn many_callers_share_a_stream_and_each_gets_its_own_answer() {
    let address = serve(|call| match call {
        // Out of order: the answer says which key it is for.
        Call::Get(get) => {
            let number: u64 = std::str::from_utf8(&get.key_bytes).unwrap().parse().unwrap();
            let record = v1::Record { key: number.to_string(), mod_revision: number, ..Default::default() };
            Act::Late(
                Duration::from_millis(number % 7),
                Reply::Get(v1::GetReply { header: None, record: Some(record) }),
            )
        }
        _ => Act::Silence,
    })
    .await;
    let client = client(&[address], 5_000);
    let tasks: Vec<_> = (0..500_u64)
        .map(|number| {
            let client = client.clone();
            tokio::spawn(async move { client.get(number.to_string()).await.unwrap().unwrap().mod_revision == number })
        })
        .collect();
    for task in tasks {
        assert!(task.await.unwrap());
    }
}

#[tokio::test]
async fn a_replayed_create_does_not_lengthen_the_deadline() {
    let mut tries = 0;
    let address = serve(move |call| match call {
        Call::SessionCreate(_) => {
            tries += 1;
            // The first try was accepted, and its answer is lost.
            if tries == 1 { Act::Silence } else { Act::Answer(created(10_000)) }
        }
        _ => Act::Silence,
    })
    .await;
    let before = BootTime::now();
    let session = client(&[address], 3_000).session().ttl(Duration::from_secs(10)).await.unwrap();
    assert!(BootTime::now().since(before) > Duration::from_millis(900), "the first try timed out");
    let usable = session.deadline().since(before);
    assert!(usable < Duration::from_millis(8_950), "counted from the first try: {usable:?}");
}

#[tokio::test]
async fn a_session_that_cannot_be_renewed_is_lost_at_its_own_deadline() {
    let address = serve(|call| match call {
        Call::SessionCreate(_) => Act::Answer(created(1_000)),
        _ => Act::Silence,
    })
    .await;
    let before = BootTime::now();
    let session = client(&[address], 5_000).session().ttl(Duration::from_secs(1)).await.unwrap();
    assert_eq!(session.state(), LeaseState::Safe);
    let mut states = session.states();
    let reason = tokio::time::timeout(Duration::from_secs(3), session.lost()).await.unwrap();
    assert!(matches!(reason, LostReason::DeadlinePassed { .. }), "{reason}");
    let after = BootTime::now().since(before);
    assert!(after >= Duration::from_millis(780) && after < Duration::from_millis(950), "{after:?}");
    assert!(matches!(session.check(), Err(Error::Lost(_))));
    assert_eq!(*states.borrow_and_update(), LeaseState::Lost);
    // Told exactly once: there is no further change.
    assert!(tokio::time::timeout(Duration::from_millis(100), states.changed()).await.is_err());
    assert!(matches!(session.lock("l").await, Err(Error::Lost(_))), "nothing is asked for under a lost session");
}

#[tokio::test]
async fn renewals_keep_a_session_and_the_word_of_the_service_ends_it() {
    let mut renewals = 0;
    let address = serve(move |call| match call {
        Call::SessionCreate(_) => Act::Answer(created(1_000)),
        Call::SessionRenew(_) => {
            renewals += 1;
            if renewals <= 5 {
                Act::Answer(renewed(1_000))
            } else {
                Act::Answer(refusal("SESSION_EXPIRED", v1::Outcome::NotApplied))
            }
        }
        _ => Act::Silence,
    })
    .await;
    let before = BootTime::now();
    let session = client(&[address], 5_000).session().ttl(Duration::from_secs(1)).await.unwrap();
    assert_eq!(session.lost().await, LostReason::EndedByServer);
    let lived = BootTime::now().since(before);
    assert!(lived > Duration::from_millis(1_500), "five renewals of a third of a second: {lived:?}");
}

/// A lock service that answers an acquire only after it was cancelled, as a grant that crossed the cancel.
#[tokio::test]
async fn a_grant_to_a_caller_that_left_is_given_back() {
    let (told, mut released) = mpsc::unbounded_channel();
    let address = serve(move |call| match call {
        Call::SessionCreate(_) => Act::Answer(created(10_000)),
        Call::LockCancel(_) => {
            let granted = v1::LockAcquireReply { token: 41, session: 5, ..Default::default() };
            let result = Some(v1::lock_cancel_reply::Result::Granted(granted));
            Act::Answer(Reply::LockCancel(v1::LockCancelReply { header: None, result }))
        }
        Call::LockRelease(release) => {
            told.send(release.token).unwrap();
            Act::Answer(Reply::LockRelease(v1::LockReleaseReply::default()))
        }
        _ => Act::Silence,
    })
    .await;
    let session = client(&[address], 5_000).session().ttl(Duration::from_secs(10)).await.unwrap();
    let waiting =
        tokio::time::timeout(Duration::from_millis(100), session.lock("l").wait(Duration::from_secs(30)).into_future());
    assert!(waiting.await.is_err());
    assert_eq!(tokio::time::timeout(Duration::from_secs(2), released.recv()).await.unwrap(), Some(41));
}

#[tokio::test]
async fn a_waiting_acquire_survives_a_broken_stream_with_its_id_and_owner() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let address = serve(move |call| match call {
        Call::SessionCreate(_) => Act::Answer(created(10_000)),
        Call::LockAcquire(acquire) => {
            let mut seen = seen.lock().unwrap();
            seen.push(acquire);
            match seen.len() {
                1 => Act::Break,
                _ => {
                    Act::Answer(Reply::LockAcquire(v1::LockAcquireReply { token: 8, session: 5, ..Default::default() }))
                }
            }
        }
        Call::LockRelease(_) => Act::Answer(Reply::LockRelease(v1::LockReleaseReply::default())),
        _ => Act::Silence,
    })
    .await;
    let session = client(&[address], 5_000).session().ttl(Duration::from_secs(10)).await.unwrap();
    let guard = session.lock("l").wait(Duration::from_secs(5)).await.unwrap();
    assert_eq!(guard.token(), 8);
    guard.release().await.unwrap();
    let asked = asked.lock().unwrap();
    assert_eq!((asked.len(), &asked[0]), (2, &asked[1]), "the whole request is the same, or its digest would not be");
}

#[tokio::test]
async fn guards_of_one_session_are_owners_of_their_own() {
    let owners = Arc::new(Mutex::new(HashSet::new()));
    let seen = Arc::clone(&owners);
    let address = serve(move |call| match call {
        Call::SessionCreate(_) => Act::Answer(created(10_000)),
        Call::LockAcquire(acquire) => {
            seen.lock().unwrap().insert(acquire.owner_id);
            Act::Answer(refusal("HELD", v1::Outcome::NotApplied))
        }
        _ => Act::Silence,
    })
    .await;
    let session = client(&[address], 5_000).session().ttl(Duration::from_secs(10)).await.unwrap();
    for _ in 0..2 {
        assert_eq!(session.lock("l").await.unwrap_err().code(), Some(Code::Held));
    }
    assert_eq!(owners.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_read_goes_past_a_frozen_member_and_then_begins_behind_it() {
    let ((stopped, _held), live) = (frozen().await, serve_paths(live).await);
    let client = client(&[stopped, live], 3_000);
    client.queue("q").info().await.unwrap();
    let before = Instant::now();
    client.queue("q").info().await.unwrap();
    assert!(before.elapsed() < Duration::from_millis(800), "asked the frozen one again: {:?}", before.elapsed());
}

#[tokio::test]
async fn a_watch_and_a_cache_go_past_a_frozen_member() {
    let ((stopped, _held), live) = (frozen().await, serve_paths(live).await);
    client(&[stopped, live], 3_000).watch("k").await.unwrap();
    let followed = client(&[stopped, live], 3_000).registry().follow("web").await.unwrap();
    assert_eq!(followed.now().index, 7);
}

#[tokio::test]
async fn a_read_goes_on_where_the_connection_broke_under_it() {
    let (killed, live) = (serve_paths(|_| None).await, serve_paths(live).await);
    client(&[killed, live], 3_000).queue("q").info().await.unwrap();
    let error = client(&[killed], 300).queue("q").info().await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
}

/// A registration is lapsed, made anew without an answer, and found again under the id of that try: it is nobody else's.
#[tokio::test]
async fn a_registration_made_anew_without_an_answer_is_not_taken_for_somebody_elses() {
    let registered = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&registered);
    let (told, mut beats) = mpsc::unbounded_channel();
    let unary = |message: &dyn Fn(&mut BytesMut)| {
        let mut body = BytesMut::new();
        message(&mut body);
        Act::Answer(Reply::Unary(body.freeze()))
    };
    let address = serve(move |call| {
        let Call::Unary(call) = call else { panic!("{call:?}") };
        let mut seen = seen.lock().unwrap();
        match call.method.as_str() {
            "/tenure.v1.Services/Register" => {
                seen.push(v1::ServiceRegisterRequest::decode(call.body).unwrap().request.unwrap());
                let token = [5, 0, 9][seen.len() - 1];
                if token == 0 {
                    return Act::Silence;
                }
                let reply = v1::ServiceRegisterReply { token, ..Default::default() };
                unary(&|body| reply.encode(body).unwrap())
            }
            "/tenure.v1.Services/Heartbeat" => {
                let token = v1::ServiceHeartbeatRequest::decode(call.body).unwrap().token;
                match (seen.len(), token) {
                    (1, 5) => Act::Answer(refusal("NOT_FOUND", v1::Outcome::NotApplied)),
                    (_, 9) => {
                        told.send(()).unwrap();
                        unary(&|body| v1::ServiceHeartbeatReply::default().encode(body).unwrap())
                    }
                    _ => Act::Answer(refusal("FENCED", v1::Outcome::NotApplied)),
                }
            }
            _ => Act::Silence,
        }
    })
    .await;
    let registry = client(&[address], 5_000).registry();
    let check = ServiceCheck::ttl(Duration::from_millis(600));
    let kept = registry.register("web", "a", "10.0.0.1", 80).check(check).await.unwrap();
    tokio::select! {
        () = kept.replaced() => panic!("its own registration was taken for somebody else's"),
        beat = tokio::time::timeout(Duration::from_secs(5), beats.recv()) => beat.unwrap().unwrap(),
    }
    assert_eq!(kept.token(), 9);
    let registered = registered.lock().unwrap();
    assert_eq!(registered.len(), 3);
    assert_eq!(registered[1].id, registered[2].id);
}
