//! `tenure txn`: run one transaction over all primitives.

use std::process::ExitCode;

use clap::Args;

use crate::common::Common;

#[derive(Debug, Args)]
pub(crate) struct TxnArgs {}

pub(crate) async fn run(_: &Common, _: TxnArgs) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
