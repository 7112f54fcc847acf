//! The broker's configuration as it stands in a TOML file. Must never guess: an unknown key is refused, naming the
//! nearest known one, so that a misspelt option cannot silently mean its default.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use stentor_engine::limits;
use stentor_proto::ids::BrokerId;
use stentor_raft_store::StoreConfig;
use stentor_transport::tls::TlsFiles;
use thiserror::Error;

/// A configuration that cannot be used: whoever wrote it is at fault; nothing was started.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A key that no version of this build knows.
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
    /// Values that contradict each other.
    #[error("{0}")]
    Contradiction(String),
}

/// Everything that a broker needs to start.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerConfig {
    /// The node's name, as `cluster.json` and certificates have it.
    pub name: String,
    /// This broker's number, from 1.
    #[serde(with = "broker_number")]
    pub broker: BrokerId,
    /// Where both RocksDB instances live. One process at a time.
    pub data_dir: PathBuf,
    /// Where other brokers and gateways connect (mTLS).
    pub peer_listen: SocketAddr,
    /// Where callers of the public gRPC API connect (TLS).
    pub api_listen: SocketAddr,
    /// Where probes and metrics are served (plain HTTP).
    pub http_listen: SocketAddr,
    /// All brokers of the cluster, this one included.
    pub peers: Vec<PeerConfig>,
    /// This node's certificate and the CA that signed it.
    pub tls: TlsFiles,
    /// Takes tokens that are signed with development keys. `dev` and `cluster` say so; production does not.
    #[serde(default)]
    pub development: bool,
    /// How a cluster is made the first time. Ignored by a directory that belongs to a cluster already.
    #[serde(default)]
    pub bootstrap: Option<Bootstrap>,
    /// A shard in which nothing happened for so long parks, in ms; 0: none ever does.
    #[serde(default = "park_after_ms")]
    pub park_after_ms: u64,
    /// Tuning of the store.
    #[serde(default)]
    pub store: StoreTuning,
}

/// A shard that was woken on purpose must not park before that is over.
const PARK_AFTER_LEAST_MS: u64 = 500;

fn park_after_ms() -> u64 {
    limits::PARK_AFTER_MS
}

/// Where another broker is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its number.
    #[serde(with = "broker_number")]
    pub broker: BrokerId,
    /// Its name.
    pub name: String,
    /// Its peer address.
    pub peer_addr: SocketAddr,
    /// Its API address.
    pub api_addr: SocketAddr,
}

/// What the first start of a cluster writes into the meta shard.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bootstrap {
    /// Carried by every directory and handshake of this cluster.
    pub cluster_id: String,
    /// How many data shards; fixed until shards can be split.
    pub shards: u32,
    /// The first apps and their keys.
    #[serde(default)]
    pub apps: Vec<AppConfig>,
}

/// An app and the keys that may sign its tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppConfig {
    /// The app's name.
    pub app: String,
    /// Its public keys.
    #[serde(default)]
    pub keys: Vec<KeyConfig>,
}

/// A public key that may sign an app's tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyConfig {
    /// The `kid` of the tokens that it signs.
    pub kid: String,
    /// `EdDSA` or `ES256`.
    pub algorithm: String,
    /// The public key.
    pub public_key_pem: String,
    /// Made by `dev` or `cluster`; refused unless `development` is true.
    #[serde(default)]
    pub dev: bool,
}

/// Tuning of the store; every key has a default.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreTuning {
    /// Rows kept in memory, in bytes, over all shards.
    pub cache_bytes: usize,
    /// A shard is checkpointed at the latest after so many bytes of log.
    pub checkpoint_log_bytes: u64,
    /// A shard is checkpointed at the latest after so long, in ms.
    pub checkpoint_interval_ms: u64,
    /// Log that no durable checkpoint covers, in bytes, over all shards.
    pub undurable_log_bytes: u64,
    /// Log entries kept in memory, in bytes per shard.
    pub tail_bytes: usize,
    /// Log kept below a shard's own checkpoint for slower replicas, in bytes.
    pub keep_log_bytes: u64,
}

impl Default for StoreTuning {
    fn default() -> Self {
        let store = StoreConfig::new(PathBuf::new());
        Self {
            cache_bytes: store.cache_bytes,
            checkpoint_log_bytes: store.checkpoint_log_bytes,
            checkpoint_interval_ms: store.checkpoint_interval.as_millis() as u64,
            undurable_log_bytes: store.undurable_log_bytes,
            tail_bytes: store.tail_bytes,
            keep_log_bytes: store.keep_log_bytes,
        }
    }
}

