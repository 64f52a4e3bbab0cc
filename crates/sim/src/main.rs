//! `tenure-sim [cluster] ci | --seeds N [--from K] | --seed N [--trace]`: plays seeds, counts, and tells what failed in one line each.

use anyhow::{Context as _, Result, bail};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};
use tenure_sim::trace::Trace;
use tenure_sim::world::{self, Options, Report};
use tenure_sim::{cluster, fuzz, lists};

const FIXED_SEEDS: u64 = 1_500;
const FRESH_SEEDS: u64 = 500;
/// Each is one run of a short scenario whose power goes at the n-th call to the disk.
const CRASH_STEPS: u64 = 800;
const LISTS: u64 = 300;
const FUZZ_SEEDS: u64 = 60;
const TWICE: u64 = 8;
const CLUSTER_FIXED: u64 = 700;
const CLUSTER_FRESH: u64 = 300;
/// Each is one run of a cluster that grows from one to three and whose first member dies at the n-th call to its disk.
const GROW_STEPS: u64 = 200;
/// No run may take longer: a hang is a finding, and a busy machine is none.
const SLOW_SECONDS: u64 = 120;

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    report: Report,
    cluster: cluster::Report,
}

impl Tally {
    /// Runs one thing about a single member.
    fn run(&mut self, mode: &str, seed: u64, run: impl FnOnce() -> Result<Option<Report>, String>) {
        if let Some(Some(report)) = self.try_one(mode, seed, run) {
            self.report.add(&report);
        }
    }

    fn run_cluster(&mut self, mode: &str, seed: u64, options: cluster::Options) {
        if let Some(report) = self.try_one(mode, seed, || cluster::run(seed, options)) {
            self.cluster.add(&report);
        }
    }

    /// Runs one thing and tells a failure in one line.
    fn try_one<R>(&mut self, mode: &str, seed: u64, run: impl FnOnce() -> Result<R, String>) -> Option<R> {
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            Err(text
                .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
                .unwrap_or_else(|| "a panic".to_owned()))
        });
        let slow = began.elapsed().as_secs() > SLOW_SECONDS;
        match result {
            Ok(report) if !slow => {
                self.passed += 1;
                return Some(report);
            }
            Ok(_) => self.fail(mode, seed, "it took too long"),
            Err(why) => self.fail(mode, seed, &why),
        }
        None
    }

    fn merge(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.report.add(&other.report);
        self.cluster.add(&other.cluster);
    }

    fn fail(&mut self, mode: &str, seed: u64, why: &str) {
        self.failed += 1;
        let why = shortened(&why.replace('\n', " | "));
        println!(
            "FAILED seed {seed} commit {}: {why}; again: cargo run -p tenure-sim -- {mode} {seed} --trace",
            commit()
        );
    }

    fn close(self) -> ExitCode {
        if self.report.calls > 0 {
            println!("{:?}", self.report);
        }
        if self.cluster.calls > 0 {
            println!("clusters: {:?}", self.cluster);
        }
        println!("{} passed, {} failed", self.passed, self.failed);
        if self.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Both ends of a long complaint: what it is about, and what was wanted.
fn shortened(why: &str) -> String {
    let chars: Vec<char> = why.chars().collect();
    match chars.len() {
        0..=1600 => why.to_owned(),
        len => chars[..1_000].iter().chain(&[' ', '…', ' ']).chain(&chars[len - 600..]).collect(),
    }
}

fn commit() -> String {
    let out = std::process::Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    out.ok()
        .and_then(|o| String::from_utf8(o.stdout).ok())
        .map_or_else(|| "unknown".to_owned(), |s| s.trim().to_owned())
}

fn main() -> Result<ExitCode> {
    // A panic is a finding with a seed; its own report would only stand between the lines.
    let shown = std::env::args().any(|a| a == "--trace");
    if !shown {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut numbers = BTreeMap::new();
    let (mut ci, mut clusters) = (false, false);
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match arg.as_str() {
            "ci" => ci = true,
            "cluster" => clusters = true,
            "--trace" => {}
            "--seed" | "--seeds" | "--from" | "--crash-at" | "--list" | "--fuzz" | "--grow-at" | "--threads" => {
                let value = rest.next().with_context(|| format!("{arg} needs a number"))?;
                numbers.insert(arg.as_str(), value.parse::<u64>().with_context(|| format!("{arg} {value}"))?);
            }
            other => bail!(
                "unknown argument {other}; tenure-sim ci | --seeds N [--from K] | --seed N | --crash-at N | --list N | --fuzz N [--trace]; \
                 tenure-sim cluster ci | --seeds N [--from K] [--threads T] | --seed N | --grow-at N [--trace]"
            ),
        }
    }
    let mut tally = Tally::default();
    let get = |name: &str| numbers.get(name).copied();
    if clusters {
        run_clusters(&mut tally, ci || numbers.is_empty(), get, shown);
        return Ok(tally.close());
    }
    if ci || numbers.is_empty() {
        run_ci(&mut tally);
        clusters_in_ci(&mut tally);
    }
    if let Some(count) = get("--seeds") {
        let from = get("--from").unwrap_or(0);
        (from..from.saturating_add(count)).for_each(|seed| world_seed(&mut tally, seed, shown));
    }
    if let Some(seed) = get("--seed") {
        world_seed(&mut tally, seed, shown);
    }
    if let Some(at) = get("--crash-at") {
        crash_step(&mut tally, at, shown);
    }
    if let Some(seed) = get("--list") {
        tally.run("--list", seed, || lists::run(seed, &mut Trace::new(shown)).map(|_| None));
    }
    if let Some(seed) = get("--fuzz") {
        tally.run("--fuzz", seed, || fuzz::run(seed, &mut Trace::new(shown)).map(|_| None));
    }
    Ok(tally.close())
}

fn run_clusters(tally: &mut Tally, ci: bool, get: impl Fn(&str) -> Option<u64>, shown: bool) {
    if ci {
        clusters_in_ci(tally);
    }
    if let Some(count) = get("--seeds") {
        let from = get("--from").unwrap_or(0);
        shared(tally, get("--threads").unwrap_or(1), from..from.saturating_add(count), cluster_seed);
    }
    if let Some(seed) = get("--seed") {
        tally.run_cluster("cluster --seed", seed, cluster::Options { shown, ..cluster::Options::default() });
    }
    if let Some(at) = get("--grow-at") {
        tally.run_cluster("cluster --grow-at", at, grow(at, shown));
    }
}

fn cluster_seed(tally: &mut Tally, seed: u64) {
    tally.run_cluster("cluster --seed", seed, cluster::Options::default());
}

/// One number names the place at which the first member dies, and the seed of the rest.
fn grow(at: u64, shown: bool) -> cluster::Options {
    cluster::Options { shown, grow_at: Some(at), ..cluster::Options::default() }
}

/// Seeds have nothing to do with each other, so each thread takes the next.
fn shared(tally: &mut Tally, threads: u64, seeds: std::ops::Range<u64>, one: fn(&mut Tally, u64)) {
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let work = || {
        let mut tally = Tally::default();
        loop {
            let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if seed >= seeds.end {
                return tally;
            }
            one(&mut tally, seed);
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(done) => tally.merge(done),
                Err(_) => tally.failed += 1,
            }
        }
    });
}

