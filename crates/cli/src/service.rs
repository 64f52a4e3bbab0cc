//! `tenure service`: register and find instances of services.

use std::process::ExitCode;

use clap::Args;

use crate::common::Common;

#[derive(Debug, Args)]
pub(crate) struct ServiceArgs {}

pub(crate) async fn run(_: &Common, _: ServiceArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
