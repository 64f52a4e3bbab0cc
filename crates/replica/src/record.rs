//! The bytes of the log: the header of a segment and the records behind it. docs/formats.md shows them.
//!
//! Promises. R1: a record is recognised only at the place, in the segment and in the folder for which it was written, so nothing
//! that an earlier life of a recycled file left behind, and nothing that a client put into a value, passes for one. R2: any bytes
//! are read without panic. All numbers are little endian.

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState};

/// The part of a segment that its header has for itself.
pub(crate) const HEADER_BYTES: usize = 4096;
pub(crate) const RECORD_HEADER: usize = 32;
/// Records begin at multiples of this.
pub(crate) const ALIGN: usize = 8;
pub(crate) const MAGIC: [u8; 8] = *b"TENURELG";
pub(crate) const FORMAT: u16 = 1;
/// One group for now; each record names its own.
const GROUP: u32 = 0;

/// What a record is. The numbers are stored and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Entries = 1,
    HardState = 2,
    /// Entries from an index on do not count any more.
    Truncate = 3,
    /// Entries up to an index are covered by a snapshot.
    Compact = 4,
    ConfState = 5,
    /// Nothing but the word that the log was synced up to here.
    Synced = 6,
    /// The file has been made longer, to this length.
    Grown = 7,
}

impl Kind {
    fn of(number: u8) -> Option<Self> {
        use Kind::{Compact, ConfState, Entries, Grown, HardState, Synced, Truncate};
        [Entries, HardState, Truncate, Compact, ConfState, Synced, Grown].into_iter().find(|k| *k as u8 == number)
    }
}

/// One record as it was read.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub(crate) kind: Kind,
    /// Up to here its segment was known to be synced when it was written.
    pub(crate) synced: u32,
    pub(crate) body: Bytes,
}

/// The bytes that a body of this length takes, with header and padding.
pub(crate) fn record_bytes(body: usize) -> usize {
    (RECORD_HEADER + body).next_multiple_of(ALIGN)
}

/// Appends a record with blanks for what only its place tells; `seal` fills them in.
pub(crate) fn put_record(out: &mut Vec<u8>, kind: Kind, body: impl FnOnce(&mut Vec<u8>)) -> usize {
    let start = out.len();
    out.resize(start + RECORD_HEADER, 0);
    body(out);
    let len = (out.len() - start - RECORD_HEADER) as u32;
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
    out[start + 24..start + 28].copy_from_slice(&GROUP.to_le_bytes());
    out[start + 28] = kind as u8;
    out.resize(start + record_bytes(len as usize), 0);
    start
}

/// Gives the record at the start of `record` its place and its checksum.
pub(crate) fn seal(record: &mut [u8], seed: u32, segment: u64, offset: u32, synced: u32) {
    record[8..16].copy_from_slice(&segment.to_le_bytes());
    record[16..20].copy_from_slice(&offset.to_le_bytes());
    record[20..24].copy_from_slice(&synced.to_le_bytes());
    let len = le_u32(record, 0) as usize;
    let crc = checksum(record, len, seed);
    record[4..8].copy_from_slice(&crc.to_le_bytes());
}

fn checksum(record: &[u8], len: usize, seed: u32) -> u32 {
    let length = crc32c::crc32c_append(seed, &record[0..4]);
    crc32c::crc32c_append(length, &record[8..RECORD_HEADER + len])
}

/// The record at `offset` of a segment, if one was written there in this life of the file.
pub(crate) fn record_at(segment: &Bytes, offset: usize, seed: u32, id: u64) -> Option<Record> {
    let header = segment.get(offset..offset + RECORD_HEADER)?;
    if le_u64(header, 8) != id || le_u32(header, 16) as usize != offset {
        return None;
    }
    let len = le_u32(header, 0) as usize;
    let end = offset.checked_add(RECORD_HEADER)?.checked_add(len)?;
    let record = segment.get(offset..end)?;
    if checksum(record, len, seed) != le_u32(header, 4) || le_u32(header, 24) != GROUP {
        return None;
    }
    Some(Record {
        kind: Kind::of(header[28])?,
        synced: le_u32(header, 20),
        body: segment.slice(offset + RECORD_HEADER..end),
    })
}

pub(crate) fn put_entries(out: &mut Vec<u8>, commit: u64, entries: &[Entry]) {
    out.extend_from_slice(&commit.to_le_bytes());
    out.extend_from_slice(&entries.first().map_or(0, |e| e.index).to_le_bytes());
    out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    for e in entries {
        out.extend_from_slice(&e.term.to_le_bytes());
        out.push(e.entry_type as u8);
        out.extend_from_slice(&(e.data.len() as u32).to_le_bytes());
        out.extend_from_slice(&(e.context.len() as u32).to_le_bytes());
        out.extend_from_slice(&e.data);
        out.extend_from_slice(&e.context);
    }
}

