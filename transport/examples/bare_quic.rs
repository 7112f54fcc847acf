//! The least that a QUIC server can hold for idle devices: our listener as a gateway tunes it, one stream, one small
//! frame each way, and a task that waits. What a gateway's memory is measured against (docs/performance.md); must never
//! do more than that.

use std::{net::SocketAddr, path::Path};

use stentor_proto::{Bytes, frame::ServerFrame, v1};
use stentor_transport::{
    pki::Pki,
    quic::{QuicIncoming, QuicLimits, QuicListener},
    tls::ServerTls,
};

/// The first argument is a folder, in which it makes or finds a certificate authority. Prints its address.
#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = std::env::args().nth(1).ok_or("say where the certificate authority lies")?;
    let files = Pki::create(Path::new(&dir))?.issue("bare", Path::new(&dir))?;
    let address: SocketAddr = "127.0.0.1:0".parse()?;
    let listener = QuicListener::bind(address, &ServerTls::quic(&files)?, QuicLimits::default())?;
    println!("{}", listener.local_addr());
    while let Some(incoming) = listener.accept().await {
        // A device that fails here is missing in the count of whoever measures.
        tokio::spawn(async move { drop(hold(incoming).await) });
    }
    Ok(())
}

/// Holds a connection as long as it lasts.
async fn hold(incoming: QuicIncoming) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let connection = incoming.connect().await?;
    let (mut writer, mut reader) = connection.accept_stream().await?;
    while reader.next().await?.is_some() {
        let answer: Bytes = ServerFrame::from(v1::Pong { token: 1 }).to_bytes();
        writer.write(&mut [answer]).await?;
    }
    Ok(())
}
