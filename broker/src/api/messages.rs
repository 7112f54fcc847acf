//! `stentor.v1.Messages`: sending, one by one or as a stream, and reading. Must never acknowledge a send that the
//! shard's leader has not applied.

use stentor_engine::{command, effect::Outcome, limits};
use stentor_proto::{
    Bytes,
    internal::{self, Read},
    reason::Reason,
    v1::{HistoryRequest, HistoryResponse, Send, SendStateRequest, SendStateResponse, Sent, messages_server::Messages},
};
use stentor_transport::token::Claims;
use tonic::{Request, Response, Status, Streaming};

use super::{Api, actor, because, client_key, conversation_id, refused, retry, send_stream};
use crate::router;

#[tonic::async_trait]
impl Messages for Api {
    async fn send(&self, request: Request<Send>) -> Result<Response<Sent>, Status> {
        let claims = self.caller(&request)?;
        self.send_one(&claims, request.into_inner()).await.map(Response::new)
    }

    type SendStreamStream = send_stream::Answers;

    async fn send_stream(&self, request: Request<Streaming<Send>>) -> Result<Response<Self::SendStreamStream>, Status> {
        let claims = self.caller(&request)?;
        Ok(Response::new(send_stream::answers(self.clone(), claims, request.into_inner())))
    }

    async fn history(&self, request: Request<HistoryRequest>) -> Result<Response<HistoryResponse>, Status> {
        let claims = self.caller(&request)?;
        let request = request.into_inner();
        let conversation = conversation_id(&request.conversation)?;
        let read = Read {
            id: 0,
            shard: self.shard_of(&claims.app, conversation.as_str())?.0,
            app: claims.app.to_string(),
            user: claims.user.to_string(),
            admin: claims.admin,
            request: Some(request),
            max_bytes: limits::PAGE_BYTES as u32,
            upto_removal: false,
        };
        router::read(&self.node, read).await.map(Response::new).map_err(refused)
    }

    async fn get_send_state(&self, request: Request<SendStateRequest>) -> Result<Response<SendStateResponse>, Status> {
        let claims = self.caller(&request)?;
        if claims.device.is_none() {
            return Err(because(Reason::UnknownDevice));
        }
        let conversation = conversation_id(&request.into_inner().conversation)?;
        let state = self.state(&claims, &conversation).await?;
        match state.refusal {
            Some(refusal) => Err(refused(refusal)),
            None => Ok(Response::new(SendStateResponse { last: state.last_send_no, done_no: state.done_no })),
        }
    }
}

impl Api {
    pub(super) async fn send_one(&self, claims: &Claims, send: Send) -> Result<Sent, Status> {
        let conversation = conversation_id(&send.conversation)?;
        let (send_no, has_key) = (send.send_no, send.send_no > 0 || !send.client_id.is_empty());
        let made = internal::Send {
            actor: Some(actor(claims)),
            send_no,
            done_no: send.done_no,
            client_key: client_key(&send.client_id, send.first_try_ms),
            kind: send.kind,
            content_type: Bytes::from(send.content_type),
            sent_at_ms: send.sent_at_ms,
            body: send.body,
            expect_version: send.expect_version,
            expect_epoch: send.expect_epoch,
            refused: 0,
            // A device of this API has no sessions; its numbers alone keep its order.
            session_no: 0,
        };
        let made = command::send(&claims.app, &conversation, made);
        match self.propose(&claims.app, &conversation, &made, retry(has_key)).await? {
            Outcome::Accepted { seq, stamp, repeat, .. } => {
                let conversation = conversation.to_string();
                Ok(Sent { conversation, send_no, seq: seq.0, stamp_ms: stamp.0, repeat, more: 0 })
            }
            _ => Err(because(Reason::Internal)),
        }
    }
}
