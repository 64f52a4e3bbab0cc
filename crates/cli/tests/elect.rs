//! Elections on the three faces against a real server.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Server, TENURE, json, ok, tenure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn elect(server: &Server, args: &[&str]) -> Command {
    let mut command = Command::new(TENURE);
    command.arg("elect").args(args).env("TENURE_ENDPOINTS", &server.address).stdout(Stdio::piped());
    command
}

fn leader(server: &Server) -> Value {
    json(&server.address, &["elect", "e"])["leader"].clone()
}

#[test]
fn a_command_runs_while_elected() {
    let server = Server::start(&[]);
    let said =
        tenure(&server.address, &["elect", "e", "--", "sh", "-c", "echo $TENURE_ELECTION $TENURE_TOKEN; exit 7"]);
    assert_eq!((said.code, said.out.starts_with("e ")), (7, true), "{}{}", said.out, said.err);
    let token: u64 = said.out.trim().trim_start_matches("e ").parse().unwrap();
    assert!(token > 1);
    assert_eq!(json(&server.address, &["elect", "e"])["state"], "vacant", "it was resigned");

    let mut first = elect(&server, &["e", "--value", "one", "--ttl", "5s", "--", "sleep", "60"]).spawn().unwrap();
    common::wait_for("the first to lead", Duration::from_secs(10), || leader(&server)["value"] == "one");
    let busy = tenure(&server.address, &["elect", "e", "-n", "--", "true"]);
    assert_eq!(busy.code, 1, "{}", busy.err);
    let mut second = elect(&server, &["e", "--value", "two", "--priority", "3", "--", "true"]).spawn().unwrap();
    common::wait_for("a candidate", Duration::from_secs(10), || {
        json(&server.address, &["elect", "e"])["candidate_count"] == "1"
    });
    let shown = ok(&server.address, &["elect", "e"]);
    assert!(shown.contains("should yield"), "{shown}");
    assert!(ok(&server.address, &["elect"]).contains("one"));
    kill_process(Pid::from_child(&first), Signal::TERM).unwrap();
    assert_eq!(first.wait().unwrap().code(), Some(143), "the command's signal");
    assert_eq!(second.wait().unwrap().code(), Some(0), "the next was elected");
}

#[test]
fn a_leader_that_should_yield_is_asked_to_stop() {
    let server = Server::start(&[]);
    let mut first = elect(&server, &["e", "--value", "one", "--yield", "--", "sleep", "60"]).spawn().unwrap();
    common::wait_for("the first to lead", Duration::from_secs(10), || leader(&server)["value"] == "one");
    let second = tenure(&server.address, &["elect", "e", "--priority", "1", "--", "true"]);
    assert_eq!(second.code, 0, "{}", second.err);
    assert_eq!(first.wait().unwrap().code(), Some(143));
}

#[test]
fn observers_hear_each_leader() {
    let server = Server::start(&[]);
    let mut observer = elect(&server, &["e", "--observe"]).spawn().unwrap();
    let mut lines = BufReader::new(observer.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(lines.next().unwrap(), "vacant");
    let mut events = TcpStream::connect(&server.address).unwrap();
    events.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let head = "GET /v1/elections:observe?name=e HTTP/1.1\r\nhost: x\r\naccept: text/event-stream\r\n\r\n";
    events.write_all(head.as_bytes()).unwrap();
    let mut events = BufReader::new(events).lines().map(Result::unwrap).filter_map(|line| {
        line.strip_prefix("data: ").map(|data| serde_json::from_str::<Value>(data).unwrap()["election"].clone())
    });
    assert_eq!(events.next().unwrap()["state"], "VACANT");

    let post = |path: &str, body: &str| {
        let answer = server.post(path, body);
        (answer.status, serde_json::from_str::<Value>(&answer.body).unwrap())
    };
    let (_, session) = post("/v1/sessions:create", r#"{"ttl_ms":"60000"}"#);
    let session = session["id"].as_str().unwrap();
    let campaign = format!(r#"{{"name":"e","session":"{session}","value":"a"}}"#);
    let (status, led) = post("/v1/elections:campaign", &campaign);
    let token = led["token"].as_str().unwrap_or_default().to_owned();
    assert_eq!(status, 200, "{led}");
    assert_ne!(led["remaining_ms"], "0", "{led}");
    assert_eq!(lines.next().unwrap(), format!("{token} {session} a"));
    assert_eq!(events.next().unwrap()["leader"]["token"].as_str(), Some(&*token));
    let proclaim = format!(r#"{{"name":"e","token":"{token}","value":"b"}}"#);
    assert_eq!(post("/v1/elections:proclaim", &proclaim).0, 200);
    assert_eq!(lines.next().unwrap(), format!("{token} {session} b"));
    assert_eq!(events.next().unwrap()["leader"]["value"], "b");
    // The end of the session vacates.
    assert_eq!(post("/v1/sessions:end", &format!(r#"{{"id":"{session}"}}"#)).0, 200);
    assert_eq!(lines.next().unwrap(), "vacant");
    assert_eq!(events.next().unwrap()["state"], "VACANT");
    let (status, fenced) = post("/v1/elections:proclaim", &proclaim);
    assert_eq!((status, fenced["code"].as_str()), (412, Some("FENCED")), "{fenced}");
    assert_eq!(fenced["facts"]["presented"].as_str(), Some(&*token));
    for (path, body, field) in [
        ("/v1/elections:campaign", r#"{"name":"e"}"#, "session"),
        ("/v1/elections:campaign", r#"{"name":"","session":"5"}"#, "name"),
        ("/v1/elections:campaign", r#"{"name":"e","session":"5","wait_ms":"86400001"}"#, "wait_ms"),
        ("/v1/elections:proclaim", r#"{"name":"e"}"#, "token"),
        ("/v1/elections:resign", r#"{"name":"e"}"#, "token"),
        ("/v1/elections:withdraw", r#"{"name":"e"}"#, "session"),
    ] {
        let (status, refused) = post(path, body);
        assert_eq!((status, refused["facts"]["field"].as_str()), (400, Some(field)), "{body}: {refused}");
    }
    assert_eq!(post("/v1/elections:campaign", r#"{"name":"e","session":"5"}"#).0, 410, "no such session");
    assert_eq!(server.get("/v1/elections:observe?name=").status, 400);
    observer.kill().unwrap();
    observer.wait().unwrap();
}
