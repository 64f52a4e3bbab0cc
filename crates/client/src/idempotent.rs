//! Idempotency records: run something once per key, and get the first result again.
//!
//! Promises. Of all who run a key at most one is granted it at a time, whatever the number of processes; the others get its stored result, or are
//! told that it runs. What was completed is replayed byte for byte until its retention is over. A running attempt is kept alive by heartbeats until its
//! [`Attempt`] and every clone of it is dropped. Where the caller of a begin has gone before its grant came, the key is given free again.
//! Not promised. That the work itself runs once: an attempt whose process stalls past its lease may be followed by another while it is still at work. Give
//! its [`Attempt::token`] to whatever checks it, keep checkpoints before and after effects, or forbid the takeover ([`Idempotent::takeover`]).
//! Relies on. `begin` and every ending carry a request id, so a lost answer starts nothing twice.

use std::fmt::{self, Write as _};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::idempotency_begin_reply::Result as Begin;
use tenure_wire::tenure::v1::idempotency_client::IdempotencyClient;
use tokio::sync::{oneshot, watch};

use crate::client::{Client, RequestId};
use crate::clock::millis;
use crate::error::{Code, Error, Outcome, Problem};
use crate::lock::Unclaimed;
use crate::pipeline::RECEIVE_BYTES;

/// Bodies above this are not kept: a replay says so instead.
pub const BODY_BYTES_MAX: usize = 256 << 10;
/// The shortest lease of an attempt.
const TTL_MIN: Duration = Duration::from_secs(1);
const TTL_DEFAULT: Duration = Duration::from_secs(60);
/// How often an unwanted attempt is looked for and given free, and the pause between. Then its lease ends it.
const GIVE_FREE_TRIES: usize = 5;
const AGAIN: Duration = Duration::from_millis(300);

/// The key of one step of a larger operation: stable over attempts, different for each parent and step.
///
/// It is `d1-` and the SHA-256, in hexadecimal, of `tenure derived key 1`, a zero byte, the length of the parent in bytes (8 bytes, big endian), the
/// parent, and the step. This never changes; another way would have another prefix.
///
/// ```
/// let charge = tenure_client::derive("order-42", "charge");
/// assert_eq!(charge, tenure_client::derive("order-42", "charge"));
/// assert_ne!(charge, tenure_client::derive("order-4", "2charge"));
/// ```
#[must_use]
pub fn derive(parent: &str, step: &str) -> String {
    let mut hash = Sha256::new();
    hash.update(b"tenure derived key 1\0");
    hash.update((parent.len() as u64).to_be_bytes());
    hash.update(parent);
    hash.update(step);
    format!("d1-{}", hex(&hash.finalize()))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What a request looked like, so that another one under its key is found out ([`Code::Mismatch`]).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// The way in which the digest was made, with its version. Only digests of one algorithm are compared.
    pub algorithm: String,
    /// 1 to 64 bytes.
    pub digest: Vec<u8>,
}

impl Fingerprint {
    /// Of the bytes that make the request what it is: SHA-256, under the name `sha256-1`.
    #[must_use]
    pub fn of(request: impl AsRef<[u8]>) -> Self {
        Self { algorithm: "sha256-1".to_owned(), digest: Sha256::digest(request.as_ref()).to_vec() }
    }

    fn wire(&self) -> v1::Fingerprint {
        v1::Fingerprint { algorithm: self.algorithm.clone(), digest: self.digest.clone().into() }
    }
}

/// Whether a dead attempt may be followed by another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Takeover {
    /// The next asker takes over. Right where effects are guarded by the attempt's token or are harmless to repeat.
    #[default]
    Allow,
    /// Somebody must decide first ([`Code::NeedsReconcile`]). Right where an effect may have left and cannot be asked for.
    Never,
}

impl Takeover {
    fn wire(self) -> i32 {
        match self {
            Self::Allow => v1::Takeover::Allowed.into(),
            Self::Never => v1::Takeover::Never.into(),
        }
    }
}

/// What came of an attempt: a number, headers and bytes, of which the service reads nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoredResult {
    /// The caller's own number: an HTTP status, an exit code.
    pub status: u32,
    /// At most 64 of 16 KiB together.
    pub headers: Vec<(String, String)>,
    /// Above [`BODY_BYTES_MAX`] only its size and digest are kept.
    pub body: Bytes,
    /// In what was read: the body was too large to keep.
    pub not_retained: Option<NotRetained>,
}

