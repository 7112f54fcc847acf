//! What scripted brokers serve: one world of conversations and users, of which one broker at a time is the leader. It
//! follows the internal protocol and apply's rules for numbers, and fails exactly as a test tells it to.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
};

use stentor_engine::effect::Outcome;
use stentor_proto::{
    Bytes, Message,
    ids::{BrokerId, SendNo, Seq, SessionNo, StampMs, Version, key_crc},
    internal::{
        self, AppInfo, BrokerFrame, GatewayFrame, NotLeader, PlacementView, SigningKey, broker_frame::Frame as Out,
        change_participant::Change, command::Op, gateway_frame::Frame as In, interest_state, lookup, lookup_done,
        proposed, read_done,
    },
    reason::Reason,
    record as event_record,
    v1::{self, ConversationState, EventHeader, EventKind, HistoryRequest, HistoryResponse, Item, item},
};
use tokio::sync::mpsc;

/// How the leader misbehaves.
#[derive(Debug, Default)]
pub(crate) struct Script {
    /// Applies proposals and says nothing.
    pub(crate) swallow_answers: bool,
    /// Live events get lost, and no beat tells of their heads.
    pub(crate) lose_live: bool,
    /// Sends no beats.
    pub(crate) mute: bool,
    /// Answers reads so late that the test says when: they wait while this is set.
    pub(crate) hold_reads: bool,
    /// Questions for heads have no answer while this is set.
    pub(crate) hold_heads: bool,
    /// Proposals are left lying.
    pub(crate) stuck: bool,
    /// The same, only for this conversation.
    pub(crate) stuck_in: Option<String>,
    /// Refuses every proposal for this reason, before anything happens.
    pub(crate) refuse_proposals: Option<Reason>,
    /// Refuses interest in this conversation, retryably.
    pub(crate) refuse_interest_in: Option<String>,
}

#[derive(Default)]
struct Conversation {
    records: Vec<Bytes>,
    participants: BTreeSet<String>,
    /// Who was removed, and by which event.
    removed: BTreeMap<String, u64>,
    /// By (user, device).
    sends: BTreeMap<(String, String), Sends>,
}

/// Last, done, results by number.
type Sends = (u64, u64, BTreeMap<u64, Outcome>);

#[derive(Default)]
struct User {
    /// By device: nonce, number, superseded nonces.
    sessions: BTreeMap<String, (Bytes, u64, Vec<Bytes>)>,
    /// With the membership event's seq, whether it was a removal, and the seq in the user's own stream.
    conversations: BTreeMap<String, (u64, bool, u64)>,
    /// Of the user's own stream.
    head: u64,
    delivered: BTreeMap<(String, String), u64>,
}

pub(super) struct Attached {
    pub(super) id: u64,
    pub(super) broker: BrokerId,
    pub(super) out: mpsc::UnboundedSender<BrokerFrame>,
    /// Conversations, and users as `user:<name>`.
    pub(super) interest: BTreeSet<String>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) leader: BrokerId,
    /// What brokers that do not lead say; the leader's number, unless a test lies.
    hint: Option<u32>,
    pub(super) term: u64,
    conversations: BTreeMap<String, Conversation>,
    users: BTreeMap<String, User>,
    pub(super) streams: Vec<Attached>,
    pub(super) next_stream: u64,
    held: Vec<(u64, internal::Read)>,
    held_heads: Vec<(u64, internal::Heads)>,
    pub(super) script: Script,
    public_pem: String,
    brokers: u32,
    commands: Vec<internal::Command>,
    /// Their topics.
    registrations: Vec<String>,
    lists: Vec<u64>,
    kept_back: Option<Vec<(String, Bytes)>>,
}

pub(crate) struct World(pub(super) Mutex<State>);

/// An event record as a broker makes it.
pub(crate) fn record(conversation: &str, header: EventHeader, body: &[u8]) -> Bytes {
    let mut out = Vec::new();
    let key_crc = key_crc(b"app", conversation.as_bytes());
    event_record::encode(&header, body, key_crc, crc(body), &mut out);
    out.into()
}

