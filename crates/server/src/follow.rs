//! Following: the changes of a span, handed by the driver to one task, for every native stream that watches.
//!
//! Promises. F1: a follower is given every change of its span from its start on, once, in the order of changes, and a revision whole. F2: what
//! waits for one follower is bounded; one that takes too slowly is dropped from the live path and caught up from what is kept, in slices
//! between rounds of the driver, so neither writers nor other followers wait for it. F3: where what it lacks is no longer kept it is told the
//! lowest revision that is. F4: `Through(r)` comes after every change up to `r`: after a time without changes, once a thousand revisions
//! have gone by without any, when this member is asked for a compaction, before that is proposed, and before the answer to one leaves that
//! passes what it was told last.
//! Relies on. `Followers::publish` is called with every change, in order, before anything newer is read from the machine.
//!
//! A stream of another primitive opens a [`Follower`] on the span of its objects ([`things`]) and turns what [`Follower::next`] gives into
//! its own answers; `native/watches.rs` is the one that shows changes as they are.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tenure_machine::{Change, Key, Machine, NamespaceId, Rejection, Revision, Space, Span, is_busy, kind_of};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::driver::{Failure, Handle};
use crate::span_index::{SpanIndex, WatcherId};

/// Bytes of changes that may wait for one follower.
const WAITING_BYTES_MAX: usize = 4 << 20;
/// What one visit to the driver reads from history.
const SLICE_BYTES: usize = 256 << 10;
/// Visits that one round of the driver serves.
const VISITS_MAX: usize = 64;
/// A follower without changes is told where the order is after so many revisions.
const REMIND_REVISIONS: u64 = 1_000;
/// A change beside its records.
const CHANGE_BYTES: usize = 64;

/// The objects of one kind whose names begin with `name`, or only the one of that name.
pub(crate) fn things(namespace: NamespaceId, kind: u8, name: &[u8], prefix: bool) -> Span {
    let mut full = vec![kind];
    full.extend_from_slice(name);
    let start = Key::new(Space::Native, namespace, &full);
    if prefix { Span { end: Some(behind(&start)), start } } else { Span::one(start) }
}

/// The first key behind all that begin with this one.
pub(crate) fn behind(start: &Key) -> Key {
    let mut end = start.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    Key::from_bytes(&end)
}

/// The way from the driver to one follower.
#[derive(Debug, Default)]
struct Way {
    state: Mutex<WayState>,
    wake: Arc<Notify>,
    /// Everything up to here was published. Shared by all.
    published: Arc<AtomicU64>,
}

#[derive(Debug, Default)]
struct WayState {
    changes: VecDeque<Change>,
    bytes: usize,
    /// On the live path. Whoever fell off goes on from `behind`.
    live: bool,
    behind: Revision,
    reminded: bool,
    ended: bool,
    closed: bool,
}

impl Way {
    fn lock(&self) -> MutexGuard<'_, WayState> {
        // Plain data: what a panicking thread left is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a change over; false where there is no room, and then the whole revision is for history to tell.
    fn push(&self, change: &Change) -> bool {
        let mut state = self.lock();
        if state.bytes < WAITING_BYTES_MAX {
            state.bytes += bytes(change);
            state.changes.push_back(change.clone());
            return true;
        }
        state.fall_behind(change.record.mod_revision());
        false
    }
}

impl WayState {
    /// Something comes by itself: what is here and not yet published, with a wake on its way, comes before what history has.
    fn has_more(&self) -> bool {
        self.live || !self.changes.is_empty()
    }

    fn fall_behind(&mut self, revision: Revision) {
        while self.changes.back().is_some_and(|last| last.record.mod_revision() >= revision) {
            self.bytes -= self.changes.pop_back().as_ref().map_or(0, bytes);
        }
        self.live = false;
        self.behind = revision;
    }
}

fn bytes(change: &Change) -> usize {
    CHANGE_BYTES + change.record.as_bytes().len() + change.before.as_ref().map_or(0, |before| before.as_bytes().len())
}

/// A follower asks to be put on the live path, or for the next slice of what it lacks.
#[derive(Debug)]
pub(crate) struct Visit {
    span: Span,
    from: Revision,
    way: Arc<Way>,
    reply: oneshot::Sender<Result<Slice, Revision>>,
}

/// The changes up to `next`, not included. An error is the lowest revision that is kept.
#[derive(Debug)]
struct Slice {
    changes: Vec<Change>,
    next: Revision,
}

