//! Schedules: jobs that are enqueued by the calendar.
//!
//! Promises. K1: a tick is an instant of the calendar, and the commit that enqueues its job moves the last tick of the schedule to it: no tick is
//! done twice, whoever leads and however often it is proposed. K2: a schedule that was changed, paused or deleted does not take a tick that was
//! proposed before. K3: ticks during a pause are never made up for.
//! Not promised. What a calendar means: the leader reads it, by its wall clock, and proposes instants; here they are numbers that only rise. A leader
//! whose wall clock is ahead brings ticks forward, and none comes a second time when the clock is right again.
//! Relies on. `queues` for the job: without room in the queue the tick is refused as a whole, and is proposed again.

use crate::apply::{Commit, Machine, invalid};
use crate::coded::{coded_enum, coded_struct};
use crate::native::{Refusal, RefusalCode};
use crate::objects::{self, Lived, ObjectKey};
use crate::queues::{Dedup, DedupScope, Enqueued, NewJob, OnDuplicate, check_job, check_queue_name};
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::Waiter;
use std::sync::Arc;

/// Bytes of a calendar as it is written.
pub const CALENDAR_BYTES_MAX: usize = 255;
/// What an operation may add beside what it names.
const GROWTH: u64 = 512;
/// A header of each job: which schedule, and the tick in milliseconds since 1970.
const SCHEDULE_HEADER: &str = "tenure-schedule";
const TICK_HEADER: &str = "tenure-tick-ms";

coded_enum! {
    /// What becomes of ticks that nobody could do in time, such as during an outage.
    #[derive(Copy, Eq)]
    pub enum Missed as "a rule for missed ticks" {
        /// They are left out.
        Skip = 1,
        /// The last of them is done, late.
        RunOnce = 2,
    }
}

coded_struct! {
    /// What to enqueue where, and when.
    pub struct SchedulePlan as "a plan" {
        /// As it was written; read by the leader only.
        pub calendar: Box<str>,
        pub queue: Box<[u8]>,
        pub job: NewJob,
        pub missed: Missed,
        /// No job while the one before is not done.
        pub no_overlap: bool,
    }
}

coded_struct! {
    /// A schedule. Instants are milliseconds since 1970 of the leader's wall clock.
    pub struct Schedule as "a schedule" {
        pub plan: Arc<SchedulePlan>,
        pub paused: bool,
        /// The commit that put, paused or resumed it.
        pub changed: Revision,
        /// The newest tick that was done or left out. Never goes back.
        pub last: u64,
        /// The tick to come, as whoever moved it last read the calendar; `None`: the leader is to begin from now.
        pub next: Option<u64>,
        /// Jobs that it has enqueued.
        pub enqueued: u64,
        /// The newest of them.
        pub job: Option<Enqueued>,
    }
}

impl Lived for Schedule {
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        self.plan.bytes()
    }
}

impl SchedulePlan {
    fn bytes(&self) -> u64 {
        self.job.growth() + (self.queue.len() + self.calendar.len()) as u64
    }
}

coded_enum! {
    /// What is asked of a schedule.
    pub enum ScheduleOp as "a schedule operation" {
        Put(SchedulePut) = 1,
        Delete(ScheduleName) = 2,
        Pause(ScheduleName) = 3,
        Resume(ScheduleName) = 4,
        /// Enqueues the job now, beside the calendar.
        Run(ScheduleName) = 5,
        /// By the leader: an instant of the calendar has come.
        Tick(ScheduleTick) = 6,
    }
}

coded_struct! {
    pub struct SchedulePut as "a new schedule" {
        pub name: Box<[u8]>,
        pub plan: SchedulePlan,
    }
}

coded_struct! {
    #[derive(Eq)]
    pub struct ScheduleName as "the name of a schedule" {
        pub name: Box<[u8]>,
    }
}

