//! Work beside the member: slow calls to the disk on which no answer waits.
//!
//! Promises. A job touches only files that the member does not write meanwhile. One that failed left nothing that counts.
//! Relies on. The shell runs jobs in the order in which they came, on a handle of the same folder, and hands back each `JobDone`.

use crate::disk::Disk;
use crate::log::segment_file;
use crate::snapshot;
use std::io;
use tenure_machine::{Machine, MemberId};

pub(crate) const PREPARE_TEMPORARY: &str = "prepare.tmp";
/// Zeros are written and synced in pieces, so that the log's own syncs do not wait behind all of them.
const TAKEN_SYNC_BYTES: u64 = 8 << 20;
const ZEROS_AT_ONCE: u64 = 1 << 20;

#[derive(Debug)]
pub enum Job {
    /// Makes the next segment, from a spare file if there is one.
    PrepareSegment {
        id: u64,
        bytes: u64,
        spare: Option<String>,
    },
    /// Keeps a segment that is not needed any more, to be used again.
    Retire {
        name: String,
        spare: String,
    },
    /// One piece of a snapshot; the first makes the file anew.
    WriteSnapshot {
        number: u64,
        file: String,
        offset: u64,
        bytes: Vec<u8>,
        sync: bool,
    },
    /// The last piece, and the name under which the file counts from then on.
    FinishSnapshot {
        number: u64,
        file: String,
        offset: u64,
        bytes: Vec<u8>,
        name: String,
    },
    /// Reads a piece of a snapshot for another member.
    ReadSnapshot {
        to: MemberId,
        index: u64,
        offset: u64,
        len: u64,
    },
    /// One piece of a snapshot of another member; the first makes the file anew.
    WriteTaken {
        number: u64,
        file: String,
        offset: u64,
        bytes: Vec<u8>,
    },
    /// Syncs what was written, checks every block, makes the state of it, and gives the file a name that a start understands.
    LoadSnapshot {
        number: u64,
        file: String,
        name: String,
    },
    Remove {
        name: String,
    },
}

impl Job {
    /// What it may add to what the folder takes.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::PrepareSegment { bytes, spare: None, .. } => *bytes,
            Self::WriteSnapshot { bytes, .. } | Self::FinishSnapshot { bytes, .. } | Self::WriteTaken { bytes, .. } => {
                bytes.len() as u64
            }
            Self::PrepareSegment { .. }
            | Self::Retire { .. }
            | Self::ReadSnapshot { .. }
            | Self::LoadSnapshot { .. }
            | Self::Remove { .. } => 0,
        }
    }
}

/// What became of a job. The text says why it failed.
pub enum JobDone {
    SegmentPrepared { id: u64, bytes: u64, result: Result<(), String> },
    Retired { spare: String, result: Result<(), String> },
    SnapshotWritten { number: u64, result: Result<(), String> },
    SnapshotFinished { number: u64, name: String, bytes: u64, result: Result<(), String> },
    SnapshotRead { to: MemberId, index: u64, offset: u64, result: Result<Vec<u8>, String> },
    TakenWritten { number: u64, result: Result<(), String> },
    SnapshotLoaded { number: u64, result: Result<Box<Loaded>, String> },
    Removed { name: String, result: Result<(), String> },
}

/// A state that was fetched, with what its file says of it.
pub struct Loaded(pub(crate) Box<(snapshot::Meta, Machine)>);

