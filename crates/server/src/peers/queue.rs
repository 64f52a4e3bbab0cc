//! What waits to be sent to one peer on one lane.
//!
//! Promises. A push never waits, and wakes the writer only if it may sleep. Frames leave in the order of their pushes. What waits and what
//! is being written stay below the bound together; what does not fit is dropped, the newest first, and counted.
//! Not promised. That what was taken arrives.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The last part of the room is kept for frames of at most `SMALL_LEN`, which are heartbeats and votes.
const KEPT_FOR_SMALL: usize = 8;
const SMALL_LEN: usize = 512;
/// What a frame takes beside its bytes.
const FRAME_OVERHEAD: usize = 64;

pub(super) struct Queue {
    inner: Mutex<Inner>,
    wake: Notify,
    bytes_max: usize,
    pub(super) dropped_full: AtomicU64,
    /// While there was no connection.
    pub(super) dropped_down: AtomicU64,
}

#[derive(Default)]
struct Inner {
    frames: Vec<Vec<u8>>,
    /// Of `frames` and of what the writer has taken and not yet written.
    bytes: usize,
    is_open: bool,
}

impl Queue {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            inner: Mutex::default(),
            wake: Notify::new(),
            bytes_max,
            dropped_full: AtomicU64::new(0),
            dropped_down: AtomicU64::new(0),
        }
    }

    /// False: it was dropped.
    pub(super) fn push(&self, frame: Vec<u8>) -> bool {
        let mut inner = self.lock();
        if !inner.is_open {
            self.dropped_down.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let max = match frame.len() {
            ..=SMALL_LEN => self.bytes_max,
            _ => self.bytes_max - self.bytes_max / KEPT_FOR_SMALL,
        };
        let size = size(&frame);
        // A frame that is larger than the queue goes when nothing else waits.
        if inner.bytes > 0 && inner.bytes + size > max {
            self.dropped_full.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        inner.bytes += size;
        inner.frames.push(frame);
        let was_empty = inner.frames.len() == 1;
        drop(inner);
        if was_empty {
            self.wake.notify_one();
        }
        true
    }

    /// Returns when something waits.
    pub(super) async fn ready(&self) {
        while self.lock().frames.is_empty() {
            self.wake.notified().await;
        }
    }

    /// All that waits; `written` gives its room back.
    pub(super) fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.lock().frames)
    }

    pub(super) fn written(&self, frames: &[Vec<u8>]) {
        let size: usize = frames.iter().map(|frame| size(frame)).sum();
        let mut inner = self.lock();
        inner.bytes = inner.bytes.saturating_sub(size);
    }

    pub(super) fn open(&self) {
        self.lock().is_open = true;
    }

    /// Forgets what waits: when a connection is back, it is too old to be of use.
    pub(super) fn close(&self) {
        let waited = std::mem::take(&mut *self.lock()).frames;
        self.dropped_down.fetch_add(waited.len() as u64, Ordering::Relaxed);
    }

    /// Of what waits or is being written.
    pub(super) fn bytes(&self) -> usize {
        self.lock().bytes
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn size(frame: &[u8]) -> usize {
    frame.len() + FRAME_OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_drops_the_newest_and_keeps_room_for_small_frames() {
        let queue = Queue::new(8 * 1064);
        assert!(!queue.push(vec![1]), "there is no connection yet");
        queue.open();
        let taken = (0..10u8).filter(|n| queue.push(vec![*n; 1000])).count();
        assert_eq!((taken, queue.dropped_full.load(Ordering::Relaxed)), (7, 3));
        assert!(queue.push(vec![100; 100]), "a heartbeat still goes");
        let frames = queue.take();
        assert_eq!(frames.iter().map(|frame| frame[0]).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 100]);
        assert!(!queue.push(vec![8; 1000]), "what is being written counts until it is written");
        queue.written(&frames);
        assert_eq!(queue.bytes(), 0);
        assert!(queue.push(vec![9; 100_000]), "larger than the queue, but alone");
        queue.close();
        assert_eq!((queue.bytes(), queue.dropped_down.load(Ordering::Relaxed)), (0, 2));
    }
}
