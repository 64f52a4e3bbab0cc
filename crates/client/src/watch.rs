//! Watches: the changes of keys in order, without loss or repetition, over reconnects.
//!
//! Promises. W1: events come in the order of their revisions, each once; after a reconnect the watch goes on behind the last answer that was
//! taken in whole, and the service never splits one revision over two answers. W2: if the history it needs was compacted away, it says so
//! with [`Code::Compacted`] and ends, rather than skip. W3: [`Watch::next`] may be dropped and called again at any time.
//! Relies on. The etcd Watch service, which native keys of the namespace `default` share.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use tenure_wire::etcd::etcdserverpb as pb;
use tenure_wire::etcd::mvccpb;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::client::Client;
use crate::error::{Code, Error, Problem};
use crate::kv::{Record, carried_out};
use crate::pipeline::RECEIVE_BYTES;

/// Longest pause between two tries to reconnect.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long one member may take at most to take the watch up.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// What happened to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It was written.
    Put,
    /// It was deleted, by a call or with its session.
    Delete,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// What happened.
    pub kind: EventKind,
    /// The key as it is now; after a deletion only its name and the revision.
    pub record: Record,
    /// The key as it was, if asked for and still kept.
    pub prev: Option<Record>,
}

/// A watch to be opened; see [`Client::watch`].
#[derive(Clone, Debug)]
pub struct Watching<'a> {
    client: &'a Client,
    request: pb::WatchCreateRequest,
}

impl Client {
    /// Follows the changes of one key, or of a range with [`Watching::prefix`] or [`Watching::until`].
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// // List, then follow from the next revision on: nothing falls between.
    /// let list = client.range("services/").prefix().all().await?;
    /// let mut watch = client.watch("services/").prefix().from_revision(list.revision + 1).await?;
    /// while let Some(event) = watch.next().await {
    ///     let event = event?;
    ///     println!("{:?} {:?} at {}", event.kind, event.record.key_str(), event.record.mod_revision);
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing is watched before .await"]
    pub fn watch(&self, key: impl Into<Bytes>) -> Watching<'_> {
        Watching { client: self, request: pb::WatchCreateRequest { key: key.into(), ..Default::default() } }
    }
}

impl Watching<'_> {
    /// Every key that begins with the one given.
    #[must_use]
    pub fn prefix(mut self) -> Self {
        self.request.range_end = prefix_end(&self.request.key);
        if self.request.key.is_empty() {
            // etcd's way of saying "from the first key on".
            self.request.key = Bytes::from_static(&[0]);
        }
        self
    }

    /// Up to this key, not included.
    #[must_use]
    pub fn until(mut self, end: impl Into<Bytes>) -> Self {
        self.request.range_end = end.into();
        self
    }

    /// Begins with the changes of this revision, past or future, instead of the next change.
    #[must_use]
    pub fn from_revision(mut self, revision: u64) -> Self {
        self.request.start_revision = i64::try_from(revision).unwrap_or(i64::MAX);
        self
    }

    /// Tells with each change what the key was before.
    #[must_use]
    pub fn prev(mut self) -> Self {
        self.request.prev_kv = true;
        self
    }

    async fn run(self) -> Result<Watch, Error> {
        // Progress notes move the point of resumption past revisions that had nothing for this watch, before they are compacted.
        let request = pb::WatchCreateRequest { progress_notify: true, ..self.request };
        let next = u64::try_from(request.start_revision).unwrap_or(0);
        let mut watch = Watch {
            client: self.client.clone(),
            request,
            next,
            link: None,
            events: VecDeque::new(),
            tries: 0,
            over: false,
        };
        open_within(self.client.timeout(), &mut watch).await?;
        Ok(watch)
    }
}

carried_out!(Watching<'a> => Watch, run);

/// A stream of changes. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    request: pb::WatchCreateRequest,
    /// The first revision that was not taken in; 0 until the service has said where it stands.
    next: u64,
    link: Option<Link>,
    events: VecDeque<WatchEvent>,
    /// Failed tries to open since the last answer.
    tries: u32,
    over: bool,
}

#[derive(Debug)]
struct Link {
    answers: tonic::Streaming<pb::WatchResponse>,
    /// The service ends a watch whose requests end.
    _requests: mpsc::Sender<pb::WatchRequest>,
}

