//! How Raft's values stand on disk and between brokers (docs/storage.md, "Log entries"); one format for both, so that
//! a follower stores the very checksum that the leader made. Must never accept an entry for another shard or index.
//!
//! ```text
//! u8 format = 1 │ u32 LE CRC32(u32 BE shard ‖ u64 BE index ‖ all that follows) │ u64 LE term │ u8 kind │ payload
//! ```

use std::collections::{BTreeMap, BTreeSet};

use bytes::{BufMut, Bytes};
use openraft::{EmptyNode, EntryPayload, Membership, impls::leader_id_std, vote::RaftLeaderIdExt as _};
use stentor_proto::{
    Message,
    ids::{ReplicaId, ShardId},
    internal,
};
use thiserror::Error;

use crate::types::{BundleBytes, RaftLogEntry, RaftLogId, RaftMembership, SnapshotMeta, StoredMembership, Vote};

/// The only entry format so far.
pub const ENTRY_FORMAT: u8 = 1;
/// Bytes of an entry before its payload.
pub const ENTRY_PREFIX_BYTES: usize = 14;

const BLANK: u8 = 0;
const NORMAL: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// Bytes that are none of ours. Whoever stored or sent them is at fault; nothing has changed here.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadWire {
    /// Fewer bytes than any has.
    #[error("{0} is cut short")]
    Truncated(&'static str),
    /// Written by a newer version.
    #[error("{0} has the unknown format {1}")]
    Format(&'static str, u8),
    /// Bytes changed since they were written, or they belong to another shard or index.
    #[error("checksum of {0} does not match")]
    Checksum(&'static str),
    /// The checksum is right and the content is not: a newer version, or a fault of ours.
    #[error("{0} cannot be decoded")]
    Undecodable(&'static str),
}

/// Term and index, as openraft wants them.
pub fn log_id(term: u64, index: u64) -> RaftLogId {
    RaftLogId::new(leader_id_std::LeaderId::new_committed(term, ReplicaId::default()), index)
}

/// Appends an entry to `out`.
pub fn encode_entry(shard: ShardId, entry: &RaftLogEntry, out: &mut impl Extend8) {
    let membership;
    let (kind, payload): (u8, &[u8]) = match &entry.payload {
        EntryPayload::Blank => (BLANK, &[]),
        EntryPayload::Normal(bundle) => {
            if let Some(value) = bundle.sealed_for(shard, &entry.log_id) {
                return out.bytes(value);
            }
            (NORMAL, &bundle.bundle)
        }
        EntryPayload::Membership(m) => {
            membership = membership_to_proto(m).encode_to_vec();
            (MEMBERSHIP, &membership)
        }
    };
    let mut rest = [0u8; 9];
    rest[..8].copy_from_slice(&entry.log_id.leader_id.term.to_le_bytes());
    rest[8] = kind;
    let crc = entry_crc(shard, entry.log_id.index, &rest, payload);
    out.bytes(&[ENTRY_FORMAT]);
    out.bytes(&crc.to_le_bytes());
    out.bytes(&rest);
    out.bytes(payload);
}

/// How many bytes [`encode_entry`] will write, exact but for memberships.
pub fn entry_bytes_hint(entry: &RaftLogEntry) -> usize {
    ENTRY_PREFIX_BYTES
        + match &entry.payload {
            EntryPayload::Normal(bundle) => bundle.bundle.len(),
            _ => 0,
        }
}

/// Where encoded entries go: a growing buffer, whichever kind.
pub trait Extend8 {
    /// Appends bytes.
    fn bytes(&mut self, bytes: &[u8]);
}

impl<B: BufMut> Extend8 for B {
    fn bytes(&mut self, bytes: &[u8]) {
        self.put_slice(bytes);
    }
}

/// Checks format and checksum and decodes; the payload shares the memory of `value`.
pub fn decode_entry(shard: ShardId, index: u64, value: &Bytes) -> Result<RaftLogEntry, BadWire> {
    const WHAT: &str = "log entry";
    let (&format, rest) = value.split_first().ok_or(BadWire::Truncated(WHAT))?;
    if format != ENTRY_FORMAT {
        return Err(BadWire::Format(WHAT, format));
    }
    let (crc, rest) = rest.split_first_chunk::<4>().ok_or(BadWire::Truncated(WHAT))?;
    let (prefix, payload) = rest.split_first_chunk::<9>().ok_or(BadWire::Truncated(WHAT))?;
    if u32::from_le_bytes(*crc) != entry_crc(shard, index, prefix, payload) {
        return Err(BadWire::Checksum(WHAT));
    }
    let (term, kind) = prefix.split_first_chunk::<8>().ok_or(BadWire::Truncated(WHAT))?;
    let log_id = log_id(u64::from_le_bytes(*term), index);
    let payload = match kind[0] {
        BLANK if payload.is_empty() => EntryPayload::Blank,
        NORMAL => EntryPayload::Normal(seal(shard, log_id, value)),
        MEMBERSHIP => {
            let proto = internal::Membership::decode(payload).map_err(|_| BadWire::Undecodable(WHAT))?;
            EntryPayload::Membership(membership_from_proto(&proto)?)
        }
        _ => return Err(BadWire::Undecodable(WHAT)),
    };
    Ok(RaftLogEntry { log_id, payload })
}

/// The bundle of an entry whose bytes were made or checked.
pub(crate) fn seal(shard: ShardId, log_id: RaftLogId, value: &Bytes) -> BundleBytes {
    let bundle = value.slice(ENTRY_PREFIX_BYTES..);
    BundleBytes { bundle, sealed: Some((shard, log_id, value.clone())) }
}

/// An entry's bytes: shared where they are known, made otherwise.
pub fn entry_bytes(shard: ShardId, entry: &RaftLogEntry) -> Bytes {
    if let EntryPayload::Normal(bundle) = &entry.payload
        && let Some(value) = bundle.sealed_for(shard, &entry.log_id)
    {
        return value.clone();
    }
    let mut out = Vec::with_capacity(entry_bytes_hint(entry));
    encode_entry(shard, entry, &mut out);
    out.into()
}

fn entry_crc(shard: ShardId, index: u64, prefix: &[u8; 9], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&shard.0.to_be_bytes());
    hasher.update(&index.to_be_bytes());
    hasher.update(prefix);
    hasher.update(payload);
    hasher.finalize()
}

/// A vote as it stands on disks and wires.
pub fn vote_to_proto(vote: &Vote) -> internal::RaftVote {
    internal::RaftVote { term: vote.leader_id.term, node: vote.leader_id.voted_for.to_u64(), committed: vote.committed }
}

/// The inverse of [`vote_to_proto`].
pub fn vote_from_proto(vote: &internal::RaftVote) -> Vote {
    let node = ReplicaId::from_u64(vote.node);
    if vote.committed { Vote::new_committed(vote.term, node) } else { Vote::new(vote.term, node) }
}

/// A log id as it stands on disks and wires.
pub fn log_id_to_proto(id: &RaftLogId) -> internal::RaftLogId {
    internal::RaftLogId { term: id.leader_id.term, index: id.index }
}

/// The inverse of [`log_id_to_proto`].
pub fn log_id_from_proto(id: &internal::RaftLogId) -> RaftLogId {
    log_id(id.term, id.index)
}

/// A membership as it stands on disks and wires.
pub fn membership_to_proto(membership: &RaftMembership) -> internal::Membership {
    internal::Membership {
        configs: membership
            .get_joint_config()
            .iter()
            .map(|config| internal::MembershipConfig { voters: config.iter().map(|id| id.to_u64()).collect() })
            .collect(),
        nodes: membership.nodes().map(|(id, _)| id.to_u64()).collect(),
    }
}

/// The inverse of [`membership_to_proto`]; refuses what openraft would refuse.
pub fn membership_from_proto(proto: &internal::Membership) -> Result<RaftMembership, BadWire> {
    let configs: Vec<BTreeSet<ReplicaId>> =
        proto.configs.iter().map(|config| config.voters.iter().map(|&id| ReplicaId::from_u64(id)).collect()).collect();
    let nodes: BTreeMap<ReplicaId, EmptyNode> =
        proto.nodes.iter().map(|&id| (ReplicaId::from_u64(id), EmptyNode {})).collect();
    if configs.is_empty() && nodes.is_empty() {
        // The membership of a replica that has applied none; openraft's constructor knows only real ones.
        return Ok(RaftMembership::default());
    }
    Membership::new(configs, nodes).map_err(|_| BadWire::Undecodable("membership"))
}

/// What a snapshot or a checkpoint says about itself, as openraft wants it.
pub fn snapshot_meta(applied: &internal::AppliedRow) -> Result<SnapshotMeta, BadWire> {
    Ok(SnapshotMeta {
        last_log_id: applied.applied_any.then(|| log_id(applied.term, applied.index)),
        last_membership: stored_membership(applied)?,
    })
}

/// The membership of an applied row, with the log id under which it was applied.
pub fn stored_membership(applied: &internal::AppliedRow) -> Result<StoredMembership, BadWire> {
    let membership = match &applied.membership {
        Some(proto) => membership_from_proto(proto)?,
        None => RaftMembership::default(),
    };
    let id = applied.membership_logged.then(|| log_id(applied.membership_term, applied.membership_index));
    Ok(StoredMembership::new(id, membership))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_bytes_serve_the_entry_that_they_were_sealed_for_and_no_other() {
        let (one, other) = (ShardId(1), ShardId(2));
        let payload = EntryPayload::Normal(BundleBytes::new(Bytes::from_static(b"a bundle")));
        let value = entry_bytes(one, &RaftLogEntry { log_id: log_id(3, 7), payload });
        let sealed = decode_entry(one, 7, &value).unwrap();
        assert_eq!(entry_bytes(one, &sealed).as_ptr(), value.as_ptr(), "shared");
        for (shard, term, index) in [(other, 3, 7), (one, 4, 7), (one, 3, 8)] {
            let moved = RaftLogEntry { log_id: log_id(term, index), payload: sealed.payload.clone() };
            let made = entry_bytes(shard, &moved);
            let mut encoded = Vec::new();
            encode_entry(shard, &moved, &mut encoded);
            assert_eq!((&made[..], made != value), (&encoded[..], true));
            assert_eq!(decode_entry(shard, index, &made).unwrap().log_id, log_id(term, index));
        }
    }
}
