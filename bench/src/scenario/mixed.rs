//! `mixed`: a day in small. Conversations of very different size and liveliness, devices that come and go, cursors that
//! move. Units are deliveries. Must never end before every device that is there has everything.
//!
//! Sizes: of ten conversations seven have one reader, two have 2 to 20, and one has 20 to `largest`, all drawn with
//! small ones more often (the logarithm is uniform). Liveliness: the n-th conversation gets messages in proportion to
//! 1 / n^`zipf`, in an order that has nothing to do with size. Readers are drawn at random; each follows all of his
//! conversations, tells what he has, and marks one delivery in three as read. `churn` devices of a thousand go away each
//! second and are back after a second on average.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{FutureExt, StreamExt, TryStreamExt, future::join_all, stream};
use parking_lot::Mutex;
use rand::{
    Rng, SeedableRng,
    distr::{Distribution, weighted::WeightedIndex},
    rngs::StdRng,
    seq::index,
};
use serde::{Deserialize, Serialize};
use stentor_client::{Client, ConversationId, EventKind, Incoming, UserId};
use tokio::time::sleep_until;

use super::{
    Stop, Tasks,
    lane::{LATE, Lane, SENT},
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

/// Who writes; they are always there.
const WRITERS: usize = 16;
/// Messages after which a writer's order of conversations repeats.
const ORDER: usize = 4_096;
/// Devices that connect at the same time.
const CONNECTING: usize = 32;
/// A device that goes away is back after so long on average.
const AWAY_S: f64 = 1.0;
/// Every device must have everything so long after the last message.
const DELIVERED_WITHIN: Duration = Duration::from_secs(120);
/// How often a device that waits looks whether the run is over.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// One delivery in so many is marked as read.
const READ_ONE_IN: u64 = 3;
/// From the connection to everything that was missed.
const RESUMED: &str = "resumed";

/// The day's size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MixedSettings {
    /// Users who read, each with one device.
    pub users: usize,
    /// Conversations.
    pub conversations: usize,
    /// Readers of the largest conversation; at most all users.
    pub largest: usize,
    /// How much livelier the liveliest ones are.
    pub zipf: f64,
    /// Messages per second, all conversations together.
    pub rate_per_s: f64,
    /// Devices of a thousand that go away each second.
    pub churn: f64,
    /// How long bodies are.
    pub body: BodySize,
    /// The same number draws the same day.
    pub seed: u64,
}

impl Default for MixedSettings {
    fn default() -> Self {
        Self {
            users: 1_000,
            conversations: 2_000,
            largest: 1_000,
            zipf: 1.0,
            rate_per_s: 200.0,
            churn: 5.0,
            body: BodySize::Bytes(120),
            seed: 1,
        }
    }
}

/// What is drawn before anything happens.
#[derive(Debug)]
struct Day {
    /// By conversation.
    readers: Vec<Vec<usize>>,
    /// By writer: his conversations in the order of his messages.
    orders: Vec<Vec<usize>>,
}

impl Day {
    fn draw(s: &MixedSettings) -> Result<Self, BenchError> {
        let mut random = StdRng::seed_from_u64(s.seed);
        let readers = (0..s.conversations).map(|n| {
            let log_uniform = |random: &mut StdRng, low: f64, high: f64| {
                (low.ln() + random.random::<f64>() * (high.max(low).ln() - low.ln())).exp().round() as usize
            };
            let count = match n % 10 {
                0..=6 => 1,
                7 | 8 => log_uniform(&mut random, 2.0, 20.0),
                _ => log_uniform(&mut random, 20.0, s.largest as f64),
            };
            index::sample(&mut random, s.users, count.min(s.users)).into_vec()
        });
        let readers = readers.collect();
        let rank = index::sample(&mut random, s.conversations, s.conversations).into_vec();
        let weight = |&n: &usize| 1.0 / ((rank[n] + 1) as f64).powf(s.zipf);
        let mut orders = Vec::new();
        for writer in 0..WRITERS.min(s.conversations) {
            let own: Vec<usize> = (writer..s.conversations).step_by(WRITERS).collect();
            let lively = WeightedIndex::new(own.iter().map(weight));
            let lively = lively.map_err(|error| BenchError::Settings(format!("zipf: {error}")))?;
            orders.push((0..ORDER).map(|_| own[lively.sample(&mut random)]).collect());
        }
        Ok(Self { readers, orders })
    }
}

/// Where a device stands: the last seq that it has by conversation, over all of its connections.
type Positions = Arc<Mutex<HashMap<ConversationId, u64>>>;

/// The day's people.
#[derive(Debug)]
pub struct MixedLoad {
    target: Target,
    settings: MixedSettings,
    day: Day,
    writers: Vec<Client>,
    talks: Vec<Arc<Talk>>,
    bodies: Arc<Bodies>,
}

