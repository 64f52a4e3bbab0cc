//! The client: endpoints, request ids, and the rule of which failures are tried again.
//!
//! Promises. A change is repeated only under the request id of its first try, so it happens at most once. A call ends within its
//! timeout. If any try of a change was sent and none was answered, the call ends as [`Error::Unknown`], never as a plain failure.
//! Relies on. The server remembers one-shot ids for ten minutes; no call goes on for more than [`RETRY_MAX`], half of that.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use prost::Message;
use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::reply::Result as Reply;
use tenure_wire::tenure::v1::request::Call;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::{Channel, Endpoint};

use crate::error::{Code, Error, Outcome, Problem, of_read};
use crate::pipeline::{Answer, Pipeline, RECEIVE_BYTES, Undelivered};
use crate::requests;
use crate::session::{NamedRequest, Session};

/// The longest time over which a request id is used.
pub const RETRY_MAX: Duration = Duration::from_secs(5 * 60);
/// Pause before the second try; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// The behaviour version from which a cluster knows numbers of a series.
const SERIES: u32 = 3;
/// Where every request of a change has its id.
const REQUEST_FIELD: u32 = 15;

/// Settings of a client.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    timeout: Duration,
    connect_timeout: Duration,
    namespace: String,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(5), connect_timeout: Duration::from_secs(1), namespace: String::new() }
    }
}

impl ClientOptions {
    /// How long a call may take in all, tries and pauses included: 5 s by default, at most [`RETRY_MAX`]. A wait for a lock comes on top.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout: timeout.min(RETRY_MAX), ..self }
    }

    /// How long one endpoint may take to accept a connection before the next one is tried: 1 s by default.
    #[must_use]
    pub fn connect_timeout(self, connect_timeout: Duration) -> Self {
        Self { connect_timeout, ..self }
    }

    /// The namespace of every name; empty is `default`.
    #[must_use]
    pub fn namespace(self, namespace: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), ..self }
    }
}

/// A connection to a Tenure service. Clones share it, and calls of many tasks travel together.
///
/// ```no_run
/// # async fn example() -> Result<(), tenure_client::Error> {
/// let client = tenure_client::Client::connect(["127.0.0.1:2379"]).await?;
/// let put = client.put("config/colour", "green").await?;
/// let record = client.get("config/colour").await?.expect("just written");
/// assert_eq!((record.value_str(), record.mod_revision), (Some("green"), put.revision));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    options: ClientOptions,
    pipeline: Pipeline,
    numbers: requests::Numbers,
    /// For what may wait.
    waits: requests::Numbers,
    /// For the calls that do not go over the pipeline: lists, watches. Dialled when first used.
    channels: Vec<Channel>,
    /// The one of them that served last.
    served: AtomicUsize,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("options", &self.inner.options)
            .field("endpoints", &self.inner.channels.len())
            .finish()
    }
}

impl Client {
    /// Connects to one of `endpoints` (`host:port`, or with `http://` before it), with default settings.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an endpoint that is none, [`Error::Unavailable`] if none of them can be reached.
    pub async fn connect<E: AsRef<str>>(endpoints: impl IntoIterator<Item = E>) -> Result<Self, Error> {
        let client = Self::with_options(endpoints, ClientOptions::default())?;
        match tokio::time::timeout(client.inner.options.timeout, client.inner.pipeline.probe()).await {
            Ok(Ok(())) => Ok(client),
            Ok(Err(Undelivered::NotSent(why) | Undelivered::Broken(why))) => Err(Error::Unavailable { why }),
            Err(_) => {
                Err(Error::Unavailable { why: format!("no connection within {:?}", client.inner.options.timeout) })
            }
        }
    }

    /// A client that dials when it is first used. Call it inside a tokio runtime, on which its connection lives.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an endpoint that is none.
    pub fn with_options<E: AsRef<str>>(
        endpoints: impl IntoIterator<Item = E>,
        options: ClientOptions,
    ) -> Result<Self, Error> {
        let endpoints: Vec<Endpoint> =
            endpoints.into_iter().map(|text| endpoint(text.as_ref(), &options)).collect::<Result<_, _>>()?;
        if endpoints.is_empty() {
            return Err(Error::Invalid("no endpoint was given".to_owned()));
        }
        let channels = endpoints.iter().map(Endpoint::connect_lazy).collect();
        let pipeline = Pipeline::start(endpoints, options.connect_timeout);
        let [numbers, waits] = [requests::OPEN_MAX, requests::WAITS_SPAN].map(requests::Numbers::new);
        let served = AtomicUsize::new(0);
        Ok(Self { inner: Arc::new(Inner { options, pipeline, numbers, waits, channels, served }) })
    }

