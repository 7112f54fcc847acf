//! Gateway and SDK on real brokers at the moments that are hard to meet: a leader that changes while an event is on its
//! way, a user who is added while he is connected. Brokers, gateway and device run in this process, over real sockets
//! and real directories; between gateway and brokers stand proxies that can hold and lose what is on the wire.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "../../../broker/tests/support/mod.rs"]
mod brokers;
mod proxy;

use std::collections::BTreeMap;

use brokers::{Caller, Cluster, eventually, with_token};
use proxy::Proxy;
use stentor_client::{Client, From, Incoming};
use stentor_gateway::{BrokerAddress, Gateway, GatewayConfig, GatewayLimits};
use stentor_proto::{
    ids::{ConversationId, Seq},
    v1::{
        EventKind, ParticipantRequest, TransferLeaderRequest, admin_client::AdminClient,
        conversations_client::ConversationsClient,
    },
};

struct World {
    cluster: Cluster,
    proxies: Vec<Proxy>,
    gateway: Gateway,
}

impl World {
    async fn start(shards: u32) -> Self {
        let cluster = Cluster::start(3, shards).await;
        let mut proxies = Vec::new();
        for config in &cluster.configs {
            proxies.push(Proxy::start(config.peer_listen).await);
        }
        let any = "127.0.0.1:0".parse().unwrap();
        let brokers = cluster.configs.iter().zip(&proxies).map(|(config, proxy)| BrokerAddress {
            broker: config.broker,
            name: config.name.clone(),
            peer_addr: proxy.addr,
        });
        let config = GatewayConfig {
            name: "gateway-1".into(),
            quic_listen: any,
            http_listen: any,
            brokers: brokers.collect(),
            tls: cluster.tls.clone(),
            development: true,
            limits: GatewayLimits { drain_ms: 0, ..GatewayLimits::default() },
        };
        let gateway = stentor_gateway::start(config).await.unwrap();
        gateway.ready(brokers::DEADLINE).await.unwrap();
        Self { cluster, proxies, gateway }
    }

    fn device(&self, user: &str, device: &str) -> stentor_client::Builder {
        let token = self.cluster.token(user, Some(device), false);
        Client::builder().gateway(self.gateway.addresses().quic).ca_file(&self.cluster.ca).token(token)
    }

    async fn leader(&self, shard: u32) -> usize {
        eventually("a leader", || self.cluster.leader_of(0, shard)).await
    }

    /// Moves a shard's leadership, and waits until the new leader says so itself.
    async fn transfer(&self, shard: u32, target: usize) {
        let token = self.cluster.token("operator", None, true);
        let broker = self.cluster.configs[target].name.clone();
        let mut admin = AdminClient::new(self.cluster.api(target));
        admin.transfer_leader(with_token(TransferLeaderRequest { shard, broker }, &token)).await.unwrap();
        eventually("the leadership moves", || async {
            self.cluster.leader_of(target, shard).await.filter(|&leader| leader == target)
        })
        .await;
    }

    async fn stop(self) {
        self.gateway.shutdown().await;
        self.cluster.stop().await;
    }
}

fn id(text: &str) -> ConversationId {
    ConversationId::new(text).unwrap()
}

async fn next(client: &Client) -> Incoming {
    tokio::time::timeout(brokers::DEADLINE, client.next()).await.expect("nothing came").expect("the session ended")
}

/// The next event of a conversation; what else comes is passed over.
async fn event(client: &Client, of: &str) -> (u64, EventKind, String) {
    loop {
        if let Incoming::Event { conversation, event } = next(client).await
            && conversation.as_str() == of
        {
            return (event.seq.0, event.kind, String::from_utf8_lossy(&event.body).into_owned());
        }
    }
}

/// Where the one event of a round is applied.
#[derive(Debug, Clone, Copy)]
enum When {
    /// By the old leader, whose live copy is then lost with its stream.
    BeforeTheChange,
    /// By the new leader, while the gateway's registration with it is still on its way.
    BeforeTheRegistration,
}

