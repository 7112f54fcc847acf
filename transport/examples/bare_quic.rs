//! The least that a QUIC server can do for devices: our listener as a gateway tunes it, one stream, every frame answered
//! with one, and a task that waits. What a gateway's memory, handshakes and forwarding are measured against
//! (docs/performance.md); must never do more than that.

use std::{net::SocketAddr, path::Path};

use bytes::{BufMut, BytesMut};
use stentor_proto::{
    Bytes,
    frame::{PREFIX_BYTES, ServerFrame},
    v1,
};
use stentor_transport::{
    pki::Pki,
    quic::{QuicIncoming, QuicLimits, QuicListener},
    tls::ServerTls,
};

/// The first argument is a folder, in which it makes or finds a certificate authority; with a second one, `echo`, every
/// frame is answered with its own bytes instead of a small one. Prints its address.
#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args().nth(1).ok_or("say where the certificate authority lies")?;
    let files = Pki::create(Path::new(&dir))?.issue("bare", Path::new(&dir))?;
    let address: SocketAddr = "127.0.0.1:0".parse()?;
    let listener = QuicListener::bind(address, &ServerTls::quic(&files)?, QuicLimits::default())?;
    println!("{}", listener.local_addr());
    let echo = std::env::args().nth(2).is_some_and(|argument| argument == "echo");
    while let Some(incoming) = listener.accept().await {
        // A device that fails here is missing in the count of whoever measures.
        tokio::spawn(async move { drop(hold(incoming, echo).await) });
    }
    Ok(())
}

/// Holds a connection as long as it lasts.
async fn hold(incoming: QuicIncoming, echo: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let connection = incoming.connect().await?;
    let (mut writer, mut reader) = connection.accept_stream().await?;
    while let Some((kind, message)) = reader.next().await? {
        let answer = if echo { same(kind, &message) } else { ServerFrame::from(v1::Pong { token: 1 }).to_bytes() };
        writer.write(&mut [answer]).await?;
    }
    Ok(())
}

fn same(kind: u8, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    frame.put_u32_le(message.len() as u32 + 1);
    frame.put_u8(kind);
    frame.put_slice(message);
    frame.freeze()
}
