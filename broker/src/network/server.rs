//! The incoming half between brokers: hands Raft messages to their shard's replica and answers. Must never reorder
//! the appends of one shard, nor vote within one lease of the process's start for a shard that has voted before.

use std::{pin::Pin, sync::Arc};

use futures_util::{FutureExt, Stream, StreamExt, stream::FuturesUnordered};
use stentor_engine::{limits, parking::PARKS_AT_ONCE};
use stentor_proto::{
    ids::{Incarnation, ReplicaId, ShardId},
    internal::{
        AnnounceRequest, IdentifyRequest, IdentifyResponse, JoinRequest, JoinResponse, PeerBatch, PeerError, PeerFrame,
        SnapshotAnswer, SnapshotChunk, join_response, peer_frame::Message, peer_server::Peer,
    },
    v1::Refusal,
};
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use super::{
    codec,
    link::{Lane, batches},
    snapshot,
};
use crate::{join, node::Node, parking, queue::FrameQueue, replaced::REPLACED, shard::HostedShard};

type Outgoing = Pin<Box<dyn Stream<Item = Result<PeerBatch, Status>> + Send>>;
type Work = Pin<Box<dyn Future<Output = Message> + Send>>;

/// The service of the peer port.
pub(crate) struct PeerService {
    pub(crate) node: Arc<Node>,
}

#[tonic::async_trait]
impl Peer for PeerService {
    type ControlStream = Outgoing;
    type AppendStream = Outgoing;

    async fn control(&self, request: Request<Streaming<PeerBatch>>) -> Result<Response<Outgoing>, Status> {
        Ok(Response::new(serve(self.node.clone(), Lane::Control, request.into_inner())))
    }

    async fn append(&self, request: Request<Streaming<PeerBatch>>) -> Result<Response<Outgoing>, Status> {
        Ok(Response::new(serve(self.node.clone(), Lane::Append, request.into_inner())))
    }

    async fn snapshot(&self, request: Request<Streaming<SnapshotChunk>>) -> Result<Response<SnapshotAnswer>, Status> {
        let mut inbound = request.into_inner();
        let announced = snapshot::announced(&mut inbound).await?;
        let shard = self.node.hosted(announced.shard);
        if shard.as_ref().is_some_and(|shard| is_replaced(&self.node, shard, announced.from)) {
            let error = PeerError { reason: REPLACED.into(), message: TAKEN.into() };
            return Ok(Response::new(SnapshotAnswer { vote: None, error: Some(error) }));
        }
        let shard = shard
            .filter(|shard| shard.own == announced.to)
            .ok_or_else(|| Status::not_found("this broker has no such replica"))?;
        shard.idle.wake();
        let answer = snapshot::receive(&self.node.store, &shard.raft, announced, inbound).await?;
        if answer.error.is_none() {
            self.node.metrics.snapshots_received.inc();
        }
        Ok(Response::new(answer))
    }

    async fn identify(&self, request: Request<IdentifyRequest>) -> Result<Response<IdentifyResponse>, Status> {
        Ok(Response::new(join::identify(&self.node, &request.into_inner()).await))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        Ok(joined(join::give_number(&self.node, request.into_inner()).await))
    }

    async fn announce(&self, request: Request<AnnounceRequest>) -> Result<Response<JoinResponse>, Status> {
        Ok(joined(join::give_places(&self.node, request.into_inner()).await))
    }
}

fn joined(result: Result<Incarnation, Refusal>) -> Response<JoinResponse> {
    let result = match result {
        Ok(incarnation) => join_response::Result::Incarnation(incarnation.0),
        Err(refusal) => join_response::Result::Refusal(refusal),
    };
    Response::new(JoinResponse { result: Some(result) })
}

/// One task per incoming stream works for all shards.
fn serve(node: Arc<Node>, lane: Lane, inbound: Streaming<PeerBatch>) -> Outgoing {
    let queue = FrameQueue::new(limits::PEER_QUEUE_BYTES);
    let (own, host) = (node.broker, node.host.clone());
    node.spawn(work(node.clone(), inbound, queue.clone()));
    Box::pin(batches(queue, lane, own, host).map(Ok))
}

async fn work(node: Arc<Node>, mut inbound: Streaming<PeerBatch>, queue: Arc<FrameQueue<PeerFrame>>) {
    let mut in_flight = FuturesUnordered::new();
    let stop = node.stop.clone();
    loop {
        let room = in_flight.len() < limits::PEER_REQUESTS_IN_FLIGHT;
        tokio::select! {
            biased;
            Some(frame) = in_flight.next(), if !in_flight.is_empty() => {
                if !queue.push(frame, limits::PEER_SMALL_FRAME_BYTES) {
                    break;
                }
            }
            () = stop.cancelled() => break,
            batch = next_batch(&mut inbound, &queue), if room => match batch {
                Ok(Some(batch)) => batch.frames.into_iter().for_each(|frame| {
                    if let Some(ready) = begin(&node, frame, &mut in_flight) {
                        queue.push(ready, limits::PEER_SMALL_FRAME_BYTES);
                    }
                }),
                Ok(None) | Err(_) => break,
            },
        }
    }
    queue.close();
}

/// Cancel-safe: nothing is taken before there is room for answers.
async fn next_batch(
    inbound: &mut Streaming<PeerBatch>,
    queue: &FrameQueue<PeerFrame>,
) -> Result<Option<PeerBatch>, Status> {
    queue.room().await;
    inbound.message().await
}

