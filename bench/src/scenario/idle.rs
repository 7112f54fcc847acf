//! `idle`: devices that are connected and say nothing. Each repeat adds the same number of them, so that its memory is
//! what those cost and not what the process had anyway. Must never measure while memory still changes.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::join_all, stream};
use serde::{Deserialize, Serialize};
use stentor_client::{Client, From};

use super::{
    send,
    talk::{self, Talk},
};
use crate::{
    BenchError, Outcome, Pace, Target, Timing, Usage,
    measure::Snapshot,
    meter::Meters,
    workers::{Crew, Load, Stage},
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
    /// Repeats that were made.
    repeats: usize,
}

impl IdleLoad {
    /// Nobody yet.
    pub fn prepare(target: &Target, settings: &IdleSettings) -> Result<Self, BenchError> {
        if settings.devices == 0 {
            return Err(BenchError::Settings("at least one device must idle".into()));
        }
        Ok(Self { target: target.clone(), settings: *settings, clients: Vec::new(), repeats: 0 })
    }

    async fn add(
        &self,
        talks: &[std::sync::Arc<Talk>],
        meters: &Meters,
        stage: &Stage,
    ) -> Result<Vec<Client>, BenchError> {
        let (first, devices) = (self.clients.len(), self.settings.devices);
        let connected = stream::iter(first..first + devices).map(|n| self.connect(n, talks, meters));
        let mut added = Vec::with_capacity(devices);
        let mut connected = std::pin::pin!(connected.buffer_unordered(CONNECTING));
        while let Some(client) = connected.next().await {
            added.push(client?);
            stage.tell(meters);
        }
        Ok(added)
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

    /// Ends all sessions.
    pub async fn close(self) {
        join_all(self.clients.iter().map(Client::close)).await;
    }
}

impl Load for IdleLoad {
    /// Adds devices and holds them; once for each repeat.
    async fn run(&mut self, _: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        let talks = self.talks(self.repeats).await?;
        self.repeats += 1;
        stage.gather(self.settings.devices).await?;
        let meters = Meters::new();
        let added = self.add(&talks, &meters, stage).await?;
        stage.hand_over(&meters).await?;
        self.clients.extend(added);
        stage.measure(&Meters::new()).await?;
        let lost = self.clients.iter().filter(|client| !client.is_connected()).count();
        if lost > 0 {
            return Err(BenchError::Wrong(format!("{lost} of {} devices lost their connection", self.clients.len())));
        }
        Ok(())
    }
}

/// Leads a run: waits before and after each repeat's devices until memory has settled, and then looks at what rests.
pub(crate) async fn lead(crew: &mut Crew<'_>, timing: Timing) -> Result<Vec<Outcome>, BenchError> {
    let (mut outcomes, mut connections) = (Vec::new(), 0);
    for repeat in 1..=timing.repeats {
        let ready = crew.ready(Pace::Closed).await?;
        let before = settled(crew.target()).await;
        let began = Snapshot::take(crew.target()).await;
        let (mut outcome, _) = crew.step(ready, repeat, &began).await?;
        let after = settled(crew.target()).await;
        for (name, memory) in [("anonymous", |u: &Usage| u.anonymous_kib), ("resident", |u: &Usage| u.rss_kib)]
            as [(&str, fn(&Usage) -> u64); 2]
        {
            if let (Some(before), Some(after)) = (sum(&before, memory), sum(&after, memory))
                && let Some(bytes) = outcome.per_unit((after as f64 - before as f64) * 1024.0)
            {
                outcome.figures.insert(format!("gateway_{name}_bytes_per_connection"), bytes);
            }
        }
        hold(crew, repeat, timing, &mut outcome).await?;
        connections += outcome.count;
        outcome.figures.insert("connections".into(), connections as f64);
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// What everybody uses while nobody says anything.
async fn hold(crew: &mut Crew<'_>, repeat: u32, timing: Timing, outcome: &mut Outcome) -> Result<(), BenchError> {
    crew.wait(timing.warm_up_s, 0).await?;
    let before = Snapshot::take(crew.target()).await;
    crew.cut().await?;
    let (quiet, _) = crew.repeat(repeat, timing.seconds, &before).await?;
    let share = |us: u64| us as f64 / 1e4 / quiet.seconds.max(1e-9);
    for (name, spent) in &quiet.processes {
        outcome.figures.insert(format!("{name}_idle_cpu_percent"), share(spent.cpu_us()));
    }
    crew.stop().await
}

/// The gateways, when their memory has stopped changing.
async fn settled(target: &Target) -> BTreeMap<String, Usage> {
    let deadline = Instant::now() + SETTLED_WITHIN;
    let mut memory = gateways(target);
    loop {
        tokio::time::sleep(STILL_FOR).await;
        let now = gateways(target);
        let same = sum(&now, |u| u.anonymous_kib) == sum(&memory, |u| u.anonymous_kib);
        memory = now;
        if same || Instant::now() > deadline {
            return memory;
        }
    }
}

fn gateways(target: &Target) -> BTreeMap<String, Usage> {
    let gateways = target.nodes().iter().filter(|node| node.role == "gateway");
    gateways.filter_map(|node| Some((node.name.clone(), Usage::of(node.pid?).ok()?))).collect()
}

/// Of all together; `None` when nothing could be read.
fn sum(usages: &BTreeMap<String, Usage>, of: impl Fn(&Usage) -> u64) -> Option<u64> {
    (!usages.is_empty()).then(|| usages.values().map(of).sum())
}
