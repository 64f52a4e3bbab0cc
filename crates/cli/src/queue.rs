//! `tenure queue`: enqueue, receive and settle jobs; look after queues; run a command for each job.
//!
//! Promises. `work` starts a command only for a job that is delivered to it, gives it the payload on standard input and its receipt in the environment,
//! prolongs the delivery while it runs, and kills it when the delivery is lost or cancelled. Exit code 0 of the command acknowledges the job, 75
//! (EX_TEMPFAIL) gives it back unharmed, and any other is a failed attempt. SIGTERM or SIGINT once: no new job, and those that run are finished.

use std::ffi::OsString;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tenure_client::{
    Client, Delivery, Failed, JobInfo, JobMoved, NewJob, OnDuplicate, Queue, QueueBreaker, QueueChange, QueueInfo,
    QueueSettings, Redrive,
};
use tokio::io::AsyncWriteExt as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::common::{self, Common, Failure, Output, OutputArg, duration, exit, pair, print_table};

/// A command that ends with it wants its job to be tried again without a lost attempt.
const TEMPFAIL: i32 = 75;
/// Of what a failed command wrote to standard error, the end that is told as the reason.
const REASON_BYTES: usize = 500;

#[derive(Debug, Args)]
pub(crate) struct QueueArgs {
    #[command(subcommand)]
    command: QueueCommand,
}

#[derive(Debug, Subcommand)]
enum QueueCommand {
    /// Add a job
    Put(Box<PutArgs>),
    /// Take jobs and print them with their receipts
    Receive(ReceiveArgs),
    /// Say that a job is done
    Ack {
        #[command(flatten)]
        receipt: ReceiptArgs,
        /// Kept with its record
        #[arg(long, default_value = "")]
        result: String,
    },
    /// Say that an attempt has failed
    Nack {
        #[command(flatten)]
        receipt: ReceiptArgs,
        /// Kept with the attempt
        #[arg(long, default_value = "")]
        reason: String,
        /// Try again after this time, in place of the backoff of the queue
        #[arg(long, value_parser = duration)]
        delay: Option<Duration>,
        /// Do not try again
        #[arg(long, conflicts_with = "delay")]
        dead: bool,
    },
    /// Give a job back; no attempt is spent
    Release {
        #[command(flatten)]
        receipt: ReceiptArgs,
    },
    /// Prolong a delivery, and print what is left of it in milliseconds
    Heartbeat {
        #[command(flatten)]
        receipt: ReceiptArgs,
        /// By this, in place of its visibility
        #[arg(long, value_parser = duration)]
        extend: Option<Duration>,
        /// How far the work is
        #[arg(long, default_value = "")]
        progress: String,
    },
    /// Cancel a job
    Cancel {
        /// The job
        job: String,
        /// Kept with its record
        #[arg(long, default_value = "")]
        reason: String,
        /// Also while it is worked on: its receipt is stale from then on
        #[arg(long)]
        force: bool,
    },
    /// Show one job with its attempts
    Job {
        /// The job
        job: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List queues with their counts
    List {
        /// Only names that begin so
        #[arg(default_value = "")]
        prefix: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show the counts and settings of a queue
    Stats {
        /// The queue
        queue: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Look at jobs without taking them
    Peek {
        /// The queue
        queue: String,
        /// scheduled, backoff, held, ready, leased, done, dead or cancelled
        #[arg(long, default_value = "ready")]
        state: String,
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        limit: u32,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List the dead letters of a queue
    Dead {
        /// The queue
        queue: String,
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000))]
        limit: u32,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Give dead letters another life
    Redrive {
        /// The queue
        queue: String,
        /// Exactly these jobs
        jobs: Vec<String>,
        /// Only where the reason or the last error contains this
        #[arg(long, default_value = "")]
        contains: String,
        /// Only of this FIFO group
        #[arg(long, default_value = "")]
        group: String,
        /// Into another queue
        #[arg(long, default_value = "")]
        to: String,
        /// So many a second, in place of all at once
        #[arg(long, default_value_t = 0, hide_default_value = true)]
        rate: u64,
    },
    /// Throw jobs away
    Purge {
        /// The queue
        queue: String,
        /// Of these states, in place of all that wait to be delivered
        #[arg(long, value_delimiter = ',')]
        state: Vec<String>,
        /// Remove the queue too, if nothing is left in it
        #[arg(long)]
        remove: bool,
        /// Do it: there is no way back
        #[arg(long)]
        yes: bool,
    },
    /// Change how a queue treats its jobs
    Configure(Box<ConfigureArgs>),
    /// Run a command for each job, with its payload on standard input
    Work(WorkArgs),
}

#[derive(Debug, Args)]
struct ReceiptArgs {
    /// The job
    job: String,
    /// The token of its delivery
    token: u64,
}

#[derive(Debug, Args)]
struct PutArgs {
    /// The queue
    queue: String,
    /// The payload; `-` reads it from standard input
    payload: String,
    /// No second job with this key until this one is done, dead or cancelled
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// With --key: for this long, whatever becomes of the job
    #[arg(long, value_name = "DURATION", value_parser = duration, requires = "key", conflicts_with = "until_started")]
    window: Option<Duration>,
    /// With --key: until it is delivered for the first time
    #[arg(long, requires = "key")]
    until_started: bool,
    /// With --key: give the job that is there this payload
    #[arg(long, requires = "key", conflicts_with = "unique")]
    replace: bool,
    /// With --key: fail where there is such a job (exit code 10)
    #[arg(long, requires = "key")]
    unique: bool,
    #[command(flatten)]
    job: JobArgs,
    #[command(flatten)]
    output: OutputArg,
}

/// How a job is treated, wherever one is made.
#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// Ready after this time; of a schedule, counted from its tick
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    delay: Option<Duration>,
    /// -8 to 7, higher first
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, hide_default_value = true)]
    priority: i32,
    /// Jobs of a group run in order
    #[arg(long, default_value = "", hide_default_value = true)]
    group: String,
    /// Tenants take turns
    #[arg(long, default_value = "", hide_default_value = true)]
    tenant: String,
    /// In place of the queue's
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    max_attempts: u32,
    /// In place of the queue's
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    visibility: Option<Duration>,
    /// Dead if it is not delivered within this time
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    ttl: Option<Duration>,
    /// For whoever receives it
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = pair)]
    headers: Vec<(String, String)>,
}

