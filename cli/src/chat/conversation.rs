//! One conversation as the chat has it: a dense window of its rows, what the user has read, messages on their way.
//! Must never show a gap in the window, nor say that something was delivered or read that was not here.

use std::collections::{BTreeSet, VecDeque};

use stentor_client::{Conversation as Listed, ConversationId, ConversationKind, Role};

use super::{
    composer::Composer,
    row::{Row, Said},
    text,
};

/// Rows of the conversation that is open; beyond it the far end is let go and loaded again when it is looked at.
const OPEN: Bound = Bound { rows: 20_000, bytes: 16 * 1024 * 1024 };
/// Rows of any other: enough to fill a screen at once when it is opened.
const CLOSED: Bound = Bound { rows: 100, bytes: 64 * 1024 };
/// A page that failed is not asked for again at once.
const LOAD_AGAIN_MS: u64 = 3_000;
/// Names in the title of a conversation without a name of its own.
const TITLE_NAMES: usize = 6;

#[derive(Debug, Clone, Copy)]
struct Bound {
    rows: usize,
    bytes: usize,
}

/// Where the view stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// At the end, and it goes with it.
    End,
    /// The topmost line is the one with so many lines of its row from it on, itself included. Counted from the row's
    /// end, since what stands above a row changes when older rows come.
    At {
        /// Which row.
        row: RowKey,
        /// Lines of it in view.
        rest: usize,
    },
}

/// Names a row, whatever comes before or after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowKey {
    /// Its first seq.
    Seq(u64),
    /// A message on its way.
    Sending(u64),
}

/// A message of one's own that has not come back as an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sending {
    /// Our own number of it.
    pub(crate) number: u64,
    pub(crate) said: Said,
    pub(crate) since_ms: u64,
    pub(crate) fate: Fate,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// No answer yet.
    Waiting,
    /// It has this seq; its event comes.
    Acknowledged(u64),
    /// There will be no event.
    Refused(String),
    /// Nobody can say.
    Unknown(String),
}

/// Which page is being loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Page {
    /// What comes before this seq.
    Before(u64),
    /// What comes after this seq.
    After(u64),
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Conversation {
    pub(crate) id: ConversationId,
    pub(crate) kind: ConversationKind,
    pub(crate) role: Role,
    pub(crate) participants: u32,
    since_seq: u64,
    /// Users that were met in it.
    people: BTreeSet<String>,
    rows: VecDeque<Row>,
    bytes: usize,
    /// The window: rows are dense over [first, last]; empty if last < first.
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// Up to where the stream has come; the window ends there unless its end was let go. `None` before it began.
    streamed: Option<u64>,
    pub(crate) head: u64,
    pub(crate) read: u64,
    /// Of this device, on the server.
    delivered: u64,
    pub(crate) loading: Option<Page>,
    pub(crate) sending: VecDeque<Sending>,
    /// Own events that came before their answers.
    early: BTreeSet<u64>,
    /// Everything behind it was new when the conversation was opened.
    pub(crate) marker: Option<u64>,
    pub(crate) place: Place,
    pub(crate) draft: Composer,
    /// The last row, also while the window is empty.
    pub(crate) preview: Option<Row>,
    /// Why no more comes.
    pub(crate) ended: Option<String>,
    is_open: bool,
    /// When a page last failed to come.
    failed_ms: u64,
}

impl Conversation {
    pub(crate) fn new(id: ConversationId) -> Self {
        Self {
            id,
            kind: ConversationKind::Unspecified,
            role: Role::Unspecified,
            participants: 0,
            since_seq: 0,
            people: BTreeSet::new(),
            rows: VecDeque::new(),
            bytes: 0,
            first: 1,
            last: 0,
            streamed: None,
            head: 0,
            read: 0,
            delivered: 0,
            loading: None,
            sending: VecDeque::new(),
            early: BTreeSet::new(),
            marker: None,
            place: Place::End,
            draft: Composer::default(),
            preview: None,
            ended: None,
            is_open: false,
            failed_ms: 0,
        }
    }

    /// What the server lists of it.
    pub(crate) fn listed(&mut self, listed: &Listed) {
        (self.kind, self.role) = (listed.kind(), listed.role());
        (self.participants, self.since_seq) = (listed.participants, listed.since_seq);
        self.head = self.head.max(listed.head);
    }

    /// Where its stream stands.
    pub(crate) fn state(&mut self, head: u64, delivered: u64, read: u64) {
        self.head = self.head.max(head);
        self.delivered = self.delivered.max(delivered);
        self.read = self.read.max(read);
        self.ended = None;
        if self.streamed.is_none() {
            self.begin_after(head);
            // Their events came before the stream: they are in the pages.
            self.sending.retain(|s| !matches!(s.fate, Fate::Acknowledged(seq) if seq <= head));
        }
    }

