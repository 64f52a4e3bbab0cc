//! Queues of jobs: enqueue, receive, settle, and a worker that does the rest.
//!
//! Promises. A [`Delivery`] knows its own deadline, counted from the sending of the call that got it, on a clock that counts suspension: past it
//! [`Delivery::check`] refuses, whatever the server may think. A [`Work`] heartbeats while a job runs, drops the work of a delivery that is lost
//! or cancelled, settles each job with the receipt of its own delivery, and stops in order: no new jobs, then those that run, then it ends.
//! Not promised. That a job runs once: an answer may be lost on its way, and a worker may be frozen while another takes over. Let the effect check
//! the token of the delivery, or a marker.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tenure_wire::tenure::v1;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tonic::transport::Channel;

use crate::client::{Client, all_pages, drawn_name};
use crate::clock::{BootTime, millis};
use crate::error::{Code, Error, Problem, found};
use crate::lease::{LeaseTiming, LostReason};
use crate::pipeline::RECEIVE_BYTES;
use crate::requests;

/// The longest wait of one receive.
const WAIT_MAX: Duration = Duration::from_secs(20);
/// Between tries of a worker whose server cannot be reached; doubled up to the second.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// How long jobs that run may go on after a worker was told to stop.
const GRACE: Duration = Duration::from_secs(30);

impl Client {
    /// The queue of this name. One that is not there is made by its first job.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// use std::time::Duration;
    /// use tenure_client::NewJob;
    /// let mail = client.queue("mail");
    /// mail.enqueue("to=ada").await?;
    /// mail.enqueue(NewJob::new("to=bob").key("welcome/bob").delay(Duration::from_secs(60))).await?;
    /// for job in mail.receive().wait(Duration::from_secs(20)).await? {
    ///     println!("{} {}", job.id(), job.payload_str().unwrap_or("?"));
    ///     job.ack().await?;
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn queue(&self, name: impl Into<String>) -> Queue {
        Queue { client: self.clone(), name: name.into() }
    }

    /// Every queue whose name begins with `prefix`, by name.
    ///
    /// # Errors
    /// As every read.
    pub async fn queues(&self, prefix: &str) -> Result<Vec<QueueInfo>, Error> {
        let page = |after| async move {
            let (prefix, namespace) = (prefix.to_owned(), self.namespace());
            let request = v1::QueueListRequest { prefix, limit: 1_000, after, namespace, ..Default::default() };
            let ask = |channel| {
                let (mut queues, request) = (queues_of(channel), request.clone());
                async move { queues.list(request).await }
            };
            let reply = self.read(ask).await?;
            Ok((reply.queues.into_iter().map(QueueInfo::from).collect(), reply.next))
        };
        all_pages(page).await
    }

    /// Looks at one job; `None` where its record is gone.
    ///
    /// # Errors
    /// As every read; INVALID for what is no id of a job.
    pub async fn job(&self, id: &str) -> Result<Option<JobInfo>, Error> {
        let request = v1::JobGetRequest { id: id.to_owned(), namespace: self.namespace(), ..Default::default() };
        let reply = self
            .read(|channel| {
                let (mut queues, request) = (queues_of(channel), request.clone());
                async move { queues.get_job(request).await }
            })
            .await;
        found(reply.map(|reply| reply.job.map(JobInfo::from)))
    }

    /// Cancels a job and tells its state: one that runs is cancelled when its worker hears of it, or at once with `force`.
    ///
    /// # Errors
    /// NOT_FOUND for a job whose record is gone, else as every change.
    pub async fn cancel_job(&self, id: &str, reason: &str, force: bool) -> Result<String, Error> {
        let request = v1::JobCancelRequest {
            id: id.to_owned(),
            reason: reason.to_owned(),
            force,
            namespace: self.namespace(),
            request: None,
        };
        let plan = self.plan("cancel job", true);
        self.change(plan, "/tenure.v1.Queues/Cancel", &request).await.map(|reply: v1::MoveReply| reply.state)
    }

    /// Settles a delivery by its receipt, where no [`Delivery`] is at hand: the job is done.
    ///
    /// # Errors
    /// FENCED for any but the receipt of the newest delivery, else as every change.
    pub async fn ack_job(&self, id: &str, token: u64, result: &[u8]) -> Result<(), Error> {
        let receipt =
            v1::JobReceipt { id: id.to_owned(), token, result_bytes: result.to_vec().into(), ..Default::default() };
        let request = v1::AckRequest { receipts: vec![receipt], namespace: self.namespace(), ..Default::default() };
        // Without a request id: the same receipt twice succeeds twice.
        let _: v1::ReceiveReply = self.unary(self.plan("ack", true), "/tenure.v1.Queues/Ack", &request).await?;
        Ok(())
    }

    /// The delivery of this receipt has failed: after `delay`, or the backoff of the queue, the job is tried again; with `dead` it is not.
    ///
    /// # Errors
    /// FENCED for any but the receipt of the newest delivery, else as every change.
    pub async fn nack_job(
        &self,
        id: &str,
        token: u64,
        reason: &str,
        delay: Option<Duration>,
        dead: bool,
    ) -> Result<JobMoved, Error> {
        let request = v1::NackRequest {
            id: id.to_owned(),
            token,
            delay_ms: delay.map(millis),
            reason: reason.to_owned(),
            dead,
            namespace: self.namespace(),
            request: None,
        };
        let plan = self.plan("nack", true);
        self.change(plan, "/tenure.v1.Queues/Nack", &request).await.map(|reply: v1::MoveReply| reply.into())
    }

    /// Gives a job back unharmed; no attempt is spent.
    ///
    /// # Errors
    /// FENCED for any but the receipt of the newest delivery, else as every change.
    pub async fn release_job(&self, id: &str, token: u64) -> Result<JobMoved, Error> {
        let request = v1::JobReleaseRequest { id: id.to_owned(), token, namespace: self.namespace(), request: None };
        let plan = self.plan("release job", true);
        self.change(plan, "/tenure.v1.Queues/Release", &request).await.map(|reply: v1::MoveReply| reply.into())
    }

    /// Prolongs a delivery by its receipt; `None` gives it its visibility again.
    ///
    /// # Errors
    /// FENCED for any but the receipt of the newest delivery, else as every change.
    pub async fn heartbeat_job(
        &self,
        id: &str,
        token: u64,
        extend: Option<Duration>,
        progress: &str,
    ) -> Result<JobBeat, Error> {
        let request = v1::JobHeartbeatRequest {
            id: id.to_owned(),
            token,
            extend_ms: extend.map_or(0, millis),
            progress: progress.to_owned(),
            namespace: self.namespace(),
            request: None,
        };
        let plan = self.plan("heartbeat", true);
        let reply: v1::JobHeartbeatReply = self.unary(plan, "/tenure.v1.Queues/Heartbeat", &request).await?;
        Ok(JobBeat {
            remaining: Duration::from_millis(reply.remaining_ms),
            cancel_requested: reply.cancel_requested,
            should_yield: reply.should_yield,
        })
    }
}

