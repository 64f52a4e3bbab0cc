//! Clusters as processes: started together, grown, repaired and shrunk by `tenure member`, and seen by `tenure status`.

#![allow(clippy::unwrap_used, reason = "a test may stop")]

mod common;

use std::time::Duration;

use common::{Server, free_address, json, ok, tenure, wait_for};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

struct Member {
    name: String,
    peer: String,
    server: Server,
}

impl Member {
    /// Begins with the flags that every start of it has, and `more`.
    fn begin(name: &str, peer: &str, more: &[&str]) -> Self {
        let server = Server::begin(&[&["--name", name, "--peer-listen", peer], more].concat());
        Self { name: name.to_owned(), peer: peer.to_owned(), server }
    }

    /// Begins what a line of `tenure member add` says, on another port for clients.
    fn of_line(said: &str) -> Self {
        let line = said.lines().find(|line| line.starts_with("tenure serve ")).unwrap_or_else(|| panic!("{said}"));
        let flag = |flag: &str| {
            let mut words = line.split(' ');
            words.find(|word| *word == flag).unwrap_or_else(|| panic!("{flag} in {line}"));
            words.next().unwrap().to_owned()
        };
        let token = flag("--join");
        Self::begin(&flag("--name"), &flag("--peer-listen"), &["--join", &token])
    }

    fn address(&self) -> &str {
        &self.server.address
    }

    fn begin_again(&mut self, more: &[&str]) {
        let (name, peer) = (self.name.clone(), self.peer.clone());
        self.server.begin_again(&[&["--name", &name, "--peer-listen", &peer], more].concat());
    }
}

/// Three that are started together, and the flag that each has.
fn three() -> (Vec<Member>, String) {
    let named: Vec<(String, String)> = (0..3).map(|n| (format!("n{n}"), free_address())).collect();
    let cluster: Vec<String> = named.iter().map(|(name, peer)| format!("{name}={peer}")).collect();
    let cluster = cluster.join(",");
    let mut members: Vec<Member> =
        named.iter().map(|(name, peer)| Member::begin(name, peer, &["--cluster", &cluster])).collect();
    members.iter_mut().for_each(|member| member.server.await_ready());
    (members, cluster)
}

/// The members as `endpoint` sees them, as `name role` in the order of names.
fn roles(endpoint: &str) -> String {
    let list = json(endpoint, &["member", "list"]);
    let text = |member: &Value, field: &str| member[field].as_str().unwrap().to_owned();
    let mut all: Vec<String> =
        list.as_array().unwrap().iter().map(|m| format!("{} {}", text(m, "name"), text(m, "role"))).collect();
    all.sort();
    all.join(", ")
}

fn wait_for_roles(endpoint: &str, expected: &str) {
    let mut last = String::new();
    wait_for(expected, LIMIT, || {
        last = roles(endpoint);
        last == expected
    });
}

fn leader(endpoint: &str) -> String {
    let list = json(endpoint, &["member", "list"]);
    let leader = list.as_array().unwrap().iter().find(|m| m["leader"] == true);
    leader.map_or(String::new(), |m| m["name"].as_str().unwrap().to_owned())
}

