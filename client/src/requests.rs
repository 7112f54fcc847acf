//! Calls over the connection: history, conversations, participants. Must never repeat by itself a call that may have
//! been carried out, unless repeating it cannot do it twice.

use std::time::Duration;

use stentor_engine::session::client::{Backoff, Draws};
use stentor_proto::{
    ids::{ClientId, ConversationId, SendNo, Seq, UserId, Version, key_crc},
    reason::Reason,
    record,
    v1::{self, Conversation, ConversationKind, ListResponse, Role, item, request::Call, response},
};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout_at},
};

use crate::{
    Client, ClientError, Event, Hidden,
    shared::{Command, Reply},
};

/// Waits before a call that was refused for now goes again.
const AGAIN: Backoff = Backoff { first_ms: 50, max_ms: 1_000 };

/// Which part of a conversation's history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct History {
    /// Ascending from here, exclusive.
    pub after_seq: Option<Seq>,
    /// The last ones below here, exclusive; ascending all the same. Without either: the last ones.
    pub before_seq: Option<Seq>,
    /// How many items; 0 is as many as one answer holds.
    pub limit: u32,
    /// Sees every send that was acknowledged before the call, whatever the servers' clocks do.
    pub linearizable: bool,
    /// The answer must know the conversation up to here.
    pub at_least_seq: Seq,
}

impl History {
    /// Ascending, after this seq.
    pub fn after(seq: Seq) -> Self {
        Self { after_seq: Some(seq), ..Self::default() }
    }

    /// The last ones before this seq.
    pub fn before(seq: Seq) -> Self {
        Self { before_seq: Some(seq), ..Self::default() }
    }

    /// The last `limit` ones.
    pub fn last(limit: u32) -> Self {
        Self { limit, ..Self::default() }
    }

    /// At most so many items.
    #[must_use]
    pub fn limit(self, limit: u32) -> Self {
        Self { limit, ..self }
    }

    /// Reads linearizably.
    #[must_use]
    pub fn linearizable(self) -> Self {
        Self { linearizable: true, ..self }
    }
}

/// One step of a history.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "events are the rule; a box would cost each of them an allocation")]
pub enum Item {
    /// An event.
    Event(Event),
    /// A stretch that this reader does not get.
    Hidden(Hidden),
}

/// A dense piece of history, ascending.
#[derive(Debug, Clone, PartialEq)]
pub struct HistoryPage {
    /// Events and hidden stretches without a gap.
    pub items: Vec<Item>,
    /// The reader's head when this was read.
    pub head: Seq,
    /// The limit or the answer's size ended it.
    pub more: bool,
}

/// What a conversation is created with.
#[derive(Debug, Clone)]
pub struct Create {
    /// Its id; `None` lets the server give one. A direct one has its own.
    pub conversation: Option<ConversationId>,
    /// Direct, group or channel.
    pub kind: ConversationKind,
    /// Who takes part besides the caller.
    pub participants: Vec<UserId>,
    /// Those who join later see everything from the beginning.
    pub history_full: bool,
    /// The caller's own key; without one the client makes one, so that a repeat over a reconnect creates nothing twice.
    pub client_id: Option<ClientId>,
}

impl Create {
    /// A group.
    pub fn group(participants: impl IntoIterator<Item = UserId>) -> Self {
        Self {
            conversation: None,
            kind: ConversationKind::Group,
            participants: participants.into_iter().collect(),
            history_full: false,
            client_id: None,
        }
    }

    /// The one conversation with another user.
    pub fn direct(with: UserId) -> Self {
        Self { kind: ConversationKind::Direct, ..Self::group([with]) }
    }

    /// Under this id.
    #[must_use]
    pub fn id(self, conversation: ConversationId) -> Self {
        Self { conversation: Some(conversation), ..self }
    }
}

/// A conversation that is there now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// Its id.
    pub conversation: ConversationId,
    /// The seq of the event of its creation; those of its first participants follow.
    pub seq: Seq,
    /// It was there by an earlier attempt.
    pub repeat: bool,
}

