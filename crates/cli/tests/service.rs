//! The registry on real processes: by hand, over HTTP, with probes of real servers that fail and come back, and over the death of the member that
//! runs the probes.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use common::{Server, TENURE, free_address, http, json, ok, tenure, wait_for};
use serde_json::{Value, json};

/// For what takes a few probes, on a machine that is busy with other things.
const LIMIT: Duration = Duration::from_secs(60);

/// An HTTP server that answers every request with a status that can be changed.
struct Web {
    address: String,
    status: Arc<AtomicU16>,
}

impl Web {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let status = Arc::new(AtomicU16::new(200));
        let own = status.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut asked = [0; 1024];
                let _ = stream.read(&mut asked);
                let status = own.load(Ordering::Relaxed);
                let _ = write!(stream, "HTTP/1.1 {status} Said\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            }
        });
        Self { address, status }
    }

    fn say(&self, status: u16) {
        self.status.store(status, Ordering::Relaxed);
    }

    fn port(&self) -> &str {
        port(&self.address)
    }
}

fn port(address: &str) -> &str {
    address.rsplit_once(':').unwrap().1
}

/// Every instance of a service, whatever its health.
fn instances(endpoint: &str, service: &str) -> Vec<Value> {
    json(endpoint, &["service", "get", service, "--all"])["instances"].as_array().unwrap().clone()
}

fn health(endpoint: &str, service: &str, instance: &str) -> String {
    let all = instances(endpoint, service);
    let one = all.iter().find(|one| one["instance"] == instance);
    one.map_or("absent".to_owned(), |one| one["health"].as_str().unwrap().to_owned())
}

fn wait_for_health(endpoint: &str, service: &str, instance: &str, expected: &str) {
    let what = format!("{service}/{instance} to be {expected}");
    wait_for(&what, LIMIT, || health(endpoint, service, instance) == expected);
}

#[test]
fn instances_by_hand() {
    let server = Server::start(&[]);
    let at = server.address.as_str();
    let register = |more: &[&str]| {
        tenure(at, &[&["service", "register", "web", "a", "--address", "10.0.0.1", "--port", "80"], more].concat())
    };
    let said = register(&[]);
    assert!(said.code == 64 && said.err.contains("--ttl, --http, --tcp, --grpc or --session"), "{}", said.err);
    assert_eq!(register(&["--ttl", "1h", "--interval", "1s"]).code, 64, "nothing is probed");
    let first = register(&["--ttl", "1h", "--tag", "blue", "--meta", "zone=a", "--weight", "3"]);
    assert!(first.code == 0 && first.out.starts_with("registered (token "), "{}{}", first.out, first.err);
    let found = json(at, &["service", "get", "web", "--tag", "blue"]);
    let one = &found["instances"][0];
    assert_eq!((&one["address"], &one["port"], &one["weight"]), (&json!("10.0.0.1"), &json!(80), &json!(3)), "{found}");
    assert_eq!((&one["health"], &one["meta"]["zone"]), (&json!("passing"), &json!("a")), "{found}");
    let token = one["token"].as_str().unwrap().to_owned();
    assert_eq!(json(at, &["service", "get", "web", "--tag", "green"])["instances"], json!([]));

    // The same again is the same registration; a changed one has another token.
    let again = register(&["--ttl", "1h", "--tag", "blue", "--meta", "zone=a", "--weight", "3"]);
    assert_eq!(again.out, first.out);
    assert_eq!(register(&["--ttl", "1h"]).code, 0);
    let old = tenure(at, &["service", "heartbeat", "web", "a", "--token", &token]);
    assert!(old.code == 12 && old.err.contains("registered under token"), "{}: {}", old.code, old.err);
    assert_eq!(tenure(at, &["service", "deregister", "web", "a", "--token", &token]).code, 12);

    assert_eq!(ok(at, &["service", "heartbeat", "web", "a", "--health", "warning", "--why", "slow"]), "warning\n");
    assert!(ok(at, &["service", "get", "web"]).contains("slow"));
    assert_eq!(ok(at, &["service", "drain", "web", "a"]), "draining\n");
    assert_eq!(json(at, &["service", "get", "web"])["instances"], json!([]), "one that drains is not to be called");
    assert_eq!(ok(at, &["service", "undrain", "web", "a"]), "warning\n");
    assert_eq!(ok(at, &["service", "heartbeat", "web", "a", "--health", "critical"]), "critical\n");
    assert_eq!(json(at, &["service", "get", "web", "--health", "critical"])["instances"].as_array().unwrap().len(), 1);

    // The guard: the only one is lost, so it is kept.
    ok(at, &["service", "guard", "web", "50"]);
    assert!(ok(at, &["service", "get", "web"]).contains("critical, kept"));
    assert!(ok(at, &["service", "list"]).contains("50%, ON"));
    ok(at, &["service", "guard", "web", "0"]);

    ok(at, &["service", "deregister", "web", "a"]);
    assert_eq!(tenure(at, &["service", "deregister", "web", "a"]).code, 19);
    assert_eq!(tenure(at, &["service", "heartbeat", "web", "a"]).code, 19);
    assert_eq!(json(at, &["service", "list"]), json!([]));

    // Under a session it is its owner's, and goes with it.
    let session = json(at, &["session", "create", "--ttl", "1h"])["id"].as_str().unwrap().to_owned();
    assert_eq!(register(&["--session", &session]).code, 0);
    let held = register(&["--ttl", "1h"]);
    assert!(held.code == 1 && held.err.contains("--replace"), "{}: {}", held.code, held.err);
    ok(at, &["session", "end", &session]);
    assert_eq!(health(at, "web", "a"), "absent");
    assert_eq!(register(&["--session", &session]).code, 13, "the session is over");
}