/// The commit index that was known then, and the entries; their data share the body.
pub(crate) fn take_entries(body: &Bytes) -> Option<(u64, Vec<Entry>)> {
    let mut r = Reader { bytes: body, at: 0 };
    let (commit, first, count) = (r.u64()?, r.u64()?, r.u32()?);
    let mut entries = Vec::with_capacity((count as usize).min(body.len() / 17));
    for i in 0..u64::from(count) {
        let term = r.u64()?;
        let entry_type = match r.u8()? {
            0 => EntryType::EntryNormal,
            1 => EntryType::EntryConfChange,
            2 => EntryType::EntryConfChangeV2,
            _ => return None,
        };
        let (data, context) = (r.u32()? as usize, r.u32()? as usize);
        entries.push(Entry {
            entry_type,
            term,
            index: first.checked_add(i)?,
            data: r.bytes(data)?,
            context: r.bytes(context)?,
        });
    }
    (r.at == body.len()).then_some((commit, entries))
}

pub(crate) fn put_numbers(out: &mut Vec<u8>, numbers: &[u64]) {
    for n in numbers {
        out.extend_from_slice(&n.to_le_bytes());
    }
}

pub(crate) fn take_numbers<const N: usize>(body: &Bytes) -> Option<[u64; N]> {
    let mut r = Reader { bytes: body, at: 0 };
    let mut numbers = [0; N];
    for n in &mut numbers {
        *n = r.u64()?;
    }
    (r.at == body.len()).then_some(numbers)
}

/// The applied index and the configuration as of it.
pub(crate) fn put_conf_state(out: &mut Vec<u8>, index: u64, conf: &ConfState) {
    out.extend_from_slice(&index.to_le_bytes());
    // Writing plain structs into memory cannot fail.
    out.extend_from_slice(&conf.write_to_bytes().unwrap_or_default());
}

pub(crate) fn take_conf_state(body: &Bytes) -> Option<(u64, ConfState)> {
    let (index, rest) = body.split_first_chunk::<8>()?;
    let mut conf = ConfState::default();
    conf.merge_from_bytes(rest).ok()?;
    Some((u64::from_le_bytes(*index), conf))
}

/// What a segment opens with, so that all older ones can go.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Header {
    pub(crate) cluster: u64,
    pub(crate) member: u64,
    pub(crate) storage: [u8; 16],
    pub(crate) segment: u64,
    /// The segment before this one and where it ends, whatever may still stand behind that; zero: none is needed.
    pub(crate) previous: u64,
    pub(crate) previous_end: u32,
    pub(crate) hard_state: HardState,
    /// The first entry that can follow, and the term of the one before it.
    pub(crate) first_index: u64,
    pub(crate) before_term: u64,
    /// The length that the file was known to have on disk before this header was written: none that is shorter is whole.
    pub(crate) file_bytes: u64,
    pub(crate) conf_index: u64,
    pub(crate) conf_state: ConfState,
}

impl Header {
    /// Exactly `HEADER_BYTES`.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        out.extend_from_slice(&[0; 10]);
        put_numbers(&mut out, &[self.cluster, self.member]);
        out.extend_from_slice(&self.storage);
        put_numbers(&mut out, &[self.segment, self.previous, u64::from(self.previous_end)]);
        put_numbers(&mut out, &[self.hard_state.term, self.hard_state.vote, self.hard_state.commit]);
        put_numbers(&mut out, &[self.first_index, self.before_term, self.file_bytes]);
        put_conf_state(&mut out, self.conf_index, &self.conf_state);
        // A configuration names a handful of members; the assertion would fail at some four hundred.
        assert!(out.len() <= HEADER_BYTES, "the configuration does not fit into a segment's header");
        let len = out.len() as u32;
        out[12..16].copy_from_slice(&len.to_le_bytes());
        let crc = crc32c::crc32c(&out[20..]);
        out[16..20].copy_from_slice(&crc.to_le_bytes());
        out.resize(HEADER_BYTES, 0);
        out
    }

    /// `Err` says what is wrong: another format, or nothing that is a header.
    pub(crate) fn decode(bytes: &Bytes) -> Result<Self, HeaderError> {
        let head = bytes.get(..20).ok_or(HeaderError::None)?;
        if head[..8] != MAGIC {
            return Err(HeaderError::None);
        }
        let len = le_u32(head, 12) as usize;
        // A length that lies, as in a file of our magic and zeros, is no header and no panic.
        let body = bytes.get(20..len).filter(|_| len <= HEADER_BYTES).ok_or(HeaderError::None)?;
        let format = u16::from_le_bytes([head[8], head[9]]);
        if crc32c::crc32c(body) != le_u32(head, 16) {
            return Err(HeaderError::None);
        }
        if format != FORMAT {
            return Err(HeaderError::Format(format));
        }
        Self::take(&bytes.slice(20..len)).ok_or(HeaderError::None)
    }

    fn take(body: &Bytes) -> Option<Self> {
        let mut r = Reader { bytes: body, at: 0 };
        let mut header = Self { cluster: r.u64()?, member: r.u64()?, ..Self::default() };
        header.storage.copy_from_slice(&r.bytes(16)?);
        header.segment = r.u64()?;
        header.previous = r.u64()?;
        header.previous_end = u32::try_from(r.u64()?).ok()?;
        header.hard_state = HardState { term: r.u64()?, vote: r.u64()?, commit: r.u64()? };
        header.first_index = r.u64()?;
        header.before_term = r.u64()?;
        header.file_bytes = r.u64()?;
        (header.conf_index, header.conf_state) = take_conf_state(&body.slice(r.at..))?;
        Some(header)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// These bytes are no header, or not a whole one.
    None,
    Format(u16),
}

struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
}

impl Reader<'_> {
    fn bytes(&mut self, len: usize) -> Option<Bytes> {
        let end = self.at.checked_add(len)?;
        if end > self.bytes.len() {
            return None;
        }
        let piece = self.bytes.slice(self.at..end);
        self.at = end;
        Some(piece)
    }

    fn u8(&mut self) -> Option<u8> {
        let n = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(n)
    }

    fn u32(&mut self) -> Option<u32> {
        let n = self.bytes.get(self.at..)?.first_chunk::<4>()?;
        self.at += 4;
        Some(u32::from_le_bytes(*n))
    }

    fn u64(&mut self) -> Option<u64> {
        let n = self.bytes.get(self.at..)?.first_chunk::<8>()?;
        self.at += 8;
        Some(u64::from_le_bytes(*n))
    }
}

pub(crate) fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le_u32(bytes, at)) | u64::from(le_u32(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn entries() -> Vec<Entry> {
        let data = Bytes::from_static(b"abc");
        vec![
            Entry { term: 2, index: 9, data, ..Entry::default() },
            Entry {
                entry_type: EntryType::EntryConfChangeV2,
                term: 3,
                index: 10,
                context: Bytes::from_static(b"x"),
                ..Entry::default()
            },
        ]
    }

    #[test]
    fn golden_record() {
        let mut out = Vec::new();
        put_record(&mut out, Kind::Entries, |b| put_entries(b, 8, &entries()));
        seal(&mut out, 7, 3, 4096, 4000);
        assert_eq!(
            hex(&out),
            "3a0000000f9b4588030000000000000000100000a00f0000000000000100000008000000000000000900000000000000\
             020000000200000000000000000300000000000000616263030000000000000002000000000100000078000000000000"
        );
        let mut segment = vec![0; 4096];
        segment.extend_from_slice(&out);
        let segment = Bytes::from(segment);
        let record = record_at(&segment, 4096, 7, 3).unwrap();
        assert_eq!((record.kind, record.synced), (Kind::Entries, 4000));
        assert_eq!(take_entries(&record.body), Some((8, entries())));
        assert!(record_at(&segment, 4096, 8, 3).is_none(), "another folder");
        assert!(record_at(&segment, 4096, 7, 4).is_none(), "another life of the file");
        assert!(record_at(&segment.slice(8..), 4088, 7, 3).is_none(), "another place");
    }

    #[test]
    fn a_flip_anywhere_in_a_record_is_seen() {
        let mut out = Vec::new();
        put_record(&mut out, Kind::HardState, |b| put_numbers(b, &[1, 2, 3]));
        seal(&mut out, 7, 3, 0, 0);
        assert!(record_at(&Bytes::copy_from_slice(&out), 0, 7, 3).is_some());
        for bit in 0..out.len() * 8 {
            let mut flipped = out.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(record_at(&Bytes::from(flipped), 0, 7, 3).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn golden_header() {
        let header = Header {
            cluster: 1,
            member: 2,
            storage: [3; 16],
            segment: 4,
            previous: 3,
            previous_end: 5,
            hard_state: HardState { term: 6, vote: 7, commit: 8 },
            first_index: 9,
            before_term: 10,
            file_bytes: 12,
            conf_index: 11,
            conf_state: ConfState::from((vec![1], vec![])),
        };
        let bytes = header.encode();
        assert_eq!(bytes.len(), HEADER_BYTES);
        assert_eq!(
            hex(&bytes[..140]),
            "54454e5552454c47010000008b0000005379220a01000000000000000200000000000000030303030303030303030303030303030400000000000000030000000000000005000000000000000600000000000000070000000000000008000000000000000900000000000000\
             0a000000000000000c000000000000000b000000000000000101010000000000"
                .replace(char::is_whitespace, "")
        );
        assert_eq!(Header::decode(&Bytes::from(bytes.clone())), Ok(header));
        // The version is told apart from damage, and two bytes behind it are kept free.
        for bit in (0..139 * 8).filter(|b| !(64..96).contains(b)) {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&Bytes::from(flipped)).is_err(), "bit {bit}");
        }
        let zeros = [&bytes[..12], &[0; HEADER_BYTES - 12]].concat();
        assert_eq!(Header::decode(&Bytes::from(zeros)), Err(HeaderError::None), "magic, version and nothing else");
        let mut newer = bytes;
        newer[8] = 2;
        assert_eq!(Header::decode(&Bytes::from(newer)), Err(HeaderError::Format(2)));
    }
}
