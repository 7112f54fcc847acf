//! The broker's figures for Prometheus. Must never cost a lock or an allocation on the paths of a message: counters
//! are atomics, gauges are read when somebody scrapes.

use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use stentor_raft_store::Stats;

/// Everything that a broker counts.
pub(crate) struct Metrics {
    /// Commands that were proposed.
    pub(crate) proposals: Counter,
    /// Commands that were refused before they were proposed, for want of room.
    pub(crate) overloads: Counter,
    /// Entries that were proposed.
    pub(crate) bundles: Counter,
    /// Commands of one entry.
    pub(crate) commands_per_bundle: Histogram,
    /// Events carried to gateways.
    pub(crate) live_events: Counter,
    /// Events not carried to a gateway whose stream was full; it pulls them later.
    pub(crate) live_dropped: Counter,
    /// Pages read.
    pub(crate) pages: Counter,
    /// Streams to peers that were opened.
    pub(crate) peer_connects: Counter,
    /// Snapshots received from peers and installed.
    pub(crate) snapshots_received: Counter,
    /// Entries purged from the logs of all replicas here.
    pub(crate) purged: Gauge,
    /// Gateways attached.
    pub(crate) gateways: Gauge,
    /// Shards led here.
    pub(crate) leaders: Gauge,
    /// Replicas hosted here.
    pub(crate) replicas: Gauge,
    /// Replicas that are parked.
    pub(crate) parked: Gauge,
    /// Entries committed and not yet applied, the worst of all replicas.
    pub(crate) apply_lag: Gauge,
    store: StoreGauges,
    registry: Mutex<Registry>,
}

/// Copies of what the store counts.
#[derive(Default)]
struct StoreGauges {
    wal_syncs: Gauge<i64>,
    wal_operations: Gauge<i64>,
    wal_bytes: Gauge<i64>,
    entries_applied: Gauge<i64>,
    commands_applied: Gauge<i64>,
    loads: Gauge<i64>,
    checkpoints: Gauge<i64>,
    dirty_bytes: Gauge<i64>,
    clean_bytes: Gauge<i64>,
    undurable_log_bytes: Gauge<i64>,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            proposals: Counter::<u64, AtomicU64>::default(),
            overloads: Counter::default(),
            bundles: Counter::default(),
            commands_per_bundle: Histogram::new([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 512.0, 4096.0]),
            live_events: Counter::default(),
            live_dropped: Counter::default(),
            pages: Counter::default(),
            peer_connects: Counter::default(),
            snapshots_received: Counter::default(),
            purged: Gauge::default(),
            gateways: Gauge::default(),
            leaders: Gauge::default(),
            replicas: Gauge::default(),
            parked: Gauge::default(),
            apply_lag: Gauge::default(),
            store: StoreGauges::default(),
            registry: Mutex::new(Registry::default()),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&self) {
        let mut registry = self.registry.lock();
        let broker = registry.sub_registry_with_prefix("stentor_broker");
        broker.register("proposals", "Commands proposed", self.proposals.clone());
        broker.register("overloads", "Commands refused for want of room", self.overloads.clone());
        broker.register("bundles", "Entries proposed", self.bundles.clone());
        broker.register(
            "bundle_commands",
            "Commands of one entry, each send of a run counted",
            self.commands_per_bundle.clone(),
        );
        broker.register("live_events", "Events carried to gateways", self.live_events.clone());
        broker.register("live_dropped_events", "Events that a gateway must pull", self.live_dropped.clone());
        broker.register("read_pages", "Pages read", self.pages.clone());
        broker.register("peer_connects", "Streams to peers that were opened", self.peer_connects.clone());
        broker.register("received_snapshots", "Snapshots installed", self.snapshots_received.clone());
        broker.register("purged_entries", "Log entries purged, of all replicas", self.purged.clone());
        broker.register("attached_gateways", "Gateways attached", self.gateways.clone());
        broker.register("led_shards", "Shards led here", self.leaders.clone());
        broker.register("hosted_replicas", "Replicas hosted here", self.replicas.clone());
        broker.register("parked_replicas", "Replicas that are parked", self.parked.clone());
        broker.register("apply_lag_entries", "Entries committed and not applied", self.apply_lag.clone());
        let store = registry.sub_registry_with_prefix("stentor_store");
        let s = &self.store;
        store.register("wal_syncs", "Batches fsynced", s.wal_syncs.clone());
        store.register("wal_operations", "Operations in them", s.wal_operations.clone());
        store.register_with_unit("wal", "Entries in them", Unit::Bytes, s.wal_bytes.clone());
        store.register("applied_entries", "Entries applied", s.entries_applied.clone());
        store.register("applied_commands", "Commands applied", s.commands_applied.clone());
        store.register("row_loads", "Entries that waited for rows from disk", s.loads.clone());
        store.register("checkpoints", "Checkpoints written", s.checkpoints.clone());
        store.register_with_unit("dirty_rows", "Rows not on disk", Unit::Bytes, s.dirty_bytes.clone());
        store.register_with_unit("clean_rows", "Rows cached", Unit::Bytes, s.clean_bytes.clone());
        let help = "Log that no durable checkpoint covers";
        store.register_with_unit("undurable_log", help, Unit::Bytes, s.undurable_log_bytes.clone());
    }

    /// In Prometheus' text format.
    pub(crate) fn text(&self, stats: &Stats) -> String {
        let set = |gauge: &Gauge<i64>, value: u64| {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        let s = &self.store;
        set(&s.wal_syncs, stats.wal_syncs);
        set(&s.wal_operations, stats.wal_operations);
        set(&s.wal_bytes, stats.wal_bytes);
        set(&s.entries_applied, stats.entries_applied);
        set(&s.commands_applied, stats.commands_applied);
        set(&s.loads, stats.loads);
        set(&s.checkpoints, stats.checkpoints);
        set(&s.dirty_bytes, stats.dirty_bytes);
        set(&s.clean_bytes, stats.clean_bytes);
        set(&s.undurable_log_bytes, stats.undurable_log_bytes);
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &self.registry.lock());
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_documented() {
        let metrics = Metrics::default();
        metrics.proposals.inc();
        let text = metrics.text(&Stats { wal_syncs: 3, ..Stats::default() });
        for line in ["stentor_broker_proposals_total 1", "stentor_store_wal_syncs 3", "stentor_store_wal_bytes 0"] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