impl BrokerConfig {
    /// Reads a TOML text and checks it.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|e| explain(e.message()))?;
        config.check()?;
        Ok(config)
    }

    /// After how long without news a shard parks.
    pub(crate) fn park_after(&self) -> Option<Duration> {
        (self.park_after_ms > 0).then(|| Duration::from_millis(self.park_after_ms))
    }

    /// Checks what types cannot say.
    pub fn check(&self) -> Result<(), ConfigError> {
        let contradiction = |text: String| Err(ConfigError::Contradiction(text));
        if (1..PARK_AFTER_LEAST_MS).contains(&self.park_after_ms) {
            return contradiction(format!("`park_after_ms` is 0 or at least {PARK_AFTER_LEAST_MS}"));
        }
        if self.broker.0 == 0 {
            return contradiction("`broker` counts from 1".into());
        }
        let mut numbers: Vec<u32> = self.peers.iter().map(|p| p.broker.0).collect();
        numbers.sort_unstable();
        if numbers.windows(2).any(|w| w[0] == w[1]) {
            return contradiction("two `peers` have the same number".into());
        }
        if !numbers.contains(&self.broker.0) {
            return contradiction(format!("`peers` does not list broker {} itself", self.broker));
        }
        if numbers.len() > limits::MAX_REPLICAS {
            let most = limits::MAX_REPLICAS;
            return contradiction(format!("this version runs at most {most} brokers: each holds the meta shard"));
        }
        if self.bootstrap.as_ref().is_some_and(|b| b.shards == 0 || b.cluster_id.is_empty()) {
            return contradiction("`bootstrap` needs a cluster id and at least one shard".into());
        }
        let keys = self.bootstrap.iter().flat_map(|b| &b.apps).flat_map(|app| &app.keys);
        if let Some(key) = keys.filter(|key| key.dev).find(|_| !self.development) {
            let kid = &key.kid;
            return contradiction(format!(
                "`bootstrap` has the development key `{kid}`, but `development` is not true"
            ));
        }
        Ok(())
    }

    pub(crate) fn store_config(&self) -> StoreConfig {
        StoreConfig {
            dir: self.data_dir.clone(),
            cache_bytes: self.store.cache_bytes,
            checkpoint_log_bytes: self.store.checkpoint_log_bytes,
            checkpoint_interval: Duration::from_millis(self.store.checkpoint_interval_ms),
            undurable_log_bytes: self.store.undurable_log_bytes,
            tail_bytes: self.store.tail_bytes,
            keep_log_bytes: self.store.keep_log_bytes,
        }
    }
}

/// serde says "unknown field `x`, expected one of `a`, `b`"; this finds the one that was meant.
fn explain(message: &str) -> ConfigError {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if !message.starts_with("unknown field") {
        return ConfigError::Malformed(message.to_owned());
    }
    let Some(key) = quoted.next() else { return ConfigError::Malformed(message.to_owned()) };
    let nearest = quoted.map(|known| (distance(key, known), known)).min();
    let nearest = nearest.filter(|&(d, known)| d <= known.len().max(key.len()) / 2).map(|(_, known)| known.to_owned());
    ConfigError::UnknownKey { key: key.to_owned(), nearest }
}

/// Levenshtein's distance over bytes; keys are short.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// The number types of `stentor-proto` know nothing of serde.
mod broker_number {
    use serde::{Deserialize, Deserializer, Serializer};
    use stentor_proto::ids::BrokerId;

    pub(super) fn serialize<S: Serializer>(id: &BrokerId, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u32(id.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<BrokerId, D::Error> {
        u32::deserialize(d).map(BrokerId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
name = "broker-1"
broker = 1
data_dir = "/tmp/b1"
peer_listen = "127.0.0.1:7411"
api_listen = "127.0.0.1:7410"
http_listen = "127.0.0.1:7490"
tls = { ca = "ca.pem", cert = "c.pem", key = "k.pem" }
peers = [{ broker = 1, name = "broker-1", peer_addr = "127.0.0.1:7411", api_addr = "127.0.0.1:7410" }]
"#;

    #[test]
    fn a_good_config_is_read_and_survives_a_round_trip() {
        let config = BrokerConfig::from_toml(GOOD).unwrap();
        assert_eq!(config.broker, BrokerId(1));
        let again = BrokerConfig::from_toml(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.peers[0].peer_addr, config.peers[0].peer_addr);
    }

    #[test]
    fn an_unknown_key_is_named_with_the_nearest_one() {
        for (text, key, nearest) in [
            (format!("peer_lissen = \"x\"\n{GOOD}"), "peer_lissen", Some("peer_listen")),
            (format!("{GOOD}\n[store]\ncache_byte = 3"), "cache_byte", Some("cache_bytes")),
            (format!("zzzzzzzzzzzzzz = 1\n{GOOD}"), "zzzzzzzzzzzzzz", None),
        ] {
            match BrokerConfig::from_toml(&text) {
                Err(ConfigError::UnknownKey { key: k, nearest: n }) => {
                    assert_eq!((k.as_str(), n.as_deref()), (key, nearest));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let text = GOOD.replace("\nbroker = 1\n", "\nbroker = 2\n");
        assert!(matches!(BrokerConfig::from_toml(&text), Err(ConfigError::Contradiction(_))));
        assert!(matches!(BrokerConfig::from_toml("name = 3"), Err(ConfigError::Malformed(_))));
    }
}