#[test]
fn probes_notice_failures_and_returns_over_http_tcp_and_grpc() {
    let server = Server::start(&[]);
    let at = server.address.as_str();
    let web = Web::start();
    let register = |instance: &str, port: &str, probe: &[&str]| {
        let fixed = ["service", "register", "mix", instance, "--address", "127.0.0.1", "--port", port];
        let quick = ["--interval", "1s", "--timeout", "500ms", "--failures", "2"];
        ok(at, &[&fixed[..], &quick[..], probe].concat())
    };
    register("http", web.port(), &["--http", "/health"]);
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp_address = tcp.local_addr().unwrap().to_string();
    register("tcp", port(&tcp_address), &["--tcp"]);
    // Another member serves grpc.health.v1.
    let mut other = Server::start(&[]);
    register("grpc", port(&other.address), &["--grpc"]);
    register("unknown", port(&other.address), &["--grpc", "no.such.Service"]);
    for instance in ["http", "tcp", "grpc"] {
        wait_for_health(at, "mix", instance, "passing");
    }
    wait_for("the reason to be told", LIMIT, || {
        instances(at, "mix")
            .iter()
            .any(|one| one["instance"] == "unknown" && one["why"].as_str().unwrap().contains("gRPC"))
    });

    let revision = || server.get("/v1/services").body;
    web.say(503);
    wait_for_health(at, "mix", "http", "critical");
    let why = instances(at, "mix").into_iter().find(|one| one["instance"] == "http").unwrap()["why"].clone();
    assert!(why.as_str().unwrap().contains("503"), "{why}");
    drop(tcp);
    wait_for_health(at, "mix", "tcp", "critical");
    other.kill();
    wait_for_health(at, "mix", "grpc", "critical");
    // Probes that find what was found before write nothing.
    let (before, from) = (revision(), Instant::now());
    while from.elapsed() < Duration::from_millis(2_500) {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(revision(), before, "no commit per probe");

    web.say(429);
    wait_for_health(at, "mix", "http", "warning");
    web.say(204);
    wait_for_health(at, "mix", "http", "passing");
    let _tcp = TcpListener::bind(&tcp_address).unwrap();
    wait_for_health(at, "mix", "tcp", "passing");
    other.start_again(&[]);
    wait_for_health(at, "mix", "grpc", "passing");
}

#[test]
fn a_member_can_be_told_to_probe_nothing() {
    let server = Server::start(&["--no-active-checks"]);
    let web = Web::start();
    let at = server.address.as_str();
    let flags = ["--address", "127.0.0.1", "--port", web.port(), "--http", "/", "--interval", "1s"];
    ok(at, &[&["service", "register", "web", "a"][..], &flags].concat());
    std::thread::sleep(Duration::from_millis(1_500));
    let all = instances(at, "web");
    assert_eq!((&all[0]["health"], &all[0]["why"]), (&json!("critical"), &json!("not checked yet")));
}

/// Lines of a stream of events, each as JSON.
struct Events(BufReader<TcpStream>);

impl Events {
    fn open(address: &str, path: &str) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\naccept: text/event-stream\r\n\r\n").unwrap();
        Self(BufReader::new(stream))
    }

    fn next(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "the stream has ended");
            if let Some(data) = line.trim_end().strip_prefix("data: ") {
                return serde_json::from_str(data).unwrap();
            }
        }
    }
}

