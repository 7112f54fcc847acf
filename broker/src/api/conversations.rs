//! `stentor.v1.Conversations`: creating, participants, description, list. Must never answer what the caller may not
//! see: access is decided in the conversation's shard, never from the user's list.

use futures_util::{StreamExt, stream};
use stentor_engine::{command, effect::Outcome};
use stentor_proto::{
    Bytes,
    ids::{ConversationId, UserId},
    internal::{self, Create, Lookup, change_participant::Change, lookup, lookup_done},
    reason::Reason,
    v1::{
        Conversation, ConversationKind, CreateRequest, CreateResponse, ListRequest, ListResponse, ParticipantRequest,
        ParticipantResponse, ShowRequest, conversations_server::Conversations,
    },
};
use stentor_transport::{Host, token::Claims};
use tonic::{Request, Response, Status};

use super::{Api, actor, because, client_key, conversation_id, refused, retry, user_id};
use crate::router::{self, Retry};

/// Descriptions that one list asks for at a time.
const SHOWS_AT_ONCE: usize = 16;

#[tonic::async_trait]
impl Conversations for Api {
    async fn create(&self, request: Request<CreateRequest>) -> Result<Response<CreateResponse>, Status> {
        let claims = self.caller(&request)?;
        let request = request.into_inner();
        let conversation = id_for(&self.node.host, &claims, &request)?;
        let create = Create {
            actor: Some(actor(&claims)),
            kind: request.kind,
            participants: request.participants.iter().map(|u| Bytes::copy_from_slice(u.as_bytes())).collect(),
            history_full: request.history_full,
            client_key: client_key(&request.client_id, request.first_try_ms),
        };
        let made = command::create(&claims.app, &conversation, create);
        // A direct conversation is one, however often it is created.
        let again = !request.client_id.is_empty() || conversation.direct_users().is_some();
        match self.propose(&claims.app, &conversation, &made, retry(again)).await? {
            Outcome::Accepted { seq, repeat, .. } => {
                Ok(Response::new(CreateResponse { conversation: conversation.to_string(), seq: seq.0, repeat }))
            }
            _ => Err(because(Reason::Internal)),
        }
    }

    async fn add_participant(
        &self,
        request: Request<ParticipantRequest>,
    ) -> Result<Response<ParticipantResponse>, Status> {
        self.change(request, Change::Add).await
    }

    async fn remove_participant(
        &self,
        request: Request<ParticipantRequest>,
    ) -> Result<Response<ParticipantResponse>, Status> {
        self.change(request, Change::Remove).await
    }

    async fn change_role(&self, request: Request<ParticipantRequest>) -> Result<Response<ParticipantResponse>, Status> {
        self.change(request, Change::Role).await
    }

    async fn show(&self, request: Request<ShowRequest>) -> Result<Response<Conversation>, Status> {
        let claims = self.caller(&request)?;
        self.description(&claims, request.into_inner()).await.map(Response::new)
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let claims = self.caller(&request)?;
        let request = request.into_inner();
        let shard = self.shard_of(&claims.app, claims.user.as_str())?;
        let lookup = lookup_for(&claims, shard.0, lookup::What::Conversations(request));
        let found = router::lookup(&self.node, lookup).await.map_err(refused)?;
        let lookup_done::Result::Conversations(state) = found else { return Err(because(Reason::Internal)) };
        let listed = state.conversations.into_iter().filter(|c| !c.removed).map(|c| c.conversation);
        let shown = stream::iter(listed)
            .map(|conversation| self.description(&claims, ShowRequest { conversation, linearizable: false }))
            .buffered(SHOWS_AT_ONCE)
            // The list may be a moment behind the conversation that has removed the caller.
            .filter_map(async |shown| shown.ok());
        Ok(Response::new(ListResponse { conversations: shown.collect().await, next: state.next }))
    }
}

fn lookup_for(claims: &Claims, shard: u32, what: lookup::What) -> Lookup {
    Lookup {
        id: 0,
        shard,
        app: claims.app.to_string(),
        user: claims.user.to_string(),
        device: claims.device.as_ref().map(ToString::to_string).unwrap_or_default(),
        what: Some(what),
        changed_after: 0,
    }
}

