//! Schedules: jobs that are enqueued by the calendar.
//!
//! Promises. A change happens at most once, however often its answer is lost. No tick is done twice, whoever leads.
//! Not promised. That a tick is on time: the leader reads the calendar by its wall clock, and after an outage what is late is left out unless
//! [`PutSchedule::run_last_missed`] asks for the last of it.

use std::future::IntoFuture;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tenure_wire::tenure::v1;
use tenure_wire::tenure::v1::schedule_expect::Fact;
use tonic::transport::Channel;

use crate::client::Client;
use crate::error::{Code, Error};
use crate::kv::Answering;
use crate::pipeline::RECEIVE_BYTES;
use crate::queue::{Enqueued, NewJob};

impl Client {
    /// The schedule of this name.
    ///
    /// ```no_run
    /// # async fn example(client: tenure_client::Client) -> Result<(), tenure_client::Error> {
    /// let nightly = client.schedule("reports/nightly");
    /// let stored = nightly.put("0 3 * * *", "reports", "full").zone("Europe/Berlin").run_last_missed().no_overlap().await?;
    /// println!("first at {:?}", stored.next.first());
    /// // Whoever works on the queue does not see where a job comes from, but for its headers.
    /// for job in client.queue("reports").receive().await? {
    ///     println!("the report of {:?}", job.headers().get("tenure-tick-ms"));
    ///     job.ack().await?;
    /// }
    /// nightly.pause().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn schedule(&self, name: impl Into<String>) -> Schedule {
        Schedule { client: self.clone(), name: name.into() }
    }

    /// Every schedule whose name begins with `prefix`, by name, each with its next tick. A payload above 1,024 bytes is left out.
    ///
    /// # Errors
    /// As every read.
    pub async fn schedules(&self, prefix: &str) -> Result<Vec<ScheduleInfo>, Error> {
        let mut all = Vec::new();
        let (prefix, namespace) = (prefix.to_owned(), self.namespace());
        let mut request = v1::ScheduleListRequest { prefix, limit: 1_000, namespace, ..Default::default() };
        loop {
            let reply = self
                .read(|channel| {
                    let (mut schedules, request) = (schedules_of(channel), request.clone());
                    async move { schedules.list(request).await }
                })
                .await?;
            all.extend(reply.schedules.into_iter().map(ScheduleInfo::from));
            // An end that does not move on would be read forever.
            if reply.next <= request.after {
                return Ok(all);
            }
            request.after = reply.next;
        }
    }
}

fn schedules_of(channel: Channel) -> v1::schedules_client::SchedulesClient<Channel> {
    v1::schedules_client::SchedulesClient::new(channel).max_decoding_message_size(RECEIVE_BYTES)
}

fn instant(unix_ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(unix_ms)
}

/// A schedule as it was at one moment. Instants are of the servers' wall clocks.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ScheduleInfo {
    /// Its name.
    pub name: String,
    /// Five fields, a name such as `@daily`, or `@every 90s`.
    pub calendar: String,
    /// The IANA name of its time zone; empty is UTC.
    pub time_zone: String,
    /// Where its jobs go.
    pub queue: String,
    /// The payload of its jobs.
    pub payload: Vec<u8>,
    /// After an outage the last of the missed ticks is done, late.
    pub run_last_missed: bool,
    /// How late a tick may be and still count as in time.
    pub grace: Duration,
    /// No job while the one before is not done.
    pub no_overlap: bool,
    /// Its calendar is stopped.
    pub paused: bool,
    /// The commit that put, paused or resumed it.
    pub revision: u64,
    /// The newest tick that was done or left out, or the moment from which the calendar began to count.
    pub last: Option<SystemTime>,
    /// The ticks to come, up to five; the first of them may be late.
    pub next: Vec<SystemTime>,
    /// How late the first of them is; zero up to a second.
    pub late: Duration,
    /// Jobs that it has enqueued.
    pub enqueued: u64,
    /// The newest of them.
    pub job: Option<String>,
    /// The tick that the queue did not take, and why, until a later one was taken.
    pub refused: Option<(SystemTime, String)>,
}

