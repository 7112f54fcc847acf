//! How a client is set up. Must never connect with a setting that cannot work: what is wrong is said at once.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use stentor_engine::{limits, session::client::Config};
use stentor_proto::ids::ConversationId;
use stentor_transport::{Host, tls::ClientTls};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::{
    Client, ClientError, CursorStore, From, MemoryCursors,
    dial::Dialer,
    driver::Driver,
    shared::{Command, Shared},
    token::TokenSource,
};

/// Commands that wait for the client's task: enough to fill a write, few enough to cost an idle client little.
const COMMANDS: usize = 64;
/// The most unanswered sends of one client; the window of a connection is smaller.
const MAX_WINDOW: usize = 65_536;

/// How to connect; see [`Client::builder`].
pub struct Builder {
    gateways: Vec<String>,
    ca: Option<PathBuf>,
    tls: Option<ClientTls>,
    token: TokenSource,
    cursors: Arc<dyn CursorStore>,
    streams: Vec<(ConversationId, From)>,
    window: usize,
    connect_timeout: Duration,
    request_timeout: Duration,
    config: Config,
    host: Host,
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Never the token.
        f.debug_struct("Builder")
            .field("gateways", &self.gateways)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Builder {
    pub(crate) fn new() -> Self {
        let agent = concat!("stentor-client/", env!("CARGO_PKG_VERSION")).to_owned();
        Self {
            gateways: Vec::new(),
            ca: None,
            tls: None,
            token: TokenSource::Fixed("".into()),
            cursors: Arc::new(MemoryCursors::new()),
            streams: Vec::new(),
            window: 256,
            connect_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(15),
            // Moves are gathered before the session sees them.
            config: Config { agent, cursor_interval_ms: 0, ..Config::default() },
            host: Host::real(),
        }
    }

    /// Adds a gateway, `host:port`. With several, the client begins at a random one and goes to the next when one
    /// fails.
    #[must_use]
    pub fn gateway(mut self, address: impl ToString) -> Self {
        self.gateways.push(address.to_string());
        self
    }

    /// The certificate authority that gateways must be certified by, a PEM file.
    #[must_use]
    pub fn ca_file(mut self, path: impl AsRef<Path>) -> Self {
        self.ca = Some(path.as_ref().to_owned());
        self
    }

    /// The same, read already: many clients of one process share it.
    #[must_use]
    pub fn tls(mut self, tls: ClientTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// The JWT that names app, user and device.
    #[must_use]
    pub fn token(mut self, token: impl Into<String>) -> Self {
        self.token = TokenSource::Fixed(token.into().into());
        self
    }

    /// Who is asked for a token before each connection, for a session that outlives its tokens: when one has expired the
    /// gateway ends the connection, and the client comes back with the next. An error counts as a failed attempt.
    #[must_use]
    pub fn token_source<F, T>(mut self, source: F) -> Self
    where
        F: Fn() -> T + Send + Sync + 'static,
        T: Future<Output = Result<String, String>> + Send + 'static,
    {
        self.token = TokenSource::asked(source);
        self
    }

    /// What this program calls itself, for the gateway's log.
    #[must_use]
    pub fn agent(mut self, agent: impl Into<String>) -> Self {
        self.config.agent = agent.into();
        self
    }

    /// Where cursors are kept between runs; in memory unless told.
    #[must_use]
    pub fn cursors(mut self, cursors: impl CursorStore) -> Self {
        self.cursors = Arc::new(cursors);
        self
    }

    /// Begins a conversation's stream with the connection: all of them ride in its one resume frame, where
    /// [`Client::subscribe`] sends a frame for each. The session refuses more than it can hold when it connects.
    #[must_use]
    pub fn subscribe(mut self, conversation: &ConversationId, from: From) -> Self {
        self.streams.push((conversation.clone(), from));
        self
    }

    /// Streams every conversation of the user, also those that were not subscribed to: from the cursor that the
    /// server keeps for this device.
    #[must_use]
    pub fn follow_all(mut self) -> Self {
        self.config.only_listed = false;
        self
    }

    /// Unanswered sends of this client, 1 to 65,536; 256 unless told. [`Client::send_pipelined`] waits beyond it.
    #[must_use]
    pub fn window(mut self, sends: usize) -> Self {
        self.window = sends.clamp(1, MAX_WINDOW);
        self
    }

    /// Event bytes that may wait for [`Client::next`], at most 1 MiB; 256 KiB unless told.
    #[must_use]
    pub fn inbox_bytes(mut self, bytes: u64) -> Self {
        self.config.credit_bytes = bytes.clamp(1_024, limits::SESSION_MAX_CREDIT_BYTES);
        self
    }

    /// How long a silent connection may be idle before it is pinged, at least 1 s; 30 s unless told. A gateway that
    /// does not answer is given up 10 s later. Shorter is for programs that show the connection to somebody.
    #[must_use]
    pub fn ping_idle(mut self, idle: Duration) -> Self {
        self.config.ping_idle_ms = (idle.as_millis() as u64).max(1_000);
        self
    }

    /// How long [`Builder::connect`] tries; 30 s unless told. Later reconnects are tried for ever.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long requests (history, create, …) wait for their answer; 15 s unless told.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// The machine that the client runs on; the real one unless told. For simulations.
    #[must_use]
    pub fn host(mut self, host: Host) -> Self {
        self.host = host;
        self
    }

    /// Connects and greets. Returns when a gateway took the session, or with the reason why none did. Must be called
    /// within a tokio runtime with timers and IO; the client's task runs there.
    pub async fn connect(self) -> Result<Client, ClientError> {
        if self.gateways.is_empty() {
            return Err(ClientError::Config("no gateway was given".into()));
        }
        let tls = match (self.tls, self.ca) {
            (Some(tls), _) => tls,
            (None, Some(ca)) => ClientTls::public(&ca).map_err(|e| ClientError::Config(e.to_string()))?,
            (None, None) => return Err(ClientError::Config("no certificate authority was given".into())),
        };
        let shared = Arc::new(Shared::new(self.config.credit_bytes, self.host.clone()));
        let (commands, receiver) = mpsc::channel::<Command>(COMMANDS);
        let (first, welcomed) = oneshot::channel();
        let dialer = Dialer::new(self.gateways, tls, self.host);
        let mut driver =
            Driver::new(self.config, dialer, self.token, self.cursors, Arc::clone(&shared), receiver, first);
        for (conversation, from) in &self.streams {
            driver.subscribe(conversation, *from)?;
        }
        let task = tokio::spawn(driver.run());
        let outcome = tokio::time::timeout(self.connect_timeout, welcomed).await;
        match outcome {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => return Err(error),
            Ok(Err(_)) => return Err(ClientError::Unreachable("the client's task ended".into())),
            Err(_) => {
                task.abort();
                let why = shared.last_failure().unwrap_or_else(|| "none answered in time".into());
                return Err(ClientError::Unreachable(why));
            }
        }
        Ok(Client {
            shared,
            commands,
            window: Arc::new(Semaphore::new(self.window)),
            window_sends: self.window as u32,
            request_timeout: self.request_timeout,
        })
    }
}
