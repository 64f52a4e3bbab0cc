//! A folder under a seed, as bad as a real one is allowed to be.
//!
//! Promises. What was synced survives a loss of power; nothing else does for sure. Unsynced writes are kept, dropped, torn at
//! sectors of 512 bytes and kept out of order; names that no `sync_folder` followed are lost or kept one by one. Asked to, it
//! refuses calls, fills up, loses pages in a failed sync, flips bits while the member is down, and dies at a chosen call.
//! Not promised. Sectors torn within themselves, reads that give other bytes than are stored, wear.
//! Relies on. One thread: clones share one folder, as the member and its worker share a real one.
//!
//! A killed process and a lost power differ: the first leaves every write where a later read finds it although it may never
//! have reached the platter, so that bytes read back at recovery prove nothing. Both are played.

use crate::random::Random;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tenure_replica::Disk;

/// The unit that a disk writes whole.
const SECTOR: u64 = 512;

/// A shared simulated folder.
#[derive(Clone)]
pub struct SimDisk(Arc<Mutex<Folder>>);

#[derive(Clone)]
struct Folder {
    /// Files by identity: a name points at one, and a file whose name is lost is lost.
    files: BTreeMap<u64, File>,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    /// Changes of names since the last `sync_folder`, oldest first.
    pending_names: Vec<NameChange>,
    next_file: u64,
    random: Random,
    faults: Faults,
    lie: Option<Lie>,
    capacity: u64,
    /// Calls so far, the clock by which crashes are placed.
    calls: u64,
    die_at: Option<u64>,
    dead: bool,
    counts: Counts,
    last_write: Option<WrittenRange>,
    /// By segment of the log: where the writes began that no sync has followed yet, and where those began that the last one did.
    begun: BTreeMap<String, u64>,
    synced: BTreeMap<String, u64>,
}

#[derive(Clone, Default)]
struct File {
    /// What a read finds.
    current: Vec<u8>,
    /// What is on the platter.
    durable: Vec<u8>,
    /// What was done since the last sync, oldest first.
    pending: Vec<Piece>,
}

#[derive(Clone)]
enum Piece {
    Write { offset: u64, data: Vec<u8> },
    Truncate { len: u64 },
}

#[derive(Clone)]
enum NameChange {
    Link { name: String, file: u64 },
    Rename { from: String, to: String, file: u64 },
    Unlink { name: String },
}

/// How often calls fail, in 10,000.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    pub write: u64,
    pub sync: u64,
    pub names: u64,
    pub read: u64,
}

/// A disk that breaks its own promises, to see that the oracles notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Says that a file is synced and leaves it as it was.
    Sync,
    /// Says that names are synced and leaves them as they were.
    SyncFolder,
    /// Loses a sector of a synced file at a loss of power.
    LoseSector,
}

/// What was injected, for the summary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub writes: u64,
    pub syncs: u64,
    pub errors: u64,
    pub full: u64,
    pub dropped: u64,
    pub torn: u64,
}

impl Counts {
    pub fn add(&mut self, other: &Counts) {
        self.writes += other.writes;
        self.syncs += other.syncs;
        self.errors += other.errors;
        self.full += other.full;
        self.dropped += other.dropped;
        self.torn += other.torn;
    }
}

/// The bytes of one file that one call wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenRange {
    pub name: String,
    pub start: u64,
    pub end: u64,
}

/// A flipped bit, to tell of and to flip back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flip {
    pub name: String,
    pub offset: u64,
    pub bit: u8,
}

impl SimDisk {
    pub fn new(random: Random) -> Self {
        Self(Arc::new(Mutex::new(Folder {
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending_names: Vec::new(),
            next_file: 0,
            random,
            faults: Faults::default(),
            lie: None,
            capacity: u64::MAX,
            calls: 0,
            die_at: None,
            dead: false,
            counts: Counts::default(),
            last_write: None,
            begun: BTreeMap::new(),
            synced: BTreeMap::new(),
        })))
    }

