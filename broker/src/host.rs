//! Opens the replicas that the placement gives to this broker. Must never initialize a shard that has ever committed:
//! an empty log in place of a lost one would vote history away.

use std::{collections::BTreeSet, ops::Range, sync::Arc};

use futures_util::{StreamExt, TryStreamExt, stream};
use openraft::{RaftLogReader, storage::RaftLogStorage};
use stentor_engine::command;
use stentor_proto::{
    ids::{META_SHARD, ReplicaId, ShardId},
    internal::ShardPlacement,
};
use stentor_raft_store::{REBUILD, StoreError};
use thiserror::Error;
use tokio::sync::watch;

use crate::{
    batcher,
    effects::ShardEffects,
    meta::MetaView,
    network::client::Factory,
    node::Node,
    outbox,
    raft::{self, Raft},
    router,
    shard::{HostedShard, Leadership, follow_leadership},
};

/// Replicas that are opened and begun at the same time.
const OPENED_AT_ONCE: usize = 32;
/// Shards that are marked as initialized at the same time: they share the meta shard's entries.
const MARKED_AT_ONCE: usize = 64;

/// Why a replica cannot be opened; the broker cannot serve it.
#[derive(Debug, Error)]
pub(crate) enum HostError {
    /// What is stored here is not what was written.
    #[error("DAMAGED: shard {0}: {1}; {REBUILD}")]
    Damaged(ShardId, String),
    /// The store refuses.
    #[error("shard {0}: {1}")]
    Store(ShardId, StoreError),
    /// Its log cannot be read.
    #[error("shard {0}: {1}")]
    Log(ShardId, std::io::Error),
    /// openraft refuses to start.
    #[error("shard {0}: {1}")]
    Raft(ShardId, String),
}

/// Opens one replica and starts everything that belongs to it.
pub(crate) async fn open(
    node: &Arc<Node>,
    shard: ShardId,
    slots: Range<u16>,
    own: ReplicaId,
) -> Result<Arc<HostedShard>, HostError> {
    let (effects, hints) = ShardEffects::new(shard, node.watched.clone());
    node.hook.add(shard, effects.clone());
    let mut parts = node.store.shard(shard, slots.clone()).await.map_err(|e| match e {
        StoreError::Damaged { what, .. } => HostError::Damaged(shard, what),
        other => HostError::Store(shard, other),
    })?;
    let vote = parts.log.get_log_reader().await.read_vote().await.map_err(|e| HostError::Log(shard, e))?;
    let voted_before = vote.is_some();
    let silent = voted_before && node.within_first_lease();
    let config = raft::config(shard, !silent && !node.links.replaced.has(shard))
        .map_err(|e| HostError::Raft(shard, e.to_string()))?;
    let factory = Factory { shard, own, links: node.links.clone() };
    let raft = Raft::new(own, config, factory, parts.log, parts.machine)
        .await
        .map_err(|e| HostError::Raft(shard, e.to_string()))?;
    if silent {
        let (raft, links, left) = (raft.clone(), node.links.clone(), node.first_lease_left());
        node.spawn(async move {
            tokio::time::sleep(left).await;
            raft.runtime_config().elect(!links.replaced.has(shard));
        });
    }
    let idle = node.links.parking.idle(shard, raft.clone());
    let (known, leadership) = watch::channel(Leadership::default());
    let (proposer, batching) = batcher::start(
        batcher::Parts {
            raft: raft.clone(),
            reader: parts.reader.clone(),
            store: node.store.clone(),
            clocks: node.clocks.clone(),
            leadership: leadership.clone(),
            metrics: node.metrics.clone(),
            own: node.broker,
            host: node.host.clone(),
            idle: idle.clone(),
        },
        node.stop.clone(),
    );
    node.spawn(batching);
    let reader = parts.reader;
    let hosted = HostedShard { shard, own, raft, reader, slots, voted_before, leadership, proposer, effects, idle };
    let hosted = Arc::new(hosted);
    node.host(hosted.clone());
    // Whoever is told that leaders have changed must find it.
    node.spawn(follow_leadership(node.clone(), hosted.clone(), known));
    if node.links.replaced.has(shard) {
        // Told while it was being opened: whoever looked for it then did not find it.
        hosted.raft.runtime_config().elect(false);
    }
    node.spawn(outbox::run(node.clone(), hosted.clone(), hints));
    Ok(hosted)
}