/// The driver's side.
#[derive(Default)]
pub(crate) struct Followers {
    all: Vec<Option<Entry>>,
    free: Vec<WatcherId>,
    index: SpanIndex,
    found: Vec<WatcherId>,
    wakes: Vec<Arc<Notify>>,
    visits: VecDeque<Visit>,
    published: Arc<AtomicU64>,
    reminded_at: Revision,
    sweep_at: u64,
}

struct Entry {
    span: Span,
    from: Revision,
    way: Arc<Way>,
    place: usize,
}

impl Followers {
    pub(crate) fn new(published: Arc<AtomicU64>, at: Revision) -> Self {
        published.store(at.0, Ordering::Release);
        Self { published, reminded_at: at, ..Self::default() }
    }

    pub(crate) fn visit(&mut self, visit: Visit) {
        self.visits.push_back(visit);
    }

    /// Serves some of those who wait; true while there are more.
    pub(crate) fn serve(&mut self, machine: &Machine) -> bool {
        let mut bytes_read = 0;
        for _ in 0..VISITS_MAX {
            let Some(visit) = self.visits.pop_front() else { return false };
            let answer = self.answer(machine, &visit);
            bytes_read += answer.as_ref().map_or(0, |slice| slice.changes.iter().map(bytes).sum::<usize>());
            let _ = visit.reply.send(answer);
            if bytes_read >= SLICE_BYTES {
                break;
            }
        }
        !self.visits.is_empty()
    }

    fn answer(&mut self, machine: &Machine, visit: &Visit) -> Result<Slice, Revision> {
        let now = machine.revision();
        let slice = if visit.from > now {
            Slice { changes: Vec::new(), next: visit.from }
        } else {
            match machine.changes(&visit.span, visit.from, SLICE_BYTES) {
                Ok(slice) => Slice { changes: slice.changes, next: slice.next },
                Err(Rejection::Compacted { lowest }) => return Err(lowest),
                Err(_) => return Err(now.next()),
            }
        };
        if slice.next > now {
            self.link(visit, slice.next);
        }
        Ok(slice)
    }

    fn link(&mut self, visit: &Visit, from: Revision) {
        visit.way.lock().live = true;
        let at = self.free.pop().unwrap_or_else(|| {
            self.all.push(None);
            (self.all.len() - 1) as WatcherId
        });
        let place = self.index.insert(&visit.span, at);
        self.all[at as usize] = Some(Entry { span: visit.span.clone(), from, way: visit.way.clone(), place });
    }

    fn unlink(&mut self, at: WatcherId) {
        let Some(entry) = self.all[at as usize].take() else { return };
        self.free.push(at);
        if let Some(moved) = self.index.remove(&entry.span, entry.place)
            && let Some(moved) = &mut self.all[moved as usize]
        {
            moved.place = entry.place;
        }
    }

    /// Hands the changes of one round over. `replaced`: up to there, for the state was then replaced by a later one without the changes in between.
    pub(crate) fn publish(&mut self, changes: &[Change], replaced: Option<Revision>, machine: &Machine) {
        if !self.index.is_empty() {
            let mut found = std::mem::take(&mut self.found);
            for change in changes {
                found.clear();
                self.index.find(change.record.key(), &mut found);
                for &at in &found {
                    self.hand(at, change);
                }
            }
            self.found = found;
        }
        if let Some(published) = replaced {
            // Before the later revision is told: nobody may take it for what it was given.
            self.restored(published);
        }
        let now = machine.revision();
        self.published.store(now.0, Ordering::Release);
        let passed = machine.compacted().max(machine.native_floor()) > self.reminded_at;
        if passed || now.0 - self.reminded_at.0.min(now.0) >= REMIND_REVISIONS {
            self.reminded_at = now;
            self.remind();
        }
    }

    fn hand(&mut self, at: WatcherId, change: &Change) {
        let Some(entry) = &self.all[at as usize] else { return };
        if change.record.mod_revision() < entry.from || !is_meant(&entry.span, change.record.key()) {
            return;
        }
        let fits = entry.way.push(change);
        self.wakes.push(entry.way.wake.clone());
        if !fits {
            self.unlink(at);
        }
    }

    /// Lets every follower tell where it is, so that it can come back from there.
    pub(crate) fn remind(&mut self) {
        for entry in self.all.iter().flatten() {
            entry.way.lock().reminded = true;
            self.wakes.push(entry.way.wake.clone());
        }
    }

    /// Everybody asks history. Everything up to `published` was handed out.
    fn restored(&mut self, published: Revision) {
        for at in 0..self.all.len() as WatcherId {
            let Some(entry) = &self.all[at as usize] else { continue };
            entry.way.lock().fall_behind(published.next().max(entry.from));
            self.wakes.push(entry.way.wake.clone());
            self.unlink(at);
        }
    }

