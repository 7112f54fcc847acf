//! Plays a plan: brings devices up as their conversations begin, sends every line in the file's order, waits until all
//! devices have everything or nothing moves any more, and holds what came against what was acknowledged.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream};
use stentor_client::{Client, ClientError, ClientTls, Create, Message, Role, SendHandle};
use stentor_proto::{
    ids::{ConversationId, DeviceId, Seq},
    reason::Reason,
    v1::EventKind,
};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc};

use super::{
    device::{DeviceHandle, OnItsWay, Shared, Trace},
    plan::{Conversation, Plan},
    proof::{Acknowledged, Truth, Verdict, fingerprint},
    report::Played,
};
use crate::{cluster_file::ClusterFile, context, failure::Failure, output::Output, session};

/// Conversations played at the same time.
const PARALLEL: usize = 4;
/// Devices that connect at the same time: more would only queue for the same cores.
const CONNECTING: usize = 32;
/// Sends without an answer, per conversation.
const WINDOW: usize = 512;
/// Participants named when a group is created; the others are added one by one.
const FIRST_PARTICIPANTS: usize = 400;
/// With nothing arriving for so long, nothing more will.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether all have everything.
const LOOK: Duration = Duration::from_millis(20);

/// Flips one byte of one delivered event before the proof sees it (docs/operations.md, "Test hooks").
const ALTER: &str = "STENTOR_TEST_ALTER_DELIVERY";

struct Stage {
    plan: Plan,
    shared: Arc<Shared>,
    /// A token per device, by index.
    tokens: Vec<String>,
    running: Mutex<HashMap<usize, Running>>,
}

/// A device and in how many conversations it is still needed.
struct Running {
    handle: Arc<DeviceHandle>,
    needed: usize,
}

/// Plays everything.
pub(super) async fn play(cluster: &ClusterFile, plan: Plan, output: Output) -> Result<Played, Failure> {
    let total = plan.conversations.iter().map(|conversation| deliveries(&plan, conversation)).sum();
    let token = |device: &super::plan::Device| {
        let user = &plan.users[device.user];
        context::mint(&cluster.signing_key, &cluster.app, user, Some(DeviceId::new(device.name)?), false)
    };
    let tokens = plan.devices.iter().map(token).collect::<Result<_, Failure>>()?;
    let shared = Arc::new(Shared {
        gateways: cluster.gateways(),
        tls: ClientTls::public(&cluster.ca).map_err(Failure::failed)?,
        connecting: Semaphore::new(CONNECTING),
        began: Instant::now(),
        bar: output.progress(total, "delivered"),
        arrivals: AtomicU64::new(0),
        alter_next: AtomicBool::new(std::env::var_os(ALTER).is_some()),
    });
    let numbers = 0..plan.conversations.len();
    let stage = Arc::new(Stage { plan, shared: shared.clone(), tokens, running: Mutex::default() });
    let conversations = numbers.map(|number| {
        let stage = stage.clone();
        async move { tokio::spawn(stage.conversation(number)).await.map_err(Failure::failed)? }
    });
    let mut outcomes = stream::iter(conversations).buffer_unordered(PARALLEL);
    let mut played = Played::default();
    while let Some(outcome) = outcomes.next().await {
        played.add(outcome?);
    }
    shared.bar.finish_and_clear();
    Ok(played)
}

/// How many events all devices of a conversation will get: all lines, and the users who were added after theirs.
fn deliveries(plan: &Plan, conversation: &Conversation) -> u64 {
    let first_seq: HashMap<usize, usize> = conversation.users.iter().enumerate().map(|(n, &u)| (u, n + 1)).collect();
    let events = conversation.users.len() + conversation.lines.len();
    let of = |device: &usize| events + 1 - first_seq[&plan.devices[*device].user];
    conversation.devices.iter().map(|device| of(device) as u64).sum()
}

impl Played {
    fn add(&mut self, other: Self) {
        self.sent += other.sent;
        self.acknowledged += other.acknowledged;
        self.acknowledged_us.extend(other.acknowledged_us);
        self.absences += other.absences;
        self.verdict.add(other.verdict);
    }
}

/// A line on its way.
struct Sending {
    line: usize,
    acknowledged: Acknowledged,
    handle: Result<SendHandle, ClientError>,
    _mark: OnItsWay,
    _place: OwnedSemaphorePermit,
}

