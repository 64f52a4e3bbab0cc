//! The search for deadlocks among locks: would whoever is about to wait be waiting for itself?
//!
//! Promises. C1: an owner waits for the owners of what is held against it and for those ahead of it in the queue, whoever is about to go before it
//! by a higher priority too; where a chain of such waits comes back to whoever is about to wait, it is found before the wait stands. C2: for
//! permits that is so only if all who are not in such a chain could not free enough. C3: the search is bounded by [`EDGES_MAX`]; beyond it the
//! wait stands. It is the same on each member.
//! Not promised. A deadlock with anything but locks, or in which an owner waits under a name that it does not hold under. Their wait deadlines
//! end those.
//! Relies on. Owners, not sessions: one owner may have many. Whoever is not waiting will release what it holds some day.

use crate::apply::Machine;
use crate::lock_ops::{Want, items_of};
use crate::locks::{HoldMode, Lock, LockKey, Permits};
use crate::native::{Refusal, RefusalCode};
use crate::reply::{Holder, Rejection};
use crate::types::*;
use crate::waits::{OwnerKey, WaiterNumber};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;

/// Edges that one search looks at.
const EDGES_MAX: usize = 10_000;
/// Owners in one chain: each is a call within a call.
const DEPTH_MAX: usize = 200;

/// One wait of a cycle.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) owner: OwnerKey,
    pub(crate) lock: LockKey,
    /// `None`: whoever is about to wait.
    pub(crate) waiter: Option<WaiterNumber>,
    pub(crate) rank: i64,
    /// Whom it waits for.
    blocker: OwnerKey,
    /// Under which token that one holds the lock; zero: it is only ahead in the queue.
    token: Revision,
    /// Since when it holds or waits.
    pub(crate) since: LogTime,
}

pub(crate) enum Search {
    Nothing,
    Cycle(Vec<Step>),
    /// Too much to look at.
    GaveUp,
}

struct Chain<'a> {
    m: &'a Machine,
    target: OwnerKey,
    /// What the target is about to wait for.
    want: &'a Want,
    edges: usize,
    depth: usize,
    gave_up: bool,
    /// Some of those who hold permits were found to be stuck, but not enough.
    is_partial: bool,
    steps: Vec<Step>,
    /// Whether an owner was found to wait for the target; while it is looked at, it does not.
    owners: BTreeMap<OwnerKey, bool>,
    /// How much of each queue, and whether its holders, have been looked at.
    locks: BTreeMap<LockKey, ((i64, WaiterNumber), bool)>,
}

/// One wait as the search sees it.
#[derive(Clone, Copy)]
struct Waits<'a> {
    owner: &'a OwnerKey,
    waiter: Option<WaiterNumber>,
    place: (i64, WaiterNumber),
}

impl Machine {
    /// Looks for a chain of waits from this one back to its owner.
    pub(crate) fn find_deadlock(&self, want: &Want) -> Search {
        let owner = want.owner_key();
        let holds = want.items.iter().any(|(key, _)| self.locks.may_hold(key, &want.owner, want.session));
        // Who waits for several goes before others in one queue while it waits in the next.
        let passes = want.items.len() > 1
            && want.items.iter().any(|(key, _)| self.waits.is_someone_behind(&key.object(), want.rank));
        if !holds && !passes && self.waits.of_owner(&owner).is_empty() {
            return Search::Nothing;
        }
        let mut chain = Chain {
            m: self,
            target: owner.clone(),
            want,
            edges: 0,
            depth: 0,
            gave_up: false,
            is_partial: false,
            steps: Vec::new(),
            owners: BTreeMap::new(),
            locks: BTreeMap::new(),
        };
        let waits = Waits { owner: &owner, waiter: None, place: (want.rank, WaiterNumber::MAX) };
        let found = chain.is_stuck(waits, &want.items);
        match (found, chain.gave_up) {
            (true, _) => Search::Cycle(chain.steps),
            (false, true) => Search::GaveUp,
            // Those found to be free may have been looked at while they waited for one another.
            (false, false) if chain.is_partial => Knot::new(self, owner, want).find(),
            (false, false) => Search::Nothing,
        }
    }
}

