//! `tenure reserve`: hold a part of a pool, run a command under the hold, and look after pools.
//!
//! Promises. With a command: it starts only under a hold, which is extended while it runs, confirmed when it succeeds (unless told otherwise) and given
//! back when it fails. A command whose hold is lost is told to stop and killed soon after; one whose hold cannot be extended is told before the hold ends
//! and killed when it does, whether or not the server can be asked.
//! Not promised. That a hold without a command outlives its time: whoever took it confirms, extends or cancels it by its numbers.

use std::cell::Cell;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitCode, ExitStatus};
use std::time::Duration;

use clap::{Args, Subcommand};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tenure_client::{BootTime, Client, Code, Error, Pool, PoolInfo, Reservation, ReservationChange};
use tokio::signal::unix::{SignalKind, signal};

use crate::common::{Common, Failure, Output, OutputArg, duration, exit, millis, print_failure, print_table};

/// The longest sleep of who watches over a command: timers stand still while the machine is suspended.
const LOOK_EVERY: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "The command's environment: TENURE_POOL, TENURE_RESERVATION, TENURE_TOKEN, TENURE_QUANTITY, TENURE_ENDPOINTS.\n\n\
Example: tenure reserve concert/seats 2 --wait 10s -- ./pay.sh\n\
         tenure reserve concert/seats 2 --hold 10m, then: tenure reserve confirm concert/seats ID TOKEN"
)]
pub(crate) struct ReserveArgs {
    #[command(subcommand)]
    command: Option<ReserveCommand>,
    #[command(flatten)]
    take: Take,
}

#[derive(Debug, Args)]
struct Take {
    /// Name of the pool
    pool: Option<String>,
    /// How many units
    quantity: Option<u64>,
    /// How long the hold lasts unless it is confirmed or extended
    #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = duration)]
    hold: Duration,
    /// Wait at most this long [default: do not wait]
    #[arg(long, short = 'w', value_name = "DURATION", value_parser = duration)]
    wait: Option<Duration>,
    /// Who asks, for people
    #[arg(long, default_value = "", value_name = "TEXT")]
    owner: String,
    /// Give the hold back also when the command succeeds
    #[arg(long, requires = "run")]
    give_back: bool,
    #[command(flatten)]
    output: OutputArg,
    /// A command to run under the hold
    #[arg(last = true, value_name = "COMMAND")]
    run: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
enum ReserveCommand {
    /// Make a hold final
    Confirm(OfHold),
    /// Give a hold back
    Cancel(OfHold),
    /// Make a hold last longer
    Extend {
        #[command(flatten)]
        of: OfHold,
        /// How long from now on
        #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = duration)]
        hold: Duration,
    },
    /// List pools
    Pools {
        /// Only names that begin so
        #[arg(default_value = "")]
        prefix: String,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Make, look at, resize and delete pools
    Pool {
        #[command(subcommand)]
        command: PoolCommand,
    },
}

#[derive(Debug, Args)]
struct OfHold {
    /// Name of the pool
    pool: String,
    /// Number of the hold
    id: u64,
    /// Its token
    token: u64,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, Args)]
struct Sized {
    /// Name of the pool
    pool: String,
    /// How many units
    units: u64,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, Args)]
struct Named {
    /// Name of the pool
    pool: String,
    #[command(flatten)]
    output: OutputArg,
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Make a pool
    Create(Sized),
    /// Set the capacity
    Resize(Sized),
    /// Add units
    Restock(Sized),
    /// Make confirmed units available again
    Return(Sized),
    /// Remove a pool of which nothing is held
    Delete(Named),
    /// Show a pool with its holds and who waits
    Get(Named),
}

pub(crate) async fn run(common: &Common, args: ReserveArgs) -> anyhow::Result<ExitCode> {
    let client = common.client()?;
    let Some(command) = args.command else { return take_hold(common, &client, args.take).await };
    manage(&client, command).await?;
    Ok(ExitCode::SUCCESS)
}

