//! The whole state machine a second time, as naive as it can be: maps, copies, and no thought for speed.
//!
//! Promises. It was written from the rules (B0 to B2 of the semantics, etcd's documents), not from the machine's code, and
//! undoes a refused transaction by throwing a copy away. What the two say must be equal to the last field.
//! Not promised. Limits of sizes and counts, and the checks that need no state: the lists leave those out.

use std::collections::{BTreeMap, BTreeSet};
use tenure_machine::*;

/// How long a one-shot request is remembered.
const KEPT_MS: u64 = 600_000;

#[derive(Clone, Debug, PartialEq)]
struct Version {
    meta: Meta,
    value: Vec<u8>,
}

#[derive(Clone, Debug)]
struct Session {
    create: SessionCreate,
    token: SessionToken,
    released: Vec<(Vec<u8>, Revision)>,
}

#[derive(Clone, Debug)]
struct Waiter {
    number: u64,
    name: Vec<u8>,
    session: SessionId,
    owner: Vec<u8>,
    since: LogTime,
    deadline: Option<LogTime>,
    ticket: Ticket,
    request: Option<RequestKey>,
    request_id: Option<RequestId>,
    succeeded: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum RequestKey {
    Uuid([u8; 16]),
    Numbered(SessionId, u64),
}

#[derive(Clone, Debug)]
struct Remembered {
    txn: Txn,
    state: RequestState,
}

#[derive(Clone, Debug)]
enum RequestState {
    Waiting(u64),
    Answered(LogTime, Reply),
}

#[derive(Clone, Debug)]
pub struct Model {
    revision: u64,
    compact_floor: i64,
    stamp: LogTime,
    index: Index,
    term: Term,
    keys: BTreeMap<Vec<u8>, Vec<Version>>,
    sessions: BTreeMap<SessionId, Session>,
    locks: BTreeMap<Vec<u8>, Holder>,
    waiters: Vec<Waiter>,
    next_waiter: u64,
    requests: BTreeMap<RequestKey, Remembered>,
    acked: BTreeMap<SessionId, u64>,
    one_shot_max: u64,
    // Of the commit under way.
    changes: u32,
    changed: Vec<Record>,
    granted: BTreeSet<Vec<u8>>,
    created: BTreeSet<SessionId>,
    ended: Vec<SessionId>,
    ended_waits: Vec<(Waiter, Result<OpReply, Rejection>)>,
    joined: Option<u64>,
}

/// What an entry gave: the records of changed keys in order, and the replies by ticket.
#[derive(Debug, Default, PartialEq)]
pub struct Gave {
    pub keys: Vec<Record>,
    pub replies: BTreeMap<Ticket, Reply>,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            revision: 1,
            compact_floor: -1,
            stamp: LogTime(0),
            index: Index(0),
            term: Term(0),
            keys: BTreeMap::new(),
            sessions: BTreeMap::new(),
            locks: BTreeMap::new(),
            waiters: Vec::new(),
            next_waiter: 0,
            requests: BTreeMap::new(),
            acked: BTreeMap::new(),
            one_shot_max: u64::MAX,
            changes: 0,
            changed: Vec::new(),
            granted: BTreeSet::new(),
            created: BTreeSet::new(),
            ended: Vec::new(),
            ended_waits: Vec::new(),
            joined: None,
        }
    }
}

impl Model {
    pub fn revision(&self) -> u64 {
        self.revision
    }

    pub fn compacted(&self) -> u64 {
        self.compact_floor.max(0) as u64
    }

    pub fn sessions(&self) -> Vec<(SessionId, SessionToken)> {
        self.sessions.iter().map(|(id, s)| (*id, s.token)).collect()
    }

    /// Who holds each lock, and the sessions that wait for it in order.
    pub fn locks(&self) -> Vec<(Vec<u8>, Holder, Vec<SessionId>)> {
        let queue = |name: &[u8]| self.waiters.iter().filter(|w| w.name == name).map(|w| w.session).collect();
        self.locks.iter().map(|(name, holder)| (name.clone(), holder.clone(), queue(name))).collect()
    }

