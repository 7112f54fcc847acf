//! Calls of the public gRPC API in a caller's name. Any broker may be asked first; one that cannot answer now is not the
//! last word, so the others are tried until time runs out. Must never repeat what was refused for good.

use std::time::Duration;

use stentor_broker::status;
use stentor_proto::{reason::Reason, v1::Refusal};
use stentor_transport::{
    grpc::{self, Channel},
    tls::ClientTls,
};
use tokio::time::Instant;
use tonic::{Code, Request, Status, metadata::AsciiMetadataValue};

use crate::{context::ApiContext, failure::Failure};

/// How long a call is tried: an election and a bit.
const TRY_FOR: Duration = Duration::from_secs(20);
/// Between two rounds over all brokers.
const ROUND_PAUSE: Duration = Duration::from_millis(200);

/// Channels to all brokers, and the token that goes with every call.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    channels: Vec<Channel>,
    bearer: AsciiMetadataValue,
}

impl Api {
    /// Connects at the first call.
    pub(crate) fn new(context: &ApiContext) -> Result<Self, Failure> {
        let tls = ClientTls::public(&context.ca).map_err(Failure::failed)?;
        let channels = context.apis.iter().map(|&api| grpc::channel(api, &tls));
        let channels = channels.collect::<Result<Vec<_>, _>>().map_err(Failure::failed)?;
        if channels.is_empty() {
            return Err(Failure::misuse("no broker has an API address"));
        }
        let bearer = format!("Bearer {}", context.token);
        let mut bearer =
            AsciiMetadataValue::try_from(bearer).map_err(|_| Failure::misuse("the token is not plain text"))?;
        bearer.set_sensitive(true);
        Ok(Self { channels, bearer })
    }

    /// The brokers, for calls that concern one of them.
    pub(crate) fn channels(&self) -> &[Channel] {
        &self.channels
    }

    /// A request with the caller's token.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.bearer.clone());
        request
    }

    /// Asks one broker after the other until one answers or refuses for good.
    pub(crate) async fn call<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let deadline = Instant::now() + TRY_FOR;
        loop {
            let mut last = None;
            for channel in &self.channels {
                let answered = tokio::time::timeout_at(deadline, call(channel.clone())).await;
                match answered {
                    Ok(Ok(response)) => return Ok(response.into_inner()),
                    Ok(Err(status)) => {
                        let refusal = refusal(&status);
                        if !refusal.retryable {
                            return Err(Failure::Refused(refusal));
                        }
                        last = Some(refusal);
                    }
                    Err(_) => return Err(Failure::failed(format_args!("no answer within {TRY_FOR:?}"))),
                }
            }
            if Instant::now() + ROUND_PAUSE >= deadline {
                let last = last.unwrap_or_else(|| Reason::Unavailable.refusal());
                return Err(Failure::failed(format_args!("{} ({})", last.message, last.reason)));
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }
}

/// The stable reason of an error, or what its code says where it has none (a connection that broke).
pub(crate) fn refusal(status: &Status) -> Refusal {
    if let Some(refusal) = status::to_refusal(status) {
        return refusal;
    }
    let reason = match status.code() {
        Code::Unavailable => Reason::Unavailable,
        Code::Cancelled | Code::Unknown | Code::DeadlineExceeded => Reason::OutcomeUnknown,
        Code::Unauthenticated => Reason::Unauthenticated,
        Code::PermissionDenied => Reason::PermissionDenied,
        Code::Unimplemented => Reason::NotBuilt,
        Code::InvalidArgument => Reason::Malformed,
        Code::ResourceExhausted => Reason::Overloaded,
        _ => Reason::Internal,
    };
    reason.with(status.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stable_reason_is_read_from_the_details() {
        let sent = Reason::NotAParticipant.refusal();
        assert_eq!(refusal(&status::from_refusal(&sent)), sent);
    }

    #[test]
    fn a_broken_connection_is_worth_another_try() {
        assert!(refusal(&Status::unavailable("gone")).retryable);
        assert!(!refusal(&Status::unimplemented("what")).retryable);
    }
}
