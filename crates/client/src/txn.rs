//! Transactions over all primitives: requirements, then checks, then one of two lists of steps, in one commit.
//!
//! Promises. All or nothing: a step that is refused drops the whole. A step means what the call of its name means. If a check does not hold,
//! the reply names it and what is there instead.
//! Not promised. That a guard of this process knows of it: a lock that a step releases, or an attempt that one completes, is over for the service, and its guard
//! here is told so by the next call.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};

use bytes::Bytes;
use prost::Message as _;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::check::Fact;
use tenure_wire::tenure::v1::idempotency_fail_request::How;
use tenure_wire::tenure::v1::txn_answer::Answer as Wire;
use tenure_wire::tenure::v1::txn_op::Op as Asked;

use crate::client::{Client, mismatched};
use crate::config::{ConfigChange, ConfigRollout, PublishConfig};
use crate::election::Leadership;
use crate::error::Error;
use crate::idempotent::{Attempt, StoredResult};
use crate::kv::{Compare, LockProof, Op, RangeReply, Record, carried_out};
use crate::once::{Claim, Marker, MarkerName, OnceMark};
use crate::queue::{Delivery, Enqueued, JobMoved, NewJob};
use crate::registry::{Health, Registered, Registering};
use crate::reservation::{Reservation, Reserve};
use crate::schedule::{PutSchedule, ScheduleStored};
use crate::session::Session;

const PATH: &str = "/tenure.v1.Txns/Run";

impl Client {
    /// A transaction over all primitives.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client, guard: tenure_client::LockGuard) -> Result<(), tenure_client::Error> {
    /// use tenure_client::{Check, OnceMark, Op, Step};
    /// let reply = client
    ///     .transaction()
    ///     .require(Check::lock_held(&guard))
    ///     .when(Check::marker_absent("type=welcome,user=43"))
    ///     .then(Step::once(OnceMark::new("type=welcome,user=42").by("job-900"), [Op::put("mails/42", "queued")]))
    ///     .then(Op::put("jobs/900", "done"))
    ///     .await?;
    /// if let Some(failed) = reply.failed {
    ///     println!("check {} does not hold: {}", failed.index, failed.message);
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing happens before .await"]
    pub fn transaction(&self) -> Transaction<'_> {
        let request = v1::TxnRunRequest { namespace: self.namespace(), ..Default::default() };
        Transaction { client: self, request, under: None }
    }
}

impl Client {
    /// Runs a transaction that was read from elsewhere: an encoded `tenure.v1.TxnRunRequest`, answered by an encoded `tenure.v1.TxnRunReply`.
    /// Where it has none, the namespace of this client and a request id are filled in.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the bytes are no such request; else as [`Client::transaction`].
    pub async fn run_encoded(&self, request: &[u8]) -> Result<Vec<u8>, Error> {
        let mut request = v1::TxnRunRequest::decode(request).map_err(|error| Error::Invalid(error.to_string()))?;
        if request.namespace.is_empty() {
            request.namespace = self.namespace();
        }
        let plan = self.plan("transaction", true);
        let reply: v1::TxnRunReply = match request.request {
            Some(_) => self.unary(plan, PATH, &request).await?,
            None => self.change(plan, PATH, &request).await?,
        };
        Ok(reply.encode_to_vec())
    }
}

/// A condition of a transaction. A [`Compare`] of keys is one, too.
#[derive(Clone, Debug)]
pub struct Check {
    wire: v1::Check,
}

impl Check {
    fn of(fact: Fact) -> Self {
        Self { wire: v1::Check { fact: Some(fact), not: false } }
    }

    /// The lock is held under this very token.
    #[must_use]
    pub fn lock_held(proof: impl Into<LockProof>) -> Self {
        Self::of(Fact::LockHeld(proof.into().into()))
    }

    /// The session lives.
    #[must_use]
    pub fn session_alive(session: u64) -> Self {
        Self::of(Fact::SessionAlive(v1::SessionAlive { session }))
    }

    /// The election is led under this very token.
    #[must_use]
    pub fn leads(proof: impl Into<LeadProof>) -> Self {
        let LeadProof { name, token } = proof.into();
        Self::of(Fact::Leads(v1::LedElection { name, token }))
    }

