//! One device's connection, in one task: frames in, news of brokers, frames out, and nothing in between that waits.
//! Decisions are the engine's (`session::server`, `delivery`); here they are carried out. Must never hold more for a
//! device than its queue's bound, nor let one device wait for another.

mod calls;
mod greeting;
mod list;
mod outgoing;
mod rates;
mod runs;
mod sends;
mod streams;

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt;
use rand::Rng;
use stentor_engine::{
    limits,
    session::server::{Credit, Cursors, Server},
};
use stentor_proto::{
    Bytes,
    frame::{BadFrame, ClientFrame},
    ids::ShardId,
    reason::Reason,
    v1::{self, Refusal},
};
use stentor_transport::quic::{FrameReader, FrameWriter, QuicConnection, QuicIncoming, ReadError};
use tokio::time::timeout;

use crate::{
    core::{Core, Who},
    inbox::{Answer, Inbox, News, Purpose, Reply},
    sessions::SessionPlace,
    shard::Ticket,
};
use calls::Calls;
use outgoing::Outgoing;
use rates::Rates;
use streams::Streams;

/// Frames that are taken from one device before the brokers' news are looked at again.
const BURST_FRAMES: usize = 64;
/// Until the device opened its stream and said hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Chunks for which a session keeps room when it has nothing to write.
const IDLE_CHUNKS: usize = 4;
/// How long a refused device may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// One connection of a session.
struct Session {
    core: Arc<Core>,
    inbox: Arc<Inbox>,
    /// Where conversations find the inbox.
    place: SessionPlace,
    who: Who,
    admin: bool,
    server: Server,
    credit: Credit,
    cursors: Cursors,
    out: Outgoing,
    streams: Streams,
    calls: Calls,
    rates: Rates,
    /// When the token ends, in seconds since the Unix epoch.
    expires_s: u64,
    /// The wall clock is looked at for that then.
    check_token_ms: u64,
    /// Collected over a burst of frames, proposed together.
    proposals: Vec<(ShardId, Bytes, Ticket)>,
    /// Nothing is taken from the device any more; what waits for it is written until then, in ms.
    ending: Option<u64>,
    close_at_ms: Option<u64>,
}

/// Serves one connection from its handshake to its end.
pub(crate) async fn serve(core: Arc<Core>, incoming: QuicIncoming) {
    let from = incoming.remote_address();
    let connection = match incoming.connect().await {
        Ok(connection) => connection,
        Err(error) => return tracing::debug!(%from, %error, "handshake failed"),
    };
    let metrics = core.metrics.clone();
    metrics.connections.inc();
    serve_connection(core, &connection).await;
    metrics.connections.dec();
}

async fn serve_connection(core: Arc<Core>, connection: &QuicConnection) {
    let Ok(Ok((mut writer, mut reader))) = timeout(HELLO_TIMEOUT, connection.accept_stream()).await else {
        return connection.close(0, "no stream was opened");
    };
    reader.set_max_frame_bytes(core.config.limits.max_frame_bytes);
    let why = match greeting::greet(&core, &mut reader).await {
        Ok(session) => {
            core.metrics.sessions.inc();
            Box::pin(session.run(&mut writer, &mut reader)).await;
            core.metrics.sessions.dec();
            "the session ended"
        }
        Err(refusal) => {
            core.metrics.fatals.inc();
            let fatal = v1::Fatal { refusal: Some(refusal) };
            let mut frames = [stentor_proto::frame::ServerFrame::from(fatal).to_bytes()];
            // The device may be gone; then there is nobody to tell.
            let _ = timeout(LINGER, writer.write(&mut frames)).await;
            "the session was refused"
        }
    };
    writer.finish().await;
    connection.close(0, why);
}

impl Session {
    async fn run(mut self, writer: &mut FrameWriter, reader: &mut FrameReader) {
        let mut draining = self.core.draining.subscribe();
        let (mut batch, mut writing, mut leaving) = (Vec::new(), false, false);
        loop {
            self.settle();
            batch.retain(|chunk: &Bytes| !chunk.is_empty());
            if batch.is_empty() && !writing {
                self.out.fill(&mut batch);
            }
            let busy = writing || !batch.is_empty();
            if !busy {
                batch.shrink_to(IDLE_CHUNKS);
                writer.rest();
            }
            if self.ending.is_some_and(|until_ms| !busy || until_ms <= self.core.now_ms()) {
                break;
            }
            writing = busy;
            let deadline = self.deadline_ms().map(|ms| self.core.instant(ms));
            let never = deadline.unwrap_or_else(tokio::time::Instant::now);
            tokio::select! {
                // The writer goes on where it was when it is polled again: dropping this future loses nothing.
                result = writer.write(&mut batch), if busy => {
                    if result.is_err() {
                        break;
                    }
                    writing = false;
                    self.out.written();
                }
                frame = reader.next(), if self.wants_frames() => self.frames(frame, reader),
                () = self.inbox.changed() => {}
                () = tokio::time::sleep_until(never), if deadline.is_some() => {}
                drained = draining.wait_for(|draining| *draining), if !leaving => {
                    leaving = true;
                    if drained.is_ok() {
                        self.go_away();
                    }
                }
            }
            let news = self.inbox.take();
            self.news(news);
            self.time();
        }
        self.leave();
    }

