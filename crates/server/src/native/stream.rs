//! The pipeline: many requests in flight on one stream, several to a message.
//!
//! Promises. P1: what one read of the stream delivered goes to the driver as one message, and what one round of the driver answered
//! goes back as one message. P2: at most `OPEN_MAX` requests of a stream are open; beyond it nothing is read. What may wait for others is counted apart: it
//! takes no place from what is answered at once, and the one beyond `WAITS_MAX` is refused.
//! P3: a refused request is answered in its place and disturbs no other. P4: what must look at the state before it is planned does so beside the others,
//! and holds none of them up. P5: when the caller has said everything, the stream ends behind the last answer that does not wait for others. P6: a request is as
//! large as it may be alone.
//! Not promised. Any order among the requests of a stream.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::Message as _;
use tenure_machine::Txn;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::reply::Result as Answer;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::queues::OpenWaits;
use super::{
    Caller, Finish, Looking, NativeRead, Outcome, Plan, Plans, Refused, full_header, kv, locks, refuse, sessions,
};
use crate::Context;
use crate::driver::{Failure, Handle, SessionRef};
use crate::etcd::encode::{self, Contact};
use crate::rpc::{Call, Code, FRAME_HEAD, Incoming, Outgoing, Router, Status};
use crate::status as words;

/// Requests of one stream without an answer, but for those that may wait.
const OPEN_MAX: usize = 4_096;
/// Those that may wait: for locks, jobs, an election, an attempt or a pool.
const WAITS_MAX: usize = 10_000;
/// Requests given to the driver in one message.
const GATHER_MAX: usize = 1_024;
/// One message of answers is cut when it has so many bytes.
const REPLIES_BYTES: usize = 1 << 20;

pub(crate) fn mount(router: &mut Router, context: &Context) {
    let context = context.clone();
    let plans = Arc::new(std::mem::take(&mut router.plans));
    router.stream("/tenure.v1.Pipeline/Stream", move |call, incoming, outgoing| {
        stream(context.clone(), plans.clone(), call, incoming, outgoing)
    });
}

/// A request as the driver keeps it while it is open.
pub(crate) struct PipeItem {
    id: u64,
    finish: Finish,
    /// Of a read of this member alone: its answer tells how old it may be.
    stale: Option<Contact>,
    waits: bool,
}

pub(crate) enum PipeRequest {
    Write { txn: Txn, item: PipeItem },
    Read { read: NativeRead, stale: bool, item: PipeItem },
    Renew { sessions: Vec<SessionRef>, item: PipeItem },
}

/// What the driver hands to the task of a pipeline.
#[derive(Default)]
pub(crate) struct PipeOut {
    done: Mutex<Vec<(PipeItem, Outcome)>>,
    wake: Arc<tokio::sync::Notify>,
    /// The server is stopping.
    ended: AtomicBool,
}

