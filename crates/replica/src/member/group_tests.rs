use super::tests::{acquire, config, key, put, session};
use super::*;
use crate::config::Join;
use crate::disk::MemoryDisk;
use crate::job::run_job;
use crate::peer::PeerRefusal;
use tenure_machine::{CounterAdd, CounterOp, MemberRole, OpReply, Reply};

/// One member with its folder and its worker.
struct Node {
    id: MemberId,
    config: Config,
    disk: MemoryDisk,
    member: Option<Member<MemoryDisk>>,
    jobs: VecDeque<Job>,
    restored: u32,
    fault: Option<String>,
}

/// Members that talk to each other in one thread. All connections stand unless an end is cut or down.
struct Group {
    nodes: Vec<Node>,
    cut: BTreeSet<u64>,
    now: u64,
    boot: u64,
    refusals: Vec<(MemberId, PeerRefusal)>,
    answers: BTreeMap<Ticket, Answer>,
}

impl Group {
    fn new(size: u64) -> Self {
        Self::with(size, |_| {})
    }

    fn with(size: u64, change: impl Fn(&mut Config)) -> Self {
        let peers: Vec<_> = (1..=size).map(|i| (MemberId(i), format!("n{i}"), format!("host{i}:1"))).collect();
        let mut group = Self {
            nodes: Vec::new(),
            cut: BTreeSet::new(),
            now: 0,
            boot: 100,
            refusals: Vec::new(),
            answers: BTreeMap::new(),
        };
        for i in 1..=size {
            let mut config = Config {
                member: MemberId(i),
                name: format!("n{i}"),
                peers: peers.clone(),
                random: [i as u8; 32],
                ..config(i)
            };
            change(&mut config);
            group.add(config);
        }
        group
    }

    fn add(&mut self, config: Config) {
        let id = config.member;
        self.nodes.push(Node {
            id,
            config,
            disk: MemoryDisk::new(),
            member: None,
            jobs: VecDeque::new(),
            restored: 0,
            fault: None,
        });
        self.start(id.0);
    }

    fn at(&self, id: u64) -> usize {
        self.nodes.iter().position(|n| n.id.0 == id).unwrap()
    }

    fn start(&mut self, id: u64) {
        let (now, at) = (self.now, self.at(id));
        self.boot += 1;
        let node = &mut self.nodes[at];
        node.config.boot = self.boot;
        node.member = Some(Member::open(node.disk.clone(), node.config.clone(), Millis(now)).unwrap());
        node.jobs.clear();
        node.fault = None;
    }

    /// As kill -9 and the machine's power: what is not synced is gone, and the others see the connection close.
    fn crash(&mut self, id: u64) {
        let at = self.at(id);
        let boot = self.nodes[at].config.boot;
        self.nodes[at].member = None;
        self.nodes[at].disk.crash();
        self.closed(id, boot);
    }

    fn closed(&mut self, id: u64, boot: u64) {
        for node in &mut self.nodes {
            if let Some(member) = &mut node.member {
                member.hung_up(MemberId(id), boot);
            }
        }
    }

    fn member(&mut self, id: u64) -> &mut Member<MemoryDisk> {
        let at = self.at(id);
        self.nodes[at].member.as_mut().unwrap()
    }

    fn connect(&mut self) {
        for a in 0..self.nodes.len() {
            for b in 0..self.nodes.len() {
                let (from, to) = (self.nodes[a].id, self.nodes[b].id);
                if a == b || self.cut.contains(&from.0) || self.cut.contains(&to.0) || self.nodes[b].member.is_none() {
                    continue;
                }
                let Some(dialler) = &self.nodes[a].member else { continue };
                let known = self.nodes[b]
                    .member
                    .as_ref()
                    .is_some_and(|m| m.links.get(&from).is_some_and(|l| l.boot == self.nodes[a].config.boot));
                if known || !dialler.peers().iter().any(|(id, ..)| *id == to) {
                    continue;
                }
                let hello = dialler.hello(0);
                match self.nodes[b].member.as_mut().unwrap().greet(&hello, 0) {
                    Ok(()) => {
                        let back = self.nodes[b].member.as_ref().unwrap().hello(0);
                        let _ = self.nodes[a].member.as_mut().unwrap().greet(&back, 0);
                    }
                    Err(refusal) => {
                        self.nodes[a].member.as_mut().unwrap().turned_away(to, &refusal);
                        self.refusals.push((from, refusal));
                    }
                }
            }
        }
    }

