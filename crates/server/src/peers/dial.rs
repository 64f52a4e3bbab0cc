//! The connections that this member dials: what it has to say goes out on them.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tenure_machine::MemberId;
use tenure_replica::{Hello, Lane, PeerRefusal};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::queue::Queue;
use super::{BoxStream, Counted, End, LaneFacts, PeerEvent, Shared, Traffic, frame, lock, prepare};

/// Bodies from this length on are written from where they are; shorter ones are gathered.
const DIRECT_LEN: usize = 16 << 10;
const GATHER_LEN: usize = 256 << 10;
/// A connection that lived so long was a success: the next attempt follows at once.
const GOOD_LIFE: Duration = Duration::from_secs(1);

/// One lane to one peer.
pub(super) struct Link {
    shared: Arc<Shared>,
    lane: Lane,
    member: MemberId,
    name: String,
    address: String,
    pub(super) queue: Queue,
    pub(super) is_connected: AtomicBool,
    /// Why there is no connection; empty while there is one.
    pub(super) trouble: Mutex<String>,
    pub(super) traffic: Traffic,
    /// The peer has just dialled this member, so it can be dialled too.
    pub(super) is_up: Notify,
}

impl Link {
    pub(super) fn new(shared: Arc<Shared>, lane: Lane, member: MemberId, name: String, address: String) -> Self {
        let queue = Queue::new(shared.limits.queue_bytes);
        Self {
            shared,
            lane,
            member,
            name,
            address,
            queue,
            is_connected: AtomicBool::new(false),
            trouble: Mutex::default(),
            traffic: Traffic::default(),
            is_up: Notify::new(),
        }
    }

    pub(super) fn facts(&self) -> LaneFacts {
        let traffic = &self.traffic;
        let of = |figure: &std::sync::atomic::AtomicU64| figure.load(Ordering::Relaxed);
        LaneFacts {
            connects: of(&traffic.connects),
            sent_frames: of(&traffic.sent_frames),
            sent_bytes: of(&traffic.sent_bytes),
            received_frames: of(&traffic.received_frames),
            received_bytes: of(&traffic.received_bytes),
            dropped_full: of(&self.queue.dropped_full),
            dropped_down: of(&self.queue.dropped_down),
            queued_bytes: self.queue.bytes(),
        }
    }
}

/// Keeps a connection for as long as the peer is one.
pub(super) async fn run(link: Arc<Link>) {
    let limits = &link.shared.limits;
    let mut backoff = limits.backoff_min;
    loop {
        link.queue.open();
        if link.lane == Lane::Bulk {
            link.queue.ready().await;
        }
        let begun = Instant::now();
        let end = connection(&link).await;
        let was_connected = link.is_connected.swap(false, Ordering::Relaxed);
        if matches!(end, End::Idle) {
            // What was queued in this moment is not lost: the queue stays open.
            continue;
        }
        link.queue.close();
        if was_connected && begun.elapsed() >= GOOD_LIFE {
            backoff = limits.backoff_min;
        }
        if matches!(end, End::Connect(_)) {
            // Nobody said no, and the attempt itself took its time: after a cut the way back is found soon.
            backoff = limits.backoff_min;
        }
        log(&link, &end);
        tokio::select! {
            () = tokio::time::sleep(jittered(backoff)) => {}
            () = link.is_up.notified() => {}
        }
        backoff = (backoff * 2).min(limits.backoff_max);
    }
}

/// Between the half and the whole of it, so that members that lost each other do not dial in step.
fn jittered(backoff: Duration) -> Duration {
    let mut random = [0; 1];
    // Without random numbers the whole is as good.
    let share = if getrandom::fill(&mut random).is_ok() { u32::from(random[0]) } else { 255 };
    backoff / 2 + backoff / 2 * share / 255
}

fn log(link: &Link, end: &End) {
    let (peer, address, why) = (&link.name, &link.address, end.to_string());
    let mut trouble = lock(&link.trouble);
    if *trouble == why {
        return;
    }
    match end {
        End::Stopping => tracing::debug!(peer, address, why, "a connection to a member ended"),
        _ => tracing::warn!(peer, address, lane = ?link.lane, why, "no connection to a member"),
    }
    *trouble = why;
}

async fn connection(link: &Link) -> End {
    let limits = &link.shared.limits;
    let stream = loop {
        tokio::select! {
            // The name is looked up anew at each attempt.
            connected = tokio::time::timeout(limits.connect, TcpStream::connect(&link.address)) => match connected {
                Ok(Ok(stream)) => break stream,
                Ok(Err(error)) => return End::Io(error),
                Err(_) => return End::Connect(limits.connect),
            },
            // The system would wait a second before it asks again.
            () = link.is_up.notified() => {}
        }
    };
    prepare(&stream, Some(link.lane), limits);
    let (mut stream, counted) = match tokio::time::timeout(limits.handshake, handshake(link, stream)).await {
        Ok(Ok(taken)) => taken,
        Ok(Err(end)) => return end,
        Err(_) => return End::Handshake(limits.handshake),
    };
    // An open bulk connection says nothing of the peer's life.
    let _counted = (link.lane == Lane::Messages).then_some(counted);
    link.is_connected.store(true, Ordering::Relaxed);
    link.traffic.connects.fetch_add(1, Ordering::Relaxed);
    lock(&link.trouble).clear();
    match link.lane {
        Lane::Messages => tracing::info!(peer = link.name, address = link.address, "connected to a member"),
        Lane::Bulk => tracing::debug!(peer = link.name, address = link.address, "connected to a member for bulk"),
    }
    match write(link, &mut stream).await {
        Ok(never) => match never {},
        Err(end) => end,
    }
}

