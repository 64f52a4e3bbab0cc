//! A member's folder on a real file system.
//!
//! Promises. F1: at most one process has the folder open: an exclusive lock on the file `lock` goes with the process, however it ends.
//! F2: clones share their open files, so that a rename or removal by the worker is seen by the driver at once; a stale handle would write
//! into a file that no longer has its name.
//! Not promised. Anything a file system does not promise: network file systems and their caches are not supported.
//! Relies on. `fdatasync` reaches the disk. With `fsync` off nothing is durable, which the operator asked for loudly.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tenure_replica::Disk;

use crate::metrics::DurationHistogram;

/// etcd's buckets: from one millisecond, doubling.
const SYNC_BOUNDS: &[f64] =
    &[0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192];

const LOCK_FILE: &str = "lock";
/// What is written leaves in steps of this size. Linux keeps a large write in one large folio of the page cache, and every small write into it later looks at
/// all of its blocks: behind steps of 256 KiB or more, a write of 400 bytes with its sync took 15 to 30 us longer (Linux 6.18, ext4).
const STEP_BYTES: usize = 16 << 10;

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    #[error("the data folder {} is in use by another process", .0.display())]
    Locked(PathBuf),
    #[error("the data folder {} cannot be made: {}", .0.display(), .1)]
    Make(PathBuf, io::Error),
    #[error("the data folder {} cannot be read and written: {}", .0.display(), .1)]
    Access(PathBuf, io::Error),
}

/// The folder, locked. Clones share it; the lock is given up with the last one.
#[derive(Clone, Debug)]
pub(crate) struct FsDisk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    folder: File,
    fsync: bool,
    files: Mutex<BTreeMap<String, Arc<File>>>,
    syncs: Arc<DurationHistogram>,
    /// Held for its lock.
    _lock: File,
}

impl FsDisk {
    /// Opens the folder, makes it where it is missing, and locks it.
    pub(crate) fn open(path: &Path, fsync: bool) -> Result<Self, FolderError> {
        std::fs::create_dir_all(path).map_err(|error| FolderError::Make(path.to_owned(), error))?;
        let access = |error| FolderError::Access(path.to_owned(), error);
        let lock =
            OpenOptions::new().create(true).truncate(false).write(true).open(path.join(LOCK_FILE)).map_err(access)?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(FolderError::Locked(path.to_owned())),
            Err(error) => return Err(access(error.into())),
        }
        let folder = File::open(path).map_err(access)?;
        let syncs = Arc::new(DurationHistogram::new(SYNC_BOUNDS));
        let shared = Shared { path: path.to_owned(), folder, fsync, files: Mutex::default(), syncs, _lock: lock };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// How long syncs took.
    pub(crate) fn syncs(&self) -> Arc<DurationHistogram> {
        self.shared.syncs.clone()
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, Arc<File>>> {
        // A map of handles is whole whatever a panicking thread did.
        self.shared.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.shared.path.join(name)
    }

    fn file(&self, name: &str) -> io::Result<Arc<File>> {
        let mut files = self.files();
        if let Some(file) = files.get(name) {
            return Ok(file.clone());
        }
        let file = Arc::new(OpenOptions::new().read(true).write(true).open(self.path(name))?);
        files.insert(name.to_owned(), file.clone());
        Ok(file)
    }
}

impl Disk for FsDisk {
    fn list(&mut self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.shared.path)? {
            let entry = entry?;
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
                && name != LOCK_FILE
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn len(&mut self, name: &str) -> io::Result<u64> {
        Ok(self.file(name)?.metadata()?.len())
    }

    fn read(&mut self, name: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let file = self.file(name)?;
        read_at_most(&file, offset, len)
    }

    fn create(&mut self, name: &str, zeros: u64) -> io::Result<()> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(self.path(name))?;
        // Written, not allocated: blocks that were only reserved cost a journal commit at their first sync.
        for at in (0..zeros).step_by(STEP_BYTES) {
            let len = (zeros - at).min(STEP_BYTES as u64) as usize;
            file.write_all_at(&[0; STEP_BYTES][..len], at)?;
        }
        self.files().insert(name.to_owned(), Arc::new(file));
        Ok(())
    }

    fn write(&mut self, name: &str, offset: u64, data: &[u8]) -> io::Result<()> {
        let file = self.file(name)?;
        for (step, piece) in (0_u64..).zip(data.chunks(STEP_BYTES)) {
            file.write_all_at(piece, offset + step * STEP_BYTES as u64)?;
        }
        Ok(())
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        if !self.shared.fsync {
            return Ok(());
        }
        let begun = std::time::Instant::now();
        let synced = self.file(name)?.sync_data();
        self.shared.syncs.record(begun.elapsed());
        synced
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.files();
        std::fs::rename(self.path(from), self.path(to))?;
        files.remove(to);
        if let Some(file) = files.remove(from) {
            files.insert(to.to_owned(), file);
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut files = self.files();
        files.remove(name);
        std::fs::remove_file(self.path(name))
    }

    fn truncate(&mut self, name: &str, len: u64) -> io::Result<()> {
        self.file(name)?.set_len(len)
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        if self.shared.fsync { self.shared.folder.sync_all() } else { Ok(()) }
    }

    fn free_bytes(&mut self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.shared.folder)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// Short at the end of the file.
pub(crate) fn read_at_most(file: &File, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut data = vec![0; len];
    let mut filled = 0;
    while filled < len {
        match file.read_at(&mut data[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    data.truncate(filled);
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_keep_their_bytes_under_new_names() {
        let folder = tempfile::tempdir().unwrap();
        let mut disk = FsDisk::open(folder.path(), true).unwrap();
        let mut worker = disk.clone();
        disk.create("a", 8).unwrap();
        disk.write("a", 2, b"hi").unwrap();
        worker.rename("a", "b").unwrap();
        disk.write("b", 6, b"more").unwrap();
        disk.sync("b").unwrap();
        disk.sync_folder().unwrap();
        assert_eq!(worker.read("b", 0, 100).unwrap(), b"\0\0hi\0\0more");
        assert_eq!(disk.len("b").unwrap(), 10);
        assert!(disk.read("a", 0, 1).is_err());
        assert!(disk.create("b", 0).is_err(), "an existing file is not overwritten");
        assert_eq!(disk.list().unwrap(), ["b"]);
        assert!(disk.free_bytes().unwrap() > 0);
        worker.remove("b").unwrap();
        assert!(disk.write("b", 0, b"x").is_err());
    }

    #[test]
    fn a_folder_is_used_once() {
        let folder = tempfile::tempdir().unwrap();
        let first = FsDisk::open(folder.path(), true).unwrap();
        assert!(matches!(FsDisk::open(folder.path(), true), Err(FolderError::Locked(_))));
        drop(first);
        FsDisk::open(folder.path(), true).unwrap();
    }
}