    /// It is the newest delivery of its job, and under way.
    #[must_use]
    pub fn receipt_valid(receipt: impl Into<Receipt>) -> Self {
        let Receipt { id, token } = receipt.into();
        Self::of(Fact::ReceiptValid(v1::ReceiptRef { id, token }))
    }

    /// It is the newest attempt of its key, and nothing has ended it.
    #[must_use]
    pub fn attempt_valid(attempt: impl Into<AttemptProof>) -> Self {
        let AttemptProof { scope, key, token } = attempt.into();
        Self::of(Fact::AttemptValid(v1::HeldAttempt { scope, key, attempt: token }))
    }

    /// The counter is within these bounds; one that is not there counts as 0.
    ///
    /// ```
    /// # use tenure_client::Check;
    /// let is_left = Check::counter_within("seats", 1..);
    /// let few = Check::counter_within("failures", ..10);
    /// ```
    #[must_use]
    pub fn counter_within(counter: impl Into<String>, bounds: impl RangeBounds<i64>) -> Self {
        let min = match bounds.start_bound() {
            Bound::Included(min) => Some(*min),
            Bound::Excluded(below) => Some(below.saturating_add(1)),
            Bound::Unbounded => None,
        };
        let max = match bounds.end_bound() {
            Bound::Included(max) => Some(*max),
            Bound::Excluded(above) => Some(above.saturating_sub(1)),
            Bound::Unbounded => None,
        };
        Self::of(Fact::Counter(v1::CounterRange { name: counter.into(), min, max }))
    }

    /// This is the current version of a configuration; 0: there is none.
    #[must_use]
    pub fn config_at(key: impl Into<String>, version: u64) -> Self {
        Self::of(Fact::Config(v1::ConfigAt { key: key.into(), version }))
    }

    /// This is the revision of the last change of a schedule, which a tick is not; 0: there is none.
    #[must_use]
    pub fn schedule_at(name: impl Into<String>, revision: u64) -> Self {
        Self::of(Fact::Schedule(v1::ScheduleAt { name: name.into(), revision }))
    }

    /// The instance of a service is registered, in whatever health.
    #[must_use]
    pub fn registered(instance: impl Into<InstanceRef>) -> Self {
        Self::in_health(instance, [])
    }

    /// The instance of a service is registered, and its health is one of these.
    #[must_use]
    pub fn in_health(instance: impl Into<InstanceRef>, health: impl IntoIterator<Item = Health>) -> Self {
        let InstanceRef { service, instance, token } = instance.into();
        let health = health.into_iter().map(Health::wire).collect();
        Self::of(Fact::Registered(v1::RegisteredInstance { service, instance, token, health }))
    }

    /// The effect is not done, not claimed, and not done perhaps.
    #[must_use]
    pub fn marker_absent(marker: impl Into<MarkerName>) -> Self {
        Self::of(Fact::MarkerAbsent(marker.into().into_wire()))
    }

    /// It must not be so. Not for a compare of keys, which has relations of its own.
    #[must_use]
    pub fn negated(mut self) -> Self {
        self.wire.not = !self.wire.not;
        self
    }
}

impl From<Compare> for Check {
    fn from(compare: Compare) -> Self {
        Self::of(Fact::Key(compare.into_wire()))
    }
}

/// Proof of a lead: this election, led under this token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeadProof {
    /// The name of the election.
    pub name: String,
    /// The token of the lead.
    pub token: u64,
}

impl From<&Leadership> for LeadProof {
    fn from(leader: &Leadership) -> Self {
        Self { name: leader.name().to_owned(), token: leader.token() }
    }
}

impl<N: Into<String>> From<(N, u64)> for LeadProof {
    fn from((name, token): (N, u64)) -> Self {
        Self { name: name.into(), token }
    }
}

/// What names one delivery of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The id of the job.
    pub id: String,
    /// The token of the delivery.
    pub token: u64,
}

impl From<&Delivery> for Receipt {
    fn from(job: &Delivery) -> Self {
        Self { id: job.id().to_owned(), token: job.token() }
    }
}

impl<I: Into<String>> From<(I, u64)> for Receipt {
    fn from((id, token): (I, u64)) -> Self {
        Self { id: id.into(), token }
    }
}

