//! The plain pages beside the calls: what is here, version, health, metrics.
//!
//! Promises. P1: `/livez` never fails for a lost quorum, `/readyz` does. P2: `/health`, `/livez`, `/readyz` and `/version` answer as etcd
//! 3.7 does, since clients and probes choose by them. P3: no page waits longer than its limit for a check.
//! Not promised. No page needs a login yet: the front listens on loopback unless told otherwise.
//! Relies on. The member tells its facts through [`Health`].

use std::borrow::Cow;
use std::fmt::Write as _;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use http::{Method, Response, StatusCode, Uri};

use crate::front::{App, Body, full, plain};
use crate::metrics::Exposition;

/// The etcd release whose behaviour the etcd face follows, told by `/version` and Maintenance.Status.
pub const ETCD_VERSION: &str = "3.7.3";
/// What etcd calls the cluster version of such members.
pub const ETCD_CLUSTER_VERSION: &str = "3.7.0";

/// The longest that a page waits for one check.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);

pub type CheckFuture<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// One named check of `/livez` and `/readyz`.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    pub name: &'static str,
    /// Part of `/livez`: only what a restart would heal.
    pub live: bool,
    /// Part of `/readyz`.
    pub ready: bool,
}

/// The member's facts, as the pages need them.
pub trait Health: Send + Sync + 'static {
    /// The checks, in the order in which they are listed. etcd's names: `data_corruption`, `serializable_read` (also live),
    /// `linearizable_read`, `non_learner`.
    fn checks(&self) -> &'static [Check];

    /// Runs one of [`Health::checks`]; the error says what is wrong, in one line.
    fn run(&self, name: &'static str) -> CheckFuture<'_>;

    /// `/health`: an error is etcd's reason, such as `RAFT NO LEADER`, `ALARM NOSPACE` or `RANGE ERROR:...`. `serializable` asks for no
    /// quorum; alarms named in `excluded` (`NOSPACE`, `CORRUPT`) do not count.
    fn health(&self, serializable: bool, excluded: &[String]) -> CheckFuture<'_>;

    /// Adds the member's own metrics to the page. Those of the front and of the process are there already.
    fn metrics(&self, out: &mut Exposition);
}

const ROOT: &str = include_str!("root.html");

pub(crate) async fn serve(app: &App, verb: &Method, uri: &Uri) -> Response<Body> {
    let path = uri.path();
    let known = matches!(path, "/" | "/version" | "/health" | "/livez" | "/readyz" | "/metrics" | "/openapi.json");
    let subpath = path.strip_prefix("/livez/").or_else(|| path.strip_prefix("/readyz/"));
    if !known && subpath.is_none() {
        return plain(StatusCode::NOT_FOUND, "404 page not found\n");
    }
    if path == "/" && !matches!(*verb, Method::GET | Method::HEAD) {
        // As etcd, which has no page there.
        return plain(StatusCode::NOT_FOUND, "404 page not found\n");
    }
    if !matches!(*verb, Method::GET | Method::HEAD) {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed\n");
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
        return response;
    }
    let query = Query::parse(uri.query().unwrap_or_default());
    match path {
        "/" => typed("text/html; charset=utf-8", ROOT),
        "/version" => typed("application/json", version()),
        "/health" => health(app, &query).await,
        "/metrics" => typed("text/plain; version=0.0.4; charset=utf-8", app.metrics()),
        "/openapi.json" => typed("application/json", openapi(app)),
        _ => checks(app, path.starts_with("/livez"), subpath, &query).await,
    }
}

fn typed(kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn openapi(app: &App) -> Bytes {
    app.openapi.get_or_init(|| crate::openapi::document(app.transcoder()).into()).clone()
}

fn version() -> String {
    let (server, cluster) = (ETCD_VERSION, ETCD_CLUSTER_VERSION);
    format!(r#"{{"etcdserver":"{server}","etcdcluster":"{cluster}","storage":"{cluster}"}}"#)
}

async fn health(app: &App, query: &Query<'_>) -> Response<Body> {
    let serializable = query.first("serializable") == Some("true");
    let excluded: Vec<String> = query.all("exclude").map(str::to_owned).collect();
    match limited(app.health.health(serializable, &excluded)).await {
        Ok(()) => plain(StatusCode::OK, r#"{"health":"true","reason":""}"#),
        Err(reason) => {
            let reason = serde_json::Value::String(reason);
            let text = format!("{{\"health\":\"false\",\"reason\":{reason}}}\n");
            plain(StatusCode::SERVICE_UNAVAILABLE, text)
        }
    }
}

/// `/livez`, `/readyz`, and one check of theirs below them.
async fn checks(app: &App, live: bool, only: Option<&str>, query: &Query<'_>) -> Response<Body> {
    let listed = app.health.checks().iter().filter(|check| if live { check.live } else { check.ready });
    let wanted: Vec<_> = match only {
        Some(name) => listed.filter(|check| check.name == name).collect(),
        None => listed.filter(|check| query.all("exclude").all(|name| name != check.name)).collect(),
    };
    if only.is_some() && wanted.is_empty() {
        return plain(StatusCode::NOT_FOUND, "404 page not found\n");
    }
    let mut report = String::new();
    let mut is_well = true;
    for check in wanted {
        // Writing to a `String` cannot fail.
        let _ = match limited(app.health.run(check.name)).await {
            Ok(()) => writeln!(report, "[+]{} ok", check.name),
            Err(reason) => {
                is_well = false;
                writeln!(report, "[-]{} failed: {reason}", check.name)
            }
        };
    }
    if !is_well {
        return plain(StatusCode::SERVICE_UNAVAILABLE, report + "\n");
    }
    if query.first("verbose").is_none() {
        report.clear();
    }
    plain(StatusCode::OK, report + "ok\n")
}

async fn limited(check: CheckFuture<'_>) -> Result<(), String> {
    tokio::time::timeout(CHECK_TIMEOUT, check).await.unwrap_or_else(|_| Err("context deadline exceeded".into()))
}

/// The parameters of a URL, percent-decoded.
pub(crate) struct Query<'a> {
    pairs: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

impl<'a> Query<'a> {
    /// Invalid UTF-8 is replaced: no parameter of a page has use for it.
    pub(crate) fn parse(query: &'a str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode_lossy(name), decode_lossy(value))
        });
        Self { pairs: pairs.collect() }
    }

    pub(crate) fn all<'q>(&'q self, name: &'q str) -> impl Iterator<Item = &'q str> {
        self.pairs.iter().filter(move |(known, _)| known == name).map(|(_, value)| value.as_ref())
    }

    pub(crate) fn first<'q>(&'q self, name: &'q str) -> Option<&'q str> {
        self.all(name).next()
    }
}

fn decode_lossy(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let bytes = percent_decode(&text.replace('+', " "));
    Cow::Owned(String::from_utf8_lossy(&bytes).into_owned())
}

/// Replaces `%XX` by its byte; anything else stays as it is.
pub(crate) fn percent_decode(text: &str) -> Vec<u8> {
    let hex = |digit: Option<&u8>| char::from(*digit?).to_digit(16);
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = (bytes[at] == b'%').then(|| Some(hex(bytes.get(at + 1))? * 16 + hex(bytes.get(at + 2))?));
        match escaped.flatten().and_then(|byte| u8::try_from(byte).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("verbose&exclude=a%20b&exclude=c+d&x=%zz");
        assert_eq!(query.first("verbose"), Some(""));
        assert_eq!(query.all("exclude").collect::<Vec<_>>(), ["a b", "c d"]);
        assert_eq!(query.first("x"), Some("%zz"));
        assert_eq!(query.first("y"), None);
    }
}
