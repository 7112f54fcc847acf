//! What the store's tests share: one shard driven without openraft, and a command sequence that is a function of the
//! log index, so that any state can be made again from nothing. Must never look inside the store.

#![allow(dead_code, clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::{future::Future, path::Path, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use openraft::{
    EntryPayload, Membership, RaftLogReader, RaftSnapshotBuilder,
    alias::OneshotOf,
    async_runtime::Oneshot,
    storage::{IOFlushed, RaftLogStorage, RaftStateMachine},
};
use stentor_engine::{
    apply, command,
    effect::{Applied, Outcome},
    key::Entity,
    rows::MemoryRows,
};
use stentor_proto::{
    bundle::{Builder, Bundle},
    ids::{AppId, ConversationId, DeviceId, ReplicaId, Seq, ShardId, Slot, StampMs, UserId},
    internal::{Create, Send},
    v1::{ConversationKind, EventKind},
};
use stentor_raft_store::{
    ApplyHook, MemoryDisk, OpenError, Shard, Store, StoreConfig, open, open_in_memory,
    runtime::seed_thread,
    types::{BundleBytes, RaftLogEntry, RaftLogId, TypeConfig, Vote},
    wire::log_id,
};

/// All slots: every test shard is alone in its store, or shares nothing but the disk.
pub const SLOTS: std::ops::Range<u16> = 0..16_384;

/// A hook that checks nothing.
pub struct Quiet;

impl ApplyHook for Quiet {
    fn applied(&self, _: ShardId, _: RaftLogId, _: &mut Applied) {}
}

/// Small bounds, so that everything that bounds trigger happens within a test.
pub fn config(dir: &Path) -> StoreConfig {
    StoreConfig {
        cache_bytes: 1 << 20,
        checkpoint_log_bytes: 64 << 10,
        checkpoint_interval: Duration::from_millis(100),
        undurable_log_bytes: 1 << 20,
        tail_bytes: 32 << 10,
        keep_log_bytes: 64 << 10,
        ..StoreConfig::new(dir)
    }
}

pub fn open_quiet(dir: &Path) -> Arc<Store> {
    open(config(dir), Arc::new(Quiet)).unwrap()
}

/// A directory for thousands of copies: in memory, where the system has such a place. Nothing that cuts power uses it.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A place for a data directory: a real one or a twin in memory.
pub enum Place {
    Real(tempfile::TempDir),
    Twin(MemoryDisk),
}

impl Place {
    pub fn real() -> Self {
        Self::Real(tempfile::tempdir().unwrap())
    }

    pub fn twin() -> Self {
        Self::Twin(MemoryDisk::new(1))
    }

    pub fn open(&self) -> Arc<Store> {
        match self {
            Self::Real(dir) => open_quiet(dir.path()),
            Self::Twin(disk) => open_twin(disk).unwrap(),
        }
    }
}

pub fn open_twin(disk: &MemoryDisk) -> Result<Arc<Store>, OpenError> {
    open_in_memory(config(Path::new("/data")), disk, Arc::new(Quiet))
}

/// Longer than any test's life in simulated time: past it, something waits for what never comes.
const STANDS_STILL: Duration = Duration::from_secs(600);

/// Runs a future in a runtime that repeats bit for bit: one thread, paused time, everything from one seed.
pub fn simulate<R>(seed: u64, future: impl Future<Output = R>) -> R {
    seed_thread(seed);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_le_bytes()))
        .build()
        .unwrap();
    runtime.block_on(async { tokio::time::timeout(STANDS_STILL, future).await }).expect("the simulation stands still")
}

/// Each of these tests twice: on a real directory, and on the twin.
#[macro_export]
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod on_a_disk {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name($crate::support::Place::real).await;
            })*
        }
        mod on_the_twin {
            $(#[test]
            fn $name() {
                $crate::support::simulate(1, super::$name($crate::support::Place::twin));
            })*
        }
    };
}

pub fn app() -> AppId {
    AppId::new("app").unwrap()
}

/// How many shards share the slots in tests with several.
pub const SHARDS: u32 = 4;

/// A shard's part of all slots, in tests with several.
pub fn slots_of(shard: u32) -> std::ops::Range<u16> {
    let part = u32::from(SLOTS.end) / SHARDS;
    ((shard - 1) * part) as u16..(shard * part) as u16
}

