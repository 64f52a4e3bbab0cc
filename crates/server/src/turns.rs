//! Whose turn it is to run the core: its own thread's, or that of a lone caller.
//!
//! Promises. T1: one thread at a time runs the core, and every event that was taken is seen by a turn that begins after it. T2: while callers come one
//! at a time, the thread that brings an event runs the turn itself; handing it to another thread and the answer back costs two wake-ups of a core
//! that sleeps, which is more than all the rest of a small request. T3: a full queue is an answer, never a longer queue. T4: after a turn that
//! says that it was the last one, nobody runs another.
//! Not promised. That a caller is lone: a turn that it runs keeps its thread for as long as the disk needs. So turns are lent for a
//! while only, and are called back at the first that was slow or not lone.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Events taken in one turn.
const TURN_MAX: usize = 4_096;
/// So many turns with one request in a row make a caller lone.
const LONE_AFTER: u32 = 8;
/// Turns that are lent before the core's own thread runs one again. A thread that runs turns reads no other requests meanwhile, so
/// only a turn of the core's own thread shows whether there are any.
const LENT_MAX: u32 = 64;
/// A disk this slow must not keep a thread that others need.
const SLOW: Duration = Duration::from_millis(20);

/// What is run in turns.
pub(crate) trait Core: Send + 'static {
    type Event: Send;

    /// Takes what has come and does one round.
    fn turn(&mut self, events: impl Iterator<Item = Self::Event>) -> Turn;
}

/// What a turn tells.
pub(crate) struct Turn {
    /// Requests that it took.
    pub(crate) requests: usize,
    /// Whether the next one may be run by a caller.
    pub(crate) lends: bool,
    pub(crate) next: Next,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Next {
    /// Nothing is to be done for so long.
    Within(Duration),
    /// There is no next turn.
    End,
}

/// A queue for the events of a core that is still to come. At most `max` wait: a channel with a fixed number of places would take the memory of all at once.
pub(crate) fn turns<C: Core>(max: usize) -> (Events<C>, Queue<C>) {
    let (sender, receiver) = channel();
    let shared = Arc::new(Shared {
        waiting: AtomicUsize::new(0),
        closed: AtomicBool::new(false),
        desk: Mutex::new(None),
        lent: AtomicU32::new(0),
        called: AtomicBool::new(false),
        thread: OnceLock::new(),
    });
    (Events { sender, shared: shared.clone(), max }, Queue { receiver, shared })
}

struct Shared<C: Core> {
    waiting: AtomicUsize,
    /// Nobody takes events any more: a full queue stays full.
    closed: AtomicBool,
    /// Empty before the first turn and after the last.
    desk: Mutex<Option<Desk<C>>>,
    /// Turns that callers may still run.
    lent: AtomicU32,
    /// The core's own thread is to come round, whatever waits.
    called: AtomicBool,
    thread: OnceLock<Thread>,
}

impl<C: Core> Shared<C> {
    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    fn call(&self) {
        self.called.store(true, Ordering::Release);
        self.wake();
    }

    fn has_events(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    /// Until something has come, somebody calls, or the time is over.
    fn sleep(&self, most: Duration) {
        let until = Instant::now() + most;
        while !self.has_events() && !self.called.swap(false, Ordering::AcqRel) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::park_timeout(left);
        }
    }
}

/// Where events are put. Cheap to clone.
pub(crate) struct Events<C: Core> {
    sender: Sender<C::Event>,
    shared: Arc<Shared<C>>,
    max: usize,
}

impl<C: Core> Clone for Events<C> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), shared: self.shared.clone(), max: self.max }
    }
}

pub(crate) enum SendError<E> {
    /// The event comes back.
    Full(Box<E>),
    Disconnected,
}

impl<C: Core> Events<C> {
    /// For what the thread that brings it should not run itself.
    pub(crate) fn try_send(&self, event: C::Event) -> Result<(), SendError<C::Event>> {
        self.queue(event)?;
        self.shared.wake();
        Ok(())
    }

    /// For those who keep a limit of their own: never refused.
    pub(crate) fn send(&self, event: C::Event) -> Result<(), SendError<C::Event>> {
        self.shared.waiting.fetch_add(1, Ordering::AcqRel);
        self.sender.send(event).map_err(|_| SendError::Disconnected)?;
        self.shared.wake();
        Ok(())
    }

    /// For a request: a lone caller runs it at once, and finds its answer there.
    pub(crate) fn request(&self, event: C::Event) -> Result<(), SendError<C::Event>> {
        self.queue(event)?;
        if !self.take_turn() {
            self.shared.wake();
        }
        Ok(())
    }

