//! Effect markers: what was done once is not done again.
//!
//! Promises. Fields in any order are one marker. An effect inside of the service belongs into one transaction with its marker ([`Step::once`](crate::Step::once));
//! one outside of it is claimed, done under [`Claim::key`], and confirmed. A claim that died is never silently done again: see [`OnDeath`].
//! Not promised. That an outside effect happens exactly once: between doing and confirming it the process may die, and then only the other
//! side can tell, by the key.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use tenure_wire::tenure::v1;

use crate::client::{Client, mismatched};
use crate::clock::millis;
use crate::error::{Error, found};
use crate::kv::carried_out;
use crate::pipeline::RECEIVE_BYTES;
use crate::session::Session;

/// What was done, or is being done, once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marker {
    /// The canonical name: fields sorted by name.
    pub name: String,
    /// Where the effect stands.
    pub state: MarkerState,
    /// Revision of the commit that did or claimed it.
    pub token: u64,
    /// Who did it, as it named itself.
    pub by: String,
    /// Since it came into this state.
    pub age: Duration,
    /// Claims so far; 0 if it was put without.
    pub attempt: u32,
    /// What it left for those who ask.
    pub result: Bytes,
    /// What is left of its retention or of the claim's lease; `None`: for ever, or until a session or a decision ends it.
    pub left: Option<Duration>,
    /// The session under which it is claimed, or 0.
    pub session: u64,
    /// What happened to it before.
    pub events: Vec<MarkerEvent>,
}

/// Where an effect stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum MarkerState {
    /// It was done.
    #[default]
    Done,
    /// Somebody does it now.
    Claimed,
    /// Whoever claimed it is gone.
    Unconfirmed,
    /// It was deleted; only its events are kept.
    Deleted,
}

impl MarkerState {
    /// The word for it, such as `done`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Claimed => "claimed",
            Self::Unconfirmed => "unconfirmed",
            Self::Deleted => "deleted",
        }
    }
}

/// Something that happened to a marker before it was what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MarkerEvent {
    /// Such as `claim_died`.
    pub kind: &'static str,
    /// How long ago.
    pub age: Duration,
    /// The token that it ended.
    pub token: u64,
    /// Whose that was.
    pub by: String,
    /// Who asked for it.
    pub principal: String,
    /// Why, as they said.
    pub reason: String,
}

impl From<v1::Marker> for Marker {
    fn from(marker: v1::Marker) -> Self {
        let state = match marker.state() {
            v1::MarkerState::Done => MarkerState::Done,
            v1::MarkerState::Claimed => MarkerState::Claimed,
            v1::MarkerState::Unconfirmed => MarkerState::Unconfirmed,
            v1::MarkerState::Deleted => MarkerState::Deleted,
        };
        Self {
            state,
            token: marker.token,
            age: Duration::from_millis(marker.age_ms),
            attempt: marker.attempt,
            result: if marker.result.is_empty() { marker.result_bytes } else { marker.result.into() },
            left: (marker.left_ms > 0).then(|| Duration::from_millis(marker.left_ms)),
            session: marker.session,
            events: marker.events.into_iter().map(MarkerEvent::from).collect(),
            name: marker.marker,
            by: marker.by,
        }
    }
}

impl From<v1::MarkerEvent> for MarkerEvent {
    fn from(event: v1::MarkerEvent) -> Self {
        use v1::marker_event::Kind;
        let kind = match event.kind() {
            Kind::ClaimDied => "claim_died",
            Kind::TakenOver => "taken_over",
            Kind::Released => "released",
            Kind::DeletedBy => "deleted",
            Kind::ConfirmedLate => "confirmed_late",
        };
        Self {
            kind,
            age: Duration::from_millis(event.age_ms),
            token: event.token,
            by: event.by,
            principal: event.principal,
            reason: event.reason,
        }
    }
}

