//! The twin of the disk: a power cut loses what was not synced and nothing else, a seed repeats to the byte, and what
//! a lying disk lost is found. Must never wait by a real clock.

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::{sync::Arc, time::Duration};

use openraft::{
    RaftLogReader, RaftSnapshotBuilder,
    storage::{RaftLogStorage, RaftStateMachine},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use stentor_proto::ids::{BrokerId, Incarnation, ShardId};
use stentor_raft_store::{DiskFaults, Identity, MemoryDisk, OpenError, Store, wire::log_id};
use support::{Model, Replica, SLOTS, open_twin, simulate};

mod support;

const SYNC: Duration = Duration::from_millis(10);

async fn last_index(replica: &mut Replica) -> Option<u64> {
    replica.shard.log.get_log_state().await.unwrap().last_log_id.map(|id| id.index)
}

/// A store with entries 0..10 acknowledged and 10..15 on their way to the disk.
async fn in_the_middle_of_a_sync(disk: &MemoryDisk) -> (Arc<Store>, Replica) {
    let store = open_twin(disk).unwrap();
    let mut replica = Replica::open(&store, 1, SLOTS).await;
    disk.set_sync_delay(SYNC);
    replica.vote(3).await;
    let entries: Vec<_> = (0..10).map(|index| replica.entry(index)).collect();
    replica.append(entries).await;
    let late: Vec<_> = (10..15).map(|index| replica.entry(index)).collect();
    let _unacknowledged = replica.append_start(late).await;
    tokio::time::sleep(SYNC / 2).await;
    (store, replica)
}

#[test]
fn a_power_cut_loses_exactly_what_was_not_synced() {
    simulate(1, async {
        let disk = MemoryDisk::new(1);
        disk.set_torn(false);
        let _dead = in_the_middle_of_a_sync(&disk).await;
        disk.cut_power();
        let store = open_twin(&disk).unwrap();
        let mut replica = Replica::open(&store, 1, SLOTS).await;
        assert_eq!(last_index(&mut replica).await, Some(9));
        assert_eq!(replica.shard.log.read_vote().await.unwrap().unwrap().leader_id.term, 3);
        // Rows without a flush go, and so does what the log covers.
        replica.apply((0..10).map(|index| replica.entry(index)).collect()).await;
        replica.checkpoint().await;
        replica.write(10..40).await;
        let mut cut = replica.shard.machine.try_create_snapshot_builder(true).await.unwrap();
        let building = tokio::spawn(async move { cut.build_snapshot().await.map(drop) });
        while store.stats().checkpoints < 2 {
            tokio::task::yield_now().await;
        }
        disk.cut_power();
        assert!(building.await.unwrap().is_err(), "nothing is durable on a disk without power");
        let store = open_twin(&disk).unwrap();
        let mut replica = Replica::open(&store, 1, SLOTS).await;
        assert_eq!(replica.applied_index().await, Some(9));
        assert_eq!(last_index(&mut replica).await, Some(39));
        replica.reapply(39).await;
        let mut model = Model::new(ShardId(1));
        model.apply_to(39);
        model.compare(&replica).await;
    });
}

#[test]
fn a_torn_cut_leaves_a_prefix_and_a_kill_leaves_what_was_written() {
    let mut left = std::collections::BTreeSet::new();
    for seed in 0..16 {
        left.insert(simulate(seed, async {
            let disk = MemoryDisk::new(seed);
            let _dead = in_the_middle_of_a_sync(&disk).await;
            disk.cut_power();
            let store = open_twin(&disk).unwrap();
            last_index(&mut Replica::open(&store, 1, SLOTS).await).await
        }));
    }
    assert_eq!(left.into_iter().collect::<Vec<_>>(), [Some(9), Some(14)], "a batch is there or not, never half");
    simulate(1, async {
        let disk = MemoryDisk::new(1);
        disk.set_torn(false);
        let _dead = in_the_middle_of_a_sync(&disk).await;
        disk.kill_process();
        let store = open_twin(&disk).unwrap();
        assert_eq!(last_index(&mut Replica::open(&store, 1, SLOTS).await).await, Some(14));
    });
}

#[test]
fn a_dead_store_changes_nothing_and_acknowledges_nothing() {
    simulate(1, async {
        let disk = MemoryDisk::new(1);
        let (dead, mut replica) = in_the_middle_of_a_sync(&disk).await;
        disk.cut_power();
        let left = (disk.fingerprint(), disk.operations());
        let late = vec![replica.entry(15)];
        assert!(replica.append_start(late).await.await.unwrap().is_err());
        let vote = stentor_raft_store::types::Vote::new(9, stentor_proto::ids::ReplicaId::from_u64(1));
        assert!(replica.shard.log.save_vote(&vote).await.is_err());
        let identity = Identity { cluster_id: "one".into(), broker: BrokerId(1), incarnation: Incarnation(1) };
        assert!(dead.set_identity(&identity).is_err());
        assert!(dead.failed().borrow().is_some());
        let store = open_twin(&disk).unwrap();
        assert_eq!(store.identity(), None);
        dead.close().await;
        drop((dead, replica));
        assert_eq!((disk.fingerprint(), disk.operations()), left, "a dead process reached the disk");
        assert!(matches!(open_twin(&disk), Err(OpenError::InUse(_))), "the dead one's lock is not the living one's");
    });
}

#[test]
fn votes_are_counted_when_they_are_synced_and_a_disk_can_forget_them() {
    simulate(1, async {
        let disk = MemoryDisk::new(1);
        let mut votes = disk.votes_synced();
        let (_dead, _replica) = in_the_middle_of_a_sync(&disk).await;
        assert_eq!(*votes.borrow_and_update(), 1);
        disk.cut_power();
        let store = open_twin(&disk).unwrap();
        let mut replica = Replica::open(&store, 1, SLOTS).await;
        disk.set_faults(DiskFaults { votes_forgotten: true, ..DiskFaults::default() });
        replica.vote(4).await;
        assert_eq!(*votes.borrow_and_update(), 2);
        assert_eq!(replica.shard.log.read_vote().await.unwrap().unwrap().leader_id.term, 4);
        disk.cut_power();
        let store = open_twin(&disk).unwrap();
        let mut replica = Replica::open(&store, 1, SLOTS).await;
        assert_eq!(replica.shard.log.read_vote().await.unwrap().unwrap().leader_id.term, 3, "the planted bug");
    });
}

#[test]
fn what_a_lying_disk_lost_is_found_by_the_side_file() {
    let mut found = 0;
    for seed in 0..16 {
        found += simulate(seed, async {
            let disk = MemoryDisk::new(seed);
            disk.set_torn(false);
            let store = open_twin(&disk).unwrap();
            let mut replica = Replica::open(&store, 1, SLOTS).await;
            disk.set_faults(DiskFaults { sync_lies: 1.0, ..DiskFaults::default() });
            for index in 0..40 {
                let entry = replica.entry(index);
                replica.append(vec![entry]).await;
            }
            disk.cut_power();
            u32::from(matches!(open_twin(&disk), Err(OpenError::Corrupt { .. })))
        });
    }
    assert_eq!(found, 16, "the side file was written back, the log was not");
}

/// A long enough life of three shards with everything in it that draws or waits.
async fn life(seed: u64) -> (u64, u64, Duration) {
    let start = tokio::time::Instant::now();
    let disk = MemoryDisk::new(seed);
    disk.set_sync_delay(Duration::from_millis(3));
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 1..6u64 {
        let store = open_twin(&disk).unwrap();
        let mut tasks = Vec::new();
        for shard in 1..=3u32 {
            let (store, seed, kill) = (store.clone(), rng.random::<u64>(), round);
            tasks.push(tokio::spawn(async move {
                let mut replica = Replica::open(&store, shard, support::slots_of(shard)).await;
                let mut rng = StdRng::seed_from_u64(seed);
                replica.term = kill;
                let last = last_index(&mut replica).await;
                if let Some(last) = last {
                    replica.reapply(last).await;
                }
                let mut next = last.map_or(0, |index| index + 1);
                loop {
                    let count = rng.random_range(1..12u64);
                    let entries: Vec<_> = (next..next + count).map(|index| replica.entry(index)).collect();
                    // The cut ends it.
                    let Ok(Ok(())) = replica.append_start(entries.clone()).await.await else { return };
                    replica.apply(entries).await;
                    replica.shard.log.save_committed(Some(log_id(kill, next))).await.unwrap();
                    next += count;
                    if rng.random_bool(0.1) {
                        let mut cut = replica.shard.machine.try_create_snapshot_builder(true).await.unwrap();
                        if cut.build_snapshot().await.is_err() {
                            return;
                        }
                    }
                }
            }));
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(20..200))).await;
        if rng.random_bool(0.5) {
            disk.cut_power()
        } else {
            disk.kill_process()
        }
        for task in tasks {
            let _ended = task.await;
        }
    }
    (disk.fingerprint(), disk.operations(), start.elapsed())
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let once: Vec<_> = (0..5).map(|seed| simulate(seed, life(seed))).collect();
    let again: Vec<_> = (0..5).map(|seed| simulate(seed, life(seed))).collect();
    assert_eq!(once, again);
    let different: std::collections::BTreeSet<_> = once.iter().map(|(bytes, ..)| bytes).collect();
    assert_eq!(different.len(), 5, "another seed, another life");
}
