//! Native transactions over all primitives.
//!
//! Promises. X1: an operation is planned by the very function that plans the call of its name, and its answer is written by the function
//! that writes that call's answer; so it means the same alone and in a transaction. X2: what is drawn for an operation follows from the request id of the
//! whole and from its place. X3: the compare that failed first is named, from the moment of the decision.
//! Relies on. `change` for the plans of most calls; what is said of the whole is refused in an operation.

use std::collections::VecDeque;

use bytes::Bytes;
use prost::Message;
use tenure_machine::{
    Compare, CompareTarget, Condition, ConditionOp, ConditionReply, ConfigAt, CounterWithin, Failed, HeldAttempt,
    HeldLock, JobId, MarkerOp, NamespaceId, NativeReply, Op, OpReply, Receipt, RecordName, Relation, Reply, RequestId,
    RequireLock, Revision, ScheduleAt, ScheduleName, SessionId, Span, SubTxn, Txn, TxnReply,
};
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::txn_answer::Answer as Wire;
use tenure_wire::tenure::v1::txn_op::Op as Asked;

use super::{
    Caller, Finish, Outcome, Plan, PlanFn, Plans, Refused, configs, encode_answer, kv, locks, markers, mixed_up,
    mount_planned, namespace, record, refuse, registry, request_id, schedules, session_id, sessions,
};
use crate::Context;
use crate::driver::Written;
use crate::rpc::Router;

const PATH: &str = "/tenure.v1.Txns/Run";

/// Writes the answer to a transaction from what all its operations gave; the last is what is left of a session that it made.
pub(crate) type TxnsFinish = Box<dyn FnOnce(&Context, v1::Header, TxnReply, u64) -> Result<Bytes, Refused> + Send>;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    let plans = std::sync::Arc::new(router.plans.clone());
    let planned: PlanFn = std::sync::Arc::new(move |context, caller, message| {
        let request: v1::TxnRunRequest = super::decoded(message)?;
        if !request.then.iter().chain(&request.otherwise).any(looks_first) {
            return plan(context, &plans, caller, &request, Looked::new());
        }
        let (context, caller, plans) = (context.clone(), caller.clone(), plans.clone());
        Ok(Plan::Look(Box::pin(async move {
            let (looked, verdict) = look_first(&context, &request).await?;
            let plan = plan(&context, &plans, &caller, &request, looked)?;
            if let Plan::Write(txn, _) = &plan {
                configs::heeded(&context, txn, verdict).await?;
            }
            Ok(plan)
        })))
    });
    mount_planned(router, context, PATH, planned);
}

fn looks_first(op: &v1::TxnOp) -> bool {
    let mut found = Vec::new();
    gather(std::slice::from_ref(op), &mut found);
    !found.is_empty()
}

/// Operations that look at the state before the transaction is planned, in the order in which it names them.
type Looked = VecDeque<(Op, Finish)>;

async fn look_first(context: &Context, request: &v1::TxnRunRequest) -> Result<(Looked, configs::Verdict), Refused> {
    let mut found = Vec::new();
    gather(&request.then, &mut found);
    gather(&request.otherwise, &mut found);
    if found.len() > context.settings.max_txn_ops {
        return Err(refuse("op", format!("a transaction has at most {} operations", context.settings.max_txn_ops)));
    }
    let namespace = namespace(&request.namespace)?;
    let (mut looked, mut verdict) = (Looked::with_capacity(found.len()), Ok(()));
    for asked in found {
        let (op, finish, said) = configs::looked(context, namespace, asked).await?;
        looked.push_back((op, finish));
        verdict = verdict.and(said);
    }
    Ok((looked, verdict))
}

fn gather<'a>(ops: &'a [v1::TxnOp], found: &mut Vec<&'a Asked>) {
    for asked in ops.iter().filter_map(|op| op.op.as_ref()) {
        match asked {
            Asked::Txn(body) => {
                gather(&body.then, found);
                gather(&body.otherwise, found);
            }
            Asked::Once(once) => gather(&once.ops, found),
            asked if configs::looks_first(asked) => found.push(asked),
            _ => {}
        }
    }
}

