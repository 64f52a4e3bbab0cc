//! Command lists against a naive model: no indexes, no undo list, no shared bytes; a refused transaction is a copy put back.

use proptest::prelude::*;
use std::collections::BTreeMap;
use tenure_machine::*;

/// What may be done next, before tokens and numbers are filled in from the state.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Do(Vec<Do>, Option<Id>),
    /// Log time passes.
    Pass(u64),
    /// The leader changes.
    Term,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Id {
    OneShot(u8),
    Numbered(u8, u64, u64),
    Series(u8, u64, u64),
}

#[derive(Clone, Debug)]
pub(crate) enum Do {
    Put(u8, u8, u8),
    Delete(u8, u8),
    Get(u8, u8),
    Compact(i64),
    Create(u8, bool, bool),
    End(u8, bool),
    /// Session, of the right incarnation, in the right term.
    Expire(u8, bool, bool),
    Acquire(u8, u8, u8, Wait, bool),
    Release(u8, u8, bool),
    Cancel(u8, u8),
    /// Id, name, peer, whether a learner, whom it replaces.
    Add(u64, u8, u8, bool, Option<u64>),
    Promote(u64),
    Remove(u64),
    Update(u64, u8),
    /// Id, storage, boots, peer, behaviour.
    Register(u64, u8, u64, u8, u16),
    Saw(u64, u64),
    Raise,
}

fn wait() -> impl Strategy<Value = Wait> {
    prop_oneof![Just(Wait::None), Just(Wait::Forever), (1..40u64).prop_map(Wait::Ms)]
}

fn one() -> impl Strategy<Value = Do> {
    prop_oneof![
        4 => (0..5u8, any::<u8>(), 0..5u8).prop_map(|(k, v, s)| Do::Put(k, v, s)),
        2 => (0..5u8, 0..6u8).prop_map(|(a, b)| Do::Delete(a, b)),
        1 => (0..5u8, 0..6u8).prop_map(|(a, b)| Do::Get(a, b)),
        1 => (0..6i64).prop_map(Do::Compact),
        4 => (1..5u8, any::<bool>(), any::<bool>()).prop_map(|(s, n, r)| Do::Create(s, n, r)),
        1 => (1..5u8, any::<bool>()).prop_map(|(s, t)| Do::End(s, t)),
        1 => (1..5u8, any::<bool>(), any::<bool>()).prop_map(|(s, i, t)| Do::Expire(s, i, t)),
        8 => (0..3u8, 1..5u8, 0..3u8, wait(), prop::bool::weighted(0.1)).prop_map(|(l, s, o, w, c)| Do::Acquire(l, s, o, w, c)),
        5 => (0..3u8, 1..5u8, prop::bool::weighted(0.9)).prop_map(|(l, s, t)| Do::Release(l, s, t)),
        1 => (0..3u8, 1..5u8).prop_map(|(l, s)| Do::Cancel(l, s)),
        1 => member(),
    ]
}

fn member() -> impl Strategy<Value = Do> {
    prop_oneof![
        6 => (0..6u64, 0..6u8, 0..6u8, any::<bool>(), prop::option::weighted(0.3, 1..6u64))
            .prop_map(|(id, name, peer, learner, old)| Do::Add(id, name, peer, learner, old)),
        2 => (1..6u64).prop_map(Do::Promote),
        2 => (1..6u64).prop_map(Do::Remove),
        1 => (1..6u64, 0..6u8).prop_map(|(id, peer)| Do::Update(id, peer)),
        4 => (1..6u64, 0..3u8, 1..4u64, 0..6u8, 1..4u16)
            .prop_map(|(id, storage, boots, peer, able)| Do::Register(id, storage, boots, peer, able)),
        1 => (1..6u64, 0..9u64).prop_map(|(id, index)| Do::Saw(id, index)),
        1 => Just(Do::Raise),
    ]
}

/// Lists about members mostly.
fn member_steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (member(), id()).prop_map(|(op, id)| Step::Do(vec![op], id)),
        1 => (one(), id()).prop_map(|(op, id)| Step::Do(vec![op], id)),
    ];
    prop::collection::vec(step, 1..60)
}

fn id() -> impl Strategy<Value = Option<Id>> {
    prop_oneof![
        4 => Just(None),
        2 => (0..6u8).prop_map(|n| Some(Id::OneShot(n))),
        2 => (1..5u8, 0..6u64, 0..3u64).prop_map(|(s, n, a)| Some(Id::Numbered(s, n, a))),
        2 => (1..4u8, 0..6u64, 0..3u64).prop_map(|(s, n, a)| Some(Id::Series(s, n, a))),
    ]
}

