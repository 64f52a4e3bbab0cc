//! Configuration: keys with numbered versions, a schema, and a candidate that is rolled out in steps.
//!
//! Promises. G1: a version never changes, and its number is given once, over deletion too; only a purge begins anew. G2: publishing, rolling back,
//! deleting and staging happen on the version that the caller expects, or not at all. G3: a version is published under the schema that it was checked
//! by: if that has changed in between, the operation is refused and nothing has changed. G4: of the versions of a key the newest 50, and at most a
//! MiB of them, are kept, among them always the current one and the candidate. G5: which of the two an instance is given follows from the key, the
//! candidate and the instance alone, and whoever was in at a percentage stays in at a higher one.
//! Not promised. That a content satisfies its schema: the server checks that before it proposes (it says which schema it checked by). What the
//! clock showed when a version was published: that is for people.

use crate::apply::{Commit, Machine, invalid};
use crate::codec;
use crate::coded::{coded_enum, coded_struct};
use crate::native::{Refusal, RefusalCode};
use crate::objects::{Lived, ObjectKey, Stored};
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::Waiter;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

/// A key has 1 to this many bytes, none of them zero.
pub const CONFIG_KEY_BYTES_MAX: usize = 1_024;
pub const CONFIG_CONTENT_BYTES_MAX: usize = 256 << 10;
pub const CONFIG_SCHEMA_BYTES_MAX: usize = 64 << 10;
/// Author, comment and media type together.
pub const CONFIG_NOTES_BYTES_MAX: usize = 4 << 10;
/// Labels of a roll-out, and their bytes.
pub const ROLLOUT_LABELS_MAX: usize = 16;
pub const ROLLOUT_LABEL_BYTES_MAX: usize = 4 << 10;
/// All instances, in hundredths of a percent.
pub const ROLLOUT_ALL: u32 = 10_000;
const VERSIONS_MAX: usize = 50;
const VERSIONS_BYTES_MAX: u64 = 1 << 20;
/// Between the key and the number of a version.
const SEPARATOR: u8 = 0;

coded_struct! {
    /// One version of a key, as it was published.
    pub struct ConfigVersion as "a version of a configuration" {
        pub number: u64,
        /// Of the commit that made it.
        pub revision: Revision,
        pub author: Box<str>,
        pub comment: Box<str>,
        /// What the server's clock showed, in milliseconds since 1970. For people.
        pub time_ms: u64,
        /// The number of the schema that it was checked by; zero: there was none.
        pub schema: u64,
        /// The version that it copies, or zero.
        pub copy_of: u64,
        /// It marks a deletion.
        pub deleted: bool,
        pub media: Box<str>,
        /// SHA-256 of the content.
        pub digest: [u8; 32],
        pub content: Arc<[u8]>,
    }
}

coded_struct! {
    /// What the contents of a key must satisfy.
    pub struct ConfigSchema as "a schema" {
        pub number: u64,
        pub revision: Revision,
        pub text: Arc<[u8]>,
    }
}

coded_struct! {
    /// Which instances are given the candidate: those that have all the labels, and of them a share.
    pub struct Rollout as "a roll-out" {
        /// In hundredths of a percent.
        pub share: u32,
        pub labels: Vec<(Box<str>, Box<str>)>,
    }
}

coded_struct! {
    /// A version on trial.
    pub struct ConfigCandidate as "a candidate" {
        pub version: ConfigVersion,
        pub rollout: Rollout,
    }
}

coded_struct! {
    /// A key as it is now. Watchers see it whole; the older versions are objects of their own.
    pub struct Config as "a configuration" {
        /// Of the newest change.
        pub revision: Revision,
        /// The newest number that was given to a version.
        pub newest: u64,
        /// `None`: it is deleted.
        pub current: Option<ConfigVersion>,
        pub candidate: Option<ConfigCandidate>,
        /// The newest number that was given to a schema.
        pub newest_schema: u64,
        pub schema: Option<ConfigSchema>,
        /// The versions that are kept, with their sizes, by rising number.
        pub kept: Vec<(u64, u64)>,
    }
}