/// A conversation being played.
struct Scene {
    id: ConversationId,
    devices: HashMap<usize, Arc<DeviceHandle>>,
    traces: HashMap<usize, Arc<Trace>>,
    /// Seqs of the events that setting it up made.
    setup: Vec<Seq>,
    /// The first seq that a user may see, by his index; 1 where nothing is said.
    joined: HashMap<usize, Seq>,
}

impl Stage {
    async fn conversation(self: Arc<Self>, number: usize) -> Result<Played, Failure> {
        let planned = &self.plan.conversations[number];
        let devices = self.bring_up(planned).await;
        let mut scene = Scene {
            id: planned.id.clone(),
            devices,
            traces: HashMap::new(),
            setup: Vec::new(),
            joined: HashMap::new(),
        };
        self.create(planned, &mut scene).await?;
        for (&device, handle) in &scene.devices {
            let trace = Arc::new(Trace::default());
            handle.follow(scene.id.clone(), trace.clone());
            scene.traces.insert(device, trace);
        }
        let (sending, answered) = mpsc::channel(WINDOW);
        let (sent, answers) = tokio::join!(self.send_all(planned, &scene, sending), self.collect(answered));
        let mut played = self.prove(planned, &scene, answers).await;
        played.sent = sent?;
        played.absences = planned.absences.len() as u64;
        self.let_go(planned).await?;
        Ok(played)
    }

    /// Starts the devices that do not run yet.
    async fn bring_up(&self, planned: &Conversation) -> HashMap<usize, Arc<DeviceHandle>> {
        let mut running = self.running.lock().await;
        let start = |&device: &usize| {
            let entry = running.entry(device).or_insert_with(|| {
                let planned = &self.plan.devices[device];
                let user = self.plan.users[planned.user].as_str().into();
                let handle = DeviceHandle::start(self.shared.clone(), user, self.tokens[device].clone());
                Running { handle: Arc::new(handle), needed: planned.conversations.len() }
            });
            (device, entry.handle.clone())
        };
        planned.devices.iter().map(start).collect()
    }

    /// Ends the devices whose last conversation this was.
    async fn let_go(&self, planned: &Conversation) -> Result<(), Failure> {
        let mut ended = Vec::new();
        {
            let mut running = self.running.lock().await;
            for device in &planned.devices {
                let Some(entry) = running.get_mut(device) else { continue };
                entry.needed -= 1;
                if entry.needed == 0
                    && let Some(entry) = running.remove(device)
                {
                    ended.push(entry.handle);
                }
            }
        }
        for handle in ended {
            handle.end().await?;
        }
        Ok(())
    }

    /// Creates the group with everybody in it. A folder that has seen the same demo before has its id already.
    async fn create(&self, planned: &Conversation, scene: &mut Scene) -> Result<(), Failure> {
        let owner = planned.lines[0].device;
        let (client, _mark) = scene.devices[&owner].client().await?;
        let others = &planned.users[1..];
        let (first, rest) = others.split_at(others.len().min(FIRST_PARTICIPANTS));
        for attempt in 1.. {
            if attempt > 1 {
                scene.id = ConversationId::new(format!("{}-{attempt}", planned.id))?;
            }
            let group = Create::group(first.iter().map(|&user| self.plan.users[user].clone())).id(scene.id.clone());
            match client.create_conversation(group).await {
                Ok(_) => break,
                Err(ClientError::Refused(refusal)) if refusal.reason == Reason::AlreadyExists.code() => {}
                Err(error) => return Err(session::failure(error)),
            }
        }
        // Its events, in the order of the request: created, then one for each participant, who sees from his own on.
        scene.setup.extend((1..=1 + first.len() as u64).map(Seq));
        scene.joined.extend(first.iter().copied().zip((2..).map(Seq)));
        for &user in rest {
            let added = client.add(&scene.id, &self.plan.users[user], Role::Writer).await.map_err(session::failure)?;
            scene.setup.push(added.seq);
            scene.joined.insert(user, added.seq);
        }
        Ok(())
    }

