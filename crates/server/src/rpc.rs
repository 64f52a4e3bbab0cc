//! One shape for every call: what the services see of a request, whichever face it came through.
//!
//! Promises. R1: a service is written once, against bytes of protobuf messages, and serves gRPC, etcd's JSON and the native JSON
//! alike. R2: an [`Outgoing`] holds at most its limit plus one message per sender; a sender waits, or is told that there is no room, so a
//! slow reader costs bounded memory and delays nobody else. R3: an [`Incoming`] takes no more from the peer than the service asks for,
//! and lends the peer its window again only for what was taken. R4: when the caller goes away the future of its call is dropped and
//! every clone of its `Outgoing` is closed.
//! Not promised. A dropped call may still take effect: what was proposed is not undone.
//! Relies on. The front (`front/`) and the transcoder (`transcode.rs`) feed and drain these types; nothing here touches a socket.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The face a call came through. A service needs it only where the faces promise different things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Face {
    /// gRPC, both protocols.
    Grpc,
    /// `/v3/*`, as etcd's gateway.
    EtcdJson,
    /// `/v1/*`.
    NativeJson,
}

/// What is known of a call besides its message.
#[derive(Clone, Debug)]
pub struct Call {
    pub face: Face,
    /// gRPC metadata, or the HTTP headers.
    pub metadata: http::HeaderMap,
    /// Absent for a call made in process.
    pub peer: Option<SocketAddr>,
    /// From `grpc-timeout`. The front enforces it; a service may use it to refuse what cannot be done in time.
    pub deadline: Option<tokio::time::Instant>,
}

impl Call {
    /// A call without a peer or headers, for tests and for calls made in process.
    pub fn local(face: Face) -> Self {
        Self { face, metadata: http::HeaderMap::new(), peer: None, deadline: None }
    }
}

/// The gRPC codes, with their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Code {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

impl Code {
    pub const ALL: [Self; 17] = [
        Self::Ok,
        Self::Cancelled,
        Self::Unknown,
        Self::InvalidArgument,
        Self::DeadlineExceeded,
        Self::NotFound,
        Self::AlreadyExists,
        Self::PermissionDenied,
        Self::ResourceExhausted,
        Self::FailedPrecondition,
        Self::Aborted,
        Self::OutOfRange,
        Self::Unimplemented,
        Self::Internal,
        Self::Unavailable,
        Self::DataLoss,
        Self::Unauthenticated,
    ];

    pub fn number(self) -> u8 {
        self as u8
    }

    /// The number as it stands in the `grpc-status` header.
    pub fn header(self) -> http::HeaderValue {
        const TEXTS: [&str; 17] =
            ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16"];
        http::HeaderValue::from_static(TEXTS[self as usize])
    }

