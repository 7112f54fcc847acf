//! Starts and stops a broker. Must never let anything run on after a stop that could still write to the directory: the
//! next process has it.

use std::{
    collections::BTreeMap,
    future::Future,
    net::SocketAddr,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use stentor_engine::limits;
use stentor_proto::{
    DESCRIPTORS,
    ids::BrokerId,
    internal::{broker_server::BrokerServer, peer_server::PeerServer},
    v1::{
        admin_server::AdminServer, conversations_server::ConversationsServer, messages_server::MessagesServer,
        users_server::UsersServer,
    },
};
use stentor_raft_store::{Identity, OpenError, Store};
use stentor_transport::{
    Listener,
    bind::BindError,
    grpc::{self, Routes},
    probes::{Probes, serve_probes},
    tls::{ClientTls, ServerTls, TlsError},
};
use thiserror::Error;
use tokio::{task::JoinSet, time::Instant};

use crate::{
    api::Api,
    calls::{self, Calls},
    clocks::Clocks,
    config::{BrokerConfig, ConfigError},
    effects::Hook,
    environment::Environment,
    gateway_service::{self, GatewayService},
    hand_over, join, membership,
    metrics::Metrics,
    network::{Links, link::Lane, server::PeerService},
    node::{Node, NodeParts},
    parking::Parking,
    pulse,
    router::Peers,
    upkeep,
};

/// Why a broker did not start. Nothing runs, and nothing on disk has changed.
#[derive(Debug, Error)]
pub enum StartError {
    /// The configuration is at fault.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A port is taken, or not this machine's.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Certificates or keys cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The data directory cannot be opened.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// The data directory belongs to somebody else.
    #[error("the data directory belongs to broker {found} of cluster {cluster}, not to {asked}")]
    OtherDirectory {
        /// Its cluster.
        cluster: String,
        /// Its broker.
        found: BrokerId,
        /// What the configuration says: broker and cluster.
        asked: String,
    },
    /// A server could not begin, in the operating system's words.
    #[error("cannot serve: {0}")]
    Serve(String),
}

/// Why a broker did not become ready.
#[derive(Debug, Error)]
pub enum ReadyError {
    /// It takes too long; it goes on trying.
    #[error("not ready in time: {0}")]
    Deadline(String),
    /// It has stopped and says why.
    #[error("{0}")]
    Failed(String),
}

/// Where a broker listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// The public gRPC API.
    pub api: SocketAddr,
    /// Other brokers and gateways.
    pub peer: SocketAddr,
    /// Probes and metrics.
    pub http: SocketAddr,
}

/// A running broker. Must be stopped by [`Broker::shutdown`] or [`Broker::halt`]: dropping it ends only a part.
pub struct Broker {
    node: Arc<Node>,
    addresses: Addresses,
    tasks: JoinSet<()>,
    servers: JoinSet<()>,
}

/// How long a stopping broker waits for others to take over what it leads.
const HAND_OVER: Duration = Duration::from_millis(1_500);
/// How long it waits for calls under way to let go of the directory.
const RELEASE: Duration = Duration::from_secs(10);

/// Starts a broker: opens its directory, listens, and begins to take part. Returns before it is ready: see
/// [`Broker::ready`].
///
/// # Errors
/// See [`StartError`].
pub async fn start(config: BrokerConfig) -> Result<Broker, StartError> {
    start_in(Environment::default(), config).await
}

/// The same in a given environment, which may be a simulated one.
///
/// # Errors
/// See [`StartError`].
pub async fn start_in(environment: Environment, config: BrokerConfig) -> Result<Broker, StartError> {
    config.check()?;
    let host = environment.host.clone();
    let (peer, api) = (host.listen(config.peer_listen)?, host.listen(config.api_listen)?);
    let listeners = Listeners { peer, api, http: host.listen(config.http_listen)? };
    let started = Instant::now();
    let metrics = Arc::new(Metrics::default());
    let hook = Hook::new(metrics.clone(), environment.observer.clone());
    let store = environment.open(config.store_config(), hook.clone()).await.map_err(StartError::Serve)??;
    let broker = begin((environment, config), listeners, store.clone(), hook, metrics, started);
    if broker.is_err() {
        // Its threads must be gone before the process is: they use what the end of a process takes down.
        store.close().await;
    }
    broker
}

struct Listeners {
    peer: Listener,
    api: Listener,
    http: Listener,
}

