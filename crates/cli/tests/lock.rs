//! The main job on real processes: `tenure lock` against a real server, with freezes, kills and restarts.
//!
//! Promises under test. Two jobs under one lock never overlap. A command whose lease cannot be renewed is warned before the deadline and
//! killed at it. A frozen owner's guarded write is refused, while its careless write does its damage. Exit codes are those of the table.
//!
//! Each test has a server and a folder of its own; sessions are short, so the waits are real but few.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::TENURE;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// The shared server process, with what these tests ask of it.
struct Server(common::Server);

const FLAGS: [&str; 2] = ["--log-level", "warn"];

impl Server {
    fn start() -> Self {
        Self(common::Server::start(&FLAGS))
    }

    /// kill -9, then the same folder and address again.
    fn restart(&mut self) {
        self.kill();
        self.0.start_again(&FLAGS);
    }

    fn kill(&mut self) {
        self.0.kill();
    }

    fn tenure(&self, args: &[&str]) -> Command {
        let mut command = Command::new(TENURE);
        command.args(args).env("TENURE_ENDPOINTS", &self.0.address).env("TENURE", TENURE).stdin(Stdio::null());
        command
    }

    /// `tenure lock` with these flags, running this shell script.
    fn lock(&self, flags: &[&str], script: &str) -> Command {
        let mut command = self.tenure(&["lock"]);
        command.args(flags).args(["--", "sh", "-c", script]).current_dir(self.0.folder.path());
        command
    }

    fn run(&self, flags: &[&str], script: &str) -> Output {
        self.lock(flags, script).output().unwrap()
    }

    fn get(&self, key: &str) -> String {
        String::from_utf8(self.tenure(&["kv", "get", key]).output().unwrap().stdout).unwrap().trim().to_owned()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.folder.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default().trim().to_owned()
    }

    /// Waits until a script has written this file, and gives what is in it.
    fn await_file(&self, name: &str) -> String {
        wait_for(name, || !self.read(name).is_empty());
        self.read(name)
    }
}

fn wait_for(what: &str, ready: impl FnMut() -> bool) {
    common::wait_for(what, Duration::from_secs(20), ready);
}

fn pid(number: &str) -> Pid {
    Pid::from_raw(number.parse().unwrap()).unwrap()
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The state letter of a process, `None` when it is gone.
fn state(pid: &str) -> Option<char> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("State:"))?.trim().chars().next()
}

fn gone(pid: &str) -> bool {
    matches!(state(pid), None | Some('Z'))
}

#[test]
fn two_jobs_under_one_lock_never_overlap() {
    let server = Server::start();
    // mkdir succeeds for one at a time; whoever finds the folder there overlaps.
    let job = "mkdir busy || echo overlap >> trouble; echo $TENURE_TOKEN >> tokens; sleep 0.05; rmdir busy";
    let round = |_| server.lock(&["jobs/one", "--ttl", "2s"], job).spawn().unwrap();
    for _ in 0..3 {
        let copies: Vec<Child> = (0..3).map(round).collect();
        for mut copy in copies {
            assert_eq!(copy.wait().unwrap().code(), Some(0));
        }
    }
    assert_eq!(server.read("trouble"), "");
    let tokens: Vec<u64> = server.read("tokens").lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(tokens.len(), 9);
    assert!(tokens.is_sorted_by(|a, b| a < b), "each grant has a higher token: {tokens:?}");
}