fn queues_of(channel: Channel) -> v1::queues_client::QueuesClient<Channel> {
    v1::queues_client::QueuesClient::new(channel).max_decoding_message_size(RECEIVE_BYTES)
}

/// Where a job went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobMoved {
    /// Its state now: `ready`, `backoff`, `dead`, `cancelled`.
    pub state: String,
    /// Until it is tried again.
    pub delay: Duration,
    /// Attempts so far.
    pub attempt: u32,
}

impl From<v1::MoveReply> for JobMoved {
    fn from(reply: v1::MoveReply) -> Self {
        Self { state: reply.state, delay: Duration::from_millis(reply.delay_ms), attempt: reply.attempt }
    }
}

/// The answer to a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobBeat {
    /// Until the visibility ends.
    pub remaining: Duration,
    /// Somebody wants the job to be cancelled: stop, and nack it.
    pub cancel_requested: bool,
    /// The queue was paused, or something more urgent is ready.
    pub should_yield: bool,
}

/// A job to be enqueued. Text and bytes become jobs without anything else.
#[derive(Clone, Debug, Default)]
pub struct NewJob(pub(crate) v1::NewJob);

impl<T: Into<Vec<u8>>> From<T> for NewJob {
    fn from(payload: T) -> Self {
        Self::new(payload)
    }
}

impl NewJob {
    /// A job with this payload, at most 256 KiB.
    #[must_use]
    pub fn new(payload: impl Into<Vec<u8>>) -> Self {
        Self(v1::NewJob { payload_bytes: payload.into().into(), ..Default::default() })
    }

    /// Ready after this time.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.0.delay_ms = millis(delay);
        self
    }

    /// Ready at this moment of the server's wall clock, which is turned into a delay when the call arrives.
    #[must_use]
    pub fn run_at(mut self, at: SystemTime) -> Self {
        self.0.run_at_unix_ms = millis(at.duration_since(UNIX_EPOCH).unwrap_or_default()).max(1);
        self
    }

    /// From -8 to 7; higher ones are delivered first.
    #[must_use]
    pub fn priority(mut self, priority: i32) -> Self {
        self.0.priority = priority;
        self
    }

    /// Jobs of a group are delivered in the order of their enqueue, one at a time.
    #[must_use]
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.0.group = group.into();
        self
    }

    /// On whose behalf: tenants take turns.
    #[must_use]
    pub fn tenant(mut self, tenant: impl Into<String>) -> Self {
        self.0.tenant = tenant.into();
        self
    }

    /// No second job with this key is taken until this one is done, dead or cancelled.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.0.dedup_key = key.into();
        self
    }

    /// With a key: for this long from the enqueue instead, whatever becomes of the job.
    #[must_use]
    pub fn key_window(mut self, window: Duration) -> Self {
        self.0.dedup_scope = v1::DedupScope::Window.into();
        self.0.dedup_window_ms = millis(window);
        self
    }

    /// With a key: until the job is delivered for the first time instead.
    #[must_use]
    pub fn key_until_started(mut self) -> Self {
        self.0.dedup_scope = v1::DedupScope::UntilStarted.into();
        self
    }

    /// With a key: what a duplicate does.
    #[must_use]
    pub fn on_duplicate(mut self, on: OnDuplicate) -> Self {
        let on = match on {
            OnDuplicate::ReturnExisting => v1::OnDuplicate::ReturnExisting,
            OnDuplicate::ReplacePayload => v1::OnDuplicate::ReplacePayload,
            OnDuplicate::Error => v1::OnDuplicate::Error,
        };
        self.0.on_duplicate = on.into();
        self
    }

    /// Attempts before it is dead, 1 to 1,000, in place of the queue's.
    #[must_use]
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.0.max_attempts = attempts;
        self
    }

    /// How long a delivery lasts without a heartbeat, in place of the queue's.
    #[must_use]
    pub fn visibility(mut self, visibility: Duration) -> Self {
        self.0.visibility_ms = millis(visibility);
        self
    }

    /// How long its record is kept when it is done, in place of the queue's.
    #[must_use]
    pub fn retention(mut self, retention: Duration) -> Self {
        self.0.retention_ms = Some(millis(retention));
        self
    }

    /// Dead if it is not delivered within this time.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.0.ttl_ms = millis(ttl);
        self
    }

    /// A header, for whoever receives it.
    #[must_use]
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.headers.insert(name.into(), value.into());
        self
    }

    /// W3C trace context of who enqueues it.
    #[must_use]
    pub fn trace(mut self, traceparent: impl Into<String>, tracestate: impl Into<String>) -> Self {
        (self.0.traceparent, self.0.tracestate) = (traceparent.into(), tracestate.into());
        self
    }
}

impl NewJob {
    pub(crate) fn into_wire(self) -> v1::NewJob {
        self.0
    }
}

/// What becomes of a job whose key is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDuplicate {
    /// The answer names the job that is there.
    #[default]
    ReturnExisting,
    /// The same, and its payload is replaced; refused with IN_FLIGHT where it is being worked on.
    ReplacePayload,
    /// Refused with DUPLICATE.
    Error,
}

/// A job that was enqueued, or was there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enqueued {
    /// Its id.
    pub id: String,
    /// It was there before.
    pub duplicate: bool,
}

impl From<v1::EnqueuedJob> for Enqueued {
    fn from(wire: v1::EnqueuedJob) -> Self {
        Self { id: wire.id, duplicate: wire.duplicate }
    }
}

/// One queue, by name.
#[derive(Clone, Debug)]
pub struct Queue {
    client: Client,
    name: String,
}

impl Queue {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a job.
    ///
    /// # Errors
    /// DUPLICATE and IN_FLIGHT as [`NewJob::on_duplicate`] has it, QUOTA, TOO_LARGE, else as every change.
    pub async fn enqueue(&self, job: impl Into<NewJob>) -> Result<Enqueued, Error> {
        let mut jobs = self.enqueue_all([job.into()]).await?;
        jobs.pop().ok_or_else(|| Error::Protocol("an enqueue was answered without a job".to_owned()))
    }

