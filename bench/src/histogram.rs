//! Latencies of a run: an HDR histogram that keeps three digits from a microsecond to an hour, and its summary. Must
//! never drop a value: one beyond the range counts as the range's end.

use std::time::Duration;

use serde::{Deserialize, Serialize};

const LOWEST_NS: u64 = 1_000;
const HIGHEST_NS: u64 = 3_600_000_000_000;
const DIGITS: u8 = 3;
/// One from elsewhere holds no more, so that sums of many stay far from the end of a u64.
pub(crate) const MOST_VALUES: u64 = 1 << 48;

/// How long things took.
#[derive(Debug, Clone)]
pub struct Histogram {
    inner: hdrhistogram::Histogram<u64>,
}

/// What a histogram says in short; all zero when nothing was recorded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// How many were recorded.
    pub count: u64,
    /// Arithmetic mean.
    pub mean_ms: f64,
    /// Half took at most this.
    pub p50_ms: f64,
    /// 90 of 100 took at most this.
    pub p90_ms: f64,
    /// 99 of 100 took at most this.
    pub p99_ms: f64,
    /// 999 of 1,000 took at most this.
    pub p999_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

impl Histogram {
    /// An empty one.
    #[allow(clippy::missing_panics_doc, reason = "the bounds are constants that a test has proven")]
    pub fn new() -> Self {
        let inner = hdrhistogram::Histogram::new_with_bounds(LOWEST_NS, HIGHEST_NS, DIGITS);
        Self { inner: inner.unwrap_or_else(|error| unreachable!("{error}")) }
    }

    /// Notes one.
    pub fn record(&mut self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.inner.saturating_record(ns.clamp(LOWEST_NS, HIGHEST_NS));
    }

    /// Takes in all of another one.
    pub fn add(&mut self, other: &Self) {
        // Both have the same bounds, so nothing can be out of range.
        let _ = self.inner.add(&other.inner);
    }

