//! The user's list of conversations as a session follows it: read once at the resume, then looked at again whenever the
//! user's own stream moved, so that being added shows by itself. What is asked when is decided by `session::listing`.

use stentor_engine::{
    limits,
    session::listing::{Ask, Listed},
};
use stentor_proto::{
    ids::ShardId,
    internal::{self, gateway_frame::Frame, lookup},
    v1::{self, Refusal},
};

use super::{Session, unexpected};
use crate::{
    fanout::Topic,
    inbox::{Purpose, Reply},
};

impl Session {
    /// Reads the list and watches its head. Both begin at once: what changes before the head is registered shows by it.
    pub(super) fn follow_user(&mut self) {
        if let Ok(shard) = self.core.shard_of(&self.who.app, self.who.user.as_str()) {
            let topic = Topic::User(self.who.user.as_str());
            // Without a place the list is only read once: the session lives on.
            self.streams.user = self.core.watch(shard, &self.who.app, topic, self.place, &self.inbox);
        }
        let ask = self.streams.list.begin();
        self.ask_list(ask);
    }

    pub(super) fn unfollow_user(&mut self) {
        if let Some(place) = self.streams.user.take() {
            self.core.unwatch(place, self.place, &self.inbox);
        }
    }

    /// The head of the user's own stream was heard of.
    pub(super) fn user_head(&mut self, head: u64) {
        if let Some(ask) = self.streams.list.head(head) {
            self.ask_list(ask);
        }
    }

    pub(super) fn ask_list(&mut self, ask: Ask) {
        let Ok(shard) = self.core.shard_of(&self.who.app, self.who.user.as_str()) else {
            return self.streams.list.failed(self.core.now_ms());
        };
        let what = lookup::What::Conversations(v1::ListRequest { after: ask.after, limit: limits::LIST_PAGE });
        let lookup = internal::Lookup { changed_after: ask.changed_after, ..self.lookup(shard, what) };
        let ticket = self.ticket(Purpose::Conversations);
        self.core.ask(shard, Frame::Lookup(lookup), ticket);
    }

    pub(super) fn lookup(&self, shard: ShardId, what: lookup::What) -> internal::Lookup {
        internal::Lookup {
            id: 0,
            shard: shard.0,
            app: self.who.app.as_str().into(),
            user: self.who.user.as_str().into(),
            device: self.who.device.as_str().into(),
            what: Some(what),
            changed_after: 0,
        }
    }

    /// A page of the list. Conversations that the device listed keep its own cursor. Where he was removed nothing is to
    /// be done: that conversation's stream ends at the event.
    pub(super) fn conversations(&mut self, result: Result<Reply, Refusal>) {
        let now_ms = self.core.now_ms();
        match result {
            Ok(Reply::Conversations(state)) => {
                let resuming = !self.streams.list.is_whole();
                for listed in state.conversations.iter().filter(|listed| !listed.removed) {
                    self.follow(listed, resuming);
                }
                if let Listed::Ask(ask) = self.streams.list.page(state.head, &state.next, now_ms) {
                    self.ask_list(ask);
                }
            }
            other => {
                let refusal = unexpected(other);
                if refusal.retryable {
                    self.streams.list.failed(now_ms);
                } else {
                    tracing::warn!(user = %self.who.user, reason = refusal.reason, "no list of conversations");
                    self.streams.list.end();
                }
            }
        }
        if self.streams.list.is_whole() {
            self.listed();
        }
    }
}
