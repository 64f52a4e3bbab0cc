//! `tenure once`: do something once per marker.
//!
//! The marker is claimed under a session, the command runs, and its success is confirmed. A command that fails gives the claim back; one that dies with
//! its supervisor leaves a claim to which `--on-death` applies. The command finds the key of the effect in TENURE_EFFECT_KEY: give it to the other
//! side, which can then tell a second attempt from a second effect.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use tenure_client::{Claim, Claimed, Client, Marker, MarkerState, OnDeath, Retention, Session};
use tokio::signal::unix::{SignalKind, signal};

use crate::common::{Common, Failure, Output, OutputArg, duration, exit, print_failure, print_table};

/// How long a farewell to the server may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// Markers of a page, and of a list unless more are asked for.
const PAGE: u32 = 1_000;

#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Exit codes: that of the command, or 128 and its signal; 0 if it was done before; 14 while another does it; 16 if whoever did it
died and somebody must decide (`tenure once get`, then `once confirm` or `once delete`); 12 if the claim was lost meanwhile."
)]
pub(crate) struct OnceArgs {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    run: RunArgs,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The effect, as fields in any order: type=welcome,user=42
    #[arg(required = true)]
    marker: Option<String>,
    /// How long it is remembered: 30 days unless told otherwise, `forever`, or a duration of at least an hour
    #[arg(long, default_value = "720h", value_parser = retention)]
    retention: Retention,
    /// What the next one does if this run dies before it can tell how it ended
    #[arg(long, value_enum, default_value = "ask")]
    on_death: Policy,
    /// Who does it, for those who ask later; unless told otherwise the host and the process
    #[arg(long)]
    by: Option<String>,
    /// How long the claim outlives this process
    #[arg(long, default_value = "15s", value_parser = duration)]
    ttl: Duration,
    /// The command; without one the marker is just put
    #[arg(last = true)]
    command: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Tell of a marker, and what happened to it
    Get {
        marker: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List markers by name
    List {
        /// Only names that begin so; fields are sorted by name
        #[arg(default_value = "")]
        prefix: String,
        /// At most so many
        #[arg(long, default_value_t = PAGE as usize)]
        limit: usize,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Decide that a claimed effect has happened
    Confirm {
        marker: String,
        /// Of the claim, as `once get` tells it
        token: u64,
        /// What it left, for those who ask later
        #[arg(long, default_value = "")]
        result: String,
    },
    /// Forget a marker, so that its effect may happen anew
    #[command(visible_alias = "del")]
    Delete {
        marker: String,
        /// Why, for those who read of it later
        #[arg(long)]
        reason: String,
        /// Only what has this token
        #[arg(long)]
        token: Option<u64>,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Policy {
    /// Somebody decides
    Ask,
    /// It is done again: perhaps twice
    Retry,
    /// It is taken for done: perhaps never
    Skip,
}

fn retention(text: &str) -> Result<Retention, String> {
    match text {
        "forever" => Ok(Retention::Forever),
        text => match text.strip_suffix('d').map(str::parse::<u64>) {
            Some(Ok(days)) => Ok(Retention::For(Duration::from_secs(days.saturating_mul(24 * 3_600)))),
            _ => duration(text).map(Retention::For),
        },
    }
}

pub(crate) async fn run(common: &Common, args: OnceArgs) -> anyhow::Result<ExitCode> {
    let client = common.client()?;
    match args.action {
        None => once(&client, args.run).await,
        Some(Action::Get { marker, output }) => {
            let found = client.marker(&marker).await.map_err(Failure::from)?;
            let found = found.ok_or_else(|| Failure::new(exit::NOT_FOUND, format!("there is no marker `{marker}`")))?;
            print_marker(&found, output.output)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Action::List { prefix, limit, output }) => list(&client, &prefix, limit, output.output).await,
        Some(Action::Confirm { marker, token, result }) => {
            client.confirm_marker(marker, token, result).await.map_err(Failure::from)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Action::Delete { marker, reason, token }) => {
            let deleted = client.delete_marker(marker.as_str(), token, reason).await.map_err(Failure::from)?;
            if deleted {
                return Ok(ExitCode::SUCCESS);
            }
            Err(Failure::new(exit::NOT_FOUND, format!("there is no marker `{marker}`")).into())
        }
    }
}

async fn once(client: &Client, args: RunArgs) -> anyhow::Result<ExitCode> {
    let marker = args.marker.ok_or_else(|| Failure::usage("name the marker, such as type=welcome,user=42"))?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let by = args.by.unwrap_or_else(|| format!("{host}/{}", std::process::id()));
    let Some((program, rest)) = args.command.split_first() else {
        let once = client.once(marker).by(by).retention(args.retention).await.map_err(Failure::from)?;
        if once.already_done {
            tell(&once.marker, once.unconfirmed);
        }
        return Ok(ExitCode::SUCCESS);
    };
    let session = client.session().ttl(args.ttl).name(format!("tenure once {marker}")).await.map_err(Failure::from)?;
    let claim = client.claim(marker).by(by).retention(args.retention).under(&session).on_death(match args.on_death {
        Policy::Ask => OnDeath::Ask,
        Policy::Retry => OnDeath::Retry,
        Policy::Skip => OnDeath::Skip,
    });
    let ended = match claim.await {
        Err(error) => Err(Failure::from(error).into()),
        Ok(Claimed::AlreadyDone { marker, unconfirmed }) => {
            tell(&marker, unconfirmed);
            Ok(ExitCode::SUCCESS)
        }
        Ok(Claimed::Granted(claim)) => {
            let mut command = tokio::process::Command::new(program);
            command.args(rest);
            command.env("TENURE_EFFECT_KEY", claim.key()).env("TENURE_TOKEN", claim.token().to_string());
            command.env("TENURE_ATTEMPT", claim.attempt().to_string());
            supervise(&claim, command).await
        }
    };
    end(session).await;
    ended
}

async fn end(session: Session) {
    // If this does not get through, the ttl does it.
    let _ = tokio::time::timeout(GOODBYE, session.end()).await;
}

fn tell(marker: &Marker, unconfirmed: bool) {
    let perhaps = if unconfirmed { " perhaps: whoever did it died before it could confirm" } else { "" };
    err!("already done by `{}` {} ago{perhaps}", marker.by, brief(marker.age));
}

/// Runs the command and tells the service how it ended.
async fn supervise(claim: &Claim, mut command: tokio::process::Command) -> anyhow::Result<ExitCode> {
    // The terminal sends these to the command as well, which decides; its end decides here.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            claim.release().await.map_err(Failure::from)?;
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            let code = if missing { exit::NO_SUCH_COMMAND } else { exit::NOT_EXECUTABLE };
            let program = command.as_std().get_program().display();
            return Err(Failure::new(code, format!("cannot run {program}: {error}")).into());
        }
    };
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {
                if let Some(pid) = child.id().and_then(|id| rustix::process::Pid::from_raw(id as i32)) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                }
            }
        }
    };
    conclude(claim, status).await
}

