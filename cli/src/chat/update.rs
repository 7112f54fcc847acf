//! What happens, and what follows from it. Must never wait or do IO; what is to be done is returned, in order.

use std::cmp::Reverse;

use stentor_client::{Connection, Conversation as Listed, ConversationId, Incoming, Refusal};

use super::{
    conversation::{Conversation, Page, Place},
    keys,
    model::{Effect, Focus, Input, MOST_CONVERSATIONS, MOST_SENDING, Model},
    row::Row,
};

/// A notice stays this long.
pub(super) const NOTICE_MS: u64 = 8_000;
/// The user's conversations are asked for this often: somebody else may have added him to one.
const LIST_EVERY_MS: u64 = 5_000;
/// Rows of the first page of a conversation that is not open.
const FIRST_PAGE: u32 = 20;
/// Rows of a page that somebody waits for.
const PAGE: u32 = 200;

impl Model {
    /// Takes what happened at `now_ms` (ms since the Unix epoch).
    pub(crate) fn update(&mut self, now_ms: u64, input: Input) -> Vec<Effect> {
        self.now_ms = now_ms;
        let mut effects = Vec::new();
        match input {
            Input::Key(key) => keys::key(self, key, &mut effects),
            Input::Paste(text) => keys::paste(self, &text),
            Input::Resize(columns, rows) => (self.screen.width, self.screen.height) = (columns, rows),
            Input::Focus(has_it) => self.is_hidden = !has_it,
            Input::Tick(connection) => self.tick(connection, &mut effects),
            Input::Incoming(incoming) => self.incoming(incoming, &mut effects),
            Input::Listed(result) => self.listed(result, &mut effects),
            Input::Page { conversation, page, result } => self.page(&conversation, page, result),
            Input::People { conversation, users } => {
                if let Some(c) = self.conversations.get_mut(conversation.as_str()) {
                    c.know(users);
                }
            }
            Input::Answered { conversation, number, fate } => {
                if let Some(c) = self.conversations.get_mut(conversation.as_str()) {
                    c.answered(number, fate);
                }
            }
            Input::Created(Ok(created)) => self.created(&created, &mut effects),
            Input::Created(Err(why)) => self.say(format!("not created: {why}")),
            Input::Added { user, result: Ok(()) } => self.say(format!("{user} takes part now")),
            Input::Added { user, result: Err(why) } => self.say(format!("{user} was not added: {why}")),
            Input::Ended(refusal) => self.end(refusal, &mut effects),
        }
        self.settle(&mut effects);
        effects
    }

    fn tick(&mut self, connection: Connection, effects: &mut Vec<Effect>) {
        self.connection = connection;
        if self.notice.as_ref().is_some_and(|(_, until)| *until <= self.now_ms) {
            self.notice = None;
        }
        let due = self.listed_ms.is_some_and(|at| at + LIST_EVERY_MS <= self.now_ms);
        if due && matches!(self.connection, Connection::Online { .. }) {
            self.list(effects);
        }
    }

    /// His own list hears of it a moment later.
    fn created(&mut self, created: &Listed, effects: &mut Vec<Effect>) {
        let Ok(id) = ConversationId::new(&created.conversation) else { return };
        if let Some(c) = self.known(&id, effects) {
            c.listed(created);
            self.open(&id);
        }
    }

    fn list(&mut self, effects: &mut Vec<Effect>) {
        if self.listed_ms.take().is_some() {
            effects.push(Effect::List);
        }
    }

    fn end(&mut self, refusal: Option<Refusal>, effects: &mut Vec<Effect>) {
        self.ended = refusal;
        effects.push(Effect::Leave);
    }

    fn incoming(&mut self, incoming: Incoming, effects: &mut Vec<Effect>) {
        match incoming {
            Incoming::Event { conversation, event } => {
                let by_us = *event.sender == *self.me.user.as_str() && *event.device == *self.me.device.as_str();
                let row = Row::event(&event, &self.me);
                self.came(&conversation, row, by_us, effects);
            }
            Incoming::Hidden { conversation, hidden } => {
                self.came(&conversation, Row::hidden(&hidden), false, effects);
            }
            Incoming::State { conversation, head, delivered, read } => {
                if let Some(c) = self.known(&conversation, effects) {
                    let is_first = !c.has_begun();
                    c.state(head.0, delivered.0, read.0);
                    if is_first {
                        load(c, FIRST_PAGE, false, effects);
                    }
                }
            }
            Incoming::Ended { conversation, refusal } => {
                if let Some(c) = self.conversations.get_mut(conversation.as_str()) {
                    c.ended = Some(format!("{} ({})", refusal.message, refusal.reason));
                }
            }
            Incoming::UpToDate => self.is_behind = false,
            Incoming::Connected { .. } => self.is_behind = true,
            Incoming::StoreFailed(error) => self.say(format!("cursors are not kept: {error}")),
            // Shown by the connection's state and by the marks; the enum may grow.
            _ => {}
        }
    }

    fn came(&mut self, id: &ConversationId, row: Row, by_us: bool, effects: &mut Vec<Effect>) {
        let Some(c) = self.known(id, effects) else { return };
        c.streamed(row, by_us);
        if let Some(seq) = c.deliver() {
            effects.push(Effect::Delivered(id.clone(), seq));
        }
    }