/// A shard's conversation: its name hashes into the shard's slots.
pub fn conversation(shard: ShardId, n: u64) -> ConversationId {
    let names = (0u32..).map(|i| format!("s{shard}-c{n}-{i}"));
    let mut ours = names.filter(|name| slots_of(shard.0).contains(&Slot::of("app", name).0));
    ConversationId::new(ours.next().unwrap()).unwrap()
}

/// How many conversations [`bundle_at`] writes to.
pub const CONVERSATIONS: u64 = 16;
/// How many sends an entry of [`bundle_at`] has.
pub const SENDS: u64 = 4;

/// What stands at an index: first a membership, then a conversation each, then numbered sends round and round.
pub fn payload_at(shard: ShardId, index: u64) -> EntryPayload<BundleBytes, ReplicaId, openraft::EmptyNode> {
    match index {
        0 => EntryPayload::Membership(Membership::new_with_defaults(vec![[ReplicaId::from_u64(1)].into()], [])),
        _ => EntryPayload::Normal(BundleBytes::new(bundle_at(shard, index))),
    }
}

pub fn bundle_at(shard: ShardId, index: u64) -> Bytes {
    let (ann, device) = (UserId::new("ann").unwrap(), DeviceId::new("phone").unwrap());
    let actor = command::actor(&ann, Some(&device), false);
    let mut bundle = Builder::new();
    let (n, round) = ((index - 1) % CONVERSATIONS, (index - 1) / CONVERSATIONS);
    let target = conversation(shard, n);
    if round == 0 {
        let create = Create { actor: Some(actor), kind: ConversationKind::Group as i32, ..Default::default() };
        bundle.push(&command::encode(&command::create(&app(), &target, create)));
    } else {
        for i in 1..=SENDS {
            let send_no = (round - 1) * SENDS + i;
            let send = Send {
                actor: Some(actor.clone()),
                send_no,
                done_no: send_no.saturating_sub(3),
                kind: EventKind::Message as i32,
                content_type: "text/plain".into(),
                body: format!("message {send_no} of {index} {}", "x".repeat((index * 37 % 300) as usize)).into(),
                ..Default::default()
            };
            bundle.push(&command::encode(&command::send(&app(), &target, send)));
        }
    }
    bundle.finish(apply::LEVEL, StampMs(1_000 + index))
}

/// One shard, its log driven by hand.
pub struct Replica {
    pub id: ShardId,
    pub shard: Shard,
    pub term: u64,
}

impl Replica {
    pub async fn open(store: &Store, id: u32, slots: std::ops::Range<u16>) -> Self {
        let id = ShardId(id);
        Self { id, shard: store.shard(id, slots).await.unwrap(), term: 1 }
    }

    pub fn entry(&self, index: u64) -> RaftLogEntry {
        RaftLogEntry { log_id: log_id(self.term, index), payload: payload_at(self.id, index) }
    }

    /// Appends and waits for the fsync.
    pub async fn append(&mut self, entries: Vec<RaftLogEntry>) {
        self.append_start(entries).await.await.unwrap().unwrap();
    }

    /// Appends; the answer comes with the fsync.
    pub async fn append_start(
        &mut self,
        entries: Vec<RaftLogEntry>,
    ) -> tokio::sync::oneshot::Receiver<std::io::Result<()>> {
        let (tx, rx) = OneshotOf::<TypeConfig>::channel();
        let (out, done) = tokio::sync::oneshot::channel();
        self.shard.log.append(entries, IOFlushed::signal(tx)).await.unwrap();
        tokio::spawn(async move {
            if let Ok(result) = rx.await {
                let _ = out.send(result);
            }
        });
        done
    }

    pub async fn apply(&mut self, entries: Vec<RaftLogEntry>) {
        self.shard.machine.apply(stream::iter(entries.into_iter().map(|entry| Ok((entry, None))))).await.unwrap();
    }

    /// Appends and applies the entries of [`payload_at`] in `range`.
    pub async fn write(&mut self, range: std::ops::Range<u64>) {
        let entries: Vec<_> = range.map(|index| self.entry(index)).collect();
        self.append(entries.clone()).await;
        self.apply(entries).await;
    }

    pub async fn checkpoint(&mut self) {
        let mut builder = self.shard.machine.try_create_snapshot_builder(true).await.unwrap();
        builder.build_snapshot().await.unwrap();
    }

    pub async fn applied_index(&mut self) -> Option<u64> {
        self.shard.machine.applied_state().await.unwrap().0.map(|id| id.index)
    }