    fn wants_frames(&self) -> bool {
        self.ending.is_none()
            && self.server.wants_frames(self.core.now_ms())
            && self.out.bytes() < 2 * limits::SESSION_QUEUE_BYTES
    }

    /// Takes a frame and those that came with it.
    fn frames(&mut self, first: Result<Option<(u8, Bytes)>, ReadError>, reader: &mut FrameReader) {
        let mut next = Some(first);
        for _ in 0..BURST_FRAMES {
            let Some(frame) = next else { return };
            match frame {
                Ok(Some((kind, message))) => {
                    if let Err(refusal) = self.frame(kind, message) {
                        return self.fatal(refusal);
                    }
                }
                Ok(None) | Err(ReadError::Connection(_) | ReadError::Abandoned(_)) => return self.end(),
                Err(error) => return self.fatal(bad_frame(&error)),
            }
            next = if self.wants_frames() { reader.next().now_or_never() } else { None };
        }
        // What is left comes with the next turn, after the brokers' news.
        if let Some(Ok(Some((kind, message)))) = next
            && let Err(refusal) = self.frame(kind, message)
        {
            self.fatal(refusal);
        }
    }

    fn frame(&mut self, kind: u8, message: Bytes) -> Result<(), Refusal> {
        let frame_bytes = message.len();
        let frame = ClientFrame::decode(kind, message).map_err(|bad| bad_frame(&bad.into()))?;
        let Some(frame) = frame else { return Ok(()) };
        self.core.metrics.device_frame(&frame);
        self.server.frame(&frame).map_err(Reason::refusal)?;
        match frame {
            // `Server::frame` lets a second one never through.
            ClientFrame::Hello(_) => {}
            ClientFrame::Resume(resume) => self.resume(resume),
            ClientFrame::Subscribe(subscribe) => self.subscribe(&subscribe),
            ClientFrame::Unsubscribe(unsubscribe) => self.unsubscribe(&unsubscribe.conversation),
            ClientFrame::Send(send) => self.send(send, frame_bytes),
            ClientFrame::SendRun(run) => self.send_run(run).map_err(Reason::refusal)?,
            ClientFrame::MoveCursors(moves) => self.move_cursors(&moves),
            ClientFrame::Credit(credit) => self.credit.add(credit.bytes),
            ClientFrame::Ping(ping) => self.out.push(v1::Pong { token: ping.token }),
            ClientFrame::Request(request) => self.call(request),
        }
        Ok(())
    }

    fn news(&mut self, news: News) {
        // What begins streams comes last: one that ended before it may have had the place that another begins with.
        let (begins, answers): (Vec<_>, Vec<_>) = news.answers.into_iter().partition(|a| a.purpose.begins_streams());
        answers.into_iter().for_each(|answer| self.answer(answer));
        news.pushes.iter().for_each(|(place, push)| self.live(*place, push));
        news.heads.iter().for_each(|(&place, &head)| self.head(place, head));
        news.refused.into_iter().for_each(|(place, refusal)| self.place_refused(place, refusal));
        begins.into_iter().for_each(|answer| self.answer(answer));
        self.begin_again();
        if news.superseded {
            self.fatal(Reason::SessionSuperseded.refusal());
        }
    }

    fn answer(&mut self, answer: Answer) {
        let Answer { purpose, result } = answer;
        match purpose {
            // Answered before the session began; a late one is of no use.
            Purpose::OpenSession => {}
            Purpose::Send { shard, conversation, send_no } => {
                self.send_answered(shard, conversation, send_no, result);
            }
            Purpose::Run { shard, conversation, send_no, count } => {
                self.run_answered(shard, conversation, send_no, count, result);
            }
            Purpose::Cursors { moves } => self.cursors_answered(moves, result),
            Purpose::CursorHeads { moves } => self.cursor_heads(moves, result),
            Purpose::Pull { stream } => self.page(stream, result),
            Purpose::Start { shard, streams } => self.heads(shard, streams, result),
            Purpose::Conversations => self.conversations(result),
            Purpose::Call { id, call } => self.call_answered(id, call, result),
        }
    }

