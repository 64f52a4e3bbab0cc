//! gRPC over bare `h2`: five bytes before each message, the status in a trailer.
//!
//! The answer of a unary call is queued whole, head, message and trailer, before the connection writes: one system call. A call that
//! fails before it answered is one frame, "trailers only".

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use base64::Engine;
use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use http::{Method as Verb, Request, Response, StatusCode};
use tokio::time::{Instant, Sleep};

use super::App;
use super::body::Payload;
use super::http2::poll_room;
use crate::rpc::{Call, Code, Face, Incoming, Method, Outgoing, OutgoingReader, Status, StreamFuture, UnaryFn};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const GRPC_DETAILS: HeaderName = HeaderName::from_static("grpc-status-details-bin");

/// Small buffers of a stream are joined up to this size, so that many events cost one frame.
const GATHER_BYTES: usize = 16 << 10;

/// Whether the request is gRPC, and not gRPC-Web or anything else that only begins so.
pub(super) fn is_grpc<B>(request: &Request<B>) -> bool {
    let Some(kind) = request.headers().get(CONTENT_TYPE) else { return false };
    match kind.as_bytes().strip_prefix(b"application/grpc") {
        Some(rest) => matches!(rest.first(), None | Some(b'+' | b';')),
        None => false,
    }
}

/// The service of a method's path.
pub(super) fn service_of(path: &str) -> &str {
    path.strip_prefix('/').and_then(|rest| rest.rsplit_once('/')).map_or("", |(service, _)| service)
}

pub(super) async fn call(
    app: &Arc<App>,
    peer: SocketAddr,
    request: Request<RecvStream>,
    mut respond: SendResponse<Payload>,
) {
    let (head, body) = request.into_parts();
    if head.method != Verb::POST {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        // The stream may be gone already; so for every answer below.
        let _ = respond.send_response(response, true);
        return;
    }
    let path = head.uri.path();
    let Some(method) = app.router.find(path) else {
        refuse(&mut respond, &app.router.unknown(path));
        return;
    };
    let deadline = match admit(&head.headers) {
        Ok(deadline) => deadline,
        Err(status) => {
            refuse(&mut respond, &status);
            return;
        }
    };
    let figures = app.calls.get(path);
    if let Some(figures) = figures {
        figures.start();
    }
    let message_bytes_max = app.config.message_bytes_max_of(path);
    let call = Call { face: Face::Grpc, metadata: head.headers, peer: Some(peer), deadline };
    let incoming = Incoming::from_h2(body, message_bytes_max);
    let code = match method {
        Method::Unary(method) => unary(method, call, incoming, &mut respond).await,
        Method::Stream(method) => {
            let (outgoing, reader) = Outgoing::new(app.config.outgoing_bytes_max);
            let service = method(call, incoming, outgoing);
            // Boxed, so that the future of a unary call stays small.
            Box::pin(stream(app, service, reader, deadline, respond)).await
        }
    };
    if let Some(figures) = figures {
        figures.end(code);
    }
}

/// Reads what the headers say of the call: its deadline, and whether its messages can be read.
fn admit(headers: &HeaderMap) -> Result<Option<Instant>, Status> {
    if let Some(encoding) = headers.get("grpc-encoding").filter(|encoding| *encoding != "identity") {
        let encoding = String::from_utf8_lossy(encoding.as_bytes());
        let message = format!("grpc: Decompressor is not installed for grpc-encoding {encoding:?}");
        return Err(Status::unimplemented(message));
    }
    deadline(headers)
}

/// What `grpc-timeout` says, on any face.
pub(crate) fn deadline(headers: &HeaderMap) -> Result<Option<Instant>, Status> {
    let Some(timeout) = headers.get("grpc-timeout") else { return Ok(None) };
    let timeout = timeout.to_str().ok().and_then(parse_timeout);
    let timeout = timeout.ok_or_else(|| Status::internal("malformed grpc-timeout"))?;
    // A deadline beyond what the clock can count is none.
    Ok(Instant::now().checked_add(timeout))
}

fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// One message in, one out. The caller's reset or its deadline drops the future.
async fn unary(method: &UnaryFn, call: Call, mut incoming: Incoming, respond: &mut SendResponse<Payload>) -> Code {
    let deadline = call.deadline;
    let answer = async {
        match incoming.next().await {
            Some(Ok(message)) => {
                refuse_second(&mut incoming)?;
                method(call, message).await
            }
            Some(Err(status)) => Err(status),
            None => Err(Status::internal("EOF")),
        }
    };
    let mut answer = std::pin::pin!(answer);
    let mut timer: Option<Pin<Box<Sleep>>> = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
    let answer = std::future::poll_fn(|cx| {
        // The answer first: polling for a reset costs a lock, and an answer that is ready needs none.
        if let Poll::Ready(answer) = answer.as_mut().poll(cx) {
            return Poll::Ready(Some(answer));
        }
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(None);
        }
        if timer.as_mut().is_some_and(|timer| timer.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Some(Err(too_late())));
        }
        Poll::Pending
    })
    .await;
    match answer {
        Some(Ok(message)) => {
            reply(respond, message);
            Code::Ok
        }
        Some(Err(status)) => {
            refuse(respond, &status);
            status.code
        }
        None => Code::Cancelled,
    }
}

/// A unary call has one message; a second one that came with it is refused.
fn refuse_second(incoming: &mut Incoming) -> Result<(), Status> {
    match incoming.try_next_ready() {
        None => Ok(()),
        Some(Err(status)) => Err(status),
        Some(Ok(_)) => Err(Status::internal("grpc: a unary call got more than one request message")),
    }
}

fn too_late() -> Status {
    Status::new(Code::DeadlineExceeded, "context deadline exceeded")
}

