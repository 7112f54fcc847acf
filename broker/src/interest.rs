//! Which gateways want a conversation's events or a user's head now, and carrying them there: one copy per gateway. Must
//! never let a slow gateway cost memory: beyond its budget events are dropped, and their head is told with the next beat.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use hashbrown::{Equivalent, HashMap};
use parking_lot::Mutex;
use stentor_engine::{effect::Effect, limits};
use stentor_proto::{
    Bytes, Message,
    ids::ShardId,
    internal::{BrokerFrame, HeadHint, Live, ShardBeat, broker_frame::Frame},
};

use crate::{metrics::Metrics, queue::FrameQueue};

/// What there can be interest in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// The events of a conversation.
    Conversation,
    /// The head of a user's own stream.
    User,
}

/// A conversation or a user of an app.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    kind: Kind,
    /// App, then id.
    bytes: Box<[u8]>,
    app_len: usize,
}

/// What interest is in.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Topic<'a> {
    kind: Kind,
    app: &'a [u8],
    id: &'a [u8],
}

impl Key {
    fn as_ref(&self) -> Topic<'_> {
        let (app, id) = self.bytes.split_at(self.app_len);
        Topic { kind: self.kind, app, id }
    }
}

impl<'a> Topic<'a> {
    /// The events of a conversation.
    pub(crate) fn conversation(app: &'a (impl AsRef<[u8]> + ?Sized), id: &'a (impl AsRef<[u8]> + ?Sized)) -> Self {
        Self { kind: Kind::Conversation, app: app.as_ref(), id: id.as_ref() }
    }

    /// The head of a user's own stream.
    pub(crate) fn user(app: &'a (impl AsRef<[u8]> + ?Sized), id: &'a (impl AsRef<[u8]> + ?Sized)) -> Self {
        Self { kind: Kind::User, app: app.as_ref(), id: id.as_ref() }
    }

    fn to_key(self) -> Key {
        Key { kind: self.kind, bytes: [self.app, self.id].concat().into(), app_len: self.app.len() }
    }

    fn hint(self, head: u64) -> HeadHint {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let hint = HeadHint { app: text(self.app), head, ..Default::default() };
        match self.kind {
            Kind::Conversation => HeadHint { conversation: text(self.id), ..hint },
            Kind::User => HeadHint { user: text(self.id), ..hint },
        }
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_ref().hash(state);
    }
}

impl Equivalent<Key> for Topic<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        *self == key.as_ref()
    }
}

/// A gateway's stream, or another broker's.
pub(crate) struct Attached {
    id: u64,
    /// Whose it is, for logs.
    pub(crate) name: String,
    /// Frames on their way out.
    pub(crate) queue: Arc<FrameQueue<BrokerFrame>>,
    interests: AtomicUsize,
    /// Heads of conversations and users whose news were dropped since the last beat.
    dropped: Mutex<HashMap<(ShardId, Key), u64>>,
}

impl Attached {
    pub(crate) fn new(name: String) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name,
            queue: FrameQueue::new(limits::GATEWAY_LIVE_BYTES),
            interests: AtomicUsize::new(0),
            dropped: Mutex::default(),
        })
    }

    /// Queues an answer.
    pub(crate) fn answer(&self, frame: Frame, bytes: usize) {
        self.queue.push(BrokerFrame { frame: Some(frame) }, bytes + FRAME_BYTES);
    }

    fn live(&self, shard: ShardId, run: &Run<'_>, metrics: &Metrics) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let records = run.records.iter().map(Bytes::len).sum::<usize>();
        let bytes = records + run.topic.app.len() + run.topic.id.len() + FRAME_BYTES;
        let live = Live {
            shard: shard.0,
            app: text(run.topic.app),
            conversation: text(run.topic.id),
            records: run.records.clone(),
        };
        let events = run.records.len() as u64;
        if self.queue.try_push(BrokerFrame { frame: Some(Frame::Live(live)) }, bytes).is_ok() {
            metrics.live_events.inc_by(events);
            return;
        }
        metrics.live_dropped.inc_by(events);
        self.dropped.lock().insert((shard, run.topic.to_key()), run.last_seq);
    }

    fn head(&self, shard: ShardId, topic: Topic<'_>, head: u64) {
        let hint = topic.hint(head);
        let bytes = hint.encoded_len() + FRAME_BYTES;
        if self.queue.try_push(BrokerFrame { frame: Some(Frame::Head(hint)) }, bytes).is_err() {
            self.dropped.lock().insert((shard, topic.to_key()), head);
        }
    }

    fn take_dropped(&self, shard: ShardId) -> Vec<HeadHint> {
        let mut dropped = self.dropped.lock();
        let hints = dropped.extract_if(|(of, _), _| *of == shard).map(|((_, key), head)| key.as_ref().hint(head));
        let mut hints: Vec<_> = hints.collect();
        // A map's order is drawn anew in every process; what goes out must not be.
        hints.sort_unstable_by(|a, b| (&a.app, &a.conversation, &a.user).cmp(&(&b.app, &b.conversation, &b.user)));
        hints
    }
}

