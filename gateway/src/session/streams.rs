//! The conversations that a session follows: beginning them (interest, heads, start), handing on what comes live,
//! pulling what does not, and telling when a resume is done. What each stream gets is decided by its `Delivery`. Must
//! never keep more than its place of a stream that only waits for the next event: nearly all of them do.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use hashbrown::HashMap;
use stentor_engine::{
    delivery::{Deliver, Delivery, HeadNews, Next, Step, run_of_items},
    limits,
    session::{client::credit_cost, listing::Listing},
};
use stentor_proto::{
    frame::ServerFrame,
    ids::{ConversationId, Seq, ShardId},
    internal::{self, gateway_frame::Frame},
    reason::Reason,
    v1::{self, ConversationState, Item, Refusal, item},
};

use super::{Session, unexpected};
use crate::{
    fanout::{ITEM_OVERHEAD_BYTES, Place, Topic, grow},
    inbox::{Purpose, Push, Reply},
};

/// Where a stream begins.
#[derive(Debug, Clone, Copy)]
enum From {
    After(Seq),
    Head,
}

#[derive(Debug)]
struct Stream {
    conversation: ConversationId,
    shard: ShardId,
    place: Place,
    from: From,
    delivery: Delivery,
    /// Heads were asked for.
    asked: bool,
    /// Part of a resume that is not up to date yet.
    resuming: bool,
    /// The resume is done for it from here on; known once it has started.
    target: Option<Seq>,
    /// The cursors that the user's shard keeps, where it was asked for them.
    kept: (u64, u64),
    /// The user's list says that he was added (again) by this event: if the stream ends at a removal before it, it
    /// begins again.
    added: Seq,
}

/// A resume under way.
#[derive(Debug, Default)]
struct Resume {
    conversations: u32,
    pending: u32,
    listing: bool,
}

/// Streams that have ended and may stand in a queue for each that has not.
const ENDED_IN_QUEUE: usize = 64;

/// How a conversation is followed.
#[derive(Debug, Clone, Copy)]
enum Followed {
    /// By this stream.
    Awake(u32),
    /// By a stream that rests.
    Resting(Place),
}

/// All streams of a session.
#[derive(Debug, Default)]
pub(super) struct Streams {
    /// Those that have something to do.
    streams: BTreeMap<u32, Stream>,
    /// The same, by place.
    awake: HashMap<Place, u32>,
    /// Those that stand where the gateway stands, sorted: what they are is put together again when something comes
    /// (`Delivery::live_at`).
    resting: Vec<Place>,
    /// Streams that may rest from now on.
    tired: Vec<u32>,
    /// Conversations whose stream ended and is to begin once more, when the news of this turn are through.
    again: Vec<(ConversationId, From)>,
    /// Where the user's own stream is watched.
    pub(super) user: Option<Place>,
    /// Never given twice, so that what is on its way for an ended stream meets nobody.
    next: u32,
    /// Streams whose heads must be asked for.
    to_ask: BTreeMap<ShardId, BTreeSet<u32>>,
    /// Shards that were asked for heads and did not answer yet: one question at a time each, however often a device
    /// begins and ends its streams.
    asking: BTreeSet<ShardId>,
    hungry: VecDeque<u32>,
    pulls: usize,
    /// (when, stream), in order; every pause is of the same length.
    later: VecDeque<(u64, u32)>,
    pub(super) list: Listing,
    resume: Option<Resume>,
}

impl Streams {
    pub(super) fn due_ms(&self) -> Option<u64> {
        self.later.front().map(|&(at, _)| at).into_iter().chain(self.list.due_ms()).min()
    }

    fn count(&self) -> usize {
        self.streams.len() + self.resting.len()
    }

    fn at(&self, place: Place) -> Option<Followed> {
        let awake = self.awake.get(&place).map(|&id| Followed::Awake(id));
        awake.or_else(|| self.resting.binary_search(&place).is_ok().then_some(Followed::Resting(place)))
    }

    fn insert(&mut self, stream: Stream) -> u32 {
        let id = self.next;
        self.next += 1;
        self.awake.insert(stream.place, id);
        self.streams.insert(id, stream);
        id
    }

    fn take(&mut self, id: u32) -> Option<Stream> {
        let stream = self.streams.remove(&id)?;
        self.awake.remove(&stream.place);
        if self.awake.is_empty() {
            // A session whose streams all rest holds nothing for those that did not; an emptied tree keeps a leaf.
            self.awake = HashMap::new();
            self.streams = BTreeMap::new();
        }
        Some(stream)
    }

