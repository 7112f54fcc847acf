//! The command line: every verb of the public face with its options. Only shapes: nothing here may decide or do
//! anything, and a verb that is not built must still parse, so that it can say so.

pub(crate) mod bench;

use std::{net::SocketAddr, path::PathBuf};

use bench::BenchVerb;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Stentor: ordered, durable conversations for chat.
#[derive(Debug, Parser)]
#[command(name = "stentor", version, about, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run a cluster of 3 brokers and 1 gateway in this process, for trying things out
    Dev(DevArgs),
    /// Run one broker from a configuration file
    Broker(NodeArgs),
    /// Run one gateway from a configuration file
    Gateway(NodeArgs),
    /// Print a token for a user's device, signed with the development key of --dir
    Token(TokenArgs),
    /// Create and look at conversations, add and remove participants
    #[command(subcommand)]
    Conversation(ConversationVerb),
    /// Send messages to a conversation, one a line
    Send(SendArgs),
    /// Follow a conversation
    Tail(TailArgs),
    /// Read a conversation's events
    History(HistoryArgs),
    /// Look after a cluster
    #[command(subcommand)]
    Admin(AdminVerb),
    /// Run a cluster of real processes in a folder
    #[command(subcommand)]
    Cluster(ClusterVerb),
    /// Chat in the terminal
    Chat(ChatArgs),
    /// Measure a cluster under load
    #[command(subcommand)]
    Bench(BenchVerb),
    /// Break things on purpose (not built yet)
    Chaos(NotBuiltArgs),
}

impl Verb {
    /// Whether the caller asked for JSON, so that errors come as JSON too.
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Dev(args) => args.json,
            Self::Broker(_) | Self::Gateway(_) => false,
            Self::Token(args) => args.context.json,
            Self::Conversation(verb) => verb.context().json,
            Self::Send(args) => args.context.json,
            Self::Tail(args) => args.context.json,
            Self::History(args) => args.context.json,
            Self::Admin(verb) => verb.json(),
            Self::Cluster(verb) => verb.json(),
            Self::Chat(args) => args.context.json,
            Self::Bench(verb) => verb.json(),
            Self::Chaos(args) => args.json(),
        }
    }
}

/// Which cluster of processes.
#[derive(Debug, Clone, Args)]
pub(crate) struct FolderArgs {
    /// The cluster's folder
    #[arg(long, env = "STENTOR_DIR")]
    pub(crate) dir: PathBuf,
    /// Print results as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to do with a cluster of processes. The processes go on when the command has ended.
#[derive(Debug, Subcommand)]
pub(crate) enum ClusterVerb {
    /// Make a cluster, or start all nodes of the one that is there; ends when all are ready
    Up {
        #[command(flatten)]
        folder: FolderArgs,
        /// Brokers of a new cluster
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
        brokers: u32,
        /// Gateways of a new cluster
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=64))]
        gateways: u32,
        /// Data shards of a new cluster
        #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
        shards: u32,
    },
    /// Start a node; ends when it is ready
    Start {
        /// broker-1, gateway-1…
        name: String,
        #[command(flatten)]
        folder: FolderArgs,
    },
    /// Stop a node with SIGTERM and wait for its end
    Stop {
        /// broker-1, gateway-1…
        name: String,
        #[command(flatten)]
        folder: FolderArgs,
    },
    /// Stop a node with SIGKILL
    Kill {
        /// broker-1, gateway-1…
        name: String,
        #[command(flatten)]
        folder: FolderArgs,
    },
    /// Add a node and start it
    Add {
        /// What it does
        #[arg(long, value_enum)]
        role: NodeRole,
        /// Where it stands (not built yet)
        #[arg(long)]
        zone: Option<String>,
        #[command(flatten)]
        folder: FolderArgs,
    },
    /// Stop a node and forget it
    Remove {
        /// gateway-2…
        name: String,
        #[command(flatten)]
        folder: FolderArgs,
    },
    /// Which nodes run
    Status(FolderArgs),
    /// Stop all nodes; `up` starts them again
    Down(FolderArgs),
}

