//! The watch hub: carries each change to those who watch its key. It lives on the driver's thread and does no IO.
//!
//! Promises. W1: a watcher sees every change of its span from its start revision on, once, in revision order. W2: the changes of one
//! revision arrive in one answer, unless the watcher allowed fragments. W3: registration is atomic with the state it is made at: a
//! watcher without a start revision sees exactly what is committed after its `created`. W4: a progress answer with revision R comes
//! after every change up to R on that stream. W5: a stream that its client reads too slowly costs at most its limit plus one revision; its
//! watchers fall behind and are caught up from history in slices, and neither writers nor other streams wait for it. W6: the bytes of an event
//! are made once per revision and variant, however many watch the key.
//! Not promised. That a watcher which fell behind the compact revision gets what was compacted: it is cancelled with that revision.
//! Relies on. `publish` is called with every change, in order, before anything newer is read from the machine.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use tenure_machine::{Change, Key, Machine, Rejection, Revision, Space, Span};

use crate::etcd::encode::{self, Identity};
use crate::rpc::FRAME_HEAD;
use crate::span_index::{SpanIndex, WatcherId};

/// Bytes that may wait for one stream before its watchers fall behind.
pub(crate) const STREAM_BYTES_MAX: usize = 4 << 20;
/// Catch-up goes on when at most this much of it waits.
const STREAM_BYTES_LOW: usize = 1 << 20;
/// History read in one slice of catching up: small enough that a writer does not notice it.
const SLICE_BYTES: usize = 256 << 10;

/// The way from the driver to one stream: buffers of framed messages, taken by the task of the stream.
#[derive(Debug, Default)]
pub(crate) struct StreamOut {
    queue: Mutex<VecDeque<Bytes>>,
    /// Bytes handed over and not yet taken by the front.
    bytes: AtomicUsize,
    pub(crate) wake: Arc<tokio::sync::Notify>,
    /// The task is gone: the driver forgets the stream at its next look.
    closed: AtomicBool,
    /// The driver waits for room.
    wants_room: AtomicBool,
    /// Set by the driver when the call must end, with no more to come.
    ended: AtomicBool,
}

impl StreamOut {
    /// Adds a buffer; whoever calls must wake the task afterwards.
    pub(crate) fn push(&self, frames: Bytes) {
        self.bytes.fetch_add(frames.len(), Ordering::Relaxed);
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(frames);
    }

