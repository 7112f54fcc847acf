//! What a cluster costs in which nothing happens: CPU of its brokers once all shards are parked, and what a parked replica
//! holds of their memory. Must never measure before the brokers themselves say that everything is parked.

use std::time::{Duration, Instant};

use futures_util::future::LocalBoxFuture;
use tokio::time::sleep;

use super::{Load, Peer, PeerError};
use crate::{
    BenchError, Outcome, Target, Timing, Usage,
    measure::{Snapshot, metric},
};

/// CPU of the busiest broker, in percent of one core: the name of the figure.
pub(crate) const PERCENT: &str = "busiest_broker_cpu_percent";
/// Memory of a broker by its replicas: the name of the figure.
pub(crate) const REPLICA_BYTES: &str = "broker_bytes_per_parked_replica";

/// A broker's counts of replicas.
const HOSTED: &str = "stentor_broker_hosted_replicas";
const PARKED: &str = "stentor_broker_parked_replicas";
/// Thousands of shards begin one after the other, and park some seconds later.
const PARKED_WITHIN: Duration = Duration::from_secs(180);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Waits until all shards are parked, then looks on.
pub(super) async fn hold(target: &Target, timing: Timing) -> Result<Outcome, PeerError> {
    let brokers: Vec<_> = target.nodes().iter().filter(|node| node.role == "broker").collect();
    let deadline = Instant::now() + PARKED_WITHIN;
    let mut replicas = 0.0;
    for broker in &brokers {
        replicas = loop {
            let counts = match broker.http {
                Some(http) => (metric(http, HOSTED).await, metric(http, PARKED).await),
                None => (None, None),
            };
            match counts {
                // The meta shard never parks.
                (Some(hosted), Some(parked)) if parked >= 1.0 && parked >= hosted - 1.0 => break parked,
                _ if Instant::now() > deadline => {
                    let what = format!("{}: {counts:?} replicas hosted and parked", broker.name);
                    return Err(PeerError::failed("wait for all shards to park", what));
                }
                _ => sleep(LOOK_EVERY).await,
            }
        };
    }
    sleep(Duration::from_secs_f64(timing.warm_up_s)).await;
    let before = Snapshot::take(target).await;
    sleep(Duration::from_secs_f64(timing.seconds)).await;
    let cost = Snapshot::take(target).await.since(&before);
    // What the brokers did for the looks themselves is in it.
    let spent = |name: &str| cost.servers.get(name).map_or(0, |spent| spent.cpu_us());
    let busiest = brokers.iter().map(|broker| spent(&broker.name)).max().unwrap_or(0);
    let memory = brokers.iter().filter_map(|broker| Usage::of(broker.pid?).ok()).map(|usage| usage.anonymous_kib).max();
    // One unit: the whole time.
    let mut outcome = Outcome { count: 1, seconds: timing.seconds, ..Outcome::default() };
    outcome.figures.insert(PERCENT.into(), busiest as f64 / 1e4 / cost.elapsed.as_secs_f64());
    let memory = memory.ok_or_else(|| BenchError::Cluster("no broker's memory can be read".into()))?;
    outcome.figures.insert(REPLICA_BYTES.into(), memory as f64 * 1024.0 / replicas);
    Ok(outcome)
}

/// One core of this machine, all of it.
pub(super) struct OneCore;

impl Peer for OneCore {
    fn run<'a>(&'a mut self, load: &'a Load, _timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>> {
        Box::pin(async move {
            match *load {
                Load::Parked => {
                    let mut core = Outcome { count: 1, ..Outcome::default() };
                    core.figures.insert(PERCENT.into(), 100.0);
                    Ok(core)
                }
                _ => Err(PeerError::unable("one core", load)),
            }
        })
    }
}
