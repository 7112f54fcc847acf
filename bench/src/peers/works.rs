//! What is measured against whom, and what we promise there: the ratios of docs/performance.md, "Beside the peers".
//! Must never be softened to fit a measurement.

use super::{Load, ours::Door};

/// A server beside us, with its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Against {
    /// NATS JetStream that syncs before it acknowledges.
    NatsAlways,
    /// NATS JetStream as it comes, which syncs later.
    NatsDefault,
    /// NATS without a log: the same servers, plain subjects.
    NatsCore,
    /// RabbitMQ's quorum queues.
    Rabbit,
    /// Redis, one server.
    Redis,
    /// mosquitto.
    Mosquitto,
    /// ejabberd with its archive.
    EjabberdArchive,
    /// ejabberd without.
    Ejabberd,
    /// A QUIC server without anything behind it.
    BareQuic,
    /// RocksDB alone.
    RawRocks,
    /// Our own cluster, another one, with fewer conversations.
    OursSmall,
    /// One core of this machine.
    OneCore,
}

impl Against {
    /// As the table calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::NatsAlways => "NATS JetStream R3, sync always",
            Self::NatsDefault => "NATS JetStream R3, default sync",
            Self::NatsCore => "NATS core, no log",
            Self::Rabbit => "RabbitMQ quorum queues, 3 nodes",
            Self::Redis => "Redis, one node, appendfsync always",
            Self::Mosquitto => "mosquitto",
            Self::EjabberdArchive => "ejabberd, archive in SQLite",
            Self::Ejabberd => "ejabberd, no archive",
            Self::BareQuic => "bare quinn",
            Self::RawRocks => "raw RocksDB, one node, batches of 4,096",
            Self::OursSmall => "ours at 1,000 conversations",
            Self::OneCore => "one core",
        }
    }
}

/// A figure that is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Messages or deliveries per second.
    Rate,
    /// CPU of servers and clients, µs per message or delivery.
    Cpu,
    /// Half took at most this, ms.
    P50,
    /// 99 of 100 took at most this, ms.
    P99,
    /// Calls of fsync per message.
    Flushes,
    /// Server memory of a connection, bytes.
    IdleBytes,
    /// Done by one core of the server in a second.
    PerCore,
    /// The same of our gateway alone, beside a server that is nothing else.
    GatewayPerCore,
    /// CPU of the busiest broker, in percent of one core.
    CorePercent,
    /// Memory of a broker for each replica that is parked, bytes.
    ReplicaBytes,
}

impl Metric {
    /// Its name, with the unit.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate/s",
            Self::Cpu => "CPU µs",
            Self::P50 => "p50 ms",
            Self::P99 => "p99 ms",
            Self::Flushes => "flushes/message",
            Self::IdleBytes => "bytes/connection",
            Self::PerCore => "per server core and s",
            Self::GatewayPerCore => "per gateway core and s",
            Self::CorePercent => "% of a core, the busiest broker",
            Self::ReplicaBytes => "bytes/parked replica",
        }
    }
}

/// What must hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Ours by theirs, at least.
    AtLeast(f64),
    /// Ours by theirs, at most.
    AtMost(f64),
    /// Ours alone, at most.
    OursAtMost(f64),
    /// Nothing was promised; the figure is here because people compare.
    None,
}

impl Goal {
    /// Whether it holds; `None` without a goal.
    pub fn held(self, ours: f64, ratio: f64) -> Option<bool> {
        match self {
            Self::AtLeast(least) => Some(ratio >= least),
            Self::AtMost(most) => Some(ratio <= most),
            Self::OursAtMost(most) => Some(ours <= most),
            Self::None => None,
        }
    }

    /// As the table has it.
    pub fn text(self) -> Option<String> {
        match self {
            Self::AtLeast(least) => Some(format!("≥ {least}×")),
            Self::AtMost(most) => Some(format!("≤ {most}×")),
            Self::OursAtMost(most) => Some(format!("ours ≤ {most}")),
            Self::None => None,
        }
    }
}

