//! What goes wrong, and when it ends.
//!
//! Promises. What is lost for good (a folder with a hole, or one that is not the member's own) is a minority of the voters at any
//! time, and never that of a member of whose registration another voter has not heard: only then is safety promised.
//! Everything else may happen to all members at once.

use super::net::Quality;
use super::node::{Copy, Fate, Node};
use super::people::{Call, Change, Kind};
use super::world::{Bug, End, Event, Group, SECOND, World};
use crate::disk::{Faults, SimDisk};
use crate::oracle::state;
use crate::random::Random;
use tenure_machine::*;
use tenure_replica::{Alarm, Effects, Join, Member, Millis, OpenError, Sabotage, join_digest};

/// The end of something that went wrong.
pub(super) enum Mend {
    Cuts(Vec<(usize, usize)>),
    Quality(Quality),
    Room(usize),
    DiskFaults(usize),
    Resume {
        node: usize,
        boot: u64,
    },
    /// The operator puts the right folder back.
    OwnFolder(usize),
    /// A removed member is switched off.
    Retire(usize),
    /// A learner is to become a voter.
    Promote(MemberId),
}

/// What a folder comes to when it is opened.
#[derive(Debug)]
struct Content {
    state: String,
    applied: u64,
    last_index: u64,
    /// A torn tail was told.
    torn: bool,
    /// A damaged snapshot was told.
    passed_over: bool,
}

const MEMBERS_MAX: usize = 9;

impl World {
    pub(super) fn mischief(&mut self) -> Result<(), String> {
        if self.options.grow_at.is_some() {
            return self.grow();
        }
        let again = self.random.between(50_000, self.shape.mischief_us);
        self.later(again, Event::Mischief);
        let weights = [4, 3, 4, 4, 4, 4, 4, 4, 3, 3, 2, 2, 5, 3, 1, 4, 3, 4, 4];
        let kind = self.random.weighted(&weights);
        if self.shape.kinds & 1 << kind == 0 {
            return Ok(());
        }
        let node = self.random.index(self.nodes.len());
        match kind {
            0 => self.end_if_running(node, End::Killed),
            1 => self.end_if_running(node, End::Power),
            2 => {
                let calls = self.random.below(60);
                self.trace.say(|| format!("{} us: n{node} dies after {calls} calls", self.now));
                self.nodes[node].disk.die_after(Some(calls));
                Ok(())
            }
            3 => {
                let election = self.shape.election_ms() * 1_000;
                let length = match self.random.coin() {
                    true => self.random.below(election),
                    false => self.random.between(election, 8 * election),
                };
                self.pause(node, length);
                Ok(())
            }
            4 => self.isolate(node),
            5 => self.split(),
            6 => self.one_way(),
            7 => match self.leader() {
                Some(leader) => self.isolate(leader),
                None => Ok(()),
            },
            8 => {
                let pairs: Vec<_> = self.net.connections.keys().copied().collect();
                if !pairs.is_empty() {
                    let pair = *self.random.pick(&pairs);
                    self.close(pair, |_| (100, 5_000));
                }
                Ok(())
            }
            9 => {
                let before = self.net.quality;
                self.net.quality = Quality::draw(&mut self.random);
                let length = self.random.between(200_000, 4 * SECOND);
                self.later(length, Event::Mend(Mend::Quality(before)));
                Ok(())
            }
            10 => {
                let room = self.random.below(300_000);
                self.nodes[node].disk.set_room(Some(room));
                self.mend_later(Mend::Room(node), 5 * SECOND);
                Ok(())
            }
            11 => {
                let faults = Faults {
                    write: self.random.below(60),
                    sync: self.random.below(60),
                    names: self.random.below(300),
                    read: self.random.below(20),
                };
                self.nodes[node].disk.set_faults(faults);
                self.mend_later(Mend::DiskFaults(node), 4 * SECOND);
                Ok(())
            }
            12 => self.change_members(),
            13 => {
                self.hand_over();
                Ok(())
            }
            14 => {
                let how = if self.random.coin() { End::Power } else { End::Killed };
                (0..self.nodes.len()).try_for_each(|node| self.end_if_running(node, how))
            }
            15 => match self.leader() {
                Some(leader) => self.end_if_running(leader, End::Killed),
                None => Ok(()),
            },
            16 => self.stop(node),
            17 => {
                // A clock of the wall that jumps is only ever shown.
                let wall = self.random.between(1_600_000_000_000, 1_800_000_000_000);
                self.nodes[node].wall_ms = wall;
                Ok(())
            }
            _ => {
                if let Some(leader) = self.leader() {
                    self.put_to_sleep(leader);
                }
                Ok(())
            }
        }
    }

