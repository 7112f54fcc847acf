//! A conversation as lines: which block of lines each row takes at a given width. Must never depend on anything but the
//! conversation and the width, so that scrolling and drawing see the same lines.

use std::collections::VecDeque;

use chrono::{DateTime, FixedOffset, NaiveDate};
use ratatui::{
    style::{Color, Modifier, Style},
    text::{Line, Span},
};

use super::{
    conversation::{Conversation, Fate, Page, RowKey, Sending},
    row::{Row, Said},
    text::{clip, columns, fit, wrap},
};

/// Seconds east of Greenwich at a moment, in ms since the Unix epoch.
pub(crate) type Zone = fn(u64) -> i32;

pub(crate) const DIM: Style = Style::new().add_modifier(Modifier::DIM);
/// Without red, which means that something is wrong.
const NAMES: [Color; 10] = [
    Color::Cyan,
    Color::Green,
    Color::Yellow,
    Color::Magenta,
    Color::Blue,
    Color::LightCyan,
    Color::LightGreen,
    Color::LightYellow,
    Color::LightMagenta,
    Color::LightBlue,
];

/// A user's colour, the same everywhere.
pub(crate) fn colour(user: &str) -> Color {
    let hash = user.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    // Short names differ in few bits; this spreads them.
    let spread = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    NAMES[((spread ^ spread >> 33) % NAMES.len() as u64) as usize]
}

/// Columns of the parts of a line; 0 for a part that is left out.
#[derive(Debug, Clone, Copy)]
struct Columns {
    time: usize,
    name: usize,
    said: usize,
    mark: usize,
}

impl Columns {
    fn of(width: usize) -> Self {
        let (time, name, mark) = match width {
            0..16 => (0, 0, 0),
            16..32 => (0, 0, 2),
            32..60 => (6, 9, 2),
            _ => (6, 15, 9),
        };
        Self { time, name, mark, said: width.saturating_sub(time + name + mark).max(1) }
    }
}

/// A conversation at a width.
pub(crate) struct Paper<'a> {
    conversation: &'a Conversation,
    rows: &'a VecDeque<Row>,
    sending: Vec<&'a Sending>,
    width: usize,
    zone: Zone,
    now_ms: u64,
}

impl<'a> Paper<'a> {
    pub(crate) fn new(conversation: &'a Conversation, width: usize, zone: Zone, now_ms: u64) -> Self {
        let sending = conversation.to_show().collect();
        Self { conversation, rows: conversation.rows(), sending, width, zone, now_ms }
    }

    /// How many blocks.
    pub(crate) fn len(&self) -> usize {
        self.rows.len() + self.sending.len()
    }

    pub(crate) fn key(&self, index: usize) -> RowKey {
        match self.rows.get(index) {
            Some(row) => RowKey::Seq(row.from),
            None => RowKey::Sending(self.sending.get(index - self.rows.len()).map_or(0, |s| s.number)),
        }
    }

    /// Where a row stands; where it would stand if it is not here any more. `None` if there is nothing at all.
    pub(crate) fn index(&self, key: RowKey) -> Option<usize> {
        let last = self.len().checked_sub(1)?;
        Some(match key {
            RowKey::Seq(seq) => self.rows.partition_point(|row| row.to < seq).min(last),
            RowKey::Sending(number) => {
                let at = self.sending.iter().position(|s| s.number == number);
                at.map_or(last, |at| self.rows.len() + at)
            }
        })
    }

