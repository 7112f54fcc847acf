//! The device's half of a session: hello, resume with the cursor vector, sends in order, dense streams, cursors,
//! credit, pings. Must never do IO: inputs are frames and calls with the time, outputs are bytes to write and
//! [`Output`]s; whoever drives it opens the connections and waits.
//!
//! Order of use per connection: [`Session::connected`], then whenever something happened: [`Session::handle`] for
//! each frame, [`Session::tick`], [`Session::write_frames`] until it writes nothing, [`Session::poll`] until it is
//! empty, and a wait until [`Session::deadline`]; at the end [`Session::disconnected`].

mod backoff;
mod cursors;
mod outbox;
mod receive;
mod stream;
mod transmit;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use stentor_proto::{
    frame::{BadFrame, ClientFrame},
    ids::{ConversationId, SendNo, Seq},
    v1::{self, request::Call},
};
use thiserror::Error;

pub use self::{
    backoff::{Backoff, Draws},
    outbox::Answer,
    stream::{BadStream, Start, Step},
};
use self::{cursors::Cursors, outbox::Outbox, stream::Stream};
use crate::limits;

/// How a session behaves. All times in ms.
#[derive(Debug, Clone)]
pub struct Config {
    /// What the device calls itself, for the gateway's log.
    pub agent: String,
    /// False: also every conversation of the user that was not subscribed to, from the cursor that the server keeps.
    pub only_listed: bool,
    /// Event bytes that may wait for the application: beyond it the gateway holds them back.
    pub credit_bytes: u64,
    /// Cursor moves wait this long for others.
    pub cursor_interval_ms: u64,
    /// A silent connection is pinged after this.
    pub ping_idle_ms: u64,
    /// The same while an answer is awaited.
    pub ping_busy_ms: u64,
    /// A ping without an answer, or a hello without a welcome, ends the connection after this.
    pub silent_ms: u64,
    /// Sends in flight without any answer end the connection after this: a gateway answers even what must wait.
    pub answer_ms: u64,
    /// Waits before what was refused for now goes again.
    pub retry: Backoff,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            agent: String::new(),
            only_listed: true,
            credit_bytes: limits::SESSION_CREDIT_BYTES,
            cursor_interval_ms: 200,
            ping_idle_ms: 30_000,
            ping_busy_ms: 5_000,
            silent_ms: 10_000,
            answer_ms: 30_000,
            retry: Backoff { first_ms: 50, max_ms: 2_000 },
        }
    }
}

/// The gateway's fault: this connection must end, and the next one goes on from what is known.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum Violation {
    /// Its stream of a conversation is not what it must be.
    #[error("conversation {conversation}: {source}")]
    Stream {
        /// Which.
        conversation: ConversationId,
        /// How.
        source: BadStream,
    },
    /// Bytes that are no frame of the protocol.
    #[error(transparent)]
    Frame(#[from] BadFrame),
    /// A frame that cannot come in this state.
    #[error("the gateway sent a frame of kind {0} that cannot come now")]
    UnexpectedFrame(u8),
    /// A protocol version that was not offered.
    #[error("the gateway answered with the unknown version {0}")]
    Version(u32),
    /// Nothing came for too long.
    #[error("the gateway is silent")]
    Silent,
    /// Sends stay without an answer.
    #[error("the gateway does not answer sends")]
    NoAnswer,
    /// It ended the connection for a reason that may pass.
    #[error("the gateway ended the connection: {0}")]
    Ended(String),
}

/// A call that cannot be taken: the caller's fault, nothing changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Full {
    /// [`limits::SESSION_SUBSCRIPTIONS`] are in use.
    #[error("the session has {} conversations in use", limits::SESSION_SUBSCRIPTIONS)]
    Conversations,
    /// [`limits::DEVICE_REQUESTS`] are unanswered.
    #[error("the session has {} unanswered requests", limits::DEVICE_REQUESTS)]
    Requests,
}