impl Chain<'_> {
    /// All of the locks are needed, so one that never comes is enough.
    fn is_stuck(&mut self, waits: Waits<'_>, items: &[(LockKey, HoldMode)]) -> bool {
        items.iter().any(|(key, mode)| self.is_stuck_ahead(waits, key) || self.is_stuck_at_holders(waits, key, *mode))
    }

    /// Whoever is ahead in the queue goes first.
    fn is_stuck_ahead(&mut self, waits: Waits<'_>, key: &LockKey) -> bool {
        let m = self.m;
        let (seen, holders) = self.locks.get(key).copied().unwrap_or(((i64::MIN, 0), false));
        if seen < waits.place {
            self.locks.insert(key.clone(), (waits.place, holders));
        }
        for (number, ahead) in m.waits.queue_between(&key.object(), seen, waits.place) {
            let blocker = ahead.owner_key();
            // An earlier wait of the same owner for more of the same is no reason.
            if !self.count() || blocker == *waits.owner {
                continue;
            }
            if self.goes_on(waits, key, blocker, Revision(0), ahead.since) {
                return true;
            }
            debug_assert!(number > 0, "numbers begin at one");
        }
        self.is_passed_by_target(waits, key)
    }

    /// Whoever is about to wait with a higher priority will be ahead of those with a lower one.
    fn is_passed_by_target(&mut self, waits: Waits<'_>, key: &LockKey) -> bool {
        let is_passed = waits.waiter.is_some()
            && self.want.rank < waits.place.0
            && self.want.items.iter().any(|(wanted, _)| wanted == key);
        is_passed && self.count() && {
            let (target, now) = (self.target.clone(), self.m.stamp);
            self.goes_on(waits, key, target, Revision(0), now)
        }
    }

    fn is_stuck_at_holders(&mut self, waits: Waits<'_>, key: &LockKey, mode: HoldMode) -> bool {
        let m = self.m;
        if let HoldMode::Permits(permits) = mode {
            return self.is_stuck_at_permits(waits, key, permits);
        }
        let seen = self.locks.entry(key.clone()).or_insert(((i64::MIN, 0), false));
        if std::mem::replace(&mut seen.1, true) {
            return false;
        }
        let Some(lock) = m.locks.get(key) else { return false };
        // Readers do not wait for readers.
        let is_shared =
            matches!(lock, Lock::Wide(wide) if wide.live().next().is_some_and(|h| h.mode == HoldMode::Shared));
        if mode == HoldMode::Shared && is_shared {
            seen.1 = false;
            return false;
        }
        for holder in lock.holders() {
            let blocker = OwnerKey::new(&holder.owner, holder.session);
            if self.count() && self.goes_on(waits, key, blocker, holder.token, holder.since) {
                return true;
            }
        }
        false
    }

    /// Permits come as soon as enough of the others can go on.
    fn is_stuck_at_permits(&mut self, waits: Waits<'_>, key: &LockKey, permits: Permits) -> bool {
        let m = self.m;
        let Some(wide) = m.locks.wide(key) else { return false };
        let (mut stuck, mut cycle) = (0, None);
        for hold in wide.live() {
            if !self.count() {
                return false;
            }
            let base = self.steps.len();
            if self.goes_on(waits, key, hold.owner_key(), hold.holder.token, hold.holder.since) {
                stuck += hold.slots.len() as u64;
                let steps = self.steps.split_off(base);
                cycle.get_or_insert(steps);
            }
        }
        let coming = u64::from(wide.shape.permits).saturating_sub(stuck);
        if coming >= u64::from(permits.count) {
            self.is_partial |= stuck > 0;
            return false;
        }
        self.steps.extend(cycle.unwrap_or_default());
        true
    }

    /// Follows one edge; the steps stay if it leads to the target.
    fn goes_on(&mut self, waits: Waits<'_>, key: &LockKey, blocker: OwnerKey, token: Revision, since: LogTime) -> bool {
        self.steps.push(Step {
            owner: waits.owner.clone(),
            lock: key.clone(),
            waiter: waits.waiter,
            rank: waits.place.0,
            blocker: blocker.clone(),
            token,
            since,
        });
        let leads = self.leads(&blocker);
        if !leads {
            self.steps.pop();
        }
        leads
    }

    /// Whether an owner waits for the target, however far.
    fn leads(&mut self, owner: &OwnerKey) -> bool {
        if *owner == self.target {
            return true;
        }
        if let Some(known) = self.owners.get(owner) {
            return *known;
        }
        self.owners.insert(owner.clone(), false);
        if self.depth >= DEPTH_MAX {
            self.gave_up = true;
            return false;
        }
        self.depth += 1;
        let m = self.m;
        let leads = m.waits.of_owner(owner).into_iter().any(|number| {
            let Some(waiter) = m.waits.get(number) else { return false };
            let waits = Waits { owner, waiter: Some(number), place: (waiter.rank, number) };
            self.is_stuck(waits, &items_of(waiter))
        });
        self.depth -= 1;
        self.owners.insert(owner.clone(), leads);
        leads
    }

    /// Whether one edge more may be looked at.
    fn count(&mut self) -> bool {
        self.edges += 1;
        self.gave_up |= self.edges > EDGES_MAX;
        !self.gave_up
    }
}

