//! `tenure bench peers --scale`: what a million things cost in memory, and whether renewals stall while a million sessions end.
//!
//! Promises. Memory is the growth of the resident set from before the first thing to after the last, divided by their number; Redis holds the same bytes
//! beside it. Renewals are measured with the same load before the ends and during them.
//! Not promised. A peer for the ends: none of those here has sessions.

use super::super::load::GRANT;
use super::super::measure::{Histogram, rss_mib};
use super::super::peer::{Kind, Peer, Programs};
use super::super::rpc::{Rpc, frame};
use super::clients;
use super::servers::{Engine, Server};
use super::tenure;
use anyhow::{Context as _, Result, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tenure_wire::etcd::etcdserverpb as pb;
use tenure_wire::tenure::v1;

const CREATE: &str = "/tenure.v1.Sessions/Create";
const RENEW: &str = "/tenure.v1.Sessions/Renew";
const STATUS: &str = "/tenure.v1.Status/Get";
/// Calls in flight while things are made.
const MAKERS: u64 = 256;
/// A renewal of each of these every 20 ms, on connections of their own.
const RENEWERS: usize = 16;

pub(super) async fn run(programs: &Programs, things: u64) -> Result<()> {
    println!("| what | server | number | seconds to make | MiB | bytes each |");
    println!("|---|---|---|---|---|---|");
    let row = |what: &str, server: &str, n: u64, made: Duration, mib: f64| {
        let each = mib * 1_048_576.0 / n as f64;
        println!("| {what} | {server} | {n} | {:.1} | {mib:.0} | {each:.0} |", made.as_secs_f64());
    };

    let (peer, before) = fresh(programs).await?;
    let began = Instant::now();
    tenure::enqueue(&peer.endpoint(), things).await?;
    row("queued jobs of 256 B", "Tenure", things, began.elapsed(), peer.rss_mib()? - before);
    drop(peer);
    let redis = |what: &'static str, list: bool| async move {
        let server = Server::start(Engine::Redis).await?;
        let pid = *server.pids()?.first().context("no process")?;
        let (before, began) = (rss_mib(pid)?, Instant::now());
        clients::fill_redis(&server, things, list).await?;
        row(what, "Redis", things, began.elapsed(), rss_mib(pid)? - before);
        anyhow::Ok(())
    };
    redis("queued jobs of 256 B", true).await?;

    let (peer, before) = fresh(programs).await?;
    let began = Instant::now();
    tenure::complete(&peer.endpoint(), things).await?;
    row("completed idempotency records of 256 B", "Tenure", things, began.elapsed(), peer.rss_mib()? - before);
    drop(peer);
    redis("completed idempotency records of 256 B", false).await?;

    let (peer, before) = fresh(programs).await?;
    let began = Instant::now();
    let sessions = things / 10;
    make(&peer.endpoint(), sessions, |_| {
        (CREATE, v1::SessionCreateRequest { ttl_ms: 3_600_000, ..Default::default() })
    })
    .await?;
    row("native sessions", "Tenure", sessions, began.elapsed(), peer.rss_mib()? - before);
    drop(peer);
    storm(programs, things).await
}

async fn fresh(programs: &Programs) -> Result<(Peer, f64)> {
    let peer = Peer::start(Kind::Tenure, programs).await?;
    let before = peer.rss_mib()?;
    Ok((peer, before))
}