/// Issue 3, the main job: the frozen owner's careless write lands, its guarded one is refused with an explanation.
#[test]
fn a_frozen_owners_guarded_write_is_refused() {
    let server = Server::start();
    let job = r#"
        echo $TENURE_TOKEN > token.a; echo $$ > pid.a
        until [ -e go ]; do sleep 0.05; done
        "$TENURE" kv put careless a
        "$TENURE" kv put guarded a --require-lock "$TENURE_LOCK:$TENURE_TOKEN" 2> refusal
        echo $? > code.a"#;
    let mut frozen = server.lock(&["jobs/report", "--ttl", "1500ms"], job).stderr(Stdio::piped()).spawn().unwrap();
    let child = pid(&server.await_file("pid.a"));
    send(&frozen, Signal::STOP);
    kill_process_group(child, Signal::STOP).unwrap();

    // The new owner still holds the lock when the old one wakes up.
    let takeover = r#"echo $TENURE_TOKEN > token.b
        "$TENURE" kv put careless b && "$TENURE" kv put guarded b --require-lock "$TENURE_LOCK:$TENURE_TOKEN"
        echo $? > code.b
        until [ -e done ]; do sleep 0.05; done"#;
    let mut other = server.lock(&["jobs/report", "--ttl", "2s", "--wait", "20s"], takeover).spawn().unwrap();
    assert_eq!(server.await_file("code.b"), "0");
    let (token_a, token_b): (u64, u64) =
        (server.read("token.a").parse().unwrap(), server.read("token.b").parse().unwrap());
    assert!(token_b > token_a);

    // The child first: on a real machine either may wake first, and this is the bad case.
    fs::write(server.path("go"), "go").unwrap();
    kill_process_group(child, Signal::CONT).unwrap();
    assert_eq!(server.await_file("code.a"), "12");
    let refusal = server.read("refusal");
    assert!(refusal.contains(&format!("token {token_a} of lock `jobs/report` is stale")), "{refusal}");
    assert!(refusal.contains(&format!("under token {token_b}")) && refusal.contains("hint:"), "{refusal}");
    assert_eq!((server.get("careless").as_str(), server.get("guarded").as_str()), ("a", "b"));

    send(&frozen, Signal::CONT);
    assert_eq!(frozen.wait().unwrap().code(), Some(76));
    fs::write(server.path("done"), "done").unwrap();
    assert_eq!(other.wait().unwrap().code(), Some(0), "the new owner was not disturbed");
}

#[test]
fn a_thawed_supervisor_kills_before_anything_else() {
    let server = Server::start();
    let mut frozen =
        server.lock(&["l", "--ttl", "1500ms"], "echo $$ > pid; exec sleep 60").stderr(Stdio::piped()).spawn().unwrap();
    let child = server.await_file("pid");
    // Only the supervisor freezes: its command runs on past the lease, which nothing here can prevent.
    send(&frozen, Signal::STOP);
    std::thread::sleep(Duration::from_millis(2_500));
    assert_eq!(state(&child), Some('S'));
    send(&frozen, Signal::CONT);
    wait_for("the kill", || gone(&child));
    assert_eq!(frozen.wait().unwrap().code(), Some(76));
}

#[test]
fn a_killed_supervisor_takes_its_command_with_it() {
    let server = Server::start();
    let mut supervisor = server.lock(&["l", "--ttl", "2s"], "echo $$ > pid; exec sleep 60").spawn().unwrap();
    let child = server.await_file("pid");
    supervisor.kill().unwrap();
    supervisor.wait().unwrap();
    wait_for("the command's end", || gone(&child));
}

#[test]
fn exit_codes_are_the_commands_own_or_of_the_table() {
    let server = Server::start();
    let code = |flags: &[&str], script: &str| server.run(flags, script).status.code();
    assert_eq!(code(&["l"], "exit 0"), Some(0));
    assert_eq!(code(&["l"], "exit 23"), Some(23));
    assert_eq!(code(&["l"], "kill -9 $$"), Some(137));
    assert_eq!(server.tenure(&["lock", "l", "--", "/no/such/command"]).output().unwrap().status.code(), Some(127));
    assert_eq!(server.tenure(&["lock", "l", "--", "/etc/passwd"]).output().unwrap().status.code(), Some(126));
    assert_eq!(server.tenure(&["lock", "l", "echo"]).output().unwrap().status.code(), Some(64));
    let nobody = server
        .tenure(&["lock", "l", "--endpoints", "127.0.0.1:1", "--command-timeout", "300ms", "--", "true"])
        .output()
        .unwrap();
    assert_eq!(nobody.status.code(), Some(69));
    assert!(text(&nobody.stderr).contains("127.0.0.1:1"), "{}", text(&nobody.stderr));
}

