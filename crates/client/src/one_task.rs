//! A connection and what uses it, in one task.
//!
//! Promises. Everything that `work` has spawned through the executor is polled by the task of `work`; what one part of it makes ready for another is done in
//! the same turn. With a task for each part, an answer would go through the scheduler five times before the next request leaves,
//! and a runtime with several threads wakes another of them for it: that was a quarter of the processor time of a lone caller.
//! Not promised. That parts run side by side: what computes for long belongs in a task of its own.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::Poll;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;

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
    tenure_gate::rounds(|cx| {
        while let Poll::Ready(Some(())) = parts.poll_next_unpin(cx) {}
        let is_done = work.as_mut().poll(cx).is_ready();
        while let Poll::Ready(Some(part)) = spawned.poll_recv(cx) {
            parts.push(part);
            // It is looked at only when polled, and nobody wakes it.
            cx.waker().wake_by_ref();
        }
        if is_done && parts.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

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
