//! What can be asked of the state machine: the unit of the log is a transaction, and an entry carries a batch of them.
//!
//! The written encoding of these types is in `codec.rs`; docs/formats.md shows the bytes.

use crate::native::PRIMITIVES;
use crate::types::*;
use std::fmt;

/// One log entry.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// The behaviour version that the proposer applied when it wrote this; a member that does not know it stops.
    pub behaviour: u16,
    /// Log time, by the leader. Never below that of an earlier entry.
    pub stamp: LogTime,
    /// Where the callers wait.
    pub origin: Origin,
    pub txns: Vec<Txn>,
}

/// Where the callers of a batch wait: the caller of `txns[i]` has the ticket `first + i` of that boot of that member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    pub member: MemberId,
    /// Drawn anew at each start of the member, so that an answer never reaches the caller of an earlier life.
    pub boot: u64,
    pub first: u64,
}

/// Where one caller waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket {
    pub member: MemberId,
    pub boot: u64,
    pub number: u64,
}

/// Requirements, then compares, then one of two lists of operations, in one commit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Txn {
    /// Who asks. Empty: whoever reaches the loopback of a member without authentication.
    pub principal: Box<str>,
    pub namespace: NamespaceId,
    /// With an id the same principal gets the first answer again; see `requests.rs`.
    pub request: Option<RequestId>,
    /// Every one must hold, or the transaction is refused with `Rejection::Fenced`.
    pub requires: Vec<RequireLock>,
    pub compares: Vec<Compare>,
    pub then: Vec<Op>,
    pub otherwise: Vec<Op>,
}

impl Txn {
    /// The behaviour version from which every member can read it. Below that it must not be proposed: an older release would stop at the entry.
    pub fn behaviour_needed(&self) -> u16 {
        let numbered = matches!(self.request, Some(RequestId::Series { .. }));
        let request = if numbered { PRIMITIVES } else { 1 };
        request.max(lists_need(&self.compares, &self.then, &self.otherwise))
    }

    /// A transaction of one operation.
    pub fn of(op: Op) -> Self {
        Self { then: vec![op], ..Self::default() }
    }
}

fn lists_need(compares: &[Compare], then: &[Op], otherwise: &[Op]) -> u16 {
    let compares = compares.iter().map(|compare| match compare.target {
        CompareTarget::Condition(_) => PRIMITIVES,
        _ => 1,
    });
    let ops = then.iter().chain(otherwise).map(|op| match op {
        Op::Native(_) => PRIMITIVES,
        Op::Txn(sub) => lists_need(&sub.compares, &sub.then, &sub.otherwise),
        _ => 1,
    });
    compares.chain(ops).max().unwrap_or(1)
}

/// The name of a mutating request, so that a retry is answered and not repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RequestId {
    /// Kept for the session's life; every answer below `acked_below` has arrived, so those are forgotten.
    Session { session: SessionId, seq: u64, acked_below: u64 },
    /// Kept for ten minutes of log time.
    Uuid([u8; 16]),
    /// A number in a series that one caller draws at random: kept until it is below `acked_below`, or until nothing was asked under the series for
    /// ten minutes of log time. From behaviour version 3 on.
    Series { series: u64, seq: u64, acked_below: u64 },
}

/// The guard of any transaction: lock `name` is held under exactly this token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequireLock {
    pub name: Box<[u8]>,
    pub token: Revision,
}

/// etcd's compare: every key of the span satisfies `target relation`.
#[derive(Clone, Debug, PartialEq)]
pub struct Compare {
    pub span: Span,
    pub relation: Relation,
    pub target: CompareTarget,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relation {
    Equal,
    Greater,
    Less,
    NotEqual,
}

#[derive(Clone, Debug, PartialEq)]
pub enum CompareTarget {
    // Signed, as on etcd's wire: a negative number is legal there and compares.
    Version(i64),
    CreateRevision(i64),
    ModRevision(i64),
    Value(Box<[u8]>),
    Lease(i64),
    /// Something that is not a key; the span of such a compare is not looked at.
    Condition(Box<crate::conditions::Condition>),
}

/// One operation. The numbers of the encoding are in `codec.rs` and never change.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    Put(Put),
    Delete(Delete),
    Range(Range),
    /// A nested transaction, as etcd has it.
    Txn(Box<SubTxn>),
    /// Makes revisions below `revision` unreadable.
    Compact {
        revision: i64,
    },

