//! `fanout` and `cursors`: messages into conversations with many devices, each of which must get every one of them. Units
//! are deliveries, and in `cursors` those that the device's durable cursor has passed; latencies are from when the
//! message was due. Must never end before every device has everything.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt, TryStreamExt, future::join_all, stream};
use serde::{Deserialize, Serialize};
use stentor_client::{Client, EventKind, From, Incoming, UserId};
use tokio::task::JoinSet;

use super::{
    Stop, Tasks,
    lane::{Gate, LATE, Lane, SENT},
    send,
    spread::SENDS_PER_SESSION,
    talk::{self, Talk},
};
use crate::{
    BenchError, Pace, Target,
    body::{Bodies, BodySize, stamp_of},
    meter::{Batch, Meters},
    workers::{Load, Stage, Turns},
};

/// Devices that connect at the same time.
const CONNECTING: usize = 32;
/// Every delivery must have come so long after the last message.
const DELIVERED_WITHIN: Duration = Duration::from_secs(120);
/// Between two looks whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Who gets what.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FanoutSettings {
    /// Conversations, each with devices of its own.
    pub conversations: usize,
    /// Devices of one conversation.
    pub devices: usize,
    /// Devices of one user, 1 to 250.
    pub devices_per_user: usize,
    /// Devices more in the first conversation that are connected and read nothing; they are not counted.
    pub stuck: usize,
    /// Closed loop: messages of one conversation that not all devices have, at most.
    pub window: usize,
    /// How long bodies are.
    pub body: BodySize,
    /// Devices say what they have, and what counts is that their durable cursors move.
    pub cursors: bool,
}

impl Default for FanoutSettings {
    fn default() -> Self {
        Self {
            conversations: 1,
            devices: 100,
            devices_per_user: 1,
            stuck: 0,
            window: 16,
            body: BodySize::Bytes(256),
            cursors: false,
        }
    }
}

/// A device that reads.
struct Reader {
    client: Client,
    number: usize,
    talk: Arc<Talk>,
    gate: Arc<Gate>,
    moves_cursors: bool,
    seen: Arc<Seen>,
}

/// What one device has got.
#[derive(Debug, Default)]
struct Seen {
    /// Messages.
    received: AtomicU64,
    /// Where its durable cursor stands, as the server said.
    cursor: AtomicU64,
    /// The last seq that it got.
    last: AtomicU64,
}

/// Devices that read and devices that send, connected.
#[derive(Debug)]
pub struct FanoutLoad {
    target: Target,
    meters: Arc<Meters>,
    senders: Vec<Client>,
    readers: Vec<Client>,
    stuck: Vec<Client>,
    /// Cut off with the load: a run that is given up must not leave readers behind.
    tasks: JoinSet<()>,
    talks: Vec<Arc<Talk>>,
    gates: Vec<Arc<Gate>>,
    /// By conversation.
    seen: Vec<Vec<Arc<Seen>>>,
    bodies: Arc<Bodies>,
    settings: FanoutSettings,
}

impl FanoutLoad {
    /// Creates the conversations and connects all devices.
    pub async fn prepare(target: &Target, settings: &FanoutSettings, bodies: Bodies) -> Result<Self, BenchError> {
        let s = *settings;
        if s.conversations == 0 || s.devices == 0 || s.window == 0 || !(1..=250).contains(&s.devices_per_user) {
            return Err(BenchError::Settings("conversations, devices and window must be at least 1".into()));
        }
        let sender_users: Vec<UserId> =
            (0..s.conversations).map(|n| target.user("speaker", n)).collect::<Result<_, BenchError>>()?;
        let senders = send::connect(target, &sender_users).await?;
        let users = Users { settings: s, target };
        let wanted =
            senders.iter().enumerate().map(|(n, sender)| Ok((sender.clone(), target.named("fanout", n), users.of(n)?)));
        let talks = talk::create_all(wanted.collect::<Result<_, BenchError>>()?, None).await?;
        let gates = talks.iter().map(|_| Arc::new(Gate::new(s.devices, s.window))).collect();
        let meters = Meters::new().with(SENT).with(LATE);
        let meters = Arc::new(if s.cursors { meters.with(DELIVERY) } else { meters });
        let mut load = Self {
            target: target.clone(),
            meters,
            senders,
            readers: Vec::new(),
            stuck: Vec::new(),
            tasks: JoinSet::new(),
            talks,
            gates,
            seen: Vec::new(),
            bodies: Arc::new(bodies),
            settings: s,
        };
        for conversation in 0..s.conversations {
            load.connect(&users, conversation).await?;
        }
        Ok(load)
    }

