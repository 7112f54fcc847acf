//! Connections of the simulated network, where devices and gateways have QUIC: streams with windows, an idle timer with
//! keep-alive, closing with a code. Must never be cheaper than the real one where it counts: a reader that does not read
//! stops its writer.

use std::{
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    Host, Network,
    packet::{KEEP_ALIVE, Packet},
    wire::{Backlog, Gone, Kind, Stopped, Wire},
};

/// From the device, as `QuicLimits::stream_receive_bytes`; to it, as the gateway's send window.
const WINDOWS: [usize; 2] = [16 * 1024, 256 * 1024];

/// One side of a connection. Dropped by its last owner, it closes.
#[derive(Debug)]
pub(crate) struct Side {
    wire: Arc<Wire>,
    side: usize,
}

/// Connects to a gateway. Waits for ever where nobody answers: the caller has a deadline.
pub(crate) async fn connect(host: &Host, addr: SocketAddr) -> Result<Arc<Side>, Gone> {
    let wire = host.network.0.new_wire(Kind::Quic, (host.ip, host.life), addr, WINDOWS);
    let side = Arc::new(Side { wire: wire.clone(), side: 0 });
    wire.send(0, Packet::Dial);
    poll_fn(|context| wire.poll_welcome(0, context)).await?;
    wire.later(0, KEEP_ALIVE, Packet::Watch);
    Ok(side)
}

impl Side {
    pub(crate) fn open(self: &Arc<Self>) -> Result<(Sender, Receiver), Gone> {
        match self.wire.gone(self.side) {
            Some(why) => Err(why),
            None => Ok(self.halves(self.wire.open(self.side))),
        }
    }

    pub(crate) async fn accept(self: &Arc<Self>) -> Result<(Sender, Receiver), Gone> {
        let stream = poll_fn(|context| self.wire.poll_accept(self.side, context)).await?;
        Ok(self.halves(stream))
    }

    fn halves(self: &Arc<Self>, stream: u64) -> (Sender, Receiver) {
        (Sender { of: self.clone(), stream }, Receiver { of: self.clone(), stream })
    }

    pub(crate) fn remote_address(&self) -> SocketAddr {
        self.wire.ends[1 - self.side]
    }

    pub(crate) fn close(&self, code: u32, reason: &str) {
        if self.wire.gone(self.side).is_none() {
            self.wire.send(self.side, Packet::Close(code, reason.to_owned()));
            self.wire.end(self.side, Gone::Closed);
        }
    }

    pub(crate) async fn closed(&self) -> Gone {
        poll_fn(|context| self.wire.poll_gone(self.side, context)).await
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.close(0, "");
    }
}

/// The sending half of a stream.
#[derive(Debug)]
pub(crate) struct Sender {
    of: Arc<Side>,
    stream: u64,
}

impl Sender {
    /// Takes some of `bytes` over, waiting for room. Cancel-safe.
    pub(crate) async fn write(&mut self, bytes: &mut Bytes) -> Result<(), Stopped> {
        let Side { wire, side } = &*self.of;
        poll_fn(|context| wire.poll_write(*side, self.stream, bytes, context)).await
    }

    /// Ends the stream and waits until the other side has read everything, or has gone.
    pub(crate) async fn finish(&mut self) {
        let Side { wire, side } = &*self.of;
        wire.finish(*side, self.stream);
        poll_fn(|context| wire.poll_drained(*side, self.stream, context)).await;
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.of.wire.finish(self.of.side, self.stream);
    }
}

/// The receiving half of a stream.
#[derive(Debug)]
pub(crate) struct Receiver {
    of: Arc<Side>,
    stream: u64,
}

impl Receiver {
    /// The next bytes; `None` at the end. Cancel-safe.
    pub(crate) async fn read(&mut self) -> Result<Option<Bytes>, Gone> {
        let Side { wire, side } = &*self.of;
        poll_fn(|context| wire.poll_read(*side, self.stream, usize::MAX, context)).await
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.of.wire.abandon(self.of.side, self.stream);
    }
}

/// Takes devices' calls at one address.
#[derive(Debug)]
pub(crate) struct Listener {
    network: Network,
    addr: SocketAddr,
    backlog: Arc<Backlog>,
    max_connections: usize,
    open: Mutex<Vec<Weak<Side>>>,
    closed: AtomicBool,
}

impl Listener {
    pub(crate) fn new(network: Network, addr: SocketAddr, backlog: Arc<Backlog>, max_connections: usize) -> Self {
        Self { network, addr, backlog, max_connections, open: Mutex::default(), closed: AtomicBool::new(false) }
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    pub(crate) fn connections(&self) -> usize {
        let mut open = self.open.lock();
        open.retain(|side| side.upgrade().is_some_and(|side| side.wire.gone(side.side).is_none()));
        open.len()
    }

    /// The next call; `None` once closed. Cancel-safe.
    pub(crate) async fn accept(&self) -> Option<Incoming> {
        loop {
            let wire = poll_fn(|context| self.backlog.poll_next(context)).await?;
            let side = Arc::new(Side { wire, side: 1 });
            let incoming = Incoming { side };
            if self.connections() >= self.max_connections {
                incoming.refuse();
                continue;
            }
            self.open.lock().push(Arc::downgrade(&incoming.side));
            return Some(incoming);
        }
    }

    pub(crate) fn close(&self, reason: &str) {
        self.closed.store(true, Ordering::Relaxed);
        self.backlog.close();
        self.network.unbind(self.addr, Kind::Quic, &self.backlog);
        let open: Vec<_> = self.open.lock().iter().filter_map(Weak::upgrade).collect();
        open.iter().for_each(|side| side.close(0, reason));
    }

    pub(crate) async fn wait_idle(&self) {
        while self.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close("");
    }
}

/// A device that calls.
#[derive(Debug)]
pub(crate) struct Incoming {
    side: Arc<Side>,
}

impl Incoming {
    pub(crate) fn remote_address(&self) -> SocketAddr {
        self.side.remote_address()
    }

    pub(crate) fn connect(self) -> Arc<Side> {
        self.side.wire.send(1, Packet::Welcome);
        self.side
    }

    pub(crate) fn refuse(self) {
        self.side.wire.send(1, Packet::Refused);
        self.side.wire.end(1, Gone::Closed);
    }
}
