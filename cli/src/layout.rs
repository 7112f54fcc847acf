//! Where everything of a development cluster lies and listens: ports, configurations, `cluster.json`. For `dev`, whose
//! nodes share a process, and for `cluster`, whose nodes are processes and keep what was written for them. Must never
//! move a node of the latter to other ports: its peers have them in their configurations.
//!
//! ```text
//! D/cluster.json   D/pki   D/keys   D/config/<node>.toml   D/logs/<node>.log   D/<broker> (data)   D/orders.json
//! ```

use std::{
    fs,
    net::SocketAddr,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use rand::Rng;
use serde::Serialize;
use stentor_broker::{AppConfig, Bootstrap, BrokerConfig, KeyConfig, PeerConfig, StoreTuning};
use stentor_gateway::config::{BrokerAddress, GatewayConfig, GatewayLimits};
use stentor_proto::ids::{BrokerId, DeviceId, UserId};
use stentor_transport::pki::Pki;

use crate::{
    cluster_file::{self, ClusterFile, Node, Role, User},
    context,
    failure::Failure,
    keys,
    ports::{Ports, Wire},
};

/// The app of a development cluster.
const APP: &str = "demo";
const USERS: [&str; 2] = ["ann", "bob"];
const DEVICE: &str = "phone";
const ADMIN: &str = "admin";
/// All brokers together take this part of the machine's memory for rows, and each within bounds.
const CACHE_PART: u64 = 8;
/// Where a container's bound on memory stands.
const MEMORY_MAX: &str = "/sys/fs/cgroup/memory.max";
const CACHE_BYTES: RangeInclusive<u64> = 128 * 1024 * 1024..=1024 * 1024 * 1024;
/// Devices of a development cluster find another gateway at once; a drain need not take longer than a person waits.
const DRAIN_MS: u32 = 500;

/// How large a new cluster is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    /// How many brokers; three hold every shard's replicas.
    pub(crate) brokers: u32,
    /// How many gateways.
    pub(crate) gateways: u32,
    /// How many data shards, fixed at the first start.
    pub(crate) shards: u32,
}

/// A node's configuration file.
pub(crate) fn config_path(dir: &Path, node: &str) -> PathBuf {
    dir.join("config").join(format!("{node}.toml"))
}

/// Where a node's output goes.
pub(crate) fn log_path(dir: &Path, node: &str) -> PathBuf {
    dir.join("logs").join(format!("{node}.log"))
}

/// Everything that the nodes of a cluster need to know. Nothing of it is written yet but keys and certificates.
#[derive(Debug)]
pub(crate) struct Layout {
    /// What `cluster.json` will say; no node has a pid.
    pub(crate) file: ClusterFile,
    /// Each broker's configuration.
    pub(crate) brokers: Vec<BrokerConfig>,
    /// Each gateway's.
    pub(crate) gateways: Vec<GatewayConfig>,
}

/// Lays out a cluster: keys, certificates, ports, configurations. What stood in the folder `before` keeps its cluster
/// id and its ports as far as they are free. The ports stay chosen as long as `ports` lives.
pub(crate) fn plan(dir: &Path, size: Size, before: Option<&ClusterFile>, ports: &mut Ports) -> Result<Layout, Failure> {
    let (signing_key, public_key_pem) = keys::signing_key(dir)?;
    let pki = Pki::create(&dir.join("pki")).map_err(Failure::failed)?;
    let new_id = || format!("{:016x}", rand::rng().random::<u64>());
    let cluster_id = before.map_or_else(new_id, |file| file.cluster_id.clone());
    let mut nodes = Vec::new();
    for number in 1..=size.brokers {
        nodes.push(new_broker(dir, number, before, ports)?);
    }
    for number in 1..=size.gateways {
        nodes.push(new_gateway(number, before, ports)?);
    }
    let app_key = KeyConfig { kid: signing_key.kid.clone(), algorithm: "EdDSA".into(), public_key_pem, dev: true };
    let apps = vec![AppConfig { app: APP.into(), keys: vec![app_key] }];
    let bootstrap = Bootstrap { cluster_id: cluster_id.clone(), shards: size.shards, apps };

    let admin_token = context::mint(&signing_key, APP, &UserId::new(ADMIN)?, None, true)?;
    let users = USERS.iter().map(|user| {
        let token = context::mint(&signing_key, APP, &UserId::new(user)?, Some(DeviceId::new(DEVICE)?), false)?;
        Ok(User { user: (*user).into(), device: DEVICE.into(), token })
    });
    let users = users.collect::<Result<_, Failure>>()?;
    let ca = pki.ca_path().to_owned();
    let file = ClusterFile { cluster_id, nodes, ca, app: APP.into(), admin_token, users, signing_key };

    let (mut brokers, mut gateways) = (Vec::new(), Vec::new());
    for node in &file.nodes {
        match node.role {
            Role::Broker => brokers.push(broker_config(dir, &pki, &file, node, &bootstrap)?),
            Role::Gateway => gateways.push(gateway_config(dir, &pki, &file, node)?),
        }
    }
    Ok(Layout { file, brokers, gateways })
}

