//! `stentor-chaos`: the runs of chaos on real processes, one after the other (`make chaos`). Must never end well unless
//! every run was judged and found good.

#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use stentor_chaos::cluster::{ClusterError, Kind, Report, Scenario, find};

/// Kills real processes of Stentor under load, and judges what clients were promised.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Which runs, in this order; all of them if none is named.
    #[arg(value_enum)]
    runs: Vec<Run>,
    /// A few seconds of each.
    #[arg(long)]
    short: bool,
    /// How many lines are sent; operations of each device in `mixed`.
    #[arg(long)]
    size: Option<u64>,
    /// At least so many faults must meet a run; in `all` exactly so many are made.
    #[arg(long)]
    faults: Option<u64>,
    /// Decides what is left to chance, as far as processes let it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The binary under test; otherwise the one that was built beside this one.
    #[arg(long, env = "STENTOR_BIN")]
    stentor: Option<PathBuf>,
    /// One report a line on stdout.
    #[arg(long)]
    json: bool,
}

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Run {
    /// A random broker is killed every 3 s, under 200 lines a second.
    Brokers,
    /// A random gateway is killed every 3 s, under 200 lines a second.
    Gateways,
    /// All three brokers are killed at once, with many sends in flight.
    All,
    /// A random node is killed every 3 s, under many devices that do everything.
    Mixed,
}

impl Run {
    fn kind(self) -> Kind {
        match self {
            Self::Brokers => Kind::Brokers,
            Self::Gateways => Kind::Gateways,
            Self::All => Kind::All,
            Self::Mixed => Kind::Mixed,
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    // So that Ctrl-C takes the cluster down too: its end is in a drop.
    let outcome = tokio::select! {
        outcome = all(&args) => outcome,
        _ = tokio::signal::ctrl_c() => Err(ClusterError::Interrupted),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("stentor-chaos: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn all(args: &Args) -> Result<bool, ClusterError> {
    let binary = match &args.stentor {
        Some(named) if named.is_file() => named.clone(),
        Some(named) => return Err(ClusterError::NoBinary(named.clone())),
        None => find()?,
    };
    let runs = if args.runs.is_empty() { Run::value_variants().to_vec() } else { args.runs.clone() };
    let mut ok = true;
    for run in runs {
        let make = if args.short { Scenario::short } else { Scenario::full };
        let scenario = make(run.kind(), binary.clone(), args.seed);
        let scenario = Scenario {
            size: args.size.unwrap_or(scenario.size),
            faults: args.faults.unwrap_or(scenario.faults),
            ..scenario
        };
        eprintln!("{}: {} on {}", run.kind().name(), scenario.size, binary.display());
        let report = scenario.run().await?;
        ok &= report.ok;
        print(&report, args.json);
    }
    Ok(ok)
}

fn print(report: &Report, json: bool) {
    match serde_json::to_string(report) {
        Ok(line) if json => println!("{line}"),
        _ => print!("{report}"),
    }
}
