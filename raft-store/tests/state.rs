//! The state that comes out: equal to a map's, whatever checkpoints, restarts and snapshots lie between.
//! Must never wait by the clock.

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

use openraft::{
    RaftSnapshotBuilder,
    storage::{RaftLogStorage, RaftStateMachine},
};
use stentor_engine::key::{Entity, Kind};
use stentor_proto::ids::{BrokerId, Incarnation, Seq, ShardId};
use stentor_raft_store::{Identity, OpenError, ShardPosition, StoreError, open};
use support::{Model, Place, Quiet, Replica, SLOTS, config, conversation, open_quiet};

mod support;

on_both!(
    state_is_the_models_with_checkpoints_and_restarts_between,
    a_snapshot_carries_the_state_through_chunks_and_a_staged_file,
    a_damaged_or_reordered_chunk_is_refused,
    pages_of_events_are_dense_in_both_directions,
    scans_merge_memory_and_disk,
    the_schedule_asks_for_every_shard_and_positions_follow,
    a_dropped_cut_is_dirty_again,
);

async fn state_is_the_models_with_checkpoints_and_restarts_between(place: fn() -> Place) {
    let place = place();
    let mut model = Model::new(ShardId(1));
    let mut next = 0;
    for round in 0..4u64 {
        let store = place.open();
        let mut replica = Replica::open(&store, 1, SLOTS).await;
        if next > 0 {
            replica.reapply(next - 1).await;
        }
        for _ in 0..3 {
            replica.write(next..next + 60).await;
            next += 60;
            replica.checkpoint().await;
            replica.write(next..next + 25 + round).await;
            next += 25 + round;
        }
        model.apply_to(next - 1);
        model.compare(&replica).await;
        let durable = store.position(ShardId(1)).unwrap().durable.unwrap();
        assert!(durable.index < next - 1, "the last entries are not in a checkpoint");
        replica.shard.log.purge(durable).await.unwrap();
        store.close().await;
    }
}

async fn a_snapshot_carries_the_state_through_chunks_and_a_staged_file(place: fn() -> Place) {
    let (from, to) = (place(), place());
    let (sender, receiver) = (from.open(), to.open());
    let mut leader = Replica::open(&sender, 1, SLOTS).await;
    leader.write(0..200).await;
    leader.checkpoint().await;
    leader.write(200..220).await;
    let mut follower = Replica::open(&receiver, 1, SLOTS).await;
    // What it had is other and must go.
    follower.write(0..30).await;
    follower.checkpoint().await;
    let mut snapshot = leader.shard.machine.get_current_snapshot().await.unwrap().unwrap();
    let mut staging = receiver.receive_snapshot(ShardId(1), snapshot.snapshot.applied()).await.unwrap();
    let meta = staging.meta().unwrap();
    assert_eq!(meta, snapshot.meta);
    while let Some(chunk) = snapshot.snapshot.next_chunk().await.unwrap() {
        staging.push(chunk).await.unwrap();
    }
    follower.shard.machine.install_snapshot(&meta, staging.finish().await.unwrap()).await.unwrap();
    assert_eq!(follower.applied_index().await, Some(199));
    let mut model = Model::new(ShardId(1));
    model.apply_to(199);
    model.compare(&follower).await;
    follower.shard.log.purge(meta.last_log_id.unwrap()).await.unwrap();
    follower.write(200..220).await;
    model.apply_to(219);
    model.compare(&follower).await;
    let (ours, theirs) = (follower.shard.reader.verify().await.unwrap(), leader.shard.reader.verify().await.unwrap());
    assert_eq!(ours, theirs);
    receiver.close().await;
    drop((follower, receiver));
    let store = to.open();
    let mut again = Replica::open(&store, 1, SLOTS).await;
    again.reapply(219).await;
    model.compare(&again).await;
}

async fn a_damaged_or_reordered_chunk_is_refused(place: fn() -> Place) {
    let (from, to) = (place(), place());
    let (sender, receiver) = (from.open(), to.open());
    let mut leader = Replica::open(&sender, 1, SLOTS).await;
    leader.write(0..40).await;
    leader.checkpoint().await;
    let _follower = Replica::open(&receiver, 1, SLOTS).await;
    let mut snapshot = leader.shard.machine.get_current_snapshot().await.unwrap().unwrap().snapshot;
    let good = snapshot.next_chunk().await.unwrap().unwrap();
    let mut flipped = good.clone();
    let mut bytes = flipped.rows.to_vec();
    bytes[good.rows.len() / 2] ^= 1;
    flipped.rows = bytes.clone().into();
    // A checksum over the damage does not help: each row has its own.
    let mut sealed = flipped.clone();
    sealed.crc = crc32fast::hash(&bytes);
    for bad in [flipped, sealed] {
        let mut staging = receiver.receive_snapshot(ShardId(1), snapshot.applied()).await.unwrap();
        assert!(matches!(staging.push(bad).await, Err(StoreError::Damaged { .. })));
        assert!(matches!(staging.push(good.clone()).await, Err(StoreError::Damaged { .. })));
    }
    let mut staging = receiver.receive_snapshot(ShardId(1), snapshot.applied()).await.unwrap();
    let mut first = good.clone();
    first.last = false;
    staging.push(first).await.unwrap();
    assert!(staging.push(good).await.is_err(), "the same rows once more");
}

