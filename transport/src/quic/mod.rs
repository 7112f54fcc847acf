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
