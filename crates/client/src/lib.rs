//! The Rust client of Tenure: keys, sessions, fenced locks and watches, with outcomes told apart.
//!
//! Promises.
//! - A change happens at most once: every try of a call carries one request id, and only then is it tried again.
//! - A failure says what is known: refused with the facts, not applied, unavailable (never sent), or *unknown* ([`Error`]).
//! - A [`Session`] knows its own deadline, counted from the sending of its renewals on a clock that counts suspension, and is lost
//!   at that moment whether or not the server can be asked ([`lease`]).
//! - A [`Watch`] loses and repeats no event over reconnects, and tells when history was compacted away under it.
//!
//! Not promised. A lock alone cannot stop a paused process from acting after its lease ended. Let the write itself be checked: give
//! the fencing token to the resource, or use [`Put::require_lock`] and its siblings for keys of this service.
//!
//! ```no_run
//! # async fn example() -> Result<(), tenure_client::Error> {
//! use std::time::Duration;
//! use tenure_client::Client;
//!
//! let client = Client::connect(["127.0.0.1:2379"]).await?;
//! let session = client.session().ttl(Duration::from_secs(15)).name("nightly report").await?;
//! let guard = session.lock("reports/nightly").wait(Duration::from_secs(30)).await?;
//! tokio::select! {
//!     reason = guard.lost() => eprintln!("stopped: {reason}"),
//!     result = async {
//!         // The check and the write are one step at the server: a stale owner is refused, however late it comes.
//!         client.put("reports/last", "2026-01-31").require_lock(&guard).await
//!     } => println!("written at revision {}", result?.revision),
//! }
//! guard.release().await?;
//! session.end().await
//! # }
//! ```
//!
//! Leaves out. TLS and passwords, which the server of this version does not have either.

#![warn(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod client;
mod clock;
mod config;
mod counter;
mod election;
mod error;
mod idempotent;
mod kv;
pub mod lease;
mod lock;
mod once;
mod one_task;
mod pipeline;
mod queue;
mod registry;
mod requests;
mod reservation;
mod schedule;
mod session;
mod things;
#[cfg(feature = "tower")]
pub mod tower;
mod txn;
mod update;
mod watch;

pub use client::{Client, ClientOptions, RETRY_MAX};
pub use clock::BootTime;
pub use config::{
    Config, ConfigChange, ConfigEvent, ConfigRollout, ConfigVersion, ConfigWatch, FollowConfig, PublishConfig,
    ReadConfig, WatchConfig,
};
pub use counter::{Counter, CounterAdd, CounterDelete, CounterInfo, CounterSet, Sequence, SequenceInfo};
pub use election::{Election, ElectionCandidate, ElectionInfo, ElectionLeader, Leadership, Observing};
pub use error::{Code, Error, Holder, Outcome, Problem};
pub use idempotent::{
    Attempt, BODY_BYTES_MAX, Begun, BodySink, Checkpoint, Decision, Failure, Fingerprint, Idempotent, InFlight,
    NotRetained, Ran, RecordInfo, Replay, RunError, StoredResult, Takeover, derive,
};
pub use kv::{
    Compare, Comparing, Delete, DeleteReply, Get, LockProof, Op, OpReply, Put, PutReply, Range, RangeReply, Record,
    Txn, TxnReply,
};
pub use lease::{LeaseState, LeaseTiming, LostReason};
pub use lock::{Acquire, LockEvent, LockGuard, LockHolder, LockInfo, LockMode, LockWaiter, OnDeadlock};
pub use once::{
    Claim, ClaimMarker, Claimed, Marker, MarkerEvent, MarkerName, MarkerState, OnDeath, Once, OnceMark, OnceRan,
    PutOnce, Retention,
};
pub use queue::{
    Delivery, Enqueued, Failed, JobAttempt, JobBeat, JobInfo, JobMoved, NewJob, OnDuplicate, Queue, QueueBreaker,
    QueueChange, QueueInfo, QueueSettings, Receive, Redrive, Work, WorkDone,
};
pub use registry::{
    Finding, Following, Health, Registered, Registering, Registry, ServiceCache, ServiceCheck, ServiceInstance,
    ServiceInstances, ServiceSummary,
};
pub use reservation::{Hold, HoldState, Pool, PoolInfo, PoolWaiter, Reservation, ReservationChange, Reserve};
pub use schedule::{PutSchedule, Schedule, ScheduleInfo, ScheduleStored};
pub use session::{CreateSession, OnExpire, Session, SessionInfo};
pub use things::{Thing, ThingEvent, ThingWatch, WatchingThings};
pub use txn::{
    Answer, AttemptProof, Check, FailedCheck, HoldRef, InstanceRef, LeadProof, Receipt, Step, Transaction,
    TransactionReply,
};
pub use update::Updated;
pub use watch::{EventKind, Watch, WatchEvent, Watching};
