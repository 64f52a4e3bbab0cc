//! What the simulated clients ask for, and what they remember of it.
//!
//! A client does a few things at a time: it writes, reads, keeps a session and its locks, and asks again under the same request id
//! when an answer did not come. Names are few, so that clients meet.

use crate::oracle::ledger::{Intent, value};
use crate::oracle::linear;
use crate::random::Random;
use std::collections::BTreeSet;
use tenure_machine::*;

pub const NS: NamespaceId = NamespaceId::DEFAULT;
/// Keys that only puts and deletes change: judged as registers.
pub const REGISTERS: u64 = 5;
/// Keys that belong to sessions.
const ATTACHED: u64 = 3;
const LOCKS: u64 = 2;

/// One thing that a client wants, over all its tries.
#[derive(Clone, Debug)]
pub struct Call {
    pub number: u64,
    pub client: usize,
    pub what: What,
    pub txn: Txn,
    /// The step of the first try.
    pub began: u64,
    /// The member's uptime at the first try.
    pub sent_ms: u64,
    /// What had been acknowledged to anybody by then.
    pub revision_before: u64,
    /// For an acquire: the newest token of the name that anybody had been told.
    pub token_before: Option<Revision>,
    pub tries: u32,
    /// Its answer would be a remembered one.
    pub unknown: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum What {
    Write,
    Read,
    Compact,
    SessionCreate {
        id: SessionId,
        ttl_ms: u64,
    },
    Renew {
        session: SessionId,
    },
    SessionEnd {
        session: SessionId,
    },
    Acquire {
        name: Vec<u8>,
        session: SessionId,
    },
    Release {
        name: Vec<u8>,
        session: SessionId,
        token: Revision,
    },
    Cancel,
    /// A write that a lock guards.
    Guarded {
        name: Vec<u8>,
        token: Revision,
    },
}

#[derive(Clone, Debug, Default)]
pub struct Client {
    pub session: Option<(SessionId, SessionToken, u64)>,
    pub renew_at_ms: u64,
    /// A client that has lost its heart lets its session run out.
    pub renews: bool,
    pub held: Vec<(Vec<u8>, Revision)>,
    /// Tokens that it lost or released, to be tried again as a paused owner would.
    pub stale: Vec<(Vec<u8>, Revision)>,
    pub next_seq: u64,
    /// Open numbered requests, the lowest of which says what is acknowledged.
    pub open_seqs: Vec<u64>,
    pub series: Series,
    pub open: usize,
}

/// What a client numbers without a session.
#[derive(Clone, Debug, Default)]
pub struct Series {
    id: u64,
    newest: u64,
    open: BTreeSet<u64>,
}

impl Series {
    fn begin(&mut self, random: &mut Random) -> RequestId {
        if self.newest == 0 || random.chance(1, 30) {
            *self = Self { id: random.u64(), ..Self::default() };
        }
        self.newest += 1;
        self.open.insert(self.newest);
        RequestId::Series { series: self.id, seq: self.newest, acked_below: self.acked_below() }
    }

    fn acked_below(&self) -> u64 {
        self.open.first().copied().unwrap_or(self.newest + 1)
    }
}

impl Client {
    /// What has been answered meanwhile is told with another try, too.
    pub fn acknowledge(&self, request: &mut Option<RequestId>) {
        if let Some(RequestId::Series { series, acked_below, .. }) = request
            && *series == self.series.id
        {
            *acked_below = self.series.acked_below();
        }
    }

