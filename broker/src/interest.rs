//! Which gateways want a conversation's events now, and carrying them there: one copy per gateway. Must never let a
//! slow gateway cost memory: beyond its budget events are dropped, and their head is told with the next beat.

use std::{
    collections::BTreeMap,
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
    Bytes,
    ids::ShardId,
    internal::{BrokerFrame, HeadHint, Live, ShardBeat, broker_frame::Frame},
};

use crate::{metrics::Metrics, queue::FrameQueue};

/// A conversation of an app.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    /// App, then conversation.
    bytes: Box<[u8]>,
    app_len: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct KeyRef<'a> {
    app: &'a [u8],
    conversation: &'a [u8],
}

impl Key {
    fn as_ref(&self) -> KeyRef<'_> {
        let (app, conversation) = self.bytes.split_at(self.app_len);
        KeyRef { app, conversation }
    }
}

impl KeyRef<'_> {
    fn to_key(self) -> Key {
        Key { bytes: [self.app, self.conversation].concat().into(), app_len: self.app.len() }
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_ref().hash(state);
    }
}

impl Hash for KeyRef<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.app.hash(state);
        self.conversation.hash(state);
    }
}

impl Equivalent<Key> for KeyRef<'_> {
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
    /// Heads of conversations whose events were dropped since the last beat.
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

    /// Whether one more interest is within the bound.
    pub(crate) fn may_add_interest(&self) -> bool {
        self.interests.load(Ordering::Relaxed) < limits::GATEWAY_INTERESTS
    }

    fn live(&self, shard: ShardId, run: &Run<'_>, metrics: &Metrics) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let records = run.records.iter().map(Bytes::len).sum::<usize>();
        let bytes = records + run.key.app.len() + run.key.conversation.len() + FRAME_BYTES;
        let live = Live {
            shard: shard.0,
            app: text(run.key.app),
            conversation: text(run.key.conversation),
            records: run.records.clone(),
        };
        let events = run.records.len() as u64;
        if self.queue.try_push(BrokerFrame { frame: Some(Frame::Live(live)) }, bytes).is_ok() {
            metrics.live_events.inc_by(events);
            return;
        }
        metrics.live_dropped.inc_by(events);
        self.dropped.lock().insert((shard, run.key.to_key()), run.last_seq);
    }

    fn take_dropped(&self, shard: ShardId) -> Vec<HeadHint> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut dropped = self.dropped.lock();
        let hints = dropped.extract_if(|(of, _), _| *of == shard).map(|((_, key), head)| {
            let KeyRef { app, conversation } = key.as_ref();
            HeadHint { app: text(app), conversation: text(conversation), head }
        });
        let mut hints: Vec<_> = hints.collect();
        // A map's order is drawn anew in every process; what goes out must not be.
        hints.sort_unstable_by(|a, b| (&a.app, &a.conversation).cmp(&(&b.app, &b.conversation)));
        hints
    }
}

/// What a frame costs besides its bytes.
const FRAME_BYTES: usize = 48;

/// Events of one conversation that lie together in an entry.
struct Run<'a> {
    key: KeyRef<'a>,
    last_seq: u64,
    records: Vec<Bytes>,
}

/// The interests in one shard's conversations.
pub(crate) struct ShardInterest {
    shard: ShardId,
    state: Mutex<State>,
}

/// A stream's interest in one conversation.
struct Interested {
    stream: Arc<Attached>,
    /// Of the newest registration.
    generation: Generation,
}

/// Tells the registrations of one conversation by one stream apart.
pub(crate) type Generation = u64;

#[derive(Default)]
struct State {
    conversations: HashMap<Key, Vec<Interested>>,
    next_generation: Generation,
    /// Streams with interest in the shard, with how many.
    streams: BTreeMap<u64, (Arc<Attached>, usize)>,
}

impl ShardInterest {
    pub(crate) fn new(shard: ShardId) -> Self {
        Self { shard, state: Mutex::default() }
    }

