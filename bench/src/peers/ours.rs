//! Our own side of each work: three brokers and a gateway as processes of their own, TLS on, every message on the
//! disks of a majority before it is acknowledged, driven by our own scenarios. Must never be given what the peers are
//! not.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, TryStreamExt, future::LocalBoxFuture, stream};
use stentor_client::{Client, ConversationId, Create, From, Incoming, Message};
use tokio::time::timeout;

use super::{Load, MESSAGE_BYTES, Peer, PeerError, idle, parked};
use crate::{
    BenchError, Local, Observer, Outcome, Pace, Size, Target, Timing,
    body::{Bodies, BodySize},
    meter::Meters,
    scenario::{
        Stop, Tasks,
        api::ApiLoad,
        connect::{ConnectLoad, ConnectSettings},
        fanout::{FanoutLoad, FanoutSettings},
        idle::{IdleLoad, IdleSettings},
        send::{SendLoad, SendSettings},
    },
    workers::{self, Rhythm, Stage},
};

const CONNECTING: usize = 16;
/// So many conversations are made once and not for each repeat.
const KEPT_FROM: usize = 100_000;
/// A message that takes longer is lost.
const ARRIVES_WITHIN: Duration = Duration::from_secs(30);
/// Name of the figure of the memory of idle connections in our own scenario.
const IDLE_BYTES: &str = "gateway_anonymous_bytes_per_connection";

/// Through which door messages come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// Devices' sessions with the gateway, by the SDK.
    Sessions,
    /// The send stream of the brokers' gRPC API.
    Api,
}

/// A cluster that runs.
#[derive(Debug)]
pub struct Ours {
    local: Local,
    /// Of the run: each has names of its own.
    target: Target,
    door: Door,
    /// A load that took long to prepare, for the next repeat.
    kept: Option<(SendSettings, SendLoad)>,
}

impl Ours {
    /// Starts three brokers and a gateway with so many data shards.
    pub async fn start(binary: &Path, shards: u32, door: Door) -> Result<Self, PeerError> {
        let binary: PathBuf = binary.to_owned();
        let local = Local::start(&binary, Size { brokers: 3, gateways: 1, shards }).await?;
        let target = local.target()?;
        Ok(Self { local, target, door, kept: None })
    }

    fn bodies() -> Bodies {
        Bodies::of_bytes(MESSAGE_BYTES)
    }

    async fn append(
        &mut self,
        (conversations, window, sessions): (usize, usize, usize),
        timing: Timing,
    ) -> Result<Vec<Outcome>, PeerError> {
        let body = BodySize::Bytes(MESSAGE_BYTES);
        let settings = SendSettings { conversations, window, sessions, body };
        match self.door {
            Door::Sessions => {
                let mut load = match self.kept.take() {
                    Some((kept, load)) if kept == settings => load,
                    _ => SendLoad::prepare(&self.target, &settings, Self::bodies()).await?,
                };
                let outcomes = self.measure(&mut load, Pace::Closed, timing).await?;
                match conversations >= KEPT_FROM {
                    true => self.kept = Some((settings, load)),
                    false => load.close().await,
                }
                Ok(outcomes)
            }
            Door::Api => {
                let mut load = ApiLoad::prepare(&self.target, &settings, Self::bodies()).await?;
                Ok(self.measure(&mut load, Pace::Closed, timing).await?)
            }
        }
    }

    async fn fanout(&self, settings: FanoutSettings, pace: Pace, timing: Timing) -> Result<Vec<Outcome>, PeerError> {
        let mut load = FanoutLoad::prepare(&self.target, &settings, Self::bodies()).await?;
        let outcomes = self.measure(&mut load, pace, timing).await?;
        load.close().await;
        Ok(outcomes)
    }

    async fn chat(&self, pairs: usize, timing: Timing) -> Result<Vec<Outcome>, PeerError> {
        let prepared = stream::iter(0..pairs).map(|n| self.pair(n)).buffered(CONNECTING);
        let mut load = Chat { pairs: prepared.try_collect().await? };
        Ok(self.measure(&mut load, Pace::Closed, timing).await?)
    }

    async fn measure(
        &self,
        load: &mut impl workers::Load,
        pace: Pace,
        timing: Timing,
    ) -> Result<Vec<Outcome>, BenchError> {
        workers::alone(&self.target, load, (Rhythm::Steady, pace, timing), &Observer::none()).await
    }

    async fn pair(&self, n: usize) -> Result<Pair, PeerError> {
        let run = rand::random::<u32>() as usize;
        let (one, other) = (self.target.user(&format!("one{n}"), run)?, self.target.user(&format!("other{n}"), run)?);
        let connect = async |user, number| {
            let builder = self.target.device(user, "phone", number)?;
            builder.connect().await.map_err(BenchError::client(format!("connect {user}")))
        };
        let (a, b) = (connect(&one, 2 * n).await?, connect(&other, 2 * n + 1).await?);
        let created = a.create_conversation(Create::direct(other)).await;
        let id = created.map_err(BenchError::client("create a conversation of two"))?.conversation;
        for client in [&a, &b] {
            client.subscribe(&id, From::Head).await.map_err(BenchError::client("subscribe"))?;
        }
        Ok((id, a, b))
    }

