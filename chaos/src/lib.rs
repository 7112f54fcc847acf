//! Faults on purpose, and the proof that nothing was lost by them: a workload through the public SDK, the oracle of
//! what each client was promised, the invariants that its history is held against. Must never be part of what is
//! shipped.
//!
//! | module | what it is |
//! |---|---|
//! | `oracle` | operations with their intervals and outcomes (acknowledged, refused, unknown), and what readers saw |
//! | `invariants` | one file for each of I1 to I7, I9, I10: an oracle's history in, violations out; no IO, no clock |
//! | `workload` | one file for each kind of operation: sample, execute through `stentor_client`, classify the answer |
//! | `cluster` | real processes of the real binary, killed and started again |
//! | `sim` | a whole cluster in one seeded thread: twins of transport and storage, everything above is what is shipped |

#![forbid(unsafe_code)]

pub mod cluster;
pub mod invariants;
pub mod oracle;
pub mod sim;
pub mod workload;
