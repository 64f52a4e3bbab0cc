//! The native face over HTTP as a whole: its description, its page of documentation, its conditions, and bad input for every call that there is.
//!
//! Promises under test. H1: every call that is mounted, also one added later, refuses unknown fields and parameters, values of the wrong type
//! and namespaces that do not exist, never fails inside, and changes nothing by it (`faces.rs` has the other faces beside this one). H2: `/openapi.json` is a valid
//! document. H3: every command of docs/http.md works, in order. H4: `ETag`, `If-Match` and `If-None-Match`.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Answer, Server, http, ok, tenure};
use serde_json::{Value, json};

const JSON: &str = "content-type: application/json\r\n";

/// One binding of the description.
struct Call {
    verb: String,
    path: String,
    operation: Value,
}

impl Call {
    fn is_stream(&self) -> bool {
        !self.operation["responses"]["200"]["content"]["text/event-stream"].is_null()
    }

    fn has_body(&self) -> bool {
        !self.operation["requestBody"].is_null()
    }

    /// The fields of its message.
    fn fields<'d>(&self, document: &'d Value) -> &'d Value {
        let content = &self.operation["requestBody"]["content"]["application/json"];
        let name = content["schema"]["$ref"].as_str().unwrap().rsplit('/').next().unwrap();
        &document["components"]["schemas"][name]["properties"]
    }

    fn takes(&self, parameter: &str) -> bool {
        let parameters = self.operation["parameters"].as_array();
        parameters.is_some_and(|all| all.iter().any(|it| it["name"] == parameter && it["in"] == "query"))
    }

    fn run(&self, server: &Server, query: &str, body: &str) -> Answer {
        // Numbers fit every variable.
        let path = self.path.split('/').map(|part| if part.starts_with('{') { "7" } else { part });
        let path = format!("{}{query}", path.collect::<Vec<_>>().join("/"));
        http(&server.address, &self.verb.to_uppercase(), &path, JSON, body.as_bytes()).unwrap()
    }
}

fn document(server: &Server) -> Value {
    serde_json::from_str(&server.get("/openapi.json").body).unwrap()
}

fn calls(document: &Value) -> Vec<Call> {
    let mut calls = Vec::new();
    for (path, verbs) in document["paths"].as_object().unwrap() {
        for (verb, operation) in verbs.as_object().unwrap() {
            calls.push(Call { verb: verb.clone(), path: path.clone(), operation: operation.clone() });
        }
    }
    assert!(calls.len() > 30, "{}", calls.len());
    calls
}

fn revision(server: &Server) -> String {
    let answer: Value = serde_json::from_str(&server.get("/v1/kv?count_only").body).unwrap();
    answer["header"]["revision"].as_str().unwrap().to_owned()
}

