//! How a data directory gets its place: it founds a cluster with the others, or joins the one that exists under an
//! incarnation that nobody had before. Must never open a replica from a directory whose place is not certain: an empty
//! one under an old id would vote away what its predecessor had promised.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::future::join_all;
use stentor_engine::{
    command,
    effect::Outcome,
    join::{self, Answer, Stage, Waiting, Way},
};
use stentor_proto::{
    ids::{BrokerId, Incarnation, META_SHARD, ReplicaId, ShardId},
    internal::{
        self, AnnounceRequest, IdentifyRequest, IdentifyResponse, JoinBroker, JoinRequest, JoinResponse, PutBroker,
        join_response, peer_client::PeerClient,
    },
    reason::Reason,
    v1::Refusal,
};
use stentor_raft_store::{Identity, META_SLOTS};

use crate::{hand_over, host, meta, node::Node, reads, replaced, router, shard::HostedShard};

/// How long another broker may take to say who it is.
const ASK_PATIENCE: Duration = Duration::from_secs(2);
/// How long the cluster may take to give an incarnation: longer than a call looks for the meta shard's leader.
const JOIN_PATIENCE: Duration = Duration::from_secs(15);
/// The pause before the others are asked again.
const AGAIN: Duration = Duration::from_millis(50);
/// The same for brokers that are away while this one works already.
const AGAIN_LATER: Duration = Duration::from_secs(1);
/// The same when all of them know this directory.
const AGAIN_RARELY: Duration = Duration::from_secs(10);

/// Finds out which directory this is, then opens the meta shard and follows it.
pub(crate) async fn take_part(node: Arc<Node>) {
    let Some(identity) = place(&node).await else { return };
    let own = ReplicaId { broker: identity.broker, incarnation: identity.incarnation };
    let hosted = match host::open(&node, META_SHARD, META_SLOTS, own).await {
        Ok(hosted) => hosted,
        Err(error) => return node.fail(&error.to_string()),
    };
    let following = meta::follow(node.clone(), hosted.reader.clone(), own);
    let founding = async {
        let Some(bootstrap) = node.config.bootstrap.clone() else { return };
        let lowest = node.config.peers.iter().map(|p| p.broker).min();
        if lowest == Some(node.broker) && own.incarnation == meta::FIRST_INCARNATION {
            begin_meta(&node, &hosted, &identity).await;
        }
        meta::found(node.clone(), hosted.clone(), bootstrap).await;
    };
    let leaving = replaced::leave(node.clone(), own);
    tokio::join!(following, founding, announce(&node, own, &identity.cluster_id), leaving);
}

/// The directory's place, from its file or from the others; `None` when this broker stops.
async fn place(node: &Arc<Node>) -> Option<Identity> {
    if let Some(identity) = node.store.identity() {
        return Some(identity);
    }
    let founds = node.config.bootstrap.as_ref().map(|bootstrap| bootstrap.cluster_id.as_str());
    loop {
        let answers = ask_all(node).await;
        let answers: Vec<_> = answers.into_iter().map(|(broker, told)| (broker, told.map(|t| t.answer))).collect();
        let found = match join::choose(founds, &answers) {
            Way::Found => founds.map(|cluster| (cluster.to_owned(), meta::FIRST_INCARNATION)),
            Way::Join { cluster_id, last } => {
                number(node, &cluster_id, last).await.map(|incarnation| (cluster_id, incarnation))
            }
            Way::OtherCluster(broker, cluster) => {
                node.fail(&format!("WRONG_CLUSTER: broker {broker} belongs to cluster {cluster}"));
                None
            }
            Way::Wait(waiting) => {
                node.waits_for(&missing(&waiting));
                None
            }
        };
        if let Some((cluster_id, incarnation)) = found {
            return write(node, Identity { cluster_id, broker: node.broker, incarnation }).await;
        }
        if !pause(node, AGAIN).await {
            return None;
        }
    }
}

fn missing(waiting: &Waiting) -> String {
    match waiting {
        Waiting::Silent(broker) => {
            format!("this directory is empty, and broker {broker} has not said whether there is a cluster already")
        }
        Waiting::NoMeta => "the cluster exists, but too few of its brokers are there to be joined".into(),
        Waiting::NoCluster => {
            "no other broker belongs to a cluster, and this configuration has no [bootstrap] to found one".into()
        }
    }
}

