//! The conversation's state machine: create, send, participants. Each command reads all that it needs, decides, and
//! only then writes. Must never give a `seq` to a command that it refuses.

pub mod create;
pub mod participants;
pub mod send;

use bytes::Bytes;
use stentor_proto::{
    ids::{Seq, Version},
    internal::{ClientKey, Command, ConversationRow, OutboxRow, ParticipantRow, command::Op},
    v1::{ConversationKind, EventHeader, EventKind, Role},
};

use crate::{
    access,
    apply::{ApplyError, Call},
    command, dedup,
    effect::{Effect, Outcome},
    key::{Entity, Kind, RowKey},
    limits,
    rows::Rows,
    state,
};

/// What an empty content type means.
pub const DEFAULT_CONTENT_TYPE: &str = "text/plain; charset=utf-8";

/// The role of who joins without being given one.
pub fn default_role(kind: ConversationKind) -> Role {
    match kind {
        ConversationKind::Channel => Role::Reader,
        _ => Role::Writer,
    }
}

/// How many participants a conversation of this kind holds.
pub fn max_participants(kind: ConversationKind) -> u32 {
    match kind {
        ConversationKind::Direct => 2,
        ConversationKind::Channel => limits::MAX_CHANNEL_PARTICIPANTS,
        _ => limits::MAX_GROUP_PARTICIPANTS,
    }
}

/// The rows that a conversation's command reads.
pub(crate) fn prefetch(command: &Command, visit: &mut dyn FnMut(RowKey)) {
    let entity = Entity::conversation(command::text(&command.app), command::text(&command.target));
    visit(entity.head());
    let (actor, key, subject) = match &command.op {
        Some(Op::Send(send)) => (send.actor.as_ref(), send.client_key.as_ref(), None),
        Some(Op::SendRun(run)) => (run.actor.as_ref(), None, None),
        Some(Op::Create(create)) => (create.actor.as_ref(), create.client_key.as_ref(), None),
        Some(Op::ChangeParticipant(c)) => (c.actor.as_ref(), c.client_key.as_ref(), Some(&c.user)),
        _ => return,
    };
    let Some(actor) = actor else { return };
    let user = command::text(&actor.user);
    if !matches!(command.op, Some(Op::Create(_))) {
        visit(entity.participant(user));
    }
    if let Some(subject) = subject {
        visit(entity.participant(command::text(subject)));
    }
    if command::send_no(command).is_some() {
        visit(entity.send_state(user, command::text(&actor.device)));
    }
    if let Some(key) = key.filter(|key| !key.client_id.is_empty() && key.client_id.len() < 256) {
        dedup::client_id::prefetch(&entity, user, &key.client_id, visit);
    }
}

/// A conversation's header row, by value: it is small and has no memory of its own.
fn head<R: Rows>(call: &mut Call<'_, R>, key: &RowKey) -> Result<Option<ConversationRow>, ApplyError> {
    Ok(state::read::<ConversationRow>(call.rows, key)?.cloned())
}

/// A participant's present role.
fn role<R: Rows>(call: &mut Call<'_, R>, key: &RowKey) -> Result<Option<Role>, ApplyError> {
    Ok(state::read::<ParticipantRow>(call.rows, key)?.and_then(access::role))
}

/// The client id of a key, empty where none was chosen.
fn client_id(key: Option<&ClientKey>) -> Bytes {
    key.map(|key| key.client_id.clone()).unwrap_or_default()
}

/// Writes a change of participants: the event, the outbox item, and their effects.
struct MembershipEvent<'a> {
    kind: EventKind,
    seq: Seq,
    version: Version,
    subject: &'a Bytes,
    role: Role,
}

impl MembershipEvent<'_> {
    fn header<R: Rows>(&self, call: &Call<'_, R>, actor: &stentor_proto::internal::Actor) -> EventHeader {
        EventHeader {
            seq: self.seq.0,
            kind: self.kind as i32,
            sender: actor.user.clone(),
            device: actor.device.clone(),
            stamp_ms: call.ctx.stamp.0,
            subject: self.subject.clone(),
            role: self.role as i32,
            version: self.version.0,
            ..EventHeader::default()
        }
    }
}

/// The item that tells a user's shard; its key is (seq of the membership event, user).
fn outbox<R: Rows>(call: &mut Call<'_, R>, entity: &Entity, item: Seq, user: &Bytes, removed: bool) {
    let row = OutboxRow { user: state::own(user), seq: item.0, removed };
    call.rows.put(outbox_key(entity, item, user), row.into());
    call.effects.push(Effect::Outbox {
        app: call.command.app.clone(),
        conversation: call.command.target.clone(),
        item,
        user: user.clone(),
        removed,
    });
}

fn outbox_key(entity: &Entity, item: Seq, user: &[u8]) -> RowKey {
    entity.key(Kind::Outbox, &[&item.0.to_be_bytes(), user])
}

fn accepted<R: Rows>(call: &Call<'_, R>, seq: Seq, version: u64) -> Outcome {
    Outcome::Accepted { seq, stamp: call.ctx.stamp, repeat: false, version: Version(version) }
}
