//! Which gateway to try next, and after which wait. Must never let a crowd of clients come back in step.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rand::{Rng, RngCore};
use stentor_engine::session::client::{Backoff, Draws};
use stentor_transport::{
    Host,
    quic::{FrameReader, FrameWriter, QuicConnection},
    tls::ClientTls,
};
use tokio::time::{Instant, sleep_until};

/// Waits between attempts, with full jitter.
const RECONNECT: Backoff = Backoff { first_ms: 200, max_ms: 10_000 };
/// With another gateway to try, a silent one is given up sooner: this much, and as much again per failure.
const IMPATIENCE: Duration = Duration::from_millis(1_500);
/// A connection that lived so long was a success: the next failure begins with short waits again.
pub(crate) const SUCCESS: Duration = Duration::from_secs(5);

/// A fresh connection.
pub(crate) struct Link {
    pub(crate) connection: QuicConnection,
    pub(crate) writer: FrameWriter,
    pub(crate) reader: FrameReader,
}

#[derive(Debug)]
pub(crate) struct Dialer {
    gateways: Arc<[String]>,
    tls: ClientTls,
    host: Host,
    next: usize,
    failures: u32,
    /// The next attempt needs no wait.
    at_once: bool,
    draws: Draws,
}

impl Dialer {
    pub(crate) fn new(gateways: Vec<String>, tls: ClientTls, host: Host) -> Self {
        let next = host.rng().random_range(0..gateways.len().max(1));
        let draws = Draws::new(host.random());
        Self { gateways: gateways.into(), tls, host, next, failures: 0, at_once: true, draws }
    }

    /// A session's nonce.
    pub(crate) fn nonce<const N: usize>(&self) -> [u8; N] {
        let mut nonce = [0; N];
        self.host.rng().fill_bytes(&mut nonce);
        nonce
    }

    /// The next attempt, its wait included, as a future that borrows nothing, and when the wait is over.
    pub(crate) fn attempt(&mut self) -> (Instant, impl Future<Output = Result<Link, String>> + Send + use<>) {
        let at_once = std::mem::take(&mut self.at_once);
        let wait_ms = if at_once { 0 } else { RECONNECT.wait_ms(self.failures, &mut self.draws) };
        let patience = (self.gateways.len() > 1).then(|| IMPATIENCE * (self.failures + 1).min(10));
        let gateways = Arc::clone(&self.gateways);
        let (at, tls, host) = (self.next % gateways.len().max(1), self.tls.clone(), self.host.clone());
        let begins_at = Instant::now() + Duration::from_millis(wait_ms);
        let attempt = async move {
            sleep_until(begins_at).await;
            let gateway = gateways.get(at).ok_or("no gateway")?;
            let connecting = connect(&host, gateway, &tls);
            let linked = match patience {
                Some(patience) => tokio::time::timeout(patience, connecting).await.map_err(|_| "no answer".to_owned()),
                None => Ok(connecting.await),
            };
            linked.and_then(|link| link).map_err(|e| format!("{gateway}: {e}"))
        };
        (begins_at, attempt)
    }

    /// The attempt, or a connection that lived only shortly, failed.
    pub(crate) fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.next = self.next.wrapping_add(1);
    }

    /// A connection that had lived long enough ended.
    pub(crate) fn lost(&mut self) {
        self.failures = 0;
        self.next = self.next.wrapping_add(1);
    }

    /// The gateway asked to leave, and the wait is over.
    pub(crate) fn leave(&mut self) {
        self.lost();
        self.at_once = true;
    }

    pub(crate) fn seed(&mut self) -> u64 {
        self.draws.draw()
    }
}

async fn connect(host: &Host, gateway: &str, tls: &ClientTls) -> Result<Link, String> {
    let address = resolve(gateway).await?;
    let connection = host.connect_quic(address, tls).await.map_err(|e| e.to_string())?;
    let (writer, reader) = connection.open().await.map_err(|e| e.to_string())?;
    Ok(Link { connection, writer, reader })
}

async fn resolve(gateway: &str) -> Result<SocketAddr, String> {
    if let Ok(address) = gateway.parse() {
        return Ok(address);
    }
    let mut found = tokio::net::lookup_host(gateway).await.map_err(|e| e.to_string())?;
    found.next().ok_or_else(|| "the name has no address".into())
}
