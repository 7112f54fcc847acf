//! RabbitMQ: three servers, quorum queues on all three, publisher confirms, driven by `lapin`. Must never join an
//! Erlang network that is there already: names are kept by a port mapper of its own.

use std::{os::unix::fs::PermissionsExt, path::PathBuf, process::Command, sync::Arc};

use futures_util::{FutureExt, TryFutureExt, future::LocalBoxFuture, future::join_all};
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use tempfile::TempDir;

use super::{
    Gauge, Load, MESSAGE_BYTES, Peer, PeerError, lane,
    server::{Server, folder, free_ports, need, write},
};
use crate::{BenchError, Outcome, Timing, meter::Meters, scenario::Stop};

const SERVERS: usize = 3;
/// Queues of a run at most: more conversations than that share them.
const MOST_QUEUES: usize = 64;
/// A kind of delivery mode: to be kept over a restart.
const PERSISTENT: u8 = 2;
/// Where Debian puts it; its own scripts there would become another user.
const HOME: &str = "/usr/lib/rabbitmq/lib";

/// A cluster that runs.
#[derive(Debug)]
pub struct Rabbit {
    servers: Vec<Server>,
    _mapper: Server,
    connections: Vec<Connection>,
    runs: usize,
    _folder: TempDir,
}

fn program() -> Result<PathBuf, PeerError> {
    let versions = std::fs::read_dir(HOME).into_iter().flatten().flatten();
    let mut programs: Vec<_> = versions.map(|version| version.path().join("sbin/rabbitmq-server")).collect();
    programs.retain(|program| program.is_file());
    programs.sort();
    programs.pop().ok_or_else(|| PeerError::Missing("rabbitmq-server is not installed".into()))
}

fn failed(what: &str) -> impl Fn(lapin::Error) -> PeerError + '_ {
    move |error| PeerError::failed(what, error)
}

impl Rabbit {
    /// Starts three servers, which find each other by their configuration.
    pub async fn start() -> Result<Self, PeerError> {
        let (program, mapper, dir) = (program()?, need("epmd")?, folder()?);
        let ports: [u16; 2 * SERVERS + 1] = free_ports()?;
        let (names_at, (clients, between)) = (ports[0], ports[1..].split_at(SERVERS));
        let cookie = dir.path().join(".erlang.cookie");
        write(&cookie, "stentorbenchpeers")?;
        let only_ours = std::fs::set_permissions(&cookie, std::fs::Permissions::from_mode(0o400));
        only_ours.map_err(|error| PeerError::failed("keep the cookie to ourselves", error))?;
        write(&dir.path().join("plugins"), "[].")?;
        let mut command = Command::new(mapper);
        command.args(["-port", &names_at.to_string(), "-address", "127.0.0.1"]);
        let mut mapper = Server::start("epmd", command, dir.path())?;
        mapper.listens(names_at).await?;
        let mut servers = Vec::new();
        for (n, (port, between)) in clients.iter().zip(between).enumerate() {
            let config = dir.path().join(format!("rabbit-{n}.conf"));
            write(&config, &configuration(*port, *between))?;
            let own = dir.path().join(format!("rabbit-{n}"));
            let mut command = Command::new(&program);
            command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", dir.path());
            command.env("ERL_EPMD_PORT", names_at.to_string()).env("ERL_EPMD_ADDRESS", "127.0.0.1");
            command.env("RABBITMQ_NODENAME", format!("rabbit-{n}@localhost"));
            command.env("RABBITMQ_CONFIG_FILE", &config).env("RABBITMQ_MNESIA_BASE", &own);
            command.env("RABBITMQ_LOG_BASE", &own).env("RABBITMQ_PID_FILE", own.with_extension("pid"));
            command.env("RABBITMQ_ENABLED_PLUGINS_FILE", dir.path().join("plugins"));
            command.env("RABBITMQ_CONF_ENV_FILE", dir.path().join("none"));
            // Then its script becomes the server instead of watching over it.
            command.env("RUNNING_UNDER_SYSTEMD", "1");
            servers.push(Server::start(&format!("rabbit-{n}"), command, dir.path())?);
        }
        let mut connections = Vec::new();
        for (server, port) in servers.iter_mut().zip(clients) {
            server.listens(*port).await?;
            let address = format!("amqp://guest:guest@127.0.0.1:{port}/%2f?heartbeat=60");
            let connected = Connection::connect(&address, ConnectionProperties::default()).await;
            connections.push(connected.map_err(failed("connect to RabbitMQ"))?);
        }
        Ok(Self { servers, _mapper: mapper, connections, runs: 0, _folder: dir })
    }

