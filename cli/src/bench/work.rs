//! The scenarios as they were asked for: from options to settings, and from settings to the phases of a report. Must
//! never give a setting another meaning than the option's help says.

use std::time::Duration;

use serde::Serialize;
use stentor_bench::{
    BenchError, Observer, Pace, Report, Target, Timing,
    body::{Bodies, BodySize},
    report::{Cluster, Phase},
    scenario::{
        api::ApiLoad,
        connect::{ConnectLoad, ConnectSettings},
        fanout::{FanoutLoad, FanoutSettings},
        history::{HistoryLoad, HistorySettings},
        idle::{IdleLoad, IdleSettings},
        mixed::{MixedLoad, MixedSettings},
        resume::{ResumeLoad, ResumeSettings},
        send::{SendLoad, SendSettings},
    },
    search,
};

use crate::{
    args::bench::{
        ConnectBenchArgs, FanoutBenchArgs, HistoryBenchArgs, IdleBenchArgs, MixedBenchArgs, ResumeBenchArgs,
        SendBenchArgs, SizeArg, Via,
    },
    demo,
};

/// A scenario with its settings.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(untagged)]
pub(super) enum Work {
    /// Through gateways or the API.
    Send {
        /// Conversations, window…
        load: SendSettings,
        /// Open or closed.
        pace: Pace,
        /// A search, instead of `pace`.
        find_p99_ms: Option<f64>,
        /// Through the brokers' API.
        via_api: bool,
    },
    /// With or without cursors.
    Fanout {
        /// Devices, window…
        load: FanoutSettings,
        /// Open or closed.
        pace: Pace,
    },
    /// Handshakes.
    Connect {
        /// Concurrency…
        load: ConnectSettings,
        /// Open or closed.
        pace: Pace,
    },
    /// Connections that rest.
    Idle(IdleSettings),
    /// Everybody comes back.
    Resume(ResumeSettings),
    /// Pages.
    History {
        /// Conversations, page…
        load: HistorySettings,
        /// Open or closed.
        pace: Pace,
    },
    /// A day in small.
    Mixed(MixedSettings),
}

impl Work {
    pub(super) fn send(args: &SendBenchArgs) -> Self {
        let load = SendSettings {
            conversations: args.conversations as usize,
            window: args.window as usize,
            sessions: args.sessions as usize,
            body: body_size(args.size),
        };
        Self::Send { load, pace: pace(args.rate), find_p99_ms: args.find_p99, via_api: args.via == Via::Api }
    }

    pub(super) fn fanout(args: &FanoutBenchArgs, cursors: bool) -> Self {
        let load = FanoutSettings {
            conversations: args.conversations as usize,
            devices: args.devices as usize,
            devices_per_user: args.devices_per_user as usize,
            stuck: args.stuck as usize,
            window: args.window as usize,
            body: body_size(args.size),
            cursors,
        };
        Self::Fanout { load, pace: pace(args.rate) }
    }

    pub(super) fn connect(args: &ConnectBenchArgs) -> Self {
        let load = ConnectSettings { concurrency: args.concurrency as usize, resumed: args.resumed };
        Self::Connect { load, pace: pace(args.rate) }
    }

    pub(super) fn idle(args: &IdleBenchArgs) -> Self {
        Self::Idle(IdleSettings { devices: args.devices as usize, conversations: args.conversations as usize })
    }

    pub(super) fn resume(args: &ResumeBenchArgs) -> Self {
        Self::Resume(ResumeSettings {
            devices: args.devices as usize,
            conversations: args.conversations as usize,
            missed: args.missed as usize,
            within_s: args.within,
            body: body_size(args.size),
        })
    }

    pub(super) fn history(args: &HistoryBenchArgs) -> Self {
        let load = HistorySettings {
            conversations: args.conversations as usize,
            messages: args.messages as usize,
            page: args.page,
            sessions: (args.sessions as usize).min(args.conversations as usize),
            concurrency: args.concurrency as usize,
            body: body_size(args.size),
        };
        Self::History { load, pace: pace(args.rate) }
    }

