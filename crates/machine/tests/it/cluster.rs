//! What concerns several members or several clusters: the size of the table, mixed releases, comparisons, restores.

use crate::script::{load, snapshot};
use std::collections::BTreeSet;
use tenure_machine::*;

struct Log {
    machine: Machine,
    stamp: u64,
}

impl Log {
    fn new() -> Self {
        Self { machine: Machine::new(), stamp: 0 }
    }

    fn try_apply(&mut self, op: Op) -> Result<Result<TxnReply, Rejection>, Fault> {
        Ok(self.entry(self.machine.behaviour(), vec![Txn::of(op)])?.pop().unwrap().1.result)
    }

    fn entry(&mut self, behaviour: u16, txns: Vec<Txn>) -> Result<Vec<(Ticket, Reply)>, Fault> {
        self.stamp += 1;
        let Position { index, term } = self.machine.position();
        let batch = Batch { behaviour, stamp: LogTime(self.stamp), origin: Origin::default(), txns };
        let mut out = Applied::default();
        self.machine.apply(Position { index: Index(index.0 + 1), term }, batch, &mut out)?;
        Ok(out.replies)
    }

    fn apply(&mut self, op: Op) -> TxnReply {
        self.try_apply(op).unwrap().unwrap()
    }

    fn reloaded(&mut self) -> Self {
        Self { machine: load(&snapshot(&mut self.machine, 500)), stamp: self.stamp }
    }
}

fn add(id: u64, role: MemberRole) -> Op {
    let (name, peer) = (format!("n{id}").into(), format!("h{id}:1").into());
    Op::MemberAdd { id: MemberId(id), name, peer, role, replaces: None, join: [0; 32] }
}

fn register(id: u64, behaviour: u16) -> Op {
    Op::MemberRegister {
        id: MemberId(id),
        storage: [id as u8; 16],
        boots: 1,
        peer: "".into(),
        clients: vec!["http://h:2".into()],
        behaviour,
        release: "r".into(),
    }
}

fn put(value: usize) -> Op {
    let key = Key::new(Space::Keys, NamespaceId::DEFAULT, b"a");
    let value = vec![0; value].into();
    Op::Put(Put { key, value, session: SessionId(0), prev: false, keep_value: false, keep_session: false })
}

fn acquire(name: &str, session: u64) -> Op {
    let create = SessionCreate {
        id: SessionId(session),
        face: SessionFace::Native,
        ttl_ms: 1000,
        on_expire: OnExpire::Delete,
        name: "".into(),
        metadata: Vec::new(),
        alias: None,
        secret: None,
    };
    Op::LockAcquire(LockAcquire {
        name: name.as_bytes().into(),
        session: SessionId(0),
        create: Some(create),
        owner: Box::default(),
        mode: LockMode::Exclusive,
        wait: Wait::None,
    })
}

/// Live members are limited, removed ones are not; all are accounted for.
#[test]
fn live_members_are_limited() {
    let mut log = Log::new();
    let empty = log.machine.memory().used;
    log.apply(add(1, MemberRole::Voter));
    for id in 2..=MEMBERS_MAX {
        log.apply(add(id, MemberRole::Learner));
    }
    let refused = log.try_apply(add(100, MemberRole::Learner)).unwrap();
    assert_eq!(refused, Err(Rejection::Quota { what: "members", limit: MEMBERS_MAX }));
    for id in 100..200 {
        log.apply(Op::MemberRemove { id: MemberId(if id == 100 { 2 } else { id - 1 }) });
        log.apply(add(id, MemberRole::Learner));
    }
    assert_eq!(log.machine.members().count(), MEMBERS_MAX as usize + 100);
    assert!(log.machine.memory().used > empty + 100 * 200);
    assert_eq!(log.reloaded().machine.memory(), log.machine.memory());
}

