//! A bounded queue of frames that a gRPC stream drains in batches: many writers, no task of its own. Must never grow
//! beyond its budget by what others send; only answers to bounded requests may pass it.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use futures_util::Stream;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// A batch is closed when it has about so many bytes…
const BATCH_BYTES: usize = 64 * 1024;
/// …or so many frames, so that one poll stays short.
const BATCH_FRAMES: usize = 512;

/// Why a frame was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Over the budget: later perhaps.
    Full,
    /// The stream is gone: never again.
    Closed,
}

/// Frames on their way into one stream.
pub(crate) struct FrameQueue<T> {
    state: Mutex<State<T>>,
    space: Notify,
    budget_bytes: usize,
}

struct State<T> {
    frames: VecDeque<(T, usize)>,
    bytes: usize,
    waker: Option<Waker>,
    closed: bool,
}

impl<T> FrameQueue<T> {
    /// An open queue; [`Self::try_push`] keeps within `budget_bytes`.
    pub(crate) fn new(budget_bytes: usize) -> Arc<Self> {
        let state = State { frames: VecDeque::new(), bytes: 0, waker: None, closed: false };
        Arc::new(Self { state: Mutex::new(state), space: Notify::new(), budget_bytes })
    }

    /// Queues an answer whose request was bounded already. False when the stream is gone.
    pub(crate) fn push(&self, frame: T, bytes: usize) -> bool {
        self.put(frame, bytes, usize::MAX).is_ok()
    }

    /// Queues within the budget. A frame larger than the budget passes an empty queue.
    pub(crate) fn try_push(&self, frame: T, bytes: usize) -> Result<(), Refused> {
        self.put(frame, bytes, self.budget_bytes).map_err(|(_, refused)| refused)
    }

    /// Queues within the budget, waiting for room. False when the stream is gone.
    pub(crate) async fn push_when_room(&self, frame: T, bytes: usize) -> bool {
        let mut frame = frame;
        loop {
            let room = self.space.notified();
            match self.put(frame, bytes, self.budget_bytes) {
                Ok(()) => return true,
                Err((_, Refused::Closed)) => return false,
                Err((back, Refused::Full)) => frame = back,
            }
            room.await;
        }
    }

    fn put(&self, frame: T, bytes: usize, budget: usize) -> Result<(), (T, Refused)> {
        let mut state = self.state.lock();
        if state.closed {
            return Err((frame, Refused::Closed));
        }
        if state.bytes > 0 && state.bytes.saturating_add(bytes) > budget {
            return Err((frame, Refused::Full));
        }
        state.bytes += bytes;
        state.frames.push_back((frame, bytes));
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Ends the stream; what is queued is forgotten.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.frames = VecDeque::new();
        state.bytes = 0;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        self.space.notify_waiters();
    }

    /// Returns at once while what waits is within twice the budget, else when it is again: whoever takes requests in
    /// whose answers go into this queue must wait here, or a caller that never reads could fill the memory.
    pub(crate) async fn room(&self) {
        loop {
            let room = self.space.notified();
            {
                let state = self.state.lock();
                if state.closed || state.bytes <= 2 * self.budget_bytes {
                    return;
                }
            }
            room.await;
        }
    }

    /// Whether the stream is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    fn poll_batch(&self, context: &Context<'_>) -> Poll<Option<Vec<T>>> {
        let mut state = self.state.lock();
        if state.frames.is_empty() {
            if state.closed {
                return Poll::Ready(None);
            }
            state.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH_BYTES && batch.len() < BATCH_FRAMES {
            let Some((frame, frame_bytes)) = state.frames.pop_front() else { break };
            batch.push(frame);
            bytes += frame_bytes;
        }
        state.bytes -= bytes;
        drop(state);
        self.space.notify_waiters();
        Poll::Ready(Some(batch))
    }
}

/// The reading end, for tonic. Dropping it closes the queue, so that writers learn that the stream is gone.
pub(crate) struct Batches<T>(Arc<FrameQueue<T>>);

impl<T> Batches<T> {
    /// There must be one reader only.
    pub(crate) fn of(queue: Arc<FrameQueue<T>>) -> Self {
        Self(queue)
    }
}

impl<T> Stream for Batches<T> {
    type Item = Vec<T>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Vec<T>>> {
        self.0.poll_batch(context)
    }
}

impl<T> Drop for Batches<T> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    #[tokio::test]
    async fn frames_come_out_in_order_and_in_batches() {
        let queue = FrameQueue::new(10);
        let mut batches = Batches::of(queue.clone());
        assert!(queue.push(1, 6));
        assert_eq!(queue.try_push(2, 6), Err(Refused::Full));
        assert!(queue.push(3, 6));
        assert_eq!(batches.next().await, Some(vec![1, 3]));
        assert_eq!(queue.try_push(4, 60), Ok(()));
        assert_eq!(batches.next().await, Some(vec![4]));
    }

    #[tokio::test]
    async fn requests_wait_while_their_answers_fill_the_queue() {
        let queue = FrameQueue::new(10);
        let mut batches = Batches::of(queue.clone());
        queue.push(1, 20);
        assert!(futures_util::poll!(std::pin::pin!(queue.room())).is_ready());
        queue.push(2, 1);
        let mut room = std::pin::pin!(queue.room());
        assert!(futures_util::poll!(room.as_mut()).is_pending());
        assert_eq!(batches.next().await, Some(vec![1, 2]));
        room.await;
    }

    #[tokio::test]
    async fn a_waiting_writer_goes_on_when_there_is_room_and_ends_when_the_stream_does() {
        let queue = FrameQueue::new(10);
        let mut batches = Batches::of(queue.clone());
        assert!(queue.push(1, 10));
        let writer = tokio::spawn({
            let queue = queue.clone();
            async move { (queue.push_when_room(2, 10).await, queue.push_when_room(3, 10).await) }
        });
        assert_eq!(batches.next().await, Some(vec![1]));
        assert_eq!(batches.next().await, Some(vec![2]));
        drop(batches);
        let (second, _) = writer.await.unwrap();
        assert!(second);
        assert!(queue.is_closed());
        assert!(!queue.push(5, 1));
    }
}
