//! Who watches what: the conversations and users of one shard under 32-bit slots, each with the session streams that
//! watch it.
//! A live push is encoded once and shared by all of them. Must never decide what a session gets; that is its delivery.

use std::{collections::BTreeMap, sync::Arc};

use hashbrown::{Equivalent, HashMap};
use stentor_engine::{
    delivery::{BadRun, PushRun, run_of_records},
    limits,
};
use stentor_proto::{
    Bytes,
    frame::ServerFrame,
    ids::{AppId, ConversationId, Seq, UserId},
    internal,
    v1::{self, Refusal, item},
};

use crate::{
    inbox::{Inbox, Push},
    shard::Around,
};

/// A topic's place in the index.
pub(crate) type Slot = u32;

/// What can be watched.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Topic {
    /// The events of a conversation.
    Conversation(ConversationId),
    /// The head of a user's own stream.
    User(UserId),
}

impl Topic {
    fn as_ref(&self) -> TopicRef<'_> {
        match self {
            Self::Conversation(id) => TopicRef::Conversation(id.as_str()),
            Self::User(id) => TopicRef::User(id.as_str()),
        }
    }
}

/// Hashes like [`Topic`], without owning its text.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum TopicRef<'a> {
    Conversation(&'a str),
    User(&'a str),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Name {
    app: AppId,
    topic: Topic,
}

/// Hashes like [`Name`], without owning its texts.
#[derive(Hash)]
struct NameRef<'a> {
    app: &'a str,
    topic: TopicRef<'a>,
}

impl Equivalent<Name> for NameRef<'_> {
    fn equivalent(&self, name: &Name) -> bool {
        self.app == name.app.as_str() && self.topic == name.topic.as_ref()
    }
}

/// A topic as the frames of brokers name it: a user, or without one a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) app: String,
    pub(crate) conversation: String,
    pub(crate) user: String,
}

struct Watcher {
    inbox: Arc<Inbox>,
    stream: u32,
}

struct Watched {
    name: Name,
    watchers: Vec<Watcher>,
    /// The head at which the present leader registered the interest.
    registered: Option<Seq>,
    /// Registrations on the present route without an answer.
    asked: u32,
}

/// Live events that cannot be used: their broker's fault.
#[derive(Debug)]
pub(crate) struct BadLive {
    pub(crate) slot: Slot,
    pub(crate) error: BadRun,
}

/// The index of one shard.
#[derive(Default)]
pub(crate) struct Fanout {
    slots: HashMap<Name, Slot>,
    watched: Vec<Option<Watched>>,
    free: Vec<Slot>,
    /// Given up while registrations may still be answered, with how many; free after the last answer or the next
    /// [`Self::unregister`].
    resting: BTreeMap<Slot, u32>,
}