fn crc(body: &[u8]) -> u32 {
    // The command builder computes it as the real way in does.
    let app = stentor_proto::ids::AppId::new("app").unwrap();
    let conversation = stentor_proto::ids::ConversationId::new("c").unwrap();
    let send = internal::Send { body: Bytes::copy_from_slice(body), ..Default::default() };
    stentor_engine::command::send(&app, &conversation, send).body_crc
}

impl World {
    pub(crate) fn new(brokers: u32, public_pem: &str) -> Arc<Self> {
        let state = State { leader: BrokerId(1), term: 1, public_pem: public_pem.into(), brokers, ..State::default() };
        Arc::new(Self(Mutex::new(state)))
    }

    /// A conversation with these participants and as many events.
    pub(crate) fn create(&self, conversation: &str, participants: &[&str], events: usize) {
        let mut state = self.0.lock().unwrap();
        let made = state.conversations.entry(conversation.into()).or_default();
        made.participants = participants.iter().map(|&user| user.into()).collect();
        for &user in participants {
            state.user_changed(user, conversation, 1, false);
        }
        drop(state);
        (0..events).for_each(|n| self.append(conversation, format!("event {n}").as_bytes()));
    }

    /// Applies an event and fans it out.
    pub(crate) fn append(&self, conversation: &str, body: &[u8]) {
        let header = EventHeader { kind: EventKind::Message.into(), sender: "someone".into(), ..Default::default() };
        self.0.lock().unwrap().append(conversation, header, body);
    }

    pub(crate) fn add(&self, conversation: &str, user: &str) {
        self.0.lock().unwrap().add(conversation, user);
    }

    pub(crate) fn remove(&self, conversation: &str, user: &str) {
        self.0.lock().unwrap().remove(conversation, user);
    }

    /// Does something whose live events are kept back, and gives them.
    pub(crate) fn hold_back(&self, what: impl FnOnce()) -> Vec<(String, Bytes)> {
        self.0.lock().unwrap().kept_back = Some(Vec::new());
        what();
        self.0.lock().unwrap().kept_back.take().unwrap()
    }

    /// Pushes events of a conversation as live, in one frame.
    pub(crate) fn push(&self, conversation: &str, events: Vec<(String, Bytes)>) {
        let records = events.into_iter().filter(|(of, _)| of == conversation).map(|(_, record)| record).collect();
        self.0.lock().unwrap().push(conversation, records);
    }

    /// Questions for a user's list, with what they name as known.
    pub(crate) fn lists(&self) -> Vec<u64> {
        self.0.lock().unwrap().lists.clone()
    }

    pub(crate) fn script(&self, change: impl FnOnce(&mut Script)) {
        let mut state = self.0.lock().unwrap();
        change(&mut state.script);
        if !state.script.hold_reads {
            for (stream, read) in std::mem::take(&mut state.held) {
                let answer = state.read(&read);
                state.tell(stream, answer);
            }
        }
        if !state.script.hold_heads {
            for (stream, heads) in std::mem::take(&mut state.held_heads) {
                let answer = state.heads(&heads, true);
                state.tell(stream, answer);
            }
        }
    }

    /// Another broker leads from now on.
    pub(crate) fn lead(&self, broker: u32) {
        let mut state = self.0.lock().unwrap();
        state.leader = BrokerId(broker);
        state.term += 1;
        state.streams.iter_mut().for_each(|stream| stream.interest.clear());
    }

    /// What brokers say of the leader: nobody (0), or somebody who is not.
    pub(crate) fn hint(&self, hint: Option<u32>) {
        self.0.lock().unwrap().hint = hint;
    }

    /// Cuts a broker's streams, with everything that is on them.
    pub(crate) fn cut(&self, broker: u32) {
        self.0.lock().unwrap().streams.retain(|stream| stream.broker != BrokerId(broker));
    }

    pub(crate) fn head(&self, conversation: &str) -> u64 {
        self.0.lock().unwrap().conversations[conversation].records.len() as u64
    }