    fn mend_later(&mut self, mend: Mend, within_us: u64) {
        let delay = self.random.between(50_000, within_us);
        self.later(delay, Event::Mend(mend));
    }

    pub(super) fn mend(&mut self, mend: Mend) -> Result<(), String> {
        match mend {
            Mend::Cuts(cuts) => {
                cuts.iter().for_each(|cut| {
                    self.net.cuts.remove(cut);
                });
                self.look_at_cuts();
            }
            Mend::Quality(quality) if !self.healing => self.net.quality = quality,
            Mend::Quality(_) => {}
            Mend::Room(node) => self.nodes[node].disk.set_room(None),
            Mend::DiskFaults(node) => self.nodes[node].disk.set_faults(Faults::default()),
            Mend::Resume { node, boot } => self.resume(node, boot),
            Mend::OwnFolder(node) => return self.put_own_folder_back(node),
            Mend::Retire(node) => return self.retire(node),
            Mend::Promote(id) => {
                if self.shape.kinds & 1 << 12 != 0 && !self.healing {
                    return self.ask_for(Change::Promote, Op::MemberPromote { id });
                }
            }
        }
        Ok(())
    }

    // Processes.

    fn end_if_running(&mut self, node: usize, how: End) -> Result<(), String> {
        if self.nodes[node].runs() { self.end(node, how) } else { Ok(()) }
    }

    fn leader(&self) -> Option<usize> {
        self.nodes.iter().rposition(|n| n.led && n.runs())
    }

    fn pause(&mut self, node: usize, length_us: u64) {
        let n = &mut self.nodes[node];
        if n.paused || !n.runs() {
            return;
        }
        n.paused = true;
        let boot = n.boot;
        self.report.pauses += 1;
        self.trace.say(|| format!("{} us: n{node} is stopped for {length_us} us", self.now));
        self.later(length_us, Event::Mend(Mend::Resume { node, boot }));
    }

    /// A machine that sleeps goes on before its network does: one that led believes to lead, and hears of nobody else.
    fn put_to_sleep(&mut self, node: usize) {
        let election = self.shape.election_ms() * 1_000;
        let length = self.random.between(2 * election, 6 * election);
        self.pause(node, length);
        let others = (0..self.nodes.len()).filter(|&other| other != node);
        let cuts: Vec<_> = others.flat_map(|other| [(node, other), (other, node)]).collect();
        self.report.partitions += 1;
        self.net.cuts.extend(cuts.iter().copied());
        self.look_at_cuts();
        let longer = self.random.below(election);
        self.later(length + longer, Event::Mend(Mend::Cuts(cuts)));
    }

    fn resume(&mut self, node: usize, boot: u64) {
        let n = &mut self.nodes[node];
        if n.boot != boot || !n.paused {
            return;
        }
        n.paused = false;
        self.trace.say(|| format!("{} us: n{node} goes on", self.now));
        // What it owed its callers was owed by its own time, in which it did not run.
        let patience = 10 * self.shape.election_ms();
        let now = self.now;
        n.tickets.values_mut().for_each(|c| (c.due_ms, c.since_us) = (c.due_ms.map(|due| due + patience), now));
        let backlog = std::mem::take(&mut n.backlog);
        backlog.into_iter().for_each(|(from, bytes)| n.arrive(from, bytes));
        n.poll_at = None;
        self.wake(node, 10);
        self.doubt_for_a_while(node);
    }