async fn manage(client: &Client, command: ReserveCommand) -> Result<(), Failure> {
    match command {
        ReserveCommand::Confirm(of) => {
            let change = client.confirm_reservation(&of.pool, of.id, of.token).await?;
            print_change(&of, change);
        }
        ReserveCommand::Cancel(of) => {
            let change = client.cancel_reservation(&of.pool, of.id, of.token).await?;
            print_change(&of, change);
        }
        ReserveCommand::Extend { of, hold } => {
            let change = client.extend_reservation(&of.pool, of.id, of.token, hold).await?;
            print_change(&of, change);
        }
        ReserveCommand::Pools { prefix, output } => print_pools(&client.pools(prefix).await?, output.output),
        ReserveCommand::Pool { command } => manage_pool(client, command).await?,
    }
    Ok(())
}

async fn manage_pool(client: &Client, command: PoolCommand) -> Result<(), Failure> {
    let (pool, output) = match command {
        PoolCommand::Create(of) => (client.create_pool(of.pool, of.units).await?, of.output),
        PoolCommand::Resize(of) => (client.resize_pool(of.pool, of.units).await?, of.output),
        PoolCommand::Restock(of) => (client.restock_pool(of.pool, of.units).await?, of.output),
        PoolCommand::Return(of) => (client.return_to_pool(of.pool, of.units).await?, of.output),
        PoolCommand::Delete(of) => {
            let deleted = client.delete_pool(&of.pool).await.map_err(|error| {
                let in_use = (error.code() == Some(Code::Held))
                    .then(|| format!("`tenure reserve pool get {}` shows it", of.pool));
                Failure::from(error).hint_if(in_use.as_deref())
            })?;
            (deleted, of.output)
        }
        PoolCommand::Get(of) => return show_pool(client, &of).await,
    };
    match output.output {
        Output::Json => out!("{}", json_of_pool(&pool)),
        Output::Table => print_pools(&[pool], Output::Table),
    }
    Ok(())
}

async fn show_pool(client: &Client, of: &Named) -> Result<(), Failure> {
    let Some(info) = client.pool(&of.pool).await? else {
        return Err(Failure::new(exit::NOT_FOUND, format!("there is no pool `{}`", of.pool)));
    };
    match of.output.output {
        Output::Json => out!("{}", json_of_info(&info)),
        Output::Table => print_info(&info),
    }
    Ok(())
}

// ---- A hold, and a command under it ----

async fn take_hold(common: &Common, client: &Client, take: Take) -> anyhow::Result<ExitCode> {
    let (Some(pool), Some(quantity)) = (&take.pool, take.quantity) else {
        return Err(Failure::usage("name a pool and a quantity").hint("see `tenure reserve --help`").into());
    };
    let mut reserve = client.reserve(pool, quantity).hold(take.hold).owner(&take.owner);
    if let Some(wait) = take.wait {
        reserve = reserve.wait(wait);
    }
    let hold = reserve.await.map_err(refused)?;
    if take.run.is_empty() {
        print_hold(&hold, take.output.output);
        hold.forget();
        return Ok(ExitCode::SUCCESS);
    }
    under(common, take, hold).await
}

fn refused(error: Error) -> Failure {
    let hint = match error.code() {
        Some(Code::Held) => Some("--wait 30s waits for it"),
        Some(Code::TimeoutWaiting) => Some("--wait sets how long to wait"),
        Some(Code::NotFound) => Some("`tenure reserve pool create POOL UNITS` makes one"),
        _ => None,
    };
    Failure::from(error).hint_if(hint)
}

