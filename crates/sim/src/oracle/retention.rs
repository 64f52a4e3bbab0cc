//! What is kept for a time: the results of idempotency keys, and markers.
//!
//! Promises. A result, or a marker, is there as it was until its retention is over, in log time, and not for long after it.
//! Not promised. Anything about what nobody was seen to have.
//! Relies on. How long a thing is to be kept follows from its name. Clients delete nothing and discard nothing.

use std::collections::BTreeMap;
use tenure_machine::*;

const NS: NamespaceId = NamespaceId::DEFAULT;
/// The scope of all idempotency keys.
pub const SCOPE: &str = "scope";
/// How late something may be forgotten.
const LATE_MS: u64 = 10_000;

/// An idempotency key or a marker.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Thing {
    Key(Box<str>),
    Marker(Box<str>),
}

impl Thing {
    /// Zero: for ever.
    pub fn kept_ms(&self) -> u64 {
        match self {
            Self::Key(key) if key.ends_with('0') => 60_000,
            Self::Key(_) => 24 * 3_600_000,
            Self::Marker(name) if name.ends_with(['2', '3']) && name.starts_with("effect") => 3_600_000,
            Self::Marker(_) => 0,
        }
    }

    fn all() -> impl Iterator<Item = Self> {
        let keys = ["i0", "i1", "n0", "n1"].into_iter().map(|key| Self::Key(key.into()));
        keys.chain((0..4).map(|n| Self::Marker(format!("effect={n}").into())))
    }

    fn found(&self, machine: &Machine) -> Option<Found> {
        match self {
            Self::Key(key) => {
                let record = machine.object::<IdempotencyRecord>(NS, &RecordName::new(SCOPE, key).object_name())?;
                record.state_at(machine.stamp())?;
                let since = match &record.state {
                    RecordState::Done(done) => Some(done.at),
                    RecordState::Open(_) => None,
                };
                Some(Found { token: record.attempt.0, number: record.number, since })
            }
            Self::Marker(name) => {
                let marker = machine.marker(NS, name.as_bytes())?;
                Some(Found { token: marker.token.0, number: 0, since: Some(marker.at) })
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Found {
    token: u64,
    /// Of an attempt.
    number: u32,
    /// When it was done.
    since: Option<LogTime>,
}

#[derive(Default)]
pub struct Retention {
    /// The newest entry that was looked at, and what was there.
    index: u64,
    revision: u64,
    stamp: LogTime,
    found: BTreeMap<Thing, Found>,
    /// Revisions up to which an earlier life of a thing was.
    ends: BTreeMap<Thing, Vec<u64>>,
    pub ended: u64,
}

impl Retention {
    /// Which life of a thing a token is of.
    pub fn life(&self, thing: &Thing, token: u64) -> usize {
        self.ends.get(thing).map_or(0, |ends| ends.iter().filter(|end| **end < token).count())
    }

    /// Whether the life that a token is of is over.
    pub fn is_over(&self, thing: &Thing, token: u64) -> bool {
        self.ends.get(thing).is_some_and(|ends| self.life(thing, token) < ends.len())
    }

    /// What a member holds at any time.
    pub fn look(&mut self, machine: &Machine) -> Result<(), String> {
        let (index, stamp) = (machine.position().index.0, machine.stamp());
        if index <= self.index {
            return Ok(());
        }
        for thing in Thing::all() {
            let found = thing.found(machine);
            self.compare(&thing, found, stamp)?;
            match found {
                Some(found) => self.found.insert(thing, found),
                None => self.found.remove(&thing),
            };
        }
        (self.index, self.revision, self.stamp) = (index, machine.revision().0, stamp);
        Ok(())
    }

    fn compare(&mut self, thing: &Thing, now: Option<Found>, stamp: LogTime) -> Result<(), String> {
        let before = self.found.get(thing).copied();
        let (kept_ms, is_kept) = (thing.kept_ms(), |found: &Found| found.since.is_some());
        if let Some(Found { since: Some(since), .. }) = now {
            let is_news = before.is_none_or(|before| !is_kept(&before) || before.token != now.map_or(0, |n| n.token));
            if is_news && (since < self.stamp || since > stamp) {
                return Err(format!("{thing:?} came between {} and {stamp}, and says {since}", self.stamp));
            }
            if kept_ms > 0 && since.plus(kept_ms + LATE_MS) < stamp {
                return Err(format!("{thing:?} of {since} is still there at {stamp}"));
            }
        }
        let Some(before) = before.filter(|before| now != Some(*before)) else { return Ok(()) };
        let is_over = match (before.since, now) {
            (_, None) => true,
            (Some(_), Some(_)) => true,
            // Attempts are numbered anew.
            (None, Some(now)) => now.token != before.token && now.number <= before.number,
        };
        if is_over {
            self.ended += u64::from(before.since.is_some());
            self.ends.entry(thing.clone()).or_default().push(self.revision);
        }
        match before.since {
            Some(since) if kept_ms == 0 || since.plus(kept_ms) > stamp => {
                Err(format!("{thing:?} was {before:?} and is {now:?} at {stamp}, before its retention is over"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(token: u64, since: u64) -> Option<Found> {
        Some(Found { token, number: 1, since: Some(LogTime(since)) })
    }

    #[test]
    fn what_goes_early_changes_or_stays_is_noticed() {
        let key = Thing::Key("i0".into());
        let after = |now, stamp| {
            let mut all = Retention { stamp: LogTime(5), revision: 8, ..Retention::default() };
            all.found.insert(key.clone(), done(7, 4).unwrap());
            let compared = all.compare(&key, now, LogTime(stamp));
            compared.map(|()| (all.life(&key, 7), all.life(&key, 9), all.is_over(&key, 7)))
        };
        assert_eq!(after(done(7, 4), 50_000), Ok((0, 0, false)));
        assert!(after(None, 60_003).is_err(), "early");
        assert_eq!(after(None, 60_004), Ok((0, 1, true)));
        assert!(after(done(9, 100), 200).is_err(), "another result");
        assert!(after(done(7, 5), 200).is_err(), "another time");
        assert_eq!(after(done(9, 70_000), 70_001), Ok((0, 1, true)));
        assert!(after(done(7, 4), 80_000).is_err(), "late");
    }
}
