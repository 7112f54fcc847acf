//! Reads of a shard's applied state: dirty and frozen rows over what RocksDB has, as one consistent picture.
//! Must never answer bytes whose checksum does not match.

use std::{collections::BTreeMap, sync::Arc};

use stentor_engine::{
    apply,
    key::{Entity, Kind, Parts as KeyParts, RowKey, prefix_end},
    limits,
    rows::{NotLoaded, Row, Rows},
};
use stentor_proto::{
    Bytes,
    ids::{Seq, StampMs, key_crc},
    record,
};
use thiserror::Error;
use tokio::sync::{oneshot, watch};

use crate::{
    apply::Job,
    blocks::{Block, EventRun},
    cache::Cache,
    db::{Db, DbError, KeyRange},
    loader::LoadRequest,
    shard::ShardCore,
    store::Parts,
    types::RaftLogId,
    verify::{self, ReplicaReport},
};

/// Why a read has no answer. State has not moved.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ReadError {
    /// Stored bytes are not what was written: the disk is at fault, and this replica must be rebuilt.
    #[error("stored bytes are damaged: {0}")]
    Damaged(String),
    /// Stored rows contradict each other though each is what was written: a fault of ours, or rows are lost.
    #[error("stored rows contradict each other: {0}")]
    Contradiction(String),
    /// The disk refused to read.
    #[error("the disk cannot be read: {0}")]
    Io(String),
    /// The store is closed, or the replica was stopped.
    #[error("the replica is stopped")]
    Stopped,
}

pub(crate) fn io_error(error: DbError) -> ReadError {
    match error {
        DbError::Corrupt(what) => ReadError::Damaged(what),
        DbError::Io(what) => ReadError::Io(what),
    }
}

/// The applied state between two entries, on the apply thread. Reads only: writes go through the log.
pub struct AppliedView<'a> {
    pub(crate) rows: &'a mut dyn Rows,
    pub(crate) applied: Option<RaftLogId>,
}

impl AppliedView<'_> {
    /// A row, if it is in memory; a conversation's header row always is.
    pub fn get(&mut self, key: &RowKey) -> Result<Option<&Row>, NotLoaded> {
        self.rows.get(key)
    }

    /// The last applied entry.
    pub fn applied(&self) -> Option<RaftLogId> {
        self.applied
    }
}

/// Reads one shard; cheap to clone.
#[derive(Clone)]
pub struct ShardReader {
    pub(crate) core: Arc<ShardCore>,
    pub(crate) parts: Parts,
}

