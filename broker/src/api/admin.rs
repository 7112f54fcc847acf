//! `stentor.v1.Admin`: what this broker knows of its replicas and of the cluster, moving leaders, verifying bytes. Must
//! never report as fine what it could not reach or read.

use std::{collections::BTreeMap, time::Duration};

use futures_util::{StreamExt, stream};
use openraft::{Instant as _, async_runtime::WatchReceiver};
use stentor_proto::{
    ids::{BrokerId, ReplicaId, ShardId},
    reason::Reason,
    v1::{
        NodeStatus, Problem, ReplicaReport, ShardPosition, ShardStatus, ShardsRequest, ShardsResponse, StatusRequest,
        StatusResponse, TransferLeaderRequest, TransferLeaderResponse, VerifyLocalRequest, VerifyLocalResponse,
        admin_client::AdminClient, admin_server::Admin,
    },
};
use stentor_raft_store::ReadError;
use stentor_transport::{grpc, tls::ClientTls};
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::{Api, because, refused};
use crate::{
    config::PeerConfig, membership, meta::MetaView, node::Node, parking, raft::LEASE, shard::HostedShard, status,
};

/// How long another broker may take to tell its state.
const PEER_PATIENCE: Duration = Duration::from_secs(2);
/// How long a transfer may take before it is told as failed.
const TRANSFER_PATIENCE: Duration = Duration::from_secs(5);
/// The longest that a verification waits for a position.
const VERIFY_WAIT: Duration = Duration::from_secs(60);

#[tonic::async_trait]
impl Admin for Api {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.admin(&request)?;
        let view = self.node.meta.view().ok_or_else(|| because(Reason::Unavailable))?;
        let metadata = request.metadata().clone();
        let told = stream::iter(self.node.config.peers.clone())
            .map(|peer| self.shards_of(peer, metadata.clone()))
            .buffered(self.node.config.peers.len().max(1));
        let told: Vec<(PeerConfig, Option<Vec<ShardStatus>>)> = told.collect().await;
        Ok(Response::new(merged(&view, &told)))
    }

    async fn shards(&self, request: Request<ShardsRequest>) -> Result<Response<ShardsResponse>, Status> {
        self.admin(&request)?;
        Ok(Response::new(ShardsResponse { shards: self.local_shards()? }))
    }

    async fn transfer_leader(
        &self,
        request: Request<TransferLeaderRequest>,
    ) -> Result<Response<TransferLeaderResponse>, Status> {
        self.admin(&request)?;
        let metadata = request.metadata().clone();
        let asked = request.into_inner();
        let view = self.node.meta.view().ok_or_else(|| because(Reason::Unavailable))?;
        let shard = ShardId(asked.shard);
        let hosted = self.node.hosted(shard).ok_or_else(|| because(Reason::UnknownShard))?;
        let known = hosted.leadership();
        if !known.leads {
            let leader = known.leader.ok_or_else(|| because(Reason::Unavailable))?;
            return self.forward_transfer(leader.broker, asked, metadata).await;
        }
        let unknown = || refused(Reason::Malformed.with(format!("shard {shard} has no voter `{}`", asked.broker)));
        let target = hosted.raft.voter_ids().find(|id| view.broker_name(id.broker) == asked.broker);
        transfer(&self.node, &hosted, target.ok_or_else(unknown)?).await?;
        Ok(Response::new(TransferLeaderResponse { leader: asked.broker }))
    }

    async fn verify_local(
        &self,
        request: Request<VerifyLocalRequest>,
    ) -> Result<Response<VerifyLocalResponse>, Status> {
        self.admin(&request)?;
        let asked = request.into_inner();
        let wait = Duration::from_millis(asked.wait_ms.into()).min(VERIFY_WAIT);
        let deadline = tokio::time::Instant::now() + wait;
        let at: BTreeMap<u32, u64> =
            asked.at.iter().map(|&ShardPosition { shard, applied_index }| (shard, applied_index)).collect();
        let (node, broker) = (self.node.config.name.clone(), self.node.broker.0);
        let mut response = VerifyLocalResponse { node, broker, ..Default::default() };
        for hosted in self.node.all_hosted().iter() {
            if !at.is_empty() && !at.contains_key(&hosted.shard.0) {
                continue;
            }
            let position = at.get(&hosted.shard.0).copied().unwrap_or(0);
            match verify(hosted, position, deadline).await {
                Ok(report) => response.replicas.push(report),
                Err((kind, what)) => response.problems.push(Problem {
                    kind: kind.into(),
                    node: self.node.config.name.clone(),
                    shard: hosted.shard.0,
                    what,
                }),
            }
        }
        for shard in at.keys().filter(|&&shard| self.node.hosted(ShardId(shard)).is_none()) {
            response.problems.push(Problem {
                kind: "missing".into(),
                node: self.node.config.name.clone(),
                shard: *shard,
                what: "this broker has no replica of the shard".into(),
            });
        }
        Ok(Response::new(response))
    }
}

