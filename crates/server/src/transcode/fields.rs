//! Fields from path and query: text to the type that the message has. Unknown names are refused, and what would not be heard.

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, ReflectMessage, Value};

use super::Rule;
use crate::pages::percent_decode;
use crate::rpc::Status;

pub(super) fn from_query(rule: &Rule, query: Option<&str>) -> Result<DynamicMessage, Status> {
    let mut message = DynamicMessage::new(rule.method.input());
    for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let name = String::from_utf8(percent_decode(name));
        let name = name.map_err(|_| Status::invalid_argument("a parameter's name is not UTF-8"))?;
        set(&mut message, &name, &percent_decode(&value.replace('+', " ")))?;
    }
    Ok(message)
}

/// Of a call whose fields are in its body.
pub(super) fn no_query(query: Option<&str>) -> Result<(), Status> {
    match query.unwrap_or_default().split('&').find(|pair| !pair.is_empty()) {
        None => Ok(()),
        Some(pair) => {
            let name = pair.split('=').next().unwrap_or_default();
            Err(Status::invalid_argument(format!(
                "there is no parameter `{name}`: the fields of this call are in its body"
            )))
        }
    }
}

/// Sets the field of a variable of the path, which nothing else may give otherwise.
pub(super) fn set_from_path(message: &mut DynamicMessage, name: &str, value: &[u8]) -> Result<(), Status> {
    let given = message.has_field_by_name(name).then(|| message.clone());
    set(message, name, value)?;
    match given {
        Some(given) if given != *message => {
            Err(Status::invalid_argument(format!("`{name}` is in the path, and differs from what is given beside it")))
        }
        _ => Ok(()),
    }
}

/// Sets the field of a dotted name; a repeated field grows.
pub(super) fn set(message: &mut DynamicMessage, name: &str, value: &[u8]) -> Result<(), Status> {
    let (first, rest) = match name.split_once('.') {
        Some((first, rest)) => (first, Some(rest)),
        None => (name, None),
    };
    let kind = message.descriptor();
    let field = kind.get_field_by_name(first).or_else(|| kind.get_field_by_json_name(first));
    let field = field.ok_or_else(|| Status::invalid_argument(format!("there is no parameter `{name}`")))?;
    if let Some(rest) = rest {
        return match message.get_field_mut(&field) {
            Value::Message(inner) => set(inner, rest, value),
            _ => Err(Status::invalid_argument(format!("parameter `{first}` has no fields"))),
        };
    }
    let value = scalar(&field, value).map_err(|why| Status::invalid_argument(format!("parameter `{name}`: {why}")))?;
    if field.is_list() {
        if let Value::List(list) = message.get_field_mut(&field) {
            list.push(value);
        }
        return Ok(());
    }
    message.set_field(&field, value);
    Ok(())
}

fn scalar(field: &FieldDescriptor, raw: &[u8]) -> Result<Value, String> {
    let text = std::str::from_utf8(raw).map_err(|_| "the value is not UTF-8".to_owned())?;
    fn number<N: std::str::FromStr>(text: &str) -> Result<N, String> {
        text.parse().map_err(|_| format!("`{text}` is not a number of its kind"))
    }
    Ok(match field.kind() {
        Kind::String => Value::String(text.to_owned()),
        Kind::Bool => match text {
            // A bare name is a flag that is set.
            "" | "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            other => return Err(format!("`{other}` is neither true nor false")),
        },
        Kind::Uint32 | Kind::Fixed32 => Value::U32(number(text)?),
        Kind::Uint64 | Kind::Fixed64 => Value::U64(number(text)?),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(number(text)?),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(number(text)?),
        Kind::Bytes => Value::Bytes(base64(text)?.into()),
        Kind::Enum(kind) => {
            let known = kind.get_value_by_name(text).map(|value| value.number());
            Value::EnumNumber(known.map_or_else(|| number(text), Ok)?)
        }
        Kind::Float | Kind::Double | Kind::Message(_) => return Err("it cannot be given in a URL".to_owned()),
    })
}

/// Standard or URL-safe, whole or without its padding; line breaks are passed over. As Go reads it, since etcd's clients may rely on it.
pub(super) fn base64(text: &str) -> Result<Vec<u8>, String> {
    use base64::Engine;
    use base64::alphabet::{STANDARD, URL_SAFE};
    use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
    let alphabet = if text.contains(['-', '_']) { &URL_SAFE } else { &STANDARD };
    let is_whole = text.len().is_multiple_of(4);
    let padding = if is_whole { DecodePaddingMode::RequireCanonical } else { DecodePaddingMode::RequireNone };
    let config = GeneralPurposeConfig::new().with_decode_padding_mode(padding).with_decode_allow_trailing_bits(true);
    let plain = text.replace(['\r', '\n'], "");
    GeneralPurpose::new(alphabet, config).decode(plain).map_err(|error| format!("not base64: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_alphabets_with_and_without_padding() {
        let check = |text: &str, expected: Option<&[u8]>| assert_eq!(base64(text).ok().as_deref(), expected, "{text}");
        check("", Some(b""));
        check("YQ==", Some(b"a"));
        check("YQ", Some(b"a"));
        check("YR==", Some(b"a"));
        check("YQ=", None);
        check("_-8=", Some(&[0xff, 0xef]));
        check("/+8", Some(&[0xff, 0xef]));
        check("_+8=", None);
        check("Y", None);
    }
}
