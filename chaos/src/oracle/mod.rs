//! What each client was promised, and what readers saw: operations in, a verdict out. Pure data: must never do IO, read
//! a clock, or take a time-out for a refusal.

mod case;
mod history;
mod membership;
mod recorder;
mod verdict;

pub use case::{Case, Conversation, MessageKey, Sighting};
pub use history::{
    Answer, Call, CursorMove, CursorSeen, Device, Event, Final, History, Interval, Item, Message, Moment, Name,
    Operation, Outcome, Page, Start, Stream,
};
pub use membership::{Membership, Stay};
pub use recorder::{OperationId, Recorder, StreamId};
pub use verdict::{Judged, Verdict, Violation, Violations, judge};