impl Config {
    /// What is given to an instance with these labels. Without an id and labels it is the current version.
    pub fn for_instance(&self, key: &str, instance: &str, labels: &BTreeMap<String, String>) -> Option<&ConfigVersion> {
        let staged = self.candidate.as_ref().filter(|candidate| {
            let has = |(name, value): &(Box<str>, Box<str>)| labels.get(&**name).is_some_and(|own| **own == **value);
            let is_known = !instance.is_empty() || !labels.is_empty();
            let rollout = &candidate.rollout;
            is_known
                && rollout.labels.iter().all(has)
                && bucket(key, candidate.version.number, instance) < rollout.share
        });
        staged.map(|candidate| &candidate.version).or(self.current.as_ref())
    }

    fn current_number(&self) -> u64 {
        self.current.as_ref().map_or(0, |version| version.number)
    }

    fn schema_number(&self) -> u64 {
        self.schema.as_ref().map_or(0, |schema| schema.number)
    }
}

/// The place of an instance among all, from 0 to `ROLLOUT_ALL`. What it is must not change: a running roll-out would jump.
fn bucket(key: &str, version: u64, instance: &str) -> u32 {
    let hash = codec::fold(codec::fold(version, key.as_bytes()), instance.as_bytes());
    // The upper half: the lower bits of a product are the weaker ones.
    ((hash >> 32) % u64::from(ROLLOUT_ALL)) as u32
}

impl ConfigVersion {
    fn size(&self) -> u64 {
        (self.content.len() + self.author.len() + self.comment.len() + self.media.len()) as u64
    }
}

impl Lived for Config {
    fn bytes(&self) -> u64 {
        let candidate = self.candidate.as_ref().map_or(0, |candidate| candidate.version.size());
        let schema = self.schema.as_ref().map_or(0, |schema| schema.text.len() as u64);
        let current = self.current.as_ref().map_or(0, ConfigVersion::size);
        size_of::<Self>() as u64 + current + candidate + schema + 16 * self.kept.len() as u64
    }
}

impl Lived for ConfigVersion {
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        size_of::<Self>() as u64 + self.size()
    }
}

coded_struct! {
    /// Who changes a key, why, and on which state.
    pub struct ConfigNote as "a note" {
        pub key: Box<str>,
        /// The current version; zero: there is none. `None`: whatever it is.
        pub expect: Option<u64>,
        pub author: Box<str>,
        pub comment: Box<str>,
        pub time_ms: u64,
        /// The schema that the content was checked by.
        pub checked_by: u64,
    }
}

coded_struct! {
    /// A new version.
    pub struct ConfigPublish as "a publication" {
        pub note: ConfigNote,
        pub media: Box<str>,
        pub digest: [u8; 32],
        pub content: Arc<[u8]>,
        /// It becomes a candidate first.
        pub rollout: Option<Rollout>,
    }
}

coded_struct! {
    /// Another schema, or none.
    pub struct ConfigSchemaSet as "the setting of a schema" {
        pub key: Box<str>,
        /// The number of the schema in force; `None`: whatever it is.
        pub expect: Option<u64>,
        /// The current version, which was found to satisfy it; zero: there is none.
        pub checked: u64,
        pub text: Option<Arc<[u8]>>,
    }
}

coded_struct! {
    /// Another share of the instances for the candidate of this number.
    pub struct ConfigStage as "a step of a roll-out" {
        pub key: Box<str>,
        pub version: u64,
        pub rollout: Rollout,
    }
}

coded_struct! {
    /// A key and one of its versions.
    pub struct ConfigAt as "a version of a configuration" {
        pub key: Box<str>,
        pub version: u64,
    }
}

coded_enum! {
    /// What can be done to configuration.
    pub enum ConfigOp as "an operation on configuration" {
        Publish(ConfigPublish) = 1,
        /// Publishes a copy of this version.
        Rollback((ConfigNote, u64)) = 2,
        SetSchema(ConfigSchemaSet) = 3,
        Stage(ConfigStage) = 4,
        /// Makes the candidate the current version.
        Promote(ConfigAt) = 5,
        /// Drops the candidate; as a version it stays readable.
        Abort(ConfigAt) = 6,
        /// Marks it deleted. Versions stay readable, and numbers go on.
        Delete(ConfigNote) = 7,
        /// Removes it with all its versions.
        Purge(ConfigAt) = 8,
    }
}

