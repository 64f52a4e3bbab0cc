//! Watches of things that are no keys: sessions, locks, elections, services and the others, by kind and name.
//!
//! Promises. T1: every change once, in order, over reconnects, inside a revision too. T2: with a snapshot, what there is comes first and nothing
//! falls between; if the service no longer has what is needed to go on, [`ThingEvent::Resync`] says so and another snapshot comes. Without one that is
//! [`Code::Compacted`], and the watch ends. T3: [`ThingWatch::next`] may be dropped and called again at any time.
//! Relies on. The service keeps a ring of the newest changes of these kinds; keys have history and [`Client::watch`].

use std::collections::{BTreeMap, VecDeque};

use tenure_wire::tenure::v1;
use tokio::time::sleep;
use v1::watch_reply::Type;
use v1::watches_client::WatchesClient;

use crate::client::Client;
use crate::error::{Code, Error, Problem};
use crate::kv::carried_out;
use crate::pipeline::RECEIVE_BYTES;
use crate::watch::{Opens, lasting, open_anywhere, open_within, pause};

/// A thing, as far as watchers are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thing {
    /// `session`, `lock` and so on.
    pub kind: String,
    /// Its name; a session's is its id in decimal.
    pub name: Vec<u8>,
    /// Of its change, or of the snapshot where the thing does not know when it changed.
    pub revision: u64,
    /// What is known of it, in the terms of its primitive; nothing of one that is gone.
    pub facts: BTreeMap<String, String>,
    /// What was known of it before, if asked for.
    pub prev: BTreeMap<String, String>,
}

/// What a watch of things tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ThingEvent {
    /// It was there when the watch began.
    Snapshot(Thing),
    /// Everything that was there has been told: all told so far is the state at this revision.
    Synced(u64),
    /// It was made or changed.
    Put(Thing),
    /// It is gone.
    Delete(Thing),
    /// Changes are missing: forget what was told, a snapshot comes next.
    Resync,
}

/// A watch of things to be opened; see [`Client::watch_things`].
#[derive(Clone, Debug)]
pub struct WatchingThings<'a> {
    client: &'a Client,
    request: v1::WatchRequest,
}

impl Client {
    /// Follows the things of a kind: `session`, `lock`, `election`, `config`, `service` and the others, or `any` for all of them.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// use tenure_client::ThingEvent;
    /// let mut locks = client.watch_things("lock").prefix("jobs/").snapshot().await?;
    /// while let Some(event) = locks.next().await {
    ///     if let ThingEvent::Put(lock) | ThingEvent::Snapshot(lock) = event? {
    ///         println!("{} is held by session {}", String::from_utf8_lossy(&lock.name), lock.facts["holder_session"]);
    ///     }
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing is watched before .await"]
    pub fn watch_things(&self, kind: impl Into<String>) -> WatchingThings<'_> {
        let request = v1::WatchRequest { kind: kind.into(), prefix: true, ..Default::default() };
        WatchingThings { client: self, request }
    }
}

impl WatchingThings<'_> {
    /// Only the one of this name.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.request.name = name.into();
        self.request.prefix = false;
        self
    }

    /// Only those whose names begin so.
    #[must_use]
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.request.name = prefix.into();
        self.request.prefix = true;
        self
    }

    /// Tells what there is first.
    #[must_use]
    pub fn snapshot(mut self) -> Self {
        self.request.snapshot = true;
        self
    }

    /// Begins with the changes of this revision instead of the next change, as far as the ring reaches.
    #[must_use]
    pub fn from_revision(mut self, revision: u64) -> Self {
        self.request.revision = revision;
        self
    }

    /// Tells with each change what was known before.
    #[must_use]
    pub fn prev(mut self) -> Self {
        self.request.prev = true;
        self
    }

    async fn run(self) -> Result<ThingWatch, Error> {
        let mut watch = ThingWatch {
            client: self.client.clone(),
            request: self.request,
            answers: None,
            events: VecDeque::new(),
            begun: false,
            tries: 0,
            over: false,
        };
        open_within(self.client.timeout(), &mut watch).await?;
        Ok(watch)
    }
}