    /// The bodies of a conversation's messages.
    pub(crate) fn bodies(&self, conversation: &str) -> Vec<Bytes> {
        let key_crc = key_crc(b"app", conversation.as_bytes());
        let state = self.0.lock().unwrap();
        let records = state.conversations[conversation].records.iter();
        records.map(|record| event_record::decode(record, key_crc).unwrap().body).collect()
    }

    pub(crate) fn delivered(&self, user: &str, device: &str, conversation: &str) -> Option<u64> {
        let state = self.0.lock().unwrap();
        state.users.get(user)?.delivered.get(&(device.into(), conversation.into())).copied()
    }

    /// Commands that were applied, of which a test wants to know.
    pub(crate) fn commands(&self, of_interest: impl Fn(&Op) -> bool) -> Vec<internal::Command> {
        let state = self.0.lock().unwrap();
        state.commands.iter().filter(|command| command.op.as_ref().is_some_and(&of_interest)).cloned().collect()
    }

    pub(crate) fn has_interest(&self, conversation: &str) -> bool {
        let state = self.0.lock().unwrap();
        state.streams.iter().any(|s| s.broker == state.leader && s.interest.contains(conversation))
    }

    pub(crate) fn held_reads(&self) -> usize {
        self.0.lock().unwrap().held.len()
    }

    pub(crate) fn held_heads(&self) -> usize {
        self.0.lock().unwrap().held_heads.len()
    }

    pub(crate) fn registrations(&self) -> usize {
        self.0.lock().unwrap().registrations.len()
    }

    /// Registrations of one conversation, refused ones counted too.
    pub(crate) fn registrations_of(&self, conversation: &str) -> usize {
        self.0.lock().unwrap().registrations.iter().filter(|of| *of == conversation).count()
    }

    /// Another session of this device begins through another gateway.
    pub(crate) fn open_elsewhere(&self, user: &str, device: &str, nonce: [u8; 16]) -> Outcome {
        let nonce = Bytes::copy_from_slice(&nonce);
        self.0.lock().unwrap().open(user, &internal::OpenSession { device: device.to_owned().into(), nonce })
    }

    pub(super) fn placement(&self) -> PlacementView {
        let state = self.0.lock().unwrap();
        let replicas: Vec<u64> = (1..=u64::from(state.brokers)).map(|broker| broker << 32 | 1).collect();
        let shard = |shard, first_slot, end_slot| internal::ShardPlacement {
            shard,
            replicas: replicas.clone(),
            first_slot,
            end_slot,
            initialized: true,
        };
        let key = SigningKey {
            kid: "kid-1".into(),
            algorithm: "EdDSA".into(),
            public_key_pem: state.public_pem.clone().into(),
            dev: true,
        };
        let app = |app: &str, keys| AppInfo { app: app.into(), keys };
        PlacementView {
            cluster_id: "test".into(),
            version: 1,
            shards: vec![shard(0, 0, 0), shard(1, 0, 5_000), shard(2, 5_000, 16_384)],
            apps: vec![app("app", vec![key]), app("other", vec![])],
            ..Default::default()
        }
    }
}

impl State {
    fn append(&mut self, conversation: &str, mut header: EventHeader, body: &[u8]) -> u64 {
        let found = self.conversations.get_mut(conversation).unwrap();
        let seq = found.records.len() as u64 + 1;
        header.seq = seq;
        let bytes = record(conversation, header, body);
        found.records.push(bytes.clone());
        match &mut self.kept_back {
            Some(kept) => kept.push((conversation.into(), bytes)),
            None if self.script.lose_live => {}
            None => self.push(conversation, vec![bytes]),
        }
        seq
    }

    fn push(&self, conversation: &str, records: Vec<Bytes>) {
        let (shard, app) = (shard_of(conversation), "app".to_owned());
        let live = internal::Live { shard, app, conversation: conversation.into(), records };
        for stream in &self.streams {
            if stream.broker == self.leader && stream.interest.contains(conversation) {
                let _ = stream.out.send(BrokerFrame { frame: Some(Out::Live(live.clone())) });
            }
        }
    }

