//! All that the chat knows, and what can happen to it. Must never do IO nor look at a clock: time comes with what
//! happens, and what is to be done goes out as effects.

use std::collections::HashMap;

use crossterm::event::KeyEvent;
use ratatui::layout::Rect;
use stentor_client::{Connection, Conversation as Listed, ConversationId, Identity, Incoming, Refusal, UserId};

use super::{
    areas::Areas,
    composer::Composer,
    conversation::{Conversation, Fate, Page},
    lines::{Paper, Zone},
    row::Row,
    scroll::View,
};

/// Conversations that are kept; each costs a stream. Whoever has more sees the first ones.
pub(crate) const MOST_CONVERSATIONS: usize = 1_000;
/// Messages on their way, over all conversations.
pub(crate) const MOST_SENDING: usize = 200;

/// Something that happened.
#[derive(Debug)]
pub(crate) enum Input {
    /// A key was pressed.
    Key(KeyEvent),
    /// Text was pasted.
    Paste(String),
    /// The terminal has this many columns and rows now.
    Resize(u16, u16),
    /// Whether somebody looks at the terminal, if it can tell.
    Focus(bool),
    /// Time passes.
    Tick(Connection),
    /// The session brought something.
    Incoming(Incoming),
    /// The user's conversations, and whether there are more than are kept.
    Listed(Result<(Vec<Listed>, bool), String>),
    /// A page of a conversation, ascending, with its head.
    Page { conversation: ConversationId, page: Page, result: Result<(Vec<Row>, u64), String> },
    /// Who takes part, as its first events say.
    People { conversation: ConversationId, users: Vec<String> },
    /// What became of a message.
    Answered { conversation: ConversationId, number: u64, fate: Fate },
    /// A conversation was made, or not.
    Created(Result<Listed, String>),
    /// A user was added, or not.
    Added { user: String, result: Result<(), String> },
    /// The session is over.
    Ended(Option<Refusal>),
}

/// Something to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Ask for the user's conversations.
    List,
    /// Begin a conversation's stream.
    Subscribe(ConversationId),
    /// Load a page of at most so many rows; `urgent`: somebody waits for it.
    Load { conversation: ConversationId, page: Page, limit: u32, urgent: bool },
    /// Find out who takes part.
    Meet(ConversationId),
    /// Send a message.
    Send { conversation: ConversationId, number: u64, text: String, is_action: bool },
    /// Make a conversation.
    Create { id: Option<ConversationId>, with: Vec<UserId> },
    /// Add a user.
    Add { conversation: ConversationId, user: UserId },
    /// The device has everything up to here.
    Delivered(ConversationId, u64),
    /// The user has seen everything up to here.
    Read(ConversationId, u64),
    /// Draw everything anew: something else may have written to the terminal.
    Redraw,
    /// Leave.
    Leave,
}

/// Who gets the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Focus {
    List,
    Composer,
}

/// A question that stands in front of everything else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Dialog {
    /// With whom to begin a conversation.
    New(Composer),
    /// Whom to add to the open conversation.
    Add(Composer),
    /// What the keys do.
    Help,
}

/// See the module.
pub(crate) struct Model {
    pub(crate) me: Identity,
    pub(crate) zone: Zone,
    pub(crate) now_ms: u64,
    pub(crate) screen: Rect,
    /// Nobody looks: nothing is read.
    pub(crate) is_hidden: bool,
    pub(crate) conversations: HashMap<ConversationId, Conversation>,
    /// The latest first.
    pub(crate) order: Vec<ConversationId>,
    /// There are more than are kept.
    pub(crate) left_out: bool,
    pub(crate) open: Option<ConversationId>,
    pub(crate) selected: Option<ConversationId>,
    pub(crate) focus: Focus,
    pub(crate) dialog: Option<Dialog>,
    pub(crate) connection: Connection,
    /// Connected again, and what was missed has not all come.
    pub(crate) is_behind: bool,
    /// Something to say, and until when.
    pub(crate) notice: Option<(String, u64)>,
    /// When the user's conversations were last asked for; `None` while an answer is awaited.
    pub(super) listed_ms: Option<u64>,
    pub(super) has_listed: bool,
    pub(super) next_number: u64,
    /// Asked once to leave although messages wait.
    pub(super) is_leaving: bool,
    /// The session was refused for good.
    pub(crate) ended: Option<Refusal>,
}

impl Model {
    pub(crate) fn new(me: Identity, zone: Zone, now_ms: u64, (columns, rows): (u16, u16)) -> Self {
        Self {
            me,
            zone,
            now_ms,
            screen: Rect::new(0, 0, columns, rows),
            is_hidden: false,
            conversations: HashMap::new(),
            order: Vec::new(),
            left_out: false,
            open: None,
            selected: None,
            focus: Focus::List,
            dialog: None,
            connection: Connection::Online { gateway: String::new(), lasted: std::time::Duration::ZERO },
            is_behind: true,
            notice: None,
            listed_ms: Some(0),
            has_listed: false,
            next_number: 1,
            is_leaving: false,
            ended: None,
        }
    }

    pub(crate) fn opened(&self) -> Option<&Conversation> {
        self.conversations.get(self.open.as_ref()?.as_str())
    }

    pub(super) fn opened_mut(&mut self) -> Option<&mut Conversation> {
        self.conversations.get_mut(self.open.as_ref()?.as_str())
    }

    pub(crate) fn areas(&self) -> Areas {
        Areas::of(self)
    }

    /// The open conversation's lines and the view of them.
    pub(crate) fn with_view<T>(&self, look: impl FnOnce(&Conversation, &View<'_>) -> T) -> Option<T> {
        let conversation = self.opened()?;
        let area = self.areas().messages;
        let paper = Paper::new(conversation, usize::from(area.width), self.zone, self.now_ms);
        let view = View { paper: &paper, height: usize::from(area.height).max(1) };
        Some(look(conversation, &view))
    }

    /// Messages without an answer.
    pub(crate) fn waiting(&self) -> usize {
        let of = |c: &Conversation| c.sending.iter().filter(|s| s.fate == Fate::Waiting).count();
        self.conversations.values().map(of).sum()
    }

    /// Messages of which nobody can say what became of them.
    pub(crate) fn unknown(&self) -> usize {
        let of = |c: &Conversation| c.sending.iter().filter(|s| matches!(s.fate, Fate::Unknown(_))).count();
        self.conversations.values().map(of).sum()
    }

    pub(super) fn say(&mut self, notice: impl Into<String>) {
        self.notice = Some((notice.into(), self.now_ms + super::update::NOTICE_MS));
    }
}
