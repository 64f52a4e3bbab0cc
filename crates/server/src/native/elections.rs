//! Native elections: campaign with waiting, proclaim, resign, withdraw, look, list, observe.
//!
//! Promises. An observer is told how the election is, then each change of leader, value and `should_yield`; whoever reads too slowly misses what came
//! between, never the newest. A wait without a request id ends with the deadline of its call.
//! Not promised. That a candidate is cleaned up after: its wait lives with its session, and it withdraws itself.
//! Relies on. `follow.rs` for the word that an election has changed; what it is now is read from the state.

use std::time::Duration;

use bytes::BytesMut;
use tenure_machine::{
    Campaign, CampaignWait, Candidate, ELECTION_VALUE_MAX, Elected, Election, ElectionInfo, ElectionOp, ElectionReply,
    Leader, NamespaceId, Proclaim, RequestId, Resign, Revision, Stored, Txn, Withdraw,
};
use tenure_wire::tenure::v1;

use super::sessions::{metadata, page_limit};
use super::{
    Caller, Changed, Refused, change, decoded, either, look, mixed_up, namespace, refusal, refuse, reply_of,
    request_id, seen, session_id, text, text_or_bytes, txn_of, txn_under,
};
use crate::Context;
use crate::driver::{Failure, View};
use crate::follow::{Followed, Follower, things};
use crate::rpc::{Call, Code, Incoming, Outgoing, Router, Status, frame_message};
use crate::status::{self as words, Kind};

const NAME_BYTES_MAX: usize = 1_024;
const WAIT_MAX_MS: u64 = 86_400_000;
const CANDIDATES_DEFAULT: usize = 100;
const CANDIDATES_MAX: u32 = 1_000;
/// An observer looks again after so long without a change: that a higher candidate has given up is no change of the election.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// After the driver had no room for a look.
const LOOK_LATER: Duration = Duration::from_millis(100);

pub(crate) fn mount(router: &mut Router, context: &Context) {
    change(router, context, "/tenure.v1.Elections/Campaign", plan_campaign, |_, _, changed| {
        let ElectionReply::Elected(elected) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::CampaignReply { header: Some(changed.header), ..lead(elected, changed.remaining_ms) })
    });
    change(router, context, "/tenure.v1.Elections/Proclaim", plan_proclaim, |_, _, changed| {
        let ElectionReply::Proclaimed(should_yield) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::ProclaimReply { header: Some(changed.header), should_yield })
    });
    change(router, context, "/tenure.v1.Elections/Resign", plan_resign, |_, _, changed| {
        let ElectionReply::Resigned = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::ResignReply { header: Some(changed.header) })
    });
    change(router, context, "/tenure.v1.Elections/Withdraw", plan_withdraw, withdrawn);
    look(router, context, "/tenure.v1.Elections/Get", |request| request.stale, get);
    look(router, context, "/tenure.v1.Elections/List", |request| request.stale, list);
    let context = context.clone();
    router.stream("/tenure.v1.Elections/Observe", move |call, incoming, outgoing| {
        observe(context.clone(), call, incoming, outgoing)
    });
}

// ---- Changes ----

fn plan_campaign(_: &Context, caller: &Caller, request: &v1::CampaignRequest) -> Result<Txn, Refused> {
    let id = request_id(request.request.as_ref(), caller)?;
    if request.session == 0 {
        return Err(refuse("session", "a candidate has a session"));
    }
    let op = ElectionOp::Campaign(Campaign {
        name: name(&request.name)?,
        session: session_id("session", request.session)?,
        value: value(&request.value, &request.value_bytes)?.into(),
        priority: request.priority,
        wait: wait(request, id.as_ref(), caller)?,
    });
    txn_under(&request.namespace, id, op)
}

/// How long to wait. A call's own deadline shortens a wait without a request id; with one, a retry must ask for the same.
fn wait(request: &v1::CampaignRequest, id: Option<&RequestId>, caller: &Caller) -> Result<CampaignWait, Refused> {
    use v1::campaign_request::Wait;
    let left = |deadline: tokio::time::Instant| {
        deadline.saturating_duration_since(tokio::time::Instant::now()).as_millis() as u64
    };
    let bound = caller.deadline.filter(|_| id.is_none()).map(left);
    match request.wait {
        None | Some(Wait::WaitMs(0) | Wait::Forever(false)) => Ok(CampaignWait::None),
        Some(Wait::WaitMs(ms)) if ms > WAIT_MAX_MS => {
            Err(refuse("wait_ms", format!("a wait has at most {WAIT_MAX_MS} ms")))
        }
        Some(Wait::WaitMs(ms)) => Ok(CampaignWait::Ms(bound.map_or(ms, |left| ms.min(left)).max(1))),
        Some(Wait::Forever(true)) => Ok(bound.map_or(CampaignWait::Forever, |left| CampaignWait::Ms(left.max(1)))),
    }
}

