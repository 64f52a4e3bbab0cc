//! Transactions over the primitives on the command line and over HTTP, against a real server.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use common::{Server, ok, tenure_fed};
use serde_json::{Value, json};

fn run(server: &Server, txn: &Value) -> (u16, Value) {
    let answer = server.post("/v1/txn:run", txn.to_string());
    (answer.status, serde_json::from_str(&answer.body).unwrap())
}

fn held(server: &Server, name: &str) -> (String, String) {
    let answer = server.post("/v1/locks:acquire", json!({ "name": name, "ttl_ms": "60000" }).to_string());
    let grant: Value = serde_json::from_str(&answer.body).unwrap();
    (grant["token"].as_str().unwrap().to_owned(), grant["session"].as_str().unwrap().to_owned())
}

#[test]
fn one_commit_over_the_primitives() {
    let server = Server::start(&[]);
    let (token, session) = held(&server, "jobs");
    let once = |by: &str, value: &str| {
        json!({
            "requires": [{ "lock_held": { "name": "jobs", "token": token } }, { "session_alive": { "session": session } }],
            "compares": [{ "counter": { "name": "stock", "max": "1" } }],
            "then": [
                { "once": {
                    "marker": { "fields": { "mail": "1" }, "by": by },
                    "ops": [{ "put": { "key": "effect", "value": value } }],
                } },
                { "counter_add": { "name": "stock", "delta": "1" } },
                { "put": { "key": "last", "value": value } },
            ],
            "otherwise": [{ "range": { "key": "last", "end": "last0" } }],
        })
    };
    let (status, first) = run(&server, &once("job-1", "one"));
    assert_eq!((status, &first["succeeded"]), (200, &json!(true)), "{first}");
    assert_eq!(first["answers"][0]["once"]["answers"], json!([{ "put": {} }]), "{first}");
    assert_eq!(first["answers"][1]["counter_add"]["counter"]["value"], "1");
    let (_, second) = run(&server, &once("job-2", "two"));
    assert_eq!(second["answers"][0]["once"]["already_done"], true, "{second}");
    assert_eq!(second["answers"][0]["once"]["marker"]["by"], "job-1");
    let value = |key: &str| {
        let record: Value = serde_json::from_str(&server.get(&format!("/v1/kv/{key}")).body).unwrap();
        record["record"]["value"].as_str().unwrap().to_owned()
    };
    assert_eq!((value("effect").as_str(), value("last").as_str()), ("one", "two"));
    // The third finds the counter out of its range: the losing compare is named.
    let (_, third) = run(&server, &once("job-3", "three"));
    assert_eq!((third["failed"]["facts"]["value"].as_str(), value("last").as_str()), (Some("2"), "two"), "{third}");
    assert_eq!(third["answers"][0]["range"]["records"][0]["value"], "two");
    // A refused operation drops the whole, and names its place.
    let (status, refused) = run(
        &server,
        &json!({ "then": [
            { "put": { "key": "last", "value": "lost" } },
            { "marker_confirm": { "marker": "mail=9", "token": "3" } },
        ] }),
    );
    assert_eq!((status, refused["code"].as_str()), (412, Some("FENCED")), "{refused}");
    assert_eq!(refused["op"].as_str().or(refused["facts"]["op"].as_str()), Some("1"), "{refused}");
    // The lock is freed and the session ended in one commit; then the requirement no longer holds.
    let end = json!({ "then": [
        { "lock_release": { "name": "jobs", "session": session, "token": token } },
        { "session_end": { "id": session } },
    ] });
    assert_eq!(run(&server, &end).0, 200);
    let (status, fenced) = run(&server, &once("job-4", "four"));
    assert_eq!((status, fenced["code"].as_str(), value("last").as_str()), (412, Some("FENCED"), "two"), "{fenced}");
}

