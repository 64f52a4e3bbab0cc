//! The log: segments of zero-filled or recycled files that are overwritten, one write and one sync for all that waits.
//!
//! Promises. G1: what `flush` has returned for is found again by `open`, whole and in order, or `open` says that the folder is
//! damaged and where. G2: nothing that a crash cut off or left behind a cut comes back. G3: `open` never goes on behind bytes
//! that it only read: the tail after the last proven sync is copied to a fresh segment and synced there first, because bytes
//! that were read may never have reached the disk. G4: a segment is never shorter than its header and the last word on its growth
//! say, because both are written only when that length is on disk: one that is shorter was cut from outside and is refused.
//! Not promised. A flip in the last batch, before a later record says that it was synced, looks like a torn write and is cut as one.
//! Relies on. One owner of the folder at a time, and `disk.rs`.
//!
//! A segment's header proves that all of the segments before it were synced, because it is only written after that. Within a
//! segment each record says how far it was known to be synced. A bad record is a torn tail unless a later one proves its place.
//! Files are renamed and filled by jobs, ahead of time: on the path of a write there is one write and one sync, never a rename.
//! While the next segment is not ready, the last one grows: first the file, then a record that says so, then what is to be written.

use crate::disk::Disk;
use crate::fault::{Fault, OpenError};
use crate::identity::Identity;
use crate::job::{self, Job, PREPARE_TEMPORARY};
use crate::record::{self, ALIGN, HEADER_BYTES, Header, HeaderError, Kind, Record};
use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, HardState};
use std::collections::{BTreeSet, VecDeque};

/// A log that is no longer than this is copied whole when it is opened, and its old segments go.
const COPY_WHOLE_BYTES: usize = 256 << 10;
/// Where to start reading an old entry from is noted this often.
const MARK_EVERY_BYTES: u32 = 64 << 10;
/// Old segments that wait to be used again. More are removed.
const SPARES_MAX: usize = 2;
/// A segment that must grow grows by multiples of this, or of a first segment, so that it seldom does.
const GROW_BYTES: u64 = 1 << 20;
/// What the record of a growth takes. Each segment keeps so much room at its end, so that the record lies in bytes whose length an earlier
/// word vouches for.
const GROWN_BYTES: u64 = (record::RECORD_HEADER + 8) as u64;

pub(crate) fn segment_file(id: u64) -> String {
    format!("log-{id:016x}")
}

fn spare_file(id: u64) -> String {
    format!("spare-{id:016x}")
}

fn numbered(name: &str, prefix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// Whether a log could have left a file of this name.
pub(crate) fn is_ours(name: &str) -> bool {
    numbered(name, "log-").is_some() || numbered(name, "spare-").is_some() || name == PREPARE_TEMPORARY
}

/// Whether a file of the log holds any record of the folder that its header names.
pub(crate) fn holds_records(disk: &mut dyn Disk, name: &str) -> Result<bool, OpenError> {
    let Some(id) = numbered(name, "log-") else { return Ok(false) };
    let data = read_file(disk, id)?;
    Ok(Header::decode(&data).is_ok_and(|header| {
        header.segment == id && record::record_at(&data, HEADER_BYTES, crc32c::crc32c(&header.storage), id).is_some()
    }))
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) first_segment: u64,
    pub(crate) segment: u64,
}

/// One file of the log.
#[derive(Debug)]
struct Segment {
    id: u64,
    /// The first entry that it or a later one can hold.
    first_index: u64,
    /// Bytes of the file.
    len: u64,
    /// Where its records end.
    end: u32,
    /// Index of the first entry of a record and the place of that record, every so often.
    marks: Vec<(u64, u32)>,
}

/// The log as it stands: where the next record goes and what must be written before it.
pub(crate) struct Log {
    identity: Identity,
    sizes: Sizes,
    /// Oldest first; the last is written.
    segments: VecDeque<Segment>,
    /// How far the last segment is known to be synced.
    synced: u32,
    /// How far the last segment is proven to be synced by what is synced in it.
    proven: u32,
    /// What waits is a synced mark and nothing else.
    marking: bool,
    /// The next segment, ready to be written, and the length of its file.
    prepared: Option<(u64, u64)>,
    preparing: bool,
    spares: BTreeSet<String>,
    next_id: u64,
    life: u64,
    /// Room for a header, then the records that wait to be written.
    pending: Vec<u8>,
    starts: Vec<usize>,
    /// The first entry of each waiting record of entries.
    pending_entries: Vec<(usize, u64)>,
    hard_state: HardState,
    /// The commit index that is written.
    durable_commit: u64,
    conf: (u64, ConfState),
    /// What waits takes the log back to a snapshot before its end.
    resetting: bool,
    /// The last entry that is written, and with what waits.
    last: (u64, u64),
    pending_last: (u64, u64),
    pub(crate) bytes_written: u64,
    pub(crate) syncs: u64,
}

/// What the log held.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    pub(crate) hard_state: HardState,
    pub(crate) conf: (u64, ConfState),
    /// The entry before the first, and its term.
    pub(crate) before: (u64, u64),
    pub(crate) entries: Vec<Entry>,
    /// Where a torn tail was cut.
    pub(crate) torn: Option<(String, u64)>,
}

impl Recovered {
    pub(crate) fn last(&self) -> (u64, u64) {
        self.entries.last().map_or(self.before, |e| (e.index, e.term))
    }

    fn term_of(&self, index: u64) -> u64 {
        if index <= self.before.0 {
            return self.before.1;
        }
        self.entries.get((index - self.before.0 - 1) as usize).map_or(0, |e| e.term)
    }

    fn truncate(&mut self, from: u64) {
        let keep = from.saturating_sub(self.before.0 + 1) as usize;
        self.entries.truncate(keep);
    }

