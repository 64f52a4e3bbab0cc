//! The table of docs/performance.md: every workload on both servers, one after the other, and what the project asks of the ratio.

use super::load::{self, Target};
use super::measure::Figures;
use super::native;
use super::peer::{Folder, Kind, Peer, Programs};
use super::{measure, sentence};
use anyhow::Result;
use std::io::{Read as _, Seek as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// A line of the table.
struct Row {
    what: String,
    unit: &'static str,
    tenure: f64,
    etcd: f64,
    /// What is asked of Tenure's figure against etcd's, and whether it is met; `None`: the figure is only told.
    asked: Option<(String, bool)>,
}

#[derive(Default)]
pub(super) struct Table {
    rows: Vec<Row>,
    only: Vec<String>,
}

impl Table {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|o| name.contains(o.as_str()))
    }

    /// A figure of which more is better: Tenure's is to be at least `factor` times etcd's.
    pub(super) fn at_least(&mut self, what: &str, unit: &'static str, tenure: f64, etcd: f64, factor: f64) {
        let met = tenure >= etcd * factor;
        self.push(Row { what: what.into(), unit, tenure, etcd, asked: Some((format!("at least {factor}x"), met)) });
    }

    /// A figure of which less is better: Tenure's is to be at most `factor` times etcd's.
    pub(super) fn at_most(&mut self, what: &str, unit: &'static str, tenure: f64, etcd: f64, factor: f64) {
        let met = tenure <= etcd * factor;
        self.push(Row { what: what.into(), unit, tenure, etcd, asked: Some((format!("at most {factor}x"), met)) });
    }

    /// Tenure's figure is to be at most `limit`, whatever etcd's is.
    pub(super) fn below(&mut self, what: &str, unit: &'static str, tenure: f64, etcd: f64, limit: f64) {
        let met = tenure <= limit;
        let asked = Some((format!("at most {limit:.3} {unit}"), met));
        self.push(Row { what: what.into(), unit, tenure, etcd, asked });
    }

    /// Nothing is asked of the figure.
    pub(super) fn tell(&mut self, what: &str, unit: &'static str, tenure: f64, etcd: f64) {
        self.push(Row { what: what.into(), unit, tenure, etcd, asked: None });
    }

    fn push(&mut self, row: Row) {
        let asked = match &row.asked {
            Some((asked, true)) => format!(" ({asked}: met)"),
            Some((asked, false)) => format!(" ({asked}: MISSED)"),
            None => String::new(),
        };
        eprintln!("  {}: tenure {:.3}, etcd {:.3} {}{asked}", row.what, row.tenure, row.etcd, row.unit);
        self.rows.push(row);
    }

    pub(super) fn print(&self) {
        println!("| what | tenure | etcd | unit | tenure / etcd | asked | met |");
        println!("|---|---|---|---|---|---|---|");
        for r in &self.rows {
            let (asked, met) = match &r.asked {
                Some((asked, met)) => (asked.as_str(), if *met { "yes" } else { "**no**" }),
                None => ("-", "-"),
            };
            let (tenure, etcd) = (number(r.tenure), number(r.etcd));
            let ratio = Some(r.tenure / r.etcd).filter(|ratio| ratio.is_finite());
            let ratio = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
            println!("| {} | {tenure} | {etcd} | {} | {ratio} | {asked} | {met} |", r.what, r.unit);
        }
    }
}

fn number(n: f64) -> String {
    match n {
        n if !n.is_finite() => "-".into(),
        0.0 => "0".into(),
        n if n >= 100.0 => format!("{n:.0}"),
        n if n >= 1.0 => format!("{n:.2}"),
        n => format!("{n:.3}"),
    }
}

