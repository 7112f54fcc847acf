//! SIGKILL at random points of heavy writing, many times over one directory: nothing acknowledged is missing, the log
//! has no gap, and the state is what re-applying the log makes. A kill loses no page cache; power cuts are tested
//! elsewhere. Must never treat what was not acknowledged as absent.

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use openraft::{
    RaftLogReader,
    storage::{RaftLogStorage, RaftStateMachine},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use stentor_proto::ids::ShardId;
use stentor_raft_store::{Store, wire::log_id};
use support::{Model, Replica, SHARDS, open_quiet, slots_of};

mod support;

const DIR: &str = "STENTOR_CRASH_DIR";
const TERM: &str = "STENTOR_CRASH_TERM";
const MODE: &str = "STENTOR_CRASH_MODE";
const KILLS: u64 = 50;
const INSTALL_KILLS: u64 = 25;

/// The sender's and the receiver's directory.
fn dirs(dir: &Path) -> Vec<PathBuf> {
    (0..2).map(|n| dir.join(format!("store-{n}"))).collect()
}

/// A line that the parent reads; one write, so that a kill cannot tear two lines into one.
fn say(line: String) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("@{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

/// Not a test of its own: what the killed process does.
#[test]
fn child() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let term: u64 = std::env::var(TERM).unwrap().parse().unwrap();
    let install = std::env::var(MODE).is_ok_and(|mode| mode == "install");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async move {
        if install { installs(Path::new(&dir)).await } else { writes(Path::new(&dir), term).await }
    });
}

async fn writes(dir: &Path, term: u64) {
    let store = open_quiet(dir);
    let mut tasks = Vec::new();
    for shard in 1..=SHARDS {
        let mut replica = Replica::open(&store, shard, slots_of(shard)).await;
        replica.term = term;
        tasks.push(tokio::spawn(write_shard(store.clone(), replica, term)));
    }
    say("ready".into());
    for task in tasks {
        task.await.unwrap();
    }
}

async fn write_shard(store: Arc<Store>, mut replica: Replica, term: u64) {
    let mut rng = StdRng::seed_from_u64(term * 100 + u64::from(replica.id.0));
    replica.vote(term).await;
    say(format!("vote {} {term}", replica.id));
    let last = replica.shard.log.get_log_state().await.unwrap().last_log_id.map(|id| id.index);
    if let Some(last) = last {
        replica.reapply(last).await;
    }
    let mut next = last.map_or(0, |index| index + 1);
    let mut purged = None;
    loop {
        let count = rng.random_range(1..12u64);
        let entries: Vec<_> = (next..next + count).map(|index| replica.entry(index)).collect();
        if rng.random_bool(0.2) {
            // What a deposed leader leaves: entries that go again before anybody acknowledges them.
            let wrong = (next..next + 3)
                .map(|index| openraft::Entry { log_id: log_id(term, index), payload: openraft::EntryPayload::Blank });
            let _unacknowledged = replica.append_start(wrong.collect()).await;
            replica.shard.log.truncate_after(next.checked_sub(1).map(|index| log_id(term, index))).await.unwrap();
        }
        replica.append(entries.clone()).await;
        replica.shard.log.save_committed(entries.last().map(|entry| entry.log_id)).await.unwrap();
        next += count;
        say(format!("synced {} {}", replica.id, next - 1));
        replica.apply(entries).await;
        say(format!("applied {} {}", replica.id, next - 1));
        if rng.random_bool(0.05) {
            replica.checkpoint().await;
        }
        let durable = store.position(replica.id).unwrap().durable;
        if durable > purged && rng.random_bool(0.1) {
            purged = durable;
            replica.shard.log.purge(durable.unwrap()).await.unwrap();
        }
    }
}

fn spawn(dir: &Path, term: u64, mode: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--nocapture"])
        .env(DIR, dir)
        .env(TERM, term.to_string())
        .env(MODE, mode)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Every line until the child's death.
fn lines(child: &mut Child) -> mpsc::Receiver<String> {
    let (tx, rx) = mpsc::channel();
    let out = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || {
        // A torn last line was not acknowledged to anybody.
        for line in out.split(b'\n').map_while(Result::ok) {
            if let Some(line) = line.strip_prefix(b"@") {
                let _ = tx.send(String::from_utf8(line.to_vec()).unwrap());
            }
        }
    });
    rx
}

