//! The table of a comparison: medians over interleaved repeats, for people and as JSON. Must never show a row as
//! measured that was not, nor leave one out.

use serde::{Deserialize, Serialize};

use super::{
    idle, parked,
    works::{Goal, Metric, Side, Work},
};
use crate::Outcome;

/// One figure beside another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The work's short name.
    pub work: String,
    /// What it is, with our shard count.
    pub what: String,
    /// Beside whom.
    pub against: String,
    /// What is compared, with its unit.
    pub metric: String,
    /// Ours, median of the repeats.
    pub ours: Option<f64>,
    /// Theirs, median of the repeats.
    pub theirs: Option<f64>,
    /// Median of ours by theirs, repeat by repeat.
    pub ratio: Option<f64>,
    /// What we promise; `None` when nothing.
    pub goal: Option<String>,
    /// Whether it holds; `None` without a goal or without figures.
    pub held: Option<bool>,
    /// How many repeats.
    pub repeats: usize,
    /// Why there are no figures, or what is wrong with them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// All rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// In the order of the works.
    pub rows: Vec<Row>,
}

/// The figure of an outcome; `None` when it has none.
pub fn value(outcome: &Outcome, metric: Metric) -> Option<f64> {
    if outcome.count == 0 {
        return None;
    }
    match metric {
        Metric::Rate => Some(outcome.rate_per_s),
        Metric::Cpu => outcome.cpu_us(),
        Metric::P50 => Some(outcome.latency.p50_ms),
        Metric::P99 => Some(outcome.latency.p99_ms),
        Metric::Flushes => outcome.flushes_per_message,
        Metric::IdleBytes => outcome.figures.get(idle::BYTES).copied(),
        Metric::CorePercent => outcome.figures.get(parked::PERCENT).copied(),
        Metric::ReplicaBytes => outcome.figures.get(parked::REPLICA_BYTES).copied(),
        Metric::PerCore => per_core(outcome.server_cpu_us?),
        Metric::GatewayPerCore => {
            let gateways = outcome.processes.iter().filter(|(name, _)| name.starts_with("gateway"));
            let spent: Vec<_> = gateways.map(|(_, spent)| spent.cpu_us() as f64).collect();
            match spent.is_empty() {
                true => per_core(outcome.server_cpu_us?),
                false => per_core(outcome.per_unit(spent.iter().sum())?),
            }
        }
    }
}

fn per_core(cpu_us: f64) -> Option<f64> {
    (cpu_us > 0.0).then(|| 1e6 / cpu_us)
}

/// The middle one, or the mean of the two in the middle; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// The rows of one peer of a work. `pairs` are ours and theirs of each repeat; an error says why there are none.
pub fn rows(work: &Work, side: &Side, pairs: &Result<Vec<(Outcome, Outcome)>, String>) -> Vec<Row> {
    let row = |&(metric, goal): &(Metric, Goal)| {
        let empty = Row {
            work: work.name.into(),
            what: work.what.into(),
            against: side.against.name().into(),
            metric: metric.name().into(),
            ours: None,
            theirs: None,
            ratio: None,
            goal: goal.text(),
            held: None,
            repeats: 0,
            note: None,
        };
        match pairs {
            Err(why) => Row { note: Some(why.clone()), ..empty },
            Ok(pairs) => filled(empty, metric, goal, pairs),
        }
    };
    side.rows.iter().map(row).collect()
}

fn filled(empty: Row, metric: Metric, goal: Goal, pairs: &[(Outcome, Outcome)]) -> Row {
    let mine: Vec<f64> = pairs.iter().filter_map(|(ours, _)| value(ours, metric)).collect();
    let other: Vec<f64> = pairs.iter().filter_map(|(_, theirs)| value(theirs, metric)).collect();
    let ratios: Vec<f64> = pairs
        .iter()
        .filter_map(|(ours, theirs)| Some(value(ours, metric)? / value(theirs, metric)?))
        .filter(|ratio| ratio.is_finite())
        .collect();
    let (ours, theirs, ratio) = (median(&mine), median(&other), median(&ratios));
    // A goal of ours alone needs no ratio.
    let held = match goal {
        Goal::OursAtMost(_) => ours.and_then(|ours| goal.held(ours, f64::NAN)),
        _ => ours.zip(ratio).and_then(|(ours, ratio)| goal.held(ours, ratio)),
    };
    // What is fast because it fails keeps no promise.
    let held = held.map(|held| held && pairs.iter().all(|(ours, _)| ours.errors == 0));
    Row { ours, theirs, ratio, held, repeats: pairs.len(), note: note(pairs, ours, theirs), ..empty }
}