    /// Adds up to 100 jobs in one commit: all, or none.
    ///
    /// # Errors
    /// As [`Queue::enqueue`].
    pub async fn enqueue_all(&self, jobs: impl IntoIterator<Item = NewJob>) -> Result<Vec<Enqueued>, Error> {
        let request = v1::EnqueueRequest {
            queue: self.name.clone(),
            jobs: jobs.into_iter().map(|job| job.0).collect(),
            namespace: self.client.namespace(),
            request: None,
        };
        let plan = self.client.plan("enqueue", true);
        let reply: v1::EnqueueReply = self.client.change(plan, "/tenure.v1.Queues/Enqueue", &request).await?;
        Ok(reply.jobs.into_iter().map(Enqueued::from).collect())
    }

    /// Asks for jobs; await it. No job is no error but an empty answer.
    pub fn receive(&self) -> Receive {
        Receive { queue: self.clone(), request: self.receive_request(), acks: Vec::new() }
    }

    fn receive_request(&self) -> v1::ReceiveRequest {
        v1::ReceiveRequest {
            queues: vec![self.name.clone()],
            max: 1,
            namespace: self.client.namespace(),
            ..Default::default()
        }
    }

    /// Works on jobs until it is told to stop; configure it, then call [`Work::run_until`].
    ///
    /// The handler gets each delivery; its `Ok` acknowledges the job and its `Err` says what becomes of it: text is the reason of another attempt. While
    /// it runs the delivery is prolonged. It is dropped, at its next `await`, when the delivery is lost or cancelled.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// let work = client.queue("mail").work(|job| async move {
    ///     println!("sending {}", job.payload_str().ok_or("not text")?);
    ///     Ok::<(), &'static str>(())
    /// });
    /// let stop = async { drop(tokio::signal::ctrl_c().await) };
    /// let done = work.concurrency(4).worker("mailer-1").run_until(stop).await;
    /// println!("{} jobs done, {} failed", done.acked, done.failed);
    /// # Ok(()) }
    /// ```
    pub fn work<F, R, E>(&self, handler: F) -> Work
    where
        F: Fn(Arc<Delivery>) -> R + Send + Sync + 'static,
        R: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Failed> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |job| {
            let running = handler(job);
            Box::pin(async move { running.await.map_err(Into::into) })
        });
        Work { queue: self.clone(), handler, concurrency: 1, worker: String::new(), visibility: None, grace: GRACE }
    }

    /// Its settings and counts; `None` where there is no such queue.
    ///
    /// # Errors
    /// As every read.
    pub async fn info(&self) -> Result<Option<QueueInfo>, Error> {
        let (name, namespace) = (self.name.clone(), self.client.namespace());
        let request = v1::QueueGetRequest { name, namespace, ..Default::default() };
        let reply = self
            .client
            .read(|channel| {
                let (mut queues, request) = (queues_of(channel), request.clone());
                async move { queues.get(request).await }
            })
            .await;
        found(reply.map(|reply| reply.queue.map(QueueInfo::from)))
    }

    /// Looks at up to `limit` (1,000 at most) jobs in a state such as `ready` or `dead`, after the job `after`, without taking them.
    ///
    /// # Errors
    /// NOT_FOUND where there is no such queue, else as every read.
    pub async fn jobs(&self, state: &str, limit: u32, after: &str) -> Result<Vec<JobInfo>, Error> {
        let request = v1::JobListRequest {
            queue: self.name.clone(),
            state: state.to_owned(),
            limit,
            after: after.to_owned(),
            namespace: self.client.namespace(),
            ..Default::default()
        };
        let reply = self
            .client
            .read(|channel| {
                let (mut queues, request) = (queues_of(channel), request.clone());
                async move { queues.list_jobs(request).await }
            })
            .await?;
        Ok(reply.jobs.into_iter().map(JobInfo::from).collect())
    }

    /// Changes its settings; what is `None` stays. The queue is made if it is not there.
    ///
    /// # Errors
    /// INVALID for what is out of range, else as every change.
    pub async fn configure(&self, change: QueueChange) -> Result<QueueSettings, Error> {
        let request = v1::QueueConfigureRequest {
            queue: self.name.clone(),
            namespace: self.client.namespace(),
            request: None,
            ..change.request()
        };
        let plan = self.client.plan("configure queue", true);
        let reply: v1::QueueConfigureReply = self.client.change(plan, "/tenure.v1.Queues/Configure", &request).await?;
        Ok(reply.settings.unwrap_or_default().into())
    }

    /// Gives dead jobs another life: all that fit, with as many calls as it takes. Tells how many, and how many were left because a job with their
    /// key is there.
    ///
    /// # Errors
    /// NOT_FOUND where there is no such queue, else as every change.
    pub async fn redrive(&self, redrive: Redrive) -> Result<(u64, u64), Error> {
        let (mut count, mut skipped) = (0, 0);
        let mut request = v1::RedriveRequest {
            queue: self.name.clone(),
            ids: redrive.ids,
            contains: redrive.contains,
            group: redrive.group,
            to: redrive.to,
            rate: redrive.rate,
            namespace: self.client.namespace(),
            ..Default::default()
        };
        loop {
            let plan = self.client.plan("redrive", true);
            let reply: v1::SweepReply = self.client.change(plan, "/tenure.v1.Queues/Redrive", &request).await?;
            count += reply.count;
            skipped += reply.skipped;
            if reply.next.is_empty() {
                return Ok((count, skipped));
            }
            (request.after, request.before) = (reply.next, count);
        }
    }

    /// Throws away the jobs in these states, or all that wait to be delivered if none is named, with as many calls as it takes. `remove`: the queue
    /// too, if nothing is left in it.
    ///
    /// # Errors
    /// NOT_FOUND where there is no such queue, else as every change.
    pub async fn purge(&self, states: &[&str], remove: bool) -> Result<u64, Error> {
        let mut count = 0;
        loop {
            let request = v1::PurgeRequest {
                queue: self.name.clone(),
                states: states.iter().map(ToString::to_string).collect(),
                confirm: self.name.clone(),
                remove,
                namespace: self.client.namespace(),
                request: None,
            };
            let plan = self.client.plan("purge", true);
            let reply: v1::SweepReply = self.client.change(plan, "/tenure.v1.Queues/Purge", &request).await?;
            count += reply.count;
            // What only keeps its key stays there however often it is asked for.
            if reply.next.is_empty() || reply.count == 0 {
                return Ok(count);
            }
        }
    }
}

/// A receive, to be awaited.
#[derive(Clone, Debug)]
#[must_use = "a receive asks when it is awaited"]
pub struct Receive {
    queue: Queue,
    request: v1::ReceiveRequest,
    acks: Vec<v1::JobReceipt>,
}

