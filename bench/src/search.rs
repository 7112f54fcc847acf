//! Looks for the highest rate at which 99 of 100 messages are done in a given time. Must never take a rate for held that
//! was not reached, or at which something failed.

use std::time::Duration;

use crate::{BenchError, Outcome, Pace, Timing, workers::Crew};

/// Of the rate that was asked for, so much must have been done.
const REACHED: f64 = 0.98;
/// Rates closer together than this are the same.
const CLOSE: f64 = 0.04;
/// More steps tell nothing new.
const STEPS: usize = 12;

/// One rate that was tried.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Asked for.
    pub rate_per_s: f64,
    /// What came out.
    pub outcome: Outcome,
    /// Whether it held.
    pub held: bool,
}

/// Which rate to try next, and what was found so far.
#[derive(Debug, Clone, Copy)]
struct Search {
    held: f64,
    broke: f64,
}

impl Search {
    /// `highest` is what a closed loop reaches: more cannot be held.
    fn new(highest: f64) -> Self {
        Self { held: 0.0, broke: highest * 1.1 }
    }

    fn next(&self) -> Option<f64> {
        if self.broke - self.held <= self.broke * CLOSE {
            return None;
        }
        // Far below the highest rate a smaller step up finds the order of magnitude sooner.
        Some(if self.held == 0.0 { self.broke * 0.5 } else { self.held.midpoint(self.broke) })
    }

    fn note(&mut self, rate: f64, held: bool) {
        if held { self.held = rate } else { self.broke = rate }
    }
}

fn held(outcome: &Outcome, rate: f64, p99: Duration) -> bool {
    outcome.errors == 0 && outcome.rate_per_s >= rate * REACHED && outcome.latency.p99_ms <= p99.as_secs_f64() * 1e3
}

/// Tries rates for `timing.seconds` each; returns the steps, the last one that held is the answer.
pub async fn find_p99(crew: &mut Crew<'_>, p99: Duration, timing: Timing) -> Result<Vec<Step>, BenchError> {
    let once = Timing { repeats: 1, ..timing };
    let closed = crew.run(Pace::Closed, once).await?;
    let highest = closed.first().map_or(0.0, |outcome| outcome.rate_per_s);
    let (mut search, mut steps) = (Search::new(highest), Vec::new());
    while let Some(rate_per_s) = search.next().filter(|_| steps.len() < STEPS) {
        let mut outcomes = crew.run(Pace::Open { rate_per_s }, once).await?;
        let Some(outcome) = outcomes.pop() else { break };
        let held = held(&outcome, rate_per_s, p99);
        search.note(rate_per_s, held);
        steps.push(Step { rate_per_s, outcome, held });
        if rate_per_s < highest * 0.01 {
            break;
        }
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Latency;

    fn found(limit: f64, highest: f64) -> (f64, usize) {
        let (mut search, mut steps) = (Search::new(highest), 0);
        while let Some(rate) = search.next() {
            search.note(rate, rate <= limit);
            steps += 1;
            assert!(steps < 20);
        }
        (search.held, steps)
    }

    #[test]
    fn the_limit_is_found_from_below_in_few_steps() {
        for limit in [9_900.0, 7_000.0, 3_000.0, 400.0] {
            let (rate, steps) = found(limit, 10_000.0);
            assert!(rate <= limit && rate >= limit * 0.94 && steps <= STEPS, "{limit}: {rate} in {steps}");
        }
    }

    #[test]
    fn late_slow_or_failed_is_not_held() {
        let latency = Latency { p99_ms: 9.0, ..Latency::default() };
        let good = Outcome { rate_per_s: 990.0, latency, ..Outcome::default() };
        let p99 = Duration::from_millis(10);
        assert!(held(&good, 1_000.0, p99));
        assert!(!held(&good, 1_100.0, p99) && !held(&good, 1_000.0, Duration::from_millis(8)));
        assert!(!held(&Outcome { errors: 1, ..good }, 1_000.0, p99));
    }
}
