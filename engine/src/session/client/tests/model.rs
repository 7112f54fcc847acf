//! A cluster as one value: gateways with pipes that outlive their connections, a broker that judges send numbers as
//! the design says, readers' streams with hidden stretches, a clock.

use std::collections::{BTreeMap, VecDeque};

use bytes::BytesMut;
use stentor_proto::{
    Bytes,
    frame::{self, ClientFrame, ServerFrame},
    ids::{ConversationId, Seq, key_crc},
    reason::Reason,
    record,
    v1::{self, EventHeader, item, request::Call, response},
};

use super::super::{Answer, Config, Draws, Output, Session, Start, Step, credit_cost};

#[derive(Debug, Clone)]
pub(super) enum Action {
    Send(usize),
    /// The gateway takes frames of the device.
    Up(usize),
    /// The device takes frames of the gateway.
    Down(usize),
    /// A pipe's next proposals are applied; old connections' pipes too.
    Apply {
        pipe: usize,
        count: usize,
    },
    /// A gateway proposes its next one twice.
    RepeatProposal(usize),
    /// The gateway refuses the next send that it takes.
    RefuseNext(usize),
    /// Who asks next for his count is told that he is nobody here.
    RefuseQuestion,
    /// An answer to such a question that took its time goes out.
    AnswerLate,
    Cut,
    Connect,
    Wait(u64),
    OtherEvent {
        conversation: usize,
        hidden: u64,
    },
    Stream {
        conversation: usize,
        count: usize,
    },
    Consume(usize),
    /// The user is removed and added again: the send state is gone.
    Forget(usize),
}

const REFUSALS: [Reason; 5] =
    [Reason::Overloaded, Reason::RateLimited, Reason::Unavailable, Reason::Internal, Reason::OutOfOrder];

#[derive(Default)]
struct SendState {
    last: u64,
    done_no: u64,
    results: BTreeMap<u64, (Bytes, v1::Sent)>,
}

#[derive(Default)]
struct Conversation {
    /// Bodies of events, or the other end of a hidden stretch that begins here; index is seq - 1.
    items: Vec<Option<Bytes>>,
    sends: SendState,
    forgotten: bool,
    /// A question for the count was refused: what was on its way before stays unknown.
    shut: bool,
    /// The first ticket that was given out after the last such refusal was made.
    open_since: usize,
}

#[derive(Default)]
struct Connection {
    up: VecDeque<ClientFrame>,
    down: VecDeque<(u8, Bytes)>,
    streams: BTreeMap<usize, u64>,
    credit: i64,
    resumes: usize,
}

