//! Configuration with versions: publish, read, roll out, and follow with the last known good on disk.
//!
//! Promises. A [`Config`] always has a value: one from the service, or, when that is away at the start, the last one that was stored on this disk, which
//! is then told as stale. What cannot be read (by the application's own reader) is never taken in: the value before stays. The file is written whole or
//! not at all and checked when it is read.
//! Not promised. That a value is the newest: following takes its time, and a stale one is as old as its file.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tenure_wire::tenure::v1;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use crate::client::{Client, all_pages};
use crate::error::{Code, Error, found, of_read};
use crate::kv::carried_out;

/// Pause before the stream is opened again; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A stream that is silent for longer is taken for dead: the service says where it is every 5 s.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// The first line of a stored value.
const MAGIC: &str = "tenure-config 1";

/// One version of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConfigVersion {
    /// The key.
    pub key: String,
    /// Its number: each is given once.
    pub version: u64,
    /// The content; empty in lists.
    pub content: Bytes,
    /// What it is, such as `application/json`.
    pub media_type: String,
    /// Who published it.
    pub author: String,
    /// Why.
    pub comment: String,
    /// What the clock of the server showed, in milliseconds since 1970. For people.
    pub time_ms: u64,
    /// SHA-256 of the content, hexadecimal.
    pub digest: String,
    /// The revision of its commit.
    pub revision: u64,
    /// The schema that it was checked by, or 0.
    pub schema: u64,
    /// The version that it copies, or 0.
    pub copy_of: u64,
    /// It marks a deletion.
    pub deleted: bool,
    /// It is on trial: only some instances are given it.
    pub candidate: bool,
}

impl ConfigVersion {
    /// The content as text, if it is that.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        std::str::from_utf8(&self.content).ok()
    }
}

impl From<v1::ConfigVersion> for ConfigVersion {
    fn from(version: v1::ConfigVersion) -> Self {
        let content = if version.content_bytes.is_empty() { version.content.into() } else { version.content_bytes };
        Self {
            key: version.key,
            version: version.version,
            content,
            media_type: version.media_type,
            author: version.author,
            comment: version.comment,
            time_ms: version.time_ms,
            digest: version.digest,
            revision: version.revision,
            schema: version.schema,
            copy_of: version.copy_of,
            deleted: version.deleted,
            candidate: version.candidate,
        }
    }
}

/// A key after a change of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConfigChange {
    /// The version that the change was about.
    pub version: u64,
    /// The current version now, or 0.
    pub current: u64,
    /// The candidate now, or 0.
    pub candidate: u64,
    /// The number of the schema in force, or 0.
    pub schema: u64,
}

impl From<v1::ConfigChangeReply> for ConfigChange {
    fn from(reply: v1::ConfigChangeReply) -> Self {
        let v1::ConfigChangeReply { version, current_version, candidate_version, schema, .. } = reply;
        Self { version, current: current_version, candidate: candidate_version, schema }
    }
}

/// Which instances are given a candidate: those that have all the labels, and of them a share.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConfigRollout {
    request: v1::ConfigRollout,
}

impl ConfigRollout {
    /// A share of the instances, in percent (to the hundredth).
    #[must_use]
    pub fn percent(percent: f64) -> Self {
        // Clamped, so that the cast keeps every value.
        let share = (percent.clamp(0.0, 100.0) * 100.0).round() as u32;
        Self { request: v1::ConfigRollout { share, ..Default::default() } }
    }

    /// Only instances with this label.
    #[must_use]
    pub fn label(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.request.labels.insert(name.into(), value.into());
        self
    }

    pub(crate) fn into_wire(self) -> v1::ConfigRollout {
        self.request
    }
}

/// A version to be published; see [`Client::publish_config`].
#[derive(Clone, Debug)]
pub struct PublishConfig<'a> {
    client: &'a Client,
    request: v1::ConfigPublishRequest,
}

