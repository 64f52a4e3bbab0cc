//! What is judged before proposing, and what the log says of itself.

use tenure_machine::*;

fn put(key: &str, value: usize) -> Op {
    Op::Put(Put {
        key: Key::new(Space::Keys, NamespaceId::DEFAULT, key.as_bytes()),
        value: vec![0; value].into(),
        session: SessionId(0),
        prev: false,
        keep_value: false,
        keep_session: false,
    })
}

struct Log {
    machine: Machine,
    index: u64,
}

impl Log {
    fn new() -> Self {
        Self { machine: Machine::new(), index: 0 }
    }

    fn apply(&mut self, op: Op) -> Reply {
        self.index += 1;
        let batch =
            Batch { behaviour: 1, stamp: LogTime(self.index), origin: Origin::default(), txns: vec![Txn::of(op)] };
        let mut out = Applied::default();
        let at = Position { index: Index(self.index), term: Term(1) };
        self.machine.apply(at, batch, &mut out).unwrap();
        out.replies.pop().unwrap().1
    }
}

/// Above the hard limit nothing grows; what frees memory is admitted, and apply itself never refuses.
#[test]
fn a_full_member_admits_what_frees_memory() {
    let mut log = Log::new();
    log.machine.set_memory_limits(MemoryLimits { soft: 50_000, hard: 100_000 });
    let big = Txn::of(put("a", 60_000));
    log.machine.admit(&big).unwrap();
    log.apply(put("a", 60_000)).result.unwrap();
    let refused = log.machine.admit(&big).unwrap_err();
    assert_eq!((refused.what, refused.limit), ("bytes of memory", 100_000));
    log.apply(put("b", 60_000)).result.unwrap();
    assert!(log.machine.memory().used > 100_000);
    let span = Span::one(Key::new(Space::Keys, NamespaceId::DEFAULT, b"a"));
    let name: Box<[u8]> = Box::from(*b"l");
    let freeing = [
        Op::Delete(Delete { span: span.clone(), prev: false }),
        Op::Compact { revision: 2 },
        Op::SessionEnd { session: SessionId(7), token: None },
        Op::SessionExpire { session: SessionId(7), token: 1, term: Term(1) },
        Op::LockRelease { name: name.clone(), session: SessionId(7), token: Revision(1) },
        Op::LockCancel { name, session: SessionId(7), request: None },
    ];
    for op in freeing {
        log.machine.admit(&Txn::of(op)).unwrap();
    }
    assert!(log.machine.admit(&Txn::of(put("c", 0))).is_err());
    log.apply(Op::Delete(Delete { span, prev: false })).result.unwrap();
    let now = log.machine.revision().0 as i64;
    log.apply(Op::Compact { revision: now }).result.unwrap();
    while log.machine.maintain(10) {}
    log.machine.admit(&Txn::of(put("c", 1_000))).unwrap();
}

/// Where history takes more than its share, the oldest of it goes, whatever its age.
#[test]
fn history_is_compacted_by_its_share_of_memory() {
    let mut log = Log::new();
    for _ in 0..100 {
        log.apply(put("a", 1_000)).result.unwrap();
    }
    assert_eq!(log.machine.autocompact(3_600_000, 10_000, 25), None, "no limit, no share");
    log.machine.set_memory_limits(MemoryLimits { soft: 0, hard: 200_000 });
    let to = log.machine.autocompact(3_600_000, 10_000, 25).unwrap();
    assert!(to > Revision(20) && to < Revision(80), "{to}");
    log.apply(Op::Compact { revision: to.0 as i64 }).result.unwrap();
    while log.machine.maintain(10) {}
    let memory = log.machine.memory();
    assert!(memory.history < 60_000, "{memory:?}");
    assert_eq!(memory.used, memory.records + memory.history);
}

/// One byte of one value makes another checksum, and so does a session that takes no revision.
#[test]
fn the_checksum_sees_every_change() {
    let mut sums = std::collections::BTreeSet::new();
    let lease = |id| {
        Op::SessionCreate(SessionCreate {
            id: SessionId(id),
            face: SessionFace::Etcd,
            ttl_ms: 2000,
            on_expire: OnExpire::Delete,
            name: "".into(),
            metadata: Vec::new(),
            alias: None,
            secret: None,
        })
    };
    for op in [put("a", 1), put("a", 2), put("b", 1), lease(1), lease(2)] {
        let mut log = Log::new();
        log.apply(op).result.unwrap();
        sums.insert(log.machine.checksum());
    }
    assert_eq!(sums.len(), 5);
}

