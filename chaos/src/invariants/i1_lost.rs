//! I1: an acknowledged event is never lost. Must never be satisfied with what was seen on the way: it counts what stood
//! in the end.

use stentor_client::EventKind;

use crate::oracle::{Call, Case, Conversation, Event, Operation, Violations};

pub(super) fn check(case: &Case<'_>, out: &mut Violations) {
    for (name, conversation) in &case.conversations {
        let Some(last) = conversation.last else {
            if conversation.acknowledged().next().is_some() || conversation.sightings().next().is_some() {
                out.add(name, || "nobody read it in the end, so nothing can be said of what was acknowledged".into());
            }
            continue;
        };
        lost(name, conversation, last.head, out);
    }
}

fn lost(name: &str, conversation: &Conversation<'_>, head: u64, out: &mut Violations) {
    let last = Conversation { last: conversation.last, ..Conversation::default() };
    let stood: std::collections::BTreeMap<u64, &Event> = last.sightings().map(|s| (s.event.seq, s.event)).collect();
    for (operation, seq, _) in conversation.acknowledged() {
        match stood.get(&seq) {
            None => out.add(name, || {
                format!(
                    "{}'s {:?} was acknowledged as {seq}; in the end (head {head}) it is not there",
                    operation.by, operation.call
                )
            }),
            Some(event) if !is_it(operation, event) => out.add(name, || {
                format!(
                    "{}'s {:?} was acknowledged as {seq}; in the end that is {event:?}",
                    operation.by, operation.call
                )
            }),
            Some(_) => {}
        }
    }
}

/// Whether the event is what the operation asked for.
fn is_it(operation: &Operation, event: &Event) -> bool {
    let by_him = event.sender == operation.by.user;
    by_him
        && match &operation.call {
            Call::Create { .. } => event.kind == EventKind::Created,
            Call::Send(message) => {
                event.body == message.body && message.client_id.as_ref().is_none_or(|id| *id == event.client_id)
            }
            Call::Add(user) => event.kind == EventKind::ParticipantAdded && event.subject == *user,
            Call::Remove(user) => event.kind == EventKind::ParticipantRemoved && event.subject == *user,
            Call::Read { .. } => false,
        }
}
