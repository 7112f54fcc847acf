//! A run is made by workers, which put the cluster under load, and led by one coordinator, which tells them when parts
//! begin and end and joins what they noted. A single generator is one worker in the same process; several are processes
//! of their own, on any machine. Must never give out figures of a run in which one worker is missing or failed.

mod conduct;
mod dial;
mod keys;
mod link;
mod merge;
mod serve;
mod share;
mod stage;
#[cfg(test)]
mod tests;
mod wire;

pub use conduct::{Crew, Rhythm, alone, with};
pub use dial::{Run, gather};
pub use keys::Keys;
pub use link::{MAX_WORKERS, Turns};
pub(crate) use merge::{Part, joined};
pub use serve::{Service, serve};
pub use share::Share;
pub use stage::{Load, Stage};
#[cfg(test)]
pub(crate) use tests::cluster_folder;

/// The stable code of a worker that serves another coordinator.
pub const BUSY: &str = wire::reason::BUSY;
