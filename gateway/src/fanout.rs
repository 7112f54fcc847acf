//! Who watches what: the conversations and users of one shard under 20-bit slots, each with the sessions that watch it.
//! A live push is encoded once and shared by all of them. Must never decide what a session gets (that is its delivery),
//! nor hold more than a few bytes for a session that only waits.

use std::{collections::BTreeMap, hash::BuildHasher, sync::Arc};

use hashbrown::{DefaultHashBuilder, HashTable};
use stentor_engine::{
    delivery::{BadRun, HeadNews, PushRun, Told, run_of_records},
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
    sessions::{Places, SessionPlace},
    shard::Around,
};

/// A topic's place in the index of its shard.
pub(crate) type Slot = u32;

/// What can be watched.
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// A [`Topic`] that does not own its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum TopicRef<'a> {
    /// See [`Topic`].
    Conversation(&'a str),
    /// See [`Topic`].
    User(&'a str),
}

/// A topic as the frames of brokers name it: a user, or without one a conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) app: String,
    pub(crate) conversation: String,
    pub(crate) user: String,
}

/// Of a [`Place`]: the slot stands here, the shard's place above.
const SLOT_BITS: u32 = 20;
const _: () = assert!(limits::GATEWAY_SHARD_CONVERSATIONS == 1 << SLOT_BITS);
const _: () = assert!(limits::MAX_SHARDS <= 1 << (u32::BITS - SLOT_BITS));

/// A topic's place at this gateway. It is one topic's as long as any session watches it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place(u32);

impl Place {
    /// `shard` is the shard's own place at this gateway, below [`limits::MAX_SHARDS`].
    pub(crate) const fn new(shard: u16, slot: Slot) -> Self {
        Self((shard as u32) << SLOT_BITS | slot)
    }

    /// The shard's place.
    pub(crate) fn shard(self) -> usize {
        (self.0 >> SLOT_BITS) as usize
    }

    /// The slot in its shard.
    pub(crate) fn slot(self) -> Slot {
        self.0 & ((1 << SLOT_BITS) - 1)
    }
}

/// One topic. There are many of them: every byte counts.
struct Watched {
    topic: Topic,
    watchers: Vec<SessionPlace>,
    told: Told,
    /// Place in [`Fanout::apps`].
    app: u16,
    /// Registrations on the present route without an answer.
    asked: u16,
    /// The present leader has registered the interest.
    registered: bool,
    /// Refused for good: no longer in the index, and only here until its sessions have heard of it.
    refused: bool,
}

/// Live events that cannot be used: their broker's fault.
#[derive(Debug)]
pub(crate) struct BadLive {
    pub(crate) slot: Slot,
    pub(crate) error: BadRun,
}

/// What became of the wish to watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begun {
    /// The topic is new here: interest must be registered.
    New(Slot),
    /// Others watch it too.
    Joined(Slot),
    /// There is no place left.
    Full,
}

/// The index of one shard.
pub(crate) struct Fanout {
    /// The shard's place at this gateway.
    shard: u16,
    /// By app and topic. Never iterated: its order is another one in every process.
    index: HashTable<Slot>,
    hasher: DefaultHashBuilder,
    watched: Vec<Option<Watched>>,
    apps: Vec<AppId>,
    free: Vec<Slot>,
    /// Given up while registrations may still be answered, with how many; free after the last answer or the next
    /// [`Self::unregister`].
    given_up: BTreeMap<Slot, u16>,
}

impl Fanout {
    /// `shard` is the shard's place at this gateway.
    pub(crate) fn new(shard: u16) -> Self {
        Self {
            shard,
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
            watched: Vec::new(),
            apps: Vec::new(),
            free: Vec::new(),
            given_up: BTreeMap::new(),
        }
    }

