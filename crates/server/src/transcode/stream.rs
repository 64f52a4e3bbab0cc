//! Streams over HTTP: one JSON object per line, as etcd's gateway writes them, or server-sent events.
//!
//! Promises. L1: an answer whose message has a text field `resume` carries it as the `id` of its event; a browser gives the last one back in
//! `Last-Event-ID`, which becomes the field `resume` of the request. L2: a call that is refused at once has the status of its refusal, so a browser
//! does not ask again. L3: silence is broken by a comment, so that nothing between takes the connection for dead.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{self, HeaderValue};
use http::{Response, StatusCode};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;
use prost::Message as _;
use prost_reflect::{DynamicMessage, MessageDescriptor, Value};
use serde_json::json;

use super::{JSON_FACTOR, Rule, etcd_error, etcd_json, problem, to_json, too_large};
use crate::front::{App, Bell, Body, BoxError};
use crate::rpc::{Call, Code, Deframer, Face, Incoming, Outgoing, OutgoingReader, Status, StreamFn, StreamFuture};

/// Lines are joined up to about this size for one write.
const CHUNK_BYTES: usize = 16 << 10;
/// A stream of events that has not begun by then is told to be connected.
const FIRST_EVENT: Duration = Duration::from_millis(250);
/// A stream of events that is silent for so long sends a comment.
const SILENCE: Duration = Duration::from_secs(15);

pub(super) async fn stream_response(
    app: &Arc<App>,
    rule: &Rule,
    method: &StreamFn,
    call: Call,
    Requests(requests): Requests,
    events: bool,
) -> Response<Body> {
    let (face, deadline, peer) = (call.face, call.deadline, call.peer);
    let (outgoing, reader) = Outgoing::new(app.config.outgoing_bytes_max);
    if let Some(figures) = app.calls.get(rule.grpc_path.as_str()) {
        figures.start();
    }
    let mut answers = JsonAnswers {
        service: method(call, requests, outgoing),
        reader,
        deframer: Deframer::new(usize::MAX),
        kind: rule.method.output(),
        face,
        events,
        silence: Box::pin(tokio::time::sleep(SILENCE)),
        phase: Phase::Running,
        timer: deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline))),
        bell: app.stop.bell(),
        end: CallEnd { app: app.clone(), path: rule.grpc_path.clone(), peer, code: Code::Cancelled },
    };
    // The status line waits for the first message, so that a call that is refused has the status of its refusal. Clients of
    // events want to know soon that they are connected.
    let chunk = std::future::poll_fn(|cx| answers.poll_chunk(cx));
    let first = if events {
        let connected = || Ok(Some(Bytes::from_static(b": connected\n\n")));
        tokio::time::timeout(FIRST_EVENT, chunk).await.unwrap_or_else(|_| connected())
    } else {
        chunk.await
    };
    let (status, first) = match first {
        Ok(first) => (StatusCode::OK, first.unwrap_or_default()),
        Err(status) if face == Face::NativeJson => return problem::problem_response(&status),
        Err(status) => (status.code.http(), answers.error_line(&status)),
    };
    let mut response = Response::new(JsonBody { first, answers }.boxed_unsync());
    *response.status_mut() = status;
    let kind = if events { "text/event-stream" } else { "application/json" };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if events {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

/// The requests of a stream.
pub(super) struct Requests(Incoming);

impl Requests {
    /// The one request of a native stream. It is not its end: the client listens on.
    pub(super) fn one(message: Bytes) -> Self {
        use tokio_stream::StreamExt as _;
        Self(Incoming::from_stream(tokio_stream::once(Ok(message)).chain(tokio_stream::pending())))
    }

    pub(super) fn of_body(app: &Arc<App>, rule: &Rule, body: Body) -> Self {
        Self(Incoming::from_stream(JsonMessages {
            body,
            buffer: BytesMut::new(),
            kind: rule.method.input(),
            message_bytes_max: app.config.message_bytes_max_of(&rule.grpc_path),
            count: 0,
            ended: false,
            // The one request of a watch over HTTP is not its end: the client listens on.
            stays_open: rule.method.name() == "Watch",
        }))
    }
}

/// The JSON objects of a request body, each as soon as it is whole.
struct JsonMessages {
    body: Body,
    buffer: BytesMut,
    kind: MessageDescriptor,
    message_bytes_max: usize,
    count: u64,
    ended: bool,
    stays_open: bool,
}

impl tokio_stream::Stream for JsonMessages {
    type Item = Result<Bytes, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some((message, len)) = etcd_json::next_message(&self.kind, &self.buffer)? {
                let _ = self.buffer.split_to(len);
                self.count += 1;
                return Poll::Ready(Some(Ok(message.encode_to_vec().into())));
            }
            if self.ended {
                return self.end();
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                None => self.ended = true,
                Some(Err(_)) => return Poll::Ready(Some(Err(Status::new(Code::Cancelled, "context canceled")))),
                Some(Ok(frame)) => {
                    let Ok(data) = frame.into_data() else { continue };
                    self.buffer.extend_from_slice(&data);
                    let max = self.message_bytes_max * JSON_FACTOR;
                    if self.buffer.len() > max {
                        return Poll::Ready(Some(Err(too_large(self.buffer.len(), max))));
                    }
                }
            }
        }
    }
}

