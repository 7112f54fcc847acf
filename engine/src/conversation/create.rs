//! Create: the first events of a conversation. Must never change a conversation that exists already.

use std::collections::BTreeSet;

use bytes::Bytes;
use stentor_proto::{
    ids::{Seq, StampMs, Version},
    internal::{Actor, ConversationRow, Create, ParticipantRow, Stay},
    reason::Reason,
    v1::{ConversationKind, EventKind, Role},
};

use super::{MembershipEvent, accepted, client_id, default_role, head, outbox};
use crate::{
    apply::{ApplyError, Call},
    dedup::client_id::{self as keys, Known},
    effect::Outcome,
    key::Entity,
    rows::Rows,
};

pub(crate) fn apply<R: Rows>(call: &mut Call<'_, R>, create: &Create) -> Result<Outcome, ApplyError> {
    let Some(actor) = &create.actor else { return Ok(Outcome::refused(Reason::Malformed)) };
    let entity = Entity::conversation(call.app(), call.target());
    let head_key = entity.head();
    let hash = keys::hash_of_create(create);
    let key = keys::find(call, &entity, actor, create.client_key.as_ref(), hash)?;
    if let Some(head) = head(call, &head_key)? {
        return Ok(existing(create, &head, &key));
    }
    let insert = match keys::admit(call, &entity, actor, key, hash)? {
        Ok(insert) => insert,
        Err(reason) => return Ok(Outcome::refused(reason)),
    };
    let mut conversation = ConversationRow {
        kind: create.kind,
        history_full: create.history_full,
        created_ms: call.ctx.stamp.0,
        first_seq: 1,
        next_seq: 1,
        ..ConversationRow::default()
    };
    let direct = create.kind() == ConversationKind::Direct;
    let creator_role = if direct { Role::Writer } else { Role::Owner };
    let mut joiner = Joiner { call, entity: &entity, actor, create, head: &mut conversation };
    joiner.join(EventKind::Created, &actor.user, creator_role);
    let mut seen = BTreeSet::from([&actor.user]);
    for user in &create.participants {
        if seen.insert(user) {
            joiner.join(EventKind::ParticipantAdded, user, default_role(create.kind()));
        }
    }
    let version = conversation.version;
    call.rows.put(head_key, conversation.into());
    if let Some(insert) = insert {
        insert.write(call, Seq(1))?;
    }
    Ok(accepted(call, Seq(1), version))
}

/// A direct conversation is there or it is made: both users may ask. Any other belongs to who made it with this key.
fn existing(create: &Create, head: &ConversationRow, key: &keys::Lookup) -> Outcome {
    let first = |stamp| Outcome::Accepted { seq: Seq(1), stamp, repeat: true, version: Version(head.version) };
    match key.known {
        Known::First { stamp, .. } => first(stamp),
        Known::Reused => Outcome::refused(Reason::ClientIdReused),
        _ if create.kind() == ConversationKind::Direct => first(StampMs(head.created_ms)),
        _ => Outcome::refused(Reason::AlreadyExists),
    }
}

/// Lets the first participants in, each by an event of its own.
struct Joiner<'c, 'a, R> {
    call: &'c mut Call<'a, R>,
    entity: &'c Entity,
    actor: &'c Actor,
    create: &'c Create,
    head: &'c mut ConversationRow,
}

impl<R: Rows> Joiner<'_, '_, R> {
    fn join(&mut self, kind: EventKind, user: &Bytes, role: Role) {
        let head = &mut *self.head;
        let seq = Seq(head.next_seq);
        head.next_seq += 1;
        head.version += 1;
        head.participants += 1;
        head.owners += u32::from(role == Role::Owner);
        // The two of a direct conversation are there from the start, in whatever order their events stand.
        let from_start = head.history_full || self.create.kind() == ConversationKind::Direct;
        let stay = Stay { from: if from_start { 1 } else { seq.0 }, to: 0 };
        let created = kind == EventKind::Created;
        let none = Bytes::new();
        let subject = if created { &none } else { user };
        let event = MembershipEvent { kind, seq, version: Version(head.version), subject, role };
        let mut header = event.header(self.call, self.actor);
        if created {
            header.conversation_kind = self.create.kind;
            header.client_id = client_id(self.create.client_key.as_ref());
        }
        head.event_bytes += self.call.append(self.entity, &header, (&[], 0)) as u64;
        let participant = ParticipantRow { role: role as i32, stays: vec![stay] };
        let name = crate::command::text(user);
        self.call.rows.put(self.entity.participant(name), participant.into());
        outbox(self.call, self.entity, seq, user, false);
    }
}