fn code(answer: &Answer) -> String {
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    body["code"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn h1_bad_input_is_refused_by_every_call_and_changes_nothing() {
    let server = Server::start(&[]);
    let document = document(&server);
    let before = revision(&server);
    let mut wrong = Vec::new();
    for call in calls(&document) {
        let mut expect = |what: &str, answer: Answer, status: u16, name: &str| {
            if (answer.status, code(&answer).as_str()) != (status, name) {
                wrong.push(format!("{} {}: {what}: {} {}", call.verb, call.path, answer.status, answer.body));
            }
        };
        if call.has_body() {
            expect("an unknown field", call.run(&server, "", r#"{"no_such_field":1}"#), 400, "INVALID");
            expect("no JSON", call.run(&server, "", "{"), 400, "INVALID");
            expect("a parameter", call.run(&server, "?no_such_parameter=1", "{}"), 400, "INVALID");
            expect("a list", call.run(&server, "", "[]"), 400, "INVALID");
            let fields = call.fields(&document).as_object().unwrap();
            for (name, field) in fields.iter().filter(|(_, field)| field["type"] == "string") {
                let body = json!({ name: { "an": "object" } }).to_string();
                let why = format!("an object as {name} ({})", field["format"]);
                expect(&why, call.run(&server, "", &body), 400, "INVALID");
            }
            if fields.contains_key("namespace") {
                let answer = call.run(&server, "", r#"{"namespace":"elsewhere"}"#);
                expect("another namespace", answer, 404, "NOT_FOUND");
            }
        } else {
            expect("a body", call.run(&server, "", r#"{"no_such_field":1}"#), 400, "INVALID");
            expect("an unknown parameter", call.run(&server, "?no_such_parameter=1", ""), 400, "INVALID");
            if call.takes("namespace") {
                expect("another namespace", call.run(&server, "?namespace=elsewhere", ""), 404, "NOT_FOUND");
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(revision(&server), before);
}

#[test]
fn h1_what_a_change_does_not_read_is_refused() {
    let server = Server::start(&[]);
    let whole = |verb: &str, path: &str, headers: &str, body: &str| whole(&server, verb, path, headers, body).0;
    assert_eq!(whole("PUT", "/v1/kv/d", "", r#"{"key":"d","value":"1"}"#), 200);
    let before = revision(&server);
    // A condition in the wrong place is none; a name in two places is two.
    assert_eq!(whole("DELETE", "/v1/kv/d", "", r#"{"expect":{"version":"33"}}"#), 400);
    assert_eq!(whole("PUT", "/v1/kv/d?expect.version=77", "", r#"{"value":"2"}"#), 400);
    assert_eq!(whole("PUT", "/v1/kv/d", "", r#"{"key":"other","value":"2"}"#), 400);
    assert_eq!(whole("DELETE", "/v1/kv/d?key=other", "", ""), 400);
    assert_eq!(whole("GET", "/v1/kv/d?key=other", "", ""), 400);
    let key = "idempotency-key: \"0b7f3c1e-8a35-4f0e-9a0f-6f0d0a3c1b2d\"\r\n";
    let series = r#"{"value":"2","request":{"series":{"series":"5","seq":"1"}}}"#;
    assert_eq!(whole("PUT", "/v1/kv/d", key, series), 400);
    assert_eq!(revision(&server), before);
    // In quotes, as structured fields have it.
    assert_eq!(whole("PUT", "/v1/kv/d", key, r#"{"value":"2"}"#), 200);
    assert_eq!(whole("PUT", "/v1/kv/d", &key.replace('"', ""), r#"{"value":"2"}"#), 200);
    assert_ne!(revision(&server), before);
    assert_eq!(whole("DELETE", "/v1/kv/d?key=d&expect.version=2", "", " \n"), 200);
}

#[test]
fn h1_nothing_at_all_is_never_a_failure_inside() {
    let server = Server::start(&[]);
    let document = document(&server);
    for call in calls(&document).iter().filter(|call| !call.is_stream()) {
        let answer = call.run(&server, "", "");
        assert!(answer.status < 500, "{} {}: {} {}", call.verb, call.path, answer.status, answer.body);
        if answer.status >= 400 {
            assert!(!code(&answer).is_empty(), "{} {}: {}", call.verb, call.path, answer.body);
        }
    }
    let verb = http(&server.address, "PATCH", "/v1/kv:put", JSON, b"{}").unwrap();
    assert_eq!(verb.status, 405, "{verb:?}");
    let kind = http(&server.address, "POST", "/v1/kv:put", "content-type: text/xml\r\n", b"<k/>").unwrap();
    assert_eq!((kind.status, code(&kind).as_str()), (415, "INVALID"), "{kind:?}");
    let known: Value =
        serde_json::from_str(&server.post("/v3/kv/range", r#"{"key":"aw==","no_such_field":1}"#).body).unwrap();
    assert!(known["header"].is_object(), "the etcd face ignores what it does not know: {known}");
}

#[test]
fn h2_the_description_is_valid() {
    let server = Server::start(&[]);
    let answer = server.get("/openapi.json");
    assert_eq!(answer.status, 200);
    let document = document(&server);
    let mut ids = BTreeSet::new();
    for call in calls(&document) {
        let id = call.operation["operationId"].as_str().unwrap().to_owned();
        assert!(ids.insert(id.clone()), "{id} is there twice");
        assert!(call.operation["description"].is_string(), "{id} says what it does");
    }
    assert!(calls(&document).iter().any(Call::is_stream));
    // `cargo xtask test` installs a public validator and names it here.
    let Some(validator) = std::env::var_os("OPENAPI_VALIDATOR") else { return };
    let file = server.folder.path().join("openapi.json");
    fs::write(&file, &answer.body).unwrap();
    let said = Command::new(validator).arg(&file).output().unwrap();
    let text = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{text}");
}

/// The commands of the page, one script. A status from 400 on is in order where a comment of its block names it.
#[test]
fn h3_every_command_of_the_page_works() {
    let server = Server::start(&[]);
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/http.md")).unwrap();
    let blocks: Vec<&str> =
        page.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap_or_default()).collect();
    let folder = server.folder.path();
    let log = folder.join("curl.log");
    // In front of the real one: what it was answered goes into the log, and a stream that does not end is cut.
    let shim = folder.join("bin/curl");
    fs::create_dir_all(folder.join("bin")).unwrap();
    let real = which("curl").expect("curl is installed");
    let script = format!(
        "#!/bin/sh\n'{}' --silent --show-error --max-time 5 --write-out '%{{stderr}}status %{{http_code}} %{{url_effective}}\\n' \"$@\" 2>>'{}'\ncode=$?\n[ $code = 28 ] && exit 0\nexit $code\n",
        real.display(),
        log.display()
    );
    fs::write(&shim, script).unwrap();
    rustix::fs::chmod(&shim, rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    let mut all = String::from("set -eu\n");
    for (number, block) in blocks.iter().enumerate() {
        all.push_str(&format!("echo 'block {number}' >> '{}'\n{block}\n", log.display()));
    }
    let all = all.replace("localhost:2379", &server.address).replace("127.0.0.1:2379", &server.address);
    let path = format!("{}:{}", folder.join("bin").display(), std::env::var("PATH").unwrap());
    let said = Command::new("sh")
        .args(["-c", &all])
        .current_dir(folder)
        .env("PATH", path)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let log = fs::read_to_string(&log).unwrap_or_default();
    let text = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "the page stops: {text}\n{log}");
    for (block, told) in blocks.iter().zip(log.split("block ").skip(1)) {
        let comments: Vec<&str> = block.lines().filter_map(|line| line.split_once('#')).map(|(_, it)| it).collect();
        let statuses: Vec<&str> = told.lines().filter_map(|line| line.strip_prefix("status ")).collect();
        assert_eq!(statuses.is_empty(), !block.contains("curl "), "{block}\n{told}");
        for status in statuses {
            let number = status.split(' ').next().unwrap_or_default();
            let is_told = comments.iter().any(|comment| comment.contains(number));
            assert!(number.starts_with('2') || number == "304" || is_told, "{status}\n{block}\n{text}");
        }
    }
}

fn which(program: &str) -> Option<std::path::PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// An answer with its head.
fn whole(server: &Server, verb: &str, path: &str, headers: &str, body: &str) -> (u16, String, Value) {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(&server.address).unwrap();
    let length = body.len();
    let head = format!("{verb} {path} HTTP/1.0\r\nhost: x\r\ncontent-length: {length}\r\n{headers}\r\n{body}");
    stream.write_all(head.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let etag = head.lines().find_map(|line| line.strip_prefix("etag: ")).unwrap_or_default().to_owned();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), etag, serde_json::from_str(body).unwrap_or_default())
}

#[test]
fn h4_conditions_of_http() {
    let server = Server::start(&[]);
    let put = |headers: &str, value: &str| {
        whole(&server, "PUT", "/v1/kv/a/b", headers, &json!({ "value": value }).to_string())
    };
    let (status, first, _) = put("if-none-match: *\r\n", "1");
    assert_eq!((status, first.as_str()), (200, "\"2\""));
    let (status, _, refused) = put("if-none-match: *\r\n", "2");
    assert_eq!((status, &refused["code"], &refused["current"]["value"]), (412, &"CONFLICT".into(), &"1".into()));
    let (status, etag, answer) = whole(&server, "GET", "/v1/kv/a/b", "", "");
    assert_eq!((status, &etag, &answer["record"]["value"]), (200, &first, &"1".into()));
    let (status, etag, answer) = whole(&server, "GET", "/v1/kv/a/b", &format!("if-none-match: {first}\r\n"), "");
    assert_eq!((status, &etag, answer), (304, &first, Value::Null));
    let (status, second, _) = put(&format!("if-match: {first}\r\n"), "2");
    assert_eq!((status, second.as_str()), (200, "\"3\""));
    assert_eq!(put(&format!("if-match: {first}\r\n"), "3").0, 412);
    assert_eq!(put("if-match: *\r\n", "3").0, 200);
    let by_post = |headers: &str, path: &str, body: &str| whole(&server, "POST", path, headers, body);
    assert_eq!(by_post("if-match: \"3\"\r\n", "/v1/kv:put", r#"{"key":"a/b","value":"4"}"#).0, 412);
    assert_eq!(by_post("if-match: \"4\"\r\n", "/v1/kv:put", r#"{"key":"a/b","value":"4"}"#).0, 200);
    assert_eq!(by_post("if-match: \"4\"\r\n", "/v1/kv:delete", r#"{"key":"a/b"}"#).0, 412);
    let before = revision(&server);
    for (headers, path, body) in [
        ("if-match: W/\"5\"\r\n", "/v1/kv:put", r#"{"key":"a/b"}"#),
        ("if-match: 5\r\n", "/v1/kv:put", r#"{"key":"a/b"}"#),
        ("if-match: \"5\", \"6\"\r\n", "/v1/kv:put", r#"{"key":"a/b"}"#),
        ("if-none-match: \"5\"\r\n", "/v1/kv:put", r#"{"key":"a/b"}"#),
        ("if-match: \"5\"\r\nif-none-match: *\r\n", "/v1/kv:put", r#"{"key":"a/b"}"#),
        ("if-match: \"5\"\r\n", "/v1/kv:put", r#"{"key":"a/b","expect":{"version":"1"}}"#),
        ("if-match: \"5\"\r\n", "/v1/kv:delete", r#"{"key":"a/","prefix":true}"#),
        ("if-match: \"5\"\r\n", "/v1/sessions:create", "{}"),
    ] {
        let (status, _, refused) = by_post(headers, path, body);
        assert_eq!((status, &refused["code"]), (400, &"INVALID".into()), "{headers}{path} {body}: {refused}");
    }
    assert_eq!(revision(&server), before);
    assert_eq!(whole(&server, "DELETE", "/v1/kv/a/b", "if-match: \"4\"\r\n", "").0, 412);
    assert_eq!(whole(&server, "DELETE", "/v1/kv/a/b", "if-match: \"5\"\r\n", "").0, 200);
    assert_eq!(whole(&server, "GET", "/v1/kv/a/b", "if-none-match: \"5\"\r\n", "").0, 404);
    assert_eq!(whole(&server, "DELETE", "/v1/kv/a/b", "if-match: *\r\n", "").0, 412);
}

/// The tag of a configuration is its version, and what changes it takes it as the version that is expected.
#[test]
fn h4_conditions_of_configuration() {
    let server = Server::start(&[]);
    let change = |headers: &str, verb: &str, body: Value| {
        whole(&server, "POST", &format!("/v1/configs:{verb}"), headers, &body.to_string())
    };
    let publish =
        |headers: &str, content: &str| change(headers, "publish", json!({ "key": "app", "content": content }));
    let (status, first, _) = publish("if-none-match: *\r\n", "one");
    assert_eq!((status, first.as_str()), (200, "\"1\""));
    let (status, _, refused) = publish("if-none-match: *\r\n", "lost");
    assert_eq!((status, &refused["code"], &refused["facts"]["version"]), (412, &"CONFLICT".into(), &"1".into()));
    let read = |headers: &str| whole(&server, "GET", "/v1/configs/app", headers, "");
    let (status, etag, answer) = read("");
    assert_eq!((status, &etag, &answer["version"]["content"]), (200, &first, &"one".into()));
    assert_eq!(read(&format!("if-none-match: {first}\r\n")).0, 304);
    let (status, second, _) = publish(&format!("if-match: {first}\r\n"), "two");
    assert_eq!((status, second.as_str()), (200, "\"2\""));
    let (status, _, refused) = publish(&format!("if-match: {first}\r\n"), "lost");
    assert_eq!((status, &refused["code"], &refused["facts"]["version"]), (412, &"CONFLICT".into(), &"2".into()));
    let (status, etag, _) = read(&format!("if-none-match: {first}\r\n"));
    assert_eq!((status, &etag), (200, &second));
    assert_eq!(whole(&server, "GET", "/v1/configs/app?version=1", "", "").1, first);
    // A candidate has its tag for those who are given it; what is compared is the current version.
    let staged = json!({ "key": "app", "content": "three", "rollout": { "share": 10000 } });
    let (status, etag, _) = change(&format!("if-match: {second}\r\n"), "publish", staged);
    assert_eq!((status, &etag), (200, &second));
    assert_eq!(whole(&server, "GET", "/v1/configs/app?instance=i", "", "").1, "\"3\"");
    assert_eq!(change("", "promote", json!({ "key": "app", "version": "3" })).1, "\"3\"");
    let back = json!({ "key": "app", "version": "1" });
    assert_eq!(change("if-match: \"2\"\r\n", "rollback", back.clone()).0, 412);
    assert_eq!(change("if-match: \"3\"\r\n", "rollback", back).1, "\"4\"");
    assert_eq!(change("if-match: \"3\"\r\n", "delete", json!({ "key": "app" })).0, 412);
    for (headers, verb, body) in [
        ("if-match: *\r\n", "publish", json!({ "key": "app", "content": "x" })),
        ("if-match: W/\"4\"\r\n", "publish", json!({ "key": "app", "content": "x" })),
        ("if-match: \"4\"\r\n", "publish", json!({ "key": "app", "content": "x", "expect_version": "4" })),
        ("if-match: \"4\"\r\n", "promote", json!({ "key": "app", "version": "4" })),
        ("if-match: \"4\"\r\n", "set-schema", json!({ "key": "app", "schema": "{}" })),
    ] {
        let (status, _, refused) = change(headers, verb, body);
        assert_eq!((status, &refused["code"]), (400, &"INVALID".into()), "{headers}{verb}: {refused}");
    }
    assert_eq!(read("").2["version"]["content"], "one");
    let (status, etag, _) = change("if-match: \"4\"\r\n", "delete", json!({ "key": "app" }));
    assert_eq!((status, etag.as_str()), (200, ""));
    assert_eq!(read("if-none-match: \"4\"\r\n").0, 404);
}

#[test]
fn the_command_line_watches_things() {
    let server = Server::start(&[]);
    let session = common::json(&server.address, &["session", "create", "--ttl", "60s", "--name", "worker"]);
    let id = session["id"].as_str().unwrap().to_owned();
    let told = ok(&server.address, &["watch", "--kind", "session", "--snapshot", "--count", "1"]);
    assert!(told.starts_with("SNAPSHOT ") && told.contains(&id) && told.contains("name=\"worker\""), "{told}");
    let told =
        ok(&server.address, &["watch", "--kind", "session", &id, "--revision", "1", "--count", "1", "-o", "json"]);
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["type"], &told["name"]), (&"PUT".into(), &id.into()));
    let refused = tenure(&server.address, &["watch", "--kind", "nonsense"]);
    assert_eq!(refused.code, 64, "{}", refused.err);
    assert_eq!(tenure(&server.address, &["watch"]).code, 64);
}