carried_out!(WatchingThings<'a> => ThingWatch, run);

/// A stream of what happens to things. Dropping it ends the watch.
#[derive(Debug)]
pub struct ThingWatch {
    client: Client,
    /// Its `resume` is where to go on; empty until the service has said where it stands.
    request: v1::WatchRequest,
    answers: Option<tonic::Streaming<v1::WatchReply>>,
    events: VecDeque<ThingEvent>,
    /// A snapshot has begun and is not whole: a new one must say so.
    begun: bool,
    tries: u32,
    over: bool,
}

impl ThingWatch {
    /// What happens next. Waits over reconnects for as long as it takes; `None` only after an error has been returned.
    pub async fn next(&mut self) -> Option<Result<ThingEvent, Error>> {
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

    async fn advance(&mut self) -> Result<(), Error> {
        let Some(answers) = &mut self.answers else {
            sleep(pause(self.tries)).await;
            self.tries = self.tries.saturating_add(1);
            return match self.open().await {
                Err(Error::Unavailable { why }) => {
                    tracing::debug!(why, "watch not open yet");
                    Ok(())
                }
                result => result,
            };
        };
        match answers.message().await {
            Ok(Some(reply)) => self.take(reply),
            Ok(None) => {
                self.answers = None;
                Ok(())
            }
            Err(status) => {
                self.answers = None;
                lasting(&status)
            }
        }
    }

    fn take(&mut self, reply: v1::WatchReply) -> Result<(), Error> {
        self.tries = 0;
        if !reply.resume.is_empty() {
            self.request.resume.clone_from(&reply.resume);
            // It was the start of the first stream; the place is newer from now on.
            self.request.revision = 0;
        }
        match reply.r#type() {
            Type::Put => self.events.push_back(ThingEvent::Put(thing(reply))),
            Type::Delete => self.events.push_back(ThingEvent::Delete(thing(reply))),
            Type::Snapshot => {
                self.begun = true;
                self.events.push_back(ThingEvent::Snapshot(thing(reply)));
            }
            Type::Synced => {
                self.begun = false;
                self.events.push_back(ThingEvent::Synced(reply.revision));
            }
            Type::ResyncRequired if self.request.snapshot => {
                // If the connection is lost before the snapshot is whole, it is asked for again.
                self.request.resume.clear();
                self.events.push_back(ThingEvent::Resync);
            }
            Type::ResyncRequired => return Err(missing(reply.from)),
            Type::Bookmark | Type::Unspecified => {}
        }
        Ok(())
    }
}

impl Opens for ThingWatch {
    async fn open(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.begun) {
            self.events.push_back(ThingEvent::Resync);
        }
        let opening = open_anywhere(&self.client, |channel| {
            let (mut client, request) = (WatchesClient::new(channel), self.request.clone());
            client = client.max_decoding_message_size(RECEIVE_BYTES);
            async move {
                let mut answers = client.watch(request).await?.into_inner();
                let first = answers.message().await?;
                Ok((answers, first))
            }
        });
        let (answers, first) = opening.await?;
        self.answers = Some(answers);
        self.take(first)
    }
}

fn thing(reply: v1::WatchReply) -> Thing {
    let name = if reply.name_bytes.is_empty() { reply.name.into_bytes() } else { reply.name_bytes.to_vec() };
    Thing { kind: reply.kind, name, revision: reply.revision, facts: reply.facts, prev: reply.prev_facts }
}

fn missing(lowest: u64) -> Error {
    let message =
        format!("changes below revision {lowest} are no longer kept: take a snapshot, or watch on from there");
    let lowest_revision = Some(lowest);
    Error::Refused(Box::new(Problem { code: Code::Compacted, message, lowest_revision, ..Problem::default() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(snapshot: bool) -> ThingWatch {
        let client = Client::with_options(["127.0.0.1:1"], crate::ClientOptions::default()).unwrap();
        let request = v1::WatchRequest { kind: "lock".into(), prefix: true, snapshot, ..Default::default() };
        ThingWatch { client, request, answers: None, events: VecDeque::new(), begun: false, tries: 0, over: false }
    }

    fn reply(kind: Type, resume: &str) -> v1::WatchReply {
        v1::WatchReply { r#type: kind.into(), resume: resume.into(), from: 9, ..Default::default() }
    }

    #[tokio::test]
    async fn t1_a_reconnect_goes_on_behind_the_last_answer() {
        let mut watch = watch(false);
        watch.take(reply(Type::Bookmark, "7")).unwrap();
        watch.take(reply(Type::Put, "8.2")).unwrap();
        assert_eq!(watch.request.resume, "8.2");
    }

    #[tokio::test]
    async fn t2_a_snapshot_that_was_cut_is_told_again_from_its_start() {
        let mut watch = watch(true);
        watch.take(reply(Type::Snapshot, "")).unwrap();
        assert!(watch.request.resume.is_empty());
        assert!(watch.open().await.is_err(), "nobody is there");
        watch.take(reply(Type::Synced, "8")).unwrap();
        let kinds: Vec<bool> = watch.events.iter().map(|event| matches!(event, ThingEvent::Resync)).collect();
        assert_eq!(kinds, [false, true, false]);
        // What is missing later is told in the same way.
        watch.take(reply(Type::ResyncRequired, "8")).unwrap();
        assert!(watch.request.resume.is_empty() && watch.events.back() == Some(&ThingEvent::Resync));
    }

    #[tokio::test]
    async fn t2_without_a_snapshot_it_ends() {
        let error = watch(false).take(reply(Type::ResyncRequired, "8")).unwrap_err();
        let problem = error.problem().unwrap();
        assert_eq!((problem.code, problem.lowest_revision), (Code::Compacted, Some(9)));
    }
}
