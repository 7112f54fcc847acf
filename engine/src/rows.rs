//! The rows that `apply` reads and writes: the seam between the pure engine and whoever stores state (raft-store's
//! write-back cache, the simulation's twin, a map in tests). Must never do IO here: a row that is not in memory is
//! answered with [`NotLoaded`], and the store loads it and applies the same command again.

use std::collections::BTreeMap;

use stentor_proto::{Message, ids::Seq, internal};
use thiserror::Error;

use crate::key::{Entity, Kind, Parts, RowKey};

/// A row's first byte on disk.
pub const FORMAT: u8 = 1;

/// A row that `apply` needs is not in memory. The command has changed nothing: load the row and apply it again.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("row {0:?} is not loaded")]
pub struct NotLoaded(pub RowKey);

/// Stored bytes that are no row: the disk or a newer version is at fault; the replica must stop.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadRow {
    /// Fewer bytes than any row has.
    #[error("row is cut short")]
    Truncated,
    /// Written by a newer version.
    #[error("row has the unknown format {0}")]
    Format(u8),
    /// Bytes changed since they were written, or lie under another key.
    #[error("checksum of a row does not match")]
    Checksum,
    /// The key is none of ours, or the value is not what its key says.
    #[error("row cannot be decoded")]
    Undecodable,
}

macro_rules! row_enum {
    ($($name:ident($message:ident as $stored:ty) = $($kind:ident)|+,)*) => {
        /// A decoded row. Blocks of events are not here: `apply` only appends to them ([`Rows::append_event`]).
        #[derive(Debug, Clone, PartialEq)]
        #[allow(missing_docs)]
        pub enum Row { $($name($stored),)* }

        impl Row {
            fn encoded_len(&self) -> usize {
                match self { $(Self::$name(m) => m.encoded_len(),)* }
            }

            fn encode_message(&self, out: &mut Vec<u8>) {
                match self { $(Self::$name(m) => m.encode_raw(out),)* }
            }

            fn decode_message(kind: Kind, bytes: &[u8]) -> Result<Self, BadRow> {
                match kind {
                    $($(Kind::$kind)|+ => internal::$message::decode(bytes).map(Self::from).map_err(|_| BadRow::Undecodable),)*
                    _ => Err(BadRow::Undecodable),
                }
            }
        }

        $(impl From<internal::$message> for Row {
            fn from(message: internal::$message) -> Self {
                Self::$name(message.into())
            }
        })*
    };
}

// Every row in memory takes as much as the largest: those that are few and large lie in boxes.
row_enum! {
    Conversation(ConversationRow as internal::ConversationRow) = Conversation,
    Participant(ParticipantRow as internal::ParticipantRow) = Participant,
    SendState(SendStateRow as internal::SendStateRow) = SendState,
    ClientKey(ClientKeyRow as internal::ClientKeyRow) = ClientKey,
    ClientScope(ClientScopeRow as internal::ClientScopeRow) = ClientScope,
    ClientOrder(ClientOrderRow as internal::ClientOrderRow) = ClientOrder,
    Outbox(OutboxRow as internal::OutboxRow) = Outbox,
    User(UserRow as internal::UserRow) = User,
    Device(DeviceRow as internal::DeviceRow) = Device,
    UserConversation(UserConversationRow as internal::UserConversationRow) = UserConversation,
    Cursor(CursorRow as internal::CursorRow) = Delivered | Read,
    Cluster(ClusterRow as internal::ClusterRow) = Cluster,
    App(AppRow as internal::AppRow) = App,
    Broker(BrokerRow as Box<internal::BrokerRow>) = Broker,
    Placement(PlacementRow as internal::PlacementRow) = Placement,
    Applied(AppliedRow as Box<internal::AppliedRow>) = Applied,
}