pub(crate) fn steps(len: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        12 => (prop::collection::vec(one(), 1..2), id()).prop_map(|(ops, id)| Step::Do(ops, id)),
        3 => (prop::collection::vec(one(), 2..6), id()).prop_map(|(ops, id)| Step::Do(ops, id)),
        2 => (0..15u64).prop_map(Step::Pass),
        1 => Just(Step::Pass(599_990)),
        1 => Just(Step::Term),
    ];
    prop::collection::vec(step, 1..len)
}

pub(crate) const LIMITS: [(Limit, u64); 5] = [
    (Limit::LockWaiters, 3),
    (Limit::SessionThings, 4),
    (Limit::SessionRequests, 3),
    (Limit::OneShotRequests, 3),
    (Limit::RingChanges, 20),
];

#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) stamp: u64,
    revision: u64,
    compacted: i64,
    keys: BTreeMap<Vec<u8>, (u8, u64)>,
    sessions: BTreeMap<u64, Session>,
    locks: BTreeMap<Vec<u8>, Hold>,
    queue: Vec<Waiter>,
    known: Vec<Known>,
    acked: BTreeMap<u64, u64>,
    /// What is acknowledged of each series, and when it was used last.
    series: BTreeMap<u64, (u64, u64)>,
    members: Vec<MemberRecord>,
    behaviour: u16,
    // Of the running transaction.
    changed: bool,
    granted: Vec<Vec<u8>>,
    created: Vec<u64>,
    late: Vec<(Waiter, Result<String, String>)>,
    ended: Vec<u64>,
}

#[derive(Clone, Debug)]
struct Session {
    token: u64,
    native: bool,
    release: bool,
    released: Vec<(Vec<u8>, u64)>,
}

#[derive(Clone, Debug)]
struct Hold {
    session: u64,
    owner: Vec<u8>,
    token: u64,
}

#[derive(Clone, Debug)]
struct Waiter {
    lock: Vec<u8>,
    session: u64,
    owner: Vec<u8>,
    deadline: Option<u64>,
    ticket: u64,
    txn: Txn,
}

#[derive(Clone, Debug)]
struct Known {
    request: RequestId,
    txn: Txn,
    /// When, and what; `None` while it waits.
    answer: Option<(u64, String)>,
}

type Said = Vec<(u64, String)>;

fn key(n: u8) -> Key {
    Key::new(Space::Keys, NamespaceId::DEFAULT, &[b'a' + n])
}

fn lock_name(n: u8) -> Box<[u8]> {
    Box::from([b'x' + n])
}

fn word(n: u8) -> Box<str> {
    if n == 0 { Box::default() } else { format!("w{n}").into() }
}

fn is_live(member: &MemberRecord) -> bool {
    member.role != MemberRole::Removed
}

fn owner(n: u8) -> Box<[u8]> {
    if n == 0 { Box::default() } else { Box::from([b'0' + n]) }
}

fn span(a: u8, b: u8) -> Span {
    Span { start: key(a), end: (b > a).then(|| key(b)) }
}

fn create(s: u8, native: bool, release: bool) -> SessionCreate {
    SessionCreate {
        id: SessionId(u64::from(s)),
        face: if native { SessionFace::Native } else { SessionFace::Etcd },
        ttl_ms: 1000,
        on_expire: if release { OnExpire::Release } else { OnExpire::Delete },
        name: "".into(),
        metadata: Vec::new(),
        alias: None,
        secret: None,
    }
}

fn base(request: &RequestId) -> RequestId {
    match *request {
        RequestId::Session { session, seq, .. } => RequestId::Session { session, seq, acked_below: 0 },
        RequestId::Series { series, seq, .. } => RequestId::Series { series, seq, acked_below: 0 },
        uuid => uuid,
    }
}

impl Model {
    pub(crate) fn new() -> Self {
        Self { term: 1, revision: 1, compacted: -1, behaviour: 1, ..Self::default() }
    }

    /// The transaction of a step, with the tokens of now.
    pub(crate) fn txn(&self, ops: &[Do], id: Option<Id>) -> Txn {
        let request = id.map(|id| match id {
            Id::OneShot(n) => RequestId::Uuid([n; 16]),
            Id::Numbered(s, seq, acked_below) => {
                RequestId::Session { session: SessionId(u64::from(s)), seq, acked_below }
            }
            Id::Series(s, seq, acked_below) => RequestId::Series { series: u64::from(s), seq, acked_below },
        });
        Txn { then: ops.iter().map(|op| self.op(op)).collect(), request, ..Txn::default() }
    }

