//! The pipelined stream: one connection that the requests of many tasks share, several to a message.
//!
//! Promises. A request is on at most one stream at a time. Whoever waits is told which of three things happened: an answer came,
//! the request was never sent, or the stream broke after it was sent. Requests that arrive while a message is being written leave
//! together in the next one. A stream from which nothing is heard although a request has timed out is given up.
//! Not promised. Nothing is repeated here; who may repeat what is decided in `calls.rs`, which knows the request ids.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use prost::Message;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::pipeline_client::PipelineClient;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::one_task::{in_one_task, parts};

/// Requests on one stream that do not wait for a lock. The server stops reading at 4,096.
const OPEN_MAX: usize = 4_000;
/// Requests that wait for a place on the stream.
const QUEUE_MAX: usize = 4_096;
/// A message is closed when it holds this much; the server takes 4 MiB.
const MESSAGE_BYTES: usize = 1 << 20;
/// Requests in one message.
const MESSAGE_REQUESTS: usize = 1_024;
/// The largest message that is taken from the server.
pub(crate) const RECEIVE_BYTES: usize = 64 << 20;

/// What became of a request that got no answer.
#[derive(Clone, Debug)]
pub(crate) enum Undelivered {
    /// It never left this process.
    NotSent(String),
    /// It was handed to a connection that then broke.
    Broken(String),
}

/// An answer, and the connection that it came by.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) result: v1::reply::Result,
    pub(crate) link: u64,
}

#[derive(Debug)]
enum Command {
    // Boxed: a queue of the others should not take the room of whole requests.
    Call(Box<Job>),
    /// Tells when a connection stands.
    Probe(oneshot::Sender<Result<(), Undelivered>>),
    /// Nothing came for a request sent at this moment: give the connection up unless something else was heard since.
    Suspect(Instant),
    /// The member at the other end of this connection cannot serve: try the next endpoint.
    Leave(u64),
}

#[derive(Debug)]
struct Job {
    call: v1::request::Call,
    answer: oneshot::Sender<Result<Answer, Undelivered>>,
}

/// The callers' end.
#[derive(Clone, Debug)]
pub(crate) struct Pipeline {
    commands: mpsc::Sender<Command>,
    /// The behaviour version of the cluster, as far as it was heard.
    behaviour: Arc<AtomicU32>,
}

impl Pipeline {
    /// Starts the task that owns the connection; it ends with the last clone of what is returned.
    pub(crate) fn start(endpoints: Vec<Endpoint>, connect_timeout: Duration) -> Self {
        let (commands, queue) = mpsc::channel(QUEUE_MAX);
        let behaviour = Arc::new(AtomicU32::new(0));
        let heard = behaviour.clone();
        let (parts, spawned) = parts();
        let endpoints = endpoints.into_iter().map(|endpoint| endpoint.executor(parts.clone())).collect();
        drop(parts);
        let dispatcher = Dispatcher { queue, endpoints, next: 0, links: 0, connect_timeout, behaviour: heard };
        tokio::spawn(in_one_task(dispatcher.run(), spawned));
        Self { commands, behaviour }
    }

    /// The behaviour version of the cluster; 0 before it was heard. It never goes back.
    pub(crate) fn behaviour(&self) -> u32 {
        self.behaviour.load(Ordering::Relaxed)
    }

    /// One try: sends the request and waits for what becomes of it.
    pub(crate) async fn send(&self, call: v1::request::Call) -> Result<Answer, Undelivered> {
        let (answer, outcome) = oneshot::channel();
        self.commands.send(Command::Call(Box::new(Job { call, answer }))).await.map_err(|_| stopped())?;
        outcome.await.unwrap_or_else(|_| Err(Undelivered::Broken("the connection task ended".to_owned())))
    }

