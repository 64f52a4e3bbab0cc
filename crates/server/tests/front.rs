//! The front against real clients and raw sockets, with a small fake service behind it.
//!
//! Each test runs its own front on a free port of loopback.
#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Request, Response};
use prost::Message;
use serde_json::{Value, json};
use tenure_server::front::{Front, FrontConfig};
use tenure_server::metrics::Exposition;
use tenure_server::pages::{Check, CheckFuture, Health};
use tenure_server::rpc::{Code, Face, Router, Status, frame};
use tenure_wire::etcd::etcdserverpb as pb;
use tenure_wire::etcd::mvccpb::KeyValue;
use tenure_wire::tenure::v1;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

// ---- the fake service ----

#[derive(Default)]
struct Seen {
    dropped: AtomicU64,
    flooded: AtomicU64,
}

struct CountDrop(Arc<Seen>);

impl Drop for CountDrop {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

fn put(seen: &Arc<Seen>, message: &Bytes) -> Result<Result<Bytes, CountDrop>, Status> {
    let request = pb::PutRequest::decode(message.clone()).map_err(|error| Status::undecodable(&error))?;
    match &request.key[..] {
        b"" => Err(Status::invalid_argument("etcdserver: key is not provided")),
        b"odd" => Err(Status::new(Code::Internal, "50% of \u{fc}ber\n")),
        b"never" => Ok(Err(CountDrop(seen.clone()))),
        _ => {
            let prev_kv = KeyValue { key: request.key, value: request.value, ..KeyValue::default() };
            let header = pb::ResponseHeader { revision: 7, ..Default::default() };
            let reply = pb::PutResponse { header: Some(header), prev_kv: request.prev_kv.then_some(prev_kv) };
            Ok(Ok(reply.encode_to_vec().into()))
        }
    }
}

fn watch_reply(revision: i64, created: bool) -> Bytes {
    let header = Some(pb::ResponseHeader { revision, ..Default::default() });
    pb::WatchResponse { header, created, ..Default::default() }.encode_to_vec().into()
}

fn held() -> Status {
    let facts = [("name".to_owned(), "held".to_owned()), ("token".to_owned(), "42".to_owned())].into();
    let problem = v1::Error {
        code: "HELD".into(),
        message: "`held` is held by another".into(),
        retryable: true,
        outcome: v1::Outcome::NotApplied.into(),
        retry_after_ms: 1500,
        facts,
        current: None,
    };
    let mut status = Status::new(Code::Aborted, problem.message.clone());
    status.problem = Some(Box::new(problem));
    status.details = Bytes::from_static(b"\x08\x0a");
    status
}

fn services(seen: &Arc<Seen>) -> Router {
    let mut router = Router::new();
    let shared = seen.clone();
    router.unary("/etcdserverpb.KV/Put", move |_, message| {
        let outcome = put(&shared, &message);
        async move {
            match outcome? {
                Ok(reply) => Ok(reply),
                Err(guard) => {
                    std::future::pending::<()>().await;
                    drop(guard);
                    Ok(Bytes::new())
                }
            }
        }
    });
    router.unary("/etcdserverpb.KV/Range", |_, message: Bytes| async move {
        let request = pb::RangeRequest::decode(message).map_err(|error| Status::undecodable(&error))?;
        let kv = KeyValue { value: vec![b'v'; 1024].into(), ..KeyValue::default() };
        let kvs = vec![kv; usize::try_from(request.limit).unwrap_or(0)];
        Ok(pb::RangeResponse { kvs, ..Default::default() }.encode_to_vec().into())
    });
    let shared = seen.clone();
    router.stream("/etcdserverpb.Watch/Watch", move |call, mut incoming, outgoing| {
        let seen = shared.clone();
        async move {
            let mut revision = 0;
            while let Some(message) = incoming.next().await {
                let request = pb::WatchRequest::decode(message?).map_err(|error| Status::undecodable(&error))?;
                let Some(pb::watch_request::RequestUnion::CreateRequest(create)) = request.request_union else {
                    return Err(Status::invalid_argument("only creates"));
                };
                if create.key == "refuse" {
                    return Err(Status::new(Code::PermissionDenied, "etcdserver: permission denied"));
                }
                revision += 1;
                let _ = outgoing.send(watch_reply(revision, true)).await;
                loop {
                    if create.key != "flood" {
                        break;
                    }
                    let big = pb::WatchResponse { cancel_reason: "x".repeat(64 << 10), ..Default::default() };
                    if outgoing.send(big.encode_to_vec().into()).await.is_err() {
                        break;
                    }
                    seen.flooded.fetch_add(64 << 10, Ordering::SeqCst);
                }
                if create.key == "later" {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    let _ = outgoing.send(watch_reply(99, false)).await;
                }
                if create.key == "fail" {
                    return Err(Status::new(Code::Unavailable, "etcdserver: no leader"));
                }
            }
            assert_eq!(call.face, Face::Grpc, "a watch over HTTP has no end of requests");
            Ok(())
        }
    });
    router.stream("/etcdserverpb.Lease/LeaseKeepAlive", |_, mut incoming, outgoing| async move {
        let mut framed = BytesMut::new();
        while let Some(message) = incoming.next().await {
            let mut next = Some(message);
            let mut ttl = 0;
            // What arrived together is answered together.
            while let Some(message) = next {
                let request =
                    pb::LeaseKeepAliveRequest::decode(message?).map_err(|error| Status::undecodable(&error))?;
                ttl += 1;
                frame(
                    &pb::LeaseKeepAliveResponse { id: request.id, ttl, ..Default::default() }.encode_to_vec(),
                    &mut framed,
                );
                next = incoming.try_next_ready();
            }
            let _ = outgoing.send_framed(framed.split().freeze()).await;
        }
        Ok(())
    });
    router.unary("/tenure.v1.Locks/Acquire", |_, message: Bytes| async move {
        let request = v1::LockAcquireRequest::decode(message).map_err(|error| Status::undecodable(&error))?;
        if request.name == "held" {
            return Err(held());
        }
        let replayed = request.request.is_some();
        let header = Some(v1::Header { revision: 1 << 60, replayed, ..Default::default() });
        Ok(v1::LockAcquireReply { header, token: 1 << 60, ..Default::default() }.encode_to_vec().into())
    });
    router.unary("/tenure.v1.Locks/Get", |_, message: Bytes| async move {
        let request = v1::LockGetRequest::decode(message).map_err(|error| Status::undecodable(&error))?;
        let lock = v1::Lock { name: request.name, waiter_count: request.waiters_limit.into(), ..Default::default() };
        Ok(v1::LockGetReply { lock: Some(lock), ..Default::default() }.encode_to_vec().into())
    });
    router.unary("/tenure.v1.Kv/Put", |_, message: Bytes| async move {
        let request = v1::PutRequest::decode(message).map_err(|error| Status::undecodable(&error))?;
        let uuid = match request.request.and_then(|meta| meta.id) {
            Some(v1::request_meta::Id::Uuid(uuid)) => uuid,
            _ => String::new(),
        };
        let prev = Some(v1::Record { value: uuid, ..Default::default() });
        Ok(v1::PutReply { prev, ..Default::default() }.encode_to_vec().into())
    });
    router
}

struct FakeHealth {
    ready: bool,
}

impl Health for FakeHealth {
    fn checks(&self) -> &'static [Check] {
        &[
            Check { name: "serializable_read", live: true, ready: true },
            Check { name: "linearizable_read", live: false, ready: true },
        ]
    }