    fn op(&self, op: &Do) -> Op {
        let sid = |s: &u8| SessionId(u64::from(*s));
        let token = |s: &u8| self.sessions.get(&u64::from(*s)).map_or(99, |s| s.token);
        match op {
            Do::Put(k, v, s) => Op::Put(Put {
                key: key(*k),
                value: Box::from([*v]),
                session: sid(s),
                prev: false,
                keep_value: false,
                keep_session: false,
            }),
            Do::Delete(a, b) => Op::Delete(Delete { span: span(*a, *b), prev: false }),
            Do::Get(a, b) => Op::Range(Range::of(span(*a, *b))),
            Do::Compact(back) => Op::Compact { revision: self.revision as i64 - back + 1 },
            Do::Create(s, native, release) => Op::SessionCreate(create(*s, *native, *release)),
            Do::End(s, with) => Op::SessionEnd { session: sid(s), token: with.then(|| token(s)) },
            Do::Expire(s, right, now) => Op::SessionExpire {
                session: sid(s),
                token: if *right { token(s) } else { 1 },
                term: Term(if *now { self.term } else { self.term.wrapping_sub(1) }),
            },
            Do::Acquire(l, s, o, wait, make) => Op::LockAcquire(LockAcquire {
                name: lock_name(*l),
                session: if *make { SessionId(0) } else { sid(s) },
                create: make.then(|| create(*s, *o != 1, false)),
                owner: owner(*o),
                mode: LockMode::Exclusive,
                wait: *wait,
            }),
            Do::Release(l, s, right) => {
                let held = self.locks.get(&lock_name(*l)[..]).filter(|_| *right);
                Op::LockRelease {
                    name: lock_name(*l),
                    session: held.map_or(sid(s), |h| SessionId(h.session)),
                    token: Revision(held.map_or(5, |h| h.token)),
                }
            }
            Do::Cancel(l, s) => Op::LockCancel { name: lock_name(*l), session: sid(s), request: None },
            Do::Add(id, name, peer, learner, replaces) => Op::MemberAdd {
                id: MemberId(*id),
                name: word(*name),
                peer: word(*peer),
                role: if *learner { MemberRole::Learner } else { MemberRole::Voter },
                replaces: replaces.map(MemberId),
                join: [1; 32],
            },
            Do::Promote(id) => Op::MemberPromote { id: MemberId(*id) },
            Do::Remove(id) => Op::MemberRemove { id: MemberId(*id) },
            Do::Update(id, peer) => Op::MemberUpdate { id: MemberId(*id), peer: word(*peer) },
            Do::Register(id, storage, boots, peer, behaviour) => Op::MemberRegister {
                id: MemberId(*id),
                storage: [*storage; 16],
                boots: *boots,
                peer: word(*peer),
                clients: vec!["c".into()],
                behaviour: *behaviour,
                release: "r".into(),
            },
            Do::Saw(id, index) => Op::MemberSeen { id: MemberId(*id), index: Index(*index) },
            Do::Raise => Op::RaiseBehaviour { to: 2 },
        }
    }

    /// Applies one entry; what is said to whom, in order.
    pub(crate) fn entry(&mut self, txns: &[(u64, Txn)]) -> Said {
        self.index += 1;
        let mut said = Vec::new();
        loop {
            let due = |w: &&Waiter| w.deadline.is_some_and(|d| d <= self.stamp);
            let Some(first) = self.queue.iter().filter(due).map(|w| w.deadline).min() else { break };
            let place = self.queue.iter().position(|w| w.deadline == first).unwrap();
            let waiter = self.queue.remove(place);
            self.tell(waiter, Err("TimeoutWaiting".into()), &mut said);
        }
        let now = self.stamp;
        self.known.retain(|k| {
            !(matches!(k.request, RequestId::Uuid(_)) && k.answer.as_ref().is_some_and(|(at, _)| at + 600_000 <= now))
        });
        loop {
            let unused = self.series.iter().map(|(id, (_, used))| (*used, *id)).min();
            let Some((_, id)) = unused.filter(|(used, _)| used + 601_000 <= now) else { break };
            let its = |k: &Known| matches!(k.request, RequestId::Series { series, .. } if series == id);
            if self.known.iter().any(|k| its(k) && k.answer.is_none()) {
                self.use_series(id);
            } else {
                self.known.retain(|k| !its(k));
                self.series.remove(&id);
            }
        }
        for (ticket, txn) in txns {
            if let Some(answer) = self.answer(*ticket, txn, &mut said) {
                said.push((*ticket, answer));
            }
        }
        said
    }

