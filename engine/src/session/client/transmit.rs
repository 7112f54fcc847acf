//! What a device writes, and when: greeting, credit, cursors, sends under the window, pings, deadlines. Must never
//! write what the gateway did not allow: its limits of this connection hold for every frame.

use bytes::BytesMut;
use stentor_proto::{
    Message,
    frame::{self, ClientFrame},
    ids::ConversationId,
    reason::Reason,
    v1::{self, request::Call},
};

use super::{Answer, Config, Output, Phase, Question, Session, Violation, outbox::Want, subscription};
use crate::limits;

/// After the moment to leave has come, sends in flight get this long for their answers, in ms.
const LEAVE_GRACE_MS: u64 = 1_000;
/// What a frame has besides the fields of a send.
const FRAME_SLACK_BYTES: usize = 48;
/// What an item of a run has besides its body and its content type: tags, lengths, a kind, a time.
const ITEM_SLACK_BYTES: usize = 48;

impl<S, R> Session<S, R> {
    /// There is a connection: greets. The nonce is the same for all connections of one session.
    pub fn connected(&mut self, now: u64, token: &str, nonce: &[u8]) {
        self.disconnected();
        self.phase = Phase::Greeting;
        (self.times.heard, self.times.pinged, self.times.answered) = (now, None, now);
        let hello = v1::Hello {
            min_version: frame::MIN_VERSION,
            max_version: frame::VERSION,
            token: token.into(),
            session_nonce: nonce.to_vec().into(),
            agent: self.config.agent.clone(),
        };
        self.control.push_back(hello.into());
    }

    /// The connection is gone. What it leaves open goes again on the next one, or is handed back.
    pub fn disconnected(&mut self) {
        self.phase = Phase::Offline;
        self.control.clear();
        self.ready.clear();
        self.asks.clear();
        self.questions.clear();
        self.calls_out = 0;
        self.wakes.clear();
        self.moved.clear();
        (self.in_flight, self.stuck) = (0, 0);
        (self.times.leave, self.times.leaving, self.times.moves_due, self.times.room) = (None, false, None, None);
        for conversation in self.conversations.values_mut() {
            (conversation.is_ready, conversation.streamed, conversation.question) = (false, false, Question::None);
            (conversation.stuck, conversation.wakes_at) = (false, 0);
            if let Some(outbox) = &mut conversation.outbox {
                outbox.disconnected();
            }
            if let Some(stream) = &mut conversation.stream {
                stream.disconnected();
            }
            conversation.is_moved = conversation.cursors.disconnected();
            if conversation.is_moved {
                self.moved.push(conversation.id.clone());
                self.times.moves_due = Some(0);
            }
        }
        let lost: Vec<_> = self.requests.iter().filter(|(_, p)| p.call.is_none()).map(|(&id, _)| id).collect();
        for id in lost {
            if let Some(pending) = self.requests.remove(&id) {
                self.outputs.push_back(Output::Lost { ticket: pending.ticket, maybe_done: true });
            }
        }
    }

    /// Appends frames to `out` until it has at least `max_bytes` or nothing is left to write now.
    pub fn write_frames(&mut self, now: u64, out: &mut BytesMut, max_bytes: usize) {
        while out.len() < max_bytes && self.phase != Phase::Offline {
            if let Some(frame) = self.control.pop_front() {
                frame.encode(out);
            } else if self.phase != Phase::Open || !self.write_next(now, out) {
                return;
            }
        }
    }

    /// Before a planned end: writes cursor moves that wait, and nothing that would need an answer.
    pub fn write_last_words(&mut self, out: &mut BytesMut) {
        while self.phase == Phase::Open && !self.moved.is_empty() {
            self.write_cursors(out);
        }
    }

    fn write_next(&mut self, now: u64, out: &mut BytesMut) -> bool {
        if self.credit.owed > 0 && self.credit.owed >= self.config.credit_bytes / 2 {
            ClientFrame::from(v1::Credit { bytes: std::mem::take(&mut self.credit.owed) }).encode(out);
            return true;
        }
        if self.times.moves_due.is_some_and(|at| at <= now) {
            self.write_cursors(out);
            return true;
        }
        if self.calls_out < limits::SESSION_CALLS_IN_FLIGHT && self.write_call(out) {
            return true;
        }
        if self.times.leaving || !self.window_has_room(now) {
            return false;
        }
        let Some(id) = self.ready.pop_front() else { return false };
        self.write_send(now, &id, out);
        true
    }