    /// Carries out what was collected: proposals, questions, pages for which there is room.
    fn settle(&mut self) {
        if !self.proposals.is_empty() {
            self.core.propose(&mut self.proposals);
        }
        if self.ending.is_none() {
            self.rest_streams();
            self.ask_heads();
            self.grant_pulls();
        }
    }

    fn deadline_ms(&self) -> Option<u64> {
        let room_at_ms = self.server.room_at_ms(self.core.now_ms());
        let token = Some(self.check_token_ms);
        let dates = [self.cursors.due_ms(), self.streams.due_ms(), self.close_at_ms, self.ending, room_at_ms, token];
        dates.into_iter().flatten().min()
    }

    fn time(&mut self) {
        let now_ms = self.core.now_ms();
        if self.cursors.due_ms().is_some_and(|due| due <= now_ms) {
            self.flush_cursors();
        }
        self.retry_streams(now_ms);
        if self.check_token_ms <= now_ms {
            self.check_token(now_ms);
        }
        if self.close_at_ms.is_some_and(|at| at <= now_ms) {
            self.close_at_ms = None;
            self.fatal(Reason::Draining.refusal());
        }
    }

    /// The session ends with its token. The wall clock may be set, so that it is looked at now and then.
    fn check_token(&mut self, now_ms: u64) {
        match self.expires_s.saturating_mul(1_000).saturating_sub(self.core.wall_ms()) {
            0 => {
                self.check_token_ms = u64::MAX;
                self.fatal(Reason::TokenExpired.refusal());
            }
            left_ms => self.check_token_ms = now_ms + left_ms.min(limits::TOKEN_CHECK_MS),
        }
    }

    fn go_away(&mut self) {
        let within_ms = self.core.config.limits.drain_ms;
        self.out.push(v1::GoAway { reason: Reason::Draining.code().into(), within_ms });
        // Those that stay to the end are not all cut in the same moment.
        let jitter_ms = self.core.host.rng().random_range(0..=u64::from(within_ms) / 4);
        self.close_at_ms = Some(self.core.now_ms() + u64::from(within_ms) + jitter_ms);
    }

    fn fatal(&mut self, refusal: Refusal) {
        if self.ending.is_none() {
            self.core.metrics.fatals.inc();
            tracing::debug!(user = %self.who.user, device = %self.who.device, reason = refusal.reason, "session ends");
            self.out.push(v1::Fatal { refusal: Some(refusal) });
            self.end();
        }
    }

    fn end(&mut self) {
        self.server.end();
        self.ending = Some(self.core.now_ms() + LINGER.as_millis() as u64);
    }

    fn leave(&mut self) {
        self.flush_cursors();
        self.settle();
        self.inbox.close();
        self.end_streams();
        self.return_rates();
        self.core.leave(&self.who, &self.inbox);
        self.core.places.leave(self.place);
    }

    fn ticket(&self, purpose: Purpose) -> Ticket {
        Ticket { inbox: self.inbox.clone(), purpose }
    }

    /// Queues a command for the shard of `target`. False when there is no placement that has it.
    fn propose(&mut self, target: &str, command: &stentor_proto::internal::Command, purpose: Purpose) {
        match self.core.shard_of(&self.who.app, target) {
            Ok(shard) => self.propose_to(shard, command, purpose),
            Err(reason) => self.ticket(purpose).answer(Err(reason.refusal())),
        }
    }

    fn propose_to(&mut self, shard: ShardId, command: &stentor_proto::internal::Command, purpose: Purpose) {
        let ticket = self.ticket(purpose);
        self.proposals.push((shard, stentor_engine::command::encode(command), ticket));
    }
}

/// What a device hears of bytes that are no frame.
fn bad_frame(error: &ReadError) -> Refusal {
    let reason = match error {
        ReadError::BadFrame(BadFrame::TooLarge { .. }) => Reason::FrameTooLarge,
        ReadError::BadFrame(BadFrame::UnknownKind(_)) => Reason::UnexpectedFrame,
        _ => Reason::Malformed,
    };
    reason.with(error.to_string())
}

/// An answer that is not of the kind that was asked for: the broker's fault.
fn unexpected(result: Result<Reply, Refusal>) -> Refusal {
    result.err().unwrap_or_else(|| Reason::Internal.refusal())
}
