//! Connections between members and what happens to messages on them.
//!
//! Each member dials those that it names (`Member::peers`); a connection carries what the dialler sends, and a hello in both
//! directions when it begins. It is told as gone (`Member::hung_up`) when no connection with that life of the peer is left.
//! Messages on it are lost, delayed, doubled and overtaken as the seed says, which is worse than TCP: members must allow for it.

use crate::random::Random;
use std::collections::{BTreeMap, BTreeSet};

/// In a thousand, and microseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quality {
    pub(super) loss: u64,
    pub(super) twice: u64,
    /// Messages of one connection keep their order.
    pub(super) ordered: bool,
    pub(super) delay_us: (u64, u64),
    /// Now and then one takes much longer.
    pub(super) stray: u64,
}

impl Quality {
    pub(super) const GOOD: Self = Self { loss: 0, twice: 0, ordered: true, delay_us: (50, 400), stray: 0 };

    pub(super) fn draw(random: &mut Random) -> Self {
        let delay = *random.pick(&[300, 1_000, 8_000]);
        match random.below(4) {
            0 => Self { delay_us: (50, delay), ..Self::GOOD },
            1 => Self { loss: 20, delay_us: (50, delay), ..Self::GOOD },
            2 => Self { loss: 10, twice: 30, ordered: false, delay_us: (50, delay), stray: 10 },
            _ => Self { loss: 80, twice: 60, ordered: false, delay_us: (50, 4 * delay), stray: 40 },
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Connection {
    pub(super) serial: u64,
    /// The lives at its two ends: of who dialled, and of who was dialled.
    pub(super) boots: (u64, u64),
    /// Both have read the other's hello.
    pub(super) open: bool,
    /// No message before this moment, where order is kept: by lane.
    pub(super) next_us: [u64; 2],
}

pub(super) struct Net {
    pub(super) quality: Quality,
    /// Nothing passes from the first to the second.
    pub(super) cuts: BTreeSet<(usize, usize)>,
    /// By who dialled and who was dialled.
    pub(super) connections: BTreeMap<(usize, usize), Connection>,
    /// Connections that an end knows to be gone: nothing more of them is read.
    pub(super) read_out: BTreeSet<u64>,
    pub(super) next_serial: u64,
}

impl Net {
    pub(super) fn new(quality: Quality) -> Self {
        Self { quality, cuts: BTreeSet::new(), connections: BTreeMap::new(), read_out: BTreeSet::new(), next_serial: 1 }
    }

    pub(super) fn passes(&self, from: usize, to: usize) -> bool {
        !self.cuts.contains(&(from, to))
    }

    pub(super) fn connect(&mut self, from: usize, to: usize, boots: (u64, u64)) -> u64 {
        let serial = self.next_serial;
        self.next_serial += 1;
        self.connections.insert((from, to), Connection { serial, boots, open: false, next_us: [0; 2] });
        serial
    }

    /// Whether anything still connects these two, with that life at the far end.
    pub(super) fn connected(&self, near: usize, far: usize, far_boot: u64) -> bool {
        self.connections.get(&(near, far)).is_some_and(|c| c.boots.1 == far_boot)
            || self.connections.get(&(far, near)).is_some_and(|c| c.boots.0 == far_boot)
    }

    /// When the copies of a message arrive; none if it is lost.
    pub(super) fn arrivals(&mut self, pair: (usize, usize), bulk: bool, now_us: u64, random: &mut Random) -> Vec<u64> {
        let q = self.quality;
        let Some(connection) = self.connections.get_mut(&pair) else { return Vec::new() };
        let mut arrivals = Vec::new();
        let copies = 1 + u64::from(q.twice > 0 && random.chance(q.twice, 1_000));
        for _ in 0..copies {
            if q.loss > 0 && random.chance(q.loss, 1_000) {
                continue;
            }
            let mut at = now_us + random.between(q.delay_us.0, q.delay_us.1);
            if bulk {
                at += random.between(1_000, 20_000);
            }
            if q.stray > 0 && random.chance(q.stray, 1_000) {
                at += random.between(10_000, 900_000);
            }
            if q.ordered {
                let next = &mut connection.next_us[usize::from(bulk)];
                at = at.max(*next);
                *next = at + 1;
            }
            arrivals.push(at);
        }
        arrivals
    }
}
