//! One holder per lock at any revision, and numbers that only rise.
//!
//! Promises. From the answers that clients got: no token twice, a later grant of a name has a larger token, the next grant of a
//! name needs an end of the one before (a release that somebody asked for, or an ended session), and a guarded write under an
//! old token is never done after a newer grant.
//! Not promised. Fairness: the order of waiters is compared by the command lists (`lists.rs`).

use std::collections::BTreeMap;
use tenure_machine::{Revision, SessionId};

#[derive(Clone, Debug)]
struct Grant {
    call: u64,
    session: SessionId,
    /// The step at which somebody first asked for its end.
    end_asked: Option<u64>,
    /// The revision at which the release is known to have happened.
    released: Option<u64>,
}

#[derive(Default)]
pub struct Locks {
    grants: BTreeMap<(Vec<u8>, Revision), Grant>,
    /// Guarded writes: name, token, revision.
    fenced: Vec<(Vec<u8>, Revision, u64)>,
    /// When each session's end was first possible.
    ends: BTreeMap<SessionId, u64>,
    pub handed_over: u64,
}

impl Locks {
    /// `began`: the step at which the acquire was first sent; `seen`: at which its grant arrived.
    pub fn granted(
        &mut self,
        name: &[u8],
        token: Revision,
        session: SessionId,
        call: u64,
        newest_before: Option<Revision>,
    ) -> Result<(), String> {
        if let Some(known) = self.grants.get(&(name.to_vec(), token)) {
            return match known.call == call && known.session == session {
                true => Ok(()),
                false => Err(format!(
                    "token {token} of {} went to call {} and to call {call}",
                    name.escape_ascii(),
                    known.call
                )),
            };
        }
        if let Some(newest) = newest_before
            && token <= newest
        {
            return Err(format!("token {token} of {} after {newest} had been told", name.escape_ascii()));
        }
        let grant = Grant { call, session, end_asked: None, released: None };
        self.grants.insert((name.to_vec(), token), grant);
        Ok(())
    }

    /// The newest token that anybody was told.
    pub fn newest(&self, name: &[u8]) -> Option<Revision> {
        self.of(name).next_back().map(|((_, token), _)| *token)
    }

    fn of<'a>(
        &'a self,
        name: &[u8],
    ) -> impl DoubleEndedIterator<Item = (&'a (Vec<u8>, Revision), &'a Grant)> + use<'a> {
        self.grants.range((name.to_vec(), Revision(0))..=(name.to_vec(), Revision(u64::MAX)))
    }

    pub fn release_asked(&mut self, name: &[u8], token: Revision, step: u64) {
        if let Some(grant) = self.grants.get_mut(&(name.to_vec(), token)) {
            grant.end_asked.get_or_insert(step);
        }
    }

    /// It was released at or before this revision; at it, unless the answer is one of those that repeat an earlier one.
    pub fn released(&mut self, name: &[u8], token: Revision, revision: u64, replayed: bool) {
        if let Some(grant) = self.grants.get_mut(&(name.to_vec(), token)).filter(|_| !replayed) {
            grant.released.get_or_insert(revision);
        }
    }

    /// The session may be over from this step on.
    pub fn session_may_end(&mut self, session: SessionId, step: u64) {
        self.ends.entry(session).or_insert(step);
    }

    /// A write guarded by the token was done.
    pub fn guarded(&mut self, name: &[u8], token: Revision, revision: u64) {
        self.fenced.push((name.to_vec(), token, revision));
    }

    /// Judges everything that was told so far.
    pub fn check(&mut self) -> Result<(), String> {
        self.handed_over = 0;
        let mut before: Option<(&(Vec<u8>, Revision), &Grant)> = None;
        for (at, grant) in &self.grants {
            if let Some(((name, token), older)) = before
                && *name == at.0
            {
                self.handed_over += 1;
                if older.end_asked.is_none() && !self.ends.contains_key(&older.session) {
                    return Err(format!(
                        "lock {} is held under {token} by session {}, which nobody ended, and was granted to session {} under {}",
                        name.escape_ascii(),
                        older.session,
                        grant.session,
                        at.1
                    ));
                }
            }
            before = Some((at, grant));
        }
        for (name, token, revision) in &self.fenced {
            if revision <= &token.0 {
                return Err(format!("a write at {revision} was guarded by the later token {token}"));
            }
            let mut newer = self.of(name).map(|((_, t), _)| *t).filter(|t| t > token);
            if newer.next().is_some_and(|next| next.0 < *revision) {
                return Err(format!(
                    "a write under token {token} of {} was done at {revision}, after a newer grant",
                    name.escape_ascii()
                ));
            }
            let own = self.grants.get(&(name.clone(), *token));
            if own.and_then(|g| g.released).is_some_and(|r| r < *revision) {
                return Err(format!(
                    "a write under token {token} of {} was done at {revision}, after its release",
                    name.escape_ascii()
                ));
            }
        }
        Ok(())
    }
}