    pub(crate) fn namespace(&self) -> String {
        self.inner.options.namespace.clone()
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.inner.options.timeout
    }

    pub(crate) fn channels(&self) -> &[Channel] {
        &self.inner.channels
    }

    /// Every channel once with its number, the one that served last first.
    pub(crate) fn channels_in_turn(&self) -> impl Iterator<Item = (usize, Channel)> + Send + use<> {
        let inner = self.inner.clone();
        let (first, count) = (inner.served.load(Ordering::Relaxed), inner.channels.len());
        (first..first + count).map(move |number| (number % count, inner.channels[number % count].clone()))
    }

    /// The channel of this number answered: the next one who asks begins with it.
    pub(crate) fn served_by(&self, number: usize) {
        self.inner.served.store(number, Ordering::Relaxed);
    }

    /// How long one channel may go unanswered before the next one is asked. Where there is no other it has all the time.
    pub(crate) fn share(&self) -> Duration {
        let timeout = self.inner.options.timeout;
        if self.inner.channels.len() == 1 { timeout } else { third(timeout) }
    }

    /// Gives the pipeline's connection up unless something was heard since `sent`.
    pub(crate) fn suspect(&self, sent: Instant) {
        self.inner.pipeline.suspect(sent);
    }

    /// Moves on from a member that cannot serve.
    pub(crate) fn leave(&self, link: u64) {
        self.inner.pipeline.leave(link);
    }

    /// One try over the pipeline, for callers with a rule of their own.
    pub(crate) async fn send_once(&self, call: Call) -> Result<Answer, Undelivered> {
        self.inner.pipeline.send(call).await
    }

    /// Carries a call out over the pipeline, with tries under one request id, until `plan.until`.
    pub(crate) async fn call(&self, plan: Plan, call: Call) -> Result<Reply, Error> {
        let mut tries = Tries { plan, sent: false, why: String::new(), refused: false, pause: BACKOFF_MIN };
        loop {
            let sent_at = Instant::now();
            let until = plan.try_timeout.map_or(plan.until, |time| plan.until.min(sent_at + time));
            match timeout_at(until, self.inner.pipeline.send(call.clone())).await {
                Ok(Ok(Answer { result: Reply::Error(error), link })) => {
                    let problem = Problem::from(error);
                    if problem.code == Code::NoQuorum {
                        self.inner.pipeline.leave(link);
                    }
                    if !tries.again_after_refusal(&problem) {
                        return Err(tries.refused(problem));
                    }
                    tries.pause = tries.pause.max(problem.retry_after.unwrap_or_default());
                }
                Ok(Ok(answer)) => return Ok(answer.result),
                Ok(Err(Undelivered::NotSent(why))) => tries.why = why,
                Ok(Err(Undelivered::Broken(why))) => tries.lost(why),
                Err(_) => {
                    self.inner.pipeline.suspect(sent_at);
                    tries.lost("no answer in time".to_owned());
                }
            }
            if Instant::now() + tries.pause >= plan.until {
                return Err(tries.failed());
            }
            sleep(tries.next_pause()).await;
        }
    }

    /// Carries a change out that the pipeline takes by the path of its method, with tries under the request id that is in `request`.
    pub(crate) async fn unary<Q: Message, A: Message + Default>(
        &self,
        plan: Plan,
        method: &'static str,
        request: &Q,
    ) -> Result<A, Error> {
        self.by_path(plan, method, request.encode_to_vec()).await
    }

    async fn by_path<A: Message + Default>(&self, plan: Plan, method: &'static str, body: Vec<u8>) -> Result<A, Error> {
        let call = v1::UnaryCall { method: method.to_owned(), body: body.into() };
        match self.call(plan, Call::Unary(call)).await? {
            Reply::Unary(bytes) => A::decode(bytes).map_err(|error| Error::Protocol(error.to_string())),
            _ => Err(mismatched(plan.what)),
        }
    }