/// What names one attempt of an idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptProof {
    /// Whose key it is.
    pub scope: String,
    /// The key.
    pub key: String,
    /// The token of the attempt.
    pub token: u64,
}

impl From<&Attempt> for AttemptProof {
    fn from(attempt: &Attempt) -> Self {
        let (scope, key, token) = (attempt.scope().to_owned(), attempt.key().to_owned(), attempt.token());
        Self { scope, key, token }
    }
}

impl<S: Into<String>, K: Into<String>> From<(S, K, u64)> for AttemptProof {
    fn from((scope, key, token): (S, K, u64)) -> Self {
        Self { scope: scope.into(), key: key.into(), token }
    }
}

/// What names a hold on a part of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HoldRef {
    /// The pool.
    pub pool: String,
    /// The number of the hold.
    pub id: u64,
    /// The token of its grant.
    pub token: u64,
}

impl From<&Reservation> for HoldRef {
    fn from(held: &Reservation) -> Self {
        Self { pool: held.pool().to_owned(), id: held.id(), token: held.token() }
    }
}

impl<P: Into<String>> From<(P, u64, u64)> for HoldRef {
    fn from((pool, id, token): (P, u64, u64)) -> Self {
        Self { pool: pool.into(), id, token }
    }
}

/// An instance of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceRef {
    /// The service.
    pub service: String,
    /// The id of the instance.
    pub instance: String,
    /// Under this registration; 0: under whichever there is.
    pub token: u64,
}

impl From<&Registered> for InstanceRef {
    fn from(registered: &Registered) -> Self {
        let (service, instance) = (registered.service().to_owned(), registered.instance().to_owned());
        Self { service, instance, token: registered.token() }
    }
}

impl<S: Into<String>, I: Into<String>> From<(S, I)> for InstanceRef {
    fn from((service, instance): (S, I)) -> Self {
        Self { service: service.into(), instance: instance.into(), token: 0 }
    }
}

/// One step of a transaction. An [`Op`] on keys is one, too, and so are calls that are made ready and not awaited: [`Client::publish_config`],
/// [`Schedule::put`](crate::Schedule::put), [`Client::reserve`] (which does not wait here) and [`Registry::register`](crate::Registry::register) (whose heartbeats are then the caller's).
///
/// ```no_run
/// # async fn example(
/// #     client: tenure_client::Client, job: tenure_client::Delivery, attempt: tenure_client::Attempt,
/// #     leader: tenure_client::Leadership,
/// # ) -> Result<(), tenure_client::Error> {
/// use tenure_client::{Check, Op, Step, StoredResult};
///
/// // The job is done, its caller gets this result from now on, and what it gave is written: in one commit, by the leader alone.
/// let reply = client
///     .transaction()
///     .require(Check::leads(&leader))
///     .when(Check::receipt_valid(&job))
///     .when(Check::attempt_valid(&attempt))
///     .then(Step::ack(&job))
///     .then(Step::complete(&attempt, &StoredResult::new("paid").status(201)))
///     .then(Op::put("orders/42", "paid"))
///     .then(Step::enqueue("mail", "order 42 is paid"))
///     .await?;
/// if let Some(failed) = reply.failed {
///     println!("check {} does not hold: {}", failed.index, failed.message);
/// }
///
/// // A deployment: flags that nobody has changed meanwhile, the new instance, and no new callers for the old one.
/// let flags = client.publish_config("shop/flags", r#"{"cart": true}"#).author("ann");
/// client
///     .transaction()
///     .when(Check::config_at("shop/flags", 7))
///     .when(Check::registered(("shop", "blue")))
///     .then(flags)
///     .then(client.registry().register("shop", "green", "10.0.0.8", 80))
///     .then(Step::drain(("shop", "blue")))
///     .await?;
///
/// // The nightly report, if nobody has a say in it so far, and the first one now.
/// client
///     .transaction()
///     .when(Check::schedule_at("reports/nightly", 0))
///     .then(client.schedule("reports/nightly").put("0 3 * * *", "reports", "full"))
///     .then(Step::enqueue("reports", "full"))
///     .await?;
///
/// // Two seats and the last ticket number in one commit, or neither.
/// client
///     .transaction()
///     .when(Check::counter_within("sold", ..200))
///     .then(client.reserve("concert/row-1", 2))
///     .then(Step::next("tickets"))
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Step {
    wire: Asked,
}

