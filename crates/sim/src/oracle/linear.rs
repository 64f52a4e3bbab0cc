//! Was every key a register that each call touched at one moment between its start and its end?
//!
//! Promises. A history is refused only if no order of its calls explains it: a call whose outcome is unknown may have happened
//! at any later time, or never.
//! Not promised. Anything across keys: that transactions are whole is for `ledger.rs`.
//!
//! The search is that of Wing and Gong with the visited states remembered (Lowe). Values are unique to their call, which keeps
//! it short: an unknown write that nobody saw is left out, and a read of the value that stands is taken at once.

use std::collections::BTreeSet;

/// What stood or was put there: the number of the call that wrote it, `None` for no key.
pub type Value = Option<u64>;

/// One call's touch of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    pub call: u64,
    pub began: u64,
    /// `None`: the outcome is unknown.
    pub ended: Option<u64>,
    /// What it saw there.
    pub saw: Option<Value>,
    /// What it left there.
    pub left: Option<Value>,
}

/// The newest state that still explains the history, and the touch that no longer fits.
pub type Explanation = String;

/// Judges one key's touches, in any order.
pub fn check(touches: &[Touch]) -> Result<(), Explanation> {
    let seen: BTreeSet<u64> = touches.iter().filter_map(|t| t.saw.flatten()).collect();
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for touch in touches {
        match (touch.ended, touch.left) {
            (Some(_), _) => known.push(*touch),
            (None, Some(Some(call))) if !seen.contains(&call) => {}
            (None, Some(_)) => unknown.push(*touch),
            (None, None) => {}
        }
    }
    known.sort_by_key(|t| t.began);
    unknown.sort_by_key(|t| t.began);
    if unknown.len() > 64 {
        return Err(format!("{} unknown outcomes of one key are more than this check can weigh", unknown.len()));
    }
    Search { known: &known, unknown: &unknown, visited: BTreeSet::new(), best: 0 }.run()
}

/// One call may stay open while so many others touch its key.
const WINDOW: usize = 128;

/// How far an order has come: every known touch before `base`, those of `mask` after it, the unknown ones of `taken`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    base: usize,
    mask: u128,
    taken: u64,
    value: Value,
}

struct Search<'a> {
    known: &'a [Touch],
    unknown: &'a [Touch],
    visited: BTreeSet<Place>,
    best: usize,
}

impl Search<'_> {
    fn run(mut self) -> Result<(), Explanation> {
        let mut stack = vec![Place { base: 0, mask: 0, taken: 0, value: None }];
        while let Some(place) = stack.pop() {
            if place.base == self.known.len() {
                return Ok(());
            }
            if self.visited.insert(place) {
                self.best = self.best.max(place.base);
                self.next(place, &mut stack);
            }
        }
        let stuck = self.known[self.best];
        Err(format!(
            "no order explains call {}, which saw {:?} and left {:?} between {} and {:?}",
            stuck.call, stuck.saw, stuck.left, stuck.began, stuck.ended
        ))
    }

    fn next(&self, place: Place, stack: &mut Vec<Place>) {
        let open = |i: usize| i - place.base >= WINDOW || place.mask & (1 << (i - place.base)) == 0;
        // Nothing that began after another open touch had ended can come before it.
        let mut horizon = u64::MAX;
        for i in place.base..self.known.len() {
            if self.known[i].began > horizon {
                break;
            }
            if open(i) {
                horizon = horizon.min(self.known[i].ended.unwrap_or(u64::MAX));
            }
        }
        let first = stack.len();
        for i in place.base..self.known.len().min(place.base + WINDOW) {
            let touch = self.known[i];
            if touch.began > horizon {
                break;
            }
            if !open(i) || touch.saw.is_some_and(|saw| saw != place.value) {
                continue;
            }
            let after = advance(place, i, touch.left.unwrap_or(place.value), self.known.len());
            if touch.left.is_none() {
                // A read that fits changes nothing for anybody else: it may as well come now.
                stack.truncate(first);
                stack.push(after);
                return;
            }
            stack.push(after);
        }
        // Unknown deletions are alike once they have begun, so the first of them stands for all.
        let mut deletion = place.value.is_some();
        for (i, touch) in self.unknown.iter().enumerate() {
            let is_deletion = touch.left == Some(None);
            if touch.began < horizon && place.taken & (1 << i) == 0 && (!is_deletion || deletion) {
                deletion &= !is_deletion;
                stack.push(Place { taken: place.taken | 1 << i, value: touch.left.flatten(), ..place });
            }
        }
    }
}

fn advance(place: Place, i: usize, value: Value, len: usize) -> Place {
    let mut next = Place { mask: place.mask | 1 << (i - place.base), value, ..place };
    while next.base < len && next.mask & 1 == 1 {
        next.base += 1;
        next.mask >>= 1;
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(call: u64, began: u64, ended: Option<u64>) -> Touch {
        Touch { call, began, ended, saw: None, left: Some(Some(call)) }
    }

    fn read(saw: Value, began: u64, ended: u64) -> Touch {
        Touch { call: 1000 + began, began, ended: Some(ended), saw: Some(saw), left: None }
    }

    #[test]
    fn histories() {
        let ok = |touches: &[Touch]| assert_eq!(check(touches), Ok(()));
        let bad = |touches: &[Touch]| assert!(check(touches).is_err());
        ok(&[]);
        ok(&[write(1, 1, Some(2)), read(Some(1), 3, 4)]);
        bad(&[write(1, 1, Some(2)), read(None, 3, 4)]);
        // Concurrent: either is fine, and back again is not.
        ok(&[write(1, 1, Some(5)), read(None, 2, 3), read(Some(1), 4, 6)]);
        bad(&[write(1, 1, Some(9)), read(Some(1), 2, 3), read(None, 4, 5)]);
        // An unknown write may come late or never, but not be undone.
        ok(&[write(1, 1, Some(2)), write(2, 3, None), read(Some(1), 4, 5), read(Some(2), 6, 7)]);
        ok(&[write(1, 1, Some(2)), write(2, 3, None), read(Some(1), 4, 5)]);
        bad(&[write(1, 1, Some(2)), write(2, 3, None), read(Some(2), 4, 5), read(Some(1), 6, 7)]);
        // A swap must have seen what stood.
        let swap = Touch { call: 3, began: 3, ended: Some(4), saw: Some(Some(9)), left: Some(Some(3)) };
        bad(&[write(1, 1, Some(2)), swap]);
    }

    #[test]
    fn a_long_history_with_many_unknowns_is_judged_quickly() {
        let mut touches = Vec::new();
        for i in 0..400u64 {
            touches.push(write(i, i * 10, Some(i * 10 + 15)));
            touches.push(read(Some(i), i * 10 + 16, i * 10 + 17));
            if i % 10 == 0 {
                touches.push(Touch { call: 5000 + i, began: i * 10 + 1, ended: None, saw: None, left: Some(None) });
            }
        }
        assert_eq!(check(&touches), Ok(()));
        touches.push(read(Some(3), 9000, 9001));
        assert!(check(&touches).is_err());
    }
}
