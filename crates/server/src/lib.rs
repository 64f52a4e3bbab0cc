//! The shell around one member of Tenure: sockets, HTTP and gRPC, pages, metrics.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod front;
pub mod metrics;
mod openapi;
pub mod pages;
pub mod rpc;
mod transcode;