impl JobArgs {
    pub(crate) fn job(self, payload: String) -> std::io::Result<NewJob> {
        let mut job =
            NewJob::new(common::payload(payload)?).priority(self.priority).group(self.group).tenant(self.tenant);
        job = job.max_attempts(self.max_attempts);
        if let Some(delay) = self.delay {
            job = job.delay(delay);
        }
        if let Some(visibility) = self.visibility {
            job = job.visibility(visibility);
        }
        if let Some(ttl) = self.ttl {
            job = job.ttl(ttl);
        }
        Ok(self.headers.into_iter().fold(job, |job, (name, value)| job.header(name, value)))
    }
}

#[derive(Debug, Args)]
struct ReceiveArgs {
    /// Queues, looked through in this order
    #[arg(required = true)]
    queues: Vec<String>,
    /// At most so many jobs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    max: u32,
    /// Wait for one, 20s at most
    #[arg(long, default_value = "0", hide_default_value = true, value_parser = duration)]
    wait: Duration,
    /// How long they are ours without a heartbeat
    #[arg(long, value_parser = duration)]
    visibility: Option<Duration>,
    /// Who works
    #[arg(long, default_value = "")]
    worker: String,
    /// Of these groups only
    #[arg(long = "group")]
    groups: Vec<String>,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, Args)]