/// Starts what uses the store. Whoever calls closes the store after an error.
fn begin(
    (environment, config): (Environment, BrokerConfig),
    Listeners { peer, api, http }: Listeners,
    store: Arc<Store>,
    hook: Arc<Hook>,
    metrics: Arc<Metrics>,
    started: Instant,
) -> Result<Broker, StartError> {
    check_directory(&config, store.identity().as_ref())?;
    let host = environment.host.clone();
    let addresses = Addresses { api: local(&api)?, peer: local(&peer)?, http: local(&http)? };
    let (mut tasks, clocks) = (JoinSet::new(), Arc::new(Clocks::default()));
    let client_tls = ClientTls::peer(&config.tls)?;
    let others = || config.peers.iter().filter(|p| p.broker != config.broker).map(|p| (p.broker, p.peer_addr));
    let known: Arc<OnceLock<Weak<Node>>> = Arc::default();
    let on_connect = {
        let known = known.clone();
        move |peer, lane| reset_backoff(&known, peer, lane)
    };
    let parking = Arc::new(Parking::new(config.park_after(), host.wall_ms() << 20));
    let links = Links::start(
        (&host, &client_tls),
        (config.broker, parking),
        others(),
        &clocks,
        &metrics,
        &mut tasks,
        on_connect,
    )?;
    let mut peers = BTreeMap::new();
    for (broker, addr) in others() {
        let calls = Calls::new(broker);
        let channel = host.channel(addr, &client_tls)?;
        tasks.spawn(calls::run(calls.clone(), channel, config.name.clone(), store.clone(), host.clone()));
        peers.insert(broker, calls);
    }
    let (peer_tls, api_tls) = (ServerTls::peer(&config.tls)?, ServerTls::api(&config.tls)?);
    let parts = NodeParts { config, environment, store, hook, clocks, metrics, links, peers: Peers(peers), started };
    let node = Node::new(parts);
    // Set once, here.
    let _ = known.set(Arc::downgrade(&node));
    let mut servers = JoinSet::new();
    serve(&node, &mut servers, (peer, &peer_tls), (api, &api_tls), http)?;
    tasks.spawn(join::take_part(node.clone()));
    tasks.spawn(membership::run(node.clone()));
    tasks.spawn(pulse::run(node.clone()));
    tasks.spawn(upkeep::checkpoints(node.clone()));
    tasks.spawn(upkeep::rounds(node.clone()));
    tasks.spawn(upkeep::failures(node.clone()));
    tasks.spawn(gateway_service::beats(node.clone()));
    Ok(Broker { node, addresses, tasks, servers })
}

fn local(listener: &Listener) -> Result<SocketAddr, StartError> {
    listener.local_addr().map_err(|e| StartError::Serve(e.to_string()))
}

fn check_directory(config: &BrokerConfig, identity: Option<&Identity>) -> Result<(), StartError> {
    // An empty one finds its place when the others have been asked.
    let Some(identity) = identity else { return Ok(()) };
    let other_cluster = config.bootstrap.as_ref().is_some_and(|b| b.cluster_id != identity.cluster_id);
    if identity.broker == config.broker && !other_cluster {
        return Ok(());
    }
    let cluster = config.bootstrap.as_ref().map_or("its own", |b| &b.cluster_id);
    Err(StartError::OtherDirectory {
        cluster: identity.cluster_id.clone(),
        found: identity.broker,
        asked: format!("broker {} of cluster {cluster}", config.broker),
    })
}

/// A peer is back: whatever waited before trying it again need not wait longer.
fn reset_backoff(known: &OnceLock<Weak<Node>>, peer: BrokerId, lane: Lane) {
    let Some(node) = known.get().and_then(Weak::upgrade) else { return };
    let asked = node.clone();
    asked.spawn(async move {
        if lane == Lane::Control {
            node.links.parking.connected(peer);
        }
        for hosted in node.all_hosted().iter().filter(|hosted| hosted.leadership().leads) {
            let replicas: Vec<_> = hosted.raft.voter_ids().chain(hosted.raft.learner_ids()).collect();
            let back = replicas.into_iter().filter(|replica| replica.broker == peer);
            // An error means that the replica has stopped.
            let _ = hosted.raft.trigger().reset_backoff(back).await;
        }
    });
}

