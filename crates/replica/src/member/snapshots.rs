//! Snapshots of a member: its own, those that it gives to others, and the one that it takes.
//!
//! Promises. T1: a snapshot counts only when all of it is on disk and every byte was checked. T2: what is taken is fetched in pieces that
//! the receiver asks for, from where it stopped if a connection breaks, at a bounded rate, over a connection of its own. T3: a file that
//! is being fetched is not removed, nor the log behind it. T4: a crash at any step of taking one leaves the old state or the new one.
//! Not promised. That a fetch goes on where it was after a restart of the receiver: it begins anew.
//!
//! To take one: the leader's message has the entry and the length, and no more. The receiver holds the message back, fetches, checks and
//! loads; then the library gets the message, the log is taken to that entry in one synced write, and the file gets its name.

use super::*;
use crate::peer::PeerMessage;
use crate::store::Offer;

/// A snapshot that was fetched whole, and is not yet what the log goes on from.
pub(super) const TAKEN_PREFIX: &str = "taken-";
pub(super) const INCOMING: &str = "incoming.tmp";
const PIECE_BYTES: u64 = 256 << 10;
/// Pieces that are asked for ahead.
const PIECES_AHEAD: u64 = 8;
/// A piece that has not come after this long is asked for again.
const PIECE_MS: u64 = 1_000;
/// A file is kept for a receiver that was heard of within this time.
const FETCH_MS: u64 = 30_000;
/// What may be sent to all receivers together.
const BYTES_PER_MS: u64 = 64 << 10;
const BURST_BYTES: u64 = 4 << 20;

pub(super) fn taken_file(index: u64) -> String {
    format!("{TAKEN_PREFIX}{index:016x}")
}