    /// The conversation, from now on if it is new; `None` if there are too many.
    fn known(&mut self, id: &ConversationId, effects: &mut Vec<Effect>) -> Option<&mut Conversation> {
        if !self.conversations.contains_key(id.as_str()) {
            if self.conversations.len() >= MOST_CONVERSATIONS {
                self.left_out = true;
                return None;
            }
            self.conversations.insert(id.clone(), Conversation::new(id.clone()));
            self.order.push(id.clone());
            effects.push(Effect::Subscribe(id.clone()));
            effects.push(Effect::Meet(id.clone()));
        }
        self.conversations.get_mut(id.as_str())
    }

    fn listed(&mut self, result: Result<(Vec<Listed>, bool), String>, effects: &mut Vec<Effect>) {
        self.listed_ms = Some(self.now_ms);
        let (all, more) = match result {
            Ok(listed) => listed,
            // Later ones are for what changed: the next one will find it.
            Err(_) if self.has_listed => return,
            Err(why) => return self.say(format!("the conversations cannot be listed: {why}")),
        };
        self.has_listed = true;
        self.left_out = more;
        for listed in &all {
            let Ok(id) = ConversationId::new(&listed.conversation) else { continue };
            let Some(c) = self.known(&id, effects) else { continue };
            if c.ended.is_some() {
                // He was added again.
                c.rejoin();
                effects.push(Effect::Subscribe(id.clone()));
            }
            c.listed(listed);
        }
    }

    fn page(&mut self, id: &ConversationId, page: Page, result: Result<(Vec<Row>, u64), String>) {
        let Some(c) = self.conversations.get_mut(id.as_str()) else { return };
        match result {
            Ok((rows, head)) => c.page(page, rows, head),
            Err(why) => {
                c.failed(page, self.now_ms);
                self.say(format!("older messages cannot be loaded: {why}"));
            }
        }
    }

    /// Looks at a conversation.
    pub(super) fn open(&mut self, id: &ConversationId) {
        if self.open.as_ref() != Some(id) {
            if let Some(left) = self.opened_mut() {
                left.close();
            }
            self.open = Some(id.clone());
            if let Some(c) = self.opened_mut() {
                c.open();
            }
        }
        self.selected = Some(id.clone());
        self.focus = Focus::Composer;
    }

    /// What follows from whatever happened: the list's order, pages that are needed, what was seen.
    fn settle(&mut self, effects: &mut Vec<Effect>) {
        let conversations = &self.conversations;
        self.order.sort_by_cached_key(|id| {
            let active_ms = conversations.get(id.as_str()).map_or(0, Conversation::active_ms);
            (Reverse(active_ms), id.clone())
        });
        if self.selected.is_none() {
            self.selected = self.order.first().cloned();
        }
        let placed = self.with_view(|c, view| {
            let place = view.down(c.place, 0);
            (place, view.is_near_begin(place), view.is_near_end(place))
        });
        let Some((place, near_begin, near_end)) = placed else { return };
        let (is_hidden, now_ms) = (self.is_hidden, self.now_ms);
        let Some(c) = self.opened_mut() else { return };
        if c.has_end() || place != Place::End {
            c.place = place;
        }
        if c.may_load(now_ms) {
            if near_begin {
                load(c, PAGE, true, effects);
            } else if near_end && !c.has_end() {
                let page = Page::After(c.last);
                c.loading = Some(page);
                effects.push(Effect::Load { conversation: c.id.clone(), page, limit: PAGE, urgent: true });
            }
        }
        let id = c.id.clone();
        if let Some(seq) = c.deliver() {
            effects.push(Effect::Delivered(id.clone(), seq));
        }
        if !is_hidden && let Some(seq) = c.see() {
            effects.push(Effect::Read(id, seq));
        }
    }

    /// Sends what stands in the composer of the open conversation.
    pub(super) fn send(&mut self, effects: &mut Vec<Effect>) {
        if self.waiting() >= MOST_SENDING {
            return self.say("too many messages wait for their answers");
        }
        let (number, now_ms) = (self.next_number, self.now_ms);
        let Some(c) = self.opened_mut() else { return };
        if c.draft.text().trim().is_empty() {
            return;
        }
        let text = c.draft.take();
        let (is_action, text) = match text.strip_prefix("/me ") {
            Some(action) if !action.trim().is_empty() => (true, action.to_owned()),
            _ => (false, text),
        };
        c.send(number, &text, is_action, now_ms);
        effects.push(Effect::Send { conversation: c.id.clone(), number, text, is_action });
        self.next_number += 1;
    }
}

/// Asks for the page before a conversation's window, unless it begins at the first event or one is awaited.
fn load(c: &mut Conversation, limit: u32, urgent: bool, effects: &mut Vec<Effect>) {
    if c.first > 1 && c.has_begun() && c.loading.is_none() {
        let page = Page::Before(c.first);
        c.loading = Some(page);
        effects.push(Effect::Load { conversation: c.id.clone(), page, limit, urgent });
    }
}