impl Step {
    /// Steps that belong to an effect: they are taken if its marker is new, and it is put with them. Else they are skipped, and the rest of the
    /// transaction still commits.
    #[must_use]
    pub fn once<S: Into<Self>>(marker: OnceMark, steps: impl IntoIterator<Item = S>) -> Self {
        let ops = steps.into_iter().map(|step| step.into().into_wire()).collect();
        Self { wire: Asked::Once(v1::TxnOnce { marker: Some(marker.into_wire()), ops }) }
    }

    /// The outside effect of this claim was done.
    #[must_use]
    pub fn confirm(claim: &Claim, result: impl Into<Bytes>) -> Self {
        let v1::MarkerName { marker, fields } = claim.name().clone().into_wire();
        let (token, result_bytes) = (claim.token(), result.into());
        Self {
            wire: Asked::MarkerConfirm(v1::MarkerConfirmRequest {
                marker,
                fields,
                token,
                result_bytes,
                ..Default::default()
            }),
        }
    }

    /// Ends a session, and with it what it holds.
    #[must_use]
    pub fn end_session(id: u64) -> Self {
        Self { wire: Asked::SessionEnd(v1::SessionEndRequest { id, ..Default::default() }) }
    }

    /// Frees a lock that this session holds under this token.
    #[must_use]
    pub fn release(proof: impl Into<LockProof>, session: u64) -> Self {
        let LockProof { name, token } = proof.into();
        Self { wire: Asked::LockRelease(v1::LockReleaseRequest { name, session, token, ..Default::default() }) }
    }

    /// Adds to a counter.
    #[must_use]
    pub fn add(counter: impl Into<String>, delta: i64) -> Self {
        let request = v1::CounterAddRequest { name: counter.into(), delta: Some(delta), ..Default::default() };
        Self { wire: Asked::CounterAdd(request) }
    }

    /// Adds to a counter, if the sum is within the bounds; else the whole transaction is refused.
    #[must_use]
    pub fn add_within(counter: impl Into<String>, delta: i64, bounds: std::ops::RangeInclusive<i64>) -> Self {
        let (min, max) = bounds.into_inner();
        let request = v1::CounterAddRequest {
            name: counter.into(),
            delta: Some(delta),
            min: Some(min),
            max: Some(max),
            ..Default::default()
        };
        Self { wire: Asked::CounterAdd(request) }
    }

    /// Takes the next number of a sequence.
    #[must_use]
    pub fn next(sequence: impl Into<String>) -> Self {
        Self { wire: Asked::SequenceNext(v1::SequenceNextRequest { name: sequence.into(), ..Default::default() }) }
    }

    // ---- Jobs ----

    /// Adds a job to a queue.
    #[must_use]
    pub fn enqueue(queue: impl Into<String>, job: impl Into<NewJob>) -> Self {
        Self::enqueue_all(queue, [job.into()])
    }

    /// Adds up to 100 jobs to a queue.
    #[must_use]
    pub fn enqueue_all(queue: impl Into<String>, jobs: impl IntoIterator<Item = NewJob>) -> Self {
        let jobs = jobs.into_iter().map(NewJob::into_wire).collect();
        Self { wire: Asked::JobEnqueue(v1::EnqueueRequest { queue: queue.into(), jobs, ..Default::default() }) }
    }

    /// The job is done. Any but the receipt of the newest delivery drops the whole.
    #[must_use]
    pub fn ack(receipt: impl Into<Receipt>) -> Self {
        Self::ack_with(receipt, Bytes::new())
    }

    /// The job is done, and this is kept with its record.
    #[must_use]
    pub fn ack_with(receipt: impl Into<Receipt>, result: impl Into<Bytes>) -> Self {
        let Receipt { id, token } = receipt.into();
        let receipt = v1::JobReceipt { id, token, result_bytes: result.into(), ..Default::default() };
        Self { wire: Asked::JobAck(v1::AckRequest { receipts: vec![receipt], ..Default::default() }) }
    }

