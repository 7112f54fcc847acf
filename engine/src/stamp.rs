//! The leader's rule for stamps: time that never goes back, moves with the monotonic clock, and is drawn to the wall
//! clock slowly. Must never follow one wrong clock: a term begins at the median of a quorum's.

use std::time::Duration;

use stentor_proto::ids::StampMs;

/// Gives the stamps of one term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StampClock {
    last: StampMs,
    /// The monotonic moment that `last` stands for, in whole ms after the first one: what is left of a ms is not lost.
    at: Duration,
}

impl StampClock {
    /// Begins a term. `last_in_log` is the last stamp in the log; `wall_clocks_ms` are those that a quorum of the
    /// shard's replicas, this one included, sent within the last 2 s; `now` is monotonic, since any origin.
    pub fn begin(last_in_log: StampMs, wall_clocks_ms: &[u64], now: Duration) -> Self {
        let median = median(wall_clocks_ms).map_or(StampMs(0), StampMs);
        Self { last: last_in_log.max(median), at: now }
    }

    /// The stamp of an entry that is proposed now: the one before it, plus the monotonic time since, drawn to the wall
    /// clock by at most 1 ms for each ms that passed.
    pub fn stamp(&mut self, now: Duration, wall_clock_ms: u64) -> StampMs {
        let elapsed_ms = now.saturating_sub(self.at).as_millis().min(u128::from(u64::MAX)) as u64;
        self.at = self.at.saturating_add(Duration::from_millis(elapsed_ms));
        let earliest = self.last.0;
        let latest = earliest.saturating_add(elapsed_ms.saturating_mul(2));
        // [last, last + 2 × elapsed] is elapsed ± elapsed: the draw's bound on either side.
        self.last = StampMs(wall_clock_ms.clamp(earliest, latest));
        self.last
    }

    /// The last stamp given.
    pub fn last(&self) -> StampMs {
        self.last
    }
}

/// The median; of an even number, the lower of the two in the middle, so that a clock that is ahead has no say.
pub fn median(clocks_ms: &[u64]) -> Option<u64> {
    let mut sorted = clocks_ms.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn one_wrong_clock_of_three_moves_nothing() {
        for wrong in [0, 5, u64::MAX] {
            let clock = StampClock::begin(StampMs(900), &[1_000, wrong, 1_001], MS);
            assert!((1_000..=1_001).contains(&clock.last().0), "{wrong}");
        }
        assert_eq!(StampClock::begin(StampMs(2_000), &[1_000, 1_000], MS).last(), StampMs(2_000));
        assert_eq!(median(&[5, 9]), Some(5), "the clock that is ahead has no say");
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_jump_of_the_wall_clock_is_followed_slowly() {
        let mut clock = StampClock::begin(StampMs(0), &[1_000], Duration::ZERO);
        assert_eq!(clock.stamp(10 * MS, 601_000), StampMs(1_020));
        assert_eq!(clock.stamp(20 * MS, 0), StampMs(1_020), "it stands still, it never goes back");
        assert_eq!(clock.stamp(30 * MS, 1_030), StampMs(1_030));
    }

    #[test]
    fn parts_of_a_millisecond_are_not_lost() {
        let mut clock = StampClock::begin(StampMs(0), &[0], Duration::ZERO);
        for tenth in 1..=100u64 {
            clock.stamp(Duration::from_micros(tenth * 100), tenth / 10);
        }
        assert_eq!(clock.last(), StampMs(10));
    }

    proptest! {
        #[test]
        fn stamps_follow_monotonic_time_within_its_own_length(
            steps in prop::collection::vec((0u64..5_000_000, any::<u64>()), 1..50),
        ) {
            let mut clock = StampClock::begin(StampMs(1 << 40), &[7], Duration::ZERO);
            let (mut now, start) = (Duration::ZERO, clock.last().0);
            for (micros, wall) in steps {
                now += Duration::from_micros(micros);
                let before = clock.last();
                let stamp = clock.stamp(now, wall);
                prop_assert!(stamp >= before);
                prop_assert!(stamp.0 - start <= 2 * now.as_millis() as u64);
            }
        }
    }
}
