//! Listening sockets, bound before anything is served, so that a taken port is a clear error at start. Must never
//! share a port with another process: that would split traffic between them silently.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};
use thiserror::Error;

/// What every UDP socket asks the kernel for. The usual default of 208 KiB lost packets of 400 connections' bursts.
pub const UDP_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Connections that the kernel completes and holds until they are accepted; a reconnect storm must fit.
const BACKLOG: i32 = 1_024;

/// A socket could not be had. The machine or its configuration is at fault; nothing was changed.
#[derive(Debug, Error)]
pub enum BindError {
    /// Somebody else listens there.
    #[error("{addr} is in use by another process")]
    PortInUse {
        /// The address that was asked for.
        addr: SocketAddr,
    },
    /// No interface of this machine has the address.
    #[error("{addr} is not an address of this machine")]
    NotAvailable {
        /// The address that was asked for.
        addr: SocketAddr,
    },
    /// Ports below 1,024 need a right that this process lacks.
    #[error("this process may not bind {addr}")]
    Denied {
        /// The address that was asked for.
        addr: SocketAddr,
    },
    /// Anything else that the kernel said.
    #[error("cannot bind {addr}: {source}")]
    Io {
        /// The address that was asked for.
        addr: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl BindError {
    pub(crate) fn new(addr: SocketAddr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::PortInUse { addr },
            io::ErrorKind::AddrNotAvailable => Self::NotAvailable { addr },
            io::ErrorKind::PermissionDenied => Self::Denied { addr },
            _ => Self::Io { addr, source },
        }
    }
}

/// A listening, non-blocking TCP socket. Port 0 takes any free one; `[::]` takes IPv4 as well.
pub fn tcp(addr: SocketAddr) -> Result<TcpListener, BindError> {
    or_without_ipv6(addr, |addr| {
        let socket = socket(addr, Type::STREAM, Protocol::TCP)?;
        // Connections of a killed process linger for a minute; its successor must not wait for them. On Linux this
        // doesn't let two processes listen.
        socket.set_reuse_address(true)?;
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    })
}

/// A bound, non-blocking UDP socket with [`UDP_BUFFER_BYTES`] each way, as far as the kernel allows (else a warning).
/// Port 0 takes any free one; `[::]` takes IPv4 as well.
pub fn udp(addr: SocketAddr) -> Result<UdpSocket, BindError> {
    // No SO_REUSEADDR here: for UDP it would let a second process take the port and half of the packets.
    let socket = or_without_ipv6(addr, |addr| {
        let socket = socket(addr, Type::DGRAM, Protocol::UDP)?;
        socket.bind(&addr.into())?;
        Ok(socket.into())
    })?;
    enlarge_buffers(&socket, addr);
    Ok(socket)
}

/// Like [`tcp`], but takes any free port when `addr`'s is taken.
pub fn tcp_or_free(addr: SocketAddr) -> Result<TcpListener, BindError> {
    or_free(addr, tcp)
}

/// Like [`udp`], but takes any free port when `addr`'s is taken.
pub fn udp_or_free(addr: SocketAddr) -> Result<UdpSocket, BindError> {
    or_free(addr, udp)
}

fn or_free<S>(addr: SocketAddr, bind: fn(SocketAddr) -> Result<S, BindError>) -> Result<S, BindError> {
    match bind(addr) {
        Err(BindError::PortInUse { .. }) => bind(SocketAddr::new(addr.ip(), 0)),
        bound => bound,
    }
}

/// Many containers have no IPv6 at all; there `[::]` means every address that exists.
fn or_without_ipv6<S>(addr: SocketAddr, bind: impl Fn(SocketAddr) -> io::Result<S>) -> Result<S, BindError> {
    let lacks_ipv6 = |e: &io::Error| {
        matches!(e.kind(), io::ErrorKind::AddrNotAvailable | io::ErrorKind::Unsupported)
            || e.raw_os_error() == Some(EAFNOSUPPORT)
    };
    match bind(addr) {
        Err(e) if addr.is_ipv6() && addr.ip().is_unspecified() && lacks_ipv6(&e) => {
            tracing::warn!(%addr, "no IPv6 here, listening on IPv4 only");
            let addr = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), addr.port());
            bind(addr).map_err(|e| BindError::new(addr, e))
        }
        bound => bound.map_err(|e| BindError::new(addr, e)),
    }
}