/// Who in reach can never go on, where holders of permits wait for one another: a chain sees one holder at a time and cannot tell. Whoever can
/// go on once others have is taken out until nobody is; who is left waits for ever.
struct Knot<'a> {
    m: &'a Machine,
    target: OwnerKey,
    want: &'a Want,
    edges: usize,
    /// Who waits, in reach of the target, and is not taken out.
    waiting: BTreeMap<OwnerKey, Vec<WaiterNumber>>,
}

/// One who is in the way of a wait.
struct Blocker {
    owner: OwnerKey,
    token: Revision,
    since: LogTime,
    /// Of a holder of permits, how many; all others must go on.
    permits: Option<u64>,
}

/// A wait for one lock.
struct Open {
    owner: OwnerKey,
    waiter: Option<WaiterNumber>,
    place: (i64, WaiterNumber),
    key: LockKey,
    mode: HoldMode,
}

impl<'a> Knot<'a> {
    fn new(m: &'a Machine, target: OwnerKey, want: &'a Want) -> Self {
        Self { m, target, want, edges: 0, waiting: BTreeMap::new() }
    }

    fn find(mut self) -> Search {
        self.collect();
        let target = self.target.clone();
        while self.is_stuck(&target) {
            let owners: Vec<OwnerKey> = self.waiting.keys().cloned().collect();
            let free: Vec<OwnerKey> = owners.into_iter().filter(|owner| !self.is_stuck(owner)).collect();
            if self.gave_up() {
                return Search::GaveUp;
            }
            if free.is_empty() {
                let cycle = self.cycle();
                return if self.gave_up() { Search::GaveUp } else { cycle.map_or(Search::Nothing, Search::Cycle) };
            }
            free.iter().for_each(|owner| drop(self.waiting.remove(owner)));
        }
        if self.gave_up() { Search::GaveUp } else { Search::Nothing }
    }

    fn gave_up(&self) -> bool {
        self.edges > EDGES_MAX
    }

