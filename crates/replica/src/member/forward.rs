//! Requests that reach a member that does not lead, and requests that wait too long.
//!
//! Promises. W1: a transaction is sent to a leader once; it is sent again, to another one, only after the first has said that it did not
//! take it. W2: the caller hears of a transaction from what its own member applies, whichever member proposed it. W3: without a majority a
//! request is answered within one election timeout: `NoQuorum` if nothing was done, `Unknown` if it was on its way. W4: reads and renewals
//! are confirmed by the leader with a round that began after they came, one round for all that wait.
//! Not promised. That an answer comes where the leader is only slow: then it may take five election timeouts until `Unknown`.
//!
//! A leader takes each number of each life of a member once, and rising: a message that the network repeats is not a second request.

use super::*;
use crate::peer::{NotTaken, PeerMessage, Touched};
use tenure_machine::{LockAcquire, NamespaceId, OpReply, Reply, RequestId, TxnReply};

/// A request of a slow but present leader is given up after so many election timeouts.
const PATIENCE: u64 = 5;
/// A question for a read index that got no answer is asked again after this long; asking twice does no harm.
const ASK_AGAIN_MS: u64 = 300;
/// Renewals in one message.
const TOUCHES_MAX: usize = 10_000;

/// Who wants a queued transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wants {
    Caller,
    /// This member itself, as the leader: of no use to another.
    Lead,
    /// This member itself, about itself.
    Own,
    /// A caller of another member, in that life of it.
    Member(MemberId, u64),
}

/// A transaction that waits for the next entry or for a leader.
pub(super) struct Queued {
    pub(super) number: u64,
    pub(super) txn: Txn,
    pub(super) size: usize,
    pub(super) arrived: u64,
    pub(super) wants: Wants,
    /// Members that did not take it: they would not take its number again.
    pub(super) tried: Vec<MemberId>,
}

/// A transaction that was sent to a leader and is not applied here yet.
pub(super) struct Sent {
    queued: Queued,
    to: MemberId,
    term: u64,
}

/// A renewal that was sent to a leader.
pub(super) struct Touching {
    session: SessionId,
    token: SessionToken,
    at: u64,
}

/// What a caller asked, kept for the case that a snapshot skips the answer.
pub(super) struct Remembered {
    principal: Box<str>,
    request: Option<(RequestId, [u8; 16])>,
    acquire: Option<(NamespaceId, LockAcquire)>,
}

impl Remembered {
    fn of(txn: &Txn) -> Option<Self> {
        let acquire = match txn.then.as_slice() {
            // Without an owner of its own, a grant of the session could be another call's.
            [Op::LockAcquire(a)] if a.create.is_none() && !a.owner.is_empty() => Some((txn.namespace, a.clone())),
            _ => None,
        };
        (acquire.is_some() || txn.request.is_some()).then(|| Self {
            principal: txn.principal.clone(),
            request: txn.request.map(|id| (id, txn.digest())),
            acquire,
        })
    }
}

impl<D: Disk> Member<D> {
    /// The leader, where this member follows one that it is connected to: its id and its life.
    fn way_to_leader(&self) -> Option<(MemberId, u64)> {
        let leader = MemberId(self.raft.raft.leader_id);
        if leader == self.config.member {
            return None;
        }
        self.links.get(&leader).map(|link| (leader, link.boot))
    }

    pub(super) fn remember(&mut self, number: u64, txn: &Txn) {
        if !self.alone()
            && let Some(remembered) = Remembered::of(txn)
        {
            self.remembered.insert(number, remembered);
        }
    }

    // Out: to the leader.

    /// Everything that waits goes to the leader, as batches that name their callers.
    pub(super) fn forward(&mut self) {
        let Some((to, to_boot)) = self.way_to_leader() else { return };
        let term = self.raft.raft.term;
        let mut stays = VecDeque::new();
        let mut batch: Vec<Queued> = Vec::new();
        let mut bytes = 0;
        for queued in std::mem::take(&mut self.queue) {
            let ours = matches!(queued.wants, Wants::Caller | Wants::Own);
            if !ours || queued.tried.contains(&to) {
                stays.push_back(queued);
                continue;
            }
            let follows = batch.last().is_none_or(|last| queued.number == last.number + 1);
            if !follows || (!batch.is_empty() && bytes + queued.size > self.config.max_batch_bytes) {
                self.send_batch(to, to_boot, term, std::mem::take(&mut batch));
                bytes = 0;
            }
            bytes += queued.size;
            self.queue_bytes -= queued.size;
            batch.push(queued);
        }
        self.queue = stays;
        self.send_batch(to, to_boot, term, batch);
    }