impl JsonMessages {
    fn end(&mut self) -> Poll<Option<Result<Bytes, Status>>> {
        if self.buffer.iter().any(|byte| !byte.is_ascii_whitespace()) {
            self.buffer.clear();
            return Poll::Ready(Some(Err(Status::invalid_argument("unexpected EOF"))));
        }
        // Nobody wakes this again, and nobody needs to: the call ends when the client goes away.
        if self.stays_open && self.count > 0 { Poll::Pending } else { Poll::Ready(None) }
    }
}

/// The answers of a running stream as chunks of text.
struct JsonAnswers {
    service: StreamFuture,
    reader: OutgoingReader,
    deframer: Deframer,
    kind: MessageDescriptor,
    face: Face,
    events: bool,
    /// Rings after a time without an answer.
    silence: Pin<Box<tokio::time::Sleep>>,
    phase: Phase,
    timer: Option<Pin<Box<tokio::time::Sleep>>>,
    bell: Bell,
    end: CallEnd,
}

enum Phase {
    Running,
    /// The service is done; what it sent is still passed on.
    Draining(Result<(), Status>),
    Over,
}

/// Counts the call once, however it ends.
struct CallEnd {
    app: Arc<App>,
    path: String,
    peer: Option<SocketAddr>,
    code: Code,
}

impl Drop for CallEnd {
    fn drop(&mut self) {
        if let Some(figures) = self.app.calls.get(self.path.as_str()) {
            figures.end(self.code);
        }
        tracing::trace!(peer = ?self.peer, path = self.path, code = self.code.name(), "a JSON stream ended");
    }
}

impl JsonAnswers {
    /// The next chunk of lines; `None` at the end, an error instead of the last line.
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Status>> {
        if matches!(self.phase, Phase::Running) {
            if let Poll::Ready(result) = self.service.as_mut().poll(cx) {
                self.phase = Phase::Draining(result);
            } else if self.bell.has_rung(&self.end.app.stop, cx) {
                self.phase = Phase::Draining(Err(Status::unavailable("etcdserver: server stopped")));
            } else if self.timer.as_mut().is_some_and(|timer| timer.as_mut().poll(cx).is_ready()) {
                self.phase = Phase::Draining(Err(Status::new(Code::DeadlineExceeded, "context deadline exceeded")));
            }
        }
        let mut chunk = BytesMut::new();
        while chunk.len() < CHUNK_BYTES {
            if let Some(message) = self.deframer.next()? {
                let (text, message) = to_json(&self.kind, &message)?;
                self.line(&text, &message, &mut chunk);
                continue;
            }
            match self.reader.poll_take(cx) {
                Poll::Ready(frames) => self.deframer.push(frames),
                Poll::Pending => break,
            }
        }
        if chunk.is_empty() && self.events && self.silence.as_mut().poll(cx).is_ready() {
            chunk.put_slice(b": still here\n\n");
        }
        if !chunk.is_empty() {
            self.silence.as_mut().reset(tokio::time::Instant::now() + SILENCE);
            return Poll::Ready(Ok(Some(chunk.freeze())));
        }
        match std::mem::replace(&mut self.phase, Phase::Over) {
            Phase::Running => {
                self.phase = Phase::Running;
                Poll::Pending
            }
            Phase::Draining(Ok(())) => {
                self.end.code = Code::Ok;
                Poll::Ready(Ok(None))
            }
            Phase::Draining(Err(status)) => {
                self.end.code = status.code;
                Poll::Ready(Err(status))
            }
            Phase::Over => Poll::Ready(Ok(None)),
        }
    }

    fn line(&self, json: &[u8], message: &DynamicMessage, out: &mut BytesMut) {
        if self.events {
            let resume = message.get_field_by_name("resume");
            if let Some(id) = resume.as_deref().and_then(Value::as_str).filter(|id| !id.is_empty()) {
                out.put_slice(b"id: ");
                out.put_slice(id.as_bytes());
                out.put_slice(b"\n");
            }
            out.put_slice(b"data: ");
            out.put_slice(json);
            out.put_slice(b"\n\n");
            return;
        }
        out.put_slice(b"{\"result\":");
        out.put_slice(json);
        out.put_slice(b"}\n");
    }

    fn error_line(&self, status: &Status) -> Bytes {
        let body = match self.face {
            Face::NativeJson => problem::problem_json(status),
            _ => etcd_error(status),
        };
        if self.events {
            return format!("event: error\ndata: {body}\n\n").into();
        }
        format!("{}\n", json!({ "error": body })).into()
    }
}

struct JsonBody {
    first: Bytes,
    answers: JsonAnswers,
}

impl http_body::Body for JsonBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if !self.first.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.first)))));
        }
        match ready!(self.answers.poll_chunk(cx)) {
            Ok(Some(chunk)) => Poll::Ready(Some(Ok(Frame::data(chunk)))),
            Ok(None) => Poll::Ready(None),
            Err(status) => Poll::Ready(Some(Ok(Frame::data(self.answers.error_line(&status))))),
        }
    }
}