coded_struct! {
    #[derive(Eq)]
    pub struct ScheduleTick as "a tick" {
        pub name: Box<[u8]>,
        /// Of the schedule that was read.
        pub changed: Revision,
        pub at: u64,
        /// Otherwise it is left out, or is the moment from which the calendar counts.
        pub run: bool,
        /// The tick behind it.
        pub next: u64,
    }
}

coded_enum! {
    /// What came of it.
    pub enum ScheduleReply as "a schedule answer" {
        /// Whether it is new.
        Stored(bool) = 1,
        /// Whether there was one.
        Deleted(bool) = 2,
        /// It is as was asked for.
        Done = 3,
        Ran(Enqueued) = 4,
        /// Whether the schedule took the tick.
        Ticked(bool) = 5,
    }
}

impl ScheduleOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        match self {
            Self::Put(put) => GROWTH + put.name.len() as u64 + put.plan.bytes(),
            // The job shares its payload with the schedule.
            Self::Run(_) | Self::Tick(_) => GROWTH,
            Self::Delete(_) | Self::Pause(_) | Self::Resume(_) => 0,
        }
    }

    /// Nobody waits for a schedule.
    pub(crate) fn wait_over(&self, _: &Machine, _: &Waiter) -> Option<Result<OpReply, Rejection>> {
        None
    }
}

