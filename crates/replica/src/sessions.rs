//! Deadlines of sessions: soft state of the leader, which apply never sees.
//!
//! Promises. D1: no session is proposed to end before its time to live has passed since the leader accepted its last renewal, on the
//! member's own clock, which leaves out every gap in which the member did not run. D2: a renewal is answered yes only if the session was
//! live at a moment after it arrived: after a read-index round that began later, and never while an expiry of that session is
//! under way; it waits for the fate of that. D3: a new leader starts every session with its full time, or with what a replicated
//! checkpoint left of it; a renewal after a checkpoint is answered when the clearing of it is applied. D4: what was asked of the log and
//! not seen there is asked again every [`AGAIN_MS`]: a proposal may be dropped where too much is undecided, and nobody else would ask.
//! Not promised. That a dead session ends at once: a failover adds up to one whole time to live.
//! Relies on. The member asks for nothing here before it has applied an entry of its own term, and drops all of it with its leadership.

use std::collections::{BTreeMap, BTreeSet};
use tenure_machine::{SessionEvent, SessionId, SessionToken, Ticket};

/// What is left of a session is replicated this often, if its time to live is longer.
pub(crate) const CHECKPOINT_EVERY_MS: u64 = 300_000;

/// What the log has not told after so long is asked of it again. Asking twice does no harm: an end names its incarnation, and a clearing
/// comes before the renewals that wait for it are answered.
const AGAIN_MS: u64 = 5_000;

/// What a leader should put into the log now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Expire {
        id: SessionId,
        token: SessionToken,
    },
    /// `None`: the clearing of one, for a renewal that waits.
    Checkpoint {
        id: SessionId,
        token: SessionToken,
        remaining_ms: Option<u64>,
    },
}

/// What becomes of a renewal at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Renewing {
    Renewed {
        token: SessionToken,
        ttl_ms: u64,
    },
    /// There is no such session.
    Gone,
    /// The answer comes with an event of the log.
    Held,
    /// The same, and this clearing of a checkpoint must be proposed for it.
    HeldForClearing {
        token: SessionToken,
    },
}

/// A renewal whose fate the log has told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) ticket: Ticket,
    pub(crate) session: SessionId,
    /// Token and time to live, or nothing if the session has ended.
    pub(crate) renewed: Option<(SessionToken, u64)>,
}

#[derive(Debug)]
struct Held {
    token: SessionToken,
    ttl_ms: u64,
    deadline: u64,
    /// When to look at it again; never after the deadline, and where the log was asked, when to ask again.
    look_at: u64,
    checkpoint_at: u64,
    state: State,
    /// Renewals that wait for the log.
    waiting: Vec<Ticket>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Live,
    /// A checkpoint in the log says less than a renewal would.
    Checkpointed,
    Clearing,
    Expiring,
}

#[derive(Debug, Default)]
pub(crate) struct Deadlines {
    sessions: BTreeMap<SessionId, Held>,
    /// One entry per session. A renewal leaves it: it is moved when its time comes.
    queue: BTreeSet<(u64, SessionId)>,
}

impl Deadlines {
    /// A session of the state, seen by a new leader, or made under it.
    pub(crate) fn start(&mut self, now: u64, id: SessionId, token: SessionToken, ttl_ms: u64, checkpoint: Option<u64>) {
        let left = checkpoint.map_or(ttl_ms, |c| c.min(ttl_ms));
        let deadline = now.saturating_add(left);
        let checkpoint_at = if left > CHECKPOINT_EVERY_MS { now + CHECKPOINT_EVERY_MS } else { u64::MAX };
        let look_at = deadline.min(checkpoint_at);
        let state = if checkpoint.is_some() { State::Checkpointed } else { State::Live };
        let held = Held { token, ttl_ms, deadline, look_at, checkpoint_at, state, waiting: Vec::new() };
        if let Some(old) = self.sessions.insert(id, held) {
            self.queue.remove(&(old.look_at, id));
        }
        self.queue.insert((look_at, id));
    }

    /// A read-index round that began after the renewal arrived has ended, and what it said is applied.
    pub(crate) fn renew(&mut self, now: u64, id: SessionId, ticket: Ticket) -> Renewing {
        let Some(held) = self.sessions.get_mut(&id) else { return Renewing::Gone };
        match held.state {
            State::Live => {
                held.extend(now);
                Renewing::Renewed { token: held.token, ttl_ms: held.ttl_ms }
            }
            State::Checkpointed => {
                held.waiting.push(ticket);
                held.state = State::Clearing;
                self.queue.remove(&(held.look_at, id));
                held.look_at = now + AGAIN_MS;
                self.queue.insert((held.look_at, id));
                Renewing::HeldForClearing { token: held.token }
            }
            State::Clearing | State::Expiring => {
                held.waiting.push(ticket);
                Renewing::Held
            }
        }
    }

