//! Waiting before a retry, as data: full jitter over an exponentially growing ceiling. Must never read a clock or
//! draw from the system: the seed is an argument, so that a simulation repeats.

/// How long to wait before a retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// Ceiling of the first wait, in ms.
    pub first_ms: u64,
    /// Ceiling of every wait, in ms.
    pub max_ms: u64,
}

impl Backoff {
    /// A wait in ms for the `attempt`-th retry (from 0): anything from nothing to the ceiling, since waits that only
    /// vary around a mean let a crowd of devices come back in waves.
    pub fn wait_ms(&self, attempt: u32, draws: &mut Draws) -> u64 {
        let ceiling = self.first_ms.saturating_mul(1 << attempt.min(20)).min(self.max_ms);
        draws.below(ceiling.saturating_add(1))
    }
}

/// A stream of numbers from a seed (splitmix64): spreads waits, and is good for nothing that must not be guessed.
#[derive(Debug, Clone)]
pub struct Draws(u64);

impl Draws {
    /// The stream of this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The next number below `bound`; 0 for a bound of 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw().checked_rem(bound).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_ceiling_and_spread_from_nothing() {
        let backoff = Backoff { first_ms: 100, max_ms: 5_000 };
        let mut draws = Draws::new(7);
        for attempt in [0, 1, 3, 10, u32::MAX] {
            let ceiling = (100u64 << attempt.min(20)).min(5_000);
            let waits: Vec<_> = (0..500).map(|_| backoff.wait_ms(attempt, &mut draws)).collect();
            assert!(waits.iter().all(|&w| w <= ceiling));
            assert!(waits.iter().any(|&w| w < ceiling / 5) && waits.iter().any(|&w| w > ceiling - ceiling / 5));
        }
    }
}
