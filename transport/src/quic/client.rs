//! The device's side: connections from one shared socket per process and address family. Must never open a socket per
//! connection: a load test has tens of thousands.

use std::{
    collections::VecDeque,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use quinn_proto::{
    ClientConfig, ConnectError, EndpointConfig, IdleTimeout, TransportConfig, VarInt, crypto::rustls::QuicClientConfig,
};
use tokio::runtime;

use super::{
    IDLE_TIMEOUT_MS, QuicConnection, QuicError,
    driver::{Endpoint, Socket},
    rare_acknowledgements,
};
use crate::{
    bind,
    tls::{ClientTls, SERVER_NAME},
};

/// A dead gateway must not hold up the next one in the list.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Keeps NATs and both idle timers (30 s) from forgetting an idle device.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// The device is the one that catches up: this much may be under way to it.
const RECEIVE_BYTES: u32 = 1024 * 1024;
/// Bytes that may wait for the gateway's acknowledgement before writing waits.
const SEND_BYTES: u64 = 1024 * 1024;

/// Connects to the gateway at `addr` and finishes the handshake, within 5 s.
pub async fn connect(addr: SocketAddr, tls: &ClientTls) -> Result<QuicConnection, QuicError> {
    let config = client_config(tls)?;
    let connection = match endpoint(addr, false)?.connect(config.clone(), addr, SERVER_NAME) {
        Err(ConnectError::EndpointStopping) => endpoint(addr, true)?.connect(config, addr, SERVER_NAME),
        connection => connection,
    }?;
    match tokio::time::timeout(CONNECT_TIMEOUT, connection.connected()).await {
        Ok(connected) => connected?,
        Err(_) => return Err(QuicError::TimedOut),
    }
    Ok(QuicConnection::new(connection))
}

pub(super) fn client_config(tls: &ClientTls) -> Result<ClientConfig, QuicError> {
    let crypto = QuicClientConfig::try_from(tls.quic.clone()).map_err(|e| QuicError::Tls(e.to_string()))?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    Ok(config)
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(1))
        .stream_receive_window(VarInt::from_u32(RECEIVE_BYTES))
        .receive_window(VarInt::from_u32(RECEIVE_BYTES))
        .send_window(SEND_BYTES)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .datagram_receive_buffer_size(None)
        .ack_frequency_config(Some(rare_acknowledgements()));
    transport
}

/// Which runtime drives the socket, and its address family.
type Place = (runtime::Id, bool);

/// A socket lives as long as the runtime that drives it: a process normally has one, a test binary many.
static ENDPOINTS: Mutex<VecDeque<(Place, Endpoint)>> = Mutex::new(VecDeque::new());

/// Forgetting a socket in use is harmless: its connections keep it.
const MAX_ENDPOINTS: usize = 16;

fn endpoint(addr: SocketAddr, replace: bool) -> Result<Endpoint, QuicError> {
    let handle = runtime::Handle::try_current().map_err(|e| QuicError::Socket(io::Error::other(e)))?;
    let place = (handle.id(), addr.is_ipv6());
    let mut endpoints = ENDPOINTS.lock();
    if replace {
        endpoints.retain(|(at, _)| *at != place);
    }
    if let Some((_, endpoint)) = endpoints.iter().find(|(at, _)| *at == place) {
        return Ok(endpoint.clone());
    }
    let any = if addr.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = bind::udp(SocketAddr::new(any, 0)).map_err(|e| QuicError::Socket(io::Error::other(e)))?;
    let socket = Socket::new(socket).map_err(QuicError::Socket)?;
    let endpoint = Endpoint::new(EndpointConfig::default(), None, socket);
    if endpoints.len() >= MAX_ENDPOINTS {
        endpoints.pop_front();
    }
    endpoints.push_back((place, endpoint.clone()));
    Ok(endpoint)
}
