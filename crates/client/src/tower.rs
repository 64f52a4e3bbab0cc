//! Idempotency keys for HTTP services: a layer for axum and for every other tower service (feature `tower`).
//!
//! Promises. A request with an `Idempotency-Key` reaches the service once per key, scope and retention, over all processes that use the same Tenure; who
//! repeats it gets the stored answer with `Idempotent-Replayed: true`. Another request under the key is refused with 422, one that is still running with
//! 409 and `Retry-After`, a missing key with 400 where one is required; all of them as problem+json with a stable `type`. Safe methods pass.
//! The work of a request goes on to its end though its caller hangs up. If Tenure cannot be asked the request is refused with 503 and nothing runs.
//! Not promised. That the service runs once when its process stalls past the lease: the extension [`Attempt`] gives it a token and checkpoints for that.
//! Relies on. The principal that the extractor finds in the request: it is part of the scope, so keys of two callers never meet. Without
//! an extractor all callers share their keys.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use axum::{Router, routing::post};
//! use tenure_client::{Client, tower::IdempotencyLayer};
//!
//! let client = Client::connect(["127.0.0.1:2379"]).await?;
//! let keys = IdempotencyLayer::new(&client)
//!     .required(true)
//!     .principal(|request| request.headers.get("x-user")?.to_str().ok().map(str::to_owned));
//! let app = Router::new().route("/orders", post(|| async { "created" })).layer(keys);
//! # let _: Router = app;
//! # Ok(()) }
//! ```

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AGE, CONTENT_TYPE, HeaderName, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, request::Parts};
use http_body::Body;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tower_layer::Layer;
use tower_service::Service;

use crate::client::Client;
use crate::error::{Code, Error};
use crate::idempotent::{Attempt, Begun, Fingerprint, Idempotent, Replay, StoredResult, Takeover};

/// The header that names the key.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// `true` in an answer that was stored before.
pub const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// In an answer of the service: `final` stores it whatever its status, `retryable` gives the key free. It is not passed on.
pub const IDEMPOTENCY_OUTCOME: HeaderName = HeaderName::from_static("idempotency-outcome");
/// In a replay: for how many seconds the key has been known.
pub const IDEMPOTENCY_FIRST_SEEN: HeaderName = HeaderName::from_static("idempotency-first-seen");
/// Problems have a type of this prefix and one of the names below.
pub const PROBLEM_TYPES: &str = "urn:tenure:idempotency:";

/// Headers that are stored with an answer. What says who is logged in, when and over which connection never is.
const STORED_HEADERS: [&str; 7] =
    ["content-type", "location", "etag", "content-language", "cache-control", "link", "retry-after"];
/// The way in which fingerprints are made here; another way has another name, and the two are never compared.
const ALGORITHM: &str = "sha256-http-1";
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// What becomes of an attempt by its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is stored and replayed.
    Store,
    /// Nothing ran, or it may pass later: the key is free.
    Release,
    /// Nobody knows what happened: the attempt is left, to be taken over or decided upon.
    Ambiguous,
}

/// The rule by which answers are judged unless they say it themselves ([`IDEMPOTENCY_OUTCOME`]).
pub type Judge = fn(StatusCode) -> Verdict;

/// 2xx, 3xx and 4xx are stored, except 401, 403, 408, 409, 425 and 429, which give the key free; 5xx is ambiguous.
#[must_use]
pub fn standard(status: StatusCode) -> Verdict {
    match status.as_u16() {
        401 | 403 | 408 | 409 | 425 | 429 => Verdict::Release,
        500.. => Verdict::Ambiguous,
        _ => Verdict::Store,
    }
}

/// As [`standard`], and 500 is stored too.
#[must_use]
pub fn keep_errors(status: StatusCode) -> Verdict {
    if status == StatusCode::INTERNAL_SERVER_ERROR { Verdict::Store } else { standard(status) }
}

/// Only 2xx is stored; 5xx is ambiguous, everything else gives the key free.
#[must_use]
pub fn success_only(status: StatusCode) -> Verdict {
    match status.as_u16() {
        200..=299 => Verdict::Store,
        500.. => Verdict::Ambiguous,
        _ => Verdict::Release,
    }
}

/// How the body counts for the fingerprint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BodyPrint {
    /// Every byte.
    #[default]
    Raw,
    /// A JSON document whatever the order of its fields and its spaces, without what these pointers (RFC 6901) name. What is no JSON counts as it is.
    Json {
        /// Such as `/sent_at`.
        exclude: Vec<String>,
    },
}

type Principal = Arc<dyn Fn(&Parts) -> Option<String> + Send + Sync>;

