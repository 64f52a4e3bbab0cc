//! What the native primitives owe, judged from the answers that clients got.
//!
//! Promises. Every commit has a revision of its own, so the answers have one order, whoever heard them. In it: a counter that is only added to
//! rises by what was added, acknowledged additions all, unknown ones at most once; no number of a sequence is given out twice; a job is in one
//! pair of hands, under tokens and attempts that only rise, is not given out after an ack that was accepted, and jobs of one group follow one
//! another; an effect is marked once; an idempotency key is granted to one attempt at a time, its result is the one that was
//! completed first, and whoever asks again gets those bytes; a pool never gives more than it has.
//! Not promised. Anything about operations that nobody was told of, but that they happen at most once.
//! Relies on. Clients that add one at a time, whose jobs of one group are enqueued with numbers, and that tell here whenever an
//! outcome stays unknown. Retentions are longer than a run.

use std::collections::BTreeMap;
use tenure_machine::*;

/// A counter that everybody adds one to.
#[derive(Default)]
struct Count {
    /// What it was after an acknowledged addition, by the revision of that.
    seen: BTreeMap<u64, i64>,
    unknown: i64,
}

/// The numbers of a sequence that a commit gave, from and to, by its revision.
type Given = BTreeMap<u64, (u64, u64)>;

/// What is known of one job.
#[derive(Debug, Default)]
struct Seen {
    group: Option<Vec<u8>>,
    /// By token: the attempt, and the call that heard of it.
    deliveries: BTreeMap<u64, (u32, u64)>,
    /// The token under which it was acknowledged.
    acknowledged: Option<u64>,
}

/// What is known of one idempotency key.
#[derive(Debug, Default)]
struct Once {
    /// By token of the attempt: its number, and the call that heard of it.
    granted: BTreeMap<u64, (u32, u64)>,
    /// The result, the attempt that gave it, and the revision at which it was known.
    result: Option<(PackedResult, u64, u64)>,
}

#[derive(Default)]
pub struct Primitives {
    counters: BTreeMap<Box<[u8]>, Count>,
    numbers: BTreeMap<Box<[u8]>, Given>,
    jobs: BTreeMap<JobId, Seen>,
    /// The call that put a marker, and the revision.
    marked: BTreeMap<Box<str>, (u64, u64)>,
    once: BTreeMap<Box<str>, Once>,
    /// How many answers were judged, by primitive.
    pub judged: BTreeMap<&'static str, u64>,
}

impl Primitives {
    /// An operation of call `call` was answered; `at` is the revision of its commit.
    pub fn done(&mut self, call: u64, op: &NativeOp, reply: &NativeReply, at: u64) -> Result<(), String> {
        let (primitive, judged) = match (op, reply) {
            (NativeOp::Counter(op), NativeReply::Counter(reply)) => ("counters", self.counter(op, reply, at)),
            (NativeOp::Queue(op), NativeReply::Queue(reply)) => ("queues", self.queue(call, op, reply)),
            (NativeOp::Marker(op), NativeReply::Marker(reply)) => ("markers", self.marker(call, op, reply, at)),
            (NativeOp::Idempotency(op), NativeReply::Idempotency(reply)) => {
                ("idempotency", self.idempotency(call, op, reply, at))
            }
            _ => ("others", Ok(())),
        };
        *self.judged.entry(primitive).or_default() += 1;
        judged
    }

    /// It may have been done, or may still be.
    pub fn unknown(&mut self, op: &NativeOp) {
        if let NativeOp::Counter(CounterOp::Add(add)) = op {
            self.counters.entry(add.name.clone()).or_default().unknown += 1;
        }
    }

    /// What any member holds at any time.
    pub fn look(machine: &Machine) -> Result<(), String> {
        for (name, pool) in machine.objects::<Pool>(NamespaceId::DEFAULT, b"", None, 10) {
            if pool.held + pool.confirmed > pool.capacity {
                return Err(format!("pool {} has given more than it has: {pool:?}", name.escape_ascii()));
            }
        }
        Ok(())
    }

    /// What a member holds that has applied everything.
    pub fn finish(&self, machine: &Machine) -> Result<(), String> {
        for (name, count) in &self.counters {
            let value = machine.object::<Counter>(NamespaceId::DEFAULT, name).map_or(0, |counter| counter.value);
            let acknowledged = count.seen.len() as i64;
            if value < acknowledged || value > acknowledged + count.unknown {
                return Err(format!(
                    "counter {} is {value} after {acknowledged} acknowledged additions and {} unknown ones",
                    name.escape_ascii(),
                    count.unknown
                ));
            }
        }
        self.groups_in_order()
    }

    // ---- Counters ----

    fn counter(&mut self, op: &CounterOp, reply: &CounterReply, at: u64) -> Result<(), String> {
        match (op, reply) {
            (CounterOp::Add(add), CounterReply::Counted(counter)) => self.counted(&add.name, counter.value, at),
            (CounterOp::Next(next), CounterReply::Numbers(n)) => self.numbered(&next.name, n.from, n.to, at),
            _ => Ok(()),
        }
    }

