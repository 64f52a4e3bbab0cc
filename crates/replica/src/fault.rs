//! Why a member does not start, and why it stops.

use std::fmt;
use std::io;

/// Why a folder was not opened. Nothing in it was changed, but for files that an interrupted start had left.
#[derive(Debug)]
pub enum OpenError {
    /// The folder holds something that this release does not read.
    OtherFormat {
        file: String,
        why: String,
    },
    OtherCluster {
        found: String,
        wanted: String,
    },
    OtherMember {
        found: u64,
        found_name: String,
        wanted: u64,
        wanted_name: String,
    },
    /// Bytes that were once durable are gone or altered. The member must not serve, vote or lead with a hole.
    Damaged {
        file: String,
        offset: u64,
        why: String,
    },
    /// The log holds an entry that this release does not apply, or the state differs from what the log says.
    Machine(tenure_machine::Fault),
    Consensus {
        why: String,
    },
    Io {
        doing: &'static str,
        file: String,
        error: io::Error,
    },
    Config {
        why: String,
    },
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OtherFormat { file, why } => write!(f, "the data folder is of another format: {file}: {why}"),
            Self::OtherCluster { found, wanted } => {
                write!(f, "the data folder belongs to the cluster `{found}`, this member was started for `{wanted}`")
            }
            Self::OtherMember { found, found_name, wanted, wanted_name } => {
                write!(
                    f,
                    "the data folder belongs to member `{found_name}` ({found}), this one was started as `{wanted_name}` ({wanted})"
                )
            }
            Self::Damaged { file, offset, why } => {
                write!(
                    f,
                    "the data folder is damaged: {file} at byte {offset}: {why}; put a whole copy of the folder in its place or, where other members have the data, add this one anew under a fresh id"
                )
            }
            Self::Machine(fault) => write!(f, "the log cannot be applied: {fault}"),
            Self::Consensus { why } => write!(f, "the consensus library refused to start: {why}"),
            Self::Io { doing, file, error } => write!(f, "cannot {doing} {file} in the data folder: {error}"),
            Self::Config { why } => write!(f, "the member's configuration is wrong: {why}"),
        }
    }
}

impl std::error::Error for OpenError {}

/// Why a member stopped. It must not be used again: what is in memory may be ahead of the disk.
#[derive(Debug)]
pub enum Fault {
    /// The log could not be written, or a sync failed, after which nothing is known of what is on disk.
    Disk {
        doing: &'static str,
        file: String,
        error: io::Error,
    },
    /// Bytes of the log that were read back are not those that were written.
    Damaged {
        file: String,
        offset: u64,
        why: String,
    },
    Machine(tenure_machine::Fault),
    Consensus {
        why: String,
    },
    /// The other members do not know this folder as that of a member, or not any more.
    Expelled {
        why: String,
    },
    /// It had stopped before.
    Stopped,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk { doing, file, error } => write!(f, "cannot {doing} {file}: {error}"),
            Self::Damaged { file, offset, why } => write!(f, "{file} is damaged at byte {offset}: {why}"),
            Self::Machine(fault) => write!(f, "the log cannot be applied: {fault}"),
            Self::Consensus { why } => write!(f, "consensus stopped: {why}"),
            Self::Expelled { why } => write!(f, "this member cannot go on with its folder: {why}"),
            Self::Stopped => write!(f, "the member has stopped"),
        }
    }
}

impl std::error::Error for Fault {}

impl From<tenure_machine::Fault> for Fault {
    fn from(fault: tenure_machine::Fault) -> Self {
        Self::Machine(fault)
    }
}
