//! A cluster of real processes, and what can be seen of them from outside: metrics, memory. Must never leave a process
//! behind, also when a test fails.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use stentor_client::{Builder, Client, ClientTls};
use stentor_proto::ids::{AppId, DeviceId, UserId};
use stentor_transport::token::{self, Claims};
use tempfile::TempDir;

use super::{DEADLINE, Ended, run};

/// The app of a development cluster.
pub(crate) const APP: &str = "demo";

/// Running processes; killed when dropped.
pub(crate) struct Processes {
    pub(crate) dir: PathBuf,
    /// Gone after the processes.
    _folder: TempDir,
    pub(crate) tls: ClientTls,
    signing_key: String,
}

impl Processes {
    /// Three brokers and some gateways, ready.
    pub(crate) fn up(gateways: u32, shards: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::up_in(folder.path().to_owned(), folder, gateways, shards)
    }

    /// The same in a directory of a folder.
    pub(crate) fn up_in(dir: PathBuf, folder: TempDir, gateways: u32, shards: u32) -> Self {
        let (gateways, shards) = (gateways.to_string(), shards.to_string());
        let size = ["cluster", "up", "--brokers", "3", "--gateways", &gateways, "--shards", &shards];
        let mut args = size.to_vec();
        args.extend(["--dir", dir.to_str().unwrap()]);
        // Made before it starts, so that a start that fails is cleared away too.
        let started = run(&args, b"");
        let file = cluster_json(&dir);
        let tls = ClientTls::public(file["ca"].as_str().unwrap().as_ref()).unwrap();
        let signing_key = fs::read_to_string(file["signing_key"]["private_key"].as_str().unwrap()).unwrap();
        let processes = Self { dir, _folder: folder, tls, signing_key };
        started.well();
        processes
    }

    /// Runs a command against it.
    pub(crate) fn run(&self, args: &[&str], stdin: &[u8]) -> Ended {
        let mut all = args.to_vec();
        all.extend(["--dir", self.dir.to_str().unwrap()]);
        run(&all, stdin)
    }

    /// A node's configuration.
    pub(crate) fn config(&self, node: &str) -> PathBuf {
        self.dir.join("config").join(format!("{node}.toml"))
    }

    /// All nodes, as `cluster status` tells them.
    pub(crate) fn nodes(&self) -> Vec<Value> {
        let status = self.run(&["cluster", "status", "--json"], b"").well().rows().remove(0);
        status["nodes"].as_array().unwrap().clone()
    }

    fn node(&self, name: &str) -> Value {
        let file = cluster_json(&self.dir);
        let node = file["nodes"].as_array().unwrap().iter().find(|node| node["name"] == name);
        node.unwrap_or_else(|| panic!("no {name} in {file}")).clone()
    }

    /// Where a gateway takes devices.
    pub(crate) fn quic(&self, gateway: &str) -> SocketAddr {
        self.node(gateway)["quic"].as_str().unwrap().parse().unwrap()
    }

    /// The process of a node.
    pub(crate) fn pid(&self, node: &str) -> u32 {
        self.node(node)["pid"].as_u64().unwrap() as u32
    }

    /// A token for a user's device.
    pub(crate) fn token(&self, user: &str, device: &str) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let claims = Claims {
            app: AppId::new(APP).unwrap(),
            user: UserId::new(user).unwrap(),
            device: Some(DeviceId::new(device).unwrap()),
            admin: false,
            expires_s: (now + Duration::from_secs(86_400)).as_secs(),
        };
        token::mint(&self.signing_key, "dev", &claims).unwrap()
    }

    /// The SDK as a user's device, at the first gateway.
    pub(crate) fn client(&self, user: &str, device: &str) -> Builder {
        let token = self.token(user, device);
        let builder = Client::builder().gateway(self.quic("gateway-1")).tls(self.tls.clone()).token(token);
        builder.connect_timeout(DEADLINE).request_timeout(DEADLINE)
    }

    /// All metrics of a node: its lines by name and labels.
    pub(crate) fn metrics(&self, node: &str) -> BTreeMap<String, f64> {
        let http: SocketAddr = self.node(node)["http"].as_str().unwrap().parse().unwrap();
        let mut stream = TcpStream::connect(http).unwrap();
        write!(stream, "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let line =
            |line: &str| line.rsplit_once(' ').and_then(|(name, value)| Some((name.into(), value.parse().ok()?)));
        text.lines().filter(|line| line.starts_with("stentor_")).filter_map(line).collect()
    }

    /// Frames that a gateway got from devices, by kind.
    pub(crate) fn device_frames(&self, gateway: &str) -> BTreeMap<String, u64> {
        let kind = |(name, count): (String, f64)| {
            let kind = name.strip_prefix("stentor_gateway_device_frames_total{kind=\"")?.strip_suffix("\"}")?;
            Some((kind.to_owned(), count as u64))
        };
        self.metrics(gateway).into_iter().filter_map(kind).collect()
    }

    /// Waits until a node's metric is as wanted.
    pub(crate) async fn until(&self, node: &str, metric: &str, wanted: impl Fn(f64) -> bool) {
        let deadline = Instant::now() + 5 * DEADLINE;
        loop {
            let value = self.metrics(node).get(metric).copied();
            if value.is_some_and(&wanted) {
                return;
            }
            assert!(Instant::now() < deadline, "{node}: {metric} stays at {value:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        let nodes = cluster_json(&self.dir)["nodes"].as_array().cloned().unwrap_or_default();
        for name in nodes.iter().filter_map(|node| node["name"].as_str()) {
            // Waits for its end: a folder cannot be removed under a process that writes.
            self.run(&["cluster", "kill", name], b"");
        }
    }
}

fn cluster_json(dir: &Path) -> Value {
    let text = fs::read_to_string(dir.join("cluster.json")).unwrap_or_else(|_| "{}".into());
    serde_json::from_str(&text).unwrap()
}

/// Memory of a process, in bytes, as its kernel has it in `/proc/<pid>/status`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    /// All that is resident.
    pub(crate) resident: u64,
    /// The part that is not of files: heap and stacks.
    pub(crate) anonymous: u64,
}

impl Memory {
    /// Of a process that runs.
    pub(crate) fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let kib = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
        };
        Self { resident: kib("VmRSS:"), anonymous: kib("RssAnon:") }
    }
}

/// CPU time that a process has used so far.
pub(crate) fn cpu(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name may have spaces; fields are counted from behind it.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // USER_HZ is 100 on every Linux that we know.
    Duration::from_millis(ticks * 10)
}