impl Receive {
    /// At most so many jobs, 100 at most. Ask for no more than can be worked on at once: the visibility of all runs.
    pub fn max(mut self, max: u32) -> Self {
        self.request.max = max;
        self
    }

    /// Waits for a job for up to 20 s. Whoever drops it before its answer waits no more, and what was on its way is given back.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.request.wait_ms = millis(wait.min(WAIT_MAX));
        self
    }

    /// How long each delivery lasts without a heartbeat.
    pub fn visibility(mut self, visibility: Duration) -> Self {
        self.request.visibility_ms = millis(visibility);
        self
    }

    /// Who works, for people.
    pub fn worker(mut self, worker: impl Into<String>) -> Self {
        self.request.worker = worker.into();
        self
    }

    /// Looks through this queue too, after those named before.
    pub fn also(mut self, queue: impl Into<String>) -> Self {
        self.request.queues.push(queue.into());
        self
    }

    /// Jobs of this group only, or of several; with one queue.
    pub fn group(mut self, group: impl Into<String>) -> Self {
        self.request.groups.push(group.into());
        self
    }

    /// Acknowledges a delivery in the same commit. If its receipt is stale, the call is refused as FENCED and nothing is received.
    pub fn ack(mut self, done: &Delivery) -> Self {
        self.acks.push(done.receipt());
        self
    }

    /// Names the loop of receiving, so that a new receive takes the place of one whose answer was lost.
    fn receiver(mut self, receiver: &str) -> Self {
        receiver.clone_into(&mut self.request.receiver);
        self
    }

    async fn send(self) -> Result<Vec<Delivery>, Error> {
        let client = &self.queue.client;
        let plan = client.patient_plan("receive", Duration::from_millis(self.request.wait_ms));
        let sent = BootTime::now();
        // Without a request id, which the server would keep for minutes: what a lost answer held comes back after its visibility.
        let reply: v1::ReceiveReply = if self.acks.is_empty() {
            client.unary(plan, "/tenure.v1.Queues/Receive", &self.request).await?
        } else {
            let request = v1::AckRequest {
                receipts: self.acks,
                receive: Some(self.request),
                namespace: client.namespace(),
                ..Default::default()
            };
            client.unary(plan, "/tenure.v1.Queues/Ack", &request).await?
        };
        let began = sent.plus(Duration::from_millis(reply.waited_ms));
        Ok(reply.jobs.into_iter().map(|job| Delivery::new(client.clone(), job, began)).collect())
    }
}

impl IntoFuture for Receive {
    type Output = Result<Vec<Delivery>, Error>;
    type IntoFuture = Receiving;

    fn into_future(mut self) -> Self::IntoFuture {
        // Without a name the server would draw another for each try of this call.
        if self.request.wait_ms > 0
            && self.request.receiver.is_empty()
            && let Ok(receiver) = drawn_name()
        {
            self.request.receiver = receiver;
        }
        if self.request.wait_ms == 0 {
            return Box::pin(self.send());
        }
        let (client, receiver) = (self.queue.client.clone(), self.request.receiver.clone());
        Box::pin(Waiting { client, receiver, asked: false, call: Some(Box::pin(self.send())) })
    }
}

type Receiving = Pin<Box<dyn Future<Output = Result<Vec<Delivery>, Error>> + Send>>;

/// A receive that waits. The server does not see that nobody awaits it any more, as the connection lives on, so a drop tells it; what was delivered
/// by then is given back.
struct Waiting {
    client: Client,
    receiver: String,
    asked: bool,
    /// Until it is answered.
    call: Option<Receiving>,
}

impl Future for Waiting {
    type Output = Result<Vec<Delivery>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.asked = true;
        let Some(call) = &mut self.call else { return Poll::Pending };
        let got = ready!(call.as_mut().poll(cx));
        self.call = None;
        Poll::Ready(got)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let Some(call) = self.call.take().filter(|_| self.asked) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (client, receiver) = (self.client.clone(), std::mem::take(&mut self.receiver));
        runtime.spawn(async move {
            if leave(&client, &receiver).await.is_ok()
                && let Ok(jobs) = call.await
            {
                for job in jobs {
                    settled(job.release().await, &job);
                }
            }
        });
    }
}

/// Ends the wait of a receiver, which is then answered.
async fn leave(client: &Client, receiver: &str) -> Result<v1::LeaveReply, Error> {
    let request = v1::LeaveRequest { receiver: receiver.to_owned(), namespace: client.namespace(), request: None };
    client.unary(client.plan("leave", true), "/tenure.v1.Queues/Leave", &request).await
}

/// A job in the hands of this process, under one receipt.
#[derive(Debug)]
pub struct Delivery {
    client: Client,
    job: v1::DeliveredJob,
    timing: Mutex<Timing>,
    cancelled: AtomicBool,
    yielding: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Timing {
    /// When the call was sent that gave or prolonged it, or later by what it waited.
    began: BootTime,
    visibility: Duration,
}

impl Timing {
    fn deadline(self) -> BootTime {
        self.began.plus(LeaseTiming::of(self.visibility).usable())
    }
}

impl Delivery {
    fn new(client: Client, job: v1::DeliveredJob, began: BootTime) -> Self {
        let timing = Timing { began, visibility: Duration::from_millis(job.visibility_ms) };
        let (cancelled, yielding) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { client, job, timing: Mutex::new(timing), cancelled, yielding }
    }

    /// The id of the job.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.job.id
    }

