//! The merged status: a dead leader's word must not count, and an unreachable broker must show as such.

use stentor_engine::placement::SlotMap;
use stentor_proto::internal::PlacementRow;

use super::*;

fn view() -> MetaView {
    MetaView {
        cluster_id: "c".into(),
        placement: PlacementRow { version: 4, shards: vec![] },
        slots: SlotMap::default(),
        brokers: vec![],
        incarnations: Default::default(),
        apps: vec![],
        keys: Default::default(),
    }
}

fn peer(broker: u32) -> PeerConfig {
    let addr = ([127, 0, 0, 1], broker as u16).into();
    PeerConfig { broker: BrokerId(broker), name: format!("broker-{broker}"), peer_addr: addr, api_addr: addr }
}

fn shard(leader: &str, term: u64, last_log_index: u64, applied_index: u64, quorum: bool) -> ShardStatus {
    ShardStatus { shard: 1, leader: leader.into(), term, last_log_index, applied_index, quorum, ..Default::default() }
}

#[test]
fn a_shard_is_as_its_leader_tells_it() {
    let told = [
        (peer(1), Some(vec![shard("broker-2", 3, 90, 80, true)])),
        (peer(2), Some(vec![shard("broker-2", 3, 100, 100, true)])),
        (peer(3), None),
    ];
    let status = merged(&view(), &told);
    assert_eq!((status.shards[0].last_log_index, status.shards[0].quorum), (100, true));
    assert_eq!(status.nodes.iter().map(|n| n.leaders).collect::<Vec<_>>(), [0, 1, 0]);
    assert_eq!(status.nodes.iter().map(|n| n.lag).collect::<Vec<_>>(), [20, 0, 0]);
    assert_eq!(status.nodes[2].state, "unreachable");
}

#[test]
fn without_the_leaders_own_word_there_is_no_quorum() {
    let told = [(peer(1), Some(vec![shard("broker-2", 3, 90, 80, true)])), (peer(2), None)];
    let status = merged(&view(), &told);
    assert!(!status.shards[0].quorum);
    assert_eq!(status.nodes[0].leaders + status.nodes[1].leaders, 0);
}
