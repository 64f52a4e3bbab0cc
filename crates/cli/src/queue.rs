//! `tenure queue`: enqueue, receive and settle jobs.

use std::process::ExitCode;

use clap::Args;

use crate::common::Common;

#[derive(Debug, Args)]
pub(crate) struct QueueArgs {}

pub(crate) async fn run(_: &Common, _: QueueArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
