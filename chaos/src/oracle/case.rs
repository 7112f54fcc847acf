//! A history sorted by conversation, with what its readers saw put together. Must never hide a contradiction: where two
//! readers saw different events under one seq, the first stands here and `i4_same` compares all with it.

use std::collections::BTreeMap;

use super::{Call, Device, Event, Final, History, Item, Membership, Name, Operation, Page, Stream};

/// A history, ready to be judged.
#[derive(Debug)]
pub struct Case<'h> {
    /// All of it.
    pub history: &'h History,
    /// By name.
    pub conversations: BTreeMap<&'h str, Conversation<'h>>,
}

/// What is known of one conversation.
#[derive(Debug, Default)]
pub struct Conversation<'h> {
    /// Its operations, in the order in which they were invoked.
    pub operations: Vec<&'h Operation>,
    /// Its streams.
    pub streams: Vec<&'h Stream>,
    /// What it was in the end.
    pub last: Option<&'h Final>,
    /// Every event that anybody saw, by seq; as it was in the end, if it was read then.
    pub events: BTreeMap<u64, &'h Event>,
    /// Who was in it.
    pub membership: Membership,
}

/// An event, and who saw it how.
#[derive(Debug, Clone, Copy)]
pub struct Sighting<'h> {
    /// Who; `None` for the one who read all of it in the end.
    pub by: Option<&'h Device>,
    /// What he saw.
    pub event: &'h Event,
}

impl<'h> Case<'h> {
    /// Sorts a history.
    pub fn new(history: &'h History) -> Self {
        let mut conversations = BTreeMap::<&str, Conversation<'h>>::new();
        for operation in &history.operations {
            conversations.entry(&operation.conversation).or_default().operations.push(operation);
        }
        for stream in &history.streams {
            conversations.entry(&stream.conversation).or_default().streams.push(stream);
        }
        for last in &history.finals {
            conversations.entry(&last.conversation).or_default().last = Some(last);
        }
        conversations.values_mut().for_each(Conversation::put_together);
        Self { history, conversations }
    }
}

impl<'h> Conversation<'h> {
    fn put_together(&mut self) {
        let seen: Vec<_> = self.sightings().collect();
        for sighting in seen {
            self.events.entry(sighting.event.seq).or_insert(sighting.event);
        }
        let full = |operation: &&Operation| operation.call == Call::Create { history_full: true };
        let history_full = self.operations.iter().any(full);
        self.membership = Membership::of(self.events.values().copied(), history_full);
    }

    /// Every event that somebody saw, those of the end first.
    pub fn sightings(&self) -> impl Iterator<Item = Sighting<'h>> {
        let last = self.last.into_iter().flat_map(|last| &last.items).map(|item| (None, item));
        let read = self.pages().flat_map(|(operation, page)| page.items.iter().map(|item| (Some(&operation.by), item)));
        let streamed = self.streams.iter().flat_map(|s| s.items.iter().map(|(_, item)| (Some(&s.by), item)));
        last.chain(read).chain(streamed).filter_map(|(by, item)| match item {
            Item::Event(event) => Some(Sighting { by, event }),
            Item::Hidden { .. } => None,
        })
    }

    /// Reads that were answered.
    pub fn pages(&self) -> impl Iterator<Item = (&'h Operation, &'h Page)> {
        self.operations.iter().filter_map(|&operation| Some((operation, operation.page()?)))
    }

    /// What was acknowledged to become an event: the operation, its seq, and whether that was an earlier attempt's.
    pub fn acknowledged(&self) -> impl Iterator<Item = (&'h Operation, u64, bool)> {
        self.operations.iter().filter_map(|&operation| {
            let (seq, repeat) = operation.event()?;
            Some((operation, seq, repeat))
        })
    }

    /// A user's messages by their identity: attempts with one key are one message, in the order of the attempts.
    pub fn messages(&self) -> BTreeMap<(&'h str, MessageKey<'h>), Vec<&'h Operation>> {
        let mut messages = BTreeMap::<_, Vec<&'h Operation>>::new();
        for &operation in &self.operations {
            let Some(message) = operation.message() else { continue };
            let key = match &message.client_id {
                Some(id) => MessageKey::ClientId(id),
                None => MessageKey::Body(&message.body),
            };
            messages.entry((&*operation.by.user, key)).or_default().push(operation);
        }
        messages
    }

    /// The event that a message became, wherever it stands: by its sender and content.
    pub fn by_content(&self) -> BTreeMap<(&'h str, &'h [u8]), Vec<&'h Event>> {
        let mut found = BTreeMap::<_, Vec<&'h Event>>::new();
        for &event in self.events.values().filter(|event| !event.body.is_empty()) {
            found.entry((&*event.sender, &*event.body)).or_default().push(event);
        }
        found
    }
}

/// What makes a message the same message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum MessageKey<'h> {
    /// The caller's own key.
    ClientId(&'h Name),
    /// Its content, which is its own.
    Body(&'h [u8]),
}
