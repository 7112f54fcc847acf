//! The floors: a QUIC server that only answers, and RocksDB alone. Both are example programs of the crates that own
//! what they use, found beside our binary. Must never do less than the work that they are the floor of.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::{future::LocalBoxFuture, future::join_all};
use serde::Deserialize;
use stentor_client::ClientTls;
use stentor_transport::quic::{self, FrameReader, FrameWriter, QuicConnection};
use tempfile::TempDir;
use tokio::time::sleep;

use super::{
    Gauge, Load, MESSAGE_BYTES, Peer, PeerError, idle,
    server::{Server, folder},
};
use crate::{Histogram, Outcome, Timing, meter::Meters, scenario::Stop};

/// It tells its address by then.
const READY_WITHIN: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Of a frame that our own gateway would take for a ping; the bare server does not look.
const KIND: u8 = 8;
/// As many entries as the row says.
const BATCH: usize = 4_096;
/// Bytes that an answer has at least, so that a connection's buffers were used once as by a real greeting.
const GREETING_BYTES: usize = 512;

/// An example program of this workspace, built beside the binary that runs.
fn example(binary: &Path, name: &str, package: &str) -> Result<PathBuf, PeerError> {
    let examples = binary.with_file_name("examples").join(name);
    if examples.is_file() {
        return Ok(examples);
    }
    Err(PeerError::Missing(format!(
        "{name} is not built (make peers, or cargo build --profile dist -p {package} --example {name})"
    )))
}

/// A QUIC server without anything behind it.
#[derive(Debug)]
pub struct Bare {
    servers: [Server; 1],
    address: SocketAddr,
    ca: PathBuf,
    _folder: TempDir,
}

impl Bare {
    /// Starts it; `binary` is what lies beside it.
    pub async fn start(binary: &Path) -> Result<Self, PeerError> {
        let (program, dir) = (example(binary, "bare_quic", "stentor-transport")?, folder()?);
        let mut command = Command::new(program);
        command.arg(dir.path()).arg("echo");
        let mut server = Server::start("bare-quic", command, dir.path())?;
        let (log, deadline) = (dir.path().join("bare-quic.log"), Instant::now() + READY_WITHIN);
        let address = loop {
            let printed = std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(address) = printed.lines().next().and_then(|line| line.trim().parse().ok()) {
                break address;
            }
            server.lives()?;
            if Instant::now() > deadline {
                return Err(PeerError::failed("start bare-quic", "it tells no address"));
            }
            sleep(LOOK_EVERY).await;
        };
        Ok(Self { servers: [server], address, ca: dir.path().join("ca.pem"), _folder: dir })
    }

    /// Trust without any memory of earlier connections, so that each handshake is a whole one.
    fn tls(&self) -> Result<ClientTls, PeerError> {
        ClientTls::public(&self.ca).map_err(|error| PeerError::failed("read the authority of bare-quic", error))
    }

    async fn connect(&self) -> Result<Echo, PeerError> {
        let failed = |error| PeerError::failed("connect to bare-quic", error);
        let connection = quic::connect(self.address, &self.tls()?).await.map_err(failed)?;
        let (writer, reader) = connection.open().await.map_err(failed)?;
        Ok(Echo { connection, writer, reader })
    }

    async fn echo(&self, timing: Timing) -> Result<Outcome, PeerError> {
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        let mut echo = self.connect().await?;
        let (noting, stopped) = (Arc::clone(&meters), stop.clone());
        let task = tokio::spawn(async move {
            let (frame, mut noted) = (frame(MESSAGE_BYTES), Vec::new());
            while !stopped.is_set() {
                let began = Instant::now();
                echo.once(&frame).await?;
                noted.push(began.elapsed());
                noting.units.note(0, &mut noted);
            }
            echo.connection.close(0, "");
            Ok::<(), PeerError>(())
        });
        let outcome = Gauge::of(&self.servers).measure(timing, &meters).await;
        stop.now();
        task.await.map_err(|error| PeerError::failed("echo", error))??;
        outcome
    }

