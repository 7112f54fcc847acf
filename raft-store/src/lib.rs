//! The only crate that touches RocksDB: Raft log, state rows, checkpoints, snapshots (docs/storage.md).
//! Nothing here may acknowledge before its fsync, retry a failed fsync, or serve bytes whose checksum does not match.

#![forbid(unsafe_code)]

mod apply;
mod blocks;
mod cache;
mod checkpoint;
mod clean;
mod db;
mod disk;
mod exec;
pub mod floor;
mod framing;
mod identity;
mod install;
mod loader;
pub mod log;
mod logkey;
pub mod machine;
pub mod memory;
mod open;
mod options;
mod quarantine;
pub mod reader;
pub mod runtime;
mod shard;
pub mod snapshot;
pub mod store;
mod synced;
mod tail;
pub mod types;
pub mod verify;
mod wal;
pub mod wire;

pub use log::ShardLog;
pub use machine::ShardMachine;
pub use memory::{DiskError, DiskFaults, MemoryDisk, ReadFault};
pub use open::{open, open_in_memory};
pub use reader::{AppliedView, ReadError, ShardReader};
pub use snapshot::{RowChunk, SnapshotReceiver, SnapshotRows};
pub use store::{
    ApplyHook, Failure, Identity, META_SLOTS, OpenError, REBUILD, Shard, ShardPosition, Stats, Store, StoreConfig,
    StoreError,
};
pub use verify::ReplicaReport;
