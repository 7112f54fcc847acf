//! `stentor bench`: puts a cluster under load through its public faces and prints what that cost. Must never leave a
//! cluster behind that it started, nor print a figure of a run whose counts were wrong.

mod peers;
mod print;
mod work;
mod worker;

use std::path::Path;

use indicatif::ProgressBar;
use stentor_bench::{
    BenchError, Live, Local, Observer, Report, Size, Target, Timing,
    report::{self, Cluster},
    scenario::Work,
    workers::{self, Run},
};
use stentor_proto::v1::Refusal;

use crate::{
    args::bench::{BenchVerb, CompareArgs, RunArgs},
    dev::stop_signal,
    failure::Failure,
    output::Output,
};

/// Runs one verb.
pub(crate) async fn run(verb: BenchVerb, output: Output) -> Result<(), Failure> {
    let (run, work) = match verb {
        BenchVerb::Peers(args) => return peers::run(&args, output).await,
        BenchVerb::Send(args) => (args.run.clone(), work::send(&args)),
        BenchVerb::Fanout(args) => (args.run.clone(), work::fanout(&args, false)),
        BenchVerb::Cursors(args) => (args.run.clone(), work::fanout(&args, true)),
        BenchVerb::Connect(args) => (args.run.clone(), work::connect(&args)),
        BenchVerb::Idle(args) => (args.run.clone(), work::idle(&args)),
        BenchVerb::Resume(args) => (args.run.clone(), work::resume(&args)),
        BenchVerb::History(args) => (args.run.clone(), work::history(&args)),
        BenchVerb::Mixed(args) => (args.run.clone(), work::mixed(&args)),
        BenchVerb::Worker(args) => return Box::pin(worker::run(&args, output)).await,
        BenchVerb::Compare(args) => return compare(&args, output),
    };
    let stop = stop_signal()?;
    let report = tokio::select! {
        report = Box::pin(measure(&run, &work, output)) => report?,
        // Dropping the run takes its cluster down.
        () = stop => return Err(Failure::failed("stopped before it was measured")),
    };
    if let Some(path) = &run.html {
        std::fs::write(path, report::page(&report))
            .map_err(|error| Failure::failed(format_args!("cannot write {}: {error}", path.display())))?;
    }
    warn(&report, output);
    print::report(&report, output)
}

/// What makes figures worth less than they look.
fn warn(report: &Report, output: Output) {
    let machine = &report.machine;
    if report.cluster.local && machine.file_system == "tmpfs" {
        output.news("the cluster's folder was in memory, where an fsync costs nothing: set TMPDIR");
    }
    if machine.load_before > machine.cpus as f64 * 0.5 {
        output.news(&format!("the machine was not quiet before: load {}", machine.load_before));
    }
    for worker in &report.workers {
        if worker.machine.load_before > worker.machine.cpus as f64 * 0.5 {
            output.news(&format!("{} was not quiet before: load {}", worker.address, worker.machine.load_before));
        }
    }
}

/// Finds or starts the cluster, and puts it under load.
async fn measure(run: &RunArgs, work: &Work, output: Output) -> Result<Report, Failure> {
    raise_file_limit();
    work::check(work).map_err(failure)?;
    let bar = output.spinner();
    let size = Size { brokers: run.brokers, gateways: run.gateways, shards: run.shards };
    let mut local = None;
    let (target, cluster) = match (&run.dir, run.local) {
        (_, true) => {
            bar.set_message(format!("starting {} brokers and {} gateways", size.brokers, size.gateways));
            let binary = std::env::current_exe().map_err(Failure::failed)?;
            let started = local.insert(Local::start(&binary, size).await.map_err(failure)?);
            (started.target().map_err(failure)?, Cluster::local(size))
        }
        (Some(dir), false) => there_already(dir)?,
        (None, false) => return Err(Failure::misuse("say which cluster: --local, or --dir D (or STENTOR_DIR)")),
    };
    let timing = Timing { warm_up_s: run.warm_up, seconds: run.seconds, repeats: run.repeats };
    bar.set_message("preparing");
    let observer = observer(&bar, run.repeats);
    let mut report = Report::begin(work.name(), cluster, &work.settings(), timing);
    let led = match run.workers.is_empty() {
        true => Box::pin(make(&mut report, &target, work, &observer)).await.map_err(failure),
        false => Box::pin(lead(&mut report, &target, work, run, &observer)).await,
    };
    bar.finish_and_clear();
    led.map(|()| report)
}

/// Makes the load in this process.
async fn make(report: &mut Report, target: &Target, work: &Work, observer: &Observer) -> Result<(), BenchError> {
    let mut load = Box::pin(work.prepare(target, work::bodies)).await?;
    let timing = report.timing;
    let lead = async |crew: &mut workers::Crew<'_>| work::phases(crew, work, timing).await;
    report.phases = workers::with(target, &mut load, work.rhythm(), observer, lead).await?;
    load.close().await;
    Ok(())
}

/// Leads workers that make it.
async fn lead(
    report: &mut Report,
    target: &Target,
    work: &Work,
    run: &RunArgs,
    observer: &Observer,
) -> Result<(), Failure> {
    let keys = worker::keys(target, &run.keys, "bench-coordinator")?;
    let tls = keys.client().map_err(failure)?;
    let all = Run { workers: &run.workers, tls: &tls, work, observer };
    let (mut crew, found) = Box::pin(workers::gather(target, all)).await.map_err(failure)?;
    report.workers = found;
    report.phases = work::phases(&mut crew, work, report.timing).await.map_err(failure)?;
    crew.dismiss().await.map_err(failure)
}

fn there_already(dir: &Path) -> Result<(Target, Cluster), Failure> {
    let target = Target::read(dir).map_err(|error| Failure::misuse(error.to_string()))?;
    let (brokers, gateways) = target.size();
    let cluster = Cluster { local: false, brokers: brokers as u32, gateways: gateways as u32, shards: None };
    Ok((target, cluster))
}

fn compare(args: &CompareArgs, output: Output) -> Result<(), Failure> {
    let read = |path: &Path| Report::read(path).map_err(|error| Failure::misuse(error.to_string()));
    let (before, after) = (read(&args.before)?, read(&args.after)?);
    let changes = report::compare(&before, &after).map_err(failure)?;
    print::changes(&before, &after, &changes, output)
}

fn observer(bar: &ProgressBar, repeats: u32) -> Observer {
    if bar.is_hidden() {
        return Observer::none();
    }
    let bar = bar.clone();
    Observer::new(move |live: &Live| {
        let part = match live.repeat {
            0 => "warm-up".to_owned(),
            n => format!("{n} of {repeats}"),
        };
        bar.set_message(format!(
            "{part}  {:.0} s  {:.0}/s  p50 {:.2} ms  p99 {:.2} ms  {} errors",
            live.elapsed.as_secs_f64(),
            live.rate_per_s,
            live.p50_ms,
            live.p99_ms,
            live.errors
        ));
    })
}

/// Each device has a socket of its own. What cannot be raised shows when sockets run out.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

fn failure(error: BenchError) -> Failure {
    match error {
        BenchError::Settings(what) => Failure::Misuse(what),
        busy @ BenchError::Busy { .. } => Failure::Refused(Refusal {
            reason: workers::BUSY.into(),
            message: busy.to_string(),
            retryable: true,
            last: 0,
        }),
        other => Failure::failed(other),
    }
}
