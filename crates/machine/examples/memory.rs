//! What a number of keys costs: resident memory beside the accounted bytes, and the time of the usual operations on one thread.
//!
//! `cargo run -p tenure-machine --example memory -- [keys] [value bytes]`; a million keys of 24 bytes with 256 bytes
//! each unless told otherwise. The keys come in a scattered order, which is the harder one for the index.
//! It measures the key store alone, whose types are private, so it includes the modules as they are.
#![allow(dead_code, unreachable_pub, unused_imports)]
// The store may not look at a clock; this measures it with one.
#![allow(clippy::disallowed_types, clippy::disallowed_methods)]

#[path = "../src/apply.rs"]
mod apply;
#[path = "../src/check.rs"]
mod check;
#[path = "../src/codec.rs"]
mod codec;
#[path = "../src/coded.rs"]
mod coded;
#[path = "../src/command.rs"]
mod command;
#[path = "../src/conditions.rs"]
mod conditions;
#[path = "../src/configs.rs"]
mod configs;
#[path = "../src/counters.rs"]
mod counters;
#[path = "../src/deadlocks.rs"]
mod deadlocks;
#[path = "../src/elections.rs"]
mod elections;
#[path = "../src/history.rs"]
mod history;
#[path = "../src/idempotency.rs"]
mod idempotency;
#[path = "../src/keys.rs"]
mod keys;
#[path = "../src/lock_events.rs"]
mod lock_events;
#[path = "../src/lock_ops.rs"]
mod lock_ops;
#[path = "../src/locks.rs"]
mod locks;
#[path = "../src/log.rs"]
mod log;
#[path = "../src/markers.rs"]
mod markers;
#[path = "../src/members.rs"]
mod members;
#[path = "../src/memory.rs"]
mod memory;
#[path = "../src/native.rs"]
mod native;
#[path = "../src/objects.rs"]
mod objects;
#[path = "../src/ordered.rs"]
mod ordered;
#[path = "../src/query.rs"]
mod query;
#[path = "../src/queues/mod.rs"]
mod queues;
#[path = "../src/record.rs"]
mod record;
#[path = "../src/registry.rs"]
mod registry;
#[path = "../src/reply.rs"]
mod reply;
#[path = "../src/requests.rs"]
mod requests;
#[path = "../src/reservations.rs"]
mod reservations;
#[path = "../src/restore.rs"]
mod restore;
#[path = "../src/schedules.rs"]
mod schedules;
#[path = "../src/seen.rs"]
mod seen;
#[path = "../src/sessions.rs"]
mod sessions;
#[path = "../src/snapmap.rs"]
mod snapmap;
#[path = "../src/snapshot.rs"]
mod snapshot;
#[path = "../src/tallies.rs"]
mod tallies;
#[path = "../src/types.rs"]
mod types;
#[path = "../src/waits.rs"]
mod waits;

pub use apply::{BEHAVIOUR, Fault, Machine, Position};
pub use codec::{DecodeError, MAX_DEPTH};
pub use command::*;
pub use conditions::Condition;
pub use configs::{Config, ConfigOp, ConfigReply};
pub use counters::{Counter, CounterOp, CounterReply};
pub use elections::{Election, ElectionOp, ElectionReply};
pub use idempotency::{
    AttemptBegin, AttemptCheckpoint, AttemptComplete, AttemptDecision, AttemptFail, AttemptGranted, AttemptHeartbeat,
    AttemptInFlight, AttemptPhase, AttemptPoint, AttemptReconcile, AttemptReplay, BadField, DoneRecord, Fingerprint,
    IdempotencyOp, IdempotencyRecord, IdempotencyReply, IdempotencyState, NotRetained, OpenRecord, PackedResult,
    RecordName, RecordState, ResultBody, StoredResult, bounds as idempotency_bounds,
};
pub use keys::ChangeSlice;
pub use lock_events::LockEvents;
pub use lock_ops::{LockOp, LockReply};
pub use locks::{LockInfo, WaiterInfo};
pub use markers::{Marker, MarkerOp, MarkerReply};
pub use members::MEMBERS_MAX;
pub use native::{NativeOp, NativeReply, Refusal, RefusalCode};
pub use objects::{Object, Stored};
pub use query::{Counts, Memory, MemoryLimits, Overload};
pub use queues::{Job, Queue, QueueOp, QueueReply};
pub use record::{Meta, Record};
pub use registry::{Instance, RegistryOp, RegistryReply};
pub use reply::*;
pub use reservations::{Hold, Pool, ReservationOp, ReservationReply};
pub use schedules::{Schedule, ScheduleOp, ScheduleReply};
pub use sessions::SessionInfo;
pub use snapshot::Loader;
pub use types::*;

use keys::Keys;
use std::time::{Duration, Instant};

