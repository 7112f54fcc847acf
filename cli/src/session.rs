//! A session with a gateway through the SDK, as the device that the context gives. Must keep the device's lock as long as
//! the session lives: two processes on one device would supersede each other for ever.

use stentor_client::{Builder, Client, ClientError, FileCursors, MemoryCursors};

use crate::{
    args::ContextArgs,
    context::{self, SessionContext},
    devices::HeldDevice,
    failure::Failure,
};

/// A connected client and the device that it is.
pub(crate) struct Session {
    /// The SDK's client.
    pub(crate) client: Client,
    _held: Option<HeldDevice>,
}

/// Connects as the context says, with at most `window` sends unanswered.
pub(crate) async fn connect(args: &ContextArgs, window: usize) -> Result<Session, Failure> {
    connect_with(args, |builder| builder.window(window)).await
}

/// The same with settings of the caller's own.
pub(crate) async fn connect_with(
    args: &ContextArgs,
    settings: impl FnOnce(Builder) -> Builder,
) -> Result<Session, Failure> {
    let SessionContext { gateways, ca, token, held } = context::session(args)?;
    let mut builder = settings(Client::builder().ca_file(ca).token(token));
    for gateway in gateways {
        builder = builder.gateway(gateway);
    }
    builder = match &held {
        Some(held) => builder.cursors(FileCursors::open(&held.folder).map_err(Failure::failed)?),
        None => builder.cursors(MemoryCursors::new()),
    };
    let client = builder.connect().await.map_err(failure)?;
    Ok(Session { client, _held: held })
}

/// What the SDK's errors mean for the caller. A time-out stays what it is: nobody knows.
pub(crate) fn failure(error: ClientError) -> Failure {
    match error {
        ClientError::Refused(refusal) | ClientError::Ended(refusal) => Failure::Refused(refusal),
        ClientError::Config(what) => Failure::Misuse(what),
        other => Failure::failed(other),
    }
}
