//! How long is measured, who watches, and what the cluster's processes used between two moments, as the coordinator sees
//! it. Must never stop or slow the load.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use stentor_transport::probe;

use crate::{Outcome, Spent, Target, Usage, processes};

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

    /// Whether anybody watches.
    pub(crate) fn is_there(&self) -> bool {
        self.0.is_some()
    }

    pub(crate) fn look(&self, live: &Live) {
        if let Some(watch) = &self.0 {
            watch(live);
        }
    }
}

/// The cluster's processes at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    at: Instant,
    servers: BTreeMap<String, Usage>,
    /// CPU time in µs, over all servers.
    threads: BTreeMap<String, u64>,
    fsyncs: Option<u64>,
}

/// What they used between two moments.
#[derive(Debug, Clone, Default)]
pub struct Cost {
    /// How long that was.
    pub elapsed: Duration,
    /// The cluster's processes by name; empty when they are not on this machine.
    pub servers: BTreeMap<String, Spent>,
    /// The same by kinds of threads, over all of them: CPU time in µs.
    pub threads: BTreeMap<String, u64>,
    /// Batches of the brokers' logs that were fsynced.
    pub fsyncs: Option<u64>,
}

impl Snapshot {
    /// Looks at everything.
    pub async fn take(target: &Target) -> Self {
        let fsyncs = fsyncs(target).await;
        let servers = target.nodes().iter().filter_map(|node| Some((node.name.clone(), Usage::of(node.pid?).ok()?)));
        let mut threads = BTreeMap::new();
        for (kind, us) in target.nodes().iter().filter_map(|node| node.pid).flat_map(processes::threads) {
            *threads.entry(kind).or_default() += us;
        }
        Self { servers: servers.collect(), threads, fsyncs, at: Instant::now() }
    }

    /// What was used since an earlier moment.
    pub fn since(&self, earlier: &Self) -> Cost {
        let spent = |(name, now): (&String, &Usage)| Some((name.clone(), now.since(earlier.servers.get(name)?)));
        Cost {
            elapsed: self.at - earlier.at,
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
    /// Puts it to what was counted, with what the load generators used, by their names.
    pub fn of(self, mut outcome: Outcome, benches: BTreeMap<String, Spent>) -> Outcome {
        outcome.flushes_per_message = self.fsyncs.and_then(|fsyncs| outcome.per_unit(fsyncs as f64));
        if self.servers.is_empty() {
            return outcome.with_benches(benches);
        }
        for (kind, us) in &self.threads {
            // What is next to nothing is noise in every comparison.
            if let Some(each) = outcome.per_unit(*us as f64).filter(|each| *each >= LEAST_THREAD_US) {
                outcome.figures.insert(format!("{kind}{THREAD_FIGURE}"), each);
            }
        }
        outcome.with_servers(self.servers).with_benches(benches)
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
