//! I7: who lost access gets nothing that was applied after the loss, nor anything else that is not his. Must never judge
//! by when it was seen: the seq of a removal is what counts.

use crate::oracle::{Case, Violations};

pub(super) fn check(case: &Case<'_>, out: &mut Violations) {
    // Without the whole of a conversation nobody knows who was in it; `i1_lost` says so.
    for (name, conversation) in case.conversations.iter().filter(|(_, conversation)| conversation.last.is_some()) {
        for sighting in conversation.sightings() {
            let (Some(by), seq) = (sighting.by, sighting.event.seq) else { continue };
            let mut visible = conversation.membership.visible(&by.user);
            if !visible.any(|stay| (stay.from..=stay.to).contains(&seq)) {
                out.add(name, || format!("{by} saw {:?}, which is not for {}", sighting.event, by.user));
            }
        }
    }
}