impl Watch {
    /// The next change. Waits over reconnects for as long as it takes; `None` only after an error has been returned.
    pub async fn next(&mut self) -> Option<Result<WatchEvent, Error>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(Ok(event));
            }
            if self.over {
                return None;
            }
            if let Err(error) = self.advance().await {
                self.over = true;
                return Some(Err(error));
            }
        }
    }

    /// The revision from which a new watch would go on behind what was returned so far and is still buffered.
    #[must_use]
    pub fn next_revision(&self) -> u64 {
        self.events.front().map_or(self.next, |event| event.record.mod_revision)
    }

    /// Takes in one answer, or reconnects.
    async fn advance(&mut self) -> Result<(), Error> {
        let Some(link) = &mut self.link else {
            sleep(pause(self.tries)).await;
            self.tries = self.tries.saturating_add(1);
            return match self.open().await {
                Ok(()) => Ok(()),
                Err(Error::Unavailable { why }) => {
                    tracing::debug!(why, "watch not open yet");
                    Ok(())
                }
                Err(error) => Err(error),
            };
        };
        match link.answers.message().await {
            Ok(Some(answer)) => self.take(answer),
            Ok(None) => {
                self.link = None;
                Ok(())
            }
            Err(status) => {
                self.link = None;
                lasting(&status)
            }
        }
    }

    fn take(&mut self, answer: pb::WatchResponse) -> Result<(), Error> {
        self.tries = 0;
        if answer.canceled {
            self.link = None;
            return cancelled(&answer);
        }
        let stands_at = answer.header.and_then(|header| u64::try_from(header.revision).ok()).unwrap_or(0);
        if let Some(last) = answer.events.last().and_then(|event| event.kv.as_ref()) {
            self.next = u64::try_from(last.mod_revision).unwrap_or(0) + 1;
            self.events.extend(answer.events.into_iter().filter_map(event));
        } else if self.request.start_revision == 0 && self.next == 0 || !answer.created {
            // The answer to the creation of a watch from the past says nothing about what was delivered.
            self.next = self.next.max(stands_at + 1);
        }
        Ok(())
    }
}

impl Opens for Watch {
    /// Opens the stream at the first endpoint that takes it, and waits for the word that the watch stands.
    async fn open(&mut self) -> Result<(), Error> {
        let start_revision = i64::try_from(self.next).unwrap_or(i64::MAX);
        let create = pb::WatchCreateRequest { start_revision, ..self.request.clone() };
        let opening = open_anywhere(&self.client, |channel| {
            let (requests, outgoing) = mpsc::channel(1);
            let union = pb::watch_request::RequestUnion::CreateRequest(create.clone());
            let mut client = pb::watch_client::WatchClient::new(channel).max_decoding_message_size(RECEIVE_BYTES);
            async move {
                // The queue is empty and has a place, so this does not wait.
                let _ = requests.send(pb::WatchRequest { request_union: Some(union) }).await;
                let mut answers = client.watch(ReceiverStream::new(outgoing)).await?.into_inner();
                let first = answers.message().await?;
                Ok((Link { answers, _requests: requests }, first))
            }
        });
        let (link, first) = opening.await?;
        self.link = Some(link);
        self.take(first)
    }
}

/// What has a stream that is opened, and opened again where it was lost.
pub(crate) trait Opens {
    /// Once, at whichever endpoint takes it.
    fn open(&mut self) -> impl Future<Output = Result<(), Error>> + Send;
}

/// Opens a stream at the first endpoint that takes it and says a first word.
pub(crate) async fn open_anywhere<S, A, F, Fut>(client: &Client, mut open: F) -> Result<(S, A), Error>
where
    F: FnMut(Channel) -> Fut,
    Fut: Future<Output = Result<(S, Option<A>), tonic::Status>>,
{
    let mut why = String::new();
    let limit = OPEN_TIMEOUT.min(client.share());
    for (number, channel) in client.channels_in_turn() {
        match timeout(limit, open(channel)).await {
            Ok(Ok((stream, Some(first)))) => {
                client.served_by(number);
                return Ok((stream, first));
            }
            Ok(Ok((_, None))) => why = "the server closed the stream".to_owned(),
            Ok(Err(status)) => {
                lasting(&status)?;
                why = status.message().to_owned();
            }
            Err(_) => why = format!("no answer within {limit:?}"),
        }
    }
    Err(Error::Unavailable { why })
}

/// Tries again until it is open, for so long.
pub(crate) async fn open_within(time: Duration, watch: &mut impl Opens) -> Result<(), Error> {
    let attempt = async {
        loop {
            match watch.open().await {
                Err(Error::Unavailable { .. }) => sleep(Duration::from_millis(50)).await,
                result => return result,
            }
        }
    };
    let late = |_| Err(Error::Unavailable { why: format!("no member took the watch up within {time:?}") });
    timeout(time, attempt).await.unwrap_or_else(late)
}