pub(super) async fn run(programs: &Programs, duration: Duration, only: &[String]) -> Result<ExitCode> {
    let mut table = Table { only: only.to_vec(), ..Table::default() };
    if table.wants("empty") {
        empty(&mut table, programs).await?;
    }
    if table.wants("put") {
        puts(&mut table, programs, duration).await?;
    }
    if table.wants("get") || table.wants("range") {
        reads(&mut table, programs, duration).await?;
    }
    if table.wants("lock") {
        locks(&mut table, programs, duration).await?;
    }
    if table.wants("watch") {
        watches(&mut table, programs, duration).await?;
    }
    if table.wants("lease") {
        leases(&mut table, programs, duration).await?;
    }
    if table.wants("million") {
        million(&mut table, programs, duration).await?;
    }
    table.print();
    Ok(ExitCode::SUCCESS)
}

fn target(peer: &Peer, clients: usize, duration: Duration) -> Target {
    let (endpoints, pids) = (vec![peer.endpoint()], vec![peer.pid()]);
    Target { endpoints, pids, clients, duration, value_bytes: 256, keys: 10_000 }
}

pub(super) fn told(name: &str, kind: &str, figures: Figures) -> Figures {
    eprintln!("{kind} {name}: {}", sentence(&figures));
    figures
}

fn us(f: &Figures) -> f64 {
    f.server_us_per_op().unwrap_or(f64::NAN)
}

/// Operations per second of server processor time.
pub(super) fn per_cpu(f: &Figures) -> f64 {
    1e6 / us(f)
}

pub(super) const PER_CPU: &str = "op/server CPU s";

async fn puts(table: &mut Table, programs: &Programs, duration: Duration) -> Result<()> {
    for (clients, factor) in [(1, None), (64, Some(2.0)), (256, Some(1.8))] {
        let mut both = Vec::new();
        for kind in [Kind::Tenure, Kind::Etcd] {
            let peer = Peer::start(kind, programs).await?;
            load::fill(&peer.endpoint(), 10_000, 256).await?;
            both.push(told(
                &format!("put, {clients} clients"),
                kind.name(),
                load::put(&target(&peer, clients, duration)).await?,
            ));
        }
        let (ours, theirs) = (&both[0], &both[1]);
        match factor {
            Some(factor) => {
                table.at_least(
                    &format!("put 256 B, {clients} clients"),
                    PER_CPU,
                    per_cpu(ours),
                    per_cpu(theirs),
                    factor,
                );
                table.at_most(&format!("put p99, {clients} clients"), "ms", ours.p(0.99), theirs.p(0.99), 1.0);
            }
            None => {
                let floor = floor_ms()?;
                eprintln!("one fdatasync plus one loopback round trip: {floor:.3} ms");
                table.below("put p50, 1 client (floor x 1.5)", "ms", ours.p(0.5), theirs.p(0.5), floor * 1.5);
            }
        }
        if clients == 256 {
            let peer = Peer::start(Kind::Tenure, programs).await?;
            load::fill(&peer.endpoint(), 10_000, 256).await?;
            let native =
                told("native put, 256 callers", "tenure", native::put(&target(&peer, clients, duration)).await?);
            table.at_least("native put 256 B, 256 callers", PER_CPU, per_cpu(&native), per_cpu(theirs), 8.0);
        }
    }
    Ok(())
}

async fn reads(table: &mut Table, programs: &Programs, duration: Duration) -> Result<()> {
    let mut all = Vec::new();
    for kind in [Kind::Tenure, Kind::Etcd] {
        let peer = Peer::start(kind, programs).await?;
        load::fill(&peer.endpoint(), 10_000, 256).await?;
        let get64 = told("get, 64 clients", kind.name(), load::get(&target(&peer, 64, duration)).await?);
        let get256 = told("get, 256 clients", kind.name(), load::get(&target(&peer, 256, duration)).await?);
        let range = told("range of 10,000 keys", kind.name(), load::range(&target(&peer, 1, duration), 10_000).await?);
        let native = match kind {
            Kind::Tenure => {
                Some(told("native get, 256 callers", "tenure", native::get(&target(&peer, 256, duration)).await?))
            }
            Kind::Etcd => None,
        };
        all.push((get64, get256, range, native));
    }
    let (ours, theirs) = (&all[0], &all[1]);
    table.at_least("linearizable get, 64 clients", PER_CPU, per_cpu(&ours.0), per_cpu(&theirs.0), 1.8);
    table.at_least("linearizable get, 256 clients", PER_CPU, per_cpu(&ours.1), per_cpu(&theirs.1), 1.8);
    table.at_least("range of 10,000 keys", "keys/server CPU s", per_cpu(&ours.2), per_cpu(&theirs.2), 4.0);
    if let Some(native) = &ours.3 {
        table.at_least("native get, 256 callers", PER_CPU, per_cpu(native), per_cpu(&theirs.1), 8.0);
    }
    Ok(())
}

