//! What others wrote, made fit for a terminal: harmless, and cut into lines by what each glyph takes. Must never let a
//! control character through, nor split a glyph.

use unicode_segmentation::UnicodeSegmentation;
use unicode_width::UnicodeWidthStr;

/// Characters of one glyph that are kept: the longest emoji families have eleven; more is a pile of marks that would
/// run over its neighbours.
const GLYPH_CHARS: usize = 16;
const TAB: &str = "    ";
/// A combining mark without a letter is shown on this.
const DOTTED_CIRCLE: char = '\u{25cc}';

/// A body as it may be drawn: its own line ends stay, everything else that is not a glyph is shown as what it is.
pub(crate) fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for glyph in text.graphemes(true) {
        match glyph {
            "\n" | "\r\n" | "\u{2028}" | "\u{2029}" => out.push('\n'),
            "\t" => out.push_str(TAB),
            _ => push_harmless(&mut out, glyph),
        }
    }
    out
}

/// The same on one line, for names and previews.
pub(crate) fn one_line(text: &str) -> String {
    harmless(text).replace('\n', " ⏎ ")
}

/// One glyph as it may be drawn, line ends included; for what is being typed, where each glyph must stay one.
pub(crate) fn glyph(glyph: &str) -> String {
    let mut out = String::new();
    push_harmless(&mut out, glyph);
    out
}

fn push_harmless(out: &mut String, glyph: &str) {
    let from = out.len();
    for c in glyph.chars().take(GLYPH_CHARS) {
        match c {
            '\0'..='\u{1f}' => out.extend(char::from_u32(0x2400 + c as u32)),
            '\u{7f}' => out.push('\u{2421}'),
            // These turn the direction of what follows, also of what others wrote.
            '\u{80}'..='\u{9f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => out.extend(c.escape_unicode()),
            // Invisible, and not needed to form a glyph.
            '\u{ad}'
            | '\u{180e}'
            | '\u{200b}'
            | '\u{2028}'
            | '\u{2029}'
            | '\u{2060}'..='\u{2065}'
            | '\u{206a}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' => {}
            _ => out.push(c),
        }
    }
    let drawn = &out[from..];
    if !drawn.is_empty() && drawn.width() == 0 && drawn.chars().all(|c| !is_direction_mark(c)) {
        out.insert(from, DOTTED_CIRCLE);
    }
}

/// Right-to-left text needs them; they take no room and turn nothing else.
fn is_direction_mark(c: char) -> bool {
    matches!(c, '\u{200c}'..='\u{200f}' | '\u{61c}')
}

/// Columns of a terminal.
pub(crate) fn columns(text: &str) -> usize {
    text.width()
}

/// As much as fits into so many columns, with an ellipsis where something was left out.
pub(crate) fn clip(text: &str, width: usize) -> String {
    if columns(text) <= width {
        return text.to_owned();
    }
    let mut out = String::new();
    let mut used = 0;
    for glyph in text.graphemes(true) {
        used += columns(glyph);
        if used + 1 > width {
            break;
        }
        out.push_str(glyph);
    }
    if width > 0 {
        out.push('…');
    }
    out
}

/// Clipped, and filled up with blanks.
pub(crate) fn fit(text: &str, width: usize) -> String {
    let mut out = clip(text, width);
    let blanks = width.saturating_sub(columns(&out));
    out.extend(std::iter::repeat_n(' ', blanks));
    out
}

/// Lines of at most so many columns: broken at blanks and beside wide glyphs where that is possible.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.split('\n') {
        wrap_paragraph(paragraph, width.max(1), &mut lines);
    }
    lines
}

