//! The shell around one member of Tenure: sockets, HTTP and gRPC, pages, metrics.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod metrics;
pub mod pages;
pub mod rpc;
