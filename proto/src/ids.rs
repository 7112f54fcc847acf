//! Identifiers and numbers, one type each, with checked constructors. Nothing here may accept an id that the storage
//! keys (docs/storage.md, "Keys") could not hold or that two apps could share.

use std::{fmt, sync::Arc};

use thiserror::Error;

/// Slots are fixed for ever (docs/architecture.md, "Slots and shards").
pub const SLOTS: u16 = 16_384;
/// Longest app name, in bytes.
pub const MAX_APP_BYTES: usize = 64;
/// Longest user id, in bytes.
pub const MAX_USER_BYTES: usize = 128;
/// Longest device id, in bytes.
pub const MAX_DEVICE_BYTES: usize = 64;
/// Longest conversation id, in bytes: a direct one names both of its users.
pub const MAX_CONVERSATION_BYTES: usize = 2 * MAX_USER_BYTES + "direct//".len();
/// Longest client id (idempotency key), in bytes.
pub const MAX_CLIENT_ID_BYTES: usize = 64;

/// An identifier that cannot be used: the caller's fault, nothing changed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what} {problem}")]
pub struct BadId {
    /// Which kind of id: "user id", "conversation id"…
    pub what: &'static str,
    /// What is wrong with it, in words.
    pub problem: &'static str,
}

fn check<'a>(what: &'static str, id: &'a [u8], max: usize, slash: bool) -> Result<&'a str, BadId> {
    let bad = |problem| Err(BadId { what, problem });
    if id.is_empty() {
        return bad("is empty");
    }
    if id.len() > max {
        return bad("is too long");
    }
    let Ok(text) = std::str::from_utf8(id) else { return bad("is not UTF-8") };
    if text.chars().any(char::is_control) {
        return bad("has a control character");
    }
    if !slash && text.contains('/') {
        return bad("has a slash");
    }
    Ok(text)
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal, $max:expr, $slash:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks and copies an id; cheap to clone afterwards.
            pub fn new(id: impl AsRef<[u8]>) -> Result<Self, BadId> {
                Ok(Self(Self::check(id.as_ref())?.into()))
            }

            /// Checks without copying: for the paths that must not allocate.
            pub fn check(id: &[u8]) -> Result<&str, BadId> {
                check($what, id, $max, $slash)
            }

            /// The id's text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

text_id!(
    /// A tenant's name.
    AppId, "app", MAX_APP_BYTES, false
);
text_id!(
    /// An account of an app. Case-sensitive; any printable text except `/`.
    UserId, "user id", MAX_USER_BYTES, false
);
text_id!(
    /// One installation of a client of a user.
    DeviceId, "device id", MAX_DEVICE_BYTES, false
);
text_id!(
    /// A conversation of an app; a direct one is `direct/<a>/<b>` with its users in byte order.
    ConversationId, "conversation id", MAX_CONVERSATION_BYTES, true
);
text_id!(
    /// A caller's own idempotency key.
    ClientId, "client id", MAX_CLIENT_ID_BYTES, true
);

/// What every direct conversation's id starts with; nobody may choose such an id.
pub const DIRECT_PREFIX: &str = "direct/";

impl ConversationId {
    /// The one conversation of two users, whoever asks: user ids have no slash, so the text is unambiguous.
    pub fn direct(a: &UserId, b: &UserId) -> Self {
        let (first, second) = if a <= b { (a, b) } else { (b, a) };
        Self(format!("{DIRECT_PREFIX}{first}/{second}").into())
    }

    /// The two users of a direct conversation's id.
    pub fn direct_users(&self) -> Option<(&str, &str)> {
        self.0.strip_prefix(DIRECT_PREFIX)?.split_once('/')
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl From<$inner> for $name {
            fn from(n: $inner) -> Self {
                Self(n)
            }
        }
    };
}

number!(
    /// Dense number of an event in its conversation, from 1; 0 is "before the first".
    Seq(u64)
);
number!(
    /// A device's own count of its sends in one conversation, from 1.
    SendNo(u64)
);
number!(
    /// One of [`SLOTS`] hash buckets of (app, conversation or user).
    Slot(u16)
);
number!(
    /// A Raft group: 0 is the meta shard, data shards count from 1.
    ShardId(u32)
);
number!(
    /// Which configured broker, from 1.
    BrokerId(u32)
);
number!(
    /// The number of a data directory, unchanged by restarts.
    Incarnation(u32)
);
number!(
    /// A session's fencing number.
    SessionNo(u64)
);
number!(
    /// The only time that `apply` sees, in ms since the Unix epoch.
    StampMs(u64)
);
number!(
    /// The version of the rules that `apply` must follow for an entry.
    ApplyLevel(u32)
);
number!(
    /// Raft's term.
    Term(u64)
);
number!(
    /// Raft's log index.
    LogIndex(u64)
);
number!(
    /// The generation of a conversation's encryption group.
    Epoch(u64)
);
number!(
    /// Counts the changes of a conversation's participants and settings.
    Version(u64)
);
number!(
    /// Fences callers whose placement is stale.
    PlacementVersion(u64)
);

/// The meta shard: brokers, placement, apps, signing keys.
pub const META_SHARD: ShardId = ShardId(0);

impl Seq {
    /// The one after.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Slot {
    /// `xxh3_64(app ‖ 0 ‖ id) mod 16,384`, seed 0: conversations and users alike, fixed for ever.
    pub fn of(app: &str, id: &str) -> Self {
        // One buffer on the stack: both ids are bounded, and a longer (never valid) id only loses its tail.
        let mut key = [0u8; MAX_APP_BYTES + 1 + MAX_CONVERSATION_BYTES];
        let app = &app.as_bytes()[..app.len().min(MAX_APP_BYTES)];
        let id = &id.as_bytes()[..id.len().min(MAX_CONVERSATION_BYTES)];
        let len = app.len() + 1 + id.len();
        key[..app.len()].copy_from_slice(app);
        key[app.len() + 1..len].copy_from_slice(id);
        Self((twox_hash::XxHash3_64::oneshot(&key[..len]) % u64::from(SLOTS)) as u16)
    }
}

/// A Raft node id: a broker's data directory, never just the broker, so that a wiped disk is a new voter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ReplicaId {
    /// The broker.
    pub broker: BrokerId,
    /// Its data directory.
    pub incarnation: Incarnation,
}

