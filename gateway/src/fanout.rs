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
    ids::{AppId, Seq},
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Topic<'a> {
    /// The events of the conversation with this id.
    Conversation(&'a str),
    /// The head of this user's own stream.
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
    /// The conversation's or the user's: a copy of its own, since sharing it costs more bytes than it saves.
    id: Box<str>,
    watchers: Watchers,
    told: Told,
    /// Place in [`Fanout::apps`].
    app: u16,
    /// Registrations on the present route without an answer.
    asked: u16,
    /// A user's own stream, not a conversation.
    is_user: bool,
    /// The present leader has registered the interest.
    registered: bool,
    /// Refused for good: no longer in the index, and only here until its sessions have heard of it.
    refused: bool,
}

/// The sessions that watch one topic, in no order. Less than a `Vec`, since there are many of them.
#[derive(Default)]
struct Watchers(Box<[SessionPlace]>);

impl Watchers {
    /// Fills up the list. No session has this place.
    const NOBODY: SessionPlace = SessionPlace::MAX;

    fn places(&self) -> &[SessionPlace] {
        self.0.get(..self.len()).unwrap_or_default()
    }

    fn len(&self) -> usize {
        // Everybody stands before nobody.
        self.0.partition_point(|&place| place != Self::NOBODY)
    }

    fn is_empty(&self) -> bool {
        self.0.first().is_none_or(|&first| first == Self::NOBODY)
    }

    fn push(&mut self, session: SessionPlace) {
        let len = self.len();
        if len == self.0.len() {
            let mut list = std::mem::take(&mut self.0).into_vec();
            grow(&mut list);
            list.resize(list.capacity(), Self::NOBODY);
            self.0 = list.into_boxed_slice();
        }
        if let Some(place) = self.0.get_mut(len) {
            *place = session;
        }
    }

    fn remove(&mut self, session: SessionPlace) {
        let Some(last) = self.len().checked_sub(1) else { return };
        if let Some(at) = self.0.iter().position(|&place| place == session) {
            self.0.swap(at, last);
            self.0[last] = Self::NOBODY;
        }
    }
}

#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Option<Watched>>() == 48);