    fn stop(&mut self, node: usize) -> Result<(), String> {
        let n = &mut self.nodes[node];
        let at = n.clock.at(self.now);
        let Some(member) = n.member.as_mut().filter(|_| !n.paused) else { return Ok(()) };
        self.report.stops += 1;
        let mut out = Effects::default();
        let mut sent = Vec::new();
        let result = member.stop(at, &mut out, &mut |to, lane, bytes| sent.push((to, lane, bytes)));
        self.trace.say(|| format!("{} us: n{node} is asked to stop", self.now));
        self.carry_out(node, out, sent, result)?;
        self.end_if_running(node, End::Killed)
    }

    fn hand_over(&mut self) {
        let node = match self.leader() {
            Some(leader) if self.random.chance(4, 5) => leader,
            _ => self.random.index(self.nodes.len()),
        };
        let to = self.random.coin().then(|| self.nodes[self.random.index(self.nodes.len())].id);
        if let Some(member) = self.nodes[node].member.as_mut() {
            let asked = member.hand_over(to);
            self.report.hand_overs += u64::from(asked.is_ok());
            self.trace.say(|| format!("{} us: n{node} hands over to {to:?}: {asked:?}", self.now));
            self.wake(node, 10);
        }
    }

    /// What may happen to a folder while nobody uses it, and when it is used again.
    pub(super) fn after_the_end(&mut self, node: usize, last_index: Option<u64>) -> Result<(), String> {
        let n = &self.nodes[node];
        if n.fate == Fate::Sound && !n.flipped && !self.healing && self.options.grow_at.is_none() {
            self.look_after_copy(node, last_index);
            if self.options.bug == Some(Bug::CutLogs) {
                self.cut_log(node);
            }
            if self.shape.kinds & 1 << 20 != 0 && self.random.chance(1, 4) {
                self.flip(node)?;
            }
            let often = self.options.bug == Some(Bug::Inside(Sabotage::ForgetStorage));
            if often || self.shape.kinds & 1 << 21 != 0 && self.random.chance(1, 3) {
                self.another_folder(node)?;
            }
        }
        let n = &self.nodes[node];
        let again = match n.fate {
            Fate::Sound => true,
            Fate::Removed => !self.healing && self.random.chance(1, 3),
            Fate::Impostor => self.random.coin(),
            Fate::Damaged => false,
        };
        if again {
            let longest = if self.healing || self.options.grow_at.is_some() { 300_000 } else { 4 * SECOND };
            let delay = self.random.between(20_000, longest);
            self.later(delay, Event::Start(node));
        }
        Ok(())
    }

    pub(super) fn not_opened(&mut self, node: usize, why: &OpenError) -> Result<(), String> {
        self.trace.say(|| format!("{} us: n{node} is not opened: {why}", self.now));
        let n = &mut self.nodes[node];
        match (n.fate, why) {
            (Fate::Removed, OpenError::Damaged { .. } | OpenError::OtherFormat { .. }) if n.flipped => {
                n.fate = Fate::Damaged;
                Ok(())
            }
            (Fate::Sound, OpenError::Damaged { .. } | OpenError::OtherFormat { .. }) if n.flipped => {
                n.fate = Fate::Damaged;
                self.replace_later(node);
                Ok(())
            }
            _ => Err(format!("n{node} ({:?}): a folder that only crashed is refused: {why}", n.fate)),
        }
    }

    // The network.

