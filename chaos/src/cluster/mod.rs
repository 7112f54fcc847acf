//! Chaos on real processes: the real binary, real disks and sockets, SIGKILL; judged by the same oracle as a simulation.
//! It repeats in kind, not bit for bit. Must never leave a process behind, nor touch one that it did not start.

mod binary;
mod devices;
mod error;
mod json;
mod lines;
mod nemesis;
mod processes;
mod report;
mod scenario;

pub use binary::find;
pub use error::ClusterError;
pub use report::{Fault, Report};
pub use scenario::{Kind, Scenario};