/// What happened, in order. `S` and `R` are the caller's own tickets for sends and requests.
#[derive(Debug, Clone, PartialEq)]
pub enum Output<S, R> {
    /// The gateway took the session.
    Welcome(v1::Welcome),
    /// The next of a conversation's stream.
    Step {
        /// Which conversation.
        conversation: ConversationId,
        /// What comes next in it.
        step: Step,
        /// To be given to [`Session::consumed`] when the application has taken it.
        credit_bytes: u64,
    },
    /// Where a conversation's stream stands.
    State {
        /// Which conversation.
        conversation: ConversationId,
        /// The last seq that the reader may see.
        head: Seq,
        /// The cursor that the server keeps for this device.
        delivered: Seq,
        /// The user's read cursor.
        read: Seq,
    },
    /// Everything that moved while the device was away has come.
    UpToDate,
    /// No more of this conversation, and why.
    Ended {
        /// Which conversation.
        conversation: ConversationId,
        /// Why.
        refusal: v1::Refusal,
    },
    /// The server has these cursor moves now, or refuses them.
    CursorsMoved(v1::CursorsMoved),
    /// A send is decided.
    Answered {
        /// Whose.
        ticket: S,
        /// How.
        answer: Answer,
    },
    /// The session is over and this send has no answer.
    Abandoned {
        /// Whose.
        ticket: S,
        /// It was transmitted, so it may have been accepted.
        maybe_accepted: bool,
    },
    /// A request's answer.
    Response {
        /// Whose.
        ticket: R,
        /// What was found or done.
        result: Result<v1::response::Result, v1::Refusal>,
    },
    /// A request that was transmitted and whose connection ended before its answer, or one that waited when the
    /// session ended.
    Lost {
        /// Whose.
        ticket: R,
        /// It was transmitted, so it may have been carried out.
        maybe_done: bool,
    },
    /// The gateway is going away, and the moment to connect elsewhere has come.
    Leave,
    /// The session is refused for good.
    Final(v1::Refusal),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Offline,
    Greeting,
    Open,
}

/// What one conversation has; most have only one of the parts.
#[derive(Debug)]
struct Conversation<S> {
    id: ConversationId,
    outbox: Option<Box<Outbox<S>>>,
    stream: Option<Stream>,
    cursors: Cursors,
    /// In [`Session::ready`].
    is_ready: bool,
    question: Question,
    /// Cursors wait in [`Session::moved`].
    is_moved: bool,
    /// A stream of this conversation ran on this connection before.
    streamed: bool,
    /// When its first send in flight went out, or its last answer came.
    answered_ms: u64,
    /// Its sends in flight have had no answer for so long that they leave the window to the others.
    stuck: bool,
    /// The newest of its moments in [`Session::wakes`].
    wakes_at: u64,
    /// How far a stream had come that has ended: one that begins by itself goes on from there.
    passed: Seq,
}

/// Where the question for the send state is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Question {
    /// There is none.
    #[default]
    None,
    /// In [`Session::questions`].
    Waits,
    /// In [`Session::asks`] under this number.
    Asked(u64),
}

#[derive(Debug)]
struct Pending<R> {
    /// What to transmit; `None` once that is done.
    call: Option<Call>,
    ticket: R,
}

/// A device's session; see the module.
#[derive(Debug)]
pub struct Session<S, R> {
    config: Config,
    draws: Draws,
    phase: Phase,
    /// Of the gateway on this connection.
    limits: Limits,
    app: String,
    conversations: HashMap<ConversationId, Conversation<S>, FixedState>,
    control: VecDeque<ClientFrame>,
    ready: VecDeque<ConversationId>,
    moved: Vec<ConversationId>,
    wakes: BTreeSet<(u64, ConversationId)>,
    requests: BTreeMap<u64, Pending<R>>,
    /// Requests that were not transmitted yet.
    calls: VecDeque<u64>,
    /// Conversations whose send state must be asked for.
    questions: VecDeque<ConversationId>,
    /// The same, transmitted.
    asks: BTreeMap<u64, ConversationId>,
    /// Requests and questions without an answer on this connection.
    calls_out: usize,
    next_request: u64,
    outputs: VecDeque<Output<S, R>>,
    in_flight: usize,
    /// Those of stuck conversations among them.
    stuck: usize,
    credit: Credit,
    times: Times,
}

