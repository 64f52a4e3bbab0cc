//! The ticks of schedules: reads calendars by the wall clock, and proposes the ticks that are due.
//!
//! Promises. T1: the leader proposes, and the state decides whether a tick is news; so a member that leads no more does no harm, and its successor goes on
//! where the state is, within `LOOK_EVERY` of leading. T2: of several ticks that are due at once only the last is proposed; one that is later than the grace of its
//! schedule only where that asks for it, else it is left out. T3: what is refused is tried again ever more slowly, and is logged and counted.
//! Not promised. That the wall clock is right: it says what time it is, and the state sees to it that no tick comes twice.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::join_all;
use tenure_machine::{
    DueSchedule, Missed, NamespaceId, NativeReply, OpReply, Revision, Schedule, ScheduleOp, ScheduleReply,
    ScheduleTick, Ticked, Txn,
};
use tokio::time::Instant;

use crate::Context;
use crate::calendar::Calendar;
use crate::status as words;
use crate::status::Kind;

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Between two looks at least, however many ticks there are.
const LOOK_REST: Duration = Duration::from_millis(5);
/// Schedules that are proposed for together.
const PAGE: usize = 256;
const AGAIN_MIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(30);

type Name = (NamespaceId, Box<[u8]>);

/// What this member has done as a leader.
#[derive(Debug, Default)]
pub(crate) struct ScheduleFacts {
    pub(crate) done: AtomicU64,
    pub(crate) left_out: AtomicU64,
    pub(crate) refused: AtomicU64,
}

/// A schedule whose tick was refused.
struct Waiting {
    changed: Revision,
    again: Instant,
    pause: Duration,
}

/// Proposes while this member leads. Ends with the server.
pub(crate) async fn run(context: Context) {
    let mut runner = Runner { context, waiting: HashMap::new() };
    while !runner.context.is_stopping() {
        let next = runner.look().await;
        tokio::time::sleep(next.clamp(LOOK_REST, LOOK_EVERY)).await;
    }
}

struct Runner {
    context: Context,
    waiting: HashMap<Name, Waiting>,
}

impl Runner {
    /// Proposes what is due, and tells when there is more. A query that is refused is made again.
    async fn look(&mut self) -> Duration {
        let mut last: Option<DueSchedule> = None;
        loop {
            let after = last.take();
            let now = unix_ms();
            let look = move |view: &crate::driver::View<'_>| {
                let machine = view.machine;
                let leads = view.member.is_leader();
                leads.then(|| (machine.due_schedules(now, after.as_ref(), PAGE), machine.next_schedule(now)))
            };
            let Ok(Some((page, next))) = self.context.query(true, look).await else {
                self.waiting.clear();
                return LOOK_EVERY;
            };
            let is_last = page.len() < PAGE;
            last = page.last().cloned();
            self.propose(page, now).await;
            if is_last {
                return next.map_or(LOOK_EVERY, |next| Duration::from_millis(next.saturating_sub(unix_ms())));
            }
        }
    }

    async fn propose(&mut self, page: Vec<DueSchedule>, now: u64) {
        let at = Instant::now();
        // Nobody asks for those any more that were deleted or paused meanwhile.
        self.waiting.retain(|_, waiting| waiting.again + AGAIN_MAX > at);
        let this = &*self;
        let may = |due: &DueSchedule| {
            let waiting = this.waiting.get(&(due.namespace, due.name.clone()));
            waiting.is_none_or(|waiting| waiting.again <= at || waiting.changed != due.schedule.changed)
        };
        let ticks = page.into_iter().filter(may).map(|due| async move {
            let found = this.tick(&due, now).await;
            (due, found)
        });
        let ticks = join_all(ticks).await;
        for (due, found) in ticks {
            self.note(due, found);
        }
    }

    /// Proposes one tick: it, unless it was no news; or why it was not taken.
    async fn tick(&self, due: &DueSchedule, now: u64) -> Result<Option<ScheduleTick>, String> {
        let tick = tick_of(due, now)?;
        let op = ScheduleOp::Tick(tick.clone());
        let txn = Txn { namespace: due.namespace, ..Txn::of(op.into()) };
        let written = self.context.write(txn).await;
        let reply = written.map_err(|failure| words::native_failure(&failure, Kind::Change).message)?;
        let done = reply.result.map_err(|why| why.to_string())?;
        let Some(OpReply::Native(reply)) = done.results.into_iter().next() else { return Ok(None) };
        match *reply {
            NativeReply::Schedule(ScheduleReply::Ticked(Ticked::Taken)) => Ok(Some(tick)),
            NativeReply::Schedule(ScheduleReply::Ticked(Ticked::Refused(why))) => Err(why.into()),
            _ => Ok(None),
        }
    }

    fn note(&mut self, due: DueSchedule, found: Result<Option<ScheduleTick>, String>) {
        let facts = &self.context.facts.schedules;
        let (key, schedule) = ((due.namespace, due.name), due.schedule);
        match found {
            Ok(tick) => {
                self.waiting.remove(&key);
                let Some(tick) = tick else { return };
                if tick.run {
                    facts.done.fetch_add(1, Ordering::Relaxed);
                } else if schedule.next.is_some() {
                    facts.left_out.fetch_add(1, Ordering::Relaxed);
                    let name = String::from_utf8_lossy(&key.1);
                    tracing::warn!(schedule = %name, tick_ms = tick.at, "missed ticks are left out");
                }
            }
            Err(why) => {
                facts.refused.fetch_add(1, Ordering::Relaxed);
                let name = String::from_utf8_lossy(&key.1);
                tracing::warn!(schedule = %name, tick_ms = schedule.next, why, "a tick was not taken, and is tried again");
                let before = self.waiting.get(&key).filter(|waiting| waiting.changed == schedule.changed);
                let pause = before.map_or(AGAIN_MIN, |waiting| (waiting.pause * 2).min(AGAIN_MAX));
                let waiting = Waiting { changed: schedule.changed, again: Instant::now() + pause, pause };
                self.waiting.insert(key, waiting);
            }
        }
    }
}