    fn add(&mut self, conversation: &str, user: &str) -> u64 {
        let found = self.conversations.get_mut(conversation).unwrap();
        found.participants.insert(user.to_owned());
        found.removed.remove(user);
        let subject = user.to_owned().into();
        let header = EventHeader { kind: EventKind::ParticipantAdded.into(), subject, ..Default::default() };
        let seq = self.append(conversation, header, b"");
        self.user_changed(user, conversation, seq, false);
        seq
    }

    fn remove(&mut self, conversation: &str, user: &str) -> u64 {
        self.conversations.get_mut(conversation).unwrap().participants.remove(user);
        let subject = user.to_owned().into();
        let header = EventHeader { kind: EventKind::ParticipantRemoved.into(), subject, ..Default::default() };
        let seq = self.append(conversation, header, b"");
        self.conversations.get_mut(conversation).unwrap().removed.insert(user.to_owned(), seq);
        self.user_changed(user, conversation, seq, true);
        seq
    }

    /// As the outbox brings it to the user's shard.
    fn user_changed(&mut self, user: &str, conversation: &str, seq: u64, removed: bool) {
        let found = self.users.entry(user.into()).or_default();
        found.head += 1;
        found.conversations.insert(conversation.into(), (seq, removed, found.head));
        let hint = internal::HeadHint { app: "app".into(), user: user.into(), head: found.head, ..Default::default() };
        if self.script.lose_live {
            return;
        }
        for stream in &self.streams {
            if stream.broker == self.leader && stream.interest.contains(&format!("user:{user}")) {
                let _ = stream.out.send(BrokerFrame { frame: Some(Out::Head(hint.clone())) });
            }
        }
    }

    fn tell(&self, stream: u64, frame: Out) {
        if let Some(stream) = self.streams.iter().find(|s| s.id == stream) {
            let _ = stream.out.send(BrokerFrame { frame: Some(frame) });
        }
    }

    fn not_leader(&self) -> NotLeader {
        NotLeader { leader: self.hint.unwrap_or(self.leader.0), ..Default::default() }
    }

    pub(super) fn take(&mut self, stream: u64, broker: BrokerId, frame: GatewayFrame) {
        let leads = broker == self.leader;
        let answer = match frame.frame.unwrap() {
            In::Hello(hello) => {
                assert_eq!(hello.cluster_id, "test");
                return;
            }
            In::DropInterest(drop) => {
                let stream = self.streams.iter_mut().find(|s| s.id == stream).unwrap();
                stream.interest.remove(&topic(&drop.conversation, &drop.user));
                return;
            }
            In::Propose(propose) => {
                let of_stuck = |name: &String| {
                    let command = internal::Command::decode(propose.command.clone()).unwrap();
                    command.target == name.as_bytes()
                };
                if self.script.stuck || self.script.stuck_in.as_ref().is_some_and(of_stuck) {
                    return;
                }
                let result = if let Some(reason) = self.script.refuse_proposals {
                    proposed::Result::Refusal(reason.refusal())
                } else if leads {
                    self.applied(&propose.command)
                } else {
                    proposed::Result::NotLeader(self.not_leader())
                };
                if self.script.swallow_answers {
                    return;
                }
                Out::Proposed(internal::Proposed { id: propose.id, result: Some(result) })
            }
            In::Interest(interest) => {
                let result = if leads {
                    self.registrations.push(topic(&interest.conversation, &interest.user));
                    self.register(stream, &interest)
                } else {
                    interest_state::Result::NotLeader(self.not_leader())
                };
                Out::Interest(internal::InterestState { id: interest.id, result: Some(result) })
            }
            In::Read(read) if leads && self.script.hold_reads => return self.held.push((stream, read)),
            In::Read(read) => {
                if leads {
                    self.read(&read)
                } else {
                    let result = Some(read_done::Result::NotLeader(self.not_leader()));
                    Out::Read(internal::ReadDone { id: read.id, result })
                }
            }
            In::Heads(heads) if leads && self.script.hold_heads => return self.held_heads.push((stream, heads)),
            In::Heads(heads) => self.heads(&heads, leads),
            In::Lookup(lookup) => self.lookup(&lookup, leads),
        };
        self.tell(stream, answer);
    }

