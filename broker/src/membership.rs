//! Drives the members of each shard that this broker leads to its placement. Must never decide anything itself: what
//! comes next follows from what is committed (`stentor_engine::membership`), so that any leader can go on from anywhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use openraft::{ChangeMembers, EmptyNode, Instant as _, Precondition, async_runtime::WatchReceiver};
use stentor_engine::membership::{Members, Step, caught_up, next_step};
use stentor_proto::ids::{ReplicaId, ShardId};
use stentor_raft_store::types::{RaftLogId, RaftMembership};
use tokio::task::JoinSet;

use crate::{meta::MetaView, node::Node, raft::LEASE, shard::HostedShard};

/// How often members are compared with the placement.
const ROUND: Duration = Duration::from_millis(200);
/// How long a step may take to be committed; a quorum that is away may come back later.
const STEP_PATIENCE: Duration = Duration::from_secs(10);

/// Runs until the broker stops; one step per shard at a time.
pub(crate) async fn run(node: Arc<Node>) {
    let mut every = tokio::time::interval(ROUND);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut steps: JoinSet<ShardId> = JoinSet::new();
    let mut under_way: BTreeSet<ShardId> = BTreeSet::new();
    // A parked shard was settled, and is looked at again when that may have changed.
    let mut looked_at = None;
    loop {
        tokio::select! {
            _ = every.tick() => {}
            Some(done) = steps.join_next(), if !steps.is_empty() => match done {
                Ok(shard) => drop(under_way.remove(&shard)),
                Err(error) => return node.fail(&format!("a change of members failed: {error}")),
            },
            () = node.stop.cancelled() => return,
        }
        let Some(view) = node.meta.view() else { continue };
        let changed = looked_at.replace(view.version()) != Some(view.version());
        let parking = &node.links.parking;
        if changed {
            parking.led(&node).iter().filter(|led| !is_settled(&view, led)).for_each(|led| led.idle.wake());
        }
        for hosted in parking.ticking(&node).iter() {
            if !hosted.ready() || under_way.contains(&hosted.shard) {
                continue;
            }
            if let Some((step, seen)) = due(&view, hosted) {
                under_way.insert(hosted.shard);
                steps.spawn(take(hosted.clone(), step, seen));
            }
        }
    }
}

/// Whether the shard has the members that it is to have.
pub(crate) fn is_settled(view: &MetaView, hosted: &HostedShard) -> bool {
    let metrics = hosted.raft.metrics();
    let members = members(metrics.borrow_watched().membership_config.membership());
    next_step(&members, view.slots.replicas(hosted.shard), |_| false) == Step::Settled
}

fn members(membership: &RaftMembership) -> Members {
    Members { voters: membership.get_joint_config().clone(), learners: membership.learner_ids().collect() }
}

/// The next step of a shard led here, and the membership that it was decided from.
fn due(view: &MetaView, hosted: &HostedShard) -> Option<(Step, Option<RaftLogId>)> {
    let metrics = hosted.raft.metrics();
    let metrics = metrics.borrow_watched();
    let last = metrics.last_log_index.unwrap_or(0);
    let ready = |id: ReplicaId| {
        let matched = metrics.replication.as_ref().and_then(|r| r.get(&id).copied().flatten());
        let heard = metrics.heartbeat.as_ref().and_then(|h| h.get(&id).cloned().flatten());
        // A vote for a replica that is away again would be a vote lost.
        heard.is_some_and(|at| at.elapsed() < LEASE) && caught_up(matched.map(|id| id.index), last)
    };
    let members = members(metrics.membership_config.membership());
    match next_step(&members, view.slots.replicas(hosted.shard), ready) {
        Step::Settled | Step::Wait => None,
        step => Some((step, *metrics.membership_config.log_id())),
    }
}

/// Proposes one step; whatever comes of it, the next round sees.
async fn take(hosted: Arc<HostedShard>, step: Step, seen: Option<RaftLogId>) -> ShardId {
    let change = match &step {
        Step::AddLearner(id) => ChangeMembers::AddNodes(BTreeMap::from([(*id, EmptyNode {})])),
        Step::RemoveLearner(id) => ChangeMembers::RemoveNodes([*id].into()),
        Step::ChangeVoters(goal) => ChangeMembers::ReplaceAllVoters(goal.clone()),
        Step::Settled | Step::Wait => return hosted.shard,
    };
    // Another leader may have gone on meanwhile.
    let unchanged = Precondition::LastMembershipLogId { last_membership_log_id: seen };
    let changed = hosted.raft.change_membership_if(change, false, [unchanged]);
    match tokio::time::timeout(STEP_PATIENCE, changed).await {
        Ok(Ok(_)) => tracing::info!(shard = %hosted.shard, ?step, "members changed"),
        Ok(Err(error)) => {
            tracing::debug!(shard = %hosted.shard, ?step, %error, "members did not change");
            // Refused at once, as long as an earlier change is not committed: to ask again at once would be a busy loop.
            tokio::time::sleep(ROUND).await;
        }
        Err(_) => tracing::warn!(shard = %hosted.shard, ?step, "no quorum for a change of members yet"),
    }
    hosted.shard
}
