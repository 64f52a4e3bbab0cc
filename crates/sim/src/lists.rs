//! Command lists: random entries applied to the machine and to the naive model, every answer and the whole state compared.
//!
//! The entries go through their written encoding, compaction is finished in slices of any size, and now and then the machine is
//! replaced by one loaded from its snapshot, which was taken while more entries were applied.

use crate::model::Model;
use crate::oracle::state;
use crate::random::Random;
use crate::trace::Trace;
use std::collections::BTreeMap;
use tenure_machine::*;

const NS: NamespaceId = NamespaceId::DEFAULT;

/// A state this small never has so many blocks, were they of one byte.
const BLOCKS_MAX: usize = 20_000;

/// What one list went through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub txns: u64,
    pub granted_later: u64,
    pub replayed: u64,
    pub snapshots: u64,
}

struct List {
    random: Random,
    machine: Machine,
    model: Model,
    at: Position,
    stamp: LogTime,
    ticket: u64,
    /// Requests that were made, to be made again.
    asked: Vec<Txn>,
    next_uuid: u8,
    tally: Tally,
}

/// Runs one list; the complaint says what differed.
pub fn run(seed: u64, trace: &mut Trace) -> Result<Tally, String> {
    let mut random = Random::new(seed);
    let entries = random.between(20, 120);
    let mut list = List {
        random,
        machine: Machine::new(),
        model: Model::default(),
        at: Position { index: Index(0), term: Term(1) },
        stamp: LogTime(0),
        ticket: 0,
        asked: Vec::new(),
        next_uuid: 0,
        tally: Tally::default(),
    };
    for n in 0..entries {
        list.entry(trace).map_err(|why| format!("entry {}: {why}", n + 1))?;
        if list.random.chance(1, 4) {
            list.compare_state()?;
        }
        if list.random.chance(1, 25) {
            list.reload(trace)?;
        }
    }
    list.compare_state()?;
    Ok(list.tally)
}

impl List {
    fn entry(&mut self, trace: &mut Trace) -> Result<(), String> {
        let batch = self.batch();
        trace.say(|| format!("{batch:?}"));
        self.apply(batch)
    }

    fn apply(&mut self, batch: Batch) -> Result<(), String> {
        let bytes = batch.encode();
        let decoded = Batch::decode(&bytes).map_err(|e| format!("{batch:?} is not read back: {e:?}"))?;
        if decoded != batch {
            return Err(format!("{batch:?} is read back as {decoded:?}"));
        }
        let mut out = Applied::default();
        self.machine.apply(self.at, decoded, &mut out).map_err(|f| f.to_string())?;
        let wanted = self.model.apply(self.at, &batch);
        let keys: Vec<Record> =
            out.changes.iter().map(|c| c.record.clone()).filter(|r| r.key()[0] == Space::Keys as u8).collect();
        if keys != wanted.keys {
            return Err(format!("{batch:?}\nchanged {keys:?}\nwanted  {:?}", wanted.keys));
        }
        let replies: BTreeMap<Ticket, Reply> = out.replies.iter().cloned().collect();
        self.compare_replies(&batch, &replies, &wanted.replies)?;
        if self.random.coin() {
            let budget = self.random.between(1, 50) as usize;
            self.machine.maintain(budget);
        }
        Ok(())
    }

    fn compare_replies(
        &mut self,
        batch: &Batch,
        got: &BTreeMap<Ticket, Reply>,
        wanted: &BTreeMap<Ticket, Reply>,
    ) -> Result<(), String> {
        for (ticket, reply) in wanted {
            let first = batch.origin.first;
            let here = ticket.number >= first;
            self.tally.granted_later += u64::from(!here && reply.result.is_ok());
            self.tally.replayed += u64::from(reply.replayed);
            let Some(other) = got.get(ticket) else {
                return Err(format!("{batch:?}\nticket {ticket:?} has no answer, wanted {reply:?}"));
            };
            if !equal(reply, other) {
                let txn = here.then(|| batch.txns.get((ticket.number - first) as usize));
                return Err(format!("{txn:?}\nanswered {other:?}\nwanted   {reply:?}"));
            }
            let mut bytes = Vec::new();
            other.encode(&mut bytes);
            if Reply::decode(&bytes).as_ref() != Ok(other) {
                return Err(format!("{other:?} is not read back"));
            }
        }
        match got.keys().find(|t| !wanted.contains_key(t)) {
            Some(extra) => Err(format!("{batch:?}\nticket {extra:?} was answered {:?} and should wait", got[extra])),
            None => Ok(()),
        }
    }

