//! The bytes of every encoding, kept in `golden.txt`. A line there never changes: it is what old logs and snapshots are made of.
//! `UPDATE=1` adds lines for what is new and refuses to change one.

use crate::script::{load, snapshot};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use tenure_machine::*;

fn key(name: &str) -> Key {
    Key::new(Space::Keys, NamespaceId::DEFAULT, name.as_bytes())
}

fn session(face: SessionFace) -> SessionCreate {
    SessionCreate {
        id: SessionId(300),
        face,
        ttl_ms: 15_000,
        on_expire: if face == SessionFace::Etcd { OnExpire::Delete } else { OnExpire::Release },
        name: "w".into(),
        metadata: vec![("host".into(), "h1".into())],
        alias: Some([1; 16]),
        secret: Some([2; 16]),
    }
}

fn put(value: &str) -> Put {
    let (key, value) = (key("k"), value.as_bytes().into());
    Put { key, value, session: SessionId(7), prev: true, keep_value: false, keep_session: true }
}

fn compare(relation: Relation, target: CompareTarget) -> Compare {
    Compare { span: Span { start: key("a"), end: Some(key("b")) }, relation, target }
}

fn ops() -> Vec<(&'static str, Op)> {
    let range = Range {
        limit: 3,
        revision: -1,
        order: Order::Descending,
        sort_by: SortBy::ModRevision,
        keys_only: true,
        count_only: false,
        min_mod_revision: 1,
        max_mod_revision: 2,
        min_create_revision: 3,
        max_create_revision: 4,
        ..Range::of(Span { start: key("a"), end: Some(key("z")) })
    };
    let nested = SubTxn {
        compares: vec![
            compare(Relation::Equal, CompareTarget::Version(-1)),
            compare(Relation::Greater, CompareTarget::CreateRevision(300)),
            compare(Relation::Less, CompareTarget::ModRevision(i64::MAX)),
            compare(Relation::NotEqual, CompareTarget::Value(Box::from(*b"v"))),
            compare(Relation::Equal, CompareTarget::Lease(i64::MIN)),
        ],
        then: vec![Op::Compact { revision: 9 }],
        otherwise: vec![Op::Put(put(""))],
    };
    let acquire = LockAcquire {
        name: Box::from(*b"l"),
        session: SessionId(7),
        create: None,
        owner: Box::from(*b"o"),
        mode: LockMode::Exclusive,
        wait: Wait::None,
    };
    let create = Some(session(SessionFace::Native));
    let with_session = LockAcquire { session: SessionId(0), create, wait: Wait::Ms(500), ..acquire.clone() };
    let request = Some(RequestId::Session { session: SessionId(7), seq: 2, acked_below: 1 });
    vec![
        ("put", Op::Put(put("v"))),
        ("delete", Op::Delete(Delete { span: Span::one(key("k")), prev: true })),
        ("range", Op::Range(range)),
        ("txn", Op::Txn(Box::new(nested))),
        ("compact", Op::Compact { revision: 5 }),
        ("session create, etcd", Op::SessionCreate(session(SessionFace::Etcd))),
        ("session create, native", Op::SessionCreate(session(SessionFace::Native))),
        ("session end", Op::SessionEnd { session: SessionId(7), token: Some(4) }),
        ("session expire", Op::SessionExpire { session: SessionId(7), token: 4, term: Term(3) }),
        ("session checkpoint", Op::SessionCheckpoint { session: SessionId(7), token: 4, remaining_ms: Some(200) }),
        ("lock acquire", Op::LockAcquire(acquire.clone())),
        ("lock acquire, forever", Op::LockAcquire(LockAcquire { wait: Wait::Forever, ..acquire })),
        ("lock acquire, with session", Op::LockAcquire(with_session)),
        ("lock release", Op::LockRelease { name: Box::from(*b"l"), session: SessionId(7), token: Revision(4) }),
        ("lock cancel", Op::LockCancel { name: Box::from(*b"l"), session: SessionId(7), request }),
        ("genesis", Op::Genesis { cluster: 42, issuer: [3; 16] }),
        ("raise behaviour", Op::RaiseBehaviour { to: 1 }),
        ("set limit txn ops", Op::SetLimit { limit: Limit::TxnOps, value: 1 }),
        ("set limit lock waiters", Op::SetLimit { limit: Limit::LockWaiters, value: 1 }),
        ("set limit session things", Op::SetLimit { limit: Limit::SessionThings, value: 1 }),
        ("set limit session requests", Op::SetLimit { limit: Limit::SessionRequests, value: 1 }),
        ("set limit one-shot requests", Op::SetLimit { limit: Limit::OneShotRequests, value: 1 }),
        ("set limit ring changes", Op::SetLimit { limit: Limit::RingChanges, value: 1 }),
        ("checksum", Op::Checksum { at: Index(9), sum: 0x0102_0304_0506_0708 }),
        ("member add, learner", member_add(2, MemberRole::Learner, None)),
        ("member add, voter that replaces", member_add(3, MemberRole::Voter, Some(MemberId(2)))),
        ("member promote", Op::MemberPromote { id: MemberId(300) }),
        ("member remove", Op::MemberRemove { id: MemberId(300) }),
        ("member update", Op::MemberUpdate { id: MemberId(300), peer: "h9:1".into() }),
        ("member register", member_register(1)),
        ("member seen", Op::MemberSeen { id: MemberId(300), index: Index(301) }),
    ]
}

