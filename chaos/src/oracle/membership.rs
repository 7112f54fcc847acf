//! Who was in a conversation from when to when, as its own events tell it. Must never be asked of a server: what the
//! events say is what counts.

use std::collections::BTreeMap;

use stentor_client::EventKind;

use super::{Event, Name};

/// A stretch in which a user was a participant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stay {
    /// The seq of his adding.
    pub from: u64,
    /// The seq of his removal; the greatest number while he is there.
    pub to: u64,
}

/// All stays of all users of a conversation.
#[derive(Debug, Clone, Default)]
pub struct Membership {
    stays: BTreeMap<Name, Vec<Stay>>,
    history_full: bool,
}

impl Membership {
    /// From a conversation's events, ascending.
    pub fn of<'e>(events: impl Iterator<Item = &'e Event>, history_full: bool) -> Self {
        let mut stays = BTreeMap::<Name, Vec<Stay>>::new();
        for event in events {
            match event.kind {
                EventKind::Created | EventKind::ParticipantAdded => {
                    // A creation is its maker's own joining.
                    let joins = if event.kind == EventKind::Created { &event.sender } else { &event.subject };
                    stays.entry(joins.clone()).or_default().push(Stay { from: event.seq, to: u64::MAX });
                }
                EventKind::ParticipantRemoved => {
                    let last = stays.get_mut(&event.subject).and_then(|stays| stays.last_mut());
                    last.into_iter().for_each(|stay| stay.to = event.seq);
                }
                _ => {}
            }
        }
        Self { stays, history_full }
    }

    /// Each time that the user was there, ascending.
    pub fn stays(&self, user: &str) -> &[Stay] {
        self.stays.get(user).map_or(&[], |stays| stays)
    }

    /// Whether the user is a participant once everything up to `seq`, and nothing else, has been applied.
    pub fn is_in(&self, user: &str, seq: u64) -> bool {
        self.stays(user).iter().any(|stay| stay.from <= seq && seq < stay.to)
    }

    /// What the user may see, ascending: from each adding to the removal that followed, both included. The first one
    /// begins at 1 where history is shown in full.
    pub fn visible(&self, user: &str) -> impl Iterator<Item = Stay> {
        let from_the_first = self.history_full;
        let first = move |(at, stay): (usize, &Stay)| match at {
            0 if from_the_first => Stay { from: 1, to: stay.to },
            _ => *stay,
        };
        self.stays(user).iter().enumerate().map(first)
    }
}
