//! Byte streams of the simulated network, where real nodes have TCP. Must never show a reader the end of a stream that
//! its writer did not end.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    Host, Network,
    packet::Packet,
    wire::{Backlog, Gone, Kind, Stopped, Wire},
};

/// What may be under way one way: as much as Linux lets a TCP connection begin with, about.
const WINDOW_BYTES: usize = 256 * 1024;
/// The only stream of such a wire.
const ONLY: u64 = 0;

/// One end of a byte stream.
#[derive(Debug)]
pub(crate) struct Stream {
    wire: Arc<Wire>,
    side: usize,
}

/// Dials `addr`. Waits for ever where nobody answers: the caller has a deadline.
pub(crate) async fn connect(host: &Host, addr: SocketAddr) -> io::Result<Stream> {
    let windows = [WINDOW_BYTES; 2];
    let wire = host.network.0.new_wire(Kind::Stream, (host.ip, host.life), addr, windows);
    wire.open(0);
    // Dropped on its way, it hangs up.
    let stream = Stream { wire: wire.clone(), side: 0 };
    wire.send(0, Packet::Dial);
    poll_fn(|context| wire.poll_welcome(0, context)).await.map_err(failed)?;
    Ok(stream)
}

fn failed(why: Gone) -> io::Error {
    let kind = match why {
        Gone::Refused => io::ErrorKind::ConnectionRefused,
        Gone::Reset => io::ErrorKind::ConnectionReset,
        Gone::TimedOut => io::ErrorKind::TimedOut,
        Gone::Killed | Gone::Closed | Gone::ClosedByPeer(..) => io::ErrorKind::ConnectionAborted,
    };
    kind.into()
}

impl Stream {
    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.wire.ends[self.side]
    }

    pub(crate) fn remote_addr(&self) -> SocketAddr {
        self.wire.ends[1 - self.side]
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if out.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let read = self.wire.poll_read(self.side, ONLY, out.remaining(), context);
        read.map_ok(|bytes| out.put_slice(&bytes.unwrap_or_default())).map_err(failed)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut rest = Bytes::copy_from_slice(&bytes[..bytes.len().min(WINDOW_BYTES)]);
        let offered = rest.len();
        self.wire.poll_write(self.side, ONLY, &mut rest, context).map(|written| match written {
            Ok(()) => Ok(offered - rest.len()),
            Err(Stopped::Gone(why)) => Err(failed(why)),
            Err(Stopped::ByReader | Stopped::Finished) => Err(io::ErrorKind::BrokenPipe.into()),
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.wire.finish(self.side, ONLY);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // As a kernel does: bytes that nobody has read are told by a reset.
        if self.wire.abandon(self.side, ONLY) {
            self.wire.send(self.side, Packet::Reset);
        } else {
            self.wire.finish(self.side, ONLY);
        }
        self.wire.end(self.side, Gone::Closed);
    }
}

/// Takes calls at one address.
#[derive(Debug)]
pub(crate) struct StreamListener {
    network: Network,
    addr: SocketAddr,
    backlog: Arc<Backlog>,
}

impl StreamListener {
    pub(crate) fn new(network: Network, addr: SocketAddr, backlog: Arc<Backlog>) -> Self {
        Self { network, addr, backlog }
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The next call. Cancel-safe.
    pub(crate) async fn accept(&self) -> io::Result<Stream> {
        let wire = poll_fn(|context| self.backlog.poll_next(context)).await;
        wire.map(|wire| Stream { wire, side: 1 }).ok_or_else(|| io::ErrorKind::ConnectionAborted.into())
    }
}

impl Drop for StreamListener {
    fn drop(&mut self) {
        self.network.unbind(self.addr, Kind::Stream, &self.backlog);
    }
}