    pub fn holder(&self, name: &[u8]) -> Option<&Holder> {
        self.locks.get(name)
    }

    pub fn live(&self) -> Vec<Record> {
        let now = self.revision;
        self.keys.keys().filter_map(|key| self.at(key, now)).collect()
    }

    pub fn apply(&mut self, at: Position, batch: &Batch) -> Gave {
        let mut gave = Gave::default();
        (self.index, self.term, self.stamp) = (at.index, at.term, batch.stamp);
        self.end_due(&mut gave);
        let stamp = self.stamp;
        self.requests.retain(|key, r| match (key, &r.state) {
            (RequestKey::Uuid(_), RequestState::Answered(at, _)) => at.plus(KEPT_MS) > stamp,
            _ => true,
        });
        for (i, txn) in batch.txns.iter().enumerate() {
            let ticket =
                Ticket { member: batch.origin.member, boot: batch.origin.boot, number: batch.origin.first + i as u64 };
            if let Some(reply) = self.answer(txn, ticket, &mut gave) {
                gave.replies.insert(ticket, reply);
            }
        }
        gave
    }

    fn end_due(&mut self, gave: &mut Gave) {
        let now = self.stamp;
        let mut due: Vec<Waiter> =
            self.waiters.iter().filter(|w| w.deadline.is_some_and(|d| d <= now)).cloned().collect();
        due.sort_by_key(|w| (w.deadline, w.number));
        for waiter in due {
            self.waiters.retain(|w| w.number != waiter.number);
            let rejection = Rejection::TimeoutWaiting {
                name: waiter.name.clone().into(),
                waited_ms: now.0 - waiter.since.0,
                holder: self.locks.get(&waiter.name).cloned(),
            };
            self.tell(waiter, Err(rejection), gave);
        }
    }

    fn tell(&mut self, waiter: Waiter, result: Result<OpReply, Rejection>, gave: &mut Gave) {
        let result = result.map(|r| TxnReply { succeeded: waiter.succeeded, results: vec![r] });
        let reply = Reply { revision: Revision(self.revision), replayed: false, result };
        if let Some(r) = waiter.request.and_then(|key| self.requests.get_mut(&key))
            && matches!(r.state, RequestState::Waiting(n) if n == waiter.number)
        {
            r.state = RequestState::Answered(self.stamp, reply.clone());
        }
        gave.replies.insert(waiter.ticket, reply);
    }

    fn answer(&mut self, txn: &Txn, ticket: Ticket, gave: &mut Gave) -> Option<Reply> {
        let (key, incarnation) = match txn.request {
            None => (None, None),
            Some(RequestId::Uuid(uuid)) => (Some(RequestKey::Uuid(uuid)), None),
            Some(RequestId::Series { .. }) => unreachable!("the lists make no series"),
            Some(RequestId::Session { session, seq, acked_below }) => {
                let Some(live) = self.sessions.get(&session) else {
                    return Some(self.refusal(tenure_machine::forgotten_with(session)));
                };
                let token = live.token;
                let acked = self.acked.entry(session).or_default();
                *acked = acked_below.max(*acked);
                let acked = *acked;
                self.requests
                    .retain(|key, _| !matches!(key, RequestKey::Numbered(s, n) if *s == session && *n < acked));
                if seq < acked {
                    return Some(self.refusal(tenure_machine::forgotten_with(session)));
                }
                (Some(RequestKey::Numbered(session, seq)), Some((session, token)))
            }
        };
        let bare = Txn { request: None, ..txn.clone() };
        if let Some(key) = key
            && let Some(r) = self.requests.get(&key)
        {
            if r.txn != bare {
                return Some(self.refusal(Rejection::Mismatch));
            }
            match r.state.clone() {
                RequestState::Answered(_, reply) => return Some(Reply { replayed: true, ..reply }),
                RequestState::Waiting(number) => {
                    self.waiters.iter_mut().filter(|w| w.number == number).for_each(|w| w.ticket = ticket);
                    return None;
                }
            }
        }
        let one_shots = self.requests.keys().filter(|k| matches!(k, RequestKey::Uuid(_))).count() as u64;
        if matches!(key, Some(RequestKey::Uuid(_))) && one_shots >= self.one_shot_max {
            let limit = self.one_shot_max;
            return Some(self.refusal(Rejection::RateLimited { what: "", limit }));
        }
        let reply = self.run(txn, ticket, key, gave);
        let kept = incarnation.is_none_or(|(id, token)| self.sessions.get(&id).is_some_and(|s| s.token == token));
        if let Some(key) = key.filter(|_| kept) {
            let state = match &reply {
                Some(reply) => RequestState::Answered(self.stamp, reply.clone()),
                None => RequestState::Waiting(self.next_waiter),
            };
            self.requests.insert(key, Remembered { txn: bare, state });
        }
        reply
    }

