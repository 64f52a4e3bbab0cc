//! Backups of a running member, and what is made of them: E14 of the semantics, by the commands that an operator types.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use common::{Said, Server, ok, refused, tenure, wait_for};
use serde_json::Value;

fn save(server: &Server, file: &Path) -> Value {
    let out = ok(&server.address, &["snapshot", "save", file.to_str().unwrap(), "-o", "json"]);
    serde_json::from_str(&out).unwrap()
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_str().unwrap().parse().unwrap()
}

fn restore(file: &Path, folder: &Path, more: &[&str]) -> Said {
    let (file, folder) = (file.to_str().unwrap(), folder.to_str().unwrap());
    let mut args = vec!["restore", file, "--data-dir", folder, "--name", "r"];
    args.extend(more);
    tenure("127.0.0.1:1", &args)
}

/// A restored folder that is served.
fn restored(file: &Path, more: &[&str]) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let said = restore(file, &data, more);
    assert_eq!(said.code, 0, "{}", said.err);
    assert!(said.out.contains("tenure serve --name r --data-dir "), "{}", said.out);
    Server::start_in(folder, data, &["--name", "r"])
}

fn status(server: &Server) -> Value {
    serde_json::from_str(&server.get("/v1/status").body).unwrap()
}

fn post(server: &Server, path: &str, body: &str) -> Value {
    let answer = server.post(path, body);
    assert_eq!(answer.status, 200, "{path}: {}", answer.body);
    serde_json::from_str(&answer.body).unwrap()
}

