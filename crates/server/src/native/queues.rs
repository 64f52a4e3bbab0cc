//! Native queues: enqueue, receive, settle, prolong; settings, dead letters, purges; looks at queues and jobs.
//!
//! Promises. A wait is bound to who waits: without a request id it ends with its call, alone or on a pipeline, and never outlasts the deadline of
//! the call. A moment of the wall clock is turned into a delay here, once, before the entry.
//! Not promised. That a job whose delivery was on its way when its caller went is not lost to that attempt: it comes back after its visibility.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use prost::Message as _;
use tenure_machine::{
    Ack, AckJobs, Breaker, CancelJob, ConfigureQueue, DeadFilter, Dedup, DedupScope, Delivered, Enqueue,
    JOB_HEADERS_MAX, JOB_KEY_MAX, JOB_RESULT_MAX, JOB_STATES, JOBS_PER_CALL, JobHeartbeat, JobId, JobInfo, JobState,
    JobTerms, Nack, NamespaceId, NewJob, OnDead, OnDuplicate, Purge, QUEUE_NAME_MAX, QueueInfo, QueueOp, QueueReply,
    QueueSettings, RECEIVE_PLACES_MAX, Receipt, Receive, Received, Redrive, RequestId, Revision, Settled, Txn,
    waiting_receiver,
};
use tenure_wire::Spaced;
use tenure_wire::tenure::v1;

use super::sessions::{id_for, page_limit};
use super::{
    Caller, Changed, Finish, NativeFinish, Plan, PlanFn, Refused, change, check_size, decoded, either, look, mixed_up,
    namespace, refusal, refuse, reply_of, request_id, run, seen, text, text_or_bytes, txn_of, txn_under,
};
use crate::Context;
use crate::driver::View;
use crate::rpc::Router;
use crate::status as words;

const PAYLOAD_MAX: usize = 256 << 10;
const HEADERS_MAX: usize = 64;
const WAIT_MAX_MS: u64 = 20_000;
const VISIBILITY_MIN_MS: u64 = 1_000;
const VISIBILITY_MAX_MS: u64 = 43_200_000;
const WINDOW_DEFAULT_MS: u64 = 600_000;
const WINDOW_MAX_MS: u64 = 604_800_000;
const RETENTION_MAX_MS: u64 = 2_592_000_000;
const DELAY_MAX_MS: u64 = 31_622_400_000;
const TEXT_MAX: usize = 255;
const SWEPT_MAX: u32 = 1_000;
/// A longer payload is left out of lists.
const LISTED_PAYLOAD_MAX: usize = 1_024;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    change(router, context, "/tenure.v1.Queues/Enqueue", enqueue, |_, _, changed| {
        let QueueReply::Enqueued(jobs) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        let jobs = jobs.iter().map(|job| v1::EnqueuedJob { id: job.id.to_string(), duplicate: job.duplicate });
        Ok(v1::EnqueueReply { header: Some(changed.header), jobs: jobs.collect() })
    });
    waiting(router, context, "/tenure.v1.Queues/Receive", plan_receive);
    waiting(router, context, "/tenure.v1.Queues/Ack", ack);
    change(router, context, "/tenure.v1.Queues/Nack", nack, |_, _, changed| moved(changed));
    change(router, context, "/tenure.v1.Queues/Release", release, |_, _, changed| moved(changed));
    change(router, context, "/tenure.v1.Queues/Cancel", cancel, |_, _, changed| moved(changed));
    change(router, context, "/tenure.v1.Queues/Heartbeat", heartbeat, |_, _, changed| {
        let QueueReply::Beat(beat) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::JobHeartbeatReply {
            header: Some(changed.header),
            remaining_ms: beat.remaining_ms,
            cancel_requested: beat.cancel_requested,
            should_yield: beat.should_yield,
        })
    });
    change(router, context, "/tenure.v1.Queues/Leave", leave, |_, _, changed| {
        let QueueReply::Left(waits) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::LeaveReply { header: Some(changed.header), waits })
    });
    change(router, context, "/tenure.v1.Queues/Redrive", redrive, |_, _, changed| swept(changed));
    change(router, context, "/tenure.v1.Queues/Purge", purge, |_, _, changed| swept(changed));
    change(router, context, "/tenure.v1.Queues/Configure", configure, |_, _, changed| {
        let QueueReply::Configured(settings) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::QueueConfigureReply { header: Some(changed.header), settings: Some(shown_settings(&settings)) })
    });
    look(router, context, "/tenure.v1.Queues/Get", |request| request.stale, get);
    look(router, context, "/tenure.v1.Queues/List", |request| request.stale, list);
    look(router, context, "/tenure.v1.Queues/GetJob", |request| request.stale, get_job);
    look(router, context, "/tenure.v1.Queues/ListJobs", |request| request.stale, list_jobs);
}

