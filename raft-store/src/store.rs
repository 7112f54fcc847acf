//! The store of one broker: opens its data directory, owns the threads and hands out shards.
//! Must never open a directory that another process uses, another cluster owns or a newer version wrote.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use parking_lot::Mutex;
use stentor_engine::{effect::Applied, key::META_AREA, limits};
use stentor_proto::{
    ids::{BrokerId, Incarnation, ShardId},
    internal::AppliedRow,
};
use thiserror::Error;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use crate::{
    apply::{ApplyStats, Job},
    checkpoint::{self, Checkpoints},
    db::{Db, DbError, KeyRange},
    disk::{Disk, Lock},
    exec::Worker,
    identity, install,
    loader::Loader,
    log::{LogCore, ShardLog},
    logkey::{self, LogKind},
    machine::ShardMachine,
    quarantine::Quarantine,
    reader::ShardReader,
    shard::{ShardCore, ShardState, Undurable},
    snapshot::SnapshotReceiver,
    types::RaftLogId,
    wal::{Op, Wal},
};

/// The meta shard's place among the slots.
pub const META_SLOTS: Range<u16> = META_AREA..META_AREA + 1;

/// Where and how much.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The data directory; made when missing.
    pub dir: PathBuf,
    /// Bytes of rows in memory, dirty and clean, of all shards; resident heads come on top.
    pub cache_bytes: usize,
    /// A shard is checkpointed at the latest after this much log, in bytes.
    pub checkpoint_log_bytes: u64,
    /// A shard with changes is checkpointed at the latest after this time.
    pub checkpoint_interval: Duration,
    /// No more log than this, in bytes and over all shards, waits for a checkpoint.
    pub undurable_log_bytes: u64,
    /// Bytes of log entries per shard that stay in memory for replication and apply.
    pub tail_bytes: usize,
    /// Bytes of log that a replica keeps below its checkpoint for slower ones; less where there are many shards
    /// ([`limits::KEPT_LOG_BYTES`]).
    pub keep_log_bytes: u64,
}

impl StoreConfig {
    /// The part of the cache that is for dirty rows: from there on they are checkpointed early.
    pub(crate) fn dirty_bytes(&self) -> usize {
        self.cache_bytes / 4
    }

    /// The figures of the design under a directory.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            cache_bytes: 512 << 20,
            checkpoint_log_bytes: 4 << 20,
            checkpoint_interval: Duration::from_secs(10),
            undurable_log_bytes: 256 << 20,
            tail_bytes: 4 << 20,
            keep_log_bytes: 64 << 20,
        }
    }
}

/// Who a data directory is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The cluster that it belongs to.
    pub cluster_id: String,
    /// The broker.
    pub broker: BrokerId,
    /// Its number, unchanged by restarts.
    pub incarnation: Incarnation,
}

/// What to do with a damaged directory, for people.
pub const REBUILD: &str =
    "put the directory aside and start again: it joins empty, and gets its replicas from the others";

/// Why a directory cannot be opened. Nothing in it was changed.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// Written by a newer version of Stentor.
    #[error("{dir} has format {found}; this version knows formats up to {known}")]
    NewerFormat {
        /// The directory.
        dir: PathBuf,
        /// What it says.
        found: u32,
        /// What this build knows.
        known: u32,
    },
    /// Bytes on disk are not what was written: the disk is at fault. The broker's replicas must come back empty, under
    /// a new incarnation, from their peers.
    #[error("DAMAGED: {dir}: {what}; {REBUILD}")]
    Corrupt {
        /// The directory.
        dir: PathBuf,
        /// What does not fit.
        what: String,
    },
    /// The operating system refused.
    #[error("{dir}: {source}")]
    Io {
        /// The directory or file.
        dir: PathBuf,
        /// Its words.
        source: io::Error,
    },
}

