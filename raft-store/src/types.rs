//! The Raft type configuration and how a log entry stands on disk and between brokers. The only module that the rest
//! of the code needs to know openraft's types by; openraft is pinned (docs/architecture.md, "Raft").

use std::fmt;

use openraft::{Membership, impls::leader_id_std};
use stentor_engine::effect::Outcome;
use stentor_proto::{
    Bytes,
    ids::{ReplicaId, ShardId},
};

/// The bytes of a bundle (`stentor_proto::bundle`); never parsed before `apply`.
#[derive(Clone, Default)]
pub struct BundleBytes {
    /// The bundle.
    pub bundle: Bytes,
    /// The entry as it stands on disk and between brokers, with the shard and the log id that it was sealed for, once
    /// there is one.
    pub(crate) sealed: Option<(ShardId, RaftLogId, Bytes)>,
}

impl BundleBytes {
    /// Of an entry that is still to be sealed.
    pub fn new(bundle: Bytes) -> Self {
        Self { bundle, sealed: None }
    }

    /// The entry's bytes, if they were made or checked for this shard and log id.
    pub(crate) fn sealed_for(&self, shard: ShardId, log_id: &RaftLogId) -> Option<&Bytes> {
        self.sealed.as_ref().filter(|(of, at, _)| *of == shard && at == log_id).map(|(.., value)| value)
    }
}

// What it was sealed as is no part of what it is.
impl PartialEq for BundleBytes {
    fn eq(&self, other: &Self) -> bool {
        self.bundle == other.bundle
    }
}

impl Eq for BundleBytes {}

impl fmt::Debug for BundleBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bundle of {} bytes", self.bundle.len())
    }
}

impl fmt::Display for BundleBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One outcome per command of the bundle; empty for entries that carry no bundle.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answers(pub Vec<Outcome>);

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} outcomes", self.0.len())
    }
}

openraft::declare_raft_types!(
    /// One Raft group is one shard; its nodes are data directories, addressed through the broker's config.
    pub TypeConfig:
        D = BundleBytes,
        R = Answers,
        NodeId = ReplicaId,
        Node = openraft::EmptyNode,
        Term = u64,
        LeaderId = leader_id_std::LeaderId<u64, ReplicaId>,
        AsyncRuntime = crate::runtime::Runtime,
);

/// Raft's vote: (term, candidate, committed).
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
/// (term, index).
pub type RaftLogId = openraft::alias::LogIdOf<TypeConfig>;
/// A log entry.
pub type RaftLogEntry = openraft::alias::EntryOf<TypeConfig>;
/// Voters and learners.
pub type RaftMembership = Membership<ReplicaId, openraft::EmptyNode>;
/// Voters and learners with the log id that brought them.
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
/// What a snapshot says about itself.
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
