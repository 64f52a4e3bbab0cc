//! `tenure bench peers`: the work for which people take a queue, an idempotency table or a lock, on Tenure and on what they would take instead.
//!
//! Promises. Every figure comes from one run on one machine, each server alone while it is measured, started in a temporary folder with the
//! strictest durability that it has; NATS, which cannot sync per write, is marked. Processor time is that of all processes of the server.
//! Not promised. That a peer could not be tuned further: flags are in `servers.rs`.

mod clients;
mod scale;
mod servers;
mod tenure;

use super::compare::told;
use super::load::{Client, Target, closed_loop};
use super::measure::Figures;
use super::peer::{Kind, Peer, Programs};
use anyhow::Result;
use clients::{
    BeanstalkQueue, NatsQueue, PostgresLock, PostgresOnce, PostgresQueue, RedisLock, RedisOnce, RedisQueue,
    RedisShared, RedisSharedOnce, Together, prepare_postgres,
};
use servers::{Engine, Server};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::common::duration;

#[derive(Debug, clap::Args)]
pub(crate) struct PeersArgs {
    /// How long to measure each cell
    #[arg(long, default_value = "4s", value_parser = duration)]
    duration: Duration,
    /// Only the workloads whose name contains one of these, comma separated
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Instead: memory for so many jobs and records, and a tenth as many sessions, and an end of so many leases in one second
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1000000")]
    scale: Option<u64>,
}

/// What is done, by how many at once.
#[derive(Clone, Copy)]
struct Work {
    what: What,
    callers: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// Enqueue, receive and acknowledge a job of 256 bytes, one request after the other.
    Queue,
    /// The same; what need not wait for an answer is sent together, where the protocol can.
    QueueTogether,
    /// Do once: Tenure begins and completes a record; the peers insert a key or return what is there, each key asked for twice.
    Once,
    /// The same, all callers over one connection.
    OnceShared,
    /// Take and give back one lock, all callers the same.
    Lock,
}

impl Work {
    const ALL: [Self; 7] = [
        Self { what: What::Queue, callers: 1 },
        Self { what: What::QueueTogether, callers: 1 },
        Self { what: What::Queue, callers: 16 },
        Self { what: What::QueueTogether, callers: 16 },
        Self { what: What::Once, callers: 64 },
        Self { what: What::OnceShared, callers: 64 },
        Self { what: What::Lock, callers: 64 },
    ];

    fn name(self) -> String {
        match self.what {
            What::Queue if self.callers == 1 => "queue, 1 worker".to_owned(),
            What::Queue => format!("queue, {} workers", self.callers),
            What::QueueTogether if self.callers == 1 => "queue, 1 worker, requests sent together".to_owned(),
            What::QueueTogether => format!("queue, {} workers, requests sent together", self.callers),
            What::Once => format!("idempotency, {} clients", self.callers),
            What::OnceShared => format!("idempotency, {} callers on one connection", self.callers),
            What::Lock => format!("one lock, {} waiters", self.callers),
        }
    }

    fn engines(self) -> &'static [Engine] {
        match self.what {
            What::Queue => &[Engine::Postgres, Engine::Redis, Engine::Beanstalkd, Engine::Nats],
            What::QueueTogether => &[Engine::Redis, Engine::Beanstalkd],
            What::OnceShared => &[Engine::Redis],
            What::Once | What::Lock => &[Engine::Postgres, Engine::Redis],
        }
    }
}

