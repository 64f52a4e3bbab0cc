//! The only place that turns refusals into words and codes: etcd's exact texts for its clients, facts for ours.
//!
//! Promises. T1: code and text of every etcd error are those of etcd 3.7, since clients compare both. T2: a native error carries the code of the
//! table in `errors.proto`, whether the call may be repeated, what is known of its effect, and the facts of the decision.
//! Relies on. Rejections are equal on every member, so a retry is told the same.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message as _;
use tenure_machine::{Holder, LogTime, RefusalCode, Rejection};
use tenure_replica::Refusal;
use tenure_wire::tenure::v1;

use crate::driver::Failure;
use crate::etcd::encode;
use crate::native::text;
use crate::rpc::{Code, Status};

/// An error of etcd: its code and its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EtcdError(pub(crate) Code, pub(crate) &'static str);

impl From<EtcdError> for Status {
    fn from(EtcdError(code, text): EtcdError) -> Self {
        Self::new(code, text)
    }
}

macro_rules! etcd_errors {
    ($($name:ident = $code:ident, $text:literal;)*) => {
        $(pub(crate) const $name: EtcdError = EtcdError(Code::$code, concat!("etcdserver: ", $text));)*
    };
}

etcd_errors! {
    EMPTY_KEY = InvalidArgument, "key is not provided";
    KEY_NOT_FOUND = InvalidArgument, "key not found";
    VALUE_PROVIDED = InvalidArgument, "value is provided";
    LEASE_PROVIDED = InvalidArgument, "lease is provided";
    TOO_MANY_OPS = InvalidArgument, "too many operations in txn request";
    DUPLICATE_KEY = InvalidArgument, "duplicate key given in txn request";
    INVALID_SORT_OPTION = InvalidArgument, "invalid sort option";
    COMPACTED = OutOfRange, "mvcc: required revision has been compacted";
    FUTURE_REVISION = OutOfRange, "mvcc: required revision is a future revision";
    NO_SPACE = ResourceExhausted, "mvcc: database space exceeded";
    LEASE_NOT_FOUND = NotFound, "requested lease not found";
    LEASE_EXISTS = FailedPrecondition, "lease already exists";
    LEASE_TTL_TOO_LARGE = OutOfRange, "too large lease TTL";
    MEMBER_BAD_URLS = InvalidArgument, "given member URLs are invalid";
    MEMBER_NOT_FOUND = NotFound, "member not found";
    MEMBER_NOT_LEARNER = FailedPrecondition, "can only promote a learner member";
    REQUEST_TOO_LARGE = InvalidArgument, "request is too large";
    TOO_MANY_REQUESTS = ResourceExhausted, "too many requests";
    ROOT_USER_NOT_EXIST = FailedPrecondition, "root user does not exist";
    USER_EMPTY = InvalidArgument, "user name is empty";
    USER_NOT_FOUND = FailedPrecondition, "user name not found";
    ROLE_EMPTY = InvalidArgument, "role name is empty";
    ROLE_NOT_FOUND = FailedPrecondition, "role name not found";
    AUTH_NOT_ENABLED = FailedPrecondition, "authentication is not enabled";
    NO_LEADER = Unavailable, "no leader";
    NOT_LEADER = FailedPrecondition, "not leader";
    STOPPED = Unavailable, "server stopped";
    TIMEOUT = Unavailable, "request timed out";
    BAD_LEADER_TRANSFEREE = FailedPrecondition, "bad leader transferee";
    WRONG_DOWNGRADE_VERSION_FORMAT = InvalidArgument, "wrong downgrade target version format";
    UNKNOWN_METHOD = Unknown, "unknown method";
}

