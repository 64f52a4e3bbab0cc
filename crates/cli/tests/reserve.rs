//! `tenure reserve` and the same over HTTP, against a real server.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

mod common;

use std::time::Duration;

use common::{Server, json, ok, tenure, wait_for};
use serde_json::Value;

fn number(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

#[test]
fn the_last_seat_goes_to_one_of_many() {
    let server = Server::start(&[]);
    let at = server.address.as_str();
    let early = tenure(at, &["reserve", "seats", "1"]);
    assert!(
        early.code == 19 && early.err.contains("hint: `tenure reserve pool create"),
        "{} {}",
        early.code,
        early.err
    );
    ok(at, &["reserve", "pool", "create", "seats", "1"]);
    let buyers: Vec<_> = (0..12)
        .map(|n| {
            let (at, owner) = (at.to_owned(), format!("buyer {n}"));
            std::thread::spawn(move || tenure(&at, &["reserve", "seats", "1", "--owner", &owner, "-o", "json"]))
        })
        .collect();
    let said: Vec<_> = buyers.into_iter().map(|buyer| buyer.join().unwrap()).collect();
    let winners: Vec<_> = said.iter().filter(|said| said.code == 0).collect();
    assert_eq!(winners.len(), 1);
    assert!(said.iter().filter(|said| said.code != 0).all(|said| said.code == 1 && said.err.contains("--wait")));
    let won: Value = serde_json::from_str(&winners[0].out).unwrap();
    let (id, token) = (number(&won["id"]), number(&won["token"]));
    let stale = tenure(at, &["reserve", "confirm", "seats", &id, "1"]);
    assert_eq!(stale.code, 12, "{}", stale.err);
    assert_eq!(json(at, &["reserve", "confirm", "seats", &id, &token])["state"], "confirmed");
    assert_eq!(json(at, &["reserve", "pool", "get", "seats"])["available"], 0);
    ok(at, &["reserve", "pool", "return", "seats", "1"]);
    assert_eq!(json(at, &["reserve", "pools"])[0]["available"], 1);
}

#[test]
fn a_command_confirms_by_its_success_and_a_waiter_is_served_by_a_failure() {
    let server = Server::start(&[]);
    let at = server.address.as_str();
    ok(at, &["reserve", "pool", "create", "slots", "2"]);
    let shell = |script: &str| {
        tenure(at, &["reserve", "slots", "2", "--hold", "1s", "--wait", "20s", "--", "sh", "-c", script])
    };
    // Longer than the hold: it is extended.
    let failed = shell("sleep 1.5; echo $TENURE_POOL $TENURE_QUANTITY; exit 7");
    assert_eq!((failed.code, failed.out.trim()), (7, "slots 2"));
    assert_eq!(shell("true").code, 0);
    let pool = json(at, &["reserve", "pool", "get", "slots"]);
    assert_eq!((&pool["confirmed"], &pool["held"]), (&2.into(), &0.into()));
    ok(at, &["reserve", "pool", "restock", "slots", "2"]);
    assert_eq!(tenure(at, &["reserve", "slots", "1", "--give-back", "--", "true"]).code, 0);
    assert_eq!(json(at, &["reserve", "pool", "get", "slots"])["available"], 2);
    assert_eq!(tenure(at, &["reserve", "slots", "1", "--", "no-such-command"]).code, 127);
    assert_eq!(json(at, &["reserve", "pool", "get", "slots"])["available"], 2);
}

#[test]
fn a_hold_that_ends_serves_who_waits_and_one_who_goes_leaves_the_list() {
    let server = Server::start(&[]);
    let at = server.address.as_str();
    ok(at, &["reserve", "pool", "create", "p", "1"]);
    let first = json(at, &["reserve", "p", "1", "--hold", "1s"]);
    let second = json(at, &["reserve", "p", "1", "--wait", "20s"]);
    assert!(second["token"].as_str() > first["token"].as_str());
    // A waiter that is killed is forgotten with its time, one that runs out of it at once.
    assert_eq!(tenure(at, &["reserve", "p", "1", "--wait", "300ms"]).code, 1);
    let (id, token) = (number(&second["id"]), number(&second["token"]));
    ok(at, &["reserve", "extend", "p", &id, &token, "--hold", "1h"]);
    ok(at, &["reserve", "cancel", "p", &id, &token]);
    wait_for("an empty list", Duration::from_secs(5), || {
        json(at, &["reserve", "pool", "get", "p"])["waiting"].as_array().unwrap().is_empty()
    });
    ok(at, &["reserve", "pool", "delete", "p"]);
    assert_eq!(tenure(at, &["reserve", "pool", "get", "p"]).code, 19);
}

#[test]
fn bad_input_over_http_changes_nothing() {
    let server = Server::start(&[]);
    let check = |path: &str, body: &str, status: u16, code: &str| {
        let answer = server.post(path, body);
        let problem: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!((answer.status, problem["code"].as_str()), (status, Some(code)), "{path} {body}: {}", answer.body);
    };
    assert_eq!(server.post("/v1/pools:create", r#"{"name": "a/b", "capacity": "3"}"#).status, 200);
    check("/v1/pools:create", r#"{"name": "a/b", "capacity": "3"}"#, 412, "CONFLICT");
    check("/v1/pools:create", r#"{"capacity": "3"}"#, 400, "INVALID");
    check("/v1/pools:create", r#"{"name": "x", "capacity": "1000000000000001"}"#, 400, "INVALID");
    check("/v1/pools:create", r#"{"name": "x", "size": 3}"#, 400, "INVALID");
    check("/v1/pools:resize", r#"{"name": "a/b"}"#, 400, "INVALID");
    check("/v1/pools:resize", r#"{"name": "none", "capacity": 1}"#, 404, "NOT_FOUND");
    check("/v1/pools:return", r#"{"name": "a/b", "quantity": 1}"#, 412, "CONFLICT");
    check("/v1/pools:restock", r#"{"name": "a/b"}"#, 400, "INVALID");
    check("/v1/pools:delete", r#"{"name": "none"}"#, 404, "NOT_FOUND");
    check("/v1/reservations:reserve", r#"{"pool": "a/b"}"#, 400, "INVALID");
    check("/v1/reservations:reserve", r#"{"pool": "none", "quantity": 1}"#, 404, "NOT_FOUND");
    check("/v1/reservations:reserve", r#"{"pool": "a/b", "quantity": 4}"#, 412, "CONFLICT");
    check("/v1/reservations:reserve", r#"{"pool": "a/b", "quantity": 1, "hold_ms": 999}"#, 400, "INVALID");
    check("/v1/reservations:reserve", r#"{"pool": "a/b", "quantity": 1, "wait_ms": 86400001}"#, 400, "INVALID");
    check("/v1/reservations:reserve", r#"{"pool": "a/b", "quantity": 1, "forever": true}"#, 400, "INVALID");
    check("/v1/reservations:reserve", r#"{"pool": "a/b", "quantity": 1, "session": "99"}"#, 410, "SESSION_EXPIRED");
    check("/v1/reservations:reserve", r#"{"pool": "a/b", "quantity": 1, "namespace": "x"}"#, 404, "NOT_FOUND");
    check("/v1/reservations:confirm", r#"{"pool": "a/b", "id": "1", "token": "9"}"#, 412, "FENCED");
    check("/v1/reservations:confirm", r#"{"pool": "a/b", "token": "9"}"#, 400, "INVALID");
    check("/v1/reservations:cancel", r#"{"pool": "a/b", "id": "1"}"#, 400, "INVALID");
    check("/v1/reservations:extend", r#"{"pool": "a/b", "id": "1", "token": "9", "hold_ms": 1}"#, 400, "INVALID");
    check("/v1/reservations:give-up", r#"{"pool": "a/b"}"#, 400, "INVALID");
    let granted = server.post("/v1/reservations:reserve", r#"{"pool": "a/b", "quantity": 3}"#);
    assert_eq!(granted.status, 200, "{}", granted.body);
    check("/v1/reservations:reserve", r#"{"pool": "a/b", "quantity": 1}"#, 409, "HELD");
    check("/v1/reservations:reserve", r#"{"pool": "a/b", "quantity": 1, "wait_ms": 50}"#, 409, "TIMEOUT_WAITING");
    check("/v1/pools:resize", r#"{"name": "a/b", "capacity": 2}"#, 412, "CONFLICT");
    check("/v1/pools:delete", r#"{"name": "a/b"}"#, 409, "HELD");
    let pool: Value = serde_json::from_str(&server.get("/v1/pools/a/b").body).unwrap();
    assert_eq!((&pool["pool"]["capacity"], &pool["pool"]["held"]), (&"3".into(), &"3".into()), "{pool}");
    assert_eq!(server.get("/v1/pools/none").status, 404);
}

#[test]
fn a_command_does_not_outlive_a_hold_that_nobody_can_extend() {
    let mut server = Server::start(&[]);
    ok(&server.address, &["reserve", "pool", "create", "p", "1"]);
    let started = server.folder.path().join("started");
    // It hears no warning.
    let script = "trap '' TERM; : > started; while :; do sleep 0.1; done";
    let mut run = std::process::Command::new(common::TENURE)
        .args(["reserve", "p", "1", "--hold", "2s", "--", "sh", "-c", script])
        .env("TENURE_ENDPOINTS", &server.address)
        .current_dir(server.folder.path())
        .spawn()
        .unwrap();
    wait_for("the command", Duration::from_secs(10), || started.exists());
    server.kill();
    wait_for("its end", Duration::from_secs(10), || run.try_wait().unwrap().is_some());
    assert_eq!(run.wait().unwrap().code(), Some(76));
}
