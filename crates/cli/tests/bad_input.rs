//! Bad input against the real binary over real sockets: each is told clearly, changes nothing, and the next caller is served.
//!
//! Promises under test. X1: what is too large, malformed or out of range is refused on every face with that face's own error, and the
//! revision stays. X2: connections that say nothing, half of something, or do not read, are bounded in time and memory and delay nobody.
//! X3: a folder that cannot be used is refused with a sentence that names what is wrong, a damaged one with file and place, and nothing in
//! it changes. X4: a full disk refuses writes, serves reads and recovers by itself. X5: wrong settings end with 64, others with 1.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use bytes::Bytes;
use common::{Server, TENURE, ended, free_address, http, refused, wait_for};
use tenure_wire::etcd::etcdserverpb as etcd;
use tenure_wire::tenure::v1;
use tonic::Code;
use tonic::codegen::tokio_stream::{self, StreamExt as _};
use tonic::transport::Channel;

type EtcdKv = etcd::kv_client::KvClient<Channel>;

async fn channel(server: &Server) -> Channel {
    Channel::from_shared(format!("http://{}", server.address)).unwrap().connect().await.unwrap()
}

async fn etcd_kv(server: &Server) -> EtcdKv {
    EtcdKv::new(channel(server).await)
}

fn etcd_put(key: &[u8], value: impl Into<Vec<u8>>) -> etcd::PutRequest {
    // The fields are bytes of one kind or another; `into` fits both.
    etcd::PutRequest { key: key.to_vec().into(), value: value.into().into(), ..Default::default() }
}

/// Revision and number of keys: what nothing bad may change.
async fn state(kv: &mut EtcdKv) -> (i64, i64) {
    let everything =
        etcd::RangeRequest { key: vec![0].into(), range_end: vec![0].into(), count_only: true, ..Default::default() };
    let answer = kv.range(everything).await.unwrap().into_inner();
    (answer.header.unwrap().revision, answer.count)
}

fn base64(bytes: impl AsRef<[u8]>) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

// ---- Requests ----