/// The name of a marker: `type=welcome,user=42` as text, or its fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MarkerName {
    text: String,
    fields: BTreeMap<String, String>,
}

impl From<&str> for MarkerName {
    fn from(text: &str) -> Self {
        Self { text: text.to_owned(), fields: BTreeMap::new() }
    }
}

impl From<String> for MarkerName {
    fn from(text: String) -> Self {
        Self { text, fields: BTreeMap::new() }
    }
}

impl<K: Into<String>, V: Into<String>, const N: usize> From<[(K, V); N]> for MarkerName {
    fn from(fields: [(K, V); N]) -> Self {
        Self { text: String::new(), fields: fields.into_iter().map(|(k, v)| (k.into(), v.into())).collect() }
    }
}

impl MarkerName {
    pub(crate) fn into_wire(self) -> v1::MarkerName {
        v1::MarkerName { marker: self.text, fields: self.fields }
    }
}

/// How long a marker is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Retention {
    /// 30 days of service time.
    #[default]
    Default,
    /// This long, an hour at least.
    For(Duration),
    /// For ever.
    Forever,
}

impl Retention {
    fn wire(self) -> (u64, bool) {
        match self {
            Self::Default => (0, false),
            Self::For(time) => (millis(time), false),
            Self::Forever => (0, true),
        }
    }
}

/// What becomes of an outside effect whose claim died before it was confirmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDeath {
    /// The next claimer is refused with [`Code::NeedsReconcile`](crate::Code::NeedsReconcile) until somebody confirms or deletes it.
    #[default]
    Ask,
    /// The next claimer does it again: it may happen twice.
    Retry,
    /// The next claimer takes it for done: it may not have happened.
    Skip,
}

