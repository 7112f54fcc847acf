//! The life of a store on a disk that fails, or whose power goes, at each of its operations in turn: the failure is
//! published, nothing is tried after it, and what was acknowledged is there afterwards.
//! Must never take "the call failed" for "nothing happened".

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::{path::PathBuf, sync::Arc};

use openraft::{
    RaftLogReader, RaftSnapshotBuilder,
    storage::{RaftLogStorage, RaftStateMachine},
};
use stentor_proto::{
    ids::{BrokerId, Incarnation, ReplicaId, ShardId},
    internal::AppliedRow,
};
use stentor_raft_store::{
    DiskError, Identity, MemoryDisk, OpenError, ReadFault, RowChunk, Shard, Store, StoreError,
    types::{RaftLogEntry, Vote},
    wire::log_id,
};
use support::{Model, Replica, SLOTS, open_twin, simulate};

mod support;

/// The last entry of the snapshot that is installed.
const SNAPSHOT: u64 = 99;

/// What a leader sends.
#[derive(Clone)]
struct Sent {
    applied: AppliedRow,
    chunks: Vec<RowChunk>,
}

async fn sent() -> Sent {
    let store = open_twin(&MemoryDisk::new(9)).unwrap();
    let mut leader = Replica::open(&store, 1, SLOTS).await;
    leader.write(0..SNAPSHOT + 1).await;
    leader.checkpoint().await;
    let mut snapshot = leader.shard.machine.get_current_snapshot().await.unwrap().unwrap().snapshot;
    let (applied, mut chunks) = (snapshot.applied().clone(), Vec::new());
    while let Some(chunk) = snapshot.next_chunk().await.unwrap() {
        chunks.push(chunk);
    }
    Sent { applied, chunks }
}

/// What was acknowledged before the disk ended it.
#[derive(Debug, Default)]
struct Acknowledged {
    identity: bool,
    vote: u64,
    synced: Option<u64>,
    durable: Option<u64>,
    installed: bool,
    closed: bool,
}

fn identity() -> Identity {
    Identity { cluster_id: "one".into(), broker: BrokerId(1), incarnation: Incarnation(1) }
}

type Ended = Result<(), String>;

fn words(error: impl ToString) -> String {
    error.to_string()
}

/// A store and how far its life came.
struct Life {
    store: Arc<Store>,
    replica: Replica,
    acknowledged: Acknowledged,
}

impl Life {
    async fn begin(disk: &MemoryDisk, acknowledged: &mut Acknowledged) -> Result<Self, (Option<Arc<Store>>, String)> {
        let store = open_twin(disk).map_err(|e| (None, words(e)))?;
        let with = |error: String| (Some(store.clone()), error);
        store.set_identity(&identity()).map_err(|e| with(words(e)))?;
        acknowledged.identity = true;
        let shard = store.shard(ShardId(1), SLOTS).await.map_err(|e| with(words(e)))?;
        let replica = Replica { id: ShardId(1), shard, term: 1 };
        Ok(Self { store, replica, acknowledged: std::mem::take(acknowledged) })
    }

    async fn append(&mut self, entries: Vec<RaftLogEntry>) -> Ended {
        let last = entries.last().map(|entry| entry.log_id.index);
        self.replica.append_start(entries).await.await.map_err(words)?.map_err(words)?;
        self.acknowledged.synced = last;
        Ok(())
    }

    async fn write(&mut self, range: std::ops::Range<u64>) -> Ended {
        for from in range.clone().step_by(10) {
            let entries: Vec<_> = (from..from + 10).map(|index| self.replica.entry(index)).collect();
            self.append(entries.clone()).await?;
            self.replica.apply(entries).await;
            self.replica.shard.log.save_committed(Some(log_id(1, from + 9))).await.map_err(words)?;
        }
        Ok(())
    }