#[test]
fn over_http_with_a_long_poll_and_events() {
    let server = Server::start(&[]);
    let register = |id: &str, more: Value| {
        let mut body = json!({ "service": "api", "instance": id, "address": "10.0.0.1", "port": 80, "check": { "ttl_ms": 60000 } });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/services:register", body.to_string())
    };
    let get = |query: &str| -> Value {
        let answer = server.get(&format!("/v1/services/api{query}"));
        assert_eq!(answer.status, 200, "{}", answer.body);
        serde_json::from_str(&answer.body).unwrap()
    };
    // A stream of a service that is not there yet begins with nothing.
    let mut events = Events::open(&server.address, "/v1/services:watch?service=api");
    let first = events.next();
    assert_eq!((&first["whole"], first.get("instances")), (&json!(true), None), "{first}");

    let answer = register("a", json!({ "tags": ["blue"] }));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let registered: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(registered["health"], "PASSING", "{registered}");
    let came = events.next();
    assert_eq!(came["instances"][0]["instance"], "a", "{came}");
    let seen = get("");
    assert_eq!((&seen["index"], &came["index"]), (&came["index"], &seen["index"]));
    assert_eq!(seen["instances"][0]["token"], registered["token"]);

    // A long poll waits for the next change, and ends without one.
    let index = seen["index"].as_str().unwrap().to_owned();
    let from = Instant::now();
    assert_eq!(get(&format!("?after={index}&wait_ms=300"))["index"], seen["index"]);
    assert!(from.elapsed() >= Duration::from_millis(300));
    let address = server.address.clone();
    let path = format!("/v1/services/api?after={index}&wait_ms=20000");
    let waiting = std::thread::spawn(move || http(&address, "GET", &path, "", b"").unwrap());
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(register("b", json!({})).status, 200);
    let polled: Value = serde_json::from_str(&waiting.join().unwrap().body).unwrap();
    assert_eq!(polled["instances"].as_array().unwrap().len(), 2, "{polled}");
    assert!(from.elapsed() < Duration::from_secs(15));
    assert_eq!(events.next()["instances"][0]["instance"], "b");

    // A heartbeat that changes nothing is told to nobody; draining takes an instance out of what is to be called.
    let beat = |body: Value| server.post("/v1/services:heartbeat", body.to_string());
    assert_eq!(beat(json!({ "service": "api", "instance": "a" })).status, 200);
    let drain = json!({ "service": "api", "instance": "a" }).to_string();
    assert_eq!(server.post("/v1/services:drain", drain).status, 200);
    assert_eq!(events.next()["removed"], json!(["a"]));
    assert_eq!(get("?health=DRAINING")["instances"][0]["instance"], "a");
    let deregister = json!({ "service": "api", "instance": "b" }).to_string();
    assert_eq!(server.post("/v1/services:deregister", deregister).status, 200);
    assert_eq!(events.next()["removed"], json!(["b"]));
    assert_eq!(get("?all=true")["instances"].as_array().unwrap().len(), 1);

    // Bad input has its code on this face, and changes nothing.
    let code = |answer: common::Answer| {
        let problem: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        (answer.status, problem["code"].as_str().unwrap_or_default().to_owned())
    };
    let before = get("?all=true")["index"].clone();
    let invalid = (400, "INVALID".to_owned());
    for more in [
        json!({ "check": {} }),
        json!({ "check": { "ttl_ms": 5 } }),
        json!({ "check": { "ttl_ms": 5000, "port": 1 } }),
        json!({ "check": { "http": { "path": "no slash" } } }),
        json!({ "check": { "tcp": {}, "interval_ms": 1 } }),
        json!({ "check": null }),
        json!({ "port": 65536 }),
        json!({ "address": "" }),
        json!({ "weight": 70000 }),
        json!({ "service": "" }),
        json!({ "deregister_critical_after_ms": 1000 }),
    ] {
        assert_eq!(code(register("a", more.clone())), invalid, "{more}");
    }
    assert_eq!(register("a", json!({ "colour": "blue" })).status, 400, "an unknown field");
    assert_eq!(code(beat(json!({ "service": "api", "instance": "a", "health": "DRAINING" }))), invalid);
    assert_eq!(code(beat(json!({ "service": "api", "instance": "a", "token": "1" }))), (412, "FENCED".to_owned()));
    assert_eq!(code(beat(json!({ "service": "api", "instance": "z" }))), (404, "NOT_FOUND".to_owned()));
    assert_eq!(code(beat(json!({ "service": "api", "instance": "a", "namespace": "x" }))).0, 404);
    assert_eq!(code(server.get("/v1/services/api?wait_ms=30000")), invalid);
    assert_eq!(code(server.get("/v1/services:watch")), invalid);
    assert_eq!(code(register("c", json!({ "session": "77", "check": null }))), (410, "SESSION_EXPIRED".to_owned()));
    assert_eq!(get("?all=true")["index"], before);
}

