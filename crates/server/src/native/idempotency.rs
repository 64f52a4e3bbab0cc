//! Native idempotency records: begin, heartbeat, checkpoint, complete, fail, reconcile, look, list.
//!
//! Promises. A body above the limit is cut here, before it is proposed: what is stored of it is its size and its digest, never a part of it.
//! Relies on. `machine::idempotency` for every decision and for the bounds, which are judged there and told here.

use sha2::{Digest, Sha256};
use tenure_machine::{
    AttemptBegin, AttemptCheckpoint, AttemptComplete, AttemptDecision, AttemptFail, AttemptGranted, AttemptHeartbeat,
    AttemptInFlight, AttemptPoint, AttemptReconcile, AttemptReplay, BadField, Fingerprint, IdempotencyOp,
    IdempotencyRecord, IdempotencyReply, IdempotencyState, LogTime, NotRetained, OpReply, PackedResult, RecordName,
    RecordState, ResultBody, Revision, StoredResult, Txn, idempotency_bounds as bounds,
};
use tenure_wire::tenure::v1;

use super::sessions::page_limit;
use super::{Caller, Refused, change, either, look, mixed_up, namespace, refuse, reply_of, seen, txn_of};
use crate::Context;
use crate::driver::View;
use crate::rpc::Router;
use crate::status as words;

/// What holds where a request leaves it open.
const ATTEMPT_TTL_MS: u64 = 60_000;
const RETENTION_MS: u64 = 24 * 60 * 60 * 1_000;
/// Records that one page of a list in some state looks at.
const SCANNED_MAX: usize = 5_000;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    change(router, context, "/tenure.v1.Idempotency/Begin", plan_begin, |_, request, changed| {
        let result = match reply_of(changed.reply)? {
            IdempotencyReply::Granted(granted) => v1::idempotency_begin_reply::Result::Granted(shown_grant(&granted)),
            IdempotencyReply::InFlight(flight) => v1::idempotency_begin_reply::Result::InFlight(shown_flight(&flight)),
            IdempotencyReply::Replay(replay) => v1::idempotency_begin_reply::Result::Replay(shown_replay(&replay)),
            _ => return Err(mixed_up()),
        };
        let warning = warning(&request.key).unwrap_or_default();
        Ok(v1::IdempotencyBeginReply { header: Some(changed.header), result: Some(result), warning })
    });
    change(router, context, "/tenure.v1.Idempotency/Heartbeat", plan_heartbeat, |_, _, changed| {
        let IdempotencyReply::Beating(attempt_ttl_ms) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::IdempotencyHeartbeatReply { header: Some(changed.header), attempt_ttl_ms })
    });
    change(router, context, "/tenure.v1.Idempotency/Checkpoint", plan_checkpoint, |_, _, changed| {
        let IdempotencyReply::Checkpointed(kept) = reply_of(changed.reply)? else { return Err(mixed_up()) };
        Ok(v1::IdempotencyCheckpointReply { header: Some(changed.header), kept })
    });
    change(router, context, "/tenure.v1.Idempotency/Complete", plan_complete, |_, request, changed| {
        let (kept_ms, not_retained) = (kept_ms(changed.reply)?, is_lost(request.result.as_ref()));
        Ok(v1::IdempotencyCompleteReply { header: Some(changed.header), kept_ms, not_retained })
    });
    change(router, context, "/tenure.v1.Idempotency/Fail", plan_fail, |_, request, changed| {
        let last = match &request.how {
            Some(v1::idempotency_fail_request::How::Final(result)) => Some(result),
            _ => None,
        };
        let (kept_ms, not_retained) = (kept_ms(changed.reply)?, is_lost(last));
        Ok(v1::IdempotencyFailReply { header: Some(changed.header), kept_ms, not_retained })
    });
    change(router, context, "/tenure.v1.Idempotency/Reconcile", plan_reconcile, |_, request, changed| {
        let result = match &request.decision {
            Some(v1::idempotency_reconcile_request::Decision::Complete(result)) => Some(result),
            _ => None,
        };
        let (kept_ms, not_retained) = (kept_ms(changed.reply)?, is_lost(result));
        Ok(v1::IdempotencyReconcileReply { header: Some(changed.header), kept_ms, not_retained })
    });
    look(router, context, "/tenure.v1.Idempotency/Get", |request| request.stale, get);
    look(router, context, "/tenure.v1.Idempotency/List", |request| request.stale, list);
}

