//! The member's folder, as the few calls that it makes, and one in memory for tests.
//!
//! Promises. Nothing above this trait touches a file, so the simulator can lose, tear, refuse and flip whatever it likes.
//! Relies on. A write is durable once `sync` of its file has returned, a new name or a rename once `sync_folder` has. What was
//! written and not synced may be on disk whole, in part, or not at all, in any order of its sectors.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A folder of plain files. Names hold no separators.
pub trait Disk: Send {
    fn list(&mut self) -> io::Result<Vec<String>>;
    fn len(&mut self, name: &str) -> io::Result<u64>;
    /// Short at the end of the file.
    fn read(&mut self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>>;
    /// Makes a new file of so many written zeros, not synced; an existing one is an error.
    fn create(&mut self, name: &str, zeros: u64) -> io::Result<()>;
    /// Overwrites, and grows the file where it ends before.
    fn write(&mut self, name: &str, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes the file's bytes durable. After an error nothing is known of them, and trying again proves nothing.
    fn sync(&mut self, name: &str) -> io::Result<()>;
    /// Replaces `to` where it exists.
    fn rename(&mut self, from: &str, to: &str) -> io::Result<()>;
    fn remove(&mut self, name: &str) -> io::Result<()>;
    fn truncate(&mut self, name: &str, len: u64) -> io::Result<()>;
    /// Makes new names, renames and removals durable.
    fn sync_folder(&mut self) -> io::Result<()>;
    /// What a file could still grow by.
    fn free_bytes(&mut self) -> io::Result<u64>;
}

/// A folder in memory. Clones share it, as the member and the worker that runs its jobs share a real one.
///
/// A crash undoes the writes that were not synced, whole; names are durable at once. The faulty disk of the simulator is stricter.
#[derive(Clone, Debug, Default)]
pub struct MemoryDisk(Arc<Mutex<Folder>>);

#[derive(Debug)]
struct Folder {
    files: BTreeMap<String, File>,
    capacity: u64,
    fail_syncs: bool,
    syncs: u64,
    writes: u64,
}

impl Default for Folder {
    fn default() -> Self {
        Self { files: BTreeMap::new(), capacity: u64::MAX, fail_syncs: false, syncs: 0, writes: 0 }
    }
}

#[derive(Clone, Debug, Default)]
struct File {
    data: Vec<u8>,
    /// How to undo what was written since the last sync, oldest first: the length before and the bytes that were overwritten.
    undo: Vec<(usize, usize, Vec<u8>)>,
}

impl File {
    fn write(&mut self, offset: usize, data: &[u8]) {
        let before = self.data.len();
        let end = offset + data.len();
        self.undo.push((before, offset.min(before), self.data[offset.min(before)..end.min(before)].to_vec()));
        if before < end {
            self.data.resize(end, 0);
        }
        self.data[offset..end].copy_from_slice(data);
    }

    fn lose_unsynced(&mut self) {
        while let Some((len, offset, bytes)) = self.undo.pop() {
            self.data.resize(len, 0);
            self.data[offset..offset + bytes.len()].copy_from_slice(&bytes);
        }
    }
}

impl Folder {
    fn file(&mut self, name: &str) -> io::Result<&mut File> {
        self.files.get_mut(name).ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no file {name}")))
    }

    fn used(&self) -> u64 {
        self.files.values().map(|f| f.data.len() as u64).sum()
    }

    fn room_for(&self, more: u64) -> io::Result<()> {
        if self.used().saturating_add(more) > self.capacity {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "no space left"));
        }
        Ok(())
    }
}

impl MemoryDisk {
    pub fn new() -> Self {
        Self::default()
    }

    /// Loses every write that was not synced.
    pub fn crash(&self) {
        self.folder().files.values_mut().for_each(File::lose_unsynced);
    }

    /// A folder of its own with the same content.
    pub fn copy(&self) -> Self {
        let folder = self.folder();
        let files = folder.files.clone();
        Self(Arc::new(Mutex::new(Folder { files, capacity: folder.capacity, ..Folder::default() })))
    }

    pub fn set_capacity(&self, bytes: u64) {
        self.folder().capacity = bytes;
    }

    /// From now on every sync fails, or none.
    pub fn fail_syncs(&self, fail: bool) {
        self.folder().fail_syncs = fail;
    }

    /// The bytes of a file, to look at or to damage.
    pub fn edit<R>(&self, name: &str, edit: impl FnOnce(&mut Vec<u8>) -> R) -> Option<R> {
        self.folder().files.get_mut(name).map(|f| edit(&mut f.data))
    }

    pub fn names(&self) -> Vec<String> {
        self.folder().files.keys().cloned().collect()
    }

    /// How many writes and syncs of files there were.
    pub fn counts(&self) -> (u64, u64) {
        let folder = self.folder();
        (folder.writes, folder.syncs)
    }

    fn folder(&self) -> MutexGuard<'_, Folder> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for MemoryDisk {
    fn list(&mut self) -> io::Result<Vec<String>> {
        Ok(self.names())
    }

    fn len(&mut self, name: &str) -> io::Result<u64> {
        Ok(self.folder().file(name)?.data.len() as u64)
    }

    fn read(&mut self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut folder = self.folder();
        let data = &folder.file(name)?.data;
        let start = data.len().min(offset as usize);
        Ok(data[start..data.len().min(start.saturating_add(len))].to_vec())
    }

    fn create(&mut self, name: &str, zeros: u64) -> io::Result<()> {
        let mut folder = self.folder();
        if folder.files.contains_key(name) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("file {name} is there already")));
        }
        folder.room_for(zeros)?;
        folder.files.insert(name.to_owned(), File { data: vec![0; zeros as usize], undo: Vec::new() });
        Ok(())
    }

    fn write(&mut self, name: &str, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut folder = self.folder();
        let end = offset + data.len() as u64;
        let grows = end.saturating_sub(folder.file(name)?.data.len() as u64);
        if grows > 0 {
            folder.room_for(grows)?;
        }
        folder.writes += 1;
        folder.file(name)?.write(offset as usize, data);
        Ok(())
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let mut folder = self.folder();
        folder.syncs += 1;
        if folder.fail_syncs {
            return Err(io::Error::other("the sync failed"));
        }
        folder.file(name)?.undo.clear();
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut folder = self.folder();
        folder.file(from)?;
        if let Some(file) = folder.files.remove(from) {
            folder.files.insert(to.to_owned(), file);
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut folder = self.folder();
        folder.file(name)?;
        folder.files.remove(name);
        Ok(())
    }

    fn truncate(&mut self, name: &str, len: u64) -> io::Result<()> {
        let mut folder = self.folder();
        let file = folder.file(name)?;
        file.undo.clear();
        file.data.resize(len as usize, 0);
        Ok(())
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn free_bytes(&mut self) -> io::Result<u64> {
        let folder = self.folder();
        Ok(folder.capacity.saturating_sub(folder.used()))
    }
}
