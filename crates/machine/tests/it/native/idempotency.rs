//! Idempotency records in scripts: `idem-begin KEY [wait=] [ttl=] [keep=] [never] [print=ALG:DIGEST,..]`, `idem-beat KEY 2 [never|allow]`,
//! `idem-checkpoint KEY 2 NAME data=..`, `idem-complete KEY 2 RESULT`, `idem-fail KEY 2 [final=RESULT]`,
//! `idem-reconcile KEY complete=RESULT|release|discard [attempt=2]`; `scope=` for each, `100*x` is a long key or name, `\t` in it a tab.
//! A result is `200:body`, `200:zeros*5000`, or `200:lost*300000` for one that is not kept.

use super::Said;
use crate::golden;
use crate::script::{load, snapshot};
use tenure_machine::*;

pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let attempt = || Revision(said.plain(1).unwrap().parse().unwrap());
    let name = || RecordName::new(&long(said.option("scope").unwrap_or_default()), &long(said.plain(0).unwrap()));
    let ms_or = |option: &str, default| if said.option(option).is_some() { said.ms(option) } else { default };
    let op = match said.verb {
        "idem-begin" => IdempotencyOp::Begin(AttemptBegin {
            name: name(),
            fingerprints: said.option("print").map(prints).unwrap_or_default(),
            lease_ms: ms_or("ttl", 60_000),
            retention_ms: ms_or("keep", 24 * 60 * 60 * 1000),
            wait_ms: said.ms("wait"),
            takeover: !said.has("never"),
        }),
        "idem-beat" => IdempotencyOp::Heartbeat(AttemptHeartbeat {
            name: name(),
            attempt: attempt(),
            lease_ms: said.ms("ttl"),
            takeover: if said.has("never") { Some(false) } else { said.has("allow").then_some(true) },
        }),
        "idem-checkpoint" => IdempotencyOp::Checkpoint(AttemptCheckpoint {
            name: name(),
            attempt: attempt(),
            checkpoint: AttemptPoint {
                name: long(said.plain(2).unwrap()).into(),
                data: bytes(said.option("data").unwrap_or_default()).into(),
            },
        }),
        "idem-complete" => IdempotencyOp::Complete(AttemptComplete {
            name: name(),
            attempt: attempt(),
            result: result(said.plain(2).unwrap()),
        }),
        "idem-fail" => IdempotencyOp::Fail(AttemptFail {
            name: name(),
            attempt: attempt(),
            last: said.option("final").map(result),
        }),
        "idem-reconcile" => IdempotencyOp::Reconcile(AttemptReconcile {
            name: name(),
            attempt: Revision(said.number("attempt")),
            decision: match said.option("complete") {
                Some(said) => AttemptDecision::Complete(result(said)),
                None if said.has("release") => AttemptDecision::Release,
                None => AttemptDecision::Discard,
            },
        }),
        _ => return None,
    };
    Some(op.into())
}

fn prints(said: &str) -> Vec<Fingerprint> {
    let print = |said: &str| {
        let (algorithm, digest) = said.split_once(':').unwrap();
        Fingerprint { algorithm: algorithm.into(), digest: digest.as_bytes().into() }
    };
    said.split(',').map(print).collect()
}

/// `100*x` is an x a hundred times.
fn long(said: &str) -> String {
    match said.split_once('*') {
        Some((n, what)) => what.repeat(n.parse().unwrap()),
        None => said.replace("\\t", "\t"),
    }
}

fn bytes(said: &str) -> Vec<u8> {
    match said.strip_prefix("zeros*") {
        Some(n) => vec![b'0'; n.parse().unwrap()],
        None => said.into(),
    }
}

fn result(said: &str) -> PackedResult {
    let (status, body) = said.split_once(':').unwrap();
    let body = match body.strip_prefix("lost*") {
        Some(size) => ResultBody::NotRetained(NotRetained { size: size.parse().unwrap(), sha256: [7; 32] }),
        None => ResultBody::Kept(bytes(body).into()),
    };
    PackedResult::new(&StoredResult { status: status.parse().unwrap(), headers: Vec::new(), body })
}

pub(super) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    if what == "waits" {
        return Some(format!("{} wait", machine.counts().waiters));
    }
    if what != "record" {
        return None;
    }
    let name = RecordName::new(rest.get(1).copied().unwrap_or_default(), rest[0]);
    let Some(record) = machine.idempotency_record(namespace, &name) else {
        return Some(format!("no record of {}", rest[0]));
    };
    let state = record.state_at(machine.stamp()).unwrap().name();
    let points: Vec<_> = record.checkpoints().iter().map(|c| format!("{}={}", c.name, c.data.escape_ascii())).collect();
    let (number, attempt, left) = (record.number, record.attempt, record.left_ms(machine.stamp()));
    Some(format!("{} is {state}: attempt {number} token={attempt} left={left}ms [{}]", rest[0], points.join(" ")))
}