/// A peer of a work: what it is put under, and the rows that come of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Side {
    /// Who.
    pub against: Against,
    /// What.
    pub load: Load,
    /// The rows.
    pub rows: Vec<(Metric, Goal)>,
}

/// One work.
#[derive(Debug, Clone, PartialEq)]
pub struct Work {
    /// For `--only`.
    pub name: &'static str,
    /// What it is, with our shard count.
    pub what: &'static str,
    /// Our data shards.
    pub shards: u32,
    /// How messages come to us.
    pub door: Door,
    /// What we are put under.
    pub load: Load,
    /// Who is beside us.
    pub sides: Vec<Side>,
}

/// Shards of the work that shows what parked ones cost.
const PARKED_SHARDS: u32 = 4_096;
/// Data shards where the work does not say otherwise.
pub(super) const SHARDS: u32 = 16;

fn append(conversations: usize, window: usize) -> Load {
    Load::Append { conversations, window }
}

fn side(against: Against, load: Load, rows: &[(Metric, Goal)]) -> Side {
    Side { against, load, rows: rows.to_vec() }
}

fn work(name: &'static str, what: &'static str, load: Load, sides: Vec<Side>) -> Work {
    Work { name, what, shards: SHARDS, door: Door::Sessions, load, sides }
}

/// All works, in the order of the table.
pub fn all() -> Vec<Work> {
    let mut all = one_conversation();
    all.extend(many_conversations());
    all.extend(deliveries());
    all.extend(floors());
    all.extend(ourselves());
    all
}

fn one_conversation() -> Vec<Work> {
    use Against::{NatsAlways, NatsDefault, Rabbit, Redis};
    use Goal::{AtLeast, AtMost, None};
    use Metric::{Cpu, Flushes, P50, P99, Rate};
    let (wide, middle, single) = (append(1, 1_024), append(1, 64), append(1, 1));
    vec![
        work(
            "one-1024",
            "one conversation, window 1,024 (1 shard of 16)",
            wide,
            vec![
                side(NatsAlways, wide, &[(Rate, AtLeast(3.0)), (Cpu, AtMost(0.4)), (P99, None), (Flushes, None)]),
                side(Rabbit, wide, &[(Rate, None), (Cpu, None), (P99, None)]),
            ],
        ),
        work(
            "one-64",
            "one conversation, window 64 (1 shard of 16)",
            middle,
            vec![
                side(NatsAlways, middle, &[(Rate, AtLeast(3.0)), (P99, AtMost(0.5)), (Cpu, None)]),
                side(NatsDefault, middle, &[(Rate, AtLeast(1.5))]),
                side(Redis, middle, &[(Rate, None), (Cpu, None), (P99, None)]),
            ],
        ),
        work(
            "one-1",
            "one conversation, window 1 (1 shard of 16)",
            single,
            vec![side(NatsAlways, single, &[(P50, AtMost(1.0)), (P99, AtMost(1.0)), (Cpu, None)])],
        ),
    ]
}

fn many_conversations() -> Vec<Work> {
    use Against::{NatsAlways, Rabbit};
    use Goal::{AtLeast, AtMost, None, OursAtMost};
    use Metric::{Cpu, Flushes, P99, Rate};
    let many = [(Rate, AtLeast(10.0)), (Cpu, AtMost(0.1)), (Flushes, OursAtMost(0.01)), (P99, None)];
    let (some, thousand, more, each) = (append(64, 1_024), append(1_000, 1_024), append(10_000, 1_024), append(64, 64));
    vec![
        work(
            "many-64",
            "64 conversations, window 1,024 (16 shards)",
            some,
            vec![side(NatsAlways, some, &many), side(Rabbit, some, &[(Rate, None), (Cpu, None)])],
        ),
        work(
            "many-1000",
            "1,000 conversations, window 1,024 (16 shards; 64 streams)",
            thousand,
            vec![side(NatsAlways, thousand, &many)],
        ),
        work(
            "many-10000",
            "10,000 conversations, window 1,024 (16 shards; 64 streams)",
            more,
            vec![side(NatsAlways, more, &many)],
        ),
        work(
            "many-1",
            "64 conversations, 1 outstanding each (16 shards)",
            each,
            vec![side(
                NatsAlways,
                each,
                &[(Rate, AtLeast(8.0)), (Flushes, OursAtMost(0.15)), (Cpu, None), (P99, None)],
            )],
        ),
    ]
}