    fn register(&mut self, stream: u64, interest: &internal::Interest) -> interest_state::Result {
        if self.script.refuse_interest_in.as_ref() == Some(&interest.conversation) {
            return interest_state::Result::Refusal(Reason::Overloaded.refusal());
        }
        let head = match self.conversations.get(&interest.conversation) {
            _ if !interest.user.is_empty() => self.users.get(&interest.user).map_or(0, |user| user.head),
            Some(found) => found.records.len() as u64,
            None => return interest_state::Result::Refusal(Reason::UnknownConversation.refusal()),
        };
        let stream = self.streams.iter_mut().find(|s| s.id == stream).unwrap();
        stream.interest.insert(topic(&interest.conversation, &interest.user));
        interest_state::Result::Registered(internal::Registered { head, term: self.term })
    }

    fn read(&self, read: &internal::Read) -> Out {
        let request = read.request.as_ref().unwrap();
        let result = match self.page(read, request, read.max_bytes as usize) {
            Ok(page) => read_done::Result::Page(page),
            Err(reason) => read_done::Result::Refusal(reason.refusal()),
        };
        Out::Read(internal::ReadDone { id: read.id, result: Some(result) })
    }

    fn page(
        &self,
        read: &internal::Read,
        request: &HistoryRequest,
        max_bytes: usize,
    ) -> Result<HistoryResponse, Reason> {
        let found = self.conversations.get(&request.conversation).ok_or(Reason::UnknownConversation)?;
        let mut head = found.records.len() as u64;
        if !found.participants.contains(&read.user) {
            let removed = found.removed.get(&read.user).filter(|&&seq| request.after_seq.is_some_and(|a| a < seq));
            head = *removed.filter(|_| read.upto_removal).ok_or(Reason::NotAParticipant)?;
        }
        let mut bytes = 0;
        let rest = found.records.iter().take(head as usize).skip(request.after_seq.unwrap_or(0) as usize);
        let taken: Vec<_> = rest
            .take_while(|record| {
                let first = bytes == 0;
                bytes += record.len();
                first || bytes <= max_bytes
            })
            .collect();
        let end = request.after_seq.unwrap_or(0) as usize + taken.len();
        let items = taken.into_iter().map(|r| Item { item: Some(item::Item::Record(r.clone())) }).collect();
        Ok(HistoryResponse { items, head, more: (end as u64) < head })
    }

    fn heads(&self, heads: &internal::Heads, leads: bool) -> Out {
        let mut done = internal::HeadsDone { id: heads.id, ..Default::default() };
        if leads {
            let state = |name: &String| self.state(name, &heads.user, &heads.device);
            done.states = heads.conversations.iter().map(state).collect();
        } else {
            done.not_leader = Some(self.not_leader());
        }
        Out::Heads(done)
    }

    fn state(&self, name: &str, user: &str, device: &str) -> ConversationState {
        let mut state = ConversationState { conversation: name.into(), ..Default::default() };
        match self.conversations.get(name) {
            None => state.refusal = Some(Reason::UnknownConversation.refusal()),
            Some(found) if !found.participants.contains(user) => {
                state.refusal = Some(Reason::NotAParticipant.refusal());
            }
            Some(found) => {
                state.head = found.records.len() as u64;
                if let Some((last, done, _)) = found.sends.get(&(user.into(), device.into())) {
                    (state.last_send_no, state.done_no) = (*last, *done);
                }
            }
        }
        state
    }