/// Lays out a new cluster of processes and writes their configurations. Nothing is started.
pub(crate) fn create(dir: &Path, size: Size, ports: &mut Ports) -> Result<ClusterFile, Failure> {
    let Layout { file, brokers, gateways } = plan(dir, size, None, ports)?;
    brokers.iter().try_for_each(|config| write_config(dir, &config.name, config))?;
    gateways.iter().try_for_each(|config| write_config(dir, &config.name, config))?;
    Ok(file)
}

/// Lays out one more gateway of an existing cluster and adds it to its file.
pub(crate) fn add_gateway(dir: &Path, file: &mut ClusterFile, ports: &mut Ports) -> Result<Node, Failure> {
    let pki = Pki::create(&dir.join("pki")).map_err(Failure::failed)?;
    let node = new_gateway(next_number(file, Role::Gateway), None, ports)?;
    write_config(dir, &node.name, &gateway_config(dir, &pki, file, &node)?)?;
    file.nodes.push(node.clone());
    Ok(node)
}

fn next_number(file: &ClusterFile, role: Role) -> u32 {
    let numbers = file.nodes.iter().filter(|node| node.role == role).filter_map(|node| number_of(&node.name));
    numbers.max().unwrap_or(0) + 1
}

/// `broker-3` is 3.
fn number_of(name: &str) -> Option<u32> {
    name.rsplit_once('-')?.1.parse().ok()
}

/// The port that a node had last time, or its usual one.
fn had(before: Option<&ClusterFile>, name: &str, field: fn(&Node) -> Option<SocketAddr>, usual: u16) -> u16 {
    let node = before.and_then(|file| file.nodes.iter().find(|node| node.name == name));
    node.and_then(field).map_or(usual, |address| address.port())
}

fn new_broker(dir: &Path, number: u32, before: Option<&ClusterFile>, ports: &mut Ports) -> Result<Node, Failure> {
    let name = format!("broker-{number}");
    let step = 10 * (number as u16 - 1);
    let mut port = |field, usual| ports.choose(Wire::Tcp, had(before, &name, field, usual)).map(Some);
    Ok(Node {
        role: Role::Broker,
        pid: None,
        api: port(|n| n.api, 7410 + step)?,
        peer: port(|n| n.peer, 7411 + step)?,
        quic: None,
        http: port(|n| n.http, 7490 + number as u16)?,
        data_dir: Some(dir.join(&name)),
        name,
    })
}

fn new_gateway(number: u32, before: Option<&ClusterFile>, ports: &mut Ports) -> Result<Node, Failure> {
    let name = format!("gateway-{number}");
    // The brokers' stand behind 7490.
    let http = if number == 1 { 7490 } else { 7390 + number as u16 };
    let (quic, http) = (had(before, &name, |n| n.quic, 7442 + number as u16), had(before, &name, |n| n.http, http));
    Ok(Node {
        name,
        role: Role::Gateway,
        pid: None,
        api: None,
        peer: None,
        quic: Some(ports.choose(Wire::Udp, quic)?),
        http: Some(ports.choose(Wire::Tcp, http)?),
        data_dir: None,
    })
}

fn broker_config(
    dir: &Path,
    pki: &Pki,
    file: &ClusterFile,
    node: &Node,
    bootstrap: &Bootstrap,
) -> Result<BrokerConfig, Failure> {
    let peers = brokers(file).map(|(broker, node)| {
        let name = node.name.clone();
        Ok(PeerConfig { broker, name, peer_addr: address(node.peer)?, api_addr: address(node.api)? })
    });
    Ok(BrokerConfig {
        name: node.name.clone(),
        broker: BrokerId(number_of(&node.name).unwrap_or(0)),
        data_dir: dir.join(&node.name),
        peer_listen: address(node.peer)?,
        api_listen: address(node.api)?,
        http_listen: address(node.http)?,
        peers: peers.collect::<Result<_, Failure>>()?,
        tls: pki.issue(&node.name, &dir.join("pki")).map_err(Failure::failed)?,
        development: true,
        bootstrap: Some(bootstrap.clone()),
        park_after_ms: stentor_engine::limits::PARK_AFTER_MS,
        store: StoreTuning { cache_bytes: cache_bytes(brokers(file).count()), ..StoreTuning::default() },
    })
}

fn cache_bytes(brokers: usize) -> usize {
    let memory = rustix::system::sysinfo();
    let machine = memory.totalram.saturating_mul(u64::from(memory.mem_unit));
    cache_share(machine, fs::read_to_string(MEMORY_MAX).ok().as_deref(), brokers)
}

