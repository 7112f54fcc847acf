//! What all parts of one broker share. Must never outlive the store: whatever holds a node ends when its `stop` does.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use stentor_proto::ids::{BrokerId, ShardId};
use stentor_raft_store::Store;
use stentor_transport::Host;
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    clocks::Clocks, config::BrokerConfig, effects::Hook, environment::Environment, interest::Watched, meta::Meta,
    metrics::Metrics, network::Links, raft::LEASE, router::Peers, shard::HostedShard,
};

/// One running broker.
pub(crate) struct Node {
    pub(crate) broker: BrokerId,
    pub(crate) config: BrokerConfig,
    pub(crate) host: Host,
    pub(crate) environment: Environment,
    pub(crate) store: Arc<Store>,
    pub(crate) hook: Arc<Hook>,
    pub(crate) clocks: Arc<Clocks>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) links: Arc<Links>,
    pub(crate) peers: Peers,
    pub(crate) meta: Meta,
    pub(crate) stop: CancellationToken,
    pub(crate) started: Instant,
    pub(crate) failed: watch::Sender<Option<String>>,
    /// In which shards gateways are interested.
    pub(crate) watched: Watched,
    /// Told whenever a replica here learns who leads.
    pub(crate) leaders: watch::Sender<()>,
    /// What this broker waits for before it can take part, for people.
    waits_for: Mutex<Option<String>>,
    hosted: ArcSwap<Hosted>,
    /// Everything that runs beside calls: a stopped broker must hold nothing of its directory any more.
    tasks: Mutex<JoinSet<()>>,
}

/// The replicas of a broker.
#[derive(Default)]
struct Hosted {
    /// Ascending.
    shards: Vec<ShardId>,
    /// In the same order.
    all: Arc<[Arc<HostedShard>]>,
}

/// What [`Node::new`] takes: everything but what is made here.
pub(crate) struct NodeParts {
    pub(crate) config: BrokerConfig,
    pub(crate) environment: Environment,
    pub(crate) store: Arc<Store>,
    pub(crate) hook: Arc<Hook>,
    pub(crate) clocks: Arc<Clocks>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) links: Arc<Links>,
    pub(crate) peers: Peers,
    pub(crate) started: Instant,
}

impl Node {
    pub(crate) fn new(parts: NodeParts) -> Arc<Self> {
        let NodeParts { config, environment, store, hook, clocks, metrics, links, peers, started } = parts;
        Arc::new(Self {
            broker: config.broker,
            config,
            host: environment.host.clone(),
            environment,
            store,
            hook,
            clocks,
            metrics,
            links,
            peers,
            meta: Meta::default(),
            stop: CancellationToken::new(),
            started,
            failed: watch::Sender::new(None),
            watched: Watched::default(),
            leaders: watch::Sender::new(()),
            waits_for: Mutex::default(),
            hosted: ArcSwap::default(),
            tasks: Mutex::default(),
        })
    }

    /// Runs a task that ends with this broker.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        while tasks.try_join_next().is_some() {}
        if !self.stop.is_cancelled() {
            tasks.spawn(task);
        }
    }

    /// Ends all tasks, and what waits for other brokers. `stop` must have been cancelled.
    pub(crate) async fn end_tasks(&self) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        tasks.shutdown().await;
        self.peers.close();
        self.links.close();
    }

    /// Lets go of all replicas.
    pub(crate) fn let_go(&self) -> Arc<[Arc<HostedShard>]> {
        let all = self.all_hosted();
        self.hosted.store(Arc::default());
        all
    }

    /// The replica of a shard, if this broker has one.
    pub(crate) fn hosted(&self, shard: ShardId) -> Option<Arc<HostedShard>> {
        let hosted = self.hosted.load();
        let place = hosted.shards.binary_search(&shard).ok()?;
        hosted.all.get(place).cloned()
    }

    /// All replicas, ascending by shard.
    pub(crate) fn all_hosted(&self) -> Arc<[Arc<HostedShard>]> {
        self.hosted.load().all.clone()
    }

    pub(crate) fn host(&self, shard: Arc<HostedShard>) {
        self.hosted.rcu(|hosted| {
            let mut all = hosted.all.to_vec();
            let place = all.partition_point(|other| other.shard < shard.shard);
            match all.get_mut(place).filter(|known| known.shard == shard.shard) {
                Some(known) => *known = shard.clone(),
                None => all.insert(place, shard.clone()),
            }
            Hosted { shards: all.iter().map(|hosted| hosted.shard).collect(), all: all.into() }
        });
        self.metrics.replicas.set(self.hosted.load().all.len() as i64);
    }

    /// How much of the first lease after the process's start is left.
    pub(crate) fn first_lease_left(&self) -> Duration {
        LEASE.saturating_sub(self.started.elapsed())
    }

    /// Whether the process started less than one lease ago.
    pub(crate) fn within_first_lease(&self) -> bool {
        !self.first_lease_left().is_zero()
    }

    /// Notes, and says once, what this broker waits for before it can take part.
    pub(crate) fn waits_for(&self, what: &str) {
        let mut noted = self.waits_for.lock();
        if noted.as_deref() != Some(what) {
            tracing::info!(broker = %self.broker, what, "this broker waits");
            *noted = Some(what.to_owned());
        }
    }

    /// The last thing that it waited for.
    pub(crate) fn last_waited_for(&self) -> Option<String> {
        self.waits_for.lock().clone()
    }

    /// The broker cannot go on: it says why, loudly, and stops taking part.
    pub(crate) fn fail(&self, what: &str) {
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            failed.get_or_insert_with(|| what.to_owned());
            first
        });
        self.stop.cancel();
        tracing::error!(broker = %self.broker, what, "this broker stops");
    }
}
