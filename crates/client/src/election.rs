//! Elections: leading, with the safe order of shutting down, and observing who leads.
//!
//! Promises. [`Election::lead`] runs the work only while this process leads: when the session is lost the work is dropped before anything else,
//! and on every other way out the lead is resigned only after the work has ended, so no other leader starts beside its last steps. Whoever stops
//! waiting is taken out of the queue, and an election that came first is resigned.
//! Not promised. That a process which is paused stops acting: give [`Leadership::token`] to what it writes to, and let that compare it.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::campaign_request::Wait;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};

use crate::client::{Client, RequestId, all_pages};
use crate::clock::millis;
use crate::error::{Code, Error, Outcome, of_read};
use crate::lease::{LeaseState, LostReason};
use crate::lock::Unclaimed;
use crate::session::Session;

/// "For ever", in a form that can be added to a clock.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3_600);
/// Between two tries to withdraw or to resign, and of an observer to connect again.
const AGAIN: Duration = Duration::from_millis(300);

impl Client {
    /// The election of this name.
    #[must_use]
    pub fn election(&self, name: impl Into<String>) -> Election {
        Election { client: self.clone(), name: name.into(), value: Bytes::new(), priority: 0, wait: None }
    }

    /// The elections that somebody leads and whose names begin with `prefix`, by name; without their candidates.
    ///
    /// # Errors
    /// As every read.
    pub async fn elections(&self, prefix: &str) -> Result<Vec<ElectionInfo>, Error> {
        let page = |after| async move {
            let (prefix, namespace) = (prefix.to_owned(), self.namespace());
            let request = v1::ElectionListRequest { prefix, limit: 1_000, after, namespace, ..Default::default() };
            let ask = |channel| {
                let (mut elections, request) = (self.elections_of(channel), request.clone());
                async move { elections.list(request).await }
            };
            let reply = self.read(ask).await?;
            Ok((reply.elections.into_iter().map(ElectionInfo::from).collect(), reply.next))
        };
        all_pages(page).await
    }
}

/// An election by its name; see [`Client::election`].
///
/// ```no_run
/// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
/// let session = client.session().name("scheduler 3").await?;
/// let election = client.election("scheduler").value("10.0.0.3:8080");
/// election
///     .lead(&session, |leader| async move {
///         println!("leading under token {}", leader.token());
///         // Returning gives the lead up: here, when somebody with a higher priority waits.
///         leader.should_yield().await;
///     })
///     .await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Election {
    client: Client,
    name: String,
    value: Bytes,
    priority: i32,
    wait: Option<Duration>,
}

impl Election {
    /// What the leader publishes: at most 64 KiB.
    #[must_use]
    pub fn value(self, value: impl Into<Bytes>) -> Self {
        Self { value: value.into(), ..self }
    }

    /// Higher ones are elected first, and a leader with a lower one is told that it should yield: 0 unless told otherwise.
    #[must_use]
    pub fn priority(self, priority: i32) -> Self {
        Self { priority, ..self }
    }

    /// How long a campaign waits; zero does not wait. For ever, unless told otherwise.
    #[must_use]
    pub fn wait(self, wait: Duration) -> Self {
        Self { wait: Some(wait), ..self }
    }

    /// Campaigns until elected.
    ///
    /// # Errors
    /// [`Code::Held`] or [`Code::TimeoutWaiting`] where another leads, [`Error::Lost`] if the session is lost meanwhile.
    pub async fn campaign(&self, session: &Session) -> Result<Leadership, Error> {
        session.check()?;
        let id = self.client.wait_id()?;
        let request = v1::CampaignRequest {
            name: self.name.clone(),
            session: session.id(),
            value_bytes: self.value.clone(),
            priority: self.priority,
            wait: Some(match self.wait {
                Some(wait) => Wait::WaitMs(millis(wait)),
                None => Wait::Forever(true),
            }),
            namespace: self.client.namespace(),
            request: Some(id.meta()),
            ..Default::default()
        };
        let (answer, outcome) = oneshot::channel();
        // A task of its own, so that dropping this future does not drop the duty to withdraw.
        tokio::spawn(campaign(session.clone(), id, request, self.wait.unwrap_or(FOR_EVER), answer));
        let leader = outcome
            .await
            .unwrap_or_else(|_| Err(Error::Protocol("the task of the campaign ended early".to_owned())))?
            .claim();
        // The election may have been told to a process that slept through its lease.
        session.check()?;
        Ok(leader)
    }

