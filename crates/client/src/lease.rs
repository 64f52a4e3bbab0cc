//! The deadline rule: until when a client may act under a session, decided without a clock of its own.
//!
//! Promises. D1: the deadline is `t_send + ttl * 99 % - margin` of the last renewal that succeeded, where `t_send` is the moment
//! its *first* try was sent; the server counts from a later moment, so its expiry is never earlier. D2: once lost, a lease stays
//! lost, whatever answer arrives afterwards. D3: `lost` is reported exactly once. D4: every look at the state takes the time it
//! is asked at, so a process that was frozen learns at its next look that the deadline has passed, timers or not.
//! Not promised. Between a look at the state and the effect it allowed, any time may pass: only a check of the token at the
//! resource closes that gap.

use crate::clock::BootTime;
use std::fmt;
use std::time::Duration;

/// May the holder act?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseState {
    /// Renewed lately.
    Safe,
    /// No renewal has succeeded for half of the ttl, so at least one whole try was lost: start no new outside effect.
    AtRisk,
    /// The deadline has passed, or the server said that the session is over. Nothing may be written any more.
    Lost,
}

impl fmt::Display for LeaseState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safe => "safe",
            Self::AtRisk => "at risk",
            Self::Lost => "lost",
        })
    }
}

/// Why a lease was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LostReason {
    /// The local deadline passed without a renewal.
    DeadlinePassed {
        /// How long after the last successful renewal was sent this was noticed. Much more than the ttl: the process was frozen.
        after: Duration,
    },
    /// The server said that the session has ended.
    EndedByServer,
    /// This process ended the session itself.
    Closed,
}

impl fmt::Display for LostReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeadlinePassed { after } => {
                write!(f, "the lease was not renewed for {:.1} s and its deadline passed", after.as_secs_f64())
            }
            Self::EndedByServer => f.write_str("the server says that the session has ended"),
            Self::Closed => f.write_str("the session was ended by this process"),
        }
    }
}

/// How a lease is timed; the defaults are those of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTiming {
    ttl: Duration,
    margin: Duration,
}

/// The least margin, so that a short ttl still leaves time to stop.
const MARGIN_MIN: Duration = Duration::from_millis(200);
/// How far the clock rates of client and server may be apart: one part in this many.
const DRIFT: u32 = 100;

impl LeaseTiming {
    /// The timing of a ttl, as granted by the server.
    #[must_use]
    pub fn of(ttl: Duration) -> Self {
        Self { ttl, margin: (ttl / 10).max(MARGIN_MIN) }
    }

    /// A margin of one's own, at most half of the ttl: for work that needs longer to stop.
    #[must_use]
    pub fn with_margin(self, margin: Duration) -> Self {
        Self { margin: margin.min(self.ttl / 2), ..self }
    }

    /// The time to live, as granted.
    #[must_use]
    pub const fn ttl(&self) -> Duration {
        self.ttl
    }

    /// How long after the sending of a renewal the holder may act.
    #[must_use]
    pub fn usable(&self) -> Duration {
        (self.ttl - self.ttl / DRIFT).saturating_sub(self.margin)
    }

    /// After how long without a success one whole try was lost.
    #[must_use]
    pub fn at_risk_after(&self) -> Duration {
        self.ttl / 2
    }

    /// How long to wait between renewals, with up to 10 % of `jitter` (of 0..=255) taken off, so that many clients spread out.
    #[must_use]
    pub fn renew_every(&self, jitter: u8) -> Duration {
        let third = self.ttl / 3;
        third - third / 10 * u32::from(jitter) / 255
    }

    /// How long one try of a renewal may take. Three tries fit before the deadline.
    #[must_use]
    pub fn try_timeout(&self) -> Duration {
        self.ttl / 6
    }
}

/// The lease as its holder sees it.
#[derive(Clone, Debug)]
pub struct Lease {
    timing: LeaseTiming,
    /// When the first try of the last renewal that succeeded was sent.
    sent: BootTime,
    lost: Option<LostReason>,
    told: bool,
}

impl Lease {
    /// A lease that the server granted in answer to a request whose first try was sent at `first_sent`.
    ///
    /// A replayed answer must name the first try too: the ttl has run since then.
    #[must_use]
    pub fn granted(timing: LeaseTiming, first_sent: BootTime) -> Self {
        Self { timing, sent: first_sent, lost: None, told: false }
    }

    /// The moment from which the holder must not act.
    #[must_use]
    pub fn deadline(&self) -> BootTime {
        self.sent.plus(self.timing.usable())
    }

    /// Its timing.
    #[must_use]
    pub const fn timing(&self) -> LeaseTiming {
        self.timing
    }

    /// When the last renewal that succeeded was first sent.
    #[must_use]
    pub const fn renewed_at(&self) -> BootTime {
        self.sent
    }

    /// The state at `now`. Remembers a loss.
    pub fn state(&mut self, now: BootTime) -> LeaseState {
        if self.lost.is_none() && now >= self.deadline() {
            self.lost = Some(LostReason::DeadlinePassed { after: now.since(self.sent) });
        }
        if self.lost.is_some() {
            LeaseState::Lost
        } else if now >= self.sent.plus(self.timing.at_risk_after()) {
            LeaseState::AtRisk
        } else {
            LeaseState::Safe
        }
    }