    /// The next number of a session, if one is given and has a place; else a fresh id.
    pub(crate) fn request_id_under(&self, session: Option<&Session>) -> Result<RequestId, Error> {
        session.and_then(Session::next_request).map_or_else(|| self.request_id(), |named| Ok(RequestId::Named(named)))
    }

    /// A fresh request id for a change: a number where the cluster is known to know series, else a one-shot id. It is kept until the call is over.
    pub(crate) fn request_id(&self) -> Result<RequestId, Error> {
        self.id_among(&self.inner.numbers)
    }

    /// The same for a change that may wait for others: while it does, only answers to the next few of its kind are kept with it.
    pub(crate) fn wait_id(&self) -> Result<RequestId, Error> {
        self.id_among(&self.inner.waits)
    }

    fn id_among(&self, numbers: &requests::Numbers) -> Result<RequestId, Error> {
        if self.inner.pipeline.behaviour() < SERIES {
            return one_shot().map(RequestId::OneShot);
        }
        numbers.next().map(RequestId::Numbered).map_err(no_randomness)
    }

    /// Carries a change out, by the path of its method, under an id that is given here: that of `request` is empty.
    pub(crate) async fn change<Q: Message, A: Message + Default>(
        &self,
        plan: Plan,
        method: &'static str,
        request: &Q,
    ) -> Result<A, Error> {
        self.change_as(&self.request_id()?, plan, method, request).await
    }

    /// The same under an id of the caller, who keeps it until the call is over.
    pub(crate) async fn change_as<Q: Message, A: Message + Default>(
        &self,
        id: &RequestId,
        plan: Plan,
        method: &'static str,
        request: &Q,
    ) -> Result<A, Error> {
        let mut body = request.encode_to_vec();
        // Every request of a change has its id in this field; a test of the definitions holds it.
        prost::encoding::message::encode(REQUEST_FIELD, &id.meta(), &mut body);
        self.by_path(plan, method, body).await
    }

    /// A plan for a call that may rightly take `wait` more than the usual time.
    pub(crate) fn patient_plan(&self, what: &'static str, wait: Duration) -> Plan {
        Plan { until: Instant::now() + wait + self.timeout(), try_timeout: None, ..self.plan(what, true) }
    }

    /// A plan with the client's own timeout.
    pub(crate) fn plan(&self, what: &'static str, changes: bool) -> Plan {
        let timeout = self.inner.options.timeout;
        Plan { what, changes, until: Instant::now() + timeout, try_timeout: Some(third(timeout)) }
    }

    /// Asks each endpoint in turn until one answers, first the one that did last; for calls that only read.
    pub(crate) async fn read<T, F, Fut>(&self, mut ask: F) -> Result<T, Error>
    where
        F: FnMut(Channel) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let until = Instant::now() + self.inner.options.timeout;
        let mut pause = BACKOFF_MIN;
        loop {
            let mut last = Error::Unavailable { why: "no answer in time".to_owned() };
            for (number, channel) in self.channels_in_turn() {
                match timeout_at(until.min(Instant::now() + self.share()), ask(channel)).await {
                    Ok(Ok(response)) => {
                        self.served_by(number);
                        return Ok(response.into_inner());
                    }
                    Ok(Err(status)) => last = of_read(&status),
                    Err(_) if Instant::now() >= until => return Err(last),
                    Err(_) => last = Error::Unavailable { why: "no answer in time".to_owned() },
                }
                let elsewhere = matches!(&last, Error::Unavailable { .. }) || last.code() == Some(Code::NoQuorum);
                if !elsewhere {
                    self.served_by(number);
                    return Err(last);
                }
            }
            if Instant::now() + pause >= until {
                return Err(last);
            }
            sleep(pause).await;
            pause = (pause * 2).min(BACKOFF_MAX);
        }
    }

    pub(crate) fn locks(&self, channel: Channel) -> v1::locks_client::LocksClient<Channel> {
        v1::locks_client::LocksClient::new(channel).max_decoding_message_size(RECEIVE_BYTES)
    }

    pub(crate) fn counters_of(&self, channel: Channel) -> v1::counters_client::CountersClient<Channel> {
        v1::counters_client::CountersClient::new(channel).max_decoding_message_size(RECEIVE_BYTES)
    }

    pub(crate) fn elections_of(&self, channel: Channel) -> v1::elections_client::ElectionsClient<Channel> {
        v1::elections_client::ElectionsClient::new(channel).max_decoding_message_size(RECEIVE_BYTES)
    }

    pub(crate) fn sequences_of(&self, channel: Channel) -> v1::sequences_client::SequencesClient<Channel> {
        v1::sequences_client::SequencesClient::new(channel).max_decoding_message_size(RECEIVE_BYTES)
    }

    pub(crate) fn sessions(&self, channel: Channel) -> v1::sessions_client::SessionsClient<Channel> {
        v1::sessions_client::SessionsClient::new(channel).max_decoding_message_size(RECEIVE_BYTES)
    }
}

