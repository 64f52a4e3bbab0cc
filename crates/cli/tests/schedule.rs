//! Schedules from a shell and over HTTP against a real server.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use std::time::Duration;

use common::{Server, json, ok, tenure, wait_for};
use serde_json::Value;

#[test]
fn schedules_from_a_shell() {
    let server = Server::start(&[]);
    let at = &server.address;
    let nightly = ["schedule", "put", "nightly", "30 3 * * *", "reports", "full", "--zone", "Asia/Kolkata"];
    let said = ok(at, &[&nightly[..], &["--no-overlap", "--run-missed", "--header", "a=b"]].concat());
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].starts_with("created at revision ") && lines.len() == 6, "{said}");
    assert!(lines[1..].iter().all(|line| line.starts_with("next 2") && line.ends_with("T03:30:00+05:30")), "{said}");
    let shown = ok(at, &["schedule", "get", "nightly"]);
    for line in [
        "name       nightly",
        "calendar   30 3 * * * (Asia/Kolkata)",
        "queue      reports",
        "payload    full",
        "missed     run the last",
        "overlap    no",
        "state      ok",
        "enqueued   0",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line} in {shown}");
    }
    assert_eq!(shown.lines().filter(|line| line.starts_with("next ")).count(), 5, "{shown}");
    let seen = json(at, &["schedule", "get", "nightly"]);
    let revision = seen["revision"].as_str().unwrap();
    assert_eq!((seen["time_zone"].as_str(), seen["paused"].as_bool()), (Some("Asia/Kolkata"), Some(false)), "{seen}");
    assert_eq!(tenure(at, &[&nightly[..], &["--if-absent"]].concat()).code, 10);
    assert_eq!(tenure(at, &[&nightly[..], &["--if-revision", "1"]].concat()).code, 10);
    let stored = json(at, &[&nightly[..], &["--if-revision", revision]].concat());
    assert_eq!(stored["created"], false, "{stored}");

    assert_eq!(ok(at, &["schedule", "pause", "nightly"]), "paused\n");
    let list = ok(at, &["schedule", "list", "night"]);
    let row = list.lines().nth(1).unwrap();
    assert!(row.starts_with("nightly  30 3 * * *  reports  paused  ") && row.ends_with("  -"), "{list}");
    let job = ok(at, &["schedule", "run", "nightly"]);
    assert_eq!(ok(at, &["queue", "peek", "reports"]).lines().nth(1).unwrap().split(' ').next(), Some(job.trim()));
    assert_eq!(ok(at, &["schedule", "resume", "nightly"]), "resumed\n");
    assert_eq!(json(at, &["schedule", "list"])[0]["enqueued"], "1");

    let bad = tenure(at, &["schedule", "put", "nightly", "0 0 0 * *", "reports"]);
    assert_eq!((bad.code, bad.out.as_str()), (64, ""), "{}", bad.err);
    assert!(bad.err.contains("field 3, the day of the month (1 to 31), is `0`: number out of bounds"), "{}", bad.err);
    let bad = tenure(at, &["schedule", "put", "nightly", "@daily", "reports", "--zone", "Berlin"]);
    assert!(bad.code == 64 && bad.err.contains("`Berlin` is not the name of a time zone"), "{}", bad.err);
    assert_eq!(tenure(at, &["schedule", "put", "n", "@daily", "q", "--no-overlap", "--key", "k"]).code, 64);
    assert_eq!(tenure(at, &["schedule", "pause", "none"]).code, 19);
    let missing = tenure(at, &["schedule", "get", "none"]);
    assert_eq!((missing.code, missing.err.as_str()), (19, "error: there is no schedule `none`\n"));
    assert_eq!(ok(at, &["schedule", "delete", "nightly"]), "deleted\n");
    assert_eq!(ok(at, &["schedule", "delete", "nightly"]), "there was none\n");
}