/// A change of participants that took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParticipantChanged {
    /// The change's event.
    pub seq: Seq,
    /// The conversation's version after it.
    pub version: Version,
    /// It had been done by an earlier attempt.
    pub repeat: bool,
}

/// This device's send count in a conversation, as the server has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SendState {
    /// The last number that was consumed.
    pub last: SendNo,
    /// Every send up to here has an answer that the device has stored.
    pub done: SendNo,
}

/// Whether a call may be repeated without being carried out twice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Harmless,
    Never,
}

impl Client {
    /// Reads history. Every event is verified, and the page is dense.
    pub async fn history(&self, conversation: &ConversationId, which: History) -> Result<HistoryPage, ClientError> {
        let call = Call::History(v1::HistoryRequest {
            conversation: conversation.as_str().into(),
            after_seq: which.after_seq.map(|s| s.0),
            before_seq: which.before_seq.map(|s| s.0),
            limit: which.limit,
            linearizable: which.linearizable,
            at_least_seq: which.at_least_seq.0,
        });
        match self.call(call, Repeat::Harmless).await? {
            response::Result::History(page) => self.page(conversation, which.after_seq, page),
            _ => Err(other_answer()),
        }
    }

    fn page(
        &self,
        conversation: &ConversationId,
        after: Option<Seq>,
        page: v1::HistoryResponse,
    ) -> Result<HistoryPage, ClientError> {
        let app = self.shared.identity.get().map_or("", |identity| identity.app.as_str());
        let key_crc = key_crc(app.as_bytes(), conversation.as_str().as_bytes());
        let mut expected = after.map(|seq| seq.0.saturating_add(1));
        let mut items = Vec::with_capacity(page.items.len());
        for item in page.items {
            let (from, to, item) = match item.item {
                Some(item::Item::Record(bytes)) => {
                    let event = record::decode(&bytes, key_crc).map_err(|e| ClientError::Damaged(e.to_string()))?;
                    (event.header.seq, event.header.seq, Item::Event(event.into()))
                }
                Some(item::Item::Hidden(hidden)) => (hidden.from, hidden.to, Item::Hidden(hidden.into())),
                None => return Err(ClientError::Damaged("an item without content".into())),
            };
            if expected.is_some_and(|expected| expected != from) || from > to || to == u64::MAX {
                return Err(ClientError::Damaged(format!("seq {from} does not follow")));
            }
            expected = Some(to + 1);
            items.push(item);
        }
        Ok(HistoryPage { items, head: Seq(page.head), more: page.more })
    }

    /// Creates a conversation; the caller becomes its owner.
    pub async fn create_conversation(&self, create: Create) -> Result<Created, ClientError> {
        let own_key = || format!("create-{:032x}", self.shared.host.random::<u128>());
        let call = Call::Create(v1::CreateRequest {
            conversation: create.conversation.map(|id| id.as_str().to_owned()).unwrap_or_default(),
            kind: create.kind as i32,
            participants: create.participants.iter().map(|user| user.as_str().to_owned()).collect(),
            history_full: create.history_full,
            client_id: create.client_id.map_or_else(own_key, |id| id.as_str().to_owned()),
            first_try_ms: self.shared.host.wall_ms(),
        });
        match self.call(call, Repeat::Harmless).await? {
            response::Result::Create(created) => Ok(Created {
                conversation: ConversationId::new(&created.conversation)
                    .map_err(|e| ClientError::Damaged(e.to_string()))?,
                seq: Seq(created.seq),
                repeat: created.repeat,
            }),
            _ => Err(other_answer()),
        }
    }

    /// Adds a participant.
    pub async fn add(
        &self,
        conversation: &ConversationId,
        user: &UserId,
        role: Role,
    ) -> Result<ParticipantChanged, ClientError> {
        self.participant(Call::Add(participant(conversation, user, role))).await
    }

