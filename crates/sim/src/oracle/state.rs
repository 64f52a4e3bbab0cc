//! A machine's whole state as text, to compare two that ought to be equal.
//!
//! Left out: the position (an empty entry moves it) and how far physical compaction has come, which is each member's own.

use std::fmt::Write as _;
use tenure_machine::{Key, Machine, NamespaceId, SessionId, Space, Span};

const NS: NamespaceId = NamespaceId::DEFAULT;

/// Every key of the key space.
pub fn all_keys() -> Span {
    Span { start: Key::new(Space::Keys, NS, b""), end: Some(Key::end_of(Space::Keys, NS)) }
}

pub fn dump(machine: &Machine) -> String {
    let mut text = String::new();
    let mut line = |l: std::fmt::Arguments<'_>| {
        // Writing to a string cannot fail.
        let _ = text.write_fmt(l);
        text.push('\n');
    };
    line(format_args!("revision {} compacted {} stamp {}", machine.revision(), machine.compacted(), machine.stamp()));
    line(format_args!("behaviour {} cluster {} issuer {:?}", machine.behaviour(), machine.cluster(), machine.issuer()));
    line(format_args!("checksum {:016x} requests {}", machine.checksum(), machine.counts().requests));
    let (records, _) = machine.range_slice(&all_keys(), machine.revision(), None, usize::MAX);
    for record in records {
        line(format_args!("key {record:?} {:?}", record.meta()));
    }
    let from = tenure_machine::Revision(machine.compacted().0 + 1);
    match machine.changes(&all_keys(), from, usize::MAX) {
        Ok(slice) => {
            slice.changes.iter().for_each(|c| line(format_args!("change {:?} {:?}", c.record, c.record.meta())))
        }
        Err(why) => line(format_args!("no history: {why}")),
    }
    for session in machine.sessions(SessionId(0), usize::MAX) {
        line(format_args!("{session:?} {:?}", machine.session_keys(session.id)));
    }
    for lock in machine.locks(NS, b"", None, usize::MAX) {
        line(format_args!("{lock:?}"));
    }
    text
}
