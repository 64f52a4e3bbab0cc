//! Idempotency records: one key, one execution, and its result for whoever asks again.
//!
//! Promises. I1: of all who begin a key at most one is running it, named by an attempt token, which is the revision of the commit that granted
//! it; the others are told so, and losing is no error. I2: a result that was completed, or failed for good, is replayed as the same bytes until the
//! retention ends, counted in log time from the completion. I3: only the newest attempt may heartbeat, checkpoint, complete or fail; its lease being over
//! does not end it, a newer attempt or a decision does, and then it is FENCED with what replaced it. I4: an attempt that forbids takeover is
//! never followed by another one before somebody decides. I5: checkpoints and the fingerprint stay over attempts. I6: who waits is
//! answered in the commit that completes.
//! Not promised. That an attempt ran once in the world outside: one whose lease is over may still be at work beside its successor, so effects
//! are guarded by the attempt token, a marker, or a transaction that completes and writes in one commit.
//! Relies on. Log time never goes back. Objects are told of their deadlines at some entry after these (O2); until then every question here
//! counts what is over as over.

use crate::apply::{Commit, Machine, Place, invalid};
use crate::codec::{self, DecodeError, Reader, Write};
use crate::coded::{Coded, coded_enum, coded_struct, encoded};
use crate::command::Limit;
use crate::native::{NativeOp, Refusal, RefusalCode};
use crate::objects::{Lived, ObjectKey};
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::{Ask, Waiter, WaiterNumber};
use std::sync::Arc;

/// The bounds of what a record takes; the doors judge by the same numbers.
pub mod bounds {
    use std::ops::RangeInclusive;

    pub const KEY_BYTES: usize = 255;
    pub const SCOPE_BYTES: usize = 1 << 10;
    /// Of a result that is kept. What is larger leaves a note of itself.
    pub const BODY_BYTES: usize = 256 << 10;
    pub const HEADERS: usize = 64;
    pub const HEADER_BYTES: usize = 16 << 10;
    pub const CHECKPOINTS: usize = 64;
    pub const CHECKPOINT_BYTES: usize = 16 << 10;
    pub const CHECKPOINT_NAME_BYTES: usize = 255;
    pub const FINGERPRINTS: usize = 4;
    pub const ALGORITHM_BYTES: usize = 64;
    pub const DIGEST_BYTES: usize = 64;
    pub const LEASE_MS: RangeInclusive<u64> = 1_000..=60 * 60 * 1_000;
    pub const RETENTION_MS: RangeInclusive<u64> = 60 * 1_000..=30 * 24 * 60 * 60 * 1_000;
    /// Who waits longer has mostly gone: the grant would be for nobody.
    pub const WAIT_MS: u64 = 60 * 60 * 1_000;
}

coded_struct! {
    /// What a request looked like. Those of different algorithms cannot be compared.
    #[derive(Eq)]
    pub struct Fingerprint as "a fingerprint" {
        pub algorithm: Box<str>,
        pub digest: Box<[u8]>,
    }
}

coded_struct! {
    /// What came of an attempt.
    pub struct StoredResult as "a stored result" {
        /// The caller's own number: an HTTP status, an exit code.
        pub status: u32,
        pub headers: Vec<(Box<str>, Box<str>)>,
        pub body: ResultBody,
    }
}

coded_enum! {
    /// The bytes of a result, or what is known of bytes that were too many.
    pub enum ResultBody as "the body of a result" {
        Kept(Box<[u8]>) = 1,
        NotRetained(NotRetained) = 2,
    }
}

coded_struct! {
    #[derive(Eq)]
    pub struct NotRetained as "a body that is not kept" {
        pub size: u64,
        pub sha256: [u8; 32],
    }
}

/// A result as it is kept: one allocation, shared by everything that names it.
#[derive(Clone, PartialEq)]
pub struct PackedResult(Arc<[u8]>);

impl std::fmt::Debug for PackedResult {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let result = self.unpack();
        write!(f, "{} ", result.status)?;
        match result.body {
            ResultBody::Kept(body) if body.len() <= 64 => write!(f, "`{}`", body.escape_ascii()),
            ResultBody::Kept(body) => write!(f, "{} bytes", body.len()),
            ResultBody::NotRetained(body) => write!(f, "{} bytes not kept", body.size),
        }
    }
}

impl PackedResult {
    pub fn new(result: &StoredResult) -> Self {
        Self(encoded(result).into())
    }

    pub fn unpack(&self) -> StoredResult {
        Self::open(&self.0).expect("it was packed here or checked when it was read")
    }

    fn open(bytes: &[u8]) -> Result<StoredResult, DecodeError> {
        const WHAT: &str = "a stored result";
        let mut r = Reader::new(bytes);
        let result = StoredResult::read(&mut r, WHAT)?;
        if r.is_empty() { Ok(result) } else { Err(DecodeError::Malformed { what: WHAT }) }
    }
}

impl Coded for PackedResult {
    fn write(&self, b: &mut Vec<u8>) {
        b.bytes(&self.0);
    }

    fn read(r: &mut Reader<'_>, what: &'static str) -> Result<Self, DecodeError> {
        let bytes = r.bytes(what)?;
        Self::open(bytes)?;
        Ok(Self(bytes.into()))
    }
}

coded_struct! {
    /// A point from which the next attempt can go on.
    pub struct AttemptPoint as "a checkpoint" {
        pub name: Box<str>,
        pub data: Arc<[u8]>,
    }
}