    fn lookup(&mut self, lookup: &internal::Lookup, leads: bool) -> Out {
        if leads && matches!(lookup.what, Some(lookup::What::Conversations(_))) {
            self.lists.push(lookup.changed_after);
        }
        let result = match lookup.what.as_ref().unwrap() {
            _ if !leads => lookup_done::Result::NotLeader(self.not_leader()),
            lookup::What::Conversations(list) => lookup_done::Result::Conversations(self.list(lookup, list)),
            lookup::What::Show(show) => match self.state(&show.conversation, &lookup.user, "") {
                ConversationState { refusal: Some(refusal), .. } => lookup_done::Result::Refusal(refusal),
                state => lookup_done::Result::Show(v1::Conversation {
                    conversation: show.conversation.clone(),
                    head: state.head,
                    ..Default::default()
                }),
            },
        };
        Out::Lookup(internal::LookupDone { id: lookup.id, result: Some(result) })
    }

    /// Two on a page, so that tests see more than one page.
    fn list(&self, lookup: &internal::Lookup, list: &v1::ListRequest) -> internal::UserState {
        let Some(user) = self.users.get(&lookup.user) else { return internal::UserState::default() };
        let mut rest = user.conversations.iter().filter(|(name, _)| **name > list.after).peekable();
        let page: Vec<_> = rest.by_ref().take(2).collect();
        let next = if rest.peek().is_some() { page[page.len() - 1].0.clone() } else { String::new() };
        let changed = page.into_iter().filter(|(_, (_, _, user_seq))| *user_seq > lookup.changed_after);
        let conversation = |(name, &(seq, removed, _)): (&String, &_)| internal::UserConversationState {
            conversation: name.to_string(),
            delivered: *user.delivered.get(&(lookup.device.clone(), name.to_string())).unwrap_or(&0),
            read: 0,
            removed,
            seq,
        };
        internal::UserState { conversations: changed.map(conversation).collect(), next, head: user.head }
    }

    fn applied(&mut self, bytes: &Bytes) -> proposed::Result {
        let command = internal::Command::decode(bytes.clone()).unwrap();
        let Some(Op::SendRun(run)) = &command.op else {
            return proposed::Result::Outcome(self.apply(bytes).to_proto());
        };
        stentor_engine::command::check(&command).expect("a gateway proposes only what it has checked");
        self.commands.push(command.clone());
        let target = String::from_utf8(command.target.to_vec()).unwrap();
        let internal::SendRun { actor, send_no, done_no, session_no, items } = run.clone();
        let one_by_one = (send_no..).zip(items).map(|(send_no, item)| {
            let internal::RunItem { kind, content_type, sent_at_ms, body, refused, .. } = item;
            let (actor, plain) = (actor.clone(), internal::Send::default());
            let send = internal::Send { actor, send_no, done_no, session_no, kind, content_type, sent_at_ms, ..plain };
            self.send(&target, &internal::Send { body, refused, ..send })
        });
        // As a broker: one outcome is told alone, whatever it is of.
        match &one_by_one.collect::<Vec<_>>()[..] {
            [outcome] => proposed::Result::Outcome(outcome.to_proto()),
            outcomes => proposed::Result::Outcomes(Outcome::spans(outcomes)),
        }
    }

    fn apply(&mut self, bytes: &Bytes) -> Outcome {
        let command = internal::Command::decode(bytes.clone()).unwrap();
        stentor_engine::command::check(&command).expect("a gateway proposes only what it has checked");
        self.commands.push(command.clone());
        let target = String::from_utf8(command.target.to_vec()).unwrap();
        match command.op.unwrap() {
            Op::OpenSession(open) => self.open(&target, &open),
            Op::Send(send) => self.send(&target, &send),
            Op::MoveCursors(moves) => self.move_cursors(&target, &moves),
            Op::Create(create) => self.create(target, &create),
            Op::ChangeParticipant(change) => {
                let user = String::from_utf8(change.user.to_vec()).unwrap();
                if !self.conversations.contains_key(&target) {
                    return Outcome::refused(Reason::UnknownConversation);
                }
                if change.change() == Change::Remove {
                    return accepted(self.remove(&target, &user));
                }
                accepted(self.add(&target, &user))
            }
            other => panic!("no test needs {other:?}"),
        }
    }

