//! The member's own time: what the driver's clock showed while the member ran.
//!
//! Promises. C1: it never goes back. C2: a gap between two polls above the election timeout is not counted at all: the process was
//! stopped, the machine suspended or starved, and nobody could renew anything meanwhile.
//! Relies on. The driver polls at least as often as `Effects::wake_at` says, which is well within that timeout.

/// Milliseconds of a monotonic clock that does not count suspension. Only differences mean anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

impl Millis {
    pub fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

#[derive(Debug)]
pub(crate) struct Clock {
    last: Millis,
    /// Counted milliseconds since the member was opened.
    elapsed: u64,
    gap_max_ms: u64,
    gaps: u64,
    tick_ms: u64,
    untold: u64,
}

impl Clock {
    pub(crate) fn new(now: Millis, tick_ms: u64, gap_max_ms: u64) -> Self {
        Self { last: now, elapsed: 0, gap_max_ms, gaps: 0, tick_ms, untold: 0 }
    }

    /// Gives the ticks of consensus that are due.
    pub(crate) fn advance(&mut self, now: Millis) -> u64 {
        let passed = now.0.saturating_sub(self.last.0);
        self.last = self.last.max(now);
        if passed > self.gap_max_ms {
            self.gaps += 1;
            return 0;
        }
        self.elapsed += passed;
        self.untold += passed;
        let ticks = self.untold / self.tick_ms;
        self.untold %= self.tick_ms;
        ticks
    }

    pub(crate) fn elapsed(&self) -> u64 {
        self.elapsed
    }

    pub(crate) fn elapsed_at(&self, now: Millis) -> u64 {
        let passed = now.0.saturating_sub(self.last.0);
        if passed > self.gap_max_ms { self.elapsed } else { self.elapsed + passed }
    }

    /// What the driver's clock showed last.
    pub(crate) fn last(&self) -> Millis {
        self.last
    }

    /// When the driver's clock will show this moment, if nothing stops it.
    pub(crate) fn moment(&self, elapsed: u64) -> Millis {
        self.last.plus(elapsed.saturating_sub(self.elapsed))
    }

    pub(crate) fn gaps(&self) -> u64 {
        self.gaps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_not_counted_and_nothing_goes_back() {
        let mut c = Clock::new(Millis(5), 100, 1000);
        assert_eq!(c.advance(Millis(255)), 2);
        assert_eq!(c.advance(Millis(305)), 1);
        assert_eq!(c.elapsed(), 300);
        assert_eq!(c.elapsed_at(Millis(405)), 400);
        assert_eq!(c.elapsed_at(Millis(9000)), 300);
        assert_eq!(c.advance(Millis(9000)), 0);
        assert_eq!(c.advance(Millis(8000)), 0);
        assert_eq!((c.elapsed(), c.gaps()), (300, 1));
        assert_eq!(c.advance(Millis(10_000)), 10);
        assert_eq!(c.moment(1400), Millis(10_100));
    }
}
