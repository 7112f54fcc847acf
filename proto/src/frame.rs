//! Client frames: what a device and a gateway say to each other on a QUIC stream, a WebTransport stream or in
//! WebSocket messages. A decoder never allocates beyond its limit and never reads past a frame.
//!
//! ```text
//! u32 LE length of what follows │ u8 kind │ protobuf message
//! ```
//! A receiver skips an unknown kind of 128 or more and refuses an unknown kind below.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;
use thiserror::Error;

use crate::v1;

/// The protocol version that this build speaks; [`MIN_VERSION`] is the oldest that it still accepts.
pub const VERSION: u32 = 1;
/// The oldest version that this build accepts.
pub const MIN_VERSION: u32 = 1;
/// Default limit of one frame; files do not travel in messages.
pub const DEFAULT_MAX_BYTES: usize = 64 * 1024;
/// Limit of a `Resume`: a cursor vector of 10,000 conversations.
pub const MAX_RESUME_BYTES: usize = 3 * 1024 * 1024;
/// Length field and kind.
pub const PREFIX_BYTES: usize = 5;
/// Kinds from here on may be skipped by who does not know them.
pub const FIRST_SKIPPABLE: u8 = 128;

/// Bytes that are no frame: the sender's fault; the connection cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadFrame {
    /// Longer than the limit of its kind.
    #[error("frame of {bytes} bytes is over the limit of {limit}")]
    TooLarge {
        /// What the length field says.
        bytes: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A length of zero: a frame has at least its kind.
    #[error("frame without a kind")]
    Empty,
    /// A kind that must be known and is not.
    #[error("frame of the unknown kind {0}")]
    UnknownKind(u8),
    /// The message is no protobuf of its kind.
    #[error("frame of kind {0} cannot be decoded")]
    Malformed(u8),
}

macro_rules! frames {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $kind:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)]
        pub enum $name { $($variant(v1::$variant),)* }

        impl $name {
            /// The kind byte.
            pub fn kind(&self) -> u8 {
                match self { $(Self::$variant(_) => $kind,)* }
            }

            /// Appends the whole frame.
            pub fn encode(&self, out: &mut BytesMut) {
                let len = match self { $(Self::$variant(message) => message.encoded_len(),)* };
                out.reserve(PREFIX_BYTES + len);
                out.put_u32_le(len as u32 + 1);
                out.put_u8(self.kind());
                match self { $(Self::$variant(message) => message.encode_raw(out),)* }
            }

            /// The whole frame as bytes of its own.
            pub fn to_bytes(&self) -> Bytes {
                let mut out = BytesMut::new();
                self.encode(&mut out);
                out.freeze()
            }

            /// Decodes one message; `None` for a kind that may be skipped.
            pub fn decode(kind: u8, message: Bytes) -> Result<Option<Self>, BadFrame> {
                match kind {
                    $($kind => v1::$variant::decode(message).map(|m| Some(Self::$variant(m))).map_err(|_| BadFrame::Malformed(kind)),)*
                    FIRST_SKIPPABLE.. => Ok(None),
                    _ => Err(BadFrame::UnknownKind(kind)),
                }
            }
        }

        $(impl From<v1::$variant> for $name {
            fn from(message: v1::$variant) -> Self {
                Self::$variant(message)
            }
        })*
    };
}

frames!(
    /// From a device to a gateway.
    ClientFrame {
        Hello = 1,
        Resume = 2,
        Subscribe = 3,
        Unsubscribe = 4,
        Send = 5,
        MoveCursors = 6,
        Credit = 7,
        Ping = 8,
        Request = 9,
        SendRun = 10,
    }
);

frames!(
    /// From a gateway to a device.
    ServerFrame {
        Welcome = 64,
        Events = 65,
        ConversationState = 66,
        UpToDate = 67,
        Sent = 68,
        SendRefused = 69,
        Response = 70,
        CursorsMoved = 71,
        GoAway = 72,
        Fatal = 73,
        Pong = 74,
    }
);

/// The longest frame of a kind that may come, its kind byte included.
pub fn limit(kind: u8, max_frame_bytes: usize) -> usize {
    match kind {
        2 => MAX_RESUME_BYTES.max(max_frame_bytes),
        _ => max_frame_bytes,
    }
}