    /// Repeats what writing this record meant. `None`: it does not follow from the ones before.
    fn replay(&mut self, record: &Record) -> Option<()> {
        match record.kind {
            Kind::Entries => {
                let (commit, entries) = record::take_entries(&record.body)?;
                for entry in entries {
                    self.push(entry)?;
                }
                self.hard_state.commit = self.hard_state.commit.max(commit);
            }
            Kind::HardState => {
                let [term, vote, commit] = record::take_numbers(&record.body)?;
                self.hard_state = HardState { term, vote, commit: commit.max(self.hard_state.commit) };
            }
            Kind::Truncate => {
                let [from] = record::take_numbers(&record.body)?;
                self.truncate(from);
            }
            Kind::Compact => {
                let [index, term] = record::take_numbers(&record.body)?;
                self.compact(index, term);
            }
            Kind::ConfState => self.conf = record::take_conf_state(&record.body)?,
            Kind::Synced | Kind::Grown => {}
        }
        Some(())
    }

    fn push(&mut self, entry: Entry) -> Option<()> {
        if entry.index <= self.before.0 {
            // An older version of this segment's past; what counts of it is in the header or follows.
            return Some(());
        }
        if entry.index <= self.last().0 {
            self.truncate(entry.index);
        }
        if entry.index != self.last().0 + 1 {
            return None;
        }
        self.entries.push(entry);
        Some(())
    }

    fn compact(&mut self, index: u64, term: u64) {
        if index <= self.before.0 {
            return;
        }
        let gone = (index - self.before.0).min(self.entries.len() as u64) as usize;
        self.entries.drain(..gone);
        self.before = (index, term);
    }
}

impl Log {
    /// Makes the log of a new folder: one short segment with a header, synced.
    pub(crate) fn create(
        disk: &mut dyn Disk,
        identity: &Identity,
        sizes: Sizes,
        conf: ConfState,
    ) -> Result<Self, OpenError> {
        Self::create_behind(disk, identity, sizes, conf, (0, 0))
    }

    /// The same, behind a snapshot of what is up to entry `before`, index and term, and is committed.
    pub(crate) fn create_behind(
        disk: &mut dyn Disk,
        identity: &Identity,
        sizes: Sizes,
        conf: ConfState,
        before: (u64, u64),
    ) -> Result<Self, OpenError> {
        let mut log = Self::empty(identity.clone(), sizes, 1);
        log.conf = (before.0, conf);
        log.hard_state = HardState { term: before.1, vote: 0, commit: before.0 };
        log.durable_commit = before.0;
        (log.last, log.pending_last) = (before, before);
        log.begin(disk, (0, 0), before, &[])?;
        Ok(log)
    }

    /// Reads the log of an existing folder and makes it fit to be continued. Entries up to `covered` are in a snapshot.
    pub(crate) fn open(
        disk: &mut dyn Disk,
        identity: &Identity,
        sizes: Sizes,
        covered: u64,
    ) -> Result<(Self, Recovered), OpenError> {
        let files = Files::look(disk, identity)?;
        let mut recovered = Recovered::default();
        let mut segments = VecDeque::new();
        let mut tail = Vec::new();
        for (place, (_, header)) in files.chain.iter().enumerate() {
            let closed = files.chain.get(place + 1).map(|(_, next)| next.previous_end);
            if place == 0 {
                recovered.hard_state = header.hard_state.clone();
                recovered.conf = (header.conf_index, header.conf_state.clone());
                recovered.before = (header.first_index.saturating_sub(1), header.before_term);
            }
            let read = read_segment(disk, identity, header, closed, &mut recovered)?;
            segments.push_back(read.segment);
            tail = read.unproven;
        }
        files.check(&recovered, covered)?;
        let mut log = Self::empty(identity.clone(), sizes, files.highest + 1);
        let retired = log.go_on(disk, segments, &tail, &recovered)?;
        log.tidy(disk, files, retired)?;
        Ok((log, recovered))
    }

    fn empty(identity: Identity, sizes: Sizes, next_id: u64) -> Self {
        Self {
            identity,
            sizes,
            segments: VecDeque::new(),
            synced: 0,
            proven: 0,
            marking: false,
            prepared: None,
            preparing: false,
            spares: BTreeSet::new(),
            next_id,
            life: next_id,
            pending: vec![0; HEADER_BYTES],
            starts: Vec::new(),
            pending_entries: Vec::new(),
            hard_state: HardState::default(),
            durable_commit: 0,
            conf: (0, ConfState::default()),
            resetting: false,
            last: (0, 0),
            pending_last: (0, 0),
            bytes_written: 0,
            syncs: 0,
        }
    }

    /// Starts a fresh segment behind what was read, with the tail that is not known to be on disk, or with everything if that is
    /// little. Gives the old segments that are not needed any more.
    fn go_on(
        &mut self,
        disk: &mut dyn Disk,
        segments: VecDeque<Segment>,
        tail: &[Record],
        recovered: &Recovered,
    ) -> Result<Vec<u64>, OpenError> {
        self.hard_state = recovered.hard_state.clone();
        self.durable_commit = recovered.hard_state.commit;
        self.conf = recovered.conf.clone();
        self.last = recovered.last();
        self.pending_last = self.last;
        let bytes: usize = recovered.entries.iter().map(|e| e.data.len() + e.context.len() + 32).sum();
        if bytes <= COPY_WHOLE_BYTES {
            let mut body = Vec::new();
            record::put_entries(&mut body, recovered.hard_state.commit, &recovered.entries);
            let whole = Record { kind: Kind::Entries, synced: 0, body: body.into() };
            let records = if recovered.entries.is_empty() { &[][..] } else { &[whole] };
            self.begin(disk, (0, 0), recovered.before, records)?;
            return Ok(segments.iter().map(|s| s.id).collect());
        }
        let previous = segments.back().map_or((0, 0), |s| (s.id, s.end));
        let first = tail.iter().filter_map(first_entry).min().unwrap_or(self.last.0 + 1).max(recovered.before.0 + 1);
        let before = (first - 1, recovered.term_of(first - 1));
        self.segments = segments;
        self.begin(disk, previous, before, tail)?;
        Ok(Vec::new())
    }

