//! A socket that knows which HTTP it speaks, counts its bytes, and may hold a lone PING acknowledgement back.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::App;
use crate::metrics::Counter;

/// What an HTTP/2 client sends first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A PING frame with the flag ACK: eight bytes of payload on stream 0.
const PING_ACK_HEAD: [u8; 9] = [0, 0, 8, 6, 1, 0, 0, 0, 0];
const PING_ACK_BYTES: usize = 17;

/// Slices of one vectored write, one of them for what was held.
const SLICES: usize = 64;

pub(super) enum Version {
    Http1,
    Http2,
}

pub(super) struct Socket {
    stream: TcpStream,
    /// Read ahead to tell the version; given to the first reader.
    sniffed: Bytes,
    app: Arc<App>,
    /// Bytes read, to tell a silent peer.
    read: Arc<Counter>,
    held: Held,
}

/// An acknowledgement that waits for company.
struct Held {
    ack: Bytes,
    /// Armed while `ack` is not empty. Boxed once per connection that ever holds.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Socket {
    pub(super) fn new(stream: TcpStream, app: Arc<App>) -> Self {
        let held = Held { ack: Bytes::new(), timer: None };
        Self { stream, sniffed: Bytes::new(), app, read: Arc::default(), held }
    }

    /// Reads until it is clear which version is spoken.
    pub(super) async fn sniff(&mut self) -> io::Result<Version> {
        let mut start = [0; PREFACE.len()];
        let mut len = 0;
        let version = loop {
            let read = self.stream.read(&mut start[len..]).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            len += read;
            if start[..len] != PREFACE[..len] {
                break Version::Http1;
            }
            if len == PREFACE.len() {
                break Version::Http2;
            }
        };
        self.sniffed = Bytes::copy_from_slice(&start[..len]);
        self.read.add(len as u64);
        Ok(version)
    }

    /// A counter that moves whenever the peer is heard.
    pub(super) fn read_counter(&self) -> Arc<Counter> {
        self.read.clone()
    }

    /// Writes held bytes and then `parts`; tells how much of `parts` was taken.
    fn poll_write_all(&mut self, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if self.held.ack.is_empty() {
            return Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        }
        loop {
            let mut slices = [IoSlice::new(&[]); SLICES];
            slices[0] = IoSlice::new(&self.held.ack);
            let count = parts.len().min(SLICES - 1);
            slices[1..=count].copy_from_slice(&parts[..count]);
            let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, &slices[..=count]))?;
            let of_held = written.min(self.held.ack.len());
            self.held.ack.advance(of_held);
            if written > of_held || (self.held.ack.is_empty() && parts.iter().all(|part| part.is_empty())) {
                return Poll::Ready(Ok(written - of_held));
            }
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
        }
    }

    /// Takes a lone acknowledgement aside; `true` if it did.
    fn hold(&mut self, cx: &mut Context<'_>, parts: &[IoSlice<'_>]) -> bool {
        let hold = self.app.config.ping_hold;
        let Some(ack) = lone_ping_ack(parts).filter(|_| !hold.is_zero() && self.held.ack.is_empty()) else {
            return false;
        };
        self.held.ack = Bytes::copy_from_slice(ack);
        let until = Instant::now() + hold;
        let timer = self.held.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        timer.as_mut().reset(until);
        // Registers the waker; it has just been set into the future.
        let _ = timer.as_mut().poll(cx);
        true
    }

    /// Sends what was held for long enough.
    fn poll_release(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.held.ack.is_empty() {
            return Ok(());
        }
        let due = self.held.timer.as_mut().is_none_or(|timer| timer.as_mut().poll(cx).is_ready());
        if due && let Poll::Ready(Err(error)) = self.poll_write_all(cx, &[]) {
            return Err(error);
        }
        Ok(())
    }

    fn sent(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(written)) = &written {
            self.app.figures.sent_bytes.add(*written as u64);
        }
        written
    }
}

fn lone_ping_ack<'a>(parts: &'a [IoSlice<'_>]) -> Option<&'a [u8]> {
    let mut filled = parts.iter().filter(|part| !part.is_empty());
    let only: &[u8] = filled.next()?;
    (filled.next().is_none() && only.len() == PING_ACK_BYTES && only.starts_with(&PING_ACK_HEAD)).then_some(only)
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.sniffed.is_empty() {
            let count = this.sniffed.len().min(buf.remaining());
            buf.put_slice(&this.sniffed[..count]);
            this.sniffed.advance(count);
            return Poll::Ready(Ok(()));
        }
        // Every turn of the connection reads, so this is where a held acknowledgement is looked after.
        this.poll_release(cx)?;
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut this.stream).poll_read(cx, buf));
        let read = (buf.filled().len() - before) as u64;
        this.read.add(read);
        this.app.figures.received_bytes.add(read);
        Poll::Ready(result)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.hold(cx, parts) {
            return Poll::Ready(Ok(PING_ACK_BYTES));
        }
        let written = this.poll_write_all(cx, parts);
        this.sent(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A TCP socket has nothing of its own to flush, and what is held leaves by its timer.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
