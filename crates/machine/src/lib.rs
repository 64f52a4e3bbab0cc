//! The replicated state machine of Tenure: everything that decides, and nothing that acts.
//!
//! Promises. M1: equal logs give equal states, replies and changes on every member, whatever its flags, clock or release.
//! M2: a transaction applies whole or not at all, and a refused one changes nothing but the table of remembered requests.
//! M3: changes leave in (revision, index) order. M4: a remembered request is answered again, never run again.
//! Not promised. That the log is durable or agreed (the `replica` crate), or that anything is fast enough for a hot loop
//! to ignore it.
//! Relies on. Entries arrive in log order, each once; their bytes are those that were proposed.
//!
//! There is no clock, no randomness, no thread, no IO and no hash order in here: time is the stamp of an entry, random ids
//! are drawn by the proposer and carried, and every map is ordered.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod apply;
mod check;
mod codec;
mod coded;
mod command;
mod conditions;
mod configs;
mod counters;
mod deadlocks;
mod elections;
mod history;
mod idempotency;
mod keys;
mod lock_events;
mod lock_ops;
mod locks;
mod log;
mod markers;
mod members;
mod memory;
mod native;
mod objects;
mod ordered;
mod query;
mod queues;
mod record;
mod registry;
mod reply;
mod requests;
mod reservations;
mod restore;
mod schedules;
mod seen;
mod sessions;
mod snapmap;
mod snapshot;
mod tallies;
mod types;
mod waits;

pub use apply::{BEHAVIOUR, Fault, LockCounts, Machine, Position};
pub use codec::{DecodeError, MAX_DEPTH};
pub use command::*;
pub use conditions::{
    Condition, ConditionOp, ConditionReply, CounterWithin, Failed, HeldAttempt, HeldLock, RegisteredInstance,
};
pub use configs::{
    CONFIG_CONTENT_BYTES_MAX, CONFIG_KEY_BYTES_MAX, CONFIG_NOTES_BYTES_MAX, CONFIG_SCHEMA_BYTES_MAX, Config,
    ConfigAfter, ConfigAt, ConfigCandidate, ConfigNote, ConfigOp, ConfigPublish, ConfigReply, ConfigSchema,
    ConfigSchemaSet, ConfigStage, ConfigVersion, ROLLOUT_ALL, ROLLOUT_LABEL_BYTES_MAX, ROLLOUT_LABELS_MAX, Rollout,
};
pub use counters::{
    BLOCK_MAX, Counter, CounterAdd, CounterDelete, CounterExpect, CounterOp, CounterReply, CounterSet, Numbers,
    SEQUENCE_MAX, Sequence, SequenceNext,
};
pub use elections::{
    Campaign, CampaignWait, Candidate, ELECTION_VALUE_MAX, Elected, Election, ElectionInfo, ElectionOp, ElectionReply,
    Leader, Left, Proclaim, Resign, Withdraw, Withdrawn,
};
pub use idempotency::{
    AttemptBegin, AttemptCheckpoint, AttemptComplete, AttemptDecision, AttemptFail, AttemptGranted, AttemptHeartbeat,
    AttemptInFlight, AttemptPhase, AttemptPoint, AttemptReconcile, AttemptReplay, BadField, DoneRecord, Fingerprint,
    IdempotencyOp, IdempotencyRecord, IdempotencyReply, IdempotencyState, NotRetained, OpenRecord, PackedResult,
    RecordName, RecordState, ResultBody, StoredResult, bounds as idempotency_bounds,
};
pub use keys::ChangeSlice;
pub use lock_events::{LockEvent, LockEventKind, LockEvents};
pub use lock_ops::{
    DELAY_MAX_MS, LOCKS_OF_ONE_MAX, LockAsk, LockForceRelease, LockGranted, LockItem, LockOp, LockPart, LockRelease,
    LockReply, LockResize, MIN_HOLD_MAX_MS, OnDeadlock, REASON_BYTES_MAX,
};
pub use locks::{HoldInfo, HoldMode, LockInfo, PERMITS_MAX, Permits, WaiterInfo};
pub use markers::{
    AlreadyDone, MARKER_FIELDS_MAX, MARKER_LEASE_MS, MARKER_NAME_MAX, MARKER_RESULT_MAX, MARKER_RETENTION_MIN_MS,
    MARKER_TEXT_MAX, MarkOnce, Marked, Marker, MarkerClaim, MarkerConfirm, MarkerDelete, MarkerEvent, MarkerEventKind,
    MarkerGrant, MarkerOp, MarkerRelease, MarkerReply, MarkerState, OnDeath, canonical_marker_name, marker_name,
};
pub use members::MEMBERS_MAX;
pub use native::{NativeOp, NativeReply, Refusal, RefusalCode};
pub use objects::{Object, Stored, is_busy};
pub use query::{Counts, Memory, MemoryLimits, Overload};
pub use queues::{
    Ack, AckJobs, Beat, Breaker, CancelJob, ConfigureQueue, DeadFilter, Dedup, DedupScope, Delivered, Enqueue,
    Enqueued, HowEnded, JOB_HEADERS_MAX, JOB_KEY_MAX, JOB_PAYLOAD_MAX, JOB_RESULT_MAX, JOB_STATES, JOBS_PER_CALL, Job,
    JobCounts, JobEnd, JobHeartbeat, JobId, JobInfo, JobLease, JobState, JobTerms, Moved, Nack, NewJob, OnDead,
    OnDuplicate, PastDelivery, Purge, QUEUE_NAME_MAX, Queue, QueueInfo, QueueOp, QueueReply, QueueSettings,
    RECEIVE_PLACES_MAX, Receipt, Receive, Received, Redrive, Settled, Swept, Tally, waiting_receiver,
};
pub use record::{Meta, Record};
pub use registry::{
    ActiveCheck, Check, Drain, Health, HealthCounts, Heartbeat, Instance, InstanceRef, InstanceSpec, NOT_CHECKED,
    Probe, Probed, ProbedInstance, Pulse, Register, Registration, RegistryChange, RegistryChanged, RegistryOp,
    RegistryReply, Service, ServiceGuard, ServiceInfo,
};
pub use reply::*;
pub use requests::forgotten_with;
pub use reservations::{
    CAPACITY_MAX, HOLD_MS_MAX, HOLD_MS_MIN, HOLD_OWNER_BYTES_MAX, Held, Hold, HoldAfter, HoldRef, HoldState,
    POOL_NAME_BYTES_MAX, Pool, PoolAmount, PoolCreate, PoolWaiter, ReservationOp, ReservationReply, Reserve,
};
pub use schedules::{
    CALENDAR_BYTES_MAX, DueSchedule, Missed, SCHEDULE_NAME_MAX, Schedule, ScheduleAt, ScheduleName, ScheduleOp,
    SchedulePlan, SchedulePut, ScheduleReply, ScheduleStored, ScheduleTick, Ticked, Trouble,
};
pub use seen::{LOCKS, SESSIONS, Seen, SharedLock, kind_of};
pub use sessions::SessionInfo;
pub use snapshot::Loader;
pub use tallies::{BEGIN_OUTCOMES, FENCED_KINDS, Tallies, WAIT_BOUNDS_MS, WaitTally};
pub use types::*;
