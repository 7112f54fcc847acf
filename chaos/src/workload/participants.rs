//! A user is added or removed by the owner, leaves by himself, or somebody tries who may not. Must never remove an owner:
//! he reads the whole conversation in the end.

use stentor_client::Role;

use super::{Connect, Dice, actor::Actor, answers};
use crate::oracle::Call;

/// Which change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Participants {
    Add,
    Remove,
    Leave,
}

impl Participants {
    pub(super) fn sample(dice: &mut Dice) -> Self {
        match dice.below(8) {
            0..5 => Self::Add,
            5..7 => Self::Remove,
            _ => Self::Leave,
        }
    }

    pub(super) async fn execute<C: Connect>(self, actor: &mut Actor<C>) {
        let stage = std::sync::Arc::clone(&actor.stage);
        let own: Vec<_> = stage.places.iter().filter(|place| place.owner.user == actor.who.user).cloned().collect();
        // Mostly where he may: what is refused changes nothing.
        let own = if actor.dice.chance(4, 5) && self != Self::Leave { actor.dice.pick(&own).cloned() } else { None };
        let (Some(place), Some(client)) = (own.or_else(|| actor.place()), actor.client()) else { return };
        let others: Vec<_> = stage.users.iter().filter(|(name, _)| *name != place.owner.user).collect();
        let chosen = match self {
            Self::Leave => others.iter().find(|(name, _)| *name == actor.who.user),
            Self::Add | Self::Remove => actor.dice.pick(&others),
        };
        let Some((name, user)) = chosen else { return };
        let call = if self == Self::Add { Call::Add(name.clone()) } else { Call::Remove(name.clone()) };
        let operation = stage.recorder.invoke(&actor.who, &place.name, call);
        let changed = match self {
            Self::Add => client.add(&place.id, user, Role::Writer).await,
            Self::Remove | Self::Leave => client.remove(&place.id, user).await,
        };
        stage.recorder.answer(operation, answers::changed(&changed));
    }
}
