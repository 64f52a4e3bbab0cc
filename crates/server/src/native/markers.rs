//! Native effect markers: once, claim, confirm, release, delete, look, list.
//!
//! Promises. Fields and text name the same marker, in any order: both become the canonical name here, before anything is proposed.

use std::collections::BTreeMap;

use bytes::Bytes;
use tenure_machine::{
    AlreadyDone, LogTime, MARKER_LEASE_MS, MARKER_RESULT_MAX, MARKER_RETENTION_MIN_MS, MARKER_TEXT_MAX, MarkOnce,
    Marked, Marker, MarkerClaim, MarkerConfirm, MarkerDelete, MarkerEvent, MarkerEventKind, MarkerOp, MarkerRelease,
    MarkerReply, MarkerState, OnDeath, OpReply, Revision, Txn, canonical_marker_name, marker_name,
};
use tenure_wire::tenure::v1;

use super::sessions::page_limit;
use super::{
    Caller, Changed, Refused, change, either, look, mixed_up, namespace, refuse, reply_of, seen, session_id,
    text_or_bytes, txn_of,
};
use crate::Context;
use crate::driver::View;
use crate::rpc::Router;
use crate::status as words;

/// What an asker who says nothing gets: 30 days.
const RETENTION_DEFAULT_MS: u64 = 30 * 24 * 3_600_000;
/// A hundred years; who wants more says for ever.
const RETENTION_MAX_MS: u64 = 36_525 * 24 * 3_600_000;
const LEASE_DEFAULT_MS: u64 = 60_000;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    change(router, context, "/tenure.v1.Markers/Once", plan_once, answer_once);
    change(router, context, "/tenure.v1.Markers/Claim", plan_claim, answer_claim);
    change(router, context, "/tenure.v1.Markers/Confirm", plan_confirm, |_, _: &v1::MarkerConfirmRequest, changed| {
        match reply_of(changed.reply)? {
            MarkerReply::Marked(_) => Ok(v1::MarkerConfirmReply { header: Some(changed.header) }),
            _ => Err(mixed_up()),
        }
    });
    change(router, context, "/tenure.v1.Markers/Release", plan_release, |_, _: &v1::MarkerReleaseRequest, changed| {
        match reply_of(changed.reply)? {
            MarkerReply::Released => Ok(v1::MarkerReleaseReply { header: Some(changed.header) }),
            _ => Err(mixed_up()),
        }
    });
    change(router, context, "/tenure.v1.Markers/Delete", plan_delete, |_, _: &v1::MarkerDeleteRequest, changed| {
        let MarkerReply::Deleted(deleted) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::MarkerDeleteReply { header: Some(changed.header), deleted })
    });
    look(router, context, "/tenure.v1.Markers/Get", |request| request.stale, get);
    look(router, context, "/tenure.v1.Markers/List", |request| request.stale, list);
}

/// The canonical name, from whichever form was given.
pub(crate) fn name(text: &str, fields: &BTreeMap<String, String>) -> Result<Box<str>, Refused> {
    match (text.is_empty(), fields.is_empty()) {
        (false, false) => Err(refuse("marker", "`marker` and `fields` are both given")),
        (true, true) => Err(refuse("marker", "name the marker, such as type=welcome,user=42")),
        (false, true) => canonical_marker_name(text).map_err(|why| refuse("marker", why)),
        (true, false) => marker_name(fields).map_err(|why| refuse("fields", why)),
    }
}

fn retention(ms: u64, forever: bool) -> Result<u64, Refused> {
    match (ms, forever) {
        (0, true) => Ok(0),
        (_, true) => Err(refuse("forever", "a retention and `forever` are both given")),
        (0, false) => Ok(RETENTION_DEFAULT_MS),
        (MARKER_RETENTION_MIN_MS..=RETENTION_MAX_MS, false) => Ok(ms),
        _ => {
            let why = format!("a marker is kept for {MARKER_RETENTION_MIN_MS} to {RETENTION_MAX_MS} ms, or for ever");
            Err(refuse("retention_ms", why))
        }
    }
}

