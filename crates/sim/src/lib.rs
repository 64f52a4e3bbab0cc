//! Members, disks and clocks of Tenure under one seed, and the oracles that judge what clients saw.
//!
//! Promises. A run is a function of its seed: `ci` runs some twice and compares every byte. A finding is one line with the seed,
//! the commit and the command that shows it again.
//! Not promised. That what no oracle looks at is right; `tests` shows for each oracle a bug that it catches.
//! Relies on. The member has no clock, no chance and no thread of its own (`tenure-replica`).
//!
//! Route: `world.rs` plays one member on `disk.rs` with the clients of `client.rs`, judged by `oracle/`; `cluster/` plays several with
//! the network between them; `lists.rs` plays
//! entries against `model.rs`; `fuzz.rs` mutates bytes; `main.rs` counts.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod client;
pub mod cluster;
pub mod disk;
pub mod fuzz;
pub mod lists;
pub mod model;
pub mod oracle;
pub mod random;
pub mod trace;
pub mod world;
