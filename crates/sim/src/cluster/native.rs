//! What the clients of a cluster ask of the native primitives: few names, so that they meet, and old tokens, as whoever slept would use them.

use super::people::Person;
use crate::random::Random;
use tenure_machine::*;

fn name(what: &str, random: &mut Random) -> Box<[u8]> {
    format!("{what}{}", random.below(2)).into_bytes().into()
}

/// One operation of a primitive.
pub(super) fn draw(_number: u64, _index: usize, _person: &Person, random: &mut Random) -> Txn {
    let op = match random.below(2) {
        0 => CounterOp::Add(CounterAdd { name: name("c", random), delta: 1, min: None, max: None }),
        _ => CounterOp::Next(SequenceNext { name: name("s", random), block: random.between(1, 5), at_least: 0 }),
    };
    Txn::of(op.into())
}

/// The operation of a primitive that a transaction carries.
pub(super) fn op_of(txn: &Txn) -> Option<&NativeOp> {
    match txn.then.first() {
        Some(Op::Native(op)) => Some(op),
        _ => None,
    }
}