/// Three tries fit, so that one silent member does not use up the time of all.
fn third(timeout: Duration) -> Duration {
    (timeout / 3).max(Duration::from_millis(300))
}

/// How a call is tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// The name of the call, for errors.
    pub(crate) what: &'static str,
    /// It changes something, so a lost answer leaves its outcome unknown.
    pub(crate) changes: bool,
    pub(crate) until: Instant,
    /// How long one try may go unanswered; `None` where the answer may rightly take all the time.
    pub(crate) try_timeout: Option<Duration>,
}

/// What the tries of one call have shown so far.
struct Tries {
    plan: Plan,
    /// A try was sent and not answered, or answered as unknown: it may have happened.
    sent: bool,
    /// A server said that it cannot take it now.
    refused: bool,
    why: String,
    pause: Duration,
}

impl Tries {
    fn lost(&mut self, why: String) {
        self.sent = true;
        self.why = why;
    }

    /// Refusals that say nothing about the request itself, only about the moment.
    fn again_after_refusal(&mut self, problem: &Problem) -> bool {
        if problem.code != Code::NoQuorum {
            return false;
        }
        self.refused = true;
        self.sent |= problem.outcome == Outcome::Unknown;
        self.why = problem.message.clone();
        true
    }

    /// The server judged this try. An earlier one under the same id would have been answered from memory, so the judgement holds for
    /// all of them, except where the memory itself is gone.
    fn refused(&self, mut problem: Problem) -> Error {
        if self.sent && self.plan.changes && tells_nothing_of_earlier_tries(problem.code) {
            problem.outcome = Outcome::Unknown;
        }
        Error::Refused(Box::new(problem))
    }

    fn failed(self) -> Error {
        let request = self.plan.what;
        if self.sent && self.plan.changes {
            Error::Unknown { request, why: self.why }
        } else if self.refused {
            Error::NotApplied { request, why: self.why }
        } else {
            Error::Unavailable { why: self.why }
        }
    }

    fn next_pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(BACKOFF_MAX);
        // Up to a quarter less, so that callers who failed together do not come back together.
        pause - pause / 4 * u32::from(requests::jitter()) / 255
    }
}

/// Refusals that a server may come to before it looks whether it knows the id, or after it has forgotten it.
pub(crate) fn tells_nothing_of_earlier_tries(code: Code) -> bool {
    matches!(code, Code::SessionExpired | Code::RateLimited | Code::Quota)
}

fn endpoint(text: &str, options: &ClientOptions) -> Result<Endpoint, Error> {
    let text = text.trim();
    if text.starts_with("https://") {
        return Err(Error::Invalid(format!("{text}: TLS is not supported by this version of the client")));
    }
    let bare = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let port = bare.rsplit_once(':').and_then(|(host, port)| port.parse::<u16>().ok().filter(|_| !host.is_empty()));
    if port.is_none() {
        return Err(Error::Invalid(format!("`{text}` is not an endpoint: write host:port, such as 127.0.0.1:2379")));
    }
    let endpoint = Endpoint::from_shared(format!("http://{bare}"))
        .map_err(|error| Error::Invalid(format!("`{text}` is not an endpoint: {error}")))?;
    Ok(endpoint
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        // A peer that vanished without a word is found out even while only a watch or a waiting lock is open.
        .http2_keep_alive_interval(Duration::from_secs(5))
        .keep_alive_timeout(Duration::from_secs(5))
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20))
}

/// Reads a list to its end. `page` gives what comes after a place, and the place after which the next page begins.
pub(crate) async fn all_pages<T, P, F, Fut>(mut page: F) -> Result<Vec<T>, Error>
where
    P: Clone + Default + PartialOrd,
    F: FnMut(P) -> Fut,
    Fut: Future<Output = Result<(Vec<T>, P), Error>>,
{
    let (mut all, mut after) = (Vec::new(), P::default());
    loop {
        let (part, next) = page(after.clone()).await?;
        all.extend(part);
        // An end that does not move on would be read forever.
        if next <= after {
            return Ok(all);
        }
        after = next;
    }
}

