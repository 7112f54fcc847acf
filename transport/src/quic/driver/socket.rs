//! The UDP socket of an endpoint: receives in batches, sends at once or says that it cannot. Must never wait, nor fail
//! for a packet that the network would not take: to QUIC that is a lost packet.

use std::{
    io::{self, IoSliceMut},
    task::{Context, Poll},
};

use quinn_proto::{EcnCodepoint, Transmit};
use quinn_udp::{RecvMeta, UdpSocketState};
use tokio::{io::Interest, net::UdpSocket};

/// Packets to one peer that go out in one system call. More would only make one connection's turn longer.
const BURST_PACKETS: usize = 10;

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is out of our hands.
    Gone,
    /// The kernel has no room; once [`Socket::poll_writable`] is ready it may have.
    Blocked,
}

/// See the module.
pub(in crate::quic) struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
    #[cfg(test)]
    faults: Option<super::faults::Faults>,
}

impl Socket {
    /// Must be called within a tokio runtime.
    pub(in crate::quic) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        let io = UdpSocket::from_std(socket)?;
        Ok(Self {
            io,
            state,
            #[cfg(test)]
            faults: None,
        })
    }

    #[cfg(test)]
    pub(in crate::quic) fn with_faults(mut self, faults: super::faults::Faults) -> Self {
        self.faults = Some(faults);
        self
    }

    pub(super) fn send(&self, transmit: &Transmit, bytes: &[u8]) -> Sent {
        #[cfg(test)]
        if let Some(faults) = &self.faults {
            return faults.send(transmit, bytes, |transmit, bytes| self.send_now(transmit, bytes));
        }
        self.send_now(transmit, bytes)
    }

    fn send_now(&self, transmit: &Transmit, bytes: &[u8]) -> Sent {
        let transmit = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn.map(|ecn| match ecn {
                EcnCodepoint::Ect0 => quinn_udp::EcnCodepoint::Ect0,
                EcnCodepoint::Ect1 => quinn_udp::EcnCodepoint::Ect1,
                EcnCodepoint::Ce => quinn_udp::EcnCodepoint::Ce,
            }),
            contents: bytes,
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        match self.io.try_io(Interest::WRITABLE, || self.state.send((&self.io).into(), &transmit)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Blocked,
            _ => Sent::Gone,
        }
    }

    /// Fills `buffers` from the front with what has come.
    pub(super) fn poll_receive(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            std::task::ready!(self.io.poll_recv_ready(context))?;
            let received = self.io.try_io(Interest::READABLE, || self.state.recv((&self.io).into(), buffers, meta));
            match received {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => return Poll::Ready(received),
            }
        }
    }

    pub(super) fn poll_writable(&self, context: &mut Context<'_>) -> Poll<()> {
        // A socket that reports an error is tried again: the next packet finds out.
        self.io.poll_send_ready(context).map(drop)
    }

    pub(super) fn burst_packets(&self) -> usize {
        self.state.max_gso_segments().clamp(1, BURST_PACKETS)
    }

    /// Datagrams that the kernel may hand over as one.
    pub(super) fn receive_segments(&self) -> usize {
        self.state.gro_segments().max(1)
    }

    pub(super) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    pub(super) fn is_ipv6(&self) -> bool {
        self.io.local_addr().is_ok_and(|addr| addr.is_ipv6())
    }
}