/// Why the store refuses a call.
#[derive(Debug, Clone, Error)]
pub enum StoreError {
    /// A write or an fsync has failed before: the broker must stop. It is unknown what reached the disk.
    #[error("the store has failed: {0}")]
    Failed(Failure),
    /// The directory belongs to another cluster, broker or incarnation already; nothing changed.
    #[error("the directory belongs to cluster {}, broker {}, incarnation {}", .0.cluster_id, .0.broker, .0.incarnation)]
    OtherIdentity(Identity),
    /// The shard lies on disk with other slots; nothing changed.
    #[error("shard {shard} has slots {found:?} on disk, not {asked:?}")]
    OtherSlots {
        /// The shard.
        shard: ShardId,
        /// On disk.
        found: Range<u16>,
        /// Asked for.
        asked: Range<u16>,
    },
    /// Stored bytes are not what was written; the replica must not be used.
    #[error("shard {shard} is damaged: {what}")]
    Damaged {
        /// The shard.
        shard: ShardId,
        /// What does not fit.
        what: String,
    },
    /// The shard is not open here; nothing changed.
    #[error("shard {0} is not open")]
    UnknownShard(ShardId),
    /// The shard's handles are in use: one raft per shard.
    #[error("shard {0} is open already")]
    Open(ShardId),
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
}

/// What made the store stop for good: the disk's fault. Everything after it is refused, nothing is retried.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what}")]
pub struct Failure {
    /// What failed, and the operating system's words.
    pub what: String,
}

/// Called on the apply thread after each entry, before its answers are sent: what it does, every shard waits for.
pub trait ApplyHook: Send + Sync {
    /// `applied.effects` may be taken; `applied.outcomes` are sent to the proposer afterwards. Called for re-applied
    /// entries too: only the leader of the current term may carry effects out.
    fn applied(&self, shard: ShardId, log_id: RaftLogId, applied: &mut Applied);
}

/// How far a shard is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShardPosition {
    /// Applied in memory.
    pub applied: Option<RaftLogId>,
    /// The durable checkpoint: the log up to here is not needed for recovery.
    pub durable: Option<RaftLogId>,
    /// The log up to here lies more than what is kept for slower replicas below the durable checkpoint.
    pub purgeable: Option<RaftLogId>,
    /// Bytes of log applied since the last cut.
    pub undurable_log_bytes: u64,
}

/// Figures for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Batches that the WAL thread has fsynced.
    pub wal_syncs: u64,
    /// Operations in them.
    pub wal_operations: u64,
    /// Bytes of entries in them.
    pub wal_bytes: u64,
    /// Entries applied.
    pub entries_applied: u64,
    /// Commands applied.
    pub commands_applied: u64,
    /// Times that an entry waited for rows from disk.
    pub loads: u64,
    /// Checkpoints written.
    pub checkpoints: u64,
    /// Flushes of the state instance.
    pub flushes: u64,
    /// Bytes of rows in memory that are not on disk.
    pub dirty_bytes: u64,
    /// Bytes of clean rows in memory.
    pub clean_bytes: u64,
    /// Bytes of log applied and not covered by a durable checkpoint.
    pub undurable_log_bytes: u64,
}

/// A shard's three faces: the first two go to openraft, the third is for reads.
pub struct Shard {
    /// `RaftLogStorage`.
    pub log: ShardLog,
    /// `RaftStateMachine`.
    pub machine: ShardMachine,
    /// Reads of what was applied.
    pub reader: ShardReader,
}

/// Handles that every shard's parts need; cheap to clone.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) disk: Disk,
    pub(crate) state_db: Arc<Db>,
    pub(crate) apply: mpsc::Sender<Job>,
    pub(crate) loader: Loader,
    pub(crate) checkpoints: Checkpoints,
    pub(crate) failed: watch::Sender<Option<Failure>>,
    pub(crate) quarantine: Arc<Quarantine>,
    pub(crate) install_dir: PathBuf,
    /// Bytes of clean rows that one shard may keep.
    pub(crate) clean_budget: Arc<AtomicUsize>,
    pub(crate) epoch: Instant,
    pub(crate) identity: Arc<Mutex<Option<Identity>>>,
}

impl Parts {
    /// The store's clock, from 1.
    pub(crate) fn now_ms(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64 + 1
    }

    /// Publishes that the disk refused: from here on nothing is tried any more.
    pub(crate) fn fail(&self, what: String) -> StoreError {
        StoreError::Failed(self.quarantine.refuse(what))
    }

