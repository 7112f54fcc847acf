//! The works that a cluster is put under. Each prepares its users and conversations, runs for as long as it is measured,
//! and then counts: a figure of a run whose counts are wrong must never be given out.

pub mod api;
pub mod connect;
pub mod fanout;
pub mod history;
pub mod idle;
mod lane;
pub mod mixed;
pub mod resume;
pub mod send;
mod spread;
mod talk;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Tells the tasks of a load to end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(crate) fn now(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
