//! Answers of the hot etcd calls, written straight from records: no message structs, no copies of keys and values in between.
//!
//! Promises. E1: the bytes decode to the message that `etcdserverpb` describes; default fields are left out. E2: a header carries
//! exactly the fields that etcd 3.7 fills in that place.
//! Relies on. Lengths fit 32 bits: answers are bounded by memory long before.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use bytes::{BufMut, Bytes, BytesMut};
use tenure_machine::{Change, LogTime, OpReply, RangeReply, Record, Revision, TxnReply};
use tenure_replica::Millis;

/// When the member was in contact with its group last; zero if it never was.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contact(u64);

impl Contact {
    /// How old what a stale read finds may be, counted now: the driver may be between two rounds, or may have stood still.
    pub(crate) fn age_ms(self) -> u64 {
        if self.0 == 0 { u64::MAX } else { crate::driver::now().0.saturating_sub(self.0) }
    }
}

/// What every header says besides its revision. Written by the driver, read by whoever answers.
#[derive(Debug, Default)]
pub struct Identity {
    cluster: AtomicU64,
    member: AtomicU64,
    term: AtomicU64,
    /// The newest log time, from which ages are told.
    stamp: AtomicU64,
    /// See `Contact`.
    contact_at: AtomicU64,
    /// The behaviour version of the cluster.
    behaviour: AtomicU32,
}

impl Identity {
    pub(crate) fn new(member: u64) -> Self {
        Self { member: AtomicU64::new(member), ..Self::default() }
    }

    pub(crate) fn advance(&self, cluster: u64, behaviour: u16, term: u64, stamp: LogTime, contact_at: Option<Millis>) {
        self.behaviour.store(u32::from(behaviour), Ordering::Relaxed);
        self.contact_at.store(contact_at.map_or(0, |at| at.0), Ordering::Relaxed);
        self.cluster.store(cluster, Ordering::Relaxed);
        self.term.store(term, Ordering::Relaxed);
        self.stamp.store(stamp.0, Ordering::Relaxed);
    }

    /// To be asked before the state is read whose age it tells.
    pub(crate) fn contact(&self) -> Contact {
        Contact(self.contact_at.load(Ordering::Relaxed))
    }

    pub(crate) fn behaviour(&self) -> u32 {
        self.behaviour.load(Ordering::Relaxed)
    }

    pub(crate) fn stamp(&self) -> LogTime {
        LogTime(self.stamp.load(Ordering::Relaxed))
    }

    pub fn cluster(&self) -> u64 {
        self.cluster.load(Ordering::Relaxed)
    }

    pub fn member(&self) -> u64 {
        self.member.load(Ordering::Relaxed)
    }

    pub fn term(&self) -> u64 {
        self.term.load(Ordering::Relaxed)
    }

    /// As a message, for the calls that are not hot.
    pub(crate) fn header(&self, revision: Revision) -> tenure_wire::etcd::etcdserverpb::ResponseHeader {
        tenure_wire::etcd::etcdserverpb::ResponseHeader {
            cluster_id: self.cluster(),
            member_id: self.member(),
            revision: revision.0 as i64,
            raft_term: self.term(),
        }
    }
}

pub(crate) const fn varint_len(n: u64) -> usize {
    ((63 - (n | 1).leading_zeros()) / 7 + 1) as usize
}

pub(crate) fn put_varint(out: &mut BytesMut, mut n: u64) {
    while n >= 0x80 {
        out.put_u8(n as u8 | 0x80);
        n >>= 7;
    }
    out.put_u8(n as u8);
}

/// A numeric field with a number below 16; nothing for zero, as proto3 has it.
pub(crate) fn put_number(out: &mut BytesMut, field: u8, n: u64) {
    if n != 0 {
        out.put_u8(field << 3);
        put_varint(out, n);
    }
}

const fn number_len(n: u64) -> usize {
    if n == 0 { 0 } else { 1 + varint_len(n) }
}

