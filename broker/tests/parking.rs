//! Shards in which nothing happens park, and wake for whatever comes: a send, a read, a transfer, the loss of a leader. Must
//! prove that nobody outside notices.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use stentor_proto::{
    internal::{Interest, broker_frame::Frame as In, gateway_frame::Frame as Out, interest_state},
    v1::{TransferLeaderRequest, admin_client::AdminClient},
};
use support::{Cluster, Gateway, bodies, eventually, with_token};

const SHARDS: u32 = 4;
const PARKED: &str = "stentor_broker_parked_replicas";

/// Returns when all replicas of these brokers are parked.
async fn all_parked(cluster: &Cluster, brokers: &[usize]) {
    for &n in brokers {
        let parked = || async move { (cluster.metric(n, PARKED).await == u64::from(SHARDS)).then_some(()) };
        eventually("every replica is parked", parked).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_shards_park_and_wake_for_whatever_comes() {
    let mut cluster = Cluster::start(3, SHARDS).await;
    let ann = cluster.caller(0, "ann");
    let names = ["a", "b", "c", "d", "e", "f"];
    for name in names {
        ann.create(name, &[]).await.unwrap();
    }
    all_parked(&cluster, &[0, 1, 2]).await;
    for (n, name) in names.into_iter().enumerate() {
        let caller = cluster.caller(n % 3, "ann");
        assert_eq!(caller.send(name, &format!("{name}-1"), "after a rest").await.unwrap().seq, 2);
    }
    all_parked(&cluster, &[0, 1, 2]).await;
    for (n, name) in names.into_iter().enumerate() {
        let items = cluster.caller(n % 3, "ann").all(name, n % 2 == 0).await.unwrap();
        assert_eq!(bodies(name, &items).last().unwrap().1, "after a rest");
    }
    all_parked(&cluster, &[0, 1, 2]).await;
    // Who follows a leader that is lost wakes by himself; a broker that is back parks with the others again.
    let shard = 1;
    let leader = eventually("the shard has a leader", || cluster.leader_of(0, shard)).await;
    cluster.halt(leader).await;
    let others: Vec<_> = (0..3).filter(|n| *n != leader).collect();
    for (n, name) in names.into_iter().enumerate() {
        let caller = cluster.caller(others[n % 2], "ann");
        let sent = eventually("the send is taken", || async {
            caller.send(name, &format!("{name}-2"), "after a loss").await.ok()
        });
        assert_eq!(sent.await.seq, 3);
    }
    cluster.start_one(leader).await;
    all_parked(&cluster, &[0, 1, 2]).await;
    support::agree(&cluster).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_parked_shard_is_handed_over() {
    let cluster = Cluster::start(3, SHARDS).await;
    cluster.caller(0, "ann").create("a", &[]).await.unwrap();
    all_parked(&cluster, &[0, 1, 2]).await;
    let admin = cluster.token("ops", None, true);
    for shard in 1..=SHARDS {
        let leader = eventually("the shard has a leader", || cluster.leader_of(0, shard)).await;
        let broker = cluster.configs[(leader + 1) % 3].name.clone();
        let asked = with_token(TransferLeaderRequest { shard, broker: broker.clone() }, &admin);
        let told = AdminClient::new(cluster.api(leader)).transfer_leader(asked).await.unwrap();
        assert_eq!(told.into_inner().leader, broker);
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_streams_of_a_parked_shard_stay() {
    let cluster = Cluster::start(3, SHARDS).await;
    let ann = cluster.caller(0, "ann");
    ann.create("a", &[]).await.unwrap();
    // Some shard has it: whoever leads it takes the interest.
    let (shard, mut gateway) = 'found: loop {
        for shard in 1..=SHARDS {
            let leader = eventually("the shard has a leader", || cluster.leader_of(0, shard)).await;
            let mut gateway = Gateway::attach(cluster.peer(leader)).await.unwrap();
            let interest =
                Interest { id: 1, shard, app: support::APP.into(), conversation: "a".into(), ..Interest::default() };
            gateway.send(vec![Out::Interest(interest)]).await;
            if let Some(In::Interest(state)) = gateway.next_but_beats().await
                && matches!(state.result, Some(interest_state::Result::Registered(_)))
            {
                break 'found (shard, gateway);
            }
        }
    };
    all_parked(&cluster, &[0, 1, 2]).await;
    for _ in 0..4 {
        match gateway.next().await {
            Some(In::Beat(beat)) => assert!(beat.shard == shard && !beat.closing && beat.lease_ms > 0, "{beat:?}"),
            other => panic!("{other:?}"),
        }
    }
    let parked = || async { (cluster.metric(0, PARKED).await == u64::from(SHARDS)).then_some(()) };
    eventually("a stream wakes nothing", parked).await;
    ann.send("a", "key", "news").await.unwrap();
    match gateway.next_but_beats().await {
        Some(In::Live(live)) => assert_eq!((live.shard, live.records.len()), (shard, 1)),
        other => panic!("{other:?}"),
    }
    cluster.stop().await;
}