impl<'a> PublishConfig<'a> {
    /// Only if this is the current version; 0: only if there is none.
    #[must_use]
    pub fn expect_version(mut self, version: u64) -> Self {
        self.request.expect_version = Some(version);
        self
    }

    /// What the content is, such as `application/json`.
    #[must_use]
    pub fn media_type(mut self, media_type: impl Into<String>) -> Self {
        self.request.media_type = media_type.into();
        self
    }

    /// Who publishes it.
    #[must_use]
    pub fn author(mut self, author: impl Into<String>) -> Self {
        self.request.author = author.into();
        self
    }

    /// Why.
    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.request.comment = comment.into();
        self
    }

    /// Makes it a candidate that these instances are given first.
    #[must_use]
    pub fn rollout(mut self, rollout: ConfigRollout) -> Self {
        self.request.rollout = Some(rollout.request);
        self
    }

    pub(crate) fn into_wire(self) -> v1::ConfigPublishRequest {
        self.request
    }

    async fn run(self) -> Result<ConfigChange, Error> {
        let plan = self.client.plan("publish config", true);
        let reply: v1::ConfigChangeReply =
            self.client.change(plan, "/tenure.v1.Configs/Publish", &self.request).await?;
        Ok(reply.into())
    }
}

carried_out!(PublishConfig<'a> => ConfigChange, run);

impl Client {
    /// Publishes a version of a key.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// let first = client.publish_config("app/limits", r#"{"rate": 100}"#).author("ann").expect_version(0).await?;
    /// // Refused with CONFLICT, should somebody have published in between.
    /// client.publish_config("app/limits", r#"{"rate": 200}"#).expect_version(first.version).await?;
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing is published before .await"]
    pub fn publish_config(&self, key: impl Into<String>, content: impl Into<Bytes>) -> PublishConfig<'_> {
        let (key, content_bytes, namespace) = (key.into(), content.into(), self.namespace());
        let request = v1::ConfigPublishRequest { key, content_bytes, namespace, ..Default::default() };
        PublishConfig { client: self, request }
    }

    /// Publishes a copy of an older version, only if `expect_version` is the current one, where that is told.
    ///
    /// # Errors
    /// [`Code::NotFound`] if that version is not kept, [`Code::Conflict`] while there is a candidate, [`Code::Invalid`] if it does not satisfy the schema
    /// of now.
    pub async fn rollback_config(
        &self,
        key: impl Into<String>,
        version: u64,
        expect_version: Option<u64>,
        author: &str,
        comment: &str,
    ) -> Result<ConfigChange, Error> {
        let request = v1::ConfigRollbackRequest {
            key: key.into(),
            version,
            expect_version,
            author: author.to_owned(),
            comment: comment.to_owned(),
            namespace: self.namespace(),
            request: None,
        };
        let plan = self.plan("roll config back", true);
        let reply: v1::ConfigChangeReply = self.change(plan, "/tenure.v1.Configs/Rollback", &request).await?;
        Ok(reply.into())
    }

    /// Sets the JSON Schema that the contents of a key must satisfy, the current one too; an empty one removes it.
    ///
    /// # Errors
    /// [`Code::Invalid`] if it is no schema or the current version does not satisfy it, [`Code::NotFound`] if there is no such key.
    pub async fn set_config_schema(
        &self,
        key: impl Into<String>,
        schema: impl Into<String>,
    ) -> Result<ConfigChange, Error> {
        let (key, schema, namespace) = (key.into(), schema.into(), self.namespace());
        let request = v1::ConfigSetSchemaRequest { key, schema, expect_schema: None, namespace, request: None };
        let plan = self.plan("set schema", true);
        let reply: v1::ConfigChangeReply = self.change(plan, "/tenure.v1.Configs/SetSchema", &request).await?;
        Ok(reply.into())
    }

    /// Gives the candidate of this number to other instances than now.
    ///
    /// # Errors
    /// [`Code::Conflict`] if it is not the candidate.
    pub async fn stage_config(
        &self,
        key: impl Into<String>,
        version: u64,
        rollout: ConfigRollout,
    ) -> Result<ConfigChange, Error> {
        let (key, rollout, namespace) = (key.into(), Some(rollout.request), self.namespace());
        let request = v1::ConfigStageRequest { key, version, rollout, namespace, request: None };
        let plan = self.plan("stage config", true);
        let reply: v1::ConfigChangeReply = self.change(plan, "/tenure.v1.Configs/Stage", &request).await?;
        Ok(reply.into())
    }

    /// Makes the candidate of this number the current version.
    ///
    /// # Errors
    /// [`Code::Conflict`] if it is not the candidate.
    pub async fn promote_config(&self, key: impl Into<String>, version: u64) -> Result<ConfigChange, Error> {
        let (key, namespace, request) = (key.into(), self.namespace(), None);
        let request = v1::ConfigPromoteRequest { key, version, namespace, request };
        let plan = self.plan("promote config", true);
        let reply: v1::ConfigChangeReply = self.change(plan, "/tenure.v1.Configs/Promote", &request).await?;
        Ok(reply.into())
    }

    /// Drops the candidate of this number.
    ///
    /// # Errors
    /// [`Code::Conflict`] if it is not the candidate.
    pub async fn abort_config(&self, key: impl Into<String>, version: u64) -> Result<ConfigChange, Error> {
        let (key, namespace, request) = (key.into(), self.namespace(), None);
        let request = v1::ConfigAbortRequest { key, version, namespace, request };
        let plan = self.plan("abort config", true);
        let reply: v1::ConfigChangeReply = self.change(plan, "/tenure.v1.Configs/Abort", &request).await?;
        Ok(reply.into())
    }

    /// Deletes a key, only if `expect_version` is the current one, where that is told. Its versions stay readable and its numbers go on.
    ///
    /// # Errors
    /// [`Code::NotFound`] if there is none, [`Code::Conflict`] if it is at another version, or has a candidate.
    pub async fn delete_config(
        &self,
        key: impl Into<String>,
        expect_version: Option<u64>,
        author: &str,
        comment: &str,
    ) -> Result<ConfigChange, Error> {
        let request = v1::ConfigDeleteRequest {
            key: key.into(),
            expect_version,
            author: author.to_owned(),
            comment: comment.to_owned(),
            namespace: self.namespace(),
            request: None,
            ..Default::default()
        };
        let plan = self.plan("delete config", true);
        let reply: v1::ConfigChangeReply = self.change(plan, "/tenure.v1.Configs/Delete", &request).await?;
        Ok(reply.into())
    }

    /// Reads what an instance is given of a key, or one version of it; `None` if there is none.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// if let Some(limits) = client.read_config("app/limits").await? {
    ///     println!("version {}: {:?}", limits.version, limits.text());
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing is read before .await"]
    pub fn read_config(&self, key: impl Into<String>) -> ReadConfig<'_> {
        let request = v1::ConfigGetRequest { key: key.into(), namespace: self.namespace(), ..Default::default() };
        ReadConfig { client: self, request }
    }

    /// The JSON Schema in force for a key; `None` if there is none.
    ///
    /// # Errors
    /// [`Code::NotFound`] if there is no such key.
    pub async fn config_schema(&self, key: impl Into<String>) -> Result<Option<String>, Error> {
        let (key, namespace) = (key.into(), self.namespace());
        let request = v1::ConfigGetRequest { key, schema: true, namespace, ..Default::default() };
        let reply = self.get_config(&request).await?;
        Ok(Some(reply.schema_text).filter(|_| reply.schema > 0))
    }

    async fn get_config(&self, request: &v1::ConfigGetRequest) -> Result<v1::ConfigGetReply, Error> {
        let reply = self.read(|channel| {
            let (mut configs, request) = (configs(channel), request.clone());
            async move { configs.get(request).await }
        });
        reply.await
    }

    /// The versions of a key that are kept, the newest first, without contents.
    ///
    /// # Errors
    /// [`Code::NotFound`] if there is no such key.
    pub async fn config_history(&self, key: impl Into<String>) -> Result<Vec<ConfigVersion>, Error> {
        let request = v1::ConfigHistoryRequest { key: key.into(), namespace: self.namespace(), ..Default::default() };
        let reply = self
            .read(|channel| {
                let (mut configs, request) = (configs(channel), request.clone());
                async move { configs.history(request).await }
            })
            .await?;
        Ok(reply.versions.into_iter().map(ConfigVersion::from).collect())
    }

    /// The current versions of all keys that begin with `prefix`, by key, without contents.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn configs(&self, prefix: impl Into<String>) -> Result<Vec<ConfigVersion>, Error> {
        let prefix = &prefix.into();
        let page = |after| async move {
            let (prefix, namespace) = (prefix.clone(), self.namespace());
            let request = v1::ConfigListRequest { prefix, limit: 1_000, after, namespace, ..Default::default() };
            let ask = |channel| {
                let (mut configs, request) = (configs(channel), request.clone());
                async move { configs.list(request).await }
            };
            let reply = self.read(ask).await?;
            Ok((reply.configs.into_iter().map(ConfigVersion::from).collect(), reply.next))
        };
        all_pages(page).await
    }

    /// Follows a key from the start of an application on, with the last known good on disk.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// let limit = client
    ///     .follow_config("app/limit")
    ///     .instance("web-7")
    ///     .cache("/var/lib/app/limit.config")
    ///     .open(|content| std::str::from_utf8(content).ok()?.trim().parse::<u32>().ok())
    ///     .await?;
    /// println!("{} (stale: {})", limit.get(), limit.is_stale());
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing is followed before .open()"]
    pub fn follow_config(&self, key: impl Into<String>) -> FollowConfig {
        let request = v1::ConfigWatchRequest { key: key.into(), namespace: self.namespace(), ..Default::default() };
        FollowConfig { client: self.clone(), request, cache: None, patience: Duration::from_secs(5) }
    }

    /// Follows what is given of a key, or of all that begin with a prefix.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// let mut watch = client.watch_config("app/").prefix().open();
    /// loop {
    ///     println!("{:?}", watch.next().await?);
    /// }
    /// # }
    /// ```
    #[must_use = "nothing is followed before .open()"]
    pub fn watch_config(&self, key: impl Into<String>) -> WatchConfig {
        let request = v1::ConfigWatchRequest { key: key.into(), namespace: self.namespace(), ..Default::default() };
        WatchConfig { client: self.clone(), request }
    }
}

