//! What happens at the bounds of a conversation: open sends, forgotten client ids, stays, participants; and what
//! becomes of commands that are damaged or make no sense.

// A test may stop at once: `unwrap` and `panic!` are how it says that something is not as it should be.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "model/flaky.rs"]
mod flaky;

use bytes::{Bytes, BytesMut};
use stentor_engine::{
    apply::{self, ApplyError, Context},
    command, conversation,
    effect::{Applied, Effect, Outcome},
    key::{Entity, Kind, RowKey},
    limits,
    rows::{MemoryRows, Row, Rows},
};
use stentor_proto::{
    Message,
    ids::{AppId, ApplyLevel, ClientId, ConversationId, DeviceId, SendNo, Seq, StampMs, UserId},
    internal::{Actor, ClientKeyRow, ClientOrderRow, ClientScopeRow, Command, Create, Send, command::Op},
    reason::Reason,
    v1::{ConversationKind, Role},
};

struct Shard {
    rows: MemoryRows,
    stamp: u64,
    effects: Vec<Effect>,
}

impl Shard {
    fn with(kind: ConversationKind) -> Self {
        let mut shard = Self { rows: MemoryRows::default(), stamp: 1_000, effects: vec![] };
        let create = Create { actor: Some(actor("ann")), kind: kind as i32, ..Create::default() };
        assert_eq!(seq(&shard.apply(&command::create(&app(), &id("general"), create))), 1);
        shard
    }

    fn try_apply(&mut self, command: Bytes) -> Result<Outcome, ApplyError> {
        let (mut out, mut records) = (Applied::default(), BytesMut::new());
        let ctx = Context { stamp: StampMs(self.stamp), level: apply::LEVEL };
        apply::apply_command(&mut self.rows, &ctx, &command, &mut records, &mut out)?;
        self.effects = out.effects;
        Ok(out.outcomes.remove(0))
    }

    fn apply(&mut self, command: &Command) -> Outcome {
        self.try_apply(command::encode(command)).unwrap()
    }

    fn scope(&mut self) -> ClientScopeRow {
        match self.rows.get(&entity().key(Kind::ClientScope, &[b"ann"])).unwrap() {
            Some(Row::ClientScope(scope)) => *scope,
            _ => ClientScopeRow::default(),
        }
    }
}

fn app() -> AppId {
    AppId::new("app").unwrap()
}

fn id(text: &str) -> ConversationId {
    ConversationId::new(text).unwrap()
}

fn user(name: &str) -> UserId {
    UserId::new(name).unwrap()
}

fn entity() -> Entity {
    Entity::conversation("app", "general")
}

fn actor(name: &str) -> Actor {
    command::actor(&user(name), Some(&DeviceId::new("phone").unwrap()), false)
}

fn text(body: &str) -> Send {
    Send { actor: Some(actor("ann")), body: Bytes::copy_from_slice(body.as_bytes()), ..Send::default() }
}

fn send(send: Send) -> Command {
    command::send(&app(), &id("general"), send)
}

fn keyed(key: &str, first_try_ms: u64, body: &str) -> Command {
    let client_key = Some(command::client_key(&ClientId::new(key).unwrap(), first_try_ms));
    send(Send { client_key, ..text(body) })
}

fn seq(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Accepted { seq, .. } => seq.0,
        other => panic!("{other:?}"),
    }
}

