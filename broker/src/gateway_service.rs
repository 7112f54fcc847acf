//! The internal service for gateways (and for brokers that forward): one stream per pair carries proposals, interest
//! and reads of all sessions. Must never answer for a shard that this broker does not lead, nor propose what was not
//! checked.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt, stream::FuturesUnordered};
use openraft::Instant as _;
use stentor_engine::{access, command, key::Entity, limits, rows::Row};
use stentor_proto::{
    Bytes, Message,
    ids::{AppId, ConversationId, META_SHARD, ShardId, UserId},
    internal::{
        AttachHello, BrokerBatch, BrokerFrame, Command, DropInterest, GatewayBatch, Heads, HeadsDone, Interest,
        InterestState, Lookup, LookupDone, PlacementView, Propose, Proposed, Read, ReadDone, Registered,
        WatchPlacementRequest, broker_frame::Frame as Out, broker_server::Broker, gateway_frame::Frame as In,
        interest_state, lookup_done, proposed, read_done,
    },
    reason::Reason,
};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    batcher::{NotProposed, Reply, not_leader},
    interest::{Attached, Generation, Topic},
    meta,
    node::Node,
    queue::{Batches, FrameQueue},
    raft::READ_LEASE,
    reads::{self, Found, NotRead},
    shard::HostedShard,
};

type Outgoing<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Changes of leaders are told together.
const LEADERS_SETTLE: Duration = Duration::from_millis(100);

/// The service of the peer port.
pub(crate) struct GatewayService {
    pub(crate) node: Arc<Node>,
}

#[tonic::async_trait]
impl Broker for GatewayService {
    type AttachStream = Outgoing<BrokerBatch>;
    type WatchPlacementStream = Outgoing<PlacementView>;

    async fn attach(&self, request: Request<Streaming<GatewayBatch>>) -> Result<Response<Self::AttachStream>, Status> {
        let stream = Attached::new("a caller".into());
        let outgoing = Batches::of(stream.queue.clone()).map(|frames| Ok(BrokerBatch { frames }));
        self.node.spawn(serve(self.node.clone(), request.into_inner(), stream));
        Ok(Response::new(Box::pin(outgoing)))
    }

    async fn watch_placement(
        &self,
        request: Request<WatchPlacementRequest>,
    ) -> Result<Response<Self::WatchPlacementStream>, Status> {
        let cluster_id = request.into_inner().cluster_id;
        let node = self.node.clone();
        let views = futures_util::stream::unfold((node, cluster_id, None), async |(node, cluster_id, last)| {
            let view = next_placement(&node, last).await?;
            if !cluster_id.is_empty() && cluster_id != view.cluster_id {
                let refused = Status::failed_precondition(Reason::WrongCluster.code());
                return Some((Err(refused), (node, cluster_id, Some(view))));
            }
            Some((Ok(view.clone()), (node, cluster_id, Some(view))))
        });
        Ok(Response::new(Box::pin(views)))
    }
}

/// The next placement that differs from the last one told; `None` when the broker stops.
async fn next_placement(node: &Node, last: Option<PlacementView>) -> Option<PlacementView> {
    let (mut changes, mut leaders) = (node.meta.watch(), node.leaders.subscribe());
    loop {
        leaders.mark_unchanged();
        let view = changes.borrow_and_update().clone();
        if let Some(view) = view {
            let now = view.to_proto(meta::leader_hints(node));
            if last.as_ref() != Some(&now) {
                return Some(now);
            }
        }
        tokio::select! {
            changed = changes.changed() => changed.ok()?,
            changed = leaders.changed() => {
                changed.ok()?;
                // Elections come in crowds, and all shards are told each time.
                tokio::time::sleep(LEADERS_SETTLE).await;
            }
            () = node.stop.cancelled() => return None,
        }
    }
}

type Work = Pin<Box<dyn Future<Output = Out> + Send>>;