/// Takes one whole frame off the front of `buffer`, if it is there: (kind, message). The length is checked against
/// the limit of its kind before anything is allocated for it.
pub fn split(buffer: &mut BytesMut, max_frame_bytes: usize) -> Result<Option<(u8, Bytes)>, BadFrame> {
    if buffer.len() < 4 {
        return Ok(None);
    }
    let len = (&buffer[..4]).get_u32_le() as usize;
    if len == 0 {
        return Err(BadFrame::Empty);
    }
    let Some(&kind) = buffer.get(4) else {
        return check_length(len, limit(2, max_frame_bytes)).map(|()| None);
    };
    check_length(len, limit(kind, max_frame_bytes))?;
    if buffer.len() < 4 + len {
        return Ok(None);
    }
    let mut frame = buffer.split_to(4 + len);
    frame.advance(PREFIX_BYTES);
    Ok(Some((kind, frame.freeze())))
}

fn check_length(bytes: usize, limit: usize) -> Result<(), BadFrame> {
    if bytes > limit { Err(BadFrame::TooLarge { bytes, limit }) } else { Ok(()) }
}

/// The version that both sides speak: the highest in common.
pub fn negotiate(min_version: u32, max_version: u32) -> Option<u32> {
    let version = max_version.min(VERSION);
    (version >= MIN_VERSION && version >= min_version).then_some(version)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_come_out_as_they_went_in_however_they_are_cut() {
        let frames = [
            ClientFrame::Send(v1::Send {
                conversation: "c".into(),
                send_no: 1,
                body: "hi".into(),
                ..Default::default()
            }),
            ClientFrame::Ping(v1::Ping { token: 7 }),
            ClientFrame::Resume(v1::Resume::default()),
        ];
        let mut wire = BytesMut::new();
        frames.iter().for_each(|f| f.encode(&mut wire));
        for step in 1..wire.len() {
            let (mut buffer, mut seen) = (BytesMut::new(), Vec::new());
            for chunk in wire.chunks(step) {
                buffer.extend_from_slice(chunk);
                while let Some((kind, message)) = split(&mut buffer, DEFAULT_MAX_BYTES).unwrap() {
                    seen.push(ClientFrame::decode(kind, message).unwrap().unwrap());
                }
            }
            assert_eq!(seen, frames);
        }
    }

    #[test]
    fn a_huge_length_is_refused_before_its_bytes_come() {
        let mut wire = BytesMut::from(&[0xff, 0xff, 0xff, 0xff][..]);
        assert!(matches!(split(&mut wire, DEFAULT_MAX_BYTES), Err(BadFrame::TooLarge { .. })));
        let mut wire = BytesMut::from(&[0x01, 0x00, 0x02, 0x00, 5][..]);
        assert!(matches!(split(&mut wire, DEFAULT_MAX_BYTES), Err(BadFrame::TooLarge { .. })));
        let mut wire = BytesMut::from(&[0, 0, 0, 0][..]);
        assert_eq!(split(&mut wire, DEFAULT_MAX_BYTES), Err(BadFrame::Empty));
    }

    #[test]
    fn unknown_kinds_are_skipped_or_refused() {
        assert_eq!(ClientFrame::decode(200, Bytes::new()), Ok(None));
        assert_eq!(ClientFrame::decode(63, Bytes::new()), Err(BadFrame::UnknownKind(63)));
        assert_eq!(ServerFrame::decode(65, Bytes::from_static(&[0xff])), Err(BadFrame::Malformed(65)));
    }

    #[test]
    fn unknown_fields_do_not_disturb() {
        let mut message = v1::Ping { token: 7 }.encode_to_vec();
        message.extend_from_slice(&[0xfa, 0x7f, 3, b'n', b'e', b'w']);
        assert_eq!(ClientFrame::decode(8, message.into()), Ok(Some(ClientFrame::Ping(v1::Ping { token: 7 }))));
    }

    #[test]
    fn versions_are_negotiated() {
        assert_eq!(negotiate(1, 1), Some(1));
        assert_eq!(negotiate(1, 9), Some(VERSION));
        assert_eq!(negotiate(VERSION + 1, VERSION + 3), None);
        assert_eq!(negotiate(0, 0), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_without_a_panic(bytes: Vec<u8>) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some((kind, message))) = split(&mut buffer, DEFAULT_MAX_BYTES) {
                let _ = ClientFrame::decode(kind, message.clone());
                let _ = ServerFrame::decode(kind, message);
            }
        }
    }
}
