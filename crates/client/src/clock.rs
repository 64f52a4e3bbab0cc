//! The clock of deadlines: time since boot, counting the time the machine was suspended.
//!
//! A clock that stands still during suspension would let a laptop or a paused virtual machine wake up and believe that its
//! lease is fresh. The wall clock can be set back, so it is used only to *show* a deadline.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A moment on the boot-time clock of this machine. It means nothing on another machine or after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

impl BootTime {
    /// The moment `since_boot` after the machine started; for tests and for clocks of one's own.
    #[must_use]
    pub const fn from_boot(since_boot: Duration) -> Self {
        Self(since_boot)
    }

    /// Reads the clock.
    #[must_use]
    pub fn now() -> Self {
        Self(read())
    }

    /// How long after boot.
    #[must_use]
    pub const fn since_boot(self) -> Duration {
        self.0
    }

    /// The time from `earlier` to this moment; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// The moment `by` later.
    #[must_use]
    pub fn plus(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by))
    }

    /// This moment as milliseconds of Unix time, by the wall clock as it stands now. For display and for other processes of this machine.
    #[must_use]
    pub fn unix_ms(self) -> u64 {
        let (now, wall) = (Self::now(), SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default());
        let at = (wall + self.since(now)).saturating_sub(now.since(self));
        millis(at)
    }
}

/// A length of time as it is sent; the longest there is where it is too long for that.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl fmt::Display for BootTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} s after boot", self.0.as_secs_f64())
    }
}

#[cfg(target_os = "linux")]
fn read() -> Duration {
    use rustix::time::{ClockId, DynamicClockId, clock_gettime, clock_gettime_dynamic};
    // A kernel older than 2.6.39 has no boot-time clock; there is no such machine left, but no panic either.
    let time = clock_gettime_dynamic(DynamicClockId::Boottime).unwrap_or_else(|_| clock_gettime(ClockId::Monotonic));
    from_timespec(time.tv_sec, time.tv_nsec)
}

// On Apple's systems the monotonic clock goes on during sleep.
#[cfg(all(unix, not(target_os = "linux")))]
fn read() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    from_timespec(time.tv_sec, time.tv_nsec)
}

fn from_timespec(seconds: i64, nanos: i64) -> Duration {
    Duration::new(u64::try_from(seconds).unwrap_or(0), u32::try_from(nanos).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_moves_and_maps_to_wall_time() {
        let first = BootTime::now();
        std::thread::sleep(Duration::from_millis(5));
        assert!(BootTime::now().since(first) >= Duration::from_millis(5));
        let wall = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap();
        let shown = BootTime::now().plus(Duration::from_secs(10)).unix_ms();
        assert!(shown.abs_diff(wall + 10_000) < 1_000);
    }
}