impl Commit<'_> {
    pub(crate) fn schedule_op(&mut self, op: &ScheduleOp) -> Result<OpReply, Rejection> {
        let reply = match op {
            ScheduleOp::Put(put) => self.schedule_put(put),
            ScheduleOp::Delete(ScheduleName { name }) => Ok(self.schedule_delete(name)),
            ScheduleOp::Pause(ScheduleName { name }) => self.schedule_pause(name, true),
            ScheduleOp::Resume(ScheduleName { name }) => self.schedule_pause(name, false),
            ScheduleOp::Run(ScheduleName { name }) => self.schedule_run(name),
            ScheduleOp::Tick(tick) => self.schedule_tick(tick),
        };
        reply.map(Into::into)
    }

    fn schedule_put(&mut self, put: &SchedulePut) -> Result<ScheduleReply, Rejection> {
        objects::check_name("a schedule", &put.name)?;
        if put.plan.calendar.is_empty() || put.plan.calendar.len() > CALENDAR_BYTES_MAX {
            return Err(invalid(format!("a calendar has 1 to {CALENDAR_BYTES_MAX} bytes")));
        }
        check_queue_name(&put.plan.queue)?;
        check_job(&put.plan.job)?;
        let key = self.object_key::<Schedule>(&put.name);
        let found = self.object::<Schedule>(&key).cloned();
        let plan = Arc::new(put.plan.clone());
        let schedule = match &found {
            None => Schedule { plan, paused: false, changed: self.at, last: 0, next: None, enqueued: 0, job: None },
            Some(old) if old.plan == plan => return Ok(ScheduleReply::Stored(false)),
            Some(old) => {
                // The same calendar goes on where it is; another one begins from now.
                let next = old.next.filter(|_| old.plan.calendar == plan.calendar);
                Schedule { plan, changed: self.at, next, ..old.clone() }
            }
        };
        self.put_object(&key, schedule);
        Ok(ScheduleReply::Stored(found.is_none()))
    }

    fn schedule_delete(&mut self, name: &[u8]) -> ScheduleReply {
        let key = self.object_key::<Schedule>(name);
        let found = self.object::<Schedule>(&key).is_some();
        self.remove_object(&key);
        ScheduleReply::Deleted(found)
    }

    fn schedule_pause(&mut self, name: &[u8], paused: bool) -> Result<ScheduleReply, Rejection> {
        let (key, schedule) = self.schedule(name)?;
        if schedule.paused != paused {
            self.put_object(&key, Schedule { paused, changed: self.at, next: None, ..schedule });
        }
        Ok(ScheduleReply::Done)
    }

    fn schedule_run(&mut self, name: &[u8]) -> Result<ScheduleReply, Rejection> {
        let (key, schedule) = self.schedule(name)?;
        let job = self.enqueue_scheduled(&key, &schedule.plan, None)?;
        self.put_object(
            &key,
            Schedule { enqueued: schedule.enqueued + u64::from(!job.duplicate), job: Some(job.clone()), ..schedule },
        );
        Ok(ScheduleReply::Ran(job))
    }

    fn schedule_tick(&mut self, tick: &ScheduleTick) -> Result<ScheduleReply, Rejection> {
        let key = self.object_key::<Schedule>(&tick.name);
        let Some(schedule) = self.object::<Schedule>(&key).cloned() else { return Ok(ScheduleReply::Ticked(false)) };
        // Who proposed it may have lost the lead since, and another may have done the tick.
        let is_news = if tick.run { tick.at > schedule.last } else { tick.at >= schedule.last };
        if schedule.changed != tick.changed || schedule.paused || !is_news || tick.next <= tick.at {
            return Ok(ScheduleReply::Ticked(false));
        }
        let moved = Schedule { last: tick.at, next: Some(tick.next), ..schedule };
        let schedule = if tick.run {
            let job = self.enqueue_scheduled(&key, &moved.plan, Some(tick.at))?;
            Schedule { enqueued: moved.enqueued + u64::from(!job.duplicate), job: Some(job), ..moved }
        } else {
            moved
        };
        self.put_object(&key, schedule);
        Ok(ScheduleReply::Ticked(true))
    }

    fn enqueue_scheduled(
        &mut self,
        key: &ObjectKey,
        plan: &SchedulePlan,
        tick: Option<u64>,
    ) -> Result<Enqueued, Rejection> {
        let name = String::from_utf8_lossy(key.name());
        let mut terms = plan.job.terms.as_deref().cloned().unwrap_or_default();
        terms.headers.push((SCHEDULE_HEADER.into(), name.as_ref().into()));
        terms.headers.extend(tick.map(|tick| (TICK_HEADER.into(), tick.to_string().into())));
        if plan.no_overlap {
            let of_schedule = [b"schedule:", key.name()].concat();
            terms.dedup = Some(Dedup { key: of_schedule.into(), scope: DedupScope::UntilDone });
        }
        let job =
            NewJob { terms: Some(Arc::new(terms)), on_duplicate: OnDuplicate::ReturnExisting, ..plan.job.clone() };
        self.enqueue_job(&plan.queue, &job)
    }

    fn schedule(&self, name: &[u8]) -> Result<(ObjectKey, Schedule), Rejection> {
        let key = self.object_key::<Schedule>(name);
        match self.object::<Schedule>(&key) {
            Some(schedule) => Ok((key.clone(), schedule.clone())),
            None => {
                let name = name.escape_ascii();
                let why = format!("there is no schedule `{name}`");
                Err(Refusal::new(RefusalCode::NotFound, why).fact("name", name).into())
            }
        }
    }
}

/// A schedule whose next tick has come, for whoever leads.
#[derive(Clone, Debug, PartialEq)]
pub struct DueSchedule {
    pub namespace: NamespaceId,
    pub name: Box<[u8]>,
    pub schedule: Schedule,
}

impl Machine {
    /// Up to `max` schedules that a tick is due for at this instant of the wall clock, or that are to begin.
    pub fn due_schedules(&self, now: u64, max: usize) -> Vec<DueSchedule> {
        let of = |namespace| {
            let all = self.objects.list::<Schedule>(namespace, b"", None);
            all.filter(|(_, schedule)| !schedule.paused && schedule.next.is_none_or(|next| next <= now)).map(
                move |(key, schedule)| DueSchedule { namespace, name: key.name().into(), schedule: schedule.clone() },
            )
        };
        of(NamespaceId::DEFAULT).take(max).collect()
    }
}