    /// The name that Go's `codes.Code` prints, which is also the label of `grpc_server_handled_total`.
    pub fn name(self) -> &'static str {
        const NAMES: [&str; 17] = [
            "OK",
            "Canceled",
            "Unknown",
            "InvalidArgument",
            "DeadlineExceeded",
            "NotFound",
            "AlreadyExists",
            "PermissionDenied",
            "ResourceExhausted",
            "FailedPrecondition",
            "Aborted",
            "OutOfRange",
            "Unimplemented",
            "Internal",
            "Unavailable",
            "DataLoss",
            "Unauthenticated",
        ];
        NAMES[self as usize]
    }

    /// The HTTP status that gRPC's JSON mapping gives a code.
    pub fn http(self) -> http::StatusCode {
        match self {
            Self::Ok => http::StatusCode::OK,
            // 499 is what proxies use for "the client closed the request"; it is always a valid number.
            Self::Cancelled => http::StatusCode::from_u16(499).unwrap_or(http::StatusCode::BAD_REQUEST),
            Self::InvalidArgument | Self::FailedPrecondition | Self::OutOfRange => http::StatusCode::BAD_REQUEST,
            Self::DeadlineExceeded => http::StatusCode::GATEWAY_TIMEOUT,
            Self::NotFound => http::StatusCode::NOT_FOUND,
            Self::AlreadyExists | Self::Aborted => http::StatusCode::CONFLICT,
            Self::PermissionDenied => http::StatusCode::FORBIDDEN,
            Self::ResourceExhausted => http::StatusCode::TOO_MANY_REQUESTS,
            Self::Unimplemented => http::StatusCode::NOT_IMPLEMENTED,
            Self::Unavailable => http::StatusCode::SERVICE_UNAVAILABLE,
            Self::Unauthenticated => http::StatusCode::UNAUTHORIZED,
            Self::Unknown | Self::Internal | Self::DataLoss => http::StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// Why a call did not succeed, for all faces at once.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    pub code: Code,
    pub message: String,
    /// An encoded `google.rpc.Status` for `grpc-status-details-bin`; empty when there is nothing to add.
    pub details: Bytes,
    /// The facts of a native refusal, for problem+json. Boxed: most statuses have none.
    pub problem: Option<Box<tenure_wire::tenure::v1::Error>>,
}

impl Status {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: Bytes::new(), problem: None }
    }

    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(Code::InvalidArgument, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NotFound, message)
    }

    pub fn unimplemented(message: impl Into<String>) -> Self {
        Self::new(Code::Unimplemented, message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Code::Unavailable, message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// A request whose bytes are not the message that the method takes.
    ///
    /// A field of the wrong wire type is refused. Go's decoder takes it for an unknown field, and mostly ends in the same code, because
    /// what the field should have said is then missing.
    pub fn undecodable(error: &prost::DecodeError) -> Self {
        let text = error.to_string();
        let code = if text.contains("invalid wire type") { Code::InvalidArgument } else { Code::Internal };
        Self::new(code, format!("grpc: error unmarshalling request: {text}"))
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code.name(), self.message)
    }
}

impl std::error::Error for Status {}

pub type UnaryFuture = Pin<Box<dyn Future<Output = Result<Bytes, Status>> + Send>>;
pub type StreamFuture = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;
pub type UnaryFn = Arc<dyn Fn(Call, Bytes) -> UnaryFuture + Send + Sync>;
pub type StreamFn = Arc<dyn Fn(Call, Incoming, Outgoing) -> StreamFuture + Send + Sync>;

/// One method: one message in and one out, or two streams (a server stream takes its one message from `Incoming`).
#[derive(Clone)]
pub enum Method {
    Unary(UnaryFn),
    Stream(StreamFn),
}

/// Methods by path, such as `/etcdserverpb.KV/Put`. Filled at start, read-only afterwards.
#[derive(Default)]
pub struct Router {
    methods: HashMap<&'static str, Method>,
    /// How the pipeline plans the changes that it takes by path.
    pub(crate) plans: crate::native::Plans,
}

impl Router {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn unary<F, R>(&mut self, path: &'static str, method: F)
    where
        F: Fn(Call, Bytes) -> R + Send + Sync + 'static,
        R: Future<Output = Result<Bytes, Status>> + Send + 'static,
    {
        let method: UnaryFn = Arc::new(move |call, message| Box::pin(method(call, message)));
        self.insert(path, Method::Unary(method));
    }

    pub fn stream<F, R>(&mut self, path: &'static str, method: F)
    where
        F: Fn(Call, Incoming, Outgoing) -> R + Send + Sync + 'static,
        R: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let method: StreamFn = Arc::new(move |call, incoming, outgoing| Box::pin(method(call, incoming, outgoing)));
        self.insert(path, Method::Stream(method));
    }

    fn insert(&mut self, path: &'static str, method: Method) {
        let before = self.methods.insert(path, method);
        assert!(before.is_none(), "method {path} is mounted twice");
    }

    pub fn find(&self, path: &str) -> Option<&Method> {
        self.methods.get(path)
    }

    /// Every mounted path, in no order.
    pub fn paths(&self) -> impl Iterator<Item = &'static str> {
        self.methods.keys().copied()
    }

    /// The answer to a path that is not mounted, worded as Go's gRPC server does, since clients show it.
    pub fn unknown(&self, path: &str) -> Status {
        let Some((service, method)) = path.strip_prefix('/').and_then(|rest| rest.rsplit_once('/')) else {
            return Status::unimplemented(format!("malformed method name: {path:?}"));
        };
        let of_service = |known: &str| known[1..].rsplit_once('/').is_some_and(|(name, _)| name == service);
        if self.paths().any(of_service) {
            Status::unimplemented(format!("unknown method {method} for service {service}"))
        } else {
            Status::unimplemented(format!("unknown service {service}"))
        }
    }
}