    /// Makes a segment that holds `records`, and only when they are synced the header that makes it count. It gets its name when all its
    /// bytes are on disk, as one that was prepared does: a file of the log is never shorter than it was made.
    fn begin(
        &mut self,
        disk: &mut dyn Disk,
        previous: (u64, u32),
        before: (u64, u64),
        records: &[Record],
    ) -> Result<(), OpenError> {
        let id = self.next_id;
        let file = segment_file(id);
        let io = |doing| {
            let file = file.clone();
            move |error| OpenError::Io { doing, file, error }
        };
        self.next_id += 1;
        for r in records {
            self.put(r.kind, |out| out.extend_from_slice(&r.body));
        }
        self.seal_pending(id, HEADER_BYTES as u32, 0);
        let end = self.pending.len() as u32;
        let len = self.sizes.first_segment.max(u64::from(end) + GROWN_BYTES);
        job::remove_if_there(disk, PREPARE_TEMPORARY).map_err(io("make room for"))?;
        disk.create(PREPARE_TEMPORARY, len).map_err(io("create"))?;
        disk.write(PREPARE_TEMPORARY, HEADER_BYTES as u64, &self.pending[HEADER_BYTES..]).map_err(io("write"))?;
        disk.sync(PREPARE_TEMPORARY).map_err(io("sync"))?;
        disk.rename(PREPARE_TEMPORARY, &file).map_err(io("rename"))?;
        let header = self.header(id, previous, before, len);
        disk.write(&file, 0, &header.encode()).map_err(io("write"))?;
        disk.sync(&file).map_err(io("sync"))?;
        disk.sync_folder().map_err(io("sync the folder of"))?;
        let mut segment = Segment { id, first_index: before.0 + 1, len, end, marks: Vec::new() };
        if let Some(first) = records.iter().find_map(first_entry) {
            segment.marks.push((first, HEADER_BYTES as u32));
        }
        self.segments.push_back(segment);
        self.synced = end;
        self.proven = 0;
        self.clear_pending();
        Ok(())
    }

    fn header(&self, id: u64, previous: (u64, u32), before: (u64, u64), file_bytes: u64) -> Header {
        Header {
            cluster: self.identity.cluster_mark(),
            member: self.identity.member,
            storage: self.identity.storage,
            segment: id,
            previous: previous.0,
            previous_end: previous.1,
            // Not the commit index of what waits: that could be torn while the header is whole.
            hard_state: HardState { commit: self.durable_commit, ..self.hard_state.clone() },
            first_index: before.0 + 1,
            before_term: before.1,
            file_bytes,
            conf_index: self.conf.0,
            conf_state: self.conf.1.clone(),
        }
    }

    /// Brings the folder in order: what a crash or an earlier life left becomes spare or goes.
    fn tidy(&mut self, disk: &mut dyn Disk, files: Files, retired: Vec<u64>) -> Result<(), OpenError> {
        let io = |doing, file: &str| {
            let file = file.to_owned();
            move |error| OpenError::Io { doing, file, error }
        };
        let mut changed = false;
        for id in files.unused.into_iter().chain(retired) {
            let (name, spare) = (segment_file(id), spare_file(id));
            changed = true;
            if self.spares.len() < SPARES_MAX && disk.len(&name).map_err(io("measure", &name))? == self.sizes.segment {
                disk.rename(&name, &spare).map_err(io("rename", &name))?;
                self.spares.insert(spare);
            } else {
                disk.remove(&name).map_err(io("remove", &name))?;
            }
        }
        for spare in files.spares {
            if self.spares.len() < SPARES_MAX && disk.len(&spare).map_err(io("measure", &spare))? == self.sizes.segment
            {
                self.spares.insert(spare);
            } else {
                changed = true;
                disk.remove(&spare).map_err(io("remove", &spare))?;
            }
        }
        if changed {
            disk.sync_folder().map_err(io("sync the folder of", "the log"))?;
        }
        Ok(())
    }

    // What is to be written. Nothing of it counts before `flush` has returned.

