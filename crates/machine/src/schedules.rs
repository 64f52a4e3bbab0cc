//! Schedules: jobs that are enqueued by the calendar.
//!
//! Promises. K1: a tick is an instant of the calendar, and the commit that enqueues its job moves the last tick of the schedule to it: no tick is
//! done twice, whoever leads and however often it is proposed. K2: a schedule that was changed, paused or deleted does not take a tick that was
//! proposed before. K3: ticks during a pause are never made up for. K4: a tick whose job the queue does not take stays to come, and the schedule tells
//! why; what a schedule's jobs are with all that a tick adds is within the limits of jobs, or the schedule is refused.
//! Not promised. What a calendar means: the leader reads it, by its wall clock, and proposes instants; here they are numbers that only rise. A leader
//! whose wall clock is ahead brings ticks forward, and none comes a second time when the clock is right again.
//! Relies on. `queues` for the job: it takes the job whole or changes nothing but for a queue that it makes.

use crate::apply::{Commit, Machine, invalid};
use crate::coded::{coded_enum, coded_struct};
use crate::native::{NativeOp, Refusal, RefusalCode};
use crate::objects::{self, Indexes, Lived, ObjectKey};
use crate::queues::{Dedup, DedupScope, Enqueued, NewJob, OnDuplicate, check_job, check_queue_name};
use crate::reply::{OpReply, Rejection};
use crate::types::*;
use crate::waits::Waiter;
use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;

/// Bytes of the name of a schedule, which is part of a key that keeps its jobs from overlapping.
pub const SCHEDULE_NAME_MAX: usize = 240;
/// Bytes of a calendar as it is written, and of the name of a time zone.
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
        /// In which it is read; empty is UTC.
        pub zone: Box<str>,
        pub queue: Box<[u8]>,
        pub job: NewJob,
        pub missed: Missed,
        /// A tick that is up to this late is not missed. Looked at by the leader only.
        pub grace_ms: u64,
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
        /// The newest tick that the queue did not take, until one is taken.
        pub trouble: Option<Trouble>,
    }
}

coded_struct! {
    #[derive(Eq)]
    pub struct Trouble as "a refused tick" {
        /// The tick.
        pub at: u64,
        pub why: Box<str>,
    }
}

impl Lived for Schedule {
    const WATCHED: bool = false;

    fn bytes(&self) -> u64 {
        self.plan.bytes() + self.trouble.as_ref().map_or(0, |trouble| trouble.why.len() as u64)
    }

    fn note(indexes: &mut Indexes, key: &ObjectKey, old: Option<&Self>, new: Option<&Self>) {
        indexes.schedules.note(key, old, new);
    }
}

impl Schedule {
    /// When the leader is to look at it: at once (0), or at its next tick.
    fn due(&self) -> Option<u64> {
        (!self.paused).then(|| self.next.unwrap_or(0))
    }
}

/// What follows from the table: schedules by when they are due.
#[derive(Default)]
pub(crate) struct Index {
    due: BTreeSet<(u64, ObjectKey)>,
}

impl Index {
    fn note(&mut self, key: &ObjectKey, old: Option<&Schedule>, new: Option<&Schedule>) {
        let (old, new) = (old.and_then(Schedule::due), new.and_then(Schedule::due));
        if old == new {
            return;
        }
        if let Some(due) = old {
            self.due.remove(&(due, key.clone()));
        }
        if let Some(due) = new {
            self.due.insert((due, key.clone()));
        }
    }
}

impl SchedulePlan {
    fn bytes(&self) -> u64 {
        self.job.growth() + (self.queue.len() + self.calendar.len() + self.zone.len()) as u64
    }

    /// The job of a tick, or of a run beside the calendar.
    fn job_of(&self, name: &[u8], tick: Option<u64>) -> NewJob {
        let mut terms = self.job.terms.as_deref().cloned().unwrap_or_default();
        terms.headers.push((SCHEDULE_HEADER.into(), String::from_utf8_lossy(name).into()));
        terms.headers.extend(tick.map(|tick| (TICK_HEADER.into(), tick.to_string().into())));
        if self.no_overlap {
            let of_schedule = [b"schedule:", name].concat();
            terms.dedup = Some(Dedup { key: of_schedule.into(), scope: DedupScope::UntilDone });
        }
        NewJob { terms: Some(Arc::new(terms)), on_duplicate: OnDuplicate::ReturnExisting, ..self.job.clone() }
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
        /// Refused unless this was its last change; 0: unless there is none.
        pub expect: Option<Revision>,
    }
}

coded_struct! {
    #[derive(Eq)]
    pub struct ScheduleName as "the name of a schedule" {
        pub name: Box<[u8]>,
    }
}