/// What is known of a body that was too large to keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotRetained {
    /// Bytes.
    pub size: u64,
    /// Of those bytes.
    pub sha256: Vec<u8>,
}

impl StoredResult {
    /// A result of bytes alone.
    pub fn new(body: impl Into<Bytes>) -> Self {
        Self { body: body.into(), ..Self::default() }
    }

    /// With this number.
    #[must_use]
    pub fn status(self, status: u32) -> Self {
        Self { status, ..self }
    }

    /// What is kept where the whole cannot be.
    fn noted(&self) -> Self {
        let of_body = || NotRetained { size: self.body.len() as u64, sha256: Sha256::digest(&self.body).to_vec() };
        let not_retained = self.not_retained.clone().unwrap_or_else(of_body);
        Self { status: self.status, not_retained: Some(not_retained), ..Self::default() }
    }

    pub(crate) fn wire(&self) -> v1::IdempotencyResult {
        let headers =
            self.headers.iter().map(|(name, value)| v1::IdempotencyHeader { name: name.clone(), value: value.clone() });
        let mut wire = v1::IdempotencyResult {
            status: self.status,
            headers: headers.collect(),
            ..v1::IdempotencyResult::default()
        };
        match &self.not_retained {
            Some(lost) => wire.not_retained = Some(lost.wire()),
            None if self.body.len() > BODY_BYTES_MAX => {
                let sha256 = Sha256::digest(&self.body).to_vec();
                wire.not_retained = Some(NotRetained { size: self.body.len() as u64, sha256 }.wire());
            }
            None => wire.body_bytes = self.body.clone(),
        }
        wire
    }
}

/// Takes a body in as it comes: kept while it is small enough, else only counted and digested.
#[derive(Clone, Debug, Default)]
pub struct BodySink {
    kept: Vec<u8>,
    size: u64,
    hash: Sha256,
}

impl BodySink {
    /// The next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.size += bytes.len() as u64;
        self.hash.update(bytes);
        if self.size > BODY_BYTES_MAX as u64 {
            self.kept = Vec::new();
        } else {
            self.kept.extend_from_slice(bytes);
        }
    }

    /// The whole, as far as it is kept.
    #[must_use]
    pub fn finish(self) -> StoredResult {
        let sha256 = self.hash.finalize().to_vec();
        let too_large = self.size > BODY_BYTES_MAX as u64;
        let not_retained = too_large.then_some(NotRetained { size: self.size, sha256 });
        StoredResult { not_retained, ..StoredResult::new(self.kept) }
    }
}

impl NotRetained {
    fn wire(&self) -> v1::IdempotencyBodyLost {
        v1::IdempotencyBodyLost { size: self.size, sha256: self.sha256.clone().into() }
    }
}

impl From<v1::IdempotencyResult> for StoredResult {
    fn from(wire: v1::IdempotencyResult) -> Self {
        let body = if wire.body.is_empty() { wire.body_bytes } else { wire.body.into() };
        let not_retained = wire.not_retained.map(|lost| NotRetained { size: lost.size, sha256: lost.sha256.to_vec() });
        let headers = wire.headers.into_iter().map(|header| (header.name, header.value)).collect();
        Self { status: wire.status, headers, body, not_retained }
    }
}

/// A point from which the next attempt can go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// 1 to 255 bytes.
    pub name: String,
    /// At most 16 KiB.
    pub data: Bytes,
}

impl From<v1::IdempotencyCheckpoint> for Checkpoint {
    fn from(wire: v1::IdempotencyCheckpoint) -> Self {
        let data = if wire.data.is_empty() { wire.data_bytes } else { wire.data.into() };
        Self { name: wire.name, data }
    }
}

/// What beginning a key came to.
#[derive(Debug)]
pub enum Begun {
    /// The caller runs it.
    Granted(Attempt),
    /// Another one runs it.
    InFlight(InFlight),
    /// It has run.
    Replay(Replay),
}

/// An attempt of somebody else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// Its token.
    pub attempt: u64,
    /// Its number; the first is 1.
    pub attempt_no: u32,
    /// For how long it has been running.
    pub running: Duration,
    /// What is left of its lease.
    pub lease_left: Duration,
    /// When it is worth asking again.
    pub retry_after: Duration,
}

impl fmt::Display for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "attempt {} has been running for {:?}", self.attempt_no, self.running)
    }
}