#[tokio::test]
async fn oversize_requests_are_refused_on_every_face() {
    const OVER: usize = 3 << 20;
    let server = Server::start(&[]);
    let mut kv = etcd_kv(&server).await;
    kv.put(etcd_put(b"k", "v")).await.unwrap();
    let before = state(&mut kv).await;
    let large = "x".repeat(OVER);

    // Between the limit of a request and that of a message etcd itself refuses, above it the transport does.
    let above_request = kv.put(etcd_put(b"k", vec![b'x'; 1600 << 10])).await.unwrap_err();
    assert_eq!(
        (above_request.code(), above_request.message()),
        (Code::InvalidArgument, "etcdserver: request is too large")
    );
    let above_message = kv.put(etcd_put(b"k", vec![b'x'; OVER])).await.unwrap_err();
    assert_eq!(above_message.code(), Code::ResourceExhausted, "{above_message}");

    let mut native = v1::kv_client::KvClient::new(channel(&server).await);
    for size in [OVER, 6 << 20] {
        let put = v1::PutRequest { key: "k".into(), value_bytes: vec![0; size].into(), ..Default::default() };
        let refusal = native.put(put).await.unwrap_err();
        assert!(matches!(refusal.code(), Code::InvalidArgument | Code::ResourceExhausted), "{refusal}");
        assert!(refusal.message().contains("large") || refusal.message().contains("at most"), "{refusal}");
    }

    let json = server.post("/v1/kv:put", format!(r#"{{"key":"k","value":"{large}"}}"#));
    assert_eq!(json.status, 413, "{json:?}");
    assert!(json.body.contains("TOO_LARGE") && json.body.contains("not_applied"), "{json:?}");
    let json = server.post("/v3/kv/put", format!(r#"{{"key":"aw==","value":"{}"}}"#, base64(&large)));
    assert!(matches!(json.status, 400 | 429) && json.body.contains("large"), "{json:?}");

    // In a pipeline only the request that is too large is refused, its neighbours are done.
    let put = |id, size| {
        let put = v1::PutRequest { key: format!("p{id}"), value_bytes: vec![0; size].into(), ..Default::default() };
        v1::Request { id, call: Some(v1::request::Call::Put(put)) }
    };
    let requests = v1::Requests { requests: vec![put(1, 1), put(2, OVER), put(3, 1)] };
    let stream = tokio_stream::once(requests).chain(tokio_stream::pending());
    let mut replies =
        v1::pipeline_client::PipelineClient::new(channel(&server).await).stream(stream).await.unwrap().into_inner();
    let mut outcomes = std::collections::BTreeMap::new();
    while outcomes.len() < 3 {
        for reply in replies.message().await.unwrap().unwrap().replies {
            let code = match reply.result.unwrap() {
                v1::reply::Result::Error(error) => error.code,
                _ => "ok".to_owned(),
            };
            outcomes.insert(reply.id, code);
        }
    }
    assert_eq!(outcomes.into_values().collect::<Vec<_>>(), ["ok", "TOO_LARGE", "ok"]);
    assert_eq!(state(&mut kv).await, (before.0 + 2, before.1 + 2), "the two neighbours and nothing else");
}

#[tokio::test]
async fn a_message_too_large_for_the_pipeline_ends_the_stream_and_nothing_else() {
    let server = Server::start(&[]);
    let mut kv = etcd_kv(&server).await;
    let before = state(&mut kv).await;
    let put = v1::PutRequest { key: "k".into(), value_bytes: vec![0; 6 << 20].into(), ..Default::default() };
    let requests = v1::Requests { requests: vec![v1::Request { id: 1, call: Some(v1::request::Call::Put(put)) }] };
    let stream = tokio_stream::once(requests).chain(tokio_stream::pending());
    let mut client = v1::pipeline_client::PipelineClient::new(channel(&server).await);
    let refusal = match client.stream(stream).await {
        Err(refusal) => refusal,
        Ok(replies) => replies.into_inner().message().await.unwrap_err(),
    };
    assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}");
    assert_eq!(state(&mut kv).await, before);
}

#[tokio::test]
async fn keys_leases_and_sessions_out_of_range() {
    let server = Server::start(&[]);
    let mut kv = etcd_kv(&server).await;
    let before = state(&mut kv).await;
    let told = |status: tonic::Status| (status.code(), status.message().to_owned());
    let empty = (Code::InvalidArgument, "etcdserver: key is not provided".to_owned());
    assert_eq!(told(kv.put(etcd_put(b"", "v")).await.unwrap_err()), empty);
    assert_eq!(told(kv.range(etcd::RangeRequest::default()).await.unwrap_err()), empty);
    assert_eq!(told(kv.delete_range(etcd::DeleteRangeRequest::default()).await.unwrap_err()), empty);
    let absent_lease = etcd::PutRequest { lease: -7, ..etcd_put(b"k", "v") };
    assert_eq!(told(kv.put(absent_lease).await.unwrap_err()).0, Code::NotFound);

    let mut lease = etcd::lease_client::LeaseClient::new(channel(&server).await);
    let grant = |ttl, id| etcd::LeaseGrantRequest { ttl, id };
    assert_eq!(lease.lease_grant(grant(9_000_000_001, 0)).await.unwrap_err().code(), Code::OutOfRange);
    assert_eq!(lease.lease_grant(grant(10, -5)).await.unwrap().into_inner().id, -5, "etcd takes any number but zero");
    assert!(lease.lease_revoke(etcd::LeaseRevokeRequest { id: -5 }).await.is_ok());
    assert_eq!(lease.lease_revoke(etcd::LeaseRevokeRequest { id: -5 }).await.unwrap_err().code(), Code::NotFound);
    // As in etcd a TTL below the least, and so one below zero, is granted as the least.
    assert_eq!(lease.lease_grant(grant(-5, 77)).await.unwrap().into_inner().ttl, 2);
    lease.lease_revoke(etcd::LeaseRevokeRequest { id: 77 }).await.unwrap();
    assert_eq!(state(&mut kv).await, before);

    for (path, body) in [
        ("/v1/kv:put", r#"{"value":"v"}"#),
        ("/v1/kv:put", r#"{"key":"k","key_bytes":"aw=="}"#),
        ("/v1/sessions:create", r#"{"ttl_ms":"-5"}"#),
        ("/v1/sessions:create", r#"{"ttl_ms":"86400001"}"#),
        ("/v1/sessions:create", r#"{"id":"9223372036854775808"}"#),
        ("/v1/locks:acquire", r#"{"name":"l"}"#),
        ("/v1/locks:acquire", r#"{"name":"","ttl_ms":"5000"}"#),
        ("/v1/locks:acquire", r#"{"name":"l","ttl_ms":"5000","wait_ms":"86400001"}"#),
    ] {
        let answer = server.post(path, body);
        assert_eq!(answer.status, 400, "{path} {body}: {answer:?}");
        assert!(answer.body.contains(r#""code":"INVALID""#), "{path} {body}: {answer:?}");
    }
    let long = server.post("/v1/locks:acquire", format!(r#"{{"name":"{}","ttl_ms":"5000"}}"#, "n".repeat(1025)));
    assert_eq!(long.status, 400, "{long:?}");
    assert_eq!(state(&mut kv).await, before);
}

#[tokio::test]
async fn unknown_fields_and_broken_json() {
    let server = Server::start(&[]);
    let mut kv = etcd_kv(&server).await;
    let before = state(&mut kv).await;
    let refuse = |path: &str, body: &[u8]| {
        let answer = server.post(path, body);
        assert_eq!(answer.status, 400, "{path} {}: {answer:?}", body.escape_ascii());
        answer
    };
    let unknown = refuse("/v1/kv:put", br#"{"key":"k","value":"v","nope":1}"#);
    assert!(unknown.body.contains("nope"), "the field is named: {unknown:?}");
    for body in [
        &br#"{"key":"k""#[..],
        br#"{"key":7}"#,
        br#"{"key":"k","prev":"yes"}"#,
        br#"[1]"#,
        br#"null x"#,
        b"{\"key\":\"\xff\xfe\",\"value\":\"v\"}",
        br#"{"key":"k","session":"-1"}"#,
        br#"{"key":"k","value_bytes":"***"}"#,
    ] {
        refuse("/v1/kv:put", body);
    }
    for body in [&br#"{"key":{}}"#[..], br#"{"key":"***"}"#, br#"{"key":"aw==","lease":"x"}"#, br#"{"key":"aw=="#] {
        refuse("/v3/kv/put", body);
    }
    // Deep nesting must not end the process.
    let deep = [b"{\"key\":".as_slice(), &[b'['; 200_000]].concat();
    refuse("/v1/kv:put", &deep);
    refuse("/v3/kv/put", &deep);
    assert_eq!(state(&mut kv).await, before);

    // etcd's gateway drops what it does not know.
    assert_eq!(server.post("/v3/kv/put", r#"{"key":"aw==","value":"dg==","nope":1}"#).status, 200);
    assert_eq!(state(&mut kv).await, (before.0 + 1, before.1 + 1));
}

#[tokio::test]
async fn wrong_protobuf_frames_and_content_types() {
    let server = Server::start(&[]);
    let mut kv = etcd_kv(&server).await;
    let before = state(&mut kv).await;
    let put = "/etcdserverpb.KV/Put";
    let native = "/tenure.v1.Kv/Put";
    let good = b"\x0a\x01k\x12\x01v";
    for (what, path, body) in [
        ("a number where bytes belong", put, frame(b"\x08\x01")),
        ("bytes where a number belongs", put, frame(b"\x0a\x01k\x1a\x01v")),
        ("a length beyond the end", put, frame(b"\x0a\x10k")),
        ("an endless number", put, frame(&[0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01])),
        ("field zero", put, frame(b"\x02\x01k")),
        ("the end of a group", put, frame(b"\x0c")),
        ("a text that is not UTF-8", native, frame(b"\x0a\x02\xff\xfe")),
        ("a frame longer than the body", put, [&[0, 0, 0, 0, 100], &good[..]].concat()),
        ("half of a frame's head", put, vec![0, 0, 0]),
        ("no frame", put, Vec::new()),
        ("a compressed frame without a compression", put, [&[1, 0, 0, 0, 6], &good[..]].concat()),
        ("an unknown flag", put, [&[9, 0, 0, 0, 6], &good[..]].concat()),
        ("a length of four gigabytes", put, [&[0, 0xff, 0xff, 0xff, 0xff], &good[..]].concat()),
        ("two messages", put, [frame(good), frame(good)].concat()),
        ("a method that is not there", "/etcdserverpb.KV/Nope", frame(good)),
        ("a service that is not there", "/nope.Nope/Nope", frame(good)),
    ] {
        let answer = grpc(&server, path, "application/grpc", &body).await;
        assert!(answer.grpc_status.is_some_and(|status| status != 0), "{what}: {answer:?}");
        assert!(!answer.message.is_empty(), "{what}: {answer:?}");
        assert_eq!(state(&mut kv).await, before, "{what}");
    }
    for content_type in ["application/json", "text/plain", "", "application/grpcx"] {
        let answer = grpc(&server, put, content_type, &frame(good)).await;
        assert!(
            answer.http_status >= 400 || answer.grpc_status.is_some_and(|status| status != 0),
            "`{content_type}`: {answer:?}"
        );
        assert_eq!(state(&mut kv).await, before, "`{content_type}`");
    }
    // gRPC needs HTTP/2, and pages are not changed.
    let over_http1 =
        common::http(&server.address, "POST", put, "content-type: application/grpc\r\n", &frame(good)).unwrap();
    assert_eq!(over_http1.status, 505, "{over_http1:?}");
    assert_eq!(common::http(&server.address, "DELETE", "/v1/locks/k", "", b"").unwrap().status, 405);
    assert_eq!(common::http(&server.address, "GET", "/v1/nothing", "", b"").unwrap().status, 404);
    assert_eq!(state(&mut kv).await, before);

    // A newer client's fields are passed over, as protobuf has it.
    let unknown = grpc(&server, put, "application/grpc", &frame(b"\x0a\x01k\x12\x01v\xf8\x07\x01")).await;
    assert_eq!(unknown.grpc_status, Some(0), "{unknown:?}");
    assert_eq!(state(&mut kv).await, (before.0 + 1, before.1 + 1));
}

fn frame(message: &[u8]) -> Vec<u8> {
    [&[0], &(message.len() as u32).to_be_bytes()[..], message].concat()
}

#[derive(Debug, Default)]
struct GrpcAnswer {
    http_status: u16,
    grpc_status: Option<u32>,
    message: String,
}

/// One call with any bytes for a body. A reset of the stream is told as an error of the transport, status 13.
async fn grpc(server: &Server, path: &str, content_type: &str, body: &[u8]) -> GrpcAnswer {
    let tcp = tokio::net::TcpStream::connect(&server.address).await.unwrap();
    let (mut client, connection) = h2::client::handshake(tcp).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = http::Request::post(format!("http://{}{path}", server.address)).header("te", "trailers");
    let request = if content_type.is_empty() { request } else { request.header("content-type", content_type) };
    let (response, mut send) = client.send_request(request.body(()).unwrap(), false).unwrap();
    // A server that refuses from the head may not want the body any more.
    let _ = send.send_data(Bytes::copy_from_slice(body), true);
    let limit = Duration::from_secs(5);
    let response = tokio::time::timeout(limit, response).await.expect("an answer in time");
    let answer = match response {
        Err(error) => GrpcAnswer { http_status: 0, grpc_status: Some(13), message: error.to_string() },
        Ok(response) => {
            let http_status = response.status().as_u16();
            let mut fields = response.headers().clone();
            let mut body = response.into_body();
            while let Ok(Some(Ok(_))) = tokio::time::timeout(limit, body.data()).await {}
            if let Ok(Ok(Some(trailers))) = tokio::time::timeout(limit, body.trailers()).await {
                fields.extend(trailers);
            }
            let text = |name: &str| fields.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
            let grpc_status = text("grpc-status").and_then(|status| status.parse().ok());
            GrpcAnswer { http_status, grpc_status, message: text("grpc-message").unwrap_or_default() }
        }
    };
    connection.abort();
    answer
}

// ---- Connections ----

/// How long the server keeps a connection on which the rest does not come.
fn closed_after(address: &str, said: &[u8], limit: Duration) -> Option<Duration> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(said).unwrap();
    stream.set_read_timeout(Some(limit)).unwrap();
    let began = Instant::now();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Some(began.elapsed()),
            Ok(_) if began.elapsed() < limit => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Some(began.elapsed()),
            _ => return None,
        }
    }
}

#[test]
fn connections_that_do_not_go_on_are_closed_and_delay_nobody() {
    let server = Server::start(&[]);
    let files = server.open_files();
    let silent: Vec<TcpStream> = (0..300).map(|_| TcpStream::connect(&server.address).unwrap()).collect();
    let limit = Duration::from_secs(14);
    let address = &server.address;
    std::thread::scope(|scope| {
        let cases: [(&str, &[u8]); 4] = [
            ("silence", b""),
            ("half of a preface", b"PRI * HT"),
            ("half of a head", b"POST /v1/kv:put HTTP/1.1\r\nhost: x\r\ncontent-"),
            ("nonsense", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
        ];
        let waiting: Vec<_> = cases
            .into_iter()
            .map(|(what, said)| (what, scope.spawn(move || closed_after(address, said, limit))))
            .collect();
        let began = Instant::now();
        for i in 0..20 {
            assert_eq!(server.post("/v1/kv:put", format!(r#"{{"key":"k{i}","value":"v"}}"#)).status, 200);
        }
        assert!(began.elapsed() < Duration::from_secs(5), "others are served meanwhile");
        let closed: Vec<_> = waiting.into_iter().map(|(what, waiting)| (what, waiting.join().unwrap())).collect();
        let open: Vec<_> = closed.iter().filter(|(_, after)| after.is_none()).map(|(what, _)| what).collect();
        assert!(open.is_empty(), "still open: {open:?}");
    });
    wait_for("the silent connections to be closed", limit, || server.open_files() <= files + 2);
    drop(silent);
}

#[test]
fn pages_of_other_sites_are_refused() {
    let server = Server::start(&[]);
    let put = |origin: &str| {
        let headers = format!("content-type: text/plain\r\norigin: {origin}\r\n");
        http(&server.address, "POST", "/v1/kv:put", &headers, br#"{"key":"page","value":"v"}"#).unwrap().status
    };
    for foreign in ["http://example.org", "null", "http://127.0.0.1:1"] {
        assert_eq!(put(foreign), 403, "{foreign}");
    }
    assert_eq!(server.get("/v1/kv/page").status, 404, "nothing was written");
    assert_eq!(put(&format!("http://{}", server.address)), 200, "its own pages may");
}

#[test]
fn half_of_a_body_is_given_up() {
    let server = Server::start(&[]);
    let said = b"POST /v1/kv:put HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"key\":";
    let closed = closed_after(&server.address, said, Duration::from_secs(35));
    assert!(closed.is_some(), "a peer that never sends the rest holds its connection for ever");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_does_not_read_costs_little_and_catches_up() {
    const EVENTS: i64 = 1000;
    const VALUE: usize = 100 << 10;
    let server = Server::start(&[]);
    let mut kv = etcd_kv(&server).await;
    let mut slow = watch(&server, b"big").await;
    let mut other = watch(&server, b"small").await;
    let before = server.resident_bytes();
    let mut slowest = Duration::ZERO;
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let mut kv = kv.clone();
            tokio::spawn(async move {
                for _ in 0..EVENTS / 4 {
                    kv.put(etcd_put(b"big", vec![writer; VALUE])).await.unwrap();
                }
            })
        })
        .collect();
    let mut rounds = 0;
    while rounds < 20 || !writers.iter().all(|writer| writer.is_finished()) {
        let began = Instant::now();
        kv.put(etcd_put(b"small", rounds.to_string())).await.unwrap();
        let event = next_events(&mut other).await;
        assert_eq!(event.last().unwrap().0, rounds.to_string().as_bytes());
        slowest = slowest.max(began.elapsed());
        rounds += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    // The history has each of the values once; what waits for the watcher comes on top of that and must stay small.
    let history = EVENTS as u64 * VALUE as u64;
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < history + (64 << 20), "{} MiB for {} MiB of history", grown >> 20, history >> 20);
    assert!(slowest < Duration::from_secs(3), "the others waited {slowest:?}");

    let mut seen = Vec::new();
    while (seen.len() as i64) < EVENTS {
        seen.extend(next_events(&mut slow).await.into_iter().map(|(_, revision)| revision));
    }
    assert!(seen.is_sorted_by(|a, b| a < b) && seen.len() as i64 == EVENTS, "every event once and in order");
}

type Watching = tonic::Streaming<etcd::WatchResponse>;

/// Watches one key from now on.
async fn watch(server: &Server, key: &[u8]) -> Watching {
    let create = etcd::WatchCreateRequest { key: key.to_vec().into(), ..Default::default() };
    let request = etcd::WatchRequest { request_union: Some(etcd::watch_request::RequestUnion::CreateRequest(create)) };
    let requests = tokio_stream::once(request).chain(tokio_stream::pending());
    let mut client = etcd::watch_client::WatchClient::new(channel(server).await).max_decoding_message_size(64 << 20);
    let mut stream = client.watch(requests).await.unwrap().into_inner();
    assert!(stream.message().await.unwrap().unwrap().created);
    stream
}

/// Values and revisions of the next events.
async fn next_events(stream: &mut Watching) -> Vec<(Vec<u8>, i64)> {
    loop {
        let message = tokio::time::timeout(Duration::from_secs(10), stream.message()).await.expect("events in time");
        let response = message.unwrap().expect("the stream goes on");
        assert!(!response.canceled, "{}", response.cancel_reason);
        let kvs = response.events.into_iter().filter_map(|event| event.kv);
        let events: Vec<_> = kvs.map(|kv| (kv.value.to_vec(), kv.mod_revision)).collect();
        if !events.is_empty() {
            return events;
        }
    }
}

// ---- Folders ----

/// Every file of a folder with its bytes, without the lock file.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_name() != "lock")
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

/// Starts on the folder must be refused with a text that has all of these words, and leave it as it was.
fn check_refused(data: &Path, flags: &[&str], words: &[&str]) {
    let before = contents(data);
    let (code, text) = refused(data, flags);
    assert_eq!(code, 1, "{text}");
    for word in words {
        assert!(text.contains(word), "`{word}` is missing: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
    assert!(contents(data) == before, "the folder has changed: {text}");
}

#[test]
fn folders_of_others_are_refused() {
    let mut server = Server::start(&[]);
    server.post("/v1/kv:put", r#"{"key":"k","value":"v"}"#);
    check_refused(&server.data, &[], &["in use by another process"]);
    server.stop();
    let data = server.data.clone();
    check_refused(&data, &["--cluster-token", "other"], &["tenure-cluster", "other"]);
    check_refused(&data, &["--name", "n7"], &["belongs to member"]);

    let identity = data.join("identity");
    let text = fs::read_to_string(&identity).unwrap();
    fs::write(&identity, text.replace("format 1", "format 2")).unwrap();
    check_refused(&data, &[], &["another format", "identity", "format 2"]);
    fs::write(&identity, text.replace("\nmember ", "\nmember 1")).unwrap();
    check_refused(&data, &[], &["identity", "checksum"]);
    fs::remove_file(&identity).unwrap();
    check_refused(&data, &[], &["identity", "log-"]);
    fs::write(&identity, text).unwrap();

    let newer = segments(&data).pop().unwrap();
    let whole = fs::read(&newer).unwrap();
    let mut bytes = whole.clone();
    bytes[8] = 2;
    fs::write(&newer, bytes).unwrap();
    check_refused(&data, &[], &["another format", "log-", "format 2"]);
    // Our magic and nothing behind it: a length that lies.
    let mut bytes = whole.clone();
    bytes[12..4096].fill(0);
    fs::write(&newer, bytes).unwrap();
    check_refused(&data, &[], &["damaged", "segment"]);
    fs::write(&newer, whole).unwrap();

    server.start_again(&[]);
    assert_eq!(server.get("/v1/kv/k").status, 200, "nothing was lost by all that");
}

#[test]
fn folders_that_cannot_be_used_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "not a folder").unwrap();
    let (code, text) = refused(&file, &[]);
    assert!(code == 1 && text.contains("file") && text.contains("cannot be made"), "{code} {text}");
    let (code, text) = refused(&file.join("below"), &[]);
    assert!(code == 1 && text.contains("cannot be made"), "{code} {text}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "not a folder");

    let foreign = folder.path().join("foreign");
    fs::create_dir(&foreign).unwrap();
    fs::write(foreign.join("notes.txt"), "mine").unwrap();
    check_refused(&foreign, &[], &["notes.txt", "empty folder"]);

    let Some(mount) = Tmpfs::mount(&folder.path().join("readonly"), "size=1m,ro") else { return };
    let (code, text) = refused(&mount.0, &[]);
    assert!(code == 1 && text.contains("Read-only file system"), "{code} {text}");
}

fn segments(data: &Path) -> Vec<PathBuf> {
    files(data, "log-")
}

fn files(data: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(data).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        entries.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(prefix)).collect();
    files.sort();
    files
}

fn flip(file: &Path, offset: u64) -> Vec<u8> {
    let whole = fs::read(file).unwrap();
    let mut bytes = whole.clone();
    bytes[offset as usize] ^= 0x10;
    fs::write(file, bytes).unwrap();
    whole
}

/// The number behind `at byte` in a refusal.
fn told_offset(text: &str) -> u64 {
    let (_, rest) = text.split_once("at byte ").unwrap_or_else(|| panic!("no place is named: {text}"));
    rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

#[test]
fn a_flipped_byte_of_the_log_is_named_and_never_served() {
    let mut server = Server::start(&[]);
    let value = "x".repeat(10_000);
    for i in 0..20 {
        let put = server.post("/v1/kv:put", format!(r#"{{"key":"k{i}","value":"{value}"}}"#));
        assert_eq!(put.status, 200);
    }
    server.stop();
    let segment = segments(&server.data).pop().unwrap();
    let name = segment.file_name().unwrap().to_str().unwrap().to_owned();
    for place in [5_000, 60_000, 150_000] {
        let whole = flip(&segment, place);
        check_refused(&server.data, &[], &["damaged", &name, "at byte"]);
        let (_, text) = refused(&server.data, &[]);
        let told = told_offset(&text);
        assert!(told <= place && place < told + 11_000, "the flip is at {place}: {text}");
        fs::write(&segment, whole).unwrap();
    }
    server.start_again(&[]);
    let last = server.get("/v1/kv/k19");
    assert!(last.status == 200 && last.body.contains(&value), "{:.200}", last.body);
}

#[test]
fn a_segment_that_was_cut_short_is_refused() {
    let mut server = Server::start(&[]);
    for i in 0..20 {
        server.post("/v1/kv:put", format!(r#"{{"key":"k{i}","value":"{}"}}"#, "x".repeat(10_000)));
    }
    server.stop();
    // Files are filled before they are used, so none is ever shorter than it was made: a bad copy or a repaired file system.
    let segment = segments(&server.data).pop().unwrap();
    let whole = fs::read(&segment).unwrap();
    fs::write(&segment, &whole[..100_000]).unwrap();
    let (code, text) = refused(&server.data, &[]);
    assert_eq!(code, 1, "acknowledged writes are gone: {text}");
    fs::write(&segment, &whole).unwrap();
    server.start_again(&[]);
    assert_eq!(server.get("/v1/kv/k19").status, 200);
}

/// A server that was stopped when it had two snapshots, and the newest key, whose value has `SNAPSHOT_VALUE` bytes.
fn with_two_snapshots() -> (Server, String) {
    let mut server = Server::start(&SNAPSHOT_FLAGS);
    let value = "x".repeat(SNAPSHOT_VALUE);
    let until = Instant::now() + Duration::from_secs(10);
    let mut newest = String::new();
    for put in 0.. {
        if files(&server.data, "snapshot-0").len() >= 2 {
            break;
        }
        assert!(Instant::now() < until, "no snapshots came");
        newest = format!("k{put}");
        assert_eq!(server.post("/v1/kv:put", format!(r#"{{"key":"{newest}","value":"{value}"}}"#)).status, 200);
    }
    server.stop();
    (server, newest)
}

const SNAPSHOT_FLAGS: [&str; 2] = ["--snapshot-log-bytes", "256KiB"];
const SNAPSHOT_VALUE: usize = 20_000;

#[test]
fn a_flipped_byte_of_the_newest_snapshot_is_told_and_the_older_one_stands_in() {
    let (mut server, key) = with_two_snapshots();
    let newest = files(&server.data, "snapshot-0").pop().unwrap();
    flip(&newest, fs::metadata(&newest).unwrap().len() / 2);
    server.start_again(&SNAPSHOT_FLAGS);
    let last = server.get(&format!("/v1/kv/{key}"));
    assert!(last.status == 200 && last.body.contains(&"x".repeat(SNAPSHOT_VALUE)), "{:.200}", last.body);
    let name = newest.file_name().unwrap().to_str().unwrap();
    assert!(server.log().contains(name), "the damaged file is named in the log: {}", server.log());
}

#[test]
fn without_a_whole_snapshot_the_damaged_one_is_named() {
    let (server, _) = with_two_snapshots();
    for file in files(&server.data, "snapshot-0") {
        flip(&file, fs::metadata(&file).unwrap().len() / 2);
    }
    check_refused(&server.data, &SNAPSHOT_FLAGS, &["damaged", "snapshot-", "at byte"]);
    let (_, text) = refused(&server.data, &SNAPSHOT_FLAGS);
    assert!(told_offset(&text) > 0, "the place in it is named: {text}");
}

// ---- Full disks ----

/// A small file system of its own, or a printed reason why there is none.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(at: &Path, options: &str) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mut command = Command::new("mount");
        let (code, text) = ended(command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at));
        if code == 0 {
            return Some(Self(at.to_owned()));
        }
        println!("skipped: a file system cannot be mounted here: {}", text.trim());
        None
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fills_up_refuses_writes_serves_reads_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mount) = Tmpfs::mount(&folder.path().join("disk"), "size=160m") else { return };
    let filler = mount.0.join("filler");
    fs::write(&filler, vec![1; 48 << 20]).unwrap();
    let mut server = Server::start_in(folder, mount.0.join("data"), &[]);
    let kv = etcd_kv(&server).await;

    // Under load: writers go on until they are refused.
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let mut kv = kv.clone();
            tokio::spawn(async move {
                for acknowledged in 0..10_000 {
                    if let Err(refusal) =
                        kv.put(etcd_put(format!("w{writer}").as_bytes(), vec![writer; 512 << 10])).await
                    {
                        return (acknowledged, refusal);
                    }
                }
                panic!("the disk did not fill up");
            })
        })
        .collect();
    let mut acknowledged = 0;
    for writer in writers {
        let (count, refusal) = writer.await.unwrap();
        assert_eq!(refusal.code(), Code::ResourceExhausted, "{refusal}\n{}", server.log());
        acknowledged += count;
    }
    assert!(server.is_running(), "{}", server.log());
    let mut kv = kv;
    let full = state(&mut kv).await;
    assert_eq!(full.0, acknowledged + 1, "each acknowledged write and no other has a revision");
    let json = server.post("/v1/kv:put", r#"{"key":"k","value":"v"}"#);
    assert!(json.status == 507 && json.body.contains("QUOTA"), "{json:?}");
    let read = server.get("/v1/kv/w0");
    assert_eq!(read.status, 200, "reads go on");
    let delete = etcd::DeleteRangeRequest { key: b"w0".to_vec().into(), ..Default::default() };
    assert_eq!(kv.delete_range(delete).await.unwrap().into_inner().deleted, 1, "what frees is taken");
    assert_eq!(server.post("/v3/kv/put", r#"{"key":"aw==","value":"dg=="}"#).status, 429);

    fs::remove_file(&filler).unwrap();
    wait_for("the member to take writes again", Duration::from_secs(10), || {
        server.post("/v1/kv:put", r#"{"key":"k","value":"v"}"#).status == 200
    });
    let after = state(&mut kv).await;
    server.kill();
    server.start_again(&[]);
    let mut kv = etcd_kv(&server).await;
    assert_eq!(state(&mut kv).await, after, "and what it took is there after a crash");
    drop(server);
}

// ---- Settings ----

#[test]
fn wrong_settings_are_wrong_use() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    for (flags, words) in [
        (&["--nope"][..], "--nope"),
        (&["--heartbeat", "soon"], "`soon`"),
        (&["--heartbeat", "5s"], "election timeout"),
        (&["--memory-soft-limit", "9GB"], "9GB"),
        (&["--memory-soft-limit", "9GiB"], "--memory-hard-limit"),
        (&["--max-request-bytes", "100MiB"], "64MiB"),
        (&["--max-txn-ops", "0"], "--max-txn-ops"),
        (&["--log-format", "xml"], "xml"),
        (&["--listen", "nonsense"], "nonsense"),
        (&["--listen", "0.0.0.0:0"], "--insecure"),
        (&["--listen", "[::]:0"], "--insecure"),
        (&["--cluster", "a=127.0.0.1:1,b=127.0.0.1:2,c=127.0.0.1:3"], "--cluster"),
        (&["--cluster", "n0=127.0.0.1:1,n0=127.0.0.1:2"], "another member"),
        (&["--cluster", "n0=127.0.0.1"], "name=host:port"),
        (&["--join", "hello"], "--join"),
        (&["--cluster", "n0=127.0.0.1:1,n1=127.0.0.1:2", "--peer-listen", "0.0.0.0:0"], "--peer-cert"),
        (&["--config", "/nowhere/at/all.toml"], "/nowhere/at/all.toml"),
    ] {
        let (code, text) = refused(&data, flags);
        assert_eq!(code, 64, "{flags:?}: {text}");
        assert!(text.contains(words) && text.starts_with("error: "), "{flags:?}: {text}");
    }
    let file = folder.path().join("settings.toml");
    for (settings, words) in [
        ("nope = 1", "`nope`"),
        ("config = \"other.toml\"", "`config`"),
        ("advertise = [1]", "`advertise`"),
        ("listen = ", "line 1"),
        ("heartbeat = \"soon\"", "`soon`"),
        ("max-txn-ops = -1", "-1"),
    ] {
        fs::write(&file, settings).unwrap();
        let (code, text) = refused(&data, &["--config", file.to_str().unwrap()]);
        assert_eq!(code, 64, "{settings}: {text}");
        assert!(text.contains(words) && text.starts_with("error: "), "{settings}: {text}");
    }
    assert!(!data.exists(), "nothing was made");
}

#[test]
fn a_port_in_use_is_told() {
    let server = Server::start(&[]);
    let data = server.folder.path().join("other");
    let (code, text) = refused(&data, &["--listen", &server.address]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains(&server.address) && text.contains("in use") && text.contains("--listen"), "{text}");
    assert!(!data.exists(), "nothing was made");
}

#[test]
fn flags_go_before_environment_before_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("settings.toml");
    fs::write(&file, "name = \"of-file\"\nmax-txn-ops = 0\nlisten = \"127.0.0.1:0\"\n").unwrap();
    // Each of these ends at a wrong value, and the value that is told says who won.
    let told = |flag: Option<&str>, environment: Option<&str>, in_file: &str| {
        fs::write(&file, in_file).unwrap();
        let mut command = Command::new(TENURE);
        command.args(["serve", "--listen", &free_address(), "--data-dir"]).arg(folder.path().join("data"));
        command.arg("--config").arg(&file).args(flag);
        if let Some(value) = environment {
            command.env("TENURE_HEARTBEAT", value);
        }
        let (code, text) = ended(&mut command);
        assert_eq!(code, 64, "{text}");
        text
    };
    assert!(told(Some("--heartbeat=flagged"), Some("1s"), "heartbeat = \"1s\"").contains("flagged"));
    assert!(told(None, Some("surrounding"), "heartbeat = \"1s\"").contains("surrounding"));
    assert!(told(None, None, "heartbeat = \"filed\"").contains("filed"));
    // 5s is too long a heartbeat, so what is chosen is what is refused; the good values beside it are not looked at.
    assert!(told(Some("--heartbeat=5s"), Some("100ms"), "heartbeat = \"100ms\"").contains("election timeout"));
    assert!(told(None, Some("5s"), "heartbeat = \"100ms\"").contains("election timeout"));
}
