//! `resume`: everybody was away, and comes back at once. A unit is a device that has everything it missed; its latency
//! is from when it was due to connect. Must never take a device for up to date that lacks a message.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::join_all, stream};
use serde::{Deserialize, Serialize};
use stentor_client::{Client, ConversationId, EventKind, Incoming, Message, Seq, UserId};
use tokio::task::JoinSet;

use super::{
    send,
    talk::{self, Talk},
};
use crate::{
    BenchError, Outcome, Pace, Target, Timing, Usage,
    body::{Bodies, BodySize},
    measure::Snapshot,
    meter::Meters,
    workers::{Crew, Load, Stage},
};

/// Devices of one conversation.
pub(crate) const TOGETHER: usize = 10;
/// Who writes while they are away.
const WRITERS: usize = 4;
/// Devices that go away at the same time.
const LEAVING: usize = 64;
/// Between two looks at the gateways' memory.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Who was away.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ResumeSettings {
    /// Devices, each of a user of its own.
    pub devices: usize,
    /// Conversations of each, ten users in one.
    pub conversations: usize,
    /// Messages that came in each conversation meanwhile.
    pub missed: usize,
    /// All connect within so many seconds.
    pub within_s: f64,
    /// How long bodies are.
    pub body: BodySize,
}

impl Default for ResumeSettings {
    fn default() -> Self {
        Self { devices: 1_000, conversations: 10, missed: 5, within_s: 1.0, body: BodySize::Bytes(120) }
    }
}

/// Devices that come and go.
#[derive(Debug)]
pub struct ResumeLoad {
    target: Target,
    settings: ResumeSettings,
    writers: Vec<Client>,
    talks: Vec<Arc<Talk>>,
    bodies: Bodies,
    /// Messages that were sent into each conversation.
    sent: usize,
}

impl ResumeLoad {
    /// Creates the conversations; every device is there once, so that it has cursors.
    pub async fn prepare(target: &Target, settings: &ResumeSettings, bodies: Bodies) -> Result<Self, BenchError> {
        let s = *settings;
        if s.devices == 0 || s.conversations == 0 {
            return Err(BenchError::Settings("at least one device and one conversation are needed".into()));
        }
        let users: Vec<_> = (0..WRITERS).map(|n| target.user("writer", n)).collect::<Result<_, BenchError>>()?;
        let writers = send::connect(target, &users).await?;
        let groups = s.devices.div_ceil(TOGETHER);
        let wanted = (0..groups * s.conversations).map(|n| {
            let group = n / s.conversations;
            let devices = group * TOGETHER..s.devices.min((group + 1) * TOGETHER);
            let users = devices.map(|device| target.user("away", device)).collect::<Result<_, BenchError>>()?;
            Ok((writers[n % WRITERS].clone(), target.named("resume", n), users))
        });
        let talks = talk::create_all(wanted.collect::<Result<_, BenchError>>()?, None).await?;
        let load = Self { target: target.clone(), settings: s, writers, talks, bodies, sent: 0 };
        leave(load.come_back(0, 0.0, &Arc::new(Meters::new()), || {}).await?).await;
        Ok(load)
    }

    async fn miss(&mut self) -> Result<(), BenchError> {
        for n in 0..self.settings.missed {
            for (at, talk) in self.talks.iter().enumerate() {
                let message = Message::bytes(String::new(), self.bodies.get(self.sent + n));
                let sent = self.writers[at % WRITERS].send_pipelined(&talk.id, message).await;
                sent.map_err(BenchError::client("send what is missed"))?;
                talk.acknowledged.fetch_add(1, Ordering::Relaxed);
            }
        }
        join_all(self.writers.iter().map(Client::flush)).await;
        self.sent += self.settings.missed;
        let writers = (0..self.talks.len()).map(|at| self.writers[at % WRITERS].clone());
        talk::count(writers.zip(self.talks.iter().cloned()).collect()).await?;
        Ok(())
    }

    /// All devices connect and get what they missed. `fraction` of the time between two of them is waited first: those of
    /// other workers come between.
    async fn come_back(
        &self,
        missed: usize,
        fraction: f64,
        meters: &Arc<Meters>,
        told: impl Fn(),
    ) -> Result<Vec<Client>, BenchError> {
        let (due, mut coming) = (Instant::now(), JoinSet::new());
        for n in 0..self.settings.devices {
            let share = (n as f64 + fraction) / self.settings.devices as f64;
            let device = Device {
                n,
                target: self.target.clone(),
                user: self.target.user("away", n)?,
                due: due + Duration::from_secs_f64((self.settings.within_s * share).clamp(0.0, 86_400.0)),
                missed: missed * self.settings.conversations,
                meters: Arc::clone(meters),
            };
            coming.spawn(device.come_back());
        }
        let mut clients = Vec::with_capacity(self.settings.devices);
        while let Some(came) = coming.join_next().await {
            clients.push(came.map_err(BenchError::cluster)??);
            told();
        }
        Ok(clients)
    }

