//! Bodies of the `/v3` face, read as etcd's gateway reads them: the first JSON value is the message, unknown fields and whatever
//! follows are ignored, and the texts of errors are those that its clients know.
//!
//! Two passes, as there: the first finds where the value ends and whether it is JSON at all, the second gives it the message's
//! types and knows lines and columns. It is written by hand for the texts alone; the native face leaves this to a library.
//! Not promised. Maps and floating point, which the etcd protocol has not.

use std::collections::BTreeSet;

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage, Value};

use super::fields::base64;
use crate::rpc::Status;

/// Messages inside messages; a transaction may nest, and nothing sensible comes near.
const DEPTH_MAX: usize = 100;

/// The message of a whole body; an empty one is the empty message.
pub(super) fn whole_message(kind: &MessageDescriptor, body: &[u8]) -> Result<DynamicMessage, Status> {
    match scan(body, true) {
        Scan::Value(from, to) => decode(kind, &body[from..to]),
        Scan::Empty => Ok(DynamicMessage::new(kind.clone())),
        Scan::Incomplete => Err(Status::invalid_argument("unexpected EOF")),
        Scan::Bad(text) => Err(Status::invalid_argument(text)),
    }
}

/// The next message of a body that is still arriving and the bytes it took; `None` while it is incomplete.
pub(super) fn next_message(kind: &MessageDescriptor, body: &[u8]) -> Result<Option<(DynamicMessage, usize)>, Status> {
    match scan(body, false) {
        Scan::Value(from, to) => Ok(Some((decode(kind, &body[from..to])?, to))),
        Scan::Empty | Scan::Incomplete => Ok(None),
        Scan::Bad(text) => Err(Status::invalid_argument(text)),
    }
}

#[derive(Debug, PartialEq)]
enum Scan {
    /// Nothing but white space.
    Empty,
    Incomplete,
    /// From its first byte to behind its last.
    Value(usize, usize),
    Bad(String),
}

/// What may come next.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    Value,
    FirstElement,
    FirstKey,
    Key,
    Colon,
    AfterValue,
}

#[derive(Clone, Copy, PartialEq)]
enum Open {
    Object,
    Array,
}

/// Finds the end of the first JSON value. `is_all`: nothing will follow, so a number may end with the text.
fn scan(text: &[u8], is_all: bool) -> Scan {
    let mut open: Vec<Open> = Vec::new();
    let mut place = Place::Value;
    let mut at = space(text, 0);
    let from = at;
    loop {
        at = space(text, at);
        let Some(&byte) = text.get(at) else {
            return if at == from && open.is_empty() { Scan::Empty } else { Scan::Incomplete };
        };
        let step = match (place, byte) {
            (Place::FirstElement, b']') | (Place::FirstKey, b'}') => close(&mut open, at),
            (Place::Value | Place::FirstElement, b'{') => begin(&mut open, Open::Object, at),
            (Place::Value | Place::FirstElement, b'[') => begin(&mut open, Open::Array, at),
            (Place::Value | Place::FirstElement, _) => scalar(text, at, is_all && open.is_empty()),
            (Place::FirstKey | Place::Key, b'"') => string(text, at).map(|at| (Place::Colon, at)),
            (Place::FirstKey | Place::Key, _) => Err(bad(byte, "looking for beginning of object key string")),
            (Place::Colon, b':') => Ok((Place::Value, at + 1)),
            (Place::Colon, _) => Err(bad(byte, "after object key")),
            (Place::AfterValue, _) => match (open.last(), byte) {
                (Some(Open::Object), b',') => Ok((Place::Key, at + 1)),
                (Some(Open::Array), b',') => Ok((Place::Value, at + 1)),
                (Some(Open::Object), b'}') | (Some(Open::Array), b']') => close(&mut open, at),
                (Some(Open::Object), _) => Err(bad(byte, "after object key:value pair")),
                (_, _) => Err(bad(byte, "after array element")),
            },
        };
        match step {
            Ok((next, behind)) => (place, at) = (next, behind),
            Err(end) => return end,
        }
        if place == Place::AfterValue && open.is_empty() {
            return Scan::Value(from, at);
        }
    }
}

type Step = Result<(Place, usize), Scan>;