    SessionCreate(SessionCreate),
    /// Ends a session by its owner's or an operator's will. With a token only that incarnation.
    SessionEnd {
        session: SessionId,
        token: Option<SessionToken>,
    },
    /// The leader's word that a deadline passed: dropped if the incarnation is gone or the entry's term is another.
    SessionExpire {
        session: SessionId,
        token: SessionToken,
        term: Term,
    },
    /// What is left of a session's time, so that a new leader does not start it over; `None` clears it.
    SessionCheckpoint {
        session: SessionId,
        token: SessionToken,
        remaining_ms: Option<u64>,
    },

    LockAcquire(LockAcquire),
    LockRelease {
        name: Box<[u8]>,
        session: SessionId,
        token: Revision,
    },
    /// Takes a waiter out of the queue, by the session and the request id of its acquire (or every wait of the session there).
    LockCancel {
        name: Box<[u8]>,
        session: SessionId,
        request: Option<RequestId>,
    },

    /// One of a native primitive beside sessions and exclusive locks; from behaviour version 3 on.
    Native(Box<crate::native::NativeOp>),

    /// The first entry of a cluster's life: its identity, drawn by the first leader.
    Genesis {
        cluster: u64,
        issuer: [u8; 16],
    },
    /// Every member has said that it can; from here on apply follows this version.
    RaiseBehaviour {
        to: u16,
    },
    /// Limits that apply reads are state.
    SetLimit {
        limit: Limit,
        value: u64,
    },
    /// The checksum of changes at an index that all have applied; a member that differs stops. From behaviour version 2 on.
    Checksum {
        at: Index,
        sum: u64,
    },

