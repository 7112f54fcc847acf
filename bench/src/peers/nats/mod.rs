//! NATS JetStream: three servers, streams and consumers on all three (R3), driven by `async-nats`. Clients talk to the
//! server that leads their stream, so that nothing is passed on. Must never be measured with less durability than said.

mod append;
mod spread;

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use async_nats::{Client, ConnectOptions, Subject, jetstream};
use futures_util::future::LocalBoxFuture;
use tempfile::TempDir;
use tokio::time::sleep;

use super::{
    Load, Peer, PeerError,
    server::{Server, folder, free_ports, installed, write},
};
use crate::{Outcome, Timing};

/// What `scripts/peers.sh` unpacks.
pub const VERSION: &str = "2.15.1";
const SERVERS: usize = 3;
/// JetStream has a leader and takes streams by then.
const READY_WITHIN: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// An answer that takes longer is an error; the clients' own default of five seconds is not enough beside a slow disk.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// When what is acknowledged is on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Before: `sync_interval: always`, as ours.
    Always,
    /// Up to two minutes later: the default.
    Default,
}

/// A cluster that runs.
#[derive(Debug)]
pub struct Nats {
    servers: Vec<Server>,
    ports: Vec<u16>,
    /// To each server one, with its contexts.
    clients: Vec<Client>,
    /// Names streams of one run apart from those of another.
    runs: usize,
    /// Gone after the servers.
    _folder: TempDir,
}

/// A stream of a run and which server leads it.
#[derive(Debug, Clone)]
struct Led {
    name: String,
    subject: Subject,
    server: usize,
}

fn binary() -> Result<PathBuf, PeerError> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let cached = cache.map(|dir| dir.join(format!("stentor/peers/nats-server-{VERSION}")));
    cached
        .filter(|file| file.is_file())
        .or_else(|| installed("nats-server"))
        .ok_or_else(|| PeerError::Missing("nats-server is not installed".into()))
}

impl Nats {
    /// Starts three servers and waits until JetStream takes streams.
    pub async fn start(durability: Durability) -> Result<Self, PeerError> {
        let (binary, dir) = (binary()?, folder()?);
        let ports: [u16; 2 * SERVERS] = free_ports()?;
        let (clients, routes) = ports.split_at(SERVERS);
        let all_routes: Vec<_> = routes.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect();
        let interval = match durability {
            Durability::Always => "sync_interval: always",
            Durability::Default => "",
        };
        let mut servers = Vec::new();
        for (n, (port, route)) in clients.iter().zip(routes).enumerate() {
            let config = dir.path().join(format!("n{n}.conf"));
            let store = dir.path().join(format!("n{n}"));
            write(
                &config,
                &format!(
                    "server_name: n{n}\nlisten: 127.0.0.1:{port}\n\
                     jetstream {{ store_dir: \"{}\"\n {interval} }}\n\
                     cluster {{ name: peers, listen: 127.0.0.1:{route}, routes: [{}] }}\n",
                    store.display(),
                    all_routes.join(", ")
                ),
            )?;
            let mut command = Command::new(&binary);
            command.arg("-c").arg(&config);
            servers.push(Server::start(&format!("nats-{n}"), command, dir.path())?);
        }
        for (server, port) in servers.iter_mut().zip(clients) {
            server.listens(*port).await?;
        }
        let mut nats = Self { servers, ports: clients.to_vec(), clients: Vec::new(), runs: 0, _folder: dir };
        for server in 0..SERVERS {
            nats.clients.push(nats.connect(server).await?);
        }
        nats.takes_streams().await?;
        Ok(nats)
    }

    /// One more connection.
    async fn connect(&self, server: usize) -> Result<Client, PeerError> {
        let options = ConnectOptions::new()
            // Else it would go over to another server when this one is busy.
            .ignore_discovered_servers()
            .connection_timeout(ANSWER_WITHIN)
            .request_timeout(Some(ANSWER_WITHIN));
        let address = format!("127.0.0.1:{}", self.ports[server]);
        options.connect(address).await.map_err(|error| PeerError::failed("connect to NATS", error))
    }