/// Bytes in front of each gRPC message: one flag and a length.
pub const FRAME_HEAD: usize = 5;

/// Appends `message` with its gRPC frame head.
pub fn frame(message: &[u8], out: &mut BytesMut) {
    out.reserve(FRAME_HEAD + message.len());
    out.put_u8(0);
    // A message is far below 4 GiB: the largest answer is bounded by memory limits long before that.
    out.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    out.put_slice(message);
}

/// Encodes `message` straight behind its frame head: one buffer, no copy.
pub fn frame_message<M: prost::Message>(message: &M, out: &mut BytesMut) {
    let len = message.encoded_len();
    out.reserve(FRAME_HEAD + len);
    out.put_u8(0);
    out.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
    // `encode` fails only when the buffer is too short, and a `BytesMut` grows.
    let encoded = message.encode(out);
    debug_assert!(encoded.is_ok(), "a BytesMut has room");
}

/// Cuts a byte stream into gRPC messages and refuses what is malformed, compressed or too large.
#[derive(Debug)]
pub(crate) struct Deframer {
    buffer: BytesMut,
    /// A whole chunk that came while nothing was buffered: messages inside it are slices, not copies.
    chunk: Bytes,
    message_bytes_max: usize,
}

impl Deframer {
    pub(crate) fn new(message_bytes_max: usize) -> Self {
        Self { buffer: BytesMut::new(), chunk: Bytes::new(), message_bytes_max }
    }

    pub(crate) fn push(&mut self, data: Bytes) {
        if self.buffer.is_empty() && self.chunk.is_empty() {
            self.chunk = data;
            return;
        }
        if !self.chunk.is_empty() {
            self.buffer.extend_from_slice(&self.chunk);
            self.chunk = Bytes::new();
        }
        self.buffer.extend_from_slice(&data);
    }

    /// The next whole message, if it is here.
    pub(crate) fn next(&mut self) -> Result<Option<Bytes>, Status> {
        let head: &[u8] = if self.chunk.is_empty() { &self.buffer } else { &self.chunk };
        let Some(len) = self.message_len(head)? else { return Ok(None) };
        if head.len() < FRAME_HEAD + len {
            if self.chunk.is_empty() {
                let missing = FRAME_HEAD + len - self.buffer.len();
                self.buffer.reserve(missing);
            }
            return Ok(None);
        }
        if self.chunk.is_empty() {
            self.buffer.advance(FRAME_HEAD);
            return Ok(Some(self.buffer.split_to(len).freeze()));
        }
        self.chunk.advance(FRAME_HEAD);
        Ok(Some(self.chunk.split_to(len)))
    }

    fn message_len(&self, head: &[u8]) -> Result<Option<usize>, Status> {
        let Some(head) = head.get(..FRAME_HEAD) else { return Ok(None) };
        match head[0] {
            0 => {}
            1 => return Err(Status::unimplemented("grpc: compressed messages are not supported by this server")),
            flag => return Err(Status::internal(format!("grpc: received unexpected payload format {flag}"))),
        }
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        if len > self.message_bytes_max {
            let max = self.message_bytes_max;
            let message = format!("grpc: received message larger than max ({len} vs. {max})");
            return Err(Status::new(Code::ResourceExhausted, message));
        }
        Ok(Some(len))
    }

    /// Whether the stream may end here: not in the middle of a message.
    pub(crate) fn is_between_messages(&self) -> bool {
        self.buffer.is_empty() && self.chunk.is_empty()
    }
}

type MessageStream = Pin<Box<dyn tokio_stream::Stream<Item = Result<Bytes, Status>> + Send>>;

/// The messages of the caller, unframed.
pub struct Incoming {
    source: Source,
    deframer: Deframer,
    /// After the end or an error nothing more is read.
    over: bool,
}

enum Source {
    H2(h2::RecvStream),
    Messages(MessageStream),
}

impl Incoming {
    pub(crate) fn from_h2(stream: h2::RecvStream, message_bytes_max: usize) -> Self {
        Self { source: Source::H2(stream), deframer: Deframer::new(message_bytes_max), over: false }
    }

