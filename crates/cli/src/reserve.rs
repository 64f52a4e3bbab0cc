//! `tenure reserve`: reserve a part of a pool.

use std::process::ExitCode;

use clap::Args;

use crate::common::Common;

#[derive(Debug, Args)]
pub(crate) struct ReserveArgs {}

pub(crate) async fn run(_: &Common, _: ReserveArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