    /// Waits until a connection stands.
    pub(crate) async fn probe(&self) -> Result<(), Undelivered> {
        let (answer, outcome) = oneshot::channel();
        self.commands.send(Command::Probe(answer)).await.map_err(|_| stopped())?;
        outcome.await.unwrap_or_else(|_| Err(stopped()))
    }

    /// Doubts the connection: a request sent at `sent` has timed out.
    pub(crate) fn suspect(&self, sent: Instant) {
        // A full queue means that the connection is busy; the doubt comes again with the next time-out.
        let _ = self.commands.try_send(Command::Suspect(sent));
    }

    /// Asks for another member than the one behind this connection.
    pub(crate) fn leave(&self, link: u64) {
        let _ = self.commands.try_send(Command::Leave(link));
    }
}

fn stopped() -> Undelivered {
    Undelivered::NotSent("the client has been shut down".to_owned())
}

struct Dispatcher {
    queue: mpsc::Receiver<Command>,
    endpoints: Vec<Endpoint>,
    /// The endpoint to try next.
    next: usize,
    /// Connections made so far, which is the name of the current one.
    links: u64,
    connect_timeout: Duration,
    behaviour: Arc<AtomicU32>,
}

struct Link {
    requests: mpsc::Sender<v1::Requests>,
    replies: tonic::Streaming<v1::Replies>,
}

impl Dispatcher {
    async fn run(mut self) {
        let mut waiting = Vec::new();
        // Nobody is dialled before there is something to say.
        while self.queue.recv_many(&mut waiting, QUEUE_MAX).await > 0 {
            if !waiting.iter().any(|command| matches!(command, Command::Call(_) | Command::Probe(_))) {
                waiting.clear();
                continue;
            }
            match self.connect().await {
                Ok(link) => self.drive(link, &mut waiting).await,
                Err(why) => {
                    // What arrived during the attempt shares its fate, so that each caller decides about its own time.
                    while let Ok(command) = self.queue.try_recv() {
                        waiting.push(command);
                    }
                    waiting.drain(..).for_each(|command| not_sent(command, &why));
                }
            }
        }
    }

    /// Tries each endpoint once, beginning with the one that served last.
    async fn connect(&mut self) -> Result<Link, String> {
        let mut failures = Vec::new();
        for _ in 0..self.endpoints.len() {
            let endpoint = self.endpoints[self.next % self.endpoints.len()].clone();
            match timeout(self.connect_timeout, open(&endpoint)).await {
                Ok(Ok(link)) => {
                    self.links += 1;
                    tracing::debug!(endpoint = %endpoint.uri(), link = self.links, "connected");
                    return Ok(link);
                }
                Ok(Err(why)) => failures.push(format!("{}: {why}", authority(&endpoint))),
                Err(_) => {
                    failures.push(format!("{}: no answer within {:?}", authority(&endpoint), self.connect_timeout))
                }
            }
            self.next += 1;
        }
        Err(failures.join("; "))
    }

    /// Carries requests and answers until the connection ends; what is then still in `waiting` was never sent.
    async fn drive(&mut self, mut link: Link, waiting: &mut Vec<Command>) {
        let mut state = Open::new(self.links);
        let why = loop {
            if let Err(why) = state.take(waiting) {
                break why;
            }
            let room = state.open.len() - state.waits < OPEN_MAX;
            tokio::select! {
                permit = link.requests.reserve(), if !state.unsent.is_empty() => match permit {
                    Ok(permit) => permit.send(v1::Requests { requests: state.next_message() }),
                    Err(_) => break "the stream was closed".to_owned(),
                },
                taken = self.queue.recv_many(waiting, MESSAGE_REQUESTS), if room => {
                    if taken == 0 {
                        return;
                    }
                    // Callers that were woken together are about to speak together: let them, and send one message.
                    if state.woken > 1 {
                        tokio::task::yield_now().await;
                    }
                    while waiting.len() < MESSAGE_REQUESTS && let Ok(command) = self.queue.try_recv() {
                        waiting.push(command);
                    }
                }
                message = link.replies.message() => match message {
                    Ok(Some(replies)) => {
                        if let Some(header) = &replies.header {
                            self.behaviour.fetch_max(header.behaviour, Ordering::Relaxed);
                        }
                        state.hear(replies);
                    }
                    Ok(None) => break "the server closed the stream".to_owned(),
                    Err(status) => break words(&status),
                },
            }
        };
        tracing::debug!(link = self.links, why, "connection given up");
        self.next += 1;
        state.fail(&why);
    }
}

