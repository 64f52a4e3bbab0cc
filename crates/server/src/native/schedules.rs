//! Native schedules: put, delete, pause, resume, run, look, list.
//!
//! Promises. A calendar is read here before it is stored, so that one that says nothing, or nothing that ever comes, is refused with its place. What is
//! shown of ticks to come is read from the stored calendar at that moment, by the wall clock of the member that answers.
//! Relies on. `crate::schedules`, on the leader, for the ticks themselves.

use std::time::{SystemTime, UNIX_EPOCH};

use tenure_machine::{
    CALENDAR_BYTES_MAX, DedupScope, Missed, NewJob, OpReply, Revision, SCHEDULE_NAME_MAX, Schedule, ScheduleName,
    ScheduleOp, SchedulePlan, SchedulePut, ScheduleReply, Txn,
};
use tenure_wire::tenure::v1;

use super::queues::{headers_of, new_job, queue_name};
use super::sessions::page_limit;
use super::{Caller, Refused, change, look, mixed_up, namespace, refuse, reply_of, seen, text, text_or_bytes, txn_of};
use crate::Context;
use crate::calendar::Calendar;
use crate::driver::View;
use crate::rpc::Router;
use crate::status as words;

/// Ticks to come that are shown of one schedule.
const TICKS: usize = 5;
const GRACE_DEFAULT_MS: u64 = 60_000;
const GRACE_MAX_MS: u64 = 86_400_000;
/// A tick up to this late is on its way.
const LATE_MS: u64 = 1_000;
/// A longer payload is left out of lists.
const LISTED_PAYLOAD_MAX: usize = 1_024;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    change(router, context, "/tenure.v1.Schedules/Put", plan_put, |_, request: &v1::SchedulePutRequest, changed| {
        let ScheduleReply::Stored(stored) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::SchedulePutReply {
            header: Some(changed.header),
            created: stored.created,
            revision: stored.changed.0,
            next_unix_ms: ticks(&calendar(request)?, None, TICKS),
        })
    });
    let delete = |_: &Context, caller: &Caller, request: &v1::ScheduleDeleteRequest| {
        let op = ScheduleOp::Delete(named("name", &request.name)?);
        txn_of(&request.namespace, request.request.as_ref(), caller, op)
    };
    change(router, context, "/tenure.v1.Schedules/Delete", delete, |_, _, changed| {
        let ScheduleReply::Deleted(deleted) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::ScheduleDeleteReply { header: Some(changed.header), deleted })
    });
    let pause = |_: &Context, caller: &Caller, request: &v1::SchedulePauseRequest| {
        let op = ScheduleOp::Pause(named("name", &request.name)?);
        txn_of(&request.namespace, request.request.as_ref(), caller, op)
    };
    change(router, context, "/tenure.v1.Schedules/Pause", pause, |_, _, changed| {
        let revision = done(changed.reply)?;
        Ok(v1::SchedulePauseReply { header: Some(changed.header), revision })
    });
    let resume = |_: &Context, caller: &Caller, request: &v1::ScheduleResumeRequest| {
        let op = ScheduleOp::Resume(named("name", &request.name)?);
        txn_of(&request.namespace, request.request.as_ref(), caller, op)
    };
    change(router, context, "/tenure.v1.Schedules/Resume", resume, |_, _, changed| {
        let revision = done(changed.reply)?;
        Ok(v1::ScheduleResumeReply { header: Some(changed.header), revision })
    });
    let run = |_: &Context, caller: &Caller, request: &v1::ScheduleRunRequest| {
        let op = ScheduleOp::Run(named("name", &request.name)?);
        txn_of(&request.namespace, request.request.as_ref(), caller, op)
    };
    change(router, context, "/tenure.v1.Schedules/Run", run, |_, _, changed| {
        let ScheduleReply::Ran(job) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        let job = v1::EnqueuedJob { id: job.id.to_string(), duplicate: job.duplicate };
        Ok(v1::ScheduleRunReply { header: Some(changed.header), job: Some(job) })
    });
    look(router, context, "/tenure.v1.Schedules/Get", |request| request.stale, get);
    look(router, context, "/tenure.v1.Schedules/List", |request| request.stale, list);
}

// ---- Requests ----