fn configs(channel: Channel) -> v1::configs_client::ConfigsClient<Channel> {
    v1::configs_client::ConfigsClient::new(channel).max_decoding_message_size(crate::pipeline::RECEIVE_BYTES)
}

/// A key to be read; see [`Client::read_config`].
#[derive(Clone, Debug)]
pub struct ReadConfig<'a> {
    client: &'a Client,
    request: v1::ConfigGetRequest,
}

impl<'a> ReadConfig<'a> {
    /// This version; 0 is what the instance is given.
    #[must_use]
    pub fn version(mut self, version: u64) -> Self {
        self.request.version = version;
        self
    }

    /// Which instance asks. Without it and labels the answer is the current version.
    #[must_use]
    pub fn instance(mut self, instance: impl Into<String>) -> Self {
        self.request.instance = instance.into();
        self
    }

    /// A label of the instance.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.request.labels.push(format!("{name}={value}"));
        self
    }

    async fn run(self) -> Result<Option<ConfigVersion>, Error> {
        found(self.client.get_config(&self.request).await.map(|reply| reply.version.map(ConfigVersion::from)))
    }
}

carried_out!(ReadConfig<'a> => Option<ConfigVersion>, run);

/// What became of a key; see [`ConfigWatch`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigEvent {
    /// From now on the instance is given this version.
    Given(ConfigVersion),
    /// There is nothing for this key any more.
    Deleted(String),
}