/// Must show 7: after the device has caught up, one event is applied around a change of leader so that no leader sends
/// it as live to this gateway. Nothing follows it; it comes all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_no_leader_sends_live_comes_without_a_later_one() {
    let world = World::start(1).await;
    let bob = |leader: usize| world.cluster.caller(leader, "bob");
    let mut leader = world.leader(1).await;
    bob(leader).create("general", &["ann"]).await.unwrap();
    let mut head = bob(leader).send("general", "first", "first").await.unwrap().seq;
    let ann = world.device("ann", "phone").connect().await.unwrap();
    ann.subscribe(&id("general"), From::Seq(Seq(0))).await.unwrap();
    while event(&ann, "general").await.0 < head {}
    for (n, when) in [When::BeforeTheChange, When::BeforeTheRegistration].into_iter().cycle().take(4).enumerate() {
        let target = (leader + 1) % 3;
        let body = format!("{n}: {when:?}");
        world.proxies[leader].hold_answers(true);
        world.proxies[target].hold_requests(true);
        if matches!(when, When::BeforeTheChange) {
            head = bob(leader).send("general", &body, &body).await.unwrap().seq;
        }
        world.transfer(1, target).await;
        // What the old leader has sent since, live events and the end of its leadership among them, is lost.
        world.proxies[leader].cut();
        world.proxies[leader].hold_answers(false);
        eventually("the registration is on its way", || async { (world.proxies[target].held() > 0).then_some(()) })
            .await;
        if matches!(when, When::BeforeTheRegistration) {
            head = bob(target).send("general", &body, &body).await.unwrap().seq;
        }
        assert!(ann.try_next().is_none_or(|i| !matches!(i, Incoming::Event { .. })), "nobody can have sent it");
        world.proxies[target].hold_requests(false);
        assert_eq!(event(&ann, "general").await, (head, EventKind::Message, body));
        leader = target;
    }
    ann.close().await;
    world.stop().await;
}

async fn change(caller: &Caller, conversation: &str, user: &str, add: bool) -> u64 {
    let mut conversations = ConversationsClient::new(caller.channel.clone());
    let request = ParticipantRequest { conversation: conversation.into(), user: user.into(), ..Default::default() };
    let request = caller.request(request);
    let answer = if add {
        conversations.add_participant(request).await
    } else {
        conversations.remove_participant(request).await
    };
    answer.unwrap().into_inner().seq
}

/// A device that follows all of its user's conversations is added, removed and added again while it is connected, also
/// while its user's shard changes its leader.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connected_device_learns_of_its_memberships_by_itself() {
    let world = World::start(4).await;
    let bob = world.cluster.caller(0, "bob");
    let ann = world.device("ann", "phone").follow_all().connect().await.unwrap();
    while !matches!(next(&ann).await, Incoming::UpToDate) {}
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    for n in 0..6 {
        let name = format!("c{n}");
        bob.create(&name, &[]).await.unwrap();
        bob.send(&name, "before", "not hers").await.unwrap();
        if n % 2 == 1 {
            // Shards are numbered from 1; whichever is hers changes its leader in one of these rounds or another.
            let shard = n as u32 / 2 + 1;
            let leader = world.leader(shard).await;
            world.transfer(shard, (leader + 1) % 3).await;
        }
        let added = change(&bob, &name, "ann", true).await;
        assert_eq!(event(&ann, &name).await, (added, EventKind::ParticipantAdded, String::new()));
        let said = bob.send(&name, "after", "hers").await.unwrap().seq;
        assert_eq!(event(&ann, &name).await, (said, EventKind::Message, "hers".into()));
        let removed = change(&bob, &name, "ann", false).await;
        assert_eq!(event(&ann, &name).await, (removed, EventKind::ParticipantRemoved, String::new()));
        loop {
            match next(&ann).await {
                Incoming::Ended { conversation, refusal } if conversation.as_str() == name => {
                    assert_eq!(refusal.reason, "NOT_A_PARTICIPANT");
                    break;
                }
                Incoming::Event { conversation, event } => panic!("{conversation}: {event:?} after her removal"),
                _ => {}
            }
        }
        bob.send(&name, "away", "not hers either").await.unwrap();
        let again = change(&bob, &name, "ann", true).await;
        assert_eq!(event(&ann, &name).await, (again, EventKind::ParticipantAdded, String::new()), "nothing twice");
        seen.insert(name, again);
    }
    // All of them go on.
    for (name, seq) in seen {
        bob.send(&name, "end", "end").await.unwrap();
        assert_eq!(event(&ann, &name).await, (seq + 1, EventKind::Message, "end".into()));
    }
    while let Some(incoming) = ann.try_next() {
        assert!(!matches!(incoming, Incoming::Event { .. }), "{incoming:?}");
    }
    ann.close().await;
    world.stop().await;
}
