//! Tests of what a log says when entries are missing. They take entries away below it, which nothing else can.
//! Must never pass with a hole that is taken for the end of the log.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

use std::future::Future;

use super::*;
use crate::{
    memory::MemoryDisk,
    store::{ApplyHook, OpenError, Shard, Store, StoreConfig},
};

const ENTRIES: u64 = 20;
const SHARD: ShardId = ShardId(1);

struct Quiet;

impl ApplyHook for Quiet {
    fn applied(&self, _: ShardId, _: RaftLogId, _: &mut stentor_engine::effect::Applied) {}
}

fn simulate<R>(future: impl Future<Output = R>) -> R {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(future)
}

/// Nothing stays in memory, so that every read is of the disk.
fn open(disk: &MemoryDisk) -> Result<Arc<Store>, OpenError> {
    crate::open_in_memory(StoreConfig { tail_bytes: 0, ..StoreConfig::new("/data") }, disk, Arc::new(Quiet))
}

async fn shard(store: &Store) -> Shard {
    store.shard(SHARD, 0..16_384).await.unwrap()
}

fn id(index: u64) -> RaftLogId {
    wire::log_id(1, index)
}

/// A log of entries 5..20, of which these are missing on disk.
async fn with_hole(disk: &MemoryDisk, missing: std::ops::Range<u64>) -> (Arc<Store>, Shard) {
    let store = open(disk).unwrap();
    let mut shard = shard(&store).await;
    let entries = (0..ENTRIES).map(|index| RaftLogEntry { log_id: id(index), payload: EntryPayload::Blank });
    shard.log.append(entries, IOFlushed::noop()).await.unwrap();
    shard.log.purge(id(4)).await.unwrap();
    shard.log.save_committed(Some(id(ENTRIES - 1))).await.unwrap();
    shard.log.core.send_and_wait(|done| Op::Barrier { done }).await.unwrap();
    shard.log.core.applied_to(ENTRIES);
    let db = &shard.log.core.db;
    let mut batch = db.batch();
    batch.delete_range(logkey::entry(SHARD, missing.start), logkey::entry(SHARD, missing.end));
    db.write_synced(batch).await.unwrap();
    (store, shard)
}

fn is_condemned(disk: &MemoryDisk, store: &Store, what: &str) {
    let failure = store.failed().borrow().clone().unwrap_or_else(|| panic!("{what}: the store goes on")).what;
    match open(disk) {
        // Still in use, by us: what counts is the note, which a start finds when we are gone.
        Err(OpenError::InUse(_)) => {}
        other => panic!("{what}: {:?}", other.map(drop)),
    }
    disk.kill_process();
    match open(disk) {
        Err(error @ OpenError::Corrupt { .. }) => assert_eq!(error.to_string(), failure, "{what}"),
        other => panic!("{what}: it opens again: {:?}", other.map(drop)),
    }
}

const HOLES: [std::ops::Range<u64>; 5] = [5..7, 5..ENTRIES, 10..11, ENTRIES - 1..ENTRIES, 0..ENTRIES];

#[test]
fn a_whole_log_is_whole() {
    simulate(async {
        let disk = MemoryDisk::new(1);
        let (store, mut shard_now) = with_hole(&disk, 0..5).await;
        shard_now.log.core.verify().unwrap();
        assert_eq!(shard_now.log.try_get_log_entries(5..ENTRIES).await.unwrap().len() as u64, ENTRIES - 5);
        // Queued and not written yet: memory is ahead of the disk at both ends.
        shard_now.log.truncate_after(Some(id(17))).await.unwrap();
        shard_now.log.purge(id(6)).await.unwrap();
        shard_now
            .log
            .append([RaftLogEntry { log_id: id(18), payload: EntryPayload::Blank }], IOFlushed::noop())
            .await
            .unwrap();
        shard_now.log.core.verify().unwrap();
        store.close().await;
        shard_now.log.core.verify().unwrap();
        assert_eq!(*store.failed().borrow(), None);
    });
}

#[test]
fn verify_finds_every_hole() {
    for hole in HOLES {
        simulate(async {
            let (disk, what) = (MemoryDisk::new(1), format!("{hole:?}"));
            let (store, shard) = with_hole(&disk, hole).await;
            let verified = shard.reader.verify().await;
            assert!(matches!(verified, Err(ReadError::Damaged(_))), "{what}: {verified:?}");
            is_condemned(&disk, &store, &what);
        });
    }
}

#[test]
fn a_read_that_meets_a_hole_notes_it() {
    for hole in HOLES {
        simulate(async {
            let (disk, what) = (MemoryDisk::new(1), format!("{hole:?}"));
            let (store, mut shard) = with_hole(&disk, hole).await;
            let read = shard.log.try_get_log_entries(5..ENTRIES).await;
            assert_eq!(read.unwrap_err().kind(), io::ErrorKind::InvalidData, "{what}");
            is_condemned(&disk, &store, &what);
        });
    }
}

#[test]
fn a_start_finds_a_hole_at_either_end() {
    for hole in HOLES.into_iter().filter(|hole| hole.start != 10) {
        simulate(async {
            let (disk, what) = (MemoryDisk::new(1), format!("{hole:?}"));
            drop(with_hole(&disk, hole).await);
            disk.kill_process();
            let store = open(&disk).unwrap();
            let opened = store.shard(SHARD, 0..16_384).await.map(drop);
            assert!(matches!(opened, Err(StoreError::Damaged { .. })), "{what}: {opened:?}");
            is_condemned(&disk, &store, &what);
        });
    }
}

/// Damage is published before it is noted: a disk that takes its time over the note holds nothing up.
#[test]
fn a_note_that_cannot_be_written_changes_nothing() {
    simulate(async {
        let disk = MemoryDisk::new(1);
        let (store, shard) = with_hole(&disk, 5..7).await;
        disk.fail_at(1, crate::memory::DiskError::NoSpace);
        assert!(matches!(shard.reader.verify().await, Err(ReadError::Damaged(_))));
        assert!(store.failed().borrow().as_ref().is_some_and(|failure| failure.what.starts_with("DAMAGED: ")));
    });
}
