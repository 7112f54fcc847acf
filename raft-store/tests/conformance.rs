//! openraft's own conformance suite for storage, on real directories and on their twin in memory.
//! Must never be weakened to pass: what it asks for is what openraft leans on.

#![allow(clippy::unwrap_used, unreachable_pub)]

use std::sync::Arc;

use openraft::{
    StorageError,
    testing::log::{StoreBuilder, Suite},
};
use stentor_proto::ids::ShardId;
use stentor_raft_store::{ShardLog, ShardMachine, Store, types::TypeConfig};

mod support;

struct OnDisk;
struct OnTheTwin;

/// Ends the store's threads with its test: one that still runs when the process ends finds RocksDB taken apart.
struct Guard {
    store: Arc<Store>,
    _dir: tempfile::TempDir,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let store = self.store.clone();
        let close = move || tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(store.close());
        std::thread::spawn(close).join().unwrap();
    }
}

impl StoreBuilder<TypeConfig, ShardLog, ShardMachine, Guard> for OnDisk {
    async fn build(&self) -> Result<(Guard, ShardLog, ShardMachine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let store = support::open_quiet(dir.path());
        let shard = store.shard(ShardId(1), support::SLOTS).await.unwrap();
        Ok((Guard { store, _dir: dir }, shard.log, shard.machine))
    }
}

impl StoreBuilder<TypeConfig, ShardLog, ShardMachine, Arc<Store>> for OnTheTwin {
    async fn build(&self) -> Result<(Arc<Store>, ShardLog, ShardMachine), StorageError<TypeConfig>> {
        let store = support::Place::twin().open();
        let shard = store.shard(ShardId(1), support::SLOTS).await.unwrap();
        Ok((store, shard.log, shard.machine))
    }
}

#[test]
fn openrafts_suite_passes_on_a_disk() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(Suite::test_all(OnDisk)).unwrap();
}

#[test]
fn openrafts_suite_passes_on_the_twin() {
    support::simulate(1, Suite::test_all(OnTheTwin)).unwrap();
}