fn plan_proclaim(_: &Context, caller: &Caller, request: &v1::ProclaimRequest) -> Result<Txn, Refused> {
    let op = ElectionOp::Proclaim(Proclaim {
        name: name(&request.name)?,
        token: token(request.token)?,
        value: value(&request.value, &request.value_bytes)?.into(),
    });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_resign(_: &Context, caller: &Caller, request: &v1::ResignRequest) -> Result<Txn, Refused> {
    let (token, to) = (token(request.token)?, session_id("to", request.to)?);
    let op = ElectionOp::Resign(Resign { name: name(&request.name)?, token, to });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn plan_withdraw(_: &Context, caller: &Caller, request: &v1::WithdrawRequest) -> Result<Txn, Refused> {
    if request.session == 0 {
        return Err(refuse("session", "a candidate has a session"));
    }
    let op = ElectionOp::Withdraw(Withdraw {
        name: name(&request.name)?,
        session: session_id("session", request.session)?,
        campaign: request_id(request.campaign.as_ref(), &Caller::default())?,
    });
    txn_of(&request.namespace, request.request.as_ref(), caller, op)
}

fn withdrawn(_: &Context, request: &v1::WithdrawRequest, changed: Changed) -> Result<v1::WithdrawReply, Refused> {
    use v1::withdraw_reply::Result as Outcome;
    let ElectionReply::Withdrawn(done) = reply_of(changed.reply)? else { return Err(mixed_up()) };
    let result = match (done.candidates, done.elected) {
        (0, None) => return Err(Box::new(words::nothing_to_cancel(&request.name))),
        (0, Some(elected)) => Outcome::Elected(lead(elected, changed.remaining_ms)),
        _ => Outcome::Withdrawn(true),
    };
    Ok(v1::WithdrawReply { header: Some(changed.header), result: Some(result) })
}

fn name(name: &str) -> Result<Box<[u8]>, Refused> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(refuse("name", format!("the name of an election has 1 to {NAME_BYTES_MAX} bytes")));
    }
    Ok(name.as_bytes().into())
}

fn value<'a>(text: &'a str, bytes: &'a [u8]) -> Result<&'a [u8], Refused> {
    let value = either("value", text, bytes)?;
    if value.len() > ELECTION_VALUE_MAX {
        return Err(refuse("value", format!("the value of a leader has at most {ELECTION_VALUE_MAX} bytes")));
    }
    Ok(value)
}

fn token(token: u64) -> Result<Revision, Refused> {
    if token == 0 { Err(refuse("token", "name the token under which you lead")) } else { Ok(Revision(token)) }
}

fn lead(elected: Elected, remaining_ms: u64) -> v1::CampaignReply {
    v1::CampaignReply {
        header: None,
        token: elected.token.0,
        session: elected.session.0,
        session_token: elected.session_token,
        ttl_ms: elected.ttl_ms,
        remaining_ms,
    }
}

// ---- Looks ----

fn get(view: &View<'_>, request: &v1::ElectionGetRequest) -> Result<v1::ElectionGetReply, Refused> {
    let max = match request.candidates_limit {
        0 => CANDIDATES_DEFAULT,
        more if more > CANDIDATES_MAX => {
            return Err(refuse("candidates_limit", format!("at most {CANDIDATES_MAX} candidates are told")));
        }
        limit => limit as usize,
    };
    let info = view.machine.election(namespace(&request.namespace)?, &name(&request.name)?, max);
    Ok(v1::ElectionGetReply { header: seen(view, request.stale), election: Some(shown(view, info)) })
}

