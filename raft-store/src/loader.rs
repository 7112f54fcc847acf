//! The loader thread: fetches rows that are not in memory, for shards that wait and for hints.
//! Must never put a row into a cache that a checkpoint may have overtaken while it was being read.

use std::{io, sync::Arc};

use stentor_engine::{key::RowKey, limits, rows::Row};
use tokio::sync::mpsc::{self, Receiver, Sender, UnboundedReceiver, UnboundedSender, error::TrySendError};

use crate::{
    apply::Job,
    db::Db,
    exec::{Exec, Worker},
    reader::{ReadError, io_error},
    shard::ShardCore,
};

/// Rows to fetch.
pub(crate) struct LoadRequest {
    pub(crate) core: Arc<ShardCore>,
    pub(crate) keys: Vec<RowKey>,
    /// The shard is parked and waits.
    pub(crate) resume: bool,
}

/// The loader's entrance; cheap to clone.
#[derive(Clone)]
pub(crate) struct Loader {
    urgent: UnboundedSender<Option<LoadRequest>>,
    hints: Sender<LoadRequest>,
}

impl Loader {
    /// Starts the thread; it answers parked shards through `apply`.
    pub(crate) fn start(exec: Exec, db: Arc<Db>, apply: mpsc::WeakSender<Job>) -> io::Result<(Self, Worker)> {
        // Never more than one request per open shard: a parked shard asks once.
        let (urgent, urgent_rx) = mpsc::unbounded_channel();
        let (hints, hints_rx) = mpsc::channel(limits::LOAD_QUEUE_HINTS);
        let thread = LoadThread { db, apply };
        let worker = exec.spawn("load", thread.run(urgent_rx, hints_rx))?;
        Ok((Self { urgent, hints }, worker))
    }

    /// Never blocks: the apply thread calls it.
    pub(crate) fn load(&self, request: LoadRequest) {
        if self.urgent.send(Some(request)).is_err() {
            // Only a store that is closing has no loader; then nobody waits for the shard either.
            tracing::debug!("the loader is gone");
        }
    }

    /// Ends the thread after what is queued.
    pub(crate) fn close(&self) {
        // Closed twice is closed.
        let _ = self.urgent.send(None);
    }

    /// Loads if there is room for it.
    pub(crate) fn hint(&self, request: LoadRequest) {
        if let Err(TrySendError::Full(_)) = self.hints.try_send(request) {
            tracing::trace!("a prefetch hint was dropped");
        }
    }
}

struct LoadThread {
    db: Arc<Db>,
    apply: mpsc::WeakSender<Job>,
}

impl LoadThread {
    async fn run(self, mut urgent: UnboundedReceiver<Option<LoadRequest>>, mut hints: Receiver<LoadRequest>) {
        loop {
            let request = tokio::select! {
                // A hint never goes before a shard that waits.
                biased;
                request = urgent.recv() => request.unwrap_or(None),
                request = hints.recv() => request,
            };
            let Some(request) = request else { return };
            self.load(&request);
            if request.resume {
                let Some(apply) = self.apply.upgrade() else { return };
                if apply.send(Job::Loaded(request.core.shard)).await.is_err() {
                    return;
                }
            }
        }
    }

    fn load(&self, request: &LoadRequest) {
        let core = &request.core;
        loop {
            let generation = core.state.lock().cache.generation();
            let read = self.read(&request.keys);
            if let Err(error) = &read {
                core.log.report(error);
            }
            let mut state = core.state.lock();
            match read {
                Ok(rows) => {
                    // A checkpoint came between: what was read may be older than what it wrote.
                    if rows.into_iter().all(|(key, row)| state.cache.loaded(key, row, generation)) {
                        state.cache.trim();
                        return;
                    }
                }
                Err(error) => {
                    state.stopped.get_or_insert(error.to_string());
                    return;
                }
            }
        }
    }

    fn read(&self, keys: &[RowKey]) -> Result<Vec<(RowKey, Option<Row>)>, ReadError> {
        let values = self.db.multi_get(keys.iter().map(RowKey::as_bytes));
        keys.iter()
            .zip(values)
            .map(|(key, value)| {
                let row = value.map_err(io_error)?.map(|value| Row::decode(key.as_bytes(), &value)).transpose();
                Ok((key.clone(), row.map_err(|e| ReadError::Damaged(format!("row {key:?}: {e}")))?))
            })
            .collect()
    }
}