    /// Campaigns, then runs `work` for as long as this process leads, then resigns. Ends with what the work gave.
    ///
    /// The order is: the work has ended, then the lead is given up. When the session is lost the work is dropped at its next await, so let
    /// it await often, or call [`Leadership::check`]. When this future is dropped, or the work panics, the lead is resigned in the background.
    ///
    /// # Errors
    /// Those of [`Election::campaign`]; [`Error::Lost`] if the lead was lost while the work ran, or before it was resigned.
    pub async fn lead<T, F, W>(&self, session: &Session, work: F) -> Result<T, Error>
    where
        F: FnOnce(Leadership) -> W,
        W: Future<Output = T>,
    {
        let leader = self.campaign(session).await?;
        // Made before the work, so dropped after it: resigns where nothing below is reached.
        let unresigned = leader.clone().unclaimed();
        let done = {
            let work = work(leader.clone());
            tokio::select! {
                biased;
                reason = leader.lost() => Err(Error::Lost(reason)),
                done = work => Ok(done),
            }
        };
        // Here the work has returned or was dropped.
        let done = done?;
        match leader.resign().await {
            // It goes on in the background.
            Err(error) if error.retryable() => return Err(error),
            resigned => {
                drop(unresigned.claim());
                resigned?;
            }
        }
        Ok(done)
    }

    /// Tells who leads and who waits.
    ///
    /// # Errors
    /// As every read.
    pub async fn get(&self) -> Result<ElectionInfo, Error> {
        let (name, namespace) = (self.name.clone(), self.client.namespace());
        let request = v1::ElectionGetRequest { name, namespace, ..Default::default() };
        let reply = self
            .client
            .read(|channel| {
                let (mut elections, request) = (self.client.elections_of(channel), request.clone());
                async move { elections.get(request).await }
            })
            .await?;
        Ok(reply.election.map(ElectionInfo::from).unwrap_or_default())
    }

    /// Follows the election: how it is, then each change. Connects again by itself.
    #[must_use]
    pub fn observe(&self) -> Observing {
        Observing { election: self.clone(), stream: None, next_channel: 0, last: None }
    }
}

/// Carries a campaign through, whether or not its caller stays. `_id` stays open until it is over or withdrawn.
async fn campaign(
    session: Session,
    _id: RequestId,
    request: v1::CampaignRequest,
    wait: Duration,
    mut answer: oneshot::Sender<Result<Unclaimed<Leadership>, Error>>,
) {
    let client = session.client().clone();
    let plan = client.patient_plan("campaign", wait.min(FOR_EVER));
    let place = v1::WithdrawRequest {
        name: request.name.clone(),
        session: session.id(),
        campaign: request.request.clone(),
        namespace: client.namespace(),
        request: None,
    };
    let result = tokio::select! {
        reply = client.unary::<_, v1::CampaignReply>(plan, "/tenure.v1.Elections/Campaign", &request) => {
            // The caller may leave in the very moment of its election.
            reply.map(|reply| Leadership::of(&session, &request.name, reply.token).unclaimed())
        }
        reason = session.lost() => Err(Error::Lost(reason)),
        () = answer.closed() => return withdraw(&session, place).await,
    };
    let is_unknown = matches!(&result, Err(error) if error.outcome() == Outcome::Unknown);
    drop(answer.send(result));
    if is_unknown {
        withdraw(&session, place).await;
    }
}

/// Withdraws until told that the candidate is gone, or that it leads, which is then resigned; or until the session is over.
async fn withdraw(session: &Session, place: v1::WithdrawRequest) {
    let client = session.client();
    // The campaign may still be on its way behind the first withdrawal, so "there is no such candidate" counts only when said again later.
    let mut not_found = 0;
    while session.check().is_ok() {
        let plan = client.plan("withdraw", true);
        match client.change::<_, v1::WithdrawReply>(plan, "/tenure.v1.Elections/Withdraw", &place).await {
            Ok(v1::WithdrawReply { result: Some(v1::withdraw_reply::Result::Elected(elected)), .. }) => {
                return resign_to_the_end(Leadership::of(session, &place.name, elected.token)).await;
            }
            Ok(_) => return,
            Err(error) if error.code() == Some(Code::SessionExpired) => return,
            Err(error) if error.code() == Some(Code::NotFound) && not_found > 0 => return,
            Err(error) if error.code() == Some(Code::NotFound) => not_found += 1,
            Err(error) => tracing::debug!(election = place.name, %error, "the candidate is not withdrawn yet"),
        }
        sleep(AGAIN).await;
    }
}

/// Resigns until told that it is done, or that another leads; or until the session is over.
async fn resign_to_the_end(leader: Leadership) {
    while let Err(error) = leader.clone().resign().await {
        if !error.retryable() {
            return;
        }
        tracing::debug!(election = leader.name(), %error, "an unwanted lead is not resigned yet");
        sleep(AGAIN).await;
    }
}

