//! One QUIC connection, either side, and why connections end.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use quinn_proto::{ConnectError, ConnectionError, TransportErrorCode};
use thiserror::Error;

use super::{FrameReader, FrameWriter, driver, frames, listener::canonical};
use crate::memory::{self, Gone};

/// Why a connection failed or ended. Nothing can be said about bytes that were written before and not answered.
#[derive(Debug, Error)]
pub enum QuicError {
    /// The other side was silent for too long, or never answered at all.
    #[error("the other side does not answer")]
    TimedOut,
    /// The other side closed it on purpose.
    #[error("closed by the other side (code {code}): {reason}")]
    ClosedByPeer {
        /// The other side's code.
        code: u64,
        /// The other side's words.
        reason: String,
    },
    /// The other side refuses new connections.
    #[error("the other side refuses connections")]
    Refused,
    /// The other side has restarted and knows nothing of this connection.
    #[error("the other side has restarted")]
    Reset,
    /// Our own side closed it.
    #[error("closed")]
    Closed,
    /// The certificate is not of this cluster's CA, the protocols differ, or keys cannot be used.
    #[error("TLS: {0}")]
    Tls(String),
    /// The other side breaks QUIC's rules.
    #[error("QUIC: {0}")]
    Protocol(String),
    /// An address that cannot be connected to.
    #[error("{0} cannot be connected to")]
    Address(SocketAddr),
    /// No socket could be had on this side.
    #[error("no socket: {0}")]
    Socket(io::Error),
}

impl From<ConnectionError> for QuicError {
    fn from(error: ConnectionError) -> Self {
        /// RFC 9000, CONNECTION_REFUSED.
        const REFUSED: TransportErrorCode = TransportErrorCode::CONNECTION_REFUSED;
        let tls = |code: TransportErrorCode| (0x100..0x200).contains(&u64::from(code));
        match error {
            ConnectionError::TimedOut => Self::TimedOut,
            ConnectionError::Reset => Self::Reset,
            ConnectionError::LocallyClosed => Self::Closed,
            ConnectionError::ApplicationClosed(close) => Self::ClosedByPeer {
                code: close.error_code.into_inner(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            ConnectionError::ConnectionClosed(close) if close.error_code == REFUSED => Self::Refused,
            ConnectionError::ConnectionClosed(close) if tls(close.error_code) => Self::Tls(close.to_string()),
            ConnectionError::TransportError(error) if tls(error.code) => Self::Tls(error.to_string()),
            other => Self::Protocol(other.to_string()),
        }
    }
}

impl From<Gone> for QuicError {
    fn from(why: Gone) -> Self {
        match why {
            Gone::TimedOut => Self::TimedOut,
            Gone::Reset => Self::Reset,
            Gone::Refused => Self::Refused,
            Gone::Closed | Gone::Killed => Self::Closed,
            Gone::ClosedByPeer(code, reason) => Self::ClosedByPeer { code: code.into(), reason },
        }
    }
}

impl From<ConnectError> for QuicError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::InvalidRemoteAddress(addr) => Self::Address(addr),
            other => Self::Socket(io::Error::other(other)),
        }
    }
}

/// A connection; clones are the same one. It ends when [`Self::close`] is called, or when all clones and streams of it
/// are dropped.
#[derive(Debug, Clone)]
pub struct QuicConnection {
    inner: Inner,
}

#[derive(Debug, Clone)]
enum Inner {
    Wire(driver::Connection),
    Memory(Arc<memory::Side>),
}

/// As the real one's (`client::connect`).
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects over a simulated network.
pub(crate) async fn simulated_connect(host: &memory::Host, addr: SocketAddr) -> Result<QuicConnection, QuicError> {
    let connecting = memory::connect_quic(host, addr);
    let side = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| QuicError::TimedOut)??;
    Ok(QuicConnection::simulated(side))
}

impl QuicConnection {
    pub(super) fn new(inner: driver::Connection) -> Self {
        Self { inner: Inner::Wire(inner) }
    }

    pub(super) fn simulated(side: Arc<memory::Side>) -> Self {
        Self { inner: Inner::Memory(side) }
    }

    /// Opens a stream. The other side sees it with the first bytes that are written.
    pub async fn open(&self) -> Result<(FrameWriter, FrameReader), QuicError> {
        match &self.inner {
            Inner::Wire(connection) => Ok(frames::halves(connection.open().await?)),
            Inner::Memory(side) => Ok(frames::simulated(side.open()?)),
        }
    }

    /// The next stream that the other side opened. Cancel-safe.
    pub async fn accept_stream(&self) -> Result<(FrameWriter, FrameReader), QuicError> {
        match &self.inner {
            Inner::Wire(connection) => Ok(frames::halves(connection.accept().await?)),
            Inner::Memory(side) => Ok(frames::simulated(side.accept().await?)),
        }
    }

    /// Where the other side is; changes when a device moves to another network.
    pub fn remote_address(&self) -> SocketAddr {
        match &self.inner {
            Inner::Wire(connection) => canonical(connection.remote_address()),
            Inner::Memory(side) => side.remote_address(),
        }
    }

    /// Closes it now: what was not acknowledged yet may be lost. After [`FrameWriter::finish`] nothing is.
    pub fn close(&self, code: u32, reason: &str) {
        match &self.inner {
            Inner::Wire(connection) => connection.close(code, reason),
            Inner::Memory(side) => side.close(code, reason),
        }
    }

    /// Waits for its end, however it comes.
    pub async fn closed(&self) -> QuicError {
        match &self.inner {
            Inner::Wire(connection) => connection.closed().await.into(),
            Inner::Memory(side) => side.closed().await.into(),
        }
    }
}
