//! The application's handle: cheap to clone, every method usable from any task. Must never block a thread.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use stentor_proto::{
    ids::{ConversationId, Seq},
    v1::Refusal,
};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::{
    Builder, ClientError, Connection, From, Identity, Incoming, Message, Sent,
    shared::{Command, SendTicket, Shared},
};

/// A device's session. Clones share it; it ends when [`Client::close`] is called or the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) window: Arc<Semaphore>,
    pub(crate) window_sends: u32,
    pub(crate) request_timeout: Duration,
}

/// The answer to a pipelined send. Dropping it takes nothing back.
#[derive(Debug)]
pub struct SendHandle {
    answer: oneshot::Receiver<Result<Sent, ClientError>>,
}

impl Future for SendHandle {
    type Output = Result<Sent, ClientError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // Only a runtime that is being torn down drops a ticket without an answer.
        let lost = || ClientError::Unknown("the client's task is gone".into());
        Pin::new(&mut self.answer).poll(cx).map(|answer| answer.unwrap_or_else(|_| Err(lost())))
    }
}

impl Client {
    /// How to connect.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Sends a message and waits for its answer, over reconnects if need be. Sends of one task keep their order.
    /// Dropping the future after it was first polled may or may not take the send back.
    pub async fn send(&self, conversation: &ConversationId, message: Message) -> Result<Sent, ClientError> {
        self.send_pipelined(conversation, message).await?.await
    }

    /// Queues a message behind those of the same conversation, waits only while the window is full, and returns a
    /// future of the answer. An error means that nothing was queued.
    pub async fn send_pipelined(
        &self,
        conversation: &ConversationId,
        message: Message,
    ) -> Result<SendHandle, ClientError> {
        let Ok(window) = Arc::clone(&self.window).acquire_owned().await else { return Err(self.over()) };
        let (reply, answer) = oneshot::channel();
        let send = Box::new(message.into_send(self.shared.host.wall_ms()));
        let ticket = SendTicket { reply, conversation: conversation.clone(), _window: window };
        self.command(Command::Send { send, ticket }).await?;
        Ok(SendHandle { answer })
    }

    /// Waits until every send so far has its answer, or the session is over.
    pub async fn flush(&self) {
        // All of the window is free exactly when nothing is unanswered.
        drop(self.window.acquire_many(self.window_sends).await);
    }

    /// Begins a conversation's stream, or begins it anew elsewhere. Its events come by [`Client::next`].
    pub async fn subscribe(&self, conversation: &ConversationId, from: From) -> Result<(), ClientError> {
        let (reply, done) = oneshot::channel();
        self.command(Command::Subscribe { conversation: conversation.clone(), from, reply }).await?;
        Ok(done.await.map_err(|_| self.over())??)
    }

    /// Ends a conversation's stream; what waits already still comes.
    pub async fn unsubscribe(&self, conversation: &ConversationId) -> Result<(), ClientError> {
        self.command(Command::Unsubscribe { conversation: conversation.clone() }).await
    }

    /// What comes next; `None` when the session is over (see [`Client::ended`]). Cancel-safe. Of several callers each
    /// item goes to one.
    pub async fn next(&self) -> Option<Incoming> {
        self.shared.next().await
    }

    /// What has come already, without waiting.
    pub fn try_next(&self) -> Option<Incoming> {
        self.shared.try_next().0
    }

    /// The application has stored everything of the conversation up to `seq`: the device's delivered cursor moves
    /// there, in the cursor store and on the server. Moves are gathered for 200 ms; one that is lost costs one more
    /// delivery. It never passes what came, and never moves back.
    pub fn delivered(&self, conversation: &ConversationId, seq: Seq) {
        self.shared.note_move(conversation, seq, Seq(0));
    }

    /// The user has seen everything of the conversation up to `seq`: the read cursor of all his devices.
    pub fn read(&self, conversation: &ConversationId, seq: Seq) {
        self.shared.note_move(conversation, Seq(0), seq);
    }

    /// Who this is, as the server said.
    pub fn identity(&self) -> Option<&Identity> {
        self.shared.identity.get()
    }

    /// Whether there is a connection right now. A hint: it may be gone already.
    pub fn is_connected(&self) -> bool {
        self.shared.is_connected()
    }

    /// How the connection is right now, since when, and when the next attempt to connect begins.
    pub fn connection(&self) -> Connection {
        self.shared.connection()
    }

    /// Why the session was refused for good, if it was.
    pub fn ended(&self) -> Option<&Refusal> {
        self.shared.ended.get()
    }

    /// Ends the session: cursor moves are sent and made durable, the connection is closed. Sends without an answer are
    /// given up ([`Client::flush`] waits for them).
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.command(Command::Close { done }).await.is_ok() {
            let _ = closed.await;
        }
    }

    pub(crate) async fn command(&self, command: Command) -> Result<(), ClientError> {
        self.commands.send(command).await.map_err(|_| self.over())
    }

    /// Why nothing can be done any more.
    pub(crate) fn over(&self) -> ClientError {
        self.shared.ended.get().map_or(ClientError::Closed, |refusal| ClientError::Ended(refusal.clone()))
    }
}
