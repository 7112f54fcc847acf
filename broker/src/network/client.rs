//! openraft's way to a peer's replica: many append requests in flight per shard, answered in order; votes and
//! heartbeats on a lane of their own. Must never answer for a peer that did not: no answer is an error, and none is
//! handed on that openraft would take for more than was answered.

use std::{collections::VecDeque, future::Future, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use openraft::{
    EmptyNode, RPCTypes, RaftNetworkFactory, RaftNetworkV2,
    base::{BoxFuture, BoxStream},
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
        TransferLeaderResponse, VoteRequest, VoteResponse,
    },
};
use stentor_engine::limits;
use stentor_proto::{
    ids::{ReplicaId, ShardId},
    internal::{self, peer_frame::Message},
};
use stentor_raft_store::{
    SnapshotRows,
    types::{RaftLogId, TypeConfig, Vote},
};
use tokio::{sync::mpsc, time::Instant};

use super::{
    Links,
    codec::{self, BadMessage},
    link::{Answer, Lane, Link, LinkError, Route},
    snapshot,
};

type Error = RPCError<TypeConfig>;
type AppendStream<'s> = BoxStream<'s, Result<StreamAppendResult<TypeConfig>, Error>>;

/// How long an append may stay unanswered on a living stream. A slow disk takes seconds for an fsync; a dead peer is
/// found by the stream's own keep-alive long before.
const APPEND_PATIENCE: Duration = Duration::from_secs(10);

/// How long news of what is committed may wait for entries that carry it along: alone they would wake a follower, and
/// its answer the leader, once more for each entry. Whoever follows applies so much later at most; what waits for that
/// there (the picture of the cluster, parking, `verify`) does so for hundreds of milliseconds.
const COMMIT_NEWS: Duration = Duration::from_millis(5);
/// By so much openraft may count a lease from a later moment than that from which the follower keeps it; whoever rests on
/// a lease takes it for shorter ([`crate::raft::READ_LEASE`]). As long as fsyncs take less, no answer waits for it.
const AHEAD: Duration = Duration::from_millis(crate::raft::LEASE.as_millis() as u64 / 10);

/// Makes the ways to the peers of one shard's replica.
#[derive(Clone)]
pub(crate) struct Factory {
    pub(crate) shard: ShardId,
    pub(crate) own: ReplicaId,
    pub(crate) links: Arc<Links>,
}

impl Factory {
    fn way(&self, target: ReplicaId, lane: Lane) -> Way {
        Way { route: Route { shard: self.shard, from: self.own, to: target }, lane, links: self.links.clone() }
    }
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Way;

    async fn new_client(&mut self, target: ReplicaId, _node: &EmptyNode) -> Way {
        self.way(target, Lane::Append)
    }

    async fn new_heartbeat_client(&mut self, target: ReplicaId, _node: &EmptyNode) -> Way {
        self.way(target, Lane::Control)
    }
}

/// From one replica to another.
pub(crate) struct Way {
    route: Route,
    lane: Lane,
    links: Arc<Links>,
}

impl Way {
    fn link(&self, lane: Lane) -> Result<Arc<Link>, Error> {
        let peer = self.route.to.broker;
        self.links.link(peer, lane).ok_or_else(|| {
            RPCError::Unreachable(Unreachable::from_string(format!("broker {peer} is not in this broker's config")))
        })
    }

    /// Not while this process has promised a leader that it keeps the shard parked.
    fn may_ask_for_votes(&self) -> Result<(), Error> {
        if self.links.parking.refuses(self.route.shard) {
            return Err(RPCError::Unreachable(Unreachable::from_string("parked less than one lease ago")));
        }
        Ok(())
    }

    async fn ask(&self, message: Message, action: RPCTypes, option: &RPCOption) -> Result<Message, Error> {
        let link = self.link(Lane::Control)?;
        let timeout = option.soft_ttl();
        match tokio::time::timeout(timeout, link.ask(self.route, message)).await {
            Ok(answer) => answer.map_err(rpc_error),
            Err(_) => Err(self.timed_out(action, timeout)),
        }
    }

