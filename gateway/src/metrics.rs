//! What the gateway counts. Must never carry a user's or a conversation's name as a label.

use std::sync::atomic::AtomicI64;

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

macro_rules! metrics {
    ($($(#[doc = $help:literal])* $name:ident: $kind:ty;)*) => {
        /// All counters and gauges; names are `stentor_gateway_<name>`.
        pub(crate) struct Metrics {
            registry: Registry,
            $($(#[doc = $help])* pub(crate) $name: $kind,)*
        }

        impl Default for Metrics {
            fn default() -> Self {
                let mut registry = Registry::with_prefix("stentor_gateway");
                $(
                    let $name = <$kind>::default();
                    registry.register(stringify!($name), concat!($($help),*).trim(), $name.clone());
                )*
                Self { registry, $($name,)* }
            }
        }
    };
}

type Level = Gauge<i64, AtomicI64>;

metrics! {
    /// QUIC connections that are open
    connections: Level;
    /// Connections refused because there were too many or this gateway was draining
    refused_connections: Counter;
    /// Sessions that were welcomed and have not ended
    sessions: Level;
    /// Streams of conversations to sessions
    subscriptions: Level;
    /// Events that came from brokers as live
    live_events: Counter;
    /// Events that sessions got live
    delivered_events: Counter;
    /// Events that sessions got by pulled pages
    pulled_events: Counter;
    /// Live pushes that a session could not take at once and had to pull later
    dropped_pushes: Counter;
    /// Sends that devices made
    sends: Counter;
    /// Sends that were refused
    refused_sends: Counter;
    /// Calls that devices made
    calls: Counter;
    /// Times that a shard's leader was looked for elsewhere
    reroutes: Counter;
    /// Connections that ended because the device broke the protocol or was not let in
    fatals: Counter;
}

impl Metrics {
    /// In the text format of Prometheus.
    pub(crate) fn encode(&self) -> String {
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_the_projects_names() {
        let metrics = Metrics::default();
        metrics.sends.inc();
        metrics.sessions.set(3);
        let text = metrics.encode();
        assert!(text.contains("stentor_gateway_sends_total 1"), "{text}");
        assert!(text.contains("stentor_gateway_sessions 3"), "{text}");
    }
}