    /// Adds a session. It is told at once if the interest is registered already.
    pub(crate) fn watch(&mut self, app: &AppId, topic: &Topic, session: SessionPlace, inbox: &Inbox) -> Begun {
        let shard = self.shard;
        if let Some(slot) = self.find(app.as_str(), topic.as_ref())
            && let Some(Some(watched)) = self.watched.get_mut(slot as usize)
        {
            if watched.registered {
                let upto = watched.told.upto();
                inbox.head(Place::new(shard, slot), HeadNews::new(upto, upto, true));
            }
            grow(&mut watched.watchers);
            watched.watchers.push(session);
            return Begun::Joined(slot);
        }
        let (Some(app_place), Some(slot)) = (self.app(app), self.take_slot()) else { return Begun::Full };
        let mut watchers = Vec::new();
        grow(&mut watchers);
        watchers.push(session);
        let watched = Watched {
            topic: topic.clone(),
            watchers,
            told: Told::default(),
            app: app_place,
            asked: 0,
            registered: false,
            refused: false,
        };
        if let Some(place) = self.watched.get_mut(slot as usize) {
            *place = Some(watched);
        }
        let hash = self.hash(app.as_str(), topic.as_ref());
        let Self { index, hasher, watched, apps, .. } = self;
        index.insert_unique(hash, slot, |&slot| hash_of(hasher, watched, apps, slot));
        Begun::New(slot)
    }

    /// Removes a session. The name of the topic when nobody watches it any more and interest must be dropped.
    pub(crate) fn unwatch(&mut self, slot: Slot, session: SessionPlace) -> Option<Named> {
        let watched = self.watched.get_mut(slot as usize)?.as_mut()?;
        watched.watchers.retain(|&watcher| watcher != session);
        if !watched.watchers.is_empty() {
            return None;
        }
        let (refused, asked) = (watched.refused, watched.asked);
        let name = self.name(slot);
        self.unlink(slot);
        *self.watched.get_mut(slot as usize)? = None;
        // An answer to a registration that is under way must not meet another topic in this slot.
        match asked {
            0 => self.free.push(slot),
            asked => drop(self.given_up.insert(slot, asked)),
        }
        (!refused).then_some(name)
    }

    /// All topics of which something is wanted, in an order that is the same in every process.
    pub(crate) fn slots(&self) -> impl Iterator<Item = Slot> {
        let wanted = |watched: &Option<Watched>| watched.as_ref().is_some_and(|watched| !watched.refused);
        self.watched.iter().zip(0..).filter(move |(watched, _)| wanted(watched)).map(|(_, slot)| slot)
    }

    /// Whether anything is watched.
    pub(crate) fn has_watchers(&self) -> bool {
        !self.index.is_empty()
    }

    /// Where a topic stands in the index.
    pub(crate) fn find(&self, app: &str, topic: TopicRef<'_>) -> Option<Slot> {
        let is_it = |&slot: &Slot| {
            let watched = self.get(slot).filter(|watched| watched.topic.as_ref() == topic);
            watched.and_then(|watched| self.app_of(watched)).is_some_and(|of| of.as_str() == app)
        };
        self.index.find(self.hash(app, topic), is_it).copied()
    }

    /// The conversation of a slot.
    pub(crate) fn conversation(&self, slot: Slot) -> Option<&ConversationId> {
        match &self.get(slot)?.topic {
            Topic::Conversation(id) => Some(id),
            Topic::User(_) => None,
        }
    }

    /// The name of a slot; empty for one that is not taken.
    pub(crate) fn name(&self, slot: Slot) -> Named {
        let Some(watched) = self.get(slot) else { return Named::default() };
        let app = self.app_of(watched).map(AppId::as_str).unwrap_or_default();
        let named = Named { app: app.into(), ..Named::default() };
        match &watched.topic {
            Topic::Conversation(id) => Named { conversation: id.as_str().into(), ..named },
            Topic::User(id) => Named { user: id.as_str().into(), ..named },
        }
    }

    /// Up to where all streams of a conversation were told what there is.
    pub(crate) fn told(&self, slot: Slot) -> Option<Seq> {
        Some(self.get(slot)?.told.upto())
    }

    /// No registration counts any more: the stream or the term changed. No answer to an older one will be looked at.
    pub(crate) fn unregister(&mut self) {
        self.watched.iter_mut().flatten().for_each(|watched| (watched.registered, watched.asked) = (false, 0));
        self.free.extend(std::mem::take(&mut self.given_up).into_keys());
    }

