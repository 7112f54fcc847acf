//! One sender, many devices, each with a connection of its own to the server that leads the stream. Must never count a
//! delivery before its message is in the device's hands.

use std::time::Instant;

use async_nats::{Client, Message, jetstream, jetstream::consumer};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, future::BoxFuture, stream};
use tokio::task::{AbortHandle, JoinHandle};

use super::{Led, Nats};
use crate::{
    Outcome, Timing,
    pace::Schedule,
    peers::{Gauge, PeerError, spread::Spread},
    scenario::Stop,
};

/// Connections that are made at the same time.
const CONNECTING: usize = 16;
/// Deliveries that a device takes at once, as long as they are there.
const AT_ONCE: usize = 64;

/// Ends a device's task with it.
struct Device(AbortHandle);

impl Drop for Device {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn device<T>(task: &JoinHandle<T>) -> Device {
    Device(task.abort_handle())
}

fn failed(what: &str) -> impl Fn(&dyn std::fmt::Display) -> PeerError + '_ {
    move |error| PeerError::failed(what, error)
}

/// Sends the next body; the errors of an acknowledgement that nobody waits for show as missing deliveries.
type Publish = Box<dyn FnMut(Bytes) -> BoxFuture<'static, Result<(), String>> + Send>;

impl Nats {
    /// Durable push consumers with explicit acknowledgements, on all three servers each.
    pub(super) async fn cursors(
        &self,
        run: &str,
        devices: usize,
        window: usize,
        timing: Timing,
    ) -> Result<Outcome, PeerError> {
        let stream = self.one_stream(run).await?;
        let spread = Spread::new(devices, Some(window));
        let connected = stream::iter(0..devices).map(|n| {
            let (stream, spread) = (&stream, spread.clone());
            async move {
                let context = jetstream::new(self.connect(stream.server).await?);
                let config = consumer::push::Config {
                    durable_name: Some(format!("device-{n}")),
                    deliver_subject: format!("to.{run}.{n}"),
                    ack_policy: consumer::AckPolicy::Explicit,
                    num_replicas: super::SERVERS,
                    max_ack_pending: window as i64,
                    ..Default::default()
                };
                let made = context.create_consumer_on_stream(config, stream.name.as_str()).await;
                let made = made.map_err(|e| failed("make a durable consumer")(&e))?;
                let messages = made.messages().await.map_err(|e| failed("subscribe")(&e))?;
                Ok::<_, PeerError>(device(&tokio::spawn(acknowledging(n, messages, spread))))
            }
        });
        let connected: Vec<Device> = connected.buffer_unordered(CONNECTING).try_collect().await?;
        self.spread(&spread, self.publish_into(&stream), None, timing, connected, run).await
    }

    /// Ordered consumers: from the log, without any memory of who has what.
    pub(super) async fn ordered(
        &self,
        run: &str,
        devices: usize,
        rate_per_s: f64,
        timing: Timing,
    ) -> Result<Outcome, PeerError> {
        let stream = self.one_stream(run).await?;
        let spread = Spread::new(devices, None);
        let connected = stream::iter(0..devices).map(|n| {
            let (stream, spread) = (&stream, spread.clone());
            async move {
                let context = jetstream::new(self.connect(stream.server).await?);
                let config =
                    consumer::push::OrderedConfig { deliver_subject: format!("to.{run}.{n}"), ..Default::default() };
                let made = context.create_consumer_on_stream(config, stream.name.as_str()).await;
                let made = made.map_err(|e| failed("make an ordered consumer")(&e))?;
                let messages = made.messages().await.map_err(|e| failed("subscribe")(&e))?;
                let bodies = messages.filter_map(async |message| Some(message.ok()?.message.payload));
                Ok::<_, PeerError>(device(&tokio::spawn(receiving(n, bodies, spread))))
            }
        });
        let connected: Vec<Device> = connected.buffer_unordered(CONNECTING).try_collect().await?;
        self.spread(&spread, self.publish_into(&stream), Some(rate_per_s), timing, connected, run).await
    }