/// A watch to be opened; see [`Client::watch_config`].
#[derive(Clone, Debug)]
pub struct WatchConfig {
    client: Client,
    request: v1::ConfigWatchRequest,
}

impl WatchConfig {
    /// Follows every key that begins with the one given.
    #[must_use]
    pub fn prefix(mut self) -> Self {
        self.request.prefix = true;
        self
    }

    /// Which instance asks. Without it and labels current versions are told.
    #[must_use]
    pub fn instance(mut self, instance: impl Into<String>) -> Self {
        self.request.instance = instance.into();
        self
    }

    /// A label of the instance.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.request.labels.push(format!("{name}={value}"));
        self
    }

    /// Opens it: the first [`ConfigWatch::next`] connects.
    #[must_use]
    pub fn open(self) -> ConfigWatch {
        let Self { client, request } = self;
        let (told, before) = (BTreeMap::new(), BTreeSet::new());
        ConfigWatch { client, request, stream: None, told, before, events: VecDeque::new(), tries: 0 }
    }
}

/// What is given of some keys: first what there is, then each change, over every loss of the connection.
#[derive(Debug)]
pub struct ConfigWatch {
    client: Client,
    request: v1::ConfigWatchRequest,
    stream: Option<tonic::Streaming<v1::ConfigWatchReply>>,
    /// What was told last of each key, by number and revision: another beginning tells it again.
    told: BTreeMap<String, (u64, u64)>,
    /// What had been told when the service began anew, and was not told again yet.
    before: BTreeSet<String>,
    events: VecDeque<ConfigEvent>,
    tries: usize,
}

