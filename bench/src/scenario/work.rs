//! Any scenario with its settings: what a report names, what travels to workers, what is prepared from it. Must never give
//! a setting another meaning than its scenario does.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    api::ApiLoad,
    connect::{ConnectLoad, ConnectSettings},
    fanout::{FanoutLoad, FanoutSettings},
    history::{HistoryLoad, HistorySettings},
    idle::{IdleLoad, IdleSettings},
    mixed::{MixedLoad, MixedSettings},
    resume::{ResumeLoad, ResumeSettings},
    send::{SendLoad, SendSettings},
};
use crate::{
    BenchError, Pace, Target,
    body::{Bodies, BodySize},
    workers::{Load, Rhythm, Stage},
};

/// A scenario with its settings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
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

/// Its users and conversations, ready.
#[derive(Debug)]
pub enum Prepared {
    /// Devices at gateways.
    Send(SendLoad),
    /// Streams of the API.
    Api(ApiLoad),
    /// Readers and senders.
    Fanout(Box<FanoutLoad>),
    /// Tokens.
    Connect(ConnectLoad),
    /// Nobody yet.
    Idle(IdleLoad),
    /// Those who were away.
    Resume(ResumeLoad),
    /// Full conversations.
    History(HistoryLoad),
    /// The day's people.
    Mixed(Box<MixedLoad>),
}

impl Work {
    /// As it is called in the command line and in reports.
    pub fn name(&self) -> &'static str {
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

    /// The settings alone, as they stand in a report.
    pub fn settings(&self) -> Value {
        match serde_json::to_value(self) {
            Ok(Value::Object(named)) => named.into_values().next().unwrap_or_default(),
            _ => Value::Null,
        }
    }

    /// How its repeats are made.
    pub fn rhythm(&self) -> Rhythm {
        match self {
            Self::Idle(_) => Rhythm::Adding,
            Self::Resume(load) => Rhythm::Returning { missed: load.missed.saturating_mul(load.conversations) },
            _ => Rhythm::Steady,
        }
    }

    /// How its units follow each other.
    pub fn pace(&self) -> Pace {
        match self {
            Self::Send { pace, .. }
            | Self::Fanout { pace, .. }
            | Self::Connect { pace, .. }
            | Self::History { pace, .. } => *pace,
            Self::Mixed(load) => Pace::Open { rate_per_s: load.rate_per_s },
            Self::Idle(_) | Self::Resume(_) => Pace::Closed,
        }
    }

    /// Makes its users and conversations; `bodies` makes what is sent.
    pub async fn prepare(&self, target: &Target, bodies: fn(BodySize) -> Bodies) -> Result<Prepared, BenchError> {
        Ok(match self {
            Self::Send { load, via_api: true, .. } => {
                Prepared::Api(ApiLoad::prepare(target, load, bodies(load.body)).await?)
            }
            Self::Send { load, .. } => Prepared::Send(SendLoad::prepare(target, load, bodies(load.body)).await?),
            Self::Fanout { load, .. } => {
                Prepared::Fanout(Box::new(FanoutLoad::prepare(target, load, bodies(load.body)).await?))
            }
            Self::Connect { load, .. } => Prepared::Connect(ConnectLoad::prepare(target, load)?),
            Self::Idle(load) => Prepared::Idle(IdleLoad::prepare(target, load)?),
            Self::Resume(load) => Prepared::Resume(ResumeLoad::prepare(target, load, bodies(load.body)).await?),
            Self::History { load, .. } => {
                Prepared::History(HistoryLoad::prepare(target, load, bodies(load.body)).await?)
            }
            Self::Mixed(load) => Prepared::Mixed(Box::new(MixedLoad::prepare(target, load, bodies(load.body)).await?)),
        })
    }
}

impl Load for Prepared {
    async fn run(&mut self, pace: Pace, stage: &mut Stage) -> Result<(), BenchError> {
        match self {
            Self::Send(load) => Box::pin(load.run(pace, stage)).await,
            Self::Api(load) => Box::pin(load.run(pace, stage)).await,
            Self::Fanout(load) => Box::pin(load.run(pace, stage)).await,
            Self::Connect(load) => Box::pin(load.run(pace, stage)).await,
            Self::Idle(load) => Box::pin(load.run(pace, stage)).await,
            Self::Resume(load) => Box::pin(load.run(pace, stage)).await,
            Self::History(load) => Box::pin(load.run(pace, stage)).await,
            Self::Mixed(load) => Box::pin(load.run(pace, stage)).await,
        }
    }
}

impl Prepared {
    /// Ends all sessions.
    pub async fn close(self) {
        match self {
            Self::Send(load) => load.close().await,
            Self::Fanout(load) => load.close().await,
            Self::Idle(load) => load.close().await,
            Self::Resume(load) => load.close().await,
            Self::History(load) => load.close().await,
            Self::Mixed(load) => load.close().await,
            // Streams end with their run, and nobody stays connected.
            Self::Api(_) | Self::Connect(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn works_travel_and_reports_have_their_settings_alone() {
        let load = SendSettings::default();
        let send = Work::Send { load, pace: Pace::Open { rate_per_s: 0.1 }, find_p99_ms: Some(1.5), via_api: false };
        for work in [send, Work::Idle(IdleSettings::default()), Work::Mixed(MixedSettings::default())] {
            let text = serde_json::to_vec(&work).unwrap();
            assert_eq!(serde_json::from_slice::<Work>(&text).unwrap(), work);
        }
        assert_eq!(send.settings()["load"]["window"], 1_024);
        assert_eq!(Work::Idle(IdleSettings { devices: 3, conversations: 0 }).settings()["devices"], 3);
    }
}