fn plan_begin(_: &Context, caller: &Caller, request: &v1::IdempotencyBeginRequest) -> Result<Txn, Refused> {
    let op = begin_op(request)?;
    let mut txn = txn_of(&request.namespace, request.request.as_ref(), caller, op)?;
    // A caller that cannot ask again is not there any more when its deadline is over.
    if txn.request.is_none()
        && let Some(deadline) = caller.deadline
        && let Some(op) = txn.then.pop()
    {
        let left = deadline.saturating_duration_since(tokio::time::Instant::now()).as_millis() as u64;
        txn.then.push(with_wait(op, left));
    }
    Ok(txn)
}

fn with_wait(op: tenure_machine::Op, left_ms: u64) -> tenure_machine::Op {
    match op {
        tenure_machine::Op::Native(op) => match *op {
            tenure_machine::NativeOp::Idempotency(IdempotencyOp::Begin(begin)) => {
                let wait_ms = begin.wait_ms.min(left_ms);
                IdempotencyOp::Begin(AttemptBegin { wait_ms, ..begin }).into()
            }
            other => tenure_machine::Op::Native(Box::new(other)),
        },
        other => other,
    }
}

fn plan_heartbeat(_: &Context, caller: &Caller, request: &v1::IdempotencyHeartbeatRequest) -> Result<Txn, Refused> {
    txn_of(&request.namespace, request.request.as_ref(), caller, heartbeat_op(request)?)
}

fn plan_checkpoint(_: &Context, caller: &Caller, request: &v1::IdempotencyCheckpointRequest) -> Result<Txn, Refused> {
    txn_of(&request.namespace, request.request.as_ref(), caller, checkpoint_op(request)?)
}

fn plan_complete(_: &Context, caller: &Caller, request: &v1::IdempotencyCompleteRequest) -> Result<Txn, Refused> {
    txn_of(&request.namespace, request.request.as_ref(), caller, complete_op(request)?)
}

fn plan_fail(_: &Context, caller: &Caller, request: &v1::IdempotencyFailRequest) -> Result<Txn, Refused> {
    txn_of(&request.namespace, request.request.as_ref(), caller, fail_op(request)?)
}

fn plan_reconcile(_: &Context, caller: &Caller, request: &v1::IdempotencyReconcileRequest) -> Result<Txn, Refused> {
    txn_of(&request.namespace, request.request.as_ref(), caller, reconcile_op(request)?)
}

/// The operation that a request means, alone or in a transaction.
pub(crate) fn begin_op(request: &v1::IdempotencyBeginRequest) -> Result<IdempotencyOp, Refused> {
    let fingerprints = request
        .fingerprint
        .iter()
        .chain(&request.older_fingerprints)
        .map(|print| Fingerprint { algorithm: print.algorithm.as_str().into(), digest: print.digest.as_ref().into() });
    if request.fingerprint.is_none() && !request.older_fingerprints.is_empty() {
        return Err(refuse("fingerprint", "a request with older fingerprints has one of its own"));
    }
    let or = |given: u64, default: u64| if given == 0 { default } else { given };
    checked(IdempotencyOp::Begin(AttemptBegin {
        name: RecordName::new(&request.scope, &request.key),
        fingerprints: fingerprints.collect(),
        lease_ms: or(request.attempt_ttl_ms, ATTEMPT_TTL_MS),
        retention_ms: or(request.retention_ms, RETENTION_MS),
        wait_ms: request.wait_ms,
        takeover: takeover(request.takeover)?.unwrap_or(true),
    }))
}

pub(crate) fn heartbeat_op(request: &v1::IdempotencyHeartbeatRequest) -> Result<IdempotencyOp, Refused> {
    checked(IdempotencyOp::Heartbeat(AttemptHeartbeat {
        name: RecordName::new(&request.scope, &request.key),
        attempt: attempt(request.attempt)?,
        lease_ms: request.attempt_ttl_ms,
        takeover: takeover(request.takeover)?,
    }))
}

pub(crate) fn checkpoint_op(request: &v1::IdempotencyCheckpointRequest) -> Result<IdempotencyOp, Refused> {
    let given = request.checkpoint.as_ref().ok_or_else(|| refuse("checkpoint", "say what to keep"))?;
    let data = either("checkpoint.data", &given.data, &given.data_bytes)?;
    checked(IdempotencyOp::Checkpoint(AttemptCheckpoint {
        name: RecordName::new(&request.scope, &request.key),
        attempt: attempt(request.attempt)?,
        checkpoint: AttemptPoint { name: given.name.as_str().into(), data: data.into() },
    }))
}

