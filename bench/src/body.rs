//! What is sent: bodies of one size, or as long as those of a real conversation. Must never be so alike that a
//! compressor makes them disappear.

use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};

use crate::meter::Meter;

/// A stamp: the moment when the message was due.
pub const STAMP_BYTES: usize = 8;
/// Bodies that are made before a run; they are sent in turn.
const POOL: usize = 1_024;
/// What bodies of one size are made of: as dense as base64.
const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// How long bodies are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BodySize {
    /// All the same, of random letters.
    Bytes(usize),
    /// The messages of a conversation that took place.
    Real,
}

/// Bodies, ready to be sent.
#[derive(Debug, Clone)]
pub struct Bodies {
    pool: Vec<Bytes>,
}

impl Bodies {
    /// Of one size, at least one byte.
    pub fn of_bytes(bytes: usize) -> Self {
        let mut random = StdRng::seed_from_u64(bytes as u64);
        let body = |_| (0..bytes.max(1)).map(|_| LETTERS[random.random_range(0..LETTERS.len())]).collect();
        Self { pool: (0..POOL).map(body).collect() }
    }

    /// These; those of one size instead of none.
    pub fn real(messages: impl IntoIterator<Item = Bytes>) -> Self {
        let pool: Vec<Bytes> = messages.into_iter().filter(|body| !body.is_empty()).collect();
        if pool.is_empty() { Self::of_bytes(1) } else { Self { pool } }
    }

    /// The `n`-th.
    pub fn get(&self, n: usize) -> Bytes {
        self.pool[n % self.pool.len()].clone()
    }

    /// The `n`-th with the moment in front when it was due; a shorter one becomes as long as the stamp.
    pub fn stamped(&self, n: usize, meter: &Meter, due: Instant) -> Bytes {
        let body = &self.pool[n % self.pool.len()];
        let mut stamped = BytesMut::with_capacity(body.len().max(STAMP_BYTES));
        stamped.put_u64_le(meter.stamp(due));
        stamped.extend_from_slice(body.get(STAMP_BYTES..).unwrap_or_default());
        stamped.freeze()
    }

    /// Mean length.
    pub fn mean_bytes(&self) -> f64 {
        self.pool.iter().map(Bytes::len).sum::<usize>() as f64 / self.pool.len() as f64
    }
}

/// The stamp of a body.
pub fn stamp_of(body: &[u8]) -> Option<u64> {
    body.first_chunk::<STAMP_BYTES>().map(|bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_have_their_size_and_differ() {
        let bodies = Bodies::of_bytes(256);
        assert!((0..POOL).all(|n| bodies.get(n).len() == 256) && bodies.mean_bytes() == 256.0);
        assert_ne!(bodies.get(0), bodies.get(1));
        assert_eq!(bodies.get(1), Bodies::of_bytes(256).get(POOL + 1), "each run sends the same");
        let real = Bodies::real([Bytes::from_static(b"hi"), Bytes::new()]);
        assert_eq!((real.get(0), real.get(1)), (Bytes::from_static(b"hi"), Bytes::from_static(b"hi")));
    }

    #[test]
    fn a_stamp_comes_back_and_leaves_the_length() {
        let (meter, bodies) = (Meter::new(), Bodies::of_bytes(100));
        let due = Instant::now();
        let stamped = bodies.stamped(3, &meter, due);
        assert_eq!((stamped.len(), stamp_of(&stamped)), (100, Some(meter.stamp(due))));
        assert_eq!(stamped[STAMP_BYTES..], bodies.get(3)[STAMP_BYTES..]);
        assert_eq!(Bodies::of_bytes(2).stamped(0, &meter, due).len(), STAMP_BYTES);
        assert_eq!(stamp_of(b"short"), None);
    }
}
