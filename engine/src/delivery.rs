//! One conversation's stream to one session: live while events come without a gap, otherwise catching up by pulled
//! pages (docs/architecture.md, "Delivery"). Must never buffer events, and never pass a seq that it did not hand on:
//! whatever was dropped on the way is only remembered as "the head is at least X" and pulled again.

use stentor_proto::{
    Bytes, Message,
    ids::Seq,
    reason::Reason,
    record::{self, BadRecord},
    v1::{EventHeader, EventKind, Item, item},
};

/// What to do with what was just put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deliver {
    /// Not for this session now; what matters of it is remembered.
    Nothing,
    /// All of it.
    All,
    /// Only what has a seq up to here.
    UpTo(Seq),
}

/// What comes next for this stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Nothing until something is put in.
    Wait,
    /// It wants a page: queue it, and call [`Delivery::pull`] when there is room for one.
    Hungry,
    /// Call [`Delivery::retry`] after a pause: who answers for the conversation could not help right now.
    Rest,
    /// The stream has ended for this reason; nothing else comes of it.
    Stop(Reason),
}

/// The answer to one input: first deliver, then the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What to hand to the device, before anything else.
    pub deliver: Deliver,
    /// What comes then.
    pub next: Next,
}

impl Step {
    const NOTHING: Self = Self { deliver: Deliver::Nothing, next: Next::Wait };

    fn next(next: Next) -> Self {
        Self { deliver: Deliver::Nothing, next }
    }
}

/// A granted page: read after `after_seq`, at most `max_bytes` of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pull {
    /// Exclusive.
    pub after_seq: Seq,
    /// What the session's queue has room for.
    pub max_bytes: usize,
}

/// What a run of dense events holds, as far as a stream cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first seq.
    pub first: Seq,
    /// The last seq.
    pub last: Seq,
    /// The reader's own removal, unless a later event of the run added him again.
    pub removed_at: Option<Seq>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Interest and access are not confirmed yet.
    Starting,
    /// At the head.
    Live,
    /// Behind, waiting for room.
    Hungry,
    /// Behind, a page was asked for when the head was known to be `asked_head`.
    Pulling { asked_head: u64 },
    /// Behind, waiting for a pause to end.
    Resting,
    /// Over.
    Ended,
}

/// One stream. Order of use: [`Delivery::new`], interest registered, heads read, [`Delivery::start`]; live events and
/// heads may be put in from the first moment on.
#[derive(Debug, Clone)]
pub struct Delivery {
    next: u64,
    head: u64,
    state: State,
}

impl Default for Delivery {
    fn default() -> Self {
        Self::new()
    }
}

impl Delivery {
    /// A stream whose interest is being registered.
    pub fn new() -> Self {
        Self { next: 0, head: 0, state: State::Starting }
    }

    /// A stream that wakes: live, with everything up to `at` handed on. What [`Self::rests_at`] is undone with.
    pub fn live_at(at: Seq) -> Self {
        Self { next: at.0.saturating_add(1), head: at.0, state: State::Live }
    }

    /// Where it stands, if it is live: then nothing else of it needs to be remembered, and that only until something
    /// is put in.
    pub fn rests_at(&self) -> Option<Seq> {
        (self.state == State::Live).then(|| self.delivered())
    }

    /// Begins after `after`; access was checked and `head` read *after* the interest was registered, so that every
    /// removal of the reader lies beyond it.
    pub fn start(&mut self, after: Seq, head: Seq) -> Step {
        if self.state != State::Starting {
            return Step::NOTHING;
        }
        self.next = after.0.saturating_add(1);
        self.head = self.head.max(head.0);
        self.settle()
    }

    /// A live push. `has_room` says whether the session's queue and credit can take it; without room it is not kept.
    pub fn live(&mut self, run: Run, has_room: bool) -> Step {
        self.head = self.head.max(run.last.0);
        if self.state != State::Live || run.last.0 < self.next {
            return Step::NOTHING;
        }
        if run.first.0 != self.next || !has_room {
            return self.settle();
        }
        if let Some(at) = run.removed_at {
            self.next = at.0 + 1;
            self.state = State::Ended;
            return Step { deliver: Deliver::UpTo(at), next: Next::Stop(Reason::NotAParticipant) };
        }
        self.next = run.last.0.saturating_add(1);
        Step { deliver: Deliver::All, next: Next::Wait }
    }

