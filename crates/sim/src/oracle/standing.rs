//! What members hold at any time: who has what, who waits, and in which order those who waited are served.
//!
//! Promises. In every state that a member comes to: a writer is alone, no permit is in two hands, none is given that there is not, and never more of them than there are at that moment, whoever holds, leads, is
//! registered or waits has a session that lives, and nobody waits first for what could be had. From one state to a later one: whoever waited longer with no
//! lower priority is served before those behind and before newcomers; tokens rise; a lock that was lost with its session, or an owner's that asked for
//! a delay, is kept from others until that is over.
//! Not promised. Anything between two states that no member was seen in.
//! Relies on. Owners that begin with `many` ask for several locks at once, those that begin with `same` may come back to what is kept for them, every other
//! owner is of one call and names its priority after a `p`.

use std::collections::{BTreeMap, BTreeSet};
use tenure_machine::*;

const NS: NamespaceId = NamespaceId::DEFAULT;
/// The locks, elections and the service that are looked at.
pub const LOCKS: [&[u8]; 4] = [b"lock0", b"lock1", b"rw", PERMITS_LOCK];
pub const PERMITS_LOCK: &[u8] = b"permits";
pub const ELECTION: &[u8] = b"e";
pub const SERVICE: &str = "svc";
pub const PERMITS: u32 = 3;

/// One who waits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    session: SessionId,
    owner: Vec<u8>,
    since: u64,
    /// Higher ones are served first.
    priority: i64,
}

/// One who has it.
#[derive(Clone, Debug, PartialEq)]
struct Having {
    token: u64,
    session: SessionId,
    owner: Vec<u8>,
    priority: i64,
    delay_ms: u64,
    kept_until: Option<u64>,
}

/// A lock or an election in one state.
#[derive(Clone, Debug, Default)]
struct Line {
    revision: u64,
    stamp: u64,
    waiting: Vec<Place>,
    having: Vec<Having>,
}

#[derive(Default)]
pub struct Standing {
    /// The newest entry that was looked at.
    at: u64,
    lines: BTreeMap<Vec<u8>, Line>,
    /// Ends of grants that somebody asked for: what is given back is not kept.
    may_end: BTreeSet<(Vec<u8>, u64)>,
    /// How the number of permits has changed at a revision, as the members hold and as clients were told: from and to.
    sizes: BTreeMap<u64, (u32, u32)>,
    told: BTreeMap<u64, (u32, u32)>,
    /// Who is to lead next, whoever waits.
    named: BTreeSet<SessionId>,
    /// By token.
    pub leaders: BTreeMap<u64, SessionId>,
}

impl Standing {
    pub fn may_end(&mut self, lock: &[u8], token: u64) {
        self.may_end.insert((lock.to_vec(), token));
    }

    pub fn named(&mut self, session: SessionId) {
        self.named.insert(session);
    }

    /// A client was told that it has changed the number of permits.
    pub fn resized(&mut self, at: u64, from: u32, to: u32) {
        if from != to {
            self.told.insert(at, (from, to));
        }
    }

    pub fn finish(&self) -> Result<(), String> {
        match self.told.iter().find(|(at, sizes)| self.sizes.get(at) != Some(sizes)) {
            None => Ok(()),
            Some(told) => {
                Err(format!("the permits were told to have changed by {told:?}, and did by {:?}", self.sizes))
            }
        }
    }

    /// How many permits there were at a revision, of those that there are now. Whoever has got one since then has kept the lock in being.
    fn permits_at(&self, at: u64, now: u32) -> u32 {
        self.sizes.range(at + 1..).next().map_or(now, |(_, (from, _))| *from)
    }