impl ClusterVerb {
    fn json(&self) -> bool {
        match self {
            Self::Up { folder, .. }
            | Self::Start { folder, .. }
            | Self::Stop { folder, .. }
            | Self::Kill { folder, .. }
            | Self::Add { folder, .. }
            | Self::Remove { folder, .. }
            | Self::Status(folder)
            | Self::Down(folder) => folder.json,
        }
    }
}

/// What a node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NodeRole {
    /// Hosts replicas
    Broker,
    /// Ends client connections
    Gateway,
}

/// Whatever is given to a verb that is not built.
#[derive(Debug, Args)]
pub(crate) struct NotBuiltArgs {
    /// Ignored
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(crate) rest: Vec<String>,
}

impl NotBuiltArgs {
    fn json(&self) -> bool {
        self.rest.iter().any(|arg| arg == "--json")
    }
}

/// Options of `dev`.
#[derive(Debug, Args)]
pub(crate) struct DevArgs {
    /// Where data, keys and cluster.json live; without it a temporary folder, removed at the end
    #[arg(long, env = "STENTOR_DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Replay real conversations (a file, or a folder with one conversation a file; default: the bundled sample) and
    /// prove that every device got everything
    #[arg(long, value_name = "PATH", num_args = 0..=1)]
    pub(crate) demo: Option<Option<PathBuf>>,
    /// End after the demo instead of staying
    #[arg(long)]
    pub(crate) exit: bool,
    /// Print results as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// How many data shards a new cluster gets
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) shards: u32,
}

/// Options of `broker` and `gateway`.
#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// The node's configuration (TOML; docs/operations.md)
    #[arg(long)]
    pub(crate) config: PathBuf,
}

/// Who acts, and on which cluster.
#[derive(Debug, Clone, Args)]
pub(crate) struct ContextArgs {
    /// The folder of a development cluster
    #[arg(long, env = "STENTOR_DIR")]
    pub(crate) dir: Option<PathBuf>,
    /// Act as this user (needs --dir, whose key signs a token); default: the first user of cluster.json
    #[arg(long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Act as exactly this device; default: the first free cli-N
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<String>,
    /// Use this token
    #[arg(long, env = "STENTOR_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<String>,
    /// Use this gateway (for `admin` and `conversation`: this broker's API)
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) server: Option<SocketAddr>,
    /// Trust this certificate authority
    #[arg(long, value_name = "FILE", env = "STENTOR_CA")]
    pub(crate) ca: Option<PathBuf>,
    /// Print results as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Options of `token`; `--user` and `--device` are those of the context.
#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    #[command(flatten)]
    pub(crate) context: ContextArgs,
    /// The app; default: the one of cluster.json
    #[arg(long)]
    pub(crate) app: Option<String>,
}

/// What to do with conversations.
#[derive(Debug, Subcommand)]
pub(crate) enum ConversationVerb {
    /// Create one; the acting user becomes its owner
    Create {
        #[command(flatten)]
        context: ContextArgs,
        /// What it is for
        #[arg(long, value_enum, default_value_t = Kind::Group)]
        kind: Kind,
        /// Its id; default: the server gives one (a direct one has its own)
        #[arg(long)]
        id: Option<String>,
        /// A first participant besides the owner; may be repeated
        #[arg(long = "participant", value_name = "USER")]
        participants: Vec<String>,
        /// Who joins later sees everything, or from his joining on
        #[arg(long, value_enum, default_value_t = HistoryShown::Joined)]
        history: HistoryShown,
    },
    /// Add a participant
    Add {
        #[command(flatten)]
        context: ContextArgs,
        /// The conversation
        conversation: String,
        /// The user to add
        #[arg(value_name = "USER")]
        participant: String,
        /// What he may do
        #[arg(long, value_enum)]
        role: Option<Role>,
    },
    /// Remove a participant
    Remove {
        #[command(flatten)]
        context: ContextArgs,
        /// The conversation
        conversation: String,
        /// The user to remove
        #[arg(value_name = "USER")]
        participant: String,
    },
    /// Show one conversation
    Show {
        #[command(flatten)]
        context: ContextArgs,
        /// The conversation
        conversation: String,
    },
    /// List the user's conversations
    List {
        #[command(flatten)]
        context: ContextArgs,
    },
}

