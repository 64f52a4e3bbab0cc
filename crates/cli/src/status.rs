//! `tenure status`: how each of the members asked is, at a glance.

use crate::common::{Common, Failure, Output, OutputArg, exit, print_table};
use anyhow::Result;
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;
use tenure_wire::tenure::v1::status_client::StatusClient;
use tenure_wire::tenure::v1::{StatusGetReply, StatusGetRequest};
use tonic::transport::Endpoint;

#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    output: OutputArg,
}

/// Asks every endpoint; fails if none answers.
pub(crate) async fn run(common: &Common, args: StatusArgs) -> Result<ExitCode> {
    let mut answers = Vec::new();
    for endpoint in &common.endpoints {
        answers.push((endpoint.clone(), ask(endpoint, common.command_timeout).await));
    }
    match args.output.output {
        Output::Table => table(&answers),
        Output::Json => println!("{}", serde_json::Value::Array(answers.iter().map(as_json).collect())),
    }
    if answers.iter().all(|(_, answer)| answer.is_err()) {
        let why: Vec<String> =
            answers.iter().filter_map(|(e, a)| a.as_ref().err().map(|why| format!("{e}: {why}"))).collect();
        let hint = "is `tenure serve` running there? --endpoints or TENURE_ENDPOINTS say where to look";
        return Err(Failure::new(exit::UNAVAILABLE, format!("no member answers ({})", why.join("; ")))
            .hint(hint)
            .into());
    }
    Ok(ExitCode::SUCCESS)
}

type Answer = Result<StatusGetReply, String>;

async fn ask(endpoint: &str, timeout: Duration) -> Answer {
    let url = if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
    let channel = Endpoint::from_shared(url).map_err(|e| e.to_string())?.connect_timeout(timeout).timeout(timeout);
    let channel = channel.connect().await.map_err(|e| root_cause(&e))?;
    let answer = StatusClient::new(channel).get(StatusGetRequest {}).await;
    answer.map(tonic::Response::into_inner).map_err(|s| s.message().to_owned())
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn table(answers: &[(String, Answer)]) {
    let rows: Vec<Vec<String>> = answers
        .iter()
        .map(|(endpoint, answer)| match answer {
            Ok(s) => vec![
                endpoint.clone(),
                s.name.clone(),
                format!("{:x}", s.member_id),
                role(s).to_owned(),
                s.raft_term.to_string(),
                format!("{}/{}", s.applied_index, s.committed_index),
                s.revision.to_string(),
                s.keys.to_string(),
                s.sessions.to_string(),
                format!("{} (+{} waiting)", s.locks, s.waiters),
                size(s.memory_used_bytes),
                size(s.db_bytes),
                s.version.clone(),
                uptime(s.uptime_ms),
                if s.alarms.is_empty() { "none".to_owned() } else { s.alarms.join(", ") },
            ],
            Err(why) => vec![endpoint.clone(), format!("unreachable: {why}")],
        })
        .collect();
    let headings = [
        "ENDPOINT", "NAME", "MEMBER", "ROLE", "TERM", "APPLIED", "REVISION", "KEYS", "SESSIONS", "LOCKS", "MEMORY",
        "DISK", "VERSION", "UPTIME", "ALARMS",
    ];
    print_table(&headings, &rows);
}

fn role(s: &StatusGetReply) -> &'static str {
    match s.leader {
        0 => "no leader",
        leader if leader == s.member_id => "leader",
        _ => "follower",
    }
}

fn size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 30 => format!("{:.1} GiB", b as f64 / f64::from(1 << 30)),
        b if b >= 1 << 20 => format!("{:.1} MiB", b as f64 / f64::from(1 << 20)),
        b => format!("{:.1} KiB", b as f64 / 1024.0),
    }
}

fn uptime(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m{s}s"),
        (0, h, m, _) => format!("{h}h{m}m"),
        (d, h, _, _) => format!("{d}d{h}h"),
    }
}

fn as_json((endpoint, answer): &(String, Answer)) -> serde_json::Value {
    match answer {
        Err(why) => json!({ "endpoint": endpoint, "error": why }),
        Ok(s) => json!({
            "endpoint": endpoint, "name": s.name, "member_id": s.member_id.to_string(), "cluster_id": s.cluster_id.to_string(),
            "issuer_id": s.issuer_id, "leader": s.leader.to_string(), "role": role(s), "raft_term": s.raft_term.to_string(),
            "committed_index": s.committed_index.to_string(), "applied_index": s.applied_index.to_string(),
            "revision": s.revision.to_string(), "compact_revision": s.compact_revision.to_string(), "version": s.version,
            "behaviour_version": s.behaviour_version, "memory_used_bytes": s.memory_used_bytes.to_string(),
            "memory_soft_limit_bytes": s.memory_soft_limit_bytes.to_string(),
            "memory_hard_limit_bytes": s.memory_hard_limit_bytes.to_string(), "db_bytes": s.db_bytes.to_string(),
            "log_bytes": s.log_bytes.to_string(), "snapshot_bytes": s.snapshot_bytes.to_string(), "keys": s.keys.to_string(),
            "sessions": s.sessions.to_string(), "locks": s.locks.to_string(), "waiters": s.waiters.to_string(),
            "watchers": s.watchers.to_string(), "alarms": s.alarms, "uptime_ms": s.uptime_ms.to_string(),
        }),
    }
}