impl ConfigWatch {
    /// The next event; it waits for it as long as it takes. It may be dropped and called again at any time.
    ///
    /// # Errors
    /// When the service refuses to be watched. Members that are away are tried again, for ever.
    pub async fn next(&mut self) -> Result<ConfigEvent, Error> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let error = match self.stream.as_mut() {
                None => match self.open().await {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                Some(stream) => match timeout(SILENCE_MAX, stream.message()).await {
                    Ok(Ok(Some(reply))) => {
                        self.tries = 0;
                        self.take(reply);
                        continue;
                    }
                    Ok(Ok(None)) => Error::Unavailable { why: "the stream ended".to_owned() },
                    Ok(Err(status)) => of_read(&status),
                    Err(_) => Error::Unavailable { why: "the stream is silent".to_owned() },
                },
            };
            self.stream = None;
            if matches!(error.code(), Some(Code::Invalid | Code::Denied | Code::Unauthenticated | Code::NotFound)) {
                return Err(error);
            }
            tracing::debug!(key = self.request.key, %error, "a watch of configuration is opened again");
            let pause = PAUSE_MIN * 2_u32.pow(u32::try_from(self.tries.min(10)).unwrap_or(10));
            self.tries += 1;
            sleep(pause.min(PAUSE_MAX)).await;
        }
    }

    async fn open(&mut self) -> Result<(), Error> {
        let channels = self.client.channels();
        let channel = channels[self.tries % channels.len()].clone();
        let mut configs = configs(channel);
        let opened = timeout(self.client.timeout(), configs.watch(self.request.clone())).await;
        let opened = opened.map_err(|_| Error::Unavailable { why: "no answer in time".to_owned() })?;
        self.stream = Some(opened.map_err(|status| of_read(&status))?.into_inner());
        if self.request.resume.is_empty() {
            self.begin_anew();
        }
        Ok(())
    }

    fn begin_anew(&mut self) {
        self.before = self.told.keys().cloned().collect();
    }

    fn take(&mut self, reply: v1::ConfigWatchReply) {
        use v1::config_watch_reply::Type;
        if !reply.resume.is_empty() {
            self.request.resume.clone_from(&reply.resume);
        }
        match (reply.r#type(), reply.version) {
            (Type::Given, Some(version)) => {
                let version = ConfigVersion::from(version);
                let now = (version.version, version.revision);
                self.before.remove(&version.key);
                if self.told.insert(version.key.clone(), now) != Some(now) {
                    self.events.push_back(ConfigEvent::Given(version));
                }
            }
            (Type::Deleted, Some(version)) => self.gone(version.key),
            (Type::Reset, _) => {
                // Should the connection be lost before all is told, everything must be told once more.
                self.request.resume.clear();
                self.begin_anew();
            }
            (Type::Synced, _) => std::mem::take(&mut self.before).into_iter().for_each(|key| self.gone(key)),
            _ => {}
        }
    }

    fn gone(&mut self, key: String) {
        self.before.remove(&key);
        if self.told.remove(&key).is_some() {
            self.events.push_back(ConfigEvent::Deleted(key));
        }
    }
}