    fn tell(&mut self, waiter: Waiter, result: Result<String, String>, said: &mut Said) {
        let text = self.text(&result);
        if let Some(request) = &waiter.txn.request {
            let request = base(request);
            if let Some(known) = self.known.iter_mut().find(|k| k.request == request && k.answer.is_none()) {
                known.answer = Some((self.stamp, text.clone()));
                if let RequestId::Series { series, .. } = request {
                    self.use_series(series);
                }
            }
        }
        said.push((waiter.ticket, text));
    }

    /// To a second.
    fn use_series(&mut self, id: u64) {
        let now = self.stamp;
        if let Some((_, used)) = self.series.get_mut(&id).filter(|(_, used)| *used + 1000 <= now) {
            *used = now;
        }
    }

    fn text(&self, result: &Result<String, String>) -> String {
        match result {
            Ok(text) => format!("{} ok {text}", self.revision),
            Err(text) => format!("{} no {text}", self.revision),
        }
    }

    fn answer(&mut self, ticket: u64, txn: &Txn, said: &mut Said) -> Option<String> {
        let plain = Txn { request: None, ..txn.clone() };
        let Some(request) = &txn.request else { return self.run(ticket, txn, said).map(|r| self.text(&r)) };
        let no = |model: &Self, what: &str| Some(model.text(&Err(what.to_string())));
        let mut incarnation = 0;
        if let RequestId::Session { session, seq, acked_below } = request {
            let Some(live) = self.sessions.get(&session.0) else { return no(self, "Refused") };
            incarnation = live.token;
            let acked = self.acked.entry(session.0).or_default();
            *acked = (*acked).max(*acked_below);
            let acked = *acked;
            self.known.retain(
                |k| !matches!(k.request, RequestId::Session { session: s, seq, .. } if s == *session && seq < acked),
            );
            if *seq < acked {
                return Some(self.text(&Err("Refused".into())));
            }
        }
        if let RequestId::Series { series, seq, acked_below } = request {
            let limited = |kept: &Known| matches!(kept.request, RequestId::Uuid(_));
            if !self.series.contains_key(series) {
                if self.known.iter().filter(|k| limited(k)).count() + self.series.len() >= 3 {
                    return no(self, "RateLimited");
                }
                if seq < acked_below {
                    return no(self, "Refused");
                }
                self.series.insert(*series, (*acked_below, self.stamp));
            }
            let (acked, _) = self.series.get_mut(series).unwrap();
            *acked = (*acked).max(*acked_below);
            let acked = *acked;
            self.known.retain(
                |k| !matches!(k.request, RequestId::Series { series: s, seq, .. } if s == *series && seq < acked),
            );
            self.use_series(*series);
            if *seq < acked {
                return Some(self.text(&Err("Refused".into())));
            }
        }
        let request = base(request);
        if let Some(known) = self.known.iter().find(|k| k.request == request) {
            if known.txn != plain {
                return Some(self.text(&Err("Mismatch".into())));
            }
            if let Some((_, answer)) = &known.answer {
                return Some(format!("again {answer}"));
            }
            let waiter = self.queue.iter_mut().find(|w| w.txn.request.as_ref().map(base) == Some(request));
            waiter.unwrap().ticket = ticket;
            return None;
        }
        let same_kind = |k: &&Known| match (&k.request, &request) {
            (RequestId::Session { session: a, .. }, RequestId::Session { session: b, .. }) => a == b,
            (RequestId::Series { series: a, .. }, RequestId::Series { series: b, .. }) => a == b,
            (RequestId::Uuid(_), RequestId::Uuid(_)) => true,
            _ => false,
        };
        let series = if matches!(request, RequestId::Uuid(_)) { self.series.len() } else { 0 };
        if self.known.iter().filter(same_kind).count() + series >= 3 {
            return Some(self.text(&Err("RateLimited".into())));
        }
        let result = self.run(ticket, txn, said);
        let answer = result.as_ref().map(|r| (self.stamp, self.text(r)));
        let still = match request {
            RequestId::Session { session, .. } => self.sessions.get(&session.0).is_some_and(|s| s.token == incarnation),
            RequestId::Uuid(_) => true,
            RequestId::Series { series, .. } => {
                self.use_series(series);
                true
            }
        };
        if still {
            self.known.push(Known { request, txn: plain, answer: answer.clone() });
        }
        answer.map(|(_, text)| text)
    }

