//! Reservations of a part of a pool: stock, seats, slots.
//!
//! Promises. A guard exists only for a hold that the service told. Whoever stops waiting (by dropping the future) is taken off the list, and a hold
//! that came first is given back. A guard that is dropped without a confirmation gives its hold back.
//! Not promised. That giving back gets through: then the hold ends with its time, a little later.

use std::fmt;
use std::time::Duration;

use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::reserve_request::Wait;
use tokio::sync::oneshot;
use tonic::transport::Channel;

use crate::client::{Client, RequestId, all_pages};
use crate::clock::{BootTime, millis};
use crate::error::{Error, Outcome, found};
use crate::kv::carried_out;
use crate::session::Session;

/// The longest wait that the service takes.
const WAIT_MAX: Duration = Duration::from_secs(86_400);
/// How often a given up wait is looked after.
const GIVE_UP_TRIES: usize = 5;

impl Client {
    /// Asks for a part of a pool. Without [`Reserve::wait`] it is refused at once where there is not enough.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// use std::time::Duration;
    /// # async fn pay() -> Result<(), tenure_client::Error> { Ok(()) }
    /// let seats = client.reserve("concert/row-1", 2).hold(Duration::from_secs(120)).wait(Duration::from_secs(10)).await?;
    /// match pay().await {
    ///     Ok(()) => seats.confirm().await.map(drop),
    ///     Err(error) => {
    ///         seats.cancel().await?; // whoever waits has them in this very commit
    ///         Err(error)
    ///     }
    /// }
    /// # }
    /// ```
    #[must_use = "nothing is asked for before .await"]
    pub fn reserve(&self, pool: impl Into<String>, quantity: u64) -> Reserve<'_> {
        let request =
            v1::ReserveRequest { pool: pool.into(), quantity, namespace: self.namespace(), ..Default::default() };
        Reserve { client: self, request, wait: Duration::ZERO }
    }

    /// Makes a pool of so many units.
    ///
    /// # Errors
    /// [`Code::Conflict`](crate::Code::Conflict) if there is one of this name.
    pub async fn create_pool(&self, name: impl Into<String>, capacity: u64) -> Result<Pool, Error> {
        let (name, namespace, request) = (name.into(), self.namespace(), None);
        let request = v1::PoolCreateRequest { name, capacity, namespace, request };
        self.pool_change("create pool", "/tenure.v1.Pools/Create", &request).await
    }

    /// Sets the capacity of a pool.
    ///
    /// # Errors
    /// [`Code::Conflict`](crate::Code::Conflict) if more than that is taken, [`Code::NotFound`](crate::Code::NotFound) if there is no such pool.
    pub async fn resize_pool(&self, name: impl Into<String>, capacity: u64) -> Result<Pool, Error> {
        let (name, namespace, request) = (name.into(), self.namespace(), None);
        let request = v1::PoolResizeRequest { name, capacity: Some(capacity), namespace, request };
        self.pool_change("resize pool", "/tenure.v1.Pools/Resize", &request).await
    }

    /// Adds units to a pool.
    ///
    /// # Errors
    /// [`Code::NotFound`](crate::Code::NotFound) if there is no such pool.
    pub async fn restock_pool(&self, name: impl Into<String>, quantity: u64) -> Result<Pool, Error> {
        let (name, namespace, request) = (name.into(), self.namespace(), None);
        let request = v1::PoolRestockRequest { name, quantity, namespace, request };
        self.pool_change("restock pool", "/tenure.v1.Pools/Restock", &request).await
    }

    /// Makes units available again that were confirmed.
    ///
    /// # Errors
    /// [`Code::Conflict`](crate::Code::Conflict) if so many are not confirmed, [`Code::NotFound`](crate::Code::NotFound) if there is no such pool.
    pub async fn return_to_pool(&self, name: impl Into<String>, quantity: u64) -> Result<Pool, Error> {
        let (name, namespace, request) = (name.into(), self.namespace(), None);
        let request = v1::PoolReturnRequest { name, quantity, namespace, request };
        self.pool_change("return to pool", "/tenure.v1.Pools/Return", &request).await
    }

    /// Removes a pool of which nothing is held and for which nobody waits.
    ///
    /// # Errors
    /// [`Code::Held`](crate::Code::Held) while it is in use, [`Code::NotFound`](crate::Code::NotFound) if there is no such pool.
    pub async fn delete_pool(&self, name: impl Into<String>) -> Result<Pool, Error> {
        let (name, namespace, request) = (name.into(), self.namespace(), None);
        let request = v1::PoolDeleteRequest { name, namespace, request };
        self.pool_change("delete pool", "/tenure.v1.Pools/Delete", &request).await
    }

    async fn pool_change<Q: prost::Message>(
        &self,
        what: &'static str,
        method: &'static str,
        request: &Q,
    ) -> Result<Pool, Error> {
        let reply: v1::PoolReply = self.change(self.plan(what, true), method, request).await?;
        Ok(reply.pool.map(Pool::from).unwrap_or_default())
    }

    /// Tells what a pool has, its holds and who waits (up to 1,000 of each); `None` if there is no such pool.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn pool(&self, name: impl Into<String>) -> Result<Option<PoolInfo>, Error> {
        let request =
            v1::PoolGetRequest { name: name.into(), limit: 1_000, namespace: self.namespace(), ..Default::default() };
        let reply = self
            .read(|channel| {
                let (mut pools, request) = (pools(channel), request.clone());
                async move { pools.get(request).await }
            })
            .await;
        let info = |reply: v1::PoolGetReply| PoolInfo {
            pool: reply.pool.map(Pool::from).unwrap_or_default(),
            holds: reply.holds.into_iter().map(Hold::from).collect(),
            waiters: reply.waiters.into_iter().map(PoolWaiter::from).collect(),
        };
        found(reply.map(|reply| Some(info(reply))))
    }

    /// Lists all pools whose names begin with `prefix`, by name.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn pools(&self, prefix: impl Into<String>) -> Result<Vec<Pool>, Error> {
        let prefix = &prefix.into();
        let page = |after| async move {
            let (prefix, namespace) = (prefix.clone(), self.namespace());
            let request = v1::PoolListRequest { prefix, limit: 1_000, after, namespace, ..Default::default() };
            let ask = |channel| {
                let (mut pools, request) = (pools(channel), request.clone());
                async move { pools.list(request).await }
            };
            let reply = self.read(ask).await?;
            Ok((reply.pools.into_iter().map(Pool::from).collect(), reply.next))
        };
        all_pages(page).await
    }

    /// Confirms a hold by its numbers, from whichever process.
    ///
    /// # Errors
    /// [`Code::Fenced`](crate::Code::Fenced) if it is over or under another token.
    pub async fn confirm_reservation(
        &self,
        pool: impl Into<String>,
        id: u64,
        token: u64,
    ) -> Result<ReservationChange, Error> {
        let (pool, namespace, request) = (pool.into(), self.namespace(), None);
        let request = v1::ReservationConfirmRequest { pool, id, token, namespace, request };
        let plan = self.plan("confirm reservation", true);
        self.change(plan, "/tenure.v1.Reservations/Confirm", &request).await.map(ReservationChange::of)
    }

    /// Gives a hold back by its numbers, from whichever process.
    ///
    /// # Errors
    /// [`Code::Fenced`](crate::Code::Fenced) if it is confirmed, long over or under another token.
    pub async fn cancel_reservation(
        &self,
        pool: impl Into<String>,
        id: u64,
        token: u64,
    ) -> Result<ReservationChange, Error> {
        let (pool, namespace, request) = (pool.into(), self.namespace(), None);
        let request = v1::ReservationCancelRequest { pool, id, token, namespace, request };
        let plan = self.plan("cancel reservation", true);
        self.change(plan, "/tenure.v1.Reservations/Cancel", &request).await.map(ReservationChange::of)
    }

    /// Makes a hold last at least so long from now on, by its numbers, from whichever process.
    ///
    /// # Errors
    /// [`Code::Fenced`](crate::Code::Fenced) if it is over or under another token.
    pub async fn extend_reservation(
        &self,
        pool: impl Into<String>,
        id: u64,
        token: u64,
        hold: Duration,
    ) -> Result<ReservationChange, Error> {
        let (pool, namespace, request) = (pool.into(), self.namespace(), None);
        let request = v1::ReservationExtendRequest { pool, id, token, hold_ms: millis(hold), namespace, request };
        let plan = self.plan("extend reservation", true);
        self.change(plan, "/tenure.v1.Reservations/Extend", &request).await.map(ReservationChange::of)
    }
}

