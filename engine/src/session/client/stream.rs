//! One conversation's stream as a device takes it: dense over events and hidden stretches, from its cursor on. Must
//! never pass a seq that it did not hand on: a gap is the gateway's fault, and the connection ends with it.

use stentor_proto::{
    ids::Seq,
    record::{self, BadRecord},
    v1::{Hidden, Item, item},
};
use thiserror::Error;

/// Where a device wants a conversation's stream to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// After this seq; 0 is from the first event on.
    After(Seq),
    /// After the head, as it is when the gateway takes the subscription.
    Head,
}

/// The gateway broke its promise about a conversation's stream; the device's cursor has not moved beyond what came
/// before, and a new connection goes on from there.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadStream {
    /// A seq is missing.
    #[error("expected seq {expected}, got {got}: events are missing")]
    Gap {
        /// The next in order.
        expected: Seq,
        /// What came.
        got: Seq,
    },
    /// A hidden stretch that ends before it begins, or an item without content.
    #[error("an item of the stream is malformed")]
    Malformed,
    /// Bytes changed since the event entered the cluster.
    #[error(transparent)]
    Record(#[from] BadRecord),
}

/// One new step of a stream.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "events are the rule; a box would cost each of them an allocation")]
pub enum Step {
    /// An event; its record was verified.
    Event(record::Event),
    /// A stretch that this reader does not get; it begins at the cursor.
    Hidden(Hidden),
}

#[derive(Debug, Clone)]
pub(super) struct Stream {
    /// The next seq; `None` until the gateway has said where the stream begins.
    next: Option<u64>,
    /// A stream of an earlier subscription may still be on its way, so that gaps mean nothing yet.
    stale: bool,
    /// When to subscribe again, after a refusal that may pass.
    pub(super) retry_at: Option<u64>,
    pub(super) attempt: u32,
}

impl Stream {
    pub(super) fn new(start: Start, stale: bool) -> Self {
        let next = match start {
            Start::After(seq) => Some(seq.0.saturating_add(1)),
            Start::Head => None,
        };
        Self { next, stale, retry_at: None, attempt: 0 }
    }

    /// The last seq that was handed on.
    pub(super) fn cursor(&self) -> Option<Seq> {
        self.next.map(|next| Seq(next.saturating_sub(1)))
    }

    /// The gateway said where it stands. Only the first word after a subscription to the head sets the begin.
    pub(super) fn state(&mut self, head: Seq) {
        self.stale = false;
        self.attempt = 0;
        self.next.get_or_insert(head.0.saturating_add(1));
    }

    pub(super) fn disconnected(&mut self) {
        self.stale = false;
        self.retry_at = None;
    }

    /// Takes one item; `None` for what the device has already, which a lost cursor move allows.
    pub(super) fn take(&mut self, item: Item, key_crc: u32) -> Result<Option<Step>, BadStream> {
        match item.item {
            Some(item::Item::Record(bytes)) => {
                let event = record::decode(&bytes, key_crc)?;
                let seq = event.header.seq;
                if seq == 0 || seq == u64::MAX {
                    return Err(BadStream::Malformed);
                }
                Ok(self.advance(seq, seq)?.map(|_| Step::Event(event)))
            }
            Some(item::Item::Hidden(hidden)) => {
                if hidden.from == 0 || hidden.from > hidden.to || hidden.to == u64::MAX {
                    return Err(BadStream::Malformed);
                }
                Ok(self.advance(hidden.from, hidden.to)?.map(|from| Step::Hidden(Hidden { from, ..hidden })))
            }
            None => Err(BadStream::Malformed),
        }
    }

    /// Passes [from, to] and returns where the new part begins; `None` when there is none.
    fn advance(&mut self, from: u64, to: u64) -> Result<Option<u64>, BadStream> {
        let next = *self.next.get_or_insert(from);
        if to < next {
            return Ok(None);
        }
        if from > next {
            // Of a subscription that was replaced: the new one's events come after its state.
            return if self.stale { Ok(None) } else { Err(BadStream::Gap { expected: Seq(next), got: Seq(from) }) };
        }
        self.next = Some(to.saturating_add(1));
        Ok(Some(next))
    }
}

