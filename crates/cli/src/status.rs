//! `tenure status`: how the cluster is, and each of its members, at a glance.
//!
//! Every endpoint is asked, and every member that those who answer know of. What a member does not say itself is told as another sees it.
//! Without a majority the last line of the head says so and the exit code is that of a service that is not there.

use crate::common::{Common, Failure, Output, OutputArg, exit, print_table};
use anyhow::Result;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::Duration;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::status_client::StatusClient;
use tenure_wire::tenure::v1::{StatusGetReply, StatusGetRequest};
use tonic::transport::Endpoint;

/// Members that nobody named on the command line get no longer than this.
const OTHERS_TIMEOUT: Duration = Duration::from_millis(1_500);

#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    output: OutputArg,
}

/// One that was asked, or should have been.
struct Asked {
    endpoint: String,
    /// As others know it; empty if none does.
    name: String,
    answer: Answer,
}

type Answer = Result<StatusGetReply, String>;

/// Asks every endpoint and every member; fails if none answers, and tells it if there is no majority.
pub(crate) async fn run(common: &Common, args: StatusArgs) -> Result<ExitCode> {
    let named = common.endpoints.iter().map(|endpoint| (endpoint.clone(), String::new())).collect();
    let mut all = ask_all(named, common.command_timeout).await;
    if let Some(view) = best_view(&all) {
        let others: Vec<(String, String)> = view
            .members
            .iter()
            .filter(|member| !all.iter().any(|asked| is_answer_of(asked, member)))
            .filter_map(|member| Some((member.client_urls.first()?.clone(), member.name.clone())))
            .collect();
        // One that was named and did not answer is the same as one that is known by that address.
        for (url, name) in &others {
            let asked = all.iter_mut().find(|asked| asked.answer.is_err() && plain(&asked.endpoint) == plain(url));
            asked.into_iter().for_each(|asked| asked.name.clone_from(name));
        }
        let others = others.into_iter().filter(|(_, name)| all.iter().all(|asked| asked.name != *name)).collect();
        all.extend(ask_all(others, common.command_timeout.min(OTHERS_TIMEOUT)).await);
    }
    let view = best_view(&all);
    match args.output.output {
        Output::Table => view.into_iter().for_each(|view| print(view, &all)),
        Output::Json => out!("{}", Value::Array(all.iter().map(as_json).collect())),
    }
    let Some(view) = view else {
        let why: Vec<String> = all
            .iter()
            .filter_map(|asked| asked.answer.as_ref().err().map(|why| format!("{}: {why}", asked.endpoint)))
            .collect();
        let hint = "is `tenure serve` running there? --endpoints or TENURE_ENDPOINTS say where to look";
        let message = format!("no member answers ({})", why.join("; "));
        return Err(Failure::new(exit::UNAVAILABLE, message).hint(hint).into());
    };
    Ok(if view.has_majority { ExitCode::SUCCESS } else { ExitCode::from(exit::UNAVAILABLE) })
}

async fn ask_all(whom: Vec<(String, String)>, timeout: Duration) -> Vec<Asked> {
    let asking: Vec<_> = whom
        .into_iter()
        .map(|(endpoint, name)| {
            let task = tokio::spawn({
                let endpoint = endpoint.clone();
                async move { ask(&endpoint, timeout).await }
            });
            (endpoint, name, task)
        })
        .collect();
    let mut all = Vec::new();
    for (endpoint, name, task) in asking {
        let answer = task.await.unwrap_or_else(|error| Err(error.to_string()));
        let name = answer.as_ref().map_or(name, |answer| answer.name.clone());
        all.push(Asked { endpoint, name, answer });
    }
    all
}

async fn ask(endpoint: &str, timeout: Duration) -> Answer {
    let url = if endpoint.contains("://") { endpoint.to_owned() } else { format!("http://{endpoint}") };
    let channel = Endpoint::from_shared(url).map_err(|e| e.to_string())?.connect_timeout(timeout).timeout(timeout);
    let channel = channel.connect().await.map_err(|e| root_cause(&e))?;
    let answer = StatusClient::new(channel).get(StatusGetRequest {}).await;
    answer.map(tonic::Response::into_inner).map_err(|s| s.message().to_owned())
}

pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn plain(endpoint: &str) -> &str {
    endpoint.split_once("://").map_or(endpoint, |(_, plain)| plain).trim_end_matches('/')
}

fn is_answer_of(asked: &Asked, member: &v1::Member) -> bool {
    asked.answer.as_ref().is_ok_and(|answer| answer.member_id == member.id)
}

