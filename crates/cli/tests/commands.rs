//! The commands of the one binary against a real server: what they print, and their exit codes, which scripts rely on.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use std::process::{Command, Stdio};

use common::{Server, TENURE, json, tenure, tenure_fed};

#[test]
fn keys_are_written_read_and_deleted() {
    let server = Server::start(&[]);
    assert_eq!(tenure(&server.address, &["kv", "put", "a/1", "one"]).out, "ok, revision 2\n");
    assert_eq!(tenure_fed(&server.address, &["kv", "put", "a/2", "-"], "two\nlines").out, "ok, revision 3\n");
    assert_eq!(tenure(&server.address, &["kv", "get", "a/1"]).out, "one\n");
    assert_eq!(tenure(&server.address, &["kv", "get", "a/", "--prefix"]).out, "a/1\none\na/2\ntwo\nlines\n");
    assert_eq!(tenure(&server.address, &["kv", "get", "a/", "--prefix", "--keys-only"]).out, "a/1\na/2\n");
    assert_eq!(tenure(&server.address, &["kv", "get", "a/", "--prefix", "--count-only"]).out, "2\n");
    assert_eq!(tenure(&server.address, &["kv", "get", "a/1", "a/2"]).out, "a/1\none\n", "up to the end, not with it");
    assert_eq!(tenure(&server.address, &["kv", "del", "a/1", "--prev"]).out, "1 deleted, revision 4\na/1\none\n");
    assert_eq!(tenure(&server.address, &["kv", "get", "a/1", "--revision", "3"]).out, "one\n", "the past is kept");
    let record = &json(&server.address, &["kv", "get", "a/2"])["records"][0];
    assert_eq!((record["key"].as_str(), record["mod_revision"].as_str()), (Some("a/2"), Some("3")));
}

#[test]
fn refusals_have_their_exit_codes() {
    let server = Server::start(&[]);
    let missing = tenure(&server.address, &["kv", "get", "nothing"]);
    assert_eq!((missing.code, missing.err.as_str()), (19, "error: there is no key `nothing`\n"));
    assert_eq!(tenure(&server.address, &["kv", "put", "k", "1", "--if-absent"]).code, 0);
    let conflict = tenure(&server.address, &["kv", "put", "k", "2", "--if-absent"]);
    assert_eq!(conflict.code, 10, "{}", conflict.err);
    assert_eq!(tenure(&server.address, &["kv", "put", "k", "2", "--if-version", "1"]).code, 0);
    assert_eq!(tenure(&server.address, &["kv", "put", "k", "3", "--if-value", "1"]).code, 10);
    let fenced = tenure(&server.address, &["kv", "put", "k", "3", "--require-lock", "no-such:7"]);
    assert_eq!(fenced.code, 12, "{}", fenced.err);
    assert!(fenced.err.contains("token 7 of lock `no-such`"), "{}", fenced.err);
    assert_eq!(tenure(&server.address, &["kv", "get", "k"]).out, "2\n", "what was refused changed nothing");
    assert_eq!(tenure(&server.address, &["kv", "put", "k"]).code, 64, "wrong use");
    assert_eq!(tenure(&server.address, &["kv", "get", "k", "--revision", "99"]).code, 64);
    assert_eq!(tenure(&server.address, &["--endpoints", "127.0.0.1:1", "kv", "get", "k"]).code, 69, "nobody there");
}

#[test]
fn a_transaction_is_read_as_etcdctl_writes_it() {
    let server = Server::start(&[]);
    let text = "version(\"seat\") = \"0\"\n\nput seat taken\nget seat\n\nget seat\n";
    let first = tenure_fed(&server.address, &["kv", "txn"], text);
    assert_eq!(first.out, "compares held, revision 2\nok\nseat\ntaken\n", "{}", first.err);
    let second = tenure_fed(&server.address, &["kv", "txn"], text);
    assert_eq!(second.out, "a compare did not hold, revision 2\nseat\ntaken\n", "{}", second.err);
    let wrong = tenure_fed(&server.address, &["kv", "txn"], "size(seat) = 1\n");
    assert_eq!(wrong.code, 64);
    assert!(wrong.err.starts_with("error: line 1: "), "{}", wrong.err);
}

#[test]
fn a_watch_tells_the_past_and_goes_on_over_a_restart() {
    let mut server = Server::start(&[]);
    tenure(&server.address, &["kv", "put", "w/1", "a"]);
    let mut watch = Command::new(TENURE)
        .args(["watch", "w/", "--prefix", "--revision", "2", "--count", "3", "--prev"])
        .env("TENURE_ENDPOINTS", &server.address)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    tenure(&server.address, &["kv", "put", "w/1", "b"]);
    server.kill();
    server.start_again(&[]);
    tenure(&server.address, &["kv", "del", "w/1"]);
    let output = {
        common::wait_for("the watch to see three changes", std::time::Duration::from_secs(20), || {
            watch.try_wait().unwrap().is_some()
        });
        watch.wait_with_output().unwrap()
    };
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said, "PUT 2\nw/1\na\nPUT 3\nw/1\nb\nwas: a\nDELETE 4\nw/1\nwas: b\n");
}