#[cfg(test)]
mod tests {
    use stentor_proto::{Bytes, ids::key_crc, v1::EventHeader};

    use super::*;

    fn event(seq: u64) -> Item {
        let mut out = Vec::new();
        record::encode(
            &EventHeader { seq, ..Default::default() },
            b"x",
            key_crc(b"a", b"c"),
            crc32fast::hash(b"x"),
            &mut out,
        );
        Item { item: Some(item::Item::Record(out.into())) }
    }

    fn hidden(from: u64, to: u64) -> Item {
        Item { item: Some(item::Item::Hidden(Hidden { from, to, reason: 1 })) }
    }

    fn take(stream: &mut Stream, item: Item) -> Result<Option<(u64, u64)>, BadStream> {
        Ok(stream.take(item, key_crc(b"a", b"c"))?.map(|step| match step {
            Step::Event(e) => (e.header.seq, e.header.seq),
            Step::Hidden(h) => (h.from, h.to),
        }))
    }

    #[test]
    fn events_and_hidden_stretches_are_dense_together() {
        let mut stream = Stream::new(Start::After(Seq(2)), false);
        assert_eq!(take(&mut stream, event(2)), Ok(None), "below the cursor: dropped");
        assert_eq!(take(&mut stream, event(3)), Ok(Some((3, 3))));
        assert_eq!(take(&mut stream, hidden(2, 7)), Ok(Some((4, 7))), "clipped to what is new");
        assert_eq!(take(&mut stream, hidden(5, 7)), Ok(None));
        assert_eq!(take(&mut stream, event(9)), Err(BadStream::Gap { expected: Seq(8), got: Seq(9) }));
        assert_eq!(take(&mut stream, hidden(9, 10)), Err(BadStream::Gap { expected: Seq(8), got: Seq(9) }));
        assert_eq!(stream.cursor(), Some(Seq(7)), "a gap moves nothing");
        assert_eq!(take(&mut stream, event(8)), Ok(Some((8, 8))));
    }

    #[test]
    fn nonsense_is_a_typed_error_and_moves_nothing() {
        let mut stream = Stream::new(Start::After(Seq(0)), false);
        assert_eq!(take(&mut stream, hidden(3, 1)), Err(BadStream::Malformed));
        assert_eq!(take(&mut stream, hidden(1, u64::MAX)), Err(BadStream::Malformed));
        assert_eq!(take(&mut stream, Item { item: None }), Err(BadStream::Malformed));
        let record = Item { item: Some(item::Item::Record(Bytes::from_static(b"no record"))) };
        assert!(matches!(take(&mut stream, record), Err(BadStream::Record(_))));
        assert!(matches!(stream.take(event(1), key_crc(b"a", b"other")), Err(BadStream::Record(_))));
        assert_eq!(stream.cursor(), Some(Seq(0)));
    }

    #[test]
    fn a_stream_from_the_head_begins_where_the_gateway_says_once() {
        let mut stream = Stream::new(Start::Head, false);
        assert_eq!(stream.cursor(), None);
        stream.state(Seq(5));
        stream.state(Seq(9));
        assert_eq!(stream.cursor(), Some(Seq(5)));
        assert_eq!(take(&mut stream, event(6)), Ok(Some((6, 6))));
    }

    #[test]
    fn a_replaced_subscription_may_still_send_until_the_new_ones_state() {
        let mut stream = Stream::new(Start::After(Seq(1)), true);
        assert_eq!(take(&mut stream, event(50)), Ok(None));
        stream.state(Seq(60));
        assert!(take(&mut stream, event(50)).is_err());
        assert_eq!(take(&mut stream, event(2)), Ok(Some((2, 2))));
    }
}
