//! `tenure bench`: the same load on any etcd endpoint and on the native API, and a table of both side by side.
//!
//! Promises. Every figure of a comparison comes from one run on one machine, each peer alone while it is measured, with fsync on.
//! Server processor time per operation is read from the process itself; it is the steadiest figure on a shared machine.
//! Not promised. That rates compare between machines, or between runs.

mod cluster;
mod compare;
mod load;
mod measure;
mod native;
mod peer;
#[cfg(feature = "peers")]
mod peers;
mod rpc;
mod three;

use anyhow::Result;
use measure::Figures;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::common::{Common, Failure, duration};

#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, clap::Subcommand)]
enum BenchCommand {
    /// One workload on a server that runs already
    Run(RunArgs),
    /// Every workload on Tenure and on the real etcd, in turn, as a Markdown table
    Compare(CompareArgs),
    /// Queues, idempotency and locks beside PostgreSQL, Redis, beanstalkd and NATS, as a Markdown table
    #[cfg(feature = "peers")]
    Peers(peers::PeersArgs),
}

#[derive(Clone, Copy, Debug, clap::ValueEnum, PartialEq, Eq)]
enum Workload {
    /// Puts over the etcd API
    Put,
    /// Linearizable gets over the etcd API
    Get,
    /// Ranges of 10,000 keys over the etcd API
    Range,
    /// Acquire and release as etcd's Go client does it, each client its own lock
    Mutex,
    /// The same, all clients on one lock
    MutexHot,
    /// Watchers of one key
    Watch,
    /// Live leases, each kept alive every 20 s
    Leases,
    /// Puts over the native stream, all callers on one connection
    NativePut,
    /// Linearizable gets over the native stream
    NativeGet,
    /// Native acquire and release, each caller its own lock
    NativeLock,
    /// The same, all callers on one lock
    NativeLockHot,
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// What to do
    #[arg(value_enum)]
    workload: Workload,
    /// Clients (watchers, leases) at once
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// How long to measure
    #[arg(long, default_value = "5s", value_parser = duration)]
    duration: Duration,
    /// Bytes of each value
    #[arg(long, default_value_t = 256)]
    value_bytes: usize,
    /// Different keys
    #[arg(long, default_value_t = 10_000)]
    keys: u64,
    /// The process ids of the members, comma separated, to read their processor time
    #[arg(long, value_delimiter = ',')]
    pid: Vec<u32>,
}

#[derive(Debug, clap::Args)]
struct CompareArgs {
    /// The program of the real etcd
    #[arg(long, value_name = "FILE")]
    etcd: PathBuf,
    /// How long to measure each workload
    #[arg(long, visible_alias = "seconds", default_value = "4s", value_parser = duration)]
    duration: Duration,
    /// Only the rows whose name contains one of these, comma separated; of the table of one member
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Members of each cluster
    #[arg(long, default_value = "1", value_parser = ["1", "3"], value_name = "N")]
    members: String,
    #[command(flatten)]
    three: three::Settings,
}

pub(crate) async fn run(common: &Common, args: BenchArgs) -> Result<ExitCode> {
    match args.command {
        BenchCommand::Run(args) => one(common, &args).await,
        #[cfg(feature = "peers")]
        BenchCommand::Peers(args) => peers::run(&args).await,
        BenchCommand::Compare(args) => {
            let programs = peer::Programs { tenure: std::env::current_exe()?, etcd: args.etcd };
            match args.members.as_str() {
                "1" if args.three.is_filtered() => {
                    Err(Failure::usage("--cells is of three members: add --members 3, or use --only").into())
                }
                "1" => compare::run(&programs, args.duration, &args.only).await,
                _ if !args.only.is_empty() => {
                    Err(Failure::usage("--only is of one member: of three, --cells names what to measure").into())
                }
                _ => three::run(&programs, args.duration, &args.three).await,
            }
        }
    }
}

async fn one(common: &Common, args: &RunArgs) -> Result<ExitCode> {
    let endpoint = common.endpoints.first().cloned().unwrap_or_default();
    let target = load::Target {
        endpoints: common.endpoints.clone(),
        pids: args.pid.clone(),
        clients: args.clients,
        duration: args.duration,
        value_bytes: args.value_bytes,
        keys: args.keys,
    };
    if matches!(args.workload, Workload::Get | Workload::Range | Workload::NativeGet) {
        load::fill(&endpoint, args.keys.max(10_000), args.value_bytes).await?;
    }
    let figures = match args.workload {
        Workload::Put => load::put(&target).await?,
        Workload::Get => load::get(&target).await?,
        Workload::Range => load::range(&target, 10_000).await?,
        Workload::Mutex => load::recipe_mutex(&target, false).await?,
        Workload::MutexHot => load::recipe_mutex(&target, true).await?,
        Workload::Watch => load::watch_fan_out(&target, args.clients).await?,
        Workload::Leases => load::leases(&target, args.clients as u64, 60).await?,
        Workload::NativePut => native::put(&target).await?,
        Workload::NativeGet => native::get(&target).await?,
        Workload::NativeLock => native::lock(&target, false).await?,
        Workload::NativeLockHot => native::lock(&target, true).await?,
    };
    println!("{}", sentence(&figures));
    Ok(ExitCode::SUCCESS)
}

/// One run in one line.
fn sentence(f: &Figures) -> String {
    let mut line = format!(
        "{:.0} operations/s, p50 {:.2} ms, p99 {:.2} ms, p99.9 {:.2} ms",
        f.rate(),
        f.p(0.5),
        f.p(0.99),
        f.p(0.999)
    );
    if let Some(us) = f.server_us_per_op() {
        line += &format!(", server {us:.1} us/operation");
    }
    if let Some((most, least)) = f.fairness {
        line += &format!(", clients {least} to {most}");
    }
    if f.errors > 0 {
        line += &format!(", {} errors", f.errors);
    }
    line
}