    /// Messages from anywhere else: a JSON body, a test.
    pub fn from_stream(messages: impl tokio_stream::Stream<Item = Result<Bytes, Status>> + Send + 'static) -> Self {
        Self { source: Source::Messages(Box::pin(messages)), deframer: Deframer::new(usize::MAX), over: false }
    }

    /// The next message; `None` when the caller has sent its last one. After an error there is no more.
    pub async fn next(&mut self) -> Option<Result<Bytes, Status>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// A message that is here already: what one read delivered can be taken as one batch, without waiting.
    pub fn try_next_ready(&mut self) -> Option<Result<Bytes, Status>> {
        // The waker is replaced by the next `next`, which looks again before it sleeps: no wake-up is lost.
        match self.poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(item) => item,
            Poll::Pending => None,
        }
    }

    /// Whether the last message (or an error) has been handed out.
    pub fn is_over(&self) -> bool {
        self.over
    }

    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Status>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let polled = match &mut self.source {
            Source::Messages(messages) => messages.as_mut().poll_next(cx),
            Source::H2(stream) => poll_h2(stream, &mut self.deframer, cx),
        };
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.over = true;
        }
        polled
    }
}

fn poll_h2(
    stream: &mut h2::RecvStream,
    deframer: &mut Deframer,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Bytes, Status>>> {
    loop {
        match deframer.next() {
            Ok(Some(message)) => return Poll::Ready(Some(Ok(message))),
            Ok(None) => {}
            Err(status) => return Poll::Ready(Some(Err(status))),
        }
        match std::task::ready!(stream.poll_data(cx)) {
            Some(Ok(data)) => {
                // Only what a service waits for is read, so lending the window again here keeps the pressure on the peer. It
                // fails only for a stream that is gone, which the next read tells.
                let _ = stream.flow_control().release_capacity(data.len());
                deframer.push(data);
            }
            Some(Err(error)) => return Poll::Ready(Some(Err(read_failed(&error)))),
            None if deframer.is_between_messages() => return Poll::Ready(None),
            None => return Poll::Ready(Some(Err(Status::internal("unexpected EOF")))),
        }
    }
}

/// A stream that broke while it was read: by the caller, or with the connection.
pub(crate) fn read_failed(error: &h2::Error) -> Status {
    if error.is_reset() || error.is_io() || error.is_go_away() {
        Status::new(Code::Cancelled, "context canceled")
    } else {
        Status::internal(format!("reading the request failed: {error}"))
    }
}

/// The caller no longer listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the caller no longer listens")]
pub struct Closed;

/// Why a message was not taken without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrySendError {
    #[error("the caller reads too slowly")]
    Full,
    #[error("the caller no longer listens")]
    Closed,
}

/// The messages to the caller: a queue bounded by bytes that the front drains as the caller reads. Clones share it.
#[derive(Clone)]
pub struct Outgoing {
    shared: Arc<Shared>,
}

struct Shared {
    bytes_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Framed bytes; one buffer may hold several messages.
    queue: VecDeque<Bytes>,
    bytes: usize,
    closed: bool,
    /// The front, when it has nothing to send.
    reader: Option<Waker>,
    /// Senders that wait for room or for the end, by their number.
    waiting: Vec<(u64, Waker)>,
    next_waiter: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain data and no user code runs under the lock: what a panicking thread left is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taken(&self, state: &mut State, len: usize) {
        let was_full = state.bytes >= self.bytes_max;
        state.bytes -= len;
        if was_full && state.bytes < self.bytes_max {
            state.wake_waiting();
        }
    }
}

impl State {
    fn wake_waiting(&mut self) {
        for (_, waker) in self.waiting.drain(..) {
            waker.wake();
        }
    }
}

/// The front's end of an [`Outgoing`]. Dropping it closes the queue.
pub(crate) struct OutgoingReader {
    shared: Arc<Shared>,
}

impl Outgoing {
    /// A queue that accepts messages while it holds less than `bytes_max`.
    pub(crate) fn new(bytes_max: usize) -> (Self, OutgoingReader) {
        let shared = Arc::new(Shared { bytes_max, state: Mutex::default() });
        (Self { shared: shared.clone() }, OutgoingReader { shared })
    }

