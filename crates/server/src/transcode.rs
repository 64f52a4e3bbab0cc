//! JSON over HTTP, made from the descriptors: `/v3/*` as etcd's own gateway has it, `/v1/*` as the native protocol says.
//!
//! Promises. T1: a JSON call runs the very method that gRPC runs, in process; there is no second implementation. T2: `/v3` ignores unknown
//! fields, answers errors as `{"code","message"}` and streams as one JSON object per line, as etcd 3.7 does. T3: `/v1` refuses unknown
//! fields and parameters, and a body or parameters that the call does not read, and answers errors as problem+json with the facts. T4: bodies are
//! bounded like gRPC messages.
//! Not promised. Field order and spaces: compare parsed JSON. On `/v1`, `*:verb` templates with a variable before the verb do not exist.
//! Relies on. `prost-reflect` for the mapping of proto3 to JSON, and the annotations `google.api.http` in the descriptor bytes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method as Verb, Request, Response, StatusCode};
use http_body_util::BodyExt;
use prost::Message as _;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, MethodDescriptor, ReflectMessage,
    SerializeOptions, Value,
};
use serde_json::json;

use self::problem::{problem_response, problem_response_as};
use self::stream::{Requests, stream_response};
use crate::front::{App, Body, FrontError, full};
use crate::pages::percent_decode;
use crate::rpc::{Call, Code, Face, Method, Status, UnaryFn};

mod conditions;
mod etcd_json;
mod fields;
mod problem;
mod stream;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// An older prefix of `/v3` that etcd still takes.
const BETA: &str = "/v3beta/";

/// JSON is at most this much longer than the message it becomes: base64 is a third, escapes and names the rest.
const JSON_FACTOR: usize = 3;

/// The rule table.
#[derive(Default)]
pub(crate) struct Transcoder {
    rules: Vec<Rule>,
    /// Rules without variables, by path.
    literal: HashMap<String, Vec<usize>>,
    /// Rules with variables, in the order of the files.
    variable: Vec<usize>,
}

/// One HTTP binding of one method.
pub(crate) struct Rule {
    pub(crate) verb: Verb,
    pub(crate) template: Template,
    /// Whether the body is the request message; otherwise the query carries its fields.
    pub(crate) has_body: bool,
    pub(crate) method: MethodDescriptor,
    /// The path of the method in the router.
    pub(crate) grpc_path: String,
    face: Face,
}

enum Found<'t> {
    Rule(&'t Rule, Vec<(String, String)>),
    /// The path is known, with these verbs.
    OtherVerbs(Vec<&'t Verb>),
    Nothing,
}

impl Transcoder {
    pub(crate) fn new(descriptors: &[u8]) -> Result<Self, FrontError> {
        let pool = DescriptorPool::decode(descriptors).map_err(|error| FrontError::Descriptors(error.to_string()))?;
        let mut transcoder = Self::default();
        let Some(http) = pool.get_extension_by_name("google.api.http") else { return Ok(transcoder) };
        for method in pool.services().flat_map(|service| service.methods().collect::<Vec<_>>()) {
            let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
            let options = method.options();
            if !options.has_extension(&http) {
                continue;
            }
            if let Value::Message(rule) = options.get_extension(&http).as_ref() {
                transcoder.add(&method, &path, rule);
                let more = rule.get_field_by_name("additional_bindings");
                for binding in more.as_deref().and_then(Value::as_list).unwrap_or_default() {
                    if let Value::Message(rule) = binding {
                        transcoder.add(&method, &path, rule);
                    }
                }
            }
        }
        Ok(transcoder)
    }

    fn add(&mut self, method: &MethodDescriptor, path: &str, rule: &DynamicMessage) {
        let verbs = [("get", Verb::GET), ("put", Verb::PUT), ("post", Verb::POST), ("delete", Verb::DELETE)];
        let text = |name: &str| {
            rule.get_field_by_name(name).and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
        };
        let Some((verb, template)) =
            verbs.into_iter().map(|(name, verb)| (verb, text(name))).find(|(_, template)| !template.is_empty())
        else {
            return;
        };
        let template = Template::parse(&template);
        let place = self.rules.len();
        match template.as_literal() {
            Some(path) => self.literal.entry(path).or_default().push(place),
            None => self.variable.push(place),
        }
        let face = if template.text.starts_with("/v3/") { Face::EtcdJson } else { Face::NativeJson };
        self.rules.push(Rule {
            verb,
            template,
            has_body: text("body") == "*",
            method: method.clone(),
            grpc_path: path.to_owned(),
            face,
        });
    }

    pub(crate) fn rules(&self) -> &[Rule] {
        &self.rules
    }

    fn find(&self, verb: &Verb, path: &str) -> Found<'_> {
        let literal = self.literal.get(path).into_iter().flatten().map(|place| (&self.rules[*place], Vec::new()));
        let variable = self.variable.iter().filter_map(|place| {
            let rule = &self.rules[*place];
            Some((rule, rule.template.matches(path)?))
        });
        let mut others = Vec::new();
        for (rule, variables) in literal.chain(variable) {
            if rule.verb == *verb {
                return Found::Rule(rule, variables);
            }
            others.push(&rule.verb);
        }
        if others.is_empty() { Found::Nothing } else { Found::OtherVerbs(others) }
    }
}