#[test]
fn a_registered_command() {
    let server = Server::start(&[]);
    let at = server.address.as_str();
    let run = |command: &str| {
        let mut run = Command::new(TENURE);
        run.env("TENURE_ENDPOINTS", at).args(["service", "run", "job", "--port", "7", "--instance", "j", "--"]);
        run.args(["sh", "-c", command]).stdin(Stdio::null()).spawn().unwrap()
    };
    let mut short = run("exit 3");
    assert_eq!(short.wait().unwrap().code(), Some(3));
    assert_eq!(health(at, "job", "j"), "absent");
    let mut long = run("exec sleep 600");
    wait_for_health(at, "job", "j", "passing");
    rustix::process::kill_process(rustix::process::Pid::from_child(&long), rustix::process::Signal::TERM).unwrap();
    assert_eq!(long.wait().unwrap().code(), Some(128 + 15));
    assert_eq!(health(at, "job", "j"), "absent");
}

#[test]
fn another_member_takes_the_probes_over() {
    let peers: Vec<String> = (0..3).map(|_| free_address()).collect();
    let cluster: Vec<String> = peers.iter().enumerate().map(|(n, peer)| format!("n{n}={peer}")).collect();
    let cluster = cluster.join(",");
    let begin =
        |n: usize| Server::begin(&["--name", &format!("n{n}"), "--peer-listen", &peers[n], "--cluster", &cluster]);
    let mut members: Vec<Server> = (0..3).map(begin).collect();
    members.iter_mut().for_each(Server::await_ready);
    let all = members.iter().map(|member| member.address.as_str()).collect::<Vec<_>>().join(",");
    let web = Web::start();
    let flags = ["--address", "127.0.0.1", "--port", web.port(), "--http", "/", "--interval", "1s", "--failures", "2"];
    let register = || tenure(&all, &[&["service", "register", "web", "a"][..], &flags].concat());
    wait_for("the cluster to take a registration", LIMIT, || register().code == 0);
    wait_for_health(&all, "web", "a", "passing");

    let list = json(&all, &["member", "list"]);
    let leader = list.as_array().unwrap().iter().find(|member| member["leader"] == true).unwrap();
    let place: usize = leader["name"].as_str().unwrap()[1..].parse().unwrap();
    members[place].kill();
    web.say(500);
    wait_for("another member to notice", LIMIT, || {
        let said = tenure(&all, &["service", "get", "web", "--all", "-o", "json"]);
        said.code == 0 && said.out.contains("critical")
    });
    web.say(200);
    wait_for_health(&all, "web", "a", "passing");
}