/// Runs the command and settles the hold by how it ended.
async fn under(common: &Common, take: Take, mut hold: Reservation) -> anyhow::Result<ExitCode> {
    let (program, rest) = take.run.split_first().ok_or_else(|| Failure::usage("there is no command to run"))?;
    let mut command = std::process::Command::new(program);
    command
        .args(rest)
        .env("TENURE_POOL", hold.pool())
        .env("TENURE_RESERVATION", hold.id().to_string())
        .env("TENURE_TOKEN", hold.token().to_string())
        .env("TENURE_QUANTITY", hold.quantity().to_string())
        .env("TENURE_ENDPOINTS", common.endpoints.join(","));
    let mut signals = [signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?];
    let child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            hold.cancel().await.map_err(Failure::from)?;
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            let code = if missing { exit::NO_SUCH_COMMAND } else { exit::NOT_EXECUTABLE };
            return Err(Failure::new(code, format!("cannot run {}: {error}", program.display())).into());
        }
    };
    let (status, lost) = attend(child, &mut hold, take.hold, &mut signals).await?;
    if let Some(why) = lost {
        let what = format!("the hold on `{}` was lost while the command ran: {why}", hold.pool());
        print_failure(&what, Some("the command was told to stop; what it held may be another's by now"));
        hold.forget();
        return Ok(ExitCode::from(exit::LOST));
    }
    if status.success() && !take.give_back {
        hold.confirm().await.map_err(Failure::from)?;
    } else if let Err(error) = hold.cancel().await {
        err!("warning: the hold was not given back ({error}); it ends with its time");
    }
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(exit::FAILURE)))
}