    fn send_batch(&mut self, to: MemberId, to_boot: u64, term: u64, queued: Vec<Queued>) {
        let Some(first) = queued.first().map(|q| q.number) else { return };
        let origin = Origin { member: self.config.member, boot: self.config.boot, first };
        let txns = queued.iter().map(|q| q.txn.clone()).collect();
        let batch = Batch { behaviour: self.machine.behaviour(), stamp: LogTime(0), origin, txns };
        self.post(to, Lane::Messages, &PeerMessage::Forward { to_boot, batch: &batch.encode() });
        for queued in queued {
            self.sent_bytes += queued.size;
            self.sent.insert(queued.number, Sent { queued, to, term });
        }
    }

    /// Reads and renewals that wait are put to the leader.
    pub(super) fn ask_leader(&mut self) {
        let Some((to, to_boot)) = self.way_to_leader() else { return };
        let asked = std::mem::take(&mut self.asked);
        // A follower's own, never another's: it does not lead.
        if !asked.reads.is_empty() {
            let number = self.next_read_number();
            let now = self.clock.elapsed();
            self.post(to, Lane::Messages, &PeerMessage::Read { to_boot, number });
            self.rounds
                .insert(number, Round { reads: asked.reads, since: asked.since, asked_at: now, ..Round::default() });
        }
        let mut touches = Vec::new();
        for (session, token, ticket) in asked.renewals {
            self.touching.insert(ticket.number, Touching { session, token, at: asked.since });
            touches.push((ticket.number, session, token));
        }
        for touches in touches.chunks(TOUCHES_MAX) {
            self.post(to, Lane::Messages, &PeerMessage::Touch { to_boot, touches: touches.to_vec() });
        }
    }

    /// What was asked of a leader that is none any more, or of this member while it led, is asked again.
    pub(super) fn ask_again(&mut self) {
        let mut again = std::mem::take(&mut self.asked);
        let rounds = std::mem::take(&mut self.rounds).into_values();
        let confirmed = std::mem::take(&mut self.confirmed).into_iter().map(|(_, round)| round);
        rounds.chain(confirmed).for_each(|round| again.absorb(round));
        for (number, touching) in std::mem::take(&mut self.touching) {
            again.begin(touching.at);
            again.renewals.push((touching.session, touching.token, self.ticket(number)));
        }
        if self.lead.is_none() {
            for (member, boot, number) in std::mem::take(&mut again.remote) {
                self.tell_no_index(member, boot, number);
            }
            let (own, others): (Vec<_>, Vec<_>) =
                again.renewals.into_iter().partition(|(_, _, ticket)| self.is_own(*ticket));
            again.renewals = own;
            for (_, _, ticket) in others {
                self.touched(ticket, Touched::Refused);
            }
        }
        self.asked = again;
    }

    /// Answers to renewals of another member's callers leave together.
    pub(super) fn touched(&mut self, ticket: Ticket, what: Touched) {
        self.touched.entry((ticket.member, ticket.boot)).or_default().push((ticket.number, what));
    }

    pub(super) fn post_touched(&mut self) {
        for ((member, to_boot), touched) in std::mem::take(&mut self.touched) {
            for touched in touched.chunks(TOUCHES_MAX) {
                let touched = touched.to_vec();
                self.post(member, Lane::Messages, &PeerMessage::Touched { to_boot, touched });
            }
        }
    }

    // In: from followers.

