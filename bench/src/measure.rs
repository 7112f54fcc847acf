//! Cuts a load that runs into phases: a warm-up that counts for nothing, then repeats of the same length, each with what
//! was noted in it and what the processes used in it. Must never stop or slow the load.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use stentor_transport::probe;
use tokio::time::sleep_until;

use crate::{BenchError, Outcome, Spent, Target, Usage, meter::Meters, processes};

/// Between two looks for somebody who watches.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A node that does not tell its metrics by then is not asked again.
const METRICS_WITHIN: Duration = Duration::from_secs(5);
/// A broker's count of fsynced log batches.
const FSYNCS: &str = "stentor_store_wal_syncs";

/// How the figures of kinds of threads end: CPU of all servers, µs per unit.
pub(crate) const THREAD_FIGURE: &str = "_threads_cpu_us";
/// Kinds that need less for a unit are not told.
const LEAST_THREAD_US: f64 = 0.05;

/// How long is measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Before anything counts.
    pub warm_up_s: f64,
    /// One repeat.
    pub seconds: f64,
    /// How many.
    pub repeats: u32,
}

/// What somebody who watches sees.
#[derive(Debug, Clone, Copy, Default)]
pub struct Live {
    /// The repeat, from 1; 0 is the warm-up.
    pub repeat: u32,
    /// How long it has run.
    pub elapsed: Duration,
    /// Units per second in it.
    pub rate_per_s: f64,
    /// Half took at most this.
    pub p50_ms: f64,
    /// 99 of 100 took at most this.
    pub p99_ms: f64,
    /// Units that failed.
    pub errors: u64,
}

type Watch = dyn Fn(&Live) + Send + Sync;

/// Who watches; called a few times a second.
#[derive(Clone, Default)]
pub struct Observer(Option<Arc<Watch>>);

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Observer").field(&self.0.is_some()).finish()
    }
}

impl Observer {
    /// Nobody.
    pub fn none() -> Self {
        Self::default()
    }

    /// This one.
    pub fn new(watch: impl Fn(&Live) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(watch)))
    }

    pub(crate) fn look(&self, repeat: u32, began: Instant, meters: &Meters) {
        let Some(watch) = &self.0 else { return };
        let (elapsed, tally) = (began.elapsed(), meters.units.peek());
        watch(&Live {
            repeat,
            elapsed,
            rate_per_s: tally.count as f64 / elapsed.as_secs_f64().max(1e-3),
            p50_ms: tally.latencies.percentile_ms(50.0),
            p99_ms: tally.latencies.percentile_ms(99.0),
            errors: tally.errors,
        });
    }
}

/// All processes at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    at: Instant,
    own: Usage,
    servers: BTreeMap<String, Usage>,
    /// CPU time in µs, over all servers.
    threads: BTreeMap<String, u64>,
    fsyncs: Option<u64>,
}

/// What all processes used between two moments.
#[derive(Debug, Clone)]
pub struct Cost {
    /// How long that was.
    pub elapsed: Duration,
    /// The load generator.
    pub own: Spent,
    /// The cluster's processes by name; empty when they are not on this machine.
    pub servers: BTreeMap<String, Spent>,
    /// The same by kinds of threads, over all of them: CPU time in µs.
    pub threads: BTreeMap<String, u64>,
    /// Batches of the brokers' logs that were fsynced.
    pub fsyncs: Option<u64>,
}

impl Snapshot {
    /// Looks at everything.
    pub async fn take(target: &Target) -> Result<Self, BenchError> {
        let fsyncs = fsyncs(target).await;
        let servers = target.nodes().iter().filter_map(|node| Some((node.name.clone(), Usage::of(node.pid?).ok()?)));
        let own = Usage::own().map_err(BenchError::io("read /proc/self"))?;
        let mut threads = BTreeMap::new();
        for (kind, us) in target.nodes().iter().filter_map(|node| node.pid).flat_map(processes::threads) {
            *threads.entry(kind).or_default() += us;
        }
        Ok(Self { servers: servers.collect(), threads, own, fsyncs, at: Instant::now() })
    }