    fn refusal(&self, rejection: Rejection) -> Reply {
        Reply { revision: Revision(self.revision), replayed: false, result: Err(rejection) }
    }

    fn run(&mut self, txn: &Txn, ticket: Ticket, request: Option<RequestKey>, gave: &mut Gave) -> Option<Reply> {
        for required in &txn.requires {
            if let Err(rejection) = self.require(required) {
                return Some(self.refusal(rejection));
            }
        }
        let base = self.clone();
        (self.changes, self.joined) = (0, None);
        self.changed.clear();
        self.granted.clear();
        self.created.clear();
        self.ended.clear();
        self.ended_waits.clear();
        let succeeded = txn.compares.iter().all(|c| base.holds(c));
        let ops = if succeeded { &txn.then } else { &txn.otherwise };
        let ran = self.run_ops(&base, txn, ops, true, ticket, request, succeeded);
        let results = match ran {
            Ok(results) => results,
            Err(rejection) => {
                *self = base;
                return Some(self.refusal(rejection));
            }
        };
        if self.changes > 0 {
            self.revision += 1;
        }
        gave.keys.append(&mut self.changed);
        for session in std::mem::take(&mut self.ended) {
            self.acked.remove(&session);
            self.requests.retain(|key, _| !matches!(key, RequestKey::Numbered(s, _) if *s == session));
        }
        for (waiter, result) in std::mem::take(&mut self.ended_waits) {
            self.tell(waiter, result, gave);
        }
        match self.joined {
            Some(_) => None,
            None => Some(Reply {
                revision: Revision(self.revision),
                replayed: false,
                result: Ok(TxnReply { succeeded, results }),
            }),
        }
    }

    fn require(&self, required: &RequireLock) -> Result<(), Rejection> {
        match self.locks.get(&*required.name) {
            Some(holder) if holder.token == required.token => Ok(()),
            holder => Err(fenced(&required.name, required.token, holder)),
        }
    }

    fn holds(&self, compare: &Compare) -> bool {
        let live: Vec<Record> = self.live().into_iter().filter(|r| compare.span.contains(r.key())).collect();
        let metas: Vec<(Meta, Option<Vec<u8>>)> = match live.is_empty() {
            true => vec![(Meta::default(), None)],
            false => live.iter().map(|r| (r.meta(), Some(r.value().to_vec()))).collect(),
        };
        metas.iter().all(|(meta, value)| {
            let order = match &compare.target {
                CompareTarget::Condition(_) => return false,
                CompareTarget::Version(n) => (meta.version as i64).cmp(n),
                CompareTarget::CreateRevision(n) => (meta.create_revision.0 as i64).cmp(n),
                CompareTarget::ModRevision(n) => (meta.mod_revision.0 as i64).cmp(n),
                CompareTarget::Lease(n) => (meta.owner.0 as i64).cmp(n),
                CompareTarget::Value(v) => match value {
                    None => return false,
                    Some(value) => value.as_slice().cmp(v),
                },
            };
            match compare.relation {
                Relation::Equal => order.is_eq(),
                Relation::NotEqual => order.is_ne(),
                Relation::Greater => order.is_gt(),
                Relation::Less => order.is_lt(),
            }
        })
    }