    /// What is in it, exactly: for each bucket that is not empty a value in ns and how many it holds, in order.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let bucket = |value: u64, count: u64| (self.inner.lowest_equivalent(value), count);
        self.inner.iter_recorded().map(move |at| bucket(at.value_iterated_to(), at.count_at_value()))
    }

    /// The one that has these buckets; `None` when none has: a value out of range, no values in a bucket, or too many
    /// in all (2^48).
    pub fn of_buckets(buckets: impl IntoIterator<Item = (u64, u64)>) -> Option<Self> {
        let (mut histogram, mut all) = (Self::new(), 0_u64);
        for (value, count) in buckets {
            all = all.checked_add(count).filter(|all| *all <= MOST_VALUES)?;
            let possible = count > 0 && value >= histogram.inner.lowest_equivalent(LOWEST_NS);
            histogram.inner.record_n(value, count).ok().filter(|()| possible)?;
        }
        Some(histogram)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.inner.reset();
    }

    /// How many were recorded.
    pub fn count(&self) -> u64 {
        self.inner.len()
    }

    /// At most how long `percent` of 100 took, in ms.
    pub fn percentile_ms(&self, percent: f64) -> f64 {
        if self.inner.is_empty() {
            return 0.0;
        }
        ms(self.inner.value_at_percentile(percent).min(self.inner.max()))
    }

    /// In short.
    pub fn summary(&self) -> Latency {
        if self.inner.is_empty() {
            return Latency::default();
        }
        Latency {
            count: self.inner.len(),
            mean_ms: self.inner.mean() / 1e6,
            p50_ms: self.percentile_ms(50.0),
            p90_ms: self.percentile_ms(90.0),
            p99_ms: self.percentile_ms(99.0),
            p999_ms: self.percentile_ms(99.9),
            max_ms: ms(self.inner.max()),
        }
    }

    /// For a plot: (percent, ms) from 0 to 100, closer together towards 100, as far as there are values to tell apart.
    pub fn curve(&self) -> Vec<(f64, f64)> {
        if self.inner.is_empty() {
            return Vec::new();
        }
        // Each decade of "one of 10, 100, 1,000…" gets the same number of points.
        let steps = (self.inner.len() as f64).log10().max(1.0) * 8.0;
        let mut points: Vec<_> = (0..=steps as u32)
            .map(|step| 100.0 - 100.0 * 10f64.powf(-f64::from(step) / 8.0))
            .map(|percent| (percent, self.percentile_ms(percent)))
            .collect();
        points.push((100.0, ms(self.inner.max())));
        points
    }
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(value: f64, expected: f64) -> bool {
        (value - expected).abs() <= expected * 0.002
    }

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        let mut histogram = Histogram::new();
        (1..=1_000).for_each(|n| histogram.record(Duration::from_micros(n * 100)));
        let summary = histogram.summary();
        assert_eq!(summary.count, 1_000);
        assert!(about(summary.p50_ms, 50.0) && about(summary.p90_ms, 90.0), "{summary:?}");
        assert!(about(summary.p99_ms, 99.0) && about(summary.p999_ms, 99.9), "{summary:?}");
        assert!(about(summary.max_ms, 100.0) && about(summary.mean_ms, 50.05), "{summary:?}");
    }

    #[test]
    fn what_is_out_of_range_is_kept_at_its_end() {
        let mut histogram = Histogram::new();
        histogram.record(Duration::ZERO);
        histogram.record(Duration::from_secs(1_000_000));
        assert_eq!(histogram.count(), 2);
        assert!(about(histogram.summary().max_ms, 3_600_000.0));
    }

    #[test]
    fn sums_are_those_of_the_parts_and_an_empty_one_says_zero() {
        let (mut one, mut other) = (Histogram::new(), Histogram::new());
        one.record(Duration::from_millis(1));
        other.record(Duration::from_millis(3));
        one.add(&other);
        assert_eq!(one.count(), 2);
        assert!(about(one.summary().max_ms, 3.0) && about(one.percentile_ms(50.0), 1.0));
        one.clear();
        assert_eq!((one.summary(), one.curve()), (Latency::default(), vec![]));
    }

    proptest::proptest! {
        #[test]
        fn the_sum_of_parts_that_travelled_is_the_histogram_of_all(
            parts in proptest::collection::vec(proptest::collection::vec(0_u64..u64::MAX, 0..60), 1..6)
        ) {
            let mut all = Histogram::new();
            let mut merged = Histogram::new();
            for part in parts {
                let mut own = Histogram::new();
                // All magnitudes, not only the largest.
                for took in part.into_iter().map(|n| Duration::from_nanos(n >> (n % 64))) {
                    all.record(took);
                    own.record(took);
                }
                merged.add(&Histogram::of_buckets(own.buckets()).unwrap());
            }
            proptest::prop_assert_eq!(all.summary(), merged.summary());
            proptest::prop_assert_eq!(all.curve(), merged.curve());
            proptest::prop_assert!(all.buckets().eq(merged.buckets()));
        }
    }

    #[test]
    fn buckets_that_no_histogram_has_are_refused() {
        let of = |buckets: &[(u64, u64)]| Histogram::of_buckets(buckets.iter().copied());
        assert_eq!(of(&[]).unwrap().count(), 0);
        assert_eq!(of(&[(LOWEST_NS, MOST_VALUES)]).unwrap().count(), MOST_VALUES);
        for wrong in [&[(0, 1)][..], &[(u64::MAX, 1)], &[(5_000, 0)], &[(5_000, MOST_VALUES), (9_000, 1)]] {
            assert!(of(wrong).is_none(), "{wrong:?}");
        }
        assert!(of(&[(5_000, u64::MAX), (5_000, u64::MAX)]).is_none());
    }

    #[test]
    fn a_curve_rises_and_ends_with_the_longest() {
        let mut histogram = Histogram::new();
        (1..=5_000).for_each(|n| histogram.record(Duration::from_micros(n)));
        let curve = histogram.curve();
        assert!(curve.len() > 20 && curve.windows(2).all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1));
        assert_eq!(curve.last(), Some(&(100.0, histogram.summary().max_ms)));
    }
}
