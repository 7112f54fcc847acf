//! Who is in a conversation: add, remove, change of role, and the outbox that tells the users' shards. Must never leave
//! others without an owner, nor let anyone reach above his own role.

use stentor_proto::{
    ids::{Seq, StampMs, Version},
    internal::{ChangeParticipant, ConversationRow, OutboxDone, ParticipantRow, Stay, change_participant::Change},
    reason::Reason,
    v1::{ConversationKind, EventKind, Role},
};

use super::{MembershipEvent, accepted, client_id, default_role, head, max_participants, outbox, outbox_key, role};
use crate::{
    access,
    apply::{ApplyError, Call},
    command,
    dedup::client_id::{self as keys, Known},
    effect::Outcome,
    key::Entity,
    limits,
    rows::Rows,
    state,
};

/// What the rows say about a change, before it is judged.
struct Standing {
    head: ConversationRow,
    /// The actor's role; an admin token has an owner's.
    actor: Option<Role>,
    /// The subject's present role.
    subject: Option<Role>,
    stays: Vec<Stay>,
    /// He has a row, from now or from earlier.
    known: bool,
}

pub(crate) fn apply<R: Rows>(call: &mut Call<'_, R>, change: &ChangeParticipant) -> Result<Outcome, ApplyError> {
    let Some(actor) = &change.actor else { return Ok(Outcome::refused(Reason::Malformed)) };
    let entity = Entity::conversation(call.app(), call.target());
    let head_key = entity.head();
    let Some(head) = head(call, &head_key)? else { return Ok(Outcome::refused(Reason::UnknownConversation)) };
    let hash = keys::hash_of_change(change);
    let key = keys::find(call, &entity, actor, change.client_key.as_ref(), hash)?;
    match key.known {
        Known::First { seq, stamp } => return Ok(repeat(seq, stamp, &head)),
        Known::Reused => return Ok(Outcome::refused(Reason::ClientIdReused)),
        Known::Absent | Known::NoKey => {}
    }
    let own_role = role(call, &entity.participant(command::text(&actor.user)))?;
    let subject_key = entity.participant(command::text(&change.user));
    let subject = state::read::<ParticipantRow>(call.rows, &subject_key)?;
    let standing = Standing {
        head,
        actor: if actor.admin { Some(Role::Owner) } else { own_role },
        subject: subject.and_then(access::role),
        stays: subject.map(|s| s.stays.clone()).unwrap_or_default(),
        known: subject.is_some(),
    };
    let new_role = match judge(change, &standing) {
        Ok(role) => role,
        Err(reason) => return Ok(Outcome::refused(reason)),
    };
    let insert = match keys::admit(call, &entity, actor, key, hash)? {
        Ok(insert) => insert,
        Err(reason) => return Ok(Outcome::refused(reason)),
    };
    let seq = Seq(standing.head.next_seq);
    let version = standing.head.version + 1;
    write(call, change, &entity, &standing, new_role)?;
    if let Some(insert) = insert {
        insert.write(call, seq)?;
    }
    Ok(accepted(call, seq, version))
}

fn repeat(seq: Seq, stamp: StampMs, head: &ConversationRow) -> Outcome {
    Outcome::Accepted { seq, stamp, repeat: true, version: Version(head.version) }
}

/// Whether the change may be made; the role that the subject has afterwards, or had until now.
fn judge(change: &ChangeParticipant, standing: &Standing) -> Result<Role, Reason> {
    let head = &standing.head;
    if standing.actor.is_none() {
        return Err(Reason::NotAParticipant);
    }
    if head.kind() == ConversationKind::Direct {
        return Err(Reason::DirectIsFixed);
    }
    if change.expect_version.is_some_and(|version| version != head.version) {
        return Err(Reason::WrongVersion);
    }
    match change.change() {
        Change::Add => {
            let role = match change.role() {
                Role::Unspecified => default_role(head.kind()),
                role => role,
            };
            access::may_change(standing.actor, role)?;
            judge_add(standing, role)
        }
        Change::Remove => {
            let role = standing.subject.ok_or(Reason::NotAParticipant)?;
            let leaves = change.actor.as_ref().is_some_and(|actor| actor.user == change.user);
            if !leaves {
                access::may_change(standing.actor, role)?;
            }
            let last_owner = role == Role::Owner && head.owners <= 1 && head.participants > 1;
            if last_owner { Err(Reason::LastOwner) } else { Ok(role) }
        }
        Change::Role => {
            let role = standing.subject.ok_or(Reason::NotAParticipant)?;
            access::may_change(standing.actor, role.max(change.role()))?;
            let last_owner = role == Role::Owner && change.role() != Role::Owner && head.owners <= 1;
            if last_owner { Err(Reason::LastOwner) } else { Ok(change.role()) }
        }
        Change::Unspecified => Err(Reason::Malformed),
    }
}