struct Log {
    machine: Machine,
    index: u64,
    clock: u64,
}

impl Log {
    fn new() -> Self {
        let mut log = Self { machine: Machine::new(), index: 0, clock: 0 };
        log.apply(vec![Txn::of(Op::RaiseBehaviour { to: BEHAVIOUR })]);
        log
    }

    fn apply(&mut self, txns: Vec<Txn>) -> Vec<Result<TxnReply, Rejection>> {
        self.index += 1;
        let behaviour = self.machine.behaviour();
        let batch = Batch { behaviour, stamp: LogTime(self.clock), origin: Origin::default(), txns };
        let mut out = Applied::default();
        let at = Position { index: Index(self.index), term: Term(1) };
        self.machine.apply_encoded(at, &batch.encode(), &mut out).unwrap();
        out.replies.into_iter().map(|(_, reply)| reply.result).collect()
    }

    fn one(&mut self, op: IdempotencyOp) -> IdempotencyReply {
        answer(self.apply(vec![Txn::of(op.into())]).pop().unwrap())
    }
}

fn answer(result: Result<TxnReply, Rejection>) -> IdempotencyReply {
    match result.unwrap().results.pop() {
        Some(OpReply::Native(reply)) => match *reply {
            NativeReply::Idempotency(reply) => reply,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

fn begin(key: &str) -> AttemptBegin {
    let name = RecordName::new("shop", key);
    AttemptBegin { name, fingerprints: Vec::new(), lease_ms: 60_000, retention_ms: 60_000, wait_ms: 0, takeover: true }
}

/// 500 callers begin one key at once: one runs it, the others wait, and all of them have its bytes when it completes.
#[test]
fn of_five_hundred_begins_one_is_granted() {
    let mut log = Log::new();
    let op = |wait_ms| Txn::of(IdempotencyOp::Begin(AttemptBegin { wait_ms, ..begin("k") }).into());
    let replies = log.apply((0..500).map(|_| op(0)).collect());
    let granted = |r: &IdempotencyReply| matches!(r, IdempotencyReply::Granted(_));
    let replies: Vec<_> = replies.into_iter().map(answer).collect();
    assert!(granted(&replies[0]));
    assert_eq!(replies.iter().filter(|r| matches!(r, IdempotencyReply::InFlight(_))).count(), 499);

    assert!(log.apply((0..500).map(|_| op(5_000)).collect()).is_empty(), "they wait");
    let Some(IdempotencyReply::Granted(AttemptGranted { attempt, .. })) = replies.into_iter().next() else { panic!() };
    let complete = AttemptComplete { name: begin("k").name, attempt, result: result("201:created") };
    let replies: Vec<_> =
        log.apply(vec![Txn::of(IdempotencyOp::Complete(complete).into())]).into_iter().map(answer).collect();
    let replayed = |r: &IdempotencyReply| matches!(r, IdempotencyReply::Replay(r) if r.result == result("201:created"));
    assert_eq!((replies.len(), replies.iter().filter(|r| replayed(r)).count()), (501, 500));
}

/// Many that end at one moment are taken away over several entries; until its turn each counts as gone, and all memory comes back.
#[test]
fn an_expiry_of_many_is_spread() {
    let mut log = Log::new();
    let before = log.machine.memory().used;
    for n in 0..3_500 {
        let key = format!("order-{n:06}");
        let IdempotencyReply::Granted(granted) = log.one(IdempotencyOp::Begin(begin(&key))) else { panic!() };
        let complete = AttemptComplete { name: begin(&key).name, attempt: granted.attempt, result: result("200:ok") };
        log.one(IdempotencyOp::Complete(complete));
    }
    let full = log.machine.memory().used;
    log.clock += 60_000;
    let last = begin("order-003499");
    assert!(matches!(log.one(IdempotencyOp::Begin(last.clone())), IdempotencyReply::Granted(g) if g.number == 1));
    let after_one = log.machine.memory().used;
    assert!(after_one > before + (full - before) / 2, "one entry does a bounded part of it");
    assert!(log.machine.next_deadline().is_some_and(|at| at.0 <= log.clock), "and says that there is more");
    assert!(log.machine.idempotency_record(NamespaceId::DEFAULT, &begin("order-003400").name).is_none());
    while log.machine.next_deadline().is_some_and(|at| at.0 <= log.clock) {
        log.apply(Vec::new());
    }
    log.clock += 120_000;
    log.apply(Vec::new());
    log.clock += 120_000;
    log.apply(Vec::new());
    assert_eq!(log.machine.memory().used, before);
}

fn stored() -> Vec<IdempotencyOp> {
    let name = RecordName::new("alice POST /pay", "k-300");
    let headers = vec![("content-type".into(), "text/plain".into())];
    let packed = |body| PackedResult::new(&StoredResult { status: 201, headers: headers.clone(), body });
    let (kept, lost) = (packed(ResultBody::Kept(Box::from(*b"ok"))), NotRetained { size: 300_000, sha256: [7; 32] });
    let attempt = Revision(300);
    vec![
        IdempotencyOp::Begin(AttemptBegin {
            fingerprints: vec![Fingerprint { algorithm: "http-1".into(), digest: Box::from([1, 2]) }],
            wait_ms: 7,
            name: name.clone(),
            ..begin("")
        }),
        IdempotencyOp::Heartbeat(AttemptHeartbeat {
            name: name.clone(),
            attempt,
            lease_ms: 5_000,
            takeover: Some(false),
        }),
        IdempotencyOp::Checkpoint(AttemptCheckpoint {
            name: name.clone(),
            attempt,
            checkpoint: AttemptPoint { name: "sent".into(), data: b"d".to_vec().into() },
        }),
        IdempotencyOp::Complete(AttemptComplete { name: name.clone(), attempt, result: kept.clone() }),
        IdempotencyOp::Fail(AttemptFail {
            name: name.clone(),
            attempt,
            last: Some(packed(ResultBody::NotRetained(lost))),
        }),
        IdempotencyOp::Fail(AttemptFail { name: name.clone(), attempt, last: None }),
        IdempotencyOp::Reconcile(AttemptReconcile {
            name: name.clone(),
            attempt,
            decision: AttemptDecision::Complete(kept),
        }),
        IdempotencyOp::Reconcile(AttemptReconcile { name: name.clone(), attempt, decision: AttemptDecision::Release }),
        IdempotencyOp::Reconcile(AttemptReconcile { name, attempt, decision: AttemptDecision::Discard }),
    ]
}

/// The bytes of operations, answers and records never change.
#[test]
fn stored_bytes() {
    let mut lines = Vec::new();
    for (n, op) in stored().into_iter().enumerate() {
        let mut bytes = Vec::new();
        Txn::of(op.into()).encode(&mut bytes);
        lines.push((format!("operation {n}"), golden::hex(&bytes)));
    }
    let mut log = Log::new();
    for (n, op) in answers().into_iter().enumerate() {
        let result = log.apply(vec![Txn::of(op.into())]).pop().unwrap();
        let mut bytes = Vec::new();
        Reply { revision: log.machine.revision(), replayed: false, result }.encode(&mut bytes);
        lines.push((format!("answer {n}"), golden::hex(&bytes)));
    }
    lines.push(("checksum".into(), golden::hex(&log.machine.checksum().to_le_bytes())));
    let blocks = snapshot(&mut log.machine, 1 << 20);
    let records = blocks.iter().find(|block| block.windows(5).any(|w| w == b"alice")).unwrap();
    lines.push(("records".into(), golden::hex(records)));
    assert_eq!(load(&blocks).memory(), log.machine.memory());
    golden::compare_with_file("native/idempotency.golden", &lines);
}

/// Operations whose answers are of every kind, and which leave records of both kinds.
fn answers() -> Vec<IdempotencyOp> {
    let other = RecordName::new("alice", "open");
    let at = |op: IdempotencyOp, attempt| match op {
        IdempotencyOp::Heartbeat(it) => IdempotencyOp::Heartbeat(AttemptHeartbeat { attempt, ..it }),
        IdempotencyOp::Checkpoint(it) => IdempotencyOp::Checkpoint(AttemptCheckpoint { attempt, ..it }),
        IdempotencyOp::Complete(it) => IdempotencyOp::Complete(AttemptComplete { attempt, ..it }),
        op => op,
    };
    let again = |wait_ms| match stored().remove(0) {
        IdempotencyOp::Begin(it) => IdempotencyOp::Begin(AttemptBegin { wait_ms, ..it }),
        op => op,
    };
    let mut ops: Vec<_> = vec![again(0), again(0)];
    ops.extend(stored().drain(1..4).map(|op| at(op, Revision(2))));
    ops.push(again(0));
    let open = IdempotencyOp::Begin(AttemptBegin { name: other.clone(), ..begin("") });
    let point = AttemptPoint { name: "p".into(), data: b"x".to_vec().into() };
    ops.push(open.clone());
    ops.push(IdempotencyOp::Checkpoint(AttemptCheckpoint {
        name: other.clone(),
        attempt: Revision(6),
        checkpoint: point,
    }));
    ops.push(IdempotencyOp::Fail(AttemptFail { name: other.clone(), attempt: Revision(6), last: None }));
    ops.push(open.clone());
    ops.push(IdempotencyOp::Fail(AttemptFail { name: other.clone(), attempt: Revision(9), last: None }));
    ops.push(IdempotencyOp::Reconcile(AttemptReconcile {
        name: other,
        attempt: Revision(9),
        decision: AttemptDecision::Discard,
    }));
    ops.push(open);
    ops
}