    /// What a row takes: what stands above it, then what it says.
    pub(crate) fn block(&self, index: usize) -> Vec<Line<'static>> {
        let mut lines = self.above(index);
        match self.rows.get(index) {
            Some(row) => self.row(row, &mut lines),
            None => {
                if let Some(sending) = self.sending.get(index - self.rows.len()) {
                    self.sending(sending, &mut lines);
                }
            }
        }
        lines
    }

    fn above(&self, index: usize) -> Vec<Line<'static>> {
        let mut lines = Vec::new();
        if index == 0 {
            let begin = match self.conversation.loading {
                Some(Page::Before(_)) => "loading what is older…",
                _ if self.conversation.first <= 1 => "the conversation begins here",
                _ => "⋮",
            };
            lines.push(Line::styled(clip(begin, self.width), DIM).centered());
        }
        if let Some(day) = self.day(index)
            && (0..index).rev().find_map(|earlier| self.day(earlier)) != Some(day)
        {
            lines.push(self.rule(&day.format("%a %-d %b %Y").to_string(), DIM));
        }
        if self.is_first_new(index) {
            lines.push(self.rule("new", Style::new().fg(Color::Red)));
        }
        lines
    }

    fn is_first_new(&self, index: usize) -> bool {
        let Some(marker) = self.conversation.marker else { return false };
        let Some(row) = self.rows.get(index) else { return false };
        let follows = index.checked_sub(1).and_then(|before| self.rows.get(before)).is_none_or(|row| row.to <= marker);
        row.from > marker && follows && (index > 0 || self.conversation.first > marker)
    }

    fn rule(&self, text: &str, style: Style) -> Line<'static> {
        let text = format!(" {} ", clip(text, self.width.saturating_sub(2)));
        let dashes = self.width.saturating_sub(columns(&text));
        let line = format!("{}{text}{}", "─".repeat(dashes / 2), "─".repeat(dashes - dashes / 2));
        Line::styled(clip(&line, self.width), style)
    }

    fn day(&self, index: usize) -> Option<NaiveDate> {
        let stamp_ms = match self.rows.get(index) {
            Some(row) => row.stamp_ms,
            None => self.sending.get(index - self.rows.len())?.since_ms,
        };
        Some(self.local(stamp_ms)?.date_naive())
    }

    /// A hidden stretch has no time.
    fn local(&self, stamp_ms: u64) -> Option<DateTime<FixedOffset>> {
        let moment = DateTime::from_timestamp_millis(i64::try_from(stamp_ms).ok().filter(|&ms| ms > 0)?)?;
        Some(moment.with_timezone(&FixedOffset::east_opt((self.zone)(stamp_ms))?))
    }

    fn row(&self, row: &Row, lines: &mut Vec<Line<'static>>) {
        let own = row.is_own && matches!(row.said, Said::Text(_) | Said::Action(_) | Said::Bytes(_));
        let mark = match (own, Columns::of(self.width).mark) {
            (true, 0..=2) => Span::styled("✓", Style::new().fg(Color::Green)),
            (true, _) => Span::styled(format!("✓ {}", row.from), Style::new().fg(Color::Green)),
            (false, 0..=2) => Span::default(),
            (false, _) => Span::styled(row.from.to_string(), DIM),
        };
        self.say(&row.said, &row.sender, row.stamp_ms, mark, lines);
    }

    fn sending(&self, sending: &Sending, lines: &mut Vec<Line<'static>>) {
        let (mark, why) = match &sending.fate {
            Fate::Waiting => (Span::styled(self.waits(sending), Style::new().fg(Color::Yellow)), None),
            Fate::Acknowledged(seq) if Columns::of(self.width).mark > 2 => {
                (Span::styled(format!("✓ {seq}"), Style::new().fg(Color::Green)), None)
            }
            Fate::Acknowledged(_) => (Span::styled("✓", Style::new().fg(Color::Green)), None),
            Fate::Refused(why) => (Span::styled("✗", Style::new().fg(Color::Red)), Some(format!("not sent: {why}"))),
            Fate::Unknown(why) => {
                (Span::styled("?", Style::new().fg(Color::Red)), Some(format!("perhaps sent: {why}")))
            }
        };
        self.say(&sending.said, "", sending.since_ms, mark, lines);
        if let Some(why) = why {
            let lines_of_it = wrap(&why, self.width);
            lines.extend(lines_of_it.into_iter().map(|line| Line::styled(line, Style::new().fg(Color::Red))));
        }
    }

    /// How long a message waits, once that is worth saying.
    fn waits(&self, sending: &Sending) -> String {
        let seconds = self.now_ms.saturating_sub(sending.since_ms) / 1_000;
        match Columns::of(self.width).mark {
            3.. if seconds >= 3 => format!("… {seconds} s"),
            _ => "…".into(),
        }
    }

    /// The lines of what somebody said; an empty sender is this user, on whose message nothing is known yet.
    fn say(&self, said: &Said, sender: &str, stamp_ms: u64, mark: Span<'static>, lines: &mut Vec<Line<'static>>) {
        let parts = Columns::of(self.width);
        let name = if sender.is_empty() { "you" } else { sender };
        let name_style = Style::new().fg(colour(sender)).add_modifier(Modifier::BOLD);
        let (lead, lead_style, body, style) = match said {
            Said::Text(text) => (name, name_style, text.clone(), Style::new()),
            Said::Bytes(text) => (name, name_style, text.clone(), DIM),
            Said::Action(text) => {
                ("*", name_style, format!("{name} {text}"), Style::new().add_modifier(Modifier::ITALIC))
            }
            Said::Notice(text) => ("--", DIM, text.clone(), DIM),
            Said::Hidden(text) => ("…", DIM, text.clone(), DIM),
        };
        let time = self.local(stamp_ms).map_or_else(String::new, |at| at.format("%H:%M").to_string());
        // Without a column for names they stand in the text.
        let inline = if parts.name == 0 { format!("{lead} ") } else { String::new() };
        for (n, text) in wrap(&format!("{inline}{body}"), parts.said).into_iter().enumerate() {
            let mut spans = Vec::with_capacity(5);
            if parts.name > 0 {
                let (time, lead) = if n == 0 { (time.as_str(), lead) } else { ("", "") };
                spans.push(Span::styled(fit(time, parts.time), DIM));
                spans.push(Span::styled(fit(&clip(lead, parts.name - 1), parts.name), lead_style));
            }
            match text.strip_prefix(inline.as_str()).filter(|_| n == 0 && !inline.is_empty()) {
                Some(rest) => {
                    spans.push(Span::styled(inline.clone(), lead_style));
                    spans.push(Span::styled(fit(rest, parts.said.saturating_sub(columns(&inline))), style));
                }
                None => spans.push(Span::styled(fit(&text, parts.said), style)),
            }
            if n == 0 && parts.mark > 0 {
                let blanks = parts.mark.saturating_sub(columns(&mark.content));
                spans.push(Span::raw(" ".repeat(blanks)));
                spans.push(mark.clone());
            }
            lines.push(Line::from(spans));
        }
    }
}
