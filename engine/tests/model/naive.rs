//! What conversations should do, written as plainly as possible: lists and maps, no rows, no hashes, nothing forgotten.
//! Must never borrow a decision from the engine.

use std::collections::{BTreeMap, BTreeSet};

use stentor_engine::effect::Outcome;
use stentor_proto::{
    ids::{SendNo, Seq, StampMs, Version},
    internal::{Actor, ChangeParticipant, ClientKey, Command, Create, Send, change_participant::Change, command::Op},
    reason::Reason,
    v1::{ConversationKind, EventKind, Role},
};

/// What an event is to its readers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) kind: EventKind,
    pub(crate) sender: String,
    pub(crate) device: String,
    pub(crate) send_no: u64,
    pub(crate) client_id: String,
    pub(crate) subject: String,
    pub(crate) role: Role,
    pub(crate) body: Vec<u8>,
    pub(crate) stamp_ms: u64,
    pub(crate) version: u64,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Conversation {
    pub(crate) kind: i32,
    pub(crate) full: bool,
    pub(crate) version: u64,
    pub(crate) roles: BTreeMap<String, Role>,
    pub(crate) ever: BTreeSet<String>,
    pub(crate) events: Vec<Event>,
    /// For each event, who may see it.
    pub(crate) seen_by: Vec<BTreeSet<String>>,
}

/// A device's count in one conversation; every send is kept.
#[derive(Debug, Clone, Default)]
pub(crate) struct Count {
    pub(crate) last: u64,
    pub(crate) done: u64,
    pub(crate) sends: BTreeMap<u64, (Send, Outcome)>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Naive {
    pub(crate) now: u64,
    pub(crate) conversations: BTreeMap<String, Conversation>,
    pub(crate) counts: BTreeMap<Place, Count>,
    pub(crate) keys: BTreeMap<Place, (String, u64, u64)>,
}

/// (conversation, user, device or client id).
type Place = (String, String, String);
/// The (seq, stamp) of a key's first use, or why it cannot be used.
type Known = Result<(u64, u64), Reason>;

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn refused(reason: Reason) -> Outcome {
    Outcome::refused(reason)
}

/// What is left of a send when everything that a retry may change is taken away.
fn essence(send: &Send) -> Send {
    Send { actor: None, done_no: 0, ..send.clone() }
}

impl Conversation {
    fn push(&mut self, event: Event) -> u64 {
        let mut seen_by: BTreeSet<_> = self.roles.keys().cloned().collect();
        if event.kind == EventKind::ParticipantRemoved {
            seen_by.insert(event.subject.clone());
        }
        self.events.push(event);
        self.seen_by.push(seen_by);
        self.events.len() as u64
    }

    fn enter(&mut self, user: &str, role: Role) {
        self.roles.insert(user.into(), role);
        if self.ever.insert(user.into()) && self.full {
            self.seen_by.iter_mut().for_each(|seen| {
                seen.insert(user.into());
            });
        }
    }

    fn owners(&self) -> usize {
        self.roles.values().filter(|r| **r == Role::Owner).count()
    }
}

impl Naive {
    pub(crate) fn apply(&mut self, command: &Command, stamp_ms: u64) -> Outcome {
        self.now = self.now.max(stamp_ms);
        let conversation = text(&command.target);
        match command.op.as_ref().unwrap() {
            Op::Create(create) => self.create(&conversation, create),
            Op::Send(send) => self.send(&conversation, send),
            Op::ChangeParticipant(change) => self.change(&conversation, change),
            _ => unreachable!("the model knows conversations only"),
        }
    }

    fn accepted(&self, seq: u64, stamp: u64, repeat: bool, conversation: &str) -> Outcome {
        let version = Version(self.conversations[conversation].version);
        Outcome::Accepted { seq: Seq(seq), stamp: StampMs(stamp), repeat, version }
    }

    /// The first result under this key, if it is known; the key to remember otherwise.
    fn key(
        &self,
        conversation: &str,
        actor: &Actor,
        key: Option<&ClientKey>,
        content: &str,
    ) -> Result<Option<Place>, Known> {
        let Some(key) = key else { return Ok(None) };
        let place = (conversation.to_owned(), text(&actor.user), text(&key.client_id));
        match self.keys.get(&place) {
            Some((first, seq, stamp)) if first == content => Err(Ok((*seq, *stamp))),
            Some(_) => Err(Err(Reason::ClientIdReused)),
            None => Ok(Some(place)),
        }
    }