/// Runs the child for `run_ms` after its first sign of life and kills it; what it said.
fn run_and_kill(dir: &Path, term: u64, mode: &str, run_ms: u64) -> Vec<String> {
    let mut child = spawn(dir, term, mode);
    let rx = lines(&mut child);
    let first = rx.recv_timeout(Duration::from_secs(60)).expect("the child says nothing");
    let mut said = vec![first];
    let until = Instant::now() + Duration::from_millis(run_ms);
    while let Ok(line) = rx.recv_timeout(until.saturating_duration_since(Instant::now())) {
        said.push(line);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    said.extend(rx.iter());
    said
}

#[derive(Default)]
struct Acknowledged {
    synced: BTreeMap<u32, u64>,
    vote: BTreeMap<u32, u64>,
}

impl Acknowledged {
    fn note(&mut self, said: &[String]) -> u64 {
        let mut count = 0;
        for line in said {
            let mut words = line.split(' ');
            let map = match words.next() {
                Some("synced") => &mut self.synced,
                Some("vote") => &mut self.vote,
                _ => continue,
            };
            let numbers: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
            map.insert(numbers[0] as u32, numbers[1]);
            count += 1;
        }
        count
    }
}

/// Opens what the kill left and judges it; cuts off what nobody acknowledged, as a new leader would.
async fn judge(dir: &Path, acknowledged: &Acknowledged, models: &mut [Model], kill: u64) {
    let store = open_quiet(dir);
    for model in models {
        let shard = model.shard;
        let mut replica = Replica::open(&store, shard.0, slots_of(shard.0)).await;
        let state = replica.shard.log.get_log_state().await.unwrap();
        let applied = replica.applied_index().await;
        let acked = acknowledged.synced.get(&shard.0).copied();
        let last = state.last_log_id.map(|id| id.index);
        assert!(last >= acked, "kill {kill}, shard {shard}: {acked:?} was acknowledged, the log ends at {last:?}");
        assert!(applied <= last, "kill {kill}, shard {shard}: the state {applied:?} is ahead of its log {last:?}");
        assert!(
            state.last_purged_log_id.map(|id| id.index) <= applied,
            "kill {kill}, shard {shard}: the log is purged beyond the state"
        );
        let committed = replica.shard.log.read_committed().await.unwrap();
        assert!(committed <= state.last_log_id, "kill {kill}, shard {shard}: a note runs ahead of its log");
        let vote = replica.shard.log.read_vote().await.unwrap().map_or(0, |vote| vote.leader_id.term);
        assert!(vote >= acknowledged.vote.get(&shard.0).copied().unwrap_or(0), "kill {kill}: a vote is lost");
        // All entries are there and decode; no gap.
        let first = state.last_purged_log_id.map_or(0, |id| id.index + 1);
        let entries = replica.shard.log.try_get_log_entries(..).await.unwrap();
        assert!(entries.iter().map(|entry| entry.log_id.index).eq(first..last.map_or(first, |last| last + 1)));
        let Some(upto) = acked.max(applied).max(committed.map(|id| id.index)) else { continue };
        for entry in entries.iter().filter(|entry| entry.log_id.index <= upto) {
            assert_eq!(entry.payload, support::payload_at(shard, entry.log_id.index), "kill {kill}, shard {shard}");
        }
        replica.reapply(upto).await;
        model.apply_to(upto);
        model.compare(&replica).await;
        let last = entries.iter().rev().find(|entry| entry.log_id.index <= upto).map(|entry| entry.log_id);
        replica.shard.log.truncate_after(last.or(state.last_purged_log_id)).await.unwrap();
    }
    store.close().await;
}

#[test]
fn fifty_kills_lose_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = StdRng::seed_from_u64(4);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut models: Vec<Model> = (1..=SHARDS).map(|shard| Model::new(ShardId(shard))).collect();
    let (mut acknowledged, mut count) = (Acknowledged::default(), 0);
    for kill in 1..=KILLS {
        let said = run_and_kill(dir.path(), kill, "write", rng.random_range(0..250));
        count += acknowledged.note(&said);
        runtime.block_on(judge(dir.path(), &acknowledged, &mut models, kill));
    }
    assert!(count > KILLS * u64::from(SHARDS), "the children hardly wrote: {count} acknowledgements");
}

/// Installs one snapshot after the other, each further on, from a store of its own.
async fn installs(dir: &Path) {
    let [from, to] = &dirs(dir)[..] else { return };
    let (sender, receiver) = (open_quiet(from), open_quiet(to));
    let mut leader = Replica::open(&sender, 1, support::SLOTS).await;
    let mut follower = Replica::open(&receiver, 1, support::SLOTS).await;
    let start = follower.applied_index().await.map_or(0, |index| index + 1);
    let log_end = leader.shard.log.get_log_state().await.unwrap().last_log_id.map_or(0, |id| id.index + 1);
    if log_end > 0 {
        leader.reapply(log_end - 1).await;
    }
    let mut next = log_end.max(start);
    say("ready".into());
    loop {
        leader.write(next..next + 40).await;
        next += 40;
        leader.checkpoint().await;
        let snapshot = leader.shard.machine.get_current_snapshot().await.unwrap().unwrap();
        say(format!("begin {}", next - 1));
        follower.shard.machine.install_snapshot(&snapshot.meta, snapshot.snapshot).await.unwrap();
        say(format!("installed {}", next - 1));
    }
}

#[test]
fn a_kill_at_any_step_of_an_install_leaves_the_old_state_or_the_new() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = StdRng::seed_from_u64(5);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (mut installed, mut begun, mut resumed) = (None, None, 0);
    for kill in 1..=INSTALL_KILLS {
        let said = run_and_kill(dir.path(), 1, "install", rng.random_range(0..150));
        let number =
            |word: &str| said.iter().rev().find_map(|line| line.strip_prefix(word)?.trim().parse::<u64>().ok());
        installed = number("installed").max(installed);
        begun = number("begin").max(begun);
        let to = dirs(dir.path())[1].clone();
        resumed += u64::from(to.join("install/1.manifest").exists());
        runtime.block_on(async {
            let store = open_quiet(&to);
            let mut replica = Replica::open(&store, 1, support::SLOTS).await;
            let applied = replica.applied_index().await;
            assert!(applied >= installed && applied <= begun, "kill {kill}: {applied:?} of {installed:?}..{begun:?}");
            if let Some(applied) = applied {
                let mut model = Model::new(ShardId(1));
                model.apply_to(applied);
                model.compare(&replica).await;
            }
            installed = applied;
            store.close().await;
        });
    }
    eprintln!("{resumed} of {INSTALL_KILLS} kills fell between the manifest and its end");
}
