//! Bits flipped in the WAL and the MANIFESTs of a stopped store: it does not open, or it opens with everything that
//! was fsynced.
//! Must never accept "opened, but shorter".

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use openraft::{RaftLogReader, storage::RaftLogStorage};
use rand::{Rng, SeedableRng, rngs::StdRng};
use stentor_raft_store::{OpenError, open};
use support::{Quiet, Replica, SLOTS, config, open_quiet};

mod support;

const ENTRIES: u64 = 24;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_dir() {
            copy(&file.path(), &to.join(file.file_name()));
        } else {
            fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    }
}

fn wal_of(dir: &Path) -> PathBuf {
    let logs = fs::read_dir(dir.join("log")).unwrap().map(|file| file.unwrap().path());
    logs.filter(|path| path.extension().is_some_and(|e| e == "log")).max().unwrap()
}

/// Where the records of a WAL file begin: `u32 crc │ u16 length │ u8 type │ payload`, in blocks of 32 KiB.
fn records(wal: &[u8]) -> Vec<usize> {
    let (mut at, mut found) = (0, Vec::new());
    while at + 7 <= wal.len() {
        let left = 32_768 - at % 32_768;
        if left < 7 {
            at += left;
            continue;
        }
        let len = u16::from_le_bytes([wal[at + 4], wal[at + 5]]) as usize;
        if wal[at + 6] == 0 {
            break;
        }
        found.push(at);
        at += 7 + len;
    }
    found
}

/// A stopped store with [`ENTRIES`] fsynced entries, one batch each.
async fn written(dir: &Path) {
    let store = open_quiet(dir);
    let mut replica = Replica::open(&store, 1, SLOTS).await;
    for index in 0..ENTRIES {
        let entry = replica.entry(index);
        replica.append(vec![entry]).await;
    }
    store.close().await;
}

/// Whether the copy opens; when it does, every entry must be there.
async fn opens(dir: &Path, what: &str) -> bool {
    let store = match open(config(dir), Arc::new(Quiet)) {
        Ok(store) => store,
        // Refused either way; RocksDB says "IO error" when a file that CURRENT names is missing.
        Err(OpenError::Corrupt { .. } | OpenError::Io { .. }) => return false,
        Err(other) => panic!("{what}: {other}"),
    };
    let mut shard = match store.shard(stentor_proto::ids::ShardId(1), SLOTS).await {
        Ok(shard) => shard,
        Err(_) => return false,
    };
    let last = shard.log.get_log_state().await.unwrap().last_log_id.map(|id| id.index);
    assert_eq!(last, Some(ENTRIES - 1), "{what}: opened without what was fsynced");
    let entries = shard.log.try_get_log_entries(..).await;
    let whole = entries.is_ok_and(|entries| {
        entries.len() as u64 == ENTRIES
            && entries.iter().all(|e| e.payload == support::payload_at(stentor_proto::ids::ShardId(1), e.log_id.index))
    });
    assert!(whole, "{what}: served what was not written");
    store.close().await;
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_flip_in_the_wal_costs_an_entry() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
    written(&good).await;
    let wal = fs::read(wal_of(&good)).unwrap();
    let found = records(&wal);
    assert!(found.len() as u64 > ENTRIES, "one record a batch");
    let mut rng = StdRng::seed_from_u64(6);
    let headers = found.iter().flat_map(|at| (0..7 * 8).map(move |bit| at * 8 + bit));
    let payload: Vec<usize> = (0..120).map(|_| rng.random_range(0..wal.len() * 8)).collect();
    let (mut refused, mut tried) = (0, 0);
    for bit in headers.chain(payload) {
        let _ = fs::remove_dir_all(&bad);
        copy(&good, &bad);
        let mut bytes = wal.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(wal_of(&bad), bytes).unwrap();
        tried += 1;
        refused += u32::from(!opens(&bad, &format!("bit {bit}")).await);
    }
    assert!(refused * 10 > tried * 9, "only {refused} of {tried} flips were refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_flip_in_a_manifest_or_beside_it_costs_an_entry() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
    written(&good).await;
    let mut rng = StdRng::seed_from_u64(7);
    for instance in ["log", "state"] {
        let files = fs::read_dir(good.join(instance)).unwrap().map(|file| file.unwrap().file_name());
        let told = |name: &str| name.starts_with("MANIFEST-") || name == "CURRENT";
        for name in files.filter(|name| told(name.to_str().unwrap())) {
            let bytes = fs::read(good.join(instance).join(&name)).unwrap();
            // All of the first record's header, and a sample of the rest.
            let bits = (0..7 * 8).chain((0..60).map(|_| rng.random_range(0..bytes.len() * 8)));
            for bit in bits.collect::<Vec<_>>() {
                let _ = fs::remove_dir_all(&bad);
                copy(&good, &bad);
                let mut bytes = bytes.clone();
                let Some(byte) = bytes.get_mut(bit / 8) else { continue };
                *byte ^= 1 << (bit % 8);
                fs::write(bad.join(instance).join(&name), bytes).unwrap();
                opens(&bad, &format!("{instance} {} bit {bit}", name.display())).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shorter_wal_is_not_an_older_one() {
    let dir = tempfile::tempdir().unwrap();
    let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
    written(&good).await;
    let wal = fs::read(wal_of(&good)).unwrap();
    let found = records(&wal);
    for len in [0, found[1], found[found.len() / 2] + 3, found[found.len() - 1], wal.len() - 1] {
        let _ = fs::remove_dir_all(&bad);
        copy(&good, &bad);
        fs::write(wal_of(&bad), &wal[..len]).unwrap();
        assert!(!opens(&bad, &format!("{len} bytes")).await, "{len} of {} bytes opened", wal.len());
    }
    // What was being written when the power went is torn, not damage: it was not fsynced, so the side file lags.
    let _ = fs::remove_dir_all(&bad);
    copy(&good, &bad);
    let torn = [&wal[..], &wal[found[1]..found[1] + 20]].concat();
    fs::write(wal_of(&bad), torn).unwrap();
    assert!(opens(&bad, "a torn tail").await);
}