coded_struct! {
    /// A key after a change of it.
    #[derive(Copy, Eq)]
    pub struct ConfigAfter as "a changed configuration" {
        /// The version that the change was about.
        pub version: u64,
        pub current: u64,
        pub candidate: u64,
        pub schema: u64,
    }
}

coded_enum! {
    /// What operations on configuration answer.
    #[derive(Copy, Eq)]
    pub enum ConfigReply as "an answer about configuration" {
        Changed(ConfigAfter) = 1,
    }
}

/// Beside texts and contents.
const THING_BYTES: u64 = 1_024;

impl ConfigOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        match self {
            Self::Publish(publish) => THING_BYTES + 2 * publish.content.len() as u64 + note_bytes(&publish.note),
            Self::Rollback((note, _)) => THING_BYTES + 2 * CONFIG_CONTENT_BYTES_MAX as u64 + note_bytes(note),
            Self::SetSchema(set) => set.text.as_ref().map_or(0, |text| THING_BYTES + text.len() as u64),
            Self::Delete(note) => THING_BYTES + note_bytes(note),
            Self::Stage(_) | Self::Promote(_) | Self::Abort(_) | Self::Purge(_) => 0,
        }
    }

    /// What a waiter is told whose time is over; `None`: that it waited in vain.
    pub(crate) fn wait_over(&self, _: &Machine, _: &Waiter) -> Option<Result<OpReply, Rejection>> {
        None
    }

    /// Whether the server adds something anew at each try.
    pub(crate) fn has_additions(&self) -> bool {
        match self {
            Self::Publish(_) | Self::Rollback(_) | Self::SetSchema(_) | Self::Delete(_) => true,
            Self::Stage(_) | Self::Promote(_) | Self::Abort(_) | Self::Purge(_) => false,
        }
    }

    pub(crate) fn forget_additions(&mut self) {
        match self {
            Self::Publish(ConfigPublish { note, .. }) | Self::Rollback((note, _)) | Self::Delete(note) => {
                (note.time_ms, note.checked_by) = (0, 0);
            }
            Self::SetSchema(set) => set.checked = 0,
            Self::Stage(_) | Self::Promote(_) | Self::Abort(_) | Self::Purge(_) => {}
        }
    }
}

fn note_bytes(note: &ConfigNote) -> u64 {
    2 * (note.key.len() + note.author.len() + note.comment.len()) as u64
}

impl Machine {
    /// A version that is kept.
    pub fn config_version(&self, ns: NamespaceId, key: &str, number: u64) -> Option<&ConfigVersion> {
        self.object(ns, &version_name(key, number))
    }

    /// Versions that are kept, by rising number, after the number `after`.
    pub fn config_versions(&self, ns: NamespaceId, key: &str, after: u64, max: usize) -> Vec<&ConfigVersion> {
        let prefix = ObjectKey::of::<ConfigVersion>(ns, &[key.as_bytes(), &[SEPARATOR]].concat());
        let from = ObjectKey::of::<ConfigVersion>(ns, &version_name(key, after));
        let later = self.objects.table.range((Bound::Excluded(from), Bound::Unbounded));
        let ours = later.take_while(|(key, _)| key.as_bytes().starts_with(prefix.as_bytes())).take(max);
        ours.filter_map(|(_, object)| ConfigVersion::of(object)).collect()
    }
}

/// What a transaction may ask about configuration.
impl Machine {
    /// Refuses with what is there, unless this is the current version.
    pub(crate) fn judge_config(&self, namespace: NamespaceId, at: &ConfigAt) -> Result<(), Rejection> {
        let config = self.object::<Config>(namespace, at.key.as_bytes());
        if config.map_or(0, Config::current_number) == at.version {
            return Ok(());
        }
        let Some(config) = config else {
            let refusal = Refusal::new(RefusalCode::Conflict, format!("there is no configuration `{}`", at.key));
            return Err(refusal.fact("name", &at.key).fact("version", 0).into());
        };
        Err(unexpected(&at.key, config))
    }
}

fn version_name(key: &str, number: u64) -> Vec<u8> {
    [key.as_bytes(), &[SEPARATOR], &number.to_be_bytes()].concat()
}

