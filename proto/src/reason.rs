//! Refusal reasons: stable codes that callers program against (the table of docs/wire.md). A number, once given,
//! stands in logs and states for ever and must never mean anything else.

use crate::v1;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $code:literal, $retryable:literal, $text:literal;)*) => {
        /// Why something was refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Reason { $($(#[$doc])* #[doc = $text] $name = $number,)* }

        impl Reason {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)*];

            /// The stable code.
            pub fn code(self) -> &'static str {
                match self { $(Self::$name => $code,)* }
            }

            /// Whether the same call may succeed later.
            pub fn retryable(self) -> bool {
                match self { $(Self::$name => $retryable,)* }
            }

            /// What it means, as a sentence for people.
            pub fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// From a stored or received number.
            pub fn from_number(n: u32) -> Option<Self> {
                match n { $($number => Some(Self::$name),)* _ => None }
            }

            /// From a code.
            pub fn from_code(code: &str) -> Option<Self> {
                match code { $($code => Some(Self::$name),)* _ => None }
            }
        }
    };
}

reasons! {
    Internal = 1, "INTERNAL", true, "the server failed; it is not your fault";
    Unavailable = 2, "UNAVAILABLE", true, "no leader can be reached right now";
    Overloaded = 3, "OVERLOADED", true, "too much at once; try again shortly";
    RateLimited = 4, "RATE_LIMITED", true, "over the rate that this caller may use";
    OutcomeUnknown = 5, "OUTCOME_UNKNOWN", true, "no answer came; it may have happened or not, so ask again under the same number or key";
    UnknownConversation = 10, "UNKNOWN_CONVERSATION", false, "there is no such conversation";
    NotAParticipant = 11, "NOT_A_PARTICIPANT", false, "the user is not a participant of this conversation";
    PermissionDenied = 12, "PERMISSION_DENIED", false, "the user's role does not allow this";
    AlreadyExists = 13, "ALREADY_EXISTS", false, "there is already something else under this id";
    AlreadyParticipant = 14, "ALREADY_PARTICIPANT", false, "the user is a participant already";
    TooManyParticipants = 15, "TOO_MANY_PARTICIPANTS", false, "the conversation is full";
    LastOwner = 16, "LAST_OWNER", false, "a conversation keeps at least one owner";
    DirectIsFixed = 17, "DIRECT_IS_FIXED", false, "a direct conversation has exactly its two users";
    TooManyStays = 18, "TOO_MANY_STAYS", false, "the user was added and removed too often";
    TooManyConversations = 19, "TOO_MANY_CONVERSATIONS", false, "the user has too many conversations";
    BodyTooLarge = 20, "BODY_TOO_LARGE", false, "the body is over the limit";
    EmptyBody = 21, "EMPTY_BODY", false, "the body is empty";
    BadContentType = 22, "BAD_CONTENT_TYPE", false, "the content type is not a short printable text";
    BadKind = 23, "BAD_KIND", false, "this kind cannot be sent or created";
    BadId = 24, "BAD_ID", false, "an id is empty, too long, or has characters that ids cannot have";
    Malformed = 25, "MALFORMED", false, "the request cannot be understood";
    OutOfOrder = 30, "OUT_OF_ORDER", true, "a send before this one is missing; send again from `last` + 1";
    DedupWindowPassed = 31, "DEDUP_WINDOW_PASSED", false, "this send is too old to say what became of it";
    SendNoTaken = 32, "SEND_NO_TAKEN", true, "another send has this number; go on from `last`";
    ClientIdReused = 33, "CLIENT_ID_REUSED", false, "the client id was used with another body; the first stays";
    FirstTryInFuture = 34, "FIRST_TRY_IN_FUTURE", false, "first_try_ms is more than five minutes ahead";
    TooManyOpenSends = 35, "TOO_MANY_OPEN_SENDS", true, "more than 1,024 sends without a stored answer";
    WrongVersion = 40, "WRONG_VERSION", false, "the conversation's version is not the expected one";
    WrongEpoch = 41, "WRONG_EPOCH", false, "the conversation's epoch is not the expected one";
    CursorBeyondHead = 42, "CURSOR_BEYOND_HEAD", false, "a cursor cannot pass the last event";
    BehindRetention = 43, "BEHIND_RETENTION", false, "what was asked for has expired";
    SessionSuperseded = 50, "SESSION_SUPERSEDED", false, "a newer session of this device took over";
    UnknownDevice = 51, "UNKNOWN_DEVICE", false, "there is no such device";
    TooManyDevices = 52, "TOO_MANY_DEVICES", false, "the user has too many devices";
    Unauthenticated = 60, "UNAUTHENTICATED", false, "the token is missing, malformed or forged";
    TokenExpired = 61, "TOKEN_EXPIRED", false, "the token has expired";
    WrongApp = 62, "WRONG_APP", false, "the token is for another app";
    AdminOnly = 63, "ADMIN_ONLY", false, "only an admin token may do this";
    UnsupportedVersion = 70, "UNSUPPORTED_VERSION", false, "no protocol version in common";
    FrameTooLarge = 71, "FRAME_TOO_LARGE", false, "a frame is over the limit";
    UnexpectedFrame = 72, "UNEXPECTED_FRAME", false, "this frame cannot come now";
    TooManySubscriptions = 73, "TOO_MANY_SUBSCRIPTIONS", false, "the session has too many conversations";
    Draining = 74, "DRAINING", true, "this gateway is going away; connect again";
    WrongCluster = 80, "WRONG_CLUSTER", false, "this node belongs to another cluster";
    UnknownShard = 81, "UNKNOWN_SHARD", false, "there is no such shard";
    NotBuilt = 82, "NOT_BUILT", false, "this version cannot do that yet";
    Damaged = 83, "DAMAGED", false, "stored bytes do not match their checksum; the replica was stopped";
    UnknownBroker = 84, "UNKNOWN_BROKER", false, "the cluster has no broker of this number";
    BrokerInUse = 85, "BROKER_IN_USE", false, "a broker of this number lives, with another directory";
}

impl Reason {
    /// As callers see it.
    pub fn refusal(self) -> v1::Refusal {
        self.with(self.text())
    }

    /// As callers see it, with what it is about.
    pub fn with(self, message: impl Into<String>) -> v1::Refusal {
        v1::Refusal { reason: self.code().into(), message: message.into(), retryable: self.retryable(), last: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_numbers_are_unique_and_round_trip() {
        for &reason in Reason::ALL {
            assert_eq!(Reason::from_number(reason as u32), Some(reason));
            assert_eq!(Reason::from_code(reason.code()), Some(reason));
        }
        assert_eq!(Reason::from_number(0), None);
    }
}
