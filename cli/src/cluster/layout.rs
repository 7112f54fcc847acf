//! Where everything of a cluster of processes lies and listens: ports, configuration files, `cluster.json`. Made once;
//! later starts find it. Must never move a node to other ports: its peers have them in their configurations.
//!
//! ```text
//! D/cluster.json   D/pki   D/keys   D/config/<node>.toml   D/logs/<node>.log   D/<broker> (data)   D/orders.json
//! ```

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use rand::Rng;
use serde::Serialize;
use stentor_broker::{AppConfig, Bootstrap, BrokerConfig, KeyConfig, PeerConfig, StoreTuning};
use stentor_gateway::config::{BrokerAddress, GatewayConfig, GatewayLimits};
use stentor_proto::ids::{BrokerId, DeviceId, UserId};
use stentor_transport::pki::Pki;

use crate::{
    cluster_file::{self, ClusterFile, Node, Role, SigningKey, User},
    context,
    failure::Failure,
    ports::{Ports, Wire},
};

/// The app of a development cluster.
const APP: &str = "demo";
const USERS: [&str; 2] = ["ann", "bob"];
const DEVICE: &str = "phone";
const ADMIN: &str = "admin";
/// Several brokers share this machine.
const CACHE_BYTES_PER_BROKER: usize = 128 * 1024 * 1024;
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

/// Lays out a new cluster: keys, certificates, ports, configurations, `cluster.json`. Nothing is started. The ports stay
/// chosen as long as `ports` lives.
pub(crate) fn create(
    dir: &Path,
    size: Size,
    key: (SigningKey, String),
    ports: &mut Ports,
) -> Result<ClusterFile, Failure> {
    let pki = Pki::create(&dir.join("pki")).map_err(Failure::failed)?;
    let cluster_id = format!("{:016x}", rand::rng().random::<u64>());
    let mut nodes = Vec::new();
    for number in 1..=size.brokers {
        nodes.push(new_broker(dir, number, ports)?);
    }
    for number in 1..=size.gateways {
        nodes.push(new_gateway(number, ports)?);
    }
    let (signing_key, public_key_pem) = key;
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

    for node in &file.nodes {
        match node.role {
            Role::Broker => write_config(dir, &node.name, &broker_config(dir, &pki, &file, node, &bootstrap)?)?,
            Role::Gateway => write_config(dir, &node.name, &gateway_config(dir, &pki, &file, node)?)?,
        }
    }
    Ok(file)
}

/// Lays out one more gateway of an existing cluster and adds it to its file.
pub(crate) fn add_gateway(dir: &Path, file: &mut ClusterFile, ports: &mut Ports) -> Result<Node, Failure> {
    let pki = Pki::create(&dir.join("pki")).map_err(Failure::failed)?;
    let node = new_gateway(next_number(file, Role::Gateway), ports)?;
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

fn new_broker(dir: &Path, number: u32, ports: &mut Ports) -> Result<Node, Failure> {
    let name = format!("broker-{number}");
    let step = 10 * (number as u16 - 1);
    Ok(Node {
        role: Role::Broker,
        pid: None,
        api: Some(ports.choose(Wire::Tcp, 7410 + step)?),
        peer: Some(ports.choose(Wire::Tcp, 7411 + step)?),
        quic: None,
        http: Some(ports.choose(Wire::Tcp, 7490 + number as u16)?),
        data_dir: Some(dir.join(&name)),
        name,
    })
}

fn new_gateway(number: u32, ports: &mut Ports) -> Result<Node, Failure> {
    Ok(Node {
        name: format!("gateway-{number}"),
        role: Role::Gateway,
        pid: None,
        api: None,
        peer: None,
        quic: Some(ports.choose(Wire::Udp, 7442 + number as u16)?),
        http: Some(ports.choose(Wire::Tcp, 7390 + number as u16)?),
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
        store: StoreTuning { cache_bytes: CACHE_BYTES_PER_BROKER, ..StoreTuning::default() },
    })
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
    use crate::keys;

    #[test]
    fn every_node_gets_a_configuration_that_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let size = Size { brokers: 3, gateways: 2, shards: 4 };
        let mut ports = Ports::lock();
        let mut file = create(dir.path(), size, keys::signing_key(dir.path()).unwrap(), &mut ports).unwrap();
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
}