    pub(crate) fn entries(&mut self, entries: &[Entry]) {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return };
        let commit = self.hard_state.commit;
        self.pending_entries.push((self.pending.len(), first.index));
        self.put(Kind::Entries, |out| record::put_entries(out, commit, entries));
        self.pending_last = (last.index, last.term);
    }

    pub(crate) fn hard_state(&mut self, hard_state: &HardState) {
        self.hard_state = hard_state.clone();
        self.put(Kind::HardState, |out| {
            record::put_numbers(out, &[hard_state.term, hard_state.vote, hard_state.commit])
        });
    }

    /// The commit index goes with the next record of entries. Until then losing it costs nothing.
    pub(crate) fn commit(&mut self, index: u64) {
        self.hard_state.commit = self.hard_state.commit.max(index);
    }

    pub(crate) fn conf_state(&mut self, index: u64, conf: &ConfState) {
        self.conf = (index, conf.clone());
        self.put(Kind::ConfState, |out| record::put_conf_state(out, index, conf));
    }

    /// A snapshot from elsewhere stands for everything up to `index`; what the log held beyond it does not count any more.
    pub(crate) fn reset(&mut self, index: u64, term: u64, conf: &ConfState) {
        self.put(Kind::Truncate, |out| record::put_numbers(out, &[index + 1]));
        self.compact(index, term);
        self.conf_state(index, conf);
        self.resetting = index < self.last.0;
        self.pending_last = (index, term);
    }

    pub(crate) fn compact(&mut self, index: u64, term: u64) {
        self.put(Kind::Compact, |out| record::put_numbers(out, &[index, term]));
    }

    /// Whether the last batch is on disk without a word there that says so, or something waits for the next batch.
    pub(crate) fn wants_mark(&self) -> bool {
        self.proven < self.synced || !self.starts.is_empty()
    }

    pub(crate) fn synced_mark(&mut self) {
        self.marking = self.starts.is_empty();
        self.put(Kind::Synced, |_| {});
    }

    fn put(&mut self, kind: Kind, body: impl FnOnce(&mut Vec<u8>)) {
        self.marking &= kind == Kind::Synced;
        let start = record::put_record(&mut self.pending, kind, body);
        self.starts.push(start);
    }

    /// Writes and syncs all that waits: one write, one sync. After an error the member must stop: nothing is known of the bytes.
    pub(crate) fn flush(&mut self, disk: &mut dyn Disk) -> Result<bool, Fault> {
        if self.starts.is_empty() {
            return Ok(false);
        }
        let start = match self.rotation() {
            Some(next) => self.rotate(disk, next)?,
            None => self.make_room(disk)?,
        };
        let segment = self.segments.back_mut().expect("a log has a segment from its making on");
        let (id, fresh) = (segment.id, start == 0);
        let first_record = if fresh { HEADER_BYTES as u32 } else { start };
        let proof = self.synced;
        self.seal_pending(id, first_record, proof);
        let bytes = if fresh { &self.pending[..] } else { &self.pending[HEADER_BYTES..] };
        write_synced(disk, &segment_file(id), u64::from(start), bytes)?;
        let written = bytes.len();
        self.count(written);
        let end = start + written as u32;
        self.note_written(first_record, end);
        // A mark alone holds nothing that would have to be proven by another.
        self.proven = if std::mem::take(&mut self.marking) { end } else { proof };
        self.synced = end;
        self.durable_commit = self.hard_state.commit;
        self.last = self.pending_last;
        self.clear_pending();
        Ok(true)
    }

    fn note_written(&mut self, first_record: u32, end: u32) {
        let segment = self.segments.back_mut().expect("a log has a segment from its making on");
        segment.end = end;
        for &(at, index) in &self.pending_entries {
            let offset = first_record + (at - HEADER_BYTES) as u32;
            if segment.marks.last().is_none_or(|&(_, last)| offset - last >= MARK_EVERY_BYTES) {
                segment.marks.push((index, offset));
            }
        }
    }

    fn seal_pending(&mut self, id: u64, first_record: u32, synced: u32) {
        let seed = self.identity.seed();
        for &start in &self.starts {
            let offset = first_record + (start - HEADER_BYTES) as u32;
            record::seal(&mut self.pending[start..], seed, id, offset, synced);
        }
    }

    fn clear_pending(&mut self) {
        self.pending.truncate(HEADER_BYTES);
        // A batch of the largest entries must not stay allocated for ever.
        self.pending.shrink_to(4 << 20);
        self.starts.clear();
        self.pending_entries.clear();
        self.resetting = false;
    }

    /// Whether what waits fits into a file of `len` bytes behind `end`, and the record of a growth behind it.
    fn fits(&self, end: u32, len: u64) -> bool {
        u64::from(end) + (self.pending.len() - HEADER_BYTES) as u64 + GROWN_BYTES <= len
    }

    /// Lets the last segment grow if what waits does not fit, and gives where it goes.
    fn make_room(&mut self, disk: &mut dyn Disk) -> Result<u32, Fault> {
        let Some(&Segment { id, end, len, .. }) = self.segments.back() else { return Ok(0) };
        if self.fits(end, len) {
            return Ok(end);
        }
        let file = segment_file(id);
        let grown = self.lengthen(disk, &file, len, end + GROWN_BYTES as u32)?;
        // Only now, and before anything lies in the new part: whoever finds that must find this record before it.
        let mut word = Vec::new();
        record::put_record(&mut word, Kind::Grown, |out| record::put_numbers(out, &[grown]));
        record::seal(&mut word, self.identity.seed(), id, end, self.synced);
        write_synced(disk, &file, u64::from(end), &word)?;
        self.count(word.len());
        self.proven = self.synced;
        self.synced = end + word.len() as u32;
        let segment = self.segments.back_mut().expect("a log has a segment from its making on");
        segment.end = self.synced;
        segment.len = grown;
        Ok(self.synced)
    }

    /// Fills a file with zeros until what waits fits behind `end`, syncs it, and gives its length.
    fn lengthen(&mut self, disk: &mut dyn Disk, file: &str, len: u64, end: u32) -> Result<u64, Fault> {
        let zeros = vec![0; self.sizes.first_segment.min(GROW_BYTES) as usize];
        let mut at = len;
        while !self.fits(end, at) {
            write_synced(disk, file, at, &zeros)?;
            self.count(zeros.len());
            at += zeros.len() as u64;
        }
        Ok(at)
    }

    fn count(&mut self, bytes: usize) {
        self.bytes_written += bytes as u64;
        self.syncs += 1;
    }

    /// The prepared segment, if what waits belongs there.
    fn rotation(&mut self) -> Option<(u64, u64)> {
        let segment = self.segments.back()?;
        let fits = self.fits(segment.end, segment.len);
        // Entries that replace older ones stay in the segment of those, so that the header can name the entry before.
        let replaces = self.resetting || self.pending_entries.iter().any(|&(_, first)| first <= self.last.0);
        if fits || replaces { None } else { self.prepared.take() }
    }

    /// Goes over to the next segment; its header leaves in the same write as what waits. Everything before is synced already.
    fn rotate(&mut self, disk: &mut dyn Disk, (id, len): (u64, u64)) -> Result<u32, Fault> {
        let previous = self.segments.back().map_or((0, 0), |s| (s.id, s.end));
        let len = self.lengthen(disk, &segment_file(id), len, HEADER_BYTES as u32)?;
        let header = self.header(id, previous, self.last, len).encode();
        self.pending[..HEADER_BYTES].copy_from_slice(&header);
        self.segments.push_back(Segment {
            id,
            first_index: self.last.0 + 1,
            len,
            end: HEADER_BYTES as u32,
            marks: Vec::new(),
        });
        self.synced = 0;
        self.proven = 0;
        Ok(0)
    }

    // What jobs do for it.

    /// The job that gets the next segment ready, when the last is half full and none is.
    pub(crate) fn prepare(&mut self) -> Option<Job> {
        let segment = self.segments.back()?;
        if self.preparing || self.prepared.is_some() || u64::from(segment.end) * 2 < segment.len {
            return None;
        }
        self.preparing = true;
        let id = self.next_id;
        self.next_id += 1;
        Some(Job::PrepareSegment { id, bytes: self.sizes.segment, spare: self.spares.pop_first() })
    }

    /// A failed job is tried again under another number.
    pub(crate) fn prepared(&mut self, id: u64, bytes: u64, done: bool) {
        self.preparing = false;
        if done {
            self.prepared = Some((id, bytes));
        }
    }

    /// The jobs that put away segments of which no entry from `keep_from` on is needed, oldest first.
    pub(crate) fn release(&mut self, keep_from: u64) -> Vec<Job> {
        let mut jobs = Vec::new();
        let mut spares = self.spares.len() + usize::from(self.prepared.is_some());
        while self.segments.get(1).is_some_and(|next| next.first_index <= keep_from) {
            let Some(segment) = self.segments.pop_front() else { break };
            let name = segment_file(segment.id);
            if spares < SPARES_MAX && segment.len == self.sizes.segment {
                spares += 1;
                jobs.push(Job::Retire { name, spare: spare_file(segment.id) });
            } else {
                jobs.push(Job::Remove { name });
            }
        }
        jobs
    }

    pub(crate) fn retired(&mut self, spare: String) {
        self.spares.insert(spare);
    }

    /// Rises with each opening of the folder: every life begins a segment of its own.
    pub(crate) fn life(&self) -> u64 {
        self.life
    }

    pub(crate) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Bytes of the segments that hold records, and of the one that is ready.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.len).sum::<u64>() + self.prepared.map_or(0, |(_, len)| len)
    }

    /// What can be written before a file has to grow.
    pub(crate) fn room(&self) -> u64 {
        let last = self.segments.back().map_or(0, |s| s.len.saturating_sub(u64::from(s.end) + GROWN_BYTES));
        last + self.prepared.map_or(0, |(_, len)| len)
    }

    /// Reads entries from `low` up to and without `high` back, as long as the disk has them in the term that the log says.
    pub(crate) fn read(
        &self,
        disk: &mut dyn Disk,
        low: u64,
        high: u64,
        max_bytes: usize,
        term_of: impl Fn(u64) -> Option<u64>,
    ) -> Result<Vec<Entry>, Fault> {
        let (mut entries, mut bytes) = (Vec::new(), 0);
        for (segment, from) in self.read_places(low) {
            let file = segment_file(segment.id);
            let data = disk.read(&file, 0, segment.end as usize).map_err(|error| Fault::Disk {
                doing: "read",
                file: file.clone(),
                error,
            })?;
            let data = Bytes::from(data);
            let mut at = from as usize;
            while at < segment.end as usize {
                let record =
                    record::record_at(&data, at, self.identity.seed(), segment.id).ok_or_else(|| Fault::Damaged {
                        file: file.clone(),
                        offset: at as u64,
                        why: "a record that was written is not there any more".to_owned(),
                    })?;
                at += record::record_bytes(record.body.len());
                if record.kind != Kind::Entries {
                    continue;
                }
                for e in record::take_entries(&record.body).map_or_else(Vec::new, |(_, entries)| entries) {
                    let next = low + entries.len() as u64;
                    if e.index != next || term_of(next) != Some(e.term) {
                        continue;
                    }
                    bytes += e.data.len();
                    if next >= high || (bytes > max_bytes && !entries.is_empty()) {
                        return Ok(entries);
                    }
                    entries.push(e);
                }
            }
        }
        Ok(entries)
    }

    /// The segments to read, and from where, to find `index`: from the last noted record that begins at or before it.
    fn read_places(&self, index: u64) -> impl Iterator<Item = (&Segment, u32)> {
        let found = self.segments.iter().enumerate().rev().find_map(|(place, s)| {
            let mark = s.marks.iter().rev().find(|&&(first, _)| first <= index)?;
            Some((place, mark.1))
        });
        let (place, offset) = found.unwrap_or((0, HEADER_BYTES as u32));
        let later = self.segments.iter().enumerate().skip(place);
        later.map(move |(p, s)| (s, if p == place { offset } else { HEADER_BYTES as u32 }))
    }
}

