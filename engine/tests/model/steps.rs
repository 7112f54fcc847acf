//! Random steps, small enough to collide often: three conversations, four users, two devices each. A step becomes a
//! command only beside the model, so that retries repeat what was really sent. Must never look into the engine.

use bytes::Bytes;
use proptest::prelude::*;
use stentor_engine::command;
use stentor_proto::{
    internal::{Actor, ChangeParticipant, ClientKey, Command, Create, Send, command::Op},
    reason::Reason,
    v1::{ConversationKind, EventKind},
};

use crate::naive::Naive;

pub(crate) const APP: &str = "app";
pub(crate) const USERS: [&str; 4] = ["ann", "bob", "cem", "dea"];
pub(crate) const CONVERSATIONS: [&str; 3] = ["general", "news", "direct/ann/bob"];

/// Which number a send takes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Number {
    Next,
    Retry(u64),
    Other(u64),
    Gap(u64),
    None,
}

#[derive(Debug, Clone)]
pub(crate) enum Step {
    Send { conversation: usize, user: usize, device: usize, number: Number, done: u64, body: u8, odd: u8, key: u8 },
    Change { conversation: usize, actor: usize, user: usize, change: i32, role: i32, admin: bool, key: u8, odd: u8 },
    Create { conversation: usize, actor: usize, others: u8, full: bool, key: u8 },
}

fn number() -> impl Strategy<Value = Number> {
    prop_oneof![
        8 => Just(Number::Next),
        4 => (0u64..4).prop_map(Number::Retry),
        1 => (0u64..3).prop_map(Number::Other),
        1 => (1u64..4).prop_map(Number::Gap),
        2 => Just(Number::None),
    ]
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let send = (0..3usize, 0..4usize, 0..2usize, number(), 0..4u64, 0..4u8, 0..40u8, 0..30u8).prop_map(
        |(conversation, user, device, number, done, body, odd, key)| Step::Send {
            conversation,
            user,
            device,
            number,
            done,
            body,
            odd,
            key,
        },
    );
    let change = (0..3usize, 0..4usize, 0..4usize, 1..4i32, 0..5i32, any::<bool>(), 0..30u8, 0..10u8).prop_map(
        |(conversation, actor, user, change, role, admin, key, odd)| Step::Change {
            conversation,
            actor,
            user,
            change,
            role,
            admin,
            key,
            odd,
        },
    );
    let create = (0..3usize, 0..4usize, 0..16u8, any::<bool>(), 0..30u8)
        .prop_map(|(conversation, actor, others, full, key)| Step::Create { conversation, actor, others, full, key });
    prop_oneof![16 => send, 4 => change, 2 => create]
}

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn client_key(key: u8, now: u64) -> Option<ClientKey> {
    let first_try_ms = if key == 0 { now + 300_001 + 100 } else { u64::from(key) };
    (key < 6).then(|| ClientKey { client_id: format!("key-{key}").into(), first_try_ms })
}

fn wrap(conversation: &str, op: Op) -> Command {
    command::wrap(bytes(APP), bytes(conversation), op)
}

impl Step {
    /// The command that this step is, given what was sent before. `None` where it makes no sense.
    pub(crate) fn command(&self, model: &Naive) -> Option<Command> {
        match *self {
            Self::Send { conversation, user, device, number, done, body, odd, key } => {
                let (conversation, device) = (CONVERSATIONS[conversation], format!("d{device}"));
                let place = (conversation.to_owned(), USERS[user].to_owned(), device.clone());
                let count = model.counts.get(&place).cloned().unwrap_or_default();
                let fresh = Send {
                    actor: Some(Actor { user: bytes(USERS[user]), device: device.into(), admin: odd == 1 }),
                    client_key: client_key(key, model.now),
                    kind: if odd == 2 { EventKind::Action as i32 } else { 0 },
                    body: if body == 0 && odd < 9 { Bytes::new() } else { vec![b'a' + body; 3].into() },
                    expect_version: (odd < 6 && odd > 2).then_some(u64::from(odd)),
                    expect_epoch: (odd == 6 || odd == 7).then(|| u64::from(odd) - 6),
                    sent_at_ms: u64::from(body),
                    ..Send::default()
                };
                let n = match number {
                    Number::None => return Some(wrap(conversation, Op::Send(fresh))),
                    Number::Next => count.last + 1,
                    Number::Gap(by) => count.last + 1 + by,
                    Number::Retry(back) | Number::Other(back) => count.last.checked_sub(back).filter(|n| *n > 0)?,
                };
                let done_no = count.last.min(n - 1).saturating_sub(done);
                let first = matches!(number, Number::Retry(_)).then(|| count.sends.get(&n)).flatten();
                let send = match first {
                    Some((first, _)) => Send { done_no, ..first.clone() },
                    None => Send { send_no: n, done_no, ..fresh },
                };
                let command = wrap(conversation, Op::Send(send));
                if odd == 8 && first.is_none() {
                    return command::refused_send(&command, Reason::BodyTooLarge);
                }
                Some(command)
            }
            Self::Change { conversation, actor, user, change, role, admin, key, odd } => {
                if change == 3 && role == 0 {
                    return None;
                }
                let actor = Actor { user: bytes(USERS[actor]), device: Bytes::new(), admin: admin && odd < 3 };
                let change = ChangeParticipant {
                    actor: Some(actor),
                    user: bytes(USERS[user]),
                    change,
                    role,
                    expect_version: (odd == 9).then_some(3),
                    client_key: client_key(key, model.now),
                };
                Some(wrap(CONVERSATIONS[conversation], Op::ChangeParticipant(change)))
            }
            Self::Create { conversation, actor, others, full, key } => {
                let direct = conversation == 2;
                let (actor, kind) = match conversation {
                    0 => (actor, ConversationKind::Group),
                    1 => (actor, ConversationKind::Channel),
                    _ => (actor % 2, ConversationKind::Direct),
                };
                let others = USERS.iter().enumerate().filter(|(at, _)| match direct {
                    true => *at == 1 - actor,
                    false => others & (1 << at) != 0,
                });
                let create = Create {
                    actor: Some(Actor { user: bytes(USERS[actor]), device: Bytes::new(), admin: false }),
                    kind: kind as i32,
                    participants: others.map(|(_, user)| bytes(user)).collect(),
                    history_full: full,
                    client_key: client_key(key, model.now),
                };
                Some(wrap(CONVERSATIONS[conversation], Op::Create(create)))
            }
        }
    }
}