    /// What was used since an earlier moment.
    pub fn since(&self, earlier: &Self) -> Cost {
        let spent = |(name, now): (&String, &Usage)| Some((name.clone(), now.since(earlier.servers.get(name)?)));
        Cost {
            elapsed: self.at - earlier.at,
            own: self.own.since(&earlier.own),
            servers: self.servers.iter().filter_map(spent).collect(),
            threads: self
                .threads
                .iter()
                .filter_map(|(kind, now)| Some((kind.clone(), now.checked_sub(*earlier.threads.get(kind)?)?)))
                .collect(),
            fsyncs: self.fsyncs.zip(earlier.fsyncs).map(|(now, then)| now.saturating_sub(then)),
        }
    }
}

impl Cost {
    /// Puts it to what was counted.
    pub fn of(self, mut outcome: Outcome) -> Outcome {
        outcome.flushes_per_message = self.fsyncs.and_then(|fsyncs| outcome.per_unit(fsyncs as f64));
        if self.servers.is_empty() {
            outcome.client_cpu_us = outcome.per_unit(self.own.cpu_us() as f64);
            outcome.processes.insert("bench".into(), self.own);
            return outcome;
        }
        for (kind, us) in &self.threads {
            // What is next to nothing is noise in every comparison.
            if let Some(each) = outcome.per_unit(*us as f64).filter(|each| *each >= LEAST_THREAD_US) {
                outcome.figures.insert(format!("{kind}{THREAD_FIGURE}"), each);
            }
        }
        outcome.with_processes(self.own, self.servers)
    }
}

/// Of all brokers together; `None` when one does not say.
async fn fsyncs(target: &Target) -> Option<u64> {
    let brokers: Vec<_> = target.nodes().iter().filter(|node| node.role == "broker").collect();
    let asked = brokers.iter().map(|node| async { metric(node.http?, FSYNCS).await });
    join_all(asked).await.into_iter().sum::<Option<f64>>().map(|count| count as u64)
}

/// One figure of a node's `/metrics`.
pub async fn metric(http: std::net::SocketAddr, name: &str) -> Option<f64> {
    let text = probe::get(http, "/metrics", METRICS_WITHIN).await.ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Measures a load that runs: the outcome of each repeat.
pub async fn measure(
    target: &Target,
    timing: Timing,
    meters: &Meters,
    observer: &Observer,
) -> Result<Vec<Outcome>, BenchError> {
    wait(Duration::from_secs_f64(timing.warm_up_s), 0, meters, observer).await;
    let mut before = Snapshot::take(target).await?;
    meters.take();
    let mut outcomes = Vec::new();
    for repeat in 1..=timing.repeats {
        wait(Duration::from_secs_f64(timing.seconds), repeat, meters, observer).await;
        let now = Snapshot::take(target).await?;
        let noted = meters.take();
        outcomes.push(outcome(now.since(&before), noted));
        before = now;
    }
    Ok(outcomes)
}

/// What was noted, with what it cost.
pub(crate) fn outcome(
    cost: Cost,
    (units, others): (crate::meter::Tally, Vec<(&'static str, crate::meter::Tally)>),
) -> Outcome {
    let seconds = cost.elapsed.as_secs_f64();
    let mut outcome = Outcome::counted(seconds, units.count, units.errors, &units.latencies);
    outcome.first_error = units.first_error;
    for (name, tally) in others {
        if tally.count > 0 {
            outcome.figures.insert(format!("{name}_count"), tally.count as f64);
            outcome.figures.insert(format!("{name}_p50_ms"), tally.latencies.percentile_ms(50.0));
            outcome.figures.insert(format!("{name}_p99_ms"), tally.latencies.percentile_ms(99.0));
        }
        outcome.errors += tally.errors;
        outcome.first_error = outcome.first_error.or(tally.first_error);
    }
    cost.of(outcome)
}

async fn wait(how_long: Duration, repeat: u32, meters: &Meters, observer: &Observer) {
    let began = Instant::now();
    let end = began + how_long;
    while Instant::now() < end {
        sleep_until((Instant::now() + LOOK_EVERY).min(end).into()).await;
        observer.look(repeat, began, meters);
    }
}
