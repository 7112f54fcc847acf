//! Checkpoints: one thread writes frozen rows, one flusher makes them durable for all shards, and a schedule says
//! which shard is due. Must never publish a position as durable before a flush that began after its write returned.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use stentor_engine::{key::RowKey, limits, rows::Row};
use stentor_proto::{ids::Seq, internal::AppliedRow};
use tokio::{
    sync::{
        mpsc::{self, UnboundedReceiver, UnboundedSender},
        oneshot, watch,
    },
    time::{Instant, timeout_at},
};

use crate::{
    cache::{Drained, Layer},
    db::Db,
    exec::{Exec, Worker},
    quarantine::Quarantine,
    shard::{ShardCore, Undurable},
    store::{Failure, StoreConfig, StoreError},
    wal,
};

/// A cut to write.
pub(crate) struct WriteJob {
    pub(crate) core: Arc<ShardCore>,
    pub(crate) layer: Arc<Layer>,
    pub(crate) row: AppliedRow,
    pub(crate) done: oneshot::Sender<Result<(), Failure>>,
}

enum FlushJob {
    /// Answered by a flush that begins later; soon, not at once, so that many shards share it.
    Soon(oneshot::Sender<Result<(), Failure>>),
    /// The same at once.
    Now(oneshot::Sender<Result<(), Failure>>),
    Close,
}

/// Figures of the threads.
#[derive(Default)]
pub(crate) struct CheckpointStats {
    pub(crate) checkpoints: AtomicU64,
    pub(crate) flushes: AtomicU64,
    /// Bytes written since the last flush began.
    unflushed: AtomicU64,
}

/// The way to both threads; cheap to clone.
#[derive(Clone)]
pub(crate) struct Checkpoints {
    write: UnboundedSender<Option<WriteJob>>,
    flush: UnboundedSender<FlushJob>,
    pub(crate) stats: Arc<CheckpointStats>,
}

impl Checkpoints {
    /// Starts the checkpoint thread and the flusher.
    pub(crate) fn start(
        exec: Exec,
        db: &Arc<Db>,
        (failed, quarantine): (&watch::Sender<Option<Failure>>, &Arc<Quarantine>),
        delay: Duration,
    ) -> io::Result<(Self, [Worker; 2])> {
        let stats = Arc::new(CheckpointStats::default());
        // Never more than one cut per open shard, and one flush per cut.
        let (write, write_rx) = mpsc::unbounded_channel();
        let (flush, flush_rx) = mpsc::unbounded_channel();
        let writer =
            Writer { db: db.clone(), failed: failed.clone(), quarantine: quarantine.clone(), stats: stats.clone() };
        let quarantine = quarantine.clone();
        let flusher = Flusher { db: db.clone(), failed: failed.clone(), quarantine, stats: stats.clone(), delay };
        let workers = [exec.spawn("checkpoint", writer.run(write_rx))?, exec.spawn("flush", flusher.run(flush_rx))?];
        Ok((Self { write, flush, stats }, workers))
    }

    /// Writes a cut; visible to reads when this returns, durable only after [`Self::flushed`].
    pub(crate) async fn written(
        &self,
        job: impl FnOnce(oneshot::Sender<Result<(), Failure>>) -> WriteJob,
    ) -> Result<(), StoreError> {
        let (done, wait) = oneshot::channel();
        self.write.send(Some(job(done))).map_err(|_| StoreError::Closed)?;
        wait.await.map_err(|_| StoreError::Closed)?.map_err(StoreError::Failed)
    }

    /// Returns after a flush that began after this call. `now` does not wait for other shards' checkpoints.
    pub(crate) async fn flushed(&self, now: bool) -> Result<(), StoreError> {
        let (done, wait) = oneshot::channel();
        let job = if now { FlushJob::Now(done) } else { FlushJob::Soon(done) };
        self.flush.send(job).map_err(|_| StoreError::Closed)?;
        wait.await.map_err(|_| StoreError::Closed)?.map_err(StoreError::Failed)
    }

    /// Ends both threads after what is queued.
    pub(crate) fn close(&self) {
        // Closed twice is closed.
        let _ = self.write.send(None);
        let _ = self.flush.send(FlushJob::Close);
    }
}

struct Writer {
    db: Arc<Db>,
    failed: watch::Sender<Option<Failure>>,
    quarantine: Arc<Quarantine>,
    stats: Arc<CheckpointStats>,
}

impl Writer {
    async fn run(self, mut rx: UnboundedReceiver<Option<WriteJob>>) {
        while let Some(Some(job)) = rx.recv().await {
            let failure = self.failed.borrow().clone();
            let result = failure.map_or_else(|| self.write(&job), Err);
            if let Err(failure) = &result {
                wal::fail(&self.failed, failure);
            }
            let WriteJob { core, layer, done, .. } = job;
            drop(layer);
            if result.is_ok() {
                core.state.lock().cache.written();
                drain(&core);
                self.stats.checkpoints.fetch_add(1, Relaxed);
            }
            core.thawed.notify_waiters();
            // Whoever asked may be gone: the rows are written all the same.
            let _ = done.send(result);
        }
    }

