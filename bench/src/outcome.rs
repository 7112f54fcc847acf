//! What one work under load gave, ours or a peer's, so that the two can be put side by side. Must never hold a figure
//! that was guessed: what could not be measured is `None`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Histogram, Latency, Spent};

/// One work, run for a while after its warm-up.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// How long it was measured.
    pub seconds: f64,
    /// Units of the work (messages, deliveries, handshakes…) in that time.
    pub count: u64,
    /// Units per second.
    pub rate_per_s: f64,
    /// Of single units.
    pub latency: Latency,
    /// CPU of all server processes together, µs per unit.
    pub server_cpu_us: Option<f64>,
    /// CPU of the process that makes the load, µs per unit.
    pub client_cpu_us: Option<f64>,
    /// Calls of fsync and fdatasync by the servers, per unit.
    pub flushes_per_message: Option<f64>,
    /// What the servers sent to the disk, bytes per unit.
    pub bytes_written_per_message: Option<f64>,
    /// Units that failed; they are not in `count`.
    pub errors: u64,
    /// The first error's text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_error: Option<String>,
    /// What each process used, the servers' by their names and the load generator's as `bench`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub processes: BTreeMap<String, Spent>,
    /// Other figures of the work, units at the end of the names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, f64>,
    /// The latencies themselves, for plots: (percent of the units, at most so many ms).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curve: Vec<(f64, f64)>,
}

impl Outcome {
    /// Begins one with what the load generator counted itself.
    pub fn counted(seconds: f64, count: u64, errors: u64, latencies: &Histogram) -> Self {
        let rate_per_s = if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let (latency, curve) = (latencies.summary(), latencies.curve());
        Self { seconds, count, rate_per_s, latency, errors, curve, ..Self::default() }
    }

    /// `total` per unit; `None` when there were no units.
    pub fn per_unit(&self, total: f64) -> Option<f64> {
        (self.count > 0).then(|| total / self.count as f64)
    }

    /// Adds what the processes used: `client` is the load generator, all others are servers.
    pub fn with_processes(self, client: Spent, servers: BTreeMap<String, Spent>) -> Self {
        self.with_servers(servers).with_benches(BTreeMap::from([("bench".into(), client)]))
    }

    /// Adds what the servers' processes used.
    pub(crate) fn with_servers(mut self, servers: BTreeMap<String, Spent>) -> Self {
        let cpu_us: f64 = servers.values().map(|spent| spent.cpu_us() as f64).sum();
        let written: Option<u64> = servers.values().map(|spent| spent.write_bytes).sum();
        self.server_cpu_us = self.per_unit(cpu_us);
        self.bytes_written_per_message = written.and_then(|bytes| self.per_unit(bytes as f64));
        self.processes.extend(servers);
        self
    }

    /// Adds what the load generators used.
    pub(crate) fn with_benches(mut self, benches: BTreeMap<String, Spent>) -> Self {
        let cpu_us: f64 = benches.values().map(|spent| spent.cpu_us() as f64).sum();
        self.client_cpu_us = self.per_unit(cpu_us);
        self.processes.extend(benches);
        self
    }

    /// CPU of servers and load generator together, µs per unit.
    pub fn cpu_us(&self) -> Option<f64> {
        Some(self.server_cpu_us? + self.client_cpu_us?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_per_unit_and_the_load_generators_are_apart() {
        let server = Spent { user_us: 3_000, system_us: 1_000, write_bytes: Some(8_000), ..Spent::default() };
        let client = Spent { user_us: 500, ..Spent::default() };
        let servers = BTreeMap::from([("a".to_owned(), server), ("b".to_owned(), server)]);
        let outcome = Outcome::counted(2.0, 100, 0, &Histogram::new()).with_processes(client, servers);
        assert_eq!((outcome.rate_per_s, outcome.server_cpu_us, outcome.client_cpu_us), (50.0, Some(80.0), Some(5.0)));
        assert_eq!((outcome.cpu_us(), outcome.bytes_written_per_message), (Some(85.0), Some(160.0)));
        assert_eq!(outcome.processes.len(), 3);
    }

    #[test]
    fn nothing_is_said_of_what_was_not_measured() {
        let unknown = Spent { write_bytes: None, ..Spent::default() };
        let servers = BTreeMap::from([("a".to_owned(), unknown)]);
        let outcome = Outcome::counted(2.0, 100, 0, &Histogram::new()).with_processes(unknown, servers.clone());
        assert_eq!(outcome.bytes_written_per_message, None);
        let none = Outcome::counted(2.0, 0, 7, &Histogram::new()).with_processes(unknown, servers);
        assert_eq!((none.server_cpu_us, none.cpu_us(), none.errors), (None, None, 7));
    }
}
