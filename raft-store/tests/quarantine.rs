//! Damage that is met while a store is in use: never served, noted in the directory, and found there by the next start.
//! Must never accept a report that differs from the one before the damage.

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use openraft::RaftLogReader;
use stentor_proto::ids::ShardId;
use stentor_raft_store::{Failure, OpenError, ReadError, ReplicaReport, StoreError, open, types::RaftLogEntry};
use support::{Model, Quiet, Replica, SLOTS, config, open_quiet};

mod support;

const ENTRIES: u64 = 600;
/// Places in each part of a table where a bit is flipped.
const PLACES: usize = 8;

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

/// What a whole directory says.
struct Good {
    report: ReplicaReport,
    model: Model,
}

/// A stopped store whose rows and entries both stand in tables; what a verification says of it.
async fn written(dir: &Path) -> Good {
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
    let mut model = Model::new(ShardId(1));
    model.apply_to(ENTRIES - 1);
    Good { report, model }
}

#[derive(Debug, PartialEq)]
enum Found {
    AtStart,
    ByVerify,
    /// Nothing reads otherwise for it.
    Nowhere,
}

/// Damage was published, and the directory does not open again, for the same reason.
fn is_condemned(dir: &Path, failure: Option<Failure>, what: &str) {
    let failure = failure.unwrap_or_else(|| panic!("{what}: the store goes on")).what;
    assert!(failure.starts_with("DAMAGED: ") && failure.contains("put the directory aside"), "{what}: {failure}");
    match open(config(dir), Arc::new(Quiet)) {
        Err(error @ OpenError::Corrupt { .. }) => assert_eq!(error.to_string(), failure, "{what}"),
        other => panic!("{what}: it opens again: {:?}", other.map(drop)),
    }
}

async fn look(dir: &Path, good: &Good, what: &str) -> Found {
    let store = match open(config(dir), Arc::new(Quiet)) {
        Ok(store) => store,
        Err(OpenError::Corrupt { .. }) => return Found::AtStart,
        Err(other) => panic!("{what}: {other}"),
    };
    let shard = match store.shard(ShardId(1), SLOTS).await {
        Ok(shard) => shard,
        Err(StoreError::Damaged { .. }) => {
            let failure = store.failed().borrow().clone();
            store.close().await;
            drop(store);
            is_condemned(dir, failure, what);
            return Found::AtStart;
        }
        Err(other) => panic!("{what}: {other}"),
    };
    let mut replica = Replica { id: ShardId(1), shard, term: 1 };
    let verified = replica.shard.reader.verify().await;
    if verified.is_ok() {
        // Whatever it was, nothing that was written reads otherwise: each row, each event, each entry.
        good.model.compare(&replica).await;
        let entries = replica.shard.log.try_get_log_entries(..).await.unwrap();
        let written = |entry: &RaftLogEntry| entry.payload == support::payload_at(ShardId(1), entry.log_id.index);
        assert!(entries.len() as u64 == ENTRIES && entries.iter().all(written), "{what}");
    }
    let failure = store.failed().borrow().clone();
    store.close().await;
    drop((replica, store));
    match verified {
        Ok(report) => {
            assert_eq!((report, failure), (good.report.clone(), None), "{what}");
            Found::Nowhere
        }
        Err(ReadError::Damaged(_)) => {
            is_condemned(dir, failure, what);
            Found::ByVerify
        }
        Err(other) => panic!("{what}: {other}"),
    }
}

fn varint(bytes: &mut &[u8]) -> usize {
    let (mut value, mut shift) = (0, 0);
    loop {
        let (&byte, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return value;
        }
    }
}

const FOOTER_BYTES: usize = 53;
/// A block's compression type and checksum, behind it.
const TRAILER_BYTES: usize = 5;

/// What a block that is not compressed has: keys that share a prefix with the one before, and values.
fn entries(block: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let restarts = u32::from_le_bytes(block[block.len() - 4..].try_into().unwrap()) as usize;
    let mut rest = &block[..block.len() - 4 - 4 * restarts];
    let (mut key, mut entries) = (Vec::new(), BTreeMap::new());
    while !rest.is_empty() {
        let (shared, own, value) = (varint(&mut rest), varint(&mut rest), varint(&mut rest));
        key.truncate(shared);
        key.extend_from_slice(&rest[..own]);
        entries.insert(String::from_utf8_lossy(&key).into_owned(), rest[own..own + value].to_vec());
        rest = &rest[own + value..];
    }
    entries
}