/// A result that was stored before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// The same bytes as the first time.
    pub result: StoredResult,
    /// It failed for good.
    pub failed: bool,
    /// The attempt that finished it.
    pub attempt: u64,
    /// Its number.
    pub attempt_no: u32,
    /// How long ago it finished.
    pub finished: Duration,
    /// How long ago the first attempt began.
    pub first_seen: Duration,
    /// How much longer it is kept.
    pub kept: Duration,
}

/// Runs things once per key. Made by [`Client::idempotent`]; clones share nothing but the connection.
///
/// ```no_run
/// # async fn charge(attempt: u64) -> Result<String, tenure_client::Error> { Ok(format!("charged under {attempt}")) }
/// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::RunError<tenure_client::Error>> {
/// use tenure_client::{Fingerprint, StoredResult};
///
/// let orders = client.idempotent("alice POST /orders").fingerprint(Fingerprint::of("3 apples"));
/// let ran = orders
///     .run("8f14e45f-ceea-467f-a8d2-1b1c3e2f5a60", |attempt| async move {
///         let receipt = charge(attempt.token()).await?;
///         attempt.checkpoint("charged", receipt.clone()).await?;
///         Ok(StoredResult::new(receipt).status(201))
///     })
///     .await?;
/// println!("{} {:?}", if ran.replayed { "again:" } else { "now:" }, ran.result.body);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Idempotent {
    client: Client,
    scope: String,
    fingerprint: Option<Fingerprint>,
    older: Vec<Fingerprint>,
    ttl: Duration,
    retention: Duration,
    wait: Duration,
    takeover: Takeover,
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// What the work gave, now or the first time.
    pub result: StoredResult,
    /// It was stored before; nothing ran now.
    pub replayed: bool,
    /// It failed for good, now or the first time.
    pub failed: bool,
}

/// How work says that it failed.
#[derive(Debug)]
pub enum Failure<E> {
    /// It may be tried again at once; nothing is stored.
    Retryable(E),
    /// It failed for good: this is stored and replayed.
    Final(StoredResult),
}

impl<E> From<E> for Failure<E> {
    fn from(error: E) -> Self {
        Self::Retryable(error)
    }
}

/// Why a run gave no result.
#[derive(Debug, thiserror::Error)]
pub enum RunError<E> {
    /// Somebody else runs it, and did not come to an end within the wait.
    #[error("{0}")]
    InFlight(InFlight),
    /// The service refused, or could not be asked.
    #[error(transparent)]
    Service(#[from] Error),
    /// The work failed in a way that may be tried again.
    #[error("{0}")]
    Work(E),
}

impl Client {
    /// Idempotency records of one scope: the principal and the route, for example. Equal keys of two scopes are two records.
    #[must_use]
    pub fn idempotent(&self, scope: impl Into<String>) -> Idempotent {
        Idempotent {
            client: self.clone(),
            scope: scope.into(),
            fingerprint: None,
            older: Vec::new(),
            ttl: TTL_DEFAULT,
            retention: Duration::ZERO,
            wait: Duration::ZERO,
            takeover: Takeover::Allow,
        }
    }

    fn idempotency(&self, channel: tonic::transport::Channel) -> IdempotencyClient<tonic::transport::Channel> {
        IdempotencyClient::new(channel).max_decoding_message_size(RECEIVE_BYTES)
    }
}

impl Idempotent {
    /// What the request looks like: another one under the same key is [`Code::Mismatch`].
    #[must_use]
    pub fn fingerprint(self, fingerprint: Fingerprint) -> Self {
        Self { fingerprint: Some(fingerprint), ..self }
    }

    /// The same request by older algorithms, at most three: whichever the record was made with is compared.
    #[must_use]
    pub fn older_fingerprints(self, older: impl IntoIterator<Item = Fingerprint>) -> Self {
        Self { older: older.into_iter().collect(), ..self }
    }

    /// The lease of an attempt between heartbeats: 1 s to 1 h, 60 s by default.
    #[must_use]
    pub fn attempt_ttl(self, ttl: Duration) -> Self {
        Self { ttl, ..self }
    }

    /// How long a result is kept, from its completion: a minute to 30 days, 24 h by default.
    #[must_use]
    pub fn retention(self, retention: Duration) -> Self {
        Self { retention, ..self }
    }

    /// How long to wait for whoever runs the key, at most an hour; by default not at all.
    #[must_use]
    pub fn wait(self, wait: Duration) -> Self {
        Self { wait, ..self }
    }

    /// Whether a dead attempt may be followed by this one, and this one by another.
    #[must_use]
    pub fn takeover(self, takeover: Takeover) -> Self {
        Self { takeover, ..self }
    }