impl MixedLoad {
    /// Draws the day and creates the conversations.
    pub async fn prepare(target: &Target, settings: &MixedSettings, bodies: Bodies) -> Result<Self, BenchError> {
        let s = *settings;
        if s.users == 0 || s.conversations == 0 || s.rate_per_s <= 0.0 {
            return Err(BenchError::Settings("users, conversations and a rate are needed".into()));
        }
        let day = Day::draw(&s)?;
        let users: Vec<_> =
            (0..day.orders.len()).map(|n| target.user("writer", n)).collect::<Result<_, BenchError>>()?;
        let writers = send::connect(target, &users).await?;
        let wanted = day.readers.iter().enumerate().map(|(n, readers)| {
            let users = readers.iter().map(|&user| target.user("person", user)).collect::<Result<_, BenchError>>()?;
            Ok((writers[n % WRITERS].clone(), target.named("mixed", n), users))
        });
        let talks = talk::create_all(wanted.collect::<Result<_, BenchError>>()?, None).await?;
        Ok(Self { target: target.clone(), settings: s, day, writers, talks, bodies: Arc::new(bodies) })
    }

    fn lane(&self, n: usize, turns: &Turns) -> Lane {
        Lane {
            number: turns.number(n),
            lanes: turns.of(),
            client: self.writers[n].clone(),
            talks: self.day.orders[n].iter().map(|&n| Arc::clone(&self.talks[n])).collect(),
            window: SENDS_PER_SESSION,
            bodies: Arc::clone(&self.bodies),
            stamped: true,
            answers: SENT,
            gate: None,
        }
    }

    /// Waits until every device has the last message of every conversation of its user.
    async fn count(&self, positions: &[(usize, Positions)]) -> Result<(), BenchError> {
        let writers = (0..self.talks.len()).map(|n| self.writers[n % WRITERS].clone());
        talk::count(writers.zip(self.talks.iter().cloned()).collect()).await?;
        let mut wanted: Vec<Vec<(ConversationId, u64)>> = vec![Vec::new(); self.settings.users];
        for (talk, readers) in self.talks.iter().zip(&self.day.readers) {
            let least = talk.least_head();
            readers.iter().for_each(|&user| wanted[user].push((talk.id.clone(), least)));
        }
        let deadline = Instant::now() + DELIVERED_WITHIN;
        for (n, positions) in positions {
            for (conversation, head) in &wanted[*n] {
                while positions.lock().get(conversation).copied().unwrap_or(0) < *head {
                    if Instant::now() > deadline {
                        let has = positions.lock().get(conversation).copied().unwrap_or(0);
                        return Err(BenchError::Wrong(format!("person {n} has {has} of {head} in {conversation}")));
                    }
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            }
        }
        Ok(())
    }

    /// Ends the writers' sessions.
    pub async fn close(self) {
        join_all(self.writers.iter().map(Client::close)).await;
    }
}

impl Load for MixedLoad {
    /// Everybody connects before and leaves after the day.
    async fn run(&mut self, pace: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        let meters = Arc::new(Meters::new().with(SENT).with(LATE).with(RESUMED));
        let (reading, writing) = (Stop::default(), Stop::default());
        let load = &*self;
        let connected = stream::iter(0..load.settings.users).map(|n| Person::connect(load, n, &meters, &reading));
        let people: Vec<Person> = connected.buffer_unordered(CONNECTING).try_collect().await?;
        let positions: Vec<(usize, Positions)> = people.iter().map(|p| (p.n, Arc::clone(&p.positions))).collect();
        let people = Tasks::start(people.into_iter().map(Person::live));
        let turns = stage.gather(load.writers.len()).await?;
        let began = Instant::now();
        let lane = |n| load.lane(n, &turns).run(pace, began, Arc::clone(&meters), writing.clone());
        let lanes = Tasks::start((0..load.writers.len()).map(lane));
        let measured = stage.measure(&meters).await;
        writing.now();
        lanes.ended().await?;
        let counted = load.count(&positions).await;
        reading.now();
        people.ended().await?.into_iter().collect::<Result<(), BenchError>>()?;
        counted.and(measured)
    }
}

/// A user with his device.
struct Person {
    n: usize,
    user: UserId,
    target: Target,
    client: Client,
    positions: Positions,
    churn: f64,
    meters: Arc<Meters>,
    stop: Stop,
    random: StdRng,
}

impl Person {
    async fn connect(load: &MixedLoad, n: usize, meters: &Arc<Meters>, stop: &Stop) -> Result<Self, BenchError> {
        let user = load.target.user("person", n)?;
        let builder = load.target.device(&user, "phone", n)?.follow_all();
        let client = builder.connect().await.map_err(BenchError::client(format!("connect {user}")))?;
        let mut person = Self {
            n,
            user,
            target: load.target.clone(),
            client,
            positions: Positions::default(),
            churn: load.settings.churn / 1_000.0,
            meters: Arc::clone(meters),
            stop: stop.clone(),
            random: StdRng::seed_from_u64(load.settings.seed ^ n as u64),
        };
        let mut nothing = Batch::default();
        while let Some(incoming) = person.client.next().await {
            if matches!(incoming, Incoming::UpToDate) {
                return Ok(person);
            }
            person.take(incoming, Instant::now(), &mut nothing)?;
        }
        Err(BenchError::Cluster(format!("the session of {} ended", person.user)))
    }

