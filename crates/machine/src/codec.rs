//! The written encodings of commands and replies.
//!
//! Promises. E1: what was written by a release is read by every later one: each stored thing begins with its format version,
//! and the numbers below never change. E2: reading never panics, whatever the bytes, and never takes more memory than a small
//! multiple of their length. E3: one value has one encoding (numbers are minimal, flags are 0 or 1), so equal bytes mean
//! equal values and a digest over the bytes is a digest of the value.
//! Not promised. That the bytes are those that were written: the log and the snapshot file carry their own checksums.
//!
//! Numbers are LEB128, signed ones zigzag first; byte strings and lists begin with their length. docs/formats.md shows examples.

use crate::coded::Coded;
use crate::command::*;
use crate::members;
use crate::record::Record;
use crate::reply::*;
use crate::types::*;
use std::fmt;

/// The format version of an encoded batch.
pub(crate) const BATCH_FORMAT: u8 = 1;
/// The format version of an encoded reply.
pub(crate) const REPLY_FORMAT: u8 = 1;

/// Why bytes could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Written by a later release: this one does not know the format.
    UnknownFormat { what: &'static str, format: u8 },
    /// Written by a later release: this one does not know the number.
    UnknownNumber { what: &'static str, number: u64 },
    /// The bytes end inside `what`.
    Truncated { what: &'static str },
    /// The bytes cannot mean a `what`.
    Malformed { what: &'static str },
    /// A block of a snapshot is whole, but its contents differ from its checksum or from the totals.
    ChecksumDiffers { what: &'static str },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownFormat { what, format } => {
                write!(f, "{what} has format version {format}, which this release does not know")
            }
            Self::UnknownNumber { what, number } => write!(f, "{what} {number} is not known to this release"),
            Self::Truncated { what } => write!(f, "the bytes end inside {what}"),
            Self::Malformed { what } => write!(f, "the bytes are not {what}"),
            Self::ChecksumDiffers { what } => write!(f, "{what} differs from its checksum"),
        }
    }
}

impl std::error::Error for DecodeError {}

type Decoded<T> = Result<T, DecodeError>;

/// An enum whose numbers are stored: variants with their numbers, and the way back.
macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident as $what:literal { $($(#[$vdoc:meta])* $variant:ident = $number:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum $name { $($(#[$vdoc])* $variant = $number,)* }

        impl $name {
            fn read(r: &mut Reader<'_>) -> Decoded<Self> {
                match r.byte($what)? {
                    $($number => Ok(Self::$variant),)*
                    number => Err(DecodeError::UnknownNumber { what: $what, number: u64::from(number) }),
                }
            }
        }
    };
}

numbers!(
    /// Operations. Never change or reuse a number; a retired one stays listed.
    OpNumber as "operation" {
        Put = 1,
        Delete = 2,
        Range = 3,
        Txn = 4,
        Compact = 5,
        SessionCreate = 16,
        SessionEnd = 17,
        SessionExpire = 18,
        SessionCheckpoint = 19,
        LockAcquire = 32,
        LockRelease = 33,
        LockCancel = 34,
        Native = 48,
        MemberAdd = 224,
        MemberPromote = 225,
        MemberRemove = 226,
        MemberUpdate = 227,
        MemberRegister = 228,
        MemberSeen = 229,
        Genesis = 240,
        RaiseBehaviour = 241,
        SetLimit = 242,
        Checksum = 243,
    }
);

numbers!(
    /// Answers of operations.
    OpReplyNumber as "answer" {
        Put = 1,
        Delete = 2,
        Range = 3,
        Txn = 4,
        Compacted = 5,
        SessionCreated = 16,
        SessionEnded = 17,
        LockGranted = 32,
        LockReleased = 33,
        LockCancelled = 34,
        Native = 48,
        Member = 224,
        Done = 240,
        ResultNotRetained = 241,
    }
);

numbers!(
    /// Results of transactions: 0 went through, the rest are rejections.
    ResultNumber as "result" {
        Ok = 0,
        EmptyKey = 1,
        DuplicateKey = 2,
        TooManyOps = 3,
        KeyNotFound = 4,
        Compacted = 5,
        FutureRevision = 6,
        SessionNotFound = 7,
        SessionExists = 8,
        SessionExpired = 9,
        Quota = 10,
        RateLimited = 11,
        Mismatch = 12,
        Held = 13,
        TimeoutWaiting = 14,
        Cancelled = 15,
        Deadlock = 16,
        Fenced = 17,
        NotFound = 18,
        Invalid = 19,
        NotYet = 20,
        MemberExists = 21,
        MemberRemoved = 22,
        OtherStorage = 23,
        RolledBack = 24,
        Refused = 25,
    }
);

numbers!(RelationNumber as "relation" { Equal = 0, Greater = 1, Less = 2, NotEqual = 3, });
numbers!(TargetNumber as "compare target" { Version = 0, Create = 1, Mod = 2, Value = 3, Lease = 4, Condition = 5, });
numbers!(OrderNumber as "order" { None = 0, Ascending = 1, Descending = 2, });
numbers!(SortNumber as "sort target" { Key = 0, Version = 1, Create = 2, Mod = 3, Value = 4, });
numbers!(FaceNumber as "session face" { Etcd = 1, Native = 2, });
numbers!(EndNumber as "end behaviour" { Delete = 1, Release = 2, });
numbers!(
    /// `Shared` (2) and `Permits` (3) are reserved.
    ModeNumber as "lock mode" { Exclusive = 1, }
);
numbers!(RoleNumber as "member role" { Learner = 1, Voter = 2, Removed = 3, });
numbers!(WaitNumber as "wait" { None = 0, Ms = 1, Forever = 2, });
numbers!(RequestNumber as "request id" { None = 0, Session = 1, Uuid = 2, Series = 3, });

/// The things that refusals name. The place in this list is stored: append only.
const NAMES: [&str; 11] = [
    name::OTHER,
    name::WAITERS,
    name::SESSION_THINGS,
    name::SESSION_REQUESTS,
    name::ONE_SHOT_REQUESTS,
    name::SESSION,
    name::LOCK,
    name::KEY,
    name::NAMESPACE,
    name::MEMBER,
    name::MEMBERS,
];

/// What a refusal is about, as `Quota`, `RateLimited` and `NotFound` name it.
pub(crate) mod name {
    pub(crate) const OTHER: &str = "things";
    pub(crate) const WAITERS: &str = "waiters of one lock";
    pub(crate) const SESSION_THINGS: &str = "keys, locks and waits of one session";
    pub(crate) const SESSION_REQUESTS: &str = "open requests of one session";
    pub(crate) const ONE_SHOT_REQUESTS: &str = "remembered requests";
    pub(crate) const SESSION: &str = "session";
    pub(crate) const LOCK: &str = "lock";
    pub(crate) const KEY: &str = "key";
    pub(crate) const NAMESPACE: &str = "namespace";
    pub(crate) const MEMBER: &str = "member";
    pub(crate) const MEMBERS: &str = "members";
}

// ---- Reading and writing of the parts ----

/// Writing: plain functions of a growing buffer.
pub(crate) trait Write {
    fn varint(&mut self, n: u64);
    fn signed(&mut self, n: i64);
    fn bytes(&mut self, bytes: &[u8]);
    fn flag(&mut self, flag: bool);
    /// 0, or 1 and the bytes.
    fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T));
    fn list<T>(&mut self, items: &[T], write: impl FnMut(&mut Self, &T));
}