fn refused(outcome: Outcome) -> Reason {
    match outcome {
        Outcome::Refused { reason, .. } => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn open_sends_are_bounded_and_stored_answers_make_room() {
    let mut shard = Shard::with(ConversationKind::Group);
    let numbered = |send_no, done_no| send(Send { send_no, done_no, ..text("x") });
    for send_no in 1..=limits::MAX_OPEN_SENDS {
        shard.apply(&numbered(send_no, 0));
    }
    let next = limits::MAX_OPEN_SENDS + 1;
    let before = shard.rows.clone();
    let full = Outcome::Refused { reason: Reason::TooManyOpenSends, last: SendNo(next - 1) };
    assert_eq!(shard.apply(&numbered(next, 0)), full);
    assert_eq!(shard.rows, before);
    assert_eq!(seq(&shard.apply(&numbered(next, 1))), next + 1);
    assert_eq!(refused(shard.apply(&numbered(1, 0))), Reason::DedupWindowPassed);
    assert_eq!(seq(&shard.apply(&numbered(2, 0))), 3);
}

#[test]
fn a_late_send_of_an_old_session_takes_no_number_but_is_told_its_answers() {
    let mut shard = Shard::with(ConversationKind::Group);
    let numbered = |session_no: u64, send_no: u64, body: &str| send(Send { session_no, send_no, ..text(body) });
    let first = seq(&shard.apply(&numbered(7, 1, "old")));
    assert_eq!(seq(&shard.apply(&numbered(8, 2, "new"))), first + 1);
    assert_eq!(refused(shard.apply(&numbered(7, 3, "late"))), Reason::SessionSuperseded);
    assert_eq!(seq(&shard.apply(&numbered(7, 1, "old"))), first, "what has its answer keeps it");
    assert_eq!(seq(&shard.apply(&numbered(8, 3, "newer"))), first + 2, "the number was not taken");
}

#[test]
fn a_refusal_for_good_consumes_its_number_and_stays() {
    let mut shard = Shard::with(ConversationKind::Group);
    let empty = send(Send { send_no: 1, ..text("") });
    let first = Outcome::Refused { reason: Reason::EmptyBody, last: SendNo(1) };
    assert_eq!((shard.apply(&empty), shard.apply(&empty)), (first.clone(), first));
    // As a gateway forwards it.
    let large = send(Send { send_no: 2, ..text(&"x".repeat(9)) });
    let forwarded = command::refused_send(&large, Reason::BodyTooLarge).unwrap();
    assert_eq!(command::check(&forwarded), Ok(()));
    let first = Outcome::Refused { reason: Reason::BodyTooLarge, last: SendNo(2) };
    assert_eq!((shard.apply(&forwarded), shard.apply(&forwarded)), (first.clone(), first));
    assert_eq!(refused(shard.apply(&large)), Reason::SendNoTaken);
    assert_eq!(command::refused_send(&large, Reason::Overloaded), None, "the device sends it again");
    // Refused before it was a participant's: the number's answer does not change when he becomes one.
    let by_bob = send(Send { actor: Some(actor("bob")), send_no: 1, ..text("hi") });
    assert_eq!(refused(shard.apply(&by_bob)), Reason::NotAParticipant);
    shard.apply(&command::add(&app(), &id("general"), actor("ann"), &user("bob"), Role::Unspecified));
    assert_eq!(refused(shard.apply(&by_bob)), Reason::NotAParticipant);
    assert_eq!(seq(&shard.apply(&send(Send { actor: Some(actor("bob")), send_no: 2, done_no: 1, ..text("hi") }))), 3);
}

#[test]
fn client_ids_survive_other_numbers_and_refuse_other_bodies() {
    let mut shard = Shard::with(ConversationKind::Group);
    assert_eq!(seq(&shard.apply(&keyed("k", 900, "hello"))), 2);
    let again = |send_no, body: &str| {
        let client_key = Some(command::client_key(&ClientId::new("k").unwrap(), 900));
        send(Send { send_no, client_key, ..text(body) })
    };
    let stamp = StampMs(1_000);
    shard.stamp = 2_000;
    let version = stentor_proto::ids::Version(1);
    let repeat = Outcome::Accepted { seq: Seq(2), stamp, repeat: true, version };
    assert_eq!(shard.apply(&again(1, "hello")), repeat);
    assert_eq!(shard.apply(&again(1, "hello")), repeat, "and the number is consumed with that answer");
    assert_eq!(refused(shard.apply(&again(2, "other"))), Reason::ClientIdReused);
    assert_eq!(seq(&shard.apply(&send(Send { send_no: 3, ..text("next") }))), 3);
}

/// A scope that holds `count` keys of ids `key-N`, of which only the rows that the test needs are there.
fn fill(shard: &mut Shard, count: u64, bytes: u64, stamp_ms: u64) {
    for order in 0..12 {
        let client_id = format!("key-{order}");
        let place = [&[3u8][..], b"ann", &u64::to_be_bytes(order)];
        let row = ClientOrderRow { client_id: client_id.clone().into(), first_try_ms: 100 + order, stamp_ms };
        shard.rows.put(entity().key(Kind::ClientOrder, &place), row.into());
        shard.rows.put(key_row(&client_id), ClientKeyRow { order, stamp_ms, ..Default::default() }.into());
    }
    let scope = ClientScopeRow { next_order: count, bytes, oldest_ms: stamp_ms, ..Default::default() };
    shard.rows.put(entity().key(Kind::ClientScope, &[b"ann"]), scope.into());
}

fn key_row(client_id: &str) -> RowKey {
    entity().key(Kind::ClientKey, &[&[3], b"ann", client_id.as_bytes()])
}

#[test]
fn a_scope_forgets_its_oldest_keys_and_refuses_what_it_may_have_forgotten() {
    let cases = [
        ("count", limits::CLIENT_KEYS_PER_SCOPE, 1_000, 1_000, 1),
        ("bytes", 50, limits::CLIENT_KEY_BYTES_PER_SCOPE, 1_000, 1),
        ("age", 50, 1_000, 1_000 + limits::CLIENT_KEY_KEPT_MS + 1, limits::EVICTIONS_PER_INSERT as u64),
    ];
    for (what, count, bytes, now, dropped) in cases {
        let mut shard = Shard::with(ConversationKind::Group);
        fill(&mut shard, count, bytes, 1_000);
        shard.stamp = now;
        let mut unloaded = flaky::Flaky::default();
        unloaded.all = shard.rows.clone();
        let ctx = Context { stamp: StampMs(now), level: apply::LEVEL };
        let command = command::encode(&keyed("new", 900, "x"));
        assert!(
            unloaded.apply(&ctx, &command, true, &mut Applied::default()) > 0,
            "{what}: the hint knows no old keys"
        );
        assert_eq!(seq(&shard.apply(&keyed("new", 900, "x"))), 2, "{what}");
        assert!(unloaded.all == shard.rows, "{what}");
        let scope = shard.scope();
        let found = (scope.first_order, scope.next_order, scope.forgotten_upto_ms);
        assert_eq!(found, (dropped, count + 1, 100 + dropped - 1), "{what}");
        assert!(shard.rows.get(&key_row("key-0")).unwrap().is_none(), "{what}");
        assert!(shard.rows.get(&key_row(&format!("key-{dropped}"))).unwrap().is_some(), "{what}");
        assert!(scope.bytes <= limits::CLIENT_KEY_BYTES_PER_SCOPE, "{what}");
        // The forgotten one, tried again: refused, never a second seq.
        assert_eq!(refused(shard.apply(&keyed("key-0", 100, "x"))), Reason::DedupWindowPassed, "{what}");
        let ahead = keyed("ahead", now + limits::FIRST_TRY_AHEAD_MS + 1, "x");
        assert_eq!(refused(shard.apply(&ahead)), Reason::FirstTryInFuture, "{what}");
    }
}

#[test]
fn a_conversation_and_a_stay_have_bounds() {
    let mut shard = Shard::with(ConversationKind::Group);
    let change = |add: bool| match add {
        true => command::add(&app(), &id("general"), actor("ann"), &user("bob"), Role::Unspecified),
        false => command::remove(&app(), &id("general"), actor("ann"), &user("bob")),
    };
    for _ in 0..limits::MAX_STAYS {
        shard.apply(&change(true));
        shard.apply(&change(false));
    }
    assert_eq!(refused(shard.apply(&change(true))), Reason::TooManyStays);
    let Some(Row::Conversation(head)) = shard.rows.get_mut(&entity().head()) else { panic!() };
    head.participants = limits::MAX_GROUP_PARTICIPANTS;
    let cem = command::add(&app(), &id("general"), actor("ann"), &user("cem"), Role::Unspecified);
    assert_eq!(refused(shard.apply(&cem)), Reason::TooManyParticipants);
    let crowd = (0..limits::MAX_CREATE_PARTICIPANTS + 1).map(|n| format!("u{n}").into()).collect();
    let create = Create { actor: Some(actor("ann")), kind: 2, participants: crowd, ..Create::default() };
    assert_eq!(command::check(&command::create(&app(), &id("crowd"), create)), Err(Reason::TooManyParticipants));
}

#[test]
fn membership_goes_to_the_outbox_and_leaves_it_when_done() {
    let mut shard = Shard::with(ConversationKind::Channel);
    let add = command::add(&app(), &id("general"), actor("ann"), &user("bob"), Role::Unspecified);
    assert_eq!(seq(&shard.apply(&add)), 2);
    let [Effect::FanOut { .. }, Effect::Outbox { item, user: told, removed, .. }] = &shard.effects[..] else {
        panic!("{:?}", shard.effects)
    };
    assert_eq!((item.0, &told[..], *removed), (2, &b"bob"[..], false));
    let items = |shard: &Shard| shard.rows.rows.keys().filter(|k| k.kind() == Some(Kind::Outbox)).count();
    assert_eq!(items(&shard), 2);
    let done = [(Seq(1), user("ann")), (Seq(2), user("bob"))];
    assert_eq!(shard.apply(&command::outbox_done(&app(), &id("general"), &done)), Outcome::Done);
    assert_eq!(items(&shard), 0);
    let role = conversation::default_role(ConversationKind::Channel);
    assert_eq!(role, Role::Reader);
    assert_eq!(refused(shard.apply(&send(Send { actor: Some(actor("bob")), ..text("x") }))), Reason::PermissionDenied);
    assert_eq!(refused(shard.apply(&command::expire(&app(), &id("general"), 5))), Reason::NotBuilt);
}

#[test]
fn ids_of_direct_conversations_belong_to_their_users() {
    let mut shard = Shard::with(ConversationKind::Group);
    let create = |who: &str, others: &[&str], kind: ConversationKind| Create {
        actor: Some(actor(who)),
        kind: kind as i32,
        participants: others.iter().map(|o| Bytes::copy_from_slice(o.as_bytes())).collect(),
        ..Create::default()
    };
    let direct = id("direct/ann/bob");
    let mut apply = |conversation, create| shard.apply(&command::create(&app(), conversation, create));
    assert_eq!(refused(apply(&direct, create("ann", &["bob"], ConversationKind::Group))), Reason::BadId);
    assert_eq!(refused(apply(&direct, create("ann", &["cem"], ConversationKind::Direct))), Reason::BadId);
    assert_eq!(refused(apply(&direct, create("ann", &["ann"], ConversationKind::Direct))), Reason::DirectIsFixed);
    assert_eq!(refused(apply(&direct, create("ann", &[], ConversationKind::Unspecified))), Reason::BadKind);
    assert_eq!(seq(&apply(&direct, create("bob", &["ann"], ConversationKind::Direct))), 1);
    assert!(matches!(
        apply(&direct, create("ann", &["bob"], ConversationKind::Direct)),
        Outcome::Accepted { repeat: true, .. }
    ));
    assert_eq!(refused(apply(&id("general"), create("ann", &[], ConversationKind::Group))), Reason::AlreadyExists);
}

#[test]
fn damage_stops_a_replica_and_nonsense_is_refused() {
    let mut shard = Shard::with(ConversationKind::Group);
    let good = send(text("hello"));
    for change in [
        (|c: &mut Command| c.key_crc ^= 1) as fn(&mut Command),
        |c| c.body_crc ^= 1,
        |c| c.target = "other".into(),
        |c| c.op = Some(Op::Send(text("hellO"))),
    ] {
        let mut bad = good.clone();
        change(&mut bad);
        assert_eq!(command::check(&bad), Err(Reason::Damaged));
        assert!(matches!(shard.try_apply(command::encode(&bad)), Err(ApplyError::Damaged(_))));
    }
    assert!(matches!(shard.try_apply(Bytes::from_static(&[0xff, 0x01])), Err(ApplyError::Damaged(_))));
    let nonsense = [
        (Command { op: None, body_crc: 0, ..good.clone() }, Reason::Malformed),
        (command::wrap("a/b".into(), "c".into(), Op::Send(text("x"))), Reason::BadId),
        (command::wrap("a".into(), Bytes::from_static(b"\xff"), Op::Send(text("x"))), Reason::BadId),
        (send(Send { actor: None, ..text("x") }), Reason::Malformed),
        (send(Send { send_no: 1, done_no: 1, ..text("x") }), Reason::Malformed),
        (send(Send { refused: Reason::EmptyBody as u32, ..text("") }), Reason::Malformed),
        (send(Send { send_no: 1, refused: Reason::Overloaded as u32, ..text("") }), Reason::Malformed),
        (send(Send { send_no: 1, refused: 9_999, ..text("") }), Reason::Malformed),
        (send(Send { kind: 1, ..text("x") }), Reason::BadKind),
        (send(Send { content_type: "text/\u{7}".into(), ..text("x") }), Reason::BadContentType),
        (send(text(&"x".repeat(limits::MAX_BODY_BYTES + 1))), Reason::BodyTooLarge),
    ];
    for (command, reason) in nonsense {
        assert_eq!(refused(shard.apply(&command)), reason);
        assert_eq!(command::check(&command), Err(reason));
        assert_eq!(Command::decode(command::encode(&command)).unwrap(), command);
    }
}

#[test]
fn an_entry_of_a_newer_level_moves_nothing() {
    let mut last = StampMs(5);
    let parse = |level, stamp| {
        let bundle = stentor_proto::bundle::Builder::new().finish(ApplyLevel(level), StampMs(stamp));
        stentor_proto::bundle::Bundle::parse(bundle).unwrap()
    };
    for level in [0, apply::LEVEL.0 + 1] {
        let unknown = Err(ApplyError::UnknownLevel(ApplyLevel(level)));
        assert_eq!(apply::begin_entry(&mut last, &parse(level, 9)), unknown);
    }
    assert_eq!(last, StampMs(5));
    assert_eq!(apply::begin_entry(&mut last, &parse(1, 3)).unwrap().stamp, StampMs(5), "time never goes back");
    assert_eq!(apply::begin_entry(&mut last, &parse(1, 9)).unwrap().stamp, StampMs(9));
}
