//! One member's process: its disk, its clock, its worker, and whether it runs.

use crate::disk::SimDisk;
use crate::random::Random;
use std::collections::{BTreeMap, VecDeque};
use tenure_machine::{MemberId, Op, Ticket};
use tenure_replica::{Job, Join, Lane, Member, Millis};

/// Why a process does not run, or must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It runs, or will be started again.
    Sound,
    /// Its folder has a hole that was found: it is never started again and another must take its place.
    Damaged,
    /// It runs on a folder that is not the one it had: it must be refused, and never lead.
    Impostor,
    /// It was removed from the cluster.
    Removed,
}

/// What the clocks of the wall show at first, before one jumps.
pub(super) const FIRST_WALL_MS: u64 = 1_700_000_000_000;

pub(super) struct Node {
    pub(super) id: MemberId,
    pub(super) name: String,
    /// Where others dial it.
    pub(super) peer: String,
    pub(super) disk: SimDisk,
    pub(super) member: Option<Member<SimDisk>>,
    pub(super) fate: Fate,
    pub(super) boot: u64,
    pub(super) starts: u64,
    pub(super) clock: Clock,
    pub(super) join: Option<Join>,
    pub(super) behaviour: u16,
    pub(super) batch_bytes: usize,
    pub(super) wall_ms: u64,
    /// The moment of the poll that counts; others were overtaken.
    pub(super) poll_at: Option<u64>,
    /// Stopped as by SIGSTOP: nothing is read, and the clock goes on.
    pub(super) paused: bool,
    /// What arrived meanwhile.
    pub(super) backlog: Vec<(MemberId, Vec<u8>)>,
    pub(super) jobs: VecDeque<Job>,
    pub(super) working: bool,
    /// Callers: call and try.
    pub(super) tickets: BTreeMap<Ticket, Caller>,
    /// An older copy of the folder: how often it had been started by then, and the last entry of its log.
    pub(super) copy: Option<Copy>,
    /// The folder that an impostor's stands in for.
    pub(super) own_disk: Option<SimDisk>,
    /// How often the folder has been started, as the member counts.
    pub(super) boots: u64,
    /// A bit of the folder was flipped, and that shows.
    pub(super) flipped: bool,
    pub(super) led: bool,
    /// The last entry at which its state was compared.
    pub(super) judged_at: u64,
    /// Since when nothing has passed between it and any other.
    pub(super) alone_us: Option<u64>,
    /// Of schedules, as it proposes them while it leads, or has led.
    pub(super) ticks: Vec<Op>,
    /// The last term that it led, unless it has noticed that this is over.
    pub(super) led_term: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) call: u64,
    pub(super) attempt: u32,
    pub(super) since_us: u64,
    /// When it must have been answered in any case; waits for a lock have no such moment.
    pub(super) due_ms: Option<u64>,
}

pub(super) struct Copy {
    pub(super) disk: SimDisk,
    pub(super) boots: u64,
    pub(super) last_index: u64,
}

impl Node {
    pub(super) fn new(id: MemberId, name: &str, random: &mut Random) -> Self {
        Self {
            id,
            name: name.to_owned(),
            peer: format!("{name}:1"),
            disk: SimDisk::new(random.fork()),
            member: None,
            fate: Fate::Sound,
            boot: 0,
            starts: 0,
            clock: Clock::draw(random),
            join: None,
            behaviour: tenure_machine::BEHAVIOUR,
            batch_bytes: *random.pick(&[600, 4_000, 1 << 20]),
            wall_ms: FIRST_WALL_MS + random.below(5_000),
            poll_at: None,
            paused: false,
            backlog: Vec::new(),
            jobs: VecDeque::new(),
            working: false,
            tickets: BTreeMap::new(),
            copy: None,
            own_disk: None,
            boots: 0,
            flipped: false,
            led: false,
            judged_at: 0,
            alone_us: None,
            ticks: Vec::new(),
            led_term: None,
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.member.is_some()
    }

    /// It reads what arrives.
    pub(super) fn listens(&self) -> bool {
        self.member.is_some() && !self.paused
    }

    /// An arrival, at once or when it goes on.
    pub(super) fn arrive(&mut self, from: MemberId, bytes: Vec<u8>) {
        const BACKLOG_MAX: usize = 500;
        match &mut self.member {
            None => {}
            Some(_) if self.paused && self.backlog.len() < BACKLOG_MAX => self.backlog.push((from, bytes)),
            Some(_) if self.paused => {}
            Some(member) => member.receive(from, &bytes),
        }
    }
}

/// A message that a poll let out.
pub(super) type Sent = (MemberId, Lane, Vec<u8>);

/// A machine's monotonic clock, which runs a little fast or slow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    base_ms: u64,
    /// Of ten thousand.
    pub(super) rate: u64,
}

impl Clock {
    fn draw(random: &mut Random) -> Self {
        let rate = if random.coin() { *random.pick(&[9_900, 10_100]) } else { random.between(9_900, 10_100) };
        Self { base_ms: random.below(1_000_000), rate }
    }

    pub(super) fn at(&self, now_us: u64) -> Millis {
        Millis(self.base_ms + now_us * self.rate / 10_000_000)
    }

    /// The first moment of the world at which this clock shows it.
    pub(super) fn when(&self, shows: Millis) -> u64 {
        (shows.0.saturating_sub(self.base_ms) * 10_000_000).div_ceil(self.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_shows_a_moment_when_it_is_said_to() {
        let mut random = Random::new(3);
        for _ in 0..200 {
            let clock = Clock::draw(&mut random);
            let shows = Millis(clock.base_ms + random.below(100_000));
            let at = clock.when(shows);
            assert!(clock.at(at) >= shows, "{clock:?} {shows:?}");
            assert!(at == 0 || clock.at(at - 1) < shows, "{clock:?} {shows:?}");
        }
    }
}