#[test]
fn a_retry_is_answered_and_not_repeated() {
    let server = Server::start(&[]);
    // What is drawn for an operation follows from the request id of the whole.
    let txn = json!({
        "then": [{ "session_create": { "ttl_ms": "60000" } }, { "counter_add": { "name": "n", "delta": "1" } }],
        "request": { "uuid": "00112233-4455-6677-8899-aabbccddeeff" },
    });
    let (_, first) = run(&server, &txn);
    let (_, again) = run(&server, &txn);
    let made = |reply: &Value| reply["answers"][0]["session_create"]["id"].clone();
    assert!(made(&first).is_string() && made(&first) == made(&again), "{first} {again}");
    assert_eq!(again["header"]["replayed"], true);
    assert_eq!(again["answers"][1]["counter_add"]["counter"]["value"], "1");
}

#[test]
fn bad_transactions_change_nothing() {
    let server = Server::start(&[]);
    let put = json!({ "put": { "key": "a", "value": "1" } });
    for wrong in [
        json!({ "then": [{}] }),
        json!({ "then": [{ "nothing": {} }] }),
        json!({ "then": [put, put] }),
        json!({ "then": [{ "put": { "key": "a", "namespace": "default" } }] }),
        json!({ "then": [{ "counter_add": { "name": "n", "delta": "1", "namespace": "default" } }] }),
        json!({ "then": [put, { "lock_acquire": { "name": "l", "ttl_ms": "9000", "mode": "NO" } }] }),
        json!({ "then": [put, { "once": {} }] }),
        json!({ "then": [put, { "marker_claim": { "marker": "plain" } }] }),
        json!({ "compares": [{}], "then": [put] }),
        json!({ "compares": [{ "key": { "key": "a", "version": "0" }, "not": true }], "then": [put] }),
        json!({ "requires": [{ "key": { "key": "a", "version": "0" } }], "then": [put] }),
        json!({ "requires": [{ "session_alive": {} }], "then": [put] }),
        json!({ "then": vec![json!({ "counter_add": { "name": "n", "delta": "1" } }); 129] }),
    ] {
        let (status, refused) = run(&server, &wrong);
        assert_eq!((status, refused["code"].as_str()), (400, Some("INVALID")), "{wrong}: {refused}");
    }
    assert_eq!(server.get("/v1/kv/a").status, 404);
    assert_eq!(server.get("/v1/counters/n").status, 404);
}

#[test]
fn transactions_from_a_shell() {
    let server = Server::start(&[]);
    let at = &server.address;
    let txn = r#"{"compares": [{"key": {"key": "seat/12", "version": "0"}}],
                  "then": [{"put": {"key": "seat/12", "value": "ann"}}],
                  "otherwise": [{"range": {"key": "seat/12", "end": "seat/13"}}]}"#;
    let first = tenure_fed(at, &["txn"], txn);
    assert_eq!(first.code, 0, "{}", first.err);
    assert!(first.out.starts_with("then ran, revision "), "{}", first.out);
    let second = tenure_fed(at, &["txn", "-"], txn);
    assert_eq!(second.code, 10, "{}", second.err);
    assert!(second.out.contains("ann"), "{}", second.out);
    assert!(second.err.starts_with("error: compare 0 does not hold: key `seat/12` is at version 1"), "{}", second.err);
    let file = server.folder.path().join("txn.json");
    std::fs::write(&file, txn).unwrap();
    let third = tenure_fed(at, &["txn", file.to_str().unwrap(), "-o", "json"], "");
    let reply: Value = serde_json::from_str(&third.out).unwrap();
    assert_eq!((third.code, &reply["succeeded"]), (10, &json!(false)));
    assert_eq!(reply["failed"]["current"]["value"], "ann");
    assert_eq!(tenure_fed(at, &["txn"], "{").code, 64);
    assert_eq!(tenure_fed(at, &["txn"], r#"{"than": []}"#).code, 64);
    assert_eq!(ok(at, &["kv", "get", "seat/12"]).trim_end(), "ann");
}