async fn serve(node: Arc<Node>, mut inbound: Streaming<GatewayBatch>, stream: Arc<Attached>) {
    node.metrics.gateways.inc();
    let mut session = Session { node: node.clone(), stream: stream.clone(), greeted: false };
    let mut work: FuturesUnordered<Work> = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            Some(out) = work.next(), if !work.is_empty() => answer(&stream, out),
            () = node.stop.cancelled() => break,
            batch = next_batch(&mut inbound, &stream.queue), if work.len() < limits::GATEWAY_CALLS_IN_FLIGHT => {
                let Ok(Some(batch)) = batch else { break };
                let frames = batch.frames.into_iter().filter_map(|frame| frame.frame);
                if frames.map(|frame| session.frame(frame, &mut work)).any(|fine| !fine) {
                    break;
                }
            }
        }
    }
    stream.queue.close();
    for hosted in node.all_hosted().iter() {
        hosted.effects.interest.forget(&stream);
    }
    tracing::debug!(caller = stream.name, "a stream ended");
    node.metrics.gateways.dec();
}

/// Cancel-safe: nothing is taken before there is room for answers.
async fn next_batch(
    inbound: &mut Streaming<GatewayBatch>,
    queue: &FrameQueue<BrokerFrame>,
) -> Result<Option<GatewayBatch>, Status> {
    queue.room().await;
    inbound.message().await
}

fn answer(stream: &Attached, out: Out) {
    let bytes = BrokerFrame { frame: Some(out.clone()) }.encoded_len();
    stream.answer(out, bytes);
}

struct Session {
    node: Arc<Node>,
    stream: Arc<Attached>,
    greeted: bool,
}

impl Session {
    /// False: the stream must end.
    fn frame(&mut self, frame: In, work: &mut FuturesUnordered<Work>) -> bool {
        match frame {
            In::Hello(hello) => return self.hello(&hello),
            _ if !self.greeted => return false,
            In::Propose(propose) => self.propose(propose),
            In::Interest(interest) => self.register(interest, work),
            In::DropInterest(interest) => self.drop_interest(&interest),
            In::Read(_) | In::Heads(_) | In::Lookup(_) => {
                let node = self.node.clone();
                work.push(Box::pin(async move { call(&node, frame).await }));
            }
        }
        true
    }

    fn hello(&mut self, hello: &AttachHello) -> bool {
        let ours = self.node.store.identity().map(|identity| identity.cluster_id);
        let fits = hello.cluster_id.is_empty() || ours.as_ref() == Some(&hello.cluster_id);
        if fits {
            self.greeted = true;
            tracing::debug!(caller = hello.gateway, "attached");
        } else if ours.is_none() {
            tracing::debug!(caller = hello.gateway, "this directory has no cluster yet");
        } else {
            tracing::warn!(caller = hello.gateway, theirs = hello.cluster_id, ?ours, "of another cluster");
        }
        fits
    }

    fn propose(&self, propose: Propose) {
        let Propose { id, shard, command, .. } = propose;
        let placement_version = self.node.meta.view().map_or(0, |view| view.version());
        let reply = Reply::Stream { stream: self.stream.clone(), id, placement_version };
        match checked(&self.node, ShardId(shard), &command) {
            Ok((hosted, outcomes)) => hosted.proposer.propose(command, outcomes, reply),
            Err(Unfit::NotHere) => reply.answer(Err(NotProposed::NotLeader { leader: None, retry_here: false })),
            Err(Unfit::Refused(reason)) => {
                let result = Some(proposed::Result::Refusal(reason.refusal()));
                self.stream.answer(Out::Proposed(Proposed { id, result }), 64);
            }
        }
    }

    /// Registers interest now, in the order of the stream's frames, and reads the head later: whatever is applied in
    /// between comes as live.
    fn register(&self, interest: Interest, work: &mut FuturesUnordered<Work>) {
        match self.begin_interest(&interest) {
            Ok(begun) => work.push(Box::pin(registered(self.node.clone(), self.stream.clone(), interest, begun))),
            Err(error) => answer(&self.stream, interest_state(&self.node, interest.id, Err(error))),
        }
    }

