//! An event, a hidden stretch or a message of one's own on its way, as it is shown. Must never claim that a body is text
//! when it is not, nor keep the frame alive that brought it.

use stentor_client::{Event, EventKind, Hidden, HiddenReason, Identity, Item};

use super::text;

/// Of bytes that are no text so many are shown.
const SHOWN_BYTES: usize = 64;

/// What is shown of one seq, or of a hidden stretch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    /// The first seq.
    pub(crate) from: u64,
    /// The last seq.
    pub(crate) to: u64,
    pub(crate) said: Said,
    pub(crate) sender: String,
    pub(crate) stamp_ms: u64,
    /// By this user, on whatever device.
    pub(crate) is_own: bool,
}

/// What it says; all harmless already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    /// A message.
    Text(String),
    /// "/me waves".
    Action(String),
    /// A message that is no text, in words.
    Bytes(String),
    /// Something about the conversation.
    Notice(String),
    /// What this reader does not get.
    Hidden(String),
}

impl Said {
    pub(crate) fn text(&self) -> &str {
        let (Self::Text(text) | Self::Action(text) | Self::Bytes(text) | Self::Notice(text) | Self::Hidden(text)) =
            self;
        text
    }
}

impl Row {
    pub(crate) fn event(event: &Event, me: &Identity) -> Self {
        let sender = text::one_line(&event.sender);
        let subject = text::one_line(&event.subject);
        let said = match event.kind {
            EventKind::Message => body(&event.content_type, &event.body, false),
            EventKind::Action => body(&event.content_type, &event.body, true),
            EventKind::Created => Said::Notice(format!("{sender} created the conversation")),
            EventKind::ParticipantAdded => Said::Notice(format!("{sender} added {subject}")),
            EventKind::ParticipantRemoved if event.sender == event.subject => Said::Notice(format!("{subject} left")),
            EventKind::ParticipantRemoved => Said::Notice(format!("{sender} removed {subject}")),
            EventKind::RoleChanged => {
                let role = crate::event_line::short(event.role.as_str_name(), "ROLE_");
                Said::Notice(format!("{sender} made {subject} {role}"))
            }
            EventKind::Unspecified => Said::Notice(format!("{sender} did something that this version does not know")),
        };
        let is_own = *event.sender == *me.user.as_str();
        Self { from: event.seq.0, to: event.seq.0, said, sender, stamp_ms: event.stamp_ms.0, is_own }
    }

    pub(crate) fn hidden(hidden: &Hidden) -> Self {
        let why = match hidden.reason {
            HiddenReason::BeforeJoin => "before you joined",
            HiddenReason::NotParticipant => "while you were no participant",
            HiddenReason::Retention => "expired",
            HiddenReason::Redacted => "redacted",
            HiddenReason::NotForYou | HiddenReason::Unspecified => "not for you",
        };
        let (from, to) = (hidden.from.0, hidden.to.0);
        let count = to.saturating_sub(from).saturating_add(1);
        let said = Said::Hidden(format!("{count} hidden: {why}"));
        Self { from, to, said, sender: String::new(), stamp_ms: 0, is_own: false }
    }

    pub(crate) fn item(item: &Item, me: &Identity) -> Self {
        match item {
            Item::Event(event) => Self::event(event, me),
            Item::Hidden(hidden) => Self::hidden(hidden),
        }
    }

    /// About how much memory it takes.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Self>() + self.said.text().len() + self.sender.len()
    }
}

fn body(content_type: &str, body: &[u8], is_action: bool) -> Said {
    let kind = content_type.split(';').next().unwrap_or_default().trim();
    let size = size(body.len());
    if !kind.starts_with("text/") {
        return Said::Bytes(format!("‹{}, {size}›", text::one_line(kind)));
    }
    match std::str::from_utf8(body) {
        Ok(said) if is_action => Said::Action(text::harmless(said)),
        Ok(said) => Said::Text(text::harmless(said)),
        Err(_) => {
            let start = body[..body.len().min(SHOWN_BYTES)].escape_ascii();
            let more = if body.len() > SHOWN_BYTES { "…" } else { "" };
            Said::Bytes(format!("‹{size}, not UTF-8: {start}{more}›"))
        }
    }
}

fn size(bytes: usize) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_said_to_be_none() {
        let said = |kind, bytes: &[u8]| body(kind, bytes, false);
        assert_eq!(said("text/plain; charset=utf-8", "hé\u{1b}".as_bytes()), Said::Text("hé␛".into()));
        assert_eq!(said("text/plain", b"caf\xe9\n"), Said::Bytes("‹5 B, not UTF-8: caf\\xe9\\n›".into()));
        assert_eq!(said("image/png", &[0; 2_048]), Said::Bytes("‹image/png, 2.0 kB›".into()));
        assert_eq!(said("\u{1b}[31m", b"x"), Said::Bytes("‹␛[31m, 1 B›".into()));
        let Said::Bytes(long) = said("text/x", &[0xff; 5_000]) else { panic!("no text") };
        assert!(long.len() < 400 && long.ends_with("…›"), "{long}");
        assert_eq!(body("text/plain", b"waves", true), Said::Action("waves".into()));
    }
}
