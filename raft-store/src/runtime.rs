//! The runtime that openraft runs on: tokio, with randomness that a simulation can seed (docs/storage.md, "The twin").
//! Must never draw from the operating system on a thread that was seeded.

use std::{cell::Cell, convert::Infallible, fmt, future::Future, time::Duration};

use openraft::{AsyncRuntime, OptionalSend};
use openraft_rt_tokio::TokioRuntime;
use rand_core::{Rng, TryRng};

thread_local! {
    static SEEDED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// From here on everything that openraft draws on this thread (election time-outs) follows from `seed`. For
/// simulations: their runtime has one thread.
pub fn seed_thread(seed: u64) {
    SEEDED.set(Some(seed));
}

/// SplitMix64: the state after a draw, and what was drawn (Steele, Lea, Flood 2014).
pub(crate) fn split_mix(state: u64) -> (u64, u64) {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (state, z ^ (z >> 31))
}

type OsDraws = <TokioRuntime as AsyncRuntime>::ThreadLocalRng;

/// What [`Runtime::thread_rng`] gives: the thread's seeded draws, or the operating system's.
pub struct Draws(Option<OsDraws>);

impl fmt::Debug for Draws {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Draws(system)" } else { "Draws(seeded)" })
    }
}

impl TryRng for Draws {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        // The upper half: the better one.
        self.try_next_u64().map(|drawn| (drawn >> 32) as u32)
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        if let Some(system) = &mut self.0 {
            return Ok(system.next_u64());
        }
        let (state, drawn) = split_mix(SEEDED.get().unwrap_or(0));
        SEEDED.set(Some(state));
        Ok(drawn)
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> Result<(), Infallible> {
        for part in out.chunks_mut(8) {
            let drawn = self.try_next_u64()?.to_le_bytes();
            part.copy_from_slice(&drawn[..part.len()]);
        }
        Ok(())
    }
}

/// openraft's tokio runtime in all but its randomness.
#[derive(Debug)]
pub struct Runtime(TokioRuntime);

impl AsyncRuntime for Runtime {
    type JoinError = <TokioRuntime as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <TokioRuntime as AsyncRuntime>::Sleep;
    type Instant = <TokioRuntime as AsyncRuntime>::Instant;
    type TimeoutError = <TokioRuntime as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = <TokioRuntime as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = Draws;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = <TokioRuntime as AsyncRuntime>::Watch;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        TokioRuntime::spawn(future)
    }

    fn sleep(duration: Duration) -> Self::Sleep {
        TokioRuntime::sleep(duration)
    }

    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        TokioRuntime::sleep_until(deadline)
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: Self::Instant, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout_at(deadline, future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        TokioRuntime::is_panic(join_error)
    }

    fn thread_rng() -> Draws {
        Draws(SEEDED.get().is_none().then(TokioRuntime::thread_rng))
    }

    fn new(threads: usize) -> Self {
        Self(TokioRuntime::new(threads))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw() -> Vec<u64> {
        (0..8).map(|_| Runtime::thread_rng().next_u64()).collect()
    }

    #[test]
    fn a_seeded_thread_repeats_and_another_does_not() {
        let seeded = |seed| std::thread::spawn(move || (seed_thread(seed), draw()).1).join().unwrap();
        assert_eq!(seeded(7), seeded(7));
        assert_ne!(seeded(7), seeded(8));
        let unseeded = || std::thread::spawn(draw).join().unwrap();
        assert_ne!(unseeded(), unseeded());
        let mut bytes = [0; 13];
        Runtime::thread_rng().fill_bytes(&mut bytes);
        assert_ne!(bytes, [0; 13]);
    }
}
