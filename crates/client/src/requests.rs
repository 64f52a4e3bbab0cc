//! Request ids: the names under which the server remembers its answers, so that a retry is answered and not repeated.
//!
//! Promises. An id is never used for two requests. `acked_below` never passes a request whose answer has not arrived (or whose
//! caller has not given up for good), because the server forgets everything below it. At most [`OPEN_MAX`] requests of a session
//! are open at once, as the server demands; more wait for a place.

use std::collections::BTreeSet;

/// Requests of one session that may be open at once; the server's default limit.
pub(crate) const OPEN_MAX: usize = 1_000;

/// Numbers the mutating requests of one session.
#[derive(Debug)]
pub(crate) struct Sequence {
    next: u64,
    open: BTreeSet<u64>,
}

impl Sequence {
    pub(crate) fn new() -> Self {
        Self { next: 1, open: BTreeSet::new() }
    }

    /// Opens the next request; `None` where too many are open.
    pub(crate) fn begin(&mut self) -> Option<u64> {
        // The span and not the count is bounded: one old request that is still open holds all later ones.
        let oldest = self.open.first().copied().unwrap_or(self.next);
        if self.next - oldest >= OPEN_MAX as u64 {
            return None;
        }
        let seq = self.next;
        self.next += 1;
        self.open.insert(seq);
        Some(seq)
    }

    /// The answer arrived, or it is not wanted any more and the request will never be sent again.
    pub(crate) fn done(&mut self, seq: u64) {
        self.open.remove(&seq);
    }

    /// Every answer below this has arrived.
    pub(crate) fn acked_below(&self) -> u64 {
        self.open.first().copied().unwrap_or(self.next)
    }
}

/// A random id for a one-shot caller: a version 4 UUID.
pub(crate) fn uuid() -> Result<[u8; 16], getrandom::Error> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(bytes)
}

/// One random byte, to spread clients. Without randomness there is no jitter, which harms nothing.
pub(crate) fn jitter() -> u8 {
    let mut byte = [0_u8; 1];
    getrandom::fill(&mut byte).map_or(0, |()| byte[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acked_below_never_passes_an_open_request() {
        let mut sequence = Sequence::new();
        let [a, b, c] = [(); 3].map(|()| sequence.begin().unwrap());
        assert_eq!((a, b, c), (1, 2, 3));
        sequence.done(b);
        assert_eq!(sequence.acked_below(), a);
        sequence.done(a);
        assert_eq!(sequence.acked_below(), c);
        sequence.done(c);
        assert_eq!(sequence.acked_below(), 4);
    }

    #[test]
    fn one_old_open_request_bounds_the_later_ones() {
        let mut sequence = Sequence::new();
        let first = sequence.begin().unwrap();
        for _ in 1..OPEN_MAX {
            let seq = sequence.begin().unwrap();
            sequence.done(seq);
        }
        assert_eq!(sequence.begin(), None);
        sequence.done(first);
        assert!(sequence.begin().is_some());
    }

    #[test]
    fn uuids_differ_and_say_their_version() {
        let (a, b) = (uuid().unwrap(), uuid().unwrap());
        assert_ne!(a, b);
        assert_eq!((a[6] >> 4, a[8] >> 6), (4, 2));
    }
}
