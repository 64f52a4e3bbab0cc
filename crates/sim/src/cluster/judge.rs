//! What a whole cluster owes: one leader per term, one state per index, and sessions that end neither early nor twice.
//!
//! Promises. J1: a term has one leader, in one life of it. J2: two members that have applied the same entries hold the same state;
//! a whole one is compared now and then. J3: no session is seen to end before 99 % of its time to live have passed since the
//! sending of its last accepted renewal (or its create); no renewal is answered that was sent after the end; nothing is granted to
//! a session after its end. J4: by the clocks of the clients no two hold one lock at once.
//! Not promised. Fairness, and what nobody asked about.
//! Relies on. Member clocks run within 1 % of the world's. The world tells every look at a member in the order in which it looked.

use crate::oracle::state;
use std::collections::BTreeMap;
use tenure_machine::*;

/// The time to live as a client may count on it: clocks differ by 1 %, and two readings are cut to whole milliseconds.
fn owed_us(ttl_ms: u64) -> u64 {
    (ttl_ms * 990).saturating_sub(3_000)
}

/// What is remembered of one index.
#[derive(Clone, Debug, PartialEq)]
struct Mark {
    term: u64,
    revision: u64,
    stamp: u64,
    checksum: u64,
    state: Option<String>,
}

#[derive(Clone, Debug)]
struct Lease {
    token: SessionToken,
    ttl_ms: u64,
    face: SessionFace,
    /// World time before which it must not end.
    owed_us: u64,
    end_asked: bool,
    ended: Option<Ended>,
    /// When somebody last tried to keep it alive.
    touched_us: u64,
}

#[derive(Clone, Copy, Debug)]
struct Ended {
    step: u64,
    at_us: u64,
    /// It ended at or before this revision.
    revision: u64,
}

/// A client that believes to hold a lock.
#[derive(Clone, Debug)]
struct Holding {
    session: SessionId,
    token: Revision,
}

#[derive(Default)]
pub(super) struct Judge {
    leaders: BTreeMap<u64, (MemberId, u64)>,
    marks: BTreeMap<u64, Mark>,
    leases: BTreeMap<SessionId, Lease>,
    holdings: BTreeMap<Vec<u8>, Vec<Holding>>,
    pub(super) expired: u64,
    pub(super) compared: u64,
}

impl Judge {
    /// J1.
    pub(super) fn leads(&mut self, term: u64, member: MemberId, boot: u64) -> Result<bool, String> {
        match self.leaders.insert(term, (member, boot)) {
            None => Ok(true),
            Some(known) if known == (member, boot) => Ok(false),
            Some((other, life)) => Err(format!(
                "term {term} is led by member {member} in life {boot}, and was led by member {other} in life {life}"
            )),
        }
    }

    pub(super) fn terms(&self) -> u64 {
        self.leaders.len() as u64
    }

    /// J2.
    pub(super) fn position(&mut self, who: &str, machine: &Machine) -> Result<(), String> {
        let at = machine.position();
        if at.index.0 == 0 {
            return Ok(());
        }
        let whole = at.index.0.is_multiple_of(8);
        let mark = Mark {
            term: at.term.0,
            revision: machine.revision().0,
            stamp: machine.stamp().0,
            checksum: machine.checksum(),
            state: whole.then(|| state::dump(machine)),
        };
        let Some(known) = self.marks.get(&at.index.0) else {
            self.marks.insert(at.index.0, mark);
            return Ok(());
        };
        self.compared += 1;
        if *known == mark {
            return Ok(());
        }
        Err(format!("entry {} gave {who}\n{mark:?}\nand another\n{known:?}", at.index))
    }

    // Sessions.

    pub(super) fn created(&mut self, create: &SessionCreate, token: SessionToken, sent_us: u64) {
        let ttl_ms = create.ttl_ms;
        self.leases.entry(create.id).or_insert(Lease {
            token,
            ttl_ms,
            face: create.face,
            owed_us: sent_us + owed_us(ttl_ms),
            end_asked: false,
            ended: None,
            touched_us: sent_us,
        });
    }

