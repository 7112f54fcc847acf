//! Everything of one shard at this gateway: the route to its leader, the pipe of unanswered proposals, open questions,
//! and which sessions watch which of its conversations. Must never answer for a broker, nor forget what has no answer.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use stentor_engine::{
    effect::Outcome,
    limits,
    route::{Answered, Expired, Pipe, PipeLimits, Route},
};
use stentor_proto::{
    Bytes,
    ids::{AppId, BrokerId, ConversationId, PlacementVersion, Seq, ShardId},
    internal::{
        self, BrokerFrame, GatewayFrame, NotLeader, broker_frame, gateway_frame::Frame, interest_state, lookup_done,
        proposed, read_done,
    },
    reason::Reason,
    v1::Refusal,
};

use crate::{
    fanout::{Begun, Fanout, Named, Place, Slot, Topic},
    inbox::{Answer, Inbox, Purpose, Reply},
    link::Links,
    metrics::Metrics,
    sessions::{SessionPlace, Sessions},
};

/// The shard's number stands in the high bits of every id, so that an answer finds its shard without a table.
const SHARD_SHIFT: u32 = 44;
/// Of an interest's id: the low bits of the epoch stand here, the conversation's slot below.
const EPOCH_SHIFT: u32 = 32;
const EPOCH_MASK: u64 = 0xfff;

/// The shard that an answer's id names.
pub(crate) fn shard_of(id: u64) -> ShardId {
    ShardId((id >> SHARD_SHIFT) as u32)
}

/// Whom an answer is for, and for what.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) purpose: Purpose,
}

impl Ticket {
    pub(crate) fn answer(self, result: Result<Reply, Refusal>) {
        self.inbox.answer(Answer { purpose: self.purpose, result });
    }
}

/// A question that changes nothing and may be asked anywhere, any number of times.
struct Query {
    frame: Frame,
    ticket: Ticket,
    since_ms: u64,
}

/// What a call into the shard needs of the gateway.
pub(crate) struct Around<'a> {
    pub(crate) links: &'a Links,
    pub(crate) metrics: &'a Metrics,
    pub(crate) sessions: &'a Sessions,
    pub(crate) placement: PlacementVersion,
    pub(crate) now_ms: u64,
    /// Longest `Events` message.
    pub(crate) frame_bytes: usize,
}

/// One shard.
pub(crate) struct Shard {
    id: ShardId,
    /// Its own place at this gateway.
    place: u16,
    route: Route,
    pipe: Pipe<Ticket>,
    waiting: VecDeque<Query>,
    asked: BTreeMap<u64, Query>,
    next_query: u64,
    fanout: Fanout,
    /// The broker whose stream carries this shard now.
    attached: Option<BrokerId>,
    /// Counts attachments and re-registrations, so that an answer to an older registration is known as such.
    epoch: u64,
    attached_ms: u64,
    beat_ms: u64,
    term: u64,
    not_before_ms: u64,
    /// (when, slot), in order: registrations that got a retryable refusal, to be tried again. Each has a registration
    /// under way or stands here, so there are no more than slots.
    register_later: VecDeque<(u64, Slot)>,
}

impl Shard {
    /// `place` is its own at this gateway, below [`limits::MAX_SHARDS`].
    pub(crate) fn new(id: ShardId, place: u16) -> Self {
        let first = u64::from(id.0) << SHARD_SHIFT | 1;
        let limits = PipeLimits { entries: limits::PIPE_ENTRIES, bytes: limits::PIPE_BYTES };
        Self {
            id,
            place,
            route: Route::default(),
            pipe: Pipe::new(first, limits),
            waiting: VecDeque::new(),
            asked: BTreeMap::new(),
            next_query: first,
            fanout: Fanout::new(place),
            attached: None,
            epoch: 0,
            attached_ms: 0,
            beat_ms: 0,
            term: 0,
            not_before_ms: 0,
            register_later: VecDeque::new(),
        }
    }

    /// A new placement. An old leader's stream is left when it does not hold the shard any more.
    pub(crate) fn placed(&mut self, replicas: Vec<BrokerId>, leader: Option<BrokerId>, around: &Around<'_>) {
        if self.route.placed(replicas, leader) {
            self.detach(0, around);
        }
        self.flush(around);
    }