    fn compare_state(&self) -> Result<(), String> {
        let (machine, model) = (&self.machine, &self.model);
        let all = Span { start: Key::new(Space::Keys, NS, b""), end: Some(Key::end_of(Space::Keys, NS)) };
        let (live, _) = machine.range_slice(&all, machine.revision(), None, usize::MAX);
        compare("keys", &live, &model.live())?;
        compare("the revision", &machine.revision().0, &model.revision())?;
        compare("the compacted revision", &machine.compacted().0, &model.compacted())?;
        let sessions: Vec<_> = machine.sessions(SessionId(0), usize::MAX).iter().map(|s| (s.id, s.token)).collect();
        compare("sessions", &sessions, &model.sessions())?;
        let locks: Vec<_> = machine
            .locks(NS, b"", None, usize::MAX)
            .into_iter()
            .filter_map(|l| Some((l.name.to_vec(), l.holder?, l.waiters.iter().map(|w| w.session).collect())))
            .collect();
        compare("locks", &locks, &model.locks())
    }

    /// Takes a snapshot while entries go on, loads it, and brings the loaded machine up to the same entry.
    fn reload(&mut self, trace: &mut Trace) -> Result<(), String> {
        let pinned = self.machine.snapshot_begin();
        let expected = state::dump(&self.machine);
        let mut loader = Loader::new();
        let mut later = Vec::new();
        let mut blocks = 0;
        while let Some(block) = self.machine.snapshot_next(self.random.between(1, 2000) as usize) {
            blocks += 1;
            if blocks > BLOCKS_MAX {
                return Err(format!("the snapshot of {pinned:?} does not end: block of {} bytes", block.len()));
            }
            loader.push(&block).map_err(|e| format!("a snapshot block is refused: {e:?}"))?;
            if self.random.chance(1, 3) {
                let batch = self.batch();
                later.push((self.at, batch.clone()));
                self.apply(batch)?;
            }
        }
        let mut loaded = loader.finish().map_err(|e| format!("a snapshot is refused: {e:?}"))?;
        compare("the position of the snapshot", &loaded.position(), &pinned)?;
        compare("the state of the snapshot", &state::dump(&loaded), &expected)?;
        let mut out = Applied::default();
        for (at, batch) in later {
            loaded.apply(at, batch, &mut out).map_err(|f| f.to_string())?;
        }
        compare("the state after the snapshot", &state::dump(&loaded), &state::dump(&self.machine))?;
        trace.say(|| format!("reloaded at {pinned:?}"));
        self.machine = loaded;
        self.tally.snapshots += 1;
        Ok(())
    }

    // ---- What is asked ----

    fn batch(&mut self) -> Batch {
        self.at.index.0 += self.random.between(1, 2);
        self.at.term.0 += u64::from(self.random.chance(1, 40));
        let step = match self.random.below(20) {
            0 => self.random.below(700_000),
            1..=6 => self.random.below(2_000),
            _ => self.random.below(50),
        };
        self.stamp = self.stamp.plus(step);
        let count = self.random.below(6) as usize;
        let first = self.ticket;
        self.ticket += count as u64;
        let txns = (0..count).map(|_| self.txn()).collect();
        self.tally.txns += count as u64;
        Batch { behaviour: BEHAVIOUR, stamp: self.stamp, origin: Origin { member: MemberId(1), boot: 9, first }, txns }
    }

    fn txn(&mut self) -> Txn {
        if !self.asked.is_empty() && self.random.chance(1, 10) {
            let mut again = self.random.pick(&self.asked).clone();
            if self.random.chance(1, 8) {
                again.requires.push(RequireLock { name: self.lock_name(), token: self.token() });
            }
            return again;
        }
        let mut txn = match self.random.weighted(&[6, 3, 6, 2, 6, 3, 1, 1]) {
            0 => self.kv_txn(),
            1 => Txn::of(self.range()),
            2 => Txn::of(self.acquire()),
            3 => Txn::of(self.session_create()),
            4 => Txn::of(self.release()),
            5 => Txn::of(self.session_end()),
            6 => Txn::of(Op::Compact { revision: self.random.below(self.model.revision() + 4) as i64 - 1 }),
            _ => self.mixed(),
        };
        if self.random.chance(1, 6) {
            txn.requires.push(RequireLock { name: self.lock_name(), token: self.token() });
        }
        if self.random.chance(1, 3) {
            txn.request = Some(self.request_id());
            if txn.then.len() < 100 && self.asked.len() < 40 {
                self.asked.push(txn.clone());
            }
        }
        txn
    }