async fn resign(client: &Client, name: &str, token: u64, to: u64) -> Result<(), Error> {
    let (name, namespace) = (name.to_owned(), client.namespace());
    let request = v1::ResignRequest { name, token, to, namespace, request: None };
    let plan = client.plan("resign", true);
    client.change::<_, v1::ResignReply>(plan, "/tenure.v1.Elections/Resign", &request).await.map(|_| ())
}

/// A won election. Clones are the same lead; dropping them does not resign, since only the caller knows when its work has ended: the lead then ends
/// with the session.
#[derive(Clone, Debug)]
pub struct Leadership {
    led: Arc<Led>,
}

#[derive(Debug)]
struct Led {
    session: Session,
    name: String,
    token: u64,
}

impl Leadership {
    fn of(session: &Session, name: &str, token: u64) -> Self {
        Self { led: Arc::new(Led { session: session.clone(), name: name.to_owned(), token }) }
    }

    /// Resigned when it is dropped.
    fn unclaimed(self) -> Unclaimed<Self> {
        Unclaimed::new(self, |leader| Box::pin(resign_to_the_end(leader)))
    }

    /// The fencing token: larger than that of every earlier leader. Give it to what this leader writes to.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.led.token
    }

    /// The name of the election.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.led.name
    }

    /// The session under which it leads.
    #[must_use]
    pub fn session(&self) -> &Session {
        &self.led.session
    }

    /// May this process act as the leader? Reads the clock: call it before each step that matters.
    ///
    /// # Errors
    /// [`Error::Lost`] once the session is lost.
    pub fn check(&self) -> Result<(), Error> {
        self.led.session.check()
    }

    /// Safe, at risk or lost. Reads the clock.
    #[must_use]
    pub fn state(&self) -> LeaseState {
        self.led.session.state()
    }

    /// Waits until the session is lost and tells why.
    pub async fn lost(&self) -> LostReason {
        self.led.session.lost().await
    }

    /// Publishes another value; tells whether a candidate with a higher priority waits.
    ///
    /// # Errors
    /// [`Code::Fenced`] if another leads since, [`Error::Lost`] if the session is lost.
    pub async fn proclaim(&self, value: impl Into<Bytes>) -> Result<bool, Error> {
        self.check()?;
        let client = self.led.session.client();
        let request = v1::ProclaimRequest {
            name: self.led.name.clone(),
            token: self.led.token,
            value_bytes: value.into(),
            namespace: client.namespace(),
            ..Default::default()
        };
        let plan = client.plan("proclaim", true);
        let reply: v1::ProclaimReply = client.change(plan, "/tenure.v1.Elections/Proclaim", &request).await?;
        Ok(reply.should_yield)
    }

    /// Waits until a candidate with a higher priority waits, or until another leads. Renewals of the session tell it too, so that it is learned where
    /// no stream can be held open.
    pub async fn should_yield(&self) {
        tokio::select! {
            () = self.observed_to_yield() => {}
            () = self.led.session.core().should_yield(&self.led.name) => {}
        }
    }

    async fn observed_to_yield(&self) {
        let mut observing = self.led.session.client().election(&self.led.name).observe();
        loop {
            match observing.next().await {
                Ok(info) if info.should_yield || info.leader.as_ref().is_none_or(|l| l.token > self.led.token) => {
                    return;
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(election = self.led.name, %error, "whether to yield is not known yet");
                    sleep(AGAIN).await;
                }
            }
        }
    }

    /// Gives the lead up, and to the next candidate in the same commit. Stop the work first.
    ///
    /// # Errors
    /// [`Error::Lost`] if the session is lost, [`Code::Fenced`] if another leads since: in both cases there may have been another leader before
    /// this call.
    pub async fn resign(self) -> Result<(), Error> {
        self.check()?;
        resign(self.led.session.client(), &self.led.name, self.led.token, 0).await
    }

    /// Gives the lead to a candidate by its session.
    ///
    /// # Errors
    /// As [`Leadership::resign`], and [`Code::NotFound`] where it is no candidate: this process then leads on.
    pub async fn resign_to(&self, session: u64) -> Result<(), Error> {
        self.check()?;
        resign(self.led.session.client(), &self.led.name, self.led.token, session).await
    }
}

/// The states of an election as they come; see [`Election::observe`].
#[derive(Debug)]
pub struct Observing {
    election: Election,
    stream: Option<tonic::Streaming<v1::ObserveReply>>,
    next_channel: usize,
    last: Option<ElectionInfo>,
}

