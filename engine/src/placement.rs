//! Which slots belong to which shard and which replicas hold it: the map that callers route by, and the plan for a new
//! cluster. Must never leave a slot without exactly one shard.

use std::collections::BTreeMap;

use stentor_proto::{
    ids::{META_SHARD, PlacementVersion, ReplicaId, SLOTS, ShardId, Slot},
    internal::{PlacementRow, PlacementView, ShardPlacement},
};
use thiserror::Error;

use crate::limits;

/// A placement that cannot be used: whoever made it is at fault; nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadPlacement {
    /// Two entries for one shard.
    #[error("shard {0} is listed twice")]
    Twice(ShardId),
    /// Slots without a shard, with two, or out of range.
    #[error("slots around {0} do not belong to exactly one shard")]
    Slots(Slot),
    /// No replicas, too many, or one twice.
    #[error("shard {0} has an unusable list of replicas")]
    Replicas(ShardId),
    /// More shards than a cluster may have.
    #[error("more than {max} shards", max = limits::MAX_SHARDS)]
    TooMany,
}

/// Why no plan can be made: the caller asks for too much.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlanError {
    /// Too few brokers for the replicas of one shard.
    #[error("{replicas} replicas need as many brokers, there are {brokers}")]
    TooFewBrokers {
        /// How many there are.
        brokers: usize,
        /// How many a shard should have.
        replicas: usize,
    },
    /// No shards, or more than a cluster may have.
    #[error("a cluster has 1 to {max} shards, not {0}", max = limits::MAX_SHARDS)]
    Shards(u32),
}

/// One shard's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardInfo {
    /// Its replicas; the first one is the planned leader.
    pub replicas: Vec<ReplicaId>,
    /// It has committed before: nobody initializes it again.
    pub initialized: bool,
}

/// The whole placement, ready to route by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SlotMap {
    version: PlacementVersion,
    /// (first slot, shard), ascending; a range ends where the next begins, the last at [`SLOTS`].
    ranges: Vec<(u16, ShardId)>,
    shards: BTreeMap<ShardId, ShardInfo>,
}

impl SlotMap {
    /// From the meta shard's row.
    ///
    /// # Errors
    /// See [`BadPlacement`].
    pub fn from_row(row: &PlacementRow) -> Result<Self, BadPlacement> {
        Self::new(PlacementVersion(row.version), &row.shards)
    }

    /// From what brokers tell gateways.
    ///
    /// # Errors
    /// See [`BadPlacement`].
    pub fn from_view(view: &PlacementView) -> Result<Self, BadPlacement> {
        Self::new(PlacementVersion(view.version), &view.shards)
    }

    /// Checks that every slot has exactly one shard. The meta shard may be listed; it has no slots.
    ///
    /// # Errors
    /// See [`BadPlacement`].
    pub fn new(version: PlacementVersion, placements: &[ShardPlacement]) -> Result<Self, BadPlacement> {
        if placements.len() > limits::MAX_SHARDS as usize + 1 {
            return Err(BadPlacement::TooMany);
        }
        let mut shards = BTreeMap::new();
        let mut spans = Vec::with_capacity(placements.len());
        for placement in placements {
            let shard = ShardId(placement.shard);
            let info = ShardInfo { replicas: replicas(placement)?, initialized: placement.initialized };
            if shards.insert(shard, info).is_some() {
                return Err(BadPlacement::Twice(shard));
            }
            if shard != META_SHARD {
                spans.push((placement.first_slot, placement.end_slot, shard));
            } else if placement.first_slot != placement.end_slot {
                return Err(BadPlacement::Slots(Slot(placement.first_slot as u16)));
            }
        }
        spans.sort_unstable();
        let mut next = 0;
        for &(first, end, _) in &spans {
            if first != next || end <= first || end > u32::from(SLOTS) {
                return Err(BadPlacement::Slots(Slot(first as u16)));
            }
            next = end;
        }
        if next != u32::from(SLOTS) {
            return Err(BadPlacement::Slots(Slot(next as u16)));
        }
        let ranges = spans.into_iter().map(|(first, _, shard)| (first as u16, shard)).collect();
        Ok(Self { version, ranges, shards })
    }

