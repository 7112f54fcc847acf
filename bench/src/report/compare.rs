//! Two reports of the same work: what changed beyond noise. Must never call noise a change because a figure is shown
//! with many digits, nor call two works the same that were not.
//!
//! A figure has changed when the 99 % interval of its ratio (Student's t on the logarithms of the repeats, whose noise is
//! taken to be the same on both sides: three repeats are too few for two of them) does not contain 1, and the ratio of
//! the medians is further from 1 than the figure's floor. The floor stands for what repeats of one run cannot show:
//! another run has other leaders, another layout of memory, another minute of the disk.

use serde::Serialize;

use super::{Report, median};
use crate::{BenchError, Outcome, measure::THREAD_FIGURE};

/// Fewer repeats say nothing about noise.
const MIN_REPEATS: usize = 3;

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Better {
    Higher,
    Lower,
}

/// A figure that is compared.
struct Figure {
    name: &'static str,
    better: Better,
    /// Smaller changes are not told.
    floor: f64,
    of: fn(&Outcome) -> Option<f64>,
}

const FIGURES: &[Figure] = &[
    Figure { name: "rate_per_s", better: Better::Higher, floor: 0.05, of: |o| Some(o.rate_per_s) },
    Figure { name: "p50_ms", better: Better::Lower, floor: 0.05, of: |o| Some(o.latency.p50_ms) },
    Figure { name: "p99_ms", better: Better::Lower, floor: 0.10, of: |o| Some(o.latency.p99_ms) },
    Figure { name: "server_cpu_us", better: Better::Lower, floor: 0.03, of: |o| o.server_cpu_us },
    Figure { name: "client_cpu_us", better: Better::Lower, floor: 0.05, of: |o| o.client_cpu_us },
    Figure { name: "flushes_per_message", better: Better::Lower, floor: 0.10, of: |o| o.flushes_per_message },
    Figure {
        name: "bytes_written_per_message",
        better: Better::Lower,
        floor: 0.05,
        of: |o| o.bytes_written_per_message,
    },
];
/// Of figures that only some works have.
const OTHER_FLOOR: f64 = 0.05;

/// Of a kind of threads: where the scheduler puts them differs from run to run.
const THREAD_FLOOR: f64 = 0.10;

/// What became of a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Nothing beyond noise.
    Same,
    /// It changed for the better.
    Better,
    /// It changed for the worse.
    Worse,
    /// Too few repeats, or nothing was measured.
    Unknown,
}

/// One figure of one phase, before and after.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// Which phase.
    pub phase: String,
    /// Which figure.
    pub figure: String,
    /// Median of the first report's repeats.
    pub before: f64,
    /// Median of the second's.
    pub after: f64,
    /// `after / before`.
    pub ratio: f64,
    /// The 99 % interval of the ratio; absent with too few repeats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
    /// What that means.
    pub verdict: Verdict,
}

/// Compares two reports of the same scenario with the same settings.
pub fn compare(before: &Report, after: &Report) -> Result<Vec<Change>, BenchError> {
    for (what, same) in [
        ("scenarios", before.scenario == after.scenario),
        ("settings", before.settings == after.settings),
        ("clusters", before.cluster == after.cluster),
        ("timings", before.timing == after.timing),
        ("numbers of workers", before.workers.len() == after.workers.len()),
    ] {
        if !same {
            return Err(BenchError::Settings(format!("the reports have different {what}")));
        }
    }
    let mut changes = Vec::new();
    for phase in &before.phases {
        let Some(other) = after.phases.iter().find(|other| other.name == phase.name) else { continue };
        for figure in FIGURES {
            let (old, new) = (all(&phase.runs, figure.of), all(&other.runs, figure.of));
            changes.extend(change(&phase.name, figure.name, figure.better, figure.floor, &old, &new));
        }
        for name in phase.median.figures.keys() {
            let floor = match name {
                name if name.ends_with(THREAD_FIGURE) => THREAD_FLOOR,
                name if name.contains("_bytes_per_") => OTHER_FLOOR,
                _ => continue,
            };
            let of =
                |runs: &[Outcome]| runs.iter().filter_map(|run| run.figures.get(name).copied()).collect::<Vec<_>>();
            let (old, new) = (of(&phase.runs), of(&other.runs));
            changes.extend(change(&phase.name, name, Better::Lower, floor, &old, &new));
        }
        changes.push(errors(&phase.name, phase.median.errors, other.median.errors));
    }
    if changes.is_empty() {
        return Err(BenchError::Settings("the reports have no phase in common".into()));
    }
    Ok(changes)
}