async fn locks(table: &mut Table, programs: &Programs, duration: Duration) -> Result<()> {
    let peer = Peer::start(Kind::Etcd, programs).await?;
    let mutex = told("mutex recipe, 1 client", "etcd", load::recipe_mutex(&target(&peer, 1, duration), false).await?);
    let rpc = told("lock RPC, 64 contenders", "etcd", load::lock_rpc(&target(&peer, 64, duration)).await?);
    drop(peer);
    let peer = Peer::start(Kind::Tenure, programs).await?;
    let recipe =
        told("mutex recipe, 1 client", "tenure", load::recipe_mutex(&target(&peer, 1, duration), false).await?);
    let own = told("native lock, 1 client", "tenure", native::lock(&target(&peer, 1, duration), false).await?);
    let hot = told("native lock, 64 contenders", "tenure", native::lock(&target(&peer, 64, duration), true).await?);
    drop(peer);
    table.at_least("etcd mutex recipe, 1 client", "pairs/s", recipe.rate(), mutex.rate(), 1.0);
    table.at_least("lock acquire + release, 1 client", "pairs/s", own.rate(), mutex.rate(), 2.5);
    table.at_least("one lock, 64 contenders", "hand-overs/s", hot.rate(), rpc.rate(), 4.0);
    let (most, least) = hot.fairness.unwrap_or((0, 0));
    let (their_most, their_least) = rpc.fairness.unwrap_or((0, 0));
    let ratio = |most: u64, least: u64| most as f64 / least.max(1) as f64;
    table.below("one lock, fairness max/min", "ratio", ratio(most, least), ratio(their_most, their_least), 1.1);
    Ok(())
}

async fn watches(table: &mut Table, programs: &Programs, duration: Duration) -> Result<()> {
    let mut both = Vec::new();
    for kind in [Kind::Tenure, Kind::Etcd] {
        let peer = Peer::start(kind, programs).await?;
        both.push(told(
            "10,000 watchers of one key",
            kind.name(),
            load::watch_fan_out(&target(&peer, 1, duration), 10_000).await?,
        ));
    }
    table.at_least("10,000 watchers of one key", "events/server CPU s", per_cpu(&both[0]), per_cpu(&both[1]), 2.0);
    Ok(())
}

async fn leases(table: &mut Table, programs: &Programs, duration: Duration) -> Result<()> {
    let mut both = Vec::new();
    for kind in [Kind::Tenure, Kind::Etcd] {
        let peer = Peer::start(kind, programs).await?;
        let before = peer.rss_mib()?;
        let duration = duration.max(Duration::from_secs(10));
        let figures = told(
            "100,000 leases kept alive",
            kind.name(),
            load::leases(&target(&peer, 1, duration), 100_000, 120).await?,
        );
        anyhow::ensure!(figures.errors == 0, "{} leases were lost", figures.errors);
        let cores = figures.server_cpu_seconds.unwrap_or(f64::NAN) / figures.seconds;
        both.push((cores, peer.rss_mib()? - before));
    }
    table.at_most("100,000 leases kept alive: processor", "cores", both[0].0, both[1].0, 0.5);
    table.at_most("100,000 leases kept alive: added memory", "MiB", both[0].1, both[1].1, 0.5);
    Ok(())
}

