//! A run of sends comes to exactly what its sends come to one by one: the same outcomes, rows, events and effects.

// A test may stop at once: `unwrap` and `panic!` are how it says that something is not as it should be.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "model/flaky.rs"]
mod flaky;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use stentor_engine::{
    apply::{self, Context},
    command,
    effect::{Applied, Outcome},
    rows::{MemoryRows, Rows},
};
use stentor_proto::{
    ids::{AppId, ApplyLevel, ConversationId, DeviceId, SendNo, StampMs, UserId},
    internal::{Actor, Command, Create, RunItem, Send, SendRun},
    reason::Reason,
    v1::{ConversationKind, SendItem},
};

fn app() -> AppId {
    AppId::new("app").unwrap()
}

fn id() -> ConversationId {
    ConversationId::new("general").unwrap()
}

fn actor(name: &str) -> Actor {
    command::actor(&UserId::new(name).unwrap(), Some(&DeviceId::new("phone").unwrap()), false)
}

fn apply_at(rows: &mut impl Rows, stamp: u64, level: ApplyLevel, command: &Command) -> Applied {
    let (mut out, mut records) = (Applied::default(), BytesMut::new());
    let ctx = Context { stamp: StampMs(stamp), level };
    apply::apply_command(rows, &ctx, &command::encode(command), &mut records, &mut out).unwrap();
    out
}

fn apply(rows: &mut impl Rows, stamp: u64, command: &Command) -> Applied {
    apply_at(rows, stamp, apply::LEVEL, command)
}

fn singles(run: &SendRun) -> impl Iterator<Item = Command> {
    (run.send_no..).zip(&run.items).map(|(send_no, item)| {
        let RunItem { kind, content_type, sent_at_ms, body, refused, .. } = item.clone();
        let SendRun { actor, done_no, session_no, .. } = run.clone();
        let send = Send {
            actor,
            send_no,
            done_no,
            session_no,
            kind,
            content_type,
            sent_at_ms,
            body,
            refused,
            ..Send::default()
        };
        command::send(&app(), &id(), send)
    })
}

fn item() -> impl Strategy<Value = RunItem> {
    // Bodies of which some are empty or too long, of kinds of which some do not exist.
    ((0..12i32).prop_map(|k| if k > 9 { k } else { 0 }), 0..7usize, any::<bool>()).prop_map(|(kind, bytes, typed)| {
        let content_type = if typed { "text/x".into() } else { String::new() };
        let item = SendItem { kind, content_type, sent_at_ms: bytes as u64, body: vec![b'x'; bytes].into() };
        command::run_item(item, 5)
    })
}

fn run() -> impl Strategy<Value = SendRun> {
    let items = prop::collection::vec(item(), 1..9);
    (0..3usize, 1..30u64, 0..30u64, 0..3u64, items).prop_map(|(who, send_no, done_no, session_no, items)| {
        let done_no = done_no.min(send_no - 1);
        SendRun { actor: Some(actor(["ann", "ann", "eve"][who])), send_no, done_no, session_no, items }
    })
}

fn shard() -> MemoryRows {
    let mut rows = MemoryRows::default();
    let kind = ConversationKind::Group as i32;
    let create = Create { actor: Some(actor("ann")), kind, ..Create::default() };
    apply(&mut rows, 1, &command::create(&app(), &id(), create));
    rows
}

proptest! {
    #[test]
    fn a_run_comes_to_what_its_sends_come_to(exists: bool, runs in prop::collection::vec(run(), 1..12), listen: bool) {
        let mut alone = if exists { shard() } else { MemoryRows::default() };
        let mut together = flaky::Flaky::default();
        together.all = alone.clone();
        for (stamp, run) in (10..).zip(&runs) {
            let command = command::send_run(&app(), &id(), run.clone());
            prop_assert_eq!(command::check(&command), Ok(()));
            let (ctx, mut at_once) = (Context { stamp: StampMs(stamp), level: apply::LEVEL }, Applied::default());
            together.apply(&ctx, &command::encode(&command), listen, &mut at_once);
            prop_assert_eq!(at_once.outcomes.len(), command::outcomes(&command));
            let mut expected = Applied::default();
            for command in singles(run) {
                let Applied { outcomes, effects } = apply(&mut alone, stamp, &command);
                expected.outcomes.extend(outcomes);
                expected.effects.extend(effects);
            }
            prop_assert_eq!(&at_once, &expected);
            prop_assert_eq!(&together.all, &alone);
            let spans = Outcome::spans(&at_once.outcomes);
            prop_assert_eq!(Outcome::from_spans(&spans), Some(at_once.outcomes));
        }
    }
}

fn plain(send_no: u64, bodies: &[&'static [u8]]) -> SendRun {
    let item = |body: &&'static [u8]| {
        command::run_item(SendItem { body: Bytes::from_static(body), ..SendItem::default() }, 100)
    };
    let items = bodies.iter().map(item).collect();
    SendRun { actor: Some(actor("ann")), send_no, done_no: 0, session_no: 0, items }
}

