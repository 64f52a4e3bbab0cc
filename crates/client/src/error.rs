//! What can go wrong, and what is known about the outcome.
//!
//! A request that changes something ends in one of four ways: done, refused (nothing changed), not applied (nobody judged it,
//! nothing changed), or *unknown*: it was sent and no answer came, so it may have happened. Only the last one needs care, and it
//! is never told as one of the others. Repeating a call of this library after `Unknown` is a *new* request; to find out what
//! happened, read.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use prost::Message;
use tenure_wire::tenure::v1;

use crate::kv::Record;
use crate::lease::LostReason;

/// Why a call gave no result.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The server judged the request and said no. It changed nothing.
    #[error("{0}")]
    Refused(Box<Problem>),
    /// The request was sent and its answer never arrived: it may have happened or not, and it may still happen.
    #[error("no answer to `{request}`, its outcome is unknown: {why}")]
    Unknown {
        /// What was asked.
        request: &'static str,
        /// What was seen instead of an answer.
        why: String,
    },
    /// The request was certainly not carried out, though nobody judged it: no member could take it.
    #[error("`{request}` was not carried out: {why}")]
    NotApplied {
        /// What was asked.
        request: &'static str,
        /// What the servers said.
        why: String,
    },
    /// No endpoint could be reached, so the request was never sent.
    #[error("no server reached: {why}")]
    Unavailable {
        /// What happened at each endpoint.
        why: String,
    },
    /// The session under which this would have happened is lost; nothing was sent.
    #[error("the session is lost: {0}")]
    Lost(LostReason),
    /// The call itself makes no sense; nothing was sent.
    #[error("{0}")]
    Invalid(String),
    /// The server answered something that this client does not understand.
    #[error("unexpected answer: {0}")]
    Protocol(String),
}

/// What is known about a request that gave no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It changed nothing.
    NotApplied,
    /// It may have happened.
    Unknown,
    /// It did happen; only its answer is no longer kept.
    Applied,
}

impl Error {
    /// May the same call be made again with a chance of success?
    ///
    /// For [`Error::Unknown`] the answer is yes, but the second call may then be the second time that it happens.
    #[must_use]
    pub fn retryable(&self) -> bool {
        match self {
            Self::Refused(problem) => problem.retryable,
            Self::Unknown { .. } | Self::NotApplied { .. } | Self::Unavailable { .. } => true,
            Self::Lost(_) | Self::Invalid(_) | Self::Protocol(_) => false,
        }
    }

    /// Did anything change?
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Refused(problem) => problem.outcome,
            Self::Unknown { .. } | Self::Protocol(_) => Outcome::Unknown,
            _ => Outcome::NotApplied,
        }
    }

    /// The code of a refusal.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        self.problem().map(|problem| problem.code)
    }

    /// The refusal with its facts.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Refused(problem) => Some(problem),
            _ => None,
        }
    }
}

/// Why the server refused, with the facts that it decided on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Problem {
    /// What kind of refusal.
    pub code: Code,
    /// One sentence for people.
    pub message: String,
    /// May the same request succeed later?
    pub retryable: bool,
    /// What is known about the request: a refused replay may say `Unknown`.
    pub outcome: Outcome,
    /// When to try again, where the server knows.
    pub retry_after: Option<Duration>,
    /// Who holds the lock in question now.
    pub holder: Option<Holder>,
    /// The token that the caller presented.
    pub presented: Option<u64>,
    /// The newest token of the lock, whether it is held or not.
    pub newest: Option<u64>,
    /// The lowest revision that can still be read.
    pub lowest_revision: Option<u64>,
    /// The key as it is now, for a conflict, so that the loser can merge without another read.
    pub current: Option<Record>,
    /// Every fact as the server named it.
    pub facts: BTreeMap<String, String>,
}

impl Problem {
    /// A fact that is a number.
    #[must_use]
    pub fn number(&self, fact: &str) -> Option<u64> {
        self.facts.get(fact).and_then(|text| text.parse().ok())
    }