    async fn vote(&mut self, term: u64) -> Ended {
        self.replica.shard.log.save_vote(&Vote::new(term, ReplicaId::from_u64(1))).await.map_err(words)?;
        self.acknowledged.vote = term;
        Ok(())
    }

    async fn checkpoint(&mut self) -> Ended {
        let mut cut = self.replica.shard.machine.try_create_snapshot_builder(true).await.unwrap();
        let built = cut.build_snapshot().await.map_err(words)?;
        self.acknowledged.durable = built.meta.last_log_id.map(|id| id.index);
        Ok(())
    }

    async fn install(&mut self, sent: &Sent) -> Ended {
        let mut staging = self.store.receive_snapshot(ShardId(1), &sent.applied).await.map_err(words)?;
        let meta = staging.meta().map_err(words)?;
        for chunk in &sent.chunks {
            staging.push(chunk.clone()).await.map_err(words)?;
        }
        let rows = staging.finish().await.map_err(words)?;
        self.replica.shard.machine.install_snapshot(&meta, rows).await.map_err(words)?;
        self.acknowledged.installed = true;
        Ok(())
    }

    /// Everything that a store writes, once.
    async fn go_on(&mut self, sent: &Sent) -> Ended {
        self.vote(2).await?;
        self.write(0..30).await?;
        self.checkpoint().await?;
        self.write(30..40).await?;
        // What a deposed leader leaves.
        let wrong =
            (40..43).map(|index| RaftLogEntry { log_id: log_id(1, index), payload: openraft::EntryPayload::Blank });
        let _unacknowledged = self.replica.append_start(wrong.collect()).await;
        self.replica.shard.log.truncate_after(Some(log_id(1, 39))).await.map_err(words)?;
        self.replica.shard.log.purge(log_id(1, 29)).await.map_err(words)?;
        self.write(40..50).await?;
        self.vote(3).await?;
        self.install(sent).await?;
        self.replica.shard.log.purge(log_id(1, SNAPSHOT)).await.map_err(words)?;
        self.write(SNAPSHOT + 1..SNAPSHOT + 11).await?;
        self.checkpoint().await?;
        self.store.close().await;
        self.acknowledged.closed = true;
        Ok(())
    }

    /// A store that has failed tries nothing any more, whatever is asked of it.
    async fn is_dead(&mut self, disk: &MemoryDisk, sent: &Sent) {
        let (before, acknowledged) = (disk.operations(), std::mem::take(&mut self.acknowledged));
        assert!(self.store.failed().borrow().is_some(), "the failure is not published");
        assert!(self.vote(9).await.is_err());
        let next = self.replica.shard.log.get_log_state().await.unwrap().last_log_id.map_or(0, |id| id.index + 1);
        assert!(self.append(vec![self.replica.entry(next)]).await.is_err());
        assert!(self.checkpoint().await.is_err());
        assert!(self.install(sent).await.is_err());
        assert_eq!(disk.operations(), before, "a store that had failed went on");
        self.acknowledged = acknowledged;
    }
}

/// Runs a life until the disk ends it; what was acknowledged.
async fn live(disk: &MemoryDisk, sent: &Sent, at: &str, fails: bool) -> Acknowledged {
    let mut acknowledged = Acknowledged::default();
    let mut life = match Life::begin(disk, &mut acknowledged).await {
        Ok(life) => life,
        Err((store, what)) => {
            if let Some(store) = store.filter(|_| fails) {
                let before = disk.operations();
                assert!(store.failed().borrow().is_some(), "{at}: {what} is not published");
                assert!(store.shard(ShardId(1), SLOTS).await.is_err(), "{at}");
                assert_eq!(disk.operations(), before, "{at}: a store that had failed went on");
            }
            return acknowledged;
        }
    };
    match life.go_on(sent).await {
        // The last operations of a closing store are nobody's answer.
        Ok(()) => {}
        Err(_) if fails => life.is_dead(disk, sent).await,
        Err(_) => {}
    }
    life.acknowledged
}

