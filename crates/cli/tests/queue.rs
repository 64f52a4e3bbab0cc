//! Queues on the three faces against a real server.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Server, TENURE, json, ok, tenure, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tenure_client::{Client, ClientOptions, Failed, QueueChange, WorkDone};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

#[test]
fn jobs_from_a_shell() {
    let server = Server::start(&[]);
    let at = &server.address;
    let id = ok(at, &["queue", "put", "mail", "hello", "--key", "k", "--header", "a=b"]);
    let id = id.trim();
    assert_eq!(ok(at, &["queue", "put", "mail", "again", "--key", "k"]), format!("{id} duplicate\n"));
    assert_eq!(tenure(at, &["queue", "put", "mail", "again", "--key", "k", "--unique"]).code, 10);
    let jobs = json(at, &["queue", "receive", "mail", "--wait", "5s", "--worker", "me"]);
    let job = &jobs[0];
    assert_eq!((job["id"].as_str(), job["payload"].as_str()), (Some(id), Some("hello")));
    assert_eq!(job["headers"]["a"].as_str(), Some("b"));
    let token = job["token"].as_str().unwrap();
    // A stale receipt is told what took its place.
    let stale = tenure(at, &["queue", "ack", id, "1"]);
    assert_eq!(stale.code, 12);
    assert!(stale.err.contains("the job is leased, its newest delivery is"), "{}", stale.err);
    assert_eq!(ok(at, &["queue", "heartbeat", id, token, "--extend", "1m", "--progress", "half"]), "60000\n");
    assert_eq!(json(at, &["queue", "job", id])["progress"].as_str(), Some("half"));
    assert_eq!(ok(at, &["queue", "nack", id, token, "--reason", "no", "--dead"]), "dead\n");
    assert!(ok(at, &["queue", "dead", "mail"]).contains("hello"), "the dead letters show the payload");
    assert_eq!(ok(at, &["queue", "redrive", "mail"]), "redriven 1, skipped 0\n");
    let again = json(at, &["queue", "receive", "mail"]);
    let token = again[0]["token"].as_str().unwrap();
    assert_eq!(ok(at, &["queue", "ack", id, token, "--result", "sent"]), "");
    assert_eq!(ok(at, &["queue", "ack", id, token]), "", "the same receipt twice succeeds twice");
    let done = json(at, &["queue", "job", id]);
    assert_eq!((done["state"].as_str(), done["result"].as_str()), (Some("done"), Some("sent")));
    assert_eq!(json(at, &["queue", "receive", "mail"]), Value::Array(Vec::new()));
    ok(at, &["queue", "configure", "mail", "--pause", "--max-attempts", "3"]);
    ok(at, &["queue", "put", "mail", "later"]);
    assert_eq!(json(at, &["queue", "receive", "mail"]), Value::Array(Vec::new()));
    let stats = json(at, &["queue", "stats", "mail"]);
    assert_eq!((stats["jobs"]["ready"].as_u64(), stats["settings"]["max_attempts"].as_u64()), (Some(1), Some(3)));
    assert_eq!(tenure(at, &["queue", "purge", "mail"]).code, 64, "a purge is confirmed");
    assert_eq!(ok(at, &["queue", "purge", "mail", "--yes"]), "purged 1\n");
    assert_eq!(tenure(at, &["queue", "stats", "nothing"]).code, 19);
    assert!(ok(at, &["queue", "list"]).contains("mail"));
}

#[test]
fn a_receiver_that_waits_gets_the_job_when_it_comes_and_one_that_left_gets_none() {
    let server = Server::start(&[]);
    let at = server.address.clone();
    // Killed while it waits: its wait goes with its connection.
    let mut gone = waiting(&at, "q");
    ok(&at, &["queue", "configure", "q"]);
    wait_for("the receiver", Duration::from_secs(10), || receivers(&server) == 1);
    gone.kill().unwrap();
    gone.wait().unwrap();
    wait_for("its wait to end", Duration::from_secs(10), || receivers(&server) == 0);
    let stays = waiting(&at, "q");
    wait_for("the receiver", Duration::from_secs(10), || receivers(&server) == 1);
    let began = Instant::now();
    ok(&at, &["queue", "put", "q", "one"]);
    let output = stays.wait_with_output().unwrap();
    let jobs: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(jobs[0]["payload"].as_str(), Some("one"));
    assert!(began.elapsed() < Duration::from_secs(5), "it came at once");
}