/// False when this broker stops.
async fn pause(node: &Node, time: Duration) -> bool {
    tokio::select! {
        () = tokio::time::sleep(time) => true,
        () = node.stop.cancelled() => false,
    }
}

async fn write(node: &Node, identity: Identity) -> Option<Identity> {
    let (store, written) = (node.store.clone(), identity.clone());
    match node.environment.blocking(move || store.set_identity(&written)).await {
        Ok(Ok(())) => Some(identity),
        Ok(Err(error)) => {
            node.fail(&format!("cannot write the directory's identity: {error}"));
            None
        }
        Err(_) => None,
    }
}

/// What another broker says of itself, and of this one.
struct Told {
    incarnation: Incarnation,
    /// This broker's directory, as far as the other knows; 0: it does not know.
    current: Incarnation,
    /// Shards in which a newer directory has this one's place.
    replaced: Vec<ShardId>,
    answer: Answer,
}

impl From<IdentifyResponse> for Told {
    fn from(response: IdentifyResponse) -> Self {
        let stage = match response.stage() {
            internal::Stage::Unspecified => Stage::Unknown,
            internal::Stage::New => Stage::New,
            internal::Stage::Founding => Stage::Founding,
            internal::Stage::Member => Stage::Member,
        };
        let given = Incarnation(response.given);
        let answer = Answer { cluster_id: response.cluster_id, stage, given };
        let (incarnation, current) = (Incarnation(response.incarnation), Incarnation(response.current));
        Self { incarnation, current, replaced: response.replaced.into_iter().map(ShardId).collect(), answer }
    }
}

/// `None`: it does not answer.
async fn ask(node: &Node, peer: BrokerId) -> Option<Told> {
    let own = node.store.identity();
    let request = IdentifyRequest {
        broker: node.broker.0,
        name: node.config.name.clone(),
        incarnation: own.as_ref().map_or(0, |identity| identity.incarnation.0),
        cluster_id: own.map(|identity| identity.cluster_id).unwrap_or_default(),
    };
    let mut client = PeerClient::new(node.links.channel(peer)?);
    let answer = tokio::time::timeout(ASK_PATIENCE, client.identify(request)).await.ok()?.ok()?;
    Some(answer.into_inner().into())
}

fn others(node: &Node) -> impl Iterator<Item = BrokerId> + '_ {
    node.config.peers.iter().map(|peer| peer.broker).filter(|broker| *broker != node.broker)
}

async fn ask_all(node: &Node) -> Vec<(BrokerId, Option<Told>)> {
    join_all(others(node).map(|peer| async move { (peer, ask(node, peer).await) })).await
}

/// Asks whoever answers for the incarnation after `last`. `None`: nobody gave one, or this broker stops.
async fn number(node: &Node, cluster_id: &str, last: Incarnation) -> Option<Incarnation> {
    node.waits_for("this directory is empty, and a quorum of the cluster's brokers has not given it an incarnation");
    let request = JoinRequest { broker: node.broker.0, cluster_id: cluster_id.to_owned(), expect_given: last.0 };
    for peer in others(node) {
        let mut client = PeerClient::new(node.links.channel(peer)?);
        let answer = tokio::time::timeout(JOIN_PATIENCE, client.join(request.clone())).await;
        if let Ok(Ok(answer)) = answer
            && let Some(incarnation) = result(node, peer, answer.into_inner())
        {
            return Some(incarnation);
        }
    }
    None
}

fn result(node: &Node, peer: BrokerId, answer: JoinResponse) -> Option<Incarnation> {
    match answer.result {
        Some(join_response::Result::Incarnation(incarnation)) => Some(Incarnation(incarnation)),
        Some(join_response::Result::Refusal(Refusal { reason, message, retryable, .. })) => {
            // Another number was given meanwhile, perhaps to an earlier call of ours: the next answers tell it.
            if retryable || reason == Reason::WrongVersion.code() {
                tracing::info!(%peer, reason, message, "this directory cannot join yet");
            } else {
                node.fail(&format!("{reason}: {message}"));
            }
            None
        }
        None => None,
    }
}

