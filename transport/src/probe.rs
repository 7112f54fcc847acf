//! Asks a node's probes, as an orchestrator would: for tools that start nodes and wait for them. Must never wait longer
//! than its deadline, and never read more than the status line.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// `HTTP/1.1 200` is all that anybody wants to know.
const STATUS_LINE_BYTES: usize = 12;

/// The HTTP status of `GET path` (`/readyz`, `/livez`, `/startupz`).
pub async fn status(addr: SocketAddr, path: &str, within: Duration) -> io::Result<u16> {
    let ask = async {
        let mut stream = TcpStream::connect(addr).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut line = [0; STATUS_LINE_BYTES];
        stream.read_exact(&mut line).await?;
        let code = std::str::from_utf8(&line).ok().and_then(|l| l.strip_prefix("HTTP/1.1 "));
        code.and_then(|c| c.parse().ok()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
    };
    tokio::time::timeout(within, ask).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}
