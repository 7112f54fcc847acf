//! One instance of the twin: a sorted map, its durable image, and the batches between the two.
//! Must never show half a batch, before a cut or after it.

use std::{collections::BTreeMap, ops::Bound, path::PathBuf, sync::Arc};

use bytes::Bytes;
use stentor_engine::apply::chain;

use super::{Honesty, Life, Platter, Step};
use crate::{
    db::{DbError, Instance, KeyRange},
    logkey,
};

type Map = BTreeMap<Bytes, Bytes>;

/// One change of a batch.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Put(Bytes, Bytes),
    Delete(Bytes),
    /// `[from, end)`.
    DeleteRange(Bytes, Bytes),
}

impl Change {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Put(key, value) => key.len() + value.len(),
            Self::Delete(key) => key.len(),
            Self::DeleteRange(from, end) => from.len() + end.len(),
        }
    }

    fn is_vote(&self) -> bool {
        matches!(self, Self::Put(key, _) if logkey::is_vote(key))
    }

    fn apply(&self, map: &mut Map) {
        match self {
            Self::Put(key, value) => {
                map.insert(key.clone(), value.clone());
            }
            Self::Delete(key) => {
                map.remove(key);
            }
            Self::DeleteRange(from, end) if from < end => {
                let gone: Vec<Bytes> = map.range(from.clone()..end.clone()).map(|(key, _)| key.clone()).collect();
                gone.iter().for_each(|key| drop(map.remove(key)));
            }
            Self::DeleteRange(..) => {}
        }
    }
}

/// What the disk has of an instance.
#[derive(Default)]
pub(crate) struct Table {
    /// As reads see it; shared with views, copied when it changes under one.
    visible: Arc<Map>,
    durable: Map,
    /// Not durable yet, in order.
    pending: Vec<Vec<Change>>,
}

impl Table {
    fn show(&mut self, changes: &[Change]) {
        let visible = Arc::make_mut(&mut self.visible);
        changes.iter().for_each(|change| change.apply(visible));
    }

    /// Makes the first `count` pending batches durable.
    pub(crate) fn settle(&mut self, count: usize) {
        let count = count.min(self.pending.len());
        for change in self.pending.drain(..count).flatten() {
            change.apply(&mut self.durable);
        }
    }

    /// What a power cut leaves.
    pub(crate) fn cut(&mut self, platter: &mut Platter) {
        let kept = platter.kept(self.pending.len());
        self.settle(kept);
        self.pending.clear();
        self.visible = Arc::new(self.durable.clone());
    }

    /// What a killed process leaves of an instance with a WAL: written is written.
    pub(crate) fn reread(&mut self) {
        self.settle(usize::MAX);
        self.visible = Arc::new(self.durable.clone());
    }

    pub(crate) fn fingerprint(&self, hash: u64) -> u64 {
        self.durable.iter().fold(hash, |hash, (key, value)| chain(chain(hash, key), value))
    }
}

/// An open instance of the twin.
pub(crate) struct MemoryDb {
    life: Life,
    key: (PathBuf, Instance),
}

impl MemoryDb {
    pub(crate) fn new(life: Life, key: (PathBuf, Instance)) -> Self {
        Self { life, key }
    }

    pub(crate) fn view(&self) -> Result<MemoryView, DbError> {
        let rows = self.life.with(|platter, _| Ok(platter.table(&self.key)?.visible.clone()))?;
        Ok(MemoryView { rows, life: self.life.clone() })
    }

    /// As RocksDB does it: to the WAL, then the fsync, then visible.
    pub(crate) async fn write_synced(&self, changes: Vec<Change>) -> Result<(), DbError> {
        self.life.with(|platter, life| {
            let written = platter.operation(life, Step::Write);
            // What failed may have reached the disk all the same.
            if written.is_ok() || (platter.alive(life).is_ok() && platter.chance(0.5)) {
                platter.table(&self.key)?.pending.push(changes.clone());
            }
            written
        })?;
        self.life.sync_time().await;
        let votes = changes.iter().filter(|change| change.is_vote()).count() as u64;
        self.life.with(|platter, life| {
            if let Err(error) = platter.operation(life, Step::Sync) {
                // The kernel marks pages clean that it could not write: they may be gone for good.
                if platter.alive(life).is_ok() && platter.chance(0.5) {
                    platter.table(&self.key)?.pending.pop();
                }
                return Err(error);
            }
            let (forgets, honesty) = (platter.forgets_votes() && votes > 0, platter.honesty());
            let table = platter.table(&self.key)?;
            if forgets {
                table.pending.iter_mut().for_each(|batch| batch.retain(|change| !change.is_vote()));
            }
            if honesty == Honesty::Honest {
                table.settle(usize::MAX);
            }
            table.show(&changes);
            Ok(())
        })?;
        self.life.votes_synced(votes);
        Ok(())
    }

