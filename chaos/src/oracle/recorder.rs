//! Writes down a run while it happens, and gives out the moments. Must never wait, and must never let the record of one
//! thing depend on when another is asked for: moments are counted, not measured.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{
    Answer, Call, CursorMove, CursorSeen, Device, Final, History, Interval, Item, Moment, Name, Operation, Outcome,
    Start, Stream,
};

/// Which operation; see [`Recorder::invoke`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OperationId(usize);

/// Which stream; see [`Recorder::subscribe`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamId(usize);

#[derive(Debug, Default)]
struct Book {
    history: History,
    now: u64,
}

impl Book {
    fn moment(&mut self) -> Moment {
        self.now += 1;
        Moment(self.now)
    }
}

/// A run being written down. Clones write into the same book.
#[derive(Debug, Clone, Default)]
pub struct Recorder(Arc<Mutex<Book>>);

impl Recorder {
    /// An empty book.
    pub fn new() -> Self {
        Self::default()
    }

    /// This moment.
    pub fn moment(&self) -> Moment {
        self.0.lock().moment()
    }

    /// An operation begins. To be called before the client is asked: until it is answered its outcome is unknown.
    pub fn invoke(&self, by: &Device, conversation: &Name, call: Call) -> OperationId {
        let mut book = self.0.lock();
        let interval = Interval { invoked: book.moment(), answered: None };
        let (by, conversation) = (by.clone(), Arc::clone(conversation));
        book.history.operations.push(Operation { by, conversation, interval, call, outcome: Outcome::Unknown });
        OperationId(book.history.operations.len() - 1)
    }

    /// Its answer is there. To be called after the client has it.
    pub fn answer(&self, id: OperationId, outcome: Outcome<Answer>) {
        let mut book = self.0.lock();
        let now = book.moment();
        if let Some(operation) = book.history.operations.get_mut(id.0) {
            operation.interval.answered = Some(now);
            operation.outcome = outcome;
        }
    }

    /// A stream begins. To be called before the client is asked.
    pub fn subscribe(&self, by: &Device, conversation: &Name, start: Start) -> StreamId {
        let mut book = self.0.lock();
        let began = book.moment();
        let (by, conversation) = (by.clone(), Arc::clone(conversation));
        book.history.streams.push(Stream { by, conversation, began, start, items: Vec::new() });
        StreamId(book.history.streams.len() - 1)
    }

    /// The stream has brought something.
    pub fn deliver(&self, id: StreamId, item: Item) {
        let mut book = self.0.lock();
        let now = book.moment();
        if let Some(stream) = book.history.streams.get_mut(id.0) {
            stream.items.push((now, item));
        }
    }

    /// A cursor is about to be moved.
    pub fn cursor_moves(&self, by: &Device, conversation: &Name, delivered: u64, read: u64) {
        let mut book = self.0.lock();
        let at = book.moment();
        book.history.moves.push(CursorMove {
            by: by.clone(),
            conversation: Arc::clone(conversation),
            at,
            delivered,
            read,
        });
    }

    /// The server has told where cursors are: when a stream began (`asked`: a moment before that), or as the answer to
    /// a move (`moved`).
    pub fn cursor_seen(
        &self,
        by: &Device,
        conversation: &Name,
        asked: Moment,
        moved: bool,
        (delivered, read): (u64, u64),
    ) {
        let mut book = self.0.lock();
        let at = book.moment();
        let (by, conversation) = (by.clone(), Arc::clone(conversation));
        book.history.seen.push(CursorSeen { by, conversation, asked, at, moved, delivered, read });
    }

    /// The whole of a conversation, read when all was healed.
    pub fn read_all(&self, conversation: &Name, items: Vec<Item>, head: u64) {
        self.0.lock().history.finals.push(Final { conversation: Arc::clone(conversation), items, head });
    }

    /// The SDK found an answer damaged.
    pub fn damaged(&self, by: &Device, conversation: &Name, what: &str) {
        self.0.lock().history.damaged.push((by.clone(), Arc::clone(conversation), what.to_owned()));
    }

    /// How many operations have no answer.
    pub fn unanswered(&self) -> usize {
        let book = self.0.lock();
        book.history.operations.iter().filter(|o| o.interval.answered.is_none()).count()
    }

    /// All that was written down so far.
    pub fn history(&self) -> History {
        self.0.lock().history.clone()
    }
}
