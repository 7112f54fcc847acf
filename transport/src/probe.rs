//! Asks a node's probes, as an orchestrator would: for tools that start nodes and wait for them. Must never wait longer
//! than its deadline, nor read more than a node can have to say.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// `HTTP/1.1 200` is all that an orchestrator wants to know.
const STATUS_LINE_BYTES: usize = 12;
/// No page is longer: a node's metrics are some ten KiB.
const MAX_PAGE_BYTES: u64 = 1024 * 1024;

/// The text of `GET path` (`/metrics`); an error unless the node answers 200.
pub async fn get(addr: SocketAddr, path: &str, within: Duration) -> io::Result<String> {
    let ask = async {
        let mut stream = TcpStream::connect(addr).await?;
        let request = format!("GET {path} HTTP/1.0\r\nhost: {addr}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MAX_PAGE_BYTES).read_to_string(&mut answer).await?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        match head.split_ascii_whitespace().nth(1) {
            Some("200") => Ok(body.to_owned()),
            _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
        }
    };
    tokio::time::timeout(within, ask).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

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
