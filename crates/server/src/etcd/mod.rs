//! The etcd v3 face: each service of `etcdserverpb`, checked in etcd's order and answered in its words.
//!
//! Promises. Header fields, revisions, codes, texts and limits are those of etcd 3.7 wherever a client can see them; COMPAT.md lists what differs.
//! Relies on. `machine` has etcd's semantics; nothing here decides what a transaction does.

pub(crate) mod auth;
pub(crate) mod cluster;
pub mod encode;
pub(crate) mod kv;
pub(crate) mod lease;
pub(crate) mod maintenance;
pub(crate) mod watch;

use bytes::Bytes;
use prost::Message;

use crate::Context;
use crate::driver::Failure;
use crate::rpc::{Call, Router, Status};
use crate::status;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    kv::mount(router, context);
    watch::mount(router, context);
    lease::mount(router, context);
    cluster::mount(router, context);
    maintenance::mount(router, context);
    auth::mount(router, context);
}

pub(crate) fn decode<M: Message + Default>(message: Bytes) -> Result<M, Status> {
    M::decode(message).map_err(|error| Status::undecodable(&error))
}

pub(crate) fn encoded(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

pub(crate) fn failed(failure: Failure) -> Status {
    status::etcd_failure(&failure)
}

/// A client may ask to be refused at once while there is no leader. A single member that runs has one.
pub(crate) fn require_leader(context: &Context, call: &Call) -> Result<(), Status> {
    let wants = call.metadata.get("hasleader").is_some_and(|value| value.as_bytes() == b"true");
    if wants && context.is_stopping() { Err(status::NO_LEADER.into()) } else { Ok(()) }
}

/// Mounts a call that decodes its request and encodes its answer as messages.
pub(crate) fn unary<Q, A, F, R>(router: &mut Router, context: &Context, path: &'static str, method: F)
where
    Q: Message + Default + 'static,
    A: Message + 'static,
    F: Fn(Context, Q) -> R + Clone + Send + Sync + 'static,
    R: Future<Output = Result<A, Status>> + Send + 'static,
{
    let context = context.clone();
    router.unary(path, move |call, message| {
        let (context, method) = (context.clone(), method.clone());
        async move {
            require_leader(&context, &call)?;
            let request = decode(message)?;
            Ok(encoded(&method(context, request).await?))
        }
    });
}
