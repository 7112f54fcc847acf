//! I9: a conversation is linearizable: appends, reads that ask for it, membership. Since `seq` is the total order, there
//! is no search: an append stands at its seq, a read just behind its head, and only what was refused has to be placed.
//! Must never count a read that did not ask for it, nor an unknown outcome as one that did not happen.

mod fixed;
mod refused;

use crate::oracle::Case;

pub(super) fn check(case: &Case<'_>, out: &mut crate::oracle::Violations) {
    for (name, conversation) in &case.conversations {
        let fixed = fixed::of(conversation);
        fixed::in_order(name, &fixed, out);
        fixed::allowed(name, conversation, out);
        fixed::not_refused(name, conversation, out);
        refused::placed(name, conversation, &fixed, out);
    }
}
