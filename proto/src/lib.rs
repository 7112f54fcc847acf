//! The shared vocabulary: protobuf messages, ids with checked constructors, client frames, event records, bundles.
//! Pure values and codecs: no IO, no clocks. Bytes from outside never panic here and never allocate beyond their limit.

#![forbid(unsafe_code)]

pub mod bundle;
pub mod frame;
pub mod ids;
pub mod reason;
pub mod record;

/// The generated code, nested as its packages are, since it refers to itself that way.
#[allow(missing_docs, clippy::all, clippy::too_many_lines, unreachable_pub)]
mod stentor {
    pub mod v1 {
        tonic::include_proto!("stentor.v1");
    }
    pub mod internal {
        pub mod v1 {
            tonic::include_proto!("stentor.internal.v1");
        }
    }
}

/// Messages and services between nodes; no promise to anybody else.
pub use stentor::internal::v1 as internal;
/// Messages and services of `stentor.v1`, the public API.
pub use stentor::v1;

/// The encoded descriptor set of everything above, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

pub use bytes::Bytes;
pub use prost::Message;
