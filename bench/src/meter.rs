//! Where the tasks that make the load note what happened, and where a phase takes it from. Must never make a task wait
//! for another one longer than a record takes.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::Histogram;

/// Tasks note in one of these, by their numbers: more than there are threads on the machines that make load.
const PARTS: usize = 8;

/// What was noted since the last [`Meter::take`].
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// How long each took.
    pub latencies: Histogram,
    /// How many went well.
    pub count: u64,
    /// How many did not.
    pub errors: u64,
    /// The first error's text.
    pub first_error: Option<String>,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Self) {
        self.latencies.add(&other.latencies);
        self.count += other.count;
        self.errors += other.errors;
        if self.first_error.is_none() {
            self.first_error.clone_from(&other.first_error);
        }
    }

    fn reset(&mut self) {
        self.latencies.clear();
        (self.count, self.errors, self.first_error) = (0, 0, None);
    }
}

/// Shared by all tasks of a load.
#[derive(Debug)]
pub struct Meter {
    parts: [Mutex<Tally>; PARTS],
    /// Of all phases.
    total: AtomicU64,
    began: Instant,
}

impl Default for Meter {
    fn default() -> Self {
        Self::new()
    }
}

impl Meter {
    /// An empty one.
    pub fn new() -> Self {
        Self { parts: Default::default(), total: AtomicU64::new(0), began: Instant::now() }
    }

    /// Notes units that went well, and how long each took; the container is emptied for the next ones.
    pub fn note(&self, task: usize, took: &mut Vec<Duration>) {
        if took.is_empty() {
            return;
        }
        let mut part = self.parts[task % PARTS].lock();
        part.count += took.len() as u64;
        took.iter().for_each(|took| part.latencies.record(*took));
        drop(part);
        self.total.fetch_add(took.len() as u64, Ordering::Relaxed);
        took.clear();
    }

    /// Notes a unit that failed.
    pub fn fail(&self, task: usize, error: &dyn std::fmt::Display) {
        let mut part = self.parts[task % PARTS].lock();
        part.errors += 1;
        part.first_error.get_or_insert_with(|| error.to_string());
    }

    /// Units that went well since the beginning, whatever was taken.
    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// What was noted since the last time.
    pub fn take(&self) -> Tally {
        let mut all = Tally::default();
        for part in &self.parts {
            let mut part = part.lock();
            all.add(&part);
            part.reset();
        }
        all
    }

    /// The same, but it stays.
    pub fn peek(&self) -> Tally {
        let mut all = Tally::default();
        self.parts.iter().for_each(|part| all.add(&part.lock()));
        all
    }

    /// This moment as a number that a message can carry, in ns.
    pub fn stamp(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.began).as_nanos() as u64
    }

    /// How long ago a message was stamped.
    pub fn since(&self, stamp: u64, now: Instant) -> Duration {
        Duration::from_nanos(self.stamp(now).saturating_sub(stamp))
    }
}

/// What a load is measured with: its units, and what else takes time in it.
#[derive(Debug, Default)]
pub struct Meters {
    /// The units of the work.
    pub units: Meter,
    /// Others by their names, which become figures (`…_p50_ms`, `…_p99_ms`, `…_count`).
    pub others: Vec<(&'static str, Meter)>,
}

impl Meters {
    /// Units and nothing else.
    pub fn new() -> Self {
        Self::default()
    }

    /// One more.
    #[must_use]
    pub fn with(mut self, name: &'static str) -> Self {
        self.others.push((name, Meter::new()));
        self
    }

    /// One of the others; the units when there is none of that name.
    pub fn other(&self, name: &str) -> &Meter {
        self.others.iter().find(|(own, _)| *own == name).map_or(&self.units, |(_, meter)| meter)
    }

    /// Empties all, at the beginning of a phase.
    pub(crate) fn take(&self) -> (Tally, Vec<(&'static str, Tally)>) {
        let others = self.others.iter().map(|(name, meter)| (*name, meter.take())).collect();
        (self.units.take(), others)
    }
}

/// Latencies that one task has noted and not yet handed on.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    took: Vec<Duration>,
}

impl Batch {
    pub(crate) fn push(&mut self, took: Duration) {
        self.took.push(took);
    }

    pub(crate) fn hand_on(&mut self, meter: &Meter, task: usize) {
        meter.note(task, &mut self.took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_gets_what_was_noted_since_the_last_one() {
        let meter = Meter::new();
        for task in 0..20 {
            meter.note(task, &mut vec![Duration::from_millis(task as u64 + 1)]);
        }
        meter.fail(3, &"first");
        meter.fail(3, &"second");
        assert_eq!(meter.peek().count, 20);
        let tally = meter.take();
        assert_eq!((tally.count, tally.errors, tally.first_error.as_deref()), (20, 2, Some("first")));
        assert_eq!(tally.latencies.count(), 20);
        meter.note(0, &mut vec![Duration::from_millis(1)]);
        let next = meter.take();
        assert_eq!((next.count, next.errors, next.first_error, meter.total()), (1, 0, None, 21));
    }

    #[test]
    fn a_stamp_tells_how_long_ago() {
        let meter = Meter::new();
        let now = Instant::now();
        let stamp = meter.stamp(now);
        assert_eq!(meter.since(stamp, now + Duration::from_millis(5)), Duration::from_millis(5));
        assert_eq!(meter.since(stamp + 1_000_000_000, now), Duration::ZERO);
    }
}