/// A rejection as etcd would tell it. Those that etcd does not know are told in our words under a fitting code.
pub(crate) fn etcd_rejection(rejection: &Rejection) -> Status {
    let error = match rejection {
        Rejection::EmptyKey => EMPTY_KEY,
        Rejection::DuplicateKey => DUPLICATE_KEY,
        Rejection::TooManyOps { .. } => TOO_MANY_OPS,
        Rejection::KeyNotFound => KEY_NOT_FOUND,
        Rejection::Compacted { .. } => COMPACTED,
        Rejection::FutureRevision { .. } => FUTURE_REVISION,
        Rejection::SessionNotFound { .. } | Rejection::SessionExpired { .. } => LEASE_NOT_FOUND,
        Rejection::SessionExists { .. } => LEASE_EXISTS,
        Rejection::NotFound { what: "member", .. } | Rejection::MemberRemoved { .. } => MEMBER_NOT_FOUND,
        other => return Status::new(native_code(code_of(other)), format!("etcdserver: {other}")),
    };
    error.into()
}

/// A failure as etcd would tell it.
pub(crate) fn etcd_failure(failure: &Failure) -> Status {
    let error = match failure {
        Failure::Overloaded => TOO_MANY_REQUESTS,
        Failure::Unknown => TIMEOUT,
        Failure::Stopping => STOPPED,
        Failure::Refused(refusal) => match refusal {
            Refusal::Overloaded => TOO_MANY_REQUESTS,
            Refusal::NoQuorum => NO_LEADER,
            Refusal::Memory(_) | Refusal::DiskFull => NO_SPACE,
            Refusal::TooLarge { .. } => REQUEST_TOO_LARGE,
            // No call of etcd's needs more than the first version.
            Refusal::NotYet { .. } => UNKNOWN_METHOD,
            Refusal::Stopping => STOPPED,
        },
    };
    error.into()
}

/// Whether a call changes something, which decides what an error says of its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Change,
}

/// The stable code of a rejection.
fn code_of(rejection: &Rejection) -> &'static str {
    match rejection {
        Rejection::EmptyKey
        | Rejection::DuplicateKey
        | Rejection::TooManyOps { .. }
        | Rejection::FutureRevision { .. }
        | Rejection::SessionExists { .. }
        | Rejection::Invalid { .. }
        | Rejection::NotYet { .. } => "INVALID",
        Rejection::KeyNotFound | Rejection::NotFound { .. } => "NOT_FOUND",
        Rejection::Compacted { .. } => "COMPACTED",
        Rejection::SessionNotFound { .. } | Rejection::SessionExpired { .. } => "SESSION_EXPIRED",
        Rejection::Quota { .. } => "QUOTA",
        Rejection::RateLimited { .. } => "RATE_LIMITED",
        Rejection::Mismatch => "MISMATCH",
        Rejection::Held { .. } => "HELD",
        Rejection::TimeoutWaiting { .. } => "TIMEOUT_WAITING",
        Rejection::Cancelled { .. } => "CANCELLED",
        Rejection::Deadlock { .. } => "DEADLOCK",
        Rejection::Fenced { .. } => "FENCED",
        Rejection::MemberExists { .. } | Rejection::OtherStorage { .. } | Rejection::RolledBack { .. } => "CONFLICT",
        Rejection::MemberRemoved { .. } => "NOT_FOUND",
        Rejection::Refused(refusal) => code_of_refusal(refusal.code),
    }
}

fn code_of_refusal(code: RefusalCode) -> &'static str {
    match code {
        RefusalCode::Conflict => "CONFLICT",
        RefusalCode::Held => "HELD",
        RefusalCode::TimeoutWaiting => "TIMEOUT_WAITING",
        RefusalCode::Cancelled => "CANCELLED",
        RefusalCode::Deadlock => "DEADLOCK",
        RefusalCode::Fenced => "FENCED",
        RefusalCode::SessionExpired => "SESSION_EXPIRED",
        RefusalCode::InFlight => "IN_FLIGHT",
        RefusalCode::Mismatch => "MISMATCH",
        RefusalCode::NeedsReconcile => "NEEDS_RECONCILE",
        RefusalCode::Compacted => "COMPACTED",
        RefusalCode::TooLarge => "TOO_LARGE",
        RefusalCode::ResultNotRetained => "RESULT_NOT_RETAINED",
        RefusalCode::Quota => "QUOTA",
        RefusalCode::RateLimited => "RATE_LIMITED",
        RefusalCode::NotFound => "NOT_FOUND",
        RefusalCode::Invalid => "INVALID",
        RefusalCode::Duplicate => "DUPLICATE",
    }
}