coded_struct! {
    /// A schedule by its last change.
    #[derive(Eq)]
    pub struct ScheduleAt as "a schedule by its last change" {
        pub name: Box<[u8]>,
        /// 0: there is none.
        pub changed: Revision,
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
        Stored(ScheduleStored) = 1,
        /// Whether there was one.
        Deleted(bool) = 2,
        /// It is as was asked for, since this commit.
        Done(Revision) = 3,
        Ran(Enqueued) = 4,
        Ticked(Ticked) = 5,
    }
}

coded_struct! {
    #[derive(Copy, Eq)]
    pub struct ScheduleStored as "a stored schedule" {
        /// Whether it is new.
        pub created: bool,
        /// The commit of its last change.
        pub changed: Revision,
    }
}

coded_enum! {
    /// What became of a tick.
    #[derive(Eq)]
    pub enum Ticked as "what became of a tick" {
        /// It was of an earlier plan, or is done already.
        Stale = 1,
        /// Done, or left out as was proposed.
        Taken = 2,
        /// The queue did not take the job; the tick is still to come.
        Refused(Box<str>) = 3,
    }
}

impl ScheduleOp {
    /// An upper bound of the bytes that it adds; zero for what takes away.
    pub(crate) fn growth(&self) -> u64 {
        match self {
            Self::Put(put) => GROWTH + put.name.len() as u64 + put.plan.bytes(),
            // And the job, which the state knows: see `scheduled_growth`.
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
            ScheduleOp::Tick(tick) => Ok(ScheduleReply::Ticked(self.schedule_tick(tick))),
        };
        reply.map(Into::into)
    }

    fn schedule_put(&mut self, put: &SchedulePut) -> Result<ScheduleReply, Rejection> {
        check_put(put)?;
        let key = self.object_key::<Schedule>(&put.name);
        let found = self.object::<Schedule>(&key).cloned();
        put.expect.map_or(Ok(()), |expect| check_expected(&put.name, expect, found.as_ref()))?;
        let plan = Arc::new(put.plan.clone());
        let created = found.is_none();
        let (next, changed) = (None, self.at);
        let schedule = match found {
            None => Schedule { plan, paused: false, changed, last: 0, next, enqueued: 0, job: None, trouble: None },
            Some(old) if old.plan == plan => {
                return Ok(ScheduleReply::Stored(ScheduleStored { created, changed: old.changed }));
            }
            Some(old) => {
                // The same calendar goes on where it is; another one begins from now.
                let same = (&old.plan.calendar, &old.plan.zone) == (&plan.calendar, &plan.zone);
                Schedule { plan, changed, next: old.next.filter(|_| same), trouble: None, ..old }
            }
        };
        self.put_object(&key, schedule);
        Ok(ScheduleReply::Stored(ScheduleStored { created, changed }))
    }

    fn schedule_delete(&mut self, name: &[u8]) -> ScheduleReply {
        let key = self.object_key::<Schedule>(name);
        let found = self.object::<Schedule>(&key).is_some();
        self.remove_object(&key);
        ScheduleReply::Deleted(found)
    }

    fn schedule_pause(&mut self, name: &[u8], paused: bool) -> Result<ScheduleReply, Rejection> {
        let (key, schedule) = self.schedule(name)?;
        if schedule.paused == paused {
            return Ok(ScheduleReply::Done(schedule.changed));
        }
        self.put_object(&key, Schedule { paused, changed: self.at, next: None, ..schedule });
        Ok(ScheduleReply::Done(self.at))
    }

    fn schedule_run(&mut self, name: &[u8]) -> Result<ScheduleReply, Rejection> {
        let (key, schedule) = self.schedule(name)?;
        let job = self.enqueue_job(&schedule.plan.queue, &schedule.plan.job_of(name, None))?;
        self.put_object(
            &key,
            Schedule { enqueued: schedule.enqueued + u64::from(!job.duplicate), job: Some(job.clone()), ..schedule },
        );
        Ok(ScheduleReply::Ran(job))
    }