/// Opens what is left and judges it.
async fn judge(disk: &MemoryDisk, acknowledged: &Acknowledged, at: &str) {
    let store = open_twin(disk).unwrap_or_else(|e| panic!("{at}: {e}"));
    let shard = store.shard(ShardId(1), SLOTS).await.unwrap_or_else(|e| panic!("{at}: {e}"));
    judge_open(&store, shard, acknowledged, at).await;
}

async fn judge_open(store: &Store, shard: Shard, acknowledged: &Acknowledged, at: &str) {
    assert!(!acknowledged.identity || store.identity() == Some(identity()), "{at}: the identity is lost");
    let mut replica = Replica { id: ShardId(1), shard, term: 1 };
    let vote = replica.shard.log.read_vote().await.unwrap().map_or(0, |vote| vote.leader_id.term);
    assert!(vote >= acknowledged.vote, "{at}: vote {} is lost", acknowledged.vote);
    let applied = replica.applied_index().await;
    assert!(applied >= acknowledged.durable, "{at}: {:?} was durable, {applied:?} is there", acknowledged.durable);
    assert!(!acknowledged.installed || applied >= Some(SNAPSHOT), "{at}: the snapshot is gone");
    let upto = acknowledged.synced.max(applied);
    if let Some(upto) = upto {
        replica.reapply(upto).await;
        let mut model = Model::new(ShardId(1));
        model.apply_to(upto);
        model.compare(&replica).await;
    }
    // The disk works again, and so does the store.
    let last = replica.shard.log.get_log_state().await.unwrap().last_log_id.map(|id| id.index);
    if last > upto {
        replica.shard.log.truncate_after(upto.map(|index| log_id(1, index))).await.unwrap();
    }
    if last < upto {
        replica.shard.log.purge(log_id(1, upto.unwrap())).await.unwrap();
    }
    let next = upto.map_or(0, |index| index + 1);
    replica.write(next..next + 5).await;
    replica.checkpoint().await;
    store.close().await;
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    Fails(DiskError),
    Cut,
    Kill,
}

/// A life with one fault at its `n`th operation; whether it was reached.
fn with_fault(sent: &Sent, fault: Fault, n: u64) -> bool {
    simulate(n, async {
        let disk = MemoryDisk::new(n);
        match fault {
            Fault::Fails(error) => disk.fail_at(n, error),
            Fault::Cut => disk.cut_power_at(n),
            Fault::Kill => disk.kill_process_at(n),
        }
        let at = format!("{fault:?} at {n}");
        let acknowledged = live(&disk, sent, &at, matches!(fault, Fault::Fails(_))).await;
        let reached = disk.operations() >= n;
        disk.heal();
        // The process ends one way or the other: with its machine, or alone.
        if matches!(fault, Fault::Fails(_)) && n.is_multiple_of(2) {
            disk.cut_power()
        } else {
            disk.kill_process()
        }
        judge(&disk, &acknowledged, &at).await;
        reached
    })
}

fn at_every_operation(fault: Fault) {
    let sent = simulate(1, sent());
    let mut n = 1;
    while with_fault(&sent, fault, n) {
        n += 1;
    }
    assert!(n > 60, "a life has more operations than {n}");
}

#[test]
fn a_failed_write_or_fsync_stops_the_store_wherever_it_comes() {
    at_every_operation(Fault::Fails(DiskError::Io));
}

#[test]
fn a_full_disk_stops_the_store_wherever_it_comes() {
    at_every_operation(Fault::Fails(DiskError::NoSpace));
}

#[test]
fn a_power_cut_at_any_operation_loses_nothing_that_was_acknowledged() {
    at_every_operation(Fault::Cut);
}

#[test]
fn a_kill_at_any_operation_loses_nothing_that_was_acknowledged() {
    at_every_operation(Fault::Kill);
}