#[derive(Debug, Clone, Copy, Default)]
struct Limits {
    body_bytes: usize,
    frame_bytes: usize,
    in_flight: usize,
    /// Sends in one run; 0 where the gateway knows none.
    run_sends: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Credit {
    /// Came and was not consumed yet.
    held: u64,
    /// Was consumed and not granted again yet.
    owed: u64,
}

/// Moments and deadlines, in ms of the caller's clock.
#[derive(Debug, Clone, Copy, Default)]
struct Times {
    heard: u64,
    pinged: Option<u64>,
    answered: u64,
    moves_due: Option<u64>,
    leave: Option<u64>,
    leaving: bool,
    /// The window is full until then, unless an answer comes: stuck conversations are looked for.
    room: Option<u64>,
}

impl<S, R> Session<S, R> {
    /// A session that has never been connected. The seed spreads its waits.
    pub fn new(config: Config, seed: u64) -> Self {
        Self {
            config,
            draws: Draws::new(seed),
            phase: Phase::Offline,
            limits: Limits::default(),
            app: String::new(),
            conversations: HashMap::with_hasher(FixedState::with_seed(seed)),
            control: VecDeque::new(),
            ready: VecDeque::new(),
            moved: Vec::new(),
            wakes: BTreeSet::new(),
            requests: BTreeMap::new(),
            calls: VecDeque::new(),
            questions: VecDeque::new(),
            asks: BTreeMap::new(),
            calls_out: 0,
            next_request: 1,
            outputs: VecDeque::new(),
            in_flight: 0,
            stuck: 0,
            credit: Credit::default(),
            times: Times::default(),
        }
    }

    /// What happened next.
    pub fn poll(&mut self) -> Option<Output<S, R>> {
        self.outputs.pop_front()
    }

    /// Queues a message; it goes when its turn and the window come. Its numbers and conversation are filled in here.
    pub fn send(&mut self, now: u64, id: &ConversationId, send: v1::Send, ticket: S) -> Result<(), (Full, S)> {
        let Some(conversation) = self.conversation(id) else { return Err((Full::Conversations, ticket)) };
        let send = v1::Send { conversation: id.as_str().into(), send_no: 0, done_no: 0, ..send };
        conversation.outbox.get_or_insert_default().push(now, send, ticket);
        self.settle(now, id.as_str());
        Ok(())
    }

    /// Begins a conversation's stream, or begins it anew elsewhere.
    pub fn subscribe(&mut self, id: &ConversationId, start: Start) -> Result<(), Full> {
        let open = self.phase == Phase::Open;
        let conversation = self.conversation(id).ok_or(Full::Conversations)?;
        conversation.stream = Some(Stream::new(start, open && conversation.streamed));
        conversation.streamed = open;
        if open {
            self.control.push_back(subscription(id, start.after()).into());
        }
        Ok(())
    }

    /// Ends a conversation's stream. What was handed on stays valid.
    pub fn unsubscribe(&mut self, id: &ConversationId) {
        if self.conversations.get_mut(id.as_str()).and_then(|c| c.stream.take()).is_some() && self.phase == Phase::Open
        {
            self.control.push_back(v1::Unsubscribe { conversation: id.as_str().into() }.into());
        }
    }

    /// Moves cursors: the device has stored everything up to `delivered`, its user has seen everything up to `read`
    /// (0 leaves one where it is). A delivered cursor stops at what came; nothing moves back. Returns where the
    /// delivered cursor stands afterwards.
    pub fn move_cursors(&mut self, now: u64, id: &ConversationId, delivered: Seq, read: Seq) -> Result<Seq, Full> {
        let conversation = self.conversation(id).ok_or(Full::Conversations)?;
        let received = conversation.stream.as_ref().map(|s| s.cursor().unwrap_or_default());
        let moved = conversation.cursors.raise(delivered, read, received);
        let at = conversation.cursors.delivered();
        if moved && !std::mem::replace(&mut conversation.is_moved, true) {
            self.moved.push(id.clone());
            self.times.moves_due.get_or_insert(now + self.config.cursor_interval_ms);
        }
        Ok(at)
    }