/// Opens what the placement gives to this directory and is not open yet. When it gives its places to a newer directory,
/// what is on disk is opened all the same: this one votes until its vote is taken over, shard by shard.
pub(crate) async fn reconcile(node: &Arc<Node>, view: &MetaView, own: ReplicaId) -> Result<(), HostError> {
    let held = if view.is_replaced(own) { held(node).await? } else { BTreeSet::new() };
    let is_ours = |placement: &&ShardPlacement| {
        let shard = ShardId(placement.shard);
        shard != META_SHARD && (placement.replicas.contains(&own.to_u64()) || held.contains(&shard))
    };
    let ours: Vec<ShardPlacement> = view.placement.shards.iter().filter(is_ours).cloned().collect();
    // Each waits for fsyncs and for nothing else.
    let opened = stream::iter(ours).map(|placement| reconcile_one(node, placement, own));
    opened.buffer_unordered(OPENED_AT_ONCE).try_for_each(async |()| Ok(())).await
}

async fn reconcile_one(node: &Arc<Node>, placement: ShardPlacement, own: ReplicaId) -> Result<(), HostError> {
    let shard = ShardId(placement.shard);
    let hosted = match node.hosted(shard) {
        Some(hosted) => hosted,
        None => open(node, shard, placement.first_slot as u16..placement.end_slot as u16, own).await?,
    };
    initialize(&hosted, &placement, own).await
}

/// The shards of this directory.
async fn held(node: &Node) -> Result<BTreeSet<ShardId>, HostError> {
    let store = node.store.clone();
    let held = node.environment.blocking(move || store.shards_on_disk()).await;
    let held = held.map_err(|e| HostError::Raft(META_SHARD, e))?.map_err(|e| HostError::Store(META_SHARD, e))?;
    Ok(held.into_iter().map(|(shard, _)| shard).collect())
}

/// Begins a new shard, if it is this replica's to begin.
async fn initialize(hosted: &HostedShard, placement: &ShardPlacement, own: ReplicaId) -> Result<(), HostError> {
    let first = placement.replicas.first() == Some(&own.to_u64());
    if placement.initialized || !first {
        return Ok(());
    }
    begin(hosted, placement.replicas.iter().map(|&id| ReplicaId::from_u64(id))).await
}

/// Gives an empty Raft group its first members. A group that has any log already is left alone.
pub(crate) async fn begin(
    hosted: &HostedShard,
    voters: impl Iterator<Item = ReplicaId> + Send,
) -> Result<(), HostError> {
    let failed = |e: String| HostError::Raft(hosted.shard, e);
    if hosted.raft.is_initialized().await.map_err(|e| failed(e.to_string()))? {
        return Ok(());
    }
    let voters: std::collections::BTreeMap<_, _> = voters.map(|id| (id, openraft::EmptyNode {})).collect();
    match hosted.raft.initialize(voters).await {
        Ok(()) => Ok(()),
        // Somebody's append came in between: it is initialized all the same.
        Err(openraft::errors::RaftError::APIError(openraft::errors::InitializeError::NotAllowed(_))) => Ok(()),
        Err(e) => Err(failed(e.to_string())),
    }
}

/// Tells the meta shard of shards that have committed, so that nobody initializes them again.
pub(crate) async fn mark_initialized(node: &Arc<Node>) {
    let Some(view) = node.meta.view() else { return };
    let new = view.placement.shards.iter().filter(|placement| !placement.initialized);
    // Another broker looks after those that it leads.
    let leads = |shard: &ShardId| node.hosted(*shard).is_some_and(|hosted| hosted.ready());
    let begun: Vec<ShardId> = new.map(|placement| ShardId(placement.shard)).filter(leads).collect();
    let marking = stream::iter(begun).map(|shard| async move {
        let mark = command::encode(&command::mark_initialized(shard.0));
        if let Err(refusal) = router::propose(node, META_SHARD, mark, router::Retry::Always).await {
            tracing::debug!(%shard, reason = refusal.reason, "cannot mark the shard as initialized yet");
        }
    });
    marking.buffer_unordered(MARKED_AT_ONCE).collect::<()>().await;
}