    fn counted(&mut self, name: &[u8], value: i64, at: u64) -> Result<(), String> {
        let seen = &mut self.counters.entry(name.into()).or_default().seen;
        let before = seen.range(..at).next_back().is_none_or(|(_, v)| *v < value);
        let after = seen.range(at + 1..).next().is_none_or(|(_, v)| *v > value);
        let same = seen.insert(at, value).is_none_or(|v| v == value);
        if before && after && same {
            return Ok(());
        }
        Err(format!("counter {} is {value} at {at}, among {seen:?}", name.escape_ascii()))
    }

    fn numbered(&mut self, name: &[u8], from: u64, to: u64, at: u64) -> Result<(), String> {
        let given = self.numbers.entry(name.into()).or_default();
        let before = given.range(..at).next_back().is_none_or(|(_, (_, end))| *end <= from);
        let after = given.range(at + 1..).next().is_none_or(|(_, (begin, _))| *begin >= to);
        let same = given.insert(at, (from, to)).is_none_or(|given| given == (from, to));
        if before && after && same && from < to {
            return Ok(());
        }
        Err(format!("sequence {} gives {from} to {to} at {at}, among {given:?}", name.escape_ascii()))
    }

    // ---- Queues ----

    fn queue(&mut self, call: u64, op: &QueueOp, reply: &QueueReply) -> Result<(), String> {
        match (op, reply) {
            (QueueOp::Receive(_), QueueReply::Received(received)) => self.received(call, received),
            (QueueOp::Ack(acks), QueueReply::Received(received)) => {
                for (ack, settled) in acks.acks.iter().zip(&received.settled) {
                    if settled.refusal.is_none() {
                        self.acknowledged(ack.receipt.id, ack.receipt.token.0)?;
                    }
                }
                self.received(call, received)
            }
            // A receipt that was accepted was the current one.
            (QueueOp::Heartbeat(beat), _) => self.check_job(beat.receipt.id),
            _ => Ok(()),
        }
    }

    fn received(&mut self, call: u64, received: &Received) -> Result<(), String> {
        for job in &received.jobs {
            let seen = self.jobs.entry(job.id).or_default();
            seen.group = job.terms.as_ref().and_then(|terms| terms.group.as_ref().map(|group| group.to_vec()));
            let before = seen.deliveries.insert(job.token.0, (job.attempt, call));
            if let Some(before) = before.filter(|before| *before != (job.attempt, call)) {
                return Err(format!(
                    "delivery {} of job {:?} was heard of by {before:?} and by ({}, {call})",
                    job.token, job.id, job.attempt
                ));
            }
            self.check_job(job.id)?;
        }
        Ok(())
    }

    fn acknowledged(&mut self, id: JobId, token: u64) -> Result<(), String> {
        let seen = self.jobs.entry(id).or_default();
        if seen.acknowledged.is_some_and(|known| known != token) {
            return Err(format!("job {id:?} was acknowledged under {token} too: {seen:?}"));
        }
        seen.acknowledged = Some(token);
        self.check_job(id)
    }

    /// Attempts rise with the tokens, and nothing comes after the ack.
    fn check_job(&self, id: JobId) -> Result<(), String> {
        let Some(seen) = self.jobs.get(&id) else { return Ok(()) };
        let attempts: Vec<u32> = seen.deliveries.values().map(|(attempt, _)| *attempt).collect();
        let last = seen.deliveries.last_key_value().map_or(0, |(token, _)| *token);
        if attempts.is_sorted_by(|a, b| a < b) && seen.acknowledged.is_none_or(|token| last <= token) {
            return Ok(());
        }
        Err(format!("job {id:?} was given out wrongly: {seen:?}"))
    }

    /// Of one group, all deliveries of a job are before those of the next.
    fn groups_in_order(&self) -> Result<(), String> {
        let mut last: BTreeMap<&[u8], (JobId, u64)> = BTreeMap::new();
        for (id, seen) in &self.jobs {
            let (Some(group), Some((first, _))) = (&seen.group, seen.deliveries.first_key_value()) else { continue };
            let newest = seen.deliveries.last_key_value().map_or(0, |(token, _)| *token);
            if let Some((before, token)) = last.insert(group, (*id, newest))
                && token > *first
            {
                let group = group.escape_ascii();
                return Err(format!("of group {group} job {id:?} was given out at {first}, job {before:?} at {token}"));
            }
        }
        Ok(())
    }

    // ---- Markers ----

    fn marker(&mut self, call: u64, op: &MarkerOp, reply: &MarkerReply, at: u64) -> Result<(), String> {
        let (MarkerOp::Once(once), MarkerReply::Marked(_)) = (op, reply) else { return Ok(()) };
        match self.marked.insert(once.name.clone(), (call, at)) {
            Some(before) if before != (call, at) => {
                Err(format!("marker {} was put by {before:?} and by {:?}", once.name, (call, at)))
            }
            _ => Ok(()),
        }
    }