    /// At most `max` things that are due; the sessions named to expire count as expiring from now on.
    pub(crate) fn due(&mut self, now: u64, max: usize) -> Vec<Due> {
        let mut due = Vec::new();
        while due.len() < max {
            let Some(&(at, id)) = self.queue.first().filter(|&&(at, _)| at <= now) else { break };
            self.queue.remove(&(at, id));
            let Some(held) = self.sessions.get_mut(&id) else { continue };
            let (token, again) = (held.token, now + AGAIN_MS);
            held.look_at = if held.state == State::Clearing {
                // A renewal waits for it: its session is not ended.
                due.push(Due::Checkpoint { id, token, remaining_ms: None });
                again
            } else if held.deadline <= now {
                held.state = State::Expiring;
                due.push(Due::Expire { id, token });
                again
            } else {
                if held.checkpoint_at <= now {
                    held.checkpoint_at = now + CHECKPOINT_EVERY_MS;
                    // From here on, not from when it is applied: a renewal in between must be cleared behind it in the log.
                    held.state = State::Checkpointed;
                    due.push(Due::Checkpoint { id, token, remaining_ms: Some(held.deadline - now) });
                }
                held.deadline.min(held.checkpoint_at)
            };
            self.queue.insert((held.look_at, id));
        }
        due
    }

    pub(crate) fn next(&self) -> Option<u64> {
        self.queue.first().map(|&(at, _)| at)
    }

    /// What the log did to a session. Gives the renewals that this answers.
    pub(crate) fn event(&mut self, now: u64, event: &SessionEvent) -> Vec<Told> {
        match *event {
            SessionEvent::Created { id, token, ttl_ms } => {
                self.start(now, id, token, ttl_ms, None);
                Vec::new()
            }
            SessionEvent::Ended { id, token } => self.ended(id, token),
            SessionEvent::ExpiryDropped { id, token } => self.went_on(now, id, token, State::Expiring),
            SessionEvent::Checkpoint { id, token, remaining_ms: None } => self.went_on(now, id, token, State::Clearing),
            SessionEvent::Checkpoint { id, token, remaining_ms: Some(_) } => {
                if let Some(held) = self.of(id, token)
                    && held.state == State::Live
                {
                    held.state = State::Checkpointed;
                }
                Vec::new()
            }
        }
    }

    fn of(&mut self, id: SessionId, token: SessionToken) -> Option<&mut Held> {
        self.sessions.get_mut(&id).filter(|held| held.token == token)
    }

    fn ended(&mut self, id: SessionId, token: SessionToken) -> Vec<Told> {
        if self.of(id, token).is_none() {
            return Vec::new();
        }
        let Some(held) = self.sessions.remove(&id) else { return Vec::new() };
        self.queue.remove(&(held.look_at, id));
        held.waiting.into_iter().map(|ticket| Told { ticket, session: id, renewed: None }).collect()
    }

    /// The expiry had no effect, or the checkpoint is cleared: who waited is renewed.
    fn went_on(&mut self, now: u64, id: SessionId, token: SessionToken, from: State) -> Vec<Told> {
        let Some(held) = self.of(id, token).filter(|held| held.state == from) else { return Vec::new() };
        held.state = State::Live;
        held.extend(now);
        let renewed = Some((held.token, held.ttl_ms));
        let told =
            std::mem::take(&mut held.waiting).into_iter().map(|ticket| Told { ticket, session: id, renewed }).collect();
        let (old, new) = (held.look_at, held.deadline.min(held.checkpoint_at));
        held.look_at = new;
        self.queue.remove(&(old, id));
        self.queue.insert((new, id));
        told
    }

    pub(crate) fn remaining_ms(&self, now: u64, id: SessionId) -> Option<u64> {
        self.sessions.get(&id).map(|held| held.deadline.saturating_sub(now))
    }

    /// Leadership is over: nothing here is known any more. Gives the renewals that were waiting.
    pub(crate) fn clear(&mut self) -> Vec<Ticket> {
        self.queue.clear();
        std::mem::take(&mut self.sessions).into_values().flat_map(|held| held.waiting).collect()
    }
}

