//! Tests of the index: what is told to whom, and which slots are free. Must never look at a session's delivery.

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
        let topic = Topic::Conversation(conversation);
        self.fanout.watch(&self.app, topic, *session, inbox)
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
        let slot = world.fanout.find("app", Topic::Conversation("nowhere")).unwrap();
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
    assert!(world.fanout.get(0).unwrap().watchers.0.len() <= 12);
}

#[test]
fn apps_do_not_meet() {
    let mut world = World::new();
    let [session] = world.sessions();
    world.watch("c", &session);
    world.app = AppId::new("other").unwrap();
    assert_eq!(world.watch("c", &session), Begun::New(1));
    let find = |app| world.fanout.find(app, Topic::Conversation("c"));
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
    let topic = Topic::User("c");
    assert_eq!(world.fanout.watch(&world.app, topic, of_user.0, &of_user.1), Begun::New(1));
    world.fanout.head(&hint("", "c", 3), &world.sessions.read());
    assert_eq!(of_user.1.take().heads[&place(1)].head, Seq(3));
    assert!(of_conversation.1.take().heads.is_empty());
    assert_eq!(world.fanout.conversation(1), None);
    let name = world.fanout.unwatch(1, of_user.0).unwrap();
    assert_eq!((name.user.as_str(), name.conversation.as_str()), ("c", ""));
}

#[test]
fn watchers_are_those_that_came_and_did_not_leave() {
    let mut rng = 1_u32;
    let (mut watchers, mut model) = (Watchers::default(), std::collections::BTreeSet::new());
    for _ in 0..2_000 {
        rng = rng.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let session = (rng >> 8) % 50;
        if model.insert(session) {
            watchers.push(session);
        } else {
            model.remove(&session);
            watchers.remove(session);
        }
        watchers.remove(99);
        let mut there = watchers.places().to_vec();
        assert_eq!((watchers.len(), watchers.is_empty()), (model.len(), model.is_empty()));
        there.sort_unstable();
        assert!(there.into_iter().eq(model.iter().copied()));
    }
}
