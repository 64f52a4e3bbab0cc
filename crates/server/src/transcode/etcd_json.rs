//! Bodies of the `/v3` face: the first JSON value is the message, unknown fields and what follows are ignored.

use prost_reflect::{DeserializeOptions, DynamicMessage, MessageDescriptor};
use serde::de::IgnoredAny;

use crate::rpc::Status;

/// The first message of `body` and the number of bytes it took. An empty body is an empty message.
pub(super) fn first_message(kind: &MessageDescriptor, body: &[u8]) -> Result<(DynamicMessage, usize), Status> {
    match next_message(kind, body)? {
        Some(found) => Ok(found),
        None if body.iter().all(u8::is_ascii_whitespace) => Ok((DynamicMessage::new(kind.clone()), body.len())),
        None => Err(Status::invalid_argument("unexpected EOF")),
    }
}

/// The next message of a body that is still arriving; `None` while it is incomplete.
pub(super) fn next_message(kind: &MessageDescriptor, body: &[u8]) -> Result<Option<(DynamicMessage, usize)>, Status> {
    let invalid = |error: serde_json::Error| Status::invalid_argument(error.to_string());
    let mut values = serde_json::Deserializer::from_slice(body).into_iter::<IgnoredAny>();
    match values.next() {
        None => return Ok(None),
        Some(Err(error)) if error.is_eof() => return Ok(None),
        Some(Err(error)) => return Err(invalid(error)),
        Some(Ok(_)) => {}
    }
    let len = values.byte_offset();
    let mut reader = serde_json::Deserializer::from_slice(&body[..len]);
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let message = DynamicMessage::deserialize_with_options(kind.clone(), &mut reader, &options).map_err(invalid)?;
    Ok(Some((message, len)))
}