    #[expect(clippy::too_many_arguments, reason = "it is the context of one transaction, which nothing else needs")]
    fn run_ops(
        &mut self,
        base: &Model,
        txn: &Txn,
        ops: &[Op],
        top: bool,
        ticket: Ticket,
        request: Option<RequestKey>,
        succeeded: bool,
    ) -> Result<Vec<OpReply>, Rejection> {
        let alone = top && ops.len() == 1;
        let mut results = Vec::new();
        for op in ops {
            results.push(match op {
                Op::Put(put) => self.put(put)?,
                Op::Delete(delete) => self.delete(delete),
                Op::Range(range) => OpReply::Range(self.range(range, base.revision)?),
                Op::Txn(sub) => {
                    let succeeded = sub.compares.iter().all(|c| base.holds(c));
                    let ops = if succeeded { &sub.then } else { &sub.otherwise };
                    let results = self.run_ops(base, txn, ops, false, ticket, request, succeeded)?;
                    OpReply::Txn(TxnReply { succeeded, results })
                }
                Op::Compact { .. } if !alone => return Err(Rejection::Invalid { why: "alone".into() }),
                Op::Compact { revision } => self.compact(*revision)?,
                Op::SessionCreate(create) => {
                    self.may_create(create)?;
                    let token = self.create(create);
                    OpReply::SessionCreated { id: create.id, token, ttl_ms: create.ttl_ms }
                }
                Op::SessionEnd { session, token } => self.session_end(*session, *token)?,
                Op::SessionExpire { session, token, term } => {
                    if self.sessions.get(session).is_some_and(|s| s.token == *token) && self.term == *term {
                        self.end(*session)?;
                        OpReply::SessionEnded
                    } else {
                        OpReply::Done
                    }
                }
                Op::LockAcquire(acquire) => self.acquire(acquire, alone, ticket, request, txn.request, succeeded)?,
                Op::LockRelease { name, session, token } => self.release(name, *session, *token)?,
                Op::LockCancel { name, session, request } => self.cancel(name, *session, request.as_ref()),
                Op::SetLimit { limit: Limit::OneShotRequests, value } => {
                    self.one_shot_max = *value;
                    OpReply::Done
                }
                other => unreachable!("the lists make no {other:?}"),
            });
        }
        Ok(results)
    }

    fn at_commit(&self) -> Revision {
        Revision(self.revision + 1)
    }

    fn next_index(&mut self) -> u32 {
        self.changes += 1;
        self.changes - 1
    }

    fn at(&self, key: &[u8], revision: u64) -> Option<Record> {
        let version = self.keys.get(key)?.iter().rfind(|v| v.meta.mod_revision.0 <= revision)?;
        (!version.meta.tombstone).then(|| record(key, version))
    }

    /// The newest version that this commit sees.
    fn newest(&self, key: &[u8]) -> Option<Record> {
        self.at(key, u64::MAX)
    }

    fn write(&mut self, key: &[u8], value: Option<&[u8]>, owner: SessionId) -> Option<Record> {
        let before = self.newest(key);
        let old = before.as_ref().map(Record::meta);
        let (at, index) = (self.at_commit(), self.next_index());
        let meta = match value {
            None => Meta { tombstone: true, mod_revision: at, index, ..Meta::default() },
            Some(_) => Meta {
                tombstone: false,
                mod_revision: at,
                index,
                create_revision: old.map_or(at, |m| m.create_revision),
                version: old.map_or(1, |m| m.version + 1),
                owner,
            },
        };
        let version = Version { meta, value: value.unwrap_or_default().to_vec() };
        self.changed.push(record(key, &version));
        self.keys.entry(key.to_vec()).or_default().push(version);
        before
    }

