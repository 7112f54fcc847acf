//! The servers that we are set beside: each is started here with the settings that docs/performance.md names, put under
//! the same works by its ecosystem's own client, and stopped. Must never use a server that somebody else has started,
//! nor leave one out without saying so.

pub mod ejabberd;
pub mod floors;
mod gauge;
mod idle;
mod lane;
pub mod mosquitto;
pub mod nats;
pub mod ours;
mod parked;
pub mod rabbit;
pub mod redis;
pub mod run;
mod server;
mod spread;
pub mod table;
pub mod works;

use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{BenchError, Outcome, Timing};

pub(crate) use gauge::Gauge;

/// Why a peer gave no outcome.
#[derive(Debug, Error)]
pub enum PeerError {
    /// It is not installed.
    #[error("{0}")]
    Missing(String),
    /// It cannot do this work.
    #[error("{0}")]
    Unable(String),
    /// Something went wrong on its side.
    #[error("cannot {what}: {why}")]
    Failed {
        /// What was tried.
        what: String,
        /// Why not.
        why: String,
    },
    /// On our side.
    #[error(transparent)]
    Bench(#[from] BenchError),
}

impl PeerError {
    pub(crate) fn failed(what: impl Into<String>, why: impl std::fmt::Display) -> Self {
        Self::Failed { what: what.into(), why: why.to_string() }
    }

    pub(crate) fn unable(peer: &str, load: &Load) -> Self {
        Self::Unable(format!("{peer} has nothing like {load:?}"))
    }
}

/// What servers are put under; ours and the peers alike.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Load {
    /// Durable messages until they are acknowledged.
    Append {
        /// Conversations: streams, queues, shards' worth of order.
        conversations: usize,
        /// Unacknowledged at most, all together.
        window: usize,
    },
    /// The same into conversations that many devices share among them, since one device has thousands at most.
    Spread {
        /// Conversations.
        conversations: usize,
        /// Devices at least, each with its part of the conversations.
        devices: usize,
        /// Unacknowledged at most, all together.
        window: usize,
    },
    /// Every device gets every message, and its place is kept durably for it.
    Cursors {
        /// Devices.
        devices: usize,
        /// Messages that not all devices have yet, at most.
        window: usize,
    },
    /// Every device gets every message while it is online.
    Fanout {
        /// Devices.
        devices: usize,
        /// Messages per second.
        rate_per_s: f64,
    },
    /// The same from what keeps no log.
    Broadcast {
        /// Devices.
        devices: usize,
        /// Messages per second.
        rate_per_s: f64,
    },
    /// Two people each, one message under way per pair until the other one has it.
    Chat {
        /// How many twos.
        pairs: usize,
    },
    /// Connections that are held and say nothing.
    Idle {
        /// How many.
        connections: usize,
    },
    /// Connections made and closed, so many at a time.
    Handshakes {
        /// At a time.
        window: usize,
    },
    /// A message there and an answer back, one after the other.
    Echo,
    /// Messages in batches of 4,096, each synced, on one node.
    Raw,
    /// Nothing at all, once all shards are parked.
    Parked,
}

/// Bytes of each message.
pub const MESSAGE_BYTES: usize = 256;

/// A peer that runs.
pub trait Peer {
    /// Puts it under a load: prepared, warmed up, measured, and counted afterwards.
    fn run<'a>(&'a mut self, load: &'a Load, timing: Timing) -> LocalBoxFuture<'a, Result<Outcome, PeerError>>;
}
