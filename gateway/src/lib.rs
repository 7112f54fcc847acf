//! The gateway: the stateless edge that ends devices' QUIC connections and forwards to brokers. Must never keep what
//! another gateway could not make anew: kill it and its devices go on elsewhere, nothing lost, nothing twice.
//!
//! A frame's way: `session` reads and checks it, `core` finds the shard, `shard` keeps it until it is answered, `link`
//! carries it to the broker. Back: `link` → `shard` → (`fanout` →) `inbox` → `session`.

#![forbid(unsafe_code)]

pub mod config;
mod core;
mod fanout;
#[doc(hidden)]
pub mod figures;
mod inbox;
mod link;
mod metrics;
mod placement;
mod session;
mod sessions;
mod shard;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use stentor_transport::{
    Host,
    bind::BindError,
    grpc::Channel,
    probes::{Probes, serve_probes},
    quic::{QuicLimits, QuicListener},
    tls::{ClientTls, ServerTls, TlsError},
};
use thiserror::Error;
use tokio::{sync::oneshot, task::JoinSet, time::timeout};

pub use config::{BrokerAddress, ConfigError, GatewayConfig, GatewayLimits, RateLimit};

use crate::{core::Core, metrics::Metrics};

/// How often conditions that nobody announces are looked at.
const POLL: Duration = Duration::from_millis(10);
/// How long the last proposals (cursor moves of sessions that just ended) may take when the gateway stops.
const LAST_ANSWERS: Duration = Duration::from_secs(2);
/// What a session may take for its last words after it was told to end: writing them, and their acknowledgement.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Packets that say goodbye.
const LAST_PACKETS: Duration = Duration::from_secs(1);

/// Why a gateway did not start; nothing runs.
#[derive(Debug, Error)]
pub enum StartError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A port is taken or an address is not ours.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Certificates or keys cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A gateway that was not ready in time: no broker told it the placement.
#[derive(Debug, Error)]
#[error("gateway {0} has no placement yet: no broker answers")]
pub struct NotReady(String);

/// Where a gateway listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// For devices (UDP).
    pub quic: SocketAddr,
    /// For probes and metrics.
    pub http: SocketAddr,
}

/// A running gateway. Dropping it cuts everything at once; [`Gateway::shutdown`] sends devices away first.
pub struct Gateway {
    core: Arc<Core>,
    addresses: Addresses,
    probes: Probes,
    listener: Arc<QuicListener>,
    tasks: JoinSet<()>,
    stop_probes: oneshot::Sender<()>,
}

/// Starts a gateway; it serves devices as soon as a broker told it the placement ([`Gateway::ready`]).
///
/// # Errors
/// See [`StartError`].
pub async fn start(config: GatewayConfig) -> Result<Gateway, StartError> {
    start_on(Host::real(), config).await
}

/// The same on a given machine, which may be a simulated one.
///
/// # Errors
/// See [`StartError`].
pub async fn start_on(host: Host, config: GatewayConfig) -> Result<Gateway, StartError> {
    config.check()?;
    let (peer_tls, quic_tls) = (ClientTls::peer(&config.tls)?, ServerTls::quic(&config.tls)?);
    let limits = QuicLimits { max_connections: config.limits.connections, ..QuicLimits::default() };
    let listener = Arc::new(host.listen_quic(config.quic_listen, &quic_tls, limits)?);
    let http = host.listen(config.http_listen)?;
    let http_addr = http.local_addr().map_err(|source| BindError::Io { addr: config.http_listen, source })?;
    let addresses = Addresses { quic: listener.local_addr(), http: http_addr };
    let channels = config
        .brokers
        .iter()
        .map(|broker| Ok((broker.broker, host.channel(broker.peer_addr, &peer_tls)?)))
        .collect::<Result<Vec<_>, TlsError>>()?;

    let metrics = Arc::new(Metrics::default());
    let scraped = metrics.clone();
    let probes = Probes::new(move || scraped.encode());
    let core = Arc::new(Core::new(config, host, metrics));
    let mut tasks = JoinSet::new();
    let watched: Vec<Channel> = channels.iter().map(|(_, channel)| channel.clone()).collect();
    tasks.spawn(placement::watch(core.clone(), watched));
    for (broker, channel) in channels {
        tasks.spawn(link::run(core.clone(), broker, channel));
    }
    tasks.spawn(core.clone().tick());
    tasks.spawn(accept(core.clone(), listener.clone()));
    tasks.spawn(announce(core.clone(), probes.clone()));
    let (stop_probes, stopped) = oneshot::channel();
    let serving = serve_probes(http, probes.clone(), async {
        let _ = stopped.await;
    });
    tokio::spawn(async move {
        if let Err(error) = serving.await {
            tracing::warn!(%error, "probes cannot be served");
        }
    });
    probes.set_started(true);
    Ok(Gateway { core, addresses, probes, listener, tasks, stop_probes })
}

impl Gateway {
    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Waits until it can serve: the placement is known and a broker is attached.
    ///
    /// # Errors
    /// [`NotReady`] after `deadline`.
    pub async fn ready(&self, deadline: Duration) -> Result<(), NotReady> {
        let ready = wait_ready(&self.core);
        timeout(deadline, ready).await.map_err(|_| NotReady(self.core.config.name.clone()))
    }

    /// Stops: takes no new devices, asks those that are here to leave within the drain time, and waits for them.
    pub async fn shutdown(mut self) {
        self.probes.set_ready(false);
        self.core.draining.send_replace(true);
        // Sessions close by themselves at most a quarter after the drain time.
        let longest = Duration::from_millis(u64::from(self.core.config.limits.drain_ms) * 5 / 4) + LAST_WORDS;
        let _ = timeout(longest, until(|| self.core.metrics.connections.get() == 0)).await;
        self.listener.close("DRAINING");
        let _ = timeout(LAST_ANSWERS, until(|| self.core.is_idle())).await;
        let _ = timeout(LAST_PACKETS, self.listener.wait_idle()).await;
        self.tasks.shutdown().await;
        let _ = self.stop_probes.send(());
    }
}

async fn wait_ready(core: &Core) {
    core.placement_known().await;
    until(|| core.links.up() > 0).await;
}

async fn announce(core: Arc<Core>, probes: Probes) {
    wait_ready(&core).await;
    if !*core.draining.borrow() {
        probes.set_ready(true);
    }
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::time::sleep(POLL).await;
    }
}

async fn accept(core: Arc<Core>, listener: Arc<QuicListener>) {
    let mut sessions = JoinSet::new();
    while let Some(incoming) = listener.accept().await {
        if *core.draining.borrow() {
            core.metrics.refused_connections.inc();
            incoming.refuse();
            continue;
        }
        sessions.spawn(session::serve(core.clone(), incoming));
        while sessions.try_join_next().is_some() {}
    }
    // Their connections are closed: they only have to notice.
    while sessions.join_next().await.is_some() {}
}
