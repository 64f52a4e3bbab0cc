//! Whole clusters under one seed: members, the network between them, the clients, and everything that can happen to them.
//!
//! Promises. Each step of a run is drawn from its seed and nothing else. Faults come first; then everything heals, and the cluster
//! must serve again at every member within bounded simulated time, driven by nothing but messages and the moments that the members
//! ask for themselves (`Effects::wake_at`). What is judged, and by whom: `judge.rs` and `oracle/`.
//! Not promised. That members run in parallel within one poll: a poll takes no time, but a crash may end it at any call to the disk.
//! Relies on. A member has no clock, no chance and no thread of its own.
//!
//! Route: `world.rs` has the queue of events and what each does; `node.rs` one member's process on its disk; `net.rs` connections and
//! messages; `people.rs` the clients; `nemesis.rs` what goes wrong; `judge.rs` what must not.

mod duties;
mod judge;
mod native;
mod nemesis;
mod net;
mod node;
mod people;
mod world;

pub use native::NativeBug;
pub use world::{Bug, Options, Report, run};