coded_struct! {
    /// One key of one scope. It is made by the first attempt and goes when its retention is over.
    pub struct IdempotencyRecord as "an idempotency record" {
        /// The newest attempt.
        pub attempt: Revision,
        /// Its number; the first is 1.
        pub number: u32,
        /// When the first attempt began.
        pub first: LogTime,
        pub retention_ms: u64,
        /// A packed [`Fingerprint`], or empty.
        fingerprint: Box<[u8]>,
        pub state: RecordState,
    }
}

coded_enum! {
    pub enum RecordState as "the state of a record" {
        Open(Box<OpenRecord>) = 1,
        Done(DoneRecord) = 2,
    }
}

coded_struct! {
    /// Without a result.
    pub struct OpenRecord as "an open record" {
        pub phase: AttemptPhase,
        /// When this attempt began.
        pub began: LogTime,
        pub lease_ms: u64,
        /// Running: when the lease is over. Abandoned or released: when it is forgotten.
        until: LogTime,
        /// Whether another attempt may follow once the lease is over.
        pub takeover: bool,
        /// Oldest first; a name stands once.
        pub checkpoints: Vec<AttemptPoint>,
    }
}

coded_enum! {
    #[derive(Copy, Eq)]
    pub enum AttemptPhase as "a phase" {
        Running = 1,
        /// The lease is over; whoever begins takes over.
        Abandoned = 2,
        /// The lease is over and takeover is forbidden: somebody must decide.
        NeedsReconcile = 3,
        /// It failed in a way that may be tried again.
        Released = 4,
    }
}

coded_struct! {
    /// With its result.
    pub struct DoneRecord as "a finished record" {
        pub at: LogTime,
        /// It failed for good.
        pub failed: bool,
        pub result: PackedResult,
    }
}

/// What a record is at a moment, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdempotencyState {
    Running,
    Abandoned,
    NeedsReconcile,
    Released,
    Completed,
    Failed,
}

impl IdempotencyState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Abandoned => "abandoned",
            Self::NeedsReconcile => "needs-reconcile",
            Self::Released => "released",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }
}

impl IdempotencyRecord {
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        Fingerprint::read(&mut Reader::new(&self.fingerprint), "a fingerprint").ok()
    }

    /// What it is now, whether or not the turn of its deadline has come. `None`: it is over, as if it were not there.
    pub fn state_at(&self, now: LogTime) -> Option<IdempotencyState> {
        let is_over = self.deadline().is_some_and(|deadline| deadline <= now);
        match &self.state {
            RecordState::Done(_) if is_over => None,
            RecordState::Done(done) if done.failed => Some(IdempotencyState::Failed),
            RecordState::Done(_) => Some(IdempotencyState::Completed),
            RecordState::Open(open) => match open.phase {
                AttemptPhase::Running if is_over && open.takeover => Some(IdempotencyState::Abandoned),
                AttemptPhase::Running if is_over => Some(IdempotencyState::NeedsReconcile),
                AttemptPhase::Running => Some(IdempotencyState::Running),
                AttemptPhase::NeedsReconcile => Some(IdempotencyState::NeedsReconcile),
                AttemptPhase::Abandoned | AttemptPhase::Released if is_over => None,
                AttemptPhase::Abandoned => Some(IdempotencyState::Abandoned),
                AttemptPhase::Released => Some(IdempotencyState::Released),
            },
        }
    }

    pub fn checkpoints(&self) -> &[AttemptPoint] {
        match &self.state {
            RecordState::Open(open) => &open.checkpoints,
            RecordState::Done(_) => &[],
        }
    }

    /// Until its lease is over, or it is forgotten; zero for what stays until somebody decides.
    pub fn left_ms(&self, now: LogTime) -> u64 {
        self.deadline().map_or(0, |deadline| deadline.0.saturating_sub(now.0))
    }

    fn phase(&self) -> Option<AttemptPhase> {
        match &self.state {
            RecordState::Open(open) => Some(open.phase),
            RecordState::Done(_) => None,
        }
    }

    /// Two requests are told apart by the fingerprints of the stored algorithm; where there is none to compare, they pass for the same.
    fn differs(&self, presented: &[Fingerprint]) -> Option<Fingerprint> {
        let stored = self.fingerprint()?;
        let same_algorithm = presented.iter().find(|f| f.algorithm == stored.algorithm)?;
        (same_algorithm.digest != stored.digest).then_some(stored)
    }

    fn in_flight(&self, now: LogTime) -> AttemptInFlight {
        let (began, left) = match &self.state {
            RecordState::Open(open) => (open.began, open.until.0.saturating_sub(now.0)),
            RecordState::Done(done) => (done.at, 0),
        };
        let running_ms = now.0.saturating_sub(began.0);
        // As long again as it has run, but not past the end of the lease.
        let retry_after_ms = running_ms.clamp(RETRY_MS.0, RETRY_MS.1).min(left.max(RETRY_MS.0));
        AttemptInFlight { attempt: self.attempt, number: self.number, running_ms, lease_left_ms: left, retry_after_ms }
    }
}

/// The shortest and the longest advice on when to ask again.
const RETRY_MS: (u64, u64) = (100, 5_000);
/// A record with its allocations, beside what it holds.
const OPEN_BYTES: usize = 128;
const DONE_BYTES: usize = 48;
const CHECKPOINT_SLOT: usize = 72;

