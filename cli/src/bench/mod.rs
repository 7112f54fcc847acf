//! `stentor bench`: puts a cluster under load through its public faces and prints what that cost. Must never leave a
//! cluster behind that it started, nor print a figure of a run whose counts were wrong.

mod peers;
mod print;

use std::{path::Path, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};
use stentor_bench::{
    BenchError, Live, Local, Observer, Pace, Report, Size, Target, Timing,
    body::{Bodies, BodySize},
    report::{Cluster, Phase},
    scenario::{
        api::ApiLoad,
        connect::{ConnectLoad, ConnectSettings},
        fanout::{FanoutLoad, FanoutSettings},
        idle::{IdleLoad, IdleSettings},
        send::{SendLoad, SendSettings},
    },
    search,
};

use crate::{
    args::bench::{BenchVerb, ConnectBenchArgs, FanoutBenchArgs, IdleBenchArgs, RunArgs, SendBenchArgs, SizeArg, Via},
    demo,
    dev::stop_signal,
    failure::Failure,
    output::Output,
};

/// A scenario with its settings.
enum Work {
    Send { settings: SendSettings, pace: Pace, find_p99: Option<Duration>, via: Via },
    Fanout { settings: FanoutSettings, pace: Pace },
    Connect(ConnectSettings),
    Idle(IdleSettings),
}

/// Runs one verb.
pub(crate) async fn run(verb: BenchVerb, output: Output) -> Result<(), Failure> {
    let (run, work) = match verb {
        BenchVerb::Send(args) => (args.run.clone(), send(&args)),
        BenchVerb::Fanout(args) => (args.run.clone(), fanout(&args)),
        BenchVerb::Connect(args) => (args.run.clone(), connect(&args)),
        BenchVerb::Idle(args) => (args.run.clone(), idle(&args)),
        BenchVerb::Peers(args) => return peers::run(&args, output).await,
    };
    let stop = stop_signal()?;
    tokio::select! {
        report = Box::pin(measure(&run, &work, output)) => print::report(&report?, output),
        // Dropping the run takes its cluster down.
        () = stop => Err(Failure::failed("stopped before it was measured")),
    }
}

fn send(args: &SendBenchArgs) -> Work {
    let settings = SendSettings {
        conversations: args.conversations as usize,
        window: args.window as usize,
        sessions: args.sessions as usize,
        body: body_size(args.size),
    };
    let find_p99 = args.find_p99.map(|ms| Duration::from_secs_f64(ms / 1e3));
    Work::Send { settings, pace: pace(args.rate), find_p99, via: args.via }
}

fn fanout(args: &FanoutBenchArgs) -> Work {
    let settings = FanoutSettings {
        conversations: args.conversations as usize,
        devices: args.devices as usize,
        devices_per_user: args.devices_per_user as usize,
        stuck: args.stuck as usize,
        window: args.window as usize,
        body: body_size(args.size),
        cursors: false,
    };
    Work::Fanout { settings, pace: pace(args.rate) }
}

fn connect(args: &ConnectBenchArgs) -> Work {
    Work::Connect(ConnectSettings { concurrency: args.concurrency as usize, resumed: args.resumed })
}

fn idle(args: &IdleBenchArgs) -> Work {
    Work::Idle(IdleSettings { devices: args.devices as usize, conversations: args.conversations as usize })
}

fn pace(rate: Option<f64>) -> Pace {
    rate.map_or(Pace::Closed, |rate_per_s| Pace::Open { rate_per_s })
}

fn body_size(size: SizeArg) -> BodySize {
    match size {
        SizeArg::Real => BodySize::Real,
        SizeArg::Bytes(bytes) => BodySize::Bytes(bytes),
    }
}

fn bodies(size: BodySize) -> Bodies {
    match size {
        BodySize::Bytes(bytes) => Bodies::of_bytes(bytes),
        BodySize::Real => Bodies::real(demo::sample_texts()),
    }
}

/// Finds or starts the cluster, and puts it under load.
async fn measure(run: &RunArgs, work: &Work, output: Output) -> Result<Report, Failure> {
    raise_file_limit();
    let bar = spinner(output);
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
    let report = phases(&target, cluster, work, timing, &observer).await;
    bar.finish_and_clear();
    report
}

