//! Sends and cursor moves of a session: checked, made into commands, answered. Must never answer a numbered send as
//! refused for good by itself: such a refusal consumes the number, so it has to go through `apply`.

use std::collections::BTreeMap;

use stentor_engine::{
    command,
    effect::Outcome,
    session::server::{CursorKind, Moves},
};
use stentor_proto::{
    Bytes,
    ids::{ConversationId, Seq, ShardId},
    internal,
    reason::Reason,
    v1::{self, Refusal},
};

use super::{Session, unexpected};
use crate::inbox::{Purpose, Reply};

impl Session {
    pub(super) fn send(&mut self, send: v1::Send, frame_bytes: usize) {
        self.core.metrics.sends.inc();
        let (conversation, send_no) = (send.conversation.clone(), send.send_no);
        // Before anything is remembered of it: what is no id may be as long as a frame.
        let known = ConversationId::new(&conversation).map_err(|_| Reason::BadId);
        let shard = known.and_then(|_| self.core.shard_of(&self.who.app, &conversation));
        let admitted = shard.and_then(|shard| self.admit(shard, &send, frame_bytes).map(|()| shard));
        let made = admitted.and_then(|shard| Ok((shard, self.command_of(send)?)));
        match made {
            Ok((shard, command)) => {
                self.server.sends_started(shard, 1, self.core.now_ms());
                self.propose_to(shard, &command, Purpose::Send { shard, conversation, send_no });
            }
            Err(reason) => self.refuse_send(conversation, send_no, reason.refusal()),
        }
    }

    /// The command to propose: the send, or the refusal that takes its number. An error is for what no number can be
    /// taken for, since nothing could ever come of it.
    fn command_of(&self, send: v1::Send) -> Result<internal::Command, Reason> {
        let conversation = ConversationId::new(&send.conversation).map_err(|_| Reason::BadId)?;
        if send.send_no == 0 {
            return Err(Reason::Malformed);
        }
        let body_bytes = send.body.len();
        let client_key = (!send.client_id.is_empty())
            .then(|| internal::ClientKey { client_id: Bytes::from(send.client_id), first_try_ms: send.first_try_ms });
        let send = internal::Send {
            actor: Some(command::actor(&self.who.user, Some(&self.who.device), false)),
            send_no: send.send_no,
            done_no: send.done_no,
            client_key,
            kind: send.kind,
            content_type: Bytes::from(send.content_type),
            sent_at_ms: send.sent_at_ms,
            body: send.body,
            expect_version: send.expect_version,
            expect_epoch: send.expect_epoch,
            refused: 0,
            session_no: self.server.session_no().0,
        };
        let command = command::send(&self.who.app, &conversation, send);
        let checked = match command::check(&command) {
            Ok(()) if body_bytes > self.core.config.limits.max_body_bytes => Err(Reason::BodyTooLarge),
            checked => checked,
        };
        let Err(reason) = checked else { return Ok(command) };
        let refused = command::refused_send(&command, reason).ok_or(reason)?;
        command::check(&refused).map(|()| refused)
    }

    pub(super) fn send_answered(
        &mut self,
        shard: ShardId,
        conversation: String,
        send_no: u64,
        result: Result<Reply, Refusal>,
    ) {
        self.server.sends_answered(shard, 1, result.is_ok(), self.core.now_ms());
        let refusal = match result {
            Ok(Reply::Outcome(Outcome::Accepted { seq, stamp, repeat, .. })) => {
                let (seq, stamp_ms) = (seq.0, stamp.0);
                return self.out.push(v1::Sent { conversation, send_no, seq, stamp_ms, repeat, more: 0 });
            }
            Ok(Reply::Outcome(Outcome::Refused { reason, last })) => {
                if matches!(reason, Reason::NotAParticipant | Reason::UnknownConversation) {
                    self.charge_stranger();
                }
                Refusal { last: last.0, ..reason.refusal() }
            }
            other => unexpected(other),
        };
        self.refuse_send(conversation, send_no, refusal);
    }

    pub(super) fn refuse_send(&mut self, conversation: String, send_no: u64, refusal: Refusal) {
        self.core.metrics.refused_sends.inc();
        self.out.push(v1::SendRefused { conversation, send_no, refusal: Some(refusal) });
    }

