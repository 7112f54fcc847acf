//! A user's shard beside what it promises: fencing of sessions, cursors that never go back, a list of conversations
//! that late news cannot spoil; and the meta shard's version checks.

// A test may stop at once: `unwrap` and `panic!` are how it says that something is not as it should be.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "model/flaky.rs"]
mod flaky;

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use flaky::Flaky;
use proptest::prelude::*;
use stentor_engine::{
    apply::{self, Context},
    command,
    effect::{Applied, Effect, Outcome},
    key::{Entity, RowKey},
    limits, meta, placement,
    rows::{MemoryRows, Row, Rows},
    user,
};
use stentor_proto::{
    ids::{
        AppId, ApplyLevel, BrokerId, ConversationId, DeviceId, Incarnation, ReplicaId, SendNo, Seq, SessionNo, StampMs,
        UserId,
    },
    internal::{Command, JoinBroker, PutBroker, ShardPlacement, UserConversationRow, command::Op},
    reason::Reason,
};

#[derive(Default)]
struct Shard {
    rows: MemoryRows,
    /// The same, with nothing in memory when a command begins; told by the hint, and not.
    unloaded: [Flaky; 2],
    effects: Vec<Effect>,
}

impl Shard {
    fn apply(&mut self, command: &Command) -> Outcome {
        let (mut out, mut records) = (Applied::default(), BytesMut::new());
        let ctx = Context { stamp: StampMs(7), level: apply::LEVEL };
        apply::apply_command(&mut self.rows, &ctx, &command::encode(command), &mut records, &mut out).unwrap();
        for (listen, unloaded) in [true, false].into_iter().zip(&mut self.unloaded) {
            let mut again = Applied::default();
            let missed = unloaded.apply(&ctx, &command::encode(command), listen, &mut again);
            assert!(again == out && unloaded.all == self.rows, "{command:?}");
            assert!(
                !listen || missed == 0 || command.target.is_empty(),
                "the hint names every row of a user's command"
            );
        }
        self.effects = out.effects;
        out.outcomes.remove(0)
    }

    fn cursor(&mut self, key: &RowKey) -> u64 {
        match self.rows.get(key).unwrap() {
            Some(Row::Cursor(cursor)) => cursor.seq,
            None => 0,
            other => panic!("{other:?}"),
        }
    }

    fn user(&mut self) -> stentor_proto::internal::UserRow {
        match self.rows.get(&user::user_key(&ann())).unwrap() {
            Some(Row::User(user)) => *user,
            _ => Default::default(),
        }
    }
}

fn app() -> AppId {
    AppId::new("app").unwrap()
}

fn user_id() -> UserId {
    UserId::new("ann").unwrap()
}

fn ann() -> Entity {
    Entity::user("app", "ann")
}

fn device(n: usize) -> DeviceId {
    DeviceId::new(format!("d{n}")).unwrap()
}

fn conversation(n: usize) -> ConversationId {
    ConversationId::new(format!("c{n}")).unwrap()
}

fn open(on: usize, nonce: u8) -> Command {
    command::open_session(&app(), &user_id(), &device(on), &[nonce; 16])
}

fn moves(on: usize, session: u64, delivered: &[(usize, u64)], read: &[(usize, u64)]) -> Command {
    let cursors = |list: &[(usize, u64)]| list.iter().map(|&(c, s)| (conversation(c), Seq(s))).collect::<Vec<_>>();
    command::move_cursors(&app(), &user_id(), &device(on), SessionNo(session), &cursors(delivered), &cursors(read))
}

const SUPERSEDED: Outcome = Outcome::Refused { reason: Reason::SessionSuperseded, last: stentor_proto::ids::SendNo(0) };

#[test]
fn a_new_session_fences_the_old_one() {
    let mut shard = Shard::default();
    assert_eq!(shard.apply(&open(0, 1)), Outcome::SessionOpened { session_no: SessionNo(1) });
    assert_eq!(shard.apply(&moves(0, 1, &[(0, 5)], &[(0, 3)])), Outcome::Done);
    assert_eq!(shard.apply(&open(0, 2)), Outcome::SessionOpened { session_no: SessionNo(2) });
    let before = shard.rows.clone();
    assert_eq!(shard.apply(&moves(0, 1, &[(0, 9)], &[])), SUPERSEDED);
    assert_eq!(shard.apply(&open(0, 1)), SUPERSEDED);
    assert_eq!(shard.apply(&open(0, 2)), Outcome::SessionOpened { session_no: SessionNo(2) });
    assert_eq!(shard.apply(&moves(0, 3, &[(0, 9)], &[])), Outcome::refused(Reason::Malformed));
    assert_eq!(shard.apply(&moves(1, 1, &[(0, 9)], &[])), Outcome::refused(Reason::UnknownDevice));
    assert_eq!(shard.rows, before, "none of these changed anything");
}

