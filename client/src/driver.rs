//! The client's one task: connects, feeds the session with frames and commands, writes what it wants written, hands on
//! what comes out. All decisions are the session's. Must never wait while something else could be done, but for the
//! end of the connection.

use std::{collections::BTreeSet, pin::pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use stentor_engine::{
    limits,
    session::client::{Config, Full, Output, Session, Start, Step},
};
use stentor_proto::{
    frame,
    ids::{AppId, ConversationId, DeviceId, Seq, UserId},
    reason::Reason,
    v1::{self, Refusal},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use crate::{
    Change, ClientError, CursorStore, From, Identity, Incoming,
    dial::{Dialer, Link, SUCCESS},
    shared::{Command, Reply, RequestTicket, SendTicket, Shared},
    token::TokenSource,
};

/// Cursor moves are gathered this long.
const GATHER: Duration = Duration::from_millis(200);
/// Bytes of frames that are written at once.
const WRITE_BYTES: usize = 64 * 1024;
/// While a write is under way, due times are looked at this often.
const WRITE_PATIENCE: Duration = Duration::from_millis(20);
/// Frames and commands taken at once before something is written.
const BURST: usize = 64;
/// Reading stops when so much more than the credit waits for the application, whatever the gateway sends.
const HELD_SLACK_BYTES: u64 = 1024 * 1024;
/// Bytes of a session nonce.
const NONCE_BYTES: usize = 16;

/// Why a connection ended.
enum End {
    /// It failed; the next gateway is tried.
    Lost(String),
    /// The gateway asked for it.
    Leave,
    /// The session is refused for good.
    Final(Refusal),
    /// The application wants no more.
    Closed,
}

pub(crate) struct Driver {
    session: Session<SendTicket, RequestTicket>,
    dialer: Dialer,
    token: TokenSource,
    nonce: [u8; NONCE_BYTES],
    store: Arc<dyn CursorStore>,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    /// Until the first connection.
    first: Option<oneshot::Sender<Result<(), ClientError>>>,
    began: Instant,
    credit_bytes: u64,
    /// When gathered cursor moves go on.
    gather_at: Option<Instant>,
    sync_at: Option<Instant>,
    syncing: Option<JoinHandle<()>>,
    /// Conversations whose send count changed.
    counted: BTreeSet<ConversationId>,
    batch: Vec<(Incoming, u64)>,
    closing: Option<oneshot::Sender<()>>,
    welcomed: Option<v1::Welcome>,
}

impl Driver {
    pub(crate) fn new(
        config: Config,
        mut dialer: Dialer,
        token: TokenSource,
        store: Arc<dyn CursorStore>,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
        first: oneshot::Sender<Result<(), ClientError>>,
    ) -> Self {
        let credit_bytes = config.credit_bytes;
        Self {
            session: Session::new(config, dialer.seed()),
            nonce: dialer.nonce(),
            dialer,
            token,
            store,
            shared,
            commands,
            first: Some(first),
            began: Instant::now(),
            credit_bytes,
            gather_at: None,
            sync_at: None,
            syncing: None,
            counted: BTreeSet::new(),
            batch: Vec::new(),
            closing: None,
            welcomed: None,
        }
    }

    pub(crate) async fn run(mut self) {
        let refusal = loop {
            let Some((mut link, token)) = self.offline().await else { break None };
            let since = Instant::now();
            let end = self.online(&mut link, token).await;
            self.shared.disconnected();
            self.session.disconnected();
            match end {
                End::Closed => {
                    link.writer.finish().await;
                    link.connection.close(0, "closed");
                    break None;
                }
                End::Final(refusal) => break Some(refusal),
                End::Leave => {
                    link.writer.finish().await;
                    link.connection.close(0, "leaving");
                    self.dialer.leave();
                    self.disconnected("the gateway is going away".into());
                }
                End::Lost(reason) => {
                    link.connection.close(1, &reason);
                    if since.elapsed() >= SUCCESS {
                        self.dialer.lost()
                    } else {
                        self.dialer.failed()
                    }
                    self.disconnected(reason);
                }
            }
        };
        self.end(refusal).await;
    }

    fn disconnected(&mut self, reason: String) {
        tracing::debug!(%reason, "disconnected");
        self.shared.note_failure(reason.clone());
        // Requests that were under way are told first.
        let _ = self.outputs();
        if self.first.is_none() {
            self.batch.push((Incoming::Disconnected { reason }, 0));
            self.shared.deliver(&mut self.batch);
        }
    }

    /// Tries gateways until one takes a connection, serving the application meanwhile. `None`: it wants no more.
    async fn offline(&mut self) -> Option<(Link, Arc<str>)> {
        loop {
            // Boxed: an idle client should not carry a handshake's state.
            let ((begins_at, dialing), source) = (self.dialer.attempt(), self.token.clone());
            self.shared.retry_at(begins_at);
            let mut attempt = Box::pin(async move {
                let link = dialing.await?;
                Ok::<_, String>((link, source.token().await?))
            });
            let dialed = loop {
                let due = self.due().unwrap_or_else(|| Instant::now() + Duration::from_secs(3_600));
                tokio::select! {
                    biased;
                    dialed = &mut attempt => break dialed,
                    command = self.commands.recv() => self.command(command),
                    () = self.shared.wake.notified() => {}
                    () = sleep_until(due) => {}
                }
                self.housekeeping();
                // Nothing goes out, but what cannot be queued is told.
                let _ = self.outputs();
                if self.closing.is_some() || self.commands.is_closed() {
                    return None;
                }
            };
            match dialed {
                Ok(dialed) => return Some(dialed),
                Err(failure) => {
                    tracing::debug!(%failure, "no connection");
                    self.shared.note_failure(failure);
                    self.dialer.failed();
                }
            }
        }
    }

    /// One connection, from hello to its end.
    async fn online(&mut self, link: &mut Link, token: Arc<str>) -> End {
        self.session.connected(self.now(), &token, &self.nonce);
        drop(token);
        let (mut out, mut frames, mut writing) = (BytesMut::new(), [Bytes::new()], false);
        let mut timer = pin!(sleep_until(Instant::now()));
        loop {
            let held_bytes = self.shared.consumed_now(&mut self.session);
            if !writing {
                self.session.write_frames(self.now(), &mut out, WRITE_BYTES);
                frames[0] = std::mem::take(&mut out).freeze();
                writing = !frames[0].is_empty();
            }
            if let Some(end) = self.outputs() {
                return end;
            }
            if let Some(welcome) = self.welcomed.take()
                && let Some(end) = self.welcome(link, &welcome)
            {
                return end;
            }
            if self.is_closing() {
                return self.last_words(link, &mut frames).await;
            }
            let mut deadline = self.deadline();
            if writing {
                // What is due to be written waits for the gateway to read.
                deadline = deadline.max(Instant::now() + WRITE_PATIENCE);
            }
            if deadline < timer.deadline() || timer.is_elapsed() {
                timer.as_mut().reset(deadline);
            }
            let reads = held_bytes <= self.credit_bytes + HELD_SLACK_BYTES;
            tokio::select! {
                biased;
                written = link.writer.write(&mut frames), if writing => match written {
                    Ok(()) => writing = false,
                    Err(error) => return End::Lost(error.to_string()),
                },
                read = link.reader.next(), if reads => match self.frames(read, link) {
                    Ok(()) => {}
                    Err(reason) => return self.ending(reason),
                },
                command = self.commands.recv() => self.command(command),
                () = self.shared.wake.notified() => {}
                () = &mut timer => {}
            }
            self.more_commands();
            self.housekeeping();
            if let Err(violation) = self.session.tick(self.now()) {
                return self.ending(violation.to_string());
            }
        }
    }

    /// Takes a frame and those that have come with it.
    fn frames(
        &mut self,
        first: Result<Option<(u8, Bytes)>, stentor_transport::quic::ReadError>,
        link: &mut Link,
    ) -> Result<(), String> {
        let now = self.now();
        let mut next = Some(first);
        let mut taken = 0;
        while let Some(read) = next {
            match read {
                Ok(Some((kind, message))) => self.session.handle(now, kind, message).map_err(|v| v.to_string())?,
                Ok(None) => return Err("the gateway ended the connection".into()),
                Err(error) => return Err(error.to_string()),
            }
            taken += 1;
            next = if taken < BURST { link.reader.next().now_or_never() } else { None };
        }
        Ok(())
    }

    /// A connection that breaks may have said before that the session is over.
    fn ending(&mut self, reason: String) -> End {
        self.outputs().unwrap_or(End::Lost(reason))
    }

    fn more_commands(&mut self) {
        for _ in 0..BURST {
            match self.commands.try_recv() {
                Ok(command) => self.command(Some(command)),
                Err(_) => return,
            }
        }
    }

    fn is_closing(&self) -> bool {
        self.closing.is_some() || self.commands.is_closed() && self.commands.is_empty()
    }

    fn command(&mut self, command: Option<Command>) {
        let now = self.now();
        match command {
            None => self.commands.close(),
            Some(Command::Send { send, ticket }) => {
                let conversation = ticket.conversation.clone();
                if let Err((full, ticket)) = self.session.send(now, &conversation, *send, ticket) {
                    ticket.fail_or(Err(full.into()));
                }
            }
            Some(Command::Subscribe { conversation, from, reply }) => {
                let _ = reply.send(self.subscribe(&conversation, from));
            }
            Some(Command::Unsubscribe { conversation }) => self.session.unsubscribe(&conversation),
            Some(Command::Request { call, reply }) => {
                if let Err((_, reply)) = self.session.request((*call).clone(), reply) {
                    // Those whose callers gave up hold places too.
                    self.session.forget_requests(|ticket| !ticket.is_closed());
                    if let Err((full, reply)) = self.session.request(*call, reply) {
                        let _ = reply.send(Reply::Full(full));
                    }
                }
            }
            Some(Command::Close { done }) => {
                self.closing = Some(done);
                self.gather_at = Some(Instant::now());
            }
        }
    }

    /// Begins a stream, now or with the next connection.
    pub(crate) fn subscribe(&mut self, conversation: &ConversationId, from: From) -> Result<(), Full> {
        let start = match from {
            From::Cursor => Start::After(self.store.delivered(conversation).unwrap_or_default()),
            From::Seq(seq) => Start::After(seq),
            From::Head => Start::Head,
        };
        self.session.subscribe(conversation, start)
    }

    /// Cursor moves and the store: what is due now.
    fn housekeeping(&mut self) {
        let now = Instant::now();
        if self.gather_at.is_none() && (!self.counted.is_empty() || self.shared.has_moves()) {
            self.gather_at = Some(now + GATHER);
        }
        if self.gather_at.is_some_and(|at| at <= now) {
            self.gather();
        }
        if self.sync_at.is_some_and(|at| at <= now) {
            self.sync_at = None;
            if self.syncing.as_ref().is_some_and(|task| !task.is_finished()) {
                // A slow disk: what was saved since goes with the next one.
                self.sync_at = self.store.sync_interval().map(|interval| now + interval);
                return;
            }
            let (store, shared) = (Arc::clone(&self.store), Arc::clone(&self.shared));
            self.syncing = Some(tokio::task::spawn_blocking(move || {
                if let Err(error) = store.sync() {
                    shared.deliver(&mut vec![(Incoming::StoreFailed(error), 0)]);
                }
            }));
        }
    }

    /// Hands gathered moves and counts to the session and the store.
    fn gather(&mut self) {
        self.gather_at = None;
        let now = self.now();
        let mut changes = Vec::new();
        for (conversation, (delivered, read)) in self.shared.take_moves() {
            let Ok(at) = self.session.move_cursors(now, &conversation, delivered, read) else { continue };
            if delivered > Seq(0) && at > Seq(0) {
                changes.push(Change::Delivered(conversation, at));
            }
        }
        for conversation in std::mem::take(&mut self.counted) {
            if let Some((last, done)) = self.session.send_position(&conversation) {
                changes.push(Change::Sends { conversation, last, done });
            }
        }
        if changes.is_empty() {
            return;
        }
        if let Err(error) = self.store.save(&changes) {
            self.batch.push((Incoming::StoreFailed(error), 0));
        }
        if let Some(interval) = self.store.sync_interval() {
            self.sync_at.get_or_insert(Instant::now() + interval);
        }
    }

    fn due(&self) -> Option<Instant> {
        [self.gather_at, self.sync_at].into_iter().flatten().min()
    }

    fn deadline(&self) -> Instant {
        let session = self.session.deadline().map(|ms| self.began + Duration::from_millis(ms));
        let due = [session, self.due()].into_iter().flatten().min();
        due.unwrap_or_else(|| Instant::now() + Duration::from_secs(3_600))
    }

    /// The session's clock, in ms.
    fn now(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// Hands on what the session gave out.
    fn outputs(&mut self) -> Option<End> {
        let mut end = None;
        while let Some(output) = self.session.poll() {
            match output {
                Output::Step { conversation, step, credit_bytes } => {
                    let item = match step {
                        Step::Event(event) => Incoming::Event { conversation, event: event.into() },
                        Step::Hidden(hidden) => Incoming::Hidden { conversation, hidden: hidden.into() },
                    };
                    self.batch.push((item, credit_bytes));
                }
                Output::Answered { ticket, answer } => {
                    if self.store.sync_interval().is_some() && !self.counted.contains(&ticket.conversation) {
                        self.counted.insert(ticket.conversation.clone());
                    }
                    ticket.decide(answer);
                }
                Output::Response { ticket, result } => drop(ticket.send(Reply::Answer(result))),
                Output::Lost { ticket, maybe_done } => drop(ticket.send(Reply::Lost { maybe_done })),
                Output::Abandoned { ticket, maybe_accepted } => self.abandon(ticket, maybe_accepted),
                Output::Leave => end = Some(End::Leave),
                Output::Final(refusal)
                    if refusal.reason == Reason::TokenExpired.code() && self.token.gives_fresh_ones() =>
                {
                    end = Some(End::Lost(refusal.reason));
                }
                Output::Final(refusal) => end = Some(End::Final(refusal)),
                Output::Welcome(welcome) => {
                    self.batch.push((Incoming::Connected { gateway: welcome.gateway.clone() }, 0));
                    self.welcomed = Some(welcome);
                }
                Output::State { conversation, head, delivered, read } => {
                    self.batch.push((Incoming::State { conversation, head, delivered, read }, 0));
                }
                Output::UpToDate => self.batch.push((Incoming::UpToDate, 0)),
                Output::Ended { conversation, refusal } => {
                    self.batch.push((Incoming::Ended { conversation, refusal }, 0));
                }
                Output::CursorsMoved(moved) => self.batch.push((cursors_moved(moved), 0)),
            }
        }
        if self.first.is_none() {
            self.shared.deliver(&mut self.batch);
        }
        end
    }

    fn abandon(&self, ticket: SendTicket, maybe_accepted: bool) {
        let error = match self.shared.ended.get() {
            _ if maybe_accepted => ClientError::Unknown("the session ended before the answer came".into()),
            Some(refusal) => ClientError::Ended(refusal.clone()),
            None => ClientError::Closed,
        };
        ticket.fail_or(Err(error));
    }

    /// A gateway took the session. An error here is the end: the store is another device's, or cannot be used.
    fn welcome(&mut self, link: &mut Link, welcome: &v1::Welcome) -> Option<End> {
        let longest =
            (welcome.max_frame_bytes as usize).clamp(frame::DEFAULT_MAX_BYTES, limits::MAX_CLIENT_FRAME_BYTES);
        link.reader.set_max_frame_bytes(longest);
        if let Some(first) = self.first.take() {
            let bound = identity(welcome).and_then(|identity| {
                self.store.bind(&identity)?;
                let _ = self.shared.identity.set(identity);
                Ok(())
            });
            let failed = bound.is_err();
            if first.send(bound).is_err() || failed {
                return Some(End::Closed);
            }
        }
        self.shared.connected(&welcome.gateway);
        self.shared.deliver(&mut self.batch);
        None
    }

    /// Before a planned end: gathered moves go out, then nothing more.
    async fn last_words(&mut self, link: &mut Link, frames: &mut [Bytes; 1]) -> End {
        self.gather();
        let mut out = BytesMut::new();
        self.session.write_last_words(&mut out);
        let mut frames = [std::mem::take(&mut frames[0]), out.freeze()];
        // Bounded: a gateway that does not read must not hold up an end.
        let _ = tokio::time::timeout(Duration::from_secs(3), link.writer.write(&mut frames)).await;
        End::Closed
    }

    /// Everything without an answer is told so, the store is made durable and let go, and only then is it over.
    async fn end(mut self, refusal: Option<Refusal>) {
        if let Some(refusal) = refusal {
            if let Some(first) = self.first.take() {
                let _ = first.send(Err(ClientError::Ended(refusal.clone())));
            }
            let _ = self.shared.ended.set(refusal);
        }
        self.commands.close();
        self.gather();
        self.session.finish();
        let _ = self.outputs();
        while let Ok(command) = self.commands.try_recv() {
            self.turn_away(command);
        }
        if let Some(syncing) = self.syncing.take() {
            let _ = syncing.await;
        }
        if self.store.sync_interval().is_some() {
            let store = Arc::clone(&self.store);
            let synced = tokio::task::spawn_blocking(move || store.sync()).await;
            if let Ok(Err(error)) = synced {
                self.batch.push((Incoming::StoreFailed(error), 0));
            }
        }
        self.shared.deliver(&mut self.batch);
        let Self { shared, store, closing, .. } = self;
        drop(store);
        shared.close();
        if let Some(done) = closing {
            let _ = done.send(());
        }
    }

    fn turn_away(&mut self, command: Command) {
        match command {
            Command::Send { ticket, .. } => self.abandon(ticket, false),
            Command::Request { reply, .. } => drop(reply.send(Reply::Lost { maybe_done: false })),
            Command::Close { done } => drop(done.send(())),
            // Their callers see that the answer never comes.
            Command::Subscribe { .. } | Command::Unsubscribe { .. } => {}
        }
    }
}

fn identity(welcome: &v1::Welcome) -> Result<Identity, ClientError> {
    let bad = |e: stentor_proto::ids::BadId| ClientError::Damaged(format!("the gateway's welcome: {e}"));
    Ok(Identity {
        app: AppId::new(&welcome.app).map_err(bad)?,
        user: UserId::new(&welcome.user).map_err(bad)?,
        device: DeviceId::new(&welcome.device).map_err(bad)?,
    })
}

fn cursors_moved(moved: v1::CursorsMoved) -> Incoming {
    let cursors = |cursors: Vec<v1::Cursor>| {
        let good = cursors.into_iter().filter_map(|c| Some((ConversationId::new(&c.conversation).ok()?, Seq(c.seq))));
        good.collect()
    };
    let refused = moved.refused.into_iter().filter_map(|refused| {
        Some((ConversationId::new(&refused.conversation).ok()?, refused.refusal.unwrap_or_default()))
    });
    Incoming::CursorsMoved {
        refused: refused.collect(),
        delivered: cursors(moved.delivered),
        read: cursors(moved.read),
    }
}

#[cfg(test)]
mod tests {
    use stentor_transport::{Host, pki::Pki, tls::ClientTls};

    use super::*;
    use crate::MemoryCursors;

    #[test]
    fn an_idle_client_costs_little_beside_its_connection() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::create(dir.path()).unwrap();
        let dialer = Dialer::new(vec!["localhost:1".into()], ClientTls::public(pki.ca_path()).unwrap(), Host::real());
        let (config, store) = (Config::default(), Arc::new(MemoryCursors::new()));
        let shared = Arc::new(Shared::new(config.credit_bytes, Host::real()));
        let ((_commands, receiver), (first, _welcomed)) = (mpsc::channel(1), oneshot::channel());
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _inside = runtime.enter();
        let driver = Driver::new(config, dialer, TokenSource::Fixed("token".into()), store, shared, receiver, first);
        let (task, command) = (size_of_val(&driver.run()), size_of::<Command>());
        // 29 kB are the connection's own.
        assert!(task <= 6 * 1024, "the task holds {task} bytes");
        assert!(command <= 64, "a channel holds 32 of {command} bytes");
    }
}