/// What a frame costs besides its bytes.
const FRAME_BYTES: usize = 48;

/// Events of one conversation that lie together in an entry.
struct Run<'a> {
    topic: Topic<'a>,
    last_seq: u64,
    records: Vec<Bytes>,
}

/// The interests in one shard's conversations and users.
pub(crate) struct ShardInterest {
    shard: ShardId,
    state: Mutex<State>,
    watched: Watched,
}

/// The shards of a broker in which any gateway is interested.
pub(crate) type Watched = Arc<Mutex<BTreeSet<ShardId>>>;

/// A stream's interest in one topic.
struct Interested {
    stream: Arc<Attached>,
    /// Of the newest registration.
    generation: Generation,
}

/// Tells the registrations of one topic by one stream apart.
pub(crate) type Generation = u64;

#[derive(Default)]
struct State {
    topics: HashMap<Key, Vec<Interested>>,
    next_generation: Generation,
    /// Streams with interest in the shard, with how many.
    streams: BTreeMap<u64, (Arc<Attached>, usize)>,
}

impl ShardInterest {
    pub(crate) fn new(shard: ShardId, watched: Watched) -> Self {
        Self { shard, state: Mutex::default(), watched }
    }

    /// From now on the stream gets everything of the topic that this leader applies. `None`: it is new there, and the
    /// stream has as many interests as it may have.
    pub(crate) fn add(&self, stream: &Arc<Attached>, topic: Topic<'_>) -> Option<Generation> {
        let mut state = self.state.lock();
        let generation = state.next_generation;
        state.next_generation += 1;
        let known = state.topics.get_mut(&topic).and_then(|all| all.iter_mut().find(|s| s.stream.id == stream.id));
        if let Some(known) = known {
            known.generation = generation;
            return Some(generation);
        }
        if stream.interests.load(Ordering::Relaxed) >= limits::GATEWAY_INTERESTS {
            return None;
        }
        let interested = Interested { stream: stream.clone(), generation };
        state.topics.entry(topic.to_key()).or_default().push(interested);
        stream.interests.fetch_add(1, Ordering::Relaxed);
        state.streams.entry(stream.id).or_insert_with(|| (stream.clone(), 0)).1 += 1;
        self.note(&state);
        Some(generation)
    }

    /// No more of the topic for this stream.
    pub(crate) fn remove(&self, stream: &Attached, topic: Topic<'_>) {
        self.remove_if(stream, topic, |_| true);
    }

    /// A registration came to nothing. One that came after it stands.
    pub(crate) fn withdraw(&self, stream: &Attached, topic: Topic<'_>, generation: Generation) {
        self.remove_if(stream, topic, |newest| newest == generation);
    }

    fn remove_if(&self, stream: &Attached, topic: Topic<'_>, which: impl Fn(Generation) -> bool) {
        let mut state = self.state.lock();
        let Some(streams) = state.topics.get_mut(&topic) else { return };
        let before = streams.len();
        streams.retain(|s| s.stream.id != stream.id || !which(s.generation));
        if streams.len() == before {
            return;
        }
        if streams.is_empty() {
            state.topics.remove(&topic);
        }
        stream.interests.fetch_sub(1, Ordering::Relaxed);
        if let Some((_, count)) = state.streams.get_mut(&stream.id) {
            *count -= 1;
            if *count == 0 {
                state.streams.remove(&stream.id);
                self.note(&state);
                drop(stream.take_dropped(self.shard));
            }
        }
    }

