//! Delivery: jobs come in, go to receivers, and come back or end.
//!
//! Relies on. A job's turn, place in its group and key are found in `index.rs`, which has taken in every change made so far by this very commit.

use super::*;
use crate::apply::{Place, invalid};
use crate::command::Limit;
use crate::native::RefusalCode;
use crate::waits::{Ask, OwnerKey, WaiterNumber};

/// The step of a turn of a tenant of weight one.
const STEP: u64 = 1_000;
pub(super) const WEIGHT_MAX: u32 = STEP as u32;
/// A delivery lasts no longer, whatever its heartbeats say.
const RUN_MAX_MS: u64 = 12 * 3_600_000;
/// Past deliveries that a job remembers.
const PAST_MAX: usize = 32;
/// Bytes of a reason or an error that are kept.
const ERROR_BYTES_MAX: usize = 1_024;
/// Payload bytes of one answer, but for its first job.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const WAIT_MAX_MS: u64 = 20_000;
const TEXT_MAX: usize = 255;

/// Where something may have become ready: a queue, and the group that was moved there.
pub(super) type Touched = (ObjectKey, Option<Arc<[u8]>>);

/// How a delivery ends that does not end its job.
pub(super) struct End {
    how: HowEnded,
    error: Box<str>,
    /// `None`: by the backoff.
    delay_ms: Option<u64>,
    dead: bool,
}