    /// A renewal first sent at `first_sent` was answered at `now`. An answer that arrives after the deadline renews nothing.
    pub fn renewed(&mut self, first_sent: BootTime, ttl: Duration, now: BootTime) -> LeaseState {
        if self.state(now) == LeaseState::Lost || first_sent < self.sent {
            return self.state(now);
        }
        // The server may grant another ttl than before; a margin of one's own stays.
        if ttl != self.timing.ttl {
            let margin = self.timing.margin;
            self.timing = LeaseTiming::of(ttl);
            self.timing.margin = self.timing.margin.max(margin.min(ttl / 2));
        }
        self.sent = first_sent;
        self.state(now)
    }

    /// The session is over for another reason than time.
    pub fn end(&mut self, why: LostReason) {
        self.lost.get_or_insert(why);
    }

    /// The reason of the loss, the first time it is asked for after the loss, and never again.
    pub fn tell_lost(&mut self, now: BootTime) -> Option<LostReason> {
        if self.state(now) != LeaseState::Lost || self.told {
            return None;
        }
        self.told = true;
        self.lost.clone()
    }

    /// The reason of the loss.
    #[must_use]
    pub const fn lost(&self) -> Option<&LostReason> {
        self.lost.as_ref()
    }

    /// When the state may change by time alone; `None` once lost.
    #[must_use]
    pub fn next_change(&self, now: BootTime) -> Option<BootTime> {
        if self.lost.is_some() {
            return None;
        }
        let risk = self.sent.plus(self.timing.at_risk_after());
        Some(if now < risk { risk.min(self.deadline()) } else { self.deadline() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(ms: u64) -> BootTime {
        BootTime::from_boot(Duration::from_millis(ms))
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn lease(ttl_ms: u64, sent_ms: u64) -> Lease {
        Lease::granted(LeaseTiming::of(ms(ttl_ms)), at(sent_ms))
    }

    #[test]
    fn d1_the_deadline_counts_from_the_sending_less_drift_and_margin() {
        // 15 s: 1 % drift is 150 ms, the margin a tenth.
        assert_eq!(lease(15_000, 1_000).deadline(), at(1_000 + 15_000 - 150 - 1_500));
        // 1 s: the margin is its least.
        assert_eq!(lease(1_000, 0).deadline(), at(1_000 - 10 - 200));
    }

    #[test]
    fn d1_a_replayed_create_does_not_lengthen_the_deadline() {
        // First try at 0, unanswered; the second at 3 s is answered from the server's memory. The ttl has run since 0.
        let lease = lease(15_000, 0);
        assert_eq!(lease.deadline(), at(13_350));
    }

    #[test]
    fn d1_three_tries_fit_before_the_deadline() {
        let timing = LeaseTiming::of(ms(15_000));
        let slowest = timing.renew_every(0) + timing.try_timeout() * 3;
        assert!(slowest < timing.usable(), "{slowest:?} of {:?}", timing.usable());
        assert!(timing.renew_every(255) >= ms(4_500) && timing.renew_every(0) == ms(5_000));
    }

    #[test]
    fn d2_an_answer_after_the_deadline_renews_nothing() {
        let mut lease = lease(1_000, 0);
        assert_eq!(lease.renewed(at(700), ms(1_000), at(800)), LeaseState::Lost);
        assert_eq!(lease.renewed(at(801), ms(1_000), at(802)), LeaseState::Lost);
        assert_eq!(lease.deadline(), at(790));
    }

    #[test]
    fn an_older_renewal_answered_late_moves_nothing_back() {
        let mut lease = lease(15_000, 0);
        lease.renewed(at(5_000), ms(15_000), at(5_010));
        lease.renewed(at(4_000), ms(15_000), at(5_020));
        assert_eq!(lease.renewed_at(), at(5_000));
    }

    #[test]
    fn d3_lost_is_told_once() {
        let mut lease = lease(1_000, 0);
        assert_eq!(lease.tell_lost(at(789)), None);
        assert_eq!(lease.tell_lost(at(790)), Some(LostReason::DeadlinePassed { after: ms(790) }));
        assert_eq!(lease.tell_lost(at(791)), None);
        lease.end(LostReason::EndedByServer);
        assert_eq!(lease.lost(), Some(&LostReason::DeadlinePassed { after: ms(790) }));
    }

    #[test]
    fn d4_a_frozen_process_is_lost_at_its_next_check() {
        let mut lease = lease(15_000, 0);
        assert_eq!(lease.state(at(7_000)), LeaseState::Safe);
        // SIGSTOP for an hour: no timer ran, yet the first look tells.
        assert_eq!(lease.state(at(3_600_000)), LeaseState::Lost);
        assert_eq!(lease.next_change(at(3_600_000)), None);
    }

    #[test]
    fn states_go_safe_at_risk_lost_and_back_to_safe_only_before_the_loss() {
        let mut lease = lease(10_000, 0);
        assert_eq!(lease.state(at(4_999)), LeaseState::Safe);
        assert_eq!(lease.next_change(at(4_999)), Some(at(5_000)));
        assert_eq!(lease.state(at(5_000)), LeaseState::AtRisk);
        assert_eq!(lease.next_change(at(5_000)), Some(at(8_900)));
        assert_eq!(lease.renewed(at(5_000), ms(10_000), at(5_001)), LeaseState::Safe);
        assert_eq!(lease.state(at(13_900)), LeaseState::Lost);
    }

    #[test]
    fn the_server_may_grant_another_ttl_and_a_margin_of_ones_own_stays() {
        let mut lease = Lease::granted(LeaseTiming::of(ms(10_000)).with_margin(ms(3_000)), at(0));
        assert_eq!(lease.deadline(), at(6_900));
        lease.renewed(at(1_000), ms(20_000), at(1_001));
        assert_eq!(lease.deadline(), at(1_000 + 20_000 - 200 - 3_000));
    }
}
