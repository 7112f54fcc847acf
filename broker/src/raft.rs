//! The thin module around openraft: which options we run it with, and why. Must never let a default of openraft decide
//! safety: every option that does is set here by name.

use std::{sync::Arc, time::Duration};

use openraft::{Config, SnapshotPolicy};
use stentor_proto::ids::ShardId;
use stentor_raft_store::{ShardMachine, types::TypeConfig};

/// One replica's Raft.
pub(crate) type Raft = openraft::Raft<TypeConfig, ShardMachine>;

/// A leader's word to its followers: for all shards at once (`pulse.rs`).
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(150);
/// A follower that acknowledged entries less than this long ago needs no heartbeat, in ms. Less than [`HEARTBEAT`], so
/// that one never falls to the jitter of the one before.
const HEARTBEAT_MIN_MS: u64 = 100;
/// After this long openraft sends one by itself, in ms, should ours have been left out. Each replica ticks at 13/64 of
/// it: more often costs CPU when nobody talks, less often makes elections begin later.
const HEARTBEAT_SPARE_MS: u64 = 300;
/// The shortest silence after which a follower stands for election, in ms.
const ELECTION_MIN_MS: u64 = 600;
/// The longest; it is also how long a leader's lease lasts.
const ELECTION_MAX_MS: u64 = 1_000;
/// How long a follower keeps its word to a leader. For this long after the start of a process we neither vote nor stand:
/// openraft forgets whose lease it granted.
pub(crate) const LEASE: Duration = Duration::from_millis(ELECTION_MAX_MS);
/// How long a leader rests on a quorum's last word when it answers: a tenth less for clocks that run at different speeds,
/// and another for what openraft counts too long (`network/client.rs`).
pub(crate) const READ_LEASE: Duration = Duration::from_millis(ELECTION_MAX_MS - ELECTION_MAX_MS / 5);
/// Entries per append request; bytes bound it before this does.
const MAX_PAYLOAD_ENTRIES: u64 = 256;
/// A snapshot carries a whole shard.
const SNAPSHOT_TIMEOUT_MS: u64 = 600_000;

/// `elect`: whether the replica may stand for election from the start. False for one with a stored vote, until one
/// lease has passed ([`LEASE`]).
pub(crate) fn config(shard: ShardId, elect: bool) -> Result<Arc<Config>, openraft::ConfigError> {
    let config = Config {
        cluster_name: format!("shard-{shard}"),
        heartbeat_interval: HEARTBEAT_SPARE_MS,
        heartbeat_min_interval: Some(HEARTBEAT_MIN_MS),
        election_timeout_min: ELECTION_MIN_MS,
        election_timeout_max: ELECTION_MAX_MS,
        enable_elect: elect,
        enable_pre_vote: Some(true),
        // The default lets a crashed leader come back in its own term and write other entries at the same log ids.
        enable_leader_restore: Some(false),
        allow_log_reversion: Some(false),
        // Checkpoints and purges are ours alone (docs/storage.md, "Checkpoints").
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        // A shard that wakes has had no answer for long: its first heartbeats must go out all the same.
        quorum_loss_probe_interval: None,
        // Only a purged log makes a follower need a snapshot.
        replication_lag_threshold: u64::MAX,
        max_payload_entries: MAX_PAYLOAD_ENTRIES,
        install_snapshot_timeout: SNAPSHOT_TIMEOUT_MS,
        // Statistics that nobody reads, and rings of them in each replica.
        log_stage_capacity: Some(1),
        backoff: "50ms 100ms 200ms ..500ms".into(),
        ..Config::default()
    };
    config.validate().map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_that_decide_safety_are_ours() {
        let config = config(ShardId(3), false).unwrap();
        assert_eq!(config.enable_leader_restore, Some(false));
        assert_eq!(config.enable_pre_vote, Some(true));
        assert_eq!(config.snapshot_policy, SnapshotPolicy::Never);
        assert_eq!(config.max_in_snapshot_log_to_keep, u64::MAX);
        assert_eq!(config.quorum_loss_probe_interval, None);
        assert!(!config.enable_elect);
        assert_eq!(LEASE, Duration::from_millis(config.election_timeout_max));
    }
}