async fn million(table: &mut Table, programs: &Programs, duration: Duration) -> Result<()> {
    let mut both = Vec::new();
    for kind in [Kind::Tenure, Kind::Etcd] {
        let mut peer = Peer::start(kind, programs).await?;
        let seconds = load::fill(&peer.endpoint(), 1_000_000, 256).await?;
        let rss = peer.rss_mib()?;
        eprintln!("{} a million keys: loaded in {seconds:.1} s, {rss:.0} MiB", kind.name());
        peer.restart().await?;
        both.push((rss, peer.first_write.as_secs_f64()));
        if kind == Kind::Tenure {
            snapshot_under_load(table, &mut peer, duration).await?;
        }
    }
    table.at_most("a million keys of 256 B: resident memory", "MiB", both[0].0, both[1].0, 0.55);
    table.at_most("a million keys: restart to first write", "s", both[0].1, both[1].1, 0.5);
    Ok(())
}

/// The tail of put latencies without snapshots, and with one snapshot of a million keys after the other.
async fn snapshot_under_load(table: &mut Table, peer: &mut Peer, duration: Duration) -> Result<()> {
    let duration = duration.max(Duration::from_secs(8));
    let usual = told("put, 16 clients", "tenure", load::put(&target(peer, 16, duration)).await?);
    peer.restart_with(&["--snapshot-log-bytes", "8MiB"]).await?;
    let during = told("put while a snapshot is taken", "tenure", load::put(&target(peer, 16, duration)).await?);
    table.below(
        "put p99.9 during a snapshot (usual in the column of etcd)",
        "ms",
        during.p(0.999),
        usual.p(0.999),
        usual.p(0.999) + 20.0,
    );
    Ok(())
}

async fn empty(table: &mut Table, programs: &Programs) -> Result<()> {
    let mut both = Vec::new();
    for kind in [Kind::Tenure, Kind::Etcd] {
        let mut starts = Vec::new();
        let mut rss = 0.0;
        let mut idle = 0.0;
        for round in 0..5 {
            let peer = Peer::start(kind, programs).await?;
            starts.push(peer.first_write.as_secs_f64() * 1e3);
            if round == 4 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let before = measure::cpu_seconds(peer.pid())?;
                tokio::time::sleep(Duration::from_secs(10)).await;
                idle = (measure::cpu_seconds(peer.pid())? - before) * 10.0;
                rss = peer.rss_mib()?;
            }
        }
        starts.sort_by(f64::total_cmp);
        both.push((starts[2], rss, idle));
    }
    table.below("empty: start to first write", "ms", both[0].0, both[1].0, 100.0);
    table.below("empty: resident memory", "MiB", both[0].1, both[1].1, 20.0);
    table.below("empty: idle processor", "% of a core", both[0].2, both[1].2, 0.3);
    Ok(())
}

/// The least that one durable write by one caller can take here: a synced write of a block, and a round trip on loopback.
fn floor_ms() -> Result<f64> {
    Ok(sync_ms()? + round_trip_ms()?)
}

fn sync_ms() -> Result<f64> {
    let folder = Folder::new("floor")?;
    let mut file = std::fs::OpenOptions::new().create_new(true).read(true).write(true).open(folder.path().join("f"))?;
    file.write_all(&vec![0; 1 << 20])?;
    file.sync_all()?;
    let mut times = Vec::new();
    for i in 0..1000u64 {
        file.seek(std::io::SeekFrom::Start(i % 256 * 4096))?;
        let began = Instant::now();
        file.write_all(&[i as u8; 4096])?;
        file.sync_data()?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    Ok(median(times))
}

fn round_trip_ms() -> Result<f64> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let echo = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut peer, _) = listener.accept()?;
        peer.set_nodelay(true)?;
        let mut buffer = [0; 256];
        loop {
            peer.read_exact(&mut buffer)?;
            peer.write_all(&buffer)?;
        }
    });
    let mut socket = std::net::TcpStream::connect(address)?;
    socket.set_nodelay(true)?;
    let mut buffer = [7; 256];
    let mut times = Vec::new();
    for _ in 0..2000 {
        let began = Instant::now();
        socket.write_all(&buffer)?;
        socket.read_exact(&mut buffer)?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    drop(socket);
    let _ = echo.join();
    Ok(median(times))
}

pub(super) fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