fn write_synced(disk: &mut dyn Disk, file: &str, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
    let fault = |doing| move |error| Fault::Disk { doing, file: file.to_owned(), error };
    disk.write(file, offset, bytes).map_err(fault("write"))?;
    disk.sync(file).map_err(fault("sync"))
}

fn first_entry(record: &Record) -> Option<u64> {
    let some = record.kind == Kind::Entries && record.body.len() > 20;
    some.then(|| record::le_u64(&record.body, 8))
}

/// The files of a log, sorted out by their headers.
struct Files {
    /// Oldest first, each the one before the next.
    chain: Vec<(u64, Header)>,
    /// Not part of it, and without anything that counts.
    unused: Vec<u64>,
    spares: Vec<String>,
    highest: u64,
}

impl Files {
    fn look(disk: &mut dyn Disk, identity: &Identity) -> Result<Self, OpenError> {
        let io = |doing, file: &str| {
            let file = file.to_owned();
            move |error| OpenError::Io { doing, file, error }
        };
        let names = disk.list().map_err(io("list", "."))?;
        let mut ids: Vec<u64> = names.iter().filter_map(|n| numbered(n, "log-")).collect();
        ids.sort_unstable();
        let spares: Vec<String> = names.iter().filter(|n| numbered(n, "spare-").is_some()).cloned().collect();
        let highest_spare = spares.iter().filter_map(|n| numbered(n, "spare-")).max().unwrap_or(0);
        let mut headers = Vec::new();
        for &id in &ids {
            let file = segment_file(id);
            let bytes = disk.read(&file, 0, HEADER_BYTES).map_err(io("read", &file))?;
            headers.push((id, read_header(&bytes.into(), id, identity)?));
        }
        let (chain, unused) = chain_of(headers)?;
        let newest = chain.last().map_or(0, |(id, _)| *id);
        for &id in unused.iter().filter(|&&id| id > newest) {
            check_unused(disk, identity, id)?;
        }
        if chain.is_empty() {
            return Err(no_log(ids.last().copied()));
        }
        Ok(Self { chain, unused, spares, highest: ids.last().copied().unwrap_or(0).max(highest_spare) })
    }

