//! Configuration that has a schema and candidates, and is deleted, rolled back and purged.
//!
//! Promises. After each change that somebody was told of, a key is as was asked for: the content, the candidate with its share, the schema. What is
//! current or on trial satisfies the schema. Whoever reads is given the current version or the candidate: this one only to instances with its
//! labels, to none at a share of nothing, to all at a share of everything, and to whoever had it at a smaller share.
//! Relies on. Contents are numbers, schemas are words for even and odd ones. Keys begin with `roll`.

use std::collections::BTreeMap;
use std::sync::Arc;
use tenure_machine::*;

const NS: NamespaceId = NamespaceId::DEFAULT;
pub const KEYS: [&str; 2] = ["roll0", "roll1"];
pub const EVEN: &[u8] = b"even";
pub const ODD: &[u8] = b"odd";
/// Of readers; the candidates of some are for one of them.
pub const ZONES: [&str; 2] = ["a", "b"];
const INSTANCES: u32 = 6;

/// Whether a content satisfies a schema.
pub fn fits(content: &[u8], schema: Option<&ConfigSchema>) -> bool {
    let even = content.last().is_none_or(|last| last.is_multiple_of(2));
    schema.is_none_or(|schema| even == (&*schema.text == EVEN))
}

pub fn key(op: &ConfigOp) -> &str {
    match op {
        ConfigOp::Publish(ConfigPublish { note, .. }) | ConfigOp::Rollback((note, _)) | ConfigOp::Delete(note) => {
            &note.key
        }
        ConfigOp::SetSchema(set) => &set.key,
        ConfigOp::Stage(stage) => &stage.key,
        ConfigOp::Promote(at) | ConfigOp::Abort(at) | ConfigOp::Purge(at) => &at.key,
    }
}

#[derive(Default)]
pub struct Rollouts {
    /// The newest entry that was looked at.
    at: u64,
    /// What was told to be done, by key and revision.
    told: BTreeMap<(Box<str>, u64), ConfigOp>,
    seen: BTreeMap<(Box<str>, u64), Config>,
    /// By key, revision of the candidate and instance: the largest share at which it was not given it, and the smallest at which it was.
    given: BTreeMap<(Box<str>, u64, u32), (u32, u32)>,
}

impl Rollouts {
    pub fn done(&mut self, op: &ConfigOp, at: u64) {
        self.told.insert((key(op).into(), at), op.clone());
    }

    /// What a member holds at any time.
    pub fn look(&mut self, machine: &Machine) -> Result<(), String> {
        if machine.position().index.0 <= self.at {
            return Ok(());
        }
        self.at = machine.position().index.0;
        for key in KEYS {
            let Some(config) = machine.object::<Config>(NS, key.as_bytes()) else { continue };
            if self.seen.insert((key.into(), config.revision.0), config.clone()).is_none() {
                check_schema(key, config)?;
                self.check_readers(key, config)?;
            }
        }
        Ok(())
    }

    fn check_readers(&mut self, key: &str, config: &Config) -> Result<(), String> {
        for (instance, zone) in (0..INSTANCES).flat_map(|n| ZONES.map(|zone| (n, zone))) {
            let labels = BTreeMap::from([("zone".to_owned(), zone.to_owned())]);
            let number = |version: Option<&ConfigVersion>| version.map(|version| version.number);
            let given = number(config.for_instance(key, &format!("instance {instance}"), &labels));
            let wrong = || Err(format!("{key}: instance {instance} of {zone} is given {given:?} of {config:?}"));
            let current = number(config.current.as_ref());
            let Some(ConfigCandidate { version, rollout }) = &config.candidate else {
                if given != current {
                    return wrong();
                }
                continue;
            };
            let is_in = given == Some(version.number);
            let is_meant = rollout.labels.iter().all(|(_, wanted)| **wanted == *zone);
            let must_be = is_meant && rollout.share == ROLLOUT_ALL;
            let may_be = is_meant && rollout.share > 0;
            if !is_in && (given != current || must_be) || is_in && !may_be {
                return wrong();
            }
            if is_meant {
                let known = self.given.entry((key.into(), version.revision.0, instance)).or_insert((0, ROLLOUT_ALL));
                *known =
                    if is_in { (known.0, known.1.min(rollout.share)) } else { (known.0.max(rollout.share), known.1) };
                if known.0 >= known.1 {
                    return wrong();
                }
            }
        }
        match config.for_instance(key, "", &BTreeMap::new()) {
            given if given == config.current.as_ref() => Ok(()),
            given => Err(format!("{key}: whoever says nothing of itself is given {given:?} of {config:?}")),
        }
    }

