//! `tenure elect NAME -- command`: runs a command only while elected, or looks at an election.
//!
//! Promises. The command starts only when elected, with the token in its environment, and is watched over as by `tenure lock`: it is warned
//! before the deadline of a session that cannot be renewed, and killed at it. The lead is resigned only after the command has ended.
//! Not promised. That the command hears when it should yield: `--yield` sends it the signal of a stop then, nothing else does.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tenure_client::{Client, Code, ElectionCandidate, ElectionInfo, Error, Leadership, Session};
use tokio::time::timeout;

use crate::common::{Common, Failure, Output, OutputArg, duration, exit, millis, print_failure, print_table};
use crate::lock::{self, Ended, GOODBYE, Signals, Supervision, WarnSignal};

/// Run a command while elected, or look at an election
#[derive(Debug, Args)]
#[command(
    after_help = "The command's environment: TENURE_ELECTION, TENURE_TOKEN, TENURE_SESSION, TENURE_DEADLINE_MS, TENURE_ENDPOINTS.\n\n\
Exit code: the command's own, or 128 + the signal that ended it; 1 (-E) when another leads and the wait is over;\n\
76 (--lost-code) when the lead was lost while the command ran; 69 when no server can be reached; 64 wrong use;\n\
126, 127 when the command cannot be started.\n\n\
Example: tenure elect scheduler --value $(hostname):8080 -- ./scheduler"
)]
pub(crate) struct ElectArgs {
    /// Name of the election; without one, and without a command, those that somebody leads are listed
    name: Option<String>,
    /// What the leader publishes
    #[arg(long, default_value = "", hide_default_value = true)]
    value: String,
    /// Higher ones are elected first
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_name = "N")]
    priority: i32,
    /// The lead ends this long after the last sign of life
    #[arg(long, default_value = "15s", value_name = "DURATION", value_parser = duration)]
    ttl: Duration,
    /// Wait at most this long to be elected [default: for ever]
    #[arg(long, short = 'w', value_name = "DURATION", value_parser = duration, conflicts_with = "nonblock")]
    wait: Option<Duration>,
    /// Do not wait: fail at once if another leads
    #[arg(long, short = 'n', visible_alias = "nb")]
    nonblock: bool,
    /// Ask the command to stop when a candidate with a higher priority waits
    #[arg(long = "yield")]
    yields: bool,
    /// Exit code when another leads
    #[arg(long, short = 'E', value_name = "CODE", default_value_t = exit::FAILURE)]
    conflict_exit_code: u8,
    /// Exit code when the lead was lost while the command ran
    #[arg(long, visible_alias = "lost-exit-code", value_name = "CODE", default_value_t = exit::LOST)]
    lost_code: u8,
    /// The signal by which the command is asked to stop
    #[arg(long, value_enum, default_value = "term", value_name = "SIGNAL")]
    warn_signal: WarnSignal,
    /// Let the command use the terminal
    #[arg(long)]
    foreground: bool,
    /// Follow who leads, until stopped
    #[arg(long, conflicts_with = "command", requires = "name")]
    observe: bool,
    #[command(flatten)]
    output: OutputArg,
    /// The command and its arguments; without one the election is shown
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

pub(crate) async fn run(common: &Common, args: ElectArgs) -> anyhow::Result<ExitCode> {
    let client = common.client()?;
    let Some(name) = &args.name else {
        if !args.command.is_empty() {
            return Err(Failure::usage("name the election to run the command under").into());
        }
        print_list(&client.elections("").await?, args.output.output);
        return Ok(ExitCode::SUCCESS);
    };
    if args.observe {
        return observe(&client, name, args.output.output).await;
    }
    if args.command.is_empty() {
        print_one(&client.election(name).get().await?, args.output.output);
        return Ok(ExitCode::SUCCESS);
    }
    lead(common, &client, name, &args).await
}

// ---- Leading ----

