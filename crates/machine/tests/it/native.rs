//! How scripts write the operations of the native primitives: a file for each.

mod configs;
mod counters;
mod elections;
mod idempotency;
mod locks;
mod markers;
mod queues;
mod registry;
mod reservations;
mod schedules;
mod txns;

use tenure_machine::{Machine, NamespaceId, NativeReply, Op};

pub(crate) use txns::condition;

/// An operation as its line says it: a verb, plain words, and options `name=value`.
pub(crate) struct Said<'a> {
    pub(crate) verb: &'a str,
    pub(crate) words: &'a [&'a str],
}

impl<'a> Said<'a> {
    pub(crate) fn new(words: &'a [&'a str]) -> Self {
        Self { verb: words[0], words: &words[1..] }
    }

    /// The nth plain word.
    pub(crate) fn plain(&self, n: usize) -> Option<&'a str> {
        self.words.iter().copied().filter(|w| !w.contains('=')).nth(n)
    }

    pub(crate) fn has(&self, flag: &str) -> bool {
        self.words.contains(&flag)
    }

    pub(crate) fn option(&self, name: &str) -> Option<&'a str> {
        self.words.iter().find_map(|w| w.strip_prefix(name)?.strip_prefix('='))
    }

    /// A number, or zero.
    pub(crate) fn number(&self, name: &str) -> u64 {
        self.option(name).map_or(0, |n| n.parse().unwrap())
    }

    pub(crate) fn bytes(&self, name: &str) -> Box<[u8]> {
        self.option(name).unwrap_or_default().as_bytes().into()
    }

    /// A time such as `5s` or `200`, or zero.
    pub(crate) fn ms(&self, name: &str) -> u64 {
        self.option(name).map_or(0, crate::script::millis)
    }
}

pub(crate) fn op(said: &Said<'_>) -> Option<Op> {
    None.or_else(|| configs::op(said))
        .or_else(|| counters::op(said))
        .or_else(|| elections::op(said))
        .or_else(|| idempotency::op(said))
        .or_else(|| locks::op(said))
        .or_else(|| markers::op(said))
        .or_else(|| queues::op(said))
        .or_else(|| registry::op(said))
        .or_else(|| reservations::op(said))
        .or_else(|| schedules::op(said))
        .or_else(|| txns::op(said))
}

/// An answer in words shorter than its fields.
pub(crate) fn said(reply: &NativeReply) -> String {
    queues::said(reply).or_else(|| locks::said(reply)).unwrap_or_else(|| format!("{reply:?}"))
}

pub(crate) fn show(machine: &Machine, namespace: NamespaceId, what: &str, rest: &[&str]) -> Option<String> {
    None.or_else(|| configs::show(machine, namespace, what, rest))
        .or_else(|| counters::show(machine, namespace, what, rest))
        .or_else(|| elections::show(machine, namespace, what, rest))
        .or_else(|| idempotency::show(machine, namespace, what, rest))
        .or_else(|| locks::show(machine, namespace, what, rest))
        .or_else(|| markers::show(machine, namespace, what, rest))
        .or_else(|| queues::show(machine, namespace, what, rest))
        .or_else(|| registry::show(machine, namespace, what, rest))
        .or_else(|| reservations::show(machine, namespace, what, rest))
        .or_else(|| schedules::show(machine, namespace, what, rest))
}