    /// Interest in a topic is asked for (again) on the present route.
    pub(crate) fn asks(&mut self, slot: Slot) {
        if let Some(Some(watched)) = self.watched.get_mut(slot as usize) {
            // At its end the count stays there: the slot is free with the next route.
            (watched.registered, watched.asked) = (false, watched.asked.saturating_add(1));
        }
    }

    /// A registration on the present route has its answer, whatever that is.
    pub(crate) fn answered(&mut self, slot: Slot) {
        let is_last = |asked: &mut u16| {
            *asked -= u16::from(*asked > 0 && *asked < u16::MAX);
            *asked == 0
        };
        if let Some(Some(watched)) = self.watched.get_mut(slot as usize) {
            is_last(&mut watched.asked);
        } else if self.given_up.get_mut(&slot).is_some_and(is_last) {
            self.given_up.remove(&slot);
            self.free.push(slot);
        }
    }

    /// The leader registered interest at this head.
    pub(crate) fn registered(&mut self, slot: Slot, head: Seq, sessions: &Places) {
        let Some(Some(watched)) = self.watched.get_mut(slot as usize) else { return };
        watched.registered = true;
        let (place, news) = (Place::new(self.shard, slot), HeadNews::new(head, watched.told.tell(head), true));
        sessions.all(&watched.watchers).for_each(|inbox| inbox.head(place, news));
    }

    /// The leader refused the interest for good: whoever comes next asks anew. The slot stays taken until all sessions
    /// that were told have left it, so that none takes another conversation's news for this one's.
    pub(crate) fn refused(&mut self, slot: Slot, refusal: &Refusal, sessions: &Places) {
        self.unlink(slot);
        let Some(Some(watched)) = self.watched.get_mut(slot as usize) else { return };
        watched.refused = true;
        let place = Place::new(self.shard, slot);
        sessions.all(&watched.watchers).for_each(|inbox| inbox.refused(place, refusal.clone()));
    }

    /// A topic's head is at least this.
    pub(crate) fn head(&mut self, hint: &internal::HeadHint, sessions: &Places) {
        let topic = match hint.user.as_str() {
            "" => TopicRef::Conversation(&hint.conversation),
            user => TopicRef::User(user),
        };
        let Some(slot) = self.find(&hint.app, topic) else { return };
        let Some(Some(watched)) = self.watched.get_mut(slot as usize) else { return };
        let head = Seq(hint.head);
        let (place, news) = (Place::new(self.shard, slot), HeadNews::new(head, watched.told.tell(head), false));
        if news.holds_back() {
            sessions.all(&watched.watchers).for_each(|inbox| inbox.head(place, news));
        }
    }

    /// Carries a live push to all sessions that watch its conversation.
    pub(crate) fn live(&mut self, live: internal::Live, around: &Around<'_>) -> Result<(), BadLive> {
        let topic = TopicRef::Conversation(&live.conversation);
        let Some(slot) = self.find(&live.app, topic) else { return Ok(()) };
        let Some(Some(watched)) = self.watched.get_mut(slot as usize) else { return Ok(()) };
        around.metrics.live_events.inc_by(live.records.len() as u64);
        let sessions = around.sessions.read();
        let place = Place::new(self.shard, slot);
        let mut records = &live.records[..];
        while !records.is_empty() {
            let (part, rest) = records.split_at(part_len(records, around.frame_bytes));
            let run = run_of_records(part).map_err(|error| BadLive { slot, error })?;
            let before = watched.told.tell(run.last);
            let push = Arc::new(encode(&live.conversation, part, run, before));
            for inbox in sessions.all(&watched.watchers) {
                if !inbox.push(place, &push) {
                    around.metrics.dropped_pushes.inc();
                }
            }
            records = rest;
        }
        Ok(())
    }

    fn get(&self, slot: Slot) -> Option<&Watched> {
        self.watched.get(slot as usize)?.as_ref()
    }

    fn app_of(&self, watched: &Watched) -> Option<&AppId> {
        self.apps.get(usize::from(watched.app))
    }

    /// The app's place; there are few.
    fn app(&mut self, app: &AppId) -> Option<u16> {
        let known = self.apps.iter().position(|known| known == app);
        let place = u16::try_from(known.unwrap_or(self.apps.len())).ok()?;
        if known.is_none() {
            self.apps.push(app.clone());
        }
        Some(place)
    }

