//! Bits flipped in the WAL and the MANIFESTs of a stopped store: it does not open, but for bits that belong to nobody.
//! Must never accept "opened, but shorter".

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use openraft::{RaftLogReader, storage::RaftLogStorage};
use rand::{Rng, SeedableRng, rngs::StdRng};
use stentor_proto::ids::{ReplicaId, ShardId};
use stentor_raft_store::{OpenError, ReplicaReport, StoreError, open, types::Vote, wire::log_id};
use support::{Quiet, Replica, SLOTS, config, open_quiet};

mod support;

/// Makes a WAL longer than what is looked at of it.
const MANY: u64 = 100;
const FEW: u64 = 24;
/// How much of the end of the WAL is looked at byte by byte.
const LAST_BYTES: usize = 64 << 10;

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

/// Where the records of a WAL or MANIFEST begin: `u32 crc │ u16 length │ u8 type │ payload`, in blocks of 32 KiB.
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

/// The bytes that a block's end leaves over: nobody's.
fn padding(wal: &[u8]) -> Vec<Range<usize>> {
    let ends = records(wal).into_iter().map(|at| at + 7 + u16::from_le_bytes([wal[at + 4], wal[at + 5]]) as usize);
    ends.filter(|end| end % 32_768 > 32_768 - 7).map(|end| end..end.next_multiple_of(32_768)).collect()
}

/// What a whole directory says: its entries, and the state that they make.
struct Good {
    entries: u64,
    report: ReplicaReport,
}

impl Good {
    /// A durable checkpoint covers half of the entries.
    fn checkpoint(&self) -> u64 {
        self.entries / 2
    }

    /// The log begins here: whoever loses the checkpoint has nothing to make it again from.
    fn begin(&self) -> u64 {
        self.checkpoint() / 2
    }
}

/// A stopped store with fsynced entries, one batch each.
async fn written(dir: &Path, entries: u64) -> Good {
    let store = open_quiet(dir);
    let mut replica = Replica::open(&store, 1, SLOTS).await;
    replica.vote(1).await;
    for index in 0..entries {
        replica.write(index..index + 1).await;
        if index + 1 == entries / 2 {
            replica.checkpoint().await;
        }
    }
    let report = replica.shard.reader.verify().await.unwrap();
    let good = Good { entries, report };
    replica.shard.log.purge(log_id(1, good.begin() - 1)).await.unwrap();
    store.close().await;
    good
}

/// Whether the copy opens; when it does, everything must be there, and when it does not, it must be for damage.
async fn opens(dir: &Path, good: &Good, what: &str) -> bool {
    let store = match open(config(dir), Arc::new(Quiet)) {
        Ok(store) => store,
        Err(OpenError::Corrupt { .. }) => return false,
        Err(other) => panic!("{what}: {other}"),
    };
    let shard = match store.shard(ShardId(1), SLOTS).await {
        Ok(shard) => shard,
        Err(StoreError::Damaged { .. }) => {
            store.close().await;
            return false;
        }
        Err(other) => panic!("{what}: {other}"),
    };
    let mut replica = Replica { id: ShardId(1), shard, term: 1 };
    let vote = replica.shard.log.read_vote().await.unwrap();
    assert_eq!(vote, Some(Vote::new_committed(1, ReplicaId::from_u64(1))), "{what}: the vote is lost");
    let last = replica.shard.log.get_log_state().await.unwrap().last_log_id.map(|id| id.index);
    assert_eq!(last, Some(good.entries - 1), "{what}: opened without what was fsynced");
    let entries = replica.shard.log.try_get_log_entries(..).await;
    let whole = entries.is_ok_and(|entries| {
        entries.len() as u64 == good.entries - good.begin()
            && entries.iter().all(|e| e.payload == support::payload_at(ShardId(1), e.log_id.index))
    });
    assert!(whole, "{what}: served what was not written");
    assert_eq!(replica.applied_index().await, Some(good.checkpoint() - 1), "{what}: the checkpoint is lost");
    replica.reapply(good.entries - 1).await;
    assert_eq!(replica.shard.reader.verify().await.as_ref(), Ok(&good.report), "{what}: the state is another one");
    assert_eq!(*store.failed().borrow(), None, "{what}");
    store.close().await;
    true
}