/// What each should be, given who votes: the replaced one goes when the other votes and not before.
#[test]
fn the_replaced_one_is_wanted_until_the_other_votes() {
    let mut log = Log::new();
    log.apply(add(1, MemberRole::Voter));
    log.apply(add(2, MemberRole::Voter));
    log.apply(add(3, MemberRole::Learner));
    let (name, peer) = ("n4".into(), "h4:1".into());
    let (role, replaces) = (MemberRole::Voter, Some(MemberId(2)));
    log.apply(Op::MemberAdd { id: MemberId(4), name, peer, role, replaces, join: [0; 32] });
    let check = |log: &Log, voters: &[u64], expected: [MemberRole; 5]| {
        let votes = |id: MemberId| voters.contains(&id.0);
        assert_eq!([1, 2, 3, 4, 5].map(|id| log.machine.member_wanted(MemberId(id), votes)), expected);
    };
    use MemberRole::*;
    check(&log, &[1, 2], [Voter, Voter, Learner, Voter, Removed]);
    check(&log, &[1, 4], [Voter, Removed, Learner, Voter, Removed]);
    // Given up: the one that was to be replaced stays.
    log.apply(Op::MemberRemove { id: MemberId(4) });
    check(&log, &[1, 2], [Voter, Voter, Learner, Removed, Removed]);
    check(&log, &[1, 2, 4], [Voter, Voter, Learner, Removed, Removed]);
}

/// An older release in the cluster: it is not outrun while it is in the table, and stops when the rules have changed without it.
#[test]
fn an_older_release_is_waited_for() {
    let ops = || {
        let members = [add(1, MemberRole::Voter), add(2, MemberRole::Voter), register(1, 2), register(2, 1)];
        members.into_iter().chain([Op::RaiseBehaviour { to: 2 }])
    };
    let (mut new, mut old) = (Log::new(), Log::new());
    old.machine.know_only(1);
    for op in ops() {
        assert_eq!(new.try_apply(op.clone()), old.try_apply(op));
    }
    assert_eq!((new.machine.behaviour(), new.machine.checksum()), (1, old.machine.checksum()));
    // Removed, it holds nobody up; if the entry reaches it nevertheless it stops there.
    for log in [&mut new, &mut old] {
        log.apply(Op::MemberRemove { id: MemberId(2) });
    }
    new.apply(Op::RaiseBehaviour { to: 2 });
    let fault = old.try_apply(Op::RaiseBehaviour { to: 2 }).unwrap_err();
    assert!(matches!(fault, Fault::UnknownBehaviour { behaviour: 2, known: 1, .. }), "{fault}");
    // It does not go on from a state that follows them either, whatever its proposer knew of it.
    let mut loaded = new.reloaded();
    loaded.machine.know_only(1);
    let fault = loaded.entry(1, vec![Txn::of(put(1))]).unwrap_err();
    assert!(matches!(fault, Fault::UnknownBehaviour { behaviour: 2, known: 1, .. }), "{fault}");
}

/// A comparison is due after a thousand entries or a minute with changes, and finds a member that went another way.
#[test]
fn comparisons_are_due_from_time_to_time() {
    let (mut leader, mut other) = (Log::new(), Log::new());
    for op in std::iter::repeat_with(|| put(1)).take(1_500) {
        leader.apply(op.clone());
        other.apply(op);
    }
    assert_eq!(leader.machine.checksum_due(), None, "the first behaviour version has none");
    for log in [&mut leader, &mut other] {
        log.apply(Op::RaiseBehaviour { to: 2 });
    }
    let due = leader.machine.checksum_due().unwrap();
    // Other entries come between the proposal and its turn.
    for log in [&mut leader, &mut other] {
        log.apply(put(2));
        log.apply(due.clone());
        assert_eq!(log.machine.checksum_due(), None);
    }
    leader.stamp += 60_000;
    leader.apply(Op::SetLimit { limit: Limit::LockWaiters, value: 7 });
    assert_eq!(leader.machine.checksum_due(), None, "nothing has changed");
    let at = leader.machine.position().index;
    leader.apply(put(3));
    other.stamp += 60_000;
    other.apply(Op::SetLimit { limit: Limit::LockWaiters, value: 7 });
    other.apply(put(4));
    let due = leader.machine.checksum_due().unwrap();
    leader.apply(due.clone());
    let fault = other.try_apply(due).unwrap_err();
    assert!(matches!(fault, Fault::ChecksumDiffers { index, .. } if index.0 == at.0 + 1), "{fault}");
}

