//! Idempotency records over a real server: the command line, JSON over HTTP, and the client library.

#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod common;

use std::time::Duration;

use common::{Said, Server, json, tenure};
use serde_json::{Value, json};
use tenure_client::{Begun, Client, Code, Failure, Fingerprint, RunError, StoredResult, Takeover};

fn code(said: &Said) -> i32 {
    said.code
}

fn said(said: &Said) -> String {
    said.out.clone()
}

#[test]
fn a_command_runs_once_per_key() {
    let server = Server::start(&[]);
    let file = server.folder.path().join("effects");
    let script = format!("echo ran >> {}; echo out-$TENURE_ATTEMPT_NO; exit 3", file.display());
    let run = |key: &str, script: &str| tenure(&server.address, &["idem", "run", key, "--", "sh", "-c", script]);
    let first = run("nightly", &script);
    assert_eq!((code(&first), said(&first)), (3, "out-1\n".to_owned()), "{first:?}");
    let again = run("nightly", &script);
    assert_eq!((code(&again), said(&again)), (3, "out-1\n".to_owned()), "{again:?}");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "ran\n", "it ran once");
    let other = run("nightly", "true");
    assert_eq!(code(&other), 15, "another command under this key: {other:?}");
    // A failure that may be tried again stores nothing.
    let retry = |script: &str| {
        tenure(&server.address, &["idem", "run", "r", "--retry-failures", "--any-command", "--", "sh", "-c", script])
    };
    assert_eq!(code(&retry("exit 5")), 5);
    let second = retry("echo $TENURE_ATTEMPT_NO");
    assert_eq!((code(&second), said(&second)), (0, "2\n".to_owned()), "{second:?}");
    assert_eq!(code(&run("gone", "kill -9 $$")), 137);
    assert_eq!(code(&tenure(&server.address, &["idem", "run", "none", "--", "/no/such/command"])), 127);
    assert_eq!(
        code(&tenure(&server.address, &["idem", "run", "none", "--", "/no/such/command"])),
        127,
        "its key is free"
    );
}

#[test]
fn each_verb_of_the_command_line() {
    let server = Server::start(&[]);
    let idem = |args: &[&str]| tenure(&server.address, &[&["idem"], args].concat());
    let begin = |args: &[&str]| -> Value {
        let out = idem(&[&["begin", "k", "--scope", "shop", "-o", "json"], args].concat());
        serde_json::from_str(&out.out).unwrap_or_else(|_| panic!("{out:?}"))
    };
    let granted = begin(&["--fingerprint", "three apples", "--no-takeover", "--ttl", "1s"]);
    let token = granted["attempt"].as_str().unwrap().to_owned();
    assert_eq!((&granted["result"], &granted["attempt_no"]), (&json!("granted"), &json!(1)));
    let lost = idem(&["begin", "k", "--scope", "shop"]);
    assert_eq!(code(&lost), 14, "{lost:?}");
    let scoped = ["--scope", "shop", "--attempt", &token];
    assert_eq!(code(&idem(&[&["checkpoint", "k", "sent", "--data", "req-9"], &scoped[..]].concat())), 0);
    assert_eq!(code(&idem(&[&["heartbeat", "k", "--ttl", "1s"], &scoped[..]].concat())), 0);
    assert_eq!(code(&idem(&["begin", "k", "--scope", "shop", "--fingerprint", "four"])), 15);
    // It dies, and nobody may take it over.
    common::wait_for("the end of the lease", Duration::from_secs(10), || {
        code(&idem(&["begin", "k", "--scope", "shop"])) == 16
    });
    let listed = json(&server.address, &["idem", "list", "--all-scopes", "--state", "needs-reconcile"]);
    assert_eq!((listed[0]["key"].as_str(), listed[0]["checkpoint_count"].as_u64()), (Some("k"), Some(1)));
    assert_eq!(code(&idem(&["reconcile", "k", "release", "--attempt", "1", "--scope", "shop"])), 12);
    assert_eq!(code(&idem(&["reconcile", "k", "release", "--scope", "shop"])), 0);
    assert_eq!(code(&idem(&[&["complete", "k"], &scoped[..]].concat())), 12, "the attempt is over");
    let second = begin(&[]);
    assert_eq!((&second["attempt_no"], &second["checkpoints"][0]["data"]), (&json!(2), &json!("req-9")));
    let token = second["attempt"].as_str().unwrap();
    let complete = idem(&[
        "complete",
        "k",
        "--scope",
        "shop",
        "--attempt",
        token,
        "--status",
        "201",
        "--body",
        "ok",
        "--header",
        "etag: 7",
    ]);
    assert_eq!(code(&complete), 0, "{complete:?}");
    let replay = begin(&["--fingerprint", "three apples"]);
    assert_eq!((&replay["result"], &replay["stored"]["body"]), (&json!("replay"), &json!("ok")));
    let shown = json(&server.address, &["idem", "get", "k", "--scope", "shop"]);
    assert_eq!((&shown["state"], &shown["result"]["headers"][0]["value"]), (&json!("completed"), &json!("7")));
    assert_eq!(code(&idem(&["get", "k"])), 19, "another scope");
    let derived = said(&idem(&["derive", "order-42", "charge"]));
    assert_eq!(derived.trim(), tenure_client::derive("order-42", "charge"));
    let f = begin_of(&server, "f");
    assert_eq!(code(&idem(&["fail", "f", "--attempt", &f, "--final", "--status", "402"])), 0);
    let table = idem(&["list"]);
    assert!(said(&table).contains("failed"), "{table:?}");
}