/// A key to be followed; see [`Client::follow_config`].
#[derive(Clone, Debug)]
pub struct FollowConfig {
    client: Client,
    request: v1::ConfigWatchRequest,
    cache: Option<PathBuf>,
    patience: Duration,
}

impl FollowConfig {
    /// Which instance this is, by whatever tells it from others for good: it decides who is given a candidate.
    #[must_use]
    pub fn instance(mut self, instance: impl Into<String>) -> Self {
        self.request.instance = instance.into();
        self
    }

    /// A label of this instance, for roll-outs by label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.request.labels.push(format!("{name}={value}"));
        self
    }

    /// Keeps the last good value in this file.
    #[must_use]
    pub fn cache(mut self, file: impl Into<PathBuf>) -> Self {
        self.cache = Some(file.into());
        self
    }

    /// How long the start waits for the service before it takes the stored value: 5 s unless told otherwise.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Opens it: the value of the service, or the stored one if that does not answer in time. `read` turns a content into the application's own
    /// value, or says `None` to what it cannot use.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there is neither, [`Error::Refused`] with [`Code::NotFound`] if the service has no such key and nothing is stored.
    pub async fn open<T, R>(self, read: R) -> Result<Config<T>, Error>
    where
        T: Send + Sync + 'static,
        R: Fn(&[u8]) -> Option<T> + Send + Sync + 'static,
    {
        let Self { client, request, cache, patience } = self;
        let stored = cache.as_deref().and_then(|file| load(file, &request.key));
        let first = timeout(patience, client.given(&request)).await;
        let (version, stale) = match (first, stored) {
            (Ok(Ok(version)), _) if read(&version.content).is_some() => (version, false),
            (_, Some(stored)) if read(&stored.content).is_some() => (stored, true),
            (Ok(Ok(version)), _) => {
                let why =
                    format!("version {} of `{}` cannot be read, and nothing is stored", version.version, version.key);
                return Err(Error::Protocol(why));
            }
            (Ok(Err(error)), _) => return Err(error),
            (Err(_), _) => return Err(Error::Unavailable { why: format!("no answer within {patience:?}") }),
        };
        let Some(value) = read(&version.content) else { return Err(Error::Protocol("it reads once only".to_owned())) };
        if !stale {
            store(cache.as_deref(), &version);
        }
        let (sender, receiver) = watch::channel(Current { value: Arc::new(value), version: Arc::new(version), stale });
        let keeper = tokio::spawn(keep(client, request, cache, read, sender));
        Ok(Config { receiver, keeper: Arc::new(Keeper(keeper)) })
    }
}

struct Current<T> {
    value: Arc<T>,
    version: Arc<ConfigVersion>,
    stale: bool,
}

struct Keeper(JoinHandle<()>);

impl Drop for Keeper {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A value of configuration that follows what the service gives this instance. Clones share it; it is followed until the last one is dropped.
pub struct Config<T> {
    receiver: watch::Receiver<Current<T>>,
    keeper: Arc<Keeper>,
}

impl<T> Clone for Config<T> {
    fn clone(&self) -> Self {
        Self { receiver: self.receiver.clone(), keeper: Arc::clone(&self.keeper) }
    }
}

impl<T> std::fmt::Debug for Config<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let current = self.receiver.borrow();
        let (key, version) = (&current.version.key, current.version.version);
        f.debug_struct("Config").field("key", key).field("version", &version).field("stale", &current.stale).finish()
    }
}