fn begin(open: &mut Vec<Open>, what: Open, at: usize) -> Step {
    open.push(what);
    Ok((if what == Open::Object { Place::FirstKey } else { Place::FirstElement }, at + 1))
}

fn close(open: &mut Vec<Open>, at: usize) -> Step {
    open.pop();
    Ok((Place::AfterValue, at + 1))
}

fn bad(byte: u8, context: &str) -> Scan {
    let shown = match byte {
        b'\'' => r"'\''".to_owned(),
        b'"' => "'\"'".to_owned(),
        b'\\' => r"'\\'".to_owned(),
        b'\n' => r"'\n'".to_owned(),
        b'\r' => r"'\r'".to_owned(),
        b'\t' => r"'\t'".to_owned(),
        0..0x20 | 0x7f => format!(r"'\x{byte:02x}'"),
        _ => format!("'{}'", char::from(byte)),
    };
    Scan::Bad(format!("invalid character {shown} {context}"))
}

fn space(text: &[u8], mut at: usize) -> usize {
    while matches!(text.get(at), Some(b' ' | b'\t' | b'\r' | b'\n')) {
        at += 1;
    }
    at
}

fn scalar(text: &[u8], at: usize, may_end: bool) -> Step {
    let behind = match text[at] {
        b'"' => string(text, at)?,
        b'-' | b'0'..=b'9' => number(text, at, may_end)?,
        b't' => literal(text, at, "true")?,
        b'f' => literal(text, at, "false")?,
        b'n' => literal(text, at, "null")?,
        byte => return Err(bad(byte, "looking for beginning of value")),
    };
    Ok((Place::AfterValue, behind))
}

fn literal(text: &[u8], at: usize, word: &str) -> Result<usize, Scan> {
    for (offset, expected) in word.bytes().enumerate() {
        match text.get(at + offset) {
            None => return Err(Scan::Incomplete),
            Some(&byte) if byte != expected => {
                let context = format!("in literal {word} (expecting '{}')", char::from(expected));
                return Err(bad(byte, &context));
            }
            Some(_) => {}
        }
    }
    Ok(at + word.len())
}

/// Behind the closing quote.
fn string(text: &[u8], at: usize) -> Result<usize, Scan> {
    let mut at = at + 1;
    loop {
        match *text.get(at).ok_or(Scan::Incomplete)? {
            b'"' => return Ok(at + 1),
            b'\\' => match *text.get(at + 1).ok_or(Scan::Incomplete)? {
                b'b' | b'f' | b'n' | b'r' | b't' | b'\\' | b'/' | b'"' => at += 2,
                b'u' => {
                    for offset in 2..6 {
                        let byte = *text.get(at + offset).ok_or(Scan::Incomplete)?;
                        if !byte.is_ascii_hexdigit() {
                            return Err(bad(byte, r"in \u hexadecimal character escape"));
                        }
                    }
                    at += 6;
                }
                byte => return Err(bad(byte, "in string escape code")),
            },
            byte if byte < 0x20 => return Err(bad(byte, "in string literal")),
            _ => at += 1,
        }
    }
}

fn number(text: &[u8], from: usize, may_end: bool) -> Result<usize, Scan> {
    let mut at = from + usize::from(text[from] == b'-');
    at = match text.get(at) {
        Some(b'0') => at + 1,
        _ => digits(text, at, "in numeric literal")?,
    };
    if text.get(at) == Some(&b'.') {
        at = digits(text, at + 1, "after decimal point in numeric literal")?;
    }
    if matches!(text.get(at), Some(b'e' | b'E')) {
        at += 1 + usize::from(matches!(text.get(at + 1), Some(b'+' | b'-')));
        at = digits(text, at, "in exponent of numeric literal")?;
    }
    if at == text.len() && !may_end { Err(Scan::Incomplete) } else { Ok(at) }
}

/// Behind one or more digits.
fn digits(text: &[u8], from: usize, context: &str) -> Result<usize, Scan> {
    let count = text[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    match (count, text.get(from)) {
        (0, None) => Err(Scan::Incomplete),
        (0, Some(&byte)) => Err(bad(byte, context)),
        _ => Ok(from + count),
    }
}

/// Gives types to `text`, which is one value of valid JSON.
fn decode(kind: &MessageDescriptor, text: &[u8]) -> Result<DynamicMessage, Status> {
    let mut reader = Reader { text, at: 0, depth: 0 };
    let mut message = DynamicMessage::new(kind.clone());
    reader.message(&mut message)?;
    Ok(message)
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    depth: usize,
}

/// One token and where it stands.
#[derive(Clone, Copy)]
struct Token<'a> {
    at: usize,
    raw: &'a [u8],
}