    /// The devices of one conversation.
    async fn connect(&mut self, users: &Users<'_>, conversation: usize) -> Result<(), BenchError> {
        let s = self.settings;
        let count = s.devices + if conversation == 0 { s.stuck } else { 0 };
        let (talk, target) = (&self.talks[conversation], &self.target);
        let connected = stream::iter(0..count).map(|place| async move {
            let (user, device) = users.device(conversation, place)?;
            let builder = target.device(&user, &device, place)?.subscribe(&talk.id, From::Head);
            builder.connect().await.map_err(BenchError::client(format!("connect {user}")))
        });
        let mut clients: Vec<Client> = connected.buffered(CONNECTING).try_collect().await?;
        self.stuck.extend(clients.split_off(s.devices));
        let mut all_seen = Vec::new();
        for client in clients {
            // Its stream begins after the head of this moment.
            up_to_date(&client).await?;
            let seen = Arc::new(Seen::default());
            let reader = Reader {
                client: client.clone(),
                number: self.tasks.len(),
                talk: Arc::clone(&self.talks[conversation]),
                gate: Arc::clone(&self.gates[conversation]),
                moves_cursors: s.cursors,
                seen: Arc::clone(&seen),
            };
            self.tasks.spawn(reader.run(Arc::clone(&self.meters)));
            self.readers.push(client);
            all_seen.push(seen);
        }
        self.seen.push(all_seen);
        Ok(())
    }

    fn lane(&self, n: usize, turns: &Turns, pace: Pace) -> Lane {
        Lane {
            number: turns.number(n),
            lanes: turns.of(),
            client: self.senders[n].clone(),
            talks: vec![Arc::clone(&self.talks[n])],
            window: SENDS_PER_SESSION,
            bodies: Arc::clone(&self.bodies),
            stamped: true,
            answers: SENT,
            gate: (pace == Pace::Closed).then(|| Arc::clone(&self.gates[n])),
        }
    }

    /// Waits until every device has got everything, and every cursor has moved there.
    async fn count(&self) -> Result<(), BenchError> {
        let deadline = Instant::now() + DELIVERED_WITHIN;
        for (talk, devices) in self.talks.iter().zip(&self.seen) {
            let least = talk.acknowledged.load(Ordering::Relaxed);
            let most = least + talk.unknown.load(Ordering::Relaxed);
            for seen in devices {
                while !seen.is_complete(least, self.settings.cursors) {
                    if Instant::now() > deadline {
                        let received = seen.received.load(Ordering::Relaxed);
                        return Err(BenchError::Wrong(format!(
                            "a device has {received} of {least} messages of {}",
                            talk.id
                        )));
                    }
                    tokio::time::sleep(LOOK_EVERY).await;
                }
                let received = seen.received.load(Ordering::Relaxed);
                if received > most {
                    return Err(BenchError::Wrong(format!("a device has {received} messages, {most} were sent")));
                }
            }
        }
        let readers = self.senders.iter().cloned().zip(self.talks.iter().cloned()).collect();
        talk::count(readers).await.map(|_| ())
    }

    /// Ends all sessions.
    pub async fn close(mut self) {
        let all = self.senders.iter().chain(&self.readers).chain(&self.stuck);
        join_all(all.map(Client::close)).await;
        while self.tasks.join_next().await.is_some() {}
    }
}

