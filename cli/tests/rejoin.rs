//! Real processes that lose their directories under traffic: an empty one takes the lost one's place, and nothing is
//! lost. Must prove with the death of another broker that the new replicas vote.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use support::brokers::{Brokers, eventually};

const SHARDS: u32 = 4;
/// With the meta shard.
const ALL_SHARDS: u64 = SHARDS as u64 + 1;
const PURGED: &str = "stentor_broker_purged_entries";

/// Sends lines to a conversation, a few at a time, until it is told to stop; every line is acknowledged.
struct Traffic {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<u64>,
}

impl Traffic {
    fn start(cluster: &Brokers, conversation: &str, first: u64, padding: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (run, conversation, told) = (cluster.runner(), conversation.to_owned(), stop.clone());
        let sender = std::thread::spawn(move || {
            let mut next = first;
            while !told.load(Ordering::Relaxed) {
                let lines: String = (next..next + 50).map(|n| format!("{n} {}\n", "x".repeat(padding))).collect();
                let send = ["send", &conversation, "--stdin", "--json", "--timeout", "240"];
                let acks = run(&send, lines.as_bytes()).well().rows();
                assert!(acks.iter().all(|ack| ack["seq"].is_u64()), "{acks:?}");
                next += 50;
            }
            next
        });
        Self { stop, sender }
    }

    /// How many lines have been acknowledged in all.
    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.sender.join().unwrap()
    }
}

/// Every line is there, each once, in the order in which they were sent, dense.
fn all_there(cluster: &Brokers, conversation: &str, sent: u64) {
    let messages = cluster.messages(conversation);
    let numbers: Vec<u64> = messages.iter().map(|(_, body)| body.split(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers, (0..sent).collect::<Vec<_>>());
    let first = messages[0].0;
    assert!(messages.iter().map(|(seq, _)| *seq).eq(first..first + sent), "the seqs are dense");
}

#[test]
fn lost_directories_are_replaced_under_traffic() {
    let cluster = Brokers::start(SHARDS);
    let group = cluster.group(&["bob"]);
    let quiet = cluster.group(&[]);
    cluster.run(&["send", &quiet, "--stdin"], b"0 one\n1 two\n").well();
    let mut sent = 0;
    for (lost, dies) in [("broker-3", "broker-1"), ("broker-1", "broker-2")] {
        let traffic = Traffic::start(&cluster, &group, sent, 10);
        cluster.node("stop", lost);
        cluster.wipe(lost);
        cluster.node("start", lost);
        sent = traffic.stop();
        cluster.verified(ALL_SHARDS);
        // Of the founding voters only one is left: without the new one's vote there would be no quorum.
        cluster.node("kill", dies);
        cluster.has_a_quorum_everywhere();
        let traffic = Traffic::start(&cluster, &group, sent, 10);
        let before = sent;
        eventually("lines are acknowledged", || (cluster.messages(&group).len() as u64 > before).then_some(()));
        sent = traffic.stop();
        all_there(&cluster, &group, sent);
        all_there(&cluster, &quiet, 2);
        cluster.node("start", dies);
        cluster.verified(ALL_SHARDS);
    }
    all_there(&cluster, &group, sent);
}

/// The log is purged almost at once, so that whoever is away for a moment needs a snapshot.
fn with_a_short_log() -> Brokers {
    let cluster = Brokers::start(SHARDS);
    for broker in ["broker-1", "broker-2", "broker-3"] {
        cluster.node("stop", broker);
        cluster.configure(broker, "keep_log_bytes", 1);
        cluster.configure(broker, "checkpoint_interval_ms", 300);
    }
    cluster.run(&["cluster", "up"], b"").well();
    cluster
}

#[test]
fn joiners_and_leaders_that_are_killed_half_way_leave_nothing_half_done() {
    let cluster = with_a_short_log();
    let group = cluster.group(&["bob"]);
    cluster.node("stop", "broker-3");
    cluster.wipe("broker-3");
    let traffic = Traffic::start(&cluster, &group, 0, 2_000);
    eventually("the log that broker-3 would need is purged", || {
        let purged = cluster.metric("broker-1", PURGED).min(cluster.metric("broker-2", PURGED));
        (purged > 100).then_some(())
    });
    for round in 0..6 {
        let joining = {
            let run = cluster.runner();
            std::thread::spawn(move || run(&["cluster", "start", "broker-3"], b""))
        };
        let identity = cluster.data_dir("broker-3").join("identity");
        let known = || std::fs::metadata(&identity).is_ok_and(|m| m.len() > 30);
        eventually("the joiner knows who it is", || known().then_some(()));
        // No waiting for anything: each round dies a little later, in the meta shard, in a snapshot, between shards.
        std::thread::sleep(std::time::Duration::from_millis(60 * round));
        cluster.node("kill", "broker-3");
        let _ = joining.join().unwrap();
        if round % 2 == 1 {
            let leader = if round % 4 == 1 { "broker-1" } else { "broker-2" };
            let run = cluster.runner();
            let joining = std::thread::spawn(move || run(&["cluster", "start", "broker-3"], b""));
            cluster.node("kill", leader);
            cluster.node("start", leader);
            let _ = joining.join().unwrap();
            cluster.node("kill", "broker-3");
        }
        if round == 2 {
            // Lost again before it was whole.
            cluster.wipe("broker-3");
        }
    }
    // Once more, and left alone this time: the log is gone, so that only snapshots help.
    cluster.wipe("broker-3");
    cluster.node("start", "broker-3");
    let sent = traffic.stop();
    cluster.verified(ALL_SHARDS);
    assert!(cluster.metric("broker-3", "stentor_broker_received_snapshots_total") > 0, "no snapshot was needed");
    cluster.node("kill", "broker-1");
    cluster.has_a_quorum_everywhere();
    all_there(&cluster, &group, sent);
    cluster.node("start", "broker-1");
    cluster.verified(ALL_SHARDS);
}