impl Lived for IdempotencyRecord {
    /// Results are large, and who waits for one is answered anyway.
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        let held = match &self.state {
            RecordState::Open(open) => {
                let points = open.checkpoints.iter().map(|c| CHECKPOINT_SLOT + c.name.len() + c.data.len());
                OPEN_BYTES + points.sum::<usize>()
            }
            RecordState::Done(done) => DONE_BYTES + done.result.0.len(),
        };
        (held + self.fingerprint.len()) as u64
    }

    fn deadline(&self) -> Option<LogTime> {
        match &self.state {
            RecordState::Open(open) if open.phase == AttemptPhase::NeedsReconcile => None,
            RecordState::Open(open) => Some(open.until),
            RecordState::Done(done) => Some(done.at.plus(self.retention_ms)),
        }
    }

    fn digest(&self) -> u64 {
        match &self.state {
            RecordState::Open(open) => {
                // The data of checkpoints came with the entries that the checksum has; how much there is stands for it.
                let mut b = Vec::with_capacity(64);
                (self.attempt, open.until).write(&mut b);
                b.push(open.phase as u8);
                b.flag(open.takeover);
                b.varint(open.checkpoints.iter().map(|c| 1 + c.data.len() as u64).sum());
                codec::fold(self.retention_ms, &b)
            }
            RecordState::Done(done) => {
                let seed = self.attempt.0 ^ done.at.0.rotate_left(32) ^ self.retention_ms.rotate_left(17);
                codec::fold(seed ^ u64::from(done.failed), &done.result.0)
            }
        }
    }

    fn due(commit: &mut Commit<'_>, key: &ObjectKey) {
        // A commit of its own gives no token twice, so nothing here can be refused.
        if commit.lapse_attempt(key).is_err() {
            commit.remove_object(key);
        }
    }
}

coded_struct! {
    /// Which record, in the namespace of the transaction.
    #[derive(Eq)]
    pub struct RecordName as "the name of a record" {
        pub scope: Box<str>,
        pub key: Box<str>,
    }
}

impl RecordName {
    pub fn new(scope: &str, key: &str) -> Self {
        Self { scope: scope.into(), key: key.into() }
    }

    /// The scope, a zero byte, the key: neither holds one, so the records of a scope stand together.
    pub fn object_name(&self) -> Vec<u8> {
        [self.scope.as_bytes(), &[0], self.key.as_bytes()].concat()
    }

    pub fn of_object(name: &[u8]) -> Option<Self> {
        let name = std::str::from_utf8(name).ok()?;
        let (scope, key) = name.split_once('\0')?;
        Some(Self::new(scope, key))
    }

    fn check(&self) -> Result<(), BadField> {
        let printable = |b: u8| (b' '..=b'~').contains(&b);
        if self.key.is_empty() || self.key.len() > bounds::KEY_BYTES || !self.key.bytes().all(printable) {
            return Err(BadField("key", "a key has 1 to 255 printable bytes of ASCII"));
        }
        if self.scope.len() > bounds::SCOPE_BYTES || self.scope.chars().any(char::is_control) {
            return Err(BadField("scope", "a scope has at most 1024 bytes and no control characters"));
        }
        Ok(())
    }
}

coded_struct! {
    pub struct AttemptBegin as "a begin" {
        pub name: RecordName,
        /// The first one is kept; the others say the same by other algorithms.
        pub fingerprints: Vec<Fingerprint>,
        pub lease_ms: u64,
        pub retention_ms: u64,
        /// Zero: who is not granted is told at once.
        pub wait_ms: u64,
        /// Whether a dead attempt may be followed, by this one and after this one.
        pub takeover: bool,
    }
}

coded_struct! {
    pub struct AttemptHeartbeat as "a heartbeat" {
        pub name: RecordName,
        pub attempt: Revision,
        /// Zero: as before.
        pub lease_ms: u64,
        pub takeover: Option<bool>,
    }
}

coded_struct! {
    pub struct AttemptCheckpoint as "a checkpoint to keep" {
        pub name: RecordName,
        pub attempt: Revision,
        pub checkpoint: AttemptPoint,
    }
}

coded_struct! {
    pub struct AttemptComplete as "a completion" {
        pub name: RecordName,
        pub attempt: Revision,
        pub result: PackedResult,
    }
}

coded_struct! {
    pub struct AttemptFail as "a failure" {
        pub name: RecordName,
        pub attempt: Revision,
        /// For good, with this to replay; `None`: it may be tried again.
        pub last: Option<PackedResult>,
    }
}

coded_struct! {
    pub struct AttemptReconcile as "a decision on an attempt" {
        pub name: RecordName,
        /// The attempt that was looked at; zero: whichever is the newest.
        pub attempt: Revision,
        pub decision: AttemptDecision,
    }
}

coded_enum! {
    pub enum AttemptDecision as "a decision" {
        /// It did happen, with this result.
        Complete(PackedResult) = 1,
        /// It may be tried again, from its checkpoints.
        Release = 2,
        /// As if there had been none.
        Discard = 3,
    }
}

coded_enum! {
    /// What can be done with records.
    pub enum IdempotencyOp as "an operation on an idempotency record" {
        Begin(AttemptBegin) = 1,
        Heartbeat(AttemptHeartbeat) = 2,
        Checkpoint(AttemptCheckpoint) = 3,
        Complete(AttemptComplete) = 4,
        Fail(AttemptFail) = 5,
        Reconcile(AttemptReconcile) = 6,
    }
}

