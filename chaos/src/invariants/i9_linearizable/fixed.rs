//! What has its place by its seq: appends and linearizable reads. Their order must not contradict the order in which
//! clients saw them happen. Must never fail to see a contradiction of any two: one sweep compares all pairs.

use stentor_client::Reason;

use crate::oracle::{Call, Conversation, Moment, Operation, Outcome, Violations};

/// An operation with its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fixed<'h> {
    /// The one that is told of.
    pub(super) operation: &'h Operation,
    /// The seq of what it appended, or the head that it read.
    pub(super) seq: u64,
    /// A read stands behind everything up to its head.
    pub(super) is_read: bool,
    pub(super) invoked: Moment,
    /// `None` for an unknown outcome: it has happened, nobody knows when.
    pub(super) answered: Option<Moment>,
}

impl Fixed<'_> {
    fn place(&self) -> (u64, bool) {
        (self.seq, self.is_read)
    }
}

/// Everything that has a place.
pub(super) fn of<'h>(conversation: &Conversation<'h>) -> Vec<Fixed<'h>> {
    let mut fixed = messages(conversation);
    for &operation in &conversation.operations {
        let is_change = matches!(operation.call, Call::Create { .. } | Call::Add(_) | Call::Remove(_));
        let linearizable = matches!(operation.call, Call::Read { linearizable: true, .. });
        let (seq, is_read) = match (operation.event(), operation.page()) {
            (Some((seq, false)), _) if is_change => (seq, false),
            (_, Some(page)) if linearizable => (page.head, true),
            _ => continue,
        };
        let (invoked, answered) = (operation.interval.invoked, operation.answered());
        fixed.push(Fixed { operation, seq, is_read, invoked, answered });
    }
    fixed
}

/// A message happened between its first attempt and the first acknowledgement of any.
fn messages<'h>(conversation: &Conversation<'h>) -> Vec<Fixed<'h>> {
    let events = conversation.by_content();
    let messages = conversation.messages().into_values();
    let placed = messages.filter_map(|attempts| {
        let operation = *attempts.first()?;
        let acknowledged = attempts.iter().filter_map(|a| Some((a.answered()?, a.event()?.0))).min();
        let found = || Some(events.get(&(&*operation.by.user, &*operation.message()?.body))?.first()?.seq);
        let seq = acknowledged.map(|(_, seq)| seq).or_else(found)?;
        let (invoked, answered) = (operation.interval.invoked, acknowledged.map(|(at, _)| at));
        Some(Fixed { operation, seq, is_read: false, invoked, answered })
    });
    placed.collect()
}

/// Nothing stands before what had been answered when it was invoked.
pub(super) fn in_order(name: &str, fixed: &[Fixed<'_>], out: &mut Violations) {
    let mut descending: Vec<&Fixed<'_>> = fixed.iter().collect();
    descending.sort_by_key(|f| std::cmp::Reverse(f.place()));
    let mut first_behind: Option<(Moment, &Fixed<'_>)> = None;
    for group in descending.chunk_by(|a, b| a.place() == b.place()) {
        for here in group {
            let Some((answered, behind)) = first_behind.filter(|(answered, _)| *answered < here.invoked) else {
                continue;
            };
            out.add(name, || {
                let (late, early) = (describe(here), describe(behind));
                format!("{late} was invoked at {} after {early} was answered at {}", here.invoked.0, answered.0)
            });
        }
        let earliest = group.iter().filter_map(|f| Some((f.answered?, *f))).min_by_key(|(answered, _)| *answered);
        first_behind = [first_behind, earliest].into_iter().flatten().min_by_key(|(answered, _)| *answered);
    }
}

fn describe(fixed: &Fixed<'_>) -> String {
    let by = &fixed.operation.by;
    match fixed.is_read {
        true => format!("{by}'s linearizable read of everything up to {}", fixed.seq),
        false => format!("{by}'s {:?} at {}", fixed.operation.call, fixed.seq),
    }
}

/// Who acted was a participant where it stands. Only what was read in the end says who was.
pub(super) fn allowed(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    if conversation.last.is_none() {
        return;
    }
    for &operation in &conversation.operations {
        let at = match (&operation.call, operation.event(), operation.page()) {
            (Call::Create { .. }, ..) => continue,
            // A repeat says what was, not what may be done now.
            (_, Some((seq, false)), _) => seq.saturating_sub(1),
            (Call::Read { linearizable: true, .. }, _, Some(page)) => page.head,
            _ => continue,
        };
        let by = &operation.by;
        if !conversation.membership.is_in(&by.user, at) {
            out.add(name, || {
                format!("{by}'s {:?} was carried out behind {at}, where {} is no participant", operation.call, by.user)
            });
        }
    }
}

/// What was refused has not happened.
pub(super) fn not_refused(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    let events = conversation.by_content();
    for ((user, _), attempts) in conversation.messages() {
        // A key that was used with another body is refused, and the first stays: that event is not this attempt's.
        let reused = |reason: &str| Reason::from_code(reason) == Some(Reason::ClientIdReused);
        let refused = |a: &&Operation| matches!(&a.outcome, Outcome::Refused(reason) if !reused(reason));
        if !attempts.iter().all(refused) {
            continue;
        }
        let bodies = attempts.iter().filter_map(|attempt| attempt.message());
        let found = bodies.filter_map(|message| events.get(&(user, &*message.body))?.first().copied());
        found.take(1).for_each(|event| {
            out.add(name, || format!("{user}'s send was refused, and it is {event:?}"));
        });
    }
}