    /// What was read must reach from the snapshot to the commit index.
    fn check(&self, recovered: &Recovered, covered: u64) -> Result<(), OpenError> {
        let damaged = |why: String| {
            let file = self.chain.first().map_or_else(String::new, |(id, _)| segment_file(*id));
            Err(OpenError::Damaged { file, offset: 0, why })
        };
        if recovered.before.0 > covered {
            let first = recovered.before.0 + 1;
            return damaged(match covered {
                0 => format!("the log begins at entry {first}, and there is no snapshot of what was before"),
                _ => format!("the log begins at entry {first}, but the snapshot ends at {covered}"),
            });
        }
        let (last, _) = recovered.last();
        if recovered.hard_state.commit > last {
            return damaged(format!(
                "entries up to {} were committed, the log ends at {last}",
                recovered.hard_state.commit
            ));
        }
        Ok(())
    }
}

/// A folder that has an identity has had a log.
fn no_log(newest: Option<u64>) -> OpenError {
    let (file, why) = match newest {
        Some(id) => (
            segment_file(id),
            "the header of this segment is not there any more, and no other segment of the log has one",
        ),
        None => {
            (crate::identity::FILE.to_owned(), "the folder is in use since this file was written, but no log is left")
        }
    };
    OpenError::Damaged { file, offset: 0, why: why.to_owned() }
}

/// `None`: no header of this segment in this folder.
fn read_header(bytes: &Bytes, id: u64, identity: &Identity) -> Result<Option<Header>, OpenError> {
    let file = segment_file(id);
    match Header::decode(bytes) {
        Ok(header) if header.segment != id => Ok(None),
        Ok(header) if header.storage != identity.storage || header.member != identity.member => {
            Err(OpenError::OtherFormat { file, why: "it belongs to the folder of another member".to_owned() })
        }
        Ok(header) => Ok(Some(header)),
        Err(HeaderError::None) => Ok(None),
        Err(HeaderError::Format(found)) => Err(OpenError::OtherFormat {
            file,
            why: format!("format {found}, this release reads format {}", record::FORMAT),
        }),
    }
}

/// The newest segment and, through what each says of the one before, all that it continues.
#[expect(clippy::type_complexity, reason = "two lists of one caller")]
fn chain_of(mut headers: Vec<(u64, Option<Header>)>) -> Result<(Vec<(u64, Header)>, Vec<u64>), OpenError> {
    let mut chain = Vec::new();
    let mut unused = Vec::new();
    let mut wanted = None;
    while let Some((id, header)) = headers.pop() {
        if wanted.is_some_and(|w| w != id) {
            unused.push(id);
            continue;
        }
        match header {
            Some(header) => {
                // Zero is no segment, so a segment that needs none before it makes all others unused.
                wanted = Some(header.previous);
                chain.push((id, header));
            }
            None if wanted.is_none() => unused.push(id),
            None => {
                let why = "the header of this segment is not there, and a later segment continues it".to_owned();
                return Err(OpenError::Damaged { file: segment_file(id), offset: 0, why });
            }
        }
    }
    chain.reverse();
    unused.reverse();
    Ok((chain, unused))
}

/// A segment without a header was never used, or was torn at its first write; or its header was damaged later, which a record
/// in it gives away, or its length: a file has all its bytes before it gets its name.
fn check_unused(disk: &mut dyn Disk, identity: &Identity, id: u64) -> Result<(), OpenError> {
    let data = read_file(disk, id)?;
    if data.len() < HEADER_BYTES {
        return Err(cut_short(id, data.len(), HEADER_BYTES as u64));
    }
    match proof_after(&data, 0, identity, id) {
        0 => Ok(()),
        _ => Err(OpenError::Damaged {
            file: segment_file(id),
            offset: 0,
            why: "the header of this segment was synced and is not there any more".to_owned(),
        }),
    }
}

fn cut_short(id: u64, len: usize, made: u64) -> OpenError {
    let why = format!("the file ends here, and it had at least {made} bytes: it was cut short from outside");
    OpenError::Damaged { file: segment_file(id), offset: len as u64, why }
}

fn read_file(disk: &mut dyn Disk, id: u64) -> Result<Bytes, OpenError> {
    let file = segment_file(id);
    let io = |error| OpenError::Io { doing: "read", file: file.clone(), error };
    let len = disk.len(&file).map_err(io)?;
    Ok(disk.read(&file, 0, len as usize).map_err(io)?.into())
}

/// How far records at or behind `from` say that this segment was synced.
fn proof_after(data: &Bytes, from: usize, identity: &Identity, id: u64) -> u32 {
    let places = (from.next_multiple_of(ALIGN).max(HEADER_BYTES)..data.len()).step_by(ALIGN);
    places.filter_map(|at| record::record_at(data, at, identity.seed(), id)).map(|r| r.synced).max().unwrap_or(0)
}

struct ReadSegment {
    segment: Segment,
    /// The records of which no later one says that they were synced.
    unproven: Vec<Record>,
}