impl Commit<'_> {
    pub(crate) fn config_op(&mut self, op: &ConfigOp) -> Result<OpReply, Rejection> {
        let after = match op {
            ConfigOp::Publish(publish) => self.config_publish(publish),
            ConfigOp::Rollback((note, to)) => self.config_rollback(note, *to),
            ConfigOp::SetSchema(set) => self.config_set_schema(set),
            ConfigOp::Stage(stage) => self.config_stage(stage),
            ConfigOp::Promote(at) => self.config_promote(at),
            ConfigOp::Abort(at) => self.config_abort(at),
            ConfigOp::Delete(note) => self.config_delete(note),
            ConfigOp::Purge(at) => self.config_purge(at),
        };
        after.map(|after| ConfigReply::Changed(after).into())
    }

    fn config(&self, key: &str) -> Result<(ObjectKey, Option<Config>), Rejection> {
        if key.is_empty() || key.len() > CONFIG_KEY_BYTES_MAX || key.as_bytes().contains(&SEPARATOR) {
            return Err(invalid(format!("a key has 1 to {CONFIG_KEY_BYTES_MAX} bytes, none of them zero")));
        }
        let place = self.object_key::<Config>(key.as_bytes());
        let config = self.object::<Config>(&place).cloned();
        Ok((place, config))
    }

    /// One that is there, deleted or not.
    fn known_config(&self, key: &str) -> Result<(ObjectKey, Config), Rejection> {
        match self.config(key)? {
            (place, Some(config)) => Ok((place, config)),
            (_, None) => Err(missing(key)),
        }
    }

    fn put_config(&mut self, place: &ObjectKey, version: u64, config: Config) -> Result<ConfigAfter, Rejection> {
        let after = ConfigAfter {
            version,
            current: config.current_number(),
            candidate: config.candidate.as_ref().map_or(0, |candidate| candidate.version.number),
            schema: config.schema_number(),
        };
        self.put_object(place, config);
        Ok(after)
    }

    fn config_publish(&mut self, publish: &ConfigPublish) -> Result<ConfigAfter, Rejection> {
        let note = &publish.note;
        if publish.content.len() > CONFIG_CONTENT_BYTES_MAX {
            return Err(too_large("content", CONFIG_CONTENT_BYTES_MAX));
        }
        if let Some(rollout) = &publish.rollout {
            check_rollout(rollout)?;
        }
        let (place, config) = self.config(&note.key)?;
        let config = config.unwrap_or_else(|| Config {
            revision: self.at,
            newest: 0,
            current: None,
            candidate: None,
            newest_schema: 0,
            schema: None,
            kept: Vec::new(),
        });
        check_expected(note, &config)?;
        check_settled(&note.key, &config)?;
        check_schema(note, &config)?;
        let version = ConfigVersion {
            media: publish.media.clone(),
            digest: publish.digest,
            content: publish.content.clone(),
            ..self.next_version(note, &config)?
        };
        self.add_version(&place, config, version, publish.rollout.clone())
    }

    fn config_rollback(&mut self, note: &ConfigNote, to: u64) -> Result<ConfigAfter, Rejection> {
        let (place, config) = self.known_config(&note.key)?;
        check_expected(note, &config)?;
        check_settled(&note.key, &config)?;
        let old = self.object::<ConfigVersion>(&self.object_key::<ConfigVersion>(&version_name(&note.key, to)));
        let Some(old) = old.filter(|old| !old.deleted).cloned() else {
            let refusal = Refusal::new(RefusalCode::NotFound, format!("version {to} of `{}` is not kept", note.key));
            return Err(refusal.fact("name", &note.key).fact("version", to).into());
        };
        check_schema(note, &config)?;
        let version = ConfigVersion {
            media: old.media,
            digest: old.digest,
            content: old.content,
            copy_of: to,
            ..self.next_version(note, &config)?
        };
        self.add_version(&place, config, version, None)
    }

    fn config_delete(&mut self, note: &ConfigNote) -> Result<ConfigAfter, Rejection> {
        let (place, config) = self.known_config(&note.key)?;
        check_expected(note, &config)?;
        check_settled(&note.key, &config)?;
        if config.current.is_none() {
            return Err(missing(&note.key));
        }
        let version = ConfigVersion { deleted: true, ..self.next_version(note, &config)? };
        self.add_version(&place, config, version, None)
    }

    /// The next number with its note; contents are still to be filled in.
    fn next_version(&self, note: &ConfigNote, config: &Config) -> Result<ConfigVersion, Rejection> {
        if note.author.len() + note.comment.len() > CONFIG_NOTES_BYTES_MAX {
            return Err(too_large("author and comment", CONFIG_NOTES_BYTES_MAX));
        }
        Ok(ConfigVersion {
            number: config.newest + 1,
            revision: self.at,
            author: note.author.clone(),
            comment: note.comment.clone(),
            time_ms: note.time_ms,
            schema: config.schema_number(),
            copy_of: 0,
            deleted: false,
            media: "".into(),
            digest: [0; 32],
            content: Arc::from(&b""[..]),
        })
    }

    /// Keeps a version, lets the oldest ones go, and makes it the current one or the candidate.
    fn add_version(
        &mut self,
        place: &ObjectKey,
        mut config: Config,
        version: ConfigVersion,
        rollout: Option<Rollout>,
    ) -> Result<ConfigAfter, Rejection> {
        let number = version.number;
        let key = String::from_utf8_lossy(place.name()).into_owned();
        self.put_object(&self.object_key::<ConfigVersion>(&version_name(&key, number)), version.clone());
        config.kept.push((number, version.size()));
        config.newest = number;
        config.revision = self.at;
        match rollout {
            Some(rollout) if config.current.is_some() => config.candidate = Some(ConfigCandidate { version, rollout }),
            Some(_) => return Err(invalid("the first version of a key has nobody to be rolled out beside")),
            None => config.current = Some(version).filter(|version| !version.deleted),
        }
        self.forget_old_versions(&key, &mut config);
        self.put_config(place, number, config)
    }

    fn forget_old_versions(&mut self, key: &str, config: &mut Config) {
        let in_use = [config.current_number(), config.newest];
        let mut bytes: u64 = config.kept.iter().map(|(_, size)| size).sum();
        while config.kept.len() > VERSIONS_MAX || bytes > VERSIONS_BYTES_MAX {
            let oldest = config.kept.iter().position(|(number, _)| !in_use.contains(number));
            let Some(oldest) = oldest else { return };
            let (number, size) = config.kept.remove(oldest);
            bytes -= size;
            self.remove_object(&self.object_key::<ConfigVersion>(&version_name(key, number)));
        }
    }

    fn config_set_schema(&mut self, set: &ConfigSchemaSet) -> Result<ConfigAfter, Rejection> {
        if set.text.as_ref().is_some_and(|text| text.len() > CONFIG_SCHEMA_BYTES_MAX) {
            return Err(too_large("schema", CONFIG_SCHEMA_BYTES_MAX));
        }
        let (place, mut config) = self.known_config(&set.key)?;
        check_settled(&set.key, &config)?;
        let in_force = config.schema_number();
        if set.expect.is_some_and(|expect| expect != in_force) {
            let why = format!("`{}` has schema {in_force}", set.key);
            return Err(conflict(&set.key, why, &config).into());
        }
        if set.text.is_some() && set.checked != config.current_number() {
            let why = format!("`{}` was published while the schema was checked: it is at {}", set.key, config.newest);
            return Err(conflict(&set.key, why, &config).fact("checked", set.checked).into());
        }
        config.newest_schema += u64::from(set.text.is_some());
        let (number, revision) = (config.newest_schema, self.at);
        config.schema = set.text.clone().map(|text| ConfigSchema { number, revision, text });
        config.revision = self.at;
        let current = config.current_number();
        self.put_config(&place, current, config)
    }

    // ---- Roll-out in steps ----

    fn staged(&self, key: &str, version: u64) -> Result<(ObjectKey, Config, ConfigCandidate), Rejection> {
        let (place, config) = self.known_config(key)?;
        match config.candidate.clone() {
            Some(candidate) if candidate.version.number == version => Ok((place, config, candidate)),
            Some(candidate) => {
                let why = format!("the candidate of `{key}` is version {}", candidate.version.number);
                Err(conflict(key, why, &config).into())
            }
            None => Err(conflict(key, format!("`{key}` has no candidate"), &config).into()),
        }
    }

    fn config_stage(&mut self, stage: &ConfigStage) -> Result<ConfigAfter, Rejection> {
        check_rollout(&stage.rollout)?;
        let (place, config, candidate) = self.staged(&stage.key, stage.version)?;
        let candidate = ConfigCandidate { rollout: stage.rollout.clone(), ..candidate };
        let config = Config { candidate: Some(candidate), revision: self.at, ..config };
        self.put_config(&place, stage.version, config)
    }

    fn config_promote(&mut self, at: &ConfigAt) -> Result<ConfigAfter, Rejection> {
        let (place, config, candidate) = self.staged(&at.key, at.version)?;
        let config = Config { current: Some(candidate.version), candidate: None, revision: self.at, ..config };
        self.put_config(&place, at.version, config)
    }

    fn config_abort(&mut self, at: &ConfigAt) -> Result<ConfigAfter, Rejection> {
        let (place, config, _) = self.staged(&at.key, at.version)?;
        let config = Config { candidate: None, revision: self.at, ..config };
        self.put_config(&place, at.version, config)
    }

    fn config_purge(&mut self, at: &ConfigAt) -> Result<ConfigAfter, Rejection> {
        let (place, config) = self.known_config(&at.key)?;
        if config.newest != at.version {
            let why = format!("the newest version of `{}` is {}", at.key, config.newest);
            return Err(conflict(&at.key, why, &config).into());
        }
        for (number, _) in &config.kept {
            self.remove_object(&self.object_key::<ConfigVersion>(&version_name(&at.key, *number)));
        }
        self.remove_object(&place);
        Ok(ConfigAfter { version: at.version, current: 0, candidate: 0, schema: 0 })
    }
}

