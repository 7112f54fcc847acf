//! The two halves of a stream. Must never lose or repeat a byte when a call is cancelled: a call either has done its work
//! or nothing.

use std::{
    future::poll_fn,
    task::{Context, Poll},
};

use bytes::Bytes;
use quinn_proto::{ConnectionError, FinishError, ReadError, StreamId, VarInt, WriteError};

use super::{Connection, waiting::Half};

/// Why nothing can be written any more.
#[derive(Debug)]
pub(in crate::quic) enum Unwritable {
    /// The other side does not read any more.
    Stopped(u64),
    Finished,
    Lost(ConnectionError),
}

/// Why nothing can be read any more.
#[derive(Debug)]
pub(in crate::quic) enum Unreadable {
    /// The other side gave the stream up.
    Reset(u64),
    Lost(ConnectionError),
}

/// The sending half. Dropped, it finishes the stream without waiting.
#[derive(Debug)]
pub(in crate::quic) struct SendHalf {
    connection: Connection,
    stream: StreamId,
}

impl SendHalf {
    pub(super) fn new(connection: Connection, stream: StreamId) -> Self {
        Self { connection, stream }
    }

    /// Takes over chunks from the front, waiting for room, and sends them; tells how many. Of one that is taken in part
    /// the rest is left.
    pub(in crate::quic) async fn write(&mut self, chunks: &mut [Bytes]) -> Result<usize, Unwritable> {
        poll_fn(|context| self.poll_write(context, chunks)).await
    }

    fn poll_write(&mut self, context: &Context<'_>, chunks: &mut [Bytes]) -> Poll<Result<usize, Unwritable>> {
        let stream = self.stream;
        self.connection.0.write(|state| {
            if let Some(error) = &state.error {
                return (false, Poll::Ready(Err(Unwritable::Lost(error.clone()))));
            }
            let result = match state.proto.send_stream(stream).write_chunks(chunks) {
                Ok(written) => return (true, Poll::Ready(Ok(written.chunks))),
                Err(WriteError::Blocked) => {
                    state.waiting.wait(Half::Send, stream, context.waker());
                    // What fills the windows must not wait.
                    self.connection.0.set_busy(false);
                    return (state.late, Poll::Pending);
                }
                Err(WriteError::Stopped(code)) => Poll::Ready(Err(Unwritable::Stopped(code.into_inner()))),
                Err(WriteError::ClosedStream) => Poll::Ready(Err(Unwritable::Finished)),
            };
            (false, result)
        })
    }

    /// Ends the stream and waits until the other side has everything, or wants no more, or is gone.
    pub(in crate::quic) async fn finish(&mut self) {
        let stream = self.stream;
        if self.connection.0.act(|state| state.proto.send_stream(stream).finish()).is_ok() {
            poll_fn(|context| self.poll_finished(context)).await;
        }
    }

    fn poll_finished(&mut self, context: &Context<'_>) -> Poll<()> {
        let stream = self.stream;
        self.connection.0.look(|state| {
            if state.error.is_some() || !matches!(state.proto.send_stream(stream).stopped(), Ok(None)) {
                return Poll::Ready(());
            }
            state.waiting.wait(Half::Send, stream, context.waker());
            Poll::Pending
        })
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        let stream = self.stream;
        self.connection.0.act(|state| {
            state.waiting.forget(Half::Send, stream);
            if state.error.is_some() {
                return;
            }
            let mut send = state.proto.send_stream(stream);
            if let Err(FinishError::Stopped(code)) = send.finish() {
                // Fails only for a stream that has ended.
                let _ = send.reset(code);
            }
        });
    }
}

/// The receiving half. Dropped, it tells the other side to send no more.
#[derive(Debug)]
pub(in crate::quic) struct ReceiveHalf {
    connection: Connection,
    stream: StreamId,
    /// Set once the stream has ended.
    ended: Option<Result<(), VarInt>>,
}

impl ReceiveHalf {
    pub(super) fn new(connection: Connection, stream: StreamId) -> Self {
        Self { connection, stream, ended: None }
    }

    /// Puts what has come into `chunks`, waiting for some; tells how many. `None` at the end of the stream.
    pub(in crate::quic) async fn read(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, Unreadable> {
        poll_fn(|context| self.poll_read(context, chunks)).await
    }

    /// Whether frames are at hand whose answers may come soon: until there are none, what is written is not sent at once.
    pub(in crate::quic) fn set_busy(&self, busy: bool) {
        self.connection.0.set_busy(busy);
    }

    fn poll_read(&mut self, context: &Context<'_>, chunks: &mut [Bytes]) -> Poll<Result<Option<usize>, Unreadable>> {
        let Self { connection, stream, ended } = self;
        connection.0.act_if(|state| {
            if state.waiting.waits(Half::Receive, *stream, context.waker()) {
                connection.0.set_busy(false);
                return (state.late, Poll::Pending);
            }
            let mut count = 0;
            // The other side may send more once enough was read.
            let mut transmit = false;
            if ended.is_none() {
                let mut receive = state.proto.recv_stream(*stream);
                match receive.read(true) {
                    Ok(mut read) => {
                        count = take(&mut read, chunks, ended);
                        transmit = read.finalize().should_transmit();
                    }
                    // It has ended, and all of it was read.
                    Err(_) => *ended = Some(Ok(())),
                }
            }
            let result = match (&*ended, &state.error) {
                _ if count > 0 => Poll::Ready(Ok(Some(count))),
                (Some(Ok(())), _) => Poll::Ready(Ok(None)),
                (Some(Err(code)), _) => Poll::Ready(Err(Unreadable::Reset(code.into_inner()))),
                (None, Some(error)) => Poll::Ready(Err(Unreadable::Lost(error.clone()))),
                (None, None) => {
                    connection.0.set_busy(false);
                    state.waiting.wait(Half::Receive, *stream, context.waker());
                    Poll::Pending
                }
            };
            (transmit || (state.late && result.is_pending()), result)
        })
    }
}

/// Moves what has come to the front of `chunks`; tells how many, and whether the stream has ended.
fn take(read: &mut quinn_proto::Chunks<'_>, chunks: &mut [Bytes], ended: &mut Option<Result<(), VarInt>>) -> usize {
    let mut count = 0;
    for place in chunks {
        match read.next(usize::MAX) {
            Ok(Some(chunk)) => *place = chunk.bytes,
            Ok(None) => *ended = Some(Ok(())),
            Err(ReadError::Reset(code)) => *ended = Some(Err(code)),
            Err(ReadError::Blocked) => break,
        }
        if ended.is_some() {
            break;
        }
        count += 1;
    }
    count
}

impl Drop for ReceiveHalf {
    fn drop(&mut self) {
        self.set_busy(false);
        if self.ended.is_some() {
            return;
        }
        let stream = self.stream;
        self.connection.0.act(|state| {
            state.waiting.forget(Half::Receive, stream);
            if state.error.is_none() {
                // Fails only for a stream that has ended.
                let _ = state.proto.recv_stream(stream).stop(VarInt::from_u32(0));
            }
        });
    }
}