    /// Removes a participant; himself, to leave.
    pub async fn remove(
        &self,
        conversation: &ConversationId,
        user: &UserId,
    ) -> Result<ParticipantChanged, ClientError> {
        self.participant(Call::Remove(participant(conversation, user, Role::Unspecified))).await
    }

    async fn participant(&self, call: Call) -> Result<ParticipantChanged, ClientError> {
        match self.call(call, Repeat::Never).await? {
            response::Result::Participant(p) => {
                Ok(ParticipantChanged { seq: Seq(p.seq), version: Version(p.version), repeat: p.repeat })
            }
            _ => Err(other_answer()),
        }
    }

    /// What a conversation is and where it stands, as far as this user may know.
    pub async fn show(&self, conversation: &ConversationId) -> Result<Conversation, ClientError> {
        let call = v1::ShowRequest { conversation: conversation.as_str().into(), linearizable: false };
        match self.call(Call::Show(call), Repeat::Harmless).await? {
            response::Result::Show(shown) => Ok(shown),
            _ => Err(other_answer()),
        }
    }

    /// The user's conversations, a page at a time: from after `after` (empty: from the first), at most `limit`
    /// (0: as many as one answer holds). The answer's `next` is the next call's `after`, empty at the end.
    pub async fn list(&self, after: &str, limit: u32) -> Result<ListResponse, ClientError> {
        let call = v1::ListRequest { after: after.into(), limit };
        match self.call(Call::List(call), Repeat::Harmless).await? {
            response::Result::List(page) => Ok(page),
            _ => Err(other_answer()),
        }
    }

    /// This device's send count in a conversation. Sends ask for it by themselves.
    pub async fn send_state(&self, conversation: &ConversationId) -> Result<SendState, ClientError> {
        let call = v1::SendStateRequest { conversation: conversation.as_str().into() };
        match self.call(Call::SendState(call), Repeat::Harmless).await? {
            response::Result::SendState(s) => Ok(SendState { last: SendNo(s.last), done: SendNo(s.done_no) }),
            _ => Err(other_answer()),
        }
    }

    async fn call(&self, call: Call, repeat: Repeat) -> Result<response::Result, ClientError> {
        let until = Instant::now() + self.request_timeout;
        let mut draws = Draws::new(self.shared.host.random());
        let mut doubt = false;
        for attempt in 0.. {
            let (reply, answer) = oneshot::channel();
            let command = Command::Request { call: Box::new(call.clone()), reply };
            let asked = async {
                self.command(command).await?;
                answer.await.map_err(|_| self.over())
            };
            let Ok(reply) = timeout_at(until, asked).await else { break };
            let wait = Duration::from_millis(AGAIN.wait_ms(attempt, &mut draws));
            let in_time = Instant::now() + wait < until;
            match reply? {
                Reply::Answer(Ok(result)) => return Ok(result),
                Reply::Answer(Err(refusal)) => {
                    doubt |= refusal.reason == Reason::OutcomeUnknown.code();
                    let last = repeat == Repeat::Never || !in_time;
                    if doubt && last {
                        return Err(ClientError::Unknown(refusal.message));
                    }
                    if !refusal.retryable || last {
                        return Err(ClientError::Refused(refusal));
                    }
                }
                Reply::Full(full) => return Err(full.into()),
                Reply::Lost { .. } if self.shared.is_closed() => return Err(self.over()),
                Reply::Lost { maybe_done: true } if repeat == Repeat::Never => {
                    return Err(ClientError::Unknown("the connection ended before the answer came".into()));
                }
                Reply::Lost { .. } => {}
            }
            sleep(wait).await;
        }
        Err(ClientError::Unknown(format!("no answer within {} ms", self.request_timeout.as_millis())))
    }
}

fn participant(conversation: &ConversationId, user: &UserId, role: Role) -> v1::ParticipantRequest {
    v1::ParticipantRequest {
        conversation: conversation.as_str().into(),
        user: user.as_str().into(),
        role: role as i32,
        expect_version: None,
    }
}

fn other_answer() -> ClientError {
    ClientError::Damaged("the answer is to another question".into())
}
