//! A user's own shard: his devices and their sessions, his cursors, and which conversations he is in. Must never hold
//! the heads of conversations: a write per participant per message would end every large group.

pub mod conversations;
pub mod cursors;
pub mod sessions;

use stentor_proto::{
    ids::Seq,
    internal::{Command, UserRow, command::Op},
};

use crate::{
    command,
    key::{Entity, Kind, RowKey},
};

/// The user's own row.
pub fn user_key(user: &Entity) -> RowKey {
    user.key(Kind::User, &[])
}

/// The last seq of the user's own stream, which counts the changes of his list of conversations; 0 before the first.
pub fn head(user: &UserRow) -> Seq {
    Seq(user.next_seq.saturating_sub(1))
}

/// A device's row.
pub fn device_key(user: &Entity, device: &str) -> RowKey {
    user.key(Kind::Device, &[device.as_bytes()])
}

/// The row of a conversation in the user's list.
pub fn conversation_key(user: &Entity, conversation: &str) -> RowKey {
    user.key(Kind::UserConversation, &[conversation.as_bytes()])
}

/// The user's read cursor in a conversation.
pub fn read_key(user: &Entity, conversation: &str) -> RowKey {
    user.key(Kind::Read, &[conversation.as_bytes()])
}

/// The rows that a user's command reads.
pub(crate) fn prefetch(command: &Command, visit: &mut dyn FnMut(RowKey)) {
    let user = Entity::user(command::text(&command.app), command::text(&command.target));
    visit(user_key(&user));
    match &command.op {
        Some(Op::OpenSession(open)) => visit(device_key(&user, command::text(&open.device))),
        Some(Op::RemoveDevice(remove)) => {
            visit(device_key(&user, command::text(&remove.device)));
            sessions::cursor_keys(&user, remove).for_each(visit);
        }
        Some(Op::UserConversation(item)) => visit(conversation_key(&user, command::text(&item.conversation))),
        Some(Op::MoveCursors(moves)) => {
            visit(device_key(&user, command::text(&moves.device)));
            cursors::keys(&user, moves).for_each(|(key, _)| visit(key));
        }
        _ => {}
    }
}
