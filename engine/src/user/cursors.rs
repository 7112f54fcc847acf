//! Cursors: what a device has delivered and its user has read. Must never move one back, nor for an old session.

use std::collections::BTreeMap;

use stentor_proto::{
    internal::{CursorRow, DeviceRow, MoveCursors, UserRow},
    reason::Reason,
};

use super::{device_key, read_key, user_key};
use crate::{
    apply::{ApplyError, Call},
    command,
    effect::Outcome,
    key::{Entity, RowKey},
    limits,
    rows::Rows,
    state,
};

/// The cursor rows that a command names, each with the seq that it asks for.
pub(crate) fn keys<'m>(user: &'m Entity, moves: &'m MoveCursors) -> impl Iterator<Item = (RowKey, u64)> + 'm {
    let device = command::text(&moves.device);
    let delivered =
        moves.delivered.iter().map(move |m| (user.delivered(device, command::text(&m.conversation)), m.seq));
    delivered.chain(moves.read.iter().map(move |m| (read_key(user, command::text(&m.conversation)), m.seq)))
}

/// Moves cursors forwards; a move backwards changes nothing and is no error.
pub(crate) fn apply<R: Rows>(call: &mut Call<'_, R>, moves: &MoveCursors) -> Result<Outcome, ApplyError> {
    let entity = Entity::user(call.app(), call.target());
    let user_key = user_key(&entity);
    let user = state::read::<UserRow>(call.rows, &user_key)?.cloned().unwrap_or_default();
    let device_key = device_key(&entity, command::text(&moves.device));
    match state::read::<DeviceRow>(call.rows, &device_key)?.map(|device| device.session_no) {
        None => return Ok(Outcome::refused(Reason::UnknownDevice)),
        Some(current) if moves.session_no < current => return Ok(Outcome::refused(Reason::SessionSuperseded)),
        // A number that nobody gave.
        Some(current) if moves.session_no > current => return Ok(Outcome::refused(Reason::Malformed)),
        Some(_) => {}
    }
    let mut ahead = BTreeMap::new();
    let mut new_rows = 0;
    for (key, seq) in keys(&entity, moves) {
        let row = state::read::<CursorRow>(call.rows, &key)?;
        if seq <= row.map_or(0, |row| row.seq) {
            continue;
        }
        let absent = row.is_none();
        let entry = ahead.entry(key).or_insert_with(|| {
            new_rows += u32::from(absent);
            0
        });
        *entry = seq.max(*entry);
    }
    if new_rows > 0 && user.cursors.saturating_add(new_rows) > limits::MAX_CURSORS_PER_USER {
        return Ok(Outcome::refused(Reason::TooManyConversations));
    }
    for (key, seq) in ahead {
        call.rows.put(key, CursorRow { seq }.into());
    }
    if new_rows > 0 {
        call.rows.put(user_key, UserRow { cursors: user.cursors + new_rows, ..user }.into());
    }
    Ok(Outcome::Done)
}