/// An error if trying again cannot help.
pub(crate) fn lasting(status: &tonic::Status) -> Result<(), Error> {
    match status.code() {
        tonic::Code::InvalidArgument
        | tonic::Code::PermissionDenied
        | tonic::Code::Unauthenticated
        | tonic::Code::Unimplemented => Err(crate::error::of_read(status)),
        _ => Ok(()),
    }
}

fn cancelled(answer: &pb::WatchResponse) -> Result<(), Error> {
    let lowest = u64::try_from(answer.compact_revision).unwrap_or(0);
    let mut problem = Problem { message: answer.cancel_reason.clone(), retryable: false, ..Problem::default() };
    if lowest > 0 {
        problem.code = Code::Compacted;
        problem.lowest_revision = Some(lowest);
        problem.message = format!(
            "changes below revision {lowest} were compacted away before this watch saw them: read again and watch on from there"
        );
    } else {
        problem.code = Code::Cancelled;
    }
    Err(Error::Refused(Box::new(problem)))
}

fn event(event: mvccpb::Event) -> Option<WatchEvent> {
    let kind = match event.r#type() {
        mvccpb::event::EventType::Put => EventKind::Put,
        mvccpb::event::EventType::Delete => EventKind::Delete,
    };
    Some(WatchEvent { kind, record: record(event.kv?), prev: event.prev_kv.map(record) })
}

fn record(kv: mvccpb::KeyValue) -> Record {
    let number = |number: i64| u64::try_from(number).unwrap_or(0);
    Record {
        create_revision: number(kv.create_revision),
        mod_revision: number(kv.mod_revision),
        version: number(kv.version),
        session: number(kv.lease),
        key: kv.key,
        value: kv.value,
    }
}

/// The first key behind all that begin so, in etcd's way: a zero byte where there is no such key.
fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::from_static(&[0])
}

pub(crate) fn pause(tries: u32) -> Duration {
    if tries == 0 {
        Duration::ZERO
    } else {
        (Duration::from_millis(50) * 2_u32.saturating_pow(tries.min(10))).min(PAUSE_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(start: u64) -> Watch {
        let client = Client::with_options(["127.0.0.1:1"], crate::ClientOptions::default()).unwrap();
        let request = pb::WatchCreateRequest { start_revision: i64::try_from(start).unwrap(), ..Default::default() };
        Watch { client, request, next: start, link: None, events: VecDeque::new(), tries: 0, over: false }
    }

    fn answer(revision: i64, created: bool, events: &[i64]) -> pb::WatchResponse {
        let event = |revision: &i64| mvccpb::Event {
            kv: Some(mvccpb::KeyValue { mod_revision: *revision, ..Default::default() }),
            ..Default::default()
        };
        pb::WatchResponse {
            header: Some(pb::ResponseHeader { revision, ..Default::default() }),
            created,
            events: events.iter().map(event).collect(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn w1_a_watch_from_now_resumes_behind_its_creation() {
        let mut watch = watch(0);
        watch.take(answer(7, true, &[])).unwrap();
        assert_eq!(watch.next, 8);
    }

    #[tokio::test]
    async fn w1_a_watch_from_the_past_resumes_behind_what_it_got_not_behind_where_the_service_stands() {
        let mut watch = watch(3);
        watch.take(answer(90, true, &[])).unwrap();
        assert_eq!(watch.next, 3);
        watch.take(answer(90, false, &[3, 4, 4])).unwrap();
        assert_eq!((watch.next, watch.next_revision(), watch.events.len()), (5, 3, 3));
    }

    #[tokio::test]
    async fn w1_a_progress_note_moves_on_and_a_second_creation_does_not() {
        let mut watch = watch(0);
        watch.take(answer(7, true, &[])).unwrap();
        watch.take(answer(20, false, &[])).unwrap();
        assert_eq!(watch.next, 21);
        // Resumed from 21 at a service that stands at 50: 21 to 50 are still to come.
        watch.take(answer(50, true, &[])).unwrap();
        assert_eq!(watch.next, 21);
    }

    #[tokio::test]
    async fn w2_compaction_is_told_with_the_lowest_revision() {
        let mut watch = watch(3);
        let error =
            watch.take(pb::WatchResponse { canceled: true, compact_revision: 9, ..Default::default() }).unwrap_err();
        let problem = error.problem().unwrap();
        assert_eq!((problem.code, problem.lowest_revision), (Code::Compacted, Some(9)));
    }

    #[test]
    fn the_end_of_a_prefix() {
        assert_eq!(&prefix_end(b"a/")[..], b"a0");
        assert_eq!(&prefix_end(&[b'a', 255])[..], b"b");
        assert_eq!((&prefix_end(b"")[..], &prefix_end(&[255])[..]), (&[0][..], &[0][..]));
    }
}