    pub(super) fn forwarded(&mut self, from: MemberId, to_boot: u64, batch: &[u8]) {
        let Ok(batch) = Batch::decode(batch) else { return };
        let Origin { member, boot, first } = batch.origin;
        if to_boot != self.config.boot || member != from {
            return;
        }
        let taken = self.taken_numbers.entry(from).or_insert((boot, 0));
        if taken.0 != boot {
            *taken = (boot, 0);
        }
        let mut refused = Vec::new();
        for (number, txn) in (first..).zip(batch.txns) {
            let taken = self.taken_numbers.entry(from).or_insert((boot, 0));
            if number <= taken.1 {
                continue;
            }
            taken.1 = number;
            let size = weight(&txn);
            let why = match self.may_take(&txn, size) {
                Ok(()) if self.lead.is_some() => {
                    self.queue_bytes += size;
                    let (arrived, wants) = (self.clock.elapsed(), Wants::Member(from, boot));
                    self.queue.push_back(Queued { number, txn, size, arrived, wants, tried: Vec::new() });
                    continue;
                }
                Ok(()) => NotTaken::Elsewhere,
                Err(Refusal::Memory(_)) => NotTaken::Memory,
                Err(Refusal::DiskFull) => NotTaken::DiskFull,
                Err(Refusal::Stopping) => NotTaken::Stopping,
                // A leader that has not applied as much as the member that asks: it will have soon.
                Err(Refusal::NoQuorum | Refusal::NotYet { .. }) => NotTaken::Elsewhere,
                Err(Refusal::Overloaded | Refusal::TooLarge { .. }) => NotTaken::Overloaded,
            };
            refused.push((number, why));
        }
        for (number, why) in refused {
            self.tell_not_taken(from, boot, number, why);
        }
    }

    /// A caller of another member hears that nothing of its request was or will be done here.
    pub(super) fn tell_not_taken(&mut self, member: MemberId, to_boot: u64, number: u64, why: NotTaken) {
        self.post(member, Lane::Messages, &PeerMessage::NotTaken { to_boot, number, why });
    }

    fn tell_no_index(&mut self, member: MemberId, to_boot: u64, number: u64) {
        self.post(member, Lane::Messages, &PeerMessage::ReadAt { to_boot, number, index: None });
    }

    pub(super) fn not_taken(&mut self, from: MemberId, number: u64, why: NotTaken) {
        if self.sent.get(&number).is_none_or(|sent| sent.to != from) {
            return;
        }
        let Some(Sent { mut queued, .. }) = self.take_sent(number) else { return };
        let refusal = match why {
            NotTaken::Elsewhere | NotTaken::Stopping => {
                queued.tried.push(from);
                self.queue_bytes += queued.size;
                self.queue.push_back(queued);
                return;
            }
            NotTaken::Memory => self.machine.admit(&queued.txn).map_or_else(Refusal::Memory, |()| Refusal::Overloaded),
            NotTaken::DiskFull => Refusal::DiskFull,
            NotTaken::Overloaded => Refusal::Overloaded,
        };
        self.refuse_number(number, refusal);
    }

    pub(super) fn asked_for_index(&mut self, from: MemberId, boot: u64, number: u64) {
        if self.lead.is_none() || self.may_ask().is_err() || self.asked.remote.len() >= self.config.max_queued {
            return self.tell_no_index(from, boot, number);
        }
        self.asked.begin(self.clock.elapsed());
        self.asked.remote.push((from, boot, number));
    }

    pub(super) fn index_told(&mut self, number: u64, index: Option<u64>) {
        let Some(round) = self.rounds.remove(&number) else { return };
        match index {
            Some(index) => self.confirmed.push((index, round)),
            // The next poll asks whoever leads then.
            None => {
                self.turned_down_at = Some(self.clock.elapsed());
                self.asked.absorb(round);
                self.pause_asking = true;
            }
        }
    }

    pub(super) fn touches(&mut self, from: MemberId, boot: u64, touches: Vec<(u64, SessionId, SessionToken)>) {
        let takes = self.lead.is_some() && self.may_ask().is_ok();
        self.asked.begin(self.clock.elapsed());
        for (number, session, token) in touches {
            let ticket = Ticket { member: from, boot, number };
            if takes && self.asked.renewals.len() < 8 * self.config.max_queued {
                self.asked.renewals.push((session, token, ticket));
            } else {
                self.touched(ticket, Touched::Refused);
            }
        }
    }