    /// Applies from the log what is not applied yet, up to `upto`.
    pub async fn reapply(&mut self, upto: u64) {
        let from = self.applied_index().await.map_or(0, |index| index + 1);
        let entries = self.shard.log.try_get_log_entries(from..upto + 1).await.unwrap();
        assert_eq!(entries.len() as u64, (upto + 1).saturating_sub(from), "the log lacks entries of {from}..={upto}");
        self.apply(entries).await;
    }

    pub async fn vote(&mut self, term: u64) {
        self.shard.log.save_vote(&Vote::new_committed(term, ReplicaId::from_u64(1))).await.unwrap();
    }
}

/// The same events from the last one down, from several places and with several bounds.
async fn compare_backward(replica: &Replica, entity: &Entity, want: &[&Vec<u8>]) {
    let len = want.len() as u64;
    for before in [0, 1, 2, len / 2, len, len + 1, u64::MAX] {
        for (limit, max_bytes) in [(0, 9_999), (1, 9_999), (7, 9_999), (50, 9_999), (1_000, 2_000), (3, 1)] {
            let end = before.saturating_sub(1).min(len) as usize;
            let (mut start, mut bytes) = (end, 0);
            while start > 0 && end - start < limit {
                bytes += want[start - 1].len();
                if bytes > max_bytes && start < end {
                    break;
                }
                start -= 1;
            }
            let got = replica.shard.reader.events_before(entity, Seq(before), limit, max_bytes).await.unwrap();
            let same = got.len() == end - start && got.iter().zip(&want[start..end]).all(|(a, b)| a[..] == b[..]);
            assert!(same, "{limit} events and {max_bytes} bytes of {entity:?} before {before}: {} came", got.len());
        }
    }
}

/// The state that the same entries make in a map.
pub struct Model {
    pub shard: ShardId,
    pub rows: MemoryRows,
    pub chain: u64,
    stamp: StampMs,
    pub next: u64,
}

impl Model {
    pub fn new(shard: ShardId) -> Self {
        Self { shard, rows: MemoryRows::default(), chain: 0, stamp: StampMs(0), next: 0 }
    }

    pub fn apply_to(&mut self, upto: u64) {
        while self.next <= upto {
            if let EntryPayload::Normal(bytes) = payload_at(self.shard, self.next) {
                let bundle = Bundle::parse(bytes.bundle.clone()).unwrap();
                let context = apply::begin_entry(&mut self.stamp, &bundle).unwrap();
                let mut out = Applied::default();
                for command in bundle.commands() {
                    apply::apply_command(&mut self.rows, &context, &command, &mut BytesMut::new(), &mut out).unwrap();
                }
                let fine = out.outcomes.iter().all(|o| matches!(o, Outcome::Accepted { .. }));
                assert!(fine, "the test's own commands must be accepted: {:?}", out.outcomes);
                self.chain = apply::chain(self.chain, &bytes.bundle);
            }
            self.next += 1;
        }
    }

    /// Every row and every event of the model is what the store answers, and the store has no event more.
    pub async fn compare(&self, replica: &Replica) {
        let reader = &replica.shard.reader;
        for (key, row) in &self.rows.rows {
            assert_eq!(reader.row(key).await.unwrap().as_ref(), Some(row), "row {key:?}");
        }
        for n in 0..CONVERSATIONS {
            let entity = stentor_engine::key::Entity::conversation("app", conversation(self.shard, n).as_str());
            let want: Vec<&Vec<u8>> =
                self.rows.events.iter().filter(|((e, _), _)| *e == entity).map(|(_, record)| record).collect();
            let mut got = Vec::new();
            loop {
                let from = stentor_proto::ids::Seq(got.len() as u64 + 1);
                let page = reader.events(&entity, from, stentor_proto::ids::Seq(u64::MAX), 10_000).await.unwrap();
                if page.is_empty() {
                    break;
                }
                got.extend(page);
            }
            assert_eq!(got.len(), want.len(), "events of {entity:?}");
            assert!(got.iter().zip(&want).all(|(got, want)| got[..] == want[..]), "events of {entity:?}");
            compare_backward(replica, &entity, &want).await;
        }
        let report = reader.verify().await.unwrap();
        assert_eq!(report.chain_hash, self.chain);
        assert_eq!(report.events, self.rows.events.len() as u64);
        assert_eq!(report.rows, self.rows.rows.len() as u64);
    }
}