coded_enum! {
    /// What it answers.
    pub enum IdempotencyReply as "an answer about an idempotency record" {
        Granted(AttemptGranted) = 1,
        InFlight(AttemptInFlight) = 2,
        Replay(AttemptReplay) = 3,
        /// The lease goes on for so many milliseconds.
        Beating(u64) = 4,
        /// So many checkpoints are kept.
        Checkpointed(u32) = 5,
        /// The attempt is over; its result is kept for so many milliseconds.
        Finished(u64) = 6,
        /// The attempt is over without a result.
        Released = 7,
        /// There is no record any more.
        Discarded = 8,
    }
}

coded_struct! {
    /// The asker runs it.
    pub struct AttemptGranted as "a granted attempt" {
        pub attempt: Revision,
        pub number: u32,
        pub lease_ms: u64,
        /// What earlier attempts left, if it is little.
        pub checkpoints: Vec<AttemptPoint>,
        /// It is more than that: the record must be read.
        pub more: bool,
    }
}

coded_struct! {
    /// Another one runs it.
    #[derive(Eq)]
    pub struct AttemptInFlight as "an attempt in flight" {
        pub attempt: Revision,
        pub number: u32,
        pub running_ms: u64,
        pub lease_left_ms: u64,
        pub retry_after_ms: u64,
    }
}

coded_struct! {
    /// It has run.
    pub struct AttemptReplay as "a replay" {
        /// The attempt that finished it.
        pub attempt: Revision,
        pub number: u32,
        pub failed: bool,
        pub result: PackedResult,
        /// How long ago it finished, and how long ago the first attempt began.
        pub finished_ms: u64,
        pub first_seen_ms: u64,
        pub kept_ms: u64,
    }
}

/// What is wrong with a request, whatever the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadField(pub &'static str, pub &'static str);

/// Encoded checkpoints that a grant carries: with them its answer can still be remembered whole.
const GRANTED_CHECKPOINTS_BYTES: usize = 8 << 10;
/// The part of a result that is taken however full the memory is: to lose it would be to run it again.
const RESULT_ALWAYS_TAKEN: u64 = 16 << 10;
/// A new record beside its name.
const RECORD_GROWTH: usize = 512;

impl IdempotencyOp {
    pub fn name(&self) -> &RecordName {
        match self {
            Self::Begin(it) => &it.name,
            Self::Heartbeat(it) => &it.name,
            Self::Checkpoint(it) => &it.name,
            Self::Complete(it) => &it.name,
            Self::Fail(it) => &it.name,
            Self::Reconcile(it) => &it.name,
        }
    }

    /// Everything about it that can be judged without the state.
    pub fn check(&self) -> Result<(), BadField> {
        self.name().check()?;
        match self {
            Self::Begin(it) => it.check(),
            Self::Heartbeat(it) if it.lease_ms != 0 => check_lease(it.lease_ms),
            Self::Heartbeat(_) => Ok(()),
            Self::Checkpoint(it) => it.checkpoint.check(),
            Self::Complete(it) => it.result.check(),
            Self::Fail(it) => it.last.as_ref().map_or(Ok(()), PackedResult::check),
            Self::Reconcile(it) => match &it.decision {
                AttemptDecision::Complete(result) => result.check(),
                AttemptDecision::Release | AttemptDecision::Discard => Ok(()),
            },
        }
    }

    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        let of_result = |result: &PackedResult| (result.0.len() as u64).saturating_sub(RESULT_ALWAYS_TAKEN);
        match self {
            Self::Begin(it) => {
                let names = 2 * (it.name.scope.len() + it.name.key.len());
                let prints = it.fingerprints.iter().map(|f| f.algorithm.len() + f.digest.len());
                (RECORD_GROWTH + names + prints.sum::<usize>()) as u64
            }
            Self::Checkpoint(it) => (CHECKPOINT_SLOT + it.checkpoint.name.len() + it.checkpoint.data.len()) as u64,
            Self::Complete(it) => of_result(&it.result),
            Self::Fail(it) => it.last.as_ref().map_or(0, of_result),
            Self::Heartbeat(_) | Self::Reconcile(_) => 0,
        }
    }

    /// What a waiter is told whose time is over; `None`: that it waited in vain.
    pub(crate) fn wait_over(&self, machine: &Machine, waiter: &Waiter) -> Option<Result<OpReply, Rejection>> {
        let record = machine.objects.get::<IdempotencyRecord>(waiter.only()?)?;
        Some(Ok(IdempotencyReply::InFlight(record.in_flight(machine.stamp)).into()))
    }
}

impl AttemptBegin {
    fn check(&self) -> Result<(), BadField> {
        check_lease(self.lease_ms)?;
        if !bounds::RETENTION_MS.contains(&self.retention_ms) {
            return Err(BadField("retention_ms", "a result is kept for a minute to 30 days"));
        }
        if self.wait_ms > bounds::WAIT_MS {
            return Err(BadField("wait_ms", "a wait lasts at most an hour"));
        }
        if self.fingerprints.len() > bounds::FINGERPRINTS {
            return Err(BadField("fingerprints", "a request has at most 4 fingerprints"));
        }
        self.fingerprints.iter().try_for_each(Fingerprint::check)
    }
}

