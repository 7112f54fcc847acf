//! What a device makes of the gateway's frames. Must never trust them: a frame that breaks a promise is a
//! [`Violation`], and nothing that came before it is lost by that.

use stentor_proto::{
    Bytes,
    frame::{self, ServerFrame},
    ids::{ConversationId, SendNo, Seq, StampMs, key_crc},
    v1::{self, response},
};

use crate::limits;

use super::{
    Answer, Conversation, Limits, Output, Phase, Question, Session, Violation, credit_cost, stream::Stream,
    subscription,
};

impl<S, R> Session<S, R> {
    /// Takes one frame of the gateway: its kind byte and its message.
    pub fn handle(&mut self, now: u64, kind: u8, message: Bytes) -> Result<(), Violation> {
        self.times.heard = now;
        self.times.pinged = None;
        let Some(frame) = ServerFrame::decode(kind, message)? else { return Ok(()) };
        match (self.phase, frame) {
            (Phase::Greeting, ServerFrame::Welcome(welcome)) => self.welcome(now, welcome)?,
            (Phase::Greeting | Phase::Open, ServerFrame::Fatal(fatal)) => return self.fatal(fatal),
            (Phase::Greeting | Phase::Open, ServerFrame::GoAway(away)) => self.go_away(now, &away),
            (Phase::Greeting | Phase::Open, ServerFrame::Pong(_)) => {}
            (Phase::Open, ServerFrame::Events(events)) => self.events(events)?,
            (Phase::Open, ServerFrame::ConversationState(state)) => self.state(now, state),
            (Phase::Open, ServerFrame::UpToDate(_)) => self.outputs.push_back(Output::UpToDate),
            (Phase::Open, ServerFrame::Sent(sent)) => self.sent(now, &sent),
            (Phase::Open, ServerFrame::SendRefused(refused)) => self.send_refused(now, refused),
            (Phase::Open, ServerFrame::Response(response)) => self.response(now, response),
            (Phase::Open, ServerFrame::CursorsMoved(moved)) => self.cursors_moved(moved),
            _ => return Err(Violation::UnexpectedFrame(kind)),
        }
        Ok(())
    }

    fn welcome(&mut self, now: u64, welcome: v1::Welcome) -> Result<(), Violation> {
        if !(frame::MIN_VERSION..=frame::VERSION).contains(&welcome.version) {
            return Err(Violation::Version(welcome.version));
        }
        self.phase = Phase::Open;
        self.app.clone_from(&welcome.app);
        self.limits = Limits {
            body_bytes: welcome.max_body_bytes as usize,
            frame_bytes: welcome.max_frame_bytes as usize,
            in_flight: (welcome.max_in_flight as usize).max(1),
            run_sends: welcome.max_run_sends as usize,
        };
        self.outputs.push_back(Output::Welcome(welcome));
        self.resume(now);
        Ok(())
    }

    /// The one resume frame of a connection, and behind it what waited for one.
    fn resume(&mut self, now: u64) {
        let mut resume = v1::Resume { only_listed: self.config.only_listed, ..Default::default() };
        let mut from_head = Vec::new();
        for conversation in self.conversations.values_mut() {
            let Some(stream) = &conversation.stream else { continue };
            conversation.streamed = true;
            match stream.cursor() {
                Some(seq) => {
                    let id = conversation.id.as_str().into();
                    resume.delivered.push(v1::Cursor { conversation: id, seq: seq.0 });
                }
                None => from_head.push(subscription(&conversation.id, None)),
            }
        }
        // What still waits for the application is not room; 0 would mean the gateway's default.
        resume.credit_bytes = self.config.credit_bytes.saturating_sub(self.credit.held).max(1);
        self.credit.owed = 0;
        self.control.push_back(resume.into());
        self.control.extend(from_head.into_iter().map(Into::into));
        let waiting: Vec<_> =
            self.conversations.values().filter(|c| c.outbox.is_some()).map(|c| c.id.clone()).collect();
        waiting.iter().for_each(|id| self.settle(now, id.as_str()));
    }

    fn fatal(&mut self, fatal: v1::Fatal) -> Result<(), Violation> {
        let refusal = fatal.refusal.unwrap_or_default();
        if refusal.retryable || refusal.reason.is_empty() {
            return Err(Violation::Ended(refusal.reason));
        }
        self.outputs.push_back(Output::Final(refusal));
        Ok(())
    }