impl Client {
    /// Puts a marker, or tells who did before.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// let once = client.once([("type", "welcome"), ("user", "42")]).by("job-900").await?;
    /// if once.already_done {
    ///     println!("done by {} {:?} ago", once.marker.by, once.marker.age);
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing is put before .await"]
    pub fn once(&self, marker: impl Into<MarkerName>) -> PutOnce<'_> {
        PutOnce { client: self, mark: OnceMark::new(marker) }
    }

    /// Asks for the right to do an outside effect.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// use tenure_client::Claimed;
    /// # async fn send_mail(idempotency_key: &str) -> String { String::new() }
    /// match client.claim("type=welcome,user=42").by("worker-7").await? {
    ///     Claimed::Granted(claim) => {
    ///         let message_id = send_mail(claim.key()).await;
    ///         claim.confirm(message_id).await?;
    ///     }
    ///     Claimed::AlreadyDone { marker, .. } => println!("sent by {} as {:?}", marker.by, marker.result),
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use = "nothing is claimed before .await"]
    pub fn claim(&self, marker: impl Into<MarkerName>) -> ClaimMarker<'_> {
        let MarkerName { text, fields } = marker.into();
        let request =
            v1::MarkerClaimRequest { marker: text, fields, namespace: self.namespace(), ..Default::default() };
        ClaimMarker { client: self, request }
    }

    /// Reads one marker, by its text; a deleted one only tells what happened to it.
    ///
    /// # Errors
    /// As any read; [`Code::Invalid`](crate::Code::Invalid) for a text that names no marker.
    pub async fn marker(&self, marker: impl Into<String>) -> Result<Option<Marker>, Error> {
        let request = v1::MarkerGetRequest {
            marker: marker.into(),
            deleted: true,
            namespace: self.namespace(),
            ..Default::default()
        };
        let ask = |channel| {
            let request = request.clone();
            async move {
                let mut client =
                    v1::markers_client::MarkersClient::new(channel).max_decoding_message_size(RECEIVE_BYTES);
                client.get(request).await
            }
        };
        found(self.read(ask).await.map(|reply| reply.marker.map(Marker::from)))
    }

    /// Reads a page of markers whose canonical names begin with `prefix`, behind the name `after`; the second part is where the next page begins,
    /// if there may be one.
    ///
    /// # Errors
    /// As any read.
    pub async fn markers(&self, prefix: &str, after: &str, limit: u32) -> Result<(Vec<Marker>, Option<String>), Error> {
        let request = v1::MarkerListRequest {
            prefix: prefix.to_owned(),
            after: after.to_owned(),
            limit,
            namespace: self.namespace(),
            ..Default::default()
        };
        let ask = |channel| {
            let request = request.clone();
            async move {
                let mut client =
                    v1::markers_client::MarkersClient::new(channel).max_decoding_message_size(RECEIVE_BYTES);
                client.list(request).await
            }
        };
        let reply = self.read(ask).await?;
        let next = Some(reply.next).filter(|next| !next.is_empty());
        Ok((reply.markers.into_iter().map(Marker::from).collect(), next))
    }

    /// Confirms an effect that somebody claimed, by the token of the claim: a decision about a claim that died.
    ///
    /// # Errors
    /// [`Code::Fenced`](crate::Code::Fenced) if that is not the current claim.
    pub async fn confirm_marker(
        &self,
        marker: impl Into<MarkerName>,
        token: u64,
        result: impl Into<Bytes>,
    ) -> Result<(), Error> {
        let MarkerName { text, fields } = marker.into();
        let request = v1::MarkerConfirmRequest {
            marker: text,
            fields,
            token,
            result_bytes: result.into(),
            namespace: self.namespace(),
            request: None,
            ..Default::default()
        };
        let plan = self.plan("confirm a marker", true);
        let _: v1::MarkerConfirmReply = self.change(plan, "/tenure.v1.Markers/Confirm", &request).await?;
        Ok(())
    }

    /// Forgets a marker, so that its effect may happen anew; tells whether there was one. Who asked and why stays on record for a week.
    ///
    /// # Errors
    /// [`Code::Fenced`](crate::Code::Fenced) if a token is given and another is current.
    pub async fn delete_marker(
        &self,
        marker: impl Into<MarkerName>,
        token: Option<u64>,
        reason: impl Into<String>,
    ) -> Result<bool, Error> {
        let MarkerName { text, fields } = marker.into();
        let request = v1::MarkerDeleteRequest {
            marker: text,
            fields,
            token: token.unwrap_or(0),
            reason: reason.into(),
            namespace: self.namespace(),
            request: None,
        };
        let plan = self.plan("delete a marker", true);
        let reply: v1::MarkerDeleteReply = self.change(plan, "/tenure.v1.Markers/Delete", &request).await?;
        Ok(reply.deleted)
    }
}

/// What is put once, alone or with operations that belong to it.
#[derive(Clone, Debug, Default)]
pub struct OnceMark {
    wire: v1::MarkerOnceRequest,
}

impl OnceMark {
    /// The marker of an effect.
    #[must_use]
    pub fn new(marker: impl Into<MarkerName>) -> Self {
        let MarkerName { text, fields } = marker.into();
        Self { wire: v1::MarkerOnceRequest { marker: text, fields, ..Default::default() } }
    }

    /// Who does it: a job, a request.
    #[must_use]
    pub fn by(mut self, by: impl Into<String>) -> Self {
        self.wire.by = by.into();
        self
    }

    /// How long the marker is kept. Whoever asks for longer prolongs it; nobody shortens it.
    #[must_use]
    pub fn retention(mut self, retention: Retention) -> Self {
        (self.wire.retention_ms, self.wire.forever) = retention.wire();
        self
    }

    /// What those are told who ask later; at most 4 KiB.
    #[must_use]
    pub fn result(mut self, result: impl Into<Bytes>) -> Self {
        self.wire.result_bytes = result.into();
        self
    }

    pub(crate) fn into_wire(self) -> v1::MarkerOnceRequest {
        self.wire
    }
}

