//! `tenure snapshot`: a backup is saved from a running member, looked at and checked without one.
//!
//! A file gets its name only when all of it is on disk and every checksum in it was compared, so a backup that has its name is whole.

use crate::common::{Common, Failure, Output, OutputArg, exit};
use anyhow::Result;
use serde_json::json;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};
use tenure_server::backup::{self, Backup, BackupError};
use tenure_wire::tenure::v1::SnapshotSaveRequest;
use tenure_wire::tenure::v1::snapshots_client::SnapshotsClient;
use tonic::transport::{Channel, Endpoint};

/// A member writes its snapshot before the first piece comes, and a disk may be slow: only silence of this length is the end.
const SILENCE: Duration = Duration::from_secs(120);

#[derive(Debug, clap::Args)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, clap::Subcommand)]
enum SnapshotCommand {
    /// Save the state of a running member to a file, at one revision, while writes go on
    Save {
        /// Replaced if it is there, once the new one is whole
        file: PathBuf,
        /// Save what this member has, even behind the others or without a majority
        #[arg(long)]
        stale: bool,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show what a backup holds
    Status {
        file: PathBuf,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Read all of a backup and compare every checksum
    Verify { file: PathBuf },
}

pub(crate) async fn run(common: &Common, args: SnapshotArgs) -> Result<ExitCode> {
    match args.command {
        SnapshotCommand::Save { file, stale, output } => save(common, &file, stale, output.output).await?,
        SnapshotCommand::Status { file, output } => show(&file, &read(&file)?, output.output),
        SnapshotCommand::Verify { file } => {
            let backup = read(&file)?;
            out!(
                "{} is whole: revision {}, {} bytes, sha256 {}",
                file.display(),
                backup.machine.revision(),
                backup.bytes,
                hex(&backup.digest)
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn save(common: &Common, file: &Path, stale: bool, output: Output) -> Result<()> {
    let mut part = file.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let channel = connect(common).await?;
    let saved = fetch(channel, &part, stale).await.and_then(|()| keep(&part, file));
    if saved.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    show(file, &saved?, output);
    Ok(())
}

/// The first endpoint that answers.
async fn connect(common: &Common) -> Result<Channel> {
    let mut why = Vec::new();
    for endpoint in &common.endpoints {
        let url = if endpoint.contains("://") { endpoint.clone() } else { format!("http://{endpoint}") };
        let to = Endpoint::from_shared(url).map_err(|e| Failure::usage(format!("`{endpoint}` is no address: {e}")))?;
        match to.connect_timeout(common.command_timeout).connect().await {
            Ok(channel) => return Ok(channel),
            Err(error) => why.push(format!("{endpoint}: {error}")),
        }
    }
    let hint = "is `tenure serve` running there? --endpoints or TENURE_ENDPOINTS say where to look";
    Err(Failure::new(exit::UNAVAILABLE, format!("no member answers ({})", why.join("; "))).hint(hint).into())
}

async fn fetch(channel: Channel, part: &Path, stale: bool) -> Result<()> {
    let mut pieces = in_time(SnapshotsClient::new(channel).save(SnapshotSaveRequest { stale })).await?.into_inner();
    let unwritable = |error| Failure::new(exit::FAILURE, format!("{} cannot be written: {error}", part.display()));
    let mut file = File::create(part).map_err(unwritable)?;
    let (mut total, mut came) = (None, 0);
    while let Some(piece) = in_time(pieces.message()).await? {
        total.get_or_insert(piece.total_bytes);
        came += piece.bytes.len() as u64;
        file.write_all(&piece.bytes).map_err(unwritable)?;
    }
    if total != Some(came) {
        let why = format!("the backup ended after {came} bytes of {}", total.unwrap_or(0));
        return Err(Failure::new(exit::UNAVAILABLE, why).into());
    }
    file.sync_all().map_err(unwritable)?;
    Ok(())
}

async fn in_time<T>(work: impl Future<Output = Result<T, tonic::Status>>) -> Result<T> {
    match tokio::time::timeout(SILENCE, work).await {
        Ok(answer) => answer.map_err(|status| refused(&status).into()),
        Err(_) => Err(Failure::new(exit::UNAVAILABLE, format!("no word for {} s", SILENCE.as_secs())).into()),
    }
}

fn refused(status: &tonic::Status) -> Failure {
    let unavailable = matches!(status.code(), tonic::Code::Unavailable | tonic::Code::DeadlineExceeded);
    let failure = Failure::new(if unavailable { exit::UNAVAILABLE } else { exit::FAILURE }, status.message());
    if unavailable { failure.hint("--stale saves what the member has without asking a majority") } else { failure }
}

/// Checks what came, and gives it its name.
fn keep(part: &Path, file: &Path) -> Result<Backup> {
    let backup = read(part)?;
    let failed = |error| Failure::new(exit::FAILURE, format!("{} cannot be made: {error}", file.display()));
    std::fs::rename(part, file).map_err(failed)?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
    Ok(backup)
}

pub(crate) fn read(file: &Path) -> Result<Backup> {
    backup::read(file).map_err(|error| failure(&error).into())
}

pub(crate) fn failure(error: &BackupError) -> Failure {
    match error {
        BackupError::Damaged { .. } => Failure::new(exit::DAMAGED, error.to_string())
            .hint("take another backup: nothing of a damaged one is restored"),
        BackupError::OtherFormat { .. } => Failure::new(exit::DAMAGED, error.to_string()),
        BackupError::Refused { .. } | BackupError::NotEmpty { .. } => Failure::usage(error.to_string()),
        BackupError::Unreadable { .. } | BackupError::Folder(_) => Failure::new(exit::FAILURE, error.to_string()),
    }
}

fn show(file: &Path, backup: &Backup, output: Output) {
    let (machine, counts) = (&backup.machine, backup.machine.counts());
    let time = std::fs::metadata(file).and_then(|m| m.modified()).ok().map(utc);
    let members: Vec<_> = machine.members().filter(|member| member.is_live()).collect();
    match output {
        Output::Json => out!(
            "{}",
            json!({
                "file": file, "bytes": backup.bytes.to_string(), "sha256": hex(&backup.digest), "time": time,
                "revision": machine.revision().0.to_string(), "compact_revision": machine.compacted().0.to_string(),
                "index": backup.position.index.0.to_string(), "term": backup.position.term.0.to_string(),
                "cluster_id": machine.cluster().to_string(), "issuer_id": hex(&machine.issuer()),
                "behaviour_version": machine.behaviour(), "keys": counts.keys.to_string(),
                "revisions_kept": counts.revisions_kept.to_string(), "sessions": counts.sessions.to_string(),
                "locks": counts.locks_held.to_string(), "waiters": counts.waiters.to_string(),
                "members": members.iter().map(|member| json!({
                    "id": member.id.0.to_string(), "name": member.name, "peer": member.peer,
                    "voter": backup.voters.contains(&member.id),
                })).collect::<Vec<_>>(),
            })
        ),
        Output::Table => {
            let names: Vec<String> = members
                .iter()
                .map(|member| format!("{} ({:016x}, {})", member.name, member.id.0, member.peer))
                .collect();
            let lines = [
                ("file", format!("{}, {} bytes", file.display(), backup.bytes)),
                ("sha256", hex(&backup.digest)),
                ("time", time.unwrap_or_else(|| "unknown".to_owned())),
                ("revision", format!("{} (compacted up to {})", machine.revision(), machine.compacted())),
                ("log", format!("entry {} of term {}", backup.position.index, backup.position.term)),
                ("cluster", format!("{:016x}", machine.cluster())),
                ("issuer", hex(&machine.issuer())),
                ("keys", format!("{} in {} versions", counts.keys, counts.revisions_kept)),
                ("sessions", counts.sessions.to_string()),
                ("locks", format!("{} held, {} waiting", counts.locks_held, counts.waiters)),
                ("members", names.join(", ")),
            ];
            for (name, value) in lines {
                out!("{name:<9} {value}");
            }
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// As RFC 3339, to the second.
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years that begin in March have their leap day at the end; 400 of them have 146,097 days.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let check = |seconds: u64, expected: &str| {
            assert_eq!(utc(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        };
        check(0, "1970-01-01T00:00:00Z");
        check(951_782_399, "2000-02-28T23:59:59Z");
        check(951_782_400, "2000-02-29T00:00:00Z");
        check(1_577_836_800, "2020-01-01T00:00:00Z");
        check(1_735_689_599, "2024-12-31T23:59:59Z");
        check(4_107_542_400, "2100-03-01T00:00:00Z");
    }
}
