//! What operators do with queues: settings, cancellation, dead letters, purges; and the breaker, which does it for them.
//!
//! Promises. One call moves a bounded number of jobs and says where to go on. A purge names its queue twice.

use super::rules::{DELAY_MAX_MS, Ending, WEIGHT_MAX, check_queue_name, cut, no_queue};
use super::*;
use crate::apply::invalid;
use crate::native::RefusalCode;
use std::collections::BTreeSet;

/// Jobs moved by one call.
const SWEPT_MAX: usize = 1_000;
/// Dead letters looked at by one call.
const SCANNED_MAX: usize = 10_000;
const WEIGHTS_MAX: usize = 1_000;
const DAY_MS: u64 = 86_400_000;

impl Commit<'_> {
    fn known_queue(&self, name: &[u8]) -> Result<(ObjectKey, u64), Rejection> {
        check_queue_name(name)?;
        let key = self.object_key::<Queue>(name);
        match self.object::<Queue>(&key) {
            Some(queue) => {
                let number = queue.number;
                Ok((key, number))
            }
            None => Err(no_queue(&key)),
        }
    }

    // ---- Cancellation ----

    pub(super) fn cancel_job(&mut self, cancel: &CancelJob) -> Result<Moved, Rejection> {
        let job_key = cancel.id.key(self.txn.namespace);
        let Some(mut job) = self.object::<Job>(&job_key).cloned() else {
            let why = format!("there is no job {}", cancel.id);
            return Err(Refusal::new(RefusalCode::NotFound, why).fact("name", cancel.id).into());
        };
        let Some(key) = self.m.objects.indexes.queues.name(job.queue).cloned() else { return Err(no_queue(&job_key)) };
        let attempt = job.attempt;
        let mut state = 7;
        match &job.state {
            JobState::Done(_) | JobState::Cancelled(_) => state = job.state.place() as u8,
            JobState::Leased(lease) if !cancel.force => {
                let lease = JobLease { cancel: true, ..(**lease).clone() };
                job.state = JobState::Leased(Arc::new(lease));
                self.put_object(&job_key, job);
                state = 4;
            }
            _ => {
                let group = job.group().cloned();
                let why = if cancel.reason.is_empty() { "cancelled".into() } else { cut(&cancel.reason) };
                self.finish_job(&key, cancel.id, job, Ending::Cancelled(&why));
                self.serve_queue(&key, group.as_ref());
            }
        }
        Ok(Moved { state, delay_ms: 0, attempt })
    }

    // ---- Dead letters ----

    pub(super) fn redrive_jobs(&mut self, redrive: &Redrive) -> Result<Swept, Rejection> {
        let (from, number) = self.known_queue(&redrive.queue)?;
        let to = if redrive.to.is_empty() { from.clone() } else { self.queue_for(&redrive.to)? };
        if redrive.filter.ids.len() > SWEPT_MAX || redrive.max as usize > SWEPT_MAX {
            return Err(invalid(format!("one call redrives at most {SWEPT_MAX} jobs")));
        }
        let (ids, next) = self.dead_letters(&from, number, redrive);
        let mut swept = Swept { count: 0, skipped: 0, next };
        let mut groups = BTreeSet::new();
        for id in ids {
            let Some(job) = self.object::<Job>(&id.key(from.namespace())).cloned() else { continue };
            let group = job.group().cloned();
            let place = redrive.before.saturating_add(swept.count);
            let delay_ms = place.saturating_mul(1_000).checked_div(redrive.rate).unwrap_or(0).min(DELAY_MAX_MS);
            if self.revive_job(&to, id, job, delay_ms) {
                swept.count += 1;
                groups.extend(group);
            } else {
                swept.skipped += 1;
            }
        }
        for key in if from == to { vec![to] } else { vec![from, to] } {
            groups.iter().for_each(|group| self.advance_group(&key, group, None));
            self.serve_queue(&key, None);
            groups.iter().for_each(|group| self.serve_group(&key, group));
        }
        Ok(swept)
    }

    /// Those that fit, and after which one to go on.
    fn dead_letters(&self, key: &ObjectKey, number: u64, redrive: &Redrive) -> (Vec<JobId>, Option<JobId>) {
        let max = if redrive.max == 0 { SWEPT_MAX } else { redrive.max as usize };
        let mut found = Vec::new();
        let fits = |id: &JobId| {
            let job = self.object::<Job>(&id.key(key.namespace()));
            job.is_some_and(|job| job.queue == number && redrive.filter.fits(job))
        };
        if !redrive.filter.ids.is_empty() {
            let named: BTreeSet<JobId> = redrive.filter.ids.iter().copied().filter(fits).collect();
            return (named.into_iter().collect(), None);
        }
        let Some(lines) = self.m.objects.indexes.queues.lines(number) else { return (found, None) };
        for (seen, id) in lines.of_state(6, redrive.after).enumerate() {
            if fits(&id) {
                found.push(id);
            }
            if found.len() == max || seen + 1 == SCANNED_MAX {
                return (found, Some(id));
            }
        }
        (found, None)
    }

    /// Gives a dead job another life at the tail of its group; `false` where a job with its key is there.
    fn revive_job(&mut self, to: &ObjectKey, id: JobId, mut job: Job, delay_ms: u64) -> bool {
        let Some(number) = self.object::<Queue>(to).map(|queue| queue.number) else { return false };
        if let Some(dedup) = job.dedup()
            && self.job_with_key(to, number, &dedup.key).is_some_and(|other| other != id)
        {
            return false;
        }
        job.queue = number;
        job.attempt = 0;
        // Its time to live was that of its first life.
        if job.expires().is_some()
            && let Some(terms) = &mut job.terms
        {
            Arc::make_mut(terms).ttl_ms = 0;
        }
        job.order = job.group().map(|_| Box::new(JobId { revision: self.at.0, index: self.place() }));
        job.state = match delay_ms {
            // The group still counts it among its dead.
            0 if job.group().is_some() => JobState::Held,
            0 => self.open_job_state(to, id, &job, false),
            delay_ms => JobState::Scheduled(self.m.stamp.plus(delay_ms)),
        };
        self.put_object(&id.key(to.namespace()), job);
        true
    }

    // ---- Purges ----

    pub(super) fn purge_queue(&mut self, purge: &Purge) -> Result<Swept, Rejection> {
        if purge.confirm != purge.queue {
            return Err(invalid("a purge is confirmed with the name of its queue"));
        }
        let (key, number) = self.known_queue(&purge.queue)?;
        let waiting = [0, 1, 2, 3];
        let states = if purge.states.is_empty() { &waiting[..] } else { &purge.states[..] };
        let Some(lines) = self.m.objects.indexes.queues.lines(number) else {
            return Ok(Swept { count: 0, skipped: 0, next: None });
        };
        let all = states.iter().flat_map(|state| lines.of_state(usize::from(*state), None));
        let ids: Vec<JobId> = all.take(SWEPT_MAX).collect();
        let mut groups = BTreeSet::new();
        let mut count = 0;
        for id in &ids {
            let job_key = id.key(key.namespace());
            let Some(job) = self.object::<Job>(&job_key).cloned() else { continue };
            groups.extend(job.group().cloned());
            count += u64::from(self.throw_job_away(&job_key, job));
        }
        groups.iter().for_each(|group| self.advance_group(&key, group, None));
        self.serve_queue(&key, None);
        groups.iter().for_each(|group| self.serve_group(&key, group));
        let next = ids.last().copied().filter(|_| ids.len() == SWEPT_MAX);
        let lines = self.m.objects.indexes.queues.lines(number);
        if purge.remove && next.is_none() && lines.is_none_or(|lines| lines.is_without_jobs()) {
            self.remove_object(&key);
        }
        Ok(Swept { count, skipped: ids.len() as u64 - count, next })
    }

    /// Removes a job, but for the key that a window of it still keeps; `false` where no more than that was left.
    fn throw_job_away(&mut self, job_key: &ObjectKey, mut job: Job) -> bool {
        let at = self.m.stamp;
        match job.window_end().filter(|end| *end > at && job.state.finished().is_none()) {
            Some(gone) => {
                let end = JobEnd { at, gone, why: "purged".into(), result: Box::default() };
                job.state = JobState::Cancelled(Arc::new(end));
                job.payload = Arc::default();
                self.put_object(job_key, job);
            }
            None if job.window_end().is_some_and(|end| end > at) => return false,
            None => self.remove_object(job_key),
        }
        true
    }

    // ---- Settings ----

    pub(super) fn configure_queue(&mut self, configure: &ConfigureQueue) -> Result<QueueSettings, Rejection> {
        let key = self.queue_for(&configure.queue)?;
        let Some(mut queue) = self.object::<Queue>(&key).cloned() else { return Err(no_queue(&key)) };
        let settings = &mut queue.settings;
        configure.apply(settings);
        check_settings(settings)?;
        let settings = settings.clone();
        if settings.breaker.is_none() {
            (queue.tripped, queue.tally) = (None, Tally::default());
        }
        if configure.paused == Some(false) {
            // Whoever resumes a queue means its breaker too.
            queue.tripped = None;
        }
        self.put_object(&key, queue);
        self.serve_whole_queue(&key);
        Ok(settings)
    }

    /// After a change of what the whole queue may do.
    fn serve_whole_queue(&mut self, key: &ObjectKey) {
        let Some(number) = self.object::<Queue>(key).map(|queue| queue.number) else { return };
        let lines = self.m.objects.indexes.queues.lines(number);
        let groups: Vec<Arc<[u8]>> =
            lines.into_iter().flat_map(|lines| lines.groups()).map(|(g, _)| g.clone()).collect();
        groups.iter().for_each(|group| self.advance_group(key, group, None));
        self.serve_queue(key, None);
        groups.iter().for_each(|group| self.serve_group(key, group));
    }

    // ---- The breaker ----

    /// Counts the end of a delivery, where a breaker wants to know.
    pub(super) fn count_for_breaker(&mut self, key: &ObjectKey, failed: bool) {
        let Some(queue) = self.object::<Queue>(key) else { return };
        let Some(breaker) = queue.settings.breaker else { return };
        let mut queue = queue.clone();
        let now = self.m.stamp;
        let tally = &mut queue.tally;
        if now.0 - tally.since.0 >= breaker.window_ms {
            *tally = Tally { since: now, ended: 0, failed: 0 };
        }
        tally.ended += 1;
        tally.failed += u64::from(failed);
        let too_many = tally.failed * 100 > tally.ended * u64::from(breaker.percent);
        if queue.tripped.is_none() && tally.ended >= breaker.min && too_many {
            queue.tripped = Some(now.plus(breaker.pause_ms));
            queue.tally = Tally { since: now, ended: 0, failed: 0 };
        }
        self.put_object(key, queue);
    }

    pub(super) fn breaker_closes(&mut self, key: &ObjectKey) {
        let Some(mut queue) = self.object::<Queue>(key).cloned() else { return };
        queue.tripped = None;
        self.put_object(key, queue);
        self.serve_whole_queue(key);
    }
}

