//! One HTTP/2 connection: a single task that reads, runs the calls and writes.
//!
//! A turn polls what was woken, takes what was read, and goes round until nothing is left, so that answers which
//! become ready together leave in one write. No task is spawned per call.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{Request, Response};
use http_body::Body as _;
use http_body_util::BodyExt;
use tokio::time::{Instant, Sleep};

use super::body::{H2Body, Payload};
use super::route::{dispatch, is_generated};
use super::socket::Socket;
use super::{App, Body, grpc};
use crate::metrics::Counter;

/// What `h2` buffers of one stream's answer beyond what the peer's window admits.
const SEND_BUFFER_BYTES_MAX: usize = 256 << 10;

pub(super) async fn serve(app: Arc<App>, socket: Socket, peer: SocketAddr) {
    let config = &app.config;
    let read = socket.read_counter();
    let handshake = h2::server::Builder::new()
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(config.connection_window)
        .max_concurrent_streams(config.streams_max)
        .max_header_list_size(config.header_bytes_max)
        .max_send_buffer_size(SEND_BUFFER_BYTES_MAX)
        .handshake::<_, Payload>(socket);
    let Ok(Ok(h2)) = tokio::time::timeout(config.header_timeout, handshake).await else { return };
    let mut connection = Connection {
        keepalive: KeepAlive::new(&app, read),
        calls: FuturesUnordered::new(),
        stopping: false,
        app: app.clone(),
        peer,
        h2,
    };
    let mut bell = app.stop.bell();
    tenure_gate::rounds(|cx| {
        if !connection.stopping && bell.has_rung(&app.stop, cx) {
            connection.stop();
        }
        connection.round(cx, call)
    })
    .await;
}

struct Connection<F> {
    app: Arc<App>,
    peer: SocketAddr,
    h2: h2::server::Connection<Socket, Payload>,
    calls: FuturesUnordered<F>,
    keepalive: KeepAlive,
    stopping: bool,
}

impl<F: Future<Output = ()>> Connection<F> {
    /// One round: run what is ready, read and write what can be. Ready when the connection is over.
    fn round(
        &mut self,
        cx: &mut Context<'_>,
        call: impl Fn(Arc<App>, SocketAddr, Request<RecvStream>, SendResponse<Payload>) -> F,
    ) -> Poll<()> {
        while let Poll::Ready(Some(())) = self.calls.poll_next_unpin(cx) {}
        loop {
            match self.h2.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => {
                    self.calls.push(call(self.app.clone(), self.peer, request, respond));
                    // `FuturesUnordered` looks at new futures only when polled, and nobody wakes it for them.
                    cx.waker().wake_by_ref();
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(peer = %self.peer, %error, "an HTTP/2 connection ended early");
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => break,
            }
        }
        self.keepalive.poll(cx, &mut self.h2)
    }

    fn stop(&mut self) {
        self.stopping = true;
        self.h2.graceful_shutdown();
    }
}

/// Finds peers that are gone without a word.
struct KeepAlive {
    interval: Duration,
    timeout: Duration,
    timer: Pin<Box<Sleep>>,
    pings: Option<h2::PingPong>,
    read: Arc<Counter>,
    /// What had been read when the timer was set.
    read_before: u64,
    pinged: bool,
}

impl KeepAlive {
    fn new(app: &App, read: Arc<Counter>) -> Self {
        let interval = app.config.keepalive_interval;
        Self {
            interval,
            timeout: app.config.keepalive_timeout,
            timer: Box::pin(tokio::time::sleep(interval)),
            pings: None,
            read_before: read.get(),
            read,
            pinged: false,
        }
    }

