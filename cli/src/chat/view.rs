//! Draws what the model says. Must never change anything, and must draw on a screen of any size, also of none.

use std::time::Duration;

use ratatui::{
    Frame,
    layout::{Position, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Clear, Paragraph},
};
use stentor_client::{Connection, ConversationKind, Role};

use super::{
    areas::{Areas, PROMPT},
    composer::Composer,
    conversation::{Conversation, Place},
    keys::HELP,
    lines::{DIM, colour},
    model::{Dialog, Focus, Model},
    row::Said,
    text::{clip, columns, fit},
};

const CHOSEN: Style = Style::new().add_modifier(Modifier::REVERSED);
const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);

/// Draws everything.
pub(crate) fn view(model: &Model, frame: &mut Frame<'_>) {
    let areas = model.areas();
    list(model, frame, areas.list);
    for y in areas.divider.top()..areas.divider.bottom() {
        write(frame, Rect { y, height: 1, ..areas.divider }, Line::styled("│", DIM));
    }
    title(model, frame, areas.title);
    messages(model, frame, areas.messages);
    composer(model, frame, areas.composer);
    state(model, frame, areas.state);
    if let Some(dialog) = &model.dialog {
        draw_dialog(frame, dialog);
    }
}

/// One line; nothing where there is no room.
fn write(frame: &mut Frame<'_>, area: Rect, line: Line<'_>) {
    let area = area.intersection(frame.area());
    if !area.is_empty() {
        frame.render_widget(Paragraph::new(line), area);
    }
}

fn row_of(area: Rect, n: usize) -> Option<Rect> {
    let y = u16::try_from(n).ok().filter(|&n| n < area.height)?;
    Some(Rect { y: area.y + y, height: 1, ..area })
}

fn list(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    if area.is_empty() {
        return;
    }
    if model.order.is_empty() {
        let text = if model.has_listed { "no conversations; Ctrl-N begins one" } else { "loading…" };
        return write(frame, Rect { height: 1, ..area }, Line::styled(clip(text, usize::from(area.width)), DIM));
    }
    // Two rows each, one where there is hardly any room.
    let each = if area.height >= 6 { 2 } else { 1 };
    let fits = usize::from(area.height / each).max(1);
    let selected = model.order.iter().position(|id| Some(id) == model.selected.as_ref()).unwrap_or(0);
    let from = (selected + 1).saturating_sub(fits);
    for (n, id) in model.order.iter().skip(from).take(fits).enumerate() {
        let Some(c) = model.conversations.get(id.as_str()) else { continue };
        let chosen = match (n + from == selected, model.focus) {
            (true, Focus::List) => CHOSEN,
            _ if Some(id) == model.open.as_ref() => BOLD,
            _ => Style::new(),
        };
        let first = n * usize::from(each);
        if let Some(row) = row_of(area, first) {
            write(frame, row, entry(model, c, usize::from(area.width)).style(chosen));
        }
        if each == 2
            && let Some(row) = row_of(area, first + 1)
        {
            write(frame, row, Line::styled(preview(c, usize::from(area.width)), DIM));
        }
    }
}

/// A conversation's name and how much of it is new.
fn entry(model: &Model, c: &Conversation, width: usize) -> Line<'static> {
    let count = match c.unread() {
        0 => String::new(),
        n @ 1..1_000 => format!(" {n}"),
        _ => " 999+".into(),
    };
    let mark = if c.kind == ConversationKind::Direct { "@ " } else { "# " };
    let name = width.saturating_sub(columns(&count) + columns(mark));
    Line::from(vec![
        Span::styled(clip(mark, width), DIM),
        Span::raw(fit(&c.title(model.me.user.as_str()), name)),
        Span::styled(count, Style::new().fg(Color::Yellow).add_modifier(Modifier::BOLD)),
    ])
}

fn preview(c: &Conversation, width: usize) -> String {
    let text = match &c.preview {
        None => String::new(),
        Some(row) => match &row.said {
            Said::Text(text) | Said::Bytes(text) => format!("  {}: {}", row.sender, text.replace('\n', " ")),
            Said::Action(text) => format!("  * {} {}", row.sender, text.replace('\n', " ")),
            Said::Notice(text) | Said::Hidden(text) => format!("  {text}"),
        },
    };
    clip(&text, width)
}