/// Extends the hold while the command runs, passes signals on, and stops the command if the hold is lost or about to end.
async fn attend(
    mut child: Child,
    hold: &mut Reservation,
    length: Duration,
    signals: &mut [tokio::signal::unix::Signal; 2],
) -> anyhow::Result<(ExitStatus, Option<String>)> {
    let pid = Pid::from_child(&child);
    let mut ended = tokio::task::spawn_blocking(move || child.wait());
    let [interrupt, terminate] = signals;
    let send = |signal| {
        // It may have ended in this moment, which is all that was wanted.
        let _ = kill_process(pid, signal);
    };
    // A tenth of the time is for the command to stop in.
    let grace = (length / 10).clamp(Duration::from_millis(200), Duration::from_secs(10));
    let deadline = Cell::new(hold.deadline());
    let extending = async {
        loop {
            tokio::time::sleep(length / 3).await;
            match hold.extend(length).await {
                Ok(()) => deadline.set(hold.deadline()),
                Err(error) if matches!(error.code(), Some(Code::Fenced | Code::NotFound)) => return error.to_string(),
                // It is not known yet whether it is lost: the next try tells, or the deadline.
                Err(_) => {}
            }
        }
    };
    tokio::pin!(extending);
    let (mut lost, mut kill_at): (_, Option<BootTime>) = (None, None);
    loop {
        let now = BootTime::now();
        if lost.is_none() && deadline.get().since(now) <= grace {
            lost = Some("it could not be extended and its deadline was near".to_owned());
        }
        match kill_at {
            None if lost.is_some() => {
                send(Signal::TERM);
                // A stopped process acts on no other signal.
                send(Signal::CONT);
                kill_at = Some(now.plus(grace));
            }
            Some(at) if at <= now => send(Signal::KILL),
            _ => {}
        }
        let until = kill_at.map_or_else(|| deadline.get().since(now).saturating_sub(grace), |at| at.since(now));
        let pause = until.clamp(Duration::from_millis(10), LOOK_EVERY);
        tokio::select! {
            status = &mut ended => return Ok((status??, lost)),
            // A terminal has sent its interrupt to the command already.
            _ = interrupt.recv() => {}
            _ = terminate.recv() => send(Signal::TERM),
            why = &mut extending, if lost.is_none() => lost = Some(why),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

// ---- What is printed ----

fn print_hold(hold: &Reservation, output: Output) {
    let (pool, id, token, quantity) = (hold.pool(), hold.id(), hold.token(), hold.quantity());
    match output {
        Output::Json => {
            let (id, token) = (id.to_string(), token.to_string());
            let waited = millis(hold.waited());
            out!("{}", json!({ "pool": pool, "id": id, "token": token, "quantity": quantity, "waited_ms": waited }));
        }
        Output::Table => {
            out!("{quantity} of {pool} held: id {id}, token {token}");
            out!("confirm with: tenure reserve confirm {pool} {id} {token}");
        }
    }
}

fn print_change(of: &OfHold, change: ReservationChange) {
    let (pool, id, state, quantity) = (&of.pool, of.id, change.state.to_string(), change.quantity);
    match of.output.output {
        Output::Json => out!(
            "{}",
            json!({
                "pool": pool, "id": id.to_string(), "state": state, "quantity": quantity,
                "left_ms": millis(change.left), "available": change.available,
            })
        ),
        Output::Table => out!("hold {id} on {quantity} of {pool} is {state}, {} available", change.available),
    }
}

fn json_of_pool(pool: &Pool) -> Value {
    json!({
        "name": pool.name, "capacity": pool.capacity, "available": pool.available, "held": pool.held,
        "confirmed": pool.confirmed, "waiters": pool.waiter_count,
    })
}

fn json_of_info(info: &PoolInfo) -> Value {
    let hold = |hold: &tenure_client::Hold| {
        json!({
            "id": hold.id.to_string(), "token": hold.token.to_string(), "quantity": hold.quantity,
            "state": hold.state.to_string(), "session": hold.session.to_string(), "owner": hold.owner,
            "left_ms": millis(hold.left),
        })
    };
    let waiter = |waiter: &tenure_client::PoolWaiter| {
        json!({
            "position": waiter.position, "quantity": waiter.quantity, "session": waiter.session.to_string(),
            "owner": waiter.owner, "waited_ms": millis(waiter.waited),
        })
    };
    let mut all = json_of_pool(&info.pool);
    all["holds"] = info.holds.iter().map(hold).collect();
    all["waiting"] = info.waiters.iter().map(waiter).collect();
    all
}

fn print_pools(pools: &[Pool], output: Output) {
    if output == Output::Json {
        out!("{}", Value::from_iter(pools.iter().map(json_of_pool)));
        return;
    }
    let row = |pool: &Pool| {
        let numbers = [pool.capacity, pool.available, pool.held, pool.confirmed, pool.waiter_count];
        [vec![pool.name.clone()], numbers.map(|n| n.to_string()).to_vec()].concat()
    };
    let rows: Vec<_> = pools.iter().map(row).collect();
    print_table(&["POOL", "CAPACITY", "AVAILABLE", "HELD", "CONFIRMED", "WAITING"], &rows);
}

fn print_info(info: &PoolInfo) {
    print_pools(std::slice::from_ref(&info.pool), Output::Table);
    let seconds = |time: Duration| format!("{:.1}s", time.as_secs_f64());
    if !info.holds.is_empty() {
        let row = |hold: &tenure_client::Hold| {
            let state = hold.state.to_string();
            let (id, token, quantity) = (hold.id.to_string(), hold.token.to_string(), hold.quantity.to_string());
            vec![id, token, quantity, state, seconds(hold.left), hold.owner.clone()]
        };
        out!();
        print_table(
            &["HOLD", "TOKEN", "UNITS", "STATE", "LEFT", "OWNER"],
            &info.holds.iter().map(row).collect::<Vec<_>>(),
        );
    }
    if !info.waiters.is_empty() {
        let row = |waiter: &tenure_client::PoolWaiter| {
            let (position, quantity) = (waiter.position.to_string(), waiter.quantity.to_string());
            vec![position, quantity, seconds(waiter.waited), waiter.owner.clone()]
        };
        out!();
        print_table(&["PLACE", "UNITS", "WAITED", "OWNER"], &info.waiters.iter().map(row).collect::<Vec<_>>());
    }
}