#[test]
fn three_start_together_and_say_when_they_have_no_majority() {
    let (mut members, cluster) = three();
    let endpoints: Vec<String> = members.iter().map(|m| m.address().to_owned()).collect();
    ok(&endpoints[0], &["kv", "put", "k", "v"]);
    for endpoint in &endpoints {
        assert_eq!(ok(endpoint, &["kv", "get", "k"]), "v\n", "each of them answers");
        wait_for_roles(endpoint, "n0 voter, n1 voter, n2 voter");
    }
    // One endpoint is enough to see all of them.
    let mut said = String::new();
    wait_for("a healthy cluster", LIMIT, || {
        said = ok(&endpoints[1], &["status"]);
        said.contains(": healthy, 3 of 3 voters are up; ")
    });
    let rows = |word: &str| said.lines().filter(|line| line.contains(word)).count();
    assert_eq!((rows(" leader  up "), rows(" voter   up ")), (1, 2), "{said}");
    let status = json(&endpoints[2], &["status"]);
    assert_eq!(status.as_array().unwrap().len(), 3, "{status}");

    let heir = if leader(&endpoints[0]) == "n0" { "n1" } else { "n0" };
    assert_eq!(ok(&endpoints[2], &["member", "move-leader", heir]), format!("{heir} leads\n"));
    assert_eq!(tenure(&endpoints[0], &["member", "move-leader", "n7"]).code, 19);

    members[1].server.kill();
    members[2].server.kill();
    wait_for("the loss to be noticed", LIMIT, || tenure(&endpoints[0], &["status"]).code == 69);
    let said = tenure(&endpoints[0], &["status"]).out;
    let verdict =
        "NO MAJORITY: 1 of 3 voters are up (not n1, n2); writes and consistent reads are refused until 2 are up";
    assert!(said.contains(verdict), "{said}");
    assert!(said.contains(" DOWN "), "{said}");
    let add = tenure(&endpoints[0], &["member", "add", "n3", "--peer", "127.0.0.1:1"]);
    assert_eq!(add.code, 69, "{}{}", add.out, add.err);
    // They know each other by now.
    members[1].begin_again(&["--cluster", &cluster]);
    members[1].server.await_ready();
    assert_eq!(ok(&endpoints[0], &["kv", "get", "k"]), "v\n");
    let said = ok(&endpoints[0], &["status"]);
    assert!(said.contains("DEGRADED: n2 down; NONE MORE may be lost"), "{said}");
}

#[test]
fn no_tick_of_a_schedule_comes_twice_when_the_leader_changes() {
    let (mut members, cluster) = three();
    let endpoints: Vec<String> = members.iter().map(|m| m.address().to_owned()).collect();
    let all = endpoints.join(",");
    ok(&all, &["schedule", "put", "s", "@every 1s", "q", "x"]);
    let enqueued = || -> u64 { json(&all, &["schedule", "get", "s"])["enqueued"].as_str().unwrap().parse().unwrap() };
    for round in 1..=4 {
        wait_for("the next tick", LIMIT, || enqueued() >= round);
        let heir = ["n0", "n1", "n2"].into_iter().find(|name| *name != leader(&endpoints[0])).unwrap();
        ok(&all, &["member", "move-leader", heir]);
    }
    // One that leads dies, and whoever follows goes on.
    let led = leader(&endpoints[0]);
    let dead = members.iter().position(|member| member.name == led).unwrap();
    members[dead].server.kill();
    let before = enqueued();
    wait_for("ticks of the next leader", LIMIT, || enqueued() >= before + 2);
    members[dead].begin_again(&["--cluster", &cluster]);
    members[dead].server.await_ready();
    ok(&all, &["schedule", "pause", "s"]);
    let jobs = json(&all, &["queue", "receive", "q", "--max", "100"]);
    let tick = |job: &Value| job["headers"]["tenure-tick-ms"].as_str().unwrap().parse::<u64>().unwrap();
    let mut ticks: Vec<u64> = jobs.as_array().unwrap().iter().map(tick).collect();
    assert_eq!(ticks.len() as u64, enqueued());
    ticks.sort_unstable();
    let first = ticks[0];
    assert!(
        ticks.iter().all(|tick| (tick - first).is_multiple_of(1_000)) && ticks.is_sorted_by(|a, b| a < b),
        "{ticks:?}"
    );
}