    /// A folder of its own with the same content and the same future, but no faults and no planned death.
    pub fn copy(&self) -> Self {
        let mut folder = self.folder().clone();
        folder.faults = Faults::default();
        folder.die_at = None;
        folder.dead = false;
        folder.capacity = u64::MAX;
        Self(Arc::new(Mutex::new(folder)))
    }

    pub fn set_faults(&self, faults: Faults) {
        self.folder().faults = faults;
    }

    pub fn set_lie(&self, lie: Option<Lie>) {
        self.folder().lie = lie;
    }

    /// Room for so many more bytes than are used now; `None`: all the room there is.
    pub fn set_room(&self, more: Option<u64>) {
        let mut folder = self.folder();
        folder.capacity = more.map_or(u64::MAX, |more| folder.used() + more);
    }

    /// The call after so many more is the last.
    pub fn die_after(&self, calls: Option<u64>) {
        let mut folder = self.folder();
        folder.die_at = calls.map(|n| folder.calls + n);
    }

    /// The planned death has come: every call fails until the power is back.
    pub fn is_dead(&self) -> bool {
        self.folder().dead
    }

    pub fn calls(&self) -> u64 {
        self.folder().calls
    }

    pub fn counts(&self) -> Counts {
        self.folder().counts
    }

    /// The newest write to a segment of the log.
    pub fn last_log_write(&self) -> Option<WrittenRange> {
        self.folder().last_write.clone()
    }

    /// Whether a place belongs to what the last sync of its segment of the log made durable. No later word on the disk may say so.
    pub fn is_in_last_batch(&self, flip: &Flip) -> bool {
        // A segment that was never synced may have been kept all the same, and nothing says so.
        self.folder().synced.get(&flip.name).is_none_or(|start| flip.offset >= *start)
    }

    /// The process is gone and the machine runs on: everything written can still be read and may still be lost.
    pub fn process_killed(&self) {
        let mut folder = self.folder();
        folder.dead = false;
        folder.die_at = None;
    }

    /// The power went and came back: what was not synced is decided now.
    pub fn power_lost(&self) {
        self.folder().lose_power();
    }

    /// Flips one bit of a stored file; `None` where nothing is stored.
    pub fn flip(&self, random: &mut Random) -> Option<Flip> {
        let names = self.names();
        let full: Vec<_> = names.into_iter().filter(|n| self.content(n).is_some_and(|c| !c.is_empty())).collect();
        if full.is_empty() {
            return None;
        }
        let name = random.pick(&full).clone();
        let content = self.content(&name)?;
        // Half of the flips go where bytes are in use: most of a young segment is zeros that nobody reads.
        let used = content.iter().rposition(|&b| b != 0).map_or(content.len(), |last| last + 1);
        let within = if random.chance(3, 4) { used } else { content.len() };
        let flip = Flip { name, offset: random.below(within as u64), bit: random.below(8) as u8 };
        self.apply_flip(&flip);
        Some(flip)
    }

    /// Flipping twice gives the bit back.
    pub fn apply_flip(&self, flip: &Flip) {
        let mut folder = self.folder();
        let Some(&id) = folder.names.get(&flip.name) else { return };
        let Some(file) = folder.files.get_mut(&id) else { return };
        let at = flip.offset as usize;
        for image in [&mut file.current, &mut file.durable] {
            if let Some(byte) = image.get_mut(at) {
                *byte ^= 1 << flip.bit;
            }
        }
    }

