//! What a device keeps between runs: its delivered cursors and its send counts. Must never claim more than the
//! application said: a cursor that is too low costs one more delivery, one that is too high would lose an event.

mod file;

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use stentor_proto::ids::{AppId, ConversationId, DeviceId, SendNo, Seq, UserId};
use thiserror::Error;

pub use self::file::FileCursors;

/// Whose cursors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The tenant.
    pub app: AppId,
    /// The user.
    pub user: UserId,
    /// The device.
    pub device: DeviceId,
}

/// Something to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The application has stored everything of the conversation up to here.
    Delivered(ConversationId, Seq),
    /// The highest send number given, and up to where every send has its answer.
    Sends {
        /// In which conversation.
        conversation: ConversationId,
        /// The highest number given.
        last: SendNo,
        /// Every send up to here has its answer.
        done: SendNo,
    },
}

/// Why a cursor store cannot be used.
#[derive(Debug, Clone, Error)]
pub enum StoreError {
    /// Another process uses it.
    #[error("{path} is in use by another process")]
    InUse {
        /// The directory.
        path: String,
    },
    /// It belongs to another device; mixing them up would skip events.
    #[error("{path} holds the cursors of {found}, not of {wanted}")]
    OtherDevice {
        /// The directory.
        path: String,
        /// Whose it is, as app/user/device.
        found: String,
        /// Whose it should be.
        wanted: String,
    },
    /// A newer version wrote it.
    #[error("{path} has the unknown format {format}")]
    Format {
        /// The file.
        path: String,
        /// What it says.
        format: u8,
    },
    /// It is no cursor file at all. Deleting it costs that everything is delivered again.
    #[error("{path} is damaged: {what}")]
    Damaged {
        /// The file.
        path: String,
        /// How.
        what: &'static str,
    },
    /// The disk failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: Arc<std::io::Error>,
    },
}

/// Keeps a device's cursors. Called by the client's task: none of these may wait for a disk but [`CursorStore::sync`],
/// which is called on a thread for such things.
pub trait CursorStore: Send + Sync + 'static {
    /// Binds it to a device, once per client; a store that already has another one's cursors refuses.
    fn bind(&self, identity: &Identity) -> Result<(), StoreError>;

    /// The delivered cursor of a conversation.
    fn delivered(&self, conversation: &ConversationId) -> Option<Seq>;

    /// The highest send number given, and up to where every send had its answer. What is kept here may be behind, so
    /// that it is never sent from without asking the server first.
    fn sends(&self, conversation: &ConversationId) -> Option<(SendNo, SendNo)>;

    /// Keeps changes; a delivered cursor never moves back.
    fn save(&self, changes: &[Change]) -> Result<(), StoreError>;

    /// How often what was saved should be made durable; `None` for a store that never is.
    fn sync_interval(&self) -> Option<Duration> {
        None
    }

    /// Makes what was saved durable. May block.
    fn sync(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

impl<T: CursorStore + ?Sized> CursorStore for Arc<T> {
    fn bind(&self, identity: &Identity) -> Result<(), StoreError> {
        (**self).bind(identity)
    }

    fn delivered(&self, conversation: &ConversationId) -> Option<Seq> {
        (**self).delivered(conversation)
    }

    fn sends(&self, conversation: &ConversationId) -> Option<(SendNo, SendNo)> {
        (**self).sends(conversation)
    }

    fn save(&self, changes: &[Change]) -> Result<(), StoreError> {
        (**self).save(changes)
    }

    fn sync_interval(&self) -> Option<Duration> {
        (**self).sync_interval()
    }

    fn sync(&self) -> Result<(), StoreError> {
        (**self).sync()
    }
}

/// What is kept of one conversation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Kept {
    delivered: Option<Seq>,
    sends: Option<(SendNo, SendNo)>,
}

/// All that is kept, however it is.
#[derive(Debug, Default)]
struct Table(HashMap<ConversationId, Kept>);

impl Table {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Delivered(conversation, seq) => {
                let kept = self.0.entry(conversation.clone()).or_default();
                kept.delivered = kept.delivered.max(Some(*seq));
            }
            // A count may go back: a server that forgot it begins anew.
            Change::Sends { conversation, last, done } => {
                self.0.entry(conversation.clone()).or_default().sends = Some((*last, *done));
            }
        }
    }

    fn get(&self, conversation: &ConversationId) -> Kept {
        self.0.get(conversation.as_str()).copied().unwrap_or_default()
    }
}

/// Cursors that live as long as this value (share one in an [`Arc`] to outlive a client): for tests, and for programs
/// that begin anew each time.
#[derive(Debug, Default)]
pub struct MemoryCursors {
    table: Mutex<Table>,
}

impl MemoryCursors {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl CursorStore for MemoryCursors {
    fn bind(&self, _: &Identity) -> Result<(), StoreError> {
        Ok(())
    }

    fn delivered(&self, conversation: &ConversationId) -> Option<Seq> {
        self.table.lock().get(conversation).delivered
    }

    fn sends(&self, conversation: &ConversationId) -> Option<(SendNo, SendNo)> {
        self.table.lock().get(conversation).sends
    }

    fn save(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mut table = self.table.lock();
        changes.iter().for_each(|change| table.apply(change));
        Ok(())
    }
}