/// Whether the path is below a prefix of JSON calls.
pub(crate) fn owns(path: &str) -> bool {
    path.starts_with("/v1/") || path == "/v3" || path.starts_with("/v3/") || path.starts_with(BETA)
}

/// A path with variables: `/v1/locks/{name=**}`. A variable stands for one segment, or with `**` for all that are left.
#[derive(Debug)]
pub(crate) struct Template {
    pub(crate) text: String,
    segments: Vec<Segment>,
}

#[derive(Debug, PartialEq)]
enum Segment {
    Literal(String),
    One(String),
    Rest(String),
}

impl Template {
    fn parse(text: &str) -> Self {
        let segment = |part: &str| match part.strip_prefix('{').and_then(|part| part.strip_suffix('}')) {
            None => Segment::Literal(part.to_owned()),
            Some(variable) => match variable.split_once('=') {
                Some((name, "**")) => Segment::Rest(name.to_owned()),
                Some((name, _)) => Segment::One(name.to_owned()),
                None => Segment::One(variable.to_owned()),
            },
        };
        Self { text: text.to_owned(), segments: text.trim_start_matches('/').split('/').map(segment).collect() }
    }

    fn as_literal(&self) -> Option<String> {
        let is_literal = self.segments.iter().all(|segment| matches!(segment, Segment::Literal(_)));
        is_literal.then(|| self.text.clone())
    }

    /// The variables with their raw values, percent-encoding and all.
    fn matches(&self, path: &str) -> Option<Vec<(String, String)>> {
        let mut variables = Vec::new();
        let mut rest = Some(path.strip_prefix('/')?);
        for segment in &self.segments {
            if let Segment::Rest(name) = segment {
                variables.push((name.clone(), rest?.to_owned()));
                return Some(variables);
            }
            let (part, left) = match rest?.split_once('/') {
                Some((part, left)) => (part, Some(left)),
                None => (rest?, None),
            };
            match segment {
                Segment::Literal(text) if text == part => {}
                Segment::One(name) if !part.is_empty() => variables.push((name.clone(), part.to_owned())),
                _ => return None,
            }
            rest = left;
        }
        rest.is_none().then_some(variables)
    }

    /// The names of the variables, and the path as OpenAPI writes it.
    pub(crate) fn for_openapi(&self) -> (Vec<&str>, String) {
        let mut names = Vec::new();
        let mut path = String::new();
        for segment in &self.segments {
            path.push('/');
            match segment {
                Segment::Literal(text) => path.push_str(text),
                Segment::One(name) | Segment::Rest(name) => {
                    names.push(name.as_str());
                    path.push_str(&format!("{{{name}}}"));
                }
            }
        }
        (names, path)
    }
}

/// Between two pieces of a body; a peer that stays silent for longer gives its connection up.
const BODY_SILENCE: Duration = Duration::from_secs(20);