    fn run(&self, name: &'static str) -> CheckFuture<'_> {
        let ready = self.ready || name != "linearizable_read";
        Box::pin(async move { if ready { Ok(()) } else { Err("etcdserver: no leader".into()) } })
    }

    fn health(&self, serializable: bool, excluded: &[String]) -> CheckFuture<'_> {
        let well = self.ready || serializable || excluded.iter().any(|alarm| alarm == "NOSPACE");
        Box::pin(async move { if well { Ok(()) } else { Err("ALARM NOSPACE".into()) } })
    }

    fn metrics(&self, out: &mut Exposition) {
        out.gauge("etcd_server_has_leader", "Whether or not a leader exists.", &[], 1.0);
    }
}

struct Running {
    address: SocketAddr,
    seen: Arc<Seen>,
    stop: Option<oneshot::Sender<()>>,
    served: tokio::task::JoinHandle<std::io::Result<()>>,
}

async fn start() -> Running {
    start_with(FrontConfig::default(), true).await
}

async fn start_with(config: FrontConfig, ready: bool) -> Running {
    let seen = Arc::new(Seen::default());
    let front = Front::new(services(&seen), Arc::new(FakeHealth { ready }), config).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(async move {
        front
            .serve(listener, async {
                let _ = stopped.await;
            })
            .await
    });
    Running { address, seen, stop: Some(stop), served }
}

// ---- clients ----

async fn h2_client(address: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    client.ready().await.unwrap()
}

fn grpc_request(path: &str) -> Request<()> {
    Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap()
}

fn framed(message: &impl Message) -> Bytes {
    let mut out = BytesMut::new();
    frame(&message.encode_to_vec(), &mut out);
    out.freeze()
}

struct Answer {
    head: Response<()>,
    data: Bytes,
    trailers: HeaderMap,
}

impl Answer {
    fn status(&self) -> (String, String) {
        let from = if self.head.headers().contains_key("grpc-status") { self.head.headers() } else { &self.trailers };
        let text = |name| from.get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default();
        (text("grpc-status"), text("grpc-message"))
    }

    fn message<M: Message + Default>(&self) -> M {
        M::decode(&self.data[5..]).unwrap()
    }
}

async fn finish(response: Response<h2::RecvStream>) -> Answer {
    let (head, mut body) = response.into_parts();
    let mut data = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.unwrap();
        body.flow_control().release_capacity(chunk.len()).unwrap();
        data.extend_from_slice(&chunk);
    }
    let trailers = body.trailers().await.unwrap().unwrap_or_default();
    Answer { head: Response::from_parts(head, ()), data: data.freeze(), trailers }
}