    fn request_id(&mut self) -> RequestId {
        if self.random.coin() {
            self.next_uuid = self.next_uuid.wrapping_add(1);
            return RequestId::Uuid([self.next_uuid; 16]);
        }
        let seq = self.random.between(1, 12);
        RequestId::Session {
            session: self.session_id(),
            seq,
            acked_below: self.random.below(seq + 1).saturating_sub(3),
        }
    }

    fn key(&mut self) -> Key {
        Key::new(Space::Keys, NS, &[b'a' + self.random.below(7) as u8])
    }

    fn span(&mut self) -> Span {
        let start = self.key();
        match self.random.below(5) {
            0 => Span { start, end: Some(Key::end_of(Space::Keys, NS)) },
            1 | 2 => Span { start, end: Some(self.key()) },
            _ => Span::one(start),
        }
    }

    fn session_id(&mut self) -> SessionId {
        SessionId(self.random.between(1, 5))
    }

    fn lock_name(&mut self) -> Box<[u8]> {
        vec![b'x' + self.random.below(3) as u8].into()
    }

    fn token(&mut self) -> Revision {
        let name = self.lock_name();
        let held = self.model.holder(&name).map(|h| h.token);
        held.filter(|_| self.random.chance(5, 6)).unwrap_or(Revision(self.random.below(20)))
    }

    fn put(&mut self, of: u8) -> Put {
        let session = if self.random.chance(1, 4) { self.session_id() } else { SessionId(0) };
        let value = vec![b'0' + of % 10; self.random.below(6) as usize].into();
        Put {
            key: self.key(),
            value,
            session,
            prev: self.random.coin(),
            keep_value: self.random.chance(1, 10),
            keep_session: self.random.chance(1, 10),
        }
    }

    fn range(&mut self) -> Op {
        let mut range = Range::of(self.span());
        let bound =
            |random: &mut Random| if random.chance(1, 8) { random.below(self.model.revision() + 2) as i64 } else { 0 };
        range.revision = if self.random.chance(1, 3) { self.random.below(self.model.revision() + 3) as i64 } else { 0 };
        (range.min_mod_revision, range.max_mod_revision) = (bound(&mut self.random), bound(&mut self.random));
        (range.min_create_revision, range.max_create_revision) = (bound(&mut self.random), bound(&mut self.random));
        range.limit = self.random.below(5) as i64;
        range.order = *self.random.pick(&[Order::None, Order::None, Order::Ascending, Order::Descending]);
        range.sort_by = *self.random.pick(&[
            SortBy::Key,
            SortBy::Version,
            SortBy::CreateRevision,
            SortBy::ModRevision,
            SortBy::Value,
        ]);
        (range.keys_only, range.count_only) = (self.random.chance(1, 6), self.random.chance(1, 6));
        Op::Range(range)
    }

    fn compare(&mut self) -> Compare {
        let n = self.random.below(8) as i64;
        Compare {
            span: self.span(),
            relation: *self.random.pick(&[Relation::Equal, Relation::NotEqual, Relation::Greater, Relation::Less]),
            target: match self.random.below(5) {
                0 => CompareTarget::Version(n),
                1 => CompareTarget::CreateRevision(n * 3),
                2 => CompareTarget::ModRevision(n * 5),
                3 => CompareTarget::Lease(n),
                _ => CompareTarget::Value(vec![b'0' + n as u8; 2].into()),
            },
        }
    }

    /// Puts, deletes, ranges and nested transactions that do not overlap, as etcd demands.
    fn kv_txn(&mut self) -> Txn {
        let mut txn = Txn::default();
        if self.random.coin() {
            txn.compares = (0..self.random.between(1, 2)).map(|_| self.compare()).collect();
        }
        txn.then = self.kv_ops(&mut Vec::new(), 2);
        txn.otherwise = self.kv_ops(&mut Vec::new(), 2);
        txn
    }

    fn kv_ops(&mut self, taken: &mut Vec<Span>, depth: u64) -> Vec<Op> {
        let mut ops = Vec::new();
        for _ in 0..self.random.below(4) {
            match self.random.below(8) {
                0..=3 => {
                    let put = self.put(ops.len() as u8);
                    if !taken.iter().any(|s| s.contains(put.key.as_bytes())) {
                        taken.push(Span::one(put.key.clone()));
                        ops.push(Op::Put(put));
                    }
                }
                4 | 5 => {
                    let span = self.span();
                    if !taken.iter().any(|s| overlap(s, &span)) {
                        taken.push(span.clone());
                        ops.push(Op::Delete(Delete { span, prev: self.random.coin() }));
                    }
                }
                6 if depth > 0 => {
                    let compares = if self.random.coin() { vec![self.compare()] } else { Vec::new() };
                    let then = self.kv_ops(taken, depth - 1);
                    let otherwise = self.kv_ops(taken, depth - 1);
                    ops.push(Op::Txn(Box::new(SubTxn { compares, then, otherwise })));
                }
                _ => ops.push(self.range()),
            }
        }
        ops
    }