    fn cut(&mut self, cuts: Vec<(usize, usize)>) {
        self.report.partitions += 1;
        self.trace.say(|| format!("{} us: cut {cuts:?}", self.now));
        self.net.cuts.extend(cuts.iter().copied());
        self.look_at_cuts();
        // Some notice that the other end is gone, some late, some not.
        if self.random.chance(1, 3) {
            let quick: Vec<bool> = self.nodes.iter().map(|_| self.random.coin()).collect();
            let notice = |at: usize| if quick[at] { (1_000, SECOND / 10) } else { (SECOND / 10, 4 * SECOND) };
            cuts.iter().for_each(|&pair| self.close(pair, notice));
        }
        let longest = *self.random.pick(&[SECOND / 2, 3 * SECOND, 8 * SECOND]);
        self.mend_later(Mend::Cuts(cuts), longest);
    }

    fn isolate(&mut self, node: usize) -> Result<(), String> {
        let (out, back) = match self.random.below(4) {
            0 => (true, false),
            1 => (false, true),
            _ => (true, true),
        };
        let others = (0..self.nodes.len()).filter(|&other| other != node);
        let cuts = others.flat_map(|o| [out.then_some((node, o)), back.then_some((o, node))]).flatten().collect();
        self.cut(cuts);
        Ok(())
    }

    fn split(&mut self) -> Result<(), String> {
        let side: Vec<bool> = (0..self.nodes.len()).map(|_| self.random.coin()).collect();
        let all = (0..side.len()).flat_map(|a| (0..side.len()).map(move |b| (a, b)));
        self.cut(all.filter(|&(a, b)| side[a] != side[b]).collect());
        Ok(())
    }

    fn one_way(&mut self) -> Result<(), String> {
        let all = (0..self.nodes.len()).flat_map(|a| (0..self.nodes.len()).map(move |b| (a, b)));
        let cuts: Vec<_> = all.filter(|&(a, b)| a != b && self.random.chance(1, 4)).collect();
        self.cut(cuts);
        Ok(())
    }

    // Folders.

    /// The running member that has applied most.
    fn best(&self) -> Option<&Member<SimDisk>> {
        let running = self.nodes.iter().filter(|n| n.fate != Fate::Impostor).filter_map(|n| n.member.as_ref());
        running.max_by_key(|m| m.machine().position().index)
    }

    /// Who belongs to the cluster, as far as anybody who runs knows.
    pub(super) fn roles(&self) -> Vec<(MemberId, MemberRole)> {
        let known: Vec<_> =
            self.best().map(|m| m.machine().members().map(|r| (r.id, r.role)).collect()).unwrap_or_default();
        match known.is_empty() {
            true => self.nodes[..self.shape.members].iter().map(|n| (n.id, MemberRole::Voter)).collect(),
            false => known.into_iter().filter(|(_, role)| *role != MemberRole::Removed).collect(),
        }
    }

    fn voters(&self) -> Vec<MemberId> {
        self.best().map(|m| m.status().voters).unwrap_or_default()
    }

    /// Whether the folder of one more member may be lost: of the voters that there are, and of those that there will be.
    fn may_lose(&self, node: usize) -> bool {
        let leaves = |c: &Call| matches!(c.kind, Kind::Admin(Change::Remove));
        if self.calls.values().any(leaves) {
            return false;
        }
        // Those who run may not know it yet.
        let Group { voters, to_be, .. } = &self.group;
        [voters, to_be].into_iter().all(|voters| {
            let lost = |n: &&Node| (n.flipped || n.fate != Fate::Sound) && voters.contains(&n.id);
            let lost = self.nodes.iter().filter(lost).count();
            !voters.is_empty() && (!voters.contains(&self.nodes[node].id) || 2 * (lost + 1) < voters.len())
        })
    }

    /// What the other voters have heard of a member: the lowest number of starts, and the lowest index that it is known to have had.
    fn known_elsewhere(&self, node: usize) -> Option<(u64, u64)> {
        let id = self.nodes[node].id;
        let voters = self.voters();
        let others = self.nodes.iter().filter(|n| n.id != id && voters.contains(&n.id));
        let mut least: Option<(u64, u64)> = None;
        for other in others {
            let record = other.member.as_ref()?.machine().member(id).filter(|r| r.has_come())?;
            let (boots, seen) = least.unwrap_or((u64::MAX, u64::MAX));
            least = Some((boots.min(record.boots), seen.min(record.seen.0)));
        }
        least
    }