struct ConfigureArgs {
    /// The queue; it is made if it is not there
    queue: String,
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    visibility: Option<Duration>,
    #[arg(long, value_name = "N")]
    max_attempts: Option<u32>,
    /// The pause after the first failure, doubled each time
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    backoff: Option<Duration>,
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    backoff_max: Option<Duration>,
    /// Any time up to the backoff, or the backoff itself
    #[arg(long, value_name = "BOOL")]
    jitter: Option<bool>,
    /// How long records of done jobs are kept
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    retention: Option<Duration>,
    /// How many of them
    #[arg(long, value_name = "N")]
    done_max: Option<u64>,
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    dead_retention: Option<Duration>,
    /// Deliveries of one group at a time
    #[arg(long, value_name = "N")]
    group_in_flight: Option<u64>,
    /// Whether a dead job keeps the others of its group from being delivered
    #[arg(long, value_name = "BOOL")]
    dead_blocks_group: Option<bool>,
    /// Deliveries of one tenant at a time; 0 is any number
    #[arg(long, value_name = "N")]
    tenant_in_flight: Option<u64>,
    /// Turns of a tenant in each round
    #[arg(long = "weight", value_name = "TENANT=N", value_parser = weight)]
    weights: Vec<(String, u32)>,
    /// Jobs that are not finished at most; 0 is any number
    #[arg(long, value_name = "N")]
    jobs_max: Option<u64>,
    /// Pause delivery when more than this share of the deliveries fails; 0 is never
    #[arg(long, value_name = "PERCENT")]
    breaker: Option<u32>,
    /// With --breaker: the time over which it counts
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "1m", requires = "breaker")]
    breaker_window: Duration,
    /// With --breaker: how long it pauses
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "1m", requires = "breaker")]
    breaker_pause: Duration,
    /// Deliver nothing
    #[arg(long, conflicts_with = "resume")]
    pause: bool,
    /// Deliver again, a tripped breaker too
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The command's environment: TENURE_QUEUE, TENURE_JOB, TENURE_TOKEN, TENURE_ATTEMPT, TENURE_MAX_ATTEMPTS, TENURE_GROUP, TENURE_TENANT,\n\
TRACEPARENT, TENURE_ENDPOINTS, and TENURE_HEADER_NAME for each header.\n\n\
Its exit code: 0 acknowledges the job, 75 gives it back unharmed, any other is a failed attempt with the end of its standard error as the reason.\n\n\
Example: tenure queue work mail --concurrency 4 -- ./send-mail.sh"
)]
struct WorkArgs {
    /// The queue
    queue: String,
    /// Jobs at a time
    #[arg(long, short = 'j', default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    concurrency: u16,
    /// How long a job outlives the last heartbeat
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    visibility: Option<Duration>,
    /// How long jobs that run may go on after a signal to stop
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "30s")]
    grace: Duration,
    /// Who works [default: host and process]
    #[arg(long)]
    worker: Option<String>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

fn weight(text: &str) -> Result<(String, u32), String> {
    let (tenant, weight) = pair(text)?;
    let weight = weight.parse().map_err(|_| format!("`{weight}` is not a weight of 1 to 1000"))?;
    Ok((tenant, weight))
}

