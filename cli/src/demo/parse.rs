//! Reads a transcript: `[HH:MM] <name> text`, `[HH:MM]  * name action`, `=== system line`. Files are bytes, not text:
//! what was said must never be re-encoded, only cut out.

use stentor_proto::Bytes;

/// What somebody said or did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// The speaker.
    pub(crate) name: String,
    /// An action (` * name waves`) rather than a message.
    pub(crate) action: bool,
    /// The bytes after the one separating space; never empty.
    pub(crate) text: Bytes,
}

/// Lines that are not sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Skipped {
    /// Messages and actions without a single byte of text.
    pub(crate) empty: u64,
    /// `=== …`.
    pub(crate) system: u64,
    /// Neither: not in the transcript's form.
    pub(crate) unreadable: u64,
}

impl std::ops::AddAssign for Skipped {
    fn add_assign(&mut self, other: Self) {
        self.empty += other.empty;
        self.system += other.system;
        self.unreadable += other.unreadable;
    }
}

/// A file's lines in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Transcript {
    /// What is sent.
    pub(crate) lines: Vec<Line>,
    /// What is not.
    pub(crate) skipped: Skipped,
}

/// Cuts a file into lines; each text shares the file's memory.
pub(crate) fn parse(file: &Bytes) -> Transcript {
    let mut transcript = Transcript::default();
    for line in file.split(|&b| b == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        if line.starts_with(b"===") {
            transcript.skipped.system += 1;
            continue;
        }
        match said(line) {
            None => transcript.skipped.unreadable += 1,
            Some((_, _, [])) => transcript.skipped.empty += 1,
            Some((name, action, text)) => {
                transcript.lines.push(Line { name: latin(name), action, text: file.slice_ref(text) });
            }
        }
    }
    transcript
}

fn said(line: &[u8]) -> Option<(&[u8], bool, &[u8])> {
    let rest = after_time(line)?;
    if let Some(rest) = rest.strip_prefix(b"<") {
        let end = rest.iter().position(|&b| b == b'>')?;
        return Some((&rest[..end], false, after_space(&rest[end + 1..])?)).filter(|(name, ..)| !name.is_empty());
    }
    let rest = rest.strip_prefix(b" * ")?;
    let end = rest.iter().position(|&b| b == b' ').unwrap_or(rest.len());
    Some((&rest[..end], true, after_space(&rest[end..])?)).filter(|(name, ..)| !name.is_empty())
}

/// What follows `[HH:MM] `.
fn after_time(line: &[u8]) -> Option<&[u8]> {
    let (time, rest) = line.split_at_checked(8)?;
    let digits = [time[1], time[2], time[4], time[5]].iter().all(u8::is_ascii_digit);
    (digits && time[0] == b'[' && time[3] == b':' && &time[6..] == b"] ").then_some(rest)
}

/// One space separates a name from its text; a line that ends with the name has an empty text.
fn after_space(rest: &[u8]) -> Option<&[u8]> {
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix(b" ") }
}

/// User ids are UTF-8; a name in an older encoding is read byte by byte, so that it stays one name.
fn latin(name: &[u8]) -> String {
    match std::str::from_utf8(name) {
        Ok(text) => text.to_owned(),
        Err(_) => name.iter().copied().map(char::from).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &'static [u8]) -> Transcript {
        parse(&Bytes::from_static(line))
    }

    fn line(name: &str, action: bool, text: &'static [u8]) -> Line {
        Line { name: name.into(), action, text: Bytes::from_static(text) }
    }

    #[test]
    fn messages_and_actions_keep_their_bytes() {
        let file = b"[12:18] <|trey|> usual  :)\n[12:19]  * ann waves\n[12:20] <bob>  two spaces \n";
        let expected =
            [line("|trey|", false, b"usual  :)"), line("ann", true, b"waves"), line("bob", false, b" two spaces ")];
        assert_eq!(one(file).lines, expected);
        assert_eq!(one(b"[09:59] <ann> caf\xe9 \x15\x1e").lines, [line("ann", false, b"caf\xe9 \x15\x1e")]);
        assert_eq!(one(b"[09:59] <Ren\xe9> hi").lines, [line("Ren\u{e9}", false, b"hi")]);
    }

    #[test]
    fn empty_is_zero_bytes_after_the_one_separating_space() {
        for text in [&b"[12:15] <opteron>"[..], b"[12:15] <opteron> ", b"[07:09]  * homejoe", b"[07:09]  * homejoe "] {
            let transcript = parse(&Bytes::from_static(text));
            assert_eq!((transcript.lines.len(), transcript.skipped.empty), (0, 1), "{}", text.escape_ascii());
        }
        assert_eq!(one(b"[12:15] <opteron>  ").lines, [line("opteron", false, b" ")]);
    }

    #[test]
    fn system_lines_and_others_are_counted_apart() {
        let transcript = one(b"=== ann [~ann@host] has joined\nhello\n[1:00] <x> y\n[12:00] <> y\n[12:00] <ann>x\n\n");
        assert_eq!(transcript.skipped, Skipped { empty: 0, system: 1, unreadable: 4 });
        assert!(transcript.lines.is_empty());
    }

    #[test]
    fn the_bundled_sample_reads_without_a_rest() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/sample");
        let read = |name| parse(&std::fs::read(format!("{folder}/{name}")).unwrap().into());
        let counts = |t: Transcript| (t.lines.len(), t.skipped.empty, t.skipped.system, t.skipped.unreadable);
        assert_eq!(counts(read("2005-06-27_12.txt")), (1017, 1, 232, 0));
        assert_eq!(counts(read("2008-07-14_18.txt")), (1467, 0, 33, 0));
        assert_eq!(counts(read("2016-12-19_20.txt")), (1184, 2, 64, 0));
    }
}