    fn look_after_copy(&mut self, node: usize, last_index: Option<u64>) {
        let n = &mut self.nodes[node];
        if let Some(last_index) = last_index
            && n.copy.is_none()
            && self.random.chance(1, 3)
        {
            n.copy = Some(Copy { disk: n.disk.copy(), boots: n.boots, last_index });
        }
    }

    /// The folder is wiped, or an older copy is put in its place, or that of another member.
    fn another_folder(&mut self, node: usize) -> Result<(), String> {
        let Some((boots, seen)) = self.known_elsewhere(node).filter(|_| self.may_lose(node)) else { return Ok(()) };
        let other = match self.random.below(3) {
            // Who was started alone begins another cluster in an empty folder; the others have nothing to do with that one.
            0 if self.shape.members == 1 && node == 0 => return Ok(()),
            0 => SimDisk::new(self.random.fork()),
            1 => match &self.nodes[node].copy {
                Some(copy) if copy.boots < boots || copy.last_index < seen => copy.disk.copy(),
                _ => return Ok(()),
            },
            _ => return self.swapped(node),
        };
        self.report.impostors += 1;
        self.trace.say(|| format!("{} us: n{node} gets another folder", self.now));
        let n = &mut self.nodes[node];
        n.own_disk = Some(std::mem::replace(&mut n.disk, other));
        n.fate = Fate::Impostor;
        let delay = self.random.between(3 * SECOND, 8 * SECOND);
        self.later(delay, Event::Mend(Mend::OwnFolder(node)));
        Ok(())
    }

    fn swapped(&mut self, node: usize) -> Result<(), String> {
        let other = self.random.index(self.nodes.len());
        if other == node || self.nodes[other].runs() || self.nodes[other].starts == 0 {
            return Ok(());
        }
        let folder = self.nodes[other].disk.copy();
        let config = self.config(node);
        match Member::open(folder, config, Millis(0)) {
            Err(OpenError::OtherMember { .. } | OpenError::Damaged { .. } | OpenError::OtherFormat { .. }) => Ok(()),
            // It had died before it had an identity.
            Ok(member) if member.status().last_index == 0 => Ok(()),
            Err(why) => Err(format!("the folder of n{other} is refused to n{node} as {why}")),
            Ok(_) => Err(format!("n{node} opens the folder of n{other}")),
        }
    }

    fn put_own_folder_back(&mut self, node: usize) -> Result<(), String> {
        self.end_if_running(node, End::Killed)?;
        let n = &mut self.nodes[node];
        if let Some(own) = n.own_disk.take() {
            // What took its room meanwhile is gone with the other folder.
            own.set_room(None);
            self.trace.say(|| format!("{} us: n{node} has its own folder again", self.now));
            n.disk = own;
            n.fate = Fate::Sound;
            self.later(50_000, Event::Start(node));
        }
        Ok(())
    }

    /// A bug: what was written last is gone from the log.
    fn cut_log(&mut self, node: usize) {
        let disk = &self.nodes[node].disk;
        if let Some(last) = disk.last_log_write()
            && let Some(mut content) = disk.content(&last.name)
            && (last.start as usize) < content.len()
        {
            content[last.start as usize..].fill(0);
            disk.plant(&last.name, content);
        }
    }

