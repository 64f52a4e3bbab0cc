//! Queues in scripts.
//!
//! `enqueue QUEUE PAYLOAD...` with `delay= priority= group= tenant= key= scope=done|started|10m duplicate=replace|error attempts= ttl= visibility=
//! retention= header=`, `receive QUEUE[,QUEUE]` with `max= wait= worker= receiver= groups=a,b visibility=`, `ack JOB TOKEN...` with `result= each` and
//! `receive=QUEUE`, `nack JOB TOKEN` with `delay= reason= dead`, `hand-back JOB TOKEN`, `beat JOB TOKEN` with `extend= progress=`,
//! `leave RECEIVER`, `cancel-job JOB`, `redrive QUEUE [JOB...]`, `purge QUEUE` with `confirm= states=`, `queue QUEUE` with settings.

use super::Said;
use std::sync::Arc;
use tenure_machine::*;

pub(super) fn op(said: &Said<'_>) -> Option<Op> {
    let op = match said.verb {
        "enqueue" => QueueOp::Enqueue(Enqueue { queue: name(said, 0), jobs: jobs(said) }),
        "receive" => QueueOp::Receive(receive(said, said.plain(0).unwrap())),
        "ack" => QueueOp::Ack(AckJobs {
            acks: receipts(said).map(|receipt| Ack { receipt, result: said.bytes("result") }).collect(),
            each: said.has("each"),
            receive: said.option("receive").map(|queues| Box::new(receive(said, queues))),
        }),
        "nack" => QueueOp::Nack(Nack {
            receipt: receipts(said).next().unwrap(),
            delay_ms: said.option("delay").map(|_| said.ms("delay")),
            reason: said.option("reason").unwrap_or_default().into(),
            dead: said.has("dead"),
        }),
        "hand-back" => QueueOp::Release(receipts(said).next().unwrap()),
        "beat" => QueueOp::Heartbeat(JobHeartbeat {
            receipt: receipts(said).next().unwrap(),
            extend_ms: said.ms("extend"),
            progress: said.option("progress").map(|progress| progress.as_bytes().into()),
        }),
        "leave" => QueueOp::Leave(name(said, 0)),
        "cancel-job" => QueueOp::Cancel(CancelJob {
            id: JobId::parse(said.plain(0).unwrap()).unwrap(),
            reason: said.option("reason").unwrap_or_default().into(),
            force: said.has("force"),
        }),
        "redrive" => QueueOp::Redrive(Redrive {
            queue: name(said, 0),
            filter: DeadFilter {
                ids: (1..).map_while(|n| said.plain(n)).map(|id| JobId::parse(id).unwrap()).collect(),
                contains: said.option("contains").unwrap_or_default().into(),
                group: arc(said, "group"),
            },
            to: said.bytes("to"),
            rate: said.number("rate"),
            max: said.number("max") as u32,
            after: said.option("after").map(|id| JobId::parse(id).unwrap()),
            before: said.number("before"),
        }),
        "purge" => QueueOp::Purge(Purge {
            queue: name(said, 0),
            states: said.option("states").into_iter().flat_map(|all| all.split(',')).map(state).collect(),
            confirm: said.bytes("confirm"),
            remove: said.has("remove"),
        }),
        "queue" => QueueOp::Configure(settings(said)),
        _ => return None,
    };
    Some(op.into())
}

fn name(said: &Said<'_>, n: usize) -> Box<[u8]> {
    said.plain(n).unwrap().as_bytes().into()
}

fn arc(said: &Said<'_>, option: &str) -> Option<Arc<[u8]>> {
    said.option(option).map(|text| text.as_bytes().into())
}

fn state(name: &str) -> u8 {
    JOB_STATES.iter().position(|state| *state == name).unwrap() as u8
}

