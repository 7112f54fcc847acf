//! What waits to be written to one device, in order. Small frames are encoded one behind the other, shared ones are
//! only referred to. Must be asked for room before events are put in; answers are bounded by what was asked.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use stentor_proto::frame::ServerFrame;

/// Frames that are handed to the writer at a time.
const BATCH_CHUNKS: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    chunks: VecDeque<Bytes>,
    tail: BytesMut,
    waiting_bytes: usize,
    writing_bytes: usize,
}

impl Outgoing {
    /// Appends a frame of this session's own.
    pub(super) fn push(&mut self, frame: impl Into<ServerFrame>) {
        let before = self.tail.len();
        frame.into().encode(&mut self.tail);
        self.waiting_bytes += self.tail.len() - before;
    }

    /// Appends a whole encoded frame that others may share.
    pub(super) fn push_shared(&mut self, frame: Bytes) {
        self.close_tail();
        self.waiting_bytes += frame.len();
        self.chunks.push_back(frame);
    }

    /// Bytes that wait or are being written.
    pub(super) fn bytes(&self) -> usize {
        self.waiting_bytes + self.writing_bytes
    }

    /// Moves what waits to the writer's batch, up to a bound.
    pub(super) fn fill(&mut self, batch: &mut Vec<Bytes>) {
        self.close_tail();
        let count = self.chunks.len().min(BATCH_CHUNKS);
        for chunk in self.chunks.drain(..count) {
            self.waiting_bytes -= chunk.len();
            self.writing_bytes += chunk.len();
            batch.push(chunk);
        }
        if self.chunks.is_empty() {
            // An idle session holds no buffer.
            self.chunks = VecDeque::new();
        }
    }

    /// The batch was written.
    pub(super) fn written(&mut self) {
        self.writing_bytes = 0;
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.chunks.push_back(std::mem::take(&mut self.tail).freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use stentor_proto::v1;

    use super::*;

    #[test]
    fn frames_leave_in_order_and_are_counted_until_written() {
        let mut out = Outgoing::default();
        let pong = |token| ServerFrame::from(v1::Pong { token });
        out.push(pong(1));
        out.push(pong(2));
        out.push_shared(pong(3).to_bytes());
        out.push(pong(4));
        let mut batch = Vec::new();
        out.fill(&mut batch);
        let expected: Vec<u8> = (1..=4).flat_map(|token| pong(token).to_bytes()).collect();
        assert_eq!(batch.concat(), expected);
        assert_eq!(out.bytes(), expected.len());
        out.written();
        assert_eq!(out.bytes(), 0);
    }
}
