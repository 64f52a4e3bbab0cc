//! Where a request goes: a generated gRPC service, JSON, or a page.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Request, Response, StatusCode, header};
use http_body_util::BodyExt;

use super::{App, Body, FrontError, full, grpc};

/// A generated gRPC service, called as a function.
pub(crate) type TowerCall = Arc<dyn Fn(Request<Body>) -> BoxFuture<'static, Response<Body>> + Send + Sync>;

/// Whether a method is of one of the [`tower_services`], by the package that they share.
pub(super) fn is_generated(path: &str) -> bool {
    path.starts_with("/grpc.")
}

/// Reflection in both versions, and health. Rarely called, so they take the general road.
pub(super) fn tower_services() -> Result<HashMap<&'static str, TowerCall>, FrontError> {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            // The bytes, not the decoded set, which would have lost the HTTP annotations.
            .register_encoded_file_descriptor_set(tenure_wire::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let broken = |error: tonic_reflection::server::Error| FrontError::Reflection(error.to_string());
    let mut services = HashMap::new();
    services.insert("grpc.reflection.v1.ServerReflection", mount(builder().build_v1().map_err(broken)?));
    services.insert("grpc.reflection.v1alpha.ServerReflection", mount(builder().build_v1alpha().map_err(broken)?));
    // A fresh reporter says SERVING for the server as a whole, the empty name, which is what balancers ask for.
    let (_, health) = tonic_health::server::health_reporter();
    let health = mount(health);
    let in_etcds_words: TowerCall = Arc::new(move |request| health(request).map(say_unknown_service).boxed());
    services.insert("grpc.health.v1.Health", in_etcds_words);
    Ok(services)
}

/// The text of grpc-go, and so of etcd, for a service that is not known.
fn say_unknown_service(mut response: Response<Body>) -> Response<Body> {
    let not_found = header::HeaderValue::from_static("5");
    if response.headers().get("grpc-status") == Some(&not_found) {
        response.headers_mut().insert("grpc-message", header::HeaderValue::from_static("unknown service"));
    }
    response
}

fn mount<S>(service: S) -> TowerCall
where
    S: tower_service::Service<Request<Body>, Response = Response<tonic::body::Body>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    Arc::new(move |request| {
        let answered = |answer: Result<Response<tonic::body::Body>, Infallible>| {
            let Ok(response) = answer;
            response.map(|body| body.map_err(Into::into).boxed_unsync())
        };
        service.clone().call(request).map(answered).boxed()
    })
}

pub(super) async fn dispatch(app: &Arc<App>, request: Request<Body>, peer: SocketAddr) -> Response<Body> {
    let path = request.uri().path();
    if grpc::is_grpc(&request) {
        // Other gRPC calls over HTTP/2 do not come here.
        return match app.tower().get(grpc::service_of(path)) {
            Some(service) if request.version() == http::Version::HTTP_2 => service(request).await,
            None if request.version() == http::Version::HTTP_2 => {
                let status = app.router.unknown(path);
                let response = Response::builder().header(header::CONTENT_TYPE, "application/grpc");
                let response =
                    response.header("grpc-status", status.code.header()).header("grpc-message", status.message);
                // Neither header can be wrong: the path was parsed as a URI, which is printable ASCII.
                response.body(full("")).unwrap_or_else(|_| plain(StatusCode::NOT_FOUND, "unknown service\n"))
            }
            _ => plain(StatusCode::HTTP_VERSION_NOT_SUPPORTED, "gRPC requires HTTP/2\n"),
        };
    }
    if app.router.find(path).is_some() {
        let kind = request
            .headers()
            .get(header::CONTENT_TYPE)
            .map_or("".into(), |kind| String::from_utf8_lossy(kind.as_bytes()).into_owned());
        return plain(StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("invalid gRPC request content-type {kind:?}\n"));
    }
    if crate::transcode::owns(path) {
        return crate::transcode::serve(app, request, peer).await;
    }
    let (head, _) = request.into_parts();
    crate::pages::serve(app, &head.method, &head.uri).await
}

pub(crate) fn plain(status: StatusCode, text: impl Into<bytes::Bytes>) -> Response<Body> {
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    response
}