fn receivers(server: &Server) -> u64 {
    let answer = server.get("/v1/queues/q");
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    body["queue"]["receivers"].as_str().and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn waiting(at: &str, queue: &str) -> std::process::Child {
    Command::new(TENURE)
        .args(["queue", "receive", queue, "--wait", "20s", "-o", "json"])
        .env("TENURE_ENDPOINTS", at)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_worker_runs_a_command_for_each_job_and_stops_in_order() {
    let server = Server::start(&[]);
    let at = &server.address;
    let out = server.folder.path().join("out");
    ok(at, &["queue", "configure", "q", "--backoff", "10ms", "--max-attempts", "2"]);
    for payload in ["one", "two", "fail"] {
        ok(at, &["queue", "put", "q", payload]);
    }
    let script = format!(
        "read -r line; [ \"$line\" = fail ] && {{ echo broken >&2; exit 3; }}; echo \"$line $TENURE_ATTEMPT\" >> {}",
        out.display()
    );
    let mut worker = Command::new(TENURE)
        .args(["queue", "work", "q", "-j", "2", "--", "sh", "-c", &script])
        .env("TENURE_ENDPOINTS", at)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let counts = |state: &str| json(at, &["queue", "stats", "q"])["jobs"][state].as_u64().unwrap_or(0);
    wait_for("the jobs", Duration::from_secs(30), || counts("done") == 2 && counts("dead") == 1);
    let mut lines: Vec<String> = std::fs::read_to_string(&out).unwrap().lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["one 1", "two 1"]);
    let dead = json(at, &["queue", "dead", "q"]);
    assert_eq!(dead[0]["attempt"].as_u64(), Some(2));
    assert!(dead[0]["attempts"][1]["error"].as_str().unwrap().contains("broken"), "{dead}");
    kill_process(Pid::from_child(&worker), Signal::TERM).unwrap();
    assert!(worker.wait().unwrap().success());
    wait_for("no receiver", Duration::from_secs(10), || receivers(&server) == 0);
}

#[test]
fn jobs_over_http() {
    let mut server = Server::start(&[]);
    let post = |server: &Server, verb: &str, body: &str| {
        let answer = server.post(&format!("/v1/queues:{verb}"), body);
        let value: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        (answer.status, value)
    };
    let (status, put) = post(
        &server,
        "enqueue",
        r#"{"queue":"a/b","jobs":[{"payload":"x","group":"g"},{"payload_bytes":"/w==","group":"g"}]}"#,
    );
    assert_eq!(status, 200, "{put}");
    let (first, second) = (put["jobs"][0]["id"].clone(), put["jobs"][1]["id"].clone());
    let (_, got) = post(&server, "receive", r#"{"queues":["a/b"],"max":10}"#);
    assert_eq!(
        (&got["jobs"][0]["id"], got["jobs"].as_array().unwrap().len()),
        (&first, 1),
        "one of the group at a time"
    );
    let token = got["jobs"][0]["token"].as_str().unwrap().to_owned();
    // The state outlives its server.
    server.stop();
    server.start_again(&[]);
    let (status, stale) = post(&server, "ack", &format!(r#"{{"receipts":[{{"id":{first},"token":"7777"}}]}}"#));
    assert_eq!((status, stale["code"].as_str()), (412, Some("FENCED")), "{stale}");
    assert_eq!(stale["facts"]["state"].as_str(), Some("leased"), "{stale}");
    let ack = format!(
        r#"{{"receipts":[{{"id":{first},"token":"{token}"}}],"receive":{{"queues":["a/b"],"wait_ms":"1000"}}}}"#
    );
    let (status, next) = post(&server, "ack", &ack);
    assert_eq!((status, &next["jobs"][0]["id"]), (200, &second), "{next}");
    assert_eq!(next["jobs"][0]["payload_bytes"].as_str(), Some("/w=="));
    let (status, empty) = post(&server, "receive", r#"{"queues":["a/b"],"wait_ms":"50"}"#);
    assert_eq!((status, empty["jobs"].as_array().map(Vec::len).unwrap_or(0)), (200, 0), "no job is no error: {empty}");
    let job = server.get(&format!("/v1/jobs/{}", second.as_str().unwrap()));
    assert_eq!(job.status, 200);
    assert_eq!(server.get("/v1/queues/a/b").status, 200);
    assert_eq!(server.get("/v1/queues").status, 200);
    assert_eq!(server.get("/v1/jobs?queue=a/b&state=leased").status, 200);
    for (verb, wrong) in [
        ("enqueue", r#"{"queue":"q"}"#),
        ("enqueue", r#"{"queue":"","jobs":[{"payload":"x"}]}"#),
        ("enqueue", r#"{"queue":"q","jobs":[{"payload":"x","priority":8}]}"#),
        ("enqueue", r#"{"queue":"q","jobs":[{"payload":"x","colour":1}]}"#),
        ("enqueue", r#"{"queue":"q","jobs":[{"payload":"x","payload_bytes":"eA=="}]}"#),
        ("enqueue", r#"{"queue":"q","jobs":[{"payload":"x","delay_ms":"1","run_at_unix_ms":"1"}]}"#),
        ("receive", r#"{"queues":[]}"#),
        ("receive", r#"{"queues":["q"],"max":101}"#),
        ("receive", r#"{"queues":["q"],"wait_ms":"20001"}"#),
        ("receive", r#"{"queues":["q"],"visibility_ms":"999"}"#),
        ("ack", r#"{"receipts":[]}"#),
        ("ack", r#"{"receipts":[{"id":"x","token":"1"}]}"#),
        ("nack", r#"{"id":"1-1"}"#),
        ("purge", r#"{"queue":"q","confirm":"p"}"#),
        ("configure", r#"{"queue":"q","visibility_ms":"1"}"#),
    ] {
        let (status, body) = post(&server, verb, wrong);
        assert_eq!((status, body["code"].as_str()), (400, Some("INVALID")), "{verb} {wrong}: {body}");
    }
    assert_eq!(server.get("/v1/queues/q").status, 404, "nothing of that was done");
    let large = format!(r#"{{"queue":"q","jobs":[{{"payload":"{}"}}]}}"#, "x".repeat(262_145));
    assert_eq!(post(&server, "enqueue", &large).0, 413);
    assert_eq!(post(&server, "redrive", r#"{"queue":"none"}"#).0, 404);
    assert_eq!(post(&server, "cancel", r#"{"id":"1-1"}"#).0, 404);
}

/// What the queue `q` has: receivers that wait, and jobs in a state.
async fn has(client: &Client, state: &str) -> (u64, u64) {
    let info = client.queue("q").info().await.unwrap().unwrap();
    (info.receivers, info.jobs.get(state).copied().unwrap_or(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ack_goes_alone_while_its_worker_may_not_receive() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let queue = client.queue("q");
    queue.enqueue("one").await.unwrap();
    let (taken, go, stop) = (Arc::new(Notify::new()), Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (taking, going, stopping) = (taken.clone(), go.clone(), stop.clone());
    let work = queue.work(move |_| {
        let (taking, going) = (taking.clone(), going.clone());
        async move {
            taking.notify_one();
            going.notified().await;
            Ok::<(), Failed>(())
        }
    });
    let working = tokio::spawn(work.run_until(async move { stopping.notified().await }));
    taken.notified().await;
    // As many as may wait; one connection carries 4,000.
    let mut crowd = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let client = Client::connect([&server.address]).await.unwrap();
        for _ in 0..2_500 {
            let queue = client.queue("q");
            crowd.spawn(async move { queue.receive().wait(Duration::from_secs(20)).await.map(|jobs| jobs.len()) });
        }
    }
    timeout(Duration::from_secs(15), async { while has(&client, "done").await.0 < 10_000 {} }).await.unwrap();
    go.notify_one();
    let acked = timeout(Duration::from_secs(5), async { while has(&client, "done").await.1 == 0 {} }).await;
    let (receivers, done) = has(&client, "done").await;
    assert!(acked.is_ok(), "{receivers} receivers wait, {done} jobs are done");
    stop.notify_one();
    assert_eq!(working.await.unwrap(), WorkDone { acked: 1, ..WorkDone::default() });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_stops_repeats_its_ack_until_its_grace_is_over() {
    let mut server = Server::start(&[]);
    let options = ClientOptions::default().timeout(Duration::from_secs(1));
    let client = Client::with_options([&server.address], options).unwrap();
    let queue = client.queue("q");
    queue.enqueue("one").await.unwrap();
    let (taken, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (taking, going) = (taken.clone(), go.clone());
    let work = queue.work(move |_| {
        let (taking, going) = (taking.clone(), going.clone());
        async move {
            taking.notify_one();
            going.notified().await;
            Ok::<(), Failed>(())
        }
    });
    let working = tokio::spawn(work.run_until(async move { taken.notified().await }));
    sleep(Duration::from_millis(500)).await;
    server.stop();
    go.notify_one();
    sleep(Duration::from_secs(3)).await;
    assert!(!working.is_finished(), "it has 30 s");
    server.start_again(&[]);
    assert_eq!(working.await.unwrap(), WorkDone { acked: 1, ..WorkDone::default() });
    assert_eq!(has(&client, "done").await.1, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_panics_before_its_first_await_has_failed_one_attempt() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let queue = client.queue("q");
    let backoff = Some(Duration::from_millis(10));
    queue.configure(QueueChange { backoff_first: backoff, ..QueueChange::default() }).await.unwrap();
    queue.enqueue("one").await.unwrap();
    let work = queue.work(|job| {
        assert!(job.attempt() > 1, "the first one fails");
        async { Ok::<(), Failed>(()) }
    });
    let all_done = async {
        let done = async { while has(&client, "done").await.1 == 0 {} };
        assert!(timeout(Duration::from_secs(10), done).await.is_ok(), "the worker goes on");
    };
    assert_eq!(work.run_until(all_done).await, WorkDone { acked: 1, failed: 1, ..WorkDone::default() });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_given_back_when_its_handler_has_ended() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let queue = client.queue("q");
    queue.enqueue("one").await.unwrap();
    let computes = Arc::new(AtomicBool::new(false));
    let computing = computes.clone();
    let taken = Arc::new(Notify::new());
    let taking = taken.clone();
    let work = queue.work(move |_| {
        let (computing, taking) = (computing.clone(), taking.clone());
        async move {
            computing.store(true, Ordering::SeqCst);
            taking.notify_one();
            // It holds its thread, and not those that the client needs.
            tokio::task::block_in_place(|| std::thread::sleep(Duration::from_secs(2)));
            computing.store(false, Ordering::SeqCst);
            std::future::pending::<Result<(), Failed>>().await
        }
    });
    let work = work.grace(Duration::from_millis(100)).run_until(async move { taken.notified().await });
    let working = tokio::spawn(work);
    timeout(Duration::from_secs(10), async {
        while !computes.load(Ordering::SeqCst) {
            sleep(Duration::from_millis(5)).await
        }
    })
    .await
    .unwrap();
    let jobs = queue.receive().wait(Duration::from_secs(15)).await.unwrap();
    assert_eq!((jobs.len(), computes.load(Ordering::SeqCst)), (1, false), "two work on one job");
    assert_eq!(working.await.unwrap(), WorkDone { released: 1, ..WorkDone::default() });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receive_that_is_dropped_waits_no_more() {
    let server = Server::start(&[]);
    let client = Client::connect([&server.address]).await.unwrap();
    let queue = client.queue("q");
    queue.configure(QueueChange::default()).await.unwrap();
    let waiting = timeout(Duration::from_millis(500), queue.receive().wait(Duration::from_secs(20)));
    assert!(waiting.await.is_err());
    let left = timeout(Duration::from_secs(5), async { while has(&client, "ready").await.0 > 0 {} }).await;
    assert!(left.is_ok(), "it still waits");
    queue.enqueue("one").await.unwrap();
    assert_eq!(has(&client, "ready").await, (0, 1));
}
