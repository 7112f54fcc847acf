//! What happens on the apply thread after each entry: events go to the gateways that want them, hints to the tasks that
//! act on rows. Must never carry an effect out but for the term that this replica leads, and must never wait.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use arc_swap::ArcSwap;
use hashbrown::HashMap;
use stentor_engine::effect::{Applied, Effect};
use stentor_proto::{
    Bytes,
    ids::{Seq, ShardId},
};
use stentor_raft_store::{ApplyHook, types::RaftLogId};
use tokio::sync::mpsc;

use crate::{
    environment::Observer,
    interest::{ShardInterest, Watched},
};

/// Outbox hints that may wait; a lost one only means a scan.
const HINTS: usize = 4_096;

/// An outbox item as the effect told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OutboxItem {
    pub(crate) app: Bytes,
    pub(crate) conversation: Bytes,
    pub(crate) item: Seq,
    pub(crate) user: Bytes,
    pub(crate) removed: bool,
}

/// One shard's place on the apply thread.
pub(crate) struct ShardEffects {
    /// The term that this replica leads in; 0 while it does not lead.
    leading: AtomicU64,
    pub(crate) interest: ShardInterest,
    hints: mpsc::Sender<OutboxItem>,
    lost_hints: AtomicBool,
}

impl ShardEffects {
    /// With the receiving end of its outbox hints.
    pub(crate) fn new(shard: ShardId, watched: Watched) -> (Arc<Self>, mpsc::Receiver<OutboxItem>) {
        let (hints, receiver) = mpsc::channel(HINTS);
        let effects = Self {
            leading: AtomicU64::new(0),
            interest: ShardInterest::new(shard, watched),
            hints,
            lost_hints: AtomicBool::new(false),
        };
        (Arc::new(effects), receiver)
    }

    /// From now on entries of this term are this leader's; 0: it leads no more.
    pub(crate) fn lead(&self, term: u64) {
        self.leading.store(term, Ordering::Release);
    }

    /// The term that this replica leads in; 0 while it does not lead.
    pub(crate) fn leading(&self) -> u64 {
        self.leading.load(Ordering::Acquire)
    }

    /// Whether hints were lost since the last call: rows have to be scanned.
    pub(crate) fn take_lost_hints(&self) -> bool {
        self.lost_hints.swap(false, Ordering::AcqRel)
    }

    fn applied(&self, applied: &mut Applied, metrics: &crate::metrics::Metrics) {
        self.interest.fan_out(&applied.effects, metrics);
        for effect in &applied.effects {
            if let Effect::Outbox { app, conversation, item, user, removed } = effect {
                // Copies: the effect shares the whole entry's memory, and a hint may wait for long.
                let hint = OutboxItem {
                    app: Bytes::copy_from_slice(app),
                    conversation: Bytes::copy_from_slice(conversation),
                    item: *item,
                    user: Bytes::copy_from_slice(user),
                    removed: *removed,
                };
                if self.hints.try_send(hint).is_err() {
                    self.lost_hints.store(true, Ordering::Release);
                }
            }
        }
    }
}

/// The hook that the store calls. Shards are added before their replicas start.
pub(crate) struct Hook {
    shards: ArcSwap<HashMap<ShardId, Arc<ShardEffects>>>,
    metrics: Arc<crate::metrics::Metrics>,
    observer: Option<Arc<dyn Observer>>,
}

impl Hook {
    pub(crate) fn new(metrics: Arc<crate::metrics::Metrics>, observer: Option<Arc<dyn Observer>>) -> Arc<Self> {
        Arc::new(Self { shards: ArcSwap::default(), metrics, observer })
    }

    pub(crate) fn add(&self, shard: ShardId, effects: Arc<ShardEffects>) {
        self.shards.rcu(|shards| {
            let mut shards = HashMap::clone(shards);
            shards.insert(shard, effects.clone());
            shards
        });
    }
}

impl ApplyHook for Hook {
    fn applied(&self, shard: ShardId, log_id: RaftLogId, applied: &mut Applied) {
        if let Some(observer) = &self.observer {
            observer.applied(shard, log_id, applied);
        }
        if applied.effects.is_empty() {
            return;
        }
        let shards = self.shards.load();
        let Some(effects) = shards.get(&shard) else { return };
        if effects.leading() == log_id.leader_id.term {
            effects.applied(applied, &self.metrics);
        }
        applied.effects.clear();
    }
}
