//! What a stream hands on: heads, live pushes, pages that it pulls. What each gets is decided by its `Delivery`. Must
//! never queue more for a device than its bounds allow: what has no room is pulled later.

use std::{collections::BTreeSet, sync::Arc};

use hashbrown::HashMap;
use stentor_engine::{
    delivery::{Deliver, Delivery, HeadNews, Next, Step, run_of_items},
    limits,
    session::client::credit_cost,
};
use stentor_proto::{
    frame::ServerFrame,
    ids::{Seq, ShardId},
    internal::{self, gateway_frame::Frame},
    reason::Reason,
    v1::{self, ConversationState, Item, Refusal, item},
};

use super::{Followed, From, Session, Streams};
use crate::{
    fanout::{ITEM_OVERHEAD_BYTES, Place},
    inbox::{Purpose, Push, Reply},
    session::unexpected,
};

impl Session {
    /// A head was heard of. The first registration of a stream is followed by the question for its heads: asked later
    /// than the registration, its answer knows of every removal of the reader that is not still to come as an event.
    pub(in crate::session) fn head(&mut self, place: Place, news: HeadNews) {
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

    pub(in crate::session) fn ask_heads(&mut self) {
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

    pub(in crate::session) fn heads_of(&self, shard: ShardId, conversations: Vec<String>) -> Frame {
        Frame::Heads(internal::Heads {
            id: 0,
            shard: shard.0,
            app: self.who.app.as_str().into(),
            user: self.who.user.as_str().into(),
            device: self.who.device.as_str().into(),
            conversations,
        })
    }

    pub(in crate::session) fn heads(&mut self, shard: ShardId, ids: Vec<u32>, result: Result<Reply, Refusal>) {
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
    pub(in crate::session) fn live(&mut self, place: Place, push: &Arc<Push>) {
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
    pub(in crate::session) fn grant_pulls(&mut self) {
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

    pub(in crate::session) fn read_request(
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
    pub(in crate::session) fn page(&mut self, id: u32, result: Result<Reply, Refusal>) {
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
    pub(super) fn carry_out(&mut self, id: u32, step: Step, items: Option<Vec<Item>>) {
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
}
