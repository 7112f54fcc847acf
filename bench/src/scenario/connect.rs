//! `connect`: devices that connect, are authenticated and welcomed, and go away again. A unit is one session: the
//! handshake, the token's check, the session's entry in its shard. Must never let two connections of one device meet.

use std::{sync::Arc, time::Instant};

use serde::{Deserialize, Serialize};
use stentor_client::Client;

use super::{Stop, Tasks};
use crate::{
    BenchError, Target,
    meter::Meters,
    pace::{Pace, Turns},
    workers::{Load, Stage},
};

/// Devices of each task, in turn: a user may open only so many sessions a second.
const DEVICES_PER_TASK: usize = 64;

/// How many connect.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ConnectSettings {
    /// Devices that connect at the same time.
    pub concurrency: usize,
    /// Devices come back and resume their TLS sessions; else every handshake is a whole one.
    pub resumed: bool,
}

impl Default for ConnectSettings {
    fn default() -> Self {
        Self { concurrency: 16, resumed: false }
    }
}

/// Tokens of all devices.
#[derive(Debug)]
pub struct ConnectLoad {
    target: Target,
    settings: ConnectSettings,
    /// By task.
    tokens: Vec<Arc<Vec<String>>>,
}

impl ConnectLoad {
    /// Makes the tokens.
    pub fn prepare(target: &Target, settings: &ConnectSettings) -> Result<Self, BenchError> {
        if settings.concurrency == 0 {
            return Err(BenchError::Settings("at least one device must connect".into()));
        }
        let of = |task: usize| {
            let tokens = (0..DEVICES_PER_TASK)
                .map(|n| target.token(&target.user("caller", task * DEVICES_PER_TASK + n)?, "phone"));
            tokens.collect::<Result<Vec<_>, BenchError>>().map(Arc::new)
        };
        let tokens = (0..settings.concurrency).map(of).collect::<Result<_, BenchError>>()?;
        Ok(Self { target: target.clone(), settings: *settings, tokens })
    }
}

impl Load for ConnectLoad {
    async fn run(&mut self, pace: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        let turns = stage.gather(self.tokens.len()).await?;
        let began = Instant::now();
        let task = |(task, tokens): (usize, &Arc<Vec<String>>)| {
            let caller = Caller {
                task,
                target: self.target.clone(),
                resumed: self.settings.resumed,
                tokens: Arc::clone(tokens),
                meters: Arc::clone(&meters),
                stop: stop.clone(),
                turns: Turns::new(pace, began, turns.number(task), turns.of()),
            };
            caller.run()
        };
        let tasks = Tasks::start(self.tokens.iter().enumerate().map(task));
        let measured = stage.measure(&meters).await;
        stop.now();
        tasks.ended().await?;
        measured
    }
}

struct Caller {
    task: usize,
    target: Target,
    resumed: bool,
    tokens: Arc<Vec<String>>,
    meters: Arc<Meters>,
    stop: Stop,
    turns: Turns,
}

impl Caller {
    async fn run(mut self) {
        let mut took = Vec::new();
        let tokens = Arc::clone(&self.tokens);
        for token in tokens.iter().cycle() {
            let began = self.turns.next().await;
            if self.stop.is_set() {
                return;
            }
            match self.connect(token.clone()).await {
                Ok(client) => {
                    took.push(began.elapsed());
                    self.meters.units.note(self.task, &mut took);
                    client.close().await;
                }
                Err(error) => self.meters.units.fail(self.task, &error),
            }
        }
    }

    async fn connect(&self, token: String) -> Result<Client, BenchError> {
        let tls = if self.resumed { self.target.tls().clone() } else { self.target.fresh_tls()? };
        let builder = self.target.builder(self.task)?.tls(tls).token(token);
        builder.connect().await.map_err(BenchError::client("connect"))
    }
}