    /// A refusal that this library makes up from a plain status, where the server attached no facts.
    fn plain(code: Code, message: &str) -> Self {
        Self { code, message: message.to_owned(), ..Self::default() }
    }
}

impl From<v1::Error> for Problem {
    fn from(error: v1::Error) -> Self {
        let outcome = match error.outcome() {
            v1::Outcome::None | v1::Outcome::NotApplied => Outcome::NotApplied,
            v1::Outcome::Unknown => Outcome::Unknown,
            v1::Outcome::Applied => Outcome::Applied,
        };
        let mut problem = Self {
            code: Code::from_name(&error.code),
            message: error.message,
            retryable: error.retryable,
            outcome,
            retry_after: (error.retry_after_ms > 0).then(|| Duration::from_millis(error.retry_after_ms)),
            current: error.current.map(Record::from),
            facts: error.facts,
            ..Self::default()
        };
        problem.presented = problem.number("presented");
        problem.newest = problem.number("newest");
        problem.lowest_revision = problem.number("compact_revision");
        problem.holder = problem.number("token").map(|token| Holder {
            token,
            session: problem.number("holder_session").unwrap_or_default(),
            owner: problem.facts.get("holder").cloned().unwrap_or_default(),
        });
        problem
    }
}

/// The body of the `grpc-status-details-bin` trailer.
#[derive(Clone, PartialEq, prost::Message)]
struct RpcStatus {
    #[prost(message, repeated, tag = "3")]
    details: Vec<AnyMessage>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AnyMessage {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// The refusal that a status carries in its details.
pub(crate) fn problem_of(status: &tonic::Status) -> Option<Problem> {
    let details = RpcStatus::decode(status.details()).ok()?.details;
    let ours = details.iter().find(|any| any.type_url.ends_with("/tenure.v1.Error"))?;
    v1::Error::decode(ours.value.as_slice()).ok().map(Problem::from)
}

/// What is not there is an answer of a read, not a failure.
pub(crate) fn found<T>(read: Result<Option<T>, Error>) -> Result<Option<T>, Error> {
    match read {
        Err(error) if error.code() == Some(Code::NotFound) => Ok(None),
        other => other,
    }
}

/// The error of a unary call that only reads, so that its outcome is never in doubt.
pub(crate) fn of_read(status: &tonic::Status) -> Error {
    if let Some(problem) = problem_of(status) {
        return Error::Refused(Box::new(problem));
    }
    // With a source it is not the server's word: the connection broke, or the stream was reset.
    if std::error::Error::source(status).is_some() {
        return Error::Unavailable { why: status.message().to_owned() };
    }
    let code = match status.code() {
        tonic::Code::Unavailable | tonic::Code::DeadlineExceeded => {
            return Error::Unavailable { why: status.message().to_owned() };
        }
        tonic::Code::NotFound => Code::NotFound,
        tonic::Code::OutOfRange => Code::Compacted,
        tonic::Code::InvalidArgument => Code::Invalid,
        tonic::Code::Unauthenticated => Code::Unauthenticated,
        tonic::Code::PermissionDenied => Code::Denied,
        tonic::Code::ResourceExhausted => Code::RateLimited,
        _ => return Error::Protocol(format!("{}: {}", status.code(), status.message())),
    };
    Error::Refused(Box::new(Problem::plain(code, status.message())))
}

impl Default for Outcome {
    /// Refusals change nothing unless they say so.
    fn default() -> Self {
        Self::NotApplied
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_empty() { write!(f, "{}", self.code) } else { f.write_str(&self.message) }
    }
}

/// Who holds a lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// The fencing token of the grant.
    pub token: u64,
    /// The session that holds it.
    pub session: u64,
    /// The owner as the holder named itself.
    pub owner: String,
}

/// The codes of refusals, as in the protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Code {
    /// A version or value was not the expected one.
    Conflict,
    /// The lock is held and the caller would not wait.
    Held,
    /// The wait for the lock ended without a grant.
    TimeoutWaiting,
    /// The wait was cancelled.
    Cancelled,
    /// Waiting would never end.
    Deadlock,
    /// The token is stale: a newer owner took over, or nobody holds the lock.
    Fenced,
    /// The session has ended.
    SessionExpired,
    /// The same work is being done by another right now.
    InFlight,
    /// The request id was first used for another request.
    Mismatch,
    /// An earlier attempt needs a decision first.
    NeedsReconcile,
    /// It happened already.
    Duplicate,
    /// It happened already, and its result was too large to be kept.
    ResultNotRetained,
    /// That revision is no longer kept.
    Compacted,
    /// The request is too large.
    TooLarge,
    /// A quota is used up.
    Quota,
    /// Too much at once; try later.
    RateLimited,
    /// No majority of the members can be reached.
    NoQuorum,
    /// Who are you?
    Unauthenticated,
    /// You may not.
    Denied,
    /// There is no such thing.
    NotFound,
    /// The request makes no sense.
    Invalid,
    /// A code that this version of the library does not know.
    #[default]
    Other,
}

