//! What follows from the table of jobs: who is next, who waits behind whom, which keys are taken.
//!
//! Promises. X1: who is next in a queue is found in a logarithm of its length, whatever is scheduled, held or capped. X2: it all follows from the
//! jobs and queues alone, in whatever order they are loaded. X3: a job is in one order of its queue at a time.
//! Relies on. `objects.rs` tells of every change of a job or a queue, undone ones too.

use super::job::{Job, JobId, JobState};
use crate::objects::ObjectKey;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// `None`: jobs that name no tenant, which are a tenant together that no cap binds.
pub(crate) type Tenant = Option<Arc<[u8]>>;

#[derive(Default)]
pub(crate) struct Index {
    lines: BTreeMap<u64, Lines>,
    /// The queues by their numbers.
    names: BTreeMap<u64, ObjectKey>,
    /// Keys that may keep others out.
    unique: BTreeSet<(u64, Arc<[u8]>, JobId)>,
}

/// The jobs of one queue.
#[derive(Default)]
pub(crate) struct Lines {
    /// By the place of the state in `JOB_STATES`.
    pub(crate) counts: [u64; 8],
    /// Of those that are done: how many may be trimmed.
    done_free: u64,
    /// The first job of each rank of each tenant, in the order of delivery.
    heads: BTreeSet<Head>,
    /// The same for tenants that have as many deliveries under way as they may.
    capped: BTreeSet<Head>,
    ready: BTreeMap<(u8, Tenant), BTreeSet<(u64, JobId)>>,
    /// Deliveries under way, of jobs that name a tenant.
    leased: BTreeMap<Arc<[u8]>, u64>,
    cap: u64,
    /// Everything that is not ready, by the place of its state.
    others: BTreeSet<(u8, JobId)>,
    groups: BTreeMap<Arc<[u8]>, Group>,
}

type Head = (u8, u64, JobId, Tenant);

/// Done jobs that deduplication still needs stand apart from those that may be trimmed.
const DONE: u8 = 5;
const DONE_KEPT: u8 = 8;

/// One FIFO group.
#[derive(Default)]
pub(crate) struct Group {
    /// Jobs to be delivered, in their order.
    line: BTreeSet<(JobId, JobId)>,
    pub(crate) leased: u64,
    pub(crate) dead: u64,
}

impl Group {
    /// The place and the name of the first job to be delivered.
    pub(crate) fn first(&self) -> Option<(JobId, JobId)> {
        self.line.first().copied()
    }

    fn is_empty(&self) -> bool {
        self.line.is_empty() && self.leased == 0 && self.dead == 0
    }
}

/// The place of a job that is ready, or else the number of its other order.
#[derive(PartialEq)]
enum Slot {
    Ready(u64),
    Other(u8),
}

fn slot(job: &Job) -> Slot {
    match &job.state {
        JobState::Ready(turn) => Slot::Ready(*turn),
        JobState::Done(_) if job.window_end().is_some() => Slot::Other(DONE_KEPT),
        state => Slot::Other(state.place() as u8),
    }
}

impl Index {
    pub(crate) fn lines(&self, queue: u64) -> Option<&Lines> {
        self.lines.get(&queue)
    }

    /// The queues that have or had jobs, with their names.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&ObjectKey, &Lines)> {
        self.lines.iter().filter_map(|(number, lines)| Some((self.names.get(number)?, lines)))
    }

    pub(crate) fn name(&self, queue: u64) -> Option<&ObjectKey> {
        self.names.get(&queue)
    }

    /// Jobs with this key that may keep others out, the newest first.
    pub(crate) fn with_key(&self, queue: u64, key: &Arc<[u8]>) -> impl Iterator<Item = JobId> {
        let first = JobId { revision: 0, index: 0 };
        let last = JobId { revision: u64::MAX, index: u32::MAX };
        self.unique.range((queue, key.clone(), first)..=(queue, key.clone(), last)).rev().map(|(_, _, id)| *id)
    }

    pub(crate) fn note_queue(&mut self, number: u64, key: Option<&ObjectKey>, cap: u64) {
        match key {
            Some(key) => drop(self.names.insert(number, key.clone())),
            None => drop(self.names.remove(&number)),
        }
        let lines = self.lines.entry(number).or_default();
        lines.set_cap(cap);
        if key.is_none() && lines.is_empty() {
            self.lines.remove(&number);
        }
    }

    pub(crate) fn note_job(&mut self, id: JobId, old: Option<&Job>, new: Option<&Job>) {
        if let Some(old) = old {
            if old.is_unique()
                && let Some(dedup) = old.dedup()
            {
                self.unique.remove(&(old.queue, dedup.key.clone(), id));
            }
            if let Some(lines) = self.lines.get_mut(&old.queue) {
                lines.take(id, old, new);
            }
        }
        if let Some(new) = new {
            if new.is_unique()
                && let Some(dedup) = new.dedup()
            {
                self.unique.insert((new.queue, dedup.key.clone(), id));
            }
            self.lines.entry(new.queue).or_default().put(id, new, old);
        } else if let Some(old) = old
            && !self.names.contains_key(&old.queue)
            && self.lines.get(&old.queue).is_some_and(Lines::is_empty)
        {
            self.lines.remove(&old.queue);
        }
    }
}