    /// A device that comes, says one thing, gets an answer and goes: a greeting without its token.
    async fn handshakes(&self, window: usize, timing: Timing) -> Result<Outcome, PeerError> {
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        let callers = (0..window).map(|n| {
            let (meters, stop) = (&meters, &stop);
            async move {
                let (frame, mut noted) = (frame(GREETING_BYTES), Vec::new());
                while !stop.is_set() {
                    let began = Instant::now();
                    let greeted = async {
                        let mut echo = self.connect().await?;
                        echo.once(&frame).await?;
                        Ok::<_, PeerError>(echo)
                    };
                    match greeted.await {
                        Ok(echo) => {
                            noted.push(began.elapsed());
                            meters.units.note(n, &mut noted);
                            echo.connection.close(0, "");
                        }
                        Err(error) => meters.units.fail(n, &error),
                    }
                }
            }
        });
        let gauge = Gauge::of(&self.servers);
        let measured = async {
            let outcome = gauge.measure(timing, &meters).await;
            stop.now();
            outcome
        };
        let (outcome, _) = tokio::join!(measured, join_all(callers));
        outcome
    }
}

struct Echo {
    connection: QuicConnection,
    writer: FrameWriter,
    reader: FrameReader,
}

impl Echo {
    async fn once(&mut self, frame: &Bytes) -> Result<(), PeerError> {
        let written = self.writer.write(&mut [frame.clone()]).await;
        written.map_err(|error| PeerError::failed("write to bare-quic", error))?;
        match self.reader.next().await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(PeerError::failed("read from bare-quic", "it ended the stream")),
            Err(error) => Err(PeerError::failed("read from bare-quic", error)),
        }
    }
}

/// A frame of our protocol with so many bytes in it.
fn frame(bytes: usize) -> Bytes {
    let mut frame = BytesMut::with_capacity(bytes + 5);
    frame.put_u32_le(bytes as u32 + 1);
    frame.put_u8(KIND);
    frame.put_bytes(0x2a, bytes);
    frame.freeze()
}

impl Peer for Bare {
    fn run<'a>(&'a mut self, load: &'a Load, timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>> {
        Box::pin(async move {
            match *load {
                Load::Echo => self.echo(timing).await,
                Load::Handshakes { window } => self.handshakes(window, timing).await,
                Load::Idle { connections } => {
                    let greeted = |_| async {
                        let mut echo = self.connect().await?;
                        echo.once(&frame(GREETING_BYTES)).await?;
                        Ok(echo)
                    };
                    idle::hold(&self.servers, connections, timing, greeted).await
                }
                _ => Err(PeerError::unable("bare QUIC", load)),
            }
        })
    }
}

/// RocksDB as our log uses it, without anything around it.
#[derive(Debug)]
pub struct Raw {
    program: PathBuf,
}

/// What `raw_floor` prints.
#[derive(Debug, Deserialize)]
struct Floor {
    seconds: f64,
    entries: u64,
    batches: u64,
    batch_us: Vec<u64>,
}

impl Raw {
    /// `binary` is what lies beside it.
    pub fn start(binary: &Path) -> Result<Self, PeerError> {
        Ok(Self { program: example(binary, "raw_floor", "stentor-raft-store")? })
    }

    async fn write(&self, timing: Timing) -> Result<Outcome, PeerError> {
        let failed = |why: String| PeerError::failed("run raw_floor", why);
        let dir = folder()?;
        let mut command = tokio::process::Command::new(&self.program);
        command.arg(dir.path()).args([MESSAGE_BYTES.to_string(), BATCH.to_string()]);
        command.args([timing.warm_up_s.to_string(), timing.seconds.to_string()]);
        let ended = command.stdin(Stdio::null()).kill_on_drop(true).output().await;
        let ended = ended.map_err(|error| failed(error.to_string()))?;
        if !ended.status.success() {
            return Err(failed(String::from_utf8_lossy(&ended.stderr).trim().to_owned()));
        }
        let floor: Floor = serde_json::from_slice(&ended.stdout).map_err(|error| failed(error.to_string()))?;
        let mut took = Histogram::new();
        floor.batch_us.iter().for_each(|us| took.record(Duration::from_micros(*us)));
        let mut outcome = Outcome::counted(floor.seconds, floor.entries, 0, &took);
        outcome.flushes_per_message = outcome.per_unit(floor.batches as f64);
        Ok(outcome)
    }
}

impl Peer for Raw {
    fn run<'a>(&'a mut self, load: &'a Load, timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>> {
        Box::pin(async move {
            match *load {
                Load::Raw => self.write(timing).await,
                _ => Err(PeerError::unable("raw RocksDB", load)),
            }
        })
    }
}
