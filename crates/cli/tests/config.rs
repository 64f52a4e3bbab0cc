//! `tenure config`, the same over HTTP, and the client that follows, against a real server.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Server, TENURE, json, ok, tenure, tenure_fed, wait_for};
use serde_json::Value;
use tenure_client::{Client, ConfigRollout, Error};

const SCHEMA: &str =
    r#"{"type": "object", "required": ["rate"], "properties": {"rate": {"type": "integer", "maximum": 100}}}"#;

#[test]
fn versions_are_published_compared_and_rolled_back() {
    let server = Server::start(&[]);
    let at = server.address.as_str();
    assert_eq!(
        ok(at, &["config", "put", "app", "a\nb", "--expect", "0", "--author", "ann"]),
        "published (current: version 1)\n"
    );
    assert_eq!(tenure_fed(at, &["config", "put", "app", "-", "--expect", "1", "-m", "why"], "a\nc\n").code, 0);
    let late = tenure(at, &["config", "put", "app", "x", "--expect", "1"]);
    assert_eq!(late.code, 10, "{}", late.err);
    assert!(late.err.contains("version 2"), "{}", late.err);
    assert_eq!(ok(at, &["config", "get", "app"]), "a\nc\n");
    assert_eq!(ok(at, &["config", "get", "app", "--version", "1"]), "a\nb\n");
    let differ = tenure(at, &["config", "diff", "app", "1"]);
    assert_eq!((differ.code, differ.out.as_str()), (1, "--- app version 1\n+++ app version 2\n a\n-b\n+c\n"));
    assert_eq!(tenure(at, &["config", "diff", "app", "2", "2"]).code, 0);
    assert_eq!(tenure(at, &["config", "rollback", "app", "1", "--expect", "1"]).code, 10);
    assert_eq!(json(at, &["config", "rollback", "app", "1", "--expect", "2"])["current_version"], "3");
    assert_eq!(ok(at, &["config", "get", "app"]), "a\nb\n");
    let history = json(at, &["config", "history", "app"]);
    assert_eq!(history.as_array().unwrap().len(), 3);
    assert_eq!(
        (&history[0]["copy_of"], &history[1]["comment"], &history[2]["author"]),
        (&"1".into(), &"why".into(), &"ann".into())
    );
    assert_eq!(history[0]["digest"], history[2]["digest"]);
    assert!(ok(at, &["config", "history", "app"]).contains("copy of 1"));
    assert_eq!(tenure(at, &["config", "rollback", "app", "9"]).code, 19);
    assert_eq!(tenure(at, &["config", "delete", "app", "--expect", "2"]).code, 10);
    ok(at, &["config", "delete", "app", "--expect", "3"]);
    assert_eq!(tenure(at, &["config", "get", "app"]).code, 19);
    assert_eq!(ok(at, &["config", "get", "app", "--version", "2"]), "a\nc\n");
    assert_eq!(json(at, &["config", "put", "app", "new", "--expect", "0"])["version"], "5", "numbers go on");
    assert_eq!(json(at, &["config", "list"])[0]["version"], "5");
    assert_eq!(tenure(at, &["config", "put", "app"]).code, 64);
}

