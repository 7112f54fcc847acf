//! Messages into streams until they are acknowledged by a majority. Must never count what the streams do not have.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{FutureExt, future::join_all};

use super::{Led, Nats};
use crate::{
    BenchError, Outcome, Timing,
    meter::Meters,
    peers::{Gauge, MESSAGE_BYTES, PeerError, lane},
    scenario::Stop,
};

/// More conversations than this are subjects of so many streams: a stream is a Raft group here.
const MOST_STREAMS: usize = 64;

impl Nats {
    /// Sends until it was measured; each stream has its part of the window.
    pub(super) async fn append(
        &self,
        run: &str,
        conversations: usize,
        window: usize,
        timing: Timing,
    ) -> Result<Outcome, PeerError> {
        let streams = self.streams(run, conversations.min(MOST_STREAMS)).await?;
        let (meters, stop) = (Arc::new(Meters::new()), Stop::default());
        let tasks: Vec<_> = streams
            .iter()
            .enumerate()
            .map(|(n, stream)| {
                let window = window / streams.len() + usize::from(n < window % streams.len());
                let subjects = (n..conversations).step_by(streams.len()).collect();
                let lane = self.lane(n, stream, subjects, window.max(1), Arc::clone(&meters), stop.clone());
                tokio::spawn(lane)
            })
            .collect();
        let outcome = Gauge::of(&self.servers).measure(timing, &meters).await;
        stop.now();
        let acknowledged = join_all(tasks).await;
        let outcome = outcome?;
        for (stream, acknowledged) in streams.iter().zip(acknowledged) {
            let acknowledged = acknowledged.map_err(|error| PeerError::failed("send", error))?;
            let there = self.messages(&stream.name).await?;
            if there < acknowledged {
                let wrong = format!("{} has {there} messages, {acknowledged} were acknowledged", stream.name);
                return Err(BenchError::Wrong(wrong).into());
            }
        }
        self.remove(run, streams.len()).await?;
        Ok(outcome)
    }

    fn lane(
        &self,
        number: usize,
        stream: &Led,
        subjects: Vec<usize>,
        window: usize,
        meters: Arc<Meters>,
        stop: Stop,
    ) -> impl Future<Output = u64> + Send + use<> {
        let context = self.context(stream.server);
        let subjects: Vec<async_nats::Subject> =
            subjects.into_iter().map(|n| format!("{}.{n}", stream.name).into()).collect();
        let body = Bytes::from(vec![0x2a; MESSAGE_BYTES]);
        let mut sent = 0;
        let send = move || {
            let (context, body) = (context.clone(), body.clone());
            let subject = subjects[sent % subjects.len()].clone();
            sent += 1;
            async move {
                let answer = context.publish(subject, body).await?.into_future();
                let answer = answer.map(|answer| answer.map(drop).map_err(|error| error.to_string()));
                Ok::<lane::Answer, async_nats::jetstream::context::PublishError>(answer.boxed())
            }
        };
        lane::run(number, window, send, meters, stop)
    }
}
