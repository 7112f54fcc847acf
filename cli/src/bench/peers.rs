//! `stentor bench peers`: other servers beside ours, in turn, in one run. Must never pass for complete when a row has
//! no figures.

use std::time::Duration;

use indicatif::ProgressStyle;
use stentor_bench::{
    BenchError, Timing,
    peers::{run, works},
};

use crate::{args::bench::PeersBenchArgs, dev::stop_signal, failure::Failure, output::Output};

/// Of `--quick`: a work with two peers takes less than a minute.
const QUICK: (f64, f64) = (1.0, 2.0);
const WHOLE: (f64, f64) = (3.0, 10.0);

/// Runs them and prints the table.
pub(super) async fn run(args: &PeersBenchArgs, output: Output) -> Result<(), Failure> {
    if args.list {
        return list(output);
    }
    super::raise_file_limit();
    let (warm_up_s, seconds) = if args.quick { QUICK } else { WHOLE };
    let settings = run::Settings {
        binary: std::env::current_exe().map_err(Failure::failed)?,
        timing: Timing { warm_up_s, seconds: args.seconds.unwrap_or(seconds), repeats: args.repeats },
        only: args.only.clone(),
        promised: args.quick,
    };
    let bar = output.progress(0, "");
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    let shown = bar.clone();
    let progress = move |what: &str| shown.set_message(what.to_owned());
    let stop = stop_signal()?;
    let table = tokio::select! {
        table = Box::pin(run::run(&settings, &progress)) => table.map_err(failure)?,
        // Dropping the run ends every server that it started.
        () = stop => return Err(Failure::failed("stopped before everything was measured")),
    };
    bar.finish_and_clear();
    match output.json() {
        true => output.value(&table)?,
        false => output.text(table.text().trim_end())?,
    }
    match table.lacking() {
        0 => Ok(()),
        lacking => Err(Failure::failed(format_args!("{lacking} of {} rows were not measured", table.rows.len()))),
    }
}

fn list(output: Output) -> Result<(), Failure> {
    let mut rows = vec![["work", "what", "beside"].map(str::to_owned).to_vec()];
    for work in works::all() {
        let beside: Vec<_> = work.sides.iter().map(|side| side.against.name()).collect();
        rows.push(vec![work.name.to_owned(), work.what.to_owned(), beside.join("; ")]);
    }
    output.table(&rows)
}

fn failure(error: BenchError) -> Failure {
    match error {
        BenchError::Settings(what) => Failure::Misuse(what),
        other => Failure::failed(other),
    }
}
