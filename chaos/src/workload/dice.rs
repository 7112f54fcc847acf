//! Chance from a seed. Every purpose has a stream of its own, so that a new draw here disturbs none elsewhere. Must never
//! draw from the system.

use stentor_engine::session::client::Draws;

/// A stream of draws.
#[derive(Debug, Clone)]
pub struct Dice(Draws);

impl Dice {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self(Draws::new(seed))
    }

    /// Another stream, for a purpose.
    #[must_use]
    pub fn fork(&mut self, purpose: &str) -> Self {
        let of_purpose = purpose.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
        Self::new(self.0.draw() ^ of_purpose)
    }

    /// A number below `bound`; 0 for 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0.below(bound)
    }

    /// True `times` out of `of` times.
    pub fn chance(&mut self, times: u64, of: u64) -> bool {
        self.below(of) < times
    }

    /// One of several.
    pub fn pick<'t, T>(&mut self, of: &'t [T]) -> Option<&'t T> {
        let at = self.below(of.len() as u64);
        of.get(at as usize)
    }
}