    pub(crate) fn take(&self) -> Option<Bytes> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Tells that the front has taken this much; true when the driver waits to hear of it.
    pub(crate) fn sent(&self, len: usize) -> bool {
        let left = self.bytes.fetch_sub(len, Ordering::Relaxed) - len;
        left <= STREAM_BYTES_LOW && self.wants_room.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    pub(crate) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// What a watcher asks for.
#[derive(Clone, Debug)]
pub(crate) struct WatchCreate {
    /// 0: the hub chooses.
    pub(crate) id: i64,
    pub(crate) key: Bytes,
    /// As etcd has it: empty is the one key, a zero byte everything from the key on.
    pub(crate) range_end: Bytes,
    pub(crate) start_revision: i64,
    pub(crate) options: WatchOptions,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct WatchOptions {
    pub(crate) prev_kv: bool,
    pub(crate) no_put: bool,
    pub(crate) no_delete: bool,
    pub(crate) fragment: bool,
    pub(crate) progress: bool,
}

pub(crate) type StreamId = u64;

/// Figures for metrics, shared with the pages.
#[derive(Debug, Default)]
pub(crate) struct WatchFacts {
    pub(crate) streams: AtomicU64,
    pub(crate) watchers: AtomicU64,
    pub(crate) slow_watchers: AtomicU64,
    pub(crate) events: AtomicU64,
}

pub(crate) struct Hub {
    identity: Arc<Identity>,
    facts: Arc<WatchFacts>,
    /// A response of at least this size is cut for watchers that allow it.
    fragment_bytes: usize,
    progress_interval_ms: u64,
    streams: BTreeMap<StreamId, Stream>,
    next_stream: StreamId,
    watchers: Vec<Option<Watcher>>,
    free: Vec<WatcherId>,
    /// Those who have seen everything; the others are in the index of their stream.
    synced: SpanIndex,
    /// Streams with output to hand over.
    dirty: Vec<StreamId>,
    /// Streams whose watchers are being caught up, in turn.
    catching: VecDeque<StreamId>,
    found: Vec<WatcherId>,
    progress_at: u64,
}

struct Stream {
    out: Arc<StreamOut>,
    pending: BytesMut,
    is_dirty: bool,
    /// By watch id. A watcher cancelled by compaction leaves its id taken until the client cancels it, as in etcd.
    ids: BTreeMap<i64, Option<WatcherId>>,
    next_id: i64,
    behind: SpanIndex,
    is_catching: bool,
    progress_at: u64,
}

struct Watcher {
    stream: StreamId,
    id: i64,
    span: Span,
    options: WatchOptions,
    /// The lowest revision that it has not seen (or does not want).
    next: Revision,
    is_behind: bool,
    /// Place in the group of its index.
    place: usize,
    /// Had events since the last periodic progress, which is then left out.
    heard: bool,
}

impl Hub {
    pub(crate) fn new(
        identity: Arc<Identity>,
        facts: Arc<WatchFacts>,
        fragment_bytes: usize,
        progress_interval_ms: u64,
    ) -> Self {
        Self {
            identity,
            facts,
            fragment_bytes,
            progress_interval_ms: progress_interval_ms.max(100),
            streams: BTreeMap::new(),
            next_stream: 1,
            watchers: Vec::new(),
            free: Vec::new(),
            synced: SpanIndex::default(),
            dirty: Vec::new(),
            catching: VecDeque::new(),
            found: Vec::new(),
            progress_at: 0,
        }
    }

    pub(crate) fn open(&mut self, out: Arc<StreamOut>, now: u64) -> StreamId {
        let id = self.next_stream;
        self.next_stream += 1;
        // Streams opened together do not report together.
        let jitter = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (self.progress_interval_ms / 10).max(1);
        let stream = Stream {
            out,
            pending: BytesMut::new(),
            is_dirty: false,
            ids: BTreeMap::new(),
            next_id: 0,
            behind: SpanIndex::default(),
            is_catching: false,
            progress_at: now + self.progress_interval_ms + jitter,
        };
        self.streams.insert(id, stream);
        self.facts.streams.fetch_add(1, Ordering::Relaxed);
        id
    }

    pub(crate) fn close(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get(&id) else { return };
        let watchers: Vec<WatcherId> = stream.ids.values().flatten().copied().collect();
        for watcher in watchers {
            self.unregister(watcher);
        }
        self.streams.remove(&id);
        self.facts.streams.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn create(&mut self, stream_id: StreamId, request: &WatchCreate, machine: &Machine) {
        let revision = machine.revision();
        if request.start_revision < 0 {
            return self.refuse(stream_id, revision, "etcdserver: mvcc: required revision has been compacted");
        }
        // An empty key is the smallest one.
        let key: &[u8] = if request.key.is_empty() { &[0] } else { &request.key };
        let open_ended = request.range_end[..] == [0];
        if !open_ended && !request.range_end.is_empty() && key >= &request.range_end[..] {
            return self.refuse(stream_id, revision, "mvcc: watcher range is empty");
        }
        let Some(stream) = self.streams.get_mut(&stream_id) else { return };
        let id = if request.id == 0 {
            while stream.ids.contains_key(&stream.next_id) {
                stream.next_id += 1;
            }
            stream.next_id += 1;
            stream.next_id - 1
        } else if stream.ids.contains_key(&request.id) {
            return self.refuse(stream_id, revision, "mvcc: duplicate watch ID provided on the WatchStream");
        } else {
            request.id
        };
        let start = Revision(request.start_revision as u64);
        let is_behind = start.0 != 0 && start <= revision;
        let watcher = Watcher {
            stream: stream_id,
            id,
            span: Span::etcd(Space::Keys, tenure_machine::NamespaceId::DEFAULT, key, &request.range_end),
            options: request.options,
            next: if is_behind { start } else { start.max(revision.next()) },
            is_behind,
            place: 0,
            heard: false,
        };
        let at = self.store(watcher);
        if let Some(stream) = self.streams.get_mut(&stream_id) {
            stream.ids.insert(id, Some(at));
        }
        self.enter_index(at);
        self.facts.watchers.fetch_add(1, Ordering::Relaxed);
        self.control(stream_id, revision.0, id, |out| put_flag(out, 3));
        if is_behind {
            self.start_catching(stream_id);
        }
    }

    pub(crate) fn cancel(&mut self, stream_id: StreamId, id: i64, machine: &Machine) {
        let Some(stream) = self.streams.get_mut(&stream_id) else { return };
        // An unknown id is not answered.
        let Some(watcher) = stream.ids.remove(&id) else { return };
        if let Some(watcher) = watcher {
            self.unregister(watcher);
        }
        self.control(stream_id, machine.revision().0, id, |out| put_flag(out, 4));
    }

    /// The client asks how far the stream is. It is told only when every watcher is in sync and none starts in the future.
    pub(crate) fn progress(&mut self, stream_id: StreamId, machine: &Machine) {
        let revision = machine.revision();
        let Some(stream) = self.streams.get(&stream_id) else { return };
        let mut watchers =
            stream.ids.values().flatten().filter_map(|&at| self.watchers[at as usize].as_ref()).peekable();
        if watchers.peek().is_none() || !watchers.all(|watcher| !watcher.is_behind && watcher.next <= revision.next()) {
            return;
        }
        self.control(stream_id, revision.0, -1, |_| {});
    }

    /// Room appeared in the buffer of a stream.
    pub(crate) fn drained(&mut self, stream_id: StreamId) {
        if self.streams.get(&stream_id).is_some_and(|stream| !stream.behind.is_empty()) {
            self.start_catching(stream_id);
        }
    }

    /// Hands the changes of one round to everybody who is in sync.
    pub(crate) fn publish(&mut self, changes: &[Change]) {
        if self.synced.is_empty() {
            return;
        }
        for revision in changes.chunk_by(|a, b| a.record.meta().mod_revision == b.record.meta().mod_revision) {
            match revision {
                [change] => self.publish_one(change),
                changes => self.publish_many(changes),
            }
        }
    }

    fn publish_one(&mut self, change: &Change) {
        if change.record.key().first() != Some(&(Space::Keys as u8)) {
            return;
        }
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        self.synced.find(change.record.key(), &mut found);
        if !found.is_empty() {
            let meta = change.record.meta();
            let mut tails: [Option<Bytes>; 2] = [None, None];
            for &at in &found {
                let Some(watcher) = &mut self.watchers[at as usize] else { continue };
                if meta.mod_revision < watcher.next || watcher.options.drops(meta.tombstone) {
                    continue;
                }
                let tail = tails[usize::from(watcher.options.prev_kv)]
                    .get_or_insert_with(|| tail(&self.identity, meta.mod_revision, &[change], watcher.options.prev_kv));
                watcher.heard = true;
                let (stream, id) = (watcher.stream, watcher.id);
                self.deliver(at, stream, id, meta.mod_revision, tail, 1);
            }
        }
        self.found = found;
    }

    /// Several changes of one revision: each watcher gets those it watches in one answer.
    fn publish_many(&mut self, changes: &[Change]) {
        let mut wanted: BTreeMap<WatcherId, Vec<usize>> = BTreeMap::new();
        let mut found = std::mem::take(&mut self.found);
        let Some(first) = changes.first() else { return };
        let revision = first.record.meta().mod_revision;
        for (place, change) in changes.iter().enumerate() {
            if change.record.key().first() != Some(&(Space::Keys as u8)) {
                continue;
            }
            found.clear();
            self.synced.find(change.record.key(), &mut found);
            let tombstone = change.record.meta().tombstone;
            for &at in &found {
                let Some(watcher) = &self.watchers[at as usize] else { continue };
                if revision >= watcher.next && !watcher.options.drops(tombstone) {
                    wanted.entry(at).or_default().push(place);
                }
            }
        }
        self.found = found;
        let mut made = LastTail::default();
        for (at, places) in wanted {
            let Some(watcher) = &mut self.watchers[at as usize] else { continue };
            watcher.heard = true;
            let (stream, id, options) = (watcher.stream, watcher.id, watcher.options);
            let count = places.len();
            if options.fragment {
                if !self.has_room(stream) {
                    self.fall_behind(at, revision);
                    continue;
                }
                if self.deliver_fragments(at, revision, changes, &places) {
                    continue;
                }
            }
            let tail = made.get(&self.identity, revision, changes, places, options.prev_kv);
            self.deliver(at, stream, id, revision, &tail, count);
        }
    }

    /// Appends one answer to the stream of a synced watcher, or marks the watcher as behind where there is no room.
    fn deliver(
        &mut self,
        at: WatcherId,
        stream_id: StreamId,
        id: i64,
        revision: Revision,
        tail: &Bytes,
        events: usize,
    ) {
        if !self.has_room(stream_id) {
            return self.fall_behind(at, revision);
        }
        let Some(stream) = self.streams.get_mut(&stream_id) else { return };
        put_answer(&mut stream.pending, id, tail);
        mark_dirty(stream, stream_id, &mut self.dirty);
        self.facts.events.fetch_add(events as u64, Ordering::Relaxed);
    }

    /// A stream that is gone has: nothing comes of it.
    fn has_room(&self, stream_id: StreamId) -> bool {
        self.streams.get(&stream_id).is_none_or(|stream| stream.out.bytes() + stream.pending.len() < STREAM_BYTES_MAX)
    }

    fn fall_behind(&mut self, at: WatcherId, revision: Revision) {
        self.leave_index(at);
        let Some(watcher) = &mut self.watchers[at as usize] else { return };
        watcher.is_behind = true;
        watcher.next = revision;
        let stream_id = watcher.stream;
        self.enter_index(at);
        self.ask_for_room(stream_id);
    }

    /// The state was replaced by a later one without the changes in between: whoever was in sync is caught up from history, or told
    /// that it is gone. Everything up to `published` has been handed out.
    pub(crate) fn restored(&mut self, published: Revision) {
        for at in 0..self.watchers.len() as WatcherId {
            let Some(watcher) = self.watchers[at as usize].as_ref().filter(|watcher| !watcher.is_behind) else {
                continue;
            };
            let (next, stream) = (watcher.next.max(published.next()), watcher.stream);
            self.fall_behind(at, next);
            self.start_catching(stream);
        }
    }

    /// Wakes this stream's catch-up when its task has sent enough. The queue may have run dry meanwhile, so look again.
    fn ask_for_room(&mut self, stream_id: StreamId) {
        let Some(stream) = self.streams.get(&stream_id) else { return };
        if stream.is_catching {
            return;
        }
        stream.out.wants_room.store(true, Ordering::Release);
        if stream.out.bytes() + stream.pending.len() <= STREAM_BYTES_LOW
            && stream.out.wants_room.swap(false, Ordering::AcqRel)
        {
            self.start_catching(stream_id);
        }
    }

    fn start_catching(&mut self, stream_id: StreamId) {
        if let Some(stream) = self.streams.get_mut(&stream_id)
            && !stream.is_catching
        {
            stream.is_catching = true;
            self.catching.push_back(stream_id);
        }
    }

    /// One slice of catching up for one stream. True while more can be done at once.
    pub(crate) fn catch_up(&mut self, machine: &Machine) -> bool {
        let Some(stream_id) = self.catching.pop_front() else { return false };
        if let Some(stream) = self.streams.get_mut(&stream_id) {
            stream.is_catching = false;
            if stream.out.bytes() + stream.pending.len() >= STREAM_BYTES_MAX {
                self.ask_for_room(stream_id);
            } else if self.catch_up_stream(stream_id, machine) {
                self.start_catching(stream_id);
            }
        }
        !self.catching.is_empty()
    }

    /// Returns whether some watcher of the stream is still behind.
    fn catch_up_stream(&mut self, stream_id: StreamId, machine: &Machine) -> bool {
        let behind = self.behind_of(stream_id);
        let Some((from, span)) = self.bounds(&behind) else { return false };
        if from < machine.compacted() {
            self.cancel_compacted(&behind, machine.compacted());
            return true;
        }
        // Each of them may get all of it: together they stay within a slice, or at one revision.
        let bytes = (SLICE_BYTES / behind.len().max(1)).max(1);
        let slice = match machine.changes(&span, from, bytes) {
            Ok(slice) => slice,
            // Compacted between two looks: the next slice sees the new compact revision.
            Err(Rejection::Compacted { lowest }) => {
                self.cancel_compacted(&behind, lowest);
                return true;
            }
            Err(rejection) => {
                tracing::error!(%rejection, "reading history for a watcher failed");
                return false;
            }
        };
        self.send_slice(stream_id, &behind, &slice.changes, machine.revision());
        let mut any = false;
        for at in behind {
            any |= !self.advance(at, slice.next, machine.revision());
        }
        any
    }

    fn behind_of(&self, stream_id: StreamId) -> Vec<WatcherId> {
        let Some(stream) = self.streams.get(&stream_id) else { return Vec::new() };
        let is_behind = |at: &WatcherId| self.watchers[*at as usize].as_ref().is_some_and(|watcher| watcher.is_behind);
        stream.ids.values().flatten().copied().filter(is_behind).collect()
    }

    /// The lowest revision that any of these lacks, and a span that covers them all.
    fn bounds(&self, watchers: &[WatcherId]) -> Option<(Revision, Span)> {
        let mut all = watchers.iter().filter_map(|&at| self.watchers[at as usize].as_ref());
        let first = all.next()?;
        let mut from = first.next;
        let mut span = first.span.clone();
        for watcher in all {
            from = from.min(watcher.next);
            if watcher.span == span {
                continue;
            }
            let end = end_of(&span).max(end_of(&watcher.span));
            span = Span { start: span.start.min(watcher.span.start.clone()), end: Some(end) };
        }
        Some((from, span))
    }

    fn send_slice(&mut self, stream_id: StreamId, behind: &[WatcherId], changes: &[Change], now: Revision) {
        let mut wanted: BTreeMap<WatcherId, Vec<usize>> = BTreeMap::new();
        let Some(stream) = self.streams.get(&stream_id) else { return };
        let mut found = std::mem::take(&mut self.found);
        for (place, change) in changes.iter().enumerate() {
            let meta = change.record.meta();
            found.clear();
            stream.behind.find(change.record.key(), &mut found);
            for &at in &found {
                let Some(watcher) = &self.watchers[at as usize] else { continue };
                if meta.mod_revision >= watcher.next && !watcher.options.drops(meta.tombstone) {
                    wanted.entry(at).or_default().push(place);
                }
            }
        }
        self.found = found;
        let mut made = LastTail::default();
        // In the order of their ids, which keeps watchers of one key together.
        for &at in behind {
            let Some(places) = wanted.remove(&at) else { continue };
            let Some(watcher) = &mut self.watchers[at as usize] else { continue };
            watcher.heard = true;
            let (id, options) = (watcher.id, watcher.options);
            self.facts.events.fetch_add(places.len() as u64, Ordering::Relaxed);
            if options.fragment && self.deliver_fragments(at, now, changes, &places) {
                continue;
            }
            let tail = made.get(&self.identity, now, changes, places, options.prev_kv);
            if let Some(stream) = self.streams.get_mut(&stream_id) {
                put_answer(&mut stream.pending, id, &tail);
                mark_dirty(stream, stream_id, &mut self.dirty);
            }
        }
    }

    /// Moves a watcher on to `next`; true when it is in sync.
    fn advance(&mut self, at: WatcherId, next: Revision, now: Revision) -> bool {
        let Some(watcher) = &mut self.watchers[at as usize] else { return true };
        watcher.next = watcher.next.max(next);
        if watcher.next <= now {
            return false;
        }
        self.leave_index(at);
        if let Some(watcher) = &mut self.watchers[at as usize] {
            watcher.is_behind = false;
        }
        self.enter_index(at);
        true
    }

    /// Cancels those among them that lack what is no longer kept, with the revision to start again from.
    fn cancel_compacted(&mut self, behind: &[WatcherId], compacted: Revision) {
        for &at in behind {
            let Some(watcher) = &self.watchers[at as usize] else { continue };
            if watcher.next >= compacted {
                continue;
            }
            let (stream_id, id) = (watcher.stream, watcher.id);
            self.unregister(at);
            if let Some(stream) = self.streams.get_mut(&stream_id) {
                stream.ids.insert(id, None);
            }
            // etcd leaves the revision of this header empty.
            self.control(stream_id, 0, id, |out| {
                put_flag(out, 4);
                encode::put_number(out, 5, compacted.0);
            });
        }
    }

    /// Cuts an answer that is too large; false when it is not.
    fn deliver_fragments(&mut self, at: WatcherId, revision: Revision, changes: &[Change], places: &[usize]) -> bool {
        let Some(watcher) = &self.watchers[at as usize] else { return false };
        let (stream_id, id, with_prev) = (watcher.stream, watcher.id, watcher.options.prev_kv);
        let mut events: Vec<BytesMut> = places
            .iter()
            .map(|&place| {
                let mut event = BytesMut::new();
                encode::put_event(&mut event, &changes[place], with_prev);
                event
            })
            .collect();
        let total: usize = events.iter().map(BytesMut::len).sum();
        if events.len() < 2 || total < self.fragment_bytes {
            return false;
        }
        let Some(stream) = self.streams.get_mut(&stream_id) else { return true };
        events.reverse();
        while let Some(event) = events.pop() {
            let mut message = BytesMut::new();
            encode::put_header(&mut message, &self.identity, revision.0);
            message.put_slice(&event);
            while events.last().is_some_and(|next| message.len() + next.len() < self.fragment_bytes) {
                if let Some(next) = events.pop() {
                    message.put_slice(&next);
                }
            }
            if !events.is_empty() {
                put_flag(&mut message, 7);
            }
            put_answer(&mut stream.pending, id, &message);
        }
        mark_dirty(stream, stream_id, &mut self.dirty);
        true
    }

    /// Periodic work: progress of watchers that asked for it, and streams whose task is gone.
    pub(crate) fn tick(&mut self, now: u64, machine: &Machine) {
        if now < self.progress_at {
            return;
        }
        self.progress_at = now + 1000.min(self.progress_interval_ms);
        let gone: Vec<StreamId> =
            self.streams.iter().filter(|(_, stream)| stream.out.is_closed()).map(|(&id, _)| id).collect();
        for stream in gone {
            self.close(stream);
        }
        let due: Vec<StreamId> =
            self.streams.iter().filter(|(_, stream)| stream.progress_at <= now).map(|(&id, _)| id).collect();
        for stream in due {
            self.report(stream, now, machine.revision());
        }
        let behind = self.watchers.iter().flatten().filter(|watcher| watcher.is_behind).count();
        self.facts.slow_watchers.store(behind as u64, Ordering::Relaxed);
    }

    fn report(&mut self, stream_id: StreamId, now: u64, revision: Revision) {
        let interval = self.progress_interval_ms;
        let Some(stream) = self.streams.get_mut(&stream_id) else { return };
        stream.progress_at = now + interval;
        let ids: Vec<(i64, WatcherId)> = stream.ids.iter().filter_map(|(&id, &at)| Some((id, at?))).collect();
        for (id, at) in ids {
            let Some(watcher) = &mut self.watchers[at as usize] else { continue };
            let quiet = !std::mem::take(&mut watcher.heard);
            if watcher.options.progress && quiet && !watcher.is_behind && watcher.next <= revision.next() {
                self.control(stream_id, revision.0, id, |_| {});
            }
        }
    }

    /// Hands over what this round has written; the tasks to wake are appended to `wakes`.
    pub(crate) fn flush(&mut self, wakes: &mut Vec<Arc<tokio::sync::Notify>>) {
        for id in self.dirty.drain(..) {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.is_dirty = false;
            if !stream.pending.is_empty() {
                stream.out.push(stream.pending.split().freeze());
                wakes.push(stream.out.wake.clone());
            }
        }
    }

    /// Ends every stream, for a stop.
    pub(crate) fn end_all(&mut self) {
        for stream in self.streams.values() {
            stream.out.end();
            stream.out.wake.notify_one();
        }
    }

    fn refuse(&mut self, stream_id: StreamId, revision: Revision, reason: &str) {
        self.control(stream_id, revision.0, -1, |out| {
            put_flag(out, 3);
            put_flag(out, 4);
            encode::put_bytes(out, 6, reason.as_bytes());
        });
    }

    /// An answer without events.
    fn control(&mut self, stream_id: StreamId, revision: u64, id: i64, body: impl FnOnce(&mut BytesMut)) {
        let Some(stream) = self.streams.get_mut(&stream_id) else { return };
        let mut tail = BytesMut::with_capacity(48);
        encode::put_header(&mut tail, &self.identity, revision);
        body(&mut tail);
        put_answer(&mut stream.pending, id, &tail);
        mark_dirty(stream, stream_id, &mut self.dirty);
    }

    fn store(&mut self, watcher: Watcher) -> WatcherId {
        if let Some(at) = self.free.pop() {
            self.watchers[at as usize] = Some(watcher);
            return at;
        }
        self.watchers.push(Some(watcher));
        (self.watchers.len() - 1) as WatcherId
    }

    fn unregister(&mut self, at: WatcherId) {
        self.leave_index(at);
        self.watchers[at as usize] = None;
        self.free.push(at);
        self.facts.watchers.fetch_sub(1, Ordering::Relaxed);
    }

    fn enter_index(&mut self, at: WatcherId) {
        let Some(watcher) = &mut self.watchers[at as usize] else { return };
        let index = match watcher.is_behind {
            false => &mut self.synced,
            true => match self.streams.get_mut(&watcher.stream) {
                Some(stream) => &mut stream.behind,
                None => return,
            },
        };
        watcher.place = index.insert(&watcher.span, at);
    }

    fn leave_index(&mut self, at: WatcherId) {
        let Some(watcher) = &self.watchers[at as usize] else { return };
        let place = watcher.place;
        let moved = match watcher.is_behind {
            false => self.synced.remove(&watcher.span, place),
            true => match self.streams.get_mut(&watcher.stream) {
                Some(stream) => stream.behind.remove(&watcher.span, place),
                None => None,
            },
        };
        if let Some(moved) = moved
            && let Some(watcher) = &mut self.watchers[moved as usize]
        {
            watcher.place = place;
        }
    }
}

impl WatchOptions {
    fn drops(self, tombstone: bool) -> bool {
        if tombstone { self.no_delete } else { self.no_put }
    }
}

/// The last answer made, since watchers of one key come one after the other.
#[derive(Default)]
struct LastTail {
    places: Vec<usize>,
    with_prev: bool,
    bytes: Bytes,
}

impl LastTail {
    fn get(
        &mut self,
        identity: &Identity,
        revision: Revision,
        changes: &[Change],
        places: Vec<usize>,
        with_prev: bool,
    ) -> Bytes {
        if self.bytes.is_empty() || self.places != places || self.with_prev != with_prev {
            let events: Vec<&Change> = places.iter().map(|&place| &changes[place]).collect();
            self.bytes = tail(identity, revision, &events, with_prev);
            self.places = places;
            self.with_prev = with_prev;
        }
        self.bytes.clone()
    }
}

/// Everything of a watch answer but the watch id, which stands in front: the order of fields in a message is free.
fn tail(identity: &Identity, revision: Revision, changes: &[&Change], with_prev: bool) -> Bytes {
    let mut out =
        BytesMut::with_capacity(64 + changes.iter().map(|change| change.record.as_bytes().len() + 48).sum::<usize>());
    encode::put_header(&mut out, identity, revision.0);
    for change in changes {
        encode::put_event(&mut out, change, with_prev);
    }
    out.freeze()
}

/// One framed answer: frame head, watch id, the rest.
fn put_answer(out: &mut BytesMut, id: i64, tail: &[u8]) {
    let id_len = if id == 0 { 0 } else { 1 + encode::varint_len(id as u64) };
    out.reserve(FRAME_HEAD + id_len + tail.len());
    out.put_u8(0);
    out.put_u32((id_len + tail.len()) as u32);
    encode::put_number(out, 2, id as u64);
    out.put_slice(tail);
}

fn put_flag(out: &mut BytesMut, field: u8) {
    encode::put_number(out, field, 1);
}

fn mark_dirty(stream: &mut Stream, id: StreamId, dirty: &mut Vec<StreamId>) {
    if !stream.is_dirty {
        stream.is_dirty = true;
        dirty.push(id);
    }
}

/// The exclusive end of a span, also of a single key.
fn end_of(span: &Span) -> Key {
    match &span.end {
        Some(end) => end.clone(),
        None => {
            let mut next = span.start.as_bytes().to_vec();
            next.push(0);
            Key::from_bytes(&next)
        }
    }
}

#[cfg(test)]
mod tests {
    use tenure_machine::{
        Applied, Batch, Index, LogTime, NamespaceId, Op, Origin, Position, Put, SessionId, Term, Txn,
    };

    use super::*;

    /// W5, for watchers that allow fragments too.
    #[test]
    fn fragments_wait_within_the_limit() {
        let mut machine = Machine::new();
        let mut hub = Hub::new(Arc::default(), Arc::default(), 1 << 20, 1_000);
        let out = Arc::new(StreamOut::default());
        let stream = hub.open(out.clone(), 0);
        let options = WatchOptions { fragment: true, ..WatchOptions::default() };
        let (key, range_end) = (Bytes::from_static(b"k"), Bytes::from_static(b"l"));
        hub.create(stream, &WatchCreate { id: 1, key, range_end, start_revision: 0, options }, &machine);
        let put = |name: &[u8]| {
            Op::Put(Put {
                key: Key::new(Space::Keys, NamespaceId::DEFAULT, name),
                value: vec![0; 1 << 20].into(),
                session: SessionId(0),
                prev: false,
                keep_value: false,
                keep_session: false,
            })
        };
        for at in 1..=8 {
            let txns = vec![Txn { then: vec![put(b"k1"), put(b"k2")], ..Txn::default() }];
            let batch =
                Batch { behaviour: tenure_machine::BEHAVIOUR, stamp: LogTime(at), origin: Origin::default(), txns };
            let mut applied = Applied::default();
            machine.apply(Position { index: Index(at), term: Term(1) }, batch, &mut applied).unwrap();
            hub.publish(&applied.changes);
            hub.flush(&mut Vec::new());
        }
        let revision = 5 << 19;
        assert!(out.bytes() < STREAM_BYTES_MAX + revision, "{} bytes wait", out.bytes());
        // What did not fit comes as there is room.
        let mut bytes = 0;
        for _ in 0..100 {
            while let Some(frames) = out.take() {
                bytes += frames.len();
                if out.sent(frames.len()) {
                    hub.drained(stream);
                }
            }
            hub.catch_up(&machine);
            hub.flush(&mut Vec::new());
        }
        assert!(bytes > 16 << 20 && bytes < 17 << 20, "{bytes} bytes came");
    }
}