impl ShardReader {
    /// Runs a read on a thread that may block on the disk, never while a snapshot is replacing what is there.
    async fn blocking<R: Send + 'static>(
        &self,
        read: impl FnOnce(&ShardCore, &Db) -> Result<R, ReadError> + Send + 'static,
    ) -> Result<R, ReadError> {
        let open = self.core.gate.clone().read_owned().await;
        let (core, db) = (self.core.clone(), self.parts.state_db.clone());
        let read = move || {
            let _open = open;
            read(&core, &db).inspect_err(|error| core.log.report(error))
        };
        self.parts.disk.exec().run(read).await.map_err(|_| ReadError::Stopped)?
    }

    /// A row as of every applied entry.
    pub async fn row(&self, key: &RowKey) -> Result<Option<Row>, ReadError> {
        if let Some(row) = self.core.state.lock().cache.peek(key) {
            return Ok(row.cloned());
        }
        let key = key.clone();
        self.blocking(move |_, db| {
            // A row that memory did not have stands on disk, and can only have become newer since.
            let value = db.get(key.as_bytes()).map_err(io_error)?;
            value.map(|value| decode_row(key.as_bytes(), &value)).transpose()
        })
        .await
    }

    /// Rows whose keys start with `prefix` and come after `after`, ascending, at most `limit`; heads, send states and
    /// blocks are left out.
    pub async fn scan(
        &self,
        prefix: &[u8],
        after: Option<&RowKey>,
        limit: usize,
    ) -> Result<Vec<(RowKey, Row)>, ReadError> {
        let from = after.map_or_else(|| prefix.to_vec(), |key| [key.as_bytes(), &[0]].concat());
        let prefix = prefix.to_vec();
        self.blocking(move |core, db| scan(core, db, &prefix, from, limit)).await
    }

    /// The event records `from..=to`, dense and ascending, as many as fit into `max_bytes` but at least one. Shorter
    /// when the head comes first. `from` must not lie below the first event that is kept: that reads as damage.
    pub async fn events(
        &self,
        conversation: &Entity,
        from: Seq,
        to: Seq,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, ReadError> {
        let want = Want { from: from.0.max(1), to: to.0, max_bytes };
        if let Some(events) = from_memory(&self.core, conversation, want) {
            return events;
        }
        let conversation = conversation.clone();
        self.blocking(move |core, db| events(core, db, &conversation, want)).await
    }

    /// The last records below `before` (exclusive), ascending, at most `limit` and `max_bytes`, but at least one.
    pub async fn events_before(
        &self,
        conversation: &Entity,
        before: Seq,
        limit: usize,
        max_bytes: usize,
    ) -> Result<Vec<Bytes>, ReadError> {
        let last = Last { before: before.0, limit, max_bytes };
        if let Some(events) = last_from_memory(&self.core, conversation, last) {
            return events;
        }
        let conversation = conversation.clone();
        self.blocking(move |core, db| last_events(core, db, &conversation, last)).await
    }

    /// The last applied entry, as it moves.
    pub fn applied(&self) -> watch::Receiver<Option<RaftLogId>> {
        self.core.applied.subscribe()
    }

    /// The position of the last durable checkpoint, as it moves.
    pub fn durable(&self) -> watch::Receiver<Option<RaftLogId>> {
        self.core.durable.subscribe()
    }

    /// The stamp of the last applied entry that had one: a new leader's stamps go on from here.
    pub fn last_stamp(&self) -> StampMs {
        self.core.state.lock().progress.stamp
    }

    /// Runs `f` on the apply thread between two entries of this shard. Every shard waits for it: be short.
    pub async fn on_apply_thread<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut AppliedView<'_>) -> R + Send + 'static,
    ) -> Result<R, ReadError> {
        let (done, wait) = oneshot::channel();
        let call = Job::Call(
            self.core.clone(),
            Box::new(move |state| {
                let applied = state.progress.applied;
                // Whoever asked may be gone already.
                let _ = done.send(f(&mut AppliedView { rows: &mut state.cache, applied }));
            }),
        );
        self.parts.apply.send(call).await.map_err(|_| ReadError::Stopped)?;
        wait.await.map_err(|_| ReadError::Stopped)
    }

    /// Hints that these encoded commands will be applied soon: rows that they need and that are not in memory are
    /// loaded. Never waits; under load the hint is dropped.
    pub fn prefetch(&self, commands: &[Bytes]) {
        // All that takes time before the lock, which `apply` wants as well.
        let mut keys = Vec::with_capacity(2 * commands.len());
        commands.iter().for_each(|command| apply::prefetch(command, &mut |key| keys.push(key)));
        keys.sort_unstable();
        keys.dedup();
        {
            let state = self.core.state.lock();
            keys.retain(|key| state.cache.peek(key).is_none());
        }
        keys.truncate(limits::LOAD_KEYS);
        if !keys.is_empty() {
            self.parts.loader.hint(LoadRequest { core: self.core.clone(), keys, resume: false });
        }
    }

    /// Reads every byte of this replica, checks all checksums and densities, and hashes what it reads.
    pub async fn verify(&self) -> Result<ReplicaReport, ReadError> {
        self.blocking(verify::verify).await
    }
}

pub(crate) fn decode_row(key: &[u8], value: &[u8]) -> Result<Row, ReadError> {
    Row::decode(key, value).map_err(|e| ReadError::Damaged(format!("row {}: {e}", key.escape_ascii())))
}

fn listed(key: &[u8]) -> bool {
    KeyParts::of(key).is_some_and(|p| !matches!(p.kind, Kind::Conversation | Kind::SendState | Kind::Block))
}

fn scan(
    core: &ShardCore,
    db: &Db,
    prefix: &[u8],
    from: Vec<u8>,
    limit: usize,
) -> Result<Vec<(RowKey, Row)>, ReadError> {
    let end = prefix_end(prefix);
    let mut merged: BTreeMap<RowKey, Option<Row>> = BTreeMap::new();
    let state = core.state.lock();
    for layer in state.cache.frozen().map(AsRef::as_ref).into_iter().chain([state.cache.dirty()]) {
        // Removed rows take no place, so that a page is never cut short by them.
        let mut found = 0;
        for key in layer
            .order
            .range::<[u8], _>((std::ops::Bound::Included(from.as_slice()), std::ops::Bound::Excluded(end.as_slice())))
        {
            if found == limit {
                break;
            }
            if let Some(row) = layer.rows.get(key) {
                found += usize::from(row.is_some());
                merged.insert(key.clone(), row.clone());
            }
        }
    }
    let snapshot = db.snapshot();
    drop(state);
    let mut iter = snapshot.iter(KeyRange::new(from, end));
    iter.seek_to_first();
    let mut on_disk = 0;
    while let Some((key, value)) = iter.item().filter(|_| on_disk < limit) {
        if listed(key) && !merged.contains_key(key) {
            merged.insert(RowKey::from_bytes(key), Some(decode_row(key, value)?));
            on_disk += 1;
        }
        iter.next();
    }
    iter.status().map_err(io_error)?;
    Ok(merged.into_iter().filter_map(|(key, row)| Some((key, row?))).take(limit).collect())
}

