//! `tenure once`: do something once per marker.

use std::process::ExitCode;

use clap::Args;

use crate::common::Common;

#[derive(Debug, Args)]
pub(crate) struct OnceArgs {}

pub(crate) async fn run(_: &Common, _: OnceArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