pub(crate) async fn run(args: &PeersArgs) -> Result<ExitCode> {
    let programs = Programs { tenure: std::env::current_exe()?, etcd: PathBuf::new() };
    if let Some(things) = args.scale {
        scale::run(&programs, things).await?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("| work | server | operations/s | p50 ms | p99 ms | server us/operation | per server CPU s |");
    println!("|---|---|---|---|---|---|---|");
    for work in Work::ALL {
        let name = work.name();
        if !args.only.is_empty() && !args.only.iter().any(|only| name.contains(only.as_str())) {
            continue;
        }
        let ours = tenure_figures(&programs, work, args.duration).await?;
        print(&name, "Tenure", &ours);
        let mut best: Option<(f64, f64)> = None;
        for &engine in work.engines() {
            let theirs = peer_figures(engine, work, args.duration).await?;
            print(&name, engine.name(), &theirs);
            if engine.is_durable() {
                let (rate, per_cpu) = best.unwrap_or_default();
                best = Some((rate.max(theirs.rate()), per_cpu.max(super::compare::per_cpu(&theirs))));
            }
        }
        if let Some((rate, per_cpu)) = best {
            eprintln!(
                "{name}: {:.2}x the best durable peer per second, {:.2}x per server CPU second",
                ours.rate() / rate,
                super::compare::per_cpu(&ours) / per_cpu
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print(work: &str, server: &str, figures: &Figures) {
    told(work, server, figures.clone());
    let us = figures.server_us_per_op().unwrap_or(f64::NAN);
    println!(
        "| {work} | {server} | {:.0} | {:.2} | {:.2} | {us:.0} | {:.0} |",
        figures.rate(),
        figures.p(0.5),
        figures.p(0.99),
        super::compare::per_cpu(figures)
    );
}

fn target(pids: Vec<u32>, callers: usize, duration: Duration) -> Target {
    Target { endpoints: Vec::new(), pids, clients: callers, duration, value_bytes: clients::JOB_BYTES, keys: 0 }
}

async fn tenure_figures(programs: &Programs, work: Work, duration: Duration) -> Result<Figures> {
    let peer = Peer::start(Kind::Tenure, programs).await?;
    let target = Target { endpoints: vec![peer.endpoint()], ..target(vec![peer.pid()], work.callers, duration) };
    match work.what {
        What::Queue => tenure::queue(&target, false).await,
        What::QueueTogether => tenure::queue(&target, true).await,
        What::Once => tenure::once(&target, false).await,
        What::OnceShared => tenure::once(&target, true).await,
        What::Lock => super::native::lock(&target, true).await,
    }
}

async fn peer_figures(engine: Engine, work: Work, duration: Duration) -> Result<Figures> {
    let server = Server::start(engine).await?;
    if engine == Engine::Postgres {
        prepare_postgres(&server).await?;
    }
    let (server, n) = (&server, work.callers);
    match (engine, work.what) {
        (Engine::Redis, What::Queue) => each(server, n, duration, |i| RedisQueue::connect(server, i)).await,
        (Engine::Redis, What::QueueTogether) => {
            each(server, n, duration, |i| async move { Ok(Together::new(RedisQueue::connect(server, i).await?)) }).await
        }
        (Engine::Redis, What::OnceShared) => {
            let shared = RedisShared::connect(server).await?;
            each(server, n, duration, |i| {
                let asker = RedisSharedOnce::new(shared.clone(), i);
                async move { Ok(asker) }
            })
            .await
        }
        (Engine::Redis, What::Once) => each(server, n, duration, |i| RedisOnce::connect(server, i)).await,
        (Engine::Redis, What::Lock) => each(server, n, duration, |i| RedisLock::connect(server, i)).await,
        (Engine::Postgres, What::Queue | What::QueueTogether) => {
            each(server, n, duration, |i| PostgresQueue::connect(server, i)).await
        }
        (Engine::Postgres, What::Once | What::OnceShared) => {
            each(server, n, duration, |i| PostgresOnce::connect(server, i)).await
        }
        (Engine::Postgres, What::Lock) => each(server, n, duration, |_| PostgresLock::connect(server)).await,
        (Engine::Beanstalkd, What::QueueTogether) => {
            each(server, n, duration, |i| async move { Ok(Together::new(BeanstalkQueue::connect(server, i).await?)) })
                .await
        }
        (Engine::Beanstalkd, _) => each(server, n, duration, |i| BeanstalkQueue::connect(server, i)).await,
        (Engine::Nats, _) => each(server, n, duration, |i| NatsQueue::connect(server, i)).await,
    }
}

/// Connects every caller, then measures them all.
async fn each<C, F, R>(server: &Server, callers: usize, duration: Duration, connect: F) -> Result<Figures>
where
    C: Client,
    F: Fn(usize) -> R,
    R: Future<Output = Result<C>>,
{
    let mut clients = Vec::new();
    for i in 0..callers {
        clients.push(connect(i).await?);
    }
    // Now each connection has its backend.
    closed_loop(&target(server.pids()?, callers, duration), clients).await
}
