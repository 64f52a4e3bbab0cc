//! `tenure idem`: begin, complete and look at idempotency records.

use std::process::ExitCode;

use clap::Args;

use crate::common::Common;

#[derive(Debug, Args)]
pub(crate) struct IdemArgs {}

pub(crate) async fn run(_: &Common, _: IdemArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