#[test]
fn a_content_that_breaks_its_schema_is_refused_with_the_place() {
    let server = Server::start(&[]);
    let at = server.address.as_str();
    ok(at, &["config", "put", "limits", r#"{"rate": 5}"#]);
    assert_eq!(tenure(at, &["config", "schema", "get", "limits"]).code, 19);
    assert_eq!(json(at, &["config", "schema", "set", "limits", SCHEMA])["schema"], "1");
    assert_eq!(ok(at, &["config", "schema", "get", "limits"]).trim(), SCHEMA);
    let refused = tenure(at, &["config", "put", "limits", r#"{"rate": 101}"#]);
    assert_eq!(refused.code, 64, "{}", refused.err);
    assert!(refused.err.contains("/rate") && refused.err.contains("101"), "{}", refused.err);
    assert_eq!(tenure(at, &["config", "put", "limits", "no json"]).code, 64);
    assert_eq!(ok(at, &["config", "get", "limits"]), "{\"rate\": 5}\n");
    ok(at, &["config", "put", "limits", r#"{"rate": 6}"#]);
    // One that the current version does not satisfy, one that reaches out, and one that is none.
    for schema in [r#"{"maximum": 1, "type": "number"}"#, r#"{"$ref": "http://127.0.0.1:1/x"}"#, r#"{"type": 7}"#, " "]
    {
        assert_eq!(tenure(at, &["config", "schema", "set", "limits", schema]).code, 64, "{schema}");
    }
    ok(at, &["config", "schema", "remove", "limits"]);
    ok(at, &["config", "put", "limits", "no json"]);
}

#[test]
fn a_candidate_goes_to_those_in_its_share_and_then_to_all_or_none() {
    let server = Server::start(&[]);
    let at = server.address.as_str();
    ok(at, &["config", "put", "f", "old"]);
    let staged = json(at, &["config", "put", "f", "new", "--candidate", "20", "--label", "region=eu"]);
    assert_eq!((&staged["current_version"], &staged["candidate_version"]), (&"1".into(), &"2".into()));
    let given = |instance: &str, label: &str| ok(at, &["config", "get", "f", "--instance", instance, "--label", label]);
    let names: Vec<_> = (0..30).map(|n| format!("web-{n}")).collect();
    let who = |label| names.iter().filter(|name| given(name, label) == "new\n").count();
    let few = who("region=eu");
    assert!(few > 0 && few < 20, "{few} of 30 at 20 %");
    assert_eq!(who("region=us"), 0);
    assert_eq!(ok(at, &["config", "get", "f"]), "old\n");
    assert_eq!(tenure(at, &["config", "put", "f", "third"]).code, 10, "while there is a candidate");
    ok(at, &["config", "rollout", "stage", "f", "2", "100%"]);
    assert_eq!(given("web-1", "region=us"), "new\n");
    assert_eq!(tenure(at, &["config", "rollout", "promote", "f", "1"]).code, 10);
    ok(at, &["config", "rollout", "promote", "f", "2"]);
    assert_eq!(ok(at, &["config", "get", "f"]), "new\n");
    ok(at, &["config", "put", "f", "bad", "--candidate", "100"]);
    ok(at, &["config", "rollout", "abort", "f", "3"]);
    assert_eq!(given("web-1", "a=b"), "new\n");
}

#[test]
fn a_watch_tells_what_there_is_and_goes_on_over_a_restart() {
    let mut server = Server::start(&[]);
    let at = server.address.clone();
    ok(&at, &["config", "put", "w/1", "a"]);
    ok(&at, &["config", "put", "other", "x"]);
    let out = server.folder.path().join("watched");
    let mut watch = Command::new(TENURE)
        .args(["config", "watch", "w/", "--prefix", "--count", "4"])
        .env("TENURE_ENDPOINTS", &at)
        .stdout(Stdio::from(std::fs::File::create(&out).unwrap()))
        .spawn()
        .unwrap();
    let said = || std::fs::read_to_string(&out).unwrap();
    wait_for("the first version", Duration::from_secs(10), || said().contains("w/1 (version 1)"));
    ok(&at, &["config", "put", "w/2", "b"]);
    wait_for("another key", Duration::from_secs(10), || said().contains("w/2 (version 1)"));
    server.kill();
    server.start_again(&[]);
    ok(&at, &["config", "put", "w/1", "c"]);
    ok(&at, &["config", "delete", "w/2"]);
    wait_for("the end", Duration::from_secs(20), || watch.try_wait().unwrap().is_some());
    assert_eq!(said(), "w/1 (version 1)\na\nw/2 (version 1)\nb\nw/1 (version 2)\nc\nw/2 (deleted)\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_runs_on_the_last_known_good() {
    let mut server = Server::start(&[]);
    let client = Client::with_options([&server.address], tenure_client::ClientOptions::default()).unwrap();
    let file = server.folder.path().join("limit.config");
    let read = |content: &[u8]| std::str::from_utf8(content).ok()?.parse::<u32>().ok();
    let open = async |key: &str| {
        let patience = Duration::from_secs(2);
        client.follow_config(key).instance("web-1").cache(&file).patience(patience).open(read).await
    };
    assert!(matches!(open("limit").await, Err(Error::Refused(_))), "there is none, and nothing is stored");
    client.publish_config("limit", "10").await.unwrap();
    let mut limit = open("limit").await.unwrap();
    assert_eq!((*limit.get(), limit.is_stale(), limit.version().version), (10, false, 1));
    let until = async |limit: &mut tenure_client::Config<u32>, value: u32, is_stale: bool| {
        let reached = async {
            while (*limit.get(), limit.is_stale()) != (value, is_stale) {
                limit.changed().await;
            }
        };
        let reached = tokio::time::timeout(Duration::from_secs(20), reached).await;
        assert!(reached.is_ok(), "{limit:?} does not become {value}, stale: {is_stale}");
    };
    let all = ConfigRollout::percent(100.0);
    client.publish_config("limit", "20").rollout(all).await.unwrap();
    until(&mut limit, 20, false).await;
    client.promote_config("limit", 2).await.unwrap();
    // What cannot be read is never taken in.
    client.publish_config("limit", "none").await.unwrap();
    until(&mut limit, 20, true).await;
    client.publish_config("limit", "30").expect_version(3).await.unwrap();
    until(&mut limit, 30, false).await;
    server.kill();
    until(&mut limit, 30, true).await;
    // Another start while the service is away, with the file and without.
    let mut alone = open("limit").await.unwrap();
    assert_eq!((*alone.get(), alone.is_stale(), alone.version().version), (30, true, 4));
    assert!(open("another").await.is_err(), "the file is of one key");
    server.start_again(&[]);
    until(&mut alone, 30, false).await;
    client.publish_config("limit", "40").await.unwrap();
    until(&mut alone, 40, false).await;
    until(&mut limit, 40, false).await;
    client.delete_config("limit", None, "", "").await.unwrap();
    until(&mut limit, 40, true).await;
}

#[test]
fn bad_input_over_http_changes_nothing() {
    let server = Server::start(&[]);
    let check = |path: &str, body: &str, status: u16, code: &str| {
        let answer = server.post(path, body);
        let problem: Value = serde_json::from_str(&answer.body).unwrap();
        assert_eq!((answer.status, problem["code"].as_str()), (status, Some(code)), "{path} {body}: {}", answer.body);
    };
    assert_eq!(server.post("/v1/configs:publish", r#"{"key": "a/b", "content": "1"}"#).status, 200);
    check("/v1/configs:publish", r#"{"content": "1"}"#, 400, "INVALID");
    check("/v1/configs:publish", r#"{"key": "a\u0000", "content": "1"}"#, 400, "INVALID");
    check("/v1/configs:publish", r#"{"key": "a/b", "content": "1", "content_bytes": "MQ=="}"#, 400, "INVALID");
    check("/v1/configs:publish", r#"{"key": "a/b", "text": "1"}"#, 400, "INVALID");
    check("/v1/configs:publish", r#"{"key": "a/b", "content": "1", "rollout": {"share": 10001}}"#, 400, "INVALID");
    check("/v1/configs:publish", r#"{"key": "new", "content": "1", "rollout": {"share": 1}}"#, 400, "INVALID");
    check("/v1/configs:publish", r#"{"key": "a/b", "content": "1", "expect_version": "0"}"#, 412, "CONFLICT");
    check("/v1/configs:publish", r#"{"key": "a/b", "content": "1", "namespace": "x"}"#, 404, "NOT_FOUND");
    let large = format!(r#"{{"key": "a/b", "content": "{}"}}"#, "x".repeat((256 << 10) + 1));
    check("/v1/configs:publish", &large, 413, "TOO_LARGE");
    check("/v1/configs:rollback", r#"{"key": "a/b"}"#, 400, "INVALID");
    check("/v1/configs:rollback", r#"{"key": "a/b", "version": "7"}"#, 404, "NOT_FOUND");
    check("/v1/configs:set-schema", r#"{"key": "none", "schema": "true"}"#, 404, "NOT_FOUND");
    check("/v1/configs:set-schema", r#"{"key": "a/b", "schema": "true", "expect_schema": "3"}"#, 412, "CONFLICT");
    check("/v1/configs:stage", r#"{"key": "a/b", "version": "1"}"#, 400, "INVALID");
    check("/v1/configs:stage", r#"{"key": "a/b", "version": "1", "rollout": {}}"#, 412, "CONFLICT");
    check("/v1/configs:promote", r#"{"key": "a/b"}"#, 400, "INVALID");
    check("/v1/configs:abort", r#"{"key": "none", "version": "1"}"#, 404, "NOT_FOUND");
    check("/v1/configs:delete", r#"{"key": "a/b", "purge_version": "1", "author": "me"}"#, 400, "INVALID");
    check("/v1/configs:delete", r#"{"key": "a/b", "purge_version": "2"}"#, 412, "CONFLICT");
    assert_eq!(server.get("/v1/configs/a/b?labels=no").status, 400);
    assert_eq!(server.get("/v1/configs/a/b?version=2").status, 404);
    let config: Value = serde_json::from_str(&server.get("/v1/configs/a/b").body).unwrap();
    assert_eq!((&config["version"]["content"], &config["version"]["version"]), (&"1".into(), &"1".into()), "{config}");
    // The same request again is the same version.
    let again = || {
        let body = r#"{"key": "once", "content": "1"}"#;
        let headers = "content-type: application/json\r\nidempotency-key: 5f0c9d4e-2a47-4c19-9b0a-0d8a1c2b3e50\r\n";
        common::http(&server.address, "POST", "/v1/configs:publish", headers, body.as_bytes()).unwrap().body
    };
    let versions = [again(), again()].map(|body| serde_json::from_str::<Value>(&body).unwrap()["version"].clone());
    assert_eq!(versions, ["1", "1"]);
    assert_eq!(server.post("/v1/configs:delete", r#"{"key": "a/b", "purge_version": "1"}"#).status, 200);
    assert_eq!(server.get("/v1/configs:history?key=a/b").status, 404);
}
