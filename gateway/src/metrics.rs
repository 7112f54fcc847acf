//! What the gateway counts. Must never carry a user's or a conversation's name as a label.

use std::sync::atomic::AtomicI64;

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use stentor_proto::frame::ClientFrame;

macro_rules! metrics {
    ($($(#[doc = $help:literal])* $name:ident: $kind:ty;)*) => {
        /// All counters and gauges; names are `stentor_gateway_<name>`.
        pub(crate) struct Metrics {
            registry: Registry,
            $($(#[doc = $help])* pub(crate) $name: $kind,)*
            device_frames: DeviceFrames,
        }

        impl Default for Metrics {
            fn default() -> Self {
                let mut registry = Registry::with_prefix("stentor_gateway");
                $(
                    let $name = <$kind>::default();
                    registry.register(stringify!($name), concat!($($help),*).trim(), $name.clone());
                )*
                let device_frames = DeviceFrames::register(&mut registry);
                Self { registry, $($name,)* device_frames }
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
    /// Those of them that only wait for the next event, and cost a few bytes each
    resting_subscriptions: Level;
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
    /// Sends, calls and sessions that were refused because they came too fast
    rate_limited: Counter;
    /// Calls that devices made
    calls: Counter;
    /// Times that a shard's leader was looked for elsewhere
    reroutes: Counter;
    /// Connections that ended because the device broke the protocol or was not let in
    fatals: Counter;
}

/// Frames that devices sent, by kind.
struct DeviceFrames([Counter; FRAMES.len()]);

/// The kinds in the order of [`DeviceFrames`].
const FRAMES: [&str; 10] =
    ["hello", "resume", "subscribe", "unsubscribe", "send", "move_cursors", "credit", "ping", "request", "send_run"];

impl DeviceFrames {
    fn register(registry: &mut Registry) -> Self {
        let family = Family::<[(&'static str, &'static str); 1], Counter>::default();
        registry.register("device_frames", "Frames that devices sent", family.clone());
        // Looked up once: what a frame costs is one addition.
        Self(FRAMES.map(|kind| family.get_or_create(&[("kind", kind)]).clone()))
    }
}

impl Metrics {
    /// A device sent this frame.
    pub(crate) fn device_frame(&self, frame: &ClientFrame) {
        let place = match frame {
            ClientFrame::Hello(_) => 0,
            ClientFrame::Resume(_) => 1,
            ClientFrame::Subscribe(_) => 2,
            ClientFrame::Unsubscribe(_) => 3,
            ClientFrame::Send(_) => 4,
            ClientFrame::MoveCursors(_) => 5,
            ClientFrame::Credit(_) => 6,
            ClientFrame::Ping(_) => 7,
            ClientFrame::Request(_) => 8,
            ClientFrame::SendRun(_) => 9,
        };
        self.device_frames.0[place].inc();
    }

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
        metrics.device_frame(&stentor_proto::v1::Resume::default().into());
        metrics.device_frame(&stentor_proto::v1::Request::default().into());
        let text = metrics.encode();
        for kind in FRAMES {
            let count = u32::from(["resume", "request"].contains(&kind));
            let line = format!("stentor_gateway_device_frames_total{{kind=\"{kind}\"}} {count}\n");
            assert!(text.contains(&line), "{text}");
        }
        assert!(text.contains("stentor_gateway_sends_total 1"), "{text}");
        assert!(text.contains("stentor_gateway_sessions 3"), "{text}");
    }
}
