//! A whole cluster in one seeded thread with paused time: brokers, gateways and devices as they are shipped, over twins of
//! network and disk, with a nemesis. The same seed is the same run, bit for bit (docs/simulation.md). Must never reach the
//! real network, clock, disk or randomness once a run has begun.

mod applied;
mod cluster;
mod nemesis;
mod run;

pub use cluster::Cluster;
pub use nemesis::{Fault, Schedule, Side, Step};
pub use run::{Plan, Report, run};