fn all(runs: &[Outcome], of: fn(&Outcome) -> Option<f64>) -> Vec<f64> {
    runs.iter().filter_map(of).collect()
}

/// Errors need no statistics.
fn errors(phase: &str, before: u64, after: u64) -> Change {
    let verdict = match after.cmp(&before) {
        std::cmp::Ordering::Less => Verdict::Better,
        std::cmp::Ordering::Equal => Verdict::Same,
        std::cmp::Ordering::Greater => Verdict::Worse,
    };
    let (before, after) = (before as f64, after as f64);
    let ratio = if before == after { 1.0 } else { after / before.max(1.0) };
    Change { phase: phase.into(), figure: "errors".into(), before, after, ratio, interval: None, verdict }
}

/// `None` where one side lacks the figure, or it is zero on both.
fn change(phase: &str, figure: &str, better: Better, floor: f64, old: &[f64], new: &[f64]) -> Option<Change> {
    let (before, after) = (median(old)?, median(new)?);
    if before <= 0.0 && after <= 0.0 {
        return None;
    }
    let ratio = after / before;
    let interval = interval(old, new);
    let verdict = match interval {
        None => Verdict::Unknown,
        Some((low, high)) if (low..=high).contains(&1.0) || (ratio - 1.0).abs() <= floor => Verdict::Same,
        Some(_) if (ratio > 1.0) == (better == Better::Higher) => Verdict::Better,
        Some(_) => Verdict::Worse,
    };
    Some(Change { phase: phase.into(), figure: figure.into(), before, after, ratio, interval, verdict })
}

/// The 99 % interval of new / old.
fn interval(old: &[f64], new: &[f64]) -> Option<(f64, f64)> {
    let enough = old.len() >= MIN_REPEATS && new.len() >= MIN_REPEATS;
    if !enough || old.iter().chain(new).any(|value| *value <= 0.0) {
        return None;
    }
    let ((mean_old, squares_old), (mean_new, squares_new)) = (log_mean(old), log_mean(new));
    let (count_old, count_new) = (old.len() as f64, new.len() as f64);
    let freedom = count_old + count_new - 2.0;
    let variance = (squares_old + squares_new) / freedom;
    let half = t_99(freedom) * (variance * (1.0 / count_old + 1.0 / count_new)).sqrt();
    let difference = mean_new - mean_old;
    Some(((difference - half).exp(), (difference + half).exp()))
}

/// Mean of the logarithms, and the sum of the squares of what they are off it.
fn log_mean(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().map(|value| value.ln()).sum::<f64>() / values.len() as f64;
    (mean, values.iter().map(|value| (value.ln() - mean).powi(2)).sum())
}

