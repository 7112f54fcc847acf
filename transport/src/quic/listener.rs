//! The gateway's side: one UDP socket, tuned for many idle connections that cost little. Must never give a caller whose
//! address is not proven more than a handshake's worth of memory.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use quinn_proto::{
    ConnectionId, ConnectionIdGenerator, EndpointConfig, IdleTimeout, ServerConfig, TransportConfig, VarInt,
    crypto::rustls::QuicServerConfig,
};
use rand::RngCore;

use super::{
    BindError, IDLE_TIMEOUT_MS, QuicConnection, QuicError,
    driver::{self, Endpoint, Socket},
    rare_acknowledgements,
};
use crate::{bind, memory, tls::ServerTls};

/// What connections may cost the listener. The defaults are the measured ones (docs/performance.md).
#[derive(Debug, Clone)]
pub struct QuicLimits {
    /// Connections at a time, handshakes included; further ones are refused.
    pub max_connections: usize,
    /// Handshakes at a time before callers must first prove their address (a stateless round trip).
    pub max_unproven_handshakes: usize,
    /// Streams that a device may have open, both ways. A session uses one.
    pub bidi_streams: u8,
    /// Streams that a device may have open towards the gateway only.
    pub uni_streams: u8,
    /// Bytes that may be under way to us on one stream. Devices send little; catching up goes the other way.
    pub stream_receive_bytes: u32,
    /// Bytes that may be under way to us on one connection.
    pub receive_bytes: u32,
    /// Bytes that may wait for a device's acknowledgement before writing waits: the bound for a slow device.
    pub send_bytes: u32,
    /// From the first packet to the end of the handshake.
    pub handshake_timeout: Duration,
    /// The first two bytes of every connection id, by which a load balancer finds the gateway again.
    pub gateway: u16,
}

impl Default for QuicLimits {
    fn default() -> Self {
        Self {
            max_connections: 200_000,
            max_unproven_handshakes: 1_024,
            bidi_streams: 4,
            uni_streams: 1,
            stream_receive_bytes: 16 * 1024,
            receive_bytes: 64 * 1024,
            send_bytes: 256 * 1024,
            handshake_timeout: Duration::from_secs(10),
            gateway: 0,
        }
    }
}

/// Accepts devices' connections.
#[derive(Debug)]
pub struct QuicListener(Inner);

#[derive(Debug)]
enum Inner {
    Wire(Wire),
    Memory(memory::QuicListener),
}

#[derive(Debug)]
struct Wire {
    endpoint: Endpoint,
    addr: SocketAddr,
    limits: QuicLimits,
    handshakes: Arc<AtomicUsize>,
}

impl QuicListener {
    /// Binds `addr` (`[::]` takes IPv4 too, port 0 any free port) and listens. Must be called within a tokio runtime.
    pub fn bind(addr: SocketAddr, tls: &ServerTls, limits: QuicLimits) -> Result<Self, BindError> {
        let io = |source| BindError::Io { addr, source };
        tokio::runtime::Handle::try_current().map_err(|e| io(std::io::Error::other(e)))?;
        let socket = bind::udp(addr)?;
        let at = socket.local_addr().map_err(io)?;
        Self::on(Socket::new(socket).map_err(io)?, at, tls, limits).map_err(io)
    }

    pub(super) fn on(socket: Socket, addr: SocketAddr, tls: &ServerTls, limits: QuicLimits) -> std::io::Result<Self> {
        let (endpoint, server) = server_config(tls, &limits).map_err(std::io::Error::other)?;
        let endpoint = Endpoint::new(endpoint, Some(server), socket);
        Ok(Self(Inner::Wire(Wire { endpoint, addr, limits, handshakes: Arc::default() })))
    }

    pub(crate) fn simulated(listener: memory::QuicListener) -> Self {
        Self(Inner::Memory(listener))
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        match &self.0 {
            Inner::Wire(wire) => wire.addr,
            Inner::Memory(memory) => memory.local_addr(),
        }
    }

    /// Connections at the moment, handshakes included.
    pub fn connections(&self) -> usize {
        match &self.0 {
            Inner::Wire(wire) => wire.endpoint.open_connections(),
            Inner::Memory(memory) => memory.connections(),
        }
    }

    /// The next device, whose handshake is still to be done (in a task of its own). `None` once closed. Cancel-safe.
    pub async fn accept(&self) -> Option<QuicIncoming> {
        Some(QuicIncoming(match &self.0 {
            Inner::Wire(wire) => Knock::Wire(wire.accept().await?),
            Inner::Memory(memory) => Knock::Memory(memory.accept().await?),
        }))
    }

    /// Closes every connection with `reason` and accepts no more.
    pub fn close(&self, reason: &str) {
        match &self.0 {
            Inner::Wire(wire) => wire.endpoint.close(0, reason),
            Inner::Memory(memory) => memory.close(reason),
        }
    }