#[test]
fn a_held_lock_is_refused_at_once_or_after_the_wait_with_its_holder() {
    let server = Server::start();
    let mut holder =
        server.lock(&["l", "--ttl", "2s"], "echo $TENURE_SESSION > session; exec sleep 60").spawn().unwrap();
    let session = server.await_file("session");

    let began = Instant::now();
    let refused = server.run(&["-n", "l"], "echo ran > ran");
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains(&format!("held by session {session}")), "{}", text(&refused.stderr));
    assert!(began.elapsed() < Duration::from_secs(2));

    let began = Instant::now();
    assert_eq!(server.run(&["-w", "0.5", "-E", "42", "l"], "echo ran > ran").status.code(), Some(42));
    assert!(began.elapsed() >= Duration::from_millis(500));
    assert_eq!(server.read("ran"), "", "no command ran without the lock");

    // A waiter that is told to stop leaves the queue and does not run its command.
    let mut waiter = server.lock(&["l", "--wait", "60s"], "echo ran > ran").spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    send(&waiter, Signal::TERM);
    assert_eq!(waiter.wait().unwrap().code(), Some(143));

    send(&holder, Signal::TERM);
    assert_eq!(holder.wait().unwrap().code(), Some(143), "the command's end by the signal that was passed on");
    assert_eq!(server.run(&["-n", "l"], "true").status.code(), Some(0), "free again, nobody is left in the queue");
}

#[test]
fn the_environment_names_the_grant() {
    let server = Server::start();
    let began_ms =
        u128::from(rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec.unsigned_abs()) * 1_000;
    let output = server.run(&["a b", "--ttl", "20s"], "env");
    let environment = text(&output.stdout);
    let value =
        |name: &str| environment.lines().find_map(|line| line.strip_prefix(&format!("{name}="))).unwrap().to_owned();
    assert_eq!(
        (value("TENURE_LOCK"), value("ETCD_LOCK_KEY"), value("CONSUL_LOCK_HELD")),
        ("a b".into(), "a b".into(), "true".into())
    );
    assert_eq!(value("TENURE_TOKEN"), value("ETCD_LOCK_REV"));
    assert_eq!(value("TENURE_ENDPOINTS"), server.0.address);
    assert!(value("TENURE_TOKEN").parse::<u64>().unwrap() > 1 && value("TENURE_SESSION").parse::<u64>().unwrap() > 0);
    let deadline: u128 = value("TENURE_DEADLINE_MS").parse().unwrap();
    assert!(deadline > began_ms + 15_000 && deadline < began_ms + 25_000, "{deadline} {began_ms}");
}

#[test]
fn signals_reach_the_whole_group() {
    let server = Server::start();
    let script = "trap 'echo parent > hup.parent' HUP; sh -c 'trap \"echo child > hup.child; exit\" HUP; echo up > up; while :; do sleep 0.05; done' & wait; wait; exit 5";
    let mut job = server.lock(&["l", "--ttl", "2s"], script).spawn().unwrap();
    server.await_file("up");
    send(&job, Signal::HUP);
    assert_eq!(server.await_file("hup.child"), "child");
    assert_eq!(server.await_file("hup.parent"), "parent");
    assert_eq!(job.wait().unwrap().code(), Some(5));
}

#[test]
fn without_a_server_the_command_is_warned_and_then_killed_before_the_lease_ends() {
    let mut server = Server::start();
    // Two stubborn processes, one of them in the background: the warning is not enough, and the kill is for the group.
    let script = "trap 'date +%s%N > warned' TERM; sh -c 'trap \"\" TERM; echo $$ > pid.child; while :; do sleep 0.02; done' & \
                  echo $$ > pid; while :; do date +%s%N >> alive; sleep 0.02; done";
    let job = server.lock(&["l", "--ttl", "2s", "--grace", "400ms"], script).stderr(Stdio::piped()).spawn().unwrap();
    let (parent, child) = (server.await_file("pid"), server.await_file("pid.child"));
    let killed_at = Instant::now();
    server.kill();
    let output = job.wait_with_output().unwrap();
    let stopped_after = killed_at.elapsed();
    assert_eq!(output.status.code(), Some(76), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("was lost while the command ran"), "{}", text(&output.stderr));
    assert!(gone(&parent) && gone(&child));
    // The last renewal was sent before the server went, and a session lasts at least 2 s from its acceptance: the usable part is 1.78 s.
    let (warned, alive) = (last_nanos(&server.read("warned")), last_nanos(&server.read("alive")));
    assert!(warned < alive, "the warning comes while there is time left");
    assert!(alive - warned < 600_000_000, "and the kill follows at the deadline: {} ms", (alive - warned) / 1_000_000);
    // The exit also tries to say goodbye to a server that is not there, for at most 2 s.
    assert!(stopped_after < Duration::from_millis(1_780 + 2_000 + 500), "{stopped_after:?}");
}