    pub fn names(&self) -> Vec<String> {
        self.folder().names.keys().cloned().collect()
    }

    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let folder = self.folder();
        folder.names.get(name).and_then(|id| folder.files.get(id)).map(|f| f.current.clone())
    }

    /// Replaces a stored file behind the member's back, on the platter too.
    pub fn plant(&self, name: &str, content: Vec<u8>) {
        let mut folder = self.folder();
        let id = match folder.names.get(name) {
            Some(&id) => id,
            None => folder.link(name),
        };
        folder.durable_names.insert(name.to_owned(), id);
        folder.files.insert(id, File { current: content.clone(), durable: content, pending: Vec::new() });
    }

    /// Puts the whole folder back to what `older` holds, as an operator who restores a copy by hand does.
    pub fn revert_to(&self, older: &SimDisk) {
        let older = older.folder().clone();
        let mut folder = self.folder();
        folder.files = older.files;
        folder.names = older.names;
        folder.durable_names = older.durable_names;
        folder.pending_names = older.pending_names;
        folder.next_file = older.next_file;
    }

    fn folder(&self) -> MutexGuard<'_, Folder> {
        // A panic in a member that held the folder is a finding of its own; the folder is still sound.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Folder {
    /// Counts one call; refuses where the machine is dead, or dies now.
    ///
    /// `Ok(true)`: this call is the last one. What it does is begun, as a write is that the power cuts, and then it fails.
    fn step(&mut self) -> io::Result<bool> {
        if self.dead {
            return Err(power());
        }
        self.calls += 1;
        let last = self.die_at.is_some_and(|at| self.calls > at);
        self.dead = last;
        Ok(last)
    }

    fn fails(&mut self, chance: u64) -> bool {
        let fails = chance > 0 && self.random.chance(chance, 10_000);
        self.counts.errors += u64::from(fails);
        fails
    }

    fn id(&self, name: &str) -> io::Result<u64> {
        self.names.get(name).copied().ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no file {name}")))
    }

    fn file(&mut self, name: &str) -> io::Result<&mut File> {
        let id = self.id(name)?;
        Ok(self.files.get_mut(&id).expect("a name points at a file"))
    }

    fn used(&self) -> u64 {
        self.names.values().filter_map(|id| self.files.get(id)).map(|f| f.current.len() as u64).sum()
    }

    fn need_room(&mut self, more: u64) -> io::Result<()> {
        if more > 0 && self.used().saturating_add(more) > self.capacity {
            self.counts.full += 1;
            return Err(io::Error::new(io::ErrorKind::StorageFull, "no space left on the simulated disk"));
        }
        Ok(())
    }

    fn link(&mut self, name: &str) -> u64 {
        let id = self.next_file;
        self.next_file += 1;
        self.files.insert(id, File::default());
        self.names.insert(name.to_owned(), id);
        self.pending_names.push(NameChange::Link { name: name.to_owned(), file: id });
        id
    }

    fn drop_nameless(&mut self) {
        let (names, durable) = (&self.names, &self.durable_names);
        let pending: Vec<u64> = self
            .pending_names
            .iter()
            .filter_map(|c| match c {
                NameChange::Link { file, .. } | NameChange::Rename { file, .. } => Some(*file),
                NameChange::Unlink { .. } => None,
            })
            .collect();
        self.files.retain(|id, _| {
            names.values().any(|n| n == id) || durable.values().any(|n| n == id) || pending.contains(id)
        });
    }

    fn lose_power(&mut self) {
        self.begun.clear();
        let changes = std::mem::take(&mut self.pending_names);
        let keep = Keep::draw(&mut self.random, changes.len());
        for (i, change) in changes.into_iter().enumerate() {
            if keep.keeps(&mut self.random, i) {
                apply_name_change(&mut self.durable_names, change);
            } else {
                self.counts.dropped += 1;
            }
        }
        self.names = self.durable_names.clone();
        let random = &mut self.random;
        for file in self.files.values_mut() {
            file.lose_power(random, &mut self.counts);
        }
        if self.lie == Some(Lie::LoseSector) {
            self.lose_sector();
        }
        self.drop_nameless();
        self.dead = false;
        self.die_at = None;
    }

    fn lose_sector(&mut self) {
        let Some(last) = self.last_write.clone() else { return };
        let Ok(file) = self.file(&last.name) else { return };
        let start = (last.start / SECTOR * SECTOR) as usize;
        let end = (start + SECTOR as usize).min(file.current.len());
        for image in [&mut file.current, &mut file.durable] {
            if let Some(sector) = image.get_mut(start..end) {
                sector.fill(0);
            }
        }
    }
}

/// Which of the unsynced changes a loss of power leaves.
enum Keep {
    /// The first so many: what a journal that writes in order gives. The one at the edge may be torn.
    First(usize),
    /// Each by itself.
    Each,
    /// Each sector by itself.
    Sectors,
}