fn clusters_in_ci(tally: &mut Tally) {
    let began = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64).min(4);
    let stage = |tally: &Tally, what: &str| {
        println!("{what}: {} passed, {} failed, {:.0} s", tally.passed, tally.failed, began.elapsed().as_secs_f64());
        let _ = std::io::stdout().flush();
    };
    shared(tally, threads, 0..CLUSTER_FIXED, cluster_seed);
    stage(tally, "clusters, fixed seeds");
    let fresh = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()) * 1_000;
    println!("fresh seeds of clusters from {fresh}");
    shared(tally, threads, fresh..fresh + CLUSTER_FRESH, cluster_seed);
    stage(tally, "clusters, fresh seeds");
    shared(tally, threads, 0..GROW_STEPS, |tally, at| tally.run_cluster("cluster --grow-at", at, grow(at, false)));
    stage(tally, "a cluster that grows, a crash at every call");
    for seed in (0..TWICE).map(|n| n * 37) {
        let hash = || cluster::run(seed, cluster::Options::default()).map(|r| r.hash);
        tally.try_one("cluster --seed", seed, || same(hash()?, hash()?));
    }
    stage(tally, "clusters twice the same");
}

fn same(first: u64, second: u64) -> Result<(), String> {
    if first == second { Ok(()) } else { Err(format!("two runs differ: {first:016x} and {second:016x}")) }
}

fn world_seed(tally: &mut Tally, seed: u64, shown: bool) {
    tally.run("--seed", seed, || world::run(seed, Options { shown, ..Options::default() }).map(Some));
}

/// One number names scenario and place: the scenarios take turns, and each is cut one call later every time.
fn crash_step(tally: &mut Tally, at: u64, shown: bool) {
    let scenario = at % 4;
    tally.run("--crash-at", at, || {
        world::run(scenario, Options { shown, die_at: Some(at / 4), ..Options::default() }).map(Some)
    });
}

fn run_ci(tally: &mut Tally) {
    let began = Instant::now();
    let stage = |tally: &Tally, what: &str| {
        println!("{what}: {} passed, {} failed, {:.0} s", tally.passed, tally.failed, began.elapsed().as_secs_f64());
        let _ = std::io::stdout().flush();
    };
    (0..FIXED_SEEDS).for_each(|seed| world_seed(tally, seed, false));
    stage(tally, "fixed seeds");
    let fresh = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()) * 1_000;
    println!("fresh seeds from {fresh}");
    (fresh..fresh + FRESH_SEEDS).for_each(|seed| world_seed(tally, seed, false));
    stage(tally, "fresh seeds");
    (0..CRASH_STEPS).for_each(|at| crash_step(tally, at, false));
    stage(tally, "a crash at every call");
    for seed in 0..LISTS {
        tally.run("--list", seed, || lists::run(seed, &mut Trace::new(false)).map(|_| None));
    }
    stage(tally, "command lists");
    for seed in 0..FUZZ_SEEDS {
        tally.run("--fuzz", seed, || fuzz::run(seed, &mut Trace::new(false)).map(|_| None));
    }
    stage(tally, "mutated bytes");
    for seed in (0..TWICE).map(|n| n * 37) {
        tally.run("--seed", seed, || twice(seed));
    }
    stage(tally, "twice the same");
}

/// One seed twice gives identical bytes.
fn twice(seed: u64) -> Result<Option<Report>, String> {
    let hash = || world::run(seed, Options::default()).map(|r| r.hash);
    same(hash()?, hash()?).map(|()| None)
}