    /// The conversation's head is at least this: from a beat, from a new registration, or from a push that was
    /// dropped on the way.
    pub fn head(&mut self, head: Seq) -> Step {
        self.head = self.head.max(head.0);
        if self.state == State::Live { self.settle() } else { Step::NOTHING }
    }

    /// There is room for a page of `max_bytes`. `None` when none is wanted (any more).
    pub fn pull(&mut self, max_bytes: usize) -> Option<Pull> {
        if self.state != State::Hungry {
            return None;
        }
        self.state = State::Pulling { asked_head: self.head };
        Some(Pull { after_seq: Seq(self.next - 1), max_bytes })
    }

    /// The page that was asked for: its events (`None` for an empty one), and whether it was cut short.
    pub fn page(&mut self, run: Option<Run>, head: Seq, more: bool) -> Step {
        let State::Pulling { asked_head } = self.state else { return Step::NOTHING };
        self.head = self.head.max(head.0);
        let Some(run) = run else { return self.empty_page(asked_head, more) };
        if run.first.0 != self.next || run.last < run.first {
            // Not what was asked for: the broker's fault. Nothing was delivered, so asking again is safe.
            return self.rest();
        }
        self.next = run.last.0 + 1;
        if run.removed_at.is_some() && !more {
            self.state = State::Ended;
            return Step { deliver: Deliver::All, next: Next::Stop(Reason::NotAParticipant) };
        }
        self.state = State::Live;
        Step { deliver: Deliver::All, next: if more { self.hungry() } else { self.settle().next } }
    }

    /// The page was refused.
    pub fn refused(&mut self, reason: Reason) -> Step {
        if self.state == State::Ended {
            return Step::NOTHING;
        }
        if reason.retryable() {
            return if matches!(self.state, State::Pulling { .. }) { self.rest() } else { Step::NOTHING };
        }
        self.state = State::Ended;
        Step::next(Next::Stop(reason))
    }

    /// The pause is over.
    pub fn retry(&mut self) -> Step {
        if self.state == State::Resting { Step::next(self.hungry()) } else { Step::NOTHING }
    }

    /// The highest seq that was handed on.
    pub fn delivered(&self) -> Seq {
        Seq(self.next.saturating_sub(1))
    }

    /// Whether it stands at the head as far as it knows.
    pub fn is_live(&self) -> bool {
        self.state == State::Live
    }

    /// Whether it was started and has not ended.
    pub fn is_running(&self) -> bool {
        !matches!(self.state, State::Starting | State::Ended)
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.state == State::Ended
    }

    fn empty_page(&mut self, asked_head: u64, more: bool) -> Step {
        if more || self.next <= asked_head {
            // The head that made it ask is not readable where it asked (a reader that is behind): ask again, slowly.
            return self.rest();
        }
        self.settle()
    }

    fn settle(&mut self) -> Step {
        if self.next > self.head {
            self.state = State::Live;
            return Step::NOTHING;
        }
        Step::next(self.hungry())
    }

    fn hungry(&mut self) -> Next {
        self.state = State::Hungry;
        Next::Hungry
    }

    fn rest(&mut self) -> Step {
        self.state = State::Resting;
        Step::next(Next::Rest)
    }
}

/// Up to where everything that is known of a conversation was told to all of its streams at a gateway. Where a resting
/// stream stands is told to it with the next news, so that it needs no number of its own: it may rest only where
/// [`Told::upto`] is at that moment, and with nothing told that it has not taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Told {
    upto: Seq,
}

impl Told {
    /// Where a stream may rest.
    pub fn upto(self) -> Seq {
        self.upto
    }

    /// Everything up to `last` is told now. Returns up to where it was told before: where the resting ones stand.
    pub fn tell(&mut self, last: Seq) -> Seq {
        let before = self.upto;
        self.upto = before.max(last);
        before
    }
}

/// What one stream has not taken yet of what is known of its conversation's head. Whoever queues pushes for it must
/// add a later push here instead, as long as [`Self::holds_back`]: the stream takes its pushes first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeadNews {
    /// The head is at least this.
    pub head: Seq,
    /// Where the stream stands if it rests.
    pub before: Seq,
    /// Interest was registered (again).
    pub registered: bool,
}