    /// A read of an instance was answered so: damage is noted, a refusal is published; either way the broker stops.
    pub(crate) fn refused(&self, shard: ShardId, doing: &str, error: DbError) -> StoreError {
        match error {
            DbError::Corrupt(what) => {
                self.quarantine.condemn(&format!("shard {shard}: {what}"));
                StoreError::Damaged { shard, what }
            }
            DbError::Io(what) => self.fail(format!("{doing}, shard {shard}: {what}")),
        }
    }

    /// Refuses when the disk has refused before.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        self.failed.borrow().clone().map_or(Ok(()), |failure| Err(StoreError::Failed(failure)))
    }

    /// The directory's number; 0 while it has none.
    pub(crate) fn incarnation(&self) -> Incarnation {
        self.identity.lock().as_ref().map_or(Incarnation(0), |identity| identity.incarnation)
    }
}

/// What `open` has prepared.
pub(crate) struct Opened {
    pub(crate) config: StoreConfig,
    pub(crate) parts: Parts,
    pub(crate) log_db: Arc<Db>,
    pub(crate) wal: Wal,
    pub(crate) apply_stats: Arc<ApplyStats>,
    pub(crate) workers: Vec<Worker>,
    pub(crate) lock: Lock,
}

/// The store of one broker.
pub struct Store {
    config: StoreConfig,
    parts: Parts,
    log_db: Arc<Db>,
    wal: Wal,
    apply_stats: Arc<ApplyStats>,
    workers: Mutex<Vec<Worker>>,
    shards: Mutex<BTreeMap<ShardId, Arc<ShardCore>>>,
    undurable: Arc<Undurable>,
    /// One shard is opened at a time.
    opening: tokio::sync::Mutex<()>,
    /// Held for as long as the directory is in use.
    _lock: Lock,
}

impl Store {
    pub(crate) fn new(opened: Opened) -> Self {
        let Opened { config, parts, log_db, wal, apply_stats, workers, lock } = opened;
        Self {
            config,
            parts,
            log_db,
            wal,
            apply_stats,
            workers: Mutex::new(workers),
            shards: Mutex::default(),
            undurable: Arc::default(),
            opening: tokio::sync::Mutex::default(),
            _lock: lock,
        }
    }

    /// Who this directory is; `None` while it is new.
    pub fn identity(&self) -> Option<Identity> {
        self.parts.identity.lock().clone()
    }

    /// Writes who this directory is, once and durably; the same again changes nothing. Blocks on the disk.
    ///
    /// # Errors
    /// [`StoreError::OtherIdentity`] when it is somebody else already; [`StoreError::Failed`] when the disk refuses.
    pub fn set_identity(&self, identity: &Identity) -> Result<(), StoreError> {
        let mut now = self.parts.identity.lock();
        match &*now {
            Some(found) if found == identity => return Ok(()),
            Some(found) => return Err(StoreError::OtherIdentity(found.clone())),
            None => self.parts.check()?,
        }
        identity::write(&self.parts.disk, &self.config.dir, Some(identity))
            .map_err(|error| self.parts.fail(format!("writing the identity: {error}")))?;
        *now = Some(identity.clone());
        Ok(())
    }

