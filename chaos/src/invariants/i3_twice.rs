//! I3: one `seq` per send, however often it is retried. Must never take two attempts under one key for two messages.

use std::collections::{BTreeMap, BTreeSet};

use stentor_client::EventKind;

use crate::oracle::{Case, Conversation, Event, Violations};

pub(super) fn check(case: &Case<'_>, out: &mut Violations) {
    for (name, conversation) in &case.conversations {
        answers(name, conversation, out);
        events(name, conversation, out);
    }
}

/// Attempts of one message that were told different seqs.
fn answers(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    for ((user, key), attempts) in conversation.messages() {
        let seqs: BTreeSet<u64> = attempts.iter().filter_map(|attempt| Some(attempt.event()?.0)).collect();
        if seqs.len() > 1 {
            out.add(name, || format!("attempts of {user}'s message {key:?} were acknowledged as {seqs:?}"));
        }
    }
}

/// One message as two events, by its sender's key or by its content.
fn events(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    let said = |event: &&Event| matches!(event.kind, EventKind::Message | EventKind::Action);
    let mut by_key = BTreeMap::<(&str, &str), u64>::new();
    let mut by_body = BTreeMap::<(&str, &[u8]), u64>::new();
    for event in conversation.events.values().copied().filter(said) {
        let sender = &*event.sender;
        let earlier = by_body.insert((sender, &event.body), event.seq);
        let same_key = Some(&*event.client_id).filter(|id| !id.is_empty());
        let earlier = same_key.and_then(|id| by_key.insert((sender, id), event.seq)).or(earlier);
        if let Some(first) = earlier {
            out.add(name, || format!("{sender}'s message stands at {first} and again at {}: {event:?}", event.seq));
        }
    }
}