    /// This delivery has failed: the job is tried again after the backoff of its queue.
    #[must_use]
    pub fn nack(receipt: impl Into<Receipt>, reason: impl Into<String>) -> Self {
        let Receipt { id, token } = receipt.into();
        Self { wire: Asked::JobNack(v1::NackRequest { id, token, reason: reason.into(), ..Default::default() }) }
    }

    // ---- Idempotency attempts ----

    /// Ends an attempt with its result.
    #[must_use]
    pub fn complete(attempt: impl Into<AttemptProof>, result: &StoredResult) -> Self {
        let AttemptProof { scope, key, token } = attempt.into();
        let result = Some(result.wire());
        let request = v1::IdempotencyCompleteRequest { scope, key, attempt: token, result, ..Default::default() };
        Self { wire: Asked::IdempotencyComplete(request) }
    }

    /// Ends an attempt as failed for good, with a result that is replayed.
    #[must_use]
    pub fn fail(attempt: impl Into<AttemptProof>, result: &StoredResult) -> Self {
        Self::end_attempt(attempt.into(), How::Final(result.wire()))
    }

    /// Ends an attempt so that the key may be tried again at once, from the checkpoints.
    #[must_use]
    pub fn release_attempt(attempt: impl Into<AttemptProof>) -> Self {
        Self::end_attempt(attempt.into(), How::Retryable(true))
    }

    fn end_attempt(AttemptProof { scope, key, token }: AttemptProof, how: How) -> Self {
        let request = v1::IdempotencyFailRequest { scope, key, attempt: token, how: Some(how), ..Default::default() };
        Self { wire: Asked::IdempotencyFail(request) }
    }

    /// Keeps a point from which the next attempt can go on.
    #[must_use]
    pub fn checkpoint(attempt: impl Into<AttemptProof>, name: impl Into<String>, data: impl Into<Bytes>) -> Self {
        let AttemptProof { scope, key, token } = attempt.into();
        let (name, data_bytes) = (name.into(), data.into());
        let checkpoint = Some(v1::IdempotencyCheckpoint { name, data_bytes, ..Default::default() });
        let request = v1::IdempotencyCheckpointRequest { scope, key, attempt: token, checkpoint, ..Default::default() };
        Self { wire: Asked::IdempotencyCheckpoint(request) }
    }

    // ---- Reservations ----

    /// Makes a hold final. Let go of its guard then by [`Reservation::forget`].
    #[must_use]
    pub fn confirm_reservation(hold: impl Into<HoldRef>) -> Self {
        let HoldRef { pool, id, token } = hold.into();
        let request = v1::ReservationConfirmRequest { pool, id, token, ..Default::default() };
        Self { wire: Asked::ReservationConfirm(request) }
    }

    /// Gives a hold back; whoever waits has it in the same commit.
    #[must_use]
    pub fn cancel_reservation(hold: impl Into<HoldRef>) -> Self {
        let HoldRef { pool, id, token } = hold.into();
        let request = v1::ReservationCancelRequest { pool, id, token, ..Default::default() };
        Self { wire: Asked::ReservationCancel(request) }
    }

    // ---- Elections ----

    /// Publishes another value of a leader. One that leads no longer drops the whole.
    #[must_use]
    pub fn proclaim(proof: impl Into<LeadProof>, value: impl Into<Bytes>) -> Self {
        let LeadProof { name, token } = proof.into();
        let request = v1::ProclaimRequest { name, token, value_bytes: value.into(), ..Default::default() };
        Self { wire: Asked::ElectionProclaim(request) }
    }

    /// Gives a lead up, and to the next candidate in the same commit. Stop the work first.
    #[must_use]
    pub fn resign(proof: impl Into<LeadProof>) -> Self {
        let LeadProof { name, token } = proof.into();
        Self { wire: Asked::ElectionResign(v1::ResignRequest { name, token, ..Default::default() }) }
    }

    // ---- Configuration ----

    /// Publishes a copy of an older version.
    #[must_use]
    pub fn rollback_config(key: impl Into<String>, version: u64) -> Self {
        let request = v1::ConfigRollbackRequest { key: key.into(), version, ..Default::default() };
        Self { wire: Asked::ConfigRollback(request) }
    }

