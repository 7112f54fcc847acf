//! Refusals as gRPC tells them: a canonical code, and `google.rpc.ErrorInfo` with the stable reason in the details.
//! Must never lose the reason: callers program against it.

use std::collections::BTreeMap;

use prost::Message;
use stentor_proto::{reason::Reason, v1::Refusal};
use tonic::{Code, Status};

/// `ErrorInfo.domain` of everything that Stentor refuses.
pub const DOMAIN: &str = "stentor";

const ERROR_INFO: &str = "type.googleapis.com/google.rpc.ErrorInfo";

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `google.rpc.ErrorInfo`.
#[derive(Clone, PartialEq, Message)]
struct ErrorInfo {
    #[prost(string, tag = "1")]
    reason: String,
    #[prost(string, tag = "2")]
    domain: String,
    #[prost(btree_map = "string, string", tag = "3")]
    metadata: BTreeMap<String, String>,
}

/// A refusal as a gRPC status.
pub fn from_refusal(refusal: &Refusal) -> Status {
    let code = Reason::from_code(&refusal.reason).map_or(Code::Unknown, code);
    let mut metadata = BTreeMap::from([("retryable".to_owned(), refusal.retryable.to_string())]);
    if refusal.last > 0 {
        metadata.insert("last".into(), refusal.last.to_string());
    }
    let info = ErrorInfo { reason: refusal.reason.clone(), domain: DOMAIN.into(), metadata };
    let details = vec![Any { type_url: ERROR_INFO.into(), value: info.encode_to_vec() }];
    let status = RpcStatus { code: code as i32, message: refusal.message.clone(), details };
    Status::with_details(code, refusal.message.clone(), status.encode_to_vec().into())
}

/// The refusal in a status; `None` where the status is not Stentor's own (the transport failed, for example).
pub fn to_refusal(status: &Status) -> Option<Refusal> {
    let decoded = RpcStatus::decode(status.details()).ok()?;
    let info = decoded.details.iter().find(|any| any.type_url == ERROR_INFO)?;
    let info = ErrorInfo::decode(&info.value[..]).ok().filter(|info| info.domain == DOMAIN)?;
    Some(Refusal {
        retryable: info.metadata.get("retryable").is_some_and(|r| r == "true"),
        last: info.metadata.get("last").and_then(|last| last.parse().ok()).unwrap_or(0),
        reason: info.reason,
        message: decoded.message,
    })
}

/// Whether what was called may have been done although no answer of Stentor came: the connection broke, or time ran out.
/// False for a refusal (it says itself what it means), and when there was no connection to begin with.
pub fn may_have_happened(status: &Status) -> bool {
    let broke = matches!(
        status.code(),
        Code::Unavailable | Code::Cancelled | Code::Unknown | Code::DeadlineExceeded | Code::Internal
    );
    broke && to_refusal(status).is_none() && !was_not_connected(status)
}

fn was_not_connected(status: &Status) -> bool {
    let first = std::error::Error::source(status);
    std::iter::successors(first, |error| error.source()).any(|error| error.is::<tonic::ConnectError>())
}

fn code(reason: Reason) -> Code {
    use Reason::*;
    match reason {
        Internal => Code::Internal,
        Unavailable | Draining => Code::Unavailable,
        OutcomeUnknown => Code::DeadlineExceeded,
        Overloaded | RateLimited | TooManyParticipants | TooManyConversations | TooManyDevices | TooManyStays
        | TooManySubscriptions | TooManyOpenSends | BodyTooLarge | FrameTooLarge => Code::ResourceExhausted,
        UnknownConversation | UnknownDevice | UnknownShard | UnknownBroker => Code::NotFound,
        NotAParticipant | PermissionDenied | WrongApp | AdminOnly => Code::PermissionDenied,
        Unauthenticated | TokenExpired => Code::Unauthenticated,
        AlreadyExists | AlreadyParticipant | ClientIdReused => Code::AlreadyExists,
        EmptyBody | BadContentType | BadKind | BadId | Malformed | FirstTryInFuture => Code::InvalidArgument,
        CursorBeyondHead | BehindRetention => Code::OutOfRange,
        OutOfOrder | SendNoTaken => Code::Aborted,
        NotBuilt => Code::Unimplemented,
        Damaged => Code::DataLoss,
        _ => Code::FailedPrecondition,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_its_way() {
        for &reason in Reason::ALL {
            let refusal = Refusal { last: 7, ..reason.with("what it is about") };
            let status = from_refusal(&refusal);
            assert_ne!(status.code(), Code::Ok);
            assert_eq!(to_refusal(&status), Some(refusal));
        }
        assert_eq!(to_refusal(&Status::unavailable("no connection")), None);
    }

    #[test]
    fn what_broke_on_its_way_may_have_happened() {
        let no_connection = Status::from_error(Box::new(tonic::ConnectError("refused".into())));
        assert_eq!((no_connection.code(), may_have_happened(&no_connection)), (Code::Unavailable, false));
        assert!(may_have_happened(&Status::unavailable("the stream broke")));
        assert!(may_have_happened(&Status::unknown("h2")));
        assert!(!may_have_happened(&Status::unimplemented("what")));
        assert!(!may_have_happened(&from_refusal(&Reason::Unavailable.refusal())));
    }
}
