//! What the store costs on a real directory: a round of the WAL thread with its fsync, and a page of history. Must never
//! assert a time.

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub, missing_docs)]

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use stentor_engine::key::Entity;
use stentor_proto::ids::{Seq, ShardId};
use stentor_raft_store::{StoreConfig, open};
use tokio::runtime::{Builder, Runtime};

#[path = "../tests/support/mod.rs"]
mod support;

use support::{CONVERSATIONS, Quiet, Replica, SENDS, SHARDS, conversation, slots_of};

/// Entries that one shard appends in a round.
const ENTRIES: u64 = 16;
/// Events of a page.
const PAGE: usize = 50;

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// All shards append at the same moment: one batch, one fsync, as many callbacks.
fn group_commit(c: &mut Criterion) {
    let (runtime, dir) = (runtime(), tempfile::tempdir().unwrap());
    let (store, mut replicas) = runtime.block_on(async {
        let store = open(StoreConfig::new(dir.path().join("store")), std::sync::Arc::new(Quiet)).unwrap();
        let mut replicas = Vec::new();
        for id in 1..=SHARDS {
            replicas.push(Replica::open(&store, id, slots_of(id)).await);
        }
        (store, replicas)
    });
    let mut next = 0;
    let mut group = c.benchmark_group("wal");
    group.throughput(Throughput::Elements(u64::from(SHARDS) * ENTRIES));
    group.bench_function("4 shards, 16 entries each, synced", |b| {
        b.iter_custom(|rounds| {
            let mut took = Duration::ZERO;
            for _ in 0..rounds {
                let range = next..next + ENTRIES;
                next = range.end;
                let entries = |replica: &Replica| range.clone().map(|index| replica.entry(index)).collect::<Vec<_>>();
                let entries: Vec<_> = replicas.iter().map(entries).collect();
                let began = Instant::now();
                runtime.block_on(async {
                    let mut synced = Vec::new();
                    for (replica, entries) in replicas.iter_mut().zip(entries) {
                        synced.push(replica.append_start(entries).await);
                    }
                    for done in synced {
                        done.await.unwrap().unwrap();
                    }
                });
                took += began.elapsed();
            }
            took
        });
    });
    group.finish();
    runtime.block_on(store.close());
}

fn history(c: &mut Criterion) {
    let (runtime, dir) = (runtime(), tempfile::tempdir().unwrap());
    let (store, replica) = runtime.block_on(async {
        let store = open(StoreConfig::new(dir.path().join("store")), std::sync::Arc::new(Quiet)).unwrap();
        let mut replica = Replica::open(&store, 1, slots_of(1)).await;
        // A membership, the conversations, then so many rounds of sends in each.
        replica.write(0..1 + CONVERSATIONS * 101).await;
        replica.checkpoint().await;
        (store, replica)
    });
    let talks: Vec<_> =
        (0..CONVERSATIONS).map(|n| Entity::conversation("app", conversation(ShardId(1), n).as_str())).collect();
    let mut group = c.benchmark_group("history");
    group.throughput(Throughput::Elements(PAGE as u64));
    let mut turn = 0;
    group.bench_function("the last 50 of 400 events, from blocks", |b| {
        b.iter(|| {
            turn = (turn + 1) % talks.len();
            let page = runtime.block_on(replica.shard.reader.events_before(&talks[turn], Seq(u64::MAX), PAGE, 1 << 20));
            assert_eq!(page.unwrap().len(), PAGE);
        });
    });
    group.finish();
    assert!(SENDS * 100 > PAGE as u64);
    runtime.block_on(store.close());
}

criterion_group!(benches, group_commit, history);
criterion_main!(benches);