/// How a job ends for good.
#[derive(Clone, Copy)]
pub(super) enum Ending<'a> {
    /// With its result.
    Done(&'a [u8]),
    Dead(&'a str),
    Cancelled(&'a str),
}

impl Commit<'_> {
    // ---- In ----

    /// Enqueues a job as any caller would, for other primitives. The queue is made if it is not there.
    pub(crate) fn enqueue_job(&mut self, queue: &[u8], new: &NewJob) -> Result<Enqueued, Rejection> {
        let key = self.queue_for(queue)?;
        let enqueued = self.add_job(&key, new)?;
        self.serve_queue(&key, group_of(new));
        Ok(enqueued)
    }

    pub(super) fn enqueue_jobs(&mut self, enqueue: &Enqueue) -> Result<Vec<Enqueued>, Rejection> {
        if enqueue.jobs.is_empty() || enqueue.jobs.len() > JOBS_PER_CALL {
            return Err(invalid(format!("one call enqueues 1 to {JOBS_PER_CALL} jobs")));
        }
        let key = self.queue_for(&enqueue.queue)?;
        // All are there before the first goes out, so that one receiver can have several.
        let added = enqueue.jobs.iter().map(|new| self.add_job(&key, new)).collect::<Result<Vec<_>, _>>()?;
        self.serve_queue(&key, None);
        for new in &enqueue.jobs {
            if let Some(group) = group_of(new) {
                self.serve_group(&key, group);
            }
        }
        Ok(added)
    }

    /// The queue of this name, made with default settings where it is not there.
    pub(super) fn queue_for(&mut self, name: &[u8]) -> Result<ObjectKey, Rejection> {
        check_queue_name(name)?;
        let key = self.object_key::<Queue>(name);
        if self.object::<Queue>(&key).is_none() {
            let mut number = self.at.0;
            while self.m.objects.indexes.queues.name(number).is_some() {
                number += 1;
            }
            let settings = QueueSettings::default();
            self.put_object(&key, Queue { number, settings, tally: Tally::default(), tripped: None });
        }
        Ok(key)
    }

    pub(super) fn add_job(&mut self, key: &ObjectKey, new: &NewJob) -> Result<Enqueued, Rejection> {
        check_job(new)?;
        let Some(queue) = self.object::<Queue>(key) else { return Err(no_queue(key)) };
        let (number, jobs_max) = (queue.number, queue.settings.jobs_max);
        let dedup = new.terms.as_ref().and_then(|terms| terms.dedup.as_ref());
        if let Some(dedup) = dedup
            && let Some(id) = self.job_with_key(key, number, &dedup.key)
        {
            return self.duplicate_job(key, id, new);
        }
        if jobs_max > 0 && self.unfinished_jobs(number) >= jobs_max {
            let why = format!("queue `{}` has {jobs_max} jobs, which is all it may have", shown(key));
            return Err(Refusal::new(RefusalCode::Quota, why).fact("name", shown(key)).fact("limit", jobs_max).into());
        }
        let id = JobId { revision: self.at.0, index: self.place() };
        let mut job = Job {
            queue: number,
            payload: new.payload.clone(),
            rank: (7 - new.priority) as u8,
            attempt: 0,
            token: Revision(0),
            enqueued: self.m.stamp,
            state: JobState::Held,
            terms: new.terms.clone(),
            past: None,
            order: None,
        };
        job.state = match new.delay_ms {
            0 => self.open_job_state(key, id, &job, false),
            delay_ms => JobState::Scheduled(self.m.stamp.plus(delay_ms)),
        };
        self.put_object(&id.key(key.namespace()), job);
        Ok(Enqueued { id, duplicate: false })
    }

    fn unfinished_jobs(&self, number: u64) -> u64 {
        self.queue_lines(number).map_or(0, |lines| lines.counts[..5].iter().sum())
    }

    /// The job that keeps others with this key out.
    pub(super) fn job_with_key(&self, queue: &ObjectKey, number: u64, key: &Arc<[u8]>) -> Option<JobId> {
        let mut ids = self.m.objects.indexes.queues.with_key(number, key);
        ids.find(|id| {
            let job = self.object::<Job>(&id.key(queue.namespace()));
            job.is_some_and(|job| job.window_end().is_none_or(|end| end > self.m.stamp))
        })
    }

    fn duplicate_job(&mut self, queue: &ObjectKey, id: JobId, new: &NewJob) -> Result<Enqueued, Rejection> {
        let key = id.key(queue.namespace());
        let Some(job) = self.object::<Job>(&key) else { return Ok(Enqueued { id, duplicate: true }) };
        let state = job.state.name();
        match new.on_duplicate {
            OnDuplicate::ReturnExisting => {}
            OnDuplicate::ReplacePayload if job.state.is_pending() => {
                let mut job = job.clone();
                job.payload = new.payload.clone();
                self.put_object(&key, job);
            }
            OnDuplicate::ReplacePayload if matches!(job.state, JobState::Leased(_)) => {
                let why = format!("job {id} is being worked on, so its payload stays");
                return Err(Refusal::new(RefusalCode::InFlight, why).fact("job", id).fact("state", state).into());
            }
            OnDuplicate::ReplacePayload | OnDuplicate::Error => {
                let why = format!("job {id} has the same key and is {state}");
                return Err(Refusal::new(RefusalCode::Duplicate, why).fact("job", id).fact("state", state).into());
            }
        }
        Ok(Enqueued { id, duplicate: true })
    }

    // ---- Turns and groups ----

    pub(super) fn queue_lines(&self, number: u64) -> Option<&index::Lines> {
        self.m.objects.indexes.queues.lines(number)
    }

    /// The state of a job that has nothing to wait for but its group and its turn. `back`: it comes back, to the front.
    pub(super) fn open_job_state(&self, key: &ObjectKey, id: JobId, job: &Job, back: bool) -> JobState {
        match job.group() {
            Some(group) if !self.may_start_in_group(key, group, job.order.as_deref().copied().unwrap_or(id)) => {
                JobState::Held
            }
            _ => JobState::Ready(self.turn_of_job(key, job, back)),
        }
    }

    /// Whether nothing of its group is before the job at this place.
    fn may_start_in_group(&self, key: &ObjectKey, group: &[u8], order: JobId) -> bool {
        let Some(queue) = self.object::<Queue>(key) else { return false };
        let settings = &queue.settings;
        let Some(group) = self.queue_lines(queue.number).and_then(|lines| lines.group(group)) else { return true };
        let blocked = settings.on_dead == OnDead::Block && group.dead > 0;
        !blocked && group.leased < settings.group_in_flight && group.first().is_none_or(|(first, _)| first >= order)
    }

    /// Where a job goes in the round of tenants: a step behind the last of its own, or else into the round that is under way. `back`: to the front.
    fn turn_of_job(&self, key: &ObjectKey, job: &Job, back: bool) -> u64 {
        let Some(queue) = self.object::<Queue>(key) else { return 0 };
        let tenant = job.tenant();
        let weights = &queue.settings.weights;
        let weight = weights.iter().find(|(name, _)| Some(name) == tenant).map_or(1, |(_, weight)| *weight);
        let step = STEP / u64::from(weight.clamp(1, WEIGHT_MAX));
        let Some(lines) = self.queue_lines(queue.number) else { return 0 };
        match lines.last_turn(job.rank, &tenant.cloned()) {
            _ if back => lines.first_turn(job.rank).unwrap_or(0),
            Some(last) => last.saturating_add(step),
            None => lines.turn_under_way(job.rank).unwrap_or(0),
        }
    }

    /// Makes the first of a group ready if it may start, and lets it wait again if it may not any more. `back`: this one comes back, to the front.
    pub(super) fn advance_group(&mut self, key: &ObjectKey, group: &[u8], back: Option<JobId>) {
        let Some(queue) = self.object::<Queue>(key) else { return };
        let Some(lines) = self.queue_lines(queue.number) else { return };
        let Some((order, id)) = lines.group(group).and_then(|group| group.first()) else { return };
        let job_key = id.key(key.namespace());
        let Some(job) = self.object::<Job>(&job_key) else { return };
        let state = match (&job.state, self.may_start_in_group(key, group, order)) {
            (JobState::Held, true) => JobState::Ready(self.turn_of_job(key, job, back == Some(id))),
            (JobState::Ready(_), false) => JobState::Held,
            _ => return,
        };
        let job = Job { state, ..job.clone() };
        self.put_object(&job_key, job);
    }

    /// A job comes back into its group before the one that was next: that one waits again.
    fn make_room_in_group(&mut self, key: &ObjectKey, number: u64, group: &[u8], order: JobId) {
        let first = self.queue_lines(number).and_then(|lines| lines.group(group)).and_then(|group| group.first());
        let Some((_, id)) = first.filter(|(first, _)| *first > order) else { return };
        let job_key = id.key(key.namespace());
        if let Some(job) = self.object::<Job>(&job_key)
            && matches!(job.state, JobState::Ready(_))
        {
            let mut job = job.clone();
            job.state = JobState::Held;
            self.put_object(&job_key, job);
        }
    }

    // ---- Out ----

    /// Gives what is ready to those who wait, after something happened to a queue and perhaps to a group there.
    pub(super) fn serve_queue(&mut self, key: &ObjectKey, group: Option<&Arc<[u8]>>) {
        match group {
            None => self.serve_receivers(key, key),
            Some(group) => {
                // In the order of arrival, as far as it is one job that has become ready.
                let place = group_place(key, group);
                let wants_group = self.m.waits.head(&place);
                let is_first =
                    wants_group.is_some() && wants_group < self.m.waits.head(key).or(Some(WaiterNumber::MAX));
                let order = if is_first { [&place, key] } else { [key, &place] };
                order.into_iter().for_each(|place| self.serve_receivers(key, place));
            }
        }
        // Room under the cap of a tenant is room for its jobs in every group.
        if self.object::<Queue>(key).is_some_and(|queue| queue.settings.tenant_in_flight > 0) {
            for place in self.m.waits.places_below(key) {
                self.serve_receivers(key, &place);
            }
        }
    }

    pub(super) fn serve_group(&mut self, key: &ObjectKey, group: &[u8]) {
        let place = group_place(key, group);
        if self.m.waits.head(&place).is_some() {
            self.serve_receivers(key, &place);
        }
    }

    fn serve_receivers(&mut self, queue: &ObjectKey, place: &ObjectKey) {
        while let Some(number) = self.m.waits.head(place) {
            if !self.has_ready_job(queue) {
                return;
            }
            let Some(receive) = self.waiting_receive(number) else { return };
            let jobs = self.fill_receive(queue.namespace(), &receive);
            if jobs.is_empty() {
                return;
            }
            let waited_ms = self.waited_ms(number);
            let received = Received { jobs, settled: receive.settled, waited_ms };
            self.end_wait(number, Ok(QueueReply::Received(received).into()));
        }
    }

    fn has_ready_job(&self, queue: &ObjectKey) -> bool {
        let Some(queue) = self.object::<Queue>(queue).filter(|queue| queue.is_open()) else { return false };
        self.queue_lines(queue.number).is_some_and(|lines| lines.counts[3] > 0)
    }

    fn waited_ms(&self, number: WaiterNumber) -> u64 {
        self.m.waits.get(number).map_or(0, |waiter| self.m.stamp.0 - waiter.since.0)
    }

    fn waiting_receive(&self, number: WaiterNumber) -> Option<Receive> {
        match &self.m.waits.get(number)?.ask {
            Ask::Native(op) => match &**op {
                crate::native::NativeOp::Queue(QueueOp::Receive(receive)) => Some(receive.clone()),
                _ => None,
            },
            Ask::Exclusive => None,
        }
    }

    /// Delivers what there is for a receiver.
    fn fill_receive(&mut self, namespace: NamespaceId, receive: &Receive) -> Vec<Delivered> {
        let mut jobs: Vec<Delivered> = Vec::new();
        let mut bytes = 0;
        for name in &receive.queues {
            let key = ObjectKey::of::<Queue>(namespace, name);
            while jobs.len() < receive.max as usize && bytes < ANSWER_BYTES_MAX {
                let Some(id) = self.next_job_of(&key, &receive.groups) else { break };
                let Some(job) = self.deliver_job(&key, id, receive) else { break };
                bytes += job.payload.len();
                jobs.push(job);
            }
        }
        jobs
    }

    fn next_job_of(&self, key: &ObjectKey, groups: &[Arc<[u8]>]) -> Option<JobId> {
        let queue = self.object::<Queue>(key).filter(|queue| queue.is_open())?;
        let lines = self.queue_lines(queue.number)?;
        if groups.is_empty() {
            return lines.next();
        }
        groups.iter().filter_map(|name| lines.group(name)?.first()).map(|(_, id)| id).find(|id| {
            let job = self.object::<Job>(&id.key(key.namespace()));
            job.is_some_and(|job| matches!(job.state, JobState::Ready(_)) && !lines.is_capped(job.tenant()))
        })
    }

    fn deliver_job(&mut self, key: &ObjectKey, id: JobId, receive: &Receive) -> Option<Delivered> {
        let job_key = id.key(key.namespace());
        let mut job = self.object::<Job>(&job_key)?.clone();
        let settings = &self.object::<Queue>(key)?.settings;
        let terms = job.terms.as_deref();
        let asked = [receive.visibility_ms, terms.map_or(0, |terms| terms.visibility_ms), settings.visibility_ms];
        let visibility_ms = asked.into_iter().find(|ms| *ms > 0).unwrap_or(settings.visibility_ms);
        let max_attempts = max_attempts(&job, settings);
        let now = self.m.stamp;
        let lease = JobLease {
            worker: receive.worker.clone(),
            since: now,
            until: now.plus(visibility_ms.min(RUN_MAX_MS)),
            run_until: now.plus(RUN_MAX_MS),
            visibility_ms,
            cancel: false,
            progress: Box::default(),
        };
        let last_error = job.last_error().into();
        job.attempt = job.attempt.saturating_add(1);
        job.token = self.at;
        job.state = JobState::Leased(Arc::new(lease));
        let delivered = Delivered {
            id,
            token: self.at,
            queue: key.name().into(),
            payload: job.payload.clone(),
            attempt: job.attempt,
            max_attempts,
            visibility_ms: visibility_ms.min(RUN_MAX_MS),
            age_ms: now.0 - job.enqueued.0,
            priority: job.priority(),
            terms: job.terms.clone(),
            last_error,
        };
        let group = job.group().cloned();
        self.put_object(&job_key, job);
        if let Some(group) = group {
            self.advance_group(key, &group, None);
        }
        Some(delivered)
    }

    pub(super) fn receive_jobs(&mut self, receive: &Receive, settled: Vec<Settled>) -> Result<OpReply, Rejection> {
        check_receive(receive)?;
        if !receive.receiver.is_empty() {
            self.leave_queues(&receive.receiver);
        }
        let namespace = self.txn.namespace;
        let jobs = self.fill_receive(namespace, receive);
        if !jobs.is_empty() || receive.wait_ms == 0 {
            return Ok(QueueReply::Received(Received { jobs, settled, waited_ms: 0 }).into());
        }
        self.check_alone()?;
        let queues = receive.queues.iter().map(|name| ObjectKey::of::<Queue>(namespace, name));
        let mut on: Vec<ObjectKey> = queues.collect();
        if let (false, [queue]) = (receive.groups.is_empty(), &on[..]) {
            on = receive.groups.iter().map(|group| group_place(queue, group)).collect();
        }
        on.sort_unstable();
        on.dedup();
        let limit = self.m.limit(Limit::LockWaiters);
        if let Some(full) = on.iter().find(|key| self.m.waits.len(key) >= limit) {
            let why = format!("{limit} receivers wait for queue `{}`", shown(full));
            return Err(Refusal::new(RefusalCode::Quota, why).fact("name", shown(full)).fact("limit", limit).into());
        }
        let waiting = QueueOp::Receive(Receive { settled, ..receive.clone() });
        self.wait(Place {
            on,
            rank: 0,
            session: SessionId(0),
            owner: receive.receiver.clone(),
            deadline: Some(self.m.stamp.plus(receive.wait_ms)),
            ask: Ask::Native(Box::new(crate::native::NativeOp::Queue(waiting))),
        });
        Ok(OpReply::Done)
    }

    /// Ends the waits of a receiver as if their time were over.
    pub(super) fn leave_queues(&mut self, receiver: &[u8]) -> u64 {
        let mut left = 0;
        for number in self.m.waits.of_owner(&OwnerKey::new(receiver, SessionId(0))) {
            let Some(receive) = self.waiting_receive(number) else { continue };
            let here = self.m.waits.get(number).and_then(|waiter| waiter.on.first()).map(ObjectKey::namespace);
            if here == Some(self.txn.namespace) {
                let waited_ms = self.waited_ms(number);
                let empty = Received { jobs: Vec::new(), settled: receive.settled, waited_ms };
                self.end_wait(number, Ok(QueueReply::Received(empty).into()));
                left += 1;
            }
        }
        left
    }

    // ---- Receipts ----

    /// The job whose newest delivery this is the receipt of, while that is under way.
    fn leased_job(&self, receipt: &Receipt) -> Result<(&Job, &JobLease), Rejection> {
        let job = self.object::<Job>(&receipt.id.key(self.txn.namespace));
        match job.map(|job| (job, &job.state)) {
            // One commit gives a job one token, so what it delivers it cannot take back.
            Some((job, JobState::Leased(lease)))
                if job.token == receipt.token && job.token < self.at && lease.until > self.m.stamp =>
            {
                Ok((job, lease))
            }
            _ => Err(fenced_receipt(receipt, job, self.m.stamp)),
        }
    }

    fn queue_of(&self, job: &Job) -> Option<ObjectKey> {
        self.m.objects.indexes.queues.name(job.queue).cloned()
    }

    pub(super) fn ack_jobs(&mut self, acks: &AckJobs) -> Result<OpReply, Rejection> {
        if acks.acks.is_empty() || acks.acks.len() > JOBS_PER_CALL {
            return Err(invalid(format!("one call settles 1 to {JOBS_PER_CALL} receipts")));
        }
        let mut settled = Vec::with_capacity(acks.acks.len());
        let mut touched: Vec<Touched> = Vec::new();
        for ack in &acks.acks {
            let id = ack.receipt.id;
            match self.ack_job(ack, &mut touched) {
                Ok(again) => settled.push(Settled { id, again, refusal: None }),
                Err(Rejection::Refused(refusal)) if acks.each => {
                    settled.push(Settled { id, again: false, refusal: Some(refusal) });
                }
                Err(rejection) => return Err(rejection),
            }
        }
        touched.sort_unstable();
        touched.dedup();
        for (key, group) in &touched {
            self.serve_queue(key, group.as_ref());
        }
        match &acks.receive {
            Some(receive) => self.receive_jobs(receive, settled),
            None => Ok(QueueReply::Received(Received { jobs: Vec::new(), settled, waited_ms: 0 }).into()),
        }
    }

    /// `true`: this very receipt had ended the job before.
    fn ack_job(&mut self, ack: &Ack, touched: &mut Vec<Touched>) -> Result<bool, Rejection> {
        if ack.result.len() > JOB_RESULT_MAX {
            return Err(invalid(format!("a result has at most {JOB_RESULT_MAX} bytes")));
        }
        let job_key = ack.receipt.id.key(self.txn.namespace);
        if let Some(job) = self.object::<Job>(&job_key)
            && matches!(job.state, JobState::Done(_))
            && job.token == ack.receipt.token
        {
            return Ok(true);
        }
        let job = self.leased_job(&ack.receipt)?.0.clone();
        let Some(key) = self.queue_of(&job) else { return Err(fenced_receipt(&ack.receipt, None, self.m.stamp)) };
        let group = job.group().cloned();
        self.finish_job(&key, ack.receipt.id, job, Ending::Done(&ack.result));
        self.trim_done(&key);
        self.count_for_breaker(&key, false);
        touched.push((key, group));
        Ok(false)
    }

    /// Ends a job for good and lets its group go on.
    pub(super) fn finish_job(&mut self, key: &ObjectKey, id: JobId, mut job: Job, ending: Ending<'_>) {
        let Some(settings) = self.object::<Queue>(key).map(|queue| &queue.settings) else { return };
        let at = self.m.stamp;
        let kept_ms = match ending {
            Ending::Dead(_) => settings.dead_retention_ms,
            _ => job.terms.as_ref().and_then(|terms| terms.retention_ms).unwrap_or(settings.retention_ms),
        };
        // A window outlasts the record, or the key would be free too early.
        let gone = at.plus(kept_ms).max(job.window_end().unwrap_or(at));
        let end = |why: &str, result: &[u8]| Arc::new(JobEnd { at, gone, why: why.into(), result: result.into() });
        job.state = match ending {
            Ending::Done(result) => JobState::Done(end("", result)),
            Ending::Dead(why) => JobState::Dead(end(why, b"")),
            Ending::Cancelled(why) => JobState::Cancelled(end(why, b"")),
        };
        if !matches!(ending, Ending::Dead(_)) {
            job.payload = Arc::default();
        }
        let group = job.group().cloned();
        let job_key = id.key(key.namespace());
        if gone > at {
            self.put_object(&job_key, job);
        } else {
            self.remove_object(&job_key);
        }
        if let Some(group) = group {
            self.advance_group(key, &group, None);
        }
    }

    /// Takes the oldest records of done jobs where there are too many: more than one, so that a lower limit is reached.
    fn trim_done(&mut self, key: &ObjectKey) {
        for _ in 0..2 {
            let Some(queue) = self.object::<Queue>(key) else { return };
            let lines = self.queue_lines(queue.number);
            let Some(id) = lines.and_then(|lines| lines.done_beyond(queue.settings.done_max)) else { return };
            self.remove_object(&id.key(key.namespace()));
        }
    }

    pub(super) fn nack_job(&mut self, nack: &Nack) -> Result<Moved, Rejection> {
        if nack.delay_ms.is_some_and(|ms| ms > DELAY_MAX_MS) {
            return Err(invalid(format!("a delay has at most {DELAY_MAX_MS} ms")));
        }
        let error = cut(&nack.reason);
        self.end_job_delivery(
            &nack.receipt,
            End { how: HowEnded::Failed, error, delay_ms: nack.delay_ms, dead: nack.dead },
        )
    }

    pub(super) fn release_job(&mut self, receipt: &Receipt) -> Result<Moved, Rejection> {
        self.end_job_delivery(
            receipt,
            End { how: HowEnded::Released, error: Box::default(), delay_ms: Some(0), dead: false },
        )
    }

    fn end_job_delivery(&mut self, receipt: &Receipt, end: End) -> Result<Moved, Rejection> {
        let job = self.leased_job(receipt)?.0.clone();
        let Some(key) = self.queue_of(&job) else { return Err(fenced_receipt(receipt, None, self.m.stamp)) };
        let group = job.group().cloned();
        let moved = self.give_job_back(&key, receipt.id, job, end);
        self.serve_queue(&key, group.as_ref());
        Ok(moved)
    }

    /// Ends a delivery: the job comes back, now or later, or has come to its end.
    fn give_job_back(&mut self, key: &ObjectKey, id: JobId, mut job: Job, end: End) -> Moved {
        let JobState::Leased(lease) = &job.state else { return moved(&job, 0) };
        let lease = lease.clone();
        let past = PastDelivery {
            attempt: job.attempt,
            token: job.token,
            worker: lease.worker.clone(),
            since: lease.since,
            ended: self.m.stamp,
            how: end.how,
            error: end.error.clone(),
        };
        remember(&mut job, past);
        if end.how == HowEnded::Released {
            job.attempt = job.attempt.saturating_sub(1);
        } else {
            self.count_for_breaker(key, true);
        }
        let Some(queue) = self.object::<Queue>(key) else { return moved(&job, 0) };
        // While a breaker is open the fault is not taken for the job's.
        let spent = job.attempt >= max_attempts(&job, &queue.settings) && queue.tripped.is_none();
        let delay_ms = end.delay_ms.unwrap_or_else(|| backoff_ms(&queue.settings, id, job.attempt));
        if lease.cancel {
            self.finish_job(key, id, job.clone(), Ending::Cancelled("cancelled while it ran"));
            return Moved { state: 7, delay_ms: 0, attempt: job.attempt };
        }
        if end.dead || (spent && end.how != HowEnded::Released) {
            let why = if end.dead { "rejected by its worker" } else { "all attempts were spent" };
            self.finish_job(key, id, job.clone(), Ending::Dead(why));
            return Moved { state: 6, delay_ms: 0, attempt: job.attempt };
        }
        let group = job.group().cloned();
        if let Some(group) = &group {
            self.make_room_in_group(key, job.queue, group, job.order.as_deref().copied().unwrap_or(id));
        }
        job.state = match (delay_ms, &group) {
            (0, None) => JobState::Ready(self.turn_of_job(key, &job, true)),
            // Its group still counts this delivery.
            (0, Some(_)) => JobState::Held,
            (delay_ms, _) => JobState::Backoff(self.m.stamp.plus(delay_ms)),
        };
        let job_key = id.key(key.namespace());
        self.put_object(&job_key, job);
        if let Some(group) = &group {
            self.advance_group(key, group, Some(id));
        }
        self.object::<Job>(&job_key).map_or(Moved { state: 2, delay_ms, attempt: 0 }, |job| moved(job, delay_ms))
    }

    pub(super) fn job_heartbeat(&mut self, heartbeat: &JobHeartbeat) -> Result<Beat, Rejection> {
        if heartbeat.progress.as_ref().is_some_and(|progress| progress.len() > JOB_RESULT_MAX) {
            return Err(invalid(format!("a progress has at most {JOB_RESULT_MAX} bytes")));
        }
        let (job, lease) = self.leased_job(&heartbeat.receipt)?;
        let (mut job, mut lease) = (job.clone(), lease.clone());
        let now = self.m.stamp;
        let extend_ms = if heartbeat.extend_ms == 0 { lease.visibility_ms } else { heartbeat.extend_ms };
        lease.until = now.plus(extend_ms).min(lease.run_until);
        if let Some(progress) = &heartbeat.progress {
            lease.progress = progress.clone();
        }
        let key = self.queue_of(&job);
        let queue = key.and_then(|key| self.object::<Queue>(&key));
        let urgent =
            self.queue_lines(job.queue).and_then(|lines| lines.first_rank()).is_some_and(|rank| rank < job.rank);
        let beat = Beat {
            remaining_ms: lease.until.0 - now.0,
            cancel_requested: lease.cancel,
            should_yield: urgent || queue.is_some_and(|queue| queue.settings.paused),
        };
        job.state = JobState::Leased(Arc::new(lease));
        self.put_object(&heartbeat.receipt.id.key(self.txn.namespace), job);
        Ok(beat)
    }

    // ---- Time ----

    /// The time of a job has come: its delay, its visibility, its time to live or its retention is over.
    pub(super) fn job_due(&mut self, job_key: &ObjectKey) {
        let Some(mut job) = self.object::<Job>(job_key).cloned() else { return };
        let Some(key) = self.queue_of(&job) else { return self.remove_object(job_key) };
        let id = JobId::of_key(job_key);
        let group = job.group().cloned();
        match &job.state {
            JobState::Dead(_) => {
                self.remove_object(job_key);
                // It may have been all that blocked its group.
                let Some(group) = &group else { return };
                self.advance_group(&key, group, None);
            }
            state if state.finished().is_some() => return self.remove_object(job_key),
            JobState::Leased(_) => {
                let error = "its visibility was over".into();
                let end = End { how: HowEnded::Expired, error, delay_ms: Some(0), dead: false };
                self.give_job_back(&key, id, job, end);
            }
            _ if job.expires().is_some_and(|expires| expires <= self.m.stamp) => {
                let why = "it was not delivered in its time to live";
                self.finish_job(&key, id, job, Ending::Dead(why));
            }
            state => {
                let back = matches!(state, JobState::Backoff(_));
                job.state = self.open_job_state(&key, id, &job, back);
                self.put_object(job_key, job);
            }
        }
        self.serve_queue(&key, group.as_ref());
    }
}

impl Machine {
    /// Refuses unless this is the receipt of the newest delivery of the job, and that is under way.
    pub(crate) fn judge_receipt(&self, namespace: NamespaceId, receipt: &Receipt) -> Result<(), Rejection> {
        match self.objects.get::<Job>(&receipt.id.key(namespace)) {
            Some(Job { token, state: JobState::Leased(lease), .. })
                if *token == receipt.token && lease.until > self.stamp =>
            {
                Ok(())
            }
            job => Err(fenced_receipt(receipt, job, self.stamp)),
        }
    }
}

fn fenced_receipt(receipt: &Receipt, job: Option<&Job>, now: LogTime) -> Rejection {
    let (id, presented) = (receipt.id, receipt.token);
    let start = format!("receipt {presented} of job {id} is stale");
    let refusal = match job {
        None => Refusal::new(RefusalCode::Fenced, format!("{start}: the job is gone")).fact("state", "gone"),
        Some(job) => {
            let (state, attempt) = (job.state.name(), job.attempt);
            let why = match &job.state {
                JobState::Leased(lease) if lease.until <= now => format!("{start}: the visibility of the job is over"),
                _ => format!("{start}: the job is {state}, its newest delivery is {} (attempt {attempt})", job.token),
            };
            Refusal::new(RefusalCode::Fenced, why)
                .fact("state", state)
                .fact("attempt", attempt)
                .fact("newest", job.token)
                .fact("since_ms", now.0.saturating_sub(job.since().0))
        }
    };
    refusal.fact("name", id).fact("presented", presented).into()
}

/// A delay goes no further.
pub(super) const DELAY_MAX_MS: u64 = 366 * 86_400_000;

fn moved(job: &Job, delay_ms: u64) -> Moved {
    Moved { state: job.state.place() as u8, delay_ms, attempt: job.attempt }
}

fn max_attempts(job: &Job, settings: &QueueSettings) -> u32 {
    match job.terms.as_ref().map_or(0, |terms| terms.max_attempts) {
        0 => settings.max_attempts,
        own => own,
    }
}

fn remember(job: &mut Job, past: PastDelivery) {
    let mut all = job.past.as_ref().map_or_else(Vec::new, |past| past.to_vec());
    if all.len() == PAST_MAX {
        all.remove(0);
    }
    all.push(past);
    job.past = Some(Arc::new(all));
}

/// The pause after attempt `n`: `first * 2^(n-1)` up to a bound, and with jitter any part of that, drawn from the job and the attempt.
pub(super) fn backoff_ms(settings: &QueueSettings, id: JobId, attempt: u32) -> u64 {
    let doubled = settings.backoff_first_ms.saturating_mul(1 << attempt.saturating_sub(1).min(40));
    let bound = doubled.min(settings.backoff_max_ms);
    if !settings.jitter || bound == 0 {
        return bound;
    }
    let drawn = [u64::from(id.index), u64::from(attempt)].into_iter().fold(codec::mix(1, id.revision), codec::mix);
    drawn % (bound + 1)
}

/// Where receivers wait that want one group only: no name of a queue has a zero byte.
pub(super) fn group_place(queue: &ObjectKey, group: &[u8]) -> ObjectKey {
    let name = [queue.name(), b"\0", group].concat();
    ObjectKey::of::<Queue>(queue.namespace(), &name)
}

fn group_of(new: &NewJob) -> Option<&Arc<[u8]>> {
    new.terms.as_ref()?.group.as_ref()
}

pub(super) fn shown(key: &ObjectKey) -> String {
    key.name().escape_ascii().to_string()
}

pub(super) fn no_queue(key: &ObjectKey) -> Rejection {
    let why = format!("there is no queue `{}`", shown(key));
    Refusal::new(RefusalCode::NotFound, why).fact("name", shown(key)).into()
}

pub(crate) fn check_queue_name(name: &[u8]) -> Result<(), Rejection> {
    if name.is_empty() || name.len() > QUEUE_NAME_MAX || name.contains(&0) {
        return Err(invalid(format!("the name of a queue has 1 to {QUEUE_NAME_MAX} bytes, none of them zero")));
    }
    Ok(())
}

pub(crate) fn check_job(new: &NewJob) -> Result<(), Rejection> {
    if new.payload.len() > JOB_PAYLOAD_MAX {
        let why = format!("a payload of {} bytes is too large", new.payload.len());
        return Err(Refusal::new(RefusalCode::TooLarge, why).fact("limit", JOB_PAYLOAD_MAX).into());
    }
    if !(-8..=7).contains(&new.priority) {
        return Err(invalid("a priority is between -8 and 7"));
    }
    if new.delay_ms > DELAY_MAX_MS {
        return Err(invalid(format!("a delay has at most {DELAY_MAX_MS} ms")));
    }
    let Some(terms) = &new.terms else { return Ok(()) };
    let dedup = terms.dedup.as_ref().map(|dedup| &dedup.key);
    let mut names = [terms.tenant.as_ref(), terms.group.as_ref(), dedup].into_iter().flatten();
    if names.any(|name| name.is_empty() || name.len() > JOB_KEY_MAX) {
        return Err(invalid(format!("a tenant, a group and a key have 1 to {JOB_KEY_MAX} bytes")));
    }
    let headers: usize = terms.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    if headers + terms.traceparent.len() + terms.tracestate.len() > JOB_HEADERS_MAX {
        return Err(invalid(format!("headers have at most {JOB_HEADERS_MAX} bytes")));
    }
    if terms.max_attempts > 1_000 || terms.visibility_ms > RUN_MAX_MS || terms.ttl_ms > DELAY_MAX_MS {
        return Err(invalid("a number of attempts, a visibility or a time to live is out of its range"));
    }
    Ok(())
}

fn check_receive(receive: &Receive) -> Result<(), Rejection> {
    let places = [receive.queues.len(), receive.groups.len()];
    if receive.queues.is_empty() || places.iter().any(|places| *places > RECEIVE_PLACES_MAX) {
        return Err(invalid(format!("a receive names 1 to {RECEIVE_PLACES_MAX} queues, and as many groups at most")));
    }
    receive.queues.iter().try_for_each(|name| check_queue_name(name))?;
    if !receive.groups.is_empty() && receive.queues.len() > 1 {
        return Err(invalid("a receive that names groups names one queue"));
    }
    if receive.groups.iter().any(|group| group.is_empty() || group.len() > JOB_KEY_MAX) {
        return Err(invalid(format!("a group has 1 to {JOB_KEY_MAX} bytes")));
    }
    if receive.max == 0 || receive.max as usize > JOBS_PER_CALL {
        return Err(invalid(format!("a receive asks for 1 to {JOBS_PER_CALL} jobs")));
    }
    if receive.wait_ms > WAIT_MAX_MS || receive.visibility_ms > RUN_MAX_MS {
        return Err(invalid(format!(
            "a receive waits {WAIT_MAX_MS} ms at most, for a visibility of at most {RUN_MAX_MS} ms"
        )));
    }
    if receive.worker.len() > TEXT_MAX || receive.receiver.len() > TEXT_MAX {
        return Err(invalid(format!("the names of a worker and a receiver have at most {TEXT_MAX} bytes")));
    }
    Ok(())
}

/// As much of a text as is kept.
pub(super) fn cut(text: &str) -> Box<str> {
    let mut end = text.len().min(ERROR_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].into()
}
