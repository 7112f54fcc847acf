//! A send by the session, numbered by the SDK and repeated by it until it has an answer; several at once, so that their
//! order is put to the test. Must never wait for the answer before the next one is sent.

use std::sync::Arc;

use stentor_client::Message;
use tokio::time::{Instant, timeout_at};

use super::{
    Connect, Dice,
    actor::{Actor, Asked},
    answers,
};

/// So many messages in one go to one conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Send {
    burst: u64,
    action: bool,
}

impl Send {
    pub(super) fn sample(dice: &mut Dice) -> Self {
        let burst = if dice.chance(1, 8) { 2 + dice.below(12) } else { 1 };
        Self { burst, action: dice.chance(1, 10) }
    }

    pub(super) async fn execute<C: Connect>(self, actor: &mut Actor<C>) {
        let Some(place) = actor.place() else { return };
        for _ in 0..self.burst {
            let body = actor.body();
            let message = Message { sent_at_ms: 1, ..Message::bytes("application/octet-stream", body) };
            let kind = if self.action { stentor_client::EventKind::Action } else { message.kind };
            let Some(asked) = actor.say(&place, Message { kind, ..message }).await else { return };
            let (stage, until) = (Arc::clone(&actor.stage), Instant::now() + actor.stage.plan.patience);
            actor.waiting.spawn(async move {
                let Asked { operation, answer } = asked;
                if let Ok(answer) = timeout_at(until, answer).await {
                    stage.recorder.answer(operation, answers::sent(&answer));
                }
            });
        }
    }
}