    /// Walks the file from the first line to the last. Each device's lines are handed over in their order; how many
    /// are on their way is bounded, how long each takes is not waited for.
    async fn send_all(&self, planned: &Conversation, scene: &Scene, to: mpsc::Sender<Sending>) -> Result<u64, Failure> {
        let window = Arc::new(Semaphore::new(WINDOW));
        let mut sent = 0;
        for (number, line) in planned.lines.iter().enumerate() {
            move_devices(planned, scene, number);
            let Ok(place) = window.clone().acquire_owned().await else { break };
            let (client, mark) = scene.devices[&line.device].client().await?;
            let kind = if line.action { EventKind::Action } else { EventKind::Message };
            let user = &self.plan.users[self.plan.devices[line.device].user];
            let acknowledged = Acknowledged {
                device: line.device,
                seq: Seq(0),
                fingerprint: fingerprint(kind, user.as_str(), &line.text),
                sent_us: self.shared.now_us(),
            };
            let handle = send(&client, &scene.id, kind, line.text.clone()).await;
            sent += 1;
            let sending = Sending { line: number, acknowledged, handle, _mark: mark, _place: place };
            if to.send(sending).await.is_err() {
                break;
            }
        }
        move_devices(planned, scene, planned.lines.len());
        Ok(sent)
    }

    /// Waits for the answers of everything that was handed over, until nothing moves any more.
    async fn collect(&self, mut sent: mpsc::Receiver<Sending>) -> Answers {
        let mut answers = Answers::default();
        let mut open = stream::FuturesUnordered::new();
        let mut more = true;
        while more || !open.is_empty() {
            tokio::select! {
                sending = sent.recv(), if more => match sending {
                    Some(sending) => open.push(answer(sending)),
                    None => more = false,
                },
                Some((line, answered)) = open.next() => match answered {
                    Ok(acknowledged) => {
                        answers.latencies_us.push(self.shared.now_us().saturating_sub(acknowledged.sent_us));
                        answers.acknowledged.push((line, acknowledged));
                    }
                    Err(error) => tracing::warn!(line, "a line was not acknowledged: {error}"),
                },
                () = tokio::time::sleep(PATIENCE), if !open.is_empty() => {
                    tracing::warn!(unanswered = open.len(), "no answer for {PATIENCE:?}");
                    break;
                }
            }
        }
        answers.acknowledged.sort_unstable_by_key(|&(line, _)| line);
        answers
    }

    /// Waits for the last deliveries, then compares.
    async fn prove(&self, planned: &Conversation, scene: &Scene, answers: Answers) -> Played {
        let acknowledged: Vec<Acknowledged> = answers.acknowledged.into_iter().map(|(_, a)| a).collect();
        let mut truth = Truth::new(&scene.setup, &acknowledged);
        self.wait_for(truth.head(), scene).await;
        let mut verdict = Verdict::default();
        for &device in &planned.devices {
            let user = self.plan.devices[device].user;
            let first = scene.joined.get(&user).copied().unwrap_or(Seq(1));
            let arrivals = scene.traces.get(&device).map(|trace| trace.take()).unwrap_or_default();
            truth.check(first, &arrivals, &mut verdict);
        }
        verdict.add(truth.faults());
        Played {
            acknowledged: acknowledged.len() as u64,
            acknowledged_us: answers.latencies_us,
            verdict,
            ..Played::default()
        }
    }

    async fn wait_for(&self, head: Seq, scene: &Scene) {
        let mut seen = 0;
        let mut moved = Instant::now();
        while scene.traces.values().any(|trace| trace.last() < head) {
            let arrivals = self.shared.arrivals.load(Ordering::Relaxed);
            if arrivals != seen {
                (seen, moved) = (arrivals, Instant::now());
            }
            if moved.elapsed() > PATIENCE {
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// What became of a conversation's lines.
#[derive(Default)]
struct Answers {
    /// By line.
    acknowledged: Vec<(usize, Acknowledged)>,
    latencies_us: Vec<u32>,
}

/// Sends away who is away from this line on, and calls back who is back.
fn move_devices(planned: &Conversation, scene: &Scene, line: usize) {
    for absence in &planned.absences {
        let Some(device) = scene.devices.get(&absence.device) else { continue };
        if absence.lines.end == line {
            device.come_back();
        } else if absence.lines.start == line {
            device.leave();
        }
    }
}

async fn send(
    client: &Client,
    conversation: &ConversationId,
    kind: EventKind,
    text: bytes::Bytes,
) -> Result<SendHandle, ClientError> {
    client.send_pipelined(conversation, Message { kind, ..Message::bytes("", text) }).await
}

async fn answer(sending: Sending) -> (usize, Result<Acknowledged, ClientError>) {
    let Sending { line, acknowledged, handle, .. } = sending;
    let answered = match handle {
        Ok(handle) => handle.await,
        Err(error) => Err(error),
    };
    (line, answered.map(|sent| Acknowledged { seq: sent.seq, ..acknowledged }))
}
