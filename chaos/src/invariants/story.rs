//! A conversation as it should be, for the tests of the invariants: operations are invoked, take effect at one point, and
//! are answered or not, in any interleaving. Must never be cleverer than that: it is what histories are held against.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use stentor_client::EventKind;

use crate::oracle::{
    Answer, Call, CursorMove, CursorSeen, Device, Event, Final, History, Interval, Item, Membership, Message, Moment,
    Name, Operation, Outcome, Page, Start, Stream,
};

/// What happened in the conversation so far, and what clients saw of it.
pub(super) struct Story {
    pub(super) history: History,
    conversation: Name,
    history_full: bool,
    events: Vec<Event>,
    now: u64,
    /// What took effect and has not been answered.
    effects: BTreeMap<usize, Outcome<Answer>>,
    /// Device and key to seq.
    keys: BTreeMap<(Name, Name), u64>,
    /// The server's cursors: of devices and of users.
    delivered: BTreeMap<Device, u64>,
    read: BTreeMap<Name, u64>,
}

impl Story {
    /// A group that its owner made with others.
    pub(super) fn new(owner: &Device, others: &[&str], history_full: bool) -> Self {
        let mut story = Self {
            history: History::default(),
            conversation: "c".into(),
            history_full,
            events: Vec::new(),
            now: 0,
            effects: BTreeMap::new(),
            keys: BTreeMap::new(),
            delivered: BTreeMap::new(),
            read: BTreeMap::new(),
        };
        let create = story.invoke(owner, Call::Create { history_full });
        story.event(owner, EventKind::Created, &owner.user, Bytes::new(), None);
        others.iter().for_each(|user| {
            story.event(owner, EventKind::ParticipantAdded, &Arc::from(*user), Bytes::new(), None);
        });
        story.effects.insert(create, Outcome::Acknowledged(Answer::Event { seq: 1, repeat: false }));
        story.answer(create);
        story
    }

    pub(super) fn moment(&mut self) -> Moment {
        self.now += 1;
        Moment(self.now)
    }

    pub(super) fn head(&self) -> u64 {
        self.events.len() as u64
    }

    fn membership(&self) -> Membership {
        Membership::of(self.events.iter(), self.history_full)
    }

    pub(super) fn is_in(&self, user: &str) -> bool {
        self.membership().is_in(user, self.head())
    }

    fn event(&mut self, by: &Device, kind: EventKind, subject: &Name, body: Bytes, key: Option<&Name>) -> u64 {
        let seq = self.head() + 1;
        self.events.push(Event {
            seq,
            kind,
            sender: Arc::clone(&by.user),
            device: Arc::clone(&by.name),
            client_id: key.cloned().unwrap_or_else(|| format!("{}-{seq}", by.name).into()),
            subject: Arc::clone(subject),
            body,
            stamp_ms: self.now,
        });
        seq
    }

    /// A client asks; nothing happens yet.
    pub(super) fn invoke(&mut self, by: &Device, call: Call) -> usize {
        let interval = Interval { invoked: self.moment(), answered: None };
        let (by, conversation) = (by.clone(), Arc::clone(&self.conversation));
        self.history.operations.push(Operation { by, conversation, interval, call, outcome: Outcome::Unknown });
        self.history.operations.len() - 1
    }

    /// The operation takes effect, here and now.
    pub(super) fn apply(&mut self, id: usize) {
        let Operation { by, call, .. } = self.history.operations[id].clone();
        let effect = self.effect(&by, &call);
        self.effects.insert(id, effect);
    }

    fn effect(&mut self, by: &Device, call: &Call) -> Outcome<Answer> {
        let refused = |reason: &str| Outcome::Refused(reason.into());
        let key = match call {
            Call::Send(message) => message.client_id.clone().map(|id| (Arc::clone(&by.user), id)),
            _ => None,
        };
        if let Some(&seq) = key.as_ref().and_then(|key| self.keys.get(key)) {
            return Outcome::Acknowledged(Answer::Event { seq, repeat: true });
        }
        if !self.is_in(&by.user) {
            return refused("NOT_A_PARTICIPANT");
        }
        let nobody: Name = "".into();
        let seq = match call {
            Call::Create { .. } => return refused("ALREADY_EXISTS"),
            Call::Send(message) => {
                self.event(by, EventKind::Message, &nobody, message.body.clone(), message.client_id.as_ref())
            }
            Call::Add(user) if self.is_in(user) => return refused("ALREADY_PARTICIPANT"),
            Call::Add(user) => self.event(by, EventKind::ParticipantAdded, user, Bytes::new(), None),
            Call::Remove(user) if !self.is_in(user) => return refused("NOT_A_PARTICIPANT"),
            Call::Remove(user) => self.event(by, EventKind::ParticipantRemoved, user, Bytes::new(), None),
            Call::Read { after, .. } => {
                let (items, head) = (self.items(&by.user, after.unwrap_or(0)), self.head());
                return Outcome::Acknowledged(Answer::Page(Page { items, head, more: false }));
            }
        };
        key.into_iter().for_each(|key| {
            self.keys.insert(key, seq);
        });
        Outcome::Acknowledged(Answer::Event { seq, repeat: false })
    }