fn member_add(id: u64, role: MemberRole, replaces: Option<MemberId>) -> Op {
    let (name, peer) = (format!("n{id}").into(), format!("h{id}:1").into());
    Op::MemberAdd { id: MemberId(id), name, peer, role, replaces, join: [4; 32] }
}

fn member_register(id: u64) -> Op {
    Op::MemberRegister {
        id: MemberId(id),
        storage: [5; 16],
        boots: 3,
        peer: "h8:1".into(),
        clients: vec!["http://h8:2".into(), "http://h8:3".into()],
        behaviour: 2,
        release: "0.1".into(),
    }
}

fn member() -> MemberRecord {
    MemberRecord {
        id: MemberId(300),
        name: "n".into(),
        peer: "h:1".into(),
        clients: vec!["http://h:2".into()],
        role: MemberRole::Removed,
        replaces: Some(MemberId(7)),
        storage: [5; 16],
        boots: 3,
        seen: Index(301),
        behaviour: 2,
        release: "0.1".into(),
        join: [4; 32],
    }
}

fn batch(txns: Vec<Txn>) -> Batch {
    let origin = Origin { member: MemberId(1), boot: 0x1122_3344_5566_7788, first: 5 };
    Batch { behaviour: 1, stamp: LogTime(1000), origin, txns }
}

fn record() -> Record {
    let meta = Meta {
        tombstone: false,
        mod_revision: Revision(300),
        index: 1,
        create_revision: Revision(2),
        version: 3,
        owner: SessionId(7),
    };
    Record::new(key("k").as_bytes(), meta, b"t", b"v")
}