impl PipeOut {
    fn take(&self) -> Vec<(PipeItem, Outcome)> {
        std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The driver's side of all pipelines.
#[derive(Default)]
pub(crate) struct Pipes {
    pipes: HashMap<u64, Pipe>,
    next: u64,
    dirty: Vec<u64>,
}

struct Pipe {
    out: Arc<PipeOut>,
    done: Vec<(PipeItem, Outcome)>,
}

impl Pipes {
    pub(crate) fn open(&mut self, out: Arc<PipeOut>) -> u64 {
        self.next += 1;
        self.pipes.insert(self.next, Pipe { out, done: Vec::new() });
        self.next
    }

    /// What is still open has no one to be told.
    pub(crate) fn close(&mut self, pipe: u64) {
        self.pipes.remove(&pipe);
    }

    pub(crate) fn done(&mut self, pipe: u64, item: PipeItem, outcome: Outcome) {
        let Some(found) = self.pipes.get_mut(&pipe) else { return };
        if found.done.is_empty() {
            self.dirty.push(pipe);
        }
        found.done.push((item, outcome));
    }

    pub(crate) fn flush(&mut self, wakes: &mut Vec<Arc<tokio::sync::Notify>>) {
        for pipe in self.dirty.drain(..) {
            let Some(pipe) = self.pipes.get_mut(&pipe) else { continue };
            let mut done = pipe.out.done.lock().unwrap_or_else(PoisonError::into_inner);
            if done.is_empty() {
                std::mem::swap(&mut *done, &mut pipe.done);
            } else {
                done.append(&mut pipe.done);
            }
            wakes.push(pipe.out.wake.clone());
        }
    }

    pub(crate) fn end_all(&mut self) {
        for pipe in self.pipes.values() {
            pipe.out.ended.store(true, Ordering::Release);
            pipe.out.wake.notify_one();
        }
    }

    /// Forgets pipelines whose task is gone and could not tell.
    pub(crate) fn sweep(&mut self) {
        self.pipes.retain(|_, pipe| Arc::strong_count(&pipe.out) > 1);
    }
}

/// Tells the driver when the task ends, in whatever way.
struct OpenPipe {
    handle: Handle,
    id: u64,
}

impl Drop for OpenPipe {
    fn drop(&mut self) {
        self.handle.close_pipe(self.id);
    }
}

/// How many requests have no answer that was sent, shared by the reading and the writing half.
#[derive(Default)]
struct Open {
    requests: AtomicUsize,
    waits: AtomicUsize,
    room: tokio::sync::Notify,
    /// What waits for jobs leaves with the stream.
    receivers: OpenWaits,
}

impl Open {
    fn counter(&self, waits: bool) -> &AtomicUsize {
        if waits { &self.waits } else { &self.requests }
    }
}

async fn stream(
    context: Context,
    plans: Arc<Plans>,
    call: Call,
    mut incoming: Incoming,
    outgoing: Outgoing,
) -> Result<(), Status> {
    let out = Arc::new(PipeOut::default());
    let open = Open { receivers: OpenWaits::of(&context), ..Open::default() };
    let stopping = |_| Status::from(words::STOPPED);
    let id = context.open_pipe(out.clone()).await.map_err(stopping)?;
    let pipe = OpenPipe { handle: context.handle.clone(), id };
    // A stream has no deadline of its own calls, and its metadata names no request.
    let caller = Caller::default();
    drop(call);
    let (looks, mut to_look) = mpsc::unbounded_channel();
    let reader = async {
        while let Some(message) = incoming.next().await {
            let mut gathered = Gathered::default();
            gathered.add(&context, &plans, &caller, &open, message?)?;
            while gathered.requests.len() < GATHER_MAX
                && let Some(message) = incoming.try_next_ready()
            {
                gathered.add(&context, &plans, &caller, &open, message?)?;
            }
            if !gathered.refused.is_empty() {
                outgoing.send_framed(frame_replies(&context, gathered.refused)).await.map_err(|_| gone())?;
            }
            for look in gathered.looks {
                // Fails only where nobody receives, and `looker` does for as long as this runs.
                open.requests.fetch_add(1, Ordering::Relaxed);
                drop(looks.send(look));
            }
            if !gathered.requests.is_empty() {
                pipe.handle.pipe(id, gathered.requests).await.map_err(stopping)?;
            }
            while open.requests.load(Ordering::Relaxed) >= OPEN_MAX {
                open.room.notified().await;
            }
        }
        // The caller has said everything; what is open is still answered, what may wait is not.
        while open.requests.load(Ordering::Relaxed) > 0 {
            open.room.notified().await;
        }
        Ok(())
    };
    let looker = async {
        let mut looks = JoinSet::new();
        loop {
            let (id, planned) = tokio::select! {
                Some((id, look)) = to_look.recv() => {
                    looks.spawn(async move { (id, look.await) });
                    continue;
                }
                Some(looked) = looks.join_next() => looked.map_err(|_| Status::from(words::STOPPED))?,
            };
            match planned.and_then(|plan| begin(&context, &open, id, plan)) {
                Ok(request) => pipe.handle.pipe(pipe.id, vec![request]).await.map_err(stopping)?,
                Err(error) => {
                    outgoing.send_framed(frame_replies(&context, vec![(id, error)])).await.map_err(|_| gone())?;
                }
            }
            // What began is counted by itself; what did not has been answered.
            open.requests.fetch_sub(1, Ordering::Relaxed);
            open.room.notify_one();
        }
    };
    let writer = async {
        loop {
            out.wake.notified().await;
            let done = out.take();
            if !done.is_empty() {
                answer(&context, &open, done, &outgoing).await?;
            } else if out.ended.load(Ordering::Acquire) {
                return Err(words::STOPPED.into());
            }
        }
    };
    tokio::select! {
        ended = reader => ended,
        ended = looker => ended,
        ended = writer => ended,
    }
}

fn gone() -> Status {
    Status::new(Code::Cancelled, "context canceled")
}

/// Finishes what one round of the driver answered, in as few messages as its size allows.
async fn answer(
    context: &Context,
    open: &Open,
    done: Vec<(PipeItem, Outcome)>,
    outgoing: &Outgoing,
) -> Result<(), Status> {
    let (mut replies, mut answered) = (Replies::new(), [0; 2]);
    for (PipeItem { id, finish, stale, waits }, outcome) in done {
        answered[usize::from(waits)] += 1;
        open.receivers.answered(id);
        // Only a cancellation that came too late asks further.
        let result = match finish {
            Finish::Cancel(_) => super::complete(context, finish, outcome).await,
            finish => finish.with(context, outcome),
        };
        let mut result = result.unwrap_or_else(|error| Answer::Error(*error));
        if let Some(contact) = stale {
            tell_age(contact, &mut result);
        }
        replies.push(id, result);
        if replies.bytes.len() >= REPLIES_BYTES {
            let full = std::mem::replace(&mut replies, Replies::new());
            send(open, full.finish(context), std::mem::take(&mut answered), outgoing).await?;
        }
    }
    send(open, replies.finish(context), answered, outgoing).await
}

/// Sends answers: so many to what is answered at once and to what may wait. Their requests are open until then, for a stream ends with the last that is.
async fn send(open: &Open, replies: Bytes, answered: [usize; 2], outgoing: &Outgoing) -> Result<(), Status> {
    outgoing.send_framed(replies).await.map_err(|_| gone())?;
    for (waits, count) in [false, true].into_iter().zip(answered) {
        open.counter(waits).fetch_sub(count, Ordering::Relaxed);
    }
    open.room.notify_one();
    Ok(())
}

fn tell_age(contact: Contact, answer: &mut Answer) {
    let header = match answer {
        Answer::Get(answer) => &mut answer.header,
        Answer::Range(answer) => &mut answer.header,
        _ => return,
    };
    header.get_or_insert_default().stale_ms = contact.age_ms();
}

fn frame_replies(context: &Context, refused: Vec<(u64, Refused)>) -> Bytes {
    let mut replies = Replies::new();
    for (id, error) in refused {
        replies.push(id, Answer::Error(*error));
    }
    replies.finish(context)
}

/// One framed message of answers, under construction.
struct Replies {
    bytes: BytesMut,
}

impl Replies {
    fn new() -> Self {
        let mut bytes = BytesMut::with_capacity(4096);
        bytes.put_bytes(0, FRAME_HEAD);
        Self { bytes }
    }

    fn push(&mut self, id: u64, result: Answer) {
        let reply = v1::Reply { id, result: Some(result) };
        let len = reply.encoded_len();
        self.bytes.reserve(len + 8);
        encode::put_message_head(&mut self.bytes, 1, len);
        // Fails only without room, and a `BytesMut` grows.
        let encoded = reply.encode(&mut self.bytes);
        debug_assert!(encoded.is_ok(), "a BytesMut has room");
    }

    fn finish(mut self, context: &Context) -> Bytes {
        if let Some(mut header) = full_header(context, tenure_machine::Revision(0)) {
            header.behaviour = context.identity.behaviour();
            encode::put_bytes(&mut self.bytes, 2, &header.encode_to_vec());
        }
        let len = (self.bytes.len() - FRAME_HEAD) as u32;
        self.bytes[1..FRAME_HEAD].copy_from_slice(&len.to_be_bytes());
        self.bytes.freeze()
    }
}

/// What one read of the stream delivered.
#[derive(Default)]
struct Gathered {
    requests: Vec<PipeRequest>,
    looks: Vec<(u64, Looking)>,
    refused: Vec<(u64, Refused)>,
}

impl Gathered {
    fn add(
        &mut self,
        context: &Context,
        plans: &Plans,
        caller: &Caller,
        open: &Open,
        message: Bytes,
    ) -> Result<(), Status> {
        let whole = message.len();
        let message = v1::Requests::decode(message).map_err(|error| Status::undecodable(&error))?;
        self.requests.reserve(message.requests.len());
        for request in message.requests {
            let id = request.id;
            if let Some(len) = larger_than(context.settings.max_request_bytes, &request, whole) {
                self.refused.push((id, Box::new(words::too_large(len, context.settings.max_request_bytes))));
                continue;
            }
            match plan(context, plans, caller, request) {
                Ok(Plan::Look(look)) => self.looks.push((id, look)),
                Ok(plan) => match begin(context, open, id, plan) {
                    Ok(request) => self.requests.push(request),
                    Err(error) => self.refused.push((id, error)),
                },
                Err(error) => self.refused.push((id, error)),
            }
        }
        Ok(())
    }
}

/// The length of a request that is larger than it may be, alone as on the pipeline.
fn larger_than(max: usize, request: &v1::Request, whole: usize) -> Option<usize> {
    use v1::request::Call;
    // None of a small message is.
    if whole <= max {
        return None;
    }
    let len = match request.call.as_ref()? {
        Call::Put(request) => request.encoded_len(),
        Call::Get(request) => request.encoded_len(),
        Call::Delete(request) => request.encoded_len(),
        Call::Range(request) => request.encoded_len(),
        Call::Txn(request) => request.encoded_len(),
        Call::LockAcquire(request) => request.encoded_len(),
        Call::LockRelease(request) => request.encoded_len(),
        Call::LockCancel(request) => request.encoded_len(),
        Call::SessionCreate(request) => request.encoded_len(),
        Call::SessionRenew(request) => request.encoded_len(),
        Call::SessionEnd(request) => request.encoded_len(),
        Call::Unary(call) => call.body.len(),
    };
    (len > max).then_some(len)
}

fn begin(context: &Context, open: &Open, id: u64, plan: Plan) -> Result<PipeRequest, Refused> {
    let waits = matches!(&plan, Plan::Write(txn, _) if txn.may_wait());
    if waits && open.waits.load(Ordering::Relaxed) >= WAITS_MAX {
        return Err(Box::new(words::native_failure(&Failure::Overloaded, words::Kind::Change)));
    }
    open.counter(waits).fetch_add(1, Ordering::Relaxed);
    open.receivers.note(id, &plan);
    let item = |finish, stale| PipeItem { id, finish, stale, waits };
    Ok(match plan {
        Plan::Write(txn, finish) => PipeRequest::Write { txn, item: item(finish, None) },
        Plan::Read(read, stale, finish) => {
            let contact = stale.then(|| context.identity.contact());
            PipeRequest::Read { read, stale, item: item(finish, contact) }
        }
        Plan::Renew(sessions, finish) => PipeRequest::Renew { sessions, item: item(finish, None) },
        // A plan that was looked for is one to be carried out.
        Plan::Look(_) => return Err(super::mixed_up()),
    })
}

fn plan(context: &Context, plans: &Plans, caller: &Caller, request: v1::Request) -> Result<Plan, Refused> {
    use v1::request::Call;
    match request.call.ok_or_else(|| refuse("call", "the request is empty"))? {
        Call::Put(request) => kv::put(caller, &request),
        Call::Get(request) => kv::get(&request),
        Call::Delete(request) => kv::delete(caller, &request),
        Call::Range(request) => kv::range(&request),
        Call::Txn(request) => kv::txn(context, caller, &request),
        Call::LockAcquire(request) => locks::acquire(context, caller, request),
        Call::LockRelease(request) => locks::release(caller, &request),
        Call::LockCancel(request) => locks::cancel(caller, &request),
        Call::SessionCreate(request) => sessions::create(context, caller, request),
        Call::SessionRenew(request) => sessions::renew(&request),
        Call::SessionEnd(request) => sessions::end(caller, &request),
        Call::Unary(call) => match plans.get(&call.method[..]) {
            Some(plan) => plan(context, caller, call.body),
            None => Err(refuse("method", format!("a pipeline knows no change `{}`", call.method))),
        },
    }
}
