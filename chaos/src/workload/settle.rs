//! The end of a run, when all is healed: whole conversations for the oracle, and the proof that every device gets what is
//! its own. Must never wait without an end: what does not come is named.

use std::time::Duration;

use futures_util::future::join_all;
use stentor_client::{ClientError, History, Item as Read, Seq};
use tokio::time::{Instant, sleep, timeout_at};

use super::{Connect, Place, Stage, actor::Actor, tail};
use crate::oracle::{Item, Membership};

/// Between two attempts to read.
const AGAIN: Duration = Duration::from_millis(200);

/// How the end was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settled {
    /// What did not come in time, each as a sentence; empty when all is well.
    pub missing: Vec<String>,
}

/// A conversation that was read whole.
struct Whole {
    place: Place,
    head: u64,
    members: Membership,
}

/// `within` is what each of the three steps may take: new sessions for all, whole conversations, all events at all devices.
pub(super) async fn settle<C: Connect>(stage: &Stage<C>, actors: &mut [Actor<C>], within: Duration) -> Settled {
    // Nothing new: what was under way is decided by now, or never will be by these sessions.
    let missing = join_all(actors.iter_mut().map(|actor| anew(actor, within))).await;
    let mut settled = Settled { missing: missing.into_iter().flatten().collect() };
    let deadline = Instant::now() + within;
    let mut wholes = Vec::new();
    for place in &stage.places {
        let Some(owner) = actors.iter().find(|actor| actor.who == place.owner) else { continue };
        match whole(stage, owner, place, deadline).await {
            Ok(whole) => wholes.push(whole),
            Err(error) => settled.missing.push(format!("{} cannot be read: {error}", place.name)),
        }
    }
    let wholes = &wholes;
    let mine = |actor: &Actor<C>| {
        let user = actor.who.user.clone();
        wholes.iter().filter(move |whole| whole.members.is_in(&user, whole.head))
    };
    for actor in actors.iter_mut() {
        for whole in mine(actor) {
            tail::follow(actor, &whole.place).await;
        }
    }
    let deadline = Instant::now() + within;
    for actor in actors.iter() {
        for whole in mine(actor) {
            if let Err(what) = comes_to(actor, whole, deadline).await {
                settled.missing.push(what);
            }
        }
    }
    settled
}

/// A new session for a device; else what is missing.
async fn anew<C: Connect>(actor: &mut Actor<C>, within: Duration) -> Option<String> {
    actor.close().await;
    let error = actor.connect_within(within).await.err()?;
    Some(format!("{} finds no gateway: {error}", actor.who))
}

/// Reads all of a conversation, in pages, until it was once read without a failure.
async fn whole<C: Connect>(
    stage: &Stage<C>,
    owner: &Actor<C>,
    place: &Place,
    deadline: Instant,
) -> Result<Whole, ClientError> {
    loop {
        match read_all(owner, place).await {
            Ok((items, head)) => {
                let events = items.iter().filter_map(|item| match item {
                    Item::Event(event) => Some(event),
                    Item::Hidden { .. } => None,
                });
                let members = Membership::of(events, false);
                stage.recorder.read_all(&place.name, items, head);
                return Ok(Whole { place: place.clone(), head, members });
            }
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => sleep(AGAIN).await,
        }
    }
}

async fn read_all<C: Connect>(owner: &Actor<C>, place: &Place) -> Result<(Vec<Item>, u64), ClientError> {
    let client = owner.client().ok_or(ClientError::Closed)?;
    let mut items: Vec<Item> = Vec::new();
    loop {
        let after = items.last().map_or(0, |item| item.span().1);
        let page = client.history(&place.id, History::after(Seq(after)).linearizable()).await?;
        items.extend(page.items.iter().map(|item: &Read| Item::from(item)));
        if !page.more {
            return Ok((items, page.head.0));
        }
    }
}

/// Waits until a device has everything of a conversation.
async fn comes_to<C: Connect>(actor: &Actor<C>, whole: &Whole, deadline: Instant) -> Result<(), String> {
    let Whole { place, head, .. } = whole;
    loop {
        let moved = actor.streams.moved.notified();
        tokio::pin!(moved);
        // Before looking: what comes in between would be missed.
        moved.as_mut().enable();
        let at = actor.streams.get(&place.id).map_or(0, |open| open.last);
        if at >= *head {
            return Ok(());
        }
        if timeout_at(deadline, moved).await.is_err() {
            return Err(format!("{} has {at} of {head} events of {}", actor.who, place.name));
        }
    }
}