    pub(super) fn touches_told(&mut self, touched: Vec<(u64, Touched)>) {
        for (number, what) in touched {
            let Some(touching) = self.touching.remove(&number) else { continue };
            let ticket = self.ticket(number);
            let session = touching.session;
            match what {
                Touched::Renewed { token, ttl_ms } => {
                    self.told.push((ticket, Answer::Renewed(Ok(Renewal { session, token, ttl_ms }))));
                }
                Touched::Gone => {
                    self.told.push((ticket, Answer::Renewed(Err(Rejection::SessionExpired { session }))));
                }
                Touched::Refused => {
                    self.turned_down_at = Some(self.clock.elapsed());
                    self.asked.begin(touching.at);
                    self.asked.renewals.push((session, touching.token, ticket));
                    self.pause_asking = true;
                }
            }
        }
    }

    // What becomes of them.

    /// An entry with requests of callers of this life is applied: what was on its way has arrived.
    pub(super) fn arrived(&mut self, origin: Origin, count: u64) {
        if self.sent.is_empty() || origin.member != self.config.member || origin.boot != self.config.boot {
            return;
        }
        for number in origin.first..origin.first + count {
            self.take_sent(number);
        }
    }

    fn take_sent(&mut self, number: u64) -> Option<Sent> {
        let sent = self.sent.remove(&number)?;
        self.sent_bytes -= sent.queued.size;
        Some(sent)
    }

    pub(super) fn refuse_number(&mut self, number: u64, refusal: Refusal) {
        self.remembered.remove(&number);
        if self.waiting.remove(&number) {
            self.refused.push((self.ticket(number), refusal));
        }
    }

    fn lose_number(&mut self, number: u64) {
        self.remembered.remove(&number);
        if self.waiting.remove(&number) {
            self.told.push((self.ticket(number), Answer::Unknown));
        }
    }

    /// Whether this member leads a majority, or follows a leader, that was heard of within an election timeout.
    pub(super) fn in_touch(&self) -> bool {
        let (now, timeout) = (self.clock.elapsed(), self.config.election_ms());
        match self.lead {
            Some(_) => self.majority_heard_at().is_some_and(|at| now < at + timeout),
            // One that can be heard, and says that it cannot answer, has lost its own majority.
            None => {
                self.raft.raft.leader_id != raft::INVALID_ID
                    && now < self.leader_heard_at + timeout
                    && self.turned_down_at.is_none_or(|at| now >= at + timeout)
            }
        }
    }

    /// Answers what has waited for longer than an election timeout without a majority to decide it.
    pub(super) fn give_up_late(&mut self) {
        if self.alone() {
            return;
        }
        let (now, timeout) = (self.clock.elapsed(), self.config.election_ms());
        let in_touch = self.in_touch();
        let late = |arrived: u64, is_with_leader: bool| {
            let patience = if in_touch && is_with_leader { PATIENCE } else { 1 };
            now >= arrived + patience * timeout
        };
        let transferring = self.lead.is_some() && self.raft.raft.lead_transferee.is_some();
        self.give_up_queue(|arrived| late(arrived, transferring));
        let (leader, term) = (self.raft.raft.leader_id, self.raft.raft.term);
        let lost: Vec<u64> = self
            .sent
            .iter()
            .filter(|(_, s)| late(s.queued.arrived, s.to.0 == leader && s.term == term))
            .map(|(number, _)| *number)
            .collect();
        for number in lost {
            self.take_sent(number);
            self.lose_number(number);
        }
        let leads = self.lead.is_some();
        let overdue = self.proposed.iter_mut().filter(|p| p.is_own && !p.given_up && late(p.arrived, leads));
        let lost: Vec<_> = overdue
            .map(|p| {
                p.given_up = true;
                p.first..p.first + p.count
            })
            .collect();
        lost.into_iter().flatten().for_each(|number| self.lose_number(number));
        self.give_up_reads(|since| late(since, true));
    }

