//! Idempotency keys of a real axum service over a real server.

#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::Extension;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Router, body::Bytes};
use common::{Answer, Server, http};
use serde_json::Value;
use tenure_client::tower::{BodyPrint, IdempotencyLayer};
use tenure_client::{Attempt, Client, Takeover};

async fn serve(layer: IdempotencyLayer, orders: Arc<AtomicU64>) -> String {
    let slow = |Extension(attempt): Extension<Attempt>, body: Bytes| async move {
        tokio::time::sleep(Duration::from_millis(400)).await;
        let order = orders.fetch_add(1, Ordering::SeqCst) + 1;
        assert!(attempt.token() > 0);
        let headers = [("location", "/orders/1"), ("set-cookie", "secret=1"), ("x-trace", "t")];
        (StatusCode::CREATED, headers, format!("order {order} of {} bytes", body.len()))
    };
    let status = |headers: HeaderMap| async move {
        let code: u16 = headers["x-status"].to_str().unwrap().parse().unwrap();
        let outcome = headers.get("x-outcome").cloned().unwrap_or_else(|| "".parse().unwrap());
        (StatusCode::from_u16(code).unwrap(), [("idempotency-outcome", outcome)], "said")
    };
    let app = Router::new()
        .route("/orders", post(slow).get(|| async { "all" }))
        .route("/status", post(status))
        .route("/large", post(|| async { "x".repeat(300_000) }))
        .route("/linked", post(|| async { ([("link", "x".repeat(17_000))], "made") }))
        .route("/free", get(|| async { "free" }))
        .layer(layer);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

async fn ask(address: &str, method: &'static str, path: &'static str, headers: &str, body: &str) -> Answer {
    let (address, headers, body) = (address.to_owned(), format!("x-user: alice\r\n{headers}"), body.to_owned());
    tokio::task::spawn_blocking(move || http(&address, method, path, &headers, body.as_bytes()).unwrap()).await.unwrap()
}

fn kind(answer: &Answer) -> String {
    let problem: Value = serde_json::from_str(&answer.body).unwrap_or_else(|_| panic!("{}", answer.body));
    problem["type"].as_str().unwrap().trim_start_matches(tenure_client::tower::PROBLEM_TYPES).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_runs_each_key_once() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let layer = IdempotencyLayer::new(&client)
        .required(true)
        .request_bytes_max(1_000)
        .takeover(Takeover::Never)
        .attempt_ttl(Duration::from_secs(2))
        .body_print(BodyPrint::Json { exclude: vec!["/sent_at".to_owned()] })
        .principal(|request| request.headers.get("x-user")?.to_str().ok().map(str::to_owned));
    let orders = Arc::new(AtomicU64::new(0));
    let address = serve(layer, orders.clone()).await;

    // Safe methods pass, a change needs a key, a bad one is told.
    assert_eq!(ask(&address, "GET", "/orders", "", "").await.body, "all");
    let missing = ask(&address, "POST", "/orders", "", "{}").await;
    assert_eq!((missing.status, &*kind(&missing)), (400, "key-missing"));
    for bad in ["idempotency-key: \"open\r\n", "idempotency-key: \r\n", "idempotency-key: a\r\nidempotency-key: b\r\n"]
    {
        let answer = ask(&address, "POST", "/orders", bad, "{}").await;
        assert_eq!((answer.status, &*kind(&answer)), (400, "key-malformed"), "{bad}");
    }
    let long = format!("\"{}\"", "x".repeat(1_000));
    let large = ask(&address, "POST", "/orders", "idempotency-key: l\r\n", &long).await;
    assert_eq!((large.status, &*kind(&large)), (413, "request-too-large"));

    // Twenty at once: one runs, and afterwards all get its answer, by the quoted key or the bare one.
    let at_once: Vec<_> = (0..20)
        .map(|_| {
            let address = address.clone();
            tokio::spawn(async move {
                ask(&address, "POST", "/orders", "idempotency-key: k-1\r\n", r#"{"a":1,"sent_at":1}"#).await
            })
        })
        .collect();
    let mut created = 0;
    for answer in at_once {
        let answer = answer.await.unwrap();
        match answer.status {
            201 => created += 1,
            _ => assert_eq!((answer.status, &*kind(&answer)), (409, "in-flight")),
        }
    }
    assert_eq!((created, orders.load(Ordering::SeqCst)), (1, 1));
    let again = ask(&address, "POST", "/orders", "idempotency-key: \"k-1\"\r\n", r#"{"sent_at": 2, "a": 1}"#).await;
    assert_eq!((again.status, &*again.body), (201, "order 1 of 19 bytes"));
    assert_eq!(orders.load(Ordering::SeqCst), 1);
    let other = ask(&address, "POST", "/orders", "idempotency-key: k-1\r\n", r#"{"a":2}"#).await;
    assert_eq!((other.status, &*kind(&other)), (422, "mismatch"));
    let bob = {
        let address = address.clone();
        tokio::task::spawn_blocking(move || {
            http(&address, "POST", "/orders", "x-user: bob\r\nidempotency-key: k-1\r\n", b"{}").unwrap()
        })
    };
    assert_eq!(bob.await.unwrap().body, "order 2 of 2 bytes", "a key belongs to who sends it");

    // What is stored, by status or by what the service says of it.
    let said = async |key: &str, headers: &str| {
        ask(&address, "POST", "/status", &format!("idempotency-key: {key}\r\n{headers}"), "").await.status
    };
    assert_eq!(said("s1", "x-status: 404\r\n").await, 404);
    assert_eq!(said("s1", "x-status: 200\r\n").await, 404, "a refusal is an answer");
    assert_eq!(said("s2", "x-status: 429\r\n").await, 429);
    assert_eq!(said("s2", "x-status: 200\r\n").await, 200, "what may pass later is not stored");
    assert_eq!(said("s3", "x-status: 500\r\nx-outcome: final\r\n").await, 500);
    assert_eq!(said("s3", "x-status: 200\r\n").await, 500);
    assert_eq!(said("s4", "x-status: 500\r\nx-outcome: retryable\r\n").await, 500);
    assert_eq!(said("s4", "x-status: 200\r\n").await, 200);
    // Nobody knows what came of it, and nobody may take it over.
    assert_eq!(said("s5", "x-status: 500\r\n").await, 500);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let dead = ask(&address, "POST", "/status", "idempotency-key: s5\r\nx-status: 200\r\n", "").await;
    assert_eq!((dead.status, &*kind(&dead)), (409, "needs-reconcile"));

    // Too large to keep: whole the first time, refused afterwards.
    let first = ask(&address, "POST", "/large", "idempotency-key: big\r\n", "").await;
    assert_eq!((first.status, first.body.len()), (200, 300_000));
    let second = ask(&address, "POST", "/large", "idempotency-key: big\r\n", "").await;
    assert_eq!((second.status, &*kind(&second)), (409, "result-not-retained"));
    // So it is with headers, which the service refuses to store.
    let first = ask(&address, "POST", "/linked", "idempotency-key: links\r\n", "").await;
    assert_eq!((first.status, &*first.body), (200, "made"));
    let second = ask(&address, "POST", "/linked", "idempotency-key: links\r\n", "").await;
    assert_eq!((second.status, &*kind(&second)), (409, "result-not-retained"));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_service_nothing_runs() {
    let nobody = common::free_address();
    let options = tenure_client::ClientOptions::default().timeout(Duration::from_millis(300));
    let client = Client::with_options([nobody], options).unwrap();
    let orders = Arc::new(AtomicU64::new(0));
    let address = serve(IdempotencyLayer::new(&client), orders.clone()).await;
    let refused = ask(&address, "POST", "/orders", "idempotency-key: k\r\n", "{}").await;
    assert_eq!((refused.status, &*kind(&refused)), (503, "unavailable"));
    assert_eq!(orders.load(Ordering::SeqCst), 0);
    assert_eq!(ask(&address, "GET", "/free", "", "").await.body, "free");
}
