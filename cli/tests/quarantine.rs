//! One flipped bit in each kind of file of a broker: found at its start, by a read or by `verify`, never served; then
//! its directory is deleted, it joins empty, and everything is well. Must never pass because nothing was damaged.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod support;

use std::{fs, path::PathBuf};

use support::brokers::{Brokers, eventually};

const SHARDS: u32 = 2;
/// With the meta shard.
const ALL_SHARDS: u64 = SHARDS as u64 + 1;
const LINES: usize = 1_500;
const BROKERS: [&str; 3] = ["broker-1", "broker-2", "broker-3"];

fn body(n: usize) -> String {
    format!("{n} {}", format!("{:x}", n * 7_919).repeat(40))
}

/// The largest file of an instance whose name ends (or begins) so.
fn largest(cluster: &Brokers, broker: &str, instance: &str, fits: impl Fn(&str) -> bool) -> PathBuf {
    let files = fs::read_dir(cluster.data_dir(broker).join(instance)).unwrap().map(|file| file.unwrap().path());
    let fitting = files.filter(|path| fits(&path.file_name().unwrap().to_string_lossy()));
    let largest = fitting.max_by_key(|path| fs::metadata(path).map_or(0, |m| m.len()));
    largest.unwrap_or_else(|| panic!("{broker} has no such file in {instance}"))
}

/// Flips one bit in the middle.
fn flip(path: &PathBuf) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let at = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Everything, as it was sent, from whoever answers.
fn served_right(cluster: &Brokers, group: &str) {
    let messages = cluster.messages(group);
    assert!(messages.iter().map(|(_, body)| body.as_str()).eq((0..LINES).map(body).collect::<Vec<_>>()));
}

fn complaints(cluster: &Brokers, broker: &str) -> usize {
    cluster.log(broker).matches("DAMAGED").count()
}

/// The broker runs on damaged bytes: `verify` names it, unless it met them by itself before; and the broker goes.
fn found_by_verify(cluster: &Brokers, broker: &str, complained: usize) {
    let report = cluster.run(&["admin", "verify", "--json"], b"");
    assert_eq!(report.code, 1, "{}", report.stdout);
    let report = report.rows().remove(0);
    let problems = report["problems"].as_array().unwrap();
    let named = |p: &serde_json::Value| p["kind"] == "damaged" && p["node"] == broker && p["shard"].is_u64();
    assert!(problems.iter().any(named) || complaints(cluster, broker) > complained, "{report}");
    eventually("the broker stops", || (cluster.state(broker) == "failed").then_some(()));
    assert!(complaints(cluster, broker) > complained);
}

fn heal(cluster: &Brokers, broker: &str, group: &str) {
    // As often as it is started: the damage is there to stay.
    let again = cluster.run(&["cluster", "start", broker], b"");
    assert!(again.code != 0 && again.stderr.contains("DAMAGED"), "{}", again.stderr);
    assert!(again.stderr.contains("put the directory aside"), "{}", again.stderr);
    cluster.wipe(broker);
    cluster.node("start", broker);
    cluster.verified(ALL_SHARDS);
    served_right(cluster, group);
}

#[test]
fn one_flipped_bit_anywhere_costs_a_directory_and_nothing_else() {
    let cluster = Brokers::start(SHARDS);
    for broker in BROKERS {
        cluster.node("stop", broker);
        cluster.configure(broker, "checkpoint_interval_ms", 300);
    }
    cluster.run(&["cluster", "up"], b"").well();
    let group = cluster.group(&["bob"]);
    let lines: String = (0..LINES).map(|n| body(n) + "\n").collect();
    cluster.run(&["send", &group, "--stdin"], lines.as_bytes()).well();
    let is_table = |name: &str| name.ends_with(".sst");
    let is_manifest = |name: &str| name.starts_with("MANIFEST-");
    let is_wal = |name: &str| name.ends_with(".log");
    type Fits<'a> = &'a dyn Fn(&str) -> bool;
    let kinds: [(&str, Fits<'_>); 5] =
        [("log", &is_wal), ("log", &is_table), ("state", &is_table), ("log", &is_manifest), ("state", &is_manifest)];
    for ((instance, fits), broker) in kinds.into_iter().zip(BROKERS.into_iter().cycle()) {
        // A start moves what the log's WAL has into tables.
        cluster.node("stop", broker);
        if !fits("1.log") {
            cluster.node("start", broker);
            cluster.node("stop", broker);
        }
        let complained = complaints(&cluster, broker);
        flip(&largest(&cluster, broker, instance, fits));
        if cluster.run(&["cluster", "start", broker], b"").code == 0 {
            found_by_verify(&cluster, broker, complained);
        }
        served_right(&cluster, &group);
        heal(&cluster, broker, &group);
    }
    // And under a running one, which has read little of it so far.
    cluster.node("stop", "broker-3");
    cluster.node("start", "broker-3");
    let complained = complaints(&cluster, "broker-3");
    flip(&largest(&cluster, "broker-3", "state", is_table));
    served_right(&cluster, &group);
    found_by_verify(&cluster, "broker-3", complained);
    heal(&cluster, "broker-3", &group);
}
