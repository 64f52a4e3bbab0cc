//! What a member gives back: answers, changes, messages, jobs, and what it tells about itself.

use crate::clock::Millis;
use crate::job::Job;
use crate::peer::PeerFacts;
use std::fmt;
use tenure_machine::{Change, MemberId, MemberRecord, Overload, Rejection, Reply, SessionId, SessionToken, Ticket};

/// What one poll gave. The shell hands changes to watchers before it sends answers; it empties the lists.
#[derive(Debug, Default)]
pub struct Effects {
    /// In (revision, index) order.
    pub changes: Vec<Change>,
    pub answers: Vec<(Ticket, Answer)>,
    /// The whole state was replaced by a snapshot of another member: `changes` do not tell what happened in between, and watchers are
    /// to be brought up to date from the state.
    pub restored: bool,
    /// To be run in order, beside the member.
    pub jobs: Vec<Job>,
    /// Poll again at this moment at the latest, or sooner when something arrives.
    pub wake_at: Option<Millis>,
}

/// That a round was begun by `Member::hear`: `Member::work` goes on with it.
#[derive(Debug)]
#[must_use]
pub struct Heard {
    pub(crate) at: Millis,
    /// Ticks of consensus that were due.
    pub(crate) ticks: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Committed, on disk and applied, or refused by apply.
    Done(Reply),
    /// Neither success nor failure: leadership was lost while it was under way.
    Unknown,
    /// It was not applied and will not be.
    Refused(Refusal),
    /// What `Member::machine` shows now contains every write that was answered before this read came.
    ReadReady,
    Renewed(Result<Renewal, Rejection>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewal {
    pub session: SessionId,
    pub token: SessionToken,
    pub ttl_ms: u64,
}

/// Why something was not taken. Nothing of it was or will be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// More waits for the next poll than is allowed.
    Overloaded,
    /// There is no leader that a majority follows, as far as this member knows.
    NoQuorum,
    Memory(Overload),
    DiskFull,
    TooLarge {
        bytes: usize,
        max: usize,
    },
    Stopping,
    /// The cluster has not reached the behaviour version that the request needs: a member of an older release could not read it.
    NotYet {
        behaviour: u16,
    },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Overloaded => write!(f, "too many requests wait already"),
            Self::NoQuorum => write!(f, "no leader with a majority is known"),
            Self::Memory(overload) => write!(f, "{overload}"),
            Self::DiskFull => write!(f, "the disk is nearly full, only requests that free space are taken"),
            Self::TooLarge { bytes, max } => write!(f, "the request has {bytes} bytes, at most {max} are taken"),
            Self::Stopping => write!(f, "the member is stopping"),
            // In the words of the state machine, which refuses it where it is proposed all the same.
            Self::NotYet { behaviour } => write!(f, "{}", Rejection::NotYet { behaviour: *behaviour }),
        }
    }
}

impl std::error::Error for Refusal {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Leader,
    Candidate,
    Follower,
}

/// Something an operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Alarm {
    /// Writes that grow are refused until there is room again; it ends by itself.
    DiskFull { free: u64, reserve: u64 },
    /// It is tried again; meanwhile the log grows.
    JobFailed { what: &'static str, why: String },
    /// An older one was loaded, or none, with the log since. Ends with the next snapshot.
    SnapshotDamaged { file: String, offset: u64, why: String },
    /// A write that a crash cut, or a flip in the very last batch, was taken off the end of the log.
    TornTail { file: String, offset: u64 },
    /// The clock of another member differs by so much. Nothing rests on it but what people read.
    ClockSkew { member: String, ms: i64 },
    /// This member and another do not talk, and why.
    Peer { member: String, why: String },
}

impl fmt::Display for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DiskFull { free, reserve } => {
                write!(f, "{free} bytes of disk are free, less than the reserve of {reserve}")
            }
            Self::JobFailed { what, why } => write!(f, "{what} failed and is tried again: {why}"),
            Self::SnapshotDamaged { file, offset, why } => {
                write!(f, "{file} is damaged at byte {offset} ({why}); what is older was loaded, with the log since")
            }
            Self::TornTail { file, offset } => {
                write!(f, "the log was cut at byte {offset} of {file}, where a crash had torn it")
            }
            Self::ClockSkew { member, ms } => {
                let (by, how) = (ms.unsigned_abs() / 1000, if *ms > 0 { "ahead of" } else { "behind" });
                write!(f, "the clock of member `{member}` is {by} s {how} this one")
            }
            Self::Peer { member, why } => write!(f, "no connection with member `{member}`: {why}"),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Status {
    pub member: MemberId,
    pub name: String,
    /// Zero until the first entry is applied.
    pub cluster: u64,
    pub issuer: [u8; 16],
    pub storage: [u8; 16],
    pub role: Role,
    pub leader: Option<MemberId>,
    pub term: u64,
    pub committed: u64,
    pub applied: u64,
    pub first_index: u64,
    pub last_index: u64,
    pub voters: Vec<MemberId>,
    pub learners: Vec<MemberId>,
    /// Everybody in the table of members, this one too.
    pub members: Vec<PeerStatus>,
    /// A majority was heard of within an election timeout, as far as this member can know.
    pub in_touch: bool,
    pub handing_over: bool,
    /// Bytes that are here of a snapshot that is being fetched, and all of them.
    pub fetching: Option<(u64, u64)>,
    pub disk_free: u64,
    pub log_file_bytes: u64,
    pub log_segments: usize,
    /// Of this run.
    pub log_bytes_written: u64,
    pub log_syncs: u64,
    pub snapshot_index: u64,
    pub snapshot_bytes: u64,
    pub snapshot_running: bool,
    /// Transactions that wait for the next poll, and those proposed whose fate is open.
    pub queued: usize,
    pub proposed: usize,
    /// Callers that wait for an answer, waits for locks among them.
    pub waiting: usize,
    pub leader_changes: u64,
    /// Times when the member did not run for longer than the election timeout.
    pub gaps: u64,
    pub alarms: Vec<Alarm>,
}

/// Another member, or this one, as this member sees it.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// What it should be; what it is, `Status::voters` and `Status::learners` tell.
    pub record: MemberRecord,
    pub is_connected: bool,
    pub heard_ms: Option<u64>,
    /// How far its log is known to be equal to the leader's; only the leader knows.
    pub matched: Option<u64>,
    /// What it told last.
    pub facts: Option<PeerFacts>,
    pub skew_ms: i64,
}