#[test]
fn one_grows_to_three_and_shrinks_again() {
    let mut first = Member::begin("n0", &free_address(), &[]);
    first.server.await_ready();
    let endpoint = first.address().to_owned();
    ok(&endpoint, &["kv", "put", "k", "v"]);
    let mut others = Vec::new();
    for name in ["n1", "n2"] {
        let said = ok(&endpoint, &["member", "add", name, "--peer", &free_address()]);
        assert!(said.contains("it is a voter when it has caught up"), "{said}");
        others.push(Member::of_line(&said));
        wait_for_roles(&endpoint, if name == "n1" { "n0 voter, n1 voter" } else { "n0 voter, n1 voter, n2 voter" });
    }
    others.iter_mut().for_each(|other| other.server.await_ready());
    assert_eq!(ok(others[1].address(), &["kv", "get", "k"]), "v\n", "what was there before has come along");
    let taken = tenure(others[0].address(), &["member", "add", "n2", "--peer", "127.0.0.1:1"]);
    assert_eq!(taken.code, 10, "{}", taken.err);
    let bad = tenure(&endpoint, &["member", "add", "n3", "--peer", "nowhere"]);
    assert!(bad.code == 64 && bad.err.contains("host:port"), "{}", bad.err);

    // A learner stays one until it is told otherwise; every member takes the change.
    let said = ok(others[1].address(), &["member", "add", "n3", "--peer", &free_address(), "--learner"]);
    assert!(said.contains("`tenure member promote n3`"), "{said}");
    let mut learner = Member::of_line(&said);
    wait_for_roles(&endpoint, "n0 voter, n1 voter, n2 voter, n3 learner");
    wait_for("the learner to say that it is there", LIMIT, || {
        let list = json(&endpoint, &["member", "list"]);
        list.as_array().unwrap().iter().any(|m| m["name"] == "n3" && m["started"] == true)
    });
    assert_eq!(ok(others[0].address(), &["member", "promote", "n3"]), "member `n3` is a voter\n");
    assert_eq!(tenure(&endpoint, &["member", "promote", "n3"]).code, 64, "it is one");

    assert_eq!(ok(others[0].address(), &["member", "remove", "n3"]), "member `n3` is removed\n");
    let (code, log) = learner.server.await_end();
    assert!(code == 1 && log.contains("member `n3` was removed from the cluster"), "{code}: {log}");
    assert_eq!(tenure(&endpoint, &["member", "remove", "n3"]).code, 19);

    // The leader goes too, and hands over before.
    let gone = leader(&endpoint);
    let stays = if gone == "n0" { others[0].address() } else { &endpoint };
    ok(stays, &["member", "remove", &gone]);
    wait_for("another to lead", LIMIT, || !["", &gone].contains(&leader(stays).as_str()));
    ok(stays, &["kv", "put", "k", "w"]);
}

