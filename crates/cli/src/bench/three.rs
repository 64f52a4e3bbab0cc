//! Three members beside three of etcd: what a majority costs, how long it takes to go on without its leader, and how it grows.
//!
//! Clients are spread evenly over all members, each with a connection of its own (the native callers share one for each member).
//! Processor time is that of all members together. Every cell starts fresh clusters, first Tenure's, then etcd's, and only one runs at a time.

use super::cluster::Cluster;
use super::compare::{PER_CPU, Table, median, per_cpu, told};
use super::load::{self, PUT, Target, key};
use super::measure::Figures;
use super::native;
use super::peer::{Kind, Programs};
use super::rpc::{Rpc, frame};
use crate::common::duration;
use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tenure_wire::etcd::etcdserverpb as pb;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

const MEMBERS: usize = 3;
/// Clients that put while a cluster grows.
const GROWTH_CLIENTS: usize = 16;
/// The steady writer begins a put this often.
const EVERY: Duration = Duration::from_millis(4);
/// It gives a put up after this long.
const GIVE_UP: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, clap::ValueEnum, PartialEq, Eq)]
enum Cell {
    /// Puts of 64 clients over the etcd API
    Put64,
    /// Puts of 256 clients over the etcd API
    Put256,
    /// Puts of 256 callers over the native stream, beside etcd's 256 clients
    Native,
    /// Linearizable gets of 64 clients over the etcd API
    Get64,
    /// From kill -9 of the leader to the next acknowledged write
    Failover,
    /// Silence of writes while leadership is handed over
    Handover,
    /// A new member joins while puts go on
    Growth,
    /// Changes of leader under full load
    Elections,
}

/// What only the table of three members knows.
#[derive(Debug, clap::Args)]
pub(super) struct Settings {
    /// Of three members: only these cells, comma separated
    #[arg(long, value_enum, value_delimiter = ',')]
    cells: Vec<Cell>,
    /// Of three members: how often to fail over and to hand over
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Of three members: keys that a new member has to catch up with
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    growth_keys: u64,
    /// Of three members: how long to look for needless elections under full load
    #[arg(long, default_value = "60s", value_parser = duration)]
    load_duration: Duration,
}

impl Settings {
    pub(super) fn is_filtered(&self) -> bool {
        !self.cells.is_empty()
    }
}