fn replies() -> Vec<(&'static str, Reply)> {
    let holder = Holder { token: Revision(4), session: SessionId(7), owner: Box::from(*b"o"), since: LogTime(9) };
    let name = || -> Box<[u8]> { Box::from(*b"l") };
    let range = RangeReply { records: vec![record()], count: 2, more: true, keys_only: true };
    let grant = LockGrant { token: Revision(4), session: SessionId(7), session_token: 2, ttl_ms: 1000 };
    let held = || Some(holder.clone());
    let ok = |results| Ok(TxnReply { succeeded: true, results });
    let results = vec![
        ("put", ok(vec![OpReply::Put { prev: Some(record()) }, OpReply::Put { prev: None }])),
        ("delete", ok(vec![OpReply::Delete { deleted: 1, prev: vec![record()] }])),
        ("range", ok(vec![OpReply::Range(range)])),
        ("txn", ok(vec![OpReply::Txn(TxnReply { succeeded: false, results: vec![OpReply::Compacted] })])),
        ("session", ok(vec![OpReply::SessionCreated { id: SessionId(7), token: 2, ttl_ms: 9 }, OpReply::SessionEnded])),
        ("lock", ok(vec![OpReply::LockGranted(grant), OpReply::LockReleased, OpReply::LockCancelled { waiters: 2 }])),
        ("done", ok(vec![OpReply::Done, OpReply::ResultNotRetained])),
        ("empty key", Err(Rejection::EmptyKey)),
        ("duplicate key", Err(Rejection::DuplicateKey)),
        ("too many ops", Err(Rejection::TooManyOps { ops: 129, max: 128 })),
        ("key not found", Err(Rejection::KeyNotFound)),
        ("compacted", Err(Rejection::Compacted { lowest: Revision(3) })),
        ("future revision", Err(Rejection::FutureRevision { current: Revision(3) })),
        ("session not found", Err(Rejection::SessionNotFound { session: SessionId(7) })),
        ("session exists", Err(Rejection::SessionExists { session: SessionId(7) })),
        ("session expired", Err(Rejection::SessionExpired { session: SessionId(7) })),
        ("quota, waiters", Err(Rejection::Quota { what: "waiters of one lock", limit: 9 })),
        ("quota, things", Err(Rejection::Quota { what: "keys, locks and waits of one session", limit: 9 })),
        ("rate limited, session", Err(Rejection::RateLimited { what: "open requests of one session", limit: 9 })),
        ("rate limited, one-shot", Err(Rejection::RateLimited { what: "remembered requests", limit: 9 })),
        ("mismatch", Err(Rejection::Mismatch)),
        ("held", Err(Rejection::Held { name: name(), holder: holder.clone(), waiters: 1 })),
        ("timeout waiting", Err(Rejection::TimeoutWaiting { name: name(), waited_ms: 5, holder: held() })),
        ("cancelled", Err(Rejection::Cancelled { name: name() })),
        ("deadlock", Err(Rejection::Deadlock { name: name(), holder: holder.clone() })),
        (
            "fenced",
            Err(Rejection::Fenced { name: name(), presented: Revision(3), newest: Revision(4), holder: held() }),
        ),
        ("not found, session", Err(Rejection::NotFound { what: "session", name: name() })),
        ("not found, lock", Err(Rejection::NotFound { what: "lock", name: name() })),
        ("not found, key", Err(Rejection::NotFound { what: "key", name: name() })),
        ("not found, namespace", Err(Rejection::NotFound { what: "namespace", name: name() })),
        ("not found, other", Err(Rejection::NotFound { what: "things", name: name() })),
        ("invalid", Err(Rejection::Invalid { why: "so".into() })),
        ("not yet", Err(Rejection::NotYet { behaviour: 2 })),
        ("member", ok(vec![OpReply::Member(Box::new(member()))])),
        ("not found, member", Err(Rejection::NotFound { what: "member", name: name() })),
        ("quota, members", Err(Rejection::Quota { what: "members", limit: 9 })),
        (
            "member exists",
            Err(Rejection::MemberExists { id: MemberId(300), name: "n".into(), peer: "h:1".into(), removed: true }),
        ),
        ("member removed", Err(Rejection::MemberRemoved { id: MemberId(300) })),
        ("other storage", Err(Rejection::OtherStorage { id: MemberId(300) })),
        ("rolled back", Err(Rejection::RolledBack { id: MemberId(300), boots: 2, recorded: 3 })),
    ];
    results
        .into_iter()
        .map(|(what, result)| (what, Reply { revision: Revision(300), replayed: true, result }))
        .collect()
}

fn txns() -> Vec<(&'static str, Txn)> {
    let requires = vec![RequireLock { name: Box::from(*b"l"), token: Revision(4) }];
    let whole = Txn {
        principal: "alice".into(),
        namespace: NamespaceId(3),
        request: Some(RequestId::Uuid([9; 16])),
        requires,
        compares: vec![compare(Relation::Equal, CompareTarget::Version(0))],
        then: vec![Op::Put(put("v"))],
        otherwise: vec![Op::Delete(Delete { span: Span::one(key("k")), prev: false })],
    };
    let numbered = RequestId::Session { session: SessionId(7), seq: 300, acked_below: 2 };
    let in_series = RequestId::Series { series: 0x0102_0304_0506_0708, seq: 300, acked_below: 2 };
    vec![
        ("whole", whole.clone()),
        ("numbered", Txn { request: Some(numbered), ..whole.clone() }),
        ("in a series", Txn { request: Some(in_series), ..whole }),
        ("empty", Txn::default()),
    ]
}

