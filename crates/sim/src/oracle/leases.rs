//! No session ends before its time: the time to live after the last renewal that was acknowledged.
//!
//! Promises. The deadline that is demanded counts from the last moment before the caller sent the renewal (or the create) at
//! which the member looked at its clock, so no honest member is accused. Gaps in the member's own time above the election
//! timeout, during which it was frozen or suspended, count for nobody's lease.
//! Not promised. That a dead client's session ends in time: the end of a run demands it (`world.rs`).

use std::collections::BTreeMap;
use tenure_machine::{SessionId, SessionToken};

/// What is owed to the sessions.
#[derive(Clone, Debug, Default)]
pub struct Leases {
    live: BTreeMap<SessionId, Lease>,
    /// Milliseconds during which the member ran.
    uptime_ms: u64,
    /// What each open renewal or create was sent at.
    pub expired: u64,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    token: SessionToken,
    ttl_ms: u64,
    /// Uptime before which it must not expire.
    due_ms: u64,
    /// Somebody has asked for its end.
    end_asked: bool,
}

impl Leases {
    /// The member looked at its clock `gap_ms` after it had last done so.
    pub fn tick(&mut self, gap_ms: u64, election_timeout_ms: u64) {
        if gap_ms <= election_timeout_ms {
            self.uptime_ms += gap_ms;
        }
    }

    pub fn uptime_ms(&self) -> u64 {
        self.uptime_ms
    }

    /// A create was acknowledged; it had been sent at that uptime.
    pub fn created(&mut self, id: SessionId, token: SessionToken, ttl_ms: u64, sent_ms: u64) {
        let due_ms = sent_ms + ttl_ms;
        let known = self.live.entry(id).or_insert(Lease { token, ttl_ms, due_ms, end_asked: false });
        if token > known.token {
            *known = Lease { token, ttl_ms, due_ms, end_asked: false };
        }
    }

    pub fn renewed(&mut self, id: SessionId, token: SessionToken, sent_ms: u64) {
        if let Some(lease) = self.live.get_mut(&id)
            && lease.token == token
        {
            lease.due_ms = lease.due_ms.max(sent_ms + lease.ttl_ms);
        }
    }

    /// A member that starts gives every session its full time again.
    pub fn restarted(&mut self) {
        for lease in self.live.values_mut() {
            lease.due_ms = lease.due_ms.max(self.uptime_ms + lease.ttl_ms);
        }
    }

    /// Somebody has asked for the end of it, so it may be gone at any time.
    pub fn end_asked(&mut self, id: SessionId) {
        if let Some(lease) = self.live.get_mut(&id) {
            lease.end_asked = true;
        }
    }

    /// Whether this incarnation may be over, for the judges of what it held.
    pub fn may_be_over(&self, id: SessionId) -> bool {
        self.live.get(&id).is_none_or(|l| l.end_asked)
    }

    /// Looks at what the member has: `stands` tells the incarnation of a session that is there.
    pub fn look(&mut self, stands: impl Fn(SessionId) -> Option<SessionToken>) -> Result<(), String> {
        let mut over = Vec::new();
        for (&id, lease) in &self.live {
            if stands(id) == Some(lease.token) {
                continue;
            }
            if !lease.end_asked && self.uptime_ms < lease.due_ms {
                return Err(format!(
                    "session {id} (token {}, ttl {} ms) ended at {} ms of the member's time and was owed until {} ms",
                    lease.token, lease.ttl_ms, self.uptime_ms, lease.due_ms
                ));
            }
            over.push(id);
        }
        for id in over {
            if let Some(lease) = self.live.remove(&id) {
                self.expired += u64::from(!lease.end_asked);
            }
        }
        Ok(())
    }

    /// The sessions that ought to be there, the soonest due first.
    pub fn live(&self) -> Vec<(SessionId, SessionToken)> {
        self.live.iter().map(|(&id, l)| (id, l.token)).collect()
    }

    /// Sessions that outlived their time by more than `grace_ms`.
    pub fn overdue(&self, grace_ms: u64) -> Vec<SessionId> {
        let late = |l: &Lease| self.uptime_ms > l.due_ms + grace_ms;
        self.live.iter().filter(|(_, l)| late(l)).map(|(&id, _)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: SessionId = SessionId(5);

    #[test]
    fn time_counts_from_the_last_acknowledged_renewal_and_not_while_frozen() {
        let mut leases = Leases::default();
        leases.created(ID, 7, 2000, 0);
        for _ in 0..15 {
            leases.tick(100, 1000);
        }
        leases.renewed(ID, 7, 1500);
        leases.tick(60_000, 1000);
        leases.tick(1000, 1000);
        assert!(leases.clone().look(|_| None).is_err());
        assert!(leases.look(|_| Some(7)).is_ok());
        leases.tick(1000, 1000);
        assert!(leases.look(|_| None).is_ok());
        assert_eq!(leases.expired, 1);
    }

    #[test]
    fn an_end_that_was_asked_for_may_come_at_once() {
        let mut leases = Leases::default();
        leases.created(ID, 7, 2000, 0);
        leases.end_asked(ID);
        assert!(leases.look(|_| None).is_ok());
        assert_eq!(leases.expired, 0);
    }
}
