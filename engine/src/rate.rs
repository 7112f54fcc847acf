//! Token buckets: how fast a caller may go, and how much at once. Must never let more through than its rate and its
//! burst together, whatever the clock does; time is an argument, in ms of a clock that only goes forwards.

use std::collections::BTreeMap;

/// A caller may spend `per_s` a second in the long run, and `burst` at once after a rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Refilled per second.
    pub per_s: u64,
    /// The most that can be saved up.
    pub burst: u64,
}

/// One caller's bucket; it begins full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// In thousandths, so that no refill is lost to rounding. Below 0: owed.
    level: i64,
    at_ms: u64,
}

/// Thousandths.
fn milli(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX).saturating_mul(1_000)
}

impl Bucket {
    /// A full one.
    pub fn new(rate: Rate, now_ms: u64) -> Self {
        Self { level: milli(rate.burst), at_ms: now_ms }
    }

    /// Spends `cost` if the bucket holds it; otherwise nothing changes.
    pub fn take(&mut self, rate: Rate, cost: u64, now_ms: u64) -> bool {
        self.refill(rate, now_ms);
        let is_enough = self.level >= milli(cost);
        if is_enough {
            self.level -= milli(cost);
        }
        is_enough
    }

    /// Spends `cost` whether the bucket holds it or not; at most a whole burst can be owed.
    pub fn charge(&mut self, rate: Rate, cost: u64, now_ms: u64) {
        self.refill(rate, now_ms);
        self.level = self.level.saturating_sub(milli(cost)).max(-milli(rate.burst));
    }

    /// Whether it is as good as a new one.
    pub fn is_full(&mut self, rate: Rate, now_ms: u64) -> bool {
        self.refill(rate, now_ms);
        self.level == milli(rate.burst)
    }

    fn refill(&mut self, rate: Rate, now_ms: u64) {
        let elapsed_ms = now_ms.saturating_sub(self.at_ms);
        self.at_ms = self.at_ms.max(now_ms);
        // Per second and in thousandths: as many in a ms.
        let more = i64::try_from(u128::from(elapsed_ms) * u128::from(rate.per_s)).unwrap_or(i64::MAX);
        self.level = self.level.saturating_add(more).min(milli(rate.burst));
    }
}

/// Buckets by caller. One that is full says nothing and is forgotten; at most `most` are kept.
#[derive(Debug)]
pub struct Buckets<K> {
    rate: Rate,
    most: usize,
    buckets: BTreeMap<K, Bucket>,
    /// Look for full ones when there are so many.
    sweep_at: usize,
}

/// Fewer buckets are not looked through.
const SWEEP_AT: usize = 64;

impl<K: Ord> Buckets<K> {
    /// None yet.
    pub fn new(rate: Rate, most: usize) -> Self {
        Self { rate, most, buckets: BTreeMap::new(), sweep_at: SWEEP_AT }
    }

    /// Spends `cost` of a caller's bucket if that holds it. When too many callers are remembered, a new one is let
    /// through and not remembered: the bound of memory stands before the rate.
    pub fn take(&mut self, key: K, cost: u64, now_ms: u64) -> bool {
        let rate = self.rate;
        if let Some(bucket) = self.buckets.get_mut(&key) {
            return bucket.take(rate, cost, now_ms);
        }
        self.sweep(now_ms);
        let mut bucket = Bucket::new(rate, now_ms);
        let is_enough = bucket.take(rate, cost, now_ms);
        if self.buckets.len() < self.most {
            self.buckets.insert(key, bucket);
        }
        is_enough
    }

    /// Takes a caller's bucket out, for one who keeps it himself for a while.
    pub fn lend(&mut self, key: &K, now_ms: u64) -> Bucket {
        self.buckets.remove(key).unwrap_or_else(|| Bucket::new(self.rate, now_ms))
    }

    /// Takes back what was lent; forgets it at once if it says nothing, or too many are remembered. Of two of one caller
    /// the emptier counts.
    pub fn give_back(&mut self, key: K, mut bucket: Bucket, now_ms: u64) {
        self.sweep(now_ms);
        if bucket.is_full(self.rate, now_ms) {
            return;
        }
        if let Some(known) = self.buckets.get_mut(&key) {
            if known.level > bucket.level {
                *known = bucket;
            }
        } else if self.buckets.len() < self.most {
            self.buckets.insert(key, bucket);
        }
    }

