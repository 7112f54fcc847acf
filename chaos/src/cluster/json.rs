//! What the binary prints with `--json`, read into the oracle's terms. Must never guess: a line that is not as the public
//! face promises is an error.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use serde::Deserialize;
use stentor_client::EventKind;

use super::ClusterError;
use crate::oracle::{Answer, Event, Item, Outcome};

/// An answer to one line of `send`.
#[derive(Debug, Deserialize)]
pub(super) struct Acknowledgement {
    /// From 1.
    pub(super) line: usize,
    seq: Option<u64>,
    #[serde(default)]
    repeat: bool,
    error: Option<Refusal>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    reason: String,
}

impl Acknowledgement {
    pub(super) fn outcome(self) -> Outcome<Answer> {
        match (self.seq, self.error) {
            (Some(seq), None) => Outcome::Acknowledged(Answer::Event { seq, repeat: self.repeat }),
            (_, Some(refusal)) => Outcome::Refused(refusal.reason.into()),
            (None, None) => Outcome::Unknown,
        }
    }
}

#[derive(Debug, Deserialize)]
struct EventLine {
    seq: u64,
    kind: String,
    sender: String,
    device: String,
    client_id: String,
    body: Option<String>,
    body_base64: Option<String>,
    stamp_ms: u64,
    #[serde(default)]
    subject: String,
}

#[derive(Debug, Deserialize)]
struct Stretch {
    from: u64,
    to: u64,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
#[allow(clippy::large_enum_variant, reason = "lives for one line")]
enum Line {
    Hidden { hidden: Stretch },
    Event(EventLine),
}

/// One line of `send`.
pub(super) fn acknowledgement(line: &str) -> Result<Acknowledgement, ClusterError> {
    serde_json::from_str(line).map_err(|error| unreadable("send", line, &error))
}

/// One line of `history` or `tail`.
pub(super) fn item(line: &str) -> Result<Item, ClusterError> {
    let parsed: Line = serde_json::from_str(line).map_err(|error| unreadable("history", line, &error))?;
    let event = match parsed {
        Line::Hidden { hidden: Stretch { from, to } } => return Ok(Item::Hidden { from, to }),
        Line::Event(event) => event,
    };
    let kind = EventKind::from_str_name(&format!("EVENT_KIND_{}", event.kind.to_ascii_uppercase()));
    let kind = kind.ok_or_else(|| unreadable("history", line, &"an unknown kind"))?;
    let body = match (event.body, event.body_base64) {
        (Some(text), None) => text.into_bytes(),
        (None, Some(encoded)) => STANDARD.decode(encoded).map_err(|error| unreadable("history", line, &error))?,
        _ => return Err(unreadable("history", line, &"not one body")),
    };
    Ok(Item::Event(Event {
        seq: event.seq,
        kind,
        sender: event.sender.into(),
        device: event.device.into(),
        client_id: event.client_id.into(),
        subject: event.subject.into(),
        body: Bytes::from(body),
        stamp_ms: event.stamp_ms,
    }))
}

fn unreadable(command: &str, line: &str, why: &dyn std::fmt::Display) -> ClusterError {
    ClusterError::Output { command: command.into(), why: format!("{why}: {line}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_the_public_face_promises_them() {
        let first = acknowledgement(r#"{"line":7,"client_id":"d-7","seq":9,"stamp_ms":1,"repeat":true}"#).unwrap();
        assert_eq!(first.line, 7);
        assert_eq!(first.outcome(), Outcome::Acknowledged(Answer::Event { seq: 9, repeat: true }));
        let refused = r#"{"line":1,"client_id":null,"error":{"reason":"EMPTY_BODY","message":"","retryable":false}}"#;
        assert_eq!(acknowledgement(refused).unwrap().outcome(), Outcome::Refused("EMPTY_BODY".into()));
        let hidden = item(r#"{"hidden":{"from":1,"to":4,"reason":"before_join"}}"#).unwrap();
        assert_eq!(hidden, Item::Hidden { from: 1, to: 4 });
        let line = r#"{"seq":3,"conversation":"c","kind":"message","sender":"ann","device":"d","client_id":"d-1",
            "content_type":"text/plain","body_base64":"6Q==","sent_at_ms":1,"stamp_ms":2}"#;
        let Item::Event(event) = item(line).unwrap() else { unreachable!() };
        assert_eq!((event.seq, event.kind, &event.body[..]), (3, EventKind::Message, &b"\xe9"[..]));
        assert!(item(r#"{"seq":3}"#).is_err() && item(&line.replace("message", "dance")).is_err());
    }
}
