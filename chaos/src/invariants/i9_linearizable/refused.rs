//! What was refused because of who is a participant: there must be a place for it, within its interval, where that was
//! so. Places only ever have to grow with time, so the lowest that fits is the best for all that follow: no search.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
};

use stentor_client::{EventKind, Reason};

use super::{
    super::rising::{Falling, Rising},
    fixed::Fixed,
};
use crate::oracle::{Call, Conversation, Moment, Operation, Outcome, Violations};

/// Where a refusal is right.
#[derive(Debug, Clone, Copy)]
enum Right<'h> {
    /// Where one of these is no participant.
    Out(&'h str, Option<&'h str>),
    /// Where he is one.
    In(&'h str),
    /// Before the conversation was there.
    Nowhere,
}

pub(super) fn placed<'h>(name: &str, conversation: &Conversation<'h>, fixed: &[Fixed<'h>], out: &mut Violations) {
    let Some(last) = conversation.last else { return };
    let lowest: Rising = fixed.iter().filter_map(|f| Some((f.answered?, f.seq))).collect();
    let highest: Falling =
        fixed.iter().map(|f| (f.invoked, if f.is_read { f.seq } else { f.seq.saturating_sub(1) })).collect();
    let created = creation_end(conversation);
    // Those placed, by when they were answered.
    let mut answered = BinaryHeap::<Reverse<(Moment, u64)>>::new();
    let mut least = 0;
    for (operation, right) in refusals(conversation) {
        let interval = operation.interval;
        while let Some(Reverse((_, place))) = answered.peek().filter(|Reverse((at, _))| *at < interval.invoked).copied()
        {
            least = least.max(place);
            answered.pop();
        }
        // Those who came with the creation came with it at once, though each has a seq of his own.
        let from = match lowest.before(interval.invoked).max(least) {
            0 => 0,
            from => from.max(created),
        };
        let upto = interval.answered.map_or(u64::MAX, |at| highest.after(at)).min(last.head);
        match place(conversation, right, from).filter(|place| *place <= upto) {
            Some(place) => answered.extend(interval.answered.map(|at| Reverse((at, place)))),
            None => out.add(name, || {
                let Operation { by, call, outcome, .. } = operation;
                format!("{by}'s {call:?} got {outcome:?}, which is right nowhere from {from} to {upto}")
            }),
        }
    }
}

/// The last seq of what the creation made: itself, and who was there from the beginning.
fn creation_end(conversation: &Conversation<'_>) -> u64 {
    let Some(created) = conversation.events.get(&1) else { return 0 };
    let added = |operation: &Operation| matches!(operation.call, Call::Add(_));
    let later: BTreeSet<u64> = conversation.acknowledged().filter(|(o, ..)| added(o)).map(|(_, seq, _)| seq).collect();
    let together = conversation.events.values().skip(1).zip(2..).take_while(|(event, seq)| {
        let came_with_it = event.kind == EventKind::ParticipantAdded && event.stamp_ms == created.stamp_ms;
        event.seq == *seq && came_with_it && !later.contains(seq)
    });
    together.map(|(_, seq)| seq).last().unwrap_or(1)
}

/// The refusals that speak of membership, in the order in which they were invoked.
fn refusals<'h>(conversation: &Conversation<'h>) -> impl Iterator<Item = (&'h Operation, Right<'h>)> {
    conversation.operations.iter().filter_map(|&operation| {
        let Outcome::Refused(reason) = &operation.outcome else { return None };
        let actor = &*operation.by.user;
        let right = match (Reason::from_code(reason)?, &operation.call) {
            // A read that did not ask for it may answer from a little before.
            (_, Call::Read { linearizable: false, .. }) => return None,
            (Reason::UnknownConversation, _) => Right::Nowhere,
            (Reason::NotAParticipant, Call::Remove(user)) => Right::Out(actor, Some(user)),
            (Reason::NotAParticipant, _) => Right::Out(actor, None),
            (Reason::AlreadyParticipant, Call::Add(user)) => Right::In(user),
            _ => return None,
        };
        Some((operation, right))
    })
}

/// The lowest place from `from` on where the refusal is right.
fn place(conversation: &Conversation<'_>, right: Right<'_>, from: u64) -> Option<u64> {
    let membership = &conversation.membership;
    let out = |user: &str| match membership.stays(user).iter().find(|stay| stay.from <= from && from < stay.to) {
        None => Some(from),
        // His next stay begins behind his removal.
        Some(stay) => Some(stay.to).filter(|to| *to < u64::MAX),
    };
    match right {
        Right::Out(one, other) => [out(one), other.and_then(out)].into_iter().flatten().min(),
        Right::In(user) => {
            let stay = membership.stays(user).iter().find(|stay| from < stay.to)?;
            Some(stay.from.max(from))
        }
        Right::Nowhere => Some(0).filter(|_| from == 0),
    }
}