    /// The token of this delivery: larger than that of any before, so a resource can tell a worker that was overtaken.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.job.token
    }

    /// The queue that it came from.
    #[must_use]
    pub fn queue(&self) -> &str {
        &self.job.queue
    }

    /// What was enqueued.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        if self.job.payload.is_empty() { &self.job.payload_bytes } else { self.job.payload.as_bytes() }
    }

    /// What was enqueued, if it is text.
    #[must_use]
    pub fn payload_str(&self) -> Option<&str> {
        std::str::from_utf8(self.payload()).ok()
    }

    /// Which attempt this is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.job.attempt
    }

    /// How many there are.
    #[must_use]
    pub fn max_attempts(&self) -> u32 {
        self.job.max_attempts
    }

    /// What the attempt before said.
    #[must_use]
    pub fn last_error(&self) -> &str {
        &self.job.last_error
    }

    /// Its FIFO group; empty: none.
    #[must_use]
    pub fn group(&self) -> &str {
        &self.job.group
    }

    /// Its tenant; empty: none.
    #[must_use]
    pub fn tenant(&self) -> &str {
        &self.job.tenant
    }

    /// Its headers.
    #[must_use]
    pub fn headers(&self) -> &BTreeMap<String, String> {
        &self.job.headers
    }

    /// W3C trace context of who enqueued it: traceparent and tracestate.
    #[must_use]
    pub fn trace(&self) -> (&str, &str) {
        (&self.job.traceparent, &self.job.tracestate)
    }

    /// From its enqueue to this delivery.
    #[must_use]
    pub fn age(&self) -> Duration {
        Duration::from_millis(self.job.age_ms)
    }

    fn timing(&self) -> Timing {
        *self.timing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The moment from which this process must not act on the job any more, unless a heartbeat moves it.
    #[must_use]
    pub fn deadline(&self) -> BootTime {
        self.timing().deadline()
    }

    /// Whether the job is still this worker's, by the clock of this machine. Ask before each effect outside.
    ///
    /// # Errors
    /// [`Error::Lost`] past the deadline.
    pub fn check(&self) -> Result<(), Error> {
        let (now, timing) = (BootTime::now(), self.timing());
        if now < timing.deadline() {
            return Ok(());
        }
        Err(Error::Lost(LostReason::DeadlinePassed { after: now.since(timing.began) }))
    }

    /// Whether the last heartbeat heard that the job should be cancelled.
    #[must_use]
    pub fn is_cancel_requested(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Whether the last heartbeat heard that the queue was paused or something more urgent is ready: release the job if that is cheap.
    #[must_use]
    pub fn should_yield(&self) -> bool {
        self.yielding.load(Ordering::Relaxed)
    }

    /// Prolongs the delivery to its visibility from now on, and tells how far the work is (may be empty).
    ///
    /// # Errors
    /// FENCED where another delivery has taken its place, else as every change.
    pub async fn heartbeat(&self, progress: &str) -> Result<JobBeat, Error> {
        let sent = BootTime::now();
        let beat = self.client.heartbeat_job(&self.job.id, self.job.token, None, progress).await?;
        self.cancelled.fetch_or(beat.cancel_requested, Ordering::Relaxed);
        self.yielding.store(beat.should_yield, Ordering::Relaxed);
        let mut timing = self.timing.lock().unwrap_or_else(PoisonError::into_inner);
        // What has passed here has passed: another may have been told so.
        if BootTime::now() < timing.deadline() && sent > timing.began {
            *timing = Timing { began: sent, visibility: beat.remaining };
        }
        Ok(beat)
    }

    fn receipt(&self) -> v1::JobReceipt {
        v1::JobReceipt { id: self.job.id.clone(), token: self.job.token, ..Default::default() }
    }

    /// The job is done.
    ///
    /// # Errors
    /// FENCED where another delivery has taken its place: whatever was done has been done twice. Else as every change.
    pub async fn ack(&self) -> Result<(), Error> {
        self.ack_with(b"").await
    }

    /// The job is done, with a result that is kept with its record, at most 16 KiB.
    ///
    /// # Errors
    /// As [`Delivery::ack`].
    pub async fn ack_with(&self, result: &[u8]) -> Result<(), Error> {
        self.client.ack_job(&self.job.id, self.job.token, result).await
    }

    /// The attempt has failed: the job is tried again after the backoff of its queue, until its attempts are spent.
    ///
    /// # Errors
    /// FENCED where another delivery has taken its place, else as every change.
    pub async fn nack(&self, reason: &str) -> Result<JobMoved, Error> {
        self.client.nack_job(&self.job.id, self.job.token, reason, None, false).await
    }

    /// The attempt has failed: the job is tried again after this time.
    ///
    /// # Errors
    /// As [`Delivery::nack`].
    pub async fn retry_in(&self, delay: Duration, reason: &str) -> Result<JobMoved, Error> {
        self.client.nack_job(&self.job.id, self.job.token, reason, Some(delay), false).await
    }

    /// No attempt will ever succeed: the job goes to the dead letters.
    ///
    /// # Errors
    /// As [`Delivery::nack`].
    pub async fn reject(&self, reason: &str) -> Result<JobMoved, Error> {
        self.client.nack_job(&self.job.id, self.job.token, reason, None, true).await
    }

    /// Gives the job back unharmed; no attempt is spent.
    ///
    /// # Errors
    /// As [`Delivery::nack`].
    pub async fn release(&self) -> Result<JobMoved, Error> {
        self.client.release_job(&self.job.id, self.job.token).await
    }
}

/// What becomes of a job whose handler did not succeed. Text and errors become another attempt after the backoff of the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    reason: String,
    end: Ending,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Retry(Option<Duration>),
    Reject,
    Release,
}

impl Failed {
    /// Another attempt after the backoff of the queue.
    #[must_use]
    pub fn retry(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), end: Ending::Retry(None) }
    }

    /// Another attempt after this time.
    #[must_use]
    pub fn retry_in(delay: Duration, reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), end: Ending::Retry(Some(delay)) }
    }

    /// No attempt will ever succeed: to the dead letters.
    #[must_use]
    pub fn reject(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), end: Ending::Reject }
    }

    /// Back to the queue unharmed, without a lost attempt.
    #[must_use]
    pub fn release() -> Self {
        Self { reason: String::new(), end: Ending::Release }
    }

    async fn settle(self, job: &Delivery) -> Result<JobMoved, Error> {
        match self.end {
            Ending::Retry(None) => job.nack(&self.reason).await,
            Ending::Retry(Some(delay)) => job.retry_in(delay, &self.reason).await,
            Ending::Reject => job.reject(&self.reason).await,
            Ending::Release => job.release().await,
        }
    }
}

impl From<String> for Failed {
    fn from(reason: String) -> Self {
        Self::retry(reason)
    }
}

impl From<&str> for Failed {
    fn from(reason: &str) -> Self {
        Self::retry(reason)
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::retry(error.to_string())
    }
}

impl From<Box<dyn std::error::Error + Send + Sync>> for Failed {
    fn from(error: Box<dyn std::error::Error + Send + Sync>) -> Self {
        Self::retry(error.to_string())
    }
}

type Handler = Arc<dyn Fn(Arc<Delivery>) -> Pin<Box<dyn Future<Output = Result<(), Failed>> + Send>> + Send + Sync>;

/// A worker, before it runs; see [`Queue::work`].
#[must_use = "a worker works when it runs"]
pub struct Work {
    queue: Queue,
    handler: Handler,
    concurrency: usize,
    worker: String,
    visibility: Option<Duration>,
    grace: Duration,
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("queue", &self.queue.name).field("concurrency", &self.concurrency).finish()
    }
}