    /// A new member; its id was never used before.
    MemberAdd {
        id: MemberId,
        name: Box<str>,
        /// `host:port` for other members.
        peer: Box<str>,
        /// `Learner` or `Voter`. The leader makes a voter of it when it has caught up.
        role: MemberRole,
        /// Goes in the same change of the configuration that makes this one a voter.
        replaces: Option<MemberId>,
        /// SHA-256 of the secret with which it may join; zeros: a member of a static start.
        join: [u8; 32],
    },
    /// A learner should be a voter.
    MemberPromote {
        id: MemberId,
    },
    MemberRemove {
        id: MemberId,
    },
    /// Another peer address.
    MemberUpdate {
        id: MemberId,
        peer: Box<str>,
    },
    /// What a member tells about itself at each start.
    MemberRegister {
        id: MemberId,
        /// Drawn for each new folder; not zeros.
        storage: [u8; 16],
        /// Starts of that folder, this one included.
        boots: u64,
        /// Empty: as the table has it.
        peer: Box<str>,
        /// URLs for clients.
        clients: Vec<Box<str>>,
        /// The newest behaviour version that its release knows.
        behaviour: u16,
        release: Box<str>,
    },
    /// Its log is known to reach this far; lower ones change nothing.
    MemberSeen {
        id: MemberId,
        index: Index,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub struct SubTxn {
    pub compares: Vec<Compare>,
    pub then: Vec<Op>,
    pub otherwise: Vec<Op>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Put {
    pub key: Key,
    pub value: Box<[u8]>,
    /// Attaches the key to this session (etcd lease); zero: to none. Kept as etcd's signed number; unknown ids are refused.
    pub session: SessionId,
    pub prev: bool,
    /// Keep the value that is there (etcd's ignore_value); refused where there is none.
    pub keep_value: bool,
    /// Keep the session that is there (etcd's ignore_lease).
    pub keep_session: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Delete {
    pub span: Span,
    pub prev: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Range {
    pub span: Span,
    /// 0: no limit.
    pub limit: i64,
    /// 0 or below: now.
    pub revision: i64,
    pub order: Order,
    pub sort_by: SortBy,
    pub keys_only: bool,
    pub count_only: bool,
    // 0: no bound.
    pub min_mod_revision: i64,
    pub max_mod_revision: i64,
    pub min_create_revision: i64,
    pub max_create_revision: i64,
}

impl Range {
    pub fn of(span: Span) -> Self {
        Self {
            span,
            limit: 0,
            revision: 0,
            order: Order::None,
            sort_by: SortBy::Key,
            keys_only: false,
            count_only: false,
            min_mod_revision: 0,
            max_mod_revision: 0,
            min_create_revision: 0,
            max_create_revision: 0,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    None,
    Ascending,
    Descending,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SortBy {
    Key,
    Version,
    CreateRevision,
    ModRevision,
    Value,
}

/// Who made a session: decides where its token comes from and what its face calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionFace {
    /// An etcd lease: takes no revision, its token is the log index.
    Etcd,
    /// Takes a revision, which is its token.
    Native,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExpire {
    /// Attached keys are deleted, locks are freed.
    Delete,
    /// Attached keys stay and lose their owner, locks are freed.
    Release,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SessionCreate {
    /// Drawn by the proposer or chosen by the caller; refused while such a session is live.
    pub id: SessionId,
    pub face: SessionFace,
    /// As granted: the proposer has brought it into the range of its face.
    pub ttl_ms: u64,
    pub on_expire: OnExpire,
    pub name: Box<str>,
    pub metadata: Vec<(Box<str>, Box<str>)>,
    /// For fronts whose sessions have a wider identity or a password.
    pub alias: Option<[u8; 16]>,
    pub secret: Option<[u8; 16]>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LockAcquire {
    pub name: Box<[u8]>,
    /// The session that will hold it; zero only together with `create`.
    pub session: SessionId,
    /// Makes this session in the same commit and holds the lock under it. Its end frees the lock.
    pub create: Option<SessionCreate>,
    /// Who asks, for the detection of self-deadlock; empty: the session.
    pub owner: Box<[u8]>,
    pub mode: LockMode,
    pub wait: Wait,
}

/// How a lock is held. Only `Exclusive` is granted at behaviour version 1; the numbers of the others are reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    Exclusive,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Refused at once where it is held.
    None,
    /// Milliseconds of log time from the entry that adds the waiter.
    Ms(u64),
    Forever,
}

/// What a member should be. The numbers are stored and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MemberRole {
    /// Gets the log and does not vote.
    Learner = 1,
    Voter = 2,
    /// Gone for ever; only its id is kept from being used again.
    Removed = 3,
}

impl fmt::Display for MemberRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Learner => "learner",
            Self::Voter => "voter",
            Self::Removed => "removed",
        })
    }
}

/// Limits that apply reads. The numbers are stored and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Limit {
    /// Operations in one list of a transaction (etcd's --max-txn-ops).
    TxnOps = 1,
    /// Waiters of one lock.
    LockWaiters = 2,
    /// Things that one native session may own.
    SessionThings = 3,
    /// Open remembered requests of one session, and of one series.
    SessionRequests = 4,
    /// Remembered one-shot requests and series in all.
    OneShotRequests = 5,
    /// Changes kept for spaces without history.
    RingChanges = 6,
}

impl Limit {
    /// Every limit, in the order of the numbers.
    pub const ALL: [Self; 6] = [
        Self::TxnOps,
        Self::LockWaiters,
        Self::SessionThings,
        Self::SessionRequests,
        Self::OneShotRequests,
        Self::RingChanges,
    ];

    /// What holds until `Op::SetLimit` says otherwise.
    pub const fn default_value(self) -> u64 {
        match self {
            Self::TxnOps => 128,
            Self::LockWaiters => 10_000,
            Self::SessionThings => 10_000,
            Self::SessionRequests => 1_000,
            Self::OneShotRequests => 500_000,
            Self::RingChanges => 10_000,
        }
    }
}