    /// Appends proposals in their order; what does not fit gets a retryable refusal.
    pub(crate) fn propose(&mut self, commands: impl Iterator<Item = (Bytes, Ticket)>, around: &Around<'_>) {
        for (command, ticket) in commands {
            if self.pipe.has_room(command.len()) {
                // There is room, so the pipe takes it.
                let _ = self.pipe.push(command, ticket, around.now_ms);
            } else {
                ticket.answer(Err(Reason::Overloaded.refusal()));
            }
        }
        self.flush(around);
    }

    /// Asks a question; its id is filled in here.
    pub(crate) fn ask(&mut self, frame: Frame, ticket: Ticket, around: &Around<'_>) {
        self.waiting.push_back(Query { frame, ticket, since_ms: around.now_ms });
        self.flush(around);
    }

    /// Lets a session watch a topic. Its inbox hears of the head once interest is registered. `None`: there is no place
    /// left.
    pub(crate) fn watch(
        &mut self,
        app: &AppId,
        topic: Topic<'_>,
        session: SessionPlace,
        inbox: &Inbox,
        around: &Around<'_>,
    ) -> Option<Place> {
        let slot = match self.fanout.watch(app, topic, session, inbox) {
            Begun::New(slot) => {
                if self.attached.is_some() {
                    let mut frames = vec![self.interest(slot)];
                    self.out(&mut frames, around);
                }
                slot
            }
            Begun::Joined(slot) => slot,
            Begun::Full => return None,
        };
        self.flush(around);
        Some(Place::new(self.place, slot))
    }

    /// Ends what [`Self::watch`] began; nothing more of it comes to the inbox, nor is left there.
    pub(crate) fn unwatch(&mut self, place: Place, session: SessionPlace, inbox: &Inbox, around: &Around<'_>) {
        let unwatched = self.fanout.unwatch(place.slot(), session);
        inbox.forget(place);
        if let Some(Named { app, conversation, user }) = unwatched.filter(|_| self.attached.is_some()) {
            let drop_interest = internal::DropInterest { shard: self.id.0, app, conversation, user };
            let mut frames = vec![frame(Frame::DropInterest(drop_interest))];
            self.out(&mut frames, around);
        }
    }

    /// Whether a stream that stands at `at` may rest: no news told it otherwise, and none waits for it.
    pub(crate) fn may_rest(&self, place: Place, at: Seq, inbox: &Inbox) -> bool {
        self.fanout.told(place.slot()) == Some(at) && inbox.before(place).is_none()
    }

    /// Where a stream that rests stands.
    pub(crate) fn rests_at(&self, place: Place, inbox: &Inbox) -> Option<Seq> {
        inbox.before(place).or_else(|| self.fanout.told(place.slot()))
    }

    /// The place of a conversation that is watched.
    pub(crate) fn find(&self, app: &AppId, conversation: &str) -> Option<Place> {
        let topic = Topic::Conversation(conversation);
        Some(Place::new(self.place, self.fanout.find(app.as_str(), topic)?))
    }

    /// What is watched at a place.
    pub(crate) fn watched(&self, place: Place) -> Option<(ShardId, ConversationId)> {
        Some((self.id, ConversationId::new(self.fanout.conversation(place.slot())?).ok()?))
    }

