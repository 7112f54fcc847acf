//! How long `history` takes on a warm cluster with many conversations. Measures and prints; asserts only that what it
//! read is right. Run it alone, from a release build (docs/performance.md).

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on has failed")]

mod support;

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use stentor_client::{Client, ConversationId, Create, History, Item, Message, UserId};
use support::processes::{Memory, Processes, cpu};

/// Who writes: a user may have 100,000 conversations, a session's writer follows far fewer.
const WRITERS: usize = 20;
/// Creations under way for one writer: as many as a connection carries.
const CREATIONS: usize = 8;
/// Messages that come together in a conversation, as in a real one: they share a block at most.
const BURST: usize = 5;
/// What one read asks for.
const LAST: usize = 50;
const BODY_BYTES: usize = 120;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

fn talk(n: usize) -> ConversationId {
    ConversationId::new(format!("talk-{n:06}")).unwrap()
}

/// One writer's conversations: created with the reader, then filled in bursts whose order is random.
async fn fill(writer: Client, own: Vec<usize>, seed: u64) {
    let reader = UserId::new("reader").unwrap();
    for some in own.chunks(CREATIONS) {
        let create = |&n: &usize| writer.create_conversation(Create::group([reader.clone()]).id(talk(n)));
        try_join_all(some.iter().map(create)).await.unwrap();
    }
    let mut random = StdRng::seed_from_u64(seed);
    let mut order = own;
    for burst in 0..LAST / BURST {
        order.shuffle(&mut random);
        for &n in &order {
            for m in 0..BURST {
                let body = format!("{:<BODY_BYTES$}", burst * BURST + m);
                writer.send_pipelined(&talk(n), Message::text(body)).await.unwrap();
            }
        }
        writer.flush().await;
    }
    writer.close().await;
}

/// Waits until every broker has written all its rows: the next checkpoint of an idle shard has nothing to do.
async fn checkpointed(cluster: &Processes) {
    for broker in ["broker-1", "broker-2", "broker-3"] {
        cluster.until(broker, "stentor_store_undurable_log_bytes", |bytes| bytes < 1e6).await;
    }
}

async fn read(reader: &Client, n: usize) -> Duration {
    let began = Instant::now();
    let page = reader.history(&talk(n), History::last(LAST as u32)).await.unwrap();
    let took = began.elapsed();
    let seqs: Vec<u64> =
        page.items.iter().filter_map(|item| if let Item::Event(e) = item { Some(e.seq.0) } else { None }).collect();
    let last = page.head.0;
    assert_eq!(seqs, (last + 1 - LAST as u64..=last).collect::<Vec<_>>(), "talk-{n:06}");
    took
}

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    let (p50, p99, p999, max) = (at(0.5), at(0.99), at(0.999), at(1.0));
    format!("p50 {p50:?}, p99 {p99:?}, p99.9 {p999:?}, max {max:?}")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement of minutes"]
async fn the_last_events_of_a_random_conversation() {
    let conversations = setting("STENTOR_FIGURE_CONVERSATIONS", 100_000);
    let reads = setting("STENTOR_FIGURE_READS", 10_000);
    let cluster = Processes::up(1, 16);
    let began = Instant::now();
    let mut writers = Vec::new();
    for w in 0..WRITERS {
        let writer = cluster.client(&format!("writer-{w}"), "phone").window(512).connect().await.unwrap();
        let own = (0..conversations).filter(|n| n % WRITERS == w).collect();
        writers.push(tokio::spawn(fill(writer, own, w as u64)));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let filled = began.elapsed();
    let sent = conversations * LAST;
    println!(
        "{conversations} conversations, {sent} messages in {filled:.1?}: {:.0}/s",
        sent as f64 / filled.as_secs_f64()
    );
    checkpointed(&cluster).await;

    // A tenth of the conversations goes on, so that their reads are of blocks and of what is not in one yet.
    let mut random = StdRng::seed_from_u64(7);
    let writer = cluster.client("writer-0", "phone").connect().await.unwrap();
    for _ in 0..conversations / 10 {
        let n = random.random_range(0..conversations / WRITERS) * WRITERS;
        writer.send_pipelined(&talk(n), Message::text("one more")).await.unwrap();
    }
    writer.flush().await;
    writer.close().await;

    let reader = cluster.client("reader", "phone").connect().await.unwrap();
    let busy = || ["broker-1", "broker-2", "broker-3", "gateway-1"].map(|node| cpu(cluster.pid(node)));
    for round in ["first touch", "warm"] {
        let (began, before) = (Instant::now(), busy());
        let mut times = Vec::new();
        for _ in 0..reads {
            times.push(read(&reader, random.random_range(0..conversations)).await);
        }
        let took = began.elapsed();
        let used: Duration = busy().iter().zip(before).map(|(after, before)| *after - before).sum();
        println!(
            "{round}: {reads} reads of {LAST} over one session, one at a time: {}; {:.0} reads/s, {:?} of CPU each",
            percentiles(times),
            reads as f64 / took.as_secs_f64(),
            used / reads as u32,
        );
    }
    for node in ["broker-1", "broker-2", "broker-3", "gateway-1"] {
        let memory = Memory::of(cluster.pid(node));
        println!("{node}: {} MiB resident, {} MiB of it anonymous", memory.resident >> 20, memory.anonymous >> 20);
    }
}
