//! The native face: sessions, locks, keys, members, status and the pipeline of `tenure.v1`.
//!
//! Promises. N1: a call means the same alone and in a pipeline: one function turns a request into a [`Plan`], one turns what came back
//! into the answer. N2: nothing is filled in that a caller did not ask for; what contradicts itself is INVALID with the field's name.
//! N3: what the server draws for a call with a request id follows from that id, so that a retry is the same request.
//! Relies on. The state machine for every decision; here requests are only read and answers written.

mod configs;
mod counters;
mod elections;
mod idempotency;
pub(crate) mod kv;
pub(crate) mod locks;
mod markers;
pub(crate) mod members;
mod queues;
mod registry;
mod reservations;
mod schedules;
pub(crate) mod sessions;
mod shown;
mod snapshots;
pub(crate) mod status;
pub(crate) mod stream;
mod txns;
mod watches;

use std::pin::Pin;

use bytes::Bytes;
use prost::Message;
use tenure_machine::{
    Key, Machine, NamespaceId, Op, OpReply, Range, RangeReply, Record, Rejection, RequestId, Revision, SessionId,
    Space, Txn, TxnReply,
};
use tenure_wire::Spaced;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::reply::Result as Answer;

use crate::Context;
use crate::driver::{ReadReply, RenewReplies, SessionRef, View, WriteReply};
use crate::etcd::encode::Contact;
use crate::rpc::{Call, Face, Router, Status};
use crate::status as words;
use crate::status::Kind;

/// What to do for a call.
pub(crate) enum Plan {
    Write(Txn, Finish),
    Read(NativeRead, Stale, Finish),
    Renew(Vec<SessionRef>, Finish),
    /// It must look at the state before it is known.
    Look(Looking),
}

/// What looks at the state, and plans by what it saw.
pub(crate) type Looking = Pin<Box<dyn Future<Output = Result<Plan, Refused>> + Send>>;

/// Whether a read may be of this member alone.
pub(crate) type Stale = bool;

/// A read of the driver's hot path.
pub(crate) enum NativeRead {
    Get(Key),
    Range(Box<Range>),
}

pub(crate) enum ReadOut {
    Record(Option<Record>),
    Range(RangeReply),
}

impl NativeRead {
    pub(crate) fn run(&self, machine: &Machine) -> Result<ReadOut, Rejection> {
        match self {
            Self::Get(key) => Ok(ReadOut::Record(machine.get(key).cloned())),
            Self::Range(range) => machine.range(range).map(ReadOut::Range),
        }
    }
}

/// What came back for a plan.
pub(crate) enum Outcome {
    Write(WriteReply),
    Read(ReadReply<ReadOut>),
    Renew(RenewReplies),
}

/// How the answer is made from what came back. Boxed where it is rare, since one waits in the driver per open call.
pub(crate) enum Finish {
    Get(Box<[u8]>),
    Put,
    Delete,
    Range(Box<kv::Page>),
    Txn,
    Acquire(Box<locks::Acquired>),
    Release,
    Cancel(Box<locks::Cancel>),
    SessionCreate,
    SessionRenew(Box<[u64]>),
    SessionEnd,
    /// Of a change that is mounted by `change`.
    Native(NativeFinish),
    /// Of a transaction over all primitives.
    Txns(txns::TxnsFinish),
}

/// What the state machine answered to a change, for whoever writes the answer.
pub(crate) struct Changed {
    /// Complete.
    pub(crate) header: v1::Header,
    /// Of the only operation.
    pub(crate) reply: OpReply,
    /// What is left of a session that it made or holds something under.
    pub(crate) remaining_ms: u64,
}

pub(crate) type NativeFinish = Box<dyn FnOnce(&Context, Changed) -> Result<Bytes, Refused> + Send>;

/// How changes that are mounted by `change` are planned, by path.
pub(crate) type Plans = std::collections::HashMap<&'static str, PlanFn>;
pub(crate) type PlanFn = std::sync::Arc<dyn Fn(&Context, &Caller, Bytes) -> Result<Plan, Refused> + Send + Sync>;