    /// Ends the writers' sessions.
    pub async fn close(self) {
        join_all(self.writers.iter().map(Client::close)).await;
    }
}

impl Load for ResumeLoad {
    /// Lets all miss something and come back; once for each repeat.
    async fn run(&mut self, _: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        self.miss().await?;
        let turns = stage.gather(self.settings.devices).await?;
        let meters = Arc::new(Meters::new());
        let told = || stage.tell(&meters);
        let clients = self.come_back(self.settings.missed, turns.fraction(), &meters, told).await?;
        stage.hand_over(&meters).await?;
        stage.measure(&Meters::new()).await?;
        leave(clients).await;
        Ok(())
    }
}

/// All devices go away, their cursors moved.
async fn leave(clients: Vec<Client>) {
    let leaving = stream::iter(clients).map(async |client: Client| client.close().await);
    leaving.buffer_unordered(LEAVING).collect::<()>().await;
}

/// Leads a run: in each repeat all come back from what they missed, when that is at rest.
pub(crate) async fn lead(crew: &mut Crew<'_>, missed: usize, timing: Timing) -> Result<Vec<Outcome>, BenchError> {
    let mut outcomes = Vec::new();
    for repeat in 1..=timing.repeats {
        let ready = crew.ready(Pace::Closed).await?;
        crew.wait(timing.warm_up_s, 0).await?;
        let (peak, mut watching) = (Arc::new(AtomicU64::new(0)), JoinSet::new());
        watching.spawn(watch(crew.target().clone(), Arc::clone(&peak)));
        let before = Snapshot::take(crew.target()).await;
        let (mut outcome, slowest) = crew.step(ready, repeat, &before).await?;
        drop(watching);
        outcome.figures.insert("all_up_to_date_s".into(), slowest.as_secs_f64());
        outcome.figures.insert("missed_messages".into(), missed as f64);
        outcome.figures.insert("gateway_peak_resident_mib".into(), peak.load(Ordering::Relaxed) as f64 / 1024.0);
        crew.stop().await?;
        outcomes.push(outcome);
    }
    Ok(outcomes)
}

/// Keeps the highest memory of all gateways together, until it is cut off.
async fn watch(target: Target, peak_kib: Arc<AtomicU64>) {
    loop {
        let gateways = target.nodes().iter().filter(|node| node.role == "gateway");
        let now: u64 = gateways.filter_map(|node| Some(Usage::of(node.pid?).ok()?.rss_kib)).sum();
        peak_kib.fetch_max(now, Ordering::Relaxed);
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// One that was away.
struct Device {
    n: usize,
    target: Target,
    user: UserId,
    due: Instant,
    /// Messages that it must get.
    missed: usize,
    meters: Arc<Meters>,
}

impl Device {
    async fn come_back(self) -> Result<Client, BenchError> {
        let builder = self.target.device(&self.user, "phone", self.n)?.follow_all();
        tokio::time::sleep_until(self.due.into()).await;
        let client = builder.connect().await.map_err(BenchError::client(format!("connect {}", self.user)))?;
        let (mut messages, mut last) = (0, BTreeMap::<ConversationId, Seq>::new());
        loop {
            match client.next().await {
                Some(Incoming::Event { conversation, event }) => {
                    messages += usize::from(event.kind == EventKind::Message);
                    last.insert(conversation, event.seq);
                }
                Some(Incoming::UpToDate) => break,
                Some(Incoming::Ended { refusal, .. }) => return Err(BenchError::Cluster(refusal.message)),
                Some(_) => {}
                None => return Err(BenchError::Cluster(format!("the session of {} ended", self.user))),
            }
        }
        if messages != self.missed {
            let (user, missed) = (&self.user, self.missed);
            return Err(BenchError::Wrong(format!("{user} got {messages} of {missed} messages")));
        }
        self.meters.units.note(self.n, &mut vec![self.due.elapsed()]);
        last.iter().for_each(|(conversation, seq)| client.delivered(conversation, *seq));
        Ok(client)
    }
}
