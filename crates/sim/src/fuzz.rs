//! Mutated bytes for every decoder: none may panic, take memory without bound, or give what does not encode back to itself.
//!
//! Promises. A run is a function of its seed. Each starts from sound bytes and changes a few of them, so that it gets behind the
//! first check; folders are mutated as a whole and opened.

use crate::disk::SimDisk;
use crate::oracle::state;
use crate::random::Random;
use crate::trace::Trace;
use tenure_machine::*;
use tenure_replica::{Config, Effects, Hello, Lane, Member, Millis, run_job};

const NS: NamespaceId = NamespaceId::DEFAULT;

/// Runs some hundred mutations of one seed.
pub fn run(seed: u64, trace: &mut Trace) -> Result<u64, String> {
    let mut random = Random::new(seed);
    let mut tried = 0;
    let batch = sample_batch(&mut random);
    let sound = batch.encode();
    let mut replies = Vec::new();
    let mut machine = Machine::new();
    let mut out = Applied::default();
    for n in 1..=5 {
        let batch = sample_batch(&mut random);
        let batch = Batch { stamp: LogTime(n), ..batch };
        machine.apply(Position { index: Index(n), term: Term(1) }, batch, &mut out).map_err(|f| f.to_string())?;
        for (_, reply) in &out.replies {
            let mut bytes = Vec::new();
            reply.encode(&mut bytes);
            replies.push(bytes);
        }
    }
    machine.snapshot_begin();
    let mut blocks = Vec::new();
    while let Some(block) = machine.snapshot_next(400) {
        blocks.push(block);
    }
    for _ in 0..100 {
        let bytes = mutate(&sound, &mut random);
        // Whatever is accepted must be written back and read again as the same thing.
        if let Ok(batch) = Batch::decode(&bytes)
            && Batch::decode(&batch.encode()).as_ref() != Ok(&batch)
        {
            return Err(format!("{batch:?} does not come back"));
        }
        let bytes = mutate(&replies[random.index(replies.len())], &mut random);
        if let Ok(reply) = Reply::decode(&bytes) {
            let mut again = Vec::new();
            reply.encode(&mut again);
            if Reply::decode(&again).as_ref() != Ok(&reply) {
                return Err(format!("{reply:?} does not come back"));
            }
        }
        load_mutated(&blocks, &mut random);
        tried += 3;
    }
    tried += messages(&mut random)?;
    tried += folders(&mut random, trace)?;
    trace.say(|| format!("{tried} mutations"));
    Ok(tried)
}

/// Changes, removes, repeats or adds a few bytes.
fn mutate(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..random.between(1, 4) {
        let at = random.index(bytes.len() + 1);
        match random.below(6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.u32() as u8),
            2 if at < bytes.len() => {
                bytes.remove(at);
            }
            // Lengths are what decoders trust.
            3 if at < bytes.len() => bytes[at] = *random.pick(&[0, 1, 0x7f, 0x80, 0xff]),
            4 => {
                let end = (at + random.below(12) as usize).min(bytes.len());
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            _ => {}
        }
    }
    bytes
}

fn load_mutated(blocks: &[Vec<u8>], random: &mut Random) {
    let mut loader = Loader::new();
    let chosen = random.index(blocks.len());
    for (i, block) in blocks.iter().enumerate() {
        let mutated = if i == chosen { mutate(block, random) } else { block.clone() };
        if loader.push(&mutated).is_err() {
            return;
        }
    }
    // What loads must be a state that can be asked.
    if let Ok(machine) = loader.finish() {
        let _ = state::dump(&machine);
    }
}

/// A member takes bytes of anybody who reaches its port.
fn messages(random: &mut Random) -> Result<u64, String> {
    let disk = SimDisk::new(random.fork());
    let mut member = open(disk, random).map_err(|e| e.to_string())?;
    let mut out = Effects::default();
    for peer in 2..=3 {
        let hello = Hello {
            cluster_token: "tenure".to_owned(),
            member: MemberId(peer),
            name: format!("n{peer}"),
            boot: peer,
            storage: [peer as u8; 16],
            ..Hello::default()
        };
        if let Some(hello) = Hello::decode(&mutate(&hello.encode(), random)) {
            // Refused or not: what comes then must do no harm.
            let _ = member.greet(&hello, 0);
        }
        member.greet(&hello, 0).map_err(|why| format!("a hello is refused: {why}"))?;
    }
    for _ in 0..20 {
        // What it is, and then fields: a tag, then a number or a length with bytes.
        let mut bytes = vec![random.between(1, 12) as u8];
        for _ in 0..random.below(8) {
            bytes.push((random.between(1, 15) << 3 | random.below(6)) as u8);
            bytes.extend((0..random.below(6)).map(|_| random.u32() as u8));
        }
        member.receive(MemberId(random.between(1, 4)), &mutate(&bytes, random));
        member
            .poll(Millis(1), &mut out, &mut nobody)
            .map_err(|f| format!("a message of {bytes:?} stops the member: {f}"))?;
    }
    Ok(20)
}

