//! Backups without a server: what a file holds, and the folder of a new lone member made of it.
//!
//! Promises. K5: the revision of a restored state follows from the clock only where the clock is not behind the backup's own time; otherwise
//! the caller names one. The time of a backup is that of the file's last change, because the state knows none: a copy must keep it.
//! What else holds is in `tenure_replica::Backup`.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

pub use tenure_machine::{MemberId, Revision};
pub use tenure_replica::{Backup, BackupError};
use tenure_replica::{Disk, Restore, revision_at};

use crate::disk_fs::{FsDisk, read_at_most};
use crate::{FolderError, member_id};

/// What a restore is told.
#[derive(Clone, Debug)]
pub struct RestoreConfig {
    pub file: PathBuf,
    pub data_dir: PathBuf,
    /// Of the new member, as `serve` will be told.
    pub name: String,
    pub cluster_token: String,
    /// New ids of cluster and issuer; else those of the backup.
    pub clone: bool,
    /// The first revision; by the clock if `None`.
    pub revision: Option<u64>,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Restored {
    pub member: MemberId,
    pub cluster: u64,
    pub issuer: [u8; 16],
    pub revision: Revision,
    pub index: u64,
    pub backup_revision: Revision,
}

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("{0}")]
    Backup(BackupError),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(
        "the clock of this machine is {} s behind the time of the backup, so revisions made of it may have been given before: set the clock, or name the first revision with --revision", .0.as_secs().max(1)
    )]
    ClockBehind(Duration),
    #[error(
        "the clock of this machine gives revision {by_clock}, and the backup is at {backup} already: set the clock, or name the first revision with --revision"
    )]
    ClockTooLow { by_clock: Revision, backup: Revision },
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

/// Reads and checks a whole file.
pub fn read(file: &Path) -> Result<Backup, BackupError> {
    // The path stands for the name; only this disk is ever asked for it.
    Backup::read(&mut ReadOnly(file.to_owned(), None), &file.display().to_string())
}

pub fn restore(config: &RestoreConfig) -> Result<Restored, RestoreError> {
    let backup = read(&config.file).map_err(RestoreError::Backup)?;
    let backup_revision = backup.machine.revision();
    let revision = match config.revision {
        Some(revision) => Revision(revision),
        None => by_clock(&config.file, backup_revision)?,
    };
    check_empty(&config.data_dir)?;
    let random = random()?;
    let identity = config.clone.then(|| {
        let mut issuer = [0; 16];
        issuer.copy_from_slice(&random[..16]);
        (number(&random[16..24]).max(1), issuer)
    });
    let (cluster, issuer) = identity.unwrap_or((backup.machine.cluster(), backup.machine.issuer()));
    let mut storage = [0; 16];
    storage.copy_from_slice(&random[24..]);
    let (name, cluster_token) = (config.name.clone(), config.cluster_token.clone());
    let member = member_id(&name, &cluster_token);
    let mut folder = FsDisk::open(&config.data_dir, true)?;
    let wanted = Restore { member, name, cluster_token, revision, identity, storage };
    let position = backup.restore(&mut folder, &wanted).map_err(RestoreError::Backup)?;
    Ok(Restored { member, cluster, issuer, revision, index: position.index.0, backup_revision })
}

fn by_clock(file: &Path, backup: Revision) -> Result<Revision, RestoreError> {
    let unreadable = |error| BackupError::Unreadable { file: file.display().to_string(), error };
    let changed =
        std::fs::metadata(file).and_then(|m| m.modified()).map_err(unreadable).map_err(RestoreError::Backup)?;
    let now = SystemTime::now();
    if let Ok(behind) = changed.duration_since(now)
        && !behind.is_zero()
    {
        return Err(RestoreError::ClockBehind(behind));
    }
    let unix = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let by_clock = revision_at(unix.as_millis() as u64);
    if by_clock <= backup {
        return Err(RestoreError::ClockTooLow { by_clock, backup });
    }
    Ok(by_clock)
}

/// Before a lock file is left in a folder that is somebody else's. Subfolders count too.
fn check_empty(folder: &Path) -> Result<(), RestoreError> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(FolderError::Access(folder.to_owned(), error).into()),
    };
    for entry in entries {
        let name = entry.map_err(|error| FolderError::Access(folder.to_owned(), error))?.file_name();
        // An empty volume has the one; a restore that was refused may have left the other.
        if name != "lost+found" && name != "lock" {
            let file = folder.join(name).display().to_string();
            return Err(RestoreError::Backup(BackupError::NotEmpty { file }));
        }
    }
    Ok(())
}

fn random() -> Result<[u8; 40], RestoreError> {
    let mut random = [0; 40];
    getrandom::fill(&mut random).map_err(RestoreError::Random)?;
    Ok(random)
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, &byte| n << 8 | u64::from(byte))
}

/// One file, and nothing that would write beside it.
struct ReadOnly(PathBuf, Option<File>);

impl ReadOnly {
    fn file(&mut self) -> io::Result<&File> {
        if self.1.is_none() {
            self.1 = Some(File::open(&self.0)?);
        }
        self.1.as_ref().ok_or_else(refused)
    }
}

fn refused() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "a backup is only read")
}

impl Disk for ReadOnly {
    fn len(&mut self, _: &str) -> io::Result<u64> {
        Ok(self.file()?.metadata()?.len())
    }

    fn read(&mut self, _: &str, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        read_at_most(self.file()?, offset, len)
    }

    fn list(&mut self) -> io::Result<Vec<String>> {
        Err(refused())
    }

    fn create(&mut self, _: &str, _: u64) -> io::Result<()> {
        Err(refused())
    }

    fn write(&mut self, _: &str, _: u64, _: &[u8]) -> io::Result<()> {
        Err(refused())
    }

    fn sync(&mut self, _: &str) -> io::Result<()> {
        Err(refused())
    }

    fn rename(&mut self, _: &str, _: &str) -> io::Result<()> {
        Err(refused())
    }

    fn remove(&mut self, _: &str) -> io::Result<()> {
        Err(refused())
    }

    fn truncate(&mut self, _: &str, _: u64) -> io::Result<()> {
        Err(refused())
    }

    fn sync_folder(&mut self) -> io::Result<()> {
        Err(refused())
    }

    fn free_bytes(&mut self) -> io::Result<u64> {
        Err(refused())
    }
}