/// Answers a directory that asks who this broker is.
pub(crate) async fn identify(node: &Node, asked: &IdentifyRequest) -> IdentifyResponse {
    let identity = node.store.identity();
    let cluster_id = identity.as_ref().map(|i| i.cluster_id.clone()).unwrap_or_default();
    if !asked.cluster_id.is_empty() && !cluster_id.is_empty() && asked.cluster_id != cluster_id {
        tracing::warn!(broker = asked.broker, theirs = asked.cluster_id, ours = cluster_id, "another cluster asks");
    }
    let view = node.meta.view();
    let broker = BrokerId(asked.broker);
    let asking = ReplicaId { broker, incarnation: Incarnation(asked.incarnation) };
    let hosted = if asked.incarnation == 0 { Arc::default() } else { node.all_hosted() };
    IdentifyResponse {
        replaced: hosted.iter().filter(|h| h.has_replaced(asking)).map(|h| h.shard.0).collect(),
        cluster_id,
        broker: node.broker.0,
        stage: stage(node, identity.as_ref()).await as i32,
        incarnation: identity.map_or(0, |i| i.incarnation.0),
        current: view.as_ref().map_or(0, |view| view.incarnation(broker).0),
        given: view.as_ref().map_or(0, |view| view.given(broker).0),
    }
}

async fn stage(node: &Node, identity: Option<&Identity>) -> internal::Stage {
    let Some(identity) = identity else { return internal::Stage::New };
    let Some(hosted) = node.hosted(META_SHARD) else { return internal::Stage::Unspecified };
    if hosted.voted_before || identity.incarnation > meta::FIRST_INCARNATION {
        return internal::Stage::Member;
    }
    match hosted.raft.is_initialized().await {
        Ok(true) => internal::Stage::Member,
        Ok(false) => internal::Stage::Founding,
        Err(_) => internal::Stage::Unspecified,
    }
}

/// Whether a broker answers where the cluster's configuration says it is, with this directory (0: an empty one): another
/// one may be alive there.
async fn is_there(node: &Node, broker: BrokerId, incarnation: Incarnation) -> Result<(), Refusal> {
    node.links.channel(broker).ok_or_else(|| Reason::UnknownBroker.refusal())?;
    match ask(node, broker).await {
        None => {
            let text = format!("broker {broker} does not answer at its configured address");
            Err(Reason::Unavailable.with(text))
        }
        Some(told) if told.incarnation != incarnation => Err(Reason::BrokerInUse.refusal()),
        Some(_) => Ok(()),
    }
}

/// Gives an empty directory its incarnation: a committed command of the meta shard, so that nobody gets it again.
///
/// # Errors
/// The refusal; a retryable one may have given a number that nobody will have.
pub(crate) async fn give_number(node: &Node, asked: JoinRequest) -> Result<Incarnation, Refusal> {
    is_there(node, BrokerId(asked.broker), Incarnation(0)).await?;
    let command = command::join_broker(JoinBroker {
        broker: asked.broker,
        cluster_id: asked.cluster_id.into_bytes().into(),
        expect_given: asked.expect_given,
    });
    match router::propose_once(node, META_SHARD, command::encode(&command)).await? {
        Outcome::Joined { incarnation } => Ok(incarnation),
        outcome => Err(outcome.refusal().unwrap_or_else(|| Reason::Internal.refusal())),
    }
}

/// Gives a directory that has its incarnation on disk the places of the one before. Asked of the meta shard's leader while
/// a quorum follows it and the directory answers, since nobody should wait for one that may be gone. What is appended
/// and then left without a quorum may still be committed later: that changes what the cluster wants, while every shard
/// keeps the vote of the lost directory until the new one has caught up and answers (`stentor_engine::membership`).
///
/// # Errors
/// The refusal: `UNAVAILABLE` where the meta shard is led elsewhere or has no quorum, `OUTCOME_UNKNOWN` when the places
/// may have been given.
pub(crate) async fn give_places(node: &Node, asked: AnnounceRequest) -> Result<Incarnation, Refusal> {
    let (broker, incarnation) = (BrokerId(asked.broker), Incarnation(asked.incarnation));
    if node.store.identity().is_none_or(|identity| identity.cluster_id != asked.cluster_id) {
        return Err(Reason::WrongCluster.refusal());
    }
    let unavailable = || Reason::Unavailable.refusal();
    let meta = node.hosted(META_SHARD).filter(|meta| meta.ready()).ok_or_else(unavailable)?;
    let led = tokio::time::timeout(ASK_PATIENCE, reads::may_answer(&meta, true)).await;
    led.map_err(|_| unavailable())?.map_err(|_| unavailable())?;
    is_there(node, broker, incarnation).await?;
    let command = command::put_broker(PutBroker {
        broker: asked.broker,
        name: asked.name.into_bytes().into(),
        peer: asked.peer.into_bytes().into(),
        api: asked.api.into_bytes().into(),
        incarnation: asked.incarnation,
    });
    let outcome = router::propose_once(node, META_SHARD, command::encode(&command)).await?;
    match outcome.refusal() {
        None => {
            tracing::warn!(%broker, %incarnation, "another directory takes the place of a lost one");
            Ok(incarnation)
        }
        Some(refusal) => Err(refusal),
    }
}