    /// A frame of the shard from a broker.
    pub(crate) fn take(&mut self, from: BrokerId, frame: BrokerFrame, around: &Around<'_>) {
        use broker_frame::Frame as F;
        match frame.frame {
            Some(F::Live(live)) => {
                if let Err(bad) = self.fanout.live(live, around) {
                    tracing::warn!(shard = %self.id, broker = %from, error = %bad.error, "unusable live events");
                    self.register_one(bad.slot, around);
                }
            }
            Some(F::Proposed(done)) => self.proposed(from, done, around),
            Some(F::Beat(beat)) => self.beat(from, &beat, around),
            Some(F::Head(hint)) => self.fanout.head(&hint, &around.sessions.read()),
            Some(F::Interest(state)) => self.interest_state(from, state, around),
            Some(F::Read(done)) => {
                let result = done.result.map(|result| match result {
                    read_done::Result::Page(page) => Ok(Reply::Page(page)),
                    read_done::Result::NotLeader(not_leader) => Err(No::Leader(not_leader)),
                    read_done::Result::Refusal(refusal) => Err(No::Refused(refusal)),
                });
                self.queried(from, done.id, result, around);
            }
            Some(F::Heads(done)) => {
                let result = match (done.not_leader, done.refusal) {
                    (Some(not_leader), _) => Err(No::Leader(not_leader)),
                    (_, Some(refusal)) => Err(No::Refused(refusal)),
                    _ => Ok(Reply::Heads(done.states)),
                };
                self.queried(from, done.id, Some(result), around);
            }
            Some(F::Lookup(done)) => {
                let result = done.result.map(|result| match result {
                    lookup_done::Result::Conversations(list) => Ok(Reply::Conversations(list)),
                    lookup_done::Result::Show(show) => Ok(Reply::Show(show)),
                    lookup_done::Result::NotLeader(not_leader) => Err(No::Leader(not_leader)),
                    lookup_done::Result::Refusal(refusal) => Err(No::Refused(refusal)),
                });
                self.queried(from, done.id, result, around);
            }
            None => {}
        }
    }

    /// A broker's stream began: the shard moves there if that is where its leader should be.
    pub(crate) fn link_up(&mut self, broker: BrokerId, around: &Around<'_>) {
        if self.route.target() == Some(broker) {
            self.not_before_ms = around.now_ms;
            self.flush(around);
        }
    }

    /// A broker's stream broke.
    pub(crate) fn link_down(&mut self, broker: BrokerId, around: &Around<'_>) {
        if self.attached == Some(broker) {
            self.lost(broker, around);
        }
    }

    /// Time passes: silent leaders are left, what waited too long gets a retryable refusal.
    pub(crate) fn tick(&mut self, around: &Around<'_>) {
        let before_ms = around.now_ms.saturating_sub(limits::ANSWER_WITHIN_MS);
        let unavailable = || Err(Reason::Unavailable.refusal());
        self.pipe.expire(before_ms, |ticket, expired| match expired {
            Expired::Unsent => ticket.answer(unavailable()),
            Expired::Unknown => ticket.answer(Err(Reason::OutcomeUnknown.refusal())),
        });
        while self.waiting.front().is_some_and(|query| query.since_ms <= before_ms) {
            let Some(query) = self.waiting.pop_front() else { break };
            query.ticket.answer(unavailable());
        }
        while let Some(oldest) = self.asked.first_entry().filter(|entry| entry.get().since_ms <= before_ms) {
            oldest.remove().ticket.answer(unavailable());
        }
        if let Some(broker) = self.attached {
            if self.is_silent(around.now_ms) {
                tracing::info!(shard = %self.id, %broker, "the leader is silent; looking elsewhere");
                self.lost(broker, around);
            } else {
                self.register_again(around);
            }
        }
        self.flush(around);
    }

    /// Whether nothing waits for an answer that a caller stored nowhere else.
    pub(crate) fn is_idle(&self) -> bool {
        self.pipe.is_empty()
    }

    fn is_silent(&self, now_ms: u64) -> bool {
        let silent = |since_ms: u64, limit_ms: u64| now_ms.saturating_sub(since_ms.max(self.attached_ms)) > limit_ms;
        let oldest_query = self.asked.values().next().map(|query| query.since_ms);
        let oldest = [self.pipe.oldest_ms(), oldest_query].into_iter().flatten().min();
        self.fanout.has_watchers() && silent(self.beat_ms, limits::MISSED_BEATS_MS)
            || oldest.is_some_and(|since_ms| silent(since_ms, limits::SILENT_LEADER_MS))
    }