impl ConversationVerb {
    /// Who asks.
    pub(crate) fn context(&self) -> &ContextArgs {
        match self {
            Self::Create { context, .. }
            | Self::Add { context, .. }
            | Self::Remove { context, .. }
            | Self::Show { context, .. }
            | Self::List { context } => context,
        }
    }
}

/// A conversation's kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Exactly two users
    Direct,
    /// Everybody writes
    Group,
    /// Few write, many read
    Channel,
}

/// A participant's role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// Reads only
    Reader,
    /// Reads and writes
    Writer,
    /// Adds and removes participants too
    Admin,
    /// Everything
    Owner,
}

/// What a participant who joins later sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum HistoryShown {
    /// Everything from the first event on
    Full,
    /// From his joining on
    Joined,
}

/// Options of `send`.
#[derive(Debug, Args)]
pub(crate) struct SendArgs {
    #[command(flatten)]
    pub(crate) context: ContextArgs,
    /// The conversation
    pub(crate) conversation: String,
    /// The message
    #[arg(required_unless_present = "stdin", conflicts_with = "stdin")]
    pub(crate) text: Option<String>,
    /// Send every line of the standard input, as the bytes that it is
    #[arg(long)]
    pub(crate) stdin: bool,
    /// An idempotency key: a repeat gets the first result (with --stdin: ID-<line>)
    #[arg(long, value_name = "ID")]
    pub(crate) client_id: Option<String>,
    /// At most so many messages a second
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: Option<u32>,
    /// At most so many unanswered messages
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) window: u32,
    /// Give up after so many seconds without progress
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: u64,
    /// Send as an action ("/me waves") instead of a message
    #[arg(long)]
    pub(crate) action: bool,
    /// The content type; default: text/plain; charset=utf-8
    #[arg(long, value_name = "TYPE")]
    pub(crate) content_type: Option<String>,
}

/// Options of `chat`.
#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) context: ContextArgs,
}

/// Options of `tail`.
#[derive(Debug, Args)]
pub(crate) struct TailArgs {
    #[command(flatten)]
    pub(crate) context: ContextArgs,
    /// The conversation
    pub(crate) conversation: String,
    /// Start after this seq; default: after the head
    #[arg(long, value_name = "N")]
    pub(crate) after_seq: Option<u64>,
    /// End after so many printed events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// Only this kind of events: message, action, created, participant_added…
    #[arg(long)]
    pub(crate) kind: Option<String>,
    /// Fail when it has not ended after so many seconds
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub(crate) timeout: Option<u64>,
}

/// Options of `history`.
#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    #[command(flatten)]
    pub(crate) context: ContextArgs,
    /// The conversation
    pub(crate) conversation: String,
    /// Only what comes after this seq
    #[arg(long, value_name = "N")]
    pub(crate) after_seq: Option<u64>,
    /// Only what comes before this seq
    #[arg(long, value_name = "N", conflicts_with = "after_seq")]
    pub(crate) before_seq: Option<u64>,
    /// At most so many events; without --after-seq the last ones
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// Only this kind of events
    #[arg(long)]
    pub(crate) kind: Option<String>,
    /// See everything that was acknowledged before this call, whatever the clocks do
    #[arg(long)]
    pub(crate) linearizable: bool,
}