/// Who knows most: one with a majority before one without, a leader before the others, then the newest term.
fn best_view(all: &[Asked]) -> Option<&StatusGetReply> {
    let knows = |s: &&StatusGetReply| (s.has_majority, s.leader == s.member_id, s.raft_term, s.applied_index);
    all.iter().filter_map(|asked| asked.answer.as_ref().ok()).max_by_key(knows)
}

fn print(view: &StatusGetReply, all: &[Asked]) {
    let answer_of = |member: &v1::Member| {
        all.iter().find(|asked| is_answer_of(asked, member)).and_then(|asked| asked.answer.as_ref().ok())
    };
    out!("{}", verdict(view, |member| answer_of(member).is_some()));
    out!(
        "revision {}, {} keys, {} sessions, {} locks held (+{} waiting), rules of version {}",
        view.revision,
        view.keys,
        view.sessions,
        view.locks,
        view.waiters,
        view.behaviour_version
    );
    out!();
    let mut members: Vec<&v1::Member> = view.members.iter().collect();
    members.sort_by(|a, b| a.name.cmp(&b.name));
    let rows: Vec<Vec<String>> = members.iter().map(|member| row(member, answer_of(member), all)).collect();
    let headings = [
        "NAME", "MEMBER", "ENDPOINT", "ROLE", "STATE", "TERM", "LAG", "MEMORY", "DISK", "FREE", "VERSION", "UPTIME",
        "ALARMS",
    ];
    print_table(&headings, &rows);
    for asked in all.iter().filter(|asked| asked.answer.is_err() && !members.iter().any(|m| m.name == asked.name)) {
        out!("{}: no answer ({})", asked.endpoint, asked.answer.as_ref().err().map_or("", String::as_str));
    }
    let told: Vec<(&str, &str)> = members
        .iter()
        .flat_map(|member| {
            let alarms = answer_of(member).map_or(&member.alarms, |answer| &answer.alarm_texts);
            alarms.iter().map(|alarm| (member.name.as_str(), alarm.as_str()))
        })
        .collect();
    if !told.is_empty() {
        out!();
        told.iter().for_each(|(name, alarm)| out!("ALARM at {name}: {alarm}"));
    }
}

/// The one line that a tired operator reads. `answers` tells whether a member answered just now.
fn verdict(view: &StatusGetReply, answers: impl Fn(&v1::Member) -> bool) -> String {
    let mut voters: Vec<&v1::Member> = view.members.iter().filter(|m| m.role() == v1::MemberRole::Voter).collect();
    voters.sort_by(|a, b| a.name.cmp(&b.name));
    let down: Vec<&str> = voters.iter().filter(|m| !answers(m) && !m.connected).map(|m| m.name.as_str()).collect();
    let (all, up) = (voters.len(), voters.len() - down.len());
    let quorum = all / 2 + 1;
    let cluster = format!("cluster {:016x}", view.cluster_id);
    if !view.has_majority {
        let missing = if down.is_empty() { String::new() } else { format!(" (not {})", down.join(", ")) };
        let cure = if up >= quorum {
            "an election is under way, or the members do not reach each other".to_owned()
        } else {
            format!("writes and consistent reads are refused until {quorum} are up")
        };
        return format!("{cluster}: NO MAJORITY: {up} of {all} voters are up{missing}; {cure}");
    }
    let leader = view.members.iter().find(|m| m.leader).map_or("?", |m| m.name.as_str());
    let alarmed = view.members.iter().any(|m| !m.alarms.is_empty());
    let health = match (down.is_empty(), up.saturating_sub(quorum)) {
        (true, _) if alarmed => format!("{up} of {all} voters are up, with alarms"),
        (true, _) => format!("healthy, {up} of {all} voters are up"),
        (false, 0) => format!("DEGRADED: {} down; NONE MORE may be lost", down.join(", ")),
        (false, more) => format!("DEGRADED: {} down; {more} more may be lost", down.join(", ")),
    };
    format!("{cluster}: {health}; {leader} leads in term {}", view.raft_term)
}

