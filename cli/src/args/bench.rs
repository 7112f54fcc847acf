//! The options of `stentor bench`. Only shapes: nothing here may decide or do anything.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Subcommand, ValueEnum};

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchVerb {
    /// Messages until they are acknowledged
    Send(SendBenchArgs),
    /// Messages until every device has them
    Fanout(FanoutBenchArgs),
    /// Messages until every device's durable cursor has passed them
    Cursors(FanoutBenchArgs),
    /// Devices that connect, are authenticated and go away again
    Connect(ConnectBenchArgs),
    /// Devices that are connected and say nothing
    Idle(IdleBenchArgs),
    /// NATS, RabbitMQ, Redis, mosquitto, ejabberd and the physical floors beside us, in turn, in one run
    Peers(PeersBenchArgs),
    /// Everybody was away and comes back at once
    Resume(ResumeBenchArgs),
    /// The last messages of random conversations
    History(HistoryBenchArgs),
    /// A day in small: large and small conversations, devices that come and go, receipts
    Mixed(MixedBenchArgs),
    /// A load generator that waits for a coordinator: `stentor bench SCENARIO --dir D --workers HOST:PORT,…`
    Worker(WorkerBenchArgs),
    /// What changed between two reports beyond noise; ends with 1 when something got worse
    Compare(CompareArgs),
}

impl BenchVerb {
    pub(super) fn json(&self) -> bool {
        match self {
            Self::Send(args) => args.run.json,
            Self::Fanout(args) | Self::Cursors(args) => args.run.json,
            Self::Connect(args) => args.run.json,
            Self::Idle(args) => args.run.json,
            Self::Peers(args) => args.json,
            Self::Resume(args) => args.run.json,
            Self::History(args) => args.run.json,
            Self::Mixed(args) => args.run.json,
            Self::Worker(args) => args.json,
            Self::Compare(args) => args.json,
        }
    }
}

/// Where and how long.
#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    /// Start a cluster for the run, in a temporary folder (TMPDIR), and take it down afterwards
    #[arg(long)]
    pub(crate) local: bool,
    /// Use the cluster of this folder
    #[arg(long, env = "STENTOR_DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Let these make the load together (`stentor bench worker` on each machine), and this process lead them
    #[arg(long, value_name = "HOST:PORT,…", value_delimiter = ',', conflicts_with = "local")]
    pub(crate) workers: Vec<String>,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
    /// Brokers of a local cluster
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) brokers: u32,
    /// Gateways of a local cluster
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) gateways: u32,
    /// Data shards of a local cluster
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) shards: u32,
    /// How long one repeat is measured
    #[arg(long, value_name = "S", default_value_t = 10.0, value_parser = seconds)]
    pub(crate) seconds: f64,
    /// How long before anything counts
    #[arg(long, value_name = "S", default_value_t = 3.0, value_parser = seconds)]
    pub(crate) warm_up: f64,
    /// How often it is measured; results are medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) repeats: u32,
    /// Print the report as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the report as a page with plots
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}

/// With what coordinator and workers know each other.
#[derive(Debug, Clone, Args)]
pub(crate) struct KeyArgs {
    /// Certificate of the cluster's authority for coordinator or worker (PEM); without it one is issued by D/pki/ca.key
    #[arg(long, value_name = "FILE", requires = "key")]
    pub(crate) cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, value_name = "FILE", requires = "cert")]
    pub(crate) key: Option<PathBuf>,
}

/// Options of `bench worker`. It serves one coordinator at a time, run after run, until it is stopped. Both sides show a
/// certificate of the cluster's authority.
#[derive(Debug, Args)]
pub(crate) struct WorkerBenchArgs {
    /// Where to wait; port 0 takes any free one
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: SocketAddr,
    /// The cluster's folder, or a copy of its cluster.json, keys/ and pki/
    #[arg(long, env = "STENTOR_DIR")]
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) keys: KeyArgs,
    /// Print where it listens as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `bench peers`. `make peers` installs the servers; each is started and stopped here, on free ports.
#[derive(Debug, Args)]
pub(crate) struct PeersBenchArgs {
    /// Only this work (--list names them); may be given again
    #[arg(long, value_name = "WORK")]
    pub(crate) only: Vec<String>,
    /// Shorter repeats, and only the peers beside which something is promised: one work in less than a
    /// minute (growth in a few: it creates a million conversations)
    #[arg(long)]
    pub(crate) quick: bool,
    /// How often both sides are measured, in turn; results are medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) repeats: u32,
    /// How long each repeat is measured (10; 2 with --quick)
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub(crate) seconds: Option<f64>,
    /// Print the names of all works and who is beside us
    #[arg(long)]
    pub(crate) list: bool,
    /// Print the table as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `bench send`.
#[derive(Debug, Args)]
pub(crate) struct SendBenchArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Conversations, each with the same share
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    pub(crate) conversations: u32,
    /// Unanswered messages at most, all together
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) window: u32,
    /// Devices that send, at least; as many more as the window needs (256 messages each)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) sessions: u32,
    /// Bytes of a message, or `real`: those of the bundled sample
    #[arg(long, value_name = "BYTES|real", default_value = "real", value_parser = size)]
    pub(crate) size: SizeArg,
    /// Open loop: so many messages a second; latencies count from when each was due
    #[arg(long, value_name = "N", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// Look for the highest rate at which 99 of 100 messages take at most so many ms
    #[arg(long, value_name = "MS", conflicts_with = "rate", value_parser = seconds)]
    pub(crate) find_p99: Option<f64>,
    /// Devices at gateways, or the brokers' gRPC API
    #[arg(long, value_enum, default_value_t = Via::Gateway)]
    pub(crate) via: Via,
}