/// Flips these bits of the WAL, each alone. All are found, but those of bytes that belong to nobody.
async fn flip_in_wal(entries: u64, bits: impl FnOnce(&[u8]) -> Vec<usize>) {
    let dir = support::scratch();
    let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
    let whole = written(&good, entries).await;
    let wal = fs::read(wal_of(&good)).unwrap();
    assert!(records(&wal).len() as u64 > entries && (entries < MANY || wal.len() > LAST_BYTES), "one record a batch");
    let padding = padding(&wal);
    for bit in bits(&wal) {
        let _ = fs::remove_dir_all(&bad);
        copy(&good, &bad);
        let mut bytes = wal.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(wal_of(&bad), bytes).unwrap();
        let opened = opens(&bad, &whole, &format!("bit {bit}")).await;
        let nobodys = padding.iter().any(|bytes| bytes.contains(&(bit / 8)));
        assert_eq!(opened, nobodys, "bit {bit} of a WAL of {} bytes: opened, nobody's", wal.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flip_in_a_header_of_the_wal_is_found() {
    flip_in_wal(FEW, |wal| records(wal).into_iter().flat_map(|at| at * 8..(at + 7) * 8).collect()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flip_of_two_thousand_in_the_wal_is_found() {
    let mut rng = StdRng::seed_from_u64(6);
    flip_in_wal(MANY, |wal| (0..2_000).map(|_| rng.random_range(0..wal.len() * 8)).collect()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flip_all_over_the_end_of_the_wal_is_found() {
    // Each 61st byte, and in each another bit: no stretch of a record is left out.
    flip_in_wal(MANY, |wal| (wal.len() - LAST_BYTES..wal.len()).step_by(61).map(|at| at * 8 + at % 8).collect()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: each byte of 64 KiB"]
async fn every_byte_of_the_end_of_the_wal_is_found() {
    flip_in_wal(MANY, |wal| (wal.len() - LAST_BYTES..wal.len()).map(|at| at * 8 + at % 8).collect()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flip_in_a_manifest_or_in_what_names_it_is_found() {
    let dir = support::scratch();
    let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
    let report = written(&good, FEW).await;
    let mut rng = StdRng::seed_from_u64(7);
    for instance in ["log", "state"] {
        let files = fs::read_dir(good.join(instance)).unwrap().map(|file| file.unwrap().file_name());
        let told = |name: &str| name.starts_with("MANIFEST-") || name == "CURRENT";
        for name in files.filter(|name| told(name.to_str().unwrap())) {
            let bytes = fs::read(good.join(instance).join(&name)).unwrap();
            // Every record's header, and a sample of the rest; of the name all.
            let bits: Vec<usize> = if name == "CURRENT" {
                (0..bytes.len() * 8).collect()
            } else {
                let headers = records(&bytes).into_iter().flat_map(|at| at * 8..(at + 7) * 8);
                headers.chain((0..60).map(|_| rng.random_range(0..bytes.len() * 8))).collect()
            };
            for bit in bits {
                let _ = fs::remove_dir_all(&bad);
                copy(&good, &bad);
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                fs::write(bad.join(instance).join(&name), bytes).unwrap();
                let what = format!("{instance} {} bit {bit}", name.display());
                assert!(!opens(&bad, &report, &what).await, "{what}: opened");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shorter_wal_is_not_an_older_one() {
    let dir = support::scratch();
    let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
    let report = written(&good, FEW).await;
    let wal = fs::read(wal_of(&good)).unwrap();
    let found = records(&wal);
    for len in [0, found[1], found[found.len() / 2] + 3, found[found.len() - 1], wal.len() - 1] {
        let _ = fs::remove_dir_all(&bad);
        copy(&good, &bad);
        fs::write(wal_of(&bad), &wal[..len]).unwrap();
        assert!(!opens(&bad, &report, &format!("{len} bytes")).await, "{len} of {} bytes opened", wal.len());
    }
    // What was being written when the power went is torn, not damage: it was not fsynced, so the side file lags.
    let _ = fs::remove_dir_all(&bad);
    copy(&good, &bad);
    let torn = [&wal[..], &wal[found[1]..found[1] + 20]].concat();
    fs::write(wal_of(&bad), torn).unwrap();
    assert!(opens(&bad, &report, "a torn tail").await);
}
