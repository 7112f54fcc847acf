//! Lost directories: an empty one takes the place of a lost one in every shard, votes there, and nothing is lost. Must
//! prove that what comes back is never taken for what was lost.

#![allow(clippy::unwrap_used, clippy::panic)]

mod replaced;
#[path = "../support/mod.rs"]
mod support;

use std::{path::Path, time::Duration};

use stentor_broker::{Broker, BrokerConfig, ReadyError, status};
use support::{Cluster, agree, bodies, eventually};

/// Every shard has its three voters, none of them a lost one.
async fn settled(cluster: &Cluster, asked: usize) {
    eventually("every shard has three living voters", || async {
        let status = cluster.status(asked).await.ok()?;
        let names = |n: usize| cluster.configs[n].name.clone();
        let all: Vec<_> = (0..3).map(names).collect();
        let fine = |s: &stentor_proto::v1::ShardStatus| {
            let mut voters = s.voters.clone();
            voters.sort_unstable();
            s.quorum && s.settled && voters == all && s.learners.is_empty()
        };
        (!status.shards.is_empty() && status.shards.iter().all(fine)).then_some(())
    })
    .await;
}

/// Sends until `count` sends have been acknowledged in all; returns how many there are now.
async fn send(cluster: &Cluster, through: usize, from: usize, count: usize, body: &str) -> usize {
    let ann = cluster.caller(through, "ann");
    for n in from..from + count {
        let (key, body) = (format!("k-{n}"), format!("{n} {body}"));
        let sent = eventually("a send is acknowledged", || async {
            let call = ann.send("general", &key, &body);
            tokio::time::timeout(Duration::from_secs(15), call).await.ok()?.ok()
        });
        sent.await;
    }
    from + count
}

/// All sends are there, each once, in order, for whoever reads through this broker.
async fn all_there(cluster: &Cluster, through: usize, sent: usize) {
    let items = eventually("the conversation can be read", || async {
        cluster.caller(through, "ann").all("general", true).await.ok()
    });
    let seen = bodies("general", &items.await);
    let numbers: Vec<usize> = seen.iter().filter_map(|(_, body)| body.split(' ').next()?.parse().ok()).collect();
    assert_eq!(numbers, (0..sent).collect::<Vec<_>>());
}