    /// Gives the candidate of this number to other instances than now.
    #[must_use]
    pub fn stage_config(key: impl Into<String>, version: u64, rollout: ConfigRollout) -> Self {
        let (key, rollout) = (key.into(), Some(rollout.into_wire()));
        Self { wire: Asked::ConfigStage(v1::ConfigStageRequest { key, version, rollout, ..Default::default() }) }
    }

    /// Makes the candidate of this number the current version.
    #[must_use]
    pub fn promote_config(key: impl Into<String>, version: u64) -> Self {
        let request = v1::ConfigPromoteRequest { key: key.into(), version, ..Default::default() };
        Self { wire: Asked::ConfigPromote(request) }
    }

    /// Drops the candidate of this number.
    #[must_use]
    pub fn abort_config(key: impl Into<String>, version: u64) -> Self {
        let request = v1::ConfigAbortRequest { key: key.into(), version, ..Default::default() };
        Self { wire: Asked::ConfigAbort(request) }
    }

    /// Deletes a configuration; its versions stay readable.
    #[must_use]
    pub fn delete_config(key: impl Into<String>) -> Self {
        Self { wire: Asked::ConfigDelete(v1::ConfigDeleteRequest { key: key.into(), ..Default::default() }) }
    }

    // ---- Services ----

    /// Takes an instance of a service out; one that is not there is no error.
    #[must_use]
    pub fn deregister(instance: impl Into<InstanceRef>) -> Self {
        let InstanceRef { service, instance, token } = instance.into();
        let request = v1::ServiceDeregisterRequest { service, instance, token, ..Default::default() };
        Self { wire: Asked::ServiceDeregister(request) }
    }

    /// Has an instance told as draining: it wants no new callers.
    #[must_use]
    pub fn drain(instance: impl Into<InstanceRef>) -> Self {
        Self::draining(instance.into(), false)
    }

    /// Ends draining.
    #[must_use]
    pub fn undrain(instance: impl Into<InstanceRef>) -> Self {
        Self::draining(instance.into(), true)
    }

    fn draining(InstanceRef { service, instance, token }: InstanceRef, undo: bool) -> Self {
        let request = v1::ServiceDrainRequest { service, instance, token, undo, ..Default::default() };
        Self { wire: Asked::ServiceDrain(request) }
    }

    // ---- Schedules ----

    /// Stops the calendar of a schedule.
    #[must_use]
    pub fn pause_schedule(name: impl Into<String>) -> Self {
        Self { wire: Asked::SchedulePause(v1::SchedulePauseRequest { name: name.into(), ..Default::default() }) }
    }

    /// Lets the calendar of a schedule go on from now.
    #[must_use]
    pub fn resume_schedule(name: impl Into<String>) -> Self {
        Self { wire: Asked::ScheduleResume(v1::ScheduleResumeRequest { name: name.into(), ..Default::default() }) }
    }

    /// Enqueues the job of a schedule now, beside its calendar.
    #[must_use]
    pub fn run_schedule(name: impl Into<String>) -> Self {
        Self { wire: Asked::ScheduleRun(v1::ScheduleRunRequest { name: name.into(), ..Default::default() }) }
    }

    /// Deletes a schedule; one that is not there is no error.
    #[must_use]
    pub fn delete_schedule(name: impl Into<String>) -> Self {
        Self { wire: Asked::ScheduleDelete(v1::ScheduleDeleteRequest { name: name.into(), ..Default::default() }) }
    }

    /// A nested transaction, whose checks are decided with those of the whole.
    #[must_use]
    pub fn branch<A: Into<Self>, B: Into<Self>>(
        checks: impl IntoIterator<Item = Check>,
        then: impl IntoIterator<Item = A>,
        otherwise: impl IntoIterator<Item = B>,
    ) -> Self {
        let body = v1::TxnBody {
            compares: checks.into_iter().map(|check| check.wire).collect(),
            then: then.into_iter().map(|step| step.into().into_wire()).collect(),
            otherwise: otherwise.into_iter().map(|step| step.into().into_wire()).collect(),
        };
        Self { wire: Asked::Txn(body) }
    }

    fn into_wire(self) -> v1::TxnOp {
        v1::TxnOp { op: Some(self.wire) }
    }
}