    /// The application has taken this many event bytes: the gateway may send as many again.
    pub fn consumed(&mut self, credit_bytes: u64) {
        self.credit.held = self.credit.held.saturating_sub(credit_bytes);
        self.credit.owed += credit_bytes;
    }

    /// Puts a question, now or when there is a connection.
    pub fn request(&mut self, call: Call, ticket: R) -> Result<(), (Full, R)> {
        if self.requests.len() >= limits::DEVICE_REQUESTS {
            return Err((Full::Requests, ticket));
        }
        let id = self.request_id();
        self.requests.insert(id, Pending { call: Some(call), ticket });
        self.calls.push_back(id);
        Ok(())
    }

    /// Forgets requests that nobody waits for any more.
    pub fn forget_requests(&mut self, mut is_waited_for: impl FnMut(&R) -> bool) {
        self.requests.retain(|_, p| is_waited_for(&p.ticket));
        self.calls.retain(|id| self.requests.contains_key(id));
    }

    /// The highest send number given in a conversation, and up to where every send has its answer.
    pub fn send_position(&self, id: &ConversationId) -> Option<(SendNo, SendNo)> {
        Some(self.conversations.get(id.as_str())?.outbox.as_ref()?.position())
    }

    /// Whether any send waits for its answer.
    pub fn has_sends(&self) -> bool {
        self.conversations.values().any(|c| c.outbox.as_ref().is_some_and(|o| !o.is_idle()))
    }

    /// The session is over: hands back everything that has no answer.
    pub fn finish(&mut self) {
        self.disconnected();
        for conversation in self.conversations.values_mut() {
            let Some(outbox) = &mut conversation.outbox else { continue };
            let left = outbox.drain();
            self.outputs.extend(left.map(|(ticket, maybe_accepted)| Output::Abandoned { ticket, maybe_accepted }));
        }
        let left = std::mem::take(&mut self.requests);
        self.outputs.extend(left.into_values().map(|p| Output::Lost { ticket: p.ticket, maybe_done: false }));
    }

    fn request_id(&mut self) -> u64 {
        self.next_request += 1;
        self.next_request - 1
    }

    /// The conversation's entry, made if there is room. When the table is full, entries that hold nothing but a count
    /// that can be asked for again make room.
    fn conversation(&mut self, id: &ConversationId) -> Option<&mut Conversation<S>> {
        if !self.conversations.contains_key(id.as_str()) {
            if self.conversations.len() >= limits::SESSION_SUBSCRIPTIONS {
                self.conversations.retain(|_, c| c.is_busy());
            }
            if self.conversations.len() >= limits::SESSION_SUBSCRIPTIONS {
                return None;
            }
        }
        Some(self.conversations.entry(id.clone()).or_insert_with(|| Conversation::new(id.clone())))
    }
}

impl<S> Conversation<S> {
    fn new(id: ConversationId) -> Self {
        Self {
            id,
            outbox: None,
            stream: None,
            cursors: Cursors::default(),
            is_ready: false,
            question: Question::None,
            is_moved: false,
            streamed: false,
            answered_ms: 0,
            stuck: false,
            wakes_at: 0,
            passed: Seq(0),
        }
    }

    fn is_busy(&self) -> bool {
        self.stream.is_some()
            || self.is_moved
            || self.question != Question::None
            || self.outbox.as_ref().is_some_and(|o| !o.is_idle())
    }
}

impl Start {
    fn after(self) -> Option<Seq> {
        match self {
            Start::After(seq) => Some(seq),
            Start::Head => None,
        }
    }
}

fn subscription(id: &ConversationId, after: Option<Seq>) -> v1::Subscribe {
    v1::Subscribe {
        conversation: id.as_str().into(),
        after_seq: after.unwrap_or_default().0,
        from_head: after.is_none(),
    }
}

/// What an item costs of the credit: its event's bytes. Both halves count with this one function.
pub fn credit_cost(item: &v1::Item) -> u64 {
    match &item.item {
        Some(v1::item::Item::Record(record)) => record.len() as u64,
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