    fn rest(&mut self, place: Place) {
        if let Err(at) = self.resting.binary_search(&place) {
            grow(&mut self.resting);
            self.resting.insert(at, place);
        }
    }

    fn wake(&mut self, place: Place) -> bool {
        self.resting.binary_search(&place).map(|at| self.resting.remove(at)).is_ok()
    }

    fn push_hungry(&mut self, id: u32) {
        if self.hungry.len() >= self.queue_bound() {
            self.hungry.retain(|id| self.streams.contains_key(id));
        }
        self.hungry.push_back(id);
    }

    fn push_later(&mut self, at_ms: u64, id: u32) {
        if self.later.len() >= self.queue_bound() {
            self.later.retain(|(_, id)| self.streams.contains_key(id));
        }
        self.later.push_back((at_ms, id));
    }

    /// Where a queue is looked through for streams that have ended: a device that begins and ends them again and again
    /// must not fill it, and looking must not cost more than what was put in since.
    fn queue_bound(&self) -> usize {
        2 * self.streams.len() + ENDED_IN_QUEUE
    }
}

impl Session {
    pub(super) fn resume(&mut self, resume: v1::Resume) {
        self.credit.resume(resume.credit_bytes);
        self.streams.resume = Some(Resume { listing: !resume.only_listed, ..Resume::default() });
        for cursor in &resume.delivered {
            self.begin(&cursor.conversation, From::After(Seq(cursor.seq)), true, (0, 0));
        }
        if resume.only_listed {
            self.check_up_to_date();
        } else {
            self.follow_user();
        }
    }

    pub(super) fn subscribe(&mut self, subscribe: &v1::Subscribe) {
        let from = if subscribe.from_head { From::Head } else { From::After(Seq(subscribe.after_seq)) };
        self.unsubscribe(&subscribe.conversation);
        match self.may_call() {
            Ok(()) => self.begin(&subscribe.conversation, from, false, (0, 0)),
            Err(reason) => self.out.push(refused_state(&subscribe.conversation, reason.refusal())),
        }
    }

    pub(super) fn unsubscribe(&mut self, conversation: &str) {
        match self.followed(conversation) {
            Some(Followed::Awake(id)) => self.remove(id),
            Some(Followed::Resting(place)) => self.remove_resting(place),
            None => return,
        }
        // A resume may have waited for just this one.
        self.check_up_to_date();
    }

    fn followed(&self, conversation: &str) -> Option<Followed> {
        self.streams.at(self.core.find(&self.who.app, conversation)?)
    }

    /// How far a conversation was handed on, if it is followed. Nothing before its head is known: where the device says
    /// that it stands is only a claim until then.
    pub(super) fn delivered(&self, conversation: &str) -> Option<Seq> {
        let id = match self.followed(conversation)? {
            Followed::Awake(id) => id,
            Followed::Resting(place) => return self.core.rests_at(place, &self.inbox),
        };
        let stream = self.streams.streams.get(&id).filter(|stream| stream.target.is_some())?;
        let begin = match stream.from {
            From::After(seq) => seq,
            From::Head => Seq(0),
        };
        Some(stream.delivery.delivered().max(begin))
    }

    fn begin(&mut self, conversation: &str, from: From, resuming: bool, kept: (u64, u64)) {
        let refuse = |session: &mut Self, refusal| session.out.push(refused_state(conversation, refusal));
        let Ok(id) = ConversationId::new(conversation) else {
            return refuse(self, Reason::BadId.refusal());
        };
        if self.followed(conversation).is_some() {
            return;
        }
        if self.streams.count() >= limits::SESSION_SUBSCRIPTIONS {
            return refuse(self, Reason::TooManySubscriptions.refusal());
        }
        let shard = match self.core.shard_of(&self.who.app, conversation) {
            Ok(shard) => shard,
            Err(reason) => return refuse(self, reason.refusal()),
        };
        let topic = Topic::Conversation(id.clone());
        let Some(place) = self.core.watch(shard, &self.who.app, &topic, self.place, &self.inbox) else {
            return refuse(self, Reason::Overloaded.refusal());
        };
        self.core.metrics.subscriptions.inc();
        if let Some(resume) = self.streams.resume.as_mut().filter(|_| resuming) {
            resume.conversations += 1;
            resume.pending += 1;
        }
        self.streams.insert(Stream {
            conversation: id,
            shard,
            place,
            from,
            delivery: Delivery::new(),
            asked: false,
            resuming,
            target: None,
            kept,
            added: Seq(0),
        });
    }