/// A marker to be put; see [`Client::once`].
#[derive(Clone, Debug)]
pub struct PutOnce<'a> {
    client: &'a Client,
    mark: OnceMark,
}

/// Whether the caller was the first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Once {
    /// It was there before; `marker` tells who did it.
    pub already_done: bool,
    /// It is taken for done though its claim died: it may not have happened.
    pub unconfirmed: bool,
    /// The marker as it is.
    pub marker: Marker,
    /// Revision of the commit.
    pub revision: u64,
}

impl PutOnce<'_> {
    /// Who does it: a job, a request.
    #[must_use]
    pub fn by(mut self, by: impl Into<String>) -> Self {
        self.mark = self.mark.by(by);
        self
    }

    /// How long the marker is kept; see [`OnceMark::retention`].
    #[must_use]
    pub fn retention(mut self, retention: Retention) -> Self {
        self.mark = self.mark.retention(retention);
        self
    }

    /// What those are told who ask later; at most 4 KiB.
    #[must_use]
    pub fn result(mut self, result: impl Into<Bytes>) -> Self {
        self.mark = self.mark.result(result);
        self
    }

    async fn run(self) -> Result<Once, Error> {
        let request =
            v1::MarkerOnceRequest { namespace: self.client.namespace(), request: None, ..self.mark.into_wire() };
        let plan = self.client.plan("once", true);
        let reply: v1::MarkerOnceReply = self.client.change(plan, "/tenure.v1.Markers/Once", &request).await?;
        Ok(Once {
            already_done: reply.already_done,
            unconfirmed: reply.unconfirmed,
            marker: reply.marker.map(Marker::from).ok_or_else(|| mismatched("once"))?,
            revision: reply.header.map_or(0, |header| header.revision),
        })
    }
}

carried_out!(PutOnce<'a> => Once, run);

/// A marker to be claimed; see [`Client::claim`].
#[derive(Clone, Debug)]
pub struct ClaimMarker<'a> {
    client: &'a Client,
    request: v1::MarkerClaimRequest,
}

/// What came of asking for a claim. That another does it now is refused as [`Code::InFlight`](crate::Code::InFlight).
#[derive(Clone, Debug)]
pub enum Claimed {
    /// Do it, then confirm it.
    Granted(Claim),
    /// It was done before.
    AlreadyDone {
        /// Who did it, when, and what it left.
        marker: Marker,
        /// Its claim died and its policy takes it for done: it may not have happened.
        unconfirmed: bool,
    },
}

