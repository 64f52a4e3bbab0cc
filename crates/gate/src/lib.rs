//! A task that does in one turn what its parts make ready for each other.
//!
//! Promises. A wake-up that comes while the task is polled leads to another round of the same turn, not through the scheduler: a connection of `h2` wakes
//! its task for every frame that is queued, and going round by the scheduler for each would cost as much as the frame, and may wake another thread.
//! A turn ends after a limited number of rounds, so that other tasks of the thread are served.
//! Not promised. Any order among the parts.

#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::future::{Future, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Rounds of one turn; then other tasks of the thread come first.
const ROUNDS_MAX: usize = 16;

/// Calls `round` until it is ready: again and again within a turn while something that it did has woken it.
///
/// ```
/// use std::task::Poll;
///
/// # futures_util::future::FutureExt::now_or_never(async {
/// let mut left = 3;
/// let countdown = tenure_gate::rounds(|cx| {
///     left -= 1;
///     // As a channel does that has got something for the other half of this task.
///     cx.waker().wake_by_ref();
///     if left == 0 { Poll::Ready(()) } else { Poll::Pending }
/// });
/// countdown.await;
/// # });
/// ```
pub fn rounds<T>(mut round: impl FnMut(&mut Context<'_>) -> Poll<T>) -> impl Future<Output = T> {
    let gate = Arc::new(Gate::default());
    let waker = Waker::from(gate.clone());
    poll_fn(move |cx| {
        gate.task.register(cx.waker());
        let mut inner = Context::from_waker(&waker);
        for _ in 0..ROUNDS_MAX {
            gate.enter();
            if let Poll::Ready(out) = round(&mut inner) {
                return Poll::Ready(out);
            }
            if gate.leave() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}

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
    use std::pin::pin;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn wake_ups_from_inside_stay_inside_and_others_get_out() {
        let outside = Arc::new(Count::default());
        let waker = Waker::from(outside.clone());
        let mut cx = Context::from_waker(&waker);
        let (mut called, mut kept) = (0, None);
        let mut task = pin!(rounds(|cx| {
            called += 1;
            if called < 5 {
                cx.waker().wake_by_ref();
            }
            kept.get_or_insert_with(|| cx.waker().clone());
            if called == 6 { Poll::Ready((called, kept.take())) } else { Poll::Pending }
        }));
        assert!(task.as_mut().poll(&mut cx).is_pending());
        assert_eq!(outside.0.load(Ordering::SeqCst), 0);
        let Poll::Ready((called, Some(inner))) = task.as_mut().poll(&mut cx) else {
            panic!("the sixth round is the last")
        };
        assert_eq!(called, 6);
        drop(inner);
    }

    #[test]
    fn a_wake_up_between_turns_reaches_the_task() {
        let outside = Arc::new(Count::default());
        let waker = Waker::from(outside.clone());
        let (give, take) = std::sync::mpsc::channel();
        let mut task = pin!(rounds(|cx| {
            let _ = give.send(cx.waker().clone());
            Poll::<()>::Pending
        }));
        assert!(task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        take.recv().unwrap().wake();
        assert_eq!(outside.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn who_never_rests_lets_others_in() {
        let outside = Arc::new(Count::default());
        let waker = Waker::from(outside.clone());
        let called = AtomicUsize::new(0);
        let mut task = pin!(rounds(|cx| {
            called.fetch_add(1, Ordering::SeqCst);
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        }));
        assert!(task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        assert_eq!((called.load(Ordering::SeqCst), outside.0.load(Ordering::SeqCst)), (ROUNDS_MAX, 1));
    }
}
