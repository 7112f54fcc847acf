//! What all parts of one open shard share: its log, its state, and how far it is.
//! Must never show a position before what it speaks of is true.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Relaxed, Release},
        },
    },
};

use parking_lot::Mutex;
use stentor_engine::{
    key::{Kind, Parts, RowKey, prefix_end},
    rows::Row,
};
use stentor_proto::{
    ids::{ShardId, StampMs},
    internal::AppliedRow,
};
use tokio::sync::{Notify, watch};

use crate::{
    cache::Cache,
    db::{Db, DbError, KeyRange},
    log::LogCore,
    types::{RaftLogId, StoredMembership},
    wire::{self, BadWire},
};

/// What a checkpoint says beside the rows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress {
    pub(crate) applied: Option<RaftLogId>,
    pub(crate) membership: StoredMembership,
    pub(crate) stamp: StampMs,
    pub(crate) chain: u64,
    pub(crate) events: u64,
}

impl Progress {
    pub(crate) fn to_row(&self) -> AppliedRow {
        let logged = self.membership.log_id();
        AppliedRow {
            term: self.applied.map_or(0, |id| id.leader_id.term),
            index: self.applied.map_or(0, |id| id.index),
            membership: Some(wire::membership_to_proto(self.membership.membership())),
            membership_term: logged.map_or(0, |id| id.leader_id.term),
            membership_index: logged.map_or(0, |id| id.index),
            last_stamp_ms: self.stamp.0,
            chain_hash: self.chain,
            events: self.events,
            membership_logged: logged.is_some(),
            applied_any: self.applied.is_some(),
        }
    }

    pub(crate) fn from_row(row: &AppliedRow) -> Result<Self, BadWire> {
        Ok(Self {
            applied: row.applied_any.then(|| wire::log_id(row.term, row.index)),
            membership: wire::stored_membership(row)?,
            stamp: StampMs(row.last_stamp_ms),
            chain: row.chain_hash,
            events: row.events,
        })
    }
}

/// Behind the shard's lock: held by the apply thread for an entry at a time, by others for pointer moves.
pub(crate) struct ShardState {
    pub(crate) cache: Cache,
    pub(crate) progress: Progress,
    /// Why this replica must not go on.
    pub(crate) stopped: Option<String>,
}

impl ShardState {
    /// As the last checkpoint left it.
    pub(crate) fn load(shard: ShardId, slots: &Range<u16>, db: &Db, budget: Arc<AtomicUsize>) -> Result<Self, DbError> {
        let progress = match &applied_row(db, shard)? {
            Some(row) => Progress::from_row(row).map_err(|e| DbError::Corrupt(format!("the applied row: {e}")))?,
            None => Progress::default(),
        };
        let mut cache = Cache::new(budget);
        load_heads(slots, db, &mut cache)?;
        Ok(Self { cache, progress, stopped: None })
    }
}

/// The checkpoint that the state instance has.
pub(crate) fn applied_row(db: &Db, shard: ShardId) -> Result<Option<AppliedRow>, DbError> {
    let key = RowKey::applied(shard);
    let value = db.get(key.as_bytes())?;
    value.map(|value| decode_applied(&key, &value)).transpose().map_err(DbError::Corrupt)
}

/// An applied row from its value.
pub(crate) fn decode_applied(key: &RowKey, value: &[u8]) -> Result<AppliedRow, String> {
    match Row::decode(key.as_bytes(), value) {
        Ok(Row::Applied(row)) => Ok(*row),
        Ok(_) => Err("the applied row holds another row".into()),
        Err(error) => Err(format!("the applied row: {error}")),
    }
}

/// The range of keys of a shard's slots.
pub(crate) fn key_range(slots: &Range<u16>) -> (Vec<u8>, Vec<u8>) {
    (slots.start.to_be_bytes().to_vec(), slots.end.to_be_bytes().to_vec())
}

/// The bytes that all keys of the key's entity start with; `None` for keys that are none of ours.
pub(crate) fn entity_prefix(key: &[u8]) -> Option<&[u8]> {
    let parts = Parts::of(key)?;
    key.get(..key.len() - parts.sub.len() - 1)
}

/// One seek per entity: heads come first among their entity's rows.
fn load_heads(slots: &Range<u16>, db: &Db, cache: &mut Cache) -> Result<(), DbError> {
    let (from, end) = key_range(slots);
    let mut iter = db.iter(KeyRange::new(from, end));
    iter.seek_to_first();
    while let Some((key, value)) = iter.item() {
        let bad = |what: &str| DbError::Corrupt(format!("row {}: {what}", key.escape_ascii()));
        let prefix = entity_prefix(key).ok_or_else(|| bad("is under no key of ours"))?;
        let next = prefix_end(prefix);
        if Parts::of(key).is_some_and(|parts| parts.kind == Kind::Conversation) {
            let row = Row::decode(key, value).map_err(|e| bad(&e.to_string()))?;
            cache.add_head(RowKey::from_bytes(key), row);
        }
        iter.seek(next);
    }
    iter.status()
}