    fn create(&mut self, target: String, create: &internal::Create) -> Outcome {
        if self.conversations.contains_key(&target) {
            return Outcome::refused(Reason::AlreadyExists);
        }
        let found = self.conversations.entry(target.clone()).or_default();
        let actor = &create.actor.as_ref().unwrap().user;
        let text = |user: &Bytes| String::from_utf8(user.to_vec()).unwrap();
        found.participants = create.participants.iter().chain([actor]).map(text).collect();
        let header = EventHeader { kind: EventKind::Created.into(), ..Default::default() };
        accepted(self.append(&target, header, b""))
    }

    fn open(&mut self, user: &str, open: &internal::OpenSession) -> Outcome {
        let device = String::from_utf8(open.device.to_vec()).unwrap();
        let fresh = (open.nonce.clone(), 0, Vec::new());
        let session = self.users.entry(user.into()).or_default().sessions.entry(device).or_insert(fresh);
        if session.2.contains(&open.nonce) {
            return Outcome::refused(Reason::SessionSuperseded);
        }
        if session.0 != open.nonce || session.1 == 0 {
            let old = std::mem::replace(&mut session.0, open.nonce.clone());
            if session.1 > 0 {
                session.2.push(old);
            }
            session.1 += 1;
        }
        Outcome::SessionOpened { session_no: SessionNo(session.1) }
    }

    fn send(&mut self, target: &str, send: &internal::Send) -> Outcome {
        let actor = send.actor.as_ref().unwrap();
        let text = |id: &Bytes| String::from_utf8(id.to_vec()).unwrap();
        let (user, device) = (text(&actor.user), text(&actor.device));
        let Some(found) = self.conversations.get_mut(target) else {
            return Outcome::refused(Reason::UnknownConversation);
        };
        let participant = found.participants.contains(&user);
        let sends = found.sends.entry((user.clone(), device.clone())).or_default();
        sends.1 = sends.1.max(send.done_no);
        if send.send_no > sends.0 + 1 {
            return Outcome::Refused { reason: Reason::OutOfOrder, last: SendNo(sends.0) };
        }
        if let Some(first) = sends.2.get(&send.send_no) {
            return match first.clone() {
                Outcome::Accepted { seq, stamp, version, .. } => {
                    Outcome::Accepted { seq, stamp, repeat: true, version }
                }
                refused => refused,
            };
        }
        sends.0 = send.send_no;
        let refused = Reason::from_number(send.refused);
        let refused = refused.or((!participant).then_some(Reason::NotAParticipant));
        let outcome = match refused {
            Some(reason) => Outcome::Refused { reason, last: SendNo(send.send_no) },
            None => {
                let header = EventHeader {
                    kind: EventKind::Message.into(),
                    sender: user.clone().into(),
                    device: device.clone().into(),
                    send_no: send.send_no,
                    ..Default::default()
                };
                accepted(self.append(target, header, &send.body))
            }
        };
        let found = self.conversations.get_mut(target).unwrap();
        found.sends.get_mut(&(user, device)).unwrap().2.insert(send.send_no, outcome.clone());
        outcome
    }

    fn move_cursors(&mut self, user: &str, moves: &internal::MoveCursors) -> Outcome {
        let device = String::from_utf8(moves.device.to_vec()).unwrap();
        let user = self.users.entry(user.into()).or_default();
        if user.sessions.get(&device).is_some_and(|session| session.1 > moves.session_no) {
            return Outcome::refused(Reason::SessionSuperseded);
        }
        for moved in &moves.delivered {
            let conversation = String::from_utf8(moved.conversation.to_vec()).unwrap();
            let cursor = user.delivered.entry((device.clone(), conversation)).or_default();
            *cursor = (*cursor).max(moved.seq);
        }
        Outcome::Done
    }
}

fn accepted(seq: u64) -> Outcome {
    Outcome::Accepted { seq: Seq(seq), stamp: StampMs(7), repeat: false, version: Version(1) }
}

fn topic(conversation: &str, user: &str) -> String {
    if user.is_empty() { conversation.to_owned() } else { format!("user:{user}") }
}

fn shard_of(id: &str) -> u32 {
    if stentor_proto::ids::Slot::of("app", id).0 < 5_000 { 1 } else { 2 }
}
