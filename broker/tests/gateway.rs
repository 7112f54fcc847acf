//! The stream that gateways use: proposals in order, live events after interest, the end of a leadership. Must prove
//! that an interested gateway misses nothing without being told.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use stentor_engine::command;
use stentor_proto::{
    Bytes,
    ids::{AppId, ConversationId, DeviceId, UserId},
    internal::{
        self, DropInterest, Heads, Interest, Propose, Read, WatchPlacementRequest, broker_client::BrokerClient,
        broker_frame::Frame as In, gateway_frame::Frame as Out, interest_state, outcome, proposed, read_done,
    },
    v1::HistoryRequest,
};
use support::{APP, Cluster, Gateway, eventually};

/// The only data shard of these clusters.
const SHARD: u32 = 1;

fn send(send_no: u64, body: &str) -> Bytes {
    let (user, device) = (UserId::new("ann").unwrap(), DeviceId::new("phone").unwrap());
    let send = internal::Send {
        actor: Some(command::actor(&user, Some(&device), false)),
        send_no,
        body: Bytes::copy_from_slice(body.as_bytes()),
        ..Default::default()
    };
    let (app, conversation) = (AppId::new(APP).unwrap(), ConversationId::new("general").unwrap());
    command::encode(&command::send(&app, &conversation, send))
}

async fn leader(cluster: &Cluster, ask: usize) -> usize {
    eventually("the shard has a leader", || cluster.leader_of(ask, SHARD)).await
}

fn interest(id: u64) -> Out {
    Out::Interest(Interest { id, shard: SHARD, app: APP.into(), conversation: "general".into(), ..Default::default() })
}