impl Keep {
    fn draw(random: &mut Random, len: usize) -> Self {
        match random.below(6) {
            0 => Self::First(0),
            1 => Self::First(len),
            2 => Self::First(random.index(len + 1)),
            3 => Self::Each,
            _ => Self::Sectors,
        }
    }

    fn keeps(&self, random: &mut Random, i: usize) -> bool {
        match self {
            Self::First(n) => i < *n,
            Self::Each | Self::Sectors => random.coin(),
        }
    }
}

impl File {
    fn write(&mut self, offset: u64, data: &[u8]) {
        put(&mut self.current, offset, data);
        self.pending.push(Piece::Write { offset, data: data.to_vec() });
    }

    fn sync(&mut self) {
        for piece in self.pending.drain(..) {
            apply_piece(&mut self.durable, piece);
        }
    }

    fn lose_power(&mut self, random: &mut Random, counts: &mut Counts) {
        self.settle(random, counts);
        self.current.clone_from(&self.durable);
    }

    /// Decides what of the unsynced writes is on the platter.
    fn settle(&mut self, random: &mut Random, counts: &mut Counts) {
        let pieces = std::mem::take(&mut self.pending);
        let keep = Keep::draw(random, pieces.len());
        for (i, piece) in pieces.into_iter().enumerate() {
            match piece {
                Piece::Write { offset, data } if matches!(keep, Keep::Sectors) => {
                    self.tear(random, offset, &data);
                    counts.torn += 1;
                }
                piece if keep.keeps(random, i) => apply_piece(&mut self.durable, piece),
                _ => counts.dropped += 1,
            }
        }
    }

    /// Keeps each sector of a write by the toss of a coin.
    fn tear(&mut self, random: &mut Random, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        let mut at = offset;
        while at < end {
            let next = (at / SECTOR * SECTOR + SECTOR).min(end);
            if random.coin() {
                put(&mut self.durable, at, &data[(at - offset) as usize..(next - offset) as usize]);
            }
            at = next;
        }
    }
}

fn put(image: &mut Vec<u8>, offset: u64, data: &[u8]) {
    let (start, end) = (offset as usize, offset as usize + data.len());
    if image.len() < end {
        image.resize(end, 0);
    }
    image[start..end].copy_from_slice(data);
}

fn apply_piece(image: &mut Vec<u8>, piece: Piece) {
    match piece {
        Piece::Write { offset, data } => put(image, offset, &data),
        Piece::Truncate { len } => image.resize(len as usize, 0),
    }
}

fn apply_name_change(names: &mut BTreeMap<String, u64>, change: NameChange) {
    match change {
        NameChange::Link { name, file } => {
            names.insert(name, file);
        }
        NameChange::Rename { from, to, file } => {
            if names.get(&from) == Some(&file) {
                names.remove(&from);
            }
            names.insert(to, file);
        }
        NameChange::Unlink { name } => {
            names.remove(&name);
        }
    }
}

fn power() -> io::Error {
    io::Error::other("the simulated machine has lost its power")
}

fn injected(what: &str) -> io::Error {
    io::Error::other(format!("injected {what} error"))
}

impl Disk for SimDisk {
    fn list(&mut self) -> io::Result<Vec<String>> {
        let mut folder = self.folder();
        if folder.step()? {
            return Err(power());
        }
        Ok(folder.names.keys().cloned().collect())
    }

    fn len(&mut self, name: &str) -> io::Result<u64> {
        let mut folder = self.folder();
        if folder.step()? {
            return Err(power());
        }
        Ok(folder.file(name)?.current.len() as u64)
    }

    fn read(&mut self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut folder = self.folder();
        if folder.step()? {
            return Err(power());
        }
        let chance = folder.faults.read;
        if folder.fails(chance) {
            return Err(injected("read"));
        }
        let data = &folder.file(name)?.current;
        let start = data.len().min(offset as usize);
        Ok(data[start..data.len().min(start.saturating_add(len))].to_vec())
    }

