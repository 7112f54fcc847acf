//! mosquitto: the least that a server of small devices holds for each of them. Must never be compared by anything but
//! the memory of idle connections, in which it is the best there is.

use std::{process::Command, time::Duration};

use futures_util::future::LocalBoxFuture;
use rumqttc::{AsyncClient, Event, MqttOptions, Packet};
use tempfile::TempDir;

use super::{
    Load, Peer, PeerError, idle,
    server::{Server, folder, free_ports, need, write},
};
use crate::{Outcome, Timing};

const KEEP_ALIVE: Duration = Duration::from_secs(60);

/// A server that runs.
#[derive(Debug)]
pub struct Mosquitto {
    servers: [Server; 1],
    port: u16,
    _folder: TempDir,
}

impl Mosquitto {
    /// Starts one server.
    pub async fn start() -> Result<Self, PeerError> {
        let (binary, dir, [port]) = (need("mosquitto")?, folder()?, free_ports()?);
        let config = dir.path().join("mosquitto.conf");
        write(&config, &format!("listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nuser root\n"))?;
        let mut command = Command::new(binary);
        command.arg("-c").arg(&config);
        let mut server = Server::start("mosquitto", command, dir.path())?;
        server.listens(port).await?;
        Ok(Self { servers: [server], port, _folder: dir })
    }

    async fn connect(&self, n: usize) -> Result<Held, PeerError> {
        let mut options = MqttOptions::new(format!("device-{n}"), "127.0.0.1", self.port);
        options.set_keep_alive(KEEP_ALIVE);
        let (client, mut events) = AsyncClient::new(options, 1);
        loop {
            match events.poll().await {
                Ok(Event::Incoming(Packet::ConnAck(_))) => break,
                Ok(_) => {}
                Err(error) => return Err(PeerError::failed("connect to mosquitto", error)),
            }
        }
        let task = tokio::spawn(async move { while events.poll().await.is_ok() {} });
        Ok(Held { _client: client, task })
    }
}

/// A connection with the task that keeps it alive.
struct Held {
    _client: AsyncClient,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Peer for Mosquitto {
    fn run<'a>(&'a mut self, load: &'a Load, timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>> {
        Box::pin(async move {
            match *load {
                Load::Idle { connections } => idle::hold(&self.servers, connections, timing, |n| self.connect(n)).await,
                _ => Err(PeerError::unable("mosquitto", load)),
            }
        })
    }
}