fn plan_put(_: &Context, caller: &Caller, request: &v1::SchedulePutRequest) -> Result<Txn, Refused> {
    let ScheduleName { name } = named("name", &request.name)?;
    calendar(request)?;
    let missed = match v1::MissedTicks::try_from(request.missed) {
        Ok(v1::MissedTicks::SkipMissed) => Missed::Skip,
        Ok(v1::MissedTicks::RunLastMissed) => Missed::RunOnce,
        Err(_) => return Err(refuse("missed", "it is SKIP_MISSED or RUN_LAST_MISSED")),
    };
    let grace_ms = match request.grace_ms {
        0 => GRACE_DEFAULT_MS,
        ms if ms > GRACE_MAX_MS => return Err(refuse("grace_ms", format!("a grace has at most {GRACE_MAX_MS} ms"))),
        ms => ms,
    };
    let plan = SchedulePlan {
        calendar: request.calendar.trim().into(),
        zone: request.time_zone.as_str().into(),
        queue: queue_name("queue", &request.queue)?,
        job: job(request)?,
        missed,
        grace_ms,
        no_overlap: request.no_overlap,
    };
    let op = ScheduleOp::Put(SchedulePut { name, plan, expect: expected(request.expect.as_ref())? });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn calendar(request: &v1::SchedulePutRequest) -> Result<Calendar, Refused> {
    for (field, text) in [("calendar", &request.calendar), ("time_zone", &request.time_zone)] {
        if text.len() > CALENDAR_BYTES_MAX {
            return Err(refuse(field, format!("at most {CALENDAR_BYTES_MAX} bytes are taken")));
        }
    }
    if request.calendar.is_empty() {
        return Err(refuse("calendar", "say when the ticks come, such as `0 3 * * *` or `@every 90s`"));
    }
    Calendar::read(&request.calendar, &request.time_zone).map_err(|wrong| refuse(wrong.field, wrong.why))
}

fn job(request: &v1::SchedulePutRequest) -> Result<NewJob, Refused> {
    let nothing = v1::NewJob::default();
    let job = request.job.as_ref().unwrap_or(&nothing);
    if job.run_at_unix_ms > 0 {
        return Err(refuse("job.run_at_unix_ms", "the calendar says when the job runs; a delay counts from each tick"));
    }
    if job.on_duplicate != v1::OnDuplicate::ReturnExisting as i32 {
        return Err(refuse("job.on_duplicate", "a tick whose job is there already enqueues nothing"));
    }
    if request.no_overlap && !job.dedup_key.is_empty() {
        return Err(refuse("job.dedup_key", "`no_overlap` is a key of its own"));
    }
    new_job(job)
}

fn expected(expect: Option<&v1::ScheduleExpect>) -> Result<Option<Revision>, Refused> {
    use v1::schedule_expect::Fact;
    let Some(expect) = expect else { return Ok(None) };
    match expect.fact {
        Some(Fact::Absent(true)) => Ok(Some(Revision(0))),
        Some(Fact::Absent(false)) => Err(refuse("expect.absent", "expect a revision of what is there")),
        Some(Fact::Revision(0)) => Err(refuse("expect.revision", "no change has this revision")),
        Some(Fact::Revision(revision)) => Ok(Some(Revision(revision))),
        None => Err(refuse("expect", "say what is expected, or leave it out")),
    }
}

pub(super) fn named(field: &str, name: &str) -> Result<ScheduleName, Refused> {
    if name.is_empty() || name.len() > SCHEDULE_NAME_MAX {
        return Err(refuse(field, format!("the name of a schedule has 1 to {SCHEDULE_NAME_MAX} bytes")));
    }
    Ok(ScheduleName { name: name.as_bytes().into() })
}

// ---- Answers ----

fn done(reply: OpReply) -> Result<u64, Refused> {
    match reply_of(reply)? {
        ScheduleReply::Done(revision) => Ok(revision.0),
        _ => Err(mixed_up()),
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// The first ticks to come: the one that the state has, or else from now on.
fn ticks(calendar: &Calendar, next: Option<u64>, count: usize) -> Vec<u64> {
    match next {
        None => calendar.ticks_after(unix_ms(), count),
        Some(next) => std::iter::once(next).chain(calendar.ticks_after(next, count - 1)).collect(),
    }
}

// ---- Reads ----

fn get(view: &View<'_>, request: &v1::ScheduleGetRequest) -> Result<v1::ScheduleGetReply, Refused> {
    let found = view.machine.object::<Schedule>(namespace(&request.namespace)?, &named("name", &request.name)?.name);
    let missing = || Box::new(words::not_found("there is no such schedule", &[("name", request.name.clone())]));
    let schedule = found.ok_or_else(missing)?;
    let schedule = Some(shown(&request.name, schedule, TICKS, usize::MAX));
    Ok(v1::ScheduleGetReply { header: seen(view, request.stale), schedule })
}

fn list(view: &View<'_>, request: &v1::ScheduleListRequest) -> Result<v1::ScheduleListReply, Refused> {
    let (namespace, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let after = Some(request.after.as_bytes()).filter(|after| !after.is_empty());
    let page = view.machine.objects::<Schedule>(namespace, request.prefix.as_bytes(), after, max);
    let shown = |(name, schedule): &(Box<[u8]>, &Schedule)| shown(&text(name), schedule, 1, LISTED_PAYLOAD_MAX);
    let schedules: Vec<v1::Schedule> = page.iter().map(shown).collect();
    let next = schedules.last().filter(|_| schedules.len() == max).map_or_else(String::new, |last| last.name.clone());
    Ok(v1::ScheduleListReply { header: seen(view, request.stale), schedules, next })
}

fn shown(name: &str, schedule: &Schedule, count: usize, payload_max: usize) -> v1::Schedule {
    let plan = &schedule.plan;
    let next = match schedule.next {
        _ if schedule.paused => Vec::new(),
        // What the state has need not be read from the calendar, which takes its time for a page of them.
        Some(next) if count == 1 => vec![next],
        next => Calendar::read(&plan.calendar, &plan.zone)
            .map_or_else(|_| next.into_iter().collect(), |calendar| ticks(&calendar, next, count)),
    };
    let late = schedule.next.map_or(0, |next| unix_ms().saturating_sub(next));
    let missed = match plan.missed {
        Missed::Skip => v1::MissedTicks::SkipMissed,
        Missed::RunOnce => v1::MissedTicks::RunLastMissed,
    };
    v1::Schedule {
        name: name.to_owned(),
        calendar: plan.calendar.to_string(),
        time_zone: plan.zone.to_string(),
        queue: text(&plan.queue),
        job: Some(shown_job(&plan.job, payload_max)),
        missed: missed.into(),
        grace_ms: plan.grace_ms,
        no_overlap: plan.no_overlap,
        paused: schedule.paused,
        revision: schedule.changed.0,
        last_unix_ms: schedule.last,
        next_unix_ms: next,
        late_ms: if late > LATE_MS { late } else { 0 },
        enqueued: schedule.enqueued,
        last_error: schedule.trouble.as_ref().map_or_else(String::new, |trouble| trouble.why.to_string()),
        last_error_unix_ms: schedule.trouble.as_ref().map_or(0, |trouble| trouble.at),
        job_id: schedule.job.as_ref().map_or_else(String::new, |job| job.id.to_string()),
    }
}

/// As it was put.
fn shown_job(job: &NewJob, payload_max: usize) -> v1::NewJob {
    let payload = if job.payload.len() > payload_max { &[][..] } else { &job.payload[..] };
    let (payload, payload_bytes) = text_or_bytes(payload);
    let shown =
        v1::NewJob { payload, payload_bytes, delay_ms: job.delay_ms, priority: job.priority, ..Default::default() };
    let Some(terms) = job.terms.as_deref() else { return shown };
    let (dedup_scope, dedup_window_ms) = match terms.dedup.as_ref().map(|dedup| dedup.scope) {
        None | Some(DedupScope::UntilDone) => (v1::DedupScope::UntilDone, 0),
        Some(DedupScope::Window(ms)) => (v1::DedupScope::Window, ms),
        Some(DedupScope::UntilStarted) => (v1::DedupScope::UntilStarted, 0),
    };
    v1::NewJob {
        group: terms.group.as_deref().map(text).unwrap_or_default(),
        tenant: terms.tenant.as_deref().map(text).unwrap_or_default(),
        dedup_key: terms.dedup.as_ref().map(|dedup| text(&dedup.key)).unwrap_or_default(),
        dedup_scope: dedup_scope.into(),
        dedup_window_ms,
        max_attempts: terms.max_attempts,
        visibility_ms: terms.visibility_ms,
        retention_ms: terms.retention_ms,
        ttl_ms: terms.ttl_ms,
        headers: headers_of(terms),
        traceparent: terms.traceparent.to_string(),
        tracestate: terms.tracestate.to_string(),
        ..shown
    }
}
