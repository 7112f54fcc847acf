//! Where everything stands on a screen of any size. Must never give a part more than there is: what finds no room is
//! left out, the least needed first.

use ratatui::layout::Rect;

use super::model::{Dialog, Focus, Model};

/// From here on list and conversation stand side by side.
const TWO_PANES: u16 = 50;
/// From here on there is room for a title.
const TITLE_ROWS: u16 = 7;
/// The composer grows up to so many rows.
const COMPOSER_ROWS: u16 = 8;
/// Beside the text: the prompt.
pub(crate) const PROMPT: u16 = 2;

/// Empty parts are not drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Areas {
    pub(crate) list: Rect,
    /// Between list and conversation.
    pub(crate) divider: Rect,
    pub(crate) title: Rect,
    pub(crate) messages: Rect,
    pub(crate) composer: Rect,
    pub(crate) state: Rect,
}

impl Areas {
    pub(super) fn of(model: &Model) -> Self {
        let screen = model.screen;
        let mut areas = Self::default();
        let mut rows = screen.height;
        if rows >= 3 {
            rows -= 1;
            areas.state = Rect { y: rows, height: 1, ..screen };
        }
        let main = Rect { height: rows, ..screen };
        let talk = if screen.width >= TWO_PANES {
            let list = (screen.width / 3).min(34);
            areas.list = Rect { width: list, ..main };
            areas.divider = Rect { x: list, width: 1, ..main };
            Rect { x: list + 1, width: screen.width - list - 1, ..main }
        } else if model.focus == Focus::List || model.open.is_none() {
            areas.list = main;
            return areas;
        } else {
            main
        };
        areas.talk(model, talk);
        areas
    }

    fn talk(&mut self, model: &Model, talk: Rect) {
        let mut left = talk;
        if left.height >= TITLE_ROWS {
            self.title = Rect { height: 1, ..left };
            left = Rect { y: left.y + 1, height: left.height - 1, ..left };
        }
        let wanted = model.opened().map_or(1, |c| {
            let width = usize::from(talk.width.saturating_sub(PROMPT)).max(1);
            c.draft.draw(width).lines.len().min(usize::from(COMPOSER_ROWS)) as u16
        });
        let composer = wanted.clamp(1, (left.height / 2).max(1)).min(left.height);
        self.composer = Rect { y: left.y + left.height - composer, height: composer, ..left };
        self.messages = Rect { height: left.height - composer, ..left };
    }

    /// Where a question stands.
    pub(crate) fn dialog(screen: Rect, dialog: &Dialog, lines: usize) -> Rect {
        let width = screen.width.min(match dialog {
            Dialog::Help => 64,
            Dialog::New(_) | Dialog::Add(_) => 60,
        });
        let height = screen.height.min(lines as u16 + 2);
        Rect { x: (screen.width - width) / 2, y: (screen.height - height) / 2, width, height }
    }
}