// ---- Waits ----

/// Receivers that wait under a connection, by the id of the request; what is left when it ends, leaves.
#[derive(Default)]
pub(crate) struct OpenWaits {
    context: Option<Context>,
    waits: Mutex<BTreeMap<u64, Leaving>>,
}

struct Leaving {
    namespace: NamespaceId,
    receiver: Box<[u8]>,
}

impl OpenWaits {
    pub(crate) fn of(context: &Context) -> Self {
        Self { context: Some(context.clone()), waits: Mutex::default() }
    }

    /// Notes the wait that this plan may become. With a request id the caller may come back for it from elsewhere, so it stays.
    pub(crate) fn note(&self, id: u64, plan: &Plan) {
        let Plan::Write(txn, _) = plan else { return };
        if let (Some(receiver), None) = (waiting_receiver(txn), &txn.request) {
            let leaving = Leaving { namespace: txn.namespace, receiver: receiver.into() };
            self.waits.lock().unwrap_or_else(PoisonError::into_inner).insert(id, leaving);
        }
    }

    pub(crate) fn answered(&self, id: u64) {
        let mut waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        if !waits.is_empty() {
            waits.remove(&id);
        }
    }
}

impl Drop for OpenWaits {
    fn drop(&mut self) {
        let Some(context) = &self.context else { return };
        let waits = std::mem::take(&mut *self.waits.lock().unwrap_or_else(PoisonError::into_inner));
        for Leaving { namespace, receiver } in waits.into_values() {
            context.write_detached(Txn { namespace, ..Txn::of(QueueOp::Leave(receiver).into()) });
        }
    }
}