async fn lead(common: &Common, client: &Client, name: &str, args: &ElectArgs) -> anyhow::Result<ExitCode> {
    if args.ttl < Duration::from_secs(1) {
        return Err(Failure::usage("--ttl is at least 1s").into());
    }
    // Before anything is asked for, so that no signal finds a leader without a supervisor.
    let mut signals = Signals::catch()?;
    let session = client
        .session()
        .ttl(args.ttl)
        .name(format!("tenure elect {name}"))
        .metadata("host", lock::hostname())
        .metadata("pid", std::process::id().to_string())
        .metadata("command", lock::brief(&args.command))
        .await
        .map_err(Failure::from)?;
    let leader = tokio::select! {
        leader = campaign(client, &session, name, args) => leader,
        signal = signals.next_deadly() => {
            lock::end(session).await;
            return Ok(ExitCode::from(128 + u8::try_from(signal.as_raw()).unwrap_or(0)));
        }
    };
    match leader {
        Ok(leader) => supervise(common, args, leader, signals).await,
        Err(failure) => {
            lock::end(session).await;
            Err(failure.into())
        }
    }
}

async fn campaign(client: &Client, session: &Session, name: &str, args: &ElectArgs) -> Result<Leadership, Failure> {
    let election = client.election(name).value(args.value.clone()).priority(args.priority);
    let election = match args.wait {
        _ if args.nonblock => election.wait(Duration::ZERO),
        Some(wait) => election.wait(wait),
        None => election,
    };
    election.campaign(session).await.map_err(|error| match error.code() {
        Some(Code::Held | Code::TimeoutWaiting) => Failure::new(args.conflict_exit_code, error.to_string())
            .hint(format!("`tenure elect {name}` tells who leads")),
        _ => Failure::from(error),
    })
}

async fn supervise(
    common: &Common,
    args: &ElectArgs,
    leader: Leadership,
    mut signals: Signals,
) -> anyhow::Result<ExitCode> {
    let session = leader.session().clone();
    let supervision = Supervision {
        session: session.clone(),
        grace: lock::usual_grace(&session),
        warning: args.warn_signal.number(),
        foreground: args.foreground,
        hold_for_group: !args.foreground,
    };
    let mut command = lock::tied(&args.command, args.foreground)?;
    command
        .env("TENURE_ELECTION", leader.name())
        .env("TENURE_TOKEN", leader.token().to_string())
        .env("TENURE_SESSION", session.id().to_string())
        .env("TENURE_DEADLINE_MS", session.deadline().unix_ms().to_string())
        .env("TENURE_ENDPOINTS", common.endpoints.join(","));
    if args.yields {
        let (leader, signal, stop) = (leader.clone(), args.warn_signal.number(), signals.sender());
        tokio::spawn(async move {
            leader.should_yield().await;
            let _ = stop.send(signal).await;
            lock::tell("a candidate with a higher priority waits; the command is asked to stop".to_owned());
        });
    }
    let ended = lock::run_supervised(supervision, command, &mut signals).await?;
    conclude(args, leader, session, ended).await
}

/// Resigns, now that the command has ended, and tells what happened.
async fn conclude(args: &ElectArgs, leader: Leadership, session: Session, ended: Ended) -> anyhow::Result<ExitCode> {
    let (name, token) = (leader.name().to_owned(), leader.token());
    if let Some(why) = ended.stopped {
        lock::end(session).await;
        let hint = "the command was stopped; whoever leads now has a higher token: let writes carry theirs";
        let message = format!("the lead of `{name}` was lost while the command ran (token {token}): {why}");
        print_failure(&message, Some(hint));
        return Ok(ExitCode::from(args.lost_code));
    }
    let resigned = timeout(GOODBYE, leader.resign()).await;
    lock::end(session).await;
    match resigned {
        Ok(Err(error))
            if matches!(error, Error::Lost(_)) || matches!(error.code(), Some(Code::Fenced | Code::SessionExpired)) =>
        {
            let hint =
                "another may have led beside its last moments: check what it wrote, and let writes carry the token";
            let message = format!("the lead of `{name}` was lost before the command ended (token {token}): {error}");
            print_failure(&message, Some(hint));
            return Ok(ExitCode::from(args.lost_code));
        }
        Ok(Err(error)) => err!("warning: the lead was not resigned ({error}); it ends with its ttl"),
        Err(_) => err!("warning: the lead was not resigned (no answer); it ends with its ttl"),
        Ok(Ok(())) => {}
    }
    Ok(ExitCode::from(lock::code_of(ended.status)))
}