    fn create(&mut self, name: &str, zeros: u64) -> io::Result<()> {
        let mut folder = self.folder();
        let last = folder.step()?;
        let chance = folder.faults.names;
        if folder.fails(chance) {
            return Err(injected("create"));
        }
        if folder.names.contains_key(name) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("file {name} is there already")));
        }
        folder.need_room(zeros)?;
        folder.link(name);
        folder.file(name)?.write(0, &vec![0; zeros as usize]);
        if last { Err(power()) } else { Ok(()) }
    }

    fn write(&mut self, name: &str, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut folder = self.folder();
        let last = folder.step()?;
        let end = offset + data.len() as u64;
        let grows = end.saturating_sub(folder.file(name)?.current.len() as u64);
        folder.need_room(grows)?;
        let chance = folder.faults.write;
        if folder.fails(chance) {
            // A failed write has written some of it.
            let part = folder.random.index(data.len() + 1);
            folder.file(name)?.write(offset, &data[..part]);
            return Err(injected("write"));
        }
        folder.counts.writes += 1;
        folder.file(name)?.write(offset, data);
        if name.starts_with("log-") {
            folder.begun.entry(name.to_owned()).or_insert(offset);
            folder.last_write = Some(WrittenRange { name: name.to_owned(), start: offset, end });
        }
        if last { Err(power()) } else { Ok(()) }
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let mut folder = self.folder();
        let last = folder.step()?;
        if last {
            folder.id(name)?;
            return Err(power());
        }
        let chance = folder.faults.sync;
        if folder.fails(chance) {
            // The system drops the pages that it could not write: they read well until they leave memory, and a later
            // sync succeeds without them.
            let folder = &mut *folder;
            let id = folder.id(name)?;
            let file = folder.files.get_mut(&id).expect("a name points at a file");
            file.settle(&mut folder.random, &mut folder.counts);
            return Err(injected("sync"));
        }
        folder.counts.syncs += 1;
        if let Some(start) = folder.begun.remove(name) {
            folder.synced.insert(name.to_owned(), start);
        }
        if folder.lie != Some(Lie::Sync) {
            folder.file(name)?.sync();
        }
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut folder = self.folder();
        let last = folder.step()?;
        let chance = folder.faults.names;
        if folder.fails(chance) {
            return Err(injected("rename"));
        }
        let file = folder.id(from)?;
        for name in [from, to] {
            folder.begun.remove(name);
            folder.synced.remove(name);
        }
        let change = NameChange::Rename { from: from.to_owned(), to: to.to_owned(), file };
        apply_name_change(&mut folder.names, change.clone());
        folder.pending_names.push(change);
        if last { Err(power()) } else { Ok(()) }
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut folder = self.folder();
        let last = folder.step()?;
        let chance = folder.faults.names;
        if folder.fails(chance) {
            return Err(injected("remove"));
        }
        folder.id(name)?;
        let change = NameChange::Unlink { name: name.to_owned() };
        apply_name_change(&mut folder.names, change.clone());
        folder.pending_names.push(change);
        if last { Err(power()) } else { Ok(()) }
    }

    fn truncate(&mut self, name: &str, len: u64) -> io::Result<()> {
        let mut folder = self.folder();
        let last = folder.step()?;
        let chance = folder.faults.write;
        if folder.fails(chance) {
            return Err(injected("truncate"));
        }
        let file = folder.file(name)?;
        file.current.resize(len as usize, 0);
        file.pending.push(Piece::Truncate { len });
        if last { Err(power()) } else { Ok(()) }
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        let mut folder = self.folder();
        if folder.step()? {
            return Err(power());
        }
        let chance = folder.faults.sync;
        if folder.fails(chance) {
            return Err(injected("sync of the folder"));
        }
        if folder.lie == Some(Lie::SyncFolder) {
            return Ok(());
        }
        folder.durable_names = folder.names.clone();
        folder.pending_names.clear();
        folder.drop_nameless();
        Ok(())
    }

    fn free_bytes(&mut self) -> io::Result<u64> {
        let mut folder = self.folder();
        if folder.step()? {
            return Err(power());
        }
        Ok(folder.capacity.saturating_sub(folder.used()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(seed: u64) -> SimDisk {
        SimDisk::new(Random::new(seed))
    }

    #[test]
    fn what_was_synced_survives_and_the_rest_is_anybodys_guess() {
        let (mut lost, mut kept, mut torn) = (0, 0, 0);
        for seed in 0..200 {
            let mut d = disk(seed);
            d.create("a", 4096).unwrap();
            d.write("a", 0, &[1; 1024]).unwrap();
            d.sync("a").unwrap();
            d.sync_folder().unwrap();
            d.write("a", 1024, &[2; 1024]).unwrap();
            d.power_lost();
            let content = d.content("a").unwrap();
            assert_eq!(content[..1024], [1; 1024]);
            match content[1024..2048].iter().filter(|&&b| b == 2).count() {
                0 => lost += 1,
                1024 => kept += 1,
                512 => torn += 1,
                n => panic!("{n} bytes are no whole number of sectors"),
            }
        }
        assert!(lost > 10 && kept > 10 && torn > 10, "{lost} {kept} {torn}");
    }

    #[test]
    fn a_killed_process_leaves_its_writes_readable_and_losable() {
        let mut gone = 0;
        for seed in 0..50 {
            let mut d = disk(seed);
            d.create("a", 512).unwrap();
            d.sync("a").unwrap();
            d.sync_folder().unwrap();
            d.write("a", 0, &[7; 512]).unwrap();
            d.process_killed();
            assert_eq!(d.content("a").unwrap(), [7; 512]);
            d.power_lost();
            gone += u64::from(d.content("a").unwrap() == [0; 512]);
        }
        assert!(gone > 5);
    }

    #[test]
    fn names_without_a_folder_sync_may_go() {
        let (mut old, mut new) = (0, 0);
        for seed in 0..100 {
            let mut d = disk(seed);
            d.create("a", 1).unwrap();
            d.sync_folder().unwrap();
            d.rename("a", "b").unwrap();
            d.power_lost();
            old += u64::from(d.names() == ["a"]);
            new += u64::from(d.names() == ["b"]);
        }
        assert!(old > 10 && new > 10 && old + new == 100);
    }

    #[test]
    fn it_dies_at_the_chosen_call_and_stays_dead() {
        let mut d = disk(1);
        d.create("a", 1).unwrap();
        d.die_after(Some(1));
        d.write("a", 0, b"x").unwrap();
        assert!(!d.is_dead());
        assert!(d.write("a", 0, b"y").is_err());
        assert!(d.is_dead() && d.sync("a").is_err() && d.list().is_err());
        d.power_lost();
        assert!(d.list().is_ok());
    }

    #[test]
    fn a_failed_sync_may_lose_pages_that_a_later_sync_does_not_bring_back() {
        let mut lost = 0;
        for seed in 0..60 {
            let mut d = disk(seed);
            d.create("a", 512).unwrap();
            d.sync("a").unwrap();
            d.sync_folder().unwrap();
            d.write("a", 0, &[9; 512]).unwrap();
            d.set_faults(Faults { sync: 10_000, ..Faults::default() });
            assert!(d.sync("a").is_err());
            d.set_faults(Faults::default());
            d.sync("a").unwrap();
            assert_eq!(d.content("a").unwrap(), [9; 512]);
            d.power_lost();
            lost += u64::from(d.content("a").unwrap() == [0; 512]);
        }
        assert!(lost > 5);
    }

    #[test]
    fn a_full_disk_refuses_growth_only() {
        let mut d = disk(1);
        d.create("a", 100).unwrap();
        d.set_room(Some(10));
        assert_eq!(d.write("a", 100, &[0; 11]).unwrap_err().kind(), io::ErrorKind::StorageFull);
        d.write("a", 0, &[1; 100]).unwrap();
        assert_eq!(d.free_bytes().unwrap(), 10);
        d.set_room(None);
        d.write("a", 100, &[0; 11]).unwrap();
    }
}