    /// In this scope instead.
    #[must_use]
    pub fn scope(self, scope: impl Into<String>) -> Self {
        Self { scope: scope.into(), ..self }
    }

    /// Begins a key. A grant is kept alive from now on.
    ///
    /// # Errors
    /// [`Code::Mismatch`], [`Code::NeedsReconcile`], [`Code::ResultNotRetained`], [`Code::Quota`], [`Code::Invalid`].
    pub async fn begin(&self, key: &str) -> Result<Begun, Error> {
        let (answer, outcome) = oneshot::channel();
        let (records, key) = (self.clone(), key.to_owned());
        // A task of its own, so that dropping this future does not drop the duty to give a late grant free.
        tokio::spawn(async move {
            let id = if records.wait.is_zero() { records.client.request_id() } else { records.client.wait_id() };
            let id = match id {
                Ok(id) => id,
                Err(error) => return drop(answer.send(Err(error))),
            };
            let begun = records.begin_as(&id, &key).await;
            let unknown = matches!(&begun, Err(error) if error.outcome() == Outcome::Unknown);
            drop(answer.send(begun.map(|begun| Unclaimed::new(begun, |it| Box::pin(unwanted(it))))));
            if unknown {
                records.give_up(&id, &key).await;
            }
        });
        let ended = |_| Err(Error::Protocol("the task of the begin ended early".to_owned()));
        outcome.await.unwrap_or_else(ended).map(Unclaimed::claim)
    }