fn acquire(server: &Server, name: &str, session: &str) -> u64 {
    number(&post(server, "/v1/locks:acquire", &format!(r#"{{"name":"{name}","session":"{session}"}}"#)), "token")
}

/// A server with a key, a session and a lock, its backup, the session and the token.
fn saved() -> (Server, PathBuf, String, u64) {
    let server = Server::start(&[]);
    ok(&server.address, &["kv", "put", "a", "1"]);
    let session = post(&server, "/v1/sessions:create", r#"{"ttl_ms":"600000"}"#);
    let session = session["id"].as_str().unwrap().to_owned();
    let token = acquire(&server, "held", &session);
    let file = server.folder.path().join("backup");
    save(&server, &file);
    (server, file, session, token)
}

#[test]
fn one_backup_twice_gives_no_token_twice() {
    let (mut old, file, session, token) = saved();
    let (issuer, cluster) = (status(&old)["issuer_id"].clone(), status(&old)["cluster_id"].clone());
    let mut given = BTreeSet::from([token]);
    // The old cluster goes on after the backup, until it is lost.
    given.extend((0..50).map(|i| acquire(&old, &format!("l{i}"), &session)));
    old.kill();
    for round in 0..2 {
        let mut new = restored(&file, &["--replace"]);
        assert_eq!((&status(&new)["issuer_id"], &status(&new)["cluster_id"]), (&issuer, &cluster));
        assert_eq!(ok(&new.address, &["kv", "get", "a"]), "1\n");
        let held = new.get("/v1/locks/held").body;
        assert!(held.contains(&format!(r#""token":"{token}""#)), "who held it holds it: {held}");
        assert_eq!(tenure(&new.address, &["watch", "a", "--revision", "2"]).code, 17, "what is older is compacted");
        for i in 0..50 {
            let token = acquire(&new, &format!("l{i}"), &session);
            assert!(Some(&token) > given.last(), "round {round}: {token} after {:?}", given.last());
            given.insert(token);
        }
        // What was restored stays so.
        new.kill();
        new.start_again(&["--name", "r"]);
        let next = acquire(&new, "after", &session);
        assert!(Some(&next) > given.last());
        given.insert(next);
        new.stop();
    }
    let clone = restored(&file, &["--clone"]);
    assert_ne!(status(&clone)["issuer_id"], issuer);
    assert_ne!(status(&clone)["cluster_id"], cluster);
    assert_eq!(ok(&clone.address, &["kv", "get", "a"]), "1\n");
    let named = restored(&file, &["--replace", "--revision", "4503599627370496"]);
    assert_eq!(acquire(&named, "l", &session), 4_503_599_627_370_497);
}

#[test]
fn a_backup_under_way_is_one_revision() {
    let server = Server::start(&[]);
    // Two keys that are equal at every revision.
    let address = server.address.clone();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let pair =
        |i: u32| format!(r#"{{"then":[{{"put":{{"key":"x","value":"{i}"}}}},{{"put":{{"key":"y","value":"{i}"}}}}]}}"#);
    let writer = std::thread::spawn(move || {
        let mut i = 0;
        while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
            i += 1;
            let answer =
                common::http(&address, "POST", "/v1/kv:txn", "content-type: application/json\r\n", pair(i).as_bytes());
            assert_eq!(answer.as_ref().unwrap().status, 200, "{answer:?}");
        }
        i
    });
    wait_for("writes", Duration::from_secs(10), || tenure(&server.address, &["kv", "get", "y"]).code == 0);
    let file = server.folder.path().join("backup");
    let first = number(&save(&server, &file), "revision");
    let before: u32 = ok(&server.address, &["kv", "get", "x"]).trim().parse().unwrap();
    let said = save(&server, &file);
    assert!(number(&said, "revision") > first, "each backup is a fresh one");
    stop.send(()).unwrap();
    assert!(writer.join().unwrap() > before);
    let new = restored(&file, &["--clone"]);
    let (x, y) = (ok(&new.address, &["kv", "get", "x"]), ok(&new.address, &["kv", "get", "y"]));
    assert_eq!(x, y);
    assert!(x.trim().parse::<u32>().unwrap() >= before, "what was acknowledged before the call is in it");
}

#[test]
fn an_empty_member_is_saved_and_a_file_is_replaced_only_by_a_whole_one() {
    let server = Server::start(&[]);
    let file = server.folder.path().join("backup");
    let said = save(&server, &file);
    assert_eq!((number(&said, "keys"), number(&said, "revision")), (0, 1));
    let bytes = fs::read(&file).unwrap();
    assert_eq!(number(&said, "bytes"), bytes.len() as u64);
    let shown = ok("127.0.0.1:1", &["snapshot", "status", file.to_str().unwrap()]);
    assert!(shown.contains("issuer    ") && shown.contains("n0 ("), "{shown}");
    assert!(ok("127.0.0.1:1", &["snapshot", "verify", file.to_str().unwrap()]).contains("is whole: revision 1"));
    let nobody = tenure("127.0.0.1:1", &["snapshot", "save", file.to_str().unwrap()]);
    assert_eq!(nobody.code, 69, "{}", nobody.err);
    assert_eq!(fs::read(&file).unwrap(), bytes);
    assert!(!server.folder.path().join("backup.part").exists());
}

#[test]
fn what_must_not_be_restored_is_refused_by_name() {
    let (mut server, file, ..) = saved();
    server.stop();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let refuse = |file: &Path, more: &[&str], code: i32, why: &str| {
        let said = restore(file, &data, more);
        assert_eq!(said.code, code, "{}", said.err);
        assert!(said.err.contains(why), "{}", said.err);
        assert!(!data.join("identity").exists());
    };
    refuse(&file, &[], 64, "--replace|--clone");
    refuse(&file, &["--replace", "--revision", "3"], 64, "above");
    refuse(&file, &["--replace", "--revision", "9007199254740992"], 64, "below 2^53");

    let damaged = folder.path().join("damaged");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&damaged, &bytes).unwrap();
    refuse(&damaged, &["--replace"], 65, "damaged at byte ");
    for command in ["verify", "status"] {
        let said = tenure("127.0.0.1:1", &["snapshot", command, damaged.to_str().unwrap()]);
        assert_eq!(said.code, 65);
        assert!(
            said.err.contains("damaged: damaged at byte ") || said.err.contains("damaged at byte "),
            "{}",
            said.err
        );
    }
    fs::write(&damaged, &bytes[..middle]).unwrap();
    refuse(&damaged, &["--replace"], 65, "damaged at byte ");

    let later = folder.path().join("later");
    fs::copy(&file, &later).unwrap();
    let tomorrow = SystemTime::now() + Duration::from_secs(86_400);
    fs::File::options().write(true).open(&later).unwrap().set_modified(tomorrow).unwrap();
    refuse(&later, &["--replace"], 10, "behind the time of the backup");

    // A clock that stood for 2100 when the cluster was restored: by ours its tokens were given already.
    let ahead = restored(&file, &["--replace", "--revision", "4503599627370496"]);
    let high = folder.path().join("high");
    save(&ahead, &high);
    refuse(&high, &["--replace"], 10, "gives revision ");

    fs::create_dir_all(&data).unwrap();
    let _ = fs::remove_file(data.join("lock"));
    fs::write(data.join("notes"), "mine").unwrap();
    refuse(&file, &["--replace"], 64, "not empty");
    assert_eq!(fs::read_dir(&data).unwrap().count(), 1);
}

#[test]
fn a_backup_copied_into_a_folder_does_not_start() {
    let (mut server, file, ..) = saved();
    server.stop();
    let folder = tempfile::tempdir().unwrap();
    fs::copy(&file, folder.path().join("snapshot-0000000000000009")).unwrap();
    let (code, said) = refused(folder.path(), &[]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("`tenure restore` makes one of it"), "{said}");
}

#[test]
fn a_restored_member_grows_and_the_last_one_left_is_saved_without_a_majority() {
    let (mut old, file, session, token) = saved();
    old.kill();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    assert_eq!(restore(&file, &data, &["--replace"]).code, 0);
    let peer = common::free_address();
    let mut first = Server::start_in(folder, data, &["--name", "r", "--peer-listen", &peer]);
    let peer = common::free_address();
    let said = ok(&first.address, &["member", "add", "s", "--peer", &peer, "-o", "json"]);
    let join = serde_json::from_str::<Value>(&said).unwrap()["join_token"].as_str().unwrap().to_owned();
    let second = Server::start(&["--name", "s", "--peer-listen", &peer, "--join", &join]);
    wait_for("a second voter", Duration::from_secs(20), || {
        // The other is the leader.
        ok(&first.address, &["member", "list"]).contains(" voter ")
    });
    ok(&second.address, &["kv", "put", "b", "2"]);
    let newest = acquire(&second, "l", &session);
    assert!(newest > token);
    let names = ok(&second.address, &["member", "list"]);
    assert!(!names.contains("n0"), "nobody of the old cluster is in the new: {names}");

    let saved = second.folder.path().join("backup");
    let whole = save(&second, &saved);
    assert_eq!(whole["members"].as_array().unwrap().len(), 2, "{whole}");
    first.kill();
    let file = saved.to_str().unwrap();
    wait_for("the loss to be noticed", Duration::from_secs(20), || {
        tenure(&second.address, &["snapshot", "save", file]).code == 69
    });
    ok(&second.address, &["snapshot", "save", file, "--stale"]);
    let third = restored(&saved, &["--replace"]);
    assert_eq!(ok(&third.address, &["kv", "get", "b"]), "2\n");
    assert!(acquire(&third, "m", &session) > newest);
}
