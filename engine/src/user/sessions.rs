//! Devices and the fencing of their sessions. Must never give a number twice, nor let a superseded session back in.

use std::collections::BTreeSet;

use stentor_proto::{
    ids::{ApplyLevel, SessionNo},
    internal::{CursorRow, DeviceRow, OldNonce, OpenSession, RemoveDevice, UserRow},
    reason::Reason,
};

use super::{device_key, user_key};
use crate::{
    apply::{ApplyError, Call},
    command,
    effect::Outcome,
    key::{Entity, RowKey},
    limits,
    rows::Rows,
    state,
};

/// Begins a session, or tells the number of the one that this nonce began.
pub(crate) fn open<R: Rows>(call: &mut Call<'_, R>, open: &OpenSession) -> Result<Outcome, ApplyError> {
    let entity = Entity::user(call.app(), call.target());
    let (user_key, device_key) = (user_key(&entity), device_key(&entity, command::text(&open.device)));
    let user = state::read::<UserRow>(call.rows, &user_key)?.cloned().unwrap_or_default();
    let device = state::read::<DeviceRow>(call.rows, &device_key)?;
    if let Some(device) = device {
        if device.nonce == open.nonce {
            return Ok(Outcome::SessionOpened { session_no: SessionNo(device.session_no) });
        }
        if device.superseded.iter().any(|old| old.nonce == open.nonce) {
            return Ok(Outcome::refused(Reason::SessionSuperseded));
        }
    } else if user.devices >= limits::MAX_DEVICES_PER_USER {
        return Ok(Outcome::refused(Reason::TooManyDevices));
    }
    let session_no = user.next_session_no.max(1);
    let nonce = state::own(&open.nonce);
    let known = device.is_some();
    if known {
        let row = state::change::<DeviceRow>(call.rows, &device_key)?;
        if row.superseded.len() >= limits::SUPERSEDED_NONCES {
            row.superseded.remove(0);
        }
        let old = std::mem::replace(&mut row.nonce, nonce);
        row.superseded.push(OldNonce { nonce: old });
        row.session_no = session_no;
    } else {
        let row = DeviceRow { nonce, session_no, superseded: Vec::new(), registered_ms: call.ctx.stamp.0 };
        call.rows.put(device_key, row.into());
    }
    let devices = user.devices + u32::from(!known);
    call.rows.put(user_key, UserRow { devices, next_session_no: session_no + 1, ..user }.into());
    Ok(Outcome::SessionOpened { session_no: SessionNo(session_no) })
}

/// The cursors that go with a removed device.
pub(crate) fn cursor_keys<'r>(user: &'r Entity, remove: &'r RemoveDevice) -> impl Iterator<Item = RowKey> + 'r {
    let device = command::text(&remove.device);
    remove.delivered.iter().map(move |conversation| user.delivered(device, command::text(conversation)))
}

/// The first level at which a removed device takes its cursors with it.
const CURSORS_GO: ApplyLevel = ApplyLevel(2);

/// Forgets a device, and those of its cursors that the command names: `apply` cannot look for them. Who proposes it
/// names them all, in several commands if need be; what is left counts against the user's bound and is another device's
/// if its id comes again. Session numbers count per user and go on, so that an old session of it stays fenced.
pub(crate) fn remove<R: Rows>(call: &mut Call<'_, R>, remove: &RemoveDevice) -> Result<Outcome, ApplyError> {
    let entity = Entity::user(call.app(), call.target());
    let (user_key, device_key) = (user_key(&entity), device_key(&entity, command::text(&remove.device)));
    let user = state::read::<UserRow>(call.rows, &user_key)?.cloned();
    let known = state::read::<DeviceRow>(call.rows, &device_key)?.is_some();
    let mut cursors = BTreeSet::new();
    if call.ctx.level >= CURSORS_GO {
        for key in cursor_keys(&entity, remove) {
            if state::read::<CursorRow>(call.rows, &key)?.is_some() {
                cursors.insert(key);
            }
        }
    }
    if !known && cursors.is_empty() {
        return Ok(Outcome::refused(Reason::UnknownDevice));
    }
    cursors.iter().for_each(|key| call.rows.remove(key));
    call.rows.remove(&device_key);
    if user.is_some() {
        let row = state::change::<UserRow>(call.rows, &user_key)?;
        row.devices = row.devices.saturating_sub(u32::from(known));
        row.cursors = row.cursors.saturating_sub(cursors.len() as u32);
    }
    Ok(Outcome::Done)
}
