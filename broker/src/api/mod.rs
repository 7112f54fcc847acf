//! The public gRPC API: authenticates, translates, and carries each call to the shard's leader wherever it is. Must
//! never act for somebody whose token was not verified for this very call.

mod admin;
mod conversations;
mod messages;
mod send_stream;
mod users;

use std::sync::Arc;

use stentor_engine::{command, effect::Outcome};
use stentor_proto::{
    Bytes,
    ids::{AppId, ConversationId, ShardId, UserId},
    internal::{self, Actor, Command, Heads},
    reason::Reason,
    v1::{ConversationState, Refusal},
};
use stentor_transport::token::Claims;
use tonic::{Request, Status, metadata::MetadataMap};

use crate::{
    node::Node,
    router::{self, Retry},
    status,
};

/// All public services; cheap to clone.
#[derive(Clone)]
pub(crate) struct Api {
    node: Arc<Node>,
}

fn refused(refusal: Refusal) -> Status {
    status::from_refusal(&refusal)
}

fn because(reason: Reason) -> Status {
    refused(reason.refusal())
}

impl Api {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    /// Whose token the call carries.
    fn caller<T>(&self, request: &Request<T>) -> Result<Claims, Status> {
        let token = bearer(request.metadata()).ok_or_else(|| because(Reason::Unauthenticated))?;
        let view = self.node.meta.view().ok_or_else(|| because(Reason::Unavailable))?;
        view.keys.verify(token, self.node.host.wall_ms() / 1_000).map_err(because)
    }

    /// Like [`Self::caller`], for calls that only an admin token may make.
    fn admin<T>(&self, request: &Request<T>) -> Result<Claims, Status> {
        let claims = self.caller(request)?;
        if claims.admin { Ok(claims) } else { Err(because(Reason::AdminOnly)) }
    }

    /// The shard of a conversation or a user.
    fn shard_of(&self, app: &AppId, id: &str) -> Result<ShardId, Status> {
        let view = self.node.meta.view().ok_or_else(|| because(Reason::Unavailable))?;
        view.slots.shard_of_id(app.as_str(), id).ok_or_else(|| because(Reason::Unavailable))
    }

    /// Checks and proposes a conversation's command; refusals of `apply` are errors here.
    async fn propose(
        &self,
        app: &AppId,
        conversation: &ConversationId,
        made: &Command,
        retry: Retry,
    ) -> Result<Outcome, Status> {
        let shard = self.shard_of(app, conversation.as_str())?;
        if let Err(reason) = command::check(made) {
            // A final refusal consumes the send's number, so that the sends behind it keep their order.
            if let Some(consuming) = command::refused_send(made, reason) {
                let consuming = command::encode(&consuming);
                router::propose(&self.node, shard, consuming, Retry::Always).await.map_err(refused)?;
            }
            return Err(because(reason));
        }
        let outcome = router::propose(&self.node, shard, command::encode(made), retry).await.map_err(refused)?;
        match outcome.refusal() {
            Some(refusal) => Err(refused(refusal)),
            None => Ok(outcome),
        }
    }

    /// Where a conversation stands for the caller.
    async fn state(&self, claims: &Claims, conversation: &ConversationId) -> Result<ConversationState, Status> {
        let shard = self.shard_of(&claims.app, conversation.as_str())?;
        let heads = Heads {
            id: 0,
            shard: shard.0,
            app: claims.app.to_string(),
            user: claims.user.to_string(),
            device: claims.device.as_ref().map(ToString::to_string).unwrap_or_default(),
            conversations: vec![conversation.to_string()],
        };
        let states = router::heads(&self.node, heads).await.map_err(refused)?;
        states.into_iter().next().ok_or_else(|| because(Reason::Internal))
    }
}

fn bearer(metadata: &MetadataMap) -> Option<&str> {
    let value = metadata.get("authorization")?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn actor(claims: &Claims) -> Actor {
    command::actor(&claims.user, claims.device.as_ref(), claims.admin)
}

fn conversation_id(text: &str) -> Result<ConversationId, Status> {
    ConversationId::new(text).map_err(bad_id)
}

fn user_id(text: &str) -> Result<UserId, Status> {
    UserId::new(text).map_err(bad_id)
}

fn bad_id(bad: stentor_proto::ids::BadId) -> Status {
    refused(Reason::BadId.with(bad.to_string()))
}

/// The caller's own key, if he gave one.
fn client_key(client_id: &str, first_try_ms: u64) -> Option<internal::ClientKey> {
    let key = || internal::ClientKey { client_id: Bytes::copy_from_slice(client_id.as_bytes()), first_try_ms };
    (!client_id.is_empty()).then(key)
}

/// Only a call with a key of its own may be proposed again when its fate is unknown.
fn retry(has_key: bool) -> Retry {
    if has_key { Retry::Always } else { Retry::OnlyUnsent }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bearer_token_is_one() {
        let mut metadata = MetadataMap::new();
        assert_eq!(bearer(&metadata), None);
        for (value, expected) in
            [("Bearer abc", Some("abc")), ("bearer  abc", Some("abc")), ("Basic abc", None), ("x", None)]
        {
            metadata.insert("authorization", value.parse().unwrap());
            assert_eq!(bearer(&metadata), expected, "{value}");
        }
    }
}