    /// Sends what waits, on the stream of whoever should lead, when there is one and the pause is over.
    fn flush(&mut self, around: &Around<'_>) {
        if self.attached.is_none() && !self.attach(around) {
            return;
        }
        let mut frames = Vec::new();
        for mut query in std::mem::take(&mut self.waiting) {
            let id = self.next_query;
            self.next_query += 1;
            set_id(&mut query.frame, id);
            frames.push(frame(query.frame.clone()));
            self.asked.insert(id, query);
        }
        let (shard, placement_version) = (self.id.0, around.placement.0);
        self.pipe.send(|id, command| {
            let propose = internal::Propose { id, shard, placement_version, command: command.clone() };
            frames.push(frame(Frame::Propose(propose)));
        });
        self.out(&mut frames, around);
    }

    fn attach(&mut self, around: &Around<'_>) -> bool {
        let wanted = self.fanout.has_watchers() || !self.pipe.is_empty() || !self.waiting.is_empty();
        if !wanted || around.now_ms < self.not_before_ms {
            return false;
        }
        let Some(target) = self.route.target() else { return false };
        if !around.links.is_up(target) {
            let pause_ms = self.route.lost(target).unwrap_or_default();
            self.not_before_ms = around.now_ms + pause_ms;
            return false;
        }
        self.attached = Some(target);
        (self.attached_ms, self.beat_ms, self.term) = (around.now_ms, around.now_ms, 0);
        self.register_all(around);
        self.attached.is_some()
    }

    fn register_all(&mut self, around: &Around<'_>) {
        self.epoch += 1;
        self.register_later.clear();
        self.fanout.unregister();
        let slots: Vec<Slot> = self.fanout.slots().collect();
        let mut frames = slots.into_iter().map(|slot| self.interest(slot)).collect();
        self.out(&mut frames, around);
    }

    fn register_again(&mut self, around: &Around<'_>) {
        let mut frames = Vec::new();
        while self.register_later.front().is_some_and(|&(at_ms, _)| at_ms <= around.now_ms) {
            let Some((_, slot)) = self.register_later.pop_front() else { break };
            if self.fanout.lacks_interest(slot) {
                frames.push(self.interest(slot));
            }
        }
        self.out(&mut frames, around);
    }

    fn register_one(&mut self, slot: Slot, around: &Around<'_>) {
        if self.attached.is_some() {
            let mut frames = vec![self.interest(slot)];
            self.out(&mut frames, around);
        }
    }

    fn interest(&mut self, slot: Slot) -> GatewayFrame {
        self.fanout.asks(slot);
        let Named { app, conversation, user } = self.fanout.name(slot);
        let id = u64::from(self.id.0) << SHARD_SHIFT | (self.epoch & EPOCH_MASK) << EPOCH_SHIFT | u64::from(slot);
        frame(Frame::Interest(internal::Interest { id, shard: self.id.0, app, conversation, user }))
    }

    fn out(&mut self, frames: &mut Vec<GatewayFrame>, around: &Around<'_>) {
        let Some(broker) = self.attached else { return };
        if !frames.is_empty() && !around.links.send(broker, frames) {
            self.lost(broker, around);
        }
    }

    fn lost(&mut self, broker: BrokerId, around: &Around<'_>) {
        let pause_ms = self.route.lost(broker).unwrap_or_default();
        self.detach(pause_ms, around);
    }

    /// Leaves the stream: everything without an answer waits to be sent again, in order.
    fn detach(&mut self, pause_ms: u64, around: &Around<'_>) {
        if self.attached.take().is_some() {
            around.metrics.reroutes.inc();
        }
        self.not_before_ms = around.now_ms + pause_ms;
        self.pipe.reset();
        let asked = std::mem::take(&mut self.asked);
        asked.into_values().rev().for_each(|query| self.waiting.push_front(query));
        self.epoch += 1;
        self.register_later.clear();
        self.fanout.unregister();
    }

    fn not_leader(&mut self, from: BrokerId, not_leader: &NotLeader, around: &Around<'_>) {
        let leader = Some(BrokerId(not_leader.leader)).filter(|leader| leader.0 != 0);
        let leader = if not_leader.retry_here { Some(from) } else { leader };
        let Some(pause_ms) = self.route.not_leader(from, leader) else { return };
        tracing::debug!(shard = %self.id, broker = %from, ?not_leader, "not the leader");
        self.detach(pause_ms, around);
        self.flush(around);
    }