fn check_lease(lease_ms: u64) -> Result<(), BadField> {
    if bounds::LEASE_MS.contains(&lease_ms) {
        return Ok(());
    }
    Err(BadField("attempt_ttl_ms", "the lease of an attempt lasts a second to an hour"))
}

impl Fingerprint {
    fn check(&self) -> Result<(), BadField> {
        if self.algorithm.is_empty() || self.algorithm.len() > bounds::ALGORITHM_BYTES {
            return Err(BadField(
                "fingerprint.algorithm",
                "the algorithm of a fingerprint has a name of 1 to 64 bytes",
            ));
        }
        if self.digest.is_empty() || self.digest.len() > bounds::DIGEST_BYTES {
            return Err(BadField("fingerprint.digest", "a fingerprint has 1 to 64 bytes"));
        }
        Ok(())
    }
}

impl AttemptPoint {
    fn check(&self) -> Result<(), BadField> {
        if self.name.is_empty() || self.name.len() > bounds::CHECKPOINT_NAME_BYTES {
            return Err(BadField("checkpoint", "a checkpoint has a name of 1 to 255 bytes"));
        }
        if self.data.len() > bounds::CHECKPOINT_BYTES {
            return Err(BadField("data", "a checkpoint has at most 16 KiB"));
        }
        Ok(())
    }
}

impl PackedResult {
    fn check(&self) -> Result<(), BadField> {
        // Most are too small to be wrong.
        if self.0.len() <= bounds::HEADERS {
            return Ok(());
        }
        let result = self.unpack();
        let headers: usize = result.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
        if result.headers.len() > bounds::HEADERS || headers > bounds::HEADER_BYTES {
            return Err(BadField("result.headers", "a result has at most 64 headers of 16 KiB together"));
        }
        match result.body {
            ResultBody::Kept(body) if body.len() > bounds::BODY_BYTES => {
                Err(BadField("result.body", "a result that is kept has at most 256 KiB"))
            }
            _ => Ok(()),
        }
    }
}

