//! The front: one port that takes gRPC, JSON and pages over HTTP/2 by prior knowledge or HTTP/1.1.
//!
//! Promises. F1: one task per connection serves all of its calls; a call that waits, or whose caller reads slowly, delays no other.
//! F2: everything a peer can make the server hold is bounded: connections, streams of one, bytes of a message, of the windows and of an
//! answer stream's queue, and the time until the first request. F3: a call ends when its caller resets it, goes away or lets the deadline
//! pass: its future is dropped. F4: a stop lets unary calls finish within the grace, ends streams with `Unavailable`, and
//! then closes what is left.
//! Not promised. TLS is not here yet. An answer that is one large message is held in memory until its caller has read it.
//! Relies on. `h2` for the frames of HTTP/2 and `hyper` for HTTP/1.1. gRPC needs no library beyond that: five bytes before each
//! message, and a trailer (`grpc.rs`); that is a third cheaper for short calls than the general stack.

mod body;
mod grpc;
mod http1;
mod http2;
mod route;
mod socket;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Context;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;

pub use self::body::Body;
pub(crate) use self::body::{BoxError, full};
pub(crate) use self::grpc::deadline;
use self::route::TowerCall;
pub(crate) use self::route::plain;
use self::socket::{Socket, Version};
use crate::metrics::{Counter, Exposition};
use crate::pages::Health;
use crate::rpc::{Code, Method, Router};
use crate::transcode::Transcoder;

/// Limits of the front. Every one is a flag or a constant of the shell; none is state.
#[derive(Clone, Debug)]
pub struct FrontConfig {
    /// The largest request of the etcd face; etcd's is its request limit of 1.5 MiB plus 512 KiB.
    pub message_bytes_max: usize,
    /// The largest request of the native face, whose messages carry many requests.
    pub native_message_bytes_max: usize,
    /// Open connections; further ones wait in the backlog of the kernel.
    pub connections_max: usize,
    /// Open calls of one connection.
    pub streams_max: u32,
    /// HTTP/2 windows: what a peer may send ahead of the services.
    pub stream_window: u32,
    pub connection_window: u32,
    /// Bytes of headers of one request.
    pub header_bytes_max: u32,
    /// An answer stream accepts messages while less than this is unread.
    pub outgoing_bytes_max: usize,
    /// From the acceptance of a connection to its first request's headers (HTTP/1.1: of every request).
    pub header_timeout: Duration,
    /// A connection that was silent for so long is pinged, and closed if it stays silent for `keepalive_timeout` more.
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
    /// How long calls may go on after the stop.
    pub stop_grace: Duration,
    /// Hold a lone PING acknowledgement back, at most for so long, to send it together with the answer; zero is off.
    pub ping_hold: Duration,
}

impl Default for FrontConfig {
    fn default() -> Self {
        Self {
            message_bytes_max: 2 << 20,
            native_message_bytes_max: 4 << 20,
            connections_max: 65_536,
            streams_max: 16_384,
            stream_window: 1 << 20,
            connection_window: 16 << 20,
            header_bytes_max: 64 << 10,
            outgoing_bytes_max: 1 << 20,
            header_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(20),
            stop_grace: Duration::from_secs(5),
            // Go's client sends a PING beside each request. Its acknowledgement in a system call of its own costs a fifth of a put.
            ping_hold: Duration::from_millis(2),
        }
    }
}

impl FrontConfig {
    /// The limit of one request, by the method's path.
    pub(crate) fn message_bytes_max_of(&self, path: &str) -> usize {
        if path.starts_with("/tenure.") { self.native_message_bytes_max } else { self.message_bytes_max }
    }
}

/// Why a front could not be made: the parts of the program do not fit together.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    #[error("the descriptors of the protocol cannot be read: {0}")]
    Descriptors(String),
    #[error("gRPC reflection cannot be set up: {0}")]
    Reflection(String),
}

/// The services, ready to be served on listeners.
#[derive(Clone)]
pub struct Front {
    app: Arc<App>,
}