pub(crate) fn complete_op(request: &v1::IdempotencyCompleteRequest) -> Result<IdempotencyOp, Refused> {
    let nothing = v1::IdempotencyResult::default();
    checked(IdempotencyOp::Complete(AttemptComplete {
        name: RecordName::new(&request.scope, &request.key),
        attempt: attempt(request.attempt)?,
        result: packed("result", request.result.as_ref().unwrap_or(&nothing))?,
    }))
}

pub(crate) fn fail_op(request: &v1::IdempotencyFailRequest) -> Result<IdempotencyOp, Refused> {
    use v1::idempotency_fail_request::How;
    let last = match &request.how {
        Some(How::Final(result)) => Some(packed("final", result)?),
        Some(How::Retryable(true)) => None,
        Some(How::Retryable(false)) => return Err(refuse("retryable", "a failure for good has a `final` result")),
        None => return Err(refuse("how", "say `retryable`, or give the `final` result")),
    };
    let (name, attempt) = (RecordName::new(&request.scope, &request.key), attempt(request.attempt)?);
    checked(IdempotencyOp::Fail(AttemptFail { name, attempt, last }))
}

pub(crate) fn reconcile_op(request: &v1::IdempotencyReconcileRequest) -> Result<IdempotencyOp, Refused> {
    use v1::idempotency_reconcile_request::Decision;
    let decision = match &request.decision {
        Some(Decision::Complete(result)) => AttemptDecision::Complete(packed("complete", result)?),
        Some(Decision::Release(true)) => AttemptDecision::Release,
        Some(Decision::Discard(true)) => AttemptDecision::Discard,
        Some(Decision::Release(false) | Decision::Discard(false)) | None => {
            return Err(refuse("decision", "decide: `complete` with a result, `release`, or `discard`"));
        }
    };
    checked(IdempotencyOp::Reconcile(AttemptReconcile {
        name: RecordName::new(&request.scope, &request.key),
        attempt: Revision(request.attempt),
        decision,
    }))
}

fn checked(op: IdempotencyOp) -> Result<IdempotencyOp, Refused> {
    match op.check() {
        Ok(()) => Ok(op),
        Err(BadField(field, why)) => Err(refuse(field, why)),
    }
}

fn attempt(token: u64) -> Result<Revision, Refused> {
    if token == 0 { Err(refuse("attempt", "name the attempt by its token")) } else { Ok(Revision(token)) }
}

fn takeover(number: i32) -> Result<Option<bool>, Refused> {
    match v1::Takeover::try_from(number) {
        Ok(v1::Takeover::Default) => Ok(None),
        Ok(v1::Takeover::Allowed) => Ok(Some(true)),
        Ok(v1::Takeover::Never) => Ok(Some(false)),
        Err(_) => Err(refuse("takeover", "takeover is allowed or never")),
    }
}

fn packed(field: &str, result: &v1::IdempotencyResult) -> Result<PackedResult, Refused> {
    let given = either(&format!("{field}.body"), &result.body, &result.body_bytes)?;
    let body = match &result.not_retained {
        Some(_) if !given.is_empty() => {
            return Err(refuse(&format!("{field}.not_retained"), "a body is sent or it is not"));
        }
        Some(lost) => {
            let sha256 = <[u8; 32]>::try_from(lost.sha256.as_ref());
            let sha256 =
                sha256.map_err(|_| refuse(&format!("{field}.not_retained.sha256"), "a digest has 32 bytes"))?;
            ResultBody::NotRetained(NotRetained { size: lost.size, sha256 })
        }
        None if given.len() > bounds::BODY_BYTES => {
            let sha256 = Sha256::digest(given).into();
            ResultBody::NotRetained(NotRetained { size: given.len() as u64, sha256 })
        }
        None => ResultBody::Kept(given.into()),
    };
    let headers = result.headers.iter().map(|h| (h.name.as_str().into(), h.value.as_str().into())).collect();
    Ok(PackedResult::new(&StoredResult { status: result.status, headers, body }))
}

