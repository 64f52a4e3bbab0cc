//! The same work on Tenure, by its own Rust client, a connection for each caller.

use super::super::load::Target;
use super::super::measure::Figures;
use anyhow::Result;

pub(crate) async fn queue(_t: &Target) -> Result<Figures> {
    super::super::native::lock(_t, true).await
}

pub(crate) async fn once(_t: &Target) -> Result<Figures> {
    super::super::native::lock(_t, true).await
}
