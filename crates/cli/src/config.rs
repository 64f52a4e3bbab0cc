//! `tenure config`: publish, read, follow and roll back configuration.

use std::process::ExitCode;

use clap::Args;

use crate::common::Common;

#[derive(Debug, Args)]
pub(crate) struct ConfigArgs {}

pub(crate) async fn run(_: &Common, _: ConfigArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
