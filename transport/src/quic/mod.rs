//! QUIC for devices: the gateway's listener, the device's connections, and client frames on their streams. Must never
//! hold more for a connection than its windows allow, nor let one slow device delay another.

mod client;
mod connection;
mod driver;
mod frames;
mod listener;
#[cfg(test)]
mod tests;

pub use client::connect;
pub(crate) use connection::simulated_connect;
pub use connection::{QuicConnection, QuicError};
pub use frames::{FrameReader, FrameWriter, ReadError, WriteError};
pub use listener::{QuicIncoming, QuicLimits, QuicListener, server_config};

pub use crate::bind::BindError;

/// Both sides end a connection on which nothing came for this long. A device that comes back from a tunnel resumes its
/// session on a new one, so a longer life buys nothing.
const IDLE_TIMEOUT_MS: u32 = 30_000;

/// Packets after which the other side acknowledges at once, instead of two; before that it waits for its usual 25 ms. With a
/// delivery every 5 ms to each of 100 devices that was a sixth of all CPU (docs/performance.md).
const ACKNOWLEDGE_AFTER: u32 = 10;

/// draft-ietf-quic-ack-frequency. A peer that does not know it acknowledges as ever.
fn rare_acknowledgements() -> quinn_proto::AckFrequencyConfig {
    let mut config = quinn_proto::AckFrequencyConfig::default();
    config.ack_eliciting_threshold(quinn_proto::VarInt::from_u32(ACKNOWLEDGE_AFTER));
    config
}