/// A field of bytes or a message with a number below 16; nothing for empty ones.
pub(crate) fn put_bytes(out: &mut BytesMut, field: u8, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_message_head(out, field, bytes.len());
        out.put_slice(bytes);
    }
}

const fn bytes_len(len: usize) -> usize {
    if len == 0 { 0 } else { 1 + varint_len(len as u64) + len }
}

/// Tag and length of an embedded message or of bytes.
pub(crate) fn put_message_head(out: &mut BytesMut, field: u8, len: usize) {
    out.put_u8(field << 3 | 2);
    put_varint(out, len as u64);
}

/// The whole header, field 1 of every answer.
pub(crate) fn put_header(out: &mut BytesMut, identity: &Identity, revision: u64) {
    let (cluster, member, term) = (identity.cluster(), identity.member(), identity.term());
    put_message_head(out, 1, number_len(cluster) + number_len(member) + number_len(revision) + number_len(term));
    put_number(out, 1, cluster);
    put_number(out, 2, member);
    put_number(out, 3, revision);
    put_number(out, 4, term);
}

/// The header inside a transaction's answer: only a revision.
fn put_inner_header(out: &mut BytesMut, revision: u64) {
    put_message_head(out, 1, number_len(revision));
    put_number(out, 3, revision);
}

/// Which fields of a key go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fields {
    All,
    /// `keys_only`: neither value nor lease.
    Keys,
    /// `keys_only` sorted by value, where etcd 3.7 keeps the lease.
    KeysAndLease,
}

/// Embeds `mvccpb.KeyValue`.
pub(crate) fn put_key_value(out: &mut BytesMut, field: u8, record: &Record, fields: Fields) {
    let (meta, _, value) = record.parts();
    let name = record.name();
    let value = if fields == Fields::All { value } else { &[] };
    let lease = if fields == Fields::Keys { 0 } else { meta.owner.0 };
    let (create, modified) = (meta.create_revision.0, meta.mod_revision.0);
    let len = bytes_len(name.len())
        + number_len(create)
        + number_len(modified)
        + number_len(meta.version)
        + bytes_len(value.len())
        + number_len(lease);
    out.reserve(len + 12);
    put_message_head(out, field, len);
    put_bytes(out, 1, name);
    put_number(out, 2, create);
    put_number(out, 3, modified);
    put_number(out, 4, meta.version);
    put_bytes(out, 5, value);
    put_number(out, 6, lease);
}

fn range_body(out: &mut BytesMut, reply: &RangeReply, fields: Fields) {
    for record in &reply.records {
        put_key_value(out, 2, record, fields);
    }
    put_number(out, 3, u64::from(reply.more));
    put_number(out, 4, reply.count);
}

fn range_capacity(reply: &RangeReply) -> usize {
    // Key, value and numbers are about what a record takes.
    64 + reply.records.iter().map(|record| record.as_bytes().len() + 16).sum::<usize>()
}

pub(crate) fn range(identity: &Identity, revision: Revision, reply: &RangeReply, fields: Fields) -> Bytes {
    let mut out = BytesMut::with_capacity(range_capacity(reply));
    put_header(&mut out, identity, revision.0);
    range_body(&mut out, reply, fields);
    out.freeze()
}

pub(crate) fn put(identity: &Identity, revision: Revision, prev: Option<&Record>) -> Bytes {
    let mut out = BytesMut::with_capacity(48);
    put_header(&mut out, identity, revision.0);
    if let Some(prev) = prev {
        put_key_value(&mut out, 2, prev, Fields::All);
    }
    out.freeze()
}

pub(crate) fn delete(identity: &Identity, revision: Revision, deleted: u64, prev: &[Record]) -> Bytes {
    let mut out = BytesMut::with_capacity(64);
    put_header(&mut out, identity, revision.0);
    delete_body(&mut out, deleted, prev);
    out.freeze()
}

fn delete_body(out: &mut BytesMut, deleted: u64, prev: &[Record]) {
    put_number(out, 2, deleted);
    for record in prev {
        put_key_value(out, 3, record, Fields::All);
    }
}