    fn give_up_queue(&mut self, late: impl Fn(u64) -> bool) {
        if self.queue.iter().all(|q| !late(q.arrived)) {
            return;
        }
        let (overdue, stays): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.queue).into_iter().partition(|q| late(q.arrived));
        self.queue = stays.into();
        for q in overdue {
            self.queue_bytes -= q.size;
            match q.wants {
                Wants::Caller => self.refuse_number(q.number, Refusal::NoQuorum),
                Wants::Member(member, boot) => self.tell_not_taken(member, boot, q.number, NotTaken::Elsewhere),
                Wants::Lead | Wants::Own => {}
            }
        }
    }

    fn give_up_reads(&mut self, late: impl Fn(u64) -> bool) {
        let mut overdue = Vec::new();
        if !self.asked.is_empty() && late(self.asked.since) {
            overdue.push(std::mem::take(&mut self.asked));
        }
        let numbers: Vec<u64> = self.rounds.iter().filter(|(_, r)| late(r.since)).map(|(n, _)| *n).collect();
        overdue.extend(numbers.iter().filter_map(|n| self.rounds.remove(n)));
        let (late_ones, stays): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.confirmed).into_iter().partition(|(_, r)| late(r.since));
        self.confirmed = stays;
        overdue.extend(late_ones.into_iter().map(|(_, r)| r));
        for round in overdue {
            for ticket in round.reads {
                self.refused.push((ticket, Refusal::NoQuorum));
            }
            for (_, _, ticket) in round.renewals {
                self.refuse_renewal(ticket);
            }
            for (member, boot, number) in round.remote {
                self.tell_no_index(member, boot, number);
            }
        }
        let numbers: Vec<u64> = self.touching.iter().filter(|(_, t)| late(t.at)).map(|(n, _)| *n).collect();
        for number in numbers {
            self.touching.remove(&number);
            self.refused.push((self.ticket(number), Refusal::NoQuorum));
        }
    }

    pub(super) fn refuse_renewal(&mut self, ticket: Ticket) {
        if self.is_own(ticket) {
            self.refused.push((ticket, Refusal::NoQuorum));
        } else {
            self.touched(ticket, Touched::Refused);
        }
    }

    /// Asks again for read indexes that have not come.
    pub(super) fn ask_late_reads(&mut self) {
        let now = self.clock.elapsed();
        let Some((to, to_boot)) = self.way_to_leader() else { return };
        let late: Vec<u64> = self
            .rounds
            .iter_mut()
            .filter(|(_, round)| now >= round.asked_at + ASK_AGAIN_MS)
            .map(|(number, round)| {
                round.asked_at = now;
                *number
            })
            .collect();
        for number in late {
            self.post(to, Lane::Messages, &PeerMessage::Read { to_boot, number });
        }
    }

    /// A snapshot took the place of the entries that would have answered: the remembered reply, the grant that is in the state, a wait that
    /// is in the state, or `Unknown`.
    pub(super) fn after_restore(&mut self, out: &mut Effects) {
        let waits: BTreeSet<Ticket> = self.machine.waiting_tickets().collect();
        let index = self.machine.position().index.0;
        let queued: BTreeSet<u64> = self.queue.iter().filter(|q| q.wants == Wants::Caller).map(|q| q.number).collect();
        self.proposed.retain(|p| p.index > index);
        self.sent.clear();
        self.sent_bytes = 0;
        for number in self.waiting.iter().copied().filter(|n| !queued.contains(n)).collect::<Vec<_>>() {
            let ticket = self.ticket(number);
            if waits.contains(&ticket) {
                continue;
            }
            self.waiting.remove(&number);
            let found = self.remembered.remove(&number).and_then(|r| self.found(&r));
            out.answers.push((ticket, found.map_or(Answer::Unknown, Answer::Done)));
        }
        self.remembered.retain(|number, _| self.waiting.contains(number));
    }

    fn found(&self, asked: &Remembered) -> Option<tenure_machine::Reply> {
        if let Some((request, digest)) = &asked.request
            && let Some(reply) = self.machine.remembered(&asked.principal, request, *digest)
        {
            return Some(reply);
        }
        let (namespace, acquire) = asked.acquire.as_ref()?;
        let grant = self.machine.granted(*namespace, &acquire.name, acquire.session, &acquire.owner)?;
        let result = TxnReply { succeeded: true, results: vec![OpReply::LockGranted(grant)] };
        Some(Reply { revision: self.machine.revision(), replayed: true, result: Ok(result) })
    }
}