/// The id of a change, until the change is over.
pub(crate) enum RequestId {
    OneShot(v1::RequestMeta),
    Numbered(requests::Number),
    Named(NamedRequest),
}

impl RequestId {
    pub(crate) fn meta(&self) -> v1::RequestMeta {
        match self {
            Self::OneShot(meta) => meta.clone(),
            Self::Numbered(number) => number.meta(),
            Self::Named(named) => named.meta(),
        }
    }
}

fn no_randomness(error: getrandom::Error) -> Error {
    Error::Invalid(format!("no randomness for a request id: {error}"))
}

/// A fresh one-shot request id: the server keeps its answer for ten minutes.
fn one_shot() -> Result<v1::RequestMeta, Error> {
    let uuid = requests::uuid().map_err(no_randomness)?;
    Ok(v1::RequestMeta { id: Some(v1::request_meta::Id::UuidBytes(uuid.to_vec().into())) })
}

/// 32 random hexadecimal digits: a name that nobody else has.
pub(crate) fn drawn_name() -> Result<String, Error> {
    Ok(requests::uuid().map_err(no_randomness)?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The answer is not of the kind that the request asks for.
pub(crate) fn mismatched(what: &'static str) -> Error {
    Error::Protocol(format!("the answer to `{what}` is of another kind"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tries(changes: bool) -> Tries {
        let plan = Plan { what: "put", changes, until: Instant::now(), try_timeout: None };
        Tries { plan, sent: false, refused: false, why: "gone".to_owned(), pause: BACKOFF_MIN }
    }

    #[test]
    fn a_change_that_was_sent_and_not_answered_is_unknown_a_read_is_not() {
        let mut change = tries(true);
        assert!(matches!(tries(true).failed(), Error::Unavailable { .. }));
        change.lost("broken".into());
        assert!(matches!(change.failed(), Error::Unknown { request: "put", .. }));
        let mut read = tries(false);
        read.lost("broken".into());
        assert!(matches!(read.failed(), Error::Unavailable { .. }));
    }

    #[test]
    fn no_quorum_is_tried_again_and_told_as_not_applied_or_unknown() {
        let mut clear = tries(true);
        assert!(clear.again_after_refusal(&Problem { code: Code::NoQuorum, ..Problem::default() }));
        assert!(matches!(clear.failed(), Error::NotApplied { .. }));
        let mut unclear = tries(true);
        unclear.again_after_refusal(&Problem { code: Code::NoQuorum, outcome: Outcome::Unknown, ..Problem::default() });
        assert!(matches!(unclear.failed(), Error::Unknown { .. }));
        assert!(!tries(true).again_after_refusal(&Problem { code: Code::Held, ..Problem::default() }));
    }

    #[test]
    fn a_refusal_after_a_lost_try_holds_unless_the_memory_is_gone() {
        let mut change = tries(true);
        change.lost("broken".into());
        let fenced = change.refused(Problem { code: Code::Fenced, ..Problem::default() });
        assert_eq!(fenced.outcome(), Outcome::NotApplied);
        for code in [Code::SessionExpired, Code::RateLimited, Code::Quota] {
            let unclear = change.refused(Problem { code, ..Problem::default() });
            assert_eq!(unclear.outcome(), Outcome::Unknown, "{code}");
            let first = tries(true).refused(Problem { code, ..Problem::default() });
            assert_eq!(first.outcome(), Outcome::NotApplied, "{code}");
        }
    }

    #[test]
    fn endpoints_are_read_with_and_without_a_scheme() {
        let read = |text: &str| endpoint(text, &ClientOptions::default()).map(|endpoint| endpoint.uri().to_string());
        assert_eq!(read("127.0.0.1:2379").unwrap(), "http://127.0.0.1:2379/");
        assert_eq!(read(" http://localhost:1/ ").unwrap(), "http://localhost:1/");
        assert_eq!(read("[::1]:2379").unwrap(), "http://[::1]:2379/");
        for wrong in ["localhost", "", ":1", "a:b", "https://a:1", "a:99999"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