impl From<v1::Schedule> for ScheduleInfo {
    fn from(schedule: v1::Schedule) -> Self {
        let job = schedule.job.unwrap_or_default();
        let payload = if job.payload.is_empty() { job.payload_bytes.to_vec() } else { job.payload.into_bytes() };
        let refused = (!schedule.last_error.is_empty())
            .then(|| (instant(schedule.last_error_unix_ms), schedule.last_error.clone()));
        Self {
            name: schedule.name,
            calendar: schedule.calendar,
            time_zone: schedule.time_zone,
            queue: schedule.queue,
            payload,
            run_last_missed: schedule.missed == v1::MissedTicks::RunLastMissed as i32,
            grace: Duration::from_millis(schedule.grace_ms),
            no_overlap: schedule.no_overlap,
            paused: schedule.paused,
            revision: schedule.revision,
            last: (schedule.last_unix_ms > 0).then(|| instant(schedule.last_unix_ms)),
            next: schedule.next_unix_ms.into_iter().map(instant).collect(),
            late: Duration::from_millis(schedule.late_ms),
            enqueued: schedule.enqueued,
            job: (!schedule.job_id.is_empty()).then_some(schedule.job_id),
            refused,
        }
    }
}

/// What a put of a schedule gave.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ScheduleStored {
    /// There was none before.
    pub created: bool,
    /// Of its last change, for [`PutSchedule::if_revision`].
    pub revision: u64,
    /// The next five instants of the calendar.
    pub next: Vec<SystemTime>,
}

impl From<v1::SchedulePutReply> for ScheduleStored {
    fn from(reply: v1::SchedulePutReply) -> Self {
        let next = reply.next_unix_ms.into_iter().map(instant).collect();
        Self { created: reply.created, revision: reply.revision, next }
    }
}

/// A schedule by its name; see [`Client::schedule`].
#[derive(Clone, Debug)]
pub struct Schedule {
    client: Client,
    name: String,
}

