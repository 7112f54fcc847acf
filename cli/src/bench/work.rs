//! The scenarios as they were asked for: from options to works, and from a crew that has prepared one to the phases of a
//! report. Must never give a setting another meaning than the option's help says.

use std::time::Duration;

use stentor_bench::{
    BenchError, Pace, Timing,
    body::{Bodies, BodySize},
    report::Phase,
    scenario::{
        Work, connect::ConnectSettings, fanout::FanoutSettings, history::HistorySettings, idle::IdleSettings,
        mixed::MixedSettings, resume::ResumeSettings, send::SendSettings,
    },
    search,
    workers::Crew,
};

use crate::{
    args::bench::{
        ConnectBenchArgs, FanoutBenchArgs, HistoryBenchArgs, IdleBenchArgs, MixedBenchArgs, ResumeBenchArgs,
        SendBenchArgs, SizeArg, Via,
    },
    demo,
};

pub(super) fn send(args: &SendBenchArgs) -> Work {
    let load = SendSettings {
        conversations: args.conversations as usize,
        window: args.window as usize,
        sessions: args.sessions as usize,
        body: body_size(args.size),
    };
    Work::Send { load, pace: pace(args.rate), find_p99_ms: args.find_p99, via_api: args.via == Via::Api }
}

pub(super) fn fanout(args: &FanoutBenchArgs, cursors: bool) -> Work {
    let load = FanoutSettings {
        conversations: args.conversations as usize,
        devices: args.devices as usize,
        devices_per_user: args.devices_per_user as usize,
        stuck: args.stuck as usize,
        window: args.window as usize,
        body: body_size(args.size),
        cursors,
    };
    Work::Fanout { load, pace: pace(args.rate) }
}

pub(super) fn connect(args: &ConnectBenchArgs) -> Work {
    let load = ConnectSettings { concurrency: args.concurrency as usize, resumed: args.resumed };
    Work::Connect { load, pace: pace(args.rate) }
}

pub(super) fn idle(args: &IdleBenchArgs) -> Work {
    Work::Idle(IdleSettings { devices: args.devices as usize, conversations: args.conversations as usize })
}

pub(super) fn resume(args: &ResumeBenchArgs) -> Work {
    Work::Resume(ResumeSettings {
        devices: args.devices as usize,
        conversations: args.conversations as usize,
        missed: args.missed as usize,
        within_s: args.within,
        body: body_size(args.size),
    })
}

pub(super) fn history(args: &HistoryBenchArgs) -> Work {
    let load = HistorySettings {
        conversations: args.conversations as usize,
        messages: args.messages as usize,
        page: args.page,
        sessions: (args.sessions as usize).min(args.conversations as usize),
        concurrency: args.concurrency as usize,
        body: body_size(args.size),
    };
    Work::History { load, pace: pace(args.rate) }
}

pub(super) fn mixed(args: &MixedBenchArgs) -> Work {
    Work::Mixed(MixedSettings {
        users: args.users as usize,
        conversations: args.conversations as usize,
        largest: args.largest as usize,
        zipf: args.zipf,
        rate_per_s: args.rate,
        churn: args.churn,
        body: body_size(args.size),
        seed: args.seed,
    })
}

/// The phases of a work that the crew has prepared.
pub(super) async fn phases(crew: &mut Crew<'_>, work: &Work, timing: Timing) -> Result<Vec<Phase>, BenchError> {
    if let Work::Send { find_p99_ms: Some(ms), .. } = work {
        return search_phases(crew, Duration::from_secs_f64(ms / 1e3), timing).await;
    }
    Ok(vec![Phase::new(work.name(), crew.run(work.pace(), timing).await?)])
}

/// What cannot be done, before anything is started.
pub(super) fn check(work: &Work) -> Result<(), BenchError> {
    match work {
        Work::Send { via_api: true, find_p99_ms: Some(_), .. } => {
            Err(BenchError::Settings("--find-p99 is for devices at gateways".into()))
        }
        _ => Ok(()),
    }
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

/// What is sent.
pub(super) fn bodies(size: BodySize) -> Bodies {
    match size {
        BodySize::Bytes(bytes) => Bodies::of_bytes(bytes),
        BodySize::Real => Bodies::real(demo::sample_texts()),
    }
}

/// Every rate that was tried, and the one that held, measured as often as asked for.
async fn search_phases(crew: &mut Crew<'_>, p99: Duration, timing: Timing) -> Result<Vec<Phase>, BenchError> {
    let steps = search::find_p99(crew, p99, timing).await?;
    let best = steps.iter().rev().find(|step| step.held).map(|step| step.rate_per_s);
    let step = |step: search::Step| {
        let verdict = if step.held { "held" } else { "not held" };
        Phase::new(format!("{:.0}/s {verdict}", step.rate_per_s), vec![step.outcome])
    };
    let mut phases: Vec<Phase> = steps.into_iter().map(step).collect();
    let Some(rate_per_s) = best else {
        return Err(BenchError::Cluster(format!("no rate holds a p99 of {p99:?}")));
    };
    phases.push(Phase::new("highest", crew.run(Pace::Open { rate_per_s }, timing).await?));
    Ok(phases)
}
