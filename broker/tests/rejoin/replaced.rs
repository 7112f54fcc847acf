//! Directories whose places are given to newer ones: which of them still vote, and how the others learn it. Must prove
//! that nobody loses a vote before it is taken over, and that whoever has lost all of them stops.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use futures_util::Stream;
use stentor_broker::PeerConfig;
use stentor_proto::v1::{TransferLeaderRequest, admin_client::AdminClient};
use stentor_proto::{
    ids::{BrokerId, Incarnation, ReplicaId},
    internal::{
        AnnounceRequest, AppendRequest, AppliedRow, IdentifyRequest, IdentifyResponse, JoinRequest, JoinResponse,
        PeerBatch, PeerError, PeerFrame, RaftVote, SnapshotAnswer, SnapshotChunk, SnapshotHead, Stage, TransferRequest,
        VoteRequest, join_response,
        peer_client::PeerClient,
        peer_frame::Message,
        peer_server::{Peer, PeerServer},
    },
};
use stentor_transport::{
    Host,
    grpc::{self, Routes},
    tls::ServerTls,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::*;

const REPLACED: &str = "REPLACED";
/// The meta shard and the one data shard.
const SHARDS: [u32; 2] = [0, 1];

fn id(broker: u32, incarnation: u32) -> u64 {
    ReplicaId { broker: BrokerId(broker), incarnation: Incarnation(incarnation) }.to_u64()
}

/// A joiner that is gone for ever as soon as it has its places: it says who it is, and nothing else.
struct Phantom {
    incarnation: Arc<AtomicU32>,
}

type Frames = Pin<Box<dyn Stream<Item = Result<PeerBatch, Status>> + Send>>;

fn nothing<T>() -> Result<Response<T>, Status> {
    Err(Status::unavailable("a phantom"))
}

#[tonic::async_trait]
impl Peer for Phantom {
    type ControlStream = Frames;
    type AppendStream = Frames;

    async fn control(&self, _: Request<Streaming<PeerBatch>>) -> Result<Response<Frames>, Status> {
        nothing()
    }

    async fn append(&self, _: Request<Streaming<PeerBatch>>) -> Result<Response<Frames>, Status> {
        nothing()
    }

    async fn snapshot(&self, _: Request<Streaming<SnapshotChunk>>) -> Result<Response<SnapshotAnswer>, Status> {
        nothing()
    }

    async fn identify(&self, _: Request<IdentifyRequest>) -> Result<Response<IdentifyResponse>, Status> {
        let incarnation = self.incarnation.load(Ordering::Relaxed);
        let stage = if incarnation == 0 { Stage::New } else { Stage::Member } as i32;
        Ok(Response::new(IdentifyResponse { broker: 3, incarnation, stage, ..Default::default() }))
    }

    async fn join(&self, _: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        nothing()
    }

    async fn announce(&self, _: Request<AnnounceRequest>) -> Result<Response<JoinResponse>, Status> {
        nothing()
    }
}

fn given(answer: Result<Response<JoinResponse>, Status>) -> Option<u32> {
    match answer.ok()?.into_inner().result? {
        join_response::Result::Incarnation(incarnation) => Some(incarnation),
        join_response::Result::Refusal(_) => None,
    }
}

/// Gives the third broker's places to a directory that nobody will ever see again.
async fn give_places_to_a_phantom(cluster: &Cluster) {
    let (config, incarnation, stop) = (&cluster.configs[2], Arc::<AtomicU32>::default(), CancellationToken::new());
    let routes = Routes::new(PeerServer::new(Phantom { incarnation: incarnation.clone() }));
    let (listener, tls) = (Host::real().listen(config.peer_listen).unwrap(), ServerTls::peer(&config.tls).unwrap());
    let ended = stop.clone().cancelled_owned();
    let serving = tokio::spawn(async move { grpc::serve(listener, &tls, routes, ended).await.unwrap() });
    let join = JoinRequest { broker: 3, cluster_id: "test-cluster".into(), expect_given: 1 };
    let number =
        eventually("a number is given", || async { given(PeerClient::new(cluster.peer(0)).join(join.clone()).await) });
    assert_eq!(number.await, 2);
    incarnation.store(2, Ordering::Relaxed);
    let PeerConfig { name, peer_addr, api_addr, .. } = config.peers[2].clone();
    let text = |addr: SocketAddr| addr.to_string();
    let announce = AnnounceRequest {
        broker: 3,
        cluster_id: "test-cluster".into(),
        incarnation: 2,
        name,
        peer: text(peer_addr),
        api: text(api_addr),
    };
    eventually("the places are given", || async {
        // Only the meta shard's leader gives them.
        for n in [0, 1] {
            if given(PeerClient::new(cluster.peer(n)).announce(announce.clone()).await).is_some() {
                return Some(());
            }
        }
        None
    })
    .await;
    stop.cancel();
    serving.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_votes_until_its_successor_does() {
    let mut cluster = Cluster::start(3, 2).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let mut sent = send(&cluster, 0, 0, 20, "x").await;
    cluster.halt(2).await;
    give_places_to_a_phantom(&cluster).await;
    sent = send(&cluster, 0, sent, 5, "while the third is lost").await;
    // The directory is found again, and another one is lost: only the two that are there have everything.
    cluster.halt(1).await;
    cluster.start_one(2).await;
    sent = send(&cluster, 2, sent, 5, "with the vote of the first directory").await;
    all_there(&cluster, 0, sent).await;
    let status = cluster.status(0).await.unwrap();
    assert!(status.shards.iter().all(|s| s.quorum), "{status:?}");
    // It also leads: nobody refuses its votes and appends.
    for shard in status.shards.iter().map(|s| s.shard) {
        eventually("the first directory leads", || async {
            let asked = TransferLeaderRequest { shard, broker: "broker-3".into() };
            let asked = support::with_token(asked, &cluster.token("operator", None, true));
            let _ = AdminClient::new(cluster.api(0)).transfer_leader(asked).await;
            (cluster.leader_of(0, shard).await == Some(2)).then_some(())
        })
        .await;
    }
    sent = send(&cluster, 0, sent, 5, "led by the first directory").await;
    // Only where nobody else can: a newer directory may stand at its address, and then nobody could let that one in.
    for shard in status.shards.iter().map(|s| s.shard) {
        eventually("the first directory hands over", || async {
            cluster.leader_of(0, shard).await.filter(|leader| *leader != 2)
        })
        .await;
    }
    // What votes no longer where it was wanted no more is seen, and an empty directory mends it.
    assert!(status.shards.iter().all(|s| !s.settled), "{status:?}");
    cluster.start_one(1).await;
    eventually("the second has caught up", || async {
        let status = cluster.status(0).await.ok()?;
        status.nodes.iter().all(|node| node.state == "up" && node.lag == 0).then_some(())
    })
    .await;
    cluster.halt(2).await;
    wipe(&cluster.configs[2]);
    cluster.start_one(2).await;
    cluster.ready().await;
    settled(&cluster, 0).await;
    agree(&cluster).await;
    all_there(&cluster, 2, sent).await;
    cluster.stop().await;
}

async fn replace_the_third(cluster: &mut Cluster, aside: &str) {
    cluster.halt(2).await;
    std::fs::rename(&cluster.configs[2].data_dir, cluster.path().join(aside)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replaced_process_that_nobody_reaches_and_that_does_not_restart_is_told() {
    let mut cluster = Cluster::start(3, 1).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    let sent = send(&cluster, 0, 0, 5, "x").await;
    replace_the_third(&mut cluster, "aside").await;
    // It is alive before it is replaced, and everybody knows it.
    let old = stentor_broker::start(elsewhere(&cluster, "aside")).await.unwrap();
    cluster.start_one(2).await;
    cluster.ready().await;
    settled(&cluster, 0).await;
    let why = fails(&old).await;
    assert!(why.starts_with("REPLACED: this directory is incarnation 1 of broker 3, and "), "{why}");
    old.halt().await;
    agree(&cluster).await;
    all_there(&cluster, 2, sent).await;
    cluster.stop().await;
}

fn frame(number: u64, shard: u32, from: u64, message: Message) -> PeerFrame {
    PeerFrame { id: number, shard, from, to: id(1, 1), message: Some(message) }
}

/// What broker 1 answers to the third broker's directory, one answer per frame.
async fn answers(cluster: &Cluster, append: bool, frames: Vec<PeerFrame>) -> Vec<Message> {
    let count = frames.len();
    let outgoing = futures_util::StreamExt::chain(
        futures_util::stream::iter([PeerBatch { frames }]),
        futures_util::stream::pending(),
    );
    let mut client = PeerClient::new(cluster.peer(0));
    let answer = if append { client.append(outgoing).await } else { client.control(outgoing).await };
    let (mut inbound, mut answers) = (answer.unwrap().into_inner(), Vec::new());
    while answers.len() < count {
        let batch = tokio::time::timeout(support::DEADLINE, inbound.message()).await.unwrap().unwrap().unwrap();
        let messages = batch.frames.into_iter().filter_map(|frame| frame.message);
        answers.extend(messages.filter(|message| !matches!(message, Message::Beat(_))));
    }
    answers
}

fn reason(message: &Message) -> &str {
    match message {
        Message::Error(PeerError { reason, .. }) => reason,
        _ => "",
    }
}

async fn snapshot(cluster: &Cluster, shard: u32, from: u64) -> String {
    let vote = Some(RaftVote { term: 1, node: from, committed: true });
    let head = SnapshotHead { shard, from, to: id(1, 1), vote, applied: Some(AppliedRow::default()) };
    let chunk = SnapshotChunk { head: Some(head), ..Default::default() };
    match PeerClient::new(cluster.peer(0)).snapshot(futures_util::stream::iter([chunk])).await {
        Ok(answer) => answer.into_inner().error.unwrap_or_default().reason,
        Err(status) => status.to_string(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_a_replaced_directory_asks_it_is_told() {
    let mut cluster = Cluster::start(3, 1).await;
    cluster.caller(0, "ann").create("general", &[]).await.unwrap();
    replace_the_third(&mut cluster, "aside").await;
    cluster.start_one(2).await;
    cluster.ready().await;
    settled(&cluster, 0).await;
    // A follower knows what is committed when its leader has told it.
    eventually("the first broker knows that the third was replaced", || async {
        let ask = IdentifyRequest { broker: 3, incarnation: 1, ..Default::default() };
        let told = PeerClient::new(cluster.peer(0)).identify(ask).await.unwrap().into_inner();
        (told.current == 2 && told.replaced == SHARDS).then_some(())
    })
    .await;
    for shard in SHARDS {
        let (old, new) = (id(3, 1), id(3, 2));
        let vote = VoteRequest { vote: Some(RaftVote { term: 1, node: old, committed: false }), ..Default::default() };
        let transfer = TransferRequest { to: id(1, 1), ..Default::default() };
        let asked = || [Message::Vote(vote), Message::PreVote(vote), Message::Transfer(transfer)];
        let frames = |from| (1..).zip(asked()).map(move |(n, message)| frame(n, shard, from, message)).collect();
        let told = answers(&cluster, false, frames(old)).await;
        assert!(told.iter().all(|answer| reason(answer) == REPLACED), "{told:?}");
        let told = answers(&cluster, false, frames(new)).await;
        assert!(told.iter().all(|answer| reason(answer) != REPLACED), "{told:?}");
        let append = |from| vec![frame(1, shard, from, Message::Append(AppendRequest::default()))];
        assert_eq!(reason(&answers(&cluster, true, append(old)).await[0]), REPLACED);
        assert_ne!(reason(&answers(&cluster, true, append(new)).await[0]), REPLACED);
        assert_eq!(snapshot(&cluster, shard, old).await, REPLACED);
        assert_ne!(snapshot(&cluster, shard, new).await, REPLACED);
        // Also one that does not know that the other one was replaced before.
        let mut stranger = frame(1, shard, old, Message::Vote(vote));
        stranger.to = id(1, 9);
        assert_eq!(reason(&answers(&cluster, false, vec![stranger]).await[0]), REPLACED);
    }
    cluster.stop().await;
}