    /// No log at all.
    pub(super) async fn core(
        &self,
        run: &str,
        devices: usize,
        rate_per_s: f64,
        timing: Timing,
    ) -> Result<Outcome, PeerError> {
        let (spread, subject) = (Spread::new(devices, None), format!("core.{run}"));
        let connected = stream::iter(0..devices).map(|n| {
            let (subject, spread) = (subject.clone(), spread.clone());
            async move {
                let client = self.connect(0).await?;
                let messages = client.subscribe(subject).await.map_err(|e| failed("subscribe")(&e))?;
                // The answer to a ping comes after the subscription is known.
                client.flush().await.map_err(|e| failed("subscribe")(&e))?;
                let bodies = messages.map(|message: Message| message.payload);
                Ok::<_, PeerError>(device(&tokio::spawn(with(client, receiving(n, bodies, spread)))))
            }
        });
        let connected: Vec<Device> = connected.buffer_unordered(CONNECTING).try_collect().await?;
        let client = self.clients[0].clone();
        let publish: Publish = Box::new(move |body| {
            let (client, subject) = (client.clone(), subject.clone());
            Box::pin(async move { client.publish(subject, body).await.map_err(|error| error.to_string()) })
        });
        self.spread(&spread, publish, Some(rate_per_s), timing, connected, run).await
    }

    async fn one_stream(&self, run: &str) -> Result<Led, PeerError> {
        self.streams(run, 1).await?.pop().ok_or_else(|| PeerError::failed("make a stream", "none"))
    }

    fn publish_into(&self, stream: &Led) -> Publish {
        let (context, subject) = (self.context(stream.server), stream.subject.clone());
        Box::new(move |body| {
            let (context, subject) = (context.clone(), subject.clone());
            Box::pin(async move {
                // Its acknowledgement is taken by the client; the delivery is what counts.
                context.publish(subject, body).await.map(drop).map_err(|error| error.to_string())
            })
        })
    }

    /// Sends while it is measured, and until everybody has everything.
    async fn spread(
        &self,
        spread: &Spread,
        mut publish: Publish,
        rate_per_s: Option<f64>,
        timing: Timing,
        connected: Vec<Device>,
        run: &str,
    ) -> Result<Outcome, PeerError> {
        let stop = Stop::default();
        let (sending, stopped) = (spread.clone(), stop.clone());
        let sender = tokio::spawn(async move {
            let mut schedule = rate_per_s.map(|rate| Schedule::new(Instant::now(), rate, 0, 1));
            while !stopped.is_set() {
                let body = sending.next(schedule.as_mut()).await;
                if let Err(error) = publish(body).await {
                    sending.failed(&error);
                }
            }
        });
        let outcome = Gauge::of(&self.servers).measure(timing, &spread.meters).await;
        stop.now();
        sender.await.map_err(|error| PeerError::failed("send", error))?;
        spread.arrived().await?;
        drop(connected);
        // There is none without a log.
        let _ = self.remove(run, 1).await;
        outcome
    }
}

/// Keeps a connection as long as its device runs.
async fn with<T>(_kept: Client, running: impl Future<Output = T>) -> T {
    running.await
}

async fn receiving(n: usize, bodies: impl Stream<Item = Bytes> + Send, spread: Spread) {
    let mut bodies = std::pin::pin!(bodies.ready_chunks(AT_ONCE));
    let mut noted = Vec::new();
    while let Some(came) = bodies.next().await {
        spread.came(n, came.iter().map(|body| body.as_ref()), &mut noted);
    }
}

async fn acknowledging(n: usize, messages: consumer::push::Messages, spread: Spread) {
    let mut messages = messages.ready_chunks(AT_ONCE);
    let mut noted = Vec::new();
    while let Some(came) = messages.next().await {
        for message in &came {
            let acknowledged = match message {
                Ok(message) => message.ack().await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = acknowledged {
                spread.meters.units.fail(n, &error);
            }
        }
        spread.came(n, came.iter().flatten().map(|message| message.payload.as_ref()), &mut noted);
    }
}