#[test]
fn devices_are_bounded_and_a_removed_one_stays_fenced() {
    let mut shard = Shard::default();
    for n in 0..limits::MAX_DEVICES_PER_USER as usize {
        assert!(matches!(shard.apply(&open(n, 1)), Outcome::SessionOpened { .. }));
    }
    assert_eq!(shard.apply(&open(9_999, 1)), Outcome::refused(Reason::TooManyDevices));
    assert_eq!(shard.apply(&command::remove_device(&app(), &user_id(), &device(0), &[])), Outcome::Done);
    let gone = command::remove_device(&app(), &user_id(), &device(0), &[]);
    assert_eq!(shard.apply(&gone), Outcome::refused(Reason::UnknownDevice));
    let Outcome::SessionOpened { session_no } = shard.apply(&open(0, 1)) else { panic!() };
    assert_eq!(session_no.0, u64::from(limits::MAX_DEVICES_PER_USER) + 1);
    assert_eq!(shard.apply(&moves(0, 1, &[(0, 9)], &[])), SUPERSEDED);
}

proptest! {
    #[test]
    fn session_numbers_only_grow_and_one_nonce_has_one(steps in prop::collection::vec((0..3usize, 0..12u8), 1..60)) {
        let mut shard = Shard::default();
        let mut given = BTreeMap::new();
        let mut current = BTreeMap::new();
        let mut highest = 0;
        for (on, nonce) in steps {
            match shard.apply(&open(on, nonce)) {
                Outcome::SessionOpened { session_no } => {
                    if let Some(before) = given.insert((on, nonce), session_no.0) {
                        prop_assert_eq!((before, current[&on]), (session_no.0, nonce));
                    } else {
                        prop_assert!(session_no.0 > highest);
                        highest = session_no.0;
                    }
                    current.insert(on, nonce);
                }
                outcome => {
                    prop_assert_eq!(outcome, SUPERSEDED);
                    prop_assert!(given.contains_key(&(on, nonce)) && current[&on] != nonce);
                }
            }
        }
    }

    #[test]
    fn cursors_are_the_highest_seq_that_was_named(
        steps in prop::collection::vec((0..2usize, any::<bool>(), 0..3usize, 0..20u64, 0..3usize, 0..20u64), 1..40),
    ) {
        let mut shard = Shard::default();
        let sessions = [1, 2];
        for on in 0..2 {
            shard.apply(&open(on, 1));
        }
        let (mut delivered, mut read) = (BTreeMap::new(), BTreeMap::new());
        for (on, old, c, seq, c2, seq2) in steps {
            let session = sessions[on] - u64::from(old);
            let outcome = shard.apply(&moves(on, session, &[(c, seq), (c2, seq2)], &[(c, seq2)]));
            if old {
                prop_assert_eq!(outcome, SUPERSEDED);
                continue;
            }
            prop_assert_eq!(outcome, Outcome::Done);
            for (c, seq) in [(c, seq), (c2, seq2)] {
                let cursor = delivered.entry((on, c)).or_insert(0);
                *cursor = seq.max(*cursor);
            }
            let cursor = read.entry(c).or_insert(0);
            *cursor = seq2.max(*cursor);
        }
        for (&(on, c), &seq) in &delivered {
            let key = ann().delivered(device(on).as_str(), conversation(c).as_str());
            prop_assert_eq!(shard.cursor(&key), seq);
        }
        for (&c, &seq) in &read {
            prop_assert_eq!(shard.cursor(&user::read_key(&ann(), conversation(c).as_str())), seq);
        }
        let rows = delivered.values().chain(read.values()).filter(|seq| **seq > 0).count();
        prop_assert_eq!(shard.user().cursors as usize, rows);
    }

    #[test]
    fn outbox_items_in_any_order_end_alike(
        items in prop::collection::vec((0..3usize, 1..8u64), 1..20), order in any::<prop::sample::Index>(),
    ) {
        let removed = |seq: u64| seq.is_multiple_of(2);
        let item = |c: usize, seq| {
            command::user_conversation(&app(), &user_id(), &conversation(c), Seq(seq), removed(seq))
        };
        let (mut straight, mut turned) = (Shard::default(), Shard::default());
        let at = order.index(items.len());
        let turned_items = items[at..].iter().chain(items[..at].iter().rev()).chain(&items[..at]);
        for &(c, seq) in &items {
            straight.apply(&item(c, seq));
        }
        for &(c, seq) in turned_items {
            turned.apply(&item(c, seq));
        }
        let mut last = BTreeMap::new();
        for &(c, seq) in &items {
            let before = last.entry(c).or_insert(0);
            *before = seq.max(*before);
        }
        prop_assert_eq!(straight.user().conversations as usize, last.values().filter(|s| !removed(**s)).count());
        prop_assert_eq!(straight.user().conversations, turned.user().conversations);
        for (c, seq) in last {
            let key = user::conversation_key(&ann(), conversation(c).as_str());
            for shard in [&mut straight, &mut turned] {
                let Some(Row::UserConversation(row)) = shard.rows.get(&key).unwrap() else { panic!() };
                prop_assert_eq!((row.seq, row.removed), (seq, removed(seq)));
            }
        }
    }

    #[test]
    fn what_changed_after_a_head_is_found_by_it(
        items in prop::collection::vec((0..4usize, 1..9u64), 1..30), when in any::<prop::sample::Index>(),
    ) {
        let mut shard = Shard::default();
        let item = |c: usize, seq: u64| {
            command::user_conversation(&app(), &user_id(), &conversation(c), Seq(seq), seq.is_multiple_of(2))
        };
        let list = |shard: &Shard| -> BTreeMap<RowKey, UserConversationRow> {
            let rows = shard.rows.rows.iter();
            rows.filter_map(|(key, row)| match row {
                Row::UserConversation(row) => Some((key.clone(), *row)),
                _ => None,
            }).collect()
        };
        let (mut known, mut before) = (Seq(0), BTreeMap::new());
        let when = when.index(items.len());
        for (n, &(c, seq)) in items.iter().enumerate() {
            if n == when {
                (known, before) = (user::head(&shard.user()), list(&shard));
            }
            let head = user::head(&shard.user());
            shard.apply(&item(c, seq));
            let told = shard.effects.iter().any(|e| matches!(e, Effect::UserChanged { head: h, .. } if *h == head.next()));
            prop_assert_eq!(user::head(&shard.user()), if told { head.next() } else { head });
        }
        let after = list(&shard);
        for (key, row) in &after {
            let changed = before.get(key).is_none_or(|b| (b.seq, b.removed) != (row.seq, row.removed));
            prop_assert_eq!(changed, row.user_seq > known.0);
        }
    }
}