    /// Waits until all connections are gone and their last packets sent.
    pub async fn wait_idle(&self) {
        match &self.0 {
            Inner::Wire(wire) => wire.endpoint.wait_idle().await,
            Inner::Memory(memory) => memory.wait_idle().await,
        }
    }
}

impl Wire {
    async fn accept(&self) -> Option<Unproven> {
        loop {
            let incoming = self.endpoint.accept().await?;
            if self.endpoint.open_connections() >= self.limits.max_connections {
                incoming.refuse();
                continue;
            }
            let unproven = !incoming.is_proven();
            if unproven && self.handshakes.load(Ordering::Relaxed) >= self.limits.max_unproven_handshakes {
                incoming.retry();
                continue;
            }
            let handshake = Handshake::begin(&self.handshakes);
            return Some(Unproven { incoming, handshake, timeout: self.limits.handshake_timeout });
        }
    }
}

/// A device that knocks.
#[derive(Debug)]
pub struct QuicIncoming(Knock);

#[derive(Debug)]
enum Knock {
    Wire(Unproven),
    Memory(memory::Incoming),
}

#[derive(Debug)]
struct Unproven {
    incoming: driver::Incoming,
    handshake: Handshake,
    timeout: Duration,
}

impl QuicIncoming {
    /// Where it comes from.
    pub fn remote_address(&self) -> SocketAddr {
        match &self.0 {
            Knock::Wire(unproven) => canonical(unproven.incoming.remote_address()),
            Knock::Memory(incoming) => incoming.remote_address(),
        }
    }

    /// Does the handshake.
    pub async fn connect(self) -> Result<QuicConnection, QuicError> {
        let Unproven { incoming, handshake, timeout } = match self.0 {
            Knock::Wire(unproven) => unproven,
            Knock::Memory(incoming) => return Ok(QuicConnection::simulated(incoming.connect())),
        };
        let connection = incoming.accept()?;
        tokio::time::timeout(timeout, connection.connected()).await.map_err(|_| QuicError::TimedOut)??;
        drop(handshake);
        Ok(QuicConnection::new(connection))
    }

    /// Refuses it.
    pub fn refuse(self) {
        match self.0 {
            Knock::Wire(unproven) => unproven.incoming.refuse(),
            Knock::Memory(incoming) => incoming.refuse(),
        }
    }
}

/// Counts one handshake while it lives.
#[derive(Debug)]
struct Handshake(Arc<AtomicUsize>);

impl Handshake {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a listener with these limits tells the protocol. Public for whoever measures another driver against ours.
pub fn server_config(tls: &ServerTls, limits: &QuicLimits) -> Result<(EndpointConfig, ServerConfig), QuicError> {
    let crypto = QuicServerConfig::try_from(tls.config.clone()).map_err(|e| QuicError::Tls(e.to_string()))?;
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport(limits)));
    Ok((endpoint_config(tls, limits.gateway), config))
}

fn transport(limits: &QuicLimits) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(limits.bidi_streams.into()))
        .max_concurrent_uni_streams(VarInt::from_u32(limits.uni_streams.into()))
        .stream_receive_window(VarInt::from_u32(limits.stream_receive_bytes))
        .receive_window(VarInt::from_u32(limits.receive_bytes))
        .send_window(limits.send_bytes.into())
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .datagram_receive_buffer_size(None);
    transport.ack_frequency_config(Some(rare_acknowledgements()));
    transport
}

/// All devices of a gateway that was restarted are told within seconds, not fifty in each. An answer is shorter than
/// what it answers, so nobody can use it to flood a third party.
const RESET_EVERY: Duration = Duration::from_micros(100);

fn endpoint_config(tls: &ServerTls, gateway: u16) -> EndpointConfig {
    // The same key after a restart: whoever still talks to the process that died is told at once that his connection
    // is gone, instead of finding out by silence.
    let reset_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &tls.restart_secret);
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.min_reset_interval(RESET_EVERY);
    config.cid_generator(move || Box::new(GatewayIds { gateway }));
    config
}

/// Connection ids that begin with the gateway's number. All of them are taken for possibly ours, unlike quinn's own,
/// whose random key would make a restarted gateway silent towards its old connections.
struct GatewayIds {
    gateway: u16,
}

impl ConnectionIdGenerator for GatewayIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; CONNECTION_ID_BYTES];
        id[..2].copy_from_slice(&self.gateway.to_be_bytes());
        rand::rng().fill_bytes(&mut id[2..]);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

const CONNECTION_ID_BYTES: usize = 8;

/// IPv4 callers of a dual-stack socket come as `::ffff:1.2.3.4`.
pub(super) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}
