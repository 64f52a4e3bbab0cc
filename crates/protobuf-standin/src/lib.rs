//! Stands in for the `protobuf` crate, of which the published `raft` names one trait and one error type.
//!
//! Promises. Exactly what `raft` 0.7 needs to build, so that neither `protoc` nor a parser with an open advisory is part of the tree.
//! Not promised. Protocol Buffers: the bytes are those of `raft-proto`, a format of our own.
//! docs/design/0001-consensus-library.md gives the reason.

use std::fmt;

/// A value with a written encoding.
pub trait Message {
    /// The bytes that `write_to_bytes` will give; `raft` bounds its messages by it.
    fn compute_size(&self) -> u32;

    fn write_to_bytes(&self) -> Result<Vec<u8>, ProtobufError>;

    /// Replaces the value by the one that `bytes` hold. No bytes at all are the default value.
    fn merge_from_bytes(&mut self, bytes: &[u8]) -> Result<(), ProtobufError>;
}

/// Why bytes are not a value. Decoding trusts nothing: the bytes may come from another member or from a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtobufError {
    Truncated,
    TrailingBytes,
    NumberTooLarge,
    UnknownVersion(u8),
    UnknownEnum { what: &'static str, number: u64 },
}

impl fmt::Display for ProtobufError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => write!(f, "the bytes end inside a value"),
            Self::TrailingBytes => write!(f, "bytes follow the value"),
            Self::NumberTooLarge => write!(f, "a number does not fit into 64 bits"),
            Self::UnknownVersion(version) => {
                write!(f, "encoding version {version} is not known here")
            }
            Self::UnknownEnum { what, number } => {
                write!(f, "{what} has no member with the number {number}")
            }
        }
    }
}

impl std::error::Error for ProtobufError {}
