//! Members: the list, and every change of who belongs to the cluster.
//!
//! Promises. The list and a token are this member's word alone and need no majority. A change is a transaction of the table of members; the
//! leader carries it out, and who waits for that is told whether it was seen done.
//! Not promised. That what is under way when an answer leaves is ever done: a learner that never comes is never promoted.
//! Relies on. The state machine refuses what contradicts itself: a used name, the last voter.

use std::time::Duration;

use tenure_machine::{MemberId, MemberRecord, MemberRole, Op, OpReply, Rejection, Txn};
use tenure_replica::{PeerStatus, Refusal, Role, Status, join_digest};
use tenure_wire::tenure::v1;

use super::Refused;
use super::sessions::{draw_id, native_unary, query};
use crate::Context;
use crate::driver::{Failure, View};
use crate::join_token::JoinToken;
use crate::rpc::Router;
use crate::status::{self as words, Kind};

/// How long a call waits for the leader to carry out what was decided.
pub(crate) const WAIT: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(25);

pub(crate) fn mount(router: &mut Router, context: &Context) {
    native_unary(router, context, "/tenure.v1.Members/List", list);
    native_unary(router, context, "/tenure.v1.Members/Add", add);
    native_unary(router, context, "/tenure.v1.Members/Promote", promote);
    native_unary(router, context, "/tenure.v1.Members/Remove", remove);
    native_unary(router, context, "/tenure.v1.Members/Replace", replace);
    native_unary(router, context, "/tenure.v1.Members/Update", update);
    native_unary(router, context, "/tenure.v1.Members/MoveLeader", move_leader);
    native_unary(router, context, "/tenure.v1.Members/Token", token);
}

// What members are, as this one sees it.

/// Whether a leader that a majority follows is known here.
pub(crate) fn has_majority(status: &Status) -> bool {
    status.leader.is_some() && status.in_touch
}

pub(crate) fn role_of(status: &Status, member: MemberId) -> v1::MemberRole {
    if status.voters.contains(&member) {
        v1::MemberRole::Voter
    } else if status.learners.contains(&member) {
        v1::MemberRole::Learner
    } else {
        v1::MemberRole::Outside
    }
}

pub(crate) fn shown(status: &Status, memory: u64) -> Vec<v1::Member> {
    status.members.iter().map(|peer| shown_one(status, memory, peer)).collect()
}

fn shown_one(status: &Status, memory: u64, peer: &PeerStatus) -> v1::Member {
    let record = &peer.record;
    let is_this = record.id == status.member;
    let facts = peer.facts.as_ref();
    let own = |value: u64, told: Option<u64>| if is_this { Some(value) } else { told };
    let alarms = match facts {
        _ if is_this => status.alarms.iter().map(ToString::to_string).collect(),
        Some(facts) => facts.alarms.clone(),
        None => Vec::new(),
    };
    v1::Member {
        id: record.id.0,
        name: record.name.to_string(),
        peer: record.peer.to_string(),
        client_urls: record.clients.iter().map(ToString::to_string).collect(),
        role: role_of(status, record.id).into(),
        wanted: wanted(record.role).into(),
        replaces: record.replaces.map_or(0, |id| id.0),
        leader: status.leader == Some(record.id),
        started: record.has_come(),
        connected: peer.is_connected,
        heard_ms: own(0, peer.heard_ms),
        lag: lag(status, peer),
        disk_free_bytes: own(status.disk_free, facts.map(|f| f.disk_free)),
        log_bytes: own(status.log_file_bytes, facts.map(|f| f.log_bytes)),
        memory_used_bytes: own(memory, facts.map(|f| f.memory)),
        version: record.release.to_string(),
        behaviour_version: record.behaviour.into(),
        clock_skew_ms: peer.skew_ms,
        alarms,
    }
}

/// Entries that a member lacks: exact at the leader, elsewhere by what leader and member told of themselves within the last second.
fn lag(status: &Status, peer: &PeerStatus) -> Option<u64> {
    let id = peer.record.id;
    if status.leader == Some(id) && (status.role == Role::Leader || peer.is_connected) {
        return Some(0);
    }
    if status.role == Role::Leader {
        return peer.matched.map(|matched| status.last_index.saturating_sub(matched));
    }
    let told = |id: MemberId| {
        let peer = status.members.iter().find(|peer| peer.record.id == id)?;
        peer.facts.as_ref().map(|facts| facts.last_index)
    };
    let has = if id == status.member { Some(status.last_index) } else { told(id) };
    Some(status.leader.and_then(told)?.saturating_sub(has?))
}