/// Gives a service idempotency keys.
#[derive(Clone)]
pub struct IdempotencyLayer {
    settings: Arc<Settings>,
}

#[derive(Clone)]
struct Settings {
    records: Idempotent,
    required: bool,
    principal: Option<Principal>,
    judge: Judge,
    request_bytes_max: usize,
    body: BodyPrint,
    headers: Vec<HeaderName>,
    stored_headers: Vec<HeaderName>,
}

impl std::fmt::Debug for IdempotencyLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdempotencyLayer").field("records", &self.settings.records).finish_non_exhaustive()
    }
}

impl IdempotencyLayer {
    /// With the defaults of [`Client::idempotent`]; keys are not required.
    #[must_use]
    pub fn new(client: &Client) -> Self {
        let settings = Settings {
            records: client.idempotent(""),
            required: false,
            principal: None,
            judge: standard,
            request_bytes_max: REQUEST_BYTES_MAX,
            body: BodyPrint::Raw,
            headers: Vec::new(),
            stored_headers: STORED_HEADERS.map(HeaderName::from_static).to_vec(),
        };
        Self { settings: Arc::new(settings) }
    }

    fn with(mut self, change: impl FnOnce(&mut Settings)) -> Self {
        change(Arc::make_mut(&mut self.settings));
        self
    }

    /// Whether POST and PATCH without a key are refused.
    #[must_use]
    pub fn required(self, required: bool) -> Self {
        self.with(|it| it.required = required)
    }

    /// Who calls, as the service has authenticated it; `None` from it refuses a request that has a key (401).
    #[must_use]
    pub fn principal(self, of: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Self {
        self.with(|it| it.principal = Some(Arc::new(of)))
    }

    /// The rule by which answers are stored: [`standard`] by default.
    #[must_use]
    pub fn judge(self, judge: Judge) -> Self {
        self.with(|it| it.judge = judge)
    }

    /// How long an answer is kept: a minute to 30 days, 24 h by default.
    #[must_use]
    pub fn retention(self, retention: Duration) -> Self {
        self.with(|it| it.records = it.records.clone().retention(retention))
    }

    /// The lease of an attempt between heartbeats: 1 s to 1 h, 60 s by default.
    #[must_use]
    pub fn attempt_ttl(self, ttl: Duration) -> Self {
        self.with(|it| it.records = it.records.clone().attempt_ttl(ttl))
    }

    /// How long a repeated request waits for the one that runs, before it is told 409; by default not at all.
    #[must_use]
    pub fn wait(self, wait: Duration) -> Self {
        self.with(|it| it.records = it.records.clone().wait(wait))
    }

    /// What follows an attempt that died or whose outcome is ambiguous: by default the next request takes over.
    #[must_use]
    pub fn takeover(self, takeover: Takeover) -> Self {
        self.with(|it| it.records = it.records.clone().takeover(takeover))
    }

    /// Bytes of a request body that are read, 1 MiB by default: above it 413.
    #[must_use]
    pub fn request_bytes_max(self, max: usize) -> Self {
        self.with(|it| it.request_bytes_max = max)
    }

    /// How the body counts for the fingerprint.
    #[must_use]
    pub fn body_print(self, body: BodyPrint) -> Self {
        self.with(|it| it.body = body)
    }

    /// Headers that count for the fingerprint beside `content-type`.
    #[must_use]
    pub fn fingerprint_headers(self, headers: impl IntoIterator<Item = HeaderName>) -> Self {
        self.with(|it| it.headers = headers.into_iter().collect())
    }

    /// One more header that is stored with an answer. `set-cookie` is not for storing.
    #[must_use]
    pub fn store_header(self, header: HeaderName) -> Self {
        self.with(|it| {
            if header != http::header::SET_COOKIE {
                it.stored_headers.push(header);
            }
        })
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = IdempotencyService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        IdempotencyService { inner, settings: self.settings.clone() }
    }
}

/// A service with idempotency keys; made by [`IdempotencyLayer`].
#[derive(Clone)]
pub struct IdempotencyService<S> {
    inner: S,
    settings: Arc<Settings>,
}

impl<S> std::fmt::Debug for IdempotencyService<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IdempotencyService").finish_non_exhaustive()
    }
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl<S, B, R> Service<Request<B>> for IdempotencyService<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: Body<Data = Bytes> + From<Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
    R: Body<Data = Bytes> + From<Bytes> + Send + 'static,
    R::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = BoxFuture<Result<Response<R>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The one that is ready is the one that is called.
        let spare = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, spare);
        let settings = self.settings.clone();
        let (parts, body) = request.into_parts();
        let key = match key_of(&settings, &parts) {
            Ok(Some(key)) => key,
            Ok(None) => return Box::pin(inner.call(Request::from_parts(parts, body))),
            Err(refusal) => return Box::pin(async { Ok(refusal.answer()) }),
        };
        Box::pin(async move {
            let begun = match prepare(&settings, parts, body, &key).await {
                Ok(begun) => begun,
                Err(refusal) => return Ok(refusal.answer()),
            };
            let (attempt, request) = match begun {
                Prepared::Run(attempt, request) => (attempt, *request),
                Prepared::Replay(replay) => return Ok(replayed(*replay)),
            };
            // A caller that hangs up does not stop what has begun.
            let work = tokio::spawn(async move {
                let answer = tokio::select! {
                    _ = attempt.fenced() => return Ok(Refusal::superseded().answer()),
                    answer = inner.call(request) => answer,
                };
                match answer {
                    Ok(answer) => Ok(store(&settings, &attempt, answer).await),
                    Err(error) => {
                        leave(&attempt).await;
                        Err(error)
                    }
                }
            });
            match work.await {
                Ok(answer) => answer,
                Err(panic) => match panic.try_into_panic() {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(_) => Ok(Refusal::unavailable("the service is stopping").answer()),
                },
            }
        })
    }
}

