//! What `apply` answers and what it asks to be done. Effects are hints for the leader of the current term: whoever
//! carries them out must never need them for correctness, since rows are the truth and effects can be lost.

use bytes::Bytes;
use stentor_proto::{
    ids::{Incarnation, SendNo, Seq, SessionNo, StampMs, Version},
    internal,
    reason::Reason,
    v1,
};

use crate::limits;

/// The answer to one command, in the order of its bundle.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It took a seq (or repeats what took it).
    Accepted {
        /// The event's seq.
        seq: Seq,
        /// The stamp under which it was first applied.
        stamp: StampMs,
        /// True when this answers a retry with the first result.
        repeat: bool,
        /// The conversation's version afterwards.
        version: Version,
    },
    /// It changed nothing but, where numbered and final, its own send state.
    Refused {
        /// Why.
        reason: Reason,
        /// The last consumed send number, where that matters.
        last: SendNo,
    },
    /// The session's fencing number.
    SessionOpened {
        /// Higher than every earlier session's of the device.
        session_no: SessionNo,
    },
    /// The number of the directory that joins.
    Joined {
        /// Given to nobody else, ever.
        incarnation: Incarnation,
    },
    /// Done, nothing to tell.
    Done,
}

impl Outcome {
    /// A refusal without send numbers.
    pub fn refused(reason: Reason) -> Self {
        Self::Refused { reason, last: SendNo(0) }
    }

    /// As it travels between nodes.
    pub fn to_proto(&self) -> internal::Outcome {
        use internal::outcome::Outcome as O;
        let outcome = match *self {
            Self::Accepted { seq, stamp, repeat, version } => {
                O::Accepted(internal::Accepted { seq: seq.0, stamp_ms: stamp.0, repeat, version: version.0 })
            }
            Self::Refused { reason, last } => {
                O::Refused(internal::Refused { reason: reason as u32, last: last.0, detail: String::new() })
            }
            Self::SessionOpened { session_no } => {
                O::SessionOpened(internal::SessionOpened { session_no: session_no.0 })
            }
            Self::Joined { incarnation } => O::Joined(internal::Joined { incarnation: incarnation.0 }),
            Self::Done => O::Done(internal::Done {}),
        };
        internal::Outcome { outcome: Some(outcome) }
    }

    /// From another node; a reason that this build does not know is an internal failure, never a success.
    pub fn from_proto(outcome: &internal::Outcome) -> Self {
        use internal::outcome::Outcome as O;
        match &outcome.outcome {
            Some(O::Accepted(a)) => Self::Accepted {
                seq: Seq(a.seq),
                stamp: StampMs(a.stamp_ms),
                repeat: a.repeat,
                version: Version(a.version),
            },
            Some(O::Refused(r)) => Self::Refused {
                reason: Reason::from_number(r.reason).unwrap_or(Reason::Internal),
                last: SendNo(r.last),
            },
            Some(O::SessionOpened(s)) => Self::SessionOpened { session_no: SessionNo(s.session_no) },
            Some(O::Joined(j)) => Self::Joined { incarnation: Incarnation(j.incarnation) },
            Some(O::Done(_)) => Self::Done,
            None => Self::refused(Reason::Internal),
        }
    }

    /// The outcomes of a run as they travel: those that differ by a seq alone as one.
    pub fn spans(outcomes: &[Self]) -> internal::Outcomes {
        let mut spans: Vec<internal::OutcomeSpan> = Vec::new();
        let mut first = None;
        for outcome in outcomes {
            match (spans.last_mut(), first) {
                (Some(span), Some(first)) if outcome.follows(first, u64::from(span.more) + 1) => span.more += 1,
                _ => {
                    first = Some(outcome);
                    spans.push(internal::OutcomeSpan { outcome: Some(outcome.to_proto()), more: 0 });
                }
            }
        }
        internal::Outcomes { spans }
    }

    /// From another node; `None` for more than a run can have.
    pub fn from_spans(outcomes: &internal::Outcomes) -> Option<Vec<Self>> {
        let mut all = Vec::new();
        for span in &outcomes.spans {
            let first = span.outcome.as_ref().map_or_else(|| Self::refused(Reason::Internal), Self::from_proto);
            for further in 0..=u64::from(span.more) {
                if all.len() >= limits::RUN_SENDS {
                    return None;
                }
                let mut next = first.clone();
                if let Self::Accepted { seq, .. } = &mut next {
                    *seq = Seq(seq.0.saturating_add(further));
                }
                all.push(next);
            }
        }
        Some(all)
    }

    /// Whether it is what `first` says of the send so many places behind its own.
    fn follows(&self, first: &Self, places: u64) -> bool {
        match (first, self) {
            (
                &Self::Accepted { seq, stamp, repeat, version },
                &Self::Accepted { seq: at, stamp: then, repeat: again, version: now },
            ) => (at.0, then, again, now) == (seq.0.wrapping_add(places), stamp, repeat, version),
            (Self::Refused { .. }, Self::Refused { .. }) => self == first,
            _ => false,
        }
    }

    /// The refusal as callers see it, if it is one.
    pub fn refusal(&self) -> Option<v1::Refusal> {
        match self {
            Self::Refused { reason, last } => Some(v1::Refusal { last: last.0, ..reason.refusal() }),
            _ => None,
        }
    }
}

/// What the leader should do after an entry was applied.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Carry an event to whoever has interest in its conversation.
    FanOut {
        /// The tenant; shares the entry's memory, as the next two do: short-lived use only.
        app: Bytes,
        /// The conversation.
        conversation: Bytes,
        /// The event's seq.
        seq: Seq,
        /// The whole event record.
        record: Bytes,
    },
    /// The conversation has outbox items that a user's shard should hear of.
    Outbox {
        /// The tenant.
        app: Bytes,
        /// The conversation.
        conversation: Bytes,
        /// The item, which is its membership event's seq.
        item: Seq,
        /// The user concerned.
        user: Bytes,
        /// Removed, rather than added.
        removed: bool,
    },
    /// The user's list of conversations changed: whoever has interest in him looks what is new.
    UserChanged {
        /// The tenant.
        app: Bytes,
        /// The user.
        user: Bytes,
        /// The head of his own stream.
        head: Seq,
    },
}

/// What applying one entry gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Applied {
    /// One per command.
    pub outcomes: Vec<Outcome>,
    /// In the order in which they came about.
    pub effects: Vec<Effect>,
}