fn plan(
    context: &Context,
    plans: &Plans,
    caller: &Caller,
    request: &v1::TxnRunRequest,
    looked: Looked,
) -> Result<Plan, Refused> {
    let request_id = request_id(request.request.as_ref(), caller)?;
    let namespace = namespace(&request.namespace)?;
    let mut planner = Planner { context, plans, namespace, request_id, looked, place: 0 };
    let depth = context.settings.max_txn_ops;
    let mut txn = Txn { namespace: planner.namespace, request: request_id, ..Txn::default() };
    let mut required = Vec::new();
    for check in &request.requires {
        match planner.required(check)? {
            Condition::LockHeld(lock) => txn.requires.push(RequireLock { name: lock.name, token: lock.token }),
            other => required.push(Op::from(ConditionOp::Require(other))),
        }
    }
    let lists = planner.lists(&request.compares, &request.then, &request.otherwise, depth)?;
    let (sub, steps) = lists;
    txn.compares = sub.compares;
    let skipped = required.len();
    txn.otherwise = required.iter().cloned().chain(sub.otherwise).collect();
    txn.then = required.into_iter().chain(sub.then).collect();
    // What explains stands first; requirements refuse, so nothing is lost by asking them after it.
    if steps.explains {
        txn.otherwise.swap(0, skipped);
    }
    let finish: TxnsFinish = Box::new(move |context, header, reply, remaining_ms| {
        let body = steps.answer(context, &header, reply, skipped, remaining_ms)?;
        let v1::TxnBodyReply { succeeded, answers, failed } = body;
        Ok(v1::TxnRunReply { header: Some(header), succeeded, answers, failed }.encode_to_vec().into())
    });
    Ok(Plan::Write(txn, Finish::Txns(finish)))
}

/// Turns what was asked into operations and, beside them, into what will write their answers.
struct Planner<'a> {
    context: &'a Context,
    plans: &'a Plans,
    namespace: NamespaceId,
    request_id: Option<RequestId>,
    looked: Looked,
    /// How many operations were planned.
    place: u64,
}

/// How the answer of one operation is written.
enum Step {
    Kv,
    /// As the call of this path writes it.
    Call(&'static str, Finish),
    Txn(Box<Steps>),
    Once(Box<v1::MarkerOnceRequest>, Vec<Step>),
}

/// How the answers of two lists are written.
struct Steps {
    /// The second list begins with the question which compare failed.
    explains: bool,
    then: Vec<Step>,
    otherwise: Vec<Step>,
}

impl Planner<'_> {
    fn lists(
        &mut self,
        compares: &[v1::Check],
        then: &[v1::TxnOp],
        otherwise: &[v1::TxnOp],
        depth: usize,
    ) -> Result<(SubTxn, Steps), Refused> {
        let compares: Vec<Compare> = compares.iter().map(|check| self.compare(check)).collect::<Result<_, _>>()?;
        let explains = !compares.is_empty();
        let (then, then_steps) = self.ops(then, depth)?;
        let (mut otherwise, otherwise_steps) = self.ops(otherwise, depth)?;
        if explains {
            otherwise.insert(0, ConditionOp::Explain.into());
        }
        let steps = Steps { explains, then: then_steps, otherwise: otherwise_steps };
        Ok((SubTxn { compares, then, otherwise }, steps))
    }

    fn ops(&mut self, asked: &[v1::TxnOp], depth: usize) -> Result<(Vec<Op>, Vec<Step>), Refused> {
        let mut steps = Vec::with_capacity(asked.len());
        let mut ops = Vec::with_capacity(asked.len());
        for one in asked {
            self.place += 1;
            let (op, step) = self.op(one.op.as_ref().ok_or_else(|| refuse("op", "the operation is empty"))?, depth)?;
            ops.push(op);
            steps.push(step);
        }
        Ok((ops, steps))
    }

    fn op(&mut self, asked: &Asked, depth: usize) -> Result<(Op, Step), Refused> {
        let deeper = || depth.checked_sub(1).ok_or_else(|| refuse("op", "the transactions are nested too deep"));
        let of_keys = match asked {
            Asked::Put(put) => v1::op::Op::Put(put.clone()),
            Asked::Delete(delete) => v1::op::Op::Delete(delete.clone()),
            Asked::Range(range) => v1::op::Op::Range(range.clone()),
            Asked::Txn(body) => {
                let (sub, steps) = self.lists(&body.compares, &body.then, &body.otherwise, deeper()?)?;
                return Ok((Op::Txn(Box::new(sub)), Step::Txn(Box::new(steps))));
            }
            Asked::Once(once) => return self.once(once, deeper()?),
            other => return self.call(other),
        };
        Ok((kv::op(self.namespace, &v1::Op { op: Some(of_keys) }, 0)?, Step::Kv))
    }