    fn in_future(&self, key: Option<&ClientKey>) -> bool {
        key.is_some_and(|key| key.first_try_ms > self.now + 300_000)
    }

    fn event(&self, kind: EventKind, actor: &Actor, key: Option<&ClientKey>) -> Event {
        Event {
            kind,
            sender: text(&actor.user),
            device: text(&actor.device),
            send_no: 0,
            client_id: key.map(|k| text(&k.client_id)).unwrap_or_default(),
            subject: String::new(),
            role: Role::Unspecified,
            body: vec![],
            stamp_ms: self.now,
            version: 0,
        }
    }

    fn create(&mut self, id: &str, create: &Create) -> Outcome {
        let actor = create.actor.clone().unwrap();
        let content = format!("create {} {} {:?}", create.kind, create.history_full, create.participants);
        let key = match self.key(id, &actor, create.client_key.as_ref(), &content) {
            Err(known) if self.conversations.contains_key(id) => {
                return match known {
                    Ok((_, stamp)) => self.accepted(1, stamp, true, id),
                    Err(reason) => refused(reason),
                };
            }
            Err(_) => unreachable!("keys live in conversations"),
            Ok(key) => key,
        };
        if let Some(there) = self.conversations.get(id) {
            let direct = create.kind() == ConversationKind::Direct;
            let stamp = there.events[0].stamp_ms;
            return if direct { self.accepted(1, stamp, true, id) } else { refused(Reason::AlreadyExists) };
        }
        if self.in_future(create.client_key.as_ref()) {
            return refused(Reason::FirstTryInFuture);
        }
        let direct = create.kind() == ConversationKind::Direct;
        let full = create.history_full || direct;
        let mut conversation = Conversation { kind: create.kind, full, version: 1, ..Default::default() };
        let first_role = if direct { Role::Writer } else { Role::Owner };
        conversation.enter(&text(&actor.user), first_role);
        let created = self.event(EventKind::Created, &actor, create.client_key.as_ref());
        conversation.push(Event { role: first_role, version: 1, ..created });
        for user in &create.participants {
            if conversation.ever.contains(&text(user)) {
                continue;
            }
            let role = if create.kind() == ConversationKind::Channel { Role::Reader } else { Role::Writer };
            conversation.enter(&text(user), role);
            conversation.version += 1;
            let added = self.event(EventKind::ParticipantAdded, &actor, None);
            let version = conversation.version;
            conversation.push(Event { subject: text(user), role, version, ..added });
        }
        self.conversations.insert(id.into(), conversation);
        if let Some(place) = key {
            self.keys.insert(place, (content, 1, self.now));
        }
        self.accepted(1, self.now, false, id)
    }

    fn send(&mut self, id: &str, send: &Send) -> Outcome {
        let actor = send.actor.clone().unwrap();
        if send.send_no == 0 {
            return self.send_fresh(id, send, &actor);
        }
        let place = (id.to_owned(), text(&actor.user), text(&actor.device));
        let count = self.counts.get(&place).cloned().unwrap_or_default();
        let last = SendNo(count.last);
        if send.send_no > count.last + 1 {
            return Outcome::Refused { reason: Reason::OutOfOrder, last };
        }
        if send.send_no <= count.done {
            return Outcome::Refused { reason: Reason::DedupWindowPassed, last };
        }
        if let Some((first, outcome)) = count.sends.get(&send.send_no) {
            if essence(first) != essence(send) {
                return Outcome::Refused { reason: Reason::SendNoTaken, last };
            }
            return match outcome.clone() {
                Outcome::Accepted { seq, stamp, .. } => self.accepted(seq.0, stamp.0, true, id),
                Outcome::Refused { reason, .. } => Outcome::Refused { reason, last },
                other => other,
            };
        }
        let outcome = match self.send_fresh(id, send, &actor) {
            Outcome::Refused { reason, .. } => Outcome::Refused { reason, last: SendNo(send.send_no) },
            outcome => outcome,
        };
        let count = self.counts.entry(place).or_default();
        count.last = send.send_no;
        count.done = count.done.max(send.done_no);
        count.sends.insert(send.send_no, (send.clone(), outcome.clone()));
        outcome
    }