impl Code {
    const NAMES: [(&'static str, Self); 21] = [
        ("CONFLICT", Self::Conflict),
        ("HELD", Self::Held),
        ("TIMEOUT_WAITING", Self::TimeoutWaiting),
        ("CANCELLED", Self::Cancelled),
        ("DEADLOCK", Self::Deadlock),
        ("FENCED", Self::Fenced),
        ("SESSION_EXPIRED", Self::SessionExpired),
        ("IN_FLIGHT", Self::InFlight),
        ("MISMATCH", Self::Mismatch),
        ("NEEDS_RECONCILE", Self::NeedsReconcile),
        ("DUPLICATE", Self::Duplicate),
        ("RESULT_NOT_RETAINED", Self::ResultNotRetained),
        ("COMPACTED", Self::Compacted),
        ("TOO_LARGE", Self::TooLarge),
        ("QUOTA", Self::Quota),
        ("RATE_LIMITED", Self::RateLimited),
        ("NO_QUORUM", Self::NoQuorum),
        ("UNAUTHENTICATED", Self::Unauthenticated),
        ("DENIED", Self::Denied),
        ("NOT_FOUND", Self::NotFound),
        ("INVALID", Self::Invalid),
    ];

    /// The name on the wire, such as `FENCED`.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, code)| *code == self).map_or("OTHER", |(name, _)| name)
    }

    /// The code of a name.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        Self::NAMES.iter().find(|(known, _)| *known == name).map_or(Self::Other, |(_, code)| *code)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_name_of_its_own() {
        for (name, code) in Code::NAMES {
            assert_eq!((code.name(), Code::from_name(name)), (name, code));
        }
        assert_eq!(Code::from_name("SOMETHING_NEW"), Code::Other);
        let table = include_str!("../../../tests/errors.txt");
        for code in table.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(' ').next()) {
            assert_ne!(Code::from_name(code), Code::Other, "{code}");
        }
    }

    #[test]
    fn a_broken_connection_is_no_word_of_the_server() {
        for code in [tonic::Code::Unknown, tonic::Code::Internal, tonic::Code::Cancelled] {
            let mut status = tonic::Status::new(code, "transport error");
            assert!(matches!(of_read(&status), Error::Protocol(_)), "{code:?}");
            status.set_source(std::sync::Arc::new(std::io::Error::other("reset")));
            assert!(matches!(of_read(&status), Error::Unavailable { .. }), "{code:?}");
        }
    }

    #[test]
    fn only_what_was_sent_and_not_answered_is_unknown() {
        let unknown = Error::Unknown { request: "put", why: "connection closed".into() };
        assert_eq!((unknown.outcome(), unknown.retryable()), (Outcome::Unknown, true));
        let unavailable = Error::Unavailable { why: "refused".into() };
        assert_eq!((unavailable.outcome(), unavailable.retryable()), (Outcome::NotApplied, true));
        let fenced = Error::Refused(Box::new(Problem { code: Code::Fenced, ..Problem::default() }));
        assert_eq!(
            (fenced.outcome(), fenced.retryable(), fenced.code()),
            (Outcome::NotApplied, false, Some(Code::Fenced))
        );
    }
}
