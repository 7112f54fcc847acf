//! How measuring can fail. Must never hide that a count was wrong behind a figure.

use std::io;

use stentor_client::ClientError;
use thiserror::Error;

/// Why there is no outcome.
#[derive(Debug, Error)]
pub enum BenchError {
    /// What was asked for cannot be.
    #[error("{0}")]
    Settings(String),
    /// The cluster under load could not be started, found or read.
    #[error("{0}")]
    Cluster(String),
    /// The system refused something.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// The SDK gave up.
    #[error("cannot {what}: {source}")]
    Client {
        /// What was tried.
        what: String,
        /// Why not.
        source: ClientError,
    },
    /// The cluster does not have what it acknowledged, or did not deliver what it had.
    #[error("the counts are wrong: {0}")]
    Wrong(String),
    /// A worker of a run of several failed, and with it the run.
    #[error("worker {worker}: {what}")]
    Worker {
        /// Where it listens.
        worker: String,
        /// What happened.
        what: String,
    },
    /// A worker serves another coordinator.
    #[error("worker {worker} serves another coordinator")]
    Busy {
        /// Where it listens.
        worker: String,
    },
    /// Somebody said what cannot be said at this point of a run.
    #[error("{0}")]
    Protocol(String),
    /// Something that must come did not.
    #[error("{0} did not come in time")]
    Late(String),
}

impl BenchError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn client(what: impl Into<String>) -> impl FnOnce(ClientError) -> Self {
        let what = what.into();
        move |source| Self::Client { what, source }
    }

    pub(crate) fn cluster(what: impl std::fmt::Display) -> Self {
        Self::Cluster(what.to_string())
    }
}
