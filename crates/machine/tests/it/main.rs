//! Tests of the state machine through its public interface. `scripts/*.txt` show one promise each.
#![allow(clippy::unwrap_used)]

mod cluster;
mod equal;
mod golden;
mod limits;
mod model;
mod native;
mod script;