/// What `events` is asked for; `to` is included.
#[derive(Debug, Clone, Copy)]
struct Want {
    from: u64,
    to: u64,
    max_bytes: usize,
}

/// What the records of a conversation mix into their checksums.
fn crc_of(conversation: &Entity) -> Result<u32, ReadError> {
    // An entity's key is a row's key without its kind and what follows.
    let mut key = conversation.as_bytes().to_vec();
    key.push(Kind::Conversation as u8);
    let parts = KeyParts::of(&key).ok_or_else(|| ReadError::Contradiction("no entity has such a key".into()))?;
    Ok(key_crc(parts.app, parts.id))
}

fn checked(event: &[u8], seq: u64, crc: u32) -> Result<(), ReadError> {
    record::verify(event, crc).map(drop).map_err(|e| ReadError::Damaged(format!("event {seq}: {e}")))
}

/// The blocks of a conversation.
fn block_range(conversation: &Entity) -> KeyRange {
    let end = prefix_end(&[conversation.as_bytes(), &[Kind::Block as u8]].concat());
    KeyRange::new(conversation.block(Seq(0)).as_bytes(), end)
}

/// Collects records while they are dense and fit.
struct Collect {
    want: Want,
    crc: u32,
    next: u64,
    bytes: usize,
    events: Vec<Bytes>,
}

impl Collect {
    fn new(conversation: &Entity, want: Want) -> Result<Self, ReadError> {
        let crc = crc_of(conversation)?;
        Ok(Self { want, crc, next: want.from, bytes: 0, events: Vec::new() })
    }

    fn full(&self) -> bool {
        self.next > self.want.to || (!self.events.is_empty() && self.bytes >= self.want.max_bytes)
    }

    /// Takes the record of `next`; false when it does not fit any more.
    fn take(&mut self, event: Bytes) -> Result<bool, ReadError> {
        if !self.events.is_empty() && self.bytes + event.len() > self.want.max_bytes {
            self.bytes = self.want.max_bytes;
            return Ok(false);
        }
        checked(&event, self.next, self.crc)?;
        self.bytes += event.len();
        self.next += 1;
        self.events.push(event);
        Ok(true)
    }
}

/// `None` when part of it may be on disk.
fn from_memory(core: &ShardCore, conversation: &Entity, want: Want) -> Option<Result<Vec<Bytes>, ReadError>> {
    let mut events = Vec::new();
    {
        let state = core.state.lock();
        if state.cache.runs(conversation).next().is_none_or(|run| run.first() > want.from) {
            return None;
        }
        copy_runs(&state.cache, conversation, want, &mut events);
    }
    Some(collect(conversation, want, events))
}

/// Copies records out of the runs in memory, from `want.from` on, a little more than fits at most.
fn copy_runs(cache: &Cache, conversation: &Entity, want: Want, out: &mut Vec<Bytes>) {
    let mut bytes = 0;
    for run in cache.runs(conversation) {
        for seq in run.first().max(want.from)..run.next().min(want.to.saturating_add(1)) {
            if let Some(event) = run.record(seq) {
                bytes += event.len();
                out.push(Bytes::copy_from_slice(event));
            }
            if bytes >= want.max_bytes {
                return;
            }
        }
    }
}

fn collect(conversation: &Entity, want: Want, events: Vec<Bytes>) -> Result<Vec<Bytes>, ReadError> {
    let mut collect = Collect::new(conversation, want)?;
    for event in events {
        if collect.full() || !collect.take(event)? {
            break;
        }
    }
    Ok(collect.events)
}

fn events(core: &ShardCore, db: &Db, conversation: &Entity, want: Want) -> Result<Vec<Bytes>, ReadError> {
    let mut memory = Vec::new();
    let (snapshot, memory_first) = {
        let state = core.state.lock();
        let first = state.cache.runs(conversation).next().map(|run| run.first());
        copy_runs(&state.cache, conversation, want, &mut memory);
        (db.snapshot(), first)
    };
    // Blocks of a written cut may be both here and there: memory wins from its first seq on.
    let disk_end = memory_first.unwrap_or(u64::MAX);
    let mut collect = Collect::new(conversation, want)?;
    let mut iter = snapshot.iter(block_range(conversation));
    iter.seek_for_prev(conversation.block(Seq(want.from)).as_bytes());
    while let Some((key, value)) = iter.item().filter(|_| !collect.full() && collect.next < disk_end) {
        let block = Block::parse(key, value).map_err(ReadError::Damaged)?;
        if block.first() > collect.next {
            let what = format!("events {}..{} are missing", collect.next, block.first());
            return Err(ReadError::Contradiction(what));
        }
        while !collect.full() && collect.next < disk_end {
            let Some(event) = block.record(collect.next) else { break };
            if !collect.take(event)? {
                break;
            }
        }
        iter.next();
    }
    iter.status().map_err(io_error)?;
    if memory_first.is_some_and(|first| collect.next < first && collect.next <= want.to) && !collect.full() {
        return Err(ReadError::Contradiction(format!("events from {} on are missing", collect.next)));
    }
    for event in memory {
        if collect.full() || !collect.take(event)? {
            break;
        }
    }
    Ok(collect.events)
}

