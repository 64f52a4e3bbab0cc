//! `tenure elect`: run a command while elected, or look at an election.

use std::process::ExitCode;

use clap::Args;

use crate::common::Common;

#[derive(Debug, Args)]
pub(crate) struct ElectArgs {}

pub(crate) async fn run(_: &Common, _: ElectArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