impl Commit<'_> {
    pub(crate) fn idempotency_op(&mut self, op: &IdempotencyOp) -> Result<OpReply, Rejection> {
        op.check().map_err(|BadField(field, why)| invalid(format!("{field}: {why}")))?;
        let key = self.object_key::<IdempotencyRecord>(&op.name().object_name());
        self.lapse_attempt_if_due(&key)?;
        let reply = match op {
            IdempotencyOp::Begin(begin) => return self.begin_attempt(&key, begin),
            IdempotencyOp::Heartbeat(it) => self.beat_attempt(&key, it)?,
            IdempotencyOp::Checkpoint(it) => self.keep_checkpoint(&key, it)?,
            IdempotencyOp::Complete(it) => self.finish_attempt(&key, &it.name, it.attempt, false, &it.result)?,
            IdempotencyOp::Fail(AttemptFail { name, attempt, last: Some(result) }) => {
                self.finish_attempt(&key, name, *attempt, true, result)?
            }
            IdempotencyOp::Fail(it) => self.give_up_attempt(&key, it)?,
            IdempotencyOp::Reconcile(it) => self.reconcile_attempt(&key, it)?,
        };
        Ok(reply.into())
    }

    fn begin_attempt(&mut self, key: &ObjectKey, begin: &AttemptBegin) -> Result<OpReply, Rejection> {
        let now = self.m.stamp;
        let Some(record) = self.object::<IdempotencyRecord>(key) else {
            return Ok(IdempotencyReply::Granted(self.grant_attempt(key, begin)?).into());
        };
        if let Some(stored) = record.differs(&begin.fingerprints) {
            return Err(mismatch(&begin.name, &stored));
        }
        match (&record.state, record.phase()) {
            (RecordState::Done(done), _) => replay(&begin.name, record, done, now),
            (_, Some(AttemptPhase::Running)) => self.wait_for_attempt(key, begin),
            (_, Some(AttemptPhase::Released)) => Ok(IdempotencyReply::Granted(self.grant_attempt(key, begin)?).into()),
            (_, Some(AttemptPhase::Abandoned)) if begin.takeover => {
                Ok(IdempotencyReply::Granted(self.grant_attempt(key, begin)?).into())
            }
            _ => Err(needs_reconcile(&begin.name, record, now)),
        }
    }

    fn wait_for_attempt(&mut self, key: &ObjectKey, begin: &AttemptBegin) -> Result<OpReply, Rejection> {
        if begin.wait_ms == 0 {
            let now = self.m.stamp;
            let in_flight = self.object::<IdempotencyRecord>(key).map(|record| record.in_flight(now));
            let in_flight = in_flight.ok_or_else(|| invalid("nobody runs it"))?;
            return Ok(IdempotencyReply::InFlight(in_flight).into());
        }
        self.check_alone()?;
        let limit = self.m.limit(Limit::LockWaiters);
        if self.m.waits.len(key) >= limit {
            let why = format!("{limit} callers wait for `{}`", begin.name.key);
            return Err(Refusal::new(RefusalCode::Quota, why).fact("limit", limit).into());
        }
        self.wait(Place {
            on: vec![key.clone()],
            rank: 0,
            session: SessionId(0),
            owner: Box::default(),
            deadline: Some(self.m.stamp.plus(begin.wait_ms)),
            ask: Ask::Native(Box::new(NativeOp::Idempotency(IdempotencyOp::Begin(begin.clone())))),
        });
        Ok(OpReply::Done)
    }

    /// Starts the next attempt: the first, or one after another that is over.
    fn grant_attempt(&mut self, key: &ObjectKey, begin: &AttemptBegin) -> Result<AttemptGranted, Rejection> {
        let attempt = self.number_once(key)?;
        let now = self.m.stamp;
        let before = self.object::<IdempotencyRecord>(key);
        let stored = before.map(|record| record.fingerprint.clone()).filter(|stored| !stored.is_empty());
        let fingerprint = stored.or_else(|| Some(encoded(begin.fingerprints.first()?).into())).unwrap_or_default();
        let checkpoints = before.map(|record| record.checkpoints().to_vec()).unwrap_or_default();
        let granted = granted(attempt, before.map_or(1, |r| r.number.saturating_add(1)), begin.lease_ms, &checkpoints);
        let record = IdempotencyRecord {
            attempt,
            number: granted.number,
            first: before.map_or(now, |record| record.first),
            retention_ms: begin.retention_ms,
            fingerprint,
            state: RecordState::Open(Box::new(OpenRecord {
                phase: AttemptPhase::Running,
                began: now,
                lease_ms: begin.lease_ms,
                until: now.plus(begin.lease_ms),
                takeover: begin.takeover,
                checkpoints,
            })),
        };
        self.put_object(key, record);
        Ok(granted)
    }

    /// The record and its open part, if this is its newest attempt and nothing has ended that.
    fn attempt_of(
        &self,
        key: &ObjectKey,
        name: &RecordName,
        attempt: Revision,
    ) -> Result<(IdempotencyRecord, OpenRecord), Rejection> {
        let record = self.object::<IdempotencyRecord>(key);
        match record.map(|record| (record, &record.state)) {
            Some((record, RecordState::Open(open)))
                if record.attempt == attempt && open.phase != AttemptPhase::Released =>
            {
                Ok((record.clone(), (**open).clone()))
            }
            _ => Err(fenced(name, attempt, record, self.m.stamp)),
        }
    }

    fn beat_attempt(&mut self, key: &ObjectKey, beat: &AttemptHeartbeat) -> Result<IdempotencyReply, Rejection> {
        let (record, mut open) = self.attempt_of(key, &beat.name, beat.attempt)?;
        // One whose lease was over runs again: nothing has replaced it, and it has just shown that it is alive.
        open.phase = AttemptPhase::Running;
        open.lease_ms = if beat.lease_ms == 0 { open.lease_ms } else { beat.lease_ms };
        open.takeover = beat.takeover.unwrap_or(open.takeover);
        open.until = self.m.stamp.plus(open.lease_ms);
        let lease_ms = open.lease_ms;
        self.put_object(key, IdempotencyRecord { state: RecordState::Open(Box::new(open)), ..record });
        Ok(IdempotencyReply::Beating(lease_ms))
    }

    fn keep_checkpoint(&mut self, key: &ObjectKey, set: &AttemptCheckpoint) -> Result<IdempotencyReply, Rejection> {
        let (record, mut open) = self.attempt_of(key, &set.name, set.attempt)?;
        open.checkpoints.retain(|kept| kept.name != set.checkpoint.name);
        if open.checkpoints.len() >= bounds::CHECKPOINTS {
            let why = format!("`{}` has {} checkpoints", set.name.key, bounds::CHECKPOINTS);
            return Err(Refusal::new(RefusalCode::Quota, why).fact("limit", bounds::CHECKPOINTS).into());
        }
        open.checkpoints.push(set.checkpoint.clone());
        let kept = open.checkpoints.len() as u32;
        self.put_object(key, IdempotencyRecord { state: RecordState::Open(Box::new(open)), ..record });
        Ok(IdempotencyReply::Checkpointed(kept))
    }

    fn finish_attempt(
        &mut self,
        key: &ObjectKey,
        name: &RecordName,
        attempt: Revision,
        failed: bool,
        result: &PackedResult,
    ) -> Result<IdempotencyReply, Rejection> {
        let now = self.m.stamp;
        // Said again, it is answered again.
        if let Some(record) = self.object::<IdempotencyRecord>(key)
            && let RecordState::Done(done) = &record.state
            && (record.attempt, done.failed, &done.result) == (attempt, failed, result)
        {
            return Ok(IdempotencyReply::Finished(record.left_ms(now)));
        }
        let (record, _) = self.attempt_of(key, name, attempt)?;
        Ok(self.store_attempt_result(key, record, failed, result))
    }

    fn store_attempt_result(
        &mut self,
        key: &ObjectKey,
        record: IdempotencyRecord,
        failed: bool,
        result: &PackedResult,
    ) -> IdempotencyReply {
        let now = self.m.stamp;
        let done = DoneRecord { at: now, failed, result: result.clone() };
        let record = IdempotencyRecord { state: RecordState::Done(done.clone()), ..record };
        for (number, begin) in self.waiting_begins(key) {
            self.end_wait(number, replay(&begin.name, &record, &done, now));
        }
        let kept_ms = record.retention_ms;
        self.put_object(key, record);
        IdempotencyReply::Finished(kept_ms)
    }

    fn give_up_attempt(&mut self, key: &ObjectKey, fail: &AttemptFail) -> Result<IdempotencyReply, Rejection> {
        if let Some(record) = self.object::<IdempotencyRecord>(key)
            && (record.attempt, record.phase()) == (fail.attempt, Some(AttemptPhase::Released))
        {
            return Ok(IdempotencyReply::Released);
        }
        let (record, open) = self.attempt_of(key, &fail.name, fail.attempt)?;
        self.release_attempt(key, record, open)?;
        Ok(IdempotencyReply::Released)
    }

    /// Ends an attempt without a result; whoever waits first starts the next one.
    fn release_attempt(
        &mut self,
        key: &ObjectKey,
        record: IdempotencyRecord,
        mut open: OpenRecord,
    ) -> Result<(), Rejection> {
        open.phase = AttemptPhase::Released;
        open.until = self.m.stamp.plus(record.retention_ms);
        self.put_object(key, IdempotencyRecord { state: RecordState::Open(Box::new(open)), ..record });
        self.grant_first_attempt(key, |_| true).map(drop)
    }

    fn reconcile_attempt(&mut self, key: &ObjectKey, it: &AttemptReconcile) -> Result<IdempotencyReply, Rejection> {
        let now = self.m.stamp;
        let Some(record) = self.object::<IdempotencyRecord>(key).cloned() else {
            let why = format!("there is no record of `{}`", it.name.key);
            return Err(Refusal::new(RefusalCode::NotFound, why).fact("name", &it.name.key).into());
        };
        if it.attempt != Revision(0) && it.attempt != record.attempt {
            return Err(fenced(&it.name, it.attempt, Some(&record), now));
        }
        let open = match &record.state {
            RecordState::Open(open) if open.phase == AttemptPhase::Running => {
                let in_flight = record.in_flight(now);
                let why = format!("attempt {} of `{}` is running", record.number, it.name.key);
                let refusal = facts(Refusal::new(RefusalCode::InFlight, why), &it.name, &record, now);
                return Err(refusal.retry_after(in_flight.retry_after_ms).into());
            }
            RecordState::Open(open) => (**open).clone(),
            RecordState::Done(_) => {
                let why = format!("`{}` has its result: there is nothing to decide", it.name.key);
                return Err(facts(Refusal::new(RefusalCode::Conflict, why), &it.name, &record, now).into());
            }
        };
        match &it.decision {
            AttemptDecision::Complete(result) => Ok(self.store_attempt_result(key, record, false, result)),
            AttemptDecision::Release => {
                self.release_attempt(key, record, open)?;
                Ok(IdempotencyReply::Released)
            }
            AttemptDecision::Discard => {
                self.remove_object(key);
                Ok(IdempotencyReply::Discarded)
            }
        }
    }

    /// Begins that wait for a record, in the order of their arrival.
    fn waiting_begins(&self, key: &ObjectKey) -> Vec<(WaiterNumber, AttemptBegin)> {
        let begin = |waiter: &Waiter| match &waiter.ask {
            Ask::Native(op) => match &**op {
                NativeOp::Idempotency(IdempotencyOp::Begin(begin)) => Some(begin.clone()),
                _ => None,
            },
            Ask::Exclusive => None,
        };
        self.m.waits.queue(key).filter_map(|(number, waiter)| Some((number, begin(waiter)?))).collect()
    }

    /// Grants the next attempt to the first who waits and may have it. The others wait on.
    fn grant_first_attempt(&mut self, key: &ObjectKey, may: fn(&AttemptBegin) -> bool) -> Result<bool, Rejection> {
        let Some((number, begin)) = self.waiting_begins(key).into_iter().find(|(_, begin)| may(begin)) else {
            return Ok(false);
        };
        let had_none = self.object::<IdempotencyRecord>(key).is_some_and(|record| record.fingerprint.is_empty());
        let granted = self.grant_attempt(key, &begin)?;
        self.end_wait(number, Ok(IdempotencyReply::Granted(granted).into()));
        if had_none && !begin.fingerprints.is_empty() {
            self.refuse_waits_that_differ(key);
        }
        Ok(true)
    }

    /// The record has got its fingerprint while they waited: what comes of it is nothing to those who asked for something else.
    fn refuse_waits_that_differ(&mut self, key: &ObjectKey) {
        for (number, begin) in self.waiting_begins(key) {
            let record = self.object::<IdempotencyRecord>(key);
            if let Some(stored) = record.and_then(|record| record.differs(&begin.fingerprints)) {
                self.end_wait(number, Err(mismatch(&begin.name, &stored)));
            }
        }
    }

    /// What is over is over, though the turn of its deadline has not come.
    fn lapse_attempt_if_due(&mut self, key: &ObjectKey) -> Result<(), Rejection> {
        let deadline = self.object::<IdempotencyRecord>(key).and_then(Lived::deadline);
        if deadline.is_some_and(|deadline| deadline <= self.m.stamp) { self.lapse_attempt(key) } else { Ok(()) }
    }

    /// The deadline of a record has come: its lease is over, or it is forgotten.
    fn lapse_attempt(&mut self, key: &ObjectKey) -> Result<(), Rejection> {
        let Some(record) = self.object::<IdempotencyRecord>(key).cloned() else { return Ok(()) };
        let mut open = match &record.state {
            RecordState::Open(open) if open.phase == AttemptPhase::Running => (**open).clone(),
            _ => {
                self.remove_object(key);
                return Ok(());
            }
        };
        // Who waits first may take over, if that is allowed on both sides.
        if open.takeover && self.grant_first_attempt(key, |begin| begin.takeover)? {
            return Ok(());
        }
        let now = self.m.stamp;
        open.phase = if open.takeover { AttemptPhase::Abandoned } else { AttemptPhase::NeedsReconcile };
        open.until = now.plus(record.retention_ms);
        let record = IdempotencyRecord { state: RecordState::Open(Box::new(open)), ..record };
        for (number, begin) in self.waiting_begins(key) {
            self.end_wait(number, Err(needs_reconcile(&begin.name, &record, now)));
        }
        self.put_object(key, record);
        Ok(())
    }
}