    fn look_at_sizes(&mut self, machine: &Machine, before: u64) -> Result<(), String> {
        for event in machine.lock_events(NS, PERMITS_LOCK) {
            let sizes = event.detail.strip_suffix(" permits").and_then(|text| text.split_once(" to "));
            if let Some((from, to)) = sizes.filter(|_| event.kind == LockEventKind::Resized)
                && let (Ok(from), Ok(to)) = (from.parse(), to.parse())
            {
                self.sizes.insert(event.token.0, (from, to));
            }
        }
        let Some(info) = machine.lock(NS, PERMITS_LOCK) else { return Ok(()) };
        let granted: Vec<(u64, usize)> =
            info.holds.iter().map(|hold| (hold.holder.token.0, hold.slots.len())).collect();
        self.check_sizes(before, &granted, info.permits).map_err(|why| format!("{why}: {info:?}"))
    }

    /// Tokens and counts of what is held, of what was granted after a revision.
    fn check_sizes(&self, before: u64, granted: &[(u64, usize)], now: u32) -> Result<(), String> {
        for (token, _) in granted.iter().filter(|(token, _)| *token > before) {
            let given: usize = granted.iter().filter(|(earlier, _)| earlier <= token).map(|(_, count)| count).sum();
            let permits = self.permits_at(*token, now);
            if given > permits as usize {
                return Err(format!("{given} of {permits} permits are given under {token}"));
            }
        }
        Ok(())
    }

    /// Judges a member in the state that it is in.
    pub fn look(&mut self, machine: &Machine) -> Result<(), String> {
        let lives = |session: SessionId| machine.session(session).is_some();
        let mut lines: Vec<(&[u8], Line)> = Vec::new();
        for name in LOCKS {
            let info = machine.lock(NS, name);
            if let Some(info) = &info {
                check_lock(info).map_err(|why| format!("lock {}: {why}: {info:?}", name.escape_ascii()))?;
            }
            lines.push((name, info.map(Line::of_lock).unwrap_or_default()));
        }
        let election = machine.election(NS, ELECTION, usize::MAX);
        if election.leader.is_none() && !election.candidates.is_empty() && !self.is_stalled(machine) {
            return Err(format!("nobody leads, and some would: {election:?}"));
        }
        if let Some(leader) = &election.leader {
            let known = self.leaders.entry(leader.token.0).or_insert(leader.session);
            if *known != leader.session {
                return Err(format!("token {} is of leader {known} and of {}", leader.token, leader.session));
            }
        }
        lines.push((ELECTION, Line::of_election(election)));
        let newer = machine.position().index.0 > self.at;
        if newer {
            let before = self.lines.get(PERMITS_LOCK).map_or(0, |line| line.revision);
            self.look_at_sizes(machine, before)?;
        }
        self.at = self.at.max(machine.position().index.0);
        for (name, mut line) in lines {
            (line.revision, line.stamp) = (machine.revision().0, machine.stamp().0);
            line.check_alive(lives).map_err(|why| format!("{}: {why}", name.escape_ascii()))?;
            if newer {
                if let Some(before) = self.lines.get(name) {
                    let told = |why| format!("{}: {why}, before {before:?}, now {line:?}", name.escape_ascii());
                    self.check_order(name, before, &line).map_err(told)?;
                    self.check_kept(name, before, &line, lives).map_err(told)?;
                }
                self.lines.insert(name.to_vec(), line);
            }
        }
        for (id, instance, _) in machine.instances(NS, SERVICE, None, usize::MAX) {
            if instance.spec.session != SessionId(0) && !lives(instance.spec.session) {
                return Err(format!("instance {id} is there without its session: {instance:?}"));
            }
        }
        for (name, pool) in machine.objects::<Pool>(NS, b"", None, 10) {
            check_pool(machine, &String::from_utf8_lossy(&name), pool)?;
        }
        Ok(())
    }

    /// One entry may take the lead from somebody and give it to nobody: then the next one does.
    fn is_stalled(&self, machine: &Machine) -> bool {
        machine.object::<Election>(NS, ELECTION).is_some_and(|election| election.stalled.is_some())
    }

