//! Snapshots: the whole state at one index, written in slices while apply goes on, and read back.
//!
//! Promises. Z1: the blocks hold the state at the index at which the snapshot began. Z2: a machine that loads them answers every
//! later entry as one that applied them all, to the checksum. Z3: equal states give equal blocks for equal block sizes.
//! Z4: the loader refuses what is cut, reordered, repeated or altered, and never panics.
//! Not promised. Framing on disk and its checksums: those are the `replica` crate's.
//!
//! A block is: format version, section, payload. The sections come in the order of `Section`; each fills as many blocks as it
//! needs and none if it is empty: a state from before there was a table of members has no block of them. The last block has the number of blocks and a checksum over all others.

use crate::apply::{Machine, Position};
use crate::codec::{self, DecodeError, Reader, Write};
use crate::command::Limit;
use crate::history::{Marks, Ring, Sums};
use crate::keys::{Keys, SnapshotMark};
use crate::locks::LockKey;
use crate::members::Members;
use crate::record::Record;
use crate::reply::Change;
use crate::types::*;
use crate::{locks, objects, requests, sessions, waits};

/// The format version of a block.
const BLOCK_FORMAT: u8 = 1;
/// Entries taken from a table at a time; a slice ends when it has its bytes.
const ENTRIES_AT_ONCE: usize = 32;

/// What a block holds. The numbers are stored and never change; they are not the order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Section {
    Header = 1,
    Keys = 2,
    Sessions = 3,
    Locks = 4,
    Waiters = 5,
    OneShot = 6,
    Numbered = 7,
    Acked = 8,
    Ring = 9,
    Marks = 10,
    End = 11,
    Members = 12,
    Objects = 13,
    Series = 14,
    InSeries = 15,
}

impl Section {
    /// In the order in which they are written.
    const ALL: [Self; 15] = [
        Self::Header,
        Self::Keys,
        Self::Sessions,
        Self::Locks,
        Self::Waiters,
        Self::Objects,
        Self::OneShot,
        Self::Numbered,
        Self::Acked,
        Self::Series,
        Self::InSeries,
        Self::Ring,
        Self::Marks,
        Self::Members,
        Self::End,
    ];

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let number = r.byte("a section")?;
        let found = Self::ALL.into_iter().find(|s| *s as u8 == number);
        found.ok_or(DecodeError::UnknownNumber { what: "section", number: u64::from(number) })
    }

    fn place(self) -> usize {
        Self::ALL.iter().position(|s| *s == self).unwrap_or(Self::ALL.len())
    }

    fn next(self) -> Self {
        Self::ALL.get(self.place() + 1).copied().unwrap_or(Self::End)
    }

    /// Written whole in one block.
    fn is_single(self) -> bool {
        matches!(self, Self::Header | Self::Members | Self::End)
    }
}

/// A snapshot that is being written.
pub(crate) struct Running {
    section: Section,
    at: Revision,
    cursor: Option<SnapshotMark>,
    header: Vec<u8>,
    ring: Vec<Change>,
    ring_done: usize,
    marks: Vec<u8>,
    members: Vec<u8>,
    blocks: u64,
    sum: u64,
}

impl Machine {
    /// Starts a snapshot of the state as it is now; entries can be applied between its slices. One at a time.
    pub fn snapshot_begin(&mut self) -> Position {
        assert!(self.snapshot.is_none(), "one snapshot at a time");
        self.keys.pin(self.revision);
        self.sessions.table.begin();
        self.locks.held.begin();
        self.waits.table.begin();
        self.objects.table.begin();
        self.requests.one_shot.begin();
        self.requests.numbered.begin();
        self.requests.acked.begin();
        self.requests.series.begin();
        self.requests.in_series.begin();
        let mut marks = Vec::new();
        for (stamp, revision) in self.marks.all() {
            marks.varint(stamp.0);
            marks.varint(revision.0);
        }
        self.snapshot = Some(Running {
            section: Section::Header,
            at: self.revision,
            cursor: None,
            header: self.header(),
            ring: self.ring.all().iter().cloned().collect(),
            ring_done: 0,
            marks,
            members: self.members.section(),
            blocks: 0,
            sum: 0,
        });
        self.position
    }