    fn run(&mut self, ticket: u64, txn: &Txn, said: &mut Said) -> Option<Result<String, String>> {
        let puts: Vec<_> =
            txn.then.iter().filter_map(|op| if let Op::Put(p) = op { Some(p.key.clone()) } else { None }).collect();
        for (i, put) in puts.iter().enumerate() {
            let deleted = txn.then.iter().any(|op| matches!(op, Op::Delete(d) if d.span.contains(put.as_bytes())));
            if deleted || puts[..i].contains(put) {
                return Some(Err("DuplicateKey".into()));
            }
        }
        let before = self.clone();
        (self.changed, self.granted, self.created, self.late, self.ended) = Default::default();
        let mut results = Vec::new();
        let mut waits = false;
        for op in &txn.then {
            match self.one(op, txn, ticket) {
                Ok(Some(result)) => results.push(result),
                Ok(None) => waits = true,
                Err(refusal) => {
                    *self = before;
                    return Some(Err(refusal));
                }
            }
        }
        if self.changed {
            self.revision += 1;
        }
        for session in std::mem::take(&mut self.ended) {
            self.acked.remove(&session);
            self.known.retain(|k| !matches!(k.request, RequestId::Session { session: s, .. } if s.0 == session));
        }
        for (waiter, result) in std::mem::take(&mut self.late) {
            self.tell(waiter, result, said);
        }
        if waits { None } else { Some(Ok(results.join(","))) }
    }

    fn things(&self, session: u64) -> usize {
        self.keys.values().filter(|(_, s)| *s == session).count()
            + self.locks.values().filter(|h| h.session == session).count()
            + self.queue.iter().filter(|w| w.session == session).count()
    }

    fn is_native(&self, session: u64) -> bool {
        self.sessions.get(&session).is_some_and(|s| s.native)
    }

    fn one(&mut self, op: &Op, txn: &Txn, ticket: u64) -> Result<Option<String>, String> {
        let alone = txn.then.len() == 1;
        let no = |what: &str| Err(what.to_string());
        Ok(Some(match op {
            Op::Put(p) => {
                let s = p.session.0;
                if s != 0 && !self.sessions.contains_key(&s) {
                    return no("SessionNotFound");
                }
                let own = self.keys.get(p.key.as_bytes()).is_some_and(|(_, o)| *o == s);
                if self.is_native(s) && !own && self.things(s) >= 4 {
                    return no("Quota");
                }
                self.keys.insert(p.key.as_bytes().to_vec(), (p.value[0], s));
                self.changed = true;
                "put".into()
            }
            Op::Delete(d) => {
                let before = self.keys.len();
                self.keys.retain(|k, _| !d.span.contains(k));
                self.changed |= before > self.keys.len();
                format!("deleted {}", before - self.keys.len())
            }
            Op::Range(r) => {
                let found = self.keys.iter().filter(|(k, _)| r.span.contains(k));
                let found: Vec<_> = found.map(|(k, (v, o))| format!("{}={v}/{o}", k[5])).collect();
                format!("[{}]", found.join(" "))
            }
            Op::Compact { revision } => match () {
                () if !alone => return no("Invalid"),
                () if *revision <= self.compacted => return no("Compacted"),
                () if *revision > self.revision as i64 => return no("FutureRevision"),
                () => {
                    self.compacted = *revision;
                    "compacted".into()
                }
            },
            Op::SessionCreate(c) => {
                let token = self.create(c)?;
                format!("session {} {token}", c.id)
            }
            Op::SessionEnd { session, token } => {
                match (self.sessions.get(&session.0), token) {
                    (None, None) => return no("SessionNotFound"),
                    (None, Some(_)) => return no("SessionExpired"),
                    (Some(s), Some(t)) if s.token != *t => return no("SessionExpired"),
                    _ => self.end(session.0)?,
                }
                "ended".into()
            }
            Op::SessionExpire { session, token, term } => {
                let live = self.sessions.get(&session.0).is_some_and(|s| s.token == *token);
                if !live || term.0 != self.term {
                    return Ok(Some("done".into()));
                }
                self.end(session.0)?;
                "ended".into()
            }
            Op::LockAcquire(a) => return self.acquire(a, alone, txn, ticket),
            Op::LockRelease { name, session, token } => {
                let held = self.locks.get(&name[..]).is_some_and(|h| h.session == session.0 && h.token == token.0);
                if !held {
                    let again =
                        self.sessions.get(&session.0).is_some_and(|s| s.released.contains(&(name.to_vec(), token.0)));
                    return if again { Ok(Some("released".into())) } else { no("Fenced") };
                }
                self.free(name)?;
                if let Some(s) = self.sessions.get_mut(&session.0) {
                    s.released.push((name.to_vec(), token.0));
                    if s.released.len() > 8 {
                        s.released.remove(0);
                    }
                }
                "released".into()
            }
            Op::LockCancel { name, session, .. } => {
                let gone = self.take_waits(|w| w.lock == name[..] && w.session == session.0, "Cancelled");
                format!("cancelled {gone}")
            }
            _ if !alone => return no("Invalid"),
            Op::RaiseBehaviour { to } => {
                let must = |m: &&MemberRecord| m.role == MemberRole::Voter || (is_live(m) && m.boots > 0);
                if self.members.iter().filter(must).any(|m| m.behaviour < *to) {
                    return no("Invalid");
                }
                self.behaviour = *to;
                "done".into()
            }
            op => format!("{:?}", self.member(op)?),
        }))
    }