/// Replays one segment. `closed` is where the next one says that it ends; without that it ends at the first bad record.
fn read_segment(
    disk: &mut dyn Disk,
    identity: &Identity,
    header: &Header,
    closed: Option<u32>,
    recovered: &mut Recovered,
) -> Result<ReadSegment, OpenError> {
    let (id, mut file_bytes) = (header.segment, header.file_bytes);
    let data = read_file(disk, id)?;
    let damaged =
        |at: usize, why: &str| OpenError::Damaged { file: segment_file(id), offset: at as u64, why: why.to_owned() };
    let mut at = HEADER_BYTES;
    let mut records: Vec<(usize, Record)> = Vec::new();
    let mut proven = HEADER_BYTES;
    let mut marks: Vec<(u64, u32)> = Vec::new();
    while closed.is_none_or(|end| at < end as usize) {
        let Some(record) = record::record_at(&data, at, identity.seed(), id) else { break };
        recovered.replay(&record).ok_or_else(|| damaged(at, "this record does not follow from the ones before it"))?;
        if let Some(first) = first_entry(&record)
            && marks.last().is_none_or(|&(_, last)| at as u32 - last >= MARK_EVERY_BYTES)
        {
            marks.push((first, at as u32));
        }
        proven = proven.max(record.synced as usize);
        let next = at + record::record_bytes(record.body.len());
        if record.kind == Kind::Grown {
            let [bytes] = record::take_numbers(&record.body).ok_or_else(|| damaged(at, "this growth has no length"))?;
            file_bytes = bytes;
        } else if closed.is_none() {
            // What the file had for a length is not copied into another.
            records.push((at, record));
        }
        at = next;
    }
    match closed {
        Some(end) if at != end as usize => return Err(damaged(at, "a record that was synced is not there any more")),
        Some(_) => {}
        None if (data.len() as u64) < file_bytes => return Err(cut_short(id, data.len(), file_bytes)),
        None => {
            if proof_after(&data, at, identity, id) as usize > at {
                return Err(damaged(at, "a record that was synced, as a later one says, is not there any more"));
            }
            recovered.torn = torn(&data, at, identity.seed(), id).then(|| (segment_file(id), at as u64));
        }
    }
    let unproven: Vec<Record> = records.into_iter().filter(|(at, _)| *at >= proven).map(|(_, r)| r).collect();
    let end = if closed.is_some() { at } else { proven };
    marks.retain(|&(_, offset)| (offset as usize) < end);
    let segment = Segment { id, first_index: header.first_index, len: data.len() as u64, end: end as u32, marks };
    Ok(ReadSegment { segment, unproven })
}