/// Measures the cells one after the other. A cell that fails on one side is told and leaves a gap in the table; the others go on.
pub(super) async fn run(programs: &Programs, duration: Duration, settings: &Settings) -> Result<ExitCode> {
    let mut run = Run { programs, duration, settings, table: Table::default(), failed: false };
    for cell in <Cell as clap::ValueEnum>::value_variants() {
        if settings.cells.is_empty() || settings.cells.contains(cell) {
            match cell {
                Cell::Put64 => run.put(64, 2.0).await,
                Cell::Put256 => run.put(256, 1.8).await,
                Cell::Native => run.native_put().await,
                Cell::Get64 => run.get().await,
                Cell::Failover => run.failover().await,
                Cell::Handover => run.hand_over().await,
                Cell::Growth => run.growth().await,
                Cell::Elections => run.elections().await,
            }
        }
    }
    run.table.print();
    Ok(if run.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

struct Run<'a> {
    programs: &'a Programs,
    duration: Duration,
    settings: &'a Settings,
    table: Table,
    failed: bool,
}

/// What a cell gave on each side; `None`: it failed.
struct Both<T> {
    tenure: Option<T>,
    etcd: Option<T>,
}

impl<T> Both<T> {
    /// One figure of each side.
    fn map(&self, figure: impl Fn(&T) -> f64) -> (f64, f64) {
        let of = |side: &Option<T>| side.as_ref().map_or(f64::NAN, &figure);
        (of(&self.tenure), of(&self.etcd))
    }
}

impl Run<'_> {
    /// Measures on a fresh cluster of each kind in turn.
    async fn both<T>(&mut self, cell: &str, measure: impl AsyncFn(Kind, &mut Cluster) -> Result<T>) -> Both<T> {
        let (mut tenure, mut etcd) = (None, None);
        for (kind, side) in [(Kind::Tenure, &mut tenure), (Kind::Etcd, &mut etcd)] {
            let measured = match Cluster::start(kind, self.programs, MEMBERS).await {
                Ok(mut cluster) => measure(kind, &mut cluster).await,
                Err(e) => Err(e),
            };
            match measured {
                Ok(measured) => *side = Some(measured),
                Err(e) => {
                    eprintln!("{} {cell}: FAILED: {e:#}", kind.name());
                    self.failed = true;
                }
            }
        }
        Both { tenure, etcd }
    }

    async fn put(&mut self, clients: usize, factor: f64) {
        let duration = self.duration;
        let name = format!("put 256 B, {clients} clients");
        let both = self
            .both(&name, async |kind, cluster| {
                let target = filled(cluster, clients, duration, KEYS).await?;
                Ok(told(&name, kind.name(), load::put(&target).await?))
            })
            .await;
        self.compare(&name, &both, factor);
    }

    async fn native_put(&mut self) {
        let duration = self.duration;
        let name = "native put 256 B, 256 callers";
        let both = self
            .both(name, async |kind, cluster| {
                let target = filled(cluster, 256, duration, KEYS).await?;
                let figures = match kind {
                    Kind::Tenure => native::put(&target).await?,
                    Kind::Etcd => load::put(&target).await?,
                };
                Ok(told(name, kind.name(), figures))
            })
            .await;
        self.compare(name, &both, 6.0);
    }

    async fn get(&mut self) {
        let duration = self.duration;
        let name = "linearizable get, 64 clients";
        let both = self
            .both(name, async |kind, cluster| {
                let target = filled(cluster, 64, duration, KEYS).await?;
                Ok(told(name, kind.name(), load::get(&target).await?))
            })
            .await;
        self.compare(name, &both, 1.8);
    }

    fn compare(&mut self, name: &str, both: &Both<Figures>, factor: f64) {
        let (ours, theirs) = both.map(per_cpu);
        self.table.at_least(name, PER_CPU, ours, theirs, factor);
        for (title, q) in [("p50", 0.5), ("p99", 0.99)] {
            let (ours, theirs) = both.map(|f| f.p(q));
            self.table.tell(&format!("{name}: {title}"), "ms", ours, theirs);
        }
    }

    async fn failover(&mut self) {
        let rounds = self.settings.rounds;
        let both = self
            .both("failover", async |kind, cluster| {
                let mut times = Vec::new();
                for round in 1..=rounds {
                    times.push(kill_leader(cluster).await?);
                    eprintln!("{} failover {round}: {:.0} ms", kind.name(), times[times.len() - 1]);
                }
                Ok(times)
            })
            .await;
        let (ours, theirs) = both.map(|times| median(times.clone()));
        self.table.below(&format!("kill -9 of the leader: median of {rounds}"), "ms", ours, theirs, 400.0);
        let (ours, theirs) = both.map(|times| most(times));
        self.table.tell("kill -9 of the leader: longest", "ms", ours, theirs);
    }

    async fn hand_over(&mut self) {
        let rounds = self.settings.rounds;
        for way in [Way::Stop, Way::Move] {
            let name = way.name();
            let both = self
                .both(name, async |kind, cluster| {
                    let (mut usual, mut silences) = (Vec::new(), Vec::new());
                    for round in 1..=rounds {
                        let Silence { before, during } = hand_over(cluster, way).await?;
                        eprintln!("{} {name} {round}: {during:.1} ms, before it {before:.1} ms", kind.name());
                        usual.push(before);
                        silences.push(during);
                    }
                    Ok((usual, silences))
                })
                .await;
            let (ours, theirs) = both.map(|(usual, _)| median(usual.clone()));
            self.table.tell(&format!("{name}: silence in the second before, median"), "ms", ours, theirs);
            let (ours, theirs) = both.map(|(_, silences)| median(silences.clone()));
            self.table.below(&format!("{name}: silence, median of {rounds}"), "ms", ours, theirs, 20.0);
            let (ours, theirs) = both.map(|(_, silences)| most(silences));
            self.table.below(&format!("{name}: silence, longest"), "ms", ours, theirs, 20.0);
        }
    }

    async fn growth(&mut self) {
        let (programs, keys) = (self.programs, self.settings.growth_keys);
        let duration = self.duration;
        let both = self
            .both("growth", async |kind, cluster| {
                let target = filled(cluster, GROWTH_CLIENTS, duration, keys).await?;
                let before = told("put before the growth", kind.name(), load::put(&target).await?);
                let (during, took) = load::put_during(&target, cluster.grow(programs)).await?;
                let took = took?.as_secs_f64();
                let during = told("put during the growth", kind.name(), during);
                eprintln!("{} growth: {took:.2} s", kind.name());
                Ok((took, before.p(0.99), during.p(0.99)))
            })
            .await;
        let (ours, theirs) = both.map(|(took, ..)| *took);
        self.table.below(&format!("new member, {keys} keys: caught up"), "s", ours, theirs, 15.0);
        let (ours, theirs) = both.map(|(_, before, _)| *before);
        self.table.tell(&format!("put p99 before it, {GROWTH_CLIENTS} clients"), "ms", ours, theirs);
        let (ours, theirs) = both.map(|(_, before, during)| during / before);
        self.table.below("put p99 during it / before it", "ratio", ours, theirs, 2.0);
    }

    async fn elections(&mut self) {
        let duration = self.settings.load_duration;
        let both = self
            .both("elections", async |kind, cluster| {
                let target = filled(cluster, 256, duration, KEYS).await?;
                // The page of metrics may tell what was a second ago, and the first election is not one of those that are looked for.
                tokio::time::sleep(Duration::from_secs(3)).await;
                let before = cluster.elections().await?;
                told("full load", kind.name(), load::put(&target).await?);
                let after = cluster.elections().await?;
                eprintln!("{} elections before and after: {before:?}, {after:?}", kind.name());
                Ok(after.since(&before))
            })
            .await;
        let (ours, theirs) = both.map(|changes| *changes);
        let name = format!("changes of leader in {} s of full load", duration.as_secs());
        self.table.below(&name, "changes", ours, theirs, 0.0);
    }
}

