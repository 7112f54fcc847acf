//! A checker that has never been seen to fail proves nothing: bugs are planted into the code that is shipped, one at a
//! time, and each must be found by the invariant that it breaks, under faults under which the sound code keeps every
//! promise. Only with the feature `planted`.

#![cfg(feature = "planted")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use stentor_broker::StoreTuning;
use stentor_chaos::{
    sim::{Fault, Plan, Report, Schedule, Side, Step, run},
    workload,
};
use stentor_engine::planted::{Bug, plant};
use stentor_raft_store::DiskFaults;
use stentor_transport::memory::Death;

/// Seeds that are tried, as far as the first that finds it: where a fault strikes is chance.
const SEEDS: std::ops::Range<u64> = 0..100;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn at(seconds: u64, fault: Fault) -> Step {
    Step { at: s(seconds), fault }
}

fn crash(brokers: &[usize], death: Death, down: Duration) -> Fault {
    Fault::Crash { brokers: brokers.to_vec(), death, down }
}

/// Nothing gets from one broker to the other, either way.
fn apart(one: usize, other: usize, from: Duration, upto: Duration) -> [Step; 2] {
    let lasts = upto - from;
    [(one, other), (other, one)]
        .map(|(from_broker, to)| Step { at: from, fault: Fault::OneWay { from: from_broker, to, lasts } })
}

/// Many sends and few pauses, so that there is always something under way.
fn busy(schedule: Vec<Step>) -> Plan {
    let pause = ms(150);
    let workload = workload::Plan { operations: 150, pause, ..workload::Plan::small(0) };
    Plan { schedule: Some(Schedule(schedule)), workload, shards: 2, ..Plan::default() }
}

/// A run with the bug.
fn planted(bug: Bug, seed: u64, plan: &Plan) -> Report {
    plant(Some(bug));
    let report = run(seed, plan);
    plant(None);
    report
}

/// With the bug, some seed breaks this invariant; without it, that seed keeps all.
fn found(what: &str, invariant: &str, plan: &Plan, with_bug: impl Fn(u64) -> Report) {
    let mut seen = Vec::new();
    for seed in SEEDS {
        let report = with_bug(seed);
        seen.push(format!("seed {seed}: {:?}", report.broken()));
        if report.broken().contains(&invariant) {
            let sound = run(seed, plan);
            assert!(sound.violations.is_empty(), "without the bug:\n{sound}");
            println!("{what}: {}\n{report}", seen.join(", "));
            return;
        }
    }
    panic!("{what} was never found by {invariant}: {}", seen.join(", "));
}

fn found_bug(bug: Bug, invariant: &str, plan: &Plan) {
    found(&format!("{bug:?}"), invariant, plan, |seed| planted(bug, seed, plan));
}

#[test]
fn an_acknowledgement_before_the_fsync_is_found_as_a_loss() {
    let cut = || crash(&[0, 1, 2], Death::Power, ms(500));
    found_bug(Bug::AcknowledgeBeforeFsync, "I1", &busy(vec![at(4, cut()), at(8, cut())]));
}

#[test]
fn a_send_that_is_not_deduplicated_is_found_twice() {
    let kill = |broker| crash(&[broker], Death::Process, s(1));
    found_bug(Bug::NoDeduplication, "I3", &busy(vec![at(3, kill(0)), at(5, kill(1)), at(7, kill(2)), at(9, kill(0))]));
}

/// A leader that is cut off with one gateway still believes that it leads, and devices of that gateway ask it; the other
/// side goes on without it. Long pauses: a device that waits for one read does not begin another.
#[test]
fn a_read_without_a_quorum_is_found_to_be_stale() {
    let cut = |broker, gateway| {
        let side = Side { brokers: vec![broker], gateways: vec![gateway] };
        Fault::Partition { side, lasts: s(7) }
    };
    let plan = busy(vec![at(3, cut(0, 0)), at(12, cut(1, 1))]);
    let workload = workload::Plan { users: 6, operations: 60, pause: ms(600), ..plan.workload.clone() };
    found_bug(Bug::StaleRead, "I9", &Plan { workload, ..plan });
}

/// Brokers with slow disks and little room for what is not durable refuse sends for a moment and then take them again.
/// Behind a refused send others of its device are on their way, and a slow network has those arrive when there is room.
/// Nothing but sends, or devices would wait for the answers of reads; many of them, each on its own: what a device has
/// ready at once goes as one run, and cannot overtake itself.
#[test]
fn a_send_that_overtakes_another_is_found_out_of_order() {
    let network = Fault::BadNetwork { max: ms(100), lost_per_mille: 0, lasts: s(20) };
    let disks = (0..3).map(|broker| Fault::SlowDisk { broker, sync: ms(50), lasts: s(20) });
    let plan = busy(disks.chain([network]).map(|fault| at(1, fault)).collect());
    let workload =
        workload::Plan { users: 4, operations: 500, pause: ms(20), sends_only: true, ..plan.workload.clone() };
    let store = StoreTuning { undurable_log_bytes: 128 * 1024, ..StoreTuning::default() };
    found_bug(Bug::LostSendOrder, "I10", &Plan { workload, store, park_after: Duration::ZERO, ..plan });
}

/// Broker 1 has voted for a new leader and taken its entries. Without that vote it lets the old leader overwrite them,
/// which comes back just when the new one is gone.
#[test]
fn a_vote_that_is_not_persisted_is_found_by_entries_that_differ() {
    let (begin, turn, end) = (s(3), s(7), s(12));
    let cuts = [apart(0, 1, begin, turn), apart(0, 2, begin, end), apart(1, 2, turn - ms(100), end)];
    let mut schedule: Vec<Step> = cuts.into_iter().flatten().collect();
    schedule.push(Step { at: turn - ms(50), fault: crash(&[1], Death::Power, ms(300)) });
    schedule.sort_by_key(|step| step.at);
    let plan = busy(schedule);
    let forgetful = Plan { disks: DiskFaults { votes_forgotten: true, ..DiskFaults::default() }, ..plan.clone() };
    found("VoteNotPersisted", "agreement", &plan, |seed| run(seed, &forgetful));
}