/// The parts of a table (RocksDB's block-based format, version 6 and later): the footer tells the metaindex' length,
/// which ends there; that one has the places of the others.
fn parts(sst: &[u8]) -> Vec<(String, Range<usize>)> {
    let footer = sst.len() - FOOTER_BYTES;
    let version = u32::from_le_bytes(sst[sst.len() - 12..sst.len() - 8].try_into().unwrap());
    assert!(version >= 6, "format {version}");
    let len = u32::from_le_bytes(sst[footer + 13..footer + 17].try_into().unwrap()) as usize;
    let metaindex = footer - len - TRAILER_BYTES;
    let mut parts = vec![("footer".into(), footer..sst.len()), ("metaindex".into(), metaindex..footer)];
    for (name, handle) in entries(&sst[metaindex..metaindex + len]) {
        let mut handle = &handle[..];
        let (at, size) = (varint(&mut handle), varint(&mut handle));
        parts.push((name, at..at + size + TRAILER_BYTES));
    }
    let (_, properties) = parts.iter().find(|(name, _)| name == "rocksdb.properties").unwrap();
    let size = entries(&sst[properties.start..properties.end - TRAILER_BYTES]).remove("rocksdb.data.size").unwrap();
    let (data, pieces) = (varint(&mut &size[..]), parts.iter().map(|(_, range)| range.start).min().unwrap());
    parts.push(("data".into(), 0..data));
    if data < pieces {
        // Of the index and the filter, whose own blocks say where each of these is.
        parts.push(("pieces".into(), data..pieces));
    }
    parts
}

/// Places in a part: its first and last bytes, all of a small one, and some between.
fn places(part: &Range<usize>) -> Vec<usize> {
    if part.len() <= FOOTER_BYTES {
        return part.clone().collect();
    }
    let between = (0..PLACES).map(|n| part.start + n * part.len() / PLACES);
    let mut places: Vec<usize> = between.chain(part.end - 2 * TRAILER_BYTES..part.end).collect();
    places.sort_unstable();
    places.dedup();
    places
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flip_in_any_part_of_a_table_is_found_and_stays_found_or_changes_nothing() {
    let dir = support::scratch();
    let (clean, bad) = (dir.path().join("good"), dir.path().join("bad"));
    let good = written(&clean).await;
    let (mut by_verify, mut seen) = (0, BTreeSet::new());
    for instance in ["state", "log"] {
        for sst in ssts(&clean, instance) {
            let bytes = fs::read(clean.join(&sst)).unwrap();
            for (part, range) in parts(&bytes) {
                let mut found = Vec::new();
                for place in places(&range) {
                    let _ = fs::remove_dir_all(&bad);
                    copy(&clean, &bad);
                    let mut flipped = bytes.clone();
                    flipped[place] ^= 1 << (place % 8);
                    fs::write(bad.join(&sst), flipped).unwrap();
                    let what = format!("{}, {part}, byte {place} of {range:?}", sst.display());
                    found.push(look(&bad, &good, &what).await);
                }
                let nowhere = found.iter().filter(|f| **f == Found::Nowhere).count();
                by_verify += found.iter().filter(|f| **f == Found::ByVerify).count();
                println!("{} {part}: {} flips, {nowhere} found nowhere", sst.display(), found.len());
                // RocksDB does without a filter whose checksum does not match; all else it needs.
                let fine = match part.as_str() {
                    "pieces" => nowhere < found.len(),
                    part => nowhere == 0 || part.starts_with("partitionedfilter."),
                };
                assert!(fine, "{} {part}: {found:?}", sst.display());
                seen.insert(part);
            }
        }
    }
    assert!(by_verify > 0, "verify found nothing that a start had not found");
    let filter = "partitionedfilter.rocksdb.BuiltinBloomFilter";
    let kinds = ["data", "footer", "metaindex", "pieces", "rocksdb.index", filter];
    assert!(kinds.iter().all(|kind| seen.contains(*kind)), "{seen:?}");
    assert!(seen.contains("rocksdb.properties"), "{seen:?}");
}