fn begin_of(server: &Server, key: &str) -> String {
    let out = json(&server.address, &["idem", "begin", key]);
    out["attempt"].as_str().unwrap().to_owned()
}

fn post(server: &Server, verb: &str, body: Value) -> (u16, Value) {
    let answer = server.post(&format!("/v1/idempotency:{verb}"), body.to_string());
    (answer.status, serde_json::from_str(&answer.body).unwrap_or(Value::Null))
}

#[test]
fn json_over_http_and_bad_input() {
    let server = Server::start(&[]);
    let (status, granted) = post(&server, "begin", json!({"scope": "s", "key": "a/b", "takeover": "TAKEOVER_NEVER"}));
    assert_eq!((status, &granted["granted"]["attempt_no"]), (200, &json!(1)), "{granted}");
    assert!(granted["warning"].as_str().is_some_and(|w| !w.is_empty()), "a short key is told of");
    let attempt = granted["granted"]["attempt"].clone();
    assert!(attempt.is_string(), "a token is a decimal string");
    let (status, flight) = post(&server, "begin", json!({"scope": "s", "key": "a/b"}));
    assert_eq!((status, flight["in_flight"]["attempt"] == attempt), (200, true), "losing is no error: {flight}");
    let of = |mut body: Value| {
        body["scope"] = json!("s");
        body["key"] = json!("a/b");
        body["attempt"] = attempt.clone();
        body
    };
    let bad = [
        ("begin", json!({"scope": "s"}), 400),
        ("begin", json!({"key": "k", "nonsense": 1}), 400),
        ("begin", json!({"key": "k".repeat(256)}), 400),
        ("begin", json!({"key": "k", "attempt_ttl_ms": "10"}), 400),
        ("begin", json!({"key": "k", "retention_ms": "10"}), 400),
        ("begin", json!({"key": "k", "wait_ms": "3600001"}), 400),
        ("begin", json!({"key": "k", "takeover": 9}), 400),
        ("begin", json!({"key": "k", "fingerprint": {"algorithm": "a"}}), 400),
        ("begin", json!({"key": "k", "namespace": "other"}), 404),
        ("heartbeat", json!({"key": "k"}), 400),
        ("heartbeat", json!({"key": "k", "attempt": "1"}), 412),
        ("checkpoint", of(json!({})), 400),
        ("checkpoint", of(json!({"checkpoint": {"name": "n", "data": "x".repeat(16_385)}})), 400),
        ("complete", json!({"key": "k", "attempt": "1"}), 412),
        ("complete", of(json!({"result": {"body": "a", "body_bytes": "YQ=="}})), 400),
        ("complete", of(json!({"result": {"not_retained": {"size": "1", "sha256": "YQ=="}}})), 400),
        ("fail", of(json!({})), 400),
        ("fail", of(json!({"retryable": false})), 400),
        ("reconcile", of(json!({})), 400),
        ("reconcile", of(json!({"release": true})), 409),
        ("reconcile", json!({"key": "k", "release": true}), 404),
    ];
    for (verb, body, expected) in bad {
        let (status, problem) = post(&server, verb, body.clone());
        assert_eq!(status, expected, "{verb} {body}: {problem}");
    }
    let get = |path: &str| server.get(path);
    let record: Value = serde_json::from_str(&get("/v1/idempotency/a/b?scope=s").body).unwrap();
    assert_eq!((&record["record"]["state"], &record["record"]["attempt"]), (&json!("running"), &attempt));
    // A body above what is kept: told at the completion, and asking again is refused, not run.
    let (status, done) = post(&server, "complete", of(json!({"result": {"status": 200, "body": "x".repeat(300_000)}})));
    assert_eq!((status, &done["not_retained"]), (200, &json!(true)));
    let (status, lost) = post(&server, "begin", json!({"scope": "s", "key": "a/b"}));
    assert_eq!((status, lost["code"].as_str()), (409, Some("RESULT_NOT_RETAINED")), "{lost}");
    assert_eq!(get("/v1/idempotency/none").status, 404);
    let page: Value = serde_json::from_str(&get("/v1/idempotency?scope=s&limit=1").body).unwrap();
    assert_eq!(page["records"][0]["key"], json!("a/b"));
    let (status, fingerprinted) =
        post(&server, "begin", json!({"key": "f", "fingerprint": {"algorithm": "a", "digest": "YQ=="}}));
    assert_eq!(status, 200, "{fingerprinted}");
    let (status, mismatch) =
        post(&server, "begin", json!({"key": "f", "fingerprint": {"algorithm": "a", "digest": "Yg=="}}));
    assert_eq!((status, mismatch["code"].as_str()), (422, Some("MISMATCH")), "{mismatch}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_library_runs_work_once() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let orders = client.idempotent("orders").fingerprint(Fingerprint::of("3 apples")).wait(Duration::from_secs(20));
    let ran = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let runs = (0..50).map(|_| {
        let (orders, ran) = (orders.clone(), ran.clone());
        tokio::spawn(async move {
            let work = |attempt: tenure_client::Attempt| async move {
                ran.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                attempt.checkpoint("charged", "ch_1").await?;
                tokio::time::sleep(Duration::from_millis(200)).await;
                Ok::<_, Failure<tenure_client::Error>>(StoredResult::new("receipt").status(201))
            };
            orders.run("order-1", work).await.unwrap()
        })
    });
    let mut fresh = 0;
    for run in runs.collect::<Vec<_>>() {
        let ran = run.await.unwrap();
        assert_eq!((ran.result.status, &ran.result.body[..], ran.failed), (201, &b"receipt"[..], false));
        fresh += u64::from(!ran.replayed);
    }
    assert_eq!((fresh, ran.load(std::sync::atomic::Ordering::SeqCst)), (1, 1));

    // A large replay comes whole.
    let large = StoredResult::new(vec![7; 200_000]);
    let stored = large.clone();
    let plain = client.idempotent("orders");
    plain.run("large", |_| async { Ok::<_, Failure<()>>(stored) }).await.unwrap();
    let again = plain.run("large", |_| async { Err::<StoredResult, _>(Failure::Retryable(())) }).await.unwrap();
    assert!(again.replayed && again.result == large);

    // A retryable failure frees the key; heartbeats keep a long attempt of a short lease.
    let short = plain.clone().attempt_ttl(Duration::from_secs(1));
    let failed = short.run("long", |_| async { Err::<StoredResult, _>(Failure::Retryable("again")) }).await;
    assert!(matches!(failed, Err(RunError::Work("again"))));
    let long = tokio::spawn({
        let short = short.clone();
        async move {
            let work = |attempt: tenure_client::Attempt| async move {
                tokio::time::sleep(Duration::from_millis(2_500)).await;
                Ok::<_, Failure<()>>(StoredResult::new(attempt.number().to_string()))
            };
            short.run("long", work).await
        }
    });
    tokio::time::sleep(Duration::from_millis(1_800)).await;
    assert!(matches!(short.begin("long").await.unwrap(), Begun::InFlight(_)), "its heartbeats keep it");
    assert_eq!(&long.await.unwrap().unwrap().result.body[..], b"2");

    // One that was left is followed, and then fenced; one that may not be followed needs a decision.
    let Begun::Granted(old) = short.begin("left").await.unwrap() else { panic!() };
    old.abandon().await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_300)).await;
    let Begun::Granted(new) = short.begin("left").await.unwrap() else { panic!() };
    assert!(new.token() > old.token() && new.number() == 2);
    assert_eq!(old.complete(&StoredResult::default()).await.unwrap_err().code(), Some(Code::Fenced));
    let Begun::Granted(never) = short.clone().takeover(Takeover::Never).begin("sent").await.unwrap() else { panic!() };
    never.abandon().await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_300)).await;
    assert_eq!(short.begin("sent").await.unwrap_err().code(), Some(Code::NeedsReconcile));
    never.complete(&StoredResult::new("late")).await.unwrap();
    assert!(matches!(short.begin("sent").await.unwrap(), Begun::Replay(r) if &r.result.body[..] == b"late"));
}
