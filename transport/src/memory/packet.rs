//! What travels on a simulated wire, and when it arrives. Must never compare equal times by anything but the order in
//! which they were sent.

use std::{cmp::Ordering, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::Instant;

use super::wire::Wire;

/// As QUIC's own (`quic::IDLE_TIMEOUT_MS`).
pub(crate) const IDLE: Duration = Duration::from_secs(30);
/// As QUIC's own, of the device.
pub(crate) const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A packet. Numbers of streams are the opener's count on its wire.
#[derive(Debug)]
pub(crate) enum Packet {
    /// A call.
    Dial,
    /// It is taken.
    Welcome,
    /// It is not.
    Refused,
    /// Bytes of a stream.
    Data(u64, Bytes),
    /// A stream's last byte was before.
    Finish(u64),
    /// The reader has taken so many bytes.
    Credit(u64, usize),
    /// The reader gives up a stream.
    Stop(u64),
    /// The connection is closed on purpose.
    Close(u32, String),
    /// The receiver's counterpart is unknown there.
    Reset,
    /// Are you there?
    Ping,
    /// Yes.
    Pong,
    /// No packet: time to look at idle timers.
    Watch,
}

impl Packet {
    /// For the trace: a word, a number, bytes.
    pub(crate) fn describe(&self) -> (&'static str, u64, &[u8]) {
        match self {
            Self::Dial => ("dial", 0, &[]),
            Self::Welcome => ("welcome", 0, &[]),
            Self::Refused => ("refused", 0, &[]),
            Self::Data(stream, bytes) => ("data", *stream, bytes),
            Self::Finish(stream) => ("finish", *stream, &[]),
            Self::Credit(stream, bytes) => ("credit", stream << 32 | *bytes as u64, &[]),
            Self::Stop(stream) => ("stop", *stream, &[]),
            Self::Close(code, reason) => ("close", u64::from(*code), reason.as_bytes()),
            Self::Reset => ("reset", 0, &[]),
            Self::Ping => ("ping", 0, &[]),
            Self::Pong => ("pong", 0, &[]),
            Self::Watch => ("watch", 0, &[]),
        }
    }
}

/// A packet on its way, ordered so that the earliest is the greatest: a heap gives it out first.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) at: Instant,
    pub(crate) no: u64,
    pub(crate) wire: Arc<Wire>,
    pub(crate) to_side: usize,
    pub(crate) packet: Packet,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.no) == (other.at, other.no)
    }
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.no).cmp(&(self.at, self.no))
    }
}
