//! What can keep a run from being judged. Must never stand for a broken promise: those are in the report.

use std::path::PathBuf;

use stentor_client::ClientError;
use thiserror::Error;

/// Why a run could not be carried out.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// The binary under test was never built, or lies elsewhere.
    #[error("there is no binary `stentor` at {0}; `make chaos` builds it, or STENTOR_BIN names one")]
    NoBinary(PathBuf),
    /// The system refuses: to start a process, to make a folder.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A command of the binary failed.
    #[error("`stentor {command}` ended with {code}: {said}")]
    Command {
        /// Its arguments.
        command: String,
        /// Its exit code; -1 for a signal.
        code: i32,
        /// The end of what it said.
        said: String,
    },
    /// The binary printed something else than was promised.
    #[error("`stentor {command}` printed what cannot be read: {why}")]
    Output {
        /// Its arguments.
        command: String,
        /// What is wrong with it.
        why: String,
    },
    /// The SDK could not begin.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The run was cut short.
    #[error("interrupted")]
    Interrupted,
}

impl ClusterError {
    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}
