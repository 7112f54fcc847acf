//! I6: a device reads its own acknowledged writes, by whatever kind of read. Must never ask more of it: what others
//! wrote may be unknown to a read that is not linearizable.

use std::collections::BTreeMap;

use super::rising::Rising;
use crate::oracle::{Case, Conversation, Device, Moment, Violations};

pub(super) fn check(case: &Case<'_>, out: &mut Violations) {
    for (name, conversation) in &case.conversations {
        let own = acknowledged(conversation);
        for (operation, page) in conversation.pages() {
            let written = own.get(&operation.by).map_or(0, |own| own.before(operation.interval.invoked));
            if page.head < written {
                out.add(name, || {
                    format!("{} had {written} acknowledged, then read up to {} only", operation.by, page.head)
                });
            }
        }
    }
}

/// By device: when it knew of which own seq.
fn acknowledged<'h>(conversation: &Conversation<'h>) -> BTreeMap<&'h Device, Rising> {
    let mut own = BTreeMap::<&Device, Vec<(Moment, u64)>>::new();
    for (operation, seq, _) in conversation.acknowledged() {
        if let Some(answered) = operation.answered() {
            own.entry(&operation.by).or_default().push((answered, seq));
        }
    }
    own.into_iter().map(|(device, points)| (device, points.into_iter().collect())).collect()
}