    /// A shard's handles; made when it is not on disk yet. `slots` are those of its placement ([`META_SLOTS`] for the
    /// meta shard) and are remembered.
    ///
    /// # Errors
    /// After [`StoreError::Failed`] and [`StoreError::Damaged`] the broker must stop; of damage the directory keeps a
    /// note. Otherwise nothing changed.
    pub async fn shard(&self, shard: ShardId, slots: Range<u16>) -> Result<Shard, StoreError> {
        let _one = self.opening.lock().await;
        self.parts.check()?;
        if self.shards.lock().contains_key(&shard) {
            return Err(StoreError::Open(shard));
        }
        let damaged = |what: String| StoreError::Damaged { shard, what };
        let refused = |error| self.parts.refused(shard, "opening the shard", error);
        let found = self.slots_on_disk(shard).map_err(refused)?;
        if let Some(found) = found.clone().filter(|found| *found != slots) {
            return Err(StoreError::OtherSlots { shard, found, asked: slots });
        }
        let open = self.shards.lock().len() + 1;
        let clean = self.config.cache_bytes - self.config.dirty_bytes();
        self.parts.clean_budget.store(clean / open, Relaxed);
        let (log_db, wal, tail_bytes) = (self.log_db.clone(), self.wal.clone(), self.config.tail_bytes);
        let (state_db, budget, range) = (self.parts.state_db.clone(), self.parts.clean_budget.clone(), slots.clone());
        let exec = self.parts.disk.exec();
        let load = move || {
            let state = ShardState::load(shard, &range, &state_db, budget)?;
            Ok((LogCore::open(shard, log_db, (exec, wal), tail_bytes, state.progress.applied)?, state))
        };
        let loaded = exec.run(load).await.map_err(|_| StoreError::Closed)?;
        let (log, state) = loaded.map_err(refused)?;
        let log = Arc::new(log);
        if found.is_none() {
            log.send_and_wait(|done| Op::Slots { slots: slots.clone(), done }).await?;
        }
        let applied = state.progress.applied;
        if log.purged() > applied {
            // What lies between is in neither: a flush that was acknowledged is gone.
            let purged = log.purged().map_or(0, |id| id.index);
            return Err(damaged(format!("the log is purged up to {purged}, the state was applied up to {applied:?}")));
        }
        log.applied_to(applied.map_or(0, |id| id.index));
        let core = Arc::new(ShardCore::new(shard, slots, log.clone(), state, self.undurable.clone()));
        self.shards.lock().insert(shard, core.clone());
        let parts = self.parts.clone();
        Ok(Shard {
            log: ShardLog { core: log },
            machine: ShardMachine { core: core.clone(), parts: parts.clone() },
            reader: ShardReader { core, parts },
        })
    }

    fn slots_on_disk(&self, shard: ShardId) -> Result<Option<Range<u16>>, DbError> {
        let key = logkey::small(shard, LogKind::Slots);
        let value = self.log_db.get(key)?;
        let slots = value.map(|value| logkey::slots_from(logkey::unseal(&key, &value)?)).transpose();
        slots.map_err(DbError::Corrupt)
    }

    /// The shards of this directory with their slots, ascending. Blocks on the disk.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] when what stands there is not what was written; [`StoreError::Failed`] when the disk
    /// refuses. Either way the broker must stop.
    pub fn shards_on_disk(&self) -> Result<Vec<(ShardId, Range<u16>)>, StoreError> {
        let mut shards = Vec::new();
        let mut iter = self.log_db.iter(KeyRange::default());
        let mut next = Some(ShardId(0));
        let refused = |error| self.parts.refused(ShardId(0), "listing the shards", error);
        while let Some(at) = next {
            iter.seek(logkey::small(at, LogKind::Slots));
            let Some(shard) = iter.key().and_then(logkey::shard_of) else { break };
            let slots = self.slots_on_disk(shard).map_err(refused)?;
            shards.extend(slots.map(|slots| (shard, slots)));
            next = shard.0.checked_add(1).map(ShardId);
        }
        iter.status().map_err(refused)?;
        Ok(shards)
    }

    /// Becomes `Some` when a write or an fsync fails: the broker must stop.
    pub fn failed(&self) -> watch::Receiver<Option<Failure>> {
        self.parts.failed.subscribe()
    }

    fn cores(&self) -> Vec<Arc<ShardCore>> {
        self.shards.lock().values().cloned().collect()
    }

    /// Figures for metrics.
    pub fn stats(&self) -> Stats {
        let cores = self.cores();
        Stats {
            wal_syncs: self.wal.stats.syncs.load(Relaxed),
            wal_operations: self.wal.stats.operations.load(Relaxed),
            wal_bytes: self.wal.stats.bytes.load(Relaxed),
            entries_applied: self.apply_stats.entries.load(Relaxed),
            commands_applied: self.apply_stats.commands.load(Relaxed),
            loads: self.apply_stats.loads.load(Relaxed),
            checkpoints: self.parts.checkpoints.stats.checkpoints.load(Relaxed),
            flushes: self.parts.checkpoints.stats.flushes.load(Relaxed),
            dirty_bytes: self.undurable.rows.load(Relaxed) as u64,
            clean_bytes: cores.iter().map(|core| core.state.lock().cache.clean_bytes() as u64).sum(),
            undurable_log_bytes: self.undurable.log.load(Relaxed),
        }
    }

