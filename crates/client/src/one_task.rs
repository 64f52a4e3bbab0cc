//! A connection and what uses it, in one task.
//!
//! Promises. Everything that `work` has spawned through the executor is polled by the task of `work`; what one part of it makes ready for another is done in
//! the same turn. With a task for each part, an answer would go through the scheduler five times before the next request leaves,
//! and a runtime with several threads wakes another of them for it: for a lone caller that is half of the time of a call.
//! Not promised. That parts run side by side: what computes for long belongs in a task of its own.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use futures_util::task::AtomicWaker;
use tokio::sync::mpsc;

/// Rounds of one turn; then other tasks of the thread come first.
const ROUNDS_MAX: usize = 16;

type Part = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Spawns into the task that runs `in_one_task`.
#[derive(Clone, Debug)]
pub(crate) struct Parts(mpsc::UnboundedSender<Part>);

impl hyper::rt::Executor<Part> for Parts {
    fn execute(&self, part: Part) {
        // After the end of the task nobody waits for it.
        let _ = self.0.send(part);
    }
}

pub(crate) fn parts() -> (Parts, mpsc::UnboundedReceiver<Part>) {
    let (spawn, spawned) = mpsc::unbounded_channel();
    (Parts(spawn), spawned)
}

/// Runs `work` to its end, and then what it has spawned.
pub(crate) async fn in_one_task(work: impl Future<Output = ()>, mut spawned: mpsc::UnboundedReceiver<Part>) {
    let mut work = pin!(futures_util::future::maybe_done(work));
    let mut parts = FuturesUnordered::new();
    let gate = Arc::new(Gate::default());
    let waker = Waker::from(gate.clone());
    poll_fn(|cx| {
        gate.task.register(cx.waker());
        let mut inner = Context::from_waker(&waker);
        for _ in 0..ROUNDS_MAX {
            gate.enter();
            while let Poll::Ready(Some(())) = parts.poll_next_unpin(&mut inner) {}
            let is_done = work.as_mut().poll(&mut inner).is_ready();
            while let Poll::Ready(Some(part)) = spawned.poll_recv(&mut inner) {
                parts.push(part);
                // It is looked at only when polled, and nobody wakes it.
                gate.wake_by_ref();
            }
            if is_done && parts.is_empty() {
                return Poll::Ready(());
            }
            if gate.leave() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Keeps the wake-ups that a turn gives itself inside the turn.
#[derive(Default)]
struct Gate {
    state: AtomicU8,
    task: AtomicWaker,
}

const OUTSIDE: u8 = 0;
const INSIDE: u8 = 1;
const INSIDE_WOKEN: u8 = 2;

impl Gate {
    fn enter(&self) {
        self.state.store(INSIDE, Ordering::SeqCst);
    }

    /// `false` if a wake-up came since `enter`: there is more to do.
    fn leave(&self) -> bool {
        self.state.compare_exchange(INSIDE, OUTSIDE, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

impl Wake for Gate {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let inside = self.state.compare_exchange(INSIDE, INSIDE_WOKEN, Ordering::SeqCst, Ordering::SeqCst);
        if inside == Err(OUTSIDE) {
            self.task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use hyper::rt::Executor as _;

    use super::*;

    #[test]
    fn what_one_part_makes_ready_for_another_is_done_in_the_same_turn() {
        let (parts, spawned) = parts();
        let work = async move {
            let (ask, mut asked) = mpsc::unbounded_channel::<u32>();
            let (answer, mut answered) = mpsc::unbounded_channel();
            parts.execute(Box::pin(async move {
                while let Some(number) = asked.recv().await {
                    answer.send(number + 1).unwrap();
                }
            }));
            for number in 0..5 {
                ask.send(number).unwrap();
                assert_eq!(answered.recv().await, Some(number + 1));
            }
        };
        let mut task = pin!(in_one_task(work, spawned));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(task.as_mut().poll(&mut cx).is_ready());
    }

    #[tokio::test]
    async fn what_was_spawned_is_finished_after_the_work() {
        let (parts, spawned) = parts();
        let (done, is_done) = tokio::sync::oneshot::channel();
        let late = parts.clone();
        in_one_task(
            async move {
                parts.execute(Box::pin(async {
                    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
                    done.send(()).unwrap();
                }));
            },
            spawned,
        )
        .await;
        is_done.await.unwrap();
        late.execute(Box::pin(async { unreachable!("nobody runs it") }));
    }
}
