//! The conversations that a session follows: beginning and ending them, letting them rest, and telling when a resume is
//! done. What they hand on is in `deliver`. Must never keep more than its place of a stream that only waits for the next
//! event: nearly all of them do.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use hashbrown::HashMap;
use stentor_engine::{delivery::Delivery, limits, session::listing::Listing};
use stentor_proto::{
    ids::{ConversationId, Seq, ShardId},
    internal,
    reason::Reason,
    v1::{self, ConversationState, Refusal},
};

use super::Session;
use crate::fanout::{Place, Topic, grow};

mod deliver;

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
        self.settle_refused(conversation);
        match self.followed(conversation) {
            Some(Followed::Awake(id)) => self.remove(id),
            Some(Followed::Resting(place)) => self.remove_resting(place),
            None => return,
        }
        // A resume may have waited for just this one.
        self.check_up_to_date();
    }

    /// A refused interest is found by its name no more, and its refusal may still wait to be told: after the stream that
    /// takes its place has begun, the device would take it for that one's. So the old stream ends without a word.
    fn settle_refused(&mut self, conversation: &str) {
        for (place, refusal) in self.inbox.take_refused() {
            let is_it = self.core.watched(place).is_some_and(|(_, of)| of.as_str() == conversation);
            match self.streams.at(place) {
                Some(Followed::Awake(id)) if is_it => self.remove(id),
                Some(Followed::Resting(place)) if is_it => self.remove_resting(place),
                _ => self.place_refused(place, refusal),
            }
        }
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
        let topic = Topic::Conversation(id.as_str());
        let Some(place) = self.core.watch(shard, &self.who.app, topic, self.place, &self.inbox) else {
            return refuse(self, Reason::Overloaded.refusal());
        };
        self.settle_refused(conversation);
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