/// Whether what was given is kept as a note of itself.
fn is_lost(result: Option<&v1::IdempotencyResult>) -> bool {
    result.is_some_and(|r| r.not_retained.is_some() || r.body.len().max(r.body_bytes.len()) > bounds::BODY_BYTES)
}

fn kept_ms(reply: OpReply) -> Result<u64, Refused> {
    match reply_of(reply)? {
        IdempotencyReply::Finished(kept_ms) => Ok(kept_ms),
        IdempotencyReply::Released | IdempotencyReply::Discarded => Ok(0),
        _ => Err(mixed_up()),
    }
}

fn shown_grant(granted: &AttemptGranted) -> v1::IdempotencyGranted {
    v1::IdempotencyGranted {
        attempt: granted.attempt.0,
        attempt_no: granted.number,
        attempt_ttl_ms: granted.lease_ms,
        checkpoints: granted.checkpoints.iter().map(shown_checkpoint).collect(),
        more_checkpoints: granted.more,
    }
}

fn shown_flight(flight: &AttemptInFlight) -> v1::IdempotencyInFlight {
    v1::IdempotencyInFlight {
        attempt: flight.attempt.0,
        attempt_no: flight.number,
        running_ms: flight.running_ms,
        lease_left_ms: flight.lease_left_ms,
        retry_after_ms: flight.retry_after_ms,
    }
}

fn shown_replay(replay: &AttemptReplay) -> v1::IdempotencyReplay {
    v1::IdempotencyReplay {
        result: Some(shown_result(&replay.result)),
        failed: replay.failed,
        attempt: replay.attempt.0,
        attempt_no: replay.number,
        finished_ms: replay.finished_ms,
        first_seen_ms: replay.first_seen_ms,
        kept_ms: replay.kept_ms,
    }
}

fn shown_checkpoint(point: &AttemptPoint) -> v1::IdempotencyCheckpoint {
    let (data, data_bytes) = super::text_or_bytes(&point.data);
    v1::IdempotencyCheckpoint { name: point.name.to_string(), data, data_bytes }
}

fn shown_result(result: &PackedResult) -> v1::IdempotencyResult {
    let StoredResult { status, headers, body } = result.unpack();
    let headers = headers
        .into_iter()
        .map(|(name, value)| v1::IdempotencyHeader { name: name.into_string(), value: value.into_string() });
    let mut shown = v1::IdempotencyResult { status, headers: headers.collect(), ..Default::default() };
    match body {
        ResultBody::Kept(body) => (shown.body, shown.body_bytes) = super::text_or_bytes(&body),
        ResultBody::NotRetained(lost) => {
            let sha256 = lost.sha256.to_vec().into();
            shown.not_retained = Some(v1::IdempotencyBodyLost { size: lost.size, sha256 });
        }
    }
    shown
}

/// A key that somebody else may come to by accident is told of, and taken: whoever chose it may know better.
fn warning(key: &str) -> Option<String> {
    const BITS_MIN: f64 = 64.0;
    let mut seen = [false; 256];
    key.bytes().for_each(|b| seen[usize::from(b)] = true);
    let kinds = seen.iter().filter(|seen| **seen).count();
    let bits = key.len() as f64 * (kinds as f64).log2();
    (bits < BITS_MIN).then(|| "the key is short or regular: use a random one, such as a uuid".to_owned())
}

fn get(view: &View<'_>, request: &v1::IdempotencyGetRequest) -> Result<v1::IdempotencyGetReply, Refused> {
    let name = RecordName::new(&request.scope, &request.key);
    let record = view
        .machine
        .idempotency_record(namespace(&request.namespace)?, &name)
        .ok_or_else(|| Box::new(words::not_found("there is no such record", &[("name", request.key.clone())])))?;
    let mut shown = shown_record(name, record, view.machine.stamp());
    shown.checkpoints = record.checkpoints().iter().map(shown_checkpoint).collect();
    if let RecordState::Done(done) = &record.state {
        shown.result = Some(shown_result(&done.result));
    }
    Ok(v1::IdempotencyGetReply { header: seen(view, request.stale), record: Some(shown) })
}