#[test]
fn a_dead_member_is_replaced_by_one_command_and_does_not_come_back() {
    let (mut members, cluster) = three();
    let endpoint = members[0].address().to_owned();
    wait_for_roles(&endpoint, "n0 voter, n1 voter, n2 voter");
    // Everybody must have registered its folder, or nobody can tell a strange one.
    wait_for("all to have registered", LIMIT, || {
        let list = json(&endpoint, &["member", "list"]);
        list.as_array().unwrap().iter().all(|m| m["started"] == true)
    });
    members[2].server.kill();
    let peer = members[2].peer.clone();
    ok(&endpoint, &["kv", "put", "k", "v"]);
    let added = json(&endpoint, &["member", "replace", "n2", "n3", "--peer", &peer]);
    let token = added["join_token"].as_str().unwrap().to_owned();
    assert!(added["command"].as_str().unwrap().ends_with(&format!(" --join {token}")), "{added}");

    // The token is for this member, whole, and only that.
    let folder = tempfile::tempdir().unwrap();
    let refused =
        |name: &str, token: &str| common::refused(&folder.path().join("x"), &["--name", name, "--join", token]);
    let (code, said) = refused("n4", &token);
    assert!(code == 64 && said.contains("n3"), "{code}: {said}");
    let (code, said) = refused("n3", &token[..token.len() - 3]);
    assert!(code == 64 && said.contains("damaged"), "{code}: {said}");
    let (code, said) = refused("n3", "K10deadbeef::server:abc");
    assert!(code == 64 && said.contains("no join token"), "{code}: {said}");

    let mut new = Member::begin("n3", &peer, &["--join", &token]);
    wait_for_roles(&endpoint, "n0 voter, n1 voter, n3 voter");
    new.server.await_ready();
    assert_eq!(ok(new.address(), &["kv", "get", "k"]), "v\n");

    // It starts again without the token: its folder knows who it is.
    new.server.stop();
    new.begin_again(&[]);
    new.server.await_ready();

    // The dead one comes back elsewhere.
    members[2].peer = free_address();
    members[2].begin_again(&["--cluster", &cluster]);
    let (code, log) = members[2].server.await_end();
    assert!(code == 1 && log.contains("was removed from the cluster"), "{code}: {log}");

    // A folder that was wiped is not the member that it says it is.
    members[1].server.kill();
    std::fs::remove_dir_all(&members[1].server.data).unwrap();
    members[1].begin_again(&["--cluster", &cluster]);
    let (code, log) = members[1].server.await_end();
    let cure = "the folder was wiped or swapped";
    assert!(code == 1 && log.contains(cure) && log.contains("tenure member replace n1"), "{code}: {log}");
    assert_eq!(ok(&endpoint, &["kv", "get", "k"]), "v\n");
}

/// A member that is alone answers what it last knew, if asked for that, and says how old it may be.
#[test]
fn a_stale_read_tells_its_age() {
    let (mut members, _) = three();
    let mut alone = members.pop().unwrap();
    ok(alone.address(), &["kv", "put", "k", "1"]);
    assert_eq!(ok(alone.address(), &["kv", "get", "k"]), "1\n");
    let fresh = json(alone.address(), &["kv", "get", "k"]);
    assert!(fresh.get("stale_ms").is_none(), "what is not stale has no age: {fresh}");
    let age = || {
        let told = json(alone.address(), &["kv", "get", "k", "--stale"]);
        assert_eq!(
            (told["records"][0]["value"].as_str(), &told["revision"]),
            (Some("1"), &fresh["revision"]),
            "{told}"
        );
        told["stale_ms"].as_str().unwrap().parse::<u64>().unwrap()
    };
    assert!(age() < 5_000, "the leader was heard a moment ago");
    members.iter_mut().for_each(|member| member.server.kill());
    let killed = std::time::Instant::now();
    wait_for("the majority to be missed", LIMIT, || tenure(alone.address(), &["kv", "get", "k"]).code == 69);
    // The age is an upper bound: it grows at least as the clock does since nobody answers any more. What they had sent may
    // have been read a moment after they ended.
    let asked = u64::try_from(killed.elapsed().as_millis()).unwrap();
    let (first, second) = (age(), age());
    assert!(first + 500 >= asked && second >= first, "{first} and {second} ms, {asked} ms after the others ended");
    let said = tenure(alone.address(), &["kv", "get", "k", "--stale"]);
    assert_eq!((said.code, said.out.as_str()), (0, "1\n"), "{}", said.err);
    // For people it stands beside the answer, where no program reads it.
    let revision = fresh["revision"].as_str().unwrap();
    let shown =
        said.err.strip_prefix(&format!("revision {revision}, at most ")).unwrap_or_else(|| panic!("{}", said.err));
    let shown: u64 = shown.strip_suffix(" ms old\n").unwrap().parse().unwrap();
    assert!(shown >= second, "{shown}, {second}");
    // One that starts alone cannot know how old its state is, nor perhaps that its newest entry was committed.
    alone.server.kill();
    alone.begin_again(&[]);
    wait_for("a stale answer", LIMIT, || {
        tenure(alone.address(), &["kv", "get", "k", "--stale"]).err.contains(", of unknown age\n")
    });
}
