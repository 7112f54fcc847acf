//! The wall clocks of the brokers as far as heartbeats told them, for a leader's first stamp. Must never let one wrong
//! clock move anything: only the median of a quorum counts (docs/architecture.md, "Time").

use std::time::Duration;

use hashbrown::HashMap;
use parking_lot::Mutex;
use stentor_proto::ids::BrokerId;
use tokio::time::Instant;

/// Older words do not count.
const FRESH: Duration = Duration::from_secs(2);

/// What each peer's clock said, and when.
#[derive(Default)]
pub(crate) struct Clocks {
    peers: Mutex<HashMap<BrokerId, (u64, Instant)>>,
}

impl Clocks {
    /// A peer's clock came with its heartbeats.
    pub(crate) fn heard(&self, peer: BrokerId, wall_ms: u64, at: Instant) {
        self.peers.lock().insert(peer, (wall_ms, at));
    }

    /// Where the fresh clocks of these peers stand at `now`.
    pub(crate) fn of(&self, peers: impl Iterator<Item = BrokerId>, now: Instant) -> Vec<u64> {
        let known = self.peers.lock();
        peers
            .filter_map(|peer| {
                let &(wall_ms, at) = known.get(&peer)?;
                let age = now.saturating_duration_since(at);
                (age <= FRESH).then(|| wall_ms.saturating_add(age.as_millis() as u64))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_fresh_clocks_count_and_they_run_on() {
        let (clocks, start) = (Clocks::default(), Instant::now());
        clocks.heard(BrokerId(2), 1_000, start);
        clocks.heard(BrokerId(3), 5_000, start);
        let later = start + Duration::from_millis(300);
        clocks.heard(BrokerId(3), 6_000, later + Duration::from_secs(2));
        let all = || [BrokerId(1), BrokerId(2), BrokerId(3)].into_iter();
        assert_eq!(clocks.of(all(), later), [1_300, 6_000]);
        assert_eq!(clocks.of(all(), start + Duration::from_millis(2_100)), [6_000]);
    }
}
