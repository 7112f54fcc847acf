//! The engine beside a naive model: random commands with retries, gaps, reused numbers and keys, crashes, and rows that
//! are not in memory. Every outcome must be the model's, every reader must see what the model shows him.

// A test may stop at once: `unwrap` and `panic!` are how it says that something is not as it should be.
#![allow(clippy::unwrap_used, clippy::panic)]

mod flaky;
mod lossy;
mod naive;
mod steps;

use std::collections::BTreeSet;

use bytes::{Bytes, BytesMut};
use flaky::Flaky;
use naive::Naive;
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use stentor_engine::{
    access::{Segment, View},
    apply, command,
    effect::{Applied, Effect, Outcome},
    key::Entity,
    rows::{MemoryRows, Row, Rows},
};
use stentor_proto::{
    bundle::{Builder, Bundle},
    ids::{Seq, StampMs, key_crc},
    internal::{Command, ConversationRow, ParticipantRow},
    reason::Reason,
    record,
};
use steps::{APP, CONVERSATIONS, Step, USERS, step};

/// A replica: rows, and what carries from entry to entry.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Replica {
    pub(crate) rows: MemoryRows,
    pub(crate) last: StampMs,
    pub(crate) chain: u64,
}

impl Replica {
    pub(crate) fn apply(&mut self, bundle: &Bytes) -> Applied {
        let (mut out, mut records) = (Applied::default(), BytesMut::new());
        let parsed = Bundle::parse(bundle.clone()).unwrap();
        let ctx = apply::begin_entry(&mut self.last, &parsed).unwrap();
        for command in parsed.commands() {
            apply::apply_command(&mut self.rows, &ctx, &command, &mut records, &mut out).unwrap();
        }
        self.chain = apply::chain(self.chain, bundle);
        out
    }
}

pub(crate) fn bundle(commands: &[Command], stamp_ms: u64) -> Bytes {
    let mut builder = Builder::new();
    commands.iter().for_each(|c| builder.push(&command::encode(c)));
    builder.finish(apply::LEVEL, StampMs(stamp_ms))
}

fn row<T>(rows: &mut MemoryRows, key: &stentor_engine::key::RowKey, of: impl Fn(&Row) -> Option<T>) -> Option<T> {
    rows.get(key).unwrap().and_then(of)
}

fn conversation_row(row: &Row) -> Option<ConversationRow> {
    if let Row::Conversation(row) = row { Some(*row) } else { None }
}

fn participant_row(row: &Row) -> Option<ParticipantRow> {
    if let Row::Participant(row) = row { Some(row.clone()) } else { None }
}

/// Events, owners, counts and what each user sees: all as the model has it.
fn compare(rows: &mut MemoryRows, model: &Naive) {
    for id in CONVERSATIONS {
        let entity = Entity::conversation(APP, id);
        let events: Vec<_> =
            rows.events.iter().filter(|((e, _), _)| *e == entity).map(|((_, s), r)| (*s, r.clone())).collect();
        let Some(expected) = model.conversations.get(id) else {
            assert!(events.is_empty() && row(rows, &entity.head(), conversation_row).is_none());
            continue;
        };
        let head = row(rows, &entity.head(), conversation_row).unwrap();
        let bytes: usize = events.iter().map(|(_, r)| r.len()).sum();
        assert_eq!((head.next_seq, head.event_bytes), (events.len() as u64 + 1, bytes as u64));
        assert_eq!(head.participants as usize, expected.roles.len());
        assert_eq!(
            head.owners,
            expected.roles.values().filter(|r| **r == stentor_proto::v1::Role::Owner).count() as u32
        );
        assert_eq!(events.len(), expected.events.len());
        for (at, ((seq, record), expected)) in events.into_iter().zip(&expected.events).enumerate() {
            assert_eq!(seq, Seq(at as u64 + 1), "dense");
            assert_event(&record.into(), id, seq, expected);
        }
        for user in USERS {
            let participant = row(rows, &entity.participant(user), participant_row);
            let view = View::new(head, participant);
            assert_eq!(view.role(), expected.roles.get(user).copied());
            assert_eq!(seen(&view), expected_seen(expected, user), "what {user} sees of {id}");
        }
    }
}

