//! A snapshot between brokers: a shard's rows as a stream of checked chunks, and the staging of what arrives.
//! Must never hand over, or stage, a row whose checksum does not match.

use std::{io, ops::Range, path::Path, sync::Arc};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use stentor_engine::{
    key::{Kind, Parts, RowKey},
    limits,
    rows::Row,
};
use stentor_proto::{
    ids::{ShardId, key_crc},
    internal::AppliedRow,
    record,
};
use tokio::sync::{OwnedMutexGuard, mpsc, oneshot};

use crate::{
    blocks::Block,
    db::{Iter, KeyRange},
    disk::DiskFile,
    reader::{ReadError, io_error},
    shard::{self, ShardCore},
    store::{Parts as StoreParts, StoreError},
    types::SnapshotMeta,
    wire,
};

/// Whole rows: `[u32 LE key_len][u32 LE value_len][key][value]…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowChunk {
    /// The rows.
    pub rows: Bytes,
    /// CRC32 of `rows`.
    pub crc: u32,
    /// Whether it is the last one.
    pub last: bool,
    /// Rows so far, this chunk's included.
    pub row_count: u64,
}

/// openraft's `SnapshotData`: rows to send, or rows received and staged.
pub struct SnapshotRows {
    applied: AppliedRow,
    pub(crate) source: Source,
}

pub(crate) enum Source {
    /// A thread holds the RocksDB snapshot and reads on demand; it ends when this is dropped.
    Stored { begin: Option<oneshot::Sender<()>>, chunks: mpsc::Receiver<Result<RowChunk, ReadError>> },
    /// Verified and synced in a file of ours.
    Staged(Staged),
}

/// Rows that wait to be installed.
#[derive(Debug, Clone)]
pub(crate) struct Staged {
    pub(crate) bytes: u64,
    pub(crate) crc: u32,
    pub(crate) row_count: u64,
    /// As long as it lives nobody else writes the file.
    pub(crate) claim: Arc<OwnedMutexGuard<()>>,
}

impl SnapshotRows {
    /// The shard's rows as of its last written checkpoint; `None` when there is none.
    pub(crate) async fn open(core: &Arc<ShardCore>, parts: &StoreParts) -> io::Result<Option<Self>> {
        let (head, head_rx) = oneshot::channel();
        let (begin, begin_rx) = oneshot::channel();
        let (chunks, chunks_rx) = mpsc::channel(2);
        let (db, log, shard, slots) = (parts.state_db.clone(), core.log.clone(), core.shard, core.slots.clone());
        // Nobody waits for it: it ends with whoever holds the other end.
        let _worker = parts.disk.exec().spawn("snapshot", async move {
            let snapshot = db.snapshot();
            let key = RowKey::applied(shard);
            let row = match snapshot.get(key.as_bytes()) {
                Ok(value) => {
                    let row = value.map(|value| shard::decode_applied(&key, &value)).transpose();
                    row.map_err(ReadError::Damaged)
                }
                Err(error) => Err(io_error(error)),
            };
            let row = row.inspect_err(|error| log.report(error));
            let none = !matches!(row, Ok(Some(_)));
            // Nobody waits, or nobody wants the rows: done.
            if head.send(row).is_err() || none || begin_rx.await.is_err() {
                return;
            }
            // The whole shard passes through once.
            let (from, end) = shard::key_range(&slots);
            let iter = snapshot.iter(KeyRange::new(from, end).once());
            if let Err(error) = send_rows(iter, &chunks).await {
                log.report(&error);
                // Whoever received may be gone.
                let _ = chunks.send(Err(error)).await;
            }
        })?;
        let row = head_rx.await.map_err(io::Error::other)?;
        let row = row.map_err(io::Error::other)?;
        Ok(row.map(|applied| Self { applied, source: Source::Stored { begin: Some(begin), chunks: chunks_rx } }))
    }

    /// What the snapshot says about itself, as it travels in `SnapshotHead`.
    pub fn applied(&self) -> &AppliedRow {
        &self.applied
    }

    /// The same as openraft wants it.
    pub(crate) fn meta(&self) -> io::Result<SnapshotMeta> {
        wire::snapshot_meta(&self.applied).map_err(io::Error::other)
    }

    /// The next chunk to send; `None` after the last. Cancel-safe.
    ///
    /// # Errors
    /// [`ReadError::Damaged`] when a stored row does not match its checksum; [`ReadError::Stopped`] for a snapshot
    /// that was received rather than stored.
    pub async fn next_chunk(&mut self) -> Result<Option<RowChunk>, ReadError> {
        match &mut self.source {
            Source::Stored { begin, chunks } => {
                if let Some(begin) = begin.take() {
                    begin.send(()).map_err(|()| ReadError::Stopped)?;
                }
                chunks.recv().await.transpose()
            }
            Source::Staged(_) => Err(ReadError::Stopped),
        }
    }
}