    /// The user's list has this conversation: its stream begins, unless there is one.
    pub(super) fn follow(&mut self, listed: &internal::UserConversationState, resuming: bool) {
        let added = Seq(listed.seq);
        let id = match self.followed(&listed.conversation) {
            Some(Followed::Awake(id)) => id,
            Some(Followed::Resting(place)) => match self.core.rests_at(place, &self.inbox) {
                Some(at) if at < added => match self.wake(place, at) {
                    Some(id) => id,
                    None => return,
                },
                // It has come by that event already.
                _ => return,
            },
            None => {
                let kept = (listed.delivered, listed.read);
                return self.begin(&listed.conversation, From::After(Seq(listed.delivered)), resuming, kept);
            }
        };
        if let Some(stream) = self.streams.streams.get_mut(&id) {
            stream.added = stream.added.max(added);
        }
    }

    /// Forgets a stream without a word to the device.
    fn remove(&mut self, id: u32) {
        let Some(stream) = self.streams.take(id) else { return };
        if let Some(ids) = self.streams.to_ask.get_mut(&stream.shard) {
            ids.remove(&id);
        }
        self.unwatch(stream.place);
        if let Some(resume) = self.streams.resume.as_mut().filter(|_| stream.resuming) {
            resume.pending -= 1;
        }
    }

    fn remove_resting(&mut self, place: Place) {
        if self.streams.wake(place) {
            self.core.metrics.resting_subscriptions.dec();
            self.unwatch(place);
        }
    }

    fn unwatch(&self, place: Place) {
        self.core.unwatch(place, self.place, &self.inbox);
        self.core.metrics.subscriptions.dec();
    }

    pub(super) fn end_streams(&mut self) {
        let ids: Vec<u32> = self.streams.streams.keys().copied().collect();
        ids.into_iter().for_each(|id| self.remove(id));
        self.unfollow_user();
        for place in std::mem::take(&mut self.streams.resting) {
            self.core.metrics.resting_subscriptions.dec();
            self.unwatch(place);
        }
    }

    /// Streams that have nothing to do any more lie down.
    pub(super) fn rest_streams(&mut self) {
        let tired = std::mem::take(&mut self.streams.tired);
        // Most of a session's streams lie down together, at the end of its resume.
        self.streams.resting.reserve_exact(tired.len().min(self.streams.streams.len()));
        for id in tired {
            let Some(stream) = self.streams.streams.get(&id).filter(|stream| !stream.resuming) else { continue };
            let (place, Some(at)) = (stream.place, stream.delivery.rests_at()) else { continue };
            // Otherwise news of it is on its way, and it gets another chance with that.
            if stream.added <= at && self.core.may_rest(place, at, &self.inbox) {
                self.streams.take(id);
                self.streams.rest(place);
                self.core.metrics.resting_subscriptions.inc();
            }
        }
    }

    /// Something came for a stream that rests at `at` and that has to be done with care.
    fn wake(&mut self, place: Place, at: Seq) -> Option<u32> {
        let (shard, conversation) = self.core.watched(place)?;
        if self.streams.wake(place) {
            self.core.metrics.resting_subscriptions.dec();
        }
        Some(self.streams.insert(Stream {
            conversation,
            shard,
            place,
            from: From::After(at),
            delivery: Delivery::live_at(at),
            asked: true,
            resuming: false,
            target: Some(at),
            kept: (0, 0),
            added: Seq(0),
        }))
    }

    /// A conversation's interest was refused for good.
    pub(super) fn place_refused(&mut self, place: Place, refusal: Refusal) {
        let id = match self.streams.at(place) {
            Some(Followed::Awake(id)) => Some(id),
            Some(Followed::Resting(place)) => self.wake(place, Seq(0)),
            None => None,
        };
        if let Some(id) = id {
            self.stream_refused(id, refusal);
        }
    }

    /// Ends a stream and tells the device why.
    fn stream_refused(&mut self, id: u32, refusal: Refusal) {
        let Some(stream) = self.streams.streams.get(&id) else { return };
        let (conversation, delivered) = (stream.conversation.clone(), stream.delivery.delivered());
        let from = if stream.target.is_some() { From::After(delivered) } else { stream.from };
        let again = refusal.reason == Reason::NotAParticipant.code() && stream.added > delivered;
        self.out.push(refused_state(conversation.as_str(), refusal));
        self.remove(id);
        if again {
            self.streams.again.push((conversation, from));
        }
        self.check_up_to_date();
    }