    /// What belongs to a marker is a nested transaction that is decided on its absence.
    fn once(&mut self, once: &v1::TxnOnce, depth: usize) -> Result<(Op, Step), Refused> {
        let request = once.marker.as_ref().ok_or_else(|| refuse("once.marker", "name the marker"))?;
        of_the_whole(&request.namespace, request.request.is_some())?;
        let mark = markers::mark(request)?;
        let (mut then, steps) = self.ops(&once.ops, depth)?;
        then.insert(0, MarkerOp::Put(mark.clone()).into());
        let absent = condition(Condition::MarkerAbsent(mark.name.clone()), Relation::Equal);
        let sub = SubTxn { compares: vec![absent], then, otherwise: vec![MarkerOp::Tell(mark).into()] };
        Ok((Op::Txn(Box::new(sub)), Step::Once(Box::new(request.clone()), steps)))
    }

    fn call(&mut self, asked: &Asked) -> Result<(Op, Step), Refused> {
        let (path, body) = called(asked)?;
        if configs::looks_first(asked) {
            let (op, finish) = self.looked.pop_front().ok_or_else(mixed_up)?;
            return Ok((op, Step::Call(path, finish)));
        }
        let caller = Caller { idempotency_key: self.drawn()?, deadline: None };
        let Plan::Write(mut txn, finish) = self.planned(path, body, &caller)? else {
            return Err(refuse("op", "this operation changes nothing"));
        };
        if !txn.compares.is_empty() || !txn.requires.is_empty() {
            return Err(refuse("op", "in a transaction say it with `compares` and `requires`"));
        }
        match (txn.then.pop(), txn.then.is_empty()) {
            (Some(op), true) => Ok((op, Step::Call(path, finish))),
            _ => Err(refuse("op", "this operation stands alone")),
        }
    }

    fn planned(&self, path: &'static str, body: Bytes, caller: &Caller) -> Result<Plan, Refused> {
        if let Some(plan) = self.plans.get(path) {
            return plan(self.context, caller, body);
        }
        match path {
            "/tenure.v1.Sessions/Create" => sessions::create(self.context, caller, decoded(body)?),
            "/tenure.v1.Sessions/End" => sessions::end(caller, &decoded(body)?),
            "/tenure.v1.Locks/Acquire" => locks::acquire(self.context, caller, decoded(body)?),
            "/tenure.v1.Locks/Release" => locks::release(caller, &decoded(body)?),
            _ => Err(refuse("op", "this operation stands alone")),
        }
    }

    /// A request id for what an operation draws, so that the whole is the same when it is sent again.
    fn drawn(&self) -> Result<Option<String>, Refused> {
        let Some(id) = &self.request_id else { return Ok(None) };
        let session = sessions::id_for(Some(id))?;
        let half = |seq| sessions::id_for(Some(&RequestId::Session { session, seq, acked_below: 0 }));
        let (high, low) = (half(2 * self.place)?, half(2 * self.place + 1)?);
        Ok(Some(format!("{:016x}{:016x}", high.0, low.0)))
    }

    fn required(&self, check: &v1::Check) -> Result<Condition, Refused> {
        if check.not {
            return Err(refuse("requires.not", "a requirement is about what is so"));
        }
        match self.compare(check)?.target {
            CompareTarget::Condition(condition) => Ok(*condition),
            _ => Err(refuse("requires.key", "keys are compared, not required")),
        }
    }