impl DeadFilter {
    fn fits(&self, job: &Job) -> bool {
        let JobState::Dead(end) = &job.state else { return false };
        let of_group = self.group.is_none() || self.group.as_ref() == job.group();
        of_group && (end.why.contains(&*self.contains) || job.last_error().contains(&*self.contains))
    }
}

impl ConfigureQueue {
    fn apply(&self, settings: &mut QueueSettings) {
        fn set<T: Clone>(place: &mut T, value: &Option<T>) {
            if let Some(value) = value {
                *place = value.clone();
            }
        }
        set(&mut settings.visibility_ms, &self.visibility_ms);
        set(&mut settings.max_attempts, &self.max_attempts);
        set(&mut settings.backoff_first_ms, &self.backoff_first_ms);
        set(&mut settings.backoff_max_ms, &self.backoff_max_ms);
        set(&mut settings.jitter, &self.jitter);
        set(&mut settings.retention_ms, &self.retention_ms);
        set(&mut settings.done_max, &self.done_max);
        set(&mut settings.dead_retention_ms, &self.dead_retention_ms);
        set(&mut settings.group_in_flight, &self.group_in_flight);
        set(&mut settings.on_dead, &self.on_dead);
        set(&mut settings.tenant_in_flight, &self.tenant_in_flight);
        set(&mut settings.jobs_max, &self.jobs_max);
        set(&mut settings.paused, &self.paused);
        if let Some(breaker) = self.breaker {
            settings.breaker = Some(breaker).filter(|breaker| breaker.percent > 0);
        }
        for (tenant, weight) in &self.weights {
            settings.weights.retain(|(name, _)| name != tenant);
            if *weight != 1 {
                settings.weights.push((tenant.clone(), *weight));
            }
        }
    }
}

