//! A UDP socket that lets quinn hand over one packet at a time. Must change nothing but their number.
//!
//! quinn keeps, for each connection as long as it lasts, the room of the longest burst that it has sent at once: up to
//! ten packets, and doubled when the path takes longer packets than at first. Nearly all of a gateway's connections are
//! idle after a burst, the answer to their resume.

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};

/// Packets of one system call. The whole demo uses as much CPU with one as with three or ten (docs/performance.md).
const BURST_PACKETS: usize = 1;

/// See the module.
#[derive(Debug)]
pub(super) struct ShortBursts(pub(super) Arc<dyn AsyncUdpSocket>);

impl AsyncUdpSocket for ShortBursts {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.0.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.0.try_send(transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.0.poll_recv(context, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.0.max_transmit_segments().min(BURST_PACKETS)
    }

    fn max_receive_segments(&self) -> usize {
        self.0.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_burst_is_one_packet() {
        let runtime = quinn::default_runtime().unwrap();
        let socket = runtime.wrap_udp_socket(std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
        let addr = socket.local_addr().unwrap();
        let short = ShortBursts(socket);
        assert_eq!((short.max_transmit_segments(), short.local_addr().unwrap()), (1, addr));
    }
}