impl Load for FanoutLoad {
    async fn run(&mut self, pace: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        let (stop, lanes) = (Stop::default(), self.talks.len());
        let turns = stage.gather(lanes).await?;
        let began = Instant::now();
        let lane = |n| self.lane(n, &turns, pace).run(pace, began, Arc::clone(&self.meters), stop.clone());
        let lanes = Tasks::start((0..lanes).map(lane));
        let measured = stage.measure(&self.meters).await;
        stop.now();
        lanes.ended().await?;
        measured?;
        self.count().await
    }
}

/// Deliveries, where the units are cursor moves.
const DELIVERY: &str = "delivery";

impl Seen {
    fn is_complete(&self, messages: u64, with_cursor: bool) -> bool {
        let cursor_done = !with_cursor || self.cursor.load(Ordering::Relaxed) >= self.last.load(Ordering::Relaxed);
        self.received.load(Ordering::Relaxed) >= messages && cursor_done
    }
}

impl Reader {
    async fn run(self, meters: Arc<Meters>) {
        let (mut noted, mut acked, mut open) = (Batch::default(), Batch::default(), Vec::new());
        while let Some(first) = self.client.next().await {
            let now = Instant::now();
            let (mut next, mut received) = (Some(first), 0);
            let mut last = None;
            while let Some(incoming) = next {
                match incoming {
                    Incoming::Event { event, .. } if event.kind == EventKind::Message => {
                        received += 1;
                        last = Some(event.seq);
                        if let Some(stamp) = stamp_of(&event.body) {
                            noted.push(meters.units.since(stamp, now));
                            if self.moves_cursors {
                                open.push((event.seq.0, stamp));
                            }
                        }
                    }
                    Incoming::CursorsMoved { delivered, refused, .. } => {
                        for (_, seq) in delivered {
                            self.seen.cursor.fetch_max(seq.0, Ordering::Relaxed);
                            let done = open.partition_point(|(own, _)| *own <= seq.0);
                            open.drain(..done).for_each(|(_, stamp)| acked.push(meters.units.since(stamp, now)));
                        }
                        if let Some((_, refusal)) = refused.first() {
                            meters.units.fail(self.number, &refusal.message);
                        }
                    }
                    _ => {}
                }
                next = self.client.try_next();
            }
            if let Some(last) = last {
                self.seen.last.fetch_max(last.0, Ordering::Relaxed);
                if self.moves_cursors {
                    self.client.delivered(&self.talk.id, last);
                }
            }
            // There is no such meter where deliveries are the units.
            noted.hand_on(meters.other(DELIVERY), self.number);
            acked.hand_on(&meters.units, self.number);
            self.seen.received.fetch_add(received, Ordering::Relaxed);
            self.gate.deliver(received);
        }
    }
}

/// The users of a conversation.
struct Users<'a> {
    settings: FanoutSettings,
    target: &'a Target,
}

impl Users<'_> {
    fn count(&self, conversation: usize) -> usize {
        let devices = self.settings.devices + if conversation == 0 { self.settings.stuck } else { 0 };
        devices.div_ceil(self.settings.devices_per_user)
    }

    fn user(&self, conversation: usize, n: usize) -> Result<UserId, BenchError> {
        self.target.user(&format!("reader{conversation}"), n)
    }

    fn of(&self, conversation: usize) -> Result<Vec<UserId>, BenchError> {
        (0..self.count(conversation)).map(|n| self.user(conversation, n)).collect()
    }

    fn device(&self, conversation: usize, place: usize) -> Result<(UserId, String), BenchError> {
        let each = self.settings.devices_per_user;
        Ok((self.user(conversation, place / each)?, format!("device-{}", place % each)))
    }
}

/// Waits until the device's streams have begun.
async fn up_to_date(client: &Client) -> Result<(), BenchError> {
    loop {
        match client.next().await {
            Some(Incoming::UpToDate) => return Ok(()),
            Some(Incoming::Ended { refusal, .. }) => {
                return Err(BenchError::Cluster(format!("a stream was refused: {}", refusal.message)));
            }
            Some(_) => {}
            None => return Err(BenchError::Cluster("a session ended".into())),
        }
    }
}
