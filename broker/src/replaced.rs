//! What others say of this directory's replicas: that newer ones have taken their places. Must never end a broker that is
//! still a voter somewhere: what it has there may be all that there is.

use std::{collections::BTreeSet, sync::Arc};

use stentor_proto::ids::{Incarnation, ReplicaId, ShardId};
use tokio::sync::watch;

use crate::node::Node;

/// Why a message of a replaced replica is refused. Its sender leaves the shard for good.
pub(crate) const REPLACED: &str = "REPLACED";

/// What others have said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Told {
    /// Shards whose committed members lack this directory and have a newer one of its broker.
    shards: BTreeSet<ShardId>,
    /// The newest directory of its broker; 0: nobody has said it.
    newest: Incarnation,
}

/// What others have said so far. It never becomes less: see `stentor_engine::membership`.
#[derive(Default)]
pub(crate) struct Replaced(watch::Sender<Told>);

impl Replaced {
    /// Another broker says that this directory's place in a shard is taken.
    pub(crate) fn note(&self, shard: ShardId) {
        self.0.send_if_modified(|told| told.shards.insert(shard));
    }

    /// The same of many shards, and by whom. True: that there is a newer one is news.
    pub(crate) fn note_all(&self, shards: impl IntoIterator<Item = ShardId>, newest: Incarnation) -> bool {
        let before = self.0.borrow().clone();
        self.0.send_if_modified(|told| {
            told.shards.extend(shards);
            told.newest = told.newest.max(newest);
            *told != before
        });
        before.newest == Incarnation(0)
    }

    /// Whether the place in a shard is taken.
    pub(crate) fn has(&self, shard: ShardId) -> bool {
        self.0.borrow().shards.contains(&shard)
    }
}

/// Why a directory takes part no more; `by`: its broker's newest directory, as far as known.
fn verdict(own: ReplicaId, by: Incarnation) -> String {
    let by = if by > own.incarnation { format!("incarnation {by}") } else { "a newer one".into() };
    format!(
        "REPLACED: this directory is incarnation {} of broker {}, and {by} took its place in every shard; keep it until \
         `stentor admin verify` is clean, and only then delete it; where no newer one runs, put it aside and start this \
         broker without a directory: it joins empty",
        own.incarnation, own.broker
    )
}

/// Says that the cluster wants a newer directory in this one's place.
pub(crate) fn warn(own: ReplicaId, by: Incarnation) {
    tracing::error!(
        broker = %own.broker, own = %own.incarnation, newer = %by,
        "REPLACED: a newer directory of this broker was given its places; this one stays in the shards where it still \
         votes, and stops when it votes in none"
    );
}

/// Leaves the shards where others have its place, and stops the broker when none is left; runs until then.
pub(crate) async fn leave(node: Arc<Node>, own: ReplicaId) {
    let mut told = node.links.replaced.0.subscribe();
    let mut left = BTreeSet::new();
    loop {
        let Told { shards, newest } = told.borrow_and_update().clone();
        for shard in shards.difference(&left) {
            tracing::error!(%shard, "REPLACED: a newer directory of this broker has this one's place in the shard");
        }
        for hosted in shards.iter().filter_map(|shard| node.hosted(*shard)) {
            hosted.raft.runtime_config().elect(false);
        }
        left = shards;
        if !left.is_empty() {
            let store = node.store.clone();
            match node.environment.blocking(move || store.shards_on_disk()).await {
                Ok(Ok(held)) if held.iter().all(|(shard, _)| left.contains(shard)) => {
                    let known = node.meta.view().map_or(Incarnation(0), |view| view.incarnation(own.broker));
                    return node.fail(&verdict(own, newest.max(known)));
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return node.fail(&format!("cannot read which shards are here: {error}")),
                Err(_) => return,
            }
        }
        tokio::select! {
            changed = told.changed() => if changed.is_err() { return },
            () = node.stop.cancelled() => return,
        }
    }
}