/// What all connections share.
pub(crate) struct App {
    pub(crate) config: FrontConfig,
    pub(crate) router: Router,
    pub(crate) calls: HashMap<&'static str, CallFigures>,
    /// Made at their first use, as are the next two: a member that serves only gRPC has no need of decoded descriptors, which
    /// are megabytes.
    transcoder: OnceLock<Transcoder>,
    tower: OnceLock<HashMap<&'static str, TowerCall>>,
    pub(crate) openapi: OnceLock<bytes::Bytes>,
    pub(crate) health: Arc<dyn Health>,
    pub(crate) figures: Figures,
    pub(crate) stop: Stop,
}

impl Front {
    /// Fails only if the program was built of parts that do not fit; what is made later from the same parts is checked by tests.
    pub fn new(router: Router, health: Arc<dyn Health>, config: FrontConfig) -> Result<Self, FrontError> {
        if tenure_wire::DESCRIPTORS.is_empty() {
            return Err(FrontError::Descriptors("there are none".to_owned()));
        }
        let calls = router.paths().map(|path| (path, CallFigures::default())).collect();
        let app = App {
            transcoder: OnceLock::new(),
            tower: OnceLock::new(),
            openapi: OnceLock::new(),
            figures: Figures::default(),
            stop: Stop::default(),
            config,
            router,
            calls,
            health,
        };
        Ok(Self { app: Arc::new(app) })
    }

    /// Serves connections until `stop` is ready, then lets calls finish for the grace and returns.
    pub async fn serve(&self, listener: TcpListener, stop: impl Future<Output = ()>) -> io::Result<()> {
        let permits = Arc::new(Semaphore::new(self.app.config.connections_max));
        let mut connections = JoinSet::new();
        let mut stop = std::pin::pin!(stop);
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut stop => break,
                accepted = accept(&listener, &permits) => accepted,
                // Ended connections are taken off, else the set grows for ever.
                Some(_) = connections.join_next() => continue,
            };
            match accepted {
                Ok((stream, peer, permit)) => {
                    let app = self.app.clone();
                    connections.spawn(async move {
                        connection(app, stream, peer).await;
                        drop(permit);
                    });
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    // Out of descriptors or memory: those that are open go on, and closing ones make room.
                    tracing::warn!(%error, "accepting a connection failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        drop(listener);
        self.app.stop.begin();
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(self.app.config.stop_grace, drained).await.is_err() {
            tracing::info!(connections = connections.len(), "closing connections that are still in use");
        }
        connections.shutdown().await;
        Ok(())
    }
}

type Accepted = (TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit);

async fn accept(listener: &TcpListener, permits: &Arc<Semaphore>) -> io::Result<Accepted> {
    let permit = permits.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, permit))
}

/// Errors that `accept` passes on from a connection that died in the backlog.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | ConnectionRefused | Interrupted)
}

async fn connection(app: Arc<App>, stream: TcpStream, peer: SocketAddr) {
    prepare(&stream);
    app.figures.connections.add(1);
    let open = OpenConnection(app.clone());
    let mut socket = Socket::new(stream, app.clone());
    match tokio::time::timeout(app.config.header_timeout, socket.sniff()).await {
        Ok(Ok(Version::Http2)) => http2::serve(app, socket, peer).await,
        Ok(Ok(Version::Http1)) => http1::serve(app, socket, peer).await,
        // Nothing was asked, so there is nothing to answer: port scans and health probes end here.
        Ok(Err(_)) | Err(_) => {}
    }
    drop(open);
}

/// Answers leave at once, and a peer that is gone without a word is noticed, also on HTTP/1.1, which has no ping of its own.
fn prepare(stream: &TcpStream) {
    const SILENCE: Duration = Duration::from_secs(30);
    const PROBES: u32 = 3;
    let keepalive = socket2::TcpKeepalive::new().with_time(SILENCE).with_interval(SILENCE / 3).with_retries(PROBES);
    // Both fail only for a socket that is gone already.
    let _ = stream.set_nodelay(true);
    let _ = socket2::SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// Counts an open connection, also when its task is aborted.
struct OpenConnection(Arc<App>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.figures.connections.sub(1);
    }
}

/// Whether the front is stopping, and a way to be woken when it begins to.
#[derive(Default)]
pub(crate) struct Stop {
    begun: AtomicBool,
    notify: Arc<Notify>,
}

impl Stop {
    fn begin(&self) {
        self.begun.store(true, Ordering::SeqCst);
        self.notify.notify_waiters();
    }