async fn pages_of_events_are_dense_in_both_directions(place: fn() -> Place) {
    let place = place();
    let store = place.open();
    let mut replica = Replica::open(&store, 1, SLOTS).await;
    for step in 0..5 {
        replica.write(step * 100..step * 100 + 100).await;
        if step < 4 {
            replica.checkpoint().await;
        }
    }
    // On disk, frozen, and dirty.
    let mut cut = replica.shard.machine.try_create_snapshot_builder(false).await.unwrap();
    replica.write(500..600).await;
    let mut model = Model::new(ShardId(1));
    model.apply_to(599);
    model.compare(&replica).await;
    cut.build_snapshot().await.unwrap();
    model.compare(&replica).await;
    let entity = Entity::conversation("app", conversation(ShardId(1), 3).as_str());
    let reader = &replica.shard.reader;
    let seqs = |events: Vec<bytes::Bytes>| -> Vec<u64> {
        events.iter().map(|event| stentor_proto::record::header(event).unwrap().seq).collect()
    };
    let all = seqs(reader.events(&entity, Seq(1), Seq(u64::MAX), usize::MAX).await.unwrap());
    let head = *all.last().unwrap();
    assert_eq!(all, (1..=head).collect::<Vec<_>>());
    for from in [1, 2, 17, head - 1, head, head + 1] {
        for to in [from - 1, from, from + 5, head, head + 9] {
            let want: Vec<u64> = (from..=to.min(head)).collect();
            assert_eq!(seqs(reader.events(&entity, Seq(from), Seq(to), usize::MAX).await.unwrap()), want);
        }
        let page = seqs(reader.events(&entity, Seq(from), Seq(head), 1).await.unwrap());
        assert_eq!(page, (from..=head).take(1).collect::<Vec<_>>(), "one event, however small the page");
    }
    for before in [1, 2, 20, head, head + 1, head + 50] {
        for limit in [1, 7, 10_000] {
            let end = before.min(head + 1);
            let want: Vec<u64> = (end.saturating_sub(limit).max(1)..end).collect();
            let got = reader.events_before(&entity, Seq(before), limit as usize, usize::MAX).await.unwrap();
            assert_eq!(seqs(got), want, "before {before}, limit {limit}");
        }
    }
    let last = reader.events_before(&entity, Seq(u64::MAX), 100, 1).await.unwrap();
    assert_eq!(seqs(last), [head], "one event, however small the page");
}

async fn scans_merge_memory_and_disk(place: fn() -> Place) {
    let place = place();
    let store = place.open();
    let mut replica = Replica::open(&store, 1, SLOTS).await;
    replica.write(0..30).await;
    replica.checkpoint().await;
    replica.write(30..60).await;
    let mut model = Model::new(ShardId(1));
    model.apply_to(59);
    for n in 0..support::CONVERSATIONS {
        let entity = Entity::conversation("app", conversation(ShardId(1), n).as_str());
        let prefix = entity.as_bytes();
        let want: Vec<_> = model
            .rows
            .rows
            .iter()
            .filter(|(key, _)| {
                key.as_bytes().starts_with(prefix) && !matches!(key.kind(), Some(Kind::Conversation | Kind::SendState))
            })
            .map(|(key, row)| (key.clone(), row.clone()))
            .collect();
        assert!(!want.is_empty());
        let (mut got, mut after) = (Vec::new(), None);
        loop {
            let page = replica.shard.reader.scan(prefix, after.as_ref(), 1).await.unwrap();
            let Some((key, row)) = page.into_iter().next() else { break };
            after = Some(key.clone());
            got.push((key, row));
        }
        assert_eq!(got, want);
        assert_eq!(replica.shard.reader.scan(prefix, None, 1_000).await.unwrap(), want);
    }
}

