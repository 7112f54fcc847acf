//! A checker that has never been seen to fail proves nothing: bugs are planted into the code that is shipped, one at a
//! time, and each must be found by the invariant that it breaks, under faults under which the sound code keeps every
//! promise. Only with the feature `planted`.

#![cfg(feature = "planted")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use stentor_chaos::{
    sim::{Fault, Plan, Schedule, Step, run},
    workload,
};
use stentor_engine::planted::{Bug, plant};
use stentor_transport::memory::Death;

/// Seeds that are tried: where a fault strikes is chance.
const SEEDS: std::ops::Range<u64> = 0..12;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn at(seconds: u64, fault: Fault) -> Step {
    Step { at: s(seconds), fault }
}

fn crash(brokers: &[usize], death: Death, down: Duration) -> Fault {
    Fault::Crash { brokers: brokers.to_vec(), death, down }
}

/// Many sends and few pauses, so that there is always something under way.
fn busy(schedule: Vec<Step>) -> Plan {
    let pause = Duration::from_millis(150);
    let workload = workload::Plan { operations: 150, pause, ..workload::Plan::small(0) };
    Plan { schedule: Some(Schedule(schedule)), workload, shards: 2, ..Plan::default() }
}

/// With the bug, some seed breaks this invariant; without it, that seed keeps all.
fn found(bug: Bug, invariant: &str, plan: &Plan) {
    let mut seen = Vec::new();
    for seed in SEEDS {
        plant(Some(bug));
        let report = run(seed, plan);
        plant(None);
        let hit = report.broken().contains(&invariant);
        seen.push(format!("seed {seed}: {:?}", report.broken()));
        if hit {
            let sound = run(seed, plan);
            assert!(sound.violations.is_empty(), "without the bug:\n{sound}");
            println!("{bug:?}: {}", seen.join(", "));
            return;
        }
    }
    panic!("{bug:?} was never found by {invariant}: {}", seen.join(", "));
}

#[test]
fn an_acknowledgement_before_the_fsync_is_found_as_a_loss() {
    let cut = || crash(&[0, 1, 2], Death::Power, Duration::from_millis(500));
    found(Bug::AcknowledgeBeforeFsync, "I1", &busy(vec![at(4, cut()), at(8, cut())]));
}

#[test]
fn a_send_that_is_not_deduplicated_is_found_twice() {
    let kill = |broker| crash(&[broker], Death::Process, s(1));
    found(Bug::NoDeduplication, "I3", &busy(vec![at(3, kill(0)), at(5, kill(1)), at(7, kill(2)), at(9, kill(0))]));
}