    /// How far an open shard is, for the decision what to purge.
    pub fn position(&self, shard: ShardId) -> Option<ShardPosition> {
        let (core, open) = {
            let shards = self.shards.lock();
            (shards.get(&shard).cloned()?, shards.len() as u64)
        };
        let share = (limits::KEPT_LOG_BYTES / open.max(1)).max(limits::KEPT_LOG_SHARE_BYTES);
        let keep = self.config.keep_log_bytes.min(share);
        let durable = *core.durable.borrow();
        let applied = *core.applied.borrow();
        Some(ShardPosition {
            applied,
            durable,
            purgeable: core.log.purgeable(keep).min(durable),
            undurable_log_bytes: core.undurable_log(),
        })
    }

    /// True while new work should be refused (`OVERLOADED`): undurable log or dirty rows fill their bounds.
    pub fn overloaded(&self) -> bool {
        let (log, rows) = (self.undurable.log.load(Relaxed), self.undurable.rows.load(Relaxed));
        log >= self.config.undurable_log_bytes || rows >= self.config.cache_bytes
    }

    /// Waits for the next shard that should be checkpointed: call `raft.trigger().snapshot()` for it, then ask again.
    /// One caller at a time. Cancel-safe.
    pub async fn checkpoint_due(&self) -> ShardId {
        // A quarter of the flusher's patience: dueness is a matter of seconds and megabytes.
        let pause = (self.config.checkpoint_interval / 40).clamp(Duration::from_millis(5), Duration::from_millis(250));
        loop {
            let now = self.parts.now_ms();
            let due = checkpoint::due(&self.config, self.shards.lock().values(), &self.undurable, now);
            if let Some(core) = due {
                return core.shard;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Begins to receive a snapshot for a shard: chunks are verified and staged on disk. One at a time per shard: this
    /// waits until the one before is installed or abandoned.
    ///
    /// # Errors
    /// [`StoreError::UnknownShard`], and nothing changed; [`StoreError::Failed`] when the staging file cannot be made.
    pub async fn receive_snapshot(&self, shard: ShardId, applied: &AppliedRow) -> Result<SnapshotReceiver, StoreError> {
        let core = self.shards.lock().get(&shard).cloned().ok_or(StoreError::UnknownShard(shard))?;
        let path = install::rows_path(&self.parts.install_dir, shard);
        let claim = core.staging.clone().lock_owned().await;
        SnapshotReceiver::create(&core, &self.parts, &path, applied.clone(), claim)
    }

    /// Whether nothing that was handed out (logs, machines, readers) is held any more: after [`Self::close`], dropping
    /// the store then frees the directory at once.
    pub fn is_released(&self) -> bool {
        let one_owner = |core: &Arc<ShardCore>| Arc::strong_count(core) == 1 && Arc::strong_count(&core.log) == 1;
        self.shards.lock().values().all(one_owner) && Arc::strong_count(&self.parts.state_db) == 1
    }

    /// Stops the threads after what was queued is on disk. Handles given out answer errors afterwards.
    pub async fn close(&self) {
        for core in self.cores() {
            // Carries the committed notes to the disk; a store that has failed has nothing left to write.
            let _ = core.log.send_and_wait(|done| Op::Barrier { done }).await;
        }
        let (done, wait) = oneshot::channel();
        if self.parts.apply.send(Job::Close(done)).await.is_ok() {
            // An error means that the thread is gone already.
            let _ = wait.await;
        }
        self.parts.loader.close();
        self.parts.checkpoints.close();
        self.wal.close().await;
        let workers = std::mem::take(&mut *self.workers.lock());
        // A checkpoint under way may take a while.
        self.parts.disk.exec().join(workers).await;
        let quarantine = self.parts.quarantine.clone();
        // Only a runtime that is going away does not run it.
        let _ = self.parts.disk.exec().run(move || quarantine.settle()).await;
    }
}