/// The instances of a cache, with their tokens.
fn known(cache: &tenure_client::ServiceCache) -> Vec<(String, u64)> {
    cache.now().instances.iter().map(|one| (one.instance.clone(), one.token)).collect()
}

async fn until(cache: &mut tenure_client::ServiceCache, expected: &[(&str, u64)]) {
    let waiting = async {
        loop {
            let now = known(cache);
            if now.iter().map(|(name, token)| (name.as_str(), *token)).eq(expected.iter().copied()) {
                return;
            }
            cache.changed().await;
        }
    };
    let waited = tokio::time::timeout(LIMIT, waiting).await;
    assert!(waited.is_ok(), "{expected:?} did not come: {:?}", known(cache));
}

/// With the library: what is deregistered is registered again, what goes with a session comes back with the next one, and a cache keeps what it knows
/// while nobody can be reached.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registration_comes_back_and_a_cache_keeps_what_it_knows() {
    let mut server = Server::start(&[]);
    let client = tenure_client::Client::connect([&server.address]).await.unwrap();
    let registry = client.registry();

    let check = tenure_client::ServiceCheck::ttl(Duration::from_secs(3));
    let kept = registry.register("svc", "a-kept", "10.0.0.1", 1).check(check).await.unwrap();
    let session = client.session().await.unwrap();
    let bound = registry.register("svc", "b-bound", "10.0.0.2", 2).session(&session).await.unwrap();
    let mut cache = registry.follow("svc").await.unwrap();
    until(&mut cache, &[("a-kept", kept.token()), ("b-bound", bound.token())]).await;

    // An operator removes the one; the session of the other ends, and its owner makes another.
    let before = kept.token();
    assert!(registry.deregister("svc", "a-kept", 0).await.unwrap());
    server.post("/v1/sessions:end", json!({ "id": session.id().to_string() }).to_string());
    session.lost().await;
    bound.leave_on_drop();
    let next = client.session().await.unwrap();
    let bound = registry.register("svc", "b-bound", "10.0.0.2", 2).session(&next).await.unwrap();
    let deadline = Instant::now() + LIMIT;
    while kept.token() == before {
        assert!(Instant::now() < deadline, "it is not registered again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(kept.token() > before);
    until(&mut cache, &[("a-kept", kept.token()), ("b-bound", bound.token())]).await;

    // Nobody answers: what was known last stays known. When somebody does again, what has changed meanwhile comes.
    let last = known(&cache);
    server.kill();
    assert!(registry.find("svc").await.is_err());
    assert_eq!(known(&cache), last);
    server.start_again(&[]);
    let third = client.registry().register("svc", "c-new", "10.0.0.3", 3).session(&next).await;
    let third = third.unwrap();
    until(&mut cache, &[("a-kept", kept.token()), ("b-bound", bound.token()), ("c-new", third.token())]).await;
}