    /// Streams that ended with a removal before a later addition begin again.
    pub(super) fn begin_again(&mut self) {
        for (conversation, from) in std::mem::take(&mut self.streams.again) {
            self.begin(conversation.as_str(), from, false, (0, 0));
        }
    }

    /// A head was heard of. The first registration of a stream is followed by the question for its heads: asked later
    /// than the registration, its answer knows of every removal of the reader that is not still to come as an event.
    pub(super) fn head(&mut self, place: Place, news: HeadNews) {
        if self.streams.user == Some(place) {
            return self.user_head(news.head.0);
        }
        let id = match self.streams.at(place) {
            Some(Followed::Awake(id)) => id,
            Some(Followed::Resting(_)) if news.holds_back() => match self.wake(place, news.before) {
                Some(id) => id,
                None => return,
            },
            _ => return,
        };
        let Some(stream) = self.streams.streams.get_mut(&id) else { return };
        if news.registered && !stream.asked {
            stream.asked = true;
            self.streams.to_ask.entry(stream.shard).or_default().insert(id);
        }
        let step = stream.delivery.head(news.head);
        self.carry_out(id, step, None);
    }

    pub(super) fn ask_heads(&mut self) {
        let Streams { to_ask, asking, streams, .. } = &mut self.streams;
        let mut questions = Vec::new();
        to_ask.retain(|&shard, ids| {
            if !ids.is_empty() && asking.insert(shard) {
                let first = ids.iter().nth(limits::HEADS_PER_QUERY).copied();
                let rest = first.map(|first| ids.split_off(&first)).unwrap_or_default();
                questions.push((shard, std::mem::replace(ids, rest)));
            }
            !ids.is_empty()
        });
        let name = |id: &u32| Some(streams.get(id)?.conversation.as_str().to_owned());
        let named = |(shard, ids): (ShardId, BTreeSet<u32>)| {
            let names: Vec<String> = ids.iter().filter_map(name).collect();
            (shard, ids.into_iter().collect(), names)
        };
        let questions: Vec<(ShardId, Vec<u32>, Vec<String>)> = questions.into_iter().map(named).collect();
        for (shard, streams, conversations) in questions {
            let frame = self.heads_of(shard, conversations);
            let ticket = self.ticket(Purpose::Start { shard, streams });
            self.core.ask(shard, frame, ticket);
        }
    }

    pub(super) fn heads_of(&self, shard: ShardId, conversations: Vec<String>) -> Frame {
        Frame::Heads(internal::Heads {
            id: 0,
            shard: shard.0,
            app: self.who.app.as_str().into(),
            user: self.who.user.as_str().into(),
            device: self.who.device.as_str().into(),
            conversations,
        })
    }

    pub(super) fn heads(&mut self, shard: ShardId, ids: Vec<u32>, result: Result<Reply, Refusal>) {
        self.streams.asking.remove(&shard);
        let states = match result {
            Ok(Reply::Heads(states)) => states,
            other => {
                let refusal = unexpected(other);
                return ids.into_iter().for_each(|id| self.not_started(id, refusal.clone()));
            }
        };
        let mut states: HashMap<String, ConversationState> =
            states.into_iter().map(|state| (state.conversation.clone(), state)).collect();
        for id in ids {
            let Some(stream) = self.streams.streams.get(&id) else { continue };
            match states.remove(stream.conversation.as_str()) {
                Some(ConversationState { refusal: Some(refusal), .. }) => self.not_started(id, refusal),
                Some(state) => self.start(id, state),
                None => self.not_started(id, Reason::Internal.refusal()),
            }
        }
    }

    fn not_started(&mut self, id: u32, refusal: Refusal) {
        if refusal.retryable {
            self.streams.push_later(self.core.now_ms() + limits::RETRY_MS, id);
        } else {
            self.stream_refused(id, refusal);
        }
    }

    fn start(&mut self, id: u32, mut state: ConversationState) {
        let Some(stream) = self.streams.streams.get_mut(&id) else { return };
        let after = match stream.from {
            From::After(seq) if seq.0 > state.head => {
                return self.stream_refused(id, Reason::CursorBeyondHead.refusal());
            }
            From::After(seq) => seq,
            From::Head => Seq(state.head),
        };
        stream.target = Some(Seq(state.head));
        let step = stream.delivery.start(after, Seq(state.head));
        state.delivered = state.delivered.max(stream.kept.0);
        state.read = state.read.max(stream.kept.1);
        self.out.push(state);
        self.carry_out(id, step, None);
    }

