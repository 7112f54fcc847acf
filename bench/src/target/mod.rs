//! The cluster under load: where it listens, who may use it, which processes it is. Must never change anything of it but
//! through what every caller may do.

mod local;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Deserialize;
use stentor_client::{AppId, Builder, Client, ClientTls, DeviceId, UserId};
use stentor_transport::token::{self, Claims};

pub use local::{Local, Size};

use crate::BenchError;

/// How long tokens are good for: longer than any run.
const TOKEN_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3_600);
/// How long one device tries to connect: thousands do at once on few cores.
const CONNECT_WITHIN: Duration = Duration::from_secs(120);

/// What is read of `cluster.json`.
#[derive(Debug, Deserialize)]
struct ClusterFile {
    nodes: Vec<Node>,
    ca: PathBuf,
    app: String,
    signing_key: SigningKey,
}

#[derive(Debug, Deserialize)]
struct SigningKey {
    kid: String,
    private_key: PathBuf,
}

/// One process of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Node {
    /// `broker-1`, `gateway-1`…
    pub name: String,
    /// `broker` or `gateway`.
    pub role: String,
    /// `None` when it is stopped.
    pub pid: Option<u32>,
    /// The public gRPC API.
    pub api: Option<SocketAddr>,
    /// Where devices connect.
    pub quic: Option<SocketAddr>,
    /// Probes and metrics.
    pub http: Option<SocketAddr>,
    /// A broker's data.
    pub data_dir: Option<PathBuf>,
}

/// A cluster that runs, with the key that makes users.
#[derive(Debug, Clone)]
pub struct Target {
    nodes: Vec<Node>,
    app: AppId,
    ca: PathBuf,
    tls: ClientTls,
    kid: String,
    private_key_pem: String,
    /// Names users and conversations of this run, which must not meet those of another.
    run: String,
}

impl Target {
    /// The cluster of a folder (`cluster.json`).
    pub fn read(dir: &Path) -> Result<Self, BenchError> {
        let path = dir.join("cluster.json");
        let text = fs::read(&path).map_err(BenchError::io(format!("read {}", path.display())))?;
        let file: ClusterFile = serde_json::from_slice(&text)
            .map_err(|error| BenchError::Cluster(format!("{} is damaged: {error}", path.display())))?;
        let key = &file.signing_key.private_key;
        let private_key_pem = fs::read_to_string(key).map_err(BenchError::io(format!("read {}", key.display())))?;
        let tls = ClientTls::public(&file.ca).map_err(BenchError::cluster)?;
        Ok(Self {
            nodes: file.nodes,
            app: AppId::new(&file.app).map_err(BenchError::cluster)?,
            ca: file.ca,
            tls,
            kid: file.signing_key.kid,
            private_key_pem,
            run: format!("{:08x}", rand::random::<u32>()),
        })
    }

    /// All processes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// How many brokers and gateways.
    pub fn size(&self) -> (usize, usize) {
        let count = |role: &str| self.nodes.iter().filter(|node| node.role == role).count();
        (count("broker"), count("gateway"))
    }

    /// Where devices connect.
    pub fn gateways(&self) -> Vec<SocketAddr> {
        self.nodes.iter().filter_map(|node| node.quic).collect()
    }

    /// Where callers of the gRPC API connect.
    pub fn apis(&self) -> Vec<SocketAddr> {
        self.nodes.iter().filter_map(|node| node.api).collect()
    }

    /// Trust in the cluster's authority; connections that share it resume each other's TLS sessions.
    pub fn tls(&self) -> &ClientTls {
        &self.tls
    }

    /// The same without any memory of earlier connections, so that the next handshake is a whole one.
    pub fn fresh_tls(&self) -> Result<ClientTls, BenchError> {
        ClientTls::public(&self.ca).map_err(BenchError::cluster)
    }

    /// The app of all users.
    pub fn app(&self) -> &AppId {
        &self.app
    }

    /// A name that no other run has.
    pub fn named(&self, what: &str, number: usize) -> String {
        format!("{what}-{}-{number}", self.run)
    }

    /// A user of this run.
    pub fn user(&self, what: &str, number: usize) -> Result<UserId, BenchError> {
        UserId::new(self.named(what, number)).map_err(BenchError::cluster)
    }

    /// A token for a user's device.
    pub fn token(&self, user: &UserId, device: &str) -> Result<String, BenchError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let claims = Claims {
            app: self.app.clone(),
            user: user.clone(),
            device: Some(DeviceId::new(device).map_err(BenchError::cluster)?),
            admin: false,
            expires_s: (now + TOKEN_LIFETIME).as_secs(),
        };
        token::mint(&self.private_key_pem, &self.kid, &claims).map_err(BenchError::cluster)
    }

    /// A device of a user; `number` chooses the gateway, in turn.
    pub fn device(&self, user: &UserId, device: &str, number: usize) -> Result<Builder, BenchError> {
        Ok(self.builder(number)?.tls(self.tls.clone()).token(self.token(user, device)?))
    }

    /// The same without token and trust.
    pub fn builder(&self, number: usize) -> Result<Builder, BenchError> {
        let gateways = self.gateways();
        let gateway = gateways.get(number % gateways.len().max(1));
        let gateway = gateway.ok_or_else(|| BenchError::Cluster("the cluster has no gateway".into()))?;
        Ok(Client::builder().gateway(gateway).connect_timeout(CONNECT_WITHIN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_cluster_is_told() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Target::read(dir.path()), Err(BenchError::Io { .. })));
        fs::write(dir.path().join("cluster.json"), "{").unwrap();
        assert!(matches!(Target::read(dir.path()), Err(BenchError::Cluster(_))));
    }
}