    pub(crate) fn bell(&self) -> Bell {
        Bell { notified: Box::pin(self.notify.clone().notified_owned()), is_armed: false }
    }
}

/// Wakes the task that asks when the stop begins. Made before the flag is read, so a stop between the two is not missed.
pub(crate) struct Bell {
    notified: Pin<Box<OwnedNotified>>,
    is_armed: bool,
}

impl Bell {
    /// Whether the stop has begun. Arms the bell with the task's waker the first time only: every further look is one load, and the
    /// task must keep its waker.
    pub(crate) fn has_rung(&mut self, stop: &Stop, cx: &mut Context<'_>) -> bool {
        if !self.is_armed {
            self.is_armed = true;
            // What it returns is the flag, which is read below.
            let _ = self.notified.as_mut().poll(cx);
        }
        stop.begun.load(Ordering::SeqCst)
    }
}

/// Totals of the front.
#[derive(Default)]
pub(crate) struct Figures {
    connections: Counter,
    pub(crate) received_bytes: Counter,
    pub(crate) sent_bytes: Counter,
}

/// Totals of one method.
#[derive(Default)]
pub(crate) struct CallFigures {
    started: Counter,
    handled: [Counter; 17],
}

impl CallFigures {
    pub(crate) fn start(&self) {
        self.started.add(1);
    }

    pub(crate) fn end(&self, code: Code) {
        self.handled[usize::from(code.number())].add(1);
    }
}

impl App {
    pub(crate) fn transcoder(&self) -> &Transcoder {
        self.transcoder.get_or_init(|| {
            Transcoder::new(tenure_wire::DESCRIPTORS).unwrap_or_else(|error| {
                tracing::error!(%error, "JSON calls are not served");
                Transcoder::default()
            })
        })
    }

    /// Services by name that are generated code: reflection and health.
    pub(crate) fn tower(&self) -> &HashMap<&'static str, TowerCall> {
        self.tower.get_or_init(|| {
            route::tower_services().unwrap_or_else(|error| {
                tracing::error!(%error, "gRPC reflection and health are not served");
                HashMap::new()
            })
        })
    }

    /// The page of metrics.
    pub(crate) fn metrics(&self) -> String {
        let mut out = Exposition::new();
        self.calls_metrics(&mut out);
        let figures = &self.figures;
        let help = "The total number of bytes received from grpc clients.";
        out.counter("etcd_network_client_grpc_received_bytes_total", help, &[], figures.received_bytes.get() as f64);
        let help = "The total number of bytes sent to grpc clients.";
        out.counter("etcd_network_client_grpc_sent_bytes_total", help, &[], figures.sent_bytes.get() as f64);
        let help = "Connections of clients that are open.";
        out.gauge("tenure_client_connections", help, &[], figures.connections.get() as f64);
        self.health.metrics(&mut out);
        crate::metrics::process(&mut out);
        out.into_text()
    }

    fn calls_metrics(&self, out: &mut Exposition) {
        let mut calls: Vec<_> = self.calls.iter().collect();
        calls.sort_unstable_by_key(|(path, _)| **path);
        let labels = |path: &'static str| {
            let (service, method) = path[1..].rsplit_once('/').unwrap_or(("", path));
            let kind = match self.router.find(path) {
                Some(Method::Stream(_)) => "bidi_stream",
                _ => "unary",
            };
            [("grpc_method", method), ("grpc_service", service), ("grpc_type", kind)]
        };
        for (path, figures) in &calls {
            let help = "Total number of RPCs started on the server.";
            out.counter("grpc_server_started_total", help, &labels(path), figures.started.get() as f64);
        }
        for (path, figures) in &calls {
            let [method, service, kind] = labels(path);
            for code in Code::ALL {
                let count = figures.handled[usize::from(code.number())].get();
                // All codes of all methods would be a thousand lines; success is there from the start, others once they happen.
                if count == 0 && code != Code::Ok {
                    continue;
                }
                let labels = [("grpc_code", code.name()), method, service, kind];
                let help = "Total number of RPCs completed on the server, regardless of success or failure.";
                out.counter("grpc_server_handled_total", help, &labels, count as f64);
            }
        }
    }
}
