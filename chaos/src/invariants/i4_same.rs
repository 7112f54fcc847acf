//! I4: every reader sees the same order and the same bytes, and they are the sender's. Must never ask who saw it first:
//! any difference is one.

use crate::oracle::{Case, Conversation, Violations};

pub(super) fn check(case: &Case<'_>, out: &mut Violations) {
    for (by, name, what) in &case.history.damaged {
        out.add(name, || format!("{by} got a damaged answer: {what}"));
    }
    for (name, conversation) in &case.conversations {
        differences(name, conversation, out);
        inventions(name, conversation, out);
    }
}

fn differences(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    for sighting in conversation.sightings() {
        let seq = sighting.event.seq;
        if let Some(other) = conversation.events.get(&seq).filter(|event| **event != sighting.event) {
            let by = sighting.by.map_or("the last reader".to_owned(), ToString::to_string);
            out.add(name, || format!("{by} saw at {seq} {:?}, others {other:?}", sighting.event));
        }
    }
}

/// Events with a content that nobody sent.
fn inventions(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    let sends = conversation.operations.iter().filter_map(|operation| {
        let message = operation.message()?;
        Some((&*operation.by.user, &*message.body))
    });
    let sent: std::collections::BTreeSet<(&str, &[u8])> = sends.collect();
    for ((sender, body), events) in conversation.by_content() {
        if !sent.contains(&(sender, body)) {
            out.add(name, || format!("nobody sent {:?}", events.first()));
        }
    }
}
