//! Where a client's tokens come from: one that never changes, or whoever is asked for a fresh one before each connection.
//! Must never show one: tokens are secrets.

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::time::timeout;

/// How long a fresh token may take before the attempt to connect counts as failed: less than the 10 s for which a gateway
/// waits for a hello on a new connection.
const PATIENCE: Duration = Duration::from_secs(8);

type Asked = Pin<Box<dyn Future<Output = Result<String, String>> + Send>>;

/// See the module.
#[derive(Clone)]
pub(crate) enum TokenSource {
    Fixed(Arc<str>),
    Asked(Arc<dyn Fn() -> Asked + Send + Sync>),
}

impl TokenSource {
    pub(crate) fn asked<F, T>(source: F) -> Self
    where
        F: Fn() -> T + Send + Sync + 'static,
        T: Future<Output = Result<String, String>> + Send + 'static,
    {
        Self::Asked(Arc::new(move || Box::pin(source())))
    }

    /// Whether an expired token can be followed by another one.
    pub(crate) fn gives_fresh_ones(&self) -> bool {
        matches!(self, Self::Asked(_))
    }

    /// The token for the next connection, or why there is none.
    pub(crate) async fn token(&self) -> Result<Arc<str>, String> {
        match self {
            Self::Fixed(token) => Ok(Arc::clone(token)),
            Self::Asked(source) => match timeout(PATIENCE, source()).await {
                Ok(token) => Ok(token.map_err(|why| format!("no token: {why}"))?.into()),
                Err(_) => Err("no token came in time".into()),
            },
        }
    }
}
