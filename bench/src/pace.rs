//! When the next unit is due. Open loop: at a fixed rate, whatever the cluster does, and a unit that begins late counts
//! from when it was due (no coordinated omission). Closed loop: when an earlier one is done. Must never skip a unit that
//! was due.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// How units follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pace {
    /// As soon as there is room in the window.
    Closed,
    /// So many a second, all tasks together.
    Open {
        /// Units per second.
        rate_per_s: f64,
    },
}

/// One task's share of an open loop.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    began: Instant,
    period_ns: f64,
    offset_ns: f64,
    done: u64,
}

impl Schedule {
    /// The `task`-th of `tasks`: each has the same share, and they take turns.
    pub fn new(began: Instant, rate_per_s: f64, task: usize, tasks: usize) -> Self {
        let between_ns = 1e9 / rate_per_s.max(1e-9);
        Self { began, period_ns: between_ns * tasks.max(1) as f64, offset_ns: between_ns * task as f64, done: 0 }
    }

    /// When the next unit is due.
    pub fn due(&self) -> Instant {
        // From the beginning each time: sums of rounded periods would drift.
        self.began + Duration::from_nanos((self.offset_ns + self.period_ns * self.done as f64) as u64)
    }

    /// The next unit, if it is due by now: when it was.
    pub fn take(&mut self, now: Instant) -> Option<Instant> {
        let due = self.due();
        (due <= now).then(|| {
            self.done += 1;
            due
        })
    }
}

/// When a task that does one thing at a time begins the next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Turns(Option<Schedule>);

impl Turns {
    /// The `task`-th of `tasks`.
    pub(crate) fn new(pace: Pace, began: Instant, task: usize, tasks: usize) -> Self {
        match pace {
            Pace::Closed => Self(None),
            Pace::Open { rate_per_s } => Self(Some(Schedule::new(began, rate_per_s, task, tasks))),
        }
    }

    /// Waits for the next one; since when it counts.
    pub(crate) async fn next(&mut self) -> Instant {
        let Some(schedule) = &mut self.0 else { return Instant::now() };
        let due = schedule.due();
        tokio::time::sleep_until(due.into()).await;
        schedule.take(Instant::now()).unwrap_or(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(schedule: &mut Schedule, now: Instant) -> Vec<Instant> {
        std::iter::from_fn(|| schedule.take(now)).collect()
    }

    #[test]
    fn tasks_take_turns_and_make_the_rate_together() {
        let began = Instant::now();
        let mut all: Vec<Instant> = (0..4)
            .flat_map(|task| taken(&mut Schedule::new(began, 1_000.0, task, 4), began + Duration::from_secs(1)))
            .collect();
        all.sort();
        assert!((1_000..=1_004).contains(&all.len()), "{}", all.len());
        let gaps = all.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(gaps.into_iter().all(|gap| gap.abs_diff(Duration::from_millis(1)) < Duration::from_micros(1)));
    }

    #[test]
    fn what_was_due_during_a_pause_is_not_skipped_and_counts_from_when_it_was_due() {
        let began = Instant::now();
        let mut schedule = Schedule::new(began, 100.0, 0, 1);
        assert_eq!(taken(&mut schedule, began), [began]);
        let late = taken(&mut schedule, began + Duration::from_millis(55));
        assert_eq!(late, [10, 20, 30, 40, 50].map(|ms| began + Duration::from_millis(ms)));
        assert_eq!(schedule.due(), began + Duration::from_millis(60));
    }

    #[test]
    fn a_long_run_does_not_drift() {
        let began = Instant::now();
        let mut schedule = Schedule::new(began, 3_000.0, 0, 1);
        let units = taken(&mut schedule, began + Duration::from_secs(600)).len();
        assert!((1_800_000..=1_800_001).contains(&units), "{units}");
    }
}
