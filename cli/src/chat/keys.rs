//! What keys do. Must never act on a key that only began to be pressed together with others: releases are ignored.

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use stentor_client::{ConversationId, UserId};

use super::{
    areas::PROMPT,
    composer::Composer,
    model::{Dialog, Effect, Focus, Model},
};

/// What the help says.
pub(crate) const HELP: [(&str, &str); 13] = [
    ("Enter", "send; in the list: open"),
    ("Alt-Enter, Ctrl-J", "a new line"),
    ("Tab", "between list and message"),
    ("Alt-Up, Alt-Down", "the conversation above, below"),
    ("PgUp, PgDn", "scroll; older messages are loaded"),
    ("Ctrl-Up, Ctrl-Down", "scroll by a line"),
    ("Ctrl-End", "to the newest message"),
    ("Ctrl-N", "a new conversation"),
    ("Ctrl-T", "take somebody into this one"),
    ("/me waves", "an action"),
    ("Esc", "forget what was not sent"),
    ("Ctrl-L", "draw everything anew"),
    ("Ctrl-C", "leave"),
];

/// Pasted text is text, whatever keys it would be.
pub(super) fn paste(model: &mut Model, text: &str) {
    let field = match &mut model.dialog {
        Some(Dialog::New(field) | Dialog::Add(field)) => Some(field),
        Some(Dialog::Help) => None,
        None => {
            if model.open.is_some() {
                model.focus = Focus::Composer;
            }
            model.opened_mut().map(|c| &mut c.draft)
        }
    };
    if field.is_some_and(|field| !field.insert(text)) {
        model.say(too_long());
    }
}

fn too_long() -> String {
    format!("a message has at most {} kB", super::composer::MOST_BYTES / 1_000)
}

pub(super) fn key(model: &mut Model, key: KeyEvent, effects: &mut Vec<Effect>) {
    if key.kind == KeyEventKind::Release {
        return;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    let leaves = control && matches!(key.code, KeyCode::Char('c' | 'q'));
    model.is_leaving &= leaves;
    match key.code {
        _ if leaves => leave(model, effects),
        KeyCode::Char('l') if control => effects.push(Effect::Redraw),
        _ if model.dialog.is_some() => dialog(model, key, effects),
        KeyCode::F(1) => model.dialog = Some(Dialog::Help),
        KeyCode::Char('n') if control => model.dialog = Some(Dialog::New(Composer::default())),
        KeyCode::Char('t') if control => match model.open {
            Some(_) => model.dialog = Some(Dialog::Add(Composer::default())),
            None => model.say("open a conversation first"),
        },
        KeyCode::Tab | KeyCode::BackTab => {
            model.focus = match model.focus {
                Focus::List if model.open.is_some() => Focus::Composer,
                _ => Focus::List,
            }
        }
        _ if scroll(model, key) => {}
        _ if model.focus == Focus::List => list(model, key),
        _ => composer(model, key, effects),
    }
}

/// Twice, if messages would be left without an answer.
fn leave(model: &mut Model, effects: &mut Vec<Effect>) {
    let waiting = model.waiting();
    if waiting > 0 && !model.is_leaving {
        model.is_leaving = true;
        model.say(format!("{waiting} not acknowledged; Ctrl-C again leaves all the same"));
    } else {
        effects.push(Effect::Leave);
    }
}

/// Keys that move the view, whoever has the focus.
fn scroll(model: &mut Model, key: KeyEvent) -> bool {
    let (control, alt) = (key.modifiers.contains(KeyModifiers::CONTROL), key.modifiers.contains(KeyModifiers::ALT));
    let page = usize::from(model.areas().messages.height).saturating_sub(1).max(1);
    let in_list = model.focus == Focus::List;
    let (up, lines) = match key.code {
        KeyCode::Up if alt => return neighbour(model, true),
        KeyCode::Down if alt => return neighbour(model, false),
        KeyCode::Up if control => (true, 1),
        KeyCode::Down if control => (false, 1),
        KeyCode::PageUp if !in_list => (true, page),
        KeyCode::PageDown if !in_list => (false, page),
        KeyCode::End if control => {
            if let Some(c) = model.opened_mut() {
                c.go_to_end();
            }
            return true;
        }
        _ => return false,
    };
    let place = model.with_view(|c, view| if up { view.up(c.place, lines) } else { view.down(c.place, lines) });
    if let (Some(place), Some(c)) = (place, model.opened_mut()) {
        c.place = place;
    }
    true
}

/// Opens the conversation above or below the open one.
fn neighbour(model: &mut Model, up: bool) -> bool {
    let at = model.order.iter().position(|id| Some(id) == model.open.as_ref());
    let to = match (at, up) {
        (None, _) => 0,
        (Some(at), true) => at.saturating_sub(1),
        (Some(at), false) => at + 1,
    };
    if let Some(id) = model.order.get(to).cloned() {
        model.open(&id);
    }
    true
}

fn list(model: &mut Model, key: KeyEvent) {
    let last = model.order.len().saturating_sub(1);
    let at = model.order.iter().position(|id| Some(id) == model.selected.as_ref()).unwrap_or(0);
    // Two rows a conversation.
    let page = usize::from(model.areas().list.height / 2).max(1);
    let to = match key.code {
        KeyCode::Up => at.saturating_sub(1),
        KeyCode::Down => at + 1,
        KeyCode::PageUp => at.saturating_sub(page),
        KeyCode::PageDown => at + page,
        KeyCode::Home => 0,
        KeyCode::End => last,
        KeyCode::Enter | KeyCode::Right => {
            if let Some(id) = model.selected.clone() {
                model.open(&id);
            }
            return;
        }
        KeyCode::Esc if model.open.is_some() => return model.focus = Focus::Composer,
        // Whoever begins to write means the message.
        KeyCode::Char(_) if model.open.is_some() => {
            model.focus = Focus::Composer;
            return write(model, key);
        }
        _ => return,
    };
    model.selected = model.order.get(to.min(last)).cloned();
}

fn composer(model: &mut Model, key: KeyEvent, effects: &mut Vec<Effect>) {
    let alt = key.modifiers.intersects(KeyModifiers::ALT | KeyModifiers::SHIFT);
    match key.code {
        KeyCode::Enter if !alt => model.send(effects),
        KeyCode::Esc => {
            let forgot = model.opened_mut().is_some_and(super::conversation::Conversation::forget_failed);
            if !forgot {
                model.focus = Focus::List;
            }
        }
        _ => write(model, key),
    }
}

fn write(model: &mut Model, key: KeyEvent) {
    let width = usize::from(model.areas().composer.width.saturating_sub(PROMPT)).max(1);
    let Some(c) = model.opened_mut() else { return };
    if !edit(&mut c.draft, key, width) {
        model.say(too_long());
    }
}

/// Edits; false when there is no room for more.
fn edit(text: &mut Composer, key: KeyEvent, width: usize) -> bool {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Enter => return text.insert("\n"),
        KeyCode::Char('j') if control => return text.insert("\n"),
        KeyCode::Char('a') if control => text.line_start(),
        KeyCode::Char('e') if control => text.line_end(),
        KeyCode::Char('u') if control => text.delete_to_start(),
        KeyCode::Char('k') if control => text.delete_to_end(),
        KeyCode::Char('w') if control => text.delete_word(),
        KeyCode::Char(_) if control => {}
        KeyCode::Char(c) => return text.insert(c.encode_utf8(&mut [0; 4])),
        KeyCode::Backspace => text.backspace(),
        KeyCode::Delete => text.delete(),
        KeyCode::Left if control => text.word_left(),
        KeyCode::Right if control => text.word_right(),
        KeyCode::Left => text.left(),
        KeyCode::Right => text.right(),
        KeyCode::Home => text.line_start(),
        KeyCode::End => text.line_end(),
        KeyCode::Up | KeyCode::Down => {
            let _ = text.vertical(width, key.code == KeyCode::Down);
        }
        _ => {}
    }
    true
}

