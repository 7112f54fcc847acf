//! One outgoing stream to one peer on one lane, shared by all shards: requests carry ids, answers come in any order.
//! Must never leave a request waiting on a stream that is gone: when it breaks, everything pending fails at once.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt, Stream, StreamExt};
use parking_lot::Mutex;
use rand::Rng;
use stentor_engine::limits;
use stentor_proto::{
    ids::{BrokerId, Incarnation, ReplicaId, ShardId},
    internal::{self, PeerBatch, PeerFrame, peer_client::PeerClient, peer_frame::Message},
};
use stentor_transport::{Host, grpc::Channel};
use thiserror::Error;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    clocks::Clocks,
    metrics::Metrics,
    queue::{Batches, FrameQueue},
    replaced::{REPLACED, Replaced},
};

/// Which of the streams of a pair of brokers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Heartbeats, votes, transfers: never behind a large append.
    Control,
    /// Log entries.
    Append,
}

/// The shortest and the longest pause between two attempts to connect.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));
/// A wall clock rides along when the last one is older than this; stamps want one of the last 2 s.
const BEAT_EVERY: Duration = Duration::from_millis(300);

/// Why a request has no answer. Whether the peer has acted on it is unknown, but for `NotConnected`.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum LinkError {
    /// There is no stream: nothing was sent.
    #[error("not connected to broker {0}")]
    NotConnected(BrokerId),
    /// The stream ended before the answer came.
    #[error("the stream to broker {0} broke")]
    Broken(BrokerId),
    /// The peer refused.
    #[error("broker {0} refused: {1}")]
    Refused(BrokerId, String),
}

/// A peer's answer.
pub(crate) type Answer = Result<Message, LinkError>;

enum Waiter {
    Once(oneshot::Sender<Answer>),
    Session(mpsc::UnboundedSender<(u64, Answer)>),
}

/// The outgoing stream; connects, and connects again, by itself.
pub(crate) struct Link {
    peer: BrokerId,
    next_id: AtomicU64,
    state: Mutex<State>,
    replaced: Arc<Replaced>,
}

#[derive(Default)]
struct State {
    queue: Option<Arc<FrameQueue<PeerFrame>>>,
    /// In the order in which they were asked: that is the order in which they fail.
    pending: BTreeMap<u64, Waiter>,
}

/// Whom a request is from and to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) shard: ShardId,
    pub(crate) from: ReplicaId,
    pub(crate) to: ReplicaId,
}

impl Link {
    pub(crate) fn new(peer: BrokerId, replaced: &Arc<Replaced>) -> Arc<Self> {
        Arc::new(Self { peer, next_id: AtomicU64::new(1), state: Mutex::default(), replaced: replaced.clone() })
    }

    fn frame(&self, route: Route, id: u64, message: Message) -> PeerFrame {
        let (from, to) = (route.from.to_u64(), route.to.to_u64());
        PeerFrame { id, shard: route.shard.0, from, to, message: Some(message) }
    }

    /// One question, one answer.
    pub(crate) async fn ask(&self, route: Route, message: Message) -> Answer {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        let queue = self.register(id, Waiter::Once(sender))?;
        // A caller that gives up (its timeout) must leave nothing behind.
        let _forget = Forget { link: self, ids: [id] };
        if !queue.push(self.frame(route, id, message), limits::PEER_SMALL_FRAME_BYTES) {
            return Err(LinkError::Broken(self.peer));
        }
        receiver.await.unwrap_or(Err(LinkError::Broken(self.peer)))
    }