fn assert_event(record: &Bytes, id: &str, seq: Seq, expected: &naive::Event) {
    let event = record::decode(record, key_crc(APP.as_bytes(), id.as_bytes())).unwrap();
    let header = &event.header;
    let text = |b: &Bytes| String::from_utf8(b.to_vec()).unwrap();
    let found = naive::Event {
        kind: header.kind(),
        sender: text(&header.sender),
        device: text(&header.device),
        send_no: header.send_no,
        client_id: text(&header.client_id),
        subject: text(&header.subject),
        role: header.role(),
        body: event.body.to_vec(),
        stamp_ms: header.stamp_ms,
        version: header.version,
    };
    assert_eq!((header.seq, &found), (seq.0, expected));
}

/// The seqs that a reader gets, once his segments were checked to be dense up to his head.
fn seen(view: &View) -> BTreeSet<u64> {
    let mut next = 1;
    let mut seen = BTreeSet::new();
    for segment in view.segments(Seq(0), Seq(u64::MAX)) {
        let (from, to) = match segment {
            Segment::Visible { from, to } => {
                seen.extend(from.0..=to.0);
                (from, to)
            }
            Segment::Hidden { from, to, .. } => (from, to),
        };
        assert_eq!(from.0, next, "dense");
        next = to.0 + 1;
    }
    assert_eq!(next, view.head().0 + 1, "dense up to the head");
    seen
}

fn expected_seen(conversation: &naive::Conversation, user: &str) -> BTreeSet<u64> {
    let seen = conversation.seen_by.iter().enumerate().filter(|(_, by)| by.contains(user));
    seen.map(|(at, _)| at as u64 + 1).collect()
}

/// I3 and I10, from the events alone: no number and no key twice, and each device's events in the order of its numbers.
fn assert_once_and_in_order(model: &Naive) {
    for conversation in model.conversations.values() {
        let (mut last, mut keys) = (std::collections::BTreeMap::new(), BTreeSet::new());
        for event in &conversation.events {
            if event.send_no > 0 {
                let before = last.insert((&event.sender, &event.device), event.send_no);
                assert!(before.is_none_or(|before| before < event.send_no), "{event:?}");
            }
            assert!(event.client_id.is_empty() || keys.insert((&event.sender, &event.client_id)), "{event:?}");
        }
    }
}

/// Effects are the events of this entry, each once, with the bytes that were stored.
fn assert_effects(rows: &MemoryRows, out: &Applied) {
    let fresh = |o: &&Outcome| matches!(o, Outcome::Accepted { repeat: false, .. });
    let fan_outs = out.effects.iter().filter_map(|effect| match effect {
        Effect::FanOut { conversation, seq, record, .. } => Some((conversation, seq, record)),
        _ => None,
    });
    let mut count = 0;
    for (conversation, seq, record) in fan_outs {
        let entity = Entity::conversation(APP, std::str::from_utf8(conversation).unwrap());
        assert_eq!(rows.events.get(&(entity, *seq)).map(|r| &r[..]), Some(&record[..]));
        count += 1;
    }
    assert!(count >= out.outcomes.iter().filter(fresh).count());
}

/// The steps as a stream of bundles, each judged by the model while it is built.
fn play(groups: &[(u64, Vec<Step>)]) -> (Replica, Naive, Vec<Bytes>, Vec<Applied>) {
    let (mut replica, mut model) = (Replica::default(), Naive::default());
    let (mut stream, mut answers) = (Vec::new(), Vec::new());
    let mut stamp = 1_000;
    for (elapsed, steps) in groups {
        // Sometimes a stamp goes back; `apply` must not.
        stamp = (stamp + elapsed).saturating_sub(3);
        let (mut commands, mut expected) = (Vec::new(), Vec::new());
        for step in steps {
            model.now = model.now.max(stamp);
            if let Some(command) = step.command(&model) {
                expected.push(model.apply(&command, stamp));
                commands.push(command);
            }
        }
        let bundle = bundle(&commands, stamp);
        let out = replica.apply(&bundle);
        for ((command, outcome), expected) in commands.iter().zip(&out.outcomes).zip(&expected) {
            assert_eq!(outcome, expected, "{command:?}");
        }
        assert_eq!(out.outcomes.len(), commands.len());
        assert_effects(&replica.rows, &out);
        stream.push(bundle);
        answers.push(out);
    }
    (replica, model, stream, answers)
}

