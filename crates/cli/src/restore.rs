//! `tenure restore`: a backup becomes the folder of a new lone member; others are added to it afterwards.

use crate::common::{Failure, exit};
use crate::snapshot::{failure, hex};
use anyhow::Result;
use std::path::PathBuf;
use std::process::ExitCode;
use tenure_server::backup::{self, RestoreConfig, RestoreError};

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("fate").required(true).args(["replace", "clone"])))]
pub(crate) struct RestoreArgs {
    /// What `tenure snapshot save` wrote
    file: PathBuf,
    /// Folder to make; empty or not there
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Name of the new member, as `tenure serve` will be given it
    #[arg(long)]
    name: String,
    /// Cluster token, as `tenure serve` will be given it
    #[arg(long, default_value = DEFAULT_TOKEN, value_name = "TEXT")]
    cluster_token: String,
    /// The backed-up cluster is gone for good and this one takes its place: tokens stay comparable and go on higher
    #[arg(long)]
    replace: bool,
    /// A copy beside the backed-up cluster: another cluster and another issuer of tokens
    #[arg(long)]
    clone: bool,
    /// First revision, where the clock cannot be trusted: above all that was ever given; 2^20 per second since 2020 unless given
    #[arg(long, value_name = "N")]
    revision: Option<u64>,
}

const DEFAULT_TOKEN: &str = "tenure-cluster";

pub(crate) fn run(args: RestoreArgs) -> Result<ExitCode> {
    let config = RestoreConfig {
        file: args.file,
        data_dir: args.data_dir,
        name: args.name,
        cluster_token: args.cluster_token,
        clone: args.clone,
        revision: args.revision,
    };
    let made = backup::restore(&config).map_err(refused)?;
    out!(
        "restored {} into {}: revision {} became {}, member {:016x}, cluster {:016x}, issuer {}",
        config.file.display(),
        config.data_dir.display(),
        made.backup_revision,
        made.revision,
        made.member.0,
        made.cluster,
        hex(&made.issuer)
    );
    let token = match config.cluster_token.as_str() {
        DEFAULT_TOKEN => String::new(),
        token => format!(" --cluster-token '{token}'"),
    };
    out!("start it:     tenure serve --name {} --data-dir {}{token}", config.name, config.data_dir.display());
    out!("then grow it: tenure member add NAME --peer HOST:PORT");
    if args.replace {
        out!("never start a member of the old cluster again: both would give out tokens of this issuer");
    }
    Ok(ExitCode::SUCCESS)
}

fn refused(error: RestoreError) -> Failure {
    match &error {
        RestoreError::Backup(error) => failure(error),
        RestoreError::ClockBehind(_) | RestoreError::ClockTooLow { .. } => {
            Failure::new(exit::CONFLICT, error.to_string()).hint(
                "a number that is too low gives tokens again that were given before: when in doubt, correct the clock",
            )
        }
        RestoreError::Folder(_) | RestoreError::Random(_) => Failure::new(exit::FAILURE, error.to_string()),
    }
}