impl Observing {
    /// The next state: the first is how the election is. States that came and went between two looks may be left out, the newest never is.
    ///
    /// # Errors
    /// When the request is refused; a lost connection is made anew.
    pub async fn next(&mut self) -> Result<ElectionInfo, Error> {
        loop {
            let stream = match &mut self.stream {
                Some(stream) => stream,
                None => match self.open().await? {
                    Some(stream) => self.stream.insert(stream),
                    None => {
                        sleep(AGAIN).await;
                        continue;
                    }
                },
            };
            match stream.message().await {
                Ok(Some(v1::ObserveReply { election: Some(election), .. })) => {
                    let info = ElectionInfo::from(election);
                    // What was told before the connection broke is not told again.
                    if self.last.as_ref().is_none_or(|last| !last.is_same(&info)) {
                        self.last = Some(info.clone());
                        return Ok(info);
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => {
                    self.stream = None;
                    sleep(AGAIN).await;
                }
            }
        }
    }

    /// Tries the endpoints in turn; `None`: this one cannot serve now.
    async fn open(&mut self) -> Result<Option<tonic::Streaming<v1::ObserveReply>>, Error> {
        let client = &self.election.client;
        let channel = client.channels()[self.next_channel % client.channels().len()].clone();
        self.next_channel += 1;
        let request = v1::ObserveRequest { name: self.election.name.clone(), namespace: client.namespace() };
        let mut elections = client.elections_of(channel);
        match timeout_at(Instant::now() + client.timeout(), elections.observe(request)).await {
            Ok(Ok(response)) => Ok(Some(response.into_inner())),
            Ok(Err(status)) => match of_read(&status) {
                Error::Refused(problem) if problem.code != Code::NoQuorum => Err(Error::Refused(problem)),
                _ => Ok(None),
            },
            Err(_) => Ok(None),
        }
    }
}

/// An election as the service tells of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElectionInfo {
    /// The name.
    pub name: String,
    /// Who leads; `None` when it is vacant.
    pub leader: Option<ElectionLeader>,
    /// A candidate with a higher priority than the leader's waits.
    pub should_yield: bool,
    /// The first of those who wait, in order; not told to observers and in lists.
    pub candidates: Vec<ElectionCandidate>,
    /// How many wait in all.
    pub candidate_count: u64,
}

impl ElectionInfo {
    fn is_same(&self, other: &Self) -> bool {
        let facts =
            |info: &Self| (info.leader.as_ref().map(|leader| (leader.token, leader.value_revision)), info.should_yield);
        facts(self) == facts(other)
    }
}

/// Who leads an election.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElectionLeader {
    /// The fencing token.
    pub token: u64,
    /// The session.
    pub session: u64,
    /// What it publishes.
    pub value: Bytes,
    /// The commit that published it.
    pub value_revision: u64,
    /// Its priority.
    pub priority: i32,
    /// How long it has led.
    pub led: Duration,
    /// Until the session may be ended; zero if the answering member does not know.
    pub remaining: Duration,
    /// The name of the session.
    pub session_name: String,
    /// What the session's maker said about itself.
    pub metadata: BTreeMap<String, String>,
}

/// Who waits to lead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElectionCandidate {
    /// From 1: the next one to be elected.
    pub position: u64,
    /// The session.
    pub session: u64,
    /// Its priority.
    pub priority: i32,
    /// How long it has waited.
    pub waited: Duration,
    /// The name of the session.
    pub session_name: String,
}

impl From<v1::Election> for ElectionInfo {
    fn from(election: v1::Election) -> Self {
        Self {
            name: election.name,
            leader: election.leader.map(ElectionLeader::from),
            should_yield: election.should_yield,
            candidates: election.candidates.into_iter().map(ElectionCandidate::from).collect(),
            candidate_count: election.candidate_count,
        }
    }
}

impl From<v1::ElectionLeader> for ElectionLeader {
    fn from(leader: v1::ElectionLeader) -> Self {
        Self {
            token: leader.token,
            session: leader.session,
            value: if leader.value.is_empty() { leader.value_bytes } else { leader.value.into() },
            value_revision: leader.value_revision,
            priority: leader.priority,
            led: Duration::from_millis(leader.led_ms),
            remaining: Duration::from_millis(leader.remaining_ms),
            session_name: leader.session_name,
            metadata: leader.metadata,
        }
    }
}

impl From<v1::ElectionCandidate> for ElectionCandidate {
    fn from(candidate: v1::ElectionCandidate) -> Self {
        Self {
            position: candidate.position,
            session: candidate.session,
            priority: candidate.priority,
            waited: Duration::from_millis(candidate.waited_ms),
            session_name: candidate.session_name,
        }
    }
}