async fn conclude(claim: &Claim, status: ExitStatus) -> anyhow::Result<ExitCode> {
    if status.success() {
        claim.confirm("").await.map_err(|error| {
            let failure = Failure::from(error);
            failure.hint("the command has run; `tenure once get` tells what the service knows of it")
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Err(error) = claim.release().await {
        print_failure(&format!("the claim was not given back: {error}"), None);
    }
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(exit::FAILURE)))
}

async fn list(client: &Client, prefix: &str, limit: usize, output: Output) -> anyhow::Result<ExitCode> {
    let (mut markers, mut after) = (Vec::new(), String::new());
    while markers.len() < limit {
        let page = PAGE.min(u32::try_from(limit - markers.len()).unwrap_or(PAGE));
        let (more, next) = client.markers(prefix, &after, page).await.map_err(Failure::from)?;
        markers.extend(more);
        match next {
            Some(next) => after = next,
            None => break,
        }
    }
    match output {
        Output::Json => out!("{}", Value::from(markers.iter().map(shown).collect::<Vec<_>>())),
        Output::Table => {
            let row = |m: &Marker| vec![m.name.clone(), m.state.name().to_owned(), m.by.clone(), brief(m.age)];
            print_table(&["MARKER", "STATE", "BY", "SINCE"], &markers.iter().map(row).collect::<Vec<_>>());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_marker(marker: &Marker, output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        out!("{}", serde_json::to_string_pretty(&shown(marker))?);
        return Ok(());
    }
    let mut rows = vec![
        vec!["marker".to_owned(), marker.name.clone()],
        vec!["state".to_owned(), marker.state.name().to_owned()],
        vec!["by".to_owned(), marker.by.clone()],
        vec!["since".to_owned(), brief(marker.age)],
        vec!["token".to_owned(), marker.token.to_string()],
    ];
    if marker.attempt > 0 {
        rows.push(vec!["attempt".to_owned(), marker.attempt.to_string()]);
    }
    if !marker.result.is_empty() {
        rows.push(vec!["result".to_owned(), String::from_utf8_lossy(&marker.result).into_owned()]);
    }
    let left = marker.left.map_or_else(|| "until it is deleted".to_owned(), brief);
    if marker.state != MarkerState::Claimed {
        rows.push(vec!["kept for".to_owned(), left]);
    }
    for event in &marker.events {
        let reason = if event.reason.is_empty() { String::new() } else { format!(": {}", event.reason) };
        let told = format!("{} (token {}) {} ago{reason}", event.by, event.token, brief(event.age));
        rows.push(vec![event.kind.to_owned(), told]);
    }
    print_table(&["FIELD", "VALUE"], &rows);
    Ok(())
}

fn shown(marker: &Marker) -> Value {
    let event = |e: &tenure_client::MarkerEvent| json!({ "kind": e.kind, "age_ms": e.age.as_millis() as u64, "token": e.token.to_string(), "by": e.by, "reason": e.reason });
    json!({
        "marker": marker.name,
        "state": marker.state.name(),
        "by": marker.by,
        "token": marker.token.to_string(),
        "age_ms": marker.age.as_millis() as u64,
        "attempt": marker.attempt,
        "result": String::from_utf8_lossy(&marker.result),
        "left_ms": marker.left.map(|left| left.as_millis() as u64),
        "session": marker.session.to_string(),
        "events": marker.events.iter().map(event).collect::<Vec<_>>(),
    })
}

/// A length of time in the one or two largest units that it fills.
fn brief(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{}m", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}
