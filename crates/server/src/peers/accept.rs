//! The connections that other members dial: what they have to say comes in on them.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tenure_machine::MemberId;
use tenure_replica::{Hello, Lane, PeerRefusal};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::dial::{Link, closing};
use super::frame::FrameError;
use super::{Accepted, BoxStream, Counted, Credit, End, PeerEvent, Shared, frame, lock, prepare};

/// After an error of the listener, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The same trouble from the same place is logged once in so long.
const QUIET: Duration = Duration::from_secs(60);
const TOLD_MAX: usize = 256;
/// One who was refused gets so long to read why.
const LINGER: Duration = Duration::from_millis(200);
/// What the owner's queue holds for an event, beside the frames.
const EVENT_WEIGHT: usize = 1 << 10;

pub(super) async fn run(shared: Arc<Shared>, listener: TcpListener) {
    let mut stopping = shared.is_stopping.subscribe();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = async { drop(stopping.wait_for(|stopping| *stopping).await) } => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, from)) => {
                    // Excess is closed, not kept waiting: a member dials again.
                    let Ok(place) = shared.inbound.clone().try_acquire_owned() else {
                        shared.inbound_excess.fetch_add(1, Ordering::Relaxed);
                        log(&shared, from.ip(), "there are too many connections from members".to_owned());
                        continue;
                    };
                    connections.spawn(connection(shared.clone(), stream, from, place));
                }
                Err(error) => {
                    log(&shared, IpAddr::from([0, 0, 0, 0]), format!("no connection can be accepted: {error}"));
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    connections.shutdown().await;
}

async fn connection(shared: Arc<Shared>, stream: TcpStream, from: SocketAddr, _place: OwnedSemaphorePermit) {
    let handshake = shared.limits.handshake;
    let mut refused = None;
    let end = match tokio::time::timeout(handshake, welcome(&shared, stream, &mut refused)).await {
        Ok(Ok(taken)) => read(&shared, taken).await,
        Ok(Err(end)) => end,
        Err(_) => End::Handshake(handshake),
    };
    match end {
        End::Closed | End::Idle | End::Replaced | End::Stopping => {
            tracing::debug!(%from, %end, "a member's connection ended")
        }
        end => log(&shared, from.ip(), end.to_string()),
    }
    if let Some((stream, refusal)) = refused {
        // A member that does not take it does not matter.
        let _ = tokio::time::timeout(LINGER, say_refused(stream, &refusal)).await;
    }
}

fn log(shared: &Shared, from: IpAddr, why: String) {
    let mut told = lock(&shared.told);
    let key = (from, why);
    if told.get(&key).is_some_and(|when| when.elapsed() < QUIET) {
        return;
    }
    if told.len() >= TOLD_MAX {
        told.clear();
    }
    tracing::warn!(%from, why = key.1, "a connection from a member was not served");
    told.insert(key, Instant::now());
}

/// A connection whose hello was taken.
struct Taken {
    stream: BoxStream,
    /// What was read beyond the hello.
    buffer: BytesMut,
    lane: Lane,
    member: MemberId,
    boot: u64,
    _counted: Option<Counted>,
    place: Place,
}

async fn welcome(
    shared: &Arc<Shared>,
    stream: TcpStream,
    refused: &mut Option<(BoxStream, PeerRefusal)>,
) -> Result<Taken, End> {
    prepare(&stream, None, &shared.limits);
    let mut first = [0; 1];
    if stream.peek(&mut first).await? == 0 {
        return Err(End::Closed);
    }
    let mut stream: BoxStream = match (&shared.tls, first[0]) {
        (Some(tls), frame::TLS_FIRST) => {
            Box::new(TlsAcceptor::from(tls.configs().accept).accept(stream).await.map_err(End::Tls)?)
        }
        (None, frame::TLS_FIRST) => {
            let why = "it speaks TLS and this member does not: give this one --peer-cert, --peer-key and --peer-ca too";
            return Err(End::Protocol(why.to_owned()));
        }
        (Some(_), frame::PLAIN_FIRST) => {
            let why = "members speak TLS here and this connection is plain: give --peer-cert, --peer-key and --peer-ca";
            *refused = Some((Box::new(stream), PeerRefusal { fatal: false, why: why.to_owned() }));
            return Err(End::Protocol(why.to_owned()));
        }
        (None, frame::PLAIN_FIRST) => Box::new(stream),
        _ => return Err(End::Frame(FrameError::Magic)),
    };
    let mut preamble = [0; frame::PREAMBLE_LEN];
    stream.read_exact(&mut preamble).await.map_err(closing)?;
    let refuse = |why: String| PeerRefusal { fatal: false, why };
    let lane = match frame::read_preamble(preamble) {
        Ok(lane) => lane,
        Err(error) => {
            if matches!(error, FrameError::Version(_)) {
                let spoken = frame::TRANSPORT_VERSION;
                let why = format!("this member speaks version {spoken} of the transport: bring both to one release");
                *refused = Some((stream, refuse(why)));
            }
            return Err(error.into());
        }
    };
    let mut buffer = BytesMut::with_capacity(frame::HELLO_MAX);
    let (kind, body) = loop {
        match frame::take(&mut buffer, frame::HELLO_MAX)? {
            Some(hello) => break hello,
            None if stream.read_buf(&mut buffer).await.map_err(closing)? == 0 => return Err(End::Closed),
            None => {}
        }
    };
    let Some(hello) = (kind == frame::kind::HELLO).then(|| Hello::decode(&body)).flatten() else {
        let why = "its hello cannot be read: bring both to one release";
        *refused = Some((stream, refuse(why.to_owned())));
        return Err(End::Protocol(why.to_owned()));
    };
    let (member, boot) = (hello.member, hello.boot);
    let (counted, own) = match shared.greet(hello, lane).await {
        Ok(taken) => taken,
        Err(End::Refused(refusal)) => {
            *refused = Some((stream, refusal.clone()));
            return Err(End::Refused(refusal));
        }
        Err(end) => return Err(end),
    };
    // From here on an older connection of that lane is as good as dead.
    let place = Place::take(shared, member, lane);
    let mut bytes = Vec::new();
    frame::put(&mut bytes, frame::kind::WELCOME, &own.encode());
    stream.write_all(&bytes).await.map_err(closing)?;
    stream.flush().await.map_err(closing)?;
    if let Some(link) = lock(&shared.links).get(&member) {
        link.messages.is_up.notify_waiters();
        link.bulk.is_up.notify_waiters();
    }
    // An open bulk connection says nothing of the peer's life.
    let counted = (lane == Lane::Messages).then_some(counted);
    Ok(Taken { stream, buffer, lane, member, boot, _counted: counted, place })
}