    fn go_away(&mut self, now: u64, away: &v1::GoAway) {
        // Everybody was told the same: a random moment keeps them from coming to the next gateway at once.
        let within = self.draws.below(u64::from(away.within_ms) + 1);
        self.times.leave.get_or_insert(now + within);
    }

    fn events(&mut self, events: v1::Events) -> Result<(), Violation> {
        let found = self.conversations.get_mut(events.conversation.as_str());
        let Some((id, stream)) = found.and_then(|c| Some((&c.id, c.stream.as_mut()?))) else {
            // Nobody takes what was on its way when its stream was unsubscribed.
            self.credit.owed += events.items.iter().map(credit_cost).sum::<u64>();
            return Ok(());
        };
        let key_crc = key_crc(self.app.as_bytes(), events.conversation.as_bytes());
        for item in events.items {
            let credit_bytes = credit_cost(&item);
            let conversation = id.clone();
            match stream.take(item, key_crc) {
                Ok(Some(step)) => {
                    self.credit.held += credit_bytes;
                    self.outputs.push_back(Output::Step { conversation, step, credit_bytes });
                }
                Ok(None) => self.credit.owed += credit_bytes,
                Err(source) => return Err(Violation::Stream { conversation, source }),
            }
        }
        Ok(())
    }

    fn state(&mut self, now: u64, state: v1::ConversationState) {
        let Ok(id) = ConversationId::new(&state.conversation) else { return };
        if let Some(refusal) = state.refusal {
            return self.stream_refused(now, &id, refusal);
        }
        let (delivered, read) = (Seq(state.delivered), Seq(state.read));
        let follows_all = !self.config.only_listed;
        if !self.conversations.contains_key(id.as_str()) && !follows_all {
            return;
        }
        let Some(conversation) = self.conversation(&id) else { return };
        if conversation.stream.is_none() && follows_all {
            let after = delivered.max(conversation.passed);
            conversation.stream = Some(Stream::new(super::Start::After(after), false));
            conversation.streamed = true;
        }
        conversation.cursors.confirmed(delivered, read);
        if let Some(stream) = &mut conversation.stream {
            stream.state(Seq(state.head));
        }
        self.adopt(now, &id, SendNo(state.last_send_no), true);
        self.outputs.push_back(Output::State { conversation: id, head: Seq(state.head), delivered, read });
    }

    fn stream_refused(&mut self, now: u64, id: &ConversationId, refusal: v1::Refusal) {
        let Some(conversation) = self.conversations.get_mut(id.as_str()) else { return };
        let Some(stream) = &mut conversation.stream else { return };
        if refusal.retryable {
            let wait = self.config.retry.wait_ms(stream.attempt, &mut self.draws).max(1);
            stream.attempt = stream.attempt.saturating_add(1);
            stream.retry_at = Some(now + wait);
            self.wakes.insert((now + wait, id.clone()));
            return;
        }
        conversation.passed = stream.cursor().unwrap_or_default();
        conversation.stream = None;
        self.outputs.push_back(Output::Ended { conversation: id.clone(), refusal });
    }

    /// The server's count of this device's sends. A conversation's state may be older than the last answer; the
    /// answer to a question is not.
    fn adopt(&mut self, now: u64, id: &ConversationId, last: SendNo, is_state: bool) {
        let Some(conversation) = self.conversations.get_mut(id.as_str()) else { return };
        // Only for a device that sends here: a reader of many conversations needs no counts.
        let Some(outbox) = &mut conversation.outbox else { return };
        if is_state && !outbox.adopts_any_state() {
            return;
        }
        let mut unknown = Vec::new();
        outbox.adopt(last, &mut unknown);
        // Its answer is older than what is sent from now on: it must not say anything about that.
        if let Question::Asked(number) = std::mem::take(&mut conversation.question) {
            self.asks.remove(&number);
        }
        self.push_unknown(unknown);
        self.settle(now, id.as_str());
    }

    pub(super) fn push_unknown(&mut self, unknown: Vec<S>) {
        let refusal = stentor_proto::reason::Reason::DedupWindowPassed.refusal();
        let answers = unknown.into_iter().map(|ticket| (ticket, Answer::Unknown(refusal.clone())));
        self.outputs.extend(answers.map(|(ticket, answer)| Output::Answered { ticket, answer }));
    }