fn pools(channel: Channel) -> v1::pools_client::PoolsClient<Channel> {
    v1::pools_client::PoolsClient::new(channel).max_decoding_message_size(crate::pipeline::RECEIVE_BYTES)
}

/// A reservation to be made; see [`Client::reserve`].
#[derive(Clone, Debug)]
pub struct Reserve<'a> {
    client: &'a Client,
    request: v1::ReserveRequest,
    wait: Duration,
}

impl<'a> Reserve<'a> {
    /// How long the hold lasts unless it is confirmed or extended: a minute unless told otherwise; from 1 s to 7 days.
    #[must_use]
    pub fn hold(mut self, hold: Duration) -> Self {
        self.request.hold_ms = millis(hold).max(1);
        self
    }

    /// Waits in the list, at most this long (and no longer than a day).
    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait.min(WAIT_MAX);
        self.request.wait = Some(Wait::WaitMs(millis(self.wait)));
        self
    }

    /// The end of this session cancels the hold, or the wait for it.
    #[must_use]
    pub fn session(mut self, session: &Session) -> Self {
        self.request.session = session.id();
        self
    }

    /// Who asks, for people.
    #[must_use]
    pub fn owner(mut self, owner: impl Into<String>) -> Self {
        self.request.owner_id = owner.into();
        self
    }

    pub(crate) fn into_wire(self) -> v1::ReserveRequest {
        self.request
    }

    async fn run(mut self) -> Result<Reservation, Error> {
        let client = self.client.clone();
        let id = if self.wait.is_zero() { client.request_id()? } else { client.wait_id()? };
        self.request.request = Some(id.meta());
        let first_sent = BootTime::now();
        let (answer, outcome) = oneshot::channel();
        // A task of its own, so that dropping this future does not drop the duty to give a late grant back.
        tokio::spawn(reserve(client, id, self.request, self.wait, first_sent, answer));
        let ended = |_| Err(Error::Protocol("the task of the reservation ended early".to_owned()));
        outcome.await.unwrap_or_else(ended)
    }
}