/// A machine with something in every section of its snapshot.
fn everything() -> Machine {
    let mut machine = Machine::new();
    let mut steps: Vec<Txn> = vec![
        Txn::of(Op::Genesis { cluster: 42, issuer: [3; 16] }),
        Txn::of(Op::SessionCreate(session(SessionFace::Native))),
    ];
    let of = |op, request| Txn { principal: "alice".into(), request, ..Txn::of(op) };
    let acquire = |owner: &[u8], wait| LockAcquire {
        name: Box::from(*b"l"),
        session: SessionId(300),
        create: None,
        owner: owner.into(),
        mode: LockMode::Exclusive,
        wait,
    };
    let free = LockAcquire { name: Box::from(*b"m"), ..acquire(b"", Wait::None) };
    steps.push(of(Op::LockAcquire(acquire(b"", Wait::None)), Some(RequestId::Uuid([1; 16]))));
    steps.push(of(Op::LockAcquire(acquire(b"o", Wait::Ms(500))), Some(RequestId::Uuid([2; 16]))));
    steps.push(of(Op::LockAcquire(acquire(b"p", Wait::Forever)), None));
    let put = |value| Op::Put(Put { session: SessionId(300), keep_session: false, ..put(value) });
    let numbered = |seq| Some(RequestId::Session { session: SessionId(300), seq, acked_below: 1 });
    steps.push(of(put("v1"), numbered(1)));
    steps.push(of(put("v2"), numbered(2)));
    steps.push(of(Op::LockAcquire(free), None));
    steps.push(of(Op::LockRelease { name: Box::from(*b"m"), session: SessionId(300), token: Revision(6) }, None));
    steps.push(of(Op::SessionCheckpoint { session: SessionId(300), token: 2, remaining_ms: Some(100) }, None));
    steps.push(of(Op::Compact { revision: 4 }, None));
    steps.push(of(Op::Delete(Delete { span: Span::one(key("k")), prev: false }), None));
    let at = Position { index: Index(1), term: Term(1) };
    let mut out = Applied::default();
    machine.apply(at, batch(steps), &mut out).unwrap();
    let refused: Vec<_> = out.replies.iter().filter(|(_, reply)| reply.result.is_err()).collect();
    assert!(refused.is_empty(), "{refused:?}");
    machine
}

/// The same with a table of members, which earlier releases did not have.
fn with_members() -> Machine {
    let mut machine = everything();
    let ops = [
        member_add(1, MemberRole::Voter, None),
        member_register(1),
        member_add(2, MemberRole::Learner, None),
        member_add(3, MemberRole::Voter, Some(MemberId(2))),
        Op::MemberSeen { id: MemberId(1), index: Index(300) },
        Op::MemberRemove { id: MemberId(2) },
    ];
    let at = Position { index: Index(2), term: Term(1) };
    let mut out = Applied::default();
    machine.apply(at, batch(ops.into_iter().map(Txn::of).collect()), &mut out).unwrap();
    let refused: Vec<_> = out.replies.iter().filter(|(_, reply)| reply.result.is_err()).collect();
    assert!(refused.is_empty(), "{refused:?}");
    machine
}