pub(super) fn taken_index(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(TAKEN_PREFIX)?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// What is being fetched.
pub(super) struct Incoming {
    pub(super) from: MemberId,
    /// Held back until the file is here.
    message: Message,
    index: u64,
    bytes: u64,
    /// How far the file is here, is on its way to disk, and is asked for.
    received: u64,
    jobs: usize,
    asked: u64,
    asked_at: u64,
    /// Tells its jobs from those of an earlier fetch.
    number: u64,
    state: Taking,
}

impl Incoming {
    pub(super) fn progress(&self) -> (u64, u64) {
        (self.received, self.bytes)
    }
}

enum Taking {
    Fetching,
    Loading,
    Loaded(Box<(snapshot::Meta, Machine)>),
    /// The library has the message.
    Handed(Box<(snapshot::Meta, Machine)>),
}

/// What others fetch from here.
#[derive(Default)]
pub(super) struct Outgoing {
    /// By index: when a piece was last asked for.
    fetched: BTreeMap<u64, u64>,
    /// Pieces that wait for their turn: to whom, of which snapshot, from where, how much.
    queue: VecDeque<(MemberId, u64, u64, u64)>,
    allowance: u64,
    filled_at: u64,
}

/// Pieces that may wait to be sent.
const QUEUE_MAX: usize = 64;

impl<D: Disk> Member<D> {
    // Its own.

    pub(super) fn start_snapshot(&mut self) {
        // Wanted by a member that cannot be helped with what is there.
        self.snapshots.wanted |= self.raft.store().take_wants_snapshot();
        let due = self.snapshots.wanted
            || self.snapshots.log_bytes >= self.config.snapshot_log_bytes
            || self.log.segments() > SEGMENTS_MAX;
        let newest = self.snapshots.files.last().map_or(0, |f| f.0);
        // A full disk is when a snapshot is wanted most, because it lets log go; but it must fit.
        let fits = || self.room.free() >= self.machine.memory().used.saturating_add(4 << 20);
        if !due || self.snapshots.writing.is_some() || self.machine.position().index.0 <= newest || !fits() {
            return;
        }
        self.snapshots.wanted = false;
        let position = self.machine.snapshot_begin();
        let conf = (position.index.0, self.raft.store().conf_state.clone());
        let meta =
            snapshot::Meta { cluster: self.machine.cluster(), index: position.index.0, term: position.term.0, conf };
        self.snapshots.number += 1;
        self.snapshots.writing = Some(Writing {
            number: self.snapshots.number,
            writer: snapshot::Writer::new(meta),
            jobs: 0,
            synced_to: 0,
            complete: false,
            log_bytes: std::mem::take(&mut self.snapshots.log_bytes),
        });
    }

    /// A few blocks a poll, and only so many ahead of the worker. The last piece, which gives the file its name, goes when all others
    /// are known to be written.
    pub(super) fn write_snapshot(&mut self, out: &mut Effects) {
        let Some(writing) = &mut self.snapshots.writing else { return };
        let (file, number) = (snapshot::TEMPORARY, writing.number);
        let mut blocks = 0;
        while !writing.complete && writing.jobs < SNAPSHOT_JOBS_MAX && blocks < SNAPSHOT_BLOCKS_PER_POLL {
            let Some(block) = self.machine.snapshot_next(snapshot::BLOCK_BYTES) else {
                writing.complete = true;
                break;
            };
            let (offset, bytes) = match writing.writer.block(&block) {
                Ok(piece) => piece,
                Err(len) => {
                    self.give_up_snapshot();
                    let why = format!("the state has a part of {len} bytes, more than a snapshot holds");
                    return self.job_failed(SNAPSHOT_JOB, why);
                }
            };
            // A sync now and then, so that the last one has little left and the log's own syncs do not queue behind it.
            let sync = writing.writer.offset() - writing.synced_to >= SNAPSHOT_SYNC_BYTES;
            if sync {
                writing.synced_to = writing.writer.offset();
            }
            writing.jobs += 1;
            blocks += 1;
            out.jobs.push(Job::WriteSnapshot { number, file: file.to_owned(), offset, bytes, sync });
        }
        if writing.complete && writing.jobs == 0 {
            let (offset, bytes) = writing.writer.trailer();
            // Counted, so that it is given out once.
            writing.jobs = SNAPSHOT_JOBS_MAX;
            let name = snapshot::file(writing.writer.meta().index);
            out.jobs.push(Job::FinishSnapshot { number, file: file.to_owned(), offset, bytes, name });
        }
    }

    pub(super) fn snapshot_written(&mut self, number: u64, done: bool) {
        let Some(writing) = self.snapshots.writing.as_mut().filter(|w| w.number == number) else { return };
        writing.jobs -= 1;
        if !done {
            self.give_up_snapshot();
        }
    }

    /// The file is begun anew, never gone on with: after a failed write or sync nothing is known of its bytes.
    pub(super) fn give_up_snapshot(&mut self) {
        if let Some(writing) = self.snapshots.writing.take() {
            self.machine.snapshot_abort();
            self.snapshots.log_bytes += writing.log_bytes;
        }
    }

    pub(super) fn snapshot_finished(&mut self, number: u64, name: &str, bytes: u64, done: bool) {
        if self.snapshots.writing.as_ref().is_none_or(|w| w.number != number) {
            return;
        }
        if !done {
            return self.give_up_snapshot();
        }
        let Some(writing) = self.snapshots.writing.take() else { return };
        self.alarms.retain(|a| !matches!(a, Alarm::SnapshotDamaged { .. }));
        self.snapshots.damaged.retain(|d| d != name);
        let meta = writing.writer.meta().clone();
        self.snapshots.files.push((meta.index, bytes));
        self.raft.mut_store().newest = Some(Offer { meta, bytes });
    }

    /// Has one written soon. Gives the index that the newest one will have at least.
    pub fn want_snapshot(&mut self) -> u64 {
        let applied = self.machine.position().index.0;
        self.snapshots.wanted |= self.snapshots.files.last().is_none_or(|f| f.0 < applied);
        applied
    }

    /// Two snapshots stay, and the log since the older of them; more only while somebody fetches one.
    pub(super) fn let_go(&mut self, out: &mut Effects) {
        if self.snapshots.files.len() >= SNAPSHOTS_KEPT {
            let damaged = std::mem::take(&mut self.snapshots.damaged);
            out.jobs.extend(damaged.into_iter().map(|name| Job::Remove { name }));
        }
        while self.snapshots.files.len() > SNAPSHOTS_KEPT {
            let index = self.snapshots.files[0].0;
            if self.is_fetched(index) {
                break;
            }
            self.snapshots.files.remove(0);
            out.jobs.push(Job::Remove { name: snapshot::file(index) });
        }
        let Some(&(older, _)) = self.snapshots.files.first().filter(|_| self.snapshots.files.len() >= SNAPSHOTS_KEPT)
        else {
            return;
        };
        if older < self.raft.store().first_index() {
            return;
        }
        let Some(term) = self.raft.store().term_of(older) else { return };
        self.raft.mut_store().compact(older);
        self.log.compact(older, term);
        out.jobs.extend(self.log.release(older + 1));
    }

    // Those that others fetch.

    fn is_fetched(&self, index: u64) -> bool {
        let now = self.clock.elapsed();
        self.outgoing.fetched.get(&index).is_some_and(|at| now < at + FETCH_MS)
    }

    pub(super) fn pulled(&mut self, from: MemberId, index: u64, offset: u64, len: u64) {
        if !self.snapshots.files.iter().any(|(i, _)| *i == index) {
            return self.post(from, Lane::Bulk, &PeerMessage::NoPiece { index });
        }
        let now = self.clock.elapsed();
        self.outgoing.fetched.retain(|_, at| now < *at + FETCH_MS);
        self.outgoing.fetched.insert(index, now);
        self.offers.insert(from, now);
        if self.outgoing.queue.len() < QUEUE_MAX {
            self.outgoing.queue.push_back((from, index, offset, len.min(PIECE_BYTES)));
        }
    }

    /// Reads as many pieces as the allowance admits.
    pub(super) fn send_pieces(&mut self, out: &mut Effects) {
        let now = self.clock.elapsed();
        let o = &mut self.outgoing;
        let earned = now.saturating_sub(o.filled_at).saturating_mul(BYTES_PER_MS);
        o.allowance = o.allowance.saturating_add(earned).min(BURST_BYTES);
        o.filled_at = now;
        while let Some(&(to, index, offset, len)) = o.queue.front().filter(|(.., len)| *len <= o.allowance) {
            o.allowance -= len;
            o.queue.pop_front();
            out.jobs.push(Job::ReadSnapshot { to, index, offset, len });
        }
    }

    pub(super) fn pieces_wait(&self) -> bool {
        !self.outgoing.queue.is_empty()
    }

    pub(super) fn piece_read(&mut self, to: MemberId, index: u64, offset: u64, result: Result<Vec<u8>, String>) {
        match result {
            Ok(bytes) => self.post(to, Lane::Bulk, &PeerMessage::Piece { index, offset, bytes: &bytes }),
            Err(_) => self.post(to, Lane::Bulk, &PeerMessage::NoPiece { index }),
        }
    }

    /// The receiver cannot go on, or is gone: the library tries again later, with the newest that there is then.
    pub(super) fn fetch_failed(&mut self, peer: MemberId) {
        self.raft.report_snapshot(peer.0, raft::SnapshotStatus::Failure);
        self.set_jitter();
    }

    // The one that it takes.

    /// The leader offers a snapshot. Gives the message back if the library may have it now.
    pub(super) fn offered(&mut self, from: MemberId, message: Message) -> Option<Message> {
        let meta = message.get_snapshot().get_metadata();
        let (index, term) = (meta.index, meta.term);
        let bytes = message.get_snapshot().data.as_ref().try_into().map(u64::from_le_bytes);
        if index <= self.raft.raft.raft_log.committed || message.term < self.raft.raft.term {
            return Some(message);
        }
        let bytes = bytes.ok()?;
        let now = self.clock.elapsed();
        // A newer one does not stop what goes on well, or is here already: entries lead on from it too.
        let goes_on = |i: &Incoming| match i.state {
            Taking::Fetching => i.received > 0 && now < i.asked_at + 3 * PIECE_MS,
            Taking::Loading | Taking::Loaded(_) | Taking::Handed(_) => true,
        };
        if self.incoming.as_ref().is_some_and(|i| i.index != index && i.from == from && goes_on(i)) {
            return None;
        }
        if let Some(incoming) = self.incoming.as_mut().filter(|i| i.index == index && i.bytes == bytes) {
            let known = incoming.message.get_snapshot().get_metadata().term;
            if known == term {
                // The same state, possibly from another leader: what is here stays.
                incoming.from = from;
                incoming.message = message;
                return None;
            }
        }
        self.next_fetch += 1;
        self.incoming = Some(Incoming {
            from,
            message,
            index,
            bytes,
            received: 0,
            jobs: 0,
            asked: 0,
            asked_at: 0,
            number: self.next_fetch,
            state: Taking::Fetching,
        });
        None
    }

    /// Asks for what is missing, and hands on what is complete.
    pub(super) fn fetch(&mut self, out: &mut Effects) {
        let now = self.clock.elapsed();
        let room = self.room.free();
        let Some(i) = self.incoming.as_mut() else { return };
        match &i.state {
            Taking::Fetching if i.received == i.bytes && i.jobs == 0 => {
                i.state = Taking::Loading;
                let name = taken_file(i.index);
                out.jobs.push(Job::LoadSnapshot { number: i.number, file: INCOMING.to_owned(), name });
            }
            Taking::Fetching => {
                if i.asked > i.received && now >= i.asked_at + PIECE_MS {
                    i.asked = i.received;
                }
                let (from, index) = (i.from, i.index);
                if i.asked == i.received && room < self.config.disk_reserve_bytes.saturating_add(i.bytes - i.received) {
                    if now < i.asked_at + PIECE_MS {
                        return;
                    }
                    i.asked_at = now;
                    return self.post(from, Lane::Messages, &PeerMessage::CannotPull { index });
                }
                let to = (i.received + PIECES_AHEAD * PIECE_BYTES).min(i.bytes);
                let mut asks = Vec::new();
                while i.asked < to {
                    let len = PIECE_BYTES.min(i.bytes - i.asked);
                    asks.push((i.asked, len));
                    i.asked += len;
                    i.asked_at = now;
                }
                for (offset, len) in asks {
                    self.post(from, Lane::Messages, &PeerMessage::Pull { index, offset, len });
                }
            }
            Taking::Loading | Taking::Loaded(_) | Taking::Handed(_) => {}
        }
    }

    pub(super) fn piece(&mut self, index: u64, offset: u64, bytes: &[u8]) {
        let Some(i) = self.incoming.as_mut().filter(|i| i.index == index) else { return };
        let expected = matches!(i.state, Taking::Fetching) && offset == i.received;
        if !expected || bytes.is_empty() || bytes.len() as u64 > i.bytes - i.received {
            return;
        }
        i.received += bytes.len() as u64;
        i.asked = i.asked.max(i.received);
        i.asked_at = self.clock.elapsed();
        i.jobs += 1;
        self.jobs.push(Job::WriteTaken { number: i.number, file: INCOMING.to_owned(), offset, bytes: bytes.to_vec() });
    }

    /// The sender does not have it any more.
    pub(super) fn no_piece(&mut self, index: u64) {
        if self.incoming.as_ref().is_some_and(|i| i.index == index && matches!(i.state, Taking::Fetching)) {
            let from = self.incoming.take().map(|i| i.from);
            if let Some(from) = from {
                self.post(from, Lane::Messages, &PeerMessage::CannotPull { index });
            }
        }
    }

    pub(super) fn piece_written(&mut self, number: u64, done: bool) {
        let Some(i) = self.incoming.as_mut().filter(|i| i.number == number) else { return };
        i.jobs = i.jobs.saturating_sub(1);
        if !done {
            let (from, index) = (i.from, i.index);
            self.incoming = None;
            self.post(from, Lane::Messages, &PeerMessage::CannotPull { index });
        }
    }

    /// It is checked, on disk, and a state.
    pub(super) fn snapshot_loaded(&mut self, number: u64, loaded: Option<Box<(snapshot::Meta, Machine)>>) {
        let Some(i) = self.incoming.as_mut().filter(|i| i.number == number) else { return };
        let wanted = i.message.get_snapshot().get_metadata();
        match loaded {
            Some(loaded) if (loaded.0.index, loaded.0.term) == (wanted.index, wanted.term) => {
                i.state = Taking::Loaded(loaded);
            }
            _ => {
                let (from, index) = (i.from, i.index);
                self.incoming = None;
                self.post(from, Lane::Messages, &PeerMessage::CannotPull { index });
            }
        }
    }

    /// Gives the library the message that was held back.
    pub(super) fn hand_snapshot(&mut self) {
        let Some(mut i) = self.incoming.take() else { return };
        let Taking::Loaded(loaded) = i.state else {
            self.incoming = Some(i);
            return;
        };
        let mut message = i.message.clone();
        // The leader may have been elected again meanwhile; a state that is committed is so in every later term.
        if self.raft.raft.leader_id == i.from.0 {
            message.term = self.raft.raft.term;
        }
        i.state = Taking::Handed(loaded);
        self.incoming = Some(i);
        let _ = self.raft.step(message);
        self.set_jitter();
        let pending = self.raft.snap().is_some();
        if !pending {
            // Its own log was faster, or another leader has come.
            self.incoming = None;
        }
    }

    /// The library goes on from the snapshot: so does the log, in one synced write, and then the file has its name.
    pub(super) fn install(&mut self, metadata: &raft::eraftpb::SnapshotMetadata) -> Result<(), Fault> {
        let broken = |why: &str| Fault::Consensus { why: why.to_owned() };
        let Some(Incoming { state: Taking::Handed(loaded), bytes, .. }) = self.incoming.take() else {
            return Err(broken("a snapshot is to be installed that was not fetched"));
        };
        let (meta, machine) = *loaded;
        if meta.index != metadata.index {
            return Err(broken("another snapshot is to be installed than the one that was fetched"));
        }
        self.give_up_snapshot();
        let conf = metadata.get_conf_state().clone();
        self.log.reset(meta.index, meta.term, &conf);
        self.raft.mut_store().reset(meta.index, meta.term, conf);
        self.raft.mut_store().members_changed = true;
        self.conf_version += 1;
        self.machine = machine;
        self.machine.set_memory_limits(self.config.memory);
        self.taken = Some((meta, bytes));
        Ok(())
    }

    /// The log is synced: the file may count.
    pub(super) fn installed(&mut self, out: &mut Effects) -> Result<(), Fault> {
        let Some((meta, bytes)) = self.taken.take() else { return Ok(()) };
        let (from, to) = (taken_file(meta.index), snapshot::file(meta.index));
        let fault = |error| Fault::Disk { doing: "rename", file: from.clone(), error };
        self.disk.rename(&from, &to).and_then(|()| self.disk.sync_folder()).map_err(fault)?;
        self.snapshots.files.retain(|(index, _)| *index < meta.index);
        self.snapshots.files.push((meta.index, bytes));
        self.snapshots.log_bytes = 0;
        self.raft.mut_store().newest = Some(Offer { meta, bytes });
        out.restored = true;
        self.after_restore(out);
        Ok(())
    }
}
