//! What an application sends and what it gets. Must never lose a byte of a body: bodies are bytes, not text.

use std::{fmt, ops::Deref};

use bytes::Bytes;
use stentor_proto::{
    ids::{ClientId, ConversationId, Epoch, SendNo, Seq, StampMs, Version},
    record,
    v1::{self, ConversationKind, EventKind, HiddenReason, Refusal, Role},
};

use crate::StoreError;

/// A message on its way out.
#[derive(Debug, Clone)]
pub struct Message {
    /// `Message` or `Action`.
    pub kind: EventKind,
    /// Empty means `text/plain; charset=utf-8`.
    pub content_type: String,
    /// The content; at least one byte.
    pub body: Bytes,
    /// A key of the caller's own: a later send under the same key returns the first result.
    pub client_id: Option<ClientId>,
    /// With `client_id`: the clock at the first attempt, part of every retry; 0 if unknown.
    pub first_try_ms: u64,
    /// The sender's clock, for readers; 0 is filled in when the message is sent.
    pub sent_at_ms: u64,
    /// Refused unless the conversation has this version.
    pub expect_version: Option<Version>,
    /// Refused unless the conversation has this encryption epoch.
    pub expect_epoch: Option<Epoch>,
}

impl Message {
    /// Plain text.
    pub fn text(text: impl Into<String>) -> Self {
        Self::bytes(String::new(), text.into())
    }

    /// Something done rather than said ("/me waves").
    pub fn action(text: impl Into<String>) -> Self {
        Self { kind: EventKind::Action, ..Self::text(text) }
    }

    /// Any bytes with their content type.
    pub fn bytes(content_type: impl Into<String>, body: impl Into<Bytes>) -> Self {
        Self {
            kind: EventKind::Message,
            content_type: content_type.into(),
            body: body.into(),
            client_id: None,
            first_try_ms: 0,
            sent_at_ms: 0,
            expect_version: None,
            expect_epoch: None,
        }
    }

    /// With a key of the caller's own.
    pub fn client_id(self, client_id: ClientId) -> Self {
        Self { client_id: Some(client_id), ..self }
    }

    pub(crate) fn into_send(self, now_ms: u64) -> v1::Send {
        v1::Send {
            client_id: self.client_id.map(|id| id.as_str().to_owned()).unwrap_or_default(),
            first_try_ms: self.first_try_ms,
            kind: self.kind as i32,
            content_type: self.content_type,
            sent_at_ms: if self.sent_at_ms == 0 { now_ms } else { self.sent_at_ms },
            body: self.body,
            expect_version: self.expect_version.map(|v| v.0),
            expect_epoch: self.expect_epoch.map(|e| e.0),
            ..Default::default()
        }
    }
}

/// A send that became an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// The event's place in its conversation.
    pub seq: Seq,
    /// The event's time.
    pub stamp_ms: StampMs,
    /// An earlier attempt had been accepted already; this is its result.
    pub repeat: bool,
    /// The device's own count of it; 0 if it took none.
    pub send_no: SendNo,
}

/// Text that shares the memory of what it came in. Bytes that are no UTF-8 read as empty.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Text(Bytes);

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl AsRef<str> for Text {
    fn as_ref(&self) -> &str {
        self
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self)
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

impl PartialEq<str> for Text {
    fn eq(&self, other: &str) -> bool {
        *self.0 == *other.as_bytes()
    }
}

impl PartialEq<&str> for Text {
    fn eq(&self, other: &&str) -> bool {
        *self == **other
    }
}

/// One event of a conversation; its bytes were checked against the checksums made where it entered the cluster. Its
/// parts share the memory of the frame that brought them: an application that keeps many should copy what it keeps.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its place.
    pub seq: Seq,
    /// What it is.
    pub kind: EventKind,
    /// Whose doing.
    pub sender: Text,
    /// From which device; empty for a call without one.
    pub device: Text,
    /// That device's count of it; 0 for what was not a numbered send.
    pub send_no: SendNo,
    /// The sender's own key, or `<device>-<send_no>`, or empty for what was not sent by a device.
    pub client_id: Text,
    /// What the body is.
    pub content_type: Text,
    /// The content, as sent.
    pub body: Bytes,
    /// What the sender's clock said; good for showing, never for order.
    pub sent_at_ms: u64,
    /// The cluster's time of it.
    pub stamp_ms: StampMs,
    /// The participant that was added, removed or changed.
    pub subject: Text,
    /// The subject's role from here on.
    pub role: Role,
    /// Of a `created` event.
    pub conversation_kind: ConversationKind,
    /// The conversation's version after it.
    pub version: Version,
    /// The conversation's encryption epoch.
    pub epoch: Epoch,
}

