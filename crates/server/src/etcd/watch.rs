//! etcd's Watch service: the task of one stream, between its client and the watch hub.
//!
//! Promises. The order of answers is the hub's; nothing is lost or made up here. A client that reads slowly fills only its own buffers.
//! Relies on. `watch_hub.rs` for everything that a watcher is.

use std::sync::Arc;

use tenure_wire::etcd::etcdserverpb as pb;

use super::{decode, failed, require_leader};
use crate::Context;
use crate::driver::{Handle, WatchRequest};
use crate::rpc::{Call, Code, Incoming, Outgoing, Router, Status};
use crate::status;
use crate::watch_hub::{StreamId, StreamOut, WatchCreate, WatchOptions};

pub(crate) fn mount(router: &mut Router, context: &Context) {
    let context = context.clone();
    router.stream("/etcdserverpb.Watch/Watch", move |call, incoming, outgoing| {
        watch(context.clone(), call, incoming, outgoing)
    });
}

/// Tells the hub when the task ends, in whatever way.
struct OpenStream {
    handle: Handle,
    out: Arc<StreamOut>,
    id: StreamId,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.out.close();
        self.handle.close_watch(self.id);
    }
}

async fn watch(context: Context, call: Call, mut incoming: Incoming, outgoing: Outgoing) -> Result<(), Status> {
    require_leader(&context, &call)?;
    let _place = context.stream_place().map_err(|_| Status::from(status::TOO_MANY_REQUESTS))?;
    let out = Arc::new(StreamOut::default());
    let id = context.open_watch(out.clone()).await.map_err(failed)?;
    let stream = OpenStream { handle: context.handle.clone(), out, id };
    let requests = async {
        while let Some(message) = incoming.next().await {
            let request: pb::WatchRequest = decode(message?)?;
            if let Some(request) = request.request_union.and_then(hub_request) {
                stream.handle.watch(id, request).await.map_err(failed)?;
            }
        }
        // A client that has said everything goes on watching, as with etcd: its stream ends when it goes away.
        std::future::pending().await
    };
    tokio::select! {
        ended = requests => ended,
        ended = send(&stream, &outgoing) => ended,
    }
}

fn hub_request(request: pb::watch_request::RequestUnion) -> Option<WatchRequest> {
    use pb::watch_create_request::FilterType;
    use pb::watch_request::RequestUnion;
    match request {
        RequestUnion::CreateRequest(create) => {
            let has = |filter: FilterType| create.filters.contains(&(filter as i32));
            let options = WatchOptions {
                prev_kv: create.prev_kv,
                no_put: has(FilterType::Noput),
                no_delete: has(FilterType::Nodelete),
                fragment: create.fragment,
                progress: create.progress_notify,
            };
            Some(WatchRequest::Create(WatchCreate {
                id: create.watch_id,
                key: create.key,
                range_end: create.range_end,
                start_revision: create.start_revision,
                options,
            }))
        }
        RequestUnion::CancelRequest(cancel) => Some(WatchRequest::Cancel(cancel.watch_id)),
        RequestUnion::ProgressRequest(_) => Some(WatchRequest::Progress),
    }
}

/// Carries what the hub writes to the client, and tells the hub when there is room for more.
async fn send(stream: &OpenStream, outgoing: &Outgoing) -> Result<(), Status> {
    loop {
        let woken = stream.out.wake.notified();
        while let Some(frames) = stream.out.take() {
            let len = frames.len();
            let sent = outgoing.send_framed(frames).await;
            if stream.out.sent(len) {
                stream.handle.watch(stream.id, WatchRequest::Drained).await.map_err(failed)?;
            }
            if sent.is_err() {
                return Err(Status::new(Code::Cancelled, "etcdserver: watch canceled"));
            }
        }
        if stream.out.is_ended() {
            return Err(status::STOPPED.into());
        }
        woken.await;
    }
}