    /// Everything from after a seq on, as one user sees it; he ends with his last stay.
    pub(super) fn items(&self, user: &str, after: u64) -> Vec<Item> {
        let stays: Vec<_> = self.membership().visible(user).collect();
        let upto = stays.last().map_or(0, |stay| stay.to).min(self.head());
        let mut items: Vec<Item> = Vec::new();
        for seq in after + 1..=upto {
            let shown = stays.iter().any(|stay| (stay.from..=stay.to).contains(&seq));
            match (shown, items.last_mut()) {
                (true, _) => items.push(Item::Event(self.events[seq as usize - 1].clone())),
                (false, Some(Item::Hidden { to, .. })) => *to = seq,
                (false, _) => items.push(Item::Hidden { from: seq, to: seq }),
            }
        }
        items
    }

    /// The client hears what became of it.
    pub(super) fn answer(&mut self, id: usize) {
        let now = self.moment();
        if let Some(outcome) = self.effects.remove(&id) {
            self.history.operations[id].interval.answered = Some(now);
            self.history.operations[id].outcome = outcome;
        }
    }

    /// Whether it took effect without an answer so far.
    pub(super) fn is_applied(&self, id: usize) -> bool {
        self.effects.contains_key(&id)
    }

    /// All at once.
    pub(super) fn done(&mut self, by: &Device, call: Call) -> usize {
        let id = self.invoke(by, call);
        self.apply(id);
        self.answer(id);
        id
    }

    pub(super) fn send(&mut self, by: &Device, body: &str) -> usize {
        self.done(by, message(body, None))
    }

    /// A stream begins, and the server tells where it has the cursors.
    pub(super) fn subscribe(&mut self, by: &Device, start: Start) -> usize {
        let began = self.moment();
        let conversation = Arc::clone(&self.conversation);
        self.history.streams.push(Stream { by: by.clone(), conversation, began, start, items: Vec::new() });
        let delivered = self.delivered.get(by).copied().unwrap_or(0);
        let read = self.read.get(&by.user).copied().unwrap_or(0);
        self.see_cursors(by, began, false, delivered, read);
        self.history.streams.len() - 1
    }

    /// Everything that is there comes to a stream.
    pub(super) fn deliver(&mut self, stream: usize) {
        let Stream { by, start, items, .. } = &self.history.streams[stream];
        let begun = match start {
            Start::After(seq) => *seq,
            Start::Head => self.head(),
        };
        let after = items.last().map_or(begun, |(_, item)| item.span().1);
        for item in self.items(&by.user, after) {
            let now = self.moment();
            self.history.streams[stream].items.push((now, item));
        }
    }

    /// A device confirms what came by a stream, and hears that it is kept.
    pub(super) fn confirm(&mut self, stream: usize, seen_too: bool) {
        let by = self.history.streams[stream].by.clone();
        let Some(upto) = self.history.streams[stream].items.last().map(|(_, item)| item.span().1) else { return };
        let at = self.moment();
        let read = if seen_too { upto } else { 0 };
        let conversation = Arc::clone(&self.conversation);
        self.history.moves.push(CursorMove { by: by.clone(), conversation, at, delivered: upto, read });
        let kept = self.delivered.entry(by.clone()).or_default();
        *kept = upto.max(*kept);
        let kept = self.read.entry(Arc::clone(&by.user)).or_default();
        *kept = read.max(*kept);
        self.see_cursors(&by, at, true, upto, read);
    }

    pub(super) fn see_cursors(&mut self, by: &Device, asked: Moment, moved: bool, delivered: u64, read: u64) {
        let at = self.moment();
        let conversation = Arc::clone(&self.conversation);
        self.history.seen.push(CursorSeen { by: by.clone(), conversation, asked, at, moved, delivered, read });
    }

    /// All of it is read in the end.
    pub(super) fn end(mut self, by: &Device) -> History {
        let (items, head) = (self.items(&by.user, 0), self.head());
        self.history.finals.push(Final { conversation: Arc::clone(&self.conversation), items, head });
        self.history
    }
}

/// A send.
pub(super) fn message(body: &str, client_id: Option<&str>) -> Call {
    Call::Send(Message { client_id: client_id.map(Arc::from), body: Bytes::copy_from_slice(body.as_bytes()) })
}