impl Api {
    fn local_shards(&self) -> Result<Vec<ShardStatus>, Status> {
        let view = self.node.meta.view().ok_or_else(|| because(Reason::Unavailable))?;
        let durable = |shard| self.node.store.position(shard).and_then(|position| position.durable);
        let all = self.node.all_hosted();
        Ok(all
            .iter()
            .map(|hosted| shard_status(&self.node, &view, hosted, durable(hosted.shard).map_or(0, |id| id.index)))
            .collect())
    }

    /// What a broker tells of its replicas; `None` when it cannot be asked.
    async fn shards_of(&self, peer: PeerConfig, metadata: MetadataMap) -> (PeerConfig, Option<Vec<ShardStatus>>) {
        if peer.broker == self.node.broker {
            let shards = self.local_shards().ok();
            return (peer, shards);
        }
        let shards = async {
            let mut client = self.peer_api(&peer)?;
            let answer =
                client.shards(Request::from_parts(metadata, Default::default(), ShardsRequest {})).await.ok()?;
            Some(answer.into_inner().shards)
        };
        let shards = tokio::time::timeout(PEER_PATIENCE, shards).await.ok().flatten();
        (peer, shards)
    }

    fn peer_api(&self, peer: &PeerConfig) -> Option<AdminClient<grpc::Channel>> {
        let tls = ClientTls::public(&self.node.config.tls.ca).ok()?;
        Some(AdminClient::new(self.node.host.channel(peer.api_addr, &tls).ok()?))
    }

    async fn forward_transfer(
        &self,
        leader: BrokerId,
        asked: TransferLeaderRequest,
        metadata: MetadataMap,
    ) -> Result<Response<TransferLeaderResponse>, Status> {
        const FORWARDED: &str = "stentor-forwarded";
        let unavailable = || because(Reason::Unavailable);
        // Two brokers that take each other for the leader must not pass a call to and fro.
        if metadata.contains_key(FORWARDED) {
            return Err(unavailable());
        }
        let mut metadata = metadata;
        metadata.insert(FORWARDED, tonic::metadata::MetadataValue::from_static("1"));
        let peer = self.node.config.peers.iter().find(|p| p.broker == leader).ok_or_else(unavailable)?;
        let mut client = self.peer_api(peer).ok_or_else(unavailable)?;
        let answer = client.transfer_leader(Request::from_parts(metadata, Default::default(), asked)).await;
        answer.map_err(|status| match status::to_refusal(&status) {
            None if status::may_have_happened(&status) => because(Reason::OutcomeUnknown),
            None => unavailable(),
            Some(refusal) => refused(refusal),
        })
    }
}

fn shard_status(node: &Node, view: &MetaView, hosted: &HostedShard, durable_checkpoint: u64) -> ShardStatus {
    let metrics = hosted.raft.metrics().borrow_watched().clone();
    let name = |id: &ReplicaId| view.broker_name(id.broker);
    let acked = metrics.last_quorum_acked.as_ref().is_some_and(|at| at.elapsed() < LEASE)
        || !node.links.parking.lease_left(hosted.shard).is_zero();
    let known = hosted.leadership();
    let placement = view.slots.shard(hosted.shard);
    let voters: Vec<_> = metrics.membership_config.voter_ids().collect();
    let learners: Vec<_> = metrics.membership_config.membership().learner_ids().collect();
    ShardStatus {
        shard: hosted.shard.0,
        leader: known.leader.map(|leader| name(&leader)).unwrap_or_default(),
        term: known.term,
        last_log_index: metrics.last_log_index.unwrap_or(0),
        applied_index: metrics.last_applied.map_or(0, |id| id.index),
        quorum: if known.leads { acked } else { known.leader.is_some() },
        voters: voters.iter().map(name).collect(),
        learners: learners.iter().map(name).collect(),
        voter_ids: voters.iter().map(|id| id.broker.0).collect(),
        learner_ids: learners.iter().map(|id| id.broker.0).collect(),
        durable_checkpoint,
        initialized: placement.is_some_and(|p| p.initialized),
        settled: membership::is_settled(view, hosted),
    }
}