fn wipe(config: &BrokerConfig) {
    std::fs::remove_dir_all(&config.data_dir).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_broker_comes_back_empty_and_votes() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let mut sent = send(&cluster, 0, 0, 20, "x").await;
    // One after the other, so that in the end no replica is a founding one.
    for wiped in [2, 0, 1] {
        cluster.halt(wiped).await;
        wipe(&cluster.configs[wiped]);
        let other = (wiped + 1) % 3;
        sent = send(&cluster, other, sent, 10, "while one is lost").await;
        // The configuration of a broker that joins need not say how the cluster was made.
        cluster.configs[wiped].bootstrap = cluster.configs[wiped].bootstrap.take().filter(|_| wiped != 0);
        cluster.start_one(wiped).await;
        cluster.ready().await;
        settled(&cluster, other).await;
        agree(&cluster).await;
        // The others without one of the old voters: only with the new one's vote is there a quorum.
        let dies = (wiped + 2) % 3;
        cluster.halt(dies).await;
        sent = send(&cluster, wiped, sent, 10, "with the new voter").await;
        all_there(&cluster, wiped, sent).await;
        cluster.start_one(dies).await;
        cluster.ready().await;
    }
    settled(&cluster, 0).await;
    agree(&cluster).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_joiner_without_the_log_gets_a_snapshot() {
    let mut cluster = Cluster::configure(3, 1);
    for config in &mut cluster.configs {
        config.store.checkpoint_interval_ms = 200;
        config.store.keep_log_bytes = 1;
    }
    for n in 0..3 {
        cluster.start_one(n).await;
    }
    cluster.ready().await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    cluster.halt(2).await;
    wipe(&cluster.configs[2]);
    let body = "x".repeat(10_000);
    let mut sent = 0;
    while cluster.metric(0, PURGED).await.min(cluster.metric(1, PURGED).await) <= 100 {
        sent = send(&cluster, 0, sent, 10, &body).await;
    }
    cluster.start_one(2).await;
    cluster.ready().await;
    settled(&cluster, 0).await;
    assert!(cluster.metric(2, "stentor_broker_received_snapshots_total").await > 0, "no snapshot was needed");
    agree(&cluster).await;
    cluster.halt(0).await;
    sent = send(&cluster, 2, sent, 1, "after").await;
    all_there(&cluster, 2, sent).await;
    cluster.stop().await;
}

const PURGED: &str = "stentor_broker_purged_entries";

async fn waits(cluster: &Cluster, n: usize) -> String {
    match cluster.brokers[n].as_ref().unwrap().ready(Duration::from_secs(3)).await {
        Err(ReadyError::Deadline(what)) => what,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_two_of_three_lost_nothing_goes_on_until_one_is_back() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let sent = send(&cluster, 0, 0, 20, "x").await;
    let aside = cluster.path().join("aside");
    cluster.halt(1).await;
    cluster.halt(2).await;
    std::fs::rename(&cluster.configs[1].data_dir, &aside).unwrap();
    wipe(&cluster.configs[2]);
    cluster.start_one(1).await;
    cluster.start_one(2).await;
    for empty in [1, 2] {
        let what = waits(&cluster, empty).await;
        assert!(what.contains("incarnation") || what.contains("too few"), "{what}");
    }
    let status = cluster.status(0).await.unwrap();
    assert!(status.shards.iter().all(|s| !s.quorum), "{status:?}");
    let refused = cluster.caller(0, "ann").send("general", "lost", "lost").await.unwrap_err();
    assert_eq!(status::to_refusal(&refused).unwrap().reason, "UNAVAILABLE");
    // The directory is found again: a quorum of those that have everything, and the third one can join.
    cluster.halt(1).await;
    wipe(&cluster.configs[1]);
    std::fs::rename(&aside, &cluster.configs[1].data_dir).unwrap();
    cluster.start_one(1).await;
    cluster.ready().await;
    settled(&cluster, 0).await;
    all_there(&cluster, 2, sent).await;
    cluster.stop().await;
}

async fn fails(broker: &Broker) -> String {
    tokio::time::timeout(support::DEADLINE, broker.failed()).await.expect("it goes on")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_was_replaced_takes_no_part() {
    let mut cluster = Cluster::start(3, 1).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let mut sent = send(&cluster, 0, 0, 5, "x").await;
    cluster.halt(2).await;
    let (place, aside) = (cluster.configs[2].data_dir.clone(), cluster.path().join("aside"));
    std::fs::rename(&place, &aside).unwrap();
    cluster.start_one(2).await;
    cluster.ready().await;
    settled(&cluster, 0).await;
    cluster.halt(2).await;
    swap(&place, &aside);
    cluster.start_one(2).await;
    let why = fails(cluster.brokers[2].as_ref().unwrap()).await;
    assert!(why.starts_with("REPLACED: this directory is incarnation 1 of broker 3, and incarnation 2"), "{why}");
    cluster.halt(2).await;
    sent = send(&cluster, 0, sent, 5, "without it").await;
    swap(&place, &aside);
    cluster.start_one(2).await;
    cluster.ready().await;
    settled(&cluster, 0).await;
    agree(&cluster).await;
    all_there(&cluster, 2, sent).await;
    cluster.stop().await;
}

fn swap(a: &Path, b: &Path) {
    let third = a.with_extension("third");
    std::fs::rename(a, &third).unwrap();
    std::fs::rename(b, a).unwrap();
    std::fs::rename(third, b).unwrap();
}

/// The third broker's configuration with another directory, on a machine that nobody reaches.
fn elsewhere(cluster: &Cluster, dir: &str) -> BrokerConfig {
    let anywhere = "127.0.0.1:0".parse().unwrap();
    BrokerConfig {
        data_dir: cluster.path().join(dir),
        peer_listen: anywhere,
        api_listen: anywhere,
        ..cluster.configs[2].clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_takes_the_place_of_a_broker_that_lives() {
    let mut cluster = Cluster::start(3, 1).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let sent = send(&cluster, 0, 0, 5, "x").await;
    let twin = stentor_broker::start(elsewhere(&cluster, "twin")).await.unwrap();
    let why = fails(&twin).await;
    assert!(why.starts_with("BROKER_IN_USE"), "{why}");
    twin.halt().await;
    // A configuration that names a cluster of its own does not join this one.
    cluster.halt(2).await;
    let mut foreign = BrokerConfig { data_dir: cluster.path().join("foreign"), ..cluster.configs[2].clone() };
    foreign.bootstrap.as_mut().unwrap().cluster_id = "another-cluster".into();
    let foreign = stentor_broker::start(foreign).await.unwrap();
    let why = fails(&foreign).await;
    assert!(why.starts_with("WRONG_CLUSTER"), "{why}");
    foreign.halt().await;
    cluster.start_one(2).await;
    cluster.ready().await;
    settled(&cluster, 0).await;
    all_there(&cluster, 2, sent).await;
    cluster.stop().await;
}