fn short(field: &str, text: &str) -> Result<Box<str>, Refused> {
    if text.len() > MARKER_TEXT_MAX {
        return Err(refuse(field, format!("`{field}` has at most {MARKER_TEXT_MAX} bytes")));
    }
    Ok(text.into())
}

fn result(text: &str, bytes: &Bytes) -> Result<Box<[u8]>, Refused> {
    let result = either("result", text, bytes)?;
    if result.len() > MARKER_RESULT_MAX {
        return Err(refuse("result", format!("a result has at most {MARKER_RESULT_MAX} bytes")));
    }
    Ok(result.into())
}

/// What a request puts.
pub(crate) fn mark(request: &v1::MarkerOnceRequest) -> Result<MarkOnce, Refused> {
    Ok(MarkOnce {
        name: name(&request.marker, &request.fields)?,
        by: short("by", &request.by)?,
        retention_ms: retention(request.retention_ms, request.forever)?,
        result: result(&request.result, &request.result_bytes)?,
    })
}

fn plan_once(_: &Context, caller: &Caller, request: &v1::MarkerOnceRequest) -> Result<Txn, Refused> {
    txn_of(&request.namespace, request.request.as_ref(), caller, MarkerOp::Once(mark(request)?))
}

fn plan_claim(_: &Context, caller: &Caller, request: &v1::MarkerClaimRequest) -> Result<Txn, Refused> {
    let on_death = match v1::OnDeath::try_from(request.on_death) {
        Ok(v1::OnDeath::Ask) => OnDeath::Ask,
        Ok(v1::OnDeath::Retry) => OnDeath::Retry,
        Ok(v1::OnDeath::Skip) => OnDeath::Skip,
        Err(_) => return Err(refuse("on_death", "there is no such policy")),
    };
    let lease_ms = match (request.session, request.lease_ms) {
        (0, 0) => LEASE_DEFAULT_MS,
        (0, ms) if MARKER_LEASE_MS.contains(&ms) => ms,
        (_, 0) => 0,
        (0, _) => {
            let why = format!("the lease of a claim has {} to {} ms", MARKER_LEASE_MS.start(), MARKER_LEASE_MS.end());
            return Err(refuse("lease_ms", why));
        }
        _ => return Err(refuse("lease_ms", "a claim lives under a session or under a lease of its own, not both")),
    };
    let claim = MarkerClaim {
        name: name(&request.marker, &request.fields)?,
        by: short("by", &request.by)?,
        retention_ms: retention(request.retention_ms, request.forever)?,
        session: session_id("session", request.session)?,
        lease_ms,
        on_death,
    };
    txn_of(&request.namespace, request.request.as_ref(), caller, MarkerOp::Claim(claim))
}

fn plan_confirm(_: &Context, caller: &Caller, request: &v1::MarkerConfirmRequest) -> Result<Txn, Refused> {
    let confirm = MarkerConfirm {
        name: name(&request.marker, &request.fields)?,
        token: token(request.token)?,
        result: result(&request.result, &request.result_bytes)?,
    };
    txn_of(&request.namespace, request.request.as_ref(), caller, MarkerOp::Confirm(confirm))
}

fn plan_release(_: &Context, caller: &Caller, request: &v1::MarkerReleaseRequest) -> Result<Txn, Refused> {
    let release = MarkerRelease { name: name(&request.marker, &request.fields)?, token: token(request.token)? };
    txn_of(&request.namespace, request.request.as_ref(), caller, MarkerOp::Release(release))
}

fn plan_delete(_: &Context, caller: &Caller, request: &v1::MarkerDeleteRequest) -> Result<Txn, Refused> {
    let delete = MarkerDelete {
        name: name(&request.marker, &request.fields)?,
        token: Revision(request.token),
        reason: short("reason", &request.reason)?,
    };
    txn_of(&request.namespace, request.request.as_ref(), caller, MarkerOp::Delete(delete))
}

fn token(token: u64) -> Result<Revision, Refused> {
    if token == 0 { Err(refuse("token", "say under which token")) } else { Ok(Revision(token)) }
}