fn note(pairs: &[(Outcome, Outcome)], ours: Option<f64>, theirs: Option<f64>) -> Option<String> {
    let errors = |of: fn(&(Outcome, Outcome)) -> &Outcome| -> (u64, Option<String>) {
        let first = pairs.iter().find_map(|pair| of(pair).first_error.clone());
        (pairs.iter().map(|pair| of(pair).errors).sum(), first)
    };
    let mut notes = Vec::new();
    for (whose, (count, first)) in [("ours", errors(|pair| &pair.0)), ("theirs", errors(|pair| &pair.1))] {
        if count > 0 {
            notes.push(format!("{whose}: {count} errors ({})", first.unwrap_or_default()));
        }
    }
    match (ours, theirs) {
        (None, None) => notes.push("neither side could be measured".into()),
        (None, _) => notes.push("ours could not be measured".into()),
        (_, None) => notes.push("theirs could not be measured".into()),
        _ => {}
    }
    (!notes.is_empty()).then(|| notes.join("; "))
}

impl Table {
    /// How many rows have no figures of ours, or none that a promise could be held against.
    pub fn lacking(&self) -> usize {
        self.rows.iter().filter(|row| row.ours.is_none() || row.goal.is_some() && row.held.is_none()).count()
    }

    /// How many promises were measured and do not hold.
    pub fn missed(&self) -> usize {
        self.rows.iter().filter(|row| row.held == Some(false)).count()
    }

    /// For people, in Markdown.
    pub fn text(&self) -> String {
        let mut text = String::from("| work | against | metric | ours | theirs | ratio | goal | held |\n");
        text.push_str("|---|---|---|---|---|---|---|---|\n");
        for row in &self.rows {
            let held = match row.held {
                Some(true) => "yes",
                Some(false) => "**no**",
                None => "",
            };
            let figures = [row.ours, row.theirs, row.ratio].map(|value| value.map_or_else(|| "–".into(), short));
            let [ours, theirs, ratio] = figures;
            let (goal, note) = (row.goal.as_deref().unwrap_or(""), row.note.as_deref().unwrap_or(""));
            let held = [held, note].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ");
            let Row { work, what, against, metric, .. } = row;
            text.push_str(&format!(
                "| `{work}` {what} | {against} | {metric} | {ours} | {theirs} | {ratio} | {goal} | {held} |\n"
            ));
        }
        text
    }
}

