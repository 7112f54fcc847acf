//! What a broker does beside its calls: checkpoints, purges, watching for failures, telling whether it is ready. Must
//! never purge what a durable checkpoint does not cover.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use openraft::async_runtime::WatchReceiver;
use stentor_proto::ids::ShardId;
use stentor_raft_store::types::RaftLogId;
use stentor_transport::probes::Probes;
use tonic_health::{
    ServingStatus::{NotServing, Serving},
    server::HealthReporter,
};

use crate::{host, meta::MetaView, node::Node, shard::HostedShard};

/// How often logs are purged, lag is measured and new shards are noted as initialized.
const ROUND: Duration = Duration::from_secs(1);
/// Parked replicas are looked at every so many rounds.
const PARKED_ROUNDS: u64 = 10;
/// How often readiness is judged.
const JUDGE: Duration = Duration::from_millis(100);

/// Starts a checkpoint whenever the store asks for one.
pub(crate) async fn checkpoints(node: Arc<Node>) {
    loop {
        let shard = tokio::select! {
            shard = node.store.checkpoint_due() => shard,
            () = node.stop.cancelled() => return,
        };
        let Some(hosted) = node.hosted(shard) else {
            // Open in the store and not yet here: its Raft is just starting.
            tokio::time::sleep(JUDGE).await;
            continue;
        };
        if hosted.raft.trigger().snapshot().await.is_err() && !node.stop.is_cancelled() {
            tokio::time::sleep(ROUND).await;
        }
    }
}

/// Purges, measures, notes.
pub(crate) async fn rounds(node: Arc<Node>) {
    let mut every = tokio::time::interval(ROUND);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut purged: BTreeMap<ShardId, u64> = BTreeMap::new();
    for round in 0u64.. {
        tokio::select! {
            _ = every.tick() => {}
            () = node.stop.cancelled() => return,
        }
        let mut worst_lag = 0;
        // What is parked may be checkpointed yet, and changes no more after that.
        let all = match round.is_multiple_of(PARKED_ROUNDS) {
            true => node.all_hosted().to_vec(),
            false => node.links.parking.ticking(&node),
        };
        for hosted in &all {
            let (lag, purged_here) = look(&node, hosted);
            worst_lag = worst_lag.max(lag);
            purged.insert(hosted.shard, purged_here.map_or(0, |id| id.index + 1));
            purge(&node, hosted, purged_here).await;
        }
        node.metrics.parked.set(node.links.parking.parked() as i64);
        node.metrics.apply_lag.set(worst_lag as i64);
        node.metrics.purged.set(purged.values().sum::<u64>() as i64);
        host::mark_initialized(&node).await;
    }
}

/// How many entries a replica has still to apply, and up to where its log is purged. Stops the broker when it failed.
fn look(node: &Node, hosted: &HostedShard) -> (u64, Option<RaftLogId>) {
    let metrics = hosted.raft.metrics();
    let metrics = metrics.borrow_watched();
    if let Err(fatal) = &metrics.running_state
        && !node.stop.is_cancelled()
    {
        node.fail(&format!("shard {}: {fatal}", hosted.shard));
    }
    let index = |id: Option<RaftLogId>| id.map_or(0, |id| id.index);
    (index(metrics.local_committed).saturating_sub(index(metrics.last_applied)), metrics.purged)
}

/// What lies further below the durable checkpoint than slower replicas may be is not kept for them: they get a
/// snapshot.
async fn purge(node: &Node, hosted: &HostedShard, purged: Option<RaftLogId>) {
    let position = node.store.position(hosted.shard);
    let Some(upto) = position.and_then(|position| position.purgeable) else { return };
    if purged.is_none_or(|purged| purged.index < upto.index) {
        // An error means that this replica has stopped; the next round sees it.
        let _ = hosted.raft.trigger().purge_log(upto.index).await;
    }
}

/// Stops the broker when its store has failed.
pub(crate) async fn failures(node: Arc<Node>) {
    let mut failed = node.store.failed();
    loop {
        let failure = failed.borrow_and_update().clone();
        if let Some(failure) = failure {
            return node.fail(&failure.to_string());
        }
        tokio::select! {
            changed = failed.changed() => if changed.is_err() { return },
            () = node.stop.cancelled() => return,
        }
    }
}

/// Judges whether callers should be sent to a broker.
#[derive(Default)]
pub(crate) struct Readiness {
    /// The picture of the cluster and the replicas here that were seen to have begun.
    begun: Option<(Arc<MetaView>, Replicas)>,
}

impl Readiness {
    /// Whether the cluster is made, and every replica here knows a leader.
    pub(crate) fn is_ready(&mut self, node: &Node) -> bool {
        let Some(view) = node.meta.view() else { return false };
        if node.failed.borrow().is_some() || node.stop.is_cancelled() {
            return false;
        }
        let all = node.all_hosted();
        // Shards are many, and what they are is asked often and changes rarely.
        let same = |(of, here): &(Arc<MetaView>, Replicas)| Arc::ptr_eq(of, &view) && Arc::ptr_eq(here, &all);
        if !self.begun.as_ref().is_some_and(same) {
            self.begun = have_begun(node, &view, &all).then_some((view, all));
        }
        // A parked replica knows its leader.
        let settled = |hosted: &Arc<HostedShard>| {
            let known = hosted.leadership();
            known.leader.is_some() && (known.ready || !known.leads)
        };
        self.begun.is_some() && node.links.parking.ticking(node).iter().all(settled)
    }
}

type Replicas = Arc<[Arc<HostedShard>]>;

/// Whether all shards are initialized, and those that ought to be here are.
fn have_begun(node: &Node, view: &MetaView, all: &Replicas) -> bool {
    // Two ascending lists: who is here and who ought to be.
    let mut hosted = all.iter().map(|hosted| hosted.shard).peekable();
    let mut is_hosted = |shard| {
        while hosted.next_if(|at| *at < shard).is_some() {}
        hosted.peek() == Some(&shard) || node.hosted(shard).is_some()
    };
    view.placement.shards.iter().all(|placement| {
        let here = placement.replicas.iter().any(|&id| id >> 32 == u64::from(node.broker.0));
        placement.initialized && (!here || is_hosted(ShardId(placement.shard)))
    })
}

/// Keeps the probes and the gRPC health service true.
pub(crate) async fn probes(node: Arc<Node>, probes: Probes, health: HealthReporter) {
    let (mut every, mut told, mut readiness) = (tokio::time::interval(JUDGE), None, Readiness::default());
    loop {
        tokio::select! {
            _ = every.tick() => {}
            () = node.stop.cancelled() => break,
        }
        let ready = readiness.is_ready(&node);
        probes.set_ready(ready);
        probes.set_live(node.failed.borrow().is_none());
        if told.replace(ready) != Some(ready) {
            health.set_service_status("", if ready { Serving } else { NotServing }).await;
        }
    }
    probes.set_ready(false);
    health.set_service_status("", NotServing).await;
}
