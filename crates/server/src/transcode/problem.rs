//! Refusals of the native JSON face: problem+json (RFC 9457) with the facts of `tenure.v1.Error`.

use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use serde_json::{Map, Value, json};
use tenure_wire::tenure::v1::{Error, Outcome};

use crate::front::{Body, full};
use crate::rpc::{Code, Status};

pub(super) fn problem_response(status: &Status) -> Response<Body> {
    problem_response_as(status, None)
}

/// With a status of HTTP itself, such as that of a wrong verb.
pub(super) fn problem_response_as(status: &Status, http: Option<StatusCode>) -> Response<Body> {
    let made;
    let error = match &status.problem {
        Some(error) => error.as_ref(),
        None => {
            made = plain_error(status);
            &made
        }
    };
    let http = http.unwrap_or_else(|| http_status(&error.code, status.code));
    let mut response = Response::new(full(problem(error, http).to_string()));
    *response.status_mut() = http;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    if let Some(seconds) = retry_after(error) {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// The body alone, for errors inside a stream of events.
pub(super) fn problem_json(status: &Status) -> Value {
    let error = status.problem.as_deref().cloned().unwrap_or_else(|| plain_error(status));
    let http = http_status(&error.code, status.code);
    problem(&error, http)
}

fn problem(error: &Error, http: StatusCode) -> Value {
    let mut members = Map::new();
    members.insert("type".into(), error.code.to_ascii_lowercase().replace('_', "-").into());
    members.insert("title".into(), title(&error.code).into());
    members.insert("status".into(), http.as_u16().into());
    members.insert("detail".into(), error.message.clone().into());
    members.insert("code".into(), error.code.clone().into());
    members.insert("retryable".into(), error.retryable.into());
    if let Some(outcome) = outcome(error) {
        members.insert("outcome".into(), outcome.into());
    }
    if error.retry_after_ms > 0 {
        members.insert("retry_after_ms".into(), error.retry_after_ms.to_string().into());
    }
    members.insert("facts".into(), json!(error.facts));
    if let Some(current) = &error.current {
        let kind = current_kind();
        let bytes = prost::Message::encode_to_vec(current);
        let text = kind.and_then(|kind| super::to_json(&kind, &bytes).ok()).map(|(text, _)| text);
        if let Some(value) = text.and_then(|text| serde_json::from_slice(&text).ok()) {
            members.insert("current".into(), value);
        }
    }
    Value::Object(members)
}

/// The descriptor of `tenure.v1.Record`, read once.
fn current_kind() -> Option<prost_reflect::MessageDescriptor> {
    static KIND: std::sync::OnceLock<Option<prost_reflect::MessageDescriptor>> = std::sync::OnceLock::new();
    KIND.get_or_init(|| {
        let pool = prost_reflect::DescriptorPool::decode(tenure_wire::DESCRIPTORS).ok()?;
        pool.get_message_by_name("tenure.v1.Record")
    })
    .clone()
}

/// As the status and outcome of every change are part of the answer, `none` is left out.
fn outcome(error: &Error) -> Option<&'static str> {
    match Outcome::try_from(error.outcome) {
        Ok(Outcome::NotApplied) => Some("not_applied"),
        Ok(Outcome::Unknown) => Some("unknown"),
        Ok(Outcome::Applied) => Some("applied"),
        Ok(Outcome::None) | Err(_) => None,
    }
}

/// A refusal that the front made itself, in the terms of the native face.
fn plain_error(status: &Status) -> Error {
    let (code, retryable) = match status.code {
        Code::NotFound => ("NOT_FOUND", false),
        Code::ResourceExhausted if status.message.contains("larger than max") => ("TOO_LARGE", false),
        Code::ResourceExhausted => ("RATE_LIMITED", true),
        Code::Unavailable => ("NO_QUORUM", true),
        Code::Unauthenticated => ("UNAUTHENTICATED", false),
        Code::PermissionDenied => ("DENIED", false),
        Code::Cancelled => ("CANCELLED", false),
        Code::DeadlineExceeded => ("TIMEOUT", true),
        Code::OutOfRange => ("COMPACTED", false),
        Code::Unimplemented => ("UNIMPLEMENTED", false),
        Code::Internal | Code::Unknown | Code::DataLoss => ("INTERNAL", false),
        _ => ("INVALID", false),
    };
    // Only what was refused before it ran is known to have had no effect.
    let outcome = match status.code {
        Code::DeadlineExceeded | Code::Cancelled | Code::Internal | Code::Unknown | Code::Unavailable => {
            Outcome::Unknown
        }
        _ => Outcome::NotApplied,
    };
    Error { code: code.into(), message: status.message.clone(), retryable, outcome: outcome.into(), ..Error::default() }
}

/// HTTP status by the table of `errors.proto`; an unknown code goes by its gRPC code.
fn http_status(code: &str, grpc: Code) -> StatusCode {
    match code {
        "CONFLICT" | "FENCED" => StatusCode::PRECONDITION_FAILED,
        "HELD"
        | "TIMEOUT_WAITING"
        | "DEADLOCK"
        | "IN_FLIGHT"
        | "NEEDS_RECONCILE"
        | "RESULT_NOT_RETAINED"
        | "DUPLICATE"
        | "CANCELLED" => StatusCode::CONFLICT,
        "SESSION_EXPIRED" | "COMPACTED" => StatusCode::GONE,
        "MISMATCH" => StatusCode::UNPROCESSABLE_ENTITY,
        "QUOTA" => StatusCode::INSUFFICIENT_STORAGE,
        "RATE_LIMITED" => StatusCode::TOO_MANY_REQUESTS,
        "NO_QUORUM" => StatusCode::SERVICE_UNAVAILABLE,
        "TOO_LARGE" => StatusCode::PAYLOAD_TOO_LARGE,
        "INVALID" => StatusCode::BAD_REQUEST,
        "UNAUTHENTICATED" => StatusCode::UNAUTHORIZED,
        "DENIED" => StatusCode::FORBIDDEN,
        "NOT_FOUND" => StatusCode::NOT_FOUND,
        _ => grpc.http(),
    }
}

/// Whole seconds, rounded up; at least one where the table promises the header.
fn retry_after(error: &Error) -> Option<u64> {
    let promised = matches!(error.code.as_str(), "HELD" | "TIMEOUT_WAITING" | "IN_FLIGHT" | "NO_QUORUM");
    (promised || error.retry_after_ms > 0).then(|| error.retry_after_ms.div_ceil(1000).max(1))
}

fn title(code: &str) -> &str {
    match code {
        "CONFLICT" => "The key is not as expected",
        "HELD" => "The lock is held",
        "TIMEOUT_WAITING" => "The wait ended without a grant",
        "DEADLOCK" => "Waiting would never end",
        "FENCED" => "The token is not the current one",
        "SESSION_EXPIRED" => "The session has ended",
        "IN_FLIGHT" => "The same request is still running",
        "MISMATCH" => "The request id was used for another request",
        "NEEDS_RECONCILE" => "A person or program must decide",
        "RESULT_NOT_RETAINED" => "It has run, and its result was too large to keep",
        "COMPACTED" => "The revision is no longer kept",
        "QUOTA" => "A quota is used up",
        "RATE_LIMITED" => "Too many requests",
        "NO_QUORUM" => "The service cannot decide now",
        "TOO_LARGE" => "The request is too large",
        "INVALID" => "The request is not valid",
        "UNAUTHENTICATED" => "Credentials are needed",
        "DENIED" => "Not permitted",
        "NOT_FOUND" => "Not found",
        "CANCELLED" => "Cancelled",
        "DUPLICATE" => "It has happened already",
        "TIMEOUT" => "The deadline has passed",
        "UNIMPLEMENTED" => "Not implemented",
        _ => "Refused",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_its_status_its_type_and_its_retry_after() {
        let table = include_str!("../../../../tests/errors.txt");
        for row in table.lines().filter(|line| !line.starts_with('#')) {
            let row: Vec<_> = row.split_whitespace().collect();
            let [code, _, http, later, kind, _, _] = row[..] else { panic!("a row of the table: {row:?}") };
            // As the rest of the server fills it in: status.rs has the other half of this test.
            let retry_after_ms = if later == "yes" { 500 } else { 0 };
            let error = Error { code: code.into(), retry_after_ms, ..Error::default() };
            let status = Status { problem: Some(Box::new(error.clone())), ..Status::internal("told by its problem") };
            let response = problem_response(&status);
            assert_eq!(response.status().as_str(), http, "{code}");
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), later == "yes", "{code}");
            let body = problem(&error, response.status());
            assert_eq!((&body["type"], &body["code"]), (&kind.into(), &code.into()));
            assert_ne!(body["title"], "Refused", "{code} has a title of its own");
        }
        // What a newer part of the service may say goes by its gRPC code.
        assert_eq!(http_status("SOMETHING_NEW", Code::Unknown).as_u16(), 500);
        // These are promised even where the refusal names no time.
        for code in ["HELD", "TIMEOUT_WAITING", "IN_FLIGHT", "NO_QUORUM"] {
            assert_eq!(retry_after(&Error { code: code.into(), ..Error::default() }), Some(1), "{code}");
        }
    }
}
