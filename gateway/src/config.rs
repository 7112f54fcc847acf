//! The gateway's configuration as it stands in a TOML file. Must never guess: an unknown key is refused, naming the
//! nearest known one, so that a misspelt option cannot silently mean its default.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use stentor_engine::{limits, rate::Rate};
use stentor_proto::{frame, ids::BrokerId};
use stentor_transport::tls::TlsFiles;
use thiserror::Error;

/// A configuration that cannot be used: whoever wrote it is at fault; nothing was started.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A key that this build does not know.
    #[error("unknown key `{key}`{}", nearest.as_ref().map(|n| format!("; did you mean `{n}`?")).unwrap_or_default())]
    UnknownKey {
        /// As it was written.
        key: String,
        /// The known key that it resembles most.
        nearest: Option<String>,
    },
    /// No TOML, a missing key, or a value of the wrong type.
    #[error("{0}")]
    Malformed(String),
    /// Values that contradict each other or leave their range.
    #[error("{0}")]
    Contradiction(String),
}

/// Everything that a gateway needs to start.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayConfig {
    /// The node's name, as `cluster.json` and certificates have it.
    pub name: String,
    /// Where devices connect (UDP).
    pub quic_listen: SocketAddr,
    /// Where probes and metrics are served (plain HTTP).
    pub http_listen: SocketAddr,
    /// The brokers, at least one; the placement tells which of them hold what.
    pub brokers: Vec<BrokerAddress>,
    /// This node's certificate and the CA that signed it.
    pub tls: TlsFiles,
    /// Takes tokens that are signed with development keys. `dev` and `cluster` say so; production does not.
    #[serde(default)]
    pub development: bool,
    /// Bounds that an operator may move.
    #[serde(default)]
    pub limits: GatewayLimits,
}

/// Where a broker is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerAddress {
    /// Its number, from 1.
    #[serde(with = "broker_number")]
    pub broker: BrokerId,
    /// Its name.
    pub name: String,
    /// Its peer address (mTLS).
    pub peer_addr: SocketAddr,
}

/// Bounds that an operator may move; every key has a default.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GatewayLimits {
    /// Connections at a time; the next is refused.
    pub connections: usize,
    /// Longest frame from or to a device, in bytes.
    pub max_frame_bytes: usize,
    /// Longest body of a send, in bytes; leaves room for the frame's other fields.
    pub max_body_bytes: usize,
    /// How long devices may take to reconnect elsewhere while this gateway drains, in ms.
    pub drain_ms: u32,
    /// Sends of one device.
    pub sends: RateLimit,
    /// Bytes of these frames.
    pub send_bytes: RateLimit,
    /// Calls, subscriptions and cursor moves of one connection, in frames.
    pub calls: RateLimit,
    /// Sessions that one user opens.
    pub sessions: RateLimit,
}

/// How often something may be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// In a second, in the long run.
    pub per_s: u64,
    /// At once, after a rest.
    pub burst: u64,
}

impl RateLimit {
    pub(crate) fn rate(self) -> Rate {
        let Self { per_s, burst } = self;
        Rate { per_s, burst }
    }
}

impl From<Rate> for RateLimit {
    fn from(Rate { per_s, burst }: Rate) -> Self {
        Self { per_s, burst }
    }
}

impl Default for GatewayLimits {
    fn default() -> Self {
        Self {
            connections: limits::GATEWAY_CONNECTIONS,
            max_frame_bytes: frame::DEFAULT_MAX_BYTES,
            max_body_bytes: frame::DEFAULT_MAX_BYTES - limits::FRAME_OVERHEAD_BYTES,
            drain_ms: 5_000,
            sends: limits::DEVICE_SENDS.into(),
            send_bytes: limits::DEVICE_SEND_BYTES.into(),
            calls: limits::CONNECTION_CALLS.into(),
            sessions: limits::USER_SESSIONS.into(),
        }
    }
}

impl GatewayConfig {
    /// Reads a TOML text and checks it.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|e| explain(e.message()))?;
        config.check()?;
        Ok(config)
    }

    /// Checks what types cannot say.
    pub fn check(&self) -> Result<(), ConfigError> {
        let contradiction = |text: String| Err(ConfigError::Contradiction(text));
        if self.brokers.is_empty() {
            return contradiction("`brokers` is empty".into());
        }
        let mut numbers: Vec<u32> = self.brokers.iter().map(|b| b.broker.0).collect();
        numbers.sort_unstable();
        if numbers.first() == Some(&0) {
            return contradiction("`broker` counts from 1".into());
        }
        if numbers.windows(2).any(|w| w.first() == w.last()) {
            return contradiction("two `brokers` have the same number".into());
        }
        let bounds = &self.limits;
        if bounds.max_body_bytes + limits::FRAME_OVERHEAD_BYTES > bounds.max_frame_bytes {
            let least = bounds.max_body_bytes + limits::FRAME_OVERHEAD_BYTES;
            return contradiction(format!("`max_frame_bytes` must be at least {least} for this `max_body_bytes`"));
        }
        if bounds.max_frame_bytes > limits::MAX_CLIENT_FRAME_BYTES {
            return contradiction(format!("`max_frame_bytes` is at most {}", limits::MAX_CLIENT_FRAME_BYTES));
        }
        for (name, rate, least) in [
            ("sends", bounds.sends, 1),
            ("send_bytes", bounds.send_bytes, bounds.max_frame_bytes as u64),
            ("calls", bounds.calls, 1),
            ("sessions", bounds.sessions, 1),
        ] {
            if rate.per_s == 0 || rate.burst < least {
                return contradiction(format!("`{name}` must allow at least 1 a second and {least} at once"));
            }
        }
        Ok(())
    }
}

