//! The WAL thread: one ordered queue for every shard's appends, votes, truncations and purges; one batch, one fsync,
//! then the side file, then the callbacks. Must never call back before the fsync, and never retry a failed one.

use std::{
    io,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use openraft::storage::IOFlushed;
use stentor_engine::limits;
#[cfg(feature = "planted")]
use stentor_engine::planted::{Bug, is_planted};
use stentor_proto::Message;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::{
    db::{Batch, Db},
    exec::{Exec, Worker},
    log::LogCore,
    logkey::{self, LogKind},
    quarantine::Quarantine,
    store::{Failure, StoreError},
    synced::SyncedFile,
    types::{RaftLogId, TypeConfig, Vote},
    wire,
};

/// Answered when the operation is on disk.
pub(crate) type Done = oneshot::Sender<Result<(), Failure>>;

/// One write of one shard.
pub(crate) enum Op {
    /// The shard exists here.
    Slots { slots: Range<u16>, done: Done },
    /// Encoded entries with their indexes.
    Append { entries: Vec<(u64, Bytes)>, bytes: usize, callback: IOFlushed<TypeConfig> },
    /// A vote.
    Vote { vote: Vote, done: Done },
    /// Removes the entries from this index on.
    Truncate { from: u64 },
    /// Removes the entries of a range and notes what was purged.
    Purge { from: u64, upto: RaftLogId },
    /// Nothing: answered when all before it is on disk.
    Barrier { done: Done },
}

enum Request {
    Write(Queued),
    /// The last one: what comes later is refused.
    Close(Done),
}

/// Room for one operation; what is reserved must be sent.
pub(crate) struct Room<'a>(mpsc::Permit<'a, Request>);

impl Room<'_> {
    pub(crate) fn send(self, queued: Queued) {
        self.0.send(Request::Write(queued));
    }
}

/// An operation in the queue.
pub(crate) struct Queued {
    pub(crate) log: Arc<LogCore>,
    /// The shard's own count of its operations.
    pub(crate) ticket: u64,
    pub(crate) op: Op,
}

/// Figures of the thread.
#[derive(Default)]
pub(crate) struct WalStats {
    pub(crate) syncs: AtomicU64,
    pub(crate) operations: AtomicU64,
    pub(crate) bytes: AtomicU64,
}

/// The queue's entrance; cheap to clone.
#[derive(Clone)]
pub(crate) struct Wal {
    tx: mpsc::Sender<Request>,
    room: Arc<Semaphore>,
    failed: watch::Sender<Option<Failure>>,
    quarantine: Arc<Quarantine>,
    pub(crate) stats: Arc<WalStats>,
}

impl Wal {
    /// Starts the thread. `position` is the one that the database recovered to.
    pub(crate) fn start(
        exec: Exec,
        db: Arc<Db>,
        side: SyncedFile,
        position: u64,
        (failed, quarantine): (watch::Sender<Option<Failure>>, Arc<Quarantine>),
    ) -> io::Result<(Self, Worker)> {
        let (tx, rx) = mpsc::channel(limits::WAL_QUEUE_OPERATIONS);
        let room = Arc::new(Semaphore::new(limits::WAL_QUEUE_BYTES));
        let stats = Arc::new(WalStats::default());
        let thread = WalThread {
            db,
            side,
            position,
            rx,
            room: room.clone(),
            failed: failed.clone(),
            quarantine: quarantine.clone(),
            stats: stats.clone(),
        };
        let worker = exec.spawn("wal", thread.run())?;
        Ok((Self { tx, room, failed, quarantine, stats }, worker))
    }

    /// Waits for room.
    pub(crate) async fn reserve(&self, bytes: usize) -> Result<Room<'_>, StoreError> {
        let bytes = bytes.min(limits::WAL_QUEUE_BYTES) as u32;
        let room = self.room.acquire_many(bytes).await.map_err(|_| StoreError::Closed)?;
        let permit = self.tx.reserve().await.map_err(|_| self.stopped())?;
        // The thread gives it back after the batch.
        room.forget();
        Ok(Room(permit))
    }

    /// Ends the thread after what is queued.
    pub(crate) async fn close(&self) {
        let (done, wait) = oneshot::channel();
        if self.tx.send(Request::Close(done)).await.is_ok() {
            // An error means that the thread is gone already.
            let _ = wait.await;
        }
    }

    /// Takes back a reservation that was not used.
    pub(crate) fn give_back(&self, bytes: usize) {
        self.room.add_permits(bytes.min(limits::WAL_QUEUE_BYTES));
    }

    /// Becomes `Some` with the first failure.
    pub(crate) fn failed(&self) -> watch::Receiver<Option<Failure>> {
        self.failed.subscribe()
    }

    /// Stored bytes are not what was written: the broker stops, and the directory is not used again.
    pub(crate) fn condemn(&self, what: &str) {
        self.quarantine.condemn(what);
    }

    /// The disk refuses: the broker stops.
    pub(crate) fn refuse(&self, what: String) {
        self.quarantine.refuse(what);
    }

    /// Why the queue takes no more.
    pub(crate) fn stopped(&self) -> StoreError {
        self.failed.borrow().clone().map_or(StoreError::Closed, StoreError::Failed)
    }
}

struct WalThread {
    db: Arc<Db>,
    side: SyncedFile,
    position: u64,
    rx: mpsc::Receiver<Request>,
    room: Arc<Semaphore>,
    failed: watch::Sender<Option<Failure>>,
    quarantine: Arc<Quarantine>,
    stats: Arc<WalStats>,
}

