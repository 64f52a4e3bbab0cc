//! The messages that the published `raft` crate names, as plain structs with a frozen encoding of our own.
//!
//! Promises. P1: the bytes of a value do not change between releases; the first byte is a version, and an unknown one is refused.
//! P2: decoding takes any bytes without panic, recursion, or memory beyond a small multiple of their length.
//! P3: what is decoded equals what was encoded.
//! Not promised. Protocol Buffers, or the bytes of any other project that uses `raft`.
//!
//! Entry data are `Bytes`: `raft` clones each entry several times on its way to disk, peers and apply, and here each such
//! clone is a reference count instead of a copy.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod confchange;
pub mod eraftpb;
mod wire;

pub use confchange::{ConfChangeI, conf_state_eq, new_conf_change_single};

pub mod prelude {
    //! What `raft` re-exports.
    pub use crate::eraftpb::{
        ConfChange, ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType,
        HardState, Message, MessageType, Snapshot, SnapshotMetadata,
    };
}
