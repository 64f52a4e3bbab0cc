//! Configuration: numbered versions, published on the version that was expected.
//!
//! Promises. The versions of a key are 1, 2, 3 and so on, each of one commit and one call; whoever expected a version got the very next number, so of all
//! who expected the same one has won; a version never changes, a copy has the content of what it copies, and any other the content of a call
//! that asked for it. There are as many as were acknowledged, and at most so many more as stayed unknown.
//! Relies on. Contents are numbers of calls. Keys are neither deleted nor rolled out in steps, and fewer versions are made than are kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tenure_machine::*;

const NS: NamespaceId = NamespaceId::DEFAULT;

#[derive(Default)]
struct Known {
    /// By number: the revision, the call that was told, and the version that it was to copy, or zero.
    told: BTreeMap<u64, (u64, u64, u64)>,
    /// Contents as members hold them, with what they are a copy of.
    held: BTreeMap<u64, (Arc<[u8]>, u64)>,
    asked: BTreeSet<Vec<u8>>,
    unknown: u64,
}

#[derive(Default)]
pub struct Versions {
    keys: BTreeMap<Box<str>, Known>,
}

impl Versions {
    pub fn asked(&mut self, op: &ConfigOp) {
        if let ConfigOp::Publish(publish) = op {
            let known = self.keys.entry(publish.note.key.clone()).or_default();
            known.asked.insert(publish.content.to_vec());
        }
    }

    pub fn unknown(&mut self, op: &ConfigOp) {
        if let ConfigOp::Publish(ConfigPublish { note, .. }) | ConfigOp::Rollback((note, _)) = op {
            self.keys.entry(note.key.clone()).or_default().unknown += 1;
        }
    }

    pub fn changed(&mut self, call: u64, op: &ConfigOp, after: &ConfigAfter, at: u64) -> Result<(), String> {
        let (note, copy_of) = match op {
            ConfigOp::Publish(publish) => (&publish.note, 0),
            ConfigOp::Rollback((note, to)) => (note, *to),
            _ => return Ok(()),
        };
        let (key, number) = (&note.key, after.version);
        if let Some(expected) = note.expect.filter(|expected| expected + 1 != number) {
            return Err(format!("call {call} published version {number} of {key} and expected version {expected}"));
        }
        let told = &mut self.keys.entry(key.clone()).or_default().told;
        let before = told.range(..number).next_back().is_none_or(|(_, (revision, ..))| *revision < at);
        let after = told.range(number + 1..).next().is_none_or(|(_, (revision, ..))| *revision > at);
        let this = (at, call, copy_of);
        let same = told.insert(number, this).is_none_or(|known| known == this);
        if before && after && same {
            return Ok(());
        }
        Err(format!("version {number} of {key} was published at {at} by call {call}, among {told:?}"))
    }

    /// What a member holds at any time.
    pub fn look(&mut self, machine: &Machine) -> Result<(), String> {
        for (key, known) in &mut self.keys {
            let Some(config) = machine.object::<Config>(NS, key.as_bytes()) else { continue };
            let kept: Vec<u64> = config.kept.iter().map(|(number, _)| *number).collect();
            if !kept.iter().copied().eq(1..=config.newest) {
                return Err(format!("{key} has versions {kept:?}, the newest is {}", config.newest));
            }
            let seen = known.held.last_key_value().map_or(0, |(number, _)| *number);
            for number in (seen + 1..=config.newest).chain([config.newest]) {
                let Some(version) = machine.config_version(NS, key, number) else {
                    return Err(format!("version {number} of {key} is kept and is not there"));
                };
                known.hold(key, version)?;
            }
        }
        Ok(())
    }

    /// What a member holds that has applied everything.
    pub fn finish(&self, machine: &Machine) -> Result<(), String> {
        for (key, known) in &self.keys {
            let newest = machine.object::<Config>(NS, key.as_bytes()).map_or(0, |config| config.newest);
            let acknowledged = known.told.len() as u64;
            if newest < acknowledged || newest > acknowledged + known.unknown {
                let unknown = known.unknown;
                return Err(format!(
                    "{key} has {newest} versions after {acknowledged} acknowledged ones and {unknown} unknown ones"
                ));
            }
            for (number, (.., copy_of)) in &known.told {
                let held = known.held.get(number).map(|(_, copied)| *copied);
                if held != Some(*copy_of) {
                    return Err(format!(
                        "version {number} of {key} is a copy of {held:?}, and {copy_of} was asked for"
                    ));
                }
            }
        }
        Ok(())
    }
}

impl Known {
    fn hold(&mut self, key: &str, version: &ConfigVersion) -> Result<(), String> {
        let this = (version.content.clone(), version.copy_of);
        if let Some(known) = self.held.get(&version.number) {
            return match *known == this {
                true => Ok(()),
                false => Err(format!("version {} of {key} is {this:?}, and was {known:?}", version.number)),
            };
        }
        let right = match version.copy_of {
            0 => self.asked.contains(&*version.content),
            copied => self.held.get(&copied).is_some_and(|(content, _)| *content == version.content),
        };
        if !right {
            return Err(format!("version {} of {key} has a content that nobody gave it: {this:?}", version.number));
        }
        self.held.insert(version.number, this);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(content: u8, expect: Option<u64>) -> ConfigOp {
        ConfigOp::Publish(ConfigPublish {
            note: note("k", expect),
            media: "".into(),
            digest: [0; 32],
            content: Arc::from([content]),
            rollout: None,
        })
    }

    fn note(key: &str, expect: Option<u64>) -> ConfigNote {
        let (author, comment) = Default::default();
        ConfigNote { key: key.into(), expect, author, comment, time_ms: 0, checked_by: 0 }
    }

    fn after(version: u64) -> ConfigAfter {
        ConfigAfter { version, current: version, candidate: 0, schema: 0 }
    }

    #[test]
    fn two_winners_and_a_number_out_of_order_are_noticed() {
        let mut all = Versions::default();
        all.changed(1, &publish(1, Some(0)), &after(1), 5).unwrap();
        assert!(all.changed(2, &publish(2, Some(0)), &after(2), 7).is_err(), "it expected nothing to be there");
        all.changed(3, &publish(3, None), &after(2), 7).unwrap();
        assert!(all.changed(4, &publish(4, None), &after(2), 8).is_err(), "one number, two calls");
        assert!(all.changed(5, &publish(5, None), &after(4), 6).is_err(), "a later number of an earlier commit");
    }

    #[test]
    fn a_version_that_changes_and_a_copy_of_something_else_are_noticed() {
        let version = |number, content: u8, copy_of| ConfigVersion {
            number,
            revision: Revision(number),
            author: "".into(),
            comment: "".into(),
            time_ms: 0,
            schema: 0,
            copy_of,
            deleted: false,
            media: "".into(),
            digest: [0; 32],
            content: Arc::from([content]),
        };
        let mut known = Known { asked: [vec![1], vec![2]].into(), ..Known::default() };
        known.hold("k", &version(1, 1, 0)).unwrap();
        assert!(known.hold("k", &version(1, 2, 0)).is_err());
        assert!(known.hold("k", &version(2, 3, 0)).is_err(), "nobody asked for it");
        assert!(known.hold("k", &version(2, 2, 1)).is_err());
        known.hold("k", &version(2, 1, 1)).unwrap();
    }
}