/// Whether one of the two stands where the other does.
fn same_slot(a: &Job, b: Option<&Job>) -> bool {
    b.is_some_and(|b| a.queue == b.queue && a.rank == b.rank && slot(a) == slot(b))
}

impl Lines {
    fn is_empty(&self) -> bool {
        self.counts.iter().all(|count| *count == 0)
    }

    pub(crate) fn is_without_jobs(&self) -> bool {
        self.is_empty()
    }

    /// The next job to be delivered.
    pub(crate) fn next(&self) -> Option<JobId> {
        self.heads.first().map(|(_, _, id, _)| *id)
    }

    /// The rank of the next job.
    pub(crate) fn first_rank(&self) -> Option<u8> {
        self.heads.first().map(|(rank, ..)| *rank)
    }

    pub(crate) fn group(&self, name: &[u8]) -> Option<&Group> {
        self.groups.get(name)
    }

    pub(crate) fn groups(&self) -> impl Iterator<Item = (&Arc<[u8]>, &Group)> {
        self.groups.iter()
    }

    /// The earliest turn among what is ready under a rank.
    pub(crate) fn first_turn(&self, rank: u8) -> Option<u64> {
        first_head(&self.heads, rank).into_iter().chain(first_head(&self.capped, rank)).min()
    }

    /// The turn of what is delivered next under a rank. What a cap holds back has turns of long ago.
    pub(crate) fn turn_under_way(&self, rank: u8) -> Option<u64> {
        first_head(&self.heads, rank).or_else(|| first_head(&self.capped, rank))
    }

    /// The latest turn of what is ready of a tenant under a rank.
    pub(crate) fn last_turn(&self, rank: u8, tenant: &Tenant) -> Option<u64> {
        self.ready.get(&(rank, tenant.clone()))?.last().map(|(turn, _)| *turn)
    }

