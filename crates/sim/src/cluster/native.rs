//! What the clients of a cluster ask of the native primitives: few names, so that they meet, and old tokens, as whoever slept would use them.

use crate::random::Random;
use tenure_machine::*;

/// What a client was given, and tries again long after it has lost it.
#[derive(Clone, Debug, Default)]
pub(super) struct Given {
    receipts: Vec<Receipt>,
    attempts: Vec<(RecordName, Revision)>,
    holds: Vec<HoldRef>,
}

/// More than these are forgotten, oldest first.
const GIVEN_MAX: usize = 5;

impl Given {
    /// Keeps what an answer gave.
    pub(super) fn learn(&mut self, op: &NativeOp, reply: &NativeReply) {
        match (op, reply) {
            (_, NativeReply::Queue(QueueReply::Received(received))) => {
                for job in &received.jobs {
                    keep(&mut self.receipts, Receipt { id: job.id, token: job.token });
                }
            }
            (
                NativeOp::Idempotency(IdempotencyOp::Begin(begin)),
                NativeReply::Idempotency(IdempotencyReply::Granted(granted)),
            ) => keep(&mut self.attempts, (begin.name.clone(), granted.attempt)),
            (
                NativeOp::Reservation(ReservationOp::Reserve(reserve)),
                NativeReply::Reservation(ReservationReply::Held(held)),
            ) => keep(&mut self.holds, HoldRef { pool: reserve.pool.clone(), id: held.id, token: held.token }),
            _ => {}
        }
    }
}

fn keep<T>(kept: &mut Vec<T>, one: T) {
    if kept.len() == GIVEN_MAX {
        kept.remove(0);
    }
    kept.push(one);
}

fn name(what: &str, random: &mut Random) -> String {
    format!("{what}{}", random.below(2))
}

fn bytes(text: String) -> Box<[u8]> {
    text.into_bytes().into()
}

/// One or two operations of primitives in one transaction.
pub(super) fn draw(number: u64, given: &Given, random: &mut Random) -> Txn {
    match random.below(9) {
        0 => Txn::of(
            CounterOp::Add(CounterAdd { name: bytes(name("c", random)), delta: 1, min: None, max: None }).into(),
        ),
        1 => Txn::of(
            CounterOp::Next(SequenceNext { name: bytes(name("s", random)), block: random.between(1, 5), at_least: 0 })
                .into(),
        ),
        2 => Txn::of(enqueue(number, random).into()),
        3 => Txn::of(QueueOp::Receive(receive(random)).into()),
        4 | 5 if !given.receipts.is_empty() => settle(number, random.pick(&given.receipts).clone(), random),
        6 if !given.attempts.is_empty() => {
            let (name, attempt) = random.pick(&given.attempts).clone();
            finish(number, name, attempt, random)
        }
        6 | 7 => Txn::of(IdempotencyOp::Begin(begin(random)).into()),
        _ if !given.holds.is_empty() && random.coin() => {
            let hold = random.pick(&given.holds).clone();
            Txn::of(if random.coin() { ReservationOp::Cancel(hold) } else { ReservationOp::Confirm(hold) }.into())
        }
        _ => Txn::of(reserve(number, random).into()),
    }
}

fn enqueue(number: u64, random: &mut Random) -> QueueOp {
    let group = random.coin().then(|| b"g"[..].into());
    let job = NewJob {
        payload: number.to_be_bytes()[..].into(),
        delay_ms: if random.chance(1, 4) { random.below(2_000) } else { 0 },
        run_at_ms: None,
        priority: random.below(3) as i32 - 1,
        terms: group.is_some().then(|| JobTerms { group, max_attempts: 1_000, ..JobTerms::default() }.into()),
        on_duplicate: OnDuplicate::ReturnExisting,
    };
    QueueOp::Enqueue(Enqueue { queue: b"q"[..].into(), jobs: vec![job] })
}

fn receive(random: &mut Random) -> Receive {
    Receive {
        queues: vec![b"q"[..].into()],
        groups: Vec::new(),
        max: random.between(1, 3) as u32,
        wait_ms: *random.pick(&[0, 0, 500, 3_000]),
        visibility_ms: random.between(1_000, 4_000),
        worker: "simulated".into(),
        receiver: Box::default(),
        settled: Vec::new(),
    }
}

