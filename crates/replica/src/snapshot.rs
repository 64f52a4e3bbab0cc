//! Snapshot files: the state at one log index, in blocks that are checked one by one.
//!
//! Promises. N1: a file that has its name is whole: it was written under another one, synced and renamed. N2: loading takes no byte
//! that its checksum does not cover, and no file without the trailer that counts blocks and bytes. N3: no block is written that would not
//! be read. All numbers are little endian.
//!
//! Layout: magic, version (u16), zero (u16), length of the header's rest (u32), its CRC32C (u32), and in it cluster, index, term,
//! the index of the configuration, and the configuration. Then blocks: length (u32, not zero), CRC32C over the block's number (u64) and
//! its bytes (u32), the bytes. Then the trailer: zero (u32), CRC32C of what follows (u32), blocks, bytes, index, term (u64 each).

use crate::config::REQUEST_BYTES_MAX;
use crate::disk::Disk;
use crate::record::{le_u32, le_u64, put_conf_state, put_numbers, take_conf_state};
use bytes::Bytes;
use raft::eraftpb::ConfState;
use std::io;
use tenure_machine::{Loader, Machine};

pub(crate) const TEMPORARY: &str = "snapshot.tmp";
/// What the machine is asked for at a time.
pub(crate) const BLOCK_BYTES: usize = 128 << 10;
/// What a writer makes and a reader takes. A block ends with the entry that fills it, and the largest, of the ring, has two records that
/// each came in a request of their own.
const BLOCK_BYTES_MAX: usize = 2 * REQUEST_BYTES_MAX + (32 << 20);
const MAGIC: [u8; 8] = *b"TENURESN";
const FORMAT: u16 = 1;
const TRAILER_BYTES: usize = 40;

pub(crate) fn file(index: u64) -> String {
    format!("snapshot-{index:016x}")
}

pub(crate) fn index_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("snapshot-")?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Meta {
    pub(crate) cluster: u64,
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) conf: (u64, ConfState),
}

impl Meta {
    fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        put_numbers(&mut body, &[self.cluster, self.index, self.term]);
        put_conf_state(&mut body, self.conf.0, &self.conf.1);
        let mut out = Vec::with_capacity(20 + body.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        out.extend_from_slice(&body);
        out
    }
}

/// Gives the pieces of one file, in order, with their places.
#[derive(Debug)]
pub(crate) struct Writer {
    meta: Meta,
    offset: u64,
    blocks: u64,
    bytes: u64,
}

impl Writer {
    pub(crate) fn new(meta: Meta) -> Self {
        Self { meta, offset: 0, blocks: 0, bytes: 0 }
    }

    pub(crate) fn meta(&self) -> &Meta {
        &self.meta
    }

    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The error is the length of a block that no reader would take.
    pub(crate) fn block(&mut self, block: &[u8]) -> Result<(u64, Vec<u8>), usize> {
        if block.len() > BLOCK_BYTES_MAX {
            return Err(block.len());
        }
        let mut piece = if self.offset == 0 { self.meta.encode() } else { Vec::with_capacity(8 + block.len()) };
        piece.extend_from_slice(&(block.len() as u32).to_le_bytes());
        piece.extend_from_slice(&block_checksum(self.blocks, block).to_le_bytes());
        piece.extend_from_slice(block);
        self.blocks += 1;
        self.bytes += block.len() as u64;
        Ok(self.place(piece))
    }

    pub(crate) fn trailer(&mut self) -> (u64, Vec<u8>) {
        let mut piece = if self.offset == 0 { self.meta.encode() } else { Vec::new() };
        let mut totals = Vec::with_capacity(32);
        put_numbers(&mut totals, &[self.blocks, self.bytes, self.meta.index, self.meta.term]);
        piece.extend_from_slice(&[0; 4]);
        piece.extend_from_slice(&crc32c::crc32c(&totals).to_le_bytes());
        piece.extend_from_slice(&totals);
        self.place(piece)
    }

