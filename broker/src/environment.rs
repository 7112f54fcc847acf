//! What a broker stands on: a machine, and a place for its data. The real ones, or their twins of a simulation. Must
//! never change what a broker does, only where it does it.

use std::{fmt, sync::Arc};

use stentor_proto::ids::{ReplicaId, ShardId};
use stentor_raft_store::{ApplyHook, MemoryDisk, OpenError, Store, StoreConfig};
use stentor_transport::Host;

/// Everything around a broker; the default is the real world.
#[derive(Clone, Default)]
pub struct Environment {
    /// The machine.
    pub host: Host,
    /// Where its data lives.
    pub place: Place,
    /// Whoever watches this broker.
    pub observer: Option<Arc<dyn Observer>>,
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment").field("host", &self.host).finish_non_exhaustive()
    }
}

/// Watches a broker: is told of every entry that is applied here, before its effects are carried out, and of whom it
/// leads. Must not wait.
pub trait Observer: ApplyHook {
    /// This replica leads its shard in this term. May be told several times.
    fn leads(&self, shard: ShardId, own: ReplicaId, term: u64);
}

/// Where a broker's data lives.
#[derive(Clone, Default)]
pub enum Place {
    /// In the directory that the configuration names.
    #[default]
    Directory,
    /// On a disk in memory.
    Memory(MemoryDisk),
}

impl Environment {
    pub(crate) async fn open(
        &self,
        config: StoreConfig,
        hook: Arc<dyn ApplyHook>,
    ) -> Result<Result<Arc<Store>, OpenError>, String> {
        match &self.place {
            Place::Directory => self.blocking(move || stentor_raft_store::open(config, hook)).await,
            Place::Memory(disk) => Ok(stentor_raft_store::open_in_memory(config, disk, hook)),
        }
    }

    /// Runs what may wait for a disk. A disk in memory never waits, and a simulation has no other threads.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, String> {
        match &self.place {
            Place::Directory => tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string()),
            Place::Memory(_) => Ok(work()),
        }
    }
}