pub(crate) fn txn(identity: &Identity, revision: Revision, reply: &TxnReply) -> Bytes {
    let mut out = BytesMut::with_capacity(128);
    put_header(&mut out, identity, revision.0);
    let mut walk = Walk { before: revision.0, after: revision.0, changed: false };
    if changes_anything(reply) {
        walk.before -= 1;
    }
    txn_body(&mut out, reply, &mut walk);
    out.freeze()
}

fn changes_anything(reply: &TxnReply) -> bool {
    reply.results.iter().any(|result| match result {
        OpReply::Put { .. } => true,
        OpReply::Delete { deleted, .. } => *deleted > 0,
        OpReply::Txn(inner) => changes_anything(inner),
        _ => false,
    })
}

/// The revision that each operation tells: that before the transaction until something changed, its own from then on.
struct Walk {
    before: u64,
    after: u64,
    changed: bool,
}

impl Walk {
    fn revision(&self) -> u64 {
        if self.changed { self.after } else { self.before }
    }
}

fn txn_body(out: &mut BytesMut, reply: &TxnReply, walk: &mut Walk) {
    put_number(out, 2, u64::from(reply.succeeded));
    let mut inner = BytesMut::new();
    for result in &reply.results {
        inner.clear();
        let field = op_body(&mut inner, result, walk);
        // `responses`, then the member of the oneof.
        put_message_head(out, 3, 1 + varint_len(inner.len() as u64) + inner.len());
        put_message_head(out, field, inner.len());
        out.put_slice(&inner);
    }
}

/// One operation's answer; returns the number of its field in `ResponseOp`.
fn op_body(out: &mut BytesMut, result: &OpReply, walk: &mut Walk) -> u8 {
    match result {
        OpReply::Put { prev } => {
            walk.changed = true;
            put_inner_header(out, walk.revision());
            if let Some(prev) = prev {
                put_key_value(out, 2, prev, Fields::All);
            }
            2
        }
        OpReply::Delete { deleted, prev } => {
            walk.changed |= *deleted > 0;
            put_inner_header(out, walk.revision());
            delete_body(out, *deleted, prev);
            3
        }
        OpReply::Txn(inner) => {
            put_inner_header(out, 0);
            txn_body(out, inner, walk);
            4
        }
        OpReply::Range(reply) => {
            put_inner_header(out, walk.revision());
            range_body(out, reply, if reply.keys_only { Fields::Keys } else { Fields::All });
            1
        }
        // An etcd transaction holds no other operation; an empty range answer is the neutral one.
        _ => {
            put_inner_header(out, walk.revision());
            1
        }
    }
}

/// Embeds one event as field 11 of a watch answer.
pub(crate) fn put_event(out: &mut BytesMut, change: &Change, with_prev: bool) {
    let mut event = BytesMut::with_capacity(change.record.as_bytes().len() + 32);
    let meta = change.record.meta();
    if meta.tombstone {
        put_number(&mut event, 1, 1);
        // A deletion tells its key and revision, nothing else.
        let name = change.record.name();
        put_message_head(&mut event, 2, bytes_len(name.len()) + number_len(meta.mod_revision.0));
        put_bytes(&mut event, 1, name);
        put_number(&mut event, 3, meta.mod_revision.0);
    } else {
        put_key_value(&mut event, 2, &change.record, Fields::All);
    }
    if with_prev && let Some(before) = &change.before {
        put_key_value(&mut event, 3, before, Fields::All);
    }
    put_message_head(out, 11, event.len());
    out.put_slice(&event);
}