/// Mounts a call that may wait for jobs: what `change` does, and the wait ends with the call.
fn waiting<Q, P>(router: &mut Router, context: &Context, path: &'static str, plan: P)
where
    Q: prost::Message + Default + Spaced + 'static,
    P: Fn(&Caller, &Q) -> Result<Txn, Refused> + Send + Sync + 'static,
{
    let planned: PlanFn = Arc::new(move |_: &Context, caller: &Caller, message: Bytes| {
        let request = decoded(message)?;
        let txn = plan(caller, &request)?;
        let finish: NativeFinish = Box::new(move |_, changed| Ok(received(changed)?.encode_to_vec().into()));
        Ok(Plan::Write(txn, Finish::Native(finish)))
    });
    router.plans.insert(path, planned.clone());
    let context = context.clone();
    router.unary(path, move |call, message| {
        let (context, planned) = (context.clone(), planned.clone());
        async move {
            check_size(&context, message.len())?;
            let plan = planned(&context, &Caller::of(&call), message).map_err(refusal)?;
            let waits = OpenWaits::of(&context);
            waits.note(0, &plan);
            let answer = run(&context, plan).await;
            waits.answered(0);
            answer
        }
    });
}

fn received(changed: Changed) -> Result<v1::ReceiveReply, Refused> {
    let QueueReply::Received(Received { jobs, settled, waited_ms }) = reply_of(changed.reply)? else {
        return Err(mixed_up());
    };
    Ok(v1::ReceiveReply {
        header: Some(changed.header),
        jobs: jobs.into_iter().map(delivered).collect(),
        settled: settled.into_iter().map(settled_receipt).collect(),
        waited_ms,
    })
}

fn settled_receipt(settled: Settled) -> v1::SettledReceipt {
    let error = settled.refusal.map_or_else(String::new, |refusal| refusal.why.into());
    v1::SettledReceipt { id: settled.id.to_string(), again: settled.again, error }
}

fn delivered(job: Delivered) -> v1::DeliveredJob {
    let (payload, payload_bytes) = text_or_bytes(&job.payload);
    let terms = job.terms.as_deref();
    v1::DeliveredJob {
        id: job.id.to_string(),
        token: job.token.0,
        queue: text(&job.queue),
        payload,
        payload_bytes,
        attempt: job.attempt,
        max_attempts: job.max_attempts,
        visibility_ms: job.visibility_ms,
        age_ms: job.age_ms,
        priority: job.priority,
        group: terms.and_then(|terms| terms.group.as_deref()).map(text).unwrap_or_default(),
        tenant: terms.and_then(|terms| terms.tenant.as_deref()).map(text).unwrap_or_default(),
        headers: terms.map(headers_of).unwrap_or_default(),
        traceparent: terms.map_or_else(String::new, |terms| terms.traceparent.to_string()),
        tracestate: terms.map_or_else(String::new, |terms| terms.tracestate.to_string()),
        last_error: job.last_error.into(),
    }
}

pub(crate) fn headers_of(terms: &JobTerms) -> BTreeMap<String, String> {
    terms.headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

// ---- Requests ----

fn enqueue(_: &Context, caller: &Caller, request: &v1::EnqueueRequest) -> Result<Txn, Refused> {
    if request.jobs.is_empty() || request.jobs.len() > JOBS_PER_CALL {
        return Err(refuse("jobs", format!("one call enqueues 1 to {JOBS_PER_CALL} jobs")));
    }
    let jobs = request.jobs.iter().map(new_job).collect::<Result<Vec<_>, _>>()?;
    let op = QueueOp::Enqueue(Enqueue { queue: queue_name("queue", &request.queue)?, jobs });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

pub(crate) fn new_job(job: &v1::NewJob) -> Result<NewJob, Refused> {
    let payload = either("payload", &job.payload, &job.payload_bytes)?;
    if payload.len() > PAYLOAD_MAX {
        return Err(Box::new(words::too_large(payload.len(), PAYLOAD_MAX)));
    }
    if !(-8..=7).contains(&job.priority) {
        return Err(refuse("priority", "a priority is between -8 and 7"));
    }
    let run_at_ms = (job.run_at_unix_ms > 0).then_some(job.run_at_unix_ms);
    let delay_ms = match (job.delay_ms, run_at_ms) {
        (_, None) => job.delay_ms,
        (0, Some(at)) => at.saturating_sub(unix_ms()),
        _ => return Err(refuse("run_at_unix_ms", "there is a delay already")),
    };
    if delay_ms > DELAY_MAX_MS {
        return Err(refuse("delay_ms", format!("a delay has at most {DELAY_MAX_MS} ms")));
    }
    let on_duplicate = match v1::OnDuplicate::try_from(job.on_duplicate) {
        Ok(v1::OnDuplicate::ReturnExisting) => OnDuplicate::ReturnExisting,
        Ok(v1::OnDuplicate::ReplacePayload) => OnDuplicate::ReplacePayload,
        Ok(v1::OnDuplicate::Error) => OnDuplicate::Error,
        Err(_) => return Err(refuse("on_duplicate", "there is no such way with duplicates")),
    };
    let terms = terms(job)?;
    let terms = (terms != JobTerms::default()).then(|| Arc::new(terms));
    Ok(NewJob { payload: payload.into(), delay_ms, run_at_ms, priority: job.priority, terms, on_duplicate })
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn terms(job: &v1::NewJob) -> Result<JobTerms, Refused> {
    let bytes: usize = job.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    if job.headers.len() > HEADERS_MAX || bytes + job.traceparent.len() + job.tracestate.len() > JOB_HEADERS_MAX {
        return Err(refuse(
            "headers",
            format!("a job has at most {HEADERS_MAX} headers and {JOB_HEADERS_MAX} bytes of them"),
        ));
    }
    if job.max_attempts > 1_000 {
        return Err(refuse("max_attempts", "there are 1 to 1000 attempts"));
    }
    if job.retention_ms.is_some_and(|ms| ms > RETENTION_MAX_MS) {
        return Err(refuse("retention_ms", format!("a record is kept for at most {RETENTION_MAX_MS} ms")));
    }
    if job.ttl_ms > DELAY_MAX_MS {
        return Err(refuse("ttl_ms", format!("a time to live has at most {DELAY_MAX_MS} ms")));
    }
    Ok(JobTerms {
        tenant: named("tenant", &job.tenant)?,
        group: named("group", &job.group)?,
        dedup: dedup(job)?,
        max_attempts: job.max_attempts,
        visibility_ms: visibility("visibility_ms", job.visibility_ms)?,
        retention_ms: job.retention_ms,
        ttl_ms: job.ttl_ms,
        headers: job.headers.iter().map(|(name, value)| (name.as_str().into(), value.as_str().into())).collect(),
        traceparent: job.traceparent.as_str().into(),
        tracestate: job.tracestate.as_str().into(),
    })
}

fn dedup(job: &v1::NewJob) -> Result<Option<Dedup>, Refused> {
    let scope = match v1::DedupScope::try_from(job.dedup_scope) {
        Ok(v1::DedupScope::Window) => DedupScope::Window(match job.dedup_window_ms {
            0 => WINDOW_DEFAULT_MS,
            ms if ms > WINDOW_MAX_MS => {
                return Err(refuse("dedup_window_ms", format!("a window has at most {WINDOW_MAX_MS} ms")));
            }
            ms => ms,
        }),
        Ok(_) if job.dedup_window_ms > 0 => return Err(refuse("dedup_window_ms", "the scope is no window")),
        Ok(v1::DedupScope::UntilDone) => DedupScope::UntilDone,
        Ok(v1::DedupScope::UntilStarted) => DedupScope::UntilStarted,
        Err(_) => return Err(refuse("dedup_scope", "there is no such scope")),
    };
    Ok(named("dedup_key", &job.dedup_key)?.map(|key| Dedup { key, scope }))
}

fn named(field: &str, text: &str) -> Result<Option<Arc<[u8]>>, Refused> {
    if text.len() > JOB_KEY_MAX {
        return Err(refuse(field, format!("it has at most {JOB_KEY_MAX} bytes")));
    }
    Ok((!text.is_empty()).then(|| text.as_bytes().into()))
}

fn visibility(field: &str, ms: u64) -> Result<u64, Refused> {
    if ms != 0 && !(VISIBILITY_MIN_MS..=VISIBILITY_MAX_MS).contains(&ms) {
        let why = format!("it is between {VISIBILITY_MIN_MS} and {VISIBILITY_MAX_MS} ms");
        return Err(refuse(field, why));
    }
    Ok(ms)
}

pub(crate) fn queue_name(field: &str, name: &str) -> Result<Box<[u8]>, Refused> {
    if name.is_empty() || name.len() > QUEUE_NAME_MAX || name.contains('\0') {
        return Err(refuse(field, format!("the name of a queue has 1 to {QUEUE_NAME_MAX} bytes, none of them zero")));
    }
    Ok(name.as_bytes().into())
}

fn plan_receive(caller: &Caller, request: &v1::ReceiveRequest) -> Result<Txn, Refused> {
    let id = request_id(request.request.as_ref(), caller)?;
    let receive = receive("", caller, id.as_ref(), request)?;
    txn_under(&request.namespace, id, QueueOp::Receive(receive))
}

fn receive(
    within: &str,
    caller: &Caller,
    id: Option<&RequestId>,
    request: &v1::ReceiveRequest,
) -> Result<Receive, Refused> {
    let field = |name: &str| format!("{within}{name}");
    if request.queues.is_empty() || request.queues.len() > RECEIVE_PLACES_MAX {
        return Err(refuse(&field("queues"), format!("a receive names 1 to {RECEIVE_PLACES_MAX} queues")));
    }
    if request.groups.len() > RECEIVE_PLACES_MAX || (!request.groups.is_empty() && request.queues.len() > 1) {
        return Err(refuse(&field("groups"), format!("at most {RECEIVE_PLACES_MAX} groups, of one queue")));
    }
    if request.max as usize > JOBS_PER_CALL {
        return Err(refuse(&field("max"), format!("a receive gets at most {JOBS_PER_CALL} jobs")));
    }
    if request.wait_ms > WAIT_MAX_MS {
        return Err(refuse(&field("wait_ms"), format!("a receive waits at most {WAIT_MAX_MS} ms")));
    }
    if request.worker.len() > TEXT_MAX || request.receiver.len() > TEXT_MAX {
        return Err(refuse(&field("worker"), format!("a worker and a receiver have at most {TEXT_MAX} bytes")));
    }
    let queue = |name: &String| queue_name(&field("queues"), name);
    let group =
        |name: &String| named(&field("groups"), name)?.ok_or_else(|| refuse(&field("groups"), "a group has a name"));
    // Without a request id nobody comes back for the wait, so it ends with the call, and with its deadline.
    let left = caller
        .deadline
        .filter(|_| id.is_none())
        .map(|deadline| deadline.saturating_duration_since(tokio::time::Instant::now()).as_millis() as u64);
    let wait_ms = left.map_or(request.wait_ms, |left| request.wait_ms.min(left));
    let receiver = match (request.receiver.is_empty(), wait_ms) {
        (true, 1..) => format!("{:016x}", id_for(id)?.0).into_bytes().into(),
        _ => request.receiver.as_bytes().into(),
    };
    Ok(Receive {
        queues: request.queues.iter().map(queue).collect::<Result<_, _>>()?,
        groups: request.groups.iter().map(group).collect::<Result<_, _>>()?,
        max: request.max.max(1),
        wait_ms,
        visibility_ms: visibility(&field("visibility_ms"), request.visibility_ms)?,
        worker: request.worker.as_str().into(),
        receiver,
        settled: Vec::new(),
    })
}

fn ack(caller: &Caller, request: &v1::AckRequest) -> Result<Txn, Refused> {
    if request.receipts.is_empty() || request.receipts.len() > JOBS_PER_CALL {
        return Err(refuse("receipts", format!("one call settles 1 to {JOBS_PER_CALL} receipts")));
    }
    let id = request_id(request.request.as_ref(), caller)?;
    let one = |receipt: &v1::JobReceipt| {
        let result = either("receipts.result", &receipt.result, &receipt.result_bytes)?;
        if result.len() > JOB_RESULT_MAX {
            return Err(refuse("receipts.result", format!("a result has at most {JOB_RESULT_MAX} bytes")));
        }
        Ok(Ack { receipt: self::receipt("receipts.id", &receipt.id, receipt.token)?, result: result.into() })
    };
    let acks = request.receipts.iter().map(one).collect::<Result<Vec<_>, Refused>>()?;
    let receive = match &request.receive {
        Some(next) => Some(Box::new(receive("receive.", caller, id.as_ref(), next)?)),
        None => None,
    };
    txn_under(&request.namespace, id, QueueOp::Ack(AckJobs { acks, each: request.each, receive }))
}

fn job_id(field: &str, id: &str) -> Result<JobId, Refused> {
    JobId::parse(id).ok_or_else(|| refuse(field, format!("`{id}` is not the id of a job, such as 1042-0")))
}

fn receipt(field: &str, id: &str, token: u64) -> Result<Receipt, Refused> {
    if token == 0 {
        return Err(refuse("token", "a receipt has the token of its delivery"));
    }
    Ok(Receipt { id: job_id(field, id)?, token: Revision(token) })
}

fn nack(_: &Context, caller: &Caller, request: &v1::NackRequest) -> Result<Txn, Refused> {
    if request.delay_ms.is_some_and(|ms| ms > DELAY_MAX_MS) {
        return Err(refuse("delay_ms", format!("a delay has at most {DELAY_MAX_MS} ms")));
    }
    let op = QueueOp::Nack(Nack {
        receipt: receipt("id", &request.id, request.token)?,
        delay_ms: request.delay_ms,
        reason: request.reason.as_str().into(),
        dead: request.dead,
    });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn release(_: &Context, caller: &Caller, request: &v1::JobReleaseRequest) -> Result<Txn, Refused> {
    let op = QueueOp::Release(receipt("id", &request.id, request.token)?);
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn heartbeat(_: &Context, caller: &Caller, request: &v1::JobHeartbeatRequest) -> Result<Txn, Refused> {
    if request.progress.len() > JOB_RESULT_MAX {
        return Err(refuse("progress", format!("a progress has at most {JOB_RESULT_MAX} bytes")));
    }
    let op = QueueOp::Heartbeat(JobHeartbeat {
        receipt: receipt("id", &request.id, request.token)?,
        extend_ms: visibility("extend_ms", request.extend_ms)?,
        progress: (!request.progress.is_empty()).then(|| request.progress.as_bytes().into()),
    });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn leave(_: &Context, caller: &Caller, request: &v1::LeaveRequest) -> Result<Txn, Refused> {
    if request.receiver.is_empty() || request.receiver.len() > TEXT_MAX {
        return Err(refuse("receiver", format!("a receiver has 1 to {TEXT_MAX} bytes")));
    }
    let op = QueueOp::Leave(request.receiver.as_bytes().into());
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn cancel(_: &Context, caller: &Caller, request: &v1::JobCancelRequest) -> Result<Txn, Refused> {
    let (id, reason) = (job_id("id", &request.id)?, request.reason.as_str().into());
    let op = QueueOp::Cancel(CancelJob { id, reason, force: request.force });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn after(field: &str, text: &str) -> Result<Option<JobId>, Refused> {
    if text.is_empty() { Ok(None) } else { job_id(field, text).map(Some) }
}

fn redrive(_: &Context, caller: &Caller, request: &v1::RedriveRequest) -> Result<Txn, Refused> {
    if request.max > SWEPT_MAX || request.ids.len() > SWEPT_MAX as usize {
        return Err(refuse("max", format!("one call redrives at most {SWEPT_MAX} jobs")));
    }
    let op = QueueOp::Redrive(Redrive {
        queue: queue_name("queue", &request.queue)?,
        filter: DeadFilter {
            ids: request.ids.iter().map(|id| job_id("ids", id)).collect::<Result<_, _>>()?,
            contains: request.contains.as_str().into(),
            group: named("group", &request.group)?,
        },
        to: if request.to.is_empty() { Box::default() } else { queue_name("to", &request.to)? },
        rate: request.rate,
        max: request.max,
        after: after("after", &request.after)?,
        before: request.before,
    });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn state(field: &str, name: &str) -> Result<u8, Refused> {
    let place = JOB_STATES.iter().position(|state| *state == name);
    let place = place.ok_or_else(|| refuse(field, format!("a state is one of {}", JOB_STATES.join(", "))))?;
    Ok(place as u8)
}

fn purge(_: &Context, caller: &Caller, request: &v1::PurgeRequest) -> Result<Txn, Refused> {
    if request.confirm != request.queue {
        return Err(refuse("confirm", "a purge is confirmed with the name of its queue"));
    }
    let op = QueueOp::Purge(Purge {
        queue: queue_name("queue", &request.queue)?,
        states: request.states.iter().map(|name| state("states", name)).collect::<Result<_, _>>()?,
        confirm: request.confirm.as_bytes().into(),
        remove: request.remove,
    });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn configure(_: &Context, caller: &Caller, request: &v1::QueueConfigureRequest) -> Result<Txn, Refused> {
    let or = |value: u64, default: u64| if value == 0 { default } else { value };
    let breaker = request.breaker.map(|breaker| Breaker {
        percent: breaker.percent,
        window_ms: or(breaker.window_ms, 60_000),
        min: or(breaker.min, 10),
        pause_ms: or(breaker.pause_ms, 60_000),
    });
    let weight = |(tenant, weight): (&String, &u32)| match named("weights", tenant)? {
        Some(tenant) if *weight > 0 => Ok((tenant, *weight)),
        _ => Err(refuse("weights", "a tenant has a name and a weight of 1 to 1000")),
    };
    let op = QueueOp::Configure(ConfigureQueue {
        queue: queue_name("queue", &request.queue)?,
        visibility_ms: request.visibility_ms,
        max_attempts: request.max_attempts,
        backoff_first_ms: request.backoff_first_ms,
        backoff_max_ms: request.backoff_max_ms,
        jitter: request.jitter,
        retention_ms: request.retention_ms,
        done_max: request.done_max,
        dead_retention_ms: request.dead_retention_ms,
        group_in_flight: request.group_in_flight,
        on_dead: match v1::OnDead::try_from(request.on_dead) {
            Ok(v1::OnDead::Unchanged) => None,
            Ok(v1::OnDead::Pass) => Some(OnDead::Pass),
            Ok(v1::OnDead::Block) => Some(OnDead::Block),
            Err(_) => return Err(refuse("on_dead", "it is PASS or BLOCK")),
        },
        tenant_in_flight: request.tenant_in_flight,
        weights: request.weights.iter().map(weight).collect::<Result<_, Refused>>()?,
        jobs_max: request.jobs_max,
        breaker,
        paused: request.paused,
    });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

// ---- Answers ----

fn moved(changed: Changed) -> Result<v1::MoveReply, Refused> {
    let QueueReply::Moved(moved) = reply_of(changed.reply)? else { return Err(mixed_up()) };
    let state = JOB_STATES.get(usize::from(moved.state)).copied().unwrap_or_default().to_owned();
    Ok(v1::MoveReply { header: Some(changed.header), state, delay_ms: moved.delay_ms, attempt: moved.attempt })
}

fn swept(changed: Changed) -> Result<v1::SweepReply, Refused> {
    let QueueReply::Swept(swept) = reply_of(changed.reply)? else { return Err(mixed_up()) };
    let next = swept.next.map_or_else(String::new, |next| next.to_string());
    Ok(v1::SweepReply { header: Some(changed.header), count: swept.count, skipped: swept.skipped, next })
}

fn shown_settings(settings: &QueueSettings) -> v1::QueueSettings {
    let on_dead = match settings.on_dead {
        OnDead::Pass => v1::OnDead::Pass,
        OnDead::Block => v1::OnDead::Block,
    };
    v1::QueueSettings {
        visibility_ms: settings.visibility_ms,
        max_attempts: settings.max_attempts,
        backoff_first_ms: settings.backoff_first_ms,
        backoff_max_ms: settings.backoff_max_ms,
        jitter: settings.jitter,
        retention_ms: settings.retention_ms,
        done_max: settings.done_max,
        dead_retention_ms: settings.dead_retention_ms,
        group_in_flight: settings.group_in_flight,
        on_dead: on_dead.into(),
        tenant_in_flight: settings.tenant_in_flight,
        weights: settings.weights.iter().map(|(tenant, weight)| (text(tenant), *weight)).collect(),
        jobs_max: settings.jobs_max,
        breaker: settings.breaker.map(|breaker| v1::QueueBreaker {
            percent: breaker.percent,
            window_ms: breaker.window_ms,
            min: breaker.min,
            pause_ms: breaker.pause_ms,
        }),
        paused: settings.paused,
    }
}

// ---- Reads ----

fn get(view: &View<'_>, request: &v1::QueueGetRequest) -> Result<v1::QueueGetReply, Refused> {
    let found = view.machine.queue(namespace(&request.namespace)?, &queue_name("name", &request.name)?);
    let info = found.ok_or_else(|| no_queue(&request.name))?;
    Ok(v1::QueueGetReply { header: seen(view, request.stale), queue: Some(shown(&info, true)) })
}

fn no_queue(name: &str) -> Refused {
    Box::new(words::not_found(&format!("there is no queue `{name}`"), &[("name", name.to_owned())]))
}

fn list(view: &View<'_>, request: &v1::QueueListRequest) -> Result<v1::QueueListReply, Refused> {
    let (namespace, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let after = Some(request.after.as_bytes()).filter(|after| !after.is_empty());
    let page = view.machine.queues(namespace, request.prefix.as_bytes(), after, max);
    let queues: Vec<v1::Queue> = page.iter().map(|info| shown(info, false)).collect();
    let next = queues.last().filter(|_| queues.len() == max).map_or_else(String::new, |last| last.name.clone());
    Ok(v1::QueueListReply { header: seen(view, request.stale), queues, next })
}

fn shown(info: &QueueInfo, whole: bool) -> v1::Queue {
    let [scheduled, backoff, held, ready, leased, done, dead, cancelled] = info.counts;
    let tenant = |(tenant, ready, leased): &(Arc<[u8]>, u64, u64)| v1::TenantCount {
        tenant: text(tenant),
        ready: *ready,
        leased: *leased,
    };
    v1::Queue {
        name: text(&info.name),
        settings: Some(shown_settings(&info.settings)),
        scheduled,
        backoff,
        held,
        ready,
        leased,
        done,
        dead,
        cancelled,
        receivers: info.receivers,
        oldest_ready_ms: info.oldest_ready_ms,
        groups: info.groups,
        tenants: info.tenants.iter().filter(|_| whole).map(tenant).collect(),
        tripped_ms: info.tripped_ms,
    }
}

fn get_job(view: &View<'_>, request: &v1::JobGetRequest) -> Result<v1::JobGetReply, Refused> {
    let id = job_id("id", &request.id)?;
    let Some(info) = view.machine.job(namespace(&request.namespace)?, id) else {
        let why = format!("there is no job {id}");
        return Err(Box::new(words::not_found(&why, &[("name", id.to_string())])));
    };
    Ok(v1::JobGetReply { header: seen(view, request.stale), job: Some(shown_job(view, &info, usize::MAX)) })
}

fn list_jobs(view: &View<'_>, request: &v1::JobListRequest) -> Result<v1::JobListReply, Refused> {
    let (namespace, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let name = queue_name("queue", &request.queue)?;
    let ready = request.state.is_empty() || request.state == "ready";
    let state = if ready { 3 } else { usize::from(state("state", &request.state)?) };
    let after = after("after", &request.after)?;
    if ready && after.is_some() {
        return Err(refuse("after", "the jobs that are ready have no pages"));
    }
    if view.machine.queue(namespace, &name).is_none() {
        return Err(no_queue(&request.queue));
    }
    let page = view.machine.queue_jobs(namespace, &name, state, after, max);
    let jobs: Vec<v1::Job> = page.iter().map(|info| shown_job(view, info, LISTED_PAYLOAD_MAX)).collect();
    let next = jobs.last().filter(|_| jobs.len() == max && !ready).map_or_else(String::new, |last| last.id.clone());
    Ok(v1::JobListReply { header: seen(view, request.stale), jobs, next })
}

fn shown_job(view: &View<'_>, info: &JobInfo, payload_max: usize) -> v1::Job {
    let (job, now) = (&info.job, view.machine.stamp().0);
    let terms = job.terms.as_deref();
    let payload = if job.payload.len() > payload_max { &[][..] } else { &job.payload[..] };
    let (payload, payload_bytes) = text_or_bytes(payload);
    let (end, lease) = match &job.state {
        JobState::Leased(lease) => (None, Some(&**lease)),
        state => (state.finished(), None),
    };
    let until = match &job.state {
        JobState::Scheduled(at) | JobState::Backoff(at) => at.0,
        _ => lease.map(|lease| lease.until.0).or(end.map(|end| end.gone.0)).unwrap_or(0),
    };
    let (result, result_bytes) = end.map(|end| text_or_bytes(&end.result)).unwrap_or_default();
    let past = job.past.iter().flat_map(|past| past.iter()).map(|past| v1::PastAttempt {
        attempt: past.attempt,
        token: past.token.0,
        worker: past.worker.to_string(),
        began_ms: now.saturating_sub(past.since.0),
        ended_ms: now.saturating_sub(past.ended.0),
        how: past.how.name().to_owned(),
        error: past.error.to_string(),
    });
    v1::Job {
        id: info.id.to_string(),
        queue: text(&info.queue),
        state: job.state.name().to_owned(),
        payload,
        payload_bytes,
        attempt: job.attempt,
        token: job.token.0,
        priority: job.priority(),
        group: terms.and_then(|terms| terms.group.as_deref()).map(text).unwrap_or_default(),
        tenant: terms.and_then(|terms| terms.tenant.as_deref()).map(text).unwrap_or_default(),
        dedup_key: terms.and_then(|terms| terms.dedup.as_ref()).map(|dedup| text(&dedup.key)).unwrap_or_default(),
        headers: terms.map(headers_of).unwrap_or_default(),
        traceparent: terms.map_or_else(String::new, |terms| terms.traceparent.to_string()),
        tracestate: terms.map_or_else(String::new, |terms| terms.tracestate.to_string()),
        age_ms: now.saturating_sub(job.enqueued.0),
        since_ms: now.saturating_sub(job.since().0),
        remaining_ms: until.saturating_sub(now),
        worker: lease.map_or_else(String::new, |lease| lease.worker.to_string()),
        progress: lease.map_or_else(String::new, |lease| text(&lease.progress)),
        cancel_requested: lease.is_some_and(|lease| lease.cancel),
        reason: end.map_or_else(String::new, |end| end.why.to_string()),
        result,
        result_bytes,
        attempts: past.collect(),
    }
}