impl ReplicaId {
    /// As it stands on wires and disks: `broker << 32 | incarnation`.
    pub fn to_u64(self) -> u64 {
        u64::from(self.broker.0) << 32 | u64::from(self.incarnation.0)
    }

    /// The inverse of [`Self::to_u64`].
    pub fn from_u64(n: u64) -> Self {
        Self { broker: BrokerId((n >> 32) as u32), incarnation: Incarnation(n as u32) }
    }
}

impl From<u64> for ReplicaId {
    fn from(n: u64) -> Self {
        Self::from_u64(n)
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.broker, self.incarnation)
    }
}

/// CRC32 over `app ‖ 0 ‖ target`: ties a command and an event to the one place where they belong.
pub fn key_crc(app: &[u8], target: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(app);
    hasher.update(&[0]);
    hasher.update(target);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_pinned_for_ever() {
        // Changing the hash would move every conversation of every existing cluster. Figures from the reference library.
        assert_eq!(Slot::of("demo", "general"), Slot::of("demo", "general"));
        assert_eq!([Slot::of("demo", "general").0, Slot::of("a", "").0, Slot::of("", "a").0], PINNED);
    }

    const PINNED: [u16; 3] = [10129, 15835, 15444];

    #[test]
    fn a_direct_conversation_is_one_whoever_asks() {
        let (ann, bob) = (UserId::new("ann").unwrap(), UserId::new("bob").unwrap());
        assert_eq!(ConversationId::direct(&ann, &bob), ConversationId::direct(&bob, &ann));
        assert_eq!(ConversationId::direct(&bob, &ann).direct_users(), Some(("ann", "bob")));
    }

    #[test]
    fn ids_are_checked() {
        assert!(UserId::new("[Mad]Max|away`^{}").is_ok());
        for bad in ["", "a/b", "a\nb", &"x".repeat(MAX_USER_BYTES + 1)] {
            assert!(UserId::new(bad).is_err(), "{bad:?}");
        }
        assert!(UserId::new([0xff, 0xfe]).is_err());
        assert!(ConversationId::new("direct/ann/bob").is_ok());
    }

    #[test]
    fn replica_ids_round_trip() {
        let id = ReplicaId { broker: BrokerId(3), incarnation: Incarnation(7) };
        assert_eq!(ReplicaId::from_u64(id.to_u64()), id);
    }
}