async fn call(client: &mut SendRequest<Bytes>, request: Request<()>, body: Bytes) -> Answer {
    let (response, mut send) = client.send_request(request, false).unwrap();
    send.send_data(body, true).unwrap();
    finish(response.await.unwrap()).await
}

fn put_of(key: &'static str) -> pb::PutRequest {
    pb::PutRequest { key: key.into(), value: "v".into(), prev_kv: true, ..Default::default() }
}

fn create_of(key: &'static str) -> pb::WatchRequest {
    let create = pb::WatchCreateRequest { key: key.into(), ..Default::default() };
    pb::WatchRequest { request_union: Some(pb::watch_request::RequestUnion::CreateRequest(create)) }
}

/// One request over HTTP/1.1: status, headers in small letters, body.
async fn http1(address: SocketAddr, verb: &str, path: &str, headers: &str, body: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let len = body.len();
    let text = format!(
        "{verb} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}content-length: {len}\r\n\r\n{body}"
    );
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_ascii_lowercase(), body.to_owned())
}

async fn json_call(address: SocketAddr, path: &str, body: &str) -> (u16, Value) {
    let (status, _, body) = http1(address, "POST", path, "", body).await;
    (status, serde_json::from_str(&body).unwrap())
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("never: {what}");
}

// ---- gRPC ----

#[tokio::test]
async fn unary_calls_of_a_real_client() {
    let server = start().await;
    let channel =
        tonic::transport::Endpoint::new(format!("http://{}", server.address)).unwrap().connect().await.unwrap();
    let mut client = pb::kv_client::KvClient::new(channel);
    let reply = client.put(put_of("k")).await.unwrap().into_inner();
    assert_eq!(reply.prev_kv.unwrap().value, "v");
    let status = client.put(put_of("")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (tonic::Code::InvalidArgument, "etcdserver: key is not provided"));
    let status = client.put(put_of("odd")).await.unwrap_err();
    assert_eq!(status.message(), "50% of \u{fc}ber\n");
    // An answer of 8 MiB passes the windows of the client.
    let mut client = client.max_decoding_message_size(64 << 20);
    let reply = client.range(pb::RangeRequest { limit: 8192, ..Default::default() }).await.unwrap().into_inner();
    assert_eq!(reply.kvs.len(), 8192);
    let status = client.txn(pb::TxnRequest::default()).await.unwrap_err();
    assert_eq!(status.message(), "unknown method Txn for service etcdserverpb.KV");
    assert_eq!(status.code(), tonic::Code::Unimplemented);
}

#[tokio::test]
async fn streams_of_a_real_client() {
    let server = start().await;
    let channel =
        tonic::transport::Endpoint::new(format!("http://{}", server.address)).unwrap().connect().await.unwrap();
    let mut client = pb::lease_client::LeaseClient::new(channel);
    let requests = (1..=100).map(|id| pb::LeaseKeepAliveRequest { id });
    let mut replies = client.lease_keep_alive(tokio_stream::iter(requests)).await.unwrap().into_inner();
    for id in 1..=100 {
        assert_eq!(replies.message().await.unwrap().unwrap().id, id);
    }
    assert!(replies.message().await.unwrap().is_none());
}

#[tokio::test]
async fn refusals_are_one_frame_and_carry_details() {
    let server = start().await;
    let mut client = h2_client(server.address).await;
    let request = v1::LockAcquireRequest { name: "held".into(), ..Default::default() };
    let answer = call(&mut client, grpc_request("/tenure.v1.Locks/Acquire"), framed(&request)).await;
    assert_eq!(answer.status(), ("10".into(), "`held` is held by another".into()));
    assert_eq!(answer.head.headers()["grpc-status-details-bin"], "CAo");
    assert!(answer.trailers.is_empty() && answer.data.is_empty());
    let answer = call(&mut client, grpc_request("/no.such.Service/Do"), Bytes::new()).await;
    assert_eq!(answer.status(), ("12".into(), "unknown service no.such.Service".into()));
    let answer = call(&mut client, grpc_request("/grpc.no.Such/Do"), Bytes::new()).await;
    assert_eq!(answer.status(), ("12".into(), "unknown service grpc.no.Such".into()));
}