fn wanted(role: MemberRole) -> v1::MemberRole {
    match role {
        MemberRole::Learner => v1::MemberRole::Learner,
        MemberRole::Voter => v1::MemberRole::Voter,
        MemberRole::Removed => v1::MemberRole::Outside,
    }
}

async fn list(context: Context, _: v1::MemberListRequest) -> Result<v1::MemberListReply, Refused> {
    let look = |view: &View<'_>| {
        let status = view.member.status();
        v1::MemberListReply {
            cluster_id: status.cluster,
            member_id: status.member.0,
            leader: status.leader.map_or(0, |leader| leader.0),
            raft_term: status.term,
            has_majority: has_majority(&status),
            members: shown(&status, view.machine.memory().used),
        }
    };
    query(&context, true, look).await
}

async fn one(context: &Context, id: MemberId) -> Result<Option<v1::Member>, Refused> {
    let look = move |view: &View<'_>| shown(&view.member.status(), view.machine.memory().used);
    Ok(query(context, true, look).await?.into_iter().find(|member| member.id == id.0))
}

/// The record of a live member, or why there is none.
async fn record(context: &Context, id: u64) -> Result<MemberRecord, Refused> {
    let id = MemberId(id);
    let found = query(context, true, move |view| view.machine.member(id).cloned()).await?;
    let none = || words::not_found("there is no such member", &[("member", format!("{:016x}", id.0))]);
    match found {
        Some(record) if record.is_live() => Ok(record),
        Some(_) => Err(rejected(context, &Rejection::MemberRemoved { id })),
        None => Err(Box::new(none())),
    }
}