    fn sent(&mut self, now: u64, sent: &v1::Sent) {
        self.times.answered = now;
        let Self { conversations, outputs, .. } = self;
        let found = conversations.get_mut(sent.conversation.as_str());
        let Some(outbox) = found.and_then(|c: &mut Conversation<S>| c.outbox.as_deref_mut()) else { return };
        let before = outbox.in_flight();
        let (stamp, repeat) = (StampMs(sent.stamp_ms), sent.repeat);
        // More than can be open are answered by nobody.
        for further in 0..=u64::from(sent.more).min(limits::MAX_OPEN_SENDS) {
            let (send_no, seq) = (sent.send_no.saturating_add(further), sent.seq.saturating_add(further));
            if let Some(ticket) = outbox.sent(send_no) {
                let answer = Answer::Sent { send_no: SendNo(send_no), seq: Seq(seq), stamp, repeat };
                outputs.push_back(Output::Answered { ticket, answer });
            }
        }
        self.landed(now, &sent.conversation, before);
        self.settle(now, &sent.conversation);
    }

    fn send_refused(&mut self, now: u64, refused: v1::SendRefused) {
        self.times.answered = now;
        let Self { conversations, config, draws, .. } = self;
        let found = conversations.get_mut(refused.conversation.as_str());
        let Some(outbox) = found.and_then(|c: &mut Conversation<S>| c.outbox.as_deref_mut()) else { return };
        let before = outbox.in_flight();
        let refusal = refused.refusal.unwrap_or_default();
        let answer = outbox.refused(refusal, refused.send_no, now, &config.retry, draws);
        self.landed(now, &refused.conversation, before);
        if let Some((ticket, answer)) = answer {
            self.outputs.push_back(Output::Answered { ticket, answer });
        }
        self.settle(now, &refused.conversation);
    }

    /// Sends of a conversation, of which so many were in flight, were answered: it is not stuck.
    fn landed(&mut self, now: u64, id: &str, before: usize) {
        let Some(conversation) = self.conversations.get_mut(id) else { return };
        let left = conversation.outbox.as_ref().map_or(0, |outbox| outbox.in_flight());
        self.in_flight -= before - left;
        conversation.answered_ms = now;
        if std::mem::take(&mut conversation.stuck) {
            self.stuck -= before;
        }
    }

    fn response(&mut self, now: u64, response: v1::Response) {
        let result = match response.result {
            Some(response::Result::Refusal(refusal)) => Err(refusal),
            Some(result) => Ok(result),
            None => Err(stentor_proto::reason::Reason::NotBuilt.refusal()),
        };
        self.calls_out = self.calls_out.saturating_sub(1);
        if let Some(id) = self.asks.remove(&response.id) {
            self.send_state(now, &id, result);
        } else if let Some(pending) = self.requests.remove(&response.id) {
            self.outputs.push_back(Output::Response { ticket: pending.ticket, result });
        }
    }

    fn send_state(&mut self, now: u64, id: &ConversationId, result: Result<response::Result, v1::Refusal>) {
        let Some(conversation) = self.conversations.get_mut(id.as_str()) else { return };
        conversation.question = Question::None;
        let Some(outbox) = &mut conversation.outbox else { return };
        match result {
            Ok(response::Result::SendState(state)) => return self.adopt(now, id, SendNo(state.last), false),
            Err(refusal) if !refusal.retryable => {
                let mut answers = Vec::new();
                outbox.no_count(&refusal, &mut answers);
                let answers = answers.into_iter().map(|(ticket, answer)| Output::Answered { ticket, answer });
                self.outputs.extend(answers);
            }
            // A success of another kind is the gateway's mistake; asking again is all that can be done.
            _ => outbox.ask_later(now, &self.config.retry, &mut self.draws),
        }
        self.settle(now, id.as_str());
    }

    fn cursors_moved(&mut self, moved: v1::CursorsMoved) {
        for (cursors, is_read) in [(&moved.delivered, false), (&moved.read, true)] {
            for cursor in cursors {
                let Some(conversation) = self.conversations.get_mut(cursor.conversation.as_str()) else { continue };
                let (delivered, read) = if is_read { (0, cursor.seq) } else { (cursor.seq, 0) };
                conversation.cursors.confirmed(Seq(delivered), Seq(read));
            }
        }
        self.outputs.push_back(Output::CursorsMoved(moved));
    }
}