    /// Everybody whom the target waits for, however far.
    fn collect(&mut self) {
        let mut left = vec![self.target.clone()];
        while let Some(owner) = left.pop() {
            for open in self.open(&owner) {
                for Blocker { owner: blocker, .. } in self.blockers(&open) {
                    if self.is_left(&blocker) {
                        continue;
                    }
                    let waits = self.m.waits.of_owner(&blocker);
                    if !waits.is_empty() {
                        self.waiting.insert(blocker.clone(), waits);
                        left.push(blocker);
                    }
                }
            }
        }
    }

    /// What an owner waits for; of the target, what it is about to.
    fn open(&self, owner: &OwnerKey) -> Vec<Open> {
        let open = |waiter, place, items: Vec<(LockKey, HoldMode)>| {
            let owner = owner.clone();
            items.into_iter().map(move |(key, mode)| Open { owner: owner.clone(), waiter, place, key, mode })
        };
        if *owner == self.target {
            return open(None, (self.want.rank, WaiterNumber::MAX), self.want.items.clone()).collect();
        }
        let numbers = self.waiting.get(owner).into_iter().flatten();
        let waits = numbers.filter_map(|number| Some((*number, self.m.waits.get(*number)?)));
        waits.flat_map(|(number, w)| open(Some(number), (w.rank, number), items_of(w))).collect()
    }

    /// Nobody any more once there was too much to look at.
    fn blockers(&mut self, open: &Open) -> Vec<Blocker> {
        let m = self.m;
        let mut all = Vec::new();
        for (_, ahead) in m.waits.queue_between(&open.key.object(), (i64::MIN, 0), open.place) {
            self.edges += 1;
            if self.gave_up() {
                return Vec::new();
            }
            let owner = ahead.owner_key();
            // An earlier wait of the same owner for more of the same is no reason.
            if owner != open.owner {
                all.push(Blocker { owner, token: Revision(0), since: ahead.since, permits: None });
            }
        }
        let is_passed = open.waiter.is_some() && self.want.rank < open.place.0;
        if is_passed && self.want.items.iter().any(|(key, _)| *key == open.key) {
            all.push(Blocker { owner: self.target.clone(), token: Revision(0), since: m.stamp, permits: None });
        }
        let held =
            |owner, holder: &Holder, permits| Blocker { owner, token: holder.token, since: holder.since, permits };
        match m.locks.get(&open.key) {
            None => {}
            Some(Lock::Plain(plain)) => {
                let owner = OwnerKey::new(&plain.holder.owner, plain.holder.session);
                all.push(held(owner, &plain.holder, None));
            }
            Some(Lock::Wide(wide)) => {
                let is_permits = matches!(open.mode, HoldMode::Permits(_));
                // Readers do not wait for readers.
                let live = wide.live().filter(|hold| (open.mode, hold.mode) != (HoldMode::Shared, HoldMode::Shared));
                for hold in live {
                    self.edges += 1;
                    let permits = is_permits.then_some(hold.slots.len() as u64);
                    all.push(held(hold.owner_key(), &hold.holder, permits));
                }
            }
        }
        if self.gave_up() { Vec::new() } else { all }
    }

    fn is_left(&self, owner: &OwnerKey) -> bool {
        *owner == self.target || self.waiting.contains_key(owner)
    }

    /// Those who are left and keep a wait from its end; nobody if it can end without them.
    fn in_the_way(&mut self, open: &Open) -> Vec<Blocker> {
        let mut left = self.blockers(open);
        left.retain(|blocker| self.is_left(&blocker.owner));
        if let HoldMode::Permits(permits) = open.mode
            && left.iter().all(|blocker| blocker.permits.is_some())
        {
            let all = self.m.locks.wide(&open.key).map_or(0, |wide| u64::from(wide.shape.permits));
            let stuck: u64 = left.iter().filter_map(|blocker| blocker.permits).sum();
            if all.saturating_sub(stuck) >= u64::from(permits.count) {
                left.clear();
            }
        }
        left
    }

    fn is_stuck(&mut self, owner: &OwnerKey) -> bool {
        self.open(owner).iter().any(|open| !self.in_the_way(open).is_empty())
    }