/// Looks at this member again and again until something holds. False: it did not, in the time there is.
pub(crate) async fn until(
    context: &Context,
    limit: Duration,
    holds: impl Fn(&Status) -> bool + Copy + Send + 'static,
) -> Result<bool, Failure> {
    let end = tokio::time::Instant::now() + limit;
    loop {
        if context.query(true, move |view| holds(&view.member.status())).await? {
            return Ok(true);
        }
        if tokio::time::Instant::now() >= end {
            return Ok(false);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

pub(crate) fn is_voter(status: &Status, id: MemberId) -> bool {
    status.voters.contains(&id)
}

/// Neither in the configuration nor on its way into it.
pub(crate) fn is_gone(status: &Status, id: MemberId) -> bool {
    status.members.iter().all(|peer| peer.record.id != id)
}

// Changes.

fn rejected(context: &Context, rejection: &Rejection) -> Refused {
    Box::new(words::native_rejection(rejection, Kind::Change, context.identity.stamp()))
}

fn failed(failure: &Failure) -> Refused {
    Box::new(words::native_failure(failure, Kind::Change))
}

/// Changes the table. The record is as it is after the change.
pub(crate) async fn change(context: &Context, op: Op) -> Result<Result<MemberRecord, Rejection>, Failure> {
    let reply = context.write(Txn::of(op)).await?;
    match reply.result.map(|mut done| done.results.pop()) {
        Ok(Some(OpReply::Member(record))) => Ok(Ok(*record)),
        Ok(_) => {
            tracing::error!("the state machine answered another question");
            Err(Failure::Unknown)
        }
        Err(rejection) => Ok(Err(rejection)),
    }
}

async fn changed(context: &Context, op: Op) -> Result<MemberRecord, Refused> {
    let record = change(context, op).await.map_err(|failure| failed(&failure))?;
    record.map_err(|rejection| rejected(context, &rejection))
}

/// A name that can stand in a command line and in `--cluster`.
fn name(text: &str) -> Result<Box<str>, Refused> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > 128 || !text.chars().all(is_plain) {
        return Err(super::refuse("name", "a member's name has 1 to 128 letters, digits, `-`, `_` and `.`"));
    }
    Ok(text.into())
}

/// `host:port`, with or without a scheme before it.
pub(crate) fn host_port(text: &str) -> Option<&str> {
    let plain = crate::plain(text);
    let plain = plain.strip_suffix('/').unwrap_or(plain);
    let (host, port) = plain.rsplit_once(':')?;
    let is_host =
        !host.is_empty() && !host.contains(['/', '@', '?', '#', ',', '=']) && !host.contains(char::is_whitespace);
    let is_port = port.parse::<u16>().is_ok_and(|port| port != 0);
    (is_host && is_port).then_some(plain)
}

fn peer_address(text: &str) -> Result<Box<str>, Refused> {
    host_port(text).map(Into::into).ok_or_else(|| {
        super::refuse("peer", format!("`{text}` is no address where the other members can find it: give host:port"))
    })
}

fn secret() -> Result<[u8; 16], Refused> {
    let mut secret = [0; 16];
    let none = |error| super::refuse("token", format!("the system gives no random numbers: {error}"));
    getrandom::fill(&mut secret).map_err(none)?;
    Ok(secret)
}

async fn add(context: Context, request: v1::MemberAddRequest) -> Result<v1::MemberAddReply, Refused> {
    let role = if request.learner { MemberRole::Learner } else { MemberRole::Voter };
    take_in(&context, name(&request.name)?, peer_address(&request.peer)?, role, None).await
}

async fn replace(context: Context, request: v1::MemberReplaceRequest) -> Result<v1::MemberAddReply, Refused> {
    let gone = record(&context, request.id).await?;
    let (name, peer) = (name(&request.name)?, peer_address(&request.peer)?);
    take_in(&context, name, peer, MemberRole::Voter, Some(gone.id)).await
}

async fn take_in(
    context: &Context,
    name: Box<str>,
    peer: Box<str>,
    role: MemberRole,
    replaces: Option<MemberId>,
) -> Result<v1::MemberAddReply, Refused> {
    let id = draw_id().map_err(|status| super::refuse("id", status.message))?;
    let secret = secret()?;
    let join = join_digest(&secret);
    let record = changed(context, Op::MemberAdd { id: MemberId(id.0), name, peer, role, replaces, join }).await?;
    let join_token = token_for(context, &record, secret).await?;
    Ok(v1::MemberAddReply { member: one(context, record.id).await?, join_token })
}

async fn token_for(context: &Context, record: &MemberRecord, secret: [u8; 16]) -> Result<String, Refused> {
    let record = record.clone();
    let look = move |view: &View<'_>| {
        let others = view.machine.members().filter(|other| other.is_live() && other.id != record.id);
        JoinToken {
            cluster_token: view.member.hello(0).cluster_token,
            member: record.id,
            name: record.name.to_string(),
            peer: record.peer.to_string(),
            cluster: view.machine.cluster(),
            secret,
            others: others.map(|other| (other.id, other.name.to_string(), other.peer.to_string())).collect(),
        }
    };
    Ok(query(context, true, look).await?.encode())
}

async fn token(context: Context, request: v1::MemberTokenRequest) -> Result<v1::MemberTokenReply, Refused> {
    let record = record(&context, request.id).await?;
    if record.has_come() {
        return Err(super::refuse("id", format!("member `{}` has come already: it needs no token", record.name)));
    }
    if record.join != [0; 32] {
        let name = &record.name;
        let why = format!(
            "the token of member `{name}` was shown when it was added and is not kept: remove it and add it again"
        );
        return Err(super::refuse("id", why));
    }
    Ok(v1::MemberTokenReply { join_token: token_for(&context, &record, [0; 16]).await? })
}

async fn promote(context: Context, request: v1::MemberPromoteRequest) -> Result<v1::MemberPromoteReply, Refused> {
    let before = record(&context, request.id).await?;
    let id = before.id;
    let votes = query(&context, true, move |view| is_voter(&view.member.status(), id)).await?;
    // One that is on its way to become a voter is only waited for.
    if votes || before.role != MemberRole::Voter {
        changed(&context, Op::MemberPromote { id }).await?;
    }
    let limit = if request.wait.unwrap_or(true) { WAIT } else { Duration::ZERO };
    let done = until(&context, limit, move |status| is_voter(status, id)).await.map_err(|failure| failed(&failure))?;
    Ok(v1::MemberPromoteReply { done, member: one(&context, id).await? })
}

async fn remove(context: Context, request: v1::MemberRemoveRequest) -> Result<v1::MemberRemoveReply, Refused> {
    let id = record(&context, request.id).await?.id;
    changed(&context, Op::MemberRemove { id }).await?;
    let limit = if request.wait.unwrap_or(true) { WAIT } else { Duration::ZERO };
    // It is decided; a member that goes because of it cannot tell more.
    let done = until(&context, limit, move |status| is_gone(status, id)).await.unwrap_or(false);
    Ok(v1::MemberRemoveReply { done })
}

async fn update(context: Context, request: v1::MemberUpdateRequest) -> Result<v1::MemberUpdateReply, Refused> {
    let (id, peer) = (MemberId(request.id), peer_address(&request.peer)?);
    changed(&context, Op::MemberUpdate { id, peer }).await?;
    Ok(v1::MemberUpdateReply { member: one(&context, id).await? })
}

async fn move_leader(context: Context, request: v1::MoveLeaderRequest) -> Result<v1::MoveLeaderReply, Refused> {
    let to = (request.id != 0).then_some(MemberId(request.id));
    let status = query(&context, true, |view| view.member.status()).await?;
    let own = status.member;
    if status.role != Role::Leader {
        return Err(not_leader(&status));
    }
    if to == Some(own) {
        return Ok(v1::MoveLeaderReply { leader: own.0 });
    }
    if let Some(id) = to {
        record(&context, id.0).await?;
    }
    context.hand_over(to).await.map_err(|failure| match failure {
        Failure::Refused(Refusal::NoQuorum) => {
            super::refuse("id", "there is no such voter that is connected with the leader")
        }
        other => failed(&other),
    })?;
    let moved = |status: &Status| status.leader.is_some() && status.leader != Some(status.member);
    if !until(&context, WAIT, moved).await.map_err(|failure| failed(&failure))? {
        return Err(failed(&Failure::Unknown));
    }
    let leader = query(&context, true, |view| view.member.status().leader).await?;
    Ok(v1::MoveLeaderReply { leader: leader.map_or(0, |leader| leader.0) })
}

/// Where to ask instead.
fn not_leader(status: &Status) -> Refused {
    let Some(leader) = status.leader else { return failed(&Failure::Refused(Refusal::NoQuorum)) };
    let mut facts = std::collections::BTreeMap::from([("leader".to_owned(), format!("{:016x}", leader.0))]);
    let record = status.members.iter().find(|peer| peer.record.id == leader).map(|peer| &peer.record);
    let name = record.map_or_else(|| format!("{:016x}", leader.0), |record| record.name.to_string());
    if let Some(url) = record.and_then(|record| record.clients.first()) {
        facts.insert("url".to_owned(), url.to_string());
    }
    Box::new(v1::Error {
        code: "CONFLICT".to_owned(),
        message: format!("this member does not lead, `{name}` does: ask there"),
        outcome: v1::Outcome::NotApplied.into(),
        facts,
        ..v1::Error::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_members() {
        for (text, expected) in [
            ("10.0.0.1:2380", Some("10.0.0.1:2380")),
            ("http://db-1.example:2380", Some("db-1.example:2380")),
            ("https://[::1]:2380/", Some("[::1]:2380")),
            ("", None),
            ("db-1", None),
            (":2380", None),
            ("db-1:", None),
            ("db-1:0", None),
            ("db-1:70000", None),
            ("unix://x:1", None),
            ("a=b:1", None),
            ("a b:1", None),
            ("http://x:1/path", None),
        ] {
            assert_eq!(host_port(text), expected, "{text}");
        }
    }

    #[test]
    fn names_of_members() {
        for right in ["n0", "db-1.eu_west"] {
            assert!(name(right).is_ok(), "{right}");
        }
        for wrong in ["", "a b", "a=b", "a,b", "ä", &"x".repeat(129)] {
            assert_eq!(name(wrong).unwrap_err().code, "INVALID", "{wrong}");
        }
    }
}