    /// The member as it is after the operation.
    fn member(&mut self, op: &Op) -> Result<MemberRecord, String> {
        let no = |what: &str| Err(what.to_string());
        let (Op::MemberAdd { id, .. }
        | Op::MemberPromote { id }
        | Op::MemberRemove { id }
        | Op::MemberUpdate { id, .. }
        | Op::MemberRegister { id, .. }
        | Op::MemberSeen { id, .. }) = op
        else {
            panic!("{op:?}")
        };
        let place = self.members.iter().position(|m| m.id == *id);
        let mut new = match (op, place) {
            (Op::MemberAdd { name, peer, .. }, _) if id.0 == 0 || name.is_empty() || peer.is_empty() => {
                return no("Invalid");
            }
            (Op::MemberAdd { .. }, Some(_)) => return no("MemberExists"),
            (Op::MemberAdd { name, peer, role, replaces, join, .. }, None) => MemberRecord {
                id: *id,
                name: name.clone(),
                peer: peer.clone(),
                clients: Vec::new(),
                role: *role,
                replaces: *replaces,
                storage: [0; 16],
                boots: 0,
                seen: Index(0),
                behaviour: 0,
                release: "".into(),
                join: *join,
            },
            (_, None) => return no("NotFound"),
            (_, Some(place)) if !is_live(&self.members[place]) => return no("MemberRemoved"),
            (_, Some(place)) => self.members[place].clone(),
        };
        match op {
            Op::MemberPromote { .. } if new.role == MemberRole::Voter => return no("Invalid"),
            Op::MemberPromote { .. } => new.role = MemberRole::Voter,
            Op::MemberRemove { .. } if self.is_last(&new) => return no("Invalid"),
            Op::MemberRemove { .. } => (new.role, new.clients) = (MemberRole::Removed, Vec::new()),
            Op::MemberUpdate { peer, .. } if peer.is_empty() => return no("Invalid"),
            Op::MemberUpdate { peer, .. } => new.peer = peer.clone(),
            Op::MemberRegister { storage, boots, peer, clients, behaviour, release, .. } => {
                match () {
                    () if *storage == [0; 16] => return no("Invalid"),
                    () if new.boots > 0 && new.storage != *storage => return no("OtherStorage"),
                    () if *boots < new.boots => return no("RolledBack"),
                    () if *behaviour < self.behaviour => return no("Invalid"),
                    () => {}
                }
                (new.storage, new.boots, new.behaviour) = (*storage, *boots, *behaviour);
                (new.clients, new.release) = (clients.clone(), release.clone());
                if !peer.is_empty() {
                    new.peer = peer.clone();
                }
            }
            Op::MemberSeen { index, .. } => new.seen = new.seen.max(*index),
            _ => {}
        }
        if is_live(&new) {
            for other in self.members.iter().filter(|m| is_live(m) && m.id != *id) {
                let pair = other.replaces == Some(*id) || new.replaces == Some(other.id);
                if other.name == new.name || (other.peer == new.peer && !pair) {
                    return no("MemberExists");
                }
            }
        }
        if let (Op::MemberAdd { .. }, Some(old)) = (op, new.replaces) {
            let Some(gone) = self.members.iter().find(|m| m.id == old) else { return no("NotFound") };
            if !is_live(gone) {
                return no("MemberRemoved");
            }
            let twice = self.members.iter().any(|m| is_live(m) && m.replaces == Some(old));
            if new.role != MemberRole::Voter || twice || self.is_last(gone) {
                return no("Invalid");
            }
        }
        self.members.retain(|m| m.id != *id);
        self.members.push(new.clone());
        Ok(new)
    }