fn main() {
    let mut numbers = std::env::args().skip(1).map(|a| a.parse().expect("arguments are numbers"));
    let keys = numbers.next().unwrap_or(1_000_000);
    let value = vec![b'v'; numbers.next().unwrap_or(256) as usize];
    let start = resident_kib();
    println!("{keys} keys of 24 bytes, values of {} bytes", value.len());

    let mut store = Keys::new();
    let mut now = Revision(1);
    let took = timed(|| (0..keys).for_each(|n| put(&mut store, &mut now, scattered(n, keys), &value)));
    report("put, new", took, keys, &store, start);
    busy(&mut store, now, keys);

    let took = timed(|| (0..keys).for_each(|n| put(&mut store, &mut now, scattered(n * 7, keys), &value)));
    report("put, over old", took, keys, &store, start);
    historical(&store, now, keys);
    store.compact(now);
    let mut slowest = Duration::ZERO;
    let took = timed(|| {
        let mut more = true;
        while more {
            slowest = slowest.max(timed(|| more = store.maintain(1000)));
        }
    });
    report("compaction", took, keys, &store, start);
    println!("  slowest slice of 1,000: {slowest:?}");

    let mut blocks = Vec::new();
    let took = timed(|| blocks = snapshot(&mut store, now));
    report("snapshot", took, keys, &store, start);
    drop(store);
    let loading = resident_kib();
    let mut store = None;
    let took = timed(|| {
        let records = blocks.iter().flat_map(|b| {
            let mut rest = b.as_slice();
            std::iter::from_fn(move || take_record(&mut rest))
        });
        store = Keys::load(records, now);
    });
    let store = store.expect("a snapshot that was just written loads");
    drop(blocks);
    report("load", took, keys, &store, start);
    println!("  (resident before loading, with the blocks: {} MiB)", loading.saturating_sub(start) / 1024);
}

/// Gets and ranges, and changes of few keys.
fn busy(store: &mut Keys, now: Revision, keys: u64) {
    let mut found = 0;
    let took =
        timed(|| (0..keys).for_each(|n| found += u64::from(store.get(key(scattered(n, keys)).as_bytes()).is_some())));
    println!("get: {:.0} ns each, {found} found", took.as_nanos() as f64 / keys as f64);
    let ten_thousand = Range::of(Span { start: key(0), end: Some(key(10_000)) });
    let mut best = Duration::MAX;
    let mut held = 0;
    for _ in 0..20 {
        best = best.min(timed(|| held = store.range(&ten_thousand, now).expect("now is readable").records.len()));
    }
    println!("range of {held} keys: {:.0} ns a key", best.as_nanos() as f64 / held as f64);
    let all = Range { limit: 10, ..Range::of(Span { start: key(0), end: Some(key(u64::MAX)) }) };
    let mut count = 0;
    let took = timed(|| count = store.range(&all, now).expect("now is readable").count);
    println!("range of 10 with the count of {count}: {took:?}");
}

fn historical(store: &Keys, now: Revision, keys: u64) {
    let at = Revision(now.0 - keys.min(1000)).0 as i64;
    let range = Range { revision: at, limit: 500, ..Range::of(Span { start: key(0), end: Some(key(u64::MAX)) }) };
    let took = timed(|| drop(store.range(&range, now)));
    println!("page of 500 at a revision 1,000 changes ago, with the count: {took:?}");
    let range =
        Range { revision: (now.0 - keys / 2) as i64, ..Range::of(Span { start: key(0), end: Some(key(10_000)) }) };
    let took = timed(|| drop(store.range(&range, now)));
    println!("range of 10,000 keys far in the past: {:.0} ns a key", took.as_nanos() as f64 / keys.min(10_000) as f64);
    let everything = Span { start: key(0), end: Some(key(u64::MAX)) };
    let mut changes = 0;
    let took = timed(|| changes = store.changes(&everything, Revision(2), 1 << 20, now).map_or(0, |s| s.changes.len()));
    println!("catch-up: {changes} changes in {took:?}");
}

fn snapshot(store: &mut Keys, now: Revision) -> Vec<Vec<u8>> {
    let (mut blocks, mut cursor, mut more) = (Vec::new(), None, true);
    store.pin(now);
    while more {
        let mut block = Vec::with_capacity(132 << 10);
        more = store.snapshot_slice(&mut cursor, now, 128 << 10, &mut block);
        blocks.push(block);
    }
    store.unpin();
    blocks
}

fn take_record(block: &mut &[u8]) -> Option<record::Record> {
    let len = record::take_varint(block)? as usize;
    let (record, rest) = block.split_at_checked(len)?;
    *block = rest;
    record::Record::from_bytes(record)
}

fn put(store: &mut Keys, now: &mut Revision, n: u64, value: &[u8]) {
    *now = now.next();
    store.put(key(n).as_bytes(), value, b"", SessionId(0), *now, 0);
}

/// Every number below `of` once, in a scattered order (for sizes that the prime does not divide).
fn scattered(n: u64, of: u64) -> u64 {
    (n % of) * 1_000_003 % of
}

fn key(n: u64) -> Key {
    Key::new(Space::Keys, NamespaceId::DEFAULT, format!("/bench/{n:017}").as_bytes())
}

fn timed(f: impl FnOnce()) -> Duration {
    let start = Instant::now();
    f();
    start.elapsed()
}

fn report(what: &str, took: Duration, keys: u64, store: &Keys, start: u64) {
    let memory = store.memory();
    println!(
        "{what}: {took:.2?}, {:.0} ns each; resident {} MiB, accounted {} MiB, of it history {} MiB",
        took.as_nanos() as f64 / keys as f64,
        resident_kib().saturating_sub(start) / 1024,
        memory.bytes >> 20,
        memory.history >> 20,
    );
}

/// Linux tells it; elsewhere the number is left out as zero.
fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse().ok()).unwrap_or(0)
}
