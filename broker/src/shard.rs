//! One replica hosted by this broker: its Raft, its reads, who leads it, and its way in for commands. Must never say
//! that it leads before the first entry of its term is applied.

use std::{ops::Range, sync::Arc};

use openraft::async_runtime::WatchReceiver;
use stentor_engine::membership::is_replaced;
use stentor_proto::ids::{BrokerId, ReplicaId, ShardId};
use stentor_raft_store::{ShardReader, types::TypeConfig};
use tokio::sync::watch;

use crate::{batcher::Proposer, effects::ShardEffects, node::Node, parking::Idle, raft::Raft};

/// Who leads a shard, as this replica knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Leadership {
    /// The highest term seen.
    pub(crate) term: u64,
    /// Its leader, as far as known.
    pub(crate) leader: Option<ReplicaId>,
    /// This replica leads.
    pub(crate) leads: bool,
    /// This replica leads and has applied the first entry of its term: it may answer.
    pub(crate) ready: bool,
}

impl Leadership {
    /// The broker to ask instead of this one.
    pub(crate) fn elsewhere(&self) -> Option<BrokerId> {
        self.leader.filter(|_| !self.leads).map(|leader| leader.broker)
    }
}

/// A replica of this broker.
pub(crate) struct HostedShard {
    pub(crate) shard: ShardId,
    pub(crate) own: ReplicaId,
    pub(crate) raft: Raft,
    pub(crate) reader: ShardReader,
    pub(crate) slots: Range<u16>,
    /// It had a stored vote when this process started.
    pub(crate) voted_before: bool,
    pub(crate) leadership: watch::Receiver<Leadership>,
    pub(crate) proposer: Proposer,
    pub(crate) effects: Arc<ShardEffects>,
    pub(crate) idle: Arc<Idle>,
}

impl HostedShard {
    /// Who leads now.
    pub(crate) fn leadership(&self) -> Leadership {
        *self.leadership.borrow()
    }

    /// Whether a newer directory of its broker has this replica's place, as the members say that are committed here.
    pub(crate) fn has_replaced(&self, id: ReplicaId) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        is_replaced(id, metrics.committed_membership_config.membership().nodes().map(|(id, _)| *id))
    }

    /// Whether this replica may answer for the shard.
    pub(crate) fn ready(&self) -> bool {
        self.leadership.borrow().ready
    }
}

/// Follows who leads a shard until the broker stops; its observer is told of every leadership of its own.
pub(crate) async fn follow_leadership(node: Arc<Node>, hosted: Arc<HostedShard>, known: watch::Sender<Leadership>) {
    let HostedShard { shard, own, raft, reader, effects, idle, .. } = &*hosted;
    let (mut server, mut applied) = (raft.server_metrics(), reader.applied());
    loop {
        let mut now = current(&server);
        let applied_term = applied.borrow_and_update().map_or(0, |id| id.leader_id.term);
        now.ready = now.leads && applied_term == now.term;
        let before = *known.borrow();
        if before.leads && !(now.leads && now.term == before.term) {
            effects.lead(0);
            effects.interest.close(before.term);
        }
        if now.leads {
            // Before anybody may register: an event between the two would be told to nobody.
            effects.lead(now.term);
            node.environment.observer.iter().for_each(|observer| observer.leads(*shard, *own, now.term));
        }
        if known.send_if_modified(|known| std::mem::replace(known, now) != now) {
            idle.wake();
            node.leaders.send_replace(());
        }
        let waits_for_apply = now.leads && !now.ready;
        tokio::select! {
            () = node.stop.cancelled() => return,
            changed = server.changed() => if changed.is_err() { return },
            changed = applied.changed(), if waits_for_apply => if changed.is_err() { return },
        }
    }
}

fn current(
    server: &openraft::alias::WatchReceiverOf<TypeConfig, openraft::metrics::RaftServerMetrics<TypeConfig>>,
) -> Leadership {
    let metrics = server.borrow_watched();
    Leadership {
        term: metrics.vote.leader_id.term,
        leader: metrics.current_leader,
        leads: metrics.state.is_leader(),
        ready: false,
    }
}