/// The receipt is used once more: done with its effect marked, given back, or kept for longer.
fn settle(number: u64, receipt: Receipt, random: &mut Random) -> Txn {
    match random.below(6) {
        0 => {
            let nack = Nack { receipt, delay_ms: Some(random.below(500)), reason: "simulated".into(), dead: false };
            Txn::of(QueueOp::Nack(nack).into())
        }
        1 => Txn::of(QueueOp::Heartbeat(JobHeartbeat { receipt, extend_ms: 2_000, progress: None }).into()),
        2 => {
            let ack = Ack { receipt, result: Box::default() };
            let receive = Some(Box::new(receive(random)));
            Txn::of(QueueOp::Ack(AckJobs { acks: vec![ack], each: false, receive }).into())
        }
        _ => {
            let name = format!("job={}-{}", receipt.id.revision, receipt.id.index).into();
            let by = number.to_string().into();
            let once = MarkerOp::Once(MarkOnce { name, by, retention_ms: 0, result: Box::default() });
            let ack = Ack { receipt, result: Box::default() };
            let ack = QueueOp::Ack(AckJobs { acks: vec![ack], each: false, receive: None });
            Txn { then: vec![ack.into(), once.into()], ..Txn::default() }
        }
    }
}

fn begin(random: &mut Random) -> AttemptBegin {
    AttemptBegin {
        name: RecordName::new("scope", &name("i", random)),
        fingerprints: Vec::new(),
        lease_ms: random.between(1_000, 4_000),
        retention_ms: 24 * 3_600_000,
        wait_ms: *random.pick(&[0, 0, 1_000]),
        takeover: true,
    }
}

fn finish(number: u64, name: RecordName, attempt: Revision, random: &mut Random) -> Txn {
    Txn::of(
        match random.below(3) {
            0 => IdempotencyOp::Fail(AttemptFail { name, attempt, last: None }),
            1 => {
                let lease_ms = random.between(1_000, 3_000);
                IdempotencyOp::Heartbeat(AttemptHeartbeat { name, attempt, lease_ms, takeover: None })
            }
            _ => {
                let body = ResultBody::Kept(number.to_be_bytes()[..].into());
                let result = PackedResult::new(&StoredResult { status: 200, headers: Vec::new(), body });
                IdempotencyOp::Complete(AttemptComplete { name, attempt, result })
            }
        }
        .into(),
    )
}

fn reserve(number: u64, random: &mut Random) -> ReservationOp {
    let pool: Box<str> = name("p", random).into();
    if random.chance(1, 4) {
        return ReservationOp::Create(PoolCreate { pool, capacity: 5 });
    }
    ReservationOp::Reserve(Reserve {
        pool,
        quantity: random.between(1, 3),
        hold_ms: random.between(1_000, 4_000),
        session: SessionId(0),
        owner: format!("call {number}").into(),
        wait_ms: Some(*random.pick(&[0, 1_500])),
    })
}

/// The operations of primitives in a transaction, with what each was answered.
pub(super) fn answered<'a>(
    txn: &'a Txn,
    results: &'a [OpReply],
) -> impl Iterator<Item = (&'a NativeOp, &'a NativeReply)> {
    txn.then.iter().zip(results).filter_map(|(op, reply)| match (op, reply) {
        (Op::Native(op), OpReply::Native(reply)) => Some((&**op, &**reply)),
        _ => None,
    })
}

pub(super) fn asked(txn: &Txn) -> impl Iterator<Item = &NativeOp> {
    txn.then.iter().filter_map(|op| match op {
        Op::Native(op) => Some(&**op),
        _ => None,
    })
}

/// How long it may rightly wait for its answer.
pub(super) fn wait_ms(txn: &Txn) -> u64 {
    let waits = asked(txn).map(|op| match op {
        NativeOp::Queue(QueueOp::Receive(receive)) => receive.wait_ms,
        NativeOp::Queue(QueueOp::Ack(acks)) => acks.receive.as_ref().map_or(0, |receive| receive.wait_ms),
        NativeOp::Idempotency(IdempotencyOp::Begin(begin)) => begin.wait_ms,
        NativeOp::Reservation(ReservationOp::Reserve(reserve)) => reserve.wait_ms.unwrap_or(0),
        _ => 0,
    });
    waits.max().unwrap_or(0)
}