fn granted(attempt: Revision, number: u32, lease_ms: u64, checkpoints: &[AttemptPoint]) -> AttemptGranted {
    let bytes: usize = checkpoints.iter().map(|c| c.name.len() + c.data.len() + 8).sum();
    let more = bytes > GRANTED_CHECKPOINTS_BYTES;
    let checkpoints = if more { Vec::new() } else { checkpoints.to_vec() };
    AttemptGranted { attempt, number, lease_ms, checkpoints, more }
}

/// The result again; of one that was too large, what is known of it, as a refusal: nothing may run again for it.
fn replay(
    name: &RecordName,
    record: &IdempotencyRecord,
    done: &DoneRecord,
    now: LogTime,
) -> Result<OpReply, Rejection> {
    if let ResultBody::NotRetained(body) = done.result.unpack().body {
        let why = format!("`{}` has run; its result of {} bytes was too large to keep", name.key, body.size);
        let sha256: String = body.sha256.iter().map(|b| format!("{b:02x}")).collect();
        let refusal = Refusal::new(RefusalCode::ResultNotRetained, why).fact("status", done.result.unpack().status);
        return Err(facts(refusal, name, record, now).fact("size", body.size).fact("sha256", sha256).into());
    }
    Ok(IdempotencyReply::Replay(AttemptReplay {
        attempt: record.attempt,
        number: record.number,
        failed: done.failed,
        result: done.result.clone(),
        finished_ms: now.0.saturating_sub(done.at.0),
        first_seen_ms: now.0.saturating_sub(record.first.0),
        kept_ms: record.left_ms(now),
    })
    .into())
}