#[test]
fn a_killed_server_does_no_tick_again() {
    let mut server = Server::start(&[]);
    ok(&server.address, &["schedule", "put", "s", "@every 1s", "q", "x"]);
    let enqueued = |server: &Server| -> u64 {
        json(&server.address, &["schedule", "get", "s"])["enqueued"].as_str().unwrap().parse().unwrap()
    };
    wait_for("two ticks", Duration::from_secs(10), || enqueued(&server) >= 2);
    server.kill();
    server.start_again(&[]);
    let before = enqueued(&server);
    wait_for("more ticks", Duration::from_secs(10), || enqueued(&server) >= before + 2);
    ok(&server.address, &["schedule", "pause", "s"]);
    let jobs = json(&server.address, &["queue", "receive", "q", "--max", "100"]);
    let tick = |job: &Value| job["headers"]["tenure-tick-ms"].as_str().unwrap().parse::<u64>().unwrap();
    let mut ticks: Vec<u64> = jobs.as_array().unwrap().iter().map(tick).collect();
    assert_eq!(ticks.len() as u64, enqueued(&server));
    ticks.sort_unstable();
    let first = ticks[0];
    assert!(
        ticks.iter().all(|tick| (tick - first).is_multiple_of(1_000)) && ticks.is_sorted_by(|a, b| a < b),
        "{ticks:?}"
    );
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("tenure_schedule_ticks_total{result=\"done\"} "), "{metrics}");
}

#[test]
fn schedules_over_http() {
    let server = Server::start(&[]);
    let call = |path: &str, body: &str| {
        let answer = server.post(path, body);
        (answer.status, serde_json::from_str::<Value>(&answer.body).unwrap())
    };
    let body = r#"{"name":"a/b","calendar":"@hourly","queue":"q","job":{"payload":"x","max_attempts":3}}"#;
    let (status, put) = call("/v1/schedules:put", body);
    assert_eq!(
        (status, put["created"].as_bool(), put["next_unix_ms"][0].is_string()),
        (200, Some(true), true),
        "{put}"
    );
    let got: Value = serde_json::from_str(&server.get("/v1/schedules/a/b").body).unwrap();
    assert_eq!(got["schedule"]["job"]["max_attempts"], 3, "{got}");
    let (status, bad) = call("/v1/schedules:put", r#"{"name":"a/b","calendar":"0 0 31 4 *","queue":"q"}"#);
    assert_eq!(
        (status, bad["code"].as_str(), bad["facts"]["field"].as_str()),
        (400, Some("INVALID"), Some("calendar"))
    );
    assert_eq!(bad["detail"], "`0 0 31 4 *` never comes: no month has such a day", "{bad}");
    let (status, _) = call("/v1/schedules:pause", r#"{"name":"none"}"#);
    assert_eq!(status, 404);
    // In one commit with others, or not at all.
    let both = |counter: &str| {
        format!(
            r#"{{"then":[{{"schedule_put":{{"name":"t","calendar":"@daily","queue":"q"}}}},{{"schedule_delete":{{"name":"a/b"}}}},
            {{"counter_add":{{"name":"c","delta":"1"{counter}}}}}]}}"#
        )
    };
    let (status, refused) = call("/v1/txn:run", &both(r#","max":"0""#));
    assert_eq!((status, refused["facts"]["op"].as_str()), (412, Some("2")), "{refused}");
    assert_eq!((server.get("/v1/schedules/t").status, server.get("/v1/schedules/a/b").status), (404, 200));
    let (status, done) = call("/v1/txn:run", &both(""));
    assert_eq!((status, done["answers"][1]["schedule_delete"]["deleted"].as_bool()), (200, Some(true)), "{done}");
    assert!(done["answers"][0]["schedule_put"]["next_unix_ms"].is_array(), "{done}");
    assert_eq!((server.get("/v1/schedules/t").status, server.get("/v1/schedules/a/b").status), (200, 404));
}