fn answer_once(
    context: &Context,
    request: &v1::MarkerOnceRequest,
    changed: Changed,
) -> Result<v1::MarkerOnceReply, Refused> {
    let (already_done, unconfirmed, marker) = told(context, request, changed.reply)?;
    Ok(v1::MarkerOnceReply { header: Some(changed.header), already_done, marker: Some(marker), unconfirmed })
}

/// Whether it was there, whether that is certain, and what it is.
pub(crate) fn told(
    context: &Context,
    request: &v1::MarkerOnceRequest,
    reply: OpReply,
) -> Result<(bool, bool, v1::Marker), Refused> {
    let name = name(&request.marker, &request.fields)?;
    let now = context.identity.stamp();
    match reply_of(reply)? {
        MarkerReply::Marked(marked) => {
            let result = either("result", &request.result, &request.result_bytes)?;
            Ok((false, false, put(name, &marked, &request.by, result, now)))
        }
        MarkerReply::AlreadyDone(done) => Ok((true, done.unconfirmed, done_before(name, &done, now))),
        _ => Err(mixed_up()),
    }
}

fn put(name: Box<str>, marked: &Marked, by: &str, result: &[u8], now: LogTime) -> v1::Marker {
    let (result, result_bytes) = text_or_bytes(result);
    v1::Marker {
        marker: name.into(),
        state: v1::MarkerState::Done.into(),
        token: marked.token.0,
        by: by.to_owned(),
        result,
        result_bytes,
        left_ms: left(marked.until, now),
        forever: marked.until.is_none(),
        ..Default::default()
    }
}

fn done_before(name: Box<str>, done: &AlreadyDone, now: LogTime) -> v1::Marker {
    let (result, result_bytes) = text_or_bytes(&done.result);
    let state = if done.unconfirmed { v1::MarkerState::Unconfirmed } else { v1::MarkerState::Done };
    v1::Marker {
        marker: name.into(),
        state: state.into(),
        token: done.token.0,
        by: done.by.to_string(),
        age_ms: now.0.saturating_sub(done.at.0),
        result,
        result_bytes,
        left_ms: left(done.until, now),
        forever: done.until.is_none(),
        ..Default::default()
    }
}

fn left(until: Option<LogTime>, now: LogTime) -> u64 {
    until.map_or(0, |until| until.0.saturating_sub(now.0))
}

fn answer_claim(
    context: &Context,
    request: &v1::MarkerClaimRequest,
    changed: Changed,
) -> Result<v1::MarkerClaimReply, Refused> {
    use v1::marker_claim_reply::Outcome;
    let (outcome, unconfirmed) = match reply_of(changed.reply)? {
        MarkerReply::Claimed(grant) => {
            let lease_ms = match (request.session, request.lease_ms) {
                (0, 0) => LEASE_DEFAULT_MS,
                (_, lease_ms) => lease_ms,
            };
            let (token, attempt, key) = (grant.token.0, grant.attempt, grant.key.to_string());
            (Outcome::Granted(v1::MarkerGrant { token, attempt, key, lease_ms }), false)
        }
        MarkerReply::AlreadyDone(done) => {
            let name = name(&request.marker, &request.fields)?;
            (Outcome::AlreadyDone(done_before(name, &done, context.identity.stamp())), done.unconfirmed)
        }
        _ => return Err(mixed_up()),
    };
    Ok(v1::MarkerClaimReply { header: Some(changed.header), outcome: Some(outcome), unconfirmed })
}

fn get(view: &View<'_>, request: &v1::MarkerGetRequest) -> Result<v1::MarkerGetReply, Refused> {
    let name = name(&request.marker, &BTreeMap::new())?;
    let namespace = namespace(&request.namespace)?;
    let found = match view.machine.object::<Marker>(namespace, name.as_bytes()) {
        Some(marker) if request.deleted || marker.state != MarkerState::Deleted => marker,
        _ => return Err(Box::new(words::not_found("there is no such marker", &[("name", name.into())]))),
    };
    let marker = Some(shown(name.into(), found, view.machine.stamp()));
    Ok(v1::MarkerGetReply { header: seen(view, request.stale), marker })
}

