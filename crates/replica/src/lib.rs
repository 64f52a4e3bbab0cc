//! One member of Tenure: consensus, log and snapshots; events in, effects out.
//!
//! Promises. An answer leaves only when what it says is decided and on disk. What was answered is there after any crash, or the
//! member says which file is damaged and does not start. The member reads no clock, draws nothing, starts no thread and opens no
//! socket: time, random bytes and a folder are handed in, so the server and the simulator run the same code.
//! Not promised. That a caller who gets no answer, or `Unknown`, knows the outcome: a request id makes asking again safe.
//! Relies on. One owner of the folder at a time; jobs run in order; after a `Fault` the process stops.
//!
//! `member.rs` tells the story; `log.rs` and `snapshot.rs` are the two kinds of files, `sessions.rs` the deadlines that a leader
//! keeps. The consensus library is named in this crate and nowhere else.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod backup;
mod clock;
mod config;
mod disk;
mod effects;
mod fault;
mod identity;
mod job;
mod log;
mod member;
mod peer;
mod record;
mod room;
mod sessions;
mod snapshot;
mod store;

pub use backup::{Backup, BackupError, Restore, revision_at};
pub use clock::Millis;
pub use config::{AutoCompact, Config, Join, Sabotage};
pub use disk::{Disk, MemoryDisk};
pub use effects::{Alarm, Answer, Effects, Heard, PeerStatus, Refusal, Renewal, Role, Status};
pub use fault::{Fault, OpenError};
pub use identity::owner_of;
pub use job::{Job, JobDone, Loaded, run_job};
pub use member::{Member, join_digest};
pub use peer::{Hello, Lane, PeerFacts, PeerRefusal};
pub use tenure_machine::Ticket;