/// The same with requests in a series, from behaviour version 3 on.
fn with_series() -> Machine {
    let mut machine = everything();
    let in_series = |seq| Some(RequestId::Series { series: 9, seq, acked_below: 2 });
    let txn = |seq| Txn { request: in_series(seq), ..Txn::of(Op::Put(put("v3"))) };
    let at = Position { index: Index(2), term: Term(1) };
    machine.apply(at, batch(vec![txn(2), txn(3)]), &mut Applied::default()).unwrap();
    machine
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn golden_bytes() {
    let mut lines: Vec<(String, String)> = Vec::new();
    for (what, op) in ops() {
        let batch = batch(vec![Txn::of(op)]);
        let bytes = batch.encode();
        assert_eq!(Batch::decode(&bytes).unwrap(), batch);
        lines.push((format!("batch of {what}"), hex(&bytes)));
    }
    for (what, txn) in txns() {
        let mut bytes = Vec::new();
        txn.encode(&mut bytes);
        lines.push((format!("transaction, {what}"), hex(&bytes)));
        lines.push((format!("digest, {what}"), hex(&txn.digest())));
    }
    for (what, reply) in replies() {
        let mut bytes = Vec::new();
        reply.encode(&mut bytes);
        assert_eq!(Reply::decode(&bytes).unwrap(), reply);
        lines.push((format!("reply, {what}"), hex(&bytes)));
    }
    let mut machine = everything();
    lines.push(("checksum".into(), hex(&machine.checksum().to_le_bytes())));
    for (n, block) in snapshot(&mut machine, 1 << 20).iter().enumerate() {
        lines.push((format!("snapshot block {n}"), hex(block)));
    }
    let mut machine = with_members();
    lines.push(("checksum with members".into(), hex(&machine.checksum().to_le_bytes())));
    let blocks = snapshot(&mut machine, 1 << 20);
    let members = blocks.iter().find(|block| block[1] == 12).unwrap();
    lines.push(("snapshot block of members".into(), hex(members)));
    for block in snapshot(&mut with_series(), 1 << 20).iter().filter(|block| block[1] >= 14) {
        lines.push((format!("snapshot block of series, section {}", block[1]), hex(block)));
    }
    compare_with_file("golden.txt", &lines);
}

pub(crate) fn compare_with_file(name: &str, lines: &[(String, String)]) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it").join(name);
    let mut text = std::fs::read_to_string(&file).unwrap_or_default();
    let known: BTreeMap<String, String> =
        text.lines().filter_map(|l| l.split_once(": ")).map(|(a, b)| (a.to_string(), b.to_string())).collect();
    for (what, bytes) in lines {
        match known.get(what) {
            Some(before) => {
                assert_eq!(bytes, before, "the stored bytes of `{what}` have changed: old logs cannot be read")
            }
            None if std::env::var_os("UPDATE").is_some() => text += &format!("{what}: {bytes}\n"),
            None => panic!("`{what}` has no golden bytes yet: {bytes}"),
        }
    }
    assert_eq!(
        known.keys().filter(|k| lines.iter().all(|(what, _)| what != *k)).count(),
        0,
        "nothing stored is forgotten"
    );
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, text).unwrap();
    }
}

#[test]
fn a_snapshot_of_everything_loads() {
    let mut machine = everything();
    let blocks = snapshot(&mut machine, 10);
    let sections: std::collections::BTreeSet<u8> = blocks.iter().map(|b| b[1]).collect();
    assert_eq!(sections.len(), 11, "each section is there");
    let mut loaded = load(&blocks);
    assert_eq!(snapshot(&mut loaded, 10), blocks);
    assert_eq!(loaded.session(SessionId(300)), machine.session(SessionId(300)));
    assert_eq!(loaded.lock(NamespaceId(0), b"l"), machine.lock(NamespaceId(0), b"l"));
    assert_eq!((loaded.cluster(), loaded.issuer()), (42, [3; 16]));
    assert_eq!(loaded.next_deadline(), Some(LogTime(1500)));
}

/// A folder from before there was a table of members has no such block, and one without members still writes none.
#[test]
fn a_snapshot_with_members_loads() {
    let mut machine = with_members();
    let blocks = snapshot(&mut machine, 10);
    let sections: Vec<u8> = blocks.iter().map(|b| b[1]).collect();
    assert_eq!(sections.iter().filter(|s| **s == 12).count(), 1);
    assert_eq!(sections[sections.len() - 2..], [12, 11], "the members come before the end");
    let mut loaded = load(&blocks);
    assert_eq!(snapshot(&mut loaded, 10), blocks);
    assert!(loaded.members().eq(machine.members()));
    assert_eq!((loaded.members_version(), loaded.members().count()), (5, 3));
    assert_eq!(loaded.memory(), machine.memory());
    let empty = load(&snapshot(&mut everything(), 10));
    assert_eq!((empty.members_version(), empty.members().count()), (0, 0));
}

