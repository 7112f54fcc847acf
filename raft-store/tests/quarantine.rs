//! Damage that is met while a store is in use: never served, noted in the directory, and found there by the next start.
//! Must never accept a report that differs from the one before the damage.

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use stentor_proto::ids::ShardId;
use stentor_raft_store::{OpenError, ReadError, ReplicaReport, open};
use support::{Quiet, Replica, SLOTS, config, open_quiet};

mod support;

const ENTRIES: u64 = 600;
/// Places in each file where a bit is flipped.
const PLACES: usize = 24;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        match file.file_type().unwrap().is_dir() {
            true => copy(&file.path(), &to.join(file.file_name())),
            false => drop(fs::copy(file.path(), to.join(file.file_name())).unwrap()),
        }
    }
}

fn ssts(dir: &Path, instance: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(dir.join(instance)).unwrap().map(|file| file.unwrap().path());
    let mut ssts: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "sst")).collect();
    ssts.sort_unstable();
    assert!(!ssts.is_empty(), "{instance} has no tables");
    ssts.iter().map(|path| path.strip_prefix(dir).unwrap().to_path_buf()).collect()
}

/// A stopped store whose rows and entries both stand in tables; what a verification says of it.
async fn written(dir: &Path) -> ReplicaReport {
    let store = open_quiet(dir);
    let mut replica = Replica::open(&store, 1, SLOTS).await;
    replica.write(0..ENTRIES).await;
    replica.checkpoint().await;
    store.close().await;
    drop((replica, store));
    // A start moves what its WAL has into tables.
    let store = open_quiet(dir);
    let replica = Replica::open(&store, 1, SLOTS).await;
    let report = replica.shard.reader.verify().await.unwrap();
    store.close().await;
    report
}

#[derive(Debug, PartialEq)]
enum Found {
    AtStart,
    ByVerify,
    /// The byte is one that nobody needs.
    Nowhere,
}

async fn look(dir: &Path, good: &ReplicaReport, what: &str) -> Found {
    let store = match open(config(dir), Arc::new(Quiet)) {
        Ok(store) => store,
        Err(OpenError::Corrupt { .. } | OpenError::Io { .. }) => return Found::AtStart,
        Err(other) => panic!("{what}: {other}"),
    };
    let Ok(shard) = store.shard(ShardId(1), SLOTS).await else {
        store.close().await;
        return Found::AtStart;
    };
    let verified = shard.reader.verify().await;
    let failure = store.failed().borrow().clone();
    store.close().await;
    drop((shard, store));
    match verified {
        Ok(report) => {
            assert_eq!((&report, failure), (good, None), "{what}");
            Found::Nowhere
        }
        Err(ReadError::Damaged(_)) => {
            let failure = failure.unwrap_or_else(|| panic!("{what}: the store goes on")).what;
            assert!(failure.starts_with("DAMAGED: ") && failure.contains("delete the directory"), "{what}: {failure}");
            match open(config(dir), Arc::new(Quiet)) {
                Err(error @ OpenError::Corrupt { .. }) => assert_eq!(error.to_string(), failure, "{what}"),
                other => panic!("{what}: it opens again: {:?}", other.map(drop)),
            }
            Found::ByVerify
        }
        Err(other) => panic!("{what}: {other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flip_in_a_table_is_found_and_stays_found() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
    let report = written(&good).await;
    let mut by_verify = 0;
    for instance in ["state", "log"] {
        for sst in ssts(&good, instance) {
            let bytes = fs::read(good.join(&sst)).unwrap();
            let mut found = Vec::new();
            for place in 0..PLACES {
                let _ = fs::remove_dir_all(&bad);
                copy(&good, &bad);
                let mut flipped = bytes.clone();
                flipped[place * bytes.len() / PLACES] ^= 1 << (place % 8);
                fs::write(bad.join(&sst), flipped).unwrap();
                found.push(look(&bad, &report, &format!("{} at {place}/{PLACES}", sst.display())).await);
            }
            // Most of a table is rows; a filter or a statistic may go unread. What a start reads (all heads, the last
            // entries) may be the whole of a small table.
            let nowhere = found.iter().filter(|f| **f == Found::Nowhere).count();
            assert!(found[0] != Found::Nowhere && 2 * nowhere < PLACES, "{}: {found:?}", sst.display());
            by_verify += found.iter().filter(|f| **f == Found::ByVerify).count();
        }
    }
    assert!(by_verify > 0, "verify found nothing that a start had not found");
}