pub fn run_job(disk: &mut dyn Disk, job: Job) -> JobDone {
    match job {
        Job::PrepareSegment { id, bytes, spare } => {
            let result = told(prepare(disk, id, bytes, spare));
            JobDone::SegmentPrepared { id, bytes, result }
        }
        Job::Retire { name, spare } => {
            let result = told(disk.rename(&name, &spare).and_then(|()| disk.sync_folder()));
            JobDone::Retired { spare, result }
        }
        Job::WriteSnapshot { number, file, offset, bytes, sync } => {
            JobDone::SnapshotWritten { number, result: told(write_piece(disk, &file, offset, &bytes, sync)) }
        }
        Job::FinishSnapshot { number, file, offset, bytes, name } => {
            let len = offset + bytes.len() as u64;
            let result = told(finish(disk, &file, offset, &bytes, &name));
            JobDone::SnapshotFinished { number, name, bytes: len, result }
        }
        Job::ReadSnapshot { to, index, offset, len } => {
            let read = disk.read(&snapshot::file(index), offset, len as usize);
            let result = match read {
                Ok(bytes) if bytes.len() as u64 == len => Ok(bytes),
                Ok(_) => Err("the file is shorter than it was".to_owned()),
                Err(error) => Err(error.to_string()),
            };
            JobDone::SnapshotRead { to, index, offset, result }
        }
        Job::WriteTaken { number, file, offset, bytes } => {
            // Synced now and then, so that the last sync has little left.
            let sync = offset / TAKEN_SYNC_BYTES != (offset + bytes.len() as u64) / TAKEN_SYNC_BYTES;
            JobDone::TakenWritten { number, result: told(write_piece(disk, &file, offset, &bytes, sync)) }
        }
        Job::LoadSnapshot { number, file, name } => {
            JobDone::SnapshotLoaded { number, result: load_taken(disk, &file, &name).map(Box::new) }
        }
        Job::Remove { name } => {
            let result = told(disk.remove(&name).and_then(|()| disk.sync_folder()));
            JobDone::Removed { name, result }
        }
    }
}

fn load_taken(disk: &mut dyn Disk, file: &str, name: &str) -> Result<Loaded, String> {
    disk.sync(file).map_err(|e| e.to_string())?;
    let loaded = snapshot::load(disk, file).map_err(|e| e.to_string())?;
    disk.rename(file, name).and_then(|()| disk.sync_folder()).map_err(|e| e.to_string())?;
    Ok(Loaded(Box::new(loaded)))
}

fn told(result: io::Result<()>) -> Result<(), String> {
    result.map_err(|e| e.to_string())
}

fn prepare(disk: &mut dyn Disk, id: u64, bytes: u64, spare: Option<String>) -> io::Result<()> {
    let from = match spare {
        Some(spare) => spare,
        None => {
            fill(disk, bytes)?;
            PREPARE_TEMPORARY.to_owned()
        }
    };
    disk.rename(&from, &segment_file(id))?;
    disk.sync_folder()
}

fn fill(disk: &mut dyn Disk, bytes: u64) -> io::Result<()> {
    remove_if_there(disk, PREPARE_TEMPORARY)?;
    disk.create(PREPARE_TEMPORARY, 0)?;
    let zeros = vec![0; ZEROS_AT_ONCE.min(bytes) as usize];
    let mut at = 0;
    while at < bytes {
        let piece = (bytes - at).min(ZEROS_AT_ONCE);
        let written =
            disk.write(PREPARE_TEMPORARY, at, &zeros[..piece as usize]).and_then(|()| disk.sync(PREPARE_TEMPORARY));
        if let Err(error) = written {
            // A half-filled file would only take the room that is missing.
            disk.remove(PREPARE_TEMPORARY)?;
            return Err(error);
        }
        at += piece;
    }
    Ok(())
}

fn write_piece(disk: &mut dyn Disk, file: &str, offset: u64, bytes: &[u8], sync: bool) -> io::Result<()> {
    if offset == 0 {
        remove_if_there(disk, file)?;
        disk.create(file, 0)?;
    }
    disk.write(file, offset, bytes)?;
    if sync { disk.sync(file) } else { Ok(()) }
}

fn finish(disk: &mut dyn Disk, file: &str, offset: u64, bytes: &[u8], name: &str) -> io::Result<()> {
    disk.write(file, offset, bytes)?;
    disk.sync(file)?;
    disk.rename(file, name)?;
    disk.sync_folder()
}

pub(crate) fn remove_if_there(disk: &mut dyn Disk, name: &str) -> io::Result<()> {
    match disk.remove(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