    /// Asks again under the id of a begin that was not answered, and gives free what that brings.
    async fn give_up(&self, id: &RequestId, key: &str) {
        for _ in 0..GIVE_FREE_TRIES {
            match self.begin_as(id, key).await {
                Ok(begun) => return unwanted(begun).await,
                Err(Error::Refused(_)) => return,
                Err(error) => tracing::debug!(%error, key, "whether the key was granted is not known yet"),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn begin_as(&self, id: &RequestId, key: &str) -> Result<Begun, Error> {
        let request = v1::IdempotencyBeginRequest {
            scope: self.scope.clone(),
            key: key.to_owned(),
            fingerprint: self.fingerprint.as_ref().map(Fingerprint::wire),
            older_fingerprints: self.older.iter().map(Fingerprint::wire).collect(),
            attempt_ttl_ms: millis(self.ttl),
            retention_ms: millis(self.retention),
            wait_ms: millis(self.wait),
            takeover: self.takeover.wire(),
            namespace: self.client.namespace(),
            request: None,
        };
        let plan = self.client.patient_plan("idempotency begin", self.wait);
        let reply: v1::IdempotencyBeginReply =
            self.client.change_as(id, plan, "/tenure.v1.Idempotency/Begin", &request).await?;
        match reply.result {
            Some(Begin::Granted(granted)) => Ok(Begun::Granted(self.granted(key, granted).await?)),
            Some(Begin::InFlight(flight)) => Ok(Begun::InFlight(InFlight {
                attempt: flight.attempt,
                attempt_no: flight.attempt_no,
                running: Duration::from_millis(flight.running_ms),
                lease_left: Duration::from_millis(flight.lease_left_ms),
                retry_after: Duration::from_millis(flight.retry_after_ms),
            })),
            Some(Begin::Replay(replay)) => Ok(Begun::Replay(Replay {
                result: replay.result.unwrap_or_default().into(),
                failed: replay.failed,
                attempt: replay.attempt,
                attempt_no: replay.attempt_no,
                finished: Duration::from_millis(replay.finished_ms),
                first_seen: Duration::from_millis(replay.first_seen_ms),
                kept: Duration::from_millis(replay.kept_ms),
            })),
            None => Err(Error::Protocol("a begin without an answer".to_owned())),
        }
    }

    async fn granted(&self, key: &str, granted: v1::IdempotencyGranted) -> Result<Attempt, Error> {
        let mut attempt = self.attempt(key, granted.attempt);
        let checkpoints = if granted.more_checkpoints {
            match self.get(key).await {
                Ok(record) => record.checkpoints,
                Err(error) => {
                    unwanted(Begun::Granted(attempt)).await;
                    return Err(error);
                }
            }
        } else {
            granted.checkpoints.into_iter().map(Checkpoint::from).collect()
        };
        let ttl = Duration::from_millis(granted.attempt_ttl_ms);
        let inner = Arc::get_mut(&mut attempt.inner).expect("nobody else has it yet");
        (inner.number, inner.checkpoints) = (granted.attempt_no, checkpoints);
        let (fenced, watching) = watch::channel(None);
        inner.fenced = watching;
        inner.keeper = Some(tokio::spawn(keep_alive(inner.target.clone(), ttl, fenced)));
        Ok(attempt)
    }

    /// An attempt that was granted elsewhere, by its token. It is not kept alive by this.
    #[must_use]
    pub fn attempt(&self, key: &str, token: u64) -> Attempt {
        let target =
            Target { client: self.client.clone(), scope: self.scope.clone(), key: key.to_owned(), attempt: token };
        let (_, fenced) = watch::channel(None);
        Attempt { inner: Arc::new(Inner { target, number: 0, checkpoints: Vec::new(), fenced, keeper: None }) }
    }

    /// Runs `work` unless it has run: begins the key, keeps the attempt alive, and ends it with what the work gave. An attempt that is fenced is
    /// cancelled. A retryable failure gives the key free at once. A result that the service does not take (see [`StoredResult`]) counts as run: it is
    /// given back here, and who asks later is told [`Code::ResultNotRetained`].
    ///
    /// # Errors
    /// As [`Idempotent::begin`], and [`RunError::InFlight`] where somebody else runs it for longer than [`Idempotent::wait`].
    pub async fn run<F, Fut, E>(&self, key: &str, work: F) -> Result<Ran, RunError<E>>
    where
        F: FnOnce(Attempt) -> Fut,
        Fut: Future<Output = Result<StoredResult, Failure<E>>>,
    {
        let attempt = match self.begin(key).await? {
            Begun::Granted(attempt) => attempt,
            Begun::InFlight(flight) => return Err(RunError::InFlight(flight)),
            Begun::Replay(replay) => {
                return Ok(Ran { result: replay.result, replayed: true, failed: replay.failed });
            }
        };
        let outcome = tokio::select! {
            problem = attempt.fenced() => return Err(Error::Refused(Box::new(problem)).into()),
            outcome = work(attempt.clone()) => outcome,
        };
        match outcome {
            Ok(result) => {
                attempt.finish(&result, false).await?;
                Ok(Ran { result, replayed: false, failed: false })
            }
            Err(Failure::Final(result)) => {
                attempt.finish(&result, true).await?;
                Ok(Ran { result, replayed: false, failed: true })
            }
            Err(Failure::Retryable(error)) => {
                // Whether or not this arrives, the lease ends the attempt; what the caller needs to know is the error of the work.
                if let Err(lost) = attempt.release().await {
                    tracing::debug!(%lost, key, "the attempt was not given free");
                }
                Err(RunError::Work(error))
            }
        }
    }

    /// Reads one record.
    ///
    /// # Errors
    /// [`Code::NotFound`].
    pub async fn get(&self, key: &str) -> Result<RecordInfo, Error> {
        let request = v1::IdempotencyGetRequest {
            key: key.to_owned(),
            scope: self.scope.clone(),
            stale: false,
            namespace: self.client.namespace(),
        };
        let reply = self.client.read(|channel| {
            let (mut client, request) = (self.client.idempotency(channel), request.clone());
            async move { client.get(request).await }
        });
        let record = reply.await?.record;
        Ok(record.ok_or_else(|| Error::Protocol("no record in the answer".to_owned()))?.into())
    }

    /// Records of this scope whose keys begin with `prefix`, optionally in one state only, without checkpoints and results; up to `max`.
    ///
    /// # Errors
    /// What any read can end with.
    pub async fn list(&self, prefix: &str, state: &str, max: usize) -> Result<Vec<RecordInfo>, Error> {
        self.list_pages(
            v1::IdempotencyListRequest {
                scope: self.scope.clone(),
                prefix: prefix.to_owned(),
                state: state.to_owned(),
                ..Default::default()
            },
            max,
        )
        .await
    }

    /// As [`Idempotent::list`], of every scope.
    ///
    /// # Errors
    /// What any read can end with.
    pub async fn list_all_scopes(&self, state: &str, max: usize) -> Result<Vec<RecordInfo>, Error> {
        let request = v1::IdempotencyListRequest { all_scopes: true, state: state.to_owned(), ..Default::default() };
        self.list_pages(request, max).await
    }

    async fn list_pages(&self, mut request: v1::IdempotencyListRequest, max: usize) -> Result<Vec<RecordInfo>, Error> {
        request.namespace = self.client.namespace();
        let mut records = Vec::new();
        while records.len() < max {
            request.limit = (max - records.len()).min(1_000) as u32;
            let page = self.client.read(|channel| {
                let (mut client, request) = (self.client.idempotency(channel), request.clone());
                async move { client.list(request).await }
            });
            let page = page.await?;
            records.extend(page.records.into_iter().map(RecordInfo::from));
            if page.next.is_empty() {
                break;
            }
            request.after = page.next;
        }
        Ok(records)
    }

    /// Decides about an attempt that died. `attempt` is the one that was looked at; 0 means whichever is the newest.
    ///
    /// # Errors
    /// [`Code::InFlight`] while it runs, [`Code::Conflict`] where it has a result, [`Code::Fenced`], [`Code::NotFound`].
    pub async fn reconcile(&self, key: &str, attempt: u64, decision: Decision) -> Result<(), Error> {
        use v1::idempotency_reconcile_request::Decision as Wire;
        let decision = match decision {
            Decision::Complete(result) => Wire::Complete(result.wire()),
            Decision::Release => Wire::Release(true),
            Decision::Discard => Wire::Discard(true),
        };
        let request = v1::IdempotencyReconcileRequest {
            scope: self.scope.clone(),
            key: key.to_owned(),
            attempt,
            decision: Some(decision),
            namespace: self.client.namespace(),
            request: None,
        };
        let plan = self.client.plan("idempotency reconcile", true);
        let _: v1::IdempotencyReconcileReply =
            self.client.change(plan, "/tenure.v1.Idempotency/Reconcile", &request).await?;
        Ok(())
    }
}

/// What becomes of an attempt that died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It did happen, with this result.
    Complete(StoredResult),
    /// It may be tried again, from its checkpoints.
    Release,
    /// As if there had been none.
    Discard,
}

/// A record as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordInfo {
    /// Whose key it is.
    pub scope: String,
    /// The key.
    pub key: String,
    /// `running`, `abandoned`, `needs-reconcile`, `released`, `completed` or `failed`.
    pub state: String,
    /// The token of the newest attempt.
    pub attempt: u64,
    /// Its number.
    pub attempt_no: u32,
    /// How long ago the first attempt began.
    pub first_seen: Duration,
    /// For how long the newest attempt has been running, or how long ago it finished.
    pub since: Duration,
    /// Until its lease is over or it goes; `None`: it stays until somebody decides.
    pub left: Option<Duration>,
    /// How many checkpoints it has.
    pub checkpoint_count: u32,
    /// The checkpoints, oldest first; empty in lists.
    pub checkpoints: Vec<Checkpoint>,
    /// The result; `None` in lists.
    pub result: Option<StoredResult>,
    /// What the request looked like.
    pub fingerprint: Option<Fingerprint>,
}

impl From<v1::IdempotencyRecord> for RecordInfo {
    fn from(wire: v1::IdempotencyRecord) -> Self {
        Self {
            scope: wire.scope,
            key: wire.key,
            state: wire.state,
            attempt: wire.attempt,
            attempt_no: wire.attempt_no,
            first_seen: Duration::from_millis(wire.first_seen_ms),
            since: Duration::from_millis(wire.since_ms),
            left: (wire.left_ms > 0).then(|| Duration::from_millis(wire.left_ms)),
            checkpoint_count: wire.checkpoint_count,
            checkpoints: wire.checkpoints.into_iter().map(Checkpoint::from).collect(),
            result: wire.result.map(StoredResult::from),
            fingerprint: wire
                .fingerprint
                .map(|print| Fingerprint { algorithm: print.algorithm, digest: print.digest.to_vec() }),
        }
    }
}

/// The right to run a key, until it is ended or replaced. Clones are the same attempt.
#[derive(Clone, Debug)]
pub struct Attempt {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    target: Target,
    number: u32,
    checkpoints: Vec<Checkpoint>,
    fenced: watch::Receiver<Option<Problem>>,
    keeper: Option<tokio::task::JoinHandle<()>>,
}

/// What a call about an attempt names.
#[derive(Clone, Debug)]
struct Target {
    client: Client,
    scope: String,
    key: String,
    attempt: u64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(keeper) = &self.keeper {
            keeper.abort();
        }
    }
}

impl Attempt {
    /// The token, larger for each later attempt of any key: give it to whatever checks it.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.inner.target.attempt
    }

