//! I2: `seq` is dense and grows: no gap, no repeat, per conversation; and a stretch is hidden from those only who may
//! not see it. Must never look at what an event says: `i4_same` does.

use std::collections::BTreeMap;

use crate::oracle::{Call, Case, Conversation, Item, Operation, Start, Violations};

pub(super) fn check(case: &Case<'_>, out: &mut Violations) {
    for (name, conversation) in &case.conversations {
        final_read(name, conversation, out);
        pages(name, conversation, out);
        streams(name, conversation, out);
        given_twice(name, conversation, out);
    }
}

fn final_read(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    let Some(last) = conversation.last else { return };
    match follow(last.items.iter(), Some(0)) {
        Err(what) => out.add(name, || format!("read in the end: {what}")),
        Ok(end) if end != last.head => out.add(name, || format!("read in the end: {end} of {} events", last.head)),
        Ok(_) => {}
    }
}

fn pages(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    for (operation, page) in conversation.pages() {
        let Call::Read { after, .. } = operation.call else { continue };
        let by = &operation.by;
        match follow(page.items.iter(), after) {
            Err(what) => out.add(name, || format!("a page that {by} read: {what}")),
            Ok(end) if !page.more && after.is_some_and(|after| after < page.head) && end != page.head => {
                out.add(name, || {
                    format!("a page that {by} read ends at {end} of {} and says that it is all", page.head)
                });
            }
            Ok(_) => {}
        }
        hidden(name, conversation, &by.user, page.items.iter(), out);
    }
}

fn streams(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    for stream in &conversation.streams {
        let after = match stream.start {
            Start::After(seq) => Some(seq),
            Start::Head => None,
        };
        let items = || stream.items.iter().map(|(_, item)| item);
        if let Err(what) = follow(items(), after) {
            out.add(name, || format!("a stream of {}: {what}", stream.by));
        }
        hidden(name, conversation, &stream.by.user, items(), out);
    }
}

/// The last seq of items that follow each other, from after `after` if that is known.
fn follow<'i>(items: impl Iterator<Item = &'i Item>, after: Option<u64>) -> Result<u64, String> {
    let mut last = after;
    for item in items {
        let (from, to) = item.span();
        if from == 0 || to < from {
            return Err(format!("{from} to {to} is no stretch"));
        }
        if let Some(last) = last.filter(|last| last.checked_add(1) != Some(from)) {
            return Err(format!("{from} follows {last}"));
        }
        last = Some(to);
    }
    Ok(last.unwrap_or(0))
}

/// What is hidden from a user is not what he may see. Only what was read in the end says who that is.
fn hidden<'i>(
    name: &str,
    conversation: &Conversation<'_>,
    user: &str,
    items: impl Iterator<Item = &'i Item>,
    out: &mut Violations,
) {
    let Some(last) = conversation.last else { return };
    for item in items {
        let Item::Hidden { from, to } = item else { continue };
        let (from, to) = (*from, (*to).min(last.head));
        let mut visible = conversation.membership.visible(user);
        if let Some(stay) = visible.find(|stay| stay.from <= to && from <= stay.to) {
            out.add(name, || {
                let upto = stay.to.min(last.head);
                format!("{from} to {to} was hidden from {user}, who may see {} to {upto}", stay.from)
            });
        }
    }
}

fn given_twice(name: &str, conversation: &Conversation<'_>, out: &mut Violations) {
    let mut given = BTreeMap::<u64, &Operation>::new();
    for (operation, seq, _) in conversation.acknowledged() {
        let first = *given.entry(seq).or_insert(operation);
        if !std::ptr::eq(first, operation) && !is_same(first, operation) {
            out.add(name, || {
                format!(
                    "{seq} was given to {}'s {:?} and to {}'s {:?}",
                    first.by, first.call, operation.by, operation.call
                )
            });
        }
    }
}

/// Whether two operations are attempts of one.
fn is_same(one: &Operation, other: &Operation) -> bool {
    let key = |operation: &Operation| operation.message().and_then(|message| message.client_id.clone());
    one.by.user == other.by.user && key(one).is_some() && key(one) == key(other)
}
