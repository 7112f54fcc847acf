//! What can go wrong, whose fault it is, and whether anything may have happened. Must never call something refused
//! that may have been carried out.

use stentor_engine::session::client::Full;
use stentor_proto::v1::Refusal;
use thiserror::Error;

use crate::StoreError;

/// Why a call failed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The server refuses it; nothing changed. `retryable` says whether the same call may succeed later.
    #[error("{}: {}", .0.reason, .0.message)]
    Refused(Refusal),
    /// It was transmitted and nobody can say what became of it: it may have been carried out or not.
    #[error("the outcome is unknown: {0}")]
    Unknown(String),
    /// The client was closed before this was transmitted; nothing happened.
    #[error("the client is closed")]
    Closed,
    /// The session was refused for good (token, superseded by a newer one); nothing happened by this call.
    #[error("the session has ended: {}: {}", .0.reason, .0.message)]
    Ended(Refusal),
    /// No gateway took the first connection in time. Nothing happened.
    #[error("no gateway could be reached: {0}")]
    Unreachable(String),
    /// The caller has too much open at once; nothing happened by this call.
    #[error(transparent)]
    Full(#[from] Full),
    /// The server's answer is not what it promised, or does not match its checksums: the server's fault or a disk's.
    #[error("the server's answer is damaged: {0}")]
    Damaged(String),
    /// What the builder was given cannot be used: the caller's fault.
    #[error("{0}")]
    Config(String),
    /// The cursor store failed: the disk's fault, or the directory is another device's.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ClientError {
    /// Whether it may have been carried out all the same.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown(_))
    }

    /// The server's own words, if it said any.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) | Self::Ended(refusal) => Some(refusal),
            _ => None,
        }
    }
}