    fn put(&mut self, put: &Put) -> Result<OpReply, Rejection> {
        if put.session.0 != 0 && !self.sessions.contains_key(&put.session) {
            return Err(Rejection::SessionNotFound { session: put.session });
        }
        let there = self.newest(put.key.as_bytes());
        if (put.keep_value || put.keep_session) && there.is_none() {
            return Err(Rejection::KeyNotFound);
        }
        let value = there.as_ref().filter(|_| put.keep_value).map_or(put.value.to_vec(), |r| r.value().to_vec());
        let owner = there.as_ref().filter(|_| put.keep_session).map_or(put.session, |r| r.meta().owner);
        let prev = self.write(put.key.as_bytes(), Some(&value), owner);
        Ok(OpReply::Put { prev: prev.filter(|_| put.prev) })
    }

    fn delete(&mut self, delete: &Delete) -> OpReply {
        let keys: Vec<Vec<u8>> = self.keys.keys().filter(|k| delete.span.contains(k)).cloned().collect();
        let mut prev = Vec::new();
        for key in keys {
            if self.newest(&key).is_some() {
                prev.extend(self.write(&key, None, SessionId(0)));
            }
        }
        OpReply::Delete { deleted: prev.len() as u64, prev: if delete.prev { prev } else { Vec::new() } }
    }

    fn range(&self, range: &Range, base: u64) -> Result<RangeReply, Rejection> {
        if range.revision > base as i64 {
            return Err(Rejection::FutureRevision { current: Revision(base) });
        }
        if range.revision != 0 && range.revision < self.compact_floor {
            return Err(Rejection::Compacted { lowest: Revision(self.compacted()) });
        }
        let at = if range.revision <= 0 { u64::MAX } else { range.revision as u64 };
        let mut records: Vec<Record> =
            self.keys.keys().filter(|k| range.span.contains(k)).filter_map(|k| self.at(k, at)).collect();
        let count = records.len() as u64;
        let mut reply = RangeReply { records: Vec::new(), count, more: false, keys_only: range.keys_only };
        if range.count_only {
            return Ok(reply);
        }
        let bounds =
            [range.min_mod_revision, range.max_mod_revision, range.min_create_revision, range.max_create_revision];
        let limit = usize::try_from(range.limit).unwrap_or(0);
        // Without an order and without bounds the limit cuts in key order, whatever is sorted afterwards.
        let cut_first = range.order == Order::None && bounds == [0; 4] && limit > 0;
        if cut_first {
            records.truncate(limit + 1);
        }
        records.retain(|r| {
            let (m, c) = (r.meta().mod_revision.0 as i64, r.meta().create_revision.0 as i64);
            let within = |n: i64, min: i64, max: i64| (min == 0 || n >= min) && (max == 0 || n <= max);
            within(m, bounds[0], bounds[1]) && within(c, bounds[2], bounds[3])
        });
        if range.order != Order::None || range.sort_by != SortBy::Key {
            records.sort_by(|a, b| {
                let order = match range.sort_by {
                    SortBy::Key => a.key().cmp(b.key()),
                    SortBy::Version => a.meta().version.cmp(&b.meta().version),
                    SortBy::CreateRevision => a.meta().create_revision.cmp(&b.meta().create_revision),
                    SortBy::ModRevision => a.meta().mod_revision.cmp(&b.meta().mod_revision),
                    SortBy::Value => a.value().cmp(b.value()),
                };
                if range.order == Order::Descending { order.reverse() } else { order }
            });
        }
        if limit > 0 && records.len() > limit {
            records.truncate(limit);
            reply.more = true;
        }
        reply.records = records;
        Ok(reply)
    }

    fn compact(&mut self, revision: i64) -> Result<OpReply, Rejection> {
        if revision <= self.compact_floor {
            return Err(Rejection::Compacted { lowest: Revision(self.compacted()) });
        }
        if revision > self.revision as i64 {
            return Err(Rejection::FutureRevision { current: Revision(self.revision) });
        }
        self.compact_floor = revision;
        Ok(OpReply::Compacted)
    }

