//! A small gRPC client over bare `h2`: one connection, as little of its own CPU time as possible.
//!
//! The load generator shares the machine with the server that it measures, so what it costs itself must not drown the server.
//! It speaks to any etcd endpoint and sends the same bytes to each.

use anyhow::{Context as _, Result, bail};
use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use prost::Message;
use std::sync::Arc;
use tokio::net::TcpStream;

/// One HTTP/2 connection. Cloning shares it.
#[derive(Clone)]
pub(crate) struct Rpc {
    send: SendRequest<Bytes>,
    authority: Arc<str>,
}

/// The sending half of a stream of messages, and the receiving one.
pub(crate) struct Stream {
    pub(crate) send: h2::SendStream<Bytes>,
    pub(crate) receive: Receive,
}

pub(crate) struct Receive {
    response: Option<h2::client::ResponseFuture>,
    body: Option<h2::RecvStream>,
    buffer: BytesMut,
}

impl Rpc {
    pub(crate) async fn connect(endpoint: &str) -> Result<Self> {
        let address = endpoint.trim_start_matches("http://");
        let tcp = TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))?;
        tcp.set_nodelay(true)?;
        let (send, connection) = h2::client::Builder::new()
            .initial_window_size(4 << 20)
            .initial_connection_window_size(16 << 20)
            .handshake(tcp)
            .await
            .with_context(|| format!("HTTP/2 handshake with {address}"))?;
        // Ends with the last handle of the connection.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Self { send, authority: address.into() })
    }

    fn request(&self, path: &str) -> Result<http::Request<()>> {
        Ok(http::Request::post(format!("http://{}{path}", self.authority))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?)
    }

    /// One call with one answer.
    pub(crate) async fn unary<A: Message + Default>(&mut self, path: &str, question: &impl Message) -> Result<A> {
        let answer = self.unary_bytes(path, frame(question)).await?;
        A::decode(answer).context("decoding the answer")
    }

    /// The same with an encoded, framed question and an undecoded answer.
    pub(crate) async fn unary_bytes(&mut self, path: &str, framed: Bytes) -> Result<Bytes> {
        let request = self.request(path)?;
        std::future::poll_fn(|cx| self.send.poll_ready(cx)).await?;
        let (response, mut body) = self.send.send_request(request, false)?;
        body.send_data(framed, true)?;
        let mut receive = Receive { response: Some(response), body: None, buffer: BytesMut::new() };
        let answer = receive.next_bytes().await?;
        let status = receive.finish().await;
        match (answer, status) {
            (Some(answer), Ok(())) => Ok(answer),
            (_, Err(e)) => Err(e),
            (None, Ok(())) => bail!("the answer has no message"),
        }
    }

    pub(crate) async fn stream(&mut self, path: &str) -> Result<Stream> {
        let request = self.request(path)?;
        std::future::poll_fn(|cx| self.send.poll_ready(cx)).await?;
        let (response, send) = self.send.send_request(request, false)?;
        Ok(Stream { send, receive: Receive { response: Some(response), body: None, buffer: BytesMut::new() } })
    }
}

impl Stream {
    pub(crate) fn send(&mut self, message: &impl Message) -> Result<()> {
        Ok(self.send.send_data(frame(message), false)?)
    }
}

impl Receive {
    pub(crate) async fn next<A: Message + Default>(&mut self) -> Result<Option<A>> {
        match self.next_bytes().await? {
            Some(bytes) => Ok(Some(A::decode(bytes).context("decoding a message of a stream")?)),
            None => Ok(None),
        }
    }

    /// The next message, or `None` at the end of the stream.
    pub(crate) async fn next_bytes(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Some(message) = self.take_message() {
                return Ok(Some(message));
            }
            if let Some(response) = self.response.take() {
                let (parts, body) = response.await?.into_parts();
                check_status(&parts.headers)?;
                self.body = Some(body);
            }
            let Some(body) = self.body.as_mut() else { return Ok(None) };
            match body.data().await {
                None => return Ok(None),
                Some(chunk) => {
                    let chunk = chunk?;
                    body.flow_control().release_capacity(chunk.len())?;
                    self.buffer.extend_from_slice(&chunk);
                }
            }
        }
    }

    fn take_message(&mut self) -> Option<Bytes> {
        let header: [u8; 5] = self.buffer.get(..5)?.try_into().ok()?;
        let len = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
        if self.buffer.len() < 5 + len {
            return None;
        }
        let mut whole = self.buffer.split_to(5 + len);
        Some(whole.split_off(5).freeze())
    }

    /// Reads to the trailers and tells the status in them.
    async fn finish(&mut self) -> Result<()> {
        let Some(body) = self.body.as_mut() else { return Ok(()) };
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            body.flow_control().release_capacity(chunk.len())?;
        }
        match body.trailers().await? {
            Some(trailers) => check_status(&trailers),
            None => bail!("the answer has no trailers"),
        }
    }
}

fn check_status(headers: &http::HeaderMap) -> Result<()> {
    match headers.get("grpc-status").map(|v| v.as_bytes()) {
        None | Some(b"0") => Ok(()),
        Some(code) => bail!(
            "gRPC status {}: {}",
            code.escape_ascii(),
            headers.get("grpc-message").map(|m| m.as_bytes().escape_ascii().to_string()).unwrap_or_default()
        ),
    }
}

/// A message with gRPC's five bytes before it.
pub(crate) fn frame(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut b = BytesMut::with_capacity(5 + len);
    b.put_u8(0);
    b.put_u32(len as u32);
    message.encode(&mut b).expect("the buffer grows as needed");
    b.freeze()
}