    /// A request of a session; waits for room in the queue. Its answer goes to `answers` under the id returned.
    pub(crate) async fn send(
        &self,
        route: Route,
        message: Message,
        bytes: usize,
        answers: &mpsc::UnboundedSender<(u64, Answer)>,
    ) -> Result<u64, LinkError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let queue = self.register(id, Waiter::Session(answers.clone()))?;
        if !queue.push_when_room(self.frame(route, id, message), bytes).await {
            self.forget(&[id]);
            return Err(LinkError::Broken(self.peer));
        }
        Ok(id)
    }

    fn register(&self, id: u64, waiter: Waiter) -> Result<Arc<FrameQueue<PeerFrame>>, LinkError> {
        let mut state = self.state.lock();
        let queue = state.queue.clone().ok_or(LinkError::NotConnected(self.peer))?;
        state.pending.insert(id, waiter);
        Ok(queue)
    }

    /// Nobody waits for these answers any more.
    pub(crate) fn forget(&self, ids: &[u64]) {
        let mut state = self.state.lock();
        ids.iter().for_each(|id| {
            state.pending.remove(id);
        });
    }

    fn answered(&self, id: u64, answer: Answer) {
        let waiter = self.state.lock().pending.remove(&id);
        match waiter {
            Some(Waiter::Once(sender)) => drop(sender.send(answer)),
            Some(Waiter::Session(sender)) => drop(sender.send((id, answer))),
            None => {}
        }
    }

    pub(super) fn connected(&self, queue: Arc<FrameQueue<PeerFrame>>) {
        self.state.lock().queue = Some(queue);
    }

    /// The stream is gone: everything pending fails.
    pub(crate) fn broken(&self) {
        let pending = {
            let mut state = self.state.lock();
            if let Some(queue) = state.queue.take() {
                queue.close();
            }
            std::mem::take(&mut state.pending)
        };
        for (id, waiter) in pending {
            let answer = Err(LinkError::Broken(self.peer));
            match waiter {
                Waiter::Once(sender) => drop(sender.send(answer)),
                Waiter::Session(sender) => drop(sender.send((id, answer))),
            }
        }
    }

    pub(super) fn received(&self, frame: PeerFrame, clocks: &Clocks) {
        match frame.message {
            Some(Message::Beat(beat)) => clocks.heard(self.peer, beat.wall_ms, Instant::now()),
            Some(Message::Error(error)) => {
                if error.reason == REPLACED {
                    self.replaced.note(ShardId(frame.shard));
                }
                let refused = LinkError::Refused(self.peer, format!("{}: {}", error.reason, error.message));
                self.answered(frame.id, Err(refused));
            }
            Some(message) => self.answered(frame.id, Ok(message)),
            None => {}
        }
    }
}

struct Forget<'a> {
    link: &'a Link,
    ids: [u64; 1],
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.link.forget(&self.ids);
    }
}

/// How often what else runs may run before a batch of the control lane is closed: the heartbeats of all shards, and their
/// answers, are made by as many tasks at the same moment. Costs no time when nothing else runs.
const GATHER: usize = 2;

/// The batches of a queue; on the control lane a little larger and fewer.
fn gathered(queue: Arc<FrameQueue<PeerFrame>>, lane: Lane) -> impl Stream<Item = Vec<PeerFrame>> + Send + 'static {
    let rounds = if lane == Lane::Control { GATHER } else { 0 };
    futures_util::stream::unfold(Batches::of(queue), move |mut batches| async move {
        let mut frames = batches.next().await?;
        for _ in 0..rounds {
            tokio::task::yield_now().await;
            if let Some(more) = batches.next().now_or_never().flatten() {
                frames.extend(more);
            }
        }
        Some((frames, batches))
    })
}

/// Frames of a queue as gRPC messages; on the control lane this process's wall clock rides along now and then, but
/// never alone: a silent leader must stay silent.
pub(crate) fn batches(
    queue: Arc<FrameQueue<PeerFrame>>,
    lane: Lane,
    own: BrokerId,
    host: Host,
) -> impl Stream<Item = PeerBatch> + Send + 'static {
    let from = ReplicaId { broker: own, incarnation: Incarnation(0) }.to_u64();
    let mut last_beat: Option<Instant> = None;
    gathered(queue, lane).map(move |mut frames| {
        let due = last_beat.is_none_or(|at| at.elapsed() >= BEAT_EVERY);
        if lane == Lane::Control && due {
            last_beat = Some(Instant::now());
            let beat = internal::Beat { wall_ms: host.wall_ms() };
            frames.push(PeerFrame { from, message: Some(Message::Beat(beat)), ..Default::default() });
        }
        PeerBatch { frames }
    })
}

/// Whose link, and how it gets to its peer.
pub(crate) struct Way {
    pub(crate) link: Arc<Link>,
    pub(crate) own: BrokerId,
    pub(crate) lane: Lane,
    pub(crate) channel: Channel,
    pub(crate) host: Host,
}