fn facts(refusal: Refusal, name: &RecordName, record: &IdempotencyRecord, now: LogTime) -> Refusal {
    let state = record.state_at(now).map_or("absent", IdempotencyState::name);
    let refusal = refusal.fact("name", &name.key).fact("state", state);
    refusal.fact("attempt", record.attempt).fact("attempt_no", record.number)
}

fn mismatch(name: &RecordName, stored: &Fingerprint) -> Rejection {
    let why = format!("`{}` was first used for another request", name.key);
    let refusal = Refusal::new(RefusalCode::Mismatch, why).fact("name", &name.key);
    refusal.fact("algorithm", &stored.algorithm).into()
}

fn needs_reconcile(name: &RecordName, record: &IdempotencyRecord, now: LogTime) -> Rejection {
    let why = format!("attempt {} of `{}` died, and takeover is not allowed: decide", record.number, name.key);
    let refusal = facts(Refusal::new(RefusalCode::NeedsReconcile, why), name, record, now);
    match record.checkpoints().last() {
        Some(checkpoint) => refusal.fact("checkpoint", &checkpoint.name).into(),
        None => refusal.into(),
    }
}

fn fenced(name: &RecordName, presented: Revision, record: Option<&IdempotencyRecord>, now: LogTime) -> Rejection {
    let Some(record) = record else {
        let why = format!("attempt {presented} of `{}` is over: there is no record of it", name.key);
        let refusal = Refusal::new(RefusalCode::Fenced, why).fact("name", &name.key);
        return refusal.fact("presented", presented).fact("newest", 0).fact("state", "absent").into();
    };
    let state = record.state_at(now).map_or("absent", IdempotencyState::name);
    let why = match record.attempt == presented {
        true => format!("attempt {presented} of `{}` is over: it is {state}", name.key),
        false => format!("attempt {presented} of `{}` was replaced: attempt {} is {state}", name.key, record.attempt),
    };
    let refusal = Refusal::new(RefusalCode::Fenced, why).fact("name", &name.key).fact("presented", presented);
    refusal.fact("newest", record.attempt).fact("attempt_no", record.number).fact("state", state).into()
}

/// For doors and conditions.
impl Machine {
    /// A record, unless its time is over.
    pub fn idempotency_record(&self, ns: NamespaceId, name: &RecordName) -> Option<&IdempotencyRecord> {
        let record =
            self.objects.get::<IdempotencyRecord>(&ObjectKey::of::<IdempotencyRecord>(ns, &name.object_name()));
        record.filter(|record| record.state_at(self.stamp).is_some())
    }

    /// Refuses unless this is the newest attempt of the record and nothing has ended it.
    pub(crate) fn judge_attempt(&self, ns: NamespaceId, name: &RecordName, attempt: Revision) -> Result<(), Rejection> {
        let record = self.idempotency_record(ns, name);
        match record {
            Some(r) if r.attempt == attempt && !matches!(r.phase(), None | Some(AttemptPhase::Released)) => Ok(()),
            _ => Err(fenced(name, attempt, record, self.stamp)),
        }
    }
}