impl Row {
    /// As it stands on disk: `u8 format │ u32 LE CRC32(key ‖ message) │ message`.
    pub fn encode(&self, key: &RowKey) -> Vec<u8> {
        let mut out = Vec::with_capacity(5 + self.encoded_len());
        out.extend_from_slice(&[FORMAT, 0, 0, 0, 0]);
        self.encode_message(&mut out);
        let crc = row_crc(key.as_bytes(), &out[5..]);
        out[1..5].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Checks format and checksum, then decodes by the key's kind.
    pub fn decode(key: &[u8], value: &[u8]) -> Result<Self, BadRow> {
        let (&format, rest) = value.split_first().ok_or(BadRow::Truncated)?;
        if format != FORMAT {
            return Err(BadRow::Format(format));
        }
        let (crc, message) = rest.split_first_chunk::<4>().ok_or(BadRow::Truncated)?;
        if u32::from_le_bytes(*crc) != row_crc(key, message) {
            return Err(BadRow::Checksum);
        }
        let kind = Parts::of(key).ok_or(BadRow::Undecodable)?.kind;
        Self::decode_message(kind, message)
    }

    /// Gives back room that it was grown for and does not use: most rows that stay in memory have one or two of what
    /// they could have many of.
    pub fn shrink(&mut self) {
        match self {
            Self::Participant(row) => row.stays.shrink_to_fit(),
            Self::SendState(row) => row.results.shrink_to_fit(),
            Self::Device(row) => row.superseded.shrink_to_fit(),
            _ => {}
        }
    }

    /// Roughly what it costs in memory, its key apart.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.encoded_len()
    }
}

/// CRC32 of key and message: a row under a wrong key is a damaged row.
pub fn row_crc(key: &[u8], message: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    hasher.update(message);
    hasher.finalize()
}

/// What `apply` works on. One command reads everything that it needs before it writes anything, so that
/// [`NotLoaded`] always means "nothing has changed".
pub trait Rows {
    /// A row; `Ok(None)` when it is known not to exist.
    fn get(&mut self, key: &RowKey) -> Result<Option<&Row>, NotLoaded>;
    /// A row that will be changed in place. Must have been read by [`Self::get`] in the same command.
    fn get_mut(&mut self, key: &RowKey) -> Option<&mut Row>;
    /// Adds or replaces a row.
    fn put(&mut self, key: RowKey, row: Row);
    /// Removes a row.
    fn remove(&mut self, key: &RowKey);
    /// Appends an event record. `seq` is the one after the last appended of this conversation.
    fn append_event(&mut self, conversation: &Entity, seq: Seq, record: &[u8]);
}

/// Rows in a map: tests, models and the simulation's twin. Everything is always loaded.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemoryRows {
    /// All rows but events.
    pub rows: BTreeMap<RowKey, Row>,
    /// All event records.
    pub events: BTreeMap<(Entity, Seq), Vec<u8>>,
}

impl Rows for MemoryRows {
    fn get(&mut self, key: &RowKey) -> Result<Option<&Row>, NotLoaded> {
        Ok(self.rows.get(key))
    }

    fn get_mut(&mut self, key: &RowKey) -> Option<&mut Row> {
        self.rows.get_mut(key)
    }

    fn put(&mut self, key: RowKey, row: Row) {
        self.rows.insert(key, row);
    }

    fn remove(&mut self, key: &RowKey) {
        self.rows.remove(key);
    }

    fn append_event(&mut self, conversation: &Entity, seq: Seq, record: &[u8]) {
        self.events.insert((conversation.clone(), seq), record.to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_as_large_as_a_head_and_not_as_the_largest_of_them() {
        assert!(size_of::<Row>() <= 80, "{}", size_of::<Row>());
        assert_eq!(size_of::<Option<Option<Row>>>(), size_of::<Row>());
    }

    #[test]
    fn every_flipped_bit_of_a_row_is_found() {
        let key = Entity::conversation("a", "c").head();
        let row = Row::from(internal::ConversationRow { next_seq: 9, participants: 2, ..Default::default() });
        let value = row.encode(&key);
        assert_eq!(Row::decode(key.as_bytes(), &value), Ok(row));
        for bit in 0..value.len() * 8 {
            let mut bytes = value.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Row::decode(key.as_bytes(), &bytes).is_err(), "bit {bit}");
        }
        assert_eq!(Row::decode(Entity::conversation("a", "d").head().as_bytes(), &value), Err(BadRow::Checksum));
    }
}