impl Schedule {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Creates the schedule or changes it: by this calendar, such as `0 3 * * *`, `@hourly` or `@every 90s`, a job is enqueued on the queue. One that is
    /// equal stays as it is; one that is paused stays paused.
    #[must_use = "nothing is put before .await"]
    pub fn put(
        &self,
        calendar: impl Into<String>,
        queue: impl Into<String>,
        job: impl Into<NewJob>,
    ) -> PutSchedule<'_> {
        let request = v1::SchedulePutRequest {
            name: self.name.clone(),
            calendar: calendar.into(),
            queue: queue.into(),
            job: Some(job.into().0),
            namespace: self.client.namespace(),
            ..Default::default()
        };
        PutSchedule { schedule: self, request }
    }

    /// Reads it, with its next five ticks; `None`: there is none.
    ///
    /// # Errors
    /// As every read.
    pub async fn get(&self) -> Result<Option<ScheduleInfo>, Error> {
        let (name, namespace) = (self.name.clone(), self.client.namespace());
        let request = v1::ScheduleGetRequest { name, namespace, ..Default::default() };
        let read = self.client.read(|channel| {
            let (mut schedules, request) = (schedules_of(channel), request.clone());
            async move { schedules.get(request).await }
        });
        match read.await {
            Ok(reply) => Ok(reply.schedule.map(ScheduleInfo::from)),
            Err(error) if error.code() == Some(Code::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Stops its calendar. Ticks that pass meanwhile are never made up for.
    ///
    /// # Errors
    /// NOT_FOUND, else as every change.
    pub async fn pause(&self) -> Result<(), Error> {
        let (name, namespace) = (self.name.clone(), self.client.namespace());
        let request = v1::SchedulePauseRequest { name, namespace, request: None };
        let plan = self.client.plan("schedule pause", true);
        let _: v1::SchedulePauseReply = self.client.change(plan, "/tenure.v1.Schedules/Pause", &request).await?;
        Ok(())
    }

    /// Lets its calendar go on from now.
    ///
    /// # Errors
    /// NOT_FOUND, else as every change.
    pub async fn resume(&self) -> Result<(), Error> {
        let (name, namespace) = (self.name.clone(), self.client.namespace());
        let request = v1::ScheduleResumeRequest { name, namespace, request: None };
        let plan = self.client.plan("schedule resume", true);
        let _: v1::ScheduleResumeReply = self.client.change(plan, "/tenure.v1.Schedules/Resume", &request).await?;
        Ok(())
    }

    /// Enqueues its job now, beside the calendar. One without overlap may answer with the job that is there.
    ///
    /// # Errors
    /// NOT_FOUND, QUOTA where the queue has all the jobs it may have, else as every change.
    pub async fn run(&self) -> Result<Enqueued, Error> {
        let (name, namespace) = (self.name.clone(), self.client.namespace());
        let request = v1::ScheduleRunRequest { name, namespace, request: None };
        let plan = self.client.plan("schedule run", true);
        let reply: v1::ScheduleRunReply = self.client.change(plan, "/tenure.v1.Schedules/Run", &request).await?;
        let job = reply.job.ok_or_else(|| Error::Protocol("an answer without the job".to_owned()))?;
        Ok(Enqueued { id: job.id, duplicate: job.duplicate })
    }

    /// Deletes the schedule; `false`: there was none. Jobs that it has enqueued stay.
    ///
    /// # Errors
    /// As every change.
    pub async fn delete(&self) -> Result<bool, Error> {
        let (name, namespace) = (self.name.clone(), self.client.namespace());
        let request = v1::ScheduleDeleteRequest { name, namespace, request: None };
        let plan = self.client.plan("schedule delete", true);
        let reply: v1::ScheduleDeleteReply = self.client.change(plan, "/tenure.v1.Schedules/Delete", &request).await?;
        Ok(reply.deleted)
    }
}

/// A schedule to be put; await it. Refused with [`Code::Invalid`] where the calendar cannot be read or never comes, and with [`Code::Conflict`] where
/// the schedule is not as expected.
#[derive(Clone, Debug)]
pub struct PutSchedule<'a> {
    schedule: &'a Schedule,
    request: v1::SchedulePutRequest,
}

impl<'a> PutSchedule<'a> {
    /// The time zone in which the calendar is read, such as `Europe/Berlin`, in place of UTC.
    #[must_use]
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.request.time_zone = zone.into();
        self
    }

    /// Of the ticks that nobody could do in time, such as during an outage, the last is done late; else they are left out.
    #[must_use]
    pub fn run_last_missed(mut self) -> Self {
        self.request.missed = v1::MissedTicks::RunLastMissed.into();
        self
    }

    /// How late a tick may be and still count as in time, in place of a minute; at most a day.
    #[must_use]
    pub fn grace(mut self, grace: Duration) -> Self {
        self.request.grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// A tick enqueues nothing while the job before is not done.
    #[must_use]
    pub fn no_overlap(mut self) -> Self {
        self.request.no_overlap = true;
        self
    }

    /// Only if there is no such schedule.
    #[must_use]
    pub fn if_absent(self) -> Self {
        self.expect(Fact::Absent(true))
    }

    /// Only if this was its last change.
    #[must_use]
    pub fn if_revision(self, revision: u64) -> Self {
        self.expect(Fact::Revision(revision))
    }

    fn expect(mut self, fact: Fact) -> Self {
        self.request.expect = Some(v1::ScheduleExpect { fact: Some(fact) });
        self
    }

    async fn run(self) -> Result<ScheduleStored, Error> {
        let client = &self.schedule.client;
        let plan = client.plan("schedule put", true);
        let reply: v1::SchedulePutReply = client.change(plan, "/tenure.v1.Schedules/Put", &self.request).await?;
        Ok(reply.into())
    }

    pub(crate) fn into_wire(self) -> v1::SchedulePutRequest {
        self.request
    }
}

impl<'a> IntoFuture for PutSchedule<'a> {
    type Output = Result<ScheduleStored, Error>;
    type IntoFuture = Answering<'a, ScheduleStored>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.run())
    }
}
