//! `tenure idem`: begin, complete and look at idempotency records, and run a command once per key.
//!
//! Promises. `run` starts the command only under a grant. Its output and exit code are stored when it ends and replayed to whoever runs the key again;
//! a command that was killed by a signal stores nothing, for nobody knows what came of it.
//! Not promised. That the effects of a command happen once when its machine stalls past the lease: guard them by `TENURE_ATTEMPT`, or run it with
//! `--no-takeover`.

use std::ffi::OsString;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tenure_client::{
    Attempt, Begun, BodySink, Checkpoint, Decision, Error, Fingerprint, Idempotent, InFlight, RecordInfo, Replay,
    StoredResult, Takeover, derive,
};
use tokio::io::AsyncReadExt as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::common::{Common, Failure, Output, OutputArg, duration, exit, print_failure, print_table};

/// How long a command that must stop has for it.
const GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub(crate) struct IdemArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Begin a key: be granted an attempt, be told that another one runs it, or get the stored result
    Begin(BeginArgs),
    /// End an attempt with its result
    Complete(CompleteArgs),
    /// End an attempt without success
    Fail(FailArgs),
    /// Prolong the lease of an attempt
    Heartbeat(HeartbeatArgs),
    /// Keep a point from which the next attempt can go on
    Checkpoint(CheckpointArgs),
    /// Decide about an attempt that died
    Reconcile(ReconcileArgs),
    /// Show one record
    Get(GetArgs),
    /// List records
    List(ListArgs),
    /// Print the key of one step of a larger operation
    Derive {
        /// The key of the whole
        parent: String,
        /// The name of the step
        step: String,
    },
    /// Run a command once per key, and replay its output and exit code afterwards
    Run(RunArgs),
}

/// Which record.
#[derive(Debug, Args)]
struct Name {
    /// 1 to 255 printable bytes
    key: String,
    /// Whose keys these are, such as a principal and a route
    #[arg(long, default_value = "", value_name = "TEXT")]
    scope: String,
}

/// How an attempt is begun.
#[derive(Debug, Args)]
struct Beginning {
    /// The lease of the attempt between heartbeats
    #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = duration)]
    ttl: Duration,
    /// How long the result is kept, from its completion
    #[arg(long, default_value = "24h", value_name = "DURATION", value_parser = duration)]
    keep: Duration,
    /// Wait at most this long for whoever runs it
    #[arg(long, short = 'w', default_value = "0s", value_name = "DURATION", value_parser = duration)]
    wait: Duration,
    /// Do not follow a dead attempt, and let none follow this one: somebody must decide
    #[arg(long)]
    no_takeover: bool,
}

#[derive(Debug, Args)]
struct BeginArgs {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    beginning: Beginning,
    /// What the request looks like; another one under this key is refused
    #[arg(long, value_name = "TEXT")]
    fingerprint: Option<String>,
    #[command(flatten)]
    output: OutputArg,
}

/// A result.
#[derive(Debug, Args)]
struct ResultArgs {
    /// A number of your own: an HTTP status, an exit code
    #[arg(long, default_value_t = 0)]
    status: u32,
    /// The bytes that are replayed
    #[arg(long, default_value = "", value_name = "TEXT", conflicts_with = "body_file")]
    body: String,
    /// The bytes that are replayed, from a file; - is standard input
    #[arg(long, value_name = "FILE")]
    body_file: Option<PathBuf>,
    /// A header to replay; may be repeated
    #[arg(long, value_name = "NAME:VALUE")]
    header: Vec<String>,
}

#[derive(Debug, Args)]
struct CompleteArgs {
    #[command(flatten)]
    name: Name,
    /// The token of the attempt
    #[arg(long, value_name = "TOKEN")]
    attempt: u64,
    #[command(flatten)]
    result: ResultArgs,
}

#[derive(Debug, Args)]
struct FailArgs {
    #[command(flatten)]
    name: Name,
    /// The token of the attempt
    #[arg(long, value_name = "TOKEN")]
    attempt: u64,
    /// It failed for good: the result is stored and replayed
    #[arg(long = "final")]
    last: bool,
    #[command(flatten)]
    result: ResultArgs,
}