impl From<Op> for Step {
    fn from(op: Op) -> Self {
        let wire = match op.into_inner() {
            v1::op::Op::Put(put) => Asked::Put(put),
            v1::op::Op::Delete(delete) => Asked::Delete(delete),
            v1::op::Op::Range(range) => Asked::Range(range),
            // No constructor of `Op` makes one.
            v1::op::Op::Txn(_) => Asked::Txn(v1::TxnBody::default()),
        };
        Self { wire }
    }
}

impl From<PublishConfig<'_>> for Step {
    fn from(call: PublishConfig<'_>) -> Self {
        let request = v1::ConfigPublishRequest { namespace: String::new(), ..call.into_wire() };
        Self { wire: Asked::ConfigPublish(request) }
    }
}

impl From<Reserve<'_>> for Step {
    fn from(call: Reserve<'_>) -> Self {
        let request = v1::ReserveRequest { namespace: String::new(), wait: None, ..call.into_wire() };
        Self { wire: Asked::Reserve(request) }
    }
}

impl From<PutSchedule<'_>> for Step {
    fn from(call: PutSchedule<'_>) -> Self {
        let request = v1::SchedulePutRequest { namespace: String::new(), ..call.into_wire() };
        Self { wire: Asked::SchedulePut(request) }
    }
}

impl From<Registering<'_>> for Step {
    fn from(call: Registering<'_>) -> Self {
        let request = v1::ServiceRegisterRequest { namespace: String::new(), ..call.into_wire() };
        Self { wire: Asked::ServiceRegister(request) }
    }
}

/// A transaction; see [`Client::transaction`].
#[derive(Clone, Debug)]
pub struct Transaction<'a> {
    client: &'a Client,
    request: v1::TxnRunRequest,
    under: Option<Session>,
}

/// What a transaction gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TransactionReply {
    /// The revision of the commit, or the current one where nothing was changed.
    pub revision: u64,
    /// Whether every check held, so that the `then` list ran.
    pub succeeded: bool,
    /// The answers of the list that ran, in its order.
    pub answers: Vec<Answer>,
    /// The first check that did not hold.
    pub failed: Option<FailedCheck>,
    /// An earlier try of this call did it; its answer had been lost.
    pub replayed: bool,
}

/// A check that did not hold, and what is there instead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FailedCheck {
    /// Its place among the checks.
    pub index: usize,
    /// One sentence for people.
    pub message: String,
    /// As a refusal of the same primitive would tell them.
    pub facts: BTreeMap<String, String>,
    /// Of a compare of keys: the key as it is; `None` if there is no such key.
    pub current: Option<Record>,
}

/// The answer to one step of a transaction.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Answer {
    /// A key was written; this is what it was, if asked for.
    Put(Option<Record>),
    /// This many keys were deleted.
    Deleted(u64),
    /// What was read.
    Range(RangeReply),
    /// Of a nested transaction.
    Branch(TransactionReply),
    /// Of what belongs to a marker.
    Once {
        /// The marker was there before, and the steps were skipped.
        already_done: bool,
        /// Who did it.
        marker: Marker,
        /// Of the steps.
        answers: Vec<Answer>,
    },
    /// A counter as it is now.
    Counter(i64),
    /// Numbers of a sequence, the end not included.
    Numbers(std::ops::Range<u64>),
    /// Jobs that were enqueued, or were there, in the order of the step.
    Enqueued(Vec<Enqueued>),
    /// Where a job went that was given back.
    Moved(JobMoved),
    /// A hold on a part of a pool.
    Reserved(HoldRef),
    /// A configuration after its change.
    Config(ConfigChange),
    /// The token of a registration of an instance.
    Registered(u64),
    /// The health of an instance as callers see it.
    Health(Health),
    /// A schedule was put.
    Scheduled(ScheduleStored),
    /// A value was published by a leader.
    Proclaimed {
        /// A candidate with a higher priority waits.
        should_yield: bool,
    },
    /// The step was taken; there is nothing to tell.
    Done,
}

