//! The numbers and names of the state machine, as types that cannot be mixed up.

use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// The number of a commit. One counter for every space; the empty store is at revision 1, as etcd's is.
    ///
    /// Every token (lock, native session) is the revision of the commit that granted it.
    Revision
);
number!(
    /// A position in the Raft log.
    Index
);
number!(
    /// A Raft term.
    Term
);
number!(
    /// Milliseconds of log time: stamped into entries by the leader, never back, standing still while there is no leader.
    LogTime
);
number!(
    /// The identity of a session (an etcd lease is one). Zero means "none"; the top bit is clear but for
    /// etcd leases whose clients chose a negative number.
    SessionId
);
number!(
    /// The identity of a member of the cluster; never used twice.
    MemberId
);

impl LogTime {
    /// The time `ms` milliseconds later; saturates.
    pub fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

impl Revision {
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Which incarnation of a session is meant: the revision that granted it or, for an etcd lease (which takes no revision), the log index.
pub type SessionToken = u64;

/// A tenant. Names map to ids in space 0; `NamespaceId::DEFAULT` always exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId(pub u32);

impl NamespaceId {
    pub const DEFAULT: Self = Self(0);
}

/// A front: fronts are kept apart inside the one order of revisions. The numbers are stored and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Space {
    /// Limits, namespaces, the issuer.
    System = 0,
    /// etcd's keys, which are also the native keys of the namespace `default`. Keeps history.
    Keys = 1,
    /// Reserved for ZooKeeper's tree.
    Tree = 2,
    /// Reserved for Consul's keys.
    ConsulKeys = 3,
    /// Reserved for the service catalog.
    Catalog = 4,
    /// Locks, sessions and the other native primitives. Keeps a bounded ring of changes.
    Native = 5,
}

/// A stored key: space, namespace and name as one byte string that orders the same way.
///
/// Layout: space (1 byte), namespace (4 bytes, big endian), name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Box<[u8]>);

impl Key {
    /// Bytes before the name.
    pub const PREFIX: usize = 5;

    pub fn new(space: Space, namespace: NamespaceId, name: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(Self::PREFIX + name.len());
        bytes.push(space as u8);
        bytes.extend_from_slice(&namespace.0.to_be_bytes());
        bytes.extend_from_slice(name);
        Self(bytes.into_boxed_slice())
    }

    /// The first key after every key of this space and namespace: the exclusive end of "from this key on".
    pub fn end_of(space: Space, namespace: NamespaceId) -> Self {
        match namespace.0.checked_add(1) {
            Some(next) => Self::new(space, NamespaceId(next), b""),
            None => Self(vec![space as u8 + 1].into_boxed_slice()),
        }
    }

    /// Takes stored bytes as they are.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn name(&self) -> &[u8] {
        self.0.get(Self::PREFIX..).unwrap_or_default()
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// One key, or those from `start` up to and without `end`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub start: Key,
    /// `None`: just the key `start`. An end at or below the start is an empty span, as etcd has it.
    pub end: Option<Key>,
}

impl Span {
    pub fn one(key: Key) -> Self {
        Self { start: key, end: None }
    }

    /// etcd's way of naming a range: an empty end is one key, a single zero byte is everything from the key on.
    pub fn etcd(space: Space, namespace: NamespaceId, key: &[u8], range_end: &[u8]) -> Self {
        let end = match range_end {
            [] => None,
            [0] => Some(Key::end_of(space, namespace)),
            end => Some(Key::new(space, namespace, end)),
        };
        Self { start: Key::new(space, namespace, key), end }
    }

    pub fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            None => key == self.start.as_bytes(),
            Some(end) => self.start.as_bytes() <= key && key < end.as_bytes(),
        }
    }
}