    fn compare(&self, check: &v1::Check) -> Result<Compare, Refused> {
        use v1::check::Fact;
        let about = match check.fact.as_ref().ok_or_else(|| refuse("compares.fact", "a check names a fact"))? {
            Fact::Key(_) if check.not => {
                return Err(refuse("compares.not", "a compare of keys has a relation of its own"));
            }
            Fact::Key(key) => return kv::compare(self.namespace, key),
            Fact::SessionAlive(alive) => {
                Condition::SessionAlive(match session_id("compares.session_alive.session", alive.session)? {
                    SessionId(0) => return Err(refuse("compares.session_alive.session", "name the session")),
                    id => id,
                })
            }
            Fact::LockHeld(lock) if lock.name.is_empty() => {
                return Err(refuse("compares.lock_held.name", "the name of a lock is empty"));
            }
            Fact::LockHeld(lock) => {
                Condition::LockHeld(HeldLock { name: lock.name.as_bytes().into(), token: Revision(lock.token) })
            }
            Fact::MarkerAbsent(marker) => Condition::MarkerAbsent(markers::name(&marker.marker, &marker.fields)?),
            Fact::AttemptValid(of) => {
                let name = RecordName::new(&of.scope, &of.key);
                Condition::AttemptValid(HeldAttempt { name, attempt: Revision(of.attempt) })
            }
            Fact::ReceiptValid(of) => {
                let id = JobId::parse(&of.id);
                let id = id.ok_or_else(|| refuse("compares.receipt_valid.id", "this is not the id of a job"))?;
                Condition::ReceiptValid(Receipt { id, token: Revision(of.token) })
            }
            Fact::Leads(led) if led.name.is_empty() => {
                return Err(refuse("compares.leads.name", "name the election"));
            }
            Fact::Leads(led) => {
                Condition::Leads(HeldLock { name: led.name.as_bytes().into(), token: Revision(led.token) })
            }
            Fact::Counter(range) if range.name.is_empty() => {
                return Err(refuse("compares.counter.name", "name the counter"));
            }
            Fact::Counter(range) => Condition::CounterWithin(CounterWithin {
                name: range.name.as_bytes().into(),
                min: range.min.unwrap_or(i64::MIN),
                max: range.max.unwrap_or(i64::MAX),
            }),
            Fact::Config(at) => {
                configs::check_key_of("compares.config.key", &at.key)?;
                Condition::ConfigAt(ConfigAt { key: at.key.as_str().into(), version: at.version })
            }
            Fact::Schedule(at) => {
                let ScheduleName { name } = schedules::named("compares.schedule.name", &at.name)?;
                Condition::ScheduleAt(ScheduleAt { name, changed: Revision(at.revision) })
            }
            Fact::Registered(asked) => Condition::Registered(registry::registered(asked)?),
        };
        Ok(condition(about, if check.not { Relation::NotEqual } else { Relation::Equal }))
    }
}

fn condition(about: Condition, relation: Relation) -> Compare {
    // The span of such a compare is not looked at.
    let span = Span::one(tenure_machine::Key::from_bytes(b""));
    Compare { span, relation, target: CompareTarget::Condition(Box::new(about)) }
}

fn decoded<Q: Message + Default>(body: Bytes) -> Result<Q, Refused> {
    Q::decode(body).map_err(|error| refuse("op", error.to_string()))
}

/// What belongs to the whole transaction is not said of one operation.
fn of_the_whole(namespace: &str, has_request: bool) -> Result<(), Refused> {
    if namespace.is_empty() && !has_request {
        return Ok(());
    }
    Err(refuse("op", "`namespace` and `request` belong to the whole transaction"))
}

impl Steps {
    fn answer(
        self,
        context: &Context,
        header: &v1::Header,
        reply: TxnReply,
        skipped: usize,
        remaining_ms: u64,
    ) -> Result<v1::TxnBodyReply, Refused> {
        let TxnReply { succeeded, results } = reply;
        let mut results = results.into_iter();
        let failed = if !succeeded && self.explains { results.next().as_ref().map(failed).transpose()? } else { None };
        let steps = if succeeded { self.then } else { self.otherwise };
        let answers = answers(context, header, steps, results.skip(skipped), remaining_ms)?;
        Ok(v1::TxnBodyReply { succeeded, answers, failed })
    }
}

fn answers(
    context: &Context,
    header: &v1::Header,
    steps: Vec<Step>,
    mut results: impl Iterator<Item = OpReply>,
    remaining_ms: u64,
) -> Result<Vec<v1::TxnAnswer>, Refused> {
    let mut answers = Vec::with_capacity(steps.len());
    for step in steps {
        let result = results.next().ok_or_else(mixed_up)?;
        let answer = step.answer(context, header, result, remaining_ms)?;
        answers.push(v1::TxnAnswer { answer: Some(answer) });
    }
    Ok(answers)
}