/// The marks for compaction are bounded, and old ones stay usable.
#[test]
fn marks_are_bounded() {
    let mut log = Log::new();
    for n in 1..=20_000u64 {
        let batch = Batch {
            behaviour: 1,
            stamp: LogTime(n * 60_000),
            origin: Origin::default(),
            txns: vec![Txn::of(put("a", 0))],
        };
        let at = Position { index: Index(n), term: Term(1) };
        log.machine.apply(at, batch, &mut Applied::default()).unwrap();
    }
    let minutes_kept = |minutes: u64| log.machine.autocompact(minutes * 60_000, 0, 100).unwrap().0;
    let exact = |minutes: u64| log.machine.revision().0 - minutes;
    for minutes in [1, 100, 9_000, 19_000] {
        let (found, exact) = (minutes_kept(minutes), exact(minutes));
        assert!(found <= exact && found + 16 > exact, "{minutes}: {found} instead of {exact}");
    }
}

/// Wide catch-up of the native space comes in whole revisions.
#[test]
fn native_changes_come_in_slices() {
    let mut log = Log::new();
    for id in 1..=50 {
        log.apply(Op::SessionCreate(SessionCreate {
            id: SessionId(id),
            face: SessionFace::Native,
            ttl_ms: 2000,
            on_expire: OnExpire::Delete,
            name: "".into(),
            metadata: Vec::new(),
            alias: None,
            secret: None,
        }))
        .result
        .unwrap();
    }
    let all =
        Span { start: Key::from_bytes(&[Space::Native as u8]), end: Some(Key::from_bytes(&[Space::Native as u8 + 1])) };
    let (mut from, mut seen, mut slices) = (Revision(0), 0, 0);
    while from <= log.machine.revision() {
        let slice = log.machine.changes(&all, from, 500).unwrap();
        assert!(slice.next > from);
        (from, seen, slices) = (slice.next, seen + slice.changes.len(), slices + 1);
    }
    assert_eq!(seen, 50);
    assert!(slices > 5);
}

/// What ends or keeps what is there goes on while there is hardly room: an instance that could not tell that it lives would be deregistered.
#[test]
fn instances_are_kept_when_there_is_hardly_room() {
    let of = || InstanceRef { service: "web".into(), instance: "a".into(), token: Revision(3) };
    let settles = |op: RegistryOp| NativeOp::Registry(op).only_settles();
    let (health, why) = (Health::Passing, || Box::<str>::from(""));
    assert!(settles(RegistryOp::Heartbeat(Heartbeat { of: of(), health, why: why() })));
    assert!(settles(RegistryOp::Probed(Probed { of: of(), term: 1, health, why: why() })));
    assert!(settles(RegistryOp::Drain(Drain { of: of(), draining: true })));
    assert!(settles(RegistryOp::Deregister(of())));
    assert!(!settles(RegistryOp::Guard(ServiceGuard { service: "web".into(), percent: 50 })));
    assert!(NativeOp::Config(ConfigOp::Abort(ConfigAt { key: "app".into(), version: 2 })).only_settles());
    assert!(!NativeOp::Config(ConfigOp::Promote(ConfigAt { key: "app".into(), version: 2 })).only_settles());
}

/// What is judged to fit does: a session with much metadata is not taken for a small one.
#[test]
fn what_is_admitted_fits() {
    for face in [SessionFace::Etcd, SessionFace::Native] {
        let pairs = |n: usize| (0..n).map(|i| (format!("{i:04}").into(), "v".into())).collect::<Vec<_>>();
        for metadata in [Vec::new(), pairs(3_000), vec![("k".into(), "v".repeat(16_000).into())]] {
            let create = SessionCreate {
                id: SessionId(1),
                face,
                ttl_ms: 2000,
                on_expire: OnExpire::Delete,
                name: "n".repeat(1_000).into(),
                metadata,
                alias: None,
                secret: None,
            };
            let mut log = Log::new();
            let before = log.machine.memory().used;
            let op = Op::SessionCreate(create.clone());
            let acquire = LockAcquire {
                name: b"l".as_slice().into(),
                session: SessionId(0),
                create: Some(create),
                owner: b"o".as_slice().into(),
                mode: LockMode::Exclusive,
                wait: Wait::None,
            };
            let growth = |log: &mut Log, op: &Op| {
                let hard = (1..1_000).map(|n| n * 1_024).find(|hard| {
                    log.machine.set_memory_limits(MemoryLimits { soft: 0, hard: *hard });
                    log.machine.admit(&Txn::of(op.clone())).is_ok()
                });
                hard.unwrap() - before
            };
            let needed = growth(&mut log, &op);
            let locked = growth(&mut log, &Op::LockAcquire(acquire));
            log.apply(op).result.unwrap();
            let used = log.machine.memory().used - before;
            assert!(used <= needed && needed <= locked, "{used} bytes were used, {needed} were asked for");
        }
    }
}

