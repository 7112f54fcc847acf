//! Calls on a connection (`Request`): forwarded to the shard that knows, answered with the same id. Must never leave a
//! call without an answer, nor let one be applied twice because its answer was lost on the way here.

use hashbrown::HashMap;
use stentor_engine::{command, effect::Outcome, limits};
use stentor_proto::{
    Bytes,
    ids::{ConversationId, UserId},
    internal::{self, change_participant::Change, gateway_frame::Frame, lookup},
    reason::Reason,
    v1::{self, ConversationKind, Refusal, request, response},
};
use stentor_transport::Host;

use super::{Session, unexpected};
use crate::inbox::{Call, Purpose, Reply};

/// Lists that wait for the conversations in them.
#[derive(Debug, Default)]
pub(super) struct Calls {
    /// By a number of their own.
    lists: HashMap<u64, List>,
    next_list: u64,
}

#[derive(Debug)]
struct List {
    /// Of the call that asked for it.
    id: u64,
    conversations: Vec<Option<v1::Conversation>>,
    waiting: usize,
    next: String,
}

impl Session {
    pub(super) fn call(&mut self, request: v1::Request) {
        use request::Call as C;
        self.server.call_started();
        self.core.metrics.calls.inc();
        let id = request.id;
        let begun = self.may_call().and_then(|()| match request.call {
            Some(C::History(history)) => self.history(id, history),
            Some(C::Create(create)) => self.create(id, create),
            Some(C::Add(add)) => self.change(id, &add, Change::Add),
            Some(C::Remove(remove)) => self.change(id, &remove, Change::Remove),
            Some(C::Show(show)) => self.show(id, show, Call::Show),
            Some(C::List(list)) => self.list_call(id, list),
            Some(C::SendState(send_state)) => self.send_state(id, &send_state),
            None => Err(Reason::Malformed),
        });
        if let Err(reason) = begun {
            self.respond(id, response::Result::Refusal(reason.refusal()));
        }
    }

    fn history(&mut self, id: u64, request: v1::HistoryRequest) -> Result<(), Reason> {
        let conversation = checked(&request.conversation)?;
        if request.after_seq.is_some() && request.before_seq.is_some() {
            return Err(Reason::Malformed);
        }
        let max_bytes = self.core.config.limits.max_frame_bytes - limits::FRAME_OVERHEAD_BYTES;
        let shard = self.core.shard_of(&self.who.app, conversation.as_str())?;
        let frame = Frame::Read(self.read_request(shard, request, max_bytes, self.admin));
        self.ask_call(id, shard, frame, Call::History);
        Ok(())
    }

    fn create(&mut self, id: u64, create: v1::CreateRequest) -> Result<(), Reason> {
        let users: Vec<UserId> =
            create.participants.iter().map(UserId::new).collect::<Result<_, _>>().map_err(|_| Reason::BadId)?;
        let direct = create.kind() == ConversationKind::Direct;
        let conversation = match (&users[..], create.conversation.as_str()) {
            ([other], "") if direct => ConversationId::direct(&self.who.user, other),
            (_, "") => ConversationId::new(fresh_id(&self.core.host)).map_err(|_| Reason::Internal)?,
            (_, given) => checked(given)?,
        };
        // A call without a key of its own gets one, so that an attempt whose answer was lost is not a second call.
        let client_id = if create.client_id.is_empty() { fresh_id(&self.core.host) } else { create.client_id };
        let op = internal::Create {
            actor: Some(command::actor(&self.who.user, Some(&self.who.device), self.admin)),
            kind: create.kind,
            participants: users.iter().map(|user| Bytes::copy_from_slice(user.as_str().as_bytes())).collect(),
            history_full: create.history_full,
            client_key: Some(internal::ClientKey { client_id: client_id.into(), first_try_ms: create.first_try_ms }),
        };
        let command = command::create(&self.who.app, &conversation, op);
        command::check(&command)?;
        let call = Call::Create { conversation: conversation.as_str().into() };
        self.propose(conversation.as_str(), &command, Purpose::Call { id, call });
        Ok(())
    }

    fn change(&mut self, id: u64, request: &v1::ParticipantRequest, change: Change) -> Result<(), Reason> {
        let conversation = checked(&request.conversation)?;
        let op = internal::ChangeParticipant {
            actor: Some(command::actor(&self.who.user, Some(&self.who.device), self.admin)),
            user: Bytes::copy_from_slice(request.user.as_bytes()),
            change: change as i32,
            role: request.role,
            expect_version: request.expect_version,
            client_key: Some(internal::ClientKey { client_id: fresh_id(&self.core.host).into(), first_try_ms: 0 }),
        };
        let command = command::change_participant(&self.who.app, &conversation, op);
        command::check(&command)?;
        self.propose(conversation.as_str(), &command, Purpose::Call { id, call: Call::Participant });
        Ok(())
    }

    fn show(&mut self, id: u64, request: v1::ShowRequest, call: Call) -> Result<(), Reason> {
        let conversation = checked(&request.conversation)?;
        let shard = self.core.shard_of(&self.who.app, conversation.as_str())?;
        let frame = Frame::Lookup(self.lookup(shard, lookup::What::Show(request)));
        self.ask_call(id, shard, frame, call);
        Ok(())
    }