    fn write(&self, job: &WriteJob) -> Result<(), Failure> {
        let mut batch = self.db.batch();
        for (key, row) in &job.layer.rows {
            match row {
                Some(row) => batch.put(key.as_bytes(), row.encode(key)),
                None => batch.delete(key.as_bytes()),
            }
        }
        for (entity, run) in &job.layer.events {
            run.blocks(|seq| entity.block(Seq(seq)), |key, value| batch.put(key.as_bytes(), value));
        }
        let key = RowKey::applied(job.core.shard);
        batch.put(key.as_bytes(), Row::from(job.row.clone()).encode(&key));
        self.stats.unflushed.fetch_add(batch.size_in_bytes() as u64, Relaxed);
        let written = self.db.write(batch).inspect_err(|error| self.quarantine.judge(error));
        written.map_err(|error| Failure {
            what: format!("writing a checkpoint of shard {} failed: {error}", job.core.shard),
        })
    }
}

/// Step by step, so that apply is never held up by the size of a checkpoint.
fn drain(core: &ShardCore) {
    loop {
        let mut state = core.state.lock();
        let drained = state.cache.drain(limits::DRAIN_ROWS);
        core.count_rows(&state);
        drop(state);
        match drained {
            Drained::Some => {}
            Drained::All(rest) => {
                drop(rest);
                break;
            }
            Drained::Nothing => break,
        }
    }
}

struct Flusher {
    db: Arc<Db>,
    failed: watch::Sender<Option<Failure>>,
    quarantine: Arc<Quarantine>,
    stats: Arc<CheckpointStats>,
    delay: Duration,
}

impl Flusher {
    async fn run(self, mut rx: UnboundedReceiver<FlushJob>) {
        let mut open = true;
        while open {
            let mut waiting = Vec::new();
            let mut deadline = None;
            loop {
                let job = match deadline {
                    None => rx.recv().await,
                    Some(at) => match timeout_at(at, rx.recv()).await {
                        Ok(job) => job,
                        Err(_) => break,
                    },
                };
                match job {
                    Some(FlushJob::Soon(done)) => {
                        waiting.push(done);
                        deadline.get_or_insert_with(|| Instant::now() + self.delay);
                        if self.stats.unflushed.load(Relaxed) >= limits::FLUSH_BYTES {
                            break;
                        }
                    }
                    Some(FlushJob::Now(done)) => {
                        waiting.push(done);
                        break;
                    }
                    Some(FlushJob::Close) | None => {
                        open = false;
                        break;
                    }
                }
            }
            if waiting.is_empty() {
                continue;
            }
            let result = self.flush().await;
            for done in waiting {
                // Whoever asked may be gone already.
                let _ = done.send(result.clone());
            }
        }
    }

    async fn flush(&self) -> Result<(), Failure> {
        if let Some(failure) = self.failed.borrow().clone() {
            return Err(failure);
        }
        self.stats.unflushed.store(0, Relaxed);
        let flushed = self.db.flush().await;
        self.stats.flushes.fetch_add(1, Relaxed);
        flushed.inspect_err(|error| self.quarantine.judge(error)).map_err(|error| {
            let failure = Failure { what: format!("flushing the state failed: {error}") };
            wal::fail(&self.failed, &failure);
            failure
        })
    }
}

/// A shard that was asked for a checkpoint and made none is asked again after this time.
const ASK_AGAIN_MS: u64 = 5_000;

/// Which shard should be checkpointed now, if any; it counts as asked from here on.
pub(crate) fn due<'a>(
    config: &StoreConfig,
    shards: impl Iterator<Item = &'a Arc<ShardCore>> + Clone,
    undurable: &Undurable,
    now_ms: u64,
) -> Option<Arc<ShardCore>> {
    let (log, rows) = (undurable.log.load(Relaxed), undurable.rows.load(Relaxed));
    if log == 0 {
        // Nothing was applied anywhere that is not durable.
        return None;
    }
    let dirty = |core: &&Arc<ShardCore>| core.dirty_since_ms.load(Relaxed) != 0;
    let idle = |core: &&Arc<ShardCore>| {
        let asked = core.asked_ms.load(Relaxed);
        asked == 0 || now_ms.saturating_sub(asked) > ASK_AGAIN_MS
    };
    let interval_ms = config.checkpoint_interval.as_millis() as u64;
    let age = |core: &ShardCore| now_ms.saturating_sub(core.dirty_since_ms.load(Relaxed));
    let candidates = || shards.clone().filter(dirty).filter(idle);
    let by_itself =
        candidates().find(|core| core.since_cut() >= config.checkpoint_log_bytes || age(core) >= interval_ms);
    // Well below either bound, so that the bound itself, which refuses work, is not reached in normal life.
    let crowded = log >= config.undurable_log_bytes / 2 || rows >= config.dirty_bytes();
    let oldest = || crowded.then(|| candidates().max_by_key(|core| age(core))).flatten();
    let core = by_itself.or_else(oldest)?;
    core.asked_ms.store(now_ms.max(1), Relaxed);
    Some(core.clone())
}
