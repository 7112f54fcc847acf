//! Calls of the public gRPC API in a caller's name. Any broker may be asked first; one that cannot answer now is not the
//! last word, so the others are tried until time runs out. Must never repeat what was refused for good, nor say that
//! nothing happened when something may have.

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

    /// Asks one broker after the other until one answers or refuses for good: for reads, and for what has a key of its
    /// own, whose repeat gets the first answer.
    pub(crate) async fn call<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        self.try_all(call).await.map_err(|(failure, _)| failure)
    }

    /// The same for changes without a key: a refusal after an attempt that may have been carried out may be the work of
    /// that attempt, so that nobody can say what happened.
    pub(crate) async fn change<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        self.try_all(call).await.map_err(|(failure, doubt)| match failure {
            Failure::Refused(refusal) if doubt => in_doubt(&refusal),
            failure => failure,
        })
    }

    /// With an error: whether an attempt may have been carried out.
    async fn try_all<T, F>(&self, call: impl Fn(Channel) -> F) -> Result<T, (Failure, bool)>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let mut doubt = false;
        let deadline = Instant::now() + TRY_FOR;
        loop {
            let mut last = None;
            for channel in &self.channels {
                let answered = tokio::time::timeout_at(deadline, call(channel.clone())).await;
                match answered {
                    Ok(Ok(response)) => return Ok(response.into_inner()),
                    Ok(Err(status)) => {
                        let refusal = refusal(&status);
                        doubt |= refusal.reason == Reason::OutcomeUnknown.code();
                        if !refusal.retryable {
                            return Err((Failure::Refused(refusal), doubt));
                        }
                        last = Some(refusal);
                    }
                    Err(_) => return Err((Failure::failed(format_args!("no answer within {TRY_FOR:?}")), true)),
                }
            }
            if Instant::now() + ROUND_PAUSE >= deadline {
                let last = last.unwrap_or_else(|| Reason::Unavailable.refusal());
                let told = Failure::failed(format_args!("{} ({})", last.message, last.reason));
                return Err((if doubt { in_doubt(&last) } else { told }, doubt));
            }
            tokio::time::sleep(ROUND_PAUSE).await;
        }
    }
}

/// What is told when an attempt may have been carried out, and a later one was refused.
fn in_doubt(last: &Refusal) -> Failure {
    let unknown = Reason::OutcomeUnknown;
    Failure::failed(format_args!(
        "{} ({}); the last attempt: {} ({})",
        unknown.text(),
        unknown.code(),
        last.message,
        last.reason
    ))
}

/// The stable reason of an error, or what its code says where it has none (a connection that broke).
pub(crate) fn refusal(status: &Status) -> Refusal {
    if let Some(refusal) = status::to_refusal(status) {
        return refusal;
    }
    let reason = match status.code() {
        _ if status::may_have_happened(status) => Reason::OutcomeUnknown,
        Code::Unavailable => Reason::Unavailable,
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
    fn a_broken_connection_is_worth_another_try_and_may_have_carried_the_call() {
        let broken = refusal(&Status::unavailable("gone"));
        assert_eq!((broken.reason.as_str(), broken.retryable), ("OUTCOME_UNKNOWN", true));
        let none = refusal(&Status::from_error(Box::new(tonic::ConnectError("refused".into()))));
        assert_eq!((none.reason.as_str(), none.retryable), ("UNAVAILABLE", true));
        assert!(!refusal(&Status::unimplemented("what")).retryable);
    }

    #[tokio::test]
    async fn a_refusal_after_an_attempt_that_may_have_been_done_says_so() {
        let api = Api { channels: vec![nowhere(), nowhere()], bearer: AsciiMetadataValue::from_static("x") };
        let answers = || {
            let left = std::sync::Mutex::new(vec![Reason::AlreadyParticipant, Reason::OutcomeUnknown]);
            move |_| {
                let reason = left.lock().unwrap().pop().unwrap();
                async move { Err::<tonic::Response<()>, _>(status::from_refusal(&reason.refusal())) }
            }
        };
        let Err(Failure::Failed(told)) = api.change(answers()).await else { panic!("it is known") };
        assert!(told.contains("OUTCOME_UNKNOWN") && told.contains("ALREADY_PARTICIPANT"), "{told}");
        let Err(Failure::Refused(told)) = api.call(answers()).await else { panic!("no refusal") };
        assert_eq!(told.reason, "ALREADY_PARTICIPANT");
    }

    fn nowhere() -> Channel {
        let folder = tempfile::tempdir().unwrap();
        let pki = stentor_transport::pki::Pki::create(folder.path()).unwrap();
        grpc::channel(([127, 0, 0, 1], 1).into(), &ClientTls::public(pki.ca_path()).unwrap()).unwrap()
    }
}
