//! The middle of several repeats, figure by figure. Must never mix figures: what one repeat lacks, the median lacks.

use std::collections::BTreeMap;

use crate::{Latency, Outcome, Spent};

/// The middle one; between two, their mean. `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(sorted[middle - 1].midpoint(sorted[middle])),
    }
}

/// Of outcomes; errors are summed, so that none of them disappears.
pub fn median_of(runs: &[Outcome]) -> Outcome {
    let of = |field: &dyn Fn(&Outcome) -> f64| median(&runs.iter().map(field).collect::<Vec<_>>()).unwrap_or(0.0);
    let optional = |field: &dyn Fn(&Outcome) -> Option<f64>| {
        let known: Vec<f64> = runs.iter().filter_map(field).collect();
        median(&known).filter(|_| known.len() == runs.len())
    };
    Outcome {
        seconds: of(&|run| run.seconds),
        count: of(&|run| run.count as f64) as u64,
        rate_per_s: of(&|run| run.rate_per_s),
        latency: latency(runs),
        server_cpu_us: optional(&|run| run.server_cpu_us),
        client_cpu_us: optional(&|run| run.client_cpu_us),
        flushes_per_message: optional(&|run| run.flushes_per_message),
        bytes_written_per_message: optional(&|run| run.bytes_written_per_message),
        errors: runs.iter().map(|run| run.errors).sum(),
        first_error: runs.iter().find_map(|run| run.first_error.clone()),
        processes: by_name(runs, |run| &run.processes, |spent| median_spent(&spent)),
        figures: by_name(runs, |run| &run.figures, |values| median(&values).unwrap_or(0.0)),
        // Of a single repeat, the one in the middle by rate: points of different runs make no curve.
        curve: middle(runs).map(|run| run.curve.clone()).unwrap_or_default(),
    }
}

fn middle(runs: &[Outcome]) -> Option<&Outcome> {
    let mut sorted: Vec<&Outcome> = runs.iter().collect();
    sorted.sort_by(|a, b| a.rate_per_s.total_cmp(&b.rate_per_s));
    sorted.get(sorted.len() / 2).copied()
}

fn latency(runs: &[Outcome]) -> Latency {
    let of = |field: &dyn Fn(&Latency) -> f64| {
        median(&runs.iter().map(|run| field(&run.latency)).collect::<Vec<_>>()).unwrap_or(0.0)
    };
    Latency {
        count: of(&|l| l.count as f64) as u64,
        mean_ms: of(&|l| l.mean_ms),
        p50_ms: of(&|l| l.p50_ms),
        p90_ms: of(&|l| l.p90_ms),
        p99_ms: of(&|l| l.p99_ms),
        p999_ms: of(&|l| l.p999_ms),
        max_ms: of(&|l| l.max_ms),
    }
}

fn by_name<T: Clone, U>(
    runs: &[Outcome],
    map: impl Fn(&Outcome) -> &BTreeMap<String, T>,
    join: impl Fn(Vec<T>) -> U,
) -> BTreeMap<String, U> {
    let names = runs.first().map(|run| map(run).keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    let all = |name: &String| -> Vec<T> { runs.iter().filter_map(|run| map(run).get(name).cloned()).collect() };
    let everywhere = names.into_iter().map(|name| (all(&name), name)).filter(|(values, _)| values.len() == runs.len());
    everywhere.map(|(values, name)| (name, join(values))).collect()
}

fn median_spent(all: &[Spent]) -> Spent {
    let of = |field: &dyn Fn(&Spent) -> u64| {
        median(&all.iter().map(|spent| field(spent) as f64).collect::<Vec<_>>()).unwrap_or(0.0) as u64
    };
    let written: Vec<f64> = all.iter().filter_map(|spent| spent.write_bytes).map(|bytes| bytes as f64).collect();
    Spent {
        user_us: of(&|s| s.user_us),
        system_us: of(&|s| s.system_us),
        rss_kib: of(&|s| s.rss_kib),
        anonymous_kib: of(&|s| s.anonymous_kib),
        voluntary_switches: of(&|s| s.voluntary_switches),
        involuntary_switches: of(&|s| s.involuntary_switches),
        write_bytes: median(&written).filter(|_| written.len() == all.len()).map(|bytes| bytes as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_is_found_whatever_the_order() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn one_wild_repeat_does_not_show_but_its_errors_do() {
        let run = |rate: f64, errors: u64| Outcome {
            rate_per_s: rate,
            errors,
            server_cpu_us: Some(1_000.0 / rate),
            figures: BTreeMap::from([("x".to_owned(), rate)]),
            curve: vec![(50.0, rate)],
            ..Outcome::default()
        };
        let all = median_of(&[run(100.0, 0), run(1.0, 5), run(110.0, 0)]);
        assert_eq!((all.rate_per_s, all.errors, all.figures["x"]), (100.0, 5, 100.0));
        assert_eq!((all.server_cpu_us, all.curve), (Some(10.0), vec![(50.0, 100.0)]));
    }

    #[test]
    fn what_one_repeat_lacks_the_median_lacks() {
        let known = Outcome { flushes_per_message: Some(1.0), ..Outcome::default() };
        assert_eq!(median_of(&[known.clone(), Outcome::default()]).flushes_per_message, None);
        assert_eq!(median_of(&[known.clone(), known]).flushes_per_message, Some(1.0));
    }
}