#[derive(Debug, Args)]
struct HeartbeatArgs {
    #[command(flatten)]
    name: Name,
    /// The token of the attempt
    #[arg(long, value_name = "TOKEN")]
    attempt: u64,
    /// Another lease from now on
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    ttl: Option<Duration>,
    /// Whether another attempt may follow a dead one, from now on
    #[arg(long, value_enum, value_name = "HOW")]
    takeover: Option<TakeoverArg>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TakeoverArg {
    Allow,
    Never,
}

#[derive(Debug, Args)]
struct CheckpointArgs {
    #[command(flatten)]
    name: Name,
    /// Of the checkpoint
    point: String,
    /// The token of the attempt
    #[arg(long, value_name = "TOKEN")]
    attempt: u64,
    /// What the next attempt needs to know
    #[arg(long, default_value = "", value_name = "TEXT")]
    data: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DecisionArg {
    /// It did happen, with this result
    Complete,
    /// It may be tried again, from its checkpoints
    Release,
    /// As if there had been none
    Discard,
}

#[derive(Debug, Args)]
struct ReconcileArgs {
    #[command(flatten)]
    name: Name,
    /// What becomes of it
    #[arg(value_enum)]
    decision: DecisionArg,
    /// The attempt that was looked at [default: whichever is the newest]
    #[arg(long, value_name = "TOKEN", default_value_t = 0, hide_default_value = true)]
    attempt: u64,
    #[command(flatten)]
    result: ResultArgs,
}

#[derive(Debug, Args)]
struct GetArgs {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Keys that begin with it
    #[arg(default_value = "", hide_default_value = true)]
    prefix: String,
    /// Whose keys
    #[arg(long, default_value = "", value_name = "TEXT", conflicts_with = "all_scopes")]
    scope: String,
    /// Records of every scope
    #[arg(long, conflicts_with = "prefix")]
    all_scopes: bool,
    /// Only records in this state: running, abandoned, needs-reconcile, released, completed, failed
    #[arg(long, default_value = "", hide_default_value = true, value_name = "STATE")]
    state: String,
    /// At most so many
    #[arg(long, default_value_t = 1_000)]
    limit: usize,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The command's environment: TENURE_IDEM_KEY, TENURE_ATTEMPT (a fencing token), TENURE_ATTEMPT_NO, TENURE_ENDPOINTS.\n\n\
Exit code: the command's own, now or the first time; 128 + the signal that ended it; 14 another one runs it; 15 the key was used for\n\
another command; 16 a dead attempt needs a decision; 12 the attempt was replaced while the command ran; 21 it has run and its output was too\n\
large to keep; 69 no server can be reached; 64 wrong use; 126, 127 when the command cannot be started.\n\n\
Example: tenure idem run backup-2026-01-31 -- ./backup.sh"
)]
struct RunArgs {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    beginning: Beginning,
    /// Store nothing when the command fails: the key is free to be tried again at once
    #[arg(long)]
    retry_failures: bool,
    /// Do not compare the command with that of the first run
    #[arg(long)]
    any_command: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(crate) async fn run(common: &Common, args: IdemArgs) -> anyhow::Result<ExitCode> {
    match args.verb {
        Verb::Derive { parent, step } => out!("{}", derive(&parent, &step)),
        Verb::Begin(args) => return begin(common, args).await,
        Verb::Run(args) => return run_once(common, args).await,
        Verb::Complete(args) => {
            attempt(common, &args.name, args.attempt)?.complete(&result(args.result)?).await.map_err(Failure::from)?;
        }
        Verb::Fail(args) => {
            let attempt = attempt(common, &args.name, args.attempt)?;
            let ended = if args.last { attempt.fail(&result(args.result)?).await } else { attempt.release().await };
            ended.map_err(Failure::from)?;
        }
        Verb::Heartbeat(args) => {
            let takeover = args.takeover.map(|how| match how {
                TakeoverArg::Allow => Takeover::Allow,
                TakeoverArg::Never => Takeover::Never,
            });
            let attempt = attempt(common, &args.name, args.attempt)?;
            attempt.heartbeat(args.ttl, takeover).await.map_err(Failure::from)?;
        }
        Verb::Checkpoint(args) => {
            let attempt = attempt(common, &args.name, args.attempt)?;
            attempt.checkpoint(args.point, args.data.into_bytes()).await.map_err(Failure::from)?;
        }
        Verb::Reconcile(args) => {
            let decision = match args.decision {
                DecisionArg::Complete => Decision::Complete(result(args.result)?),
                DecisionArg::Release => Decision::Release,
                DecisionArg::Discard => Decision::Discard,
            };
            let records = common.client()?.idempotent(&args.name.scope);
            records.reconcile(&args.name.key, args.attempt, decision).await.map_err(Failure::from)?;
        }
        Verb::Get(args) => {
            let record = common.client()?.idempotent(&args.name.scope).get(&args.name.key).await;
            show_record(&record.map_err(Failure::from)?, args.output.output);
        }
        Verb::List(args) => return list(common, args).await,
    }
    Ok(ExitCode::SUCCESS)
}

fn attempt(common: &Common, name: &Name, token: u64) -> Result<Attempt, Failure> {
    Ok(common.client()?.idempotent(&name.scope).attempt(&name.key, token))
}

fn records(common: &Common, name: &Name, beginning: &Beginning) -> Result<Idempotent, Failure> {
    let takeover = if beginning.no_takeover { Takeover::Never } else { Takeover::Allow };
    let records = common.client()?.idempotent(&name.scope).attempt_ttl(beginning.ttl).retention(beginning.keep);
    Ok(records.wait(beginning.wait).takeover(takeover))
}

fn result(args: ResultArgs) -> Result<StoredResult, Failure> {
    let body = match &args.body_file {
        None => args.body.into_bytes(),
        Some(path) if path.as_os_str() == "-" => {
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes)
                .map_err(|error| Failure::usage(format!("standard input: {error}")))?;
            bytes
        }
        Some(path) => std::fs::read(path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?,
    };
    let header = |text: &String| {
        let (name, value) = text.split_once(':').ok_or_else(|| Failure::usage(format!("`{text}` is no header")))?;
        Ok((name.trim().to_owned(), value.trim().to_owned()))
    };
    let headers = args.header.iter().map(header).collect::<Result<_, Failure>>()?;
    Ok(StoredResult { headers, ..StoredResult::new(body).status(args.status) })
}

async fn begin(common: &Common, args: BeginArgs) -> anyhow::Result<ExitCode> {
    let mut records = records(common, &args.name, &args.beginning)?;
    if let Some(request) = &args.fingerprint {
        records = records.fingerprint(Fingerprint::of(request));
    }
    match records.begin(&args.name.key).await.map_err(Failure::from)? {
        Begun::Granted(attempt) => {
            match args.output.output {
                Output::Json => out!("{}", granted_json(&attempt)),
                Output::Table => {
                    out!("granted attempt {} (number {})", attempt.token(), attempt.number());
                    for point in attempt.checkpoints() {
                        out!("  {}: {}", point.name, String::from_utf8_lossy(&point.data));
                    }
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Begun::InFlight(flight) => {
            match args.output.output {
                Output::Json => out!("{}", flight_json(&flight)),
                Output::Table => print_failure(&flight.to_string(), Some(ASK_LATER)),
            }
            Ok(ExitCode::from(exit::IN_FLIGHT))
        }
        Begun::Replay(replay) => {
            match args.output.output {
                Output::Json => out!("{}", replay_json(&replay)),
                Output::Table => {
                    let what = if replay.failed { "failed" } else { "completed" };
                    out!("{what} {} ago with status {}:", ago(replay.finished), replay.result.status);
                    out!("{}", String::from_utf8_lossy(&replay.result.body));
                }
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

const ASK_LATER: &str = "wait for its result with --wait";

fn granted_json(attempt: &Attempt) -> Value {
    json!({
        "result": "granted",
        "attempt": attempt.token().to_string(),
        "attempt_no": attempt.number(),
        "checkpoints": attempt.checkpoints().iter().map(checkpoint_json).collect::<Vec<_>>(),
    })
}

fn flight_json(flight: &InFlight) -> Value {
    json!({
        "result": "in-flight",
        "attempt": flight.attempt.to_string(),
        "attempt_no": flight.attempt_no,
        "running_ms": flight.running.as_millis().to_string(),
        "lease_left_ms": flight.lease_left.as_millis().to_string(),
        "retry_after_ms": flight.retry_after.as_millis().to_string(),
    })
}

fn replay_json(replay: &Replay) -> Value {
    json!({
        "result": "replay",
        "failed": replay.failed,
        "attempt": replay.attempt.to_string(),
        "attempt_no": replay.attempt_no,
        "finished_ms": replay.finished.as_millis().to_string(),
        "first_seen_ms": replay.first_seen.as_millis().to_string(),
        "kept_ms": replay.kept.as_millis().to_string(),
        "stored": result_json(&replay.result),
    })
}

fn checkpoint_json(point: &Checkpoint) -> Value {
    json!({ "name": point.name, "data": String::from_utf8_lossy(&point.data) })
}

fn result_json(result: &StoredResult) -> Value {
    json!({
        "status": result.status,
        "headers": result.headers.iter().map(|(name, value)| json!({ "name": name, "value": value })).collect::<Vec<_>>(),
        "body": String::from_utf8_lossy(&result.body),
        "not_retained_bytes": result.not_retained.as_ref().map(|lost| lost.size.to_string()),
    })
}

fn record_json(record: &RecordInfo) -> Value {
    json!({
        "scope": record.scope,
        "key": record.key,
        "state": record.state,
        "attempt": record.attempt.to_string(),
        "attempt_no": record.attempt_no,
        "first_seen_ms": record.first_seen.as_millis().to_string(),
        "since_ms": record.since.as_millis().to_string(),
        "left_ms": record.left.map(|left| left.as_millis().to_string()),
        "checkpoint_count": record.checkpoint_count,
        "checkpoints": record.checkpoints.iter().map(checkpoint_json).collect::<Vec<_>>(),
        "result": record.result.as_ref().map(result_json),
        "fingerprint_algorithm": record.fingerprint.as_ref().map(|print| print.algorithm.clone()),
    })
}

fn ago(time: Duration) -> String {
    match time.as_secs() {
        0 => format!("{}ms", time.as_millis()),
        seconds @ 1..=119 => format!("{seconds}s"),
        seconds @ 120..=7_199 => format!("{}m", seconds / 60),
        seconds => format!("{}h", seconds / 3_600),
    }
}

fn row(record: &RecordInfo) -> Vec<String> {
    vec![
        record.scope.clone(),
        record.key.clone(),
        record.state.clone(),
        record.attempt.to_string(),
        record.attempt_no.to_string(),
        ago(record.since),
        record.left.map_or_else(|| "-".to_owned(), ago),
        record.checkpoint_count.to_string(),
    ]
}

const HEADINGS: [&str; 8] = ["SCOPE", "KEY", "STATE", "ATTEMPT", "NO", "SINCE", "LEFT", "CHECKPOINTS"];

fn show_record(record: &RecordInfo, output: Output) {
    if output == Output::Json {
        out!("{}", record_json(record));
        return;
    }
    print_table(&HEADINGS, &[row(record)]);
    for point in &record.checkpoints {
        out!("checkpoint {}: {}", point.name, String::from_utf8_lossy(&point.data));
    }
    if let Some(result) = &record.result {
        out!("status {}", result.status);
        match &result.not_retained {
            Some(lost) => out!("{} bytes, not kept", lost.size),
            None => out!("{}", String::from_utf8_lossy(&result.body)),
        }
    }
}

async fn list(common: &Common, args: ListArgs) -> anyhow::Result<ExitCode> {
    let records = common.client()?.idempotent(&args.scope);
    let found = if args.all_scopes {
        records.list_all_scopes(&args.state, args.limit).await
    } else {
        records.list(&args.prefix, &args.state, args.limit).await
    };
    let found = found.map_err(Failure::from)?;
    match args.output.output {
        Output::Json => out!("{}", Value::Array(found.iter().map(record_json).collect())),
        Output::Table => print_table(&HEADINGS, &found.iter().map(row).collect::<Vec<_>>()),
    }
    Ok(ExitCode::SUCCESS)
}

async fn run_once(common: &Common, args: RunArgs) -> anyhow::Result<ExitCode> {
    let mut records = records(common, &args.name, &args.beginning)?;
    if !args.any_command {
        let words: Vec<&[u8]> = args.command.iter().map(|word| word.as_bytes()).collect();
        records = records.fingerprint(Fingerprint::of(words.join(&0)));
    }
    let attempt = match records.begin(&args.name.key).await.map_err(Failure::from)? {
        Begun::Granted(attempt) => attempt,
        Begun::InFlight(flight) => {
            return Err(Failure::new(exit::IN_FLIGHT, flight.to_string()).hint(ASK_LATER).into());
        }
        Begun::Replay(replay) => {
            // Whoever reads it may be gone; the exit code is that of the first run all the same.
            let _ = std::io::stdout().write_all(&replay.result.body).and_then(|()| std::io::stdout().flush());
            return Ok(ExitCode::from(u8::try_from(replay.result.status).unwrap_or(exit::FAILURE)));
        }
    };
    let mut command = tokio::process::Command::new(&args.command[0]);
    command.args(&args.command[1..]).stdout(Stdio::piped()).kill_on_drop(true);
    command.env("TENURE_IDEM_KEY", &args.name.key).env("TENURE_ATTEMPT", attempt.token().to_string());
    command.env("TENURE_ATTEMPT_NO", attempt.number().to_string()).env("TENURE_ENDPOINTS", common.endpoints.join(","));
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            // Nothing has run.
            if let Err(lost) = attempt.release().await {
                tracing::debug!(%lost, "the key was not given free");
            }
            let not_there = error.kind() == std::io::ErrorKind::NotFound;
            let code = if not_there { exit::NO_SUCH_COMMAND } else { exit::NOT_EXECUTABLE };
            return Err(Failure::new(code, format!("{}: {error}", args.command[0].display())).into());
        }
    };
    let Ended { status, result } = match watch(child, &attempt).await? {
        Ok(ended) => ended,
        Err(error) => return Err(Failure::from(error).into()),
    };
    let Some(code) = status.code() else {
        let signal = status.signal().unwrap_or(0);
        print_failure(&format!("the command was ended by signal {signal}: nothing is stored"), None);
        if let Err(lost) = attempt.abandon().await {
            tracing::debug!(%lost, "the attempt lasts until its lease is over");
        }
        return Ok(ExitCode::from(128 + u8::try_from(signal).unwrap_or(0)));
    };
    let result = result.status(u32::try_from(code).unwrap_or(u32::from(exit::FAILURE)));
    let ended = match code {
        0 => attempt.complete(&result).await,
        _ if args.retry_failures => attempt.release().await,
        _ => attempt.fail(&result).await,
    };
    ended.map_err(Failure::from)?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(exit::FAILURE)))
}

struct Ended {
    status: std::process::ExitStatus,
    result: StoredResult,
}

/// Passes the command's output on and takes it in, passes signals on to it, and stops it if its attempt was replaced.
async fn watch(mut child: tokio::process::Child, attempt: &Attempt) -> anyhow::Result<Result<Ended, Error>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    let tell = |signal: Signal| {
        if let Some(pid) = pid {
            // It may have ended just now.
            let _ = rustix::process::kill_process(pid, signal);
        }
    };
    let mut output = child.stdout.take();
    let (mut sink, mut buffer) = (BodySink::default(), vec![0; 64 << 10]);
    let mut status = None;
    loop {
        let reading = async {
            match &mut output {
                Some(output) => output.read(&mut buffer).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            read = reading => match read? {
                0 => output = None,
                n => {
                    sink.push(&buffer[..n]);
                    // Whoever reads it may be gone; what is stored is whole all the same.
                    let _ = std::io::stdout().write_all(&buffer[..n]).and_then(|()| std::io::stdout().flush());
                }
            },
            ended = child.wait(), if status.is_none() => status = Some(ended?),
            problem = attempt.fenced() => {
                tell(Signal::TERM);
                if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
                    child.kill().await?;
                }
                return Ok(Err(Error::Refused(Box::new(problem))));
            }
            _ = terminate.recv() => tell(Signal::TERM),
            _ = interrupt.recv() => tell(Signal::INT),
        }
        if let (Some(status), None) = (status, &output) {
            return Ok(Ok(Ended { status, result: sink.finish() }));
        }
    }
}
