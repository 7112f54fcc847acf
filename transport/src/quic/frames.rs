//! Client frames on a QUIC stream, both ways. Neither half loses or repeats a byte when a call of it is cancelled; the
//! reader never holds more than one frame and what the stream's window allows.

use std::{collections::VecDeque, mem, time::Duration};

use bytes::{BufMut, Bytes, BytesMut};
use stentor_proto::frame::{self, BadFrame};
use thiserror::Error;

use super::{
    QuicError,
    driver::{ReceiveHalf, SendHalf, Unreadable, Unwritable},
};
use crate::memory::{self, Stopped};

/// Packets of about 1.4 kB come as a chunk each; taking several at once costs one lock for all. Not more: the places for
/// them are part of every idle reader.
const CHUNKS_AT_ONCE: usize = 8;

/// Smaller frames are copied together: quinn-proto keeps a list of what is not acknowledged and walks it for each packet.
const COALESCE_BELOW_BYTES: usize = 2 * 1024;
/// Until they fill this much.
const COALESCED_BYTES: usize = 16 * 1024;

/// `ClientFrame::Resume`; a test keeps it so.
const RESUME_KIND: u8 = 2;

/// How long [`FrameWriter::finish`] waits for the other side to have everything.
const FINISH_TIMEOUT: Duration = Duration::from_secs(3);

