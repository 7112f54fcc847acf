//! A few seconds of each run on real processes. The full ones are made by `make chaos`. Must never run two at once: each
//! is a whole cluster, and the machines that test are small.

use stentor_chaos::cluster::{Kind, Scenario, find};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_and_nothing_comes_twice_while_nodes_are_killed() {
    let binary = find().unwrap_or_else(|error| panic!("{error}"));
    for kind in Kind::ALL {
        let report = Scenario::short(kind, binary.clone(), 7).run().await.unwrap_or_else(|error| panic!("{error}"));
        assert!(report.ok, "{report}");
        assert!(report.verdict.judged.deliveries > 100, "{report}");
    }
}