fn serve(
    node: &Arc<Node>,
    servers: &mut JoinSet<()>,
    (peer, peer_tls): (Listener, &ServerTls),
    (api, api_tls): (Listener, &ServerTls),
    http: Listener,
) -> Result<(), StartError> {
    let failed = |e: String| StartError::Serve(e);
    let peer_routes = Routes::new(
        PeerServer::new(PeerService { node: node.clone() })
            .max_decoding_message_size(limits::PEER_MESSAGE_BYTES)
            .max_encoding_message_size(limits::PEER_MESSAGE_BYTES),
    )
    .add_service(
        BrokerServer::new(GatewayService { node: node.clone() })
            .max_decoding_message_size(limits::PEER_MESSAGE_BYTES)
            .max_encoding_message_size(limits::PEER_MESSAGE_BYTES),
    );
    let (health, health_service) = tonic_health::server::health_reporter();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .build_v1()
        .map_err(|e| failed(e.to_string()))?;
    let service = Api::new(node.clone());
    let api_routes = Routes::new(ConversationsServer::new(service.clone()))
        .add_service(MessagesServer::new(service.clone()))
        .add_service(UsersServer::new(service.clone()))
        .add_service(AdminServer::new(service))
        .add_service(health_service)
        .add_service(reflection);
    run(node, servers, "peer port", grpc::serve(peer, peer_tls, peer_routes, node.stop.clone().cancelled_owned()));
    run(node, servers, "API port", grpc::serve(api, api_tls, api_routes, node.stop.clone().cancelled_owned()));
    let scraped = node.clone();
    let probes = Probes::new(move || scraped.metrics.text(&scraped.store.stats()));
    probes.set_started(true);
    let serving = serve_probes(http, probes.clone(), node.stop.clone().cancelled_owned());
    run(node, servers, "probes", serving);
    servers.spawn(upkeep::probes(node.clone(), probes, health));
    Ok(())
}

fn run<E: std::fmt::Display>(
    node: &Arc<Node>,
    servers: &mut JoinSet<()>,
    what: &'static str,
    serving: impl Future<Output = Result<(), E>> + Send + 'static,
) {
    let node = node.clone();
    servers.spawn(async move {
        if let Err(error) = serving.await {
            node.fail(&format!("{what}: {error}"));
        }
    });
}

impl Broker {
    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// Returns when every replica here knows its leader and the cluster is made.
    ///
    /// # Errors
    /// See [`ReadyError`].
    pub async fn ready(&self, deadline: Duration) -> Result<(), ReadyError> {
        let mut failed = self.node.failed.subscribe();
        let ready = async {
            let mut readiness = upkeep::Readiness::default();
            while !readiness.is_ready(&self.node) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            () = ready => Ok(()),
            failure = failed.wait_for(Option::is_some) => {
                let what = failure.ok().and_then(|what| what.clone());
                Err(ReadyError::Failed(what.unwrap_or_else(|| "the broker has stopped".into())))
            }
            () = tokio::time::sleep(deadline) => Err(ReadyError::Deadline(self.lacks())),
        }
    }

    /// What it is that a broker waits for, for people.
    fn lacks(&self) -> String {
        let Some(view) = self.node.meta.view() else {
            let waits = self.node.last_waited_for();
            return waits.unwrap_or_else(|| "the meta shard has not told the placement".into());
        };
        let all = self.node.all_hosted();
        let leaderless = all.iter().filter(|h| h.leadership().leader.is_none());
        let leaderless: Vec<_> = leaderless.map(|h| h.shard.to_string()).collect();
        let new: Vec<_> =
            view.placement.shards.iter().filter(|p| !p.initialized).map(|p| p.shard.to_string()).collect();
        format!("shards without a leader: [{}]; not begun: [{}]", leaderless.join(", "), new.join(", "))
    }

    /// Completes when the broker cannot go on, with the reason; then it should be shut down.
    pub async fn failed(&self) -> String {
        let mut failed = self.node.failed.subscribe();
        match failed.wait_for(Option::is_some).await {
            Ok(what) => what.clone().unwrap_or_default(),
            Err(_) => "the broker has stopped".into(),
        }
    }

    /// Why the broker cannot go on; `None` while it can.
    pub fn failure(&self) -> Option<String> {
        self.node.failed.borrow().clone()
    }

    /// Hands its shards over to others as far as they take them, then stops as [`Self::halt`] does.
    pub async fn shutdown(self) {
        hand_over::all(&self.node).await;
        let handed_over = async {
            while !hand_over::led(&self.node).is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let _ = tokio::time::timeout(HAND_OVER, handed_over).await;
        self.halt().await;
    }

    /// Stops without handing anything over, as a crash would; what was acknowledged is on disk already.
    pub async fn halt(self) {
        let Self { node, mut tasks, mut servers, .. } = self;
        node.stop.cancel();
        tasks.shutdown().await;
        node.end_tasks().await;
        for hosted in node.let_go().iter() {
            // An error means that the replica had stopped before.
            let _ = hosted.raft.shutdown().await;
        }
        while servers.join_next().await.is_some() {}
        let store = node.store.clone();
        drop(node);
        store.close().await;
        released(store).await;
    }
}

/// Waits until the directory is free, so that whoever starts next can have it.
async fn released(store: Arc<Store>) {
    let (deadline, weak) = (Instant::now() + RELEASE, Arc::downgrade(&store));
    while !store.is_released() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(store);
    while weak.strong_count() > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    if weak.strong_count() > 0 {
        tracing::warn!("something still holds the data directory");
    }
}