    /// Nobody is passed by.
    fn check_order(&self, name: &[u8], before: &Line, now: &Line) -> Result<(), String> {
        let still: BTreeSet<&Place> = now.waiting.iter().collect();
        for new in now.having.iter().filter(|having| having.kept_until.is_none() && having.token > before.revision) {
            let returns = before.having.iter().any(|old| old.owner == new.owner && new.owner.starts_with(b"same"));
            if returns || (name == ELECTION && self.named.contains(&new.session)) {
                continue;
            }
            let is_own = |place: &Place| place.session == new.session && place.owner == new.owner;
            let own = before.waiting.iter().position(is_own);
            let ahead = &before.waiting[..own.unwrap_or(before.waiting.len())];
            if let Some(passed) = ahead.iter().find(|place| place.priority >= new.priority && still.contains(place)) {
                return Err(format!("{new:?} was served before {passed:?}"));
            }
        }
        Ok(())
    }

    /// What is kept from others stays so for its time.
    fn check_kept(
        &self,
        name: &[u8],
        before: &Line,
        now: &Line,
        lives: impl Fn(SessionId) -> bool,
    ) -> Result<(), String> {
        for old in before.having.iter().filter(|old| !old.owner.starts_with(b"same")) {
            let still = now
                .having
                .iter()
                .find(|new| (new.token, new.session, &new.owner) == (old.token, old.session, &old.owner));
            let is_over = |until: u64| until <= now.stamp || self.may_end.contains(&(name.to_vec(), old.token));
            let kept = still.and_then(|new| new.kept_until);
            match old.kept_until {
                Some(until) if still.is_none() && !is_over(until) => {
                    return Err(format!("{old:?} is not kept for its time"));
                }
                None if !lives(old.session) && kept.is_none() && !is_over(before.stamp + old.delay_ms) => {
                    return Err(format!("{old:?} was lost without its delay"));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// As owners name it, or none.
fn priority_of(owner: &[u8]) -> i64 {
    let text = std::str::from_utf8(owner).unwrap_or_default();
    text.rsplit_once('p').and_then(|(_, priority)| priority.parse().ok()).unwrap_or(0)
}

impl Line {
    fn of_lock(info: LockInfo) -> Self {
        let place = |w: WaiterInfo| Place {
            session: w.session,
            owner: w.owner.into_vec(),
            since: w.since.0,
            priority: w.priority,
        };
        let having = |h: HoldInfo| Having {
            token: h.holder.token.0,
            session: h.holder.session,
            owner: h.holder.owner.to_vec(),
            priority: priority_of(&h.holder.owner),
            delay_ms: h.delay_ms,
            kept_until: h.kept_until.map(|until| until.0),
        };
        Self {
            waiting: info.waiters.into_iter().map(place).collect(),
            having: info.holds.into_iter().map(having).collect(),
            ..Self::default()
        }
    }

    fn of_election(info: ElectionInfo) -> Self {
        let place = |c: Candidate| Place {
            session: c.session,
            owner: Vec::new(),
            since: c.since.0,
            priority: c.priority.into(),
        };
        let having = |leader: Leader| Having {
            token: leader.token.0,
            session: leader.session,
            owner: Vec::new(),
            priority: leader.priority.into(),
            delay_ms: 0,
            kept_until: None,
        };
        Self {
            waiting: info.candidates.into_iter().map(place).collect(),
            having: info.leader.into_iter().map(having).collect(),
            ..Self::default()
        }
    }

    fn check_alive(&self, lives: impl Fn(SessionId) -> bool) -> Result<(), String> {
        if let Some(dead) = self.having.iter().find(|h| h.kept_until.is_none() && !lives(h.session)) {
            return Err(format!("{dead:?} has it and is dead"));
        }
        if let Some(dead) = self.waiting.iter().find(|place| !lives(place.session)) {
            return Err(format!("{dead:?} waits and is dead"));
        }
        let in_order = |a: &Place, b: &Place| (-a.priority, a.since) <= (-b.priority, b.since);
        if !self.waiting.is_sorted_by(in_order) {
            return Err(format!("the queue is out of order: {:?}", self.waiting));
        }
        Ok(())
    }
}

/// One lock in one state.
fn check_lock(info: &LockInfo) -> Result<(), String> {
    let live = || info.holds.iter().filter(|hold| hold.kept_until.is_none());
    if live().any(|hold| hold.mode == HoldMode::Exclusive) && live().count() > 1 {
        return Err("somebody is beside a writer".to_owned());
    }
    let slots: Vec<u32> = info.holds.iter().flat_map(|hold| hold.slots.iter().copied()).collect();
    let distinct: BTreeSet<u32> = slots.iter().copied().collect();
    if distinct.len() < slots.len() {
        return Err(format!("of {} permits {slots:?} are given", info.permits));
    }
    let complete = |hold: &HoldInfo| match hold.mode {
        HoldMode::Permits(permits) => hold.slots.len() == permits.count as usize,
        HoldMode::Exclusive | HoldMode::Shared => hold.slots.is_empty(),
    };
    if !info.holds.iter().all(complete) {
        return Err("somebody has other permits than it asked for".to_owned());
    }
    let Some(first) = info.waiters.first().filter(|first| !first.owner.starts_with(b"many")) else { return Ok(()) };
    let could = match first.mode {
        HoldMode::Exclusive => info.holds.is_empty(),
        HoldMode::Shared => info.holds.iter().all(|hold| hold.mode == HoldMode::Shared),
        HoldMode::Permits(permits) => slots.len() + permits.count as usize <= info.permits as usize,
    };
    if could { Err(format!("{first:?} waits for what could be had")) } else { Ok(()) }
}

/// What is held of a pool is the sum of its holds, and nobody waits for what could be had.
fn check_pool(machine: &Machine, name: &str, pool: &Pool) -> Result<(), String> {
    let holds = machine.pool_holds(NS, name, 0, usize::MAX);
    let held = holds.iter().filter(|(_, hold)| hold.state == HoldState::Held);
    let sum: u64 = held.clone().map(|(_, hold)| hold.quantity).sum();
    if sum != pool.held || pool.held + pool.confirmed > pool.capacity {
        return Err(format!("pool {name} gives {sum}: {pool:?}"));
    }
    let dead = held.clone().find(|(_, h)| h.session != SessionId(0) && machine.session(h.session).is_none());
    if let Some((id, hold)) = dead {
        return Err(format!("hold {id} of pool {name} is there without its session: {hold:?}"));
    }
    match machine.pool_waiters(NS, name, 1).first() {
        Some(first) if first.quantity <= pool.capacity - pool.held - pool.confirmed => {
            Err(format!("{first:?} waits for what pool {name} has: {pool:?}"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hold(token: u64, mode: HoldMode, slots: &[u32]) -> HoldInfo {
        let holder =
            Holder { token: Revision(token), session: SessionId(token), owner: Box::default(), since: LogTime(0) };
        HoldInfo { holder, mode, slots: slots.to_vec(), depth: 1, delay_ms: 0, min_hold_ms: 0, kept_until: None }
    }

    fn lock(holds: Vec<HoldInfo>, permits: u32, first: Option<HoldMode>) -> LockInfo {
        let waiter = |mode| WaiterInfo {
            session: SessionId(9),
            owner: Box::default(),
            since: LogTime(0),
            deadline: None,
            mode,
            priority: 0,
        };
        LockInfo {
            name: Box::default(),
            holder: None,
            newest: Revision(0),
            hold_count: holds.len() as u64,
            holds,
            permits,
            permits_free: 0,
            waiters: first.map(waiter).into_iter().collect(),
        }
    }

    #[test]
    fn a_state_that_must_not_be_is_noticed() {
        let (writes, reads) = (HoldMode::Exclusive, HoldMode::Shared);
        let permit = |count| HoldMode::Permits(Permits { count, of: 3 });
        let is_right = |holds: Vec<HoldInfo>, permits, first| check_lock(&lock(holds, permits, first)).is_ok();
        assert!(is_right(vec![hold(1, reads, &[]), hold(2, reads, &[])], 0, Some(writes)));
        assert!(!is_right(vec![hold(1, reads, &[]), hold(2, writes, &[])], 0, None));
        assert!(!is_right(vec![hold(1, reads, &[])], 0, Some(reads)), "a reader waits beside readers");
        assert!(is_right(vec![hold(1, permit(2), &[0, 2])], 3, Some(permit(2))));
        assert!(!is_right(vec![hold(1, permit(1), &[0]), hold(2, permit(1), &[0])], 3, None), "one slot, two hands");
        assert!(!is_right(vec![hold(1, permit(2), &[0])], 3, None), "two were asked for");
        assert!(!is_right(vec![hold(1, permit(1), &[0])], 3, Some(permit(2))), "two are left");
    }

    #[test]
    fn more_holders_than_permits_at_the_grant_are_noticed() {
        let mut all = Standing::default();
        assert!(all.check_sizes(4, &[(5, 2), (7, 1)], 3).is_ok());
        assert!(all.check_sizes(4, &[(5, 2), (7, 1)], 2).is_err());
        all.sizes.insert(8, (3, 2));
        assert!(all.check_sizes(4, &[(5, 2), (7, 1)], 2).is_ok(), "there were three then");
        assert!(all.check_sizes(4, &[(5, 2), (9, 1)], 2).is_err(), "there were two then");
        all.resized(8, 3, 4);
        assert!(all.finish().is_err());
    }

    fn place(session: u64, since: u64, priority: i64) -> Place {
        Place { session: SessionId(session), owner: b"c1p0".to_vec(), since, priority }
    }

    fn having(session: u64, token: u64) -> Having {
        let owner = b"c1p0".to_vec();
        Having { token, session: SessionId(session), owner, priority: 0, delay_ms: 0, kept_until: None }
    }

    fn line(revision: u64, waiting: Vec<Place>, having: Vec<Having>) -> Line {
        Line { revision, stamp: revision, waiting, having }
    }

    #[test]
    fn whoever_is_passed_by_is_noticed() {
        let all = Standing::default();
        let before = line(10, vec![place(1, 3, 0), place(2, 4, 0)], vec![having(7, 5)]);
        let served = |session, waiting| all.check_order(b"rw", &before, &line(12, waiting, vec![having(session, 12)]));
        assert!(served(1, vec![place(2, 4, 0)]).is_ok());
        assert!(served(2, vec![place(1, 3, 0)]).is_err());
        assert!(served(2, vec![]).is_ok(), "the first has gone");
        assert!(served(8, vec![place(1, 3, 0)]).is_err(), "a newcomer");
        assert!(served(8, vec![place(1, 3, -1)]).is_ok(), "it is another wait");
    }

    #[test]
    fn the_dead_and_the_disorder_are_noticed() {
        let alive = |session: SessionId| session.0 < 5;
        assert!(line(1, vec![place(1, 3, 0)], vec![having(2, 1)]).check_alive(alive).is_ok());
        assert!(line(1, vec![place(6, 3, 0)], vec![]).check_alive(alive).is_err());
        assert!(line(1, vec![], vec![having(6, 1)]).check_alive(alive).is_err());
        assert!(line(1, vec![place(1, 3, 0), place(2, 2, 0)], vec![]).check_alive(alive).is_err());
        assert!(line(1, vec![place(1, 3, 0), place(2, 2, 1)], vec![]).check_alive(alive).is_err());
    }

    #[test]
    fn a_delay_that_is_cut_short_is_noticed() {
        let mut all = Standing::default();
        let dead = |_: SessionId| false;
        let lost = Having { delay_ms: 100, ..having(1, 5) };
        let kept = Having { kept_until: Some(110), ..lost.clone() };
        let before = line(10, vec![], vec![lost]);
        assert!(all.check_kept(b"rw", &before, &line(12, vec![], vec![]), dead).is_err());
        assert!(all.check_kept(b"rw", &before, &line(12, vec![], vec![kept.clone()]), dead).is_ok());
        assert!(all.check_kept(b"rw", &line(12, vec![], vec![kept.clone()]), &line(90, vec![], vec![]), dead).is_err());
        assert!(all.check_kept(b"rw", &line(12, vec![], vec![kept]), &line(110, vec![], vec![]), dead).is_ok());
        all.may_end(b"rw", 5);
        assert!(all.check_kept(b"rw", &before, &line(12, vec![], vec![]), dead).is_ok(), "it was given back");
    }
}
