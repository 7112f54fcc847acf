//! What the replicas of a simulated cluster apply, compared with each other entry by entry, and who leads them: one in a
//! term. Must never take one replica's word for what another one did.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use stentor_broker::Observer;
use stentor_engine::effect::Applied;
use stentor_proto::ids::{ReplicaId, ShardId};
use stentor_raft_store::{ApplyHook, types::RaftLogId};
use stentor_transport::memory::Trace;
use twox_hash::XxHash3_64;

/// Disagreements that are told; more would say the same.
const TOLD: usize = 10;

/// An entry's term and a hash of what came of it.
type Result = (u64, u64);

/// Watches all replicas of all brokers.
pub(super) struct Agreement {
    trace: Trace,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    results: BTreeMap<(ShardId, u64), Result>,
    /// By shard and term.
    leaders: BTreeMap<(ShardId, u64), ReplicaId>,
    problems: Vec<String>,
}

impl Known {
    fn problem(&mut self, what: String) {
        if self.problems.len() < TOLD && !self.problems.contains(&what) {
            self.problems.push(what);
        }
    }
}

impl Agreement {
    pub(super) fn new(trace: Trace) -> Self {
        Self { trace, known: Mutex::default() }
    }

    /// How many entries were applied somewhere.
    pub(super) fn entries(&self) -> usize {
        self.known.lock().results.len()
    }

    pub(super) fn problems(&self) -> Vec<String> {
        self.known.lock().problems.clone()
    }
}

impl ApplyHook for Agreement {
    fn applied(&self, shard: ShardId, log_id: RaftLogId, applied: &mut Applied) {
        let text = format!("{:?} {:?}", applied.outcomes, applied.effects);
        let result = (log_id.leader_id.term, XxHash3_64::oneshot(text.as_bytes()));
        self.trace.note("applied", &[shard.0.into(), log_id.index, result.0, result.1], &[]);
        let mut known = self.known.lock();
        let first = *known.results.entry((shard, log_id.index)).or_insert(result);
        if first != result {
            let index = log_id.index;
            known.problem(format!("agreement: entry {index} of shard {shard} is {first:?} and {result:?}"));
        }
    }
}

impl Observer for Agreement {
    fn leads(&self, shard: ShardId, own: ReplicaId, term: u64) {
        let mut known = self.known.lock();
        let first = *known.leaders.entry((shard, term)).or_insert(own);
        if first != own {
            known.problem(format!("leaders: term {term} of shard {shard} has two, {first} and {own}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use stentor_proto::ids::{BrokerId, Incarnation};

    use super::*;

    #[test]
    fn one_leader_in_a_term() {
        let (agreement, shard) = (Agreement::new(Trace::new(false)), ShardId(1));
        let replica = |broker| ReplicaId { broker: BrokerId(broker), incarnation: Incarnation(1) };
        agreement.leads(shard, replica(1), 3);
        agreement.leads(shard, replica(1), 3);
        agreement.leads(ShardId(2), replica(2), 3);
        agreement.leads(shard, replica(2), 4);
        assert_eq!(agreement.problems(), Vec::<String>::new());
        agreement.leads(shard, replica(2), 3);
        let problems = agreement.problems();
        assert!(problems.len() == 1 && problems[0].starts_with("leaders: term 3 of shard 1"), "{problems:?}");
    }
}