impl Fanout {
    /// Adds a stream. True when the topic is new here and interest must be registered.
    pub(crate) fn watch(&mut self, app: &AppId, topic: &Topic, inbox: &Arc<Inbox>, stream: u32) -> (Slot, bool) {
        let watcher = Watcher { inbox: inbox.clone(), stream };
        let name = NameRef { app: app.as_str(), topic: topic.as_ref() };
        if let Some(&slot) = self.slots.get(&name)
            && let Some(Some(watched)) = self.watched.get_mut(slot as usize)
        {
            if let Some(head) = watched.registered {
                inbox.head(stream, head, true);
            }
            watched.watchers.push(watcher);
            return (slot, false);
        }
        let name = Name { app: app.clone(), topic: topic.clone() };
        let watched = Watched { name: name.clone(), watchers: vec![watcher], registered: None, asked: 0 };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.watched.push(None);
            (self.watched.len() - 1) as Slot
        });
        if let Some(place) = self.watched.get_mut(slot as usize) {
            *place = Some(watched);
        }
        self.slots.insert(name, slot);
        (slot, true)
    }

    /// Removes a stream. The name of the topic when nobody watches it any more and interest must be dropped.
    pub(crate) fn unwatch(&mut self, app: &AppId, topic: &Topic, inbox: &Arc<Inbox>, stream: u32) -> Option<Named> {
        let &slot = self.slots.get(&NameRef { app: app.as_str(), topic: topic.as_ref() })?;
        let watched = self.watched.get_mut(slot as usize)?.as_mut()?;
        watched.watchers.retain(|w| w.stream != stream || !Arc::ptr_eq(&w.inbox, inbox));
        if !watched.watchers.is_empty() {
            return None;
        }
        let name = self.name(slot);
        self.release(slot);
        Some(name)
    }

    /// Takes a topic out of the index. An answer to a registration that is under way must not meet another one
    /// in its slot.
    fn release(&mut self, slot: Slot) -> Option<Watched> {
        let watched = self.watched.get_mut(slot as usize)?.take()?;
        self.slots.remove(&watched.name);
        match watched.asked {
            0 => self.free.push(slot),
            asked => drop(self.resting.insert(slot, asked)),
        }
        Some(watched)
    }

    /// All topics, in an order that is the same in every process.
    pub(crate) fn slots(&self) -> impl Iterator<Item = Slot> {
        let taken = self.watched.iter().zip(0..).filter(|(watched, _)| watched.is_some());
        taken.map(|(_, slot)| slot)
    }

    /// Whether anything is watched.
    pub(crate) fn has_watchers(&self) -> bool {
        !self.slots.is_empty()
    }

    /// The name of a slot; empty for one that is not taken.
    pub(crate) fn name(&self, slot: Slot) -> Named {
        let Some(Some(Watched { name, .. })) = self.watched.get(slot as usize) else { return Named::default() };
        let named = Named { app: name.app.as_str().into(), ..Named::default() };
        match &name.topic {
            Topic::Conversation(id) => Named { conversation: id.as_str().into(), ..named },
            Topic::User(id) => Named { user: id.as_str().into(), ..named },
        }
    }

    /// No registration counts any more: the stream or the term changed. No answer to an older one will be looked at.
    pub(crate) fn unregister(&mut self) {
        self.watched.iter_mut().flatten().for_each(|watched| (watched.registered, watched.asked) = (None, 0));
        self.free.extend(std::mem::take(&mut self.resting).into_keys());
    }

    /// Interest in a topic is asked for (again) on the present route.
    pub(crate) fn asks(&mut self, slot: Slot) {
        if let Some(Some(watched)) = self.watched.get_mut(slot as usize) {
            (watched.registered, watched.asked) = (None, watched.asked + 1);
        }
    }

    /// A registration on the present route has its answer, whatever that is.
    pub(crate) fn answered(&mut self, slot: Slot) {
        if let Some(Some(watched)) = self.watched.get_mut(slot as usize) {
            watched.asked = watched.asked.saturating_sub(1);
        } else if let Some(asked) = self.resting.get_mut(&slot) {
            *asked -= 1;
            if *asked == 0 {
                self.resting.remove(&slot);
                self.free.push(slot);
            }
        }
    }

    /// The leader registered interest at this head.
    pub(crate) fn registered(&mut self, slot: Slot, head: Seq) {
        let Some(Some(watched)) = self.watched.get_mut(slot as usize) else { return };
        watched.registered = Some(head);
        watched.watchers.iter().for_each(|w| w.inbox.head(w.stream, head, true));
    }

    /// The leader refused the interest for good: nobody watches the topic any more, so that whoever comes next asks
    /// anew.
    pub(crate) fn refused(&mut self, slot: Slot, refusal: &Refusal) {
        let Some(watched) = self.release(slot) else { return };
        watched.watchers.iter().for_each(|w| w.inbox.refused(w.stream, refusal.clone()));
    }

    /// A topic's head is at least this.
    pub(crate) fn head(&mut self, hint: &internal::HeadHint) {
        let topic = match hint.user.as_str() {
            "" => TopicRef::Conversation(&hint.conversation),
            user => TopicRef::User(user),
        };
        let Some(&slot) = self.slots.get(&NameRef { app: &hint.app, topic }) else { return };
        if let Some(Some(watched)) = self.watched.get_mut(slot as usize) {
            watched.watchers.iter().for_each(|w| w.inbox.head(w.stream, Seq(hint.head), false));
        }
    }

    /// Carries a live push to all streams that watch its conversation.
    pub(crate) fn live(&mut self, live: internal::Live, around: &Around<'_>) -> Result<(), BadLive> {
        let name = NameRef { app: &live.app, topic: TopicRef::Conversation(&live.conversation) };
        let Some(&slot) = self.slots.get(&name) else { return Ok(()) };
        let Some(Some(watched)) = self.watched.get_mut(slot as usize) else { return Ok(()) };
        around.metrics.live_events.inc_by(live.records.len() as u64);
        let mut records = &live.records[..];
        while !records.is_empty() {
            let (part, rest) = records.split_at(part_len(records, around.frame_bytes));
            let run = run_of_records(part).map_err(|error| BadLive { slot, error })?;
            let push = Arc::new(encode(&live.conversation, part, run));
            for watcher in &watched.watchers {
                if !watcher.inbox.push(watcher.stream, &push) {
                    around.metrics.dropped_pushes.inc();
                }
            }
            records = rest;
        }
        Ok(())
    }
}