pub(crate) async fn serve(app: &Arc<App>, request: Request<Body>, peer: SocketAddr) -> Response<Body> {
    let path = match request.uri().path().strip_prefix(BETA) {
        Some(rest) => Cow::Owned(format!("/v3/{rest}")),
        None => Cow::Borrowed(request.uri().path()),
    };
    let face = if path.starts_with("/v3") { Face::EtcdJson } else { Face::NativeJson };
    let verb = request.method().clone();
    if is_from_elsewhere(&request) {
        return error_response(
            face,
            &Status::new(Code::PermissionDenied, "requests of other sites' pages are refused"),
        );
    }
    if face == Face::NativeJson && !may_be_json(request.headers()) {
        return wrong_type();
    }
    match app.transcoder().find(&verb, &path) {
        Found::Rule(rule, variables) => match run(app, rule, variables, request, peer).await {
            Ok(response) => response,
            Err(status) => error_response(face, &status),
        },
        Found::Nothing => error_response(face, &Status::not_found("Not Found")),
        Found::OtherVerbs(_) if face == Face::EtcdJson => {
            error_response(face, &Status::unimplemented("Method Not Allowed"))
        }
        Found::OtherVerbs(verbs) => wrong_verb(&verbs),
    }
}

/// A browser names the site whose page asks. Without this check any page could write to a member on the loopback of whoever looks at it:
/// a POST of text needs nobody's leave. Programs send no `Origin`.
fn is_from_elsewhere(request: &Request<Body>) -> bool {
    let Some(origin) = request.headers().get(header::ORIGIN) else { return false };
    let host = request.headers().get(header::HOST).map(HeaderValue::as_bytes);
    let host = host.or_else(|| request.uri().authority().map(|authority| authority.as_str().as_bytes()));
    let site = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, site)| site.as_bytes());
    site.is_none() || site != host
}

/// A body that calls itself something else than JSON is refused. `curl -d` calls everything a form, and text is what browsers call what they do not know:
/// both are read as JSON.
fn may_be_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(header::CONTENT_TYPE) else { return true };
    let Ok(kind) = kind.to_str() else { return false };
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind.is_empty()
        || kind.ends_with("/json")
        || kind.ends_with("+json")
        || matches!(kind.as_str(), "text/plain" | "application/x-www-form-urlencoded" | "application/octet-stream")
}

fn wrong_type() -> Response<Body> {
    let status = Status::invalid_argument("a body is JSON: `content-type: application/json`");
    let mut response = problem_response_as(&status, Some(StatusCode::UNSUPPORTED_MEDIA_TYPE));
    response.headers_mut().insert(HeaderName::from_static("accept-post"), HeaderValue::from_static("application/json"));
    response
}

fn wrong_verb(verbs: &[&Verb]) -> Response<Body> {
    let status = Status::unimplemented("Method Not Allowed");
    let mut response = problem_response_as(&status, Some(StatusCode::METHOD_NOT_ALLOWED));
    let allow = verbs.iter().map(|verb| verb.as_str()).collect::<Vec<_>>().join(", ");
    if let Ok(allow) = HeaderValue::try_from(allow) {
        response.headers_mut().insert(header::ALLOW, allow);
    }
    response
}

async fn run(
    app: &Arc<App>,
    rule: &Rule,
    variables: Vec<(String, String)>,
    request: Request<Body>,
    peer: SocketAddr,
) -> Result<Response<Body>, Status> {
    let Some(method) = app.router.find(&rule.grpc_path) else { return Err(app.router.unknown(&rule.grpc_path)) };
    let (head, body) = request.into_parts();
    let deadline = crate::front::deadline(&head.headers)?;
    let wants_events = head
        .headers
        .get(header::ACCEPT)
        .is_some_and(|accept| accept.to_str().is_ok_and(|accept| accept.contains("text/event-stream")));
    let call = Call { face: rule.face, metadata: head.headers, peer: Some(peer), deadline };
    match method {
        Method::Stream(method) if rule.face == Face::NativeJson => {
            let max = app.config.message_bytes_max_of(&rule.grpc_path);
            let body = read_body(body, max).await?;
            let message = request_message(rule, &variables, head.uri.query(), &call.metadata, &body)?;
            check_size(message.len(), max)?;
            Ok(stream_response(app, rule, method, call, Requests::one(message), wants_events).await)
        }
        Method::Stream(method) => {
            let requests = Requests::of_body(app, rule, body);
            Ok(stream_response(app, rule, method, call, requests, wants_events).await)
        }
        Method::Unary(method) => {
            let max = app.config.message_bytes_max_of(&rule.grpc_path);
            let body = read_body(body, max).await?;
            let message = request_message(rule, &variables, head.uri.query(), &call.metadata, &body)?;
            check_size(message.len(), max)?;
            unary(app, rule, method, call, message).await
        }
    }
}