fn deliveries() -> Vec<Work> {
    use Against::{Ejabberd, EjabberdArchive, NatsAlways, NatsCore, Redis};
    use Goal::{AtLeast, AtMost, None};
    use Metric::{Cpu, P99, Rate};
    let cursors = Load::Cursors { devices: 100, window: 256 };
    let online = |devices: usize, rate_per_s: f64, name, what| {
        let (log, no_log) = (Load::Fanout { devices, rate_per_s }, Load::Broadcast { devices, rate_per_s });
        work(
            name,
            what,
            log,
            vec![
                side(NatsAlways, log, &[(Cpu, AtMost(0.5)), (P99, None)]),
                side(NatsCore, no_log, &[(Cpu, AtMost(1.0)), (P99, None)]),
                side(Redis, no_log, &[(Cpu, None)]),
            ],
        )
    };
    let chat = Load::Chat { pairs: 100 };
    vec![
        work(
            "cursors",
            "deliveries that move durable cursors, 100 devices (1 shard of 16)",
            cursors,
            vec![side(NatsAlways, cursors, &[(Rate, AtLeast(20.0)), (Cpu, None)])],
        ),
        online(100, 200.0, "fanout-100", "online fan-out, 100 devices, 200 messages/s (1 shard of 16)"),
        online(1_000, 20.0, "fanout-1000", "online fan-out, 1,000 devices, 20 messages/s (1 shard of 16)"),
        work(
            "chat",
            "archived 1:1 chat, 100 pairs (16 shards)",
            chat,
            vec![
                side(EjabberdArchive, chat, &[(Rate, AtLeast(20.0)), (Cpu, None), (P99, None)]),
                side(Ejabberd, chat, &[(Rate, AtLeast(2.0)), (Cpu, None), (P99, None)]),
            ],
        ),
    ]
}

fn floors() -> Vec<Work> {
    use Against::{BareQuic, Ejabberd, Mosquitto, RawRocks, Redis};
    use Goal::{AtLeast, AtMost, None};
    use Metric::{GatewayPerCore, IdleBytes, P50, PerCore, Rate};
    let idle = Load::Idle { connections: 1_000 };
    let handshakes = Load::Handshakes { window: 16 };
    let raw = append(256, 16_384);
    let bytes = [(IdleBytes, None)];
    vec![
        work(
            "idle",
            "idle connection, 1,000 of them",
            idle,
            vec![
                side(BareQuic, idle, &[(IdleBytes, AtMost(1.15)), (IdleBytes, AtMost(0.6))]),
                side(Ejabberd, idle, &bytes),
                side(Redis, idle, &bytes),
                side(Mosquitto, idle, &bytes),
            ],
        ),
        work(
            "handshake",
            "handshake with authentication, 16 at a time",
            handshakes,
            vec![side(BareQuic, handshakes, &[(PerCore, AtLeast(0.8)), (Rate, None)])],
        ),
        work(
            "forward",
            "message through the gateway to one device, one in flight, committed on the way (1 shard of 16)",
            Load::Chat { pairs: 1 },
            vec![side(BareQuic, Load::Echo, &[(GatewayPerCore, AtLeast(0.6)), (P50, AtMost(1.3))])],
        ),
        Work {
            shards: 64,
            door: Door::Api,
            ..work(
                "raw-api",
                "committed messages through the gRPC send stream, 256 conversations, 64 outstanding each (64 shards)",
                raw,
                vec![side(RawRocks, Load::Raw, &[(Rate, AtLeast(0.4))])],
            )
        },
        Work {
            shards: 64,
            ..work(
                "raw-sdk",
                "committed messages through the SDK with TLS, 256 conversations, 64 outstanding each (64 shards)",
                raw,
                vec![side(RawRocks, Load::Raw, &[(Rate, AtLeast(0.2))])],
            )
        },
    ]
}

