//! What a node has of the machine under it: network, wall clock, randomness. The real machine, or a host of a simulated
//! network (`memory`); whoever is given a [`Host`] cannot tell. Must never decide anything, nor mix the two.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use rand::{Rng, RngCore, distr::StandardUniform, prelude::Distribution};

use crate::{
    bind::{self, BindError},
    grpc::{self, Channel},
    memory,
    quic::{self, QuicConnection, QuicError, QuicLimits, QuicListener},
    tls::{ClientTls, ServerTls, TlsError},
};

/// A machine; clones are the same one.
#[derive(Debug, Clone, Default)]
pub struct Host(Option<Arc<memory::Host>>);

impl Host {
    /// The machine that this process runs on: its sockets, its clock, its source of randomness.
    pub fn real() -> Self {
        Self(None)
    }

    pub(crate) fn simulated(host: memory::Host) -> Self {
        Self(Some(Arc::new(host)))
    }

    #[cfg(test)]
    pub(crate) fn memory(&self) -> Option<Arc<memory::Host>> {
        self.0.clone()
    }

    /// The wall clock, in ms since the Unix epoch; 0 before it.
    pub fn wall_ms(&self) -> u64 {
        match &self.0 {
            None => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64),
            Some(host) => host.wall_ms(),
        }
    }

    /// A random value of the whole range of its type.
    pub fn random<T>(&self) -> T
    where
        StandardUniform: Distribution<T>,
    {
        self.rng().random()
    }

    /// Randomness, for everything else that `rand::Rng` can draw.
    pub fn rng(&self) -> impl RngCore + use<'_> {
        HostRng(self)
    }

    /// Listens for byte streams, as [`bind::tcp`] does.
    pub fn listen(&self, addr: SocketAddr) -> Result<Listener, BindError> {
        match &self.0 {
            None => bind::tcp(addr).map(Listener::from),
            Some(host) => host.listen(addr).map(|listener| Listener(Inner::Memory(listener))),
        }
    }

    /// A channel to the node at `addr`, as [`grpc::channel`] makes it.
    pub fn channel(&self, addr: SocketAddr, tls: &ClientTls) -> Result<Channel, TlsError> {
        match &self.0 {
            None => grpc::channel(addr, tls),
            Some(host) => grpc::memory_channel(addr, host.clone()),
        }
    }

    /// Listens for devices, as [`QuicListener::bind`] does.
    pub fn listen_quic(
        &self,
        addr: SocketAddr,
        tls: &ServerTls,
        limits: QuicLimits,
    ) -> Result<QuicListener, BindError> {
        match &self.0 {
            None => QuicListener::bind(addr, tls, limits),
            Some(host) => host.listen_quic(addr, &limits).map(QuicListener::simulated),
        }
    }

    /// Connects to a gateway, as [`quic::connect`] does.
    pub async fn connect_quic(&self, addr: SocketAddr, tls: &ClientTls) -> Result<QuicConnection, QuicError> {
        match &self.0 {
            None => quic::connect(addr, tls).await,
            Some(host) => quic::simulated_connect(host, addr).await,
        }
    }
}

struct HostRng<'a>(&'a Host);

impl RngCore for HostRng<'_> {
    fn next_u32(&mut self) -> u32 {
        self.next_u64() as u32
    }

    fn next_u64(&mut self) -> u64 {
        match &self.0.0 {
            None => rand::rng().next_u64(),
            Some(host) => host.draw(),
        }
    }

    fn fill_bytes(&mut self, out: &mut [u8]) {
        match &self.0.0 {
            None => rand::rng().fill_bytes(out),
            Some(host) => out.chunks_mut(8).for_each(|part| {
                let drawn = host.draw().to_le_bytes();
                part.copy_from_slice(&drawn[..part.len()]);
            }),
        }
    }
}

/// Listens for byte streams: gRPC or probes are served on it.
#[derive(Debug)]
pub struct Listener(pub(crate) Inner);

#[derive(Debug)]
pub(crate) enum Inner {
    Real(TcpListener),
    Memory(memory::StreamListener),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self(Inner::Real(listener))
    }
}

impl Listener {
    /// Where it listens.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        match &self.0 {
            Inner::Real(listener) => listener.local_addr(),
            Inner::Memory(listener) => Ok(listener.local_addr()),
        }
    }
}