enum Prepared<B> {
    Run(Attempt, Box<Request<B>>),
    Replay(Box<Replay>),
}

/// Reads the request whole and begins its key.
async fn prepare<B>(settings: &Settings, mut parts: Parts, body: B, key: &str) -> Result<Prepared<B>, Refusal>
where
    B: Body<Data = Bytes> + From<Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let scope = scope_of(settings, &parts)?;
    let body = Limited::new(body, settings.request_bytes_max).collect().await.map_err(|error| {
        if error.downcast_ref::<LengthLimitError>().is_some() {
            Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, "request-too-large", "the body is too large")
        } else {
            Refusal::new(StatusCode::BAD_REQUEST, "request-unreadable", "the body could not be read")
        }
    })?;
    let body = body.to_bytes();
    let records = settings.records.clone().scope(scope).fingerprint(fingerprint(settings, &parts, &body));
    match records.begin(key).await {
        Ok(Begun::Granted(attempt)) => {
            parts.extensions.insert(attempt.clone());
            Ok(Prepared::Run(attempt, Box::new(Request::from_parts(parts, B::from(body)))))
        }
        Ok(Begun::Replay(replay)) => Ok(Prepared::Replay(Box::new(replay))),
        Ok(Begun::InFlight(flight)) => {
            let why = "a request with this key is still being worked on";
            Err(Refusal::new(StatusCode::CONFLICT, "in-flight", why).retry_after(flight.retry_after))
        }
        Err(error) => Err(Refusal::of(&error)),
    }
}

/// The key, `None` if the request has none and needs none.
fn key_of(settings: &Settings, parts: &Parts) -> Result<Option<String>, Refusal> {
    if parts.method.is_safe() {
        return Ok(None);
    }
    let bad = |why| Refusal::new(StatusCode::BAD_REQUEST, "key-malformed", why);
    let mut values = parts.headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else {
        let needs_one = settings.required && [Method::POST, Method::PATCH].contains(&parts.method);
        let why = "this request needs the header Idempotency-Key";
        return if needs_one { Err(Refusal::new(StatusCode::BAD_REQUEST, "key-missing", why)) } else { Ok(None) };
    };
    if values.next().is_some() {
        return Err(bad("a request has one Idempotency-Key"));
    }
    let text = value.to_str().map_err(|_| bad("the key has characters that are not ASCII"))?.trim();
    let key = if text.starts_with('"') {
        unquoted(text).ok_or_else(|| bad("the quotes of the key are wrong"))?
    } else {
        text.to_owned()
    };
    if key.is_empty() || key.len() > 255 {
        return Err(bad("a key has 1 to 255 characters"));
    }
    Ok(Some(key))
}

/// A string of RFC 9651. Parameters after it are not part of the key.
fn unquoted(text: &str) -> Option<String> {
    let mut key = String::new();
    let mut rest = text.strip_prefix('"')?.chars();
    loop {
        match rest.next()? {
            '"' => break,
            '\\' => match rest.next()? {
                escaped @ ('"' | '\\') => key.push(escaped),
                _ => return None,
            },
            plain => key.push(plain),
        }
    }
    let after = rest.as_str().trim_start();
    (after.is_empty() || after.starts_with(';')).then_some(key)
}