    /// Visible at once.
    pub(crate) fn write(&self, changes: Vec<Change>) -> Result<(), DbError> {
        let written = self.life.with(|platter, life| {
            platter.operation(life, Step::Write)?;
            let table = platter.table(&self.key)?;
            table.show(&changes);
            table.pending.push(changes);
            Ok(())
        });
        Ok(written?)
    }

    pub(crate) async fn flush(&self) -> Result<(), DbError> {
        let upto = self.life.with(|platter, _| Ok(platter.table(&self.key)?.pending.len()))?;
        self.life.sync_time().await;
        self.flush_upto(upto)
    }

    pub(crate) fn flush_now(&self) -> Result<(), DbError> {
        self.flush_upto(usize::MAX)
    }

    /// What comes while a flush is under way is not part of it.
    fn flush_upto(&self, upto: usize) -> Result<(), DbError> {
        let flushed = self.life.with(|platter, life| {
            platter.operation(life, Step::Sync)?;
            if platter.honesty() == Honesty::Honest {
                platter.table(&self.key)?.settle(upto);
            }
            Ok(())
        });
        Ok(flushed?)
    }
}

impl Drop for MemoryDb {
    fn drop(&mut self) {
        // RocksDB writes its memtables when it is closed. Of a dead process nothing comes any more.
        let _ = self.life.with(|platter, _| {
            if self.key.1 == Instance::State {
                platter.table(&self.key)?.settle(usize::MAX);
            }
            Ok(())
        });
    }
}

/// One picture of an instance.
#[derive(Clone)]
pub(crate) struct MemoryView {
    rows: Arc<Map>,
    life: Life,
}

impl MemoryView {
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Bytes>, DbError> {
        self.life.read_row(self.rows.get(key).cloned())
    }
}

/// A cursor over a range of a picture.
pub(crate) struct MemoryIter {
    view: Result<MemoryView, DbError>,
    from: Bytes,
    end: Option<Bytes>,
    at: Option<(Bytes, Bytes)>,
    failed: Option<DbError>,
}

impl MemoryIter {
    pub(crate) fn new(view: Result<MemoryView, DbError>, range: KeyRange) -> Self {
        Self { view, from: range.from.into(), end: range.end.map(Bytes::from), at: None, failed: None }
    }

    fn first(&self, from: Bound<&[u8]>) -> Option<(Bytes, Bytes)> {
        let view = self.view.as_ref().ok()?;
        let found = view.rows.range::<[u8], _>((from, Bound::Unbounded)).next();
        let found = found.filter(|(key, _)| self.end.as_ref().is_none_or(|end| *key < end));
        found.map(|(key, value)| (key.clone(), value.clone()))
    }

    pub(crate) fn seek(&mut self, key: &[u8]) {
        let from = key.max(&self.from[..]);
        self.read(self.first(Bound::Included(from)));
    }

    fn read(&mut self, found: Option<(Bytes, Bytes)>) {
        let Ok(view) = &self.view else { return };
        let (key, value) = found.unzip();
        match view.life.read_row(value) {
            Ok(value) => {
                self.at = key.zip(value);
                self.failed = None;
            }
            Err(error) => {
                self.at = None;
                self.failed = Some(error);
            }
        }
    }

    pub(crate) fn seek_for_prev(&mut self, key: &[u8]) {
        let found = match &self.end {
            Some(end) if end[..] <= *key => self.last(Bound::Excluded(&end[..])),
            _ => self.last(Bound::Included(key)),
        };
        self.read(found);
    }

    fn last(&self, end: Bound<&[u8]>) -> Option<(Bytes, Bytes)> {
        let empty = match end {
            Bound::Excluded(end) => end <= &self.from[..],
            Bound::Included(end) => end < &self.from[..],
            Bound::Unbounded => false,
        };
        let view = self.view.as_ref().ok().filter(|_| !empty)?;
        let found = view.rows.range::<[u8], _>((Bound::Included(&self.from[..]), end)).next_back();
        found.map(|(key, value)| (key.clone(), value.clone()))
    }

    pub(crate) fn next(&mut self) {
        if let Some((key, _)) = self.at.take() {
            self.read(self.first(Bound::Excluded(&key)));
        }
    }

    pub(crate) fn prev(&mut self) {
        if let Some((key, _)) = self.at.take() {
            self.read(self.last(Bound::Excluded(&key)));
        }
    }

    pub(crate) fn item(&self) -> Option<(&[u8], &[u8])> {
        self.at.as_ref().map(|(key, value)| (&key[..], &value[..]))
    }

    pub(crate) fn status(&self) -> Result<(), DbError> {
        match (&self.view, &self.failed) {
            (Err(error), _) | (Ok(_), Some(error)) => Err(error.clone()),
            (Ok(_), None) => Ok(()),
        }
    }
}