/// Options of `bench fanout`.
#[derive(Debug, Args)]
pub(crate) struct FanoutBenchArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Conversations, each with devices of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) conversations: u32,
    /// Devices of one conversation
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub(crate) devices: u32,
    /// Devices of one user
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=250))]
    pub(crate) devices_per_user: u32,
    /// Devices more that read nothing; they are not counted
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    pub(crate) stuck: u32,
    /// Closed loop: messages of one conversation that not all devices have, at most
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) window: u32,
    /// Bytes of a message, or `real`: those of the bundled sample
    #[arg(long, value_name = "BYTES|real", default_value = "real", value_parser = size)]
    pub(crate) size: SizeArg,
    /// Open loop: so many messages a second, all conversations together
    #[arg(long, value_name = "N", value_parser = rate)]
    pub(crate) rate: Option<f64>,
}

/// Options of `bench connect`.
#[derive(Debug, Args)]
pub(crate) struct ConnectBenchArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Devices that connect at the same time
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) concurrency: u32,
    /// Devices resume their TLS sessions, as those do that come back
    #[arg(long)]
    pub(crate) resumed: bool,
    /// Open loop: so many connections a second
    #[arg(long, value_name = "N", value_parser = rate)]
    pub(crate) rate: Option<f64>,
}

/// Options of `bench resume`.
#[derive(Debug, Args)]
pub(crate) struct ResumeBenchArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Devices, each of a user of its own
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub(crate) devices: u32,
    /// Conversations of each, ten users in one
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) conversations: u32,
    /// Messages that came in each conversation meanwhile
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub(crate) missed: u32,
    /// All connect within so many seconds
    #[arg(long, value_name = "S", default_value_t = 1.0, value_parser = seconds)]
    pub(crate) within: f64,
    /// Bytes of a message, or `real`: those of the bundled sample
    #[arg(long, value_name = "BYTES|real", default_value = "real", value_parser = size)]
    pub(crate) size: SizeArg,
}

/// Options of `bench history`.
#[derive(Debug, Args)]
pub(crate) struct HistoryBenchArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Conversations
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) conversations: u32,
    /// Messages in each
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) messages: u32,
    /// Events of one page, the last ones
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub(crate) page: u32,
    /// Users who read, each his own conversations
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) sessions: u32,
    /// Reads of one user at the same time
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) concurrency: u32,
    /// Bytes of a message, or `real`: those of the bundled sample
    #[arg(long, value_name = "BYTES|real", default_value = "real", value_parser = size)]
    pub(crate) size: SizeArg,
    /// Open loop: so many pages a second
    #[arg(long, value_name = "N", value_parser = rate)]
    pub(crate) rate: Option<f64>,
}

/// Options of `bench mixed`.
#[derive(Debug, Args)]
pub(crate) struct MixedBenchArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Users who read, each with one device
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub(crate) users: u32,
    /// Conversations: of ten, seven have one reader, two 2 to 20, one 20 to `--largest`
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) conversations: u32,
    /// Readers of the largest conversation
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) largest: u32,
    /// The n-th liveliest conversation gets messages in proportion to 1 / n^ZIPF
    #[arg(long, value_name = "ZIPF", default_value_t = 1.0, value_parser = seconds)]
    pub(crate) zipf: f64,
    /// Messages a second
    #[arg(long, value_name = "N", default_value_t = 200.0, value_parser = rate)]
    pub(crate) rate: f64,
    /// Devices of a thousand that go away each second
    #[arg(long, value_name = "N", default_value_t = 5.0, value_parser = seconds)]
    pub(crate) churn: f64,
    /// Bytes of a message, or `real`: those of the bundled sample
    #[arg(long, value_name = "BYTES|real", default_value = "real", value_parser = size)]
    pub(crate) size: SizeArg,
    /// The same number draws the same day
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
}

/// Options of `bench compare`.
#[derive(Debug, Args)]
pub(crate) struct CompareArgs {
    /// The report of before (written by `--json`)
    #[arg(value_name = "A.json")]
    pub(crate) before: PathBuf,
    /// The report of after
    #[arg(value_name = "B.json")]
    pub(crate) after: PathBuf,
    /// Print results as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `bench idle`.
#[derive(Debug, Args)]
pub(crate) struct IdleBenchArgs {
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Devices that each repeat adds
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub(crate) devices: u32,
    /// Conversations that each of them follows
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    pub(crate) conversations: u32,
}

/// What messages go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Via {
    /// Devices at gateways
    Gateway,
    /// The brokers' gRPC API
    Api,
}

/// How long messages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SizeArg {
    /// As in the bundled sample.
    Real,
    /// All the same.
    Bytes(usize),
}

fn size(text: &str) -> Result<SizeArg, String> {
    if text == "real" {
        return Ok(SizeArg::Real);
    }
    match text.parse() {
        Ok(bytes @ 1..=61_440) => Ok(SizeArg::Bytes(bytes)),
        _ => Err("`real`, or 1 to 61440 bytes".into()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if (0.0..=86_400.0).contains(&number) => Ok(number),
        _ => Err("a number from 0 to 86400".into()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number <= 1e8 => Ok(number),
        _ => Err("a number above 0".into()),
    }
}
