//! Judges of what clients saw and of what a recovered member holds.
//!
//! Each oracle knows the promise that it guards and nothing of how the member keeps it. A complaint is a sentence; the run that
//! it ends tells the seed.

pub mod duties;
pub mod leases;
pub mod ledger;
pub mod linear;
pub mod locks;
pub mod primitives;
pub mod requests;
pub mod retention;
pub mod rights;
pub mod rollouts;
pub mod standing;
pub mod state;
pub mod versions;