    /// Forgets those whose tasks are gone.
    pub(crate) fn tick(&mut self, now: u64) {
        if now < self.sweep_at {
            return;
        }
        self.sweep_at = now + 1_000;
        for at in 0..self.all.len() as WatcherId {
            if self.all[at as usize].as_ref().is_some_and(|entry| entry.way.lock().closed) {
                self.unlink(at);
            }
        }
    }

    /// Ends everybody, for a stop.
    pub(crate) fn end_all(&mut self) {
        for entry in self.all.iter().flatten() {
            entry.way.lock().ended = true;
            entry.way.wake.notify_one();
        }
    }

    pub(crate) fn flush(&mut self, wakes: &mut Vec<Arc<Notify>>) {
        wakes.append(&mut self.wakes);
    }
}

/// Whoever follows all kinds of things together is spared the busy ones, as in history.
fn is_meant(span: &Span, key: &[u8]) -> bool {
    let is_native = key.first() == Some(&(Space::Native as u8));
    !is_native || kind_of(span.start.as_bytes()).is_some() || !kind_of(key).is_some_and(is_busy)
}

/// What a follower is given.
#[derive(Debug)]
pub(crate) enum Followed {
    /// Whole revisions, in order.
    Changes(Vec<Change>),
    /// There is nothing of the span up to here that was not given.
    Through(Revision),
    /// What comes next is no longer kept; this is the lowest revision that is.
    Gone(Revision),
}

/// The task's side. Dropping it ends it.
pub(crate) struct Follower {
    handle: Handle,
    span: Span,
    way: Arc<Way>,
    /// The lowest revision that was not given.
    next: Revision,
    told: Revision,
    quiet: Duration,
    quiet_at: Instant,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.way.lock().closed = true;
    }
}

impl Follower {
    /// Follows a span from a revision on, past or future. `quiet`: so long without changes brings a `Through`.
    pub(crate) fn new(handle: &Handle, span: Span, from: Revision, quiet: Duration) -> Self {
        let way = Way { published: handle.published.clone(), ..Way::default() };
        way.lock().behind = from;
        let quiet_at = Instant::now() + quiet;
        Self { handle: handle.clone(), span, way: Arc::new(way), next: from, told: from, quiet, quiet_at }
    }