/// What a worker has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkDone {
    /// Jobs whose handler succeeded and whose receipt was still good.
    pub acked: u64,
    /// Jobs whose handler failed.
    pub failed: u64,
    /// Deliveries that were lost or cancelled while the handler ran, or whose receipt was no longer good, or not taken before the end.
    pub lost: u64,
    /// Jobs that were given back while it stopped.
    pub released: u64,
}

impl WorkDone {
    fn finished(&mut self, acked: bool) {
        self.acked += u64::from(acked);
        self.lost += u64::from(!acked);
    }
}

impl Work {
    /// So many jobs at a time; 1 unless told otherwise.
    pub fn concurrency(mut self, concurrency: usize) -> Self {
        self.concurrency = concurrency.max(1);
        self
    }

    /// Who works, for people.
    pub fn worker(mut self, worker: impl Into<String>) -> Self {
        self.worker = worker.into();
        self
    }

    /// How long a delivery outlives the last heartbeat, in place of the job's or its queue's.
    pub fn visibility(mut self, visibility: Duration) -> Self {
        self.visibility = Some(visibility);
        self
    }

    /// How long jobs that run may go on after the worker was told to stop, 30 s unless told otherwise; then they are dropped and released.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Works until `stop` is done: then no job is taken any more, those that run are finished, and it returns.
    pub async fn run_until(self, stop: impl Future<Output = ()>) -> WorkDone {
        let (stopping, stopped) = watch::channel(None);
        let grace = self.grace;
        let work = Arc::new(self);
        let mut loops = tokio::task::JoinSet::new();
        for _ in 0..work.concurrency {
            let (work, stopped) = (work.clone(), stopped.clone());
            loops.spawn(async move { work.one_loop(stopped).await });
        }
        stop.await;
        let _ = stopping.send(Some(Instant::now() + grace));
        let mut all = WorkDone::default();
        // The loops keep to the grace themselves; this is for one that cannot reach its server.
        let end = timeout(grace + GRACE, async {
            while let Some(done) = loops.join_next().await {
                let done = done.unwrap_or_default();
                all.acked += done.acked;
                all.failed += done.failed;
                all.lost += done.lost;
                all.released += done.released;
            }
        });
        if end.await.is_err() {
            tracing::warn!(
                queue = work.queue.name,
                "a worker could not settle its jobs; they come back after their visibility"
            );
        }
        all
    }

    fn receive(&self, receiver: &str) -> Receive {
        let receive = self.queue.receive().wait(WAIT_MAX).worker(self.worker.clone()).receiver(receiver);
        match self.visibility {
            Some(visibility) => receive.visibility(visibility),
            None => receive,
        }
    }

    async fn one_loop(&self, mut stopped: Stopped) -> WorkDone {
        let mut done = WorkDone::default();
        let mut pause = PAUSE_MIN;
        let Ok(receiver) = drawn_name() else { return done };
        let mut finished: Option<Arc<Delivery>> = None;
        loop {
            if stopped.borrow().is_some() {
                if let Some(job) = finished {
                    done.finished(self.ack(&job, &mut stopped).await);
                }
                return done;
            }
            let receive = self.receive(&receiver);
            let receive = match &finished {
                Some(job) => receive.ack(job),
                None => receive,
            };
            let jobs = match self.next(receive, &receiver, &mut stopped).await {
                Ok(jobs) => jobs,
                Err(error) => {
                    tracing::warn!(queue = self.queue.name, %error, "a worker's call has failed");
                    if let Some(job) = finished.take() {
                        if error.code() == Some(Code::Fenced) {
                            done.finished(was_acked(&error, &job));
                            continue;
                        }
                        // Whatever kept it from receiving, the job is done: its ack goes alone.
                        done.finished(self.ack(&job, &mut stopped).await);
                    }
                    let _ = timeout(pause, stopped.changed()).await;
                    pause = (pause * 2).min(PAUSE_MAX);
                    continue;
                }
            };
            pause = PAUSE_MIN;
            done.acked += u64::from(finished.take().is_some());
            for job in jobs {
                let job = Arc::new(job);
                if stopped.borrow().is_some() {
                    done.released += u64::from(job.release().await.is_ok());
                    continue;
                }
                match self.attend(&job, &mut stopped).await {
                    Attended::Done => finished = Some(job),
                    Attended::Failed(Failed { end: Ending::Release, .. }) => {
                        done.released += 1;
                        settled(job.release().await, &job);
                    }
                    Attended::Failed(failed) => {
                        done.failed += 1;
                        settled(failed.settle(&job).await, &job);
                    }
                    Attended::Cancelled => {
                        done.lost += 1;
                        settled(job.nack("cancelled").await, &job);
                    }
                    Attended::Lost => done.lost += 1,
                    Attended::OutOfGrace => done.released += u64::from(job.release().await.is_ok()),
                }
            }
        }
    }

    /// Receives, and lets go of the wait when the worker is told to stop. What was delivered by then still arrives.
    async fn next(&self, receive: Receive, receiver: &str, stopped: &mut Stopped) -> Result<Vec<Delivery>, Error> {
        let mut call = pin!(receive.into_future());
        let end = tokio::select! {
            got = &mut call => return got,
            end = grace_end(stopped) => end,
        };
        match leave(&self.queue.client, receiver).await {
            Ok(_) => call.await,
            // It is there and waits on, for as long as there is time.
            Err(error @ Error::Refused(_)) => timeout_at(end, call).await.unwrap_or(Err(error)),
            // The wait ends with the connection.
            Err(error) => Err(error),
        }
    }