/// What `events_before` is asked for.
#[derive(Debug, Clone, Copy)]
struct Last {
    before: u64,
    limit: usize,
    max_bytes: usize,
}

/// Collects records from a seq down, while they fit.
struct Backward {
    last: Last,
    /// The first seq that is kept.
    floor: u64,
    crc: u32,
    /// The seq above the next one to take.
    at: u64,
    bytes: usize,
    full: bool,
    events: Vec<Bytes>,
}

impl Backward {
    /// `None` for a conversation that is not there. To be called under the shard's lock.
    fn new(cache: &Cache, conversation: &Entity, last: Last) -> Result<Option<Self>, ReadError> {
        let Some(Some(Row::Conversation(head))) = cache.peek(&conversation.head()) else { return Ok(None) };
        let (floor, at) = (head.first_seq.max(1), last.before.min(head.next_seq));
        let crc = crc_of(conversation)?;
        Ok(Some(Self { last, floor, crc, at, bytes: 0, full: false, events: Vec::new() }))
    }

    fn done(&self) -> bool {
        self.full || self.at <= self.floor || self.events.len() >= self.last.limit
    }

    /// Takes the record below `at`, if it fits.
    fn take(&mut self, event: Bytes) {
        self.bytes += event.len();
        self.full = self.bytes > self.last.max_bytes && !self.events.is_empty();
        if !self.full {
            self.at -= 1;
            self.events.push(event);
        }
    }

    /// Takes what memory has, the newest first. To be called under the shard's lock: nothing is checked yet.
    fn take_runs(&mut self, cache: &Cache, conversation: &Entity) {
        let runs: Vec<&EventRun> = cache.runs(conversation).collect();
        for run in runs.into_iter().rev() {
            while let Some(event) = run.record(self.at.wrapping_sub(1)).filter(|_| !self.done()) {
                self.take(Bytes::copy_from_slice(event));
            }
        }
    }

    /// Ascending, and each checked.
    fn finish(mut self) -> Result<Vec<Bytes>, ReadError> {
        self.events.reverse();
        for (event, seq) in self.events.iter().zip(self.at..) {
            checked(event, seq, self.crc)?;
        }
        Ok(self.events)
    }
}

/// `None` when part of it may be on disk.
fn last_from_memory(core: &ShardCore, conversation: &Entity, last: Last) -> Option<Result<Vec<Bytes>, ReadError>> {
    let backward = {
        let state = core.state.lock();
        let mut backward = match Backward::new(&state.cache, conversation, last) {
            Ok(Some(backward)) => backward,
            Ok(None) => return Some(Ok(Vec::new())),
            Err(error) => return Some(Err(error)),
        };
        backward.take_runs(&state.cache, conversation);
        backward
    };
    backward.done().then(|| backward.finish())
}

/// One cursor, from the newest block down: what a page needs lies side by side, and nothing beyond it is read.
fn last_events(core: &ShardCore, db: &Db, conversation: &Entity, last: Last) -> Result<Vec<Bytes>, ReadError> {
    let (mut backward, snapshot) = {
        let state = core.state.lock();
        let Some(mut backward) = Backward::new(&state.cache, conversation, last)? else { return Ok(Vec::new()) };
        // Blocks of a written cut may be both here and there: memory goes first.
        backward.take_runs(&state.cache, conversation);
        (backward, db.snapshot())
    };
    let mut iter = snapshot.iter(block_range(conversation));
    if !backward.done() {
        iter.seek_for_prev(conversation.block(Seq(backward.at - 1)).as_bytes());
    }
    while !backward.done() {
        let Some((key, value)) = iter.item() else { break };
        let block = Block::parse(key, value).map_err(ReadError::Damaged)?;
        if block.next() < backward.at {
            let what = format!("events {}..{} are missing", block.next(), backward.at);
            return Err(ReadError::Contradiction(what));
        }
        while let Some(event) = block.record(backward.at - 1).filter(|_| !backward.done()) {
            backward.take(event);
        }
        iter.prev();
    }
    iter.status().map_err(io_error)?;
    if !backward.done() {
        let what = format!("events {}..{} are missing", backward.floor, backward.at);
        return Err(ReadError::Contradiction(what));
    }
    backward.finish()
}
