//! Bodies in both directions, in the one shape that the transcoder, the pages and the generated services share.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http_body::Frame;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A request or response body.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;

pub(crate) fn full(data: impl Into<Bytes>) -> Body {
    http_body_util::Full::new(data.into()).map_err(|never| match never {}).boxed_unsync()
}

/// The body of an HTTP/2 request. The peer's window is lent again as the data is taken.
pub(super) struct H2Body(pub(super) h2::RecvStream);

impl http_body::Body for H2Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(data) = ready!(self.0.poll_data(cx)) {
            let data = data?;
            // Fails only for a stream that is gone, which the next read tells.
            let _ = self.0.flow_control().release_capacity(data.len());
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let trailers = ready!(self.0.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }
}

/// What is handed to `h2`: a gRPC frame head, if any, in front of bytes that are not copied for it.
#[derive(Debug)]
pub(super) struct Payload {
    head: [u8; 5],
    /// Where in the head the unsent part begins; 5 when there is none.
    at: usize,
    body: Bytes,
}

impl Payload {
    pub(super) fn plain(body: Bytes) -> Self {
        Self { head: [0; 5], at: 5, body }
    }

    pub(super) fn message(body: Bytes) -> Self {
        let len = u32::try_from(body.len()).unwrap_or(u32::MAX).to_be_bytes();
        Self { head: [0, len[0], len[1], len[2], len[3]], at: 0, body }
    }
}

impl Buf for Payload {
    fn remaining(&self) -> usize {
        self.head.len() - self.at + self.body.len()
    }

    fn chunk(&self) -> &[u8] {
        if self.at < self.head.len() { &self.head[self.at..] } else { &self.body }
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [std::io::IoSlice<'a>]) -> usize {
        let mut filled = 0;
        for part in [&self.head[self.at..], &self.body[..]] {
            if !part.is_empty() && filled < slices.len() {
                slices[filled] = std::io::IoSlice::new(part);
                filled += 1;
            }
        }
        filled
    }

    fn advance(&mut self, count: usize) {
        let of_head = count.min(self.head.len() - self.at);
        self.at += of_head;
        self.body.advance(count - of_head);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_its_head_and_its_bytes() {
        let mut payload = Payload::message(Bytes::from_static(b"abc"));
        assert_eq!(payload.remaining(), 8);
        payload.advance(2);
        assert_eq!(payload.chunk(), [0, 0, 3]);
        payload.advance(4);
        assert_eq!(payload.chunk(), b"bc");
        assert_eq!(payload.copy_to_bytes(2), "bc");
        assert!(!payload.has_remaining());
        assert_eq!(Payload::plain(Bytes::from_static(b"x")).chunk(), b"x");
    }
}
