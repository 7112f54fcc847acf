//! Every key of the log instance, and the small values beside the entries (docs/storage.md, "Log keys").
//! Integers are big-endian. Must never let two shards share a prefix.
//!
//! ```text
//! shard key   u32 shard │ u8 kind │ u64 index (entries only)
//! position    u32 0xffff_ffff │ u8 0
//! small value u8 format = 1 │ u32 LE CRC32(key ‖ bytes) │ bytes
//! ```

use std::ops::Range;

use stentor_engine::rows::row_crc;
use stentor_proto::{Message, ids::ShardId};

/// The only format of small values so far.
const FORMAT: u8 = 1;

/// What stands under a shard's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum LogKind {
    /// The shard's slots: that it exists here.
    Slots = 0x01,
    /// The vote.
    Vote = 0x02,
    /// The last purged log id.
    Purged = 0x03,
    /// The last noted committed log id.
    Committed = 0x04,
    /// A log entry.
    Entry = 0x10,
}

/// Counts the batches of the WAL thread.
pub(crate) const POSITION: [u8; 5] = [0xff, 0xff, 0xff, 0xff, 0];

/// A small value's key.
pub(crate) fn small(shard: ShardId, kind: LogKind) -> [u8; 5] {
    let [a, b, c, d] = shard.0.to_be_bytes();
    [a, b, c, d, kind as u8]
}

/// Whether it is the key of a vote.
pub(crate) fn is_vote(key: &[u8]) -> bool {
    matches!(key, [_, _, _, _, kind] if *kind == LogKind::Vote as u8)
}

/// An entry's key.
pub(crate) fn entry(shard: ShardId, index: u64) -> [u8; 13] {
    let mut key = [0; 13];
    key[..5].copy_from_slice(&small(shard, LogKind::Entry));
    key[5..].copy_from_slice(&index.to_be_bytes());
    key
}

/// The index in an entry's key, if it is one of this shard.
pub(crate) fn index_of(shard: ShardId, key: &[u8]) -> Option<u64> {
    let rest = key.strip_prefix(&small(shard, LogKind::Entry)[..])?;
    Some(u64::from_be_bytes(rest.try_into().ok()?))
}

/// The shard whose key this is; `None` for the position.
pub(crate) fn shard_of(key: &[u8]) -> Option<ShardId> {
    let (shard, _) = key.split_first_chunk::<4>()?;
    if key == POSITION { None } else { Some(ShardId(u32::from_be_bytes(*shard))) }
}

/// A small value.
pub(crate) fn seal(key: &[u8], bytes: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(5 + bytes.len());
    value.push(FORMAT);
    value.extend_from_slice(&row_crc(key, bytes).to_le_bytes());
    value.extend_from_slice(bytes);
    value
}

/// Checks a small value and takes it apart.
pub(crate) fn unseal<'a>(key: &[u8], value: &'a [u8]) -> Result<&'a [u8], String> {
    let bad = |what: String| format!("value of log key {}: {what}", key.escape_ascii());
    let (&format, rest) = value.split_first().ok_or_else(|| bad("is empty".into()))?;
    if format != FORMAT {
        return Err(bad(format!("has the unknown format {format}")));
    }
    let (crc, bytes) = rest.split_first_chunk::<4>().ok_or_else(|| bad("is cut short".into()))?;
    if u32::from_le_bytes(*crc) != row_crc(key, bytes) {
        return Err(bad("its checksum does not match".into()));
    }
    Ok(bytes)
}

/// A small value that is a protobuf.
pub(crate) fn unseal_message<M: Message + Default>(key: &[u8], value: &[u8]) -> Result<M, String> {
    M::decode(unseal(key, value)?).map_err(|_| format!("value of log key {} cannot be decoded", key.escape_ascii()))
}

/// A shard's slots as a small value's bytes.
pub(crate) fn slots_bytes(slots: &Range<u16>) -> [u8; 4] {
    let ([a, b], [c, d]) = (slots.start.to_be_bytes(), slots.end.to_be_bytes());
    [a, b, c, d]
}

/// The inverse of [`slots_bytes`].
pub(crate) fn slots_from(bytes: &[u8]) -> Result<Range<u16>, String> {
    match *bytes {
        [a, b, c, d] => Ok(u16::from_be_bytes([a, b])..u16::from_be_bytes([c, d])),
        _ => Err("slots have a wrong length".into()),
    }
}
