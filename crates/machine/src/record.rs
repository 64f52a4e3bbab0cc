//! A record: one version of one key, as one immutable block of bytes that is shared, never copied.
//!
//! Layout: key length (u32, little endian), key, flags (bit 0: tombstone), then as LEB128 numbers mod revision, index
//! within that revision, create revision, version, owner session, length of the tail; then the tail of the record's
//! own front and the value. The key stands first at a fixed place, because ordered maps compare it far more often
//! than anything else is read. One allocation of about 30 bytes beside key and value: docs/performance.md says what
//! that saves.

use crate::types::*;
use std::sync::Arc;

/// One version of one key. Cloning shares.
#[derive(Clone, PartialEq, Eq)]
pub struct Record(Arc<[u8]>);

/// The numbers of a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    pub tombstone: bool,
    pub mod_revision: Revision,
    /// The place among the changes of that revision.
    pub index: u32,
    pub create_revision: Revision,
    /// 1 for a created key, one more with each change; 0 for a tombstone.
    pub version: u64,
    pub owner: SessionId,
}

impl Record {
    pub fn new(key: &[u8], meta: Meta, tail: &[u8], value: &[u8]) -> Self {
        Self::build(&mut Vec::new(), key, meta, tail, value)
    }

    /// Makes a record through a buffer that the caller keeps, so that it costs one allocation of exactly its size.
    pub(crate) fn build(b: &mut Vec<u8>, key: &[u8], meta: Meta, tail: &[u8], value: &[u8]) -> Self {
        b.clear();
        b.reserve(4 + key.len() + 48 + tail.len() + value.len());
        b.extend_from_slice(&(key.len() as u32).to_le_bytes());
        b.extend_from_slice(key);
        b.push(meta.tombstone as u8);
        for n in [
            meta.mod_revision.0,
            u64::from(meta.index),
            meta.create_revision.0,
            meta.version,
            meta.owner.0,
            tail.len() as u64,
        ] {
            put_varint(b, n);
        }
        b.extend_from_slice(tail);
        b.extend_from_slice(value);
        Self(Arc::from(b.as_slice()))
    }

    /// Takes stored bytes, if they are a record as `new` makes it: its numbers in their shortest form, so that one record has one encoding.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (len, rest) = bytes.split_first_chunk::<4>()?;
        let len = u32::from_le_bytes(*len) as usize;
        let (&flags, mut rest) = rest.get(len..)?.split_first()?;
        let mut n = [0; 6];
        for slot in &mut n {
            let before = rest;
            *slot = take_varint(&mut rest)?;
            let taken = &before[..before.len() - rest.len()];
            if taken.len() > 1 && taken.ends_with(&[0]) {
                return None;
            }
        }
        let sound = len >= Key::PREFIX && flags <= 1 && n[1] <= u64::from(u32::MAX) && n[5] <= rest.len() as u64;
        sound.then(|| Self(Arc::from(bytes)))
    }

    /// The stored key, with space and namespace.
    #[inline]
    pub fn key(&self) -> &[u8] {
        let len = u32::from_le_bytes([self.0[0], self.0[1], self.0[2], self.0[3]]) as usize;
        &self.0[4..4 + len]
    }

    /// The key as its front knows it.
    pub fn name(&self) -> &[u8] {
        &self.key()[Key::PREFIX..]
    }

    pub fn meta(&self) -> Meta {
        self.parts().0
    }

    /// Where the change stands in the one order of changes: revision, and place within it.
    pub(crate) fn order(&self) -> (Revision, u32) {
        let mut rest = &self.0[4 + self.key().len() + 1..];
        let mut next = || take_varint(&mut rest).expect("records are checked when they are made or loaded");
        (Revision(next()), next() as u32)
    }

    pub fn mod_revision(&self) -> Revision {
        self.order().0
    }

    pub fn is_tombstone(&self) -> bool {
        self.0[4 + self.key().len()] & 1 == 1
    }

    pub fn value(&self) -> &[u8] {
        self.parts().2
    }

    pub fn tail(&self) -> &[u8] {
        self.parts().1
    }

    /// Numbers, tail and value in one pass.
    pub fn parts(&self) -> (Meta, &[u8], &[u8]) {
        let mut rest = &self.0[4 + self.key().len()..];
        let tombstone = rest[0] & 1 == 1;
        rest = &rest[1..];
        let mut n = [0; 6];
        for slot in &mut n {
            *slot = take_varint(&mut rest).expect("records are checked when they are made or loaded");
        }
        let (tail, value) = rest.split_at(n[5] as usize);
        let meta = Meta {
            tombstone,
            mod_revision: Revision(n[0]),
            index: n[1] as u32,
            create_revision: Revision(n[2]),
            version: n[3],
            owner: SessionId(n[4]),
        };
        (meta, tail, value)
    }

    /// All its bytes, as snapshots store them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (meta, _, value) = self.parts();
        write!(f, "{}@{}.{}", self.name().escape_ascii(), meta.mod_revision, meta.index)?;
        if meta.tombstone { write!(f, " deleted") } else { write!(f, "={}", value.escape_ascii()) }
    }
}

pub(crate) fn put_varint(b: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        b.push(n as u8 | 0x80);
        n >>= 7;
    }
    b.push(n as u8);
}

pub(crate) fn take_varint(b: &mut &[u8]) -> Option<u64> {
    let mut n = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = b.split_first()?;
        *b = rest;
        if shift == 63 && byte > 1 {
            return None;
        }
        n |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(n);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_one_encoding() {
        let meta = Meta { mod_revision: Revision(300), create_revision: Revision(4), version: 1, ..Meta::default() };
        let key = Key::new(Space::Keys, NamespaceId::DEFAULT, b"k");
        let record = Record::new(key.as_bytes(), meta, b"t", b"value");
        let bytes = record.as_bytes();
        assert_eq!(Record::from_bytes(bytes), Some(record.clone()));
        // Each number once with an empty group of bits behind it: it would say the same in more bytes.
        let mut at = 4 + record.key().len() + 1;
        for number in 0..6 {
            while bytes[at] & 0x80 != 0 {
                at += 1;
            }
            let mut longer = bytes.to_vec();
            longer[at] |= 0x80;
            longer.insert(at + 1, 0);
            assert_eq!(Record::from_bytes(&longer), None, "number {number}");
            at += 1;
        }
    }
}