/// What to do with a cluster.
#[derive(Debug, Subcommand)]
pub(crate) enum AdminVerb {
    /// Nodes, their states and leaders, and the quorum of every shard
    Status(ContextArgs),
    /// Every shard's leader, term and positions
    Shards(ContextArgs),
    /// Which brokers hold which shard
    Placement(ContextArgs),
    /// Make a broker the leader of a shard
    TransferLeader {
        #[command(flatten)]
        context: ContextArgs,
        /// The shard's number
        shard: u32,
        /// The broker's name
        broker: String,
    },
    /// Read every byte of every replica, check the checksums, and compare the replicas
    Verify(ContextArgs),
    /// Move a replica (not built yet)
    Move(NotBuiltArgs),
    /// Add a broker (not built yet)
    AddBroker(NotBuiltArgs),
    /// Remove a broker (not built yet)
    RemoveBroker(NotBuiltArgs),
    /// Take all leaders off a broker (not built yet)
    Drain(NotBuiltArgs),
    /// Back a cluster up (not built yet)
    Backup(NotBuiltArgs),
    /// Restore a backup (not built yet)
    Restore(NotBuiltArgs),
}

impl AdminVerb {
    fn json(&self) -> bool {
        match self {
            Self::Status(context) | Self::Shards(context) | Self::Placement(context) | Self::Verify(context) => {
                context.json
            }
            Self::TransferLeader { context, .. } => context.json,
            Self::Move(args)
            | Self::AddBroker(args)
            | Self::RemoveBroker(args)
            | Self::Drain(args)
            | Self::Backup(args)
            | Self::Restore(args) => args.json(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("stentor").chain(line.split_whitespace()))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn verbs_parse_as_the_public_face_says() {
        for line in [
            "dev",
            "dev --dir d --demo --exit --json",
            "dev --demo some/folder --exit",
            "token --user ann --device phone --dir d",
            "conversation create --kind group --user ann --participant bob --json --dir d",
            "conversation add c bob --dir d",
            "conversation list --dir d --json",
            "send c --stdin --rate 200 --json --timeout 300 --dir d",
            "send c text --client-id k1 --user ann --dir d",
            "tail c --after-seq 0 --count 2 --json --user bob --dir d",
            "history c --json --linearizable --limit 50",
            "admin transfer-leader 3 broker-2 --dir d",
            "admin verify --json --dir d",
            "admin move 1 broker-1 broker-2 --json",
            "cluster up --dir d --brokers 3 --gateways 2 --shards 16",
            "cluster kill broker-2 --dir d",
            "cluster add --role gateway --zone z --dir d",
            "cluster status --json --dir d",
            "chat --dir d --user ann --device phone",
            "bench send --local --json",
            "bench send --dir d --conversations 1 --window 64 --size 256 --rate 5000 --seconds 2 --repeats 5",
            "bench send --local --find-p99 20 --size real --via gateway",
            "bench fanout --local --devices 1000 --gateways 2 --stuck 1 --rate 20 --html report.html",
            "bench connect --local --concurrency 32 --resumed",
            "bench idle --local --devices 5000 --conversations 5",
            "bench peers --only one-64 --only cursors --quick --repeats 5 --json",
            "bench peers --list",
            "bench cursors --local --devices 100 --window 64",
            "bench resume --local --devices 10000 --conversations 20 --missed 5 --within 1",
            "bench history --dir d --conversations 100000 --messages 50 --page 50",
            "bench mixed --local --users 10000 --largest 10000 --zipf 1.1 --rate 1000 --churn 10 --json",
            "bench compare a.json b.json --json",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).err().unwrap());
        }
    }

    #[test]
    fn misuse_is_found() {
        for line in [
            "send --no-such-flag",
            "send c",
            "send c text --stdin",
            "history c --after-seq 1 --before-seq 2",
            "dance",
            "bench dance",
            "bench send --size 0",
            "bench send --rate 1 --find-p99 2",
            "bench send --seconds -1",
            "bench peers --repeats 0",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn demo_takes_a_path_or_none() {
        let Verb::Dev(args) = parse("dev --demo --exit").unwrap().verb else { unreachable!() };
        assert_eq!(args.demo, Some(None));
        let Verb::Dev(args) = parse("dev --demo a/b").unwrap().verb else { unreachable!() };
        assert_eq!(args.demo, Some(Some("a/b".into())));
    }
}