    /// The version that fences callers.
    pub fn version(&self) -> PlacementVersion {
        self.version
    }

    /// The shard of a slot; `None` only before there is a placement, or for a number that is no slot.
    pub fn shard_of(&self, slot: Slot) -> Option<ShardId> {
        if slot.0 >= SLOTS {
            return None;
        }
        let after = self.ranges.partition_point(|&(first, _)| first <= slot.0);
        self.ranges.get(after.checked_sub(1)?).map(|&(_, shard)| shard)
    }

    /// The shard of a conversation or a user.
    pub fn shard_of_id(&self, app: &str, id: &str) -> Option<ShardId> {
        self.shard_of(Slot::of(app, id))
    }

    /// Where a shard is.
    pub fn shard(&self, shard: ShardId) -> Option<&ShardInfo> {
        self.shards.get(&shard)
    }

    /// The replicas of a shard, the planned leader first; empty for an unknown shard.
    pub fn replicas(&self, shard: ShardId) -> &[ReplicaId] {
        self.shards.get(&shard).map_or(&[], |s| &s.replicas)
    }

    /// All shards, the meta shard included where it is listed.
    pub fn shards(&self) -> impl Iterator<Item = (ShardId, &ShardInfo)> {
        self.shards.iter().map(|(&id, info)| (id, info))
    }
}

fn replicas(placement: &ShardPlacement) -> Result<Vec<ReplicaId>, BadPlacement> {
    let list: Vec<_> = placement.replicas.iter().map(|&n| ReplicaId::from_u64(n)).collect();
    let mut sorted = list.clone();
    sorted.sort_unstable();
    sorted.dedup_by_key(|r| r.broker);
    if list.is_empty() || list.len() > limits::MAX_REPLICAS || sorted.len() != list.len() {
        return Err(BadPlacement::Replicas(ShardId(placement.shard)));
    }
    Ok(list)
}

/// A placement for a new cluster: the meta shard on the first brokers, `shards` data shards with even slot ranges,
/// first leaders and replicas spread evenly: no two brokers differ by more than one leader or two replicas. The first
/// replica of each shard is the planned leader.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(brokers: &[ReplicaId], shards: u32, replication: usize) -> Result<Vec<ShardPlacement>, PlanError> {
    if shards == 0 || shards > limits::MAX_SHARDS {
        return Err(PlanError::Shards(shards));
    }
    if replication == 0 || brokers.len() < replication {
        return Err(PlanError::TooFewBrokers { brokers: brokers.len(), replicas: replication });
    }
    let place = |shard: ShardId, replicas: Vec<ReplicaId>, first: u32, end: u32| ShardPlacement {
        shard: shard.0,
        replicas: replicas.into_iter().map(ReplicaId::to_u64).collect(),
        first_slot: first,
        end_slot: end,
        initialized: false,
    };
    let mut plan = vec![place(META_SHARD, brokers[..replication].to_vec(), 0, 0)];
    let mut spread = Spread { held: vec![0; brokers.len()], led: vec![0; brokers.len()] };
    for n in 0..shards {
        let replicas = spread.next(n as usize, replication).into_iter().map(|i| brokers[i]).collect();
        let slot = |n: u32| u32::from(SLOTS) * n / shards;
        plan.push(place(ShardId(n + 1), replicas, slot(n), slot(n + 1)));
    }
    Ok(plan)
}

/// How much each broker has so far.
struct Spread {
    held: Vec<u32>,
    led: Vec<u32>,
}

