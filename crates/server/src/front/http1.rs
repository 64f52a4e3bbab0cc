//! HTTP/1.1: JSON and pages, by hyper. gRPC needs HTTP/2.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use http::Request;
use http_body_util::BodyExt;
use hyper_util::rt::{TokioIo, TokioTimer};

use super::App;
use super::route::dispatch;
use super::socket::Socket;

/// Bytes of headers that hyper buffers for one request.
const BUFFER_BYTES_MAX: usize = 128 << 10;

pub(super) async fn serve(app: Arc<App>, socket: Socket, peer: SocketAddr) {
    let shared = app.clone();
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let app = shared.clone();
        async move {
            let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
            Ok::<_, Infallible>(dispatch(&app, request, peer).await)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.config.header_timeout)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(socket), service);
    let mut connection = std::pin::pin!(connection);
    let mut bell = app.stop.bell();
    let mut stopping = false;
    let served = std::future::poll_fn(|cx| {
        if !stopping && bell.has_rung(&app.stop, cx) {
            stopping = true;
            connection.as_mut().graceful_shutdown();
        }
        connection.as_mut().poll(cx)
    })
    .await;
    if let Err(error) = served {
        tracing::debug!(%peer, %error, "an HTTP/1.1 connection ended early");
    }
}