/// The last moment in a file whose writer may have been killed within a line.
fn last_nanos(text: &str) -> u128 {
    text.lines().rfind(|line| line.len() == 19).unwrap().parse().unwrap()
}

#[test]
fn a_restart_of_the_server_within_the_ttl_keeps_the_lock() {
    let mut server = Server::start();
    let job = server
        .lock(&["l", "--ttl", "6s"], "echo $TENURE_TOKEN > token; until [ -e go ]; do sleep 0.05; done; exit 7")
        .spawn()
        .unwrap();
    let token = server.await_file("token");
    server.restart();
    assert_eq!(server.run(&["-n", "l"], "true").status.code(), Some(1), "still held");
    // Longer than the ttl altogether: the renewals go on at the new process.
    std::thread::sleep(Duration::from_secs(3));
    let guarded = server.tenure(&["kv", "put", "k", "v", "--require-lock", &format!("l:{token}")]).output().unwrap();
    assert!(guarded.status.success(), "{}", text(&guarded.stderr));
    fs::write(server.path("go"), "go").unwrap();
    assert_eq!(job.wait_with_output().unwrap().status.code(), Some(7));
    assert_eq!(server.run(&["-n", "l"], "true").status.code(), Some(0));
}

#[test]
fn a_session_that_an_operator_ends_stops_the_command() {
    let server = Server::start();
    let mut job = server
        .lock(&["l", "--ttl", "2s", "--lost-code", "99"], "echo $TENURE_SESSION > session; exec sleep 60")
        .spawn()
        .unwrap();
    let session = server.await_file("session");
    let list = text(&server.tenure(&["session", "list", "-o", "json"]).output().unwrap().stdout);
    assert!(list.contains(&session), "{list}");
    let told = text(&server.tenure(&["session", "get", &session]).output().unwrap().stdout);
    assert!(told.contains("lock l ") && told.contains("host="), "{told}");
    assert!(server.tenure(&["session", "end", &session]).output().unwrap().status.success());
    assert_eq!(job.wait().unwrap().code(), Some(99));
    assert_eq!(server.tenure(&["session", "get", &session]).output().unwrap().status.code(), Some(19));
    assert_eq!(server.tenure(&["session", "end", &session]).output().unwrap().status.code(), Some(13));
}

#[test]
fn the_lock_outlives_the_command_while_its_background_processes_run() {
    let server = Server::start();
    let script = "sh -c 'sleep 1; date +%s%N > background' > /dev/null 2>&1 & exit 3";
    assert_eq!(server.run(&["l", "--ttl", "2s"], script).status.code(), Some(3));
    assert_ne!(server.read("background"), "", "the lock was held until the background process had ended");
    fs::remove_file(server.path("background")).unwrap();
    assert_eq!(server.run(&["-o", "l", "--ttl", "2s"], script).status.code(), Some(3));
    assert_eq!(server.read("background"), "", "-o does not wait");
}

/// The demo of the README, as a user runs it.
#[test]
fn the_demo_shows_the_damage_and_the_guard() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/guarded-job/demo.sh");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // A group of its own, as the demo stops and continues processes.
    let output =
        Command::new(demo).env("TENURE", TENURE).env("PORT", port.to_string()).process_group(0).output().unwrap();
    let shown = format!("{}\n{}", text(&output.stdout), text(&output.stderr));
    assert_eq!((output.status.code(), output.status.signal()), (Some(0), None), "{shown}");
    assert!(shown.contains("worker A: guarded write refused, exit code 12"), "{shown}");
    assert!(shown.contains("of lock `demo/report` is stale"), "{shown}");
    assert!(shown.contains("exit code 76"), "{shown}");
    assert!(shown.contains("careless: written by A\nguarded:  written by B\n"), "{shown}");
}