    fn is_last(&self, member: &MemberRecord) -> bool {
        let others: Vec<_> = self.members.iter().filter(|m| m.role == MemberRole::Voter && m.id != member.id).collect();
        let come = others.iter().filter(|m| m.boots > 0).count();
        member.role == MemberRole::Voter && (others.is_empty() || (member.boots > 0 && come == 0))
    }

    fn take_waits(&mut self, which: impl Fn(&Waiter) -> bool, why: &str) -> usize {
        let (gone, stay): (Vec<_>, Vec<_>) = std::mem::take(&mut self.queue).into_iter().partition(which);
        self.queue = stay;
        let count = gone.len();
        self.late.extend(gone.into_iter().map(|w| (w, Err(why.to_string()))));
        count
    }

    fn create(&mut self, c: &SessionCreate) -> Result<u64, String> {
        self.check_create(c)?;
        let native = c.face == SessionFace::Native;
        let token = if native { self.revision + 1 } else { self.index };
        self.changed |= native;
        self.created.push(c.id.0);
        let release = c.on_expire == OnExpire::Release;
        self.sessions.insert(c.id.0, Session { token, native, release, released: Vec::new() });
        Ok(token)
    }

    fn check_create(&self, c: &SessionCreate) -> Result<(), String> {
        match () {
            () if self.sessions.contains_key(&c.id.0) => Err("SessionExists".into()),
            () if self.created.contains(&c.id.0) => Err("Invalid".into()),
            () => Ok(()),
        }
    }

    fn end(&mut self, id: u64) -> Result<(), String> {
        self.take_waits(|w| w.session == id, "SessionExpired");
        let session = self.sessions[&id].clone();
        let owned = self.keys.values().any(|(_, o)| *o == id);
        self.changed |= owned || session.native;
        if session.release {
            self.keys.values_mut().filter(|(_, o)| *o == id).for_each(|(_, o)| *o = 0);
        } else {
            self.keys.retain(|_, (_, o)| *o != id);
        }
        let locks: Vec<_> = self.locks.iter().filter(|(_, h)| h.session == id).map(|(name, _)| name.clone()).collect();
        for name in locks {
            self.free(&name)?;
        }
        self.sessions.remove(&id);
        self.ended.push(id);
        Ok(())
    }

    fn free(&mut self, name: &[u8]) -> Result<(), String> {
        self.locks.remove(name);
        self.changed = true;
        if let Some(place) = self.queue.iter().position(|w| w.lock == name) {
            let waiter = self.queue.remove(place);
            let token = self.grant(name, waiter.session, &waiter.owner)?;
            let said = format!("granted {token} {}", waiter.session);
            self.late.push((waiter, Ok(said)));
        }
        Ok(())
    }

    fn grant(&mut self, name: &[u8], session: u64, owner: &[u8]) -> Result<u64, String> {
        if self.granted.contains(&name.to_vec()) {
            return Err("Invalid".into());
        }
        let token = self.revision + 1;
        self.changed = true;
        self.granted.push(name.to_vec());
        self.locks.insert(name.to_vec(), Hold { session, owner: owner.to_vec(), token });
        Ok(token)
    }

    fn acquire(&mut self, a: &LockAcquire, alone: bool, txn: &Txn, ticket: u64) -> Result<Option<String>, String> {
        let no = |what: &str| Err(what.to_string());
        let session = a.create.as_ref().map_or(a.session.0, |c| c.id.0);
        match &a.create {
            Some(c) => self.check_create(c)?,
            None if !self.sessions.contains_key(&session) => return no("SessionExpired"),
            None if self.is_native(session) && self.things(session) >= 4 => return no("Quota"),
            None => {}
        }
        let same = |owner: &[u8], of: u64| {
            if a.owner.is_empty() { owner.is_empty() && of == session } else { *owner == a.owner[..] }
        };
        let Some(hold) = self.locks.get(&a.name[..]) else {
            if let Some(c) = &a.create {
                self.create(c)?;
            }
            let token = self.grant(&a.name, session, &a.owner)?;
            return Ok(Some(format!("granted {token} {session}")));
        };
        let waits: Vec<_> = self.queue.iter().filter(|w| w.lock == a.name[..]).collect();
        if same(&hold.owner, hold.session) || waits.iter().any(|w| same(&w.owner, w.session)) {
            return no("Deadlock");
        }
        let deadline = match a.wait {
            Wait::None => return no("Held"),
            Wait::Ms(ms) => Some(self.stamp + ms),
            Wait::Forever => None,
        };
        match () {
            () if !alone => return no("Invalid"),
            () if waits.len() >= 3 => return no("Quota"),
            () => {}
        }
        if let Some(c) = &a.create {
            self.create(c)?;
        }
        let (lock, owner) = (a.name.to_vec(), a.owner.to_vec());
        self.queue.push(Waiter { lock, session, owner, deadline, ticket, txn: txn.clone() });
        Ok(None)
    }
}