fn there_already(dir: &Path) -> Result<(Target, Cluster), Failure> {
    let target = Target::read(dir).map_err(|error| Failure::misuse(error.to_string()))?;
    let (brokers, gateways) = target.size();
    let cluster = Cluster { local: false, brokers: brokers as u32, gateways: gateways as u32, shards: None };
    Ok((target, cluster))
}

async fn phases(
    target: &Target,
    cluster: Cluster,
    work: &Work,
    timing: Timing,
    observer: &Observer,
) -> Result<Report, Failure> {
    match *work {
        Work::Send { settings, pace, find_p99, via: Via::Gateway } => {
            let extra = serde_json::json!({ "load": settings, "pace": pace, "find_p99": find_p99, "via": "gateway" });
            let mut report = Report::begin("send", cluster, &extra, timing);
            let load = SendLoad::prepare(target, &settings, bodies(settings.body)).await.map_err(failure)?;
            report.phases = match find_p99 {
                None => vec![Phase::new("send", load.run(pace, timing, observer).await.map_err(failure)?)],
                Some(p99) => search_phases(&load, p99, timing, observer).await?,
            };
            load.close().await;
            Ok(report)
        }
        Work::Send { find_p99: Some(_), via: Via::Api, .. } => {
            Err(Failure::misuse("--find-p99 is for devices at gateways"))
        }
        Work::Send { settings, pace, via: Via::Api, .. } => {
            let extra = serde_json::json!({ "load": settings, "pace": pace, "via": "api" });
            let mut report = Report::begin("send", cluster, &extra, timing);
            let load = ApiLoad::prepare(target, &settings, bodies(settings.body)).await;
            let outcomes = load.map_err(failure)?.run(pace, timing, observer).await.map_err(failure)?;
            report.phases = vec![Phase::new("send through the API", outcomes)];
            Ok(report)
        }
        Work::Fanout { settings, pace } => {
            let extra = serde_json::json!({ "load": settings, "pace": pace });
            let mut report = Report::begin("fanout", cluster, &extra, timing);
            let load = FanoutLoad::prepare(target, &settings, bodies(settings.body)).await.map_err(failure)?;
            let outcomes = load.run(pace, timing, observer).await.map_err(failure)?;
            report.phases = vec![Phase::new("deliveries", outcomes)];
            load.close().await;
            Ok(report)
        }
        Work::Connect(settings) => {
            let mut report = Report::begin("connect", cluster, &settings, timing);
            let load = ConnectLoad::prepare(target, &settings).map_err(failure)?;
            report.phases = vec![Phase::new("connect", load.run(timing, observer).await.map_err(failure)?)];
            Ok(report)
        }
        Work::Idle(settings) => {
            let mut report = Report::begin("idle", cluster, &settings, timing);
            let mut load = IdleLoad::prepare(target, &settings).map_err(failure)?;
            report.phases = vec![Phase::new("connect and idle", load.run(timing, observer).await.map_err(failure)?)];
            load.close().await;
            Ok(report)
        }
    }
}

/// Every rate that was tried, and the one that held, measured as often as asked for.
async fn search_phases(
    load: &SendLoad,
    p99: Duration,
    timing: Timing,
    observer: &Observer,
) -> Result<Vec<Phase>, Failure> {
    let steps = search::find_p99(load, p99, timing, observer).await.map_err(failure)?;
    let best = steps.iter().rev().find(|step| step.held).map(|step| step.rate_per_s);
    let mut phases: Vec<Phase> = steps
        .into_iter()
        .map(|step| {
            let verdict = if step.held { "held" } else { "not held" };
            Phase::new(format!("{:.0}/s {verdict}", step.rate_per_s), vec![step.outcome])
        })
        .collect();
    let Some(rate_per_s) = best else {
        return Err(Failure::failed(format_args!("no rate holds a p99 of {p99:?}")));
    };
    let outcomes = load.run(Pace::Open { rate_per_s }, timing, observer).await.map_err(failure)?;
    phases.push(Phase::new(format!("{rate_per_s:.0}/s"), outcomes));
    Ok(phases)
}

/// A line that lives while something is measured.
fn spinner(output: Output) -> ProgressBar {
    let bar = output.progress(0, "");
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
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
        other => Failure::failed(other),
    }
}
