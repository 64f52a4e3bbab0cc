//! `tenure schedule`: jobs that are enqueued by the calendar.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use tenure_client::{Client, ScheduleInfo};

use crate::common::{Common, Failure, Output, OutputArg, duration, exit, print_table};
use crate::queue::JobArgs;

#[derive(Debug, Args)]
pub(crate) struct ScheduleArgs {
    #[command(subcommand)]
    command: ScheduleCommand,
}

#[derive(Debug, Subcommand)]
enum ScheduleCommand {
    /// Create a schedule or change it, and print its next ticks
    Put(Box<PutArgs>),
    /// Print a schedule with its next ticks
    Get {
        /// The schedule
        name: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// List schedules
    List {
        /// Only names that begin so
        #[arg(default_value = "")]
        prefix: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Stop the calendar of a schedule; ticks that pass meanwhile are never made up for
    Pause {
        /// The schedule
        name: String,
    },
    /// Let the calendar go on from now
    Resume {
        /// The schedule
        name: String,
    },
    /// Enqueue the job now, beside the calendar
    Run {
        /// The schedule
        name: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Delete a schedule; jobs that it has enqueued stay
    #[command(visible_alias = "del")]
    Delete {
        /// The schedule
        name: String,
    },
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example: tenure schedule put nightly '0 3 * * *' reports full --zone Europe/Berlin --no-overlap"
)]
struct PutArgs {
    /// The schedule
    name: String,
    /// Minute, hour, day of the month, month, day of the week; or @hourly, @daily, @weekly, @monthly, @yearly, '@every 90s'
    calendar: String,
    /// Where its jobs go
    queue: String,
    /// The payload of its jobs; `-` reads it from standard input
    #[arg(default_value = "")]
    payload: String,
    /// The time zone of the calendar, such as Europe/Berlin, in place of UTC
    #[arg(long, default_value = "", hide_default_value = true, value_name = "ZONE")]
    zone: String,
    /// Do the last of the ticks that nobody could do in time, however late; else they are left out
    #[arg(long)]
    run_missed: bool,
    /// How late a tick may be and still count as in time, in place of a minute
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    grace: Option<Duration>,
    /// A tick enqueues nothing while the job before is not done
    #[arg(long, conflicts_with = "key")]
    no_overlap: bool,
    /// A tick enqueues nothing while a job with this key is not done
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    #[command(flatten)]
    job: JobArgs,
    /// Only if there is no such schedule (exit code 10)
    #[arg(long, conflicts_with = "if_revision")]
    if_absent: bool,
    /// Only if this was its last change (exit code 10)
    #[arg(long, value_name = "N")]
    if_revision: Option<u64>,
    #[command(flatten)]
    output: OutputArg,
}

pub(crate) async fn run(common: &Common, args: ScheduleArgs) -> anyhow::Result<ExitCode> {
    let client = common.client()?;
    match args.command {
        ScheduleCommand::Put(args) => put(&client, *args).await?,
        ScheduleCommand::Get { name, output } => {
            let missing = || Failure::new(exit::NOT_FOUND, format!("there is no schedule `{name}`"));
            print_one(&client.schedule(&name).get().await?.ok_or_else(missing)?, output.output);
        }
        ScheduleCommand::List { prefix, output } => print_all(&client.schedules(&prefix).await?, output.output),
        ScheduleCommand::Pause { name } => {
            client.schedule(name).pause().await?;
            out!("paused");
        }
        ScheduleCommand::Resume { name } => {
            client.schedule(name).resume().await?;
            out!("resumed");
        }
        ScheduleCommand::Run { name, output } => {
            let job = client.schedule(name).run().await?;
            match output.output {
                Output::Json => out!("{}", json!({ "id": job.id, "duplicate": job.duplicate })),
                Output::Table if job.duplicate => out!("{} duplicate", job.id),
                Output::Table => out!("{}", job.id),
            }
        }
        ScheduleCommand::Delete { name } => {
            out!("{}", if client.schedule(name).delete().await? { "deleted" } else { "there was none" });
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn put(client: &Client, args: PutArgs) -> anyhow::Result<()> {
    let mut job = args.job.job(args.payload)?;
    if let Some(key) = args.key {
        job = job.key(key);
    }
    let schedule = client.schedule(args.name);
    let mut put = schedule.put(args.calendar, args.queue, job).zone(&args.zone);
    if args.run_missed {
        put = put.run_last_missed();
    }
    if let Some(grace) = args.grace {
        put = put.grace(grace);
    }
    if args.no_overlap {
        put = put.no_overlap();
    }
    if args.if_absent {
        put = put.if_absent();
    }
    if let Some(revision) = args.if_revision {
        put = put.if_revision(revision);
    }
    let stored = put.await?;
    if args.output.output == Output::Json {
        let next: Vec<Value> = stored.next.iter().map(|at| json!(unix_ms(*at).to_string())).collect();
        out!("{}", json!({ "created": stored.created, "revision": stored.revision.to_string(), "next_unix_ms": next }));
        return Ok(());
    }
    out!("{} at revision {}", if stored.created { "created" } else { "stored" }, stored.revision);
    for at in stored.next {
        out!("next {}", shown(at, &args.zone));
    }
    Ok(())
}

fn unix_ms(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// In the zone of the schedule, or in UTC where that is not known here, as RFC 3339 has it.
fn shown(at: SystemTime, zone: &str) -> String {
    let zone = jiff::tz::db().get(zone).unwrap_or(TimeZone::UTC);
    let at = Timestamp::from_millisecond(unix_ms(at) as i64).unwrap_or_default().to_zoned(zone);
    at.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()
}

fn in_json(info: &ScheduleInfo) -> Value {
    let at = |at: &SystemTime| json!(unix_ms(*at).to_string());
    json!({
        "name": info.name,
        "calendar": info.calendar,
        "time_zone": info.time_zone,
        "queue": info.queue,
        "payload": String::from_utf8_lossy(&info.payload),
        "run_missed": info.run_last_missed,
        "grace_ms": info.grace.as_millis() as u64,
        "no_overlap": info.no_overlap,
        "paused": info.paused,
        "revision": info.revision.to_string(),
        "last_unix_ms": info.last.as_ref().map(at),
        "next_unix_ms": info.next.iter().map(at).collect::<Vec<_>>(),
        "late_ms": info.late.as_millis() as u64,
        "enqueued": info.enqueued.to_string(),
        "job": info.job,
        "last_error": info.refused.as_ref().map(|(tick, why)| json!({ "tick_unix_ms": at(tick), "why": why })),
    })
}

/// One word for people, who look for what is wrong first.
fn state(info: &ScheduleInfo) -> String {
    if info.paused {
        "paused".to_owned()
    } else if !info.late.is_zero() {
        format!("late by {}", length(info.late))
    } else {
        "ok".to_owned()
    }
}

fn length(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{}s", seconds / 60, seconds % 60),
        _ => format!("{}h{}m", seconds / 3_600, seconds / 60 % 60),
    }
}

fn print_one(info: &ScheduleInfo, output: Output) {
    if output == Output::Json {
        out!("{}", in_json(info));
        return;
    }
    let line = |name: &str, value: &str| out!("{}", format!("{name:<10} {value}").trim_end());
    let zone = if info.time_zone.is_empty() { "UTC" } else { &info.time_zone };
    line("name", &info.name);
    line("calendar", &format!("{} ({zone})", info.calendar));
    line("queue", &info.queue);
    line("payload", &String::from_utf8_lossy(&info.payload));
    line("missed", if info.run_last_missed { "run the last" } else { "skip" });
    line("overlap", if info.no_overlap { "no" } else { "yes" });
    line("state", &state(info));
    line("revision", &info.revision.to_string());
    line("enqueued", &info.enqueued.to_string());
    line("job", info.job.as_deref().unwrap_or("-"));
    line("done to", &info.last.map_or_else(|| "-".to_owned(), |at| shown(at, &info.time_zone)));
    if let Some((tick, why)) = &info.refused {
        line("refused", &format!("{}: {why}", shown(*tick, &info.time_zone)));
    }
    for at in &info.next {
        line("next", &shown(*at, &info.time_zone));
    }
}

fn print_all(all: &[ScheduleInfo], output: Output) {
    if output == Output::Json {
        out!("{}", Value::Array(all.iter().map(in_json).collect()));
        return;
    }
    let row = |info: &ScheduleInfo| {
        let next = info.next.first().map_or_else(|| "-".to_owned(), |at| shown(*at, &info.time_zone));
        // Before its first job this is when it was made.
        let last =
            info.last.filter(|_| info.enqueued > 0).map_or_else(|| "-".to_owned(), |at| shown(at, &info.time_zone));
        vec![info.name.clone(), info.calendar.clone(), info.queue.clone(), state(info), last, next]
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    print_table(&["NAME", "CALENDAR", "QUEUE", "STATE", "LAST", "NEXT"], &rows);
}
