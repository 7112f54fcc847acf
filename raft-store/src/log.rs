//! One shard's Raft log as openraft sees it: an in-memory tail in front of the log instance.
//! Must never report an entry as flushed before the WAL thread has fsynced it.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, stream};
use openraft::{
    EntryPayload, OptionalSend, RaftLogReader,
    storage::{IOFlushed, LogState, RaftLogStorage},
};
use parking_lot::Mutex;
use stentor_engine::limits;
use stentor_proto::{Message, ids::ShardId, internal};
use tokio::sync::{oneshot, watch};

use crate::{
    db::{Db, DbError, KeyRange},
    exec::Exec,
    logkey::{self, LogKind},
    reader::{ReadError, io_error},
    store::{Failure, StoreError},
    tail::{Tail, TailRead},
    types::{RaftLogEntry, RaftLogId, TypeConfig, Vote},
    wal::{Op, Queued, Wal},
    wire,
};

/// What all handles of one shard's log share.
pub(crate) struct LogCore {
    pub(crate) shard: ShardId,
    db: Arc<Db>,
    exec: Exec,
    wal: Wal,
    mem: Mutex<Mem>,
    synced: watch::Sender<u64>,
}

struct Mem {
    vote: Option<Vote>,
    committed: Option<RaftLogId>,
    /// A committed id to write with the operation of this ticket or a later one.
    note: Option<(RaftLogId, u64)>,
    /// The ticket of the last queued operation.
    queued: u64,
    tail: Tail,
}

impl LogCore {
    /// Reads what is on disk. `applied` is how far the state is.
    pub(crate) fn open(
        shard: ShardId,
        db: Arc<Db>,
        (exec, wal): (Exec, Wal),
        tail_bytes: usize,
        applied: Option<RaftLogId>,
    ) -> Result<Self, DbError> {
        let vote = small::<internal::RaftVote>(&db, shard, LogKind::Vote)?;
        let log_id = |kind| -> Result<Option<RaftLogId>, DbError> {
            Ok(small::<internal::RaftLogId>(&db, shard, kind)?.map(|id| wire::log_id_from_proto(&id)))
        };
        let (purged, committed) = (log_id(LogKind::Purged)?, log_id(LogKind::Committed)?);
        let entries = ends(&db, shard)?;
        let last = entries.map(|(_, last)| last).max(purged);
        // A snapshot is in the state before the purge up to it is in the log.
        let covered = purged.max(applied).map_or(0, |id| id.index.saturating_add(1));
        if let Some((first, _)) = entries.filter(|(first, _)| *first > covered) {
            return Err(DbError::Corrupt(format!("the log of shard {shard} lacks entries {covered}..{first}")));
        }
        let begin =
            entries.map_or(0, |(first, _)| first).max(purged.map_or(0, |purged| purged.index.saturating_add(1)));
        // The note rides behind its entries, in the same batch or a later one.
        if let Some(committed) = committed.filter(|committed| Some(*committed) > last.max(applied)) {
            let what = format!("the log of shard {shard} ends at {last:?}, though {committed} was committed");
            return Err(DbError::Corrupt(what));
        }
        let mem = Mem {
            vote: vote.map(|vote| wire::vote_from_proto(&vote)),
            committed: committed.min(last),
            note: None,
            queued: 0,
            tail: Tail::new(purged, begin, last, tail_bytes),
        };
        Ok(Self { shard, db, exec, wal, mem: Mutex::new(mem), synced: watch::Sender::new(0) })
    }

    /// The WAL thread has fsynced all operations up to this one.
    pub(crate) fn synced_to(&self, ticket: u64) {
        self.mem.lock().tail.synced_to(ticket);
        self.synced.send_replace(ticket);
    }

    /// The committed id to write beside the operation of this ticket.
    pub(crate) fn take_note(&self, ticket: u64) -> Option<RaftLogId> {
        let mut mem = self.mem.lock();
        mem.note.take_if(|(_, after)| *after <= ticket).map(|(id, _)| id)
    }

    /// Entries up to here are applied: the tail may let go of them.
    pub(crate) fn applied_to(&self, index: u64) {
        self.mem.lock().tail.applied_to(index);
    }

    /// The last entry that is not kept any more.
    pub(crate) fn purged(&self) -> Option<RaftLogId> {
        self.mem.lock().tail.purged()
    }