    /// From now on the stream gets every event of the conversation that this leader applies.
    pub(crate) fn add(&self, stream: &Arc<Attached>, app: &str, conversation: &str) -> Generation {
        let mut state = self.state.lock();
        let generation = state.next_generation;
        state.next_generation += 1;
        let key = KeyRef { app: app.as_bytes(), conversation: conversation.as_bytes() };
        let streams = state.conversations.entry(key.to_key()).or_default();
        if let Some(known) = streams.iter_mut().find(|s| s.stream.id == stream.id) {
            known.generation = generation;
            return generation;
        }
        streams.push(Interested { stream: stream.clone(), generation });
        stream.interests.fetch_add(1, Ordering::Relaxed);
        state.streams.entry(stream.id).or_insert_with(|| (stream.clone(), 0)).1 += 1;
        generation
    }

    /// No more events of the conversation for this stream.
    pub(crate) fn remove(&self, stream: &Attached, app: &str, conversation: &str) {
        self.remove_if(stream, app, conversation, |_| true);
    }

    /// A registration came to nothing. One that came after it stands.
    pub(crate) fn withdraw(&self, stream: &Attached, app: &str, conversation: &str, generation: Generation) {
        self.remove_if(stream, app, conversation, |newest| newest == generation);
    }

    fn remove_if(&self, stream: &Attached, app: &str, conversation: &str, which: impl Fn(Generation) -> bool) {
        let mut state = self.state.lock();
        let key = KeyRef { app: app.as_bytes(), conversation: conversation.as_bytes() };
        let Some(streams) = state.conversations.get_mut(&key) else { return };
        let before = streams.len();
        streams.retain(|s| s.stream.id != stream.id || !which(s.generation));
        if streams.len() == before {
            return;
        }
        if streams.is_empty() {
            state.conversations.remove(&key);
        }
        stream.interests.fetch_sub(1, Ordering::Relaxed);
        if let Some((_, count)) = state.streams.get_mut(&stream.id) {
            *count -= 1;
            if *count == 0 {
                state.streams.remove(&stream.id);
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
        state.conversations.retain(|_, streams| {
            streams.retain(|s| s.stream.id != stream.id);
            !streams.is_empty()
        });
    }

    /// Carries an entry's events to whoever wants them. One lock per entry.
    pub(crate) fn fan_out(&self, effects: &[Effect], metrics: &Metrics) {
        let state = self.state.lock();
        if state.conversations.is_empty() {
            return;
        }
        let mut run: Option<Run<'_>> = None;
        for effect in effects {
            let Effect::FanOut { app, conversation, seq, record } = effect else { continue };
            let key = KeyRef { app, conversation };
            match &mut run {
                Some(run) if run.key == key => {
                    run.last_seq = seq.0;
                    run.records.push(record.clone());
                }
                _ => {
                    self.carry(&state, run.take(), metrics);
                    let wanted = state.conversations.contains_key(&key);
                    run = wanted.then(|| Run { key, last_seq: seq.0, records: vec![record.clone()] });
                }
            }
        }
        self.carry(&state, run, metrics);
    }

    fn carry(&self, state: &State, run: Option<Run<'_>>, metrics: &Metrics) {
        let Some(run) = run else { return };
        let streams = state.conversations.get(&run.key).into_iter().flatten();
        streams.for_each(|interested| interested.stream.live(self.shard, &run, metrics));
    }

    /// Tells every interested stream that this replica still leads, with the heads of what was dropped.
    pub(crate) fn beat(&self, term: u64, lease_ms: u32) {
        let streams: Vec<_> = self.state.lock().streams.values().map(|(stream, _)| stream.clone()).collect();
        for stream in streams {
            let heads = stream.take_dropped(self.shard);
            let bytes = heads.iter().map(|h| h.app.len() + h.conversation.len() + 16).sum();
            let beat = ShardBeat { shard: self.shard.0, term, lease_ms, heads, closing: false };
            stream.answer(Frame::Beat(beat), bytes);
        }
    }

    /// Tells every interested stream that this replica leads no more, and forgets all interest.
    pub(crate) fn close(&self, term: u64) {
        let (conversations, streams) = {
            let mut state = self.state.lock();
            // The count goes on: a registration of before must not look like one of after.
            (std::mem::take(&mut state.conversations), std::mem::take(&mut state.streams))
        };
        drop(conversations);
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
