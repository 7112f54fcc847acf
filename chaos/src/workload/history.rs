//! A read of history, by the leader's lease or linearizable, from somewhere or of the end. Must never say that a read was
//! linearizable when it was not asked to be.

use stentor_client::{History as Which, Seq};

use super::{Connect, Dice, actor::Actor, answers};
use crate::oracle::{Call, Outcome};

/// What is read, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct History {
    linearizable: bool,
    /// The last ones, or from a place among what this device knows.
    last: bool,
    limit: u32,
}

impl History {
    pub(super) fn sample(dice: &mut Dice) -> Self {
        Self { linearizable: dice.chance(1, 2), last: dice.chance(1, 2), limit: 1 + dice.below(50) as u32 }
    }

    pub(super) async fn execute<C: Connect>(self, actor: &mut Actor<C>) {
        let (Some(place), Some(client)) = (actor.place(), actor.client()) else { return };
        let known = actor.streams.get(&place.id).map_or(0, |open| open.last);
        let after = (!self.last).then(|| actor.dice.below(known + 1));
        let which =
            Which { after_seq: after.map(Seq), limit: self.limit, linearizable: self.linearizable, ..Which::default() };
        let call = Call::Read { linearizable: self.linearizable, after };
        let recorder = &actor.stage.recorder;
        let operation = recorder.invoke(&actor.who, &place.name, call);
        // The SDK gives up by itself, and then the answer is unknown.
        let page = client.history(&place.id, which).await;
        if let Err(stentor_client::ClientError::Damaged(what)) = &page {
            recorder.damaged(&actor.who, &place.name, what);
        }
        let outcome = answers::page(&page);
        if outcome != Outcome::Unknown {
            recorder.answer(operation, outcome);
        }
    }
}
