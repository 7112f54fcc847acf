//! Reads every byte of one replica: checksums, densities, and a hash that equal replicas share whatever their blocks
//! and checkpoints look like. Must never hold the shard's lock while it reads the disk.

use std::collections::BTreeMap;

use stentor_engine::{
    key::{Kind, Parts, RowKey},
    rows::{Row, row_crc},
};
use stentor_proto::{ids::key_crc, record};

use crate::{
    blocks::{Block, EventRun},
    cache::Map,
    db::{Db, Iter, KeyRange},
    reader::{ReadError, io_error},
    shard::{ShardCore, entity_prefix, key_range},
    types::RaftLogId,
};

/// What `verify` found in one replica; equal for replicas with equal `applied`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaReport {
    /// Applied when the read began.
    pub applied: Option<RaftLogId>,
    /// Event records read.
    pub events: u64,
    /// Rows read, blocks apart.
    pub rows: u64,
    /// Hash over all applied commands.
    pub chain_hash: u64,
    /// Hash over all rows and events.
    pub state_hash: u64,
}

/// Seqs of one conversation seen so far.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    /// The seq after the last one; 0 when none was seen.
    next: u64,
    /// What the head says.
    head_next: Option<u64>,
}

#[derive(Default)]
struct Totals {
    rows: u64,
    events: u64,
    hash: u64,
    /// Conversations whose events or heads are partly in memory; the others are judged as the scan passes them.
    spans: BTreeMap<Vec<u8>, Span>,
}

fn damaged(what: impl Into<String>) -> ReadError {
    ReadError::Damaged(what.into())
}

fn contradiction(what: impl Into<String>) -> ReadError {
    ReadError::Contradiction(what.into())
}

fn hash(key: &[u8], value: &[u8]) -> u64 {
    // Summed, so that the order and the shape of blocks do not matter.
    let crcs = u64::from(row_crc(key, value)) << 32 | u64::from(crc32fast::hash(value));
    crcs.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31) ^ key.len() as u64
}

impl Totals {
    fn row(&mut self, key: &[u8], row: &Row) {
        let encoded = row.encode(&RowKey::from_bytes(key));
        self.rows += 1;
        self.hash = self.hash.wrapping_add(hash(key, &encoded[5..]));
    }

    fn event(&mut self, entity: &[u8], seq: u64, event: &[u8]) -> Result<(), ReadError> {
        let head = [entity, &[Kind::Conversation as u8]].concat();
        let parts = Parts::of(&head).ok_or_else(|| contradiction("events under no key of ours"))?;
        record::verify(event, key_crc(parts.app, parts.id))
            .map_err(|e| damaged(format!("event {seq} of {}: {e}", entity.escape_ascii())))?;
        self.events += 1;
        self.hash = self.hash.wrapping_add(hash(&[entity, &seq.to_be_bytes()].concat(), event));
        Ok(())
    }

    /// Events `[first, next)` follow what was seen.
    fn span(&mut self, entity: &[u8], first: u64, next: u64) -> Result<(), ReadError> {
        let span = self.spans.entry(entity.to_vec()).or_default();
        if span.next != 0 && span.next != first {
            let what = format!("events {}..{first} of {} are missing", span.next, entity.escape_ascii());
            return Err(contradiction(what));
        }
        span.next = next;
        Ok(())
    }

    fn head(&mut self, entity: &[u8], row: &Row) {
        if let Row::Conversation(head) = row {
            self.spans.entry(entity.to_vec()).or_default().head_next = Some(head.next_seq);
        }
    }

    /// A conversation is through: its last event must be the one before its head's next.
    fn judge(&mut self, entity: &[u8]) -> Result<(), ReadError> {
        match self.spans.remove(entity) {
            Some(Span { next, head_next: Some(head) }) if next != head && !(next == 0 && head <= 1) => {
                let what = format!("{} ends before {next}, its head says {head}", entity.escape_ascii());
                Err(contradiction(what))
            }
            Some(Span { next: 1.., head_next: None }) => {
                Err(contradiction(format!("{} has events and no head", entity.escape_ascii())))
            }
            _ => Ok(()),
        }
    }
}