    fn create(&mut self) -> SessionCreate {
        SessionCreate {
            id: self.session_id(),
            face: if self.random.coin() { SessionFace::Native } else { SessionFace::Etcd },
            ttl_ms: self.random.between(1, 100) * 100,
            on_expire: if self.random.coin() { OnExpire::Delete } else { OnExpire::Release },
            name: "worker".into(),
            metadata: vec![("host".into(), "a".into())],
            alias: None,
            secret: None,
        }
    }

    fn session_create(&mut self) -> Op {
        Op::SessionCreate(self.create())
    }

    fn session_end(&mut self) -> Op {
        let session = self.session_id();
        let live = self.model.sessions().iter().find(|(id, _)| *id == session).map(|(_, token)| *token);
        let token = live.filter(|_| self.random.chance(4, 5)).unwrap_or(3);
        if self.random.coin() {
            return Op::SessionEnd { session, token: self.random.coin().then_some(token) };
        }
        let term = if self.random.chance(5, 6) { self.at.term } else { Term(self.at.term.0 + 1) };
        Op::SessionExpire { session, token, term }
    }

    fn acquire(&mut self) -> Op {
        let create = self.random.chance(1, 5).then(|| self.create());
        Op::LockAcquire(LockAcquire {
            name: self.lock_name(),
            session: if create.is_some() { SessionId(0) } else { self.session_id() },
            create,
            owner: if self.random.chance(1, 3) {
                vec![b'o' + self.random.below(3) as u8].into()
            } else {
                Box::default()
            },
            mode: LockMode::Exclusive,
            wait: match self.random.below(5) {
                0 => Wait::None,
                1 => Wait::Forever,
                _ => Wait::Ms(self.random.below(3_000)),
            },
        })
    }

    fn release(&mut self) -> Op {
        let name = self.lock_name();
        if self.random.chance(1, 5) {
            let session = self.session_id();
            let own = self.asked.iter().filter_map(|t| t.request).next();
            return Op::LockCancel { name, session, request: own.filter(|_| self.random.coin()) };
        }
        let (session, token) = match self.model.holder(&name) {
            Some(holder) if self.random.chance(4, 5) => (holder.session, holder.token),
            _ => (self.session_id(), self.token()),
        };
        Op::LockRelease { name, session, token }
    }

    /// Operations of several kinds in one commit.
    fn mixed(&mut self) -> Txn {
        let mut txn = Txn { then: vec![Op::Put(self.put(3))], ..Txn::default() };
        for _ in 0..self.random.between(1, 3) {
            let op = match self.random.below(4) {
                0 => self.release(),
                1 => self.acquire(),
                2 => self.session_end(),
                _ => self.session_create(),
            };
            txn.then.push(op);
        }
        txn
    }
}

fn overlap(a: &Span, b: &Span) -> bool {
    (b'a'..=b'z').map(|c| Key::new(Space::Keys, NS, &[c])).any(|k| a.contains(k.as_bytes()) && b.contains(k.as_bytes()))
}

fn compare<T: PartialEq + std::fmt::Debug>(what: &str, got: &T, wanted: &T) -> Result<(), String> {
    if got == wanted { Ok(()) } else { Err(format!("{what}:\ngot    {got:?}\nwanted {wanted:?}")) }
}

/// Equal, but for the words of refusals that the model does not word.
fn equal(wanted: &Reply, got: &Reply) -> bool {
    match (&wanted.result, &got.result) {
        (Err(want), Err(got_why)) if want.leaves_open() => got_why.leaves_open() && wanted.revision == got.revision,
        (Err(Rejection::Invalid { .. }), Err(Rejection::Invalid { .. })) => wanted.revision == got.revision,
        (Err(Rejection::RateLimited { .. }), Err(Rejection::RateLimited { .. })) => wanted.revision == got.revision,
        _ => wanted == got,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_agrees_with_the_naive_model() {
        let mut sum = Tally::default();
        for seed in 0..300 {
            let tally = run(seed, &mut Trace::new(false)).unwrap_or_else(|why| panic!("list {seed}: {why}"));
            sum.txns += tally.txns;
            sum.granted_later += tally.granted_later;
            sum.replayed += tally.replayed;
            sum.snapshots += tally.snapshots;
        }
        // The lists reach what they are for.
        assert!(sum.txns > 10_000 && sum.granted_later > 100 && sum.replayed > 100 && sum.snapshots > 100, "{sum:?}");
    }
}