    async fn takes_streams(&mut self) -> Result<(), PeerError> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let error = match self.streams("ready", 1).await {
                Ok(_) => break,
                Err(error) => error,
            };
            self.servers.iter_mut().try_for_each(Server::lives)?;
            if Instant::now() > deadline {
                return Err(error);
            }
            sleep(LOOK_EVERY).await;
        }
        self.remove("ready", 1).await
    }

    fn context(&self, server: usize) -> jetstream::Context {
        jetstream::context::ContextBuilder::new()
            .timeout(ANSWER_WITHIN)
            // Our own windows are smaller.
            .max_ack_inflight(1 << 20)
            .build(self.clients[server].clone())
    }

    /// Makes streams `NAME-0`… of files on all three servers.
    async fn streams(&self, name: &str, count: usize) -> Result<Vec<Led>, PeerError> {
        let mut made = Vec::new();
        for n in 0..count {
            let name = format!("{name}-{n}");
            let config = jetstream::stream::Config {
                name: name.clone(),
                subjects: vec![format!("{name}.>")],
                storage: jetstream::stream::StorageType::File,
                num_replicas: SERVERS,
                ..Default::default()
            };
            let failed = |error| PeerError::failed(format!("make the stream {name}"), error);
            self.context(n % SERVERS).create_stream(config).await.map_err(failed)?;
            made.push(self.led(&name).await?);
        }
        Ok(made)
    }

    async fn led(&self, name: &str) -> Result<Led, PeerError> {
        let deadline = Instant::now() + READY_WITHIN;
        while Instant::now() < deadline {
            let stream = self.context(0).get_stream(name).await;
            let leader = stream.ok().and_then(|stream| stream.cached_info().cluster.clone()?.leader);
            let server = leader.and_then(|leader| leader.strip_prefix('n')?.parse().ok());
            if let Some(server) = server.filter(|server| *server < SERVERS) {
                return Ok(Led { name: name.to_owned(), subject: format!("{name}.m").into(), server });
            }
            sleep(LOOK_EVERY).await;
        }
        Err(PeerError::failed(format!("find who leads {name}"), "nobody"))
    }

    /// Messages of a stream.
    async fn messages(&self, name: &str) -> Result<u64, PeerError> {
        let failed = |error: String| PeerError::failed(format!("look at the stream {name}"), error);
        let mut stream = self.context(0).get_stream(name).await.map_err(|e| failed(e.to_string()))?;
        Ok(stream.info().await.map_err(|e| failed(e.to_string()))?.state.messages)
    }

    async fn remove(&self, name: &str, count: usize) -> Result<(), PeerError> {
        for n in 0..count {
            let failed = |error| PeerError::failed(format!("remove the stream {name}-{n}"), error);
            self.context(0).delete_stream(format!("{name}-{n}")).await.map_err(failed)?;
        }
        Ok(())
    }

    async fn put_under(&mut self, load: &Load, timing: Timing) -> Result<Outcome, PeerError> {
        self.runs += 1;
        let run = format!("run-{}", self.runs);
        match *load {
            Load::Append { conversations, window } => self.append(&run, conversations, window, timing).await,
            Load::Cursors { devices, window } => self.cursors(&run, devices, window, timing).await,
            Load::Fanout { devices, rate_per_s } => self.ordered(&run, devices, rate_per_s, timing).await,
            Load::Broadcast { devices, rate_per_s } => self.core(&run, devices, rate_per_s, timing).await,
            _ => Err(PeerError::unable("NATS", load)),
        }
    }
}

impl Peer for Nats {
    fn run<'a>(&'a mut self, load: &'a Load, timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>> {
        Box::pin(self.put_under(load, timing))
    }
}