/// Cut at each operation of an install, then at each operation of the start that finishes it.
#[test]
fn an_install_cut_at_each_step_and_again_at_each_step_of_its_repetition_ends_old_or_new() {
    let sent = simulate(1, sent());
    let (mut cut, mut resumed) = (1, 0);
    loop {
        let (ended, again) = install_cut_twice(&sent, cut, 1);
        if ended {
            break;
        }
        resumed += u32::from(again);
        let mut second = 2;
        while again && install_cut_twice(&sent, cut, second).1 {
            second += 1;
        }
        cut += 1;
    }
    assert!(cut > 15, "an install has more steps than {cut}");
    assert!(resumed > 8, "only {resumed} of {cut} cuts left a manifest to go on from");
}

/// Whether the install came to its end before the first cut, and whether the start reached its own.
fn install_cut_twice(sent: &Sent, first: u64, second: u64) -> (bool, bool) {
    simulate(first * 1_000 + second, async {
        let at = format!("cut at {first}, then at {second}");
        let disk = MemoryDisk::new(first * 1_000 + second);
        // Nothing torn in every other run: the strictest old, and the strictest new.
        disk.set_torn(second.is_multiple_of(2));
        let mut acknowledged = Acknowledged::default();
        let Ok(mut life) = Life::begin(&disk, &mut acknowledged).await else { panic!("{at}: the disk works") };
        life.write(0..30).await.unwrap();
        life.checkpoint().await.unwrap();
        disk.cut_power_at(first);
        let ended = life.install(sent).await.is_ok();
        disk.cut_power();
        disk.cut_power_at(second);
        let again = open_twin(&disk).is_err();
        disk.cut_power();
        judge(&disk, &life.acknowledged, &at).await;
        (ended, again)
    })
}

/// What a start has to read: everything that a store keeps, or a snapshot that was not installed to its end.
#[derive(Debug, Clone, Copy)]
enum Left {
    Stopped,
    /// Its operation of this number did not happen any more.
    Installing {
        cut: u64,
    },
}

/// A disk that waits for a start; what was acknowledged on it.
async fn left(disk: &MemoryDisk, left: Left, sent: &Sent) -> Acknowledged {
    let mut acknowledged = Acknowledged::default();
    let Ok(mut life) = Life::begin(disk, &mut acknowledged).await else { panic!("the disk works") };
    life.vote(2).await.unwrap();
    life.write(0..30).await.unwrap();
    life.checkpoint().await.unwrap();
    match left {
        Left::Stopped => {
            life.replica.shard.log.purge(log_id(1, 9)).await.unwrap();
            life.write(30..50).await.unwrap();
            life.store.close().await;
        }
        Left::Installing { cut } => {
            disk.set_torn(false);
            disk.cut_power_at(cut);
            assert!(life.install(sent).await.is_err(), "the install came to its end before its cut");
        }
    }
    life.acknowledged
}

/// Both; the install was cut when its manifest was written and the rows were being replaced.
fn all_left(sent: &Sent) -> [Left; 2] {
    let has_manifest = |cut: u64| {
        simulate(1, async {
            let disk = MemoryDisk::new(1);
            left(&disk, Left::Installing { cut }, sent).await;
            let files = disk.durable_files();
            files.iter().any(|path| path.extension().is_some_and(|extension| extension == "manifest"))
        })
    };
    let cut = (1..).find(|&cut| has_manifest(cut)).unwrap();
    assert!(has_manifest(cut + 3));
    [Left::Stopped, Left::Installing { cut: cut + 3 }]
}

/// How a start ended that did not succeed.
#[derive(Debug)]
enum NotStarted {
    Open(OpenError),
    Shard(StoreError, Option<String>),
}

/// Everything that a start reads.
async fn start(disk: &MemoryDisk) -> Result<(Arc<Store>, Shard), NotStarted> {
    let store = open_twin(disk).map_err(NotStarted::Open)?;
    let failure = |error| NotStarted::Shard(error, store.failed().borrow().clone().map(|failure| failure.what));
    let shards = store.shards_on_disk().map_err(failure)?;
    assert_eq!(shards, [(ShardId(1), SLOTS)]);
    let shard = store.shard(ShardId(1), SLOTS).await.map_err(failure)?;
    Ok((store, shard))
}