fn title(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    let Some(c) = model.opened() else { return };
    let kind = match c.kind {
        ConversationKind::Direct => "direct".to_owned(),
        ConversationKind::Channel => format!("channel, {} participants", c.participants),
        ConversationKind::Group | ConversationKind::Unspecified => format!("{} participants", c.participants),
    };
    let kind = format!("  {kind}  {}", super::text::one_line(c.id.as_str()));
    let width = usize::from(area.width);
    let name = clip(&c.title(model.me.user.as_str()), width);
    let kind = clip(&kind, width - columns(&name));
    let style = Style::new().add_modifier(Modifier::UNDERLINED);
    write(frame, area, Line::from(vec![Span::styled(name, BOLD), Span::styled(kind, DIM)]).style(style));
}

fn messages(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    if area.is_empty() {
        return;
    }
    let Some((lines, below)) = model.with_view(|c, view| {
        let below = if c.place == Place::End { 0 } else { view.below(c.place, 1_000) };
        (view.lines(c.place), below)
    }) else {
        let hint = Line::styled(clip("Enter opens a conversation", usize::from(area.width)), DIM);
        return write(frame, Rect { height: 1, ..area }, hint);
    };
    // What is less than a screen stands at its end, where the next message comes.
    let blank = usize::from(area.height).saturating_sub(lines.len());
    for (n, line) in lines.into_iter().enumerate() {
        if let Some(row) = row_of(area, blank + n) {
            write(frame, row, line);
        }
    }
    if below > 0 && area.height > 1 {
        let count = if below >= 1_000 { "999+".to_owned() } else { below.to_string() };
        let text = clip(&format!(" ↓ {count} lines, Ctrl-End "), usize::from(area.width));
        let width = columns(&text) as u16;
        let at = Rect { x: area.right() - width, y: area.bottom() - 1, width, height: 1 };
        write(frame, at, Line::styled(text, CHOSEN));
    }
}

fn composer(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    let Some(c) = model.opened().filter(|_| !area.is_empty()) else { return };
    let has_focus = model.focus == Focus::Composer && model.dialog.is_none();
    let text = Rect { x: area.x + PROMPT.min(area.width), width: area.width.saturating_sub(PROMPT), ..area };
    let prompt = if has_focus { Style::new().fg(colour(model.me.user.as_str())) } else { DIM };
    write(frame, Rect { width: area.width.min(PROMPT), height: 1, ..area }, Line::styled("> ", prompt));
    let hint = match (&c.ended, c.role) {
        (Some(why), _) => Some(why.clone()),
        (None, Role::Reader) => Some("you only read here".into()),
        _ => None,
    };
    match hint.filter(|_| c.draft.is_empty()) {
        Some(hint) => write(frame, Rect { height: 1, ..text }, Line::styled(clip(&hint, usize::from(text.width)), DIM)),
        None => field(frame, &c.draft, text, has_focus),
    }
    if has_focus && c.draft.is_empty() {
        cursor(frame, text, 0, 0);
    }
}

/// The part of an editor's lines that has room, with the cursor.
fn field(frame: &mut Frame<'_>, content: &Composer, area: Rect, has_focus: bool) {
    let drawn = content.draw(usize::from(area.width));
    let skip = (drawn.cursor.0 + 1).saturating_sub(usize::from(area.height));
    for (n, line) in drawn.lines.into_iter().skip(skip).enumerate() {
        if let Some(row) = row_of(area, n) {
            write(frame, row, Line::raw(line));
        }
    }
    if has_focus {
        cursor(frame, area, drawn.cursor.0 - skip, drawn.cursor.1);
    }
}

fn cursor(frame: &mut Frame<'_>, area: Rect, row: usize, column: usize) {
    let area = area.intersection(frame.area());
    if area.is_empty() {
        return;
    }
    let x = area.x + (column as u16).min(area.width - 1);
    frame.set_cursor_position(Position { x, y: area.y + (row as u16).min(area.height - 1) });
}

