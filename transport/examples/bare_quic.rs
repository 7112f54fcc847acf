//! The least that a QUIC server can do for devices: quinn as it is, with what our listener tells the protocol, one stream,
//! every frame answered with one, and a task that waits. What a gateway's memory, handshakes and forwarding are measured
//! against (docs/performance.md); must never do more than that, nor use our own driver.

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{BufMut, BytesMut};
use quinn::{
    AsyncUdpSocket, Endpoint, Incoming, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use stentor_proto::{
    Bytes,
    frame::{self, PREFIX_BYTES, ServerFrame},
    v1,
};
use stentor_transport::{
    bind,
    pki::Pki,
    quic::{QuicLimits, server_config},
    tls::ServerTls,
};

/// Chunks that are read at once.
const CHUNKS: usize = 8;

/// The first argument is a folder, in which it makes or finds a certificate authority; with a second one, `echo`, every
/// frame is answered with its own bytes instead of a small one. Prints its address.
#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args().nth(1).ok_or("say where the certificate authority lies")?;
    let files = Pki::create(Path::new(&dir))?.issue("bare", Path::new(&dir))?;
    let address: SocketAddr = "127.0.0.1:0".parse()?;
    let (config, server) = server_config(&ServerTls::quic(&files)?, &QuicLimits::default())?;
    let runtime = quinn::default_runtime().ok_or("not in a runtime")?;
    let socket = Arc::new(ShortBursts(runtime.wrap_udp_socket(bind::udp(address)?)?));
    let endpoint = Endpoint::new_with_abstract_socket(config, Some(server), socket, runtime)?;
    println!("{}", endpoint.local_addr()?);
    let echo = std::env::args().nth(2).is_some_and(|argument| argument == "echo");
    while let Some(incoming) = endpoint.accept().await {
        // A device that fails here is missing in the count of whoever measures.
        tokio::spawn(async move { drop(hold(incoming, echo).await) });
    }
    Ok(())
}

/// Holds a connection as long as it lasts.
async fn hold(incoming: Incoming, echo: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let connection = incoming.accept()?.await?;
    let (mut send, mut receive) = connection.accept_bi().await?;
    let mut buffer = BytesMut::new();
    loop {
        while let Some((kind, message)) = frame::split(&mut buffer, frame::DEFAULT_MAX_BYTES)? {
            let answer = if echo { same(kind, &message) } else { ServerFrame::from(v1::Pong { token: 1 }).to_bytes() };
            if buffer.is_empty() {
                // An idle connection holds no buffer.
                buffer = BytesMut::new();
            }
            send.write_all_chunks(&mut [answer]).await?;
        }
        let mut chunks = [const { Bytes::new() }; CHUNKS];
        let Some(count) = receive.read_chunks(&mut chunks).await? else { return Ok(()) };
        chunks.iter().take(count).for_each(|chunk| buffer.put_slice(chunk));
    }
}

fn same(kind: u8, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    frame.put_u32_le(message.len() as u32 + 1);
    frame.put_u8(kind);
    frame.put_slice(message);
    frame.freeze()
}

/// Lets quinn hand over one packet at a time: it keeps, for each connection as long as it lasts, the room of the longest
/// burst that it has sent at once. So the floor's memory is the least that quinn can do with.
#[derive(Debug)]
struct ShortBursts(Arc<dyn AsyncUdpSocket>);

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
        1
    }

    fn max_receive_segments(&self) -> usize {
        self.0.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.0.may_fragment()
    }
}