impl Step {
    fn answer(
        self,
        context: &Context,
        header: &v1::Header,
        result: OpReply,
        remaining_ms: u64,
    ) -> Result<Wire, Refused> {
        match (self, result) {
            (Self::Kv, result) => of_keys(&result),
            (Self::Call(path, finish), result) => {
                let result = Ok(TxnReply { succeeded: true, results: vec![result] });
                let revision = Revision(header.revision);
                let reply = Reply { revision, replayed: header.replayed, result };
                let answer = finish.with(context, Outcome::Write(Ok(Written { reply, remaining_ms })))?;
                answered(path, encode_answer(&answer))
            }
            (Self::Txn(steps), OpReply::Txn(reply)) => {
                steps.answer(context, header, reply, 0, remaining_ms).map(Wire::Txn)
            }
            (Self::Once(request, steps), OpReply::Txn(reply)) => {
                let mut results = reply.results.into_iter();
                let mark = results.next().ok_or_else(mixed_up)?;
                let (already_done, unconfirmed, marker) = markers::told(context, &request, mark)?;
                let steps = if reply.succeeded { steps } else { Vec::new() };
                let answers = answers(context, header, steps, results, remaining_ms)?;
                Ok(Wire::Once(v1::TxnOnceReply { already_done, marker: Some(marker), answers, unconfirmed }))
            }
            _ => Err(mixed_up()),
        }
    }
}

fn of_keys(result: &OpReply) -> Result<Wire, Refused> {
    use v1::op_reply::Result as Answer;
    match kv::op_answer(result)?.result {
        Some(Answer::Put(put)) => Ok(Wire::Put(put)),
        Some(Answer::Delete(delete)) => Ok(Wire::Delete(delete)),
        Some(Answer::Range(range)) => Ok(Wire::Range(range)),
        _ => Err(mixed_up()),
    }
}

fn failed(reply: &OpReply) -> Result<v1::FailedCompare, Refused> {
    let OpReply::Native(reply) = reply else { return Err(mixed_up()) };
    let NativeReply::Condition(ConditionReply::Failed(Failed { index, why, facts, record: found })) = &**reply else {
        return Err(mixed_up());
    };
    Ok(v1::FailedCompare {
        index: *index,
        message: why.to_string(),
        facts: facts.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
        current: found.as_ref().map(record),
    })
}

/// Operations that are calls of their own: their requests go to the call's plan, and its answer comes back without a header.
macro_rules! calls {
    ($($name:ident($reply:ident) = $path:literal;)*) => {
        fn called(asked: &Asked) -> Result<(&'static str, Bytes), Refused> {
            match asked {
                $(Asked::$name(request) => {
                    of_the_whole(&request.namespace, request.request.is_some())?;
                    Ok(($path, request.encode_to_vec().into()))
                })*
                _ => Err(refuse("op", "this operation stands alone")),
            }
        }

        fn answered(path: &str, answer: Bytes) -> Result<Wire, Refused> {
            match path {
                $($path => {
                    let mut answer = v1::$reply::decode(answer).map_err(|_| mixed_up())?;
                    answer.header = None;
                    Ok(Wire::$name(answer))
                })*
                _ => Err(mixed_up()),
            }
        }
    };
}

