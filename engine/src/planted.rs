//! Bugs put in on purpose, so that checkers are shown to find them. Compiled only with the feature `planted`, which
//! nothing that is shipped turns on. Must never decide anything while no bug is planted.

use std::cell::Cell;

/// A bug that a careless hand might have made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// Entries are acknowledged when they are written, not when they are fsynced.
    AcknowledgeBeforeFsync,
    /// A repeated send is a new one, by its number and by its client id.
    NoDeduplication,
    /// A send is accepted although one before it is missing.
    LostSendOrder,
    /// A linearizable read is answered by whoever believes that it leads, without asking a quorum.
    StaleRead,
}

thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Plants a bug in everything that runs on this thread from now on, or takes it out. A simulation runs on one thread.
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this bug is there.
pub fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}
