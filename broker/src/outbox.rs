//! Carries a shard's outbox to the users' shards: who was added to or removed from which conversation. Effects are
//! hints, rows are the truth: a new leader scans them. Must never take an item out before the user's shard has it.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use stentor_engine::{
    command,
    effect::Outcome,
    key::{Kind, Parts, RowKey},
    limits,
    rows::Row,
};
use stentor_proto::{
    Bytes,
    ids::{AppId, ConversationId, META_SHARD, Seq, UserId},
};
use tokio::sync::mpsc;

use crate::{
    effects::OutboxItem,
    node::Node,
    router::{self, Retry},
    shard::HostedShard,
};

/// Rows of one scan.
const SCAN_ROWS: usize = 1_000;
/// After a failure the rows are scanned again this much later.
const AGAIN: Duration = Duration::from_secs(2);

/// Runs beside one replica and works while it leads; until the broker stops.
pub(crate) async fn run(node: Arc<Node>, hosted: Arc<HostedShard>, mut hints: mpsc::Receiver<OutboxItem>) {
    if hosted.shard == META_SHARD {
        return;
    }
    let mut leadership = hosted.leadership.clone();
    let mut scanned_term = 0;
    loop {
        let now = *leadership.borrow_and_update();
        let lost = hosted.effects.take_lost_hints();
        if now.ready && (now.term != scanned_term || lost) {
            scanned_term = now.term;
            if !scan(&node, &hosted).await {
                scanned_term = 0;
            }
        }
        let mut items = Vec::new();
        tokio::select! {
            () = node.stop.cancelled() => return,
            changed = leadership.changed() => if changed.is_err() { return },
            n = hints.recv_many(&mut items, limits::OUTBOX_DONE_ITEMS) => {
                if n == 0 {
                    return;
                }
                if hosted.ready() && !carry(&node, &hosted, items).await {
                    scanned_term = 0;
                }
            }
            () = tokio::time::sleep(AGAIN), if now.ready && scanned_term == 0 => {}
        }
    }
}

/// Carries every item that the rows have. False: something is left for later.
async fn scan(node: &Node, hosted: &HostedShard) -> bool {
    let mut all = true;
    for slot in hosted.slots.clone() {
        let mut after: Option<RowKey> = None;
        loop {
            if !hosted.ready() {
                return false;
            }
            let rows = match hosted.reader.scan(&slot.to_be_bytes(), after.as_ref(), SCAN_ROWS).await {
                Ok(rows) => rows,
                Err(error) => {
                    tracing::warn!(shard = %hosted.shard, %error, "cannot scan the outbox");
                    return false;
                }
            };
            let last = rows.len() < SCAN_ROWS;
            after = rows.last().map(|(key, _)| key.clone());
            let items: Vec<_> = rows.into_iter().filter_map(|(key, row)| item(&key, row)).collect();
            if !items.is_empty() {
                all &= carry(node, hosted, items).await;
            }
            if last {
                break;
            }
        }
    }
    all
}

fn item(key: &RowKey, row: Row) -> Option<OutboxItem> {
    let Row::Outbox(row) = row else { return None };
    let parts = Parts::of(key.as_bytes()).filter(|parts| parts.kind == Kind::Outbox)?;
    let (number, _user) = parts.sub.split_first_chunk::<8>()?;
    Some(OutboxItem {
        app: Bytes::copy_from_slice(parts.app),
        conversation: Bytes::copy_from_slice(parts.id),
        item: Seq(u64::from_be_bytes(*number)),
        user: row.user,
        removed: row.removed,
    })
}

/// Tells the users' shards, several at a time, then takes the told items out. False: something is left for later.
async fn carry(node: &Node, hosted: &HostedShard, items: Vec<OutboxItem>) -> bool {
    let count = items.len();
    let told = stream::iter(items)
        .map(|item| async move { tell(node, &item).await.then_some(item) })
        .buffered(limits::OUTBOX_IN_FLIGHT)
        .filter_map(std::future::ready);
    let told: Vec<OutboxItem> = told.collect().await;
    let mut all = told.len() == count;
    for of_one in told.chunk_by(|a, b| a.app == b.app && a.conversation == b.conversation) {
        all &= take_out(node, hosted, of_one).await;
    }
    all
}

async fn tell(node: &Node, item: &OutboxItem) -> bool {
    let ids = (AppId::new(&item.app), UserId::new(&item.user), ConversationId::new(&item.conversation));
    let (Ok(app), Ok(user), Ok(conversation)) = ids else { return false };
    let Some(view) = node.meta.view() else { return false };
    let Some(shard) = view.slots.shard_of_id(app.as_str(), user.as_str()) else { return false };
    let command = command::user_conversation(&app, &user, &conversation, item.item, item.removed);
    match router::propose(node, shard, command::encode(&command), Retry::Always).await {
        Ok(Outcome::Refused { reason, .. }) => {
            // The user's shard will not take it, now or later: keeping the item would only fill the outbox.
            tracing::warn!(%app, %user, %conversation, reason = reason.code(), "a user's list cannot grow");
            !reason.retryable()
        }
        Ok(_) => true,
        Err(refusal) => {
            tracing::debug!(%app, %user, %conversation, reason = refusal.reason, "a user's shard cannot be told yet");
            false
        }
    }
}

async fn take_out(node: &Node, hosted: &HostedShard, items: &[OutboxItem]) -> bool {
    let Some(first) = items.first() else { return true };
    let (Ok(app), Ok(conversation)) = (AppId::new(&first.app), ConversationId::new(&first.conversation)) else {
        return false;
    };
    let done: Vec<_> = items.iter().filter_map(|i| Some((i.item, UserId::new(&i.user).ok()?))).collect();
    let command = command::encode(&command::outbox_done(&app, &conversation, &done));
    matches!(
        router::propose(node, hosted.shard, command, Retry::Always).await,
        Ok(Outcome::Done | Outcome::Accepted { .. })
    )
}