/// Student's t that 99 % of a distribution lie within.
fn t_99(freedom: f64) -> f64 {
    const SMALL: [f64; 20] = [
        63.66, 9.92, 5.84, 4.60, 4.03, 3.71, 3.50, 3.36, 3.25, 3.17, 3.11, 3.05, 3.01, 2.98, 2.95, 2.92, 2.90, 2.88,
        2.86, 2.85,
    ];
    let whole = freedom.floor().max(1.0);
    match SMALL.get(whole as usize - 1) {
        Some(t) => *t,
        None if whole < 60.0 => 2.85,
        None => 2.66,
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::{
        Latency, Size, Timing,
        report::{Cluster, Phase},
    };

    /// A run whose figures scatter by `noise`; `slower` is what everything costs more.
    fn report(random: &mut StdRng, noise: f64, slower: f64) -> Report {
        let mut runs = Vec::new();
        for _ in 0..3 {
            let mut about = |value: f64| value * (1.0 + noise * (random.random::<f64>() * 2.0 - 1.0));
            let latency = Latency { p50_ms: about(4.0) * slower, p99_ms: about(12.0) * slower, ..Latency::default() };
            runs.push(Outcome {
                rate_per_s: about(50_000.0) / slower,
                latency,
                server_cpu_us: Some(about(30.0) * slower),
                client_cpu_us: Some(about(5.0)),
                flushes_per_message: Some(about(0.01)),
                ..Outcome::default()
            });
        }
        let timing = Timing { warm_up_s: 1.0, seconds: 5.0, repeats: 3 };
        let mut report = Report::begin("send", Cluster::local(Size::default()), &"s", timing);
        report.phases = vec![Phase::new("send", runs)];
        report
    }

    fn verdict(changes: &[Change], figure: &str) -> Verdict {
        changes.iter().find(|change| change.figure == figure).unwrap().verdict
    }

    #[test]
    fn a_planted_fifth_is_found_and_told_with_its_direction() {
        let mut random = StdRng::seed_from_u64(1);
        for _ in 0..50 {
            let (before, after) = (report(&mut random, 0.03, 1.0), report(&mut random, 0.03, 1.2));
            let changes = compare(&before, &after).unwrap();
            for figure in ["rate_per_s", "server_cpu_us"] {
                assert_eq!(verdict(&changes, figure), Verdict::Worse, "{changes:?}");
            }
            assert_eq!(verdict(&changes, "client_cpu_us"), Verdict::Same);
            let back = compare(&after, &before).unwrap();
            assert_eq!(verdict(&back, "rate_per_s"), Verdict::Better);
            assert!(back.iter().all(|change| change.verdict != Verdict::Worse));
        }
    }

    #[test]
    fn runs_of_the_same_thing_are_the_same() {
        let mut random = StdRng::seed_from_u64(2);
        let mut alarms = 0;
        for noise in [0.0, 0.01, 0.05, 0.2] {
            for _ in 0..100 {
                let (before, after) = (report(&mut random, noise, 1.0), report(&mut random, noise, 1.0));
                let changes = compare(&before, &after).unwrap();
                alarms += changes.iter().filter(|change| change.verdict == Verdict::Worse).count();
            }
        }
        // 400 comparisons of 6 figures; one in 200 is beyond a 99 % interval on that side.
        assert!(alarms <= 30, "{alarms} alarms");
    }

    #[test]
    fn what_cannot_be_compared_is_not() {
        let mut random = StdRng::seed_from_u64(3);
        let one = report(&mut random, 0.0, 1.0);
        let other = Report { settings: "other".into(), ..one.clone() };
        assert!(matches!(compare(&one, &other), Err(BenchError::Settings(_))));
        let mut short = report(&mut random, 0.0, 1.2);
        short.phases[0].runs.truncate(2);
        assert_eq!(verdict(&compare(&one, &short).unwrap(), "rate_per_s"), Verdict::Unknown);
    }

    #[test]
    fn new_errors_are_worse() {
        let mut random = StdRng::seed_from_u64(4);
        let (before, mut after) = (report(&mut random, 0.0, 1.0), report(&mut random, 0.0, 1.0));
        after.phases[0].median.errors = 1;
        assert_eq!(verdict(&compare(&before, &after).unwrap(), "errors"), Verdict::Worse);
        assert_eq!(verdict(&compare(&before, &before).unwrap(), "errors"), Verdict::Same);
    }
}
