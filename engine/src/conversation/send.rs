//! Send: where a message gets its `seq`, once, however often and through whomever it is sent. The hottest path of the
//! engine: three lookups, no allocation but row keys. Must never skip a number or answer a number in two ways.

use bytes::Bytes;
use stentor_proto::{
    ids::{SendNo, Seq, StampMs, Version},
    internal::{Actor, ConversationRow, RunItem, Send, SendResult, SendRun, SendStateRow},
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
        send_no::{self, Claim, Judged, State},
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
        let claim = Claim::of(send, call.command.body_crc);
        if let Some(answered) = answered(row, 0, &claim, head.as_ref())? {
            return Ok(answered);
        }
        numbered = Some((State { exists: row.is_some(), key }, claim));
    }
    let decision = decide(call, send, &entity, head)?;
    let outcome = match decision {
        Decision::Append { head, insert } => {
            let event = Event {
                actor,
                send_no: send.send_no,
                client_id: client_id(send.client_key.as_ref()),
                kind: send.kind(),
                content_type: &send.content_type,
                sent_at_ms: send.sent_at_ms,
                body: (&send.body, call.command.body_crc),
            };
            let bytes = event.append(call, &entity, &head);
            let row = state::change::<ConversationRow>(call.rows, &head_key)?;
            row.next_seq += 1;
            row.event_bytes += bytes as u64;
            let seq = Seq(head.next_seq);
            if let Some(insert) = insert {
                insert.write(call, seq)?;
            }
            accepted(call, seq, head.version)
        }
        Decision::Repeat { seq, stamp, version } => Outcome::Accepted { seq, stamp, repeat: true, version },
        Decision::Refuse(reason) if numbered.is_some() => Outcome::Refused { reason, last: SendNo(send.send_no) },
        Decision::Refuse(reason) => Outcome::refused(reason),
    };
    if let Some((state, claim)) = numbered {
        state.consume(call.rows, call.ctx, &claim, [claim.result(&outcome)])?;
    }
    Ok(outcome)
}

/// A run of sends: each is judged and decided as if it had come alone, in order. Pushes an outcome for each.
pub(crate) fn apply_run<R: Rows>(
    call: &mut Call<'_, R>,
    run: &SendRun,
    outcomes: &mut Vec<Outcome>,
) -> Result<(), ApplyError> {
    // `shape` has seen the actor.
    let actor = &run.actor.clone().unwrap_or_default();
    let user = command::text(&actor.user);
    let entity = Entity::conversation(call.app(), call.target());
    let head_key = entity.head();
    let mut head = head(call, &head_key)?;
    let role = if actor.admin { Some(Role::Owner) } else { role(call, &entity.participant(user))? };
    let key = entity.send_state(user, command::text(&actor.device));
    let row = state::read::<SendStateRow>(call.rows, &key)?;
    let state = State { exists: row.is_some(), key };
    // From here on nothing is read, so that what is written stays.
    let first = outcomes.len();
    let mut fresh = Vec::with_capacity(run.items.len());
    for (place, item) in run.items.iter().enumerate() {
        let claim = Claim::of_item(run, place, item);
        match answered(row, fresh.len() as u64, &claim, head.as_ref())? {
            Some(answered) => outcomes.push(answered),
            None => {
                fresh.push((place, claim));
                // Its place, until it is decided.
                outcomes.push(Outcome::Done);
            }
        }
    }
    let (mut results, mut event_bytes) = (Vec::with_capacity(fresh.len()), 0);
    for (place, claim) in &fresh {
        let Some(item) = run.items.get(*place) else { continue };
        let outcome = match decide_item(item, head.as_mut(), role) {
            Ok(head) => {
                let event = Event {
                    actor,
                    send_no: claim.send_no,
                    client_id: Bytes::new(),
                    kind: item.kind(),
                    content_type: &item.content_type,
                    sent_at_ms: item.sent_at_ms,
                    body: (&item.body, item.body_crc),
                };
                event_bytes += event.append(call, &entity, head) as u64;
                head.next_seq += 1;
                accepted(call, Seq(head.next_seq - 1), head.version)
            }
            Err(reason) => Outcome::Refused { reason, last: SendNo(claim.send_no) },
        };
        results.push(claim.result(&outcome));
        if let Some(at) = outcomes.get_mut(first + place) {
            *at = outcome;
        }
    }
    if let Some(head) = head.filter(|_| event_bytes > 0) {
        let row = state::change::<ConversationRow>(call.rows, &head_key)?;
        row.next_seq = head.next_seq;
        row.event_bytes += event_bytes;
    }
    match fresh.last() {
        Some((_, last)) => state.consume(call.rows, call.ctx, last, results),
        None => Ok(()),
    }
}

/// What [`decide`] says of a send that has neither client key nor preconditions.
fn decide_item<'h>(
    item: &RunItem,
    head: Option<&'h mut ConversationRow>,
    role: Option<Role>,
) -> Result<&'h mut ConversationRow, Reason> {
    if item.refused != 0 {
        return Err(Reason::from_number(item.refused).unwrap_or(Reason::Internal));
    }
    command::content_of_item(item)?;
    let head = head.ok_or(Reason::UnknownConversation)?;
    access::may_send(role).map(|()| head)
}

/// The answer to a number that is not fresh.
fn answered(
    row: Option<&SendStateRow>,
    fresh: u64,
    claim: &Claim,
    head: Option<&ConversationRow>,
) -> Result<Option<Outcome>, ApplyError> {
    let last = row.map_or(0, |r| r.last) + fresh;
    Ok(match send_no::judge(row, fresh, claim)? {
        Judged::Fresh => None,
        Judged::First(result) => Some(repeated(&result, last, head)),
        Judged::Refused(reason) => Some(Outcome::Refused { reason, last: SendNo(last) }),
    })
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

/// What becomes an event.
struct Event<'a> {
    actor: &'a Actor,
    send_no: u64,
    client_id: Bytes,
    kind: EventKind,
    content_type: &'a Bytes,
    sent_at_ms: u64,
    /// With its CRC32.
    body: (&'a [u8], u32),
}

impl Event<'_> {
    /// Appends it under the head's next seq; the head's row is the caller's to change. Returns the record's length.
    fn append<R: Rows>(self, call: &mut Call<'_, R>, entity: &Entity, head: &ConversationRow) -> usize {
        let kind = if self.kind == EventKind::Unspecified { EventKind::Message } else { self.kind };
        let header = EventHeader {
            seq: head.next_seq,
            kind: kind as i32,
            sender: self.actor.user.clone(),
            device: self.actor.device.clone(),
            send_no: self.send_no,
            client_id: self.client_id,
            content_type: self.content_type.clone(),
            sent_at_ms: self.sent_at_ms,
            stamp_ms: call.ctx.stamp.0,
            version: head.version,
            epoch: head.epoch,
            ..EventHeader::default()
        };
        call.append(entity, &header, self.body)
    }
}
