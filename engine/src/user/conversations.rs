//! The receiver of the conversations' outbox: which conversations a user is in. Must never let an older item undo a
//! newer one, in whatever order and however often they come.

use stentor_proto::{
    ids::ApplyLevel,
    internal::{UserConversation, UserConversationRow, UserRow},
    reason::Reason,
};

use super::{conversation_key, user_key};
use crate::{
    apply::{ApplyError, Call},
    command,
    effect::{Effect, Outcome},
    key::Entity,
    limits,
    rows::Rows,
    state,
};

pub(crate) fn apply<R: Rows>(call: &mut Call<'_, R>, item: &UserConversation) -> Result<Outcome, ApplyError> {
    let entity = Entity::user(call.app(), call.target());
    let (user_key, key) = (user_key(&entity), conversation_key(&entity, command::text(&item.conversation)));
    let user = state::read::<UserRow>(call.rows, &user_key)?.cloned().unwrap_or_default();
    let before = state::read::<UserConversationRow>(call.rows, &key)?;
    if before.is_some_and(|before| item.seq <= before.seq) {
        return Ok(Outcome::Done);
    }
    let was_in = before.is_some_and(|before| !before.removed);
    let is_in = !item.removed;
    if is_in && !was_in && user.conversations >= limits::MAX_CONVERSATIONS_PER_USER {
        return Ok(Outcome::refused(Reason::TooManyConversations));
    }
    let conversations = (user.conversations + u32::from(is_in)).saturating_sub(u32::from(was_in));
    if call.ctx.level < OWN_STREAM {
        call.rows.put(key, UserConversationRow { seq: item.seq, removed: item.removed, user_seq: 0 }.into());
        if was_in != is_in {
            call.rows.put(user_key, UserRow { conversations, ..user }.into());
        }
        return Ok(Outcome::Done);
    }
    // Also where he was in and is in: a removal and an addition may have lain between, and a stream may have ended.
    let head = super::head(&user).next();
    call.rows.put(key, UserConversationRow { seq: item.seq, removed: item.removed, user_seq: head.0 }.into());
    call.rows.put(user_key, UserRow { conversations, next_seq: head.next().0, ..user }.into());
    let (app, user) = (call.command.app.clone(), call.command.target.clone());
    call.effects.push(Effect::UserChanged { app, user, head });
    Ok(Outcome::Done)
}

/// The first level at which changes of the list have seqs of the user's own stream.
const OWN_STREAM: ApplyLevel = ApplyLevel(2);
