//! Starts and stops the nodes of `stentor dev`. They share one process but nothing else: every byte between them goes
//! over sockets, as between machines.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::{join_all, select_all};
use rand::Rng;
use stentor_broker::{AppConfig, Bootstrap, Broker, BrokerConfig, KeyConfig, PeerConfig, StoreTuning};
use stentor_gateway::{BrokerAddress, Gateway, GatewayConfig, GatewayLimits};
use stentor_proto::ids::{BrokerId, DeviceId, UserId};
use stentor_transport::pki::Pki;

use super::Home;
use crate::{
    cluster_file::{ClusterFile, Node, Role, SigningKey, User},
    context,
    failure::Failure,
    keys,
    ports::{Ports, Wire},
};

/// The app of a development cluster.
pub(crate) const APP: &str = "demo";
/// Its ready users.
const USERS: [&str; 2] = ["ann", "bob"];
/// The device of the ready tokens.
const DEVICE: &str = "phone";
/// Who the admin token is for.
const ADMIN: &str = "admin";

const BROKERS: u32 = 3;
/// A cluster that is not ready by then never will be.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Small enough that three brokers share a laptop.
const CACHE_BYTES_PER_BROKER: usize = 128 * 1024 * 1024;

/// The running nodes.
pub(crate) struct DevCluster {
    dir: PathBuf,
    file: ClusterFile,
    brokers: Vec<Broker>,
    gateway: Gateway,
}

/// Where one broker listens.
#[derive(Debug, Clone, Copy)]
struct BrokerPorts {
    api: SocketAddr,
    peer: SocketAddr,
    http: SocketAddr,
}

impl DevCluster {
    /// Starts everything and returns when every shard has a leader and the gateway takes devices.
    pub(crate) async fn start(home: &Home, shards: u32) -> Result<Self, Failure> {
        let before = ClusterFile::read(home.dir())?;
        let cluster_id = before.as_ref().map_or_else(new_cluster_id, |file| file.cluster_id.clone());
        let pki = Pki::create(&home.dir().join("pki")).map_err(Failure::failed)?;
        let (signing_key, public_key) = keys::signing_key(home.dir())?;

        let mut ports = Ports::lock();
        let broker_ports = choose_broker_ports(&mut ports, before.as_ref())?;
        let quic = ports.choose(Wire::Udp, remembered(before.as_ref(), "gateway-1", |n| n.quic, 7443))?;
        let http = ports.choose(Wire::Tcp, remembered(before.as_ref(), "gateway-1", |n| n.http, 7490))?;

        let bootstrap = bootstrap(&cluster_id, shards, public_key);
        let mut brokers = Vec::new();
        for number in 1..=BROKERS {
            let config = broker_config(home.dir(), &pki, number, &broker_ports, bootstrap.clone())?;
            brokers.push(Box::pin(stentor_broker::start(config)).await.map_err(Failure::failed)?);
        }
        let gateway_config = gateway_config(home.dir(), &pki, quic, http, &broker_ports)?;
        let gateway = Box::pin(stentor_gateway::start(gateway_config)).await.map_err(Failure::failed)?;
        drop(ports);

        wait_until_ready(&brokers, &gateway).await?;
        let nodes = nodes(home.dir(), &broker_ports, quic, http);
        let file = cluster_file(cluster_id, nodes, pki.ca_path().to_owned(), signing_key)?;
        file.write(home.dir())?;
        Ok(Self { dir: home.dir().to_owned(), file, brokers, gateway })
    }

    /// What `cluster.json` says.
    pub(crate) fn file(&self) -> &ClusterFile {
        &self.file
    }

    /// The folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns when a node has stopped by itself: a full disk, a damaged file.
    pub(crate) async fn failed(&self) -> Failure {
        let waits = self.brokers.iter().map(|broker| Box::pin(broker.failed()));
        let (why, which, _) = select_all(waits).await;
        Failure::failed(format_args!("broker-{} has stopped: {why}", which + 1))
    }

    /// Devices first, then brokers; the folder remembers the ports.
    pub(crate) async fn stop(self) -> Result<(), Failure> {
        self.gateway.shutdown().await;
        join_all(self.brokers.into_iter().map(Broker::shutdown)).await;
        let mut file = self.file;
        file.nodes.iter_mut().for_each(|node| node.pid = None);
        file.write(&self.dir)
    }
}

fn choose_broker_ports(ports: &mut Ports, before: Option<&ClusterFile>) -> Result<Vec<BrokerPorts>, Failure> {
    let choose = |number: u32| {
        let name = format!("broker-{number}");
        let step = 10 * (number as u16 - 1);
        let mut port = |field: fn(&Node) -> Option<SocketAddr>, usual: u16| {
            ports.choose(Wire::Tcp, remembered(before, &name, field, usual))
        };
        Ok(BrokerPorts {
            api: port(|n| n.api, 7410 + step)?,
            peer: port(|n| n.peer, 7411 + step)?,
            http: port(|n| n.http, 7490 + number as u16)?,
        })
    };
    (1..=BROKERS).map(choose).collect()
}