    /// Its answer has arrived, or it is given up.
    pub fn close_request(&mut self, request: Option<RequestId>) {
        match request {
            Some(RequestId::Session { session, seq, .. }) if self.session.is_some_and(|(own, ..)| own == session) => {
                self.open_seqs.retain(|open| *open != seq);
            }
            Some(RequestId::Series { series, seq, .. }) if series == self.series.id => {
                self.series.open.remove(&seq);
            }
            _ => {}
        }
    }
}

pub fn register(n: u64) -> Key {
    Key::new(Space::Keys, NS, format!("k{n}").as_bytes())
}

pub fn is_register(key: &[u8]) -> bool {
    key.get(Key::PREFIX) == Some(&b'k')
}

fn attached(n: u64) -> Key {
    Key::new(Space::Keys, NS, format!("a{n}").as_bytes())
}

fn lock_name(random: &mut Random) -> Vec<u8> {
    format!("lock{}", random.below(LOCKS)).into_bytes()
}

fn put(key: Key, call: u64, random: &mut Random, session: SessionId, prev: bool) -> Op {
    let padding = match random.below(6) {
        0 => random.below(6000),
        1 => random.below(900),
        _ => random.below(40),
    };
    let value = value(call, padding as usize);
    Op::Put(Put { key, value, session, prev, keep_value: false, keep_session: false })
}

/// Sets of everything that is read by one read.
pub fn read_spans() -> Span {
    Span { start: register(0), end: Some(register(REGISTERS)) }
}

/// Draws the next thing that this client does.
pub fn draw(number: u64, index: usize, client: &Client, newest: u64, random: &mut Random) -> (What, Txn, Intent) {
    let none = Intent::default;
    let Some((session, token, _)) = client.session else {
        return match random.weighted(&[3, 5, 3, 1]) {
            0 => create_session(index, number, random),
            1 => write(number, random),
            2 => (What::Read, Txn::default(), none()),
            _ => delete(random),
        };
    };
    match random.weighted(&[10, 3, 6, 5, 6, 4, 2, 4, 3, 1, 1]) {
        0 => write(number, random),
        1 => delete(random),
        2 => (What::Read, Txn::default(), none()),
        3 => {
            let name = lock_name(random);
            let acquire = LockAcquire {
                name: name.clone().into(),
                session,
                create: None,
                owner: Box::default(),
                mode: LockMode::Exclusive,
                wait: *random.pick(&[Wait::None, Wait::Ms(400), Wait::Ms(5_000), Wait::Forever]),
            };
            (What::Acquire { name, session }, Txn::of(Op::LockAcquire(acquire)), none())
        }
        4 if !client.held.is_empty() => {
            let (name, token) = random.pick(&client.held).clone();
            release(name, session, token)
        }
        5 if !client.held.is_empty() => {
            let (name, token) = random.pick(&client.held).clone();
            guarded(number, name, token, random)
        }
        6 if !client.stale.is_empty() => {
            let (name, token) = random.pick(&client.stale).clone();
            if random.coin() { release(name, session, token) } else { guarded(number, name, token, random) }
        }
        7 => {
            let key = attached(random.below(ATTACHED));
            let txn = Txn::of(put(key.clone(), number, random, session, false));
            (What::Write, txn, Intent { puts: vec![key], optional: true, ..none() })
        }
        8 => {
            let name = lock_name(random).into();
            (What::Cancel, Txn::of(Op::LockCancel { name, session, request: None }), none())
        }
        9 => {
            let txn = Txn::of(Op::SessionEnd { session, token: random.coin().then_some(token) });
            (What::SessionEnd { session }, txn, none())
        }
        10 => {
            let back = random.below(30);
            let revision = newest.saturating_sub(back) as i64;
            (What::Compact, Txn::of(Op::Compact { revision }), none())
        }
        _ => write(number, random),
    }
}

fn create_session(index: usize, number: u64, random: &mut Random) -> (What, Txn, Intent) {
    let id = SessionId(1 + index as u64 + 100 * number);
    let ttl_ms = random.between(20, 60) * 100;
    let create = SessionCreate {
        id,
        face: if random.chance(3, 4) { SessionFace::Native } else { SessionFace::Etcd },
        ttl_ms,
        on_expire: if random.chance(3, 4) { OnExpire::Delete } else { OnExpire::Release },
        name: "simulated".into(),
        metadata: Vec::new(),
        alias: None,
        secret: None,
    };
    (What::SessionCreate { id, ttl_ms }, Txn::of(Op::SessionCreate(create)), Intent::default())
}

fn release(name: Vec<u8>, session: SessionId, token: Revision) -> (What, Txn, Intent) {
    let txn = Txn::of(Op::LockRelease { name: name.clone().into(), session, token });
    (What::Release { name, session, token }, txn, Intent::default())
}

fn guarded(number: u64, name: Vec<u8>, token: Revision, random: &mut Random) -> (What, Txn, Intent) {
    let key = register(random.below(REGISTERS));
    let mut txn = Txn::of(put(key.clone(), number, random, SessionId(0), false));
    txn.requires.push(RequireLock { name: name.clone().into(), token });
    (What::Guarded { name, token }, txn, Intent { puts: vec![key], optional: true, ..Intent::default() })
}

/// One to three keys in one commit, now and then under a compare.
fn write(number: u64, random: &mut Random) -> (What, Txn, Intent) {
    let count = if random.chance(1, 3) { random.between(2, 3) } else { 1 };
    let first = random.below(REGISTERS);
    let keys: Vec<Key> = (0..count).map(|i| register((first + i) % REGISTERS)).collect();
    let prev = random.coin();
    let mut txn = Txn::default();
    for key in &keys {
        txn.then.push(put(key.clone(), number, random, SessionId(0), prev));
    }
    if random.chance(1, 5) {
        let target = CompareTarget::Version(random.below(3) as i64);
        txn.compares.push(Compare { span: Span::one(keys[0].clone()), relation: Relation::Greater, target });
        txn.otherwise.push(Op::Range(Range::of(read_spans())));
    }
    (What::Write, txn, Intent { puts: keys, optional: true, ..Intent::default() })
}

fn delete(random: &mut Random) -> (What, Txn, Intent) {
    let (a, b) = (random.below(REGISTERS), random.below(REGISTERS));
    let span = match random.coin() {
        true => Span::one(register(a)),
        false => Span { start: register(a.min(b)), end: Some(register(a.max(b) + 1)) },
    };
    let txn = Txn::of(Op::Delete(Delete { span: span.clone(), prev: true }));
    (What::Write, txn, Intent { deletes: vec![span], optional: true, ..Intent::default() })
}

/// Gives a call an id under which it may be asked again.
pub fn number_request(client: &mut Client, random: &mut Random, what: &What) -> Option<RequestId> {
    if matches!(what, What::Read | What::Renew { .. }) || random.chance(1, 3) {
        return None;
    }
    match client.session {
        Some((session, _, _)) if random.chance(2, 3) && !matches!(what, What::SessionEnd { .. }) => {
            client.next_seq += 1;
            client.open_seqs.push(client.next_seq);
            let acked_below = client.open_seqs.iter().copied().min().unwrap_or(client.next_seq);
            Some(RequestId::Session { session, seq: client.next_seq, acked_below })
        }
        _ if random.coin() => Some(client.series.begin(random)),
        _ => Some(RequestId::Uuid(random.bytes())),
    }
}

/// An answer that a caller gets only after it has said that it has it.
pub fn is_disowned(request: &Option<RequestId>, result: &Result<TxnReply, Rejection>) -> bool {
    let series = matches!(request, Some(RequestId::Series { .. }));
    series && matches!(result, Err(why) if why.leaves_open())
}

pub fn registers_in(span: &Span) -> impl Iterator<Item = Key> {
    (0..REGISTERS).map(register).filter(|k| span.contains(k.as_bytes()))
}

/// What a transaction does to the registers if it is done.
pub fn writes(txn: &Txn) -> Vec<(Vec<u8>, linear::Value)> {
    let mut all = Vec::new();
    for op in &txn.then {
        match op {
            Op::Put(put) if is_register(put.key.as_bytes()) => {
                all.push((put.key.as_bytes().to_vec(), writer_of(&put.value)));
            }
            Op::Delete(delete) => all.extend(registers_in(&delete.span).map(|k| (k.as_bytes().to_vec(), None))),
            _ => {}
        }
    }
    all
}

fn writer_of(value: &[u8]) -> Option<u64> {
    value.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes)
}