#[test]
fn entries_of_the_first_level_are_applied_as_they_were() {
    let mut rows = MemoryRows::default();
    let mut apply = |command: &Command| {
        let (mut out, mut records) = (Applied::default(), BytesMut::new());
        let ctx = Context { stamp: StampMs(7), level: ApplyLevel(1) };
        apply::apply_command(&mut rows, &ctx, &command::encode(command), &mut records, &mut out).unwrap();
        out.outcomes.remove(0)
    };
    apply(&open(0, 1));
    apply(&moves(0, 1, &[(0, 5)], &[]));
    apply(&command::user_conversation(&app(), &user_id(), &conversation(0), Seq(3), false));
    apply(&command::remove_device(&app(), &user_id(), &device(0), &[conversation(0)]));
    let Some(Row::User(user)) = rows.get(&user::user_key(&ann())).unwrap() else { panic!() };
    assert_eq!((user.next_seq, user.conversations, user.cursors, user.devices), (0, 1, 1, 0));
    assert!(rows.get(&ann().delivered("d0", "c0")).unwrap().is_some(), "it left its cursors");
}

#[test]
fn a_removed_device_takes_its_cursors_with_it() {
    let mut shard = Shard::default();
    shard.apply(&open(0, 1));
    shard.apply(&open(1, 1));
    shard.apply(&moves(0, 1, &[(0, 5), (1, 6), (2, 7)], &[(0, 2)]));
    shard.apply(&moves(1, 2, &[(0, 9)], &[]));
    let remove = |on, of: &[usize]| {
        let named: Vec<_> = of.iter().map(|&n| conversation(n)).collect();
        command::remove_device(&app(), &user_id(), &device(on), &named)
    };
    assert_eq!(shard.apply(&remove(0, &[0, 1, 1, 8])), Outcome::Done);
    assert_eq!((shard.user().devices, shard.user().cursors), (1, 3), "one of it is left, another device's, one read");
    assert_eq!(shard.apply(&remove(0, &[2])), Outcome::Done, "those that did not fit come behind");
    assert_eq!((shard.user().devices, shard.user().cursors), (1, 2));
    assert_eq!(shard.apply(&remove(0, &[2])), Outcome::refused(Reason::UnknownDevice));
    shard.apply(&open(0, 2));
    for n in 0..3 {
        assert_eq!(shard.cursor(&ann().delivered("d0", conversation(n).as_str())), 0, "a new device begins anew");
    }
    assert_eq!(shard.cursor(&ann().delivered("d1", "c0")), 9);
}