    /// Cursors may not pass what the conversation has: for a followed one that is what was handed on, for others its
    /// head is asked for first.
    pub(super) fn move_cursors(&mut self, moves: &v1::MoveCursors) {
        if let Err(reason) = self.may_call() {
            let all = moves.delivered.iter().chain(&moves.read);
            return self.tell_refused(all.map(|c| refused_cursor(&c.conversation, reason.refusal())).collect());
        }
        let mut refused = Vec::new();
        let mut unknown: BTreeMap<ShardId, Vec<(CursorKind, ConversationId, Seq)>> = BTreeMap::new();
        let delivered = moves.delivered.iter().map(|cursor| (CursorKind::Delivered, cursor));
        let all = delivered.chain(moves.read.iter().map(|cursor| (CursorKind::Read, cursor)));
        let now_ms = self.core.now_ms();
        for (kind, cursor) in all {
            let Ok(conversation) = ConversationId::new(&cursor.conversation) else {
                refused.push(refused_cursor(&cursor.conversation, Reason::BadId.refusal()));
                continue;
            };
            let seq = Seq(cursor.seq);
            match self.delivered(&cursor.conversation) {
                Some(upto) if seq <= upto => self.cursors.moved(kind, &conversation, seq, now_ms),
                Some(_) => {
                    refused.push(refused_cursor(&cursor.conversation, Reason::CursorBeyondHead.refusal()));
                }
                None => match self.core.shard_of(&self.who.app, conversation.as_str()) {
                    Ok(shard) => unknown.entry(shard).or_default().push((kind, conversation, seq)),
                    Err(reason) => refused.push(refused_cursor(&cursor.conversation, reason.refusal())),
                },
            }
        }
        for (shard, moves) in unknown {
            // Counted like a call: each holds a question open.
            self.server.call_started();
            let conversations = moves.iter().map(|(_, conversation, _)| conversation.as_str().into()).collect();
            let frame = self.heads_of(shard, conversations);
            let ticket = self.ticket(Purpose::CursorHeads { moves });
            self.core.ask(shard, frame, ticket);
        }
        self.tell_refused(refused);
        if self.cursors.is_full() {
            self.flush_cursors();
        }
    }

    pub(super) fn cursor_heads(
        &mut self,
        moves: Vec<(CursorKind, ConversationId, Seq)>,
        result: Result<Reply, Refusal>,
    ) {
        self.server.call_answered();
        let (states, refusal) = match result {
            Ok(Reply::Heads(states)) => (states, Reason::Internal.refusal()),
            other => (Vec::new(), unexpected(other)),
        };
        let now_ms = self.core.now_ms();
        let mut refused = Vec::new();
        for (kind, conversation, seq) in moves {
            let state = states.iter().find(|state| state.conversation == conversation.as_str());
            let refusal = match state {
                Some(v1::ConversationState { refusal: Some(refusal), .. }) => refusal.clone(),
                Some(state) if seq.0 <= state.head => {
                    self.cursors.moved(kind, &conversation, seq, now_ms);
                    continue;
                }
                Some(_) => Reason::CursorBeyondHead.refusal(),
                None => refusal.clone(),
            };
            refused.push(refused_cursor(conversation.as_str(), refusal));
        }
        self.tell_refused(refused);
    }

    /// Proposes all moves that wait, as few commands as they fit in.
    pub(super) fn flush_cursors(&mut self) {
        while let Some(moves) = self.cursors.take() {
            let (who, session_no) = (&self.who, self.server.session_no());
            let command =
                command::move_cursors(&who.app, &who.user, &who.device, session_no, &moves.delivered, &moves.read);
            let user = who.user.clone();
            self.propose(user.as_str(), &command, Purpose::Cursors { moves });
        }
    }

    pub(super) fn cursors_answered(&mut self, moves: Moves, result: Result<Reply, Refusal>) {
        let refusal = match result {
            Ok(Reply::Outcome(Outcome::Done)) => {
                let cursors = |moves: Vec<(ConversationId, Seq)>| {
                    moves
                        .into_iter()
                        .map(|(c, seq)| v1::Cursor { conversation: c.as_str().into(), seq: seq.0 })
                        .collect()
                };
                let (delivered, read) = (cursors(moves.delivered), cursors(moves.read));
                return self.out.push(v1::CursorsMoved { delivered, read, refused: Vec::new() });
            }
            Ok(Reply::Outcome(Outcome::Refused { reason: Reason::SessionSuperseded, .. })) => {
                return self.fatal(Reason::SessionSuperseded.refusal());
            }
            Ok(Reply::Outcome(outcome)) => outcome.refusal().unwrap_or_else(|| Reason::Internal.refusal()),
            other => unexpected(other),
        };
        let now_ms = self.core.now_ms();
        let mut refused = Vec::new();
        let delivered = moves.delivered.into_iter().map(|moved| (CursorKind::Delivered, moved));
        for (kind, (conversation, seq)) in delivered.chain(moves.read.into_iter().map(|m| (CursorKind::Read, m))) {
            if refusal.retryable {
                self.cursors.moved(kind, &conversation, seq, now_ms);
            } else {
                refused.push(refused_cursor(conversation.as_str(), refusal.clone()));
            }
        }
        self.tell_refused(refused);
    }

    fn tell_refused(&mut self, refused: Vec<v1::CursorRefused>) {
        if !refused.is_empty() {
            self.out.push(v1::CursorsMoved { refused, ..Default::default() });
        }
    }
}

fn refused_cursor(conversation: &str, refusal: Refusal) -> v1::CursorRefused {
    v1::CursorRefused { conversation: conversation.into(), refusal: Some(refusal) }
}