    fn timed_out(&self, action: RPCTypes, timeout: Duration) -> Error {
        RPCError::Timeout(Timeout { action, id: self.route.from, target: self.route.to, timeout })
    }
}

fn rpc_error(error: LinkError) -> Error {
    match error {
        LinkError::Broken(_) => RPCError::Network(NetworkError::new(&error)),
        // A peer that is away or refuses will do so again: back off.
        LinkError::NotConnected(_) | LinkError::Refused(..) => RPCError::Unreachable(Unreachable::new(&error)),
    }
}

fn bad(message: &BadMessage) -> Error {
    RPCError::Unreachable(Unreachable::new(message))
}

impl RaftNetworkV2<TypeConfig> for Way {
    type SnapshotData = SnapshotRows;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, Error> {
        let mut answers = self.stream_append(stream::iter([rpc]), option).await?;
        match answers.next().await {
            // The stream cuts large requests, so what was acknowledged is said and not assumed.
            Some(Ok(Ok(last))) => Ok(AppendEntriesResponse::PartialSuccess(last)),
            Some(Ok(Err(e))) => Ok(AppendEntriesResponse::from(Err(e))),
            Some(Err(e)) => Err(e),
            None => Err(RPCError::Network(NetworkError::from_string("no answer"))),
        }
    }