/// Mounts a change of one operation: alone, as JSON, and on the pipeline. `plan` reads the request, `answer` writes what came of it.
pub(crate) fn change<Q, A, P, F>(router: &mut Router, context: &Context, path: &'static str, plan: P, answer: F)
where
    Q: Message + Default + Spaced + 'static,
    A: Message + 'static,
    P: Fn(&Context, &Caller, &Q) -> Result<Txn, Refused> + Send + Sync + 'static,
    F: Fn(&Context, &Q, Changed) -> Result<A, Refused> + Copy + Send + Sync + 'static,
{
    let planned: PlanFn = std::sync::Arc::new(move |context, caller, message| {
        let request = decoded(message)?;
        let txn = plan(context, caller, &request)?;
        let finish: NativeFinish =
            Box::new(move |context, changed| Ok(answer(context, &request, changed)?.encode_to_vec().into()));
        Ok(Plan::Write(txn, Finish::Native(finish)))
    });
    mount_planned(router, context, path, planned);
}

/// Mounts a change alone, as JSON, and on the pipeline.
fn mount_planned(router: &mut Router, context: &Context, path: &'static str, planned: PlanFn) {
    router.plans.insert(path, planned.clone());
    mount_plan(router, context, path, planned);
}

/// Mounts a call of which there is a plan already.
fn mount_plan(router: &mut Router, context: &Context, path: &'static str, planned: PlanFn) {
    let context = context.clone();
    router.unary(path, move |call, message| {
        let (context, planned) = (context.clone(), planned.clone());
        async move {
            check_size(&context, message.len())?;
            let plan = planned(&context, &Caller::of(&call), message).map_err(refusal)?;
            run(&context, plan).await
        }
    });
}

/// The message of any call, whose namespace is looked at before anything else of it.
pub(crate) fn decoded<Q: Message + Default + Spaced>(message: Bytes) -> Result<Q, Refused> {
    let request = Q::decode(message).map_err(|error| refuse("body", error.to_string()))?;
    namespace(request.namespace())?;
    Ok(request)
}

/// Mounts a read on the driver's thread, linearizable unless the request says otherwise.
pub(crate) fn look<Q, A, F>(
    router: &mut Router,
    context: &Context,
    path: &'static str,
    is_stale: fn(&Q) -> bool,
    read: F,
) where
    Q: Message + Default + Spaced + 'static,
    A: Message + 'static,
    F: Fn(&View<'_>, &Q) -> Result<A, Refused> + Copy + Send + Sync + 'static,
{
    sessions::native_unary(router, context, path, move |context, request: Q| async move {
        let stale = is_stale(&request);
        sessions::query(&context, stale, move |view| read(view, &request)).await?
    });
}

pub(crate) type Refused = Box<v1::Error>;

/// What is known of a caller beside its message.
#[derive(Clone, Default)]
pub(crate) struct Caller {
    /// `Idempotency-Key` of a call over HTTP.
    pub(crate) idempotency_key: Option<String>,
    pub(crate) deadline: Option<tokio::time::Instant>,
}

impl Caller {
    fn of(call: &Call) -> Self {
        let key = if call.face == Face::NativeJson { call.metadata.get("idempotency-key") } else { None };
        let key = key.and_then(|value| value.to_str().ok()).map(|key| crate::transcode::unquoted(key).to_owned());
        Self { idempotency_key: key, deadline: call.deadline }
    }
}

pub(crate) fn mount(router: &mut Router, context: &Context) {
    configs::mount(router, context);
    counters::mount(router, context);
    elections::mount(router, context);
    idempotency::mount(router, context);
    kv::mount(router, context);
    locks::mount(router, context);
    markers::mount(router, context);
    members::mount(router, context);
    queues::mount(router, context);
    registry::mount(router, context);
    reservations::mount(router, context);
    schedules::mount(router, context);
    sessions::mount(router, context);
    snapshots::mount(router, context);
    status::mount(router, context);
    watches::mount(router, context);
    // Last: they take the plans of all the others.
    txns::mount(router, context);
    stream::mount(router, context);
}

/// Mounts a call that is planned, run and finished.
pub(crate) fn planned<Q, F>(router: &mut Router, context: &Context, path: &'static str, plan: F)
where
    Q: Message + Default + Spaced + 'static,
    F: Fn(&Context, &Caller, Q) -> Result<Plan, Refused> + Copy + Send + Sync + 'static,
{
    let planned: PlanFn = std::sync::Arc::new(move |context, caller, message| plan(context, caller, decoded(message)?));
    mount_plan(router, context, path, planned);
}

pub(crate) fn check_size(context: &Context, len: usize) -> Result<(), Status> {
    let max = context.settings.max_request_bytes;
    if len > max { Err(refusal(Box::new(words::too_large(len, max)))) } else { Ok(()) }
}

pub(crate) fn refusal(error: Refused) -> Status {
    words::native_status(*error)
}

/// Runs a plan for a caller that waits for this one answer.
pub(crate) async fn run(context: &Context, plan: Plan) -> Result<Bytes, Status> {
    let contact = context.identity.contact();
    let is_stale = matches!(plan, Plan::Read(_, true, _));
    let (outcome, finish) = match plan {
        Plan::Write(txn, finish) => (Outcome::Write(context.write_held(txn).await), finish),
        Plan::Read(read, stale, finish) => (Outcome::Read(context.native_read(read, stale).await), finish),
        Plan::Renew(sessions, finish) => (Outcome::Renew(context.renew(sessions).await), finish),
        Plan::Look(look) => {
            let plan = look.await.map_err(refusal)?;
            return Box::pin(run(context, plan)).await;
        }
    };
    let mut answer = complete(context, finish, outcome).await.map_err(refusal)?;
    if let Answer::Unary(bytes) = answer {
        return Ok(bytes);
    }
    fill_header(context, &mut answer, is_stale.then_some(contact));
    Ok(encode_answer(&answer))
}

/// The answer, with whatever must still be asked for it.
pub(crate) async fn complete(context: &Context, finish: Finish, outcome: Outcome) -> Result<Answer, Refused> {
    match finish {
        Finish::Cancel(cancel) => locks::cancelled(context, *cancel, outcome).await,
        finish => finish.with(context, outcome),
    }
}

impl Finish {
    /// The answer from what came back. Headers hold only the revision and whether it is a repetition.
    pub(crate) fn with(self, context: &Context, outcome: Outcome) -> Result<Answer, Refused> {
        match (self, outcome) {
            (Self::SessionRenew(ids), Outcome::Renew(replies)) => {
                sessions::renewed(context, &ids, replies).map(Answer::SessionRenew)
            }
            (finish, Outcome::Read(reply)) => finish.with_read(context, reply),
            (finish, Outcome::Write(reply)) => finish.with_write(context, reply),
            (_, Outcome::Renew(_)) => Err(mixed_up()),
        }
    }

    fn with_read(self, context: &Context, reply: ReadReply<ReadOut>) -> Result<Answer, Refused> {
        let (result, revision) = reply.map_err(|failure| words::native_failure(&failure, Kind::Read))?;
        let found =
            result.map_err(|rejection| words::native_rejection(&rejection, Kind::Read, context.identity.stamp()))?;
        match (self, found) {
            (Self::Get(key), ReadOut::Record(record)) => kv::got(&key, record.as_ref(), revision).map(Answer::Get),
            (Self::Get(key), ReadOut::Range(range)) => kv::got(&key, range.records.first(), revision).map(Answer::Get),
            (Self::Range(page), ReadOut::Range(range)) => Ok(Answer::Range(page.answer(&range, revision))),
            _ => Err(mixed_up()),
        }
    }

    fn with_write(self, context: &Context, reply: WriteReply) -> Result<Answer, Refused> {
        let failed = |failure| {
            let kind = if matches!(self, Self::Get(_) | Self::Range(_)) { Kind::Read } else { Kind::Change };
            Box::new(words::native_failure(&failure, kind))
        };
        let written = reply.map_err(failed)?;
        let (reply, remaining_ms) = (written.reply, written.remaining_ms);
        let header = header(reply.revision, reply.replayed);
        let refused = |rejection| self.refused(context, rejection);
        let result = match reply.result {
            Ok(result) => result,
            Err(rejection) => return Err(refused(rejection)),
        };
        if let Self::Native(finish) = self {
            let mut header = header;
            identify(context, &mut header);
            let reply = result.results.into_iter().next().ok_or_else(mixed_up)?;
            if let OpReply::ResultNotRetained = reply {
                return Err(Box::new(words::not_retained()));
            }
            return finish(context, Changed { header, reply, remaining_ms }).map(Answer::Unary);
        }
        if let Self::Txns(finish) = self {
            if let [OpReply::ResultNotRetained] = result.results[..] {
                return Err(Box::new(words::not_retained()));
            }
            let mut header = header;
            identify(context, &mut header);
            return finish(context, header, result, remaining_ms).map(Answer::Unary);
        }
        let header = Some(header);
        if let Self::Txn = self {
            return kv::txn_answer(header, &result).map(Answer::Txn);
        }
        let TxnReply { succeeded, mut results } = result;
        let only = results.pop().ok_or_else(mixed_up)?;
        match (self, only) {
            (_, OpReply::ResultNotRetained) => Err(Box::new(words::not_retained())),
            (Self::Put | Self::Delete, OpReply::Range(range)) if !succeeded => {
                Err(Box::new(words::conflict(range.records.first().map(record))))
            }
            (Self::Put, OpReply::Put { prev }) => {
                Ok(Answer::Put(v1::PutReply { header, prev: prev.as_ref().map(record) }))
            }
            (Self::Delete, OpReply::Delete { deleted, prev }) => {
                Ok(Answer::Delete(v1::DeleteReply { header, deleted, prev: prev.iter().map(record).collect() }))
            }
            (Self::Acquire(acquired), OpReply::LockGranted(grant)) => {
                Ok(Answer::LockAcquire(acquired.answer(header, &grant, remaining_ms)))
            }
            (Self::Acquire(acquired), OpReply::Native(reply)) => {
                acquired.granted(context, header, &reply, remaining_ms)
            }
            (Self::Release, OpReply::LockReleased) => {
                Ok(Answer::LockRelease(v1::LockReleaseReply { header, depth: 0 }))
            }
            (Self::Release, OpReply::Native(reply)) => locks::released(header, &reply),
            (Self::SessionCreate, OpReply::SessionCreated { id, token, ttl_ms }) => {
                let answer =
                    v1::SessionCreateReply { header, id: id.0, token, ttl_ms, remaining_ms: remaining_ms.min(ttl_ms) };
                Ok(Answer::SessionCreate(answer))
            }
            (Self::SessionEnd, OpReply::SessionEnded) => Ok(Answer::SessionEnd(v1::SessionEndReply { header })),
            _ => Err(mixed_up()),
        }
    }

    fn refused(&self, context: &Context, rejection: Rejection) -> Refused {
        if let Self::Acquire(acquired) = self {
            acquired.clean_up(context, &rejection);
        }
        let mut error = words::native_rejection(&rejection, Kind::Change, context.identity.stamp());
        // What a session that is not there means depends on the call: for an owner it has ended.
        if error.code == "SESSION_EXPIRED" && error.facts.is_empty() {
            error.retryable = false;
        }
        Box::new(error)
    }
}

/// The state machine answered something else than what was asked: a bug here, told as a lost answer.
fn mixed_up() -> Refused {
    tracing::error!("the state machine answered another question");
    Box::new(words::native_failure(&crate::driver::Failure::Unknown, Kind::Change))
}

/// What a primitive answered to its one operation.
pub(crate) fn reply_of<R: TryFrom<OpReply>>(reply: OpReply) -> Result<R, Refused> {
    reply.try_into().map_err(|_| mixed_up())
}

/// A transaction of one operation, under the id of its request.
pub(crate) fn txn_of(
    space: &str,
    request: Option<&v1::RequestMeta>,
    caller: &Caller,
    op: impl Into<Op>,
) -> Result<Txn, Refused> {
    let mut txn = txn_under(space, None, op)?;
    txn.request = request_id(request, caller)?;
    Ok(txn)
}

/// The same under an id that is known already.
pub(crate) fn txn_under(space: &str, request: Option<RequestId>, op: impl Into<Op>) -> Result<Txn, Refused> {
    Ok(Txn { namespace: namespace(space)?, request, ..Txn::of(op.into()) })
}

/// Bytes for people.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(crate) fn header(revision: Revision, replayed: bool) -> v1::Header {
    v1::Header { revision: revision.0, replayed, ..v1::Header::default() }
}

/// Who answered, for a call of its own; a pipeline tells it once for many.
pub(crate) fn identify(context: &Context, header: &mut v1::Header) {
    header.cluster_id = context.identity.cluster();
    header.member_id = context.identity.member();
    header.raft_term = context.identity.term();
}

/// The whole header of an answer outside of any plan.
pub(crate) fn full_header(context: &Context, revision: Revision) -> Option<v1::Header> {
    let mut header = header(revision, false);
    identify(context, &mut header);
    Some(header)
}

/// The whole header of a read that is answered on the driver's thread; see `look`.
pub(crate) fn seen(view: &View<'_>, is_stale: bool) -> Option<v1::Header> {
    Some(v1::Header {
        revision: view.machine.revision().0,
        cluster_id: view.identity.cluster(),
        member_id: view.identity.member(),
        raft_term: view.identity.term(),
        replayed: false,
        stale_ms: if is_stale { view.identity.contact().age_ms() } else { 0 },
        ..v1::Header::default()
    })
}

fn fill_header(context: &Context, answer: &mut Answer, stale: Option<Contact>) {
    let header = match answer {
        Answer::Put(a) => &mut a.header,
        Answer::Get(a) => &mut a.header,
        Answer::Delete(a) => &mut a.header,
        Answer::Range(a) => &mut a.header,
        Answer::Txn(a) => &mut a.header,
        Answer::LockAcquire(a) => &mut a.header,
        Answer::LockRelease(a) => &mut a.header,
        Answer::LockCancel(a) => &mut a.header,
        Answer::SessionCreate(a) => &mut a.header,
        Answer::SessionRenew(a) => &mut a.header,
        Answer::SessionEnd(a) => &mut a.header,
        // The one is no answer, the other has its header.
        Answer::Error(_) | Answer::Unary(_) => return,
    };
    let header = header.get_or_insert_default();
    identify(context, header);
    if let Some(contact) = stale {
        header.stale_ms = contact.age_ms();
    }
}

fn encode_answer(answer: &Answer) -> Bytes {
    match answer {
        Answer::Put(a) => a.encode_to_vec(),
        Answer::Get(a) => a.encode_to_vec(),
        Answer::Delete(a) => a.encode_to_vec(),
        Answer::Range(a) => a.encode_to_vec(),
        Answer::Txn(a) => a.encode_to_vec(),
        Answer::LockAcquire(a) => a.encode_to_vec(),
        Answer::LockRelease(a) => a.encode_to_vec(),
        Answer::LockCancel(a) => a.encode_to_vec(),
        Answer::SessionCreate(a) => a.encode_to_vec(),
        Answer::SessionRenew(a) => a.encode_to_vec(),
        Answer::SessionEnd(a) => a.encode_to_vec(),
        Answer::Error(a) => a.encode_to_vec(),
        Answer::Unary(a) => a.to_vec(),
    }
    .into()
}

/// The one namespace that exists. Others are refused by name rather than mapped to it.
pub(crate) fn namespace(name: &str) -> Result<NamespaceId, Refused> {
    match name {
        "" | "default" => Ok(NamespaceId::DEFAULT),
        other => Err(Box::new(words::not_found("there is no such namespace", &[("name", other.to_owned())]))),
    }
}

pub(crate) fn refuse(field: &str, why: impl Into<String>) -> Refused {
    Box::new(words::invalid(field, why))
}

/// One of two fields that mean the same thing.
pub(crate) fn either<'a>(field: &str, text: &'a str, bytes: &'a [u8]) -> Result<&'a [u8], Refused> {
    match (text.is_empty(), bytes.is_empty()) {
        (false, false) => Err(refuse(field, format!("`{field}` and `{field}_bytes` are both given"))),
        (true, _) => Ok(bytes),
        (false, true) => Ok(text.as_bytes()),
    }
}

pub(crate) fn key(namespace: NamespaceId, name: &[u8]) -> Key {
    Key::new(Space::Keys, namespace, name)
}

/// The request id, from the message or from the header of a call over HTTP.
pub(crate) fn request_id(meta: Option<&v1::RequestMeta>, caller: &Caller) -> Result<Option<RequestId>, Refused> {
    use v1::request_meta::Id;
    let from_header = caller.idempotency_key.as_deref().map(uuid).transpose()?;
    let from_message = match meta.and_then(|meta| meta.id.as_ref()) {
        None => None,
        Some(Id::Uuid(text)) => Some(uuid(text)?),
        Some(Id::UuidBytes(bytes)) => {
            let uuid =
                <[u8; 16]>::try_from(&bytes[..]).map_err(|_| refuse("request.uuid_bytes", "a uuid has 16 bytes"))?;
            Some(RequestId::Uuid(uuid))
        }
        Some(Id::Session(at)) => {
            let session = session_id("request.session", at.session)?;
            Some(RequestId::Session { session, seq: at.seq, acked_below: at.acked_below })
        }
        Some(Id::Series(at)) => Some(RequestId::Series { series: at.series, seq: at.seq, acked_below: at.acked_below }),
    };
    match (from_message, from_header) {
        (Some(a), Some(b)) if a != b => Err(refuse("request", "the request id and `Idempotency-Key` differ")),
        (a, b) => Ok(a.or(b)),
    }
}

/// 32 hexadecimal digits, hyphens anywhere.
fn uuid(text: &str) -> Result<RequestId, Refused> {
    let wrong = || refuse("request.uuid", format!("`{text}` is not a uuid: 32 hexadecimal digits"));
    let mut uuid = [0u8; 16];
    let mut digits = 0;
    for byte in text.bytes().filter(|&byte| byte != b'-') {
        let value = char::from(byte).to_digit(16).ok_or_else(wrong)? as u8;
        let slot = uuid.get_mut(digits / 2).ok_or_else(wrong)?;
        *slot = *slot << 4 | value;
        digits += 1;
    }
    if digits == 32 { Ok(RequestId::Uuid(uuid)) } else { Err(wrong()) }
}

pub(crate) fn session_id(field: &str, id: u64) -> Result<SessionId, Refused> {
    if id >> 63 == 1 { Err(refuse(field, "a session id is below 2^63")) } else { Ok(SessionId(id)) }
}

/// A record as the native face shows it: text wherever the bytes are UTF-8.
pub(crate) fn record(record: &Record) -> v1::Record {
    let (meta, _, value) = record.parts();
    let (key, key_bytes) = text_or_bytes(record.name());
    let (value, value_bytes) = text_or_bytes(value);
    v1::Record {
        key,
        key_bytes,
        value,
        value_bytes,
        create_revision: meta.create_revision.0,
        mod_revision: meta.mod_revision.0,
        version: meta.version,
        session: meta.owner.0,
    }
}

pub(crate) fn text_or_bytes(bytes: &[u8]) -> (String, Bytes) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (text.to_owned(), Bytes::new()),
        Err(_) => (String::new(), Bytes::copy_from_slice(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids() {
        let expected = RequestId::Uuid([
            0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
        ]);
        assert_eq!(uuid("00112233-4455-6677-8899-AABBccddeeff").unwrap(), expected);
        for wrong in ["", "0011", "00112233445566778899aabbccddeeff0", "0011223344556677889zaabbccddeeff"] {
            assert_eq!(uuid(wrong).unwrap_err().code, "INVALID", "{wrong}");
        }
    }

    #[test]
    fn ids_may_be_told_twice_but_not_differ() {
        let caller = Caller { idempotency_key: Some("00112233445566778899aabbccddeeff".to_owned()), deadline: None };
        let meta = |text: &str| v1::RequestMeta { id: Some(v1::request_meta::Id::Uuid(text.to_owned())) };
        assert!(request_id(Some(&meta("00112233-4455-6677-8899-aabbccddeeff")), &caller).unwrap().is_some());
        assert!(request_id(None, &caller).unwrap().is_some());
        assert!(request_id(Some(&meta("10112233-4455-6677-8899-aabbccddeeff")), &caller).is_err());
    }
}