    /// The window is empty and stands behind `seq`.
    fn begin_after(&mut self, seq: u64) {
        self.rows.clear();
        (self.bytes, self.loading) = (0, None);
        self.streamed = Some(seq);
        (self.first, self.last) = (seq + 1, seq);
    }

    /// The next of its stream. `by_us`: this device sent it.
    pub(crate) fn streamed(&mut self, row: Row, by_us: bool) {
        let before = self.streamed.unwrap_or(row.from.saturating_sub(1));
        if row.to <= before {
            return;
        }
        if self.streamed.is_none() || row.from > before + 1 {
            // A stream that begins here.
            self.begin_after(row.from - 1);
        }
        self.streamed = Some(row.to);
        self.head = self.head.max(row.to);
        if by_us {
            self.own_event(row.from);
        }
        self.meet(&row);
        self.preview = Some(row.clone());
        if self.last + 1 == row.from {
            self.push_back(row);
        }
    }

    /// Forgets the message on its way that this event is, or remembers that its answer is still to come.
    fn own_event(&mut self, seq: u64) {
        let before = self.sending.len();
        self.sending.retain(|s| s.fate != Fate::Acknowledged(seq));
        if self.sending.len() == before && self.sending.iter().any(|s| s.fate == Fate::Waiting) {
            self.early.insert(seq);
        }
    }

    /// What became of a message.
    pub(crate) fn answered(&mut self, number: u64, fate: Fate) {
        let came = match fate {
            Fate::Acknowledged(seq) => self.early.remove(&seq) || self.streamed.is_some_and(|streamed| streamed >= seq),
            _ => false,
        };
        if came {
            self.sending.retain(|s| s.number != number);
        } else if let Some(sending) = self.sending.iter_mut().find(|s| s.number == number) {
            sending.fate = fate;
        }
        if self.sending.iter().all(|s| s.fate != Fate::Waiting) {
            self.early.clear();
        }
    }

    /// Messages to show behind the last row. Those whose events came already, but not their answers, are the first
    /// of those that wait.
    pub(crate) fn to_show(&self) -> impl DoubleEndedIterator<Item = &Sending> {
        let mut hide = self.early.len();
        let shown = self.sending.iter().filter(move |s| {
            let hidden = hide > 0 && s.fate == Fate::Waiting;
            hide -= usize::from(hidden);
            !hidden
        });
        shown.collect::<Vec<_>>().into_iter()
    }

    /// Whether a page is what was asked for and fits the window.
    pub(crate) fn page(&mut self, page: Page, rows: Vec<Row>, head: u64) {
        if self.loading != Some(page) {
            return;
        }
        self.loading = None;
        self.head = self.head.max(head);
        rows.iter().for_each(|row| self.meet(row));
        match page {
            Page::Before(seq) if seq == self.first => {
                if rows.is_empty() {
                    // Nothing before it is left.
                    self.first = 1;
                }
                for row in rows.into_iter().rev().filter(|row| row.from < seq) {
                    self.push_front(Row { to: row.to.min(seq - 1), ..row });
                }
                if self.preview.is_none() {
                    self.preview = self.rows.back().cloned();
                }
                self.trim(false);
            }
            Page::After(seq) if seq == self.last => {
                let streamed = self.streamed.unwrap_or(0);
                for row in rows {
                    if row.from == self.last + 1 && row.to <= streamed {
                        self.push_back(row);
                    }
                }
            }
            _ => {}
        }
    }

    /// A page did not come; it is asked for again a little later.
    pub(crate) fn failed(&mut self, page: Page, now_ms: u64) {
        if self.loading == Some(page) {
            self.loading = None;
            self.failed_ms = now_ms;
        }
    }

    /// Whether it is time to ask for a page.
    pub(crate) fn may_load(&self, now_ms: u64) -> bool {
        self.loading.is_none() && self.has_begun() && now_ms >= self.failed_ms.saturating_add(LOAD_AGAIN_MS)
    }

    /// One more message on its way; the view goes to the end, where it is.
    pub(crate) fn send(&mut self, number: u64, text: &str, is_action: bool, now_ms: u64) {
        let text = text::harmless(text);
        let said = if is_action { Said::Action(text) } else { Said::Text(text) };
        self.sending.push_back(Sending { number, said, since_ms: now_ms, fate: Fate::Waiting });
        self.marker = None;
        self.go_to_end();
    }

