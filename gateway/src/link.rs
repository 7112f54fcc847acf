//! One `Attach` stream to each broker, opened again with back-off whenever it breaks. Frames go out in the order in
//! which they were queued, in batches. Must never resend: what a broken stream lost is the shards' business.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use rand::Rng;
use stentor_engine::limits;
use stentor_proto::{
    Message,
    ids::BrokerId,
    internal::{
        AttachHello, BrokerBatch, GatewayBatch, GatewayFrame, broker_client::BrokerClient, gateway_frame::Frame,
    },
};
use stentor_transport::grpc::Channel;
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::core::Core;

/// A batch closes here: two of them fill a frame of the transport.
const BATCH_BYTES: usize = 64 * 1024;
const BATCH_FRAMES: usize = 512;
/// Batches that wait for the transport; beyond them frames stay in the queue.
const BATCHES_AHEAD: usize = 4;
/// The largest batch that is accepted from a broker: a page with the largest record, with room.
const MAX_BATCH_BYTES: usize = 16 * 1024 * 1024;
const ATTACH_TIMEOUT: Duration = Duration::from_secs(3);
/// First and longest pause before a broken stream is opened again, in ms.
const REOPEN_MS: (u64, u64) = (20, 1_000);

#[derive(Default)]
struct Queue {
    frames: Vec<GatewayFrame>,
    bytes: usize,
    up: bool,
}

/// The outgoing side of one stream.
#[derive(Default)]
struct Link {
    queue: Mutex<Queue>,
    notify: Notify,
}

impl Link {
    fn send(&self, frames: &mut Vec<GatewayFrame>) -> bool {
        let mut queue = self.queue.lock();
        let bytes: usize = frames.iter().map(frame_bytes).sum();
        if !queue.up || queue.bytes + bytes > limits::LINK_QUEUE_BYTES {
            queue.up = false;
            drop(queue);
            self.notify.notify_one();
            return false;
        }
        queue.bytes += bytes;
        queue.frames.append(frames);
        drop(queue);
        self.notify.notify_one();
        true
    }

    fn set_up(&self, up: bool) {
        *self.queue.lock() = Queue { up, ..Queue::default() };
    }

    /// What waits, or `None` when the stream was given up.
    fn take(&self) -> Option<Vec<GatewayFrame>> {
        let mut queue = self.queue.lock();
        queue.bytes = 0;
        queue.up.then(|| std::mem::take(&mut queue.frames))
    }
}

fn frame_bytes(frame: &GatewayFrame) -> usize {
    match &frame.frame {
        Some(Frame::Propose(propose)) => propose.command.len() + 32,
        _ => frame.encoded_len(),
    }
}

/// The streams to all brokers of the configuration.
pub(crate) struct Links {
    links: BTreeMap<BrokerId, Link>,
}

impl Links {
    pub(crate) fn new(brokers: impl Iterator<Item = BrokerId>) -> Self {
        Self { links: brokers.map(|broker| (broker, Link::default())).collect() }
    }

    /// Whether frames can be queued for this broker.
    pub(crate) fn is_up(&self, broker: BrokerId) -> bool {
        self.links.get(&broker).is_some_and(|link| link.queue.lock().up)
    }

    /// Queues frames in their order. False when the stream is down: nothing was queued.
    pub(crate) fn send(&self, broker: BrokerId, frames: &mut Vec<GatewayFrame>) -> bool {
        self.links.get(&broker).is_some_and(|link| link.send(frames))
    }

    /// How many streams are up.
    pub(crate) fn up(&self) -> usize {
        self.links.values().filter(|link| link.queue.lock().up).count()
    }
}

/// Keeps the stream to one broker open until the task is dropped.
pub(crate) async fn run(core: Arc<Core>, broker: BrokerId, channel: Channel) {
    core.placement_known().await;
    let mut failures = 0u32;
    loop {
        match attach(&core, channel.clone()).await {
            Ok((batches, inbound)) => {
                failures = 0;
                carry(&core, broker, batches, inbound).await;
            }
            Err(status) => tracing::debug!(%broker, %status, "cannot attach"),
        }
        let ceiling = (REOPEN_MS.0 << failures.min(10)).min(REOPEN_MS.1);
        failures = failures.saturating_add(1);
        // Half fixed, half drawn: gateways that lost the same broker do not come back at the same moment.
        let pause = ceiling / 2 + core.host.rng().random_range(0..=ceiling / 2);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

type Attached = (mpsc::Sender<GatewayBatch>, Streaming<BrokerBatch>);

async fn attach(core: &Core, channel: Channel) -> Result<Attached, Status> {
    let (batches, outbound) = mpsc::channel(BATCHES_AHEAD);
    let hello = AttachHello { gateway: core.config.name.clone(), cluster_id: core.cluster_id() };
    let hello = GatewayBatch { frames: vec![GatewayFrame { frame: Some(Frame::Hello(hello)) }] };
    let gone = |_| Status::cancelled("the stream ended at once");
    batches.try_send(hello).map_err(gone)?;
    let mut client = BrokerClient::new(channel).max_decoding_message_size(MAX_BATCH_BYTES);
    let late = |_| Status::deadline_exceeded("no answer to attach");
    let inbound = timeout(ATTACH_TIMEOUT, client.attach(ReceiverStream::new(outbound))).await.map_err(late)??;
    Ok((batches, inbound.into_inner()))
}

async fn carry(
    core: &Core,
    broker: BrokerId,
    batches: mpsc::Sender<GatewayBatch>,
    mut inbound: Streaming<BrokerBatch>,
) {
    let Some(link) = core.links.links.get(&broker) else { return };
    link.set_up(true);
    tracing::info!(%broker, "attached");
    core.link_up(broker);
    let read = async {
        loop {
            match inbound.message().await {
                Ok(Some(batch)) => core.take(broker, batch),
                Ok(None) => return "closed by the broker".to_owned(),
                Err(status) => return status.to_string(),
            }
        }
    };
    let why = tokio::select! {
        why = read => why,
        why = write(link, &batches) => why.to_owned(),
    };
    link.set_up(false);
    tracing::info!(%broker, why, "stream ended");
    core.link_down(broker);
}

async fn write(link: &Link, batches: &mpsc::Sender<GatewayBatch>) -> &'static str {
    loop {
        link.notify.notified().await;
        let Some(frames) = link.take() else { return "the queue overflowed" };
        let mut batch = GatewayBatch::default();
        let mut bytes = 0;
        for frame in frames {
            bytes += frame_bytes(&frame);
            batch.frames.push(frame);
            if bytes >= BATCH_BYTES || batch.frames.len() >= BATCH_FRAMES {
                bytes = 0;
                if batches.send(std::mem::take(&mut batch)).await.is_err() {
                    return "the transport ended";
                }
            }
        }
        if !batch.frames.is_empty() && batches.send(batch).await.is_err() {
            return "the transport ended";
        }
    }
}