#[test]
fn readers_and_permits_run_beside_one_another_and_are_shown() {
    let server = Server::start();
    // Inside a reader another reader runs, and a writer does not.
    let beside = r#""$TENURE" lock r -s -- true && ! "$TENURE" lock r -n -- true"#;
    let out = server.run(&["-s", "r"], beside);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    // Two of two permits have different slots; a third is not to be had, and another number is a mismatch.
    let inner = r#"echo "in $TENURE_SLOTS"; "$TENURE" lock p -n --permits 1 --of 2 -- true; echo "third $?""#;
    let script = format!(
        r#"echo "out $TENURE_SLOTS"; "$TENURE" lock p --permits 1 --of 2 -- sh -c '{inner}'; "$TENURE" lock p -n --permits 1 --of 3 -- true; echo "other $?"; "$TENURE" lock p --show"#
    );
    let out = server.run(&["p", "--permits", "1", "--of", "2"], &script);
    let said = text(&out.stdout);
    for expected in ["out 0", "in 1", "third 1", "other 15", "held by 1, 1 of 2 permits free", "granted", "released"] {
        assert!(said.contains(expected), "`{expected}` in {said} {}", text(&out.stderr));
    }
    let resized = server.tenure(&["lock", "p", "--resize", "3"]).output().unwrap();
    assert_eq!(text(&resized.stdout).trim(), "lock `p` has 3 permits, 2 before");
    let usage = |args: &[&str]| server.tenure(args).output().unwrap().status.code();
    assert_eq!(usage(&["lock", "p", "--permits", "1", "--", "true"]), Some(64));
    assert_eq!(usage(&["lock", "p", "--permits", "3", "--of", "2", "--", "true"]), Some(64));
    assert_eq!(usage(&["lock", "p", "--lock-delay", "61s", "--", "true"]), Some(64));
    assert_eq!(usage(&["lock", "p", "--force-release"]), Some(64));
    assert_eq!(usage(&["lock", "p"]), Some(64));
    assert_eq!(usage(&["lock", "never", "--resize", "3"]), Some(19));
}

#[test]
fn an_operator_takes_a_lock_away_and_the_events_say_why() {
    let server = Server::start();
    let script = r#""$TENURE" lock l --force-release --token 1 --reason wrong; echo "wrong $?"
        "$TENURE" lock l --force-release --token "$TENURE_TOKEN" --reason 'its machine burns'; echo "right $?""#;
    let out = server.run(&["l"], script);
    let said = text(&out.stdout);
    assert!(said.contains("wrong 12") && said.contains("right 0"), "{said} {}", text(&out.stderr));
    assert_eq!(out.status.code(), Some(76), "the lock was lost while the command ran");
    let shown = server.tenure(&["lock", "l", "--show", "--output", "json"]).output().unwrap();
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    let kinds: Vec<_> = shown["events"].as_array().unwrap().iter().map(|event| event["kind"].clone()).collect();
    assert_eq!(kinds, ["granted", "force-released"], "{shown}");
    assert_eq!(shown["events"][1]["detail"], "its machine burns");
    assert_eq!(shown["holder_count"], 0);
}

#[test]
fn a_command_is_killed_though_nobody_reads_the_warning() {
    let mut server = Server::start();
    // A grandchild that hears no warning.
    let job = "trap '' TERM; sh -c 'trap \"\" TERM; echo $$ > grandchild; while :; do sleep 0.1; done' & wait; while :; do sleep 0.1; done";
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut lock = server.lock(&["pipe", "--ttl", "1s"], job).stderr(writer).spawn().unwrap();
    let grandchild = server.await_file("grandchild");
    server.kill();
    wait_for("the end of the supervisor", || lock.try_wait().unwrap().is_some());
    assert_eq!(lock.wait().unwrap().code(), Some(76));
    wait_for("the end of what the command started", || gone(&grandchild));
}