    fn send_fresh(&mut self, id: &str, send: &Send, actor: &Actor) -> Outcome {
        if send.refused != 0 {
            return refused(Reason::from_number(send.refused).unwrap());
        }
        if send.body.is_empty() {
            return refused(Reason::EmptyBody);
        }
        if !self.conversations.contains_key(id) {
            return refused(Reason::UnknownConversation);
        }
        let content = format!("send {} {:?} {:?}", send.kind, send.content_type, send.body);
        let key = match self.key(id, actor, send.client_key.as_ref(), &content) {
            Err(Ok((seq, stamp))) => return self.accepted(seq, stamp, true, id),
            Err(Err(reason)) => return refused(reason),
            Ok(key) => key,
        };
        let there = &self.conversations[id];
        match there.roles.get(&text(&actor.user)) {
            _ if actor.admin => {}
            None => return refused(Reason::NotAParticipant),
            Some(Role::Reader) => return refused(Reason::PermissionDenied),
            Some(_) => {}
        }
        if send.expect_version.is_some_and(|v| v != there.version) {
            return refused(Reason::WrongVersion);
        }
        if send.expect_epoch.is_some_and(|e| e != 0) {
            return refused(Reason::WrongEpoch);
        }
        if self.in_future(send.client_key.as_ref()) {
            return refused(Reason::FirstTryInFuture);
        }
        let kind = if send.kind() == EventKind::Action { EventKind::Action } else { EventKind::Message };
        let event = self.event(kind, actor, send.client_key.as_ref());
        let there = self.conversations.get_mut(id).unwrap();
        let version = there.version;
        let seq = there.push(Event { send_no: send.send_no, body: send.body.to_vec(), version, ..event });
        if let Some(place) = key {
            self.keys.insert(place, (content, seq, self.now));
        }
        self.accepted(seq, self.now, false, id)
    }

    fn change(&mut self, id: &str, change: &ChangeParticipant) -> Outcome {
        let actor = change.actor.clone().unwrap();
        if !self.conversations.contains_key(id) {
            return refused(Reason::UnknownConversation);
        }
        let content = format!("change {} {} {:?}", change.change, change.role, change.user);
        let key = match self.key(id, &actor, change.client_key.as_ref(), &content) {
            Err(Ok((seq, stamp))) => return self.accepted(seq, stamp, true, id),
            Err(Err(reason)) => return refused(reason),
            Ok(key) => key,
        };
        let there = &self.conversations[id];
        let subject = text(&change.user);
        let own = if actor.admin { Some(Role::Owner) } else { there.roles.get(&text(&actor.user)).copied() };
        let has = there.roles.get(&subject).copied();
        let Some(own) = own else { return refused(Reason::NotAParticipant) };
        if there.kind == ConversationKind::Direct as i32 {
            return refused(Reason::DirectIsFixed);
        }
        if change.expect_version.is_some_and(|v| v != there.version) {
            return refused(Reason::WrongVersion);
        }
        let default = if there.kind == ConversationKind::Channel as i32 { Role::Reader } else { Role::Writer };
        let wanted = if change.role() == Role::Unspecified { default } else { change.role() };
        let powerful = |over: Role| own >= Role::Admin && own >= over;
        let (kind, role) = match change.change() {
            Change::Add if !powerful(wanted) => return refused(Reason::PermissionDenied),
            Change::Add if has.is_some() => return refused(Reason::AlreadyParticipant),
            Change::Add => (EventKind::ParticipantAdded, wanted),
            _ if has.is_none() => return refused(Reason::NotAParticipant),
            Change::Remove if actor.user != change.user && !powerful(has.unwrap()) => {
                return refused(Reason::PermissionDenied);
            }
            Change::Remove if has == Some(Role::Owner) && there.owners() == 1 && there.roles.len() > 1 => {
                return refused(Reason::LastOwner);
            }
            Change::Remove => (EventKind::ParticipantRemoved, has.unwrap()),
            _ if !powerful(has.unwrap()) || !powerful(wanted) => return refused(Reason::PermissionDenied),
            _ if has == Some(Role::Owner) && wanted != Role::Owner && there.owners() == 1 => {
                return refused(Reason::LastOwner);
            }
            _ => (EventKind::RoleChanged, wanted),
        };
        if self.in_future(change.client_key.as_ref()) {
            return refused(Reason::FirstTryInFuture);
        }
        let event = self.event(kind, &actor, change.client_key.as_ref());
        let there = self.conversations.get_mut(id).unwrap();
        match kind {
            EventKind::ParticipantRemoved => drop(there.roles.remove(&subject)),
            EventKind::ParticipantAdded => there.enter(&subject, role),
            _ => drop(there.roles.insert(subject.clone(), role)),
        }
        there.version += 1;
        let version = there.version;
        let seq = there.push(Event { subject, role, version, ..event });
        if let Some(place) = key {
            self.keys.insert(place, (content, seq, self.now));
        }
        self.accepted(seq, self.now, false, id)
    }
}
