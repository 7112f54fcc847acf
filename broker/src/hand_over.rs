//! Gives what this broker leads to others that have answered lately. Must never wait for them: whoever asks decides how
//! long that may take.

use std::sync::Arc;

use openraft::{Instant as _, alias::SerdeInstantOf, async_runtime::WatchReceiver};
use stentor_proto::ids::ReplicaId;
use stentor_raft_store::types::TypeConfig;

use crate::{node::Node, parking, raft::LEASE, shard::HostedShard};

/// The shards that this broker leads.
pub(crate) fn led(node: &Node) -> Vec<Arc<HostedShard>> {
    node.all_hosted().iter().filter(|hosted| hosted.leadership().leads).cloned().collect()
}

/// Asks a successor for each of them; where there is none, this broker goes on leading.
pub(crate) async fn all(node: &Node) {
    let led = led(node);
    parking::settle(node, led.iter().map(|hosted| &**hosted)).await;
    for hosted in led {
        if let Some(successor) = successor(&hosted) {
            // An error means that the replica has stopped.
            let _ = hosted.raft.trigger().transfer_leader(successor).await;
        }
    }
}

/// A voter that has answered lately; different ones for different shards, so that none gets everything.
fn successor(hosted: &HostedShard) -> Option<ReplicaId> {
    let metrics = hosted.raft.metrics().borrow_watched().clone();
    let heard = metrics.heartbeat?;
    let lately = |at: &Option<_>| at.as_ref().is_some_and(|at: &SerdeInstantOf<TypeConfig>| at.elapsed() < LEASE);
    let voters: Vec<_> = metrics.membership_config.voter_ids().collect();
    let there = heard.iter().filter(|(id, at)| **id != hosted.own && voters.contains(id) && lately(at));
    let there: Vec<_> = there.map(|(id, _)| *id).collect();
    there.get(hosted.shard.0 as usize % there.len().max(1)).copied()
}