fn head() -> Response<()> {
    let mut response = Response::new(());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn reply(respond: &mut SendResponse<Payload>, message: Bytes) {
    let Ok(mut send) = respond.send_response(head(), false) else { return };
    if send.send_data(Payload::message(message), false).is_ok() {
        let mut trailers = HeaderMap::with_capacity(1);
        trailers.insert(GRPC_STATUS, Code::Ok.header());
        let _ = send.send_trailers(trailers);
    }
}

/// The error of a call that has sent nothing yet.
fn refuse(respond: &mut SendResponse<Payload>, status: &Status) {
    let mut response = head();
    put_status(response.headers_mut(), status);
    let _ = respond.send_response(response, true);
}

fn put_status(headers: &mut HeaderMap, status: &Status) {
    headers.insert(GRPC_STATUS, status.code.header());
    if let Some(message) = message_header(&status.message) {
        headers.insert(GRPC_MESSAGE, message);
    }
    if !status.details.is_empty() {
        let text = base64::engine::general_purpose::STANDARD_NO_PAD.encode(&status.details);
        if let Ok(details) = HeaderValue::try_from(text) {
            headers.insert(GRPC_DETAILS, details);
        }
    }
}

/// The message with everything but printable ASCII percent-encoded, as the protocol has it. Absent when empty.
fn message_header(message: &str) -> Option<HeaderValue> {
    /// Clients refuse header lists above a limit of theirs, 16 KiB and more: a longer text would hide the code.
    const BYTES_MAX: usize = 4096;
    let mut text = String::with_capacity(message.len());
    for byte in message.bytes() {
        if text.len() > BYTES_MAX {
            break;
        }
        match byte {
            b'%' => text.push_str("%25"),
            0x20..=0x7e => text.push(char::from(byte)),
            byte => text.push_str(&format!("%{byte:02X}")),
        }
    }
    if text.is_empty() { None } else { HeaderValue::try_from(text).ok() }
}

/// Runs a stream's service and passes on what it sends, as fast as the caller reads.
async fn stream(
    app: &Arc<App>,
    service: StreamFuture,
    reader: OutgoingReader,
    deadline: Option<Instant>,
    respond: SendResponse<Payload>,
) -> Code {
    let mut bell = app.stop.bell();
    let mut timer = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
    let mut pump = Pump { service, reader, ended: None, unsent: VecDeque::new(), wire: Wire::Unanswered(respond) };
    std::future::poll_fn(|cx| {
        let rung = bell.has_rung(&app.stop, cx);
        let late = timer.as_mut().is_some_and(|timer| timer.as_mut().poll(cx).is_ready());
        if rung && pump.ended.is_none() {
            pump.ended = Some(Err(Status::unavailable("etcdserver: server stopped")));
        }
        if late {
            return Poll::Ready(pump.finish(Err(too_late())));
        }
        match pump.poll(cx) {
            Poll::Ready(Some(result)) => Poll::Ready(pump.finish(result)),
            Poll::Ready(None) => Poll::Ready(Code::Cancelled),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

struct Pump {
    service: StreamFuture,
    reader: OutgoingReader,
    /// How the service ended; what it sent before is still passed on.
    ended: Option<Result<(), Status>>,
    /// Taken from the reader, waiting for the peer's window.
    unsent: VecDeque<Bytes>,
    wire: Wire,
}

enum Wire {
    /// No headers were sent.
    Unanswered(SendResponse<Payload>),
    Open(SendStream<Payload>),
    Gone,
}

impl Wire {
    /// Sends the headers if they were not.
    fn open(&mut self) -> Option<&mut SendStream<Payload>> {
        if let Self::Unanswered(respond) = self {
            *self = respond.send_response(head(), false).map_or(Self::Gone, Self::Open);
        }
        match self {
            Self::Open(send) => Some(send),
            _ => None,
        }
    }

    /// Ready when the caller has gone.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self {
            Self::Unanswered(respond) => respond.poll_reset(cx).map(|_| ()),
            Self::Open(send) => send.poll_reset(cx).map(|_| ()),
            Self::Gone => Poll::Ready(()),
        }
    }
}

impl Pump {
    /// Ready with the end of the service once all is passed on, or with nothing when the caller has gone.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<(), Status>>> {
        if self.ended.is_none()
            && let Poll::Ready(result) = self.service.as_mut().poll(cx)
        {
            self.ended = Some(result);
        }
        loop {
            if self.unsent.is_empty() {
                if self.take(cx).is_ready() {
                    continue;
                }
                if let Some(result) = self.ended.take() {
                    return Poll::Ready(Some(result));
                }
                break;
            }
            match self.pass_on(cx) {
                Poll::Ready(true) => {}
                Poll::Ready(false) => return Poll::Ready(None),
                Poll::Pending => break,
            }
        }
        // A client may wait for the headers before it sends its first message.
        let open = self.wire.open().is_some();
        if !open || self.wire.poll_gone(cx).is_ready() { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Takes from the queue what makes one frame.
    fn take(&mut self, cx: &Context<'_>) -> Poll<()> {
        let first = std::task::ready!(self.reader.poll_take(cx));
        let Some(second) = self.reader.try_take_below(GATHER_BYTES.saturating_sub(first.len())) else {
            self.unsent.push_back(first);
            return Poll::Ready(());
        };
        let mut gathered = BytesMut::with_capacity(GATHER_BYTES);
        gathered.extend_from_slice(&first);
        gathered.extend_from_slice(&second);
        while let Some(next) = self.reader.try_take_below(GATHER_BYTES.saturating_sub(gathered.len())) {
            gathered.extend_from_slice(&next);
        }
        self.unsent.push_back(gathered.freeze());
        Poll::Ready(())
    }

    /// Sends what the window admits. `false`: the caller has gone.
    fn pass_on(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let Some(send) = self.wire.open() else { return Poll::Ready(false) };
        let Some(frames) = self.unsent.front_mut() else { return Poll::Ready(true) };
        let Ok(room) = std::task::ready!(poll_room(send, frames.len(), cx)) else { return Poll::Ready(false) };
        let part = frames.split_to(room);
        if frames.is_empty() {
            self.unsent.pop_front();
        }
        Poll::Ready(send.send_data(Payload::plain(part), false).is_ok())
    }

    fn finish(&mut self, result: Result<(), Status>) -> Code {
        let status = result.err().unwrap_or_else(|| Status::new(Code::Ok, ""));
        match std::mem::replace(&mut self.wire, Wire::Gone) {
            Wire::Unanswered(mut respond) => refuse(&mut respond, &status),
            Wire::Open(mut send) => {
                let mut trailers = HeaderMap::with_capacity(3);
                put_status(&mut trailers, &status);
                if !self.unsent.is_empty() || send.send_trailers(trailers).is_err() {
                    send.send_reset(Reason::CANCEL);
                }
            }
            Wire::Gone => {}
        }
        status.code
    }
}
