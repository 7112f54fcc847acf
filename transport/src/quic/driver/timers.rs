//! The timers of all connections of an endpoint, in a wheel of two levels. Must never fire late because there are many,
//! and never hold much for a connection: at most a few numbers.
//!
//! An entry only says that its connection is to be looked at then. A deadline that moves later leaves its entry where it
//! is; who finds nothing due puts a new one. So a connection that is busy touches the wheel some ten times in a second.

use std::{
    mem,
    time::{Duration, Instant},
};

/// A point in time, in ms since the endpoint began. Later than a connection's deadline by less than one.
pub(super) type Tick = u64;

pub(super) const NEVER: Tick = Tick::MAX;

/// Ticks of the fine level, a slot each.
const NEAR: usize = 1_024;
/// Slots of the coarse level, of [`NEAR`] ticks each. What is later than all of them is looked at on the way.
const FAR: usize = 64;

/// See the module.
pub(super) struct Timers {
    began: Instant,
    /// Everything up to here has fired.
    past: Tick,
    near: Box<[Vec<u32>]>,
    /// Which slots of `near` have entries.
    used: [u64; NEAR / 64],
    far: Box<[Vec<u32>]>,
}

impl Timers {
    pub(super) fn new(began: Instant) -> Self {
        let slots = |count| (0..count).map(|_| Vec::new()).collect();
        Self { began, past: 0, near: slots(NEAR), used: [0; NEAR / 64], far: slots(FAR) }
    }

    /// The first tick at which `deadline` has passed.
    pub(super) fn tick(began: Instant, deadline: Instant) -> Tick {
        let since = deadline.saturating_duration_since(began);
        since.as_secs() * 1_000 + u64::from(since.subsec_nanos().div_ceil(1_000_000))
    }

    pub(super) fn instant(&self, tick: Tick) -> Instant {
        self.began + Duration::from_millis(tick)
    }

    /// Has `connection` looked at no later than at `tick`; tells when.
    pub(super) fn add(&mut self, connection: u32, tick: Tick) -> Tick {
        let tick = tick.max(self.past + 1);
        if tick - self.past < NEAR as u64 {
            let slot = tick as usize % NEAR;
            if let (Some(entries), Some(word)) = (self.near.get_mut(slot), self.used.get_mut(slot / 64)) {
                entries.push(connection);
                *word |= 1 << (slot % 64);
            }
            return tick;
        }
        let last = self.past / NEAR as u64 + FAR as u64 - 1;
        let block = (tick / NEAR as u64).min(last);
        if let Some(entries) = self.far.get_mut(block as usize % FAR) {
            entries.push(connection);
        }
        block * NEAR as u64
    }

    /// When something fires next.
    pub(super) fn next(&self) -> Tick {
        let near = self.next_near();
        let block = self.past / NEAR as u64;
        let far = (1..=FAR as u64)
            .map(|ahead| block + ahead)
            .find(|block| self.far.get(*block as usize % FAR).is_some_and(|entries| !entries.is_empty()))
            .map_or(NEVER, |block| block * NEAR as u64);
        near.min(far)
    }

    fn next_near(&self) -> Tick {
        let mut tick = self.past + 1;
        let end = self.past + NEAR as u64;
        while tick <= end {
            let slot = tick as usize % NEAR;
            let word = self.used.get(slot / 64).copied().unwrap_or(0) >> (slot % 64);
            if word != 0 {
                return tick + u64::from(word.trailing_zeros());
            }
            tick += 64 - slot as u64 % 64;
        }
        NEVER
    }

    /// Moves to `due` all connections that are to be looked at by `now`; tells the tick that it is.
    pub(super) fn fire(&mut self, now: Instant, due: &mut Vec<u32>) -> Tick {
        let now = now.saturating_duration_since(self.began).as_millis() as Tick;
        // After a machine slept for hours, one turn of the whole wheel is enough.
        self.past = self.past.max(now.saturating_sub((NEAR * FAR) as u64));
        while self.past < now {
            let next = self.next().min(now);
            self.past = next;
            if next.is_multiple_of(NEAR as u64)
                && let Some(entries) = self.far.get_mut((next / NEAR as u64) as usize % FAR)
            {
                due.append(&mut mem::take(entries));
            }
            let slot = next as usize % NEAR;
            if let (Some(entries), Some(word)) = (self.near.get_mut(slot), self.used.get_mut(slot / 64)) {
                due.append(entries);
                *word &= !(1 << (slot % 64));
                entries.shrink_to(NEAR_ROOM);
            }
        }
        now.max(self.past)
    }
}

/// Entries for which each slot keeps room.
const NEAR_ROOM: usize = 64;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fired(timers: &mut Timers, ms: u64) -> Vec<u32> {
        let mut due = Vec::new();
        timers.fire(timers.began + Duration::from_millis(ms), &mut due);
        due
    }

    #[test]
    fn a_far_entry_is_looked_at_before_its_time_and_a_near_one_at_it() {
        let began = Instant::now();
        let mut timers = Timers::new(began);
        assert_eq!((timers.next(), timers.add(1, 5), timers.next()), (NEVER, 5, 5));
        assert!(fired(&mut timers, 4).is_empty());
        assert_eq!(fired(&mut timers, 5), [1]);
        assert_eq!(timers.add(2, 30_000), 29 * 1_024);
        assert_eq!(timers.next(), 29 * 1_024);
        assert!(fired(&mut timers, 29 * 1_024 - 1).is_empty());
        assert_eq!(fired(&mut timers, 29 * 1_024), [2]);
        assert_eq!(timers.add(2, 30_000), 30_000);
        // What has passed already fires with the next tick.
        assert_eq!(timers.add(3, 7), 29 * 1_024 + 1);
        assert_eq!(fired(&mut timers, 3_600_000), [3, 2]);
        assert_eq!(timers.next(), NEVER);
        assert_eq!(Timers::tick(began, began + Duration::from_micros(1_001)), 2);
    }

    proptest! {
        #[test]
        fn every_entry_fires_when_it_said(steps in prop::collection::vec((0u64..90_000, 0u64..3_000), 1..200)) {
            let mut timers = Timers::new(Instant::now());
            let (mut now, mut waiting) = (0, Vec::new());
            for (number, (ahead, forward)) in steps.into_iter().enumerate() {
                let at = timers.add(number as u32, now + ahead);
                prop_assert!(at <= (now + ahead).max(now + 1) && at > now);
                waiting.push((at, number as u32));
                let first = waiting.iter().map(|(at, _)| *at).min().unwrap_or(NEVER);
                prop_assert_eq!(timers.next(), first);
                now += forward;
                let mut due = fired(&mut timers, now);
                due.sort_unstable();
                let mut expected: Vec<u32> = waiting.extract_if(.., |(at, _)| *at <= now).map(|(_, n)| n).collect();
                expected.sort_unstable();
                prop_assert_eq!(due, expected);
            }
        }
    }
}
