//! `tenure counter`: add to counters and take numbers from sequences.

use std::process::ExitCode;

use clap::Args;

use crate::common::Common;

#[derive(Debug, Args)]
pub(crate) struct CounterArgs {}

pub(crate) async fn run(_: &Common, _: CounterArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
