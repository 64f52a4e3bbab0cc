//! What things cost in memory: the constants of the accounting.
//!
//! Promises. A sum over the contents, equal on every member with equal contents; it never asks the allocator, so it
//! can be recounted and tested.
//! Not promised. That it equals the resident memory: an allocator rounds sizes and keeps freed pages. The constants are chosen on the high side, so that a limit set by them is kept (examples/memory.rs
//! shows both numbers).

use crate::record::Record;
use crate::types::Revision;

/// Beside a record's bytes: the two counters of its `Arc` (16 bytes) and the rounding of the allocator for small sizes.
/// Larger ones are rounded in proportion: mimalloc's classes are 12 to 25 % apart, so half of that is lost on average,
/// of which `record_bytes` adds a sixteenth.
pub(crate) const RECORD: u64 = 16 + 8;

/// The slot of a record in the current or the past keys: a pointer and a length (16 bytes), in chunks that are about
/// 70 % full when keys come in random order.
pub(crate) const SLOT: u64 = 24;

/// The slot of a record in the log of changes, whose chunks are full.
pub(crate) const LOG_SLOT: u64 = 16;

/// What one record costs beside its slots.
pub(crate) fn record_bytes(record: &Record) -> u64 {
    let len = record.as_bytes().len() as u64;
    len + len / 16 + RECORD
}

/// What the keys hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KeysMemory {
    /// Keys that are there now.
    pub(crate) live: u64,
    /// Versions kept: live, superseded, and tombstones.
    pub(crate) versions: u64,
    /// Changes kept for watches.
    pub(crate) changes: u64,
    /// All bytes, `history` among them.
    pub(crate) bytes: u64,
    /// Bytes that compaction could give back: superseded versions, tombstones and the slots of the log.
    pub(crate) history: u64,
    pub(crate) compacted: Revision,
}