pub(crate) async fn run(common: &Common, args: QueueArgs) -> anyhow::Result<ExitCode> {
    let client = common.client()?;
    match args.command {
        QueueCommand::Put(args) => put(&client, *args).await?,
        QueueCommand::Receive(args) => receive(&client, args).await?,
        QueueCommand::Ack { receipt, result } => {
            client.ack_job(&receipt.job, receipt.token, result.as_bytes()).await?;
        }
        QueueCommand::Nack { receipt, reason, delay, dead } => {
            print_moved(&client.nack_job(&receipt.job, receipt.token, &reason, delay, dead).await?);
        }
        QueueCommand::Release { receipt } => print_moved(&client.release_job(&receipt.job, receipt.token).await?),
        QueueCommand::Heartbeat { receipt, extend, progress } => {
            let beat = client.heartbeat_job(&receipt.job, receipt.token, extend, &progress).await?;
            let cancel = if beat.cancel_requested { " cancel" } else { "" };
            out!("{}{cancel}{}", beat.remaining.as_millis(), if beat.should_yield { " yield" } else { "" });
        }
        QueueCommand::Cancel { job, reason, force } => out!("{}", client.cancel_job(&job, &reason, force).await?),
        QueueCommand::Job { job, output } => {
            let missing = || Failure::new(exit::NOT_FOUND, format!("there is no job {job}"));
            print_job(&client.job(&job).await?.ok_or_else(missing)?, output.output);
        }
        QueueCommand::List { prefix, output } => print_queues(&client.queues(&prefix).await?, output.output),
        QueueCommand::Stats { queue, output } => {
            let missing = || Failure::new(exit::NOT_FOUND, format!("there is no queue `{queue}`"));
            print_stats(&client.queue(&queue).info().await?.ok_or_else(missing)?, output.output);
        }
        QueueCommand::Peek { queue, state, limit, output } => {
            print_jobs(&client.queue(queue).jobs(&state, limit, "").await?, output.output);
        }
        QueueCommand::Dead { queue, limit, output } => {
            print_jobs(&client.queue(queue).jobs("dead", limit, "").await?, output.output);
        }
        QueueCommand::Redrive { queue, jobs, contains, group, to, rate } => {
            let redrive = Redrive { ids: jobs, contains, group, to, rate };
            let (count, skipped) = client.queue(queue).redrive(redrive).await?;
            out!("redriven {count}, skipped {skipped}");
        }
        QueueCommand::Purge { queue, state, remove, yes } => {
            if !yes {
                return Err(Failure::usage(format!("this throws jobs of `{queue}` away, and there is no way back"))
                    .hint("add --yes to do it")
                    .into());
            }
            let states: Vec<&str> = state.iter().map(String::as_str).collect();
            out!("purged {}", client.queue(queue).purge(&states, remove).await?);
        }
        QueueCommand::Configure(args) => configure(&client, *args).await?,
        QueueCommand::Work(args) => return work(common, &client.queue(&args.queue), args).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn put(client: &Client, args: PutArgs) -> anyhow::Result<()> {
    let mut job = args.job.job(args.payload)?;
    if let Some(key) = args.key {
        job = job.key(key).on_duplicate(match (args.replace, args.unique) {
            (true, _) => OnDuplicate::ReplacePayload,
            (_, true) => OnDuplicate::Error,
            _ => OnDuplicate::ReturnExisting,
        });
    }
    job = match (args.window, args.until_started) {
        (Some(window), _) => job.key_window(window),
        (None, true) => job.key_until_started(),
        (None, false) => job,
    };
    let enqueued = client.queue(args.queue).enqueue(job).await?;
    match args.output.output {
        Output::Json => out!("{}", json!({ "id": enqueued.id, "duplicate": enqueued.duplicate })),
        Output::Table if enqueued.duplicate => out!("{} duplicate", enqueued.id),
        Output::Table => out!("{}", enqueued.id),
    }
    Ok(())
}

async fn receive(client: &Client, args: ReceiveArgs) -> anyhow::Result<()> {
    let (first, more) = args.queues.split_first().ok_or_else(|| Failure::usage("name a queue"))?;
    let mut receive = client.queue(first).receive().max(args.max).wait(args.wait).worker(args.worker);
    for queue in more {
        receive = receive.also(queue);
    }
    for group in args.groups {
        receive = receive.group(group);
    }
    if let Some(visibility) = args.visibility {
        receive = receive.visibility(visibility);
    }
    let jobs = receive.await?;
    if args.output.output == Output::Json {
        out!("{}", Value::Array(jobs.iter().map(delivery_json).collect()));
        return Ok(());
    }
    let row = |job: &Delivery| {
        let attempt = format!("{}/{}", job.attempt(), job.max_attempts());
        vec![job.id().to_owned(), job.token().to_string(), attempt, shown(job.payload())]
    };
    print_table(&["JOB", "TOKEN", "ATTEMPT", "PAYLOAD"], &jobs.iter().map(row).collect::<Vec<_>>());
    Ok(())
}

fn delivery_json(job: &Delivery) -> Value {
    let mut all = json!({
        "id": job.id(),
        "token": job.token().to_string(),
        "queue": job.queue(),
        "attempt": job.attempt(),
        "max_attempts": job.max_attempts(),
        "age_ms": job.age().as_millis() as u64,
        "headers": job.headers(),
        "last_error": job.last_error(),
    });
    put_bytes(&mut all, "payload", job.payload());
    for (name, value) in [("group", job.group()), ("tenant", job.tenant()), ("traceparent", job.trace().0)] {
        if !value.is_empty() {
            all[name] = value.into();
        }
    }
    all
}

/// Text as it is, and anything else in base64 under a name that says so.
fn put_bytes(all: &mut Value, name: &str, bytes: &[u8]) {
    use base64::Engine as _;
    match std::str::from_utf8(bytes) {
        Ok(text) => all[name] = text.into(),
        Err(_) => all[format!("{name}_bytes")] = base64::engine::general_purpose::STANDARD.encode(bytes).into(),
    }
}

/// The beginning of a payload, on one line.
fn shown(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes).escape_debug().take(81).collect();
    if text.chars().count() > 80 { text.chars().take(77).chain("...".chars()).collect() } else { text }
}

fn print_moved(moved: &JobMoved) {
    match moved.delay.as_millis() {
        0 => out!("{}", moved.state),
        ms => out!("{} for {ms} ms", moved.state),
    }
}

fn ago(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7_200 => format!("{}m", seconds / 60),
        seconds @ 7_200..172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

fn print_jobs(jobs: &[JobInfo], output: Output) {
    if output == Output::Json {
        out!("{}", Value::Array(jobs.iter().map(job_json).collect()));
        return;
    }
    let row = |job: &JobInfo| {
        let said = job.attempts.last().map_or("", |past| &past.error);
        let why = if said.is_empty() { &job.reason } else { said };
        vec![
            job.id.clone(),
            job.state.clone(),
            job.attempt.to_string(),
            ago(job.age),
            shown(&job.payload),
            shown(why.as_bytes()),
        ]
    };
    print_table(&["JOB", "STATE", "ATTEMPT", "AGE", "PAYLOAD", "WHY"], &jobs.iter().map(row).collect::<Vec<_>>());
}

fn job_json(job: &JobInfo) -> Value {
    let attempts = job.attempts.iter().map(|past| {
        json!({
            "attempt": past.attempt,
            "token": past.token.to_string(),
            "worker": past.worker,
            "ended_ms": past.ended.as_millis() as u64,
            "how": past.how,
            "error": past.error,
        })
    });
    let mut all = json!({
        "id": job.id,
        "queue": job.queue,
        "state": job.state,
        "attempt": job.attempt,
        "token": job.token.to_string(),
        "priority": job.priority,
        "group": job.group,
        "tenant": job.tenant,
        "key": job.key,
        "headers": job.headers,
        "age_ms": job.age.as_millis() as u64,
        "since_ms": job.since.as_millis() as u64,
        "remaining_ms": job.remaining.as_millis() as u64,
        "worker": job.worker,
        "progress": job.progress,
        "cancel_requested": job.cancel_requested,
        "reason": job.reason,
        "attempts": attempts.collect::<Vec<_>>(),
    });
    put_bytes(&mut all, "payload", &job.payload);
    put_bytes(&mut all, "result", &job.result);
    all
}

fn print_job(job: &JobInfo, output: Output) {
    if output == Output::Json {
        out!("{}", job_json(job));
        return;
    }
    let mut rows = vec![
        vec!["queue".to_owned(), job.queue.clone()],
        vec!["state".to_owned(), format!("{} for {}", job.state, ago(job.since))],
        vec!["attempt".to_owned(), job.attempt.to_string()],
        vec!["token".to_owned(), job.token.to_string()],
        vec!["payload".to_owned(), shown(&job.payload)],
    ];
    let more = [
        ("worker", &job.worker),
        ("progress", &job.progress),
        ("group", &job.group),
        ("tenant", &job.tenant),
        ("key", &job.key),
        ("reason", &job.reason),
    ];
    rows.extend(
        more.into_iter().filter(|(_, text)| !text.is_empty()).map(|(name, text)| vec![name.to_owned(), text.clone()]),
    );
    if !job.result.is_empty() {
        rows.push(vec!["result".to_owned(), shown(&job.result)]);
    }
    for past in &job.attempts {
        let said = format!("{} by `{}` {} ago: {}", past.how, past.worker, ago(past.ended), past.error);
        rows.push(vec![format!("attempt {}", past.attempt), said]);
    }
    print_table(&["JOB", &job.id], &rows);
}

fn print_queues(queues: &[QueueInfo], output: Output) {
    if output == Output::Json {
        out!("{}", Value::Array(queues.iter().map(queue_json).collect()));
        return;
    }
    let row = |queue: &QueueInfo| {
        let count = |state: &str| queue.jobs.get(state).copied().unwrap_or(0);
        let later = count("scheduled") + count("backoff") + count("held");
        let numbers = [count("ready"), later, count("leased"), count("dead"), queue.receivers];
        let mut cells = vec![queue.name.clone()];
        cells.extend(numbers.iter().map(ToString::to_string));
        cells.push(ago(queue.oldest_ready));
        cells
    };
    let headings = ["QUEUE", "READY", "LATER", "LEASED", "DEAD", "RECEIVERS", "OLDEST"];
    print_table(&headings, &queues.iter().map(row).collect::<Vec<_>>());
}

fn queue_json(queue: &QueueInfo) -> Value {
    let tenants = queue
        .tenants
        .iter()
        .map(|(tenant, (ready, leased))| json!({ "tenant": tenant, "ready": ready, "leased": leased }));
    json!({
        "name": queue.name,
        "jobs": queue.jobs,
        "receivers": queue.receivers,
        "oldest_ready_ms": queue.oldest_ready.as_millis() as u64,
        "groups": queue.groups,
        "tenants": tenants.collect::<Vec<_>>(),
        "tripped_ms": queue.tripped.as_millis() as u64,
        "settings": settings_json(&queue.settings),
    })
}

fn settings_json(settings: &QueueSettings) -> Value {
    let ms = |time: Duration| time.as_millis() as u64;
    json!({
        "visibility_ms": ms(settings.visibility),
        "max_attempts": settings.max_attempts,
        "backoff_first_ms": ms(settings.backoff_first),
        "backoff_max_ms": ms(settings.backoff_max),
        "jitter": settings.jitter,
        "retention_ms": ms(settings.retention),
        "done_max": settings.done_max,
        "dead_retention_ms": ms(settings.dead_retention),
        "group_in_flight": settings.group_in_flight,
        "dead_blocks_group": settings.dead_blocks_group,
        "tenant_in_flight": settings.tenant_in_flight,
        "weights": settings.weights,
        "jobs_max": settings.jobs_max,
        "breaker": settings.breaker.map(|breaker| json!({
            "percent": breaker.percent,
            "window_ms": ms(breaker.window),
            "min": breaker.min,
            "pause_ms": ms(breaker.pause),
        })),
        "paused": settings.paused,
    })
}

fn print_settings(settings: &QueueSettings, mut rows: Vec<Vec<String>>, name: &str) {
    if let Value::Object(all) = settings_json(settings) {
        rows.extend(all.into_iter().map(|(name, value)| vec![name, value.to_string()]));
    }
    print_table(&["QUEUE", name], &rows);
}

fn print_stats(queue: &QueueInfo, output: Output) {
    if output == Output::Json {
        out!("{}", queue_json(queue));
        return;
    }
    let mut rows: Vec<Vec<String>> =
        queue.jobs.iter().map(|(state, count)| vec![(*state).to_owned(), count.to_string()]).collect();
    rows.push(vec!["receivers".to_owned(), queue.receivers.to_string()]);
    rows.push(vec!["oldest ready".to_owned(), ago(queue.oldest_ready)]);
    if !queue.tripped.is_zero() {
        rows.push(vec!["breaker open for".to_owned(), ago(queue.tripped)]);
    }
    for (tenant, (ready, leased)) in &queue.tenants {
        rows.push(vec![format!("tenant {tenant}"), format!("{ready} ready, {leased} leased")]);
    }
    print_settings(&queue.settings, rows, &queue.name);
}

async fn configure(client: &Client, args: ConfigureArgs) -> anyhow::Result<()> {
    let breaker = args.breaker.map(|percent| QueueBreaker {
        percent,
        window: args.breaker_window,
        min: 0,
        pause: args.breaker_pause,
    });
    let change = QueueChange {
        visibility: args.visibility,
        max_attempts: args.max_attempts,
        backoff_first: args.backoff,
        backoff_max: args.backoff_max,
        jitter: args.jitter,
        retention: args.retention,
        done_max: args.done_max,
        dead_retention: args.dead_retention,
        group_in_flight: args.group_in_flight,
        dead_blocks_group: args.dead_blocks_group,
        tenant_in_flight: args.tenant_in_flight,
        weights: args.weights.into_iter().collect(),
        jobs_max: args.jobs_max,
        breaker,
        paused: (args.pause || args.resume).then_some(args.pause),
    };
    let settings = client.queue(&args.queue).configure(change).await?;
    match args.output.output {
        Output::Json => out!("{}", settings_json(&settings)),
        Output::Table => print_settings(&settings, Vec::new(), &args.queue),
    }
    Ok(())
}

// ---- Work ----

async fn work(common: &Common, queue: &Queue, args: WorkArgs) -> anyhow::Result<ExitCode> {
    // Before anything is taken, so that no signal finds a job without its worker.
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let host = || format!("{}:{}", rustix::system::uname().nodename().to_string_lossy(), std::process::id());
    let worker = args.worker.unwrap_or_else(host);
    let (command, endpoints) = (args.command, common.endpoints.join(","));
    let handler = move |job: std::sync::Arc<Delivery>| {
        let (command, endpoints) = (command.clone(), endpoints.clone());
        async move { run_command(&command, &endpoints, &job).await }
    };
    let mut work = queue.work(handler).concurrency(args.concurrency.into()).worker(worker).grace(args.grace);
    if let Some(visibility) = args.visibility {
        work = work.visibility(visibility);
    }
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let done = work.run_until(stop).await;
    err!("{} done, {} failed, {} lost, {} given back", done.acked, done.failed, done.lost, done.released);
    Ok(ExitCode::SUCCESS)
}

/// Runs the command once. Dropping this kills it.
async fn run_command(command: &[OsString], endpoints: &str, job: &Delivery) -> Result<(), Failed> {
    let (program, rest) = command.split_first().ok_or_else(|| Failed::retry("there is no command"))?;
    let mut process = tokio::process::Command::new(program);
    process
        .args(rest)
        .env("TENURE_QUEUE", job.queue())
        .env("TENURE_JOB", job.id())
        .env("TENURE_TOKEN", job.token().to_string())
        .env("TENURE_ATTEMPT", job.attempt().to_string())
        .env("TENURE_MAX_ATTEMPTS", job.max_attempts().to_string())
        .env("TENURE_GROUP", job.group())
        .env("TENURE_TENANT", job.tenant())
        .env("TENURE_ENDPOINTS", endpoints)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if !job.trace().0.is_empty() {
        process.env("TRACEPARENT", job.trace().0);
    }
    for (name, value) in job.headers() {
        let name: String =
            name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
        process.env(format!("TENURE_HEADER_{name}"), value);
    }
    job.check().map_err(|error| Failed::retry(error.to_string()))?;
    let cannot = |error: std::io::Error| Failed::retry(format!("cannot run {}: {error}", program.display()));
    let mut child = process.spawn().map_err(cannot)?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A command that does not read its payload is no failure.
            let _ = stdin.write_all(job.payload()).await;
        }
    };
    let (output, ()) = tokio::join!(child.wait_with_output(), feed);
    let output = output.map_err(cannot)?;
    // What it wrote is also for whoever watches this worker.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), &output.stderr);
    match output.status.code() {
        Some(0) => Ok(()),
        Some(TEMPFAIL) => Err(Failed::release()),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr[output.stderr.len().saturating_sub(REASON_BYTES)..]);
            Err(Failed::retry(format!("{}: {}", output.status, said.trim())))
        }
    }
}