/// What `content_type` reads as when the sender gave none.
const PLAIN_TEXT: &[u8] = b"text/plain; charset=utf-8";

impl std::convert::From<record::Event> for Event {
    fn from(event: record::Event) -> Self {
        let header = event.header;
        let (kind, role, conversation_kind) = (header.kind(), header.role(), header.conversation_kind());
        let client_id = match (&header.client_id[..], header.send_no) {
            ([], 0) => Bytes::new(),
            ([], n) => format!("{}-{n}", Text(header.device.clone())).into(),
            _ => header.client_id,
        };
        let has_content = matches!(kind, EventKind::Message | EventKind::Action);
        let content_type = if header.content_type.is_empty() && has_content {
            Bytes::from_static(PLAIN_TEXT)
        } else {
            header.content_type
        };
        Self {
            seq: Seq(header.seq),
            kind,
            sender: Text(header.sender),
            device: Text(header.device),
            send_no: SendNo(header.send_no),
            client_id: Text(client_id),
            content_type: Text(content_type),
            body: event.body,
            sent_at_ms: header.sent_at_ms,
            stamp_ms: StampMs(header.stamp_ms),
            subject: Text(header.subject),
            role,
            conversation_kind,
            version: Version(header.version),
            epoch: Epoch(header.epoch),
        }
    }
}

/// A stretch of a conversation that this reader does not get, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hidden {
    /// Its first seq.
    pub from: Seq,
    /// Its last seq.
    pub to: Seq,
    /// Why.
    pub reason: HiddenReason,
}

impl std::convert::From<v1::Hidden> for Hidden {
    fn from(hidden: v1::Hidden) -> Self {
        Self { from: Seq(hidden.from), to: Seq(hidden.to), reason: hidden.reason() }
    }
}

/// What comes to an application, in order. Per conversation, `Event` and `Hidden` together are dense from where the
/// subscription began: nothing is missing and nothing comes twice.
#[derive(Debug)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant, reason = "events are the rule; a box would cost each of them an allocation")]
pub enum Incoming {
    /// The next event of a conversation.
    Event {
        /// Which conversation.
        conversation: ConversationId,
        /// The event.
        event: Event,
    },
    /// The next stretch of a conversation, which this reader does not get.
    Hidden {
        /// Which conversation.
        conversation: ConversationId,
        /// The stretch.
        hidden: Hidden,
    },
    /// Where a conversation stands; comes when its stream begins. A hint: may be left out when the application is far
    /// behind.
    State {
        /// Which conversation.
        conversation: ConversationId,
        /// The last seq that the reader may see.
        head: Seq,
        /// The cursor that the server keeps for this device.
        delivered: Seq,
        /// The user's read cursor.
        read: Seq,
    },
    /// The server has these cursor moves now, or refuses them. A hint like `State`.
    CursorsMoved {
        /// Of this device: conversation and seq.
        delivered: Vec<(ConversationId, Seq)>,
        /// Of the user.
        read: Vec<(ConversationId, Seq)>,
        /// Changed nothing, and why.
        refused: Vec<(ConversationId, Refusal)>,
    },
    /// Everything that moved while the device was away has come.
    UpToDate,
    /// No more comes of this conversation (removed, unknown).
    Ended {
        /// Which conversation.
        conversation: ConversationId,
        /// Why.
        refusal: Refusal,
    },
    /// A gateway took the session; nothing was missed.
    Connected {
        /// Its name.
        gateway: String,
    },
    /// The connection is gone; the client connects again by itself.
    Disconnected {
        /// Why.
        reason: String,
    },
    /// The cursor store failed; the client goes on, but a restart may deliver again what was delivered.
    StoreFailed(StoreError),
}

/// Where a subscription begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// After the delivered cursor of the cursor store; everything, if it has none.
    Cursor,
    /// After this seq; `Seq(0)` is everything.
    Seq(Seq),
    /// After the head, as it is when the subscription is taken.
    Head,
}