/// The random steps are worth something only if they get everywhere.
#[test]
fn the_steps_reach_every_answer() {
    let mut runner = TestRunner::deterministic();
    let (mut reached, mut repeats) = (BTreeSet::new(), 0);
    for _ in 0..300 {
        let (_, _, _, answers) = play(&groups().new_tree(&mut runner).unwrap().current());
        for outcome in answers.iter().flat_map(|out| &out.outcomes) {
            match outcome {
                Outcome::Refused { reason, .. } => drop(reached.insert(reason.code())),
                Outcome::Accepted { repeat: true, .. } => repeats += 1,
                _ => {}
            }
        }
    }
    use Reason::*;
    let expected = [
        UnknownConversation,
        NotAParticipant,
        PermissionDenied,
        AlreadyExists,
        AlreadyParticipant,
        LastOwner,
        DirectIsFixed,
        BodyTooLarge,
        EmptyBody,
        OutOfOrder,
        DedupWindowPassed,
        SendNoTaken,
        ClientIdReused,
        FirstTryInFuture,
        WrongVersion,
        WrongEpoch,
    ];
    assert_eq!(reached, expected.iter().map(|reason| reason.code()).collect());
    assert!(repeats > 500, "{repeats}");
}

fn groups() -> impl Strategy<Value = Vec<(u64, Vec<Step>)>> {
    prop::collection::vec((0u64..10, prop::collection::vec(step(), 1..12)), 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 4_000, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_does_what_the_model_does(groups in groups()) {
        let (mut replica, model, _, _) = play(&groups);
        compare(&mut replica.rows, &model);
        assert_once_and_in_order(&model);
    }

    #[test]
    fn a_crash_and_the_same_bundles_again_end_in_the_same_state(
        groups in groups(), cut in any::<prop::sample::Index>(),
    ) {
        let (replica, _, stream, answers) = play(&groups);
        let cut = cut.index(stream.len());
        // A checkpoint as of `cut`, taken while the entries behind it were applied and then lost.
        let mut restored = Replica::default();
        stream[..cut].iter().for_each(|bundle| drop(restored.apply(bundle)));
        let checkpoint = restored.clone();
        stream[cut..].iter().for_each(|bundle| drop(restored.apply(bundle)));
        let mut restored = checkpoint;
        let again: Vec<_> = stream[cut..].iter().map(|bundle| restored.apply(bundle)).collect();
        prop_assert_eq!(&again[..], &answers[cut..]);
        prop_assert_eq!(&restored, &replica);
        if cut > 0 {
            let mut other = Replica::default();
            stream[1..].iter().for_each(|bundle| drop(other.apply(bundle)));
            prop_assert_ne!(other.chain, replica.chain, "a missing entry shows in the chain");
        }
    }

    #[test]
    fn rows_that_are_not_in_memory_change_nothing_but_the_time(groups in groups()) {
        let (replica, _, stream, answers) = play(&groups);
        for listen in [true, false] {
            let (mut flaky, mut last, mut missed) = (Flaky::default(), StampMs(0), 0);
            for (bundle, expected) in stream.iter().zip(&answers) {
                let mut out = Applied::default();
                let parsed = Bundle::parse(bundle.clone()).unwrap();
                let ctx = apply::begin_entry(&mut last, &parsed).unwrap();
                for command in parsed.commands() {
                    missed += flaky.apply(&ctx, &command, listen, &mut out);
                }
                prop_assert_eq!(&out, expected);
            }
            prop_assert_eq!(&flaky.all, &replica.rows);
            if listen {
                prop_assert_eq!(missed, 0, "the hint names every row that these commands read");
            } else {
                prop_assert!(missed >= answers.iter().map(|out| out.outcomes.len()).sum());
            }
        }
    }

    #[test]
    fn any_bytes_of_a_command_are_answered_without_a_panic(
        groups in groups(), noise in prop::collection::vec(any::<u8>(), 0..80), bit in any::<prop::sample::Index>(),
    ) {
        let (replica, model, _, _) = play(&groups);
        let ctx = apply::Context { stamp: StampMs(9), level: apply::LEVEL };
        let real = groups.iter().flat_map(|(_, steps)| steps).find_map(|step| step.command(&model));
        let mut flipped = real.map(|c| command::encode(&c).to_vec()).unwrap_or_default();
        if !flipped.is_empty() {
            let bit = bit.index(flipped.len() * 8);
            flipped[bit / 8] ^= 1 << (bit % 8);
        }
        for bytes in [noise, flipped] {
            let mut rows = replica.rows.clone();
            let (mut out, mut records) = (Applied::default(), BytesMut::new());
            let bytes = Bytes::from(bytes);
            apply::prefetch(&bytes, &mut |_| {});
            if apply::apply_command(&mut rows, &ctx, &bytes, &mut records, &mut out).is_err() {
                prop_assert!(rows == replica.rows && out == Applied::default());
            }
        }
    }
}
