//! Begins to follow a conversation where the device left off, if it does not follow it already. Must never begin a stream
//! beside one that goes on: nobody could say what belongs to which.

use stentor_client::{CursorStore, From, Seq};

use super::{Connect, Place, actor::Actor, streams::Open};
use crate::oracle::Start;

/// A conversation is chosen when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tail;

impl Tail {
    pub(super) async fn execute<C: Connect>(self, actor: &mut Actor<C>) {
        if let Some(place) = actor.place() {
            follow(actor, &place).await;
        }
    }
}

/// Follows a conversation from the device's cursor on.
pub(super) async fn follow<C: Connect>(actor: &mut Actor<C>, place: &Place) {
    let Some(client) = actor.client() else { return };
    if actor.streams.is_open(&place.id) {
        return;
    }
    let after = actor.cursors.delivered(&place.id).unwrap_or_default();
    let recorder = &actor.stage.recorder;
    let id = recorder.subscribe(&actor.who, &place.name, Start::After(after.0));
    let began = recorder.moment();
    let open = Open { id, began, name: place.name.clone(), last: after.0, ended: false };
    // Before it is asked for: its first event may come at once.
    actor.streams.begin(&place.id, open);
    // Named, since the cursor of the store may move meanwhile.
    let _ = client.subscribe(&place.id, From::Seq(Seq(after.0))).await;
}