    /// The next block, of about `max_bytes`. `None`: the snapshot is complete, and over.
    pub fn snapshot_next(&mut self, max_bytes: usize) -> Option<Vec<u8>> {
        let mut running = self.snapshot.take()?;
        loop {
            let section = running.section;
            let mut block = vec![BLOCK_FORMAT, section as u8];
            let more = self.write_section(&mut running, &mut block, max_bytes);
            if !more {
                running.section = section.next();
            }
            if section == Section::End {
                // The slot stays empty: the next call says that this was the last block.
                self.keys.unpin();
                return Some(block);
            }
            if block.len() > 2 {
                running.blocks += 1;
                running.sum = codec::fold(running.sum, &block);
                self.snapshot = Some(running);
                return Some(block);
            }
        }
    }

    /// Gives a running snapshot up.
    pub fn snapshot_abort(&mut self) {
        if self.snapshot.take().is_some() {
            self.keys.unpin();
            self.sessions.table.abort();
            self.locks.held.abort();
            self.waits.table.abort();
            self.objects.table.abort();
            self.requests.one_shot.abort();
            self.requests.numbered.abort();
            self.requests.acked.abort();
            self.requests.series.abort();
            self.requests.in_series.abort();
        }
    }

    fn header(&self) -> Vec<u8> {
        let mut b = Vec::new();
        b.varint(self.position.index.0);
        b.varint(self.position.term.0);
        b.varint(self.revision.0);
        b.varint(self.stamp.0);
        b.varint(u64::from(self.behaviour));
        b.extend_from_slice(&self.cluster.to_le_bytes());
        b.extend_from_slice(&self.issuer);
        b.extend_from_slice(&self.sums.now().to_le_bytes());
        b.varint(self.keys.compacted().0);
        b.signed(self.compact_floor);
        b.varint(self.waits.next);
        b.varint(self.requests.next_order);
        b.varint(self.ring.floor().0);
        b.varint(self.limits.len() as u64);
        for (limit, value) in Limit::ALL.into_iter().zip(self.limits) {
            b.push(limit as u8);
            b.varint(value);
        }
        b
    }

    /// Writes what is next of the running section; true while it has more.
    fn write_section(&mut self, running: &mut Running, b: &mut Vec<u8>, max_bytes: usize) -> bool {
        match running.section {
            Section::Header => {
                b.append(&mut running.header);
                false
            }
            Section::Keys => self.keys.snapshot_slice(&mut running.cursor, running.at, max_bytes, b),
            Section::Sessions => write_entries(
                b,
                max_bytes,
                |n| self.sessions.table.next_slice(n),
                |b, (_, session)| sessions::write(b, session),
            ),
            Section::Locks => write_entries(
                b,
                max_bytes,
                |n| self.locks.held.next_slice(n),
                |b, (key, lock)| locks::write_lock(b, key, lock),
            ),
            Section::Waiters => write_entries(
                b,
                max_bytes,
                |n| self.waits.table.next_slice(n),
                |b, (number, waiter)| waits::write(b, *number, waiter),
            ),
            Section::Objects => write_entries(
                b,
                max_bytes,
                |n| self.objects.table.next_slice(n),
                |b, (key, object)| objects::write(b, key, object),
            ),
            Section::OneShot => write_entries(
                b,
                max_bytes,
                |n| self.requests.one_shot.next_slice(n),
                |b, ((principal, uuid), remembered)| {
                    b.bytes(principal.as_bytes());
                    b.extend_from_slice(uuid);
                    requests::write(b, remembered);
                },
            ),
            Section::Numbered => write_entries(
                b,
                max_bytes,
                |n| self.requests.numbered.next_slice(n),
                |b, ((session, seq), remembered)| {
                    b.varint(session.0);
                    b.varint(*seq);
                    requests::write(b, remembered);
                },
            ),
            Section::Acked => write_entries(
                b,
                max_bytes,
                |n| self.requests.acked.next_slice(n),
                |b, (session, below)| {
                    b.varint(session.0);
                    b.varint(*below);
                },
            ),
            Section::Series => write_entries(
                b,
                max_bytes,
                |n| self.requests.series.next_slice(n),
                |b, (id, series)| requests::write_series(b, id, series),
            ),
            Section::InSeries => write_entries(
                b,
                max_bytes,
                |n| self.requests.in_series.next_slice(n),
                |b, ((series, seq), remembered)| {
                    b.varint(*series);
                    b.varint(*seq);
                    requests::write(b, remembered);
                },
            ),
            Section::Ring => running.write_ring(b, max_bytes),
            Section::Marks => {
                b.append(&mut running.marks);
                false
            }
            Section::Members => {
                b.append(&mut running.members);
                false
            }
            Section::End => {
                b.varint(running.blocks);
                b.extend_from_slice(&running.sum.to_le_bytes());
                false
            }
        }
    }
}