/// Why no more frames come.
#[derive(Debug, Error)]
pub enum ReadError {
    /// Bytes that are no frame, or too long a one: the other side's fault. Every later call says the same.
    #[error(transparent)]
    BadFrame(#[from] BadFrame),
    /// The stream ended within a frame.
    #[error("the stream ended within a frame")]
    CutShort,
    /// The other side gave the stream up.
    #[error("the other side gave the stream up (code {0})")]
    Abandoned(u64),
    /// The connection is gone.
    #[error(transparent)]
    Connection(#[from] QuicError),
}

/// Why no more frames can be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The other side doesn't read this stream any more.
    #[error("the other side does not read any more (code {0})")]
    Stopped(u64),
    /// The stream was finished before.
    #[error("the stream is finished")]
    Finished,
    /// The connection is gone.
    #[error(transparent)]
    Connection(#[from] QuicError),
}

#[derive(Debug)]
enum Receive {
    Wire(ReceiveHalf),
    Memory(memory::Receiver),
}

#[derive(Debug)]
enum Send {
    Wire(SendHalf),
    Memory(memory::Sender),
}

pub(super) fn halves((send, receive): (SendHalf, ReceiveHalf)) -> (FrameWriter, FrameReader) {
    (FrameWriter::new(Send::Wire(send)), FrameReader::new(Receive::Wire(receive)))
}

pub(super) fn simulated((send, receive): (memory::Sender, memory::Receiver)) -> (FrameWriter, FrameReader) {
    (FrameWriter::new(Send::Memory(send)), FrameReader::new(Receive::Memory(receive)))
}

/// The receiving half of a stream.
#[derive(Debug)]
pub struct FrameReader {
    receive: Receive,
    buffer: BytesMut,
    max_frame_bytes: usize,
    max_resume_bytes: usize,
    ended: bool,
}

impl FrameReader {
    fn new(receive: Receive) -> Self {
        Self {
            receive,
            buffer: BytesMut::new(),
            max_frame_bytes: frame::DEFAULT_MAX_BYTES,
            max_resume_bytes: frame::MAX_RESUME_BYTES,
            ended: false,
        }
    }

    /// The longest frame that may come, except for `Resume`, which has a limit of its own.
    pub fn set_max_frame_bytes(&mut self, bytes: usize) {
        self.max_frame_bytes = bytes;
    }

    /// The longest `Resume` that may come, at most `frame::MAX_RESUME_BYTES`. A gateway keeps it small until it knows
    /// who is calling: the reader holds that much for a frame that never ends.
    pub fn set_max_resume_bytes(&mut self, bytes: usize) {
        self.max_resume_bytes = bytes;
    }

    /// The next frame: kind and message. `None` when the other side finished the stream between two frames.
    /// Cancel-safe: no byte is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Option<(u8, Bytes)>, ReadError> {
        loop {
            self.check_resume()?;
            if let Some(frame) = frame::split(&mut self.buffer, self.max_frame_bytes)? {
                if self.buffer.is_empty() {
                    // An idle connection holds no buffer.
                    self.buffer = BytesMut::new();
                }
                if let Receive::Wire(receive) = &self.receive {
                    receive.set_busy(self.holds_frame());
                }
                return Ok(Some(frame));
            }
            if self.ended {
                return if self.buffer.is_empty() { Ok(None) } else { Err(ReadError::CutShort) };
            }
            self.receive_more().await?;
        }
    }

    /// Whether another whole frame is at hand.
    fn holds_frame(&self) -> bool {
        let length = self.buffer.first_chunk().map(|&length| u32::from_le_bytes(length) as usize);
        length.is_some_and(|length| self.buffer.len() - size_of::<u32>() >= length)
    }

    fn check_resume(&self) -> Result<(), BadFrame> {
        let Some(([a, b, c, d, RESUME_KIND], _)) = self.buffer.split_first_chunk() else { return Ok(()) };
        let (bytes, limit) = (u32::from_le_bytes([*a, *b, *c, *d]) as usize, self.max_resume_bytes);
        if bytes > limit { Err(BadFrame::TooLarge { bytes, limit }) } else { Ok(()) }
    }

    async fn receive_more(&mut self) -> Result<(), ReadError> {
        let mut chunks = [const { Bytes::new() }; CHUNKS_AT_ONCE];
        let receive = match &mut self.receive {
            Receive::Wire(receive) => receive,
            Receive::Memory(receive) => {
                match receive.read().await.map_err(QuicError::from)? {
                    Some(bytes) => self.buffer.put_slice(&bytes),
                    None => self.ended = true,
                }
                return Ok(());
            }
        };
        match receive.read(&mut chunks).await {
            Ok(Some(count)) => {
                let chunks = chunks.get(..count).unwrap_or(&chunks);
                self.buffer.reserve(chunks.iter().map(Bytes::len).sum());
                chunks.iter().for_each(|chunk| self.buffer.put_slice(chunk));
                Ok(())
            }
            Ok(None) => {
                self.ended = true;
                Ok(())
            }
            Err(Unreadable::Reset(code)) => Err(ReadError::Abandoned(code)),
            Err(Unreadable::Lost(error)) => Err(QuicError::from(error).into()),
        }
    }
}

/// Chunks for which a writer keeps room when it has nothing to write.
const IDLE_CHUNKS: usize = 4;

/// The sending half of a stream. Dropping it finishes the stream without waiting.
#[derive(Debug)]
pub struct FrameWriter {
    send: Send,
    /// Taken over from callers, not yet by the stream.
    pending: VecDeque<Bytes>,
}

impl FrameWriter {
    fn new(send: Send) -> Self {
        Self { send, pending: VecDeque::new() }
    }

    /// Writes whole encoded frames in order, small ones together; waits while the windows are full. The frames are
    /// taken out of the slice at once. When the future is dropped before its end, the next call goes on where it
    /// stopped: frames are never torn, repeated or reordered.
    pub async fn write(&mut self, frames: &mut [Bytes]) -> Result<(), WriteError> {
        coalesce(frames, &mut self.pending);
        self.flush().await
    }

    /// There is nothing more to write soon. Nearly all connections are idle, and the room of its longest burst would stay
    /// with each.
    pub fn rest(&mut self) {
        self.pending.shrink_to(IDLE_CHUNKS);
    }