/// serde says "unknown field `x`, expected one of `a`, `b`"; this finds the one that was meant.
fn explain(message: &str) -> ConfigError {
    if !message.starts_with("unknown field") {
        return ConfigError::Malformed(message.to_owned());
    }
    let mut quoted = message.split('`').skip(1).step_by(2);
    let Some(key) = quoted.next() else { return ConfigError::Malformed(message.to_owned()) };
    let nearest = quoted
        .map(|known| (edits(key, known), known))
        .min()
        .filter(|&(edits, known)| edits <= known.len().max(key.len()) / 2)
        .map(|(_, known)| known.to_owned());
    ConfigError::UnknownKey { key: key.to_owned(), nearest }
}

/// How many single-byte edits lie between two keys, which are short.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (y, cell) in b.bytes().zip(row.iter_mut().skip(1)) {
            let up = *cell;
            left = (left + 1).min(up + 1).min(diagonal + usize::from(x != y));
            diagonal = up;
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

mod broker_number {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use stentor_proto::ids::BrokerId;

    pub(super) fn serialize<S: Serializer>(id: &BrokerId, to: S) -> Result<S::Ok, S::Error> {
        id.0.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BrokerId, D::Error> {
        u32::deserialize(from).map(BrokerId)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const GOOD: &str = r#"
name = "gateway-1"
quic_listen = "127.0.0.1:7443"
http_listen = "127.0.0.1:7490"
[[brokers]]
broker = 1
name = "broker-1"
peer_addr = "127.0.0.1:7411"
[tls]
ca = "ca.pem"
cert = "g.pem"
key = "g.key"
"#;

    #[test]
    fn a_good_text_is_read_and_comes_back() {
        let config = GatewayConfig::from_toml(GOOD).unwrap();
        assert_eq!(config.brokers[0].broker, BrokerId(1));
        let again = GatewayConfig::from_toml(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.limits.max_body_bytes, config.limits.max_body_bytes);
        assert_eq!(again.limits.send_bytes, config.limits.send_bytes);
        assert!(!again.development, "production unless told");
        let slow = GatewayConfig::from_toml(&format!("{GOOD}\n[limits.sends]\nper_s = 3\nburst = 5")).unwrap();
        assert_eq!(slow.limits.sends, RateLimit { per_s: 3, burst: 5 });
    }

    #[test]
    fn an_unknown_key_is_named_with_the_nearest_known_one() {
        let message = |text: String| GatewayConfig::from_toml(&text).unwrap_err().to_string();
        let top = message(GOOD.replace("quic_listen", "quic_lisen"));
        assert!(top.contains("unknown key `quic_lisen`; did you mean `quic_listen`?"), "{top}");
        let inner = message(format!("{GOOD}\n[limits]\nmax_body = 7"));
        assert!(inner.contains("did you mean `max_body_bytes`?"), "{inner}");
        let broker = message(GOOD.replace("peer_addr", "addr_of_peer_x"));
        assert!(broker.contains("unknown key `addr_of_peer_x`"), "{broker}");
    }

    #[test]
    fn values_that_contradict_are_refused() {
        let bad = |text: String| matches!(GatewayConfig::from_toml(&text), Err(ConfigError::Contradiction(_)));
        assert!(bad(GOOD.replace("broker = 1", "broker = 0")));
        assert!(bad(format!("{GOOD}\n[limits]\nmax_body_bytes = 65536")));
        assert!(bad(format!("{GOOD}\n[limits]\nmax_frame_bytes = 99999999")));
        assert!(bad(format!("{GOOD}\n[limits.sends]\nper_s = 0\nburst = 5")));
        assert!(bad(format!("{GOOD}\n[limits.send_bytes]\nper_s = 9\nburst = 65535")));
        assert!(matches!(GatewayConfig::from_toml("name = 3"), Err(ConfigError::Malformed(_))));
    }

    #[test]
    fn edits_are_counted() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "ab"), 2);
        assert_eq!(edits("same", "same"), 0);
    }
}
