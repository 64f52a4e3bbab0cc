//! What an entry costs: encoding, reading and applying, one transaction per entry and 64 per entry.
//!
//! `cargo run --release -p tenure-machine --example apply`. CPU time of the thread, so that a busy machine does not matter (Linux only).

use tenure_machine::*;

/// CPU time of this thread so far, in nanoseconds.
fn cpu_ns() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells it");
    stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("its first number is the CPU time")
}

const ENTRIES: u64 = 200_000;

fn main() {
    for per_entry in [1, 64] {
        run("put of 256 B over 100,000 keys", per_entry, |n| {
            vec![Op::Put(Put {
                key: Key::new(
                    Space::Keys,
                    NamespaceId::DEFAULT,
                    format!("/registry/pods/{:08}", n * 7919 % 100_000).as_bytes(),
                ),
                value: vec![n as u8; 256].into(),
                session: SessionId(0),
                prev: false,
                keep_value: false,
                keep_session: false,
            })]
        });
        run("lock acquire, then release", per_entry, |n| {
            let name = || -> Box<[u8]> { Box::from(*b"jobs/nightly") };
            vec![if n % 2 == 0 {
                Op::LockAcquire(LockAcquire {
                    name: name(),
                    session: SessionId(7),
                    create: None,
                    owner: Box::default(),
                    mode: LockMode::Exclusive,
                    wait: Wait::None,
                })
            } else {
                // Revision 1 is the empty store, 2 the session; so the nth transaction has revision n + 3.
                Op::LockRelease { name: name(), session: SessionId(7), token: Revision(n + 2) }
            }]
        });
    }
}

fn run(what: &str, per_entry: u64, ops: impl Fn(u64) -> Vec<Op>) {
    let mut machine = Machine::new();
    let mut out = Applied::default();
    let session = SessionCreate {
        id: SessionId(7),
        face: SessionFace::Native,
        ttl_ms: 15_000,
        on_expire: OnExpire::Delete,
        name: "".into(),
        metadata: Vec::new(),
        alias: None,
        secret: None,
    };
    let mut log = vec![vec![Txn::of(Op::SessionCreate(session))]];
    for entry in 0..ENTRIES / per_entry {
        let numbers = entry * per_entry..(entry + 1) * per_entry;
        log.push(numbers.map(|n| Txn { then: ops(n), ..Txn::default() }).collect());
    }
    let batches = log.into_iter().zip(0..).map(|(txns, n)| Batch {
        behaviour: BEHAVIOUR,
        stamp: LogTime(n),
        origin: Origin { member: MemberId(1), boot: 1, first: n * per_entry },
        txns,
    });
    let batches: Vec<Batch> = batches.collect();
    let start = cpu_ns();
    let entries: Vec<Vec<u8>> = batches.iter().map(Batch::encode).collect();
    let encoded = cpu_ns() - start;
    let start = cpu_ns();
    let read: Vec<Batch> = entries.iter().map(|e| Batch::decode(e).expect("just encoded")).collect();
    let decoded = cpu_ns() - start;
    let start = cpu_ns();
    for (n, batch) in read.into_iter().enumerate() {
        let at = Position { index: Index(n as u64 + 1), term: Term(1) };
        machine.apply(at, batch, &mut out).expect("a sound log");
        assert!(out.replies.iter().all(|(_, reply)| reply.result.is_ok()));
    }
    let applied = cpu_ns() - start;
    let each = |ns: u64| ns / ENTRIES;
    let (encode, decode, apply) = (each(encoded), each(decoded), each(applied));
    println!("{what}, {per_entry} per entry: encode {encode} ns, read {decode} ns, apply {apply} ns");
}
