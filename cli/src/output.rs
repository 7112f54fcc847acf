//! What a command prints: results on stdout, everything else on stderr. Must never mix the two, and must never colour
//! or animate what is not read by a person at a terminal.

use std::io::{self, IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::json;
use stentor_proto::v1::Refusal;
use unicode_width::UnicodeWidthStr;

use crate::failure::Failure;

/// Where results and news go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    /// For people, or as JSON lines.
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether results are JSON.
    pub(crate) fn json(self) -> bool {
        self.json
    }

    /// One result as a JSON line.
    pub(crate) fn value(self, value: &impl Serialize) -> Result<(), Failure> {
        let line = serde_json::to_string(value).map_err(Failure::failed)?;
        self.text(&line)
    }

    /// One line of results.
    pub(crate) fn text(self, line: &str) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(line.as_bytes()).and_then(|()| stdout.write_all(b"\n")).map_err(gone)
    }

    /// Pushes out what is buffered: before waiting for something that may take long.
    pub(crate) fn flush(self) -> Result<(), Failure> {
        io::stdout().flush().map_err(gone)
    }

    /// Columns, aligned, the first row being their names.
    pub(crate) fn table(self, rows: &[Vec<String>]) -> Result<(), Failure> {
        for (n, line) in align(rows).into_iter().enumerate() {
            self.text(&if n == 0 { self.bold(&line) } else { line })?;
        }
        Ok(())
    }

    /// News for people, on stderr; nothing when results are JSON.
    pub(crate) fn news(self, line: &str) {
        if !self.json {
            self.notice(line);
        }
    }

    /// What the caller must know in any case, on stderr. Nobody to tell is no failure.
    pub(crate) fn notice(self, line: &str) {
        let _ = writeln!(io::stderr().lock(), "{line}");
    }

    /// Emphasis, on a terminal only.
    pub(crate) fn bold(self, text: &str) -> String {
        if io::stdout().is_terminal() { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Good or bad, coloured on a terminal only.
    pub(crate) fn verdict(self, good: bool, text: &str) -> String {
        let colour = if good { 32 } else { 31 };
        if io::stdout().is_terminal() { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A progress bar on stderr, hidden unless a person looks at it.
    pub(crate) fn progress(self, total: u64, what: &str) -> ProgressBar {
        let target = if self.json { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        if let Ok(style) = ProgressStyle::with_template("{msg:20} {wide_bar} {human_pos}/{human_len} {elapsed_precise}")
        {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        bar
    }

    /// A line on stderr that lives while something goes on, hidden unless a person looks at it.
    pub(crate) fn spinner(self) -> ProgressBar {
        let target = if self.json { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let line = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            line.set_style(style);
        }
        line.enable_steady_tick(std::time::Duration::from_millis(200));
        line
    }

    /// Tells why the command failed.
    pub(crate) fn failure(self, failure: &Failure) {
        let Some(refusal) = failure.refusal() else { return };
        if self.json {
            self.notice(&json!({ "error": error_value(&refusal) }).to_string());
        } else {
            match failure {
                Failure::Refused(_) => self.notice(&format!("refused: {} ({})", refusal.message, refusal.reason)),
                _ => self.notice(&format!("stentor: {}", refusal.message)),
            }
        }
    }
}

/// A refusal as it stands in JSON output.
pub(crate) fn error_value(refusal: &Refusal) -> serde_json::Value {
    json!({ "reason": refusal.reason, "message": refusal.message, "retryable": refusal.retryable })
}

fn gone(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::ReaderGone,
        _ => Failure::failed(format_args!("cannot write the results: {error}")),
    }
}

/// What a cell takes of a line; colours take nothing.
fn drawn(cell: &str) -> usize {
    let mut parts = cell.split("\x1b[");
    let first = parts.next().map_or(0, UnicodeWidthStr::width);
    first + parts.map(|part| part.split_once('m').map_or(0, |(_, text)| text.width())).sum::<usize>()
}

fn align(rows: &[Vec<String>]) -> Vec<String> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| drawn(s)).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell}{}", " ".repeat(width - drawn(cell))));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [vec!["a".to_owned(), "long head".to_owned()], vec!["größer".to_owned(), "x".to_owned()]];
        assert_eq!(align(&rows), ["a       long head", "größer  x"]);
        let rows = [vec!["\x1b[31mbad\x1b[0m".to_owned(), "x".to_owned()], vec!["三文字".to_owned(), "y".to_owned()]];
        assert_eq!(align(&rows), ["\x1b[31mbad\x1b[0m     x", "三文字  y"]);
    }
}