/// Different keys, where nothing else is said.
const KEYS: u64 = 10_000;

/// Writes the keys and returns what the load needs to know.
async fn filled(cluster: &mut Cluster, clients: usize, duration: Duration, keys: u64) -> Result<Target> {
    let leader = cluster.leader().await?;
    load::fill(&cluster.endpoint(leader), keys, 256).await?;
    cluster.settle().await?;
    Ok(Target { endpoints: cluster.endpoints(), pids: cluster.pids(), clients, duration, value_bytes: 256, keys })
}

fn most(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Milliseconds from `kill -9` of the leader to the first acknowledgement of a write that was begun when it was gone. The writer
/// talks to the two others in turn. At the end the cluster is whole again.
async fn kill_leader(cluster: &mut Cluster) -> Result<f64> {
    let leader = cluster.leader().await?;
    let mut survivors = cluster.endpoints();
    survivors.remove(leader);
    let mut writer = Writer::start(&survivors).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let killed = Instant::now();
    cluster.signal(leader, Signal::KILL)?;
    cluster.wait_for_end(leader).await?;
    let gone = Instant::now();
    let acknowledged = writer.first_begun_after(gone).await?;
    drop(writer);
    cluster.restart(leader).await?;
    Ok(ms(acknowledged - killed))
}

/// How leadership is given up.
#[derive(Clone, Copy)]
enum Way {
    /// SIGTERM of the leader.
    Stop,
    /// The call `MoveLeader`.
    Move,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Stop => "SIGTERM of the leader",
            Self::Move => "MoveLeader",
        }
    }
}

/// The longest time without an acknowledgement, in milliseconds.
struct Silence {
    before: f64,
    during: f64,
}