/// A start whose `n`th read goes wrong: whether it came to that, and whether the start failed.
fn start_with_fault(sent: &Sent, what: Left, fault: ReadFault, n: u64) -> (bool, bool) {
    simulate(n, async {
        let at = format!("{what:?}: {fault:?} at {n}");
        let disk = MemoryDisk::new(n);
        let acknowledged = left(&disk, what, sent).await;
        let before = disk.reads();
        disk.fail_read_at(n, fault);
        let started = start(&disk).await;
        let reached = disk.reads() >= before + n;
        disk.heal();
        let noted = disk.durable_files().contains(&PathBuf::from("/data/damaged"));
        let error = match started {
            // The bit was one that this start did not look at, or that a second copy makes good.
            Ok((store, shard)) => {
                assert!(!reached || fault != ReadFault::Refused(DiskError::Io), "{at}: an error was passed over");
                judge_open(&store, shard, &acknowledged, &at).await;
                return (reached, false);
            }
            Err(error) => error,
        };
        match (fault, error) {
            (ReadFault::Refused(_), NotStarted::Open(OpenError::Io { .. })) => {}
            (ReadFault::Refused(_), NotStarted::Shard(StoreError::Failed(failure), published)) => {
                assert_eq!(published.as_ref(), Some(&failure.what), "{at}");
                assert!(!failure.what.contains("delete"), "{at}: {failure}");
            }
            // Behind a format that is not known nothing can be judged: it is refused as such.
            (
                ReadFault::Damaged | ReadFault::Flipped,
                NotStarted::Open(OpenError::Corrupt { .. } | OpenError::NewerFormat { .. }),
            ) => {}
            (ReadFault::Damaged | ReadFault::Flipped, NotStarted::Shard(StoreError::Damaged { .. }, published)) => {
                let published = published.unwrap_or_else(|| panic!("{at}: the store goes on"));
                assert!(noted, "{at}: it is not noted");
                match open_twin(&disk) {
                    Err(error @ OpenError::Corrupt { .. }) => assert_eq!(error.to_string(), published, "{at}"),
                    other => panic!("{at}: it opens again: {:?}", other.map(drop)),
                }
                return (reached, true);
            }
            (_, error) => panic!("{at}: {error:?}"),
        }
        assert!(!noted, "{at}: a directory is given up that may be whole");
        judge(&disk, &acknowledged, &at).await;
        (reached, true)
    })
}

fn at_every_read(sent: &Sent, what: Left, fault: ReadFault) -> (u64, u64) {
    let (mut n, mut failed) = (1, 0);
    loop {
        let (reached, ended) = start_with_fault(sent, what, fault, n);
        if !reached {
            return (n - 1, failed);
        }
        failed += u64::from(ended);
        n += 1;
    }
}

#[test]
fn a_read_that_the_disk_refuses_ends_a_start_and_the_directory_is_kept() {
    let sent = simulate(1, sent());
    for what in all_left(&sent) {
        let (reads, failed) = at_every_read(&sent, what, ReadFault::Refused(DiskError::Io));
        assert!(reads > 25, "{what:?}: a start reads more than {reads} times");
        assert_eq!(failed, reads);
    }
}

#[test]
fn damage_that_a_start_reads_is_called_damage() {
    let sent = simulate(1, sent());
    for what in all_left(&sent) {
        let (reads, failed) = at_every_read(&sent, what, ReadFault::Damaged);
        // Each slot of the synced position has the other one beside it.
        assert_eq!(failed, reads - 2, "{what:?}");
        let (reads, failed) = at_every_read(&sent, what, ReadFault::Flipped);
        assert!(failed > 8 && failed < reads, "{what:?}: {failed} of {reads}");
    }
}