/// What watchers begin with has nothing of which they would never hear the end.
#[test]
fn leases_are_in_no_page_of_the_native_space() {
    let mut log = Log::new();
    let faces = [SessionFace::Etcd, SessionFace::Native, SessionFace::Etcd];
    for (id, face) in (1..).zip(faces) {
        log.apply(Op::SessionCreate(SessionCreate {
            id: SessionId(id),
            face,
            ttl_ms: 2000,
            on_expire: OnExpire::Delete,
            name: "".into(),
            metadata: Vec::new(),
            alias: None,
            secret: None,
        }))
        .result
        .unwrap();
    }
    let key = |name: &[u8]| Key::new(Space::Native, NamespaceId::DEFAULT, name);
    let id = |id: u64| [b"s".as_slice(), &id.to_be_bytes()].concat();
    let spans = [
        (Span { start: key(b""), end: Some(Key::end_of(Space::Native, NamespaceId::DEFAULT)) }, 1),
        (Span { start: key(b"s"), end: Some(key(b"t")) }, 1),
        (Span::one(key(&id(1))), 0),
        (Span::one(key(&id(2))), 1),
    ];
    for (span, expected) in spans {
        let (page, _) = log.machine.native_slice(&span, None, 10);
        assert_eq!(page.len(), expected, "{span:?}");
        assert!(page.iter().all(|record| record.mod_revision() <= log.machine.revision()));
    }
}

/// More deliveries end at one moment than one entry tells of; those that it does not tell of are over all the same.
#[test]
fn a_visibility_is_over_before_its_turn_to_be_told_of() {
    const LONG_MS: u64 = 12 * 3_600_000;
    let mut machine = Machine::new();
    let mut index = 0;
    let mut apply = |stamp: u64, txns: Vec<Txn>| {
        index += 1;
        let batch = Batch { behaviour: machine.behaviour(), stamp: LogTime(stamp), origin: Origin::default(), txns };
        let mut out = Applied::default();
        machine.apply(Position { index: Index(index), term: Term(1) }, batch, &mut out).unwrap();
        out.replies.into_iter().map(|(_, reply)| reply.result).collect::<Vec<_>>()
    };
    apply(0, vec![Txn::of(Op::RaiseBehaviour { to: BEHAVIOUR })]);
    let job = NewJob {
        payload: b"x"[..].into(),
        delay_ms: 0,
        run_at_ms: None,
        priority: 0,
        terms: None,
        on_duplicate: OnDuplicate::ReturnExisting,
    };
    let enqueue = QueueOp::Enqueue(Enqueue { queue: b"q"[..].into(), jobs: vec![job; 100] });
    let receive = QueueOp::Receive(Receive {
        queues: vec![b"q"[..].into()],
        groups: Vec::new(),
        max: 100,
        wait_ms: 0,
        visibility_ms: LONG_MS,
        worker: "".into(),
        receiver: b""[..].into(),
        settled: Vec::new(),
    });
    let mut last = None;
    for _ in 0..11 {
        let replies = apply(0, vec![Txn::of(enqueue.clone().into()), Txn::of(receive.clone().into())]);
        let Ok(QueueReply::Received(received)) = replies[1].clone().unwrap().results.remove(0).try_into() else {
            panic!("no jobs")
        };
        last = received.jobs.last().map(|job| Receipt { id: job.id, token: job.token });
    }
    let receipt = last.unwrap();
    let beat = Txn::of(
        QueueOp::Heartbeat(JobHeartbeat { receipt: receipt.clone(), extend_ms: LONG_MS, progress: None }).into(),
    );
    let Ok(QueueReply::Beat(told)) =
        apply(LONG_MS - 1, vec![beat.clone()])[0].clone().unwrap().results.remove(0).try_into()
    else {
        panic!("no beat")
    };
    assert_eq!(told.remaining_ms, 1);
    let required = Txn::of(ConditionOp::Require(Condition::ReceiptValid(receipt.clone())).into());
    let ack = Ack { receipt, result: Box::default() };
    let ack = Txn::of(QueueOp::Ack(AckJobs { acks: vec![ack], each: false, receive: None }).into());
    // 1,000 of 1,100 come back before these.
    for reply in apply(LONG_MS + 5, vec![beat, required, ack]) {
        let refused = reply.unwrap_err().to_string();
        assert!(refused.ends_with("the visibility of the job is over"), "{refused}");
    }
}