/// The gRPC code of a stable code, as the table of `errors.proto` has it.
fn native_code(code: &str) -> Code {
    match code {
        "CONFLICT" | "FENCED" | "NEEDS_RECONCILE" | "RESULT_NOT_RETAINED" => Code::FailedPrecondition,
        "HELD" | "DEADLOCK" | "IN_FLIGHT" => Code::Aborted,
        "TIMEOUT_WAITING" => Code::DeadlineExceeded,
        "SESSION_EXPIRED" | "NOT_FOUND" => Code::NotFound,
        "COMPACTED" => Code::OutOfRange,
        "QUOTA" | "RATE_LIMITED" => Code::ResourceExhausted,
        "NO_QUORUM" => Code::Unavailable,
        "UNAUTHENTICATED" => Code::Unauthenticated,
        "DENIED" => Code::PermissionDenied,
        "CANCELLED" => Code::Cancelled,
        "DUPLICATE" => Code::AlreadyExists,
        _ => Code::InvalidArgument,
    }
}

/// Whether the same call may succeed later, and after how long it is worth trying.
fn retry(code: &str) -> (bool, u64) {
    match code {
        "HELD" | "TIMEOUT_WAITING" => (true, 500),
        "NO_QUORUM" | "RATE_LIMITED" | "IN_FLIGHT" => (true, 1000),
        "QUOTA" => (true, 5000),
        _ => (false, 0),
    }
}

fn error(code: &'static str, message: String, kind: Kind) -> v1::Error {
    let (retryable, retry_after_ms) = retry(code);
    let outcome = if kind == Kind::Change { v1::Outcome::NotApplied } else { v1::Outcome::None };
    v1::Error {
        code: code.to_owned(),
        message,
        retryable,
        outcome: outcome.into(),
        retry_after_ms,
        facts: BTreeMap::new(),
        current: None,
    }
}

fn fact(error: &mut v1::Error, name: &str, value: impl ToString) {
    error.facts.insert(name.to_owned(), value.to_string());
}

/// All places of what watches are taken.
pub(crate) fn too_many_streams(max: usize) -> v1::Error {
    let why = format!("this member has {max} open watches, streams and long polls together, which is all it may have");
    let mut e = error("RATE_LIMITED", why, Kind::Read);
    fact(&mut e, "limit", max);
    fact(&mut e, "flag", "--max-watch-streams");
    e
}