    /// A live push.
    pub(super) fn live(&mut self, place: Place, push: &Arc<Push>) {
        let fits = push.frame.len() <= self.room_bytes() || self.out.bytes() == 0;
        let has_room = fits && self.credit.left() > 0;
        let run = push.run.for_user(self.who.user.as_str());
        let id = match self.streams.at(place) {
            Some(Followed::Awake(id)) => id,
            Some(Followed::Resting(_)) => {
                let step = Delivery::live_at(push.before).live(run, has_room);
                if step.next == Next::Wait {
                    return if step.deliver == Deliver::All {
                        self.hand_on(push)
                    };
                }
                let Some(id) = self.wake(place, push.before) else { return };
                id
            }
            None => return,
        };
        let Some(stream) = self.streams.streams.get_mut(&id) else { return };
        let was_live = stream.delivery.is_live();
        let step = stream.delivery.live(run, has_room);
        if was_live && step.deliver == Deliver::Nothing && step.next == Next::Hungry {
            self.core.metrics.dropped_pushes.inc();
        }
        match step.deliver {
            Deliver::Nothing => {}
            Deliver::All => self.hand_on(push),
            Deliver::UpTo(last) => {
                let count = (last.0 + 1).saturating_sub(run.first.0) as usize;
                let records = push.records.iter().take(count);
                let items = records.map(|r| Item { item: Some(item::Item::Record(r.clone())) }).collect();
                let conversation = stream.conversation.as_str().to_owned();
                self.push_items(conversation, items);
                self.core.metrics.delivered_events.inc_by(count as u64);
            }
        }
        self.carry_out(id, step, None);
    }

    fn hand_on(&mut self, push: &Push) {
        self.out.push_shared(push.frame.clone());
        self.credit.spend(push.credit_bytes);
        self.core.metrics.delivered_events.inc_by(push.run.last.0 - push.run.first.0 + 1);
    }

    /// What may still be queued, pages under way counted as if they were there.
    fn room_bytes(&self) -> usize {
        let taken = self.out.bytes() + self.streams.pulls * limits::SESSION_PAGE_BYTES;
        limits::SESSION_QUEUE_BYTES.saturating_sub(taken)
    }

    /// Asks for pages, oldest hunger first, as long as there is room for them.
    pub(super) fn grant_pulls(&mut self) {
        while self.streams.pulls < limits::SESSION_PULLS
            && self.room_bytes() >= limits::SESSION_PAGE_BYTES
            && self.credit.left() > 0
        {
            let Some(id) = self.streams.hungry.pop_front() else { return };
            let max_bytes = limits::SESSION_PAGE_BYTES.min(self.credit.left());
            let Some(stream) = self.streams.streams.get_mut(&id) else { continue };
            let Some(pull) = stream.delivery.pull(max_bytes) else { continue };
            let request = v1::HistoryRequest {
                conversation: stream.conversation.as_str().into(),
                after_seq: Some(pull.after_seq.0),
                ..Default::default()
            };
            let shard = stream.shard;
            let frame = Frame::Read(internal::Read {
                upto_removal: true,
                ..self.read_request(shard, request, pull.max_bytes, false)
            });
            self.streams.pulls += 1;
            let ticket = self.ticket(Purpose::Pull { stream: id });
            self.core.ask(shard, frame, ticket);
        }
    }

    pub(super) fn read_request(
        &self,
        shard: ShardId,
        request: v1::HistoryRequest,
        max_bytes: usize,
        admin: bool,
    ) -> internal::Read {
        internal::Read {
            id: 0,
            shard: shard.0,
            app: self.who.app.as_str().into(),
            user: self.who.user.as_str().into(),
            admin,
            request: Some(request),
            max_bytes: max_bytes as u32,
            upto_removal: false,
        }
    }

    /// A page came, or was refused.
    pub(super) fn page(&mut self, id: u32, result: Result<Reply, Refusal>) {
        self.streams.pulls = self.streams.pulls.saturating_sub(1);
        let Some(stream) = self.streams.streams.get_mut(&id) else { return };
        let page = match result {
            Ok(Reply::Page(page)) => page,
            other => {
                let refusal = unexpected(other);
                let reason = Reason::from_code(&refusal.reason).unwrap_or(Reason::Internal);
                let step = stream.delivery.refused(reason);
                return self.carry_out(id, step, None);
            }
        };
        let step = match run_of_items(&page.items, self.who.user.as_str()) {
            Ok(run) => stream.delivery.page(run, Seq(page.head), page.more),
            Err(error) => {
                tracing::warn!(conversation = %stream.conversation, %error, "unusable page");
                stream.delivery.refused(Reason::Internal)
            }
        };
        self.carry_out(id, step, Some(page.items));
    }