    fn proposed(&mut self, from: BrokerId, done: internal::Proposed, around: &Around<'_>) {
        if self.attached != Some(from) || !self.pipe.awaits(done.id) {
            return;
        }
        let result = match done.result {
            Some(proposed::Result::NotLeader(not_leader)) => {
                if !not_leader.unknown {
                    self.pipe.not_proposed(done.id);
                }
                return self.not_leader(from, &not_leader, around);
            }
            Some(proposed::Result::Outcome(outcome)) => {
                self.route.confirmed();
                Ok(Reply::Outcome(Outcome::from_proto(&outcome)))
            }
            Some(proposed::Result::Outcomes(outcomes)) => {
                self.route.confirmed();
                Ok(Reply::Outcomes(outcomes.spans))
            }
            Some(proposed::Result::Refusal(refusal)) => Err(refusal),
            // An answer that this version does not know is none.
            None => Err(Reason::OutcomeUnknown.refusal()),
        };
        if let Some(Answered { tag: ticket, doubt }) = self.pipe.answered(done.id) {
            ticket.answer(result.map_err(|refusal| if doubt { Reason::OutcomeUnknown.refusal() } else { refusal }));
        }
    }

    fn queried(&mut self, from: BrokerId, id: u64, result: Option<Result<Reply, No>>, around: &Around<'_>) {
        if self.attached != Some(from) || !self.asked.contains_key(&id) {
            return;
        }
        let result = match result {
            Some(Err(No::Leader(not_leader))) => return self.not_leader(from, &not_leader, around),
            Some(Ok(reply)) => {
                self.route.confirmed();
                Ok(reply)
            }
            Some(Err(No::Refused(refusal))) => Err(refusal),
            None => Err(Reason::Internal.refusal()),
        };
        if let Some(query) = self.asked.remove(&id) {
            query.ticket.answer(result);
        }
    }

    fn interest_state(&mut self, from: BrokerId, state: internal::InterestState, around: &Around<'_>) {
        let current = state.id >> EPOCH_SHIFT & EPOCH_MASK == self.epoch & EPOCH_MASK;
        if self.attached != Some(from) || !current {
            return;
        }
        let slot = state.id as Slot;
        self.fanout.answered(slot);
        match state.result {
            Some(interest_state::Result::Registered(registered)) => {
                self.route.confirmed();
                self.term = self.term.max(registered.term);
                self.fanout.registered(slot, Seq(registered.head), &around.sessions.read());
            }
            Some(interest_state::Result::NotLeader(not_leader)) => self.not_leader(from, &not_leader, around),
            Some(interest_state::Result::Refusal(refusal)) if !refusal.retryable => {
                self.fanout.refused(slot, &refusal, &around.sessions.read());
            }
            _ => self.register_later.push_back((around.now_ms + limits::RETRY_MS, slot)),
        }
    }

    fn beat(&mut self, from: BrokerId, beat: &internal::ShardBeat, around: &Around<'_>) {
        // Heads are news whoever tells them: they only make a stream look.
        let sessions = around.sessions.read();
        beat.heads.iter().for_each(|hint| self.fanout.head(hint, &sessions));
        drop(sessions);
        if self.attached != Some(from) {
            return;
        }
        if beat.closing {
            self.lost(from, around);
            return self.flush(around);
        }
        self.beat_ms = around.now_ms;
        if self.term != 0 && beat.term > self.term {
            // The broker led, lost and won again: what it applied in between was not sent as live.
            self.register_all(around);
        }
        self.term = self.term.max(beat.term);
    }
}

/// Why a question has no answer.
enum No {
    Leader(NotLeader),
    Refused(Refusal),
}

fn frame(frame: Frame) -> GatewayFrame {
    GatewayFrame { frame: Some(frame) }
}

fn set_id(frame: &mut Frame, id: u64) {
    match frame {
        Frame::Read(read) => read.id = id,
        Frame::Heads(heads) => heads.id = id,
        Frame::Lookup(lookup) => lookup.id = id,
        Frame::Hello(_) | Frame::Propose(_) | Frame::Interest(_) | Frame::DropInterest(_) => {}
    }
}