/// How many records go into one frame: at least one, then as long as they fit.
fn part_len(records: &[Bytes], frame_bytes: usize) -> usize {
    let mut bytes = limits::FRAME_OVERHEAD_BYTES;
    let fitting = records.iter().take_while(|record| {
        bytes += record.len() + ITEM_OVERHEAD_BYTES;
        bytes <= frame_bytes
    });
    fitting.count().max(1)
}

/// Tags and lengths around a record.
pub(crate) const ITEM_OVERHEAD_BYTES: usize = 12;

fn encode(conversation: &str, records: &[Bytes], run: PushRun) -> Push {
    let items = records.iter().map(|r| v1::Item { item: Some(item::Item::Record(r.clone())) }).collect();
    let frame = ServerFrame::Events(v1::Events { conversation: conversation.into(), items }).to_bytes();
    let credit_bytes = records.iter().map(|r| r.len() as u64).sum();
    let records = if run.removals.is_empty() { Vec::new() } else { records.to_vec() };
    Push { frame, credit_bytes, run, records }
}

#[cfg(test)]
mod tests {
    use stentor_proto::{ids::PlacementVersion, record, v1::EventHeader, v1::EventKind};

    use super::*;
    use crate::{link::Links, metrics::Metrics};

    fn event(seq: u64, kind: EventKind, subject: &'static str, body: &[u8]) -> Bytes {
        let header = EventHeader { seq, kind: kind.into(), subject: subject.into(), ..Default::default() };
        let mut out = Vec::new();
        record::encode(&header, body, 0, 0, &mut out);
        out.into()
    }

    fn live(records: Vec<Bytes>) -> internal::Live {
        internal::Live { shard: 1, app: "app".into(), conversation: "c".into(), records }
    }

    fn topic(conversation: &str) -> Topic {
        Topic::Conversation(ConversationId::new(conversation).unwrap())
    }

    fn hint(conversation: &str, user: &str, head: u64) -> internal::HeadHint {
        internal::HeadHint { app: "app".into(), conversation: conversation.into(), user: user.into(), head }
    }

    struct World {
        links: Links,
        metrics: Metrics,
        fanout: Fanout,
        app: AppId,
    }

    impl World {
        fn new() -> Self {
            let links = Links::new(std::iter::empty());
            let app = AppId::new("app").unwrap();
            Self { links, metrics: Metrics::default(), fanout: Fanout::default(), app }
        }

        fn watch(&mut self, conversation: &str, inbox: &Arc<Inbox>, stream: u32) -> (Slot, bool) {
            self.fanout.watch(&self.app, &topic(conversation), inbox, stream)
        }

        fn unwatch(&mut self, conversation: &str, inbox: &Arc<Inbox>, stream: u32) -> bool {
            self.fanout.unwatch(&self.app, &topic(conversation), inbox, stream).is_some()
        }

        fn live(&mut self, records: Vec<Bytes>) -> Result<(), BadLive> {
            let placement = PlacementVersion(1);
            let (links, metrics) = (&self.links, &self.metrics);
            self.fanout.live(live(records), &Around { links, metrics, placement, now_ms: 0, frame_bytes: 65_536 })
        }
    }

    #[test]
    fn a_push_is_encoded_once_for_all_its_sessions() {
        let mut world = World::new();
        let inboxes = [0; 3].map(|_| Arc::new(Inbox::default()));
        for (n, inbox) in inboxes.iter().enumerate() {
            assert_eq!(world.watch("c", inbox, n as u32 + 7), (0, n == 0));
        }
        world.watch("other", &inboxes[0], 3);
        let records = vec![event(4, EventKind::Message, "", b"x"), event(5, EventKind::ParticipantRemoved, "ann", b"")];
        assert!(world.live(records).is_ok());
        let news = inboxes.each_ref().map(|inbox| inbox.take());
        let first = &news[0].pushes[0].1;
        assert_eq!((first.run.first, first.run.last, first.records.len()), (Seq(4), Seq(5), 2));
        assert_eq!(first.run.for_user("ann").removed_at, Some(Seq(5)));
        for (n, news) in news.iter().enumerate() {
            assert_eq!((news.pushes.len(), news.pushes[0].0), (1, n as u32 + 7));
            assert!(Arc::ptr_eq(first, &news.pushes[0].1));
        }
    }