/// One picture of what all brokers told. A shard is as its leader tells it; without one, as the replica of the highest
/// term does, and then it has no quorum.
fn merged(view: &MetaView, told: &[(PeerConfig, Option<Vec<ShardStatus>>)]) -> StatusResponse {
    let mut shards: BTreeMap<u32, ShardStatus> = BTreeMap::new();
    for (peer, statuses) in told {
        for status in statuses.iter().flatten() {
            let leads = status.leader == peer.name;
            let rank = |status: &ShardStatus, leads: bool| (leads, status.term);
            let known = shards.get(&status.shard);
            if known.is_none_or(|known| rank(status, leads) > rank(known, known.quorum)) {
                shards.insert(status.shard, ShardStatus { quorum: leads && status.quorum, ..status.clone() });
            }
        }
    }
    let nodes = told.iter().map(|(peer, statuses)| {
        let of = |status: &ShardStatus| {
            let last = shards.get(&status.shard).map_or(0, |leader| leader.last_log_index);
            last.saturating_sub(status.applied_index)
        };
        let leaders = shards.values().filter(|shard| shard.leader == peer.name && shard.quorum).count();
        NodeStatus {
            name: peer.name.clone(),
            role: "broker".into(),
            state: if statuses.is_some() { "up" } else { "unreachable" }.into(),
            leaders: leaders as u32,
            lag: statuses.iter().flatten().map(of).max().unwrap_or(0),
            api: peer.api_addr.to_string(),
        }
    });
    StatusResponse {
        cluster_id: view.cluster_id.clone(),
        placement_version: view.version(),
        nodes: nodes.collect(),
        shards: shards.values().cloned().collect(),
    }
}

async fn transfer(node: &Node, hosted: &HostedShard, target: ReplicaId) -> Result<(), Status> {
    if target == hosted.own {
        return Ok(());
    }
    parking::settle(node, [hosted]).await;
    hosted.raft.trigger().transfer_leader(target).await.map_err(|_| because(Reason::Unavailable))?;
    let mut leadership = hosted.leadership.clone();
    let moved = leadership.wait_for(|known| known.leader == Some(target));
    match tokio::time::timeout(TRANSFER_PATIENCE, moved).await {
        Ok(Ok(_)) => Ok(()),
        _ => {
            Err(refused(Reason::OutcomeUnknown.with("the leader has not moved yet; it may still, or stay where it is")))
        }
    }
}

async fn verify(
    hosted: &HostedShard,
    position: u64,
    deadline: tokio::time::Instant,
) -> Result<ReplicaReport, (&'static str, String)> {
    let mut applied = hosted.reader.applied();
    let reached = applied.wait_for(|id| id.map_or(0, |id| id.index) >= position);
    if tokio::time::timeout_at(deadline, reached).await.is_err() {
        return Err(("lagging", format!("the replica has not applied entry {position}")));
    }
    match hosted.reader.verify().await {
        Ok(report) => Ok(ReplicaReport {
            shard: hosted.shard.0,
            applied_index: report.applied.map_or(0, |id| id.index),
            chain_hash: report.chain_hash,
            events: report.events,
            rows: report.rows,
            state_hash: report.state_hash,
        }),
        Err(ReadError::Damaged(what)) => Err(("damaged", what)),
        Err(ReadError::Contradiction(what)) => Err(("contradiction", what)),
        Err(error) => Err(("unreadable", error.to_string())),
    }
}

#[cfg(test)]
#[path = "admin_tests.rs"]
mod tests;