    /// The stream is gone.
    pub(crate) fn forget(&self, stream: &Attached) {
        let mut state = self.state.lock();
        if state.streams.remove(&stream.id).is_none() {
            return;
        }
        self.note(&state);
        state.topics.retain(|_, streams| {
            streams.retain(|s| s.stream.id != stream.id);
            !streams.is_empty()
        });
    }

    /// Carries an entry's events and heads to whoever wants them. One lock per entry.
    pub(crate) fn fan_out(&self, effects: &[Effect], metrics: &Metrics) {
        let state = self.state.lock();
        if state.topics.is_empty() {
            return;
        }
        let mut run: Option<Run<'_>> = None;
        for effect in effects {
            let (app, conversation, seq, record) = match effect {
                Effect::FanOut { app, conversation, seq, record } => (app, conversation, seq, record),
                Effect::UserChanged { app, user, head } => {
                    let topic = Topic::user(app, user);
                    let streams = state.topics.get(&topic).into_iter().flatten();
                    streams.for_each(|interested| interested.stream.head(self.shard, topic, head.0));
                    continue;
                }
                _ => continue,
            };
            let topic = Topic::conversation(app, conversation);
            match &mut run {
                Some(run) if run.topic == topic => {
                    run.last_seq = seq.0;
                    run.records.push(record.clone());
                }
                _ => {
                    self.carry(&state, run.take(), metrics);
                    let wanted = state.topics.contains_key(&topic);
                    run = wanted.then(|| Run { topic, last_seq: seq.0, records: vec![record.clone()] });
                }
            }
        }
        self.carry(&state, run, metrics);
    }

    fn carry(&self, state: &State, run: Option<Run<'_>>, metrics: &Metrics) {
        let Some(run) = run else { return };
        let streams = state.topics.get(&run.topic).into_iter().flatten();
        streams.for_each(|interested| interested.stream.live(self.shard, &run, metrics));
    }

    /// Under the lock of the state, whenever streams have come or gone.
    fn note(&self, state: &State) {
        let mut watched = self.watched.lock();
        match state.streams.is_empty() {
            true => watched.remove(&self.shard),
            false => watched.insert(self.shard),
        };
    }

    /// Tells every interested stream that this replica still leads, with the heads of what was dropped.
    pub(crate) fn beat(&self, term: u64, lease_ms: u32) {
        let streams: Vec<_> = self.state.lock().streams.values().map(|(stream, _)| stream.clone()).collect();
        for stream in streams {
            let heads = stream.take_dropped(self.shard);
            let bytes = heads.iter().map(HeadHint::encoded_len).sum();
            let beat = ShardBeat { shard: self.shard.0, term, lease_ms, heads, closing: false };
            stream.answer(Frame::Beat(beat), bytes);
        }
    }

    /// Tells every interested stream that this replica leads no more, and forgets all interest.
    pub(crate) fn close(&self, term: u64) {
        let (topics, streams) = {
            let mut state = self.state.lock();
            // The count goes on: a registration of before must not look like one of after.
            let all = (std::mem::take(&mut state.topics), std::mem::take(&mut state.streams));
            self.note(&state);
            all
        };
        drop(topics);
        for (stream, count) in streams.into_values() {
            stream.interests.fetch_sub(count, Ordering::Relaxed);
            drop(stream.take_dropped(self.shard));
            let beat = ShardBeat { shard: self.shard.0, term, closing: true, ..Default::default() };
            stream.answer(Frame::Beat(beat), 0);
        }
    }

    /// The streams with interest here, by id.
    #[cfg(test)]
    fn streams(&self) -> hashbrown::HashSet<u64> {
        self.state.lock().streams.keys().copied().collect()
    }
}

#[cfg(test)]
#[path = "interest_tests.rs"]
mod tests;