    /// Ten milliseconds, with what everybody says in them.
    fn step(&mut self) {
        self.now += 10;
        self.connect();
        for _ in 0..4 {
            let mut mail = Vec::new();
            for node in &mut self.nodes {
                let Some(member) = &mut node.member else { continue };
                let mut out = Effects::default();
                let id = node.id;
                let polled = member.poll(Millis(self.now), &mut out, &mut |to, _, bytes| mail.push((id, to, bytes)));
                if let Err(fault) = polled {
                    node.fault = Some(fault.to_string());
                    node.member = None;
                    continue;
                }
                self.answers.extend(out.answers);
                node.restored += u32::from(out.restored);
                node.jobs.extend(out.jobs);
                while let Some(job) = node.jobs.pop_front() {
                    let done = run_job(&mut node.disk, job);
                    member.job_done(done);
                }
            }
            for (from, to, bytes) in mail {
                let is_cut = self.cut.contains(&from.0) || self.cut.contains(&to.0);
                let Some(node) = self.nodes.iter_mut().find(|n| n.id == to).filter(|_| !is_cut) else { continue };
                if let Some(member) = &mut node.member {
                    member.receive(from, &bytes);
                }
            }
        }
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms / 10 {
            self.step();
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..2_000 {
            if done(self) {
                return;
            }
            self.step();
        }
        for node in &self.nodes {
            let said = node.member.as_ref().map(|m| (m.status(), m.raft.store().conf_state.clone()));
            eprintln!("{} {:?} {said:?}", node.id, node.fault);
        }
        panic!("never: {what}");
    }

    fn leader(&mut self) -> u64 {
        for _ in 0..1_000 {
            let cut = &self.cut;
            let leads = |n: &&Node| !cut.contains(&n.id.0) && n.member.as_ref().is_some_and(|m| m.is_leader());
            if let Some(node) = self.nodes.iter().find(leads) {
                return node.id.0;
            }
            self.step();
        }
        panic!("no leader");
    }

    fn others(&self, id: u64) -> Vec<u64> {
        self.nodes.iter().map(|n| n.id.0).filter(|other| *other != id).collect()
    }

    fn answer(&mut self, ticket: Ticket) -> Answer {
        for _ in 0..1_000 {
            if let Some(answer) = self.answers.remove(&ticket) {
                return answer;
            }
            self.step();
        }
        panic!("no answer")
    }

    fn run(&mut self, at: u64, txn: Txn) -> Answer {
        let ticket = self.member(at).submit(txn).unwrap();
        self.answer(ticket)
    }

    fn done(&mut self, at: u64, txn: Txn) -> Reply {
        match self.run(at, txn) {
            Answer::Done(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    fn value(&mut self, at: u64, name: &str) -> bool {
        let ticket = self.member(at).read().unwrap();
        assert_eq!(self.answer(ticket), Answer::ReadReady);
        self.member(at).machine().get(&key(name)).is_some()
    }

    fn agree(&mut self) {
        self.until("all are equal", |g| {
            let sums: Vec<_> = g
                .nodes
                .iter()
                .filter_map(|n| n.member.as_ref())
                .map(|m| (m.machine().position(), m.machine().checksum(), m.machine().revision()))
                .collect();
            sums.iter().all(|s| *s == sums[0])
        });
    }

    fn is_registered(&mut self, size: usize) -> bool {
        let leader = self.leader();
        self.member(leader).machine().members().filter(|r| r.has_come()).count() == size
    }
}

/// So that a log is let go, and snapshots are needed, soon.
fn small_files(config: &mut Config) {
    config.first_segment_bytes = 64 << 10;
    config.segment_bytes = 64 << 10;
    config.snapshot_log_bytes = 64 << 10;
}

fn join(id: u64, secret: u8, peers: &[u64]) -> Config {
    let peers = peers.iter().map(|i| (MemberId(*i), format!("n{i}"), format!("host{i}:1"))).collect();
    Config {
        member: MemberId(id),
        name: format!("n{id}"),
        peers: vec![(MemberId(id), format!("n{id}"), format!("host{id}:1"))],
        join: Some(Join { cluster: 0, secret: [secret; 16], peers }),
        random: [id as u8; 32],
        ..config(id)
    }
}

fn member_add(id: u64, secret: u8, replaces: Option<u64>) -> Txn {
    Txn::of(Op::MemberAdd {
        id: MemberId(id),
        name: format!("n{id}").into(),
        peer: format!("host{id}:1").into(),
        role: MemberRole::Voter,
        replaces: replaces.map(MemberId),
        join: join_digest(&[secret; 16]),
    })
}

#[test]
fn any_member_takes_requests() {
    let mut group = Group::new(3);
    let first = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    let follower = group.others(first)[0];
    assert!(group.done(follower, put("a", b"1")).result.is_ok());
    assert!(group.value(follower, "a") && group.value(first, "a"));
    // A wait at a follower: granted there when the other lets go.
    group.done(follower, Txn::of(Op::SessionCreate(session(1, 60_000))));
    group.done(follower, Txn::of(Op::SessionCreate(session(2, 60_000))));
    let reply = group.done(follower, acquire(1, Wait::None)).result.unwrap();
    let OpReply::LockGranted(held) = &reply.results[0] else { panic!("{reply:?}") };
    let waits = group.member(follower).submit(acquire(2, Wait::Forever)).unwrap();
    group.pass(8_000);
    assert!(!group.answers.contains_key(&waits), "a wait that is in the log outlasts every patience");
    let release = Op::LockRelease { name: b"l"[..].into(), session: SessionId(1), token: held.token };
    group.done(first, Txn::of(release));
    assert!(matches!(group.answer(waits), Answer::Done(Reply { result: Ok(_), .. })));
    // Renewals at a follower keep a session alive.
    group.done(first, Txn::of(Op::SessionCreate(session(9, 2_000))));
    for _ in 0..10 {
        let ticket = group.member(follower).renew(SessionId(9), 0);
        assert!(matches!(group.answer(ticket), Answer::Renewed(Ok(_))));
        group.pass(500);
    }
    group.pass(3_000);
    let ticket = group.member(follower).renew(SessionId(9), 0);
    assert!(matches!(group.answer(ticket), Answer::Renewed(Err(Rejection::SessionExpired { .. }))));
    group.agree();
}

#[test]
fn without_a_majority_answers_come_within_an_election_timeout() {
    let mut group = Group::new(3);
    let first = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    let follower = group.others(first)[0];
    group.cut = group.others(follower).into_iter().collect();
    group.cut.insert(follower);
    let mut asked = Vec::new();
    for at in [first, follower] {
        let write = group.member(at).submit(put("lost", b"v")).unwrap();
        let read = group.member(at).read().unwrap();
        let renewal = group.member(at).renew(SessionId(1), 0);
        asked.push((at, write, read, renewal));
    }
    group.pass(1_110);
    for (at, write, read, renewal) in asked {
        assert_eq!(group.answers.remove(&write), Some(Answer::Unknown), "it was on its way at {at}");
        assert_eq!(group.answers.remove(&read), Some(Answer::Refused(Refusal::NoQuorum)));
        assert_eq!(group.answers.remove(&renewal), Some(Answer::Refused(Refusal::NoQuorum)));
    }
    group.pass(2_500);
    for at in [first, follower] {
        assert_eq!(group.member(at).submit(put("no", b"v")), Err(Refusal::NoQuorum), "later ones hear it at once");
        assert!(group.member(at).read().is_err());
    }
    group.cut.clear();
    let leader = group.leader();
    assert!(group.done(leader, put("b", b"v")).result.is_ok());
    assert!(!group.value(leader, "no"));
    group.agree();
}

#[test]
fn what_was_forwarded_counts_against_the_limits_until_it_is_applied() {
    let mut group = Group::with(3, |c| c.max_queued_bytes = 1_000_000);
    let leader = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    let follower = group.others(leader)[0];
    group.cut.insert(leader);
    let now = Millis(group.now);
    let mut taken = 0;
    for _ in 0..20 {
        taken += u32::from(group.member(follower).submit(put("k", &[7; 100_000])).is_ok());
        group.member(follower).poll(now, &mut Effects::default(), &mut |_, _, _| {}).unwrap();
    }
    assert_eq!(taken, 9);
    group.cut.clear();
    group.until("they are answered", |g| g.member(follower).status().waiting == 0);
    assert_eq!((group.member(follower).sent_bytes, group.member(follower).queue_bytes), (0, 0));
}

/// What it proposed as the leader of before lies further on in its log than what it proposes now.
#[test]
fn a_leader_that_comes_back_does_not_mistake_its_new_proposals_for_old_ones() {
    let mut group = Group::new(3);
    let first = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    group.done(first, Txn::of(Op::SessionCreate(session(1, 60_000))));
    group.done(first, Txn::of(Op::SessionCreate(session(2, 60_000))));
    group.done(first, acquire(1, Wait::None));
    group.cut.insert(first);
    for i in 0..30 {
        group.member(first).submit(put(&format!("lost{i}"), b"v")).unwrap();
        let now = Millis(group.now);
        group.member(first).poll(now, &mut Effects::default(), &mut |_, _, _| {}).unwrap();
    }
    group.pass(1_500);
    let second = group.leader();
    group.cut.clear();
    group.agree();
    group.member(second).hand_over(Some(MemberId(first))).unwrap();
    group.until("it leads again", |g| g.member(first).is_leader());
    let waits = group.member(first).submit(acquire(2, Wait::Forever)).unwrap();
    for i in 0..40 {
        group.done(first, put(&format!("k{i}"), b"v"));
    }
    assert_eq!(group.answers.get(&waits), None, "it waits in the state");
}

/// The leader that it hears has lost its own majority, and goes on to be heard until it notices.
#[test]
fn a_follower_of_a_leader_without_a_majority_is_answered_in_time() {
    let mut group = Group::new(5);
    let first = group.leader();
    group.until("five are registered", |g| g.is_registered(5));
    let others = group.others(first);
    let follower = others[0];
    group.cut = others[1..].iter().copied().collect();
    let read = group.member(follower).read().unwrap();
    let renewal = group.member(follower).renew(SessionId(1), 0);
    group.pass(1_300);
    assert_eq!(group.answers.remove(&read), Some(Answer::Refused(Refusal::NoQuorum)));
    assert_eq!(group.answers.remove(&renewal), Some(Answer::Refused(Refusal::NoQuorum)));
}

#[test]
fn a_killed_leader_is_replaced_at_once_and_a_flapping_link_replaces_nobody() {
    let mut group = Group::new(3);
    let first = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    let term = group.member(first).status().term;
    let follower = group.others(first)[0];
    for _ in 0..20 {
        let boot = group.nodes[group.at(first)].config.boot;
        group.member(follower).hung_up(MemberId(first), boot);
        group.pass(50);
    }
    assert_eq!((group.leader(), group.member(first).status().term), (first, term));

    let began = group.now;
    group.crash(first);
    let second = group.leader();
    assert!(group.now - began <= 150, "{} ms", group.now - began);
    assert!(group.done(second, put("a", b"v")).result.is_ok());
    group.start(first);
    group.agree();
    assert!(group.value(first, "a"));
}

#[test]
fn a_hand_over_loses_nothing() {
    let mut group = Group::new(3);
    let first = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    let mut tickets = Vec::new();
    let to = group.member(first).hand_over(None).unwrap();
    for (i, at) in [1, 2, 3, 1, 2, 3].into_iter().enumerate() {
        tickets.push(group.member(at).submit(put(&format!("k{i}"), b"v")).unwrap());
    }
    let began = group.now;
    for ticket in tickets {
        assert!(matches!(group.answer(ticket), Answer::Done(_)));
    }
    assert!(group.now - began <= 60, "{} ms", group.now - began);
    assert_eq!(group.leader(), to.0);
}

#[test]
fn one_grows_to_three_and_a_dead_one_is_replaced() {
    let mut group = Group::new(1);
    group.leader();
    for i in 0..50 {
        group.done(1, put(&format!("k{i}"), &[7; 1000]));
    }
    for id in [2, 3] {
        group.done(1, member_add(id, id as u8, None));
        group.add(join(id, id as u8, &[1]));
        group.until("it votes", |g| g.member(1).status().voters.contains(&MemberId(id)));
        let at = group.at(id);
        assert_eq!(group.nodes[at].restored, 1, "a member that joins begins with a snapshot");
    }
    group.agree();
    assert!(group.value(3, "k49"));
    group.crash(1);
    let leader = group.leader();
    group.done(leader, put("after", b"v"));

    // The dead one goes in the change in which the new one comes.
    group.done(leader, member_add(4, 4, Some(1)));
    group.add(join(4, 4, &[2, 3]));
    group.until("it is replaced", |g| {
        let leader = g.leader();
        let status = g.member(leader).status();
        status.voters == [MemberId(2), MemberId(3), MemberId(4)] && status.members.len() == 3
    });
    assert!(group.value(4, "after"));
    // What was removed is told so, and why.
    group.start(1);
    group.pass(500);
    let at = group.at(1);
    let fault = group.nodes[at].fault.clone().unwrap();
    assert!(fault.contains("was removed from the cluster"), "{fault}");
    // A wrong secret is no way in.
    group.done(leader, member_add(5, 5, None));
    group.add(join(5, 99, &[2, 3, 4]));
    group.pass(500);
    let at = group.at(5);
    assert!(group.nodes[at].fault.clone().unwrap().contains("join token"));
}

#[test]
fn a_lagging_member_gets_a_snapshot_while_writes_go_on() {
    let mut group = Group::with(3, small_files);
    let leader = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    let late = group.others(leader)[0];
    group.crash(late);
    for i in 0..400 {
        group.done(leader, put(&format!("k{}", i % 40), &[i as u8; 4000]));
    }
    let first = group.member(leader).status().first_index;
    assert!(first > 100, "its log begins at {first}");
    group.start(late);
    for i in 0..100 {
        group.done(leader, put(&format!("k{}", i % 40), &[i as u8; 4000]));
    }
    group.agree();
    let at = group.at(late);
    assert!(group.nodes[at].restored >= 1);
    // And it is there after a crash.
    group.crash(late);
    group.start(late);
    group.agree();
}

#[test]
fn a_crash_at_every_step_of_taking_a_snapshot_leaves_a_member_that_starts() {
    for crash_at in 0..60 {
        let mut group = Group::with(3, small_files);
        let leader = group.leader();
        group.until("three are registered", |g| g.is_registered(3));
        let late = group.others(leader)[0];
        group.crash(late);
        for i in 0..150 {
            group.done(leader, put(&format!("k{}", i % 20), &[i as u8; 4000]));
        }
        group.start(late);
        let at = group.at(late);
        for step in 0..20 {
            if step == crash_at / 3 {
                // Before, between and after jobs of one round.
                let disk = group.nodes[at].disk.copy();
                let boot = group.nodes[at].config.boot;
                group.nodes[at].member = None;
                disk.crash();
                group.nodes[at].disk = disk;
                group.closed(late, boot);
                group.start(late);
            }
            group.step();
        }
        group.agree();
    }
}

#[test]
fn a_folder_that_is_not_the_registered_one_is_refused() {
    let mut group = Group::new(3);
    let leader = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    let victim = group.others(leader)[0];
    let at = group.at(victim);
    let old_copy = group.nodes[at].disk.copy();
    for i in 0..20 {
        group.done(leader, put(&format!("k{i}"), b"v"));
    }
    group.pass(500);
    // Put back: the copy is of this life, and shorter than what was acknowledged since.
    group.crash(victim);
    let newest = std::mem::replace(&mut group.nodes[at].disk, old_copy);
    group.start(victim);
    group.pass(500);
    let fault = group.nodes[at].fault.clone().unwrap();
    assert!(fault.contains("a copy was put back") && fault.contains("tenure member replace n"), "{fault}");
    // Wiped.
    group.nodes[at].disk = MemoryDisk::new();
    group.nodes[at].config.random = [77; 32];
    group.start(victim);
    group.pass(500);
    let fault = group.nodes[at].fault.clone().unwrap();
    assert!(fault.contains("wiped or swapped"), "{fault}");
    // The right one is welcome.
    group.nodes[at].disk = newest;
    group.start(victim);
    group.agree();
    assert!(group.nodes[at].fault.is_none());
}

#[test]
fn a_deposed_leader_neither_renews_nor_expires() {
    let mut group = Group::new(3);
    let first = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    group.done(first, Txn::of(Op::SessionCreate(session(5, 3_000))));
    group.cut.insert(first);
    let at_deposed = group.member(first).renew(SessionId(5), 0);
    group.pass(3_000);
    assert_eq!(group.answers.remove(&at_deposed), Some(Answer::Refused(Refusal::NoQuorum)));
    let second = group.leader();
    for _ in 0..8 {
        let ticket = group.member(second).renew(SessionId(5), 0);
        assert!(matches!(group.answer(ticket), Answer::Renewed(Ok(_))));
        group.pass(1_000);
    }
    group.cut.clear();
    let ticket = group.member(second).renew(SessionId(5), 0);
    assert!(matches!(group.answer(ticket), Answer::Renewed(Ok(_))));
    group.agree();
    assert!(
        group.member(first).machine().session(SessionId(5)).is_some(),
        "nobody ended it: it was renewed all the time"
    );
}

#[test]
fn the_oldest_release_decides_what_is_followed() {
    let mut group = Group::with(3, |c| c.behaviour = if c.member.0 == 3 { 1 } else { tenure_machine::BEHAVIOUR });
    let leader = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    group.pass(3_000);
    assert_eq!(group.member(leader).machine().behaviour(), 1);
    // What the older release could not read is not even proposed: it would stop at the entry.
    let add = CounterAdd { name: b"c"[..].into(), delta: 1, min: None, max: None };
    let native = Txn::of(CounterOp::Add(add).into());
    assert_eq!(group.member(leader).submit(native), Err(Refusal::NotYet { behaviour: 3 }));
    group.crash(3);
    let at = group.at(3);
    group.nodes[at].config.behaviour = tenure_machine::BEHAVIOUR;
    group.start(3);
    group.until("it is raised", |g| {
        let leader = g.leader();
        g.member(leader).machine().behaviour() == tenure_machine::BEHAVIOUR
    });
    group.done(leader, put("a", b"v"));
    group.agree();
}

#[test]
fn a_slow_member_is_caught_up_from_the_files() {
    let mut group = Group::new(3);
    let leader = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    let slow = group.others(leader)[0];
    group.cut.insert(slow);
    for i in 0..24 {
        group.done(leader, put("big", &vec![i; 1 << 20]));
    }
    group.cut.clear();
    group.agree();
}

#[test]
fn a_member_whose_word_is_needed_to_register_it_is_counted() {
    let mut group = Group::new(3);
    group.crash(3);
    group.until("two are registered", |g| g.is_registered(2));
    let leader = group.leader();
    // The other one is lost for good before the third has ever come.
    let other = group.others(leader).into_iter().find(|id| *id != 3).unwrap();
    group.crash(other);
    group.start(3);
    group.until("the third is registered", |g| g.is_registered(3));
    let leader = group.leader();
    assert!(group.done(leader, put("a", b"v")).result.is_ok());
}

#[test]
fn a_leader_that_was_added_meanwhile_is_let_in() {
    let mut group = Group::new(3);
    let first = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    let late = group.others(first)[0];
    group.crash(late);
    group.done(first, member_add(4, 4, None));
    group.add(join(4, 4, &[1, 2, 3]));
    group.until("it votes", |g| g.member(first).status().voters.contains(&MemberId(4)));
    assert_eq!(group.member(first).hand_over(Some(MemberId(4))), Ok(MemberId(4)));
    group.until("it leads", |g| g.member(4).is_leader());
    group.start(late);
    group.agree();
    assert!(group.member(late).machine().member(MemberId(4)).is_some());
}

#[test]
fn a_folder_put_back_by_one_start_is_refused() {
    let mut group = Group::new(3);
    group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    group.crash(3);
    let at = group.at(3);
    let old_copy = group.nodes[at].disk.copy();
    group.start(3);
    let hello = group.member(3).hello(0);
    group.until("this start is registered everywhere", |g| {
        (1..=3).all(|id| g.member(id).machine().member(MemberId(3)).is_some_and(|r| r.boots == hello.boots))
    });
    // All at once, so that nobody notes how far its log went.
    for id in [1, 2, 3] {
        group.crash(id);
    }
    group.nodes[at].disk = old_copy;
    for id in [1, 2, 3] {
        group.start(id);
    }
    // Whatever starts it again and again makes it no newer.
    for _ in 0..4 {
        group.pass(500);
        let fault = group.nodes[at].fault.take().unwrap();
        assert!(fault.contains("a copy was put back"), "{fault}");
        group.crash(3);
        group.start(3);
    }
}

#[test]
fn what_was_committed_when_an_entry_came_is_on_disk_with_it() {
    let mut group = Group::new(3);
    let leader = group.leader();
    group.until("three are registered", |g| g.is_registered(3));
    group.agree();
    let follower = group.others(leader)[0];
    let status = group.member(follower).status();
    let entry = |index| Entry { index, term: status.term, ..Entry::default() };
    let mut message = Message { from: leader, to: follower, term: status.term, ..Message::default() };
    message.set_msg_type(MessageType::MsgAppend);
    (message.index, message.log_term) = (status.last_index, status.term);
    message.entries = vec![entry(status.last_index + 1), entry(status.last_index + 2)];
    message.commit = status.last_index + 1;
    let bytes = message.write_to_bytes().unwrap();
    let now = Millis(group.now);
    let member = group.member(follower);
    member.receive(MemberId(leader), &PeerMessage::Raft(&bytes).encode());
    member.poll(now, &mut Effects::default(), &mut |_, _, _| {}).unwrap();
    group.crash(follower);
    group.start(follower);
    assert_eq!(group.member(follower).status().committed, status.last_index + 1);
}

#[test]
fn a_stale_read_is_never_older_than_it_says() {
    for leads in [false, true] {
        let mut group = Group::new(3);
        let first = group.leader();
        group.until("three are registered", |g| g.is_registered(3));
        let alone = if leads { first } else { group.others(first)[0] };
        group.pass(5_000);
        let contact = |g: &mut Group| g.member(alone).contact_at().unwrap().0;
        assert!(contact(&mut group) + 200 >= group.now, "in contact all the while");

        let lost = group.now;
        for other in group.others(alone) {
            group.crash(other);
        }
        // It gives its leader up, or its own lead, and asks for votes: none of it is news of the others.
        group.pass(3_000);
        assert!(contact(&mut group) <= lost, "{} of {lost}, leads: {leads}", contact(&mut group));
        assert!(contact(&mut group) + 200 >= lost, "nor is it much older");

        // A process that stood still was in contact with nobody meanwhile, though that time counts for nothing else.
        group.now += 60_000;
        group.pass(100);
        assert!(contact(&mut group) <= lost);

        // After a start nothing is known, until another is heard.
        group.crash(alone);
        group.start(alone);
        group.pass(2_000);
        assert_eq!(group.member(alone).contact_at(), None);
        let other = group.others(alone)[0];
        group.start(other);
        group.leader();
        group.pass(500);
        assert!(contact(&mut group) + 200 >= group.now);
    }
}