impl Running {
    fn write_ring(&mut self, b: &mut Vec<u8>, max_bytes: usize) -> bool {
        let empty = b.len();
        for change in &self.ring[self.ring_done..] {
            // At least one, or a block of the smallest size would never be filled.
            if b.len() > empty && b.len() >= max_bytes {
                return true;
            }
            codec::write_record(b, &change.record);
            b.option(change.before.as_ref(), codec::write_record);
            self.ring_done += 1;
        }
        false
    }
}

fn write_entries<T>(
    b: &mut Vec<u8>,
    max_bytes: usize,
    mut next: impl FnMut(usize) -> Vec<T>,
    write: impl Fn(&mut Vec<u8>, &T),
) -> bool {
    loop {
        let entries = next(ENTRIES_AT_ONCE);
        entries.iter().for_each(|entry| write(b, entry));
        if entries.len() < ENTRIES_AT_ONCE {
            return false;
        }
        if b.len() >= max_bytes {
            return true;
        }
    }
}

/// Builds a machine from the blocks of a snapshot.
pub struct Loader {
    machine: Machine,
    section: Option<Section>,
    compacted: Revision,
    ring_floor: Revision,
    records: Vec<Record>,
    ring: Vec<Change>,
    marks: Vec<(LogTime, Revision)>,
    blocks: u64,
    sum: u64,
}

impl Default for Loader {
    fn default() -> Self {
        Self::new()
    }
}

impl Loader {
    /// A loader that has seen no block yet.
    pub fn new() -> Self {
        Self {
            machine: Machine::new(),
            section: None,
            compacted: Revision(0),
            ring_floor: Revision(0),
            records: Vec::new(),
            ring: Vec::new(),
            marks: Vec::new(),
            blocks: 0,
            sum: 0,
        }
    }

    /// Takes the next block.
    pub fn push(&mut self, block: &[u8]) -> Result<(), DecodeError> {
        let mut r = Reader::new(block);
        let format = r.byte("a block")?;
        if format != BLOCK_FORMAT {
            return Err(DecodeError::UnknownFormat { what: "a block", format });
        }
        let section = Section::read(&mut r)?;
        self.check_order(section)?;
        self.section = Some(section);
        if section == Section::End {
            return self.check_end(&mut r);
        }
        self.blocks += 1;
        self.sum = codec::fold(self.sum, block);
        if section == Section::Header {
            self.read_header(&mut r)?;
            return r.finish("a header");
        }
        while !r.is_empty() {
            self.read_entry(section, &mut r)?;
        }
        Ok(())
    }

