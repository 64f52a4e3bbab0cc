//! Backups: a fresh snapshot file of this member, streamed as it is on disk.
//!
//! Promises. S1: what is sent is the state at one log index, not below any change that was acknowledged before the call (of this member
//! alone, if the caller asked for that). S2: writes go on; a slow caller holds one open file and a few pieces.
//! Not promised. That the bytes are whole: the disk may have damaged them. The caller checks, as the file lets it.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tenure_wire::tenure::v1;
use tokio::time::Instant;

use super::refusal;
use super::sessions::query;
use crate::Context;
use crate::driver::Failure;
use crate::rpc::{Incoming, Outgoing, Router, Status};
use crate::status as words;
use crate::status::Kind;

const PIECE_BYTES: usize = 256 << 10;
/// How often the member is asked whether the file is there.
const LOOK: Duration = Duration::from_millis(20);
/// A member that writes no snapshot for this long does not write one.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn mount(router: &mut Router, context: &Context) {
    let context = context.clone();
    router.stream("/tenure.v1.Snapshots/Save", move |_, incoming, outgoing| save(context.clone(), incoming, outgoing));
}

async fn save(context: Context, mut incoming: Incoming, outgoing: Outgoing) -> Result<(), Status> {
    let Some(message) = incoming.next().await else { return Ok(()) };
    let request = v1::SnapshotSaveRequest::decode(message?).map_err(|error| Status::undecodable(&error))?;
    query(&context, request.stale, |_| ()).await.map_err(refusal)?;
    let failed = |failure: Failure| refusal(Box::new(words::native_failure(&failure, Kind::Read)));
    let wanted = context.want_snapshot().await.map_err(failed)?;
    let (index, mut file, total_bytes) = open(&context, wanted).await?;
    let (mut left, mut first) = (total_bytes, true);
    while left > 0 || first {
        let (back, piece) = read(file, left.min(PIECE_BYTES as u64) as usize).await.map_err(unreadable)?;
        file = back;
        left -= piece.len() as u64;
        let (index, total_bytes) = if std::mem::take(&mut first) { (index, total_bytes) } else { (0, 0) };
        let message = v1::SnapshotSaveReply { index, total_bytes, bytes: piece };
        if outgoing.send(message.encode_to_vec().into()).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Waits for a snapshot that reaches `wanted`, and opens it. Once open it may be removed: its bytes stay.
async fn open(context: &Context, wanted: u64) -> Result<(u64, File, u64), Status> {
    let mut idle_since = Instant::now();
    loop {
        let status = query(context, true, |view| view.member.status()).await.map_err(refusal)?;
        if status.snapshot_index >= wanted {
            let path = context.settings.data_dir.join(format!("snapshot-{:016x}", status.snapshot_index));
            match open_file(&path).await {
                Ok((file, len)) => return Ok((status.snapshot_index, file, len)),
                // A newer one has taken its place since.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(unreadable(error)),
            }
        }
        if status.snapshot_running {
            idle_since = Instant::now();
        } else if idle_since.elapsed() > PATIENCE {
            let alarms: Vec<String> = status.alarms.iter().map(ToString::to_string).collect();
            let why =
                if alarms.is_empty() { "it must fit on the disk once more".to_owned() } else { alarms.join("; ") };
            return Err(Status::unavailable(format!("this member writes no snapshot: {why}")));
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn open_file(path: &Path) -> io::Result<(File, u64)> {
    let path = path.to_owned();
    on_a_thread(move || {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        Ok((file, len))
    })
    .await
}

async fn read(mut file: File, len: usize) -> io::Result<(File, Bytes)> {
    on_a_thread(move || {
        let mut piece = vec![0; len];
        file.read_exact(&mut piece)?;
        Ok((file, piece.into()))
    })
    .await
}

/// Disks are slow, and the threads of the runtime are few.
async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

fn unreadable(error: io::Error) -> Status {
    Status::internal(format!("the snapshot file cannot be read: {error}"))
}