impl<T> Config<T> {
    /// The value now.
    #[must_use]
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.receiver.borrow().value)
    }

    /// The version that it is.
    #[must_use]
    pub fn version(&self) -> Arc<ConfigVersion> {
        Arc::clone(&self.receiver.borrow().version)
    }

    /// It is not known to be what the service gives: it came from the disk, or the service is away, or has deleted it.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        self.receiver.borrow().stale
    }

    /// Waits for another value, or for a change of whether it is stale.
    pub async fn changed(&mut self) {
        if self.receiver.changed().await.is_err() {
            // Nobody follows any more: nothing will change.
            std::future::pending().await
        }
    }
}

impl Client {
    async fn given(&self, request: &v1::ConfigWatchRequest) -> Result<ConfigVersion, Error> {
        let get = v1::ConfigGetRequest {
            key: request.key.clone(),
            instance: request.instance.clone(),
            labels: request.labels.clone(),
            namespace: request.namespace.clone(),
            ..Default::default()
        };
        let reply = self.get_config(&get);
        reply.await?.version.map(ConfigVersion::from).ok_or_else(|| crate::client::mismatched("get config"))
    }
}

/// Follows for ever, over every loss of the stream.
async fn keep<T, R>(
    client: Client,
    mut request: v1::ConfigWatchRequest,
    cache: Option<PathBuf>,
    read: R,
    sender: watch::Sender<Current<T>>,
) where
    R: Fn(&[u8]) -> Option<T>,
{
    let mut pause = PAUSE_MIN;
    let mut taking = Taking { read, cache, sender, has_given: false };
    for endpoint in (0..client.channels().len()).cycle() {
        let channel = client.channels()[endpoint].clone();
        let error = match configs(channel).watch(request.clone()).await {
            Err(status) => of_read(&status),
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match timeout(SILENCE_MAX, stream.message()).await {
                        Ok(Ok(Some(reply))) => {
                            pause = PAUSE_MIN;
                            if !reply.resume.is_empty() {
                                request.resume.clone_from(&reply.resume);
                            }
                            if reply.r#type() == v1::config_watch_reply::Type::Reset {
                                // Should it be lost before all is told, everything must be told once more.
                                request.resume.clear();
                            }
                            taking.take(reply);
                        }
                        Ok(Ok(None)) => break Error::Unavailable { why: "the stream ended".to_owned() },
                        Ok(Err(status)) => break of_read(&status),
                        Err(_) => break Error::Unavailable { why: "the stream is silent".to_owned() },
                    }
                }
            }
        };
        tracing::debug!(key = request.key, %error, "the stream of a configuration is opened again");
        mark(&taking.sender, true);
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// What is done with what a stream tells.
struct Taking<T, R> {
    read: R,
    cache: Option<PathBuf>,
    sender: watch::Sender<Current<T>>,
    /// The value is what the service gave last. Not so while that is deleted, or was never told, or cannot be read.
    has_given: bool,
}

impl<T, R: Fn(&[u8]) -> Option<T>> Taking<T, R> {
    fn take(&mut self, reply: v1::ConfigWatchReply) {
        use v1::config_watch_reply::Type;
        match (reply.r#type(), reply.version) {
            (Type::Given, Some(version)) => self.given(ConfigVersion::from(version)),
            // What an application runs on does not go because somebody deleted it.
            (Type::Deleted, _) => {
                self.has_given = false;
                mark(&self.sender, true);
            }
            // A key that is not told again is gone.
            (Type::Reset, _) => self.has_given = false,
            (Type::Synced | Type::Bookmark, _) => mark(&self.sender, !self.has_given),
            _ => {}
        }
    }