    fn place(&mut self, piece: Vec<u8>) -> (u64, Vec<u8>) {
        let at = self.offset;
        self.offset += piece.len() as u64;
        (at, piece)
    }
}

fn block_checksum(number: u64, block: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), block)
}

/// Why a snapshot was not loaded, and where.
#[derive(Debug)]
pub(crate) enum LoadError {
    Io(io::Error),
    Format(u16),
    Damaged { offset: u64, why: String },
}

impl std::fmt::Display for LoadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(error) => write!(f, "{error}"),
            Self::Format(format) => write!(f, "format {format} of a snapshot is not known here"),
            Self::Damaged { offset, why } => write!(f, "damaged at byte {offset}: {why}"),
        }
    }
}

pub(crate) fn load(disk: &mut dyn Disk, name: &str) -> Result<(Meta, Machine), LoadError> {
    let mut loader = Loader::new();
    let meta = read(disk, name, |offset, block| {
        loader.push(block).map_err(|e| LoadError::Damaged { offset, why: format!("this block says nothing: {e}") })
    })?;
    let machine = loader
        .finish()
        .map_err(|e| LoadError::Damaged { offset: 0, why: format!("the blocks do not make a state: {e}") })?;
    let position = machine.position();
    if (position.index.0, position.term.0) != (meta.index, meta.term) {
        let why = format!("the file says entry {}, the state in it entry {}", meta.index, position.index);
        return Err(LoadError::Damaged { offset: 0, why });
    }
    Ok((meta, machine))
}

/// Hands out the blocks of a file one by one, each checked.
fn read(
    disk: &mut dyn Disk,
    name: &str,
    mut block: impl FnMut(u64, &[u8]) -> Result<(), LoadError>,
) -> Result<Meta, LoadError> {
    let mut file = Source { disk, name, buffer: Vec::new(), from: 0, at: 0 };
    let meta = read_meta(&mut file)?;
    let (mut blocks, mut bytes) = (0, 0);
    loop {
        let offset = file.at;
        let damaged = |why: &str| LoadError::Damaged { offset, why: why.to_owned() };
        let head = file.take(8)?.to_vec();
        let (len, crc) = (le_u32(&head, 0) as usize, le_u32(&head, 4));
        if len == 0 {
            let totals = file.take(TRAILER_BYTES - 8)?.to_vec();
            let wanted = [blocks, bytes, meta.index, meta.term];
            let same = wanted.iter().enumerate().all(|(i, n)| le_u64(&totals, 8 * i) == *n);
            if crc32c::crc32c(&totals) != crc || !same {
                return Err(damaged("the trailer is wrong"));
            }
            return if file.ended()? { Ok(meta) } else { Err(damaged("something follows the trailer")) };
        }
        if len > BLOCK_BYTES_MAX {
            return Err(damaged("the length of this block is wrong"));
        }
        let body = file.take(len)?;
        if block_checksum(blocks, body) != crc {
            return Err(damaged("the checksum of this block is wrong"));
        }
        block(offset, body)?;
        blocks += 1;
        bytes += len as u64;
    }
}

fn read_meta(file: &mut Source<'_>) -> Result<Meta, LoadError> {
    let damaged = || LoadError::Damaged { offset: 0, why: "the header is wrong".to_owned() };
    let head = file.take(20)?.to_vec();
    if head[..8] != MAGIC {
        return Err(damaged());
    }
    let format = u16::from_le_bytes([head[8], head[9]]);
    let len = le_u32(&head, 12) as usize;
    if len > 1 << 16 {
        return Err(damaged());
    }
    let body = Bytes::copy_from_slice(file.take(len)?);
    if crc32c::crc32c(&body) != le_u32(&head, 16) {
        return Err(damaged());
    }
    if format != FORMAT {
        return Err(LoadError::Format(format));
    }
    if body.len() < 24 {
        return Err(damaged());
    }
    let conf = take_conf_state(&body.slice(24..)).ok_or_else(damaged)?;
    Ok(Meta { cluster: le_u64(&body, 0), index: le_u64(&body, 8), term: le_u64(&body, 16), conf })
}