    async fn channel(&self, number: usize) -> Result<Channel, PeerError> {
        let channel = self.connections[number % SERVERS].create_channel().await.map_err(failed("open a channel"))?;
        let confirmed = channel.confirm_select(ConfirmSelectOptions::default()).await;
        confirmed.map_err(failed("ask for confirms"))?;
        Ok(channel)
    }

    /// A queue is led by the server that it was made at, and its sender is connected there.
    async fn append(
        &self,
        run: &str,
        conversations: usize,
        window: usize,
        timing: Timing,
    ) -> Result<Outcome, PeerError> {
        let queues = conversations.min(MOST_QUEUES);
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        arguments.insert("x-quorum-initial-group-size".into(), AMQPValue::LongInt(SERVERS as i32));
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        let mut channels = Vec::new();
        for n in 0..queues {
            let channel = self.channel(n).await?;
            let name = format!("{run}-{n}");
            let made = channel.queue_declare(name.into(), QueueDeclareOptions::durable(), arguments.clone()).await;
            made.map_err(failed("make a quorum queue"))?;
            channels.push(channel);
        }
        let lanes = channels.iter().enumerate().map(|(n, channel)| {
            let (channel, name) = (channel.clone(), format!("{run}-{n}"));
            let window = window / queues + usize::from(n < window % queues);
            let send = move || {
                let (channel, name) = (channel.clone(), name.clone());
                async move {
                    let kept = BasicProperties::default().with_delivery_mode(PERSISTENT);
                    let (options, body) = (BasicPublishOptions::default(), [0x2a; MESSAGE_BYTES]);
                    let sent = channel.basic_publish("".into(), name.into(), options, &body, kept).await?;
                    let answer = sent.map_err(|error| error.to_string()).and_then(async |confirmation| {
                        if confirmation.is_ack() { Ok(()) } else { Err("not taken".to_owned()) }
                    });
                    Ok::<lane::Answer, lapin::Error>(answer.boxed())
                }
            };
            tokio::spawn(lane::run(n, window.max(1), send, Arc::clone(&meters), stop.clone()))
        });
        let lanes: Vec<_> = lanes.collect();
        let outcome = Gauge::of(&self.servers).measure(timing, &meters).await;
        stop.now();
        let acknowledged: u64 = join_all(lanes).await.into_iter().flatten().sum();
        let mut there = 0;
        for (n, channel) in channels.iter().enumerate() {
            // Says how many messages it took along.
            let removed = channel.queue_delete(format!("{run}-{n}").into(), QueueDeleteOptions::default()).await;
            there += u64::from(removed.map_err(failed("remove a queue"))?);
        }
        if there < acknowledged {
            let wrong = format!("RabbitMQ had {there} messages, {acknowledged} were acknowledged");
            return Err(BenchError::Wrong(wrong).into());
        }
        outcome
    }

    async fn put_under(&mut self, load: &Load, timing: Timing) -> Result<Outcome, PeerError> {
        self.servers.iter_mut().try_for_each(Server::lives)?;
        self.runs += 1;
        match *load {
            Load::Append { conversations, window } => {
                self.append(&format!("run-{}", self.runs), conversations, window, timing).await
            }
            _ => Err(PeerError::unable("RabbitMQ", load)),
        }
    }
}

fn configuration(port: u16, between: u16) -> String {
    let nodes =
        (0..SERVERS).map(|n| format!("cluster_formation.classic_config.nodes.{} = rabbit-{n}@localhost\n", n + 1));
    format!(
        "listeners.tcp.1 = 127.0.0.1:{port}\n\
         distribution.listener.interface = 127.0.0.1\n\
         distribution.listener.port_range.min = {between}\n\
         distribution.listener.port_range.max = {between}\n\
         cluster_formation.peer_discovery_backend = classic_config\n{}\
         log.console = true\nlog.console.level = warning\nlog.file = false\n",
        nodes.collect::<String>()
    )
}

impl Peer for Rabbit {
    fn run<'a>(&'a mut self, load: &'a Load, timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>> {
        Box::pin(self.put_under(load, timing))
    }
}
