//! The user has seen what came to this device: moves the read cursor, which all his devices share. Must never move it
//! beyond what came.

use stentor_client::Seq;

use super::{Connect, actor::Actor};

/// A conversation is chosen when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ReadMark;

impl ReadMark {
    pub(super) fn execute<C: Connect>(self, actor: &mut Actor<C>) {
        let (Some(place), Some(client)) = (actor.place(), actor.client()) else { return };
        let Some(open) = actor.streams.get(&place.id).filter(|open| open.last > 0) else { return };
        actor.stage.recorder.cursor_moves(&actor.who, &place.name, 0, open.last);
        client.read(&place.id, Seq(open.last));
    }
}