impl Watched {
    fn topic(&self) -> Topic<'_> {
        if self.is_user { Topic::User(&self.id) } else { Topic::Conversation(&self.id) }
    }
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
    pub(crate) fn watch(&mut self, app: &AppId, topic: Topic<'_>, session: SessionPlace, inbox: &Inbox) -> Begun {
        let shard = self.shard;
        if let Some(slot) = self.find(app.as_str(), topic)
            && let Some(Some(watched)) = self.watched.get_mut(slot as usize)
        {
            if watched.registered {
                let upto = watched.told.upto();
                inbox.head(Place::new(shard, slot), HeadNews::new(upto, upto, true));
            }
            watched.watchers.push(session);
            return Begun::Joined(slot);
        }
        let (Some(app_place), Some(slot)) = (self.app(app), self.take_slot()) else { return Begun::Full };
        let mut watchers = Watchers::default();
        watchers.push(session);
        let (is_user, id) = match topic {
            Topic::Conversation(id) => (false, id),
            Topic::User(id) => (true, id),
        };
        let watched = Watched {
            id: id.into(),
            watchers,
            told: Told::default(),
            app: app_place,
            asked: 0,
            is_user,
            registered: false,
            refused: false,
        };
        if let Some(place) = self.watched.get_mut(slot as usize) {
            *place = Some(watched);
        }
        let hash = self.hash(app.as_str(), topic);
        let Self { index, hasher, watched, apps, .. } = self;
        index.insert_unique(hash, slot, |&slot| hash_of(hasher, watched, apps, slot));
        Begun::New(slot)
    }

    /// Removes a session. The name of the topic when nobody watches it any more and interest must be dropped.
    pub(crate) fn unwatch(&mut self, slot: Slot, session: SessionPlace) -> Option<Named> {
        let watched = self.watched.get_mut(slot as usize)?.as_mut()?;
        watched.watchers.remove(session);
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
    pub(crate) fn find(&self, app: &str, topic: Topic<'_>) -> Option<Slot> {
        let is_it = |&slot: &Slot| {
            let watched = self.get(slot).filter(|watched| watched.topic() == topic);
            watched.and_then(|watched| self.app_of(watched)).is_some_and(|of| of.as_str() == app)
        };
        self.index.find(self.hash(app, topic), is_it).copied()
    }

    /// The conversation of a slot.
    pub(crate) fn conversation(&self, slot: Slot) -> Option<&str> {
        match self.get(slot)?.topic() {
            Topic::Conversation(id) => Some(id),
            Topic::User(_) => None,
        }
    }

    /// The name of a slot; empty for one that is not taken.
    pub(crate) fn name(&self, slot: Slot) -> Named {
        let Some(watched) = self.get(slot) else { return Named::default() };
        let app = self.app_of(watched).map(AppId::as_str).unwrap_or_default();
        let named = Named { app: app.into(), ..Named::default() };
        match watched.topic() {
            Topic::Conversation(id) => Named { conversation: id.into(), ..named },
            Topic::User(id) => Named { user: id.into(), ..named },
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

    /// Whether a topic is wanted here that has no interest, and none is asked for.
    pub(crate) fn lacks_interest(&self, slot: Slot) -> bool {
        self.get(slot).is_some_and(|watched| !watched.registered && !watched.refused && watched.asked == 0)
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
        sessions.all(watched.watchers.places()).for_each(|inbox| inbox.head(place, news));
    }

    /// The leader refused the interest for good: whoever comes next asks anew. The slot stays taken until all sessions
    /// that were told have left it, so that none takes another conversation's news for this one's.
    pub(crate) fn refused(&mut self, slot: Slot, refusal: &Refusal, sessions: &Places) {
        self.unlink(slot);
        let Some(Some(watched)) = self.watched.get_mut(slot as usize) else { return };
        watched.refused = true;
        let place = Place::new(self.shard, slot);
        sessions.all(watched.watchers.places()).for_each(|inbox| inbox.refused(place, refusal.clone()));
    }

    /// A topic's head is at least this.
    pub(crate) fn head(&mut self, hint: &internal::HeadHint, sessions: &Places) {
        let topic = match hint.user.as_str() {
            "" => Topic::Conversation(&hint.conversation),
            user => Topic::User(user),
        };
        let Some(slot) = self.find(&hint.app, topic) else { return };
        let Some(Some(watched)) = self.watched.get_mut(slot as usize) else { return };
        let head = Seq(hint.head);
        let (place, news) = (Place::new(self.shard, slot), HeadNews::new(head, watched.told.tell(head), false));
        if news.holds_back() {
            sessions.all(watched.watchers.places()).for_each(|inbox| inbox.head(place, news));
        }
    }

    /// Carries a live push to all sessions that watch its conversation.
    pub(crate) fn live(&mut self, live: internal::Live, around: &Around<'_>) -> Result<(), BadLive> {
        let topic = Topic::Conversation(&live.conversation);
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
            for inbox in sessions.all(watched.watchers.places()) {
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
        let hash = self.hash(app, watched.topic());
        if let Ok(entry) = self.index.find_entry(hash, |&other| other == slot) {
            entry.remove();
        }
    }

    fn hash(&self, app: &str, topic: Topic<'_>) -> u64 {
        self.hasher.hash_one((app, topic))
    }
}

fn hash_of(hasher: &DefaultHashBuilder, watched: &[Option<Watched>], apps: &[AppId], slot: Slot) -> u64 {
    // Only slots that are taken stand in the index.
    let Some(Some(watched)) = watched.get(slot as usize) else { return 0 };
    let app = apps.get(usize::from(watched.app)).map(AppId::as_str).unwrap_or_default();
    hasher.hash_one((app, watched.topic()))
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
#[path = "fanout_tests.rs"]
mod tests;
