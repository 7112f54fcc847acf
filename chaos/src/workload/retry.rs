//! A send under a key of the caller's own that gives up soon and tries again, as a caller of the gRPC API does: every
//! attempt is a send of its own under the same key, through whichever session is there by then. Must never change the
//! message between attempts.

use std::{sync::Arc, time::Duration};

use stentor_client::{ClientId, Message};
use tokio::time::{sleep, timeout};

use super::{
    Connect, Dice,
    actor::{Actor, Asked, ask},
    answers,
};
use crate::oracle::Outcome;

/// How often, and how long each attempt waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Retry {
    attempts: u64,
    patience_ms: u64,
    /// Tries again although it has an answer, as a caller does whose answer was lost on its own way.
    again: bool,
}

impl Retry {
    pub(super) fn sample(dice: &mut Dice) -> Self {
        Self { attempts: 2 + dice.below(4), patience_ms: dice.below(300), again: dice.chance(1, 2) }
    }

    pub(super) async fn execute<C: Connect>(self, actor: &mut Actor<C>) {
        let Some(place) = actor.place() else { return };
        let body = actor.body();
        // The count in it makes the start of a body its own; a key has no spaces.
        let own = body.split(|byte| *byte == b' ').take(2).map(String::from_utf8_lossy).collect::<Vec<_>>().join(".");
        let Ok(client_id) = ClientId::new(format!("retry-{own}")) else { return };
        let message = Message { sent_at_ms: 1, ..Message::bytes("text/plain", body) }.client_id(client_id);
        let first = actor.say(&place, message.clone()).await;
        let (stage, line, who) = (Arc::clone(&actor.stage), Arc::clone(&actor.line), actor.who.clone());
        actor.waiting.spawn(async move {
            let mut asked = first;
            for attempt in 1..=self.attempts {
                let patience = if attempt == self.attempts { stage.plan.patience } else { self.patience() };
                if let Some(Asked { operation, answer }) = asked.take() {
                    if let Ok(answer) = timeout(patience, answer).await {
                        let outcome = answers::sent(&answer);
                        let decided = outcome != Outcome::Unknown;
                        stage.recorder.answer(operation, outcome);
                        if decided && !self.again {
                            return;
                        }
                    }
                } else {
                    sleep(self.patience()).await;
                }
                if attempt < self.attempts
                    && let Some(client) = line.client()
                {
                    asked = ask(&client, &stage, &who, &place, message.clone()).await;
                }
            }
        });
    }

    fn patience(self) -> Duration {
        Duration::from_millis(self.patience_ms)
    }
}