impl Token<'_> {
    fn first(&self) -> u8 {
        // A token has at least one byte: the text was scanned.
        self.raw[0]
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(self.raw).into_owned()
    }
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Token<'a> {
        let at = space(self.text, self.at);
        let behind = match self.text[at] {
            b'{' | b'}' | b'[' | b']' | b',' | b':' => Ok(at + 1),
            _ => scalar(self.text, at, true).map(|(_, behind)| behind),
        };
        Token { at, raw: &self.text[at..behind.unwrap_or(self.text.len())] }
    }

    fn read(&mut self) -> Token<'a> {
        let token = self.peek();
        self.at = token.at + token.raw.len();
        token
    }

    /// Whether the token was this mark; then it is read.
    fn took(&mut self, mark: u8) -> bool {
        let found = self.peek().first() == mark;
        if found {
            self.read();
        }
        found
    }

    fn error(&self, at: usize, kind: &str, text: &str) -> Status {
        let before = &self.text[..at];
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        let start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |place| place + 1);
        let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
        Status::invalid_argument(format!("proto: {kind}(line {line}:{column}): {text}"))
    }

    fn unexpected(&self, token: Token<'_>) -> Status {
        self.error(token.at, "syntax error ", &format!("unexpected token {}", token.shown()))
    }

    fn message(&mut self, message: &mut DynamicMessage) -> Result<(), Status> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(Status::invalid_argument("proto: exceeded max recursion depth"));
        }
        let token = self.read();
        if token.first() != b'{' {
            return Err(self.unexpected(token));
        }
        let mut seen = Seen::default();
        while !self.took(b'}') {
            let name = self.read();
            self.took(b':');
            self.field(message, name, &mut seen)?;
            self.took(b',');
        }
        self.depth -= 1;
        Ok(())
    }

    fn field(&mut self, message: &mut DynamicMessage, name: Token<'_>, seen: &mut Seen) -> Result<(), Status> {
        let text = self.unquoted(name)?;
        let kind = message.descriptor();
        let Some(field) = kind.get_field_by_json_name(&text).or_else(|| kind.get_field_by_name(&text)) else {
            self.skip();
            return Ok(());
        };
        if !seen.fields.insert(field.number()) {
            return Err(self.error(name.at, "", &format!("duplicate field {}", name.shown())));
        }
        if self.peek().first() == b'n' {
            self.read();
            return Ok(());
        }
        if field.is_list() {
            return self.list(message, &field);
        }
        if let Some(oneof) = field.containing_oneof()
            && !seen.oneofs.insert(oneof.full_name().to_owned())
        {
            let text = format!("error parsing {}, oneof {} is already set", name.shown(), oneof.full_name());
            return Err(self.error(name.at, "", &text));
        }
        if let Some(value) = self.value(&field)? {
            message.set_field(&field, value);
        }
        Ok(())
    }

    fn list(&mut self, message: &mut DynamicMessage, field: &FieldDescriptor) -> Result<(), Status> {
        let token = self.read();
        if token.first() != b'[' {
            return Err(self.unexpected(token));
        }
        let mut list = Vec::new();
        while !self.took(b']') {
            list.extend(self.value(field)?);
            self.took(b',');
        }
        message.set_field(field, Value::List(list));
        Ok(())
    }

    /// A single value; `None` for the name of an enum value that is not known, which is ignored.
    fn value(&mut self, field: &FieldDescriptor) -> Result<Option<Value>, Status> {
        if let Kind::Message(kind) = field.kind() {
            let mut inner = DynamicMessage::new(kind);
            self.message(&mut inner)?;
            return Ok(Some(Value::Message(inner)));
        }
        let token = self.read();
        let text = if token.first() == b'"' { Some(self.unquoted(token)?) } else { None };
        let number = text.as_deref().or_else(|| std::str::from_utf8(token.raw).ok()).and_then(integer);
        let (name, value) = match field.kind() {
            Kind::Bool => (
                "bool",
                match token.raw {
                    b"true" => Some(Value::Bool(true)),
                    b"false" => Some(Value::Bool(false)),
                    _ => None,
                },
            ),
            Kind::String => ("string", text.map(Value::String)),
            Kind::Bytes => ("bytes", text.and_then(|text| base64(&text).ok()).map(|bytes| Value::Bytes(bytes.into()))),
            Kind::Int32 => ("int32", number.and_then(|number| number.try_into().ok()).map(Value::I32)),
            Kind::Int64 => ("int64", number.and_then(|number| number.try_into().ok()).map(Value::I64)),
            Kind::Uint32 => ("uint32", number.and_then(|number| number.try_into().ok()).map(Value::U32)),
            Kind::Uint64 => ("uint64", number.and_then(|number| number.try_into().ok()).map(Value::U64)),
            Kind::Enum(kind) => match &text {
                Some(text) => match kind.get_value_by_name(text) {
                    Some(value) => ("enum", Some(Value::EnumNumber(value.number()))),
                    None => return Ok(None),
                },
                None => ("enum", number.and_then(|number| number.try_into().ok()).map(Value::EnumNumber)),
            },
            _ => ("other", None),
        };
        if value.is_none() {
            let text = format!("invalid value for {name} field {}: {}", field.json_name(), token.shown());
            return Err(self.error(token.at, "", &text));
        }
        Ok(value)
    }

    fn unquoted(&self, token: Token<'_>) -> Result<String, Status> {
        // What a scanned string may still be: not UTF-8, or half of a surrogate pair.
        serde_json::from_slice(token.raw).map_err(|_| self.error(token.at, "syntax error ", "invalid UTF-8 in string"))
    }

    /// Passes over a value of an unknown field.
    fn skip(&mut self) {
        if let Scan::Value(_, behind) = scan(&self.text[self.at..], true) {
            self.at += behind;
        }
    }
}

