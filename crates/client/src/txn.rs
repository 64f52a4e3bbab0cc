//! Transactions over all primitives: requirements, then checks, then one of two lists of steps, in one commit.
//!
//! Promises. All or nothing: a step that is refused drops the whole. A step means what the call of its name means. If a check does not hold,
//! the reply names it and what is there instead.

use std::collections::BTreeMap;
use std::future::IntoFuture;

use bytes::Bytes;
use prost::Message as _;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::check::Fact;
use tenure_wire::tenure::v1::txn_answer::Answer as Wire;
use tenure_wire::tenure::v1::txn_op::Op as Asked;

use crate::client::{Client, RequestId, mismatched, one_shot};
use crate::error::Error;
use crate::kv::{Answering, Compare, LockProof, Op, RangeReply, Record};
use crate::once::{Claim, Marker, MarkerName, OnceMark};
use crate::pipeline::RECEIVE_BYTES;
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
        if request.request.is_none() {
            request.request = Some(one_shot()?);
        }
        Ok(self.send(request).await?.encode_to_vec())
    }

    async fn send(&self, request: v1::TxnRunRequest) -> Result<v1::TxnRunReply, Error> {
        if !request.then.iter().chain(&request.otherwise).any(looks_first) {
            return self.unary(self.plan("transaction", true), PATH, &request).await;
        }
        let reply = self.write("transaction", |channel| {
            let mut txns = v1::txns_client::TxnsClient::new(channel).max_decoding_message_size(RECEIVE_BYTES);
            let request = request.clone();
            async move { txns.run(request).await }
        });
        reply.await
    }
}

/// Whether the server looks at the state before it plans this, which a pipeline does not wait for.
fn looks_first(op: &v1::TxnOp) -> bool {
    match &op.op {
        Some(Asked::ConfigPublish(_) | Asked::ConfigRollback(_)) => true,
        Some(Asked::Txn(body)) => body.then.iter().chain(&body.otherwise).any(looks_first),
        Some(Asked::Once(once)) => once.ops.iter().any(looks_first),
        _ => false,
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

/// One step of a transaction. An [`Op`] on keys is one, too.
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
        let Self { client, mut request, under } = self;
        let named = under.as_ref().and_then(Session::next_request);
        let own = if named.is_none() { Some(client.request_id()?) } else { None };
        request.request = named.as_ref().map(|named| named.meta()).or_else(|| own.as_ref().map(RequestId::meta));
        let reply = client.send(request).await?;
        let header = reply.header.unwrap_or_default();
        let body = v1::TxnBodyReply { succeeded: reply.succeeded, answers: reply.answers, failed: reply.failed };
        Ok(TransactionReply { revision: header.revision, replayed: header.replayed, ..answered(body)? })
    }
}

impl<'a> IntoFuture for Transaction<'a> {
    type Output = Result<TransactionReply, Error>;
    type IntoFuture = Answering<'a, TransactionReply>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}

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
        _ => Answer::Done,
    })
}