/// The state of one connection.
struct Open {
    link: u64,
    heard: Instant,
    next_id: u64,
    open: HashMap<u64, (bool, oneshot::Sender<Result<Answer, Undelivered>>)>,
    /// How many of the open requests wait for a lock.
    waits: usize,
    /// Numbered, and not yet in a message.
    unsent: Vec<v1::Request>,
    /// How many callers the last message woke.
    woken: usize,
}

impl Open {
    fn new(link: u64) -> Self {
        Self { link, heard: Instant::now(), next_id: 1, open: HashMap::new(), waits: 0, unsent: Vec::new(), woken: 0 }
    }

    /// Takes in what callers want. An error means that the connection is to be given up.
    fn take(&mut self, commands: &mut Vec<Command>) -> Result<(), String> {
        let mut verdict = Ok(());
        for command in commands.drain(..) {
            match command {
                // Whoever has stopped waiting will not be told, so nothing is sent for it.
                Command::Call(job) if job.answer.is_closed() => {}
                Command::Call(job) => self.add(*job),
                Command::Probe(answer) => drop(answer.send(Ok(()))),
                Command::Suspect(sent) if self.heard < sent => verdict = Err("no answer in time".to_owned()),
                Command::Leave(link) if link == self.link => verdict = Err("the member cannot serve".to_owned()),
                Command::Suspect(_) | Command::Leave(_) => {}
            }
        }
        verdict
    }

    fn add(&mut self, job: Job) {
        let id = self.next_id;
        self.next_id += 1;
        let waits = matches!(&job.call, v1::request::Call::LockAcquire(acquire) if acquire.wait.is_some());
        self.waits += usize::from(waits);
        self.open.insert(id, (waits, job.answer));
        self.unsent.push(v1::Request { id, call: Some(job.call) });
    }

    fn next_message(&mut self) -> Vec<v1::Request> {
        let mut bytes = 0;
        let fits = |request: &&v1::Request| {
            bytes += request.encoded_len();
            bytes <= MESSAGE_BYTES
        };
        // One request always goes, however large: the server judges its size.
        let count = self.unsent.iter().take(MESSAGE_REQUESTS).take_while(fits).count().max(1).min(self.unsent.len());
        if count == self.unsent.len() {
            return std::mem::take(&mut self.unsent);
        }
        self.unsent.drain(..count).collect()
    }

    fn hear(&mut self, replies: v1::Replies) {
        self.heard = Instant::now();
        self.woken = replies.replies.len();
        for reply in replies.replies {
            let Some((waits, answer)) = self.open.remove(&reply.id) else { continue };
            self.waits -= usize::from(waits);
            let outcome = match reply.result {
                Some(result) => Ok(Answer { result, link: self.link }),
                None => Err(Undelivered::Broken("the answer is of a kind that this client does not know".to_owned())),
            };
            // The caller may have given up; the answer is then nobody's.
            let _ = answer.send(outcome);
        }
    }

    fn fail(mut self, why: &str) {
        for request in &self.unsent {
            if let Some((_, answer)) = self.open.remove(&request.id) {
                let _ = answer.send(Err(Undelivered::NotSent(why.to_owned())));
            }
        }
        for (_, answer) in self.open.into_values() {
            let _ = answer.send(Err(Undelivered::Broken(why.to_owned())));
        }
    }
}