/// One broker's part of what `machine` has in bytes and the container's bound, as its file says it, leaves of it.
fn cache_share(machine: u64, bound: Option<&str>, brokers: usize) -> usize {
    // "max" where there is none.
    let bound = bound.and_then(|bytes| bytes.trim().parse().ok());
    let part = bound.unwrap_or(machine).min(machine) / CACHE_PART / brokers.max(3) as u64;
    part.clamp(*CACHE_BYTES.start(), *CACHE_BYTES.end()) as usize
}

fn gateway_config(dir: &Path, pki: &Pki, file: &ClusterFile, node: &Node) -> Result<GatewayConfig, Failure> {
    let brokers = brokers(file)
        .map(|(broker, node)| Ok(BrokerAddress { broker, name: node.name.clone(), peer_addr: address(node.peer)? }));
    Ok(GatewayConfig {
        name: node.name.clone(),
        quic_listen: address(node.quic)?,
        http_listen: address(node.http)?,
        brokers: brokers.collect::<Result<_, Failure>>()?,
        tls: pki.issue(&node.name, &dir.join("pki")).map_err(Failure::failed)?,
        development: true,
        limits: GatewayLimits { drain_ms: DRAIN_MS, ..GatewayLimits::default() },
    })
}

fn brokers(file: &ClusterFile) -> impl Iterator<Item = (BrokerId, &Node)> {
    let brokers = file.nodes.iter().filter(|node| node.role == Role::Broker);
    brokers.filter_map(|node| Some((BrokerId(number_of(&node.name)?), node)))
}

fn address(address: Option<SocketAddr>) -> Result<SocketAddr, Failure> {
    address.ok_or_else(|| Failure::failed("cluster.json lacks an address that this node needs"))
}

fn write_config(dir: &Path, node: &str, config: &impl Serialize) -> Result<(), Failure> {
    let path = config_path(dir, node);
    let text = toml::to_string_pretty(config).map_err(Failure::failed)?;
    fs::create_dir_all(dir.join("config"))
        .and_then(|()| cluster_file::replace(&path, text.as_bytes()))
        .map_err(|error| Failure::failed(format_args!("cannot write {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_node_gets_a_configuration_that_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let size = Size { brokers: 3, gateways: 2, shards: 4 };
        let mut ports = Ports::lock();
        let mut file = create(dir.path(), size, &mut ports).unwrap();
        let names: Vec<&str> = file.nodes.iter().map(|n| n.name.as_str()).collect();
        assert_eq!(names, ["broker-1", "broker-2", "broker-3", "gateway-1", "gateway-2"]);
        for node in &file.nodes {
            let text = fs::read_to_string(config_path(dir.path(), &node.name)).unwrap();
            match node.role {
                Role::Broker => assert_eq!(BrokerConfig::from_toml(&text).unwrap().peers.len(), 3),
                Role::Gateway => assert_eq!(GatewayConfig::from_toml(&text).unwrap().brokers.len(), 3),
            }
        }
        assert_eq!(add_gateway(dir.path(), &mut file, &mut ports).unwrap().name, "gateway-3");
    }

    #[test]
    fn a_cluster_that_was_there_keeps_its_id_and_its_ports() {
        let dir = tempfile::tempdir().unwrap();
        let size = Size { brokers: 3, gateways: 1, shards: 4 };
        let first = plan(dir.path(), size, None, &mut Ports::lock()).unwrap();
        let again = plan(dir.path(), size, Some(&first.file), &mut Ports::lock()).unwrap();
        assert_eq!(again.file.cluster_id, first.file.cluster_id);
        assert_eq!(again.file.nodes, first.file.nodes);
        assert_eq!(again.brokers[0].peers[2].peer_addr, first.brokers[2].peer_listen);
        assert_eq!(again.gateways[0].brokers.len(), 3);
    }

    #[test]
    fn a_broker_takes_its_part_of_what_the_container_may_use() {
        const GIB: u64 = 1 << 30;
        let share = |bound, brokers| cache_share(24 * GIB, bound, brokers) as u64;
        assert_eq!(share(None, 3), GIB);
        assert_eq!(share(Some("max\n"), 3), GIB);
        assert_eq!(share(Some("12884901888\n"), 3), GIB / 2);
        assert_eq!(share(Some("12884901888\n"), 6), GIB / 4);
        assert_eq!(share(Some("12884901888\n"), 1), GIB / 2, "one broker may have two beside it later");
        assert_eq!(share(Some("99999999999999\n"), 3), GIB, "more than the machine has");
        assert_eq!(share(Some("1048576\n"), 3), *CACHE_BYTES.start());
        assert_eq!(cache_share(1024 * GIB, None, 3) as u64, *CACHE_BYTES.end());
    }
}
