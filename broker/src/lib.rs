//! The broker: hosts replicas of shards, carries commands into their logs and events out of them. Must never
//! acknowledge what a quorum has not fsynced and this leader has not applied.

#![forbid(unsafe_code)]

mod api;
mod batcher;
mod calls;
mod clocks;
mod config;
mod effects;
mod environment;
mod gateway_service;
mod hand_over;
mod host;
mod interest;
mod join;
mod membership;
mod meta;
mod metrics;
mod network;
mod node;
mod outbox;
mod parking;
mod pulse;
mod queue;
mod raft;
mod reads;
mod replaced;
mod router;
mod shard;
mod start;
pub mod status;
mod upkeep;

pub use config::{AppConfig, Bootstrap, BrokerConfig, ConfigError, KeyConfig, PeerConfig, StoreTuning};
pub use environment::{Environment, Observer, Place};
pub use start::{Addresses, Broker, ReadyError, StartError, start, start_in};