    /// Ready when the peer is taken for dead. Any byte from it is a sign of life; the answer to the ping is just one.
    fn poll(&mut self, cx: &mut Context<'_>, h2: &mut h2::server::Connection<Socket, Payload>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let heard = self.read.get() != self.read_before;
            if self.pinged && !heard {
                tracing::debug!("a silent connection is closed");
                return Poll::Ready(());
            }
            self.pinged = !heard && self.ping(cx, h2);
            self.read_before = self.read.get();
            let wait = if self.pinged { self.timeout } else { self.interval };
            self.timer.as_mut().reset(Instant::now() + wait);
        }
    }

    fn ping(&mut self, cx: &mut Context<'_>, h2: &mut h2::server::Connection<Socket, Payload>) -> bool {
        if self.pings.is_none() {
            self.pings = h2.ping_pong();
        }
        let Some(pings) = &mut self.pings else { return false };
        // The answer to the last ping must be taken before the next may leave.
        let _ = pings.poll_pong(cx);
        // `h2` is not woken for its first ping: another round sends it.
        cx.waker().wake_by_ref();
        pings.send_ping(h2::Ping::opaque()).is_ok()
    }
}

async fn call(app: Arc<App>, peer: SocketAddr, request: Request<RecvStream>, respond: SendResponse<Payload>) {
    if grpc::is_grpc(&request) && !is_generated(request.uri().path()) {
        grpc::call(&app, peer, request, respond).await;
    } else {
        // Rare and large: boxed, so that the future of a hot call stays small.
        Box::pin(http(app, peer, request, respond)).await;
    }
}

/// A request that is not ours to frame: JSON, a page, or a generated gRPC service.
async fn http(app: Arc<App>, peer: SocketAddr, request: Request<RecvStream>, mut respond: SendResponse<Payload>) {
    let request = request.map(|body| H2Body(body).boxed_unsync());
    let response = {
        let mut answer = std::pin::pin!(dispatch(&app, request, peer));
        let answered = std::future::poll_fn(|cx| {
            if respond.poll_reset(cx).is_ready() {
                return Poll::Ready(None);
            }
            answer.as_mut().poll(cx).map(Some)
        });
        let Some(response) = answered.await else { return };
        response
    };
    let (head, body) = response.into_parts();
    let is_empty = body.is_end_stream();
    // An error here or below means that the stream is gone: nobody is left to tell.
    let Ok(mut send) = respond.send_response(Response::from_parts(head, ()), is_empty) else { return };
    if is_empty {
        return;
    }
    let mut bell = app.stop.bell();
    tokio::select! {
        biased;
        sent = send_body(&mut send, body) => {
            if sent.is_err() {
                send.send_reset(Reason::INTERNAL_ERROR);
            }
        }
        // An endless answer must not hold up the stop.
        () = std::future::poll_fn(|cx| if bell.has_rung(&app.stop, cx) { Poll::Ready(()) } else { Poll::Pending }) => {
            send.send_reset(Reason::CANCEL);
        }
    }
}

async fn send_body(send: &mut SendStream<Payload>, mut body: Body) -> Result<(), super::BoxError> {
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => send_all(send, data).await?,
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    return Ok(send.send_trailers(trailers)?);
                }
            }
        }
    }
    Ok(send.send_data(Payload::plain(Bytes::new()), true)?)
}

/// Sends `data` as the peer's window admits it.
async fn send_all(send: &mut SendStream<Payload>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        let room = std::future::poll_fn(|cx| poll_room(send, data.len(), cx)).await?;
        send.send_data(Payload::plain(data.split_to(room)), false)?;
    }
    Ok(())
}

/// How much may be sent now: at least one byte, at most `wanted`.
pub(super) fn poll_room(
    send: &mut SendStream<Payload>,
    wanted: usize,
    cx: &mut Context<'_>,
) -> Poll<Result<usize, h2::Error>> {
    if send.poll_reset(cx)?.is_ready() {
        return Poll::Ready(Err(Reason::CANCEL.into()));
    }
    send.reserve_capacity(wanted);
    loop {
        let room = send.capacity();
        if room > 0 {
            return Poll::Ready(Ok(room.min(wanted)));
        }
        match ready!(send.poll_capacity(cx)) {
            // It tells of a change, which may be to nothing.
            Some(Ok(_)) => {}
            Some(Err(error)) => return Poll::Ready(Err(error)),
            None => return Poll::Ready(Err(Reason::STREAM_CLOSED.into())),
        }
    }
}