calls! {
    SessionCreate(SessionCreateReply) = "/tenure.v1.Sessions/Create";
    SessionEnd(SessionEndReply) = "/tenure.v1.Sessions/End";
    LockAcquire(LockAcquireReply) = "/tenure.v1.Locks/Acquire";
    LockRelease(LockReleaseReply) = "/tenure.v1.Locks/Release";
    MarkerClaim(MarkerClaimReply) = "/tenure.v1.Markers/Claim";
    MarkerConfirm(MarkerConfirmReply) = "/tenure.v1.Markers/Confirm";
    MarkerRelease(MarkerReleaseReply) = "/tenure.v1.Markers/Release";
    MarkerDelete(MarkerDeleteReply) = "/tenure.v1.Markers/Delete";
    CounterAdd(CounterAddReply) = "/tenure.v1.Counters/Add";
    CounterSet(CounterSetReply) = "/tenure.v1.Counters/Set";
    CounterDelete(CounterDeleteReply) = "/tenure.v1.Counters/Delete";
    SequenceNext(SequenceNextReply) = "/tenure.v1.Sequences/Next";
    IdempotencyBegin(IdempotencyBeginReply) = "/tenure.v1.Idempotency/Begin";
    IdempotencyHeartbeat(IdempotencyHeartbeatReply) = "/tenure.v1.Idempotency/Heartbeat";
    IdempotencyCheckpoint(IdempotencyCheckpointReply) = "/tenure.v1.Idempotency/Checkpoint";
    IdempotencyComplete(IdempotencyCompleteReply) = "/tenure.v1.Idempotency/Complete";
    IdempotencyFail(IdempotencyFailReply) = "/tenure.v1.Idempotency/Fail";
    IdempotencyReconcile(IdempotencyReconcileReply) = "/tenure.v1.Idempotency/Reconcile";
    Reserve(ReserveReply) = "/tenure.v1.Reservations/Reserve";
    ReservationConfirm(ReservationReply) = "/tenure.v1.Reservations/Confirm";
    ReservationCancel(ReservationReply) = "/tenure.v1.Reservations/Cancel";
    ReservationExtend(ReservationReply) = "/tenure.v1.Reservations/Extend";
    PoolCreate(PoolReply) = "/tenure.v1.Pools/Create";
    PoolResize(PoolReply) = "/tenure.v1.Pools/Resize";
    PoolRestock(PoolReply) = "/tenure.v1.Pools/Restock";
    PoolReturn(PoolReply) = "/tenure.v1.Pools/Return";
    PoolDelete(PoolReply) = "/tenure.v1.Pools/Delete";
    JobEnqueue(EnqueueReply) = "/tenure.v1.Queues/Enqueue";
    JobReceive(ReceiveReply) = "/tenure.v1.Queues/Receive";
    JobAck(ReceiveReply) = "/tenure.v1.Queues/Ack";
    JobNack(MoveReply) = "/tenure.v1.Queues/Nack";
    JobRelease(MoveReply) = "/tenure.v1.Queues/Release";
    JobHeartbeat(JobHeartbeatReply) = "/tenure.v1.Queues/Heartbeat";
    JobCancel(MoveReply) = "/tenure.v1.Queues/Cancel";
    ElectionCampaign(CampaignReply) = "/tenure.v1.Elections/Campaign";
    ElectionProclaim(ProclaimReply) = "/tenure.v1.Elections/Proclaim";
    ElectionResign(ResignReply) = "/tenure.v1.Elections/Resign";
    ConfigPublish(ConfigChangeReply) = "/tenure.v1.Configs/Publish";
    ConfigRollback(ConfigChangeReply) = "/tenure.v1.Configs/Rollback";
    ConfigStage(ConfigChangeReply) = "/tenure.v1.Configs/Stage";
    ConfigPromote(ConfigChangeReply) = "/tenure.v1.Configs/Promote";
    ConfigAbort(ConfigChangeReply) = "/tenure.v1.Configs/Abort";
    ConfigDelete(ConfigChangeReply) = "/tenure.v1.Configs/Delete";
    ServiceRegister(ServiceRegisterReply) = "/tenure.v1.Services/Register";
    ServiceDeregister(ServiceDeregisterReply) = "/tenure.v1.Services/Deregister";
    ServiceHeartbeat(ServiceHeartbeatReply) = "/tenure.v1.Services/Heartbeat";
    ServiceDrain(ServiceDrainReply) = "/tenure.v1.Services/Drain";
    ServiceGuard(ServiceGuardReply) = "/tenure.v1.Services/Guard";
    SchedulePut(SchedulePutReply) = "/tenure.v1.Schedules/Put";
    ScheduleDelete(ScheduleDeleteReply) = "/tenure.v1.Schedules/Delete";
    SchedulePause(SchedulePauseReply) = "/tenure.v1.Schedules/Pause";
    ScheduleResume(ScheduleResumeReply) = "/tenure.v1.Schedules/Resume";
    ScheduleRun(ScheduleRunReply) = "/tenure.v1.Schedules/Run";
}
