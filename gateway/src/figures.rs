//! Parts of a gateway alone, for measuring them (`gateway/benches`). Must never be used by a gateway.

use std::sync::Arc;

use stentor_proto::{
    Bytes,
    ids::{AppId, BadId, PlacementVersion},
    internal,
};

use crate::{
    fanout::{Fanout, Topic},
    inbox::Inbox,
    link::Links,
    metrics::Metrics,
    sessions::Sessions,
    shard::Around,
};

/// One conversation that so many sessions watch.
pub struct FanoutFigure {
    links: Links,
    metrics: Metrics,
    sessions: Sessions,
    fanout: Fanout,
    inboxes: Vec<Arc<Inbox>>,
}

impl FanoutFigure {
    /// The conversation is `conversation` of the app `app`.
    pub fn new(sessions: usize) -> Result<Self, BadId> {
        let app = AppId::new("app")?;
        let (all, mut fanout) = (Sessions::default(), Fanout::new(0));
        let inboxes: Vec<_> = (0..sessions).map(|_| Arc::new(Inbox::default())).collect();
        for inbox in &inboxes {
            let place = all.enter(inbox);
            fanout.watch(&app, Topic::Conversation("conversation"), place, inbox);
        }
        let links = Links::new(std::iter::empty());
        Ok(Self { links, metrics: Metrics::default(), sessions: all, fanout, inboxes })
    }

    /// Carries event records, which follow what was carried before, into every session's inbox. False: they cannot be
    /// used.
    pub fn live(&mut self, records: Vec<Bytes>) -> bool {
        let (app, conversation) = ("app".into(), "conversation".into());
        let (links, metrics, sessions) = (&self.links, &self.metrics, &self.sessions);
        let placement = PlacementVersion(1);
        let around = Around { links, metrics, sessions, placement, now_ms: 0, frame_bytes: 64 * 1024 };
        self.fanout.live(internal::Live { shard: 1, app, conversation, records }, &around).is_ok()
    }

    /// Takes everything out of all inboxes, as their sessions do; how many pushes that were.
    pub fn take(&self) -> usize {
        self.inboxes.iter().map(|inbox| inbox.take().pushes.len()).sum()
    }
}