/// A rejection with its facts. `stamp` is the log time now, from which ages are told.
pub(crate) fn native_rejection(rejection: &Rejection, kind: Kind, stamp: LogTime) -> v1::Error {
    let mut e = error(code_of(rejection), rejection.to_string(), kind);
    match rejection {
        Rejection::EmptyKey => fact(&mut e, "field", "key"),
        Rejection::TooManyOps { max, .. } => {
            fact(&mut e, "limit", max);
            fact(&mut e, "flag", "--max-txn-ops");
        }
        Rejection::Compacted { lowest } => fact(&mut e, "compact_revision", lowest),
        Rejection::FutureRevision { current } => fact(&mut e, "revision", current),
        Rejection::SessionNotFound { session }
        | Rejection::SessionExists { session }
        | Rejection::SessionExpired { session } => fact(&mut e, "session", session),
        Rejection::Quota { limit, .. } | Rejection::RateLimited { limit, .. } => fact(&mut e, "limit", limit),
        Rejection::Held { name, holder, waiters } => {
            fact(&mut e, "name", text(name));
            fact(&mut e, "waiters", waiters);
            holder_facts(&mut e, holder, stamp);
        }
        Rejection::TimeoutWaiting { name, waited_ms, holder } => {
            fact(&mut e, "name", text(name));
            fact(&mut e, "waited_ms", waited_ms);
            holder.iter().for_each(|holder| holder_facts(&mut e, holder, stamp));
        }
        Rejection::Cancelled { name } => fact(&mut e, "name", text(name)),
        Rejection::Deadlock { name, holder } => {
            fact(&mut e, "name", text(name));
            holder_facts(&mut e, holder, stamp);
        }
        Rejection::Fenced { name, presented, newest, holder } => {
            fact(&mut e, "name", text(name));
            fact(&mut e, "presented", presented);
            fact(&mut e, "newest", newest);
            holder.iter().for_each(|holder| holder_facts(&mut e, holder, stamp));
        }
        Rejection::NotFound { name, .. } => fact(&mut e, "name", text(name)),
        Rejection::MemberExists { id, name, peer, .. } => {
            fact(&mut e, "member", format!("{:016x}", id.0));
            fact(&mut e, "name", name);
            fact(&mut e, "peer", peer);
        }
        Rejection::MemberRemoved { id } | Rejection::OtherStorage { id } => {
            fact(&mut e, "member", format!("{:016x}", id.0));
        }
        Rejection::RolledBack { id, boots, recorded } => {
            fact(&mut e, "member", format!("{:016x}", id.0));
            fact(&mut e, "boots", boots);
            fact(&mut e, "recorded", recorded);
        }
        Rejection::Refused(refusal) => {
            refusal.facts.iter().for_each(|(name, value)| fact(&mut e, name, value));
            if refusal.retry_after_ms > 0 {
                e.retry_after_ms = refusal.retry_after_ms;
            }
            if rejection.leaves_open() && kind == Kind::Change {
                e.outcome = v1::Outcome::Unknown.into();
            }
            if refusal.code == RefusalCode::ResultNotRetained {
                e.outcome = v1::Outcome::Applied.into();
                fact(&mut e, "result_not_retained", true);
            }
        }
        Rejection::DuplicateKey
        | Rejection::KeyNotFound
        | Rejection::Mismatch
        | Rejection::Invalid { .. }
        | Rejection::NotYet { .. } => {}
    }
    e
}

fn holder_facts(e: &mut v1::Error, holder: &Holder, stamp: LogTime) {
    fact(e, "token", holder.token);
    fact(e, "holder_session", holder.session);
    let owner = if holder.owner.is_empty() { holder.session.to_string() } else { text(&holder.owner) };
    fact(e, "holder", owner);
    fact(e, "since_ms", stamp.0.saturating_sub(holder.since.0));
}

/// A failure with its facts. Only a fate that nobody knows leaves the outcome of a change open.
pub(crate) fn native_failure(failure: &Failure, kind: Kind) -> v1::Error {
    match failure {
        Failure::Overloaded | Failure::Refused(Refusal::Overloaded) => {
            error("RATE_LIMITED", "the member has too many requests waiting, try later".to_owned(), kind)
        }
        Failure::Stopping | Failure::Refused(Refusal::Stopping) => {
            error("NO_QUORUM", "the member is stopping".to_owned(), kind)
        }
        Failure::Unknown => {
            let mut e = error("NO_QUORUM", "the answer was lost: the call may have happened or not".to_owned(), kind);
            if kind == Kind::Change {
                e.outcome = v1::Outcome::Unknown.into();
            }
            e
        }
        Failure::Refused(Refusal::NoQuorum) => {
            error("NO_QUORUM", "this member knows no leader with a majority".to_owned(), kind)
        }
        Failure::Refused(Refusal::Memory(overload)) => {
            let mut e = error("QUOTA", overload.to_string(), kind);
            fact(&mut e, "limit", overload.limit);
            fact(&mut e, "flag", "--memory-hard-limit");
            e
        }
        Failure::Refused(Refusal::DiskFull) => {
            let mut e =
                error("QUOTA", "the disk of this member is full; deleting and releasing still work".to_owned(), kind);
            fact(&mut e, "flag", "--disk-reserve");
            e
        }
        Failure::Refused(refusal @ Refusal::NotYet { .. }) => error("INVALID", refusal.to_string(), kind),
        Failure::Refused(refusal @ Refusal::TooLarge { .. }) => {
            let mut e = error("TOO_LARGE", refusal.to_string(), kind);
            fact(&mut e, "flag", "--max-request-bytes");
            e
        }
    }
}