    // ---- Sessions ----

    fn may_create(&self, create: &SessionCreate) -> Result<(), Rejection> {
        if self.sessions.contains_key(&create.id) {
            return Err(Rejection::SessionExists { session: create.id });
        }
        if self.created.contains(&create.id) {
            return Err(Rejection::Invalid { why: "twice".into() });
        }
        Ok(())
    }

    fn create(&mut self, create: &SessionCreate) -> SessionToken {
        let token = match create.face {
            SessionFace::Native => {
                self.next_index();
                self.at_commit().0
            }
            SessionFace::Etcd => self.index.0,
        };
        self.created.insert(create.id);
        self.sessions.insert(create.id, Session { create: create.clone(), token, released: Vec::new() });
        token
    }

    fn session_end(&mut self, id: SessionId, token: Option<SessionToken>) -> Result<OpReply, Rejection> {
        let live = self.sessions.get(&id).map(|s| s.token);
        match token {
            Some(token) if live != Some(token) => Err(Rejection::SessionExpired { session: id }),
            None if live.is_none() => Err(Rejection::SessionNotFound { session: id }),
            _ => self.end(id).map(|()| OpReply::SessionEnded),
        }
    }

    fn end(&mut self, id: SessionId) -> Result<(), Rejection> {
        let (its, rest): (Vec<_>, Vec<_>) = self.waiters.drain(..).partition(|w| w.session == id);
        self.waiters = rest;
        self.ended_waits.extend(its.into_iter().map(|w| (w, Err(Rejection::SessionExpired { session: id }))));
        let session = self.sessions[&id].clone();
        let owned: Vec<Record> =
            self.keys.keys().filter_map(|k| self.newest(k)).filter(|r| r.meta().owner == id).collect();
        for r in owned {
            match session.create.on_expire {
                OnExpire::Delete => self.write(r.key(), None, SessionId(0)),
                OnExpire::Release => self.write(r.key(), Some(r.value()), SessionId(0)),
            };
        }
        let held: Vec<Vec<u8>> = self.locks.iter().filter(|(_, h)| h.session == id).map(|(n, _)| n.clone()).collect();
        for name in held {
            self.free(&name)?;
        }
        if session.create.face == SessionFace::Native {
            self.next_index();
        }
        self.sessions.remove(&id);
        self.ended.push(id);
        Ok(())
    }

    // ---- Locks ----

    fn acquire(
        &mut self,
        a: &LockAcquire,
        alone: bool,
        ticket: Ticket,
        request: Option<RequestKey>,
        request_id: Option<RequestId>,
        succeeded: bool,
    ) -> Result<OpReply, Rejection> {
        let session = match &a.create {
            None if !self.sessions.contains_key(&a.session) => {
                return Err(Rejection::SessionExpired { session: a.session });
            }
            None => a.session,
            Some(create) => {
                self.may_create(create)?;
                create.id
            }
        };
        let Some(holder) = self.locks.get(&*a.name).cloned() else {
            if let Some(create) = &a.create {
                self.create(create);
            }
            return self.grant(&a.name, session, &a.owner).map(OpReply::LockGranted);
        };
        let me = (a.owner.to_vec(), session);
        let queue: Vec<&Waiter> = self.waiters.iter().filter(|w| *w.name == *a.name).collect();
        if same_owner(&me, &(holder.owner.to_vec(), holder.session))
            || queue.iter().any(|w| same_owner(&me, &(w.owner.clone(), w.session)))
        {
            return Err(Rejection::Deadlock { name: a.name.clone(), holder });
        }
        let deadline = match a.wait {
            Wait::None | Wait::Ms(0) => {
                return Err(Rejection::Held { name: a.name.clone(), holder, waiters: queue.len() as u64 });
            }
            Wait::Ms(ms) => Some(self.stamp.plus(ms)),
            Wait::Forever => None,
        };
        if !alone {
            return Err(Rejection::Invalid { why: "alone".into() });
        }
        if let Some(create) = &a.create {
            self.create(create);
        }
        self.next_waiter += 1;
        self.joined = Some(self.next_waiter);
        self.waiters.push(Waiter {
            number: self.next_waiter,
            name: a.name.to_vec(),
            session,
            owner: a.owner.to_vec(),
            since: self.stamp,
            deadline,
            ticket,
            request,
            request_id,
            succeeded,
        });
        Ok(OpReply::Done)
    }