#[tokio::test]
async fn bad_messages_are_refused() {
    let server = start().await;
    let mut client = h2_client(server.address).await;
    let path = "/etcdserverpb.KV/Put";
    let mut check = async |body: Vec<u8>, expected: (&str, &str)| {
        let answer = call(&mut client, grpc_request(path), body.into()).await;
        assert_eq!(answer.status(), (expected.0.into(), expected.1.into()));
    };
    check(vec![], ("13", "EOF")).await;
    check(vec![0, 0, 0], ("13", "unexpected EOF")).await;
    check(vec![0, 0, 0, 0, 9, 1], ("13", "unexpected EOF")).await;
    check(vec![7, 0, 0, 0, 0], ("13", "grpc: received unexpected payload format 7")).await;
    check(vec![1, 0, 0, 0, 0], ("12", "grpc: compressed messages are not supported by this server")).await;
    let oversize = [0, 0x7f, 0xff, 0xff, 0xff].to_vec();
    check(oversize, ("8", "grpc: received message larger than max (2147483647 vs. 2097152)")).await;
    let two = [framed(&put_of("a")), framed(&put_of("b"))].concat();
    check(two, ("13", "grpc: a unary call got more than one request message")).await;
    let answer = call(&mut client, grpc_request(path), Bytes::from_static(&[0, 0, 0, 0, 2, 0x0a, 0x7f])).await;
    assert_eq!(answer.status().0, "13");
    // The connection still serves.
    let answer = call(&mut client, grpc_request(path), framed(&put_of("k"))).await;
    assert_eq!(answer.message::<pb::PutResponse>().header.unwrap().revision, 7);
}

#[tokio::test]
async fn a_whole_request_of_the_largest_size_is_read() {
    let server = start().await;
    let mut client = h2_client(server.address).await;
    // More than one stream's window: it is lent again while the message is incomplete.
    let value = vec![b'x'; (2 << 20) - 100];
    let request = pb::PutRequest { key: "k".into(), value: value.into(), ..Default::default() };
    let answer = call(&mut client, grpc_request("/etcdserverpb.KV/Put"), framed(&request)).await;
    assert_eq!(answer.status().0, "0");
}