    /// The machine, when all blocks have been taken.
    pub fn finish(self) -> Result<Machine, DecodeError> {
        if self.section != Some(Section::End) {
            return Err(DecodeError::Truncated { what: "a snapshot" });
        }
        let mut m = self.machine;
        m.keys = Keys::load(self.records.into_iter(), self.compacted)
            .ok_or(DecodeError::Malformed { what: "the keys of a snapshot" })?;
        m.ring = Ring::load(self.ring, self.ring_floor);
        m.busy_ring = Ring::busy(m.revision.next());
        m.marks = Marks::load(self.marks);
        m.requests.finish_load();
        attach_keys(&mut m)?;
        check_links(&m)?;
        Ok(m)
    }

    fn check_order(&self, section: Section) -> Result<(), DecodeError> {
        let in_order = match self.section {
            None => section == Section::Header,
            Some(last) => section.place() > last.place() || (section == last && !section.is_single()),
        };
        if in_order { Ok(()) } else { Err(DecodeError::Malformed { what: "the next block of this snapshot" }) }
    }

    fn check_end(&self, r: &mut Reader<'_>) -> Result<(), DecodeError> {
        let blocks = r.varint("an end")?;
        let sum = r.u64_fixed("an end")?;
        r.finish("an end")?;
        if blocks != self.blocks || sum != self.sum {
            return Err(DecodeError::ChecksumDiffers { what: "a snapshot" });
        }
        Ok(())
    }

    fn read_header(&mut self, r: &mut Reader<'_>) -> Result<(), DecodeError> {
        const WHAT: &str = "a header";
        let m = &mut self.machine;
        m.position = Position { index: Index(r.varint(WHAT)?), term: Term(r.varint(WHAT)?) };
        m.revision = Revision(r.varint(WHAT)?);
        m.stamp = LogTime(r.varint(WHAT)?);
        let behaviour = r.varint(WHAT)?;
        m.behaviour = u16::try_from(behaviour)
            .ok()
            .filter(|b| *b <= crate::apply::BEHAVIOUR)
            .ok_or(DecodeError::UnknownNumber { what: "behaviour version", number: behaviour })?;
        m.cluster = r.u64_fixed(WHAT)?;
        m.issuer = r.array(WHAT)?;
        m.sums = Sums::new(m.position.index, r.u64_fixed(WHAT)?);
        self.compacted = Revision(r.varint(WHAT)?);
        m.compact_floor = r.signed(WHAT)?;
        m.waits.next = r.varint(WHAT)?;
        m.requests.next_order = r.varint(WHAT)?;
        self.ring_floor = Revision(r.varint(WHAT)?);
        for _ in 0..r.varint(WHAT)? {
            let limit = codec::read_limit(r)?;
            m.limits[limit as usize - 1] = r.varint(WHAT)?;
        }
        if self.compacted > m.revision {
            return Err(DecodeError::Malformed { what: WHAT });
        }
        Ok(())
    }

    fn read_entry(&mut self, section: Section, r: &mut Reader<'_>) -> Result<(), DecodeError> {
        let m = &mut self.machine;
        match section {
            Section::Keys => self.records.push(codec::read_record(r)?),
            Section::Sessions => {
                let session = sessions::read(r)?;
                let id = session.facts.create.id;
                once(m.sessions.set(id, Some(session)).is_none(), "a session")?;
            }
            Section::Locks => {
                let (key, lock) = locks::read_lock(r)?;
                once(m.locks.set_lock(&key, Some(lock)).is_none(), "a lock")?;
            }
            Section::Waiters => {
                let (number, waiter) = waits::read(r)?;
                once(number < m.waits.next && m.waits.set(number, Some(waiter)).is_none(), "a waiter")?;
            }
            Section::Objects => {
                let (key, object) = objects::read(r)?;
                once(m.objects.set(&key, Some(object)).is_none(), "an object")?;
            }
            Section::OneShot => {
                let id = (r.text("a principal")?, r.array("a request id")?);
                m.requests.load_one_shot(id, requests::read(r)?);
            }
            Section::Numbered => {
                let id = (SessionId(r.varint("a request id")?), r.varint("a request id")?);
                m.requests.load_numbered(id, requests::read(r)?);
            }
            Section::Acked => m.requests.load_acked(SessionId(r.varint("a session")?), r.varint("a number")?),
            Section::Series => {
                let (id, series) = requests::read_series(r)?;
                m.requests.load_series(id, series);
            }
            Section::InSeries => {
                let at = (r.varint("a request id")?, r.varint("a request id")?);
                m.requests.load_in_series(at, requests::read(r)?);
            }
            Section::Ring => {
                let record = codec::read_record(r)?;
                let before = r.option("a change", codec::read_record)?;
                self.ring.push(Change { record, before });
            }
            Section::Members => m.members = Members::load(r)?,
            Section::Marks => self.marks.push((LogTime(r.varint("a mark")?), Revision(r.varint("a mark")?))),
            Section::Header | Section::End => {}
        }
        Ok(())
    }
}