    fn stream_append<'s, S>(&'s mut self, input: S, option: RPCOption) -> BoxFuture<'s, Result<AppendStream<'s>, Error>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        let patience = match self.lane {
            // openraft itself gives a heartbeat up after this time.
            Lane::Control => option.hard_ttl(),
            Lane::Append => APPEND_PATIENCE,
        };
        Box::pin(async move {
            let answers: AppendStream<'s> = match self.link(self.lane) {
                Ok(link) => Box::pin(stream::unfold(Session::new(self, link, input, patience), Session::next)),
                Err(error) => Box::pin(after_first(input, error)),
            };
            Ok(answers)
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Error> {
        self.may_ask_for_votes()?;
        match self.ask(Message::Vote(codec::encode_vote(&rpc)), RPCTypes::Vote, &option).await? {
            Message::VoteResponse(response) => codec::decode_vote_response(&response).map_err(|e| bad(&e)),
            _ => Err(bad(&BadMessage::Unexpected)),
        }
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Error> {
        self.may_ask_for_votes()?;
        match self.ask(Message::PreVote(codec::encode_vote(&rpc)), RPCTypes::Vote, &option).await? {
            Message::VoteResponse(response) => codec::decode_vote_response(&response).map_err(|e| bad(&e)),
            _ => Err(bad(&BadMessage::Unexpected)),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::alias::SnapshotOf<TypeConfig, SnapshotRows>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let channel = self.links.channel(self.route.to.broker).ok_or_else(|| {
            StreamingError::Unreachable(Unreachable::from_string("the peer is not in this broker's config"))
        })?;
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = snapshot::send((channel, &self.links.replaced), self.route, vote, snapshot.snapshot) => sent,
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, Error> {
        let message = Message::Transfer(codec::encode_transfer(&req));
        match self.ask(message, RPCTypes::TransferLeader, &option).await? {
            Message::TransferResponse(response) => codec::decode_transfer_response(&response).map_err(|e| bad(&e)),
            _ => Err(bad(&BadMessage::Unexpected)),
        }
    }
}

/// Fails the first request. openraft waits between its attempts when it makes a request, and nowhere else: an error
/// before that is followed by the next attempt at once, without an end (a leader whose members still have a lost
/// directory of its own broker).
fn after_first<S>(input: S, error: Error) -> impl Stream<Item = Result<StreamAppendResult<TypeConfig>, Error>> + Send
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin,
{
    stream::unfold((input, Some(error)), |(mut input, error)| async move {
        input.next().await?;
        Some((Err(error?), (input, None)))
    })
}

/// One request under way.
struct InFlight {
    id: u64,
    prev: Option<RaftLogId>,
    last: Option<RaftLogId>,
    cut: bool,
    /// News of a commit that goes with the request behind it, whose answer is its own.
    rides: bool,
    bytes: usize,
    /// When openraft made it, or a moment later.
    made: Instant,
    sent: Instant,
    answer: Option<Answer>,
}

/// One run of openraft's replication to one peer: requests go out as they come, answers are handed over in order.
struct Session<'s, S> {
    way: &'s Way,
    link: Arc<Link>,
    input: S,
    input_ended: bool,
    in_flight: VecDeque<InFlight>,
    /// News of commits without entries, and when they were made.
    held: VecDeque<(AppendEntriesRequest<TypeConfig>, Instant)>,
    in_flight_bytes: usize,
    sender: mpsc::UnboundedSender<(u64, Answer)>,
    receiver: mpsc::UnboundedReceiver<(u64, Answer)>,
    patience: Duration,
    ended: bool,
}

impl<'s, S> Session<'s, S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
{
    fn new(way: &'s Way, link: Arc<Link>, input: S, patience: Duration) -> Self {
        // Unbounded, yet bounded by what is in flight: one answer per request.
        let (sender, receiver) = mpsc::unbounded_channel();
        Self {
            way,
            link,
            input,
            input_ended: false,
            in_flight: VecDeque::new(),
            held: VecDeque::new(),
            in_flight_bytes: 0,
            sender,
            receiver,
            patience,
            ended: false,
        }
    }

    async fn next(mut self) -> Option<(Result<StreamAppendResult<TypeConfig>, Error>, Self)> {
        if self.ended {
            return None;
        }
        let step = self.step().await?;
        self.ended = match &step {
            Ok((Ok(_), cut)) => *cut,
            _ => true,
        };
        Some((step.map(|(answer, _)| answer), self))
    }

    /// The next answer, and whether the stream must end after it.
    async fn step(&mut self) -> Option<Result<(StreamAppendResult<TypeConfig>, bool), Error>> {
        loop {
            if let Some(place) = self.due() {
                return self.take_through(place);
            }
            if self.input_ended
                && let Err(error) = self.tell().await
            {
                return Some(Err(rpc_error(error)));
            }
            if self.input_ended && self.in_flight.is_empty() {
                return None;
            }
            let room = self.in_flight.len() + self.held.len() < limits::APPENDS_IN_FLIGHT
                && self.in_flight_bytes < limits::APPEND_BYTES_IN_FLIGHT
                && !self.input_ended
                // What follows a cut request would not fit behind it.
                && !self.in_flight.back().is_some_and(|back| back.cut);
            let waiting = self.in_flight.iter().find(|request| request.answer.is_none());
            let deadline = waiting.map(|request| request.sent + self.patience);
            let held_until = self.held.front().map(|(_, made)| *made + COMMIT_NEWS);
            tokio::select! {
                biased;
                Some((id, answer)) = self.receiver.recv() => self.store(id, answer),
                request = self.input.next(), if room => match request {
                    Some(request) => if let Err(error) = self.take(request).await {
                        return Some(Err(rpc_error(error)));
                    },
                    None => self.input_ended = true,
                },
                () = sleep_until(held_until), if held_until.is_some() => if let Err(error) = self.tell().await {
                    return Some(Err(rpc_error(error)));
                },
                () = sleep_until(deadline), if deadline.is_some() => {
                    return Some(Err(self.way.timed_out(RPCTypes::AppendEntries, self.patience)));
                }
            }
        }
    }

    /// Sends a request, or lets it wait for one that says more.
    async fn take(&mut self, request: AppendEntriesRequest<TypeConfig>) -> Result<(), LinkError> {
        let news_only = request.entries.is_empty() && self.way.lane == Lane::Append;
        let made = Instant::now();
        if !news_only {
            return self.send(&request, made).await;
        }
        self.held.push_back((request, made));
        Ok(())
    }

    /// Sends the newest of what was held, if there is any, for all of it.
    async fn tell(&mut self) -> Result<(), LinkError> {
        match self.held.pop_back() {
            Some((newest, made)) => self.send(&newest, made).await,
            None => Ok(()),
        }
    }

    /// Sends it, with what was held.
    async fn send(&mut self, request: &AppendEntriesRequest<TypeConfig>, made: Instant) -> Result<(), LinkError> {
        let encoded = codec::encode_append(self.way.route.shard, request);
        let (prev, last, cut, bytes) = (encoded.prev, encoded.last, encoded.cut, encoded.bytes);
        let message = Message::Append(encoded.message);
        let id = self.link.send(self.way.route, message, bytes, &self.sender).await?;
        self.in_flight_bytes += bytes;
        let sent = Instant::now();
        for (held, made) in self.held.drain(..) {
            let prev = held.prev_log_id;
            let rider = InFlight { id, prev, last: prev, cut: false, rides: true, bytes: 0, made, sent, answer: None };
            self.in_flight.push_back(rider);
        }
        self.in_flight.push_back(InFlight { id, prev, last, cut, rides: false, bytes, made, sent, answer: None });
        Ok(())
    }

    fn store(&mut self, id: u64, answer: Answer) {
        let mut answer = Some(answer);
        // Riders stand before the request that carries them.
        for request in self.in_flight.iter_mut().filter(|request| request.id == id) {
            self.in_flight_bytes -= std::mem::take(&mut request.bytes);
            request.answer = if request.rides { answer.as_ref().map(rode) } else { answer.take() };
        }
    }

    /// Which answer to hand on next; those before it say nothing that it does not say.
    ///
    /// openraft takes an answer for every request as far as its last entry, news that ends there included, and counts
    /// the lease from when the newest of them was made (`InflightAppendQueue::drain_acked`). So a success waits until
    /// the follower has answered those that were made more than [`AHEAD`] after what it answers was made.
    fn due(&self) -> Option<usize> {
        let whole = self.in_flight.iter().take_while(|request| request.answer.as_ref().is_some_and(is_whole)).count();
        let honest = |place: &usize| {
            let Some(InFlight { last, made: from, .. }) = self.in_flight.get(*place) else { return false };
            let under_way = self.in_flight.iter().skip(whole).map(|request| (request.last, request.made));
            let held = self.held.iter().map(|(news, made)| (news.prev_log_id, *made));
            under_way.chain(held).take_while(|(covered, _)| covered <= last).all(|(_, made)| made <= *from + AHEAD)
        };
        let place = (0..whole).rev().find(honest);
        place.or_else(|| self.in_flight.get(whole)?.answer.as_ref().map(|_| whole))
    }

    /// Takes the requests through the one at `place` away, and hands its answer on.
    fn take_through(&mut self, place: usize) -> Option<Result<(StreamAppendResult<TypeConfig>, bool), Error>> {
        let front = self.in_flight.drain(..=place).next_back()?;
        let answer = match front.answer? {
            Ok(Message::AppendResponse(response)) => {
                codec::decode_append_response(&response, front.prev, front.last).map_err(|e| bad(&e))
            }
            Ok(_) => Err(bad(&BadMessage::Unexpected)),
            Err(error) => Err(rpc_error(error)),
        };
        Some(answer.map(|answer| {
            let partial = answer.as_ref().is_ok_and(|matching| *matching != front.last);
            (answer, front.cut || partial)
        }))
    }
}

impl<S> Drop for Session<'_, S> {
    fn drop(&mut self) {
        let ids: Vec<u64> = self.in_flight.iter().map(|request| request.id).collect();
        self.link.forget(&ids);
    }
}

/// The follower has everything that the request carried.
fn is_whole(answer: &Answer) -> bool {
    use internal::append_response::Result as R;
    matches!(answer, Ok(Message::AppendResponse(response)) if matches!(response.result, Some(R::Success(_))))
}

/// What the answer to a request says of the news that went with it: whoever has a part of its entries has had everything
/// before them.
fn rode(answer: &Answer) -> Answer {
    use internal::append_response::Result as R;
    match answer {
        Ok(Message::AppendResponse(response)) if matches!(response.result, Some(R::Partial(_))) => {
            Ok(Message::AppendResponse(internal::AppendResponse {
                result: Some(R::Success(true)),
                partial_none: false,
            }))
        }
        answer => answer.clone(),
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    if let Some(deadline) = deadline {
        tokio::time::sleep_until(deadline).await;
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