    /// Flips a bit. It must be refused by name or not matter; one that looks like a torn write is flipped back, for what it costs
    /// (the last batch, whose sync no later word confirms) is not promised to be noticed.
    fn flip(&mut self, node: usize) -> Result<(), String> {
        let disk = self.nodes[node].disk.clone();
        let sound = disk.copy();
        let Some(flip) = disk.flip(&mut self.random) else { return Ok(()) };
        let flipped = disk.copy();
        let boot = self.nodes[node].boot;
        let (clean, damaged) = (self.look_into(node, sound), self.look_into(node, flipped));
        self.nodes[node].boot = boot;
        let clean = clean.map_err(|why| format!("a sound folder is refused: {why}"))?;
        let (state, index) = (clean.state, clean.last_index);
        match damaged {
            Err(OpenError::Io { .. }) => return Err(format!("{flip:?} shows as an error of the disk")),
            Err(why) => {
                self.report.flips_refused += 1;
                if self.may_lose(node) && self.random.coin() {
                    self.trace.say(|| format!("{} us: n{node} has {flip:?}: {why}", self.now));
                    self.nodes[node].flipped = true;
                    return Ok(());
                }
            }
            Ok(c) if c.last_index == index && (c.state == state || c.passed_over && c.applied < clean.applied) => {
                // An older snapshot knows less of what is committed; the entries are all there.
                self.report.flips_harmless += 1;
                if !c.torn {
                    return Ok(());
                }
            }
            Ok(c) if c.torn && disk.is_in_last_batch(&flip) && c.last_index <= index => self.report.flips_torn += 1,
            Ok(c) => {
                return Err(format!("n{node}: {flip:?} was served as {c:?}\ninstead of {index} and\n{state}"));
            }
        }
        disk.apply_flip(&flip);
        Ok(())
    }

    fn look_into(&mut self, node: usize, disk: SimDisk) -> Result<Content, OpenError> {
        let mut config = self.config(node);
        (config.boot, config.random) = (1, [7; 32]);
        let member = Member::open(disk, config, Millis(0))?;
        let status = member.status();
        Ok(Content {
            state: state::dump(member.machine()),
            applied: status.applied,
            last_index: status.last_index,
            torn: status.alarms.iter().any(|a| matches!(a, Alarm::TornTail { .. })),
            passed_over: status.alarms.iter().any(|a| matches!(a, Alarm::SnapshotDamaged { .. })),
        })
    }

    /// Everything is whole again, except for what is lost for good.
    pub(super) fn restore(&mut self, node: usize) -> Result<(), String> {
        let n = &mut self.nodes[node];
        n.disk.set_faults(Faults::default());
        n.disk.set_room(None);
        n.disk.die_after(None);
        if n.disk.is_dead() && n.runs() {
            self.end(node, End::Power)?;
        }
        let n = &self.nodes[node];
        let boot = n.boot;
        if n.disk.is_dead() {
            n.disk.power_lost();
        }
        if n.paused {
            self.resume(node, boot);
        }
        if self.nodes[node].fate == Fate::Impostor {
            self.put_own_folder_back(node)?;
        }
        let n = &self.nodes[node];
        if n.fate == Fate::Sound || n.fate == Fate::Removed {
            self.later(10_000, Event::Start(node));
        }
        Ok(())
    }

    // Members come and go.

    fn change_members(&mut self) -> Result<(), String> {
        let roles = self.roles();
        let voters: Vec<_> = roles.iter().filter(|(_, role)| *role == MemberRole::Voter).map(|(id, _)| *id).collect();
        let learners: Vec<_> =
            roles.iter().filter(|(_, role)| *role == MemberRole::Learner).map(|(id, _)| *id).collect();
        let may_add = self.nodes.len() < MEMBERS_MAX && roles.len() < self.shape.members + 2;
        match self.random.below(8) {
            0..=2 if may_add => self.add(MemberRole::Learner, None),
            3 if may_add => self.add(MemberRole::Voter, None),
            4 if !learners.is_empty() => {
                let id = *self.random.pick(&learners);
                self.ask_for(Change::Promote, Op::MemberPromote { id })
            }
            5 if voters.len() > 3 || voters.len() + learners.len() > 3 => {
                let id = self.random.pick(&roles).0;
                let is_lost = |n: &Node| n.flipped || n.fate != Fate::Sound;
                let lost = self.nodes.iter().any(|n| is_lost(n) && voters.contains(&n.id));
                match lost {
                    true => Ok(()),
                    false => self.ask_for(Change::Remove, Op::MemberRemove { id }),
                }
            }
            6 if may_add && voters.len() >= 3 => {
                let old = *self.random.pick(&voters);
                self.add(MemberRole::Voter, Some(old))
            }
            _ => Ok(()),
        }
    }