    fn sweep(&mut self, now_ms: u64) {
        if self.buckets.len() >= self.sweep_at {
            let rate = self.rate;
            self.buckets.retain(|_, bucket| !bucket.is_full(rate, now_ms));
            self.sweep_at = (self.buckets.len() * 2).max(SWEEP_AT);
        }
    }

    /// How many callers are remembered.
    pub fn len(&self) -> usize {
        self.buckets.len()
    }

    /// Whether nobody is remembered.
    pub fn is_empty(&self) -> bool {
        self.buckets.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rates() -> impl Strategy<Value = Rate> {
        (1..2_000u64, 1..5_000u64).prop_map(|(per_s, burst)| Rate { per_s, burst })
    }

    proptest! {
        #[test]
        fn no_span_of_time_gets_more_than_burst_and_rate(
            rate in rates(), steps in prop::collection::vec((0..400u64, 0..3_000u64, any::<bool>()), 1..200),
        ) {
            let mut bucket = Bucket::new(rate, 0);
            let (mut now_ms, mut spent) = (0, Vec::new());
            for (pause_ms, cost, owes) in steps {
                now_ms += pause_ms;
                if owes {
                    bucket.charge(rate, cost, now_ms);
                } else if bucket.take(rate, cost, now_ms) {
                    spent.push((now_ms, cost));
                }
            }
            for (first, &(from_ms, _)) in spent.iter().enumerate() {
                let mut sum = 0;
                for &(at_ms, cost) in &spent[first..] {
                    sum += cost;
                    prop_assert!(sum * 1_000 <= rate.burst * 1_000 + rate.per_s * (at_ms - from_ms));
                }
            }
        }

        #[test]
        fn whoever_stays_below_the_rate_is_never_refused(rate in rates(), pauses in prop::collection::vec(0..50u64, 1..300)) {
            let mut bucket = Bucket::new(rate, 0);
            let (mut now_ms, mut earned, mut spent) = (0, 0, 0);
            for pause_ms in pauses {
                now_ms += pause_ms;
                earned += rate.per_s * pause_ms;
                let cost = (earned - spent) / 1_000;
                spent += cost * 1_000;
                // What was earned before a whole one was spent may have found a full bucket.
                if cost < rate.burst {
                    prop_assert!(bucket.take(rate, cost, now_ms));
                }
            }
        }

        #[test]
        fn any_numbers_are_taken_without_a_panic(
            per_s: u64, burst: u64, steps in prop::collection::vec((any::<u64>(), any::<u64>(), any::<bool>()), 0..20),
        ) {
            let rate = Rate { per_s, burst };
            let mut bucket = Bucket::new(rate, 7);
            for (now_ms, cost, owes) in steps {
                if owes {
                    bucket.charge(rate, cost, now_ms);
                } else {
                    bucket.take(rate, cost, now_ms);
                }
                prop_assert!(bucket.level <= milli(burst) && bucket.level >= -milli(burst));
            }
        }
    }

    #[test]
    fn what_is_owed_is_worked_off_first() {
        let rate = Rate { per_s: 100, burst: 10 };
        let mut bucket = Bucket::new(rate, 0);
        bucket.charge(rate, 1_000, 0);
        assert!(!bucket.take(rate, 1, 100), "a whole burst is owed, not more");
        assert!(!bucket.take(rate, 1, 50), "a clock that goes back gives nothing");
        assert!(bucket.take(rate, 1, 110));
        assert!(!bucket.take(rate, 1, 110));
    }

    #[test]
    fn callers_that_rested_are_forgotten_and_the_others_bounded() {
        let rate = Rate { per_s: 10, burst: 10 };
        let mut buckets = Buckets::new(rate, 1_000);
        for n in 0..100_000u64 {
            assert!(buckets.take(n, 1, n));
        }
        assert!(buckets.len() <= 2 * 100 + SWEEP_AT, "{} remembered, 100 are not full", buckets.len());
        let mut buckets = Buckets::new(rate, 100);
        for n in 0..1_000 {
            assert!(buckets.take(n, 10, 0), "a new caller is let through when there are too many");
        }
        assert_eq!(buckets.len(), 100);
        assert!(!buckets.take(5, 1, 0), "who is remembered is held");
        let mut spent = buckets.lend(&5, 0);
        assert!(!spent.take(rate, 1, 0) && buckets.take(5, 1, 0), "what is lent is not here");
        buckets.give_back(5, spent, 0);
        assert!(!buckets.take(5, 1, 0));
        buckets.give_back(6, Bucket::new(rate, 0), 0);
        assert_eq!(buckets.len(), 100, "a full one is not kept");
    }
}