async fn read_body(mut body: Body, message_bytes_max: usize) -> Result<Bytes, Status> {
    let max = message_bytes_max * JSON_FACTOR;
    let mut read = BytesMut::new();
    loop {
        let Ok(frame) = tokio::time::timeout(BODY_SILENCE, body.frame()).await else {
            return Err(Status::new(Code::DeadlineExceeded, "the rest of the body did not come"));
        };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|error| Status::new(Code::Cancelled, format!("reading the body failed: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if read.len() + data.len() > max {
            return Err(too_large(read.len() + data.len(), max));
        }
        if read.is_empty() && http_body::Body::is_end_stream(&body) {
            return Ok(data);
        }
        read.extend_from_slice(&data);
    }
    Ok(read.freeze())
}

fn check_size(len: usize, max: usize) -> Result<(), Status> {
    if len > max { Err(too_large(len, max)) } else { Ok(()) }
}

fn too_large(len: usize, max: usize) -> Status {
    Status::new(Code::ResourceExhausted, format!("grpc: received message larger than max ({len} vs. {max})"))
}

/// The encoded request, from the body or from path and query.
fn request_message(
    rule: &Rule,
    variables: &[(String, String)],
    query: Option<&str>,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<Bytes, Status> {
    if rule.face == Face::EtcdJson {
        return Ok(etcd_json::whole_message(&rule.method.input(), body)?.encode_to_vec().into());
    }
    let mut message = if rule.has_body {
        fields::no_query(query)?;
        native_message(rule.method.input(), body)?
    } else if is_blank(body) {
        fields::from_query(rule, query)?
    } else {
        return Err(Status::invalid_argument("this call takes no body: its fields are parameters of the address"));
    };
    for (name, value) in variables {
        fields::set_from_path(&mut message, name, &percent_decode(value))?;
    }
    idempotency_key(&mut message, headers)?;
    last_event_id(&mut message, headers)?;
    conditions::expect(&mut message, headers)?;
    Ok(message.encode_to_vec().into())
}

fn is_blank(body: &[u8]) -> bool {
    body.iter().all(u8::is_ascii_whitespace)
}

/// A whole body as one message; an empty one is the empty message.
fn native_message(kind: MessageDescriptor, body: &[u8]) -> Result<DynamicMessage, Status> {
    if is_blank(body) {
        return Ok(DynamicMessage::new(kind));
    }
    let invalid = |error: serde_json::Error| Status::invalid_argument(format!("the body is not valid: {error}"));
    let mut reader = serde_json::Deserializer::from_slice(body);
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let message = DynamicMessage::deserialize_with_options(kind, &mut reader, &options).map_err(invalid)?;
    reader.end().map_err(invalid)?;
    Ok(message)
}

/// Takes the header `Idempotency-Key` as the request's id, where the message has one.
fn idempotency_key(message: &mut DynamicMessage, headers: &HeaderMap) -> Result<(), Status> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else { return Ok(()) };
    let Some(field) = message.descriptor().get_field_by_name("request") else { return Ok(()) };
    let key = unquoted(key.to_str().map_err(|_| Status::invalid_argument("Idempotency-Key is not text"))?);
    let Value::Message(request) = message.get_field_mut(&field) else { return Ok(()) };
    let differs = || Status::invalid_argument("Idempotency-Key differs from the request id in the body");
    for other in ["uuid_bytes", "session", "series"] {
        if request.has_field_by_name(other) {
            return Err(differs());
        }
    }
    let digits = |text: &str| text.replace('-', "").to_ascii_lowercase();
    if let Some(uuid) = request.get_field_by_name("uuid").filter(|_| request.has_field_by_name("uuid"))
        && uuid.as_str().is_some_and(|uuid| digits(uuid) != digits(key))
    {
        return Err(differs());
    }
    request.set_field_by_name("uuid", Value::String(key.to_owned()));
    Ok(())
}

/// What `Idempotency-Key` says: a string of structured fields, so it may be quoted.
pub(crate) fn unquoted(key: &str) -> &str {
    key.trim().trim_matches('"')
}

/// Takes the header `Last-Event-ID`, which a browser sends when it reconnects, as the place to go on from, where the message has one. It is newer than
/// what the address says, which was written before the first event.
fn last_event_id(message: &mut DynamicMessage, headers: &HeaderMap) -> Result<(), Status> {
    let Some(id) = headers.get(LAST_EVENT_ID).filter(|id| !id.is_empty()) else { return Ok(()) };
    let Some(field) = message.descriptor().get_field_by_name("resume") else { return Ok(()) };
    let id = id.to_str().map_err(|_| Status::invalid_argument("Last-Event-ID is not text"))?;
    if field.kind() == prost_reflect::Kind::String {
        message.set_field(&field, Value::String(id.to_owned()));
    }
    Ok(())
}

async fn unary(
    app: &Arc<App>,
    rule: &Rule,
    method: &UnaryFn,
    call: Call,
    message: Bytes,
) -> Result<Response<Body>, Status> {
    let figures = app.calls.get(rule.grpc_path.as_str());
    if let Some(figures) = figures {
        figures.start();
    }
    let headers_in = call.metadata.clone();
    let answer = within(call.deadline, method(call, message)).await;
    if let Some(figures) = figures {
        figures.end(answer.as_ref().map_or_else(|status| status.code, |_| Code::Ok));
    }
    let answer = answer?;
    let (text, message) = to_json(&rule.method.output(), &answer)?;
    let etag = if rule.face == Face::NativeJson { conditions::etag(rule, &message) } else { None };
    if let Some(etag) = &etag
        && rule.verb == Verb::GET
        && conditions::is_known(etag, &headers_in)
    {
        return Ok(conditions::not_modified(etag));
    }
    let mut response = Response::new(full(text));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(etag) = etag.and_then(|etag| HeaderValue::try_from(etag).ok()) {
        headers.insert(header::ETAG, etag);
    }
    if rule.face == Face::NativeJson && is_replayed(&message) {
        headers.insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

async fn within<T>(
    deadline: Option<tokio::time::Instant>,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match deadline {
        None => call.await,
        Some(deadline) => tokio::time::timeout_at(deadline, call)
            .await
            .unwrap_or_else(|_| Err(Status::new(Code::DeadlineExceeded, "context deadline exceeded"))),
    }
}

/// An answer as JSON: names as in the proto files, defaults left out, 64-bit numbers as strings.
fn to_json(kind: &MessageDescriptor, message: &[u8]) -> Result<(Vec<u8>, DynamicMessage), Status> {
    let failed =
        |error: &dyn std::fmt::Display| Status::internal(format!("the answer cannot be told in JSON: {error}"));
    let message = DynamicMessage::decode(kind.clone(), message).map_err(|error| failed(&error))?;
    let mut writer = serde_json::Serializer::new(Vec::new());
    let options = SerializeOptions::new().use_proto_field_name(true);
    message.serialize_with_options(&mut writer, &options).map_err(|error| failed(&error))?;
    Ok((writer.into_inner(), message))
}

fn is_replayed(message: &DynamicMessage) -> bool {
    message
        .get_field_by_name("header")
        .and_then(|header| header.as_message()?.get_field_by_name("replayed")?.as_bool())
        .unwrap_or(false)
}

fn error_response(face: Face, status: &Status) -> Response<Body> {
    if face == Face::NativeJson {
        return problem_response(status);
    }
    let mut response = Response::new(full(etcd_error(status).to_string()));
    *response.status_mut() = status.code.http();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// etcd's form: a `google.rpc.Status` without details.
fn etcd_error(status: &Status) -> serde_json::Value {
    json!({ "code": status.code.number(), "message": status.message })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_match_whole_paths() {
        let check = |template: &str, path: &str, expected: Option<&[(&str, &str)]>| {
            let found = Template::parse(template).matches(path);
            let expected = expected.map(|pairs| pairs.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect());
            assert_eq!(found, expected, "{template} against {path}");
        };
        check("/v1/locks:acquire", "/v1/locks:acquire", Some(&[]));
        check("/v1/locks:acquire", "/v1/locks", None);
        check("/v1/locks/{name=**}", "/v1/locks/a/b:c", Some(&[("name", "a/b:c")]));
        check("/v1/locks/{name=**}", "/v1/locks/", Some(&[("name", "")]));
        check("/v1/locks/{name=**}", "/v1/locks", None);
        check("/v1/sessions/{id}", "/v1/sessions/7", Some(&[("id", "7")]));
        check("/v1/sessions/{id}", "/v1/sessions/", None);
        check("/v1/sessions/{id}", "/v1/sessions/7/8", None);
    }
}