    /// The next that there is. Whoever drops the future before its end must drop the follower too: it may have had changes in hand.
    pub(crate) async fn next(&mut self) -> Result<Followed, Failure> {
        loop {
            let way = self.way.clone();
            let woken = way.wake.notified();
            if let Some(followed) = self.try_next().await? {
                return Ok(followed);
            }
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep_until(self.quiet_at) => {
                    if let Some(through) = self.through() {
                        return Ok(through);
                    }
                }
            }
        }
    }

    /// What there is up to what is applied now, without waiting for more.
    pub(crate) async fn try_next(&mut self) -> Result<Option<Followed>, Failure> {
        loop {
            if let Some(followed) = self.take()? {
                return Ok(Some(followed));
            }
            if self.way.lock().has_more() {
                return Ok(None);
            }
            if let Some(followed) = self.ask().await? {
                return Ok(Some(followed));
            }
        }
    }

    /// What is here: only revisions that were published whole.
    fn take(&mut self) -> Result<Option<Followed>, Failure> {
        let published = Revision(self.way.published.load(Ordering::Acquire));
        let mut state = self.way.lock();
        let mut changes = Vec::new();
        while state.changes.front().is_some_and(|first| first.record.mod_revision() <= published) {
            let Some(change) = state.changes.pop_front() else { break };
            state.bytes -= bytes(&change);
            changes.push(change);
        }
        let (reminded, ended) = (std::mem::take(&mut state.reminded), state.ended);
        drop(state);
        if let Some(last) = changes.last() {
            self.next = last.record.mod_revision().next();
            self.heard(self.next);
            return Ok(Some(Followed::Changes(changes)));
        }
        if ended {
            return Err(Failure::Stopping);
        }
        Ok(if reminded { self.through() } else { None })
    }

    fn through(&mut self) -> Option<Followed> {
        let published = Revision(self.way.published.load(Ordering::Acquire));
        let state = self.way.lock();
        // What was published before it was looked at here is in the queue, if it concerns this follower and it is live.
        let is_quiet = state.live && state.changes.is_empty();
        drop(state);
        self.quiet_at = Instant::now() + self.quiet;
        if !is_quiet {
            return None;
        }
        self.next = self.next.max(published.next());
        self.told = self.next;
        Some(Followed::Through(Revision(self.next.0 - 1)))
    }

    async fn ask(&mut self) -> Result<Option<Followed>, Failure> {
        let from = self.next.max(self.way.lock().behind);
        let (reply, answer) = oneshot::channel();
        let visit = Visit { span: self.span.clone(), from, way: self.way.clone(), reply };
        self.handle.follow(visit).await?;
        match answer.await.map_err(|_| Failure::Stopping)? {
            Err(lowest) => Ok(Some(Followed::Gone(lowest))),
            Ok(slice) => {
                self.next = slice.next;
                self.way.lock().behind = slice.next;
                if slice.changes.is_empty() {
                    return Ok(None);
                }
                self.heard(slice.next);
                Ok(Some(Followed::Changes(slice.changes)))
            }
        }
    }

    fn heard(&mut self, next: Revision) {
        self.told = next;
        self.quiet_at = Instant::now() + self.quiet;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    use tenure_machine::{Applied, Batch, Index, LogTime, Op, Origin, Position, Put, SessionId, Term, Txn};

    use super::*;
    use crate::driver::{Event, Loop};
    use crate::turns::Queue;

    /// A machine and its followers, moved by a test.
    pub(crate) struct ByHand {
        pub(crate) machine: Machine,
        pub(crate) handle: Handle,
        pub(crate) followers: Followers,
        queue: Queue<Loop>,
        index: u64,
    }

    impl ByHand {
        pub(crate) fn new() -> Self {
            let (handle, queue) = Handle::unserved(16);
            let machine = Machine::new();
            let followers = Followers::new(handle.published.clone(), machine.revision());
            Self { machine, handle, followers, queue, index: 0 }
        }

        pub(crate) fn follow(&self, span: Span) -> Follower {
            Follower::new(&self.handle, span, self.machine.revision().next(), Duration::from_secs(60))
        }

        /// One round with a transaction of each of these.
        pub(crate) fn round(&mut self, ops: Vec<Op>) {
            self.index += 1;
            let txns = ops.into_iter().map(Txn::of).collect();
            let stamp = LogTime(self.index);
            let batch = Batch { behaviour: tenure_machine::BEHAVIOUR, stamp, origin: Origin::default(), txns };
            let mut out = Applied::default();
            let at = Position { index: Index(self.index), term: Term(1) };
            self.machine.apply(at, batch, &mut out).unwrap();
            out.replies.iter().for_each(|(_, reply)| assert!(reply.result.is_ok(), "{reply:?}"));
            self.followers.publish(&out.changes, None, &self.machine);
        }

        fn visits(&self) -> Vec<Visit> {
            let visit = |event| if let Event::Follow(visit) = event { Some(visit) } else { None };
            self.queue.ready().filter_map(visit).collect()
        }

        pub(crate) fn serve(&mut self) {
            self.visits().into_iter().for_each(|visit| self.followers.visit(visit));
            self.followers.serve(&self.machine);
        }
    }

    pub(crate) fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// The task looks while the driver is in the middle of a round that is larger than what may wait.
    #[tokio::test]
    async fn what_was_handed_over_comes_before_what_history_has() {
        let mut driver = ByHand::new();
        let key = Key::new(Space::Keys, NamespaceId::DEFAULT, b"k");
        let mut follower = driver.follow(Span::one(key.clone()));
        {
            let mut linked = std::pin::pin!(follower.try_next());
            assert!(poll(linked.as_mut()).is_pending());
            driver.serve();
            assert!(matches!(poll(linked), Poll::Ready(Ok(None))));
        }
        let before = driver.machine.revision();
        let put = Put {
            key,
            value: vec![0; 1 << 20].into(),
            session: SessionId(0),
            prev: false,
            keep_value: false,
            keep_session: false,
        };
        driver.round(vec![Op::Put(put); 8]);
        let now = driver.handle.published.swap(before.0, Ordering::AcqRel);
        let mut told = Vec::new();
        let mut note = |followed: Option<Followed>| {
            if let Some(Followed::Changes(changes)) = followed {
                told.extend(changes.iter().map(|change| change.record.mod_revision().0));
            }
        };
        for _ in 0..20 {
            let mut looking = std::pin::pin!(follower.try_next());
            let mut looked = poll(looking.as_mut());
            driver.handle.published.store(now, Ordering::Release);
            while looked.is_pending() {
                driver.serve();
                looked = poll(looking.as_mut());
            }
            if let Poll::Ready(followed) = looked {
                note(followed.unwrap());
            }
        }
        assert_eq!(told, (before.0 + 1..=now).collect::<Vec<_>>());
    }
}
