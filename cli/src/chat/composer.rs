//! The text that is being written: several lines, a cursor between glyphs. Must never split a glyph, nor grow beyond
//! what can be sent.

use stentor_engine::limits;
use unicode_segmentation::UnicodeSegmentation;

use super::text;

/// What a gateway takes unless it is configured otherwise.
pub(crate) const MOST_BYTES: usize = limits::DEFAULT_MAX_BODY_BYTES;

/// An editor's content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Composer {
    text: String,
    /// Bytes before the cursor.
    at: usize,
}

/// A drawn line of a composer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Drawn {
    pub(crate) lines: Vec<String>,
    /// Line and column of the cursor.
    pub(crate) cursor: (usize, usize),
    /// Where each line begins in the text, in bytes.
    starts: Vec<usize>,
}

impl Composer {
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.text.is_empty()
    }

    /// The text, leaving nothing.
    pub(crate) fn take(&mut self) -> String {
        self.at = 0;
        std::mem::take(&mut self.text)
    }

    /// Writes at the cursor; false if it was too much, and nothing is written. Line ends of any kind become our own.
    pub(crate) fn insert(&mut self, what: &str) -> bool {
        let what = what.replace("\r\n", "\n").replace('\r', "\n");
        if self.text.len() + what.len() > MOST_BYTES {
            return false;
        }
        self.text.insert_str(self.at, &what);
        self.at += what.len();
        // What was written may have joined what follows into one glyph.
        self.at =
            self.text.grapheme_indices(true).map(|(at, _)| at).find(|&at| at >= self.at).unwrap_or(self.text.len());
        true
    }

    pub(crate) fn backspace(&mut self) {
        let to = self.at;
        self.left();
        self.text.replace_range(self.at..to, "");
    }

    pub(crate) fn delete(&mut self) {
        let from = self.at;
        self.right();
        self.text.replace_range(from..self.at, "");
        self.at = from;
    }

    pub(crate) fn left(&mut self) {
        self.at = self.text[..self.at].grapheme_indices(true).next_back().map_or(0, |(at, _)| at);
    }

    pub(crate) fn right(&mut self) {
        self.at += self.text[self.at..].graphemes(true).next().map_or(0, str::len);
    }

    pub(crate) fn word_left(&mut self) {
        let mut words = self.text[..self.at].unicode_word_indices();
        self.at = words.next_back().map_or(0, |(at, _)| at);
    }

    pub(crate) fn word_right(&mut self) {
        let mut words = self.text[self.at..].unicode_word_indices();
        self.at = words.next().map_or(self.text.len(), |(at, word)| self.at + at + word.len());
    }

    /// Deletes back to the begin of the word.
    pub(crate) fn delete_word(&mut self) {
        let to = self.at;
        self.word_left();
        self.text.replace_range(self.at..to, "");
    }

    pub(crate) fn line_start(&mut self) {
        self.at = self.text[..self.at].rfind('\n').map_or(0, |at| at + 1);
    }

    pub(crate) fn line_end(&mut self) {
        self.at = self.text[self.at..].find('\n').map_or(self.text.len(), |at| self.at + at);
    }

    /// Deletes back to the begin of the line.
    pub(crate) fn delete_to_start(&mut self) {
        let to = self.at;
        self.line_start();
        self.text.replace_range(self.at..to, "");
    }

    /// Deletes up to the end of the line.
    pub(crate) fn delete_to_end(&mut self) {
        let from = self.at;
        self.line_end();
        self.text.replace_range(from..self.at, "");
        self.at = from;
    }

    /// One drawn line up, or down; false when there is none.
    pub(crate) fn vertical(&mut self, width: usize, down: bool) -> bool {
        let drawn = self.draw(width);
        let (line, column) = drawn.cursor;
        let to = if down { line + 1 } else { line.wrapping_sub(1) };
        let Some(&start) = drawn.starts.get(to) else { return false };
        let end = drawn.starts.get(to + 1).copied().unwrap_or(self.text.len());
        let (mut at, mut used) = (start, 0);
        for glyph in self.text[start..end].graphemes(true) {
            used += text::columns(&text::glyph(glyph));
            if glyph == "\n" || used > column {
                break;
            }
            at += glyph.len();
        }
        self.at = at;
        true
    }

    /// As it is drawn in lines of so many columns. Nothing is left out: what is at the end of a line can be edited.
    pub(crate) fn draw(&self, width: usize) -> Drawn {
        let width = width.max(1);
        let mut drawn = Drawn { lines: vec![String::new()], cursor: (0, 0), starts: vec![0] };
        let mut used = 0;
        for (at, glyph) in self.text.grapheme_indices(true) {
            let is_end = matches!(glyph, "\n" | "\r\n");
            let shown = if is_end { String::new() } else { text::glyph(glyph) };
            let (shown, wide) =
                if text::columns(&shown) > width { ("·".into(), 1) } else { (shown.clone(), text::columns(&shown)) };
            if used + wide > width {
                drawn.lines.push(String::new());
                drawn.starts.push(at);
                used = 0;
            }
            if at == self.at {
                drawn.cursor = (drawn.lines.len() - 1, used);
            }
            used += wide;
            if let Some(line) = drawn.lines.last_mut() {
                line.push_str(&shown);
            }
            if is_end {
                drawn.lines.push(String::new());
                drawn.starts.push(at + glyph.len());
                used = 0;
            }
        }
        if self.at == self.text.len() {
            if used == width {
                // The cursor needs a place behind the last glyph.
                drawn.lines.push(String::new());
                drawn.starts.push(self.text.len());
                used = 0;
            }
            drawn.cursor = (drawn.lines.len() - 1, used);
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(text: &str) -> Composer {
        let mut composer = Composer::default();
        assert!(composer.insert(text));
        composer
    }

    #[test]
    fn glyphs_are_edited_whole() {
        let mut composer = with("ae\u{301}👨\u{200d}👩\u{200d}👧");
        composer.backspace();
        assert_eq!(composer.text(), "ae\u{301}");
        composer.left();
        composer.insert("三");
        assert_eq!(composer.text(), "a三e\u{301}");
        composer.delete();
        composer.delete();
        assert_eq!(composer.text(), "a三");
        composer.left();
        composer.left();
        composer.left();
        composer.backspace();
        assert_eq!((composer.text(), composer.at), ("a三", 0));
    }

    #[test]
    fn a_mark_that_joins_what_follows_does_not_leave_the_cursor_inside() {
        let mut composer = with("👧");
        composer.left();
        composer.insert("👩\u{200d}");
        assert_eq!(composer.at, composer.text().len());
        composer.insert("x");
        assert_eq!(composer.text(), "👩\u{200d}👧x");
    }

    #[test]
    fn words_and_lines() {
        let mut composer = with("one two\r\nthree four");
        assert_eq!(composer.text(), "one two\nthree four");
        composer.delete_word();
        composer.delete_to_start();
        assert_eq!(composer.text(), "one two\n");
        composer.left();
        composer.word_left();
        composer.delete_to_end();
        assert_eq!(composer.text(), "one \n");
        composer.word_left();
        composer.word_right();
        assert_eq!(composer.at, 3);
        composer.line_end();
        assert_eq!(composer.at, 4);
        assert_eq!(composer.take(), "one \n");
        assert!(composer.is_empty());
    }

    #[test]
    fn lines_are_drawn_with_the_cursor_where_it_is() {
        let mut composer = with("ab三\nc");
        assert_eq!(
            composer.draw(3),
            Drawn { lines: vec!["ab".into(), "三".into(), "c".into()], cursor: (2, 1), starts: vec![0, 2, 6] }
        );
        assert!(composer.vertical(3, false));
        assert_eq!(composer.draw(3).cursor, (1, 0));
        assert!(composer.vertical(3, false));
        assert!(!composer.vertical(3, false));
        composer.line_end();
        assert_eq!(composer.draw(4).cursor, (0, 4), "before a line's end there is room for the cursor nowhere else");
        assert_eq!(with("abcd").draw(4).cursor, (1, 0));
        assert_eq!(with("a\u{1b}b").draw(9).lines, ["a␛b"]);
        assert_eq!(with("三").draw(1).lines, ["·", ""]);
    }

    #[test]
    fn it_takes_no_more_than_can_be_sent() {
        let mut composer = with(&"x".repeat(MOST_BYTES));
        assert!(!composer.insert("y"));
        assert_eq!(composer.text().len(), MOST_BYTES);
    }
}
