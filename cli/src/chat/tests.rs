//! The model and the view together: what a user does, what the server says, and what is then on the screen.

mod model;
mod view;

use std::time::Duration;

use crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::{Terminal, backend::TestBackend, buffer::Buffer};
use stentor_client::{
    AppId, Connection, Conversation as Listed, ConversationId, DeviceId, Identity, Incoming, Seq, UserId,
};

use super::{
    conversation::Page,
    model::{Effect, Input, Model},
    row::{Row, Said},
    text::columns,
    view::view,
};

/// Wed 25 Nov 2026, 14:00 UTC.
const NOON: u64 = 1_795_615_200_000;
const MINUTE: u64 = 60_000;

/// A chat of ann on a screen, without a server.
struct Chat {
    model: Model,
    now_ms: u64,
    effects: Vec<Effect>,
}

fn id(text: &str) -> ConversationId {
    ConversationId::new(text).unwrap()
}

fn message(seq: u64, sender: &str, text: &str) -> Row {
    let stamp_ms = NOON - MINUTE * 60 + seq * MINUTE;
    let said = Said::Text(super::text::harmless(text));
    Row { from: seq, to: seq, said, sender: sender.into(), stamp_ms, is_own: sender == "ann" }
}

impl Chat {
    fn new(columns: u16, rows: u16) -> Self {
        let identity = Identity {
            app: AppId::new("demo").unwrap(),
            user: UserId::new("ann").unwrap(),
            device: DeviceId::new("cli-1").unwrap(),
        };
        let mut chat =
            Self { model: Model::new(identity, |_| 0, NOON, (columns, rows)), now_ms: NOON, effects: vec![] };
        chat.online();
        chat.input(Input::Incoming(Incoming::UpToDate));
        chat
    }

    fn input(&mut self, input: Input) {
        self.effects.extend(self.model.update(self.now_ms, input));
    }

    fn online(&mut self) {
        let lasted = Duration::from_secs(1);
        self.input(Input::Tick(Connection::Online { gateway: "gateway-1".into(), lasted }));
    }

    fn key(&mut self, code: KeyCode, modifiers: KeyModifiers) {
        self.input(Input::Key(KeyEvent::new(code, modifiers)));
    }

    fn press(&mut self, code: KeyCode) {
        self.key(code, KeyModifiers::NONE);
    }

    fn write(&mut self, text: &str) {
        text.chars().for_each(|c| self.press(KeyCode::Char(c)));
    }

    /// Conversations of which the server tells (id, head, read).
    fn listed(&mut self, conversations: &[(&str, u64, u64)]) {
        let listed = |&(id, head, _): &(&str, u64, u64)| Listed {
            conversation: id.into(),
            kind: 2,
            head,
            participants: 3,
            role: 2,
            since_seq: 1,
            ..Listed::default()
        };
        self.input(Input::Listed(Ok((conversations.iter().map(listed).collect(), false))));
        for &(name, head, read) in conversations {
            let (head, read, delivered) = (Seq(head), Seq(read), Seq(0));
            self.input(Input::Incoming(Incoming::State { conversation: id(name), head, delivered, read }));
        }
    }

    /// The server's answer to the last page that was asked for.
    fn page(&mut self, name: &str, rows: Vec<Row>, head: u64) {
        let page = self.asked(name).expect("a page was asked for");
        self.input(Input::Page { conversation: id(name), page, result: Ok((rows, head)) });
    }

    fn asked(&self, name: &str) -> Option<Page> {
        self.model.conversations.get(name)?.loading
    }

    /// Answers every page of a conversation of messages "m1", "m2"… as a server would, until none is asked for.
    fn serve(&mut self, name: &str, head: u64) {
        while let Some(page) = self.asked(name) {
            let rows = match page {
                Page::Before(seq) => (seq.saturating_sub(20).max(1)..seq).collect::<Vec<_>>(),
                Page::After(seq) => (seq + 1..=(seq + 20).min(head)).collect(),
            };
            let rows = rows.into_iter().map(|n| message(n, "bob", &format!("m{n}"))).collect();
            self.page(name, rows, head);
        }
    }

    fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    fn buffer(&self) -> Buffer {
        let screen = self.model.screen;
        let mut terminal = Terminal::new(TestBackend::new(screen.width, screen.height)).unwrap();
        terminal.draw(|frame| view(&self.model, frame)).unwrap();
        terminal.backend().buffer().clone()
    }

    /// What is on the screen, row by row, without blanks at the ends.
    fn screen(&self) -> Vec<String> {
        let buffer = self.buffer();
        let row = |y| {
            let mut row = String::new();
            let mut x = 0;
            while x < buffer.area.width {
                let glyph = buffer[(x, y)].symbol();
                row.push_str(glyph);
                // A wide glyph covers the next cell too.
                x += columns(glyph).max(1) as u16;
            }
            row.trim_end().to_owned()
        };
        (0..buffer.area.height).map(row).collect()
    }

    fn resize(&mut self, columns: u16, rows: u16) {
        self.input(Input::Resize(columns, rows));
    }
}
