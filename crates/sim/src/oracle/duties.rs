//! What whoever leads does of itself: it runs schedules and tells how instances are. Two may believe to lead at once.
//!
//! Promises. A tick of a schedule is taken once and has one job, in the order of the ticks; nothing is taken while it is paused, and nothing comes of it
//! after it was deleted; of one that keeps its jobs apart, no job is given out once the next one is there. No report on an instance is taken of whoever led in a
//! term before that of the log.
//! Relies on. A name is given to one schedule only, and those whose number is even keep their jobs apart. Reports name their term at their end.

use std::collections::{BTreeMap, BTreeSet};
use tenure_machine::*;

const NS: NamespaceId = NamespaceId::DEFAULT;
/// What the names of schedules begin with; the number of a call follows.
pub const SCHEDULE: &str = "cron";

#[derive(Debug, Default)]
struct Known {
    /// The revision at which each tick was taken to be run.
    taken: BTreeMap<u64, u64>,
    /// The job of each tick.
    jobs: BTreeMap<u64, JobId>,
    /// All jobs, with the newest token under which each was given out.
    given: BTreeMap<JobId, u64>,
    pauses: BTreeSet<u64>,
    resumes: BTreeSet<u64>,
    /// Whether it was resumed is not known.
    perhaps_resumed: bool,
    deleted: Option<u64>,
}

#[derive(Default)]
pub struct Duties {
    schedules: BTreeMap<Box<str>, Known>,
    /// The last report on each instance.
    reports: BTreeMap<Box<str>, Box<str>>,
    /// The newest entry that was looked at, and its term.
    at: (u64, u64),
}

/// Whether its plans all keep its jobs apart.
pub fn keeps_apart(number: u64) -> bool {
    number.is_multiple_of(2)
}

impl Duties {
    fn schedule(&mut self, name: &[u8]) -> &mut Known {
        self.schedules.entry(String::from_utf8_lossy(name).into()).or_default()
    }

    pub fn done(&mut self, op: &ScheduleOp, reply: &ScheduleReply, at: u64) -> Result<(), String> {
        match (op, reply) {
            (ScheduleOp::Pause(of), ScheduleReply::Done(since)) => drop(self.schedule(&of.name).pauses.insert(since.0)),
            (ScheduleOp::Resume(of), ScheduleReply::Done(since)) => {
                self.schedule(&of.name).resumes.insert(since.0);
            }
            (ScheduleOp::Delete(of), ScheduleReply::Deleted(true)) => self.schedule(&of.name).deleted = Some(at),
            (ScheduleOp::Tick(tick), ScheduleReply::Ticked(Ticked::Taken)) if tick.run => {
                let known = self.schedule(&tick.name);
                let before = known.taken.range(..tick.at).next_back().is_none_or(|(_, earlier)| *earlier < at);
                let after = known.taken.range(tick.at + 1..).next().is_none_or(|(_, later)| *later > at);
                let same = known.taken.insert(tick.at, at).is_none_or(|known| known == at);
                if !(before && after && same) {
                    let (name, taken) = (tick.name.escape_ascii(), &known.taken);
                    return Err(format!("tick {} of {name} was taken at {at}, among {taken:?}", tick.at));
                }
            }
            _ => {}
        }
        Ok(())
    }

    pub fn unknown(&mut self, op: &ScheduleOp) {
        if let ScheduleOp::Resume(of) = op {
            self.schedule(&of.name).perhaps_resumed = true;
        }
    }

    /// A job was given out, perhaps one of a schedule.
    pub fn given(&mut self, job: &Delivered) -> Result<(), String> {
        let headers = job.terms.iter().flat_map(|terms| &terms.headers);
        let header = |wanted: &str| headers.clone().find(|(name, _)| &**name == wanted).map(|(_, value)| value.clone());
        let Some(name) = header("tenure-schedule") else { return Ok(()) };
        let known = self.schedules.entry(name.clone()).or_default();
        let newest = known.given.entry(job.id).or_default();
        *newest = job.token.0.max(*newest);
        let Some(tick) = header("tenure-tick-ms").and_then(|tick| tick.parse().ok()) else { return Ok(()) };
        match known.jobs.insert(tick, job.id) {
            Some(other) if other != job.id => {
                Err(format!("tick {tick} of {name} has the jobs {other:?} and {:?}", job.id))
            }
            _ => Ok(()),
        }
    }