fn list(view: &View<'_>, request: &v1::MarkerListRequest) -> Result<v1::MarkerListReply, Refused> {
    let (namespace, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    let after = Some(request.after.as_bytes()).filter(|after| !after.is_empty());
    let page = view.machine.objects::<Marker>(namespace, request.prefix.as_bytes(), after, max);
    let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
    let next = page.last().filter(|_| page.len() == max).map_or_else(String::new, |(name, _)| text(name));
    let now = view.machine.stamp();
    let live = page.iter().filter(|(_, marker)| marker.state != MarkerState::Deleted);
    let markers = live.map(|(name, marker)| shown(text(name), marker, now)).collect();
    Ok(v1::MarkerListReply { header: seen(view, request.stale), markers, next })
}

fn shown(name: String, marker: &Marker, now: LogTime) -> v1::Marker {
    let (result, result_bytes) = text_or_bytes(&marker.result);
    let state = match marker.state {
        MarkerState::Claimed => v1::MarkerState::Claimed,
        MarkerState::Unconfirmed => v1::MarkerState::Unconfirmed,
        MarkerState::Done => v1::MarkerState::Done,
        MarkerState::Deleted => v1::MarkerState::Deleted,
    };
    let on_death = match marker.on_death {
        OnDeath::Ask => v1::OnDeath::Ask,
        OnDeath::Retry => v1::OnDeath::Retry,
        OnDeath::Skip => v1::OnDeath::Skip,
    };
    v1::Marker {
        marker: name,
        state: state.into(),
        token: marker.token.0,
        by: marker.by.to_string(),
        age_ms: now.0.saturating_sub(marker.at.0),
        attempt: marker.attempt,
        result,
        result_bytes,
        left_ms: left(marker.until, now),
        forever: marker.retention_ms == 0,
        session: marker.session.0,
        on_death: on_death.into(),
        events: marker.events.iter().map(|event| shown_event(event, now)).collect(),
    }
}

fn shown_event(event: &MarkerEvent, now: LogTime) -> v1::MarkerEvent {
    use v1::marker_event::Kind;
    let kind = match event.kind {
        MarkerEventKind::ClaimDied => Kind::ClaimDied,
        MarkerEventKind::TakenOver => Kind::TakenOver,
        MarkerEventKind::Released => Kind::Released,
        MarkerEventKind::Deleted => Kind::DeletedBy,
        MarkerEventKind::ConfirmedLate => Kind::ConfirmedLate,
    };
    v1::MarkerEvent {
        kind: kind.into(),
        age_ms: now.0.saturating_sub(event.at.0),
        token: event.token.0,
        by: event.by.to_string(),
        principal: event.principal.to_string(),
        reason: event.reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_named_in_one_way() {
        let fields = BTreeMap::from([("user".to_owned(), "42".to_owned()), ("type".to_owned(), "a,b".to_owned())]);
        assert_eq!(&*name("", &fields).unwrap(), "type=a%2Cb,user=42");
        assert_eq!(&*name("user=42,type=a%2cb", &BTreeMap::new()).unwrap(), "type=a%2Cb,user=42");
        for (text, fields) in [("a=1", fields), ("", BTreeMap::new()), ("plain", BTreeMap::new())] {
            assert_eq!(name(text, &fields).unwrap_err().facts["field"], "marker", "{text}");
        }
    }

    #[test]
    fn a_retention_is_in_its_range() {
        assert_eq!(retention(0, false).unwrap(), RETENTION_DEFAULT_MS);
        assert_eq!(retention(0, true).unwrap(), 0);
        assert_eq!(retention(MARKER_RETENTION_MIN_MS, false).unwrap(), MARKER_RETENTION_MIN_MS);
        assert!(retention(MARKER_RETENTION_MIN_MS - 1, false).is_err());
        assert!(retention(u64::MAX, false).is_err());
        assert!(retention(MARKER_RETENTION_MIN_MS, true).is_err());
    }
}
