//! Counters and sequences on the three faces against a real server.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use common::{Server, json, ok, tenure};
use serde_json::Value;

#[test]
fn counters_from_a_shell() {
    let server = Server::start(&[]);
    let at = &server.address;
    assert_eq!(ok(at, &["counter", "add", "seats"]), "1\n");
    assert_eq!(ok(at, &["counter", "add", "seats", "4", "--max", "5"]), "5\n");
    let full = tenure(at, &["counter", "add", "seats", "1", "--max", "5"]);
    assert_eq!((full.code, full.out.as_str()), (10, ""), "{}", full.err);
    assert_eq!(full.err, "error: counter `seats` is at 5, 1 more would be beyond the bound (max 5)\n");
    assert_eq!(ok(at, &["counter", "add", "seats", "-5", "--min", "0"]), "0\n");
    assert_eq!(tenure(at, &["counter", "add", "seats", "-1", "--min", "0"]).code, 10);
    assert_eq!(ok(at, &["counter", "set", "seats", "-7", "--if-value", "0"]), "-7\n");
    assert_eq!(tenure(at, &["counter", "set", "seats", "1", "--if-absent"]).code, 10);
    let seats = json(at, &["counter", "get", "seats"]);
    let revision = seats["revision"].as_str().unwrap();
    assert_eq!((seats["name"].as_str(), seats["value"].as_str()), (Some("seats"), Some("-7")));
    assert_eq!(ok(at, &["counter", "list"]), format!("NAME   VALUE  REVISION\nseats  -7     {revision}\n"));
    assert_eq!(tenure(at, &["counter", "delete", "seats", "--if-revision", "1"]).code, 10);
    assert_eq!(ok(at, &["counter", "delete", "seats", "--if-revision", revision]), "deleted\n");
    assert_eq!(ok(at, &["counter", "delete", "seats"]), "there was none\n");
    let missing = tenure(at, &["counter", "get", "seats"]);
    assert_eq!((missing.code, missing.err.as_str()), (19, "error: there is no counter `seats`\n"));
    assert_eq!(tenure(at, &["counter", "add", "seats", "much"]).code, 64);
    assert_eq!(tenure(at, &["counter", "add", "", "1"]).code, 64);
}

#[test]
fn a_sequence_goes_on_after_a_restart() {
    let mut server = Server::start(&[]);
    assert_eq!(ok(&server.address, &["counter", "next", "orders"]), "1\n");
    assert_eq!(ok(&server.address, &["counter", "next", "orders", "--block", "10"]), "2 11\n");
    server.kill();
    server.start_again(&[]);
    assert_eq!(ok(&server.address, &["counter", "next", "orders", "--at-least", "100"]), "100\n");
    let next = json(&server.address, &["counter", "next", "orders"]);
    assert_eq!((next["from"].as_str(), next["to"].as_str()), (Some("101"), Some("102")));
    assert_eq!(json(&server.address, &["counter", "sequences", "ord"])[0]["next"], "102");
    assert_eq!(tenure(&server.address, &["counter", "next", "orders", "--block", "0"]).code, 64);
    let end = tenure(&server.address, &["counter", "next", "orders", "--at-least", "9223372036854775808"]);
    assert_eq!(end.code, 10, "{}", end.err);
}

#[test]
fn counters_over_http() {
    let server = Server::start(&[]);
    let call = |path: &str, body: &str| {
        let answer = server.post(path, body);
        (answer.status, serde_json::from_str::<Value>(&answer.body).unwrap())
    };
    let (status, added) = call("/v1/counters:add", r#"{"name":"a/b","delta":"-3"}"#);
    assert_eq!((status, added["counter"]["value"].as_str()), (200, Some("-3")), "{added}");
    let (status, refused) = call("/v1/counters:add", r#"{"name":"a/b","delta":-1,"min":-3}"#);
    assert_eq!((status, refused["code"].as_str()), (412, Some("CONFLICT")), "{refused}");
    assert_eq!((refused["facts"]["value"].as_str(), refused["facts"]["min"].as_str()), (Some("-3"), Some("-3")));
    let (_, next) = call("/v1/sequences:next", r#"{"name":"a/b","block":"5"}"#);
    assert_eq!((next["from"].as_str(), next["to"].as_str()), (Some("1"), Some("6")), "{next}");
    let got: Value = serde_json::from_str(&server.get("/v1/counters/a/b").body).unwrap();
    assert_eq!(got["counter"]["value"], "-3", "{got}");
    assert!(got["header"]["member_id"].is_string(), "{got}");
    let page: Value = serde_json::from_str(&server.get("/v1/counters?limit=1").body).unwrap();
    assert_eq!(page["next"], "a/b", "{page}");
    assert_eq!(server.get("/v1/sequences/a/c").status, 404);
    // Bad input is refused with the name of the field, and changes nothing.
    for (path, body, field) in [
        ("/v1/counters:add", r#"{"name":"a/b"}"#, "delta"),
        ("/v1/counters:add", r#"{"delta":1}"#, "name"),
        ("/v1/counters:add", r#"{"name":"a/b","delta":1,"min":2,"max":1}"#, "min"),
        ("/v1/counters:set", r#"{"name":"a/b"}"#, "value"),
        ("/v1/counters:set", r#"{"name":"a/b","value":1,"expect":{}}"#, "expect"),
        ("/v1/counters:delete", r#"{"name":"a/b","expect":{"absent":false}}"#, "expect.absent"),
        ("/v1/sequences:next", r#"{"name":"a/b","block":1000000001}"#, "block"),
        ("/v1/sequences:next", r#"{"name":""}"#, "name"),
    ] {
        let (status, refused) = call(path, body);
        assert_eq!((status, refused["facts"]["field"].as_str()), (400, Some(field)), "{body}: {refused}");
    }
    assert_eq!(call("/v1/counters:add", r#"{"name":"a/b","delta":1,"by":2}"#).0, 400, "an unknown field");
    assert_eq!(call("/v1/counters:add", r#"{"name":"a/b","delta":1,"namespace":"other"}"#).0, 404);
    let same: Value = serde_json::from_str(&server.get("/v1/counters/a/b").body).unwrap();
    assert_eq!(same["counter"], got["counter"], "what was refused changed nothing");
}