    /// What a member holds at any time.
    pub fn look(&mut self, machine: &Machine, service: &str) -> Result<(), String> {
        let position = machine.position();
        let (newest, term) = self.at;
        if position.index.0 <= newest {
            return Ok(());
        }
        for (id, instance, _) in machine.instances(NS, service, None, usize::MAX) {
            let Some(of) = instance.why.rsplit_once("term ").and_then(|(_, of)| of.parse::<u64>().ok()) else {
                continue;
            };
            let is_news =
                self.reports.insert(id.clone(), instance.why.clone()).is_none_or(|known| known != instance.why);
            if is_news && of < term {
                let why = &instance.why;
                return Err(format!("instance {id}: {why} was taken, and the log had come to term {term} before"));
            }
        }
        self.at = (position.index.0, position.term.0);
        Ok(())
    }

    pub fn finish(&self) -> Result<(), String> {
        self.schedules
            .iter()
            .try_for_each(|(name, known)| known.check(name).map_err(|why| format!("schedule {name}: {why}: {known:?}")))
    }
}

impl Known {
    fn check(&self, name: &str) -> Result<(), String> {
        let of_jobs = self.jobs.iter().map(|(tick, job)| (tick, job.revision));
        for (tick, at) in self.taken.iter().map(|(tick, at)| (tick, *at)).chain(of_jobs) {
            if self.deleted.is_some_and(|deleted| deleted < at) {
                return Err(format!("tick {tick} was taken at {at}, after it was deleted"));
            }
            let Some(paused) = self.pauses.range(..at).next_back().filter(|_| !self.perhaps_resumed) else { continue };
            if self.resumes.range(paused..&at).next().is_none() {
                return Err(format!("tick {tick} was taken at {at}, and it was paused at {paused}"));
            }
        }
        for (tick, job) in &self.jobs {
            if self.taken.get(tick).is_some_and(|at| *at != job.revision) {
                return Err(format!("tick {tick} has job {job:?}"));
            }
        }
        if !name.strip_prefix(SCHEDULE).and_then(|number| number.parse().ok()).is_some_and(keeps_apart) {
            return Ok(());
        }
        let mut newest = (0, None);
        for (job, given) in &self.given {
            if newest.0 > job.revision {
                return Err(format!("job {:?} was given out at {}, beside job {job:?}", newest.1, newest.0));
            }
            newest = newest.max((*given, Some(*job)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(taken: &[(u64, u64)], given: &[(u64, u64)]) -> Known {
        let job = |revision| JobId { revision, index: 0 };
        Known {
            taken: taken.iter().copied().collect(),
            given: given.iter().map(|(at, token)| (job(*at), *token)).collect(),
            ..Known::default()
        }
    }

    #[test]
    fn a_tick_while_it_is_paused_or_deleted_is_noticed() {
        let paused = |resumes: &[u64]| Known {
            pauses: [7].into(),
            resumes: resumes.iter().copied().collect(),
            ..known(&[(1_000, 5), (2_000, 9)], &[])
        };
        assert!(paused(&[]).check("cron1").is_err());
        assert!(paused(&[6, 10]).check("cron1").is_err(), "resumed before and after");
        assert!(paused(&[8]).check("cron1").is_ok());
        assert!(Known { deleted: Some(8), ..paused(&[8]) }.check("cron1").is_err());
        assert!(Known { deleted: Some(10), ..paused(&[8]) }.check("cron1").is_ok());
    }

    #[test]
    fn jobs_beside_each_other_are_noticed() {
        assert!(known(&[], &[(5, 8), (9, 11)]).check("cron2").is_ok());
        assert!(known(&[], &[(5, 10), (9, 11)]).check("cron2").is_err());
        assert!(known(&[], &[(5, 10), (9, 11)]).check("cron3").is_ok(), "it does not keep them apart");
    }

    #[test]
    fn a_tick_that_is_taken_twice_or_out_of_order_is_noticed() {
        let tick = |at| {
            ScheduleOp::Tick(ScheduleTick {
                name: b"cron1"[..].into(),
                changed: Revision(2),
                at,
                run: true,
                next: at + 1,
            })
        };
        let taken = ScheduleReply::Ticked(Ticked::Taken);
        let mut all = Duties::default();
        all.done(&tick(1_000), &taken, 5).unwrap();
        all.done(&tick(1_000), &taken, 5).unwrap();
        assert!(all.done(&tick(2_000), &taken, 4).is_err());
        let mut all = Duties::default();
        all.done(&tick(1_000), &taken, 5).unwrap();
        assert!(all.done(&tick(1_000), &taken, 6).is_err());
    }
}