/// What is promised of ourselves alone.
fn ourselves() -> Vec<Work> {
    use Against::{OneCore, OursSmall};
    use Goal::{AtMost, None};
    use Metric::{CorePercent, Cpu, P99, Rate, ReplicaBytes};
    let spread = |conversations| Load::Spread { conversations, devices: 200, window: 1_024 };
    let (large, small) = (spread(1_000_000), spread(1_000));
    let parked = Load::Parked;
    vec![
        work(
            "growth",
            "1,000,000 conversations of 200 devices, window 1,024 (16 shards)",
            large,
            vec![side(OursSmall, small, &[(P99, AtMost(1.2)), (Cpu, AtMost(1.2)), (Rate, None)])],
        ),
        Work {
            shards: PARKED_SHARDS,
            ..work(
                "parked",
                "a cluster in which nothing happens, all its 4,096 shards parked",
                parked,
                vec![side(OneCore, parked, &[(CorePercent, AtMost(0.01)), (ReplicaBytes, None)])],
            )
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_each_its_own() {
        let mut names: Vec<_> = all().iter().map(|work| work.name).collect();
        assert!(names.iter().all(|name| name.len() <= 12 && !name.contains(' ')));
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn goals_hold_from_the_side_that_they_name() {
        assert_eq!(Goal::AtLeast(3.0).held(1.0, 3.0), Some(true));
        assert_eq!(Goal::AtLeast(3.0).held(1.0, 2.9), Some(false));
        assert_eq!(Goal::AtMost(0.5).held(1.0, 0.5), Some(true));
        assert_eq!(Goal::AtMost(0.5).held(1.0, 0.6), Some(false));
        assert_eq!(Goal::OursAtMost(0.01).held(0.02, 0.001), Some(false));
        assert_eq!(Goal::None.held(1.0, 1.0), None);
    }

    #[test]
    fn every_row_that_we_owe_is_there() {
        let works = all();
        let goals = |name: &str| {
            let work = works.iter().find(|work| work.name == name).unwrap();
            let rows = work.sides.iter().flat_map(|side| &side.rows);
            rows.filter_map(|(metric, goal)| Some(format!("{} {}", metric.name(), goal.text()?))).collect::<Vec<_>>()
        };
        assert_eq!(goals("one-1024"), ["rate/s ≥ 3×", "CPU µs ≤ 0.4×"]);
        assert_eq!(goals("one-64"), ["rate/s ≥ 3×", "p99 ms ≤ 0.5×", "rate/s ≥ 1.5×"]);
        assert_eq!(goals("one-1"), ["p50 ms ≤ 1×", "p99 ms ≤ 1×"]);
        assert_eq!(goals("many-64"), ["rate/s ≥ 10×", "CPU µs ≤ 0.1×", "flushes/message ours ≤ 0.01"]);
        assert_eq!(goals("many-1"), ["rate/s ≥ 8×", "flushes/message ours ≤ 0.15"]);
        assert_eq!(goals("cursors"), ["rate/s ≥ 20×"]);
        assert_eq!(goals("fanout-1000"), ["CPU µs ≤ 0.5×", "CPU µs ≤ 1×"]);
        assert_eq!(goals("chat"), ["rate/s ≥ 20×", "rate/s ≥ 2×"]);
        assert_eq!(goals("idle"), ["bytes/connection ≤ 1.15×", "bytes/connection ≤ 0.6×"]);
        assert_eq!(goals("handshake"), ["per server core and s ≥ 0.8×"]);
        assert_eq!(goals("forward"), ["per gateway core and s ≥ 0.6×", "p50 ms ≤ 1.3×"]);
        assert_eq!(goals("growth"), ["p99 ms ≤ 1.2×", "CPU µs ≤ 1.2×"]);
        assert_eq!(goals("parked"), ["% of a core, the busiest broker ≤ 0.01×"]);
        assert_eq!((goals("raw-api"), goals("raw-sdk")), (vec!["rate/s ≥ 0.4×".into()], vec!["rate/s ≥ 0.2×".into()]));
    }
}