    /// The ticket of the last queued operation.
    pub(crate) fn queued(&self) -> u64 {
        self.mem.lock().queued
    }

    /// Waits until an operation is fsynced, or the store has failed.
    pub(crate) async fn wait_synced(&self, ticket: u64) -> Result<(), StoreError> {
        let mut synced = self.synced.subscribe();
        let mut failed = self.wal.failed();
        tokio::select! {
            done = synced.wait_for(|at| *at >= ticket) => done.map(drop).map_err(|_| StoreError::Closed),
            failed = failed.wait_for(Option::is_some) => {
                Err(failed.ok().and_then(|f| f.clone()).map_or(StoreError::Closed, StoreError::Failed))
            }
        }
    }

    /// The log up to here lies more than `keep` bytes below the end of what was appended since the start.
    pub(crate) fn purgeable(&self, keep: u64) -> Option<RaftLogId> {
        self.mem.lock().tail.older_than(keep)
    }

    async fn send(self: &Arc<Self>, bytes: usize, op: Op) -> io::Result<()> {
        self.send_with(bytes, |_, _| Ok(op)).await
    }

    /// `prepare` changes memory and makes the operation in one step with its place in the queue.
    async fn send_with(
        self: &Arc<Self>,
        bytes: usize,
        prepare: impl FnOnce(&mut Mem, u64) -> io::Result<Op>,
    ) -> io::Result<()> {
        let permit = self.wal.reserve(bytes).await.map_err(io::Error::other)?;
        let mut mem = self.mem.lock();
        let ticket = mem.queued + 1;
        match prepare(&mut mem, ticket) {
            Ok(op) => {
                mem.queued = ticket;
                permit.send(Queued { log: self.clone(), ticket, op });
                Ok(())
            }
            Err(error) => {
                drop(mem);
                self.wal.give_back(bytes);
                Err(error)
            }
        }
    }

    /// Queues an operation and waits until it is on disk.
    pub(crate) async fn send_and_wait(
        self: &Arc<Self>,
        op: impl FnOnce(oneshot::Sender<Result<(), Failure>>) -> Op,
    ) -> Result<(), StoreError> {
        let (done, wait) = oneshot::channel();
        self.send(0, op(done)).await.map_err(|_| self.wal.stopped())?;
        wait.await.map_err(|_| self.wal.stopped())?.map_err(StoreError::Failed)
    }

    /// Entries `[start, end)` that are there, as one picture; may stop early at a bound.
    async fn read(
        self: &Arc<Self>,
        start: u64,
        end: u64,
        limit: Option<(usize, usize)>,
    ) -> io::Result<Vec<RaftLogEntry>> {
        // Truncations under way can hide what the first picture promised; they are rare, so a few tries are many.
        for _ in 0..16 {
            let read = self.mem.lock().tail.read(start, end, limit);
            match read {
                TailRead::Memory(entries) => return Ok(entries),
                TailRead::Disk { start, end, then, generation } => {
                    let core = self.clone();
                    let disk = self.exec.run(move || core.read_disk(start, end, limit));
                    let (mut entries, complete) = disk.await.map_err(io::Error::other)??;
                    if self.mem.lock().tail.generation() != generation {
                        continue;
                    }
                    let reached = entries.last().map_or(start, |e| e.log_id.index + 1);
                    if complete {
                        entries.extend(then);
                    }
                    if entries.first().is_none_or(|first| first.log_id.index != start) || (complete && reached != end) {
                        // Memory knows that they are there, and nothing was removed meanwhile.
                        let core = self.clone();
                        let condemn = move || core.damaged(&format!("the log lacks entries of {start}..{end}"));
                        return Err(self.exec.run(condemn).await.unwrap_or_else(io::Error::other));
                    }
                    return Ok(entries);
                }
            }
        }
        Err(io::Error::other("the log changed under every attempt to read it"))
    }