carried_out!(Reserve<'a> => Reservation, run);

/// It gives itself back if it is dropped in the channel.
type Answer = oneshot::Sender<Result<Reservation, Error>>;

/// Carries a reservation through, whether or not its caller stays.
/// `_id` stays open until the hold is heard of or given back.
async fn reserve(
    client: Client,
    _id: RequestId,
    request: v1::ReserveRequest,
    wait: Duration,
    first_sent: BootTime,
    mut answer: Answer,
) {
    let plan = if wait.is_zero() { client.plan("reserve", true) } else { client.patient_plan("reserve", wait) };
    let result = tokio::select! {
        result = client.unary::<_, v1::ReserveReply>(plan, "/tenure.v1.Reservations/Reserve", &request) => result,
        () = answer.closed() => return give_up(&client, request).await,
    };
    let unknown = matches!(&result, Err(error) if error.outcome() == Outcome::Unknown);
    // The caller may leave in the very moment of the grant.
    drop(answer.send(result.map(|reply| Reservation::of(client.clone(), reply, first_sent))));
    if unknown {
        give_up(&client, request).await;
    }
}

/// Takes the wait off the list, or gives back what it came to. Nobody minds if it fails: an unnoticed hold ends with its time.
async fn give_up(client: &Client, request: v1::ReserveRequest) {
    for _ in 0..GIVE_UP_TRIES {
        let leave = v1::ReservationGiveUpRequest {
            pool: request.pool.clone(),
            reserve: request.request.clone(),
            namespace: request.namespace.clone(),
            request: None,
        };
        let left: Result<v1::ReservationGiveUpReply, Error> =
            client.change(client.plan("give up", true), "/tenure.v1.Reservations/GiveUp", &leave).await;
        if left.is_ok_and(|reply| reply.waiters > 0) {
            return;
        }
        // It was granted or refused already, or has not arrived: the same request tells, under the same id. A grant is given back.
        let again = client.unary::<_, v1::ReserveReply>(
            client.plan("reserve", true),
            "/tenure.v1.Reservations/Reserve",
            &request,
        );
        match again.await {
            Ok(grant) => return give_back(client, grant.pool, grant.id, grant.token).await,
            Err(Error::Refused(_)) => return,
            Err(error) => tracing::debug!(pool = request.pool, %error, "the wait is not given up yet"),
        }
    }
}

async fn give_back(client: &Client, pool: String, id: u64, token: u64) {
    if let Err(error) = client.cancel_reservation(pool, id, token).await {
        tracing::debug!(id, token, %error, "an unwanted hold was left to its time");
    }
}

/// A hold on a part of a pool.
///
/// Dropping it gives the hold back in the background if a tokio runtime is there. Use [`Reservation::cancel`] where it matters to know.
pub struct Reservation {
    client: Client,
    pool: String,
    id: u64,
    token: u64,
    quantity: u64,
    waited: Duration,
    deadline: BootTime,
    settled: bool,
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation")
            .field("pool", &self.pool)
            .field("id", &self.id)
            .field("token", &self.token)
            .field("quantity", &self.quantity)
            .finish_non_exhaustive()
    }
}