    fn begin_interest(&self, interest: &Interest) -> Result<Begun, NotRead> {
        AppId::check(interest.app.as_bytes()).map_err(|_| Reason::BadId)?;
        if interest.user.is_empty() {
            ConversationId::check(interest.conversation.as_bytes()).map_err(|_| Reason::BadId)?;
        } else {
            UserId::check(interest.user.as_bytes()).map_err(|_| Reason::BadId)?;
        }
        let elsewhere = NotRead::NotLeader { leader: None, retry_here: false };
        let hosted = self.node.hosted(ShardId(interest.shard)).ok_or(elsewhere)?;
        let term = hosted.leadership().term;
        let topic = topic(&interest.app, &interest.conversation, &interest.user);
        let generation = hosted.effects.interest.add(&self.stream, topic).ok_or(Reason::Overloaded)?;
        Ok(Begun { hosted, term, generation })
    }

    fn drop_interest(&self, interest: &DropInterest) {
        if let Some(hosted) = self.node.hosted(ShardId(interest.shard)) {
            let topic = topic(&interest.app, &interest.conversation, &interest.user);
            hosted.effects.interest.remove(&self.stream, topic);
        }
    }
}

/// What a frame's interest is in: a user, or without one a conversation.
fn topic<'a>(app: &'a str, conversation: &'a str, user: &'a str) -> Topic<'a> {
    if user.is_empty() { Topic::conversation(app, conversation) } else { Topic::user(app, user) }
}

/// Why a command is not put into the batcher.
pub(crate) enum Unfit {
    /// The shard, or the command's slot, is elsewhere.
    NotHere,
    /// Nobody may propose it.
    Refused(Reason),
}

/// Checks a command that came from another process, and that it belongs to this shard. With how many outcomes it will
/// have.
pub(crate) fn checked(node: &Node, shard: ShardId, command: &Bytes) -> Result<(Arc<HostedShard>, usize), Unfit> {
    let decoded = Command::decode(command.clone()).map_err(|_| Unfit::Refused(Reason::Malformed))?;
    command::check(&decoded).map_err(Unfit::Refused)?;
    let hosted = node.hosted(shard).ok_or(Unfit::NotHere)?;
    let fits = match command::target_shard_slot(&decoded) {
        Some(slot) => hosted.slots.contains(&slot.0),
        None => shard == META_SHARD,
    };
    if fits { Ok((hosted, command::outcomes(&decoded))) } else { Err(Unfit::NotHere) }
}

/// Interest that was added and whose head is not read yet.
struct Begun {
    hosted: Arc<HostedShard>,
    term: u64,
    generation: Generation,
}

async fn registered(node: Arc<Node>, stream: Arc<Attached>, interest: Interest, begun: Begun) -> Out {
    let Interest { id, app, conversation, user, .. } = interest;
    let Begun { hosted, term, generation } = begun;
    let topic = topic(&app, &conversation, &user);
    let head =
        if user.is_empty() { head(&hosted, &app, &conversation).await } else { user_head(&hosted, &app, &user).await };
    let leads = hosted.effects.leading() == term && !stream.queue.is_closed();
    let result = match head {
        Ok(head) if leads => Ok(Registered { head, term }),
        Ok(_) => Err(NotRead::NotLeader { leader: hosted.leadership().elsewhere(), retry_here: false }),
        Err(error) => Err(error),
    };
    if result.is_err() {
        hosted.effects.interest.withdraw(&stream, topic, generation);
    }
    interest_state(&node, id, result)
}

fn interest_state(node: &Node, id: u64, result: Result<Registered, NotRead>) -> Out {
    let version = node.meta.view().map_or(0, |view| view.version());
    let result = match result {
        Ok(registered) => interest_state::Result::Registered(registered),
        Err(NotRead::NotLeader { leader, retry_here }) => {
            interest_state::Result::NotLeader(not_leader(leader, retry_here, version))
        }
        Err(NotRead::Refused(refusal)) => interest_state::Result::Refusal(refusal),
    };
    Out::Interest(InterestState { id, result: Some(result) })
}

async fn head(hosted: &HostedShard, app: &str, conversation: &str) -> Result<u64, NotRead> {
    reads::may_answer(hosted, false).await?;
    match hosted.reader.row(&Entity::conversation(app, conversation).head()).await? {
        Some(Row::Conversation(row)) => Ok(access::View::admin(row).head().0),
        _ => Err(Reason::UnknownConversation.into()),
    }
}

async fn user_head(hosted: &HostedShard, app: &str, user: &str) -> Result<u64, NotRead> {
    reads::may_answer(hosted, false).await?;
    Ok(reads::user_head(hosted, &Entity::user(app, user)).await?.0)
}