fn not_sent(command: Command, why: &str) {
    match command {
        Command::Call(job) => drop(job.answer.send(Err(Undelivered::NotSent(why.to_owned())))),
        Command::Probe(answer) => drop(answer.send(Err(Undelivered::NotSent(why.to_owned())))),
        Command::Suspect(_) | Command::Leave(_) => {}
    }
}

async fn open(endpoint: &Endpoint) -> Result<Link, String> {
    let channel: Channel = endpoint.connect().await.map_err(|error| deepest(&error))?;
    let (requests, outgoing) = mpsc::channel(4);
    let mut client = PipelineClient::new(channel).max_decoding_message_size(RECEIVE_BYTES);
    let replies = client.stream(ReceiverStream::new(outgoing)).await.map_err(|status| words(&status))?.into_inner();
    Ok(Link { requests, replies })
}

pub(crate) fn authority(endpoint: &Endpoint) -> String {
    endpoint.uri().authority().map_or_else(String::new, ToString::to_string)
}

fn words(status: &tonic::Status) -> String {
    match status.code() {
        tonic::Code::Unimplemented => "this server does not speak tenure.v1 (is it an etcd?)".to_owned(),
        _ if status.message().is_empty() => status.code().to_string(),
        _ => status.message().to_owned(),
    }
}

/// The innermost cause: "connection refused" says more than "transport error".
fn deepest(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(value_len: usize) -> (Command, oneshot::Receiver<Result<Answer, Undelivered>>) {
        let (answer, outcome) = oneshot::channel();
        let value_bytes = vec![0; value_len].into();
        let call = v1::request::Call::Put(v1::PutRequest { value_bytes, ..Default::default() });
        (Command::Call(Box::new(Job { call, answer })), outcome)
    }

    #[test]
    fn requests_leave_together_up_to_the_size_of_a_message() {
        let mut state = Open::new(1);
        let (mut commands, outcomes): (Vec<_>, Vec<_>) = (0..10).map(|_| put(MESSAGE_BYTES / 4)).unzip();
        state.take(&mut commands).unwrap();
        let sizes: Vec<usize> =
            std::iter::from_fn(|| (!state.unsent.is_empty()).then(|| state.next_message().len())).collect();
        assert_eq!((sizes.as_slice(), outcomes.len()), (&[3, 3, 3, 1][..], 10));
    }

    #[test]
    fn a_request_larger_than_a_message_still_goes() {
        let mut state = Open::new(1);
        let (command, _outcome) = put(MESSAGE_BYTES * 2);
        state.take(&mut vec![command]).unwrap();
        assert_eq!(state.next_message().len(), 1);
    }

    #[test]
    fn a_broken_stream_tells_sent_from_unsent() {
        let mut state = Open::new(1);
        let (first, mut sent) = put(1);
        state.take(&mut vec![first]).unwrap();
        state.next_message();
        let (second, mut unsent) = put(1);
        state.take(&mut vec![second]).unwrap();
        state.fail("gone");
        assert!(matches!(sent.try_recv().unwrap(), Err(Undelivered::Broken(_))));
        assert!(matches!(unsent.try_recv().unwrap(), Err(Undelivered::NotSent(_))));
    }

    #[test]
    fn nothing_is_sent_for_a_caller_that_has_gone() {
        let mut state = Open::new(1);
        let (command, outcome) = put(1);
        drop(outcome);
        state.take(&mut vec![command]).unwrap();
        assert!(state.unsent.is_empty() && state.open.is_empty());
    }

    #[tokio::test]
    async fn a_silent_stream_is_given_up_and_a_live_one_is_kept() {
        let mut state = Open::new(1);
        let before = Instant::now();
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert!(state.take(&mut vec![Command::Suspect(Instant::now())]).is_err());
        state.hear(v1::Replies::default());
        assert!(state.take(&mut vec![Command::Suspect(before), Command::Leave(7)]).is_ok());
    }
}
