//! How much of the disk is free, between two looks at it.
//!
//! Promises. M1: what was written since the last look, and what jobs under way may write, is taken off what that look found, so a disk
//! that is faster than the looks are frequent is not overrun.
//! Not promised. That the figure is exact: bytes that only replaced others are taken off too, until the next look. What other processes
//! write is seen by a look only.

use crate::job::Job;
use std::collections::VecDeque;

#[derive(Debug)]
pub(crate) struct Room {
    /// What the last look found.
    found: u64,
    /// Written since.
    written: u64,
    /// What each job under way may write, in their order.
    promised: VecDeque<u64>,
}

impl Room {
    /// Before the first look there is room for everything.
    pub(crate) fn unknown() -> Self {
        Self { found: u64::MAX, written: 0, promised: VecDeque::new() }
    }

    pub(crate) fn free(&self) -> u64 {
        self.found.saturating_sub(self.written).saturating_sub(self.promised.iter().sum())
    }

    /// Whether a look could find more than `free` says.
    pub(crate) fn is_guess(&self) -> bool {
        self.written > 0
    }

    pub(crate) fn look(&mut self, found: u64) {
        self.found = found;
        self.written = 0;
    }

    pub(crate) fn wrote(&mut self, bytes: u64) {
        self.written += bytes;
    }

    pub(crate) fn job_begins(&mut self, job: &Job) {
        self.promised.push_back(job.bytes());
    }

    /// Jobs end in the order in which they began. One that failed may have written all the same.
    pub(crate) fn job_ends(&mut self) {
        self.written += self.promised.pop_front().unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_and_promised_is_not_free() {
        let mut room = Room::unknown();
        assert_eq!(room.free(), u64::MAX);
        room.look(100);
        room.wrote(10);
        assert!(room.free() == 90 && room.is_guess());
        room.job_begins(&Job::PrepareSegment { id: 1, bytes: 50, spare: None });
        room.job_begins(&Job::PrepareSegment { id: 2, bytes: 50, spare: Some("spare".to_owned()) });
        assert_eq!(room.free(), 40);
        room.look(70);
        assert_eq!(room.free(), 20, "the job may have written nothing so far");
        room.job_ends();
        room.job_ends();
        assert!(room.free() == 20 && room.is_guess());
        room.look(60);
        assert!(room.free() == 60 && !room.is_guess());
    }
}
