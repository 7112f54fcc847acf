//! I10: the events of one device in one conversation have `seq` in the order in which it sent them. Must never count a
//! message with several attempts: which of them became the event is not for the client to know.

use std::collections::BTreeMap;

use crate::oracle::{Case, Conversation, Device, Operation, Violations};

pub(super) fn check(case: &Case<'_>, out: &mut Violations) {
    for (name, conversation) in &case.conversations {
        let mut highest = BTreeMap::<&Device, (u64, &Operation)>::new();
        for (operation, seq) in sent(conversation) {
            let earlier = highest.entry(&operation.by).or_insert((0, operation));
            if seq <= earlier.0 {
                out.add(name, || {
                    let (by, first) = (&operation.by, earlier.1.message());
                    format!("{by} sent {first:?} before {:?}; they are {} and {seq}", operation.message(), earlier.0)
                });
            }
            if seq > earlier.0 {
                *earlier = (seq, operation);
            }
        }
    }
}

/// Sends that became events, acknowledged or not, in the order in which they were sent.
fn sent<'h>(conversation: &Conversation<'h>) -> impl Iterator<Item = (&'h Operation, u64)> {
    let events = conversation.by_content();
    let mut single: Vec<_> =
        conversation.messages().into_values().filter(|a| a.len() == 1).filter_map(|a| a.first().copied()).collect();
    single.sort_by_key(|operation| operation.interval.invoked);
    single.into_iter().filter_map(move |operation| {
        let found = || {
            let message = operation.message()?;
            let events = events.get(&(&*operation.by.user, &*message.body))?;
            Some(events.first()?.seq)
        };
        let seq = operation.event().map(|(seq, _)| seq).or_else(found)?;
        Some((operation, seq))
    })
}
