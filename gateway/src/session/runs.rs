//! Sends that came in a row: one command for all of them, an answer for each. Must never skip a number: what of a run
//! is not proposed is refused for now, and all behind it.

use stentor_engine::{command, effect::Outcome, limits};
use stentor_proto::{
    ids::{ConversationId, ShardId},
    internal::{self, OutcomeSpan},
    reason::Reason,
    v1::{self, Refusal},
};

use super::{Session, unexpected};
use crate::inbox::{Purpose, Reply};

/// What an item counts for in a device's bytes besides its body and its content type.
const ITEM_BYTES: usize = 16;

impl Session {
    /// A refusal ends the connection: no client makes such a run.
    pub(super) fn send_run(&mut self, mut run: v1::SendRun) -> Result<(), Reason> {
        let count = run.items.len();
        let bytes: usize = run.items.iter().map(|item| item.body.len()).sum();
        let numbered = run.done_no < run.send_no && run.send_no.checked_add(count as u64).is_some();
        if !numbered || count == 0 || count > limits::RUN_SENDS || bytes > limits::RUN_BYTES {
            return Err(Reason::Malformed);
        }
        let conversation = ConversationId::new(&run.conversation).map_err(|_| Reason::BadId)?;
        self.core.metrics.sends.inc_by(count as u64);
        let (admitted, refused) = match self.core.shard_of(&self.who.app, conversation.as_str()) {
            Ok(shard) => {
                let sizes = run.items.iter().map(|item| ITEM_BYTES + item.body.len() + item.content_type.len());
                let (admitted, refused) = self.admit_some(shard, (conversation.as_str(), run.send_no), sizes);
                let items = run.items.drain(..).take(admitted).collect();
                self.propose_run(shard, &conversation, v1::SendRun { items, ..run.clone() })?;
                (admitted, refused)
            }
            Err(reason) => (0, Err(reason)),
        };
        if let Err(reason) = refused {
            self.refuse_sends(conversation.as_str(), run.send_no, admitted..count, &reason.refusal());
        }
        Ok(())
    }

    fn propose_run(&mut self, shard: ShardId, conversation: &ConversationId, run: v1::SendRun) -> Result<(), Reason> {
        let (count, send_no) = (run.items.len(), run.send_no);
        if count == 0 {
            return Ok(());
        }
        let largest = self.core.config.limits.max_body_bytes;
        let made = internal::SendRun {
            actor: Some(command::actor(&self.who.user, Some(&self.who.device), false)),
            send_no,
            done_no: run.done_no,
            session_no: self.server.session_no().0,
            items: run.items.into_iter().map(|item| command::run_item(item, largest)).collect(),
        };
        let command = command::send_run(&self.who.app, conversation, made);
        command::check(&command)?;
        self.server.sends_started(shard, count, self.core.now_ms());
        let purpose = Purpose::Run { shard, conversation: conversation.to_string(), send_no, count };
        self.propose_to(shard, &command, purpose);
        Ok(())
    }

    pub(super) fn run_answered(
        &mut self,
        shard: ShardId,
        conversation: String,
        send_no: u64,
        count: usize,
        result: Result<Reply, Refusal>,
    ) {
        self.server.sends_answered(shard, count, result.is_ok(), self.core.now_ms());
        let result = match result {
            // A run of one has one.
            Ok(Reply::Outcome(outcome)) if count == 1 => {
                Ok(Reply::Outcomes(vec![OutcomeSpan { outcome: Some(outcome.to_proto()), more: 0 }]))
            }
            result => result,
        };
        match result {
            Ok(Reply::Outcomes(spans)) => {
                let mut told = 0;
                for span in spans {
                    // A broker that says more than was asked is believed no further.
                    let places = told..(told + 1 + span.more as usize).min(count);
                    told = places.end;
                    self.span_answered(&conversation, send_no, places, &span);
                }
                if told < count {
                    let unknown = Reason::OutcomeUnknown.refusal();
                    self.refuse_sends(&conversation, send_no, told..count, &unknown);
                }
            }
            other => self.refuse_sends(&conversation, send_no, 0..count, &unexpected(other)),
        }
    }

    fn span_answered(&mut self, conversation: &str, send_no: u64, places: std::ops::Range<usize>, span: &OutcomeSpan) {
        if places.is_empty() {
            return;
        }
        match span.outcome.as_ref().map(Outcome::from_proto) {
            Some(Outcome::Accepted { seq, stamp, repeat, .. }) => self.out.push(v1::Sent {
                conversation: conversation.into(),
                send_no: send_no + places.start as u64,
                seq: seq.0,
                stamp_ms: stamp.0,
                repeat,
                more: (places.len() - 1) as u32,
            }),
            Some(Outcome::Refused { reason, last }) => {
                if matches!(reason, Reason::NotAParticipant | Reason::UnknownConversation) {
                    places.clone().for_each(|_| self.charge_stranger());
                }
                let refusal = Refusal { last: last.0, ..reason.refusal() };
                self.refuse_sends(conversation, send_no, places, &refusal);
            }
            _ => self.refuse_sends(conversation, send_no, places, &Reason::Internal.refusal()),
        }
    }

    /// Refuses the sends at these places behind the one with `send_no`.
    fn refuse_sends(&mut self, conversation: &str, send_no: u64, places: std::ops::Range<usize>, refusal: &Refusal) {
        for place in places {
            self.refuse_send(conversation.into(), send_no + place as u64, refusal.clone());
        }
    }
}