impl Api {
    async fn change(
        &self,
        request: Request<ParticipantRequest>,
        change: Change,
    ) -> Result<Response<ParticipantResponse>, Status> {
        let claims = self.caller(&request)?;
        let request = request.into_inner();
        let conversation = conversation_id(&request.conversation)?;
        let user = user_id(&request.user)?;
        let change = internal::ChangeParticipant {
            actor: Some(actor(&claims)),
            user: Bytes::copy_from_slice(user.as_str().as_bytes()),
            change: change as i32,
            role: request.role,
            expect_version: request.expect_version,
            client_key: None,
        };
        let made = command::change_participant(&claims.app, &conversation, change);
        match self.propose(&claims.app, &conversation, &made, Retry::OnlyUnsent).await? {
            Outcome::Accepted { seq, version, repeat, .. } => {
                Ok(Response::new(ParticipantResponse { seq: seq.0, version: version.0, repeat }))
            }
            _ => Err(because(Reason::Internal)),
        }
    }

    async fn description(&self, claims: &Claims, request: ShowRequest) -> Result<Conversation, Status> {
        let conversation = conversation_id(&request.conversation)?;
        let shard = self.shard_of(&claims.app, conversation.as_str())?;
        let lookup = lookup_for(claims, shard.0, lookup::What::Show(request));
        match router::lookup(&self.node, lookup).await.map_err(refused)? {
            lookup_done::Result::Show(shown) => Ok(shown),
            _ => Err(because(Reason::Internal)),
        }
    }
}

/// The new conversation's id: the caller's, a direct one's own, or one that a retry with the same key finds again.
fn id_for(host: &Host, claims: &Claims, request: &CreateRequest) -> Result<ConversationId, Status> {
    if request.kind() == ConversationKind::Direct && request.conversation.is_empty() {
        let [other] = &request.participants[..] else { return Err(because(Reason::DirectIsFixed)) };
        return Ok(ConversationId::direct(&claims.user, &user_id(other)?));
    }
    if !request.conversation.is_empty() {
        return conversation_id(&request.conversation);
    }
    let id = if request.client_id.is_empty() {
        format!("c-{:032x}", host.random::<u128>())
    } else {
        derived(claims, &claims.user, &request.client_id)
    };
    conversation_id(&id)
}

fn derived(claims: &Claims, user: &UserId, client_id: &str) -> String {
    let key = format!("{}\0{user}\0{client_id}", claims.app);
    let half = |seed| twox_hash::XxHash3_64::oneshot_with_seed(seed, key.as_bytes());
    format!("c-{:016x}{:016x}", half(0), half(1))
}

#[cfg(test)]
mod tests {
    use stentor_proto::ids::AppId;

    use super::*;

    fn claims() -> Claims {
        let (app, user) = (AppId::new("app").unwrap(), UserId::new("ann").unwrap());
        Claims { app, user, device: None, admin: false, expires_s: 0 }
    }

    #[test]
    fn a_retry_with_the_same_key_finds_the_same_id() {
        let request = |client_id: &str| CreateRequest {
            kind: ConversationKind::Group as i32,
            client_id: client_id.into(),
            ..Default::default()
        };
        let id = |client_id| id_for(&Host::real(), &claims(), &request(client_id)).unwrap();
        assert_eq!(id("k1"), id("k1"));
        assert_ne!(id("k1"), id("k2"));
        assert_ne!(id(""), id(""));
    }

    #[test]
    fn a_direct_conversation_has_its_own_id() {
        let request = CreateRequest {
            kind: ConversationKind::Direct as i32,
            participants: vec!["bob".into()],
            ..Default::default()
        };
        assert_eq!(id_for(&Host::real(), &claims(), &request).unwrap().as_str(), "direct/ann/bob");
        let nobody = CreateRequest { participants: vec![], ..request };
        assert!(id_for(&Host::real(), &claims(), &nobody).is_err());
    }
}
