//! How a command can end other than well, and with which exit code: 1 failed, 2 misuse, 3 refused by the server. Must
//! never turn "unknown" into "refused": a time-out says nothing about what the server did.

use stentor_proto::v1::Refusal;

/// Why a command did not do what it was asked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Failure {
    /// It could not be done, or it is not known whether it was: exit code 1.
    Failed(String),
    /// The caller asked for what cannot be: exit code 2.
    Misuse(String),
    /// This version cannot do it: exit code 2.
    NotBuilt(String),
    /// The server said no, for a stable reason: exit code 3.
    Refused(Refusal),
    /// Lines were refused, and each said so already: exit code 3, nothing more to print.
    LinesRefused,
    /// Whoever read our output went away: nothing to tell him.
    ReaderGone,
}

impl Failure {
    /// A failure in words.
    pub(crate) fn failed(what: impl std::fmt::Display) -> Self {
        Self::Failed(what.to_string())
    }

    /// A misuse in words.
    pub(crate) fn misuse(what: impl std::fmt::Display) -> Self {
        Self::Misuse(what.to_string())
    }

    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Misuse(_) | Self::NotBuilt(_) => 2,
            Self::Refused(_) | Self::LinesRefused => 3,
            Self::ReaderGone => 0,
        }
    }

    /// What to tell the caller; `None` when there is nothing to add.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        let of = |reason: &str, message: &str| {
            Some(Refusal { reason: reason.into(), message: message.into(), retryable: false, last: 0 })
        };
        match self {
            Self::Failed(message) => of("FAILED", message),
            Self::Misuse(message) => of("MISUSE", message),
            Self::NotBuilt(what) => of("NOT_BUILT", &format!("{what} is not built yet")),
            Self::Refused(refusal) => Some(refusal.clone()),
            Self::LinesRefused | Self::ReaderGone => None,
        }
    }
}

impl From<stentor_proto::ids::BadId> for Failure {
    fn from(bad: stentor_proto::ids::BadId) -> Self {
        Self::misuse(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_the_public_face() {
        let refusal = stentor_proto::reason::Reason::NotAParticipant.refusal();
        let codes = [
            (Failure::failed("x"), 1),
            (Failure::misuse("x"), 2),
            (Failure::NotBuilt("bench".into()), 2),
            (Failure::Refused(refusal), 3),
            (Failure::LinesRefused, 3),
        ];
        for (failure, code) in codes {
            assert_eq!(failure.exit_code(), code, "{failure:?}");
        }
    }
}