    fn queue(&self, event: C::Event) -> Result<(), SendError<C::Event>> {
        if self.shared.waiting.fetch_add(1, Ordering::AcqRel) >= self.max {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            let is_closed = self.shared.closed.load(Ordering::Acquire);
            return Err(if is_closed { SendError::Disconnected } else { SendError::Full(Box::new(event)) });
        }
        self.sender.send(event).map_err(|_| SendError::Disconnected)
    }

    /// `false` if the turn is another's.
    fn take_turn(&self) -> bool {
        if self.shared.lent.load(Ordering::Relaxed) == 0 {
            return false;
        }
        // Somebody else is at it, or a turn has panicked: its own thread will see to it.
        let Ok(mut desk) = self.shared.desk.try_lock() else { return false };
        let Some(desk) = desk.as_mut() else { return false };
        let _call = CallIfPanicking(&self.shared);
        desk.lent_turn(&self.shared);
        true
    }
}

/// The core's own thread finds the lock poisoned, and ends.
struct CallIfPanicking<'a, C: Core>(&'a Shared<C>);

impl<C: Core> Drop for CallIfPanicking<'_, C> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.call();
        }
    }
}

/// What has come and was not taken.
pub(crate) struct Queue<C: Core> {
    receiver: Receiver<C::Event>,
    shared: Arc<Shared<C>>,
}

impl<C: Core> Drop for Queue<C> {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
    }
}

impl<C: Core> Queue<C> {
    /// What is here already.
    pub(crate) fn ready(&self) -> impl Iterator<Item = C::Event> {
        self.receiver.try_iter().inspect(|_| {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        })
    }

    /// Runs `core` on this thread, and on those of lone callers, until a turn says that it was the last. Core and queue come back.
    ///
    /// # Panics
    /// If a turn has panicked, on whatever thread.
    pub(crate) fn run(self, core: C) -> (C, Self) {
        let shared = self.shared.clone();
        let _ = shared.thread.set(std::thread::current());
        let mut place = shared.desk.lock().unwrap_or_else(PoisonError::into_inner);
        let soon = Next::Within(Duration::ZERO);
        *place = Some(Desk { core, queue: self, next: soon, singles: 0, due: Instant::now() });
        drop(place);
        loop {
            let sleep = {
                // A panic of a caller's turn has told what went wrong, on the caller's thread.
                let mut place = shared.desk.lock().unwrap_or_else(|poisoned| {
                    drop(poisoned.into_inner().take());
                    panic!("a turn has panicked")
                });
                let desk = place.as_mut().expect("only this thread takes the desk away");
                desk.own_turn(&shared);
                match desk.next {
                    Next::Within(sleep) => sleep,
                    Next::End => {
                        let desk = place.take().expect("it was here");
                        return (desk.core, desk.queue);
                    }
                }
            };
            shared.sleep(sleep);
        }
    }
}

/// The core, and what whoever runs it needs to know.
struct Desk<C: Core> {
    core: C,
    queue: Queue<C>,
    next: Next,
    /// Turns with one request, in a row.
    singles: u32,
    /// When the core's own thread comes round by itself.
    due: Instant,
}

impl<C: Core> Desk<C> {
    fn turn(&mut self) -> Turn {
        let turn = self.core.turn(self.queue.ready().take(TURN_MAX));
        self.next = turn.next;
        turn
    }

    fn own_turn(&mut self, shared: &Shared<C>) {
        if self.next == Next::End {
            return;
        }
        let turn = self.turn();
        if turn.requests > 0 {
            self.singles = if turn.requests == 1 { self.singles.saturating_add(1) } else { 0 };
            let lent = if turn.lends && self.singles >= LONE_AFTER { LENT_MAX } else { 0 };
            shared.lent.store(lent, Ordering::Relaxed);
        }
        if let Next::Within(sleep) = turn.next {
            self.due = Instant::now() + sleep;
        }
    }