    /// A full window gets room from conversations without answers: their shard is dead, perhaps, and the others' is not.
    fn window_has_room(&mut self, now: u64) -> bool {
        let has_room = |session: &Self| session.in_flight - session.stuck < session.limits.in_flight;
        if has_room(self) || self.times.room.is_some_and(|at| at > now) {
            return has_room(self);
        }
        self.times.room = None;
        if self.in_flight >= limits::SESSION_SENDS_HELD / limits::SESSION_SENDS_IN_FLIGHT * self.limits.in_flight {
            return false;
        }
        for conversation in self.conversations.values_mut().filter(|conversation| !conversation.stuck) {
            let in_flight = conversation.outbox.as_ref().map_or(0, |outbox| outbox.in_flight());
            let stuck_at = conversation.answered_ms + limits::STUCK_SHARD_MS;
            if in_flight > 0 && stuck_at <= now {
                conversation.stuck = true;
                self.stuck += in_flight;
            } else if in_flight > 0 {
                self.times.room = Some(self.times.room.map_or(stuck_at, |at| at.min(stuck_at)));
            }
        }
        has_room(self)
    }

    fn write_cursors(&mut self, out: &mut BytesMut) {
        let mut moves = v1::MoveCursors::default();
        for id in self.moved.drain(..self.moved.len().min(limits::DEVICE_CURSORS_PER_FRAME)) {
            let Some(conversation) = self.conversations.get_mut(id.as_str()) else { continue };
            conversation.is_moved = false;
            let (delivered, read) = conversation.cursors.take_due();
            let cursor = |seq: stentor_proto::ids::Seq| v1::Cursor { conversation: id.as_str().into(), seq: seq.0 };
            moves.delivered.extend(delivered.map(cursor));
            moves.read.extend(read.map(cursor));
        }
        if self.moved.is_empty() {
            self.times.moves_due = None;
        }
        if !moves.delivered.is_empty() || !moves.read.is_empty() {
            ClientFrame::from(moves).encode(out);
        }
    }

    fn write_send(&mut self, now: u64, id: &ConversationId, out: &mut BytesMut) {
        let Some(conversation) = self.conversations.get_mut(id.as_str()) else { return };
        conversation.is_ready = false;
        let Some(outbox) = &mut conversation.outbox else { return };
        let limits = self.limits;
        match outbox.want(now, limits.run_sends) {
            Want::Send if !conversation.stuck => {}
            // More is in flight than when it was put here.
            Want::WakeAt(_) => return self.settle(now, id.as_str()),
            _ => return,
        }
        let too_large = |send: &v1::Send| {
            send.body.len() > limits.body_bytes || send.encoded_len() + FRAME_SLACK_BYTES > limits.frame_bytes
        };
        if outbox.peek().is_some_and(too_large)
            && let Some(ticket) = outbox.take_unsent()
        {
            // The gateway would have to end the connection; without a number nothing behind it is held up.
            let answer = Answer::Refused(Reason::BodyTooLarge.refusal());
            self.outputs.push_back(Output::Answered { ticket, answer });
            return self.settle(now, id.as_str());
        }
        let room = limits.in_flight.saturating_sub(self.in_flight - self.stuck).max(1);
        let mut frame_bytes = FRAME_SLACK_BYTES + id.as_str().len();
        let fits = |send: &v1::Send| {
            frame_bytes += ITEM_SLACK_BYTES + send.body.len() + send.content_type.len();
            !too_large(send) && frame_bytes <= limits.frame_bytes
        };
        let before = outbox.in_flight();
        if let Some(run) = outbox.transmit_run(room.min(limits.run_sends), fits) {
            ClientFrame::SendRun(v1::SendRun { conversation: id.as_str().into(), ..run }).encode(out);
        } else if let Some(send) = outbox.transmit() {
            let frame = ClientFrame::Send(std::mem::take(send));
            frame.encode(out);
            if let ClientFrame::Send(sent) = frame {
                *send = sent;
            }
        }
        if outbox.in_flight() > before {
            if self.in_flight == 0 {
                self.times.answered = now;
            }
            if before == 0 {
                conversation.answered_ms = now;
            }
            self.in_flight += outbox.in_flight() - before;
            outbox.gathers_from(now);
        }
        self.settle(now, id.as_str());
    }

    /// Brings a conversation's outbox where it wants to go next; call after everything that touched it.
    pub(super) fn settle(&mut self, now: u64, id: &str) {
        let Some(conversation) = self.conversations.get_mut(id) else { return };
        let Some(outbox) = &mut conversation.outbox else { return };
        let mut unknown = Vec::new();
        outbox.go_back(&mut unknown);
        let want = outbox.want(now, self.limits.run_sends);
        let id = conversation.id.clone();
        if self.phase == Phase::Open {
            match want {
                Want::Send if !conversation.is_ready => {
                    conversation.is_ready = true;
                    self.ready.push_back(id);
                }
                Want::Ask if conversation.question == Question::None => {
                    conversation.question = Question::Waits;
                    self.questions.push_back(id);
                }
                Want::WakeAt(at) if conversation.wakes_at != at => {
                    conversation.wakes_at = at;
                    self.wakes.insert((at, id));
                }
                _ => {}
            }
        }
        self.push_unknown(unknown);
        if self.times.leaving && self.in_flight == 0 {
            self.times.leave = Some(now);
        }
    }