/// A folder with a log and a snapshot, mutated in one file: it opens or is refused.
fn folders(random: &mut Random, trace: &mut Trace) -> Result<u64, String> {
    let disk = SimDisk::new(random.fork());
    let mut member = open(disk.clone(), random).map_err(|e| e.to_string())?;
    let mut out = Effects::default();
    let mut now = 0;
    for _ in 0..12 {
        for txn in sample_batch(random).txns {
            // A refusal is as good: this only fills the folder.
            let _ = member.submit(txn);
        }
        now += 100;
        member.poll(Millis(now), &mut out, &mut nobody).map_err(|f| f.to_string())?;
        for job in out.jobs.drain(..) {
            member.job_done(run_job(&mut disk.clone(), job));
        }
    }
    drop(member);
    let names = disk.names();
    for _ in 0..10 {
        let copy = disk.copy();
        let name = random.pick(&names).clone();
        let content = copy.content(&name).unwrap_or_default();
        let used = content.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
        let mut mutated = mutate(&content[..used], random);
        if random.coin() {
            mutated.resize(content.len().max(mutated.len()), 0);
        }
        copy.plant(&name, mutated);
        match open(copy, random) {
            Ok(mut member) => {
                let mut out = Effects::default();
                let _ = member.poll(Millis(1), &mut out, &mut nobody);
                let _ = state::dump(member.machine());
            }
            Err(why) => trace.say(|| format!("{name}: {why}")),
        }
    }
    Ok(10)
}

fn nobody(_: MemberId, _: Lane, _: Vec<u8>) {}

fn open(disk: SimDisk, random: &mut Random) -> Result<Member<SimDisk>, tenure_replica::OpenError> {
    let mut config = Config::alone(MemberId(1), "fuzzed", random.u64(), random.bytes());
    (config.first_segment_bytes, config.segment_bytes) = (64 << 10, 64 << 10);
    config.snapshot_log_bytes = 1 << 10;
    Member::open(disk, config, Millis(0))
}

fn sample_batch(random: &mut Random) -> Batch {
    let count = random.between(1, 6);
    let txns = (0..count).map(|_| sample_txn(random)).collect();
    let origin = Origin { member: MemberId(1), boot: random.u64(), first: random.below(1000) };
    Batch { behaviour: BEHAVIOUR, stamp: LogTime(0), origin, txns }
}

fn sample_txn(random: &mut Random) -> Txn {
    let key = Key::new(Space::Keys, NS, &[b'a' + random.below(5) as u8]);
    let session = SessionId(random.between(1, 4));
    let name: Box<[u8]> = vec![b'x' + random.below(3) as u8].into();
    let op = match random.below(8) {
        0 | 1 => Op::Put(Put {
            key: key.clone(),
            value: vec![7; random.below(200) as usize].into(),
            session: SessionId(0),
            prev: true,
            keep_value: false,
            keep_session: false,
        }),
        2 => Op::Delete(Delete { span: Span::etcd(Space::Keys, NS, b"a", b"c"), prev: true }),
        3 => Op::Range(Range::of(Span::etcd(Space::Keys, NS, b"a", b"\0"))),
        4 => Op::SessionCreate(SessionCreate {
            id: session,
            face: if random.coin() { SessionFace::Native } else { SessionFace::Etcd },
            ttl_ms: random.between(1, 1 << 40),
            on_expire: OnExpire::Delete,
            name: "fuzz".into(),
            metadata: vec![("a".into(), "b".into())],
            alias: random.coin().then(|| random.bytes()),
            secret: random.coin().then(|| random.bytes()),
        }),
        5 => {
            let wait = *random.pick(&[Wait::None, Wait::Ms(9), Wait::Forever]);
            Op::LockAcquire(LockAcquire {
                name,
                session,
                create: None,
                owner: Box::default(),
                mode: LockMode::Exclusive,
                wait,
            })
        }
        6 => Op::LockRelease { name, session, token: Revision(random.below(30)) },
        _ => Op::Txn(Box::new(SubTxn {
            compares: vec![Compare {
                span: Span::one(key.clone()),
                relation: Relation::Less,
                target: CompareTarget::Value(vec![1, 2, 3].into()),
            }],
            then: vec![Op::Range(Range::of(Span::one(key.clone())))],
            otherwise: Vec::new(),
        })),
    };
    let mut txn = Txn::of(op);
    if random.coin() {
        let (seq, acked_below) = (random.below(50), random.below(10));
        txn.request = Some(match random.below(3) {
            0 => RequestId::Uuid(random.bytes()),
            1 => RequestId::Session { session, seq, acked_below },
            _ => RequestId::Series { series: random.u64(), seq, acked_below },
        });
    }
    txn
}
