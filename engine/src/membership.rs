//! Brings the members of a shard's Raft group to what its placement says, one step at a time, decided by the leader from
//! nothing but the two. Must never let a voter leave before a replica that has caught up takes its place, nor go back to
//! a directory that was replaced.

use std::collections::BTreeSet;

use stentor_proto::ids::ReplicaId;

use crate::limits;

/// The members of a Raft group, as its leader has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// One set of voters; two while a change is under way that a leader began and nobody has finished.
    pub voters: Vec<BTreeSet<ReplicaId>>,
    /// Those that get the log and have no vote.
    pub learners: BTreeSet<ReplicaId>,
}

/// What the leader does next. Every step may be cut off anywhere: whoever leads then decides again from what was
/// committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The members are those of the placement.
    Settled,
    /// A learner has not caught up yet.
    Wait,
    /// Sends a replica the log, or a snapshot.
    AddLearner(ReplicaId),
    /// A learner is placed here no more.
    RemoveLearner(ReplicaId),
    /// Goes over to these voters, by way of both sets.
    ChangeVoters(BTreeSet<ReplicaId>),
}

/// Decides the next step. `placed` is the shard's placement; `caught_up` tells of a learner whether it may vote
/// ([`caught_up`]).
pub fn next_step(members: &Members, placed: &[ReplicaId], caught_up: impl Fn(ReplicaId) -> bool) -> Step {
    let [voters] = &members.voters[..] else {
        // Half-way between two sets: the second one was checked when the change began.
        return members.voters.last().map_or(Step::Wait, |goal| Step::ChangeVoters(goal.clone()));
    };
    if placed.is_empty() {
        return Step::Wait;
    }
    let mut all = voters.iter().chain(&members.learners);
    if all.any(|member| placed.iter().any(|p| p.broker == member.broker && p.incarnation < member.incarnation)) {
        // This placement is older than the members: who was replaced has been told so, and never comes back.
        return Step::Wait;
    }
    let is_placed = |id: &ReplicaId| placed.contains(id);
    if let Some(gone) = members.learners.iter().find(|id| !is_placed(id)) {
        return Step::RemoveLearner(*gone);
    }
    let is_member = |id: &ReplicaId| voters.contains(id) || members.learners.contains(id);
    if let Some(new) = placed.iter().find(|id| !is_member(id)) {
        return Step::AddLearner(*new);
    }
    if let Some(ready) = members.learners.iter().find(|id| caught_up(**id)) {
        let mut goal = voters.clone();
        if let Some(leaving) = successor_of(*ready, voters, placed) {
            goal.remove(&leaving);
        }
        goal.insert(*ready);
        return Step::ChangeVoters(goal);
    }
    if !members.learners.is_empty() {
        return Step::Wait;
    }
    match voters.iter().find(|id| !is_placed(id)) {
        Some(leaving) => Step::ChangeVoters(voters.iter().filter(|id| *id != leaving).copied().collect()),
        None => Step::Settled,
    }
}

/// The voter whose place a learner takes: the lost directory of its own broker, else one whose broker is not placed.
fn successor_of(ready: ReplicaId, voters: &BTreeSet<ReplicaId>, placed: &[ReplicaId]) -> Option<ReplicaId> {
    let leaving = || voters.iter().filter(|id| !placed.contains(id));
    let own = leaving().find(|id| id.broker == ready.broker);
    own.or_else(|| leaving().find(|id| placed.iter().all(|p| p.broker != id.broker))).copied()
}

/// Whether another directory of its broker has taken a replica's place for good. `committed` are the ids of a committed
/// membership, both halves of a joint one and learners included: as long as the replica is among them its vote is needed,
/// whatever the placement wants.
pub fn is_replaced(id: ReplicaId, committed: impl IntoIterator<Item = ReplicaId>) -> bool {
    let mut newer = false;
    for member in committed.into_iter().filter(|member| member.broker == id.broker) {
        if member.incarnation == id.incarnation {
            return false;
        }
        newer |= member.incarnation > id.incarnation;
    }
    newer
}

/// Whether a learner may vote: what it lacks is no more than what is under way to every follower. Indexes of the log;
/// `None`: nothing is known to be there.
pub fn caught_up(matched: Option<u64>, last: u64) -> bool {
    matched.is_some_and(|matched| last.saturating_sub(matched) <= limits::PROMOTE_LAG_ENTRIES)
}

#[cfg(test)]
#[path = "membership_tests.rs"]
mod tests;