    /// Delivers a page's items where the step says so, then does what comes next.
    fn carry_out(&mut self, id: u32, step: Step, items: Option<Vec<Item>>) {
        let Some(stream) = self.streams.streams.get(&id) else { return };
        if let (Deliver::All, Some(items)) = (step.deliver, items) {
            self.core.metrics.pulled_events.inc_by(items.len() as u64);
            let conversation = stream.conversation.as_str().to_owned();
            self.push_items(conversation, items);
        }
        match step.next {
            Next::Wait => {}
            Next::Hungry => self.streams.push_hungry(id),
            Next::Rest => self.streams.push_later(self.core.now_ms() + limits::RETRY_MS, id),
            Next::Stop(reason) => return self.stream_refused(id, reason.refusal()),
        }
        self.check_target(id);
        let stream = self.streams.streams.get(&id);
        if stream.is_some_and(|stream| !stream.resuming && stream.delivery.is_live()) {
            self.streams.tired.push(id);
        }
    }

    /// Queues items in as many frames as they need.
    fn push_items(&mut self, conversation: String, items: Vec<Item>) {
        let frame_bytes = self.core.config.limits.max_frame_bytes - limits::FRAME_OVERHEAD_BYTES;
        let mut part = Vec::new();
        let mut bytes = 0;
        for item in items {
            let cost = credit_cost(&item);
            self.credit.spend(cost);
            let item_bytes = cost as usize + ITEM_OVERHEAD_BYTES;
            if bytes + item_bytes > frame_bytes && !part.is_empty() {
                bytes = 0;
                let items = std::mem::take(&mut part);
                self.push_events(conversation.clone(), items);
            }
            bytes += item_bytes;
            part.push(item);
        }
        if !part.is_empty() {
            self.push_events(conversation, part);
        }
    }

    fn push_events(&mut self, conversation: String, items: Vec<Item>) {
        self.out.push_shared(ServerFrame::Events(v1::Events { conversation, items }).to_bytes());
    }

    /// What rested is tried again.
    pub(super) fn retry_streams(&mut self, now_ms: u64) {
        while self.streams.later.front().is_some_and(|&(at, _)| at <= now_ms) {
            let Some((_, id)) = self.streams.later.pop_front() else { break };
            let Some(stream) = self.streams.streams.get_mut(&id) else { continue };
            if stream.delivery.is_running() {
                let step = stream.delivery.retry();
                self.carry_out(id, step, None);
            } else {
                self.streams.to_ask.entry(stream.shard).or_default().insert(id);
            }
        }
        if let Some(ask) = self.streams.list.retry(now_ms) {
            self.ask_list(ask);
        }
    }

    /// The whole list has come once.
    pub(super) fn listed(&mut self) {
        if let Some(resume) = &mut self.streams.resume {
            resume.listing = false;
        }
        self.check_up_to_date();
    }

    fn check_target(&mut self, id: u32) {
        let Some(stream) = self.streams.streams.get_mut(&id) else { return };
        let reached = stream.target.is_some_and(|target| stream.delivery.delivered() >= target);
        if !stream.resuming || !reached {
            return;
        }
        stream.resuming = false;
        if let Some(resume) = &mut self.streams.resume {
            resume.pending -= 1;
        }
        self.check_up_to_date();
    }

    fn check_up_to_date(&mut self) {
        if let Some(resume) = self.streams.resume.take_if(|resume| resume.pending == 0 && !resume.listing) {
            self.out.push(v1::UpToDate { conversations: resume.conversations });
        }
    }
}

fn refused_state(conversation: &str, refusal: Refusal) -> ConversationState {
    ConversationState { conversation: conversation.into(), refusal: Some(refusal), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_that_have_ended_do_not_fill_the_queues() {
        let mut streams = Streams::default();
        for id in 0..100_000 {
            streams.push_hungry(id);
            streams.push_later(0, id);
        }
        assert!(streams.hungry.len() <= ENDED_IN_QUEUE && streams.later.len() <= ENDED_IN_QUEUE);
        assert_eq!(streams.hungry.back(), Some(&99_999));
    }
}
