//! What a shard's log keeps in memory: its ends, and the newest entries, so that apply and replication need no disk.
//! Must never let go of an entry that is not on disk yet.

use std::collections::VecDeque;

use bytes::Bytes;
use stentor_engine::limits;

use crate::types::{RaftLogEntry, RaftLogId};

struct TailEntry {
    entry: RaftLogEntry,
    bytes: usize,
    /// The operation that writes it.
    ticket: u64,
}

/// Where a range of entries is.
pub(crate) enum TailRead {
    /// All that is there.
    Memory(Vec<RaftLogEntry>),
    /// First `[start, end)` from the disk, then these; valid while the generation stands.
    Disk { start: u64, end: u64, then: Vec<RaftLogEntry>, generation: u64 },
}

/// How many bytes of log lie between two marks for [`Tail::older_than`].
const MARK_BYTES: u64 = 1 << 20;

/// The newest entries and both ends of a log.
pub(crate) struct Tail {
    purged: Option<RaftLogId>,
    last: Option<RaftLogId>,
    /// The first index that the log has.
    begin: u64,
    /// Contiguous, up to `last`.
    entries: VecDeque<TailEntry>,
    bytes: usize,
    max_bytes: usize,
    synced: u64,
    applied: u64,
    /// Counts truncations and purges.
    generation: u64,
    /// Bytes appended since the start.
    appended: u64,
    /// Log ids with the bytes appended up to them, one each [`MARK_BYTES`].
    marks: VecDeque<(RaftLogId, u64)>,
}

impl Tail {
    /// Of a log on disk whose first entry is `begin`.
    pub(crate) fn new(purged: Option<RaftLogId>, begin: u64, last: Option<RaftLogId>, max_bytes: usize) -> Self {
        Self {
            purged,
            last,
            begin,
            entries: VecDeque::new(),
            bytes: 0,
            max_bytes,
            synced: 0,
            applied: 0,
            generation: 0,
            appended: 0,
            marks: last.map(|last| (last, 0)).into_iter().collect(),
        }
    }

    pub(crate) fn purged(&self) -> Option<RaftLogId> {
        self.purged
    }

    pub(crate) fn last(&self) -> Option<RaftLogId> {
        self.last
    }

    /// The entries `[begin, next)` that are synced; `next` is at or below `begin` when there are none.
    pub(crate) fn on_disk(&self) -> (u64, u64) {
        let unsynced = self.entries.iter().find(|e| e.ticket > self.synced).map(|e| e.entry.log_id.index);
        (self.begin, unsynced.unwrap_or_else(|| self.last.map_or(0, |last| last.index.saturating_add(1))))
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Adds entries that the operation `ticket` writes. Refused: nothing changed.
    pub(crate) fn append(&mut self, entries: Vec<(RaftLogEntry, Bytes)>, ticket: u64) -> Result<(), String> {
        let mut last = self.last.map(|last| last.index);
        for (entry, _) in &entries {
            let index = entry.log_id.index;
            if last.is_some_and(|last| last + 1 != index) {
                return Err(format!("entry {index} does not follow {last:?}: it would leave a hole or hide an entry"));
            }
            last = Some(index);
        }
        for (entry, value) in entries {
            if self.last.is_none() {
                self.begin = entry.log_id.index;
            }
            self.last = Some(entry.log_id);
            self.bytes += value.len();
            self.appended += value.len() as u64;
            if self.marks.back().is_none_or(|(_, at)| self.appended - at >= MARK_BYTES) {
                self.marks.push_back((entry.log_id, self.appended));
            }
            self.entries.push_back(TailEntry { entry, bytes: value.len(), ticket });
        }
        Ok(())
    }

    /// Operations up to this one are on disk.
    pub(crate) fn synced_to(&mut self, ticket: u64) {
        self.synced = ticket;
        self.trim();
    }

    /// Entries up to this index are applied.
    pub(crate) fn applied_to(&mut self, index: u64) {
        self.applied = index;
        self.trim();
    }

    fn trim(&mut self) {
        while let Some(front) = self.entries.front() {
            let wanted = front.entry.log_id.index > self.applied && self.bytes <= self.max_bytes * limits::TAIL_SLACK;
            if front.ticket > self.synced || self.bytes <= self.max_bytes || wanted {
                return;
            }
            self.bytes -= front.bytes;
            self.entries.pop_front();
        }
    }

    /// Removes what lies after `last`; the first index to remove on disk.
    pub(crate) fn truncate_after(&mut self, last: Option<RaftLogId>) -> u64 {
        let from = last.map_or(0, |last| last.index.saturating_add(1));
        if self.last.is_some_and(|now| now.index >= from) {
            self.generation += 1;
            while self.entries.back().is_some_and(|e| e.entry.log_id.index >= from) {
                self.bytes -= self.entries.pop_back().map_or(0, |e| e.bytes);
            }
            while self.marks.back().is_some_and(|(id, _)| id.index >= from) {
                self.marks.pop_back();
            }
            self.last = last.max(self.purged);
        }
        from
    }

    /// Removes what lies up to `upto`; the first index to remove on disk.
    pub(crate) fn purge(&mut self, upto: RaftLogId) -> u64 {
        let from = self.purged.map_or(0, |purged| purged.index.saturating_add(1));
        self.generation += 1;
        while self.entries.front().is_some_and(|e| e.entry.log_id.index <= upto.index) {
            self.bytes -= self.entries.pop_front().map_or(0, |e| e.bytes);
        }
        while self.marks.front().is_some_and(|(id, _)| id.index <= upto.index) {
            self.marks.pop_front();
        }
        self.purged = self.purged.max(Some(upto));
        self.begin = self.begin.max(upto.index.saturating_add(1));
        if self.last.is_none_or(|last| last.index < upto.index) {
            self.last = Some(upto);
        }
        from
    }

    /// The newest mark with more than `keep` bytes after it.
    pub(crate) fn older_than(&self, keep: u64) -> Option<RaftLogId> {
        self.marks.iter().rev().find(|(_, at)| self.appended - at > keep).map(|(id, _)| *id)
    }

    /// Where the entries `[start, end)` are; stops at `limit` (entries, bytes) after at least one.
    pub(crate) fn read(&self, start: u64, end: u64, limit: Option<(usize, usize)>) -> TailRead {
        let next = self.last.map_or(0, |last| last.index + 1);
        let start = start.max(self.begin);
        let end = end.min(next);
        let first = self.entries.front().map_or(next, |e| e.entry.log_id.index);
        let mut entries = Vec::new();
        if start >= end {
            return TailRead::Memory(entries);
        }
        let skip = usize::try_from(start.saturating_sub(first)).unwrap_or(usize::MAX);
        let take = usize::try_from(end.saturating_sub(start.max(first))).unwrap_or(usize::MAX);
        let mut bytes = 0;
        for e in self.entries.iter().skip(skip).take(take) {
            bytes += e.bytes;
            entries.push(e.entry.clone());
            if limit.is_some_and(|(count, max)| entries.len() >= count || bytes >= max) {
                break;
            }
        }
        if start >= first {
            return TailRead::Memory(entries);
        }
        TailRead::Disk { start, end: end.min(first), then: entries, generation: self.generation }
    }
}