/// One open shard.
pub(crate) struct ShardCore {
    pub(crate) shard: ShardId,
    pub(crate) slots: Range<u16>,
    pub(crate) log: Arc<LogCore>,
    pub(crate) state: Mutex<ShardState>,
    pub(crate) applied: watch::Sender<Option<RaftLogId>>,
    pub(crate) durable: watch::Sender<Option<RaftLogId>>,
    /// Bytes of log applied since the last cut.
    since_cut: AtomicU64,
    /// Bytes of log between the durable checkpoint and the cut that is being written.
    in_cut: AtomicU64,
    /// Milliseconds of the store's clock since when the shard has changes that no cut holds; 0 while it has none.
    pub(crate) dirty_since_ms: AtomicU64,
    /// Milliseconds of the store's clock when the broker was last asked to checkpoint it; 0 when nothing is under way.
    pub(crate) asked_ms: AtomicU64,
    /// Memory that only a checkpoint frees, as last counted.
    undurable_rows: AtomicUsize,
    /// What all shards of the store have of `since_cut` and `in_cut`, and of `undurable_rows`.
    undurable: Arc<Undurable>,
    /// A snapshot is being installed: no cut may begin.
    pub(crate) installing: AtomicBool,
    /// Closed while a snapshot replaces the rows on disk: whoever read then would see half of two states.
    pub(crate) gate: Arc<tokio::sync::RwLock<()>>,
    /// Whose the staging file is: one snapshot at a time, from its first chunk until it is installed or abandoned.
    pub(crate) staging: Arc<tokio::sync::Mutex<()>>,
    /// Wakes who waits for a cut to be through.
    pub(crate) thawed: Notify,
}

/// What only checkpoints free, of all shards of a store together: asked for with every command, so it is counted along.
#[derive(Default)]
pub(crate) struct Undurable {
    /// Bytes of log that a restart would have to apply again.
    pub(crate) log: AtomicU64,
    /// Bytes of rows in memory.
    pub(crate) rows: AtomicUsize,
}

impl ShardCore {
    /// A shard that was applied up to `state`, all of it durable.
    pub(crate) fn new(
        shard: ShardId,
        slots: Range<u16>,
        log: Arc<LogCore>,
        state: ShardState,
        undurable: Arc<Undurable>,
    ) -> Self {
        let applied = state.progress.applied;
        Self {
            shard,
            slots,
            log,
            state: Mutex::new(state),
            applied: watch::Sender::new(applied),
            durable: watch::Sender::new(applied),
            since_cut: AtomicU64::new(0),
            in_cut: AtomicU64::new(0),
            dirty_since_ms: AtomicU64::new(0),
            asked_ms: AtomicU64::new(0),
            undurable_rows: AtomicUsize::new(0),
            undurable,
            installing: AtomicBool::new(false),
            gate: Arc::default(),
            staging: Arc::default(),
            thawed: Notify::new(),
        }
    }

    /// Counts again what only a checkpoint frees. To be called under the shard's lock.
    pub(crate) fn count_rows(&self, state: &ShardState) {
        let now = state.cache.undurable_bytes();
        let before = self.undurable_rows.swap(now, Relaxed);
        // Adds what is negative too.
        self.undurable.rows.fetch_add(now.wrapping_sub(before), Relaxed);
    }

    /// Bytes of log that a restart would have to apply again.
    pub(crate) fn undurable_log(&self) -> u64 {
        self.since_cut.load(Relaxed) + self.in_cut.load(Relaxed)
    }

    /// Bytes of log applied since the last cut.
    pub(crate) fn since_cut(&self) -> u64 {
        self.since_cut.load(Relaxed)
    }

    /// So many more bytes of log are applied.
    pub(crate) fn log_applied(&self, bytes: u64) {
        // The sum first: whoever sees these bytes here may take them off it.
        self.undurable.log.fetch_add(bytes, Relaxed);
        self.since_cut.fetch_add(bytes, Release);
    }

    /// A cut holds what is applied. To be called under the shard's lock.
    pub(crate) fn log_cut(&self) {
        self.in_cut.fetch_add(self.since_cut.swap(0, AcqRel), Release);
    }

    /// The cut is not going to be written. To be called under the shard's lock.
    pub(crate) fn log_thawed(&self) {
        self.since_cut.fetch_add(self.in_cut.swap(0, AcqRel), Release);
    }

    /// What the cut holds is durable.
    pub(crate) fn log_durable(&self) {
        self.undurable.log.fetch_sub(self.in_cut.swap(0, AcqRel), Relaxed);
    }
}