fn wrap_paragraph(paragraph: &str, width: usize, lines: &mut Vec<String>) {
    let (mut line, mut used) = (String::new(), 0);
    // Behind the last place where the line may be broken: bytes and columns.
    let mut last_break = (0, 0);
    for glyph in paragraph.graphemes(true) {
        // A glyph that is wider than the whole line.
        let (glyph, wide) = if columns(glyph) > width { ("·", 1) } else { (glyph, columns(glyph)) };
        let blank = glyph.chars().all(char::is_whitespace);
        if blank && used + wide > width {
            // The line ends at this blank, which is not needed any more.
            lines.push(std::mem::take(&mut line));
            (used, last_break) = (0, (0, 0));
            continue;
        }
        while used + wide > width {
            let at = if last_break.0 == 0 { (line.len(), used) } else { last_break };
            let rest = line.split_off(at.0);
            lines.push(std::mem::replace(&mut line, rest).trim_end().to_owned());
            (used, last_break) = (used - at.1, (0, 0));
        }
        line.push_str(glyph);
        used += wide;
        if blank || wide == 2 {
            last_break = (line.len(), used);
        }
    }
    lines.push(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_was_written_can_steer_a_terminal() {
        assert_eq!(harmless("a\x1b[2Jb\u{7}\u{7f}\u{9b}31mé"), "a␛[2Jb␇␡\\u{9b}31mé");
        assert_eq!(harmless("one\r\ntwo\u{2028}three\rfour\t."), "one\ntwo\nthree␍four    .");
        assert_eq!(harmless("evil\u{202e}txt.exe"), "evil\\u{202e}txt.exe");
        assert_eq!(harmless("so\u{ad}ft\u{feff}"), "soft");
        assert_eq!(one_line("a\nb\u{1b}"), "a ⏎ b␛");
        let every = (0..=0x10_ffff).filter_map(char::from_u32).collect::<String>();
        assert!(harmless(&every).chars().all(|c| c == '\n' || !c.is_control()));
    }

    #[test]
    fn a_pile_of_marks_stays_one_small_glyph() {
        let pile = format!("a{}b", "\u{301}".repeat(1_000));
        assert_eq!(harmless(&pile).chars().count(), GLYPH_CHARS + 1);
        assert_eq!(harmless("\u{301}x"), "\u{25cc}\u{301}x", "a mark without a letter would join its neighbour");
        assert_eq!(harmless("\u{200f}שלום"), "\u{200f}שלום");
    }

    #[test]
    fn families_of_emoji_and_wide_letters_take_two_columns_each() {
        let family = "👨\u{200d}👩\u{200d}👧\u{200d}👦";
        assert_eq!(harmless(family), family);
        assert_eq!(columns(family), 2);
        assert_eq!(columns("三e\u{301}"), 3);
        assert_eq!(wrap(&family.repeat(3), 4), [family.repeat(2), family.to_owned()]);
    }

    #[test]
    fn lines_break_at_blanks_and_beside_wide_glyphs() {
        assert_eq!(wrap("the quick brown fox", 10), ["the quick", "brown fox"]);
        assert_eq!(wrap("abcdefghij", 4), ["abcd", "efgh", "ij"]);
        assert_eq!(wrap("ab 三四五六", 6), ["ab 三", "四五六"]);
        assert_eq!(wrap("one\n\ntwo", 10), ["one", "", "two"]);
        assert_eq!(wrap("  indented", 20), ["  indented"]);
        assert_eq!(wrap("", 5), [""]);
    }

    #[test]
    fn no_line_is_ever_wider_than_it_may_be() {
        let texts =
            ["a 三 bb 四四四 c", "👨\u{200d}👩\u{200d}👧 x 👍🏽 y", "aa    bb", "e\u{301}e\u{301}e\u{301} e", "三四"];
        for text in texts {
            for width in 0..12 {
                let lines = wrap(text, width);
                assert!(lines.iter().all(|line| columns(line) <= width.max(1)), "{text:?} in {width}: {lines:?}");
                assert!(columns(&clip(text, width)) <= width);
                assert_eq!(columns(&fit(text, width)), width);
            }
        }
        assert_eq!(clip("hello", 4), "hel…");
    }
}