    fn grant(&mut self, name: &[u8], session: SessionId, owner: &[u8]) -> Result<LockGrant, Rejection> {
        if !self.granted.insert(name.to_vec()) {
            return Err(Rejection::Invalid { why: "granted twice".into() });
        }
        self.next_index();
        let token = self.at_commit();
        self.locks.insert(name.to_vec(), Holder { token, session, owner: owner.into(), since: self.stamp });
        let s = &self.sessions[&session];
        Ok(LockGrant { token, session, session_token: s.token, ttl_ms: s.create.ttl_ms })
    }

    fn free(&mut self, name: &[u8]) -> Result<(), Rejection> {
        let Some(place) = self.waiters.iter().position(|w| w.name == name) else {
            self.next_index();
            self.locks.remove(name);
            return Ok(());
        };
        let waiter = self.waiters.remove(place);
        let grant = self.grant(name, waiter.session, &waiter.owner)?;
        self.ended_waits.push((waiter, Ok(OpReply::LockGranted(grant))));
        Ok(())
    }

    fn release(&mut self, name: &[u8], session: SessionId, token: Revision) -> Result<OpReply, Rejection> {
        let holder = self.locks.get(name).cloned();
        if !holder.as_ref().is_some_and(|h| h.session == session && h.token == token) {
            let again = self.sessions.get(&session).is_some_and(|s| s.released.contains(&(name.to_vec(), token)));
            return if again { Ok(OpReply::LockReleased) } else { Err(fenced(name, token, holder.as_ref())) };
        }
        self.free(name)?;
        if let Some(s) = self.sessions.get_mut(&session) {
            s.released.push((name.to_vec(), token));
            // Only the newest few are promised to be known.
            if s.released.len() > 8 {
                s.released.remove(0);
            }
        }
        Ok(OpReply::LockReleased)
    }

    fn cancel(&mut self, name: &[u8], session: SessionId, request: Option<&RequestId>) -> OpReply {
        let same = |own: Option<RequestId>| match (own, request) {
            (_, None) => true,
            (
                Some(RequestId::Session { session: a, seq: m, .. }),
                Some(RequestId::Session { session: b, seq: n, .. }),
            ) => a == *b && m == *n,
            (own, Some(r)) => own == Some(*r),
        };
        let (its, rest): (Vec<_>, Vec<_>) =
            self.waiters.drain(..).partition(|w| w.name == name && w.session == session && same(w.request_id));
        self.waiters = rest;
        let waiters = its.len() as u64;
        self.ended_waits.extend(its.into_iter().map(|w| (w, Err(Rejection::Cancelled { name: name.into() }))));
        OpReply::LockCancelled { waiters }
    }
}

fn same_owner(a: &(Vec<u8>, SessionId), b: &(Vec<u8>, SessionId)) -> bool {
    if a.0.is_empty() && b.0.is_empty() { a.1 == b.1 } else { a.0 == b.0 }
}

fn record(key: &[u8], version: &Version) -> Record {
    Record::new(key, version.meta, b"", &version.value)
}

fn fenced(name: &[u8], presented: Revision, holder: Option<&Holder>) -> Rejection {
    Rejection::Fenced {
        name: name.into(),
        presented,
        newest: holder.map_or(Revision(0), |h| h.token),
        holder: holder.cloned(),
    }
}