/// Answers a read, for a gateway's stream or for a call of this broker.
pub(crate) async fn call(node: &Node, frame: In) -> Out {
    match frame {
        In::Read(read) => Out::Read(page(node, read).await),
        In::Heads(heads) => Out::Heads(states(node, heads).await),
        In::Lookup(lookup) => Out::Lookup(look(node, lookup).await),
        // Frames without an answer never come here.
        _ => Out::Proposed(Proposed::default()),
    }
}

fn led(node: &Node, shard: u32) -> Result<Arc<HostedShard>, NotRead> {
    node.hosted(ShardId(shard)).ok_or(NotRead::NotLeader { leader: None, retry_here: false })
}

async fn page(node: &Node, read: Read) -> ReadDone {
    let page = match led(node, read.shard) {
        Ok(hosted) => reads::page(&hosted, &read).await,
        Err(e) => Err(e),
    };
    node.metrics.pages.inc();
    let version = node.meta.view().map_or(0, |view| view.version());
    let result = match page {
        Ok(page) => read_done::Result::Page(page),
        Err(NotRead::NotLeader { leader, retry_here }) => {
            read_done::Result::NotLeader(not_leader(leader, retry_here, version))
        }
        Err(NotRead::Refused(refusal)) => read_done::Result::Refusal(refusal),
    };
    ReadDone { id: read.id, result: Some(result) }
}

async fn states(node: &Node, heads: Heads) -> HeadsDone {
    let states = match led(node, heads.shard) {
        Ok(hosted) => reads::heads(&hosted, &heads).await,
        Err(e) => Err(e),
    };
    let version = node.meta.view().map_or(0, |view| view.version());
    let done = HeadsDone { id: heads.id, ..Default::default() };
    match states {
        Ok(states) => HeadsDone { states, ..done },
        Err(NotRead::NotLeader { leader, retry_here }) => {
            HeadsDone { not_leader: Some(not_leader(leader, retry_here, version)), ..done }
        }
        Err(NotRead::Refused(refusal)) => HeadsDone { refusal: Some(refusal), ..done },
    }
}

async fn look(node: &Node, lookup: Lookup) -> LookupDone {
    let found = match led(node, lookup.shard) {
        Ok(hosted) => reads::lookup(&hosted, &lookup).await,
        Err(e) => Err(e),
    };
    let version = node.meta.view().map_or(0, |view| view.version());
    let result = match found {
        Ok(Found::Conversations(state)) => lookup_done::Result::Conversations(state),
        Ok(Found::Show(show)) => lookup_done::Result::Show(show),
        Err(NotRead::NotLeader { leader, retry_here }) => {
            lookup_done::Result::NotLeader(not_leader(leader, retry_here, version))
        }
        Err(NotRead::Refused(refusal)) => lookup_done::Result::Refusal(refusal),
    };
    LookupDone { id: lookup.id, result: Some(result) }
}

/// Tells interested streams regularly which shards this broker leads, and ends them where its lease has ended.
pub(crate) async fn beats(node: Arc<Node>) {
    let mut every = tokio::time::interval(Duration::from_millis(limits::SHARD_BEAT_MS));
    loop {
        tokio::select! {
            _ = every.tick() => {}
            () = node.stop.cancelled() => return,
        }
        let parking = &node.links.parking;
        let ticking = parking.ticking(&node);
        let leads = ticking.iter().filter(|hosted| hosted.leadership().leads).count();
        node.metrics.leaders.set((leads + parking.leaders()) as i64);
        let watched: Vec<ShardId> = node.watched.lock().iter().copied().collect();
        for hosted in watched.into_iter().filter_map(|shard| node.hosted(shard)) {
            let Ok(leader) = hosted.raft.as_leader() else { continue };
            let term = leader.term();
            let acked = leader.last_quorum_acked().map(|at| READ_LEASE.saturating_sub(at.elapsed()));
            let left = acked.unwrap_or_default().max(parking.lease_left(hosted.shard));
            match left.as_millis() as u32 {
                0 => hosted.effects.interest.close(term),
                left => hosted.effects.interest.beat(term, left),
            }
        }
    }
}
