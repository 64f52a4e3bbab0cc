//! What doors see of queues and jobs.

use super::*;

/// A queue as doors show it.
#[derive(Clone, Debug, PartialEq)]
pub struct QueueInfo {
    pub name: Box<[u8]>,
    pub settings: QueueSettings,
    /// Jobs by the place of their state in `JOB_STATES`.
    pub counts: [u64; 8],
    /// Receivers that wait, whatever groups they want.
    pub receivers: u64,
    /// Since the enqueue of the first job that is ready.
    pub oldest_ready_ms: u64,
    pub groups: u64,
    /// Tenants with jobs that are ready or under way: how many of each.
    pub tenants: Vec<(Arc<[u8]>, u64, u64)>,
    /// How long the breaker still pauses it.
    pub tripped_ms: u64,
}

/// A job with the name of its queue.
#[derive(Clone, Debug, PartialEq)]
pub struct JobInfo {
    pub id: JobId,
    pub queue: Box<[u8]>,
    pub job: Job,
}

/// The jobs of all queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobCounts {
    /// By the place of the state in `JOB_STATES`.
    pub states: [u64; 8],
    /// Since the enqueue of the first job that is ready, in any queue.
    pub oldest_ready_ms: u64,
}

/// Tenants that are told.
const TENANTS_MAX: usize = 100;

/// Queues, for doors.
impl Machine {
    pub fn queue(&self, namespace: NamespaceId, name: &[u8]) -> Option<QueueInfo> {
        let key = ObjectKey::of::<Queue>(namespace, name);
        self.objects.get::<Queue>(&key).map(|queue| self.queue_info(&key, queue))
    }

    /// Up to `max` queues whose names begin with `prefix` and come after `after`, in the order of names.
    pub fn queues(&self, namespace: NamespaceId, prefix: &[u8], after: Option<&[u8]>, max: usize) -> Vec<QueueInfo> {
        let queues = self.objects.list::<Queue>(namespace, prefix, after).take(max);
        queues.map(|(key, queue)| self.queue_info(key, queue)).collect()
    }

    pub fn job(&self, namespace: NamespaceId, id: JobId) -> Option<JobInfo> {
        let job = self.objects.get::<Job>(&id.key(namespace))?;
        let queue = self.objects.indexes.queues.name(job.queue)?.name().into();
        Some(JobInfo { id, queue, job: job.clone() })
    }

    /// Up to `max` jobs of a queue in one state (its place in `JOB_STATES`), after the job `after`. Ready ones come in the order of their delivery as far
    /// as tenants take no turns, and have no `after`.
    pub fn queue_jobs(
        &self,
        namespace: NamespaceId,
        name: &[u8],
        state: usize,
        after: Option<JobId>,
        max: usize,
    ) -> Vec<JobInfo> {
        let Some(queue) = self.objects.get::<Queue>(&ObjectKey::of::<Queue>(namespace, name)) else {
            return Vec::new();
        };
        let Some(lines) = self.objects.indexes.queues.lines(queue.number) else { return Vec::new() };
        lines.of_state(state, after).take(max).filter_map(|id| self.job(namespace, id)).collect()
    }

    /// A walk over the queues, not over their jobs.
    pub fn job_counts(&self) -> JobCounts {
        let mut counts = JobCounts::default();
        for (queue, lines) in self.objects.indexes.queues.all() {
            for (sum, count) in counts.states.iter_mut().zip(lines.counts) {
                *sum += count;
            }
            let oldest = lines.oldest_ready().and_then(|id| self.objects.get::<Job>(&id.key(queue.namespace())));
            let age_ms = oldest.map_or(0, |job| self.stamp.0.saturating_sub(job.enqueued.0));
            counts.oldest_ready_ms = counts.oldest_ready_ms.max(age_ms);
        }
        counts
    }

    fn queue_info(&self, key: &ObjectKey, queue: &Queue) -> QueueInfo {
        let lines = self.objects.indexes.queues.lines(queue.number);
        let oldest = lines.and_then(|lines| lines.oldest_ready()).and_then(|id| self.job(key.namespace(), id));
        let mut tenants: Vec<(Arc<[u8]>, u64, u64)> = Vec::new();
        for (tenant, (ready, leased)) in lines.map(|lines| lines.tenants()).unwrap_or_default() {
            if tenants.len() < TENANTS_MAX {
                tenants.push((tenant, ready, leased));
            }
        }
        let tripped = queue.tripped.map_or(0, |until| until.0.saturating_sub(self.stamp.0));
        QueueInfo {
            name: key.name().into(),
            settings: queue.settings.clone(),
            counts: lines.map(|lines| lines.counts).unwrap_or_default(),
            receivers: self.waits.len(key) + self.waits.len_below(key),
            oldest_ready_ms: oldest.map_or(0, |job| self.stamp.0.saturating_sub(job.job.enqueued.0)),
            groups: lines.map_or(0, |lines| lines.groups().count() as u64),
            tenants,
            tripped_ms: tripped,
        }
    }
}
