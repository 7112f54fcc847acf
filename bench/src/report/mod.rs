//! What a run gives out: everything that is needed to judge it and to run it again. Must never be changed in a way that
//! an older report could be read wrongly: then `format` counts up.

mod compare;
mod html;
mod machine;
mod median;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use compare::{Change, Verdict, compare};
pub use html::page;
pub use machine::Machine;
pub use median::{median, median_of};

use crate::{BenchError, Outcome, Size, Timing};

/// The format of this version.
pub const FORMAT: u32 = 1;

/// A part of a run: one work, measured several times.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// Each repeat.
    pub runs: Vec<Outcome>,
    /// Figure by figure the median of the repeats.
    pub median: Outcome,
}

impl Phase {
    /// Of its repeats.
    pub fn new(name: impl Into<String>, runs: Vec<Outcome>) -> Self {
        let median = median_of(&runs);
        Self { name: name.into(), runs, median }
    }
}

/// The cluster that was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Started for this run, on this machine.
    pub local: bool,
    /// Brokers.
    pub brokers: u32,
    /// Gateways.
    pub gateways: u32,
    /// Data shards; `None` when the cluster was there before.
    pub shards: Option<u32>,
}

impl Cluster {
    /// One that was started for this run.
    pub fn local(size: Size) -> Self {
        Self { local: true, brokers: size.brokers, gateways: size.gateways, shards: Some(size.shards) }
    }
}

/// A load generator that was a process of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// As it stands among the processes.
    pub process: String,
    /// As the coordinator was told to dial it.
    pub address: String,
    /// Where it made its share of the load.
    pub machine: Machine,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// Of the program.
    pub version: String,
    /// When it began, RFC 3339.
    pub began: String,
    /// Which scenario.
    pub scenario: String,
    /// Where the load was made, or led, if there were workers.
    pub machine: Machine,
    /// Who made the load together; empty when it was made by this process alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<Worker>,
    /// What was loaded.
    pub cluster: Cluster,
    /// The scenario's settings.
    pub settings: Value,
    /// How long each phase was measured.
    pub timing: Timing,
    /// What came out.
    pub phases: Vec<Phase>,
}

impl Report {
    /// One without phases; its machine is looked at now, before the load.
    pub fn begin(scenario: &str, cluster: Cluster, settings: &impl Serialize, timing: Timing) -> Self {
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            began: chrono::Local::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, false),
            scenario: scenario.into(),
            machine: Machine::this(&std::env::temp_dir()),
            workers: Vec::new(),
            cluster,
            settings: serde_json::to_value(settings).unwrap_or_default(),
            timing,
            phases: Vec::new(),
        }
    }

    /// Reads one that was written before.
    pub fn read(path: &Path) -> Result<Self, BenchError> {
        let text = std::fs::read(path).map_err(BenchError::io(format!("read {}", path.display())))?;
        let value: Value = serde_json::from_slice(&text)
            .map_err(|error| BenchError::Settings(format!("{} is no report: {error}", path.display())))?;
        if value["format"] != FORMAT {
            return Err(BenchError::Settings(format!("{} is no report of format {FORMAT}", path.display())));
        }
        serde_json::from_value(value)
            .map_err(|error| BenchError::Settings(format!("{} is no report: {error}", path.display())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_back_and_another_format_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let timing = Timing { warm_up_s: 1.0, seconds: 2.0, repeats: 3 };
        let settings = serde_json::json!({ "window": 64 });
        let mut report = Report::begin("send", Cluster::local(Size::default()), &settings, timing);
        report.phases.push(Phase::new("send", vec![Outcome { count: 7, rate_per_s: 3.5, ..Outcome::default() }]));
        let path = dir.path().join("a.json");
        std::fs::write(&path, serde_json::to_vec(&report).unwrap()).unwrap();
        assert_eq!(Report::read(&path).unwrap(), report);
        report.format = 2;
        std::fs::write(&path, serde_json::to_vec(&report).unwrap()).unwrap();
        assert!(matches!(Report::read(&path), Err(BenchError::Settings(_))));
        assert!(matches!(Report::read(dir.path()), Err(BenchError::Io { .. })));
    }
}