#[test]
fn unknown_numbers_are_named() {
    let check = |entry: &[u8], expected: &str| {
        let mut machine = Machine::new();
        let at = Position { index: Index(8), term: Term(1) };
        let fault = machine.apply_encoded(at, entry, &mut Applied::default()).unwrap_err();
        assert_eq!(fault.to_string(), expected);
        assert_eq!(machine.position(), Position::default(), "nothing was applied");
    };
    let mut bytes = batch(vec![Txn::of(Op::Compact { revision: 5 })]).encode();
    let place = bytes.len() - 3;
    assert_eq!(bytes[place], 5, "the number of the operation");
    bytes[place] = 99;
    check(&bytes, "entry 8 has operation 99, which this release does not know: run a newer release");
    bytes[0] = 2;
    check(&bytes, "entry 8 has a batch 2, which this release does not know: run a newer release");
    check(&[], "entry 8 cannot be read: the bytes end inside a batch");
    let newer = Batch { behaviour: BEHAVIOUR + 1, ..batch(Vec::new()) };
    check(&newer.encode(), "entry 8 has behaviour version 4, this release knows up to 3: run a newer release");
}

#[test]
fn deep_nesting_is_refused_before_it_is_proposed() {
    let nest = |depth| {
        (1..depth).fold(Op::Compact { revision: 1 }, |op, _| {
            Op::Txn(Box::new(SubTxn { compares: Vec::new(), then: vec![op], otherwise: Vec::new() }))
        })
    };
    let machine = Machine::new();
    let bearable = Txn::of(nest(MAX_DEPTH));
    machine.admit(&bearable).unwrap();
    assert_eq!(Batch::decode(&batch(vec![bearable.clone()]).encode()).unwrap().txns[0], bearable);
    assert!(machine.admit(&Txn::of(nest(MAX_DEPTH + 1))).is_err());
    assert!(Batch::decode(&batch(vec![Txn::of(nest(1_000))]).encode()).is_err());
}

#[test]
fn a_lying_length_takes_no_memory() {
    let mut bytes = batch(Vec::new()).encode();
    let end = bytes.len() - 1;
    bytes.splice(end.., [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
    assert_eq!(Batch::decode(&bytes), Err(DecodeError::Truncated { what: "transactions" }));
}

fn samples() -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = ops().into_iter().map(|(_, op)| batch(vec![Txn::of(op)]).encode()).collect();
    all.extend(txns().into_iter().map(|(_, txn)| batch(vec![txn.clone(), txn]).encode()));
    all.extend(replies().into_iter().map(|(_, reply)| {
        let mut bytes = Vec::new();
        reply.encode(&mut bytes);
        bytes
    }));
    all
}

/// Reads bytes as everything; what is understood is written back as it was.
fn read_as_everything(bytes: &[u8]) -> Result<(), TestCaseError> {
    if let Ok(batch) = Batch::decode(bytes) {
        prop_assert_eq!(batch.encode(), bytes);
    }
    if let Ok(reply) = Reply::decode(bytes) {
        let mut again = Vec::new();
        reply.encode(&mut again);
        prop_assert_eq!(again, bytes);
    }
    let mut loader = Loader::new();
    if loader.push(bytes).is_ok() {
        drop(loader.finish());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        read_as_everything(&bytes)?;
    }

    #[test]
    fn altered_bytes_never_panic(
        sample in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let samples = samples();
        let mut bytes = samples[sample.index(samples.len())].clone();
        for (place, to) in changes {
            let place = place.index(bytes.len());
            bytes[place] = to;
        }
        read_as_everything(&bytes)?;
        read_as_everything(&bytes[..cut.index(bytes.len())])?;
    }

    #[test]
    fn altered_blocks_never_panic(block in any::<prop::sample::Index>(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        // Whatever the checksum of the file: each block is looked at by itself too.
        let mut blocks = snapshot(&mut with_members(), 60);
        let block = block.index(blocks.len());
        for (place, to) in changes {
            let place = place.index(blocks[block].len());
            blocks[block][place] = to;
        }
        let mut loader = Loader::new();
        for block in &blocks {
            if loader.push(block).is_err() {
                return Ok(());
            }
        }
        drop(loader.finish());
    }
}
