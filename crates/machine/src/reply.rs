//! What the state machine answers. A rejection is a reply: equal on every member, remembered, and told with its facts.

use crate::command::MemberRole;
use crate::record::Record;
use crate::types::*;
use std::fmt;

/// The answer to one transaction.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The revision of the commit, or the current one where nothing was committed.
    pub revision: Revision,
    /// This is the remembered answer of an earlier try.
    pub replayed: bool,
    pub result: Result<TxnReply, Rejection>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct TxnReply {
    /// Which list ran.
    pub succeeded: bool,
    pub results: Vec<OpReply>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum OpReply {
    Put {
        prev: Option<Record>,
    },
    Delete {
        deleted: u64,
        prev: Vec<Record>,
    },
    Range(RangeReply),
    Txn(TxnReply),
    Compacted,
    SessionCreated {
        id: SessionId,
        token: SessionToken,
        ttl_ms: u64,
    },
    SessionEnded,
    LockGranted(LockGrant),
    LockReleased,
    LockCancelled {
        /// How many waits were taken out.
        waiters: u64,
    },
    /// Of an operation of a native primitive.
    Native(Box<crate::native::NativeReply>),
    /// The member as it is after the operation.
    Member(Box<MemberRecord>),
    /// A system operation was done.
    Done,
    /// The outcome of a remembered request whose body was too large to keep.
    ResultNotRetained,
}

impl OpReply {
    /// It changed nothing, and whoever asks again is told the same as long as the state has it.
    pub(crate) fn repeats_state(&self) -> bool {
        use crate::{IdempotencyReply, NativeReply};
        matches!(self, Self::Native(reply) if matches!(**reply, NativeReply::Idempotency(IdempotencyReply::Replay(_))))
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct RangeReply {
    /// Whole records; a caller that asked for keys only does not show their values.
    pub records: Vec<Record>,
    /// How many keys the span holds at that revision, whatever the limit.
    pub count: u64,
    pub more: bool,
    pub keys_only: bool,
}

/// A lock is held: who, under which number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockGrant {
    /// The fencing token: the revision of the commit that granted it.
    pub token: Revision,
    pub session: SessionId,
    pub session_token: SessionToken,
    pub ttl_ms: u64,
}

/// Who holds a lock now: the facts of a refusal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub token: Revision,
    pub session: SessionId,
    pub owner: Box<[u8]>,
    pub since: LogTime,
}

/// One member, as it should be and as it has told about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberRecord {
    pub id: MemberId,
    pub name: Box<str>,
    /// `host:port` for other members.
    pub peer: Box<str>,
    /// URLs for clients, told by the member itself.
    pub clients: Vec<Box<str>>,
    /// What it should be.
    pub role: MemberRole,
    /// Removed in the same change of the configuration that makes this one a voter.
    pub replaces: Option<MemberId>,
    /// The folder that it came with; zeros: it has not come yet.
    pub storage: [u8; 16],
    /// Starts of that folder.
    pub boots: u64,
    /// Its log was known to reach here.
    pub seen: Index,
    /// What its release knows, told by itself; zero: not told yet.
    pub behaviour: u16,
    pub release: Box<str>,
    /// SHA-256 of the secret with which it may join; zeros: a member of a static start.
    pub join: [u8; 32],
}

impl MemberRecord {
    pub fn is_live(&self) -> bool {
        self.role != MemberRole::Removed
    }

    /// Whether it has ever registered.
    pub fn has_come(&self) -> bool {
        self.storage != [0; 16]
    }
}