type Chunks = mpsc::Sender<Result<RowChunk, ReadError>>;

async fn send_chunk(chunks: &Chunks, rows: &mut BytesMut, row_count: u64, last: bool) -> Result<(), ReadError> {
    let rows = rows.split().freeze();
    let crc = crc32fast::hash(&rows);
    chunks.send(Ok(RowChunk { rows, crc, last, row_count })).await.map_err(|_| ReadError::Stopped)
}

async fn send_rows(mut iter: Iter<'_>, chunks: &Chunks) -> Result<(), ReadError> {
    let mut rows = BytesMut::new();
    let mut row_count = 0;
    iter.seek_to_first();
    while let Some((key, value)) = iter.item() {
        check_row(key, value).map_err(ReadError::Damaged)?;
        rows.put_u32_le(key.len() as u32);
        rows.put_u32_le(value.len() as u32);
        rows.put_slice(key);
        rows.put_slice(value);
        row_count += 1;
        if rows.len() >= limits::SNAPSHOT_CHUNK_BYTES {
            send_chunk(chunks, &mut rows, row_count, false).await?;
        }
        iter.next();
    }
    iter.status().map_err(io_error)?;
    send_chunk(chunks, &mut rows, row_count, true).await
}

/// Whether a stored row, or a block with all its records, is what was written.
pub(crate) fn check_row(key: &[u8], value: &[u8]) -> Result<(), String> {
    let parts = Parts::of(key).ok_or_else(|| format!("row {} is under no key of ours", key.escape_ascii()))?;
    if parts.kind != Kind::Block {
        return Row::decode(key, value).map(drop).map_err(|e| format!("row {}: {e}", key.escape_ascii()));
    }
    let block = Block::parse(key, value)?;
    let crc = key_crc(parts.app, parts.id);
    for seq in block.first()..block.next() {
        let event = block.record(seq).ok_or("block lacks a record")?;
        record::verify(&event, crc).map_err(|e| format!("event {seq} of {}: {e}", key.escape_ascii()))?;
    }
    Ok(())
}

/// The rows of a chunk. Bytes from a peer or a staged file: every length is checked.
pub(crate) fn rows_of(mut chunk: &[u8]) -> impl Iterator<Item = Result<(&[u8], &[u8]), String>> {
    std::iter::from_fn(move || {
        if chunk.is_empty() {
            return None;
        }
        if chunk.len() < 8 {
            chunk = &[];
            return Some(Err("rows are cut short".into()));
        }
        let (key_len, value_len) = (chunk.get_u32_le() as usize, chunk.get_u32_le() as usize);
        let row = chunk
            .split_at_checked(key_len)
            .and_then(|(key, rest)| rest.split_at_checked(value_len).map(|(value, rest)| (key, value, rest)));
        match row {
            Some((key, value, rest)) => {
                chunk = rest;
                Some(Ok((key, value)))
            }
            None => {
                chunk = &[];
                Some(Err("a row is longer than its chunk".into()))
            }
        }
    })
}

/// Takes a snapshot's chunks from a peer and stages them on disk.
pub struct SnapshotReceiver {
    staging: Staging,
    parts: StoreParts,
    applied: AppliedRow,
    done: bool,
}

fn staging(error: &io::Error) -> String {
    format!("staging a snapshot failed: {error}")
}

fn refused_before(shard: ShardId) -> StoreError {
    StoreError::Damaged { shard, what: "an earlier chunk of this snapshot was refused".into() }
}

/// The file under way; moves to a blocking thread and back.
struct Staging {
    shard: ShardId,
    slots: Range<u16>,
    file: Option<DiskFile>,
    staged: Staged,
    crc: crc32fast::Hasher,
    /// Keys must ascend: a peer that repeats or reorders rows is refused.
    last_key: Vec<u8>,
}

impl SnapshotReceiver {
    pub(crate) fn create(
        core: &ShardCore,
        parts: &StoreParts,
        path: &Path,
        applied: AppliedRow,
        claim: OwnedMutexGuard<()>,
    ) -> Result<Self, StoreError> {
        parts.check()?;
        let file = Some(parts.disk.create(path).map_err(|e| parts.fail(staging(&e)))?);
        let staged = Staged { bytes: 0, crc: 0, row_count: 0, claim: Arc::new(claim) };
        let crc = crc32fast::Hasher::new();
        let (shard, slots) = (core.shard, core.slots.clone());
        let staging = Staging { shard, slots, file, staged, crc, last_key: Vec::new() };
        Ok(Self { staging, parts: parts.clone(), applied, done: false })
    }