/// Gives the meta shard of a new cluster its first members, unless it turns out to have some.
async fn begin_meta(node: &Arc<Node>, hosted: &HostedShard, identity: &Identity) {
    loop {
        if !matches!(hosted.raft.is_initialized().await, Ok(false)) {
            return;
        }
        let told = ask_all(node).await;
        if told.iter().any(|(_, told)| told.as_ref().is_some_and(|t| t.answer.stage == Stage::Member)) {
            // It began before this one's log was on disk: the others have it.
            return;
        }
        let there =
            |told: &Told| told.answer.cluster_id == identity.cluster_id && told.incarnation == meta::FIRST_INCARNATION;
        if told.iter().all(|(_, told)| told.as_ref().is_some_and(there)) {
            break;
        }
        if !pause(node, AGAIN).await {
            return;
        }
    }
    if let Err(error) = host::begin(hosted, meta::meta_voters(node)).await {
        node.fail(&format!("cannot begin the meta shard: {error}"));
    }
}

/// Tells the others of this directory, if it is new to them; and one whose place is given to a newer one learns it from
/// them, since its own meta shard may get nothing any more. Goes on for as long as the broker runs: a directory may be
/// replaced while its process is alive and nobody can reach it.
async fn announce(node: &Node, own: ReplicaId, cluster_id: &str) {
    let mut strangers: BTreeSet<BrokerId> = others(node).collect();
    loop {
        let mut superseded = false;
        for (peer, told) in ask_all(node).await {
            let Some(told) = told.filter(|told| told.answer.cluster_id == cluster_id) else { continue };
            if told.current > own.incarnation {
                superseded = true;
                if node.links.replaced.note_all(told.replaced, told.current) {
                    replaced::warn(own, told.current);
                }
            }
            if told.current == own.incarnation {
                strangers.remove(&peer);
            } else {
                strangers.insert(peer);
            }
            if told.current > Incarnation(0) && told.current < own.incarnation {
                take_places(node, peer, own, cluster_id).await;
            }
        }
        if superseded {
            // It votes as long as its vote is needed. As the leader it would be in the way: the newer directory may stand
            // at its address, where nobody reaches this one, and only a leader that reaches the newer one lets it in.
            hand_over::all(node).await;
        }
        if !pause(node, if strangers.is_empty() { AGAIN_RARELY } else { AGAIN_LATER }).await {
            return;
        }
    }
}

async fn take_places(node: &Node, through: BrokerId, own: ReplicaId, cluster_id: &str) {
    let Some(configured) = node.config.peers.iter().find(|peer| peer.broker == node.broker) else { return };
    let Some(channel) = node.links.channel(through) else { return };
    node.waits_for("a quorum of the cluster's brokers has not given this directory the places of the lost one");
    let request = AnnounceRequest {
        broker: own.broker.0,
        cluster_id: cluster_id.to_owned(),
        incarnation: own.incarnation.0,
        name: node.config.name.clone(),
        peer: configured.peer_addr.to_string(),
        api: configured.api_addr.to_string(),
    };
    let answer = tokio::time::timeout(JOIN_PATIENCE, PeerClient::new(channel).announce(request)).await;
    if let Ok(Ok(answer)) = answer {
        // What came of it, the next answers tell.
        result(node, through, answer.into_inner());
    }
}
