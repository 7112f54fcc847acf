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

/// How the processes of a cluster call themselves.
const PROGRAM: &[u8] = b"stentor";

/// What is read of `cluster.json`.
#[derive(Debug, Deserialize)]
struct ClusterFile {
    #[serde(default)]
    cluster_id: String,
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

impl Node {
    /// Forgets a process that is another one here: the folder may be a copy of another machine's.
    fn on_this_machine(self) -> Self {
        let is_ours = |pid: &u32| fs::read(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with(PROGRAM));
        Self { pid: self.pid.filter(is_ours), ..self }
    }
}

/// A cluster that runs, with the key that makes users.
#[derive(Debug, Clone)]
pub struct Target {
    cluster_id: String,
    nodes: Vec<Node>,
    app: AppId,
    ca: PathBuf,
    tls: ClientTls,
    kid: String,
    private_key_pem: String,
    /// Names users and conversations of this run, which must not meet those of another.
    run: String,
    /// Of this worker among those of the run.
    place: usize,
}

impl Target {
    /// The cluster of a folder (`cluster.json`).
    pub fn read(dir: &Path) -> Result<Self, BenchError> {
        let path = dir.join("cluster.json");
        let text = fs::read(&path).map_err(BenchError::io(format!("read {}", path.display())))?;
        let file: ClusterFile = serde_json::from_slice(&text)
            .map_err(|error| BenchError::Cluster(format!("{} is damaged: {error}", path.display())))?;
        let key = in_folder(dir, "keys", file.signing_key.private_key);
        let private_key_pem = fs::read_to_string(&key).map_err(BenchError::io(format!("read {}", key.display())))?;
        let ca = in_folder(dir, "pki", file.ca);
        let tls = ClientTls::public(&ca).map_err(BenchError::cluster)?;
        Ok(Self {
            cluster_id: file.cluster_id,
            nodes: file.nodes.into_iter().map(Node::on_this_machine).collect(),
            app: AppId::new(&file.app).map_err(BenchError::cluster)?,
            ca,
            tls,
            kid: file.signing_key.kid,
            private_key_pem,
            run: format!("{:08x}", rand::random::<u32>()),
            place: 0,
        })
    }

    /// The same cluster for a worker of a run, whose users and conversations are named by this. Its first device is at
    /// another gateway than those of its neighbours.
    pub(crate) fn for_run(self, run: &str, place: usize) -> Self {
        Self { run: run.to_owned(), place, ..self }
    }

    /// What users and conversations of this run are named by.
    pub(crate) fn run(&self) -> &str {
        &self.run
    }

    /// The number that the cluster's data carry.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// The file of the cluster's authority.
    pub fn ca(&self) -> &Path {
        &self.ca
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
        self.in_turn(|node| node.quic)
    }

    /// Where callers of the gRPC API connect.
    pub fn apis(&self) -> Vec<SocketAddr> {
        self.in_turn(|node| node.api)
    }

    fn in_turn(&self, of: fn(&Node) -> Option<SocketAddr>) -> Vec<SocketAddr> {
        let mut all: Vec<_> = self.nodes.iter().filter_map(of).collect();
        let first = self.place.checked_rem(all.len()).unwrap_or(0);
        all.rotate_left(first);
        all
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

/// A file of the cluster: where it says, or where it lies in a folder that was copied to another machine.
fn in_folder(dir: &Path, part: &str, path: PathBuf) -> PathBuf {
    let copied = path.file_name().map(|name| dir.join(part).join(name));
    copied.filter(|copied| !path.exists() && copied.exists()).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_take_turns_at_the_gateways_and_other_processes_are_not_measured() {
        let dir = crate::workers::cluster_folder("c");
        let path = dir.path().join("cluster.json");
        let mut file: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        // The first process of any machine is no node.
        let node = |port: u16| serde_json::json!({ "name": "g", "role": "gateway", "pid": 1, "quic": format!("127.0.0.1:{port}") });
        file["nodes"] = serde_json::json!([node(1), node(2), node(3)]);
        fs::write(&path, file.to_string()).unwrap();
        let target = Target::read(dir.path()).unwrap();
        assert!(target.nodes().iter().all(|node| node.pid.is_none()));
        let ports = |place| target.clone().for_run("r", place).gateways().iter().map(|g| g.port()).collect::<Vec<_>>();
        assert_eq!((ports(0), ports(4)), (vec![1, 2, 3], vec![2, 3, 1]));
    }

    #[test]
    fn a_folder_that_was_copied_has_its_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let there = dir.path().join("pki").join("ca.pem");
        fs::create_dir_all(dir.path().join("pki")).unwrap();
        fs::write(&there, "").unwrap();
        assert_eq!(in_folder(dir.path(), "pki", "/no/such/pki/ca.pem".into()), there);
        assert_eq!(in_folder(dir.path(), "keys", "/no/such/key.pem".into()), Path::new("/no/such/key.pem"));
        assert_eq!(in_folder(Path::new("/nowhere"), "pki", there.clone()), there);
    }

    #[test]
    fn a_folder_without_a_cluster_is_told() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Target::read(dir.path()), Err(BenchError::Io { .. })));
        fs::write(dir.path().join("cluster.json"), "{").unwrap();
        assert!(matches!(Target::read(dir.path()), Err(BenchError::Cluster(_))));
    }
}
