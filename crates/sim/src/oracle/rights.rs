//! What is held under a token: locks in any mode, the lead of an election, the registration of an instance.
//!
//! Promises. From the answers that clients got: what excludes one another never shares a token, and before anybody is told of the later one there was an
//! end of the earlier: somebody had asked for one, or its session was over. Nothing is granted to a session that was over. What was done under a token was done before the
//! next grant that excludes it, before its own end, before the end of its session, and before an operator took it away.
//! Not promised. Anything about grants that nobody was told of.
//! Relies on. Every commit has a revision of its own, and tokens are revisions.

use std::collections::BTreeMap;
use tenure_machine::{HoldMode, SessionId};

/// What it is, and its name.
pub type Thing = (&'static str, Vec<u8>);

#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    pub call: u64,
    pub session: SessionId,
    /// Whoever asks again under this name may be given the same again.
    pub owner: Vec<u8>,
    pub mode: HoldMode,
    pub slots: Vec<u32>,
    /// The step at which somebody was told of it.
    pub heard: u64,
}

impl Grant {
    fn excludes(&self, other: &Self) -> bool {
        match (self.mode, other.mode) {
            (HoldMode::Permits(_), HoldMode::Permits(_)) => self.slots.iter().any(|slot| other.slots.contains(slot)),
            (HoldMode::Shared, HoldMode::Shared) => false,
            _ => true,
        }
    }

    fn is_alone(&self) -> bool {
        self.mode == HoldMode::Exclusive
    }
}

#[derive(Debug)]
struct Act {
    thing: Thing,
    token: u64,
    at: u64,
    what: &'static str,
}

#[derive(Default)]
pub struct Rights {
    grants: BTreeMap<Thing, BTreeMap<u64, Vec<Grant>>>,
    acts: Vec<Act>,
    /// Ends that somebody has asked for, with the step at which that began.
    may_end: BTreeMap<(Thing, u64), u64>,
    /// Over at or before this revision; of what is held by one alone.
    ended: BTreeMap<(Thing, u64), u64>,
    /// Taken away by an operator, from everybody who had that token.
    taken: BTreeMap<(Thing, u64), u64>,
    /// Sessions that ask more than once for one thing: a later grant takes the place of an earlier one.
    asked: BTreeMap<(Thing, SessionId), u32>,
    /// Over by this revision, seen at this step.
    sessions: BTreeMap<SessionId, (u64, u64)>,
}

fn shown(thing: &Thing) -> String {
    format!("{} {}", thing.0, thing.1.escape_ascii())
}

impl Rights {
    pub fn granted(&mut self, thing: Thing, token: u64, grant: Grant) -> Result<(), String> {
        if let Some((ended, _)) = self.sessions.get(&grant.session).filter(|(ended, _)| *ended < token) {
            let (thing, session) = (shown(&thing), grant.session);
            return Err(format!("{thing} was granted under {token} to session {session}, which had ended at {ended}"));
        }
        let of_token = self.grants.entry(thing.clone()).or_default().entry(token).or_default();
        let is_same = |known: &&Grant| known.session == grant.session && known.owner == grant.owner;
        if of_token.iter().any(|known| is_same(&known) && known.mode == grant.mode && known.slots == grant.slots) {
            return Ok(());
        }
        if let Some(other) = of_token.iter().find(|known| known.excludes(&grant)) {
            return Err(format!("token {token} of {} went to {other:?} and to {grant:?}", shown(&thing)));
        }
        of_token.push(grant);
        Ok(())
    }

    /// A session is about to ask for a thing that it is given again under another token.
    pub fn asked(&mut self, thing: Thing, session: SessionId) {
        *self.asked.entry((thing, session)).or_default() += 1;
    }

    pub fn may_end(&mut self, thing: Thing, token: u64, step: u64) {
        self.may_end.entry((thing, token)).or_insert(step);
    }

    pub fn ended(&mut self, thing: Thing, token: u64, at: u64) {
        let known = self.ended.entry((thing, token)).or_insert(at);
        *known = at.min(*known);
    }

    pub fn taken(&mut self, thing: Thing, token: u64, at: u64) {
        let known = self.taken.entry((thing, token)).or_insert(at);
        *known = at.min(*known);
    }

    pub fn session_over(&mut self, session: SessionId, at: u64, step: u64) {
        self.sessions.entry(session).or_insert((at, step));
    }

    /// Something was accepted under this token at this revision.
    pub fn acted(&mut self, thing: Thing, token: u64, at: u64, what: &'static str) {
        self.acts.push(Act { thing, token, at, what });
    }

    /// Judges everything that was told so far.
    pub fn check(&self) -> Result<(), String> {
        for ((thing, token), at) in &self.ended {
            if let Some(taken) = self.taken.get(&(thing.clone(), *token)).filter(|taken| *taken < at) {
                let thing = shown(thing);
                return Err(format!(
                    "{thing} was given back under {token} at {at}, an operator had taken it at {taken}"
                ));
            }
        }
        self.acts.iter().try_for_each(|act| self.check_act(act))?;
        self.grants.iter().try_for_each(|(thing, grants)| self.check_overlaps(thing, grants))
    }