    /// Somebody is about to send a renewal.
    pub(super) fn touching(&mut self, id: SessionId, now_us: u64) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.touched_us = now_us;
        }
    }

    /// A renewal that was sent at that step and moment was accepted.
    pub(super) fn renewed(
        &mut self,
        id: SessionId,
        token: SessionToken,
        step: u64,
        sent_us: u64,
        now_us: u64,
    ) -> Result<(), String> {
        let Some(lease) = self.leases.get_mut(&id).filter(|l| l.token == token) else { return Ok(()) };
        lease.owed_us = lease.owed_us.max(sent_us + owed_us(lease.ttl_ms));
        match lease.ended {
            Some(ended) if ended.step < step => Err(format!(
                "session {id} had ended at {} us, and a renewal sent at {sent_us} us was accepted",
                ended.at_us
            )),
            Some(ended) => check_end(id, lease, ended),
            None => {
                let names: Vec<Vec<u8>> = self.holdings.keys().cloned().collect();
                names.iter().try_for_each(|name| self.check_holders(name, now_us))
            }
        }
    }

    pub(super) fn end_asked(&mut self, id: SessionId) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.end_asked = true;
        }
    }

    /// Somebody was told that it is over.
    pub(super) fn told_over(&self, id: SessionId) -> Result<(), String> {
        match self.leases.get(&id) {
            Some(lease) if lease.ended.is_none() => Err(format!("session {id} is said to be over: {lease:?}")),
            _ => Ok(()),
        }
    }

    /// The moment up to which the client may count on it.
    pub(super) fn safe_until_us(&self, id: SessionId) -> Option<u64> {
        self.leases.get(&id).filter(|l| l.ended.is_none() && !l.end_asked).map(|l| l.owed_us)
    }

    /// Looks at what a member has. Gives the sessions that were not known to be over before.
    pub(super) fn look(&mut self, machine: &Machine, step: u64, now_us: u64) -> Result<Vec<SessionId>, String> {
        let mut over = Vec::new();
        for (&id, lease) in &mut self.leases {
            let there = machine.session(id).is_some_and(|s| s.token == lease.token);
            if there || lease.ended.is_some() {
                continue;
            }
            let reached = match lease.face {
                SessionFace::Native => machine.revision().0,
                SessionFace::Etcd => machine.position().index.0,
            };
            // A member that lags has not made it yet.
            if reached < lease.token {
                continue;
            }
            let ended = Ended { step, at_us: now_us, revision: machine.revision().0 };
            check_end(id, lease, ended)?;
            lease.ended = Some(ended);
            self.expired += u64::from(!lease.end_asked);
            over.push(id);
        }
        Ok(over)
    }

    /// Sessions that stand although nobody has tried to keep them for their time, 2 % and `grace_us` more.
    pub(super) fn overdue(&self, calm_since_us: u64, now_us: u64, grace_us: u64) -> Result<(), String> {
        let late = |l: &Lease| now_us > l.touched_us.max(calm_since_us) + l.ttl_ms * 1_020 + grace_us;
        match self.leases.iter().find(|(_, l)| l.ended.is_none() && late(l)) {
            None => Ok(()),
            Some((id, lease)) => Err(format!("session {id} outlives its time to live: {lease:?}")),
        }
    }

    pub(super) fn live(&self) -> usize {
        self.leases.values().filter(|l| l.ended.is_none()).count()
    }

    // Locks.

    /// A client learned that it holds a lock.
    pub(super) fn holds(
        &mut self,
        name: &[u8],
        session: SessionId,
        token: Revision,
        now_us: u64,
    ) -> Result<(), String> {
        if let Some(Ended { revision, .. }) = self.leases.get(&session).and_then(|l| l.ended)
            && revision < token.0
        {
            return Err(format!(
                "lock {} was granted under {token} to session {session}, which had ended at {revision}",
                name.escape_ascii()
            ));
        }
        let all = self.holdings.entry(name.to_vec()).or_default();
        if !all.iter().any(|h| (h.session, h.token) == (session, token)) {
            all.push(Holding { session, token });
        }
        self.check_holders(name, now_us)
    }

    /// A client is about to give it back.
    pub(super) fn lets_go(&mut self, name: &[u8], token: Revision) {
        if let Some(all) = self.holdings.get_mut(name) {
            all.retain(|h| h.token != token);
        }
    }

    /// J4: what each believes by its own clock.
    fn check_holders(&mut self, name: &[u8], now_us: u64) -> Result<(), String> {
        let leases = &self.leases;
        let believes = |h: &Holding| leases.get(&h.session).is_some_and(|l| !l.end_asked && l.owed_us > now_us);
        let Some(all) = self.holdings.get_mut(name) else { return Ok(()) };
        all.retain(believes);
        match all.iter().find(|h| h.session != all[0].session || h.token != all[0].token) {
            None => Ok(()),
            Some(other) => Err(format!("lock {} is held by {:?} and by {other:?}", name.escape_ascii(), all[0])),
        }
    }
}

fn check_end(id: SessionId, lease: &Lease, ended: Ended) -> Result<(), String> {
    if lease.end_asked || ended.at_us >= lease.owed_us {
        return Ok(());
    }
    Err(format!(
        "session {id} (token {}, ttl {} ms) ended at {} us and was owed until {} us",
        lease.token, lease.ttl_ms, ended.at_us, lease.owed_us
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_has_one_leader_in_one_life() {
        let mut judge = Judge::default();
        assert!(judge.leads(3, MemberId(1), 7).unwrap());
        assert!(!judge.leads(3, MemberId(1), 7).unwrap());
        assert!(judge.leads(3, MemberId(2), 9).is_err());
        assert!(judge.leads(3, MemberId(1), 8).is_err());
    }

    #[test]
    fn two_holders_by_their_own_clocks_are_noticed() {
        let create = |id| SessionCreate {
            id: SessionId(id),
            face: SessionFace::Native,
            ttl_ms: 1_000,
            on_expire: OnExpire::Delete,
            name: "".into(),
            metadata: Vec::new(),
            alias: None,
            secret: None,
        };
        let mut judge = Judge::default();
        judge.created(&create(1), 5, 0);
        judge.created(&create(2), 6, 500_000);
        assert!(judge.holds(b"l", SessionId(1), Revision(7), 10_000).is_ok());
        assert!(judge.holds(b"l", SessionId(2), Revision(9), 900_000).is_err());
        judge.lets_go(b"l", Revision(7));
        assert!(judge.holds(b"l", SessionId(2), Revision(10), 900_000).is_err(), "two tokens are two grants");
        judge.lets_go(b"l", Revision(9));
        assert!(judge.holds(b"l", SessionId(1), Revision(11), 990_001).is_ok(), "its time is over by then");
    }
}