#[test]
fn status_and_sessions_for_programs() {
    let server = Server::start(&["--name", "alpha"]);
    let status = &json(&server.address, &["status"])[0];
    assert_eq!((status["name"].as_str(), status["role"].as_str()), (Some("alpha"), Some("leader")));
    let session = json(&server.address, &["session", "create", "--ttl", "30s", "--name", "me"]);
    let id = session["id"].as_str().unwrap().to_owned();
    let listed = json(&server.address, &["session", "list"]);
    assert_eq!(listed[0]["id"].as_str(), Some(id.as_str()));
    assert_eq!(tenure(&server.address, &["kv", "put", "mine", "1", "--session", &id]).code, 0);
    assert_eq!(tenure(&server.address, &["session", "end", &id]).code, 0);
    assert_eq!(tenure(&server.address, &["kv", "get", "mine"]).code, 19, "what a session owns ends with it");
}

#[test]
fn settings_come_from_flag_then_environment_then_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tenure.toml");
    std::fs::write(&file, "name = \"from-file\"\nmax-txn-ops = 2\n").unwrap();
    let config = file.to_str().unwrap();
    let server = Server::start(&["--config", config]);
    assert_eq!(json(&server.address, &["status"])[0]["name"].as_str(), Some("from-file"));
    let three = "\nput a 1\nput b 2\nput c 3\n";
    assert_eq!(tenure_fed(&server.address, &["kv", "txn"], three).code, 64, "the file's limit holds");
    let server = Server::start(&["--config", config, "--name", "from-flag"]);
    assert_eq!(json(&server.address, &["status"])[0]["name"].as_str(), Some("from-flag"));
}

#[test]
fn completion_scripts_name_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let output = Command::new(TENURE).args(["completion", shell]).output().unwrap();
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && script.contains("require-lock"), "{shell}");
    }
}

/// What a closed pipe answers to whoever writes to it.
fn nobody_reads() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn a_reader_that_has_gone_ends_what_prints_and_nothing_else() {
    let server = Server::start(&[]);
    let unread = |args: &[&str]| {
        let mut command = Command::new(TENURE);
        command.args(args).env("TENURE_ENDPOINTS", &server.address).stdin(Stdio::null());
        command.stdout(nobody_reads()).stderr(nobody_reads()).status().unwrap().code()
    };
    tenure(&server.address, &["kv", "put", "a", "1"]);
    for printing in [&["kv", "get", "a"][..], &["status"], &["session", "list"], &["watch", "a", "--revision", "2"]] {
        assert_eq!(unread(printing), Some(0), "{printing:?}");
    }
    assert_eq!(unread(&["completion", "bash"]), Some(0));
    assert_eq!(unread(&["kv", "get", "nothing"]), Some(19), "an error that nobody reads has its exit code");
    let lock = ["lock", "l", "--", "sh", "-c", "exit 5"];
    assert_eq!(unread(&lock), Some(5));
    // The job was done, so it is acknowledged.
    tenure(&server.address, &["queue", "put", "q", "x"]);
    let mut worker = Command::new(TENURE);
    worker.args(["queue", "work", "q", "--", "sh", "-c", "echo loud >&2"]).env("TENURE_ENDPOINTS", &server.address);
    let mut worker = worker.stdin(Stdio::null()).stdout(nobody_reads()).stderr(nobody_reads()).spawn().unwrap();
    common::wait_for("the job to be done", std::time::Duration::from_secs(20), || {
        json(&server.address, &["queue", "stats", "q"])["jobs"]["done"] == 1
    });
    assert_eq!(worker.try_wait().unwrap(), None, "the worker goes on");
    worker.kill().unwrap();
    worker.wait().unwrap();
}

#[test]
fn hints_speak_of_what_was_refused() {
    let server = Server::start(&[]);
    let at = &server.address;
    let guarded = tenure(at, &["kv", "put", "k", "3", "--require-lock", "no-such:7"]);
    assert!(guarded.err.contains("take it anew"), "{}", guarded.err);
    assert_eq!(tenure(at, &["reserve", "pool", "create", "p", "1"]).code, 0);
    let stale = tenure(at, &["reserve", "confirm", "p", "1", "1"]);
    assert!(stale.code == 12 && stale.err.contains("hint: ") && !stale.err.contains("lock"), "{}", stale.err);
    assert_eq!(tenure(at, &["reserve", "p", "1"]).code, 0);
    let used = tenure(at, &["reserve", "pool", "delete", "p"]);
    assert!(used.code == 1 && !used.err.contains("--wait"), "{}", used.err);
}