    /// Acknowledges a job until it is known what became of it, and prolongs it meanwhile; a worker that stops tries until its grace is over. The same
    /// receipt twice succeeds twice.
    async fn ack(&self, job: &Delivery, stopped: &mut Stopped) -> bool {
        let acking = async {
            let mut pause = PAUSE_MIN;
            loop {
                let Err(error) = job.ack().await else { return true };
                tracing::warn!(queue = self.queue.name, job = job.id(), %error, "a job that is done could not be acknowledged");
                if !error.retryable() {
                    return was_acked(&error, job);
                }
                let after = error.problem().and_then(|problem| problem.retry_after).unwrap_or_default().max(pause);
                let left = stopped.borrow().map(|end| end.saturating_duration_since(Instant::now()));
                if left.is_some_and(|left| left.is_zero()) {
                    return false;
                }
                let _ = timeout(after.min(left.unwrap_or(after)), stopped.changed()).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        };
        // What a heartbeat hears does not matter here: the ack hears more.
        let beating = async {
            while matches!(beat(job).await, Attended::Cancelled) {}
            std::future::pending().await
        };
        tokio::select! {
            acked = acking => acked,
            never = beating => never,
        }
    }

    /// Runs the handler with heartbeats beside it.
    async fn attend(&self, job: &Arc<Delivery>, stopped: &mut Stopped) -> Attended {
        let (handler, given) = (self.handler.clone(), job.clone());
        // A panic of the handler is a failed attempt, and no end of the worker; it may come before there is a future.
        let mut running = AbortOnDrop(tokio::spawn(async move { handler(given).await }));
        let mut beating = pin!(beat(job));
        let mut grace = pin!(async { sleep_until(grace_end(stopped).await).await });
        let why = tokio::select! {
            biased;
            ended = &mut running.0 => return Attended::of(ended),
            why = &mut beating => why,
            () = &mut grace => Attended::OutOfGrace,
        };
        if matches!(why, Attended::Lost) {
            return why;
        }
        // It goes on until its next `await`: nobody else is given the job before.
        running.0.abort();
        match timeout(job.deadline().since(BootTime::now()), &mut running.0).await {
            Ok(Err(error)) if error.is_cancelled() => why,
            Ok(ended) => Attended::of(ended),
            Err(_) => Attended::Lost,
        }
    }
}

/// When the grace of a worker ends, once it was told to stop.
type Stopped = watch::Receiver<Option<Instant>>;

async fn grace_end(stopped: &mut Stopped) -> Instant {
    let end = stopped.wait_for(Option::is_some).await.ok().and_then(|end| *end);
    end.unwrap_or_else(Instant::now)
}

/// Whether a refused ack tells that one before it was taken, of which no record was kept: while the delivery lasts, nobody else can end its job.
fn was_acked(error: &Error, job: &Delivery) -> bool {
    let is_gone = |problem: &Problem| problem.facts.get("state").is_some_and(|state| state == "gone");
    error.code() == Some(Code::Fenced) && error.problem().is_some_and(is_gone) && job.check().is_ok()
}

/// A task that does not outlive who waits for it.
struct AbortOnDrop(tokio::task::JoinHandle<Result<(), Failed>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

enum Attended {
    Done,
    Failed(Failed),
    Cancelled,
    Lost,
    OutOfGrace,
}

impl Attended {
    fn of(ended: Result<Result<(), Failed>, tokio::task::JoinError>) -> Self {
        match ended {
            Ok(Ok(())) => Self::Done,
            Ok(Err(failed)) => Self::Failed(failed),
            Err(error) => Self::Failed(Failed::retry(format!("the handler did not return: {error}"))),
        }
    }
}

fn settled(moved: Result<JobMoved, Error>, job: &Delivery) {
    if let Err(error) = moved {
        tracing::warn!(job = job.id(), %error, "a failed job could not be given back; it comes back after its visibility");
    }
}

/// Prolongs a delivery until it is lost or cancelled.
async fn beat(job: &Delivery) -> Attended {
    loop {
        let timing = LeaseTiming::of(job.timing().visibility);
        // A third of it, so that two more tries fit; and never past the deadline without a look at the clock.
        let left = job.deadline().since(BootTime::now());
        sleep(timing.renew_every(requests::jitter()).min(left)).await;
        if job.check().is_err() {
            return Attended::Lost;
        }
        match timeout(timing.try_timeout().max(Duration::from_millis(300)), job.heartbeat("")).await {
            Ok(Ok(beat)) if beat.cancel_requested => return Attended::Cancelled,
            Ok(Err(error)) if error.code() == Some(Code::Fenced) => return Attended::Lost,
            // The next try comes; the deadline stands.
            Ok(_) | Err(_) => {}
        }
    }
}

/// Which dead jobs to redrive, and how.
#[derive(Clone, Debug, Default)]
pub struct Redrive {
    /// Exactly these; empty: all that fit.
    pub ids: Vec<String>,
    /// The reason or the last error contains this.
    pub contains: String,
    /// Of this group; empty: of any.
    pub group: String,
    /// Into this queue; empty: where they are.
    pub to: String,
    /// Jobs a second; 0: at once.
    pub rate: u64,
}

/// Pauses delivery while too much fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueBreaker {
    /// More than this share of the deliveries that ended; 0 takes the breaker away.
    pub percent: u32,
    /// The time over which it counts; zero: a minute.
    pub window: Duration,
    /// Fewer ends within a window say nothing; 0: 10.
    pub min: u64,
    /// How long it pauses; zero: a minute.
    pub pause: Duration,
}

/// A change of settings; what is `None` stays.
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "as in `QueueSettings`")]
pub struct QueueChange {
    pub visibility: Option<Duration>,
    pub max_attempts: Option<u32>,
    pub backoff_first: Option<Duration>,
    pub backoff_max: Option<Duration>,
    pub jitter: Option<bool>,
    pub retention: Option<Duration>,
    pub done_max: Option<u64>,
    pub dead_retention: Option<Duration>,
    pub group_in_flight: Option<u64>,
    pub dead_blocks_group: Option<bool>,
    pub tenant_in_flight: Option<u64>,
    /// Those that are not named stay; 1 is forgotten.
    pub weights: BTreeMap<String, u32>,
    pub jobs_max: Option<u64>,
    pub breaker: Option<QueueBreaker>,
    pub paused: Option<bool>,
}

impl QueueChange {
    fn request(self) -> v1::QueueConfigureRequest {
        v1::QueueConfigureRequest {
            visibility_ms: self.visibility.map(millis),
            max_attempts: self.max_attempts,
            backoff_first_ms: self.backoff_first.map(millis),
            backoff_max_ms: self.backoff_max.map(millis),
            jitter: self.jitter,
            retention_ms: self.retention.map(millis),
            done_max: self.done_max,
            dead_retention_ms: self.dead_retention.map(millis),
            group_in_flight: self.group_in_flight,
            on_dead: match self.dead_blocks_group {
                None => v1::OnDead::Unchanged.into(),
                Some(false) => v1::OnDead::Pass.into(),
                Some(true) => v1::OnDead::Block.into(),
            },
            tenant_in_flight: self.tenant_in_flight,
            weights: self.weights,
            jobs_max: self.jobs_max,
            breaker: self.breaker.map(|breaker| v1::QueueBreaker {
                percent: breaker.percent,
                window_ms: millis(breaker.window),
                min: breaker.min,
                pause_ms: millis(breaker.pause),
            }),
            paused: self.paused,
            ..Default::default()
        }
    }
}

