//! Conversations that a load talks in: made before it, counted after it. Must never take an acknowledged message that is
//! not there for a success.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use stentor_client::{Client, ConversationId, ConversationKind, Create, Message, Role, UserId};

use crate::BenchError;

/// Calls that a session has under way at most.
const CALLS: usize = 8;
/// Participants that a creation may name.
const NAMED_AT_CREATION: usize = 2_000;
/// A group has no more, its owner included; a conversation with more is a channel.
const GROUP_PARTICIPANTS: usize = 10_000;
/// More of them at the same time only wait for the brokers.
const CREATING_SESSIONS: usize = 32;
/// So many conversations are counted after a run; of more, as many spread over all.
const COUNTED: usize = 2_000;

/// A conversation with what was sent into it.
#[derive(Debug)]
pub(crate) struct Talk {
    pub(crate) id: ConversationId,
    /// Its last seq before anything was sent.
    base: u64,
    /// Messages that were acknowledged.
    pub(crate) acknowledged: AtomicU64,
    /// Sends whose end is not known.
    pub(crate) unknown: AtomicU64,
}

/// A conversation that is wanted: whose session creates it, its id, who takes part besides.
pub(crate) type Wanted = (Client, String, Vec<UserId>);

/// Creates one. With a first message it is sent, and counts for nothing: afterwards the session knows its place in the
/// conversation, which it would have to ask for under load.
async fn create((owner, id, participants): Wanted, first: Option<Bytes>) -> Result<Talk, BenchError> {
    let failed = |what: &str| BenchError::client(format!("{what} {id}"));
    let id_of = ConversationId::new(&id).map_err(BenchError::cluster)?;
    let named = participants.len().min(NAMED_AT_CREATION);
    let (kind, role) = match participants.len() < GROUP_PARTICIPANTS {
        true => (ConversationKind::Group, Role::Writer),
        false => (ConversationKind::Channel, Role::Reader),
    };
    let create = Create { kind, ..Create::group(participants[..named].iter().cloned()).id(id_of.clone()) };
    owner.create_conversation(create).await.map_err(failed("create"))?;
    let add = |user: UserId| {
        let (owner, id) = (&owner, id_of.clone());
        async move { owner.add(&id, &user, role).await }
    };
    let added = stream::iter(participants[named..].to_vec()).map(add).buffer_unordered(CALLS);
    added.try_for_each(async |_| Ok(())).await.map_err(failed("add participants to"))?;
    let base = match first {
        None => owner.show(&id_of).await.map_err(failed("look at"))?.head,
        Some(body) => {
            let sent = owner.send(&id_of, Message::bytes(String::new(), body)).await;
            sent.map_err(failed("send a first message to"))?.seq.0
        }
    };
    Talk::new(&id, base)
}

/// Creates many, in their order, with as much under way as the sessions carry.
pub(crate) async fn create_all(wanted: Vec<Wanted>, first: Option<&Bytes>) -> Result<Vec<Arc<Talk>>, BenchError> {
    let users = wanted.iter().filter_map(|(owner, ..)| owner.identity()).map(|identity| &identity.user);
    let sessions = users.collect::<HashSet<_>>().len().clamp(1, CREATING_SESSIONS);
    let made = stream::iter(wanted).map(|wanted| async move { create(wanted, first.cloned()).await.map(Arc::new) });
    made.buffered(CALLS * sessions).try_collect().await
}

/// Looks whether the conversations have what was acknowledged: (reader, conversation).
pub(crate) async fn count(talks: Vec<(Client, Arc<Talk>)>) -> Result<usize, BenchError> {
    let step = talks.len().div_ceil(COUNTED).max(1);
    let chosen: Vec<_> = talks.into_iter().step_by(step).collect();
    let counted = chosen.len();
    let looked = stream::iter(chosen).map(|(reader, talk)| async move {
        let shown = reader.show(&talk.id).await.map_err(BenchError::client(format!("look at {}", talk.id)))?;
        talk.check(shown.head)
    });
    looked.buffer_unordered(CALLS).try_for_each(async |()| Ok(())).await?;
    Ok(counted)
}

impl Talk {
    /// One with so many events in it.
    pub(crate) fn new(id: &str, base: u64) -> Result<Self, BenchError> {
        let id = ConversationId::new(id).map_err(BenchError::cluster)?;
        Ok(Self { id, base, acknowledged: AtomicU64::new(0), unknown: AtomicU64::new(0) })
    }

    /// The seq of the last message that was acknowledged, if all came one after the other.
    pub(crate) fn least_head(&self) -> u64 {
        self.base + self.acknowledged.load(Ordering::Relaxed)
    }

    /// Whether what is there is what was acknowledged.
    pub(crate) fn check(&self, head: u64) -> Result<(), BenchError> {
        let (acknowledged, unknown) = (self.acknowledged.load(Ordering::Relaxed), self.unknown.load(Ordering::Relaxed));
        let there = head.saturating_sub(self.base);
        if (acknowledged..=acknowledged + unknown).contains(&there) {
            return Ok(());
        }
        Err(BenchError::Wrong(format!(
            "{} has {there} messages, {acknowledged} were acknowledged and {unknown} got no answer",
            self.id
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_or_invented_message_is_found() {
        let talk = Talk {
            id: ConversationId::new("c").unwrap(),
            base: 3,
            acknowledged: AtomicU64::new(10),
            unknown: AtomicU64::new(2),
        };
        assert!([13, 14, 15].iter().all(|&head| talk.check(head).is_ok()));
        assert!([0, 12, 16].iter().all(|&head| matches!(talk.check(head), Err(BenchError::Wrong(_)))));
    }
}