pub(super) struct World {
    draws: Draws,
    now: u64,
    session: Session<u64, ()>,
    connection: Option<Connection>,
    /// Unapplied proposals: (number of the connection, sends).
    pipes: Vec<(usize, VecDeque<v1::Send>)>,
    connections: usize,
    refuse_next: Option<Reason>,
    refuse_question: bool,
    /// Answers to questions for counts that take their time, with the connection.
    late: VecDeque<(usize, v1::Response)>,
    conversations: Vec<Conversation>,
    ids: Vec<ConversationId>,
    /// What the device sent, by ticket: conversation, body, answer.
    tickets: Vec<(usize, Bytes, Option<Answer>)>,
    received: Vec<Vec<Option<Bytes>>>,
    waiting: VecDeque<u64>,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let ids: Vec<_> = ["one", "two"].iter().map(|id| ConversationId::new(id).unwrap()).collect();
        let mut session = Session::new(Config { credit_bytes: 700, ..Config::default() }, seed);
        ids.iter().for_each(|id| session.subscribe(id, Start::After(Seq(0))).unwrap());
        Self {
            draws: Draws::new(seed ^ 1),
            now: 1_000,
            session,
            connection: None,
            pipes: Vec::new(),
            connections: 0,
            refuse_next: None,
            refuse_question: false,
            late: VecDeque::new(),
            conversations: ids.iter().map(|_| Conversation::default()).collect(),
            received: ids.iter().map(|_| Vec::new()).collect(),
            ids,
            tickets: Vec::new(),
            waiting: VecDeque::new(),
        }
    }

    pub(super) fn act(&mut self, action: Action) {
        match action {
            Action::Send(conversation) => self.send(conversation),
            Action::Up(count) => (0..count).for_each(|_| self.up()),
            Action::Down(count) => (0..count).for_each(|_| self.down()),
            Action::Apply { pipe, count } => (0..count).for_each(|_| self.apply(pipe)),
            Action::RepeatProposal(pipe) => {
                if let Some((_, sends)) = self.pipes.get_mut(pipe)
                    && let Some(first) = sends.front().cloned()
                {
                    sends.push_front(first);
                }
            }
            Action::RefuseNext(reason) => self.refuse_next = Some(REFUSALS[reason]),
            Action::RefuseQuestion => self.refuse_question = true,
            Action::AnswerLate => {
                if let Some((connection, response)) = self.late.pop_front() {
                    self.answer(connection, response);
                }
            }
            Action::Cut => self.cut(),
            Action::Connect => self.connect(),
            Action::Wait(ms) => {
                self.now += ms;
                if self.session.tick(self.now).is_err() {
                    self.cut();
                }
            }
            Action::OtherEvent { conversation, hidden } => {
                let items = &mut self.conversations[conversation].items;
                match hidden {
                    0..=2 => items.push(Some(Bytes::from(format!("other {}", items.len())))),
                    n => items.extend((0..n).map(|_| None)),
                }
            }
            Action::Stream { conversation, count } => self.stream(conversation, count),
            Action::Consume(count) => {
                (0..count).for_each(|_| {
                    if let Some(bytes) = self.waiting.pop_front() {
                        self.session.consumed(bytes);
                    }
                });
            }
            Action::Forget(conversation) => self.forget(conversation),
        }
        self.settle();
    }

    fn send(&mut self, conversation: usize) {
        let ticket = self.tickets.len() as u64;
        let body = Bytes::from(format!("mine {ticket}"));
        self.tickets.push((conversation, body.clone(), None));
        let send = v1::Send { body, ..Default::default() };
        self.session.send(self.now, &self.ids[conversation], send, ticket).unwrap();
    }

    fn connect(&mut self) {
        if self.connection.is_some() {
            return;
        }
        self.connection = Some(Connection::default());
        self.connections += 1;
        self.pipes.push((self.connections, VecDeque::new()));
        self.session.connected(self.now, "token", &[7; 16]);
    }

    fn cut(&mut self) {
        if self.connection.take().is_some() {
            self.session.disconnected();
        }
    }

    /// An answer reaches the device only on the connection that asked.
    fn answer(&mut self, connection: usize, frame: impl Into<ServerFrame>) {
        if connection == self.connections
            && let Some(live) = &mut self.connection
        {
            let frame = frame.into();
            let kind = frame.kind();
            live.down.push_back((kind, frame.to_bytes().slice(frame::PREFIX_BYTES..)));
        }
    }

    fn up(&mut self) {
        let Some(frame) = self.connection.as_mut().and_then(|c| c.up.pop_front()) else { return };
        let at = self.connections;
        match frame {
            ClientFrame::Hello(_) => {
                let welcome = v1::Welcome {
                    version: 1,
                    app: "a".into(),
                    max_body_bytes: 1_000,
                    max_frame_bytes: 65_536,
                    max_in_flight: 16,
                    max_run_sends: 128,
                    ..Default::default()
                };
                self.answer(at, welcome);
            }
            ClientFrame::Resume(resume) => {
                let live = self.connection.as_mut().unwrap();
                live.resumes += 1;
                live.credit = resume.credit_bytes as i64;
                resume.delivered.iter().for_each(|c| self.subscribed(&c.conversation, c.seq));
            }
            ClientFrame::Subscribe(s) => self.subscribed(&s.conversation, s.after_seq),
            ClientFrame::Credit(credit) => self.connection.as_mut().unwrap().credit += credit.bytes as i64,
            ClientFrame::Request(request) => {
                let Some(Call::SendState(call)) = request.call else { panic!("{request:?}") };
                let index = self.index(&call.conversation);
                let Conversation { sends, shut, open_since, .. } = &mut self.conversations[index];
                if self.refuse_question {
                    (*shut, *open_since) = (true, self.tickets.len());
                }
                let state = v1::SendStateResponse { last: sends.last, done_no: sends.done_no };
                let result = match std::mem::take(&mut self.refuse_question) {
                    true => response::Result::Refusal(Reason::NotAParticipant.refusal()),
                    false => response::Result::SendState(state),
                };
                self.late.push_back((at, v1::Response { id: request.id, result: Some(result) }));
                if self.draws.below(2) == 0 {
                    self.act(Action::AnswerLate);
                }
            }
            ClientFrame::Ping(ping) => self.answer(at, v1::Pong { token: ping.token }),
            ClientFrame::Send(send) => match self.refuse_next.take() {
                Some(reason) => self.answer(at, refused(&send, reason, 0)),
                None => self.pipes.last_mut().unwrap().1.push_back(send),
            },
            ClientFrame::SendRun(run) => self.run(run),
            ClientFrame::MoveCursors(_) | ClientFrame::Unsubscribe(_) => {}
        }
    }

    /// A run is proposed as far as the gateway lets it through; what is behind that is refused.
    fn run(&mut self, run: v1::SendRun) {
        let count = run.items.len() as u64;
        assert!(count > 1 && run.done_no < run.send_no, "{run:?}");
        let refuse = self.refuse_next.take().map(|reason| (self.draws.below(count), reason));
        for (place, send) in (0..).zip(super::sends_of(run)) {
            match refuse {
                Some((first, reason)) if place >= first => self.answer(self.connections, refused(&send, reason, 0)),
                _ => self.pipes.last_mut().unwrap().1.push_back(send),
            }
        }
    }

    /// Answers of a run come together, now and then.
    fn answer_sent(&mut self, connection: usize, sent: v1::Sent) {
        if connection == self.connections
            && let Some(live) = &mut self.connection
            && let Some((kind, message)) = live.down.back()
            && let Ok(Some(ServerFrame::Sent(mut before))) = ServerFrame::decode(*kind, message.clone())
            && before.conversation == sent.conversation
            && (before.stamp_ms, before.repeat) == (sent.stamp_ms, sent.repeat)
            && (before.send_no + u64::from(before.more) + 1, before.seq + u64::from(before.more) + 1)
                == (sent.send_no, sent.seq)
            && self.draws.below(3) > 0
        {
            before.more += 1;
            live.down.pop_back();
            return self.answer(connection, before);
        }
        self.answer(connection, sent);
    }

    fn index(&self, conversation: &str) -> usize {
        self.ids.iter().position(|id| id.as_str() == conversation).unwrap()
    }

    fn subscribed(&mut self, conversation: &str, after: u64) {
        let index = self.index(conversation);
        // Now and then from further back: the device drops what it has.
        let after = after.saturating_sub(self.draws.below(3));
        self.connection.as_mut().unwrap().streams.insert(index, after + 1);
        let state = &self.conversations[index];
        let state = v1::ConversationState {
            conversation: conversation.into(),
            head: state.items.len() as u64,
            last_send_no: state.sends.last,
            ..Default::default()
        };
        self.answer(self.connections, state);
    }

    fn down(&mut self) {
        let Some((kind, message)) = self.connection.as_mut().and_then(|c| c.down.pop_front()) else { return };
        self.session.handle(self.now, kind, message).expect("the model keeps its promises");
    }

    /// What `apply` does with a numbered send.
    fn apply(&mut self, pipe: usize) {
        let Some((connection, sends)) = self.pipes.get_mut(pipe) else { return };
        let (connection, Some(send)) = (*connection, sends.pop_front()) else { return };
        let index = self.index(&send.conversation);
        let Conversation { items, sends, .. } = &mut self.conversations[index];
        let refuse = |reason| Some(refused(&send, reason, sends.last));
        assert!(send.done_no < send.send_no, "{send:?}");
        let refusal = if send.send_no > sends.last + 1 {
            refuse(Reason::OutOfOrder)
        } else if send.send_no <= sends.done_no {
            refuse(Reason::DedupWindowPassed)
        } else if send.send_no <= sends.last {
            let (body, first) = &sends.results[&send.send_no];
            if *body == send.body {
                let repeated = v1::Sent { repeat: true, ..first.clone() };
                return self.answer_sent(connection, repeated);
            }
            refuse(Reason::SendNoTaken)
        } else {
            None
        };
        if let Some(refusal) = refusal {
            return self.answer(connection, refusal);
        }
        items.push(Some(send.body.clone()));
        let sent = v1::Sent {
            conversation: send.conversation.clone(),
            send_no: send.send_no,
            seq: items.len() as u64,
            ..Default::default()
        };
        sends.last = send.send_no;
        sends.done_no = sends.done_no.max(send.done_no);
        sends.results.insert(send.send_no, (send.body.clone(), sent.clone()));
        if self.draws.below(10) == 0 {
            // A gateway that lost the leader with this one, and found the next one for those behind it.
            return self.answer(connection, refused(&send, Reason::OutcomeUnknown, 0));
        }
        self.answer_sent(connection, sent);
    }

    fn stream(&mut self, index: usize, count: usize) {
        let Some(live) = &mut self.connection else { return };
        let Some(next) = live.streams.get_mut(&index) else { return };
        let conversation = &self.conversations[index];
        let mut items = Vec::new();
        while items.len() < count && *next <= conversation.items.len() as u64 && live.credit > 0 {
            let from = *next as usize - 1;
            let item = match &conversation.items[from] {
                Some(body) => item::Item::Record(encode(self.ids[index].as_str(), *next, body)),
                None => {
                    let more = conversation.items[from..].iter().take_while(|i| i.is_none()).count() as u64;
                    let hidden = v1::Hidden { from: *next, to: *next + more - 1, reason: 1 };
                    *next = hidden.to;
                    item::Item::Hidden(hidden)
                }
            };
            *next += 1;
            let item = v1::Item { item: Some(item) };
            live.credit -= credit_cost(&item) as i64;
            items.push(item);
        }
        if !items.is_empty() {
            let conversation = self.ids[index].as_str().into();
            self.answer(self.connections, v1::Events { conversation, items });
        }
    }

    fn forget(&mut self, index: usize) {
        // A removal is itself a command behind what is under way in the conversation.
        while let Some(pipe) = self.pipes.iter().position(|(_, sends)| !sends.is_empty()) {
            self.apply(pipe);
        }
        let conversation = &mut self.conversations[index];
        // A state that is lost with its first number still unanswered cannot be told from one that never was.
        if conversation.sends.done_no == 0 {
            return;
        }
        conversation.sends = SendState::default();
        conversation.forgotten = true;
    }

    fn settle(&mut self) {
        let mut out = BytesMut::new();
        self.session.write_frames(self.now, &mut out, 4_096);
        while let Some((kind, message)) = frame::split(&mut out, 65_536).unwrap() {
            let frame = ClientFrame::decode(kind, message).unwrap().unwrap();
            self.connection.as_mut().expect("writes only on a connection").up.push_back(frame);
        }
        while let Some(output) = self.session.poll() {
            self.take(output);
        }
    }

    fn take(&mut self, output: Output<u64, ()>) {
        match output {
            Output::Answered { ticket, answer } => {
                let slot = &mut self.tickets[ticket as usize].2;
                assert_eq!(*slot, None, "one answer");
                *slot = Some(answer);
            }
            Output::Step { conversation, step, credit_bytes } => {
                let received = &mut self.received[self.ids.iter().position(|id| *id == conversation).unwrap()];
                match step {
                    Step::Event(event) => {
                        received.push(Some(event.body));
                        assert_eq!(event.header.seq, received.len() as u64);
                    }
                    Step::Hidden(hidden) => {
                        assert_eq!(hidden.from, received.len() as u64 + 1);
                        received.resize(hidden.to as usize, None);
                    }
                }
                self.waiting.push_back(credit_bytes);
            }
            Output::Welcome(_) | Output::State { .. } => {}
            other => panic!("{other:?}"),
        }
    }

    /// No more faults; everything must come to an end.
    pub(super) fn heal(&mut self) {
        (self.refuse_next, self.refuse_question) = (None, false);
        for _ in 0..2_000 {
            self.act(Action::Connect);
            self.act(Action::Up(8));
            for pipe in 0..self.pipes.len() {
                self.act(Action::Apply { pipe, count: 20 });
            }
            for conversation in 0..self.ids.len() {
                self.act(Action::Stream { conversation, count: 10 });
            }
            (0..self.late.len()).for_each(|_| self.act(Action::AnswerLate));
            self.act(Action::Down(30));
            self.act(Action::Consume(50));
            self.act(Action::Wait(100));
            let complete = self.received.iter().zip(&self.conversations).all(|(r, c)| r.len() == c.items.len());
            if complete && self.tickets.iter().all(|t| t.2.is_some()) {
                return;
            }
        }
    }

    pub(super) fn check(&self) {
        assert!(self.connection.as_ref().is_none_or(|c| c.resumes <= 1), "one resume per connection");
        for (index, conversation) in self.conversations.iter().enumerate() {
            assert_eq!(self.received[index], conversation.items, "what a reader got");
            let mut last = None;
            for body in conversation.items.iter().flatten().filter(|b| b.starts_with(b"mine")) {
                let ticket: u64 = std::str::from_utf8(&body[5..]).unwrap().parse().unwrap();
                assert!(last < Some(ticket), "{ticket} after {last:?}: twice or out of order");
                last = Some(ticket);
            }
        }
        for (ticket, (index, body, answer)) in self.tickets.iter().enumerate() {
            let Conversation { items, forgotten, shut, open_since, .. } = &self.conversations[*index];
            match answer {
                Some(Answer::Sent { seq, .. }) => assert_eq!(items[seq.0 as usize - 1].as_ref(), Some(body)),
                Some(Answer::Refused(refusal)) => {
                    assert_eq!(refusal.reason, "NOT_A_PARTICIPANT");
                    assert!(!items.contains(&Some(body.clone())), "{ticket} was refused and is there");
                    assert!(ticket < *open_since, "{ticket} was refused by nobody");
                }
                Some(Answer::Unknown(_)) => assert!(*forgotten || *shut, "{ticket} unknown without a cause"),
                other => panic!("{ticket}: {other:?}"),
            }
        }
    }
}

pub(super) fn refused(send: &v1::Send, reason: Reason, last: u64) -> v1::SendRefused {
    let refusal = v1::Refusal { last, ..reason.refusal() };
    v1::SendRefused { conversation: send.conversation.clone(), send_no: send.send_no, refusal: Some(refusal) }
}

pub(super) fn encode(conversation: &str, seq: u64, body: &[u8]) -> Bytes {
    let mut out = Vec::new();
    let header = EventHeader { seq, ..Default::default() };
    record::encode(&header, body, key_crc(b"a", conversation.as_bytes()), crc32fast::hash(body), &mut out);
    out.into()
}