/// What to propose for a schedule that is due; why not, where its calendar cannot be read here.
fn tick_of(due: &DueSchedule, now: u64) -> Result<ScheduleTick, String> {
    let Schedule { plan, changed, last, next, .. } = &due.schedule;
    let calendar = Calendar::read(&plan.calendar, &plan.zone).map_err(|wrong| wrong.why)?;
    let (at, run) = match next {
        // The calendar counts from now, and never before what is done.
        None => (now.max(*last), false),
        Some(next) => {
            let at = calendar.last_until(*next, now);
            (at, plan.missed == Missed::RunOnce || now.saturating_sub(at) <= plan.grace_ms)
        }
    };
    let next = calendar.next_after(at).ok_or("the calendar has no more ticks")?;
    Ok(ScheduleTick { name: due.name.clone(), changed: *changed, at, run, next })
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tenure_machine::{NewJob, OnDuplicate, SchedulePlan};

    use super::*;

    fn due(calendar: &str, missed: Missed, last: u64, next: Option<u64>) -> DueSchedule {
        let job = NewJob {
            payload: b"x"[..].into(),
            delay_ms: 0,
            run_at_ms: None,
            priority: 0,
            terms: None,
            on_duplicate: OnDuplicate::ReturnExisting,
        };
        let plan = SchedulePlan {
            calendar: calendar.into(),
            zone: "".into(),
            queue: b"q"[..].into(),
            job,
            missed,
            grace_ms: 60_000,
            no_overlap: false,
        };
        let schedule = Schedule {
            plan: Arc::new(plan),
            paused: false,
            changed: Revision(2),
            last,
            next,
            enqueued: 0,
            job: None,
            trouble: None,
        };
        DueSchedule { namespace: NamespaceId::DEFAULT, name: b"s"[..].into(), schedule }
    }

    #[test]
    fn t2_only_the_last_and_only_in_time() {
        let check = |due: &DueSchedule, now: u64, expected: (u64, bool, u64)| {
            let tick = tick_of(due, now).unwrap();
            assert_eq!((tick.at, tick.run, tick.next), expected, "{due:?} at {now}");
        };
        // A new one counts from now, and one that was ahead from where it is.
        check(&due("@every 5s", Missed::Skip, 0, None), 1_000, (1_000, false, 6_000));
        check(&due("@every 5s", Missed::Skip, 9_000, None), 1_000, (9_000, false, 14_000));
        check(&due("* * * * *", Missed::Skip, 0, None), 61_000, (61_000, false, 120_000));
        let skip = due("* * * * *", Missed::Skip, 60_000, Some(120_000));
        check(&skip, 120_000, (120_000, true, 180_000));
        check(&skip, 250_000, (240_000, true, 300_000));
        let daily = due("@daily", Missed::Skip, 0, Some(86_400_000));
        check(&daily, 86_460_000, (86_400_000, true, 172_800_000));
        check(&daily, 86_460_001, (86_400_000, false, 172_800_000));
        let once = due("@daily", Missed::RunOnce, 0, Some(86_400_000));
        check(&once, 300_000_000, (259_200_000, true, 345_600_000));
        assert!(tick_of(&due("nonsense", Missed::Skip, 0, None), 0).is_err());
    }
}