/// Keeps a link connected until the task is dropped. `on_connect` runs after every successful attempt.
pub(crate) async fn run(
    way: Way,
    clocks: Arc<Clocks>,
    metrics: Arc<Metrics>,
    on_connect: impl Fn(BrokerId, Lane) + Send,
) {
    let (link, lane) = (&way.link, way.lane);
    let mut pause = PAUSE.0;
    loop {
        let queue = FrameQueue::new(limits::PEER_QUEUE_BYTES);
        let started = Instant::now();
        match open(&way, queue.clone()).await {
            Ok(mut inbound) => {
                metrics.peer_connects.inc();
                link.connected(queue);
                on_connect(link.peer, lane);
                while let Ok(Some(batch)) = inbound.message().await {
                    batch.frames.into_iter().for_each(|frame| link.received(frame, &clocks));
                }
            }
            Err(status) => tracing::debug!(peer = %link.peer, ?lane, %status, "cannot connect"),
        }
        link.broken();
        if started.elapsed() > PAUSE.1 {
            pause = PAUSE.0;
        }
        tokio::time::sleep(pause.mul_f64(way.host.rng().random_range(0.5..1.0))).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn open(way: &Way, queue: Arc<FrameQueue<PeerFrame>>) -> Result<tonic::Streaming<PeerBatch>, tonic::Status> {
    let mut client = PeerClient::new(way.channel.clone())
        .max_decoding_message_size(limits::PEER_MESSAGE_BYTES)
        .max_encoding_message_size(limits::PEER_MESSAGE_BYTES);
    let outgoing = batches(queue, way.lane, way.own, way.host.clone());
    let response = match way.lane {
        Lane::Control => client.control(outgoing).await?,
        Lane::Append => client.append(outgoing).await?,
    };
    Ok(response.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route() -> Route {
        Route { shard: ShardId(1), from: ReplicaId::default(), to: ReplicaId::default() }
    }

    #[tokio::test]
    async fn what_waits_on_a_broken_stream_fails_at_once() {
        let link = Link::new(BrokerId(2), &Arc::default());
        let vote = || Message::Vote(internal::VoteRequest::default());
        assert_eq!(link.ask(route(), vote()).await, Err(LinkError::NotConnected(BrokerId(2))));
        link.connected(FrameQueue::new(1000));
        let asking = tokio::spawn({
            let link = link.clone();
            async move { link.ask(route(), vote()).await }
        });
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let id = link.send(route(), vote(), 10, &sender).await.unwrap();
        while link.state.lock().pending.len() < 2 {
            tokio::task::yield_now().await;
        }
        link.broken();
        assert_eq!(asking.await.unwrap(), Err(LinkError::Broken(BrokerId(2))));
        assert_eq!(receiver.recv().await, Some((id, Err(LinkError::Broken(BrokerId(2))))));
    }

    #[test]
    fn whoever_is_refused_as_replaced_notes_the_shard() {
        let replaced = Arc::<Replaced>::default();
        let link = Link::new(BrokerId(2), &replaced);
        let error = |reason: &str| PeerFrame {
            shard: 7,
            message: Some(Message::Error(internal::PeerError { reason: reason.into(), ..Default::default() })),
            ..Default::default()
        };
        link.received(error("NO_REPLICA"), &Clocks::default());
        assert!(!replaced.has(ShardId(7)));
        link.received(error(REPLACED), &Clocks::default());
        assert!(replaced.has(ShardId(7)) && !replaced.has(ShardId(8)));
    }

    #[tokio::test]
    async fn a_caller_that_gave_up_leaves_nothing_behind() {
        let link = Link::new(BrokerId(2), &Arc::default());
        link.connected(FrameQueue::new(1000));
        let asking = tokio::spawn({
            let link = link.clone();
            async move { link.ask(route(), Message::Vote(internal::VoteRequest::default())).await }
        });
        while link.state.lock().pending.is_empty() {
            tokio::task::yield_now().await;
        }
        asking.abort();
        let _ = asking.await;
        assert!(link.state.lock().pending.is_empty());
    }

    #[tokio::test]
    async fn wall_clocks_ride_along_but_never_alone() {
        let queue = FrameQueue::new(1000);
        let mut control = batches(queue.clone(), Lane::Control, BrokerId(1), Host::real()).boxed();
        assert!(futures_util::poll!(control.next()).is_pending());
        queue.push(PeerFrame { id: 1, ..Default::default() }, 1);
        queue.push(PeerFrame { id: 2, ..Default::default() }, 1);
        let batch = control.next().await.unwrap();
        assert_eq!(batch.frames.len(), 3);
        assert!(matches!(batch.frames[2].message, Some(Message::Beat(_))));
    }

    #[tokio::test]
    async fn what_many_tasks_send_at_one_moment_is_one_batch_of_the_control_lane() {
        let queue = FrameQueue::new(1000);
        let control = batches(queue.clone(), Lane::Control, BrokerId(1), Host::real());
        let first = tokio::spawn(async move { Box::pin(control).next().await });
        tokio::task::yield_now().await;
        for id in 1..=5 {
            let queue = queue.clone();
            tokio::spawn(async move { queue.push(PeerFrame { id, ..Default::default() }, 1) });
        }
        // Five heartbeats and a clock.
        assert_eq!(first.await.unwrap().unwrap().frames.len(), 6);
    }
}
