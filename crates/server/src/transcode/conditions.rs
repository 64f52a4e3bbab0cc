//! Conditions of HTTP on the native face: `ETag`, `If-Match`, `If-None-Match`.
//!
//! Promises. C1: the tag of a key is its `mod_revision`, so it changes with every change and is never used again; that of a configuration is the number of
//! the version. C2: a condition on a change is its `expect` or `expect_version`, decided in the commit of the change. C3: a condition that a call cannot
//! keep is refused, never passed over.
//! Not promised. Weak tags and lists of tags: what there is has one strong tag. That a tag of configuration tells of its schema and its roll-out.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode};
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, ReflectMessage as _, Value};

use super::Rule;
use crate::front::{Body, full};
use crate::rpc::Status;

/// What must be there.
#[derive(Clone, Copy)]
enum Wanted {
    Anything,
    Nothing,
    This(u64),
}

/// Reads the conditions of a change into its `expect` or `expect_version`. Reads are compared with their answer.
pub(super) fn expect(message: &mut DynamicMessage, headers: &HeaderMap) -> Result<(), Status> {
    let wanted = match (text(headers, &header::IF_MATCH)?, text(headers, &header::IF_NONE_MATCH)?) {
        (None, None) => return Ok(()),
        (Some(_), Some(_)) => return Err(Status::invalid_argument("If-Match and If-None-Match are both given")),
        (Some("*"), None) => Wanted::Anything,
        (Some(tag), None) => Wanted::This(number(tag)?),
        (None, Some("*")) => Wanted::Nothing,
        (None, Some(tag)) => {
            number(tag)?;
            // Of a read: `is_known` looks at it. A change has no use for "unless it is this one".
            return match message.descriptor().get_field_by_name("request") {
                None => Ok(()),
                Some(_) => Err(Status::invalid_argument("a change takes `If-None-Match: *` only")),
            };
        }
    };
    let named = |name: &str| message.descriptor().get_field_by_name(name);
    let of_a_key =
        |field: &FieldDescriptor| matches!(field.kind(), Kind::Message(kind) if kind.full_name() == "tenure.v1.Expect");
    let Some(field) = named("expect").filter(of_a_key).or_else(|| named("expect_version")) else {
        return Err(Status::invalid_argument("this call takes no If-Match and no `If-None-Match: *`"));
    };
    if message.has_field(&field) {
        return Err(Status::invalid_argument("an expectation is given in the body and in a header"));
    }
    if of_a_key(&field) {
        let (name, value) = match wanted {
            Wanted::Anything => ("absent", Value::Bool(false)),
            Wanted::Nothing => ("absent", Value::Bool(true)),
            Wanted::This(revision) => ("mod_revision", Value::U64(revision)),
        };
        if let Value::Message(expect) = message.get_field_mut(&field) {
            expect.set_field_by_name(name, value);
        }
        return Ok(());
    }
    let version = match wanted {
        Wanted::Anything => {
            return Err(Status::invalid_argument("this call takes the tag of a version, or `If-None-Match: *`"));
        }
        Wanted::Nothing => 0,
        Wanted::This(version) => version,
    };
    message.set_field(&field, Value::U64(version));
    Ok(())
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, Status> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    let text = value.to_str().map_err(|_| Status::invalid_argument(format!("{name} is not text")))?;
    Ok(Some(text.trim()))
}

fn number(tag: &str) -> Result<u64, Status> {
    let digits = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"'));
    let wrong = || Status::invalid_argument(format!("{tag} is no tag: one number in quotes, as `ETag` told it"));
    digits.and_then(|digits| digits.parse().ok()).ok_or_else(wrong)
}

/// The tag of what an answer tells: of the record or the version it carries, or of what it has just changed.
pub(super) fn etag(rule: &Rule, answer: &DynamicMessage) -> Option<String> {
    let number = |message: &str, field: &str| {
        let message = answer.get_field_by_name(message)?;
        message.as_message()?.get_field_by_name(field)?.as_u64().filter(|&number| number > 0)
    };
    let tag = match answer.descriptor().full_name() {
        "tenure.v1.PutReply" => number("header", "revision")?,
        "tenure.v1.ConfigGetReply" => number("version", "version")?,
        "tenure.v1.ConfigChangeReply" => {
            answer.get_field_by_name("current_version")?.as_u64().filter(|&number| number > 0)?
        }
        _ if rule.verb == Method::GET => number("record", "mod_revision")?,
        _ => return None,
    };
    Some(format!("\"{tag}\""))
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