fn row(member: &v1::Member, answer: Option<&StatusGetReply>, all: &[Asked]) -> Vec<String> {
    let size_or = |direct: Option<u64>, told: Option<u64>| direct.or(told).map_or_else(|| "?".to_owned(), size);
    let asked = all.iter().find(|asked| asked.name == member.name);
    let endpoint = asked.map(|asked| plain(&asked.endpoint).to_owned());
    let state = match answer {
        Some(s) if s.fetch_bytes > 0 => format!("fetching {}%", s.fetched_bytes * 100 / s.fetch_bytes),
        Some(s) if s.handing_over => "handing over".to_owned(),
        Some(s) if !s.has_majority => "no majority".to_owned(),
        Some(_) => "up".to_owned(),
        None if member.connected => "up, not reached".to_owned(),
        None if !member.started => "not started".to_owned(),
        None => "DOWN".to_owned(),
    };
    let alarms = answer.map_or(member.alarms.len(), |s| s.alarms.len());
    vec![
        member.name.clone(),
        format!("{:016x}", member.id),
        endpoint.unwrap_or_else(|| "?".to_owned()),
        crate::member::role(member),
        state,
        answer.map_or_else(|| "?".to_owned(), |s| s.raft_term.to_string()),
        member.lag.filter(|_| answer.is_some() || member.connected).map_or_else(|| "?".to_owned(), |n| n.to_string()),
        size_or(answer.map(|s| s.memory_used_bytes), member.memory_used_bytes),
        size_or(answer.map(|s| s.db_bytes), member.log_bytes),
        size_or(answer.map(|s| s.disk_free_bytes), member.disk_free_bytes),
        answer.map_or_else(|| member.version.clone(), |s| s.version.clone()),
        answer.map_or_else(|| "?".to_owned(), |s| uptime(s.uptime_ms)),
        match (alarms, answer) {
            (0, _) => "none".to_owned(),
            (_, Some(s)) => s.alarms.join(", "),
            (n, None) => format!("{n}, below"),
        },
    ]
}

fn role(s: &StatusGetReply) -> &'static str {
    match s.leader {
        0 => "no leader",
        leader if leader == s.member_id => "leader",
        _ if s.role() == v1::MemberRole::Voter => "follower",
        _ => "learner",
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

fn as_json(asked: &Asked) -> Value {
    let endpoint = &asked.endpoint;
    match &asked.answer {
        Err(why) if asked.name.is_empty() => json!({ "endpoint": endpoint, "error": why }),
        Err(why) => json!({ "endpoint": endpoint, "name": asked.name, "error": why }),
        Ok(s) => json!({
            "endpoint": endpoint, "name": s.name, "member_id": s.member_id.to_string(), "cluster_id": s.cluster_id.to_string(),
            "issuer_id": s.issuer_id, "leader": s.leader.to_string(), "role": role(s), "raft_term": s.raft_term.to_string(),
            "has_majority": s.has_majority, "handing_over": s.handing_over,
            "committed_index": s.committed_index.to_string(), "applied_index": s.applied_index.to_string(),
            "revision": s.revision.to_string(), "compact_revision": s.compact_revision.to_string(), "version": s.version,
            "behaviour_version": s.behaviour_version, "memory_used_bytes": s.memory_used_bytes.to_string(),
            "memory_soft_limit_bytes": s.memory_soft_limit_bytes.to_string(),
            "memory_hard_limit_bytes": s.memory_hard_limit_bytes.to_string(), "db_bytes": s.db_bytes.to_string(),
            "log_bytes": s.log_bytes.to_string(), "snapshot_bytes": s.snapshot_bytes.to_string(),
            "disk_free_bytes": s.disk_free_bytes.to_string(), "fetched_bytes": s.fetched_bytes.to_string(),
            "fetch_bytes": s.fetch_bytes.to_string(), "keys": s.keys.to_string(), "sessions": s.sessions.to_string(),
            "locks": s.locks.to_string(), "waiters": s.waiters.to_string(), "watchers": s.watchers.to_string(),
            "alarms": s.alarms, "alarm_texts": s.alarm_texts, "uptime_ms": s.uptime_ms.to_string(),
            "members": s.members.iter().map(crate::member::as_json).collect::<Vec<_>>(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(has_majority: bool, connected: &[bool]) -> StatusGetReply {
        let member = |(n, connected): (usize, &bool)| v1::Member {
            id: n as u64 + 1,
            name: format!("n{n}"),
            role: v1::MemberRole::Voter.into(),
            leader: has_majority && n == 0,
            connected: *connected,
            ..Default::default()
        };
        let members = connected.iter().enumerate().map(member).collect();
        StatusGetReply { has_majority, raft_term: 4, members, ..Default::default() }
    }

    #[test]
    fn the_verdict_says_what_an_operator_must_know() {
        let check = |has_majority: bool, connected: &[bool], expected: &str| {
            let said = verdict(&view(has_majority, connected), |_| false);
            assert!(said.contains(expected), "{said}");
        };
        check(true, &[true], "healthy, 1 of 1 voters are up; n0 leads in term 4");
        check(true, &[true, true, true], "healthy, 3 of 3");
        check(true, &[true, true, false], "DEGRADED: n2 down; NONE MORE may be lost; n0 leads");
        check(true, &[true, true, true, true, false], "DEGRADED: n4 down; 1 more may be lost");
        check(false, &[true, false, false], "NO MAJORITY: 1 of 3 voters are up (not n1, n2); writes");
        check(false, &[true, true, false], "NO MAJORITY: 2 of 3 voters are up (not n2); an election");
    }
}