    /// 1 for the first attempt.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.inner.number
    }

    /// Whose key it is.
    #[must_use]
    pub fn scope(&self) -> &str {
        &self.inner.target.scope
    }

    /// The key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.inner.target.key
    }

    /// What earlier attempts kept, oldest first.
    #[must_use]
    pub fn checkpoints(&self) -> &[Checkpoint] {
        &self.inner.checkpoints
    }

    /// What an earlier attempt kept under a name.
    #[must_use]
    pub fn reached(&self, name: &str) -> Option<&Checkpoint> {
        self.checkpoints().iter().find(|checkpoint| checkpoint.name == name)
    }

    /// The key of one step of this operation, for a call further down; see [`derive()`].
    #[must_use]
    pub fn derive(&self, step: &str) -> String {
        derive(self.key(), step)
    }

    /// Ends when a heartbeat was told that the attempt is over, with what replaced it. Stop then: another one may be at work.
    pub async fn fenced(&self) -> Problem {
        let mut fenced = self.inner.fenced.clone();
        loop {
            if let Some(problem) = fenced.borrow_and_update().clone() {
                return problem;
            }
            if fenced.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Keeps a point from which the next attempt can go on.
    ///
    /// # Errors
    /// [`Code::Fenced`], [`Code::Quota`] above 64 names, [`Code::Invalid`].
    pub async fn checkpoint(&self, name: impl Into<String>, data: impl Into<Bytes>) -> Result<(), Error> {
        let target = &self.inner.target;
        let checkpoint = v1::IdempotencyCheckpoint {
            name: name.into(),
            data_bytes: data.into(),
            ..v1::IdempotencyCheckpoint::default()
        };
        let request = v1::IdempotencyCheckpointRequest {
            scope: target.scope.clone(),
            key: target.key.clone(),
            attempt: target.attempt,
            checkpoint: Some(checkpoint),
            namespace: target.client.namespace(),
            request: None,
        };
        let plan = target.client.plan("idempotency checkpoint", true);
        let _: v1::IdempotencyCheckpointReply =
            target.client.change(plan, "/tenure.v1.Idempotency/Checkpoint", &request).await?;
        Ok(())
    }

    /// Prolongs the lease out of turn, or changes it or the takeover from now on. Heartbeats go on by themselves.
    ///
    /// # Errors
    /// [`Code::Fenced`], [`Code::Invalid`].
    pub async fn heartbeat(&self, ttl: Option<Duration>, takeover: Option<Takeover>) -> Result<Duration, Error> {
        self.inner.target.heartbeat(ttl, takeover).await
    }

    /// Ends the attempt with its result.
    ///
    /// # Errors
    /// [`Code::Fenced`]: another attempt has replaced this one, and its result counts. [`Error::Unknown`]: say it again.
    pub async fn complete(&self, result: &StoredResult) -> Result<(), Error> {
        let target = &self.inner.target;
        let request = v1::IdempotencyCompleteRequest {
            scope: target.scope.clone(),
            key: target.key.clone(),
            attempt: target.attempt,
            result: Some(result.wire()),
            namespace: target.client.namespace(),
            request: None,
        };
        let plan = target.client.plan("idempotency complete", true);
        let _: v1::IdempotencyCompleteReply =
            target.client.change(plan, "/tenure.v1.Idempotency/Complete", &request).await?;
        Ok(())
    }

    /// Ends the attempt as failed for good, with a result that is replayed.
    ///
    /// # Errors
    /// As [`Attempt::complete`].
    pub async fn fail(&self, result: &StoredResult) -> Result<(), Error> {
        self.end(v1::idempotency_fail_request::How::Final(result.wire())).await
    }

    /// Ends the attempt with its result. Where the service does not take that, it keeps a note of it, as of a body that is too large: what has run must
    /// not run again.
    pub(crate) async fn finish(&self, result: &StoredResult, failed: bool) -> Result<(), Error> {
        match self.finish_as(result, failed).await {
            Err(Error::Refused(problem)) if problem.code != Code::Fenced => {
                tracing::warn!(%problem, key = self.key(), "a result cannot be stored: it will not be replayed");
                self.finish_as(&result.noted(), failed).await
            }
            finished => finished,
        }
    }

    async fn finish_as(&self, result: &StoredResult, failed: bool) -> Result<(), Error> {
        if failed { self.fail(result).await } else { self.complete(result).await }
    }

    /// Ends the attempt so that the key may be tried again at once, from the checkpoints.
    ///
    /// # Errors
    /// As [`Attempt::complete`].
    pub async fn release(&self) -> Result<(), Error> {
        self.end(v1::idempotency_fail_request::How::Retryable(true)).await
    }

    async fn end(&self, how: v1::idempotency_fail_request::How) -> Result<(), Error> {
        let target = &self.inner.target;
        let request = v1::IdempotencyFailRequest {
            scope: target.scope.clone(),
            key: target.key.clone(),
            attempt: target.attempt,
            how: Some(how),
            namespace: target.client.namespace(),
            request: None,
        };
        let plan = target.client.plan("idempotency fail", true);
        let _: v1::IdempotencyFailReply = target.client.change(plan, "/tenure.v1.Idempotency/Fail", &request).await?;
        Ok(())
    }

    /// Leaves the attempt to its lease, shortened to a second: nobody knows what came of it. Then the next asker takes over, or somebody decides.
    ///
    /// # Errors
    /// As [`Attempt::heartbeat`].
    pub async fn abandon(&self) -> Result<(), Error> {
        if let Some(keeper) = &self.inner.keeper {
            keeper.abort();
        }
        self.inner.target.heartbeat(Some(TTL_MIN), None).await.map(drop)
    }
}

/// Gives the key of a grant free that nobody took: nothing ran. Until then its heartbeats go on.
async fn unwanted(begun: Begun) {
    let Begun::Granted(attempt) = begun else { return };
    for _ in 0..GIVE_FREE_TRIES {
        match attempt.release().await {
            Err(error) if error.retryable() => {
                tracing::debug!(%error, key = attempt.key(), "an unwanted attempt is not given free yet");
            }
            _ => return,
        }
        tokio::time::sleep(AGAIN).await;
    }
}

impl Target {
    async fn heartbeat(&self, ttl: Option<Duration>, takeover: Option<Takeover>) -> Result<Duration, Error> {
        let request = v1::IdempotencyHeartbeatRequest {
            scope: self.scope.clone(),
            key: self.key.clone(),
            attempt: self.attempt,
            attempt_ttl_ms: ttl.map_or(0, millis),
            takeover: takeover.map_or(v1::Takeover::Default.into(), Takeover::wire),
            namespace: self.client.namespace(),
            request: None,
        };
        let plan = self.client.plan("idempotency heartbeat", true);
        let reply: v1::IdempotencyHeartbeatReply =
            self.client.change(plan, "/tenure.v1.Idempotency/Heartbeat", &request).await?;
        Ok(Duration::from_millis(reply.attempt_ttl_ms))
    }
}

/// Beats three times per lease until it is told that the attempt is over. What could not be asked is asked again: a late heartbeat of an attempt that
/// nothing has replaced still counts.
async fn keep_alive(target: Target, mut ttl: Duration, fenced: watch::Sender<Option<Problem>>) {
    loop {
        tokio::time::sleep(ttl.max(TTL_MIN) / 3).await;
        match target.heartbeat(None, None).await {
            Ok(granted) => ttl = granted,
            Err(Error::Refused(problem)) if problem.code == Code::Fenced => {
                fenced.send_replace(Some(*problem));
                return;
            }
            Err(error) => tracing::debug!(%error, key = target.key, "a heartbeat was not answered"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Derived keys of old clients are found by new ones.
    #[test]
    fn derived_keys_never_change() {
        let key = derive("order-42", "charge");
        assert_eq!(key, "d1-4429daecd340e7a597009e537fb8a39948fad9c041157c25011bed2c3141946d");
        assert_ne!(derive("ab", "c"), derive("a", "bc"));
        assert!(key.len() <= 255 && key.bytes().all(|b| b.is_ascii_graphic()));
    }

    #[test]
    fn a_large_body_is_not_sent() {
        let large = StoredResult::new(vec![7; BODY_BYTES_MAX + 1]).status(200).wire();
        assert!(large.body_bytes.is_empty());
        assert_eq!(large.not_retained.map(|lost| lost.size), Some(BODY_BYTES_MAX as u64 + 1));
        let mut sink = BodySink::default();
        sink.push(&[7; 1]);
        sink.push(&[7; BODY_BYTES_MAX]);
        let taken = sink.finish();
        assert_eq!(taken.wire().not_retained, StoredResult::new(vec![7; BODY_BYTES_MAX + 1]).wire().not_retained);
        let kept = StoredResult::new(vec![7; BODY_BYTES_MAX]);
        assert_eq!(StoredResult::from(kept.wire()), kept);
    }
}