fn jobs(said: &Said<'_>) -> Vec<NewJob> {
    let scope = match said.option("scope") {
        None | Some("done") => DedupScope::UntilDone,
        Some("started") => DedupScope::UntilStarted,
        Some(window) => DedupScope::Window(crate::script::millis(window)),
    };
    let terms = JobTerms {
        tenant: arc(said, "tenant"),
        group: arc(said, "group"),
        dedup: arc(said, "key").map(|key| Dedup { key, scope }),
        max_attempts: said.number("attempts") as u32,
        visibility_ms: said.ms("visibility"),
        retention_ms: said.option("retention").map(|_| said.ms("retention")),
        ttl_ms: said.ms("ttl"),
        headers: said.option("header").into_iter().map(|value| ("header".into(), value.into())).collect(),
        ..JobTerms::default()
    };
    let terms = (terms != JobTerms::default()).then(|| Arc::new(terms));
    let job = |payload: &str| NewJob {
        payload: match payload.strip_prefix("zeros*") {
            Some(n) => vec![b'0'; n.parse().unwrap()].into(),
            None => payload.as_bytes().into(),
        },
        delay_ms: said.ms("delay"),
        run_at_ms: said.option("at").map(|at| at.parse().unwrap()),
        priority: said.option("priority").map_or(0, |n| n.parse().unwrap()),
        terms: terms.clone(),
        on_duplicate: match said.option("duplicate") {
            None => OnDuplicate::ReturnExisting,
            Some("replace") => OnDuplicate::ReplacePayload,
            Some(_) => OnDuplicate::Error,
        },
    };
    (1..).map_while(|n| said.plain(n)).map(job).collect()
}

fn receive(said: &Said<'_>, queues: &str) -> Receive {
    Receive {
        queues: queues.split(',').map(|queue| queue.as_bytes().into()).collect(),
        groups: said.option("groups").into_iter().flat_map(|all| all.split(',')).map(|g| g.as_bytes().into()).collect(),
        max: said.option("max").map_or(1, |n| n.parse().unwrap()),
        wait_ms: said.ms("wait"),
        visibility_ms: said.ms("visibility"),
        worker: said.option("worker").unwrap_or_default().into(),
        receiver: said.bytes("receiver"),
        settled: Vec::new(),
    }
}

fn receipts<'a>(said: &'a Said<'a>) -> impl Iterator<Item = Receipt> + 'a {
    (0..).step_by(2).map_while(|n| {
        let id = JobId::parse(said.plain(n)?)?;
        Some(Receipt { id, token: Revision(said.plain(n + 1)?.parse().unwrap()) })
    })
}

fn settings(said: &Said<'_>) -> ConfigureQueue {
    let number = |name: &str| said.option(name).map(|_| said.number(name));
    let ms = |name: &str| said.option(name).map(|_| said.ms(name));
    ConfigureQueue {
        queue: name(said, 0),
        visibility_ms: ms("visibility"),
        max_attempts: number("attempts").map(|n| n as u32),
        backoff_first_ms: ms("backoff"),
        backoff_max_ms: ms("backoff-max"),
        jitter: said.option("jitter").map(|jitter| jitter == "on"),
        retention_ms: ms("retention"),
        done_max: number("done-max"),
        dead_retention_ms: ms("dead-retention"),
        group_in_flight: number("group-in-flight"),
        on_dead: said.option("on-dead").map(|on| if on == "block" { OnDead::Block } else { OnDead::Pass }),
        tenant_in_flight: number("tenant-in-flight"),
        weights: said
            .option("weights")
            .into_iter()
            .flat_map(|all| all.split(','))
            .map(|weight| weight.split_once(':').unwrap())
            .map(|(tenant, weight)| (tenant.as_bytes().into(), weight.parse().unwrap()))
            .collect(),
        jobs_max: number("jobs-max"),
        breaker: said.option("breaker").map(|percent| Breaker {
            percent: percent.parse().unwrap(),
            window_ms: 60_000,
            min: 2,
            pause_ms: 10_000,
        }),
        paused: said.option("paused").map(|paused| paused == "on"),
    }
}

fn text(bytes: &[u8]) -> String {
    if bytes.len() > 40 { format!("{} bytes", bytes.len()) } else { bytes.escape_ascii().to_string() }
}

