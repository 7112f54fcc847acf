//! Joins what workers noted in the same part of a run. Must never average what can be added: rates are summed, and
//! percentiles are those of all latencies together.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    Outcome, Spent,
    measure::Cost,
    meter::{Meters, Tally},
};

/// What one worker noted between two cuts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Part {
    /// From cut to cut, by the worker's clock.
    pub(crate) elapsed: Duration,
    /// The units of the work.
    pub(crate) units: Tally,
    /// What else took time, by name.
    pub(crate) others: Vec<(String, Tally)>,
    /// What its process used.
    pub(crate) own: Spent,
}

impl Part {
    /// What was noted in the time since a cut.
    pub(crate) fn taken(meters: &Meters, elapsed: Duration, own: Spent) -> Self {
        let (units, others) = meters.take();
        let others = others.into_iter().map(|(name, tally)| (name.to_owned(), tally)).collect();
        Self { elapsed, units, others, own }
    }
}

/// The outcome of a part that all workers ended at the same cut: rates are summed. Parts come with the names of the
/// workers' processes.
pub(crate) fn joined(parts: Vec<(String, Part)>, cost: Cost) -> Outcome {
    let rate = |part: &Part| part.units.count as f64 / part.elapsed.as_secs_f64().max(1e-9);
    let rate_per_s = parts.iter().map(|(_, part)| rate(part)).sum();
    let seconds: f64 = parts.iter().map(|(_, part)| part.elapsed.as_secs_f64()).sum();
    let seconds = seconds / parts.len().max(1) as f64;
    Outcome { rate_per_s, ..outcome(parts, cost, seconds) }
}

/// The outcome of a part that each worker ended when it had done its share: it took as long as the coordinator saw.
pub(crate) fn done(parts: Vec<(String, Part)>, cost: Cost) -> Outcome {
    let seconds = cost.elapsed.as_secs_f64();
    outcome(parts, cost, seconds)
}

fn outcome(parts: Vec<(String, Part)>, cost: Cost, seconds: f64) -> Outcome {
    let (mut units, mut others, mut benches) = (Tally::default(), BTreeMap::<String, Tally>::new(), BTreeMap::new());
    for (name, part) in parts {
        units.add(&part.units);
        part.others.iter().for_each(|(meter, tally)| others.entry(meter.clone()).or_default().add(tally));
        benches.insert(name, part.own);
    }
    let mut outcome = Outcome::counted(seconds, units.count, units.errors, &units.latencies);
    outcome.first_error = units.first_error;
    for (name, tally) in others {
        if tally.count > 0 {
            outcome.figures.insert(format!("{name}_count"), tally.count as f64);
            outcome.figures.insert(format!("{name}_p50_ms"), tally.latencies.percentile_ms(50.0));
            outcome.figures.insert(format!("{name}_p99_ms"), tally.latencies.percentile_ms(99.0));
        }
        outcome.errors += tally.errors;
        outcome.first_error = outcome.first_error.or(tally.first_error);
    }
    cost.of(outcome, benches)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(seconds: f64, ms: &[u64], cpu_us: u64) -> Part {
        let mut units = Tally { count: ms.len() as u64, errors: 1, ..Tally::default() };
        ms.iter().for_each(|ms| units.latencies.record(Duration::from_millis(*ms)));
        let late = (String::from("late"), units.clone());
        let own = Spent { user_us: cpu_us, ..Spent::default() };
        Part { elapsed: Duration::from_secs_f64(seconds), units, others: vec![late], own }
    }

    #[test]
    fn rates_are_summed_and_percentiles_are_those_of_all_latencies() {
        let slow: Vec<u64> = vec![1_000; 10];
        let parts = vec![("bench-1".into(), part(2.0, &[1; 90], 50)), ("bench-2".into(), part(2.0, &slow, 150))];
        let outcome = joined(parts, Cost::default());
        assert_eq!((outcome.count, outcome.rate_per_s, outcome.seconds), (100, 50.0, 2.0));
        // The mean of both p50 would be half a second.
        assert!(outcome.latency.p50_ms < 1.1 && outcome.latency.p99_ms > 990.0, "{outcome:?}");
        assert_eq!((outcome.errors, outcome.figures["late_count"]), (4, 100.0));
        assert_eq!((outcome.client_cpu_us, outcome.server_cpu_us), (Some(2.0), None));
        assert_eq!(outcome.processes.keys().collect::<Vec<_>>(), ["bench-1", "bench-2"]);
    }

    #[test]
    fn a_share_that_is_done_sooner_does_not_make_the_whole_faster() {
        let parts = vec![("bench-1".into(), part(1.0, &[1; 10], 0)), ("bench-2".into(), part(4.0, &[1; 10], 0))];
        let cost = Cost { elapsed: Duration::from_secs(4), ..Cost::default() };
        assert_eq!(done(parts, cost).rate_per_s, 5.0);
    }
}