// ---- Looking ----

async fn observe(client: &Client, name: &str, output: Output) -> anyhow::Result<ExitCode> {
    let mut observing = client.election(name).observe();
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(ExitCode::SUCCESS),
            info = observing.next() => print_state(&info?, output),
        }
    }
}

/// One line for each state, so that a script can read them as they come.
fn print_state(info: &ElectionInfo, output: Output) {
    match (output, &info.leader) {
        (Output::Json, _) => out!("{}", document(info)),
        (Output::Table, None) => out!("vacant"),
        (Output::Table, Some(leader)) => {
            let yields = if info.should_yield { " (should yield)" } else { "" };
            out!("{} {} {}{yields}", leader.token, leader.session, String::from_utf8_lossy(&leader.value));
        }
    }
}

fn print_list(elections: &[ElectionInfo], output: Output) {
    if output == Output::Json {
        out!("{}", Value::from(elections.iter().map(document).collect::<Vec<_>>()));
        return;
    }
    print_table(&HEADINGS, &elections.iter().map(row).collect::<Vec<_>>());
}

const HEADINGS: [&str; 6] = ["NAME", "TOKEN", "SESSION", "LED", "CANDIDATES", "VALUE"];

fn row(info: &ElectionInfo) -> Vec<String> {
    let (name, candidates) = (info.name.clone(), info.candidate_count.to_string());
    let Some(leader) = &info.leader else {
        return vec![name, "-".to_owned(), "-".to_owned(), "-".to_owned(), candidates, "vacant".to_owned()];
    };
    vec![
        name,
        leader.token.to_string(),
        leader.session.to_string(),
        format!("{:.1}s", leader.led.as_secs_f64()),
        candidates,
        String::from_utf8_lossy(&leader.value).into_owned(),
    ]
}

fn print_one(info: &ElectionInfo, output: Output) {
    if output == Output::Json {
        out!("{}", document(info));
        return;
    }
    print_table(&HEADINGS, &[row(info)]);
    for candidate in &info.candidates {
        let waited = candidate.waited.as_secs_f64();
        let ElectionCandidate { position, session, priority, session_name, .. } = candidate;
        out!("  {position}. session {session} ({session_name}), priority {priority}, waits {waited:.1}s");
    }
    if info.should_yield {
        out!("  the leader should yield: a candidate with a higher priority waits");
    }
}

/// 64-bit numbers are text in JSON, as on the HTTP face.
fn document(info: &ElectionInfo) -> Value {
    let candidate = |c: &ElectionCandidate| {
        json!({
            "position": c.position.to_string(), "session": c.session.to_string(), "priority": c.priority,
            "waited_ms": millis(c.waited), "session_name": c.session_name,
        })
    };
    let leader = info.leader.as_ref().map(|leader| {
        json!({
            "token": leader.token.to_string(), "session": leader.session.to_string(),
            "value": String::from_utf8_lossy(&leader.value), "priority": leader.priority, "led_ms": millis(leader.led),
            "session_name": leader.session_name, "metadata": leader.metadata,
        })
    });
    json!({
        "name": info.name,
        "state": if leader.is_some() { "elected" } else { "vacant" },
        "leader": leader,
        "should_yield": info.should_yield,
        "candidates": info.candidates.iter().map(candidate).collect::<Vec<_>>(),
        "candidate_count": info.candidate_count.to_string(),
    })
}