async fn the_schedule_asks_for_every_shard_and_positions_follow(place: fn() -> Place) {
    let place = place();
    let store = place.open();
    let mut replicas = Vec::new();
    for id in 1..4u32 {
        let slots = (id as u16 - 1) * 5_000..id as u16 * 5_000;
        replicas.push(Replica::open(&store, id, slots).await);
    }
    for replica in &mut replicas {
        // Entries without rows: their conversations would hash to anybody's slots.
        let entries: Vec<_> = (0..3)
            .map(|index| openraft::Entry {
                log_id: stentor_raft_store::wire::log_id(1, index),
                payload: openraft::EntryPayload::Blank,
            })
            .collect();
        replica.append(entries.clone()).await;
        replica.apply(entries).await;
    }
    let mut asked = std::collections::BTreeSet::new();
    while asked.len() < 3 {
        let due = store.checkpoint_due().await;
        assert!(asked.insert(due), "shard {due} was asked twice");
        replicas[due.0 as usize - 1].checkpoint().await;
    }
    for id in 1..4 {
        let ShardPosition { applied, durable, undurable_log_bytes, .. } = store.position(ShardId(id)).unwrap();
        assert_eq!((applied, undurable_log_bytes), (durable, 0));
    }
    assert_eq!(store.stats().undurable_log_bytes, 0, "of all shards");
    assert_eq!(store.shards_on_disk().unwrap().len(), 3);
}

async fn a_dropped_cut_is_dirty_again(place: fn() -> Place) {
    let place = place();
    let store = place.open();
    let mut replica = Replica::open(&store, 1, SLOTS).await;
    replica.write(0..50).await;
    let cut = replica.shard.machine.try_create_snapshot_builder(false).await.unwrap();
    replica.write(50..100).await;
    assert!(replica.shard.machine.try_create_snapshot_builder(false).await.is_none(), "one cut at a time");
    let undurable = || (store.position(ShardId(1)).unwrap().undurable_log_bytes, store.stats());
    let (before, all) = undurable();
    assert!(before > 0 && all.dirty_bytes > 0);
    assert_eq!(all.undurable_log_bytes, before, "what all shards have together");
    drop(cut);
    let (after, all) = undurable();
    assert_eq!((after, all.undurable_log_bytes), (before, before));
    replica.checkpoint().await;
    let (after, all) = undurable();
    assert_eq!((after, all.undurable_log_bytes, all.dirty_bytes), (0, 0, 0));
    replica.write(100..120).await;
    let mut model = Model::new(ShardId(1));
    model.apply_to(119);
    model.compare(&replica).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_are_refused_for_stated_reasons() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_quiet(dir.path());
    let identity = Identity { cluster_id: "one".into(), broker: BrokerId(1), incarnation: Incarnation(1) };
    assert_eq!(store.identity(), None);
    store.set_identity(&identity).unwrap();
    store.set_identity(&identity).unwrap();
    let other = Identity { cluster_id: "two".into(), ..identity.clone() };
    assert!(matches!(store.set_identity(&other), Err(StoreError::OtherIdentity(found)) if found == identity));
    let _shard = store.shard(ShardId(1), 0..5).await.unwrap();
    assert!(matches!(store.shard(ShardId(1), 0..5).await, Err(StoreError::Open(ShardId(1)))));
    assert!(matches!(open(config(dir.path()), std::sync::Arc::new(Quiet)), Err(OpenError::InUse(_))));
    store.close().await;
    drop((_shard, store));
    let store = open_quiet(dir.path());
    assert_eq!(store.identity(), Some(identity));
    assert!(matches!(store.shard(ShardId(1), 0..6).await, Err(StoreError::OtherSlots { .. })));
    store.close().await;
    drop(store);
    let path = dir.path().join("identity");
    let good = std::fs::read(&path).unwrap();
    let mut newer = good.clone();
    newer[8] = 9;
    std::fs::write(&path, newer).unwrap();
    assert!(matches!(
        open(config(dir.path()), std::sync::Arc::new(Quiet)),
        Err(OpenError::NewerFormat { found: 9, known: 1, .. })
    ));
    let mut damaged = good.clone();
    damaged[20] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    assert!(matches!(open(config(dir.path()), std::sync::Arc::new(Quiet)), Err(OpenError::Corrupt { .. })));
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(open(config(dir.path()), std::sync::Arc::new(Quiet)), Err(OpenError::Corrupt { .. })));
    std::fs::write(&path, good).unwrap();
    std::fs::remove_dir_all(dir.path().join("log")).unwrap();
    assert!(open(config(dir.path()), std::sync::Arc::new(Quiet)).is_err(), "a lost log is not an empty one");
}