/// An answer in the words of the model.
fn short(reply: &Reply) -> String {
    let again = if reply.replayed { "again " } else { "" };
    match &reply.result {
        Ok(txn) => {
            let results: Vec<_> = txn.results.iter().map(short_op).collect();
            format!("{again}{} ok {}", reply.revision, results.join(","))
        }
        Err(rejection) => {
            let name = format!("{rejection:?}");
            let name = name.split([' ', '{', '(']).next().unwrap();
            format!("{again}{} no {name}", reply.revision)
        }
    }
}

fn short_op(reply: &OpReply) -> String {
    match reply {
        OpReply::Put { .. } => "put".into(),
        OpReply::Delete { deleted, .. } => format!("deleted {deleted}"),
        OpReply::Range(r) => {
            let found: Vec<_> =
                r.records.iter().map(|r| format!("{}={}/{}", r.name()[0], r.value()[0], r.meta().owner)).collect();
            format!("[{}]", found.join(" "))
        }
        OpReply::Compacted => "compacted".into(),
        OpReply::SessionCreated { id, token, .. } => format!("session {id} {token}"),
        OpReply::SessionEnded => "ended".into(),
        OpReply::LockGranted(g) => format!("granted {} {}", g.token, g.session),
        OpReply::LockReleased => "released".into(),
        OpReply::LockCancelled { waiters } => format!("cancelled {waiters}"),
        OpReply::Done => "done".into(),
        OpReply::Member(member) => format!("{member:?}"),
        other => panic!("{other:?}"),
    }
}

/// The log that a list of steps makes, and what the model says to each entry.
pub(crate) fn log(steps: &[Step]) -> Vec<(Position, Batch, Said)> {
    let mut model = Model::new();
    let mut log = Vec::new();
    let mut ticket = 0;
    for (limit, value) in LIMITS {
        model.index += 1;
        ticket += 1;
        let txns = vec![Txn::of(Op::SetLimit { limit, value })];
        log.push(entry(&model, ticket, txns, vec![(ticket, "1 ok done".to_string())]));
    }
    for step in steps {
        match step {
            Step::Pass(ms) => model.stamp += ms,
            Step::Term => model.term += 1,
            Step::Do(ops, id) => {
                ticket += 1;
                let txn = model.txn(ops, *id);
                let said = model.entry(&[(ticket, txn.clone())]);
                log.push(entry(&model, ticket, vec![txn], said));
            }
        }
    }
    log
}

fn entry(model: &Model, first: u64, txns: Vec<Txn>, said: Said) -> (Position, Batch, Said) {
    let at = Position { index: Index(model.index), term: Term(model.term) };
    let origin = Origin { member: MemberId(1), boot: 1, first };
    (at, Batch { behaviour: 1, stamp: LogTime(model.stamp), origin, txns }, said)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    /// Every answer is the model's, whom it goes to included.
    #[test]
    fn answers_are_those_of_the_model(steps in steps(120)) {
        check_steps(&steps)?;
    }

    #[test]
    fn answers_about_members_are_those_of_the_model(steps in member_steps()) {
        check_steps(&steps)?;
    }
}

fn check_steps(steps: &[Step]) -> Result<(), TestCaseError> {
    let mut machine = Machine::new();
    let mut out = Applied::default();
    for (at, batch, expected) in log(steps) {
        let entry = batch.encode();
        prop_assert_eq!(&Batch::decode(&entry).unwrap(), &batch);
        machine.apply_encoded(at, &entry, &mut out).unwrap();
        let said: Said = out.replies.iter().map(|(ticket, reply)| (ticket.number, short(reply))).collect();
        prop_assert_eq!(said, expected, "{:?}", batch);
        check_changes(&out)?;
    }
    Ok(())
}

/// Changes leave in (revision, index) order, without gaps in a revision.
fn check_changes(out: &Applied) -> Result<(), TestCaseError> {
    let places: Vec<_> = out.changes.iter().map(|c| (c.record.meta().mod_revision, c.record.meta().index)).collect();
    for (i, place) in places.iter().enumerate() {
        let expected = match i.checked_sub(1).map(|i| places[i]) {
            Some((revision, index)) if revision == place.0 => index + 1,
            _ => 0,
        };
        prop_assert_eq!(place.1, expected);
    }
    prop_assert!(places.is_sorted());
    Ok(())
}