    fn lent_turn(&mut self, shared: &Shared<C>) {
        if self.next == Next::End {
            return shared.call();
        }
        let began = Instant::now();
        let turn = self.turn();
        let ended = Instant::now();
        if turn.requests > 1 || ended - began > SLOW {
            self.singles = 0;
        }
        if self.singles == 0 || !turn.lends {
            shared.lent.store(0, Ordering::Relaxed);
        } else {
            shared.lent.fetch_sub(1, Ordering::Relaxed);
        }
        match turn.next {
            Next::Within(sleep) if ended + sleep >= self.due && !shared.has_events() => {}
            _ => shared.call(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::thread::ThreadId;

    use super::*;

    /// Answers events with the thread that ran them.
    struct Echo {
        slow: Duration,
        ended: bool,
        turns: Arc<Mutex<HashMap<ThreadId, u32>>>,
    }

    enum Said {
        Ask(Sender<ThreadId>),
        Panic,
        End,
    }

    impl Core for Echo {
        type Event = Said;

        fn turn(&mut self, events: impl Iterator<Item = Said>) -> Turn {
            assert!(!self.ended, "no turn comes after the last");
            let me = std::thread::current().id();
            let mut requests = 0;
            for event in events {
                match event {
                    Said::Ask(reply) => {
                        requests += 1;
                        let _ = reply.send(me);
                    }
                    Said::Panic => panic!("as the test asked"),
                    Said::End => self.ended = true,
                }
            }
            if requests > 0 {
                *self.turns.lock().unwrap().entry(me).or_default() += 1;
                std::thread::sleep(self.slow);
            }
            let next = if self.ended { Next::End } else { Next::Within(Duration::from_secs(60)) };
            Turn { requests, lends: true, next }
        }
    }

    type Running = (Events<Echo>, std::thread::JoinHandle<()>, Arc<Mutex<HashMap<ThreadId, u32>>>);

    fn start(slow: Duration) -> Running {
        let (events, queue) = turns(1_000);
        let turns = Arc::default();
        let core = Echo { slow, ended: false, turns: Arc::clone(&turns) };
        let thread = std::thread::spawn(move || drop(queue.run(core)));
        (events, thread, turns)
    }

    fn ask(events: &Events<Echo>) -> ThreadId {
        let (reply, answer) = channel();
        assert!(events.request(Said::Ask(reply)).is_ok());
        answer.recv_timeout(Duration::from_secs(20)).expect("every request is answered")
    }

    /// Asks as a lone caller does, with a pause in which the own thread can leave the desk, until the turn was run where it is wanted.
    fn ask_until(events: &Events<Echo>, wanted: ThreadId) -> usize {
        let ran = |_: &usize| {
            std::thread::sleep(Duration::from_millis(1));
            ask(events) == wanted
        };
        (1..5_000).find(ran).expect("turns are run by both")
    }

    #[test]
    fn a_lone_caller_runs_its_turns_for_a_while() {
        let (events, own, _) = start(Duration::ZERO);
        let (me, owner) = (std::thread::current().id(), own.thread().id());
        assert!(ask_until(&events, me) > LONE_AFTER as usize);
        assert!(ask_until(&events, owner) <= LENT_MAX as usize, "the own thread looks for others");
        assert!(events.request(Said::End).is_ok());
        own.join().unwrap();
    }

    #[test]
    fn callers_at_once_are_all_answered() {
        let (events, own, turns) = start(Duration::ZERO);
        let callers: Vec<_> = (0..8)
            .map(|_| {
                let events = events.clone();
                std::thread::spawn(move || {
                    for _ in 0..5_000 {
                        ask(&events);
                    }
                })
            })
            .collect();
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        assert!(turns.lock().unwrap().contains_key(&own.thread().id()));
        assert!(events.try_send(Said::End).is_ok());
        own.join().unwrap();
    }

    #[test]
    fn slow_turns_are_not_lent() {
        let (events, own, turns) = start(SLOW + Duration::from_millis(5));
        for _ in 0..LONE_AFTER + 4 {
            ask(&events);
        }
        let mine = turns.lock().unwrap().get(&std::thread::current().id()).copied();
        assert!(mine <= Some(1), "{mine:?}");
        assert!(events.try_send(Said::End).is_ok());
        own.join().unwrap();
    }

    #[test]
    fn an_end_in_a_lent_turn_is_the_end() {
        let (events, own, _) = start(Duration::ZERO);
        let me = std::thread::current().id();
        ask_until(&events, me);
        assert!(events.request(Said::End).is_ok());
        own.join().unwrap();
        let (reply, answer) = channel();
        assert!(matches!(events.request(Said::Ask(reply)), Err(SendError::Disconnected)));
        assert!(answer.recv().is_err());
    }

    #[test]
    fn a_panic_in_a_lent_turn_ends_the_own_thread() {
        let (events, own, _) = start(Duration::ZERO);
        let me = std::thread::current().id();
        ask_until(&events, me);
        // It may be run here or there.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| events.request(Said::Panic).is_ok()));
        assert!(own.join().is_err());
        let (reply, _answer) = channel();
        assert!(matches!(events.request(Said::Ask(reply)), Err(SendError::Disconnected)));
    }
}