impl WalThread {
    async fn run(mut self) {
        let mut messages = Vec::with_capacity(limits::WAL_BATCH_OPERATIONS);
        let mut queued = Vec::with_capacity(limits::WAL_BATCH_OPERATIONS);
        while self.rx.recv_many(&mut messages, limits::WAL_BATCH_OPERATIONS).await > 0 {
            let mut closed = None;
            for message in messages.drain(..) {
                match message {
                    Request::Write(q) => queued.push(q),
                    Request::Close(done) => closed = Some(done),
                }
            }
            if !queued.is_empty() {
                self.round(&mut queued).await;
            }
            if let Some(done) = closed {
                self.room.close();
                self.rx.close();
                // Whoever asked may have given up waiting.
                let _ = done.send(Ok(()));
            }
        }
    }

    async fn round(&mut self, queued: &mut Vec<Queued>) {
        let room: usize = queued.iter().map(|q| q.bytes().min(limits::WAL_QUEUE_BYTES)).sum();
        // A failed fsync may have lost earlier pages: whatever failed once stays failed.
        let before = self.failed.borrow().clone();
        let result = match before {
            Some(failure) => Err(failure),
            None => self.write(queued).await,
        };
        if let Err(failure) = &result {
            fail(&self.failed, failure);
        }
        for q in queued.drain(..) {
            q.complete(&result);
        }
        self.room.add_permits(room);
    }

    async fn write(&mut self, queued: &[Queued]) -> Result<(), Failure> {
        let mut batch = self.db.batch();
        for q in queued {
            q.put(&mut batch);
        }
        for q in queued {
            put_committed(&mut batch, q);
        }
        let position = self.position + 1;
        batch.put(logkey::POSITION, logkey::seal(&logkey::POSITION, &position.to_be_bytes()));
        #[cfg(feature = "planted")]
        if is_planted(Bug::AcknowledgeBeforeFsync) && queued.iter().all(|q| matches!(q.op, Op::Append { .. })) {
            return self.db.write(batch).map_err(|error| Failure { what: error.to_string() });
        }
        self.db
            .write_synced(batch)
            .await
            .inspect_err(|error| self.quarantine.judge(error))
            .map_err(|error| Failure { what: format!("writing and syncing the log failed: {error}") })?;
        self.position = position;
        self.side
            .write(position)
            .map_err(|error| Failure { what: format!("writing the synced position failed: {error}") })?;
        self.stats.syncs.fetch_add(1, Relaxed);
        self.stats.operations.fetch_add(queued.len() as u64, Relaxed);
        self.stats.bytes.fetch_add(queued.iter().map(|q| q.bytes() as u64).sum(), Relaxed);
        Ok(())
    }
}

/// Publishes the first failure, loudly.
pub(crate) fn fail(failed: &watch::Sender<Option<Failure>>, failure: &Failure) {
    let first = failed.send_if_modified(|now| {
        let first = now.is_none();
        now.get_or_insert_with(|| failure.clone());
        first
    });
    // Afterwards: the log may be on the same full disk, and whatever comes of that, the broker must stop.
    if first {
        tracing::error!(%failure, "the store has failed; this broker must stop");
    }
}

impl Queued {
    fn bytes(&self) -> usize {
        if let Op::Append { bytes, .. } = &self.op { *bytes } else { 0 }
    }

    fn put(&self, batch: &mut Batch) {
        let shard = self.log.shard;
        match &self.op {
            Op::Slots { slots, .. } => {
                let key = logkey::small(shard, LogKind::Slots);
                batch.put(key, logkey::seal(&key, &logkey::slots_bytes(slots)));
            }
            Op::Append { entries, .. } => {
                for (index, value) in entries {
                    batch.put(logkey::entry(shard, *index), value);
                }
            }
            Op::Vote { vote, .. } => {
                let key = logkey::small(shard, LogKind::Vote);
                batch.put(key, logkey::seal(&key, &wire::vote_to_proto(vote).encode_to_vec()));
            }
            Op::Truncate { from } => {
                batch.delete_range(logkey::entry(shard, *from), logkey::entry(shard, u64::MAX));
            }
            Op::Purge { from, upto } => {
                batch.delete_range(logkey::entry(shard, *from), logkey::entry(shard, upto.index.saturating_add(1)));
                let key = logkey::small(shard, LogKind::Purged);
                batch.put(key, logkey::seal(&key, &wire::log_id_to_proto(upto).encode_to_vec()));
            }
            Op::Barrier { .. } => {}
        }
    }

    fn complete(self, result: &Result<(), Failure>) {
        if result.is_ok() {
            self.log.synced_to(self.ticket);
        }
        match self.op {
            Op::Append { callback, .. } => callback.io_completed(result.clone().map_err(io::Error::other)),
            Op::Slots { done, .. } | Op::Vote { done, .. } | Op::Barrier { done } => {
                // Whoever stopped waiting does not want to know.
                let _ = done.send(result.clone());
            }
            Op::Truncate { .. } | Op::Purge { .. } => {}
        }
    }
}

/// `save_committed` only notes: the note rides here, and never ahead of the entries that it speaks of.
fn put_committed(batch: &mut Batch, q: &Queued) {
    if let Some(id) = q.log.take_note(q.ticket) {
        let key = logkey::small(q.log.shard, LogKind::Committed);
        batch.put(key, logkey::seal(&key, &wire::log_id_to_proto(&id).encode_to_vec()));
    }
}