/// Begins the work for one frame. Its future is polled here once, so that the requests of a shard reach its Raft in
/// the order in which they came, whatever the order in which they end.
fn begin<F: Extend<Answering>>(node: &Arc<Node>, frame: PeerFrame, in_flight: &mut F) -> Option<PeerFrame> {
    let PeerFrame { id, shard, from, to, message } = frame;
    let sender = ReplicaId::from_u64(from);
    let message = message?;
    if let Message::Beat(beat) = message {
        node.clocks.heard(sender.broker, beat.wall_ms, Instant::now());
        return None;
    }
    let answer = |message| PeerFrame { id, shard, from: to, to: from, message: Some(message) };
    if let Message::Parked(told) = message {
        if told.parks.len() > PARKS_AT_ONCE {
            return Some(answer(error("MALFORMED", "too many shards at once")));
        }
        return first_poll(Box::pin(parking::told(node, sender.broker, told)), answer, in_flight);
    }
    let hosted = node.hosted(ShardId(shard));
    if hosted.as_ref().is_some_and(|hosted| is_replaced(node, hosted, sender)) {
        return Some(answer(error(REPLACED, TAKEN)));
    }
    let Some(hosted) = hosted.filter(|hosted| hosted.own.to_u64() == to) else {
        return Some(answer(error("NO_REPLICA", "this broker has no such replica")));
    };
    match dispatch(node, hosted, message) {
        Ok(work) => first_poll(work, answer, in_flight),
        Err(refusal) => Some(answer(refusal)),
    }
}

fn first_poll<F: Extend<Answering>>(
    mut work: Work,
    answer: impl Fn(Message) -> PeerFrame,
    in_flight: &mut F,
) -> Option<PeerFrame> {
    match (&mut work).now_or_never() {
        Some(done) => Some(answer(done)),
        None => {
            in_flight.extend([Answering { work, frame: Some(answer(error("", ""))) }]);
            None
        }
    }
}

const PARKED: &str = "this broker keeps the shard parked for its leader, or did less than a lease ago";
const TAKEN: &str = "a newer directory of this broker has its place in the shard";

/// Whether the sender's place in a shard is taken. Placements change first and shards follow, so most messages are
/// answered by the first half.
fn is_replaced(node: &Node, hosted: &HostedShard, sender: ReplicaId) -> bool {
    node.meta.view().is_some_and(|view| view.is_replaced(sender)) && hosted.has_replaced(sender)
}

/// Work under way, with the frame that will carry its answer.
struct Answering {
    work: Work,
    frame: Option<PeerFrame>,
}

impl Future for Answering {
    type Output = PeerFrame;

    fn poll(mut self: Pin<&mut Self>, context: &mut std::task::Context<'_>) -> std::task::Poll<PeerFrame> {
        self.work.as_mut().poll(context).map(|message| {
            let frame = self.frame.take().unwrap_or_default();
            PeerFrame { message: Some(message), ..frame }
        })
    }
}

fn error(reason: &str, message: impl Into<String>) -> Message {
    Message::Error(PeerError { reason: reason.into(), message: message.into() })
}

fn dispatch(node: &Arc<Node>, hosted: Arc<HostedShard>, message: Message) -> Result<Work, Message> {
    let bad = |e: codec::BadMessage| error("MALFORMED", e.to_string());
    let silent = hosted.voted_before && node.within_first_lease();
    let raft = hosted.raft.clone();
    let promised = |message: &Message| {
        matches!(message, Message::Vote(_) | Message::PreVote(_) | Message::Transfer(_))
            && node.links.parking.refuses(hosted.shard)
    };
    // What was on its way when the shard was parked wakes nobody.
    let parked = hosted.idle.is_parked();
    Ok(match message {
        message if promised(&message) => {
            hosted.idle.wake();
            let _ = message;
            return Err(error("PARKED", PARKED));
        }
        Message::Append(request) => {
            let request = codec::decode_append(hosted.shard, request).map_err(bad)?;
            Box::pin(async move {
                let appended = raft.append_entries(request).await;
                if parked {
                    // Not before: a tick that comes first would find a leader who has been silent for long.
                    hosted.idle.wake();
                }
                match appended {
                    Ok(response) => Message::AppendResponse(codec::encode_append_response(&response)),
                    Err(fatal) => error("STOPPED", fatal.to_string()),
                }
            })
        }
        Message::Vote(_) | Message::PreVote(_) | Message::Transfer(_) if silent => {
            return Err(error("FIRST_LEASE", "this broker started less than one lease ago"));
        }
        Message::Vote(request) => {
            let request = codec::decode_vote(&request).map_err(bad)?;
            let (links, shard) = (node.links.clone(), hosted.shard);
            Box::pin(async move {
                let voted = raft.vote(request).await;
                // Parked for its leader since it was asked: nobody may count on the vote.
                if voted.as_ref().is_ok_and(|vote| vote.vote_granted) && links.parking.refuses(shard) {
                    return error("PARKED", PARKED);
                }
                vote_answer(voted)
            })
        }
        Message::PreVote(request) => {
            let request = codec::decode_vote(&request).map_err(bad)?;
            Box::pin(async move { vote_answer(raft.pre_vote(request).await) })
        }
        Message::Transfer(request) => {
            let request = codec::decode_transfer(&request).map_err(bad)?;
            Box::pin(async move {
                match raft.handle_transfer_leader(request).await {
                    Ok(response) => Message::TransferResponse(codec::encode_transfer_response(&response)),
                    Err(fatal) => error("STOPPED", fatal.to_string()),
                }
            })
        }
        _ => return Err(error("UNEXPECTED", "this is no request")),
    })
}

type VoteResult = Result<
    openraft::raft::VoteResponse<stentor_raft_store::types::TypeConfig>,
    openraft::errors::RaftError<stentor_raft_store::types::TypeConfig>,
>;

fn vote_answer(result: VoteResult) -> Message {
    match result {
        Ok(response) => Message::VoteResponse(codec::encode_vote_response(&response)),
        Err(fatal) => error("STOPPED", fatal.to_string()),
    }
}