/// Whether something of this life of the file stands where its records end: a write that a crash cut, or a record whose bits have
/// flipped, were it the very bits that name the segment. A whole record of an older life is neither.
fn torn(data: &Bytes, at: usize, seed: u32, id: u64) -> bool {
    let Some(header) = data.get(at..at + record::RECORD_HEADER) else { return false };
    let found = record::le_u64(header, 8);
    let flipped = found != 0 && (found ^ id).count_ones() == 1;
    found == id || (flipped && record::record_at(data, at, seed, found).is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::MemoryDisk;

    const SIZES: Sizes = Sizes { first_segment: 8 << 10, segment: 8 << 10 };

    #[test]
    fn a_flip_in_the_very_bits_that_name_the_segment_is_told_as_torn_too() {
        let header = |id: u64| {
            let mut bytes = vec![0; record::RECORD_HEADER];
            bytes[8..16].copy_from_slice(&id.to_le_bytes());
            Bytes::from(bytes)
        };
        assert!(torn(&header(4), 0, 1, 4) && torn(&header(5), 0, 1, 4) && torn(&header(4 | 1 << 40), 0, 1, 4));
        assert!(!torn(&header(0), 0, 1, 4) && !torn(&header(3), 0, 1, 4));
        let mut older = Vec::new();
        let start = record::put_record(&mut older, Kind::Synced, |_| {});
        record::seal(&mut older[start..], 1, 5, 0, 0);
        assert!(!torn(&Bytes::from(older), 0, 1, 4), "a whole record of an older life of the file");
    }

    fn identity() -> Identity {
        Identity { cluster: "c".to_owned(), member: 1, name: "n".to_owned(), storage: [1; 16] }
    }

    fn entry(index: u64, term: u64, len: usize) -> Entry {
        Entry { index, term, data: vec![index as u8; len].into(), ..Entry::default() }
    }

    fn new_log(disk: &mut MemoryDisk) -> Log {
        Log::create(disk, &identity(), SIZES, ConfState::from((vec![1], vec![]))).unwrap()
    }

    fn write(log: &mut Log, disk: &mut MemoryDisk, entries: &[Entry]) {
        log.entries(entries);
        log.flush(disk).unwrap();
        if let Some(job) = log.prepare() {
            let crate::JobDone::SegmentPrepared { id, bytes, result } = crate::run_job(disk, job) else { panic!() };
            log.prepared(id, bytes, result.is_ok());
        }
    }

    fn terms(recovered: &Recovered) -> Vec<(u64, u64)> {
        recovered.entries.iter().map(|e| (e.index, e.term)).collect()
    }

    #[test]
    fn entries_that_were_replaced_stay_replaced() {
        let mut disk = MemoryDisk::new();
        let mut log = new_log(&mut disk);
        write(&mut log, &mut disk, &[entry(1, 1, 9), entry(2, 1, 9), entry(3, 1, 9)]);
        log.hard_state(&HardState { term: 2, vote: 3, commit: 1 });
        write(&mut log, &mut disk, &[entry(2, 2, 9)]);
        write(&mut log, &mut disk, &[entry(3, 3, 9), entry(4, 3, 9)]);
        for _ in 0..3 {
            let (_, recovered) = Log::open(&mut disk, &identity(), SIZES, 0).unwrap();
            assert_eq!(terms(&recovered), [(1, 1), (2, 2), (3, 3), (4, 3)]);
            assert_eq!(recovered.hard_state, HardState { term: 2, vote: 3, commit: 1 });
            assert_eq!(recovered.conf.1.voters, [1]);
        }
    }

    #[test]
    fn a_long_log_is_continued_behind_a_copy_of_its_unproven_tail() {
        let mut disk = MemoryDisk::new();
        let mut log = new_log(&mut disk);
        for i in 1..=400 {
            write(&mut log, &mut disk, &[entry(i, 1 + i / 100, 1000)]);
        }
        let before = log.segments();
        assert!(before > 40);
        for round in 0..3 {
            let (mut log, recovered) = Log::open(&mut disk, &identity(), SIZES, 0).unwrap();
            let last = 400 + round;
            assert_eq!(terms(&recovered), (1..=last).map(|i| (i, 1 + i.min(400) / 100)).collect::<Vec<_>>());
            write(&mut log, &mut disk, &[entry(last + 1, 5, 1000)]);
            // Old entries are read back from any place, replaced or not.
            for low in [1, 2, 77, 250, 399] {
                let read = log.read(&mut disk, low, low + 3, 1 << 20, |i| Some(1 + i.min(400) / 100)).unwrap();
                assert_eq!(
                    read.iter().map(|e| e.index).collect::<Vec<_>>(),
                    (low..(low + 3).min(last + 2)).collect::<Vec<_>>()
                );
            }
        }
    }

    /// A log whose newest segment has grown, in the last of its writes if `at_once`.
    fn grown(at_once: bool) -> (MemoryDisk, String, u64) {
        let mut disk = MemoryDisk::new();
        let mut log = new_log(&mut disk);
        let count = if at_once { 1 } else { 40 };
        for i in 1..=count {
            // No job has prepared a segment in time.
            log.entries(&[entry(i, 1, 40_000 / count as usize)]);
            log.flush(&mut disk).unwrap();
        }
        assert_eq!(log.segments(), 1);
        (disk, segment_file(1), count)
    }

    #[test]
    fn a_segment_that_grew_is_read_back_whole_and_refused_wherever_it_was_cut() {
        for at_once in [false, true] {
            let (disk, file, count) = grown(at_once);
            let (_, recovered) = Log::open(&mut disk.copy(), &identity(), SIZES, 0).unwrap();
            assert_eq!(recovered.last(), (count, 1));
            let len = disk.edit(&file, |b| b.len()).unwrap();
            for cut in (0..len).step_by(997).chain([4095, 4096, 8191, 8192, len - 1]) {
                let mut disk = disk.copy();
                disk.edit(&file, |b| b.truncate(cut)).unwrap();
                let before = disk.edit(&file, |b| b.clone()).unwrap();
                match Log::open(&mut disk, &identity(), SIZES, 0) {
                    Err(OpenError::Damaged { file: f, offset, .. }) => {
                        assert_eq!((f, offset), (file.clone(), cut as u64));
                    }
                    other => panic!("cut at {cut}: {:?}", other.map(|(_, r)| r)),
                }
                assert!(disk.edit(&file, |b| *b == before).unwrap(), "what is refused is left alone");
            }
        }
    }

    #[test]
    fn a_second_segment_cut_to_nothing_is_refused_and_one_that_was_never_used_is_not() {
        let mut disk = MemoryDisk::new();
        let mut log = new_log(&mut disk);
        let mut i = 0;
        while log.segments() < 2 {
            i += 1;
            write(&mut log, &mut disk, &[entry(i, 1, 1000)]);
        }
        for cut in [0, 100, 4095, 4096, 8191] {
            let mut disk = disk.copy();
            disk.edit(&segment_file(2), |b| b.truncate(cut)).unwrap();
            let error = Log::open(&mut disk, &identity(), SIZES, 0).err().unwrap().to_string();
            assert!(error.contains(&format!("{} at byte {cut}", segment_file(2))), "{error}");
        }
        // A segment that a job prepared and nothing was written to, or whose first write was torn before its header.
        disk.edit(&segment_file(2), |b| b[..HEADER_BYTES].fill(0)).unwrap();
        let (_, recovered) = Log::open(&mut disk, &identity(), SIZES, 0).unwrap();
        assert_eq!(recovered.last().0, i - 1);
    }

    #[test]
    fn a_crash_at_any_step_of_a_growth_loses_nothing() {
        for steps in 0..4 {
            let mut disk = MemoryDisk::new();
            let mut log = new_log(&mut disk);
            write(&mut log, &mut disk, &[entry(1, 1, 100)]);
            log.entries(&[entry(2, 1, 6_000)]);
            // The file, the word of it, the batch.
            let done = match steps {
                0 => log.lengthen(&mut disk, &segment_file(1), SIZES.first_segment, 4_300).map(|_| true),
                1 => log.make_room(&mut disk).map(|_| true),
                2 => {
                    log.make_room(&mut disk).unwrap();
                    disk.fail_syncs(true);
                    log.flush(&mut disk)
                }
                _ => log.flush(&mut disk),
            };
            disk.crash();
            disk.fail_syncs(false);
            assert_eq!(done.is_ok(), steps != 2);
            for _ in 0..2 {
                let (_, recovered) = Log::open(&mut disk, &identity(), SIZES, 0).unwrap();
                assert_eq!(recovered.last().0, if steps == 3 { 2 } else { 1 });
            }
        }
    }

    #[test]
    fn only_what_no_snapshot_covers_is_kept() {
        let mut disk = MemoryDisk::new();
        let mut log = new_log(&mut disk);
        for i in 1..=400 {
            write(&mut log, &mut disk, &[entry(i, 1, 1000)]);
        }
        log.compact(200, 1);
        log.flush(&mut disk).unwrap();
        let jobs = log.release(201);
        assert!(jobs.len() > 10);
        // A crash may come between any two of the jobs.
        for job in jobs {
            crate::run_job(&mut disk, job);
            let (_, recovered) = Log::open(&mut disk.copy(), &identity(), SIZES, 200).unwrap();
            assert_eq!((recovered.before, recovered.last()), ((200, 1), (400, 1)));
        }
        let error = Log::open(&mut disk, &identity(), SIZES, 150).err().unwrap();
        assert!(error.to_string().contains("the log begins at entry 201, but the snapshot ends at 150"), "{error}");
    }
}
