//! Every key of the `state` instance in one place (docs/storage.md, "Keys"). Final: a cluster's data lies under these.
//! Every key of a conversation or a user starts with (slot, app), so that splitting a shard copies key ranges and two
//! apps can never meet. Integers are big-endian, so that byte order is number order.
//!
//! ```text
//! entity key   u16 slot │ u8 app_len │ app │ u8 class │ u16 id_len │ id │ u8 row kind │ sub key
//! shard key    u16 SHARD_AREA │ u32 shard │ u8 row kind
//! ```

use std::fmt;

use stentor_proto::ids::{Seq, ShardId, Slot};

/// Not a slot: rows that belong to a replica and not to its conversations. Slots end at 16,384.
pub const SHARD_AREA: u16 = 0x8000;
/// Not a slot: where the meta shard keeps its rows.
pub const META_AREA: u16 = 0x7fff;

/// Whose rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// A conversation.
    Conversation = 0x10,
    /// A user.
    User = 0x20,
    /// The meta shard's only entity.
    Meta = 0x30,
}

/// Which row of an entity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// `ConversationRow`; no sub key. Stays resident in memory.
    Conversation = 0x01,
    /// `ParticipantRow`; sub key: user.
    Participant = 0x02,
    /// `SendStateRow`; sub key: u8 user_len, user, device.
    SendState = 0x03,
    /// `ClientKeyRow`; sub key: u8 scope_len, scope, client id.
    ClientKey = 0x04,
    /// `ClientScopeRow`; sub key: scope.
    ClientScope = 0x05,
    /// `ClientOrderRow`; sub key: u8 scope_len, scope, u64 order.
    ClientOrder = 0x06,
    /// A block of events; sub key: u64 first seq. Not a protobuf: see raft-store.
    Block = 0x07,
    /// `OutboxRow`; sub key: u64 item, which is the membership event's seq, then user.
    Outbox = 0x08,
    /// `UserRow`; no sub key.
    User = 0x21,
    /// `DeviceRow`; sub key: device.
    Device = 0x22,
    /// `UserConversationRow`; sub key: conversation.
    UserConversation = 0x23,
    /// `CursorRow` of a device (delivered); sub key: u8 device_len, device, conversation.
    Delivered = 0x24,
    /// `CursorRow` of the user (read); sub key: conversation.
    Read = 0x25,
    /// `ClusterRow`; no sub key.
    Cluster = 0x41,
    /// `AppRow`; sub key: app.
    App = 0x42,
    /// `BrokerRow`; sub key: u32 broker.
    Broker = 0x43,
    /// `PlacementRow`; no sub key.
    Placement = 0x44,
    /// `AppliedRow` in the shard area.
    Applied = 0x61,
}

impl Kind {
    /// From the byte in a key.
    pub fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        [
            Conversation,
            Participant,
            SendState,
            ClientKey,
            ClientScope,
            ClientOrder,
            Block,
            Outbox,
            User,
            Device,
            UserConversation,
            Delivered,
            Read,
            Cluster,
            App,
            Broker,
            Placement,
            Applied,
        ]
        .into_iter()
        .find(|&k| k as u8 == byte)
    }
}

/// The part of a key that all rows of one entity share.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entity(Box<[u8]>);

impl Entity {
    /// The rows of a conversation. The ids must have been checked.
    pub fn conversation(app: &str, conversation: &str) -> Self {
        Self::new(Slot::of(app, conversation).0, app, Class::Conversation, conversation)
    }

    /// The rows of a user. The ids must have been checked.
    pub fn user(app: &str, user: &str) -> Self {
        Self::new(Slot::of(app, user).0, app, Class::User, user)
    }

    /// The rows of the meta shard.
    pub fn meta() -> Self {
        Self::new(META_AREA, "", Class::Meta, "")
    }

    fn new(slot: u16, app: &str, class: Class, id: &str) -> Self {
        let mut key = Vec::with_capacity(6 + app.len() + id.len());
        key.extend_from_slice(&slot.to_be_bytes());
        key.push(app.len() as u8);
        key.extend_from_slice(app.as_bytes());
        key.push(class as u8);
        key.extend_from_slice(&(id.len() as u16).to_be_bytes());
        key.extend_from_slice(id.as_bytes());
        Self(key.into())
    }

    /// The key's bytes: a prefix of all of its rows' keys.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// A row's key.
    pub fn key(&self, kind: Kind, sub: &[&[u8]]) -> RowKey {
        let mut key = Vec::with_capacity(self.0.len() + 1 + sub.iter().map(|s| s.len()).sum::<usize>());
        key.extend_from_slice(&self.0);
        key.push(kind as u8);
        sub.iter().for_each(|s| key.extend_from_slice(s));
        RowKey(key.into())
    }