fn judge_add(standing: &Standing, role: Role) -> Result<Role, Reason> {
    if standing.subject.is_some() {
        return Err(Reason::AlreadyParticipant);
    }
    if standing.head.participants >= max_participants(standing.head.kind()) {
        return Err(Reason::TooManyParticipants);
    }
    if standing.stays.len() >= limits::MAX_STAYS {
        return Err(Reason::TooManyStays);
    }
    Ok(role)
}

fn write<R: Rows>(
    call: &mut Call<'_, R>,
    change: &ChangeParticipant,
    entity: &Entity,
    standing: &Standing,
    role: Role,
) -> Result<(), ApplyError> {
    let head = &standing.head;
    let seq = Seq(head.next_seq);
    let version = Version(head.version + 1);
    let (kind, moved) = match change.change() {
        Change::Remove => (EventKind::ParticipantRemoved, Some(true)),
        Change::Role => (EventKind::RoleChanged, None),
        _ => (EventKind::ParticipantAdded, Some(false)),
    };
    let event = MembershipEvent { kind, seq, version, subject: &change.user, role };
    let actor = change.actor.clone().unwrap_or_default();
    let mut header = event.header(call, &actor);
    header.client_id = client_id(change.client_key.as_ref());
    header.epoch = head.epoch;
    let record_bytes = call.append(entity, &header, (&[], 0));
    write_subject(call, change, entity, standing, role)?;
    let row = state::change::<ConversationRow>(call.rows, &entity.head())?;
    row.next_seq += 1;
    row.version = version.0;
    row.event_bytes += record_bytes as u64;
    let had = u32::from(standing.subject == Some(Role::Owner));
    let has = u32::from(role == Role::Owner && moved != Some(true));
    row.owners = (row.owners + has).saturating_sub(had);
    match moved {
        Some(true) => row.participants = row.participants.saturating_sub(1),
        Some(false) => row.participants += 1,
        None => {}
    }
    if let Some(removed) = moved {
        outbox(call, entity, seq, &change.user, removed);
    }
    Ok(())
}

fn write_subject<R: Rows>(
    call: &mut Call<'_, R>,
    change: &ChangeParticipant,
    entity: &Entity,
    standing: &Standing,
    role: Role,
) -> Result<(), ApplyError> {
    let key = entity.participant(command::text(&change.user));
    let seq = Seq(standing.head.next_seq);
    let joined = Stay { from: access::first_seen(&standing.head, &standing.stays, seq).0, to: 0 };
    if !standing.known {
        call.rows.put(key, ParticipantRow { role: role as i32, stays: vec![joined] }.into());
        return Ok(());
    }
    let row = state::change::<ParticipantRow>(call.rows, &key)?;
    row.role = role as i32;
    match change.change() {
        Change::Add => row.stays.push(joined),
        // The event of his removal is the last that he sees.
        Change::Remove => row.stays.iter_mut().rev().take(1).for_each(|stay| stay.to = seq.0),
        _ => {}
    }
    Ok(())
}

/// Drops the outbox items that the users' shards have heard of.
pub(crate) fn outbox_done<R: Rows>(call: &mut Call<'_, R>, done: &OutboxDone) -> Result<Outcome, ApplyError> {
    let entity = Entity::conversation(call.app(), call.target());
    for (&item, user) in done.item.iter().zip(&done.user) {
        call.rows.remove(&outbox_key(&entity, Seq(item), user));
    }
    Ok(Outcome::Done)
}