/// The port that a node had last time, or its usual one.
fn remembered(
    before: Option<&ClusterFile>,
    name: &str,
    field: impl Fn(&Node) -> Option<SocketAddr>,
    usual: u16,
) -> u16 {
    let node = before.and_then(|file| file.nodes.iter().find(|node| node.name == name));
    node.and_then(field).map_or(usual, |address| address.port())
}

fn new_cluster_id() -> String {
    format!("{:016x}", rand::rng().random::<u64>())
}

fn bootstrap(cluster_id: &str, shards: u32, public_key_pem: String) -> Bootstrap {
    let key = KeyConfig { kid: "dev".into(), algorithm: "EdDSA".into(), public_key_pem, dev: true };
    Bootstrap { cluster_id: cluster_id.into(), shards, apps: vec![AppConfig { app: APP.into(), keys: vec![key] }] }
}

fn broker_config(
    dir: &Path,
    pki: &Pki,
    number: u32,
    ports: &[BrokerPorts],
    bootstrap: Bootstrap,
) -> Result<BrokerConfig, Failure> {
    let name = format!("broker-{number}");
    let own = ports[number as usize - 1];
    let peer = |(n, ports): (usize, &BrokerPorts)| PeerConfig {
        broker: BrokerId(n as u32 + 1),
        name: format!("broker-{}", n + 1),
        peer_addr: ports.peer,
        api_addr: ports.api,
    };
    Ok(BrokerConfig {
        broker: BrokerId(number),
        data_dir: dir.join(&name),
        peer_listen: own.peer,
        api_listen: own.api,
        http_listen: own.http,
        peers: ports.iter().enumerate().map(peer).collect(),
        tls: pki.issue(&name, &dir.join("pki")).map_err(Failure::failed)?,
        development: true,
        bootstrap: Some(bootstrap),
        store: StoreTuning { cache_bytes: CACHE_BYTES_PER_BROKER, ..StoreTuning::default() },
        name,
    })
}

fn gateway_config(
    dir: &Path,
    pki: &Pki,
    quic: SocketAddr,
    http: SocketAddr,
    ports: &[BrokerPorts],
) -> Result<GatewayConfig, Failure> {
    let broker = |(n, ports): (usize, &BrokerPorts)| BrokerAddress {
        broker: BrokerId(n as u32 + 1),
        name: format!("broker-{}", n + 1),
        peer_addr: ports.peer,
    };
    Ok(GatewayConfig {
        name: "gateway-1".into(),
        quic_listen: quic,
        http_listen: http,
        brokers: ports.iter().enumerate().map(broker).collect(),
        tls: pki.issue("gateway-1", &dir.join("pki")).map_err(Failure::failed)?,
        development: true,
        // A development cluster ends with Ctrl-C; nobody waits for devices to find another gateway.
        limits: GatewayLimits { drain_ms: 0, ..GatewayLimits::default() },
    })
}

async fn wait_until_ready(brokers: &[Broker], gateway: &Gateway) -> Result<(), Failure> {
    let late = |_| Failure::failed(format_args!("the cluster was not ready within {READY_WITHIN:?}"));
    tokio::time::timeout(READY_WITHIN, async {
        for broker in brokers {
            broker.ready(READY_WITHIN).await.map_err(Failure::failed)?;
        }
        gateway.ready(READY_WITHIN).await.map_err(Failure::failed)
    })
    .await
    .map_err(late)?
}

fn nodes(dir: &Path, ports: &[BrokerPorts], quic: SocketAddr, http: SocketAddr) -> Vec<Node> {
    let pid = Some(std::process::id());
    let broker = |(n, ports): (usize, &BrokerPorts)| {
        let name = format!("broker-{}", n + 1);
        let data_dir = Some(dir.join(&name));
        let (api, peer, http) = (Some(ports.api), Some(ports.peer), Some(ports.http));
        Node { name, role: Role::Broker, pid, api, peer, quic: None, http, data_dir }
    };
    let mut nodes: Vec<Node> = ports.iter().enumerate().map(broker).collect();
    nodes.push(Node {
        name: "gateway-1".into(),
        role: Role::Gateway,
        pid,
        api: None,
        peer: None,
        quic: Some(quic),
        http: Some(http),
        data_dir: None,
    });
    nodes
}

fn cluster_file(
    cluster_id: String,
    nodes: Vec<Node>,
    ca: PathBuf,
    signing_key: SigningKey,
) -> Result<ClusterFile, Failure> {
    let admin_token = context::mint(&signing_key, APP, &UserId::new(ADMIN)?, None, true)?;
    let users = USERS.iter().map(|user| {
        let token = context::mint(&signing_key, APP, &UserId::new(user)?, Some(DeviceId::new(DEVICE)?), false)?;
        Ok(User { user: (*user).into(), device: DEVICE.into(), token })
    });
    let users = users.collect::<Result<_, Failure>>()?;
    Ok(ClusterFile { cluster_id, nodes, ca, app: APP.into(), admin_token, users, signing_key })
}
