//! How long the store takes for the last events of a random conversation among many. Measures and prints; asserts only
//! that what it read is right. Run it alone, from a release build (docs/performance.md).

#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)]

use std::time::{Duration, Instant};

use openraft::EntryPayload;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use stentor_engine::{apply, command, key::Entity};
use stentor_proto::{
    bundle::Builder,
    ids::{ConversationId, DeviceId, Seq, ShardId, StampMs, UserId},
    internal::{Create, Send},
    v1::{ConversationKind, EventKind},
};
use stentor_raft_store::{
    StoreConfig, open,
    types::{BundleBytes, RaftLogEntry},
    wire::log_id,
};
use support::{Quiet, Replica, SLOTS, app};

mod support;

/// What one read asks for.
const LAST: usize = 50;
/// Messages that come together in a conversation.
const BURST: u64 = 5;
const BODY_BYTES: usize = 120;
/// Commands in an entry, as the batcher fills them.
const COMMANDS: usize = 100;
/// Entries that are on their way together.
const ROUND: usize = 64;
/// Bytes of commands between two checkpoints.
const CHECKPOINT_BYTES: usize = 16 << 20;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

fn talk(n: usize) -> ConversationId {
    ConversationId::new(format!("talk-{n:06}")).unwrap()
}

fn commands(conversations: usize) -> impl Iterator<Item = Vec<u8>> {
    let (ann, device) = (UserId::new("ann").unwrap(), DeviceId::new("phone").unwrap());
    let actor = command::actor(&ann, Some(&device), false);
    let by = actor.clone();
    let create = move |n| {
        let create = Create { actor: Some(by.clone()), kind: ConversationKind::Group as i32, ..Default::default() };
        command::encode(&command::create(&app(), &talk(n), create)).to_vec()
    };
    let mut rng = StdRng::seed_from_u64(1);
    let sends = (0..LAST as u64 / BURST).flat_map(move |burst| {
        let mut order: Vec<usize> = (0..conversations).collect();
        order.shuffle(&mut rng);
        let actor = actor.clone();
        order.into_iter().flat_map(move |n| {
            let actor = actor.clone();
            (0..BURST).map(move |m| {
                let send_no = burst * BURST + m + 1;
                let send = Send {
                    actor: Some(actor.clone()),
                    send_no,
                    done_no: send_no - 1,
                    kind: EventKind::Message as i32,
                    content_type: "text/plain".into(),
                    body: format!("{send_no:<BODY_BYTES$}").into(),
                    ..Default::default()
                };
                command::encode(&command::send(&app(), &talk(n), send)).to_vec()
            })
        })
    });
    (0..conversations).map(create).chain(sends)
}

async fn fill(replica: &mut Replica, conversations: usize) {
    let (mut index, mut bytes, mut round) = (0, 0, Vec::new());
    let mut commands = commands(conversations).peekable();
    while commands.peek().is_some() {
        let mut bundle = Builder::new();
        for command in commands.by_ref().take(COMMANDS) {
            bytes += command.len();
            bundle.push(&command);
        }
        let payload = EntryPayload::Normal(BundleBytes::new(bundle.finish(apply::LEVEL, StampMs(1_000 + index))));
        round.push(RaftLogEntry { log_id: log_id(1, index), payload });
        index += 1;
        let last = commands.peek().is_none();
        if round.len() == ROUND || last {
            let entries = std::mem::take(&mut round);
            replica.append(entries.clone()).await;
            replica.apply(entries).await;
        }
        if bytes >= CHECKPOINT_BYTES || last {
            bytes = 0;
            replica.checkpoint().await;
        }
    }
}

/// What this process has used so far.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // USER_HZ is 100 on every Linux that we know.
    Duration::from_millis(10 * (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()))
}

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    format!("p50 {:?}, p99 {:?}, p99.9 {:?}, max {:?}", at(0.5), at(0.99), at(0.999), at(1.0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement of minutes"]
async fn the_last_events_of_a_random_conversation() {
    let conversations = setting("STENTOR_FIGURE_CONVERSATIONS", 100_000);
    let reads = setting("STENTOR_FIGURE_READS", 10_000);
    // A directory that is named is filled once, and read by every later run.
    let named = std::env::var_os("STENTOR_FIGURE_DIR").map(std::path::PathBuf::from);
    let own = tempfile::tempdir().unwrap();
    let dir = named.unwrap_or_else(|| own.path().join("store"));
    let filled = dir.exists();
    let store = open(StoreConfig::new(&dir), std::sync::Arc::new(Quiet)).unwrap();
    let mut replica = Replica { id: ShardId(1), shard: store.shard(ShardId(1), SLOTS).await.unwrap(), term: 1 };
    if !filled {
        let began = Instant::now();
        fill(&mut replica, conversations).await;
        println!("{conversations} conversations of {LAST} events in {:.1?}", began.elapsed());
    }
    let mut rng = StdRng::seed_from_u64(7);
    for round in ["first touch", "warm"] {
        let (mut times, before) = (Vec::new(), cpu());
        for _ in 0..reads {
            let conversation = Entity::conversation("app", talk(rng.random_range(0..conversations)).as_str());
            let began = Instant::now();
            let page = replica.shard.reader.events_before(&conversation, Seq(u64::MAX), LAST, 1 << 20).await.unwrap();
            times.push(began.elapsed());
            assert_eq!(page.len(), LAST);
        }
        let used = (cpu() - before) / reads as u32;
        println!("{round}: {reads} reads of {LAST}, one at a time: {}; {used:?} of CPU each", percentiles(times));
    }
    store.close().await;
}
