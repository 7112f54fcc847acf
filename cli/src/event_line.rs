//! An event, or a hidden stretch, as a line of output. Must never let what somebody wrote reach a terminal as control
//! characters.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Serialize;
use stentor_client::{Event, EventKind, Hidden, Role};

use crate::{failure::Failure, output::Output};

/// The JSON form.
#[derive(Debug, Serialize)]
struct Line<'a> {
    seq: u64,
    conversation: &'a str,
    kind: &'a str,
    sender: &'a str,
    device: &'a str,
    client_id: &'a str,
    content_type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body_base64: Option<String>,
    sent_at_ms: u64,
    stamp_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<String>,
}

/// `message`, `action`, `created`…
pub(crate) fn kind_name(kind: EventKind) -> String {
    short(kind.as_str_name(), "EVENT_KIND_")
}

/// The kind of a `--kind` option.
pub(crate) fn kind_from_name(name: &str) -> Result<EventKind, Failure> {
    let kind = EventKind::from_str_name(&format!("EVENT_KIND_{}", name.to_ascii_uppercase()));
    kind.filter(|&kind| kind != EventKind::Unspecified)
        .ok_or_else(|| Failure::misuse(format_args!("there is no kind {name:?} of events")))
}

/// An enum's value without its enum's name, in lower case.
pub(crate) fn short(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

/// Prints one event.
pub(crate) fn print(output: Output, conversation: &str, event: &Event) -> Result<(), Failure> {
    if !output.json() {
        return output.text(&human(event));
    }
    let body = std::str::from_utf8(&event.body).ok();
    let some = |text| Some(text).filter(|text: &&str| !text.is_empty());
    output.value(&Line {
        seq: event.seq.0,
        conversation,
        kind: &kind_name(event.kind),
        sender: &event.sender,
        device: &event.device,
        client_id: &event.client_id,
        content_type: &event.content_type,
        body,
        body_base64: body.is_none().then(|| STANDARD.encode(&event.body)),
        sent_at_ms: event.sent_at_ms,
        stamp_ms: event.stamp_ms.0,
        subject: some(&event.subject),
        role: (event.role != Role::Unspecified).then(|| short(event.role.as_str_name(), "ROLE_")),
    })
}

/// Prints a stretch that this reader does not get.
pub(crate) fn print_hidden(output: Output, hidden: &Hidden) -> Result<(), Failure> {
    let reason = short(hidden.reason.as_str_name(), "HIDDEN_REASON_");
    if output.json() {
        let hidden = serde_json::json!({ "from": hidden.from.0, "to": hidden.to.0, "reason": reason });
        return output.value(&serde_json::json!({ "hidden": hidden }));
    }
    output.text(&format!("{:>7}  … {} hidden: {reason}", hidden.from.0, hidden.to))
}

fn human(event: &Event) -> String {
    let text = harmless(&String::from_utf8_lossy(&event.body));
    let (sender, subject) = (harmless(&event.sender), harmless(&event.subject));
    let said = match event.kind {
        EventKind::Message => text,
        EventKind::Action => format!("* {text}"),
        EventKind::ParticipantAdded => format!("-- added {subject}"),
        EventKind::ParticipantRemoved => format!("-- removed {subject}"),
        kind => format!("-- {} {subject}", kind_name(kind)).trim_end().to_owned(),
    };
    format!("{:>7}  {}  {sender:<16}  {said}", event.seq.0, time_of_day(event.stamp_ms.0))
}

/// UTC, since nobody told us a time zone.
fn time_of_day(stamp_ms: u64) -> String {
    let seconds = stamp_ms / 1_000 % 86_400;
    format!("{:02}:{:02}:{:02}", seconds / 3_600, seconds / 60 % 60, seconds % 60)
}

fn harmless(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_have_the_names_of_the_public_face() {
        for (name, kind) in [
            ("message", EventKind::Message),
            ("action", EventKind::Action),
            ("created", EventKind::Created),
            ("participant_added", EventKind::ParticipantAdded),
        ] {
            assert_eq!(kind_name(kind), name);
            assert_eq!(kind_from_name(name).unwrap(), kind);
        }
        assert!(kind_from_name("unspecified").is_err() && kind_from_name("dance").is_err());
    }

    #[test]
    fn nothing_that_was_written_moves_the_cursor_of_a_terminal() {
        assert_eq!(harmless("a\x1b[2Jb\u{7}\u{9b}é"), "a\\u{1b}[2Jb\\u{7}\\u{9b}é");
    }

    #[test]
    fn stamps_are_shown_as_a_time_of_day() {
        assert_eq!(time_of_day(1_700_000_000_123), "22:13:20");
    }
}