impl Reservation {
    fn of(client: Client, reply: v1::ReserveReply, first_sent: BootTime) -> Self {
        let waited = Duration::from_millis(reply.waited_ms);
        // The service's time of the hold began after the call was sent and the wait was over.
        let deadline = first_sent.plus(waited).plus(Duration::from_millis(reply.hold_ms));
        let v1::ReserveReply { pool, id, token, quantity, .. } = reply;
        Self { client, pool, id, token, quantity, waited, deadline, settled: false }
    }

    /// The pool.
    #[must_use]
    pub fn pool(&self) -> &str {
        &self.pool
    }

    /// The number of the hold in its pool.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The token of the grant, without which the number means nothing.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.token
    }

    /// How much is held.
    #[must_use]
    pub fn quantity(&self) -> u64 {
        self.quantity
    }

    /// How long the grant took, by the service's count.
    #[must_use]
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The moment until which the hold stands at least, unless it or its session is ended.
    #[must_use]
    pub fn deadline(&self) -> BootTime {
        self.deadline
    }

    /// Makes the hold last at least so long from now on.
    ///
    /// # Errors
    /// [`Code::Fenced`](crate::Code::Fenced) if it is over.
    pub async fn extend(&mut self, hold: Duration) -> Result<(), Error> {
        let sent = BootTime::now();
        self.client.extend_reservation(self.pool.clone(), self.id, self.token, hold).await?;
        self.deadline = self.deadline.max(sent.plus(hold));
        Ok(())
    }

    /// Makes the hold final. After an unknown outcome the hold is left alone: confirm it again by [`Client::confirm_reservation`].
    ///
    /// # Errors
    /// [`Code::Fenced`](crate::Code::Fenced) if it is over: what it held may be another's.
    pub async fn confirm(mut self) -> Result<ReservationChange, Error> {
        self.settled = true;
        self.client.confirm_reservation(self.pool.clone(), self.id, self.token).await
    }

    /// Gives the hold back; whoever waits has it in the same commit.
    ///
    /// # Errors
    /// When the outcome is unknown: the hold ends with its time.
    pub async fn cancel(mut self) -> Result<ReservationChange, Error> {
        self.settled = true;
        self.client.cancel_reservation(self.pool.clone(), self.id, self.token).await
    }

    /// Leaves the hold to its time: dropping the guard gives nothing back.
    pub fn forget(mut self) {
        self.settled = true;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.settled || BootTime::now() >= self.deadline {
            return;
        }
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (client, pool, id, token) = (self.client.clone(), std::mem::take(&mut self.pool), self.id, self.token);
            runtime.spawn(async move { give_back(&client, pool, id, token).await });
        }
    }
}