impl ClaimMarker<'_> {
    /// Who does it: a job, a worker.
    #[must_use]
    pub fn by(mut self, by: impl Into<String>) -> Self {
        self.request.by = by.into();
        self
    }

    /// How long the marker is kept once it is confirmed.
    #[must_use]
    pub fn retention(mut self, retention: Retention) -> Self {
        (self.request.retention_ms, self.request.forever) = retention.wire();
        self
    }

    /// Lets the claim live as long as this session.
    #[must_use]
    pub fn under(mut self, session: &Session) -> Self {
        self.request.session = session.id();
        self
    }

    /// Lets the claim live this long: 60 s unless told otherwise, 1 s to an hour.
    #[must_use]
    pub fn lease(mut self, lease: Duration) -> Self {
        self.request.lease_ms = millis(lease);
        self
    }

    /// What becomes of the effect if this claim dies before it is confirmed.
    #[must_use]
    pub fn on_death(mut self, policy: OnDeath) -> Self {
        let policy = match policy {
            OnDeath::Ask => v1::OnDeath::Ask,
            OnDeath::Retry => v1::OnDeath::Retry,
            OnDeath::Skip => v1::OnDeath::Skip,
        };
        self.request.on_death = policy.into();
        self
    }

    /// Claims, does the effect and confirms it with what it returns. If it fails the claim is released, so that another may try; if this
    /// future is dropped or the process dies in between, [`ClaimMarker::on_death`] decides.
    ///
    /// # Errors
    /// What `effect` returned in the inner result; the outer one is of the service.
    pub async fn run<T, E, F, Fut>(self, effect: F) -> Result<OnceRan<T, E>, Error>
    where
        T: AsRef<[u8]>,
        F: FnOnce(Claim) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        match self.run_claim().await? {
            Claimed::AlreadyDone { marker, unconfirmed } => Ok(OnceRan::AlreadyDone { marker, unconfirmed }),
            Claimed::Granted(claim) => match effect(claim.clone()).await {
                Ok(value) => {
                    claim.confirm(Bytes::copy_from_slice(value.as_ref())).await?;
                    Ok(OnceRan::Done(value))
                }
                Err(error) => {
                    claim.release().await?;
                    Ok(OnceRan::Failed(error))
                }
            },
        }
    }

    async fn run_claim(self) -> Result<Claimed, Error> {
        use v1::marker_claim_reply::Outcome;
        let Self { client, request } = self;
        let plan = client.plan("claim", true);
        let reply: v1::MarkerClaimReply = client.change(plan, "/tenure.v1.Markers/Claim", &request).await?;
        match reply.outcome {
            Some(Outcome::Granted(grant)) => Ok(Claimed::Granted(Claim {
                client: client.clone(),
                name: MarkerName { text: request.marker, fields: request.fields },
                grant,
            })),
            Some(Outcome::AlreadyDone(marker)) => {
                Ok(Claimed::AlreadyDone { marker: marker.into(), unconfirmed: reply.unconfirmed })
            }
            None => Err(mismatched("claim")),
        }
    }
}

carried_out!(ClaimMarker<'a> => Claimed, run_claim);

/// What came of [`ClaimMarker::run`].
#[derive(Clone, Debug)]
pub enum OnceRan<T, E> {
    /// It was done now, and confirmed.
    Done(T),
    /// It failed, and the claim was released.
    Failed(E),
    /// It was done before.
    AlreadyDone {
        /// Who did it.
        marker: Marker,
        /// It may not have happened.
        unconfirmed: bool,
    },
}

/// The right to do an outside effect, until its lease or session ends.
#[derive(Clone, Debug)]
pub struct Claim {
    client: Client,
    name: MarkerName,
    grant: v1::MarkerGrant,
}

impl Claim {
    /// The token of the claim.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.grant.token
    }

    /// Which try this is; the first is 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.grant.attempt
    }

    /// Give it to the other side with the effect, as its idempotency key: it is the same for every attempt, and no other effect has it.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.grant.key
    }

    /// For how long the claim lives, from the sending of the request; `None` under a session.
    #[must_use]
    pub fn lease(&self) -> Option<Duration> {
        (self.grant.lease_ms > 0).then(|| Duration::from_millis(self.grant.lease_ms))
    }

    pub(crate) fn name(&self) -> &MarkerName {
        &self.name
    }

    /// It was done. `result` is told to those who ask later.
    ///
    /// # Errors
    /// [`Code::Fenced`](crate::Code::Fenced) if the claim had died and somebody else was granted it, or it was deleted.
    pub async fn confirm(&self, result: impl Into<Bytes>) -> Result<(), Error> {
        self.client.confirm_marker(self.name.clone(), self.token(), result).await
    }

    /// It was not done, and another may do it now.
    ///
    /// # Errors
    /// [`Code::Fenced`](crate::Code::Fenced) if this is no longer the current claim.
    pub async fn release(&self) -> Result<(), Error> {
        let MarkerName { text, fields } = self.name.clone();
        let request = v1::MarkerReleaseRequest {
            marker: text,
            fields,
            token: self.token(),
            namespace: self.client.namespace(),
            request: None,
        };
        let plan = self.client.plan("release a claim", true);
        let _: v1::MarkerReleaseReply = self.client.change(plan, "/tenure.v1.Markers/Release", &request).await?;
        Ok(())
    }
}