pub(super) fn said(reply: &NativeReply) -> Option<String> {
    let NativeReply::Queue(reply) = reply else { return None };
    Some(match reply {
        QueueReply::Enqueued(jobs) => {
            let jobs = jobs.iter().map(|job| format!(" {}{}", job.id, if job.duplicate { " (duplicate)" } else { "" }));
            format!("enqueued{}", jobs.collect::<String>())
        }
        QueueReply::Received(received) => {
            let settled = received.settled.iter().map(|one| match &one.refusal {
                None => format!("settled {}{}, ", one.id, if one.again { " again" } else { "" }),
                Some(refusal) => format!("refused {}: {}, ", one.id, refusal.why),
            });
            let jobs = received.jobs.iter().map(|job| {
                let tenant = job.terms.as_ref().and_then(|terms| terms.tenant.clone());
                let tenant = tenant.map_or(String::new(), |tenant| format!(" of {}", text(&tenant)));
                format!(
                    "{} token={} `{}`{tenant} attempt {}/{} for {}ms after {}ms",
                    job.id,
                    job.token,
                    text(&job.payload),
                    job.attempt,
                    job.max_attempts,
                    job.visibility_ms,
                    job.age_ms
                )
            });
            let waited =
                if received.waited_ms > 0 { format!(" waited {}ms", received.waited_ms) } else { String::new() };
            format!("{}received [{}]{waited}", settled.collect::<String>(), jobs.collect::<Vec<_>>().join(", "))
        }
        QueueReply::Moved(moved) => {
            let delay = if moved.delay_ms > 0 { format!(" for {}ms", moved.delay_ms) } else { String::new() };
            format!("now {}{delay}, attempt {}", JOB_STATES[moved.state as usize], moved.attempt)
        }
        QueueReply::Beat(beat) => {
            let cancel = if beat.cancel_requested { ", cancel" } else { "" };
            format!("{}ms left{cancel}{}", beat.remaining_ms, if beat.should_yield { ", yield" } else { "" })
        }
        QueueReply::Left(waits) => format!("left {waits}"),
        QueueReply::Swept(swept) => {
            let next = swept.next.map_or(String::new(), |next| format!(", go on after {next}"));
            format!("swept {} skipped {}{next}", swept.count, swept.skipped)
        }
        QueueReply::Configured(settings) => format!("{settings:?}"),
    })
}

pub(super) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    match (what, rest) {
        ("queue", [name]) => Some(match machine.queue(namespace, name.as_bytes()) {
            None => format!("no queue {name}"),
            Some(info) => {
                let counts = JOB_STATES.iter().zip(info.counts).filter(|(_, count)| *count > 0);
                let counts: String = counts.map(|(state, count)| format!(" {state}={count}")).collect();
                let tripped =
                    if info.tripped_ms > 0 { format!(" tripped {}ms", info.tripped_ms) } else { String::new() };
                let oldest = info.oldest_ready_ms;
                format!(
                    "queue {name}:{counts} receivers={} groups={} oldest={oldest}ms{tripped}",
                    info.receivers, info.groups
                )
            }
        }),
        ("jobs", [name, of]) => {
            let jobs = machine.queue_jobs(namespace, name.as_bytes(), state(of) as usize, None, 100);
            let jobs: Vec<_> = jobs.iter().map(|job| format!("{} `{}`", job.id, text(&job.job.payload))).collect();
            Some(format!("{of} [{}]", jobs.join(", ")))
        }
        ("job", [id]) => Some(match machine.job(namespace, JobId::parse(id).unwrap()) {
            None => format!("no job {id}"),
            Some(JobInfo { queue, job, .. }) => {
                let end = job
                    .state
                    .finished()
                    .map_or(String::new(), |end| format!(" `{}{}` until {}", end.why, text(&end.result), end.gone));
                let past = job.past.iter().flat_map(|past| past.iter());
                let past =
                    past.map(|p| format!("\n  attempt {} token={} {} `{}`", p.attempt, p.token, p.how.name(), p.error));
                let state = job.state.name();
                format!(
                    "job {id} in {} {state} attempt={} token={}{end}{}",
                    text(&queue),
                    job.attempt,
                    job.token,
                    past.collect::<String>()
                )
            }
        }),
        _ => None,
    }
}