/// What became of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HoldState {
    /// It stands.
    Held,
    /// Its units are gone from the pool.
    Confirmed,
    /// It was given back, or its session ended.
    Cancelled,
    /// Its time was over.
    Expired,
}

impl fmt::Display for HoldState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Held => "held",
            Self::Confirmed => "confirmed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        })
    }
}

impl From<v1::hold::State> for HoldState {
    fn from(state: v1::hold::State) -> Self {
        match state {
            v1::hold::State::Held => Self::Held,
            v1::hold::State::Confirmed => Self::Confirmed,
            v1::hold::State::Cancelled => Self::Cancelled,
            v1::hold::State::Expired => Self::Expired,
        }
    }
}

/// A hold after a change of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReservationChange {
    /// The state that it has now.
    pub state: HoldState,
    /// How much it is about.
    pub quantity: u64,
    /// Until it expires, while it is held.
    pub left: Duration,
    /// What is left in the pool.
    pub available: u64,
}

impl ReservationChange {
    fn of(reply: v1::ReservationReply) -> Self {
        let left = Duration::from_millis(reply.left_ms);
        Self { state: reply.state().into(), quantity: reply.quantity, left, available: reply.available }
    }
}

/// A pool as the service tells of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pool {
    /// The name.
    pub name: String,
    /// How much there is in all.
    pub capacity: u64,
    /// Under holds that are not confirmed.
    pub held: u64,
    /// Gone until it is returned.
    pub confirmed: u64,
    /// The rest.
    pub available: u64,
    /// How many wait; not told by changes.
    pub waiter_count: u64,
}

impl From<v1::Pool> for Pool {
    fn from(pool: v1::Pool) -> Self {
        let v1::Pool { name, capacity, held, confirmed, available, waiter_count, .. } = pool;
        Self { name, capacity, held, confirmed, available, waiter_count }
    }
}

/// A pool with its holds and those who wait.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolInfo {
    /// The pool.
    pub pool: Pool,
    /// By rising number: those that stand, and those whose end is remembered.
    pub holds: Vec<Hold>,
    /// In the order in which they will be served.
    pub waiters: Vec<PoolWaiter>,
}

/// A hold as the service tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hold {
    /// Its number.
    pub id: u64,
    /// Its token.
    pub token: u64,
    /// How much it is about.
    pub quantity: u64,
    /// Where it is in its life.
    pub state: HoldState,
    /// The session that it depends on, or 0.
    pub session: u64,
    /// Who asked for it.
    pub owner: String,
    /// Until it expires, or until its end is forgotten.
    pub left: Duration,
}

impl From<v1::Hold> for Hold {
    fn from(hold: v1::Hold) -> Self {
        let state = hold.state().into();
        let left = Duration::from_millis(hold.left_ms);
        let v1::Hold { id, token, quantity, session, owner_id: owner, .. } = hold;
        Self { id, token, quantity, state, session, owner, left }
    }
}

/// Someone on the list of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolWaiter {
    /// From 1: the next one to be served.
    pub position: u64,
    /// How much is asked for.
    pub quantity: u64,
    /// The session that the wait depends on, or 0.
    pub session: u64,
    /// Who asks.
    pub owner: String,
    /// For how long already.
    pub waited: Duration,
}

impl From<v1::PoolWaiter> for PoolWaiter {
    fn from(waiter: v1::PoolWaiter) -> Self {
        let waited = Duration::from_millis(waiter.waited_ms);
        let v1::PoolWaiter { position, quantity, session, owner_id: owner, .. } = waiter;
        Self { position, quantity, session, owner, waited }
    }
}
