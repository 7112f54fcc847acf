//! Directories that do not fit, replicas that fell far behind, and brokers that come and go under load. Must prove that
//! no directory is taken for another one, and that nothing is lost or doubled while brokers fail.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use stentor_broker::StartError;
use support::{Cluster, agree, bodies, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_is_never_taken_for_another_one() {
    let mut cluster = Cluster::start(3, 1).await;
    cluster.halt(2).await;
    let own = cluster.configs[2].clone();
    let mut foreign = own.clone();
    foreign.bootstrap.as_mut().unwrap().cluster_id = "another-cluster".into();
    assert!(matches!(stentor_broker::start(foreign).await, Err(StartError::OtherDirectory { .. })));
    let mut renumbered = own.clone();
    renumbered.data_dir = cluster.configs[1].data_dir.clone();
    assert!(matches!(stentor_broker::start(renumbered).await, Err(StartError::Store(_))), "in use by broker 2");
    cluster.stop().await;
}

const PURGED: &str = "stentor_broker_purged_entries";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_behind_the_log_gets_a_snapshot() {
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
    let ann = cluster.caller(0, "ann");
    let body = "x".repeat(10_000);
    let mut sent = 0;
    // Until the log that broker 3 would need is gone.
    eventually("the log is purged", || {
        sent += 1;
        let (ann, key, body) = (&ann, format!("k-{sent}"), &body);
        let cluster = &cluster;
        async move {
            ann.send("general", &key, body).await.ok()?;
            let purged = cluster.metric(0, PURGED).await.min(cluster.metric(1, PURGED).await);
            // The meta shard's log is shorter than this: the rest is the data shard's.
            (purged > 100).then_some(())
        }
    })
    .await;
    cluster.start_one(2).await;
    cluster.ready().await;
    agree(&cluster).await;
    assert!(cluster.metric(2, "stentor_broker_received_snapshots_total").await > 0, "no snapshot was needed");
    let items = cluster.caller(2, "ann").all("general", true).await.unwrap();
    assert_eq!(bodies("general", &items).len(), sent + 1);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sends_survive_brokers_that_come_and_go() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..3).map(|n| cluster.caller(n, "ann")).collect();
    let sender = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut seqs = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let key = format!("k-{}", seqs.len());
                // The same key again and again, at whichever broker answers: one seq.
                let sent = eventually("a send is acknowledged", || async {
                    let pick = rand::random_range(0..callers.len());
                    let call = callers[pick].send("general", &key, &key);
                    tokio::time::timeout(Duration::from_secs(15), call).await.ok()?.ok()
                });
                seqs.push(sent.await.seq);
            }
            seqs
        }
    });
    for round in 0..5 {
        let victim = round % 3;
        cluster.halt(victim).await;
        let before = cluster.caller((victim + 1) % 3, "ann").send("general", &format!("r-{round}"), "round").await;
        cluster.start_one(victim).await;
        cluster.ready().await;
        // Whatever came of it then, the same key has one seq now.
        let after = cluster.caller(victim, "ann").send("general", &format!("r-{round}"), "round").await.unwrap();
        if let Ok(before) = before {
            assert_eq!(before.seq, after.seq);
        }
    }
    stop.store(true, Ordering::Relaxed);
    let seqs = sender.await.unwrap();
    assert!(seqs.len() > 20, "{}", seqs.len());
    let items = cluster.caller(0, "ann").all("general", true).await.unwrap();
    let seen = bodies("general", &items);
    assert_eq!(seen.iter().map(|(seq, _)| *seq).collect::<Vec<_>>(), (1..=seen.len() as u64).collect::<Vec<_>>());
    for (n, seq) in seqs.iter().enumerate() {
        assert_eq!(seen[*seq as usize - 1].1, format!("k-{n}"));
    }
    let mut keys: Vec<_> = seen.iter().filter(|(_, body)| body.starts_with("k-")).map(|(_, body)| body).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), seqs.len(), "each key once");
    agree(&cluster).await;
    cluster.stop().await;
}