    fn list_call(&mut self, id: u64, mut request: v1::ListRequest) -> Result<(), Reason> {
        request.limit = if request.limit == 0 { limits::LIST_PAGE } else { request.limit.min(limits::LIST_PAGE) };
        let shard = self.core.shard_of(&self.who.app, self.who.user.as_str())?;
        let frame = Frame::Lookup(self.lookup(shard, lookup::What::Conversations(request)));
        self.ask_call(id, shard, frame, Call::List);
        Ok(())
    }

    fn send_state(&mut self, id: u64, request: &v1::SendStateRequest) -> Result<(), Reason> {
        let conversation = checked(&request.conversation)?;
        let shard = self.core.shard_of(&self.who.app, conversation.as_str())?;
        let frame = self.heads_of(shard, vec![conversation.as_str().into()]);
        self.ask_call(id, shard, frame, Call::SendState);
        Ok(())
    }

    fn ask_call(&self, id: u64, shard: stentor_proto::ids::ShardId, frame: Frame, call: Call) {
        let ticket = self.ticket(Purpose::Call { id, call });
        self.core.ask(shard, frame, ticket);
    }

    pub(super) fn call_answered(&mut self, id: u64, call: Call, result: Result<Reply, Refusal>) {
        use response::Result as R;
        let answer = match (call, result) {
            (Call::ListShow { list, place }, result) => return self.list_shown(list, place, result),
            (Call::List, Ok(Reply::Conversations(state))) => return self.list_found(id, state),
            (Call::History, Ok(Reply::Page(page))) => R::History(page),
            (Call::Show, Ok(Reply::Show(conversation))) => R::Show(conversation),
            (Call::Create { conversation }, Ok(Reply::Outcome(Outcome::Accepted { seq, repeat, .. }))) => {
                R::Create(v1::CreateResponse { conversation, seq: seq.0, repeat })
            }
            (Call::Participant, Ok(Reply::Outcome(Outcome::Accepted { seq, repeat, version, .. }))) => {
                R::Participant(v1::ParticipantResponse { seq: seq.0, version: version.0, repeat })
            }
            (Call::SendState, Ok(Reply::Heads(mut states))) => match states.pop() {
                Some(v1::ConversationState { refusal: Some(refusal), .. }) => R::Refusal(refusal),
                Some(state) => R::SendState(v1::SendStateResponse { last: state.last_send_no, done_no: state.done_no }),
                None => R::Refusal(Reason::Internal.refusal()),
            },
            (_, Ok(Reply::Outcome(outcome))) => {
                R::Refusal(outcome.refusal().unwrap_or_else(|| Reason::Internal.refusal()))
            }
            (_, other) => R::Refusal(unexpected(other)),
        };
        self.respond(id, answer);
    }

    /// The user's shard knows which conversations; what they are now is asked of each one's own shard.
    fn list_found(&mut self, id: u64, state: internal::UserState) {
        let names: Vec<String> =
            state.conversations.into_iter().filter(|c| !c.removed).map(|c| c.conversation).collect();
        let list = self.calls.next_list;
        self.calls.next_list += 1;
        let begun = List { id, conversations: vec![None; names.len()], waiting: names.len(), next: state.next };
        self.calls.lists.insert(list, begun);
        for (place, conversation) in names.into_iter().enumerate() {
            let request = v1::ShowRequest { conversation, linearizable: false };
            if let Err(reason) = self.show(id, request, Call::ListShow { list, place }) {
                self.list_shown(list, place, Err(reason.refusal()));
            }
        }
        self.list_done(list);
    }

    fn list_shown(&mut self, number: u64, place: usize, result: Result<Reply, Refusal>) {
        let Some(list) = self.calls.lists.get_mut(&number) else { return };
        list.waiting = list.waiting.saturating_sub(1);
        match result {
            Ok(Reply::Show(conversation)) => {
                if let Some(found) = list.conversations.get_mut(place) {
                    *found = Some(conversation);
                }
            }
            other => {
                let refusal = unexpected(other);
                if refusal.retryable {
                    // Half a list must not look like a whole one.
                    let id = list.id;
                    self.calls.lists.remove(&number);
                    return self.respond(id, response::Result::Refusal(refusal));
                }
                // He was removed, and his own shard has not heard of it yet.
            }
        }
        self.list_done(number);
    }

    fn list_done(&mut self, number: u64) {
        if self.calls.lists.get(&number).is_some_and(|list| list.waiting == 0)
            && let Some(list) = self.calls.lists.remove(&number)
        {
            let conversations = list.conversations.into_iter().flatten().collect();
            self.respond(list.id, response::Result::List(v1::ListResponse { conversations, next: list.next }));
        }
    }

    fn respond(&mut self, id: u64, result: response::Result) {
        self.server.call_answered();
        self.out.push(v1::Response { id, result: Some(result) });
    }
}

fn checked(conversation: &str) -> Result<ConversationId, Reason> {
    ConversationId::new(conversation).map_err(|_| Reason::BadId)
}

/// 128 random bits as text: nobody else's id.
fn fresh_id(host: &Host) -> String {
    let mut id = String::with_capacity(32);
    for byte in host.random::<[u8; 16]>() {
        id.extend([byte >> 4, byte & 15].iter().filter_map(|&digit| char::from_digit(digit.into(), 16)));
    }
    id
}
