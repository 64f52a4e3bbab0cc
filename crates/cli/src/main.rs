//! The one binary: the server, and every tool that talks to it.
//!
//! Each command is a file; `common.rs` holds what they share: endpoints, printing, exit codes.

#![cfg_attr(test, allow(clippy::unwrap_used))]

#[macro_use]
mod common;

mod bench;
mod config;
mod counter;
mod elect;
mod idem;
mod kv;
mod lock;
mod member;
mod once;
mod queue;
mod reserve;
mod restore;
mod schedule;
mod serve;
mod service;
mod session;
mod snapshot;
mod status;
mod txn;
mod watch;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use std::ffi::OsString;
use std::process::ExitCode;

/// Measured: the system's allocator costs a quarter more processor time per request (docs/performance.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Tenure makes concurrent systems correct
///
/// Locks with fencing tokens, sessions, versioned keys and watches in one durable, replicated service that every etcd client can use.
#[derive(Parser)]
#[command(name = "tenure", version, propagate_version = true, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    common: common::Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start the server in the foreground
    Serve(Box<serve::ServeArgs>),
    /// Show how the cluster is, and each of its members
    Status(status::StatusArgs),
    /// List, add, promote, replace and remove members
    Member(member::MemberArgs),
    /// Read and write keys
    Kv(kv::KvArgs),
    /// Follow changes of keys
    Watch(watch::WatchArgs),
    /// Make, list and end sessions
    Session(session::SessionArgs),
    /// Run a command under a lock
    Lock(lock::LockArgs),
    /// Publish, read, follow and roll back configuration
    Config(config::ConfigArgs),
    /// Add to counters and take numbers from sequences
    Counter(counter::CounterArgs),
    /// Run a command while elected, or look at an election
    Elect(elect::ElectArgs),
    /// Begin, complete and look at idempotency records
    Idem(idem::IdemArgs),
    /// Do something once per marker
    Once(once::OnceArgs),
    /// Enqueue, receive and settle jobs
    Queue(queue::QueueArgs),
    /// Reserve a part of a pool
    Reserve(reserve::ReserveArgs),
    /// Enqueue jobs by the calendar
    Schedule(schedule::ScheduleArgs),
    /// Register and find instances of services
    Service(service::ServiceArgs),
    /// Run one transaction over all primitives
    Txn(txn::TxnArgs),
    /// Save and check backups
    Snapshot(snapshot::SnapshotArgs),
    /// Make the folder of a new member from a backup
    Restore(restore::RestoreArgs),
    /// Measure a server, alone or beside the real etcd
    Bench(bench::BenchArgs),
    /// Print the completion script of a shell
    Completion {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    match parse().and_then(run) {
        Ok(code) => code,
        Err(e) => common::report(&e),
    }
}

/// Reads the arguments, a second time with what a settings file adds to them.
fn parse() -> anyhow::Result<Cli> {
    let all: Vec<OsString> = std::env::args_os().collect();
    let matches = matches(&all);
    let matches = match serve::with_file(&all, &matches)? {
        Some(more) => self::matches(&more),
        None => matches,
    };
    Ok(Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit()))
}

fn matches(all: &[OsString]) -> clap::ArgMatches {
    Cli::command().try_get_matches_from(all).unwrap_or_else(|e| {
        // Wrong use is 64 for every command, as the table of exit codes has it; help and version are no errors.
        let code = if e.use_stderr() { common::exit::USAGE } else { 0 };
        let _ = e.print();
        std::process::exit(code.into())
    })
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let common = cli.common;
    match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Status(args) => block_on(status::run(&common, args)),
        Command::Member(args) => block_on(member::run(&common, args)),
        Command::Kv(args) => block_on(kv::run(&common, args)),
        Command::Watch(args) => block_on(watch::run(&common, args)),
        Command::Session(args) => block_on(session::run(&common, args)),
        Command::Lock(args) => block_on(lock::run(&common, args)),
        Command::Config(args) => block_on(config::run(&common, args)),
        Command::Counter(args) => block_on(counter::run(&common, args)),
        Command::Elect(args) => block_on(elect::run(&common, args)),
        Command::Idem(args) => block_on(idem::run(&common, args)),
        Command::Once(args) => block_on(once::run(&common, args)),
        Command::Queue(args) => block_on(queue::run(&common, args)),
        Command::Reserve(args) => block_on(reserve::run(&common, args)),
        Command::Schedule(args) => block_on(schedule::run(&common, args)),
        Command::Service(args) => block_on(service::run(&common, args)),
        Command::Txn(args) => block_on(txn::run(&common, args)),
        Command::Snapshot(args) => block_on(snapshot::run(&common, args)),
        Command::Restore(args) => restore::run(args),
        Command::Bench(args) => block_on(bench::run(&common, args)),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "tenure", &mut common::stdout());
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn block_on(work: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