    /// Reads, goes away, comes back, until the day is over.
    async fn live(mut self) -> Result<(), BenchError> {
        loop {
            let stays = self.lasts(1.0 / self.churn.max(1e-9));
            self.read_until(Instant::now() + stays).await?;
            if self.stop.is_set() {
                self.client.close().await;
                return Ok(());
            }
            self.client.close().await;
            // What had come and was not taken is not passed by the cursor, and comes again.
            tokio::time::sleep(self.lasts(AWAY_S)).await;
            let builder = self.target.device(&self.user, "phone", self.n)?.follow_all();
            let began = Instant::now();
            self.client = builder.connect().await.map_err(BenchError::client(format!("connect {}", self.user)))?;
            self.come_back(began).await?;
        }
    }

    /// A random time with this mean, in the way of things that have no memory.
    fn lasts(&mut self, mean_s: f64) -> Duration {
        let drawn = -(1.0 - self.random.random::<f64>()).ln() * mean_s;
        Duration::from_secs_f64(drawn.min(86_400.0))
    }

    async fn come_back(&mut self, began: Instant) -> Result<(), BenchError> {
        let mut noted = Batch::default();
        loop {
            let Some(incoming) = self.client.next().await else {
                return Err(BenchError::Cluster(format!("the session of {} ended", self.user)));
            };
            if matches!(incoming, Incoming::UpToDate) {
                break;
            }
            self.take(incoming, Instant::now(), &mut noted)?;
        }
        noted.hand_on(&self.meters.units, self.n);
        self.meters.other(RESUMED).note(self.n, &mut vec![began.elapsed()]);
        Ok(())
    }

    async fn read_until(&mut self, leave_at: Instant) -> Result<(), BenchError> {
        let mut noted = Batch::default();
        while !self.stop.is_set() && Instant::now() < leave_at {
            let look_again = leave_at.min(Instant::now() + Duration::from_millis(500));
            let client = self.client.clone();
            let mut next = tokio::select! {
                biased;
                next = client.next() => match next {
                    Some(incoming) => Some(incoming),
                    None => return Err(BenchError::Cluster(format!("the session of {} ended", self.user))),
                },
                () = sleep_until(look_again.into()) => None,
            };
            let now = Instant::now();
            while let Some(incoming) = next {
                self.take(incoming, now, &mut noted)?;
                next = client.next().now_or_never().flatten();
            }
            noted.hand_on(&self.meters.units, self.n);
        }
        Ok(())
    }

    fn take(&mut self, incoming: Incoming, now: Instant, noted: &mut Batch) -> Result<(), BenchError> {
        let Incoming::Event { conversation, event } = incoming else { return Ok(()) };
        let seq = event.seq.0;
        let before = self.positions.lock().insert(conversation.clone(), seq).unwrap_or(0);
        if seq <= before {
            // Its cursor was not moved in time; an application that keeps messages would skip it.
            self.positions.lock().insert(conversation, before);
            return Ok(());
        }
        if seq != before + 1 && before != 0 {
            let (user, next) = (&self.user, before + 1);
            return Err(BenchError::Wrong(format!("{user} got {seq} instead of {next} in {conversation}")));
        }
        if event.kind == EventKind::Message
            && let Some(stamp) = stamp_of(&event.body)
        {
            noted.push(self.meters.units.since(stamp, now));
        }
        self.client.delivered(&conversation, event.seq);
        if seq % READ_ONE_IN == 0 {
            self.client.read(&conversation, event.seq);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_has_small_and_large_conversations_and_lively_ones() {
        let settings = MixedSettings { users: 500, conversations: 400, largest: 300, ..MixedSettings::default() };
        let day = Day::draw(&settings).unwrap();
        let sizes: Vec<usize> = day.readers.iter().map(Vec::len).collect();
        assert_eq!(sizes.iter().filter(|&&size| size == 1).count(), 280);
        assert!(*sizes.iter().max().unwrap() > 100 && *sizes.iter().max().unwrap() <= 300, "{sizes:?}");
        assert!(day.readers.iter().all(|readers| readers.iter().all(|&user| user < 500)));
        let mut sent = vec![0; 400];
        day.orders.iter().flatten().for_each(|&n| sent[n] += 1);
        let liveliest = *sent.iter().max().unwrap();
        assert!(liveliest > 20 * (ORDER * WRITERS / 400) / 5, "{liveliest}");
        assert_eq!(day.orders.iter().flatten().count(), ORDER * WRITERS);
        assert_eq!(Day::draw(&settings).unwrap().readers, day.readers, "the same seed draws the same day");
    }
}