    pub fn finish(&self) -> Result<(), String> {
        for (at, op) in &self.told {
            if let Some(config) = self.seen.get(at)
                && !is_done(op, config)
            {
                return Err(format!("{} at {} is {config:?} after {op:?}", at.0, at.1));
            }
        }
        Ok(())
    }
}

fn check_schema(key: &str, config: &Config) -> Result<(), String> {
    let candidate = config.candidate.as_ref().map(|candidate| &candidate.version);
    let mut all = config.current.iter().chain(candidate);
    match all.find(|version| !fits(&version.content, config.schema.as_ref())) {
        None => Ok(()),
        Some(version) => Err(format!("{key}: version {} breaks the schema of {config:?}", version.number)),
    }
}

/// Whether a key is as this leaves it.
fn is_done(op: &ConfigOp, config: &Config) -> bool {
    let current = config.current.as_ref();
    let candidate = config.candidate.as_ref();
    let is_current = |number: u64| current.is_some_and(|version| version.number == number);
    match op {
        ConfigOp::Publish(ConfigPublish { content, rollout: None, .. }) => {
            candidate.is_none() && current.is_some_and(|version| version.content == *content)
        }
        ConfigOp::Publish(ConfigPublish { content, rollout: Some(rollout), .. }) => {
            candidate.is_some_and(|candidate| candidate.version.content == *content && candidate.rollout == *rollout)
        }
        ConfigOp::Rollback((_, to)) => candidate.is_none() && current.is_some_and(|version| version.copy_of == *to),
        ConfigOp::SetSchema(set) => {
            let text: Option<&Arc<[u8]>> = config.schema.as_ref().map(|schema| &schema.text);
            text == set.text.as_ref()
        }
        ConfigOp::Stage(stage) => {
            candidate.is_some_and(|one| one.version.number == stage.version && one.rollout == stage.rollout)
        }
        ConfigOp::Promote(at) => candidate.is_none() && is_current(at.version),
        ConfigOp::Abort(at) => candidate.is_none() && !is_current(at.version),
        ConfigOp::Delete(_) => current.is_none(),
        // What is there at that revision was made by it.
        ConfigOp::Purge(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(number: u64, content: u8) -> ConfigVersion {
        let (author, comment, media) = Default::default();
        let (time_ms, schema, copy_of, deleted, digest) = (0, 0, 0, false, [0; 32]);
        let (revision, content) = (Revision(number), Arc::from([content]));
        ConfigVersion { number, revision, author, comment, time_ms, schema, copy_of, deleted, media, digest, content }
    }

    fn config(share: u32) -> Config {
        let rollout = Rollout { share, labels: Vec::new() };
        Config {
            revision: Revision(u64::from(share) + 9),
            newest: 2,
            current: Some(version(1, 2)),
            candidate: Some(ConfigCandidate { version: version(2, 4), rollout }),
            newest_schema: 0,
            schema: None,
            kept: vec![(1, 1), (2, 1)],
        }
    }

    #[test]
    fn a_value_that_breaks_its_schema_is_noticed() {
        let schema = |text: &[u8]| Some(ConfigSchema { number: 1, revision: Revision(3), text: text.into() });
        assert!(check_schema("k", &Config { schema: schema(EVEN), ..config(0) }).is_ok());
        assert!(check_schema("k", &Config { schema: schema(ODD), ..config(0) }).is_err());
    }

    #[test]
    fn whoever_loses_a_candidate_at_a_larger_share_is_noticed() {
        let mut all = Rollouts::default();
        (0..=10).try_for_each(|n| all.check_readers("roll0", &config(n * 1_000))).unwrap();
        assert!(all.check_readers("roll0", &config(0)).is_ok(), "all may lose it");
        all.given.values_mut().for_each(|known| *known = (0, 1));
        assert!(all.check_readers("roll0", &config(500)).is_err());
    }

    #[test]
    fn a_change_that_is_told_and_not_made_is_noticed() {
        let stage = |share| {
            ConfigOp::Stage(ConfigStage { key: "k".into(), version: 2, rollout: Rollout { share, labels: Vec::new() } })
        };
        assert!(is_done(&stage(500), &config(500)));
        assert!(!is_done(&stage(500), &config(600)));
        let at = || ConfigAt { key: "k".into(), version: 2 };
        assert!(!is_done(&ConfigOp::Promote(at()), &config(500)));
        assert!(is_done(&ConfigOp::Abort(at()), &Config { candidate: None, ..config(0) }));
    }
}
