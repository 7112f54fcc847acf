//! `stentor.v1.Messages`: sending, one by one or as a stream, and reading. Must never acknowledge a send that the
//! shard's leader has not applied.

use std::pin::Pin;

use futures_util::Stream;
use stentor_engine::{command, effect::Outcome, limits};
use stentor_proto::{
    Bytes,
    internal::{self, Read},
    reason::Reason,
    v1::{
        HistoryRequest, HistoryResponse, Send, SendAnswer, SendRefused, SendStateRequest, SendStateResponse, Sent,
        messages_server::Messages, send_answer::Answer,
    },
};
use stentor_transport::token::Claims;
use tonic::{Request, Response, Status, Streaming};

use super::{Api, actor, because, client_key, conversation_id, refused, retry};
use crate::{router, status};

#[tonic::async_trait]
impl Messages for Api {
    async fn send(&self, request: Request<Send>) -> Result<Response<Sent>, Status> {
        let claims = self.caller(&request)?;
        self.send_one(&claims, request.into_inner()).await.map(Response::new)
    }

    type SendStreamStream = Pin<Box<dyn Stream<Item = Result<SendAnswer, Status>> + std::marker::Send>>;

    async fn send_stream(&self, request: Request<Streaming<Send>>) -> Result<Response<Self::SendStreamStream>, Status> {
        let claims = self.caller(&request)?;
        let state = (self.clone(), claims, request.into_inner());
        // One after the other: a later send must not be proposed before an earlier one has its answer.
        let answers = futures_util::stream::unfold(state, async |(api, claims, mut sends)| {
            let send = match sends.message().await {
                Ok(Some(send)) => send,
                Ok(None) => return None,
                Err(status) => return Some((Err(status), (api, claims, sends))),
            };
            let (conversation, send_no) = (send.conversation.clone(), send.send_no);
            let answer = match api.send_one(&claims, send).await {
                Ok(sent) => Answer::Sent(sent),
                Err(status) => match status::to_refusal(&status) {
                    Some(refusal) => Answer::Refused(SendRefused { conversation, send_no, refusal: Some(refusal) }),
                    None => return Some((Err(status), (api, claims, sends))),
                },
            };
            Some((Ok(SendAnswer { answer: Some(answer) }), (api, claims, sends)))
        });
        Ok(Response::new(Box::pin(answers)))
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
    async fn send_one(&self, claims: &Claims, send: Send) -> Result<Sent, Status> {
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
                Ok(Sent { conversation, send_no, seq: seq.0, stamp_ms: stamp.0, repeat })
            }
            _ => Err(because(Reason::Internal)),
        }
    }
}