fn once(new: bool, what: &'static str) -> Result<(), DecodeError> {
    if new { Ok(()) } else { Err(DecodeError::Malformed { what }) }
}

/// Rebuilds which session owns which key.
fn attach_keys(m: &mut Machine) -> Result<(), DecodeError> {
    let everything = Span { start: Key::from_bytes(b""), end: Some(Key::from_bytes(&[u8::MAX])) };
    for record in m.keys.live(&everything) {
        let meta = record.meta();
        if meta.mod_revision > m.revision {
            return Err(DecodeError::Malformed { what: "a key of this snapshot" });
        }
        if meta.owner != SessionId(0) {
            once(m.sessions.get(meta.owner).is_some(), "a key of a live session")?;
            m.sessions.attach(meta.owner, record.key());
        }
    }
    Ok(())
}

/// What one table says of another must be there.
fn check_links(m: &Machine) -> Result<(), DecodeError> {
    for (_, lock) in m.locks.held.iter() {
        once(lock.holders().all(|holder| m.sessions.get(holder.session).is_some()), "a lock of a live session")?;
    }
    for (_, waiter) in m.waits.table.iter() {
        let lock = waiter.only().and_then(LockKey::of_object);
        // A free lock has waiters only behind one that waits for others as well.
        let held = m.waits.any_of_several() || lock.is_none_or(|lock| m.locks.get(&lock).is_some());
        let lives = waiter.session == SessionId(0) || m.sessions.get(waiter.session).is_some();
        once(held && lives, "a waiter of a live session at a held lock")?;
    }
    let one_shot = m.requests.one_shot.iter().filter_map(|(_, r)| r.waiter());
    let numbered = m.requests.numbered.iter().filter_map(|(_, r)| r.waiter());
    let series = m.requests.in_series.iter().filter_map(|(_, r)| r.waiter());
    for number in one_shot.chain(numbered).chain(series) {
        once(m.waits.get(number).is_some(), "a request of a waiter")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::*;
    use crate::reply::Applied;

    /// The simulator's list 26 hung here: the ring put nothing into a block that its head alone had filled.
    #[test]
    fn blocks_of_the_smallest_size_come_to_an_end() {
        let mut machine = Machine::new();
        let create = SessionCreate {
            id: SessionId(1),
            face: SessionFace::Native,
            ttl_ms: 1000,
            on_expire: OnExpire::Delete,
            name: "n".into(),
            metadata: Vec::new(),
            alias: None,
            secret: None,
        };
        let txns = vec![Txn::of(Op::SessionCreate(create))];
        let batch = Batch { behaviour: 1, stamp: LogTime(1), origin: Origin::default(), txns };
        let at = Position { index: Index(1), term: Term(1) };
        machine.apply(at, batch, &mut Applied::default()).unwrap();
        machine.snapshot_begin();
        let mut loader = Loader::new();
        for _ in 0..1000 {
            match machine.snapshot_next(1) {
                Some(block) => loader.push(&block).unwrap(),
                None => {
                    assert_eq!(loader.finish().unwrap().checksum(), machine.checksum());
                    return;
                }
            }
        }
        panic!("the snapshot does not end");
    }
}
