//! The record of a run: every operation with its interval and outcome, every stream, every cursor. Must never say more
//! than a client could see: no state of a server stands here.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use stentor_client::EventKind;

/// An id of a user, device or conversation, shared by everything that names it.
pub type Name = Arc<str>;

/// A point in the order in which the recorder saw things happen; later ones are greater, no two are equal. Real time
/// between processes is known only as far as this order shows it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub u64);

/// Who acts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// Whose it is.
    pub user: Name,
    /// Its own id.
    pub name: Name,
}

impl Device {
    /// A user's device.
    pub fn new(user: &str, name: &str) -> Self {
        Self { user: user.into(), name: name.into() }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.user, self.name)
    }
}

/// What became of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Outcome<T> {
    /// The server said so.
    Acknowledged(T),
    /// The server refuses it, by this reason: nothing has happened.
    Refused(Name),
    /// Nobody can say: it may have happened, or may still happen.
    #[default]
    Unknown,
}

/// From before the client asked until after it had the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    /// Not after the operation left the client.
    pub invoked: Moment,
    /// Not before the answer reached it; `None` while there is none.
    pub answered: Option<Moment>,
}

/// A message as its sender knows it. No two messages of one user may have the same body, unless they are attempts of
/// one message: that is how an event is traced to who sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The caller's own key: attempts with the same one are one message.
    pub client_id: Option<Name>,
    /// The content.
    pub body: Bytes,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// To create the conversation; who joins later sees all of it, or only what comes after.
    Create {
        /// All of it.
        history_full: bool,
    },
    /// To send a message. The order of a device's sends in a history is the order in which it sent them.
    Send(Message),
    /// To add this user.
    Add(Name),
    /// To remove this user.
    Remove(Name),
    /// To read a page of history.
    Read {
        /// Whether the answer must have everything that was acknowledged before.
        linearizable: bool,
        /// Ascending from after this seq; `None`: the last ones.
        after: Option<u64>,
    },
}

/// What an acknowledgement says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Of everything that becomes an event.
    Event {
        /// Its place.
        seq: u64,
        /// An earlier attempt had been accepted, and this is its result.
        repeat: bool,
    },
    /// Of a read.
    Page(Page),
}

/// One thing that a device did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// Who.
    pub by: Device,
    /// Where.
    pub conversation: Name,
    /// When.
    pub interval: Interval,
    /// What.
    pub call: Call,
    /// And what became of it.
    pub outcome: Outcome<Answer>,
}

impl Operation {
    /// The seq that was acknowledged, and whether it is an earlier attempt's.
    pub fn event(&self) -> Option<(u64, bool)> {
        match self.outcome {
            Outcome::Acknowledged(Answer::Event { seq, repeat }) => Some((seq, repeat)),
            _ => None,
        }
    }

    /// The page that was read.
    pub fn page(&self) -> Option<&Page> {
        match &self.outcome {
            Outcome::Acknowledged(Answer::Page(page)) => Some(page),
            _ => None,
        }
    }

    /// The message, if it is a send.
    pub fn message(&self) -> Option<&Message> {
        match &self.call {
            Call::Send(message) => Some(message),
            _ => None,
        }
    }

    /// When the answer came; of an unknown outcome none ever counts.
    pub fn answered(&self) -> Option<Moment> {
        match self.outcome {
            Outcome::Unknown => None,
            _ => self.interval.answered,
        }
    }
}

/// An event as a reader saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Its place.
    pub seq: u64,
    /// What it is.
    pub kind: EventKind,
    /// Whose doing.
    pub sender: Name,
    /// From which device; empty for a call without one.
    pub device: Name,
    /// The sender's key, or the one made of device and send number.
    pub client_id: Name,
    /// Who was added or removed.
    pub subject: Name,
    /// The content.
    pub body: Bytes,
    /// The cluster's time of it.
    pub stamp_ms: u64,
}

impl From<&stentor_client::Event> for Event {
    fn from(event: &stentor_client::Event) -> Self {
        Self {
            seq: event.seq.0,
            kind: event.kind,
            sender: (&*event.sender).into(),
            device: (&*event.device).into(),
            client_id: (&*event.client_id).into(),
            subject: (&*event.subject).into(),
            // A copy: the original shares the memory of a whole frame.
            body: Bytes::copy_from_slice(&event.body),
            stamp_ms: event.stamp_ms.0,
        }
    }
}

/// One step of what a reader saw.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "events are the rule; a box would cost each of them an allocation")]
pub enum Item {
    /// An event.
    Event(Event),
    /// A stretch that is not for this reader, both ends included.
    Hidden {
        /// First.
        from: u64,
        /// Last.
        to: u64,
    },
}

impl Item {
    /// The first and the last seq of it.
    pub fn span(&self) -> (u64, u64) {
        match self {
            Self::Event(event) => (event.seq, event.seq),
            Self::Hidden { from, to } => (*from, *to),
        }
    }
}

impl From<&stentor_client::Item> for Item {
    fn from(item: &stentor_client::Item) -> Self {
        match item {
            stentor_client::Item::Event(event) => Self::Event(event.into()),
            stentor_client::Item::Hidden(hidden) => Self::Hidden { from: hidden.from.0, to: hidden.to.0 },
        }
    }
}

/// The answer of a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Ascending.
    pub items: Vec<Item>,
    /// The reader's head when it was read.
    pub head: u64,
    /// There is more than what came.
    pub more: bool,
}

/// Where a stream begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// After this seq.
    After(u64),
    /// After the head as it was then.
    Head,
}

/// What one subscription of one session brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// Who reads.
    pub by: Device,
    /// What.
    pub conversation: Name,
    /// Not after it was asked for.
    pub began: Moment,
    /// From where.
    pub start: Start,
    /// What came, in the order in which it came.
    pub items: Vec<(Moment, Item)>,
}

/// A device says that it has stored, or its user has seen, everything up to here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CursorMove {
    /// Whose.
    pub by: Device,
    /// Where.
    pub conversation: Name,
    /// When it was said.
    pub at: Moment,
    /// Up to here the device has stored everything; 0 says nothing.
    pub delivered: u64,
    /// Up to here its user has seen everything; 0 says nothing.
    pub read: u64,
}

/// Where the server has a device's cursors, as it told the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CursorSeen {
    /// Whose.
    pub by: Device,
    /// Where.
    pub conversation: Name,
    /// Not after the question: a cursor that was acknowledged before then must be known to the answer.
    pub asked: Moment,
    /// When it came.
    pub at: Moment,
    /// The answer to a move, which may name less than what is kept; otherwise what is kept.
    pub moved: bool,
    /// The device's; 0 if nothing was said.
    pub delivered: u64,
    /// Its user's; 0 if nothing was said.
    pub read: u64,
}

/// A conversation as it was read in the end, when all was healed, by one who may see all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Final {
    /// Which.
    pub conversation: Name,
    /// All of it, ascending.
    pub items: Vec<Item>,
    /// Its head.
    pub head: u64,
}

/// A whole run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    /// In the order in which they were invoked.
    pub operations: Vec<Operation>,
    /// In the order in which they began.
    pub streams: Vec<Stream>,
    /// In the order in which they were said.
    pub moves: Vec<CursorMove>,
    /// In the order in which they came.
    pub seen: Vec<CursorSeen>,
    /// One for each conversation.
    pub finals: Vec<Final>,
    /// Answers that the SDK itself found damaged: to whom, where, and how.
    pub damaged: Vec<(Device, Name, String)>,
}