impl HeadNews {
    /// The first news.
    pub fn new(head: Seq, before: Seq, registered: bool) -> Self {
        Self { head, before, registered }
    }

    /// More of it, before the first was taken. As long as there was nothing to pull, the stream went on with pushes.
    pub fn raise(&mut self, more: Self) {
        if !self.holds_back() {
            self.before = more.before;
        }
        self.head = self.head.max(more.head);
        self.registered |= more.registered;
    }

    /// Whether there is something to pull before anything later can be delivered.
    pub fn holds_back(&self) -> bool {
        self.head > self.before
    }
}

/// Items or records that are no dense run: their sender's fault; nothing may be delivered of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRun {
    /// A record that cannot be decoded.
    #[error(transparent)]
    Record(#[from] BadRecord),
    /// A step over a seq, or backwards.
    #[error("events are not dense after seq {0}")]
    NotDense(Seq),
    /// An item that is neither a record nor a hidden stretch.
    #[error("an item is empty")]
    Empty,
}

/// A record's header; its ids share the record's memory.
pub fn header(record: &Bytes) -> Result<EventHeader, BadRecord> {
    record::len(record)?;
    let Some((len, _)) = record.split_first_chunk::<4>() else { return Err(BadRecord::Truncated) };
    let end = record::PREFIX_BYTES + u32::from_le_bytes(*len) as usize;
    EventHeader::decode(record.slice(record::PREFIX_BYTES..end)).map_err(|_| BadRecord::Header)
}

/// Reads a page for `user`: checks that it is dense and looks for his removal.
pub fn run_of_items(items: &[Item], user: &str) -> Result<Option<Run>, BadRun> {
    let mut run: Option<Run> = None;
    for item in items {
        let (first, last, removed) = match &item.item {
            Some(item::Item::Hidden(hidden)) if hidden.from <= hidden.to => (hidden.from, hidden.to, None),
            Some(item::Item::Record(record)) => {
                let header = header(record)?;
                (header.seq, header.seq, removal(&header).filter(|(subject, _)| subject == user.as_bytes()))
            }
            _ => return Err(BadRun::Empty),
        };
        let run = run.get_or_insert(Run { first: Seq(first), last: Seq(first.saturating_sub(1)), removed_at: None });
        if first == 0 || first != run.last.0 + 1 || last == u64::MAX {
            return Err(BadRun::NotDense(run.last));
        }
        run.last = Seq(last);
        if let Some((_, out)) = removed {
            run.removed_at = out.then_some(Seq(last));
        }
    }
    Ok(run)
}

/// A live push, read once for all sessions: its ends, and who was removed in it (users who were added again included:
/// what lies between is not theirs to see).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PushRun {
    /// The first seq.
    pub first: Seq,
    /// The last seq.
    pub last: Seq,
    /// (user, seq of his removal); nearly always empty.
    pub removals: Vec<(Bytes, Seq)>,
}

impl PushRun {
    /// The push as one reader's stream sees it.
    pub fn for_user(&self, user: &str) -> Run {
        let removed_at = self.removals.iter().find(|(who, _)| who == user.as_bytes()).map(|&(_, at)| at);
        Run { first: self.first, last: self.last, removed_at }
    }
}

/// Reads the records of a live push; they must be dense.
pub fn run_of_records(records: &[Bytes]) -> Result<PushRun, BadRun> {
    let mut run: Option<PushRun> = None;
    for record in records {
        let header = header(record)?;
        let seq = Seq(header.seq);
        let run =
            run.get_or_insert_with(|| PushRun { first: seq, last: Seq(seq.0.saturating_sub(1)), removals: Vec::new() });
        if seq.0 == 0 || seq.0 == u64::MAX || seq.0 != run.last.0 + 1 {
            return Err(BadRun::NotDense(run.last));
        }
        run.last = seq;
        if let Some((user, true)) = removal(&header) {
            run.removals.push((user, seq));
        }
    }
    run.ok_or(BadRun::Empty)
}

/// Whose participation an event changes: (user, true when he was removed).
fn removal(header: &EventHeader) -> Option<(Bytes, bool)> {
    match header.kind() {
        EventKind::ParticipantRemoved => Some((header.subject.clone(), true)),
        EventKind::ParticipantAdded => Some((header.subject.clone(), false)),
        _ => None,
    }
}

#[cfg(test)]
#[path = "delivery_tests.rs"]
mod tests;