    // ---- Idempotency ----

    fn idempotency(&mut self, call: u64, op: &IdempotencyOp, reply: &IdempotencyReply, at: u64) -> Result<(), String> {
        match (op, reply) {
            (IdempotencyOp::Begin(begin), IdempotencyReply::Granted(granted)) => {
                let once = self.once.entry(begin.name.key.clone()).or_default();
                let before = once.granted.insert(granted.attempt.0, (granted.number, call));
                if before.is_some_and(|before| before != (granted.number, call)) {
                    return Err(format!("attempt {} of {:?} was granted twice", granted.attempt, begin.name));
                }
                check_once(&begin.name.key, once)
            }
            (IdempotencyOp::Begin(begin), IdempotencyReply::Replay(replay)) => {
                let known_at = at.max(replay.attempt.0);
                self.result(&begin.name.key, replay.result.clone(), replay.attempt.0, known_at)
            }
            (IdempotencyOp::Complete(complete), IdempotencyReply::Finished(_)) => {
                self.result(&complete.name.key, complete.result.clone(), complete.attempt.0, at)
            }
            _ => Ok(()),
        }
    }

    fn result(&mut self, key: &str, result: PackedResult, attempt: u64, at: u64) -> Result<(), String> {
        let once = self.once.entry(key.into()).or_default();
        let first = once.result.get_or_insert((result.clone(), attempt, at));
        if (&first.0, first.1) != (&result, attempt) {
            return Err(format!("key {key} has result {result:?} of attempt {attempt}, and had {first:?}"));
        }
        first.2 = first.2.min(at);
        check_once(key, once)
    }
}

/// Attempts are numbered in their order, and none is granted once there is a result.
fn check_once(key: &str, once: &Once) -> Result<(), String> {
    let numbers: Vec<u32> = once.granted.values().map(|(number, _)| *number).collect();
    let newest = once.granted.last_key_value().map_or(0, |(token, _)| *token);
    let late = once.result.as_ref().is_some_and(|(_, attempt, _)| newest > *attempt);
    if numbers.is_sorted_by(|a, b| a < b) && !late {
        return Ok(());
    }
    Err(format!("key {key} was granted wrongly: {once:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_given_twice_and_lost_additions_are_noticed() {
        let mut all = Primitives::default();
        assert!(all.numbered(b"s", 1, 4, 10).is_ok());
        assert!(all.numbered(b"s", 4, 5, 12).is_ok());
        assert!(all.numbered(b"s", 3, 6, 13).is_err());
        assert!(all.counted(b"c", 1, 10).is_ok());
        assert!(all.counted(b"c", 1, 11).is_err());
    }

    fn job(revision: u64, token: u64, attempt: u32) -> Received {
        let terms = JobTerms { group: Some(b"g"[..].into()), ..JobTerms::default() };
        let delivered = Delivered {
            id: JobId { revision, index: 0 },
            token: Revision(token),
            queue: b"q"[..].into(),
            payload: b""[..].into(),
            attempt,
            max_attempts: 20,
            visibility_ms: 1_000,
            age_ms: 0,
            priority: 0,
            terms: Some(terms.into()),
            last_error: "".into(),
        };
        Received { jobs: vec![delivered], settled: Vec::new(), waited_ms: 0 }
    }

    #[test]
    fn a_job_in_two_hands_or_after_its_ack_is_noticed() {
        let mut all = Primitives::default();
        assert!(all.received(1, &job(5, 7, 1)).is_ok());
        assert!(all.received(2, &job(5, 7, 1)).is_err(), "one delivery, two hearers");
        let mut all = Primitives::default();
        all.received(1, &job(5, 7, 1)).unwrap();
        all.acknowledged(JobId { revision: 5, index: 0 }, 7).unwrap();
        assert!(all.received(2, &job(5, 9, 2)).is_err(), "it was done");
        let mut all = Primitives::default();
        all.received(1, &job(5, 8, 1)).unwrap();
        all.received(2, &job(6, 7, 1)).unwrap();
        assert!(all.groups_in_order().is_err(), "the second of a group went before the first");
    }

    #[test]
    fn a_second_result_and_a_late_grant_are_noticed() {
        let result = |text: &[u8]| {
            let body = ResultBody::Kept(text.into());
            PackedResult::new(&StoredResult { status: 200, headers: Vec::new(), body })
        };
        let mut all = Primitives::default();
        all.result("k", result(b"one"), 7, 9).unwrap();
        assert!(all.result("k", result(b"two"), 7, 10).is_err());
        let mut once = Once { result: Some((result(b"one"), 7, 9)), ..Once::default() };
        once.granted.insert(11, (2, 1));
        assert!(check_once("k", &once).is_err());
    }
}