impl Spread {
    fn next(&mut self, turn: usize, replication: usize) -> Vec<usize> {
        let brokers = self.held.len();
        let after = |i: usize, start: usize| (i + brokers - start % brokers) % brokers;
        let leads = |&i: &usize| (self.led[i], self.held[i], after(i, turn));
        let Some(leader) = (0..brokers).min_by_key(leads) else { return Vec::new() };
        // Ties start elsewhere on each round, so that the shards of one leader have different followers: when it dies,
        // its leadership spreads over all others.
        let mut order: Vec<usize> = (0..brokers).filter(|&i| i != leader).collect();
        order.sort_by_key(|&i| (self.held[i], after(i, leader + 1 + turn / brokers)));
        order.insert(0, leader);
        order.truncate(replication);
        self.led[leader] += 1;
        order.iter().for_each(|&i| self.held[i] += 1);
        order
    }
}

#[cfg(test)]
mod tests {
    use stentor_proto::ids::{BrokerId, Incarnation};

    use super::*;

    fn brokers(n: u32) -> Vec<ReplicaId> {
        (1..=n).map(|n| ReplicaId { broker: BrokerId(n), incarnation: Incarnation(1) }).collect()
    }

    fn spread(counts: impl Iterator<Item = usize> + Clone) -> usize {
        counts.clone().max().unwrap_or(0) - counts.min().unwrap_or(0)
    }

    #[test]
    fn plans_are_even_in_replicas_and_leaders() {
        for count in 3..=9 {
            let brokers = brokers(count);
            for shards in (1..=130).chain([1_000, limits::MAX_SHARDS]) {
                let map = SlotMap::new(PlacementVersion(1), &plan(&brokers, shards, 3).unwrap()).unwrap();
                let data = || map.shards().filter(|(id, _)| *id != META_SHARD).map(|(_, s)| &s.replicas);
                let held = brokers.iter().map(|b| data().filter(|r| r.contains(b)).count());
                let led = brokers.iter().map(|b| data().filter(|r| r[0] == *b).count());
                assert!(
                    spread(held) <= if count < 7 { 1 } else { 2 },
                    "replicas of {shards} shards on {count} brokers"
                );
                assert!(spread(led) <= 1, "leaders of {shards} shards on {count} brokers");
                assert_eq!(map.replicas(META_SHARD), &brokers[..3]);
            }
        }
    }

    #[test]
    fn every_slot_has_its_shard_and_ranges_are_even() {
        let map = SlotMap::new(PlacementVersion(1), &plan(&brokers(3), 7, 3).unwrap()).unwrap();
        let mut counts = BTreeMap::new();
        for slot in 0..SLOTS {
            *counts.entry(map.shard_of(Slot(slot)).unwrap()).or_insert(0usize) += 1;
        }
        assert_eq!(counts.len(), 7);
        assert!(spread(counts.values().copied()) <= 1);
        assert_eq!(map.shard_of(Slot(SLOTS)), None);
        assert_eq!(SlotMap::default().shard_of(Slot(0)), None);
        assert_eq!(map.shard_of_id("app", "general"), map.shard_of(Slot::of("app", "general")));
    }

    #[test]
    fn unusable_placements_are_refused() {
        let good = plan(&brokers(3), 4, 3).unwrap();
        let refused = |change: &dyn Fn(&mut Vec<ShardPlacement>)| {
            let mut bad = good.clone();
            change(&mut bad);
            SlotMap::new(PlacementVersion(1), &bad).unwrap_err()
        };
        assert_eq!(refused(&|p| p[2].shard = 1), BadPlacement::Twice(ShardId(1)));
        assert_eq!(refused(&|p| p[2].first_slot += 1), BadPlacement::Slots(Slot(4097)));
        assert_eq!(refused(&|p| drop(p.pop())), BadPlacement::Slots(Slot(12_288)));
        assert_eq!(refused(&|p| p[4].end_slot += 1), BadPlacement::Slots(Slot(12_288)));
        assert_eq!(refused(&|p| p[1].replicas.clear()), BadPlacement::Replicas(ShardId(1)));
        assert_eq!(refused(&|p| p[1].replicas[1] = p[1].replicas[0]), BadPlacement::Replicas(ShardId(1)));
        assert_eq!(refused(&|p| p[0].end_slot = 1), BadPlacement::Slots(Slot(0)));
        assert!(plan(&brokers(2), 4, 3).is_err());
        assert!(plan(&brokers(3), 0, 3).is_err());
    }
}