    /// Jobs of one state, by the place of its name, after `after`: ready ones by rank and turn of their tenants, others by id.
    pub(crate) fn of_state(&self, place: usize, after: Option<JobId>) -> Box<dyn Iterator<Item = JobId> + '_> {
        let (Ok(tag), true) = (u8::try_from(place), place < 8) else { return Box::new(std::iter::empty()) };
        let from = after.map_or((tag, JobId { revision: 0, index: 0 }), |after| (tag, after));
        let of = move |tag: u8| {
            let range = self.others.range((tag, from.1)..);
            range.take_while(move |(t, _)| *t == tag).map(|(_, id)| *id).filter(move |id| Some(*id) != after)
        };
        match tag {
            3 => Box::new(self.ready.values().flatten().map(|(_, id)| *id)),
            DONE => Box::new(of(DONE).chain(of(DONE_KEPT))),
            tag => Box::new(of(tag)),
        }
    }

    /// The oldest done job that may be trimmed, where there are more of those than this.
    pub(crate) fn done_beyond(&self, max: u64) -> Option<JobId> {
        if self.done_free <= max {
            return None;
        }
        let (tag, id) = self.others.range((DONE, JobId { revision: 0, index: 0 })..).next()?;
        (*tag == DONE).then_some(*id)
    }

    /// The job that has been ready for longest, as far as ids tell: the oldest of the heads.
    pub(crate) fn oldest_ready(&self) -> Option<JobId> {
        self.heads.iter().chain(&self.capped).map(|(_, _, id, _)| *id).min()
    }

    pub(crate) fn tenants(&self) -> BTreeMap<Arc<[u8]>, (u64, u64)> {
        let mut tenants: BTreeMap<Arc<[u8]>, (u64, u64)> = BTreeMap::new();
        for ((_, tenant), ready) in &self.ready {
            if let Some(tenant) = tenant {
                tenants.entry(tenant.clone()).or_default().0 += ready.len() as u64;
            }
        }
        for (tenant, leased) in &self.leased {
            tenants.entry(tenant.clone()).or_default().1 = *leased;
        }
        tenants
    }

    fn take(&mut self, id: JobId, old: &Job, new: Option<&Job>) {
        self.counts[old.state.place()] -= 1;
        self.done_free -= u64::from(slot(old) == Slot::Other(DONE));
        if !same_slot(old, new) {
            match slot(old) {
                Slot::Ready(turn) => self.take_ready(id, old, turn),
                Slot::Other(tag) => drop(self.others.remove(&(tag, id))),
            }
        }
        let leased = matches!(old.state, JobState::Leased(_));
        if leased && let Some(tenant) = old.tenant() {
            self.count_leased(tenant, false);
        }
        if let Some(name) = old.group()
            && let Some(group) = self.groups.get_mut(name)
        {
            match &old.state {
                JobState::Leased(_) => group.leased -= 1,
                JobState::Dead(_) => group.dead -= 1,
                state if state.is_pending() => drop(group.line.remove(&(order(id, old), id))),
                _ => {}
            }
            if group.is_empty() {
                self.groups.remove(name);
            }
        }
    }

    fn put(&mut self, id: JobId, new: &Job, old: Option<&Job>) {
        self.counts[new.state.place()] += 1;
        self.done_free += u64::from(slot(new) == Slot::Other(DONE));
        if !same_slot(new, old) {
            match slot(new) {
                Slot::Ready(turn) => self.put_ready(id, new, turn),
                Slot::Other(tag) => drop(self.others.insert((tag, id))),
            }
        }
        let leased = matches!(new.state, JobState::Leased(_));
        if leased && let Some(tenant) = new.tenant() {
            self.count_leased(tenant, true);
        }
        let in_group = matches!(new.state, JobState::Leased(_) | JobState::Dead(_)) || new.state.is_pending();
        if in_group && let Some(name) = new.group() {
            let group = self.groups.entry(name.clone()).or_default();
            match &new.state {
                JobState::Leased(_) => group.leased += 1,
                JobState::Dead(_) => group.dead += 1,
                _ => drop(group.line.insert((order(id, new), id))),
            }
        }
    }

    fn put_ready(&mut self, id: JobId, job: &Job, turn: u64) {
        let tenant = job.tenant().cloned();
        let line = self.ready.entry((job.rank, tenant.clone())).or_default();
        let before = line.first().copied();
        line.insert((turn, id));
        let after = line.first().copied();
        self.move_head(job.rank, tenant, before, after);
    }

    fn take_ready(&mut self, id: JobId, job: &Job, turn: u64) {
        let key = (job.rank, job.tenant().cloned());
        let Some(line) = self.ready.get_mut(&key) else { return };
        let before = line.first().copied();
        line.remove(&(turn, id));
        let after = line.first().copied();
        if line.is_empty() {
            self.ready.remove(&key);
        }
        self.move_head(job.rank, key.1, before, after);
    }

    fn move_head(&mut self, rank: u8, tenant: Tenant, before: Option<(u64, JobId)>, after: Option<(u64, JobId)>) {
        if before == after {
            return;
        }
        let heads = if self.is_capped(tenant.as_ref()) { &mut self.capped } else { &mut self.heads };
        if let Some((turn, id)) = before {
            heads.remove(&(rank, turn, id, tenant.clone()));
        }
        if let Some((turn, id)) = after {
            heads.insert((rank, turn, id, tenant));
        }
    }

    /// Whether a tenant has as many deliveries under way as it may.
    pub(crate) fn is_capped(&self, tenant: Option<&Arc<[u8]>>) -> bool {
        let leased = tenant.and_then(|tenant| self.leased.get(tenant));
        self.cap > 0 && leased.is_some_and(|leased| *leased >= self.cap)
    }

    fn count_leased(&mut self, tenant: &Arc<[u8]>, more: bool) {
        let before = self.is_capped(Some(tenant));
        let leased = self.leased.entry(tenant.clone()).or_default();
        *leased = if more { *leased + 1 } else { *leased - 1 };
        if *leased == 0 {
            self.leased.remove(tenant);
        }
        let tenant = Some(tenant.clone());
        if self.is_capped(tenant.as_ref()) != before {
            self.move_tenant(&tenant, before);
        }
    }

    /// Moves the heads of a tenant to where they now belong.
    fn move_tenant(&mut self, tenant: &Tenant, was_capped: bool) {
        let (from, to) = match was_capped {
            true => (&mut self.capped, &mut self.heads),
            false => (&mut self.heads, &mut self.capped),
        };
        for rank in 0..=15 {
            let Some((turn, id)) = self.ready.get(&(rank, tenant.clone())).and_then(|line| line.first()) else {
                continue;
            };
            let head = (rank, *turn, *id, tenant.clone());
            from.remove(&head);
            to.insert(head);
        }
    }

    fn set_cap(&mut self, cap: u64) {
        if self.cap == cap {
            return;
        }
        self.cap = cap;
        let heads = std::mem::take(&mut self.heads).into_iter().chain(std::mem::take(&mut self.capped));
        for head in heads.collect::<Vec<_>>() {
            let heads = if self.is_capped(head.3.as_ref()) { &mut self.capped } else { &mut self.heads };
            heads.insert(head);
        }
    }
}

fn first_head(heads: &BTreeSet<Head>, rank: u8) -> Option<u64> {
    let zero = JobId { revision: 0, index: 0 };
    let (found, turn, ..) = heads.range((rank, 0, zero, None)..).next()?;
    (*found == rank).then_some(*turn)
}

/// Its place in the order of its group.
fn order(id: JobId, job: &Job) -> JobId {
    job.order.as_deref().copied().unwrap_or(id)
}