impl Write for Vec<u8> {
    #[inline]
    fn varint(&mut self, mut n: u64) {
        while n >= 0x80 {
            self.push(n as u8 | 0x80);
            n >>= 7;
        }
        self.push(n as u8);
    }

    fn signed(&mut self, n: i64) {
        self.varint(((n << 1) ^ (n >> 63)) as u64);
    }

    #[inline]
    fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.extend_from_slice(bytes);
    }

    fn flag(&mut self, flag: bool) {
        self.push(u8::from(flag));
    }

    fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.flag(value.is_some());
        if let Some(value) = value {
            write(self, value);
        }
    }

    fn list<T>(&mut self, items: &[T], mut write: impl FnMut(&mut Self, &T)) {
        self.varint(items.len() as u64);
        for item in items {
            write(self, item);
        }
    }
}

/// Reading: every step says what it wanted, and none goes past the end.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    depth: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, depth: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// All must have been read.
    pub(crate) fn finish(&self, what: &'static str) -> Decoded<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::Malformed { what }) }
    }

    pub(crate) fn byte(&mut self, what: &'static str) -> Decoded<u8> {
        let (&byte, rest) = self.rest.split_first().ok_or(DecodeError::Truncated { what })?;
        self.rest = rest;
        Ok(byte)
    }

    pub(crate) fn flag(&mut self, what: &'static str) -> Decoded<bool> {
        match self.byte(what)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Malformed { what }),
        }
    }

    #[inline]
    pub(crate) fn varint(&mut self, what: &'static str) -> Decoded<u64> {
        let first = self.byte(what)?;
        if first < 0x80 {
            return Ok(u64::from(first));
        }
        let mut n = u64::from(first & 0x7f);
        for shift in (7..64).step_by(7) {
            let byte = self.byte(what)?;
            // The tenth byte has room for one bit, and a last byte of zero would be a second way to write a number.
            if (shift == 63 && byte > 1) || byte == 0 {
                return Err(DecodeError::Malformed { what });
            }
            n |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(n);
            }
        }
        Err(DecodeError::Malformed { what })
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Decoded<u32> {
        u32::try_from(self.varint(what)?).map_err(|_| DecodeError::Malformed { what })
    }

    pub(crate) fn signed(&mut self, what: &'static str) -> Decoded<i64> {
        let n = self.varint(what)?;
        Ok((n >> 1) as i64 ^ -((n & 1) as i64))
    }

    pub(crate) fn take(&mut self, len: usize, what: &'static str) -> Decoded<&'a [u8]> {
        if len > self.rest.len() {
            return Err(DecodeError::Truncated { what });
        }
        let (bytes, rest) = self.rest.split_at(len);
        self.rest = rest;
        Ok(bytes)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Decoded<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    pub(crate) fn u64_fixed(&mut self, what: &'static str) -> Decoded<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    #[inline]
    pub(crate) fn bytes(&mut self, what: &'static str) -> Decoded<&'a [u8]> {
        let len = self.varint(what)?;
        let len = usize::try_from(len).map_err(|_| DecodeError::Truncated { what })?;
        self.take(len, what)
    }

    pub(crate) fn boxed(&mut self, what: &'static str) -> Decoded<Box<[u8]>> {
        Ok(self.bytes(what)?.into())
    }

    pub(crate) fn text(&mut self, what: &'static str) -> Decoded<Box<str>> {
        let bytes = self.bytes(what)?;
        Ok(std::str::from_utf8(bytes).map_err(|_| DecodeError::Malformed { what })?.into())
    }

    pub(crate) fn option<T>(
        &mut self,
        what: &'static str,
        read: impl FnOnce(&mut Self) -> Decoded<T>,
    ) -> Decoded<Option<T>> {
        Ok(if self.flag(what)? { Some(read(self)?) } else { None })
    }

    pub(crate) fn list<T>(
        &mut self,
        what: &'static str,
        mut read: impl FnMut(&mut Self) -> Decoded<T>,
    ) -> Decoded<Vec<T>> {
        let len = self.varint(what)?;
        // Every item takes at least a byte, so a length beyond the rest is a lie; and memory follows what was read, not what was said.
        if len > self.rest.len() as u64 {
            return Err(DecodeError::Truncated { what });
        }
        let mut items = Vec::with_capacity(len.min(16) as usize);
        for _ in 0..len {
            items.push(read(self)?);
        }
        Ok(items)
    }

    fn deeper<T>(&mut self, read: impl FnOnce(&mut Self) -> Decoded<T>) -> Decoded<T> {
        if self.depth >= MAX_DEPTH {
            return Err(DecodeError::Malformed { what: "a transaction of bearable depth" });
        }
        self.depth += 1;
        let value = read(self);
        self.depth -= 1;
        value
    }
}

/// Transactions may be nested this deep; the reader of the log stops there, so proposers must too (`Machine::admit` does).
pub const MAX_DEPTH: usize = 128;

// ---- Batches ----

impl Batch {
    /// The bytes of a log entry.
    pub fn encode(&self) -> Vec<u8> {
        let mut b = Vec::with_capacity(64 + self.txns.iter().map(Txn::size_hint).sum::<usize>());
        b.push(BATCH_FORMAT);
        b.varint(u64::from(self.behaviour));
        b.varint(self.stamp.0);
        b.varint(self.origin.member.0);
        b.extend_from_slice(&self.origin.boot.to_le_bytes());
        b.varint(self.origin.first);
        b.list(&self.txns, |b, txn| txn.encode(b));
        b
    }

    /// Reads a log entry back.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let format = r.byte("a batch")?;
        if format != BATCH_FORMAT {
            return Err(DecodeError::UnknownFormat { what: "a batch", format });
        }
        let behaviour = r.varint("a batch")?;
        let behaviour = u16::try_from(behaviour).map_err(|_| DecodeError::Malformed { what: "a batch" })?;
        let stamp = LogTime(r.varint("a batch")?);
        let origin = Origin {
            member: MemberId(r.varint("an origin")?),
            boot: r.u64_fixed("an origin")?,
            first: r.varint("an origin")?,
        };
        let txns = r.list("transactions", Txn::read)?;
        r.finish("a batch")?;
        Ok(Self { behaviour, stamp, origin, txns })
    }
}

impl Txn {
    /// Appends the bytes of this transaction.
    pub fn encode(&self, out: &mut Vec<u8>) {
        write_request(out, self.request.as_ref());
        self.write_body(out);
    }

    /// Everything but the request id: what the digest covers.
    pub(crate) fn write_body(&self, b: &mut Vec<u8>) {
        b.bytes(self.principal.as_bytes());
        b.varint(u64::from(self.namespace.0));
        b.list(&self.requires, |b, r| {
            b.bytes(&r.name);
            b.varint(r.token.0);
        });
        b.list(&self.compares, write_compare);
        b.list(&self.then, write_op);
        b.list(&self.otherwise, write_op);
    }

    fn read(r: &mut Reader<'_>) -> Decoded<Self> {
        let request = read_request(r)?;
        Ok(Self {
            principal: r.text("a principal")?,
            namespace: NamespaceId(r.u32("a namespace")?),
            request,
            requires: r.list("requirements", |r| {
                Ok(RequireLock { name: r.boxed("a lock name")?, token: Revision(r.varint("a token")?) })
            })?,
            compares: r.list("compares", read_compare)?,
            then: r.list("operations", read_op)?,
            otherwise: r.list("operations", read_op)?,
        })
    }

    /// Names what is asked for, whoever asks again: the request id is not part of it.
    ///
    /// Two lanes of multiply and rotate, not a cryptographic hash: a caller can only deceive itself with a collision,
    /// because remembered requests are looked up by its own principal and id first.
    ///
    /// Over what the caller asked for alone: what the server adds anew at each try, such as the time that it shows, is not part of the request.
    pub fn digest(&self) -> [u8; 16] {
        let mut b = Vec::with_capacity(self.size_hint());
        if self.then.iter().chain(&self.otherwise).any(has_additions) {
            let mut asked = self.clone();
            asked.then.iter_mut().chain(&mut asked.otherwise).for_each(forget_additions);
            asked.write_body(&mut b);
        } else {
            self.write_body(&mut b);
        }
        digest(&b)
    }

    fn size_hint(&self) -> usize {
        48 + self.principal.len() + self.then.iter().chain(&self.otherwise).map(op_size_hint).sum::<usize>()
    }

    /// How deep its transactions nest; 1 for one without nested ones.
    pub fn depth(&self) -> usize {
        1 + ops_depth(&self.then).max(ops_depth(&self.otherwise))
    }
}

fn ops_depth(ops: &[Op]) -> usize {
    let nested = ops.iter().map(|op| match op {
        Op::Txn(sub) => 1 + ops_depth(&sub.then).max(ops_depth(&sub.otherwise)),
        _ => 0,
    });
    nested.max().unwrap_or(0)
}

fn has_additions(op: &Op) -> bool {
    match op {
        Op::Native(op) => op.has_additions(),
        Op::Txn(sub) => sub.then.iter().chain(&sub.otherwise).any(has_additions),
        _ => false,
    }
}

fn forget_additions(op: &mut Op) {
    match op {
        Op::Native(op) => op.forget_additions(),
        Op::Txn(sub) => sub.then.iter_mut().chain(&mut sub.otherwise).for_each(forget_additions),
        _ => {}
    }
}

fn op_size_hint(op: &Op) -> usize {
    match op {
        Op::Put(p) => 16 + p.key.as_bytes().len() + p.value.len(),
        _ => 64,
    }
}

/// 128 bits over bytes, for `Txn::digest`. Stored, so it never changes.
pub(crate) fn digest(bytes: &[u8]) -> [u8; 16] {
    let low = fold(0x243f_6a88_85a3_08d3, bytes);
    let high = fold(0xa409_3822_299f_31d0, bytes);
    let mut out = [0; 16];
    out[..8].copy_from_slice(&low.to_le_bytes());
    out[8..].copy_from_slice(&high.to_le_bytes());
    out
}

/// 64 bits over bytes: for each word of eight bytes, exclusive or, multiply to 128 bits, fold the halves. Stored and compared
/// between members, so it never changes. About a byte per cycle faster than FNV would allow, which goes byte by byte.
pub(crate) fn fold(seed: u64, bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<8>();
    let mut h = seed ^ (bytes.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for word in words {
        h = mix(h, u64::from_le_bytes(*word));
    }
    let mut last = [0; 8];
    last[..tail.len()].copy_from_slice(tail);
    mix(mix(h, u64::from_le_bytes(last)), 0x4528_21e6_38d0_1377)
}

pub(crate) fn mix(h: u64, word: u64) -> u64 {
    let product = u128::from(h ^ word) * 0x9e37_79b9_7f4a_7c15_u128;
    // The sum keeps a zero product (h equal to the word) from forgetting everything before.
    ((product as u64) ^ ((product >> 64) as u64)).wrapping_add(word.rotate_left(32)) ^ h.rotate_left(17)
}

pub(crate) fn write_request(b: &mut Vec<u8>, request: Option<&RequestId>) {
    match request {
        None => b.push(RequestNumber::None as u8),
        Some(RequestId::Session { session, seq, acked_below }) => {
            b.push(RequestNumber::Session as u8);
            b.varint(session.0);
            b.varint(*seq);
            b.varint(*acked_below);
        }
        Some(RequestId::Uuid(uuid)) => {
            b.push(RequestNumber::Uuid as u8);
            b.extend_from_slice(uuid);
        }
        Some(RequestId::Series { series, seq, acked_below }) => {
            b.push(RequestNumber::Series as u8);
            b.varint(*series);
            b.varint(*seq);
            b.varint(*acked_below);
        }
    }
}

pub(crate) fn read_request(r: &mut Reader<'_>) -> Decoded<Option<RequestId>> {
    Ok(match RequestNumber::read(r)? {
        RequestNumber::None => None,
        RequestNumber::Session => Some(RequestId::Session {
            session: SessionId(r.varint("a request id")?),
            seq: r.varint("a request id")?,
            acked_below: r.varint("a request id")?,
        }),
        RequestNumber::Uuid => Some(RequestId::Uuid(r.array("a request id")?)),
        RequestNumber::Series => Some(RequestId::Series {
            series: r.varint("a request id")?,
            seq: r.varint("a request id")?,
            acked_below: r.varint("a request id")?,
        }),
    })
}

fn write_span(b: &mut Vec<u8>, span: &Span) {
    b.bytes(span.start.as_bytes());
    b.option(span.end.as_ref(), |b, end| b.bytes(end.as_bytes()));
}

fn read_span(r: &mut Reader<'_>) -> Decoded<Span> {
    Ok(Span { start: read_key(r)?, end: r.option("a span", read_key)? })
}

fn read_key(r: &mut Reader<'_>) -> Decoded<Key> {
    Ok(Key::from_bytes(r.bytes("a key")?))
}

fn write_compare(b: &mut Vec<u8>, c: &Compare) {
    write_span(b, &c.span);
    b.push(match c.relation {
        Relation::Equal => RelationNumber::Equal,
        Relation::Greater => RelationNumber::Greater,
        Relation::Less => RelationNumber::Less,
        Relation::NotEqual => RelationNumber::NotEqual,
    } as u8);
    let (number, n) = match &c.target {
        CompareTarget::Version(n) => (TargetNumber::Version, *n),
        CompareTarget::CreateRevision(n) => (TargetNumber::Create, *n),
        CompareTarget::ModRevision(n) => (TargetNumber::Mod, *n),
        CompareTarget::Lease(n) => (TargetNumber::Lease, *n),
        CompareTarget::Value(value) => {
            b.push(TargetNumber::Value as u8);
            b.bytes(value);
            return;
        }
        CompareTarget::Condition(condition) => {
            b.push(TargetNumber::Condition as u8);
            condition.write(b);
            return;
        }
    };
    b.push(number as u8);
    b.signed(n);
}

fn read_compare(r: &mut Reader<'_>) -> Decoded<Compare> {
    let span = read_span(r)?;
    let relation = match RelationNumber::read(r)? {
        RelationNumber::Equal => Relation::Equal,
        RelationNumber::Greater => Relation::Greater,
        RelationNumber::Less => Relation::Less,
        RelationNumber::NotEqual => Relation::NotEqual,
    };
    let target = match TargetNumber::read(r)? {
        TargetNumber::Version => CompareTarget::Version(r.signed("a compare")?),
        TargetNumber::Create => CompareTarget::CreateRevision(r.signed("a compare")?),
        TargetNumber::Mod => CompareTarget::ModRevision(r.signed("a compare")?),
        TargetNumber::Lease => CompareTarget::Lease(r.signed("a compare")?),
        TargetNumber::Value => CompareTarget::Value(r.boxed("a compare")?),
        TargetNumber::Condition => CompareTarget::Condition(Coded::read(r, "a condition")?),
    };
    Ok(Compare { span, relation, target })
}

fn write_op(b: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Put(p) => {
            b.push(OpNumber::Put as u8);
            b.bytes(p.key.as_bytes());
            b.bytes(&p.value);
            b.varint(p.session.0);
            b.push(u8::from(p.prev) | u8::from(p.keep_value) << 1 | u8::from(p.keep_session) << 2);
        }
        Op::Delete(d) => {
            b.push(OpNumber::Delete as u8);
            write_span(b, &d.span);
            b.flag(d.prev);
        }
        Op::Range(range) => {
            b.push(OpNumber::Range as u8);
            write_range(b, range);
        }
        Op::Txn(sub) => {
            b.push(OpNumber::Txn as u8);
            b.list(&sub.compares, write_compare);
            b.list(&sub.then, write_op);
            b.list(&sub.otherwise, write_op);
        }
        Op::Compact { revision } => {
            b.push(OpNumber::Compact as u8);
            b.signed(*revision);
        }
        Op::SessionCreate(create) => {
            b.push(OpNumber::SessionCreate as u8);
            write_session_create(b, create);
        }
        Op::SessionEnd { session, token } => {
            b.push(OpNumber::SessionEnd as u8);
            b.varint(session.0);
            b.option(*token, Write::varint);
        }
        Op::SessionExpire { session, token, term } => {
            b.push(OpNumber::SessionExpire as u8);
            b.varint(session.0);
            b.varint(*token);
            b.varint(term.0);
        }
        Op::SessionCheckpoint { session, token, remaining_ms } => {
            b.push(OpNumber::SessionCheckpoint as u8);
            b.varint(session.0);
            b.varint(*token);
            b.option(*remaining_ms, Write::varint);
        }
        Op::LockAcquire(acquire) => {
            b.push(OpNumber::LockAcquire as u8);
            write_lock_acquire(b, acquire);
        }
        Op::LockRelease { name, session, token } => {
            b.push(OpNumber::LockRelease as u8);
            b.bytes(name);
            b.varint(session.0);
            b.varint(token.0);
        }
        Op::LockCancel { name, session, request } => {
            b.push(OpNumber::LockCancel as u8);
            b.bytes(name);
            b.varint(session.0);
            write_request(b, request.as_ref());
        }
        Op::Native(op) => {
            b.push(OpNumber::Native as u8);
            op.write(b);
        }
        Op::Genesis { cluster, issuer } => {
            b.push(OpNumber::Genesis as u8);
            b.extend_from_slice(&cluster.to_le_bytes());
            b.extend_from_slice(issuer);
        }
        Op::RaiseBehaviour { to } => {
            b.push(OpNumber::RaiseBehaviour as u8);
            b.varint(u64::from(*to));
        }
        Op::SetLimit { limit, value } => {
            b.push(OpNumber::SetLimit as u8);
            b.push(*limit as u8);
            b.varint(*value);
        }
        Op::Checksum { at, sum } => {
            b.push(OpNumber::Checksum as u8);
            b.varint(at.0);
            b.extend_from_slice(&sum.to_le_bytes());
        }
        Op::MemberAdd { id, name, peer, role, replaces, join } => {
            b.push(OpNumber::MemberAdd as u8);
            b.varint(id.0);
            b.bytes(name.as_bytes());
            b.bytes(peer.as_bytes());
            write_role(b, *role);
            b.option(*replaces, |b, id| b.varint(id.0));
            b.extend_from_slice(join);
        }
        Op::MemberPromote { id } => {
            b.push(OpNumber::MemberPromote as u8);
            b.varint(id.0);
        }
        Op::MemberRemove { id } => {
            b.push(OpNumber::MemberRemove as u8);
            b.varint(id.0);
        }
        Op::MemberUpdate { id, peer } => {
            b.push(OpNumber::MemberUpdate as u8);
            b.varint(id.0);
            b.bytes(peer.as_bytes());
        }
        Op::MemberRegister { id, storage, boots, peer, clients, behaviour, release } => {
            b.push(OpNumber::MemberRegister as u8);
            b.varint(id.0);
            b.extend_from_slice(storage);
            b.varint(*boots);
            b.bytes(peer.as_bytes());
            b.list(clients, |b, url| b.bytes(url.as_bytes()));
            b.varint(u64::from(*behaviour));
            b.bytes(release.as_bytes());
        }
        Op::MemberSeen { id, index } => {
            b.push(OpNumber::MemberSeen as u8);
            b.varint(id.0);
            b.varint(index.0);
        }
    }
}

fn read_op(r: &mut Reader<'_>) -> Decoded<Op> {
    Ok(match OpNumber::read(r)? {
        OpNumber::Put => read_put(r)?,
        OpNumber::Delete => Op::Delete(Delete { span: read_span(r)?, prev: r.flag("a delete")? }),
        OpNumber::Range => Op::Range(read_range(r)?),
        OpNumber::Txn => r.deeper(|r| {
            Ok(Op::Txn(Box::new(SubTxn {
                compares: r.list("compares", read_compare)?,
                then: r.list("operations", read_op)?,
                otherwise: r.list("operations", read_op)?,
            })))
        })?,
        OpNumber::Compact => Op::Compact { revision: r.signed("a compaction")? },
        OpNumber::SessionCreate => Op::SessionCreate(read_session_create(r)?),
        OpNumber::SessionEnd => Op::SessionEnd {
            session: SessionId(r.varint("a session end")?),
            token: r.option("a session end", |r| r.varint("a session end"))?,
        },
        OpNumber::SessionExpire => Op::SessionExpire {
            session: SessionId(r.varint("an expiry")?),
            token: r.varint("an expiry")?,
            term: Term(r.varint("an expiry")?),
        },
        OpNumber::SessionCheckpoint => Op::SessionCheckpoint {
            session: SessionId(r.varint("a checkpoint")?),
            token: r.varint("a checkpoint")?,
            remaining_ms: r.option("a checkpoint", |r| r.varint("a checkpoint"))?,
        },
        OpNumber::LockAcquire => Op::LockAcquire(read_lock_acquire(r)?),
        OpNumber::LockRelease => Op::LockRelease {
            name: r.boxed("a lock name")?,
            session: SessionId(r.varint("a release")?),
            token: Revision(r.varint("a release")?),
        },
        OpNumber::LockCancel => Op::LockCancel {
            name: r.boxed("a lock name")?,
            session: SessionId(r.varint("a cancel")?),
            request: read_request(r)?,
        },
        OpNumber::Native => Op::Native(Coded::read(r, "a native operation")?),
        OpNumber::Genesis => Op::Genesis { cluster: r.u64_fixed("a genesis")?, issuer: r.array("a genesis")? },
        OpNumber::RaiseBehaviour => Op::RaiseBehaviour { to: read_behaviour(r)? },
        OpNumber::SetLimit => Op::SetLimit { limit: read_limit(r)?, value: r.varint("a limit")? },
        OpNumber::Checksum => Op::Checksum { at: Index(r.varint("a checksum")?), sum: r.u64_fixed("a checksum")? },
        OpNumber::MemberAdd => Op::MemberAdd {
            id: MemberId(r.varint("a member")?),
            name: r.text("a member")?,
            peer: r.text("a member")?,
            role: read_role(r)?,
            replaces: r.option("a member", |r| Ok(MemberId(r.varint("a member")?)))?,
            join: r.array("a member")?,
        },
        OpNumber::MemberPromote => Op::MemberPromote { id: MemberId(r.varint("a member")?) },
        OpNumber::MemberRemove => Op::MemberRemove { id: MemberId(r.varint("a member")?) },
        OpNumber::MemberUpdate => Op::MemberUpdate { id: MemberId(r.varint("a member")?), peer: r.text("a member")? },
        OpNumber::MemberRegister => Op::MemberRegister {
            id: MemberId(r.varint("a member")?),
            storage: r.array("a member")?,
            boots: r.varint("a member")?,
            peer: r.text("a member")?,
            clients: r.list("a member", |r| r.text("a member"))?,
            behaviour: read_behaviour(r)?,
            release: r.text("a member")?,
        },
        OpNumber::MemberSeen => {
            Op::MemberSeen { id: MemberId(r.varint("a member")?), index: Index(r.varint("a member")?) }
        }
    })
}

fn read_put(r: &mut Reader<'_>) -> Decoded<Op> {
    let key = read_key(r)?;
    let value = r.boxed("a value")?;
    let session = SessionId(r.varint("a put")?);
    let flags = r.byte("a put")?;
    if flags > 7 {
        return Err(DecodeError::Malformed { what: "a put" });
    }
    Ok(Op::Put(Put {
        key,
        value,
        session,
        prev: flags & 1 != 0,
        keep_value: flags & 2 != 0,
        keep_session: flags & 4 != 0,
    }))
}

fn read_behaviour(r: &mut Reader<'_>) -> Decoded<u16> {
    u16::try_from(r.varint("a behaviour")?).map_err(|_| DecodeError::Malformed { what: "a behaviour" })
}

pub(crate) fn write_role(b: &mut Vec<u8>, role: MemberRole) {
    b.push(match role {
        MemberRole::Learner => RoleNumber::Learner,
        MemberRole::Voter => RoleNumber::Voter,
        MemberRole::Removed => RoleNumber::Removed,
    } as u8);
}

pub(crate) fn read_role(r: &mut Reader<'_>) -> Decoded<MemberRole> {
    Ok(match RoleNumber::read(r)? {
        RoleNumber::Learner => MemberRole::Learner,
        RoleNumber::Voter => MemberRole::Voter,
        RoleNumber::Removed => MemberRole::Removed,
    })
}

pub(crate) fn read_limit(r: &mut Reader<'_>) -> Decoded<Limit> {
    let number = r.byte("a limit")?;
    Limit::ALL
        .into_iter()
        .find(|limit| *limit as u8 == number)
        .ok_or(DecodeError::UnknownNumber { what: "limit", number: u64::from(number) })
}

fn write_range(b: &mut Vec<u8>, range: &Range) {
    write_span(b, &range.span);
    b.signed(range.limit);
    b.signed(range.revision);
    b.push(match range.order {
        Order::None => OrderNumber::None,
        Order::Ascending => OrderNumber::Ascending,
        Order::Descending => OrderNumber::Descending,
    } as u8);
    b.push(match range.sort_by {
        SortBy::Key => SortNumber::Key,
        SortBy::Version => SortNumber::Version,
        SortBy::CreateRevision => SortNumber::Create,
        SortBy::ModRevision => SortNumber::Mod,
        SortBy::Value => SortNumber::Value,
    } as u8);
    b.flag(range.keys_only);
    b.flag(range.count_only);
    for n in [range.min_mod_revision, range.max_mod_revision, range.min_create_revision, range.max_create_revision] {
        b.signed(n);
    }
}

fn read_range(r: &mut Reader<'_>) -> Decoded<Range> {
    const WHAT: &str = "a range";
    Ok(Range {
        span: read_span(r)?,
        limit: r.signed(WHAT)?,
        revision: r.signed(WHAT)?,
        order: match OrderNumber::read(r)? {
            OrderNumber::None => Order::None,
            OrderNumber::Ascending => Order::Ascending,
            OrderNumber::Descending => Order::Descending,
        },
        sort_by: match SortNumber::read(r)? {
            SortNumber::Key => SortBy::Key,
            SortNumber::Version => SortBy::Version,
            SortNumber::Create => SortBy::CreateRevision,
            SortNumber::Mod => SortBy::ModRevision,
            SortNumber::Value => SortBy::Value,
        },
        keys_only: r.flag(WHAT)?,
        count_only: r.flag(WHAT)?,
        min_mod_revision: r.signed(WHAT)?,
        max_mod_revision: r.signed(WHAT)?,
        min_create_revision: r.signed(WHAT)?,
        max_create_revision: r.signed(WHAT)?,
    })
}

pub(crate) fn write_session_create(b: &mut Vec<u8>, create: &SessionCreate) {
    b.varint(create.id.0);
    write_face(b, create.face);
    b.varint(create.ttl_ms);
    write_on_expire(b, create.on_expire);
    b.bytes(create.name.as_bytes());
    b.list(&create.metadata, |b, (name, value)| {
        b.bytes(name.as_bytes());
        b.bytes(value.as_bytes());
    });
    b.option(create.alias.as_ref(), |b, alias| b.extend_from_slice(alias));
    b.option(create.secret.as_ref(), |b, secret| b.extend_from_slice(secret));
}

pub(crate) fn write_face(b: &mut Vec<u8>, face: SessionFace) {
    b.push(match face {
        SessionFace::Etcd => FaceNumber::Etcd,
        SessionFace::Native => FaceNumber::Native,
    } as u8);
}

pub(crate) fn write_on_expire(b: &mut Vec<u8>, on_expire: OnExpire) {
    b.push(match on_expire {
        OnExpire::Delete => EndNumber::Delete,
        OnExpire::Release => EndNumber::Release,
    } as u8);
}

pub(crate) fn read_session_create(r: &mut Reader<'_>) -> Decoded<SessionCreate> {
    const WHAT: &str = "a session";
    Ok(SessionCreate {
        id: SessionId(r.varint(WHAT)?),
        face: match FaceNumber::read(r)? {
            FaceNumber::Etcd => SessionFace::Etcd,
            FaceNumber::Native => SessionFace::Native,
        },
        ttl_ms: r.varint(WHAT)?,
        on_expire: match EndNumber::read(r)? {
            EndNumber::Delete => OnExpire::Delete,
            EndNumber::Release => OnExpire::Release,
        },
        name: r.text(WHAT)?,
        metadata: r.list(WHAT, |r| Ok((r.text(WHAT)?, r.text(WHAT)?)))?,
        alias: r.option(WHAT, |r| r.array(WHAT))?,
        secret: r.option(WHAT, |r| r.array(WHAT))?,
    })
}

fn write_lock_acquire(b: &mut Vec<u8>, acquire: &LockAcquire) {
    b.bytes(&acquire.name);
    b.varint(acquire.session.0);
    b.option(acquire.create.as_ref(), write_session_create);
    b.bytes(&acquire.owner);
    b.push(match acquire.mode {
        LockMode::Exclusive => ModeNumber::Exclusive,
    } as u8);
    match acquire.wait {
        Wait::None => b.push(WaitNumber::None as u8),
        Wait::Ms(ms) => {
            b.push(WaitNumber::Ms as u8);
            b.varint(ms);
        }
        Wait::Forever => b.push(WaitNumber::Forever as u8),
    }
}

fn read_lock_acquire(r: &mut Reader<'_>) -> Decoded<LockAcquire> {
    const WHAT: &str = "an acquire";
    Ok(LockAcquire {
        name: r.boxed(WHAT)?,
        session: SessionId(r.varint(WHAT)?),
        create: r.option(WHAT, read_session_create)?,
        owner: r.boxed(WHAT)?,
        mode: match ModeNumber::read(r)? {
            ModeNumber::Exclusive => LockMode::Exclusive,
        },
        wait: match WaitNumber::read(r)? {
            WaitNumber::None => Wait::None,
            WaitNumber::Ms => Wait::Ms(r.varint(WHAT)?),
            WaitNumber::Forever => Wait::Forever,
        },
    })
}

// ---- Replies ----

impl Reply {
    /// Appends the bytes of this reply.
    pub fn encode(&self, b: &mut Vec<u8>) {
        b.push(REPLY_FORMAT);
        b.varint(self.revision.0);
        b.flag(self.replayed);
        match &self.result {
            Ok(reply) => {
                b.push(ResultNumber::Ok as u8);
                write_txn_reply(b, reply);
            }
            Err(rejection) => write_rejection(b, rejection),
        }
    }

    /// Reads a reply back.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new(bytes);
        let format = r.byte("a reply")?;
        if format != REPLY_FORMAT {
            return Err(DecodeError::UnknownFormat { what: "a reply", format });
        }
        let reply = Self {
            revision: Revision(r.varint("a reply")?),
            replayed: r.flag("a reply")?,
            result: read_result(&mut r)?,
        };
        r.finish("a reply")?;
        Ok(reply)
    }
}

fn write_txn_reply(b: &mut Vec<u8>, reply: &TxnReply) {
    b.flag(reply.succeeded);
    b.list(&reply.results, write_op_reply);
}

fn read_txn_reply(r: &mut Reader<'_>) -> Decoded<TxnReply> {
    Ok(TxnReply { succeeded: r.flag("a reply")?, results: r.list("results", read_op_reply)? })
}

pub(crate) fn write_record(b: &mut Vec<u8>, record: &Record) {
    b.bytes(record.as_bytes());
}

pub(crate) fn read_record(r: &mut Reader<'_>) -> Decoded<Record> {
    Record::from_bytes(r.bytes("a record")?).ok_or(DecodeError::Malformed { what: "a record" })
}

fn write_op_reply(b: &mut Vec<u8>, reply: &OpReply) {
    match reply {
        OpReply::Put { prev } => {
            b.push(OpReplyNumber::Put as u8);
            b.option(prev.as_ref(), write_record);
        }
        OpReply::Delete { deleted, prev } => {
            b.push(OpReplyNumber::Delete as u8);
            b.varint(*deleted);
            b.list(prev, write_record);
        }
        OpReply::Range(range) => {
            b.push(OpReplyNumber::Range as u8);
            b.list(&range.records, write_record);
            b.varint(range.count);
            b.flag(range.more);
            b.flag(range.keys_only);
        }
        OpReply::Txn(reply) => {
            b.push(OpReplyNumber::Txn as u8);
            write_txn_reply(b, reply);
        }
        OpReply::Compacted => b.push(OpReplyNumber::Compacted as u8),
        OpReply::SessionCreated { id, token, ttl_ms } => {
            b.push(OpReplyNumber::SessionCreated as u8);
            b.varint(id.0);
            b.varint(*token);
            b.varint(*ttl_ms);
        }
        OpReply::SessionEnded => b.push(OpReplyNumber::SessionEnded as u8),
        OpReply::LockGranted(grant) => {
            b.push(OpReplyNumber::LockGranted as u8);
            b.varint(grant.token.0);
            b.varint(grant.session.0);
            b.varint(grant.session_token);
            b.varint(grant.ttl_ms);
        }
        OpReply::LockReleased => b.push(OpReplyNumber::LockReleased as u8),
        OpReply::LockCancelled { waiters } => {
            b.push(OpReplyNumber::LockCancelled as u8);
            b.varint(*waiters);
        }
        OpReply::Native(reply) => {
            b.push(OpReplyNumber::Native as u8);
            reply.write(b);
        }
        OpReply::Member(record) => {
            b.push(OpReplyNumber::Member as u8);
            members::write(b, record);
        }
        OpReply::Done => b.push(OpReplyNumber::Done as u8),
        OpReply::ResultNotRetained => b.push(OpReplyNumber::ResultNotRetained as u8),
    }
}

fn read_op_reply(r: &mut Reader<'_>) -> Decoded<OpReply> {
    const WHAT: &str = "a result";
    Ok(match OpReplyNumber::read(r)? {
        OpReplyNumber::Put => OpReply::Put { prev: r.option(WHAT, read_record)? },
        OpReplyNumber::Delete => OpReply::Delete { deleted: r.varint(WHAT)?, prev: r.list(WHAT, read_record)? },
        OpReplyNumber::Range => OpReply::Range(RangeReply {
            records: r.list(WHAT, read_record)?,
            count: r.varint(WHAT)?,
            more: r.flag(WHAT)?,
            keys_only: r.flag(WHAT)?,
        }),
        OpReplyNumber::Txn => OpReply::Txn(r.deeper(read_txn_reply)?),
        OpReplyNumber::Compacted => OpReply::Compacted,
        OpReplyNumber::SessionCreated => {
            OpReply::SessionCreated { id: SessionId(r.varint(WHAT)?), token: r.varint(WHAT)?, ttl_ms: r.varint(WHAT)? }
        }
        OpReplyNumber::SessionEnded => OpReply::SessionEnded,
        OpReplyNumber::LockGranted => OpReply::LockGranted(LockGrant {
            token: Revision(r.varint(WHAT)?),
            session: SessionId(r.varint(WHAT)?),
            session_token: r.varint(WHAT)?,
            ttl_ms: r.varint(WHAT)?,
        }),
        OpReplyNumber::LockReleased => OpReply::LockReleased,
        OpReplyNumber::LockCancelled => OpReply::LockCancelled { waiters: r.varint(WHAT)? },
        OpReplyNumber::Native => OpReply::Native(Coded::read(r, "a native answer")?),
        OpReplyNumber::Member => OpReply::Member(Box::new(members::read(r)?)),
        OpReplyNumber::Done => OpReply::Done,
        OpReplyNumber::ResultNotRetained => OpReply::ResultNotRetained,
    })
}

pub(crate) fn write_holder(b: &mut Vec<u8>, holder: &Holder) {
    b.varint(holder.token.0);
    b.varint(holder.session.0);
    b.bytes(&holder.owner);
    b.varint(holder.since.0);
}

pub(crate) fn read_holder(r: &mut Reader<'_>) -> Decoded<Holder> {
    const WHAT: &str = "a holder";
    Ok(Holder {
        token: Revision(r.varint(WHAT)?),
        session: SessionId(r.varint(WHAT)?),
        owner: r.boxed(WHAT)?,
        since: LogTime(r.varint(WHAT)?),
    })
}

fn write_name(b: &mut Vec<u8>, what: &str) {
    b.push(NAMES.iter().position(|n| *n == what).unwrap_or(0) as u8);
}

fn read_name(r: &mut Reader<'_>) -> Decoded<&'static str> {
    let number = r.byte("a name")?;
    NAMES
        .get(usize::from(number))
        .copied()
        .ok_or(DecodeError::UnknownNumber { what: "name", number: u64::from(number) })
}

fn write_rejection(b: &mut Vec<u8>, rejection: &Rejection) {
    use ResultNumber as N;
    match rejection {
        Rejection::EmptyKey => b.push(N::EmptyKey as u8),
        Rejection::DuplicateKey => b.push(N::DuplicateKey as u8),
        Rejection::TooManyOps { ops, max } => {
            b.push(N::TooManyOps as u8);
            b.varint(*ops);
            b.varint(*max);
        }
        Rejection::KeyNotFound => b.push(N::KeyNotFound as u8),
        Rejection::Compacted { lowest } => write_numbered(b, N::Compacted, lowest.0),
        Rejection::FutureRevision { current } => write_numbered(b, N::FutureRevision, current.0),
        Rejection::SessionNotFound { session } => write_numbered(b, N::SessionNotFound, session.0),
        Rejection::SessionExists { session } => write_numbered(b, N::SessionExists, session.0),
        Rejection::SessionExpired { session } => write_numbered(b, N::SessionExpired, session.0),
        Rejection::Quota { what, limit } => {
            b.push(N::Quota as u8);
            write_name(b, what);
            b.varint(*limit);
        }
        Rejection::RateLimited { what, limit } => {
            b.push(N::RateLimited as u8);
            write_name(b, what);
            b.varint(*limit);
        }
        Rejection::Mismatch => b.push(N::Mismatch as u8),
        Rejection::Held { name, holder, waiters } => {
            b.push(N::Held as u8);
            b.bytes(name);
            write_holder(b, holder);
            b.varint(*waiters);
        }
        Rejection::TimeoutWaiting { name, waited_ms, holder } => {
            b.push(N::TimeoutWaiting as u8);
            b.bytes(name);
            b.varint(*waited_ms);
            b.option(holder.as_ref(), write_holder);
        }
        Rejection::Cancelled { name } => {
            b.push(N::Cancelled as u8);
            b.bytes(name);
        }
        Rejection::Deadlock { name, holder } => {
            b.push(N::Deadlock as u8);
            b.bytes(name);
            write_holder(b, holder);
        }
        Rejection::Fenced { name, presented, newest, holder } => {
            b.push(N::Fenced as u8);
            b.bytes(name);
            b.varint(presented.0);
            b.varint(newest.0);
            b.option(holder.as_ref(), write_holder);
        }
        Rejection::NotFound { what, name } => {
            b.push(N::NotFound as u8);
            write_name(b, what);
            b.bytes(name);
        }
        Rejection::Invalid { why } => {
            b.push(N::Invalid as u8);
            b.bytes(why.as_bytes());
        }
        Rejection::NotYet { behaviour } => write_numbered(b, N::NotYet, u64::from(*behaviour)),
        Rejection::MemberExists { id, name, peer, removed } => {
            write_numbered(b, N::MemberExists, id.0);
            b.bytes(name.as_bytes());
            b.bytes(peer.as_bytes());
            b.flag(*removed);
        }
        Rejection::MemberRemoved { id } => write_numbered(b, N::MemberRemoved, id.0),
        Rejection::OtherStorage { id } => write_numbered(b, N::OtherStorage, id.0),
        Rejection::RolledBack { id, boots, recorded } => {
            write_numbered(b, N::RolledBack, id.0);
            b.varint(*boots);
            b.varint(*recorded);
        }
        Rejection::Refused(refusal) => {
            b.push(N::Refused as u8);
            refusal.write(b);
        }
    }
}

fn write_numbered(b: &mut Vec<u8>, number: ResultNumber, n: u64) {
    b.push(number as u8);
    b.varint(n);
}

fn read_result(r: &mut Reader<'_>) -> Decoded<Result<TxnReply, Rejection>> {
    use ResultNumber as N;
    const WHAT: &str = "a rejection";
    Ok(Err(match N::read(r)? {
        N::Ok => return Ok(Ok(read_txn_reply(r)?)),
        N::EmptyKey => Rejection::EmptyKey,
        N::DuplicateKey => Rejection::DuplicateKey,
        N::TooManyOps => Rejection::TooManyOps { ops: r.varint(WHAT)?, max: r.varint(WHAT)? },
        N::KeyNotFound => Rejection::KeyNotFound,
        N::Compacted => Rejection::Compacted { lowest: Revision(r.varint(WHAT)?) },
        N::FutureRevision => Rejection::FutureRevision { current: Revision(r.varint(WHAT)?) },
        N::SessionNotFound => Rejection::SessionNotFound { session: SessionId(r.varint(WHAT)?) },
        N::SessionExists => Rejection::SessionExists { session: SessionId(r.varint(WHAT)?) },
        N::SessionExpired => Rejection::SessionExpired { session: SessionId(r.varint(WHAT)?) },
        N::Quota => Rejection::Quota { what: read_name(r)?, limit: r.varint(WHAT)? },
        N::RateLimited => Rejection::RateLimited { what: read_name(r)?, limit: r.varint(WHAT)? },
        N::Mismatch => Rejection::Mismatch,
        N::Held => Rejection::Held { name: r.boxed(WHAT)?, holder: read_holder(r)?, waiters: r.varint(WHAT)? },
        N::TimeoutWaiting => Rejection::TimeoutWaiting {
            name: r.boxed(WHAT)?,
            waited_ms: r.varint(WHAT)?,
            holder: r.option(WHAT, read_holder)?,
        },
        N::Cancelled => Rejection::Cancelled { name: r.boxed(WHAT)? },
        N::Deadlock => Rejection::Deadlock { name: r.boxed(WHAT)?, holder: read_holder(r)? },
        N::Fenced => Rejection::Fenced {
            name: r.boxed(WHAT)?,
            presented: Revision(r.varint(WHAT)?),
            newest: Revision(r.varint(WHAT)?),
            holder: r.option(WHAT, read_holder)?,
        },
        N::NotFound => Rejection::NotFound { what: read_name(r)?, name: r.boxed(WHAT)? },
        N::Invalid => Rejection::Invalid { why: r.text(WHAT)? },
        N::NotYet => Rejection::NotYet {
            behaviour: u16::try_from(r.varint(WHAT)?).map_err(|_| DecodeError::Malformed { what: WHAT })?,
        },
        N::MemberExists => Rejection::MemberExists {
            id: MemberId(r.varint(WHAT)?),
            name: r.text(WHAT)?,
            peer: r.text(WHAT)?,
            removed: r.flag(WHAT)?,
        },
        N::MemberRemoved => Rejection::MemberRemoved { id: MemberId(r.varint(WHAT)?) },
        N::Refused => Rejection::Refused(Coded::read(r, "a refusal")?),
        N::OtherStorage => Rejection::OtherStorage { id: MemberId(r.varint(WHAT)?) },
        N::RolledBack => {
            Rejection::RolledBack { id: MemberId(r.varint(WHAT)?), boots: r.varint(WHAT)?, recorded: r.varint(WHAT)? }
        }
    }))
}