impl Transaction<'_> {
    /// Adds a requirement: unless it holds the whole transaction is refused, with the facts of its primitive.
    #[must_use]
    pub fn require(mut self, check: Check) -> Self {
        self.request.requires.push(check.wire);
        self
    }

    /// Adds a condition. All of them must hold for the `then` list to run; none at all holds.
    #[must_use]
    pub fn when(mut self, check: impl Into<Check>) -> Self {
        self.request.compares.push(check.into().wire);
        self
    }

    /// Adds a step for the case that every condition holds.
    #[must_use]
    pub fn then(mut self, step: impl Into<Step>) -> Self {
        self.request.then.push(step.into().into_wire());
        self
    }

    /// Adds a step for the case that a condition does not hold.
    #[must_use]
    pub fn otherwise(mut self, step: impl Into<Step>) -> Self {
        self.request.otherwise.push(step.into().into_wire());
        self
    }

    /// Names the request by its place in the order of this session; see [`Put::under`](crate::Put::under).
    #[must_use]
    pub fn under(mut self, session: &Session) -> Self {
        self.under = Some(session.clone());
        self
    }

    async fn run(self) -> Result<TransactionReply, Error> {
        let Self { client, request, under } = self;
        let id = client.request_id_under(under.as_ref())?;
        let plan = client.plan("transaction", true);
        let reply: v1::TxnRunReply = client.change_as(&id, plan, PATH, &request).await?;
        let header = reply.header.unwrap_or_default();
        let body = v1::TxnBodyReply { succeeded: reply.succeeded, answers: reply.answers, failed: reply.failed };
        Ok(TransactionReply { revision: header.revision, replayed: header.replayed, ..answered(body)? })
    }
}

carried_out!(Transaction<'a> => TransactionReply, run);

fn answered(body: v1::TxnBodyReply) -> Result<TransactionReply, Error> {
    let failed = body.failed.map(|failed| FailedCheck {
        index: failed.index as usize,
        message: failed.message,
        facts: failed.facts,
        current: failed.current.map(Record::from),
    });
    Ok(TransactionReply { succeeded: body.succeeded, answers: answers(body.answers)?, failed, ..Default::default() })
}

fn answers(wire: Vec<v1::TxnAnswer>) -> Result<Vec<Answer>, Error> {
    wire.into_iter().map(|one| answer(one.answer.ok_or_else(|| mismatched("transaction"))?)).collect()
}

fn answer(wire: Wire) -> Result<Answer, Error> {
    let counted = |counter: Option<v1::Counter>| counter.map_or(Answer::Done, |counter| Answer::Counter(counter.value));
    Ok(match wire {
        Wire::Put(put) => Answer::Put(put.prev.map(Record::from)),
        Wire::Delete(delete) => Answer::Deleted(delete.deleted),
        Wire::Range(range) => Answer::Range(range.into()),
        Wire::Txn(body) => Answer::Branch(answered(body)?),
        Wire::Once(once) => Answer::Once {
            already_done: once.already_done,
            marker: once.marker.map(Marker::from).unwrap_or_default(),
            answers: answers(once.answers)?,
        },
        Wire::CounterAdd(reply) => counted(reply.counter),
        Wire::CounterSet(reply) => counted(reply.counter),
        Wire::SequenceNext(reply) => Answer::Numbers(reply.from..reply.to),
        Wire::JobEnqueue(reply) => Answer::Enqueued(reply.jobs.into_iter().map(Enqueued::from).collect()),
        Wire::JobNack(reply) => Answer::Moved(reply.into()),
        Wire::Reserve(reply) => Answer::Reserved(HoldRef { pool: reply.pool, id: reply.id, token: reply.token }),
        Wire::ConfigPublish(reply)
        | Wire::ConfigRollback(reply)
        | Wire::ConfigStage(reply)
        | Wire::ConfigPromote(reply)
        | Wire::ConfigAbort(reply)
        | Wire::ConfigDelete(reply) => Answer::Config(reply.into()),
        Wire::ServiceRegister(reply) => Answer::Registered(reply.token),
        Wire::ServiceDrain(reply) => Answer::Health(Health::of(reply.health)),
        Wire::SchedulePut(reply) => Answer::Scheduled(reply.into()),
        Wire::ScheduleRun(reply) => Answer::Enqueued(reply.job.into_iter().map(Enqueued::from).collect()),
        Wire::ElectionProclaim(reply) => Answer::Proclaimed { should_yield: reply.should_yield },
        _ => Answer::Done,
    })
}
