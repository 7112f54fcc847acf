//! What measures a cluster as an operator would: scenarios under load, the processes' cost from the kernel, reports and
//! their comparison. Everything goes through the public SDK and the gRPC API; it must never use a back door, nor print
//! a figure that was not measured.

#![forbid(unsafe_code)]

pub mod body;
mod error;
pub mod fsyncs;
pub mod histogram;
pub mod measure;
pub mod meter;
pub mod outcome;
pub mod pace;
pub mod peers;
pub mod processes;
pub mod report;
pub mod scenario;
pub mod search;
pub mod target;
pub mod workers;

pub use error::BenchError;
pub use histogram::{Histogram, Latency};
pub use measure::{Live, Observer, Timing};
pub use outcome::Outcome;
pub use pace::Pace;
pub use processes::{Spent, Usage};
pub use report::Report;
pub use target::{Local, Size, Target};