    fn read_disk(&self, start: u64, end: u64, limit: Option<(usize, usize)>) -> io::Result<(Vec<RaftLogEntry>, bool)> {
        let (from, upto) = (logkey::entry(self.shard, start), logkey::entry(self.shard, end));
        let mut iter = self.db.iter(KeyRange::new(from, upto));
        let (mut entries, mut bytes, mut complete) = (Vec::<RaftLogEntry>::new(), 0, true);
        iter.seek(from);
        while let Some((key, value)) = iter.item() {
            let index = logkey::index_of(self.shard, key).ok_or_else(|| self.damaged("log key of a wrong length"))?;
            if entries.last().is_some_and(|last| last.log_id.index + 1 != index) {
                return Err(self.damaged(&format!("the log has a hole before entry {index}")));
            }
            bytes += value.len();
            let entry = wire::decode_entry(self.shard, index, &Bytes::copy_from_slice(value));
            entries.push(entry.map_err(|e| self.damaged(&e.to_string()))?);
            if limit.is_some_and(|(count, max)| entries.len() >= count || bytes >= max) {
                complete = index + 1 == end;
                break;
            }
            iter.next();
        }
        iter.status().map_err(|error| {
            self.report(&io_error(error.clone()));
            io::Error::other(error)
        })?;
        Ok((entries, complete))
    }

    /// A read of this shard has failed: damage is noted, and either way the broker stops. Blocks on the disk, once.
    pub(crate) fn report(&self, error: &ReadError) {
        match error {
            ReadError::Damaged(what) => self.wal.condemn(&format!("shard {}: {what}", self.shard)),
            ReadError::Io(what) => self.wal.refuse(format!("reading shard {}: {what}", self.shard)),
            ReadError::Contradiction(_) | ReadError::Stopped => {}
        }
    }

    fn damaged(&self, what: &str) -> io::Error {
        self.report(&ReadError::Damaged(what.into()));
        io::Error::new(io::ErrorKind::InvalidData, what)
    }

    /// Reads every entry on disk, and checks it; all that memory says is there must be. Blocks on the disk.
    pub(crate) fn verify(&self) -> Result<(), ReadError> {
        let (from, end) = (logkey::entry(self.shard, 0), logkey::entry(self.shard, u64::MAX));
        let (snapshot, (begin, next)) = {
            let mem = self.mem.lock();
            (self.db.snapshot(), mem.tail.on_disk())
        };
        let mut iter = snapshot.iter(KeyRange::new(from, end).once());
        let mut last: Option<u64> = None;
        iter.seek(from);
        while let Some((key, value)) = iter.item() {
            let index = logkey::index_of(self.shard, key);
            let index = index.ok_or_else(|| ReadError::Damaged("a log key has a wrong length".into()))?;
            wire::decode_entry(self.shard, index, &Bytes::copy_from_slice(value))
                .map_err(|e| ReadError::Damaged(format!("entry {index} of the log: {e}")))?;
            // What a truncation or purge in the queue removes may still be there; what it leaves must be.
            if last.map_or(index > begin && begin < next, |last| last + 1 != index) {
                return Err(ReadError::Damaged(format!("the log has a hole before entry {index}")));
            }
            last = Some(index);
            iter.next();
        }
        iter.status().map_err(io_error)?;
        let there = last.map_or(0, |last| last + 1);
        if begin < next && there < next {
            return Err(ReadError::Damaged(format!("the log lacks entries {}..{next}", there.max(begin))));
        }
        Ok(())
    }
}

/// A small value that is a protobuf, if it is there.
fn small<M: Message + Default>(db: &Db, shard: ShardId, kind: LogKind) -> Result<Option<M>, DbError> {
    let key = logkey::small(shard, kind);
    let value = db.get(key)?;
    value.map(|value| logkey::unseal_message(&key, &value)).transpose().map_err(DbError::Corrupt)
}

/// The first index and the last log id on disk.
fn ends(db: &Db, shard: ShardId) -> Result<Option<(u64, RaftLogId)>, DbError> {
    let corrupt = |what: &str| DbError::Corrupt(format!("the log of shard {shard}: {what}"));
    let (from, end) = (logkey::entry(shard, 0), logkey::entry(shard, u64::MAX));
    let mut iter = db.iter(KeyRange::new(from, end));
    iter.seek(from);
    let Some(first) = iter.key() else {
        return iter.status().map(|()| None);
    };
    let first = logkey::index_of(shard, first).ok_or_else(|| corrupt("a key has a wrong length"))?;
    iter.seek_for_prev(end);
    let Some((key, value)) = iter.item() else {
        return Err(iter.status().err().unwrap_or_else(|| corrupt("it has a first and no last entry")));
    };
    let index = logkey::index_of(shard, key).ok_or_else(|| corrupt("a key has a wrong length"))?;
    let entry = wire::decode_entry(shard, index, &Bytes::copy_from_slice(value));
    let entry = entry.map_err(|e| corrupt(&format!("entry {index}: {e}")))?;
    Ok(Some((first, entry.log_id)))
}

