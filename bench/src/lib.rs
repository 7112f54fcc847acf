//! What measures a cluster as an operator would: scenarios under load, the processes' cost from the kernel, reports and
//! their comparison. Everything goes through the public SDK and the gRPC API; it must never use a back door, nor print
//! a figure that was not measured.

#![forbid(unsafe_code)]

pub mod histogram;
pub mod outcome;
pub mod processes;

pub use histogram::{Histogram, Latency};
pub use outcome::Outcome;
pub use processes::{Spent, Usage};