    pub(super) fn mixed(args: &MixedBenchArgs) -> Self {
        Self::Mixed(MixedSettings {
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

    fn name(&self) -> &'static str {
        match self {
            Self::Send { .. } => "send",
            Self::Fanout { load, .. } if load.cursors => "cursors",
            Self::Fanout { .. } => "fanout",
            Self::Connect { .. } => "connect",
            Self::Idle(_) => "idle",
            Self::Resume(_) => "resume",
            Self::History { .. } => "history",
            Self::Mixed(_) => "mixed",
        }
    }

    /// Puts a cluster under this load.
    pub(super) async fn run(
        &self,
        target: &Target,
        cluster: Cluster,
        timing: Timing,
        observer: &Observer,
    ) -> Result<Report, BenchError> {
        let mut report = Report::begin(self.name(), cluster, self, timing);
        report.phases = Box::pin(self.phases(target, timing, observer)).await?;
        Ok(report)
    }

    async fn phases(&self, target: &Target, timing: Timing, observer: &Observer) -> Result<Vec<Phase>, BenchError> {
        let outcomes = match self {
            Self::Send { load, pace, via_api: true, find_p99_ms: None } => {
                ApiLoad::prepare(target, load, bodies(load.body)).await?.run(*pace, timing, observer).await?
            }
            Self::Send { via_api: true, .. } => {
                return Err(BenchError::Settings("--find-p99 is for devices at gateways".into()));
            }
            Self::Send { load, pace, find_p99_ms, .. } => {
                let sending = SendLoad::prepare(target, load, bodies(load.body)).await?;
                if let Some(ms) = find_p99_ms {
                    return search_phases(&sending, Duration::from_secs_f64(ms / 1e3), timing, observer).await;
                }
                let outcomes = sending.run(*pace, timing, observer).await?;
                sending.close().await;
                outcomes
            }
            Self::Fanout { load, pace } => {
                let fanout = FanoutLoad::prepare(target, load, bodies(load.body)).await?;
                let outcomes = fanout.run(*pace, timing, observer).await?;
                fanout.close().await;
                outcomes
            }
            Self::Connect { load, pace } => ConnectLoad::prepare(target, load)?.run(*pace, timing, observer).await?,
            Self::Idle(load) => {
                let mut idle = IdleLoad::prepare(target, load)?;
                let outcomes = idle.run(timing, observer).await?;
                idle.close().await;
                outcomes
            }
            Self::Resume(load) => {
                let mut resume = ResumeLoad::prepare(target, load, bodies(load.body)).await?;
                let outcomes = resume.run(timing, observer).await?;
                resume.close().await;
                outcomes
            }
            Self::History { load, pace } => {
                let history = HistoryLoad::prepare(target, load, bodies(load.body)).await?;
                let outcomes = history.run(*pace, timing, observer).await?;
                history.close().await;
                outcomes
            }
            Self::Mixed(load) => {
                let mixed = MixedLoad::prepare(target, load, bodies(load.body)).await?;
                let outcomes = mixed.run(timing, observer).await?;
                mixed.close().await;
                outcomes
            }
        };
        Ok(vec![Phase::new(self.name(), outcomes)])
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

fn bodies(size: BodySize) -> Bodies {
    match size {
        BodySize::Bytes(bytes) => Bodies::of_bytes(bytes),
        BodySize::Real => Bodies::real(demo::sample_texts()),
    }
}

/// Every rate that was tried, and the one that held, measured as often as asked for.
async fn search_phases(
    load: &SendLoad,
    p99: Duration,
    timing: Timing,
    observer: &Observer,
) -> Result<Vec<Phase>, BenchError> {
    let steps = search::find_p99(load, p99, timing, observer).await?;
    let best = steps.iter().rev().find(|step| step.held).map(|step| step.rate_per_s);
    let step = |step: search::Step| {
        let verdict = if step.held { "held" } else { "not held" };
        Phase::new(format!("{:.0}/s {verdict}", step.rate_per_s), vec![step.outcome])
    };
    let mut phases: Vec<Phase> = steps.into_iter().map(step).collect();
    let Some(rate_per_s) = best else {
        return Err(BenchError::Cluster(format!("no rate holds a p99 of {p99:?}")));
    };
    phases.push(Phase::new("highest", load.run(Pace::Open { rate_per_s }, timing, observer).await?));
    Ok(phases)
}