/// How one lease fared in a keep-alive.
pub(crate) fn keep_alive(identity: &Identity, revision: Revision, id: i64, ttl: i64) -> BytesMut {
    let mut out = BytesMut::with_capacity(48);
    put_header(&mut out, identity, revision.0);
    put_number(&mut out, 2, id as u64);
    put_number(&mut out, 3, ttl as u64);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use tenure_machine::{Key, Meta, NamespaceId, SessionId, Space};
    use tenure_wire::etcd::etcdserverpb as pb;

    fn identity() -> Identity {
        let identity = Identity::new(7);
        identity.advance(u64::MAX, 3, 3, LogTime(0), None);
        identity
    }

    fn record(name: &[u8], value: &[u8], mod_revision: u64) -> Record {
        let key = Key::new(Space::Keys, NamespaceId::DEFAULT, name);
        let meta = Meta {
            tombstone: false,
            mod_revision: Revision(mod_revision),
            index: 0,
            create_revision: Revision(2),
            version: 3,
            owner: SessionId(9),
        };
        Record::new(key.as_bytes(), meta, &[], value)
    }

    #[test]
    fn varints() {
        for n in [0, 1, 127, 128, 16_383, 16_384, u64::from(u32::MAX), u64::MAX] {
            let mut out = BytesMut::new();
            put_varint(&mut out, n);
            assert_eq!(out.len(), varint_len(n), "{n}");
        }
    }

    #[test]
    fn range_decodes() {
        let reply = RangeReply {
            records: vec![record(b"a", b"", 5), record(b"b", &[1; 300], 600)],
            count: 900,
            more: true,
            keys_only: false,
        };
        let decoded = pb::RangeResponse::decode(range(&identity(), Revision(700), &reply, Fields::All)).unwrap();
        assert_eq!(decoded.header.unwrap(), identity().header(Revision(700)));
        assert_eq!((decoded.count, decoded.more, decoded.kvs.len()), (900, true, 2));
        assert_eq!(decoded.kvs[1].value.len(), 300);
        assert_eq!((decoded.kvs[0].lease, decoded.kvs[0].version, decoded.kvs[0].mod_revision), (9, 3, 5));
        let keys = pb::RangeResponse::decode(range(&identity(), Revision(700), &reply, Fields::Keys)).unwrap();
        assert!(keys.kvs[1].value.is_empty() && keys.kvs[1].lease == 0);
    }

    /// Each operation tells the revision before the transaction until one changes something; a nested header is empty.
    #[test]
    fn txn_headers() {
        let range = || OpReply::Range(RangeReply::default());
        let reply = TxnReply {
            succeeded: true,
            results: vec![
                range(),
                OpReply::Delete { deleted: 0, prev: vec![] },
                OpReply::Txn(TxnReply {
                    succeeded: false,
                    results: vec![OpReply::Put { prev: Some(record(b"a", b"v", 4)) }],
                }),
                range(),
            ],
        };
        let decoded = pb::TxnResponse::decode(txn(&identity(), Revision(10), &reply)).unwrap();
        let revisions: Vec<i64> = decoded
            .responses
            .iter()
            .map(|op| match op.response.as_ref().unwrap() {
                pb::response_op::Response::ResponseRange(r) => r.header.unwrap().revision,
                pb::response_op::Response::ResponsePut(r) => r.header.unwrap().revision,
                pb::response_op::Response::ResponseDeleteRange(r) => r.header.unwrap().revision,
                pb::response_op::Response::ResponseTxn(r) => r.header.unwrap().revision,
            })
            .collect();
        assert_eq!(revisions, [9, 9, 0, 10]);
        assert_eq!(decoded.header.unwrap().revision, 10);
    }

    #[test]
    fn deletion_event() {
        let key = Key::new(Space::Keys, NamespaceId::DEFAULT, b"gone");
        let meta = Meta { tombstone: true, mod_revision: Revision(8), ..Meta::default() };
        let change =
            Change { record: Record::new(key.as_bytes(), meta, &[], b""), before: Some(record(b"gone", b"v", 7)) };
        let mut out = BytesMut::new();
        put_event(&mut out, &change, true);
        let decoded = pb::WatchResponse::decode(out.freeze()).unwrap();
        let event = &decoded.events[0];
        let kv = event.kv.as_ref().unwrap();
        assert_eq!((event.r#type, &kv.key[..], kv.mod_revision, kv.create_revision), (1, &b"gone"[..], 8, 0));
        assert_eq!(&event.prev_kv.as_ref().unwrap().value[..], b"v");
    }
}