/// A request that is wrong in itself.
pub(crate) fn invalid(field: &str, why: impl Into<String>) -> v1::Error {
    let mut e = error("INVALID", why.into(), Kind::Change);
    fact(&mut e, "field", field);
    e
}

/// A request above the size that this server takes.
pub(crate) fn too_large(len: usize, max: usize) -> v1::Error {
    let mut e = error("TOO_LARGE", format!("the request has {len} bytes, at most {max} are allowed"), Kind::Change);
    fact(&mut e, "limit", max);
    fact(&mut e, "flag", "--max-request-bytes");
    e
}

/// An answer above what one call gives.
pub(crate) fn too_many(why: String, limit: usize) -> v1::Error {
    let mut e = error("TOO_LARGE", why, Kind::Read);
    fact(&mut e, "limit", limit);
    e
}

/// There is no such thing; `facts` tell what was looked for and where.
pub(crate) fn not_found(what: &str, facts: &[(&str, String)]) -> v1::Error {
    let mut e = error("NOT_FOUND", what.to_owned(), Kind::Read);
    facts.iter().for_each(|(name, value)| fact(&mut e, name, value));
    e
}

/// The session is not live, or it is another incarnation.
pub(crate) fn session_expired(session: u64) -> v1::Error {
    let mut e = error("SESSION_EXPIRED", format!("session {session} has ended"), Kind::Change);
    fact(&mut e, "session", session);
    e
}

/// An expectation did not hold; `current` is the key as it is.
pub(crate) fn conflict(current: Option<v1::Record>) -> v1::Error {
    let message = match &current {
        Some(record) => format!(
            "the key is not as expected: it is at version {}, changed at {}",
            record.version, record.mod_revision
        ),
        None => "the key is not as expected: it is not there".to_owned(),
    };
    v1::Error { current, ..error("CONFLICT", message, Kind::Change) }
}

/// It happened, and its answer was too large to keep.
pub(crate) fn not_retained() -> v1::Error {
    let message = "the call has happened before, and its answer was too large to be kept".to_owned();
    let mut e = error("TOO_LARGE", message, Kind::Change);
    e.outcome = v1::Outcome::Applied.into();
    fact(&mut e, "result_not_retained", true);
    e
}

/// Several waits ended by a cancellation are told as one word.
pub(crate) fn nothing_to_cancel(name: &str) -> v1::Error {
    not_found("no such wait, and no such hold", &[("name", name.to_owned())])
}

/// A native error as the status of a whole call: code, sentence, and itself as the only detail.
pub(crate) fn native_status(error: v1::Error) -> Status {
    let code = native_code(&error.code);
    let details = details(code, &error);
    Status { code, message: error.message.clone(), details, problem: Some(Box::new(error)) }
}