/// Principal, method and path: keys of two callers or of two routes never meet.
fn scope_of(settings: &Settings, parts: &Parts) -> Result<String, Refusal> {
    let principal = match &settings.principal {
        None => String::new(),
        Some(of) => of(parts).ok_or_else(|| {
            Refusal::new(StatusCode::UNAUTHORIZED, "principal-missing", "a request with a key says who sends it")
        })?,
    };
    // Names of any length and content make a scope of its own.
    let scope = format!("{principal} {} {}", parts.method, parts.uri.path());
    let plain = scope.len() <= 1_024 && !scope.chars().any(char::is_control) && !principal.contains(' ');
    if plain {
        return Ok(scope);
    }
    let mut hash = Sha256::new();
    for part in [principal.as_str(), parts.method.as_str(), parts.uri.path()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    Ok(format!("sha256:{}", crate::idempotent::hex(&hash.finalize())))
}

fn fingerprint(settings: &Settings, parts: &Parts, body: &Bytes) -> Fingerprint {
    let mut hash = Sha256::new();
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    };
    add(parts.method.as_str().as_bytes());
    add(parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str).as_bytes());
    for name in std::iter::once(&CONTENT_TYPE).chain(&settings.headers) {
        add(name.as_str().as_bytes());
        let values = parts.headers.get_all(name);
        add(&values.iter().map(HeaderValue::as_bytes).collect::<Vec<_>>().join(&b'\n'));
    }
    match &settings.body {
        BodyPrint::Raw => add(body),
        BodyPrint::Json { exclude } => match serde_json::from_slice::<Value>(body) {
            Ok(document) => add(canonical(document, exclude).as_bytes()),
            Err(_) => add(body),
        },
    }
    Fingerprint { algorithm: ALGORITHM.to_owned(), digest: hash.finalize().to_vec() }
}

fn canonical(mut document: Value, exclude: &[String]) -> String {
    for pointer in exclude {
        let Some((parent, name)) = pointer.rsplit_once('/') else { continue };
        let name = name.replace("~1", "/").replace("~0", "~");
        if let Some(Value::Object(fields)) = document.pointer_mut(parent) {
            fields.remove(&name);
        }
    }
    sorted(document).to_string()
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        Value::Object(fields) => {
            let fields: std::collections::BTreeMap<String, Value> =
                fields.into_iter().map(|(name, value)| (name, sorted(value))).collect();
            Value::Object(fields.into_iter().collect())
        }
        plain => plain,
    }
}

/// Judges an answer, ends the attempt by it, and gives it back whole.
async fn store<R>(settings: &Settings, attempt: &Attempt, answer: Response<R>) -> Response<R>
where
    R: Body<Data = Bytes> + From<Bytes>,
    R::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    let (mut parts, body) = answer.into_parts();
    let told = parts.headers.remove(IDEMPOTENCY_OUTCOME);
    let verdict = match told.as_ref().map(HeaderValue::as_bytes) {
        Some(b"final") => Verdict::Store,
        Some(b"retryable") => Verdict::Release,
        _ => (settings.judge)(parts.status),
    };
    let ended = match verdict {
        Verdict::Release => {
            let ended = attempt.release().await;
            log(attempt, &ended);
            return Response::from_parts(parts, body);
        }
        Verdict::Ambiguous => {
            leave(attempt).await;
            return Response::from_parts(parts, body);
        }
        Verdict::Store => body.collect().await,
    };
    let Ok(body) = ended else {
        // Half an answer is none: nobody knows what the other half would have been.
        leave(attempt).await;
        return Refusal::new(StatusCode::BAD_GATEWAY, "answer-broken", "the answer broke off").answer();
    };
    let body = body.to_bytes();
    let result = StoredResult {
        headers: stored_headers(settings, &parts.headers),
        ..StoredResult::new(body.clone()).status(u32::from(parts.status.as_u16()))
    };
    let ended = attempt.finish(&result, false).await;
    log(attempt, &ended);
    match ended {
        Err(error) if error.code() == Some(Code::Fenced) => Refusal::superseded().answer(),
        // It happened: to refuse it now would have it repeated.
        _ => Response::from_parts(parts, R::from(body)),
    }
}

fn stored_headers(settings: &Settings, headers: &HeaderMap) -> Vec<(String, String)> {
    let values =
        |name: &HeaderName| headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect::<Vec<_>>();
    let all = settings.stored_headers.iter();
    all.flat_map(|name| values(name).into_iter().map(|value| (name.to_string(), value.to_owned()))).collect()
}

async fn leave(attempt: &Attempt) {
    log(attempt, &attempt.abandon().await);
}