fn dialog(model: &mut Model, key: KeyEvent, effects: &mut Vec<Effect>) {
    match (&mut model.dialog, key.code) {
        (_, KeyCode::Esc) | (Some(Dialog::Help), _) => model.dialog = None,
        (Some(Dialog::New(field)), KeyCode::Enter) => {
            let said = field.take();
            answer(model, parse_new(&said, model.me.user.as_str()), effects);
        }
        (Some(Dialog::Add(field)), KeyCode::Enter) => {
            let said = field.take();
            let user = UserId::new(said.trim()).map_err(|e| e.to_string());
            let add = user.and_then(|user| {
                let conversation = model.open.clone().ok_or("no conversation is open")?;
                Ok(Effect::Add { conversation, user })
            });
            answer(model, add, effects);
        }
        (Some(Dialog::New(field) | Dialog::Add(field)), _) => {
            let _ = edit(field, key, usize::from(u16::MAX));
        }
        (None, _) => {}
    }
}

fn answer(model: &mut Model, effect: Result<Effect, String>, effects: &mut Vec<Effect>) {
    match effect {
        Ok(effect) => {
            model.dialog = None;
            effects.push(effect);
        }
        Err(why) => model.say(why),
    }
}

/// `bob`: the direct conversation with him. `bob carol`: a group. `#id bob…`: a group under this id.
fn parse_new(said: &str, me: &str) -> Result<Effect, String> {
    let mut words = said.split_whitespace().peekable();
    let id = words.next_if(|word| word.starts_with('#')).map(|word| ConversationId::new(&word[1..]));
    let id = id.transpose().map_err(|e| e.to_string())?;
    let with = words.filter(|&user| user != me).map(|user| UserId::new(user).map_err(|e| e.to_string()));
    let with = with.collect::<Result<Vec<_>, _>>()?;
    if with.is_empty() && id.is_none() {
        return Err("name at least one user".into());
    }
    Ok(Effect::Create { id, with })
}