/// An encoded `google.rpc.Status` with `error` packed into its details.
fn details(code: Code, error: &v1::Error) -> Bytes {
    let mut any = BytesMut::new();
    encode::put_bytes(&mut any, 1, b"type.googleapis.com/tenure.v1.Error");
    encode::put_bytes(&mut any, 2, &error.encode_to_vec());
    let mut status = BytesMut::with_capacity(any.len() + error.message.len() + 16);
    encode::put_number(&mut status, 1, u64::from(code.number()));
    encode::put_bytes(&mut status, 2, error.message.as_bytes());
    encode::put_message_head(&mut status, 3, any.len());
    status.put_slice(&any);
    status.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tenure_machine::{Revision, SessionId};

    #[test]
    fn etcd_texts() {
        let check = |rejection: Rejection, code: Code, text: &str| {
            let status = etcd_rejection(&rejection);
            assert_eq!((status.code, status.message.as_str()), (code, text));
        };
        check(
            Rejection::Compacted { lowest: Revision(9) },
            Code::OutOfRange,
            "etcdserver: mvcc: required revision has been compacted",
        );
        let session = SessionId(4);
        check(Rejection::SessionNotFound { session }, Code::NotFound, "etcdserver: requested lease not found");
        check(Rejection::DuplicateKey, Code::InvalidArgument, "etcdserver: duplicate key given in txn request");
    }

    #[test]
    fn a_refusal_explains() {
        let holder =
            Holder { token: Revision(12), session: SessionId(5), owner: b"me".as_slice().into(), since: LogTime(100) };
        let held = Rejection::Held { name: b"jobs".as_slice().into(), holder, waiters: 2 };
        let error = native_rejection(&held, Kind::Change, LogTime(350));
        assert_eq!(error.code, "HELD");
        assert!(error.retryable);
        assert_eq!(error.outcome, i32::from(v1::Outcome::NotApplied));
        let facts: Vec<_> = error.facts.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(facts.join(" "), "holder=me holder_session=5 name=jobs since_ms=250 token=12 waiters=2");
        let status = native_status(error);
        assert_eq!(status.code, Code::Aborted);
        assert!(!status.details.is_empty());
    }

    #[test]
    fn every_code_has_its_grpc_code_and_says_whether_to_try_again() {
        let table = include_str!("../../../tests/errors.txt");
        let rows = table.lines().filter(|line| !line.starts_with('#')).map(|line| line.split_whitespace().collect());
        let mut codes = Vec::new();
        for row in rows {
            let row: Vec<&'static str> = row;
            let [code, grpc, _, later, _, _, retryable] = row[..] else { panic!("a row of the table: {row:?}") };
            let error = error(code, String::new(), Kind::Change);
            assert_eq!(native_code(code).name(), grpc, "{code}");
            assert_eq!((error.retryable, error.retry_after_ms > 0), (retryable == "yes", later == "yes"), "{code}");
            codes.push(code);
        }
        // Whatever the state machine refuses with is in the table.
        let refusals = [
            RefusalCode::Conflict,
            RefusalCode::Held,
            RefusalCode::TimeoutWaiting,
            RefusalCode::Cancelled,
            RefusalCode::Deadlock,
            RefusalCode::Fenced,
            RefusalCode::SessionExpired,
            RefusalCode::InFlight,
            RefusalCode::Mismatch,
            RefusalCode::NeedsReconcile,
            RefusalCode::Compacted,
            RefusalCode::TooLarge,
            RefusalCode::Quota,
            RefusalCode::RateLimited,
            RefusalCode::NotFound,
            RefusalCode::Invalid,
            RefusalCode::Duplicate,
            RefusalCode::ResultNotRetained,
        ];
        for refusal in refusals {
            assert!(codes.contains(&code_of_refusal(refusal)), "{refusal:?}");
        }
        assert_eq!(codes.len(), 21);
    }

    #[test]
    fn only_a_lost_answer_is_unknown() {
        assert_eq!(native_failure(&Failure::Unknown, Kind::Change).outcome, i32::from(v1::Outcome::Unknown));
        assert_eq!(native_failure(&Failure::Overloaded, Kind::Change).outcome, i32::from(v1::Outcome::NotApplied));
        assert_eq!(native_failure(&Failure::Unknown, Kind::Read).outcome, i32::from(v1::Outcome::None));
    }
}