#[test]
fn news_of_a_conversation_reach_the_user_once() {
    let mut shard = Shard::default();
    let item = |seq, removed| command::user_conversation(&app(), &user_id(), &conversation(0), Seq(seq), removed);
    assert_eq!((shard.apply(&item(3, false)), shard.effects.len()), (Outcome::Done, 1));
    assert_eq!((shard.apply(&item(3, false)), shard.effects.len()), (Outcome::Done, 0));
    assert_eq!((shard.apply(&item(2, true)), shard.effects.len()), (Outcome::Done, 0));
    assert_eq!((shard.apply(&item(5, true)), shard.effects.len()), (Outcome::Done, 1));
    assert_eq!((shard.apply(&item(4, false)), shard.effects.len()), (Outcome::Done, 0), "late, and older than its end");
}

fn brokers() -> Vec<ReplicaId> {
    (1..=3).map(|n| ReplicaId { broker: BrokerId(n), incarnation: Incarnation(1) }).collect()
}

#[test]
fn the_meta_shard_checks_versions() {
    let mut shard = Shard::default();
    assert_eq!(shard.apply(&command::put_cluster("one", 4)), Outcome::Done);
    assert_eq!(shard.apply(&command::put_cluster("one", 4)), Outcome::Done);
    assert_eq!(shard.apply(&command::put_cluster("two", 4)), Outcome::refused(Reason::AlreadyExists));

    let plan = placement::plan(&brokers(), 4, 3).unwrap();
    assert_eq!(shard.apply(&command::mark_initialized(2)), Outcome::refused(Reason::UnknownShard));
    assert_eq!(shard.apply(&command::put_placement(plan.clone(), 0)), Outcome::Done);
    assert_eq!(shard.apply(&command::put_placement(plan.clone(), 0)), Outcome::refused(Reason::WrongVersion));
    assert_eq!(shard.apply(&command::mark_initialized(2)), Outcome::Done);
    assert_eq!(shard.apply(&command::mark_initialized(9)), Outcome::refused(Reason::UnknownShard));
    let cut = plan[..3].to_vec();
    assert_eq!(shard.apply(&command::put_placement(cut, 1)), Outcome::refused(Reason::Malformed));
    assert_eq!(shard.apply(&command::put_placement(plan, 1)), Outcome::Done);
    let Some(Row::Placement(row)) = shard.rows.get(&meta::placement_key()).unwrap() else { panic!() };
    let initialized: Vec<_> = row.shards.iter().filter(|s| s.initialized).map(|s| s.shard).collect();
    assert_eq!((row.version, initialized), (2, vec![2]), "a shard that was initialized stays so");
    assert_eq!(placement::SlotMap::from_row(row).unwrap().version().0, 2);
}

#[test]
fn a_brokers_incarnation_never_goes_back() {
    let mut shard = Shard::default();
    let broker = |incarnation| {
        let text = Bytes::from_static(b"127.0.0.1:1");
        let put = PutBroker { broker: 1, name: "b".into(), peer: text.clone(), api: text, incarnation };
        command::put_broker(put)
    };
    assert_eq!(shard.apply(&broker(2)), Outcome::Done);
    assert_eq!(shard.apply(&broker(2)), Outcome::Done);
    assert_eq!(shard.apply(&broker(1)), Outcome::refused(Reason::WrongVersion));
    assert_eq!(shard.apply(&broker(3)), Outcome::refused(Reason::WrongVersion), "nobody was given this one");
    assert_eq!(shard.apply(&broker(0)), Outcome::refused(Reason::Malformed));
    assert_eq!(shard.apply(&command::put_app(&app(), vec![])), Outcome::Done);
    let keys = vec![Default::default(); limits::MAX_SIGNING_KEYS + 1];
    assert_eq!(shard.apply(&command::put_app(&app(), keys)), Outcome::refused(Reason::Malformed));
}