    async fn idle(&self, devices: usize, timing: Timing) -> Result<Vec<Outcome>, PeerError> {
        let settings = IdleSettings { devices, conversations: 0 };
        let mut load = IdleLoad::prepare(&self.target, &settings)?;
        let how = (Rhythm::Adding, Pace::Closed, timing);
        let mut outcomes = workers::alone(&self.target, &mut load, how, &Observer::none()).await?;
        load.close().await;
        for outcome in &mut outcomes {
            if let Some(bytes) = outcome.figures.get(IDLE_BYTES).copied() {
                outcome.figures.insert(idle::BYTES.into(), bytes);
            }
        }
        Ok(outcomes)
    }

    async fn put_under(&mut self, load: &Load, timing: Timing) -> Result<Outcome, PeerError> {
        let timing = Timing { repeats: 1, ..timing };
        self.target = self.local.target()?;
        let one = FanoutSettings { body: BodySize::Bytes(MESSAGE_BYTES), ..FanoutSettings::default() };
        let outcomes = match *load {
            Load::Append { conversations, window } => self.append((conversations, window, 1), timing).await?,
            Load::Spread { conversations, devices, window } => {
                self.append((conversations, window, devices), timing).await?
            }
            Load::Cursors { devices, window } => {
                let settings = FanoutSettings { devices, window, cursors: true, ..one };
                self.fanout(settings, Pace::Closed, timing).await?
            }
            Load::Fanout { devices, rate_per_s } | Load::Broadcast { devices, rate_per_s } => {
                let settings = FanoutSettings { devices, ..one };
                self.fanout(settings, Pace::Open { rate_per_s }, timing).await?
            }
            Load::Chat { pairs } => self.chat(pairs, timing).await?,
            Load::Idle { connections } => self.idle(connections, timing).await?,
            Load::Handshakes { window } => {
                let settings = ConnectSettings { concurrency: window, resumed: false };
                let mut load = ConnectLoad::prepare(&self.target, &settings)?;
                self.measure(&mut load, Pace::Closed, timing).await?
            }
            Load::Parked => vec![parked::hold(&self.target, timing).await?],
            Load::Echo | Load::Raw => return Err(PeerError::unable("a Stentor cluster", load)),
        };
        outcomes.into_iter().next().ok_or_else(|| PeerError::failed("measure", "there was no outcome"))
    }
}

/// A conversation of two, and their devices.
type Pair = (ConversationId, Client, Client);

/// Pairs that talk.
struct Chat {
    pairs: Vec<Pair>,
}

impl workers::Load for Chat {
    async fn run(&mut self, _: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        stage.gather(self.pairs.len()).await?;
        let pairs = std::mem::take(&mut self.pairs).into_iter().enumerate();
        let tasks = Tasks::start(pairs.map(|(n, pair)| talk(n, pair, Arc::clone(&meters), stop.clone())));
        let measured = stage.measure(&meters).await;
        stop.now();
        tasks.ended().await?.into_iter().collect::<Result<(), BenchError>>()?;
        measured
    }
}

/// One says something, and when it is acknowledged and the other has it, he answers. Each message that arrived counts.
async fn talk(n: usize, (id, one, other): Pair, meters: Arc<Meters>, stop: Stop) -> Result<(), BenchError> {
    let (mut from, mut to) = (&one, &other);
    let mut noted = Vec::new();
    while !stop.is_set() {
        let began = Instant::now();
        let said = from.send_pipelined(&id, Message::bytes(String::new(), vec![0x2a; MESSAGE_BYTES])).await;
        let answer = said.map_err(BenchError::client("send"))?;
        let sent = answer.await.map_err(BenchError::client("send"))?;
        let comes = async {
            while let Some(incoming) = to.next().await {
                if let Incoming::Event { event, .. } = incoming
                    && event.seq == sent.seq
                {
                    return Ok(());
                }
            }
            Err(BenchError::Late("the end of a session".into()))
        };
        timeout(ARRIVES_WITHIN, comes).await.map_err(|_| BenchError::Late("a message".into()))??;
        noted.push(began.elapsed());
        meters.units.note(n, &mut noted);
        std::mem::swap(&mut from, &mut to);
    }
    one.close().await;
    other.close().await;
    Ok(())
}

impl Peer for Ours {
    fn run<'a>(&'a mut self, load: &'a Load, timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>> {
        Box::pin(self.put_under(load, timing))
    }
}