    fn check_act(&self, act: &Act) -> Result<(), String> {
        let Act { thing, token, at, what } = act;
        let key = (thing.clone(), *token);
        let done = format!("{what} of {} was accepted under {token} at {at}", shown(thing));
        if let Some(taken) = self.taken.get(&key).filter(|taken| *taken < at) {
            return Err(format!("{done}, which an operator had taken away at {taken}"));
        }
        let grants = self.grants.get(thing);
        let Some([own]) = grants.and_then(|grants| grants.get(token)).map(Vec::as_slice) else { return Ok(()) };
        if at < token {
            return Err(format!("{done}, before it was granted"));
        }
        let mut later = grants.into_iter().flat_map(|grants| grants.range(token + 1..(*at).max(token + 1)));
        if let Some((newer, _)) = later.find(|(_, newer)| newer.iter().any(|newer| newer.excludes(own))) {
            return Err(format!("{done}, after it was granted under {newer}"));
        }
        if !own.is_alone() {
            return Ok(());
        }
        if let Some(ended) = self.ended.get(&key).filter(|ended| *ended < at) {
            return Err(format!("{done}, which was given back at {ended}"));
        }
        match self.sessions.get(&own.session).filter(|(ended, _)| ended < at) {
            Some((ended, _)) => Err(format!("{done}, whose session had ended at {ended}")),
            None => Ok(()),
        }
    }

    fn check_overlaps(&self, thing: &Thing, grants: &BTreeMap<u64, Vec<Grant>>) -> Result<(), String> {
        for (token, earlier) in grants {
            for own in earlier {
                let asked = self.may_end.get(&(thing.clone(), *token)).copied();
                let over = self.sessions.get(&own.session).map(|(_, step)| *step);
                let may_end = asked.into_iter().chain(over).min().unwrap_or(u64::MAX);
                if self.asked.get(&(thing.clone(), own.session)).is_some_and(|times| *times > 1) {
                    continue;
                }
                let mut later = grants.range(token + 1..).flat_map(|(token, all)| all.iter().map(move |g| (token, g)));
                let beside = |other: &Grant| other.heard < may_end && other.excludes(own);
                if let Some((newer, other)) = later.find(|(_, other)| beside(other)) {
                    let thing = shown(thing);
                    return Err(format!(
                        "{thing} is held under {token} by {own:?}, which nobody had ended, and was granted under {newer} to {other:?}"
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tenure_machine::Permits;

    fn thing() -> Thing {
        ("lock", b"l".to_vec())
    }

    fn grant(call: u64, mode: HoldMode, slots: &[u32]) -> Grant {
        Grant { call, session: SessionId(call), owner: Vec::new(), mode, slots: slots.to_vec(), heard: call }
    }

    #[test]
    fn a_reader_beside_a_writer_is_noticed() {
        let mut all = Rights::default();
        all.granted(thing(), 5, grant(1, HoldMode::Shared, &[])).unwrap();
        all.granted(thing(), 5, grant(2, HoldMode::Shared, &[])).unwrap();
        all.granted(thing(), 7, grant(3, HoldMode::Shared, &[])).unwrap();
        assert!(all.check().is_ok());
        assert!(all.granted(thing(), 7, grant(4, HoldMode::Exclusive, &[])).is_err(), "one commit");
        all.granted(thing(), 8, grant(4, HoldMode::Exclusive, &[])).unwrap();
        assert!(all.check().is_err());
        (1..=2).for_each(|session| all.session_over(SessionId(session), 8, 3));
        all.session_over(SessionId(3), 8, 5);
        assert!(all.check().is_err(), "it ended after the writer was told");
        all.may_end(thing(), 7, 4);
        assert!(all.check().is_ok());
    }

    #[test]
    fn a_slot_in_two_hands_is_noticed() {
        let permits = HoldMode::Permits(Permits { count: 1, of: 3 });
        let mut all = Rights::default();
        all.granted(thing(), 5, grant(1, permits, &[0])).unwrap();
        all.granted(thing(), 6, grant(2, permits, &[1])).unwrap();
        assert!(all.check().is_ok());
        all.granted(thing(), 9, grant(3, permits, &[1])).unwrap();
        assert!(all.check().is_err());
        all.may_end(thing(), 6, 2);
        assert!(all.check().is_ok());
    }

    #[test]
    fn what_is_done_under_an_old_token_is_noticed() {
        let act = |at: u64, change: fn(&mut Rights)| {
            let mut all = Rights::default();
            all.granted(thing(), 5, grant(1, HoldMode::Exclusive, &[])).unwrap();
            all.may_end(thing(), 5, 0);
            change(&mut all);
            all.acted(thing(), 5, at, "a write");
            all.check()
        };
        assert!(act(20, |_| ()).is_ok());
        assert!(act(20, |all| all.granted(thing(), 9, grant(2, HoldMode::Exclusive, &[])).unwrap()).is_err());
        assert!(act(8, |all| all.granted(thing(), 9, grant(2, HoldMode::Exclusive, &[])).unwrap()).is_ok());
        assert!(act(20, |all| all.ended(thing(), 5, 12)).is_err());
        assert!(act(20, |all| all.taken(thing(), 5, 12)).is_err());
        assert!(act(20, |all| all.session_over(SessionId(1), 12, 0)).is_err());
    }

    #[test]
    fn a_grant_to_the_dead_is_noticed() {
        let mut all = Rights::default();
        all.session_over(SessionId(1), 4, 0);
        assert!(all.granted(thing(), 5, grant(1, HoldMode::Shared, &[])).is_err());
    }
}