fn state(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    let who = format!("{}/{}", model.me.user, model.me.device);
    let (light, text, style) = match &model.connection {
        Connection::Online { gateway, .. } if model.is_behind => {
            ("◐", format!("{gateway}, catching up"), Style::new().fg(Color::Yellow))
        }
        Connection::Online { gateway, .. } => ("●", gateway.clone(), Style::new().fg(Color::Green)),
        Connection::Offline { lasted, retry_in, reason } => {
            // Why is said unless there is something more urgent to say.
            let reason = reason.as_deref().filter(|_| model.notice.is_none());
            ("○", offline(*lasted, *retry_in, reason), Style::new().fg(Color::Red))
        }
    };
    let width = usize::from(area.width);
    let left = match &model.notice {
        Some((notice, _)) if matches!(model.connection, Connection::Offline { .. }) => {
            format!("{light} {text} · {notice}")
        }
        Some((notice, _)) => format!("{light} {notice}"),
        None => format!("{light} {text}"),
    };
    let left = clip(&super::text::one_line(&left), width);
    let more = if model.left_out { format!("first {} conversations · ", model.order.len()) } else { String::new() };
    let right = format!("{more}{who} · F1 help");
    let blanks = width.saturating_sub(columns(&left) + columns(&right));
    let mut spans = vec![Span::styled(left, style)];
    if blanks >= 2 {
        spans.push(Span::raw(" ".repeat(blanks)));
        spans.push(Span::styled(right, DIM));
    }
    write(frame, area, Line::from(spans));
}

fn offline(lasted: Duration, retry_in: Duration, reason: Option<&str>) -> String {
    let next = match retry_in.as_secs_f32().ceil() as u64 {
        0 => "connecting".to_owned(),
        seconds => format!("reconnecting in {seconds} s"),
    };
    let reason = reason.map_or_else(String::new, |reason| format!(" ({reason})"));
    format!("{next}; no connection for {}{reason}", spoken(lasted))
}

fn spoken(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3_600 => format!("{} min {} s", s / 60, s % 60),
        s => format!("{} h {} min", s / 3_600, s / 60 % 60),
    }
}

fn draw_dialog(frame: &mut Frame<'_>, dialog: &Dialog) {
    let (title, lines, content) = match dialog {
        Dialog::Help => {
            let lines = HELP.iter().map(|&(key, what)| Line::from(vec![Span::styled(fit(key, 22), BOLD), what.into()]));
            (" keys ", lines.collect::<Vec<_>>(), None)
        }
        Dialog::New(field) => {
            let hint = "users, with blanks between; one: a direct conversation;\n#id first: a group of this name";
            (" new conversation ", hint.lines().map(|l| Line::styled(l, DIM)).collect(), Some(field))
        }
        Dialog::Add(field) => (" take in ", vec![Line::styled("a user", DIM)], Some(field)),
    };
    let area = Areas::dialog(frame.area(), dialog, lines.len() + usize::from(content.is_some()));
    frame.render_widget(Clear, area);
    // On a screen that small a frame would leave no room.
    let inner = if area.width > 4 && area.height > 2 {
        frame.render_widget(Block::bordered().title(title), area);
        Rect { x: area.x + 1, y: area.y + 1, width: area.width - 2, height: area.height - 2 }
    } else {
        area
    };
    // The question's field first: it is needed most.
    if let Some(content) = content {
        let width = usize::from(inner.width).max(1);
        let line = Rect { height: inner.height.min(1), ..inner };
        field_on_one_line(frame, content, line, width);
    }
    let skip = usize::from(content.is_some());
    for (n, line) in lines.into_iter().enumerate() {
        if let Some(row) = row_of(inner, n + skip) {
            write(frame, row, line);
        }
    }
}

/// An editor of one line; of a long one the end.
fn field_on_one_line(frame: &mut Frame<'_>, content: &Composer, area: Rect, width: usize) {
    let drawn = content.draw(width);
    let (line, column) = drawn.cursor;
    if let Some(text) = drawn.lines.get(line) {
        write(frame, area, Line::raw(text.clone()));
    }
    cursor(frame, area, 0, column);
}
