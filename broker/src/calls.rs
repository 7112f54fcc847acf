//! This broker as a caller of another one: the stream that gateways use, for calls that came to the wrong broker. Must
//! never say that something was not proposed when it may have been.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use parking_lot::Mutex;
use rand::Rng;
use stentor_engine::limits;
use stentor_proto::{
    Message,
    ids::BrokerId,
    internal::{
        AttachHello, BrokerFrame, GatewayBatch, GatewayFrame, broker_client::BrokerClient, broker_frame::Frame as In,
        gateway_frame::Frame as Out,
    },
};
use stentor_raft_store::Store;
use stentor_transport::{Host, grpc::Channel};
use tokio::{sync::oneshot, time::Instant};

use crate::queue::{Batches, FrameQueue};

/// The shortest and the longest pause between two attempts to connect.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Why a call has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// Nothing was sent.
    NotSent,
    /// It was sent, and what became of it is unknown.
    Unknown,
}

/// The calls to one peer.
pub(crate) struct Calls {
    peer: BrokerId,
    next_id: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    queue: Option<Arc<FrameQueue<GatewayFrame>>>,
    /// In the order of the calls: that is the order in which their callers hear of a broken stream.
    pending: BTreeMap<u64, oneshot::Sender<In>>,
}

impl Calls {
    pub(crate) fn new(peer: BrokerId) -> Arc<Self> {
        Arc::new(Self { peer, next_id: AtomicU64::new(1), state: Mutex::default() })
    }

    /// Sends the frame that `make` gives for an id, and waits for its answer.
    pub(crate) async fn call(&self, make: impl FnOnce(u64) -> Out) -> Result<In, NoAnswer> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let frame = GatewayFrame { frame: Some(make(id)) };
        let bytes = frame.encoded_len();
        let (sender, receiver) = oneshot::channel();
        let queue = {
            let mut state = self.state.lock();
            let queue = state.queue.clone().ok_or(NoAnswer::NotSent)?;
            if state.pending.len() >= limits::FORWARDED_CALLS {
                return Err(NoAnswer::NotSent);
            }
            state.pending.insert(id, sender);
            queue
        };
        let _forget = Forget(self, id);
        if queue.try_push(frame, bytes).is_err() {
            return Err(NoAnswer::NotSent);
        }
        receiver.await.map_err(|_| NoAnswer::Unknown)
    }

    fn received(&self, frame: BrokerFrame) {
        let Some(frame) = frame.frame else { return };
        let id = match &frame {
            In::Proposed(done) => done.id,
            In::Read(done) => done.id,
            In::Heads(done) => done.id,
            In::Lookup(done) => done.id,
            In::Interest(_) | In::Live(_) | In::Beat(_) | In::Head(_) => return,
        };
        let waiting = self.state.lock().pending.remove(&id);
        if let Some(waiting) = waiting {
            drop(waiting.send(frame));
        }
    }

    /// The stream is gone, and with it every answer.
    pub(crate) fn broken(&self) {
        let mut state = self.state.lock();
        if let Some(queue) = state.queue.take() {
            queue.close();
        }
        // Dropping the senders tells the callers.
        state.pending.clear();
    }
}

struct Forget<'a>(&'a Calls, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.state.lock().pending.remove(&self.1);
    }
}

/// Keeps the stream open until the task is dropped.
pub(crate) async fn run(calls: Arc<Calls>, channel: Channel, name: String, store: Arc<Store>, host: Host) {
    let mut pause = PAUSE.0;
    loop {
        let started = Instant::now();
        if let Err(status) = attached(&calls, channel.clone(), &name, &store).await {
            tracing::debug!(peer = %calls.peer, %status, "cannot attach");
        }
        calls.broken();
        if started.elapsed() > PAUSE.1 {
            pause = PAUSE.0;
        }
        tokio::time::sleep(pause.mul_f64(host.rng().random_range(0.5..1.0))).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

async fn attached(calls: &Calls, channel: Channel, name: &str, store: &Store) -> Result<(), tonic::Status> {
    let queue = FrameQueue::new(limits::PEER_QUEUE_BYTES);
    let cluster_id = store.identity().map(|identity| identity.cluster_id).unwrap_or_default();
    let hello = AttachHello { gateway: name.to_owned(), cluster_id };
    queue.push(GatewayFrame { frame: Some(Out::Hello(hello)) }, 0);
    let mut client = BrokerClient::new(channel)
        .max_decoding_message_size(limits::PEER_MESSAGE_BYTES)
        .max_encoding_message_size(limits::PEER_MESSAGE_BYTES);
    let outgoing = Batches::of(queue.clone()).map(|frames| GatewayBatch { frames });
    let mut inbound = client.attach(outgoing).await?.into_inner();
    calls.state.lock().queue = Some(queue);
    while let Some(batch) = inbound.message().await? {
        batch.frames.into_iter().for_each(|frame| calls.received(frame));
    }
    Ok(())
}
