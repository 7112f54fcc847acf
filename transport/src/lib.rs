//! The only crate that opens sockets: QUIC for devices, gRPC between nodes and for callers, plain HTTP for probes, and
//! the keys that all of them rest on; and the network's twin for simulation. It moves bytes and knows nothing of
//! conversations; it must never decide anything.

#![forbid(unsafe_code)]

mod accept;
pub mod bind;
pub mod grpc;
mod host;
pub mod memory;
pub mod pki;
pub mod probe;
pub mod probes;
pub mod quic;
pub mod tls;
pub mod token;

pub use host::{Host, Listener};