/// A file read front to back in large pieces.
struct Source<'a> {
    disk: &'a mut dyn Disk,
    name: &'a str,
    buffer: Vec<u8>,
    /// The place in the file of the buffer's first byte, and of the next byte to give.
    from: u64,
    at: u64,
}

impl Source<'_> {
    const PIECE: usize = 1 << 20;

    fn take(&mut self, len: usize) -> Result<&[u8], LoadError> {
        let start = (self.at - self.from) as usize;
        if start + len > self.buffer.len() {
            // Asked first, so that a length that lies takes no memory.
            let rest = self.disk.len(self.name).map_err(LoadError::Io)?.saturating_sub(self.at);
            let piece = (len.max(Self::PIECE) as u64).min(rest) as usize;
            self.buffer = self.disk.read(self.name, self.at, piece).map_err(LoadError::Io)?;
            self.from = self.at;
            if self.buffer.len() < len {
                let why = "the file ends before what begins here".to_owned();
                return Err(LoadError::Damaged { offset: self.at, why });
            }
        }
        let start = (self.at - self.from) as usize;
        self.at += len as u64;
        Ok(&self.buffer[start..start + len])
    }

    fn ended(&mut self) -> Result<bool, LoadError> {
        Ok(self.disk.len(self.name).map_err(LoadError::Io)? == self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemoryDisk;

    fn meta() -> Meta {
        Meta { cluster: 1, index: 2, term: 3, conf: (4, ConfState::from((vec![1], vec![]))) }
    }

    fn written() -> MemoryDisk {
        let mut disk = MemoryDisk::new();
        let mut writer = Writer::new(meta());
        disk.create("s", 0).unwrap();
        for (offset, piece) in [writer.block(b"one").unwrap(), writer.block(b"three").unwrap(), writer.trailer()] {
            disk.write("s", offset, &piece).unwrap();
        }
        disk
    }

    fn blocks(disk: &MemoryDisk) -> Result<Vec<Vec<u8>>, LoadError> {
        let mut blocks = Vec::new();
        read(&mut disk.clone(), "s", |_, b| {
            blocks.push(b.to_vec());
            Ok(())
        })?;
        Ok(blocks)
    }

    #[test]
    fn golden_bytes() {
        let bytes = written().edit("s", |b| b.clone()).unwrap();
        assert_eq!(
            bytes.iter().map(|b| format!("{b:02x}")).collect::<String>(),
            "54454e555245534e01000000270000003fda826801000000000000000200000000000000030000000000000004000000000000000101010000\
             0000030000006ba721e06f6e650500000008babfd57468726565000000001dc44f0b02000000000000000800000000000000\
             02000000000000000300000000000000"
        );
    }

    #[test]
    fn a_block_that_would_not_be_read_is_not_written() {
        let mut writer = Writer::new(meta());
        assert_eq!(writer.block(&vec![0; BLOCK_BYTES_MAX + 1]), Err(BLOCK_BYTES_MAX + 1));
        assert_eq!(writer.offset(), 0);
        assert!(writer.block(&vec![0; BLOCK_BYTES_MAX]).is_ok());
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        assert_eq!(blocks(&written()).unwrap(), [b"one".to_vec(), b"three".to_vec()]);
        let bytes = written().edit("s", |b| b.clone()).unwrap();
        for cut in 0..bytes.len() {
            let disk = written();
            disk.edit("s", |b| b.truncate(cut));
            assert!(blocks(&disk).is_err(), "cut at {cut}");
        }
        // Two bytes behind the version are kept free.
        for bit in (0..bytes.len() * 8).filter(|bit| !(80..96).contains(bit)) {
            let disk = written();
            disk.edit("s", |b| b[bit / 8] ^= 1 << (bit % 8));
            assert!(blocks(&disk).is_err(), "bit {bit}");
        }
        let disk = written();
        disk.edit("s", |b| b.push(0));
        assert!(blocks(&disk).is_err());
    }
}