fn check_rollout(rollout: &Rollout) -> Result<(), Rejection> {
    let bytes: usize = rollout.labels.iter().map(|(name, value)| name.len() + value.len()).sum();
    if rollout.labels.len() > ROLLOUT_LABELS_MAX || bytes > ROLLOUT_LABEL_BYTES_MAX {
        return Err(invalid(format!(
            "a roll-out has at most {ROLLOUT_LABELS_MAX} labels, {ROLLOUT_LABEL_BYTES_MAX} bytes"
        )));
    }
    let fits = rollout.share <= ROLLOUT_ALL;
    if fits { Ok(()) } else { Err(invalid("a roll-out is for 0 to 100 percent")) }
}

fn check_expected(note: &ConfigNote, config: &Config) -> Result<(), Rejection> {
    let current = config.current_number();
    if note.expect.is_none_or(|expect| expect == current) { Ok(()) } else { Err(unexpected(&note.key, config)) }
}

/// It is at another version than whoever asks expects.
fn unexpected(key: &str, config: &Config) -> Rejection {
    let why = match config.current_number() {
        0 => format!("there is no configuration `{key}`"),
        current => format!("`{key}` is at version {current}"),
    };
    conflict(key, why, config).into()
}

fn check_settled(key: &str, config: &Config) -> Result<(), Rejection> {
    let Some(candidate) = &config.candidate else { return Ok(()) };
    let why = format!("version {} of `{key}` is being rolled out: promote or abort it first", candidate.version.number);
    Err(conflict(key, why, config).into())
}

fn check_schema(note: &ConfigNote, config: &Config) -> Result<(), Rejection> {
    if note.checked_by == config.schema_number() {
        return Ok(());
    }
    let why = format!("the schema of `{}` was changed while the content was checked", note.key);
    Err(conflict(&note.key, why, config).fact("checked_by", note.checked_by).into())
}

fn missing(key: &str) -> Rejection {
    Refusal::new(RefusalCode::NotFound, format!("there is no configuration `{key}`")).fact("name", key).into()
}

fn too_large(what: &str, max: usize) -> Rejection {
    let refusal = Refusal::new(RefusalCode::TooLarge, format!("{what}: at most {max} bytes are kept"));
    refusal.fact("limit", max).into()
}

fn conflict(key: &str, why: String, config: &Config) -> Refusal {
    let refusal = Refusal::new(RefusalCode::Conflict, why).fact("name", key);
    let refusal = refusal.fact("version", config.current_number()).fact("revision", config.revision);
    let refusal = refusal.fact("schema", config.schema_number());
    let refusal = match &config.current {
        Some(current) => refusal.fact("author", &current.author),
        None => refusal,
    };
    match &config.candidate {
        Some(candidate) => refusal.fact("candidate", candidate.version.number),
        None => refusal,
    }
}