#[tokio::test]
async fn wrong_content_types_encodings_and_timeouts() {
    let server = start().await;
    let mut client = h2_client(server.address).await;
    let path = "http://localhost/etcdserverpb.KV/Put";
    for kind in ["application/json", "application/grpc-web", "application/grpcx"] {
        let request = Request::post(path).header("content-type", kind).body(()).unwrap();
        assert_eq!(call(&mut client, request, Bytes::new()).await.head.status(), 415, "{kind}");
    }
    let request = Request::post(path).header("content-type", "application/grpc+proto").body(()).unwrap();
    assert_eq!(call(&mut client, request, framed(&put_of("k"))).await.status().0, "0");
    let mut request = grpc_request("/etcdserverpb.KV/Put");
    request.headers_mut().insert("grpc-encoding", "gzip".parse().unwrap());
    let answer = call(&mut client, request, framed(&put_of("k"))).await;
    assert_eq!(answer.status(), ("12".into(), "grpc: Decompressor is not installed for grpc-encoding \"gzip\"".into()));
    let mut request = grpc_request("/etcdserverpb.KV/Put");
    request.headers_mut().insert("grpc-timeout", "soon".parse().unwrap());
    assert_eq!(call(&mut client, request, framed(&put_of("k"))).await.status().1, "malformed grpc-timeout");
    let mut request = grpc_request("/etcdserverpb.KV/Put");
    request.headers_mut().insert("grpc-timeout", "20m".parse().unwrap());
    let answer = call(&mut client, request, framed(&put_of("never"))).await;
    assert_eq!(answer.status(), ("4".into(), "context deadline exceeded".into()));
    assert_eq!(server.seen.dropped.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_reset_or_a_lost_connection_drops_the_call() {
    let server = start().await;
    let mut client = h2_client(server.address).await;
    let (_response, mut send) = client.send_request(grpc_request("/etcdserverpb.KV/Put"), false).unwrap();
    send.send_data(framed(&put_of("never")), true).unwrap();
    // Another call goes on beside it.
    let answer = call(&mut client, grpc_request("/etcdserverpb.KV/Put"), framed(&put_of("k"))).await;
    assert_eq!(answer.status().0, "0");
    send.send_reset(h2::Reason::CANCEL);
    until("the call is dropped", || server.seen.dropped.load(Ordering::SeqCst) == 1).await;

    let stream = TcpStream::connect(server.address).await.unwrap();
    let (client, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut client: SendRequest<Bytes> = client.ready().await.unwrap();
    let (_response, mut send) = client.send_request(grpc_request("/etcdserverpb.KV/Put"), false).unwrap();
    send.send_data(framed(&put_of("never")), true).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    connection.abort();
    until("the call is dropped with its connection", || server.seen.dropped.load(Ordering::SeqCst) == 2).await;
}

#[tokio::test]
async fn a_slow_reader_is_bounded_and_delays_nobody() {
    let server = start().await;
    // The window of the connection is larger than that of a stream, as with every gRPC client; else HTTP/2 itself would stall.
    let stream = TcpStream::connect(server.address).await.unwrap();
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(64 << 10).initial_connection_window_size(1 << 20);
    let (client, connection) = builder.handshake::<_, Bytes>(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let (response, mut send) = client.send_request(grpc_request("/etcdserverpb.Watch/Watch"), false).unwrap();
    send.send_data(framed(&create_of("flood")), false).unwrap();
    let response = response.await.unwrap();
    // Nothing of it is read: the sender stops at its limit, and the peer's window and the buffer of the stream.
    let flooded = || server.seen.flooded.load(Ordering::SeqCst);
    until("the flood begins", || flooded() > 512 << 10).await;
    let mut before = 0;
    while before != flooded() {
        before = flooded();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(before < 2 << 20, "{before} bytes were accepted for a reader that does not read");
    // Other calls of the connection are answered meanwhile.
    for _ in 0..20 {
        let answer = call(&mut client, grpc_request("/etcdserverpb.KV/Put"), framed(&put_of("k"))).await;
        assert_eq!(answer.status().0, "0");
    }
    // Reading moves the sender on; leaving ends it.
    let mut body = response.into_body();
    let mut read = 0;
    while read < 4 << 20 {
        let data = body.data().await.unwrap().unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        read += data.len();
    }
    assert!(flooded() > before);
}

#[tokio::test]
async fn headers_come_before_the_first_message() {
    let server = start().await;
    let mut client = h2_client(server.address).await;
    // The client sends no message before it has the headers.
    let (response, mut send) = client.send_request(grpc_request("/etcdserverpb.Watch/Watch"), false).unwrap();
    let response = tokio::time::timeout(Duration::from_secs(5), response).await.unwrap().unwrap();
    send.send_data(framed(&create_of("refuse")), false).unwrap();
    let answer = finish(response).await;
    assert_eq!(answer.status(), ("7".into(), "etcdserver: permission denied".into()));
}

#[tokio::test]
async fn garbage_and_silence_end_the_connection() {
    let config = FrontConfig {
        header_timeout: Duration::from_millis(200),
        keepalive_interval: Duration::from_millis(200),
        keepalive_timeout: Duration::from_millis(200),
        ..FrontConfig::default()
    };
    let server = start_with(config, true).await;
    let ends = async |bytes: &[u8]| {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer)).await;
        assert!(end.is_ok(), "still open after {bytes:?}");
        answer
    };
    assert!(ends(b"").await.is_empty());
    assert!(ends(b"PRI * HT").await.is_empty());
    // Half a request, and no request at all after the preface: the second never answers the ping.
    ends(b"GET / HTTP/1.1\r\nhost").await;
    ends(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    assert!(ends(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n").await.starts_with(b"HTTP/1.1 400"));
    ends(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense that is no frame at all").await;
    // A live client that answers pings is kept.
    let mut client = h2_client(server.address).await;
    tokio::time::sleep(Duration::from_millis(900)).await;
    let answer = call(&mut client, grpc_request("/etcdserverpb.KV/Put"), framed(&put_of("k"))).await;
    assert_eq!(answer.status().0, "0");
}

#[tokio::test]
async fn a_stop_lets_calls_finish_and_ends_streams() {
    let config = FrontConfig { stop_grace: Duration::from_secs(5), ..FrontConfig::default() };
    let mut server = start_with(config, true).await;
    let mut client = h2_client(server.address).await;
    let (response, mut send) = client.send_request(grpc_request("/etcdserverpb.Watch/Watch"), false).unwrap();
    send.send_data(framed(&create_of("quiet")), false).unwrap();
    let watch = response.await.unwrap();
    let mut line = TcpStream::connect(server.address).await.unwrap();
    let body = r#"{"create_request":{"key":"YQ=="}}"#;
    let request = format!("POST /v3/watch HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    line.write_all(request.as_bytes()).await.unwrap();
    let mut start = [0; 64];
    line.read_exact(&mut start).await.unwrap();
    let idle = TcpStream::connect(server.address).await.unwrap();

    server.stop.take().unwrap().send(()).unwrap();
    let answer = finish(watch).await;
    assert_eq!(answer.status(), ("14".into(), "etcdserver: server stopped".into()));
    let mut rest = String::new();
    line.read_to_string(&mut rest).await.unwrap();
    assert!(rest.contains(r#""code":14"#), "{rest}");
    drop(idle);
    let stopped = tokio::time::timeout(Duration::from_secs(2), server.served).await;
    stopped.expect("no connection holds the stop up").unwrap().unwrap();
}

// ---- JSON ----

#[tokio::test]
async fn etcd_json() {
    let server = start().await;
    let (status, answer) =
        json_call(server.address, "/v3/kv/put", r#"{"key":"Zm9v","value":"YmFy","prevKv":true,"new":1} x"#).await;
    assert_eq!(
        (status, answer),
        (200, json!({"header": {"revision": "7"}, "prev_kv": {"key": "Zm9v", "value": "YmFy"}}))
    );
    // The older prefix.
    let (status, answer) = json_call(server.address, "/v3beta/kv/put", "").await;
    assert_eq!((status, answer), (400, json!({"code": 3, "message": "etcdserver: key is not provided"})));
    let (status, answer) = json_call(server.address, "/v3/nothing", "{}").await;
    assert_eq!((status, answer), (404, json!({"code": 5, "message": "Not Found"})));
    let (status, _, answer) = http1(server.address, "GET", "/v3/kv/put", "", "").await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((status, answer), (501, json!({"code": 12, "message": "Method Not Allowed"})));
    // Known to the protocol, not to this server.
    let (status, answer) = json_call(server.address, "/v3/kv/txn", "{}").await;
    assert_eq!((status, &answer["code"]), (501, &json!(12)));
}

#[tokio::test]
async fn etcd_json_errors_have_etcds_texts() {
    let server = start().await;
    let check = async |body: &str, message: &str| {
        let (status, answer) = json_call(server.address, "/v3/kv/put", body).await;
        assert_eq!((status, answer), (400, json!({"code": 3, "message": message})), "{body}");
    };
    check(r#"{"key":"!!"}"#, r#"proto: (line 1:8): invalid value for bytes field key: "!!""#).await;
    check(r#"{"key":1}"#, "proto: (line 1:8): invalid value for bytes field key: 1").await;
    check("{\n \"lease\": true}", "proto: (line 2:11): invalid value for int64 field lease: true").await;
    check(r#"{"prev_kv":"yes"}"#, r#"proto: (line 1:12): invalid value for bool field prevKv: "yes""#).await;
    check(r#"{"key":"YQ==","key":"YQ=="}"#, r#"proto: (line 1:15): duplicate field "key""#).await;
    check(r#"{"lease":[]}"#, "proto: (line 1:10): invalid value for int64 field lease: [").await;
    check("[]", "proto: syntax error (line 1:1): unexpected token [").await;
    check("nope", "invalid character 'o' in literal null (expecting 'u')").await;
    check(r#"{"key":"#, "unexpected EOF").await;
    check(r#"{"key" "a"}"#, "invalid character '\"' after object key").await;
    check(r#"{key:1}"#, "invalid character 'k' looking for beginning of object key string").await;
}

#[tokio::test]
async fn etcd_json_streams() {
    let server = start().await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let body = r#"{"create_request":{"key":"bGF0ZXI="}}"#;
    let request = format!("POST /v3/watch HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    // The second line comes after the request's end was read long ago.
    while !text.contains("99") {
        let mut buffer = [0; 1024];
        let read = stream.read(&mut buffer).await.unwrap();
        assert_ne!(read, 0, "{text}");
        text.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
    }
    assert!(text.contains("transfer-encoding: chunked"), "{text}");
    assert!(text.contains(r#"{"result":{"header":{"revision":"1"},"created":true}}"#), "{text}");

    let (status, _, answer) = http1(server.address, "POST", "/v3/lease/keepalive", "", r#"{"ID":"5"}{"ID":6}"#).await;
    assert_eq!(status, 200);
    assert!(answer.contains(r#""ID":"5""#) && answer.contains(r#""ID":"6""#), "{answer}");
    // Refused before the first line: the status says so. Refused later: the last line does.
    let refuse = r#"{"create_request":{"key":"cmVmdXNl"}}"#;
    let (status, _, answer) = http1(server.address, "POST", "/v3/watch", "", refuse).await;
    assert_eq!(status, 403);
    assert!(answer.contains(r#"{"error":{"code":7,"message":"etcdserver: permission denied"}}"#), "{answer}");
    let fail = r#"{"create_request":{"key":"ZmFpbA=="}}"#;
    let (status, _, answer) = http1(server.address, "POST", "/v3/watch", "", fail).await;
    assert!(status == 200 && answer.contains(r#"{"error":{"code":14"#), "{status} {answer}");
    let (status, head, answer) =
        http1(server.address, "POST", "/v3/watch", "accept: text/event-stream\r\n", fail).await;
    assert!(status == 200 && head.contains("content-type: text/event-stream"), "{head}");
    assert!(answer.contains("data: {\"header\"") && answer.contains("event: error\ndata: {\"code\":14"), "{answer}");
}

#[tokio::test]
async fn native_json() {
    let server = start().await;
    let (status, answer) = json_call(server.address, "/v1/locks:acquire", r#"{"name":"a","wait_ms":"5"}"#).await;
    let token = (1_u64 << 60).to_string();
    assert_eq!((status, answer), (200, json!({"header": {"revision": token}, "token": token})));
    let (status, head, answer) = http1(server.address, "POST", "/v1/locks:acquire", "", r#"{"name":"held"}"#).await;
    assert_eq!(status, 409);
    assert!(head.contains("retry-after: 2") && head.contains("content-type: application/problem+json"), "{head}");
    let expected = json!({
        "type": "held", "title": "The lock is held", "status": 409, "detail": "`held` is held by another", "code": "HELD",
        "retryable": true, "outcome": "not_applied", "retry_after_ms": "1500", "facts": {"name": "held", "token": "42"},
    });
    assert_eq!(serde_json::from_str::<Value>(&answer).unwrap(), expected);

    let (status, _, answer) = http1(server.address, "GET", "/v1/locks/a/b%2Fc:d?waiters_limit=3", "", "").await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((status, answer), (200, json!({"lock": {"name": "a/b/c:d", "waiter_count": "3"}})));
}

#[tokio::test]
async fn native_json_refuses_what_it_does_not_know() {
    let server = start().await;
    let check = async |verb: &str, path: &str, body: &str, status: u16, code: &str, detail: &str| {
        let (got, head, answer) = http1(server.address, verb, path, "", body).await;
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!((got, answer["code"].as_str().unwrap()), (status, code), "{path} {body}");
        assert!(answer["detail"].as_str().unwrap().contains(detail), "{answer}");
        head
    };
    check("POST", "/v1/locks:acquire", r#"{"name":"a","tl":1}"#, 400, "INVALID", "tl").await;
    check("POST", "/v1/locks:acquire", r#"{"name":"a"} x"#, 400, "INVALID", "trailing").await;
    check("POST", "/v1/locks:acquire", r#"{"name":"a","wait_ms":1,"forever":true}"#, 400, "INVALID", "wait").await;
    check("POST", "/v1/locks:acquire", r#"{"name":"#, 400, "INVALID", "EOF").await;
    check("POST", "/v1/locks:acquire", "{\"name\":\"\u{1}\"}", 400, "INVALID", "").await;
    check("GET", "/v1/locks/a?nope=1", "", 400, "INVALID", "nope").await;
    check("GET", "/v1/locks/a?stale=perhaps", "", 400, "INVALID", "stale").await;
    check("GET", "/v1/locks/%ff", "", 400, "INVALID", "UTF-8").await;
    check("GET", "/v1/nothing", "", 404, "NOT_FOUND", "").await;
    check("GET", "/v1/locks/a", r#"{"stale":true}"#, 400, "INVALID", "takes no body").await;
    check("POST", "/v1/kv:put?nope=1", r#"{"key":"a"}"#, 400, "INVALID", "nope").await;
    check("PUT", "/v1/kv/a?value=1", "", 400, "INVALID", "value").await;
    check("PUT", "/v1/kv/a", r#"{"key":"b"}"#, 400, "INVALID", "`key` is in the path").await;
    check("GET", "/v1/locks/a?name=b", "", 400, "INVALID", "`name` is in the path").await;
    let head = check("GET", "/v1/locks:acquire", "", 405, "UNIMPLEMENTED", "").await;
    assert!(head.contains("allow: post"), "{head}");
    let large = format!(r#"{{"name":"{}"}}"#, "x".repeat((4 << 20) + 1));
    check("POST", "/v1/locks:acquire", &large, 413, "TOO_LARGE", "larger").await;
}

#[tokio::test]
async fn the_idempotency_key_is_the_request_id() {
    let server = start().await;
    let uuid = "0123456789abcdef0123456789abcdef";
    let hyphens = "01234567-89AB-CDEF-0123-456789abcdef";
    let call = async |headers: &str, body: &str| http1(server.address, "POST", "/v1/kv:put", headers, body).await;
    let (status, _, answer) = call(&format!("idempotency-key: \"{uuid}\"\r\n"), r#"{"key":"a"}"#).await;
    assert!(status == 200 && answer.contains(uuid), "{answer}");
    let same = format!(r#"{{"key":"a","request":{{"uuid":"{hyphens}"}}}}"#);
    assert_eq!(call(&format!("idempotency-key: {uuid}\r\n"), &same).await.0, 200);
    let (status, _, answer) = call("idempotency-key: ffff\r\n", &same).await;
    assert!(status == 400 && answer.contains("differs"), "{answer}");
    for other in ["session", "series"] {
        let other = format!(r#"{{"key":"a","request":{{"{other}":{{"{other}":"1","seq":"1"}}}}}}"#);
        assert_eq!(call(&format!("idempotency-key: {uuid}\r\n"), &other).await.0, 400);
    }
    let headers = format!("idempotency-key: {uuid}\r\n");
    let (_, head, _) = http1(server.address, "POST", "/v1/locks:acquire", &headers, r#"{"name":"a"}"#).await;
    assert!(head.contains("idempotent-replayed: true"), "{head}");
}

#[tokio::test]
async fn json_and_pages_over_http2() {
    let server = start().await;
    let mut client = h2_client(server.address).await;
    let request = Request::post("http://localhost/v3/kv/range").body(()).unwrap();
    // 4 MiB of JSON pass the client's window in pieces.
    let answer = call(&mut client, request, Bytes::from_static(br#"{"limit":"3000"}"#)).await;
    let value: Value = serde_json::from_slice(&answer.data).unwrap();
    assert_eq!(value["kvs"].as_array().unwrap().len(), 3000);
    let request = Request::get("http://localhost/readyz").body(()).unwrap();
    let answer = call(&mut client, request, Bytes::new()).await;
    assert_eq!((answer.head.status().as_u16(), &answer.data[..]), (200, &b"ok\n"[..]));
}

// ---- pages ----

#[tokio::test]
async fn health_pages() {
    let well = start().await;
    let ill = start_with(FrontConfig::default(), false).await;
    let get = async |server: &Running, path: &str| {
        let (status, _, body) = http1(server.address, "GET", path, "", "").await;
        (status, body)
    };
    assert_eq!(get(&well, "/health").await, (200, r#"{"health":"true","reason":""}"#.into()));
    assert_eq!(get(&ill, "/health").await, (503, "{\"health\":\"false\",\"reason\":\"ALARM NOSPACE\"}\n".into()));
    assert_eq!(get(&ill, "/health?serializable=true").await.0, 200);
    assert_eq!(get(&ill, "/health?exclude=NOSPACE").await.0, 200);
    assert_eq!(get(&well, "/readyz").await, (200, "ok\n".into()));
    let all = "[+]serializable_read ok\n[+]linearizable_read ok\nok\n";
    assert_eq!(get(&well, "/readyz?verbose").await, (200, all.into()));
    let failed = "[+]serializable_read ok\n[-]linearizable_read failed: etcdserver: no leader\n\n";
    assert_eq!(get(&ill, "/readyz").await, (503, failed.into()));
    assert_eq!(get(&ill, "/readyz?exclude=linearizable_read").await.0, 200);
    assert_eq!(get(&ill, "/livez?verbose").await, (200, "[+]serializable_read ok\nok\n".into()));
    assert_eq!(get(&ill, "/readyz/linearizable_read").await.0, 503);
    assert_eq!(get(&ill, "/readyz/none").await.0, 404);
    assert_eq!(get(&well, "/none").await.0, 404);
    assert_eq!(http1(well.address, "POST", "/readyz", "", "").await.0, 405);
    let (status, version) = get(&well, "/version").await;
    let version: Value = serde_json::from_str(&version).unwrap();
    assert_eq!((status, &version["etcdcluster"], &version["storage"]), (200, &json!("3.7.0"), &json!("3.7.0")));
    assert!(get(&well, "/").await.1.contains("Tenure"));
}

#[tokio::test]
async fn metrics_count_calls() {
    let server = start().await;
    let mut client = h2_client(server.address).await;
    call(&mut client, grpc_request("/etcdserverpb.KV/Put"), framed(&put_of("k"))).await;
    call(&mut client, grpc_request("/etcdserverpb.KV/Put"), framed(&put_of(""))).await;
    json_call(server.address, "/v3/kv/put", r#"{"key":"YQ=="}"#).await;
    let (_, _, text) = http1(server.address, "GET", "/metrics", "", "").await;
    let labels = r#"grpc_method="Put",grpc_service="etcdserverpb.KV",grpc_type="unary""#;
    for line in [
        format!("grpc_server_handled_total{{grpc_code=\"OK\",{labels}}} 2\n"),
        format!("grpc_server_handled_total{{grpc_code=\"InvalidArgument\",{labels}}} 1\n"),
        format!("grpc_server_started_total{{{labels}}} 3\n"),
        "etcd_server_has_leader 1\n".to_owned(),
        "tenure_client_connections 2\n".to_owned(),
    ] {
        assert!(text.contains(&line), "{line} in {text}");
    }
    assert!(text.contains("\nprocess_resident_memory_bytes "), "{text}");
}

#[tokio::test]
async fn openapi_describes_the_native_api() {
    let server = start().await;
    let (status, _, text) = http1(server.address, "GET", "/openapi.json", "", "").await;
    let document: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &document["openapi"]), (200, &json!("3.1.0")));
    let acquire = &document["paths"]["/v1/locks:acquire"]["post"];
    assert_eq!(acquire["operationId"], "Locks_Acquire");
    let schema = &acquire["requestBody"]["content"]["application/json"]["schema"]["$ref"];
    assert_eq!(schema, "#/components/schemas/tenure.v1.LockAcquireRequest");
    assert_eq!(
        document["components"]["schemas"]["tenure.v1.LockAcquireReply"]["properties"]["token"]["type"],
        "string"
    );
    let get = &document["paths"]["/v1/locks/{name}"]["get"]["parameters"];
    assert!(get.as_array().unwrap().iter().any(|parameter| parameter["name"] == "name" && parameter["in"] == "path"));
    assert!(get.as_array().unwrap().iter().any(|parameter| parameter["name"] == "stale" && parameter["in"] == "query"));
    // Every reference leads somewhere.
    for reference in text.split("\"#/components/schemas/").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        assert!(!document["components"]["schemas"][reference].is_null(), "{reference}");
    }
}

// ---- reflection and health over gRPC ----

#[tokio::test]
async fn reflection_and_health() {
    let server = start().await;
    let channel =
        tonic::transport::Endpoint::new(format!("http://{}", server.address)).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
    let check = tonic_health::pb::HealthCheckRequest { service: String::new() };
    assert_eq!(health.check(check).await.unwrap().into_inner().status, 1);

    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    let mut reflection = tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(channel);
    let ask = |request| tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(request),
    };
    let requests = tokio_stream::once(ask(MessageRequest::ListServices(String::new())));
    let mut replies = reflection.server_reflection_info(requests).await.unwrap().into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) = replies.message().await.unwrap().unwrap().message_response
    else {
        panic!("a list");
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["etcdserverpb.KV", "tenure.v1.Locks", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|known| known == name), "{name} in {names:?}");
    }
}