    /// Sends one message; waits while the queue is full.
    pub async fn send(&self, message: Bytes) -> Result<(), Closed> {
        let mut framed = BytesMut::new();
        frame(&message, &mut framed);
        self.send_framed(framed.freeze()).await
    }

    /// Sends messages that are framed already (see [`frame`]), several in one buffer; waits while the queue is full.
    pub async fn send_framed(&self, frames: Bytes) -> Result<(), Closed> {
        let mut waiter = Waiter { shared: &self.shared, number: None };
        std::future::poll_fn(|cx| {
            let mut state = self.shared.lock();
            if state.closed {
                return Poll::Ready(Err(Closed));
            }
            if state.bytes < self.shared.bytes_max {
                return Poll::Ready(Ok(()));
            }
            waiter.register(&mut state, cx);
            Poll::Pending
        })
        .await?;
        drop(waiter);
        self.push(frames)
    }

    /// Sends without waiting, or says why not. For senders that serve many callers and must not wait for one.
    pub fn try_send_framed(&self, frames: Bytes) -> Result<(), TrySendError> {
        if self.shared.lock().bytes >= self.shared.bytes_max {
            return Err(if self.is_closed() { TrySendError::Closed } else { TrySendError::Full });
        }
        self.push(frames).map_err(|Closed| TrySendError::Closed)
    }

    fn push(&self, frames: Bytes) -> Result<(), Closed> {
        let reader = {
            let mut state = self.shared.lock();
            if state.closed {
                return Err(Closed);
            }
            state.bytes += frames.len();
            state.queue.push_back(frames);
            state.reader.take()
        };
        if let Some(reader) = reader {
            reader.wake();
        }
        Ok(())
    }

    /// Bytes that the caller has not taken yet.
    pub fn queued_bytes(&self) -> usize {
        self.shared.lock().bytes
    }

    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// Ends when the caller no longer listens.
    pub async fn closed(&self) {
        let mut waiter = Waiter { shared: &self.shared, number: None };
        std::future::poll_fn(|cx| {
            let mut state = self.shared.lock();
            if state.closed {
                return Poll::Ready(());
            }
            waiter.register(&mut state, cx);
            Poll::Pending
        })
        .await;
    }

    /// Ends when there is room for another message, or nobody listens any more.
    pub async fn ready(&self) -> Result<(), Closed> {
        let mut waiter = Waiter { shared: &self.shared, number: None };
        std::future::poll_fn(|cx| {
            let mut state = self.shared.lock();
            if state.closed {
                return Poll::Ready(Err(Closed));
            }
            if state.bytes < self.shared.bytes_max {
                return Poll::Ready(Ok(()));
            }
            waiter.register(&mut state, cx);
            Poll::Pending
        })
        .await
    }
}

/// A place among the wakers that is given back when its future ends or is dropped.
struct Waiter<'a> {
    shared: &'a Shared,
    number: Option<u64>,
}

impl Waiter<'_> {
    fn register(&mut self, state: &mut State, cx: &Context<'_>) {
        let number = *self.number.get_or_insert_with(|| {
            state.next_waiter += 1;
            state.next_waiter
        });
        match state.waiting.iter_mut().find(|(known, _)| *known == number) {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            None => state.waiting.push((number, cx.waker().clone())),
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.shared.lock().waiting.retain(|(known, _)| *known != number);
        }
    }
}

impl OutgoingReader {
    /// The next buffer of framed messages. Never ends by itself: the end of a call is the end of its future.
    pub(crate) fn poll_take(&mut self, cx: &Context<'_>) -> Poll<Bytes> {
        let mut state = self.shared.lock();
        match state.queue.pop_front() {
            Some(frames) => {
                self.shared.taken(&mut state, frames.len());
                Poll::Ready(frames)
            }
            None => {
                state.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// The next buffer if it is there and not longer than `len_max`: for joining small ones.
    pub(crate) fn try_take_below(&mut self, len_max: usize) -> Option<Bytes> {
        let mut state = self.shared.lock();
        let frames = state.queue.pop_front_if(|frames| frames.len() <= len_max)?;
        self.shared.taken(&mut state, frames.len());
        Some(frames)
    }
}

impl Drop for OutgoingReader {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.queue.clear();
        state.bytes = 0;
        state.wake_waiting();
    }
}
