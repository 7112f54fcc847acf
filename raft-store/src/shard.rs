//! What all parts of one open shard share: its log, its state, and how far it is.
//! Must never show a position before what it speaks of is true.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
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
        Ok(Row::Applied(row)) => Ok(row),
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
    pub(crate) since_cut: AtomicU64,
    /// Bytes of log between the durable checkpoint and the cut that is being written.
    pub(crate) in_cut: AtomicU64,
    /// Milliseconds of the store's clock since when the shard has changes that no cut holds; 0 while it has none.
    pub(crate) dirty_since_ms: AtomicU64,
    /// Milliseconds of the store's clock when the broker was last asked to checkpoint it; 0 when nothing is under way.
    pub(crate) asked_ms: AtomicU64,
    /// Memory that only a checkpoint frees, as last counted.
    pub(crate) undurable_rows: AtomicUsize,
    /// A snapshot is being installed: no cut may begin.
    pub(crate) installing: AtomicBool,
    /// Closed while a snapshot replaces the rows on disk: whoever read then would see half of two states.
    pub(crate) gate: Arc<tokio::sync::RwLock<()>>,
    /// Whose the staging file is: one snapshot at a time, from its first chunk until it is installed or abandoned.
    pub(crate) staging: Arc<tokio::sync::Mutex<()>>,
    /// Wakes who waits for a cut to be through.
    pub(crate) thawed: Notify,
}

impl ShardCore {
    /// Counts again what only a checkpoint frees. To be called under the shard's lock.
    pub(crate) fn count_rows(&self, state: &ShardState) {
        self.undurable_rows.store(state.cache.undurable_bytes(), Relaxed);
    }

    /// Bytes of log that a restart would have to apply again.
    pub(crate) fn undurable_log(&self) -> u64 {
        self.since_cut.load(Relaxed) + self.in_cut.load(Relaxed)
    }
}
