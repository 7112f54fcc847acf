//! The binary `stentor`: reads the command line, calls the verb, turns its end into an exit code (0 done, 1 failed,
//! 2 misuse, 3 refused). Decides nothing about conversations itself.

mod admin;
mod api;
mod args;
mod bench;
mod chat;
mod cluster;
mod cluster_file;
mod context;
mod conversation;
mod demo;
mod dev;
mod devices;
mod event_line;
mod failure;
mod history;
mod keys;
mod layout;
mod node;
mod output;
mod ports;
mod send;
mod session;
mod tail;

use std::{io::IsTerminal, process::ExitCode};

use clap::{Parser, error::ErrorKind};

use crate::{
    args::{AdminVerb, Cli, Verb},
    failure::Failure,
    output::Output,
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misuse(&error),
    };
    let output = Output::new(cli.verb.json());
    let ended = start(cli.verb, output);
    let Err(failure) = ended else { return ExitCode::SUCCESS };
    output.failure(&failure);
    ExitCode::from(failure.exit_code())
}

/// What clap could not read. Help and version are no failures.
fn misuse(error: &clap::Error) -> ExitCode {
    let wants_json = std::env::args().any(|arg| arg == "--json");
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        _ if wants_json => {
            let text = error.render().to_string();
            let first = text.lines().next().unwrap_or_default();
            Output::new(true).failure(&Failure::misuse(first.trim_start_matches("error: ")));
        }
        _ => {
            let _ = error.print();
        }
    }
    ExitCode::from(2)
}

fn start(verb: Verb, output: Output) -> Result<(), Failure> {
    // A log line in the middle of a drawn screen helps nobody.
    let is_drawn_over = matches!(verb, Verb::Chat(_)) && std::io::stderr().is_terminal();
    let filter = tracing_subscriber::EnvFilter::try_from_env("STENTOR_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn,openraft=error"));
    if !is_drawn_over {
        // A log that cannot be written, on a full disk for example, must not bring down the thread that logs.
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        log.log_internal_errors(false).init();
    }
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    // A worker's machine has nothing else to do.
    let shares_its_machine = matches!(&verb, Verb::Bench(verb) if !matches!(verb, args::bench::BenchVerb::Worker(_)));
    if shares_its_machine && std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        // Half of the machine: what it measures is usually on the other half.
        runtime.worker_threads(std::thread::available_parallelism().map_or(1, |cores| usize::from(cores).div_ceil(2)));
    }
    let runtime = runtime.enable_all().build().map_err(Failure::failed)?;
    runtime.block_on(call(verb, output))
}

async fn call(verb: Verb, output: Output) -> Result<(), Failure> {
    let not_built = |what: &str| Err(Failure::NotBuilt(format!("`stentor {what}`")));
    match verb {
        Verb::Dev(args) => Box::pin(dev::run(args, output)).await,
        Verb::Broker(args) => Box::pin(node::broker(&args)).await,
        Verb::Gateway(args) => Box::pin(node::gateway(&args)).await,
        Verb::Token(args) => output.text(&context::minted(&args.context, args.app.as_deref())?),
        Verb::Conversation(verb) => Box::pin(conversation::run(verb, output)).await,
        Verb::Send(args) => Box::pin(send::run(args, output)).await,
        Verb::Tail(args) => Box::pin(tail::run(args, output)).await,
        Verb::History(args) => Box::pin(history::run(args, output)).await,
        Verb::Admin(AdminVerb::Move(_)) => not_built("admin move"),
        Verb::Admin(AdminVerb::AddBroker(_)) => not_built("admin add-broker"),
        Verb::Admin(AdminVerb::RemoveBroker(_)) => not_built("admin remove-broker"),
        Verb::Admin(AdminVerb::Drain(_)) => not_built("admin drain"),
        Verb::Admin(AdminVerb::Backup(_)) => not_built("admin backup"),
        Verb::Admin(AdminVerb::Restore(_)) => not_built("admin restore"),
        Verb::Admin(verb) => Box::pin(admin::run(verb, output)).await,
        Verb::Cluster(verb) => Box::pin(cluster::run(verb, output)).await,
        Verb::Chat(args) => Box::pin(chat::run(args, output)).await,
        Verb::Bench(verb) => Box::pin(bench::run(verb, output)).await,
        Verb::Chaos(_) => not_built("chaos"),
    }
}