/// Three digits that mean something.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        v if v >= 0.1 => 3,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    let (whole, rest) = text.split_once('.').map_or((text.as_str(), None), |(whole, rest)| (whole, Some(rest)));
    let mut grouped = String::new();
    for (n, digit) in whole.chars().enumerate() {
        if n > 0 && (whole.len() - n).is_multiple_of(3) && digit.is_ascii_digit() && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    rest.map_or(grouped.clone(), |rest| format!("{grouped}.{rest}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        Histogram, Spent,
        peers::works::{self, Against},
    };

    fn outcome(rate: f64, cpu_us: f64) -> Outcome {
        let mut outcome = Outcome::counted(1.0, rate as u64, 0, &Histogram::new());
        (outcome.server_cpu_us, outcome.client_cpu_us) = (Some(cpu_us), Some(0.0));
        outcome
    }

    fn one() -> (Work, Side) {
        let work = works::all().into_iter().find(|work| work.name == "one-1024").unwrap();
        let side = work.sides[0].clone();
        (work, side)
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_those_of_the_repeats_and_goals_are_judged_by_them() {
        let (work, side) = one();
        // One repeat in which the disk was slow for both does not move the ratio.
        let pairs = vec![
            (outcome(3_000.0, 10.0), outcome(1_000.0, 50.0)),
            (outcome(300.0, 10.0), outcome(100.0, 50.0)),
            (outcome(2_900.0, 30.0), outcome(1_000.0, 50.0)),
        ];
        let rows = rows(&work, &side, &Ok(pairs));
        assert_eq!((rows[0].ours, rows[0].theirs, rows[0].ratio), (Some(2_900.0), Some(1_000.0), Some(3.0)));
        assert_eq!((rows[0].held, rows[1].held, rows[1].ratio), (Some(true), Some(true), Some(0.2)));
        assert_eq!((rows[3].ours, rows[3].held, rows[3].repeats), (None, None, 3), "flushes were not counted");
        assert!(rows[3].note.as_deref().unwrap().contains("neither"));
    }

    #[test]
    fn a_peer_that_is_missing_is_said_to_be_in_every_row() {
        let (work, side) = one();
        let rows = rows(&work, &side, &Err("missing: nats-server is not installed".into()));
        assert_eq!(rows.len(), side.rows.len());
        assert!(rows.iter().all(|row| row.ours.is_none() && row.held.is_none() && row.note.is_some()));
        let table = Table { rows };
        assert_eq!((table.lacking(), table.missed()), (side.rows.len(), 0));
        assert_eq!(table.text().matches("nats-server is not installed").count(), side.rows.len());
    }

    #[test]
    fn errors_are_told_and_nothing_is_made_of_no_messages() {
        let (work, side) = one();
        let mut broken = outcome(0.0, 1.0);
        (broken.errors, broken.first_error) = (7, Some("refused".into()));
        let rows = rows(&work, &side, &Ok(vec![(outcome(10.0, 1.0), broken)]));
        assert_eq!((rows[0].ours, rows[0].theirs, rows[0].ratio, rows[0].held), (Some(10.0), None, None, None));
        assert_eq!(rows[0].note.as_deref(), Some("theirs: 7 errors (refused); theirs could not be measured"));
        assert_eq!(Table { rows }.lacking(), 3, "two promises beside nothing, and no flushes");
    }

    #[test]
    fn sends_of_ours_that_failed_keep_no_promise() {
        let (work, side) = one();
        let failed = Outcome { errors: 1, ..outcome(3_000.0, 10.0) };
        let pairs = vec![(outcome(3_000.0, 10.0), outcome(1_000.0, 50.0)), (failed, outcome(1_000.0, 50.0))];
        let rows = rows(&work, &side, &Ok(pairs));
        assert_eq!((rows[0].ratio, rows[0].held), (Some(3.0), Some(false)));
    }

    #[test]
    fn the_gateways_own_core_is_told_apart() {
        let spent = |us| Spent { user_us: us, ..Spent::default() };
        let servers = BTreeMap::from([("broker-1".to_owned(), spent(9_000)), ("gateway-1".to_owned(), spent(1_000))]);
        let ours = Outcome::counted(1.0, 100, 0, &Histogram::new()).with_processes(spent(0), servers);
        assert_eq!((value(&ours, Metric::GatewayPerCore), value(&ours, Metric::PerCore)), (Some(1e5), Some(1e4)));
        let servers = BTreeMap::from([("bare-quic".to_owned(), spent(1_000))]);
        let bare = Outcome::counted(1.0, 100, 0, &Histogram::new()).with_processes(spent(0), servers);
        assert_eq!(value(&bare, Metric::GatewayPerCore), Some(1e5));
    }

    #[test]
    fn json_has_the_names_that_programs_read() {
        let (work, side) = one();
        assert_eq!(side.against, Against::NatsAlways);
        let rows = rows(&work, &side, &Ok(vec![(outcome(30.0, 10.0), outcome(10.0, 50.0))]));
        let json = serde_json::to_value(Table { rows: rows[..1].to_vec() }).unwrap();
        let expected = serde_json::json!({"rows": [{
            "work": "one-1024", "what": work.what, "against": "NATS JetStream R3, sync always", "metric": "rate/s",
            "ours": 30.0, "theirs": 10.0, "ratio": 3.0, "goal": "≥ 3×", "held": true, "repeats": 1,
        }]});
        assert_eq!(json, expected);
    }

    #[test]
    fn figures_are_short() {
        let shown = [1_234_567.0, 999.6, 12.34, 1.234, 0.1234, 0.01234, -1_234.0].map(short);
        assert_eq!(shown, ["1,234,567", "1,000", "12.3", "1.23", "0.123", "0.0123", "-1,234"]);
    }
}