    /// The header row of a conversation.
    pub fn head(&self) -> RowKey {
        self.key(Kind::Conversation, &[])
    }

    /// A participant's row.
    pub fn participant(&self, user: &str) -> RowKey {
        self.key(Kind::Participant, &[user.as_bytes()])
    }

    /// A device's send state.
    pub fn send_state(&self, user: &str, device: &str) -> RowKey {
        self.key(Kind::SendState, &[&[user.len() as u8], user.as_bytes(), device.as_bytes()])
    }

    /// The block of events that starts with `first`.
    pub fn block(&self, first: Seq) -> RowKey {
        self.key(Kind::Block, &[&first.0.to_be_bytes()])
    }

    /// A device's delivered cursor in a conversation.
    pub fn delivered(&self, device: &str, conversation: &str) -> RowKey {
        self.key(Kind::Delivered, &[&[device.len() as u8], device.as_bytes(), conversation.as_bytes()])
    }
}

impl fmt::Debug for Entity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

/// A whole key of the `state` instance.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey(Box<[u8]>);

impl RowKey {
    /// The row that says how far a replica has applied; written last in every checkpoint.
    pub fn applied(shard: ShardId) -> Self {
        let mut key = SHARD_AREA.to_be_bytes().to_vec();
        key.extend_from_slice(&shard.0.to_be_bytes());
        key.push(Kind::Applied as u8);
        Self(key.into())
    }

    /// From stored bytes.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        Self(bytes.into())
    }

    /// The key's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Which row it is, read from the bytes alone.
    pub fn kind(&self) -> Option<Kind> {
        Parts::of(&self.0).map(|p| p.kind)
    }
}

impl fmt::Debug for RowKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.escape_ascii())
    }
}

impl std::borrow::Borrow<[u8]> for RowKey {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// A key taken apart; borrowed from its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parts<'a> {
    /// The slot, or one of the areas.
    pub area: u16,
    /// The app; empty in the shard area.
    pub app: &'a [u8],
    /// The entity's id; empty in the shard area.
    pub id: &'a [u8],
    /// Which row.
    pub kind: Kind,
    /// What follows the kind.
    pub sub: &'a [u8],
}

impl<'a> Parts<'a> {
    /// `None` for bytes that are no key of ours.
    pub fn of(key: &'a [u8]) -> Option<Self> {
        let (area, rest) = key.split_first_chunk::<2>()?;
        let area = u16::from_be_bytes(*area);
        if area == SHARD_AREA {
            let (kind, sub) = rest.get(4..)?.split_first()?;
            return Some(Self { area, app: &[], id: &[], kind: Kind::from_byte(*kind)?, sub });
        }
        let (&app_len, rest) = rest.split_first()?;
        let (app, rest) = rest.split_at_checked(app_len.into())?;
        let (_class, rest) = rest.split_first()?;
        let (id_len, rest) = rest.split_first_chunk::<2>()?;
        let (id, rest) = rest.split_at_checked(u16::from_be_bytes(*id_len).into())?;
        let (&kind, sub) = rest.split_first()?;
        Some(Self { area, app, id, kind: Kind::from_byte(kind)?, sub })
    }
}

/// The smallest key that is greater than every key with this prefix: the end of a range scan.
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    // Only a prefix of nothing but 0xff gets here, and no key of ours starts so.
    vec![0xff; prefix.len() + 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_apart_as_they_were_made() {
        let entity = Entity::conversation("app", "general");
        let key = entity.send_state("ann", "phone");
        let parts = Parts::of(key.as_bytes()).unwrap();
        assert_eq!((parts.app, parts.id, parts.kind), (&b"app"[..], &b"general"[..], Kind::SendState));
        assert_eq!(parts.sub, b"\x03annphone");
        assert_eq!(RowKey::applied(ShardId(5)).kind(), Some(Kind::Applied));
    }

    #[test]
    fn no_key_of_one_app_lies_among_anothers() {
        // Length prefixes: "ab" + "c" and "a" + "bc" differ before their ids begin.
        assert_ne!(Entity::new(1, "ab", Class::Conversation, "c"), Entity::new(1, "a", Class::Conversation, "bc"));
    }

    #[test]
    fn ranges_end_after_their_prefix() {
        assert_eq!(prefix_end(&[1, 2]), [1, 3]);
        assert_eq!(prefix_end(&[1, 0xff]), [2]);
    }
}