    /// Ends the stream and waits up to 3 s until the other side has everything (or has gone).
    pub async fn finish(&mut self) {
        let finish = async {
            if self.flush().await.is_err() {
                return;
            }
            match &mut self.send {
                Send::Wire(send) => send.finish().await,
                Send::Memory(send) => send.finish().await,
            }
        };
        let _ = tokio::time::timeout(FINISH_TIMEOUT, finish).await;
    }

    async fn flush(&mut self) -> Result<(), WriteError> {
        while !self.pending.is_empty() {
            let send = match &mut self.send {
                Send::Wire(send) => send,
                Send::Memory(send) => {
                    simulated_write(send, &mut self.pending).await?;
                    continue;
                }
            };
            // A chunk that is taken in part stays with its rest.
            match send.write(self.pending.make_contiguous()).await {
                Ok(written) => drop(self.pending.drain(..written)),
                Err(error) => {
                    self.pending.clear();
                    return Err(match error {
                        Unwritable::Stopped(code) => WriteError::Stopped(code),
                        Unwritable::Lost(error) => QuicError::from(error).into(),
                        Unwritable::Finished => WriteError::Finished,
                    });
                }
            }
        }
        Ok(())
    }
}

async fn simulated_write(send: &mut memory::Sender, pending: &mut VecDeque<Bytes>) -> Result<(), WriteError> {
    let Some(front) = pending.front_mut() else { return Ok(()) };
    let written = send.write(front).await;
    if front.is_empty() {
        pending.pop_front();
    }
    written.map_err(|why| {
        pending.clear();
        match why {
            Stopped::ByReader => WriteError::Stopped(0),
            Stopped::Finished => WriteError::Finished,
            Stopped::Gone(why) => QuicError::from(why).into(),
        }
    })
}

/// Moves `frames` to `out`: runs of small ones as one chunk, the others as they are.
fn coalesce(mut frames: &mut [Bytes], out: &mut VecDeque<Bytes>) {
    while !frames.is_empty() {
        let mut bytes = 0;
        let fits = |frame: &&Bytes| {
            bytes += frame.len();
            frame.len() < COALESCE_BELOW_BYTES && bytes <= COALESCED_BYTES
        };
        let run = frames.iter().take_while(fits).count().max(1);
        let (first, rest) = frames.split_at_mut(run);
        frames = rest;
        match first {
            [lone] => out.push_back(mem::take(lone)),
            small => {
                let mut together = BytesMut::with_capacity(small.iter().map(Bytes::len).sum());
                small.iter_mut().for_each(|frame| together.put_slice(&mem::take(frame)));
                out.push_back(together.freeze());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use stentor_proto::{frame::ClientFrame, v1};

    use super::*;

    #[test]
    fn the_kind_with_a_limit_of_its_own_is_resume() {
        assert_eq!(ClientFrame::from(v1::Resume::default()).kind(), RESUME_KIND);
    }

    proptest! {
        #[test]
        fn coalescing_keeps_every_byte_in_order(lengths in prop::collection::vec(0usize..5_000, 0..80)) {
            let mut frames: Vec<Bytes> = lengths.iter().enumerate().map(|(i, &n)| vec![i as u8; n].into()).collect();
            let expected = frames.concat();
            let mut out = VecDeque::new();
            coalesce(&mut frames, &mut out);
            prop_assert!(frames.iter().all(Bytes::is_empty));
            prop_assert_eq!(out.make_contiguous().concat(), expected);
        }
    }

    #[test]
    fn small_frames_travel_together_and_large_ones_uncopied() {
        let large = Bytes::from(vec![1; 8_000]);
        let mut frames = vec![Bytes::from_static(b"a"); 100];
        frames.push(large.clone());
        frames.push(Bytes::from_static(b"b"));
        let mut out = VecDeque::new();
        coalesce(&mut frames, &mut out);
        assert_eq!(out.iter().map(Bytes::len).collect::<Vec<_>>(), [100, 8_000, 1]);
        assert_eq!(out[1].as_ptr(), large.as_ptr());
    }
}
