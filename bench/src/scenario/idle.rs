//! `idle`: devices that are connected and say nothing. Each repeat adds the same number of them, so that its memory is
//! what those cost and not what the process had anyway. Must never measure while memory still changes.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, TryStreamExt, future::join_all, stream};
use serde::{Deserialize, Serialize};
use stentor_client::{Client, From};

use super::{
    send,
    talk::{self, Talk},
};
use crate::{
    BenchError, Outcome, Target, Usage,
    measure::{self, Observer, Snapshot, Timing},
    meter::Meters,
};

/// Devices that connect at the same time.
const CONNECTING: usize = 16;
/// Memory that has not changed for so long has settled.
const STILL_FOR: Duration = Duration::from_millis(500);
/// It is not waited for longer.
const SETTLED_WITHIN: Duration = Duration::from_secs(10);

/// Who idles.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct IdleSettings {
    /// Devices that each repeat adds, each of a user of its own.
    pub devices: usize,
    /// Conversations that each of them follows; all devices are in the same ones.
    pub conversations: usize,
}

impl Default for IdleSettings {
    fn default() -> Self {
        Self { devices: 1_000, conversations: 0 }
    }
}

/// Devices that are connected.
#[derive(Debug)]
pub struct IdleLoad {
    target: Target,
    settings: IdleSettings,
    clients: Vec<Client>,
}

impl IdleLoad {
    /// Nobody yet.
    pub fn prepare(target: &Target, settings: &IdleSettings) -> Result<Self, BenchError> {
        if settings.devices == 0 {
            return Err(BenchError::Settings("at least one device must idle".into()));
        }
        Ok(Self { target: target.clone(), settings: *settings, clients: Vec::new() })
    }

    /// Adds devices, waits until memory has settled, and holds them; once for each repeat.
    pub async fn run(&mut self, timing: Timing, observer: &Observer) -> Result<Vec<Outcome>, BenchError> {
        let mut outcomes = Vec::new();
        for repeat in 0..timing.repeats as usize {
            outcomes.push(self.add(repeat, timing, observer).await?);
        }
        Ok(outcomes)
    }

    async fn add(&mut self, repeat: usize, timing: Timing, observer: &Observer) -> Result<Outcome, BenchError> {
        let talks = self.talks(repeat).await?;
        let before = self.settled().await;
        let (meters, began) = (Meters::new(), Snapshot::take(&self.target).await?);
        let first = self.clients.len();
        let connected = stream::iter(first..first + self.settings.devices).map(|n| self.connect(n, &talks, &meters));
        let added: Vec<Client> = connected.buffer_unordered(CONNECTING).try_collect().await?;
        self.clients.extend(added);
        let cost = Snapshot::take(&self.target).await?.since(&began);
        let mut outcome = measure::outcome(cost, meters.take());
        let after = self.settled().await;
        let devices = self.settings.devices as f64;
        for (name, memory) in [("anonymous", |u: &Usage| u.anonymous_kib), ("resident", |u: &Usage| u.rss_kib)]
            as [(&str, fn(&Usage) -> u64); 2]
        {
            if let (Some(before), Some(after)) = (sum(&before, memory), sum(&after, memory)) {
                let bytes = (after as f64 - before as f64) * 1024.0 / devices;
                outcome.figures.insert(format!("gateway_{name}_bytes_per_connection"), bytes);
            }
        }
        self.hold(timing, observer, &mut outcome).await?;
        Ok(outcome)
    }

    async fn connect(&self, n: usize, talks: &[std::sync::Arc<Talk>], meters: &Meters) -> Result<Client, BenchError> {
        let mut builder = self.target.device(&self.target.user("idler", n)?, "phone", n)?;
        for talk in talks {
            builder = builder.subscribe(&talk.id, From::Head);
        }
        let began = Instant::now();
        let client = builder.connect().await.map_err(BenchError::client(format!("connect device {n}")))?;
        meters.units.note(n, &mut vec![began.elapsed()]);
        Ok(client)
    }

    /// The conversations of the devices that are added next.
    async fn talks(&self, repeat: usize) -> Result<Vec<std::sync::Arc<Talk>>, BenchError> {
        if self.settings.conversations == 0 {
            return Ok(Vec::new());
        }
        let owner = send::connect(&self.target, &[self.target.user("host", repeat)?]).await?.remove(0);
        let first = self.clients.len();
        let users: Vec<_> = (first..first + self.settings.devices)
            .map(|n| self.target.user("idler", n))
            .collect::<Result<_, BenchError>>()?;
        let name = |n| self.target.named(&format!("idle{repeat}"), n);
        let wanted = (0..self.settings.conversations).map(|n| (owner.clone(), name(n), users.clone()));
        let talks = talk::create_all(wanted.collect(), None).await?;
        owner.close().await;
        Ok(talks)
    }

    /// What the cluster uses while nobody says anything.
    async fn hold(&self, timing: Timing, observer: &Observer, outcome: &mut Outcome) -> Result<(), BenchError> {
        let held = Timing { warm_up_s: timing.warm_up_s, repeats: 1, ..timing };
        for quiet in measure::measure(&self.target, held, &Meters::new(), observer).await? {
            let share = |us: u64| us as f64 / 1e4 / quiet.seconds;
            for (name, spent) in &quiet.processes {
                outcome.figures.insert(format!("{name}_idle_cpu_percent"), share(spent.cpu_us()));
            }
        }
        let lost = self.clients.iter().filter(|client| !client.is_connected()).count();
        if lost > 0 {
            return Err(BenchError::Wrong(format!("{lost} of {} devices lost their connection", self.clients.len())));
        }
        outcome.figures.insert("connections".into(), self.clients.len() as f64);
        Ok(())
    }

    /// The gateways, when their memory has stopped changing.
    async fn settled(&self) -> BTreeMap<String, Usage> {
        let deadline = Instant::now() + SETTLED_WITHIN;
        let mut memory = self.gateways();
        loop {
            tokio::time::sleep(STILL_FOR).await;
            let now = self.gateways();
            let same = sum(&now, |u| u.anonymous_kib) == sum(&memory, |u| u.anonymous_kib);
            memory = now;
            if same || Instant::now() > deadline {
                return memory;
            }
        }
    }

    fn gateways(&self) -> BTreeMap<String, Usage> {
        let gateways = self.target.nodes().iter().filter(|node| node.role == "gateway");
        gateways.filter_map(|node| Some((node.name.clone(), Usage::of(node.pid?).ok()?))).collect()
    }

    /// Ends all sessions.
    pub async fn close(self) {
        join_all(self.clients.iter().map(Client::close)).await;
    }
}

/// Of all together; `None` when nothing could be read.
fn sum(usages: &BTreeMap<String, Usage>, of: impl Fn(&Usage) -> u64) -> Option<u64> {
    (!usages.is_empty()).then(|| usages.values().map(of).sum())
}
