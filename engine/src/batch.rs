//! When a shard's bundle closes, as a pure decision: size, age, and whether the shard has anything under way. Must
//! never let a command wait while the shard is idle, but for those who are about to come back ([`crate::echo`]).

use std::time::Duration;

use stentor_proto::bundle;

use crate::limits;

/// The bounds of a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchRules {
    /// It closes at this size, in bytes.
    pub close_bytes: usize,
    /// It closes when its first command has waited this long.
    pub max_wait: Duration,
}

impl Default for BatchRules {
    fn default() -> Self {
        Self { close_bytes: limits::BUNDLE_CLOSE_BYTES, max_wait: limits::BUNDLE_WAIT }
    }
}

/// Whether a command may join the open bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admit {
    /// It may.
    Join,
    /// Close what is open first; then the command begins the next one.
    CloseFirst,
    /// No bundle can ever hold it: refuse it.
    TooLarge,
}

/// Whether the open bundle should be proposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// There is nothing in it.
    Empty,
    /// Now.
    Now,
    /// At this moment, or when the shard becomes idle or another command fills it.
    At(Duration),
}

/// The size and age of a shard's open bundle. Moments are monotonic, since any origin that the caller keeps to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Batch {
    count: u32,
    bytes: usize,
    opened: Duration,
}

impl Batch {
    /// Whether a command of this encoded length may join.
    pub fn admit(&self, rules: &BatchRules, command_bytes: usize) -> Admit {
        if command_bytes > limits::MAX_COMMAND_BYTES {
            return Admit::TooLarge;
        }
        let full = self.count >= bundle::MAX_COMMANDS || self.bytes + 4 + command_bytes > rules.close_bytes;
        if self.count > 0 && full { Admit::CloseFirst } else { Admit::Join }
    }

    /// A command has joined.
    pub fn joined(&mut self, now: Duration, command_bytes: usize) {
        if self.count == 0 {
            *self = Self { count: 0, bytes: bundle::PREFIX_BYTES, opened: now };
        }
        self.count += 1;
        self.bytes += 4 + command_bytes;
    }

    /// What to do with it now. `idle`: the shard has no proposed bundle that is not yet applied. `crowd`: until when it
    /// waits all the same, for those who are about to come back ([`crate::echo::Echo::waits`]).
    pub fn close(&self, rules: &BatchRules, now: Duration, idle: bool, crowd: Option<Duration>) -> Close {
        let deadline = self.opened.saturating_add(rules.max_wait);
        let deadline = crowd.filter(|_| idle).map_or(deadline, |until| until.min(deadline));
        match self.count {
            0 => Close::Empty,
            _ if idle && crowd.is_none() || self.bytes >= rules.close_bytes || self.count >= bundle::MAX_COMMANDS => {
                Close::Now
            }
            _ if now >= deadline => Close::Now,
            _ => Close::At(deadline),
        }
    }

    /// It was proposed: the next one is empty.
    pub fn closed(&mut self) {
        *self = Self::default();
    }

    /// How many commands it has.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How many bytes it has, as encoded.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: BatchRules = BatchRules { close_bytes: 1_000, max_wait: Duration::from_millis(2) };
    const NOW: Duration = Duration::from_millis(50);

    #[test]
    fn an_idle_shard_does_not_wait() {
        let mut batch = Batch::default();
        assert_eq!(batch.close(&RULES, NOW, true, None), Close::Empty);
        batch.joined(NOW, 10);
        assert_eq!(batch.close(&RULES, NOW, true, None), Close::Now);
        assert_eq!(batch.close(&RULES, NOW, false, None), Close::At(NOW + RULES.max_wait));
        assert_eq!(batch.close(&RULES, NOW + RULES.max_wait, false, None), Close::Now);
        let crowd = NOW + RULES.max_wait / 4;
        assert_eq!(batch.close(&RULES, NOW, true, Some(crowd)), Close::At(crowd));
        assert_eq!(batch.close(&RULES, crowd, true, Some(crowd)), Close::Now);
        assert_eq!(batch.close(&RULES, NOW, false, Some(crowd)), Close::At(NOW + RULES.max_wait));
    }

    #[test]
    fn a_large_command_travels_alone() {
        let mut batch = Batch::default();
        assert_eq!(batch.admit(&RULES, 5_000), Admit::Join);
        batch.joined(NOW, 5_000);
        assert_eq!(batch.close(&RULES, NOW, false, None), Close::Now);
        assert_eq!(batch.admit(&RULES, 1), Admit::CloseFirst);
        batch.closed();
        assert_eq!(batch.admit(&RULES, limits::MAX_COMMAND_BYTES), Admit::Join);
        assert_eq!(batch.admit(&RULES, limits::MAX_COMMAND_BYTES + 1), Admit::TooLarge);
    }

    proptest! {
        #[test]
        fn sizes_are_those_of_the_real_bundle(lengths in prop::collection::vec(0usize..400, 1..200)) {
            let (mut batch, mut builder) = (Batch::default(), bundle::Builder::new());
            for length in lengths {
                if batch.admit(&RULES, length) == Admit::CloseFirst {
                    prop_assert!(builder.bytes() <= RULES.close_bytes);
                    (batch, builder) = (Batch::default(), bundle::Builder::new());
                }
                prop_assert!(builder.fits(length));
                builder.push(&vec![0; length]);
                batch.joined(NOW, length);
                prop_assert_eq!((batch.bytes(), batch.count()), (builder.bytes(), builder.count()));
            }
        }
    }
}
