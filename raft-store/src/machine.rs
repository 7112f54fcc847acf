//! One shard's state machine as openraft sees it.
//! Must never build a snapshot of what is not durable, or install one half.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use futures_util::{Stream, StreamExt};
use openraft::{
    EntryPayload, OptionalSend, RaftSnapshotBuilder,
    storage::{EntryResponder, RaftStateMachine},
};
use stentor_engine::limits;
use stentor_proto::internal::AppliedRow;
use tokio::sync::oneshot;

use crate::{
    apply::{ApplyJob, Item, Job},
    cache::Layer,
    checkpoint::WriteJob,
    install,
    shard::ShardCore,
    snapshot::SnapshotRows,
    store::{Parts, StoreError},
    types::{RaftLogId, SnapshotMeta, StoredMembership, TypeConfig},
    wire,
};

pub(crate) type Snapshot = openraft::alias::SnapshotOf<TypeConfig, SnapshotRows>;

/// A shard's state machine.
pub struct ShardMachine {
    pub(crate) core: Arc<ShardCore>,
    pub(crate) parts: Parts,
}

impl ShardMachine {
    async fn send(&self, entries: VecDeque<Item>) -> io::Result<()> {
        let (done, wait) = oneshot::channel();
        let job = Job::Apply(ApplyJob { core: self.core.clone(), entries, done });
        let closed = |_| io::Error::other(StoreError::Closed);
        self.parts.apply.send(job).await.map_err(|_| io::Error::other(StoreError::Closed))?;
        wait.await.map_err(closed)?
    }

    /// Freezes what is dirty between two entries; `None` while an earlier cut is being written.
    fn cut(&self) -> Option<Checkpoint> {
        let (core, parts) = (self.core.clone(), self.parts.clone());
        let mut state = self.core.state.lock();
        // A frozen set that the disk refused stays frozen: nobody must wait for its end.
        let stopped = state.stopped.clone().or_else(|| parts.check().err().map(|error| error.to_string()));
        if let Some(what) = stopped {
            drop(state);
            return Some(Checkpoint { core, parts, cut: Some(Err(what)) });
        }
        if core.installing.load(Relaxed) {
            return None;
        }
        let layer = state.cache.freeze()?;
        let row = state.progress.to_row();
        core.log_cut();
        core.dirty_since_ms.store(0, Relaxed);
        drop(state);
        // Whatever is applied is in the log by now; the newest operation covers it, wherever its index lies.
        let ticket = core.log.queued();
        Some(Checkpoint { core, parts, cut: Some(Ok(Cut { layer, row, ticket })) })
    }
}

struct Cut {
    layer: Arc<Layer>,
    row: AppliedRow,
    /// The log operation that must be fsynced first.
    ticket: u64,
}

/// A cut that waits to be written; dropped unwritten, its rows are dirty again.
pub struct Checkpoint {
    core: Arc<ShardCore>,
    parts: Parts,
    cut: Option<Result<Cut, String>>,
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        if let Some(Ok(cut)) = self.cut.take() {
            drop(cut.layer);
            let mut state = self.core.state.lock();
            state.cache.thaw();
            self.core.log_thawed();
            let _ = self.core.dirty_since_ms.compare_exchange(0, self.parts.now_ms(), Relaxed, Relaxed);
            self.core.asked_ms.store(0, Relaxed);
            drop(state);
            self.core.thawed.notify_waiters();
        }
    }
}

impl Checkpoint {
    async fn write(&mut self) -> io::Result<SnapshotMeta> {
        let ticket = match &self.cut {
            Some(Ok(cut)) => cut.ticket,
            Some(Err(what)) => return Err(io::Error::new(io::ErrorKind::InvalidData, what.clone())),
            None => return Err(io::Error::other("this cut is written already")),
        };
        // The log first: a state ahead of its log would leave a hole between them after a crash.
        self.core.log.wait_synced(ticket).await.map_err(io::Error::other)?;
        let Some(Ok(cut)) = self.cut.take() else {
            return Err(io::Error::other("this cut is written already"));
        };
        let meta = wire::snapshot_meta(&cut.row).map_err(io::Error::other)?;
        let core = self.core.clone();
        let written = self.parts.checkpoints.written(|done| WriteJob { core, layer: cut.layer, row: cut.row, done });
        written.await.map_err(io::Error::other)?;
        self.parts.checkpoints.flushed(false).await.map_err(io::Error::other)?;
        self.core.log_durable();
        self.core.asked_ms.store(0, Relaxed);
        self.core.durable.send_replace(meta.last_log_id);
        Ok(meta)
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Checkpoint {
    type SnapshotData = SnapshotRows;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let meta = self.write().await?;
        let snapshot = SnapshotRows::open(&self.core, &self.parts).await?;
        match snapshot {
            Some(snapshot) if snapshot.meta()?.last_log_id >= meta.last_log_id => Ok(Snapshot { meta, snapshot }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the checkpoint just written cannot be read")),
        }
    }
}

impl RaftStateMachine<TypeConfig> for ShardMachine {
    type SnapshotData = SnapshotRows;
    type SnapshotBuilder = Checkpoint;

    async fn applied_state(&mut self) -> Result<(Option<RaftLogId>, StoredMembership), io::Error> {
        let state = self.core.state.lock();
        Ok((state.progress.applied, state.progress.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let (mut job, mut bytes) = (VecDeque::new(), 0);
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            if let EntryPayload::Normal(bundle) = &entry.payload {
                bytes += bundle.bundle.len();
            }
            job.push_back((entry, responder));
            if job.len() >= limits::APPLY_JOB_ENTRIES || bytes >= limits::APPLY_JOB_BYTES {
                bytes = 0;
                self.send(std::mem::take(&mut job)).await?;
            }
        }
        if job.is_empty() { Ok(()) } else { self.send(job).await }
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Checkpoint> {
        loop {
            // Registered before looking, so that no wake-up falls between.
            let thawed = self.core.thawed.notified();
            if let Some(checkpoint) = self.cut() {
                return Some(checkpoint);
            }
            if !force {
                self.core.asked_ms.store(0, Relaxed);
                return None;
            }
            thawed.await;
        }
    }

    async fn get_snapshot_builder(&mut self) -> Checkpoint {
        loop {
            if let Some(checkpoint) = self.try_create_snapshot_builder(true).await {
                return checkpoint;
            }
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotRows) -> Result<(), io::Error> {
        install::install(&self.core, &self.parts, meta, snapshot).await.map_err(io::Error::other)
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let snapshot = SnapshotRows::open(&self.core, &self.parts).await?;
        snapshot.map(|snapshot| Ok(Snapshot { meta: snapshot.meta()?, snapshot })).transpose()
    }
}