    fn take_slot(&mut self) -> Option<Slot> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.watched.len() >= limits::GATEWAY_SHARD_CONVERSATIONS {
            return None;
        }
        grow(&mut self.watched);
        self.watched.push(None);
        Some((self.watched.len() - 1) as Slot)
    }

    /// Takes a topic out of the index.
    fn unlink(&mut self, slot: Slot) {
        let Some(watched) = self.get(slot) else { return };
        let app = self.app_of(watched).map(AppId::as_str).unwrap_or_default();
        let hash = self.hash(app, watched.topic.as_ref());
        if let Ok(entry) = self.index.find_entry(hash, |&other| other == slot) {
            entry.remove();
        }
    }

    fn hash(&self, app: &str, topic: TopicRef<'_>) -> u64 {
        self.hasher.hash_one((app, topic))
    }
}

fn hash_of(hasher: &DefaultHashBuilder, watched: &[Option<Watched>], apps: &[AppId], slot: Slot) -> u64 {
    // Only slots that are taken stand in the index.
    let Some(Some(watched)) = watched.get(slot as usize) else { return 0 };
    let app = apps.get(usize::from(watched.app)).map(AppId::as_str).unwrap_or_default();
    hasher.hash_one((app, watched.topic.as_ref()))
}

/// Room for one more, and for an eighth on top: doubling would leave half of a large gateway's memory unused.
pub(crate) fn grow<T>(list: &mut Vec<T>) {
    if list.len() == list.capacity() {
        list.reserve_exact((list.len() / 8).max(2));
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

fn encode(conversation: &str, records: &[Bytes], run: PushRun, before: Seq) -> Push {
    let items = records.iter().map(|r| v1::Item { item: Some(item::Item::Record(r.clone())) }).collect();
    let frame = ServerFrame::Events(v1::Events { conversation: conversation.into(), items }).to_bytes();
    let credit_bytes = records.iter().map(|r| r.len() as u64).sum();
    let records = if run.removals.is_empty() { Vec::new() } else { records.to_vec() };
    Push { frame, credit_bytes, run, before, records }
}

#[cfg(test)]
mod tests {
    use stentor_proto::{ids::PlacementVersion, record, v1::EventHeader, v1::EventKind};

    use super::*;
    use crate::{link::Links, metrics::Metrics, sessions::Sessions};

    fn event(seq: u64, kind: EventKind, subject: &'static str, body: &[u8]) -> Bytes {
        let header = EventHeader { seq, kind: kind.into(), subject: subject.into(), ..Default::default() };
        let mut out = Vec::new();
        record::encode(&header, body, 0, 0, &mut out);
        out.into()
    }

    fn live(records: Vec<Bytes>) -> internal::Live {
        internal::Live { shard: 1, app: "app".into(), conversation: "c".into(), records }
    }

    struct World {
        links: Links,
        metrics: Metrics,
        sessions: Sessions,
        fanout: Fanout,
        app: AppId,
    }

    impl World {
        fn new() -> Self {
            let links = Links::new(std::iter::empty());
            let app = AppId::new("app").unwrap();
            let (metrics, sessions) = (Metrics::default(), Sessions::default());
            Self { links, metrics, sessions, fanout: Fanout::new(SHARD), app }
        }

        fn sessions<const N: usize>(&self) -> [(SessionPlace, Arc<Inbox>); N] {
            std::array::from_fn(|_| {
                let inbox = Arc::new(Inbox::default());
                (self.sessions.enter(&inbox), inbox)
            })
        }

        fn watch(&mut self, conversation: &str, (session, inbox): &(SessionPlace, Arc<Inbox>)) -> Begun {
            let topic = Topic::Conversation(ConversationId::new(conversation).unwrap());
            self.fanout.watch(&self.app, &topic, *session, inbox)
        }

        fn live(&mut self, records: Vec<Bytes>) -> Result<(), BadLive> {
            let placement = PlacementVersion(1);
            let (links, metrics, sessions) = (&self.links, &self.metrics, &self.sessions);
            let around = Around { links, metrics, sessions, placement, now_ms: 0, frame_bytes: 65_536 };
            self.fanout.live(live(records), &around)
        }

        fn registered(&mut self, slot: Slot, head: u64) {
            self.fanout.answered(slot);
            self.fanout.registered(slot, Seq(head), &self.sessions.read());
        }
    }

    fn hint(conversation: &str, user: &str, head: u64) -> internal::HeadHint {
        internal::HeadHint { app: "app".into(), conversation: conversation.into(), user: user.into(), head }
    }

    const SHARD: u16 = 7;

    fn place(slot: Slot) -> Place {
        Place::new(SHARD, slot)
    }

    #[test]
    fn a_push_is_encoded_once_for_all_its_sessions() {
        let mut world = World::new();
        let sessions: [_; 3] = world.sessions();
        let begun = sessions.each_ref().map(|session| world.watch("c", session));
        assert_eq!(begun, [Begun::New(0), Begun::Joined(0), Begun::Joined(0)]);
        world.watch("other", &sessions[0]);
        let records = vec![event(4, EventKind::Message, "", b"x"), event(5, EventKind::ParticipantRemoved, "ann", b"")];
        assert!(world.live(records).is_ok());
        let news = sessions.each_ref().map(|(_, inbox)| inbox.take());
        let first = &news[0].pushes[0].1;
        assert_eq!((first.run.first, first.run.last, first.records.len()), (Seq(4), Seq(5), 2));
        assert_eq!(first.run.for_user("ann").removed_at, Some(Seq(5)));
        for news in &news {
            assert_eq!((news.pushes.len(), news.pushes[0].0), (1, place(0)));
            assert!(Arc::ptr_eq(first, &news.pushes[0].1));
        }
    }

    #[test]
    fn a_long_push_is_cut_into_frames_that_fit() {
        let mut world = World::new();
        let [session] = world.sessions();
        world.watch("c", &session);
        assert!(world.live((1..=10).map(|seq| event(seq, EventKind::Message, "", &[0; 20_000])).collect()).is_ok());
        let news = session.1.take();
        assert!(news.pushes.len() >= 3 || !news.heads.is_empty());
        assert!(news.pushes.iter().all(|(_, push)| push.frame.len() <= 65_536));
        let befores: Vec<_> = news.pushes.iter().map(|(_, push)| push.before.0 + 1).collect();
        let firsts: Vec<_> = news.pushes.iter().map(|(_, push)| push.run.first.0).collect();
        assert_eq!(befores, firsts, "each part begins where the one before it ended");
    }

    #[test]
    fn events_that_are_not_dense_are_not_carried() {
        let mut world = World::new();
        let [session] = world.sessions();
        world.watch("c", &session);
        let records = vec![event(4, EventKind::Message, "", b"x"), event(6, EventKind::Message, "", b"x")];
        assert_eq!(world.live(records).unwrap_err().slot, 0);
        assert!(world.live(vec![Bytes::from_static(b"no record")]).is_err());
        assert!(session.1.take().pushes.is_empty());
    }

    #[test]
    fn a_slot_is_not_given_again_while_its_registrations_may_be_answered() {
        let mut world = World::new();
        let [session] = world.sessions();
        assert_eq!(world.watch("c", &session), Begun::New(0));
        world.fanout.asks(0);
        world.fanout.asks(0);
        assert!(world.fanout.unwatch(0, session.0).is_some(), "nobody is left");
        assert_eq!(world.watch("d", &session), Begun::New(1));
        for asked in [2, 1] {
            assert_eq!(world.fanout.given_up.get(&0), Some(&asked));
            world.registered(0, 9);
            assert!(session.1.take().heads.is_empty(), "an answer for a conversation that nobody watches");
        }
        assert_eq!(world.watch("e", &session), Begun::New(0), "free once all was answered");
        world.fanout.asks(0);
        world.registered(0, 4);
        assert_eq!(session.1.take().heads[&place(0)], HeadNews::new(Seq(4), Seq(0), true));
        assert!(world.fanout.unwatch(0, session.0).is_some());
        assert_eq!(world.watch("f", &session), Begun::New(0), "free at once when it was answered before");
    }

    #[test]
    fn a_refused_interest_leaves_its_slot_and_strands_nobody() {
        let mut world = World::new();
        let [session, next] = world.sessions();
        for _ in 0..1_000 {
            assert!(matches!(world.watch("nowhere", &session), Begun::New(_)), "whoever comes after it asks anew");
            let slot = world.fanout.find("app", TopicRef::Conversation("nowhere")).unwrap();
            world.fanout.asks(slot);
            world.fanout.answered(slot);
            let refusal = stentor_proto::reason::Reason::UnknownConversation.refusal();
            world.fanout.refused(slot, &refusal, &world.sessions.read());
            // Until the session has left it, the slot is no other conversation's.
            let Begun::New(other) = world.watch("elsewhere", &next) else { panic!() };
            assert_ne!(other, slot);
            assert!(world.fanout.unwatch(other, next.0).is_some());
            assert_eq!(session.1.take().refused, [(place(slot), refusal)]);
            assert_eq!(world.fanout.unwatch(slot, session.0), None, "there is no interest left to drop");
        }
        assert!(!world.fanout.has_watchers());
        assert_eq!((world.fanout.watched.len(), world.fanout.given_up.len()), (2, 0), "two slots served them all");
    }

    #[test]
    fn a_late_session_hears_of_the_registration() {
        let mut world = World::new();
        let [first, late] = world.sessions();
        world.watch("c", &first);
        world.fanout.asks(0);
        world.registered(0, 4);
        assert!(world.live(vec![event(5, EventKind::Message, "", b"x")]).is_ok());
        world.watch("c", &late);
        assert_eq!(late.1.take().heads[&place(0)], HeadNews::new(Seq(5), Seq(5), true));
        assert_eq!(world.fanout.unwatch(0, first.0), None, "one is left");
        assert_eq!(world.fanout.unwatch(0, first.0), None, "twice does no harm");
        world.fanout.head(&hint("c", "", 8), &world.sessions.read());
        assert_eq!(late.1.take().heads[&place(0)], HeadNews::new(Seq(8), Seq(5), false));
        world.fanout.head(&hint("c", "", 8), &world.sessions.read());
        assert!(late.1.take().heads.is_empty(), "told already");
    }

    #[test]
    fn a_conversation_with_ten_sessions_costs_few_bytes() {
        // What an idle device costs per conversation rests on this (docs/performance.md).
        assert!(size_of::<Option<Watched>>() <= 64, "{}", size_of::<Option<Watched>>());
        let mut world = World::new();
        let sessions: [_; 10] = world.sessions();
        for session in &sessions {
            world.watch("c", session);
        }
        assert!(world.fanout.get(0).unwrap().watchers.capacity() <= 12);
    }

    #[test]
    fn apps_do_not_meet() {
        let mut world = World::new();
        let [session] = world.sessions();
        world.watch("c", &session);
        world.app = AppId::new("other").unwrap();
        assert_eq!(world.watch("c", &session), Begun::New(1));
        let find = |app| world.fanout.find(app, TopicRef::Conversation("c"));
        assert_eq!((find("app"), find("other")), (Some(0), Some(1)));
        assert_eq!((world.fanout.name(1).app, world.fanout.name(1).conversation), ("other".into(), "c".into()));
        assert!(world.live(vec![event(1, EventKind::Message, "", b"x")]).is_ok());
        assert_eq!(session.1.take().pushes[0].0, place(0));
    }

    #[test]
    fn a_user_is_watched_beside_a_conversation_of_the_same_name() {
        let mut world = World::new();
        let [of_conversation, of_user] = world.sessions();
        world.watch("c", &of_conversation);
        let topic = Topic::User(UserId::new("c").unwrap());
        assert_eq!(world.fanout.watch(&world.app, &topic, of_user.0, &of_user.1), Begun::New(1));
        world.fanout.head(&hint("", "c", 3), &world.sessions.read());
        assert_eq!(of_user.1.take().heads[&place(1)].head, Seq(3));
        assert!(of_conversation.1.take().heads.is_empty());
        assert_eq!(world.fanout.conversation(1), None);
        let name = world.fanout.unwatch(1, of_user.0).unwrap();
        assert_eq!((name.user.as_str(), name.conversation.as_str()), ("c", ""));
    }
}