fn join(broker: u32, expect_given: u32) -> Command {
    command::join_broker(JoinBroker { broker, cluster_id: Bytes::from_static(b"one"), expect_given })
}

fn put(broker: u32, incarnation: u32) -> Command {
    let text = Bytes::from(format!("127.0.0.1:{incarnation}"));
    let (name, peer, api) = (Bytes::from_static(b"broker"), text.clone(), text);
    command::put_broker(PutBroker { broker, name, peer, api, incarnation })
}

fn founded() -> Shard {
    let mut shard = Shard::default();
    assert_eq!(shard.apply(&join(3, 1)), Outcome::refused(Reason::Unavailable), "there is no cluster yet");
    assert_eq!(shard.apply(&command::put_cluster("one", 4)), Outcome::Done);
    assert_eq!(shard.apply(&join(3, 1)), Outcome::refused(Reason::UnknownBroker), "there are no brokers yet");
    for broker in 1..=3 {
        assert_eq!(shard.apply(&put(broker, 1)), Outcome::Done);
    }
    let plan = placement::plan(&brokers(), 4, 3).unwrap();
    assert_eq!(shard.apply(&command::put_placement(plan, 0)), Outcome::Done);
    shard
}

/// The placement's version, and the incarnation of broker 3 in each shard.
fn places(shard: &mut Shard) -> (u64, Vec<u32>) {
    let Some(Row::Placement(row)) = shard.rows.get(&meta::placement_key()).unwrap() else { panic!() };
    let third = |placed: &ShardPlacement| {
        let replicas = placed.replicas.iter().map(|&id| ReplicaId::from_u64(id));
        let broker = |r: &ReplicaId| r.broker == BrokerId(3);
        replicas.clone().find(broker).unwrap().incarnation.0 * replicas.filter(broker).count() as u32
    };
    (row.version, row.shards.iter().map(third).collect())
}

const LATE: Outcome = Outcome::Refused { reason: Reason::WrongVersion, last: SendNo(0) };

#[test]
fn an_incarnation_is_given_once() {
    let mut shard = founded();
    let given = |incarnation| Outcome::Joined { incarnation: Incarnation(incarnation) };
    assert_eq!(shard.apply(&join(3, 1)), given(2));
    assert_eq!(shard.apply(&join(3, 1)), LATE, "a late copy gets nothing");
    assert_eq!(shard.apply(&join(3, 2)), given(3), "the second one was never written to a directory");
    assert_eq!(shard.apply(&put(3, 3)), Outcome::Done);
    assert_eq!(shard.apply(&join(3, 2)), LATE);
    assert_eq!(shard.apply(&join(3, 3)), given(4));
    assert_eq!(shard.apply(&put(3, 3)), Outcome::Done, "addresses may change without a new directory");
    assert_eq!(shard.apply(&join(3, 3)), LATE, "and nothing is given again");
    assert_eq!(shard.apply(&join(4, 0)), Outcome::refused(Reason::UnknownBroker));
    let mut foreign = join(3, 4);
    let Some(Op::JoinBroker(op)) = &mut foreign.op else { panic!() };
    op.cluster_id = Bytes::from_static(b"two");
    assert_eq!(shard.apply(&foreign), Outcome::refused(Reason::WrongCluster));
}

#[test]
fn a_new_directory_takes_the_places_of_the_one_before() {
    let mut shard = founded();
    for n in [0, 1, 2] {
        assert_eq!(shard.apply(&command::mark_initialized(n)), Outcome::Done);
    }
    shard.apply(&join(3, 1));
    assert_eq!(places(&mut shard), (1, vec![1; 5]), "a number alone changes nothing");
    assert_eq!(shard.apply(&put(3, 2)), Outcome::Done);
    assert_eq!(places(&mut shard), (2, vec![2, 2, 2, 1, 1]), "shards without a commit keep their first members");
    assert_eq!(shard.apply(&put(3, 2)), Outcome::Done);
    assert_eq!(shard.apply(&put(3, 1)), LATE);
    assert_eq!(shard.apply(&put(3, 3)), LATE, "nobody was given this one");
    assert_eq!(places(&mut shard), (2, vec![2, 2, 2, 1, 1]));
    assert_eq!(shard.apply(&command::mark_initialized(3)), Outcome::Done);
    assert_eq!(places(&mut shard), (3, vec![2, 2, 2, 2, 1]), "the first commit frees the place");
    assert_eq!(shard.apply(&command::mark_initialized(3)), Outcome::Done);
    assert_eq!(places(&mut shard).0, 3);
}
