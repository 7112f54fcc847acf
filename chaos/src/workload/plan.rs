//! How much of what a workload does. Must never depend on anything but its own numbers: the same plan is the same
//! workload.

use std::{sync::Arc, time::Duration};

use crate::oracle::{Device, Name};

/// The size of a workload, and its seed.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// Users, each with two devices; at least 2.
    pub users: usize,
    /// Groups; each has its owner, who stays.
    pub conversations: usize,
    /// Operations of each device.
    pub operations: u64,
    /// The longest wait between two operations of a device.
    pub pause: Duration,
    /// An operation without an answer for so long is given up as unknown.
    pub patience: Duration,
    /// The longest body, in bytes; short ones are longer than they are told to be by their sender's name and count.
    pub body_bytes: u64,
    /// Nothing but sends, so that no device waits for an answer, and falls silent, while a shard has no leader.
    pub sends_only: bool,
}

impl Plan {
    /// A small one: a few hundred operations in a few seconds.
    pub fn small(seed: u64) -> Self {
        Self {
            seed,
            users: 3,
            conversations: 3,
            operations: 60,
            pause: Duration::from_millis(200),
            patience: Duration::from_secs(60),
            body_bytes: 400,
            sends_only: false,
        }
    }

    pub(super) fn users(&self) -> impl Iterator<Item = Name> + use<> {
        (0..self.users).map(|n| Arc::from(format!("user-{n}")))
    }

    pub(super) fn devices(&self) -> impl Iterator<Item = Device> + use<> {
        self.users().flat_map(|user| ["desk", "phone"].map(|name| Device { user: user.clone(), name: name.into() }))
    }

    pub(super) fn conversation(&self, number: usize) -> Name {
        format!("chaos-{:x}-{number}", self.seed).into()
    }

    pub(super) fn owner(&self, number: usize) -> Device {
        Device { user: format!("user-{}", number % self.users.max(1)).into(), name: "desk".into() }
    }
}