/// Writes it, and reads until the other has hung up: a close with something unread would take the words back.
async fn say_refused(mut stream: BoxStream, refusal: &PeerRefusal) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    frame::put(&mut bytes, frame::kind::REFUSED, &refusal.encode());
    stream.write_all(&bytes).await?;
    stream.shutdown().await?;
    let mut rest = [0; 1 << 10];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

/// Hands frames over until the connection ends.
async fn read(shared: &Arc<Shared>, mut taken: Taken) -> End {
    let window = match taken.lane {
        Lane::Messages => shared.limits.messages_window,
        Lane::Bulk => shared.limits.bulk_window,
    };
    let credits = Arc::new(Semaphore::new(window));
    let link = lock(&shared.links).get(&taken.member).map(|link| link.lane(taken.lane).clone());
    loop {
        let frames = match frames(shared, &mut taken, link.as_deref()) {
            Ok(frames) => frames,
            Err(end) => return end,
        };
        if !frames.is_empty() {
            let weight = frames.iter().map(|frame| frame.len()).sum::<usize>() + EVENT_WEIGHT;
            let wait = credits.clone().acquire_many_owned(weight.min(window) as u32);
            let permit = tokio::select! {
                // The semaphore is never closed.
                permit = wait => match permit { Ok(permit) => permit, Err(_) => return End::Stopping },
                _ = &mut taken.place.ended => return End::Replaced,
            };
            let (from, boot, lane) = (taken.member, taken.boot, taken.lane);
            shared.tell(PeerEvent::Frames { from, boot, lane, frames, credit: Credit { _permit: permit } });
        }
        // One block serves many short reads.
        if taken.buffer.capacity() - taken.buffer.len() < frame::READ_LEN_MIN {
            taken.buffer.reserve(frame::READ_LEN);
        }
        tokio::select! {
            read = taken.stream.read_buf(&mut taken.buffer) => match read {
                Ok(0) => return End::Closed,
                Ok(_) => {}
                Err(error) => return closing(error),
            },
            _ = &mut taken.place.ended => return End::Replaced,
        }
    }
}

/// The messages that are whole in the buffer.
fn frames(shared: &Shared, taken: &mut Taken, link: Option<&Link>) -> Result<Vec<bytes::Bytes>, End> {
    let mut frames = Vec::new();
    while let Some((kind, body)) = frame::take(&mut taken.buffer, frame::BODY_MAX)? {
        match kind {
            frame::kind::MESSAGE => frames.push(body),
            frame::kind::REFUSED => {
                let refusal = PeerRefusal::decode(&body).ok_or_else(|| End::Protocol("it refused".to_owned()))?;
                shared.tell(PeerEvent::Refused { by: taken.member, refusal: refusal.clone() });
                return Err(End::RefusedByPeer(refusal));
            }
            kind => return Err(End::Protocol(format!("it sent a frame of kind {kind}"))),
        }
    }
    if let Some(link) = link {
        let bytes: usize = frames.iter().map(|frame| frame::HEADER_LEN + frame.len()).sum();
        link.traffic.received_frames.fetch_add(frames.len() as u64, Ordering::Relaxed);
        link.traffic.received_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
    Ok(frames)
}

/// The right to be the connection of a peer's lane; whoever takes it next ends this one.
struct Place {
    shared: Arc<Shared>,
    key: (MemberId, Lane),
    serial: u64,
    ended: oneshot::Receiver<()>,
}

impl Place {
    fn take(shared: &Arc<Shared>, member: MemberId, lane: Lane) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let (ends_with_this, ended) = oneshot::channel();
        let key = (member, lane);
        lock(&shared.accepted).insert(key, Accepted { serial, _ends_with_this: ends_with_this });
        Self { shared: shared.clone(), key, serial, ended }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut accepted = lock(&self.shared.accepted);
        if accepted.get(&self.key).is_some_and(|now| now.serial == self.serial) {
            accepted.remove(&self.key);
        }
    }
}