#[test]
fn a_run_answers_as_one_span_and_a_repeat_of_it_the_same() {
    let mut rows = shard();
    let command = command::send_run(&app(), &id(), plain(1, &[b"a", b"b", b"c"]));
    let first = apply(&mut rows, 10, &command);
    assert_eq!((first.effects.len(), Outcome::spans(&first.outcomes).spans.len()), (3, 1));
    let again = apply(&mut rows, 20, &command);
    assert!(again.effects.is_empty());
    let repeated = |outcome: &Outcome| match outcome {
        Outcome::Accepted { seq, stamp: StampMs(10), repeat: true, .. } => seq.0,
        other => panic!("{other:?}"),
    };
    assert_eq!(again.outcomes.iter().map(repeated).collect::<Vec<_>>(), [2, 3, 4]);
    let other = command::send_run(&app(), &id(), plain(3, &[b"other", b"d"]));
    let taken = Outcome::Refused { reason: Reason::SendNoTaken, last: SendNo(3) };
    assert!(matches!(&apply(&mut rows, 30, &other).outcomes[..], [t, Outcome::Accepted { .. }] if *t == taken));
}

#[test]
fn a_damaged_or_senseless_run_is_found() {
    let good = plain(1, &[b"a", b"b"]);
    let check = |run: SendRun| command::check(&command::send_run(&app(), &id(), run));
    assert_eq!(check(good.clone()), Ok(()));
    let mut flipped = good.clone();
    flipped.items[1].body = Bytes::from_static(b"x");
    assert_eq!(check(flipped), Err(Reason::Damaged));
    assert_eq!(check(SendRun { items: vec![], ..good.clone() }), Err(Reason::Malformed));
    assert_eq!(check(SendRun { send_no: 0, ..good.clone() }), Err(Reason::Malformed));
    assert_eq!(check(SendRun { send_no: u64::MAX, ..good.clone() }), Err(Reason::Malformed));
    assert_eq!(check(SendRun { done_no: 1, ..good.clone() }), Err(Reason::Malformed));
    assert_eq!(check(SendRun { items: vec![good.items[0].clone(); 1_000], ..good.clone() }), Err(Reason::Malformed));
    let mut refused = good.clone();
    refused.items[0].refused = Reason::BodyTooLarge as u32;
    assert_eq!(check(refused), Err(Reason::Malformed), "a refusal has no body");
    let device = Bytes::new();
    assert_eq!(check(SendRun { actor: Some(Actor { device, ..actor("ann") }), ..good }), Err(Reason::BadId));
}

#[test]
fn before_their_level_there_are_no_runs() {
    let mut rows = shard();
    let before = rows.clone();
    let command = command::send_run(&app(), &id(), plain(1, &[b"a", b"b"]));
    let refused = vec![Outcome::refused(Reason::Malformed); 2];
    assert_eq!(apply_at(&mut rows, 10, ApplyLevel(2), &command).outcomes, refused);
    assert_eq!(rows, before);
}

#[test]
fn more_outcomes_than_a_run_has_are_none() {
    let accepted = Outcome::Accepted {
        seq: stentor_proto::ids::Seq(7),
        stamp: StampMs(1),
        repeat: false,
        version: stentor_proto::ids::Version(1),
    };
    let mut spans = Outcome::spans(&vec![accepted; 1]);
    assert_eq!(Outcome::from_spans(&spans).map(|all| all.len()), Some(1));
    spans.spans[0].more = 127;
    assert_eq!(Outcome::from_spans(&spans).map(|all| all.len()), Some(128));
    spans.spans[0].more = 128;
    assert_eq!(Outcome::from_spans(&spans), None);
    spans.spans[0].more = u32::MAX;
    assert_eq!(Outcome::from_spans(&spans), None);
}

/// What a row keeps beyond its answered numbers is nothing that anybody can tell.
#[test]
fn answered_results_leave_a_row_many_at_a_time() {
    let (mut new, mut old) = (shard(), shard());
    let command = |send_no: u64| {
        let send =
            Send { actor: Some(actor("ann")), send_no, done_no: send_no - 1, body: "x".into(), ..Send::default() };
        command::send(&app(), &id(), send)
    };
    for send_no in 1..=50 {
        let (one, other) =
            (apply(&mut new, 10, &command(send_no)), apply_at(&mut old, 10, ApplyLevel(2), &command(send_no)));
        assert_eq!(one, other);
        let again = apply(&mut new, 10, &command(send_no.saturating_sub(1).max(1)));
        let expected = if send_no > 1 { Reason::DedupWindowPassed } else { continue };
        assert_eq!(again.outcomes, [Outcome::Refused { reason: expected, last: SendNo(send_no) }]);
    }
}
