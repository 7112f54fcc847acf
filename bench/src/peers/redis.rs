//! Redis, one server: streams with `appendfsync always`, and publish/subscribe. It does not replicate before it
//! acknowledges, so it is no equal of ours; it is here because people compare. Must never say that it does.

use std::{process::Command, sync::Arc, time::Instant};

use futures_util::{StreamExt, TryStreamExt, future::LocalBoxFuture, future::join_all, stream};
use redis::{AsyncCommands, aio::MultiplexedConnection};
use tempfile::TempDir;

use super::{
    Gauge, Load, MESSAGE_BYTES, Peer, PeerError, idle, lane,
    server::{Server, folder, free_ports, need},
    spread::Spread,
};
use crate::{BenchError, Outcome, Timing, meter::Meters, pace::Schedule, scenario::Stop};

/// Connections that share the sends: one alone would be the limit.
const CONNECTIONS: usize = 4;
const CONNECTING: usize = 16;
/// Deliveries that a device takes at once, as long as they are there.
const AT_ONCE: usize = 64;

/// A server that runs.
#[derive(Debug)]
pub struct Redis {
    servers: [Server; 1],
    client: redis::Client,
    runs: usize,
    _folder: TempDir,
}

fn failed(what: &str) -> impl Fn(redis::RedisError) -> PeerError + '_ {
    move |error| PeerError::failed(what, error)
}

impl Redis {
    /// Starts one server that syncs its append-only file before it answers.
    pub async fn start() -> Result<Self, PeerError> {
        let (binary, dir, [port]) = (need("redis-server")?, folder()?, free_ports()?);
        let mut command = Command::new(binary);
        let port_text = port.to_string();
        command.current_dir(dir.path()).args(["--port", &port_text, "--bind", "127.0.0.1", "--daemonize", "no"]);
        // Without snapshots, which would write everything a second time.
        command.args(["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--maxclients", "10000"]);
        let mut server = Server::start("redis", command, dir.path())?;
        server.listens(port).await?;
        let client = redis::Client::open(format!("redis://127.0.0.1:{port}/")).map_err(failed("address Redis"))?;
        Ok(Self { servers: [server], client, runs: 0, _folder: dir })
    }

    async fn connect(&self) -> Result<MultiplexedConnection, PeerError> {
        // Answers wait for a disk that can be slow: no time limit on them.
        let config = redis::AsyncConnectionConfig::new().set_response_timeout(None);
        let connected = self.client.get_multiplexed_async_connection_with_config(&config).await;
        connected.map_err(failed("connect to Redis"))
    }

    /// One task for each message under way: a command of this client is sent when its future is first polled.
    async fn append(
        &self,
        run: &str,
        conversations: usize,
        window: usize,
        timing: Timing,
    ) -> Result<Outcome, PeerError> {
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        let connections: Vec<_> =
            stream::iter(0..CONNECTIONS.min(window)).then(|_| self.connect()).try_collect().await?;
        let tasks = (0..window).map(|number| {
            let connection = connections[number % connections.len()].clone();
            let keys: Vec<String> = (number % conversations..conversations)
                .step_by(window)
                .map(|conversation| format!("{run}-{conversation}"))
                .collect();
            let mut sent = 0;
            let send = move || {
                let mut connection = connection.clone();
                let key = keys[sent % keys.len()].clone();
                sent += 1;
                let answer: lane::Answer = Box::pin(async move {
                    let added = connection.xadd(key, "*", &[("m", &[0x2a_u8; MESSAGE_BYTES][..])]).await;
                    added.map(|_: String| ()).map_err(|error: redis::RedisError| error.to_string())
                });
                std::future::ready(Ok::<_, String>(answer))
            };
            tokio::spawn(lane::run(number, 1, send, Arc::clone(&meters), stop.clone()))
        });
        let tasks: Vec<_> = tasks.collect();
        let outcome = Gauge::of(&self.servers).measure(timing, &meters).await;
        stop.now();
        let acknowledged: u64 = join_all(tasks).await.into_iter().flatten().sum();
        let mut connection = self.connect().await?;
        let mut there = 0;
        for conversation in 0..conversations {
            let key = format!("{run}-{conversation}");
            there += connection.xlen::<_, u64>(&key).await.map_err(failed("count a stream"))?;
            connection.del::<_, u64>(&key).await.map_err(failed("remove a stream"))?;
        }
        if there < acknowledged {
            let wrong = format!("Redis has {there} messages, {acknowledged} were acknowledged");
            return Err(BenchError::Wrong(wrong).into());
        }
        outcome
    }

    async fn publish(&self, run: &str, devices: usize, rate: f64, timing: Timing) -> Result<Outcome, PeerError> {
        let spread = Spread::new(devices, None);
        let connected = stream::iter(0..devices).map(|n| {
            let spread = spread.clone();
            async move {
                let mut device = self.client.get_async_pubsub().await.map_err(failed("connect to Redis"))?;
                device.subscribe(run).await.map_err(failed("subscribe"))?;
                let messages = device.into_on_message().ready_chunks(AT_ONCE);
                Ok::<_, PeerError>(tokio::spawn(async move {
                    let (mut messages, mut noted) = (messages, Vec::new());
                    while let Some(came) = messages.next().await {
                        spread.came(n, came.iter().map(redis::Msg::get_payload_bytes), &mut noted);
                    }
                }))
            }
        });
        let tasks: Vec<_> = connected.buffer_unordered(CONNECTING).try_collect().await?;
        let (mut connection, stop) = (self.connect().await?, Stop::default());
        let (sending, stopped, channel) = (spread.clone(), stop.clone(), run.to_owned());
        let sender = tokio::spawn(async move {
            let mut schedule = Schedule::new(Instant::now(), rate, 0, 1);
            while !stopped.is_set() {
                let body = sending.next(Some(&mut schedule)).await;
                if let Err(error) = connection.publish::<_, _, u64>(&channel, body.as_ref()).await {
                    sending.failed(&error);
                }
            }
        });
        let outcome = Gauge::of(&self.servers).measure(timing, &spread.meters).await;
        stop.now();
        sender.await.map_err(|error| PeerError::failed("publish", error))?;
        let arrived = spread.arrived().await;
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
        arrived.and(outcome)
    }

    async fn put_under(&mut self, load: &Load, timing: Timing) -> Result<Outcome, PeerError> {
        self.runs += 1;
        let run = format!("run-{}", self.runs);
        match *load {
            Load::Append { conversations, window } => self.append(&run, conversations, window, timing).await,
            Load::Broadcast { devices, rate_per_s } => self.publish(&run, devices, rate_per_s, timing).await,
            Load::Idle { connections } => {
                let connect = |_| async { self.client.get_async_pubsub().await.map_err(failed("connect to Redis")) };
                idle::hold(&self.servers, connections, timing, connect).await
            }
            _ => Err(PeerError::unable("Redis", load)),
        }
    }
}

impl Peer for Redis {
    fn run<'a>(&'a mut self, load: &'a Load, timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>> {
        Box::pin(self.put_under(load, timing))
    }
}