fn list(view: &View<'_>, request: &v1::ElectionListRequest) -> Result<v1::ElectionListReply, Refused> {
    let (namespace, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let after = Some(request.after.as_bytes()).filter(|after| !after.is_empty());
    let page = view.machine.objects::<Election>(namespace, request.prefix.as_bytes(), after, max);
    let next = page.last().filter(|_| page.len() == max).map_or_else(String::new, |(name, _)| text(name));
    // One that is kept for the sake of who led it last is vacant.
    let led = page.iter().filter(|(_, election)| election.leader.is_some());
    let elections = led.map(|(name, _)| shown(view, view.machine.election(namespace, name, 0))).collect();
    Ok(v1::ElectionListReply { header: seen(view, request.stale), elections, next })
}

fn shown(view: &View<'_>, info: ElectionInfo) -> v1::Election {
    let candidates = info.candidates.iter().zip(1..).map(|(candidate, position)| waiting(view, candidate, position));
    v1::Election {
        name: text(&info.name),
        state: if info.leader.is_some() { v1::ElectionState::Elected } else { v1::ElectionState::Vacant }.into(),
        should_yield: info.should_yield,
        candidates: candidates.collect(),
        candidate_count: info.waiting,
        leader: info.leader.map(|leader| leading(view, &leader)),
    }
}

fn leading(view: &View<'_>, leader: &Leader) -> v1::ElectionLeader {
    let session = view.machine.session(leader.session);
    let (value, value_bytes) = text_or_bytes(&leader.value);
    v1::ElectionLeader {
        token: leader.token.0,
        session: leader.session.0,
        value,
        value_bytes,
        value_revision: leader.published.0,
        priority: leader.priority,
        led_ms: view.machine.stamp().0.saturating_sub(leader.since.0),
        remaining_ms: view.member.remaining_ms(leader.session, view.now).unwrap_or(0),
        session_name: session.as_ref().map_or_else(String::new, |session| session.name.to_string()),
        metadata: session.as_ref().map(metadata).unwrap_or_default(),
    }
}

fn waiting(view: &View<'_>, candidate: &Candidate, position: u64) -> v1::ElectionCandidate {
    let now = view.machine.stamp();
    let session = view.machine.session(candidate.session);
    v1::ElectionCandidate {
        position,
        session: candidate.session.0,
        priority: candidate.priority,
        waited_ms: now.0.saturating_sub(candidate.since.0),
        wait_left_ms: candidate.deadline.map_or(0, |deadline| deadline.0.saturating_sub(now.0)),
        session_name: session.map_or_else(String::new, |session| session.name.to_string()),
    }
}

// ---- Observing ----

async fn observe(context: Context, _: Call, mut incoming: Incoming, outgoing: Outgoing) -> Result<(), Status> {
    let Some(message) = incoming.next().await else { return Err(Status::invalid_argument("no request came")) };
    let request: v1::ObserveRequest = decoded(message?).map_err(refusal)?;
    let namespace = namespace(&request.namespace).map_err(refusal)?;
    let _place = context.stream_place().map_err(refusal)?;
    let observer = Observer { context, namespace, name: name(&request.name).map_err(refusal)? };
    tokio::select! {
        ended = observer.run(&outgoing) => ended,
        () = outgoing.closed() => Err(cancelled()),
    }
}

struct Observer {
    context: Context,
    namespace: NamespaceId,
    name: Box<[u8]>,
}

impl Observer {
    /// The present state by a read index, then every one that differs, as this member comes to know it.
    async fn run(&self, outgoing: &Outgoing) -> Result<(), Status> {
        let mut last: Option<v1::Election> = None;
        loop {
            let reply = self.look(last.is_some()).await?;
            let mut follower = self.follower(reply.header.as_ref().map_or(0, |header| header.revision));
            self.tell(reply, &mut last, outgoing).await?;
            // What a follower lacks because it is no longer kept is in the state: look at that, and follow on from there.
            while !matches!(follower.next().await.map_err(|failure| failed(&failure))?, Followed::Gone(_)) {
                let reply = self.look(true).await?;
                self.tell(reply, &mut last, outgoing).await?;
            }
        }
    }

    fn follower(&self, after: u64) -> Follower {
        let span = things(self.namespace, Election::KIND, &self.name, false);
        Follower::new(&self.context.handle, span, Revision(after + 1), LOOK_AGAIN)
    }

    async fn look(&self, stale: bool) -> Result<v1::ObserveReply, Status> {
        loop {
            let (namespace, name) = (self.namespace, self.name.clone());
            let look = move |view: &View<'_>| v1::ObserveReply {
                header: seen(view, false),
                election: Some(shown(view, view.machine.election(namespace, &name, 0))),
            };
            match self.context.query(stale, look).await {
                Ok(reply) => return Ok(reply),
                // An observer that is told already can wait for room; a new one hears of it.
                Err(Failure::Overloaded) if stale => tokio::time::sleep(LOOK_LATER).await,
                Err(failure) => return Err(failed(&failure)),
            }
        }
    }

    async fn tell(
        &self,
        reply: v1::ObserveReply,
        last: &mut Option<v1::Election>,
        outgoing: &Outgoing,
    ) -> Result<(), Status> {
        let election = reply.election.clone().unwrap_or_default();
        if last.as_ref().is_some_and(|last| is_same(last, &election)) {
            return Ok(());
        }
        *last = Some(election);
        let mut frame = BytesMut::new();
        frame_message(&reply, &mut frame);
        outgoing.send_framed(frame.freeze()).await.map_err(|_| cancelled())
    }
}

/// Whether an observer would hear the same: times that pass and candidates that come and go are no news.
fn is_same(a: &v1::Election, b: &v1::Election) -> bool {
    let facts = |election: &v1::Election| {
        let leader = election.leader.as_ref();
        (leader.map(|leader| (leader.token, leader.value_revision)), election.should_yield)
    };
    facts(a) == facts(b)
}

fn cancelled() -> Status {
    Status::new(Code::Cancelled, "the caller no longer listens")
}

fn failed(failure: &Failure) -> Status {
    refusal(Box::new(words::native_failure(failure, Kind::Read)))
}