/// Linux's number; elsewhere the kinds above have to do.
const EAFNOSUPPORT: i32 = 97;

fn socket(addr: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), kind, Some(protocol))?;
    if addr.is_ipv6() {
        socket.set_only_v6(!addr.ip().is_unspecified())?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn enlarge_buffers(socket: &UdpSocket, addr: SocketAddr) {
    let got = ask_for_buffers(socket).map(|(receive, send)| (receive / KERNEL_FACTOR, send / KERNEL_FACTOR));
    match got {
        Ok((receive, send)) if receive < UDP_BUFFER_BYTES || send < UDP_BUFFER_BYTES => tracing::warn!(
            %addr,
            wanted_bytes = UDP_BUFFER_BYTES,
            receive_bytes = receive,
            send_bytes = send,
            "UDP socket buffers are small, bursts will lose packets; raise net.core.rmem_max and net.core.wmem_max"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(%addr, %error, "UDP socket buffers cannot be set"),
    }
}

/// Linux reports twice what it was asked for: its own bookkeeping counts too.
const KERNEL_FACTOR: usize = if cfg!(target_os = "linux") { 2 } else { 1 };

fn ask_for_buffers(socket: &UdpSocket) -> io::Result<(usize, usize)> {
    // Needs CAP_NET_ADMIN; the plain request below is cut to the kernel's maximum and would lower it again.
    #[cfg(target_os = "linux")]
    let forced = (
        rustix::net::sockopt::set_socket_recv_buffer_size_force(socket, UDP_BUFFER_BYTES).is_ok(),
        rustix::net::sockopt::set_socket_send_buffer_size_force(socket, UDP_BUFFER_BYTES).is_ok(),
    );
    #[cfg(not(target_os = "linux"))]
    let forced = (false, false);
    let socket = SockRef::from(socket);
    if !forced.0 {
        socket.set_recv_buffer_size(UDP_BUFFER_BYTES)?;
    }
    if !forced.1 {
        socket.set_send_buffer_size(UDP_BUFFER_BYTES)?;
    }
    Ok((socket.recv_buffer_size()?, socket.send_buffer_size()?))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    #[test]
    fn a_taken_port_is_a_typed_error_and_another_can_be_had() {
        let (first, datagrams) = (tcp(LOOPBACK).unwrap(), udp(LOOPBACK).unwrap());
        let (taken, taken_udp) = (first.local_addr().unwrap(), datagrams.local_addr().unwrap());
        assert!(matches!(tcp(taken), Err(BindError::PortInUse { addr }) if addr == taken));
        assert!(matches!(udp(taken_udp), Err(BindError::PortInUse { addr }) if addr == taken_udp));
        assert_ne!(tcp_or_free(taken).unwrap().local_addr().unwrap().port(), taken.port());
        assert_ne!(udp_or_free(taken_udp).unwrap().local_addr().unwrap().port(), taken_udp.port());
    }

    #[test]
    fn an_address_of_another_machine_is_a_typed_error() {
        // From the range for documentation: no machine has it.
        let foreign = "192.0.2.1:0".parse().unwrap();
        assert!(matches!(tcp(foreign), Err(BindError::NotAvailable { .. })));
    }

    #[test]
    fn the_unspecified_ipv6_address_takes_ipv4_too() {
        let listener = tcp(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
    }

    #[test]
    fn udp_buffers_are_at_least_what_the_kernel_gives_by_default() {
        let plain = UdpSocket::bind(LOOPBACK).unwrap();
        let ours = udp(LOOPBACK).unwrap();
        let size = |socket: &UdpSocket| SockRef::from(socket).recv_buffer_size().unwrap();
        assert!(size(&ours) >= size(&plain));
    }
}
