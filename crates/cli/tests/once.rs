//! Effect markers on the command line and over HTTP, against a real server.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use common::{Server, json, ok, tenure};
use serde_json::Value;

#[test]
fn a_command_runs_once_per_marker() {
    let server = Server::start(&[]);
    let at = &server.address;
    let file = server.folder.path().join("effect");
    let effect = format!("echo $TENURE_EFFECT_KEY >> {}", file.display());
    let run = |marker: &str, command: &str| tenure(at, &["once", marker, "--by", "me", "--", "sh", "-c", command]);

    assert_eq!(run("type=mail,user=1", &effect).code, 0);
    // The fields in another order are the same marker.
    let again = run("user=1,type=mail", &effect);
    assert_eq!(again.code, 0);
    assert!(again.err.starts_with("already done by `me` "), "{}", again.err);
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 1);

    // A command that fails gives the claim back; the next run has the same key.
    assert_eq!(run("type=mail,user=2", &format!("{effect}; exit 3")).code, 3);
    assert_eq!(run("type=mail,user=2", &effect).code, 0);
    let keys = std::fs::read_to_string(&file).unwrap();
    let keys: Vec<&str> = keys.lines().collect();
    assert!(keys.len() == 3 && keys[1] == keys[2] && keys[0] != keys[1], "{keys:?}");
    assert_eq!(tenure(at, &["once", "a=1", "--", "/no/such/command"]).code, 127);

    let marker = json(at, &["once", "get", "type=mail,user=2"]);
    assert_eq!((marker["state"].as_str(), marker["events"][0]["kind"].as_str()), (Some("done"), Some("released")));
    assert_eq!(json(at, &["once", "list", "type=mail"]).as_array().unwrap().len(), 2);
    ok(at, &["once", "delete", "type=mail,user=1", "--reason", "wrong address"]);
    assert_eq!(tenure(at, &["once", "delete", "type=mail,user=1", "--reason", "again"]).code, 19);
    assert_eq!(run("type=mail,user=1", &effect).code, 0);
    assert_eq!(std::fs::read_to_string(&file).unwrap().lines().count(), 4);
    for wrong in [&["once", "plain"][..], &["once"], &["once", "a=1,a=2"], &["once", "a=1", "--retention", "59m"]] {
        assert_eq!(tenure(at, wrong).code, 64, "{wrong:?}");
    }
    assert_eq!(tenure(at, &["once", "get", "none=1"]).code, 19);
}

#[test]
fn a_claim_that_died_needs_a_decision() {
    let server = Server::start(&[]);
    let call = |path: &str, body: &str| {
        let answer = server.post(path, body);
        (answer.status, serde_json::from_str::<Value>(&answer.body).unwrap())
    };
    let claim = r#"{"fields":{"type":"pay","order":"7"},"by":"a","lease_ms":"1000"}"#;
    let (status, granted) = call("/v1/markers:claim", claim);
    assert_eq!(status, 200, "{granted}");
    let token = granted["granted"]["token"].as_str().unwrap().to_owned();
    let (status, refused) = call("/v1/markers:claim", claim);
    assert_eq!((status, refused["code"].as_str()), (409, Some("IN_FLIGHT")), "{refused}");
    // Its lease ends by log time.
    common::wait_for("the claim to die", std::time::Duration::from_secs(20), || {
        call("/v1/markers:claim", claim).1["code"] == "NEEDS_RECONCILE"
    });
    let run = tenure(&server.address, &["once", "type=pay,order=7", "--", "true"]);
    assert_eq!(run.code, 16, "{}", run.err);
    let (status, stale) = call("/v1/markers:confirm", r#"{"marker":"type=pay,order=7","token":"1"}"#);
    assert_eq!((status, stale["code"].as_str()), (412, Some("FENCED")), "{stale}");
    assert_eq!(stale["newest"].as_str().or(stale["facts"]["newest"].as_str()), Some(token.as_str()), "{stale}");
    ok(&server.address, &["once", "confirm", "order=7,type=pay", &token, "--result", "receipt 12"]);
    let (status, done) = call("/v1/markers:once", r#"{"marker":"type=pay,order=7"}"#);
    assert_eq!((status, &done["already_done"]), (200, &Value::Bool(true)), "{done}");
    assert_eq!(done["marker"]["result"], "receipt 12");
    let get: Value = serde_json::from_str(&server.get("/v1/markers/type=pay,order=7").body).unwrap();
    assert_eq!(get["marker"]["marker"], "order=7,type=pay");
    for (path, wrong) in [
        ("/v1/markers:once", r#"{}"#),
        ("/v1/markers:once", r#"{"marker":"a=1","fields":{"a":"1"}}"#),
        ("/v1/markers:once", r#"{"marker":"a=1","retention_ms":"1"}"#),
        ("/v1/markers:once", r#"{"marker":"a=1","retention":"1"}"#),
        ("/v1/markers:claim", r#"{"marker":"a=1","lease_ms":"10"}"#),
        ("/v1/markers:confirm", r#"{"marker":"a=1"}"#),
        ("/v1/markers:delete", r#"{"marker":"=1"}"#),
    ] {
        let (status, refused) = call(path, wrong);
        assert_eq!((status, refused["code"].as_str()), (400, Some("INVALID")), "{wrong}: {refused}");
    }
    let (status, other) = call("/v1/markers:once", r#"{"marker":"a=1","namespace":"other"}"#);
    assert_eq!((status, other["code"].as_str()), (404, Some("NOT_FOUND")));
    assert_eq!(server.get("/v1/markers/a=1").status, 404);
}