    /// Writes the next question for a count, or the next request: a gateway stops reading when too many are open, and
    /// sends must not wait behind them.
    fn write_call(&mut self, out: &mut BytesMut) -> bool {
        let (id, call) = if let Some((id, call)) = self.next_question() {
            (id, Some(call))
        } else if let Some(id) = self.calls.pop_front() {
            (id, self.requests.get_mut(&id).and_then(|p| p.call.take()))
        } else {
            return false;
        };
        if call.is_some() {
            self.calls_out += 1;
            ClientFrame::from(v1::Request { id, call }).encode(out);
        }
        true
    }

    /// Of those that wait, the first one whose answer is still needed.
    fn next_question(&mut self) -> Option<(u64, Call)> {
        while let Some(id) = self.questions.pop_front() {
            let Some(conversation) = self.conversations.get_mut(id.as_str()) else { continue };
            if conversation.question != Question::Waits {
                continue;
            }
            conversation.question = Question::None;
            if conversation.outbox.as_mut().is_some_and(|outbox| outbox.asks()) {
                let number = self.next_request;
                self.next_request += 1;
                conversation.question = Question::Asked(number);
                let call = Call::SendState(v1::SendStateRequest { conversation: id.as_str().into() });
                self.asks.insert(number, id);
                return Some((number, call));
            }
        }
        None
    }

    /// Does what is due at this time.
    pub fn tick(&mut self, now: u64) -> Result<(), Violation> {
        if self.phase == Phase::Offline {
            return Ok(());
        }
        while let Some((at, _)) = self.wakes.first()
            && *at <= now
        {
            let Some((_, id)) = self.wakes.pop_first() else { break };
            self.wake(now, &id);
        }
        if self.in_flight > 0 && now >= self.times.answered + self.config.answer_ms {
            return Err(Violation::NoAnswer);
        }
        if now >= self.silent_at() {
            return Err(Violation::Silent);
        }
        if self.phase == Phase::Open && self.times.pinged.is_none() && now >= self.ping_at() {
            self.times.pinged = Some(now);
            self.control.push_back(v1::Ping { token: now }.into());
        }
        self.leave(now);
        Ok(())
    }

    fn wake(&mut self, now: u64, id: &ConversationId) {
        self.settle(now, id.as_str());
        let Some(stream) = self.conversations.get_mut(id.as_str()).and_then(|c| c.stream.as_mut()) else { return };
        if stream.retry_at.is_some_and(|at| at <= now) && self.phase == Phase::Open {
            stream.retry_at = None;
            self.control.push_back(subscription(id, stream.cursor()).into());
        }
    }

    fn leave(&mut self, now: u64) {
        if self.times.leave.is_none_or(|at| at > now) {
            return;
        }
        if self.in_flight == 0 || self.times.leaving {
            self.times.leave = None;
            self.outputs.push_back(Output::Leave);
        } else {
            self.times.leaving = true;
            self.times.leave = Some(now + LEAVE_GRACE_MS);
        }
    }

    fn ping_at(&self) -> u64 {
        let Config { ping_busy_ms, ping_idle_ms, .. } = self.config;
        let busy = self.in_flight > 0 || !self.requests.is_empty() || !self.asks.is_empty();
        self.times.heard + if busy { ping_busy_ms } else { ping_idle_ms }
    }

    fn silent_at(&self) -> u64 {
        match (self.phase, self.times.pinged) {
            (Phase::Greeting, _) => self.times.heard + self.config.silent_ms,
            (_, Some(at)) => at + self.config.silent_ms,
            _ => u64::MAX,
        }
    }

    /// When to call [`Session::tick`] and [`Session::write_frames`] at the latest.
    pub fn deadline(&self) -> Option<u64> {
        let open = match self.phase {
            Phase::Offline => return None,
            Phase::Greeting => return Some(self.silent_at()),
            Phase::Open => self.silent_at(),
        };
        let ping = if self.times.pinged.is_none() { self.ping_at() } else { u64::MAX };
        let answer = if self.in_flight > 0 { self.times.answered + self.config.answer_ms } else { u64::MAX };
        let wake = self.wakes.first().map(|(at, _)| *at);
        let room = self.times.room.filter(|_| !self.ready.is_empty());
        let others = [self.times.moves_due, self.times.leave, wake, room];
        others.into_iter().flatten().chain([open, ping, answer]).min()
    }
}
