//! Send: where a message gets its `seq`, once, however often and through whomever it is sent. The hottest path of the
//! engine: three lookups, no allocation but row keys. Must never skip a number or answer a number in two ways.

use stentor_proto::{
    ids::{SendNo, Seq, StampMs, Version},
    internal::{ConversationRow, Send, SendResult, SendStateRow},
    reason::Reason,
    v1::{EventHeader, EventKind, Role},
};

use super::{accepted, client_id, head, role};
use crate::{
    access,
    apply::{ApplyError, Call},
    command,
    dedup::{
        client_id::{self as keys, Insert, Known},
        send_no::{self, Judged, Numbered},
    },
    effect::Outcome,
    key::Entity,
    rows::Rows,
    state,
};

/// What a send comes to, before anything is written.
enum Decision {
    Append { head: ConversationRow, insert: Option<Box<Insert>> },
    Repeat { seq: Seq, stamp: StampMs, version: Version },
    Refuse(Reason),
}

pub(crate) fn apply<R: Rows>(call: &mut Call<'_, R>, send: &Send) -> Result<Outcome, ApplyError> {
    let Some(actor) = &send.actor else { return Ok(Outcome::refused(Reason::Malformed)) };
    let entity = Entity::conversation(call.app(), call.target());
    let head_key = entity.head();
    let head = head(call, &head_key)?;
    let mut numbered = None;
    if send.send_no > 0 {
        let key = entity.send_state(command::text(&actor.user), command::text(&actor.device));
        let row = state::read::<SendStateRow>(call.rows, &key)?;
        let hash = send_no::hash(send, call.command.body_crc);
        match send_no::judge(row, send, hash)? {
            Judged::Fresh => {}
            Judged::First(result) => return Ok(repeated(&result, row.map_or(0, |r| r.last), head.as_ref())),
            Judged::Refused(reason) => {
                return Ok(Outcome::Refused { reason, last: SendNo(row.map_or(0, |r| r.last)) });
            }
        }
        numbered = Some(Numbered { key, exists: row.is_some(), hash });
    }
    let decision = decide(call, send, &entity, head)?;
    let outcome = match decision {
        Decision::Append { head, insert } => {
            let seq = append(call, send, &entity, &head_key, &head)?;
            if let Some(insert) = insert {
                insert.write(call, seq)?;
            }
            accepted(call, seq, head.version)
        }
        Decision::Repeat { seq, stamp, version } => Outcome::Accepted { seq, stamp, repeat: true, version },
        Decision::Refuse(reason) if numbered.is_some() => Outcome::Refused { reason, last: SendNo(send.send_no) },
        Decision::Refuse(reason) => Outcome::refused(reason),
    };
    if let Some(numbered) = numbered {
        numbered.consume(call.rows, send, &outcome)?;
    }
    Ok(outcome)
}

/// The first result of a number, told again.
fn repeated(result: &SendResult, last: u64, head: Option<&ConversationRow>) -> Outcome {
    if result.seq > 0 {
        return Outcome::Accepted {
            seq: Seq(result.seq),
            stamp: StampMs(result.stamp_ms),
            repeat: true,
            version: Version(head.map_or(0, |h| h.version)),
        };
    }
    let reason = Reason::from_number(result.reason).unwrap_or(Reason::Internal);
    Outcome::Refused { reason, last: SendNo(last) }
}

/// Everything that can be said before writing; every refusal here is final.
fn decide<R: Rows>(
    call: &mut Call<'_, R>,
    send: &Send,
    entity: &Entity,
    head: Option<ConversationRow>,
) -> Result<Decision, ApplyError> {
    let refuse = |reason| Ok(Decision::Refuse(reason));
    if send.refused != 0 {
        return refuse(Reason::from_number(send.refused).unwrap_or(Reason::Internal));
    }
    if let Err(reason) = command::content(send) {
        return refuse(reason);
    }
    let Some(head) = head else { return refuse(Reason::UnknownConversation) };
    // `shape` has seen it.
    let Some(actor) = &send.actor else { return refuse(Reason::Malformed) };
    let hash = if send.client_key.is_some() { keys::hash_of_send(send) } else { 0 };
    // Before permissions: the scope is the caller's own, and a retry after he was removed still has its first answer.
    let key = keys::find(call, entity, actor, send.client_key.as_ref(), hash)?;
    match key.known {
        Known::First { seq, stamp } => return Ok(Decision::Repeat { seq, stamp, version: Version(head.version) }),
        Known::Reused => return refuse(Reason::ClientIdReused),
        Known::Absent | Known::NoKey => {}
    }
    let role = role(call, &entity.participant(command::text(&actor.user)))?;
    if let Err(reason) = access::may_send(if actor.admin { Some(Role::Owner) } else { role }) {
        return refuse(reason);
    }
    if send.expect_version.is_some_and(|version| version != head.version) {
        return refuse(Reason::WrongVersion);
    }
    if send.expect_epoch.is_some_and(|epoch| epoch != head.epoch) {
        return refuse(Reason::WrongEpoch);
    }
    match keys::admit(call, entity, actor, key, hash)? {
        Ok(insert) => Ok(Decision::Append { head, insert }),
        Err(reason) => refuse(reason),
    }
}

fn append<R: Rows>(
    call: &mut Call<'_, R>,
    send: &Send,
    entity: &Entity,
    head_key: &crate::key::RowKey,
    head: &ConversationRow,
) -> Result<Seq, ApplyError> {
    let actor = send.actor.clone().unwrap_or_default();
    let kind = if send.kind() == EventKind::Unspecified { EventKind::Message } else { send.kind() };
    let header = EventHeader {
        seq: head.next_seq,
        kind: kind as i32,
        sender: actor.user,
        device: actor.device,
        send_no: send.send_no,
        client_id: client_id(send.client_key.as_ref()),
        content_type: send.content_type.clone(),
        sent_at_ms: send.sent_at_ms,
        stamp_ms: call.ctx.stamp.0,
        version: head.version,
        epoch: head.epoch,
        ..EventHeader::default()
    };
    let record_bytes = call.append(entity, &header, &send.body);
    let row = state::change::<ConversationRow>(call.rows, head_key)?;
    row.next_seq += 1;
    row.event_bytes += record_bytes as u64;
    Ok(Seq(header.seq))
}