    #[test]
    fn a_long_push_is_cut_into_frames_that_fit() {
        let mut world = World::new();
        let inbox = Arc::new(Inbox::default());
        world.watch("c", &inbox, 1);
        assert!(world.live((1..=10).map(|seq| event(seq, EventKind::Message, "", &[0; 20_000])).collect()).is_ok());
        let news = inbox.take();
        assert!(news.pushes.len() >= 3 || !news.heads.is_empty());
        assert!(news.pushes.iter().all(|(_, push)| push.frame.len() <= 65_536));
    }

    #[test]
    fn events_that_are_not_dense_are_not_carried() {
        let mut world = World::new();
        let inbox = Arc::new(Inbox::default());
        let (slot, _) = world.watch("c", &inbox, 1);
        let records = vec![event(4, EventKind::Message, "", b"x"), event(6, EventKind::Message, "", b"x")];
        assert_eq!(world.live(records).unwrap_err().slot, slot);
        assert!(world.live(vec![Bytes::from_static(b"no record")]).is_err());
        assert!(inbox.take().pushes.is_empty());
    }

    #[test]
    fn a_slot_is_not_given_again_while_its_registrations_may_be_answered() {
        let mut world = World::new();
        let inbox = Arc::new(Inbox::default());
        let (first, _) = world.watch("c", &inbox, 1);
        world.fanout.asks(first);
        world.fanout.asks(first);
        assert!(world.unwatch("c", &inbox, 1), "nobody is left");
        let (second, _) = world.watch("d", &inbox, 2);
        assert_ne!(first, second);
        for asked in [2, 1] {
            assert_eq!(world.fanout.resting.get(&first), Some(&asked));
            world.fanout.answered(first);
            world.fanout.registered(first, Seq(9));
            assert!(inbox.take().heads.is_empty(), "an answer for a conversation that nobody watches");
        }
        let (third, _) = world.watch("e", &inbox, 3);
        assert_eq!(first, third, "free once all was answered");
        world.fanout.asks(third);
        world.fanout.answered(third);
        world.fanout.registered(third, Seq(4));
        let heads = inbox.take().heads;
        assert_eq!((heads[&3].head, heads[&3].registered), (Seq(4), true));
        assert!(world.unwatch("e", &inbox, 3));
        assert_eq!(world.watch("f", &inbox, 4).0, third, "free at once when it was answered before");
    }

    #[test]
    fn a_refused_interest_leaves_its_slot_and_strands_nobody() {
        let mut world = World::new();
        let inbox = Arc::new(Inbox::default());
        for n in 0..1_000 {
            let (slot, is_new) = world.watch("nowhere", &inbox, n);
            assert!(is_new, "whoever comes after a refusal asks anew");
            world.fanout.asks(slot);
            world.fanout.answered(slot);
            world.fanout.refused(slot, &stentor_proto::reason::Reason::UnknownConversation.refusal());
            let refused = inbox.take().refused;
            assert_eq!((refused.len(), refused[0].0), (1, n));
        }
        assert!(!world.unwatch("nowhere", &inbox, 0), "there is no interest left to drop");
        assert!(!world.fanout.has_watchers());
        assert_eq!((world.fanout.watched.len(), world.fanout.resting.len()), (1, 0), "one slot served them all");
    }

    #[test]
    fn a_late_watcher_hears_of_the_registration() {
        let mut world = World::new();
        let inboxes = [0; 2].map(|_| Arc::new(Inbox::default()));
        let (slot, _) = world.watch("c", &inboxes[0], 1);
        world.fanout.registered(slot, Seq(4));
        world.watch("c", &inboxes[1], 2);
        assert!(inboxes[1].take().heads[&2].registered);
        assert!(!world.unwatch("c", &inboxes[0], 1), "one is left");
        assert!(!world.unwatch("c", &inboxes[0], 1), "twice does no harm");
        world.fanout.head(&hint("c", "", 8));
        assert_eq!(inboxes[1].take().heads[&2].head, Seq(8));
    }

    #[test]
    fn a_user_is_no_conversation_of_his_name() {
        let mut world = World::new();
        let inbox = Arc::new(Inbox::default());
        world.watch("ann", &inbox, 1);
        let ann = Topic::User(UserId::new("ann").unwrap());
        let (slot, is_new) = world.fanout.watch(&world.app, &ann, &inbox, 2);
        assert!(is_new);
        let (app, user) = ("app".into(), "ann".into());
        assert_eq!(world.fanout.name(slot), Named { app, user, ..Named::default() });
        world.fanout.head(&hint("", "ann", 8));
        let heads = inbox.take().heads;
        assert_eq!((heads.len(), heads[&2].head), (1, Seq(8)));
    }
}