    fn schedule_tick(&mut self, tick: &ScheduleTick) -> Ticked {
        let key = self.object_key::<Schedule>(&tick.name);
        let Some(schedule) = self.object::<Schedule>(&key).cloned() else { return Ticked::Stale };
        // Who proposed it may have lost the lead since, and another may have done the tick.
        let is_news = if tick.run { tick.at > schedule.last } else { tick.at >= schedule.last };
        if schedule.changed != tick.changed || schedule.paused || !is_news || tick.next <= tick.at {
            return Ticked::Stale;
        }
        let plan = schedule.plan.clone();
        let moved = Schedule { last: tick.at, next: Some(tick.next), ..schedule.clone() };
        let moved = match tick.run.then(|| self.enqueue_job(&plan.queue, &plan.job_of(&tick.name, Some(tick.at)))) {
            None => moved,
            Some(Ok(job)) => {
                let enqueued = moved.enqueued + u64::from(!job.duplicate);
                Schedule { enqueued, job: Some(job), trouble: None, ..moved }
            }
            Some(Err(why)) => {
                let why: Box<str> = why.to_string().into();
                let trouble = Some(Trouble { at: tick.at, why: why.clone() });
                // Said once, however often it is proposed again.
                if schedule.trouble != trouble {
                    self.put_object(&key, Schedule { trouble, ..schedule });
                }
                return Ticked::Refused(why);
            }
        };
        self.put_object(&key, moved);
        Ticked::Taken
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

fn check_put(put: &SchedulePut) -> Result<(), Rejection> {
    objects::check_name("a schedule", &put.name)?;
    if put.name.len() > SCHEDULE_NAME_MAX {
        return Err(invalid(format!("the name of a schedule has 1 to {SCHEDULE_NAME_MAX} bytes")));
    }
    let plan = &put.plan;
    if plan.calendar.is_empty() || plan.calendar.len() > CALENDAR_BYTES_MAX || plan.zone.len() > CALENDAR_BYTES_MAX {
        return Err(invalid(format!("a calendar has 1 to {CALENDAR_BYTES_MAX} bytes, and a time zone no more")));
    }
    check_queue_name(&plan.queue)?;
    check_job(&plan.job_of(&put.name, Some(u64::MAX)))
}

impl Machine {
    /// Whether this was its last change, or there is none where that is asked.
    pub(crate) fn judge_schedule(&self, namespace: NamespaceId, at: &ScheduleAt) -> Result<(), Rejection> {
        check_expected(&at.name, at.changed, self.object::<Schedule>(namespace, &at.name))
    }
}

fn check_expected(name: &[u8], expected: Revision, found: Option<&Schedule>) -> Result<(), Rejection> {
    let revision = found.map_or(Revision(0), |schedule| schedule.changed);
    if expected == revision {
        return Ok(());
    }
    let name = name.escape_ascii();
    let why = match found {
        None => format!("there is no schedule `{name}`"),
        Some(_) => format!("schedule `{name}` was changed at revision {revision}"),
    };
    Err(Refusal::new(RefusalCode::Conflict, why).fact("name", name).fact("revision", revision).into())
}

/// A schedule whose next tick has come, for whoever leads.
#[derive(Clone, Debug, PartialEq)]
pub struct DueSchedule {
    pub namespace: NamespaceId,
    pub name: Box<[u8]>,
    pub schedule: Schedule,
}

impl Machine {
    /// Up to `max` schedules of every namespace that a tick is due for at this instant of the wall clock, or that are to begin: the longest due first.
    /// In pages: give the last of the page before to read on.
    pub fn due_schedules(&self, now: u64, after: Option<&DueSchedule>, max: usize) -> Vec<DueSchedule> {
        let from =
            after.and_then(|last| Some((last.schedule.due()?, ObjectKey::of::<Schedule>(last.namespace, &last.name))));
        let due = self
            .objects
            .indexes
            .schedules
            .due
            .range((from.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded));
        let due = due.take_while(|(at, _)| *at <= now).filter_map(|(_, key)| {
            let schedule = self.objects.get::<Schedule>(key)?.clone();
            Some(DueSchedule { namespace: key.namespace(), name: key.name().into(), schedule })
        });
        due.take(max).collect()
    }

    /// The first tick behind this instant of the wall clock.
    pub fn next_schedule(&self, now: u64) -> Option<u64> {
        let due = &self.objects.indexes.schedules.due;
        // No key is behind all keys of an instant, so the next instant is where to look.
        let first = (now.checked_add(1)?, ObjectKey::of::<Schedule>(NamespaceId(0), b""));
        due.range(first..).next().map(|(at, _)| *at)
    }

    /// What the job of a tick or run takes beside the operation itself.
    pub(crate) fn scheduled_growth(&self, namespace: NamespaceId, op: &NativeOp) -> u64 {
        let NativeOp::Schedule(op) = op else { return 0 };
        let name = match op {
            ScheduleOp::Run(ScheduleName { name }) => name,
            ScheduleOp::Tick(tick) if tick.run => &tick.name,
            _ => return 0,
        };
        let schedule = self.objects.get::<Schedule>(&ObjectKey::of::<Schedule>(namespace, name));
        schedule.map_or(0, |schedule| schedule.plan.bytes())
    }
}