    /// A cluster of one becomes one of three.
    fn grow(&mut self) -> Result<(), String> {
        let voters = self.voters().len();
        if self.roles().len() < 3 && voters > 0 && self.nodes.len() < 5 {
            self.add(MemberRole::Voter, None)?;
        }
        self.later(SECOND, Event::Mischief);
        Ok(())
    }

    /// A member whose folder has a hole gives its place to another.
    fn replace_later(&mut self, node: usize) {
        let old = self.nodes[node].id;
        if self.roles().iter().any(|(id, _)| *id == old) && self.nodes.len() < MEMBERS_MAX && !self.healing {
            // An operator needs a while.
            let _ = self.add(MemberRole::Voter, Some(old));
        }
    }

    fn add(&mut self, role: MemberRole, replaces: Option<MemberId>) -> Result<(), String> {
        let id = MemberId(self.random.u64() >> 1 | 1);
        let name = format!("n{}", id.0 % 1_000_000);
        let secret: [u8; 16] = self.random.bytes();
        let join = join_digest(&secret);
        let op =
            Op::MemberAdd { id, name: name.as_str().into(), peer: format!("{name}:1").into(), role, replaces, join };
        self.ask_for(Change::Add { id, name, secret }, op)
    }

    fn ask_for(&mut self, change: Change, op: Op) -> Result<(), String> {
        let number = self.new_number();
        let mut txn = Txn::of(op);
        txn.request = Some(RequestId::Uuid(self.random.bytes()));
        let node = self.random.index(self.nodes.len());
        self.begin(number, None, node, Kind::Admin(change), txn)
    }

    /// The operator was answered.
    pub(super) fn changed_members(&mut self, call: &Call, change: Change, reply: &Reply) -> Result<(), String> {
        let record = match &reply.result {
            Ok(result) => match result.results.first() {
                Some(OpReply::Member(record)) => record.clone(),
                other => return Err(format!("call {} is answered {other:?}", call.number)),
            },
            Err(_) => return Ok(()),
        };
        match change {
            Change::Add { id, name, secret } => {
                self.report.added += 1;
                let random: &mut Random = &mut self.random;
                let mut node = Node::new(id, &name, random);
                let cluster = self.best().map_or(0, |m| m.machine().cluster());
                node.join = Some(self.join(cluster, secret));
                self.nodes.push(node);
                self.look_at_cuts();
                let node = self.nodes.len() - 1;
                let delay = self.random.between(10_000, 2 * SECOND);
                self.later(delay, Event::Start(node));
                if record.role == MemberRole::Learner {
                    self.mend_later(Mend::Promote(id), 6 * SECOND);
                }
            }
            Change::Promote => self.report.promoted += 1,
            Change::Remove => {
                self.report.removed += 1;
                if let Some(node) = self.nodes.iter().position(|n| n.id == record.id) {
                    self.mend_later(Mend::Retire(node), 6 * SECOND);
                }
            }
        }
        Ok(())
    }

    fn join(&self, cluster: u64, secret: [u8; 16]) -> Join {
        let peers = self.nodes.iter().filter(|n| n.fate == Fate::Sound);
        Join { cluster, secret, peers: peers.map(|n| (n.id, n.name.clone(), n.peer.clone())).collect() }
    }

    /// Switched off once the others do not count on it any more.
    fn retire(&mut self, node: usize) -> Result<(), String> {
        if self.voters().contains(&self.nodes[node].id) || self.healing {
            if !self.healing {
                self.later(SECOND, Event::Mend(Mend::Retire(node)));
            }
            return Ok(());
        }
        self.end_if_running(node, End::Killed)
    }
}
