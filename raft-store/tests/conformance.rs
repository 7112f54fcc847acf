//! openraft's own conformance suite for storage, on real directories.
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

struct Builder;

impl StoreBuilder<TypeConfig, ShardLog, ShardMachine, (Arc<Store>, tempfile::TempDir)> for Builder {
    async fn build(
        &self,
    ) -> Result<((Arc<Store>, tempfile::TempDir), ShardLog, ShardMachine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let store = support::open_quiet(dir.path());
        let shard = store.shard(ShardId(1), support::SLOTS).await.unwrap();
        Ok(((store, dir), shard.log, shard.machine))
    }
}

#[test]
fn openrafts_suite_passes() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(Suite::test_all(Builder)).unwrap();
}
