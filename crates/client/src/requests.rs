//! Request ids: the names under which the server remembers its answers, so that a retry is answered and not repeated.
//!
//! Promises. An id is never used for two requests. `acked_below` never passes a request whose answer has not arrived (or whose
//! caller has not given up for good), because the server forgets everything below it. At most [`OPEN_MAX`] requests of a session
//! are open at once, as the server demands. In a series of the client's own an old open request holds nobody up: the next series begins. What may wait
//! is numbered apart: a wait that stays open for hours keeps at most [`WAITS_SPAN`] answers remembered behind it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use tenure_wire::tenure::v1;

/// Requests of one session that may be open at once, or of one series; the server's default limit.
pub(crate) const OPEN_MAX: usize = 1_000;

/// How far the numbers of a series of waits go beyond the oldest open one. The server forgets no answer above that one; so with every long wait it keeps
/// so many others at most, and one series, which has a place among the one-shot ids.
pub(crate) const WAITS_SPAN: usize = 64;

/// Numbers the mutating requests of one session.
#[derive(Debug)]
pub(crate) struct Sequence {
    next: u64,
    open: BTreeSet<u64>,
    span: u64,
}

impl Sequence {
    pub(crate) fn new(span: usize) -> Self {
        Self { next: 1, open: BTreeSet::new(), span: span as u64 }
    }

    /// Opens the next request; `None` where too many are open.
    pub(crate) fn begin(&mut self) -> Option<u64> {
        // The span and not the count is bounded: one old request that is still open holds all later ones.
        let oldest = self.open.first().copied().unwrap_or(self.next);
        if self.next - oldest >= self.span {
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

/// The series under which a client numbers its changes. The server forgets a numbered answer as soon as the client says that it has it, which it does with
/// the next change; a one-shot id would keep its place for ten minutes.
#[derive(Debug)]
pub(crate) struct Numbers {
    span: usize,
    current: Mutex<Option<Arc<Series>>>,
}

#[derive(Debug)]
struct Series {
    id: u64,
    sequence: Mutex<Sequence>,
}

impl Series {
    fn sequence<T>(&self, act: impl FnOnce(&mut Sequence) -> T) -> T {
        act(&mut self.sequence.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Numbers {
    pub(crate) fn new(span: usize) -> Self {
        Self { span, current: Mutex::new(None) }
    }

    /// Opens the next request.
    pub(crate) fn next(&self) -> Result<Number, getrandom::Error> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(series) = &*current
            && let Some(seq) = series.sequence(Sequence::begin)
        {
            return Ok(Number { series: series.clone(), seq });
        }
        let mut id = [0; 8];
        getrandom::fill(&mut id)?;
        let mut sequence = Sequence::new(self.span);
        let seq = sequence.begin().unwrap_or(1);
        let series = Arc::new(Series { id: u64::from_le_bytes(id), sequence: Mutex::new(sequence) });
        *current = Some(series.clone());
        Ok(Number { series, seq })
    }
}

/// A change that is open under a series. Dropped when its last try is over: the server is then told that it may forget it.
#[derive(Debug)]
pub(crate) struct Number {
    series: Arc<Series>,
    seq: u64,
}

impl Number {
    pub(crate) fn meta(&self) -> v1::RequestMeta {
        let acked_below = self.series.sequence(|sequence| sequence.acked_below());
        let series = v1::SeriesSeq { series: self.series.id, seq: self.seq, acked_below };
        v1::RequestMeta { id: Some(v1::request_meta::Id::Series(series)) }
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        self.series.sequence(|sequence| sequence.done(self.seq));
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
        let mut sequence = Sequence::new(OPEN_MAX);
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
        let mut sequence = Sequence::new(OPEN_MAX);
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
    fn an_old_request_does_not_hold_up_those_of_the_next_series() {
        use v1::request_meta::Id;
        let place = |number: &Number| match number.meta().id {
            Some(Id::Series(at)) => (at.series, at.seq, at.acked_below),
            other => panic!("{other:?}"),
        };
        let numbers = Numbers::new(OPEN_MAX);
        let waits = numbers.next().unwrap();
        let (first, ..) = place(&waits);
        for seq in 2..=OPEN_MAX as u64 {
            assert_eq!(place(&numbers.next().unwrap()), (first, seq, 1));
        }
        let next = numbers.next().unwrap();
        assert_eq!((place(&next).1, place(&next).2), (1, 1));
        assert_ne!(place(&next).0, first);
        assert_eq!(place(&waits), (first, 1, 1));
    }

    #[test]
    fn uuids_differ_and_say_their_version() {
        let (a, b) = (uuid().unwrap(), uuid().unwrap());
        assert_ne!(a, b);
        assert_eq!((a[6] >> 4, a[8] >> 6), (4, 2));
    }
}
