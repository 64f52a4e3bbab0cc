//! Conditions of HTTP on the native face: `ETag`, `If-Match`, `If-None-Match`.
//!
//! Promises. C1: the tag of a key is its `mod_revision`, so it changes with every change and is never used again. C2: a condition on a change is its
//! `expect`, decided in the commit of the change. C3: a condition that a call cannot keep is refused, never passed over.
//! Not promised. Weak tags and lists of tags: a key has one strong tag.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode};
use prost_reflect::{DynamicMessage, Kind, ReflectMessage as _, Value};

use super::Rule;
use crate::front::{Body, full};
use crate::rpc::Status;

/// Reads the conditions of a change into its `expect`. Reads are compared with their answer.
pub(super) fn expect(message: &mut DynamicMessage, headers: &HeaderMap) -> Result<(), Status> {
    let fact = match (text(headers, &header::IF_MATCH)?, text(headers, &header::IF_NONE_MATCH)?) {
        (None, None) => return Ok(()),
        (Some(_), Some(_)) => return Err(Status::invalid_argument("If-Match and If-None-Match are both given")),
        (Some("*"), None) => ("absent", Value::Bool(false)),
        (Some(tag), None) => ("mod_revision", Value::U64(revision(tag)?)),
        (None, Some("*")) => ("absent", Value::Bool(true)),
        (None, Some(tag)) => {
            revision(tag)?;
            // Of a read: `is_known` looks at it. A change has no use for "unless it is this one".
            return match message.descriptor().get_field_by_name("request") {
                None => Ok(()),
                Some(_) => Err(Status::invalid_argument("a change takes `If-None-Match: *` only")),
            };
        }
    };
    let field = message.descriptor().get_field_by_name("expect");
    let field =
        field.filter(|field| matches!(field.kind(), Kind::Message(kind) if kind.full_name() == "tenure.v1.Expect"));
    let Some(field) = field else {
        return Err(Status::invalid_argument("this call takes no If-Match and no `If-None-Match: *`"));
    };
    if message.has_field(&field) {
        return Err(Status::invalid_argument("an expectation is given in the body and in a header"));
    }
    if let Value::Message(expect) = message.get_field_mut(&field) {
        expect.set_field_by_name(fact.0, fact.1);
    }
    Ok(())
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, Status> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let text = value.to_str().map_err(|_| Status::invalid_argument(format!("{name} is not text")))?;
    Ok(Some(text.trim()))
}

fn revision(tag: &str) -> Result<u64, Status> {
    let digits = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"'));
    let wrong =
        || Status::invalid_argument(format!("{tag} is no tag of a key: one revision in quotes, as `ETag` told it"));
    digits.and_then(|digits| digits.parse().ok()).ok_or_else(wrong)
}

/// The tag of what an answer tells: of the record it carries, or of the key that it has just written.
pub(super) fn etag(rule: &Rule, answer: &DynamicMessage) -> Option<String> {
    let number = |message: &str, field: &str| {
        let message = answer.get_field_by_name(message)?;
        message.as_message()?.get_field_by_name(field)?.as_u64().filter(|&number| number > 0)
    };
    let revision = match answer.descriptor().full_name() {
        "tenure.v1.PutReply" => number("header", "revision")?,
        _ if rule.verb == Method::GET => number("record", "mod_revision")?,
        _ => return None,
    };
    Some(format!("\"{revision}\""))
}

/// Whether the caller has said that it knows this one.
pub(super) fn is_known(etag: &str, headers: &HeaderMap) -> bool {
    let known = headers.get(header::IF_NONE_MATCH).and_then(|tag| tag.to_str().ok());
    known.is_some_and(|known| known.trim() == etag)
}

pub(super) fn not_modified(etag: &str) -> Response<Body> {
    let mut response = Response::new(full(Vec::new()));
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    if let Ok(etag) = HeaderValue::try_from(etag) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
}
