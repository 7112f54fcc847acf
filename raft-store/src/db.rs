//! The seam around RocksDB: exactly what this crate asks of an instance, answered by RocksDB or by its twin in memory.
//! Must never decide anything: what is written, and when, is decided above.

use std::{io, ops::Deref};

use bytes::Bytes;
use rocksdb::{DB, FlushOptions, WriteBatch, WriteOptions};
use thiserror::Error;

use crate::{
    memory::table::{Change, MemoryDb, MemoryIter, MemoryView},
    options,
};

/// Which instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Instance {
    /// Entries, votes, positions; every write is fsynced.
    Log,
    /// Rows and blocks; durable by flushes.
    State,
}

/// Why a disk refuses.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum DbError {
    /// Bytes on disk are not what was written.
    #[error("{0}")]
    Corrupt(String),
    /// Anything else: it is unknown what reached the disk.
    #[error("{0}")]
    Io(String),
}

impl From<io::Error> for DbError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // Files of ours are whole when they have their name.
            io::ErrorKind::UnexpectedEof => Self::Corrupt("a file is cut short".into()),
            _ => Self::Io(error.to_string()),
        }
    }
}

impl From<rocksdb::Error> for DbError {
    fn from(error: rocksdb::Error) -> Self {
        match error.kind() {
            rocksdb::ErrorKind::Corruption => Self::Corrupt(error.to_string()),
            _ => Self::Io(error.to_string()),
        }
    }
}

/// An open instance.
pub(crate) enum Db {
    Rocks(Rocks),
    Memory(MemoryDb),
}

/// RocksDB with the options of its writes.
pub(crate) struct Rocks {
    db: DB,
    sync: WriteOptions,
    without_wal: WriteOptions,
}

impl Rocks {
    pub(crate) fn new(db: DB) -> Self {
        Self { db, sync: options::synced(), without_wal: options::without_wal() }
    }
}

/// Changes that become visible, and durable, together.
pub(crate) enum Batch {
    Rocks(WriteBatch),
    Memory(Vec<Change>),
}

impl Batch {
    pub(crate) fn put(&mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) {
        match self {
            Self::Rocks(batch) => batch.put(key, value),
            Self::Memory(changes) => {
                changes.push(Change::Put(Bytes::copy_from_slice(key.as_ref()), Bytes::copy_from_slice(value.as_ref())))
            }
        }
    }

    pub(crate) fn delete(&mut self, key: impl AsRef<[u8]>) {
        match self {
            Self::Rocks(batch) => batch.delete(key),
            Self::Memory(changes) => changes.push(Change::Delete(Bytes::copy_from_slice(key.as_ref()))),
        }
    }

    /// Removes `[from, end)`.
    pub(crate) fn delete_range(&mut self, from: impl AsRef<[u8]>, end: impl AsRef<[u8]>) {
        match self {
            Self::Rocks(batch) => batch.delete_range(from.as_ref(), end.as_ref()),
            Self::Memory(changes) => changes
                .push(Change::DeleteRange(Bytes::copy_from_slice(from.as_ref()), Bytes::copy_from_slice(end.as_ref()))),
        }
    }

    /// Roughly what it holds.
    pub(crate) fn size_in_bytes(&self) -> usize {
        match self {
            Self::Rocks(batch) => batch.size_in_bytes(),
            Self::Memory(changes) => changes.iter().map(Change::bytes).sum(),
        }
    }
}

/// What to read: `[from, end)`, to the last key without an end.
#[derive(Debug, Clone, Default)]
pub(crate) struct KeyRange {
    pub(crate) from: Vec<u8>,
    pub(crate) end: Option<Vec<u8>>,
    /// It passes through once and must not push everything else out of the cache.
    pub(crate) once: bool,
}

impl KeyRange {
    pub(crate) fn new(from: impl Into<Vec<u8>>, end: impl Into<Vec<u8>>) -> Self {
        Self { from: from.into(), end: Some(end.into()), once: false }
    }

    pub(crate) fn once(self) -> Self {
        Self { once: true, ..self }
    }
}

/// A value, where it lies.
pub(crate) enum Value<'a> {
    Rocks(rocksdb::DBPinnableSlice<'a>),
    Memory(Bytes),
}

impl Deref for Value<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Rocks(value) => value,
            Self::Memory(value) => value,
        }
    }
}

impl Db {
    pub(crate) fn batch(&self) -> Batch {
        match self {
            Self::Rocks(_) => Batch::Rocks(WriteBatch::default()),
            Self::Memory(_) => Batch::Memory(Vec::new()),
        }
    }