    fn given(&mut self, version: ConfigVersion) {
        let Some(value) = (self.read)(&version.content) else {
            tracing::warn!(
                key = version.key,
                version = version.version,
                "a version cannot be read: the one before stays"
            );
            self.has_given = false;
            return mark(&self.sender, true);
        };
        self.has_given = true;
        let is_same = {
            let current = self.sender.borrow();
            (current.version.version, current.version.revision) == (version.version, version.revision)
        };
        if is_same {
            return mark(&self.sender, false);
        }
        store(self.cache.as_deref(), &version);
        self.sender.send_replace(Current { value: Arc::new(value), version: Arc::new(version), stale: false });
    }
}

fn mark<T>(sender: &watch::Sender<Current<T>>, stale: bool) {
    sender.send_if_modified(|current| std::mem::replace(&mut current.stale, stale) != stale);
}

// ---- The last known good on disk ----

/// Written beside and renamed, so that a reader finds the old one or the new one whole.
fn store(cache: Option<&Path>, version: &ConfigVersion) {
    let Some(file) = cache else { return };
    if let Err(error) = write(file, version) {
        tracing::warn!(file = %file.display(), %error, "the last known good is not stored");
    }
}

fn write(file: &Path, version: &ConfigVersion) -> io::Result<()> {
    let mut text = format!("{MAGIC}\n{}\n{}\n{}\n", version.version, version.revision, version.key).into_bytes();
    text.extend_from_slice(&version.content);
    let beside = beside(file);
    let mut new = fs::File::create(&beside)?;
    new.write_all(hex(&Sha256::digest(&text)).as_bytes())?;
    new.write_all(b"\n")?;
    new.write_all(&text)?;
    new.sync_all()?;
    fs::rename(&beside, file)
}

/// The name has all of the file's own, so that no two files share one.
fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// `None`: there is none, or it is damaged, or of another key.
fn load(file: &Path, key: &str) -> Option<ConfigVersion> {
    let all = fs::read(file).ok()?;
    let (sum, text) = all.split_at_checked(65)?;
    if sum != format!("{}\n", hex(&Sha256::digest(text))).as_bytes() {
        tracing::warn!(file = %file.display(), "the stored configuration is damaged and not used");
        return None;
    }
    let mut parts = text.splitn(5, |&byte| byte == b'\n');
    let mut line = || parts.next().and_then(|part| std::str::from_utf8(part).ok());
    let (magic, version, revision, stored) = (line()?, line()?.parse().ok()?, line()?.parse().ok()?, line()?);
    if magic != MAGIC || stored != key {
        return None;
    }
    let content = Bytes::copy_from_slice(parts.next()?);
    Some(ConfigVersion { key: key.to_owned(), version, revision, content, ..Default::default() })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_comes_back_and_what_is_damaged_does_not() {
        let folder = std::env::temp_dir().join(format!("tenure-config-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = folder.join("app.config");
        let content = Bytes::from_static(b"a\nb\n\xff");
        let version = ConfigVersion { key: "app".into(), version: 3, revision: 9, content, ..Default::default() };
        assert_eq!(load(&file, "app"), None);
        // What is being written for `app.flags`, or what anybody else has there, is not touched.
        fs::write(folder.join("app.new"), "flags").unwrap();
        write(&file, &version).unwrap();
        assert_eq!(fs::read(folder.join("app.new")).unwrap(), b"flags");
        assert_eq!(load(&file, "app"), Some(version.clone()));
        assert_eq!(load(&file, "other"), None);
        let whole = fs::read(&file).unwrap();
        for place in [0, 70, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[place] ^= 1;
            fs::write(&file, damaged).unwrap();
            assert_eq!(load(&file, "app"), None, "{place}");
        }
        fs::write(&file, &whole[..40]).unwrap();
        assert_eq!(load(&file, "app"), None);
        fs::remove_dir_all(&folder).unwrap();
    }
}