async fn handshake(link: &Link, stream: TcpStream) -> Result<(BoxStream, Counted), End> {
    let shared = &link.shared;
    let mut stream = secure(link, stream).await?;
    let own = shared.ask(|reply| PeerEvent::OwnHello { reply }).await?;
    let mut bytes = frame::preamble(link.lane).to_vec();
    frame::put(&mut bytes, frame::kind::HELLO, &own.encode());
    // With TLS 1.3 the dialler learns here that its certificate was not taken.
    let broken = |error| if shared.tls.is_some() { End::Tls(error) } else { closing(error) };
    stream.write_all(&bytes).await.map_err(broken)?;
    stream.flush().await.map_err(broken)?;
    let mut buffer = BytesMut::with_capacity(frame::HELLO_MAX);
    let answer = loop {
        match frame::take(&mut buffer, frame::HELLO_MAX)? {
            Some(answer) => break answer,
            None if stream.read_buf(&mut buffer).await.map_err(broken)? == 0 => {
                return Err(End::Protocol("it closed the connection without a greeting".to_owned()));
            }
            None => {}
        }
    };
    let hello = match answer {
        (frame::kind::WELCOME, body) => {
            Hello::decode(&body).ok_or_else(|| End::Protocol("its hello cannot be read".to_owned()))?
        }
        (frame::kind::REFUSED, body) => {
            let refusal = PeerRefusal::decode(&body).ok_or_else(|| End::Protocol("it refused".to_owned()))?;
            shared.tell(PeerEvent::Refused { by: link.member, refusal: refusal.clone() });
            return Err(End::RefusedByPeer(refusal));
        }
        (kind, _) => return Err(End::Protocol(format!("it answered with a frame of kind {kind}"))),
    };
    if hello.member != link.member {
        // Nothing is wrong with the one that answered, so it need not know.
        return Err(End::Protocol(format!(
            "`{}` answers there instead of `{}`: correct the peer address of one of them",
            hello.name, link.name
        )));
    }
    match shared.greet(hello, link.lane).await {
        Ok((counted, _)) => Ok((stream, counted)),
        Err(End::Refused(refusal)) => {
            let mut bytes = Vec::new();
            frame::put(&mut bytes, frame::kind::REFUSED, &refusal.encode());
            stream.write_all(&bytes).await?;
            stream.shutdown().await?;
            Err(End::Refused(refusal))
        }
        Err(end) => Err(end),
    }
}

async fn secure(link: &Link, stream: TcpStream) -> Result<BoxStream, End> {
    let Some(tls) = &link.shared.tls else { return Ok(Box::new(stream)) };
    let host = link.address.rsplit_once(':').map_or(&*link.address, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let name = ServerName::try_from(host)
        .map_err(|_| End::Protocol(format!("`{}` has no host that a certificate can name", link.address)))?;
    let stream = TlsConnector::from(tls.configs().dial).connect(name, stream).await.map_err(End::Tls)?;
    Ok(Box::new(stream))
}

enum Never {}

/// Sends what is queued until the connection ends. The peer has nothing to say on it, so that what is read is its end.
async fn write(link: &Link, stream: &mut BoxStream) -> Result<Never, End> {
    let mut gathered = Vec::new();
    loop {
        let mut word = [0; 64];
        tokio::select! {
            biased;
            () = link.queue.ready() => {}
            read = stream.read(&mut word) => {
                return Err(match read {
                    Ok(0) => End::Closed,
                    Ok(_) => End::Protocol("it sent something where only this member sends".to_owned()),
                    Err(error) => closing(error),
                });
            }
            () = tokio::time::sleep(link.shared.limits.bulk_idle), if link.lane == Lane::Bulk => {
                stream.shutdown().await?;
                return Err(End::Idle);
            }
        }
        let frames = link.queue.take();
        for frame in &frames {
            gathered.extend_from_slice(&frame::header(frame::kind::MESSAGE, frame));
            let is_direct = frame.len() >= DIRECT_LEN;
            if !is_direct {
                gathered.extend_from_slice(frame);
            }
            if is_direct || gathered.len() >= GATHER_LEN {
                stream.write_all(&gathered).await.map_err(closing)?;
                gathered.clear();
            }
            if is_direct {
                stream.write_all(frame).await.map_err(closing)?;
            }
        }
        stream.write_all(&gathered).await.map_err(closing)?;
        gathered.clear();
        stream.flush().await.map_err(closing)?;
        link.queue.written(&frames);
        let bytes: usize = frames.iter().map(|frame| frame::HEADER_LEN + frame.len()).sum();
        link.traffic.sent_frames.fetch_add(frames.len() as u64, Ordering::Relaxed);
        link.traffic.sent_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// An end without TLS's farewell, or a reset, is how a killed process leaves.
pub(super) fn closing(error: std::io::Error) -> End {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error.kind() {
        BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof => End::Closed,
        _ => End::Io(error),
    }
}
