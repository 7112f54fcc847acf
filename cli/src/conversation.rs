//! `stentor conversation`: create, add, remove, show, list, over the public gRPC API in a user's name.

use std::time::{SystemTime, UNIX_EPOCH};

use rand::Rng;
use serde_json::json;
use stentor_proto::{
    ids::{ConversationId, UserId},
    v1::{
        self, ConversationKind, CreateRequest, ListRequest, ParticipantRequest, ShowRequest,
        conversations_client::ConversationsClient,
    },
};

use stentor_transport::grpc::Channel;

use crate::{
    api::Api,
    args::{ConversationVerb, HistoryShown, Kind, Role},
    context,
    event_line::short,
    failure::Failure,
    output::Output,
};

/// Conversations asked for at once by `list`.
const PAGE: u32 = 500;

/// Calls the verb.
pub(crate) async fn run(verb: ConversationVerb, output: Output) -> Result<(), Failure> {
    let api = Api::new(&context::api(verb.context())?)?;
    match verb {
        ConversationVerb::Create { kind, id, participants, history, .. } => {
            let request = create_request(kind, id, participants, history)?;
            let answer = api.call(|c| create(api.clone(), c, request.clone())).await?;
            if output.json() {
                return output.value(&json!({ "conversation": answer.conversation, "seq": answer.seq }));
            }
            output.text(&answer.conversation)
        }
        ConversationVerb::Add { conversation, participant, role, .. } => {
            let request = participant_request(&conversation, &participant, role)?;
            let answer = api.change(|c| add(api.clone(), c, request.clone())).await?;
            changed(output, &conversation, answer, &format!("added {participant}"))
        }
        ConversationVerb::Remove { conversation, participant, .. } => {
            let request = participant_request(&conversation, &participant, None)?;
            let answer = api.change(|c| remove(api.clone(), c, request.clone())).await?;
            changed(output, &conversation, answer, &format!("removed {participant}"))
        }
        ConversationVerb::Show { conversation, .. } => {
            let request = ShowRequest { conversation, linearizable: true };
            let shown = api.call(|c| show(api.clone(), c, request.clone())).await?;
            print(output, &[shown])
        }
        ConversationVerb::List { .. } => list_all(&api, output).await,
    }
}

type Answer<T> = Result<tonic::Response<T>, tonic::Status>;

async fn create(api: Api, channel: Channel, request: CreateRequest) -> Answer<v1::CreateResponse> {
    ConversationsClient::new(channel).create(api.request(request)).await
}

async fn add(api: Api, channel: Channel, request: ParticipantRequest) -> Answer<v1::ParticipantResponse> {
    ConversationsClient::new(channel).add_participant(api.request(request)).await
}

async fn remove(api: Api, channel: Channel, request: ParticipantRequest) -> Answer<v1::ParticipantResponse> {
    ConversationsClient::new(channel).remove_participant(api.request(request)).await
}

async fn show(api: Api, channel: Channel, request: ShowRequest) -> Answer<v1::Conversation> {
    ConversationsClient::new(channel).show(api.request(request)).await
}

async fn list(api: Api, channel: Channel, request: ListRequest) -> Answer<v1::ListResponse> {
    ConversationsClient::new(channel).list(api.request(request)).await
}

fn create_request(
    kind: Kind,
    id: Option<String>,
    participants: Vec<String>,
    history: HistoryShown,
) -> Result<CreateRequest, Failure> {
    if let Some(id) = &id {
        ConversationId::new(id)?;
    }
    participants.iter().try_for_each(|user| UserId::new(user).map(drop))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let kind = match kind {
        Kind::Direct => ConversationKind::Direct,
        Kind::Group => ConversationKind::Group,
        Kind::Channel => ConversationKind::Channel,
    };
    Ok(CreateRequest {
        conversation: id.unwrap_or_default(),
        kind: kind.into(),
        participants,
        history_full: history == HistoryShown::Full,
        // The call may be repeated at another broker; one conversation must come of it.
        client_id: format!("create-{:016x}", rand::rng().random::<u64>()),
        first_try_ms: now.as_millis() as u64,
    })
}

fn participant_request(conversation: &str, user: &str, role: Option<Role>) -> Result<ParticipantRequest, Failure> {
    ConversationId::new(conversation)?;
    UserId::new(user)?;
    let role = match role {
        None => v1::Role::Unspecified,
        Some(Role::Reader) => v1::Role::Reader,
        Some(Role::Writer) => v1::Role::Writer,
        Some(Role::Admin) => v1::Role::Admin,
        Some(Role::Owner) => v1::Role::Owner,
    };
    Ok(ParticipantRequest {
        conversation: conversation.into(),
        user: user.into(),
        role: role.into(),
        expect_version: None,
    })
}

fn changed(output: Output, conversation: &str, answer: v1::ParticipantResponse, what: &str) -> Result<(), Failure> {
    if output.json() {
        let value = json!({ "conversation": conversation, "seq": answer.seq, "version": answer.version });
        return output.value(&value);
    }
    output.text(&format!("{what} at seq {}", answer.seq))
}

async fn list_all(api: &Api, output: Output) -> Result<(), Failure> {
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let request = ListRequest { after, limit: PAGE };
        let page = api.call(|c| list(api.clone(), c, request.clone())).await?;
        all.extend(page.conversations);
        after = page.next;
        if after.is_empty() {
            return print(output, &all);
        }
    }
}

fn print(output: Output, conversations: &[v1::Conversation]) -> Result<(), Failure> {
    let kind = |c: &v1::Conversation| short(c.kind().as_str_name(), "CONVERSATION_KIND_");
    let role = |c: &v1::Conversation| short(c.role().as_str_name(), "ROLE_");
    if output.json() {
        return conversations.iter().try_for_each(|c| {
            output.value(&json!({
                "conversation": c.conversation, "kind": kind(c), "head": c.head, "version": c.version,
                "epoch": c.epoch, "participants": c.participants, "role": role(c), "since_seq": c.since_seq,
            }))
        });
    }
    let mut rows = vec![["conversation", "kind", "head", "participants", "role"].map(str::to_owned).to_vec()];
    rows.extend(
        conversations
            .iter()
            .map(|c| vec![c.conversation.clone(), kind(c), c.head.to_string(), c.participants.to_string(), role(c)]),
    );
    output.table(&rows)
}