/// Makes so many things, some calls at a time on a few connections.
async fn make<Q: prost::Message + 'static>(
    endpoint: &str,
    things: u64,
    question: impl Fn(u64) -> (&'static str, Q) + Send + Sync + 'static,
) -> Result<()> {
    let next = Arc::new(AtomicU64::new(0));
    let question = Arc::new(question);
    let mut connections = Vec::new();
    for _ in 0..MAKERS / 16 {
        connections.push(Rpc::connect(endpoint).await?);
    }
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..MAKERS {
        let (next, question) = (next.clone(), question.clone());
        let mut rpc = connections[n as usize % connections.len()].clone();
        tasks.spawn(async move {
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= things {
                    return anyhow::Ok(());
                }
                let (path, asked) = question(at);
                rpc.unary_bytes(path, frame(&asked)).await?;
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}

/// A million leases that all end in one second, while a few sessions are renewed.
async fn storm(programs: &Programs, leases: u64) -> Result<()> {
    let peer = Peer::start(Kind::Tenure, programs).await?;
    let endpoint = peer.endpoint();
    // Later than the slowest that can be granted here, in whole seconds as etcd has them.
    let end = Instant::now() + Duration::from_secs(30 + leases / 8_000);
    make(&endpoint, leases, move |_| {
        let ttl = end.saturating_duration_since(Instant::now()).as_secs() as i64;
        (GRANT, pb::LeaseGrantRequest { ttl: ttl.max(5), ..Default::default() })
    })
    .await?;
    let stop = Arc::new(AtomicBool::new(false));
    let phase = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for _ in 0..RENEWERS {
        let mut rpc = Rpc::connect(&endpoint).await?;
        let made: v1::SessionCreateReply =
            rpc.unary(CREATE, &v1::SessionCreateRequest { ttl_ms: 10_000, ..Default::default() }).await?;
        let renew = v1::SessionRenewRequest {
            sessions: vec![v1::SessionRef { id: made.id, token: made.token }],
            ..Default::default()
        };
        let (stop, phase) = (stop.clone(), phase.clone());
        tasks.push(tokio::spawn(async move {
            let mut seen = [Histogram::new(), Histogram::new(), Histogram::new()];
            let mut ticks = tokio::time::interval(Duration::from_millis(20));
            while !stop.load(Ordering::Relaxed) {
                ticks.tick().await;
                let (at, began) = (phase.load(Ordering::Relaxed) as usize, Instant::now());
                let answer: v1::SessionRenewReply = rpc.unary(RENEW, &renew).await?;
                ensure!(answer.renewals.iter().all(|renewal| renewal.error.is_none()), "a session was lost");
                seen[at].add(began.elapsed());
            }
            anyhow::Ok(seen)
        }));
    }
    let mut asker = Rpc::connect(&endpoint).await?;
    let there = alive(&mut asker).await?;
    ensure!(there >= leases, "only {there} of {leases} leases were there before the end");
    tokio::time::sleep(end.saturating_duration_since(Instant::now()).saturating_sub(Duration::from_secs(2))).await;
    phase.store(1, Ordering::Relaxed);
    let (mut first, began) = (None, Instant::now());
    loop {
        let left = alive(&mut asker).await?;
        if left < leases && first.is_none() {
            first = Some(Instant::now());
        }
        if left <= RENEWERS as u64 {
            break;
        }
        ensure!(began.elapsed() < Duration::from_secs(300), "{left} sessions are left after five minutes");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let took = first.map(|at| at.elapsed()).unwrap_or_default();
    phase.store(2, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(3)).await;
    stop.store(true, Ordering::Relaxed);
    let mut phases = [Histogram::new(), Histogram::new(), Histogram::new()];
    for task in tasks {
        for (all, own) in phases.iter_mut().zip(task.await??) {
            all.merge(&own);
        }
    }
    println!();
    println!("{leases} leases ended within {:.1} s.", took.as_secs_f64());
    println!();
    println!("| renewals of {RENEWERS} other sessions | number | p50 ms | p99 ms | p99.9 ms |");
    println!("|---|---|---|---|---|");
    for (when, seen) in ["before", "while the leases end", "after"].iter().zip(&phases) {
        let p = |q| seen.percentile_ms(q);
        println!("| {when} | {} | {:.2} | {:.2} | {:.2} |", seen.count(), p(0.5), p(0.99), p(0.999));
    }
    Ok(())
}

/// Live sessions of whatever kind.
async fn alive(rpc: &mut Rpc) -> Result<u64> {
    let status: v1::StatusGetReply = rpc.unary(STATUS, &v1::StatusGetRequest::default()).await?;
    Ok(status.sessions)
}