/// How a queue treats its jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueSettings {
    /// How long a delivery lasts without a heartbeat.
    pub visibility: Duration,
    /// Attempts before a job is dead.
    pub max_attempts: u32,
    /// The pause after the first failure, doubled each time.
    pub backoff_first: Duration,
    /// Its bound.
    pub backoff_max: Duration,
    /// Any time up to the backoff in place of the backoff itself.
    pub jitter: bool,
    /// How long records of done jobs are kept.
    pub retention: Duration,
    /// How many of them at most.
    pub done_max: u64,
    /// How long dead jobs are kept.
    pub dead_retention: Duration,
    /// Deliveries of one group at a time.
    pub group_in_flight: u64,
    /// A dead job keeps the others of its group from being delivered.
    pub dead_blocks_group: bool,
    /// Deliveries of one tenant at a time; 0: any number.
    pub tenant_in_flight: u64,
    /// Turns of tenants in each round where that is not one.
    pub weights: BTreeMap<String, u32>,
    /// Jobs that are not finished at most; 0: any number.
    pub jobs_max: u64,
    /// Pauses delivery while too much fails.
    pub breaker: Option<QueueBreaker>,
    /// Nothing is delivered.
    pub paused: bool,
}

impl From<v1::QueueSettings> for QueueSettings {
    fn from(settings: v1::QueueSettings) -> Self {
        let ms = Duration::from_millis;
        Self {
            visibility: ms(settings.visibility_ms),
            max_attempts: settings.max_attempts,
            backoff_first: ms(settings.backoff_first_ms),
            backoff_max: ms(settings.backoff_max_ms),
            jitter: settings.jitter,
            retention: ms(settings.retention_ms),
            done_max: settings.done_max,
            dead_retention: ms(settings.dead_retention_ms),
            group_in_flight: settings.group_in_flight,
            dead_blocks_group: settings.on_dead == i32::from(v1::OnDead::Block),
            tenant_in_flight: settings.tenant_in_flight,
            weights: settings.weights,
            jobs_max: settings.jobs_max,
            breaker: settings.breaker.map(|breaker| QueueBreaker {
                percent: breaker.percent,
                window: ms(breaker.window_ms),
                min: breaker.min,
                pause: ms(breaker.pause_ms),
            }),
            paused: settings.paused,
        }
    }
}

/// A queue with its counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueInfo {
    /// Its name.
    pub name: String,
    /// How it treats its jobs.
    pub settings: QueueSettings,
    /// Jobs by the name of their state, those without any left out.
    pub jobs: BTreeMap<&'static str, u64>,
    /// Receivers that wait.
    pub receivers: u64,
    /// Since the enqueue of the oldest job that is next of its tenant.
    pub oldest_ready: Duration,
    /// FIFO groups that have jobs.
    pub groups: u64,
    /// Jobs that are ready and under way of each tenant, of the first hundred; left out of lists.
    pub tenants: BTreeMap<String, (u64, u64)>,
    /// How long its breaker still delivers nothing.
    pub tripped: Duration,
}

impl From<v1::Queue> for QueueInfo {
    fn from(queue: v1::Queue) -> Self {
        let counts = [
            ("scheduled", queue.scheduled),
            ("backoff", queue.backoff),
            ("held", queue.held),
            ("ready", queue.ready),
            ("leased", queue.leased),
            ("done", queue.done),
            ("dead", queue.dead),
            ("cancelled", queue.cancelled),
        ];
        Self {
            name: queue.name,
            settings: queue.settings.unwrap_or_default().into(),
            jobs: counts.into_iter().filter(|(_, count)| *count > 0).collect(),
            receivers: queue.receivers,
            oldest_ready: Duration::from_millis(queue.oldest_ready_ms),
            groups: queue.groups,
            tenants: queue.tenants.into_iter().map(|one| (one.tenant, (one.ready, one.leased))).collect(),
            tripped: Duration::from_millis(queue.tripped_ms),
        }
    }
}

/// A job as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// Its queue.
    pub queue: String,
    /// `scheduled`, `backoff`, `held`, `ready`, `leased`, `done`, `dead` or `cancelled`.
    pub state: String,
    /// What was enqueued; empty once it is done or cancelled, and in lists where it is long.
    pub payload: Vec<u8>,
    /// Attempts so far.
    pub attempt: u32,
    /// Of the newest delivery; 0: none.
    pub token: u64,
    /// Higher ones are delivered first.
    pub priority: i32,
    /// Its FIFO group; empty: none.
    pub group: String,
    /// Its tenant; empty: none.
    pub tenant: String,
    /// Its key of deduplication; empty: none.
    pub key: String,
    /// Its headers.
    pub headers: BTreeMap<String, String>,
    /// Since its enqueue.
    pub age: Duration,
    /// How long it has been in its state.
    pub since: Duration,
    /// Until something happens by itself; zero: never.
    pub remaining: Duration,
    /// Who works on it.
    pub worker: String,
    /// What was last told of the work.
    pub progress: String,
    /// Its worker is to stop.
    pub cancel_requested: bool,
    /// Why it is dead or cancelled.
    pub reason: String,
    /// Of one that is done.
    pub result: Vec<u8>,
    /// Past deliveries, the newest last.
    pub attempts: Vec<JobAttempt>,
}

/// A delivery that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobAttempt {
    /// Which one, from 1.
    pub attempt: u32,
    /// Its token.
    pub token: u64,
    /// Who worked.
    pub worker: String,
    /// How long ago it ended.
    pub ended: Duration,
    /// `failed`, `expired` or `released`.
    pub how: String,
    /// What it said.
    pub error: String,
}

impl From<v1::Job> for JobInfo {
    fn from(job: v1::Job) -> Self {
        let ms = Duration::from_millis;
        let either = |text: String, bytes: &[u8]| if text.is_empty() { bytes.to_vec() } else { text.into_bytes() };
        let attempt = |past: v1::PastAttempt| JobAttempt {
            attempt: past.attempt,
            token: past.token,
            worker: past.worker,
            ended: ms(past.ended_ms),
            how: past.how,
            error: past.error,
        };
        Self {
            id: job.id,
            queue: job.queue,
            state: job.state,
            payload: either(job.payload, &job.payload_bytes),
            attempt: job.attempt,
            token: job.token,
            priority: job.priority,
            group: job.group,
            tenant: job.tenant,
            key: job.dedup_key,
            headers: job.headers,
            age: ms(job.age_ms),
            since: ms(job.since_ms),
            remaining: ms(job.remaining_ms),
            worker: job.worker,
            progress: job.progress,
            cancel_requested: job.cancel_requested,
            reason: job.reason,
            result: either(job.result, &job.result_bytes),
            attempts: job.attempts.into_iter().map(attempt).collect(),
        }
    }
}