#[derive(Default)]
struct Seen {
    fields: BTreeSet<u32>,
    oneofs: BTreeSet<String>,
}

/// A number without a fraction, also when written as `1e3` or `2.0`.
fn integer(text: &str) -> Option<i128> {
    if let Ok(number) = text.parse::<i128>() {
        // `+1` and leading zeros are numbers to Rust and not to JSON.
        let is_json = !text.starts_with('+') && number.to_string().len() == text.len();
        return (is_json || text == "-0").then_some(number);
    }
    let plain = |byte: u8| byte.is_ascii_digit() || matches!(byte, b'-' | b'+' | b'.' | b'e' | b'E');
    let number = text.bytes().all(plain).then(|| text.parse::<f64>().ok()).flatten()?;
    // Beyond 2^53 a double no longer tells neighbours apart.
    (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i128)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_is_found() {
        let check = |text: &str, expected: Scan| assert_eq!(scan(text.as_bytes(), false), expected, "{text}");
        check("", Scan::Empty);
        check(" \n", Scan::Empty);
        check(" {} x", Scan::Value(1, 3));
        check(r#"{"a":[1,{"b":"}\""}],"c":null}{"#, Scan::Value(0, 30));
        check(r#"{"a":"#, Scan::Incomplete);
        check(r#"{"a":1"#, Scan::Incomplete);
        check("12", Scan::Incomplete);
        check("[1,]", Scan::Bad("invalid character ']' looking for beginning of value".into()));
        check(r#"{"a":1,}"#, Scan::Bad("invalid character '}' looking for beginning of object key string".into()));
        check(r#"{"a":01}"#, Scan::Bad("invalid character '1' after object key:value pair".into()));
        check("\"\n\"", Scan::Bad(r"invalid character '\n' in string literal".into()));
        check(r#""\q""#, Scan::Bad("invalid character 'q' in string escape code".into()));
        assert_eq!(scan(b"12", true), Scan::Value(0, 2));
    }

    #[test]
    fn integers() {
        let check = |text: &str, expected: Option<i128>| assert_eq!(integer(text), expected, "{text}");
        check("-9223372036854775808", Some(i64::MIN.into()));
        check("18446744073709551615", Some(u64::MAX.into()));
        check("1e3", Some(1000));
        check("2.0", Some(2));
        check("2.5", None);
        check("+1", None);
        check("01", None);
        check(" 1", None);
        check("nan", None);
    }
}