fn check_settings(settings: &QueueSettings) -> Result<(), Rejection> {
    let within = |what: &str, value: u64, least: u64, most: u64| {
        let refused = || invalid(format!("`{what}` is between {least} and {most}"));
        if (least..=most).contains(&value) { Ok(()) } else { Err(refused()) }
    };
    within("visibility_ms", settings.visibility_ms, 1_000, 12 * 3_600_000)?;
    within("max_attempts", u64::from(settings.max_attempts), 1, 1_000)?;
    within("backoff_max_ms", settings.backoff_max_ms, 0, DAY_MS)?;
    within("backoff_first_ms", settings.backoff_first_ms, 0, settings.backoff_max_ms)?;
    within("retention_ms", settings.retention_ms, 0, 30 * DAY_MS)?;
    within("done_max", settings.done_max, 0, 1_000_000)?;
    within("dead_retention_ms", settings.dead_retention_ms, 60_000, 366 * DAY_MS)?;
    within("group_in_flight", settings.group_in_flight, 1, 1_000)?;
    within("weights", settings.weights.len() as u64, 0, WEIGHTS_MAX as u64)?;
    for (tenant, weight) in &settings.weights {
        within("weights.tenant", tenant.len() as u64, 1, JOB_KEY_MAX as u64)?;
        within("weights.weight", u64::from(*weight), 1, u64::from(WEIGHT_MAX))?;
    }
    if let Some(breaker) = &settings.breaker {
        within("breaker.percent", u64::from(breaker.percent), 1, 100)?;
        within("breaker.window_ms", breaker.window_ms, 1_000, DAY_MS)?;
        within("breaker.min", breaker.min, 1, 1_000_000)?;
        within("breaker.pause_ms", breaker.pause_ms, 1_000, DAY_MS)?;
    }
    Ok(())
}
