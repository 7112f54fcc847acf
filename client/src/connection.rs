//! How a client's connection is, for programs that show it to people. Must never be taken for a promise: a connection
//! that is there may be gone already.

use std::time::Duration;

use tokio::time::Instant;

/// How the connection is right now; see [`Client::connection`](crate::Client::connection).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    /// A gateway has the session.
    Online {
        /// The gateway's name.
        gateway: String,
        /// Since when.
        lasted: Duration,
    },
    /// There is none; the client tries by itself, for ever.
    Offline {
        /// Since when.
        lasted: Duration,
        /// When the next attempt begins; zero while one is under way.
        retry_in: Duration,
        /// Why the last attempt, or the last connection, failed.
        reason: Option<String>,
    },
}

/// The same by moments instead of durations.
#[derive(Debug)]
pub(crate) struct State {
    /// The gateway's name while there is a connection.
    gateway: Option<String>,
    since: Instant,
    retry_at: Instant,
    reason: Option<String>,
}

impl State {
    pub(crate) fn new(now: Instant) -> Self {
        Self { gateway: None, since: now, retry_at: now, reason: None }
    }

    pub(crate) fn online(&mut self, now: Instant, gateway: &str) {
        (self.gateway, self.since) = (Some(gateway.to_owned()), now);
    }

    /// Does nothing when there was no connection: the time without one goes on.
    pub(crate) fn offline(&mut self, now: Instant) {
        if self.gateway.take().is_some() {
            (self.since, self.retry_at) = (now, now);
        }
    }

    pub(crate) fn retry_at(&mut self, at: Instant) {
        self.retry_at = at;
    }

    pub(crate) fn failed(&mut self, reason: String) {
        self.reason = Some(reason);
    }

    pub(crate) fn reason(&self) -> Option<String> {
        self.reason.clone()
    }

    pub(crate) fn is_online(&self) -> bool {
        self.gateway.is_some()
    }

    pub(crate) fn at(&self, now: Instant) -> Connection {
        let lasted = now.saturating_duration_since(self.since);
        match &self.gateway {
            Some(gateway) => Connection::Online { gateway: gateway.clone(), lasted },
            None => Connection::Offline {
                lasted,
                retry_in: self.retry_at.saturating_duration_since(now),
                reason: self.reason.clone(),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_without_a_connection_goes_on_over_failed_attempts() {
        let began = Instant::now();
        let after = |seconds| began + Duration::from_secs(seconds);
        let mut state = State::new(began);
        state.online(after(1), "gateway-1");
        let lasted = Duration::from_secs(4);
        assert_eq!(state.at(after(5)), Connection::Online { gateway: "gateway-1".into(), lasted });
        state.offline(after(5));
        state.retry_at(after(6));
        state.failed("refused".into());
        state.offline(after(6));
        state.retry_at(after(10));
        let offline = Connection::Offline {
            lasted: Duration::from_secs(2),
            retry_in: Duration::from_secs(3),
            reason: Some("refused".into()),
        };
        assert_eq!(state.at(after(7)), offline);
        let Connection::Offline { retry_in, .. } = state.at(after(11)) else { panic!("still offline") };
        assert_eq!(retry_in, Duration::ZERO, "an attempt is under way");
    }
}