/// One backup restored twice, at the revisions of two moments: no token of one is a token of the other, or of the cluster that
/// went on after the backup. Tokens of etcd leases, which are log indexes, included.
#[test]
fn one_backup_restored_twice_gives_no_token_twice() {
    let mut old = Log::new();
    old.apply(Op::Genesis { cluster: 4, issuer: [7; 16] });
    old.apply(acquire("before", 1));
    old.apply(put(1));
    let backup = snapshot(&mut old.machine, 500);
    let after_restore = |revision: Option<u64>, identity| {
        let mut log = Log { machine: load(&backup), stamp: old.stamp };
        if let Some(revision) = revision {
            log.machine.restore(Revision(revision), identity).unwrap();
            // What the new folder begins with.
            log = log.reloaded();
        }
        log
    };
    let day = 86_400 << 20;
    let mut clusters = [
        after_restore(None, None),
        after_restore(Some(day), None),
        after_restore(Some(day + (1 << 20)), None),
        after_restore(Some(day + (2 << 20)), Some((5, [8; 16]))),
    ];
    let mut tokens = BTreeSet::new();
    for log in &mut clusters {
        assert!(log.machine.lock(NamespaceId::DEFAULT, b"before").is_some());
        for n in 0..200u64 {
            let reply = log.apply(acquire(&format!("l{n}"), 1_000 + n));
            let [OpReply::LockGranted(grant)] = &reply.results[..] else { panic!("{reply:?}") };
            // The lock and the session that the commit made for it share its revision.
            assert_eq!(grant.session_token, grant.token.0);
            assert!(tokens.insert(grant.token.0), "token {} was given before", grant.token);
            let create = SessionCreate {
                id: SessionId(5_000 + n),
                face: SessionFace::Etcd,
                ttl_ms: 1000,
                on_expire: OnExpire::Delete,
                name: "".into(),
                metadata: Vec::new(),
                alias: None,
                secret: None,
            };
            let reply = log.apply(Op::SessionCreate(create));
            assert!(matches!(&reply.results[..], [OpReply::SessionCreated { .. }]));
        }
    }
    let leases = clusters.iter().flat_map(|log| log.machine.sessions(SessionId(4_999), 1_000));
    let leases: Vec<_> = leases.map(|s| s.token).collect();
    assert_eq!(leases.len(), 800);
    assert_eq!(leases.iter().collect::<BTreeSet<_>>().len(), 800, "no two incarnations have one token");
    let identities = clusters.map(|log| (log.machine.cluster(), log.machine.issuer()[0]));
    assert_eq!(identities, [(4, 7), (4, 7), (4, 7), (5, 8)]);
}

/// What is over is not told, though its turn to be dropped has not come.
#[test]
fn an_answer_that_is_over_is_not_told() {
    let mut log = Log::new();
    let txn = |n: u16| {
        let mut id = [0; 16];
        id[..2].copy_from_slice(&n.to_le_bytes());
        Txn { request: Some(RequestId::Uuid(id)), ..Txn::of(put(1)) }
    };
    let told = |log: &Log| {
        let told = (0..600).filter(|n| {
            let txn = txn(*n);
            log.machine.remembered(&txn.principal, &txn.request.unwrap(), txn.digest()).is_some()
        });
        told.count()
    };
    log.entry(1, (0..600).map(txn).collect()).unwrap();
    assert_eq!(told(&log), 600);
    log.stamp += 600_000 - 2;
    log.entry(1, Vec::new()).unwrap();
    assert_eq!(told(&log), 600);
    log.entry(1, Vec::new()).unwrap();
    assert_eq!(told(&log), 0);
    assert!(log.machine.counts().requests > 0, "some wait for their turn");
}

/// A refused restore changes nothing, and a restored state counts on from where it was told.
#[test]
fn a_refused_restore_changes_nothing() {
    let mut log = Log::new();
    log.apply(Op::Genesis { cluster: 4, issuer: [7; 16] });
    for _ in 0..5 {
        log.apply(put(1));
    }
    let before = snapshot(&mut log.machine, 500);
    for (revision, identity) in [(6, None), (1 << 53, None), (100, Some((4, [8; 16]))), (100, Some((0, [8; 16])))] {
        assert!(log.machine.restore(Revision(revision), identity).is_err());
        assert_eq!(snapshot(&mut log.machine, 500), before);
    }
    let at = log.machine.restore(Revision(7), None).unwrap();
    assert_eq!((at, at.index), (log.machine.position(), Index(7)));
    log.apply(put(1));
    assert_eq!(log.machine.revision(), Revision(8));
}