fn log(attempt: &Attempt, ended: &Result<(), Error>) {
    if let Err(error) = ended {
        tracing::warn!(%error, attempt = attempt.token(), "the end of an attempt was not stored");
    }
}

fn replayed<R: From<Bytes>>(replay: Replay) -> Response<R> {
    let mut answer = Response::new(R::from(replay.result.body));
    let status = u16::try_from(replay.result.status).ok().and_then(|code| StatusCode::from_u16(code).ok());
    *answer.status_mut() = status.unwrap_or(StatusCode::OK);
    for (name, value) in &replay.result.headers {
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            answer.headers_mut().append(name, value);
        }
    }
    let headers = answer.headers_mut();
    headers.insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    headers.insert(AGE, HeaderValue::from(replay.finished.as_secs()));
    headers.insert(IDEMPOTENCY_FIRST_SEEN, HeaderValue::from(replay.first_seen.as_secs()));
    answer
}

/// An answer of the layer itself.
struct Refusal {
    status: StatusCode,
    kind: &'static str,
    why: String,
    retry_after: Option<Duration>,
}

impl Refusal {
    fn new(status: StatusCode, kind: &'static str, why: impl Into<String>) -> Self {
        Self { status, kind, why: why.into(), retry_after: None }
    }

    fn retry_after(self, after: Duration) -> Self {
        Self { retry_after: Some(after), ..self }
    }

    fn superseded() -> Self {
        let why = "another attempt took over while this one was at work: ask again for its answer";
        Self::new(StatusCode::CONFLICT, "superseded", why).retry_after(Duration::from_secs(1))
    }

    fn unavailable(why: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", why).retry_after(Duration::from_secs(1))
    }

    fn of(error: &Error) -> Self {
        let why = error.to_string();
        match error.code() {
            Some(Code::Mismatch) => {
                let why = "the key was first used for another request";
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "mismatch", why)
            }
            Some(Code::NeedsReconcile) => {
                let why = "an earlier request with this key may have happened: it must be decided first";
                Self::new(StatusCode::CONFLICT, "needs-reconcile", why)
            }
            Some(Code::ResultNotRetained) => Self::new(StatusCode::CONFLICT, "result-not-retained", why),
            Some(Code::Invalid) => Self::new(StatusCode::BAD_REQUEST, "key-malformed", why),
            _ => Self::unavailable(why),
        }
    }

    fn answer<R: From<Bytes>>(self) -> Response<R> {
        let problem = serde_json::json!({
            "type": format!("{PROBLEM_TYPES}{}", self.kind),
            "title": self.status.canonical_reason().unwrap_or_default(),
            "status": self.status.as_u16(),
            "detail": self.why,
        });
        let mut answer = Response::new(R::from(problem.to_string().into()));
        *answer.status_mut() = self.status;
        answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(after) = self.retry_after {
            let seconds = after.as_millis().div_ceil(1_000).max(1);
            answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from(u64::try_from(seconds).unwrap_or(1)));
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_quoted_or_bare() {
        assert_eq!(unquoted(r#""8e03978e-40d5""#).as_deref(), Some("8e03978e-40d5"));
        assert_eq!(unquoted(r#""a\"b\\c" ; v=1"#).as_deref(), Some(r#"a"b\c"#));
        for wrong in [r#""open"#, r#""a" b"#, r#""a\n""#] {
            assert_eq!(unquoted(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn json_counts_by_its_content() {
        let print = |text: &str| canonical(serde_json::from_str(text).unwrap(), &["/at".into(), "/a/b~1c".into()]);
        assert_eq!(print(r#"{"x": 1, "a": {"y": [2], "b/c": 3}, "at": "now"}"#), print(r#"{"a":{"y":[2]},"x":1}"#));
        assert_ne!(print(r#"{"x": 1}"#), print(r#"{"x": 2}"#));
    }

    #[test]
    fn answers_are_judged_by_their_status() {
        let judged = |code| standard(StatusCode::from_u16(code).unwrap());
        for code in [200, 201, 302, 400, 404, 422] {
            assert_eq!(judged(code), Verdict::Store, "{code}");
        }
        for code in [401, 403, 408, 409, 425, 429] {
            assert_eq!(judged(code), Verdict::Release, "{code}");
        }
        for code in [500, 502, 503, 504] {
            assert_eq!(judged(code), Verdict::Ambiguous, "{code}");
        }
        assert_eq!(keep_errors(StatusCode::INTERNAL_SERVER_ERROR), Verdict::Store);
        assert_eq!(success_only(StatusCode::NOT_FOUND), Verdict::Release);
    }
}