impl Held {
    fn extend(&mut self, now: u64) {
        self.deadline = now.saturating_add(self.ttl_ms);
        self.checkpoint_at = if self.ttl_ms > CHECKPOINT_EVERY_MS { now + CHECKPOINT_EVERY_MS } else { u64::MAX };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: SessionId = SessionId(7);

    fn ticket(number: u64) -> Ticket {
        Ticket { number, ..Ticket::default() }
    }

    fn one(ttl_ms: u64) -> Deadlines {
        let mut d = Deadlines::default();
        d.event(0, &SessionEvent::Created { id: S, token: 5, ttl_ms });
        d
    }

    const EXPIRE: Due = Due::Expire { id: S, token: 5 };
    const CLEAR: Due = Due::Checkpoint { id: S, token: 5, remaining_ms: None };

    #[test]
    fn a_renewal_moves_the_deadline_and_a_missed_one_ends_it() {
        let mut d = one(1000);
        assert_eq!(d.due(999, 9), []);
        assert_eq!(d.renew(999, S, ticket(1)), Renewing::Renewed { token: 5, ttl_ms: 1000 });
        assert_eq!(d.due(1998, 9), []);
        assert_eq!(d.remaining_ms(1998, S), Some(1));
        assert_eq!(d.due(1999, 9), [EXPIRE]);
        assert_eq!(d.due(6998, 9), [], "proposed once");
        assert_eq!(d.due(6999, 9), [EXPIRE], "and again where the log has not told of it");
        assert_eq!(d.renew(0, SessionId(8), ticket(1)), Renewing::Gone);
    }

    #[test]
    fn a_renewal_against_an_expiry_in_flight_waits_for_its_fate() {
        let mut d = one(1000);
        assert_eq!(d.due(1000, 9), [EXPIRE]);
        assert_eq!(d.renew(1001, S, ticket(1)), Renewing::Held);
        let told = d.event(1002, &SessionEvent::Ended { id: S, token: 5 });
        assert_eq!(told, [Told { ticket: ticket(1), session: S, renewed: None }]);
        assert_eq!(d.renew(1003, S, ticket(2)), Renewing::Gone);

        let mut d = one(1000);
        assert_eq!(d.due(1000, 9), [EXPIRE]);
        assert_eq!(d.renew(1001, S, ticket(1)), Renewing::Held);
        let told = d.event(1002, &SessionEvent::ExpiryDropped { id: S, token: 5 });
        assert_eq!(told, [Told { ticket: ticket(1), session: S, renewed: Some((5, 1000)) }]);
        assert_eq!(d.due(2001, 9), []);
        assert_eq!(d.due(2002, 9), [EXPIRE]);
    }

    #[test]
    fn the_end_of_an_older_incarnation_does_not_touch_a_newer() {
        let mut d = one(1000);
        assert_eq!(d.event(10, &SessionEvent::Created { id: S, token: 6, ttl_ms: 1000 }), []);
        assert_eq!(d.event(11, &SessionEvent::Ended { id: S, token: 5 }), []);
        assert_eq!(d.due(1010, 9), [Due::Expire { id: S, token: 6 }]);
    }

    #[test]
    fn a_checkpoint_lowers_the_start_and_is_cleared_before_a_renewal_is_answered() {
        let mut d = Deadlines::default();
        d.start(0, S, 5, 1_000_000, Some(400));
        assert_eq!(d.remaining_ms(0, S), Some(400));
        assert_eq!(d.renew(100, S, ticket(1)), Renewing::HeldForClearing { token: 5 });
        assert_eq!(d.renew(100, S, ticket(2)), Renewing::Held);
        assert_eq!(d.due(5_099, 9), [], "not while a renewal waits for the clearing");
        assert_eq!(d.due(5_100, 9), [CLEAR], "which is asked for again");
        let told = d.event(5_200, &SessionEvent::Checkpoint { id: S, token: 5, remaining_ms: None });
        assert_eq!(
            told.iter().map(|t| (t.ticket.number, t.renewed)).collect::<Vec<_>>(),
            [(1, Some((5, 1_000_000))), (2, Some((5, 1_000_000)))]
        );
        assert_eq!(d.remaining_ms(5_200, S), Some(1_000_000));
        assert_eq!(d.renew(5_300, S, ticket(3)), Renewing::Renewed { token: 5, ttl_ms: 1_000_000 });
    }

    #[test]
    fn long_sessions_are_checkpointed_now_and_then() {
        let mut d = one(700_000);
        assert_eq!(d.due(299_999, 9), []);
        assert_eq!(d.due(300_000, 9), [Due::Checkpoint { id: S, token: 5, remaining_ms: Some(400_000) }]);
        // Answered yes before the checkpoint is applied, a failover would cut the renewed time short.
        assert_eq!(d.renew(300_000, S, ticket(1)), Renewing::HeldForClearing { token: 5 });
        assert_eq!(d.due(600_000, 9), [CLEAR], "no checkpoint over a clearing");
    }

    #[test]
    fn due_work_is_bounded() {
        let mut d = Deadlines::default();
        for id in 1..=10 {
            d.start(0, SessionId(id), id, 10, None);
        }
        assert_eq!(d.due(10, 4).len(), 4);
        assert_eq!(d.next(), Some(10));
        assert_eq!(d.due(10, 100).len(), 6);
        assert_eq!(d.next(), Some(10 + AGAIN_MS));
    }
}