    /// Verifies and stages one chunk.
    ///
    /// # Errors
    /// The stream must be abandoned: [`StoreError::Damaged`] when the chunk is not what a healthy peer sends;
    /// [`StoreError::Failed`] when the disk refuses.
    pub async fn push(&mut self, chunk: RowChunk) -> Result<(), StoreError> {
        let shard = self.staging.shard;
        let damaged = |what: String| StoreError::Damaged { shard, what };
        if self.done {
            return Err(damaged("a chunk came after the last one".into()));
        }
        let last = chunk.last;
        // The file and its hash go along and come back: no lock, and no blocking write on this thread.
        let (mut staging, parts) = (self.staging.take(), self.parts.clone());
        let work = move || staging.push(&chunk, &parts).map(|()| staging);
        self.staging = self.parts.disk.exec().run(work).await.map_err(|_| StoreError::Closed)??;
        self.done = last;
        Ok(())
    }

    /// After the last chunk: what to give to `Raft::install_full_snapshot`.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] without a last chunk; [`StoreError::Failed`] when the disk refuses.
    pub async fn finish(self) -> Result<SnapshotRows, StoreError> {
        let shard = self.staging.shard;
        let damaged = |what: String| StoreError::Damaged { shard, what };
        if !self.done {
            return Err(damaged("the snapshot ended before its last chunk".into()));
        }
        let (staging, parts) = (self.staging, self.parts.clone());
        let work = move || staging.finish(&parts);
        let staged = self.parts.disk.exec().run(work).await.map_err(|_| StoreError::Closed)??;
        Ok(SnapshotRows { applied: self.applied, source: Source::Staged(staged) })
    }

    /// What to tell openraft about this snapshot, besides its rows.
    pub fn meta(&self) -> Result<SnapshotMeta, StoreError> {
        let shard = self.staging.shard;
        wire::snapshot_meta(&self.applied).map_err(|e| StoreError::Damaged { shard, what: e.to_string() })
    }
}

impl Staging {
    fn take(&mut self) -> Self {
        Self {
            shard: self.shard,
            slots: self.slots.clone(),
            file: self.file.take(),
            staged: self.staged.clone(),
            crc: self.crc.clone(),
            last_key: std::mem::take(&mut self.last_key),
        }
    }

    fn push(&mut self, chunk: &RowChunk, parts: &StoreParts) -> Result<(), StoreError> {
        let shard = self.shard;
        self.judge(chunk).map_err(|what| StoreError::Damaged { shard, what })?;
        parts.check()?;
        self.crc.update(&chunk.rows);
        self.staged.bytes += chunk.rows.len() as u64;
        let file = self.file.as_mut().ok_or_else(|| refused_before(shard))?;
        file.write_all(&chunk.rows).map_err(|e| parts.fail(staging(&e)))
    }

    /// Whether a chunk is what a healthy peer sends next.
    fn judge(&mut self, chunk: &RowChunk) -> Result<(), String> {
        if chunk.rows.len() > limits::SNAPSHOT_MAX_CHUNK_BYTES {
            return Err("a chunk is longer than any may be".into());
        }
        if crc32fast::hash(&chunk.rows) != chunk.crc {
            return Err("a chunk does not match its checksum".into());
        }
        let (from, end) = shard::key_range(&self.slots);
        for row in rows_of(&chunk.rows) {
            let (key, value) = row?;
            if key < from.as_slice() || key >= end.as_slice() || key <= self.last_key.as_slice() {
                return Err("a row lies outside of the shard, or out of order".into());
            }
            check_row(key, value)?;
            self.last_key.clear();
            self.last_key.extend_from_slice(key);
            self.staged.row_count += 1;
        }
        if self.staged.row_count != chunk.row_count {
            return Err(format!("{} rows came, {} were announced", self.staged.row_count, chunk.row_count));
        }
        Ok(())
    }

    fn finish(self, parts: &StoreParts) -> Result<Staged, StoreError> {
        parts.check()?;
        let file = self.file.ok_or_else(|| refused_before(self.shard))?;
        file.sync_all().map_err(|e| parts.fail(staging(&e)))?;
        Ok(Staged { crc: self.crc.finalize(), ..self.staged })
    }
}