    /// Forgets messages that did not become events, or perhaps did not; false if there are none.
    pub(crate) fn forget_failed(&mut self) -> bool {
        let before = self.sending.len();
        self.sending.retain(|s| !matches!(s.fate, Fate::Refused(_) | Fate::Unknown(_)));
        self.sending.len() < before
    }

    fn meet(&mut self, row: &Row) {
        if !row.sender.is_empty() && self.people.len() < TITLE_NAMES {
            self.people.insert(row.sender.clone());
        }
    }

    pub(crate) fn know(&mut self, people: impl IntoIterator<Item = String>) {
        for user in people {
            if self.people.len() < TITLE_NAMES {
                self.people.insert(user);
            }
        }
    }

    fn push_front(&mut self, row: Row) {
        if row.to + 1 != self.first {
            return;
        }
        self.first = row.from;
        self.bytes += row.bytes();
        self.rows.push_front(row);
    }

    fn push_back(&mut self, row: Row) {
        self.last = row.to;
        self.bytes += row.bytes();
        self.rows.push_back(row);
        // Never what is looked at.
        self.trim(self.place == Place::End);
    }

    /// Lets go of what is too much, at the begin or at the end.
    fn trim(&mut self, at_begin: bool) {
        let bound = if self.is_open { OPEN } else { CLOSED };
        while self.rows.len() > bound.rows || self.bytes > bound.bytes && self.rows.len() > 1 {
            let gone = if at_begin { self.rows.pop_front() } else { self.rows.pop_back() };
            let Some(gone) = gone else { return };
            self.bytes -= gone.bytes();
            if at_begin {
                self.first = gone.to + 1;
            } else {
                self.last = gone.from - 1;
            }
        }
    }

    /// It is not looked at any more.
    pub(crate) fn close(&mut self) {
        self.go_to_end();
        self.marker = None;
        self.is_open = false;
        self.loading = None;
        self.trim(true);
    }

    /// It is looked at now.
    pub(crate) fn open(&mut self) {
        self.is_open = true;
        self.marker = (self.unread() > 0).then(|| self.seen());
    }

    /// Goes to the end; if that was let go, the window begins anew there.
    pub(crate) fn go_to_end(&mut self) {
        self.place = Place::End;
        if !self.has_end() {
            self.begin_after(self.streamed.unwrap_or(0));
        }
    }

    /// Whether the window reaches as far as the stream has come.
    pub(crate) fn has_end(&self) -> bool {
        self.streamed.is_none_or(|streamed| streamed == self.last)
    }

    /// It ended and comes back: its stream begins anew.
    pub(crate) fn rejoin(&mut self) {
        self.ended = None;
        self.streamed = None;
    }

    /// Whether its stream has begun, so that pages can be asked for.
    pub(crate) fn has_begun(&self) -> bool {
        self.streamed.is_some()
    }

    pub(crate) fn rows(&self) -> &VecDeque<Row> {
        &self.rows
    }

    /// Up to where nothing is new for this user.
    fn seen(&self) -> u64 {
        self.read.max(self.since_seq.saturating_sub(1))
    }

    /// Events that are new for this user: what he joined after and has not read.
    pub(crate) fn unread(&self) -> u64 {
        // Before the stream's state came, the read cursor is not known.
        if self.streamed.is_none() { 0 } else { self.head.saturating_sub(self.seen()) }
    }

    /// The user looks at its end: the read cursor's new place, if it moves.
    pub(crate) fn see(&mut self) -> Option<u64> {
        let seen = self.last;
        if self.place != Place::End || !self.has_end() || !self.has_begun() || seen <= self.read {
            return None;
        }
        self.read = seen;
        Some(seen)
    }

    /// The delivered cursor's new place, if it moves: only over what was here without a gap from where it stood.
    pub(crate) fn deliver(&mut self) -> Option<u64> {
        if !self.has_begun() || self.first > self.delivered + 1 || self.last <= self.delivered {
            return None;
        }
        self.delivered = self.last;
        Some(self.last)
    }

    /// When something last happened.
    pub(crate) fn active_ms(&self) -> u64 {
        self.preview.as_ref().map_or(0, |row| row.stamp_ms)
    }

    /// How it is called: by the others' names if it has none of its own.
    pub(crate) fn title(&self, me: &str) -> String {
        let nameless = self.kind == ConversationKind::Direct || is_made_up(self.id.as_str());
        let others: Vec<&str> = self.people.iter().map(String::as_str).filter(|&user| user != me).collect();
        match nameless && !others.is_empty() {
            true => others.join(", "),
            false => text::one_line(self.id.as_str()),
        }
    }
}

/// Whether the server gave the id: `c-` and 32 hexadecimal digits.
fn is_made_up(id: &str) -> bool {
    id.strip_prefix("c-").is_some_and(|rest| rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
}