fn shown_record(name: RecordName, record: &IdempotencyRecord, now: LogTime) -> v1::IdempotencyRecord {
    let (since, takeover) = match &record.state {
        RecordState::Open(open) if open.takeover => (open.began, v1::Takeover::Allowed),
        RecordState::Open(open) => (open.began, v1::Takeover::Never),
        RecordState::Done(done) => (done.at, v1::Takeover::Default),
    };
    v1::IdempotencyRecord {
        scope: name.scope.into_string(),
        key: name.key.into_string(),
        state: record.state_at(now).map_or("", IdempotencyState::name).to_owned(),
        attempt: record.attempt.0,
        attempt_no: record.number,
        first_seen_ms: now.0.saturating_sub(record.first.0),
        since_ms: now.0.saturating_sub(since.0),
        left_ms: record.left_ms(now),
        retention_ms: record.retention_ms,
        takeover: takeover.into(),
        fingerprint: record.fingerprint().map(|print| v1::Fingerprint {
            algorithm: print.algorithm.into_string(),
            digest: print.digest.into_vec().into(),
        }),
        checkpoint_count: record.checkpoints().len() as u32,
        checkpoints: Vec::new(),
        result: None,
    }
}

fn list(view: &View<'_>, request: &v1::IdempotencyListRequest) -> Result<v1::IdempotencyListReply, Refused> {
    let (namespace, max) = (namespace(&request.namespace)?, page_limit(request.limit)?);
    if request.all_scopes && !(request.prefix.is_empty() && request.scope.is_empty()) {
        return Err(refuse("all_scopes", "all scopes, or one scope and a prefix"));
    }
    let prefix =
        if request.all_scopes { Vec::new() } else { RecordName::new(&request.scope, &request.prefix).object_name() };
    let after = if request.after.is_empty() { None } else { Some(read_place(&request.after)?.object_name()) };
    let scanned_max = if request.state.is_empty() { max } else { SCANNED_MAX.max(max) };
    let now = view.machine.stamp();
    let (mut records, mut last, mut scanned) = (Vec::new(), None, 0);
    for (name, record) in view.machine.objects::<IdempotencyRecord>(namespace, &prefix, after.as_deref(), scanned_max) {
        if records.len() == max {
            scanned = scanned_max;
            break;
        }
        scanned += 1;
        let Some(name) = RecordName::of_object(&name) else { continue };
        last = Some(place(&name));
        let state = record.state_at(now).map(IdempotencyState::name);
        if state.is_some_and(|state| request.state.is_empty() || request.state == state) {
            records.push(shown_record(name, record, now));
        }
    }
    let next = last.filter(|_| scanned == scanned_max).unwrap_or_default();
    Ok(v1::IdempotencyListReply { header: seen(view, request.stale), records, next })
}

/// Where a list goes on: the length of the scope, the scope, the key.
fn place(name: &RecordName) -> String {
    format!("{}:{}{}", name.scope.len(), name.scope, name.key)
}

fn read_place(place: &str) -> Result<RecordName, Refused> {
    let parts = place.split_once(':').and_then(|(len, rest)| rest.split_at_checked(len.parse().ok()?));
    let (scope, key) = parts.ok_or_else(|| refuse("after", "it is the `next` of the page before"))?;
    Ok(RecordName::new(scope, key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back() {
        for name in [RecordName::new("", "k"), RecordName::new("alice 12:x", "7:k"), RecordName::new("ä", "b")] {
            assert_eq!(read_place(&place(&name)).unwrap(), name);
        }
        for wrong in ["k", "3:ab", "x:k", "1:ä"] {
            assert_eq!(read_place(wrong).unwrap_err().facts["field"], "after", "{wrong}");
        }
    }

    #[test]
    fn regular_keys_are_told_of() {
        for regular in ["1", "order-1", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"] {
            assert!(warning(regular).is_some(), "{regular}");
        }
        assert_eq!(warning("9b2f1c3a-5d1e-4b6f-8a44-2f3e9c7d0b11"), None);
    }

    #[test]
    fn a_large_body_leaves_its_size_and_digest() {
        let result = v1::IdempotencyResult { body: "x".repeat(bounds::BODY_BYTES + 1), ..Default::default() };
        assert!(is_lost(Some(&result)));
        let ResultBody::NotRetained(lost) = packed("result", &result).unwrap().unpack().body else { panic!() };
        assert_eq!((lost.size, lost.sha256), (262_145, Sha256::digest(result.body.as_bytes()).into()));
        let kept = v1::IdempotencyResult { body: "x".repeat(bounds::BODY_BYTES), ..Default::default() };
        assert!(!is_lost(Some(&kept)));
    }
}