    /// The shortest way from the target back to it.
    fn cycle(&mut self) -> Option<Vec<Step>> {
        let mut came_by: BTreeMap<OwnerKey, Step> = BTreeMap::new();
        let mut left = VecDeque::from([self.target.clone()]);
        while let Some(owner) = left.pop_front() {
            for open in self.open(&owner) {
                for Blocker { owner: blocker, token, since, .. } in self.in_the_way(&open) {
                    let Open { owner, waiter, place, key, .. } = &open;
                    let step = Step {
                        owner: owner.clone(),
                        lock: key.clone(),
                        waiter: *waiter,
                        rank: place.0,
                        blocker: blocker.clone(),
                        token,
                        since,
                    };
                    if blocker == self.target {
                        return Some(way(step, came_by));
                    }
                    if !came_by.contains_key(&blocker) {
                        came_by.insert(blocker.clone(), step);
                        left.push_back(blocker);
                    }
                }
            }
        }
        None
    }
}

/// The steps that led to this one, and it.
fn way(last: Step, mut came_by: BTreeMap<OwnerKey, Step>) -> Vec<Step> {
    let mut steps = VecDeque::from([last]);
    while let Some(step) = steps.front().and_then(|step| came_by.remove(&step.owner)) {
        steps.push_front(step);
    }
    steps.into()
}

/// Waits of a cycle that the sentence for people names; programs find all of them among the facts.
const NAMED_MAX: usize = 8;

/// Tells a cycle to whoever is refused for it.
pub(crate) fn refusal(lock: &LockKey, cycle: &[Step]) -> Rejection {
    let name = lock.name().escape_ascii();
    let mut why = format!("waiting for lock `{name}` would never end: ");
    for (n, step) in cycle.iter().take(NAMED_MAX).enumerate() {
        let comma = if n > 0 { ", " } else { "" };
        let (owner, lock, blocker) = (shown(&step.owner), step.lock.name().escape_ascii(), shown(&step.blocker));
        // Writing to a string cannot fail.
        let _ = match step.token {
            Revision(0) => write!(why, "{comma}{owner} waits for `{lock}` behind {blocker}"),
            token => write!(why, "{comma}{owner} waits for `{lock}`, held by {blocker} under token {token}"),
        };
    }
    if cycle.len() > NAMED_MAX {
        let _ = write!(why, ", and {} more", cycle.len() - NAMED_MAX);
    }
    let refusal = Refusal::new(RefusalCode::Deadlock, why).fact("name", name);
    refusal.fact("owners", cycle.len()).fact("cycle", told(cycle)).into()
}

/// The cycle as JSON: a list of who waits for which lock because of whom, under which token, since when in log time.
fn told(cycle: &[Step]) -> String {
    let mut text = String::from("[");
    for step in cycle {
        let comma = if text.len() > 1 { "," } else { "" };
        let _ = write!(
            text,
            "{comma}{{\"owner\":\"{}\",\"waits_for\":\"{}\",\"{}\":\"{}\",\"token\":\"{}\",\"since_ms\":\"{}\"}}",
            shown(&step.owner),
            escaped(step.lock.name()),
            if step.token.0 == 0 { "behind" } else { "held_by" },
            shown(&step.blocker),
            step.token,
            step.since.0,
        );
    }
    text.push(']');
    text
}

fn shown(owner: &OwnerKey) -> String {
    match owner {
        OwnerKey::Named(name) => escaped(name),
        OwnerKey::Session(id) => format!("session {id}"),
    }
}

/// As the inside of a JSON string.
fn escaped(bytes: &[u8]) -> String {
    let mut text = String::new();
    for c in String::from_utf8_lossy(bytes).chars() {
        match c {
            '"' | '\\' => text.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(text, "\\u{:04x}", u32::from(c));
            }
            c => text.push(c),
        }
    }
    text
}