/// A shard's log: storage and reader in one, cheap to clone.
#[derive(Clone)]
pub struct ShardLog {
    pub(crate) core: Arc<LogCore>,
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(&at) => at,
        Bound::Excluded(&at) => at.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&at) => at.saturating_add(1),
        Bound::Excluded(&at) => at,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<TypeConfig> for ShardLog {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<RaftLogEntry>, io::Error> {
        let (start, end) = bounds(&range);
        self.core.read(start, end, None).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<RaftLogEntry>, io::Error> {
        self.core.read(start, end, Some((limits::LOG_READ_ENTRIES, limits::LOG_READ_BYTES))).await
    }

    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<RaftLogEntry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        // In steps: a replica that re-applies its log must not hold all of it.
        let (start, end) = bounds(&range);
        let first = (self.core.clone(), start, Vec::new().into_iter());
        Box::pin(stream::unfold(first, move |(core, mut next, mut ready)| async move {
            loop {
                if let Some(entry) = ready.next() {
                    return Some((Ok(entry), (core, next, ready)));
                }
                if next >= end {
                    return None;
                }
                match core.read(next, end, Some((limits::LOG_READ_ENTRIES, limits::LOG_READ_BYTES))).await {
                    Ok(entries) => {
                        next = entries.last().map_or(end, |last| last.log_id.index + 1);
                        ready = entries.into_iter();
                    }
                    Err(error) => return Some((Err(error), (core, end, ready))),
                }
            }
        }))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.core.mem.lock().vote)
    }
}

/// One buffer for all entries of a round; the tail's entries share it, so that what the proposer or the network held
/// is let go of.
fn encode(shard: ShardId, entries: impl IntoIterator<Item = RaftLogEntry>) -> (Vec<(RaftLogEntry, Bytes)>, usize) {
    let mut entries: Vec<RaftLogEntry> = entries.into_iter().collect();
    let mut buffer = BytesMut::with_capacity(entries.iter().map(wire::entry_bytes_hint).sum());
    let mut ends = Vec::with_capacity(entries.len());
    for entry in &entries {
        wire::encode_entry(shard, entry, &mut buffer);
        ends.push(buffer.len());
    }
    let mut buffer = buffer.freeze();
    let bytes = buffer.len();
    let mut start = 0;
    let encoded = entries.drain(..).zip(ends).map(|(mut entry, end)| {
        let value = buffer.split_to(end - start);
        start = end;
        if let EntryPayload::Normal(bundle) = &mut entry.payload {
            *bundle = wire::seal(shard, entry.log_id, &value);
        }
        (entry, value)
    });
    (encoded.collect(), bytes)
}

impl RaftLogStorage<TypeConfig> for ShardLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let mem = self.core.mem.lock();
        Ok(LogState { last_purged_log_id: mem.tail.purged(), last_log_id: mem.tail.last() })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.core.send_and_wait(|done| Op::Vote { vote: *vote, done }).await.map_err(io::Error::other)?;
        self.core.mem.lock().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> Result<(), io::Error> {
        let mut mem = self.core.mem.lock();
        mem.committed = committed;
        mem.note = committed.map(|id| (id, mem.queued));
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<RaftLogId>, io::Error> {
        Ok(self.core.mem.lock().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = RaftLogEntry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let (entries, bytes) = encode(self.core.shard, entries);
        let values = entries.iter().map(|(entry, value)| (entry.log_id.index, value.clone())).collect();
        let append = Op::Append { entries: values, bytes, callback };
        self.core
            .send_with(bytes, |mem, ticket| {
                mem.tail.append(entries, ticket).map_err(|what| io::Error::new(io::ErrorKind::InvalidInput, what))?;
                Ok(append)
            })
            .await
    }

    async fn truncate_after(&mut self, last_log_id: Option<RaftLogId>) -> Result<(), io::Error> {
        self.core.send_with(0, |mem, _| Ok(Op::Truncate { from: mem.tail.truncate_after(last_log_id) })).await
    }

    async fn purge(&mut self, log_id: RaftLogId) -> Result<(), io::Error> {
        self.core.send_with(0, |mem, _| Ok(Op::Purge { from: mem.tail.purge(log_id), upto: log_id })).await
    }
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