    pub(crate) fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Value<'_>>, DbError> {
        match self {
            Self::Rocks(rocks) => Ok(rocks.db.get_pinned(key)?.map(Value::Rocks)),
            Self::Memory(db) => Ok(db.view()?.get(key.as_ref())?.map(Value::Memory)),
        }
    }

    pub(crate) fn multi_get<'k>(&self, keys: impl Iterator<Item = &'k [u8]>) -> Vec<Result<Option<Vec<u8>>, DbError>> {
        match self {
            Self::Rocks(rocks) => {
                rocks.db.multi_get(keys).into_iter().map(|value| value.map_err(DbError::from)).collect()
            }
            Self::Memory(db) => {
                let view = db.view();
                keys.map(|key| Ok(view.as_ref().map_err(Clone::clone)?.get(key)?.map(Vec::from))).collect()
            }
        }
    }

    /// Reads a range as it is now.
    pub(crate) fn iter(&self, range: KeyRange) -> Iter<'_> {
        match self {
            Self::Rocks(rocks) => Iter::Rocks(rocks.db.raw_iterator_opt(options::range(range))),
            Self::Memory(db) => Iter::Memory(MemoryIter::new(db.view(), range)),
        }
    }

    /// Everything as it is now, for several reads.
    pub(crate) fn snapshot(&self) -> Snapshot<'_> {
        match self {
            Self::Rocks(rocks) => Snapshot::Rocks(rocks.db.snapshot()),
            Self::Memory(db) => Snapshot::Memory(db.view()),
        }
    }

    /// Writes a batch and returns after its fsync. In RocksDB this blocks the thread; in the twin simulated time passes.
    pub(crate) async fn write_synced(&self, batch: Batch) -> Result<(), DbError> {
        match (self, batch) {
            (Self::Memory(db), Batch::Memory(changes)) => db.write_synced(changes).await,
            (rocks, batch) => rocks.write_synced_now(batch),
        }
    }

    /// The same for callers that may block; not in the twin, where time must pass.
    pub(crate) fn write_synced_now(&self, batch: Batch) -> Result<(), DbError> {
        match (self, batch) {
            (Self::Rocks(rocks), Batch::Rocks(batch)) => Ok(rocks.db.write_opt(batch, &rocks.sync)?),
            _ => Err(foreign_batch()),
        }
    }

    /// Writes a batch without WAL: visible at once, durable with the next flush.
    pub(crate) fn write(&self, batch: Batch) -> Result<(), DbError> {
        match (self, batch) {
            (Self::Rocks(rocks), Batch::Rocks(batch)) => Ok(rocks.db.write_opt(batch, &rocks.without_wal)?),
            (Self::Memory(db), Batch::Memory(changes)) => db.write(changes),
            _ => Err(foreign_batch()),
        }
    }

    /// Makes durable what was written before. In RocksDB this blocks the thread; in the twin simulated time passes.
    pub(crate) async fn flush(&self) -> Result<(), DbError> {
        match self {
            Self::Rocks(_) => self.flush_now(),
            Self::Memory(db) => db.flush().await,
        }
    }

    /// The same for callers that may block; in the twin no time passes.
    pub(crate) fn flush_now(&self) -> Result<(), DbError> {
        match self {
            Self::Rocks(rocks) => {
                let mut wait = FlushOptions::default();
                wait.set_wait(true);
                Ok(rocks.db.flush_opt(&wait)?)
            }
            Self::Memory(db) => db.flush_now(),
        }
    }
}

/// A batch is made by the instance that it is written to.
fn foreign_batch() -> DbError {
    DbError::Io("a batch of another kind of instance".into())
}

/// One picture of an instance.
pub(crate) enum Snapshot<'a> {
    Rocks(rocksdb::SnapshotWithThreadMode<'a, DB>),
    Memory(Result<MemoryView, DbError>),
}

impl Snapshot<'_> {
    pub(crate) fn get(&self, key: impl AsRef<[u8]>) -> Result<Option<Value<'_>>, DbError> {
        match self {
            Self::Rocks(snapshot) => Ok(snapshot.get_pinned(key)?.map(Value::Rocks)),
            Self::Memory(view) => Ok(view.as_ref().map_err(Clone::clone)?.get(key.as_ref())?.map(Value::Memory)),
        }
    }

    pub(crate) fn iter(&self, range: KeyRange) -> Iter<'_> {
        match self {
            Self::Rocks(snapshot) => Iter::Rocks(snapshot.raw_iterator_opt(options::range(range))),
            Self::Memory(view) => Iter::Memory(MemoryIter::new(view.clone(), range)),
        }
    }
}

/// A cursor over a range. An error shows as the end, and in [`Self::status`].
pub(crate) enum Iter<'a> {
    Rocks(rocksdb::DBRawIteratorWithThreadMode<'a, DB>),
    Memory(MemoryIter),
}

impl Iter<'_> {
    pub(crate) fn seek_to_first(&mut self) {
        match self {
            Self::Rocks(iter) => iter.seek_to_first(),
            Self::Memory(iter) => iter.seek(&[]),
        }
    }

    /// To the first key at or after this one.
    pub(crate) fn seek(&mut self, key: impl AsRef<[u8]>) {
        match self {
            Self::Rocks(iter) => iter.seek(key),
            Self::Memory(iter) => iter.seek(key.as_ref()),
        }
    }

    /// To the last key at or before this one.
    pub(crate) fn seek_for_prev(&mut self, key: impl AsRef<[u8]>) {
        match self {
            Self::Rocks(iter) => iter.seek_for_prev(key),
            Self::Memory(iter) => iter.seek_for_prev(key.as_ref()),
        }
    }

    pub(crate) fn next(&mut self) {
        match self {
            Self::Rocks(iter) => iter.next(),
            Self::Memory(iter) => iter.next(),
        }
    }

    pub(crate) fn prev(&mut self) {
        match self {
            Self::Rocks(iter) => iter.prev(),
            Self::Memory(iter) => iter.prev(),
        }
    }

    pub(crate) fn key(&self) -> Option<&[u8]> {
        match self {
            Self::Rocks(iter) => iter.key(),
            Self::Memory(iter) => iter.item().map(|(key, _)| key),
        }
    }

    pub(crate) fn item(&self) -> Option<(&[u8], &[u8])> {
        match self {
            Self::Rocks(iter) => iter.item(),
            Self::Memory(iter) => iter.item(),
        }
    }

    /// Whether the end was the end.
    pub(crate) fn status(&self) -> Result<(), DbError> {
        match self {
            Self::Rocks(iter) => Ok(iter.status()?),
            Self::Memory(iter) => iter.status(),
        }
    }
}