/// What memory has over the disk.
struct Memory {
    /// Keys whose rows on disk do not count.
    rows: Map<RowKey, Option<Row>>,
    runs: BTreeMap<Vec<u8>, Vec<EventRun>>,
}

/// The whole read, the log's entries first. Blocks on the disk.
pub(crate) fn verify(core: &ShardCore, db: &Db) -> Result<ReplicaReport, ReadError> {
    core.log.verify()?;
    let (snapshot, memory, progress) = {
        let state = core.state.lock();
        if state.stopped.is_some() {
            return Err(ReadError::Stopped);
        }
        let mut memory = Memory { rows: Map::default(), runs: BTreeMap::new() };
        for layer in state.cache.frozen().map(AsRef::as_ref).into_iter().chain([state.cache.dirty()]) {
            memory.rows.extend(layer.rows.iter().map(|(key, row)| (key.clone(), row.clone())));
            for (entity, run) in &layer.events {
                memory.runs.entry(entity.as_bytes().to_vec()).or_default().push(run.clone());
            }
        }
        (db.snapshot(), memory, state.progress.clone())
    };
    let mut totals = Totals::default();
    for (key, row) in &memory.rows {
        let Some(row) = row else { continue };
        totals.row(key.as_bytes(), row);
        if let Some(entity) = entity_prefix(key.as_bytes()) {
            totals.head(entity, row);
        }
    }
    let (from, end) = key_range(&core.slots);
    read_disk(snapshot.iter(KeyRange::new(from, end).once()), &memory, &mut totals)?;
    for (entity, runs) in &memory.runs {
        for run in runs {
            totals.span(entity, run.first(), run.next())?;
            for seq in run.first()..run.next() {
                let event = run.record(seq).ok_or_else(|| contradiction("a run lacks a record"))?;
                totals.event(entity, seq, event)?;
            }
        }
    }
    let left: Vec<Vec<u8>> = totals.spans.keys().cloned().collect();
    left.iter().try_for_each(|entity| totals.judge(entity))?;
    if totals.events != progress.events {
        return Err(contradiction(format!("{} events are stored, {} were applied", totals.events, progress.events)));
    }
    Ok(ReplicaReport {
        applied: progress.applied,
        events: totals.events,
        rows: totals.rows,
        chain_hash: progress.chain,
        state_hash: totals.hash,
    })
}

fn read_disk(mut iter: Iter<'_>, memory: &Memory, totals: &mut Totals) -> Result<(), ReadError> {
    let mut current: Vec<u8> = Vec::new();
    iter.seek_to_first();
    while let Some((key, value)) = iter.item() {
        let entity = entity_prefix(key).ok_or_else(|| damaged(format!("{} is no key of ours", key.escape_ascii())))?;
        if entity != current.as_slice() {
            if !memory.runs.contains_key(&current) {
                totals.judge(&current)?;
            }
            current = entity.to_vec();
        }
        if Parts::of(key).is_some_and(|parts| parts.kind == Kind::Block) {
            block(key, value, entity, memory, totals)?;
        } else {
            let row = Row::decode(key, value).map_err(|e| damaged(format!("row {}: {e}", key.escape_ascii())))?;
            if !memory.rows.contains_key(key) {
                totals.row(key, &row);
                totals.head(entity, &row);
            }
        }
        iter.next();
    }
    iter.status().map_err(io_error)
}

fn block(key: &[u8], value: &[u8], entity: &[u8], memory: &Memory, totals: &mut Totals) -> Result<(), ReadError> {
    let block = Block::parse(key, value).map_err(damaged)?;
    let first_in_memory = memory.runs.get(entity).and_then(|runs| runs.first()).map_or(u64::MAX, EventRun::first);
    if block.first() >= first_in_memory {
        // Written already, and still in memory: counted there.
        return Ok(());
    }
    totals.span(entity, block.first(), block.next())?;
    for seq in block.first()..block.next() {
        let event = block.record(seq).ok_or_else(|| contradiction("a block lacks a record"))?;
        totals.event(entity, seq, &event)?;
    }
    Ok(())
}