/// Why a transaction was refused. It changed nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum Rejection {
    EmptyKey,
    /// One transaction puts a key twice, or puts a key that it deletes.
    DuplicateKey,
    TooManyOps {
        ops: u64,
        max: u64,
    },
    /// `keep_value` or `keep_session` of a key that is not there.
    KeyNotFound,
    Compacted {
        lowest: Revision,
    },
    FutureRevision {
        current: Revision,
    },
    /// An attached session (etcd lease) does not exist or has ended.
    SessionNotFound {
        session: SessionId,
    },
    SessionExists {
        session: SessionId,
    },
    /// A native session is over; the outcome of requests under it can no longer be told.
    SessionExpired {
        session: SessionId,
    },
    /// A limit that is state; `what` names it.
    Quota {
        what: &'static str,
        limit: u64,
    },
    /// The table of remembered requests is full; nothing was run.
    RateLimited {
        what: &'static str,
        limit: u64,
    },
    /// The request id was first used for a different request.
    Mismatch,
    /// `behind` holders and waiters are ahead.
    Held {
        name: Box<[u8]>,
        holder: Holder,
        waiters: u64,
    },
    TimeoutWaiting {
        name: Box<[u8]>,
        waited_ms: u64,
        holder: Option<Holder>,
    },
    Cancelled {
        name: Box<[u8]>,
    },
    /// The same owner asks again for what it holds or waits for.
    Deadlock {
        name: Box<[u8]>,
        holder: Holder,
    },
    /// `presented` is not the token under which `name` is held. `newest` is zero where nobody holds it: a free lock is not
    /// remembered, and needs not be, because the next token will be larger than any before.
    Fenced {
        name: Box<[u8]>,
        presented: Revision,
        newest: Revision,
        holder: Option<Holder>,
    },
    NotFound {
        what: &'static str,
        name: Box<[u8]>,
    },
    Invalid {
        why: Box<str>,
    },
    /// By a native primitive, with its own code and facts.
    Refused(Box<crate::native::Refusal>),
    /// The behaviour version in the state does not have this yet.
    NotYet {
        behaviour: u16,
    },
    /// This one has the id, the name or the peer address; the id of a removed one is never used again.
    MemberExists {
        id: MemberId,
        name: Box<str>,
        peer: Box<str>,
        removed: bool,
    },
    /// The member was removed from the cluster.
    MemberRemoved {
        id: MemberId,
    },
    /// The member has come with another data folder before: it denies what that one promised.
    OtherStorage {
        id: MemberId,
    },
    /// The data folder is older than the cluster has seen it: it was put back.
    RolledBack {
        id: MemberId,
        boots: u64,
        recorded: u64,
    },
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyKey => write!(f, "the key is empty"),
            Self::DuplicateKey => write!(f, "a key is written twice in one transaction"),
            Self::TooManyOps { ops, max } => {
                write!(f, "{ops} operations in one transaction, at most {max} are allowed")
            }
            Self::KeyNotFound => write!(f, "the key is not there, so nothing of it can be kept"),
            Self::Compacted { lowest } => write!(f, "that revision was compacted, the lowest kept is {lowest}"),
            Self::FutureRevision { current } => write!(f, "that revision is in the future, the newest is {current}"),
            Self::SessionNotFound { session } => write!(f, "session {session} does not exist"),
            Self::SessionExists { session } => write!(f, "session {session} is live already"),
            Self::SessionExpired { session } => write!(f, "session {session} has ended"),
            Self::Quota { what, limit } => write!(f, "at most {limit} {what} are allowed"),
            Self::RateLimited { what, limit } => write!(f, "{what}: all {limit} places are taken, try later"),
            Self::Mismatch => write!(f, "this request id was first used for a different request"),
            Self::Held { name, holder, waiters } => {
                write!(
                    f,
                    "lock `{}` is held by session {} under token {}",
                    name.escape_ascii(),
                    holder.session,
                    holder.token
                )?;
                if *waiters > 0 { write!(f, ", {waiters} wait for it") } else { Ok(()) }
            }
            Self::TimeoutWaiting { name, waited_ms, .. } => {
                write!(f, "waited {waited_ms} ms for lock `{}` in vain", name.escape_ascii())
            }
            Self::Cancelled { name } => write!(f, "the wait for lock `{}` was cancelled", name.escape_ascii()),
            Self::Deadlock { name, holder } => {
                write!(
                    f,
                    "lock `{}` is already held or awaited by the same owner, under token {}",
                    name.escape_ascii(),
                    holder.token
                )
            }
            Self::Fenced { name, presented, newest, holder } => {
                write!(f, "token {presented} of lock `{}` is stale", name.escape_ascii())?;
                match holder {
                    Some(h) => write!(f, ": session {} holds it under token {}", h.session, h.token),
                    // A free lock is not remembered, so mostly nothing is known of its newest token.
                    None if newest.0 == 0 => write!(f, ": nobody holds it"),
                    None => write!(f, ": nobody holds it, its newest token was {newest}"),
                }
            }
            Self::NotFound { what, name } => write!(f, "there is no {what} `{}`", name.escape_ascii()),
            Self::Invalid { why } => f.write_str(why),
            Self::Refused(refusal) => f.write_str(&refusal.why),
            Self::NotYet { behaviour } => {
                write!(f, "this needs behaviour version {behaviour}, which the cluster has not reached")
            }
            Self::MemberExists { id, name, removed: true, .. } => {
                write!(f, "id {:016x} was that of the removed member `{name}`, and is never used again", id.0)
            }
            Self::MemberExists { id, name, peer, .. } => {
                write!(f, "there is a member `{name}` ({:016x}) at {peer}", id.0)
            }
            Self::MemberRemoved { id } => {
                write!(f, "member {:016x} was removed from the cluster: add a new one, with an empty folder", id.0)
            }
            Self::OtherStorage { id } => {
                write!(
                    f,
                    "the data folder is not the one with which member {:016x} came: give it that one back, or replace the member",
                    id.0
                )
            }
            Self::RolledBack { id, boots, recorded } => {
                write!(
                    f,
                    "the data folder of member {:016x} was put back to its start {boots}, the cluster has seen start {recorded}: \
                     replace the member",
                    id.0
                )
            }
        }
    }
}

/// What the log did to a session, for whoever keeps the deadlines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionEvent {
    Created {
        id: SessionId,
        token: SessionToken,
        ttl_ms: u64,
    },
    Ended {
        id: SessionId,
        token: SessionToken,
    },
    /// An expiry that was proposed for this incarnation had no effect.
    ExpiryDropped {
        id: SessionId,
        token: SessionToken,
    },
    Checkpoint {
        id: SessionId,
        token: SessionToken,
        remaining_ms: Option<u64>,
    },
}

/// One change of one key. `record` is the new state, a tombstone for a deletion; its key says which space it is of.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub record: Record,
    pub before: Option<Record>,
}

/// What applying one entry gave, in the order in which it must leave: changes before replies.
#[derive(Debug, Default)]
pub struct Applied {
    /// In (revision, index) order.
    pub changes: Vec<Change>,
    /// The replies of this entry's transactions that do not wait, by ticket.
    pub replies: Vec<(crate::Ticket, Reply)>,
    pub sessions: Vec<SessionEvent>,
}
