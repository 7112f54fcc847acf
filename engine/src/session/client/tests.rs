//! The device's half against a model of gateways and brokers that lose, delay, repeat and refuse: nothing twice,
//! nothing lost, order kept.

mod model;
mod scripted;

use proptest::prelude::*;
use stentor_proto::v1;

use self::model::{Action, World};

/// A run as the sends that it stands for.
fn sends_of(run: v1::SendRun) -> impl Iterator<Item = v1::Send> {
    let v1::SendRun { conversation, done_no, items, send_no } = run;
    (send_no..).zip(items).map(move |(send_no, item)| {
        let v1::SendItem { kind, content_type, sent_at_ms, body } = item;
        let conversation = conversation.clone();
        v1::Send { conversation, send_no, done_no, kind, content_type, sent_at_ms, body, ..Default::default() }
    })
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        6 => (0..2usize).prop_map(Action::Send),
        6 => (1..9usize).prop_map(Action::Up),
        6 => (1..9usize).prop_map(Action::Down),
        6 => (0..4usize, 1..6usize).prop_map(|(pipe, count)| Action::Apply { pipe, count }),
        2 => (0..4usize).prop_map(Action::RepeatProposal),
        2 => (0..5usize).prop_map(Action::RefuseNext),
        1 => Just(Action::RefuseQuestion),
        3 => Just(Action::AnswerLate),
        2 => Just(Action::Cut),
        3 => Just(Action::Connect),
        3 => (1..3_000u64).prop_map(Action::Wait),
        3 => (0..2usize, 0..4u64).prop_map(|(c, hidden)| Action::OtherEvent { conversation: c, hidden }),
        3 => (0..2usize, 1..5usize).prop_map(|(c, count)| Action::Stream { conversation: c, count }),
        2 => (1..6usize).prop_map(Action::Consume),
        1 => (0..2usize).prop_map(Action::Forget),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_twice_nothing_lost_order_kept(seed: u64, actions in prop::collection::vec(action(), 0..250)) {
        let mut world = World::new(seed);
        for action in actions {
            world.act(action);
        }
        world.heal();
        world.check();
    }

    #[test]
    fn any_bytes_of_a_gateway_are_answered_without_a_panic(frames: Vec<(u8, Vec<u8>)>) {
        let mut session = super::Session::<u32, u32>::new(super::Config::default(), 1);
        session.connected(0, "token", &[0; 16]);
        for (kind, message) in frames {
            // Kinds of frames, most of the time.
            let _ = session.handle(1, if kind < 200 { 64 + kind % 11 } else { kind }, message.into());
        }
    }
}