/// Sends `count` proposals on the stream and collects events until the last of them came live.
async fn propose_and_collect(gateway: &mut Gateway, first: u64, count: u64) -> (Vec<u64>, Vec<(u64, String)>) {
    let propose =
        |n| Out::Propose(Propose { id: n, shard: SHARD, command: send(n, &format!("m-{n}")), ..Default::default() });
    gateway.send((first..first + count).map(propose).collect()).await;
    let (mut answered, mut live) = (Vec::new(), Vec::new());
    while answered.len() < count as usize || live.len() < count as usize {
        match gateway.next_but_beats().await.unwrap() {
            In::Proposed(done) => {
                let Some(proposed::Result::Outcome(outcome)) = &done.result else { panic!("{done:?}") };
                assert!(matches!(outcome.outcome, Some(outcome::Outcome::Accepted(_))), "{outcome:?}");
                answered.push(done.id);
            }
            In::Live(batch) => live.extend(batch.records.iter().map(|record| {
                let event = support::event("general", record);
                (event.header.seq, String::from_utf8_lossy(&event.body).into_owned())
            })),
            other => panic!("{other:?}"),
        }
    }
    (answered, live)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn live_events_come_in_order_after_interest() {
    let mut cluster = Cluster::start(3, 1).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let first = leader(&cluster, 0).await;
    let mut gateway = Gateway::attach(cluster.peer(first)).await.unwrap();
    gateway.send(vec![interest(1)]).await;
    let Some(In::Interest(state)) = gateway.next_but_beats().await else { panic!() };
    let Some(interest_state::Result::Registered(registered)) = state.result else { panic!("{state:?}") };
    assert_eq!(registered.head, 1);
    let (answered, live) = propose_and_collect(&mut gateway, 1, 200).await;
    assert_eq!(answered, (1..=200).collect::<Vec<_>>());
    assert_eq!(live, (1..=200).map(|n| (n + 1, format!("m-{n}"))).collect::<Vec<_>>());
    let read = Read {
        id: 7,
        shard: SHARD,
        app: APP.into(),
        user: "ann".into(),
        request: Some(HistoryRequest { conversation: "general".into(), after_seq: Some(150), ..Default::default() }),
        ..Default::default()
    };
    let heads = Heads {
        id: 8,
        shard: SHARD,
        app: APP.into(),
        user: "ann".into(),
        device: "phone".into(),
        conversations: vec!["general".into(), "nowhere".into()],
    };
    gateway.send(vec![Out::Read(read), Out::Heads(heads)]).await;
    for _ in 0..2 {
        match gateway.next_but_beats().await.unwrap() {
            In::Read(done) => {
                let Some(read_done::Result::Page(page)) = done.result else { panic!() };
                assert_eq!((done.id, page.items.len(), page.head, page.more), (7, 51, 201, false));
            }
            In::Heads(done) => {
                assert_eq!((done.states[0].head, done.states[0].last_send_no), (201, 200));
                assert_eq!(done.states[1].refusal.as_ref().unwrap().reason, "UNKNOWN_CONVERSATION");
            }
            other => panic!("{other:?}"),
        }
    }
    // The next leader takes the same stream of sends where it stopped.
    cluster.halt(first).await;
    let second = leader(&cluster, (first + 1) % 3).await;
    assert_ne!(second, first);
    let mut gateway = Gateway::attach(cluster.peer(second)).await.unwrap();
    gateway.send(vec![interest(2)]).await;
    let Some(In::Interest(state)) = gateway.next_but_beats().await else { panic!() };
    assert!(
        matches!(state.result, Some(interest_state::Result::Registered(r)) if r.head == 201 && r.term > registered.term)
    );
    let (answered, live) = propose_and_collect(&mut gateway, 201, 50).await;
    assert_eq!((answered.len(), live.first().unwrap().0, live.last().unwrap().0), (50, 202, 251));
    cluster.stop().await;
}

/// The frames of one batch, and a read behind them to know when they were carried out. Gives the live frames that came.
async fn lives(gateway: &mut Gateway, interest: Vec<Out>, send_no: u64) -> usize {
    let answers = interest.iter().filter(|frame| matches!(frame, Out::Interest(_))).count();
    gateway.send(interest).await;
    for _ in 0..answers {
        assert!(matches!(gateway.next_but_beats().await, Some(In::Interest(_))));
    }
    let command = send(send_no, "x");
    gateway.send(vec![Out::Propose(Propose { id: send_no, shard: SHARD, command, ..Default::default() })]).await;
    let (mut lives, mut answered) = (0, false);
    loop {
        match gateway.next_but_beats().await.unwrap() {
            In::Live(_) => lives += 1,
            In::Proposed(_) => {
                answered = true;
                gateway.send(vec![Out::Read(Read { shard: SHARD, ..Default::default() })]).await;
            }
            In::Read(_) if answered => return lives,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interest_is_added_and_dropped_in_the_order_of_the_frames() {
    let cluster = Cluster::start(1, 1).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    leader(&cluster, 0).await;
    let mut gateway = Gateway::attach(cluster.peer(0)).await.unwrap();
    let drop = || {
        Out::DropInterest(DropInterest {
            shard: SHARD,
            app: APP.into(),
            conversation: "general".into(),
            ..Default::default()
        })
    };
    assert_eq!(lives(&mut gateway, vec![interest(1), drop()], 1).await, 0, "dropped after it was added");
    assert_eq!(lives(&mut gateway, vec![interest(2), drop(), interest(3)], 2).await, 1, "and added again");
    assert_eq!(lives(&mut gateway, vec![drop()], 3).await, 0);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_of_leadership_closes_the_streams_interest() {
    let cluster = Cluster::start(3, 1).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let first = leader(&cluster, 0).await;
    let target = (first + 1) % 3;
    let mut gateway = Gateway::attach(cluster.peer(first)).await.unwrap();
    gateway.send(vec![interest(1)]).await;
    assert!(matches!(gateway.next_but_beats().await, Some(In::Interest(_))));
    let token = cluster.token("operator", None, true);
    // Asked at a broker that does not lead: it passes the call on.
    let mut admin = stentor_proto::v1::admin_client::AdminClient::new(cluster.api(target));
    let asked = stentor_proto::v1::TransferLeaderRequest { shard: SHARD, broker: cluster.configs[target].name.clone() };
    admin.transfer_leader(support::with_token(asked, &token)).await.unwrap();
    loop {
        match gateway.next().await.unwrap() {
            In::Beat(beat) if beat.closing => break,
            In::Beat(beat) => assert_eq!(beat.shard, SHARD),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(leader(&cluster, first).await, target);
    gateway
        .send(vec![Out::Propose(Propose { id: 9, shard: SHARD, command: send(1, "x"), ..Default::default() })])
        .await;
    let Some(In::Proposed(done)) = gateway.next_but_beats().await else { panic!() };
    let Some(proposed::Result::NotLeader(not)) = done.result else { panic!("{done:?}") };
    assert_eq!(not.leader, cluster.configs[target].broker.0);
    let mut views = BrokerClient::new(cluster.peer(first))
        .watch_placement(WatchPlacementRequest { gateway: "g".into(), cluster_id: "test-cluster".into() })
        .await
        .unwrap()
        .into_inner();
    let view = views.message().await.unwrap().unwrap();
    assert_eq!((view.brokers.len(), view.apps.len(), view.shards.len()), (3, 1, 2));
    assert!(view.shards.iter().all(|s| s.initialized));
    assert!(view.leaders.iter().any(|l| l.shard == SHARD && l.broker == not.leader));
    cluster.stop().await;
}