/// Hands over once, under a writer that talks to a member which stays.
async fn hand_over(cluster: &mut Cluster, way: Way) -> Result<Silence> {
    let leader = cluster.leader().await?;
    let other = (leader + 1) % MEMBERS;
    let mut writer = Writer::start(&[cluster.endpoint(other)]).await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let steady = Instant::now();
    tokio::time::sleep(Duration::from_millis(800)).await;
    let began = Instant::now();
    match way {
        Way::Stop => {
            cluster.signal(leader, Signal::TERM)?;
            cluster.wait_for_end(leader).await?;
        }
        Way::Move => cluster.move_leader(leader, other).await?,
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let ended = Instant::now();
    let acknowledged = writer.acknowledged();
    drop(writer);
    match way {
        Way::Stop => cluster.restart(leader).await?,
        Way::Move => cluster.settle().await?,
    }
    ensure!(cluster.leader().await? != leader, "the leader still leads");
    let before = longest_silence(&acknowledged, steady, began);
    let during = longest_silence(&acknowledged, began, ended);
    Ok(Silence { before: ms(before), during: ms(during) })
}

/// Begins a put every [`EVERY`] whatever became of those before, at each endpoint in turn, so that a put which is stuck hides nothing.
struct Writer {
    answers: mpsc::UnboundedReceiver<Acknowledged>,
    task: tokio::task::JoinHandle<()>,
}

struct Acknowledged {
    begun: Instant,
    at: Instant,
}

impl Writer {
    async fn start(endpoints: &[String]) -> Result<Self> {
        let mut connections = Vec::new();
        for endpoint in endpoints {
            connections.push(Rpc::connect(endpoint).await?);
        }
        let (tell, answers) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            for n in 0.. {
                ticks.tick().await;
                let (mut rpc, tell) = (connections[n % connections.len()].clone(), tell.clone());
                tokio::spawn(async move {
                    let put = pb::PutRequest { key: key(n as u64).into(), value: "1".into(), ..Default::default() };
                    let begun = Instant::now();
                    // Refused or given up: that is the silence which is measured.
                    if let Ok(Ok(_)) = tokio::time::timeout(GIVE_UP, rpc.unary_bytes(PUT, frame(&put))).await {
                        let _ = tell.send(Acknowledged { begun, at: Instant::now() });
                    }
                });
            }
        });
        Ok(Self { answers, task })
    }

    /// When a write that was begun after `moment` was acknowledged first.
    async fn first_begun_after(&mut self, moment: Instant) -> Result<Instant> {
        let wait = async {
            loop {
                let answer = self.answers.recv().await.context("the writer ended")?;
                if answer.begun > moment {
                    return anyhow::Ok(answer.at);
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.context("no write was acknowledged in a minute")?
    }

    /// When writes were acknowledged so far, in order.
    fn acknowledged(&mut self) -> Vec<Instant> {
        let mut all: Vec<Instant> = std::iter::from_fn(|| self.answers.try_recv().ok()).map(|a| a.at).collect();
        all.sort();
        all
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The longest time between `from` and `to` in which no write was acknowledged; one that began before `from` counts whole.
fn longest_silence(acknowledged: &[Instant], from: Instant, to: Instant) -> Duration {
    let mut last = acknowledged.iter().copied().filter(|at| *at <= from).max().unwrap_or(from);
    let mut longest = Duration::ZERO;
    for at in acknowledged.iter().copied().filter(|at| *at > from && *at < to).chain([to]) {
        longest = longest.max(at - last);
        last = at;
    }
    longest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_counts_from_the_last_answer_before_it_to_the_first_after_it() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let check = |answers: &[u64], from: u64, to: u64, expected: u64| {
            let answers: Vec<Instant> = answers.iter().map(|ms| at(*ms)).collect();
            assert_eq!(longest_silence(&answers, at(from), at(to)), Duration::from_millis(expected));
        };
        check(&[10, 20, 30, 90, 100], 25, 105, 60);
        // The gap in which `from` lies counts from its beginning.
        check(&[10, 90, 100], 25, 105, 80);
        // Nothing after the last answer is silence too.
        check(&[10, 20, 30], 25, 500, 470);
        check(&[], 25, 500, 475);
        // What lies outside does not count.
        check(&[10, 200, 210, 220, 900], 205, 225, 10);
    }
}
